//! Which member of a pool gets the next request. Pure: load and chance come in, a choice goes out.

use std::sync::{Arc, atomic::Ordering};

use crate::{
    backend::{Backend, InFlight, Member, Refused},
    config::Balance,
};

/// Chooses among the members of one model's pool and claims a place. Members whose backend is in `tried` are left out;
/// a member that refuses (it has just closed, or is full) is passed over for the next best.
///
/// # Errors
/// [`Refused::Full`] if at least one open member is full, else [`Refused::Closed`].
pub fn choose(
    members: &[Arc<Member>],
    tried: &[Arc<Backend>],
    policy: Balance,
    rng: &mut fastrand::Rng,
) -> Result<InFlight, Refused> {
    // One healthy replica is the common case and needs no ranking.
    if let ([only], []) = (members, tried) {
        return only.try_acquire();
    }
    let mut refused: Vec<usize> = Vec::new();
    let mut full = false;
    loop {
        let candidates = members.iter().enumerate().filter(|(i, member)| {
            !refused.contains(i) && !tried.iter().any(|backend| Arc::ptr_eq(backend, &member.backend))
        });
        let best = match policy {
            Balance::RoundRobin => in_turn(candidates),
            Balance::Least | Balance::Ewma | Balance::Prefix => least_loaded(candidates, rng),
        };
        let Some(best) = best else {
            return Err(if full { Refused::Full } else { Refused::Closed });
        };
        match members[best].try_acquire() {
            Ok(in_flight) => return Ok(in_flight),
            Err(why) => {
                full |= why == Refused::Full;
                refused.push(best);
            }
        }
    }
}

/// The member with the least in flight for its weight; among equals, any.
fn least_loaded<'m>(
    candidates: impl Iterator<Item = (usize, &'m Arc<Member>)>,
    rng: &mut fastrand::Rng,
) -> Option<usize> {
    let mut best: Option<(usize, u64, u64)> = None;
    let mut equals = 0;
    for (index, member) in candidates {
        let load = member.backend.in_flight() + 1;
        let weight = u64::from(member.backend.spec.weight.get());
        // load / weight compared without division.
        let order = best.map_or(std::cmp::Ordering::Less, |(_, l, w)| (load * w).cmp(&(l * weight)));
        match order {
            std::cmp::Ordering::Less => {
                best = Some((index, load, weight));
                equals = 1;
            }
            std::cmp::Ordering::Equal => {
                equals += 1;
                if rng.u32(0..equals) == 0 {
                    best = Some((index, load, weight));
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }
    best.map(|(index, ..)| index)
}

/// The next one after the last, each as often as its weight says.
fn in_turn<'m>(candidates: impl Iterator<Item = (usize, &'m Arc<Member>)> + Clone) -> Option<usize> {
    let weight = |member: &Arc<Member>| member.backend.spec.weight.get() as usize;
    let all: usize = candidates.clone().map(|(_, member)| weight(member)).sum();
    let (_, first) = candidates.clone().next()?;
    let mut turn = first.model.turn.fetch_add(1, Ordering::Relaxed) % all;
    for (index, member) in candidates {
        match turn.checked_sub(weight(member)) {
            Some(rest) => turn = rest,
            None => return Some(index),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::member;

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
        let _first = members[0].try_acquire().unwrap();
        let chosen = choose(&members, &[], Balance::Least, &mut rng).unwrap();
        assert_eq!(chosen.backend().spec.name, "c");
        let tried = [members[2].backend.clone()];
        assert_eq!(choose(&members, &tried, Balance::Least, &mut rng).unwrap_err(), Refused::Full);
        members[0].backend.close();
        assert_eq!(choose(&members, &tried, Balance::Least, &mut rng).unwrap_err(), Refused::Closed);
        assert_eq!(choose(&[], &[], Balance::Least, &mut rng).unwrap_err(), Refused::Closed);
    }
}
