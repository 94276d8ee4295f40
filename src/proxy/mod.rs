//! The life of a request: [`Proxy::serve`] reads it from its client's connection and sees it to its end.
//!
//! ```text
//! classify path → read the body up to its model → look the model up → choose a member of its pool → send
//!                                                                     ▲                             │
//!                                                                     └── another, before a byte ◄──┘ failed
//! → the answer passes through relay.rs, and the account is settled at its end
//! ```
//!
//! One task serves a client's connection from its first byte to its last: it reads the request ([`client`]), sends it
//! ([`attempt`]) and hands on the answer ([`relay`]), each over the sockets themselves. Nothing is handed to another task,
//! so a request that is dropped, for whatever reason, ends everything that was done for it.
//!
//! The proxy decides nothing about backends: which exist and which take requests is in the snapshot it reads.

pub mod attempt;
pub mod client;
mod cors;
pub mod exchange;
pub mod failure;
pub mod headers;
pub mod makers;
pub mod paths;
pub mod relay;
mod respond;
pub mod tunnel;

use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use tokio::time::{Instant, sleep, timeout};

use self::{
    attempt::{Attempt, Stop},
    client::{BodyWait, Client, Closing, Gone, Next, Transport},
    cors::Cors,
    exchange::{Ending, Exchange, Learner, RequestId},
    failure::{Action, Stage, What},
    headers::{Delivery, Persistence, ToBackend, ToClient},
    makers::{Maker, Makers},
    paths::Target,
    relay::{Cut, Relay, Relayed},
    respond::{discard, json, refuse_connection, respond},
};
use crate::{
    admin::Admin,
    backend::{Backend, InFlight, Refused},
    balance,
    config::{Balance, Config},
    error::{Dialect, ProxyError},
    http1::{
        body::{BodyDecoder, Framing, push_chunk},
        head::{HeadError, Known, Lines, RequestHead, ResponseHead, Version},
    },
    replay::{BodyFault, BodyLimits, Replay},
    scan::{AnswerKind, ModelScanner, ScanError},
    table::{Lookup, TableReader},
    telemetry::metrics::Metrics,
};

/// How long the error event of a broken stream may take to reach its client.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

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
    usage_metrics: bool,
    cors: Cors,
    makers: Makers,
    /// Admin paths are on a port of their own.
    admin_elsewhere: bool,
}

/// What becomes of the client's connection after an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// The next request may come.
    KeepAlive,
    /// It is closed in an orderly way.
    Close,
    /// It is ended at once.
    Abort {
        /// So that its end is not taken for the end of an answer.
        by_reset: bool,
    },
}

/// One request with what is known of it from its head.
#[derive(Debug, Clone, Copy)]
struct Asked<'r> {
    head: &'r RequestHead,
    id: &'r RequestId<'r>,
    client_ip: IpAddr,
    /// In whose shape this client reads errors.
    dialect: Dialect,
    /// Value of `Access-Control-Allow-Origin`, if it is for the proxy to say.
    origin: Option<&'r [u8]>,
    /// The client's connection may carry another request.
    keeps_alive: bool,
}

/// A backend's answer, with all that depends on it.
#[derive(Debug)]
struct Answer {
    head: ResponseHead,
    attempt: Attempt,
    in_flight: InFlight,
}

/// Where a request is served.
#[derive(Debug)]
struct Place {
    in_flight: InFlight,
    /// Nobody else could serve it.
    is_the_only_one: bool,
}

/// Why there is none.
#[derive(Debug)]
enum NoAnswer {
    /// The client is told why.
    Error(ProxyError),
    /// The client left.
    Gone,
}

impl From<ProxyError> for NoAnswer {
    fn from(error: ProxyError) -> NoAnswer {
        NoAnswer::Error(error)
    }
}

impl From<Gone> for NoAnswer {
    fn from(Gone: Gone) -> NoAnswer {
        NoAnswer::Gone
    }
}

// === impl Proxy ===

impl Proxy {
    /// A proxy that routes by `table`.
    pub fn new(config: &Config, table: TableReader, metrics: Arc<Metrics>, admin: Admin) -> Proxy {
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
            usage_metrics: config.usage_metrics,
            cors: Cors::new(&config.cors_origins),
            makers: Makers::default(),
            admin_elsewhere: config.admin_port.is_some(),
        }
    }

    /// Serves a connection of a client at `client_ip`, of which `first` has been read already, to its end.
    pub async fn serve<S: Transport>(&self, io: S, first: Vec<u8>, client_ip: IpAddr, closing: Closing) {
        let mut client = Client::new(io, first, closing);
        let mut head = RequestHead::default();
        loop {
            match client.next(&mut head).await {
                Next::Request => {}
                Next::End => return client.abort(false),
                Next::Nonsense(error) => {
                    tracing::debug!(client = %client_ip, %error, "sent what is no request");
                    refuse_connection(&mut client, &unreadable(error)).await;
                    return client.close().await;
                }
                Next::TooSlow => {
                    let what = "the head of the request";
                    refuse_connection(&mut client, &ProxyError::RequestTimeout { what }).await;
                    return client.close().await;
                }
            }
            match self.exchange(&mut client, &head, client_ip).await {
                After::KeepAlive => {}
                After::Close => return client.close().await,
                After::Abort { by_reset } => return client.abort(by_reset),
            }
        }
    }

    /// Serves one request.
    async fn exchange<S: Transport>(&self, client: &mut Client<S>, head: &RequestHead, client_ip: IpAddr) -> After {
        let id = RequestId::of(head);
        let asked = Asked {
            head,
            id: &id,
            client_ip,
            dialect: dialect(head.path(), &head.lines),
            origin: self.cors.allow(&head.lines),
            // Whoever keeps a connection while the proxy shuts down would lose the request it sends just when it is closed.
            keeps_alive: head.wants_keep_alive() && !self.admin.stopping.load(Ordering::Relaxed),
        };
        let is_preflight = head.method == Method::OPTIONS;
        let no_path = |message: &str| ProxyError::NoSuchPath { message: message.to_owned() }.response(asked.dialect);
        let response = match paths::classify(&head.method, head.path()) {
            Target::Forward { .. } if is_preflight && paths::model_in_query(head.query()).is_none() => {
                self.cors.preflight(&asked)
            }
            Target::Forward { below_v1 } => return self.forward(client, &asked, below_v1.is_some()).await,
            Target::Own(page) if page.is_for_everybody() || !self.admin_elsewhere => {
                match client.unless_gone(self.admin.show(page)).await {
                    Ok(response) => response,
                    Err(Gone) => return After::Abort { by_reset: false },
                }
            }
            Target::ModelList | Target::ModelObject(_) if is_preflight => self.cors.preflight(&asked),
            Target::ModelList => self.list_models(&asked),
            Target::ModelObject(id) => self.show_model(&id, asked.dialect),
            Target::Control => no_path("engines' control endpoints are not reachable through this proxy"),
            Target::Stateful => {
                no_path("this API keeps state that no single backend could answer for; it is not served")
            }
            Target::Own(_) | Target::Unknown => {
                no_path("no such path here; the API is under /v1, GET /v1/models lists its models")
            }
        };
        respond(client, &asked, &response, BodyDecoder::new(head.framing)).await
    }

    fn list_models(&self, asked: &Asked<'_>) -> Response<Bytes> {
        if !matches!(asked.head.method, Method::GET | Method::HEAD) {
            return ProxyError::MethodNotAllowed { allow: "GET, HEAD" }.response(asked.dialect);
        }
        let table = self.table.snapshot();
        json(match asked.dialect {
            Dialect::OpenAi => table.openai_list(),
            Dialect::Anthropic => table.anthropic_list(),
        })
    }

    fn show_model(&self, id: &str, dialect: Dialect) -> Response<Bytes> {
        match (self.table.snapshot().object(id), dialect) {
            (Some(object), Dialect::OpenAi) => json(Bytes::copy_from_slice(object.json.get().as_bytes())),
            (Some(object), Dialect::Anthropic) => json(Bytes::from(object.to_anthropic().to_string())),
            (None, dialect) => ProxyError::ModelNotFound { model: bounded(id) }.response(dialect),
        }
    }

    /// Routes one request by the model it names.
    async fn forward<S: Transport>(&self, client: &mut Client<S>, asked: &Asked<'_>, below_v1: bool) -> After {
        let mut exchange = Exchange::new(asked.head, asked.id, asked.client_ip, &self.metrics, self.access_log);
        let mut replay = Replay::new(asked.head.framing, None, &self.limits);
        match self.ask(client, asked, below_v1, &mut replay, &mut exchange).await {
            Ok(answer) => self.relay(client, asked, answer, replay, exchange).await,
            Err(NoAnswer::Gone) => {
                exchange.end(Ending::ClientGone);
                After::Abort { by_reset: false }
            }
            Err(NoAnswer::Error(error)) => {
                let response = error.response(asked.dialect);
                exchange.status = response.status().as_u16();
                exchange.end(Ending::Complete);
                respond(client, asked, &response, replay.into_rest()).await
            }
        }
    }

    /// Gets the head of an answer from some backend.
    async fn ask<S: Transport>(
        &self,
        client: &mut Client<S>,
        asked: &Asked<'_>,
        below_v1: bool,
        replay: &mut Replay,
        exchange: &mut Exchange<'_>,
    ) -> Result<Answer, NoAnswer> {
        let head = asked.head;
        let in_query = paths::model_in_query(head.query());
        if matches!(head.framing, Framing::Length(length) if length > self.limits.max_body_bytes) {
            return Err(self.body_error(BodyFault::TooLarge).into());
        }
        let may_name_none = paths::may_name_no_model(&head.method, head.path());
        // A body may do without the model that the query names; but it has the last word, so it is held until it is clear
        // that it says nothing else.
        replay.look_for(self.scanner(head, in_query.is_some())?, may_name_none || in_query.is_some());
        self.read_model(client, head, replay).await?;
        let place = match replay.model().or(in_query.as_deref()) {
            Some(model) => self.choose(model, &[], replay.continues(), exchange)?,
            None if may_name_none => self.choose_unnamed(head.path(), exchange)?,
            None => return Err(self.body_error(BodyFault::Scan(ScanError::ModelMissing)).into()),
        };
        self.send(client, asked, below_v1, replay, exchange, place).await
    }

    /// What looks for the routing key in the body, if anything does.
    fn scanner(&self, head: &RequestHead, is_known: bool) -> Result<Option<ModelScanner>, ProxyError> {
        if head.framing == Framing::Empty {
            return Ok(None);
        }
        let mut kinds = head.lines.all(Known::ContentType);
        let kind = kinds.next();
        if kinds.any(|other| Some(other) != kind) {
            // Servers differ in which one they believe, and so in which model they read.
            let message = "the request has two different Content-Type headers".to_owned();
            return Err(ProxyError::BadRequest { code: "invalid_request", message });
        }
        // Raw bytes of any kind, with the model beside them.
        if is_known && kind.is_some_and(is_opaque) {
            return Ok(None);
        }
        // Lines are one list.
        let coding = head.lines.all(Known::ContentEncoding).collect::<Vec<_>>().join(&b", "[..]);
        match ModelScanner::for_body(kind, Some(&coding)) {
            Ok(scanner) => Ok(Some(scanner)),
            Err(ScanError::UnsupportedCoding { .. }) if is_known => Ok(None),
            Err(error) => Err(self.body_error(error.into())),
        }
    }

    /// Reads the body as far as it takes to know the model.
    async fn read_model<S: Transport>(
        &self,
        client: &mut Client<S>,
        head: &RequestHead,
        replay: &mut Replay,
    ) -> Result<(), NoAnswer> {
        if head.expects_continue() && client.unread().is_empty() && !replay.is_over() {
            client.outbox().extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        loop {
            let is_partial = client.feed(replay, false).map_err(|fault| self.body_error(fault))?;
            let is_known = match replay.is_scanned() {
                true => replay.model().is_some(),
                false => true,
            };
            if is_known || replay.is_over() {
                client.expect_nothing();
                return Ok(());
            }
            if is_partial {
                // Others first.
                tokio::task::yield_now().await;
            } else if client.more_body().await? == BodyWait::TooSlow {
                return Err(ProxyError::RequestTimeout { what: "the body of the request" }.into());
            }
        }
    }

    /// Sends the request, trying again while that is safe.
    async fn send<S: Transport>(
        &self,
        client: &mut Client<S>,
        asked: &Asked<'_>,
        below_v1: bool,
        replay: &mut Replay,
        exchange: &mut Exchange<'_>,
        place: Place,
    ) -> Result<Answer, NoAnswer> {
        let Place { mut in_flight, is_the_only_one } = place;
        let mut tried: Vec<Arc<Backend>> = Vec::new();
        let mut fresh_only = false;
        let upgrades = asked.head.method == Method::GET && asked.head.asks_for_websocket();
        loop {
            exchange.attempts += 1;
            let backend = in_flight.backend();
            let idle = if fresh_only { None } else { backend.upstream.lease_idle(Instant::now()) };
            let leased = match idle {
                Some(lease) => Ok(lease),
                None => client.unless_gone(backend.upstream.lease_fresh()).await?,
            };
            let (what, stage) = match leased {
                Err(error) => (What::Connect(error), Stage::Unanswered { reused: false }),
                Ok(lease) => {
                    let mut sent = Vec::with_capacity(1024);
                    let to = ToBackend {
                        base_path: Some(&*backend.spec.base_path).filter(|path| below_v1 && *path != "/v1"),
                        authority: &backend.authority,
                        client_ip: asked.client_ip,
                        request_id: asked.id.as_bytes(),
                        upgrades,
                    };
                    headers::push_request(&mut sent, asked.head, &to);
                    let mut attempt = Attempt::new(lease, sent);
                    let limit = self.head_limit();
                    let mut timer = limit.map(|(limit, _)| Box::pin(sleep(limit)));
                    let timer = timer.as_mut().map(|timer| timer.as_mut());
                    match attempt.answer(client, replay, asked.head, upgrades, timer).await {
                        Ok(head) => return Ok(Answer { head, attempt, in_flight }),
                        Err(Stop::Gone) => return Err(NoAnswer::Gone),
                        Err(Stop::Fault(fault)) => return Err(self.body_error(fault).into()),
                        Err(Stop::TooSlow) => {
                            return Err(ProxyError::RequestTimeout { what: "the body of the request" }.into());
                        }
                        Err(Stop::Failed(what, stage)) => (what, stage),
                    }
                }
            };
            tracing::debug!(
                request_id = exchange.request_id(), container = %backend.spec.name, ?what, ?stage,
                attempt = exchange.attempts, "attempt failed"
            );
            let give_up = self.failure(what, backend, exchange.attempts);
            match failure::judge(what, stage, replay.can_replay()).0 {
                Action::SendAgain => fresh_only = true,
                Action::Elsewhere => {
                    tried.push(backend.clone());
                    let retries = u32::try_from(tried.len()).unwrap_or(u32::MAX);
                    if retries > self.retries || is_the_only_one {
                        return Err(give_up.into());
                    }
                    let model = in_flight.model().clone();
                    drop(in_flight);
                    in_flight = self.choose(&model.id, &tried, None, exchange).map_err(|_| give_up)?.in_flight;
                    fresh_only = false;
                }
                Action::BadGateway | Action::GatewayTimeout | Action::Refuse | Action::Cut | Action::Abandon => {
                    return Err(give_up.into());
                }
            }
        }
    }

    /// Claims a place on a member of the model's pool: on the one that made the answer that is continued, if it still
    /// serves the model, else on the best.
    fn choose(
        &self,
        model: &str,
        tried: &[Arc<Backend>],
        continues: Option<&str>,
        exchange: &mut Exchange<'_>,
    ) -> Result<Place, ProxyError> {
        if let Some(Maker::Here(member)) = continues.map(|id| self.makers.of(id))
            && *member.model.id == *model
            && let Ok(in_flight) = member.try_acquire()
        {
            return Ok(self.claimed(in_flight, false, exchange));
        }
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
        let in_flight = chosen.map_err(|refused| refusal(refused, model))?;
        Ok(self.claimed(in_flight, false, exchange))
    }

    /// Claims a place for a request that names no model: on the backend that made the answer it is about, else on the
    /// only one there is.
    fn choose_unnamed(&self, path: &str, exchange: &mut Exchange<'_>) -> Result<Place, ProxyError> {
        let id = paths::answer_id(path);
        let member = match id.as_deref().map(|id| (self.makers.of(id), id)) {
            Some((Maker::Here(member), _)) => member,
            Some((Maker::Gone, id)) => return Err(ProxyError::AnswerGone { id: bounded(id) }),
            Some((Maker::Unknown, _)) | None => {
                let table = self.table.snapshot();
                match table.only_backend() {
                    Some(only) => only.clone(),
                    None if table.routes().iter().all(|route| route.members.is_empty()) => {
                        return Err(ProxyError::NoBackend);
                    }
                    None => return Err(nobody_meant(id.as_deref())),
                }
            }
        };
        exchange.model = Some(member.model.clone());
        let in_flight = member.try_acquire().map_err(|refused| refusal(refused, &member.model.id))?;
        Ok(self.claimed(in_flight, true, exchange))
    }

    fn claimed(&self, in_flight: InFlight, is_the_only_one: bool, exchange: &mut Exchange<'_>) -> Place {
        exchange.model = Some(in_flight.model().clone());
        exchange.backend = Some(in_flight.backend().clone());
        Place { in_flight, is_the_only_one }
    }

    /// The shorter of the limits that run until the head of an answer.
    fn head_limit(&self) -> Option<(Duration, &'static str)> {
        let first = self.first_byte_timeout.map(|limit| (limit, "PROXY_FIRST_BYTE_TIMEOUT"));
        let idle = self.idle_timeout.map(|limit| (limit, "PROXY_IDLE_TIMEOUT"));
        first.into_iter().chain(idle).min_by_key(|(limit, _)| *limit)
    }

    /// What the client is told when nothing more can be tried.
    fn failure(&self, what: What, backend: &Backend, attempts: u32) -> ProxyError {
        let name = backend.spec.name.clone();
        let what = match (what, self.head_limit()) {
            (What::TimedOut, Some((limit, knob))) => {
                return ProxyError::BackendTimeout { backend: name, limit, knob };
            }
            (What::Connect(error), _) => error.what(),
            (What::Nonsense, _) => "sent something that is no answer",
            (What::Ended | What::TimedOut | What::ClientGone | What::ClientFault, _) => "closed the connection",
        };
        ProxyError::Backend { backend: name, what, attempts }
    }

    /// Hands a backend's answer on.
    async fn relay<'r, S: Transport>(
        &'r self,
        client: &mut Client<S>,
        asked: &Asked<'r>,
        answer: Answer,
        mut replay: Replay,
        mut exchange: Exchange<'r>,
    ) -> After {
        let Answer { head, mut attempt, in_flight } = answer;
        attempt.forget_sent(&mut replay);
        exchange.status = head.status.as_u16();
        let upgraded = head.status == StatusCode::SWITCHING_PROTOCOLS;
        let has_body = asked.head.method != Method::HEAD
            && !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            && !upgraded;
        let framing = if has_body { head.framing } else { Framing::Empty };
        let delivery = Delivery::of(framing, asked.head.version);
        let connection = match asked.persistence(delivery == Delivery::UntilClose) {
            _ if upgraded => Persistence::Upgrade,
            connection => connection,
        };
        let backend = in_flight.backend();
        let to = ToClient {
            framing: delivery,
            request_id: asked.id.as_bytes(),
            connection,
            origin: asked.origin,
            authority: &backend.authority,
            base_path: &backend.spec.base_path,
        };
        headers::push_response(client.outbox(), &head, &to);
        // An event can be added only where the end is not announced and the bytes are not compressed.
        let can_add_events =
            delivery != Delivery::AsIs && head.is_event_stream() && !head.lines.has(Known::ContentEncoding);
        let reusable = head.reusable && !upgraded;
        if self.usage_metrics && head.status.is_success() && has_body {
            let kind = head.lines.first(Known::ContentType).unwrap_or_default();
            if let Some(kind) = AnswerKind::of(kind, head.lines.has(Known::ContentEncoding)) {
                let makes = asked.head.method == Method::POST && asked.head.path().starts_with("/v1/responses");
                let learner = makes.then(|| Learner { makers: &self.makers, member: in_flight.member().clone() });
                exchange.listen_to(kind, learner);
            }
        }
        drop(head);
        let mut relay = Relay::new(framing, delivery, self.idle_timeout);
        let relayed = match upgraded {
            true => tunnel::run(client, &mut attempt, &mut exchange).await,
            false => relay.run(client, &mut attempt, &mut replay, &mut exchange).await,
        };
        match relayed {
            Relayed::Complete => {
                // The connection first: whoever sees the place free may want it.
                if reusable && relay.is_clean() && attempt.is_sent(&replay) {
                    attempt.lease.give_back(Instant::now());
                } else {
                    drop(attempt);
                }
                drop(in_flight);
                exchange.end(Ending::Complete);
                match connection {
                    Persistence::Upgrade => After::Abort { by_reset: false },
                    Persistence::Close => After::Close,
                    Persistence::Unsaid | Persistence::KeepAlive => discard(client, replay.into_rest()).await,
                }
            }
            Relayed::Gone => {
                drop((attempt, in_flight));
                exchange.end(Ending::ClientGone);
                After::Abort { by_reset: false }
            }
            Relayed::Cut(why) => {
                let event = (can_add_events && why != Cut::Request).then(|| {
                    let error = ProxyError::BrokenOff { backend: backend.spec.name.clone() };
                    error.stream_event(asked.dialect, asked.head.path())
                });
                tracing::warn!(
                    container = %backend.spec.name, model = %in_flight.model().id, request_id = exchange.request_id(), %why,
                    "answer cut"
                );
                drop((attempt, in_flight));
                exchange.end(if why == Cut::Request { Ending::ClientBroke } else { Ending::BackendBroke });
                if let Some(event) = event {
                    match delivery {
                        Delivery::Chunked => push_chunk(client.outbox(), &event),
                        Delivery::AsIs | Delivery::UntilClose => client.outbox().extend_from_slice(&event),
                    }
                }
                // What has come is sent; who does not take it now will not be told any better later.
                let _ = timeout(LAST_WORDS_TIME, client.flush()).await;
                After::Abort { by_reset: delivery == Delivery::UntilClose }
            }
        }
    }

    fn body_error(&self, fault: BodyFault) -> ProxyError {
        match fault {
            BodyFault::Scan(error @ ScanError::UnsupportedCoding { .. }) => {
                ProxyError::UnsupportedEncoding { message: error.to_string() }
            }
            BodyFault::Scan(error @ ScanError::DecodesTooLarge { .. }) => {
                ProxyError::DecodesTooLarge { message: error.to_string() }
            }
            BodyFault::Scan(error) => ProxyError::BadRequest { code: error.code(), message: error.to_string() },
            BodyFault::Framing(error) => ProxyError::BadRequest {
                code: "invalid_request",
                message: format!("the request's body is broken: {error}"),
            },
            BodyFault::TooLarge => {
                ProxyError::TooLarge { limit_bytes: self.limits.max_body_bytes, knob: "PROXY_MAX_BODY" }
            }
            BodyFault::HoldTooLarge => ProxyError::TooLarge {
                limit_bytes: self.limits.hold_max_bytes as u64,
                knob: "PROXY_HOLD_MAX; put `model` first in the body",
            },
            BodyFault::HoldFull => ProxyError::Overloaded { what: "too many request bodies are being held".to_owned() },
        }
    }
}

thread_local! {
    static RNG: std::cell::RefCell<fastrand::Rng> = std::cell::RefCell::new(fastrand::Rng::new());
}

// === impl Asked ===

impl Asked<'_> {
    /// What is said of the client's connection. `ends_by_close`: only its end can end this answer.
    fn persistence(&self, ends_by_close: bool) -> Persistence {
        match self.head.version {
            _ if ends_by_close || !self.keeps_alive => Persistence::Close,
            Version::Http11 => Persistence::Unsaid,
            Version::Http10 => Persistence::KeepAlive,
        }
    }
}

// === helpers ===

fn unreadable(error: HeadError) -> ProxyError {
    let message = error.to_string();
    match error {
        HeadError::TooLarge | HeadError::TooManyLines => ProxyError::HeadTooLarge { message },
        HeadError::Malformed(_) | HeadError::Ambiguous(_) | HeadError::Version => {
            ProxyError::BadRequest { code: "invalid_request", message }
        }
    }
}

fn refusal(refused: Refused, model: &str) -> ProxyError {
    match refused {
        Refused::Full => ProxyError::Overloaded { what: format!("every backend of `{}` is full", bounded(model)) },
        Refused::Closed => ProxyError::ModelUnavailable { model: bounded(model), why: "it is stopping" },
    }
}

/// The error for a request that could be for any of several backends.
fn nobody_meant(id: Option<&str>) -> ProxyError {
    let what = match id {
        Some(id) => format!("no answer `{}` has been made through this proxy", bounded(id)),
        None => "the request names no model".to_owned(),
    };
    let message =
        format!("{what}, and several backends are live: name one's model in the body, or in the query as `?model=`");
    ProxyError::BadRequest { code: "model_required", message }
}

/// In whose shape this client reads errors.
fn dialect(path: &str, lines: &Lines) -> Dialect {
    let messages = path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if messages || lines.has(Known::AnthropicVersion) { Dialect::Anthropic } else { Dialect::OpenAi }
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
