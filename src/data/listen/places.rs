//! How many clients are let in: the descriptors that they and what is done for them may take, and who makes room when
//! those are used up.
//!
//! A connection counts for two descriptors, its own and one to a backend; an HTTP/2 stream counts for one more. When they
//! run short, connections that are idle are given up, the longest idle first, before anybody has to wait. Connections from
//! this machine, one of which may be its health check, do not wait: there is a reserve for them (`reserve.rs`).

use std::{
    collections::{BTreeMap, HashMap},
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

use super::reserve::{Guest, Stage};
use crate::data::proxy::seat::Seat;

/// What a connection counts for.
pub(super) const CONNECTION: usize = 2;
/// What one more stream counts for.
pub(super) const STREAM: usize = 1;
/// How long a connection must have been idle to be given up: one that is idle for less is about to be used.
const IDLE_MIN: Duration = Duration::from_secs(1);
/// Idle connections that are given up at a time.
const GIVEN_UP_MAX: usize = 16;
/// How often it is looked for idle connections while there is no room.
pub(super) const LOOK: Duration = Duration::from_millis(50);
/// How often it is looked for one in the reserve that should go.
const LOOK_LOCAL: Duration = Duration::from_millis(10);
/// How often it is said that there is no room.
const TELL: Duration = Duration::from_secs(10);
/// Connections in the reserve, at most. They are beyond all others.
const RESERVED_MAX: usize = 16;
/// For so many others there is one in the reserve: where few descriptors are left for everything else, it has to be small.
const PER_RESERVED: usize = 6;

/// The descriptors for clients; one for the whole proxy.
#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    taken: AtomicUsize,
    /// Connections in the reserve, and how many there may be.
    reserved: AtomicUsize,
    reserved_max: usize,
    /// Something has been given back, or not.
    freed: Notify,
    seats: Mutex<Seats>,
    seats_ever: AtomicU64,
}

/// The connections that can be given up.
#[derive(Debug, Default)]
struct Seats {
    by_id: HashMap<u64, Arc<Seat>>,
    /// Those in the reserve, the oldest first.
    guests: BTreeMap<u64, Arc<Guest>>,
    /// Since when there has been no room.
    full_since: Option<Instant>,
    /// An idle connection makes room right away, or will once it has been idle for long enough.
    expects_room: bool,
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
    is_reserved: bool,
}

/// A connection that can be given up; it leaves the list when dropped.
#[derive(Debug)]
pub(super) struct Seated {
    pub(super) seat: Arc<Seat>,
    id: u64,
    places: Arc<Places>,
}

/// A connection in the reserve; it leaves the list when dropped.
#[derive(Debug)]
pub(super) struct Hosted {
    pub(super) guest: Arc<Guest>,
    id: u64,
    places: Arc<Places>,
}

impl Places {
    /// So many descriptors.
    pub(super) fn new(max: usize) -> Arc<Places> {
        Arc::new(Places {
            max,
            taken: AtomicUsize::new(0),
            reserved: AtomicUsize::new(0),
            reserved_max: (max / CONNECTION / PER_RESERVED).clamp(1, RESERVED_MAX),
            freed: Notify::new(),
            seats: Mutex::default(),
            seats_ever: AtomicU64::new(0),
        })
    }

    /// There is no room for so many more.
    fn is_full(&self, count: usize) -> bool {
        self.taken.load(Relaxed).saturating_add(count) > self.max
    }

    /// There is room for one more connection; from this machine also if it is in the reserve.
    pub(super) fn has_room(&self, is_local: bool) -> bool {
        !self.is_full(CONNECTION) || is_local && self.reserved.load(Relaxed) < self.reserved_max
    }

    /// Waits until there is room for one more connection. Idle connections make some, and in the reserve those that have
    /// said least.
    pub(super) async fn room(&self, is_local: bool) {
        while !self.has_room(is_local) {
            let freed = self.freed.notified();
            let now = Instant::now();
            let expects_room = self.make_room(now);
            if is_local {
                self.send_guest_away(now, expects_room);
            }
            // What was freed before that is seen by then.
            let _ = timeout(if is_local { LOOK_LOCAL } else { LOOK }, freed).await;
        }
    }

    /// Takes a place for a connection: one of the reserve, if it comes from this machine and there is no other.
    pub(super) fn admit(self: &Arc<Places>, is_local: bool) -> Place {
        if !self.is_full(CONNECTION) {
            self.seats().full_since = None;
        } else if is_local {
            self.reserved.fetch_add(1, Relaxed);
            return Place { places: self.clone(), count: 1, is_reserved: true };
        }
        self.take(CONNECTION)
    }

    /// Takes so many, whether there is room or not.
    fn take(self: &Arc<Places>, count: usize) -> Place {
        self.taken.fetch_add(count, Relaxed);
        Place { places: self.clone(), count, is_reserved: false }
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
            let freed = self.freed.notified();
            self.make_room(Instant::now());
            if self.is_full(count) {
                let _ = timeout(LOOK, freed).await;
            }
        }
    }

    /// A connection in the reserve from now on.
    pub(super) fn host(self: &Arc<Places>) -> Hosted {
        let (guest, id) = (Arc::new(Guest::new(Instant::now())), self.seats_ever.fetch_add(1, Relaxed));
        self.seats().guests.insert(id, guest.clone());
        Hosted { guest, id, places: self.clone() }
    }

    /// Asks one in the reserve to go: the oldest of those that have said least. Requests that wait for room are left alone
    /// if it is expected.
    pub(super) fn send_guest_away(&self, now: Instant, expects_room: bool) {
        let seats = self.seats();
        let ranked = seats.guests.iter().filter_map(|(id, guest)| Some((guest.rank(now, expects_room)?, *id, guest)));
        if let Some((_, _, guest)) = ranked.min_by_key(|(rank, id, _)| (*rank, *id)) {
            guest.send_away();
        }
    }

    /// Whether an idle connection is about to make room.
    pub(super) fn expects_room(&self) -> bool {
        self.seats().expects_room
    }

    /// A seat for one more connection.
    pub(super) fn seat(self: &Arc<Places>, now: Instant) -> Seated {
        let (seat, id) = (Arc::new(Seat::new(now)), self.seats_ever.fetch_add(1, Relaxed));
        self.seats().by_id.insert(id, seat.clone());
        Seated { seat, id, places: self.clone() }
    }

    /// Has idle connections go, from time to time while many wait for that. Returns whether room is expected.
    fn make_room(&self, now: Instant) -> bool {
        let is_due = |then: &mut Option<Instant>, interval: Duration| {
            let is_due = then.is_none_or(|then| now.saturating_duration_since(then) >= interval);
            if is_due {
                *then = Some(now);
            }
            is_due
        };
        let mut seats = self.seats();
        if !is_due(&mut seats.looked_at, LOOK) {
            return seats.expects_room;
        }
        let since = *seats.full_since.get_or_insert(now);
        // Those that were idle then have been given up by now, or are used too often to be.
        let may_become_old = now.saturating_duration_since(since) < IDLE_MIN + LOOK * 2;
        let is_idle_soon = may_become_old && seats.by_id.values().any(|seat| seat.idle_for(now).is_some());
        let given_up = seats.give_up_idle(now);
        seats.expects_room = given_up > 0 || is_idle_soon;
        if given_up == 0 && is_due(&mut seats.told_at, TELL) {
            let limit = self.max / CONNECTION;
            tracing::warn!(
                limit,
                "as many clients are connected as may be, and none is idle; more wait, and those from this machine are \
                 refused (raise the limit of open files)"
            );
        }
        seats.expects_room
    }

    /// Asks those that have been idle for longest to go, and returns how many.
    pub(super) fn give_up_idle(&self, now: Instant) -> usize {
        self.seats().give_up_idle(now)
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seats {
    fn give_up_idle(&self, now: Instant) -> usize {
        let idle = self.by_id.values().filter_map(|seat| Some((seat.idle_for(now)?, seat)));
        let mut idle: Vec<_> = idle.filter(|(idle, _)| *idle >= IDLE_MIN).collect();
        idle.sort_unstable_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        idle.truncate(GIVEN_UP_MAX);
        idle.iter().for_each(|(_, seat)| seat.give_up());
        idle.len()
    }
}

impl Place {
    /// It is one of the reserve.
    pub(super) fn is_reserved(&self) -> bool {
        self.is_reserved
    }
}

impl Hosted {
    /// It has come further.
    pub(super) fn moves_on(&self, stage: Stage) {
        if self.guest.moves_on(stage) {
            // Another one is asked to go.
            self.places.freed.notify_waiters();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let taken = if self.is_reserved { &self.places.reserved } else { &self.places.taken };
        taken.fetch_sub(self.count, Relaxed);
        self.places.freed.notify_waiters();
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.places.seats().by_id.remove(&self.id);
    }
}

impl Drop for Hosted {
    fn drop(&mut self) {
        self.places.seats().guests.remove(&self.id);
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
        assert!(places.try_take(1).is_none() && places.is_full(1) && !places.has_room(false) && places.has_room(true));
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
    async fn the_reserve_is_left_by_those_that_have_said_least_and_the_oldest_first() {
        let places = Places::new(usize::from(u8::MAX));
        let _ordinary: Vec<_> =
            std::iter::from_fn(|| (!places.is_full(CONNECTION)).then(|| places.admit(true))).collect();
        let mut held: Vec<_> = (0..RESERVED_MAX).map(|_| (places.admit(true), places.host())).collect();
        assert!(held.iter().all(|(place, _)| place.is_reserved()) && !places.has_room(true));
        held[0].1.guest.moves_on(Stage::Answered);
        held[1].1.guest.moves_on(Stage::Waits);
        let mut leave = |expects_room: bool| {
            places.send_guest_away(Instant::now(), expects_room);
            let told = held.iter().position(|(_, hosted)| hosted.guest.is_told())?;
            Some(held.remove(told).1.id)
        };
        assert_eq!(leave(true), Some(0), "it has its answer");
        assert_eq!(leave(true), None, "those that have just come have had no time");
        assert_eq!(leave(false), Some(1), "its request waits for room, and there will be none");
        tokio::time::advance(SECOND).await;
        let left: Vec<u64> = std::iter::from_fn(|| leave(false)).collect();
        assert_eq!(left, (2..RESERVED_MAX as u64).collect::<Vec<_>>());
        held.extend([(places.admit(true), places.host())]);
        held[0].1.guest.moves_on(Stage::Waits);
        places.send_guest_away(Instant::now(), true);
        assert!(!held[0].1.guest.is_told(), "there will be room for it");
        assert!(places.has_room(true) && !places.has_room(false));
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
