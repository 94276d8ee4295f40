//! What the tests are made of: an engine, containers on it, a proxy among them, and clients that keep time.
//!
//! Nothing here knows how the proxy works inside. It is reached over HTTP, told what to do by labels and environment
//! variables, and judged by its answers, its log and the engine's own events.

pub(crate) mod backend;
pub(crate) mod client;
pub(crate) mod engine;
pub(crate) mod events;
pub(crate) mod example;
pub(crate) mod forwarder;
pub(crate) mod load;
pub(crate) mod proxy;
pub(crate) mod scripted;
pub(crate) mod second;
pub(crate) mod traefik;
pub(crate) mod wait;
