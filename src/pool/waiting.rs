//! Where requests wait for a place: one line per model, first come, first served, bounded.
//!
//! Nobody is handed a place. Whoever is first in line is called when there may be one, and tries to claim it like anybody
//! else; until it has one, or leaves, nobody behind it is called. So a place cannot be lost with a client that leaves just
//! when it is called: leaving calls the next. Newcomers join the line as long as there is one ([`WaitingRoom::may_pass`]),
//! so nobody is overtaken.
//!
//! Some would not take every place: they want one backend, or have tried another. They have a line of their own
//! ([`Whom`]), or they would hold up everybody for whom there is a place elsewhere. All lines together have one bound.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::task::AtomicWaker;

/// The lines of one model.
#[derive(Debug, Default)]
pub struct WaitingRoom {
    lines: Mutex<BTreeMap<Whom, VecDeque<Arc<Seat>>>>,
    /// How long they are together, to be read without the lock.
    length: AtomicUsize,
    /// How long the line is of those who wait for anybody.
    for_anybody: AtomicUsize,
}

/// For whom somebody waits. Those who wait for the same are served in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whom {
    /// Any replica would do.
    Anybody,
    /// Only the one with this serial number.
    Only(u32),
    /// Any but those that have been tried, the one with this serial number last.
    AnybodyBut(u32),
}

#[derive(Debug, Default)]
struct Seat {
    called: AtomicBool,
    waiter: AtomicWaker,
}

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
#[must_use = "dropping it leaves the line"]
pub struct Ticket<'r> {
    room: &'r WaitingRoom,
    whom: Whom,
    seat: Arc<Seat>,
}

// === impl WaitingRoom ===

impl WaitingRoom {
    /// Nobody waits. One atomic load.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whoever comes now and wants this overtakes nobody by not waiting.
    pub fn may_pass(&self, whom: Whom) -> bool {
        match whom {
            Whom::Anybody | Whom::AnybodyBut(_) => self.for_anybody.load(Ordering::SeqCst) == 0,
            Whom::Only(_) => self.is_empty(),
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.length.load(Ordering::SeqCst)
    }

    /// Joins the end of the line for `whom`, unless `limit` are in the lines already.
    pub fn join(&self, limit: usize, whom: Whom) -> Option<Ticket<'_>> {
        let mut lines = self.lock();
        if self.len() >= limit {
            return None;
        }
        let seat = Arc::new(Seat::default());
        lines.entry(whom).or_default().push_back(seat.clone());
        self.count(&lines);
        Some(Ticket { room: self, whom, seat })
    }

    /// There may be a place: whoever is first in a line tries.
    pub fn call(&self) {
        if !self.is_empty() {
            self.lock().values().filter_map(VecDeque::front).for_each(|first| first.call());
        }
    }

    fn count(&self, lines: &BTreeMap<Whom, VecDeque<Arc<Seat>>>) {
        let for_anybody = lines.get(&Whom::Anybody).map_or(0, VecDeque::len);
        self.for_anybody.store(for_anybody, Ordering::SeqCst);
        self.length.store(lines.values().map(VecDeque::len).sum(), Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Whom, VecDeque<Arc<Seat>>>> {
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Seat ===

impl Seat {
    fn call(&self) {
        self.called.store(true, Ordering::Release);
        self.waiter.wake();
    }
}

// === impl Ticket ===

impl Ticket<'_> {
    /// Nobody is before it in its line.
    pub fn is_first(&self) -> bool {
        let lines = self.room.lock();
        lines.get(&self.whom).and_then(VecDeque::front).is_some_and(|first| Arc::ptr_eq(first, &self.seat))
    }

    /// Ready when it has been called since the last time it was.
    pub fn poll_called(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.seat.waiter.register(cx.waker());
        if self.seat.called.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Resolves when it has been called since the last time it was.
    pub async fn called(&self) {
        std::future::poll_fn(|cx| self.poll_called(cx)).await;
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut lines = self.room.lock();
        let Some(line) = lines.get_mut(&self.whom) else { return };
        let place = line.iter().position(|seat| Arc::ptr_eq(seat, &self.seat));
        if let Some(place) = place {
            line.remove(place);
        }
        // It may have been called for a place that it did not take, and there may be more than the one it took. The first
        // of other lines have been called for the same, and have tried by themselves.
        match line.front() {
            Some(next) if place == Some(0) => next.call(),
            Some(_) => {}
            None => drop(lines.remove(&self.whom)),
        }
        self.room.count(&lines);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    const ANYBODY: Whom = Whom::Anybody;

    fn is_called(ticket: &Ticket<'_>) -> bool {
        ticket.called().now_or_never().is_some()
    }

    #[test]
    fn the_line_is_bounded_and_in_order() {
        let room = WaitingRoom::default();
        assert!(room.is_empty() && room.join(0, ANYBODY).is_none());
        let first = room.join(2, ANYBODY).unwrap();
        let second = room.join(2, ANYBODY).unwrap();
        assert!(room.join(2, ANYBODY).is_none());
        assert_eq!((room.len(), first.is_first(), second.is_first()), (2, true, false));
        drop(first);
        assert!(second.is_first());
        drop(second);
        assert!(room.is_empty());
    }

    #[test]
    fn a_call_is_for_the_first_and_stays_until_it_is_heard() {
        let room = WaitingRoom::default();
        room.call();
        let (first, second) = (room.join(9, ANYBODY).unwrap(), room.join(9, ANYBODY).unwrap());
        assert!(!is_called(&first), "a call before it came is not for it");
        room.call();
        assert!(!is_called(&second));
        assert!(is_called(&first) && !is_called(&first));
    }

    #[test]
    fn whoever_leaves_calls_the_next() {
        let room = WaitingRoom::default();
        let [first, second, third] = [(); 3].map(|()| room.join(9, ANYBODY).unwrap());
        drop(second);
        assert!(!is_called(&first) && !is_called(&third), "nothing has become free");
        room.call();
        drop(first);
        assert!(is_called(&third), "the call went with the first");
    }

    #[test]
    fn whoever_is_hard_to_please_holds_up_nobody_else() {
        let room = WaitingRoom::default();
        let (one, same, other) = (Whom::Only(1), Whom::Only(1), Whom::AnybodyBut(1));
        let [a, b, c] = [one, same, other].map(|whom| room.join(5, whom).unwrap());
        assert!(room.may_pass(ANYBODY) && room.may_pass(other) && !room.may_pass(one));
        let [d, e] = [ANYBODY; 2].map(|whom| room.join(5, whom).unwrap());
        assert!(!room.may_pass(ANYBODY) && !room.may_pass(other) && !room.may_pass(one));
        assert!(room.len() == 5 && room.join(5, Whom::Only(2)).is_none(), "one bound for all");
        assert_eq!([&a, &b, &c, &d, &e].map(|ticket| ticket.is_first()), [true, false, true, true, false]);
        room.call();
        assert_eq!([&a, &b, &c, &d, &e].map(is_called), [true, false, true, true, false]);
        drop(a);
        assert!(is_called(&b) && !is_called(&c) && !is_called(&d));
        drop((b, c, d));
        assert!(is_called(&e) && room.len() == 1);
        drop(e);
        assert!(room.is_empty() && room.may_pass(one));
    }

    /// Many threads fight for few places; every one is served, none of the places is lost.
    #[test]
    fn no_call_is_lost_under_contention() {
        const PLACES: usize = 2;
        let room = WaitingRoom::default();
        let free = AtomicUsize::new(PLACES);
        let served = AtomicUsize::new(0);
        let claim = || free.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        let release = || {
            free.fetch_add(1, Ordering::SeqCst);
            room.call();
        };
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (room, served, claim, release) = (&room, &served, &claim, &release);
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    for round in 0..500 {
                        if !(room.is_empty() && claim()) {
                            let ticket = room.join(usize::MAX, ANYBODY).unwrap();
                            if (round + thread) % 7 == 0 {
                                continue; // leaves, perhaps just when it is called
                            }
                            while !(ticket.is_first() && claim()) {
                                runtime.block_on(ticket.called());
                            }
                        }
                        served.fetch_add(1, Ordering::SeqCst);
                        release();
                    }
                });
            }
        });
        assert_eq!(free.load(Ordering::SeqCst), PLACES);
        assert!(room.is_empty() && served.load(Ordering::SeqCst) >= 8 * 500 * 6 / 7 - 8);
    }
}
