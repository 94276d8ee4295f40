//! The attempts of one request: it is sent to the backend that was chosen for it, and again while that is safe.
//!
//! [`failure`] says what is to be done when an attempt fails; here it is done.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::Method;
use tokio::time::Instant;

use super::{
    Answer, Asked, NoAnswer, Proxy,
    attempt::{Attempt, Stop},
    claim::{Place, Wanted},
    client::{Client, Transport},
    exchange::Exchange,
    failure::{self, Action, Left, Lesson, Stage, What},
    headers::{self, ToBackend},
    paths,
};
use crate::{
    base::error::ProxyError,
    data::replay::Replay,
    pool::{
        backend::{Backend, InFlight, Model},
        breaker::Outcome,
        tally::Trouble,
        upstream::ConnectError,
    },
    telemetry::metrics::Retry,
    wire::http1::head::{Known, ResponseHead},
};

/// How often a thread says that the proxy falls short.
const SHORTAGE_TOLD_EVERY: Duration = Duration::from_secs(10);

/// What became of one attempt: the head of an answer, or what went wrong and when.
type Attempted = Result<(ResponseHead, Attempt), (What, Stage)>;

impl Proxy {
    /// Sends the request, trying again while that is safe.
    pub(super) async fn send<S: Transport>(
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
        let mut can_relieve = true;
        // An answer that another backend may better, kept while that one is asked.
        let mut held: Option<Answer> = None;
        let mut awaits_news = !is_the_only_one;
        loop {
            let attempted = self.attempt(client, asked, below_v1, replay, exchange, &in_flight, fresh_only).await?;
            let left = Left { can_replay: replay.can_replay(), can_relieve };
            let (what, stage) = match attempted {
                Ok((head, attempt)) => {
                    let (status, stage) = (head.status, attempt.stage());
                    let outcome = learn(&head, &mut in_flight);
                    exchange.answered(attempt.written_at, Instant::now());
                    let mut answer = Answer { head, attempt, in_flight };
                    let may_be_bettered = failure::is_declined(status)
                        && !is_the_only_one
                        && failure::judge(What::Declined, stage, left).0 == Action::ElsewhereAtOnce;
                    if !may_be_bettered {
                        return Ok(answer);
                    }
                    tried.push(answer.in_flight.backend().clone());
                    let model = answer.in_flight.model().clone();
                    let Ok(elsewhere) = self.retry(client, &model, &tried, true, replay, exchange).await else {
                        // It is the client's, if it is still there.
                        return Ok(answer);
                    };
                    let is_busy = matches!(outcome, Outcome::PushBack { .. });
                    self.metrics.retried(if is_busy { Retry::Busy } else { Retry::Error });
                    exchange.trace.attempt_pushed_back(status.as_u16());
                    // It has done all it will do, and another request may have the place.
                    answer.in_flight.leave();
                    held = Some(answer);
                    in_flight = elsewhere;
                    fresh_only = false;
                    continue;
                }
                Err(failed) => failed,
            };
            self.tell(what, stage, in_flight.backend(), exchange);
            let give_up = self.failure(what, stage, in_flight.backend(), exchange.attempts);
            let (action, lesson) = failure::judge(what, stage, left);
            if lesson == Lesson::Failure
                && let Some(trouble) = failure::trouble(what)
            {
                in_flight.failed(trouble, Instant::now());
            }
            if matches!(what, What::Connect(ConnectError::Refused | ConnectError::Unreachable)) {
                self.table.report_suspect(in_flight.backend());
            }
            match action {
                Action::SendAgain => {
                    self.metrics.retried(Retry::StaleConnection);
                    fresh_only = true;
                }
                Action::Relieve => {
                    can_relieve = false;
                    self.give_up_idle();
                }
                Action::Elsewhere => {
                    tried.push(in_flight.backend().clone());
                    let model = in_flight.model().clone();
                    awaits_news &= matches!(what, What::Connect(_));
                    // A request that waits for this place may have it.
                    drop(in_flight);
                    let elsewhere = match is_the_only_one {
                        true => Err(NoAnswer::Error(ProxyError::NoBackend)),
                        false => self.retry(client, &model, &tried, held.is_some(), replay, exchange).await,
                    };
                    in_flight = match elsewhere {
                        Ok(elsewhere) => {
                            self.metrics.retried(failure::retry(what));
                            elsewhere
                        }
                        Err(NoAnswer::Gone) => return Err(NoAnswer::Gone),
                        Err(NoAnswer::Error(_)) if awaits_news && held.is_none() => {
                            // Once is enough: if the one in their place is gone as well, that is no longer old news.
                            awaits_news = false;
                            let claimed = self.claim_on_news(client, &model, &tried, replay, exchange);
                            let Some(elsewhere) = Box::pin(claimed).await? else { return Err(give_up.into()) };
                            self.metrics.retried(Retry::Connect);
                            elsewhere
                        }
                        Err(NoAnswer::Error(_)) => return self.give_up(held, give_up, exchange),
                    };
                    fresh_only = false;
                }
                Action::ElsewhereAtOnce | Action::Pass | Action::Shortage | Action::BadGateway => {
                    return self.give_up(held, give_up, exchange);
                }
                Action::GatewayTimeout | Action::Refuse | Action::Cut | Action::Abandon => {
                    return self.give_up(held, give_up, exchange);
                }
            }
        }
    }

    /// Sends the request once, to the backend where it has a place, and waits for the head of an answer.
    #[expect(clippy::too_many_arguments, reason = "all that one request is made of")]
    async fn attempt<S: Transport>(
        &self,
        client: &mut Client<S>,
        asked: &Asked<'_>,
        below_v1: bool,
        replay: &mut Replay,
        exchange: &mut Exchange<'_>,
        in_flight: &InFlight,
        fresh_only: bool,
    ) -> Result<Attempted, NoAnswer> {
        let now = Instant::now();
        exchange.sent(now);
        let backend = in_flight.backend();
        if below_v1 && !paths::may_be_below(&backend.spec.base_path, asked.head.path()) {
            let message = "no such path here: inference.api.base_path of the model's container is no version, \
                           such as /v1, and behind it only paths of known APIs are forwarded";
            return Err(ProxyError::NoSuchPath { message: message.to_owned() }.into());
        }
        exchange.trace.attempt_begins(asked.head, backend, in_flight.model());
        let idle = if fresh_only { None } else { backend.upstream.lease_idle(now) };
        let leased = match idle {
            Some(lease) => {
                self.metrics.upstream_reused.increment();
                Ok(lease)
            }
            None => {
                let began = Instant::now();
                let leased = client.unless_gone(backend.upstream.lease_fresh()).await?;
                exchange.has_waited(began.elapsed());
                if leased.is_ok() {
                    self.metrics.upstream_opened.increment();
                }
                leased
            }
        };
        let lease = match leased {
            Ok(lease) => lease,
            Err(error) => return Ok(Err((What::Connect(error), Stage::Unanswered { reused: false }))),
        };
        let upgrades = asked.head.method == Method::GET && asked.head.asks_for_websocket();
        let mut sent = Vec::with_capacity(1024);
        let to = ToBackend {
            base_path: Some(&*backend.spec.base_path).filter(|path| below_v1 && *path != "/v1"),
            authority: &backend.authority,
            client_ip: asked.client_ip,
            request_id: asked.id.as_bytes(),
            trace: exchange.trace.headers(),
            upgrades,
        };
        headers::push_request(&mut sent, asked.head, &to);
        let mut attempt = Attempt::new(lease, sent);
        let limit = self.head_limit().map(|(limit, _)| limit);
        match attempt.answer(client, replay, asked.head, upgrades, limit, &backend.own_address).await {
            Ok(head) => Ok(Ok((head, attempt))),
            Err(Stop::Failed(what, stage)) => Ok(Err((what, stage))),
            Err(Stop::Gone) => Err(NoAnswer::Gone),
            Err(Stop::Fault(fault)) => Err(self.body_error(fault).into()),
            Err(Stop::TooSlow) => Err(ProxyError::RequestTimeout { what: "the body of the request" }.into()),
        }
    }

    /// Another attempt elsewhere, if there is another backend and the limits allow it. `has_answer`: the client can be
    /// answered already, so nothing is waited for.
    async fn retry<S: Transport>(
        &self,
        client: &mut Client<S>,
        model: &Arc<Model>,
        tried: &[Arc<Backend>],
        has_answer: bool,
        replay: &Replay,
        exchange: &mut Exchange<'_>,
    ) -> Result<InFlight, NoAnswer> {
        let nobody = || NoAnswer::Error(ProxyError::NoBackend);
        // Both the request and its pool have an attempt left.
        if tried.len() > self.retries as usize || model.retries.is_used_up() {
            return Err(nobody());
        }
        let wanted = Wanted::any_of(&model.id, tried, replay, exchange);
        let elsewhere = match has_answer {
            true => self.claim_at_once(&wanted.but_for_the_broken(), exchange).ok_or_else(nobody)?,
            false => self.claim(client, &wanted, exchange).await?,
        };
        // Last, so that nothing is taken out for an attempt that is not made.
        if model.retries.take_out() { Ok(elsewhere) } else { Err(nobody()) }
    }

    /// What the client gets when nothing more can be tried: the last answer, if there is one, else the error.
    fn give_up(
        &self,
        held: Option<Answer>,
        error: ProxyError,
        exchange: &mut Exchange<'_>,
    ) -> Result<Answer, NoAnswer> {
        let held = held.ok_or(error)?;
        exchange.served_by(&held.in_flight);
        Ok(held)
    }

    /// Closes all connections to backends that carry no request, because there is nothing left to open another one with.
    fn give_up_idle(&self) {
        for backend in self.table.snapshot().backends() {
            backend.upstream.give_up_idle();
        }
    }

    /// The shorter of the limits that run until the head of an answer.
    fn head_limit(&self) -> Option<(Duration, &'static str)> {
        let first = self.first_byte_timeout.map(|limit| (limit, "PROXY_FIRST_BYTE_TIMEOUT"));
        let idle = self.idle_timeout.map(|limit| (limit, "PROXY_IDLE_TIMEOUT"));
        first.into_iter().chain(idle).min_by_key(|(limit, _)| *limit)
    }

    /// Says that an attempt has failed.
    fn tell(&self, what: What, stage: Stage, backend: &Backend, exchange: &mut Exchange<'_>) {
        exchange.trace.attempt_failed(what.name());
        let (request_id, container) = (exchange.request_id(), &*backend.spec.name);
        match what {
            What::Nonsense(why) => {
                tracing::warn!(request_id, "{container} sent something that is no HTTP answer: {why}");
            }
            What::Connect(ConnectError::Shortage) if is_time_to_tell_of_shortage() => {
                tracing::warn!(request_id, container, "{}", ProxyError::Shortage);
            }
            _ => {}
        }
        tracing::debug!(request_id, container, ?what, ?stage, attempt = exchange.attempts, "attempt failed");
    }

    /// What the client is told when nothing more can be tried.
    fn failure(&self, what: What, stage: Stage, backend: &Backend, attempts: u32) -> ProxyError {
        let name = backend.spec.name.clone();
        let what = match (what, self.head_limit()) {
            (What::TimedOut, Some((limit, knob))) => {
                return ProxyError::BackendTimeout { backend: name, limit, knob };
            }
            (What::Nonsense(why), _) => return ProxyError::BadAnswer { backend: name, why, attempts },
            (What::Connect(ConnectError::Shortage), _) => return ProxyError::Shortage,
            (What::Connect(error), _) => error.what(),
            (What::Ended, _) if stage == Stage::Begun => "closed the connection within the head of its answer",
            (What::Ended | What::TimedOut | What::Declined | What::ClientGone | What::ClientFault, _) => {
                "closed the connection before it answered"
            }
        };
        ProxyError::Backend { backend: name, what, attempts }
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

/// Whether this thread has not said for a while that the proxy falls short.
fn is_time_to_tell_of_shortage() -> bool {
    thread_local! {
        static TOLD: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    let now = Instant::now();
    let is_time = TOLD.get().is_none_or(|told| now.saturating_duration_since(told) >= SHORTAGE_TOLD_EVERY);
    if is_time {
        TOLD.set(Some(now));
    }
    is_time
}
