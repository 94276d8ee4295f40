//! One request: who answers it, with what status and head, and what is kept of it.
//!
//! Bodies of answers are made elsewhere; what no endpoint understands is counted and remembered too.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header, request};
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    body::{DemoBody, EventStream},
    call::Refusal,
    control::{Action, BodySeen, Hang, LastRequest, Settings},
    infer::{Circumstances, Content, Stored, Task},
    load::{Flight, Load},
    memory, shape,
};

/// Larger request bodies get 413.
pub(super) const MAX_BODY_BYTES: usize = 64 << 20;

/// So many responses are remembered, the latest.
pub(super) const STORED_MAX: usize = 100;

const SERVER: HeaderValue = HeaderValue::from_static("inference-proxy demo-backend");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What all connections of one backend share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: String,
    /// The same, as value of `x-demo-backend`.
    name_header: HeaderValue,
    control: bool,
    pub(super) settings: ArcSwap<Settings>,
    pub(super) load: Arc<Load>,
    /// Kept only with `--control`.
    last_request: Mutex<Option<LastRequest>>,
    /// The latest last. Each backend knows its own only, like vLLM.
    responses: Mutex<VecDeque<Stored>>,
    /// Cancelled when no new requests are taken any more.
    pub(super) closing: CancellationToken,
    /// Set when `/_ctl` has asked to exit.
    pub(super) exit: watch::Sender<Option<u8>>,
}

/// Who answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Endpoint {
    Health,
    Version,
    Models,
    Metrics,
    Control,
    Stats,
    /// `GET /v1/responses/{id}`.
    StoredResponse,
    Inference(Task),
}

/// The connection is to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("request abandoned: {0}")]
pub(super) struct Abandoned(&'static str);

const STORED_PREFIX: &str = "/v1/responses/";

type Answered = Result<Response<DemoBody>, Abandoned>;

/// Answers any request.
pub(super) async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Answered {
    let settings = shared.settings.load_full();
    let (head, body) = request.into_parts();
    let endpoint = Endpoint::at(head.uri.path()).filter(|endpoint| shared.control || !endpoint.is_control());
    let mut response = match endpoint {
        None | Some(Endpoint::StoredResponse | Endpoint::Inference(_)) => {
            let mut response = counted(&shared, &settings, endpoint, &head, body).await?;
            if endpoint.is_some() {
                response.headers_mut().insert("x-demo-backend", shared.name_header.clone());
            }
            response
        }
        Some(endpoint) if head.method != endpoint.method() => method_not_allowed(endpoint),
        Some(Endpoint::Health) if settings.hang == Hang::Health => return shared.hang().await,
        Some(Endpoint::Health) => respond(settings.health, None, Bytes::new()),
        Some(Endpoint::Version) => json(StatusCode::OK, concat!(r#"{"version":""#, env!("CARGO_PKG_VERSION"), r#""}"#)),
        Some(Endpoint::Models) if settings.hang == Hang::Models => return shared.hang().await,
        Some(Endpoint::Models) if settings.models_status != StatusCode::OK => {
            forced_error(settings.models_status, false)
        }
        Some(Endpoint::Models) => json(StatusCode::OK, shape::models(&settings.models, unix_time(), new_id)),
        Some(Endpoint::Metrics) => {
            let page = shared.load.page(settings.models.first().map_or("", String::as_str));
            let kind = HeaderValue::from_static("text/plain; version=1.0.0; charset=utf-8");
            respond(StatusCode::OK, Some(kind), page)
        }
        Some(Endpoint::Control) => shared.control(head.uri.query().unwrap_or("")),
        Some(Endpoint::Stats) => shared.stats(),
    };
    if settings.close {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

/// Answers what is neither a probe nor a control request, and counts it from its head to the end of its answer.
async fn counted(
    shared: &Shared,
    settings: &Settings,
    endpoint: Option<Endpoint>,
    head: &request::Parts,
    body: Incoming,
) -> Answered {
    let mut flight = Flight::begin(&shared.load);
    shared.remember(flight.number, head);
    let task = match endpoint {
        Some(Endpoint::Inference(task)) => Some(task),
        _ => None,
    };
    let is_anthropic = task.is_some_and(Task::is_anthropic);
    let Some(body) = read(body).await? else {
        return Ok(refuse(&too_large(), is_anthropic));
    };
    shared.remember_body(flight.number, &body);
    if endpoint == Some(Endpoint::StoredResponse) && head.method == Method::GET {
        return Ok(shared.stored_response(head.uri.path()));
    }
    let Some(task) = task else {
        return Ok(json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#));
    };
    if head.method != Method::POST {
        return Ok(method_not_allowed(Endpoint::Inference(task)));
    }
    if settings.hang == Hang::Chat {
        return shared.hang().await;
    }
    if settings.error_status != StatusCode::OK {
        return Ok(forced_error(settings.error_status, is_anthropic));
    }
    let id = head.headers.get("x-request-id").and_then(|id| id.to_str().ok()).map_or_else(new_id, str::to_owned);
    let answer = match task.answer(&body, Circumstances { name: &shared.name, settings, id, now: unix_time() }) {
        Ok(answer) => answer,
        Err(refusal) => return Ok(refuse(&refusal, is_anthropic)),
    };
    drop(body);
    if let Some(response) = answer.stored {
        shared.store(response);
    }
    if task.runs_model() {
        flight.admit(answer.prompt_tokens);
    }
    match answer.content {
        Content::Stream(events) => {
            pass(settings.latency).await;
            let stream = EventStream::new(events, settings.token_gap, flight, answer.finished);
            let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
            Ok(head_of(StatusCode::OK, Some(kind), DemoBody::Events(stream)))
        }
        Content::Whole(text) => {
            let gaps = answer.tokens.saturating_sub(1);
            pass(settings.latency.saturating_add(settings.token_gap.saturating_mul(gaps))).await;
            flight.generated(answer.tokens);
            flight.finish(answer.finished);
            Ok(head_of(StatusCode::OK, Some(JSON), DemoBody::counted(text, flight)))
        }
    }
}

/// The whole body, or none when it is too large.
async fn read(body: Incoming) -> Result<Option<Bytes>, Abandoned> {
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return Ok(None);
    }
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(collected) => Ok(Some(collected.to_bytes())),
        Err(error) if error.is::<LengthLimitError>() => Ok(None),
        Err(_) => Err(Abandoned("its body broke off")),
    }
}

/// Lets time pass. A timer ticks in milliseconds, so no time at all must not reach it.
async fn pass(duration: Duration) {
    if !duration.is_zero() {
        tokio::time::sleep(duration).await;
    }
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn new_id() -> String {
    format!("{:016x}", fastrand::u64(..))
}

// === answers ===

fn respond(status: StatusCode, kind: Option<HeaderValue>, bytes: impl Into<Bytes>) -> Response<DemoBody> {
    head_of(status, kind, DemoBody::whole(bytes))
}

fn head_of(status: StatusCode, kind: Option<HeaderValue>, body: DemoBody) -> Response<DemoBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::SERVER, SERVER);
    if let Some(kind) = kind {
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response
}

fn json(status: StatusCode, text: impl Into<Bytes>) -> Response<DemoBody> {
    respond(status, Some(JSON), text)
}

fn refuse(refusal: &Refusal, is_anthropic: bool) -> Response<DemoBody> {
    json(refusal.status, shape::error(refusal, is_anthropic))
}

fn forced_error(status: StatusCode, is_anthropic: bool) -> Response<DemoBody> {
    let message = format!("this backend was told to answer {status}");
    refuse(&Refusal { status, kind: "DemoError", message, param: None }, is_anthropic)
}

fn too_large() -> Refusal {
    let message = format!("the request body is larger than {MAX_BODY_BYTES} bytes");
    Refusal { status: StatusCode::PAYLOAD_TOO_LARGE, kind: "RequestTooLargeError", message, param: None }
}

fn method_not_allowed(endpoint: Endpoint) -> Response<DemoBody> {
    let mut response = json(StatusCode::METHOD_NOT_ALLOWED, r#"{"detail":"Method Not Allowed"}"#);
    let allow = if endpoint.method() == Method::POST { "POST" } else { "GET" };
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    response
}

// === impl Endpoint ===

impl Endpoint {
    fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/health" => Self::Health,
            "/version" => Self::Version,
            "/v1/models" => Self::Models,
            "/metrics" => Self::Metrics,
            "/_ctl" => Self::Control,
            "/_stats" => Self::Stats,
            path if path.starts_with(STORED_PREFIX) => Self::StoredResponse,
            path => Self::Inference(Task::at(path)?),
        })
    }

    fn is_control(self) -> bool {
        matches!(self, Self::Control | Self::Stats)
    }

    fn method(self) -> Method {
        if matches!(self, Self::Inference(_)) { Method::POST } else { Method::GET }
    }
}

// === impl Shared ===

impl Shared {
    pub(super) fn new(name: String, name_header: HeaderValue, settings: Settings, control: bool) -> Self {
        Self {
            name,
            name_header,
            control,
            settings: ArcSwap::from_pointee(settings),
            load: Arc::default(),
            last_request: Mutex::default(),
            responses: Mutex::default(),
            closing: CancellationToken::new(),
            exit: watch::Sender::new(None),
        }
    }

    /// Never answers; lets go of the connection when the backend shuts down.
    async fn hang(&self) -> Answered {
        self.closing.cancelled().await;
        Err(Abandoned("told to hang"))
    }

    fn control(&self, query: &str) -> Response<DemoBody> {
        let (settings, actions) = match self.settings.load().apply(query) {
            Ok(applied) => applied,
            Err(error) => {
                return json(StatusCode::BAD_REQUEST, format!(r#"{{"error":{}}}"#, shape::quoted(&error.to_string())));
            }
        };
        self.settings.store(Arc::new(settings));
        for action in actions {
            self.perform(action);
        }
        json(StatusCode::OK, serde_json::json!(**self.settings.load()).to_string())
    }

    fn perform(&self, action: Action) {
        let spawned = match action {
            Action::Exit(code) => {
                self.exit.send_replace(Some(code));
                return;
            }
            // Threads of their own, not the runtime's: an exit does not wait for them.
            Action::Allocate { mib } => thread::Builder::new().spawn(move || memory::allocate_mb(mib)),
            Action::AllocateInChild { mib } => thread::Builder::new().spawn(move || memory::allocate_in_child(mib)),
        };
        if let Err(error) = spawned {
            tracing::warn!(%error, "could not start a thread to allocate in");
        }
    }

    fn stats(&self) -> Response<DemoBody> {
        let last_request = self.last_request.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (requests, in_flight) = (self.load.requests(), self.load.in_flight());
        let stats = serde_json::json!({ "requests": requests, "in_flight": in_flight, "last_request": last_request });
        json(StatusCode::OK, stats.to_string())
    }

    fn store(&self, response: Stored) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        if responses.len() == STORED_MAX {
            responses.pop_front();
        }
        responses.push_back(response);
    }

    fn stored_response(&self, path: &str) -> Response<DemoBody> {
        let id = percent_decode_str(path.strip_prefix(STORED_PREFIX).unwrap_or_default()).decode_utf8_lossy();
        let responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        match responses.iter().rfind(|stored| stored.id == id) {
            Some(stored) => json(StatusCode::OK, stored.json.clone()),
            None => refuse(&Refusal::no_such_response(&id), false),
        }
    }

    fn remember(&self, number: u64, head: &request::Parts) {
        if self.control {
            let request = LastRequest::new(number, head);
            let mut last = self.last_request.lock().unwrap_or_else(PoisonError::into_inner);
            if last.as_ref().is_none_or(|last| last.number < number) {
                *last = Some(request);
            }
        }
    }

    fn remember_body(&self, number: u64, body: &[u8]) {
        if self.control {
            let seen = BodySeen::of(body);
            let mut last = self.last_request.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(last) = last.as_mut().filter(|last| last.number == number) {
                last.body = Some(seen);
            }
        }
    }
}
