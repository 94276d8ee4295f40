//! The integration suite: the whole proxy in this process, real sockets, no Docker.
//!
//! One binary, one module per part of the acceptance list (`tests/README.md`); a test name starts with its line
//! (`r01_…` is R1, `s02_…` is S2). Backends are scripted on raw TCP, so that they can break every rule of HTTP, and
//! clients work with bytes, so that they can stall, half-close and vanish. Containers come from a hand-fed discovery.
//!
//! Nothing here sleeps to let something happen: a test opens a gate, or waits for a condition with a deadline.
//! `support` refuses to know what is tested; `support::app` is the only file that knows how the product is called.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../fuzz/checks/mod.rs"]
#[expect(unreachable_pub, reason = "for the fuzz targets this is a library")]
mod checks;
mod support;

mod affinity;
mod answers;
mod architecture;
mod balancing;
mod body;
mod breaker;
mod clients;
mod commands;
mod documentation;
mod drain;
mod encoded;
mod engine;
mod failover;
mod failures;
mod fuzz;
mod headers;
mod hostile;
mod ids;
mod keepalive;
mod limits;
mod logs;
mod measured;
mod metrics;
mod models;
mod observability;
mod otlp;
mod pools;
mod probes;
mod readings;
mod retry;
mod reuse;
mod routing;
mod scrape;
mod secrets;
mod shortage;
mod status;
mod storm;
mod streaming;
mod upgrade;
mod vital;
