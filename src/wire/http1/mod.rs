//! HTTP/1.1 as far as a proxy needs it: heads and framing, read strictly and handed on as they came. Pure: bytes go in,
//! facts come out; sockets are elsewhere.
//!
//! A general HTTP library turns a message into objects and the objects into a message again, with a task and a queue
//! for each connection between the two. A proxy that changes a few header lines needs neither: what is here finds where
//! a head ends, which of its lines must not pass, and where a body ends, and leaves the bytes where they are. It is strict
//! where two readers could differ in what they see (RFC 9112, 11.2), because what is in front and what is behind the
//! proxy are other readers.

pub mod body;
pub mod date;
pub mod head;
pub mod own_address;
