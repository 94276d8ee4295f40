//! One API for many inference servers: a reverse proxy that finds its backends by their Docker labels.
//!
//! This page is the map. Read it first, then one request's path ([`data::proxy`]), then one container's life
//! ([`control::registry`]).
//!
//! # Two planes
//!
//! ```text
//!              CONTROL                                                      DATA
//!  Docker ──► discovery ──Change──► registry ──publish──► table ◄──read── proxy ◄── listen ◄── clients
//!                                    │   ▲                (snapshot)        │
//!                             effects│   │answers            backend ◄──────┘ in-flight, connections
//!                                    ▼   │                  (gate)
//!                                    probe                                  └──► upstream ──► backends
//! ```
//!
//! Control decides which backends exist and which of them take requests; data serves requests. They know nothing of each
//! other and meet in two places: the routing [`pool::table`], an immutable snapshot that is swapped as a whole, and the
//! gate of each [`pool::backend`], one atomic word that says whether it takes requests and how many it has. Control
//! writes, data reads.
//!
//! # The life of a request
//!
//! [`data::listen`] accepts its connection on one of its worker threads, which keeps it to the end. There
//! [`data::proxy`] serves it, in one task: it reads the head ([`wire::http1::head`], [`data::proxy::client`]), finds
//! out what its path means ([`data::proxy::paths`]), takes in its body up to the model it names ([`data::replay`],
//! [`wire::scan`]), looks the model up in the table, chooses a member of the model's pool ([`data::balance`], by what
//! [`pool::latency`], [`pool::load`] and [`data::affinity`] know), claims a place on its backend, past its
//! [`pool::breaker`], or waits for one in the model's line ([`pool::waiting`]), and sends it over a connection of that
//! backend ([`pool::upstream`], [`data::proxy::attempt`]). What is to be done if that fails is a table
//! ([`data::proxy::failure`]): before a byte of the answer has come, it is sent again, on a fresh connection if a
//! reused one had died, else to another backend, within a [`pool::budget`]. The answer passes through
//! [`data::proxy::relay`]: the backend's connection and its place are given back when all of it has come, the account
//! is closed when the client has it, and both if it is broken off.
//!
//! HTTP/1.1 is read and written here and not by a library, because the heads and the framing of two messages are all
//! that a proxy has to understand, and to understand them where they lie takes less time and a sixth of the memory of
//! turning them into objects and back; `docs/performance.md` has the figures. HTTP/2 is the h2
//! library's, at the door: each of its streams becomes a connection to the same engine.
//!
//! # The life of a container
//!
//! [`control::discovery`] reports what it sees and hears of a container. [`control::registry`], the single writer,
//! feeds that to the container's [`control::lifecycle`], a pure state machine, and carries out what comes back: asking
//! for its models ([`control::probe`]), letting requests in, keeping new ones out while those in flight go on, cutting
//! them, publishing a new table.
//!
//! # What it says of itself
//!
//! Whoever counts holds its instrument ([`telemetry::metrics`], [`pool::tally`]) and adds to it; [`observe::report`]
//! tells all of them once, in the words of one table ([`telemetry::families`]), to `/metrics`
//! ([`telemetry::exposition`]) and to a collector ([`telemetry::otlp`]). [`data::proxy::trace`] follows a request where
//! traces are wanted. [`observe::status`] is what the registry knows of every container and what has happened lately,
//! for programs, the terminal and the page ([`observe::pages`]).
//!
//! # What always holds
//!
//! * No request enters a backend that has been closed, whatever snapshot the request holds.
//! * A backend is ready only by an answer of the same incarnation to a probe that was begun for it.
//! * An answer that was broken off never ends cleanly for its client.
//! * Nothing is sent to a second backend once a byte of an answer has come.
//! * Losing sight of the engine changes no route: what is known stays until something is known to be otherwise.
//! * A task without which the table or a port would stand still ends the process when it ends ([`base::vital`]).
//! * Every queue, buffer and wait has a bound, and the request path takes no contended lock.
//! * Nobody waits for whoever reads the log: lines that are not taken are dropped and counted.
//! * Keys, prompts and container environments are in no log, metric, status or error.
//!
//! # Layers
//!
//! A module uses only those below it (a test reads the `use` lines):
//!
//! ```text
//! main
//! app, commands, cli
//! listen                                 discovery::{docker, fixed}
//! proxy, demo
//! admin
//! report                                 registry, probe, scrape
//! table, status
//! balance
//! backend
//! upstream, affinity
//! replay, breaker, budget, load,         lifecycle, fetch
//! tally, waiting
//!                                        discovery
//!                                        discovery::{network, signal, vantage}
//! telemetry
//! scan, labels, http1, latency
//! config, error
//! foreign, vital
//! ```
//!
//! Where later parts go: another orchestrator is another [`control::discovery::Discovery`]; what a policy must know of
//! a backend's load belongs to [`pool::backend`] and is decided in [`data::balance`]; a response cache and coalescing
//! sit in [`data::proxy`] between the model and the choice of a backend, admission and API keys before it.

pub mod app;
pub mod cli;
pub mod data;
pub mod control;
pub mod observe;
pub mod pool;
pub mod telemetry;
pub mod wire;
pub mod base;
pub mod demo;
