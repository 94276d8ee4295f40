//! The single writer of the control plane: changes, probe answers and time go in; routing tables come out.
//!
//! It owns one [`Lifecycle`] per container and carries out its effects. Nothing else mutates the world, so nothing here
//! needs a lock; requests see its work only through the table and through the gates of backends.

mod verdict;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _};
use time::OffsetDateTime;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;

use self::verdict::{News, Verdict};
use crate::{
    base::{
        config::{Config, SameModel},
        foreign::few,
        phase::{self, Life},
    },
    control::{
        discovery::{Change, Discovery, DiscoveryError, Endpoint, EndpointId, Incarnation, Note, Phase},
        labels,
        lifecycle::{Effect, Event, Lifecycle, State, Unfit},
        probe::{self, Answer, FailureKind, HealthPath, Listing, MODELS_MAX, ProbeHandle, Target},
    },
    observe::status::{
        self, Ask, ContainerStatus, DiscoveryStatus, LastError, ModelStatus, Status,
        events::{Events, Kind, rfc3339},
    },
    pool::{
        backend::{Backend, BackendSpec, Member, Model},
        breaker,
        table::{ModelObject, Route, RoutingTable, TablePublisher},
        tally::Tally,
    },
    telemetry::{
        Telemetry,
        metrics::{Metrics, STATES, TableAction},
        otlp::Tracing,
    },
};

/// How long the connections of an ended container get to deliver what they still hold.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// How long a container that was stopped first is followed by the one in its place: Compose renames, creates, connects and
/// starts meanwhile, for all replicas at a time.
const REPLACED_WITHIN: Duration = Duration::from_secs(10);
/// How long readiness waits for the first answers of containers that run already.
const FIRST_PROBES: Duration = Duration::from_secs(5);
/// Least time between two early refreshes.
const EARLY_REFRESH: Duration = Duration::from_secs(1);
/// How long discovery must see before its last trouble counts as over. Longer than sources wait between attempts, so that
/// trouble that comes and goes is told once.
const SIGHT_SETTLES: Duration = Duration::from_secs(10);
/// Least time between two looks at a container because requests could not connect to it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A container that has answered may be told of once more because it fails as it did before, but not sooner than this.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// How long the loss of a network is not told. Docker >= 28 tells of it before it tells that the container has ended, and a
/// look at the container follows in any case.
const TELL_DETACHED_AFTER: Duration = Duration::from_secs(2);
/// Models that are known after they have gone, of each container: as many as it may have at a time.
const GONE_MAX: usize = MODELS_MAX;
/// Containers to be looked at, on their way.
const LOOKS_MAX: usize = 64;
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
    tracing: Option<Tracing>,
    life: Life,
    tasks: TaskTracker,
    answers: (mpsc::Sender<Answer>, mpsc::Receiver<Answer>),
    /// Containers that discovery is to look at, while it runs.
    looks: Option<mpsc::Sender<EndpointId>>,
    entries: BTreeMap<EndpointId, Entry>,
    models: HashMap<Box<str>, KnownModel>,
    /// Roles whose next container is expected, until when.
    expected: HashMap<Arc<str>, Instant>,
    /// Probes and readiness, numbered in the order in which they began.
    serial: u64,
    dirty: bool,
    first_round: FirstRound,
    early_refresh: EarlyRefresh,
    discovery: Sight,
    started: OffsetDateTime,
    /// What has happened of late, for people.
    events: Events,
}

/// One container.
#[derive(Debug)]
struct Entry {
    endpoint: Endpoint,
    /// What its health check says of this run, all in all.
    verdict: Verdict,
    life: Lifecycle,
    since: OffsetDateTime,
    probe: Option<ProbeHandle>,
    /// When the running probe last answered.
    answered_at: Option<Instant>,
    /// When requests last could not connect to it, and it was looked at for that.
    suspected_at: Option<Instant>,
    /// It has lost its network, which is told then, unless it is known by then that this was only a part of its end.
    detached: Option<Detached>,
    /// What the last probe failed with, and what to do about it; `None` once one has succeeded.
    probe_error: Option<ProbeTrouble>,
    /// Kinds of failures of probes that have been told, how loudly and when: what a container says of itself may be new
    /// each time, and is no news for that.
    told: Vec<(FailureKind, Loud, Instant)>,
    backend: Option<Arc<Backend>>,
    /// What it serves, with its place in each pool. Kept while it is not ready, so that its models stay known.
    pools: Vec<(Arc<ModelObject>, Option<Arc<Member>>)>,
    /// Orders backends by when they became ready.
    ready_serial: u64,
}

/// The loss of a network that has not been told yet.
#[derive(Debug, Clone, Copy)]
struct Detached {
    tell_at: Instant,
    /// Requests that this cut.
    in_flight: u64,
}

/// Why a probe failed.
#[derive(Debug)]
struct ProbeTrouble {
    at: OffsetDateTime,
    reason: String,
    advice: String,
}

/// A model id, as long as somebody announces it or its grace lasts.
#[derive(Debug)]
struct KnownModel {
    model: Arc<Model>,
    gone_at: Option<Instant>,
    /// Who announces it, or did last; one of them.
    announcer: EndpointId,
    /// Roles of those that announce it, or did last.
    roles: Vec<Arc<str>>,
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
    /// Since when it does, or does not.
    since: Option<OffsetDateTime>,
    /// The last trouble, until it is over.
    error: Option<DiscoveryError>,
    /// What is limited, though it sees.
    notes: Vec<Note>,
    /// When it is over, if nothing else comes.
    settles_at: Option<Instant>,
    last_sync: Option<OffsetDateTime>,
}

impl Registry {
    /// A registry that publishes to `publisher`, for `workers` threads that send requests. `life` advances to ready once the
    /// first scan and its probes are done. Tasks it starts are tracked by `tasks`.
    pub fn new(
        config: Arc<Config>,
        workers: usize,
        source: &'static str,
        publisher: TablePublisher,
        Telemetry { metrics, tracing }: Telemetry,
        life: Life,
        tasks: TaskTracker,
    ) -> Registry {
        Registry {
            config,
            workers,
            source,
            publisher,
            metrics,
            tracing,
            life,
            tasks,
            answers: mpsc::channel(ANSWERS_MAX),
            looks: None,
            entries: BTreeMap::new(),
            models: HashMap::new(),
            expected: HashMap::new(),
            serial: 0,
            dirty: false,
            first_round: FirstRound::Unseen,
            early_refresh: EarlyRefresh::default(),
            discovery: Sight::default(),
            started: OffsetDateTime::now_utc(),
            events: Events::default(),
        }
    }

    /// Follows what `discovery` reports and answers `asks`, until either is over; returns which.
    pub async fn run(mut self, discovery: Box<dyn Discovery>, mut asks: mpsc::Receiver<Ask>) -> String {
        let (looks, wanted) = mpsc::channel(LOOKS_MAX);
        self.looks = Some(looks);
        let mut changes = discovery.changes(wanted).fuse();
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
                change = changes.next() => match change {
                    Some(change) => self.on_change(change),
                    None => return format!("its source of containers, {}, has ended", self.source),
                },
                Some(answer) = self.answers.1.recv() => self.on_answer(answer),
                () = sleep => self.on_deadlines(),
                () = self.publisher.missed() => self.on_miss(),
                () = self.publisher.suspected() => self.on_suspects(),
                ask = asks.recv() => match ask {
                    Some(Ask::Status(reply)) => {
                        // Whoever asked may have left.
                        let _ = reply.send(self.status());
                    }
                    None => return "nobody asks it any more".to_owned(),
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
            self.count_states();
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
                    let text = "ran out of memory in one of its processes; it may or may not still work".to_owned();
                    tell(&mut self.events, Loud::Warning, Kind::OutOfMemory, &entry.endpoint.name, text, None);
                }
                self.on_event(&id, Event::OutOfMemory);
            }
            Ok(Change::Ended(id)) => self.on_event(&id, Event::Ended),
            Ok(Change::Notes(notes)) => self.on_notes(notes),
            Err(error) => {
                if self.discovery.error.as_ref() != Some(&error) {
                    tracing::warn!(source = self.source, %error, "discovery cannot see; what is known stays routed");
                    let text = format!("{} cannot be seen, what is known stays routed: {error}", self.source);
                    self.events.push(OffsetDateTime::now_utc(), Kind::DiscoveryLost, None, true, text);
                }
                if let Some(tracing) = self.tracing.as_ref().filter(|_| self.discovery.connected) {
                    tracing.happened("discovery.lost", || vec![("reason", error.to_string())]);
                }
                self.see(false);
                for entry in self.entries.values_mut() {
                    // An engine that is away checks nothing.
                    entry.verdict.interrupted();
                }
                self.discovery.settles_at = None;
                self.discovery.error = Some(error);
            }
        }
    }

    /// Says what is new of what is limited about discovery's sight.
    fn on_notes(&mut self, notes: Vec<Note>) {
        for note in notes.iter().filter(|note| !self.discovery.notes.contains(note)) {
            let needs_doing = note.advice.is_some();
            match needs_doing {
                true => tracing::warn!(source = self.source, "{note}"),
                false => tracing::info!(source = self.source, "{note}"),
            }
            self.events.push(OffsetDateTime::now_utc(), Kind::DiscoveryNote, None, needs_doing, note.what.clone());
        }
        self.discovery.notes = notes;
    }

    fn on_reset(&mut self, endpoints: Vec<Endpoint>) {
        self.see(true);
        if self.discovery.error.is_some() {
            self.discovery.settles_at.get_or_insert(Instant::now() + SIGHT_SETTLES);
        }
        let now = OffsetDateTime::now_utc();
        self.discovery.last_sync = Some(now);
        let ms = u64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
        self.metrics.discovery.last_sync_ms.store(ms, Ordering::Relaxed);
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
            let count = self.entries.len();
            tracing::info!(source = self.source, containers = count, "first scan done");
            let text = format!("first look at {}: {count} containers carry the label inference.enable", self.source);
            self.events.push(OffsetDateTime::now_utc(), Kind::DiscoverySees, None, false, text);
            self.first_round = FirstRound::Probing { waiting, until: Instant::now() + FIRST_PROBES };
        }
    }

    fn on_upsert(&mut self, endpoint: Endpoint) {
        let id = endpoint.id.clone();
        // Sources report in the order in which they saw, so another run is a later one, whatever its time says: clocks are
        // put back.
        let is_another = |entry: &Entry| {
            // A container of which nothing has been learnt but that it is there is still the same once more is known.
            let is_learnt = entry.probe.is_some() || entry.backend.is_some() || !entry.pools.is_empty();
            let was_unknown = entry.endpoint.incarnation == Incarnation::UNKNOWN;
            entry.endpoint.incarnation != endpoint.incarnation && (is_learnt || !was_unknown)
        };
        if self.entries.get(&id).is_some_and(is_another) {
            self.on_event(&id, Event::Ended);
        }
        if endpoint.phase == Phase::Stopped {
            return self.on_event(&id, Event::Ended);
        }
        let is_required = self.config.require_healthcheck;
        let Some(entry) = self.entries.get_mut(&id) else {
            return self.on_found(endpoint);
        };
        let news = match entry.endpoint.is_unread() {
            // What was said of its check before it could be read was nothing.
            true => {
                let (verdict, news) = Verdict::first(endpoint.health, endpoint.health_check, Instant::now());
                entry.verdict = verdict;
                news
            }
            false => entry.verdict.look(endpoint.health, endpoint.health_check, Instant::now()),
        };
        if endpoint.phase != Phase::Running {
            entry.verdict.interrupted();
        }
        report_health(&mut self.events, &endpoint, news);
        let fitness = fitness(&endpoint, &entry.verdict, is_required);
        if entry.endpoint.problems != endpoint.problems {
            report_problems(&mut self.events, &endpoint);
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

    fn on_found(&mut self, endpoint: Endpoint) {
        report_problems(&mut self.events, &endpoint);
        let id = endpoint.id.clone();
        let (verdict, news) = Verdict::first(endpoint.health, endpoint.health_check, Instant::now());
        report_health(&mut self.events, &endpoint, news);
        let fitness = fitness(&endpoint, &verdict, self.config.require_healthcheck);
        let (life, effects) = Lifecycle::found(fitness, self.config.drain_timeout);
        let entry = Entry {
            endpoint,
            verdict,
            life,
            since: OffsetDateTime::now_utc(),
            probe: None,
            answered_at: None,
            suspected_at: None,
            detached: None,
            probe_error: None,
            told: Vec::new(),
            backend: None,
            pools: Vec::new(),
            ready_serial: 0,
        };
        report_state(&mut self.events, &entry);
        self.metrics.transitions.increment(state_name(entry.life.state()));
        trace_state(self.tracing.as_ref(), &entry);
        self.dirty |= entry.life.is_coming();
        self.entries.insert(id.clone(), entry);
        self.apply(&id, effects);
    }

    fn on_event(&mut self, id: &EndpointId, event: Event) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let before = entry.life.state().clone();
        let was_stopped_first = entry.is_stopped_first();
        let in_flight = entry.backend.as_ref().map_or(0, |backend| backend.in_flight());
        let effects = entry.life.on(event, Instant::now());
        if *entry.life.state() != before {
            if *entry.life.state() == State::Ready {
                entry.verdict.was_ready();
            }
            if was_stopped_first && !entry.life.is_coming() {
                self.expected.insert(entry.endpoint.role.clone(), Instant::now() + REPLACED_WITHIN);
            }
            if state_name(entry.life.state()) != state_name(&before) {
                self.metrics.transitions.increment(state_name(entry.life.state()));
            }
            self.dirty = true;
            entry.since = OffsetDateTime::now_utc();
            collect_turns(&mut self.events, entry);
            if *entry.life.state() == State::Discovered(Unfit::Detached) {
                let tell_at = Instant::now() + TELL_DETACHED_AFTER;
                entry.detached = Some(Detached { tell_at, in_flight });
            } else {
                report_state(&mut self.events, entry);
                trace_state(self.tracing.as_ref(), entry);
                entry.detached = None;
            }
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
        self.metrics.probes.observe(answer.took);
        if let Err(error) = &answer.outcome {
            self.metrics.probe_failures.increment(error.reason());
        }
        match answer.outcome {
            Ok(listing) => {
                entry.probe_error = None;
                let now = Instant::now();
                entry.told.retain(|(.., at)| *at + TELL_AGAIN > now);
                self.take_listing(&answer.id, listing);
                self.on_event(&answer.id, Event::ProbeOk);
            }
            Err(error) => {
                let name = &entry.endpoint.name;
                let (kind, reason, advice) = (error.kind(), error.to_string(), error.advice(name));
                let (loud, text) = match entry.life.state() {
                    State::Ready => (Loud::Warning, format!("is live, but does not tell its models: {reason}")),
                    _ => (Loud::Info, format!("is not live yet, it is asked until it answers: {reason}")),
                };
                if !entry.told.iter().any(|(known, how, _)| (*known, *how) == (kind, loud)) {
                    // Most that do not answer are still loading, and need no advice.
                    let advice = (!error.may_be_loading()).then_some(&*advice);
                    tell(&mut self.events, loud, Kind::ProbeFailed, name, text, advice);
                    entry.told.push((kind, loud, Instant::now()));
                }
                entry.probe_error = Some(ProbeTrouble { at: OffsetDateTime::now_utc(), reason, advice });
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
        self.look_at_overdue(now);
        for entry in self.entries.values_mut() {
            if entry.detached.is_some_and(|detached| detached.tell_at <= now) {
                report_state(&mut self.events, entry);
                trace_state(self.tracing.as_ref(), entry);
                entry.detached = None;
            }
        }
        if self.discovery.settles_at.is_some_and(|at| at <= now) {
            self.discovery.settles_at = None;
            self.discovery.error = None;
            tracing::info!(source = self.source, "discovery sees again");
            let text = format!("{} is seen again", self.source);
            self.events.push(OffsetDateTime::now_utc(), Kind::DiscoverySees, None, false, text);
        }
        if self.early_refresh.due.is_some_and(|at| at <= now) {
            self.refresh_all(now);
        }
        let before = self.expected.len();
        self.expected.retain(|_, until| *until > now);
        self.dirty |= self.expected.len() < before;
        // A model whose grace is over goes with the next table.
        let grace = self.config.model_grace;
        self.dirty |= self.models.values().any(|known| known.gone_at.is_some_and(|gone| gone + grace <= now));
    }

    /// Health checks that keep a container out, and that should have said something by now: a look tells whether they have.
    fn look_at_overdue(&mut self, now: Instant) {
        for (id, entry) in &mut self.entries {
            if entry.verdict.due_at().is_some_and(|at| at <= now) {
                entry.verdict.asked();
                if let Some(looks) = &self.looks {
                    // If the queue is full, discovery looks at it with all others.
                    let _ = looks.try_send(id.clone());
                }
            }
        }
    }

    fn on_miss(&mut self) {
        let now = Instant::now();
        match self.early_refresh.last {
            Some(last) if last + EARLY_REFRESH > now => self.early_refresh.due = Some(last + EARLY_REFRESH),
            _ => self.refresh_all(now),
        }
    }

    /// Backends could not be connected to: their containers are looked at and probed out of turn.
    fn on_suspects(&mut self) {
        let now = Instant::now();
        for (id, entry) in &mut self.entries {
            let Some(backend) = &entry.backend else { continue };
            // As long as nobody can connect, everybody says so.
            if !backend.take_suspicion() || entry.suspected_at.is_some_and(|at| at + LOOK_AGAIN > now) {
                continue;
            }
            entry.suspected_at = Some(now);
            if let Some(probe) = &entry.probe {
                probe.nudge();
            }
            if let Some(looks) = &self.looks {
                // If the queue is full, others are looked at first, and this one will be refused again.
                let _ = looks.try_send(id.clone());
            }
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
                        if matches!(entry.life.state(), State::Draining { .. }) {
                            self.tasks.spawn(time_drain(backend.clone(), self.metrics.clone()));
                        }
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
        let health = match &labels.health_path {
            Some(path) => HealthPath::Required(path.clone()),
            None if entry.verdict.is_own() => HealthPath::Usual,
            None => HealthPath::None,
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
                image: entry.endpoint.image.clone(),
                addr: listing.addr,
                base_path: labels.base_path.clone(),
                weight: labels.weight,
                max_inflight: labels.max_inflight,
            };
            Backend::new(spec, self.config.connect_timeout, self.workers, Instant::now())
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
                    announcer: id.clone(),
                    roles: Vec::new(),
                    warned: Vec::new(),
                });
                Member::new(backend.clone(), known.model.clone())
            });
            (object, Some(member))
        });
        entry.pools = pools.collect();
        if *entry.life.state() == State::Ready {
            let text = format!("has other models now: {}", few(&entry.models()));
            tell(&mut self.events, Loud::Info, Kind::Models, &entry.endpoint.name, text, None);
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
                    _ => {
                        pool.why_not_ready = Some(why_not_ready(entry.life.state()));
                        pool.is_coming |= entry.life.is_coming();
                    }
                }
                pool.announcer = Some(&entry.endpoint.id);
                pool.roles.push(&entry.endpoint.role);
            }
        }
        // What a container that starts will serve is told by itself only when it does: perhaps what another one of its role
        // has left.
        let is_starting = |entry: &Entry| entry.pools.is_empty() && entry.life.is_coming();
        let expected = self.expected.keys().map(|role| &**role);
        let starting: HashSet<&str> = self
            .entries
            .values()
            .filter(|entry| is_starting(entry) || entry.is_stopped_first())
            .map(|entry| &*entry.endpoint.role)
            .chain(expected)
            .collect();
        let grace = self.config.model_grace;
        let mut forgotten = Vec::new();
        self.models.retain(|id, known| {
            if let Some(announcer) = pools.get(&**id).and_then(|pool| pool.announcer) {
                known.gone_at = None;
                known.announcer.clone_from(announcer);
                return true;
            }
            let stays = *known.gone_at.get_or_insert(now) + grace > now;
            if !stays {
                forgotten.push(known.model.clone());
            }
            stays
        });
        forgotten.extend(surplus(&mut self.models));
        let mut routes = Vec::with_capacity(self.models.len());
        for (id, known) in &mut self.models {
            let mut pool = pools.remove(&**id).unwrap_or_default();
            if !pool.roles.is_empty() && !known.roles.iter().eq(pool.roles.iter().copied()) {
                known.roles = pool.roles.iter().copied().cloned().collect();
            }
            let is_replaced = known.roles.iter().any(|role| starting.contains(&**role));
            pool.ready.sort_by_key(|(entry, ..)| entry.ready_serial);
            known.warn_of_differences(&pool, &mut self.events);
            if self.config.same_model == SameModel::Newest && pool.ready.len() > 1 {
                pool.ready.drain(..pool.ready.len() - 1);
            }
            routes.push(Route {
                model: known.model.clone(),
                object: pool.ready.first().map(|(_, object, _)| (*object).clone()),
                members: pool.ready.iter().map(|(_, _, member)| (*member).clone()).collect(),
                why_not_ready: pool.why_not_ready.unwrap_or("its container has gone"),
                is_coming: pool.is_coming || is_replaced,
            });
        }
        let backends = self.entries.values().filter_map(|entry| entry.backend.clone()).collect();
        let serving = self.entries.values().filter(|entry| entry.backend.is_some());
        let members = serving.flat_map(|entry| entry.pools.iter().filter_map(|(_, member)| member.clone())).collect();
        self.publisher.publish(RoutingTable::new(routes, backends, members));
        // Only now: whoever has begun to wait meanwhile may have seen the old table.
        let known = self.models.values().map(|known| &known.model);
        for model in known.chain(&forgotten) {
            model.waiting.call();
        }
    }

    fn check_first_round(&mut self) {
        if let FirstRound::Probing { waiting, until } = &mut self.first_round {
            waiting.retain(|id| self.entries.get(id).is_some_and(|entry| entry.probe.is_some()));
            if waiting.is_empty() || *until <= Instant::now() {
                self.first_round = FirstRound::Done;
                self.life.advance(phase::Phase::Ready);
                let live = self.models.values().filter(|known| known.gone_at.is_none()).count();
                tracing::info!(models = live, "ready");
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let grace = self.config.model_grace;
        let of_entry = |entry: &Entry| {
            let tell_at = entry.detached.map(|detached| detached.tell_at);
            [entry.life.deadline(), entry.verdict.due_at(), tell_at]
        };
        let lives = self.entries.values().flat_map(of_entry).flatten();
        let graces = self.models.values().filter_map(|known| Some(known.gone_at? + grace));
        let first_round = match &self.first_round {
            FirstRound::Probing { until, .. } => Some(*until),
            FirstRound::Unseen | FirstRound::Done => None,
        };
        let settles = self.discovery.settles_at;
        let expected = self.expected.values().copied();
        lives.chain(graces).chain(expected).chain(self.early_refresh.due).chain(first_round).chain(settles).min()
    }

    fn see(&mut self, connected: bool) {
        self.discovery.turn(connected);
        self.metrics.discovery.connected.store(connected, Ordering::Relaxed);
    }

    fn count_states(&self) {
        for state in STATES {
            let count = self.entries.values().filter(|entry| state_name(entry.life.state()) == *state).count();
            self.metrics.backends.set(state, count as u64);
        }
    }

    fn status(&mut self) -> Status {
        let (now, at) = (Instant::now(), OffsetDateTime::now_utc());
        for entry in self.entries.values() {
            collect_turns(&mut self.events, entry);
        }
        let mut containers: Vec<ContainerStatus> = self.entries.values().map(|entry| entry.status(now, at)).collect();
        containers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Status {
            version: status::VERSION,
            proxy_version: env!("CARGO_PKG_VERSION").to_owned(),
            at: rfc3339(at),
            started: rfc3339(self.started),
            ready: self.life.phase() >= phase::Phase::Ready,
            stopping: false,
            discovery: DiscoveryStatus {
                source: self.source.to_owned(),
                connected: self.discovery.connected,
                since: self.discovery.since.map(rfc3339),
                last_sync: self.discovery.last_sync.map(rfc3339),
                error: self.discovery.error.as_ref().map(|error| error.what.clone()),
                advice: self.discovery.error.as_ref().map(|error| error.advice.clone()),
                notes: self.discovery.notes.iter().map(ToString::to_string).collect(),
            },
            models: self.model_statuses(),
            containers,
            events: self.events.latest(),
        }
    }

    fn model_statuses(&self) -> Vec<ModelStatus> {
        let table = self.publisher.current();
        let mut in_flight: HashMap<&str, u64> = HashMap::new();
        for member in table.members() {
            *in_flight.entry(&member.model.id).or_default() += member.in_flight() as u64;
        }
        let of_route = |route: &&Route| {
            let ready = !route.members.is_empty();
            let mut replicas: Vec<String> =
                route.members.iter().map(|member| member.backend.spec.name.clone()).collect();
            replicas.sort();
            ModelStatus {
                id: route.model.id.to_string(),
                ready,
                reason: (!ready).then(|| route.why_not_ready.to_owned()),
                replicas,
                in_flight: in_flight.get(&*route.model.id).copied().unwrap_or(0),
                waiting: route.model.waiting.len() as u64,
            }
        };
        table.routes().iter().map(of_route).collect()
    }
}

/// Who serves one model, while a table is made.
#[derive(Debug, Default)]
struct Pool<'e> {
    ready: Vec<(&'e Entry, &'e Arc<ModelObject>, &'e Arc<Member>)>,
    why_not_ready: Option<&'static str>,
    is_coming: bool,
    announcer: Option<&'e EndpointId>,
    roles: Vec<&'e Arc<str>>,
}

/// Takes out what is too much: where one container has left more than [`GONE_MAX`] models, those that went first. A
/// container that has others with every answer is remembered for no more than that, and at nobody else's cost.
fn surplus(models: &mut HashMap<Box<str>, KnownModel>) -> Vec<Arc<Model>> {
    let mut gone: HashMap<&EndpointId, Vec<(Instant, &str)>> = HashMap::new();
    for (id, known) in &*models {
        if let Some(at) = known.gone_at {
            gone.entry(&known.announcer).or_default().push((at, id));
        }
    }
    let mut ids: Vec<Box<str>> = Vec::new();
    for mut of_one in gone.into_values().filter(|of_one| of_one.len() > GONE_MAX) {
        of_one.sort_unstable_by(|a, b| b.cmp(a));
        ids.extend(of_one.drain(GONE_MAX..).map(|(_, id)| id.into()));
    }
    ids.iter().filter_map(|id| models.remove(id)).map(|known| known.model).collect()
}

/// Whether a container may be probed, as it was seen last. `is_required`: it must have a health check.
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

// === impl KnownModel ===

impl KnownModel {
    /// Replicas should be replicas. Says so once per group when they are not.
    fn warn_of_differences(&mut self, pool: &Pool<'_>, events: &mut Events) {
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
                let text = format!(
                    "announces {} as {} does, but they differ in {}; they share its traffic unless \
                     PROXY_SAME_MODEL=newest",
                    self.model.id,
                    first.endpoint.name,
                    what.join(", ")
                );
                let name = Some(other.endpoint.name.as_str());
                events.push(OffsetDateTime::now_utc(), Kind::Differs, name, true, text);
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

    /// It has been told to stop, and may be so that another one can take its place.
    fn is_stopped_first(&self) -> bool {
        self.endpoint.is_stopped_first && matches!(self.life.state(), State::Draining { .. })
    }

    fn models(&self) -> Vec<&str> {
        self.pools.iter().map(|(object, _)| &*object.id).collect()
    }

    /// Why it gets no requests, and what to do about that.
    fn explained(&self) -> (Option<String>, Option<String>) {
        let name = &self.endpoint.name;
        let told = |why: &Unfit| (Some(why.to_string()), Some(why.advice(name)));
        match self.life.state() {
            State::Discovered(why) | State::Unhealthy { why, .. } => told(why),
            State::Probing => match &self.probe_error {
                Some(error) => (Some(error.reason.clone()), Some(error.advice.clone())),
                None => (Some("it is being asked for its models".to_owned()), None),
            },
            State::Ready if self.backend.as_ref().is_some_and(|b| b.breaker.state() != breaker::State::Closed) => {
                let reason = "requests to it kept failing, so it rests (its circuit breaker is open)".to_owned();
                (Some(reason), Some(format!("see what it is doing: docker logs {name}")))
            }
            State::Ready | State::Gone => (None, None),
            State::Draining { .. } => (Some("it was told to stop; what is in flight may finish".to_owned()), None),
        }
    }

    /// What is odd about it, whether it is routed or not.
    fn problems(&self) -> Vec<String> {
        let mut problems = self.endpoint.problems.clone();
        if self.verdict.is_overdue() {
            problems.push(format!("{OVERDUE}; {}", overdue_advice(&self.endpoint.name)));
        }
        problems
    }

    fn status(&self, now: Instant, at: OffsetDateTime) -> ContainerStatus {
        let (reason, advice) = self.explained();
        let reach = self.endpoint.reach.as_ref().ok();
        let backend = self.backend.as_deref();
        let tally = backend.map(|backend| &backend.tally);
        let address = backend.map(|b| b.spec.addr).or_else(|| reach.and_then(|r| r.targets.first().copied()));
        let probe_error = self.probe_error.as_ref().map(|error| (error.at, error.reason.clone()));
        let trouble = tally.and_then(|tally| tally.last_trouble(now)).map(|(what, ago)| (at - ago, what.to_string()));
        let last_error = probe_error.into_iter().chain(trouble).max_by_key(|(at, _)| *at);
        let waiting = self.pools.iter().filter_map(|(_, member)| member.as_ref()).map(|m| m.model.waiting.len() as u64);
        ContainerStatus {
            id: self.endpoint.id.to_string(),
            name: self.endpoint.name.clone(),
            image: self.endpoint.image.clone(),
            state: state_name(self.life.state()).to_owned(),
            since: rfc3339(self.since),
            reason,
            advice,
            models: self.models().into_iter().map(str::to_owned).collect(),
            address: address.map(|addr| addr.to_string()),
            network: address
                .zip(reach)
                .and_then(|(addr, r)| r.network_of(addr.ip()))
                .map(|network| network.name.clone()),
            in_flight: backend.map_or(0, Backend::in_flight),
            max_inflight: self.endpoint.labels.max_inflight.map(std::num::NonZeroU32::get),
            weight: f64::from(self.endpoint.labels.weight.get()) / f64::from(labels::WEIGHT_ONE.get()),
            waiting: waiting.sum(),
            ttft_ms: tally.and_then(|tally| tally.mean_first_token(now)).map(|mean| mean.as_millis() as u64),
            latency_ms: backend.and_then(|b| b.latency.read(now)).map(|reading| tenths(reading.seconds * 1000.0)),
            tokens_per_second: tally.map_or(0.0, |tally| tenths(tally.tokens_per_second(now))),
            breaker: backend.map(|backend| backend.breaker.state().as_str().to_owned()),
            served: tally.map_or(0, Tally::served),
            failed: tally.map_or(0, Tally::failed),
            turned_away: tally.map_or(0, Tally::turned_away),
            last_error: last_error.map(|(at, text)| LastError { at: rfc3339(at), text }),
            problems: self.problems(),
        }
    }
}

/// More digits say nothing to people, and would make every status a new one.
fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

// === impl Sight ===

impl Sight {
    /// It sees now, or does not.
    fn turn(&mut self, connected: bool) {
        if self.since.is_none() || self.connected != connected {
            self.since = Some(OffsetDateTime::now_utc());
        }
        self.connected = connected;
    }
}

/// Times a drain to the end of its last request. That comes: what is in flight when the drain is over is cut.
async fn time_drain(backend: Arc<Backend>, metrics: Arc<Metrics>) {
    let began = Instant::now();
    backend.drained().await;
    metrics.drains.observe(began.elapsed());
}

/// One of [`STATES`].
fn state_name(state: &State) -> &'static str {
    match state {
        State::Discovered(_) => "discovered",
        State::Probing => "probing",
        State::Ready => "ready",
        State::Unhealthy { .. } => "unhealthy",
        State::Draining { .. } => "draining",
        State::Gone => "gone",
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

// === words for people ===

/// How much attention a line of the log asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loud {
    Debug,
    Info,
    Warning,
}

/// Says what has happened to a container: one line of the log, one event of the status, in the same words. `text` goes
/// on after the container's name; `advice` is for the log, as the status has it beside the container.
fn tell(events: &mut Events, loud: Loud, kind: Kind, container: &str, text: String, advice: Option<&str>) {
    let (then, advice) = advice.map_or(("", ""), |advice| ("; ", advice));
    match loud {
        Loud::Debug => tracing::debug!(%container, "{container} {text}{then}{advice}"),
        Loud::Info => tracing::info!(%container, "{container} {text}{then}{advice}"),
        Loud::Warning => tracing::warn!(%container, "{container} {text}{then}{advice}"),
    }
    events.push(OffsetDateTime::now_utc(), kind, Some(container), loud == Loud::Warning, text);
}

fn report_problems(events: &mut Events, endpoint: &Endpoint) {
    for problem in &endpoint.problems {
        tell(events, Loud::Warning, Kind::Label, &endpoint.name, format!("has a label that is wrong: {problem}"), None);
    }
}

const OVERDUE: &str = "its health check is overdue: what it said last is not believed, the proxy's own probe decides";

fn overdue_advice(container: &str) -> String {
    format!("see whether it hangs: docker inspect -f '{{{{json .State.Health}}}}' {container}")
}

fn report_health(events: &mut Events, endpoint: &Endpoint, news: Option<News>) {
    if endpoint.is_unread() {
        return; // its check says nothing because nothing of it is known
    }
    let container = endpoint.name.as_str();
    let advice = overdue_advice(container);
    let (loud, text, advice) = match news {
        None => return,
        Some(News::UnknownWord) => {
            let text = "has a health that this proxy has no word for: its own probe, or the last verdict, decides";
            (Loud::Info, text.to_owned(), None)
        }
        Some(News::Overdue) => (Loud::Warning, format!("is not checked any more: {OVERDUE}"), Some(&*advice)),
        Some(News::ChecksAgain) => (Loud::Info, "is checked again: its health check counts".to_owned(), None),
    };
    tell(events, loud, Kind::HealthCheck, container, text, advice);
}

/// One line per change, for people.
fn report_state(events: &mut Events, entry: &Entry) {
    let name = &entry.endpoint.name;
    let cut = entry.detached.map_or(0, |detached| detached.in_flight);
    let in_flight = entry.backend.as_ref().map_or(cut, |backend| backend.in_flight());
    let flying = match in_flight {
        0 => String::new(),
        1 => " (1 in flight may finish)".to_owned(),
        n => format!(" ({n} in flight may finish)"),
    };
    let mut advice = None;
    let (loud, kind, text) = match entry.life.state() {
        State::Discovered(why @ (Unfit::HealthStarting | Unfit::Restarting | Unfit::Paused)) => {
            (Loud::Info, Kind::NotRouted, format!("is not routed yet: {why}"))
        }
        State::Discovered(why) => {
            advice = Some(why.advice(name));
            (Loud::Warning, Kind::NotRouted, format!("is not routed: {why}"))
        }
        State::Probing => (Loud::Debug, Kind::Probing, "is being asked for its models".to_owned()),
        State::Ready => {
            let at = entry.backend.as_ref().map(|backend| format!(" at {}", backend.spec.addr)).unwrap_or_default();
            (Loud::Info, Kind::Ready, format!("is live{at} with {}", few(&entry.models())))
        }
        State::Unhealthy { why, .. } => {
            advice = Some(why.advice(name));
            (Loud::Warning, Kind::Unhealthy, format!("gets no new requests{flying}: {why}"))
        }
        State::Draining { .. } => {
            (Loud::Info, Kind::Draining, format!("was told to stop: it gets no new requests{flying}"))
        }
        State::Gone if in_flight > 0 => {
            (Loud::Warning, Kind::Gone, format!("has ended with requests in flight ({in_flight})"))
        }
        State::Gone => (Loud::Info, Kind::Gone, "has ended".to_owned()),
    };
    tell(events, loud, kind, name, text, advice.as_deref());
}

/// What requests have noticed of a backend's breaker since somebody asked last; the log has it already.
fn collect_turns(events: &mut Events, entry: &Entry) {
    let Some(backend) = &entry.backend else { return };
    let (now, at) = (Instant::now(), OffsetDateTime::now_utc());
    for turn in backend.tally.take_turns() {
        let (kind, text) = match turn.opened {
            true => (Kind::BreakerOpen, "keeps failing: it gets no requests for now (its circuit breaker is open)"),
            false => (Kind::BreakerClosed, "answers again: it gets requests (its circuit breaker is closed)"),
        };
        let then = at - now.saturating_duration_since(turn.at);
        events.push(then, kind, Some(&entry.endpoint.name), turn.opened, text.to_owned());
    }
}

/// The same for traces, where there are any.
fn trace_state(tracing: Option<&Tracing>, entry: &Entry) {
    let Some(tracing) = tracing else { return };
    let (endpoint, state) = (&entry.endpoint, state_name(entry.life.state()));
    tracing.happened(format_args!("backend.{state}"), || {
        let reason = entry.explained().0.map(|reason| ("reason", reason));
        let facts = [
            ("container.id", endpoint.id.to_string()),
            ("container.name", endpoint.name.clone()),
            ("container.image.name", endpoint.image.clone()),
            ("backend.state", state.to_owned()),
            ("models", few(&entry.models())),
        ];
        facts.into_iter().chain(reason).collect()
    });
}

#[cfg(test)]
mod tests;
