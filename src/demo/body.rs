//! The body of an answer: whole, or one event per write and on time.
//!
//! Knows nothing of what an event says. It owns the request's [`Flight`], so that a request counts until its last byte.

use std::{
    convert::Infallible,
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::load::{Finished, Flight};

/// One event of a stream, ready for the wire.
#[derive(Debug)]
pub(super) enum Event {
    /// Comes one token gap after the token before it.
    Token(Bytes),
    /// Comes at once: heads, tails, `[DONE]`.
    Mark(Bytes),
}

/// The events of one stream, made as they are sent.
pub(super) type Events = Box<dyn Iterator<Item = Event> + Send>;

/// Body of every answer.
pub(super) enum DemoBody {
    Whole { bytes: Option<Bytes>, _flight: Option<Flight> },
    Events(EventStream),
}

/// A stream of server-sent events at the pace of an inference server.
pub(super) struct EventStream {
    events: Events,
    /// Taken from `events`, not due yet.
    held: Option<Event>,
    gap: Duration,
    /// When the next token is due; none when there is no gap.
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether hyper may still hold an event that it has not written.
    unwritten: bool,
    flight: Flight,
    finished: Finished,
}

// === impl EventStream ===

impl EventStream {
    /// Events with `gap` between two tokens; `finished` is what the stream counts as once it has ended.
    pub(super) fn new(events: Events, gap: Duration, flight: Flight, finished: Finished) -> Self {
        let timer = (!gap.is_zero()).then(|| Box::pin(tokio::time::sleep_until(Instant::now())));
        Self { events, held: None, gap, timer, unwritten: false, flight, finished }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Some(event) = self.held.take().or_else(|| self.events.next()) else {
            self.flight.finish(self.finished);
            return Poll::Ready(None);
        };
        let is_token = matches!(event, Event::Token(_));
        let due = !is_token || self.timer.as_mut().is_none_or(|timer| timer.as_mut().poll(cx).is_ready());
        if !due || self.unwritten {
            // hyper gathers frames for as long as a body has one ready, and writes when it has none. Being pending once
            // after every event makes each its own write, as inference servers do.
            if due {
                cx.waker().wake_by_ref();
            }
            self.unwritten = false;
            self.held = Some(event);
            return Poll::Pending;
        }
        if is_token {
            self.flight.generated(1);
            if let Some(timer) = &mut self.timer {
                // From deadline to deadline: a late wake-up does not slow the whole stream down.
                let next = timer.deadline() + self.gap;
                timer.as_mut().reset(next);
            }
        }
        self.unwritten = true;
        let (Event::Token(bytes) | Event::Mark(bytes)) = event;
        Poll::Ready(Some(bytes))
    }
}

// === impl DemoBody ===

impl DemoBody {
    pub(super) fn whole(bytes: impl Into<Bytes>) -> Self {
        Self::Whole { bytes: Some(bytes.into()), _flight: None }
    }

    /// The same, for a request that counts until it has been sent.
    pub(super) fn counted(bytes: impl Into<Bytes>, flight: Flight) -> Self {
        Self::Whole { bytes: Some(bytes.into()), _flight: Some(flight) }
    }
}

impl Body for DemoBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = match self.get_mut() {
            Self::Whole { bytes, .. } => Poll::Ready(bytes.take()),
            Self::Events(stream) => stream.poll_event(cx),
        };
        bytes.map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole { bytes, .. } if bytes.as_ref().is_none_or(Bytes::is_empty))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole { bytes, .. } => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Events(_) => SizeHint::default(),
        }
    }
}
