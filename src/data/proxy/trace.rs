//! What a request tells as spans: one for itself, below its caller's, and one for each attempt below that.
//!
//! Where tracing is off, all of this is one look at a discriminant. Whether a request is sampled is decided before
//! anything is said of it; one that is not makes no span and only hands its caller's trace on, marked as such. How spans
//! become spans of `tracing`, and get out: [`crate::telemetry::otlp`].

use std::{net::IpAddr, time::Duration};

use opentelemetry::{
    Array, KeyValue, StringValue, Value,
    trace::{Status, TraceId},
};
use tracing::field::{DisplayValue, display};

use super::failure::Ending;
use crate::{
    pool::backend::{Backend, Model},
    telemetry::{
        http_server,
        otlp::{
            LiveSpan, Served, Tracing,
            w3c::{self, TRACEPARENT_BYTES},
        },
        routes::Route,
    },
    wire::{
        http1::head::{Known, RequestHead, Version},
        scan::Usage,
    },
};

/// Longest text that is taken over from a client or a backend.
const TEXT_CHARS_MAX: usize = 256;

/// The id of a trace as the log shows it.
pub type ShownId = DisplayValue<TraceId>;

/// The trace of one request.
#[derive(Debug, Default)]
pub enum Trace {
    /// None is wanted.
    #[default]
    Off,
    /// Nothing is recorded; the backend is told so.
    Unsampled(Box<TraceHeaders>),
    /// It is recorded.
    On(Box<Recording>),
}

/// A request whose spans are recorded.
#[derive(Debug)]
pub struct Recording {
    tracing: Tracing,
    request: LiveSpan,
    /// The attempt under way.
    attempt: Option<LiveSpan>,
    attempts: u32,
    /// What the backend of the present attempt is told.
    headers: TraceHeaders,
    streams: bool,
}

/// The trace as a backend is told of it.
#[derive(Debug, Clone, Copy)]
pub struct TraceHeaders {
    /// Value of `traceparent`.
    pub traceparent: [u8; TRACEPARENT_BYTES],
    /// The client's `tracestate` belongs to this trace and passes.
    pub keeps_state: bool,
}

/// How a request ended, as far as its spans tell.
#[derive(Debug)]
pub struct Summary<'a> {
    /// The head it came with.
    pub head: &'a RequestHead,
    /// Its id.
    pub request_id: &'a str,
    /// The address of its client.
    pub client_ip: IpAddr,
    /// The status that its client got.
    pub status: u16,
    /// How it ended.
    pub ending: Ending,
    /// Its model, if that is known.
    pub model: Option<&'a Model>,
    /// The backend that served it last.
    pub backend: Option<&'a Backend>,
    /// What its answer told.
    pub usage: Option<Usage>,
    /// Bytes of its answer.
    pub response_bytes: u64,
}

// === impl Trace ===

impl Trace {
    /// The trace of the request with this head, which has just come.
    pub fn begin(tracing: Option<&Tracing>, head: &RequestHead) -> Trace {
        let Some(tracing) = tracing else { return Trace::Off };
        let caller = w3c::parse(head.lines.all(Known::TraceParent), head.lines.all(Known::TraceState));
        let keeps_state = caller.is_some();
        match tracing.serve(caller) {
            Served::Recorded(request) => Trace::On(Box::new(Recording {
                tracing: tracing.clone(),
                headers: TraceHeaders { traceparent: request.traceparent(), keeps_state },
                request,
                attempt: None,
                attempts: 0,
                streams: false,
            })),
            Served::Unsampled(traceparent) => Trace::Unsampled(Box::new(TraceHeaders { traceparent, keeps_state })),
        }
    }

    /// The id of the trace, for the log: `None` unless the trace is recorded, because nothing could be found by it.
    pub fn id(&self) -> Option<ShownId> {
        match self {
            Trace::Off | Trace::Unsampled(_) => None,
            Trace::On(on) => Some(display(on.request.trace_id())),
        }
    }

    /// What a backend is told of the trace; `None`: what the client said passes as it came.
    pub fn headers(&self) -> Option<&TraceHeaders> {
        match self {
            Trace::Off => None,
            Trace::Unsampled(headers) => Some(headers),
            Trace::On(on) => Some(&on.headers),
        }
    }

    /// No backend serves this model.
    pub fn missed(&mut self, model: &str) {
        self.event("routing.miss", || vec![KeyValue::new("gen_ai.request.model", shown(model))]);
    }

    /// The request has to wait for a place, in a line that is so long with it.
    pub fn queued(&mut self, length: usize) {
        self.event("queue.enter", || vec![KeyValue::new("queue.length", int(length as u64))]);
    }

    /// It has waited.
    pub fn dequeued(&mut self, waited: Duration) {
        self.event("queue.leave", || vec![KeyValue::new("queue.waited_seconds", waited.as_secs_f64())]);
    }

    /// It is about to be sent to this backend, or sent again.
    pub fn attempt_begins(&mut self, head: &RequestHead, backend: &Backend, model: &Model) {
        let Trace::On(on) = self else { return };
        let operation = Route::of(head.path()).operation();
        let spec = &backend.spec;
        let mut attributes = vec![
            KeyValue::new("http.request.method", http_server::method_name(&head.method)),
            KeyValue::new("server.address", spec.addr.ip().to_string()),
            KeyValue::new("server.port", i64::from(spec.addr.port())),
            KeyValue::new("url.scheme", "http"),
            KeyValue::new("network.protocol.version", "1.1"),
            KeyValue::new("gen_ai.operation.name", operation.gen_ai_name()),
            KeyValue::new("gen_ai.provider.name", operation.provider()),
            KeyValue::new("gen_ai.request.model", model.id.to_string()),
            KeyValue::new("model", model.id.to_string()),
            KeyValue::new("backend_url", format!("http://{}{}", backend.authority, spec.base_path)),
            KeyValue::new("container.id", spec.id.to_string()),
            KeyValue::new("container.name", spec.name.clone()),
        ];
        if !spec.image.is_empty() {
            attributes.push(KeyValue::new("container.image.name", spec.image.clone()));
        }
        if on.attempts > 0 {
            attributes.push(KeyValue::new("http.request.resend_count", i64::from(on.attempts)));
            on.request.add_event("retry", vec![KeyValue::new("container.name", spec.name.clone())]);
        }
        on.attempts += 1;
        let name = format_args!("{} {}", operation.gen_ai_name(), model.id);
        let attempt = on.tracing.attempt(&on.request, name, attributes);
        on.headers.traceparent = attempt.traceparent();
        on.attempt = Some(attempt);
    }

    /// There is no answer to this attempt. `why` is one of few words.
    pub fn attempt_failed(&mut self, why: &'static str) {
        let Trace::On(on) = self else { return };
        let Some(attempt) = on.attempt.take() else { return };
        attempt.set_attribute(KeyValue::new("error.type", why));
        attempt.set_status(Status::error(why));
        attempt.end();
        on.request.add_event("attempt.failed", vec![KeyValue::new("error.type", why)]);
    }

    /// It is answered with "busy", and somebody else is asked.
    pub fn attempt_pushed_back(&mut self, status: u16) {
        let Trace::On(on) = self else { return };
        let Some(attempt) = on.attempt.take() else { return };
        attempt.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        attempt.set_attribute(KeyValue::new("error.type", status.to_string()));
        attempt.set_status(Status::error(""));
        attempt.end();
        on.request.add_event("attempt.failed", vec![KeyValue::new("error.type", status.to_string())]);
    }

    /// The head of the answer has come.
    pub fn answered(&mut self, status: u16, streams: bool) {
        let Trace::On(on) = self else { return };
        on.streams = streams;
        if let Some(attempt) = &on.attempt {
            attempt.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
            attempt.set_attribute(KeyValue::new("streaming", streams));
            attempt.add_event("first_byte", Vec::new());
        }
    }

    /// The first token of the answer has come.
    pub fn first_token(&mut self, after: Duration) {
        let Trace::On(on) = self else { return };
        if let Some(attempt) = &on.attempt {
            attempt.set_attribute(KeyValue::new("gen_ai.response.time_to_first_chunk", after.as_secs_f64()));
            attempt.add_event("first_token", Vec::new());
        }
    }

    /// The request has ended.
    pub fn end(&mut self, summary: &Summary<'_>) {
        if let Trace::On(on) = std::mem::take(self) {
            on.end(summary);
        }
    }

    fn event(&mut self, name: &'static str, attributes: impl FnOnce() -> Vec<KeyValue>) {
        if let Trace::On(on) = self {
            on.request.add_event(name, attributes());
        }
    }
}

// === impl Recording ===

impl Recording {
    fn end(mut self, summary: &Summary<'_>) {
        let Summary { head, status, ending, .. } = *summary;
        let error = error_type(status, ending);
        if let Some(attempt) = self.attempt.take() {
            if let Some(usage) = &summary.usage {
                attempt.set_attributes(usage_attributes(usage));
            }
            if summary.backend.is_some_and(Backend::is_closed) {
                attempt.add_event("backend.draining", Vec::new());
            }
            if let Some(error) = &error {
                attempt.set_attribute(KeyValue::new("error.type", error.clone()));
                if ending == Ending::BackendBroke || status >= 400 {
                    attempt.set_status(Status::error(""));
                }
            }
            attempt.end();
        }
        let route = Route::of(head.path());
        let method = http_server::method_name(&head.method);
        // A method that clients invent is in no span's name (semantic conventions for HTTP spans).
        let verb = if method == head.method.as_str() { method } else { "HTTP" };
        self.request.update_name(format!("{verb} {}", route.path()));
        let version = match head.version {
            Version::Http10 => "1.0",
            Version::Http11 => "1.1",
        };
        let scheme = http_server::scheme(head.lines.first(Known::XForwardedProto));
        let mut attributes = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("http.method", shown(head.method.as_str())),
            KeyValue::new("http.route", route.path()),
            KeyValue::new("url.path", shown(head.path())),
            KeyValue::new("url.scheme", scheme),
            KeyValue::new("http.response.status_code", i64::from(status)),
            KeyValue::new("http.status_code", i64::from(status)),
            KeyValue::new("network.protocol.version", version),
            KeyValue::new("client.address", summary.client_ip.to_string()),
            KeyValue::new("gen_ai.operation.name", route.operation().gen_ai_name()),
            KeyValue::new("gen_ai.provider.name", route.operation().provider()),
            KeyValue::new("streaming", self.streams),
            KeyValue::new("http.response.body.size", int(summary.response_bytes)),
            KeyValue::new("request.id", shown(summary.request_id)),
        ];
        if let Some(agent) = head.lines.iter().find(|header| header.name.eq_ignore_ascii_case(b"user-agent")) {
            attributes.push(KeyValue::new("user_agent.original", shown(&String::from_utf8_lossy(agent.value))));
        }
        if let Some(host) = head.host().and_then(|host| std::str::from_utf8(host).ok()) {
            let (name, port) = split_host(host);
            attributes.push(KeyValue::new("server.address", shown(name)));
            attributes.extend(port.map(|port| KeyValue::new("server.port", i64::from(port))));
        }
        if let Some(model) = summary.model {
            attributes.push(KeyValue::new("model", model.id.to_string()));
            attributes.push(KeyValue::new("gen_ai.request.model", model.id.to_string()));
        }
        if let Some(backend) = summary.backend {
            let url = format!("http://{}{}", backend.authority, backend.spec.base_path);
            attributes.push(KeyValue::new("backend_url", url));
            attributes.push(KeyValue::new("container.id", backend.spec.id.to_string()));
            attributes.push(KeyValue::new("container.name", backend.spec.name.clone()));
        }
        if self.attempts > 1 {
            attributes.push(KeyValue::new("http.request.resend_count", i64::from(self.attempts - 1)));
        }
        if verb != method {
            attributes.push(KeyValue::new("http.request.method_original", shown(head.method.as_str())));
        }
        if let Some(finish) = summary.usage.as_ref().and_then(finish_attribute) {
            attributes.push(finish);
        }
        if let Some(error) = error {
            attributes.push(KeyValue::new("error.type", error));
            // What a client did wrong is no error of the server (semantic conventions for HTTP spans).
            if ending == Ending::BackendBroke || status >= 500 {
                self.request.set_status(Status::error(""));
            }
        }
        self.request.set_attributes(attributes);
        self.request.end();
    }
}

// === helpers ===

fn error_type(status: u16, ending: Ending) -> Option<Value> {
    match ending.error() {
        Some(why) => Some(why.into()),
        None => (status >= 400).then(|| status.to_string().into()),
    }
}

/// The tokens of an attempt. No other span of a request has them: trace viewers add up what they find.
fn usage_attributes(usage: &Usage) -> Vec<KeyValue> {
    let counts = [
        ("gen_ai.usage.input_tokens", usage.input_tokens),
        ("gen_ai.usage.output_tokens", usage.output_tokens),
        ("gen_ai.usage.cache_read.input_tokens", usage.cached_input_tokens),
        ("gen_ai.usage.reasoning.output_tokens", usage.reasoning_tokens),
    ];
    let counts = counts.into_iter().filter_map(|(name, count)| Some(KeyValue::new(name, int(count?))));
    counts.chain(finish_attribute(usage)).collect()
}

fn finish_attribute(usage: &Usage) -> Option<KeyValue> {
    let reasons = Array::String(vec![StringValue::from(usage.finish?.as_str())]);
    Some(KeyValue::new("gen_ai.response.finish_reasons", Value::Array(reasons)))
}

/// Name and port of a `Host`.
fn split_host(host: &str) -> (&str, Option<u16>) {
    match host.rsplit_once(':').map(|(name, port)| (name, port.parse())) {
        Some((name, Ok(port))) => (name, Some(port)),
        _ => (host, None),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).collect()
}

fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
