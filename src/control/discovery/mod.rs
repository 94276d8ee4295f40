//! Sources of backends: each is a stream of changes that ends in the truth, even if some of them are lost on the way.
//!
//! [`Discovery`] is the seam for other orchestrators. A source reports containers as it sees them ([`Endpoint`]) and the
//! events that it hears of ([`Change`]). It does not decide what these mean for requests; `control::lifecycle` does.

pub mod docker;
pub mod fixed;
pub(crate) mod network;
pub(crate) mod signal;
pub(crate) mod vantage;

use std::{sync::Arc, time::Duration};

use futures::stream::BoxStream;
use tokio::sync::mpsc;

use crate::{
    base::foreign::FOREVER,
    control::{discovery::network::Reach, labels::LabelSpec},
    telemetry::metrics::Metrics,
};

/// The id of an endpoint in its source; for Docker the id of a container.
pub type EndpointId = Arc<str>;

/// One start of one endpoint, distinguished from other starts by its time. The same container comes back under the same id
/// with another address, so everything that the proxy learns about it belongs to one incarnation.
///
/// Two incarnations are equal or they are not. They have no order, because the clock that dates them may be put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(pub i64);

impl Incarnation {
    /// A start whose time is not known, so that it may be any start.
    pub const UNKNOWN: Incarnation = Incarnation(0);
}

/// Whether the process of an endpoint runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The process runs.
    Running,
    /// The process exists, but gets no processor time.
    Paused,
    /// The process has ended, and the source is about to start it again.
    Restarting,
    /// There is no process, and none is about to start.
    Stopped,
}

/// The word of the orchestrator for the result of its own health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// There is no check.
    None,
    /// There is a check, but the proxy does not know the word for its result.
    Unknown,
    /// The check has had no verdict yet.
    Starting,
    /// The last check passed.
    Healthy,
    /// The last checks failed, as many in a row as the check allows.
    Unhealthy,
}

/// The progress of the orchestrator's health check, whatever its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthCheck {
    /// The longest time after which a check that works must have ended.
    pub overdue_after: Duration,
    /// A number that changes with each check that ends; its value means nothing.
    pub mark: u64,
}

// === impl Note ===

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.advice {
            Some(advice) => write!(f, "{}; {advice}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

// === impl HealthCheck ===

impl HealthCheck {
    /// A check that runs every `interval` for `timeout` at most, and begins after `start_period`. Its
    /// [`HealthCheck::mark`] is that of a check that has not ended yet.
    pub fn every(interval: Duration, timeout: Duration, start_period: Duration) -> HealthCheck {
        let sum = interval.saturating_mul(2).saturating_add(timeout).saturating_add(start_period);
        HealthCheck { overdue_after: sum.min(FOREVER), mark: 0 }
    }
}

impl Default for HealthCheck {
    /// The check of a container whose image sets no times, with the defaults of Docker.
    fn default() -> HealthCheck {
        HealthCheck::every(Duration::from_secs(30), Duration::from_secs(30), Duration::ZERO)
    }
}

/// One endpoint as a source sees it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its id.
    pub id: EndpointId,
    /// Name for people.
    pub name: String,
    /// Its role: another endpoint with the same role may be its replacement. The Compose service, or else its name.
    pub role: Arc<str>,
    /// Its replacement is started only after it has been stopped, as Compose does it.
    pub is_stopped_first: bool,
    /// Image it was made from.
    pub image: String,
    /// The start of it that this is about.
    pub incarnation: Incarnation,
    /// Whether it runs.
    pub phase: Phase,
    /// The result of its health check.
    pub health: Health,
    /// The progress of that check.
    pub health_check: HealthCheck,
    /// The addresses at which the proxy reaches it, or the reason for which there are none.
    pub reach: Result<Reach, Obstacle>,
    /// The wishes of its owner, from its labels.
    pub labels: LabelSpec,
    /// Labels that cannot be used, with the reason, one sentence each.
    pub problems: Vec<String>,
    /// The reason for which it must never be routed: it is the proxy itself, or its opt-in is unclear.
    pub excluded: Option<Obstacle>,
    /// How long it may take to end once it has been told to stop.
    pub stop_grace: Duration,
}

// === impl Endpoint ===

impl Endpoint {
    /// The source knows that the endpoint exists, and nothing else of it.
    pub fn is_unread(&self) -> bool {
        self.incarnation == Incarnation::UNKNOWN && self.reach.is_err()
    }
}

/// The reason for which an endpoint cannot be used, in two halves for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The reason.
    pub what: String,
    /// Advice for the user.
    pub advice: String,
}

/// A limit of what a source sees, or something unusual about it, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The limit.
    pub what: String,
    /// Advice for the user; `None` if nothing needs to be done.
    pub advice: Option<String>,
}

/// A change that a source reports.
#[derive(Debug, Clone)]
pub enum Change {
    /// These are all endpoints: one that is missing here has gone.
    Reset(Vec<Endpoint>),
    /// The endpoint is now as described.
    Upsert(Box<Endpoint>),
    /// The endpoint has been told to stop. It finishes its requests and must get no new ones.
    Stopping(EndpointId),
    /// The endpoint gets no processor time, so its connections hang without an error.
    Suspended(EndpointId),
    /// The endpoint lost the network in use, so its connections hang without an error and will not recover.
    Detached(EndpointId),
    /// A process of the endpoint was killed because there was no memory left. The endpoint may or may not still work.
    OutOfMemory(EndpointId),
    /// The process of the endpoint has ended.
    Ended(EndpointId),
    /// All limits of what the source sees, reported each time that they change.
    Notes(Vec<Note>),
}

/// The source cannot see its endpoints now, and keeps trying. Nothing that is known becomes false by this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {advice}")]
pub struct DiscoveryError {
    /// The failure.
    pub what: String,
    /// Advice for the user.
    pub advice: String,
}

/// The queue of endpoints that the registry asks the source to look at.
pub type Looks = mpsc::Receiver<EndpointId>;

/// A source of endpoints.
pub trait Discovery: Send + 'static {
    /// Its name in logs and status.
    fn name(&self) -> &'static str;

    /// Gives the source the instruments in which it counts its events. Called once, before [`Discovery::changes`].
    fn count_in(&mut self, _metrics: &Arc<Metrics>) {}

    /// The changes, without an end. At the start and after every error, a [`Change::Reset`] follows once the source has seen
    /// everything; an error means that it cannot see for now. The source looks at each endpoint of `looks` at once, because
    /// requests could not connect to it, or its health check is silent, and no event has told why.
    fn changes(self: Box<Self>, looks: Looks) -> BoxStream<'static, Result<Change, DiscoveryError>>;
}
