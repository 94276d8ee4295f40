//! Carries out the effects of a container's life: probes, gates, cuts.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

use super::entry::Entry;
use crate::{
    base::config::Config,
    control::{
        lifecycle::{Effect, State},
        probe::{self, Answer, ProbeHandle},
    },
    pool::backend::Backend,
    telemetry::{kinds::TableAction, metrics::Metrics},
};

/// How long the connections of an ended container get to deliver the bytes that they still hold.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// Starts the tasks of all containers, and opens and closes the gates of their backends.
#[derive(Debug)]
pub(super) struct Executor {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    answers: mpsc::Sender<Answer>,
    /// Numbers probes, and containers that become ready, in the order in which they began.
    serial: u64,
}

impl Executor {
    /// Probes send their answers to `answers`; every task is tracked by `tasks`.
    pub(super) fn new(
        config: Arc<Config>,
        metrics: Arc<Metrics>,
        tasks: TaskTracker,
        answers: mpsc::Sender<Answer>,
    ) -> Executor {
        Executor { config, metrics, tasks, answers, serial: 0 }
    }

    /// Carries out `effects` in their order, and says whether the routing table must be made anew for them.
    pub(super) fn apply(&mut self, entry: &mut Entry, effects: Vec<Effect>) -> bool {
        let mut is_dirty = false;
        for effect in effects {
            match effect {
                Effect::StartProbing => self.start_probing(entry),
                Effect::StopProbing => entry.probe = None,
                Effect::ProbeNow => {
                    if let Some(probe) = &entry.probe {
                        probe.nudge();
                    }
                }
                Effect::Open => {
                    self.open(entry);
                    is_dirty = true;
                }
                Effect::Close => {
                    self.close(entry);
                    is_dirty = true;
                }
                Effect::Cut => entry.cut(),
                Effect::CutSoon => self.cut_soon(entry),
            }
        }
        is_dirty
    }

    fn start_probing(&mut self, entry: &mut Entry) {
        let Some(target) = entry.target(&self.config) else { return };
        self.serial += 1;
        let (handle, nudge, stop) = ProbeHandle::new(self.serial);
        entry.probe = Some(handle);
        entry.answered_at = None;
        self.tasks.spawn(probe::run(target, self.serial, self.answers.clone(), nudge, stop));
    }

    fn open(&mut self, entry: &mut Entry) {
        self.serial += 1;
        entry.ready_serial = self.serial;
        if let Some(backend) = &entry.backend {
            backend.reopen();
        }
        self.metrics.table_updates.increment(TableAction::Add);
    }

    fn close(&self, entry: &Entry) {
        let Some(backend) = &entry.backend else { return };
        backend.close();
        if matches!(entry.life.state(), State::Draining { .. }) {
            self.tasks.spawn(time_drain(backend.clone(), self.metrics.clone()));
        }
    }

    fn cut_soon(&self, entry: &mut Entry) {
        let Some(backend) = entry.backend.take() else { return };
        backend.upstream.seal();
        self.tasks.spawn(async move {
            // Whether it drains in time or not, its connections are of no more use.
            let _ = timeout(LAST_BYTES, backend.drained()).await;
            backend.cut();
        });
    }
}

/// Times a drain to the end of its last request. The end comes, because a request that is in flight when the time to drain
/// is over is cut.
async fn time_drain(backend: Arc<Backend>, metrics: Arc<Metrics>) {
    let began = Instant::now();
    backend.drained().await;
    metrics.drains.observe(began.elapsed());
}
