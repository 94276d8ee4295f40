//! The policies: which of the candidates is next. What a candidate is, and why one may not be chosen, is not known here.
//!
//! In pools of up to [`SCAN_MAX`] all candidates are compared; in larger ones [`DRAWN`] that are drawn at random, by weight.
//! Among equals chance decides.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    base::config::Balance,
    pool::latency::{PACE_FLOOR_S, work},
};

/// Up to so many candidates the best is found by looking at all. With two at random, as is usual, the slowest twentieth
/// waits for 1.4 to 2.3 times as long as with the best choice (`docs/balancing.md`), and looking at 64 takes a microsecond
/// of the 25 that relaying a request does. Not more than the bits of a mask.
pub const SCAN_MAX: usize = 64;

/// So many are drawn in larger pools.
pub const DRAWN: usize = 8;

/// Paces that differ by less than this factor are alike: the difference is of prompts and of chance.
const ALIKE: f64 = 1.5;

/// From this factor on, a difference counts in full; in between, it does increasingly.
const DIFFERENT: f64 = 3.0;

/// What is known of a slow candidate that has nothing to do is half forgotten after this, so that it is tried again.
const FORGETTING: Duration = Duration::from_secs(30);

/// A candidate that has not answered yet is taken to be so much slower than the best, once it has a request.
const UNMEASURED: f64 = 2.0;

/// So long is a candidate new, among others that are not.
const NEW_FOR: Duration = Duration::from_secs(10);

/// A new one gets at most so many times its share of the requests, however empty it is.
const NEW_SHARE_MAX: f64 = 2.0;

/// What a policy sees of a replica.
pub trait Candidate {
    /// Its share among the others.
    fn weight(&self) -> u32;
    /// Requests that it has.
    fn load(&self, now: Instant) -> u64;
    /// Prompts that it has not begun to answer.
    fn waiting_bytes(&self) -> u64;
    /// Seconds to the first byte per unit of work; `None` if that has never been seen.
    fn pace_s(&self) -> Option<f64>;
    /// Since its pace was last seen.
    fn silent(&self, now: Instant) -> Duration;
    /// Since it began to take requests.
    fn lifetime(&self, now: Instant) -> Duration;
}

/// What the choice is for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    /// Length of its body, as far as it is known.
    pub prompt_bytes: u64,
}

/// The best candidate of those that `may` be chosen, `None` only if none may. `memory` belongs to the pool: it says whose
/// turn it is, or how heavy the heaviest candidate is. Nothing is allocated.
pub fn pick<C: Candidate>(
    policy: Balance,
    request: Request,
    candidates: &[C],
    may: impl Fn(usize) -> bool,
    memory: &AtomicUsize,
    rng: &mut fastrand::Rng,
    now: Instant,
) -> Option<usize> {
    if policy == Balance::RoundRobin {
        return in_turn(candidates, may, memory);
    }
    if candidates.len() <= SCAN_MAX {
        let mask = (0..candidates.len()).filter(|i| may(*i)).fold(0_u64, |mask, i| mask | 1 << i);
        return best(policy, request, candidates, Bits(mask), false, rng, now);
    }
    let (drawn, count) = draw(candidates, &may, memory, rng);
    if count >= 2 {
        return best(policy, request, candidates, drawn[..count].iter().copied(), true, rng, now);
    }
    // Most may not be chosen, or few weigh nearly all.
    let heaviest = candidates.iter().map(Candidate::weight).max().unwrap_or(1);
    memory.store(heaviest as usize, Ordering::Relaxed);
    best(policy, request, candidates, (0..candidates.len()).filter(|i| may(*i)), false, rng, now)
}

/// The set bits of a mask, lowest first.
#[derive(Clone)]
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let lowest = self.0.trailing_zeros();
        self.0 &= self.0.checked_sub(1)?;
        Some(lowest as usize)
    }
}

/// Up to [`DRAWN`] distinct candidates that may be chosen, each with a chance proportional to its weight, and how many.
fn draw<C: Candidate>(
    candidates: &[C],
    may: impl Fn(usize) -> bool,
    heaviest: &AtomicUsize,
    rng: &mut fastrand::Rng,
) -> ([usize; DRAWN], usize) {
    let (mut drawn, mut count) = ([0; DRAWN], 0);
    for _ in 0..4 * DRAWN {
        let index = rng.usize(0..candidates.len());
        if drawn[..count].contains(&index) || !may(index) {
            continue;
        }
        // By rejection against the heaviest that has been seen, which saves summing the weights of all.
        let weight = candidates[index].weight() as usize;
        let known = heaviest.load(Ordering::Relaxed);
        if weight > known {
            heaviest.fetch_max(weight, Ordering::Relaxed);
        } else if weight < known && rng.usize(0..known) >= weight {
            continue;
        }
        drawn[count] = index;
        count += 1;
        if count == DRAWN {
            break;
        }
    }
    (drawn, count)
}

/// The one with the least cost; among equals any, by weight if the pool says so.
fn best<C: Candidate>(
    policy: Balance,
    request: Request,
    candidates: &[C],
    among: impl Iterator<Item = usize> + Clone,
    is_drawn: bool,
    rng: &mut fastrand::Rng,
    now: Instant,
) -> Option<usize> {
    let pool = Pool::of(policy, candidates, among.clone(), now);
    let mut best: Option<(usize, f64)> = None;
    let mut equals = 0;
    for index in among {
        let candidate = &candidates[index];
        let Some(cost) = pool.cost(candidate, request, rng, now) else { continue };
        // By weight, unless it was drawn by weight already.
        let weight = if is_drawn { 1 } else { u64::from(candidate.weight()) };
        match best {
            Some((_, least)) if cost > least => {}
            Some((_, least)) if cost == least => {
                equals += weight;
                if rng.u64(0..equals) < weight {
                    best = Some((index, cost));
                }
            }
            _ => (best, equals) = (Some((index, cost)), weight),
        }
    }
    best.map(|(index, _)| index)
}

/// What the candidates of one choice have in common.
struct Pool {
    /// Whether more than the load counts.
    knows_paces: bool,
    /// The best pace among them.
    pace_s: f64,
    /// Sum of their weights.
    weight: f64,
    /// Greatest weight of those that have nothing to do.
    idle_weight: u32,
    /// Whether some of them are new and others are not.
    has_newcomers: bool,
}

impl Pool {
    fn of<C: Candidate>(policy: Balance, candidates: &[C], among: impl Iterator<Item = usize>, now: Instant) -> Pool {
        let knows_paces = matches!(policy, Balance::Ewma | Balance::Prefix);
        let mut pool = Pool { knows_paces, pace_s: f64::INFINITY, weight: 0.0, idle_weight: 1, has_newcomers: false };
        let (mut new, mut settled) = (false, false);
        for candidate in among.map(|index| &candidates[index]) {
            pool.weight += f64::from(candidate.weight());
            if candidate.load(now) == 0 {
                pool.idle_weight = pool.idle_weight.max(candidate.weight());
            }
            if knows_paces {
                let is_new = candidate.lifetime(now) < NEW_FOR;
                (new, settled) = (new | is_new, settled | !is_new);
                if let Some(pace_s) = candidate.pace_s() {
                    pool.pace_s = pool.pace_s.min(pace_s.max(PACE_FLOOR_S));
                }
            }
        }
        pool.has_newcomers = new && settled;
        pool
    }

    /// What one more request costs there: the expected time to its first byte as a multiple of what it would be on the
    /// fastest one when that has nothing else to do. `None` if it is not this one's turn, which never is so for all.
    fn cost<C: Candidate>(
        &self,
        candidate: &C,
        request: Request,
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Option<f64> {
        let load = candidate.load(now);
        let weight = f64::from(candidate.weight());
        // Those that have nothing to do are equals, so that chance can keep to their weights: without that the heaviest
        // would get all requests that come one at a time.
        let share = if load == 0 { f64::from(self.idle_weight) } else { weight };
        if !self.knows_paces {
            return Some(work(load + 1, 0) / share);
        }
        // An empty newcomer would be the best choice for every request until it is as full as the others, which may be a
        // minute of long answers.
        let is_new = self.has_newcomers && candidate.lifetime(now) < NEW_FOR;
        if is_new && rng.f64() * self.weight >= NEW_SHARE_MAX * weight {
            return None;
        }
        let ahead = work(load + 1, candidate.waiting_bytes().saturating_add(request.prompt_bytes));
        Some(self.slowness(candidate, load == 0, now) * ahead / share)
    }

    /// How many times slower than the best one a candidate is taken to be.
    fn slowness<C: Candidate>(&self, candidate: &C, is_idle: bool, now: Instant) -> f64 {
        if self.pace_s == f64::INFINITY {
            // No member has been measured.
            return 1.0;
        }
        let mut ratio = match candidate.pace_s() {
            None if is_idle => 1.0,
            None => UNMEASURED,
            Some(pace_s) => pace_s.max(PACE_FLOOR_S) / self.pace_s,
        };
        if ratio <= ALIKE {
            return 1.0;
        }
        if is_idle {
            let silences = candidate.silent(now).as_secs_f64() / FORGETTING.as_secs_f64();
            ratio = 1.0 + (ratio - 1.0) / (1.0 + silences * silences);
        }
        let rising = 1.0 + (ratio - ALIKE) * (DIFFERENT - 1.0) / (DIFFERENT - ALIKE);
        ratio.min(rising).max(1.0)
    }
}

/// The next one after the last, each as often as its weight says, and those of a heavy one apart.
fn in_turn<C: Candidate>(candidates: &[C], may: impl Fn(usize) -> bool, turn: &AtomicUsize) -> Option<usize> {
    let weights = || candidates.iter().enumerate().filter(|(i, _)| may(*i)).map(|(i, c)| (i, u64::from(c.weight())));
    let all: u64 = weights().map(|(_, weight)| weight).sum();
    if all == 0 {
        return None;
    }
    let turn = turn.fetch_add(1, Ordering::Relaxed) as u64 % all;
    let mut place = u128::from(turn) * u128::from(stride(all)) % u128::from(all);
    for (index, weight) in weights() {
        match place.checked_sub(u128::from(weight)) {
            Some(rest) => place = rest,
            None => return Some(index),
        }
    }
    // The members that may be chosen have changed meanwhile.
    weights().next().map(|(index, _)| index)
}

/// A step through `all` places that comes to each once, and to those near each other at times far from each other: coprime
/// to `all`, and as near to its golden section as that allows.
fn stride(all: u64) -> u64 {
    let coprime = |step: &u64| {
        let (mut a, mut b) = (all, *step);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    let golden = (all as f64 * 0.618_034) as u64;
    (golden.max(1)..=all).find(coprime).unwrap_or(1)
}

#[cfg(test)]
mod tests;
