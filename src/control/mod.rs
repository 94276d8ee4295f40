//! The control plane: finds out which backends exist and which of them may take requests.
//!
//! # The life of a container
//!
//! ```text
//!  Docker ──► discovery ──Change──► registry ──publish──► pool::table
//!                                    │    ▲ └─────gate──► pool::backend
//!                               start│    │answer
//!                                    ▼    │
//!                                     probe
//! ```
//!
//! 1. [`discovery`] reports containers: it lists them, follows the events of the engine, and lists again whenever an
//!    event may have been missed. It works out the address at which the proxy reaches each of them.
//! 2. [`labels`] turns the wishes of the container's owner into a checked value. Labels are foreign text: those that cannot be
//!    used are reported, and their defaults stand.
//! 3. `registry` feeds each look and each event to the `lifecycle` of that container, a pure state machine that answers
//!    with effects, and carries these out. The registry is one task and the only writer, so it needs no locks.
//! 4. A container that runs and is healthy is probed: `probe` asks it for its models. The answer makes it ready, if
//!    it belongs to the same incarnation, and the registry publishes a table in which each of its models has a route to
//!    it; `registry::pools` has the rules of that table, as a pure function.
//! 5. While it is ready, `probe` asks again at every refresh, and `scrape` reads its load about once a second where
//!    the balancer has a choice.
//! 6. A stop notice or a failed health check closes the gate of its backend: no new request enters, and those in flight
//!    go on. Those that are still there when the grace ends are cut, as are those of a container that has ended.
//! 7. When the container has gone, its models stay known for a while, because a replacement may be on its way: a
//!    request for one of them waits if a container is starting, otherwise it gets 503 and not 404.
//!
//! # What this plane refuses to know
//!
//! It does not see requests, and names nothing in `data`. It learns how many are in flight from the gate of a backend,
//! and writes in `pool` only: the routing table, the gates, and what engines report of their load.
//!
//! Losing sight of the engine changes no route. Another orchestrator is another [`discovery::Discovery`].

pub mod discovery;
pub mod labels;
pub(crate) mod lifecycle;
pub(crate) mod registry;
pub(crate) mod probe;
pub(crate) mod scrape;
