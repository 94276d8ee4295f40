//! Connections to one backend: opened when needed, reused while fresh, cut when the backend is cut.
//!
//! Idle connections are kept apart per worker thread, so the lock around them is never contended on the request path and
//! a connection is always driven by the thread that uses it. Nothing here knows models, retries or HTTP semantics.
//!
//! Every connection is a task of its own that drives hyper's HTTP/1.1 client. A request that ends without its answer aborts
//! the task of its connection, and [`Upstream::cut`] aborts all of them: hyper then fails the pending head or body of their
//! requests, which costs the requests nothing while nobody cuts.

use std::{
    cell::Cell,
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::AbortHandle,
    time::{Instant, timeout},
};

use crate::replay::AttemptBody;

/// Python servers (uvicorn) close idle connections after 5 s; below that, a reused one is very likely alive.
const IDLE_MAX: Duration = Duration::from_secs(3);
/// Idle connections kept per worker thread and backend.
const IDLE_CONNECTIONS_MAX: usize = 512;
/// Read buffer per connection, and so the largest response head and the most that one stalled stream holds here.
const READ_BUFFER_BYTES: usize = 16 * 1024;
/// Most header lines in a response.
const HEADERS_MAX: usize = 256;

thread_local! {
    static WORKER: Cell<usize> = const { Cell::new(0) };
}

/// Says which worker the calling thread is; connections it opens are kept for it alone.
pub fn set_worker(index: usize) {
    WORKER.set(index);
}

/// Why no connection could be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectError {
    /// Nobody listens there.
    Refused,
    /// No answer within the connect timeout.
    TimedOut,
    /// Anything else: no route, out of descriptors, …
    Unreachable,
    /// The backend has been cut.
    Cut,
}

impl ConnectError {
    /// What the backend did, for an error message.
    pub fn what(self) -> &'static str {
        match self {
            ConnectError::Refused => "refused the connection",
            ConnectError::TimedOut => "did not accept the connection in time",
            ConnectError::Unreachable => "could not be reached",
            ConnectError::Cut => "was stopped",
        }
    }
}

/// The connections to one address.
#[derive(Debug)]
pub struct Upstream {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    addr: SocketAddr,
    connect_timeout: Duration,
    shards: Box<[Mutex<Shard>]>,
}

#[derive(Debug, Default)]
struct Shard {
    idle: Vec<Idle>,
    open: HashMap<u64, AbortHandle>,
    opened: u64,
    /// No connection goes back to the idle ones.
    retired: bool,
    /// No connection may be opened.
    sealed: bool,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

/// An open connection. Dropping it ends it at once, with whatever is still being written to it: a backend that does not
/// read would otherwise keep a request's body, and so its client, for ever.
#[derive(Debug)]
struct Connection {
    sender: SendRequest<AttemptBody>,
    heard_bytes: Arc<AtomicU64>,
    task: AbortHandle,
}

/// Takes a connection off the list of open ones when its task ends, however it ends.
#[derive(Debug)]
struct OpenGuard {
    shared: Weak<Shared>,
    shard: usize,
    key: u64,
}

/// A connection that counts what it hears: whether a backend had begun to answer decides whether another may be asked.
#[derive(Debug)]
struct Counted {
    stream: TcpStream,
    heard_bytes: Arc<AtomicU64>,
}

/// The right to send one request on one connection.
#[derive(Debug)]
pub struct Lease {
    connection: Connection,
    /// The connection has carried a request before: it may have died while idle.
    pub reused: bool,
    heard_before: u64,
    shard: usize,
    shared: Arc<Shared>,
}

// === impl Upstream ===

impl Upstream {
    /// Connections to `addr`, kept apart for `workers` threads.
    pub fn new(addr: SocketAddr, connect_timeout: Duration, workers: usize) -> Upstream {
        let shards = (0..workers.max(1)).map(|_| Mutex::default()).collect();
        Upstream { shared: Arc::new(Shared { addr, connect_timeout, shards }) }
    }

    /// Where the connections go.
    pub fn addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// A connection for one request: an idle one if a fresh enough one is there, else a new one.
    ///
    /// # Errors
    /// When a new one is needed and cannot be had.
    pub async fn lease(&self, now: Instant) -> Result<Lease, ConnectError> {
        let shard = self.shared.this_shard();
        if let Some(connection) = self.shared.take_idle(shard, now) {
            let heard_before = connection.heard_bytes.load(Relaxed);
            return Ok(Lease { connection, reused: true, heard_before, shard, shared: self.shared.clone() });
        }
        self.lease_fresh().await
    }

    /// A new connection, whatever is idle.
    ///
    /// # Errors
    /// When it cannot be had.
    pub async fn lease_fresh(&self) -> Result<Lease, ConnectError> {
        let shard = self.shared.this_shard();
        if self.shared.lock(shard).sealed {
            return Err(ConnectError::Cut);
        }
        let connect = timeout(self.shared.connect_timeout, TcpStream::connect(self.shared.addr));
        let stream = match connect.await {
            Err(_) => return Err(ConnectError::TimedOut),
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => return Err(ConnectError::Refused),
            Ok(Err(_)) => return Err(ConnectError::Unreachable),
            Ok(Ok(stream)) => stream,
        };
        // Events are small writes; waiting to fill a packet would delay each of them.
        let _ = stream.set_nodelay(true);
        let heard_bytes = Arc::new(AtomicU64::new(0));
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(READ_BUFFER_BYTES)
            .max_headers(HEADERS_MAX)
            .handshake(TokioIo::new(Counted { stream, heard_bytes: heard_bytes.clone() }))
            .await
            .map_err(|_| ConnectError::Unreachable)?;

        let mut this = self.shared.lock(shard);
        if this.sealed {
            return Err(ConnectError::Cut);
        }
        let key = this.opened;
        this.opened += 1;
        let guard = OpenGuard { shared: Arc::downgrade(&self.shared), shard, key };
        // Not tracked by the application: the connection lives no longer than the request that leases it, or than its
        // place among the idle ones, and both are ended by `retire` and `cut`.
        #[allow(clippy::disallowed_methods)]
        let task = tokio::spawn(async move {
            // How it ended is told to the request on it, if there is one.
            let _ = connection.await;
            drop(guard);
        })
        .abort_handle();
        this.open.insert(key, task.clone());
        drop(this);
        let connection = Connection { sender, heard_bytes, task };
        Ok(Lease { connection, reused: false, heard_before: 0, shard, shared: self.shared.clone() })
    }

    /// Closes idle connections and keeps none from now on; requests under way go on.
    pub fn retire(&self) {
        for shard in &self.shared.shards {
            let mut shard = lock(shard);
            shard.retired = true;
            let idle = std::mem::take(&mut shard.idle);
            drop(shard);
            drop(idle);
        }
    }

    /// Keeps connections again after [`Upstream::retire`].
    pub fn reinstate(&self) {
        for shard in &self.shared.shards {
            lock(shard).retired = false;
        }
    }

    /// Opens no connection from now on, for good: the address may be somebody else's by now. Requests under way go on.
    pub fn seal(&self) {
        self.retire();
        for shard in &self.shared.shards {
            lock(shard).sealed = true;
        }
    }

    /// Ends every connection now, with the requests on it. For good.
    pub fn cut(&self) {
        self.seal();
        for shard in &self.shared.shards {
            let open = std::mem::take(&mut lock(shard).open);
            for task in open.into_values() {
                task.abort();
            }
        }
    }
}

// === impl Shared ===

impl Shared {
    fn this_shard(&self) -> usize {
        WORKER.get() % self.shards.len()
    }

    fn lock(&self, shard: usize) -> MutexGuard<'_, Shard> {
        lock(&self.shards[shard])
    }

    fn take_idle(&self, shard: usize, now: Instant) -> Option<Connection> {
        let mut shard = self.lock(shard);
        // The newest first: what is old stays old and is closed.
        while let Some(Idle { connection, since }) = shard.idle.pop() {
            if now.saturating_duration_since(since) >= IDLE_MAX {
                // All below it are older still.
                let stale = std::mem::take(&mut shard.idle);
                drop(shard);
                drop((connection, stale));
                return None;
            }
            if connection.sender.is_ready() {
                return Some(connection);
            }
        }
        None
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    // Nothing that can panic runs under this lock; a poisoned one is as good as any.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Lease ===

impl Lease {
    /// Sends the request.
    ///
    /// # Errors
    /// The connection broke before the head of an answer, or was never fit.
    pub async fn send(&mut self, request: Request<AttemptBody>) -> hyper::Result<Response<Incoming>> {
        self.connection.sender.send_request(request).await
    }

    /// The backend has sent something since this lease began.
    pub fn has_heard(&self) -> bool {
        self.connection.heard_bytes.load(Relaxed) != self.heard_before
    }

    /// Keeps the connection for the next request, if it can carry one: not if the backend closes it, and not if the answer
    /// was complete before the request was.
    pub fn give_back(self, now: Instant) {
        if !self.connection.sender.is_ready() {
            return;
        }
        let mut shard = self.shared.lock(self.shard);
        if shard.retired {
            drop(shard);
            return;
        }
        // The oldest is at the bottom; close it when its time is over or the room is used up.
        let stale = shard.idle.first().is_some_and(|i| now.saturating_duration_since(i.since) >= IDLE_MAX);
        let closed = (stale || shard.idle.len() >= IDLE_CONNECTIONS_MAX).then(|| shard.idle.remove(0));
        shard.idle.push(Idle { connection: self.connection, since: now });
        drop(shard);
        drop(closed);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.lock(self.shard).open.remove(&self.key);
        }
    }
}

// === impl Counted ===

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.heard_bytes.fetch_add((buf.filled().len() - before) as u64, Relaxed);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sealed_address_is_not_connected_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        let lease = upstream.lease_fresh().await.unwrap();
        listener.accept().await.unwrap();
        upstream.seal();
        assert!(!lease.connection.task.is_finished(), "what is under way goes on");
        assert_eq!(upstream.lease(Instant::now()).await.unwrap_err(), ConnectError::Cut);
        assert!(futures::FutureExt::now_or_never(listener.accept()).is_none(), "nobody has come");
    }
}
