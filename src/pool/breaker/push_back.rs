//! What push-backs say of one backend: whether others had better go elsewhere for a while.
//!
//! A 429 may be about one client (its own quota) and says nothing of the backend until another request gets one too, with
//! no success between the two. 503 and 529 speak of the backend itself, so one is enough. The rest is a preference and no
//! bar: requests for which no other replica has a place are sent all the same, and any success ends it.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// So many requests that are pushed back one after the other make the backend rest.
const RUN_MIN: u64 = 2;
/// Rest after a push-back that does not say how long. Engines that say nothing have a full queue, which drains within
/// tenths of a second; to be told so once more costs an attempt, to rest too long leaves a backend idle.
pub(super) const PUSH_BACK_MS: u64 = 250;
/// Shortest rest after a push-back, because some send `Retry-After: 0`.
pub(super) const PUSH_BACK_MIN_MS: u64 = 50;
/// Longest rest after a push-back, because a longer one is about a quota rather than about load.
const PUSH_BACK_MAX_MS: u64 = 10_000;

/// What is known of push-backs, as one word: until when the backend rests, and how many requests were pushed back since
/// the last success. Times are milliseconds since the backend was first seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PushBack(u64);

impl PushBack {
    const RUN_BITS: u32 = 8;
    const RUN_MAX: u64 = (1 << PushBack::RUN_BITS) - 1;

    /// Until when the backend rests.
    fn until_ms(self) -> u64 {
        self.0 >> PushBack::RUN_BITS
    }

    /// One more request has been pushed back. `of_all`: the answer speaks of the backend, not perhaps of its client alone.
    #[must_use]
    pub fn after(self, of_all: bool, retry_after: Option<Duration>, now_ms: u64) -> PushBack {
        let run = ((self.0 & PushBack::RUN_MAX) + 1).min(PushBack::RUN_MAX);
        let mut until_ms = self.until_ms();
        if of_all || run >= RUN_MIN {
            // A shorter rest does not end a longer one.
            until_ms = until_ms.max(now_ms.saturating_add(rest_ms(retry_after)));
        }
        PushBack(until_ms << PushBack::RUN_BITS | run)
    }

    /// How long the backend rests yet.
    pub fn rest(self, now_ms: u64) -> Duration {
        Duration::from_millis(self.until_ms().saturating_sub(now_ms))
    }
}

fn rest_ms(retry_after: Option<Duration>) -> u64 {
    retry_after.map_or(PUSH_BACK_MS, |asked| {
        u64::try_from(asked.as_millis()).unwrap_or(PUSH_BACK_MAX_MS).clamp(PUSH_BACK_MIN_MS, PUSH_BACK_MAX_MS)
    })
}

/// [`PushBack`] of one backend, shared by all threads.
#[derive(Debug, Default)]
pub(super) struct PushBacks(AtomicU64);

impl PushBacks {
    /// See [`PushBack::after`].
    pub(super) fn add(&self, of_all: bool, retry_after: Option<Duration>, now_ms: u64) {
        let add = |word| Some(PushBack(word).after(of_all, retry_after, now_ms).0);
        let _ = self.0.fetch_update(Relaxed, Relaxed, add);
    }

    /// A request has been served. Writes nothing if no request had been pushed back.
    pub(super) fn end(&self) {
        if self.0.load(Relaxed) != 0 {
            self.0.store(0, Relaxed);
        }
    }

    /// See [`PushBack::rest`].
    pub(super) fn rest(&self, now_ms: u64) -> Duration {
        PushBack(self.0.load(Relaxed)).rest(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_a_backend_rest_and_for_how_long() {
        let secs = |n| Some(Duration::from_secs(n));
        // Push-backs (of all, Retry-After), all at 1 000 ms, and the rest after them.
        type Case<'c> = (&'c [(bool, Option<Duration>)], u64);
        let cases: [Case<'_>; 13] = [
            (&[], 0),
            (&[(false, None)], 0),
            (&[(false, secs(3_600))], 0),
            (&[(false, None), (false, None)], 250),
            (&[(false, secs(3_600)), (false, None)], 250),
            (&[(false, secs(3_600)), (false, secs(3_600))], 10_000),
            (&[(false, None), (false, secs(2)), (false, None)], 2_000),
            (&[(true, None)], 250),
            (&[(true, secs(0))], 50),
            (&[(true, secs(7))], 7_000),
            (&[(true, Some(Duration::MAX))], 10_000),
            (&[(true, secs(7)), (false, None)], 7_000),
            (&[(false, None), (true, secs(1))], 1_000),
        ];
        for (pushed, rest_ms) in cases {
            let state =
                pushed.iter().fold(PushBack::default(), |state, (of_all, after)| state.after(*of_all, *after, 1_000));
            assert_eq!(state.rest(1_000).as_millis(), u128::from(rest_ms), "{pushed:?}");
            assert_eq!(state.rest(1_000 + rest_ms), Duration::ZERO, "{pushed:?}");
        }
    }

    #[test]
    fn a_success_ends_the_rest_and_the_run() {
        let push_backs = PushBacks::default();
        for _ in 0..300 {
            push_backs.add(false, Some(Duration::from_secs(5)), 0);
        }
        assert_eq!(push_backs.rest(1_000), Duration::from_secs(4));
        push_backs.end();
        assert_eq!(push_backs.rest(1_000), Duration::ZERO);
        push_backs.add(false, Some(Duration::from_secs(5)), 1_000);
        assert_eq!(push_backs.rest(1_000), Duration::ZERO, "the run begins anew");
    }
}
