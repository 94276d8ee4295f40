//! What is told of one backend to people: attempts served and failed, the last failure, tokens per second and the time to
//! the first token of late, and when its breaker opened and closed.
//!
//! Requests write it with a few atomic operations and no lock; the status reads it. Rates need no task:
//! they are kept by the second in small rings, of which only what is recent counts.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Slots of a [`Recent`]: more than the longest window, so that the slot of this second is never one that is read.
const SLOTS: usize = 64;
/// Over how many whole seconds tokens per second are told: short enough to be live, long enough to be calm.
const TOKENS_WINDOW_S: u64 = 10;
/// Over how many whole seconds the time to the first token is told.
const FIRST_TOKEN_WINDOW_S: u64 = 60;
/// Turns of a breaker that are kept until somebody asks. A breaker that flaps makes two a second at most.
const TURNS_MAX: usize = 16;
/// A second has this many milliseconds.
const SECOND_MS: u64 = 1000;

/// What became of an attempt that was given to a backend and has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was answered.
    Served,
    /// It failed, by the backend's fault.
    Failed,
    /// It was turned away (429, 503): busy.
    TurnedAway,
    /// Its client left, or it was never sent.
    Abandoned,
}

/// How an attempt failed: as much as can be said without naming anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing listens at its address.
    Refused,
    /// No connection in time.
    ConnectTimedOut,
    /// No way there.
    Unreachable,
    /// Its connection ended before an answer.
    Ended,
    /// It sent what is no answer, for this reason.
    Nonsense(&'static str),
    /// A time limit that the user set ran out.
    TimedOut,
    /// Its answer broke off.
    BrokeOff,
    /// The framing of its answer broke, for this reason.
    BadFraming(&'static str),
    /// It answered with this status.
    Status(u16),
}

/// A turn of the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// When.
    pub at: Instant,
    /// It opened; else it closed.
    pub opened: bool,
}

/// What one backend has done so far.
#[derive(Debug)]
pub struct Tally {
    born: Instant,
    served: AtomicU64,
    failed: AtomicU64,
    turned_away: AtomicU64,
    /// Milliseconds since `born` and the kind of trouble in one word; 0 while there was none.
    trouble: AtomicU64,
    /// Of the last trouble that has one. Locked by those that are sent nonsense, and to be read.
    reason: Mutex<&'static str>,
    tokens: Recent,
    first_token_ms: Recent,
    first_tokens: Recent,
    /// Rare: a breaker rests for a second at least.
    turns: Mutex<VecDeque<Turn>>,
}

/// Sums by the second, as far back as the ring goes. Each slot holds the second it is of (upper half) and its sum.
#[derive(Debug)]
struct Recent([AtomicU64; SLOTS]);

// === impl Trouble ===

impl Trouble {
    const KIND_BITS: u32 = 16;

    fn code(self) -> u64 {
        match self {
            Trouble::Refused => 1,
            Trouble::ConnectTimedOut => 2,
            Trouble::Unreachable => 3,
            Trouble::Ended => 4,
            Trouble::Nonsense(_) => 5,
            Trouble::TimedOut => 6,
            Trouble::BrokeOff => 7,
            Trouble::BadFraming(_) => 8,
            // No status is below 100.
            Trouble::Status(status) => u64::from(status),
        }
    }

    fn reason(self) -> Option<&'static str> {
        match self {
            Trouble::Nonsense(why) | Trouble::BadFraming(why) => Some(why),
            _ => None,
        }
    }

    fn of(code: u64, reason: impl FnOnce() -> &'static str) -> Option<Trouble> {
        Some(match code {
            0 => return None,
            1 => Trouble::Refused,
            2 => Trouble::ConnectTimedOut,
            3 => Trouble::Unreachable,
            4 => Trouble::Ended,
            5 => Trouble::Nonsense(reason()),
            6 => Trouble::TimedOut,
            7 => Trouble::BrokeOff,
            8 => Trouble::BadFraming(reason()),
            status => Trouble::Status(u16::try_from(status).unwrap_or(u16::MAX)),
        })
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trouble::Refused => "it refused the connection",
            Trouble::ConnectTimedOut => "it did not accept the connection in time (PROXY_CONNECT_TIMEOUT)",
            Trouble::Unreachable => "it could not be reached",
            Trouble::Ended => "it closed the connection before it answered",
            Trouble::Nonsense(why) => return write!(f, "it sent something that is no HTTP answer: {why}"),
            Trouble::TimedOut => "it did not answer in time (PROXY_FIRST_BYTE_TIMEOUT, PROXY_IDLE_TIMEOUT)",
            Trouble::BrokeOff => "its answer broke off",
            Trouble::BadFraming(why) => return write!(f, "its answer broke off: {why}"),
            Trouble::Status(status) => return write!(f, "it answered {status}"),
        })
    }
}

// === impl Tally ===

impl Tally {
    /// The tally of a backend that has just become known.
    pub fn new(now: Instant) -> Tally {
        Tally {
            born: now,
            served: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            trouble: AtomicU64::new(0),
            reason: Mutex::default(),
            tokens: Recent::default(),
            first_token_ms: Recent::default(),
            first_tokens: Recent::default(),
            turns: Mutex::default(),
        }
    }

    /// An attempt has ended.
    pub fn ended(&self, how: Ended) {
        let counter = match how {
            Ended::Served => &self.served,
            Ended::Failed => &self.failed,
            Ended::TurnedAway => &self.turned_away,
            Ended::Abandoned => return,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// An attempt has failed in this way.
    pub fn troubled(&self, trouble: Trouble, now: Instant) {
        if let Some(reason) = trouble.reason() {
            *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason;
        }
        let word = self.ms(now) << Trouble::KIND_BITS | trouble.code();
        self.trouble.store(word, Relaxed);
    }

    /// The first token of an answer has come, so long after the request was sent.
    pub fn first_token(&self, after: Duration, now: Instant) {
        let second = self.ms(now) / SECOND_MS;
        self.first_token_ms.add(second, u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        self.first_tokens.add(second, 1);
    }

    /// These many tokens have been generated between `since` and `now`.
    pub fn tokens(&self, count: u64, since: Instant, now: Instant) {
        let last = self.ms(now) / SECOND_MS;
        let first = (self.ms(since) / SECOND_MS).min(last);
        let seconds = last - first + 1;
        // What lies before the window is not looked at any more.
        for second in first.max(last.saturating_sub(TOKENS_WINDOW_S))..=last {
            // The share of each second, so that the shares of all add up.
            let until =
                |n: u64| u64::try_from(u128::from(count) * u128::from(n) / u128::from(seconds)).unwrap_or(count);
            self.tokens.add(second, until(second - first + 1) - until(second - first));
        }
    }

    /// The breaker has opened or closed.
    pub fn turned(&self, opened: bool, now: Instant) {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.len() == TURNS_MAX {
            turns.pop_front();
        }
        turns.push_back(Turn { at: now, opened });
    }

    /// Turns of the breaker since the last call, at most the latest few.
    pub fn take_turns(&self) -> VecDeque<Turn> {
        std::mem::take(&mut *self.turns.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Attempts that were answered.
    pub fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    /// Attempts that failed by the backend's fault.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Attempts that it turned away because it is busy.
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Relaxed)
    }

    /// How an attempt failed last, and how long ago.
    pub fn last_trouble(&self, now: Instant) -> Option<(Trouble, Duration)> {
        let word = self.trouble.load(Relaxed);
        let reason = || *self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let trouble = Trouble::of(word & ((1 << Trouble::KIND_BITS) - 1), reason)?;
        let ago = self.ms(now).saturating_sub(word >> Trouble::KIND_BITS);
        Some((trouble, Duration::from_millis(ago)))
    }

    /// Tokens generated per second, over the last few.
    pub fn tokens_per_second(&self, now: Instant) -> f64 {
        let window = self.window(TOKENS_WINDOW_S, now);
        let seconds = u32::try_from(window.end - window.start).unwrap_or(u32::MAX).max(1);
        let tokens = self.tokens.sum(window) as f64;
        tokens / f64::from(seconds)
    }

    /// Mean time from sending a request to the first token of its answer, over the last minute.
    pub fn mean_first_token(&self, now: Instant) -> Option<Duration> {
        let last = self.ms(now) / SECOND_MS;
        let window = last.saturating_sub(FIRST_TOKEN_WINDOW_S - 1)..last + 1;
        let count = self.first_tokens.sum(window.clone());
        let mean = self.first_token_ms.sum(window).checked_div(count)?;
        Some(Duration::from_millis(mean))
    }

    /// The last whole seconds, as many as there are.
    fn window(&self, seconds: u64, now: Instant) -> std::ops::Range<u64> {
        let end = self.ms(now) / SECOND_MS;
        end.saturating_sub(seconds)..end
    }

    fn ms(&self, now: Instant) -> u64 {
        // 48 bits, beside the kind of trouble: ten thousand years.
        u64::try_from(now.saturating_duration_since(self.born).as_millis()).unwrap_or(u64::MAX) & ((1 << 48) - 1)
    }
}

// === impl Recent ===

impl Default for Recent {
    fn default() -> Recent {
        Recent(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Recent {
    const SUM_BITS: u32 = 32;
    const SUM_MAX: u64 = (1 << Recent::SUM_BITS) - 1;

    fn slot(&self, second: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(second % SLOTS as u64).ok()?)
    }

    /// As a slot has it: no slot is of second 0 by accident of being empty.
    fn mark(second: u64) -> u64 {
        (second + 1) & Recent::SUM_MAX
    }

    fn add(&self, second: u64, n: u64) {
        let Some(slot) = self.slot(second) else { return };
        let mark = Recent::mark(second);
        let _ = slot.fetch_update(Relaxed, Relaxed, |word| {
            let is_later = word >> Recent::SUM_BITS > mark;
            let sum = if word >> Recent::SUM_BITS == mark { word & Recent::SUM_MAX } else { 0 };
            (!is_later).then_some(mark << Recent::SUM_BITS | sum.saturating_add(n).min(Recent::SUM_MAX))
        });
    }

    fn sum(&self, seconds: std::ops::Range<u64>) -> u64 {
        let of = |second: u64| {
            let word = self.slot(second)?.load(Relaxed);
            (word >> Recent::SUM_BITS == Recent::mark(second)).then_some(word & Recent::SUM_MAX)
        };
        seconds.filter_map(of).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(born: Instant, seconds: f64) -> Instant {
        born + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn tokens_count_by_the_second_and_are_forgotten() {
        let born = Instant::now();
        let tally = Tally::new(born);
        assert_eq!(tally.tokens_per_second(born), 0.0);
        tally.tokens(30, at(born, 2.2), at(born, 2.9));
        assert_eq!(tally.tokens_per_second(at(born, 2.95)), 0.0, "a second that is not over is not told");
        assert_eq!(tally.tokens_per_second(at(born, 3.0)), 10.0, "over as many seconds as there are");
        assert_eq!(tally.tokens_per_second(at(born, 12.0)), 3.0);
        assert_eq!(tally.tokens_per_second(at(born, 13.0)), 0.0);
        // Rounds of the ring later, slots hold nothing of what was.
        tally.tokens(10, at(born, 200.0), at(born, 200.1));
        assert_eq!(tally.tokens_per_second(at(born, 201.0)), 1.0);
    }

    #[test]
    fn tokens_of_a_long_answer_are_spread_over_the_time_it_took() {
        for (count, took, least, most) in [(1000, 99.0, 10.0, 10.0), (1001, 9.0, 90.0, 91.0), (7, 0.0, 0.0, 0.0)] {
            let born = Instant::now();
            let tally = Tally::new(born);
            tally.tokens(count, at(born, 200.0 - took), at(born, 200.0));
            let rate = tally.tokens_per_second(at(born, 200.5));
            assert!((least..=most).contains(&rate), "{count} in {took} s: {rate}");
        }
        let born = Instant::now();
        let tally = Tally::new(born);
        tally.tokens(1001, born, at(born, 9.0));
        assert_eq!(tally.tokens_per_second(at(born, 10.0)), 100.1, "none is lost");
    }

    #[test]
    fn the_first_token_is_told_of_the_last_minute() {
        let born = Instant::now();
        let tally = Tally::new(born);
        assert_eq!(tally.mean_first_token(born), None);
        tally.first_token(Duration::from_millis(100), at(born, 1.0));
        tally.first_token(Duration::from_millis(300), at(born, 5.0));
        assert_eq!(tally.mean_first_token(at(born, 5.0)), Some(Duration::from_millis(200)));
        assert_eq!(tally.mean_first_token(at(born, 62.0)), Some(Duration::from_millis(300)));
        assert_eq!(tally.mean_first_token(at(born, 66.0)), None);
    }

    #[test]
    fn the_last_trouble_is_told_with_its_age() {
        let born = Instant::now();
        let tally = Tally::new(born);
        assert_eq!(tally.last_trouble(born), None);
        for trouble in [
            Trouble::Refused,
            Trouble::ConnectTimedOut,
            Trouble::Unreachable,
            Trouble::Ended,
            Trouble::Nonsense("why"),
            Trouble::TimedOut,
            Trouble::BrokeOff,
            Trouble::BadFraming("why not"),
            Trouble::Status(500),
            Trouble::Status(999),
        ] {
            tally.troubled(trouble, at(born, 5.0));
            assert_eq!(tally.last_trouble(at(born, 7.0)), Some((trouble, Duration::from_secs(2))));
        }
    }

    #[test]
    fn attempts_are_counted_by_their_end_and_turns_are_bounded() {
        let born = Instant::now();
        let tally = Tally::new(born);
        for how in [Ended::Served, Ended::Served, Ended::Failed, Ended::TurnedAway, Ended::Abandoned] {
            tally.ended(how);
        }
        assert_eq!((tally.served(), tally.failed(), tally.turned_away()), (2, 1, 1));
        for n in 0..100 {
            tally.turned(n % 2 == 0, at(born, f64::from(n)));
        }
        let turns = tally.take_turns();
        assert_eq!((turns.len(), turns.back().unwrap().at), (TURNS_MAX, at(born, 99.0)));
        assert!(tally.take_turns().is_empty());
    }
}
