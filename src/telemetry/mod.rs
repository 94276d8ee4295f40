//! What the proxy says about itself: metrics, traces and logs. It takes plain values and knows nothing of who
//! gives them.

pub mod exposition;
pub mod families;
pub mod http_server;
pub mod kinds;
pub mod log;
pub mod metrics;
pub mod operation;
pub mod otlp;
pub mod process;
pub mod routes;

use std::sync::Arc;

use self::{metrics::Metrics, otlp::Tracing};

/// What a proxy tells of itself with. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Telemetry {
    /// Its instruments.
    pub metrics: Arc<Metrics>,
    /// What makes its spans, where traces are wanted.
    pub tracing: Option<Tracing>,
}
