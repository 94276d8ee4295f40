//! How good and how dear the choice of a replica is: `cargo bench --bench balance [-- SEED]` prints the tables of
//! `docs/balancing.md`. The simulation is in virtual time and gives the same figures for the same seed everywhere; the
//! nanoseconds are those of this machine.
#![allow(clippy::print_stdout, reason = "what it is for")]
#![allow(clippy::unwrap_used, reason = "a benchmark")]

mod pool;
mod sim;

use std::{
    collections::HashMap,
    hint::black_box,
    num::NonZeroU32,
    sync::{Arc, Mutex, atomic::AtomicUsize},
    time::Duration,
};

use inference_proxy::{
    base::config::Balance,
    data::balance::{
        Wanted, claim,
        policy::{Request, pick},
    },
    pool::backend::Member,
};
use sim::{Mix, Prefill, Rule, Scenario, Seen, capacity, jobs, quantile, run};
use tokio::time::Instant;

const RULES: [(&str, Rule); 8] = [
    ("oracle", Rule::Oracle),
    ("**ewma**", Rule::Policy(Balance::Ewma)),
    ("ewma of two", Rule::EwmaOfTwo),
    ("plain peak EWMA", Rule::Plain),
    ("plain, per byte", Rule::PlainPerByte),
    ("least", Rule::Policy(Balance::Least)),
    ("round_robin", Rule::Policy(Balance::RoundRobin)),
    ("random", Rule::Random),
];

const LOADS: [f64; 3] = [0.5, 0.8, 0.95];
const JOBS: usize = 6_000;
const SEEDS: u64 = 2;

fn main() {
    let seed = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1);
    println!("Seed {seed}; {JOBS} requests × {SEEDS} per cell.\n");
    required(seed);
    details(seed);
    workloads(seed);
    cost();
}

/// Runs each of these on all cores.
fn parallel<T: Send, R: Send>(tasks: Vec<T>, work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<R>>> = tasks.iter().map(|_| Mutex::new(None)).collect();
    let tasks: Vec<Mutex<Option<T>>> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(index) = Some(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                    && index < tasks.len()
                {
                    let task = tasks[index].lock().unwrap().take().unwrap();
                    *results[index].lock().unwrap() = Some(work(&task));
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().unwrap().unwrap()).collect()
}

fn seen(scenario: &Scenario, load: f64, mix: Mix, prefill: Prefill, rule: Rule, seed: u64) -> Seen {
    let rate = load * capacity(prefill, mix) * scenario.speed();
    let mut all = Seen::default();
    for n in 0..SEEDS {
        let jobs = jobs(&mut fastrand::Rng::with_seed(seed * 1_000 + n), JOBS, rate, mix);
        let one = run(&jobs, scenario, prefill, rule, seed + n);
        all.waits_s.extend(one.waits_s);
        all.queued_s.extend(one.queued_s);
        all.failed += one.failed;
        all.mean_load += one.mean_load;
        all.max_load += one.max_load;
        all.sent.extend(one.sent);
    }
    all
}

fn equal(n: usize) -> Scenario {
    Scenario::of("equal", vec![1.0; n])
}

fn one_slow(n: usize) -> Scenario {
    let mut slowness = vec![1.0; n];
    slowness[0] = 5.0;
    Scenario::of("one five times as slow", slowness)
}

fn mixed(n: usize) -> Scenario {
    Scenario::of("mixed", (0..n).map(|i| [1.0, 1.5, 1.0, 2.0, 1.0, 3.0, 1.0, 4.0][i % 8]).collect())
}

/// The p95 wait of every rule as a multiple of the oracle's.
fn required(seed: u64) {
    for (title, of) in [("Equal replicas", equal as fn(usize) -> Scenario), ("One five times as slow", one_slow)] {
        let sizes = [2, 4, 8, 16, 32];
        let mut tasks = Vec::new();
        for (_, rule) in RULES {
            tasks.extend(sizes.iter().flat_map(|n| LOADS.map(|load| (*n, load, rule))));
        }
        let p95 = parallel(tasks, |(n, load, rule)| {
            quantile(&mut seen(&of(*n), *load, Mix::Even, Prefill::InOrder, *rule, seed).waits_s, 0.95)
        });
        println!("**{title}: p95 wait as a multiple of the oracle's, at 50, 80 and 95 % load**\n");
        println!("| | {} |", sizes.map(|n| format!("{n} replicas")).join(" | "));
        println!("|---|{}", "---:|".repeat(sizes.len()));
        let per_rule = sizes.len() * LOADS.len();
        for (index, (name, _)) in RULES.iter().enumerate() {
            let cells: Vec<String> = (0..per_rule)
                .map(|i| match (index, p95[i], p95[index * per_rule + i]) {
                    (0, oracle, _) => format!("{oracle:.1} s"),
                    (_, oracle, own) => format!("{:.2}", own / oracle),
                })
                .collect();
            let cells: Vec<String> = cells.chunks(LOADS.len()).map(|three| three.join(", ")).collect();
            println!("| {name} | {} |", cells.join(" | "));
        }
        println!();
    }
}

/// Quantiles and imbalance of some scenarios at 80 % load.
fn details(seed: u64) {
    let mut fails = equal(4);
    fails.fails_from_s = Some((0, 60.0));
    let mut joins = equal(4);
    joins.joins_s[0] = 300.0;
    let mut restarts = equal(4);
    restarts.restarts_at_s = Some((0, 300.0));
    for (title, scenario, load) in [
        ("8 equal replicas", equal(8), 0.8),
        ("4 replicas, one five times as slow", one_slow(4), 0.8),
        ("8 replicas of speeds 1, 1/1.5, 1, 1/2, 1, 1/3, 1, 1/4", mixed(8), 0.8),
        ("32 equal replicas", equal(32), 0.95),
        ("4 replicas, one answers 500 in 1 ms from second 60 on; load of the rest 80 %", fails, 0.6),
        ("4 replicas, one of which joins cold after 300 s; load of the rest until then 93 %", joins, 0.7),
        ("4 replicas, one of which is away for 20 s and comes back cold", restarts, 0.7),
    ] {
        println!("**{title}**, {:.0} % load\n", load * 100.0);
        println!("| | wait p50 | p95 | p99 | of it queued p50 | p95 | p99 | imbalance | failed |");
        println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|");
        let tasks: Vec<Rule> = RULES.iter().map(|(_, rule)| *rule).collect();
        let all = parallel(tasks, |rule| seen(&scenario, load, Mix::Even, Prefill::InOrder, *rule, seed));
        for ((name, _), mut seen) in RULES.iter().zip(all) {
            let three = |values: &mut Vec<f64>| {
                [0.5, 0.95, 0.99].map(|share| format!("{:.2} s", quantile(values, share).max(0.0))).join(" | ")
            };
            let (waits, queued) = (three(&mut seen.waits_s), three(&mut seen.queued_s));
            println!("| {name} | {waits} | {queued} | {:.2} | {} |", seen.imbalance(), seen.failed);
        }
        println!();
    }
}

/// The worst and the mean of all sizes and loads, for other prompts and engines.
fn workloads(seed: u64) {
    let workloads = [
        ("even, in order", Mix::Even, Prefill::InOrder),
        ("even, shared", Mix::Even, Prefill::Shared),
        ("chat", Mix::Chat, Prefill::InOrder),
        ("cached", Mix::Cached, Prefill::InOrder),
        ("decode", Mix::Decode, Prefill::InOrder),
        ("constant", Mix::Constant, Prefill::InOrder),
    ];
    let scenarios: Vec<Scenario> = [2, 4, 8, 32].into_iter().flat_map(|n| [equal(n), one_slow(n), mixed(n)]).collect();
    println!(
        "**p95 wait as a multiple of the oracle's over 2, 4, 8 and 32 replicas and all loads: greatest of equal ones,"
    );
    println!("greatest with one slow one, geometric mean of all**\n");
    println!("| | {} |", workloads.map(|(name, ..)| name).join(" | "));
    println!("|---|{}", "---:|".repeat(workloads.len()));
    let mut tasks = Vec::new();
    for rule in 0..RULES.len() {
        for workload in 0..workloads.len() {
            for scenario in 0..scenarios.len() {
                tasks.extend((0..LOADS.len()).map(|load| (rule, workload, scenario, load)));
            }
        }
    }
    let keys = tasks.clone();
    let p95 = parallel(tasks, |(rule, workload, scenario, load)| {
        let (_, mix, prefill) = workloads[*workload];
        let seen = seen(&scenarios[*scenario], LOADS[*load], mix, prefill, RULES[*rule].1, seed);
        quantile(&mut { seen.waits_s }, 0.95)
    });
    let p95: HashMap<_, _> = keys.into_iter().zip(p95).collect();
    for (rule, (name, _)) in RULES.iter().enumerate().skip(1) {
        let cell = |workload: usize| {
            let (mut equal, mut slow, mut logs, mut n) = (0.0_f64, 0.0_f64, 0.0, 0.0);
            for scenario in 0..scenarios.len() {
                for load in 0..LOADS.len() {
                    let ratio = p95[&(rule, workload, scenario, load)] / p95[&(0, workload, scenario, load)];
                    match scenario % 3 {
                        0 => equal = equal.max(ratio),
                        1 => slow = slow.max(ratio),
                        _ => {}
                    }
                    (logs, n) = (logs + ratio.ln(), n + 1.0);
                }
            }
            format!("{equal:.2}, {slow:.2}, {:.2}", f64::exp(logs / n))
        };
        println!("| {name} | {} |", (0..workloads.len()).map(cell).collect::<Vec<_>>().join(" | "));
    }
    println!();
}

/// Nanoseconds per decision, median of several runs.
fn cost() {
    const RUNS: usize = 9;
    const TIMES: u32 = 50_000;
    let sizes = [1_usize, 8, 64, 1_000];
    println!("**ns per decision, and with claiming and giving back the place**\n");
    println!("| | {} |", sizes.map(|n| format!("{n}")).join(" | "));
    println!("|---|{}", "---:|".repeat(sizes.len()));
    for (name, policy) in [("ewma", Balance::Ewma), ("least", Balance::Least), ("round_robin", Balance::RoundRobin)] {
        let cells = sizes.map(|size| {
            let members = pool(size);
            let (now, memory) = (Instant::now(), AtomicUsize::new(0));
            let mut rng = fastrand::Rng::with_seed(1);
            let request = Request { prompt_bytes: 1_000 };
            let mut median = |choice: &mut dyn FnMut(&mut fastrand::Rng)| {
                let mut runs: Vec<f64> = (0..RUNS)
                    .map(|_| {
                        let before = on_cpu_ns();
                        (0..TIMES).for_each(|_| choice(&mut rng));
                        (on_cpu_ns() - before) / f64::from(TIMES)
                    })
                    .collect();
                quantile(&mut runs, 0.5)
            };
            let alone = median(&mut |rng| {
                black_box(pick(policy, request, black_box(&members), |_| true, &memory, rng, now));
            });
            let wanted = Wanted { prompt_bytes: 1_000, ..Wanted::default() };
            let whole = median(&mut |rng| {
                let _ = black_box(claim(black_box(&members), policy, &wanted, rng, now));
            });
            format!("{alone:.0}, {whole:.0}")
        });
        println!("| {name} | {} |", cells.join(" | "));
    }
}

/// Nanoseconds that this thread has been on a CPU, which other work on the machine does not lengthen; where the kernel does
/// not say, nanoseconds.
fn on_cpu_ns() -> f64 {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    // It is brought up to date when the thread is switched.
    std::thread::yield_now();
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let ns = stat.and_then(|stat| stat.split(' ').next()?.parse().ok());
    ns.unwrap_or_else(|| START.get_or_init(std::time::Instant::now).elapsed().as_secs_f64() * 1e9)
}

/// Members that have answered.
fn pool(size: usize) -> Vec<Arc<Member>> {
    let now = Instant::now();
    let members = pool::pool(u32::try_from(size).unwrap(), now, |_| (NonZeroU32::MIN, None));
    for (i, member) in members.iter().enumerate() {
        let latency = &member.backend.latency;
        latency.sent(1_000, 1, now).answered(now + Duration::from_millis(50 + i as u64 % 7));
    }
    members
}
