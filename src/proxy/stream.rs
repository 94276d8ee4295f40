//! The answer on its way to the client: frames pass as they come; what must happen at its end happens here.
//!
//! The body owns the request's claim on its backend, its connection and its account. However it ends (complete, broken by
//! the backend, or dropped because the client left), they are settled by its end or by its drop, once.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep};

use super::exchange::{Ending, Exchange};
use crate::{
    backend::InFlight,
    error::{Dialect, ProxyError},
    upstream::Lease,
};

/// The body of an answer: the proxy's own, or a backend's.
#[derive(Debug)]
pub enum ProxyBody {
    /// All of it is here.
    Whole(Option<Bytes>),
    /// It comes from a backend.
    Relayed(Box<Relayed>),
}

/// Why a transfer was cut. The client sees it as an abnormal end, never as a clean one.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The backend broke off.
    #[error("the backend broke off its answer: {0}")]
    Broken(#[from] hyper::Error),
    /// The backend fell silent for longer than `PROXY_IDLE_TIMEOUT`.
    #[error("the backend sent nothing for {0:?} (PROXY_IDLE_TIMEOUT)")]
    Silent(Duration),
}

/// How a broken event stream is told to its client.
#[derive(Debug, Clone, Copy)]
pub struct EventStream {
    /// In whose words.
    pub dialect: Dialect,
}

/// How a client is told that its answer was cut.
#[derive(Debug, Default)]
pub struct AbnormalEnd {
    /// By an event, where the answer is an event stream that one can be added to.
    pub events: Option<EventStream>,
    /// By a reset of the connection, where nothing else tells a cut from an end (HTTP/1.0).
    pub reset: Option<Arc<AtomicBool>>,
}

/// A backend's answer, with all that depends on it.
#[derive(Debug)]
pub struct Relayed {
    inner: Incoming,
    /// Taken at the end.
    settle: Option<Settle>,
    ending: AbnormalEnd,
    silence: Option<Silence>,
    aborting: Option<Aborting>,
}

#[derive(Debug)]
struct Settle {
    exchange: Exchange,
    in_flight: InFlight,
    lease: Lease,
}

/// Watches for silence, where that is asked for.
#[derive(Debug)]
struct Silence {
    limit: Duration,
    timer: Pin<Box<Sleep>>,
}

/// The error event has been given to the connection, which gets one turn to write it before the cut.
#[derive(Debug)]
struct Aborting {
    why: Option<Cut>,
    yielded: bool,
}

impl Relayed {
    /// Relays `inner`. `ending` is what to do if it is cut.
    pub fn new(
        inner: Incoming,
        exchange: Exchange,
        in_flight: InFlight,
        lease: Lease,
        ending: AbnormalEnd,
        idle_timeout: Option<Duration>,
    ) -> Relayed {
        let silence = idle_timeout.map(|limit| Silence { limit, timer: Box::pin(sleep(limit)) });
        let mut relayed =
            Relayed { inner, settle: Some(Settle { exchange, in_flight, lease }), ending, silence, aborting: None };
        if relayed.inner.is_end_stream() {
            // Nobody will ask a body that is over for its end.
            relayed.complete();
        }
        relayed
    }

    fn complete(&mut self) {
        if let Some(Settle { mut exchange, in_flight, lease }) = self.settle.take() {
            // The connection first: whoever sees the place free may want it.
            lease.give_back(Instant::now());
            drop(in_flight);
            exchange.end(Ending::Complete);
        }
    }

    /// Ends abnormally, with an event that says so if that is possible.
    fn broken(&mut self, why: Cut) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let Some(Settle { mut exchange, in_flight, lease }) = self.settle.take() else {
            return Poll::Ready(Some(Err(why)));
        };
        tracing::warn!(
            container = %in_flight.backend().spec.name, model = %in_flight.model().id,
            request_id = exchange.request_id(), %why, "answer cut"
        );
        let error = ProxyError::Backend {
            backend: in_flight.backend().spec.name.clone(),
            what: "broke off its answer; nothing more of it will come",
            attempts: exchange.attempts,
        };
        if let Some(reset) = &self.ending.reset {
            reset.store(true, Relaxed);
        }
        let event = self.ending.events.map(|events| error.stream_event(events.dialect, exchange.path()));
        exchange.end(Ending::BackendBroke);
        drop((lease, in_flight));
        match event {
            None => Poll::Ready(Some(Err(why))),
            Some(event) => {
                self.aborting = Some(Aborting { why: Some(why), yielded: false });
                Poll::Ready(Some(Ok(Frame::data(event))))
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        if let Some(aborting) = &mut self.aborting {
            if !aborting.yielded {
                aborting.yielded = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            return Poll::Ready(aborting.why.take().map(Err));
        }
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(silence) = &mut self.silence {
                    silence.timer.as_mut().reset(Instant::now() + silence.limit);
                }
                if let Some(settle) = &mut self.settle {
                    settle.exchange.count_bytes(frame.data_ref().map_or(0, Bytes::len));
                }
                if self.inner.is_end_stream() {
                    self.complete();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.complete();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => self.broken(Cut::Broken(error)),
            Poll::Pending => {
                let Some(silence) = &mut self.silence else {
                    return Poll::Pending;
                };
                ready!(silence.timer.as_mut().poll(cx));
                let limit = silence.limit;
                self.broken(Cut::Silent(limit))
            }
        }
    }
}

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match self.get_mut() {
            ProxyBody::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            ProxyBody::Relayed(relayed) => relayed.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ProxyBody::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            ProxyBody::Relayed(relayed) => relayed.aborting.is_none() && relayed.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ProxyBody::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            ProxyBody::Relayed(relayed) => relayed.inner.size_hint(),
        }
    }
}
