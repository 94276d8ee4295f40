//! The source of containers as the registry knows it: whether discovery sees, since when, and what limits it. Pure.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

use crate::{
    control::discovery::{DiscoveryError, Note},
    observe::status::{DiscoveryStatus, events::rfc3339},
};

/// How long discovery must see before its last error counts as over. Sources wait for less than this between attempts, so
/// an error that comes and goes is reported once.
pub(super) const SETTLES_AFTER: Duration = Duration::from_secs(10);

/// Discovery, and what it last reported of itself.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: &'static str,
    pub(super) is_connected: bool,
    /// When it began to see, or ceased to; `None` before the first report.
    since: Option<OffsetDateTime>,
    /// The last error, until it is over.
    error: Option<DiscoveryError>,
    /// Limits of what it sees.
    notes: Vec<Note>,
    /// When the last error is over, if discovery sees until then.
    pub(super) settles_at: Option<Instant>,
    last_sync: Option<OffsetDateTime>,
}

/// The state of a source when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loss {
    /// The error is another one than before.
    pub(super) is_new: bool,
    /// The source saw until now.
    pub(super) was_connected: bool,
}

impl Source {
    pub(super) fn new(name: &'static str) -> Source {
        Source {
            name,
            is_connected: false,
            since: None,
            error: None,
            notes: Vec::new(),
            settles_at: None,
            last_sync: None,
        }
    }

    /// Takes in that the source cannot see.
    pub(super) fn failed(&mut self, error: DiscoveryError, at: OffsetDateTime) -> Loss {
        let loss = Loss { is_new: self.error.as_ref() != Some(&error), was_connected: self.is_connected };
        self.turn(false, at);
        self.settles_at = None;
        self.error = Some(error);
        loss
    }

    /// Takes in that the source has listed everything.
    pub(super) fn listed(&mut self, now: Instant, at: OffsetDateTime) {
        self.turn(true, at);
        if self.error.is_some() {
            self.settles_at.get_or_insert(now + SETTLES_AFTER);
        }
        self.last_sync = Some(at);
    }

    /// Forgets the last error if the source has seen for long enough; true when it does.
    pub(super) fn settles(&mut self, now: Instant) -> bool {
        let is_over = self.settles_at.is_some_and(|at| at <= now);
        if is_over {
            self.settles_at = None;
            self.error = None;
        }
        is_over
    }

    /// Takes over all notes of the source, and returns those that are new.
    pub(super) fn note(&mut self, notes: Vec<Note>) -> Vec<Note> {
        let new = notes.iter().filter(|note| !self.notes.contains(note)).cloned().collect();
        self.notes = notes;
        new
    }

    fn turn(&mut self, is_connected: bool, at: OffsetDateTime) {
        if self.since.is_none() || self.is_connected != is_connected {
            self.since = Some(at);
        }
        self.is_connected = is_connected;
    }

    /// The source as the status shows it.
    pub(super) fn status(&self) -> DiscoveryStatus {
        DiscoveryStatus {
            source: self.name.to_owned(),
            connected: self.is_connected,
            since: self.since.map(rfc3339),
            last_sync: self.last_sync.map(rfc3339),
            error: self.error.as_ref().map(|error| error.what.clone()),
            advice: self.error.as_ref().map(|error| error.advice.clone()),
            notes: self.notes.iter().map(ToString::to_string).collect(),
        }
    }
}
