//! A place on a backend for one request: whose, and what if there is none at the moment.
//!
//! A place is claimed on the member that the policy picks. If every replica is full, or none is
//! ready but one is starting, the request waits in the line of its model ([`crate::pool::waiting`]), for a bounded time
//! and behind a bounded number of others, until it is called: by whoever gives a place back, by control when it has
//! published another table, or by the clock when a replica has rested.

use std::{borrow::Cow, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout, timeout_at};

use super::{
    NoAnswer, Proxy, bounded,
    client::{Client, Transport},
    exchange::Exchange,
    makers::Maker,
    paths,
};
use crate::{
    base::{config::Config, error::ProxyError},
    data::{
        balance::{self, NoPlace},
        replay::Replay,
    },
    pool::{
        backend::{Backend, InFlight, Member, Model},
        table::Lookup,
        waiting::Whom,
    },
    wire::scan::Prompt,
};

/// How long ahead of Docker's word a container's port may be closed.
const NEWS_TIME: Duration = Duration::from_millis(250);
/// Shortest nap of a request that waits for a rested replica.
const NAP_MIN: Duration = Duration::from_millis(1);

/// Where a request is served.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) in_flight: InFlight,
    /// Nobody else could serve it.
    pub(super) is_the_only_one: bool,
}

/// How requests wait: `PROXY_QUEUE_MAX` and `PROXY_QUEUE_TIMEOUT`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    max: usize,
    timeout: Duration,
}

/// Who can serve a request.
#[derive(Debug, Clone)]
pub(super) enum Wanted<'r> {
    /// Any member of this model's pool, but for those that have been tried.
    AnyOf {
        model: &'r str,
        tried: &'r [Arc<Backend>],
        prompt_bytes: u64,
        prompt: Option<&'r Prompt>,
        /// There is an answer already, which none that is known to be broken would better.
        spares_the_broken: bool,
    },
    /// This one alone.
    Only(Arc<Member>),
}

/// An answer that has passed here.
#[derive(Debug)]
pub(super) struct Made<'p> {
    maker: Maker,
    id: Cow<'p, str>,
}

impl Made<'_> {
    fn gone(&self) -> ProxyError {
        ProxyError::AnswerGone { id: bounded(&self.id) }
    }
}

/// Why there is no place now.
#[derive(Debug)]
enum Delay {
    /// There will be none soon.
    No(ProxyError),
    /// There may be one soon.
    Wait {
        model: Arc<Model>,
        /// A replica whose breaker keeps requests away may be tried by then.
        rest: Option<Duration>,
        /// What the client is told if it cannot wait any longer.
        otherwise: ProxyError,
    },
}

impl<'r> Wanted<'r> {
    /// Any member of the pool of `model` whose backend is not in `tried`, for this request.
    pub(super) fn any_of(
        model: &'r str,
        tried: &'r [Arc<Backend>],
        replay: &'r Replay,
        exchange: &Exchange<'_>,
    ) -> Wanted<'r> {
        let prompt_bytes = exchange.body_bytes(replay.seen_bytes());
        Wanted::AnyOf { model, tried, prompt_bytes, prompt: replay.prompt(), spares_the_broken: false }
    }

    /// The same, but for those whose breakers keep requests away.
    pub(super) fn but_for_the_broken(mut self) -> Wanted<'r> {
        if let Wanted::AnyOf { spares_the_broken, .. } = &mut self {
            *spares_the_broken = true;
        }
        self
    }

    fn whom(&self) -> Whom {
        match self {
            Wanted::Only(member) => Whom::Only(member.backend.serial),
            Wanted::AnyOf { tried, .. } => tried.last().map_or(Whom::Anybody, |last| Whom::AnybodyBut(last.serial)),
        }
    }
}

impl Queue {
    pub(super) fn new(config: &Config) -> Queue {
        // Either knob turns waiting off.
        let max = if config.queue_timeout.is_zero() { 0 } else { config.queue_max };
        Queue { max, timeout: config.queue_timeout }
    }
}

thread_local! {
    static RNG: std::cell::RefCell<fastrand::Rng> = std::cell::RefCell::new(fastrand::Rng::new());
}

impl Proxy {
    /// Who made the answer whose id is in `path`, if it has passed here.
    pub(super) fn made<'p>(&self, path: &'p str) -> Option<Made<'p>> {
        if paths::is_stateless(path) {
            return None;
        }
        let collection = paths::collection(path)?;
        paths::ids(path).find_map(|id| match self.makers.of(&collection, &id) {
            Maker::Unknown => None,
            maker => Some(Made { maker, id }),
        })
    }

    /// Claims a place for a request that names `model`: on the backend that made the answer that it is about, if that serves
    /// the model, or the one that is continued, else on the best.
    pub(super) async fn choose<S: Transport>(
        &self,
        client: &mut Client<S>,
        model: &str,
        made: Option<Made<'_>>,
        replay: &Replay,
        exchange: &mut Exchange<'_>,
    ) -> Result<Place, NoAnswer> {
        if let Some(made) = made
            && let Some(member) = self.maker_for(&made, model)?
        {
            let in_flight = self.claim(client, &Wanted::Only(member), exchange).await?;
            return Ok(Place { in_flight, is_the_only_one: true });
        }
        if let Some(Maker::Here(member)) = replay.continues().map(|id| self.makers.of("responses", id))
            && self.table.snapshot().known_as(model).is_some_and(|known| known.id == member.model.id)
            && member.model.waiting.may_pass(Whom::Anybody)
            && let Ok(in_flight) = member.try_acquire(Instant::now())
        {
            if let Some((affinity, prompt)) = self.affinity.as_ref().zip(replay.prompt()) {
                affinity.learn(prompt, in_flight.backend().serial);
            }
            let in_flight = in_flight.expects(self.balance, exchange.body_bytes(replay.seen_bytes()), Instant::now());
            exchange.served_by(&in_flight);
            in_flight.model().retries.pay_in();
            return Ok(Place { in_flight, is_the_only_one: false });
        }
        let wanted = Wanted::any_of(model, &[], replay, exchange);
        let in_flight = self.claim(client, &wanted, exchange).await?;
        in_flight.model().retries.pay_in();
        Ok(Place { in_flight, is_the_only_one: false })
    }

    /// The member of the pool of `model` that made an answer. `None`: the answer is of another model, and the one that is
    /// named decides.
    fn maker_for(&self, made: &Made<'_>, model: &str) -> Result<Option<Arc<Member>>, ProxyError> {
        let table = self.table.snapshot();
        let Some(known) = table.known_as(model) else { return Ok(None) };
        match &made.maker {
            Maker::Unknown => Ok(None),
            // Another replica would not know it.
            Maker::Gone { model } if *model == self.makers.hash_of(&known.id) => Err(made.gone()),
            Maker::Gone { .. } => Ok(None),
            Maker::Here(maker) if maker.model.id == known.id => Ok(Some(maker.clone())),
            // One backend may have several models.
            Maker::Here(maker) => match table.lookup(model) {
                Lookup::Ready(route) => {
                    Ok(route.members.iter().find(|member| Arc::ptr_eq(&member.backend, &maker.backend)).cloned())
                }
                Lookup::NoneReady(_) | Lookup::Unknown => Ok(None),
            },
        }
    }

    /// Claims a place for a request that names no model: on the backend that made the answer it is about, else on the
    /// only one there is.
    pub(super) async fn choose_unnamed<S: Transport>(
        &self,
        client: &mut Client<S>,
        path: &str,
        made: Option<Made<'_>>,
        exchange: &mut Exchange<'_>,
    ) -> Result<Place, NoAnswer> {
        let member = self.meant_by(path, made)?;
        let in_flight = self.claim(client, &Wanted::Only(member), exchange).await?;
        Ok(Place { in_flight, is_the_only_one: true })
    }

    /// Which backend is meant by a request that names no model.
    fn meant_by(&self, path: &str, made: Option<Made<'_>>) -> Result<Arc<Member>, ProxyError> {
        match made {
            Some(Made { maker: Maker::Here(member), .. }) => Ok(member),
            Some(made @ Made { maker: Maker::Gone { .. }, .. }) => Err(made.gone()),
            Some(Made { maker: Maker::Unknown, .. }) | None => {
                let table = self.table.snapshot();
                match table.only_backend() {
                    Some(only) => Ok(only.clone()),
                    None if table.routes().iter().all(|route| route.members.is_empty()) => Err(ProxyError::NoBackend),
                    None => Err(nobody_meant(paths::answer_id(path).as_deref())),
                }
            }
        }
    }

    /// Claims a place now, or waits for one.
    pub(super) async fn claim<S: Transport>(
        &self,
        client: &mut Client<S>,
        wanted: &Wanted<'_>,
        exchange: &mut Exchange<'_>,
    ) -> Result<InFlight, NoAnswer> {
        match self.try_claim(wanted, false, exchange) {
            Ok(in_flight) => Ok(in_flight),
            Err(Delay::No(error)) => Err(error.into()),
            Err(Delay::Wait { model, otherwise, .. }) => {
                // Seldom, and large: not part of every request's state.
                Box::pin(self.wait(client, wanted, &model, otherwise, exchange)).await
            }
        }
    }

    /// Claims a place now, if there is one, without waiting.
    pub(super) fn claim_at_once(&self, wanted: &Wanted<'_>, exchange: &mut Exchange<'_>) -> Option<InFlight> {
        self.try_claim(wanted, false, exchange).ok()
    }

    /// Claims a place for a request that nobody of `tried` could be connected for, and that nobody else is there for.
    ///
    /// A container that is told to stop may close its port before Docker says so. If that is what has happened to all of
    /// them, they were chosen on old news, the request has been sent nowhere, and whoever takes their place may serve it.
    /// `None`: they are there, and refuse.
    pub(super) async fn claim_on_news<S: Transport>(
        &self,
        client: &mut Client<S>,
        model: &Model,
        tried: &[Arc<Backend>],
        replay: &Replay,
        exchange: &mut Exchange<'_>,
    ) -> Result<Option<InFlight>, NoAnswer> {
        let began = Instant::now();
        let all_closed = async {
            for backend in tried {
                backend.closed().await;
            }
        };
        let news = client.unless_gone(timeout(NEWS_TIME, all_closed)).await?;
        exchange.has_waited(began.elapsed());
        if news.is_err() {
            return Ok(None);
        }
        let wanted = Wanted::any_of(&model.id, tried, replay, exchange);
        self.claim(client, &wanted, exchange).await.map(Some)
    }

    /// Waits in the line of `model`. `otherwise`: what the client is told when it may not wait, or not any longer.
    async fn wait<S: Transport>(
        &self,
        client: &mut Client<S>,
        wanted: &Wanted<'_>,
        model: &Arc<Model>,
        mut otherwise: ProxyError,
        exchange: &mut Exchange<'_>,
    ) -> Result<InFlight, NoAnswer> {
        let Some(ticket) = model.waiting.join(self.queue.max, wanted.whom()) else {
            return Err(otherwise.into());
        };
        let began = Instant::now();
        exchange.is_in_line = true;
        // One that is sent again has waited before, perhaps.
        let deadline = began + self.queue.timeout.saturating_sub(exchange.in_line);
        exchange.trace.queued(model.waiting.len());
        let waited = loop {
            let mut until = deadline;
            if ticket.is_first() {
                self.ask_to_be_called(wanted, model);
                match self.try_claim(wanted, true, exchange) {
                    Ok(in_flight) => break Ok(in_flight),
                    Err(Delay::No(error)) => break Err(error.into()),
                    Err(Delay::Wait { rest, otherwise: now_otherwise, .. }) => {
                        otherwise = now_otherwise;
                        if let Some(rest) = rest {
                            until = deadline.min(Instant::now() + rest.max(NAP_MIN));
                        }
                    }
                }
            }
            if Instant::now() >= deadline {
                break Err(otherwise.into());
            }
            if let Err(gone) = client.unless_gone(timeout_at(until, ticket.called())).await {
                break Err(gone.into());
            }
        };
        let elapsed = began.elapsed();
        // Whose client has left has left the line.
        exchange.is_in_line = waited.is_err();
        exchange.has_waited(elapsed);
        exchange.in_line += elapsed;
        model.metrics.queue_wait.observe(elapsed);
        exchange.trace.dequeued(elapsed);
        waited
    }

    /// Whoever gives back a place that would do calls the first in the line of `model`.
    fn ask_to_be_called(&self, wanted: &Wanted<'_>, model: &Arc<Model>) {
        match wanted {
            Wanted::Only(member) => member.backend.call_when_free(model),
            Wanted::AnyOf { model: name, .. } => {
                let table = self.table.snapshot();
                if let Lookup::Ready(route) = table.lookup(name) {
                    for member in &route.members {
                        member.backend.call_when_free(model);
                    }
                }
            }
        }
    }

    /// One try. Whoever is not first in line (`is_first`) does not get past a line.
    fn try_claim(&self, wanted: &Wanted<'_>, is_first: bool, exchange: &mut Exchange<'_>) -> Result<InFlight, Delay> {
        let now = Instant::now();
        let may_change = matches!(wanted, Wanted::AnyOf { .. });
        let table;
        let (model, members, asked) = match wanted {
            Wanted::Only(member) => (&member.model, std::slice::from_ref(member), balance::Wanted::default()),
            Wanted::AnyOf { model: name, tried, prompt_bytes, prompt, spares_the_broken } => {
                let (prompt_bytes, spares_the_broken) = (*prompt_bytes, *spares_the_broken);
                let affinity = self.affinity.as_ref().zip(*prompt);
                let asked = balance::Wanted { tried, affinity, prompt_bytes, spares_the_broken };
                table = self.table.snapshot();
                if let Some((affinity, _)) = affinity {
                    affinity.follow(table.generation, table.backends().iter().map(|backend| backend.serial));
                }
                let unavailable = |why| ProxyError::ModelUnavailable { model: bounded(name), why };
                match table.lookup(name) {
                    Lookup::Ready(route) => (&route.model, &*route.members, asked),
                    Lookup::NoneReady(route) => {
                        exchange.model = Some(route.model.clone());
                        let otherwise = unavailable(route.why_not_ready);
                        let model = route.model.clone();
                        return Err(match route.is_coming {
                            true => Delay::Wait { model, rest: None, otherwise },
                            false => Delay::No(otherwise),
                        });
                    }
                    // Who has waited knew it when it came.
                    Lookup::Unknown if is_first => return Err(Delay::No(unavailable("its container has gone"))),
                    Lookup::Unknown => {
                        self.table.report_miss();
                        exchange.trace.missed(name);
                        return Err(Delay::No(ProxyError::ModelNotFound { model: bounded(name) }));
                    }
                }
            }
        };
        let claimed = if is_first || model.waiting.may_pass(wanted.whom()) {
            RNG.with_borrow_mut(|rng| balance::claim(members, self.balance, &asked, rng, now))
        } else {
            Err(NoPlace::Busy { rest: None })
        };
        match claimed {
            Ok(in_flight) => {
                exchange.served_by(&in_flight);
                Ok(in_flight)
            }
            Err(why) => {
                exchange.model = Some(model.clone());
                let stopping = || ProxyError::ModelUnavailable { model: bounded(&model.id), why: "it is stopping" };
                let model = model.clone();
                Err(match why {
                    NoPlace::Busy { rest } => {
                        let what = format!("every backend of `{}` is full", bounded(&model.id));
                        Delay::Wait { model, rest, otherwise: ProxyError::Overloaded { what, retry_after: rest } }
                    }
                    // The table is out of date; the next one, which is on its way, tells whether there is any hope.
                    NoPlace::Nobody if may_change && members.iter().all(|member| member.backend.is_closed()) => {
                        Delay::Wait { model, rest: None, otherwise: stopping() }
                    }
                    NoPlace::Nobody => Delay::No(stopping()),
                })
            }
        }
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
