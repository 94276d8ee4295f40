//! The data plane: takes in requests, chooses a replica for each, and passes the answers on.
//!
//! # The life of a request
//!
//! ```text
//!  client ──► listen ──► proxy ──► wire::scan    reads the body up to the model
//!                          │  ──► pool::table    knows the pool of that model
//!                          │  ──► balance        chooses a replica and claims a slot of it
//!                          │  ──► pool::upstream has a connection to it
//!  client ◄────────────────┘  ◄── backend        answers
//! ```
//!
//! 1. [`listen`] accepts the connection and hands it to one of its worker threads. The connection stays on that thread
//!    to its end, so nothing on the request path has to be handed over or locked.
//! 2. [`proxy`] serves the connection in one task. It reads the head ([`crate::wire::http1::head`], [`proxy::client`])
//!    and finds out what the path means ([`proxy::paths`]): a page of the proxy itself, the list of models, or a
//!    request to pass on.
//! 3. The task takes in the body up to the model that it names. [`replay`] keeps what it reads, because a second
//!    attempt must send the same bytes; [`crate::wire::scan`] finds the model in them.
//! 4. The task looks the model up in the routing table ([`crate::pool::table`]) and chooses a member of its pool:
//!    [`balance`] ranks them by what [`crate::pool::latency`] and [`crate::pool::load`] know, and [`affinity`] prefers
//!    the replica that has computed the beginning of the prompt.
//! 5. The task claims a slot on that backend, past its [`crate::pool::breaker`]. If every replica is full, or the only
//!    one is still starting, the request waits in the queue of its model ([`crate::pool::waiting`]) for a bounded time.
//! 6. The task sends the request over a connection of that backend ([`crate::pool::upstream`], [`proxy::attempt`]). If
//!    that fails, a table says what to do next ([`proxy::failure`]). Until the client has got a byte of an answer, the
//!    request may be sent again: over a fresh connection if a reused one had died, otherwise to another replica, within
//!    `PROXY_RETRIES` and a [`crate::pool::budget`]. After that it never is.
//! 7. The answer passes through [`proxy::relay`]. The connection and the slot are given back when all of the answer has
//!    come from the backend; the account of the request is closed when the client has it. Dropping the task at any
//!    point gives back everything that the request held.
//!
//! HTTP/2 ends at the door: [`listen`] turns each stream into a connection to the same engine.
//!
//! # What this plane refuses to know
//!
//! It does not know Docker, labels, probes or states of containers, and names nothing in `control`. It reads which
//! backends exist from an immutable snapshot, and it asks the gate of a backend whether requests may enter.
//!
//! A response cache and coalescing belong between the model and the choice of a replica; API keys and admission belong
//! before the body.

pub mod listen;
pub mod proxy;
pub mod balance;
pub mod affinity;
pub mod replay;
