//! A slot on a backend for one request: which replica it is, and what happens if there is none at the moment.
//!
//! A slot is claimed on the member that the policy picks. If every replica is full, or none is ready but one is starting,
//! the request waits in the queue of its model ([`crate::pool::waiting`]), for a bounded time and behind a bounded number
//! of others. It is called by a request that gives its slot back, by control when it has published another table, or by
//! the clock when a replica's breaker may be tried.

use std::{borrow::Cow, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout, timeout_at};

use super::{
    call::{Call, NoAnswer, bounded},
    client::Transport,
    makers::Maker,
    paths,
    state::Proxy,
};
use crate::{
    base::{config::Config, error::ProxyError},
    data::balance::{self, NoPlace},
    pool::{
        backend::{Backend, InFlight, Member, Model},
        table::Lookup,
        waiting::Takes,
    },
};

/// How long ahead of Docker's word a container's port may be closed.
const NEWS_TIME: Duration = Duration::from_millis(250);
/// Shortest pause of a request that waits until a replica's breaker may be tried.
const PAUSE_MIN: Duration = Duration::from_millis(1);

/// A slot that a request has.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) in_flight: InFlight,
    /// No other backend could serve the request.
    pub(super) is_the_only_one: bool,
}

/// How requests wait: `PROXY_QUEUE_MAX` and `PROXY_QUEUE_TIMEOUT`.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueLimits {
    max: usize,
    timeout: Duration,
}

/// Which replicas may serve a request.
#[derive(Debug, Clone)]
pub(super) enum Eligible<'c> {
    /// Any member of this model's pool, but for those that have been tried.
    AnyOf {
        model: &'c str,
        tried: &'c [Arc<Backend>],
        /// There is an answer already, and a replica that is known to be broken would give no better one.
        spares_the_broken: bool,
    },
    /// This one alone.
    Only(Arc<Member>),
}

/// An answer that has passed here, which a request is about.
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

/// Why there is no slot now.
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

impl<'c> Eligible<'c> {
    /// Any member of the pool of `model` whose backend is not in `tried`.
    pub(super) fn any_of(model: &'c str, tried: &'c [Arc<Backend>]) -> Eligible<'c> {
        Eligible::AnyOf { model, tried, spares_the_broken: false }
    }

    /// The same, but for those whose breakers keep requests away.
    pub(super) fn but_for_the_broken(mut self) -> Eligible<'c> {
        if let Eligible::AnyOf { spares_the_broken, .. } = &mut self {
            *spares_the_broken = true;
        }
        self
    }

    fn takes(&self) -> Takes {
        match self {
            Eligible::Only(member) => Takes::Only(member.backend.serial),
            Eligible::AnyOf { tried, .. } => tried.last().map_or(Takes::Any, |last| Takes::AllBut(last.serial)),
        }
    }
}

impl QueueLimits {
    pub(super) fn new(config: &Config) -> QueueLimits {
        // Either variable turns waiting off.
        let max = if config.queue_timeout.is_zero() { 0 } else { config.queue_max };
        QueueLimits { max, timeout: config.queue_timeout }
    }
}

thread_local! {
    static RNG: std::cell::RefCell<fastrand::Rng> = std::cell::RefCell::new(fastrand::Rng::new());
}

impl Proxy {
    /// The answer whose id is in `path`, if it has passed here.
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
}

impl<S: Transport> Call<'_, S> {
    /// Claims a slot for a request that names `model`: on the backend that made the answer that it is about, if that serves
    /// the model, or the answer that it continues, else on the best.
    pub(super) async fn choose(&mut self, model: &str, made: Option<Made<'_>>) -> Result<Slot, NoAnswer> {
        if let Some(made) = made
            && let Some(member) = self.proxy.maker_for(&made, model)?
        {
            let in_flight = self.claim(&Eligible::Only(member)).await?;
            return Ok(Slot { in_flight, is_the_only_one: true });
        }
        let in_flight = match self.claim_where_it_continues(model) {
            Some(in_flight) => in_flight,
            None => self.claim(&Eligible::any_of(model, &[])).await?,
        };
        in_flight.model().retries.pay_in();
        Ok(Slot { in_flight, is_the_only_one: false })
    }

    /// Claims a slot on the backend that made the answer that the request continues (`previous_response_id`), if it has
    /// one at once.
    fn claim_where_it_continues(&mut self, model: &str) -> Option<InFlight> {
        let proxy = self.proxy;
        let Maker::Here(member) = proxy.makers.of("responses", self.replay.continues()?) else { return None };
        let is_it = proxy.table.snapshot().known_as(model).is_some_and(|known| known.id == member.model.id);
        if !is_it || !member.model.waiting.may_pass(Takes::Any) {
            return None;
        }
        let in_flight = member.try_acquire(Instant::now()).ok()?;
        if let Some((affinity, prompt)) = proxy.affinity.as_ref().zip(self.replay.prompt()) {
            affinity.learn(prompt, in_flight.backend().serial);
        }
        let body_bytes = self.account.body_bytes(self.replay.seen_bytes());
        let in_flight = in_flight.expects(proxy.balance, body_bytes, Instant::now());
        self.account.served_by(&in_flight);
        Some(in_flight)
    }

    /// Claims a slot for a request that names no model: on the backend that made the answer that it is about, else on the
    /// only one there is.
    pub(super) async fn choose_unnamed(&mut self, made: Option<Made<'_>>) -> Result<Slot, NoAnswer> {
        let member = self.proxy.meant_by(self.asked.head.path(), made)?;
        let in_flight = self.claim(&Eligible::Only(member)).await?;
        Ok(Slot { in_flight, is_the_only_one: true })
    }

    /// Claims a slot now, or waits for one.
    pub(super) async fn claim(&mut self, eligible: &Eligible<'_>) -> Result<InFlight, NoAnswer> {
        match self.try_claim(eligible, false) {
            Ok(in_flight) => Ok(in_flight),
            Err(Delay::No(error)) => Err(error.into()),
            Err(Delay::Wait { model, otherwise, .. }) => {
                // Seldom, and large: not part of every request's state.
                Box::pin(self.wait(eligible, &model, otherwise)).await
            }
        }
    }

    /// Claims a slot now, if there is one, without waiting.
    pub(super) fn claim_at_once(&mut self, eligible: &Eligible<'_>) -> Option<InFlight> {
        self.try_claim(eligible, false).ok()
    }

    /// Claims a slot for a request that no backend of `tried` could be connected to for, and that no other is there for.
    ///
    /// A container that is told to stop may close its port before Docker says so. If that is what has happened to all of
    /// them, they were chosen on old news, the request has been sent nowhere, and the backend that takes their place may
    /// serve it. `None`: they are there, and refuse.
    pub(super) async fn claim_on_news(
        &mut self,
        model: &Model,
        tried: &[Arc<Backend>],
    ) -> Result<Option<InFlight>, NoAnswer> {
        let began = Instant::now();
        let all_closed = async {
            for backend in tried {
                backend.closed().await;
            }
        };
        let news = self.client.unless_gone(timeout(NEWS_TIME, all_closed)).await?;
        self.account.has_waited(began.elapsed());
        if news.is_err() {
            return Ok(None);
        }
        self.claim(&Eligible::any_of(&model.id, tried)).await.map(Some)
    }

    /// Waits in the queue of `model`. `otherwise`: what the client is told when it may not wait, or not any longer.
    async fn wait(
        &mut self,
        eligible: &Eligible<'_>,
        model: &Arc<Model>,
        mut otherwise: ProxyError,
    ) -> Result<InFlight, NoAnswer> {
        let Some(ticket) = model.waiting.join(self.proxy.queue.max, eligible.takes()) else {
            return Err(otherwise.into());
        };
        let began = Instant::now();
        self.account.is_queued();
        // A request that is sent again may have waited before.
        let deadline = began + self.proxy.queue.timeout.saturating_sub(self.account.queued_for);
        self.account.trace.queued(model.waiting.len());
        let waited = loop {
            let mut until = deadline;
            if ticket.is_first() {
                self.proxy.ask_to_be_called(eligible, model);
                match self.try_claim(eligible, true) {
                    Ok(in_flight) => break Ok(in_flight),
                    Err(Delay::No(error)) => break Err(error.into()),
                    Err(Delay::Wait { rest, otherwise: now_otherwise, .. }) => {
                        otherwise = now_otherwise;
                        if let Some(rest) = rest {
                            until = deadline.min(Instant::now() + rest.max(PAUSE_MIN));
                        }
                    }
                }
            }
            if Instant::now() >= deadline {
                break Err(otherwise.into());
            }
            if let Err(gone) = self.client.unless_gone(timeout_at(until, ticket.called())).await {
                break Err(gone.into());
            }
        };
        let elapsed = began.elapsed();
        self.account.was_queued(elapsed, waited.is_ok());
        model.metrics.queue_wait.observe(elapsed);
        self.account.trace.dequeued(elapsed);
        waited
    }

    /// Tries once to claim a slot. Only the first in a queue (`is_first`) gets past the queue.
    fn try_claim(&mut self, eligible: &Eligible<'_>, is_first: bool) -> Result<InFlight, Delay> {
        let (proxy, now) = (self.proxy, Instant::now());
        let may_change = matches!(eligible, Eligible::AnyOf { .. });
        let table;
        let (model, members, wanted) = match eligible {
            Eligible::Only(member) => (&member.model, std::slice::from_ref(member), balance::Wanted::default()),
            Eligible::AnyOf { model: name, tried, spares_the_broken } => {
                let prompt_bytes = self.account.body_bytes(self.replay.seen_bytes());
                let affinity = proxy.affinity.as_ref().zip(self.replay.prompt());
                let wanted = balance::Wanted { tried, affinity, prompt_bytes, spares_the_broken: *spares_the_broken };
                table = proxy.table.snapshot();
                if let Some((affinity, _)) = affinity {
                    affinity.follow(table.generation, table.backends().iter().map(|backend| backend.serial));
                }
                let unavailable = |why| ProxyError::ModelUnavailable { model: bounded(name), why };
                match table.lookup(name) {
                    Lookup::Ready(route) => (&route.model, &*route.members, wanted),
                    Lookup::NoneReady(route) => {
                        self.account.model = Some(route.model.clone());
                        let otherwise = unavailable(route.why_not_ready);
                        let model = route.model.clone();
                        return Err(match route.is_coming {
                            true => Delay::Wait { model, rest: None, otherwise },
                            false => Delay::No(otherwise),
                        });
                    }
                    // The model existed when the request joined the queue, so this is 503 and not 404.
                    Lookup::Unknown if is_first => return Err(Delay::No(unavailable("its container has gone"))),
                    Lookup::Unknown => {
                        proxy.table.report_miss();
                        self.account.trace.missed(name);
                        return Err(Delay::No(ProxyError::ModelNotFound { model: bounded(name) }));
                    }
                }
            }
        };
        let claimed = if is_first || model.waiting.may_pass(eligible.takes()) {
            RNG.with_borrow_mut(|rng| balance::claim(members, proxy.balance, &wanted, rng, now))
        } else {
            Err(NoPlace::Busy { rest: None })
        };
        match claimed {
            Ok(in_flight) => {
                self.account.served_by(&in_flight);
                Ok(in_flight)
            }
            Err(why) => {
                self.account.model = Some(model.clone());
                // Where a table is out of date, the next one, which is on its way, tells whether there is any hope.
                let is_outdated = may_change && members.iter().all(|member| member.backend.is_closed());
                Err(Delay::of(why, model, is_outdated))
            }
        }
    }
}

impl Proxy {
    /// Asks that a request which gives back a slot that would do calls the first in the queue of `model`.
    fn ask_to_be_called(&self, eligible: &Eligible<'_>, model: &Arc<Model>) {
        match eligible {
            Eligible::Only(member) => member.backend.call_when_free(model),
            Eligible::AnyOf { model: name, .. } => {
                let table = self.table.snapshot();
                if let Lookup::Ready(route) = table.lookup(name) {
                    for member in &route.members {
                        member.backend.call_when_free(model);
                    }
                }
            }
        }
    }
}

// === impl Delay ===

impl Delay {
    /// Why the policy found no slot. `is_outdated`: the table that it chose by no longer holds.
    fn of(why: NoPlace, model: &Arc<Model>, is_outdated: bool) -> Delay {
        let stopping = || ProxyError::ModelUnavailable { model: bounded(&model.id), why: "it is stopping" };
        match why {
            NoPlace::Busy { rest } => {
                let what = format!("every backend of `{}` is full", bounded(&model.id));
                let otherwise = ProxyError::Overloaded { what, retry_after: rest };
                Delay::Wait { model: model.clone(), rest, otherwise }
            }
            NoPlace::Nobody if is_outdated => Delay::Wait { model: model.clone(), rest: None, otherwise: stopping() },
            NoPlace::Nobody => Delay::No(stopping()),
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
