//! When a client's connection should come to its end.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use tokio::time::Instant;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::data::proxy::seat::Seat;

/// Tells a connection that it should come to its end, because the proxy shuts down.
#[derive(Debug)]
pub struct Closing {
    pub(super) has_begun: Arc<AtomicBool>,
    /// Wakes the connection's task; until it has been polled for the first time it does not.
    signal: Pin<Box<WaitForCancellationFutureOwned>>,
    is_watched: bool,
    /// The connection's room may be needed while it is idle.
    seat: Option<Arc<Seat>>,
    /// It ends with its first exchange.
    pub(super) is_after_one: bool,
}

impl Closing {
    /// `has_begun` is set before `signal` resolves.
    pub fn new(has_begun: Arc<AtomicBool>, signal: WaitForCancellationFutureOwned) -> Closing {
        Closing { has_begun, signal: Box::pin(signal), is_watched: false, seat: None, is_after_one: false }
    }

    /// The same for a connection that also ends when it is idle and its seat is needed.
    pub fn with_seat(self, seat: Arc<Seat>) -> Closing {
        Closing { seat: Some(seat), ..self }
    }

    /// The same for a connection that carries one request.
    pub fn after_one(self) -> Closing {
        Closing { is_after_one: true, ..self }
    }

    /// It waits for a request.
    pub(super) fn is_idle(&self, now: Instant) {
        if let Some(seat) = &self.seat {
            seat.is_idle(now);
        }
    }

    /// It has one.
    pub(super) fn is_busy(&self) {
        if let Some(seat) = &self.seat {
            seat.is_busy();
        }
    }

    /// Ready once the seat of the idle connection is needed.
    pub(super) fn poll_given_up(&self, cx: &Context<'_>) -> Poll<()> {
        self.seat.as_ref().map_or(Poll::Pending, |seat| seat.poll_given_up(cx))
    }

    /// Whether it has begun; if not, the task is woken when it does. Always to be polled by the same task.
    pub(super) fn poll_begun(&mut self, cx: &mut Context<'_>) -> bool {
        if !std::mem::replace(&mut self.is_watched, true) {
            return self.signal.as_mut().poll(cx).is_ready();
        }
        self.has_begun.load(Relaxed)
    }
}
