//! One container as the registry knows it: the last look at it, its place in its life, its probe, its backend, and the
//! models that it serves. An entry starts no task and reports nothing.

use std::{sync::Arc, time::Duration};

use time::OffsetDateTime;
use tokio::{sync::mpsc, time::Instant};

use super::verdict::{HealthNews, Verdict};
use crate::{
    base::config::Config,
    control::{
        discovery::{Endpoint, EndpointId, Incarnation, Phase},
        lifecycle::{Effect, Lifecycle, State, Unfit},
        probe::{FailureKind, HealthPath, Listing, ProbeError, ProbeHandle, Target},
    },
    pool::{
        backend::{Backend, BackendSpec, Member, Model},
        table::ModelObject,
    },
};

/// Least time between two looks at a container because requests could not connect to it.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Least time after which a container that answers and fails in turns is reported again for the same kind of failure.
pub(super) const TELL_AGAIN: Duration = Duration::from_secs(60);

/// How long the loss of a network is not reported. Docker >= 28 tells of it before it tells that the container has ended,
/// and a look at the container follows in any case.
pub(super) const REPORT_LOST_NETWORK_AFTER: Duration = Duration::from_secs(2);

/// One container.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) endpoint: Endpoint,
    /// The verdict of the health check of this run.
    pub(super) verdict: Verdict,
    pub(super) life: Lifecycle,
    /// When its state last changed.
    pub(super) since: OffsetDateTime,
    pub(super) probe: Option<ProbeHandle>,
    /// When the running probe last answered.
    pub(super) answered_at: Option<Instant>,
    /// When discovery was last asked to look at it because requests could not connect to it.
    suspected_at: Option<Instant>,
    /// The loss of its network, while it has not been reported.
    pub(super) lost_network: Option<LostNetwork>,
    /// The failure of the last probe; `None` once a probe has succeeded.
    pub(super) probe_error: Option<ProbeTrouble>,
    /// Failures of probes that have been reported. Kinds are kept and not texts, because a server could fail with a new
    /// text every time.
    reported: Vec<ReportedFailure>,
    pub(super) backend: Option<Arc<Backend>>,
    /// The models that it serves. They are kept while it is not ready, so that they stay known.
    pub(super) offers: Vec<Offer>,
    /// Orders containers by when they became ready; 0 before that.
    pub(super) ready_serial: u64,
}

/// A model that a container serves, or served last.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) object: Arc<ModelObject>,
    /// The container's place in the pool of the model; `None` once its backend has been cut.
    pub(super) member: Option<Arc<Member>>,
}

/// The loss of a network that has not been reported yet, because it may only be a part of the container's end.
#[derive(Debug, Clone, Copy)]
pub(super) struct LostNetwork {
    pub(super) report_at: Instant,
    /// Requests that the loss cut.
    pub(super) in_flight: u64,
}

/// Why a probe failed.
#[derive(Debug)]
pub(super) struct ProbeTrouble {
    pub(super) at: OffsetDateTime,
    pub(super) reason: String,
    pub(super) advice: String,
}

#[derive(Debug)]
struct ReportedFailure {
    kind: FailureKind,
    /// The container was ready then, which makes the failure graver.
    was_ready: bool,
    at: Instant,
}

/// A container that has just been found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) entry: Entry,
    pub(super) health_news: Option<HealthNews>,
    /// The first effects of its life.
    pub(super) effects: Vec<Effect>,
}

/// The result of another look at a container.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) health_news: Option<HealthNews>,
    /// Labels that cannot be used are other ones than before.
    pub(super) has_new_problems: bool,
    /// The container has other addresses now, none of which is its backend's.
    pub(super) has_moved: bool,
}

// === impl Entry ===

impl Entry {
    pub(super) fn found(endpoint: Endpoint, config: &Config) -> Found {
        let (verdict, health_news) = Verdict::first(endpoint.health, endpoint.health_check, Instant::now());
        let fitness = fitness(&endpoint, &verdict, config.require_healthcheck);
        let (life, effects) = Lifecycle::found(fitness, config.drain_timeout);
        let entry = Entry {
            endpoint,
            verdict,
            life,
            since: OffsetDateTime::now_utc(),
            probe: None,
            answered_at: None,
            suspected_at: None,
            lost_network: None,
            probe_error: None,
            reported: Vec::new(),
            backend: None,
            offers: Vec::new(),
            ready_serial: 0,
        };
        Found { entry, health_news, effects }
    }

    /// Takes in another look at the same run.
    pub(super) fn look(&mut self, endpoint: Endpoint, now: Instant) -> Look {
        let health_news = match self.endpoint.is_unread() {
            // Before the container could be read, nothing was known of its check.
            true => {
                let (verdict, health_news) = Verdict::first(endpoint.health, endpoint.health_check, now);
                self.verdict = verdict;
                health_news
            }
            false => self.verdict.look(endpoint.health, endpoint.health_check, now),
        };
        if endpoint.phase != Phase::Running {
            self.verdict.interrupted();
        }
        let has_new_problems = self.endpoint.problems != endpoint.problems;
        let has_moved = self.has_moved(&endpoint);
        self.endpoint = endpoint;
        Look { health_news, has_new_problems, has_moved }
    }

    /// Whether the container may be probed. With `is_required`, one without a health check may not.
    pub(super) fn fitness(&self, is_required: bool) -> Result<(), Unfit> {
        fitness(&self.endpoint, &self.verdict, is_required)
    }

    pub(super) fn is_ready(&self) -> bool {
        *self.life.state() == State::Ready
    }

    /// The container is being probed and has not answered yet.
    pub(super) fn is_unanswered(&self) -> bool {
        self.probe.is_some() && self.answered_at.is_none()
    }

    /// When something is to be done about the container, even if nothing happens until then.
    pub(super) fn deadlines(&self) -> [Option<Instant>; 3] {
        let report_at = self.lost_network.map(|lost| lost.report_at);
        [self.life.deadline(), self.verdict.due_at(), report_at]
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.backend.as_ref().map_or(0, |backend| backend.in_flight())
    }

    /// Ids of the models that it serves.
    pub(super) fn models(&self) -> Vec<&str> {
        self.offers.iter().map(|offer| &*offer.object.id).collect()
    }

    /// Whether this look shows another run of the container than the last one did.
    pub(super) fn is_another_run(&self, seen: &Endpoint) -> bool {
        // A first look may show nothing but that the container exists. The next look is still at the same run.
        let is_learnt = self.probe.is_some() || self.backend.is_some() || !self.offers.is_empty();
        let was_unknown = self.endpoint.incarnation == Incarnation::UNKNOWN;
        self.endpoint.incarnation != seen.incarnation && (is_learnt || !was_unknown)
    }

    fn has_moved(&self, seen: &Endpoint) -> bool {
        match (&self.endpoint.reach, &seen.reach) {
            (Ok(before), Ok(after)) if before.targets != after.targets => {
                !self.backend.as_ref().is_some_and(|backend| after.targets.contains(&backend.spec.addr))
            }
            _ => false,
        }
    }

    /// The container has been told to stop, and its orchestrator may start another one in its place afterwards.
    pub(super) fn is_stopped_first(&self) -> bool {
        self.endpoint.is_stopped_first && matches!(self.life.state(), State::Draining { .. })
    }

    /// Takes in that a probe has failed, and says whether that is worth a report. The same kind of failure is reported once
    /// while the container is not ready, and once while it is.
    pub(super) fn probe_failed(&mut self, error: &ProbeError, now: Instant) -> bool {
        let advice = error.advice(&self.endpoint.name);
        self.probe_error = Some(ProbeTrouble { at: OffsetDateTime::now_utc(), reason: error.to_string(), advice });
        let (kind, was_ready) = (error.kind(), self.is_ready());
        let is_new = !self.reported.iter().any(|told| (told.kind, told.was_ready) == (kind, was_ready));
        if is_new {
            self.reported.push(ReportedFailure { kind, was_ready, at: now });
        }
        is_new
    }

    /// Takes in that a probe has succeeded: a later failure is news again, though not at once.
    pub(super) fn probe_succeeded(&mut self, now: Instant) {
        self.probe_error = None;
        self.reported.retain(|told| told.at + TELL_AGAIN > now);
    }

    /// Takes in that the container has lost its network, which cut this many requests.
    pub(super) fn network_lost(&mut self, in_flight: u64, now: Instant) {
        self.lost_network = Some(LostNetwork { report_at: now + REPORT_LOST_NETWORK_AFTER, in_flight });
    }

    /// Asks discovery to look at the container, and its probe to ask it, because requests could not connect to it. Does
    /// nothing if that was done a moment ago, as every request reports it while none can connect.
    pub(super) fn suspect(&mut self, looks: Option<&mpsc::Sender<EndpointId>>, now: Instant) {
        let Some(backend) = &self.backend else { return };
        if !backend.take_suspicion() || self.suspected_at.is_some_and(|at| at + LOOK_AGAIN > now) {
            return;
        }
        self.suspected_at = Some(now);
        if let Some(probe) = &self.probe {
            probe.nudge();
        }
        if let Some(looks) = looks {
            // If the queue is full, this container is reported again by the next request that it refuses.
            let _ = looks.try_send(self.endpoint.id.clone());
        }
    }

    /// Asks discovery to look at the container if its health check keeps it out and should have ended by now. The look
    /// shows whether the check has.
    pub(super) fn look_if_overdue(&mut self, looks: Option<&mpsc::Sender<EndpointId>>, now: Instant) {
        if self.verdict.due_at().is_some_and(|at| at <= now) {
            self.verdict.look_asked();
            if let Some(looks) = looks {
                // If the queue is full, discovery looks at this container when it looks at all of them.
                let _ = looks.try_send(self.endpoint.id.clone());
            }
        }
    }

    /// The target of a probe of the container; `None` if there is no way to it.
    pub(super) fn target(&self, config: &Config) -> Option<Target> {
        let reach = self.endpoint.reach.as_ref().ok()?;
        let labels = &self.endpoint.labels;
        let health = match &labels.health_path {
            Some(path) => HealthPath::Required(path.clone()),
            None if self.verdict.is_own() => HealthPath::Usual,
            None => HealthPath::None,
        };
        Some(Target {
            id: self.endpoint.id.clone(),
            incarnation: self.endpoint.incarnation,
            addrs: reach.targets.clone(),
            base_path: labels.base_path.clone(),
            health,
            connect_timeout: config.connect_timeout,
            refresh: config.models_refresh,
        })
    }

    /// Takes over the models that a probe has found, and says whether they differ from those before. A model that stays
    /// keeps its place in its pool. `model` gives the shared model of an id; `workers` threads send requests.
    pub(super) fn take_listing(
        &mut self,
        listing: Listing,
        config: &Config,
        workers: usize,
        mut model: impl FnMut(&ModelObject) -> Arc<Model>,
    ) -> bool {
        if self.backend.as_ref().is_some_and(|backend| backend.spec.addr != listing.addr) {
            self.cut();
        }
        let Endpoint { id, name, image, labels, .. } = &self.endpoint;
        let backend = self.backend.get_or_insert_with(|| {
            let spec = BackendSpec {
                id: id.clone(),
                name: name.clone(),
                image: image.clone(),
                addr: listing.addr,
                base_path: labels.base_path.clone(),
                weight: labels.weight,
                max_inflight: labels.max_inflight,
            };
            Backend::new(spec, config.connect_timeout, workers, Instant::now())
        });
        let is_same = |(old, new): (&Offer, &Arc<ModelObject>)| old.member.is_some() && old.object.is_same_model(new);
        if self.offers.len() == listing.models.len() && self.offers.iter().zip(&listing.models).all(is_same) {
            return false;
        }
        let offers = listing.models.into_iter().map(|object| {
            let before = self.offers.iter().find(|offer| offer.object.id == object.id);
            let member = before.and_then(|offer| offer.member.clone());
            let member = member.unwrap_or_else(|| Member::new(backend.clone(), model(&object)));
            Offer { object, member: Some(member) }
        });
        self.offers = offers.collect();
        true
    }

    /// Ends the requests in flight and forgets the backend. The models stay announced.
    pub(super) fn cut(&mut self) {
        if let Some(backend) = self.backend.take() {
            backend.close();
            backend.cut();
        }
        for offer in &mut self.offers {
            offer.member = None;
        }
    }
}

fn fitness(endpoint: &Endpoint, verdict: &Verdict, is_required: bool) -> Result<(), Unfit> {
    if let Some(why) = &endpoint.excluded {
        return Err(Unfit::Excluded(why.clone()));
    }
    match endpoint.phase {
        Phase::Running | Phase::Stopped => {}
        Phase::Paused => return Err(Unfit::Paused),
        Phase::Restarting => return Err(Unfit::Restarting),
    }
    verdict.fitness(is_required)?;
    match &endpoint.reach {
        Err(why) => Err(Unfit::Unreachable(why.clone())),
        Ok(_) => Ok(()),
    }
}
