//! The control plane: decides which backends there are.

pub mod discovery;
pub mod labels;
pub mod lifecycle;
pub mod registry;
pub mod probe;
pub mod scrape;
