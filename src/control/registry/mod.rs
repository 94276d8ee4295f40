//! The single writer of the control plane: changes, probe answers and time go in; routing tables come out.
//!
//! The registry owns one [`Lifecycle`](super::lifecycle::Lifecycle) per container and carries out its effects. It is the only task that changes them, so
//! nothing here needs a lock; requests see its work only through the table and through the gates of backends.
//!
//! This page is the loop with its inputs and effects. `verdict` judges health checks, `entry` is one container,
//! `pools` decides what is routed, `rounds` when all containers are asked, `source` follows what discovery says of
//! itself; `effects` carries out the decisions of a life, `status` and `news` put all of it into words.

mod verdict;
mod entry;
mod pools;
mod rounds;
mod source;
mod effects;
mod status;
mod news;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering},
};

use futures::{FutureExt as _, StreamExt as _};
use time::OffsetDateTime;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::task::TaskTracker;

use self::{
    effects::Executor,
    entry::{Entry, Found, Look},
    news::News,
    pools::{Known, Policy, Replica, Routes},
    rounds::{EarlyRefresh, FirstRound},
    source::Source,
};
use crate::{
    base::{
        config::Config,
        phase::{self, Life},
    },
    control::{
        discovery::{Change, Discovery, DiscoveryError, Endpoint, EndpointId, Phase},
        lifecycle::{Event, State, Unfit},
        probe::Answer,
    },
    observe::status::{Ask, Status},
    pool::table::{ModelObject, RoutingTable, TablePublisher},
    telemetry::{
        Telemetry,
        kinds::{ContainerState, Named as _, TableAction},
        metrics::Metrics,
    },
};

/// Most requests to discovery to look at a container that may be under way.
const LOOKS_MAX: usize = 64;
/// Most probe answers that may be under way.
const ANSWERS_MAX: usize = 256;

/// The writer. [`Registry::run`] is its life.
#[derive(Debug)]
pub(crate) struct Registry {
    config: Arc<Config>,
    /// Threads that send requests.
    workers: usize,
    publisher: TablePublisher,
    metrics: Arc<Metrics>,
    /// The life of the process, which becomes ready when the first round of probes is done.
    life: Life,
    executor: Executor,
    answers: mpsc::Receiver<Answer>,
    /// Asks discovery to look at containers, while discovery runs.
    looks: Option<mpsc::Sender<EndpointId>>,
    entries: BTreeMap<EndpointId, Entry>,
    known: Known,
    /// The routing table must be made anew.
    dirty: bool,
    first_round: FirstRound,
    early_refresh: EarlyRefresh,
    source: Source,
    started: OffsetDateTime,
    news: News,
}

impl Registry {
    /// A registry that publishes to `publisher`, for `workers` threads that send requests. `source` is the name of its
    /// discovery. `life` becomes ready once the first scan and its probes are done. Tasks it starts are tracked by `tasks`.
    pub(crate) fn new(
        config: Arc<Config>,
        workers: usize,
        source: &'static str,
        publisher: TablePublisher,
        Telemetry { metrics, tracing }: Telemetry,
        life: Life,
        tasks: TaskTracker,
    ) -> Registry {
        let (sender, answers) = mpsc::channel(ANSWERS_MAX);
        Registry {
            executor: Executor::new(config.clone(), metrics.clone(), tasks, sender),
            config,
            workers,
            publisher,
            metrics,
            life,
            answers,
            looks: None,
            entries: BTreeMap::new(),
            known: Known::default(),
            dirty: false,
            first_round: FirstRound::Unseen,
            early_refresh: EarlyRefresh::default(),
            source: Source::new(source),
            started: OffsetDateTime::now_utc(),
            news: News::new(tracing),
        }
    }

    /// Follows the changes that `discovery` reports and answers `asks`, until either is over; returns which.
    pub(crate) async fn run(mut self, discovery: Box<dyn Discovery>, mut asks: mpsc::Receiver<Ask>) -> String {
        let (looks, wanted) = mpsc::channel(LOOKS_MAX);
        self.looks = Some(looks);
        let mut changes = discovery.changes(wanted).fuse();
        loop {
            let deadline = self.next_deadline();
            tokio::select! {
                biased;
                // Changes first, because a stop notice must not wait behind probe answers.
                change = changes.next() => match change {
                    Some(change) => self.on_change(change),
                    None => return format!("its source of containers, {}, has ended", self.source.name),
                },
                Some(answer) = self.answers.recv() => self.on_answer(answer),
                () = sleep_to(deadline) => self.on_deadlines(),
                () = self.publisher.missed() => self.on_miss(),
                () = self.publisher.suspected() => self.on_suspects(),
                ask = asks.recv() => match ask {
                    Some(Ask::Status(reply)) => {
                        // This fails if the asker has left meanwhile.
                        let _ = reply.send(self.status());
                    }
                    None => return "nobody asks it any more".to_owned(),
                },
            }
            // Changes and answers that are there already go into the same table.
            while let Some(Some(change)) = changes.next().now_or_never() {
                self.on_change(change);
            }
            while let Ok(answer) = self.answers.try_recv() {
                self.on_answer(answer);
            }
            if std::mem::take(&mut self.dirty) {
                self.publish();
            }
            self.check_first_round();
            self.count_states();
        }
    }

    // --- inputs: discovery ---

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
                    self.news.out_of_memory(&entry.endpoint);
                }
                self.on_event(&id, Event::OutOfMemory);
            }
            Ok(Change::Ended(id)) => self.on_event(&id, Event::Ended),
            Ok(Change::Notes(notes)) => {
                for note in self.source.note(notes) {
                    self.news.source_noted(self.source.name, &note);
                }
            }
            Err(error) => self.on_loss(error),
        }
    }

    /// Discovery cannot see. All routes stay.
    fn on_loss(&mut self, error: DiscoveryError) {
        let loss = self.source.failed(error.clone(), OffsetDateTime::now_utc());
        if loss.is_new {
            self.news.source_lost(self.source.name, &error);
        }
        if loss.was_connected {
            self.news.trace_source_lost(&error);
        }
        self.metrics.discovery.connected.store(false, Ordering::Relaxed);
        for entry in self.entries.values_mut() {
            // An engine that is away runs no health checks.
            entry.verdict.interrupted();
        }
    }

    fn on_reset(&mut self, endpoints: Vec<Endpoint>) {
        let at = OffsetDateTime::now_utc();
        self.source.listed(Instant::now(), at);
        let ms = u64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
        self.metrics.discovery.connected.store(true, Ordering::Relaxed);
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
            self.news.first_scan(self.source.name, self.entries.len());
            // Containers that were seen first may have answered while the others were looked at.
            let unanswered = self.entries.iter().filter(|(_, entry)| entry.is_unanswered());
            self.first_round.begin(unanswered.map(|(id, _)| id.clone()).collect(), Instant::now());
        }
    }

    fn on_upsert(&mut self, endpoint: Endpoint) {
        let id = endpoint.id.clone();
        // Sources report in the order in which they saw, so another run is a later one, even if its time is an earlier one:
        // clocks are put back.
        if self.entries.get(&id).is_some_and(|entry| entry.is_another_run(&endpoint)) {
            self.on_event(&id, Event::Ended);
        }
        if endpoint.phase == Phase::Stopped {
            return self.on_event(&id, Event::Ended);
        }
        let Some(entry) = self.entries.get_mut(&id) else {
            return self.on_found(endpoint);
        };
        let Look { health_news, has_new_problems, has_moved } = entry.look(endpoint, Instant::now());
        self.news.health(&entry.endpoint, health_news);
        if has_new_problems {
            self.news.problems(&entry.endpoint);
        }
        let fitness = entry.fitness(self.config.require_healthcheck);
        if has_moved {
            // Another container may answer at the old address.
            self.on_event(&id, Event::Detached);
        }
        self.on_event(&id, Event::Seen(fitness));
    }

    fn on_found(&mut self, endpoint: Endpoint) {
        let id = endpoint.id.clone();
        let Found { entry, health_news, effects } = Entry::found(endpoint, &self.config);
        self.news.problems(&entry.endpoint);
        self.news.health(&entry.endpoint, health_news);
        self.news.state(&entry);
        self.metrics.transitions.increment(entry.life.state().kind());
        self.dirty |= entry.life.is_coming();
        let entry = self.entries.entry(id).or_insert(entry);
        self.dirty |= self.executor.apply(entry, effects);
    }

    /// Takes one container through one step of its life.
    fn on_event(&mut self, id: &EndpointId, event: Event) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let before = entry.life.state().clone();
        let was_stopped_first = entry.is_stopped_first();
        let in_flight = entry.in_flight();
        let now = Instant::now();
        let effects = entry.life.on(event, now);
        if *entry.life.state() != before {
            if entry.is_ready() {
                entry.verdict.became_ready();
            }
            if was_stopped_first && !entry.life.is_coming() {
                self.known.expect(entry.endpoint.role.clone(), now);
            }
            if entry.life.state().kind() != before.kind() {
                self.metrics.transitions.increment(entry.life.state().kind());
            }
            self.dirty = true;
            entry.since = OffsetDateTime::now_utc();
            self.news.breaker_turns(entry);
            if *entry.life.state() == State::Discovered(Unfit::Detached) {
                entry.network_lost(in_flight, now);
            } else {
                self.news.state(entry);
                entry.lost_network = None;
            }
            if before == State::Ready {
                self.metrics.table_updates.increment(TableAction::Remove);
            }
        }
        self.dirty |= self.executor.apply(entry, effects);
        if *entry.life.state() == State::Gone {
            self.entries.remove(id);
        }
    }

    // --- inputs: probes, time, requests ---

    fn on_answer(&mut self, answer: Answer) {
        let Some(entry) = self.entries.get_mut(&answer.id) else {
            return;
        };
        let is_current = entry.probe.as_ref().is_some_and(|probe| probe.serial == answer.serial);
        if !is_current || entry.endpoint.incarnation != answer.incarnation {
            return; // about an earlier run, or an earlier probe of this one
        }
        self.first_round.answered(&answer.id);
        let now = Instant::now();
        entry.answered_at = Some(now);
        self.metrics.probes.observe(answer.took);
        match answer.outcome {
            Ok(listing) => {
                entry.probe_succeeded(now);
                let model = |object: &ModelObject| self.known.model(object, &answer.id);
                let has_changed = entry.take_listing(listing, &self.config, self.workers, model);
                if has_changed && entry.is_ready() {
                    self.news.models(entry);
                    self.metrics.table_updates.increment(TableAction::Update);
                    self.dirty = true;
                }
                self.on_event(&answer.id, Event::ProbeOk);
            }
            Err(error) => {
                self.metrics.probe_failures.increment(error.counted_as());
                if entry.probe_failed(&error, now) {
                    self.news.probe_failed(entry, &error);
                }
                self.on_event(&answer.id, Event::ProbeFailed { refused: error.refused() });
            }
        }
    }

    fn on_deadlines(&mut self) {
        let now = Instant::now();
        let due = self.entries.values().filter(|entry| entry.life.deadline().is_some_and(|at| at <= now));
        let due: Vec<EndpointId> = due.map(|entry| entry.endpoint.id.clone()).collect();
        for id in due {
            self.on_event(&id, Event::Deadline);
        }
        for entry in self.entries.values_mut() {
            entry.look_if_overdue(self.looks.as_ref(), now);
            if entry.lost_network.is_some_and(|lost| lost.report_at <= now) {
                self.news.state(entry);
                entry.lost_network = None;
            }
        }
        if self.source.settles(now) {
            self.news.source_sees(self.source.name);
        }
        if self.early_refresh.due.is_some_and(|at| at <= now) {
            self.refresh_all(now);
        }
        self.dirty |= self.known.expire(self.config.model_grace, now);
    }

    /// A request named a model that no backend has announced: some backend may have loaded it since it was last asked.
    fn on_miss(&mut self) {
        let now = Instant::now();
        if self.early_refresh.missed(now) {
            self.refresh_all(now);
        }
    }

    /// Requests could not connect to some backends.
    fn on_suspects(&mut self) {
        let now = Instant::now();
        for entry in self.entries.values_mut() {
            entry.suspect(self.looks.as_ref(), now);
        }
    }

    /// Asks every ready backend out of turn, except those that have just answered.
    fn refresh_all(&mut self, now: Instant) {
        self.early_refresh.begin(now);
        for entry in self.entries.values().filter(|entry| entry.is_ready()) {
            if let Some(probe) = &entry.probe
                && self.early_refresh.asks(entry.answered_at, now)
            {
                probe.nudge();
            }
        }
    }

    // --- outputs ---

    fn publish(&mut self) {
        let replicas: Vec<Replica<'_>> = self.entries.values().map(Replica::from).collect();
        let policy = Policy { same_model: self.config.same_model, grace: self.config.model_grace };
        let Routes { routes, forgotten, differences } =
            pools::routes(&replicas, &mut self.known, policy, Instant::now());
        for difference in &differences {
            self.news.differs(difference);
        }
        let backends = self.entries.values().filter_map(|entry| entry.backend.clone()).collect();
        let serving = self.entries.values().filter(|entry| entry.backend.is_some());
        let members = serving.flat_map(|entry| entry.offers.iter().filter_map(|offer| offer.member.clone())).collect();
        self.publisher.publish(RoutingTable::new(routes, backends, members));
        // Only now, because a request that has joined a queue meanwhile may have seen the old table.
        for model in self.known.models().chain(&forgotten) {
            model.waiting.call();
        }
    }

    fn check_first_round(&mut self) {
        let is_asked = |id: &EndpointId| self.entries.get(id).is_some_and(|entry| entry.probe.is_some());
        if self.first_round.ends(is_asked, Instant::now()) {
            self.life.advance(phase::Phase::Ready);
            tracing::info!(models = self.known.announced(), "ready");
        }
    }

    /// When [`Registry::on_deadlines`] has something to do.
    fn next_deadline(&self) -> Option<Instant> {
        let lives = self.entries.values().flat_map(Entry::deadlines);
        let others = [self.early_refresh.due, self.first_round.deadline(), self.source.settles_at];
        lives.chain(others).flatten().chain(self.known.deadlines(self.config.model_grace)).min()
    }

    fn count_states(&self) {
        for state in ContainerState::ALL {
            let count = self.entries.values().filter(|entry| entry.life.state().kind() == *state).count();
            self.metrics.backends.set(*state, count as u64);
        }
    }

    fn status(&mut self) -> Status {
        for entry in self.entries.values() {
            self.news.breaker_turns(entry);
        }
        status::Picture {
            ready: self.life.phase() >= phase::Phase::Ready,
            started: self.started,
            source: &self.source,
            table: &self.publisher.current(),
            events: self.news.latest(),
        }
        .of(self.entries.values())
    }
}

/// Sleeps until `deadline`; for ever if there is none.
async fn sleep_to(deadline: Option<Instant>) {
    match deadline {
        Some(at) => sleep_until(at).await,
        None => futures::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
