//! What has happened of late: a ring of the latest events, each told once, in words for people.

use std::collections::VecDeque;

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Event;
use crate::base::foreign;

/// Events that are remembered: some minutes of a busy day, and no more than a page shows.
pub const EVENTS_MAX: usize = 256;
/// Longest text of an event, because a watcher is sent all of them again with every change.
const TEXT_BYTES_MAX: usize = 1024;

/// What kind of thing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container was found that cannot be routed, or it stopped being fit without having been ready.
    NotRouted,
    /// A container is being asked for its models.
    Probing,
    /// A probe failed in a new way.
    ProbeFailed,
    /// A container gets requests.
    Ready,
    /// Its models are others than before.
    Models,
    /// A container gets no new requests.
    Unhealthy,
    /// A container was told to stop.
    Draining,
    /// A container has ended.
    Gone,
    /// Its health check does not go on, goes on again, or says something unknown.
    HealthCheck,
    /// Something in a container ran out of memory.
    OutOfMemory,
    /// A label was not understood.
    Label,
    /// Containers with one model differ.
    Differs,
    /// A circuit breaker opened.
    BreakerOpen,
    /// A circuit breaker closed.
    BreakerClosed,
    /// Discovery cannot see.
    DiscoveryLost,
    /// Discovery sees.
    DiscoverySees,
    /// Something about discovery's sight is limited, though it sees.
    DiscoveryNote,
}

impl Kind {
    /// As the status names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::NotRouted => "not_routed",
            Kind::Probing => "probing",
            Kind::ProbeFailed => "probe_failed",
            Kind::Ready => "ready",
            Kind::Models => "models",
            Kind::Unhealthy => "unhealthy",
            Kind::Draining => "draining",
            Kind::Gone => "gone",
            Kind::HealthCheck => "health_check",
            Kind::OutOfMemory => "out_of_memory",
            Kind::Label => "label",
            Kind::Differs => "differs",
            Kind::BreakerOpen => "breaker_open",
            Kind::BreakerClosed => "breaker_closed",
            Kind::DiscoveryLost => "discovery_lost",
            Kind::DiscoverySees => "discovery_sees",
            Kind::DiscoveryNote => "discovery_note",
        }
    }
}

/// The latest events.
#[derive(Debug, Default)]
pub struct Events {
    ring: VecDeque<Event>,
    told: u64,
}

impl Events {
    /// Remembers one more, and forgets the oldest where there are too many.
    pub fn push(&mut self, at: OffsetDateTime, kind: Kind, container: Option<&str>, warning: bool, text: String) {
        if self.ring.len() == EVENTS_MAX {
            self.ring.pop_front();
        }
        self.told += 1;
        self.ring.push_back(Event {
            serial: self.told,
            at: rfc3339(at),
            container: container.map(str::to_owned),
            kind: kind.as_str().to_owned(),
            warning,
            text: foreign::cut(text, TEXT_BYTES_MAX),
        });
    }

    /// All that are remembered, oldest first.
    pub fn latest(&self) -> Vec<Event> {
        self.ring.iter().cloned().collect()
    }
}

/// A time as the status has it, in whole milliseconds, because more digits are only harder to read.
pub fn rfc3339(time: OffsetDateTime) -> String {
    let time = time.replace_millisecond(time.millisecond()).unwrap_or(time);
    time.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered_in_order_and_bounded() {
        let mut events = Events::default();
        for n in 0..EVENTS_MAX + 10 {
            events.push(OffsetDateTime::UNIX_EPOCH, Kind::Ready, Some("a"), false, n.to_string());
        }
        let latest = events.latest();
        assert_eq!(latest.len(), EVENTS_MAX);
        assert_eq!((latest[0].serial, latest[0].text.as_str()), (11, "10"));
        assert_eq!(latest.last().unwrap().serial, EVENTS_MAX as u64 + 10);
        assert_eq!(latest[0].at, "1970-01-01T00:00:00Z");
    }

    #[test]
    fn a_long_text_is_cut() {
        let mut events = Events::default();
        for text in ["x".repeat(TEXT_BYTES_MAX), "ü".repeat(1_000_000)] {
            events.push(OffsetDateTime::UNIX_EPOCH, Kind::Ready, None, false, text);
        }
        let latest = events.latest();
        assert_eq!(latest[0].text, "x".repeat(TEXT_BYTES_MAX));
        assert_eq!(latest[1].text, format!("{}…", "ü".repeat(510)));
    }
}
