//! The life of one incarnation of one container, as a pure state machine: events and the time go in, effects come out. It
//! has no task, clock or socket.
//!
//! ```text
//!             fit                      probe ok
//! Discovered ─────► Probing ──────────────────────► Ready
//!     ▲ ▲              ▲                            │  │
//!     │ │ cut          │ fit again      unfit       │  │ stop notice
//!     │ └───────── Unhealthy ◄──────────────────────┘  ▼
//!     │                                             Draining ──► Probing, if it still runs after its grace
//!     └── network lost                                 │
//!                                     ended (any) ──► Gone
//! ```
//!
//! Rules that are not obvious from the picture:
//! * A stop notice is visible in no later look at the container, so a look changes nothing while it drains: only the end of
//!   the container, or of its grace, leaves `Draining`.
//! * A backend is ready only by an answer to a probe of this incarnation, never by its health check alone.
//! * Requests in flight are cut once per container, not once per model: the deadline is set when the backend stops being
//!   ready, and forgotten when the container is fit again.

mod unfit;

use std::time::Duration;

use tokio::time::Instant;

pub(crate) use self::unfit::{GONE, Unfit};
use crate::{base::foreign::FOREVER, telemetry::kinds::ContainerState};

/// How many probes in a row a ready backend may refuse before it is not ready any more. A probe that times out does not
/// count, because busy servers do that.
const MISSES_MAX: u8 = 3;

/// A state in the life of an incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// The container is known, but must not be probed for this reason.
    Discovered(Unfit),
    /// The container is asked for its models until it answers.
    Probing,
    /// The container gets requests.
    Ready,
    /// The container was ready. It gets no new requests, and those in flight go on.
    Unhealthy {
        /// The reason.
        why: Unfit,
        /// When the requests in flight are cut; `None` if the container may resume as if nothing had happened.
        cut_at: Option<Instant>,
    },
    /// The container has been told to stop. It gets no new requests, and finishes those in flight.
    Draining {
        /// When the requests in flight are cut; `None` once they have been.
        cut_at: Option<Instant>,
        /// From when on it counts as having ignored the notice, if it still runs.
        grace_ends: Instant,
    },
    /// The process has ended.
    Gone,
}

impl State {
    /// The state without its details, as metrics and the status name it.
    pub(crate) fn kind(&self) -> ContainerState {
        match self {
            State::Discovered(_) => ContainerState::Discovered,
            State::Probing => ContainerState::Probing,
            State::Ready => ContainerState::Ready,
            State::Unhealthy { .. } => ContainerState::Unhealthy,
            State::Draining { .. } => ContainerState::Draining,
            State::Gone => ContainerState::Gone,
        }
    }

    /// Why a model has no ready replica while a container that serves it is in this state: a few words for the message to
    /// a client.
    pub(crate) fn why_not_ready(&self) -> &'static str {
        match self {
            State::Discovered(why) | State::Unhealthy { why, .. } => why.summary(),
            State::Probing | State::Ready => "it is starting",
            State::Draining { .. } => "it is stopping",
            State::Gone => GONE,
        }
    }
}

/// An event in the life of an incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// Discovery has looked at the container: it is fit to be probed, or it is not.
    Seen(Result<(), Unfit>),
    /// The container was told to stop.
    StopNotice {
        /// How long the engine waits before it kills the container.
        grace: Duration,
    },
    /// The container was paused.
    Suspended,
    /// The container lost the network in use, or its address.
    Detached,
    /// A process in the container was killed because there was no memory left.
    OutOfMemory,
    /// A probe has got the list of its models.
    ProbeOk,
    /// A probe has got no usable answer.
    ProbeFailed {
        /// The container cannot even be connected to, so it is not merely busy.
        refused: bool,
    },
    /// The time of [`Lifecycle::deadline`] has come.
    Deadline,
    /// The process has ended.
    Ended,
}

/// An effect of an event; effects are to be carried out in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Begin to ask the container for its models, again and again.
    StartProbing,
    /// Stop asking for models.
    StopProbing,
    /// Ask for models once now, out of turn.
    ProbeNow,
    /// Open the gate of the backend.
    Open,
    /// Close the gate: no new request enters.
    Close,
    /// End the requests in flight now, and forget the connections.
    Cut,
    /// End the requests in flight shortly, because the last bytes of their connections may still be on their way.
    CutSoon,
}

/// The state machine of one incarnation.
#[derive(Debug, Clone)]
pub(crate) struct Lifecycle {
    state: State,
    /// The last look at it, also one that changed nothing.
    seen: Result<(), Unfit>,
    /// Probes in a row that were refused while it was ready.
    misses: u8,
    drain_timeout: Duration,
}

impl Lifecycle {
    /// An incarnation that has just been found, and the effects of that.
    pub(crate) fn found(seen: Result<(), Unfit>, drain_timeout: Duration) -> (Lifecycle, Vec<Effect>) {
        let (state, effects) = match &seen {
            Ok(()) => (State::Probing, vec![Effect::StartProbing]),
            Err(why) => (State::Discovered(why.clone()), Vec::new()),
        };
        // A sum of this and a time must not overflow.
        (Lifecycle { state, seen, misses: 0, drain_timeout: drain_timeout.min(FOREVER) }, effects)
    }

    /// The present state.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Whether the container is starting and will be ready if all goes well, so that requests may wait for it. A health check
    /// that has never passed may only be too impatient for a model that is still loading.
    pub(crate) fn is_coming(&self) -> bool {
        match &self.state {
            State::Probing => true,
            State::Discovered(why) | State::Unhealthy { why, .. } => {
                matches!(why, Unfit::HealthStarting | Unfit::HealthNeverPassed | Unfit::Restarting)
            }
            State::Ready | State::Draining { .. } | State::Gone => false,
        }
    }

    /// When [`Event::Deadline`] is due; `None` if nothing is to be done later.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Unhealthy { cut_at, .. } => *cut_at,
            State::Draining { cut_at, grace_ends } => Some(cut_at.map_or(*grace_ends, |cut| cut.min(*grace_ends))),
            State::Discovered(_) | State::Probing | State::Ready | State::Gone => None,
        }
    }

    /// Takes in one event and returns its effects.
    pub(crate) fn on(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        use Effect::{Close, Cut, CutSoon, Open, ProbeNow, StartProbing, StopProbing};
        if let Event::Seen(seen) = &event {
            self.seen = seen.clone();
        }
        match (&mut self.state, event) {
            (State::Gone, _) => Vec::new(),
            (_, Event::Ended) => {
                self.state = State::Gone;
                vec![Close, StopProbing, CutSoon]
            }

            (State::Draining { .. }, Event::Seen(_) | Event::StopNotice { .. } | Event::Suspended) => Vec::new(),
            (State::Draining { .. }, Event::OutOfMemory | Event::ProbeOk | Event::ProbeFailed { .. }) => Vec::new(),
            (State::Draining { cut_at, .. }, Event::Detached) => {
                *cut_at = None;
                vec![Cut]
            }
            (State::Draining { cut_at, grace_ends }, Event::Deadline) => {
                let mut effects = Vec::new();
                if cut_at.is_some_and(|cut| cut <= now) {
                    *cut_at = None;
                    effects.push(Cut);
                }
                if *grace_ends <= now {
                    effects.extend(self.begin_again());
                }
                effects
            }
            (_, Event::StopNotice { grace }) => {
                let cut_at = now + self.drain_timeout;
                let grace_ends = now + self.drain_timeout.max(grace).min(FOREVER);
                self.state = State::Draining { cut_at: Some(cut_at), grace_ends };
                vec![Close, StopProbing]
            }

            (State::Ready, Event::ProbeOk) => {
                self.misses = 0;
                Vec::new()
            }
            (State::Probing | State::Unhealthy { why: Unfit::NotAnswering, .. }, Event::ProbeOk) => {
                self.misses = 0;
                self.state = State::Ready;
                vec![Open]
            }
            (State::Ready, Event::ProbeFailed { refused: true }) => {
                self.misses += 1;
                if self.misses < MISSES_MAX {
                    return Vec::new();
                }
                // Probing goes on, because only a probe can show that the backend is back.
                self.state = State::Unhealthy { why: Unfit::NotAnswering, cut_at: Some(now + self.drain_timeout) };
                vec![Close]
            }
            (State::Ready | State::Probing, Event::OutOfMemory) => vec![ProbeNow],
            (_, Event::ProbeOk | Event::ProbeFailed { .. } | Event::OutOfMemory) => Vec::new(),

            (State::Discovered(why), Event::Detached) => {
                *why = Unfit::Detached;
                Vec::new()
            }
            (_, Event::Detached) => {
                self.state = State::Discovered(Unfit::Detached);
                vec![Close, StopProbing, Cut]
            }
            (_, Event::Suspended) => self.unfit(Unfit::Paused, now),
            (_, Event::Seen(Err(why))) => self.unfit(why, now),

            (
                State::Unhealthy { why: Unfit::NotAnswering, .. } | State::Ready | State::Probing,
                Event::Seen(Ok(())),
            ) => Vec::new(),
            (State::Discovered(_) | State::Unhealthy { .. }, Event::Seen(Ok(()))) => {
                self.state = State::Probing;
                vec![StartProbing]
            }

            (State::Unhealthy { cut_at, why }, Event::Deadline) => {
                if cut_at.is_none_or(|cut| cut > now) {
                    return Vec::new();
                }
                let stop = *why != Unfit::NotAnswering;
                self.state = if stop { State::Discovered(why.clone()) } else { State::Probing };
                vec![Cut]
            }
            (State::Discovered(_) | State::Probing | State::Ready, Event::Deadline) => Vec::new(),
        }
    }

    /// Leaves the present state because the container cannot be a backend.
    fn unfit(&mut self, why: Unfit, now: Instant) -> Vec<Effect> {
        use Effect::{Close, Cut, StopProbing};
        // Connections over a network that has gone hang for ever; those of a paused process may go on.
        if matches!(why, Unfit::Unreachable(_) | Unfit::Detached) {
            let was = std::mem::replace(&mut self.state, State::Discovered(why));
            return if matches!(was, State::Discovered(_)) { Vec::new() } else { vec![Close, StopProbing, Cut] };
        }
        let cut_after = (why != Unfit::Paused).then_some(self.drain_timeout);
        match &mut self.state {
            State::Discovered(old) => {
                *old = why;
                Vec::new()
            }
            State::Unhealthy { why: old, cut_at } => {
                *old = why;
                *cut_at = cut_at.or(cut_after.map(|after| now + after));
                vec![StopProbing]
            }
            // A container that is probed again may still have requests in flight, which get their time, too.
            State::Ready | State::Probing => {
                self.state = State::Unhealthy { why, cut_at: cut_after.map(|after| now + after) };
                vec![Close, StopProbing]
            }
            State::Draining { .. } | State::Gone => Vec::new(),
        }
    }

    /// Starts over from the last look, because the container was told to stop and still runs.
    fn begin_again(&mut self) -> Vec<Effect> {
        self.misses = 0;
        match self.seen.clone() {
            Ok(()) => {
                self.state = State::Probing;
                vec![Effect::StartProbing]
            }
            Err(why) => {
                self.state = State::Discovered(why);
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests;
