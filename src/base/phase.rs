//! The phase of the process's life: one value that everybody reads and that only moves on.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use tokio::sync::Notify;

/// How far the process has come. Each phase implies those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// The ports are open; the first scan and its probes are not done.
    Starting,
    /// The first scan and its probes are done.
    Ready,
    /// The proxy was told to stop. `/readyz` says 503 and connections are still accepted (`PROXY_SETTLE`), because a front
    /// proxy needs time to notice.
    Settling,
    /// Nothing more is accepted on the data port; requests under way finish. The admin port shows what is left of them.
    Draining,
    /// All requests are done or cut, and the admin port closes.
    Over,
}

/// The life of the process, as all parts of it see it.
#[derive(Debug, Clone, Default)]
pub struct Life(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    phase: AtomicU8,
    moved_on: Notify,
}

impl Life {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        match self.0.phase.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            2 => Phase::Settling,
            3 => Phase::Draining,
            _ => Phase::Over,
        }
    }

    /// The process was told to stop.
    pub fn is_stopping(&self) -> bool {
        self.phase() >= Phase::Settling
    }

    /// Moves on to this phase. A phase that has been reached is never left for an earlier one.
    pub fn advance(&self, to: Phase) {
        if self.0.phase.fetch_max(to as u8, Ordering::AcqRel) < to as u8 {
            self.0.moved_on.notify_waiters();
        }
    }

    /// Resolves once the process has come this far.
    pub async fn reached(&self, phase: Phase) {
        loop {
            let moved_on = self.0.moved_on.notified();
            tokio::pin!(moved_on);
            // Before the look, so that a move after it is not missed.
            moved_on.as_mut().enable();
            if self.phase() >= phase {
                return;
            }
            moved_on.await;
        }
    }

    /// Runs `work` until the process has come this far. `None`: it had not ended by then.
    pub async fn until<T>(&self, phase: Phase, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.reached(phase) => None,
            done = work => Some(done),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_life_moves_on_and_never_back() {
        let life = Life::default();
        assert_eq!((life.phase(), life.is_stopping()), (Phase::Starting, false));
        let settled = tokio::spawn({
            let life = life.clone();
            async move { life.until(Phase::Settling, std::future::pending::<()>()).await }
        });
        tokio::task::yield_now().await;
        life.advance(Phase::Ready);
        assert_eq!((life.phase(), settled.is_finished()), (Phase::Ready, false));
        assert!(life.reached(Phase::Ready).now_or_never().is_some());
        assert!(life.reached(Phase::Draining).now_or_never().is_none());
        life.advance(Phase::Draining);
        assert_eq!(settled.await.unwrap(), None);
        for earlier in [Phase::Starting, Phase::Ready, Phase::Settling] {
            life.advance(earlier);
            assert_eq!((life.phase(), life.is_stopping()), (Phase::Draining, true));
        }
        assert_eq!(life.until(Phase::Over, async { 7 }).await, Some(7));
        life.advance(Phase::Over);
        assert_eq!(life.until(Phase::Over, async { 7 }).await, None, "it is over already");
    }
}
