//! How spans are begun: as spans of `tracing`, on a dispatcher that belongs to one proxy.
//!
//! The dispatcher has a registry, the layer of `tracing-opentelemetry`, which hands each span that closes to the SDK, and a
//! filter that lets nothing but the spans of this file pass. A `tracing::Span` keeps the dispatcher it was made on, so it is
//! told and closed there from whichever thread: the process-wide subscriber, which writes the log, hears nothing of it, and
//! two proxies in one process stay apart. Because of the filter, no event of the program or of a library becomes dearer, or
//! is let through, because this dispatcher is there.
//!
//! Whether a trace is recorded is decided first, by the caller's flag or by the id that the trace will have. One that is not
//! makes no span.
//!
//! The tree of a trace is OpenTelemetry's: a span gets its parent by `set_parent`, and is a root to `tracing`. (A registry
//! lets go of a span's parent on whatever dispatcher is the default when the span closes, which is not this one.) Names and
//! attributes are not known before run time, so they go to the span's OpenTelemetry side, all of a moment at once.

use std::{borrow::Cow, cell::Cell, fmt::Display};

use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler as SdkSampler, SamplingDecision, SdkTracer, ShouldSample as _,
};
use tracing::{Dispatch, Metadata, Span, dispatcher::with_default, level_filters::LevelFilter};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt as _};
use tracing_subscriber::{Registry, filter::FilterFn, layer::SubscriberExt as _, registry};

use super::{
    SCOPE,
    w3c::{self, TRACEPARENT_BYTES},
};
use crate::base::config::otlp::Sampler;

thread_local! {
    /// The id by which the trace that is about to begin was decided on.
    static DRAWN: Cell<Option<TraceId>> = const { Cell::new(None) };
}

/// What makes spans. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracing {
    dispatch: Dispatch,
    sampler: Sampler,
}

/// The beginning of a request.
#[derive(Debug)]
pub enum Served {
    /// It is recorded.
    Recorded(LiveSpan),
    /// It is not, and this is the `traceparent` that is handed on.
    Unsampled([u8; TRACEPARENT_BYTES]),
}

/// A span that has begun. It ends when it is dropped, and is exported then.
#[derive(Debug)]
pub struct LiveSpan {
    /// While this lives, the span is open.
    span: Span,
    /// Its OpenTelemetry side.
    context: Context,
}

/// What is decided of a trace before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Decision {
    trace_id: TraceId,
    is_sampled: bool,
}

// === impl Tracing ===

impl Tracing {
    /// What makes spans that `tracer` exports. It samples nothing itself: its sampler is [`decided`], its ids are [`Ids`].
    pub(super) fn new(tracer: SdkTracer, sampler: Sampler) -> Tracing {
        Tracing { dispatch: Dispatch::new(registry().with(exporting(tracer)).with(own_spans())), sampler }
    }

    /// The span of a request that this proxy serves, below its caller's, if it is to be recorded.
    pub fn serve(&self, caller: Option<SpanContext>) -> Served {
        let decision = decide(self.sampler, caller.as_ref());
        if decision.is_sampled {
            let parent = caller.map(|caller| Context::new().with_remote_span_context(caller));
            let span =
                self.begin(decision, parent, || tracing::info_span!(parent: None, "request", otel.kind = "server"));
            // The SDK records nothing more once it has been shut down.
            if span.context.span().is_recording() {
                return Served::Recorded(span);
            }
        }
        let span_id = RandomIdGenerator::default().new_span_id();
        let context = SpanContext::new(decision.trace_id, span_id, TraceFlags::default(), false, TraceState::default());
        Served::Unsampled(w3c::traceparent(&context))
    }

    /// The span of one attempt to have a request served, below the request's.
    pub fn attempt(&self, request: &LiveSpan, name: impl Display, attributes: Vec<KeyValue>) -> LiveSpan {
        let decision = Decision { trace_id: request.trace_id(), is_sampled: true };
        let span = self.begin(
            decision,
            Some(request.context.clone()),
            || tracing::info_span!(parent: None, "attempt", otel.kind = "client", otel.name = %name),
        );
        span.set_attributes(attributes);
        span
    }

    /// Something has happened that belongs to no request: a trace of its own, of no length.
    pub fn happened(&self, name: impl Display, facts: impl FnOnce() -> Vec<(&'static str, String)>) {
        let decision = decide(self.sampler, None);
        if decision.is_sampled {
            let span = self.begin(
                decision,
                None,
                || tracing::info_span!(parent: None, "event", otel.kind = "internal", otel.name = %name),
            );
            span.set_attributes(facts().into_iter().map(|(key, value)| KeyValue::new(key, value)));
        }
    }

    /// Begins the span that `make` makes, below `parent`, in the trace that has been decided on.
    fn begin(&self, decision: Decision, parent: Option<Context>, make: impl FnOnce() -> Span) -> LiveSpan {
        let span = with_default(&self.dispatch, make);
        if let Some(parent) = parent {
            // It has not been started, and its dispatcher has the layer: this does not fail.
            let _ = span.set_parent(parent);
        }
        DRAWN.set(Some(decision.trace_id));
        // This starts it.
        let context = span.context();
        DRAWN.set(None);
        LiveSpan { span, context }
    }
}

// === impl LiveSpan ===

impl LiveSpan {
    /// The trace that it belongs to.
    pub fn trace_id(&self) -> TraceId {
        self.context.span().span_context().trace_id()
    }

    /// The `traceparent` that makes others its children.
    pub fn traceparent(&self) -> [u8; TRACEPARENT_BYTES] {
        w3c::traceparent(self.context.span().span_context())
    }

    /// Calls it something else.
    pub fn update_name(&self, name: String) {
        self.context.span().update_name(name);
    }

    /// Tells this of it.
    pub fn set_attribute(&self, attribute: KeyValue) {
        self.context.span().set_attribute(attribute);
    }

    /// Tells all of these of it.
    pub fn set_attributes(&self, attributes: impl IntoIterator<Item = KeyValue>) {
        self.context.span().set_attributes(attributes);
    }

    /// Tells how it went.
    pub fn set_status(&self, status: Status) {
        self.context.span().set_status(status);
    }

    /// Tells that something has happened in it, now.
    pub fn add_event(&self, name: impl Into<Cow<'static, str>>, attributes: Vec<KeyValue>) {
        self.context.span().add_event(name, attributes);
    }

    /// Ends it now.
    pub fn end(self) {
        drop(self.span);
    }
}

// === the dispatcher ===

/// Hands spans to `tracer` when they close, with what they are told and nothing beside.
fn exporting(tracer: SdkTracer) -> OpenTelemetryLayer<Registry, SdkTracer> {
    OpenTelemetryLayer::new(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_level(false)
        .with_tracked_inactivity(false)
        .with_context_activation(false)
}

/// Lets the spans of this file pass. They are of level `info`: because of the hint, nothing below that is looked at anywhere
/// in the program for their sake.
fn own_spans() -> FilterFn {
    let is_own: fn(&Metadata<'_>) -> bool = |metadata| metadata.is_span() && metadata.target() == module_path!();
    FilterFn::new(is_own).with_max_level_hint(LevelFilter::INFO)
}

// === what the SDK is given ===

/// Ids as the SDK draws them, but for a trace that was decided on by its id: that is the one it gets.
#[derive(Debug, Default)]
pub(super) struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        DRAWN.take().unwrap_or_else(|| self.0.new_trace_id())
    }

    fn new_span_id(&self) -> SpanId {
        self.0.new_span_id()
    }
}

/// What samples spans that are not begun unless they are to be recorded.
pub(super) fn decided() -> SdkSampler {
    SdkSampler::AlwaysOn
}

pub(super) fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build()
}

// === decisions ===

/// Whether a trace that goes on from `caller`, or begins here, is recorded.
fn decide(sampler: Sampler, caller: Option<&SpanContext>) -> Decision {
    let trace_id = caller.map_or_else(|| RandomIdGenerator::default().new_trace_id(), SpanContext::trace_id);
    let is_sampled = match caller {
        Some(caller) if sampler.parent_based => caller.is_sampled(),
        Some(_) | None => is_in_ratio(sampler.ratio, trace_id),
    };
    Decision { trace_id, is_sampled }
}

/// Whether the trace with this id is one of the share that is recorded: all who go by the same ratio say the same of it.
fn is_in_ratio(ratio: f64, trace_id: TraceId) -> bool {
    if ratio >= 1.0 || ratio <= 0.0 {
        return ratio >= 1.0;
    }
    let sampler = SdkSampler::TraceIdRatioBased(ratio);
    let result = sampler.should_sample(None, trace_id, "", &SpanKind::Internal, &[], &[]);
    matches!(result.decision, SamplingDecision::RecordAndSample)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        sync::{
            Arc, Mutex,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::{
        error::OTelSdkResult,
        trace::{SdkTracerProvider, SpanData, SpanProcessor},
    };
    use tracing::{Subscriber as _, span};
    use tracing_subscriber::layer::{self, Layer};

    use super::*;

    const ALL: Sampler = Sampler { parent_based: true, ratio: 1.0 };

    /// Spans that were exported.
    #[derive(Debug, Clone, Default)]
    struct Exported(Arc<Mutex<Vec<SpanData>>>);

    impl SpanProcessor for Exported {
        fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

        fn on_end(&self, span: SpanData) {
            self.0.lock().unwrap().push(span);
        }

        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }

    impl Exported {
        fn trace_ids(&self) -> HashSet<TraceId> {
            self.0.lock().unwrap().iter().map(|span| span.span_context.trace_id()).collect()
        }

        fn names(&self) -> Vec<String> {
            self.0.lock().unwrap().iter().map(|span| span.name.to_string()).collect()
        }
    }

    /// Counts the spans of `tracing` that are made.
    #[derive(Debug, Clone, Default)]
    struct Made(Arc<AtomicUsize>);

    impl<S: tracing::Subscriber> Layer<S> for Made {
        fn on_new_span(&self, _: &span::Attributes<'_>, _: &span::Id, _: layer::Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn provider() -> (SdkTracerProvider, Exported) {
        let exported = Exported::default();
        let provider = SdkTracerProvider::builder()
            .with_sampler(decided())
            .with_id_generator(Ids::default())
            .with_span_processor(exported.clone())
            .build();
        (provider, exported)
    }

    fn caller(trace_id: u128, flags: TraceFlags) -> SpanContext {
        SpanContext::new(TraceId::from(trace_id), SpanId::from(7_u64), flags, true, TraceState::default())
    }

    #[test]
    fn what_is_not_sampled_makes_no_span_and_what_is_keeps_the_id_it_was_decided_by() {
        let (provider, exported) = provider();
        let made = Made::default();
        let tracer = provider.tracer_with_scope(scope());
        let subscriber = registry().with(exporting(tracer)).with(made.clone()).with(own_spans());
        let sampler = Sampler { parent_based: true, ratio: 0.25 };
        let tracing = Tracing { dispatch: Dispatch::new(subscriber), sampler };
        let mut recorded = HashSet::new();
        for _ in 0..1000 {
            match tracing.serve(None) {
                Served::Recorded(span) => {
                    assert!(is_in_ratio(0.25, span.trace_id()));
                    assert!(span.traceparent().ends_with(b"-01"));
                    recorded.insert(span.trace_id());
                }
                Served::Unsampled(traceparent) => {
                    let text = std::str::from_utf8(&traceparent).unwrap();
                    let trace_id = TraceId::from_hex(&text[3..35]).unwrap();
                    assert!(!is_in_ratio(0.25, trace_id) && text.ends_with("-00"), "{text}");
                    assert_ne!(&text[36..52], "0000000000000000");
                }
            }
        }
        // A share of 0.25 of a thousand, give or take ten deviations.
        assert!((113..387).contains(&recorded.len()), "{}", recorded.len());
        assert_eq!(exported.trace_ids(), recorded);
        assert_eq!(made.0.load(Ordering::Relaxed), recorded.len());
        tracing.happened("lost", Vec::new);
        assert!(made.0.load(Ordering::Relaxed) - recorded.len() <= 1);
    }

    #[test]
    fn a_caller_that_has_decided_is_followed_unless_the_ratio_is_for_all() {
        let low = 1 << 64;
        let high = low | u128::from(u64::MAX);
        for (parent_based, ratio, trace_id, flags, is_sampled) in [
            (true, 0.0, high, TraceFlags::SAMPLED, true),
            (true, 1.0, low, TraceFlags::default(), false),
            (false, 0.5, high, TraceFlags::SAMPLED, false),
            (false, 0.5, low, TraceFlags::default(), true),
            (false, 1.0, high, TraceFlags::default(), true),
            (false, 0.0, low, TraceFlags::SAMPLED, false),
        ] {
            let decision = decide(Sampler { parent_based, ratio }, Some(&caller(trace_id, flags)));
            assert_eq!(decision, Decision { trace_id: TraceId::from(trace_id), is_sampled }, "{parent_based} {ratio}");
        }
    }

    #[test]
    fn a_span_closes_on_its_own_dispatcher_whatever_is_the_default_and_on_whichever_thread() {
        let (provider_a, exported_a) = provider();
        let (provider_b, exported_b) = provider();
        let (a, b) = (
            Tracing::new(provider_a.tracer_with_scope(scope()), ALL),
            Tracing::new(provider_b.tracer_with_scope(scope()), ALL),
        );
        let Served::Recorded(request) = a.serve(Some(caller(9, TraceFlags::SAMPLED))) else { panic!("it is recorded") };
        let attempt = a.attempt(&request, "chat m", vec![KeyValue::new("model", "m")]);
        std::thread::spawn(move || {
            with_default(&b.dispatch, || {
                let Served::Recorded(other) = b.serve(None) else { panic!("it is recorded") };
                drop(attempt);
                drop(other);
                drop(request);
            });
        })
        .join()
        .unwrap();
        assert_eq!(exported_a.names(), ["chat m", "request"]);
        assert_eq!(exported_b.names(), ["request"]);
        let spans = exported_a.0.lock().unwrap();
        assert_eq!(spans[0].parent_span_id, spans[1].span_context.span_id());
        assert_eq!((spans[0].parent_span_is_remote, spans[1].parent_span_is_remote), (false, true));
        assert_eq!((&spans[0].span_kind, &spans[1].span_kind), (&SpanKind::Client, &SpanKind::Server));
        assert_eq!(spans[0].attributes, [KeyValue::new("model", "m")]);
        assert!(spans.iter().all(|span| span.span_context.trace_id() == TraceId::from(9_u128)), "{spans:?}");
    }

    #[test]
    fn nothing_else_is_let_through_or_looked_at_for_its_sake() {
        let (provider, exported) = provider();
        let subscriber = registry().with(exporting(provider.tracer_with_scope(scope()))).with(own_spans());
        assert_eq!(subscriber.max_level_hint(), Some(LevelFilter::INFO));
        let tracing = Tracing::new(provider.tracer_with_scope(scope()), ALL);
        with_default(&tracing.dispatch, || {
            let Served::Recorded(request) = tracing.serve(None) else { panic!("it is recorded") };
            let _entered = request.span.enter();
            tracing::error!("an event in it");
            assert!(tracing::error_span!(target: "a_library", "theirs").is_disabled());
        });
        assert_eq!(exported.names(), ["request"]);
        let span = &exported.0.lock().unwrap()[0];
        assert!(span.events.is_empty() && span.attributes.is_empty(), "{span:?}");
        assert_eq!(span.status, Status::Unset);
    }

    #[test]
    fn after_the_end_of_export_traces_are_handed_on_as_not_sampled() {
        let (provider, exported) = provider();
        let tracing = Tracing::new(provider.tracer_with_scope(scope()), ALL);
        provider.shutdown().unwrap();
        let Served::Unsampled(traceparent) = tracing.serve(Some(caller(9, TraceFlags::SAMPLED))) else {
            panic!("it is not recorded")
        };
        let text = std::str::from_utf8(&traceparent).unwrap();
        assert!(text.starts_with("00-00000000000000000000000000000009-") && text.ends_with("-00"), "{text}");
        assert_ne!(&text[36..52], "0000000000000000");
        assert!(exported.names().is_empty());
    }
}
