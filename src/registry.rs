//! The single writer of the control plane: changes, probe answers and time go in; routing tables come out.
//!
//! It owns one [`Lifecycle`] per container and carries out its effects. Nothing else mutates the world, so nothing here
//! needs a lock; requests see its work only through the table and through the gates of backends.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, stream::BoxStream};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;

use crate::{
    backend::{Backend, BackendSpec, Member, Model},
    config::{Config, SameModel},
    discovery::{Change, DiscoveryError, Endpoint, EndpointId, Health, Phase},
    lifecycle::{Effect, Event, Lifecycle, State, Unfit},
    probe::{self, Answer, HealthPath, Listing, ProbeHandle, Target},
    status::{Ask, ContainerStatus, DiscoveryStatus, Status},
    table::{ModelObject, Route, RoutingTable, TablePublisher},
    telemetry::metrics::{Metrics, TableAction},
};

/// How long the connections of an ended container get to deliver what they still hold.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// How long readiness waits for the first answers of containers that run already.
const FIRST_PROBES: Duration = Duration::from_secs(5);
/// Least time between two early refreshes.
const EARLY_REFRESH: Duration = Duration::from_secs(1);
/// How long discovery must see before its last trouble counts as over. Longer than sources wait between attempts, so that
/// trouble that comes and goes is told once.
const SIGHT_SETTLES: Duration = Duration::from_secs(10);
/// Probe answers on their way.
const ANSWERS_MAX: usize = 256;

/// The writer. [`Registry::run`] is its life.
#[derive(Debug)]
pub struct Registry {
    config: Arc<Config>,
    workers: usize,
    source: &'static str,
    publisher: TablePublisher,
    metrics: Arc<Metrics>,
    ready: Arc<AtomicBool>,
    tasks: TaskTracker,
    answers: (mpsc::Sender<Answer>, mpsc::Receiver<Answer>),
    entries: BTreeMap<EndpointId, Entry>,
    models: HashMap<Box<str>, KnownModel>,
    /// Probes and readiness, numbered in the order in which they began.
    serial: u64,
    dirty: bool,
    first_round: FirstRound,
    early_refresh: EarlyRefresh,
    discovery: Sight,
}

/// One container.
#[derive(Debug)]
struct Entry {
    endpoint: Endpoint,
    life: Lifecycle,
    since: OffsetDateTime,
    probe: Option<ProbeHandle>,
    /// When the running probe last answered.
    answered_at: Option<Instant>,
    last_probe_error: Option<String>,
    backend: Option<Arc<Backend>>,
    /// What it serves, with its place in each pool. Kept while it is not ready, so that its models stay known.
    pools: Vec<(Arc<ModelObject>, Option<Arc<Member>>)>,
    /// Orders backends by when they became ready.
    ready_serial: u64,
}

/// A model id, as long as somebody announces it or its grace lasts.
#[derive(Debug)]
struct KnownModel {
    model: Arc<Model>,
    gone_at: Option<Instant>,
    /// Between which containers a difference has been reported.
    warned: Vec<EndpointId>,
}

/// What readiness waits for.
#[derive(Debug)]
enum FirstRound {
    Unseen,
    Probing { waiting: HashSet<EndpointId>, until: Instant },
    Done,
}

/// Refreshing out of turn because a model was missed, at most so often.
#[derive(Debug, Default)]
struct EarlyRefresh {
    last: Option<Instant>,
    due: Option<Instant>,
}

/// Whether discovery sees.
#[derive(Debug, Default)]
struct Sight {
    connected: bool,
    /// The last trouble, until it is over.
    error: Option<DiscoveryError>,
    /// When it is over, if nothing else comes.
    settles_at: Option<Instant>,
    last_sync: Option<OffsetDateTime>,
}

impl Registry {
    /// A registry that publishes to `publisher`, for `workers` threads that send requests. `ready` turns true once the
    /// first scan and its probes are done. Tasks it starts are tracked by `tasks`.
    pub fn new(
        config: Arc<Config>,
        workers: usize,
        source: &'static str,
        publisher: TablePublisher,
        metrics: Arc<Metrics>,
        ready: Arc<AtomicBool>,
        tasks: TaskTracker,
    ) -> Registry {
        Registry {
            config,
            workers,
            source,
            publisher,
            metrics,
            ready,
            tasks,
            answers: mpsc::channel(ANSWERS_MAX),
            entries: BTreeMap::new(),
            models: HashMap::new(),
            serial: 0,
            dirty: false,
            first_round: FirstRound::Unseen,
            early_refresh: EarlyRefresh::default(),
            discovery: Sight::default(),
        }
    }

    /// Follows `changes` and answers `asks`, until the latter's senders are gone.
    pub async fn run(
        mut self,
        mut changes: BoxStream<'static, Result<Change, DiscoveryError>>,
        mut asks: mpsc::Receiver<Ask>,
    ) {
        loop {
            let deadline = self.next_deadline();
            let sleep = async {
                match deadline {
                    Some(at) => sleep_until(at).await,
                    None => futures::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // Changes first: a stop notice must not wait behind probe answers.
                Some(change) = changes.next() => self.on_change(change),
                Some(answer) = self.answers.1.recv() => self.on_answer(answer),
                () = sleep => self.on_deadlines(),
                () = self.publisher.missed() => self.on_miss(),
                ask = asks.recv() => match ask {
                    Some(Ask::Status(reply)) => {
                        // Whoever asked may have left.
                        let _ = reply.send(self.status());
                    }
                    None => return,
                },
            }
            // Whatever else is there already goes into the same table.
            while let Some(Some(change)) = changes.next().now_or_never() {
                self.on_change(change);
            }
            while let Ok(answer) = self.answers.1.try_recv() {
                self.on_answer(answer);
            }
            if std::mem::take(&mut self.dirty) {
                self.publish();
            }
            self.check_first_round();
        }
    }

    // --- input ---

    fn on_change(&mut self, change: Result<Change, DiscoveryError>) {
        match change {
            Ok(Change::Reset(endpoints)) => self.on_reset(endpoints),
            Ok(Change::Upsert(endpoint)) => self.on_upsert(*endpoint),
            Ok(Change::Stopping(id)) => {
                if let Some(entry) = self.entries.get(&id) {
                    let grace = entry.endpoint.stop_grace;
                    self.on_event(&id, Event::StopNotice { grace });
                }
            }
            Ok(Change::Suspended(id)) => self.on_event(&id, Event::Suspended),
            Ok(Change::Detached(id)) => self.on_event(&id, Event::Detached),
            Ok(Change::OutOfMemory(id)) => {
                if let Some(entry) = self.entries.get(&id) {
                    tracing::warn!(container = %entry.endpoint.name, "something in the container ran out of memory");
                }
                self.on_event(&id, Event::OutOfMemory);
            }
            Ok(Change::Ended(id)) => self.on_event(&id, Event::Ended),
            Err(error) => {
                if self.discovery.error.as_ref() != Some(&error) {
                    tracing::warn!(source = self.source, %error, "discovery cannot see; what is known stays routed");
                }
                self.discovery.connected = false;
                self.discovery.settles_at = None;
                self.discovery.error = Some(error);
            }
        }
    }

    fn on_reset(&mut self, endpoints: Vec<Endpoint>) {
        self.discovery.connected = true;
        if self.discovery.error.is_some() {
            self.discovery.settles_at.get_or_insert(Instant::now() + SIGHT_SETTLES);
        }
        self.discovery.last_sync = Some(OffsetDateTime::now_utc());
        let listed: HashSet<EndpointId> = endpoints.iter().map(|endpoint| endpoint.id.clone()).collect();
        let gone: Vec<EndpointId> = self.entries.keys().filter(|id| !listed.contains(*id)).cloned().collect();
        for id in gone {
            self.on_event(&id, Event::Ended);
        }
        for endpoint in endpoints {
            self.on_upsert(endpoint);
        }
        if matches!(self.first_round, FirstRound::Unseen) {
            // Those seen first may have answered while the others were looked at.
            let unanswered = |entry: &Entry| entry.probe.is_some() && entry.answered_at.is_none();
            let waiting: HashSet<EndpointId> =
                self.entries.iter().filter(|(_, entry)| unanswered(entry)).map(|(id, _)| id.clone()).collect();
            tracing::info!(source = self.source, containers = self.entries.len(), "first scan done");
            self.first_round = FirstRound::Probing { waiting, until: Instant::now() + FIRST_PROBES };
        }
    }

    fn on_upsert(&mut self, endpoint: Endpoint) {
        let id = endpoint.id.clone();
        match self.entries.get(&id).map(|entry| entry.endpoint.incarnation.cmp(&endpoint.incarnation)) {
            Some(std::cmp::Ordering::Greater) => return, // seen before the run that is known
            Some(std::cmp::Ordering::Less) => self.on_event(&id, Event::Ended),
            Some(std::cmp::Ordering::Equal) | None => {}
        }
        if endpoint.phase == Phase::Stopped {
            return self.on_event(&id, Event::Ended);
        }
        let fitness = self.fitness(&endpoint);
        let Some(entry) = self.entries.get_mut(&id) else {
            return self.on_found(endpoint, fitness);
        };
        if entry.endpoint.problems != endpoint.problems {
            report_problems(&endpoint);
        }
        let moved = match (&entry.endpoint.reach, &endpoint.reach) {
            (Ok(before), Ok(after)) if before.targets != after.targets => {
                // More ways to the same place change nothing for a backend whose own way is still one of them.
                !entry.backend.as_ref().is_some_and(|backend| after.targets.contains(&backend.spec.addr))
            }
            _ => false,
        };
        entry.endpoint = endpoint;
        if moved {
            // The old address is not its own any more; whoever answers there may be somebody else.
            self.on_event(&id, Event::Detached);
        }
        self.on_event(&id, Event::Seen(fitness));
    }

    fn on_found(&mut self, endpoint: Endpoint, fitness: Result<(), Unfit>) {
        report_problems(&endpoint);
        let id = endpoint.id.clone();
        let (life, effects) = Lifecycle::found(fitness, self.config.drain_timeout);
        let entry = Entry {
            endpoint,
            life,
            since: OffsetDateTime::now_utc(),
            probe: None,
            answered_at: None,
            last_probe_error: None,
            backend: None,
            pools: Vec::new(),
            ready_serial: 0,
        };
        report_state(&entry);
        self.entries.insert(id.clone(), entry);
        self.apply(&id, effects);
    }

    fn on_event(&mut self, id: &EndpointId, event: Event) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let before = entry.life.state().clone();
        let effects = entry.life.on(event, Instant::now());
        if *entry.life.state() != before {
            self.dirty = true;
            entry.since = OffsetDateTime::now_utc();
            report_state(entry);
            if before == State::Ready {
                self.metrics.table_updated(TableAction::Remove);
            }
        }
        let gone = *entry.life.state() == State::Gone;
        self.apply(id, effects);
        if gone {
            self.entries.remove(id);
        }
    }

    fn on_answer(&mut self, answer: Answer) {
        let Some(entry) = self.entries.get_mut(&answer.id) else {
            return;
        };
        let current = entry.probe.as_ref().is_some_and(|probe| probe.serial == answer.serial);
        if !current || entry.endpoint.incarnation != answer.incarnation {
            return; // about an earlier run, or an earlier probing of this one
        }
        if let FirstRound::Probing { waiting, .. } = &mut self.first_round {
            waiting.remove(&answer.id);
        }
        entry.answered_at = Some(Instant::now());
        match answer.outcome {
            Ok(listing) => {
                entry.last_probe_error = None;
                self.take_listing(&answer.id, listing);
                self.on_event(&answer.id, Event::ProbeOk);
            }
            Err(error) => {
                let text = error.to_string();
                if entry.last_probe_error.as_ref() != Some(&text) {
                    let container = &entry.endpoint.name;
                    match entry.life.state() {
                        State::Ready => tracing::warn!(%container, %error, "a ready backend did not tell its models"),
                        _ => tracing::info!(%container, %error, "not ready yet, asking again until it is"),
                    }
                }
                entry.last_probe_error = Some(text);
                self.on_event(&answer.id, Event::ProbeFailed { refused: error.refused() });
            }
        }
    }

    fn on_deadlines(&mut self) {
        let now = Instant::now();
        let due = |entry: &Entry| entry.life.deadline().is_some_and(|at| at <= now);
        let ids: Vec<EndpointId> =
            self.entries.iter().filter(|(_, entry)| due(entry)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.on_event(&id, Event::Deadline);
        }
        if self.discovery.settles_at.is_some_and(|at| at <= now) {
            self.discovery.settles_at = None;
            self.discovery.error = None;
            tracing::info!(source = self.source, "discovery sees again");
        }
        if self.early_refresh.due.is_some_and(|at| at <= now) {
            self.refresh_all(now);
        }
        // A model whose grace is over goes with the next table.
        let grace = self.config.model_grace;
        self.dirty |= self.models.values().any(|known| known.gone_at.is_some_and(|gone| gone + grace <= now));
    }

    fn on_miss(&mut self) {
        let now = Instant::now();
        match self.early_refresh.last {
            Some(last) if last + EARLY_REFRESH > now => self.early_refresh.due = Some(last + EARLY_REFRESH),
            _ => self.refresh_all(now),
        }
    }

    /// Asks every ready backend out of turn, but for those that have just been asked; their turn comes a moment later.
    fn refresh_all(&mut self, now: Instant) {
        self.early_refresh = EarlyRefresh { last: Some(now), due: None };
        for entry in self.entries.values().filter(|entry| *entry.life.state() == State::Ready) {
            let Some(probe) = &entry.probe else { continue };
            match entry.answered_at.map(|at| at + EARLY_REFRESH) {
                Some(later) if later > now => {
                    self.early_refresh.due = self.early_refresh.due.into_iter().chain([later]).min();
                }
                _ => probe.nudge(),
            }
        }
    }

    // --- effects ---

    fn apply(&mut self, id: &EndpointId, effects: Vec<Effect>) {
        for effect in effects {
            let Some(entry) = self.entries.get_mut(id) else { return };
            match effect {
                Effect::StartProbing => self.start_probing(id),
                Effect::StopProbing => entry.probe = None,
                Effect::ProbeNow => {
                    if let Some(probe) = &entry.probe {
                        probe.nudge();
                    }
                }
                Effect::Open => {
                    self.serial += 1;
                    entry.ready_serial = self.serial;
                    if let Some(backend) = &entry.backend {
                        backend.reopen();
                    }
                    self.metrics.table_updated(TableAction::Add);
                    self.dirty = true;
                }
                Effect::Close => {
                    if let Some(backend) = &entry.backend {
                        backend.close();
                    }
                    self.dirty = true;
                }
                Effect::Cut => entry.cut(),
                Effect::CutSoon => {
                    if let Some(backend) = entry.backend.take() {
                        backend.upstream.seal();
                        self.tasks.spawn(async move {
                            // Either way, its connections are of no more use.
                            let _ = timeout(LAST_BYTES, backend.drained()).await;
                            backend.cut();
                        });
                    }
                }
            }
        }
    }

    fn start_probing(&mut self, id: &EndpointId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let Ok(reach) = &entry.endpoint.reach else { return };
        self.serial += 1;
        let (handle, nudge, stop) = ProbeHandle::new(self.serial);
        entry.probe = Some(handle);
        entry.answered_at = None;
        let labels = &entry.endpoint.labels;
        let health = match (&labels.health_path, entry.endpoint.health) {
            (Some(path), _) => HealthPath::Required(path.clone()),
            (None, Health::None) => HealthPath::Usual,
            (None, _) => HealthPath::None,
        };
        let target = Target {
            id: id.clone(),
            incarnation: entry.endpoint.incarnation,
            addrs: reach.targets.clone(),
            base_path: labels.base_path.clone(),
            health,
            connect_timeout: self.config.connect_timeout,
            refresh: self.config.models_refresh,
        };
        self.tasks.spawn(probe::run(target, self.serial, self.answers.0.clone(), nudge, stop));
    }

    /// Takes over what a backend says it serves.
    fn take_listing(&mut self, id: &EndpointId, listing: Listing) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if entry.backend.as_ref().is_some_and(|backend| backend.spec.addr != listing.addr) {
            entry.cut();
        }
        let backend = entry.backend.get_or_insert_with(|| {
            let labels = &entry.endpoint.labels;
            let spec = BackendSpec {
                id: id.clone(),
                name: entry.endpoint.name.clone(),
                addr: listing.addr,
                base_path: labels.base_path.clone(),
                weight: labels.weight,
                max_inflight: labels.max_inflight,
            };
            Backend::new(spec, self.config.connect_timeout, self.workers)
        });
        let unchanged = entry.pools.len() == listing.models.len()
            && entry
                .pools
                .iter()
                .zip(&listing.models)
                .all(|((old, member), new)| member.is_some() && old.is_same_model(new));
        if unchanged {
            return;
        }
        let pools = listing.models.into_iter().map(|object| {
            let place = entry.pools.iter().find(|(old, _)| old.id == object.id).and_then(|(_, member)| member.clone());
            let member = place.unwrap_or_else(|| {
                let known = self.models.entry(object.id.clone()).or_insert_with(|| KnownModel {
                    model: Model::new(&object.id),
                    gone_at: None,
                    warned: Vec::new(),
                });
                Member::new(backend.clone(), known.model.clone())
            });
            (object, Some(member))
        });
        entry.pools = pools.collect();
        if *entry.life.state() == State::Ready {
            let models: Vec<&str> = entry.pools.iter().map(|(object, _)| &*object.id).collect();
            tracing::info!(container = %entry.endpoint.name, ?models, "models changed");
            self.metrics.table_updated(TableAction::Update);
            self.dirty = true;
        }
    }

    // --- output ---

    fn publish(&mut self) {
        let now = Instant::now();
        let mut pools: HashMap<&str, Pool<'_>> = HashMap::with_capacity(self.models.len());
        for entry in self.entries.values() {
            let ready = *entry.life.state() == State::Ready;
            for (object, member) in &entry.pools {
                let pool = pools.entry(&object.id).or_default();
                match member {
                    Some(member) if ready => pool.ready.push((entry, object, member)),
                    _ => pool.why_not_ready = Some(why_not_ready(entry.life.state())),
                }
            }
        }
        let grace = self.config.model_grace;
        self.models.retain(|id, known| {
            if pools.contains_key(&**id) {
                known.gone_at = None;
                return true;
            }
            *known.gone_at.get_or_insert(now) + grace > now
        });
        let mut routes = Vec::with_capacity(self.models.len());
        for (id, known) in &mut self.models {
            let mut pool = pools.remove(&**id).unwrap_or_default();
            pool.ready.sort_by_key(|(entry, ..)| entry.ready_serial);
            known.warn_of_differences(&pool);
            if self.config.same_model == SameModel::Newest && pool.ready.len() > 1 {
                pool.ready.drain(..pool.ready.len() - 1);
            }
            routes.push(Route {
                model: known.model.clone(),
                object: pool.ready.first().map(|(_, object, _)| (*object).clone()),
                members: pool.ready.iter().map(|(_, _, member)| (*member).clone()).collect(),
                why_not_ready: pool.why_not_ready.unwrap_or("its container has gone"),
            });
        }
        let backends = self.entries.values().filter_map(|entry| entry.backend.clone()).collect();
        let serving = self.entries.values().filter(|entry| entry.backend.is_some());
        let members = serving.flat_map(|entry| entry.pools.iter().filter_map(|(_, member)| member.clone())).collect();
        self.publisher.publish(RoutingTable::new(routes, backends, members));
    }

    fn check_first_round(&mut self) {
        if let FirstRound::Probing { waiting, until } = &mut self.first_round {
            waiting.retain(|id| self.entries.get(id).is_some_and(|entry| entry.probe.is_some()));
            if waiting.is_empty() || *until <= Instant::now() {
                self.first_round = FirstRound::Done;
                self.ready.store(true, Ordering::Release);
                let live = self.models.values().filter(|known| known.gone_at.is_none()).count();
                tracing::info!(models = live, "ready");
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let grace = self.config.model_grace;
        let lives = self.entries.values().filter_map(|entry| entry.life.deadline());
        let graces = self.models.values().filter_map(|known| Some(known.gone_at? + grace));
        let first_round = match &self.first_round {
            FirstRound::Probing { until, .. } => Some(*until),
            FirstRound::Unseen | FirstRound::Done => None,
        };
        let settles = self.discovery.settles_at;
        lives.chain(graces).chain(self.early_refresh.due).chain(first_round).chain(settles).min()
    }

    fn fitness(&self, endpoint: &Endpoint) -> Result<(), Unfit> {
        if let Some(why) = &endpoint.excluded {
            return Err(Unfit::Excluded(why.clone()));
        }
        match endpoint.phase {
            Phase::Running | Phase::Stopped => {}
            Phase::Paused => return Err(Unfit::Paused),
            Phase::Restarting => return Err(Unfit::Restarting),
        }
        match endpoint.health {
            Health::Starting => return Err(Unfit::HealthStarting),
            Health::Unhealthy => return Err(Unfit::HealthFailing),
            Health::None if self.config.require_healthcheck => return Err(Unfit::NoHealthCheck),
            Health::None | Health::Healthy => {}
        }
        match &endpoint.reach {
            Err(why) => Err(Unfit::Unreachable(why.clone())),
            Ok(_) => Ok(()),
        }
    }

    fn status(&self) -> Status {
        let mut containers: Vec<ContainerStatus> = self.entries.values().map(Entry::status).collect();
        containers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Status {
            version: 1,
            proxy_version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: self.ready.load(Ordering::Acquire),
            discovery: DiscoveryStatus {
                source: self.source.to_owned(),
                connected: self.discovery.connected,
                last_sync: self.discovery.last_sync.map(rfc3339),
                error: self.discovery.error.as_ref().map(ToString::to_string),
            },
            containers,
        }
    }
}

/// Who serves one model, while a table is made.
#[derive(Debug, Default)]
struct Pool<'e> {
    ready: Vec<(&'e Entry, &'e Arc<ModelObject>, &'e Arc<Member>)>,
    why_not_ready: Option<&'static str>,
}

// === impl KnownModel ===

impl KnownModel {
    /// Replicas should be replicas. Says so once per group when they are not.
    fn warn_of_differences(&mut self, pool: &Pool<'_>) {
        let Some(((first, object, _), others)) = pool.ready.split_first() else {
            return;
        };
        let ids: Vec<EndpointId> = pool.ready.iter().map(|(entry, ..)| entry.endpoint.id.clone()).collect();
        if others.is_empty() || ids.iter().all(|id| self.warned.contains(id)) {
            return;
        }
        for (other, theirs, _) in others {
            let differs = [
                (first.endpoint.image != other.endpoint.image, "image"),
                (object.root != theirs.root, "root"),
                (object.max_model_len != theirs.max_model_len, "context length (max_model_len)"),
            ];
            let what: Vec<&str> = differs.iter().filter(|(differs, _)| *differs).map(|(_, what)| *what).collect();
            if !what.is_empty() {
                tracing::warn!(
                    model = %self.model.id, one = %first.endpoint.name, other = %other.endpoint.name, differ_in = ?what,
                    "containers announce the same model but differ; they share its traffic unless PROXY_SAME_MODEL=newest"
                );
                self.warned.clone_from(&ids);
            }
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Ends what is in flight and forgets the backend; its models stay announced.
    fn cut(&mut self) {
        if let Some(backend) = self.backend.take() {
            backend.close();
            backend.cut();
        }
        for (_, member) in &mut self.pools {
            *member = None;
        }
    }

    fn status(&self) -> ContainerStatus {
        let (state, reason) = match self.life.state() {
            State::Discovered(why) => ("discovered", Some(why.to_string())),
            State::Probing => {
                let error = self.last_probe_error.clone();
                ("probing", Some(error.unwrap_or_else(|| "it is being asked for its models".to_owned())))
            }
            State::Ready => ("ready", None),
            State::Unhealthy { why, .. } => ("unhealthy", Some(why.to_string())),
            State::Draining { .. } => ("draining", Some("it has been told to stop".to_owned())),
            State::Gone => ("gone", None),
        };
        let reach = self.endpoint.reach.as_ref().ok();
        let address =
            self.backend.as_ref().map(|b| b.spec.addr).or_else(|| reach.and_then(|r| r.targets.first().copied()));
        ContainerStatus {
            id: self.endpoint.id.to_string(),
            name: self.endpoint.name.clone(),
            image: self.endpoint.image.clone(),
            state: state.to_owned(),
            since: rfc3339(self.since),
            reason,
            models: self.pools.iter().map(|(object, _)| object.id.to_string()).collect(),
            address: address.map(|addr| addr.to_string()),
            network: reach.and_then(|r| r.network.as_ref()).map(|network| network.name.clone()),
            in_flight: self.backend.as_ref().map_or(0, |backend| backend.in_flight()),
            problems: self.endpoint.problems.clone(),
        }
    }
}

fn why_not_ready(state: &State) -> &'static str {
    match state {
        State::Discovered(why) | State::Unhealthy { why, .. } => why.summary(),
        State::Probing | State::Ready => "it is starting",
        State::Draining { .. } => "it is stopping",
        State::Gone => "its container has gone",
    }
}

fn rfc3339(time: OffsetDateTime) -> String {
    // Whole milliseconds: nobody reads more.
    let time = time.replace_millisecond(time.millisecond()).unwrap_or(time);
    time.format(&Rfc3339).unwrap_or_default()
}

fn report_problems(endpoint: &Endpoint) {
    for problem in &endpoint.problems {
        tracing::warn!(container = %endpoint.name, "{problem}");
    }
}

/// One line per change, for people.
fn report_state(entry: &Entry) {
    let container = &entry.endpoint.name;
    let in_flight = entry.backend.as_ref().map_or(0, |backend| backend.in_flight());
    match entry.life.state() {
        State::Discovered(why @ (Unfit::HealthStarting | Unfit::Restarting | Unfit::Paused)) => {
            tracing::info!(%container, reason = %why, "not routed");
        }
        State::Discovered(Unfit::Excluded(why)) => tracing::warn!(%container, reason = %why, "not routed"),
        State::Discovered(why) => tracing::warn!(%container, reason = %why, "not routed"),
        State::Probing => tracing::debug!(%container, "asking for its models"),
        State::Ready => {
            let models: Vec<&str> = entry.pools.iter().map(|(object, _)| &*object.id).collect();
            let address = entry.backend.as_ref().map(|backend| backend.spec.addr.to_string());
            tracing::info!(%container, ?models, address, "ready");
        }
        State::Unhealthy { why, .. } => {
            tracing::warn!(%container, reason = %why, in_flight, "no new requests; those in flight go on for a while");
        }
        State::Draining { .. } => tracing::info!(%container, in_flight, "told to stop; draining"),
        State::Gone => tracing::info!(%container, in_flight, "gone"),
    }
}

#[cfg(test)]
mod tests;
