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
//! Three GETs are used: `events`, `containers/json` and `containers/{id}/json`; over TLS, `version` as well. `engine` asks
//! them, `answers` reads them.

mod answers;
mod engine;
mod event;
mod host;
mod inspect;
mod locate;
mod looks;
mod notes;
mod paths;
mod place;
mod stream;
mod track;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    sync::Arc,
    time::Duration,
};

use futures::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{BoxStream, FuturesUnordered},
};
use time::OffsetDateTime;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::DropGuard;

use self::{
    answers::{Listed, Summary},
    engine::{Engine, Heard},
    event::Seen,
    inspect::{Context, Inspected},
    locate::locate,
    paths::Paths,
    place::Standing,
    track::Track,
};
use super::{Change, Discovery, DiscoveryError, Looks, Note, network::Vantage};
use crate::{
    base::config::DockerEndpoint,
    control::labels,
    telemetry::metrics::{Metrics, PerWord},
};

/// Looks at a time, without those that wait aside.
const LOOKS_MAX: usize = 8;
/// How long a look may take before it waits aside, so that it delays no other: an engine answers within milliseconds, unless
/// the container is locked.
const LOOK_PATIENCE: Duration = Duration::from_millis(100);
/// Looks that wait aside; each is a connection to the engine.
const ASIDE_MAX: usize = 256;
/// How long an engine may take to tell a new subscription what the list has shown, before its stream counts as silent.
const STREAM_PATIENCE: Duration = Duration::from_secs(3);
/// How often the list is compared, whatever the events say.
const RESYNC: Duration = Duration::from_secs(30);
/// How often Podman is listed: it tells of a stop neither by an event nor by a signal, but only by leaving the container out
/// of the list while that goes on.
const GLANCE: Duration = Duration::from_secs(1);
/// Waits between attempts to reach the engine: doubling from the first to the second.
const RECONNECT_MIN: Duration = Duration::from_millis(100);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// How soon a container that could not be looked at is looked at again, and how soon the proxy's own is asked for again:
/// doubling up to [`RESYNC`].
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const PLACE_AGAIN: Duration = Duration::from_secs(2);
/// How far back the first subscription reaches: far enough for the stop notice of any container that is still stopping.
const LOOK_BACK: Duration = Duration::from_secs(60);
/// How far later subscriptions reach back before the newest event seen; the engine may deliver slightly out of order.
const OVERLAP: Duration = Duration::from_secs(1);
/// How long after a subscription what happened before it may still be told.
const REPLAYED_WITHIN: Duration = engine::ANSWER_TIMEOUT;
/// A longer lag of an event says nothing but that clocks differ.
const LAG_MAX: Duration = Duration::from_secs(3_600);
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
    /// What this machine tells of the place of this process.
    place: fn() -> io::Result<Standing>,
}

impl DockerDiscovery {
    /// Discovery by the engine at `endpoint`. `default_network` applies where a container names none; `own_ports` are those
    /// the proxy listens on, so that it cannot become its own backend.
    pub fn new(endpoint: DockerEndpoint, default_network: Option<String>, own_ports: Vec<u16>) -> DockerDiscovery {
        let (clock, place) = (wall_nanos, place::standing);
        DockerDiscovery { endpoint, default_network, own_ports, metrics: None, clock, place }
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
        metrics.discovery.events.get_or_init(|| PerWord::new(event::COUNTED));
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

/// What a task beside the loop brings back.
enum Finished {
    /// A look at a container; `None` if there is no such container.
    Looked { id: String, heard: u64, serial: u64, outcome: Result<Option<Inspected>, String> },
    /// A look has taken so long that it waits aside.
    Aside { id: String, serial: u64 },
    /// The list of labelled containers that run, and where the proxy itself stands.
    Listed(Result<(Listed, Context), DiscoveryError>),
    /// A container that could not be looked at has waited.
    Again { id: String },
    /// The list alone, to see what is missing from it.
    Glanced(Result<Listed, DiscoveryError>),
}

struct Watcher {
    settings: DockerDiscovery,
    looks: Looks,
    engine: Option<Engine>,
    /// What has to stand before its paths.
    paths: Arc<Paths>,
    context: Context,
    tracks: HashMap<String, Track>,
    to_look: VecDeque<String>,
    /// Looks that are under way and not aside, by number.
    looking: HashSet<u64>,
    aside: usize,
    looks_begun: u64,
    /// Containers beyond [`CONTAINERS_MAX`] in the last list.
    left_out: usize,
    /// The stream has brought something since it was begun.
    stream_spoke: bool,
    /// When it counts as silent, because the list knows what it has not told.
    doubt_at: Option<Instant>,
    is_silent: bool,
    /// Why streams end as soon as they are begun, if they do.
    stream_trouble: Option<DiscoveryError>,
    notes: Vec<Note>,
    seen: Seen,
    heard: Option<(mpsc::Receiver<Heard>, DropGuard)>,
    work: FuturesUnordered<BoxFuture<'static, Finished>>,
    listing: bool,
    /// Containers of the last list that have not been looked at yet; a [`Change::Reset`] follows when there are none.
    outstanding: Option<HashSet<String>>,
    list_at: Instant,
    /// When the list alone is asked for, of an engine that tells some things by nothing else.
    glance_at: Instant,
    glancing: bool,
    retry: Duration,
    /// When a place that the engine does not tell is asked for again.
    place_retry: Duration,
    subscribed_at: Instant,
    /// The same by this machine's time.
    subscribed_nanos: i64,
    stream_retry: Duration,
    out: VecDeque<Result<Change, DiscoveryError>>,
    synced_once: bool,
    told_unreadable: bool,
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
            untold: None,
        };
        let began_nanos = (settings.clock)();
        Watcher {
            settings,
            looks,
            engine: None,
            paths: Arc::default(),
            context,
            tracks: HashMap::new(),
            to_look: VecDeque::new(),
            looking: HashSet::new(),
            aside: 0,
            looks_begun: 0,
            left_out: 0,
            stream_spoke: false,
            doubt_at: None,
            is_silent: false,
            stream_trouble: None,
            notes: Vec::new(),
            seen: Seen::default(),
            heard: None,
            work: FuturesUnordered::new(),
            listing: false,
            outstanding: None,
            list_at: Instant::now(),
            glance_at: Instant::now(),
            glancing: false,
            retry: RECONNECT_MIN,
            place_retry: PLACE_AGAIN,
            subscribed_at: Instant::now(),
            subscribed_nanos: began_nanos,
            stream_retry: RECONNECT_MIN,
            out: VecDeque::new(),
            synced_once: false,
            told_unreadable: false,
            began_nanos,
        }
    }

    async fn next(&mut self) -> Result<Change, DiscoveryError> {
        loop {
            self.take_notes();
            if let Some(change) = self.out.pop_front() {
                return change;
            }
            let doubt_at = self.doubt_at;
            let doubt = async move {
                match doubt_at {
                    Some(at) => sleep_until(at).await,
                    None => futures::future::pending().await,
                }
            };
            self.start_looks();
            // A list that looks have not caught up with yet is not replaced, unless the stream must be begun again.
            let may_list = !self.listing && (self.outstanding.is_none() || self.heard.is_none());
            let is_podman = self.engine.as_ref().is_some_and(Engine::is_podman);
            let may_glance = is_podman && self.synced_once && !self.listing && !self.glancing;
            let heard = async {
                match &mut self.heard {
                    Some((heard, _)) => heard.recv().await,
                    None => futures::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // Events first: a stop notice must not wait for anything.
                heard = heard => self.on_heard(heard),
                Some(finished) = self.work.next(), if !self.work.is_empty() => match finished {
                    Finished::Looked { id, heard, serial, outcome } => self.on_looked(id, heard, serial, outcome),
                    Finished::Aside { id, serial } => self.on_aside(&id, serial),
                    Finished::Listed(listed) => self.on_listed(listed),
                    Finished::Again { id } => self.look_at(&id),
                    Finished::Glanced(listed) => self.on_glanced(listed),
                },
                Some(id) = self.looks.recv() => self.look_at(&id),
                () = sleep_until(self.list_at), if may_list => self.begin_list(),
                () = sleep_until(self.glance_at), if may_glance => self.begin_glance(),
                () = doubt => {
                    self.doubt_at = None;
                    self.is_silent = true;
                    self.list_at = self.list_at.min(Instant::now() + RECONNECT_MAX);
                }
            }
        }
    }

    /// Connects if need be, subscribes if need be, and asks for the list.
    fn begin_list(&mut self) {
        let is_new = self.engine.is_none();
        if is_new {
            match Engine::connect(&self.settings.endpoint, self.paths.clone()) {
                Ok(engine) => self.engine = Some(engine),
                Err(error) => return self.fail(error),
            }
        }
        let Some(engine) = self.engine.clone() else { return };
        // A stream from before the engine failed may be dead without a word.
        if is_new || self.heard.is_none() {
            self.subscribe(&engine);
        }
        self.listing = true;
        // Set before the list is asked for: what asks for another one meanwhile must not be forgotten when it is there.
        let wait = if self.is_silent { RECONNECT_MAX } else { RESYNC };
        self.list_at = Instant::now() + wait.mul_f64(0.9 + 0.2 * fastrand::f64());
        let (context, place, clock) = (self.context.clone(), self.settings.place, self.settings.clock);
        self.work.push(async move { Finished::Listed(list(engine, context, place(), clock()).await) }.boxed());
    }

    fn begin_glance(&mut self) {
        let Some(engine) = self.engine.clone() else { return };
        self.glance_at = Instant::now() + GLANCE;
        self.glancing = true;
        self.work.push(async move { Finished::Glanced(engine.list().await) }.boxed());
    }

    /// Looks at the containers that the list has, or lacks, against what is known of them; at no others.
    fn on_glanced(&mut self, listed: Result<Listed, DiscoveryError>) {
        self.glancing = false;
        // An engine that cannot be listed is told of by the whole list, which is asked for less often.
        let Ok(listed) = listed else { return };
        let summaries: HashMap<&str, &Summary> = listed.containers.iter().map(|s| (s.id.as_str(), s)).collect();
        let mut to_look: Vec<String> =
            self.tracks.keys().filter(|id| !summaries.contains_key(id.as_str())).cloned().collect();
        for summary in &listed.containers {
            let is_ending = matches!(summary.state.as_deref(), Some("stopping" | "stopped"));
            let is_known = match self.tracks.get(&summary.id) {
                Some(track) => track.endpoint.is_some() && !is_ending,
                None => self.tracks.len() >= CONTAINERS_MAX,
            };
            if !is_known {
                self.tracks.entry(summary.id.clone()).or_default().summary = Some(summary.clone());
                to_look.push(summary.id.clone());
            }
        }
        for id in to_look {
            self.look_at(&id);
        }
    }

    /// The engine cannot be asked: say so and try again later. What is known stays, and events are heard until the next
    /// attempt subscribes again: one kind of answer may fail without the others.
    fn fail(&mut self, error: DiscoveryError) {
        self.engine = None;
        self.outstanding = None;
        let jitter = Duration::from_millis(fastrand::u64(0..=50));
        self.list_at = Instant::now() + self.retry + jitter;
        self.retry = (self.retry * 2).min(RECONNECT_MAX);
        self.out.push_back(Err(error));
    }

    fn on_listed(&mut self, listed: Result<(Listed, Context), DiscoveryError>) {
        self.listing = false;
        let (listed, context) = match listed {
            Ok(listed) => listed,
            Err(error) => return self.fail(error),
        };
        self.take_place(context);
        if self.heard.is_some() && self.subscribed_at.elapsed() >= RECONNECT_MAX {
            self.stream_trouble = None;
        }
        let (mut summaries, is_whole) = (listed.containers, listed.unreadable == 0);
        summaries.sort_by(|a, b| a.id.cmp(&b.id));
        summaries.dedup_by(|a, b| a.id == b.id);
        let all: HashSet<String> = summaries.iter().map(|summary| summary.id.clone()).collect();
        let gone: Vec<String> = self.tracks.keys().filter(|id| !all.contains(*id)).cloned().collect();
        // Those that are followed already stay so; of the others as many as there is room for, and last those that do not
        // ask for it: not every proxy before an engine passes the filter on.
        summaries.sort_by_key(|summary| {
            let is_foreign = !summary.labels.is_empty() && !summary.labels.contains_key(labels::ENABLE);
            (is_foreign, !self.tracks.contains_key(&summary.id))
        });
        self.left_out = summaries.len().saturating_sub(CONTAINERS_MAX);
        summaries.truncate(CONTAINERS_MAX);
        let listed: HashSet<String> = summaries.iter().map(|summary| summary.id.clone()).collect();
        let lost = gone.iter().any(|id| self.tracks.get(id).is_some_and(|track| track.endpoint.is_some()));
        let found = listed.iter().any(|id| !self.tracks.contains_key(id));
        if self.synced_once && (lost || found) && self.heard.is_some() {
            // The list knows what no event has told. (An event may still be on its way; asking anew costs little.)
            tracing::debug!("the list differs from what events told, subscribing again");
            if !self.stream_spoke && !self.is_silent && self.stream_trouble.is_none() {
                self.doubt_at.get_or_insert(Instant::now() + STREAM_PATIENCE);
            }
            if let Some(engine) = self.engine.clone() {
                self.subscribe(&engine);
            }
        }
        for id in &gone {
            // It may have been started after the list was made: a look tells.
            if let Some(track) = self.tracks.get_mut(id) {
                track.is_unlisted = is_whole;
            }
            self.look_at(id);
        }
        for summary in summaries {
            let id = summary.id.clone();
            let track = self.tracks.entry(id.clone()).or_default();
            (track.summary, track.is_unlisted) = (Some(summary), false);
            self.look_at(&id);
        }
        self.outstanding = Some(listed.into_iter().chain(gone).collect());
        self.settle("");
    }

    /// The place is known, or the engine does not tell it: then it is asked again before the next list is due.
    fn take_place(&mut self, context: Context) {
        match context.untold {
            Some(_) => {
                self.list_at = self.list_at.min(Instant::now() + self.place_retry);
                self.place_retry = (self.place_retry * 2).min(RESYNC);
            }
            None => self.place_retry = PLACE_AGAIN,
        }
        self.context = context;
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

// === talking to the engine ===

async fn list(
    engine: Engine,
    context: Context,
    place: io::Result<Standing>,
    now_nanos: i64,
) -> Result<(Listed, Context), DiscoveryError> {
    let listed = engine.list().await?;
    let context = locate(&engine, context, place, now_nanos).await?;
    Ok((listed, context))
}

#[cfg(test)]
mod tests;
