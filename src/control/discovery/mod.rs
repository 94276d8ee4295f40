//! Where backends come from: a stream of changes that ends in the truth, whatever happens on the way.
//!
//! [`Discovery`] is the seam for other orchestrators. A source reports what it sees ([`Endpoint`]) and what it hears
//! ([`Change`]); what that means for requests is decided in [`crate::control::lifecycle`], not here.

pub mod docker;
pub mod fixed;
pub mod network;
pub mod signal;
pub mod vantage;

use std::{sync::Arc, time::Duration};

use futures::stream::BoxStream;
use tokio::sync::mpsc;

use crate::{
    base::foreign::FOREVER,
    control::{discovery::network::Reach, labels::LabelSpec},
    telemetry::metrics::Metrics,
};

/// Identity of an endpoint in its source; a container id for Docker.
pub type EndpointId = Arc<str>;

/// One start of one endpoint, told from others by when it was started. The same container comes back under the same id
/// with another address; everything learnt about it belongs to one incarnation.
///
/// Two of them are the same or they are not. They have no order, because the clock that dates them may be put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(pub i64);

impl Incarnation {
    /// A start whose time is not known: it may be any.
    pub const UNKNOWN: Incarnation = Incarnation(0);
}

/// Whether the process of an endpoint runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It runs.
    Running,
    /// It exists and does not get any processor time.
    Paused,
    /// It has ended and will be started again.
    Restarting,
    /// It does not run.
    Stopped,
}

/// What the orchestrator's own health check says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// There is no check.
    None,
    /// There is a check, and what it says is not understood.
    Unknown,
    /// No verdict yet.
    Starting,
    /// Fine.
    Healthy,
    /// Not fine.
    Unhealthy,
}

/// How the orchestrator's health check goes on, whatever it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthCheck {
    /// The longest time in which a check that works must have ended.
    pub overdue_after: Duration,
    /// Another number after each check that has ended; its value means nothing.
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
    /// Checks that run each `interval` for `timeout` at most and begin after `start_period`. [`HealthCheck::mark`] is that
    /// of a check that has not ended yet.
    pub fn every(interval: Duration, timeout: Duration, start_period: Duration) -> HealthCheck {
        let sum = interval.saturating_mul(2).saturating_add(timeout).saturating_add(start_period);
        HealthCheck { overdue_after: sum.min(FOREVER), mark: 0 }
    }
}

impl Default for HealthCheck {
    /// As Docker checks where the image does not say.
    fn default() -> HealthCheck {
        HealthCheck::every(Duration::from_secs(30), Duration::from_secs(30), Duration::ZERO)
    }
}

/// What a source sees of one endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Identity.
    pub id: EndpointId,
    /// Name for people.
    pub name: String,
    /// What it stands for: whoever has the same role may be its replacement. The Compose service, or its name.
    pub role: Arc<str>,
    /// Whoever replaces it stops it first, and then starts the one in its place: so does Compose.
    pub is_stopped_first: bool,
    /// Image it was made from.
    pub image: String,
    /// Which start of it this is.
    pub incarnation: Incarnation,
    /// Whether it runs.
    pub phase: Phase,
    /// Verdict of its own health check.
    pub health: Health,
    /// How that check goes on.
    pub health_check: HealthCheck,
    /// Where it can be reached, or why it cannot.
    pub reach: Result<Reach, Obstacle>,
    /// What its labels ask for.
    pub labels: LabelSpec,
    /// Labels that were not understood.
    pub problems: Vec<String>,
    /// Why it must not be routed whatever its state: it is the proxy itself, or its opt-in is unclear.
    pub excluded: Option<Obstacle>,
    /// How long it gets to end by itself once it has been told to stop.
    pub stop_grace: Duration,
}

// === impl Endpoint ===

impl Endpoint {
    /// Nothing is known of it but that it is there: the source has not been told more.
    pub fn is_unread(&self) -> bool {
        self.incarnation == Incarnation::UNKNOWN && self.reach.is_err()
    }
}

/// Why an endpoint cannot be used, in two halves for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// What is in the way.
    pub what: String,
    /// What the user can do about it.
    pub advice: String,
}

/// Something that people should know about what a source sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What is limited or unusual.
    pub what: String,
    /// What the user can do about it; `None` if nothing needs to be done.
    pub advice: Option<String>,
}

/// Something that a source has seen or heard.
#[derive(Debug, Clone)]
pub enum Change {
    /// The whole truth: what is not listed is gone.
    Reset(Vec<Endpoint>),
    /// This endpoint is now as described.
    Upsert(Box<Endpoint>),
    /// It has been told to stop: it finishes what it has and must get nothing new.
    Stopping(EndpointId),
    /// It gets no processor time: its connections hang without an error.
    Suspended(EndpointId),
    /// It lost the network in use: its connections hang without an error and will not come back.
    Detached(EndpointId),
    /// Something in it was killed for want of memory; it may or may not still work.
    OutOfMemory(EndpointId),
    /// Its process has ended.
    Ended(EndpointId),
    /// What is limited or unusual about the source's sight, though it sees: all of it, each time that it changes.
    Notes(Vec<Note>),
}

/// The source cannot see at the moment; it keeps trying. Nothing that is known becomes false by this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {advice}")]
pub struct DiscoveryError {
    /// What failed.
    pub what: String,
    /// What the user can do.
    pub advice: String,
}

/// Endpoints that the source is asked to look at.
pub type Looks = mpsc::Receiver<EndpointId>;

/// A source of endpoints.
pub trait Discovery: Send + 'static {
    /// Its name in logs and status.
    fn name(&self) -> &'static str;

    /// Where it may count what it hears. Called once, before [`Discovery::changes`].
    fn count_in(&mut self, _metrics: &Arc<Metrics>) {}

    /// Changes, endlessly. A [`Change::Reset`] follows once the source has seen everything, at the start and after every
    /// error; an error means that it cannot see for now. Endpoints named in `looks` are looked at at once: requests could not
    /// connect to them, and what has happened to them may not have been told yet.
    fn changes(self: Box<Self>, looks: Looks) -> BoxStream<'static, Result<Change, DiscoveryError>>;
}
