//! How spans are begun.

use std::borrow::Cow;

use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    trace::{Span as _, SpanBuilder, SpanContext, SpanKind, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::{SdkTracer, Span};

use super::SCOPE;
use crate::base::config::otlp::Sampler;

/// What makes spans. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracing {
    tracer: SdkTracer,
}

impl Tracing {
    pub(super) fn new(tracer: SdkTracer) -> Tracing {
        Tracing { tracer }
    }

    /// The span of a request that this proxy serves, below its caller's. Whether it records anything is decided here,
    /// before anything is said of it.
    pub fn serve(&self, caller: Option<SpanContext>) -> Span {
        let builder = SpanBuilder::from_name("request").with_kind(SpanKind::Server);
        self.tracer.build_with_context(builder, &below(caller))
    }

    /// The span of one attempt to have a request served, below the request's.
    pub fn attempt(&self, request: &SpanContext, name: String, attributes: Vec<KeyValue>) -> Span {
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Client).with_attributes(attributes);
        self.tracer.build_with_context(builder, &below(Some(request.clone())))
    }

    /// Something has happened that belongs to no request: a trace of its own, of no length.
    pub fn happened(&self, name: impl Into<Cow<'static, str>>, facts: impl FnOnce() -> Vec<(&'static str, String)>) {
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Internal);
        let mut span = self.tracer.build_with_context(builder, &Context::new());
        if span.is_recording() {
            span.set_attributes(facts().into_iter().map(|(key, value)| KeyValue::new(key, value)));
        }
        span.end();
    }
}

fn below(parent: Option<SpanContext>) -> Context {
    // Never the ambient context: it is not used here, and belongs to whoever runs on this thread.
    match parent {
        Some(parent) => Context::new().with_remote_span_context(parent),
        None => Context::new(),
    }
}

pub(super) fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build()
}

pub(super) fn sampler(sampler: Sampler) -> opentelemetry_sdk::trace::Sampler {
    use opentelemetry_sdk::trace::Sampler as Sdk;
    let root = match sampler.ratio {
        ratio if ratio >= 1.0 => Sdk::AlwaysOn,
        ratio if ratio <= 0.0 => Sdk::AlwaysOff,
        ratio => Sdk::TraceIdRatioBased(ratio),
    };
    if sampler.parent_based { Sdk::ParentBased(Box::new(root)) } else { root }
}
