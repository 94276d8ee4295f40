//! The account of one request: what it was, how it ended, told once to metrics and log.

use std::{net::IpAddr, sync::Arc};

use tokio::time::Instant;

use super::{makers::Makers, relay::Watch};
use crate::{
    backend::{Backend, Member, Model},
    http1::head::{Known, RequestHead},
    scan::{AnswerKind, UsageTap},
    telemetry::metrics::{Metrics, ModelMetrics},
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
    request_id: &'r RequestId<'r>,
    client_ip: IpAddr,
    metrics: &'r Metrics,
    access_log: bool,
    /// The model, once it is known to exist.
    pub model: Option<Arc<Model>>,
    /// Who served it last.
    pub backend: Option<Arc<Backend>>,
    /// How often it was sent to a backend.
    pub attempts: u32,
    /// Status that the client got; 0 before it got one.
    pub status: u16,
    response_bytes: u64,
    tap: Option<UsageTap>,
    /// To be told the id of the answer.
    learner: Option<Learner<'r>>,
    /// The first token has come.
    has_content: bool,
    ended: bool,
}

/// Who wants to know the id of an answer, and of whose.
#[derive(Debug)]
pub struct Learner<'r> {
    /// Where it is remembered.
    pub makers: &'r Makers,
    /// Who made the answer.
    pub member: Arc<Member>,
}

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
            request_id,
            client_ip,
            metrics,
            access_log,
            model: None,
            backend: None,
            attempts: 0,
            status: 0,
            response_bytes: 0,
            tap: None,
            learner: None,
            has_content: false,
            ended: false,
        }
    }

    /// An answer is about to pass that tells of itself.
    pub fn listen_to(&mut self, kind: AnswerKind, learner: Option<Learner<'r>>) {
        self.tap = Some(UsageTap::new(kind));
        self.learner = learner;
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
        let duration = self.started.elapsed();
        let instruments: &ModelMetrics = self.model.as_ref().map_or(&self.metrics.unknown, |model| &model.metrics);
        instruments.request_done(status, duration);
        if let Some(tap) = &self.tap {
            instruments.answer_told(&tap.usage());
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

    fn model_id(&self) -> Option<&str> {
        self.model.as_ref().map(|model| &*model.id)
    }

    fn container(&self) -> Option<&str> {
        self.backend.as_ref().map(|backend| backend.spec.name.as_str())
    }
}

impl Watch for Exchange<'_> {
    fn payload(&mut self, payload: &[u8]) {
        self.response_bytes += payload.len() as u64;
        let Some(tap) = &mut self.tap else { return };
        tap.feed(payload);
        if !self.has_content && tap.has_content() {
            self.has_content = true;
            if let Some(model) = &self.model {
                model.metrics.time_to_first_token.observe(self.started.elapsed());
            }
        }
        if self.learner.is_some()
            && let Some(id) = tap.answer_id()
            && let Some(Learner { makers, member }) = self.learner.take()
        {
            makers.learn(id, &member);
        }
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}
