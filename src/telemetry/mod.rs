//! What the proxy says about itself: metrics, traces and logs. It takes plain values and knows nothing of who
//! gives them.

pub mod exposition;
pub mod families;
pub mod http_server;
pub mod log;
pub mod metrics;
pub mod operation;
pub mod otlp;
pub mod process;
pub mod routes;
