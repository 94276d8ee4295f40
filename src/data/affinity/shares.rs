//! How recent requests were shared among the replicas of a model, and how that compares with their load of the moment.

use std::{
    cmp::Ordering,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use super::Candidate;

/// Replicas of models that are counted apart; two that fall on one counter are both taken for busier than they are.
const COUNTERS: usize = 4096;
/// Once there have been so many requests for each replica, half of them are forgotten.
const RECENT_EACH: u64 = 64;

/// How much a replica may have.
#[derive(Debug, Clone, Copy)]
struct Allowed {
    /// So many eighths of its share, ...
    eighths: u64,
    /// ... or so many requests more than its share: among few requests an eighth is nothing.
    slack: u64,
}

/// In flight. With less slack conversations leave because two of them happened to ask at once: at 2, a tenth to a fifth of
/// all turns moved in the simulation, at 4 no more than a twentieth, and the first byte came sooner for it.
const IN_FLIGHT: Allowed = Allowed { eighths: 10, slack: 4 };
/// Of recent requests. No more than the share, so that a replica that has less of it gets something soon.
const RECENT: Allowed = Allowed { eighths: 8, slack: 2 };

/// Recent requests of every replica of every model.
#[derive(Debug)]
pub(super) struct Shares {
    /// 0 if the replica has not been seen, else one more than its requests.
    counters: Box<[AtomicU32]>,
}

/// The load of a pool.
#[derive(Debug)]
pub(super) struct Loads<'a> {
    shares: &'a Shares,
    model: u64,
    weights: u64,
    in_flight: u64,
    recent: u64,
}

// === impl Shares ===

impl Shares {
    pub(super) fn new() -> Shares {
        Shares { counters: (0..COUNTERS).map(|_| AtomicU32::new(0)).collect() }
    }

    /// The load of the pool of a model. A replica that is new to it is taken to have had nearly its
    /// share: it gets something at once, but is not flooded.
    pub(super) fn loads(&self, model: u64, pool: impl Iterator<Item = Candidate> + Clone) -> Loads<'_> {
        let mut loads = Loads { shares: self, model, weights: 0, in_flight: 0, recent: 0 };
        let (mut members, mut known_weights) = (0, 0);
        for one in pool.clone() {
            let weight = u64::from(one.weight);
            members += 1;
            loads.weights += weight;
            loads.in_flight += one.in_flight;
            if let Some(recent) = self.counter(model, one.replica).load(Relaxed).checked_sub(1) {
                known_weights += weight;
                loads.recent += u64::from(recent);
            }
        }
        if known_weights < loads.weights {
            let known = loads.recent;
            for one in pool.clone() {
                let share = known * u64::from(one.weight) / known_weights.max(1) * 7 / 8;
                let share = u32::try_from(share).unwrap_or(u32::MAX - 1);
                if self.counter(model, one.replica).compare_exchange(0, share + 1, Relaxed, Relaxed).is_ok() {
                    loads.recent += u64::from(share);
                }
            }
        }
        if loads.recent > RECENT_EACH * members {
            for one in pool {
                let halve = |count: u32| Some(1 + count.saturating_sub(1) / 2);
                let _ = self.counter(model, one.replica).fetch_update(Relaxed, Relaxed, halve);
            }
            loads.recent /= 2;
        }
        loads
    }

    /// One more request for a replica.
    pub(super) fn count(&self, model: u64, replica: u32) {
        let counter = self.counter(model, replica);
        // One that has not been seen stays so, and gets its share when it is.
        let _ = counter.fetch_update(Relaxed, Relaxed, |count| (count > 0).then(|| count.saturating_add(1)));
    }

    fn counter(&self, model: u64, replica: u32) -> &AtomicU32 {
        let mixed = (model ^ u64::from(replica)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.counters[(mixed >> 32) as usize % COUNTERS]
    }
}

// === impl Loads ===

impl Loads<'_> {
    /// It has so much in flight, compared with the others, that it is better left.
    pub(super) fn is_busy(&self, one: &Candidate) -> bool {
        self.is_over(one.in_flight, self.in_flight, one, IN_FLIGHT)
    }

    /// It has had more of the recent requests than others.
    pub(super) fn has_more_than_its_share(&self, one: &Candidate) -> bool {
        self.is_over(self.recent(one), self.recent, one, RECENT)
    }

    /// By what they have in flight for their weight.
    pub(super) fn compare(a: &Candidate, b: &Candidate) -> Ordering {
        ((a.in_flight + 1) * u64::from(b.weight)).cmp(&((b.in_flight + 1) * u64::from(a.weight)))
    }

    /// By what they have had of late for their weight.
    pub(super) fn compare_shares(&self, a: &Candidate, b: &Candidate) -> Ordering {
        (self.recent(a) * u64::from(b.weight)).cmp(&(self.recent(b) * u64::from(a.weight)))
    }

    fn recent(&self, one: &Candidate) -> u64 {
        u64::from(self.shares.counter(self.model, one.replica).load(Relaxed).saturating_sub(1))
    }

    /// With one more, `its` would be over its share of `all` and one more.
    fn is_over(&self, its: u64, all: u64, one: &Candidate, allowed: Allowed) -> bool {
        let its = (its + 1) * self.weights;
        let share = (all + 1) * u64::from(one.weight);
        8 * its > allowed.eighths * share && its >= share + allowed.slack * self.weights
    }
}
