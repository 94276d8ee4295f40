//! The circuit breaker of one backend incarnation: after failures it rests, then one attempt tries whether it is well.
//!
//! ```text
//!            5 failures in a row, or half of 20 in 10 s
//!   closed ────────────────────────────────────────────► open ◄────────────────┐
//!      ▲                                                   │ due: one trial    │ the trial failed (rests longer)
//!      │          the trial succeeded                      ▼                   │ or was abandoned (due at once)
//!      └─────────────────────────────────────────────── half-open ─────────────┘
//! ```
//!
//! Closed: attempts flow. Half-open means that exactly one trial is out. [`Breaker`] decides everything and is one word;
//! [`CircuitBreaker`] keeps it in an atomic and tells it the time.
//!
//! Every closed and every open period has a number, and an attempt carries the number of the period it began in: what it
//! has to say counts in that period only. So a late answer neither closes nor trips a breaker that it knows nothing about.
//!
//! A trial has a time limit, after which it counts as lost: its backend's machine may have vanished, or its answer may take
//! minutes. Then the next attempt is the trial, and the lost one has no say any more.
//!
//! A backend that pushes back is well, but busy. That is kept in a word of its own ([`push_back`]), because it bars no
//! attempt: others prefer another replica for a while, and enter where there is none.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

pub mod push_back;

use push_back::PushBacks;

/// So many failures in a row trip the breaker.
const RUN_MAX: u64 = 5;
/// So many attempts must have been seen before their ratio is looked at.
const ATTEMPTS_MIN: u64 = 20;
/// Half of the window in which attempts are counted. See [`Window`].
const HALF_MS: u64 = 5_000;
/// Largest count of the window; one more halves all of them.
const COUNT_MAX: u64 = 31;
/// How long the breaker stays open: the first time, and after each trial that failed.
const RESTS_MS: [u64; 7] = [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000];
/// A trial of which nothing has been heard for so long is lost.
const TRIAL_MS: u64 = 30_000;
/// Where the clock stops, 21 years after the backend was first seen. It never goes back.
const CLOCK_MAX_MS: u64 = (1 << HALF.wide) * HALF_MS - 1;

/// Whether attempts flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// They do.
    Closed,
    /// They do not, until the rest is over and one of them becomes the trial.
    Open,
    /// They do not, because the trial is out.
    HalfOpen,
}

/// What an attempt has shown of the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It serves. An answer that says that the client is at fault (4xx) is one of these.
    Success,
    /// It does not: no connection, a broken answer, a 5xx.
    Failure,
    /// It is well, but does not take this request now: 429, 503, 529.
    PushBack {
        /// It speaks of the backend (503, 529), and not perhaps of the client alone (429).
        of_all: bool,
        /// `Retry-After`, if there was one.
        retry_after: Option<Duration>,
    },
    /// Nothing: the client has left. A trial is handed back.
    Abandoned,
}

/// Permission of one attempt, to be handed to [`CircuitBreaker::learn`] exactly once, whatever becomes of the attempt: a
/// trial that is never heard of again would keep everybody else out. It must therefore live in something whose `Drop`
/// learns [`Outcome::Abandoned`]. A trial should be settled as soon as it is known how it went, at the head of its answer,
/// because the backend is half-open until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "what becomes of the attempt must be learnt"]
pub struct Pass {
    /// Period that it belongs to.
    period: u64,
    trial: bool,
}

/// The backend is not to be asked now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resting {
    /// Not before this has passed. While a trial is out that is not known: then it is a second at most.
    pub for_at_least: Duration,
}

/// A change of state, for the log and the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// What it was.
    pub from: State,
    /// What it is.
    pub to: State,
}

/// All that a breaker knows but for push-backs, as one word; every method is a pure function of it. Times are
/// milliseconds since the backend was first seen.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Breaker(u64);

/// The breaker of one backend. It starts closed. Needs no lock, and does not write as long as it lets attempts in.
#[derive(Debug)]
pub struct CircuitBreaker {
    word: AtomicU64,
    push_backs: PushBacks,
    born: Instant,
}

/// Some bits of the word.
#[derive(Clone, Copy)]
struct Bits {
    at: u32,
    wide: u32,
}

// Every word begins with these. The last bit of the period says whether it is an open one. Numbers of periods come again
// after 1024 openings; as each lasts a second or more, unless it is ended by an attempt that was forced, an attempt that
// lives long enough to be mistaken is rare, and does no more than an attempt of the present may do.
const PERIOD: Bits = Bits { at: 0, wide: 11 };
const LEVEL: Bits = Bits { at: 11, wide: 3 };
// Closed.
const RUN: Bits = Bits { at: 14, wide: 3 };
const HALF: Bits = Bits { at: 17, wide: 27 };
const COUNTS: [Bits; 4] =
    [Bits { at: 44, wide: 5 }, Bits { at: 49, wide: 5 }, Bits { at: 54, wide: 5 }, Bits { at: 59, wide: 5 }];
// Open and half-open.
const TRIAL: Bits = Bits { at: 14, wide: 1 };
const UNTIL: Bits = Bits { at: 15, wide: 40 };

/// What the word says.
#[derive(Debug, Clone, Copy)]
struct Parts {
    period: u64,
    /// Which of [`RESTS_MS`] the present or the next opening lasts.
    level: u64,
    phase: Phase,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Closed(Window),
    /// Open, and half-open if the trial is out.
    Open {
        /// When the next attempt is due to be the trial: the end of the rest, or the time at which the trial that is out
        /// counts as lost.
        until_ms: u64,
        trial_out: bool,
    },
}

/// The last attempts of a closed period: how many of the last failed in a row, and the counts of the last ten seconds,
/// kept as those of the current five seconds and of the five before.
///
/// So the window is five to ten seconds long: what is older than ten never counts, what is younger than five always does,
/// and of failures that come evenly it may take up to twice as many as in an exact window. If a count has no room left,
/// all are halved: the ratio stays, and of more than some fifty attempts the younger ones weigh more.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    run: u64,
    /// Number of the current five seconds.
    half: u64,
    now: Counts,
    before: Counts,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    successes: u64,
    failures: u64,
}

// === impl Bits ===

impl Bits {
    const fn max(self) -> u64 {
        (1 << self.wide) - 1
    }

    const fn get(self, word: u64) -> u64 {
        (word >> self.at) & self.max()
    }

    /// `value` at its place in an empty word.
    fn put(self, value: u64) -> u64 {
        debug_assert!(value <= self.max(), "{value} must fit into {} bits", self.wide);
        (value & self.max()) << self.at
    }
}

// === impl Window ===

impl Window {
    fn new(now_ms: u64) -> Window {
        Window { half: now_ms / HALF_MS, ..Window::default() }
    }

    /// This window as of now, and how many halves have passed since it was last looked at.
    fn at(self, now_ms: u64) -> (Window, u64) {
        // Threads read the clock before they get here: now may be a little in the past.
        let half = self.half.max(now_ms / HALF_MS);
        let passed = half - self.half;
        let window = match passed {
            0 => self,
            1 => Window { half, now: Counts::default(), before: self.now, ..self },
            _ => Window { half, now: Counts::default(), before: Counts::default(), ..self },
        };
        (window, passed)
    }

    fn add(mut self, success: bool) -> Window {
        if self.now.successes.max(self.now.failures) == COUNT_MAX {
            for counts in [&mut self.now, &mut self.before] {
                counts.successes /= 2;
                counts.failures /= 2;
            }
        }
        if success {
            self.now.successes += 1;
            self.run = 0;
        } else {
            self.now.failures += 1;
            self.run += 1;
        }
        self
    }

    /// Whether a failure that has just been added is one too many.
    fn is_bad(self) -> bool {
        let failures = self.now.failures + self.before.failures;
        let successes = self.now.successes + self.before.successes;
        self.run >= RUN_MAX || (failures + successes >= ATTEMPTS_MIN && failures >= successes)
    }
}

// === impl Breaker ===

impl Breaker {
    /// Closed, with nothing known.
    pub fn new() -> Breaker {
        Breaker::default()
    }

    fn parts(self) -> Parts {
        let Breaker(word) = self;
        let period = PERIOD.get(word);
        let phase = if period % 2 == 1 {
            Phase::Open { until_ms: UNTIL.get(word), trial_out: TRIAL.get(word) == 1 }
        } else {
            let [ns, nf, bs, bf] = COUNTS.map(|count| count.get(word));
            Phase::Closed(Window {
                run: RUN.get(word),
                half: HALF.get(word),
                now: Counts { successes: ns, failures: nf },
                before: Counts { successes: bs, failures: bf },
            })
        };
        Parts { period, level: LEVEL.get(word), phase }
    }

    /// What the breaker is in.
    pub fn state(self) -> State {
        match self.parts().phase {
            Phase::Closed(_) => State::Closed,
            Phase::Open { trial_out: false, .. } => State::Open,
            Phase::Open { trial_out: true, .. } => State::HalfOpen,
        }
    }

    /// Lets an attempt in: if closed, or as the trial if open and due.
    ///
    /// # Errors
    /// The backend rests.
    pub fn enter(self, now_ms: u64) -> Result<(Breaker, Pass), Resting> {
        let parts = self.parts();
        match parts.phase {
            Phase::Closed(_) => Ok((self, Pass { period: parts.period, trial: false })),
            Phase::Open { until_ms, trial_out } if now_ms >= until_ms => {
                // Behind the end of the clock a trial is never lost, because the time does not come.
                let phase = Phase::Open { until_ms: now_ms + TRIAL_MS, trial_out: true };
                // A trial that was lost belongs to a period that is over.
                let next = if trial_out { parts.begin(2, parts.level, phase) } else { Parts { phase, ..parts }.pack() };
                Ok((next, Pass { period: next.parts().period, trial: true }))
            }
            Phase::Open { .. } => Err(Resting { for_at_least: self.ready_in(now_ms) }),
        }
    }

    /// Lets an attempt in, whatever the state: because everybody else rests too. If it may be the trial, it is.
    pub fn force(self, now_ms: u64) -> (Breaker, Pass) {
        let forced = Pass { period: self.parts().period, trial: false };
        self.enter(now_ms).unwrap_or((self, forced))
    }

    /// Takes in what became of an attempt.
    ///
    /// An attempt that was forced upon an open breaker closes it if it finds the backend alive. If it fails, that counts
    /// as the failure of a trial once the rest is over and no trial is out, and says nothing new before.
    pub fn learn(self, pass: Pass, outcome: Outcome, now_ms: u64) -> Breaker {
        let parts = self.parts();
        if pass.period != parts.period {
            return self;
        }
        match (parts.phase, outcome) {
            (Phase::Closed(window), Outcome::Success) => parts.closed(window, true, now_ms),
            (Phase::Closed(window), Outcome::Failure) => parts.closed(window, false, now_ms),
            (Phase::Open { .. }, Outcome::Success | Outcome::PushBack { .. }) => parts.close(now_ms),
            (Phase::Open { trial_out: true, .. }, Outcome::Failure) if pass.trial => parts.open_longer(now_ms),
            (Phase::Open { until_ms, trial_out: false }, Outcome::Failure) if now_ms >= until_ms => {
                parts.open_longer(now_ms)
            }
            (Phase::Open { trial_out: true, .. }, Outcome::Abandoned) if pass.trial => {
                Parts { phase: Phase::Open { until_ms: now_ms, trial_out: false }, ..parts }.pack()
            }
            (Phase::Open { .. } | Phase::Closed(_), _) => self,
        }
    }

    /// How long until [`enter`](Self::enter) may say yes: nothing if it does now, and at most a second while a trial is out.
    pub fn ready_in(self, now_ms: u64) -> Duration {
        match self.parts().phase {
            Phase::Closed(_) => Duration::ZERO,
            Phase::Open { until_ms, trial_out } => {
                let left_ms = until_ms.saturating_sub(now_ms);
                Duration::from_millis(if trial_out { left_ms.min(RESTS_MS[0]) } else { left_ms })
            }
        }
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().fmt(f)
    }
}

// === impl Parts ===

impl Parts {
    fn pack(self) -> Breaker {
        let phase = match self.phase {
            Phase::Closed(Window { run, half, now, before }) => {
                let [ns, nf, bs, bf] = COUNTS;
                RUN.put(run)
                    | HALF.put(half)
                    | ns.put(now.successes)
                    | nf.put(now.failures)
                    | bs.put(before.successes)
                    | bf.put(before.failures)
            }
            Phase::Open { until_ms, trial_out } => TRIAL.put(trial_out.into()) | UNTIL.put(until_ms),
        };
        Breaker(PERIOD.put(self.period) | LEVEL.put(self.level) | phase)
    }

    /// One more attempt of a closed period.
    fn closed(self, window: Window, success: bool, now_ms: u64) -> Breaker {
        let (window, passed) = window.at(now_ms);
        // What failed trials have added is taken back by one doubling in five seconds: at a backend that trips again as
        // soon as it gets its share of the traffic, it need not be measured anew.
        let level = self.level.saturating_sub(passed);
        let window = window.add(success);
        if success || !window.is_bad() {
            Parts { level, phase: Phase::Closed(window), ..self }.pack()
        } else {
            self.begin(1, level, Phase::open(level, now_ms))
        }
    }

    fn close(self, now_ms: u64) -> Breaker {
        self.begin(1, self.level, Phase::Closed(Window::new(now_ms)))
    }

    fn open_longer(self, now_ms: u64) -> Breaker {
        let level = (self.level + 1).min(RESTS_MS.len() as u64 - 1);
        self.begin(2, level, Phase::open(level, now_ms))
    }

    /// The period after the next `periods - 1`: those who belong to this one have no say in it.
    fn begin(self, periods: u64, level: u64, phase: Phase) -> Breaker {
        let period = (self.period + periods) & PERIOD.max();
        debug_assert_eq!(period % 2 == 1, matches!(phase, Phase::Open { .. }), "open periods have odd numbers");
        Parts { period, level, phase }.pack()
    }
}

impl Phase {
    fn open(level: u64, now_ms: u64) -> Phase {
        let until_ms = (now_ms + RESTS_MS[level as usize]).min(CLOCK_MAX_MS);
        Phase::Open { until_ms, trial_out: false }
    }
}

// === impl CircuitBreaker ===

impl CircuitBreaker {
    /// The breaker of a backend that is new.
    pub fn new(now: Instant) -> CircuitBreaker {
        CircuitBreaker { word: AtomicU64::new(Breaker::new().0), push_backs: PushBacks::default(), born: now }
    }

    /// Lets an attempt in: if closed, or as the one trial if open and due.
    ///
    /// # Errors
    /// The backend rests.
    pub fn enter(&self, now: Instant) -> Result<Pass, Resting> {
        let now_ms = self.clock_ms(now);
        let (.., pass) = self.step(|breaker| match breaker.enter(now_ms) {
            Ok((next, pass)) => (next, Ok(pass)),
            Err(resting) => (breaker, Err(resting)),
        });
        pass
    }

    /// Lets an attempt in, whatever the state: for when all members of a pool rest and this one is the least bad. What
    /// becomes of it counts; see [`Breaker::learn`].
    pub fn force(&self, now: Instant) -> Pass {
        let now_ms = self.clock_ms(now);
        let (.., pass) = self.step(|breaker| breaker.force(now_ms));
        pass
    }

    /// Takes in what became of an attempt, and tells whether the state has changed by it. The change from open to
    /// half-open happens in [`enter`](Self::enter) and [`force`](Self::force): there the pass is a
    /// [trial](Pass::is_trial).
    pub fn learn(&self, pass: Pass, outcome: Outcome, now: Instant) -> Option<Transition> {
        let now_ms = self.clock_ms(now);
        if let Outcome::PushBack { of_all, retry_after } = outcome {
            // Before the breaker closes, so that an attempt that finds it closed finds the rest too.
            self.push_backs.add(of_all, retry_after, now_ms);
        }
        let (before, after, ()) = self.step(|breaker| (breaker.learn(pass, outcome, now_ms), ()));
        let (from, to) = (before.state(), after.state());
        (from != to).then_some(Transition { from, to })
    }

    /// The backend has served a request: what it has pushed back before says nothing about now. One atomic load as a rule.
    pub fn has_served(&self) {
        self.push_backs.end();
    }

    /// Whether requests had better go to another replica, because [`enter`](Self::enter) would refuse now or the backend
    /// pushes back. Changes nothing.
    pub fn is_resting(&self, now: Instant) -> bool {
        let now_ms = self.clock_ms(now);
        self.breaker().ready_in(now_ms) != Duration::ZERO || self.push_backs.rest(now_ms) != Duration::ZERO
    }

    /// What the breaker is in. A backend that has pushed back may rest although it is closed.
    pub fn state(&self) -> State {
        self.breaker().state()
    }

    /// How long until [`enter`](Self::enter) may say yes: nothing if it does now, and at most a second while a trial is out.
    pub fn ready_in(&self, now: Instant) -> Duration {
        self.breaker().ready_in(self.clock_ms(now))
    }

    fn breaker(&self) -> Breaker {
        Breaker(self.word.load(Ordering::Acquire))
    }

    /// Milliseconds since it was born, which never go back and stop at the end of the clock.
    fn clock_ms(&self, now: Instant) -> u64 {
        let ms = now.saturating_duration_since(self.born).as_millis();
        u64::try_from(ms).unwrap_or(CLOCK_MAX_MS).min(CLOCK_MAX_MS)
    }

    /// Replaces the breaker by what `next` makes of it, and gives both. Writes nothing if nothing changes.
    fn step<T>(&self, next: impl Fn(Breaker) -> (Breaker, T)) -> (Breaker, Breaker, T) {
        let mut before = self.breaker();
        loop {
            let (after, said) = next(before);
            if after == before {
                return (before, after, said);
            }
            match self.word.compare_exchange_weak(before.0, after.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return (before, after, said),
                Err(changed) => before = Breaker(changed),
            }
        }
    }
}

// === impl Pass, State ===

impl Pass {
    /// Whether the attempt is a trial: by it the breaker became half-open.
    pub fn is_trial(self) -> bool {
        self.trial
    }
}

impl State {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::Open => "open",
            State::HalfOpen => "half-open",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests;
