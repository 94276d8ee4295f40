//! Waiting with a deadline instead of sleeping, and arithmetic on moments.
//!
//! Moments are [`SystemTime`], because the engine stamps its events with the wall clock of the machine the tests run on.

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep};

/// Pause between two looks at something that is expected to change.
const POLL: Duration = Duration::from_millis(5);

/// Looks until `look` returns a value, and returns it.
///
/// # Panics
/// When `within` has passed without one.
pub(crate) async fn eventually<T>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        sleep(POLL).await;
    }
}

/// Looks again and again for the whole of `during`; `look` returns what is wrong, if anything is.
///
/// # Panics
/// At the first thing that is wrong.
pub(crate) async fn throughout(what: &str, during: Duration, mut look: impl AsyncFnMut() -> Option<String>) {
    let begun = Instant::now();
    while begun.elapsed() < during {
        if let Some(wrong) = look().await {
            panic!("{what}: {wrong}, {:?} into {during:?}", begun.elapsed());
        }
        sleep(POLL).await;
    }
}

/// Milliseconds from `earlier` to `later`; negative when they are the other way round.
pub(crate) fn ms_between(earlier: SystemTime, later: SystemTime) -> f64 {
    match later.duration_since(earlier) {
        Ok(ahead) => ahead.as_secs_f64() * 1e3,
        Err(behind) => -behind.duration().as_secs_f64() * 1e3,
    }
}

/// The `p`-th percentile (0 to 100, nearest rank) of values in any order.
///
/// # Panics
/// When there are none.
pub(crate) fn percentile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (p / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}
