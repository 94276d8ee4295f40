//! One API for many inference servers: a reverse proxy that finds its backends by their Docker labels.
//!
//! This page is the map. Read it first, then the life of a request ([`data`]), then the life of a container
//! ([`control`]).
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
//! Control decides which backends exist and which of them take requests; data serves requests. They know nothing of
//! each other and meet in two places: the routing table ([`pool::table`]), an immutable snapshot that is swapped as a
//! whole, and the gate of each backend ([`pool::backend`]), one atomic word that says whether it takes requests and how
//! many it has. Control writes, data reads.
//!
//! # The rooms
//!
//! Each folder of `src/` is a room, and its page says what it is for and what it refuses to know:
//!
//! * [`data`] serves requests: it accepts, reads up to the model, chooses a replica, sends, tries again, passes the
//!   answer on.
//! * [`control`] finds containers, probes them, follows their lives, and publishes the routing table.
//! * [`observe`] tells metrics and status to programs, terminals and the page, and decides nothing.
//! * [`pool`] is what the planes share: the table, and what is known of each backend.
//! * [`telemetry`] holds the instruments, and the ways out of the process for metrics, traces and logs.
//! * [`wire`] turns bytes into facts.
//! * [`base`] has the settings, the errors, and the rules for text from strangers.
//! * [`cli`] is the command line; [`app`] puts the parts together; [`demo`] is a backend to try the proxy with.
//!
//! # Layers
//!
//! A room uses only those below its own row; rooms in one row never name each other. A test reads the rows from this
//! block and the paths from the code:
//!
//! ```text
//! main
//! app
//! cli
//! data | control
//! observe
//! pool
//! telemetry
//! wire | base | demo
//! ```
//!
//! # What always holds
//!
//! * No request enters a backend that has been closed, whatever snapshot the request holds.
//! * A backend is ready only by an answer of the same incarnation to a probe that was begun for it.
//! * An answer that was broken off never ends cleanly for its client.
//! * Nothing is sent to a second backend once the client has got a byte of an answer.
//! * Losing sight of the engine changes no route: what is known stays until something is known to be otherwise.
//! * A task without which the table or a port would stand still ends the process when it ends ([`base::vital`]).
//! * The process has one phase, which only moves on ([`base::phase`]); every part that starts, stops or drains reads it.
//! * All ports are answered by one HTTP engine, so an answer does not depend on the port.
//! * Every queue, buffer and wait has a bound, and the request path takes no contended lock.
//! * Nothing waits for the reader of the log: lines that are not taken are dropped and counted.
//! * Keys, prompts and container environments are in no log, metric, status or error.
//!
//! # The proxy about itself
//!
//! Each part that counts holds its instrument ([`telemetry::metrics`], [`pool::tally`]) and adds to it;
//! [`observe::report`] tells all of them once, in the words of one table ([`telemetry::families`]), to `/metrics`
//! ([`telemetry::exposition`]) and to a collector ([`telemetry::otlp`]). [`data::proxy::trace`] follows a request where
//! traces are wanted: as spans of `tracing`, on a dispatcher that belongs to the proxy and from which
//! `tracing-opentelemetry` exports them; a request that is not sampled makes none, and the log never hears of them. What a
//! proxy tells of itself with is one [`telemetry::Telemetry`]. [`observe::status`] has what the registry knows of every container and what has happened lately,
//! for programs, the terminal and the page ([`observe::pages`]).

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
