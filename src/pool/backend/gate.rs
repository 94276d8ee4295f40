//! The gate of a backend: whether it takes requests and how many it has, in one atomic word, so that the two cannot race.

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
};

use super::Refused;

/// Closed or not, and how many are in: one word.
#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU64);

const CLOSED: u64 = 1 << 63;

impl Gate {
    /// One more, unless closed or `limit` are in.
    pub(super) fn enter(&self, limit: Option<NonZeroU32>) -> Result<(), Refused> {
        let limit = limit.map_or(CLOSED, |n| u64::from(n.get()));
        let admit = |word: u64| (word < limit).then_some(word + 1);
        // Sequentially consistent, as is `leave`: see `Backend::call_when_free`.
        match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, admit) {
            Ok(_) => Ok(()),
            Err(word) if word & CLOSED != 0 => Err(Refused::Closed),
            Err(_) => Err(Refused::Full),
        }
    }

    /// One less. True if that was the last one of a closed gate.
    pub(super) fn leave(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before & !CLOSED != 0, "only who entered may leave");
        before == CLOSED | 1
    }

    /// Lets no more in.
    pub(super) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Lets requests in again.
    pub(super) fn open(&self) {
        self.0.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Acquire) & !CLOSED
    }
}
