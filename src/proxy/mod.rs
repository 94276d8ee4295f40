//! The life of a request: [`Proxy::handle`], from its head to the head of its answer.
//!
//! ```text
//! classify path → read the body up to its model → look the model up → choose a member of its pool → send
//!                                                                     ▲                             │
//!                                                                     └── another, before a byte ◄──┘ failed
//! → answer passes through Relayed (stream.rs), whose end settles the account
//! ```
//!
//! The proxy decides nothing about backends: which exist and which take requests is in the snapshot it reads.

pub mod exchange;
pub mod headers;
pub mod interim;
pub mod paths;
pub mod stream;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, uri::PathAndQuery};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};

use self::{
    exchange::{Ending, Exchange},
    headers::{Client, X_REQUEST_ID},
    interim::Interim,
    paths::Target,
    stream::{AbnormalEnd, EventStream, ProxyBody, Relayed},
};
use crate::{
    admin::Admin,
    backend::{Backend, InFlight, Refused},
    balance,
    config::{Balance, Config},
    error::{Dialect, ProxyError},
    replay::{AttemptBody, BodyFault, BodyLimits, Replay},
    scan::{ModelScanner, ScanError},
    table::{Lookup, TableReader},
    telemetry::metrics::Metrics,
    upstream::{ConnectError, Lease},
};

/// How much of an unwanted body is read so that the client gets to see the answer instead of a reset.
const DISCARD_BYTES: u64 = 8 * 1024 * 1024;
/// For how long.
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// What the data plane needs to serve requests; shared by all workers.
#[derive(Debug)]
pub struct Proxy {
    table: TableReader,
    metrics: Arc<Metrics>,
    limits: Arc<BodyLimits>,
    admin: Admin,
    balance: Balance,
    retries: u32,
    first_byte_timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
    access_log: bool,
    cors: Cors,
    /// Admin paths are on a port of their own.
    admin_elsewhere: bool,
}

/// What is known of the connection a request came on.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Address of the other end.
    pub ip: IpAddr,
    /// The way for interim responses.
    pub interim: Arc<Interim>,
    /// Set: the connection must not end cleanly, as its end would be taken for that of an answer that was cut.
    pub reset: Arc<AtomicBool>,
    /// The request's head says its length in two ways, so that two servers could read two different requests
    /// (RFC 9112, 6.1).
    pub smuggling: bool,
}

/// Why an attempt to get an answer from a backend failed, before the first byte of it.
#[derive(Debug, Clone, Copy)]
enum Failure {
    Connect(ConnectError),
    /// The connection broke.
    Broke {
        /// It had carried a request before.
        reused: bool,
        /// The answer had begun.
        begun: bool,
    },
    /// The answer is none that was asked for.
    Nonsense,
    /// No first byte in the time the user set.
    TimedOut {
        limit: Duration,
        knob: &'static str,
    },
}

/// Which origins' scripts may read answers.
#[derive(Debug, Clone)]
enum Cors {
    Off,
    Any,
    Listed(Vec<String>),
}

// === impl Proxy ===

impl Proxy {
    /// A proxy that routes by `table`.
    pub fn new(config: &Config, table: TableReader, metrics: Arc<Metrics>, admin: Admin) -> Proxy {
        let cors = match &config.cors_origins[..] {
            [] => Cors::Off,
            origins if origins.iter().any(|origin| origin == "*") => Cors::Any,
            origins => Cors::Listed(origins.to_vec()),
        };
        Proxy {
            table,
            metrics,
            limits: BodyLimits::new(config.max_body_bytes, config.hold_max_bytes),
            admin,
            balance: config.balance,
            retries: config.retries,
            first_byte_timeout: config.first_byte_timeout,
            idle_timeout: config.idle_timeout,
            access_log: config.access_log,
            cors,
            admin_elsewhere: config.admin_port.is_some(),
        }
    }

    /// Serves one request.
    pub async fn handle(&self, request: Request<Incoming>, peer: Peer) -> Response<ProxyBody> {
        let request_id = match request.headers().get(X_REQUEST_ID) {
            Some(id) if !id.is_empty() && id.len() <= 256 => id.clone(),
            _ => new_request_id(),
        };
        let origin = self.cors.allow(request.headers());
        let can_close = request.version() <= Version::HTTP_11;
        let mut response = self.dispatch(request, peer, &request_id).await;
        let headers = response.headers_mut();
        if can_close && self.admin.stopping.load(Ordering::Relaxed) {
            // Whoever keeps this connection would lose the request it sends just when it is closed.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if !headers.contains_key(X_REQUEST_ID) {
            headers.insert(X_REQUEST_ID, request_id);
        }
        if let Some(origin) = origin {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.append(header::VARY, HeaderValue::from_static("origin"));
        }
        response
    }

    async fn dispatch(&self, request: Request<Incoming>, peer: Peer, request_id: &HeaderValue) -> Response<ProxyBody> {
        let uri = request.uri().clone();
        let target = paths::classify(request.method(), uri.path());
        let dialect = dialect(uri.path(), request.headers());
        if peer.smuggling {
            let message = "the request says its length in two ways (Content-Length and Transfer-Encoding)".to_owned();
            let mut response = own(ProxyError::BadRequest { code: "invalid_request", message }.response(dialect));
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
        let refuse = |error: ProxyError, body: Incoming| async move {
            discard(body).await;
            own(error.response(dialect))
        };
        match target {
            Target::Own(page) if page.is_for_everybody() || !self.admin_elsewhere => own(self.admin.show(page).await),
            Target::ModelList | Target::ModelObject(_) if request.method() == Method::OPTIONS => {
                self.cors.preflight(&request)
            }
            Target::ModelList => self.list_models(&request, dialect),
            Target::ModelObject(id) => self.show_model(&id, dialect),
            Target::Forward { below_v1 } => {
                if request.method() == Method::OPTIONS && paths::model_in_query(uri.query()).is_none() {
                    return self.cors.preflight(&request);
                }
                self.forward(request, below_v1, dialect, peer, request_id).await
            }
            Target::Control => {
                let message = "engines' control endpoints are not reachable through this proxy".to_owned();
                refuse(ProxyError::NoSuchPath { message }, request.into_body()).await
            }
            Target::Stateful => {
                let message =
                    "this API keeps state that no single backend could answer for; it is not served".to_owned();
                refuse(ProxyError::NoSuchPath { message }, request.into_body()).await
            }
            Target::Own(_) | Target::Unknown => {
                let message = "no such path here; the API is under /v1, GET /v1/models lists its models".to_owned();
                refuse(ProxyError::NoSuchPath { message }, request.into_body()).await
            }
        }
    }

    fn list_models(&self, request: &Request<Incoming>, dialect: Dialect) -> Response<ProxyBody> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return own(ProxyError::MethodNotAllowed { allow: "GET, HEAD" }.response(dialect));
        }
        let table = self.table.snapshot();
        json(match dialect {
            Dialect::OpenAi => table.openai_list(),
            Dialect::Anthropic => table.anthropic_list(),
        })
    }

    fn show_model(&self, id: &str, dialect: Dialect) -> Response<ProxyBody> {
        match (self.table.snapshot().object(id), dialect) {
            (Some(object), Dialect::OpenAi) => json(Bytes::copy_from_slice(object.json.get().as_bytes())),
            (Some(object), Dialect::Anthropic) => json(Bytes::from(object.to_anthropic().to_string())),
            (None, dialect) => own(ProxyError::ModelNotFound { model: bounded(id) }.response(dialect)),
        }
    }

    /// Routes one request by the model it names.
    async fn forward(
        &self,
        request: Request<Incoming>,
        below_v1: Option<&str>,
        dialect: Dialect,
        peer: Peer,
        request_id: &HeaderValue,
    ) -> Response<ProxyBody> {
        let (mut head, body) = request.into_parts();
        let mut exchange = Exchange::new(
            head.method.clone(),
            head.uri.clone(),
            peer.ip,
            request_id.clone(),
            self.metrics.clone(),
            self.access_log,
        );
        let reset = peer.reset;
        let outcome = match self.read_model(&head, body).await {
            Err((error, rest)) => {
                discard(rest).await;
                Err(error)
            }
            Ok((replay, model)) => {
                let client_version = head.version;
                // HTTP/2 and absolute-form requests name the host in their target only.
                if let Some(host) = head.uri.authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok()) {
                    head.headers.insert(header::HOST, host);
                }
                if client_version == Version::HTTP_2 {
                    headers::join_cookies(&mut head.headers);
                }
                // HTTP/1.0 knows no interim responses; over HTTP/2 they would need frames of their own.
                let interim = (client_version == Version::HTTP_11).then_some(peer.interim);
                let route = Outgoing { method: head.method, uri: head.uri, below_v1: below_v1.is_some(), interim };
                headers::prepare_request(&mut head.headers, Client { ip: peer.ip }, request_id);
                self.serve(&model, &route, head.headers, replay, &mut exchange)
                    .await
                    .map(|served| (served, client_version))
            }
        };
        match outcome {
            Ok((served, client_version)) => {
                let reset = (client_version == Version::HTTP_10).then_some(reset);
                self.relay(served, exchange, dialect, reset, request_id)
            }
            Err(error) => {
                let response = own(error.response(dialect));
                exchange.status = response.status().as_u16();
                exchange.end(if error == ProxyError::ClientGone { Ending::ClientGone } else { Ending::Complete });
                response
            }
        }
    }

    /// Reads the body as far as it takes to know the model.
    async fn read_model(
        &self,
        head: &http::request::Parts,
        body: Incoming,
    ) -> Result<(Replay, String), (ProxyError, Option<Incoming>)> {
        let in_query = paths::model_in_query(head.uri.query());
        if body.is_end_stream() {
            return match in_query {
                Some(model) => Ok((Replay::empty(&self.limits), model)),
                None => Err((self.body_error(BodyFault::Scan(ScanError::ModelMissing)), None)),
            };
        }
        if body.size_hint().lower() > self.limits.max_body_bytes {
            // A client that waits for 100 has sent nothing that would have to be read first.
            let rest = (!head.headers.contains_key(header::EXPECT)).then_some(body);
            return Err((self.body_error(BodyFault::TooLarge), rest));
        }
        let mut kinds = head.headers.get_all(header::CONTENT_TYPE).iter().map(HeaderValue::as_bytes);
        let kind = kinds.next();
        if kinds.any(|other| Some(other) != kind) {
            // Servers differ in which one they believe, and so in which model they read.
            let message = "the request has two different Content-Type headers".to_owned();
            return Err((ProxyError::BadRequest { code: "invalid_request", message }, Some(body)));
        }
        let scanner = match (ModelScanner::for_content_type(kind), &in_query) {
            // Raw bytes of any kind, with the model beside them.
            (Ok(_) | Err(_), Some(_)) if kind.is_some_and(is_opaque) => None,
            (Ok(scanner), _) => Some(scanner),
            (Err(error), _) => return Err((self.body_error(error.into()), Some(body))),
        };
        Replay::read(body, scanner, in_query, &self.limits)
            .await
            .map_err(|(fault, rest)| (self.body_error(fault), Some(rest)))
    }

    /// Gets the head of an answer from some backend that serves `model`, trying again elsewhere while that is safe.
    async fn serve(
        &self,
        model: &str,
        route: &Outgoing,
        headers: HeaderMap,
        mut replay: Replay,
        exchange: &mut Exchange,
    ) -> Result<Served, ProxyError> {
        let mut tried: Vec<Arc<Backend>> = Vec::new();
        let mut in_flight = self.choose(model, &tried, exchange)?;
        let mut fresh_only = false;
        loop {
            exchange.attempts += 1;
            let Some(body) = replay.attempt() else {
                return Err(ProxyError::ClientGone);
            };
            let backend = in_flight.backend().clone();
            let failure =
                match self.attempt(&backend, route, headers.clone(), body, fresh_only, exchange.started()).await {
                    Ok((response, lease)) => {
                        return Ok(Served { response, lease, in_flight });
                    }
                    Err(failure) => failure,
                };
            tracing::debug!(
                request_id = exchange.request_id(), container = %backend.spec.name, ?failure,
                attempt = exchange.attempts, "attempt failed"
            );
            let replayable = replay.recover().await.map_err(|fault| self.body_error(fault))?;
            let give_up = failure.to_error(&backend, exchange.attempts);
            if !replayable {
                return Err(give_up);
            }
            match failure {
                Failure::TimedOut { .. } | Failure::Nonsense | Failure::Broke { begun: true, .. } => {
                    return Err(give_up);
                }
                // The connection was closed while it was idle: that says nothing about the backend.
                Failure::Broke { reused: true, .. } => fresh_only = true,
                Failure::Broke { reused: false, .. } | Failure::Connect(_) => {
                    tried.push(backend);
                    let retries = u32::try_from(tried.len()).unwrap_or(u32::MAX);
                    if retries > self.retries {
                        return Err(give_up);
                    }
                    in_flight = self.choose(model, &tried, exchange).map_err(|_| give_up)?;
                    fresh_only = false;
                }
            }
        }
    }

    /// Claims a place on a member of the model's pool.
    fn choose(&self, model: &str, tried: &[Arc<Backend>], exchange: &mut Exchange) -> Result<InFlight, ProxyError> {
        let table = self.table.snapshot();
        let route = match table.lookup(model) {
            Lookup::Ready(route) => route,
            Lookup::NoneReady(route) => {
                exchange.model = Some(route.model.clone());
                return Err(ProxyError::ModelUnavailable { model: bounded(model), why: route.why_not_ready });
            }
            Lookup::Unknown => {
                self.table.report_miss();
                return Err(ProxyError::ModelNotFound { model: bounded(model) });
            }
        };
        exchange.model = Some(route.model.clone());
        let chosen = RNG.with_borrow_mut(|rng| balance::choose(&route.members, tried, self.balance, rng));
        let in_flight = chosen.map_err(|refused| match refused {
            Refused::Full => ProxyError::Overloaded { what: format!("every backend of `{}` is full", bounded(model)) },
            Refused::Closed => ProxyError::ModelUnavailable { model: bounded(model), why: "it is stopping" },
        })?;
        exchange.backend = Some(in_flight.backend().clone());
        Ok(in_flight)
    }

    /// Sends the request once and waits for the head of the answer.
    async fn attempt(
        &self,
        backend: &Backend,
        route: &Outgoing,
        mut headers: HeaderMap,
        body: AttemptBody,
        fresh_only: bool,
        started: Instant,
    ) -> Result<(Response<Incoming>, Lease), Failure> {
        headers.insert(header::HOST, backend.authority.clone());
        let mut request = Request::new(body);
        *request.method_mut() = route.method.clone();
        *request.uri_mut() = route.uri_for(&backend.spec.base_path);
        if request.body().size_hint().exact().is_none() && !headers.contains_key(header::CONTENT_LENGTH) {
            // hyper would leave a body of unknown length out where the method seldom has one.
            headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        *request.headers_mut() = headers;
        if let Some(interim) = route.interim.clone() {
            hyper::ext::on_informational(&mut request, move |hint| interim.send(hint.status(), hint.headers()));
        }
        let lease = match fresh_only {
            true => backend.upstream.lease_fresh().await,
            false => backend.upstream.lease(started).await,
        };
        let mut lease = lease.map_err(Failure::Connect)?;
        let reused = lease.reused;
        let answer = lease.send(request);
        let answered = match self.head_limit() {
            None => answer.await,
            Some((limit, knob)) => match timeout(limit, answer).await {
                Ok(answered) => answered,
                Err(_) => return Err(Failure::TimedOut { limit, knob }),
            },
        };
        match answered {
            // Nobody asked to switch protocols.
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => Err(Failure::Nonsense),
            Ok(response) => Ok((response, lease)),
            Err(_) => Err(Failure::Broke { reused, begun: lease.has_heard() }),
        }
    }

    /// The shorter of the limits that run until the head of an answer.
    fn head_limit(&self) -> Option<(Duration, &'static str)> {
        let first = self.first_byte_timeout.map(|limit| (limit, "PROXY_FIRST_BYTE_TIMEOUT"));
        let idle = self.idle_timeout.map(|limit| (limit, "PROXY_IDLE_TIMEOUT"));
        first.into_iter().chain(idle).min_by_key(|(limit, _)| *limit)
    }

    /// Hands a backend's answer on.
    fn relay(
        &self,
        served: Served,
        mut exchange: Exchange,
        dialect: Dialect,
        reset: Option<Arc<AtomicBool>>,
        request_id: &HeaderValue,
    ) -> Response<ProxyBody> {
        let Served { response, lease, in_flight } = served;
        let (mut head, body) = response.into_parts();
        exchange.status = head.status.as_u16();
        headers::prepare_response(&mut head.headers, request_id, reset.is_some());
        headers::hide_backend(&mut head.headers, &in_flight.backend().authority, &in_flight.backend().spec.base_path);
        // An event can be added only where the end is not announced and the bytes are not compressed.
        let open_end =
            !head.headers.contains_key(header::CONTENT_LENGTH) && !head.headers.contains_key(header::CONTENT_ENCODING);
        let events = (open_end && headers::is_event_stream(&head.headers)).then_some(EventStream { dialect });
        let ending = AbnormalEnd { events, reset };
        head.version = Version::HTTP_11;
        let relayed = Relayed::new(body, exchange, in_flight, lease, ending, self.idle_timeout);
        Response::from_parts(head, ProxyBody::Relayed(Box::new(relayed)))
    }

    fn body_error(&self, fault: BodyFault) -> ProxyError {
        match fault {
            BodyFault::Scan(error) => ProxyError::BadRequest { code: error.code(), message: error.to_string() },
            BodyFault::TooLarge => {
                ProxyError::TooLarge { limit_bytes: self.limits.max_body_bytes, knob: "PROXY_MAX_BODY" }
            }
            BodyFault::HoldTooLarge => ProxyError::TooLarge {
                limit_bytes: self.limits.hold_max_bytes as u64,
                knob: "PROXY_HOLD_MAX; put `model` first in the body",
            },
            BodyFault::HoldFull => ProxyError::Overloaded { what: "too many request bodies are being held".to_owned() },
            BodyFault::Broken => ProxyError::ClientGone,
        }
    }
}

thread_local! {
    static RNG: std::cell::RefCell<fastrand::Rng> = std::cell::RefCell::new(fastrand::Rng::new());
}

/// A request as it goes out, to whichever backend.
#[derive(Debug)]
struct Outgoing {
    method: Method,
    uri: Uri,
    /// Its path begins with `/v1`, which stands for the backend's base path.
    below_v1: bool,
    /// Where interim responses go.
    interim: Option<Arc<Interim>>,
}

/// The head of an answer, with what depends on its body.
#[derive(Debug)]
struct Served {
    response: Response<Incoming>,
    lease: Lease,
    in_flight: InFlight,
}

impl Outgoing {
    /// Path and query for a backend whose API is at `base_path`, in the client's own encoding.
    fn uri_for(&self, base_path: &str) -> Uri {
        let original = self.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let path_and_query = match original.as_str().strip_prefix("/v1").filter(|_| self.below_v1 && base_path != "/v1")
        {
            None => original,
            Some(rest) => {
                PathAndQuery::from_maybe_shared(Bytes::from(format!("{base_path}{rest}"))).unwrap_or(original)
            }
        };
        let mut parts = http::uri::Parts::default();
        parts.path_and_query = Some(path_and_query);
        Uri::from_parts(parts).unwrap_or_default()
    }
}

impl Failure {
    fn to_error(self, backend: &Backend, attempts: u32) -> ProxyError {
        let name = backend.spec.name.clone();
        match self {
            Failure::Connect(error) => ProxyError::Backend { backend: name, what: error.what(), attempts },
            Failure::Broke { .. } => ProxyError::Backend { backend: name, what: "closed the connection", attempts },
            Failure::Nonsense => {
                ProxyError::Backend { backend: name, what: "sent something that is no answer", attempts }
            }
            Failure::TimedOut { limit, knob } => ProxyError::BackendTimeout { backend: name, limit, knob },
        }
    }
}

// === impl Cors ===

impl Cors {
    /// The origin to allow, if this request's is.
    fn allow(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        match self {
            Cors::Off => None,
            Cors::Any => headers.get(header::ORIGIN).map(|_| HeaderValue::from_static("*")),
            Cors::Listed(origins) => {
                let origin = headers.get(header::ORIGIN)?;
                origins.iter().any(|allowed| origin == allowed.as_str()).then(|| origin.clone())
            }
        }
    }

    /// The answer to a preflight: what the browser asked about is allowed where its origin is.
    fn preflight(&self, request: &Request<Incoming>) -> Response<ProxyBody> {
        let mut response = Response::new(ProxyBody::Whole(None));
        *response.status_mut() = StatusCode::NO_CONTENT;
        if self.allow(request.headers()).is_some() {
            let headers = response.headers_mut();
            let methods = HeaderValue::from_static("GET, HEAD, POST, DELETE, OPTIONS");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            if let Some(asked) = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
                headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
            }
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        }
        response
    }
}

// === helpers ===

/// In whose shape this client reads errors.
fn dialect(path: &str, headers: &HeaderMap) -> Dialect {
    let messages = path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if messages || headers.contains_key("anthropic-version") { Dialect::Anthropic } else { Dialect::OpenAi }
}

/// Bytes that are neither JSON nor a form.
fn is_opaque(content_type: &[u8]) -> bool {
    let begins = |prefix: &[u8]| content_type.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix));
    begins(b"audio/") || begins(b"video/") || begins(b"image/") || begins(b"application/octet-stream")
}

/// A model name as it may stand in a message.
fn bounded(model: &str) -> String {
    const SHOWN_CHARS: usize = 200;
    match model.char_indices().nth(SHOWN_CHARS) {
        None => model.to_owned(),
        Some((end, _)) => format!("{}…", &model[..end]),
    }
}

fn new_request_id() -> HeaderValue {
    let id = RNG.with_borrow_mut(|rng| rng.u128(..));
    HeaderValue::try_from(format!("{id:032x}")).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

fn json(body: Bytes) -> Response<ProxyBody> {
    let mut response = Response::new(ProxyBody::Whole(Some(body)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn own(response: Response<Bytes>) -> Response<ProxyBody> {
    response.map(|bytes| ProxyBody::Whole(Some(bytes)))
}

/// Reads what is left of a body that nobody wants, within bounds: a client that is still sending when the connection is
/// closed would see a reset instead of the answer.
async fn discard(body: impl Into<Option<Incoming>>) {
    let Some(mut body) = body.into() else { return };
    if body.size_hint().lower() > DISCARD_BYTES {
        return;
    }
    let reading = async {
        let mut left = DISCARD_BYTES;
        while !body.is_end_stream() {
            match std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await {
                Some(Ok(frame)) => match left.checked_sub(frame.data_ref().map_or(0, |data| data.len() as u64)) {
                    Some(rest) => left = rest,
                    None => return,
                },
                Some(Err(_)) | None => return,
            }
        }
    };
    let _ = timeout(DISCARD_TIME, reading).await;
}
