//! The data plane: serves requests.

pub mod listen;
pub mod proxy;
pub mod balance;
pub mod affinity;
pub mod replay;
