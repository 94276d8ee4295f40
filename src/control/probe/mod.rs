//! Probes: one task per incarnation of a container asks it for its models, `GET {base}/models`.
//!
//! The task asks until it gets an answer, then again at every refresh, and reports each outcome; `control::lifecycle`
//! decides what an outcome means. An answer is hostile input: it is bounded in time, size and count, and nothing of it is
//! used before all of it has been checked. A redirect is not followed.

mod object;
mod listing;
mod error;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep},
};
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) use self::{
    error::{FailureKind, ProbeError},
    listing::MODELS_MAX,
};
use crate::{
    base::fetch::Fetch,
    control::discovery::{EndpointId, Incarnation},
    pool::table::ModelObject,
};

/// Time for one answer of `/models`, from connecting to its last byte.
const MODELS_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for one answer of a health path. Some engines generate a token to answer it.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer of `/models`.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Longest description of an answer that cannot be used.
const WHAT_CHARS_MAX: usize = 200;
/// First wait after a failed probe; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(250);
/// Longest wait after a failed probe: a model that takes an hour to load is live a moment after it has loaded.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// A container to probe, and how to do it.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The container.
    pub(crate) id: EndpointId,
    /// The start of it that this is about.
    pub(crate) incarnation: Incarnation,
    /// Addresses to try, in this order, until one answers.
    pub(crate) addrs: Vec<SocketAddr>,
    /// Prefix of the API.
    pub(crate) base_path: String,
    /// The path to ask for before `/models`.
    pub(crate) health: HealthPath,
    /// Time for connecting.
    pub(crate) connect_timeout: Duration,
    /// How long to wait before it is asked again once it has answered.
    pub(crate) refresh: Duration,
}

/// The health path that a backend is asked for before its models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HealthPath {
    /// None, because the engine checks its health.
    None,
    /// `/health`, if the server has such a path: only a server error means that it is not healthy.
    Usual,
    /// This path: only success means that it is healthy.
    Required(String),
}

/// A complete, checked answer.
#[derive(Debug, Clone)]
pub(crate) struct Listing {
    /// The address that answered.
    pub(crate) addr: SocketAddr,
    /// The models, at least one, in the order of the answer, no id twice.
    pub(crate) models: Vec<Arc<ModelObject>>,
}

/// The outcome of one question, with the container that it is about.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The container that was asked.
    pub(crate) id: EndpointId,
    /// The start of it that this is about.
    pub(crate) incarnation: Incarnation,
    /// The serial of the probe; an answer to an earlier probe is stale.
    pub(crate) serial: u64,
    /// The models, or the reason for which there are none.
    pub(crate) outcome: Result<Listing, ProbeError>,
    /// How long the question took.
    pub(crate) took: Duration,
}

/// The handle of a running probe. Dropping it ends the task.
#[derive(Debug)]
pub(crate) struct ProbeHandle {
    /// Distinguishes its answers from those of earlier probes.
    pub(crate) serial: u64,
    nudge: Arc<Notify>,
    _stop: DropGuard,
}

impl ProbeHandle {
    /// A handle, and the two ends of it that [`run`] needs.
    pub(crate) fn new(serial: u64) -> (ProbeHandle, Arc<Notify>, CancellationToken) {
        let stop = CancellationToken::new();
        let nudge = Arc::new(Notify::new());
        let handle = ProbeHandle { serial, nudge: nudge.clone(), _stop: stop.clone().drop_guard() };
        (handle, nudge, stop)
    }

    /// Asks now instead of at the next refresh.
    pub(crate) fn nudge(&self) {
        self.nudge.notify_one();
    }
}

/// Asks until `stop`, and sends every outcome.
pub(crate) async fn run(
    mut target: Target,
    serial: u64,
    answers: mpsc::Sender<Answer>,
    nudge: Arc<Notify>,
    stop: CancellationToken,
) {
    let asking = async {
        let mut retry = RETRY_MIN;
        loop {
            let began = Instant::now();
            let outcome = ask(&target).await;
            let took = began.elapsed();
            let wait = if let Ok(listing) = &outcome {
                retry = RETRY_MIN;
                // The address that has answered comes first from now on. If another one begins to answer later, the
                // backend must not move there, because that would cut its streams.
                target.addrs.sort_by_key(|addr| *addr != listing.addr);
                target.refresh
            } else {
                let wait = retry;
                retry = (retry * 2).min(RETRY_MAX);
                wait
            };
            let (id, incarnation) = (target.id.clone(), target.incarnation);
            if answers.send(Answer { id, incarnation, serial, outcome, took }).await.is_err() {
                return;
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = nudge.notified() => {}
            }
        }
    };
    // A probe that is stopped ends at any point, so that it delays nothing.
    let _ = stop.run_until_cancelled(asking).await;
}

/// Asks once, at each address in turn.
///
/// # Errors
/// The failure of the first address that could not be connected to, or of the one that answered.
pub(crate) async fn ask(target: &Target) -> Result<Listing, ProbeError> {
    let mut last = None;
    for addr in &target.addrs {
        match ask_at(target, *addr).await {
            Ok(models) => return Ok(Listing { addr: *addr, models }),
            // Another address may be the right one only if there was no connection to this one.
            Err(error) if error.is_elsewhere() => last = last.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(last
        .unwrap_or_else(|| ProbeError::Unusable { path: String::new(), what: "there is no address to ask".to_owned() }))
}

async fn ask_at(target: &Target, addr: SocketAddr) -> Result<Vec<Arc<ModelObject>>, ProbeError> {
    match &target.health {
        HealthPath::None => {}
        HealthPath::Usual => match get(target, addr, "/health", HEALTH_TIMEOUT).await {
            Err(error) if error.is_elsewhere() => return Err(error),
            Ok((status, _)) if status.is_server_error() => {
                return Err(ProbeError::Status { path: "/health".to_owned(), status });
            }
            // The server has no such path, or a slow or odd one: /models decides.
            Ok(_) | Err(_) => {}
        },
        HealthPath::Required(path) => {
            let (status, _) = get(target, addr, path, HEALTH_TIMEOUT).await?;
            if !status.is_success() {
                return Err(ProbeError::Status { path: path.clone(), status });
            }
        }
    }
    let path = format!("{}/models", target.base_path);
    let (status, body) = get(target, addr, &path, MODELS_TIMEOUT).await?;
    if status != StatusCode::OK {
        return Err(ProbeError::Status { path, status });
    }
    listing::parse(&body).map_err(|mut what| {
        // The text quotes the answer, which may be long.
        if let Some((end, _)) = what.char_indices().nth(WHAT_CHARS_MAX) {
            what.truncate(end);
        }
        ProbeError::Unusable { path, what }
    })
}

async fn get(
    target: &Target,
    addr: SocketAddr,
    path: &str,
    limit: Duration,
) -> Result<(StatusCode, Bytes), ProbeError> {
    let connect_timeout = target.connect_timeout;
    let fetch = Fetch { addr, path, connect_timeout, timeout: limit, max_bytes: ANSWER_BYTES_MAX };
    fetch.get().await.map_err(|error| ProbeError::NoAnswer { path: path.to_owned(), error })
}
