//! Many random histories of many actors, beside a model that is written without bits, words and periods.
//!
//! A run is made of one seed. It is the same in every run; `BREAKER_SEED=1234` makes another one, `BREAKER_CASE=567` plays
//! one history of it alone. Seed and case are in every failure.

use super::*;

const CASES: u64 = 100_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Usual,
    Trial,
    Forced,
}

/// An attempt that is under way, and what the model knows of it.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    pass: Pass,
    kind: Kind,
    /// Number of changes between closed and open, and of new openings, before it began.
    epoch: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Closed,
    Open { until_ms: u64, trial_out: bool },
}

/// What the rules say, in plain numbers.
#[derive(Debug)]
struct Model {
    is: Is,
    epoch: u64,
    failed_trials: u64,
    closed_in_half: u64,
    last_half: u64,
    in_a_row: u64,
    /// All attempts since it was closed, but for old ones: in which five seconds, and whether they succeeded.
    log: Vec<(u64, bool)>,
    busy_until_ms: u64,
    /// Push-backs since the last request that was served.
    pushed_back: u64,
}

/// What may happen to the model when an attempt fails.
#[derive(Debug, PartialEq, Eq)]
enum Trip {
    Must,
    MustNot,
    /// So many attempts that the counts of the breaker have been halved.
    May,
}

impl Model {
    fn ready_in_ms(&self, now_ms: u64) -> u64 {
        match self.is {
            Is::Closed => 0,
            Is::Open { trial_out: true, until_ms } => until_ms.saturating_sub(now_ms).min(1_000),
            Is::Open { until_ms, .. } => until_ms.saturating_sub(now_ms),
        }
    }

    fn state(&self) -> State {
        match self.is {
            Is::Closed => State::Closed,
            Is::Open { trial_out: false, .. } => State::Open,
            Is::Open { trial_out: true, .. } => State::HalfOpen,
        }
    }

    fn admit(&mut self, now_ms: u64) -> Option<Kind> {
        match &mut self.is {
            Is::Closed => Some(Kind::Usual),
            Is::Open { until_ms, trial_out } if *until_ms <= now_ms => {
                // Nothing was heard of the one before for half a minute.
                self.epoch += u64::from(*trial_out);
                (*trial_out, *until_ms) = (true, now_ms + 30_000);
                Some(Kind::Trial)
            }
            Is::Open { .. } => None,
        }
    }

    fn open(&mut self, now_ms: u64) {
        let seconds = [1, 2, 4, 8, 16, 32, 60][self.failed_trials as usize];
        self.is = Is::Open { until_ms: now_ms + seconds * 1_000, trial_out: false };
        self.epoch += 1;
    }

    fn close(&mut self, now_ms: u64) {
        self.is = Is::Closed;
        self.epoch += 1;
        self.in_a_row = 0;
        self.log.clear();
        self.closed_in_half = now_ms / 5_000;
        self.last_half = self.closed_in_half;
    }

    fn would_trip(&self) -> Trip {
        if self.in_a_row >= 5 {
            return Trip::Must;
        }
        let count = |half: u64, success: bool| self.log.iter().filter(|a| **a == (half, success)).count();
        let halves = [self.last_half, self.last_half.wrapping_sub(1)];
        let [successes, failures] = [true, false].map(|success| halves.map(|half| count(half, success)));
        if successes.iter().chain(&failures).any(|count| *count > 31) {
            return Trip::May;
        }
        let (successes, failures) = (successes.iter().sum::<usize>(), failures.iter().sum::<usize>());
        if successes + failures >= 20 && failures >= successes { Trip::Must } else { Trip::MustNot }
    }

    fn learn(&mut self, attempt: Attempt, outcome: Outcome, now_ms: u64, tripped: bool) -> Result<(), String> {
        if let Outcome::PushBack { of_all, retry_after } = outcome {
            self.pushed_back += 1;
            if of_all || self.pushed_back > 1 {
                let rest = retry_after.map_or(250, |asked| (asked.as_millis() as u64).clamp(50, 10_000));
                self.busy_until_ms = self.busy_until_ms.max(now_ms + rest);
            }
        }
        if attempt.epoch != self.epoch {
            return Ok(());
        }
        let is_alive = matches!(outcome, Outcome::Success | Outcome::PushBack { .. });
        match (&mut self.is, outcome) {
            (Is::Closed, Outcome::Success | Outcome::Failure) => {
                self.last_half = self.last_half.max(now_ms / 5_000);
                let oldest = self.last_half.saturating_sub(1);
                if self.log.first().is_some_and(|(half, _)| *half < oldest) {
                    self.log.retain(|(half, _)| *half >= oldest);
                }
                self.log.push((self.last_half, outcome == Outcome::Success));
                self.in_a_row = if outcome == Outcome::Success { 0 } else { self.in_a_row + 1 };
                if outcome == Outcome::Failure {
                    let would = self.would_trip();
                    if (would == Trip::Must && !tripped) || (would == Trip::MustNot && tripped) {
                        return Err(format!("tripped: {tripped}, but it {would:?}"));
                    }
                    if tripped {
                        let halves = self.last_half - self.closed_in_half;
                        self.failed_trials = self.failed_trials.saturating_sub(halves);
                        self.open(now_ms);
                    }
                }
            }
            (Is::Closed, _) => {}
            (Is::Open { .. }, _) if is_alive => self.close(now_ms),
            (Is::Open { until_ms, trial_out }, Outcome::Failure) => {
                let is_due = !*trial_out && *until_ms <= now_ms;
                if attempt.kind == Kind::Trial || is_due {
                    self.failed_trials = (self.failed_trials + 1).min(6);
                    self.open(now_ms);
                }
            }
            (Is::Open { trial_out, until_ms }, _) => {
                if attempt.kind == Kind::Trial {
                    (*trial_out, *until_ms) = (false, now_ms);
                }
            }
        }
        Ok(())
    }
}

/// How often what must have been seen was seen.
#[derive(Debug, Default)]
struct Seen {
    by_run: u64,
    by_ratio: u64,
    halved: u64,
    longest_rest: u64,
    taken_back: u64,
    handed_back: u64,
    forced_closed: u64,
    forced_longer: u64,
    late: u64,
    late_trials: u64,
    lost_trials: u64,
    rested: u64,
    refused: u64,
    refused_half_open: u64,
    back_in_time: u64,
}

fn outcome(rng: &mut fastrand::Rng, failing: f64) -> Outcome {
    let retry_after = Duration::from_millis(rng.u64(..) >> rng.u32(47..64));
    match rng.u8(..) {
        0..24 => Outcome::Abandoned,
        24..28 => Outcome::PushBack { of_all: rng.bool(), retry_after: None },
        28..32 => Outcome::PushBack { of_all: rng.bool(), retry_after: Some(retry_after) },
        _ if rng.f64() < failing => Outcome::Failure,
        _ => Outcome::Success,
    }
}

fn play(rng: &mut fastrand::Rng, at: &dyn Fn(usize) -> String, seen: &mut Seen) {
    let mut bench = Bench::new();
    bench.now_ms = if rng.u8(..) == 0 { 600_000_000_000 } else { rng.u64(0..20_000) };
    let mut model = Model {
        is: Is::Closed,
        epoch: 0,
        failed_trials: 0,
        closed_in_half: 0,
        last_half: 0,
        in_a_row: 0,
        log: Vec::new(),
        busy_until_ms: 0,
        pushed_back: 0,
    };
    let mut out: Vec<Attempt> = Vec::new();
    // Each history has its own weather.
    let failing = [0.0, 0.3, 0.5, 0.6, 0.9, 1.0][rng.usize(0..6)];
    let pace_ms = [1, 20, 400, 2_000, 30_000][rng.usize(0..5)];
    let actors = [1, 3, 12][rng.usize(0..3)];
    let steps = if rng.u8(..) < 3 { 240 } else { rng.usize(6..15) };
    let mut latest_ms = bench.now_ms;
    let mut checked = bench.breaker.breaker();
    for step in 0..steps {
        // Mostly forth, sometimes far, sometimes a little back: a thread read the clock before the one before it.
        latest_ms += match rng.u8(..) {
            0..8 => rng.u64(0..200_000),
            8..128 => rng.u64(0..=pace_ms),
            _ => 0,
        };
        bench.now_ms = latest_ms - if rng.u8(..) < 16 { rng.u64(0..=3.min(latest_ms)) } else { 0 };
        seen.back_in_time += u64::from(bench.now_ms < latest_ms);
        let (now, now_ms) = (bench.now(), bench.now_ms);
        let action = rng.u8(..);
        if out.len() < actors && action < 140 {
            let pass = if action < 16 {
                let kind = model.admit(now_ms).unwrap_or(Kind::Forced);
                let pass = bench.breaker.force(now);
                assert_eq!(pass.is_trial(), kind == Kind::Trial, "{}: forced", at(step));
                Some((pass, kind))
            } else {
                let rest_ms = model.ready_in_ms(now_ms);
                let lost = model.state() == State::HalfOpen;
                let expect = model.admit(now_ms);
                seen.lost_trials += u64::from(lost && expect.is_some());
                match (bench.enter(), expect) {
                    (Ok(pass), Some(kind)) => {
                        assert_eq!(pass.is_trial(), kind == Kind::Trial, "{}", at(step));
                        Some((pass, kind))
                    }
                    (Err(Resting { for_at_least }), None) => {
                        assert_eq!(for_at_least.as_millis() as u64, rest_ms, "{}", at(step));
                        seen.refused += 1;
                        seen.refused_half_open += u64::from(model.state() == State::HalfOpen);
                        None
                    }
                    (got, expect) => panic!("{}: {got:?} instead of {expect:?}", at(step)),
                }
            };
            out.extend(pass.map(|(pass, kind)| Attempt { pass, kind, epoch: model.epoch }));
        } else if !out.is_empty() {
            let attempt = out.swap_remove(rng.usize(0..out.len()));
            let outcome = outcome(rng, failing);
            if outcome == SUCCESS {
                bench.breaker.has_served();
                (model.busy_until_ms, model.pushed_back) = (0, 0);
            }
            settle(&bench, &mut model, attempt, outcome, seen).unwrap_or_else(|e| panic!("{}: {e}", at(step)));
        }
        seen.rested += u64::from(bench.rest_ms() > 0);
        check(&bench, &model, &out, &mut checked).unwrap_or_else(|e| panic!("{}: {e}", at(step)));
    }
    // Everybody leaves; after the longest of all rests one success is enough.
    while let Some(attempt) = out.pop() {
        settle(&bench, &mut model, attempt, ABANDONED, seen).unwrap_or_else(|e| panic!("{}: {e}", at(steps)));
    }
    bench.now_ms = latest_ms + 60_000;
    assert_eq!(bench.ready_in_ms(), 0, "{}: it still rests", at(steps));
    bench.attempt(SUCCESS);
    assert_eq!((bench.state(), bench.ready_in_ms()), (State::Closed, 0), "{}", at(steps));
}

fn settle(bench: &Bench, model: &mut Model, attempt: Attempt, outcome: Outcome, seen: &mut Seen) -> Result<(), String> {
    let (before, is_late) = (bench.breaker.breaker(), attempt.epoch != model.epoch);
    let (was, level) = (model.state(), model.failed_trials);
    let run = model.in_a_row;
    let change = bench.learn(attempt.pass, outcome);
    let tripped = was == State::Closed && bench.state() == State::Open;
    model.learn(attempt, outcome, bench.now_ms, tripped)?;
    let expect = (was != model.state()).then(|| (was, model.state()));
    if change != expect {
        return Err(format!("{outcome:?} of {attempt:?} made {change:?} instead of {expect:?}"));
    }
    if is_late && bench.breaker.breaker() != before {
        return Err(format!("{outcome:?} of {attempt:?}, which is late, changed {before:?}"));
    }
    let (from_closed, forced) = (was == State::Closed, attempt.kind == Kind::Forced && !is_late);
    seen.by_run += u64::from(tripped && run == 4);
    seen.by_ratio += u64::from(tripped && run < 4);
    seen.taken_back += u64::from(tripped && level > model.failed_trials);
    seen.longest_rest += u64::from(model.failed_trials == 6 && was == State::HalfOpen && change.is_some());
    seen.handed_back += u64::from(outcome == ABANDONED && change.is_some());
    seen.forced_closed += u64::from(forced && !from_closed && model.state() == State::Closed);
    seen.forced_longer += u64::from(forced && was == State::Open && level < model.failed_trials);
    seen.late += u64::from(is_late);
    seen.late_trials += u64::from(is_late && attempt.kind == Kind::Trial);
    seen.halved += u64::from(model.log.len() > 31 && model.would_trip() == Trip::May);
    Ok(())
}

fn check(bench: &Bench, model: &Model, out: &[Attempt], checked: &mut Breaker) -> Result<(), String> {
    let (breaker, state) = (bench.breaker.breaker(), bench.state());
    let ready_in_ms = bench.breaker.ready_in(bench.now()).as_millis() as u64;
    if (state, ready_in_ms) != (model.state(), model.ready_in_ms(bench.now_ms)) {
        return Err(format!("{breaker:?} with {ready_in_ms} ms to go, but {model:?}"));
    }
    let rest_ms = model.busy_until_ms.saturating_sub(bench.now_ms);
    if bench.rest_ms() != u128::from(rest_ms) {
        return Err(format!("{} ms of rest instead of {rest_ms}", bench.rest_ms()));
    }
    let trials = out.iter().filter(|a| a.kind == Kind::Trial && a.epoch == model.epoch).count();
    if trials != usize::from(state == State::HalfOpen) {
        return Err(format!("{state} with {trials} trials out"));
    }
    if breaker == *checked {
        return Ok(());
    }
    *checked = breaker;
    let parts = breaker.parts();
    let bounded = match parts.phase {
        Phase::Closed(w) => {
            let counts = [w.now.successes, w.now.failures, w.before.successes, w.before.failures];
            w.run < 5 && counts.iter().all(|count| *count <= COUNT_MAX)
        }
        Phase::Open { until_ms, .. } => until_ms <= CLOCK_MAX_MS,
    };
    let is_open = matches!(parts.phase, Phase::Open { .. });
    if !bounded || parts.level > 6 || (parts.period % 2 == 1) != is_open || parts.pack() != breaker {
        return Err(format!("out of bounds: {parts:?}"));
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a failing history is played again by hand")]
fn number_in(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap())
}

#[test]
fn random_histories_keep_to_the_rules() {
    let seed = number_in("BREAKER_SEED").unwrap_or(1);
    let alone = number_in("BREAKER_CASE");
    let mut seen = Seen::default();
    for case in alone.map_or(0..CASES, |case| case..case + 1) {
        let at = |step: usize| format!("BREAKER_SEED={seed} BREAKER_CASE={case}, step {step}");
        let mut rng = fastrand::Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ case);
        play(&mut rng, &at, &mut seen);
    }
    println!("seed {seed}: {seen:?}");
    let Seen { by_run, by_ratio, halved, longest_rest, taken_back, handed_back, .. } = seen;
    let Seen { lost_trials, rested, .. } = seen;
    let Seen { forced_closed, forced_longer, late, late_trials, refused, refused_half_open, back_in_time, .. } = seen;
    for (what, count) in [
        ("trips by a run", by_run),
        ("trips by the ratio", by_ratio),
        ("counts that were halved", halved),
        ("rests of the longest kind", longest_rest),
        ("doublings taken back", taken_back),
        ("trials handed back", handed_back),
        ("closings by force", forced_closed),
        ("longer rests by force", forced_longer),
        ("late answers", late),
        ("late answers of trials", late_trials),
        ("trials lost", lost_trials),
        ("rests after push-backs", rested),
        ("refusals", refused),
        ("refusals while half-open", refused_half_open),
        ("clocks that were read before", back_in_time),
    ] {
        assert!(alone.is_some() || count >= 20, "only {count} {what} in seed {seed}");
    }
}
