//! What every part may use.

pub mod config;
pub mod error;
pub mod foreign;
pub mod fetch;
pub mod vital;
