//! What the proxy tells of itself: reads, and decides nothing.

pub mod report;
pub mod status;
pub mod pages;
