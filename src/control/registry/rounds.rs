//! Rounds of probes: the first one, for which readiness waits, and early refreshes, which ask all ready containers out of
//! turn because a request named a model that no backend has announced. Pure.

use std::{collections::HashSet, time::Duration};

use tokio::time::Instant;

use crate::control::discovery::EndpointId;

/// How long readiness waits for the first answers of containers that run already.
pub(super) const FIRST_PROBES: Duration = Duration::from_secs(5);
/// Least time between two early refreshes.
pub(super) const EARLY_REFRESH: Duration = Duration::from_secs(1);

/// The round of probes that readiness waits for.
#[derive(Debug)]
pub(super) enum FirstRound {
    /// Discovery has not listed all containers yet.
    Unseen,
    /// These containers have been asked and have not answered.
    Probing { unanswered: HashSet<EndpointId>, until: Instant },
    /// The proxy is ready.
    Done,
}

impl FirstRound {
    /// The first list is complete; these containers have not answered yet.
    pub(super) fn begin(&mut self, unanswered: HashSet<EndpointId>, now: Instant) {
        *self = FirstRound::Probing { unanswered, until: now + FIRST_PROBES };
    }

    /// Takes in that this container has answered.
    pub(super) fn answered(&mut self, id: &EndpointId) {
        if let FirstRound::Probing { unanswered, .. } = self {
            unanswered.remove(id);
        }
    }

    /// Ends the round if it waits for no container any more, or has lasted long enough; true when it ends. `is_asked` says
    /// whether a container is still being probed.
    pub(super) fn ends(&mut self, is_asked: impl Fn(&EndpointId) -> bool, now: Instant) -> bool {
        let FirstRound::Probing { unanswered, until } = self else { return false };
        unanswered.retain(|id| is_asked(id));
        let is_over = unanswered.is_empty() || *until <= now;
        if is_over {
            *self = FirstRound::Done;
        }
        is_over
    }

    /// When the round ends at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            FirstRound::Probing { until, .. } => Some(*until),
            FirstRound::Unseen | FirstRound::Done => None,
        }
    }
}

/// Early refreshes, at most one per [`EARLY_REFRESH`].
#[derive(Debug, Default)]
pub(super) struct EarlyRefresh {
    last: Option<Instant>,
    /// When the next one is due, if there is to be one.
    pub(super) due: Option<Instant>,
}

impl EarlyRefresh {
    /// A request has missed a model. True if the refresh is to happen now; otherwise it is due later.
    pub(super) fn missed(&mut self, now: Instant) -> bool {
        match self.last {
            Some(last) if last + EARLY_REFRESH > now => {
                self.due = Some(last + EARLY_REFRESH);
                false
            }
            _ => true,
        }
    }

    /// Begins a refresh.
    pub(super) fn begin(&mut self, now: Instant) {
        *self = EarlyRefresh { last: Some(now), due: None };
    }

    /// Whether a ready container, which last answered at `answered_at`, is to be asked in this refresh. One that has just
    /// answered is left for the next one.
    pub(super) fn asks(&mut self, answered_at: Option<Instant>, now: Instant) -> bool {
        match answered_at.map(|at| at + EARLY_REFRESH) {
            Some(later) if later > now => {
                self.due = self.due.into_iter().chain([later]).min();
                false
            }
            _ => true,
        }
    }
}
