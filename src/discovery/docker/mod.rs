//! Discovery on a Docker Engine (or Podman's socket): subscribe, list, look, and follow; and begin again whenever the
//! engine, the socket or a proxy in between loses the thread.
//!
//! What the code relies on, learnt from engines:
//! * The reader of the event stream only reads: a stalled reader slows the engine down and loses events.
//! * A subscription starts before the list and overlaps with the one before it, so nothing falls between. Replays are
//!   recognised and dropped.
//! * "Told to stop" is visible in the `kill` event only, never in `inspect`. It is kept per container until a look at that
//!   container tells which run it was about.
//! * Everything else is read from `inspect`, which may block for seconds: looks run beside the loop, and one that an event
//!   has overtaken is thrown away and repeated.
//! * The list is compared every 30 s whatever the events say; a difference means that the stream is not to be trusted.
//!
//! Only five GETs are used: `_ping` and `version` are left to health checks of people, the proxy needs `events`,
//! `containers/json` and `containers/{id}/json`.

mod event;
mod inspect;
mod locate;
mod place;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bollard::{
    Docker,
    errors::Error,
    query_parameters::{EventsOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder},
};
use futures::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{BoxStream, FuturesUnordered},
};
use time::OffsetDateTime;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::{
    event::{Kind, Notice, Seen},
    inspect::{Context, Inspected, Shared},
    locate::locate,
};
use super::{Change, Discovery, DiscoveryError, Endpoint, Looks, Phase, network::Vantage, signal::is_stop_notice};
use crate::{
    config::DockerEndpoint,
    telemetry::metrics::{Metrics, PerWord},
};

const LOCAL_SOCKET: &str = "unix:///var/run/docker.sock";
/// Time for one answer of the engine. `inspect` waits for the container's lock: seconds, with GPU hooks.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Looks at a time.
const LOOKS_MAX: usize = 8;
/// How often the list is compared, whatever the events say.
const RESYNC: Duration = Duration::from_secs(30);
/// Waits between attempts to reach the engine: doubling from the first to the second.
const RECONNECT_MIN: Duration = Duration::from_millis(100);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// How far back the first subscription reaches: far enough for the stop notice of any container that is still stopping.
const LOOK_BACK: Duration = Duration::from_secs(60);
/// How far later subscriptions reach back before the newest event seen; the engine may deliver slightly out of order.
const OVERLAP: Duration = Duration::from_secs(1);
/// How long after a subscription what happened before it may still be told.
const REPLAYED_WITHIN: Duration = ANSWER_TIMEOUT;
/// A longer lag of an event says nothing but that clocks differ.
const LAG_MAX: Duration = Duration::from_secs(3_600);
/// Events between the reader and the loop. More than that at once means that the list is compared instead.
const EVENTS_MAX: usize = 1024;
/// Most containers followed.
const CONTAINERS_MAX: usize = 1000;

/// Discovery by a Docker Engine.
#[derive(Debug)]
pub struct DockerDiscovery {
    endpoint: DockerEndpoint,
    default_network: Option<String>,
    own_ports: Vec<u16>,
    metrics: Option<Arc<Metrics>>,
    /// This machine's time, nanoseconds since 1970.
    clock: fn() -> i64,
}

impl DockerDiscovery {
    /// Discovery by the engine at `endpoint`. `default_network` applies where a container names none; `own_ports` are those
    /// the proxy listens on, so that it cannot become its own backend.
    pub fn new(endpoint: DockerEndpoint, default_network: Option<String>, own_ports: Vec<u16>) -> DockerDiscovery {
        DockerDiscovery { endpoint, default_network, own_ports, metrics: None, clock: wall_nanos }
    }
}

/// This machine's time, nanoseconds since 1970.
fn wall_nanos() -> i64 {
    i64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos()).unwrap_or(i64::MAX)
}

impl Discovery for DockerDiscovery {
    fn name(&self) -> &'static str {
        "docker"
    }

    fn count_in(&mut self, metrics: &Arc<Metrics>) {
        metrics.discovery.events.get_or_init(|| PerWord::new(event::ACTIONS));
        self.metrics = Some(metrics.clone());
    }

    fn changes(self: Box<Self>, looks: Looks) -> BoxStream<'static, Result<Change, DiscoveryError>> {
        futures::stream::unfold(Watcher::new(*self, looks), |mut watcher| async move {
            let change = watcher.next().await;
            Some((change, watcher))
        })
        .boxed()
    }
}

/// What is known of one container.
#[derive(Debug, Default)]
struct Track {
    /// Grows with every event: a look that began before is stale.
    heard: u64,
    /// A signal that may have been a stop notice, until a look tells.
    signalled: Option<Signalled>,
    seen: Option<Inspected>,
    endpoint: Option<Endpoint>,
    look: Look,
}

#[derive(Debug, Clone, Copy)]
struct Signalled {
    signal: Option<u8>,
    time_nanos: i64,
    /// It was told because it happened before the subscription, so it may be about an earlier run.
    is_replay: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Look {
    #[default]
    Idle,
    Queued,
    UnderWay,
}

/// What a task beside the loop brings back.
enum Finished {
    /// A look at a container; `None` if there is no such container.
    Looked { id: String, heard: u64, outcome: Result<Option<Inspected>, String> },
    /// The list of labelled containers that run, and where the proxy itself stands.
    Listed { ids: Result<Vec<String>, DiscoveryError>, context: Option<Context> },
}

enum Heard {
    Notice(Notice),
    /// More came than there was room for.
    Overflow,
    /// The stream is over; the text is for the log.
    Over(DiscoveryError),
}

struct Watcher {
    settings: DockerDiscovery,
    looks: Looks,
    engine: Option<Engine>,
    context: Context,
    tracks: HashMap<String, Track>,
    to_look: VecDeque<String>,
    looking: usize,
    seen: Seen,
    heard: Option<(mpsc::Receiver<Heard>, DropGuard)>,
    work: FuturesUnordered<BoxFuture<'static, Finished>>,
    listing: bool,
    /// Containers of the last list that have not been looked at yet; a [`Change::Reset`] follows when there are none.
    outstanding: Option<HashSet<String>>,
    list_at: Instant,
    retry: Duration,
    subscribed_at: Instant,
    /// The same by this machine's time.
    subscribed_nanos: i64,
    stream_retry: Duration,
    out: VecDeque<Result<Change, DiscoveryError>>,
    synced_once: bool,
    /// When watching began, nanoseconds since 1970.
    began_nanos: i64,
}

// === impl Watcher ===

impl Watcher {
    fn new(settings: DockerDiscovery, looks: Looks) -> Watcher {
        let context = Context {
            vantage: Vantage::Host { on_link: Vec::new() },
            self_id: None,
            default_network: settings.default_network.clone(),
            own_ports: settings.own_ports.clone(),
            shared: None,
            own_published: Vec::new(),
            is_placed: false,
        };
        let began_nanos = (settings.clock)();
        Watcher {
            settings,
            looks,
            engine: None,
            context,
            tracks: HashMap::new(),
            to_look: VecDeque::new(),
            looking: 0,
            seen: Seen::default(),
            heard: None,
            work: FuturesUnordered::new(),
            listing: false,
            outstanding: None,
            list_at: Instant::now(),
            retry: RECONNECT_MIN,
            subscribed_at: Instant::now(),
            subscribed_nanos: began_nanos,
            stream_retry: RECONNECT_MIN,
            out: VecDeque::new(),
            synced_once: false,
            began_nanos,
        }
    }

    async fn next(&mut self) -> Result<Change, DiscoveryError> {
        loop {
            if let Some(change) = self.out.pop_front() {
                return change;
            }
            self.start_looks();
            // A list that looks have not caught up with yet is not replaced, unless the stream must be begun again.
            let may_list = !self.listing && (self.outstanding.is_none() || self.heard.is_none());
            let heard = async {
                match &mut self.heard {
                    Some((heard, _)) => heard.recv().await,
                    None => futures::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // Events first: a stop notice must not wait for anything.
                heard = heard => match heard {
                    Some(Heard::Notice(notice)) => self.on_notice(notice),
                    Some(Heard::Overflow) => self.on_overflow(),
                    Some(Heard::Over(error)) => self.on_stream_over(error),
                    // Its reader has ended without a word.
                    None => {
                        let what = "the reader of the event stream has ended".to_owned();
                        self.on_stream_over(DiscoveryError { what, advice: "it is begun again".to_owned() });
                    }
                },
                Some(finished) = self.work.next(), if !self.work.is_empty() => match finished {
                    Finished::Looked { id, heard, outcome } => self.on_looked(id, heard, outcome),
                    Finished::Listed { ids, context } => self.on_listed(ids, context),
                },
                Some(id) = self.looks.recv() => self.look_at(&id),
                () = sleep_until(self.list_at), if may_list => self.begin_list(),
            }
        }
    }

    /// Connects if need be, subscribes if need be, and asks for the list.
    fn begin_list(&mut self) {
        if self.engine.is_none() {
            match Engine::connect(&self.settings.endpoint) {
                Ok(engine) => self.engine = Some(engine),
                Err(error) => return self.fail(error),
            }
        }
        let Some(engine) = self.engine.clone() else { return };
        if self.heard.is_none() {
            self.subscribe(&engine);
        }
        self.listing = true;
        // Set before the list is asked for: what asks for another one meanwhile must not be forgotten when it is there.
        self.list_at = Instant::now() + RESYNC.mul_f64(0.9 + 0.2 * fastrand::f64());
        let context = self.context.clone();
        self.work.push(list(engine, context, (self.settings.clock)()).boxed());
    }

    /// The engine cannot be asked: say so and try again later. What is known stays.
    fn fail(&mut self, error: DiscoveryError) {
        self.engine = None;
        self.heard = None;
        self.outstanding = None;
        let jitter = Duration::from_millis(fastrand::u64(0..=50));
        self.list_at = Instant::now() + self.retry + jitter;
        self.retry = (self.retry * 2).min(RECONNECT_MAX);
        self.out.push_back(Err(error));
    }

    /// `since` for a subscription, as the engine reads it: seconds, a dot, nanoseconds.
    fn since(&self) -> String {
        let (newest, back) = match self.seen.newest_nanos {
            Some(newest) => (newest, OVERLAP),
            None => ((self.settings.clock)(), LOOK_BACK),
        };
        let nanos = (i128::from(newest) - i128::try_from(back.as_nanos()).unwrap_or(0)).max(0);
        format!("{}.{:09}", nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000))
    }

    fn subscribe(&mut self, engine: &Engine) {
        self.subscribed_at = Instant::now();
        self.subscribed_nanos = (self.settings.clock)();
        self.heard = Some(subscribe(engine.clone(), self.since()));
    }

    /// Streams end: socket proxies cut them every few minutes, engines restart. Begin again at once; one that never lasts
    /// is begun again at growing intervals, with a list each time, so that discovery goes on without events.
    fn on_stream_over(&mut self, error: DiscoveryError) {
        tracing::debug!(%error, "event stream is over, subscribing again");
        self.heard = None;
        if self.subscribed_at.elapsed() >= RECONNECT_MAX {
            self.stream_retry = RECONNECT_MIN;
            self.list_at = Instant::now();
            return;
        }
        self.list_at = Instant::now() + self.stream_retry;
        self.stream_retry = (self.stream_retry * 2).min(RECONNECT_MAX);
        if self.stream_retry >= RECONNECT_MAX {
            self.out.push_back(Err(error));
        }
    }

    /// Events were lost here. The list tells most of what they said, but no stop notice: the engine is asked again for
    /// those.
    fn on_overflow(&mut self) {
        self.list_at = Instant::now();
        if let Some(engine) = self.engine.clone() {
            self.subscribe(&engine);
        }
    }

    fn on_notice(&mut self, notice: Notice) {
        let now_nanos = (self.settings.clock)();
        if !self.seen.is_new(&notice, now_nanos) {
            return;
        }
        self.count(&notice);
        let Notice { id, mut kind, time_nanos, labelled, action } = notice;
        let is_replay = time_nanos < self.subscribed_nanos && self.subscribed_at.elapsed() < REPLAYED_WITHIN;
        // What happened before this process began may be long over, and no look could tell: a pause, for one. Only a stop
        // notice still counts, because no look shows it.
        if is_replay && time_nanos < self.began_nanos && !matches!(kind, Kind::Signalled(_) | Kind::Ended) {
            kind = Kind::Changed;
        }
        if self.context.self_id.as_deref() == Some(id.as_str()) {
            // Our own networks may have changed, and with them every address.
            self.list_at = Instant::now();
        }
        self.look_at_dependents(&id);
        if !self.tracks.contains_key(&id) {
            if !labelled || self.tracks.len() >= CONTAINERS_MAX {
                return;
            }
            self.tracks.insert(id.clone(), Track::default());
        }
        let Some(track) = self.tracks.get_mut(&id) else { return };
        if is_replay && track.seen.as_ref().is_some_and(|seen| is_before(time_nanos, seen, now_nanos)) {
            return; // about an earlier run
        }
        if matches!(action, "start" | "restart") {
            track.signalled = None;
        }
        track.heard += 1;
        let endpoint_id = || id.as_str().into();
        match kind {
            Kind::Changed => {}
            Kind::Signalled(signal) => {
                track.signalled = Some(Signalled { signal, time_nanos, is_replay });
                if let Some(stopping) = track.stop_notice(now_nanos) {
                    self.out.push_back(Ok(Change::Stopping(stopping.as_str().into())));
                    return; // nothing to see: a stop in progress is invisible
                }
            }
            Kind::Ended => {
                track.signalled = None;
                if track.endpoint.take().is_some() {
                    self.out.push_back(Ok(Change::Ended(endpoint_id())));
                }
            }
            Kind::Paused => self.out.push_back(Ok(Change::Suspended(endpoint_id()))),
            Kind::OutOfMemory => self.out.push_back(Ok(Change::OutOfMemory(endpoint_id()))),
            Kind::Disconnected(network) => {
                if track.uses(&network) {
                    self.out.push_back(Ok(Change::Detached(endpoint_id())));
                }
            }
        }
        self.look_at(&id);
    }

    fn count(&self, notice: &Notice) {
        let Some(metrics) = &self.settings.metrics else { return };
        if let Some(events) = metrics.discovery.events.get() {
            events.increment(notice.action);
        }
        // What was asked for again from before this process began says nothing of how late events come.
        if notice.time_nanos >= self.began_nanos {
            let lag = (self.settings.clock)().saturating_sub(notice.time_nanos);
            // A remote engine's clock may be ahead, or hours behind.
            let lag = Duration::from_nanos(u64::try_from(lag).unwrap_or(0));
            metrics.discovery.event_lag.observe(lag.min(LAG_MAX));
        }
    }

    /// Containers that run in the network namespace of `owner` change with it.
    fn look_at_dependents(&mut self, owner: &str) {
        let depends = |track: &Track| track.seen.as_ref().and_then(Inspected::network_owner) == Some(owner);
        let dependents: Vec<String> =
            self.tracks.iter().filter(|(_, track)| depends(track)).map(|(id, _)| id.clone()).collect();
        for id in dependents {
            if let Some(track) = self.tracks.get_mut(&id) {
                // A look that is under way may have seen the owner as it was.
                track.heard += 1;
            }
            self.look_at(&id);
        }
    }

    fn look_at(&mut self, id: &str) {
        let Some(track) = self.tracks.get_mut(id) else { return };
        if track.look == Look::Idle {
            track.look = Look::Queued;
            self.to_look.push_back(id.to_owned());
        }
    }

    fn start_looks(&mut self) {
        let Some(engine) = self.engine.as_ref().filter(|_| self.context.is_placed) else { return };
        while self.looking < LOOKS_MAX
            && let Some(id) = self.to_look.pop_front()
        {
            let Some(track) = self.tracks.get_mut(&id) else {
                continue;
            };
            track.look = Look::UnderWay;
            self.looking += 1;
            let shared = track.seen.as_ref().and_then(|seen| seen.shared.clone());
            self.work.push(look(engine.clone(), id, track.heard, shared, (self.settings.clock)()).boxed());
        }
    }

    fn on_looked(&mut self, id: String, heard: u64, outcome: Result<Option<Inspected>, String>) {
        self.looking -= 1;
        let Some(track) = self.tracks.get_mut(&id) else {
            return self.settle(&id);
        };
        track.look = Look::Idle;
        if track.heard != heard {
            return self.look_at(&id); // overtaken by an event
        }
        match outcome {
            Err(error) => {
                // Not seeing it proves nothing. The next list looks again.
                tracing::warn!(container = %track.name(&id), %error, "cannot inspect the container");
            }
            Ok(None) => {
                if self.tracks.remove(&id).is_some_and(|track| track.endpoint.is_some()) {
                    self.out.push_back(Ok(Change::Ended(id.as_str().into())));
                }
            }
            Ok(Some(seen)) => self.on_seen(&id, seen),
        }
        self.settle(&id);
    }

    fn on_seen(&mut self, id: &str, seen: Inspected) {
        let Some(track) = self.tracks.get_mut(id) else { return };
        let exists = seen.phase != Phase::Stopped;
        if let Vantage::Host { on_link } = &mut self.context.vantage
            && let Ok(prefixes) = place::on_link_prefixes()
        {
            // A network that has just been made is a new interface of this host.
            *on_link = prefixes;
        }
        let endpoint = seen.endpoint(&self.context);
        track.seen = Some(seen);
        let Some(endpoint) = endpoint.filter(|_| exists) else {
            let was_there = track.endpoint.take().is_some();
            if !exists {
                // It comes back by an event or by the list; until then it takes no room.
                self.tracks.remove(id);
            }
            if was_there {
                self.out.push_back(Ok(Change::Ended(id.into())));
            }
            return;
        };
        track.endpoint = Some(endpoint.clone());
        self.out.push_back(Ok(Change::Upsert(Box::new(endpoint))));
        if let Some(stopping) = track.stop_notice((self.settings.clock)()) {
            self.out.push_back(Ok(Change::Stopping(stopping.as_str().into())));
        }
    }

    fn on_listed(&mut self, ids: Result<Vec<String>, DiscoveryError>, context: Option<Context>) {
        self.listing = false;
        let ids = match ids {
            Ok(ids) => ids,
            Err(error) => return self.fail(error),
        };
        if let Some(context) = context {
            self.context = context;
        }
        let listed: HashSet<String> = ids.into_iter().take(CONTAINERS_MAX).collect();
        let gone: Vec<String> = self.tracks.keys().filter(|id| !listed.contains(*id)).cloned().collect();
        let lost = gone.iter().any(|id| self.tracks.get(id).is_some_and(|track| track.endpoint.is_some()));
        let found = listed.iter().any(|id| !self.tracks.contains_key(id));
        if self.synced_once && (lost || found) && self.heard.is_some() {
            // The list knows what no event has told. (An event may still be on its way; asking anew costs little.)
            tracing::debug!("the list differs from what events told, subscribing again");
            if let Some(engine) = self.engine.clone() {
                self.subscribe(&engine);
            }
        }
        for id in gone {
            // It may have been started after the list was made: only a look can tell.
            self.look_at(&id);
        }
        for id in &listed {
            self.tracks.entry(id.clone()).or_default();
            self.look_at(id);
        }
        self.outstanding = Some(listed);
        self.settle("");
    }

    /// `id` has been looked at; when nothing of the last list is left to look at, the whole truth is known.
    fn settle(&mut self, id: &str) {
        let Some(outstanding) = &mut self.outstanding else {
            return;
        };
        outstanding.remove(id);
        if outstanding.is_empty() {
            self.outstanding = None;
            self.synced_once = true;
            self.retry = RECONNECT_MIN;
            let endpoints = self.tracks.values().filter_map(|track| track.endpoint.clone()).collect();
            self.out.push_back(Ok(Change::Reset(endpoints)));
        }
    }
}

// === impl Track ===

impl Track {
    /// If the last signal was a stop notice for the run that was seen: the container's id, once.
    fn stop_notice(&mut self, now_nanos: i64) -> Option<String> {
        let seen = self.seen.as_ref()?;
        let signalled = self.signalled.filter(|s| !s.is_replay || !is_before(s.time_nanos, seen, now_nanos))?;
        self.endpoint.as_ref()?;
        self.signalled = None;
        is_stop_notice(signalled.signal, seen.stop_signal, seen.forges_signals()).then(|| seen.id.clone())
    }

    fn uses(&self, network: &str) -> bool {
        let reach = self.endpoint.as_ref().and_then(|endpoint| endpoint.reach.as_ref().ok());
        reach.and_then(|reach| reach.network.as_ref()).is_some_and(|used| used.id == network)
    }

    fn name<'a>(&'a self, id: &'a str) -> &'a str {
        self.seen.as_ref().map_or(id, |seen| seen.name.as_str())
    }
}

/// Whether a replayed event is about an earlier run than the one seen. A start ahead of the clock tells nothing about
/// that, because the clock has been put back since.
fn is_before(time_nanos: i64, seen: &Inspected, now_nanos: i64) -> bool {
    time_nanos < seen.started_nanos && seen.started_nanos <= now_nanos
}

// === talking to the engine ===

/// A client and the address it goes to, for messages.
#[derive(Clone)]
struct Engine {
    client: Docker,
    host: Arc<str>,
}

impl Engine {
    fn connect(endpoint: &DockerEndpoint) -> Result<Engine, DiscoveryError> {
        let host = endpoint.host.as_deref().unwrap_or(LOCAL_SOCKET);
        let seconds = ANSWER_TIMEOUT.as_secs();
        let version = bollard::API_DEFAULT_VERSION;
        let client = if let Some(path) = host.strip_prefix("unix://") {
            Docker::connect_with_unix(path, seconds, version)
        } else if endpoint.tls || host.starts_with("https://") {
            let certs = endpoint.cert_path.clone().unwrap_or_default();
            let pem = |name: &str| certs.join(name);
            Docker::connect_with_ssl(host, &pem("key.pem"), &pem("cert.pem"), &pem("ca.pem"), seconds, version)
        } else {
            Docker::connect_with_http(host, seconds, version)
        };
        match client {
            Ok(client) => Ok(Engine { client, host: host.into() }),
            Err(error) => Err(explain("cannot reach the Docker Engine", host, &error)),
        }
    }

    /// One `inspect`; `None` if there is no such container.
    async fn inspect(&self, id: &str) -> Result<Option<Inspected>, String> {
        match timeout(ANSWER_TIMEOUT, self.client.inspect_container(id, None::<InspectContainerOptions>)).await {
            Err(_) => Err(format!("no answer within {ANSWER_TIMEOUT:?}")),
            Ok(Err(Error::DockerResponseServerError { status_code: 404, .. })) => Ok(None),
            Ok(Err(error)) => Err(explain("inspect failed", &self.host, &error).to_string()),
            Ok(Ok(answer)) => Inspected::read(answer).map(Some).ok_or_else(|| "the answer lacks its state".to_owned()),
        }
    }
}

/// Says what failed and what to do about it, without quoting what the engine sent: its answers hold the environment of
/// containers.
fn explain(what: &str, host: &str, error: &Error) -> DiscoveryError {
    let (detail, advice) = match error {
        Error::SocketNotFoundError(_) => (
            "there is no such socket".to_owned(),
            "mount it into this container (-v /var/run/docker.sock:/var/run/docker.sock:ro) or set DOCKER_HOST",
        ),
        Error::DockerResponseServerError { status_code: 403, .. } => (
            "the answer was 403".to_owned(),
            "let the Docker API proxy allow GET /events, /containers/json and /containers/{id}/json",
        ),
        Error::DockerResponseServerError { status_code, .. } => {
            (format!("the answer was {status_code}"), "see the log of the Docker Engine")
        }
        Error::JsonDataError { column, .. } => {
            (format!("its answer cannot be read (column {column})"), "this engine may be too new for this proxy")
        }
        Error::CertPathError { path } | Error::CertParseError { path } | Error::CertMultipleKeys { path, .. } => {
            (format!("{} cannot be used", path.display()), "DOCKER_CERT_PATH must hold ca.pem, cert.pem and key.pem")
        }
        Error::RequestTimeoutError => ("it gave no answer".to_owned(), "see whether the Docker Engine hangs"),
        other => {
            let text = std::iter::successors(Some(other as &dyn std::error::Error), |e| e.source())
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(": ");
            let advice = if text.contains("ermission denied") {
                "run this container with the group of the socket (group_add), or as root"
            } else if text.contains("refused") {
                "is the Docker Engine running? a socket mounted as a file goes stale when the engine is restarted: \
                 restart this container, or mount the folder"
            } else {
                "it is tried again until it works"
            };
            (text, advice)
        }
    };
    DiscoveryError { what: format!("{what} at {host}: {detail}"), advice: advice.to_owned() }
}

/// Starts the reader: a task that does nothing but read. It ends when its guard is dropped.
fn subscribe(engine: Engine, since: String) -> (mpsc::Receiver<Heard>, DropGuard) {
    let (heard, receiver) = mpsc::channel(EVENTS_MAX);
    let stop = CancellationToken::new();
    let guard = stop.clone().drop_guard();
    let filters: HashMap<&str, Vec<&str>> =
        HashMap::from([("type", vec!["container", "network"]), ("event", event::ACTIONS.to_vec())]);
    let reading = async move {
        let options = EventsOptionsBuilder::new().since(&since).filters(&filters).build();
        let mut events = std::pin::pin!(engine.client.events(Some(options)));
        let error = loop {
            match events.next().await {
                Some(Ok(message)) => {
                    let Some(notice) = event::read(message) else { continue };
                    if heard.try_send(Heard::Notice(notice)).is_err() {
                        // The list tells what is lost here.
                        tracing::warn!("more events at once than there is room for, comparing the list instead");
                        if heard.send(Heard::Overflow).await.is_err() {
                            return;
                        }
                    }
                }
                Some(Err(error)) => break explain("the event stream broke", &engine.host, &error),
                None => {
                    let what = "the event stream ended".to_owned();
                    break DiscoveryError { what, advice: "it is begun again until it works".to_owned() };
                }
            }
        };
        let _ = heard.send(Heard::Over(error)).await;
    };
    // Ended by its guard, which the loop holds: it needs no place among the application's tasks.
    #[allow(clippy::disallowed_methods)]
    tokio::spawn(async move { stop.run_until_cancelled(reading).await });
    (receiver, guard)
}

async fn list(engine: Engine, context: Context, now_nanos: i64) -> Finished {
    let filters: HashMap<&str, Vec<&str>> = HashMap::from([("label", vec!["inference.enable"])]);
    let options = ListContainersOptionsBuilder::new().filters(&filters).build();
    let ids = match timeout(ANSWER_TIMEOUT, engine.client.list_containers(Some(options))).await {
        Err(_) => Err(explain("cannot list containers", &engine.host, &Error::RequestTimeoutError)),
        Ok(Err(error)) => Err(explain("cannot list containers", &engine.host, &error)),
        Ok(Ok(list)) => Ok(list.into_iter().filter_map(|container| container.id).collect()),
    };
    let ids = match ids {
        Ok(ids) => locate(&engine, context, place::self_id_candidates(), now_nanos).await.map(|context| (ids, context)),
        Err(error) => Err(error),
    };
    let (ids, context) = match ids {
        Ok((ids, context)) => (Ok(ids), Some(context)),
        Err(error) => (Err(error), None),
    };
    Finished::Listed { ids, context }
}

async fn look(engine: Engine, id: String, heard: u64, shared: Option<Shared>, now_nanos: i64) -> Finished {
    let outcome = async {
        let Some(mut seen) = engine.inspect(&id).await? else {
            return Ok(None);
        };
        if let Some(owner) = seen.network_owner().map(str::to_owned) {
            let owner = engine.inspect(&owner).await?;
            seen.share_network_of(owner.as_ref(), shared.as_ref(), now_nanos);
        }
        Ok(Some(seen))
    };
    let outcome = outcome.await;
    Finished::Looked { id, heard, outcome }
}

#[cfg(test)]
mod tests;
