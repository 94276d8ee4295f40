//! A simulation of balancing in virtual time: the proxy's own `pick` and `Pace` over make-believe inference engines.
//!
//! An engine has so many slots, the rest queues. Prefill is done in order of arrival, or shared among all in their prefill
//! phase; decoding goes on beside it, slower the more decode and while something prefills. The oracle sees into the
//! engines: it sends each request to where its first byte will come soonest.

// The bench and the tests each use a part of this.
#![allow(dead_code, unreachable_pub, reason = "shared by two targets")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a simulation"
)]

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use inference_proxy::{
    base::config::Balance,
    data::balance::policy::{Candidate, Request, pick},
    pool::latency::{Awaited, Pace},
};
use tokio::time::Instant;

/// A request, with what serving it takes on an engine of speed 1 that has nothing else to do.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    pub at_s: f64,
    pub bytes: u64,
    pub prefill_s: f64,
    pub decode_s: f64,
}

/// What requests are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mix {
    /// 100 B to 200 KB, each order of magnitude as likely; prefill of 40 KB/s.
    Even,
    /// Around 4 KB, few long ones.
    Chat,
    /// As `Even`, but a cache saves a random part of the prefill, mostly the greater part.
    Cached,
    /// As `Even`, on an engine that prefills ten times as fast: decoding is what there is not enough of.
    Decode,
    /// As `Even`, but the first byte takes 200 ms whatever the prompt: what the estimates assume is all wrong.
    Constant,
}

/// How an engine does its prefill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prefill {
    InOrder,
    Shared,
}

#[derive(Clone, Copy, Debug)]
struct Active {
    id: usize,
    left: f64,
    decode: f64,
    decodes: bool,
}

#[derive(Clone, Debug)]
struct Engine {
    slowness: f64,
    prefill: Prefill,
    active: Vec<Active>,
    queue: VecDeque<(usize, f64, f64)>,
    clock: f64,
}

enum Event {
    FirstByte(usize),
    End(usize),
}

const SLOTS: usize = 16;
/// Each request that decodes slows all down by this.
const PER_DECODE: f64 = 0.02;
/// Prefill slows decoding down by this.
const PER_PREFILL: f64 = 0.5;
const DUE: f64 = 1e-9;

impl Engine {
    fn new(slowness: f64, prefill: Prefill) -> Engine {
        Engine { slowness, prefill, active: Vec::new(), queue: VecDeque::new(), clock: 0.0 }
    }

    /// Speed of one that prefills, and of one that decodes.
    fn rates(&self) -> (f64, f64) {
        let decoding = self.active.iter().filter(|a| a.decodes).count();
        let prefilling = self.active.len() - decoding;
        let mut prefill = 1.0 / (self.slowness * (1.0 + PER_DECODE * decoding as f64));
        if self.prefill == Prefill::Shared {
            prefill /= prefilling.max(1) as f64;
        }
        let beside = if prefilling > 0 { PER_PREFILL } else { 0.0 };
        let others = decoding.saturating_sub(1) as f64;
        (prefill, 1.0 / (self.slowness * (1.0 + PER_DECODE * others + beside)))
    }

    /// Those that make progress, with their speeds.
    fn running(&mut self) -> impl Iterator<Item = (usize, &mut Active, f64)> {
        let (prefill, decode) = self.rates();
        let (in_order, mut is_first) = (self.prefill == Prefill::InOrder, true);
        self.active.iter_mut().enumerate().filter_map(move |(i, active)| match active.decodes {
            true => Some((i, active, decode)),
            false if !in_order || std::mem::take(&mut is_first) => Some((i, active, prefill)),
            false => None,
        })
    }

    fn next(&mut self) -> f64 {
        let clock = self.clock;
        self.running().map(|(_, active, rate)| clock + active.left / rate).fold(f64::INFINITY, f64::min)
    }

    fn advance(&mut self, to: f64) {
        let spent = to - self.clock;
        if spent > 0.0 {
            self.running().for_each(|(_, active, rate)| active.left -= spent * rate);
            self.clock = to;
        }
    }

    /// What is due now.
    fn fire(&mut self) -> Option<Event> {
        let index = self.running().find(|(_, active, _)| active.left <= DUE).map(|(i, ..)| i)?;
        let active = &mut self.active[index];
        if !active.decodes {
            (active.decodes, active.left) = (true, active.decode);
            return Some(Event::FirstByte(active.id));
        }
        let id = self.active.remove(index).id;
        if let Some((id, left, decode)) = self.queue.pop_front() {
            self.active.push(Active { id, left, decode, decodes: false });
        }
        Some(Event::End(id))
    }

    fn push(&mut self, id: usize, job: &Job) {
        if self.active.len() < SLOTS {
            self.active.push(Active { id, left: job.prefill_s, decode: job.decode_s, decodes: false });
        } else {
            self.queue.push_back((id, job.prefill_s, job.decode_s));
        }
    }

    /// When the first byte would come if nothing else did.
    fn forecast(&self, job: &Job, now: f64) -> f64 {
        const OWN: usize = usize::MAX;
        let mut engine = self.clone();
        engine.advance(now);
        engine.push(OWN, job);
        loop {
            let at = engine.next();
            engine.advance(at);
            while let Some(event) = engine.fire() {
                if matches!(event, Event::FirstByte(OWN)) {
                    return at;
                }
            }
        }
    }
}

/// `n` requests that come at random, `per_second` on average.
pub fn jobs(rng: &mut fastrand::Rng, n: usize, per_second: f64, mix: Mix) -> Vec<Job> {
    let exponential = |rng: &mut fastrand::Rng| -(1.0 - rng.f64()).ln();
    let mut at_s = 0.0;
    let one = |_| {
        at_s += exponential(rng) / per_second;
        let bytes = if mix == Mix::Chat {
            let normal = (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (std::f64::consts::TAU * rng.f64()).cos();
            (4_000.0 * (1.5 * normal).exp()).clamp(100.0, 200_000.0)
        } else {
            100.0 * 2_000_f64.powf(rng.f64())
        };
        let prefill_s = match mix {
            Mix::Even | Mix::Chat => 0.010 + bytes / 40_000.0,
            Mix::Cached => 0.010 + bytes * rng.f64().powi(2) / 40_000.0,
            Mix::Decode => 0.010 + bytes / 400_000.0,
            Mix::Constant => 0.200,
        };
        let decode_s = (exponential(rng) * 150.0).clamp(1.0, 2_000.0) * 0.020;
        Job { at_s, bytes: bytes as u64, prefill_s, decode_s }
    };
    (0..n).map(one).collect()
}

/// Requests per second of one engine that never lacks work.
pub fn capacity(prefill: Prefill, mix: Mix) -> f64 {
    let mut engine = Engine::new(1.0, prefill);
    for (id, job) in jobs(&mut fastrand::Rng::with_seed(99), 4_000, 1.0, mix).iter().enumerate() {
        engine.push(id, job);
    }
    let mut ended = 0;
    loop {
        let at = engine.next();
        engine.advance(at);
        while let Some(event) = engine.fire() {
            ended += usize::from(matches!(event, Event::End(_)));
            if ended == 3_000 {
                return 3_000.0 / at;
            }
        }
    }
}

/// Who chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Where the first byte will come soonest, which only a simulation can know.
    Oracle,
    /// One of the proxy's policies.
    Policy(Balance),
    /// Anyone.
    Random,
    /// Peak EWMA as usual: the time to the first byte × (in flight + 1), the less of two at random above 8.
    Plain,
    /// The same with each time divided by its own prompt.
    PlainPerByte,
    /// The proxy's `ewma`, but of two at random above 8.
    EwmaOfTwo,
}

/// What a pool goes through.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: &'static str,
    /// How much slower than speed 1 each replica is.
    pub slowness: Vec<f64>,
    /// When each joins; 0 is from the start.
    pub joins_s: Vec<f64>,
    /// Answers 500 within a millisecond from this time on.
    pub fails_from_s: Option<(usize, f64)>,
    /// Loses what it has and comes back empty after 20 seconds.
    pub restarts_at_s: Option<(usize, f64)>,
}

impl Scenario {
    pub fn of(name: &'static str, slowness: Vec<f64>) -> Scenario {
        let joins_s = vec![0.0; slowness.len()];
        Scenario { name, slowness, joins_s, fails_from_s: None, restarts_at_s: None }
    }

    /// Replicas of speed 1, together.
    pub fn speed(&self) -> f64 {
        self.slowness.iter().map(|s| 1.0 / s).sum()
    }
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Seconds from arrival to first byte, in order of arrival, warm-up left out; failures too.
    pub waits_s: Vec<f64>,
    /// The part of them that was not the prefill itself.
    pub queued_s: Vec<f64>,
    /// Where and when each request was sent.
    pub sent: Vec<(f64, usize)>,
    /// Failed requests, warm-up included.
    pub failed: usize,
    /// Mean and greatest number of requests at a replica, per speed, averaged over all arrivals: their ratio is 1 in
    /// perfect balance.
    pub mean_load: f64,
    pub max_load: f64,
}

impl Seen {
    pub fn imbalance(&self) -> f64 {
        self.max_load / self.mean_load.max(1e-9)
    }
}

/// One replica as the proxy sees it, and the engine as it is.
pub struct Replica {
    engine: Engine,
    next: f64,
    pub pace: Arc<Pace>,
    pub in_flight: u64,
    is_there: bool,
    // For the rules that are not the proxy's.
    plain: f64,
    plain_at: f64,
    // A stand-in for the breaker: rests after 5 failures in a row, for 1 s and then twice as long.
    failures: u32,
    rests_until: f64,
    rest_s: f64,
}

impl Replica {
    /// One that has been there since `born` and has been asked nothing.
    pub fn new(slowness: f64, prefill: Prefill, born: Instant) -> Replica {
        Replica {
            engine: Engine::new(slowness, prefill),
            next: f64::INFINITY,
            pace: Pace::new(born),
            in_flight: 0,
            is_there: true,
            plain: f64::NAN,
            plain_at: 0.0,
            failures: 0,
            rests_until: 0.0,
            rest_s: 1.0,
        }
    }
}

impl Candidate for Replica {
    fn weight(&self) -> u32 {
        1
    }
    fn load(&self, _now: Instant) -> u64 {
        self.in_flight
    }
    fn waiting_bytes(&self) -> u64 {
        self.pace.waiting_bytes()
    }
    fn pace_s(&self) -> Option<f64> {
        self.pace.seconds()
    }
    fn silent(&self, now: Instant) -> Duration {
        self.pace.read(now).map_or(Duration::ZERO, |reading| reading.age)
    }
    fn lifetime(&self, now: Instant) -> Duration {
        self.pace.lifetime(now)
    }
}

/// A run of the scenario with these requests.
pub fn run(jobs: &[Job], scenario: &Scenario, prefill: Prefill, rule: Rule, seed: u64) -> Seen {
    let mut sim = Sim::new(jobs, scenario, prefill, rule, seed);
    for id in 0..jobs.len() {
        sim.arrive(id);
    }
    let warm_up = jobs.len() / 10;
    let waits = sim.waits.iter().zip(jobs).skip(warm_up).filter(|(wait, _)| wait.is_finite());
    (sim.seen.waits_s, sim.seen.queued_s) = waits.map(|(wait, job)| (*wait, wait - job.prefill_s)).unzip();
    sim.seen
}

struct Sim<'a> {
    jobs: &'a [Job],
    scenario: &'a Scenario,
    prefill: Prefill,
    rule: Rule,
    rng: fastrand::Rng,
    born: Instant,
    replicas: Vec<Replica>,
    awaited: Vec<Option<Awaited>>,
    waits: Vec<f64>,
    memory: AtomicUsize,
    seen: Seen,
}

const MEMORY_S: f64 = 10.0;

impl<'a> Sim<'a> {
    fn new(jobs: &'a [Job], scenario: &'a Scenario, prefill: Prefill, rule: Rule, seed: u64) -> Sim<'a> {
        let born = Instant::now();
        // The pool is not new when the run begins.
        let settled = born.checked_sub(Duration::from_secs(60)).unwrap_or(born);
        let replica = |slowness: &f64| Replica::new(*slowness, prefill, settled);
        let mut replicas: Vec<Replica> = scenario.slowness.iter().map(replica).collect();
        for (replica, joins_s) in replicas.iter_mut().zip(&scenario.joins_s) {
            replica.is_there = *joins_s == 0.0;
        }
        Sim {
            jobs,
            scenario,
            prefill,
            rule,
            rng: fastrand::Rng::with_seed(seed),
            born,
            replicas,
            awaited: jobs.iter().map(|_| None).collect(),
            waits: vec![f64::NAN; jobs.len()],
            memory: AtomicUsize::new(0),
            seen: Seen::default(),
        }
    }

    fn at(&self, seconds: f64) -> Instant {
        self.born + Duration::from_secs_f64(seconds)
    }

    /// Everything that happens in the engines until then.
    fn pass(&mut self, until: f64) {
        loop {
            let soonest = self.replicas.iter().map(|r| r.next).enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
            let Some((index, at)) = soonest.filter(|(_, at)| *at <= until) else { return };
            self.replicas[index].engine.advance(at);
            while let Some(event) = self.replicas[index].engine.fire() {
                match event {
                    Event::FirstByte(id) => self.first_byte(index, id, at),
                    Event::End(_) => self.replicas[index].in_flight -= 1,
                }
            }
            let replica = &mut self.replicas[index];
            replica.next = replica.engine.next();
        }
    }

    fn first_byte(&mut self, index: usize, id: usize, at: f64) {
        let wait = at - self.jobs[id].at_s;
        self.waits[id] = wait;
        let now = self.at(at);
        if let Some(awaited) = self.awaited[id].take() {
            awaited.answered(now);
        }
        let replica = &mut self.replicas[index];
        replica.failures = 0;
        let units = if self.rule == Rule::PlainPerByte { 1.0 + self.jobs[id].bytes as f64 / 8_000.0 } else { 1.0 };
        let sample = wait / units;
        if replica.plain.is_nan() || sample > replica.plain {
            replica.plain = sample;
        } else {
            let weight = 1.0 - (-(at - replica.plain_at) / MEMORY_S).exp();
            replica.plain += (sample - replica.plain) * weight;
        }
        replica.plain_at = at;
    }

    fn arrive(&mut self, id: usize) {
        let job = self.jobs[id];
        self.pass(job.at_s);
        self.change(job.at_s);
        let Some(index) = self.choose(&job) else {
            self.seen.failed += 1;
            return;
        };
        let speeds = self.replicas.iter().filter(|r| r.is_there).map(|r| r.in_flight as f64 * r.engine.slowness);
        let loads: Vec<f64> = speeds.collect();
        self.seen.mean_load += loads.iter().sum::<f64>() / loads.len() as f64;
        self.seen.max_load += loads.iter().copied().fold(0.0, f64::max);
        self.seen.sent.push((job.at_s, index));
        let now = self.at(job.at_s);
        let replica = &mut self.replicas[index];
        let awaited = replica.pace.sent(job.bytes, replica.in_flight + 1, now);
        if self.scenario.fails_from_s.is_some_and(|(which, from)| which == index && job.at_s >= from) {
            // A millisecond is as good as none.
            awaited.failed(now);
            self.seen.failed += 1;
            replica.plain = if replica.plain.is_nan() { 0.001 } else { replica.plain * 0.9 };
            replica.failures += 1;
            if replica.failures >= 5 {
                replica.rests_until = job.at_s + replica.rest_s;
                replica.rest_s = (replica.rest_s * 2.0).min(60.0);
                // One trial, then it rests again.
                replica.failures = 4;
            }
            return;
        }
        self.awaited[id] = Some(awaited);
        replica.in_flight += 1;
        replica.engine.advance(job.at_s);
        replica.engine.push(id, &job);
        replica.next = replica.engine.next();
    }

    /// Who joins or restarts.
    fn change(&mut self, at: f64) {
        let now = self.at(at);
        for (index, joins_s) in self.scenario.joins_s.iter().enumerate() {
            let replica = &mut self.replicas[index];
            if !replica.is_there && *joins_s > 0.0 && *joins_s <= at {
                replica.is_there = true;
                replica.pace = Pace::new(now);
                replica.engine.clock = at;
            }
        }
        let Some((index, from)) = self.scenario.restarts_at_s else { return };
        let replica = &mut self.replicas[index];
        if at >= from && at < from + 20.0 {
            if replica.is_there {
                self.seen.failed += replica.in_flight as usize;
            }
            let slowness = replica.engine.slowness;
            replica.engine = Engine::new(slowness, self.prefill);
            (replica.is_there, replica.in_flight, replica.next) = (false, 0, f64::INFINITY);
        } else if at >= from && !replica.is_there {
            replica.is_there = true;
            replica.pace = Pace::new(now);
            replica.engine.clock = at;
            replica.plain = f64::NAN;
        }
    }

    fn choose(&mut self, job: &Job) -> Option<usize> {
        let replicas = &self.replicas;
        let may = |i: usize| replicas[i].is_there && replicas[i].rests_until <= job.at_s;
        let request = Request { prompt_bytes: job.bytes };
        let now = self.at(job.at_s);
        let some = || (0..replicas.len()).filter(|i| may(*i));
        let least = |among: &[usize], rng: &mut fastrand::Rng, cost: &dyn Fn(&Replica) -> f64| {
            let mut best = (f64::INFINITY, None, 0);
            for index in among {
                let cost = cost(&replicas[*index]);
                if cost < best.0 {
                    best = (cost, Some(*index), 1);
                } else if cost == best.0 {
                    best.2 += 1;
                    if rng.u32(0..best.2) == 0 {
                        best.1 = Some(*index);
                    }
                }
            }
            best.1
        };
        let mut among: Vec<usize> = some().collect();
        let of_two = matches!(self.rule, Rule::Plain | Rule::PlainPerByte | Rule::EwmaOfTwo);
        if of_two && among.len() > 8 {
            self.rng.shuffle(&mut among);
            among.truncate(2);
        }
        match self.rule {
            Rule::Oracle => least(&among, &mut self.rng, &|r| match self.scenario.fails_from_s {
                Some((which, from)) if job.at_s >= from && std::ptr::eq(r, &replicas[which]) => f64::MAX,
                _ => r.engine.forecast(job, job.at_s),
            }),
            Rule::Random => self.rng.choice(among),
            Rule::Plain | Rule::PlainPerByte => least(&among, &mut self.rng, &|r| {
                let plain = if r.plain.is_nan() { 0.0 } else { r.plain };
                // Decays when nothing is heard, as Finagle's does.
                plain * (-(job.at_s - r.plain_at) / MEMORY_S).exp() * (r.in_flight + 1) as f64
            }),
            Rule::EwmaOfTwo => {
                pick(Balance::Ewma, request, replicas, |i| among.contains(&i), &self.memory, &mut self.rng, now)
            }
            Rule::Policy(policy) => pick(policy, request, replicas, may, &self.memory, &mut self.rng, now),
        }
    }
}

/// The value below which this share of them is.
pub fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(((values.len().saturating_sub(1)) as f64 * share) as usize).copied().unwrap_or(f64::NAN)
}
