//! The account of one request: what it was, how it ended, told once to metrics and log.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Response};
use tokio::time::Instant;

use super::{
    makers::Makers,
    paths,
    relay::Watch,
    trace::{Account, Trace},
};
use crate::{
    pool::backend::{Backend, InFlight, Member, Model},
    telemetry::{
        http_server::{self, Ended},
        metrics::{Metrics, ModelMetrics},
        routes::Route,
    },
    wire::{
        http1::{
            body::Framing,
            head::{Known, RequestHead},
        },
        scan::{AnswerKind, Found, IdReader, Usage, UsageTap},
    },
};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its answer went out whole.
    Complete,
    /// Its backend broke off in the middle of the answer.
    BackendBroke,
    /// Its client left first.
    ClientGone,
    /// Its client's body turned out to be wrong when the answer had begun.
    ClientBroke,
}

impl Ending {
    /// Why a request did not end well, as telemetry says it.
    pub fn error(self) -> Option<&'static str> {
        match self {
            Ending::Complete => None,
            Ending::BackendBroke => Some("backend_broke"),
            Ending::ClientGone => Some("client_gone"),
            Ending::ClientBroke => Some("client_broke"),
        }
    }
}

/// What correlates a request with its answer and its log lines: the client's word for it, else one of our own.
#[derive(Debug)]
pub struct RequestId<'r> {
    theirs: Option<&'r [u8]>,
    ours: [u8; 32],
}

/// Longest id that is taken over from a client.
const THEIR_ID_BYTES_MAX: usize = 256;

thread_local! {
    static RNG: std::cell::RefCell<fastrand::Rng> = std::cell::RefCell::new(fastrand::Rng::new());
}

impl<'r> RequestId<'r> {
    /// The id of the request with this head.
    pub fn of(head: &'r RequestHead) -> RequestId<'r> {
        let theirs = head.lines.first(Known::XRequestId);
        let theirs = theirs.filter(|id| !id.is_empty() && id.len() <= THEIR_ID_BYTES_MAX);
        if theirs.is_some() { RequestId { theirs, ours: [0; 32] } } else { RequestId::new() }
    }

    /// A new one.
    pub fn new() -> RequestId<'r> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let random = RNG.with_borrow_mut(|rng| rng.u128(..)).to_ne_bytes();
        let digit = |at: usize| DIGITS[usize::from(random[at / 2] >> (at % 2 * 4) & 15)];
        RequestId { theirs: None, ours: std::array::from_fn(digit) }
    }

    /// As it stands in a header.
    pub fn as_bytes(&self) -> &[u8] {
        self.theirs.unwrap_or(&self.ours)
    }
}

impl Default for RequestId<'_> {
    fn default() -> Self {
        RequestId::new()
    }
}

/// Facts of one request. Dropped without [`Exchange::end`], its client has gone.
#[derive(Debug)]
pub struct Exchange<'r> {
    started: Instant,
    head: &'r RequestHead,
    /// What kind of request it is, for telemetry.
    route: Route,
    request_id: &'r RequestId<'r>,
    client_ip: IpAddr,
    metrics: &'r Metrics,
    access_log: bool,
    /// The model, once it is known to exist.
    pub model: Option<Arc<Model>>,
    /// Who served it last.
    backend: Option<Arc<Backend>>,
    /// Its place on the backend, while its answer passes.
    in_flight: Option<InFlight>,
    /// When it was sent last, for the backend's tally.
    sent_at: Option<Instant>,
    /// How many tokens of its answer the tally knows, and since when it knows all.
    tallied: (u64, Option<Instant>),
    /// How often it was sent to a backend.
    pub attempts: u32,
    /// What it tells as spans.
    pub trace: Trace,
    /// Status that the client got; 0 before it got one.
    pub status: u16,
    /// It stands in line for a place.
    pub is_in_line: bool,
    /// How long it has stood in line in all.
    pub in_line: Duration,
    /// Its body had not come to its end when its client left.
    pub is_uploading: bool,
    /// Payload of its body, once that is known.
    pub request_bytes: Option<u64>,
    response_bytes: u64,
    /// Time that it spent waiting for others before it was sent.
    waited: Duration,
    /// When it was written to the backend for the first time, and when the head of the answer had come.
    turn: Option<(Instant, Instant)>,
    tap: Option<UsageTap>,
    /// The answer comes in pieces, as it is made.
    is_streamed: bool,
    /// To be told the id of the answer.
    learner: Option<Learner<'r>>,
    /// When the first token came.
    first_content_at: Option<Instant>,
    ended: bool,
}

/// Remembers who made an answer, once its id has been read.
#[derive(Debug)]
pub struct Learner<'r> {
    /// Where it is remembered.
    pub makers: &'r Makers,
    /// The path of the request, which tells the collection.
    pub path: &'r str,
    /// The backend that made the answer.
    pub member: Arc<Member>,
    /// What reads the id, unless the tap does.
    pub reader: Option<Box<IdReader>>,
}

/// So many tokens are told to the tally together while an answer passes.
const TALLIED_AT_ONCE: u64 = 32;
/// Status in the account of a request whose client left before it got one.
const CLIENT_GONE: u16 = 499;

impl<'r> Exchange<'r> {
    /// A request that has just arrived.
    pub fn new(
        head: &'r RequestHead,
        request_id: &'r RequestId<'r>,
        client_ip: IpAddr,
        metrics: &'r Metrics,
        access_log: bool,
    ) -> Exchange<'r> {
        Exchange {
            started: Instant::now(),
            head,
            route: Route::of(head.path()),
            request_id,
            client_ip,
            metrics,
            access_log,
            model: None,
            backend: None,
            in_flight: None,
            sent_at: None,
            tallied: (0, None),
            attempts: 0,
            trace: Trace::begin(metrics.tracing.as_ref(), head),
            status: 0,
            is_in_line: false,
            in_line: Duration::ZERO,
            is_uploading: false,
            request_bytes: None,
            response_bytes: 0,
            waited: Duration::ZERO,
            turn: None,
            tap: None,
            is_streamed: false,
            learner: None,
            first_content_at: None,
            ended: false,
        }
    }

    /// An answer is about to pass that tells of itself.
    pub fn listen_to(&mut self, kind: AnswerKind) {
        self.tap = Some(UsageTap::new(kind));
        self.is_streamed = kind != AnswerKind::Json;
    }

    /// An answer is about to pass that may be asked for again by its id.
    pub fn learn_by(&mut self, learner: Learner<'r>) {
        self.learner = Some(learner);
    }

    /// Looks for the id of the answer in what has passed.
    fn learn(&mut self, payload: &[u8]) {
        let Some(Learner { makers, path, member, reader }) = &mut self.learner else { return };
        let read;
        let id = match (reader, &self.tap) {
            (Some(reader), _) => match reader.feed(payload) {
                Found::NotYet => return,
                Found::Never => None,
                Found::Id(id) => {
                    read = id;
                    Some(read.as_str())
                }
            },
            (None, Some(tap)) => match tap.id() {
                None => return,
                id => id,
            },
            (None, None) => None,
        };
        if let (Some(id), Some(collection)) = (id, paths::collection(path)) {
            makers.learn(&collection, id, paths::is_stateless(path), member);
        }
        self.learner = None;
    }

    /// How long its body is: as it says, else as much as has been `seen`.
    pub fn body_bytes(&self, seen: u64) -> u64 {
        match self.head.framing {
            Framing::Length(length) => length,
            Framing::Empty | Framing::Chunked | Framing::Close => seen,
        }
    }

    /// It is sent to a backend, or once more.
    pub fn sent(&mut self, now: Instant) {
        self.attempts += 1;
        self.sent_at = Some(now);
    }

    /// It has a place on this backend.
    pub fn served_by(&mut self, in_flight: &InFlight) {
        self.model = Some(in_flight.model().clone());
        self.backend = Some(in_flight.backend().clone());
    }

    /// Its answer is about to pass.
    pub fn now_served(&mut self, in_flight: InFlight) {
        self.in_flight = Some(in_flight);
    }

    /// Its answer has ended. Returns its place on the backend.
    pub fn no_longer_served(&mut self) -> Option<InFlight> {
        self.in_flight.take()
    }

    /// It has waited for somebody else before it was sent: its client, a place, a connection.
    pub fn has_waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// The head of an answer has come, to what was first written at `written_at`.
    pub fn answered(&mut self, written_at: Option<Instant>, now: Instant) {
        self.turn = written_at.map(|written_at| (written_at, now));
    }

    /// The proxy answers itself.
    pub fn answered_by_proxy(&mut self, response: &Response<Bytes>) {
        self.status = response.status().as_u16();
        if self.head.method != Method::HEAD {
            self.response_bytes = response.body().len() as u64;
        }
    }

    /// When it arrived.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Its id, for logs.
    pub fn request_id(&self) -> &str {
        std::str::from_utf8(self.request_id.as_bytes()).unwrap_or("?")
    }

    /// Closes the account.
    pub fn end(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let status = match (ending, self.status) {
            (Ending::ClientGone, 0) => CLIENT_GONE,
            (_, status) => status,
        };
        let now = Instant::now();
        let duration = now.saturating_duration_since(self.started);
        let instruments: &ModelMetrics = self.model.as_ref().map_or(&self.metrics.unknown, |model| &model.metrics);
        let instruments = instruments.of(self.route.operation());
        instruments.request_done(status, duration);
        if let Some(request_bytes) = self.request_bytes {
            instruments.request_bytes.observe_count(request_bytes);
            instruments.response_bytes.observe_count(self.response_bytes);
        }
        if let Some(http) = &self.metrics.http {
            let Exchange { route, status, request_bytes, response_bytes, .. } = *self;
            let ended = Ended { route, status, broken: ending.error(), duration, request_bytes, response_bytes };
            let scheme = http_server::scheme(self.head.lines.first(Known::XForwardedProto));
            http.observe(http_server::method_name(&self.head.method), scheme, &ended);
        }
        let usage = self.tap.as_ref().map(UsageTap::usage);
        if let Some(usage) = &usage {
            instruments.answer_told(usage);
            if let (Ending::Complete, true, Some(first), Some(tokens)) =
                (ending, self.is_streamed, self.first_content_at, usage.output_tokens)
            {
                instruments.streamed(tokens, now.saturating_duration_since(first));
            }
            self.tally_tokens(usage.output_tokens.unwrap_or(0).max(usage.output_events), now);
        }
        if ending == Ending::ClientGone {
            self.metrics.disconnects.increment(self.phase());
        }
        if !matches!(self.trace, Trace::Off) {
            self.end_trace(status, ending, usage);
        }
        if self.access_log {
            tracing::info!(
                request_id = self.request_id(), client = %self.client_ip, method = %self.head.method, path = self.head.path(),
                status, model = self.model_id(), container = self.container(), attempts = self.attempts,
                bytes = self.response_bytes, seconds = duration.as_secs_f64(), ending = ?ending, "request"
            );
        } else {
            tracing::debug!(
                request_id = self.request_id(), client = %self.client_ip, method = %self.head.method, path = self.head.path(),
                status, model = self.model_id(), container = self.container(), attempts = self.attempts,
                bytes = self.response_bytes, seconds = duration.as_secs_f64(), ending = ?ending, "request"
            );
        }
    }

    /// Reads what a stretch of payload tells of the answer.
    fn tap_payload(&mut self, payload: &[u8]) {
        let Some(tap) = &mut self.tap else { return };
        tap.feed(payload);
        let events = tap.output_events();
        if events >= self.tallied.0 + TALLIED_AT_ONCE {
            self.tally_tokens(events, Instant::now());
        }
        let Some(tap) = &mut self.tap else { return };
        if self.first_content_at.is_none() && tap.has_content() {
            let now = Instant::now();
            self.first_content_at = Some(now);
            if let (Some(since), Some(backend)) = (self.sent_at, &self.backend) {
                backend.tally.first_token(now.saturating_duration_since(since), now);
                self.tallied.1.get_or_insert(now);
            }
            if let Some(model) = &self.model {
                let elapsed = now.saturating_duration_since(self.started);
                model.metrics.of(self.route.operation()).time_to_first_token.observe(elapsed);
                self.trace.first_token(elapsed);
            }
        }
    }

    /// Tells the backend's tally that these many tokens of the answer have come in all.
    fn tally_tokens(&mut self, count: u64, now: Instant) {
        let (known, since) = self.tallied;
        if let Some(backend) = &self.backend
            && let Some(since) = since.or(self.sent_at)
            && count > known
        {
            backend.tally.tokens(count - known, since, now);
            self.tallied = (count, Some(now));
        }
    }

    /// How far it is, as [`crate::telemetry::metrics::DISCONNECT_PHASES`] says it.
    fn phase(&self) -> &'static str {
        match self {
            Exchange { status: 1.., .. } => "mid_answer",
            Exchange { is_in_line: true, .. } => "queue",
            Exchange { is_uploading: true, .. } | Exchange { attempts: 0, .. } => "upload",
            _ => "before_first_byte",
        }
    }

    fn end_trace(&mut self, status: u16, ending: Ending, usage: Option<Usage>) {
        let mut trace = std::mem::take(&mut self.trace);
        trace.end(&Account {
            head: self.head,
            request_id: self.request_id(),
            client_ip: self.client_ip,
            status,
            ending,
            model: self.model.as_deref(),
            backend: self.backend.as_deref(),
            usage,
            response_bytes: self.response_bytes,
        });
    }

    /// The model, if it is known.
    pub fn model_id(&self) -> Option<&str> {
        self.model.as_ref().map(|model| &*model.id)
    }

    /// The container that served it last.
    pub fn container(&self) -> Option<&str> {
        self.backend.as_ref().map(|backend| backend.spec.name.as_str())
    }
}

impl Watch for Exchange<'_> {
    fn payload(&mut self, payload: &[u8]) {
        self.response_bytes += payload.len() as u64;
        if let Some(in_flight) = &mut self.in_flight
            && in_flight.awaits_first_byte()
        {
            in_flight.first_byte(Instant::now());
        }
        self.tap_payload(payload);
        if self.learner.is_some() {
            self.learn(payload);
        }
    }

    fn passed(&mut self, is_all: bool) {
        // Of a request that was sent more than once nobody could say which part of its time was the proxy's.
        if let Some((written_at, answered_at)) = self.turn.take()
            && is_all
            && self.attempts == 1
        {
            let before = written_at.saturating_duration_since(self.started).saturating_sub(self.waited);
            self.metrics.overhead.observe(before + answered_at.elapsed());
        }
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}
