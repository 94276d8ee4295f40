//! Connections to one backend: opened when needed, reused while fresh, cut when the backend is cut.
//!
//! Idle connections are kept apart per worker thread, so the lock around them is never contended on the request path and
//! a connection is always used by the thread that opened it. A connection is a socket and nothing else: the request that leases it
//! reads and writes it in its own task, so a request costs no hand-over between tasks. Nothing here knows models, retries
//! or HTTP.

use std::{
    cell::Cell,
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::task::AtomicWaker;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::{Instant, sleep_until, timeout},
};

/// Python servers (uvicorn) close idle connections after 5 s; below that, a reused one is very likely alive.
const IDLE_MAX: Duration = Duration::from_secs(3);
/// What the kernel may take in of an answer ahead of its client. Enough for 2 GB/s at the 0.1 ms between containers.
const RECEIVE_BUFFER_BYTES: u32 = 256 * 1024;
/// After so long without a segment the kernel asks whether the backend's machine is still there.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(30);
/// Time between two such questions.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// So many without an answer end the connection.
const KEEP_ALIVE_PROBES: u32 = 3;
/// What was sent and is not acknowledged for so long ends the connection.
const USER_TIMEOUT: Duration = Duration::from_secs(60);
/// Idle connections kept per worker thread and backend.
const IDLE_CONNECTIONS_MAX: usize = 512;

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
    /// Nothing listens there.
    Refused,
    /// No answer within the connect timeout.
    TimedOut,
    /// Anything else, such as no route.
    Unreachable,
    /// The proxy itself has no descriptor, port or memory left, which says nothing of the backend.
    Shortage,
    /// The backend has been cut.
    Cut,
}

impl ConnectError {
    fn of(error: &io::Error) -> ConnectError {
        // Numbers of Linux, for those that have no kind of their own.
        const EAGAIN: i32 = 11;
        const ENOMEM: i32 = 12;
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        const ENOSPC: i32 = 28;
        const EADDRINUSE: i32 = 98;
        const EADDRNOTAVAIL: i32 = 99;
        const ENOBUFS: i32 = 105;
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::ConnectionRefused, _) => ConnectError::Refused,
            (io::ErrorKind::TimedOut, _) => ConnectError::TimedOut,
            (_, Some(EAGAIN | ENOMEM | ENFILE | EMFILE | ENOSPC | EADDRINUSE | EADDRNOTAVAIL | ENOBUFS)) => {
                ConnectError::Shortage
            }
            _ => ConnectError::Unreachable,
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
    open: HashMap<u64, Arc<Scissors>>,
    opened: u64,
    /// A task closes what has been idle for too long.
    reaping: bool,
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

/// An open connection, which ends when this is dropped.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    scissors: Arc<Scissors>,
    key: u64,
    shard: usize,
    shared: Weak<Shared>,
}

/// How one thread ends a connection that another one is using.
#[derive(Debug, Default)]
struct Scissors {
    cut: AtomicBool,
    user: AtomicWaker,
}

/// The right to exchange one request for one answer on a connection. Dropping it closes the connection.
#[derive(Debug)]
pub struct Lease {
    connection: Connection,
    /// The connection has carried a request before: it may have died while idle.
    pub reused: bool,
    /// The kernel waits for as long as it takes until the backend reads.
    waits_for_its_reader: bool,
}

// === impl Upstream ===

impl Upstream {
    /// Connections to `addr`, kept apart for `workers` threads.
    pub fn new(addr: SocketAddr, connect_timeout: Duration, workers: usize) -> Upstream {
        let shards = (0..workers.max(1)).map(|_| Mutex::default()).collect();
        Upstream { shared: Arc::new(Shared { addr, connect_timeout, shards }) }
    }

    /// A connection that has been used before and is fresh enough to be used again, if there is one.
    pub fn lease_idle(&self, now: Instant) -> Option<Lease> {
        let mut shard = self.shared.lock(self.shared.this_shard());
        // The newest first: what is old stays old and is closed.
        while let Some(Idle { connection, since }) = shard.idle.pop() {
            let is_fresh = now.saturating_duration_since(since) < IDLE_MAX;
            if is_fresh && connection.is_silent() {
                return Some(Lease { connection, reused: true, waits_for_its_reader: false });
            }
            // Closing it takes the lock.
            drop(shard);
            drop(connection);
            shard = self.shared.lock(self.shared.this_shard());
        }
        None
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
        let connect = timeout(self.shared.connect_timeout, connect(self.shared.addr));
        let stream = match connect.await {
            Err(_) => return Err(ConnectError::TimedOut),
            Ok(Err(error)) => return Err(ConnectError::of(&error)),
            Ok(Ok(stream)) => stream,
        };
        // Events are small writes; waiting to fill a packet would delay each of them.
        let _ = stream.set_nodelay(true);
        let mut this = self.shared.lock(shard);
        if this.sealed {
            return Err(ConnectError::Cut);
        }
        let key = this.opened;
        this.opened += 1;
        let scissors = Arc::new(Scissors::default());
        this.open.insert(key, scissors.clone());
        drop(this);
        let connection = Connection { stream, scissors, key, shard, shared: Arc::downgrade(&self.shared) };
        Ok(Lease { connection, reused: false, waits_for_its_reader: false })
    }

    /// Closes idle connections, of all threads.
    pub fn give_up_idle(&self) {
        for shard in &self.shared.shards {
            // Closing them takes the lock.
            let idle = std::mem::take(&mut lock(shard).idle);
            drop(idle);
        }
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
            for scissors in lock(shard).open.values() {
                scissors.cut.store(true, Ordering::Release);
                scissors.user.wake();
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
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    // Nothing that can panic runs under this lock; a poisoned one is as good as any.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Left alone, the kernel would take in tens of megabytes of an answer that its client does not read.
    socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    watch_for_its_end(&SockRef::from(&socket));
    socket.connect(addr).await
}

/// Has the kernel end the connection if the backend's machine vanishes without a word. A request may take hours; that its
/// machine is there can be known all the time.
fn watch_for_its_end(socket: &SockRef<'_>) {
    let keep_alive = TcpKeepalive::new()
        .with_time(KEEP_ALIVE_AFTER)
        .with_interval(KEEP_ALIVE_INTERVAL)
        .with_retries(KEEP_ALIVE_PROBES);
    // Without them the connection is as good as any other.
    let _ = socket.set_tcp_keepalive(&keep_alive);
    let _ = socket.set_tcp_user_timeout(Some(USER_TIMEOUT));
}

/// Closes what has been idle for too long, as long as there is anything idle.
async fn reap(shared: Weak<Shared>, shard: usize) {
    let mut next = Instant::now() + IDLE_MAX;
    loop {
        sleep_until(next).await;
        let Some(shared) = shared.upgrade() else { return };
        let mut this = shared.lock(shard);
        let now = Instant::now();
        // The oldest are at the bottom.
        let stale = this.idle.iter().take_while(|idle| now.saturating_duration_since(idle.since) >= IDLE_MAX).count();
        let stale: Vec<Idle> = this.idle.drain(..stale).collect();
        let oldest = this.idle.first().map(|idle| idle.since);
        this.reaping = oldest.is_some();
        drop(this);
        drop(stale);
        match oldest {
            Some(since) => next = since + IDLE_MAX,
            None => return,
        }
    }
}

// === impl Lease ===

impl Lease {
    /// Has the task that is being polled woken when the backend is cut. To be called once, before the first read.
    pub fn use_in(&self, cx: &Context<'_>) {
        self.connection.scissors.user.register(cx.waker());
    }

    /// The backend has been cut: this connection is over, and no answer on it has ended properly.
    pub fn is_cut(&self) -> bool {
        self.connection.scissors.cut.load(Ordering::Acquire)
    }

    /// Reads some bytes; none at the end of the connection.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(buf);
        match Pin::new(&mut self.connection.stream).poll_read(cx, &mut buf) {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(buf.filled().len())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Writes some of these bytes.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match slices {
            [only] => Pin::new(&mut self.connection.stream).poll_write(cx, only),
            several => Pin::new(&mut self.connection.stream).poll_write_vectored(cx, several),
        }
    }

    /// More is sent than a machine takes in for a backend that does not read. The user time-out would end the connection
    /// while the backend is busy with others, so from now on the kernel's own limit for what is not acknowledged holds.
    pub fn wait_for_its_reader(&mut self) {
        if !std::mem::replace(&mut self.waits_for_its_reader, true) {
            let _ = SockRef::from(&self.connection.stream).set_tcp_user_timeout(None);
        }
    }

    /// Keeps the connection for the next request. The exchange on it must be over, on both sides.
    pub fn give_back(self, now: Instant) {
        let Some(shared) = self.connection.shared.upgrade() else { return };
        if self.waits_for_its_reader {
            let _ = SockRef::from(&self.connection.stream).set_tcp_user_timeout(Some(USER_TIMEOUT));
        }
        let index = self.connection.shard;
        let mut shard = shared.lock(index);
        if shard.retired || self.is_cut() {
            drop(shard);
            return;
        }
        let closed = (shard.idle.len() >= IDLE_CONNECTIONS_MAX).then(|| shard.idle.remove(0));
        shard.idle.push(Idle { connection: self.connection, since: now });
        let reaps = !std::mem::replace(&mut shard.reaping, true);
        drop(shard);
        drop(closed);
        if reaps {
            // Not tracked by the application: it ends with the last idle connection, within seconds.
            tokio::spawn(reap(Arc::downgrade(&shared), index));
        }
    }
}

// === impl Connection ===

impl Connection {
    /// Nothing has come since the last answer. An end, or bytes that were not asked for, mean that it cannot be used.
    fn is_silent(&self) -> bool {
        let read = self.stream.try_read(&mut [0]);
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.lock(self.shard).open.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[tokio::test]
    async fn a_sealed_address_is_not_connected_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        let lease = upstream.lease_fresh().await.unwrap();
        listener.accept().await.unwrap();
        upstream.seal();
        assert!(!lease.is_cut(), "what is under way goes on");
        assert!(upstream.lease_idle(Instant::now()).is_none());
        assert_eq!(upstream.lease_fresh().await.unwrap_err(), ConnectError::Cut);
        assert!(futures::FutureExt::now_or_never(listener.accept()).is_none(), "nobody has come");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connections_are_used_while_fresh_and_closed_soon_after() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        let lease = upstream.lease_fresh().await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        lease.give_back(Instant::now());
        let lease = upstream.lease_idle(Instant::now()).unwrap();
        assert!(lease.reused);
        lease.give_back(Instant::now());
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0, "closed without anybody asking for it");
        assert!(upstream.lease_idle(Instant::now()).is_none());
    }

    #[tokio::test]
    async fn what_the_backend_closed_or_spoke_on_is_not_used_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        for speaks in [false, true] {
            let lease = upstream.lease_fresh().await.unwrap();
            let (peer, _) = listener.accept().await.unwrap();
            if speaks {
                peer.writable().await.unwrap();
                peer.try_write(b"x").unwrap();
            }
            lease.connection.stream.writable().await.unwrap();
            drop(peer);
            lease.connection.stream.readable().await.unwrap();
            lease.give_back(Instant::now());
            assert!(upstream.lease_idle(Instant::now()).is_none());
        }
    }

    #[tokio::test]
    async fn the_kernel_watches_for_the_end_of_the_backends_machine() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        let mut lease = upstream.lease_fresh().await.unwrap();
        let user_timeout = |lease: &Lease| SockRef::from(&lease.connection.stream).tcp_user_timeout().unwrap();
        let socket = SockRef::from(&lease.connection.stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(user_timeout(&lease), Some(Duration::from_secs(60)));
        // While a large request is sent, its reader may take its time.
        lease.wait_for_its_reader();
        assert_eq!(user_timeout(&lease), None);
        lease.give_back(Instant::now());
        assert_eq!(user_timeout(&upstream.lease_idle(Instant::now()).unwrap()), Some(Duration::from_secs(60)));
    }

    #[tokio::test]
    async fn idle_connections_are_given_up_and_new_ones_kept() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        for _ in 0..2 {
            let lease = upstream.lease_fresh().await.unwrap();
            let (mut peer, _) = listener.accept().await.unwrap();
            lease.give_back(Instant::now());
            upstream.give_up_idle();
            assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
            assert!(upstream.lease_idle(Instant::now()).is_none());
        }
    }

    #[test]
    fn whose_fault_it_is_that_there_is_no_connection() {
        for (errno, expect) in [
            (111, ConnectError::Refused),
            (110, ConnectError::TimedOut),
            (113, ConnectError::Unreachable),
            (101, ConnectError::Unreachable),
            (1, ConnectError::Unreachable),
            (104, ConnectError::Unreachable),
            (24, ConnectError::Shortage),
            (23, ConnectError::Shortage),
            (99, ConnectError::Shortage),
            (98, ConnectError::Shortage),
            (105, ConnectError::Shortage),
            (12, ConnectError::Shortage),
            (11, ConnectError::Shortage),
            (28, ConnectError::Shortage),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(ConnectError::of(&error), expect, "{error}");
        }
    }

    #[tokio::test]
    async fn cutting_wakes_whoever_waits() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(5), 1);
        let mut lease = upstream.lease_fresh().await.unwrap();
        let waiting = std::future::poll_fn(|cx| {
            lease.use_in(cx);
            if lease.is_cut() { Poll::Ready(()) } else { lease.poll_read(cx, &mut [0]).map(|_| ()) }
        });
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        upstream.cut();
        waiting.await;
    }
}
