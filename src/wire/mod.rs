//! From bytes to facts, without a socket.

pub mod http1;
pub mod scan;
