//! The views of the proxy: metrics, status and pages, made from what the other rooms keep.
//!
//! Each instrument belongs to the part that counts with it. This room reads them when somebody asks: [`report`] tells
//! every metric once, so that `/metrics` and a collector cannot differ; [`status`] is the shape in which the registry
//! describes its containers, with the last events and as text for a terminal; [`pages`] serves both, live where that is
//! asked for.
//!
//! It decides nothing: no request and no route depends on it. It reads the routing table, but names neither plane; the
//! registry fills in a [`status::Status`] when [`pages`] asks for one through a channel.

pub mod report;
pub mod status;
pub mod pages;
