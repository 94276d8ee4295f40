//! Which of many equal warnings are written. Pure: lines come as keys, time as an argument.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState},
    sync::OnceLock,
    time::{Duration, Instant},
};

use tracing::{
    Event,
    field::{Field, Visit},
};

/// So often the same line is written before it counts as repeated.
const BURST: u32 = 3;
/// After that, it is written so often.
const PERIOD: Duration = Duration::from_secs(60);
/// Most lines that are remembered.
const LINES_MAX: usize = 256;
/// Fields that differ from one line to the next though they say the same.
const VOLATILE: &[&str] =
    &["request_id", "trace_id", "in_flight", "attempt", "attempts", "rest", "seconds", "bytes", "client"];

/// What was written lately.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    lines: HashMap<u64, Line>,
}

#[derive(Debug)]
struct Line {
    /// When it may be written again as if it had never been.
    fresh_at: Instant,
    /// How often it may be written at once.
    left: u32,
    left_out: u64,
    last: Instant,
}

impl Repeats {
    /// How many such lines were left out before this one, or `None`: this one is left out, too.
    pub(super) fn admit(&mut self, key: u64, now: Instant) -> Option<u64> {
        if !self.lines.contains_key(&key) && self.lines.len() >= LINES_MAX {
            self.make_room();
        }
        let line =
            self.lines.entry(key).or_insert(Line { fresh_at: now + PERIOD, left: BURST, left_out: 0, last: now });
        line.last = now;
        if now >= line.fresh_at {
            line.fresh_at = now + PERIOD;
            // One that never paused goes on at one a minute.
            line.left = if line.left_out == 0 { BURST } else { 1 };
        }
        if line.left == 0 {
            line.left_out += 1;
            return None;
        }
        line.left -= 1;
        Some(std::mem::take(&mut line.left_out))
    }

    /// Forgets the line that was last seen longest ago.
    fn make_room(&mut self) {
        let oldest = self.lines.iter().min_by_key(|(_, line)| line.last).map(|(key, _)| *key);
        if let Some(oldest) = oldest {
            self.lines.remove(&oldest);
        }
    }
}

/// What makes this line the same as another: where it is written, and what it says.
pub(super) fn key(event: &Event<'_>) -> u64 {
    static HASHER: OnceLock<RandomState> = OnceLock::new();
    struct Say<H>(H);
    impl<H: std::hash::Hasher> Visit for Say<H> {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            if !VOLATILE.contains(&field.name()) {
                field.name().hash(&mut self.0);
                format!("{value:?}").hash(&mut self.0);
            }
        }
    }
    let mut say = Say(HASHER.get_or_init(RandomState::new).build_hasher());
    event.metadata().callsite().hash(&mut say.0);
    event.record(&mut say);
    say.0.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(repeats: &mut Repeats, key: u64, times: usize, at: Instant) -> Vec<u64> {
        (0..times).filter_map(|_| repeats.admit(key, at)).collect()
    }

    #[test]
    fn a_few_are_written_and_then_one_a_minute_with_a_count() {
        let mut repeats = Repeats::default();
        let start = Instant::now();
        assert_eq!(written(&mut repeats, 1, 10, start), [0, 0, 0]);
        assert_eq!(written(&mut repeats, 2, 1, start), [0], "another line");
        assert!(written(&mut repeats, 1, 10, start + PERIOD / 2).is_empty());
        assert_eq!(written(&mut repeats, 1, 10, start + PERIOD), [17]);
        assert_eq!(written(&mut repeats, 1, 1, start + PERIOD * 2), [9]);
        assert_eq!(written(&mut repeats, 1, 10, start + PERIOD * 3), [0, 0, 0], "it had paused");
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_is_forgotten() {
        let mut repeats = Repeats::default();
        let start = Instant::now();
        for key in 0..10 * LINES_MAX as u64 {
            let at = start + Duration::from_millis(key);
            assert_eq!(repeats.admit(1000 + key, at), Some(0));
            // One that comes all the time.
            assert_eq!(repeats.admit(7, at).is_some(), key < u64::from(BURST));
        }
        assert_eq!(repeats.lines.len(), LINES_MAX);
        assert!(repeats.lines.contains_key(&7));
    }
}
