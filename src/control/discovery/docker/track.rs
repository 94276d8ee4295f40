//! What the watcher knows of one container, from events, lists and looks.

use std::time::Duration;

use super::{answers::Summary, inspect::Inspected};
use crate::control::discovery::{Endpoint, signal::is_stop_notice};

/// What is known of one container.
#[derive(Debug, Default)]
pub(super) struct Track {
    /// Grows with every event: a look that began before is stale.
    pub(super) heard: u64,
    /// A signal that may have been a stop notice, until a look tells.
    pub(super) signalled: Option<Signalled>,
    pub(super) seen: Option<Inspected>,
    /// What the last list that named it said.
    pub(super) summary: Option<Summary>,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) look: Look,
    /// How long the next look waits after one that brought nothing.
    pub(super) look_again: Option<Duration>,
    /// Why the last look brought nothing.
    pub(super) trouble: Option<String>,
    /// The endpoint is what the list says, because no look has brought anything.
    pub(super) is_unreadable: bool,
    /// The last list lacks it, and no event has told of it since.
    pub(super) is_unlisted: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Signalled {
    pub(super) signal: Option<u8>,
    pub(super) time_nanos: i64,
    /// It was told because it happened before the subscription, so it may be about an earlier run.
    pub(super) is_replay: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    #[default]
    Idle,
    Queued,
    UnderWay,
}

// === impl Track ===

impl Track {
    /// If the last signal was a stop notice for the run that was seen: the container's id, once.
    pub(super) fn stop_notice(&mut self, now_nanos: i64) -> Option<String> {
        let seen = self.seen.as_ref()?;
        let signalled = self.signalled.filter(|s| !s.is_replay || !is_before(s.time_nanos, seen, now_nanos))?;
        self.endpoint.as_ref()?;
        self.signalled = None;
        is_stop_notice(signalled.signal, seen.stop_signal, seen.forges_signals()).then(|| seen.id.clone())
    }

    /// Whether it cannot be reached without this network. Where there are ways on other networks, a look tells which of
    /// them are left; which one is used is not known here.
    pub(super) fn needs(&self, network: &str) -> bool {
        let reach = self.endpoint.as_ref().and_then(|endpoint| endpoint.reach.as_ref().ok());
        let reach = reach.filter(|reach| reach.others.is_empty());
        reach.and_then(|reach| reach.network.as_ref()).is_some_and(|used| used.id == network || used.name == network)
    }

    pub(super) fn name<'a>(&'a self, id: &'a str) -> &'a str {
        let listed = self.summary.as_ref().map_or(id, |summary| summary.name.as_str());
        self.seen.as_ref().map_or(listed, |seen| seen.name.as_str())
    }
}

/// Whether a replayed event is about an earlier run than the one seen. A start ahead of the clock tells nothing about
/// that, because the clock has been put back since.
pub(super) fn is_before(time_nanos: i64, seen: &Inspected, now_nanos: i64) -> bool {
    time_nanos < seen.started_nanos && seen.started_nanos <= now_nanos
}
