//! A small part of the simulation of balancing, so that what it shows stays true. The whole is `cargo bench --bench
//! balance`; its figures are in `docs/balancing.md`.

use std::{cmp::Reverse, collections::BinaryHeap, sync::atomic::AtomicUsize, time::Duration};

use inference_proxy::{
    base::config::Balance,
    data::balance::policy::{Request, pick},
};
use tokio::time::Instant;

#[path = "../bench/sim.rs"]
mod sim;

use sim::{Mix, Prefill, Replica, Rule, Scenario, Seen, capacity, jobs, quantile, run};

const EWMA: Rule = Rule::Policy(Balance::Ewma);

fn seen(scenario: &Scenario, load: f64, n: usize, rule: Rule) -> Seen {
    let rate = load * capacity(Prefill::InOrder, Mix::Even) * scenario.speed();
    let jobs = jobs(&mut fastrand::Rng::with_seed(5), n, rate, Mix::Even);
    run(&jobs, scenario, Prefill::InOrder, rule, 6)
}

fn p95(scenario: &Scenario, load: f64, rule: Rule) -> f64 {
    quantile(&mut seen(scenario, load, 4_000, rule).waits_s, 0.95)
}

#[test]
fn ewma_is_close_to_who_knows_everything() {
    let mut one_slow = vec![1.0; 4];
    one_slow[0] = 5.0;
    for slowness in [vec![1.0; 2], vec![1.0; 8], vec![1.0; 16], one_slow] {
        let scenario = Scenario::of("", slowness);
        for load in [0.5, 0.8, 0.95] {
            let ratio = p95(&scenario, load, EWMA) / p95(&scenario, load, Rule::Oracle);
            assert!(ratio <= 1.3, "{ratio:.2} at {load} of {:?}", scenario.slowness);
        }
    }
}

#[test]
fn what_the_simulation_measures_can_be_bad() {
    let scenario = Scenario::of("", vec![1.0; 16]);
    let best = p95(&scenario, 0.8, Rule::Oracle);
    for rule in [Rule::Random, Rule::Plain, Rule::PlainPerByte, Rule::Policy(Balance::Least)] {
        assert!(p95(&scenario, 0.8, rule) > 1.3 * best, "{rule:?}");
    }
}

#[test]
fn p03_a_cold_replica_is_neither_starved_nor_flooded() {
    for (size, load) in [(2, 0.8), (2, 1.5), (5, 0.8), (9, 1.0)] {
        let mut scenario = Scenario::of("", vec![1.0; size]);
        scenario.joins_s[0] = 60.0;
        // More than one arrival a second, and the pool is what it is before the newcomer.
        let seen = seen(&scenario, load, 4_000, EWMA);
        let within = |seconds: f64| {
            let those: Vec<usize> =
                seen.sent.iter().filter(|(at, _)| (60.0..60.0 + seconds).contains(at)).map(|(_, to)| *to).collect();
            (those.iter().filter(|to| **to == 0).count(), those.len())
        };
        let next = seen.sent.iter().filter(|(at, _)| *at >= 60.0).take(2 * size).any(|(_, to)| *to == 0);
        assert!(next, "{size} at {load}: it gets one of the first requests");
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let share = |(own, all): (usize, usize)| own as f64 / all.max(1) as f64 * size as f64;
        assert!(share(within(10.0)) >= 0.6, "{size} at {load}: {:?} within 10 s", within(10.0));
        assert!(share(within(30.0)) < 3.0, "{size} at {load}: {:?} within 30 s", within(30.0));
    }
}

#[test]
fn p05_one_that_fails_fast_attracts_nothing() {
    let mut scenario = Scenario::of("", vec![1.0; 3]);
    scenario.fails_from_s = Some((0, 30.0));
    // The breaker's stand-in lets one trial through at 1, 2, 4, … seconds.
    let seen = seen(&scenario, 0.6, 2_000, EWMA);
    assert!(seen.failed < 5 + 2_000 / 50, "{} failed", seen.failed);
}

/// A replica whose engine is of no matter: it takes as long as it takes, however much it has.
fn replica(born: Instant) -> Replica {
    Replica::new(1.0, Prefill::InOrder, born)
}

/// `clients` that each send the next request `pause` after the answer to the one before, until `until`. `ttfb` says how
/// long replica `i` takes at a time since the start; the last one is there from `joins` on. When and to whom each request was sent.
fn closed_loop(
    n: usize,
    clients: usize,
    pause: Duration,
    until: Duration,
    joins: Duration,
    ttfb: impl Fn(usize, Duration) -> Duration,
) -> Vec<(Duration, usize)> {
    let born = Instant::now();
    let mut replicas: Vec<Replica> = (0..n).map(|_| replica(born)).collect();
    replicas[n - 1] = replica(born + joins);
    let (memory, mut rng) = (AtomicUsize::new(0), fastrand::Rng::with_seed(7));
    let mut sent = Vec::new();
    // (when, client, whether its answer ends then): whose request it is, and on which replica, is in `open`.
    let mut events: BinaryHeap<_> = (0..clients).map(|client| Reverse((Duration::ZERO, client, false))).collect();
    let mut open: Vec<_> = (0..clients).map(|_| None).collect();
    while let Some(Reverse((at, client, ends))) = events.pop() {
        let now = born + at;
        if ends {
            let (index, awaited): (usize, inference_proxy::pool::latency::Awaited) = open[client].take().unwrap();
            awaited.answered(now);
            replicas[index].in_flight -= 1;
            events.push(Reverse((at + pause, client, false)));
        } else if at < until {
            let request = Request { prompt_bytes: 300 };
            let may = |i| i < n - 1 || at >= joins;
            let index = pick(Balance::Ewma, request, &replicas, may, &memory, &mut rng, now).unwrap();
            let replica = &mut replicas[index];
            replica.in_flight += 1;
            open[client] = Some((index, replica.pace.sent(300, replica.in_flight, now)));
            events.push(Reverse((at + ttfb(index, at), client, true)));
            sent.push((at, index));
        }
    }
    sent
}

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

#[test]
fn p02_the_fast_one_gets_most_and_the_slow_one_some() {
    let mut sent =
        closed_loop(2, 8, Duration::ZERO, 10 * SECOND, Duration::ZERO, |i, _| if i == 0 { 10 * MS } else { 200 * MS });
    sent.truncate(1_000);
    let slow = sent.iter().filter(|(_, to)| *to == 1).count();
    assert!(sent.len() == 1_000 && (1..=100).contains(&slow), "{slow} of {}", sent.len());
}

#[test]
fn p02_a_slow_one_that_became_fast_is_found_also_by_few_requests() {
    for (clients, pause) in [(8, Duration::ZERO), (1, SECOND)] {
        let became = 30 * SECOND;
        let ttfb = |i, at| if i == 1 && at < became { 500 * MS } else { 50 * MS };
        let sent = closed_loop(2, clients, pause, 400 * SECOND, Duration::ZERO, ttfb);
        let share = |from: Duration, to: Duration| {
            let those: Vec<usize> = sent.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, i)| *i).collect();
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let share = those.iter().sum::<usize>() as f64 / those.len() as f64;
            share
        };
        assert!(share(5 * SECOND, became) < 0.1, "{clients}: {}", share(5 * SECOND, became));
        assert!(share(200 * SECOND, 400 * SECOND) > 0.4, "{clients}: {}", share(200 * SECOND, 400 * SECOND));
    }
}

#[test]
fn p03_a_cold_replica_that_takes_as_long_as_the_others_gets_as_much() {
    for (n, clients, ttfb) in [(2, 8, 50 * MS), (2, 40, 200 * MS), (2, 20, 2 * SECOND), (9, 200, 200 * MS)] {
        let joins = 30 * SECOND;
        let sent = closed_loop(n, clients, Duration::ZERO, 40 * SECOND, joins, |_, _| ttfb);
        let after: Vec<_> = sent.into_iter().filter(|(at, _)| *at >= joins).collect();
        let first = after.iter().find(|(_, to)| *to == n - 1).unwrap().0;
        // A closed loop asks nothing while all its clients wait.
        assert!(first <= joins + ttfb.max(SECOND), "{n} of {ttfb:?}: the first after {:?}", first - joins);
        let share = |within: Duration| {
            let those: Vec<_> = after.iter().filter(|(at, _)| *at < joins + within).collect();
            let own = those.iter().filter(|(_, to)| *to == n - 1).count();
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let share = (own * n) as f64 / those.len().max(1) as f64;
            share
        };
        assert!(share(10 * SECOND) >= 0.6, "{n} of {ttfb:?}: {} of its share", share(10 * SECOND));
        assert!(share(SECOND) < 3.0, "{n} of {ttfb:?}: {} of its share", share(SECOND));
    }
}

#[test]
fn p04_long_streams_are_spread_evenly_whatever_the_jitter_of_their_first_bytes() {
    let born = Instant::now();
    let mut rng = fastrand::Rng::with_seed(8);
    for _ in 0..200 {
        let mut replicas = [(); 2].map(|()| replica(born));
        let memory = AtomicUsize::new(0);
        for n in 0..20 {
            let now = born + n * 20 * MS;
            let request = Request { prompt_bytes: 100 };
            let index = pick(Balance::Ewma, request, &replicas, |_| true, &memory, &mut rng, now).unwrap();
            let replica = &mut replicas[index];
            replica.in_flight += 1;
            replica.pace.sent(100, replica.in_flight, now).answered(now + rng.u32(1..15) * MS);
        }
        assert!(replicas[0].in_flight.abs_diff(replicas[1].in_flight) <= 2, "{}", replicas[0].in_flight);
    }
}
