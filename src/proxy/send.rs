//! The attempts of one request: it is sent to the backend that was chosen for it, and again while that is safe.
//!
//! [`failure`] says what is to be done when an attempt fails; here it is done.

use std::{
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
    failure::{self, Action, Lesson, Stage, What},
    headers::{self, ToBackend},
    paths,
};
use crate::{
    backend::{Backend, InFlight, Model},
    breaker::Outcome,
    error::ProxyError,
    http1::head::Known,
    replay::Replay,
    tally::Trouble,
    telemetry::metrics::Retry,
    upstream::ConnectError,
};

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
        // An answer that says "busy", kept while somebody else is asked.
        let mut busy: Option<Answer> = None;
        let upgrades = asked.head.method == Method::GET && asked.head.asks_for_websocket();
        let mut awaits_news = !is_the_only_one;
        loop {
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
            let (what, stage) = match leased {
                Err(error) => (What::Connect(error), Stage::Unanswered { reused: false }),
                Ok(lease) => {
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
                        Ok(head) => {
                            let outcome =
                                failure::outcome(head.status, head.lines.first(Known::RetryAfter), SystemTime::now);
                            let now = Instant::now();
                            match outcome {
                                Outcome::Failure => in_flight.failed(Trouble::Status(head.status.as_u16()), now),
                                _ => in_flight.answered(outcome, now),
                            }
                            if head.status.as_u16() < 400 {
                                in_flight.was_served();
                            }
                            exchange.answered(attempt.written_at, now);
                            let mut answer = Answer { head, attempt, in_flight };
                            let is_busy = matches!(outcome, Outcome::PushBack { .. });
                            if !is_busy || is_the_only_one || !replay.can_replay() {
                                return Ok(answer);
                            }
                            // Whoever has a place now is asked; the answer is still good if nobody does any better.
                            tried.push(answer.in_flight.backend().clone());
                            let Some(elsewhere) = self.retry_at_once(&answer, &tried, replay, exchange) else {
                                return Ok(answer);
                            };
                            self.metrics.retried(Retry::Busy);
                            exchange.trace.attempt_pushed_back(answer.head.status.as_u16());
                            // It has done all it will do, and somebody else may have the place.
                            answer.in_flight.leave();
                            busy = Some(answer);
                            in_flight = elsewhere;
                            fresh_only = false;
                            continue;
                        }
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
            exchange.trace.attempt_failed(what.name());
            let give_up = self.failure(what, backend, exchange.attempts);
            let (action, lesson) = failure::judge(what, stage, replay.can_replay());
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
                Action::Elsewhere => {
                    tried.push(in_flight.backend().clone());
                    let model = in_flight.model().clone();
                    let is_unsent = matches!(what, What::Connect(_));
                    awaits_news &= is_unsent;
                    match self.retry(client, in_flight, is_the_only_one, &tried, replay, exchange).await {
                        Ok(elsewhere) => {
                            self.metrics.retried(if is_unsent { Retry::Connect } else { Retry::Ended });
                            in_flight = elsewhere;
                            fresh_only = false;
                        }
                        Err(NoAnswer::Gone) => return Err(NoAnswer::Gone),
                        Err(NoAnswer::Error(_)) if awaits_news && busy.is_none() => {
                            // Once is enough: whoever took their place and is gone as well is no longer old news.
                            awaits_news = false;
                            let claimed = self.claim_on_news(client, &model, &tried, replay, exchange);
                            let Some(elsewhere) = Box::pin(claimed).await? else { return Err(give_up.into()) };
                            self.metrics.retried(Retry::Connect);
                            in_flight = elsewhere;
                            fresh_only = false;
                        }
                        Err(NoAnswer::Error(_)) => return self.give_up(busy, give_up, exchange),
                    }
                }
                Action::BadGateway | Action::GatewayTimeout | Action::Refuse | Action::Cut | Action::Abandon => {
                    return self.give_up(busy, give_up, exchange);
                }
            }
        }
    }

    /// Another attempt of a request that got no answer, elsewhere, if there is anybody else and the limits allow it.
    async fn retry<S: Transport>(
        &self,
        client: &mut Client<S>,
        failed: InFlight,
        is_the_only_one: bool,
        tried: &[Arc<Backend>],
        replay: &Replay,
        exchange: &mut Exchange<'_>,
    ) -> Result<InFlight, NoAnswer> {
        let model = failed.model().clone();
        // Whoever waits for this place may have it.
        drop(failed);
        if is_the_only_one || !self.may_retry(&model, tried) {
            return Err(NoAnswer::Error(ProxyError::NoBackend));
        }
        let wanted = Wanted::any_of(&model.id, tried, replay, exchange);
        let elsewhere = self.claim(client, &wanted, exchange).await?;
        // Last, so that nothing is taken out for an attempt that is not made.
        if model.retries.take_out() { Ok(elsewhere) } else { Err(NoAnswer::Error(ProxyError::NoBackend)) }
    }

    /// Another attempt of a request that was answered with "busy", by somebody who can take it at once.
    fn retry_at_once(
        &self,
        busy: &Answer,
        tried: &[Arc<Backend>],
        replay: &Replay,
        exchange: &mut Exchange<'_>,
    ) -> Option<InFlight> {
        let model = busy.in_flight.model();
        if !self.may_retry(model, tried) {
            return None;
        }
        let wanted = Wanted::any_of(&model.id, tried, replay, exchange).but_for_the_broken();
        let elsewhere = self.claim_at_once(&wanted, exchange)?;
        model.retries.take_out().then_some(elsewhere)
    }

    /// Both the request and its pool have an attempt left.
    fn may_retry(&self, model: &Model, tried: &[Arc<Backend>]) -> bool {
        tried.len() <= self.retries as usize && !model.retries.is_used_up()
    }

    /// What the client gets when nothing more can be tried: "busy", if somebody has answered that, else the error.
    fn give_up(
        &self,
        busy: Option<Answer>,
        error: ProxyError,
        exchange: &mut Exchange<'_>,
    ) -> Result<Answer, NoAnswer> {
        let busy = busy.ok_or(error)?;
        exchange.served_by(&busy.in_flight);
        Ok(busy)
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
}
