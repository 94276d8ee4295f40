//! What the proxy says about itself: metrics, traces and logs. It takes plain values and knows nothing of who
//! gives them.

pub mod exposition;
pub mod families;
pub mod log;
pub mod metrics;
pub mod otlp;
pub mod process;
