//! How many clients are let in: the descriptors that they and what is done for them may take, and who makes room when
//! those are used up.
//!
//! A connection counts for two descriptors, its own and one to a backend; an HTTP/2 stream counts for one more. When they
//! run short, connections that are idle are given up, the longest idle first, before anybody has to wait.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use crate::proxy::seat::Seat;

/// What a connection counts for.
pub(super) const CONNECTION: usize = 2;
/// What one more stream counts for.
pub(super) const STREAM: usize = 1;
/// How long a connection must have been idle to be given up: one that is idle for less is about to be used.
const IDLE_MIN: Duration = Duration::from_secs(1);
/// Idle connections that are given up at a time.
const GIVEN_UP_MAX: usize = 16;
/// How often it is looked for idle connections while there is no room.
const LOOK: Duration = Duration::from_millis(50);
/// How often it is said that there is no room.
const TELL: Duration = Duration::from_secs(10);
/// Descriptors beyond all others for connections from this machine, one of which may be its health check.
const RESERVED: usize = 16 * CONNECTION;

/// The descriptors for clients; one for the whole proxy.
#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    taken: AtomicUsize,
    freed: Notify,
    seats: Mutex<Seats>,
    seats_ever: AtomicU64,
}

/// The connections that can be given up.
#[derive(Debug, Default)]
struct Seats {
    by_id: HashMap<u64, Arc<Seat>>,
    /// When it was looked for idle ones.
    looked_at: Option<Instant>,
    /// When it was said that there are none.
    told_at: Option<Instant>,
}

/// Some of them, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    count: usize,
}

/// A connection that can be given up; it leaves the list when dropped.
#[derive(Debug)]
pub(super) struct Seated {
    pub(super) seat: Arc<Seat>,
    id: u64,
    places: Arc<Places>,
}

impl Places {
    /// So many descriptors.
    pub(super) fn new(max: usize) -> Arc<Places> {
        Arc::new(Places {
            max,
            taken: AtomicUsize::new(0),
            freed: Notify::new(),
            seats: Mutex::default(),
            seats_ever: AtomicU64::new(0),
        })
    }

    /// There is no room for so many more. From this machine a few more are let in than from elsewhere.
    pub(super) fn is_full(&self, count: usize, is_local: bool) -> bool {
        let max = self.max.saturating_add(if is_local { RESERVED } else { 0 });
        self.taken.load(Relaxed).saturating_add(count) > max
    }

    /// Waits until there is room for so many, and sees to it that idle connections make some.
    pub(super) async fn room(&self, count: usize, is_local: bool) {
        while self.is_full(count, is_local) {
            let freed = self.freed.notified();
            self.make_room(Instant::now());
            // What was freed before that is seen by then.
            let _ = timeout(LOOK, freed).await;
        }
    }

    /// Takes so many, whether there is room or not.
    pub(super) fn take(self: &Arc<Places>, count: usize) -> Place {
        self.taken.fetch_add(count, Relaxed);
        Place { places: self.clone(), count }
    }

    /// Takes so many if there is room.
    pub(super) fn try_take(self: &Arc<Places>, count: usize) -> Option<Place> {
        let place = self.take(count);
        (self.taken.load(Relaxed) <= self.max).then_some(place)
    }

    /// Waits for so many, and takes them.
    pub(super) async fn wait(self: &Arc<Places>, count: usize) -> Place {
        loop {
            if let Some(place) = self.try_take(count) {
                return place;
            }
            self.room(count, false).await;
        }
    }

    /// A seat for one more connection.
    pub(super) fn seat(self: &Arc<Places>, now: Instant) -> Seated {
        let (seat, id) = (Arc::new(Seat::new(now)), self.seats_ever.fetch_add(1, Relaxed));
        self.seats().by_id.insert(id, seat.clone());
        Seated { seat, id, places: self.clone() }
    }

    /// Has idle connections go, from time to time while many wait for that.
    fn make_room(&self, now: Instant) {
        let is_due = |then: &mut Option<Instant>, interval: Duration| {
            let is_due = then.is_none_or(|then| now.saturating_duration_since(then) >= interval);
            if is_due {
                *then = Some(now);
            }
            is_due
        };
        if !is_due(&mut self.seats().looked_at, LOOK) {
            return;
        }
        if self.give_up_idle(now) == 0 && is_due(&mut self.seats().told_at, TELL) {
            let limit = self.max / CONNECTION;
            tracing::warn!(
                limit,
                "as many clients are connected as may be, and none is idle; more wait (raise the limit of open files)"
            );
        }
    }

    /// Asks those that have been idle for longest to go, and returns how many.
    pub(super) fn give_up_idle(&self, now: Instant) -> usize {
        let seats = self.seats();
        let idle = seats.by_id.values().filter_map(|seat| Some((seat.idle_for(now)?, seat)));
        let mut idle: Vec<_> = idle.filter(|(idle, _)| *idle >= IDLE_MIN).collect();
        idle.sort_unstable_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        idle.truncate(GIVEN_UP_MAX);
        idle.iter().for_each(|(_, seat)| seat.give_up());
        idle.len()
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.fetch_sub(self.count, Relaxed);
        self.places.freed.notify_waiters();
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.places.seats().by_id.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn room_is_made_by_the_longest_idle_and_not_by_those_in_use() {
        let places = Places::new(10);
        let mut held = Vec::new();
        for age in [50, 5, 500, 0, 900] {
            let seated = places.seat(Instant::now());
            seated.seat.is_idle(Instant::now());
            tokio::time::advance(SECOND * age).await;
            held.push((places.take(CONNECTION), seated));
        }
        // Idle for 1455, 1405, 1400, 900 and 900 s; the last one is at work.
        held[4].1.seat.is_busy();
        assert!(places.try_take(1).is_none() && places.is_full(1, false) && !places.is_full(1, true));
        assert_eq!(places.give_up_idle(Instant::now()), 4);
        assert_eq!(places.give_up_idle(Instant::now()), 0, "they have been asked");
        assert_eq!(
            held.iter().map(|(_, seated)| seated.seat.idle_for(Instant::now()).is_some()).collect::<Vec<_>>(),
            [false; 5]
        );
        let waiting = tokio::spawn({
            let places = places.clone();
            async move { places.wait(CONNECTION).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        held.remove(0);
        drop(waiting.await.unwrap());
        drop(held);
        assert_eq!((places.taken.load(Relaxed), places.seats().by_id.len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_has_just_become_idle_is_left_alone() {
        let places = Places::new(2);
        let seated = places.seat(Instant::now());
        assert_eq!(places.give_up_idle(Instant::now()), 0);
        tokio::time::advance(IDLE_MIN).await;
        assert_eq!(places.give_up_idle(Instant::now()), 1);
        drop(seated);
    }
}
