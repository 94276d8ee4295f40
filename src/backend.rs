//! What both planes mean by a backend: one incarnation of one container that has answered a probe, and the count of
//! requests it is serving.
//!
//! Control opens and closes the gate; requests pass through it. Whether a backend is closed and how many requests it
//! has are one atomic word, so "draining?" and the count cannot race: once [`Backend::close`] has returned, no request can
//! get in, whatever snapshot it holds.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use crate::{telemetry::metrics::ModelMetrics, upstream::Upstream};

/// What is fixed for one incarnation of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSpec {
    /// Identity in its discovery, a container id for Docker.
    pub id: Arc<str>,
    /// Name for people.
    pub name: String,
    /// Where its API is.
    pub addr: SocketAddr,
    /// Prefix of its API, without a trailing slash; `/v1` of the client's path is replaced by it.
    pub base_path: String,
    /// Share of traffic among replicas.
    pub weight: NonZeroU32,
    /// Most requests at a time.
    pub max_inflight: Option<NonZeroU32>,
}

/// A backend: its specification, its connections, its load.
#[derive(Debug)]
pub struct Backend {
    /// What it is.
    pub spec: BackendSpec,
    /// `Host` header for requests to it.
    pub authority: String,
    /// Connections to it.
    pub upstream: Upstream,
    gate: Gate,
    drained: Notify,
}

/// A backend in the pool of one model.
#[derive(Debug)]
pub struct Member {
    /// The backend.
    pub backend: Arc<Backend>,
    /// The model.
    pub model: Arc<Model>,
    in_flight: AtomicUsize,
}

/// A model id that the proxy knows, with what outlives its backends.
#[derive(Debug)]
pub struct Model {
    /// The id, exactly as backends announce it.
    pub id: Box<str>,
    /// Its instruments.
    pub metrics: ModelMetrics,
    /// Whose turn it is in round robin.
    pub turn: AtomicUsize,
}

/// Why a backend did not take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It gets no new requests.
    Closed,
    /// It serves as many as it may.
    Full,
}

/// One request that a backend is serving, from before it is sent to the end of its answer. Dropping it is the only
/// release.
#[derive(Debug)]
#[must_use = "dropping it ends the request's claim on the backend"]
pub struct InFlight {
    member: Arc<Member>,
}

/// Closed or not, and how many are in: one word.
#[derive(Debug, Default)]
struct Gate(AtomicU64);

const CLOSED: u64 = 1 << 63;

impl Gate {
    /// One more, unless closed or `limit` are in.
    fn enter(&self, limit: Option<NonZeroU32>) -> Result<(), Refused> {
        let limit = limit.map_or(CLOSED, |n| u64::from(n.get()));
        let admit = |word: u64| (word < limit).then_some(word + 1);
        match self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit) {
            Ok(_) => Ok(()),
            Err(word) if word & CLOSED != 0 => Err(Refused::Closed),
            Err(_) => Err(Refused::Full),
        }
    }

    /// One less. True if that was the last one of a closed gate.
    fn leave(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before & !CLOSED != 0, "only who entered may leave");
        before == CLOSED | 1
    }

    fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    fn open(&self) {
        self.0.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Acquire) & !CLOSED
    }
}

// === impl Backend ===

impl Backend {
    /// A backend that takes requests from now on. `workers` is the number of threads that will send to it.
    pub fn new(spec: BackendSpec, connect_timeout: Duration, workers: usize) -> Arc<Backend> {
        let authority = spec.addr.to_string();
        let upstream = Upstream::new(spec.addr, connect_timeout, workers);
        Arc::new(Backend { spec, authority, upstream, gate: Gate::default(), drained: Notify::new() })
    }

    /// No new requests from now on; those in flight go on.
    pub fn close(&self) {
        self.gate.close();
        self.upstream.retire();
        if self.gate.count() == 0 {
            self.drained.notify_waiters();
        }
    }

    /// Takes requests again.
    pub fn reopen(&self) {
        self.upstream.reinstate();
        self.gate.open();
    }

    /// Ends every request in flight, for good. The backend must be closed.
    pub fn cut(&self) {
        debug_assert!(self.gate.is_closed(), "a backend must be closed before it is cut");
        self.upstream.cut();
    }

    /// Gets no new requests.
    pub fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Requests in flight, over all its models.
    pub fn in_flight(&self) -> u64 {
        self.gate.count()
    }

    /// Resolves once the backend is closed and has no request in flight.
    pub async fn drained(&self) {
        loop {
            let left = self.drained.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.is_closed() && self.in_flight() == 0 {
                return;
            }
            left.await;
        }
    }
}

// === impl Member ===

impl Member {
    /// `backend` as a server of `model`.
    pub fn new(backend: Arc<Backend>, model: Arc<Model>) -> Arc<Member> {
        Arc::new(Member { backend, model, in_flight: AtomicUsize::new(0) })
    }

    /// Requests for this model in flight on this backend.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Claims a place for one request.
    ///
    /// # Errors
    /// The backend is closed or full.
    pub fn try_acquire(self: &Arc<Member>) -> Result<InFlight, Refused> {
        self.backend.gate.enter(self.backend.spec.max_inflight)?;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(InFlight { member: self.clone() })
    }
}

impl Model {
    /// A model that has just been seen for the first time.
    pub fn new(id: &str) -> Arc<Model> {
        Arc::new(Model { id: id.into(), metrics: ModelMetrics::default(), turn: AtomicUsize::new(0) })
    }
}

// === impl InFlight ===

impl InFlight {
    /// The backend that serves the request.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.member.backend
    }

    /// The backend as the server of that model.
    pub fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// The model it serves.
    pub fn model(&self) -> &Arc<Model> {
        &self.member.model
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.member.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.member.backend.gate.leave() {
            self.member.backend.drained.notify_waiters();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use futures::FutureExt as _;

    pub(crate) fn member(name: &str, weight: u32, max_inflight: Option<u32>) -> Arc<Member> {
        let spec = BackendSpec {
            id: name.into(),
            name: name.to_owned(),
            addr: ([127, 0, 0, 1], 9).into(),
            base_path: "/v1".to_owned(),
            weight: NonZeroU32::new(weight).unwrap(),
            max_inflight: max_inflight.and_then(NonZeroU32::new),
        };
        Member::new(Backend::new(spec, Duration::from_secs(1), 1), Model::new("m"))
    }

    #[test]
    fn closed_lets_nobody_in_and_counts_who_is_still_there() {
        let member = member("a", 1, None);
        let first = member.try_acquire().unwrap();
        member.backend.close();
        assert_eq!(member.try_acquire().unwrap_err(), Refused::Closed);
        assert_eq!(member.backend.in_flight(), 1);
        assert!(member.backend.drained().now_or_never().is_none());
        drop(first);
        assert_eq!((member.backend.in_flight(), member.in_flight()), (0, 0));
        assert!(member.backend.drained().now_or_never().is_some());
        member.backend.reopen();
        assert!(member.try_acquire().is_ok());
    }

    #[test]
    fn full_is_not_closed() {
        let member = member("a", 1, Some(2));
        let one = member.try_acquire().unwrap();
        let _two = member.try_acquire().unwrap();
        assert_eq!(member.try_acquire().unwrap_err(), Refused::Full);
        drop(one);
        assert!(member.try_acquire().is_ok());
    }

    #[test]
    fn no_request_enters_after_close_under_contention() {
        let member = member("a", 1, None);
        let closed = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let was_closed = closed.load(Ordering::SeqCst);
                        let entered = member.try_acquire();
                        assert!(!(was_closed && entered.is_ok()), "a request entered a closed backend");
                    }
                });
            }
            scope.spawn(|| {
                member.backend.close();
                closed.store(true, Ordering::SeqCst);
            });
        });
        assert_eq!((member.backend.in_flight(), member.in_flight()), (0, 0));
    }

    #[tokio::test]
    async fn drained_wakes_when_the_last_one_leaves() {
        let member = member("a", 1, None);
        let (first, second) = (member.try_acquire().unwrap(), member.try_acquire().unwrap());
        member.backend.close();
        let backend = member.backend.clone();
        let mut waiting = tokio_test_spawn(async move { backend.drained().await });
        drop(first);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(second);
        assert!(futures::poll!(&mut waiting).is_ready());
    }

    fn tokio_test_spawn<F: Future>(future: F) -> std::pin::Pin<Box<F>> {
        Box::pin(future)
    }
}
