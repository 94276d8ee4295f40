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
//! (`send.rs`, [`attempt`]) and hands on the answer ([`relay`]), each over the sockets themselves. Nothing is handed to another task,
//! so a request that is dropped, for whatever reason, ends everything that was done for it.
//!
//! The proxy decides nothing about backends: which exist and which take requests is in the snapshot it reads.

pub mod attempt;
mod claim;
pub mod client;
pub mod cors;
pub mod exchange;
pub mod failure;
pub mod headers;
pub mod makers;
pub mod paths;
pub mod relay;
mod respond;
pub mod reuse;
pub mod seat;
mod send;
mod status;
pub mod trace;
pub mod tunnel;
mod turn;

use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use tokio::time::{Instant, timeout};

use self::{
    attempt::Attempt,
    claim::Queue,
    client::{BodyWait, Client, Closing, Gone, Next, Patience, Transport},
    cors::{Cors, CrossOrigin, is_preflight},
    exchange::{Ending, Exchange, Learner, RequestId},
    headers::{Common, Delivery, Persistence, ToClient},
    makers::Makers,
    paths::Target,
    relay::{Cut, Relay, Relayed, Watch as _},
    respond::{discard, models, refuse_connection, respond},
};
use crate::{
    base::{
        config::{Balance, Config},
        error::{Dialect, ProxyError},
    },
    data::{
        affinity::{self, Affinity},
        replay::{BodyFault, BodyLimits, Replay},
    },
    observe::pages::{self, Admin, Page},
    pool::{
        backend::InFlight,
        table::{Lookup, TableReader},
        tally::Trouble,
    },
    telemetry::{metrics::Metrics, operation::Operation},
    wire::{
        http1::{
            body::{BodyDecoder, Framing, push_chunk},
            head::{HeadError, Known, Lines, RequestHead, ResponseHead, Version},
        },
        scan::{AnswerKind, IdReader, ModelScanner, PromptSeed, ScanError},
    },
};

/// How long the error event of a broken stream may take to reach its client.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

/// What came too late of a body that others have to wait for.
const GAVE_WAY: &str = "the `model` of a body that took up room which others needed (put `model` first in the body)";

/// What the data plane needs to serve requests; shared by all workers.
#[derive(Debug)]
pub struct Proxy {
    table: TableReader,
    metrics: Arc<Metrics>,
    limits: Arc<BodyLimits>,
    patience: Patience,
    admin: Admin,
    balance: Balance,
    queue: Queue,
    retries: u32,
    first_byte_timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
    access_log: bool,
    usage_metrics: bool,
    cors: Cors,
    makers: Makers,
    /// Who has been sent which prompts, if the policy goes by it.
    affinity: Option<Affinity>,
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
    /// What its answer says of other origins' scripts.
    cross_origin: CrossOrigin<'r>,
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

/// Why there is no answer.
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
            patience: Patience { idle: config.client_idle_timeout, write: config.client_write_timeout },
            admin,
            balance: config.balance,
            queue: Queue::new(config),
            retries: config.retries,
            first_byte_timeout: config.first_byte_timeout,
            idle_timeout: config.idle_timeout,
            access_log: config.access_log,
            usage_metrics: config.usage_metrics,
            cors: Cors::new(&config.cors_origins),
            makers: Makers::default(),
            affinity: (config.balance == Balance::Prefix).then(|| Affinity::new(PromptSeed::new(fastrand::u64(..)))),
            admin_elsewhere: config.admin_port.is_some(),
        }
    }

    /// Serves a connection of a client at `client_ip`, of which `first` has been read already, to its end.
    pub async fn serve<S: Transport>(&self, io: S, first: Vec<u8>, client_ip: IpAddr, closing: Closing) {
        let mut client = Client::new(io, first, self.patience, closing);
        let mut head = RequestHead::default();
        loop {
            match client.next(&mut head).await {
                Next::Request => {}
                Next::End => return client.abort(false),
                Next::Nonsense(error) => {
                    tracing::debug!(client = %client_ip, %error, "sent what is no request");
                    let error = unreadable(error);
                    self.count_refused(&error);
                    refuse_connection(&mut client, &error, &self.cors).await;
                    return client.close().await;
                }
                Next::TooSlow => {
                    let error = ProxyError::RequestTimeout { what: "the head of the request" };
                    self.count_refused(&error);
                    refuse_connection(&mut client, &error, &self.cors).await;
                    return client.close().await;
                }
            }
            match self.exchange(&mut client, &head, client_ip).await {
                After::KeepAlive => head.forget_large(),
                After::Close => return client.close().await,
                After::Abort { by_reset } => return client.abort(by_reset),
            }
        }
    }

    /// Answers the request in `first` with this error, and ends the connection.
    pub async fn refuse<S: Transport>(
        &self,
        io: S,
        first: Vec<u8>,
        client_ip: IpAddr,
        closing: Closing,
        error: &ProxyError,
    ) {
        let mut client = Client::new(io, first, self.patience, closing.after_one());
        let mut head = RequestHead::default();
        let Next::Request = client.next(&mut head).await else { return client.abort(false) };
        let id = RequestId::of(&head);
        let asked = self.asked(&head, &id, client_ip, true);
        self.answer_by_itself(&mut client, &asked, &self.reject(error, asked.dialect)).await;
        client.close().await;
    }

    /// A request with what its head says.
    fn asked<'r>(
        &'r self,
        head: &'r RequestHead,
        id: &'r RequestId<'r>,
        client_ip: IpAddr,
        is_only_one: bool,
    ) -> Asked<'r> {
        Asked {
            head,
            id,
            client_ip,
            dialect: dialect(head.path(), &head.lines),
            cross_origin: self.cors.says(&head.lines),
            // Whoever keeps a connection while the proxy shuts down would lose the request it sends just when it is closed.
            keeps_alive: head.wants_keep_alive() && !is_only_one && !self.admin.stopping.load(Ordering::Relaxed),
        }
    }

    /// Serves one request.
    async fn exchange<S: Transport>(&self, client: &mut Client<S>, head: &RequestHead, client_ip: IpAddr) -> After {
        let id = RequestId::of(head);
        let asked = self.asked(head, &id, client_ip, client.is_for_one());
        let no_path = |message: &str| {
            let error = ProxyError::NoSuchPath { message: message.to_owned() };
            self.reject(&error, asked.dialect)
        };
        if let Some(fault) = head.host_fault() {
            let error = ProxyError::BadRequest { code: "invalid_request", message: fault.to_owned() };
            return self.answer_by_itself(client, &asked, &self.reject(&error, asked.dialect)).await;
        }
        let options = head.method == Method::OPTIONS;
        let names_no_model = || paths::model_in_query(head.query()) == Ok(None);
        let response = match paths::classify(&head.method, head.path()) {
            // Wherever it leads: what is asked is what the browser may send, not what will become of that.
            _ if options && is_preflight(head) => self.cors.preflight(&asked),
            Target::Own(page) if self.shows(page) && page.answers(&head.method) => {
                // Whoever looks at the proxy does not change what is seen: these are not counted.
                let accept: Vec<&[u8]> = head.lines.all_named("accept").collect();
                let response = match self.admin.watch(page, &head.method, &accept) {
                    Some(Ok(watcher)) => return status::stream(client, &asked, watcher).await,
                    Some(Err(refused)) => Ok(refused),
                    None => client.unless_gone(self.admin.show(page, &accept)).await,
                };
                return match response {
                    Ok(response) => respond(client, &asked, &response, BodyDecoder::new(head.framing)).await,
                    Err(Gone) => After::Abort { by_reset: false },
                };
            }
            Target::Control => no_path("engines' control endpoints are not reachable through this proxy"),
            _ if options && names_no_model() => self.cors.preflight(&asked),
            // A server that reads none would take the body for the next request.
            Target::Forward { .. } if options && head.framing != Framing::Empty => self.cors.preflight(&asked),
            Target::Forward { below_v1 } => return self.forward(client, &asked, below_v1.is_some()).await,
            Target::Own(page) if self.shows(page) => {
                self.reject(&ProxyError::MethodNotAllowed { allow: pages::ALLOW }, asked.dialect)
            }
            Target::ModelList => self.list_models(&asked),
            Target::ModelObject(id) => self.show_model(&id, asked.dialect),
            Target::Stateful => {
                no_path("this API keeps state that no single backend could answer for; it is not served")
            }
            Target::Own(_) | Target::Unknown => {
                no_path("no such path here; the API is under /v1, GET /v1/models lists its models")
            }
        };
        self.answer_by_itself(client, &asked, &response).await
    }

    /// Sends an answer of the proxy's own to a request that no backend is needed for.
    async fn answer_by_itself<S: Transport>(
        &self,
        client: &mut Client<S>,
        asked: &Asked<'_>,
        response: &Response<Bytes>,
    ) -> After {
        let head = asked.head;
        let mut exchange = Exchange::new(head, asked.id, asked.client_ip, &self.metrics, self.access_log);
        exchange.answered_by_proxy(response);
        exchange.end(Ending::Complete);
        respond(client, asked, response, BodyDecoder::new(head.framing)).await
    }

    /// Whether this page of the proxy's own is on this port.
    fn shows(&self, page: Page) -> bool {
        page.is_for_everybody() || !self.admin_elsewhere
    }

    /// How long connections wait for their clients.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Where connections are counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The answer to a request that is not served.
    fn reject(&self, error: &ProxyError, dialect: Dialect) -> Response<Bytes> {
        self.metrics.rejected.increment(error.code());
        error.response(dialect)
    }

    /// Counts what was refused before it was a request.
    fn count_refused(&self, error: &ProxyError) {
        self.metrics.rejected.increment(error.code());
        self.metrics.unknown.of(Operation::Other).requests.increment(error.status().as_u16());
    }

    fn list_models(&self, asked: &Asked<'_>) -> Response<Bytes> {
        if !matches!(asked.head.method, Method::GET | Method::HEAD) {
            return self.reject(&ProxyError::MethodNotAllowed { allow: "GET, HEAD" }, asked.dialect);
        }
        let table = self.table.snapshot();
        models(match asked.dialect {
            Dialect::OpenAi => table.openai_list(),
            Dialect::Anthropic => table.anthropic_list(),
        })
    }

    fn show_model(&self, id: &str, dialect: Dialect) -> Response<Bytes> {
        let table = self.table.snapshot();
        // A slash behind the name makes no difference, unless a name ends in one.
        let object = table.object(id).or_else(|| table.object(id.trim_end_matches('/')));
        match (object, dialect) {
            (Some(object), Dialect::OpenAi) => models(Bytes::copy_from_slice(object.json.get().as_bytes())),
            (Some(object), Dialect::Anthropic) => models(Bytes::from(object.to_anthropic().to_string())),
            (None, dialect) => self.reject(&ProxyError::ModelNotFound { model: bounded(id) }, dialect),
        }
    }

    /// Routes one request by the model it names.
    async fn forward<S: Transport>(&self, client: &mut Client<S>, asked: &Asked<'_>, below_v1: bool) -> After {
        let mut exchange = Exchange::new(asked.head, asked.id, asked.client_ip, &self.metrics, self.access_log);
        let mut replay = Replay::new(asked.head.framing, None, &self.limits);
        match self.ask(client, asked, below_v1, &mut replay, &mut exchange).await {
            Ok(answer) => self.relay(client, asked, answer, replay, exchange).await,
            Err(NoAnswer::Gone) => {
                exchange.is_uploading = !replay.is_over();
                exchange.end(Ending::ClientGone);
                After::Abort { by_reset: false }
            }
            Err(NoAnswer::Error(error)) => {
                let response = self.reject(&error, asked.dialect);
                exchange.answered_by_proxy(&response);
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
        let in_query = paths::model_in_query(head.query())
            .map_err(|error| ProxyError::BadRequest { code: "invalid_request", message: error.to_string() })?;
        if matches!(head.framing, Framing::Length(length) if length > self.limits.max_body_bytes) {
            return Err(self.body_error(BodyFault::TooLarge).into());
        }
        let made = self.made(head.path());
        let may_name_none = made.is_some() || paths::may_name_no_model(&head.method, head.path());
        // A body may do without the model that the query names; but it has the last word, so it is held until it is clear
        // that it says nothing else.
        let key_is_optional = may_name_none || in_query.is_some();
        let mut scanner = self.scanner(head, in_query.is_some())?;
        if let Some(scanner) = scanner.as_mut().filter(|_| key_is_optional) {
            scanner.let_model_be_none();
        }
        replay.look_for(scanner, key_is_optional);
        self.read_model(client, head, replay, exchange).await?;
        let place = match replay.model().or(in_query.as_deref()) {
            Some(model) => self.choose(client, model, made, replay, exchange).await?,
            None if may_name_none => self.choose_unnamed(client, head.path(), made, exchange).await?,
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
        // Bytes that nothing here can read pass only where servers take them as they are, with the model beside them.
        let takes_raw_bytes = paths::takes_raw_bytes(head.path());
        let may_be_opaque = is_known && takes_raw_bytes;
        let is_opaque = |kind: &[u8]| may_be_opaque && is_opaque(kind);
        // Lines are one list.
        let coding = head.lines.all(Known::ContentEncoding).collect::<Vec<_>>().join(&b", "[..]);
        let plain = match takes_raw_bytes {
            true => ModelScanner::for_fields,
            false => ModelScanner::for_content_type,
        };
        let scanner = |kind: Option<&[u8]>| {
            let scanner = match plain(kind) {
                Ok(scanner) if coding.is_empty() => return Ok(Some(scanner)),
                scanner => scanner.and_then(|scanner| scanner.coded(Some(&coding))),
            };
            match scanner {
                Ok(scanner) => Ok(Some(scanner)),
                // Not what says that it names a model, or may.
                Err(ScanError::UnsupportedCoding { .. }) if kind.is_some_and(is_opaque) => Ok(None),
                Err(error) => Err(self.body_error(error.into())),
            }
        };
        let mut first = scanner(kind)?;
        for other in kinds.filter(|other| Some(*other) != kind) {
            // Servers differ in which of two they believe. That does not matter where both mean the same.
            let is_same = match (&first, scanner(Some(other))?) {
                (Some(first), Some(other)) => first.reads_as(&other),
                (first, other) => first.is_some() == other.is_some(),
            };
            if !is_same || kind.is_some_and(is_opaque) != is_opaque(other) {
                let message =
                    "the request has two Content-Type headers, by which its body reads differently".to_owned();
                return Err(ProxyError::BadRequest { code: "invalid_request", message });
            }
        }
        if kind.is_some_and(is_opaque) {
            return Ok(None);
        }
        if let Some(scanner) = &mut first
            && let Some(affinity) = self.affinity.as_ref().filter(|_| paths::continues_prompt(head.path()))
        {
            scanner.mark_prompt(affinity.seed());
        }
        Ok(first)
    }

    /// Reads the body as far as it takes to know the model, and the prompt if that matters.
    async fn read_model<S: Transport>(
        &self,
        client: &mut Client<S>,
        head: &RequestHead,
        replay: &mut Replay,
        exchange: &mut Exchange<'_>,
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
            if is_known {
                replay.has_model();
            }
            if replay.is_over() || is_known && !self.waits_for_prompt(replay) {
                client.expect_nothing();
                break;
            }
            if is_partial {
                std::future::poll_fn(|cx| client.poll_turn(cx)).await;
            } else {
                let began = Instant::now();
                if !is_known {
                    replay.awaits_model(began);
                }
                let came = client.more_body(replay).await?;
                exchange.has_waited(began.elapsed());
                if came == BodyWait::TooSlow {
                    let what = if replay.has_given_way() { GAVE_WAY } else { "the body of the request" };
                    return Err(ProxyError::RequestTimeout { what }.into());
                }
            }
        }
        if self.affinity.is_some()
            && let Some(model) = replay.model().map(str::to_owned)
            && let Some(prompt) = replay.end_prompt(&model)
            && let Some(session) = affinity::SESSION_HEADERS.iter().find_map(|name| head.lines.named(name))
        {
            prompt.set_session(session);
        }
        Ok(())
    }

    /// Whether the choice of a replica is better made when more of the prompt has come: there is a choice.
    fn waits_for_prompt(&self, replay: &Replay) -> bool {
        let is_choice = |model: &str| matches!(self.table.snapshot().lookup(model), Lookup::Ready(route) if route.members.len() > 1);
        !replay.is_prompt_here(affinity::WAIT_BYTES_MAX) && replay.model().is_some_and(is_choice)
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
        let Answer { head, mut attempt, mut in_flight } = answer;
        attempt.forget_sent(&mut replay);
        exchange.status = head.status.as_u16();
        exchange.trace.answered(exchange.status, head.is_event_stream());
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
        let to = ToClient { framing: delivery, common: asked.common(connection), own_address: &backend.own_address };
        headers::push_response(client.outbox(), &head, &to);
        // An event can be added only where the end is not announced and the bytes are not compressed.
        let can_add_events =
            delivery != Delivery::AsIs && head.is_event_stream() && !head.lines.has(Known::ContentEncoding);
        let reusable = reuse::is_certain(asked.head, &head) && !attempt.leaves_doubt();
        if head.status.is_success() && has_body {
            self.listen(asked, &head, &in_flight, &mut exchange);
        }
        if !(head.status.is_success() && has_body) {
            in_flight.says_nothing_of_pace();
        }
        exchange.now_served(in_flight);
        drop(head);
        let mut relay = Relay::new(framing, delivery, self.idle_timeout);
        let relayed = match upgraded {
            true => tunnel::run(client, &mut attempt, &mut exchange, self.idle_timeout).await,
            false => relay.run(client, &mut attempt, &mut replay, &mut exchange).await,
        };
        exchange.request_bytes = Some(replay.seen_bytes());
        match relayed {
            Relayed::Complete => {
                // The connection first: whoever sees the place free may want it.
                if reusable && relay.is_clean() && attempt.is_sent(&replay) {
                    attempt.lease.give_back(Instant::now());
                } else {
                    drop(attempt);
                }
                exchange.no_longer_served();
                let is_taken = upgraded || client.deliver(|is_all| exchange.passed(is_all)).await.is_ok();
                exchange.end(if is_taken { Ending::Complete } else { Ending::ClientGone });
                match connection {
                    _ if !is_taken => After::Abort { by_reset: false },
                    Persistence::Upgrade => After::Abort { by_reset: false },
                    Persistence::Close => After::Close,
                    Persistence::Unsaid | Persistence::KeepAlive => discard(client, replay.into_rest()).await,
                }
            }
            Relayed::Gone => {
                drop(attempt);
                exchange.no_longer_served();
                exchange.end(Ending::ClientGone);
                After::Abort { by_reset: false }
            }
            Relayed::Cut(why) => {
                let event = (can_add_events && why != Cut::Request).then(|| {
                    let backend = exchange.container().unwrap_or_default().to_owned();
                    let error = ProxyError::BrokenOff { backend, why: why.to_string() };
                    error.stream_event(asked.dialect, asked.head.path())
                });
                tracing::warn!(
                    container = exchange.container(), model = exchange.model_id(), request_id = exchange.request_id(), %why,
                    "answer cut"
                );
                self.metrics.cuts.increment(why.as_str());
                drop(attempt);
                let trouble = match why {
                    // Both sides of a tunnel may have nothing to say.
                    _ if upgraded => None,
                    Cut::Framing(error) => Some(Trouble::BadFraming(error.why())),
                    Cut::Ended | Cut::Silent(_) => Some(Trouble::BrokeOff),
                    Cut::Stopped | Cut::Request => None,
                };
                if let Some((mut in_flight, trouble)) = exchange.no_longer_served().zip(trouble) {
                    in_flight.failed(trouble, Instant::now());
                }
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

    /// Sets up what reads the answer with this head while it passes.
    fn listen<'r>(&'r self, asked: &Asked<'r>, head: &ResponseHead, in_flight: &InFlight, exchange: &mut Exchange<'r>) {
        let content_type = head.lines.first(Known::ContentType).unwrap_or_default();
        let coding = head.lines.first(Known::ContentEncoding);
        let kind = if self.usage_metrics { AnswerKind::of(content_type, coding.is_some()) } else { None };
        if let Some(kind) = kind {
            exchange.listen_to(kind);
        }
        if paths::makes(&asked.head.method, asked.head.path()) {
            let reader = match kind {
                // The tap sees it as well.
                Some(AnswerKind::Json) => Some(None),
                _ => {
                    IdReader::for_answer(content_type, coding.unwrap_or_default()).map(|reader| Some(Box::new(reader)))
                }
            };
            if let Some(reader) = reader {
                let (path, member) = (asked.head.path(), in_flight.member().clone());
                exchange.learn_by(Learner { makers: &self.makers, path, member, reader });
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
            BodyFault::Scan(ScanError::ModelTooLong { begin }) => {
                ProxyError::ModelNotFound { model: format!("{begin}…") }
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
            BodyFault::GaveWay => ProxyError::RequestTimeout { what: GAVE_WAY },
            BodyFault::HoldFull => {
                let what = "too many request bodies are being held".to_owned();
                ProxyError::Overloaded { what, retry_after: None }
            }
        }
    }
}

// === impl Asked ===

impl Asked<'_> {
    /// What every answer to it says.
    fn common(&self, connection: Persistence) -> Common<'_> {
        Common { request_id: self.id.as_bytes(), dialect: self.dialect, connection, cross_origin: self.cross_origin }
    }

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

/// In whose shape this client reads errors.
fn dialect(path: &str, lines: &Lines) -> Dialect {
    let messages = path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if messages || lines.has(Known::AnthropicVersion) { Dialect::Anthropic } else { Dialect::OpenAi }
}

/// Bytes that are neither JSON nor a form of either kind. A type that could be taken for one of them is not opaque.
fn is_opaque(content_type: &[u8]) -> bool {
    let holds = |word: &[u8]| content_type.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word));
    !content_type.trim_ascii().is_empty() && ![&b"json"[..], b"form-data", b"urlencoded"].iter().any(|word| holds(word))
}

/// A model name as it may stand in a message.
fn bounded(model: &str) -> String {
    const SHOWN_CHARS: usize = 200;
    match model.char_indices().nth(SHOWN_CHARS) {
        None => model.to_owned(),
        Some((end, _)) => format!("{}…", &model[..end]),
    }
}

#[cfg(test)]
mod tests;
