//! How much all bodies together may hold, and which of them give way when that is not enough.
//!
//! A body is counted by what it holds. One that waits for its own model can hold up everybody's for as long as its sender
//! likes, so it is also on a list: when there is no room, those that have been on it for long give way, the slowest first.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::task::AtomicWaker;
use tokio::time::Instant;

/// How long a body may be held without its model when others need the room. A slow upload that is left alone for so long
/// has had its chance.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What all bodies together hold.
#[derive(Debug)]
pub(super) struct Budget {
    limit_bytes: usize,
    held_bytes: AtomicUsize,
    waiting: Mutex<Waiting>,
}

/// Bodies whose model has not come.
#[derive(Debug, Default)]
struct Waiting {
    bodies: Vec<Arc<Waiter>>,
    /// None of them has waited for long before then.
    none_before: Option<Instant>,
}

/// A body whose model has not come.
#[derive(Debug)]
pub(super) struct Waiter {
    since: Instant,
    /// What it is counted for.
    counted_bytes: AtomicUsize,
    /// What has come of it in all.
    seen_bytes: AtomicUsize,
    gave_way: AtomicBool,
    task: AtomicWaker,
}

// === impl Budget ===

impl Budget {
    pub(super) fn new(limit_bytes: usize) -> Budget {
        Budget { limit_bytes, held_bytes: AtomicUsize::new(0), waiting: Mutex::default() }
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes.load(Relaxed)
    }

    /// As much is held as may be.
    pub(super) fn is_used_up(&self) -> bool {
        self.held_bytes() >= self.limit_bytes
    }

    /// Counts these bytes if there is room for them.
    pub(super) fn try_take(&self, bytes: usize) -> bool {
        let fits = self.held_bytes.fetch_add(bytes, Relaxed).saturating_add(bytes) <= self.limit_bytes;
        if !fits {
            self.give(bytes);
        }
        fits
    }

    /// Counts these bytes, for which others may have to give way if it is said what time it is.
    pub(super) fn take(&self, bytes: usize, now: Option<Instant>) -> bool {
        self.try_take(bytes) || now.is_some_and(|now| self.make_room(bytes, now)) && self.try_take(bytes)
    }

    /// Counts bytes that are held already.
    pub(super) fn add(&self, bytes: usize) {
        self.held_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn give(&self, bytes: usize) {
        self.held_bytes.fetch_sub(bytes, Relaxed);
    }

    /// Puts a body that is counted for `counted_bytes` on the list of those that wait for their model.
    pub(super) fn wait(&self, counted_bytes: usize, seen_bytes: usize, since: Instant) -> Arc<Waiter> {
        let waiter = Arc::new(Waiter {
            since,
            counted_bytes: AtomicUsize::new(counted_bytes),
            seen_bytes: AtomicUsize::new(seen_bytes),
            gave_way: AtomicBool::new(false),
            task: AtomicWaker::new(),
        });
        self.waiting().bodies.push(waiter.clone());
        waiter
    }

    /// Takes it off the list, and returns what it is counted for.
    pub(super) fn waits_no_more(&self, waiter: &Arc<Waiter>) -> usize {
        let mut waiting = self.waiting();
        if let Some(index) = waiting.bodies.iter().position(|one| Arc::ptr_eq(one, waiter)) {
            waiting.bodies.swap_remove(index);
        }
        waiter.counted_bytes.swap(0, Relaxed)
    }

    /// Has bodies give way until there is room for `bytes`. They are counted no longer at once; their memory is free when
    /// their tasks have heard of it.
    fn make_room(&self, bytes: usize, now: Instant) -> bool {
        let mut waiting = self.waiting();
        if waiting.none_before.is_some_and(|then| now < then) {
            return false;
        }
        while self.held_bytes().saturating_add(bytes) > self.limit_bytes {
            let Some(index) = waiting.slowest(now) else {
                waiting.none_before = waiting.bodies.iter().map(|body| body.since + PATIENCE).min();
                return false;
            };
            let slowest = waiting.bodies.swap_remove(index);
            slowest.gave_way.store(true, Relaxed);
            self.give(slowest.counted_bytes.swap(0, Relaxed));
            slowest.task.wake();
        }
        true
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// The slowest of those that have waited for long.
    fn slowest(&self, now: Instant) -> Option<usize> {
        let bodies = self.bodies.iter().enumerate();
        let waited = bodies.map(|(index, body)| (index, body, now.saturating_duration_since(body.since)));
        let late = waited.filter(|(_, _, waited)| *waited >= PATIENCE);
        late.min_by(|(_, a, a_waited), (_, b, b_waited)| a.pace(*a_waited).total_cmp(&b.pace(*b_waited)))
            .map(|(index, ..)| index)
    }
}

// === impl Waiter ===

impl Waiter {
    /// Bytes per second.
    fn pace(&self, waited: Duration) -> f64 {
        self.seen_bytes.load(Relaxed) as f64 / waited.as_secs_f64()
    }

    pub(super) fn counted_bytes(&self) -> usize {
        self.counted_bytes.load(Relaxed)
    }

    pub(super) fn counts_for(&self, more_bytes: usize, seen_bytes: usize) {
        self.counted_bytes.fetch_add(more_bytes, Relaxed);
        self.seen_bytes.store(seen_bytes, Relaxed);
    }

    pub(super) fn has_given_way(&self) -> bool {
        self.gave_way.load(Relaxed)
    }

    /// Ready once it has to give way.
    pub(super) fn poll_gave_way(&self, cx: &Context<'_>) -> Poll<()> {
        self.task.register(cx.waker());
        if self.has_given_way() { Poll::Ready(()) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A budget that is used up by bodies of these sizes in bytes, which have come since these seconds.
    fn used_up(bodies: &[(usize, u64)], now: Instant) -> (Budget, Vec<Arc<Waiter>>) {
        let budget = Budget::new(bodies.iter().map(|(bytes, _)| bytes).sum());
        let waiters = bodies.iter().map(|(bytes, seconds)| {
            assert!(budget.try_take(*bytes));
            budget.wait(*bytes, *bytes, now - SECOND * u32::try_from(*seconds).unwrap())
        });
        let waiters = waiters.collect();
        (budget, waiters)
    }

    fn gave_way(waiters: &[Arc<Waiter>]) -> Vec<bool> {
        waiters.iter().map(|waiter| waiter.has_given_way()).collect()
    }

    #[test]
    fn the_slowest_of_those_that_have_waited_for_long_give_way_until_there_is_room() {
        let now = Instant::now() + SECOND * 1000;
        let bodies = [(100, 59), (1000, 70), (100, 70), (300, 90), (100, 61)];
        for (wanted, expected) in [
            (1, [false, false, true, false, false]),
            (100, [false, false, true, false, false]),
            (101, [false, false, true, false, true]),
            (201, [false, false, true, true, true]),
            (501, [false, true, true, true, true]),
            (1500, [false, true, true, true, true]),
        ] {
            let (budget, waiters) = used_up(&bodies, now);
            assert!(budget.take(wanted, Some(now)), "{wanted}");
            assert_eq!(gave_way(&waiters), expected, "{wanted}");
        }
    }

    #[test]
    fn a_slow_body_is_left_alone_while_there_is_room_and_in_its_first_minute() {
        let now = Instant::now() + SECOND * 1000;
        let (budget, waiters) = used_up(&[(100, 900), (100, 59)], now);
        budget.give(50);
        assert!(budget.take(50, Some(now)));
        assert_eq!(gave_way(&waiters), [false, false]);
        budget.waits_no_more(&waiters[0]);
        assert!(!budget.take(1, Some(now)), "the other one has a second left");
        assert_eq!(gave_way(&waiters), [false, false]);
        assert!(budget.take(1, Some(now + SECOND)));
        assert_eq!(gave_way(&waiters), [false, true]);
    }

    #[test]
    fn what_gave_way_is_not_given_back_twice() {
        let now = Instant::now() + SECOND * 1000;
        let (budget, waiters) = used_up(&[(100, 61)], now);
        assert!(budget.take(70, Some(now)));
        assert_eq!(budget.held_bytes(), 70);
        // It went on for a moment before it heard of it.
        budget.add(5);
        waiters[0].counts_for(5, 105);
        assert_eq!(budget.waits_no_more(&waiters[0]), 5);
    }
}
