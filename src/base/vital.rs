//! Tasks without which the proxy does harm: a table that is not written any more, a port that is not accepted on. When such a
//! task ends before it may, the process is to end, because only then does something start it anew.
//!
//! What a task does is not known here.

use std::{
    any::Any,
    fmt,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::FutureExt as _;
use tokio::sync::mpsc;

/// The first end is all that matters; there is room for those that follow from it.
const ENDS_MAX: usize = 8;

/// A vital task has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub task: &'static str,
    /// Why.
    pub why: String,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ended { task, why } = self;
        write!(f, "the {task} task has ended, and the proxy cannot do its work without it: {why}")
    }
}

/// Watches vital tasks.
#[derive(Debug, Clone)]
pub struct Vital {
    ends: mpsc::Sender<Ended>,
    may_end: Arc<AtomicBool>,
}

/// Where ends are told.
#[derive(Debug)]
pub struct Ends {
    ends: mpsc::Receiver<Ended>,
    may_end: Arc<AtomicBool>,
}

/// A watch over vital tasks, and where it tells of their end.
pub fn watch() -> (Vital, Ends) {
    let (sender, receiver) = mpsc::channel(ENDS_MAX);
    let may_end = Arc::new(AtomicBool::new(false));
    (Vital { ends: sender, may_end: may_end.clone() }, Ends { ends: receiver, may_end })
}

// === impl Vital ===

impl Vital {
    /// Runs a task to its end, which it explains, and tells of it. A panic is an end, too.
    pub async fn task(self, task: &'static str, work: impl Future<Output = String>) {
        let ended = AssertUnwindSafe(work).catch_unwind().await;
        self.tell(task, ended.unwrap_or_else(|panic| words(&*panic)));
    }

    /// The same for a thread.
    pub fn thread(self, task: &'static str, work: impl FnOnce() -> String) {
        let ended = std::panic::catch_unwind(AssertUnwindSafe(work));
        self.tell(task, ended.unwrap_or_else(|panic| words(&*panic)));
    }

    fn tell(&self, task: &'static str, why: String) {
        if !self.may_end.load(Ordering::Acquire) {
            // The first one suffices.
            let _ = self.ends.try_send(Ended { task, why });
        }
    }
}

// === impl Ends ===

impl Ends {
    /// The next end. May be dropped and begun again.
    pub async fn next(&mut self) -> Ended {
        match self.ends.recv().await {
            Some(ended) => ended,
            // Nothing is watched any more.
            None => futures::future::pending().await,
        }
    }

    /// From now on tasks may end.
    pub fn expect_all(&self) {
        self.may_end.store(true, Ordering::Release);
    }
}

/// What a panic says.
fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("it panicked: {}", text.unwrap_or("without a word"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ends_are_told_with_their_reason_until_they_are_expected() {
        let (vital, mut ends) = watch();
        assert_eq!(ends.next().now_or_never(), None);
        vital.clone().task("a", async { "it returned".to_owned() }).await;
        vital.clone().task("b", async { panic!("{} too many", 1) }).await;
        vital.clone().thread("c", || panic!("no more"));
        vital.clone().thread("d", || std::panic::panic_any(7));
        let expected = [
            ("a", "it returned"),
            ("b", "it panicked: 1 too many"),
            ("c", "it panicked: no more"),
            ("d", "it panicked: without a word"),
        ];
        for (task, why) in expected {
            assert_eq!(ends.next().await, Ended { task, why: why.to_owned() });
        }
        for _ in 0..ENDS_MAX * 2 {
            vital.clone().task("many", async { String::new() }).await;
        }
        for _ in 0..ENDS_MAX {
            assert_eq!(ends.next().await.task, "many");
        }
        ends.expect_all();
        vital.task("late", async { String::new() }).await;
        assert_eq!(ends.next().now_or_never(), None);
    }
}
