//! What the proxy says about itself: metrics and logs. A leaf: it takes plain values and knows no other module.

pub mod log;
pub mod metrics;
