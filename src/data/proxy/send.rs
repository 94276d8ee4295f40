//! The attempts of one request: it is sent to the replica that was chosen for it, and again while that is safe.
//!
//! [`failure::judge`] says what happens next when an attempt fails; here it is carried out.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{
    answer::Answer,
    attempt::Stop,
    call::{Call, NoAnswer, body_error},
    claim::{Eligible, Slot},
    client::Transport,
    failure::{self, Failure, Left, Lesson, Next, Stage, judge},
};
use crate::{
    base::error::ProxyError,
    pool::{
        backend::{Backend, InFlight, Model},
        breaker::Outcome,
        tally::Trouble,
    },
    telemetry::kinds::Retry,
    wire::http1::head::{Known, ResponseHead},
};

/// How often a thread logs that the proxy has no descriptor, port or memory left.
const SHORTAGE_LOGGED_EVERY: Duration = Duration::from_secs(10);

/// What a request has tried so far, and what it may still do.
struct Attempts {
    /// The backends that failed or declined, each once.
    tried: Vec<Arc<Backend>>,
    /// No other backend could serve the request.
    is_the_only_one: bool,
    /// The next attempt takes a fresh connection, because a reused one had died.
    fresh_only: bool,
    can_relieve: bool,
    may_await_news: bool,
    /// An answer that says no, kept while another replica is asked for a better one.
    held: Option<Answer>,
}

/// What follows an attempt.
#[expect(clippy::large_enum_variant, reason = "nearly all of them are answers, which should not be allocated")]
enum Step {
    /// Another one, with this slot.
    Again(InFlight),
    /// Nothing: this is the answer that the client gets.
    Done(Answer),
}

impl<S: Transport> Call<'_, S> {
    /// Sends the request, again while that is safe, until there is an answer for the client.
    pub(super) async fn send(&mut self, slot: Slot) -> Result<Answer, NoAnswer> {
        let Slot { mut in_flight, is_the_only_one } = slot;
        let mut attempts = Attempts::new(is_the_only_one);
        loop {
            let step = match self.attempt(&in_flight, attempts.fresh_only).await {
                Ok((head, attempt)) => self.answered(Answer { head, attempt, in_flight }, &mut attempts),
                Err(stop) => self.failed(stop, in_flight, &mut attempts).await?,
            };
            match step {
                Step::Again(next) => in_flight = next,
                Step::Done(answer) => return Ok(answer),
            }
        }
    }

    /// Takes an answer, or asks another replica for a better one if this one says no.
    fn answered(&mut self, mut answer: Answer, attempts: &mut Attempts) -> Step {
        let (status, stage) = (answer.head.status, answer.attempt.stage());
        let outcome = learn(&answer.head, &mut answer.in_flight);
        self.account.has_head(answer.attempt.written_at, Instant::now());
        if !failure::is_declined(status) {
            return Step::Done(answer);
        }
        let left = self.left(attempts, answer.in_flight.model());
        if judge(Failure::Declined, stage, left).0 != Next::ElsewhereAtOnce {
            return Step::Done(answer);
        }
        attempts.tried.push(answer.in_flight.backend().clone());
        let model = answer.in_flight.model().clone();
        let Some(elsewhere) = self.claim_elsewhere_at_once(&model, attempts) else { return Step::Done(answer) };
        let is_busy = matches!(outcome, Outcome::PushBack { .. });
        self.proxy.metrics.retries.increment(if is_busy { Retry::Busy } else { Retry::Error });
        self.account.trace.attempt_pushed_back(status.as_u16());
        // The backend has done all it will do, and another request may have the slot.
        answer.in_flight.leave();
        attempts.held = Some(answer);
        attempts.fresh_only = false;
        Step::Again(elsewhere)
    }

    /// Carries out what follows from an attempt that brought no answer.
    async fn failed(&mut self, stop: Stop, mut in_flight: InFlight, attempts: &mut Attempts) -> Result<Step, NoAnswer> {
        let (failure, stage, refusal) = self.told(stop);
        let backend = in_flight.backend().clone();
        let model = in_flight.model().clone();
        let (next, lesson) = judge(failure, stage, self.left(attempts, &model));
        if !matches!(next, Next::Abandon | Next::Refuse) {
            self.log(failure, stage, &backend);
        }
        if lesson == Lesson::Failure
            && let Some(trouble) = failure.trouble(stage)
        {
            in_flight.failed(trouble, Instant::now());
        }
        if matches!(failure, Failure::Refused | Failure::Unreachable) {
            self.proxy.table.report_suspect(&backend);
        }
        let elsewhere = match next {
            Next::Abandon => return Err(NoAnswer::Gone),
            Next::Refuse => return Err(refusal.unwrap_or(ProxyError::NoBackend).into()),
            Next::SendAgain => {
                self.proxy.metrics.retries.increment(Retry::StaleConnection);
                attempts.fresh_only = true;
                return Ok(Step::Again(in_flight));
            }
            Next::Relieve => {
                attempts.can_relieve = false;
                self.close_idle_connections();
                return Ok(Step::Again(in_flight));
            }
            Next::Elsewhere | Next::AwaitNews => {
                // A connection that had died while it was idle says nothing: the request is sent again before it gets here.
                attempts.may_await_news &= failure.is_of_connecting();
                attempts.tried.push(backend.clone());
                // Released before another slot is asked for, because a queued request may be waiting for it.
                drop(in_flight);
                self.claim_elsewhere(next, &model, attempts).await?
            }
            Next::ElsewhereAtOnce | Next::Pass | Next::Fail | Next::Cut => None,
        };
        if let Some(elsewhere) = elsewhere {
            self.proxy.metrics.retries.increment(failure.retry());
            attempts.fresh_only = false;
            return Ok(Step::Again(elsewhere));
        }
        let Some(held) = attempts.held.take() else {
            let (name, limit) = (&*backend.spec.name, self.proxy.head_limit());
            return Err(failure.error(stage, name, self.account.attempts, limit).into());
        };
        self.account.served_by(&held.in_flight);
        Ok(Step::Done(held))
    }

    /// What failed, how far the answer had come, and the error for the client where its own request is to blame.
    fn told(&self, stop: Stop) -> (Failure, Stage, Option<ProxyError>) {
        let unanswered = Stage::Unanswered { reused: false };
        match stop {
            Stop::Failed(failure, stage) => (failure, stage, None),
            Stop::Gone => (Failure::ClientGone, unanswered, None),
            Stop::Fault(fault) => (Failure::ClientBroke, unanswered, Some(body_error(self.proxy, fault))),
            Stop::TooSlow => {
                let error = ProxyError::RequestTimeout { what: "the body of the request" };
                (Failure::ClientBroke, unanswered, Some(error))
            }
            Stop::Refused(error) => (Failure::ClientBroke, unanswered, Some(error)),
        }
    }

    /// What the request may still do.
    fn left(&self, attempts: &Attempts, model: &Model) -> Left {
        Left {
            can_replay: self.replay.can_replay(),
            can_relieve: attempts.can_relieve,
            // Both the request and its pool must have an attempt left.
            may_go_elsewhere: !attempts.is_the_only_one
                && attempts.tried.len() < self.proxy.retries as usize
                && !model.retries.is_used_up(),
            may_await_news: attempts.may_await_news && attempts.held.is_none(),
        }
    }

    /// A slot on another replica: `next` says whether the request may wait for one there, or only on news that all that
    /// were tried are being stopped.
    async fn claim_elsewhere(
        &mut self,
        next: Next,
        model: &Arc<Model>,
        attempts: &mut Attempts,
    ) -> Result<Option<InFlight>, NoAnswer> {
        if next == Next::Elsewhere {
            let claimed = match attempts.held {
                // The client can be answered already, so nothing is waited for.
                Some(_) => return Ok(self.claim_elsewhere_at_once(model, attempts)),
                None => self.claim(&Eligible::any_of(&model.id, &attempts.tried)).await,
            };
            match claimed {
                // Last, so that nothing is taken out for an attempt that is not made.
                Ok(in_flight) if model.retries.take_out() => return Ok(Some(in_flight)),
                Err(NoAnswer::Gone) => return Err(NoAnswer::Gone),
                Ok(_) | Err(NoAnswer::Error(_)) => {}
            }
        }
        // Once is enough: if the one in their place is gone as well, that is no longer old news.
        match std::mem::take(&mut attempts.may_await_news) {
            true => Box::pin(self.claim_on_news(model, &attempts.tried)).await,
            false => Ok(None),
        }
    }

    /// A slot on another replica that has one at once.
    fn claim_elsewhere_at_once(&mut self, model: &Model, attempts: &Attempts) -> Option<InFlight> {
        let eligible = Eligible::any_of(&model.id, &attempts.tried).but_for_the_broken();
        self.claim_at_once(&eligible).filter(|_| model.retries.take_out())
    }

    /// Closes all connections to backends that carry no request, because there is nothing left to open another one with.
    fn close_idle_connections(&self) {
        for backend in self.proxy.table.snapshot().backends() {
            backend.upstream.give_up_idle();
        }
    }

    /// Logs that an attempt has failed.
    fn log(&mut self, failure: Failure, stage: Stage, backend: &Backend) {
        self.account.trace.attempt_failed(failure.word());
        let (request_id, trace_id) = (self.account.request_id(), self.account.trace.id());
        let container = &*backend.spec.name;
        match failure {
            Failure::InvalidAnswer(why) => {
                tracing::warn!(request_id, trace_id, "{container} sent something that is no HTTP answer: {why}");
            }
            Failure::Shortage if is_time_to_log_a_shortage() => {
                tracing::warn!(request_id, trace_id, container, "{}", ProxyError::Shortage);
            }
            _ => {}
        }
        let attempt = self.account.attempts;
        tracing::debug!(request_id, trace_id, container, ?failure, ?stage, attempt, "attempt failed");
    }
}

// === impl Attempts ===

impl Attempts {
    fn new(is_the_only_one: bool) -> Attempts {
        Attempts {
            tried: Vec::new(),
            is_the_only_one,
            fresh_only: false,
            can_relieve: true,
            may_await_news: !is_the_only_one,
            held: None,
        }
    }
}

/// Tells the backend's record what the head of an answer shows.
fn learn(head: &ResponseHead, in_flight: &mut InFlight) -> Outcome {
    let outcome = failure::outcome(head.status, head.lines.first(Known::RetryAfter), SystemTime::now);
    let now = Instant::now();
    match outcome {
        Outcome::Failure => in_flight.failed(Trouble::Status(head.status.as_u16()), now),
        _ => in_flight.answered(outcome, now),
    }
    if head.status.as_u16() < 400 {
        in_flight.was_served();
    }
    outcome
}

/// Whether this thread has not logged for a while that the proxy has something too little of.
fn is_time_to_log_a_shortage() -> bool {
    thread_local! {
        static LOGGED: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    let now = Instant::now();
    let is_time = LOGGED.get().is_none_or(|logged| now.saturating_duration_since(logged) >= SHORTAGE_LOGGED_EVERY);
    if is_time {
        LOGGED.set(Some(now));
    }
    is_time
}
