//! What `/status`, its page and `inference-proxy status` show: every labelled container, its state and why, what it does,
//! and what has happened of late, as plain data. `docs/status.md` describes the shape for users.

pub mod events;
pub mod text;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Version of the shape. It stays the same as long as fields are only added.
pub const VERSION: u32 = 1;

/// A question to the registry, which keeps the status.
#[derive(Debug)]
pub enum Ask {
    /// The whole picture.
    Status(oneshot::Sender<Status>),
}

/// The whole picture. The shape is versioned: fields are added, never changed, within one version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of this shape.
    pub version: u32,
    /// Version of the proxy.
    pub proxy_version: String,
    /// When this was taken, by the proxy's clock; RFC 3339, as all times here.
    pub at: String,
    /// Since when the proxy runs.
    pub started: String,
    /// The first scan and its probes are done, and the proxy is not shutting down.
    pub ready: bool,
    /// It is shutting down.
    pub stopping: bool,
    /// State of discovery.
    pub discovery: DiscoveryStatus,
    /// Every model that is known, sorted by id.
    pub models: Vec<ModelStatus>,
    /// Every container that carries `inference.enable`, sorted by name.
    pub containers: Vec<ContainerStatus>,
    /// What has happened of late, oldest first.
    pub events: Vec<Event>,
}

/// Whether discovery sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoveryStatus {
    /// What is watched.
    pub source: String,
    /// It sees now.
    pub connected: bool,
    /// Since when it sees, or does not.
    pub since: Option<String>,
    /// When everything was compared last.
    pub last_sync: Option<String>,
    /// The last trouble; gone once discovery has seen for a while.
    pub error: Option<String>,
    /// What to do about it.
    pub advice: Option<String>,
    /// What is limited or unusual, though it sees, and what to do about that.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Its id, as requests name it.
    pub id: String,
    /// Some container may get requests for it.
    pub ready: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Names of the containers that get its requests, sorted.
    pub replicas: Vec<String>,
    /// Requests in flight.
    pub in_flight: u64,
    /// Requests that wait for a place.
    pub waiting: u64,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// The word of a [`crate::telemetry::kinds::ContainerState`]. It is text, because a later proxy may have more states.
    pub state: String,
    /// Since when.
    pub since: String,
    /// Why it gets no requests; `None` while it does.
    pub reason: Option<String>,
    /// What to change; `None` if there is nothing to be done.
    pub advice: Option<String>,
    /// Models it announced.
    pub models: Vec<String>,
    /// Where it is reached.
    pub address: Option<String>,
    /// Over which network.
    pub network: Option<String>,
    /// Requests it is serving.
    pub in_flight: u64,
    /// Most requests at a time, if its label says so.
    pub max_inflight: Option<u32>,
    /// Share of traffic among replicas.
    pub weight: f64,
    /// Requests that wait for a place, over all its models.
    pub waiting: u64,
    /// Mean time from sending a request to the first token of its answer, over the last minute.
    pub ttft_ms: Option<u64>,
    /// Time to the first byte of an answer, per request in flight, as the choice of a replica takes it into account; `None`
    /// while it knows none, or does not ask.
    pub latency_ms: Option<f64>,
    /// Tokens generated per second, over the last ten.
    pub tokens_per_second: f64,
    /// `closed`, `open` or `half-open`; `None` while it has no backend.
    pub breaker: Option<String>,
    /// Attempts that were answered, since the container became known.
    pub served: u64,
    /// Attempts that failed by its fault.
    pub failed: u64,
    /// Attempts that it turned away because it is busy.
    pub turned_away: u64,
    /// What went wrong last, with a probe or with a request.
    pub last_error: Option<LastError>,
    /// Labels that were not understood, and a health check that is overdue.
    pub problems: Vec<String>,
}

/// What went wrong last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// When.
    pub at: String,
    /// What.
    pub text: String,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with every event.
    pub serial: u64,
    /// When.
    pub at: String,
    /// The container it is about, if it is about one.
    pub container: Option<String>,
    /// What kind of thing it is; [`events::Kind`] lists them.
    pub kind: String,
    /// It asks for somebody's attention.
    pub warning: bool,
    /// What has happened, for people.
    pub text: String,
}
