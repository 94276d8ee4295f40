//! The account of one request: what it asked for, how far it has come, and how it ended; told once to metrics, spans and
//! the log.
//!
//! How far it has come is its `Phase`, whose variants hold what belongs to them alone. The methods of [`Account`] are the
//! steps from one phase to the next, in the order in which a request takes them.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Response};
use tokio::time::Instant;

use super::{
    failure::Ending,
    makers::Makers,
    paths,
    relay::Watch,
    trace::{ShownId, Summary, Trace},
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

/// Facts of one request. Dropped before its end has been told, it ends because its client has gone.
#[derive(Debug)]
pub struct Account<'r> {
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
    /// The backend that served it last.
    backend: Option<Arc<Backend>>,
    /// How often it was sent to a backend.
    pub attempts: u32,
    /// What it tells as spans.
    pub trace: Trace,
    /// Status that the client got; 0 before it got one.
    pub status: u16,
    /// How long it has waited in queues in all.
    pub queued_for: Duration,
    /// Payload of its body, once that is known.
    pub request_bytes: Option<u64>,
    response_bytes: u64,
    /// Time that it spent waiting for others before it was sent: its client, a slot, a connection.
    waited: Duration,
    phase: Phase<'r>,
}

/// How far a request has come.
#[expect(clippy::large_enum_variant, reason = "nearly every request gets an answer, which should not be allocated")]
#[derive(Debug)]
enum Phase<'r> {
    /// It is read from its client, and has been sent nowhere.
    Reading,
    /// It waits in the queue of its model for a slot.
    Queued,
    /// It was sent to a backend last at this time, and waits for the head of an answer.
    Sent {
        at: Instant,
        /// When it was written to the backend, and when the head of the answer had come.
        turn: Option<(Instant, Instant)>,
    },
    /// An answer passes.
    Answering(Answering<'r>),
    /// Its end has been told.
    Over,
}

/// An answer that passes.
#[derive(Debug)]
struct Answering<'r> {
    /// Its slot on the backend, until all of the answer has come.
    in_flight: Option<InFlight>,
    /// When the request was sent.
    sent_at: Option<Instant>,
    /// When it was written to the backend, and when the head of the answer had come; until the first bytes have passed.
    turn: Option<(Instant, Instant)>,
    tap: Option<UsageTap>,
    /// The answer comes in pieces, as it is made.
    is_streamed: bool,
    /// Remembers which backend made the answer, until its id has been read.
    learner: Option<Learner<'r>>,
    /// When the first token came.
    first_content_at: Option<Instant>,
    /// How many tokens of it the backend's tally knows, and since when it knows all of them.
    tallied: (u64, Option<Instant>),
}

/// Remembers which backend made an answer, once the id of the answer has been read.
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

// === impl Account ===

impl<'r> Account<'r> {
    /// A request that has just arrived.
    pub fn new(
        head: &'r RequestHead,
        request_id: &'r RequestId<'r>,
        client_ip: IpAddr,
        trace: Trace,
        metrics: &'r Metrics,
        access_log: bool,
    ) -> Account<'r> {
        Account {
            started: Instant::now(),
            head,
            route: Route::of(head.path()),
            request_id,
            client_ip,
            metrics,
            access_log,
            model: None,
            backend: None,
            attempts: 0,
            trace,
            status: 0,
            queued_for: Duration::ZERO,
            request_bytes: None,
            response_bytes: 0,
            waited: Duration::ZERO,
            phase: Phase::Reading,
        }
    }

    /// It joins the queue of its model.
    pub fn is_queued(&mut self) {
        self.phase = Phase::Queued;
    }

    /// It has left the queue, after this time. A request whose client left there counts as queued to its end.
    pub fn was_queued(&mut self, time: Duration, has_slot: bool) {
        if has_slot {
            self.phase = Phase::Reading;
        }
        self.queued_for += time;
        self.waited += time;
    }

    /// It has a slot on this backend.
    pub fn served_by(&mut self, in_flight: &InFlight) {
        self.model = Some(in_flight.model().clone());
        self.backend = Some(in_flight.backend().clone());
    }

    /// It is sent to a backend, or once more.
    pub fn is_sent(&mut self, now: Instant) {
        self.attempts += 1;
        self.phase = Phase::Sent { at: now, turn: None };
    }

    /// It has waited for somebody else before it was sent: its client, or a connection.
    pub fn has_waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// The head of an answer has come, to what was first written at `written_at`.
    pub fn has_head(&mut self, written_at: Option<Instant>, now: Instant) {
        if let Phase::Sent { turn, .. } = &mut self.phase {
            *turn = written_at.map(|written_at| (written_at, now));
        }
    }

    /// The answer begins to pass. `kind`: it tells of itself in this form; `learner`: it may be asked for again by its id.
    pub fn is_answered(&mut self, in_flight: InFlight, kind: Option<AnswerKind>, learner: Option<Learner<'r>>) {
        let (sent_at, turn) = match self.phase {
            Phase::Sent { at, turn } => (Some(at), turn),
            _ => (None, None),
        };
        self.phase = Phase::Answering(Answering {
            in_flight: Some(in_flight),
            sent_at,
            turn,
            tap: kind.map(UsageTap::new),
            is_streamed: kind.is_some_and(|kind| kind != AnswerKind::Json),
            learner,
            first_content_at: None,
            tallied: (0, None),
        });
    }

    /// All of the answer has come, or it was cut. Returns the slot on the backend.
    pub fn has_answer(&mut self) -> Option<InFlight> {
        match &mut self.phase {
            Phase::Answering(answering) => answering.in_flight.take(),
            _ => None,
        }
    }

    /// The proxy answers the request itself.
    pub fn answered_by_proxy(&mut self, response: &Response<Bytes>) {
        self.status = response.status().as_u16();
        if self.head.method != Method::HEAD {
            self.response_bytes = response.body().len() as u64;
        }
    }

    /// Its client left. `is_uploading`: before all of the body had come.
    pub fn client_left(&mut self, is_uploading: bool) {
        if is_uploading && !matches!(self.phase, Phase::Queued | Phase::Answering(_) | Phase::Over) {
            self.phase = Phase::Reading;
        }
        self.end(Ending::ClientGone);
    }

    /// Closes the account.
    pub fn end(&mut self, ending: Ending) {
        if matches!(self.phase, Phase::Over) {
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
            let Account { route, status, request_bytes, response_bytes, .. } = *self;
            let ended = Ended { route, status, broken: ending.error(), duration, request_bytes, response_bytes };
            let scheme = http_server::scheme(self.head.lines.first(Known::XForwardedProto));
            http.observe(http_server::method_name(&self.head.method), scheme, &ended);
        }
        let mut usage = None;
        if let Phase::Answering(answering) = &mut self.phase {
            usage = answering.tap.as_ref().map(UsageTap::usage);
            if let Some(usage) = &usage {
                instruments.answer_told(usage);
                if let (Ending::Complete, true, Some(first), Some(tokens)) =
                    (ending, answering.is_streamed, answering.first_content_at, usage.output_tokens)
                {
                    instruments.streamed(tokens, now.saturating_duration_since(first));
                }
                let tokens = usage.output_tokens.unwrap_or(0).max(usage.output_events);
                answering.tally_tokens(self.backend.as_deref(), tokens, now);
            }
        }
        if ending == Ending::ClientGone {
            self.metrics.disconnects.increment(self.phase_word());
        }
        let trace_id = self.trace.id();
        if !matches!(self.trace, Trace::Off) {
            self.end_trace(status, ending, usage);
        }
        self.log(trace_id, status, ending, duration);
        // A slot that it still has is given back with this.
        self.phase = Phase::Over;
    }

    fn log(&self, trace_id: Option<ShownId>, status: u16, ending: Ending, duration: Duration) {
        if self.access_log {
            tracing::info!(
                request_id = self.request_id(), trace_id, client = %self.client_ip, method = %self.head.method, path = self.head.path(),
                status, model = self.model_id(), container = self.container(), attempts = self.attempts,
                bytes = self.response_bytes, seconds = duration.as_secs_f64(), ending = ?ending, "request"
            );
        } else {
            tracing::debug!(
                request_id = self.request_id(), trace_id, client = %self.client_ip, method = %self.head.method, path = self.head.path(),
                status, model = self.model_id(), container = self.container(), attempts = self.attempts,
                bytes = self.response_bytes, seconds = duration.as_secs_f64(), ending = ?ending, "request"
            );
        }
    }

    /// How far it is, as [`crate::telemetry::metrics::DISCONNECT_PHASES`] says it.
    fn phase_word(&self) -> &'static str {
        match self.phase {
            _ if self.status > 0 => "mid_answer",
            Phase::Queued => "queue",
            Phase::Reading => "upload",
            Phase::Sent { .. } | Phase::Answering(_) | Phase::Over => "before_first_byte",
        }
    }

    fn end_trace(&mut self, status: u16, ending: Ending, usage: Option<Usage>) {
        let mut trace = std::mem::take(&mut self.trace);
        trace.end(&Summary {
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

    /// Its id, for logs.
    pub fn request_id(&self) -> &str {
        std::str::from_utf8(self.request_id.as_bytes()).unwrap_or("?")
    }

    /// How long its body is: as it says, else as much as has been `seen`.
    pub fn body_bytes(&self, seen: u64) -> u64 {
        match self.head.framing {
            Framing::Length(length) => length,
            Framing::Empty | Framing::Chunked | Framing::Close => seen,
        }
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

// === impl Answering ===

impl Answering<'_> {
    /// Reads what a stretch of payload tells of the answer. Returns when its first token came, if that is now.
    fn read(&mut self, payload: &[u8], backend: Option<&Backend>) -> Option<Instant> {
        let tap = self.tap.as_mut()?;
        tap.feed(payload);
        let (events, has_content) = (tap.output_events(), tap.has_content());
        if events >= self.tallied.0 + TALLIED_AT_ONCE {
            self.tally_tokens(backend, events, Instant::now());
        }
        if self.first_content_at.is_some() || !has_content {
            return None;
        }
        let now = Instant::now();
        self.first_content_at = Some(now);
        if let (Some(since), Some(backend)) = (self.sent_at, backend) {
            backend.tally.first_token(now.saturating_duration_since(since), now);
            self.tallied.1.get_or_insert(now);
        }
        Some(now)
    }

    /// Tells the backend's tally that these many tokens of the answer have come in all.
    fn tally_tokens(&mut self, backend: Option<&Backend>, count: u64, now: Instant) {
        let (known, since) = self.tallied;
        if let Some(backend) = backend
            && let Some(since) = since.or(self.sent_at)
            && count > known
        {
            backend.tally.tokens(count - known, since, now);
            self.tallied = (count, Some(now));
        }
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
}

impl Watch for Account<'_> {
    fn payload(&mut self, payload: &[u8]) {
        self.response_bytes += payload.len() as u64;
        let Phase::Answering(answering) = &mut self.phase else { return };
        if let Some(in_flight) = &mut answering.in_flight
            && in_flight.awaits_first_byte()
        {
            in_flight.first_byte(Instant::now());
        }
        let first_token_at = answering.read(payload, self.backend.as_deref());
        if answering.learner.is_some() {
            answering.learn(payload);
        }
        if let (Some(at), Some(model)) = (first_token_at, &self.model) {
            let elapsed = at.saturating_duration_since(self.started);
            model.metrics.of(self.route.operation()).time_to_first_token.observe(elapsed);
            self.trace.first_token(elapsed);
        }
    }

    fn passed(&mut self, is_all: bool) {
        let Phase::Answering(answering) = &mut self.phase else { return };
        // Of a request that was sent more than once it cannot be told which part of its time was the proxy's.
        if let Some((written_at, answered_at)) = answering.turn.take()
            && is_all
            && self.attempts == 1
        {
            let before = written_at.saturating_duration_since(self.started).saturating_sub(self.waited);
            self.metrics.overhead.observe(before + answered_at.elapsed());
        }
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}
