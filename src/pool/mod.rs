//! What the two planes share: backends, and the pools they form.

pub mod table;
pub mod backend;
pub mod upstream;
pub mod breaker;
pub mod latency;
pub mod load;
pub mod tally;
pub mod waiting;
pub mod budget;
