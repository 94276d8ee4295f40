//! A client's connection as it is seen by the part that lets clients in: whether it is idle, and that it should go.

use std::{
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::task::AtomicWaker;
use tokio::time::Instant;

/// What one connection and the part that lets clients in say to each other.
#[derive(Debug)]
pub struct Seat {
    /// When it was taken.
    since: Instant,
    /// How long after that the connection has become idle, in milliseconds; or that it is not.
    idle_since_ms: AtomicU64,
    /// Its room is needed.
    is_wanted: AtomicBool,
    task: AtomicWaker,
}

const BUSY: u64 = u64::MAX;

impl Seat {
    /// The seat of a connection that has just begun, and waits for its client.
    pub fn new(now: Instant) -> Seat {
        Seat {
            since: now,
            idle_since_ms: AtomicU64::new(0),
            is_wanted: AtomicBool::new(false),
            task: AtomicWaker::new(),
        }
    }

    /// The connection waits for its client's next request from now on.
    pub fn is_idle(&self, now: Instant) {
        let since = u64::try_from(now.saturating_duration_since(self.since).as_millis()).unwrap_or(0);
        self.idle_since_ms.store(since, Relaxed);
    }

    /// A request has begun.
    pub fn is_busy(&self) {
        self.idle_since_ms.store(BUSY, Relaxed);
        // It was too late. If its room is still needed when it is idle again, it is asked again.
        self.is_wanted.store(false, SeqCst);
    }

    /// How long the connection has been idle, if it is and has not been asked to go.
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        let since = Some(self.idle_since_ms.load(Relaxed)).filter(|since| *since != BUSY)?;
        let idle = now.saturating_duration_since(self.since + Duration::from_millis(since));
        (!self.is_wanted.load(Relaxed)).then_some(idle)
    }

    /// Asks the connection to go, if it is idle still.
    pub fn give_up(&self) {
        self.is_wanted.store(true, SeqCst);
        self.task.wake();
    }

    /// Ready if the connection should go. Only an idle one asks.
    pub fn poll_given_up(&self, cx: &Context<'_>) -> Poll<()> {
        self.task.register(cx.waker());
        if self.is_wanted.load(SeqCst) { Poll::Ready(()) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_tells_how_long_it_has_been_idle_unless_it_is_busy_or_asked_to_go() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let seat = Seat::new(now);
        assert_eq!(seat.idle_for(now + second), Some(second), "it has not said a word");
        seat.is_busy();
        assert_eq!(seat.idle_for(now + second * 2), None);
        seat.is_idle(now + second * 3);
        assert_eq!(seat.idle_for(now + second * 5), Some(second * 2));
        seat.give_up();
        assert_eq!(seat.idle_for(now + second * 5), None, "once is enough");
    }
}
