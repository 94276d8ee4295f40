//! Policies over replicas that say what a test wants.

use super::*;
use crate::pool::latency::Reading;

const MS: Duration = Duration::from_millis(1);

#[derive(Debug, Clone)]
struct Replica {
    weight: u32,
    load: u64,
    waiting_bytes: u64,
    pace: Option<Reading>,
    lifetime: Duration,
}

impl Default for Replica {
    fn default() -> Replica {
        Replica { weight: 1, load: 0, waiting_bytes: 0, pace: pace(100), lifetime: 100 * NEW_FOR }
    }
}

impl Candidate for Replica {
    fn weight(&self) -> u32 {
        self.weight
    }
    fn load(&self, _now: Instant) -> u64 {
        self.load
    }
    fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes
    }
    fn pace_s(&self) -> Option<f64> {
        self.pace.map(|reading| reading.seconds)
    }
    fn silent(&self, _now: Instant) -> Duration {
        self.pace.map_or(Duration::ZERO, |reading| reading.age)
    }
    fn lifetime(&self, _now: Instant) -> Duration {
        self.lifetime
    }
}

fn pace(ms: u32) -> Option<Reading> {
    Some(Reading { seconds: f64::from(ms) / 1_000.0, age: Duration::ZERO })
}

struct Chooser {
    policy: Balance,
    memory: AtomicUsize,
    rng: fastrand::Rng,
    now: Instant,
    prompt_bytes: u64,
}

impl Chooser {
    fn new(policy: Balance, seed: u64) -> Chooser {
        let rng = fastrand::Rng::with_seed(seed);
        Chooser { policy, memory: AtomicUsize::new(0), rng, now: Instant::now(), prompt_bytes: 0 }
    }

    fn pick(&mut self, replicas: &[Replica], may: impl Fn(usize) -> bool) -> Option<usize> {
        let request = Request { prompt_bytes: self.prompt_bytes };
        pick(self.policy, request, replicas, may, &self.memory, &mut self.rng, self.now)
    }

    /// How often each is picked of so many times, when nothing changes by it.
    fn counts(&mut self, replicas: &[Replica], times: u32) -> Vec<u32> {
        let mut counts = vec![0; replicas.len()];
        for _ in 0..times {
            counts[self.pick(replicas, |_| true).unwrap()] += 1;
        }
        counts
    }
}

const POLICIES: [Balance; 4] = [Balance::Ewma, Balance::Least, Balance::RoundRobin, Balance::Prefix];

#[test]
fn one_that_may_is_picked_and_none_only_if_none_may() {
    let mut rng = fastrand::Rng::with_seed(1);
    for policy in POLICIES {
        let mut chooser = Chooser::new(policy, 2);
        for _ in 0..3_000 {
            let replicas: Vec<Replica> = (0..rng.usize(0..200))
                .map(|_| Replica {
                    weight: if rng.u8(0..4) == 0 { rng.u32(1..1_000) } else { 1 },
                    load: rng.u64(0..20),
                    waiting_bytes: rng.u64(0..1_000_000),
                    pace: pace(rng.u32(0..10_000)).filter(|_| rng.bool()),
                    lifetime: NEW_FOR.mul_f64(rng.f64() * 2.0),
                })
                .collect();
            let share = [0.0, 0.01, 0.5, 1.0][rng.usize(0..4)];
            let may: Vec<bool> = replicas.iter().map(|_| rng.f64() < share).collect();
            match chooser.pick(&replicas, |i| may[i]) {
                Some(index) => assert!(may[index], "{policy:?} picked one that may not"),
                None => assert!(!may.contains(&true), "{policy:?} of {} picked none", replicas.len()),
            }
        }
    }
}

#[test]
fn what_is_drawn_is_distinct_and_may_be_chosen() {
    let (replicas, memory) = (vec![Replica::default(); 100], AtomicUsize::new(0));
    let mut rng = fastrand::Rng::with_seed(3);
    let mut seen = [0_u32; 100];
    for _ in 0..20_000 {
        let (mut drawn, count) = draw(&replicas, |i| i % 2 == 0, &memory, &mut rng);
        assert!(count >= 2, "with half of them there are always two");
        drawn[..count].iter().for_each(|i| seen[*i] += 1);
        drawn[..count].sort_unstable();
        assert!(drawn[..count].windows(2).all(|pair| pair[0] != pair[1]), "{drawn:?}");
    }
    assert!(
        seen.iter().enumerate().all(|(i, n)| if i % 2 == 0 { (2_800..3_600).contains(n) } else { *n == 0 }),
        "{seen:?}"
    );
}

#[test]
fn among_equals_chance_decides() {
    for policy in [Balance::Ewma, Balance::Least] {
        let counts = Chooser::new(policy, 4).counts(&vec![Replica::default(); 4], 8_000);
        assert!(counts.iter().all(|n| (1_800..2_200).contains(n)), "{policy:?} {counts:?}");
    }
}

#[test]
fn weights_are_kept_to() {
    let small: &[u32] = &[1, 2, 3];
    let skewed: &[u32] = &[1, 1, 1, 1, 1, 1, 1, 1, 20];
    let large: Vec<u32> = (0..100).map(|i| if i == 7 { 30 } else { 1 + i % 3 }).collect();
    for policy in [Balance::Ewma, Balance::Least, Balance::RoundRobin] {
        for weights in [small, skewed, &large] {
            let mut chooser = Chooser::new(policy, 5);
            let mut replicas: Vec<Replica> =
                weights.iter().map(|weight| Replica { weight: *weight, ..Replica::default() }).collect();
            let mut counts = vec![0_u32; weights.len()];
            // In a steady state: as many leave, evenly over all requests, as come.
            let mut there = std::collections::VecDeque::new();
            for n in 0..40_000 {
                let index = chooser.pick(&replicas, |_| true).unwrap();
                replicas[index].load += 1;
                there.push_back(index);
                if there.len() > 60 * weights.len() {
                    replicas[there.pop_front().unwrap()].load -= 1;
                }
                if n >= 4_000 {
                    counts[index] += 1;
                }
            }
            let unit = 36_000.0 / f64::from(weights.iter().sum::<u32>());
            for (weight, count) in weights.iter().zip(&counts) {
                let expect = unit * f64::from(*weight);
                let off = (f64::from(*count) - expect).abs() / expect;
                assert!(off < 0.05, "{policy:?} weight {weight} of {}: {count}, not {expect}", weights.len());
            }
        }
    }
}

#[test]
fn weights_are_kept_to_when_requests_come_one_at_a_time() {
    for policy in POLICIES {
        let replicas = [1, 3].map(|weight| Replica { weight, ..Replica::default() });
        let counts = Chooser::new(policy, 14).counts(&replicas, 8_000);
        assert!((1_900..2_100).contains(&counts[0]), "{policy:?} {counts:?}");
    }
}

#[test]
fn turns_come_to_all_and_do_not_come_in_blocks() {
    for (weights, expect) in
        [(&[1, 1][..], "010101"), (&[1, 2], "011011"), (&[3, 1], "01000100"), (&[2, 2], "01100110")]
    {
        let replicas: Vec<Replica> = weights.iter().map(|w| Replica { weight: *w, ..Replica::default() }).collect();
        let mut chooser = Chooser::new(Balance::RoundRobin, 6);
        let turns: String = expect.chars().map(|_| chooser.pick(&replicas, |_| true).unwrap().to_string()).collect();
        assert_eq!(turns, expect, "{weights:?}");
    }
    for all in 1..500 {
        let step = stride(all);
        let mut places: Vec<u64> = (0..all).map(|turn| turn * step % all).collect();
        places.sort_unstable();
        assert!(places.iter().enumerate().all(|(i, place)| i as u64 == *place), "{all} by {step}");
    }
}

#[test]
fn the_faster_one_is_better_until_it_has_more_to_do() {
    let fast = |load| Replica { load, ..Replica::default() };
    let slow = |ms, load| Replica { pace: pace(ms), load, ..Replica::default() };
    for (replicas, expect) in [
        // Twice as slow and busy: counts for 1.67.
        ([fast(1), slow(200, 1)], 0),
        ([fast(2), slow(200, 1)], 0),
        ([fast(3), slow(200, 1)], 1),
        ([fast(8), slow(500, 1)], 0),
        ([fast(10), slow(500, 1)], 1),
        // Alike: the load alone decides.
        ([fast(3), slow(140, 2)], 1),
        ([slow(140, 2), fast(1)], 1),
    ] {
        let mut chooser = Chooser::new(Balance::Ewma, 7);
        assert_eq!(chooser.pick(&replicas, |_| true), Some(expect), "{replicas:?}");
    }
    // Jitter of milliseconds is no difference.
    let counts = Chooser::new(Balance::Ewma, 8).counts(&[slow(1, 0), slow(10, 0), slow(15, 0)], 3_000);
    assert!(counts.iter().all(|n| *n > 800), "{counts:?}");
}

#[test]
fn prompts_that_wait_count_and_the_longer_the_prompt_the_more_the_pace_does() {
    let mut chooser = Chooser::new(Balance::Ewma, 9);
    let busy = Replica { load: 1, waiting_bytes: 200_000, ..Replica::default() };
    let many = Replica { load: 9, ..Replica::default() };
    assert_eq!(chooser.pick(&[busy.clone(), many.clone()], |_| true), Some(1));
    let slow = Replica { pace: pace(500), ..Replica::default() };
    // A short request goes to the slow one that is idle, a long one waits for the fast one.
    for (prompt_bytes, expect) in [(0, 1), (200_000, 0)] {
        chooser.prompt_bytes = prompt_bytes;
        assert_eq!(chooser.pick(&[many.clone(), slow.clone()], |_| true), Some(expect), "{prompt_bytes}");
    }
}

#[test]
fn the_unmeasured_are_tried_at_once_and_then_with_care() {
    let cold = |load| Replica { pace: None, load, ..Replica::default() };
    let warm = |load| Replica { load, ..Replica::default() };
    for (replicas, expect) in [
        ([cold(0), warm(1)], 0),
        ([cold(1), warm(1)], 1),
        ([cold(1), warm(2)], 1),
        ([cold(1), warm(3)], 0),
        // Nobody knows anything: the load decides.
        ([cold(2), cold(1)], 1),
    ] {
        assert_eq!(Chooser::new(Balance::Ewma, 10).pick(&replicas, |_| true), Some(expect), "{replicas:?}");
    }
}

#[test]
fn a_slow_one_is_tried_again_after_a_while_but_not_while_it_works() {
    let slow = |age, load| Replica { pace: Some(Reading { seconds: 2.0, age }), load, ..Replica::default() };
    let picks = |age, load| Chooser::new(Balance::Ewma, 11).counts(&[Replica::default(), slow(age, load)], 100)[1];
    assert_eq!(picks(20 * MS, 0), 0);
    assert_eq!(picks(FORGETTING, 0), 0);
    assert!(picks(10 * FORGETTING, 0) > 20);
    assert_eq!(picks(10 * FORGETTING, 1), 0);
}

#[test]
fn a_newcomer_gets_at_most_twice_its_share() {
    let new = Replica { pace: None, lifetime: MS, ..Replica::default() };
    let busy = Replica { load: 700, ..Replica::default() };
    for size in [4, 9, 40] {
        let mut replicas = vec![busy.clone(); size];
        replicas[1] = new.clone();
        let share = f64::from(Chooser::new(Balance::Ewma, 12).counts(&replicas, 10_000)[1]) / 10_000.0;
        let fair = 1.0 / f64::from(u32::try_from(size).unwrap());
        assert!((1.8..2.2).contains(&(share / fair)), "{share} of {size}");
    }
    // Where all are new nobody is held back.
    let mut replicas = vec![Replica { lifetime: MS, load: 9, ..Replica::default() }; 9];
    replicas[3] = new;
    assert_eq!(Chooser::new(Balance::Ewma, 13).counts(&replicas, 100)[3], 100);
}
