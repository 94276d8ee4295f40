//! How long a backend takes to the first byte of an answer, and how much it has been asked that it has not begun to
//! answer. Pure: what was seen and when come in; two atomic words hold it.
//!
//! The time to the first byte of an LLM's answer says more about the prompt and about what was there before it than about
//! the replica: a prompt of 200 KB takes a thousand times as long as one of 100 bytes, and both wait for the prompts
//! before them. So a sample here is not a time but a pace: the time divided by the geometric mean of the work that the
//! request was itself and all that was there with it ([`work`]). Dividing by the first alone would be right if requests did
//! not wait for each other, by the second alone if engines did one after the other; they do something in between, and an
//! error in either direction makes a replica look slow for being busy, or for being idle. `docs/balancing.md` has the
//! simulation that decided this.
//!
//! Sources: Finagle's `P2CPeakEwma`, tower's `load::PeakEwma`, and linkerd's `ewma`, from which the reading that does not
//! write comes. What differs from all of them: a pace and not a round trip; occupancy is counted elsewhere and ends with
//! the body; a higher sample moves the average by at least a third of the way and does not replace it, because replicas
//! with one very long prompt behind them are not slow ones; what is old is not taken to be fast, the balancer is told how old
//! it is; and value and time are one word, so that no lock is needed and no reader sees half of an update.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// How much prompt counts as much as being one more request.
pub const UNIT_BYTES: u64 = 4_000;

/// Paces below this are alike, in seconds per unit of work: the jitter of networks and schedulers, not of engines.
pub const PACE_FLOOR_S: f64 = 0.010;

/// No request counts for more prompt than this: what is longer is mostly pictures and sound, whose bytes cost less.
const PROMPT_BYTES_MAX: u64 = 512 << 10;

/// How long samples matter, if not many more come.
const MEMORY: Duration = Duration::from_secs(30);

/// Least weight of a sample, so that memory is not longer than some dozen samples either.
const WEIGHT_MIN: f64 = 1.0 / 16.0;

/// Least weight of a sample above the average.
const WEIGHT_MIN_UP: f64 = 0.3;

/// A failed attempt makes the estimate this much worse.
const PENALTY: f64 = 3.0;

/// What a backend is taken for if it fails before it has ever answered, in seconds per unit of work.
const PENALTY_UNMEASURED_S: f64 = 1.0;

/// Failures do not make an estimate worse than this.
const PENALTY_MAX_S: f64 = 60.0;

/// A peak-sensitive, exponentially weighted moving average in one atomic word: 24 bits of value, 40 bits of milliseconds
/// since it was made, which is 34 years.
#[derive(Debug)]
pub struct PeakEwma {
    word: AtomicU64,
    born: Instant,
}

/// What a [`PeakEwma`] says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// The average, in seconds.
    pub seconds: f64,
    /// Since the last sample.
    pub age: Duration,
}

/// The pace of a backend and the prompts it has not begun to answer.
#[derive(Debug)]
pub struct Pace {
    ewma: PeakEwma,
    waiting_bytes: AtomicU64,
}

/// A request whose first byte has not come. Its prompt counts as waiting until it is settled; dropping it settles it and
/// nothing is learnt.
#[derive(Debug)]
#[must_use = "dropping it means that nobody waits for the first byte any more"]
pub struct Awaited {
    pace: Arc<Pace>,
    prompt_bytes: u64,
    scale: f64,
    since: Instant,
}

/// Work, in requests: so many of them, and so much of prompts that they bring. Not less than 1.
pub fn work(requests: u64, prompt_bytes: u64) -> f64 {
    let (requests, units) = (requests.max(1) as f64, prompt_bytes as f64 * (1.0 / UNIT_BYTES as f64));
    requests + units
}

// === impl PeakEwma ===

/// Values are kept between 2^-20 s (a microsecond) and 2^12 s (an hour): 5 bits of a float's exponent say which octave, 19
/// of its mantissa are kept, and the whole is one more than that, so that 0 means that there is none.
const VALUE_MIN_S: f32 = 1.0 / (1 << 20) as f32;
const VALUE_MAX_S: f32 = (1 << 12) as f32;
const VALUE_SHIFT: u32 = 4;
const VALUE_BITS: u32 = 24;
const STAMP_MAX: u64 = (1 << (64 - VALUE_BITS)) - 1;

impl PeakEwma {
    /// One that has seen nothing. Times before `born` count as `born`.
    pub const fn new(born: Instant) -> PeakEwma {
        PeakEwma { word: AtomicU64::new(0), born }
    }

    /// Takes a sample in.
    pub fn observe(&self, sample: Duration, now: Instant) {
        self.update(now, |old| Some(averaged(old, sample.as_secs_f64())));
    }

    /// Takes in that a sample would have been longer than this, had it been waited for.
    pub fn observe_at_least(&self, sample: Duration, now: Instant) {
        let sample = sample.as_secs_f64();
        self.update(now, |old| match old {
            Some((seconds, _)) if sample > seconds => Some(averaged(old, sample)),
            _ => None,
        });
    }

    /// Takes in that an attempt failed, which says nothing about how long an answer takes, and that the next one had
    /// better go elsewhere.
    pub fn penalise(&self, now: Instant) {
        self.update(now, |old| {
            let worse = match old {
                Some((seconds, _)) => (seconds.max(PACE_FLOOR_S) * PENALTY).min(seconds.max(PENALTY_MAX_S)),
                None => PENALTY_UNMEASURED_S,
            };
            Some(worse)
        });
    }

    /// Forgets all that it has seen.
    pub fn forget(&self) {
        self.word.store(0, Ordering::Relaxed);
    }

    /// What it says now; `None` if it has seen nothing.
    pub fn read(&self, now: Instant) -> Option<Reading> {
        let (seconds, stamp) = unpack(self.word.load(Ordering::Relaxed))?;
        Some(Reading { seconds, age: Duration::from_millis(self.stamp(now).saturating_sub(stamp)) })
    }

    /// The average alone, in seconds, for who has many to look at.
    #[inline]
    pub fn seconds(&self) -> Option<f64> {
        unpack(self.word.load(Ordering::Relaxed)).map(|(seconds, _)| seconds)
    }

    /// Since it was made.
    #[inline]
    pub fn lifetime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.born)
    }

    fn stamp(&self, now: Instant) -> u64 {
        u64::try_from(self.lifetime(now).as_millis()).map_or(STAMP_MAX, |ms| ms.min(STAMP_MAX))
    }

    /// `next` gets the value and how many seconds old it is, and gives the new value, or none to leave all as it is.
    fn update(&self, now: Instant, next: impl Fn(Option<(f64, f64)>) -> Option<f64>) {
        let now = self.stamp(now);
        // A closure that says no is an outcome like another.
        let _ = self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let old = unpack(word);
            let seconds = next(old.map(|(value, stamp)| (value, seconds(now.saturating_sub(stamp)))))?;
            // Threads see time in their own order; the word does not go back.
            Some(pack(seconds, old.map_or(now, |(_, stamp)| stamp.max(now))))
        });
    }
}

fn seconds(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}

/// `old` is the average and its age in seconds.
fn averaged(old: Option<(f64, f64)>, sample: f64) -> f64 {
    let Some((average, age)) = old else { return sample };
    let least = if sample > average { WEIGHT_MIN_UP } else { WEIGHT_MIN };
    let weight = (1.0 - (-age / MEMORY.as_secs_f64()).exp()).max(least);
    average + (sample - average) * weight
}

fn pack(seconds: f64, stamp: u64) -> u64 {
    let value = (seconds as f32).clamp(VALUE_MIN_S, VALUE_MAX_S).to_bits() - VALUE_MIN_S.to_bits();
    let code = u64::from((value >> VALUE_SHIFT) + 1).min((1 << VALUE_BITS) - 1);
    stamp << VALUE_BITS | code
}

#[inline]
fn unpack(word: u64) -> Option<(f64, u64)> {
    let code = (word & ((1 << VALUE_BITS) - 1)) as u32;
    let value = code.checked_sub(1)? << VALUE_SHIFT;
    Some((f64::from(f32::from_bits(value + VALUE_MIN_S.to_bits())), word >> VALUE_BITS))
}

// === impl Pace ===

impl Pace {
    /// The pace of a backend that has been asked nothing yet.
    pub fn new(born: Instant) -> Arc<Pace> {
        Arc::new(Pace { ewma: PeakEwma::new(born), waiting_bytes: AtomicU64::new(0) })
    }

    /// A request with this prompt goes to the backend, which then has `in_flight`, this one included.
    pub fn sent(self: &Arc<Pace>, prompt_bytes: u64, in_flight: u64, now: Instant) -> Awaited {
        let prompt_bytes = prompt_bytes.min(PROMPT_BYTES_MAX);
        let before = self.waiting_bytes.fetch_add(prompt_bytes, Ordering::Relaxed);
        let scale = (work(1, prompt_bytes) * work(in_flight, before + prompt_bytes)).sqrt();
        Awaited { pace: self.clone(), prompt_bytes, scale, since: now }
    }

    /// Forgets how fast it was: it has failed since, and has come back.
    pub fn forget(&self) {
        self.ewma.forget();
    }

    /// Prompts that it has not begun to answer.
    pub fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes.load(Ordering::Relaxed)
    }

    /// Seconds to the first byte per unit of work; `None` until it has answered or failed once.
    pub fn read(&self, now: Instant) -> Option<Reading> {
        self.ewma.read(now)
    }

    /// The seconds of [`Pace::read`] alone.
    #[inline]
    pub fn seconds(&self) -> Option<f64> {
        self.ewma.seconds()
    }

    /// Since the backend began to take requests.
    #[inline]
    pub fn lifetime(&self, now: Instant) -> Duration {
        self.ewma.lifetime(now)
    }
}

// === impl Awaited ===

impl Awaited {
    /// The first byte has come.
    pub fn answered(self, now: Instant) {
        self.pace.ewma.observe(self.per_work(now), now);
    }

    /// The attempt has failed, however soon.
    pub fn failed(self, now: Instant) {
        self.pace.ewma.penalise(now);
    }

    /// The client has left. That it had waited for longer than usual is worth knowing.
    pub fn abandoned(self, now: Instant) {
        self.pace.ewma.observe_at_least(self.per_work(now), now);
    }

    fn per_work(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since).div_f64(self.scale)
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.pace.waiting_bytes.fetch_sub(self.prompt_bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn read(ewma: &PeakEwma, now: Instant) -> f64 {
        ewma.read(now).unwrap().seconds
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= b * 1e-5
    }

    #[test]
    fn knows_nothing_at_first_and_takes_the_first_sample_as_it_is() {
        let born = Instant::now();
        let ewma = PeakEwma::new(born);
        assert_eq!(ewma.read(born + MS), None);
        ewma.observe(100 * MS, born);
        assert!(near(read(&ewma, born), 0.1));
        assert_eq!(ewma.read(born + 700 * MS).unwrap().age, 700 * MS);
    }

    #[test]
    fn rises_fast_and_falls_slowly() {
        let born = Instant::now();
        let ewma = PeakEwma::new(born);
        ewma.observe(100 * MS, born);
        ewma.observe(1_100 * MS, born);
        assert!(near(read(&ewma, born), 0.4), "{}", read(&ewma, born));
        ewma.observe(80 * MS, born);
        assert!(near(read(&ewma, born), 0.38), "{}", read(&ewma, born));
        // After a silence of several times its memory a sample counts for nearly all.
        ewma.observe(100 * MS, born + 10 * MEMORY);
        assert!((read(&ewma, born + 10 * MEMORY) - 0.1).abs() < 0.001);
    }

    #[test]
    fn a_failure_never_helps() {
        let born = Instant::now();
        let ewma = PeakEwma::new(born);
        ewma.penalise(born);
        assert!(near(read(&ewma, born), 1.0));
        for (sample, expect) in [(1, 0.03), (100, 0.3), (50_000, 60.0), (200_000, 200.0)] {
            let ewma = PeakEwma::new(born);
            ewma.observe(sample * MS, born);
            ewma.penalise(born);
            assert!(near(read(&ewma, born), expect), "{sample} ms became {}", read(&ewma, born));
        }
    }

    #[test]
    fn leaving_early_teaches_nothing_and_leaving_late_something() {
        let born = Instant::now();
        let ewma = PeakEwma::new(born);
        ewma.observe_at_least(10 * MS, born);
        assert_eq!(ewma.read(born), None);
        ewma.observe(100 * MS, born);
        ewma.observe_at_least(10 * MS, born + 100 * MEMORY);
        assert!(near(read(&ewma, born), 0.1));
        ewma.observe_at_least(1_100 * MS, born);
        assert!(read(&ewma, born) > 0.39);
    }

    #[test]
    fn time_neither_wraps_nor_goes_back() {
        let born = Instant::now();
        let ewma = PeakEwma::new(born);
        let years = |n: u64| Duration::from_secs(n * 365 * 24 * 3600);
        for n in [1, 5, 30] {
            ewma.observe(100 * MS, born + years(n));
            assert_eq!(ewma.read(born + years(n) + 40 * MS).unwrap().age, 40 * MS);
        }
        ewma.observe(100 * MS, born + years(29));
        assert_eq!(ewma.read(born + years(30) + 40 * MS).unwrap().age, 40 * MS);
        // Beyond what it can count it stands still.
        ewma.observe(200 * MS, born + years(40));
        assert!(ewma.read(born + years(50)).unwrap().seconds > 0.1);
        // Before it was made is when it was made.
        let ewma = PeakEwma::new(born + years(1));
        ewma.observe(100 * MS, born);
        assert_eq!(ewma.read(born).unwrap().age, Duration::ZERO);
    }

    #[test]
    fn prompts_wait_until_their_first_byte_however_it_ends() {
        let born = Instant::now();
        let pace = Pace::new(born);
        let requests: Vec<_> = (0..4).map(|i| pace.sent(1_000, i + 1, born)).collect();
        let huge = pace.sent(u64::MAX, 5, born);
        assert_eq!(pace.waiting_bytes(), 4_000 + PROMPT_BYTES_MAX);
        drop(huge);
        for (left, request) in (0..4).rev().zip(requests) {
            match left {
                0 => drop(request),
                1 => request.answered(born),
                2 => request.failed(born),
                _ => request.abandoned(born),
            }
            assert_eq!(pace.waiting_bytes(), left * 1_000);
        }
    }

    #[test]
    fn a_sample_is_a_pace() {
        let born = Instant::now();
        let pace = Pace::new(born);
        let first = pace.sent(UNIT_BYTES * 3, 1, born);
        first.answered(born + 400 * MS);
        assert!(near(pace.read(born).unwrap().seconds, 0.1));
        // It had the prompt before it to wait for too.
        let pace = Pace::new(born);
        let _first = pace.sent(UNIT_BYTES * 2, 1, born);
        let second = pace.sent(0, 2, born);
        second.answered(born + 400 * MS);
        assert!(near(pace.read(born).unwrap().seconds, 0.2));
    }

    proptest! {
        #[test]
        fn stays_between_its_samples(samples in prop::collection::vec((0_u64..10_000_000, 0_u64..100_000), 1..50)) {
            let born = Instant::now();
            let ewma = PeakEwma::new(born);
            let (mut now, mut low, mut high) = (born, f64::INFINITY, 0.0_f64);
            for (micros, after_ms) in samples {
                let sample = Duration::from_micros(micros);
                now += Duration::from_millis(after_ms);
                ewma.observe(sample, now);
                low = low.min(sample.as_secs_f64());
                high = high.max(sample.as_secs_f64());
                let is = read(&ewma, now);
                prop_assert!(is.is_finite() && is >= low * (1.0 - 1e-4) && is <= high * (1.0 + 1e-6) + 1e-6, "{low} {is} {high}");
            }
        }

        #[test]
        fn what_is_packed_comes_back(seconds in 1e-5_f64..4_000.0, stamp in 0..=STAMP_MAX) {
            let (back, at) = unpack(pack(seconds, stamp)).unwrap();
            prop_assert!((back - seconds).abs() <= seconds * 4e-6, "{seconds} came back as {back}");
            prop_assert_eq!(at, stamp);
        }

        #[test]
        fn any_number_can_be_packed(seconds in any::<f64>(), stamp in 0..=STAMP_MAX) {
            prop_assume!(!seconds.is_nan());
            let (back, at) = unpack(pack(seconds, stamp)).unwrap();
            prop_assert!(back.is_finite() && back > 0.0);
            prop_assert_eq!(at, stamp);
        }
    }
}
