//! What both planes mean by a backend: one incarnation of one container that has answered a probe, and the count of
//! requests it is serving.
//!
//! Control opens and closes the gate; requests pass through it. Whether a backend is closed and how many requests it
//! has are one atomic word, so "draining?" and the count cannot race: once [`Backend::close`] has returned, no request can
//! get in, whatever snapshot it holds.

mod gate;

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use self::gate::Gate;
use crate::{
    base::config::Balance,
    pool::{
        breaker::{CircuitBreaker, Outcome, Pass, State, Transition},
        budget::RetryBudget,
        latency::{Awaited, Pace},
        load::ReportedLoad,
        tally::{Ended, Tally, Trouble},
        upstream::Upstream,
        waiting::WaitingRoom,
    },
    telemetry::metrics::{Counter, ModelMetrics},
    wire::http1::own_address::OwnAddress,
};

/// How much of a container's id its host is called by.
const SHORT_ID_CHARS: usize = 12;

/// What is fixed for one incarnation of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSpec {
    /// Identity in its discovery, a container id for Docker.
    pub id: Arc<str>,
    /// Name for people.
    pub name: String,
    /// Image it was made from; empty if that is not known.
    pub image: String,
    /// Where its API is.
    pub addr: SocketAddr,
    /// Prefix of its API, without a trailing slash; `/v1` of the client's path is replaced by it.
    pub base_path: String,
    /// Share of traffic among replicas.
    pub weight: NonZeroU32,
    /// Most requests at a time.
    pub max_inflight: Option<NonZeroU32>,
}

/// A backend: its specification, its connections, its load.
#[derive(Debug)]
pub struct Backend {
    /// What it is.
    pub spec: BackendSpec,
    /// Which incarnation of all in this process it is, from 1 on.
    pub serial: u32,
    /// `Host` header for requests to it.
    pub authority: String,
    /// The names and addresses by which its own answers may refer to it.
    pub own_address: OwnAddress,
    /// Connections to it.
    pub upstream: Upstream,
    /// Its load by its own account.
    pub reported: ReportedLoad,
    /// What attempts have taught about its health.
    pub breaker: CircuitBreaker,
    /// What is told of it to people.
    pub tally: Tally,
    /// How often its breaker has opened.
    pub trips: Counter,
    /// How long it takes to the first byte, and the prompts it has not begun to answer.
    pub latency: Arc<Pace>,
    gate: Gate,
    drained: Notify,
    /// Told when it gets no more requests.
    closed: Notify,
    /// Models whose first waiting request is to be called when a place becomes free here.
    callers: Mutex<Vec<Arc<Model>>>,
    /// There are some.
    has_callers: AtomicBool,
    /// It could not be connected to, and control has not been told yet.
    suspect: AtomicBool,
}

/// A backend in the pool of one model.
#[derive(Debug)]
pub struct Member {
    /// The backend.
    pub backend: Arc<Backend>,
    /// The model.
    pub model: Arc<Model>,
    in_flight: AtomicUsize,
}

/// A model id that the proxy knows, with what outlives its backends.
#[derive(Debug)]
pub struct Model {
    /// The id, exactly as backends announce it.
    pub id: Box<str>,
    /// Its instruments.
    pub metrics: ModelMetrics,
    /// The member whose turn it is in round robin.
    pub turn: AtomicUsize,
    /// Requests that wait for a place.
    pub waiting: WaitingRoom,
    /// Retries that its pool allows.
    pub retries: RetryBudget,
}

/// Why a backend did not take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It gets no new requests.
    Closed,
    /// It serves as many as it may.
    Full,
    /// Its breaker keeps requests away, for now.
    Resting,
}

/// One request that a backend is serving, from before it is sent to the end of its answer. Dropping it is the only
/// release.
#[derive(Debug)]
#[must_use = "dropping it ends the request's claim on the backend"]
pub struct InFlight {
    member: Arc<Member>,
    pass: Pass,
    verdict: Verdict,
    /// The first byte of the answer is waited for, and when it comes is of interest.
    awaited: Option<Awaited>,
    has_left: bool,
}

/// What an attempt has shown of its backend so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Nothing.
    Unknown,
    /// It answers. It can still break off, so the breaker is told when the answer has ended.
    Answers,
    /// The breaker knows; this is for the tally.
    Learnt(Ended),
}

// === impl Backend ===

impl Backend {
    /// A backend that takes requests from `now` on. `workers` is the number of threads that will send to it.
    pub fn new(spec: BackendSpec, connect_timeout: Duration, workers: usize, now: Instant) -> Arc<Backend> {
        let authority = spec.addr.to_string();
        let upstream = Upstream::new(spec.addr, connect_timeout, workers);
        // A container's host is called by the beginning of its id.
        let short_id = spec.id.get(..SHORT_ID_CHARS).unwrap_or(&spec.id);
        let own_address = OwnAddress::new(spec.addr, [spec.name.as_str(), short_id, &spec.id], &spec.base_path);
        static SERIALS: AtomicU32 = AtomicU32::new(1);
        Arc::new(Backend {
            spec,
            serial: SERIALS.fetch_add(1, Ordering::Relaxed),
            authority,
            own_address,
            upstream,
            breaker: CircuitBreaker::new(now),
            tally: Tally::new(now),
            trips: Counter::default(),
            latency: Pace::new(now),
            reported: ReportedLoad::new(now),
            gate: Gate::default(),
            drained: Notify::new(),
            closed: Notify::new(),
            callers: Mutex::default(),
            has_callers: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
        })
    }

    /// No new requests from now on; those in flight go on.
    pub fn close(&self) {
        self.gate.close();
        self.closed.notify_waiters();
        self.upstream.retire();
        if self.gate.count() == 0 {
            self.drained.notify_waiters();
        }
    }

    /// Takes requests again.
    pub fn reopen(&self) {
        self.upstream.reinstate();
        self.gate.open();
    }

    /// Ends every request in flight, for good. The backend must be closed.
    pub fn cut(&self) {
        debug_assert!(self.gate.is_closed(), "a backend must be closed before it is cut");
        self.upstream.cut();
    }

    /// Gets no new requests.
    pub fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Requests in flight, over all its models.
    pub fn in_flight(&self) -> u64 {
        self.gate.count()
    }

    /// As many are in flight as may be.
    pub fn is_full(&self) -> bool {
        self.spec.max_inflight.is_some_and(|limit| self.in_flight() >= u64::from(limit.get()))
    }

    /// Has the first request in the queue of `model` called once, when a slot has become free here. The caller tries to
    /// claim a slot after this and before it waits: either the claim sees the slot, or the call is made.
    pub fn call_when_free(&self, model: &Arc<Model>) {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if !callers.iter().any(|caller| Arc::ptr_eq(caller, model)) {
            callers.push(model.clone());
        }
        self.has_callers.store(true, Ordering::SeqCst);
    }

    fn call_callers(&self) {
        if !self.has_callers.load(Ordering::SeqCst) {
            return;
        }
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_callers.store(false, Ordering::SeqCst);
        let called = std::mem::take(&mut *callers);
        drop(callers);
        for model in called {
            model.waiting.call();
        }
    }

    /// It could not be connected to. True if that is news since [`Backend::take_suspicion`].
    pub fn suspect(&self) -> bool {
        !self.suspect.swap(true, Ordering::AcqRel)
    }

    /// Whether it could not be connected to since the last call.
    pub fn take_suspicion(&self) -> bool {
        self.suspect.swap(false, Ordering::AcqRel)
    }

    /// Resolves once the backend is closed.
    pub async fn closed(&self) {
        until(&self.closed, || self.is_closed()).await;
    }

    /// Resolves once the backend is closed and has no request in flight.
    pub async fn drained(&self) {
        until(&self.drained, || self.is_closed() && self.in_flight() == 0).await;
    }
}

/// Resolves once `is_so`, of which `told` is told.
async fn until(told: &Notify, is_so: impl Fn() -> bool) {
    loop {
        let told = told.notified();
        tokio::pin!(told);
        // Before the look, so that what happens after it is not missed.
        told.as_mut().enable();
        if is_so() {
            return;
        }
        told.await;
    }
}

// === impl Member ===

impl Member {
    /// `backend` as a server of `model`.
    pub fn new(backend: Arc<Backend>, model: Arc<Model>) -> Arc<Member> {
        Arc::new(Member { backend, model, in_flight: AtomicUsize::new(0) })
    }

    /// Requests for this model in flight on this backend.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Claims a place for one request.
    ///
    /// # Errors
    /// The backend is closed or full, or its breaker keeps requests away.
    pub fn try_acquire(self: &Arc<Member>, now: Instant) -> Result<InFlight, Refused> {
        self.enter(now, |breaker| breaker.enter(now).map_err(|_| Refused::Resting))
    }

    /// Claims a slot although the breaker keeps requests away, because no member is better.
    ///
    /// # Errors
    /// The backend is closed or full.
    pub fn acquire_at_rest(self: &Arc<Member>, now: Instant) -> Result<InFlight, Refused> {
        self.enter(now, |breaker| Ok(breaker.force(now)))
    }

    fn enter(
        self: &Arc<Member>,
        now: Instant,
        ask: impl FnOnce(&CircuitBreaker) -> Result<Pass, Refused>,
    ) -> Result<InFlight, Refused> {
        // The breaker first: a place that is claimed and given up again would look like one that becomes free.
        let pass = ask(&self.backend.breaker)?;
        if let Err(refused) = self.backend.gate.enter(self.backend.spec.max_inflight) {
            self.backend.breaker.learn(pass, Outcome::Abandoned, now);
            return Err(refused);
        }
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(InFlight { member: self.clone(), pass, verdict: Verdict::Unknown, awaited: None, has_left: false })
    }
}

impl Model {
    /// A model that has just been seen for the first time.
    pub fn new(id: &str) -> Arc<Model> {
        Arc::new(Model {
            id: id.into(),
            metrics: ModelMetrics::default(),
            turn: AtomicUsize::new(0),
            waiting: WaitingRoom::default(),
            retries: RetryBudget::default(),
        })
    }
}

// === impl InFlight ===

impl InFlight {
    /// The backend that serves the request.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.member.backend
    }

    /// The backend as the server of that model.
    pub fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// The model it serves.
    pub fn model(&self) -> &Arc<Model> {
        &self.member.model
    }

    /// The request, with a prompt of so many bytes, is about to be sent. How long its first byte takes is measured if
    /// `policy` wants to know.
    pub fn expects(mut self, policy: Balance, prompt_bytes: u64, now: Instant) -> InFlight {
        let backend = &self.member.backend;
        self.awaited = match policy {
            Balance::Ewma | Balance::Prefix => Some(backend.latency.sent(prompt_bytes, backend.in_flight(), now)),
            Balance::Least | Balance::RoundRobin => None,
        };
        self
    }

    /// When the first byte comes is of interest.
    pub fn awaits_first_byte(&self) -> bool {
        self.awaited.is_some()
    }

    /// The first byte of the answer's body has come.
    pub fn first_byte(&mut self, now: Instant) {
        if let Some(awaited) = self.awaited.take() {
            awaited.answered(now);
        }
    }

    /// When the first byte comes says nothing of the backend: the answer is an error, or has no body.
    pub fn says_nothing_of_pace(&mut self) {
        self.awaited = None;
    }

    /// The attempt failed, in this way.
    pub fn failed(&mut self, trouble: Trouble, now: Instant) {
        self.member.backend.tally.troubled(trouble, now);
        if let Some(awaited) = self.awaited.take() {
            awaited.failed(now);
        }
        // An error whose body breaks off is one failure.
        if !matches!(self.verdict, Verdict::Learnt(_)) {
            self.learn(Outcome::Failure, now);
        }
    }

    /// The head of an answer has come, and shows this of the backend. If it shows a failure, [`InFlight::failed`] is to be
    /// called instead.
    pub fn answered(&mut self, outcome: Outcome, now: Instant) {
        let breaker = &self.member.backend.breaker;
        // A half-open breaker is closed by this: others need not wait for the end of an answer that takes minutes.
        if outcome == Outcome::Success && breaker.state() == State::Closed {
            self.verdict = Verdict::Answers;
        } else {
            self.learn(outcome, now);
        }
    }

    /// It was answered as it asked: whatever the backend has pushed back before, it takes requests.
    pub fn was_served(&self) {
        self.member.backend.breaker.has_served();
    }

    /// Gives the place back now: the backend has done all it will do for the request, though its answer is still to be
    /// passed on.
    pub fn leave(&mut self) {
        if std::mem::replace(&mut self.has_left, true) {
            return;
        }
        // Its prompt is not waited for, either.
        self.awaited = None;
        let backend = &self.member.backend;
        let was_last = backend.gate.leave();
        // After the gate, so that a reader which sees that there is none may rely on it.
        self.member.in_flight.fetch_sub(1, Ordering::Release);
        if was_last {
            backend.drained.notify_waiters();
        }
        backend.call_callers();
    }

    fn learn(&mut self, outcome: Outcome, now: Instant) {
        self.verdict = Verdict::Learnt(match outcome {
            Outcome::Success => Ended::Served,
            Outcome::Failure => Ended::Failed,
            Outcome::PushBack { .. } => Ended::TurnedAway,
            Outcome::Abandoned => Ended::Abandoned,
        });
        let backend = &*self.member.backend;
        let Backend { breaker, latency, spec, tally, trips, .. } = backend;
        match breaker.learn(self.pass, outcome, now) {
            Some(Transition { to: State::Closed, .. }) => {
                tally.turned(false, now);
                // What was measured before it failed says nothing about now.
                latency.forget();
                tracing::info!(container = %spec.name, "{} answers again; its circuit breaker is closed", spec.name);
                // There is room for more than the one whose place becomes free when this one leaves.
                backend.call_callers();
            }
            // A trial that is handed back opens nothing.
            Some(Transition { from, to: State::Open }) if outcome == Outcome::Failure => {
                trips.increment();
                // A trial that fails is no news.
                if from == State::Closed {
                    tally.turned(true, now);
                }
                let rest = breaker.ready_in(now);
                tracing::warn!(container = %spec.name, ?rest, "{} keeps failing; its circuit breaker is open", spec.name);
            }
            Some(_) | None => {}
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        match self.verdict {
            // The client left: nothing is known, and if this was a trial, another request makes it.
            Verdict::Unknown => {
                let now = Instant::now();
                if let Some(awaited) = self.awaited.take() {
                    awaited.abandoned(now);
                }
                self.learn(Outcome::Abandoned, now);
            }
            Verdict::Answers => self.learn(Outcome::Success, Instant::now()),
            Verdict::Learnt(_) => {}
        }
        if let Verdict::Learnt(ended) = self.verdict {
            self.member.backend.tally.ended(ended);
        }
        self.leave();
    }
}

#[cfg(test)]
pub(crate) mod tests;
