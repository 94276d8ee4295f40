//! Waiting without guessing: gates that a test opens, and conditions with a deadline.
//!
//! A deadline only ever turns a hang into a failure. It is far longer than anything that a healthy run needs, so that a
//! slow machine makes a test slower and not red.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use tokio::sync::watch;

/// The longest that one wait may take before its test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(1);

/// A door that is shut until a test opens it, and open from then on. Clones are the same door.
#[derive(Clone, Debug)]
pub(crate) struct Gate(watch::Sender<bool>);

// === impl Gate ===

impl Gate {
    pub(crate) fn shut() -> Self {
        Self(watch::Sender::new(false))
    }

    /// One that nobody has to wait at.
    pub(crate) fn open_one() -> Self {
        Self(watch::Sender::new(true))
    }

    pub(crate) fn open(&self) {
        self.0.send_replace(true);
    }

    /// Waits for the door to be open, for as long as it takes: the one who waits here is a script, whose deadline is
    /// that of the test.
    pub(crate) async fn passed(&self) {
        let mut open = self.0.subscribe();
        if open.wait_for(|open| *open).await.is_err() {
            unreachable!("the sender must live as long as the gate");
        }
    }
}

/// Waits until `condition` holds, and fails the test with `what` when it does not come true in time.
pub(crate) async fn eventually(what: impl Display, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// The result of `future`, which fails the test with `what` when it does not come in time.
pub(crate) async fn soon<T>(what: impl Display, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Waits until `sample` has given the same value for `calm`, and returns it: for things that stop, such as a writer that
/// nobody reads from.
pub(crate) async fn settled<T: PartialEq>(what: impl Display, calm: Duration, mut sample: impl FnMut() -> T) -> T {
    let deadline = Instant::now() + PATIENCE;
    let mut last = sample();
    let mut since = Instant::now();
    while since.elapsed() < calm {
        assert!(Instant::now() < deadline, "not calm within {PATIENCE:?}: {what}");
        tokio::time::sleep(POLL).await;
        let now = sample();
        if now != last {
            last = now;
            since = Instant::now();
        }
    }
    last
}
