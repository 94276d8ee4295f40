//! The request body on its way to a backend: what has been read is kept as long as another attempt may need it, what has
//! not been read flows through and is scanned as it goes.
//!
//! A body whose end has been seen is just its chunks; each attempt gets clones of them (reference counts, no copies). A
//! body that still flows is lent to one attempt at a time and comes back when that attempt is over, with the chunks it
//! has passed on, so that the next attempt can begin anew. What is kept is bounded per body and over all bodies; past
//! the bound the body still flows, but cannot be replayed.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::oneshot;

use crate::scan::{ModelScanner, ScanError};

/// Why a body could not be passed on to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyFault {
    /// It does not name one model.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It is larger than a body may be.
    #[error("request body too large")]
    TooLarge,
    /// More would have to be held than one body may.
    #[error("request body too large to hold")]
    HoldTooLarge,
    /// All bodies together hold as much as they may.
    #[error("too many request bodies held")]
    HoldFull,
    /// The client broke off, or its framing is wrong.
    #[error("request body broken off")]
    Broken,
}

/// Bounds for bodies; one for the whole proxy.
#[derive(Debug)]
pub struct BodyLimits {
    /// Most bytes in one body.
    pub max_body_bytes: u64,
    /// Most bytes of one body held at a time.
    pub hold_max_bytes: usize,
    held_bytes: AtomicUsize,
}

/// All bodies together hold at most this many times what one may.
const HOLD_BODIES: usize = 8;
/// What every body may hold without being counted: ordinary requests touch no shared counter.
const UNCOUNTED_BYTES: usize = 64 * 1024;
/// What keeping a chunk costs beside its bytes; a body of one-byte chunks must not hold a hundred times its size.
const CHUNK_OVERHEAD_BYTES: usize = 64;

impl BodyLimits {
    /// Bounds as configured.
    pub fn new(max_body_bytes: u64, hold_max_bytes: usize) -> Arc<BodyLimits> {
        Arc::new(BodyLimits { max_body_bytes, hold_max_bytes, held_bytes: AtomicUsize::new(0) })
    }

    /// Bytes held by all bodies that count.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes.load(Relaxed)
    }
}

/// Chunks held, with what they count for; gives it back when dropped.
#[derive(Debug)]
struct Held {
    chunks: Vec<Bytes>,
    payload_bytes: usize,
    counted_bytes: usize,
    limits: Arc<BodyLimits>,
}

impl Held {
    fn new(limits: &Arc<BodyLimits>) -> Held {
        Held { chunks: Vec::new(), payload_bytes: 0, counted_bytes: 0, limits: limits.clone() }
    }

    fn push(&mut self, chunk: Bytes) -> Result<(), BodyFault> {
        let payload_bytes = self.payload_bytes + chunk.len();
        if payload_bytes > self.limits.hold_max_bytes {
            return Err(BodyFault::HoldTooLarge);
        }
        let cost_bytes = payload_bytes + CHUNK_OVERHEAD_BYTES * (self.chunks.len() + 1);
        let more_bytes = cost_bytes.saturating_sub(UNCOUNTED_BYTES + self.counted_bytes);
        if more_bytes > 0 {
            let all = self.limits.hold_max_bytes.saturating_mul(HOLD_BODIES);
            if self.limits.held_bytes.fetch_add(more_bytes, Relaxed).saturating_add(more_bytes) > all {
                self.limits.held_bytes.fetch_sub(more_bytes, Relaxed);
                return Err(BodyFault::HoldFull);
            }
            self.counted_bytes += more_bytes;
        }
        self.payload_bytes = payload_bytes;
        self.chunks.push(chunk);
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.counted_bytes > 0 {
            self.limits.held_bytes.fetch_sub(self.counted_bytes, Relaxed);
        }
    }
}

/// A request body that can be sent more than once.
#[derive(Debug)]
pub struct Replay {
    held: Held,
    trailers: Option<HeaderMap>,
    tail: Tail,
}

#[derive(Debug)]
enum Tail {
    /// All of the body is held.
    Complete,
    /// The rest is still to come.
    Here(Box<Flow>),
    /// An attempt has the rest; it comes back when the attempt is over.
    Lent(oneshot::Receiver<Box<Flow>>),
    /// More has passed than is kept: there is no second attempt.
    Spent,
}

/// The part of a body that has not been read yet.
#[derive(Debug)]
struct Flow {
    rest: Incoming,
    scanner: Option<ModelScanner>,
    seen_bytes: u64,
    limits: Arc<BodyLimits>,
    /// What has passed since the key was found; `None` once that is more than may be kept.
    passed: Option<Held>,
    trailers: Option<HeaderMap>,
    fault: Option<BodyFault>,
    ended: bool,
}

impl Replay {
    /// A request without a body.
    pub fn empty(limits: &Arc<BodyLimits>) -> Replay {
        Replay { held: Held::new(limits), trailers: None, tail: Tail::Complete }
    }

    /// Reads from `body` until the model is known: until `scanner` has found it, or the body ends without one and
    /// `otherwise` names it. Without a scanner `otherwise` decides at once. Returns the body, ready to be sent, and the
    /// model; on failure also what is left of the body, so that the caller can read it to its end before answering.
    ///
    /// # Errors
    /// The body names no model, is too large, or breaks off.
    pub async fn read(
        mut body: Incoming,
        mut scanner: Option<ModelScanner>,
        otherwise: Option<String>,
        limits: &Arc<BodyLimits>,
    ) -> Result<(Replay, String), (BodyFault, Incoming)> {
        let mut replay = Replay::empty(limits);
        let mut seen_bytes: u64 = 0;
        while !body.is_end_stream() {
            let found = match &scanner {
                Some(scanner) => scanner.model(),
                None => otherwise.as_deref(),
            };
            if let Some(model) = found {
                let model = model.to_owned();
                replay.tail = Tail::Here(Box::new(Flow {
                    rest: body,
                    scanner,
                    seen_bytes,
                    limits: limits.clone(),
                    passed: Some(Held::new(limits)),
                    trailers: None,
                    fault: None,
                    ended: false,
                }));
                return Ok((replay, model));
            }
            let frame = match std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                None => break,
                Some(Err(_)) => return Err((BodyFault::Broken, body)),
                Some(Ok(frame)) => frame,
            };
            let chunk = match frame.into_data() {
                Ok(chunk) => chunk,
                Err(frame) => {
                    replay.trailers = frame.into_trailers().ok();
                    continue;
                }
            };
            seen_bytes += chunk.len() as u64;
            if seen_bytes > limits.max_body_bytes {
                return Err((BodyFault::TooLarge, body));
            }
            if let Some(Err(error)) = scanner.as_mut().map(|scanner| scanner.feed(&chunk)) {
                return Err((error.into(), body));
            }
            if let Err(fault) = replay.held.push(chunk) {
                return Err((fault, body));
            }
        }
        let in_body = match &mut scanner {
            Some(scanner) => scanner.finish().map(|()| scanner.model().map(str::to_owned)),
            None => Ok(None),
        };
        match (in_body, otherwise) {
            (Ok(Some(model)), _) | (Ok(None) | Err(ScanError::ModelMissing), Some(model)) => Ok((replay, model)),
            (Ok(None), None) => Err((ScanError::ModelMissing.into(), body)),
            (Err(error), _) => Err((error.into(), body)),
        }
    }

    /// The body for the next attempt; `None` when there can be none, because the rest is away or more has passed than is
    /// kept. The first attempt always gets one.
    pub fn attempt(&mut self) -> Option<AttemptBody> {
        let flow = match std::mem::replace(&mut self.tail, Tail::Spent) {
            Tail::Complete => {
                self.tail = Tail::Complete;
                None
            }
            Tail::Here(flow) => {
                let (home, away) = oneshot::channel();
                self.tail = Tail::Lent(away);
                Some(Lent { flow: Some(flow), home: Some(home) })
            }
            Tail::Lent(_) | Tail::Spent => return None,
        };
        Some(AttemptBody {
            held: self.held.chunks.clone().into_iter(),
            trailers: if flow.is_none() { self.trailers.clone() } else { None },
            flow,
        })
    }

    /// After a failed attempt: waits for the rest to come back and says whether another attempt can be made.
    ///
    /// # Errors
    /// The attempt failed because of the body itself, not because of the backend.
    pub async fn recover(&mut self) -> Result<bool, BodyFault> {
        let Tail::Lent(away) = &mut self.tail else {
            return Ok(matches!(self.tail, Tail::Complete));
        };
        // Whoever had it has dropped its connection, and with it the body: this does not wait for anything remote.
        let Ok(mut flow) = away.await else {
            self.tail = Tail::Spent;
            return Ok(false);
        };
        self.tail = Tail::Spent;
        if let Some(fault) = flow.fault.take() {
            return Err(fault);
        }
        let Some(mut passed) = flow.passed.take() else {
            return Ok(false);
        };
        for chunk in std::mem::take(&mut passed.chunks) {
            if self.held.push(chunk).is_err() {
                return Ok(false);
            }
        }
        flow.passed = Some(Held::new(&flow.limits));
        self.tail = if flow.ended {
            self.trailers = flow.trailers.take();
            Tail::Complete
        } else {
            Tail::Here(flow)
        };
        Ok(true)
    }
}

/// A body as one attempt sends it.
#[derive(Debug)]
pub struct AttemptBody {
    held: std::vec::IntoIter<Bytes>,
    trailers: Option<HeaderMap>,
    flow: Option<Lent>,
}

/// The rest of a body, lent to an attempt; goes home when dropped.
#[derive(Debug)]
struct Lent {
    flow: Option<Box<Flow>>,
    home: Option<oneshot::Sender<Box<Flow>>>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(home), Some(flow)) = (self.home.take(), self.flow.take()) {
            // Nobody waits once the answer has begun.
            let _ = home.send(flow);
        }
    }
}

impl Body for AttemptBody {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        if let Some(chunk) = self.held.next() {
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if let Some(flow) = self.flow.as_mut().and_then(|lent| lent.flow.as_mut()) {
            return flow.poll_frame(cx);
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        let flowing = self.flow.as_ref().and_then(|lent| lent.flow.as_ref()).is_some_and(|flow| !flow.ended);
        self.held.len() == 0 && self.trailers.is_none() && !flowing
    }

    fn size_hint(&self) -> SizeHint {
        let held: u64 = self.held.as_slice().iter().map(|chunk| chunk.len() as u64).sum();
        match self.flow.as_ref().and_then(|lent| lent.flow.as_ref()) {
            Some(flow) if flow.ended => SizeHint::with_exact(held),
            Some(flow) => match flow.rest.size_hint().exact() {
                Some(rest) => SizeHint::with_exact(held + rest),
                None => SizeHint::default(),
            },
            // Trailers need chunked framing, which a known size would prevent.
            None if self.trailers.is_some() => SizeHint::default(),
            None => SizeHint::with_exact(held),
        }
    }
}

impl Flow {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let result = match ready!(Pin::new(&mut self.rest).poll_frame(cx)) {
            None => self.end(),
            Some(Err(_)) => Err(BodyFault::Broken),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(chunk) => self.pass(&chunk).map(|()| Some(Frame::data(chunk))),
                Err(frame) => {
                    self.trailers = frame.into_trailers().ok();
                    let trailers = self.trailers.clone().map(Frame::trailers);
                    self.end().map(|_| trailers)
                }
            },
        };
        Poll::Ready(match result {
            Ok(frame) => frame.map(Ok),
            Err(fault) => {
                self.fault = Some(fault.clone());
                Some(Err(fault))
            }
        })
    }

    /// Looks at a chunk before it is passed on: a backend must never get the end of a body that names two models.
    fn pass(&mut self, chunk: &Bytes) -> Result<(), BodyFault> {
        self.seen_bytes += chunk.len() as u64;
        if self.seen_bytes > self.limits.max_body_bytes {
            return Err(BodyFault::TooLarge);
        }
        if let Some(scanner) = &mut self.scanner {
            scanner.feed(chunk)?;
        }
        if self.rest.is_end_stream() {
            self.end()?;
        }
        if self.passed.as_mut().is_some_and(|passed| passed.push(chunk.clone()).is_err()) {
            self.passed = None;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Option<Frame<Bytes>>, BodyFault> {
        if !self.ended {
            if let Some(scanner) = &mut self.scanner {
                scanner.finish()?;
            }
            self.ended = true;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
