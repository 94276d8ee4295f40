//! Which member of a pool gets the next request. Pure: load, chance and time come in, a choice goes out.
//!
//! [`policy`] ranks, and knows nothing of backends; here members are what it ranks, and places are claimed. What a choice
//! costs and how good it is: `docs/balancing.md`.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    base::config::Balance,
    data::affinity::{self, Affinity, Preference, Spread},
    pool::{
        backend::{Backend, InFlight, Member},
        breaker::State,
    },
    wire::scan::Prompt,
};

pub mod policy;

use policy::{Candidate, Request};

/// What is asked of a pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted<'a> {
    /// Backends that have been tried: their members are left out.
    pub tried: &'a [Arc<Backend>],
    /// Which member has been sent which prompts, and the prompt, for the policy that goes by it.
    pub affinity: Option<(&'a Affinity, &'a Prompt)>,
    /// Length of the request's body, as far as it is known.
    pub prompt_bytes: u64,
    /// Members with an open breaker are not tried, even if no other member is left.
    pub spares_the_broken: bool,
}

/// Why no member gave a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPlace {
    /// None of them takes requests.
    Nobody,
    /// Some are full, and the others are kept away by their breakers.
    Busy {
        /// When the first of the others may be tried; `None` if time alone changes nothing.
        rest: Option<Duration>,
    },
}

/// So many members are picked that turn out to refuse. After that, any member with a free slot is good enough.
const PICKS_MAX: usize = 8;

/// Claims a place on the best of `members`. A member that refuses (it has just closed, is full, or rests) is passed over
/// for the next best. Those that push back come after all others, and before waiting: what they say to this request is for
/// them to say. If all that take requests are kept away by their breakers, the one that comes back first is tried all the
/// same: the last backend of a model is never given up. Nothing is allocated.
///
/// # Errors
/// None of them has a place now.
pub fn claim(
    members: &[Arc<Member>],
    policy: Balance,
    wanted: &Wanted<'_>,
    rng: &mut fastrand::Rng,
    now: Instant,
) -> Result<InFlight, NoPlace> {
    let claimed = |in_flight: InFlight| {
        if let Some((affinity, prompt)) = wanted.affinity {
            affinity.learn(prompt, in_flight.backend().serial);
        }
        in_flight.expects(policy, wanted.prompt_bytes, now)
    };
    // One healthy replica is the common case and needs no ranking.
    if let ([only], []) = (members, wanted.tried)
        && let Ok(in_flight) = only.try_acquire(now)
    {
        return Ok(claimed(in_flight));
    }
    let is_tried = |index: usize| wanted.tried.iter().any(|tried| Arc::ptr_eq(tried, &members[index].backend));
    let looks_free = |index: usize| {
        let backend = &members[index].backend;
        !backend.is_closed() && !backend.is_full() && !backend.breaker.is_resting(now) && !is_tried(index)
    };
    // Only its push-backs speak against it.
    let pushes_back = |index: usize| {
        let backend = &members[index].backend;
        !backend.is_closed() && !backend.is_full() && backend.breaker.ready_in(now).is_zero() && !is_tried(index)
    };
    let mut spread = None;
    if let Some((affinity, prompt)) = wanted.affinity {
        let pool = (0..members.len()).filter(|&index| looks_free(index)).map(|index| held_by(members, index, now));
        match affinity.prefer(prompt, pool) {
            Preference::At { index, .. } => {
                if let Ok(in_flight) = members[index].try_acquire(now) {
                    return Ok(claimed(in_flight));
                }
            }
            Preference::Spread(shares) => spread = Some(shares),
        }
    }
    let Some(first) = members.first() else { return Err(NoPlace::Nobody) };
    let request = Request { prompt_bytes: wanted.prompt_bytes };
    let mut refused = [usize::MAX; PICKS_MAX];
    let mut among_free = true;
    for place in 0..PICKS_MAX {
        let may = |index: usize| {
            let has_share = |shares: &Spread<'_>| shares.allows(&held_by(members, index, now));
            let is_free = if among_free { looks_free(index) } else { pushes_back(index) };
            is_free && !refused[..place].contains(&index) && spread.as_ref().is_none_or(has_share)
        };
        let mut picked = policy::pick(policy, request, members, may, &first.model.turn, rng, now);
        if picked.is_none() && std::mem::replace(&mut among_free, false) {
            let may = |index: usize| pushes_back(index) && !refused[..place].contains(&index);
            picked = policy::pick(policy, request, members, may, &first.model.turn, rng, now);
        }
        let Some(index) = picked else { break };
        match members[index].try_acquire(now) {
            Ok(in_flight) => return Ok(claimed(in_flight)),
            Err(_) => refused[place] = index,
        }
    }
    claim_any(members, is_tried, wanted.spares_the_broken, now).map(claimed)
}

/// A member as those see it who ask what it has been sent.
fn held_by(members: &[Arc<Member>], index: usize, now: Instant) -> affinity::Candidate {
    let member = &members[index];
    let (replica, in_flight) = (member.backend.serial, member.load(now));
    affinity::Candidate { index, replica, in_flight, weight: member.weight() }
}

/// All look closed, full or broken, or change from one moment to the next: whichever takes a request.
fn claim_any(
    members: &[Arc<Member>],
    is_tried: impl Fn(usize) -> bool,
    spares_the_broken: bool,
    now: Instant,
) -> Result<InFlight, NoPlace> {
    let mut least_bad: Option<(Duration, &Arc<Member>)> = None;
    let mut is_busy = false;
    for (_, member) in members.iter().enumerate().filter(|(index, _)| !is_tried(*index)) {
        if member.backend.is_closed() {
            continue;
        }
        let ready_in = member.backend.breaker.ready_in(now);
        if ready_in.is_zero()
            && let Ok(in_flight) = member.try_acquire(now)
        {
            return Ok(in_flight);
        }
        if member.backend.is_full() {
            is_busy = true;
        } else if least_bad.is_none_or(|(least, _)| ready_in < least) {
            least_bad = Some((ready_in, member));
        }
    }
    if is_busy {
        // A request that waits for the full ones is there when this one may be tried.
        return Err(NoPlace::Busy { rest: least_bad.map(|(ready_in, _)| ready_in) });
    }
    match least_bad.filter(|_| !spares_the_broken) {
        Some((_, member)) => member.acquire_at_rest(now).map_err(|_| NoPlace::Nobody),
        None => Err(NoPlace::Nobody),
    }
}

impl Candidate for Arc<Member> {
    fn weight(&self) -> u32 {
        self.backend.spec.weight.get()
    }

    fn load(&self, now: Instant) -> u64 {
        let ours = self.backend.in_flight();
        self.backend.reported.estimate(ours, now).unwrap_or(ours)
    }

    fn waiting_bytes(&self) -> u64 {
        self.backend.latency.waiting_bytes()
    }

    fn pace_s(&self) -> Option<f64> {
        // A member that is due for a trial is worth one, because the measurements from before it failed say nothing about now.
        match self.backend.breaker.state() {
            State::Closed => self.backend.latency.seconds(),
            State::Open | State::HalfOpen => None,
        }
    }

    fn silent(&self, now: Instant) -> Duration {
        self.backend.latency.read(now).map_or(Duration::ZERO, |reading| reading.age)
    }

    fn lifetime(&self, now: Instant) -> Duration {
        self.backend.latency.lifetime(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{backend::tests::member, breaker::Outcome, tally::Trouble};

    fn choose(
        members: &[Arc<Member>],
        tried: &[Arc<Backend>],
        policy: Balance,
        rng: &mut fastrand::Rng,
    ) -> Result<InFlight, NoPlace> {
        claim(members, policy, &Wanted { tried, ..Wanted::default() }, rng, Instant::now())
    }

    fn pool(weights: &[u32]) -> Vec<Arc<Member>> {
        weights.iter().enumerate().map(|(i, w)| member(&i.to_string(), *w, None)).collect()
    }

    fn counts(members: &[Arc<Member>]) -> Vec<u64> {
        members.iter().map(|m| m.backend.in_flight()).collect()
    }

    #[test]
    fn least_spreads_evenly_and_by_weight() {
        let mut rng = fastrand::Rng::with_seed(1);
        for (weights, expect) in [(&[1, 1, 1][..], &[20, 20, 20][..]), (&[1, 2, 3], &[10, 20, 30])] {
            let members = pool(weights);
            let held: Vec<_> = (0..60).map(|_| choose(&members, &[], Balance::Least, &mut rng).unwrap()).collect();
            assert_eq!(counts(&members), expect);
            drop(held);
        }
    }

    #[test]
    fn ties_fall_at_random() {
        let mut rng = fastrand::Rng::with_seed(2);
        let members = pool(&[1, 1, 1, 1]);
        let mut hits = [0; 4];
        for _ in 0..4_000 {
            let chosen = choose(&members, &[], Balance::Least, &mut rng).unwrap();
            hits[chosen.backend().spec.name.parse::<usize>().unwrap()] += 1;
        }
        assert!(hits.iter().all(|h| (800..1_200).contains(h)), "{hits:?}");
    }

    #[test]
    fn round_robin_takes_turns() {
        let mut rng = fastrand::Rng::with_seed(3);
        let members = pool(&[1, 2]);
        let names: String = (0..6)
            .map(|_| choose(&members[..], &[], Balance::RoundRobin, &mut rng).unwrap().backend().spec.name.clone())
            .collect();
        // each member counts turns of its own model; here both share none, so the first one's counter rules
        assert_eq!(names, "011011");
    }

    #[test]
    fn closed_full_and_tried_members_are_passed_over() {
        let mut rng = fastrand::Rng::with_seed(4);
        let members = vec![member("a", 1, Some(1)), member("b", 1, None), member("c", 1, None)];
        members[1].backend.close();
        let _first = members[0].try_acquire(Instant::now()).unwrap();
        let chosen = choose(&members, &[], Balance::Least, &mut rng).unwrap();
        assert_eq!(chosen.backend().spec.name, "c");
        let tried = [members[2].backend.clone()];
        assert_eq!(choose(&members, &tried, Balance::Least, &mut rng).unwrap_err(), NoPlace::Busy { rest: None });
        members[0].backend.close();
        assert_eq!(choose(&members, &tried, Balance::Least, &mut rng).unwrap_err(), NoPlace::Nobody);
        assert_eq!(choose(&[], &[], Balance::Least, &mut rng).unwrap_err(), NoPlace::Nobody);
    }

    #[test]
    fn who_rests_is_passed_over_and_the_least_bad_one_is_tried_if_all_fail() {
        let mut rng = fastrand::Rng::with_seed(5);
        let now = Instant::now();
        let members = vec![member("a", 1, None), member("b", 1, None)];
        let fail = |member: &Arc<Member>, times: usize, now: Instant| {
            for _ in 0..times {
                member.try_acquire(now).unwrap().failed(Trouble::Ended, now);
            }
        };
        let claim_at = |rng: &mut fastrand::Rng, tried: &[Arc<Backend>], now| {
            claim(&members, Balance::Least, &Wanted { tried, ..Wanted::default() }, rng, now)
        };
        fail(&members[0], 5, now);
        for _ in 0..20 {
            assert_eq!(claim_at(&mut rng, &[], now).unwrap().backend().spec.name, "b");
        }
        fail(&members[1], 5, now + Duration::from_millis(500));
        let later = now + Duration::from_millis(600);
        assert_eq!(claim_at(&mut rng, &[], later).unwrap().backend().spec.name, "a", "it comes back first");
        // One that is full is waited for, and so is one that may be tried soon.
        let members = vec![member("a", 1, Some(1)), member("b", 1, None)];
        let held = members[0].try_acquire(now).unwrap();
        fail(&members[1], 5, now);
        let claim_now = |rng: &mut fastrand::Rng, wanted: &Wanted<'_>, now| {
            claim(&members, Balance::Least, wanted, rng, now).map(|in_flight| in_flight.backend().spec.name.clone())
        };
        let refused = claim_now(&mut rng, &Wanted::default(), now);
        assert_eq!(refused, Err(NoPlace::Busy { rest: Some(Duration::from_secs(1)) }));
        // A member with an open breaker is tried if no other is left, but not for a request that has an answer.
        let (only_b, spares_the_broken) = ([members[0].backend.clone()], true);
        let wanted = Wanted { tried: &only_b, ..Wanted::default() };
        assert_eq!(claim_now(&mut rng, &Wanted { spares_the_broken, ..wanted }, now), Err(NoPlace::Nobody));
        assert_eq!(claim_now(&mut rng, &wanted, now).as_deref(), Ok("b"));
        drop(held);
        assert_eq!(claim_now(&mut rng, &Wanted { spares_the_broken, ..Wanted::default() }, now).as_deref(), Ok("a"));
    }

    #[test]
    fn those_that_push_back_come_last_and_nobody_waits_for_them() {
        for policy in [Balance::Ewma, Balance::Least, Balance::RoundRobin, Balance::Prefix] {
            let mut rng = fastrand::Rng::with_seed(6);
            let now = Instant::now();
            let members = vec![member("a", 1, None), member("b", 1, Some(1)), member("c", 1, None)];
            let push_back = |member: &Arc<Member>, of_all: bool| {
                let retry_after = Some(Duration::from_secs(3_600));
                member.try_acquire(now).unwrap().answered(Outcome::PushBack { of_all, retry_after }, now);
            };
            let claim_now = |rng: &mut fastrand::Rng, tried: &[Arc<Backend>], now| {
                claim(&members, policy, &Wanted { tried, ..Wanted::default() }, rng, now)
            };
            let who = |rng: &mut fastrand::Rng, tried: &[Arc<Backend>]| {
                let names = (0..50).map(|_| claim_now(rng, tried, now).unwrap().backend().spec.name.clone());
                names.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<String>()
            };
            push_back(&members[0], false);
            assert_eq!(who(&mut rng, &[]), "abc", "{policy:?}: one request was turned away, perhaps for its client");
            push_back(&members[0], false);
            push_back(&members[2], true);
            assert_eq!(who(&mut rng, &[]), "b", "{policy:?}: it takes over");
            assert_eq!(who(&mut rng, &[members[1].backend.clone()]), "ac", "{policy:?}");
            let full = claim_now(&mut rng, &[], now).unwrap();
            assert_eq!(full.backend().spec.name, "b");
            assert_eq!(who(&mut rng, &[]), "ac", "{policy:?}: none other has a place");
            members[0].try_acquire(now).unwrap().was_served();
            assert_eq!(who(&mut rng, &[]), "a", "{policy:?}: a success ends the rest");
            drop(full);
            members[2].try_acquire(now).unwrap().was_served();
            assert_eq!(who(&mut rng, &[]), "abc", "{policy:?}");
        }
        // A pool of one has no other member to prefer.
        let only = [member("a", 1, None)];
        let now = Instant::now();
        for _ in 0..5 {
            let mut turned_away = choose(&only, &[], Balance::Ewma, &mut fastrand::Rng::with_seed(7)).unwrap();
            turned_away.answered(Outcome::PushBack { of_all: true, retry_after: None }, now);
        }
    }
}
