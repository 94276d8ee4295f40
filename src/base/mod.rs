//! The ground floor: settings, errors, and rules for text from strangers, which every other part may use.
//!
//! [`config`] reads the environment once and gives values; [`error`] is the one place that decides the status, code and
//! words of an error; [`foreign`] bounds text and times that others chose; [`fetch`] makes one bounded GET; [`vital`]
//! ends the process when a task ends that must not; [`phase`] is how far the life of the process has come.
//!
//! The room names no other room, so every other one may use it. A part that must know a backend, a metric or the bytes
//! of a message does not belong here.

pub mod config;
pub mod error;
pub mod foreign;
pub mod fetch;
pub mod vital;
pub mod phase;
