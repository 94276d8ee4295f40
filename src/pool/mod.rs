//! The state that both planes share: the routing table, the backends in it, and what is known of each.
//!
//! Control writes the [`table`] and opens and closes the gate of each [`backend`]; data reads the table and passes the
//! gate. Everything else here belongs to one backend or to one model, is written while requests pass, and takes no
//! contended lock: connections that can be reused ([`upstream`]), whether attempts may enter ([`breaker`]), how fast
//! and how busy it is ([`latency`], [`load`]), what people are told of it ([`tally`]), the queue of a model
//! ([`waiting`]), and how many retries its pool allows ([`budget`]).
//!
//! The room does not know why a backend came or went, and it does not choose between replicas: the first is decided in
//! `control`, the second in `data`. It names neither of them.

pub mod table;
pub mod backend;
pub mod upstream;
pub mod breaker;
pub mod latency;
pub mod load;
pub mod tally;
pub mod waiting;
pub mod budget;
