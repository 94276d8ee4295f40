//! The queue of a model: requests wait here for a slot, first come, first served, and their number is bounded.
//!
//! A slot is not handed over. The first request in the queue is called when there may be a slot, and tries to claim it as
//! every other request does; until it has one, or leaves, no request behind it is called. So a slot cannot be lost with a
//! client that leaves just when it is called, because leaving calls the next. New requests join the queue as long as there
//! is one ([`WaitingRoom::may_pass`]), so none is overtaken.
//!
//! Some requests would not take every slot: they want one backend, or have tried another. They have a queue of their own
//! ([`Takes`]), because they would hold up all others for which there is a slot elsewhere. All queues of a model together
//! have one bound.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::task::AtomicWaker;

/// The requests that wait for a slot of one model.
#[derive(Debug, Default)]
pub struct WaitingRoom {
    queues: Mutex<BTreeMap<Takes, VecDeque<Arc<Waiter>>>>,
    /// How long they are together, to be read without the lock.
    length: AtomicUsize,
    /// How many of them take the slot of any replica.
    for_any: AtomicUsize,
}

/// For takes somebody waits. Those who wait for the same are served in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Takes {
    /// Any replica would do.
    Any,
    /// Only the one with this serial number.
    Only(u32),
    /// Any but those that have been tried, the one with this serial number last.
    AllBut(u32),
}

#[derive(Debug, Default)]
struct Waiter {
    called: AtomicBool,
    task: AtomicWaker,
}

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
#[must_use = "dropping it leaves the line"]
pub struct Ticket<'r> {
    room: &'r WaitingRoom,
    takes: Takes,
    waiter: Arc<Waiter>,
}

// === impl WaitingRoom ===

impl WaitingRoom {
    /// The queue is empty. One atomic load.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// No request is queued for the same replicas, so one that comes now overtakes none by not waiting.
    pub fn may_pass(&self, takes: Takes) -> bool {
        match takes {
            Takes::Any | Takes::AllBut(_) => self.for_any.load(Ordering::SeqCst) == 0,
            Takes::Only(_) => self.is_empty(),
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.length.load(Ordering::SeqCst)
    }

    /// Joins the end of the queue for `takes`, unless `limit` requests wait already.
    pub fn join(&self, limit: usize, takes: Takes) -> Option<Ticket<'_>> {
        let mut queues = self.lock();
        if self.len() >= limit {
            return None;
        }
        let waiter = Arc::new(Waiter::default());
        queues.entry(takes).or_default().push_back(waiter.clone());
        self.count(&queues);
        Some(Ticket { room: self, takes, waiter })
    }

    /// There may be a slot: the first of each queue tries to claim it.
    pub fn call(&self) {
        if !self.is_empty() {
            self.lock().values().filter_map(VecDeque::front).for_each(|first| first.call());
        }
    }

    fn count(&self, queues: &BTreeMap<Takes, VecDeque<Arc<Waiter>>>) {
        let for_any = queues.get(&Takes::Any).map_or(0, VecDeque::len);
        self.for_any.store(for_any, Ordering::SeqCst);
        self.length.store(queues.values().map(VecDeque::len).sum(), Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Takes, VecDeque<Arc<Waiter>>>> {
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Waiter ===

impl Waiter {
    fn call(&self) {
        self.called.store(true, Ordering::Release);
        self.task.wake();
    }
}

// === impl Ticket ===

impl Ticket<'_> {
    /// No request is before it in its queue.
    pub fn is_first(&self) -> bool {
        let queues = self.room.lock();
        queues.get(&self.takes).and_then(VecDeque::front).is_some_and(|first| Arc::ptr_eq(first, &self.waiter))
    }

    /// Ready when it has been called since the last time it was.
    pub fn poll_called(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waiter.task.register(cx.waker());
        if self.waiter.called.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Resolves when it has been called since the last time it was.
    pub async fn called(&self) {
        std::future::poll_fn(|cx| self.poll_called(cx)).await;
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut queues = self.room.lock();
        let Some(line) = queues.get_mut(&self.takes) else { return };
        let place = line.iter().position(|waiter| Arc::ptr_eq(waiter, &self.waiter));
        if let Some(place) = place {
            line.remove(place);
        }
        // It may have been called for a place that it did not take, and there may be more than the one it took. The first
        // of other queues have been called for the same, and have tried by themselves.
        match line.front() {
            Some(next) if place == Some(0) => next.call(),
            Some(_) => {}
            None => drop(queues.remove(&self.takes)),
        }
        self.room.count(&queues);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    const ANYBODY: Takes = Takes::Any;

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
        let (one, same, other) = (Takes::Only(1), Takes::Only(1), Takes::AllBut(1));
        let [a, b, c] = [one, same, other].map(|takes| room.join(5, takes).unwrap());
        assert!(room.may_pass(ANYBODY) && room.may_pass(other) && !room.may_pass(one));
        let [d, e] = [ANYBODY; 2].map(|takes| room.join(5, takes).unwrap());
        assert!(!room.may_pass(ANYBODY) && !room.may_pass(other) && !room.may_pass(one));
        assert!(room.len() == 5 && room.join(5, Takes::Only(2)).is_none(), "one bound for all");
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
