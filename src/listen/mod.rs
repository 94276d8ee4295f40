//! The listener and its workers.
//!
//! One task accepts and hands every connection to the worker that has the fewest; a worker is a thread with a runtime of
//! its own, so a request, its client's connection and its backend's connection never change threads.

pub mod framing;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    thread::JoinHandle,
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::framing::Framing;
use crate::{
    proxy::{
        Peer, Proxy,
        interim::{Gap, Interim},
    },
    upstream,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// Connections on their way to one worker.
const HANDOVER_MAX: usize = 1024;
/// Pause when no descriptor is left: closing connections will free some.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// Time for a request's head, and for idling between requests. Longer than front proxies keep idle connections (Traefik:
/// 90 s), so that it is they who close: a request sent into a connection that is just being closed is lost.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// Read buffer per connection, and so the largest request head; also what may wait to be written to a slow reader.
const BUFFER_BYTES: usize = 32 * 1024;
/// Most header lines in a request.
const HEADERS_MAX: usize = 128;
/// Requests at a time on one HTTP/2 connection.
const STREAMS_MAX: u32 = 256;

/// Binds `port` on `ip`, or on all addresses, IPv4 and IPv6, where there is IPv6.
///
/// # Errors
/// The port is in use, or not allowed.
pub fn bind(ip: Option<IpAddr>, port: u16) -> io::Result<TcpListener> {
    match ip {
        Some(ip) => bind_to(SocketAddr::new(ip, port)),
        None => match bind_to(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                bind_to(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
            }
            bound => bound,
        },
    }
}

fn bind_to(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The threads that serve connections.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    /// Finish what is under way, take no more.
    finish: CancellationToken,
    /// End now.
    abort: CancellationToken,
}

#[derive(Debug)]
struct Worker {
    connections: mpsc::Sender<(TcpStream, SocketAddr)>,
    open: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

// === impl Workers ===

impl Workers {
    /// Starts `count` workers that serve with `proxy`.
    ///
    /// # Errors
    /// A thread or its runtime cannot be had.
    pub fn start(count: usize, proxy: &Arc<Proxy>) -> io::Result<Workers> {
        let (finish, abort) = (CancellationToken::new(), CancellationToken::new());
        let start = |index: usize| {
            let (connections, incoming) = mpsc::channel(HANDOVER_MAX);
            let open = Arc::new(AtomicUsize::new(0));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let work = work(incoming, proxy.clone(), open.clone(), finish.clone());
            let abort = abort.clone();
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                upstream::set_worker(index);
                runtime.block_on(abort.run_until_cancelled(work));
                // Whatever is still open is closed without waiting for it.
                runtime.shutdown_background();
            })?;
            Ok(Worker { connections, open, thread })
        };
        let workers = (0..count.max(1)).map(start).collect::<io::Result<Vec<Worker>>>()?;
        Ok(Workers { workers, finish, abort })
    }

    /// Accepts connections and hands them out, for ever. Dropping the future closes the listener.
    ///
    /// # Errors
    /// The listener cannot be waited for.
    pub async fn accept(&self, listener: TcpListener) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            match listener.accept().await {
                // Back to a plain socket: its worker registers it with its own runtime.
                Ok((stream, peer)) => match stream.into_std() {
                    Ok(stream) => self.hand_over(stream, peer).await,
                    Err(error) => tracing::debug!(%error, "connection lost before it was served"),
                },
                Err(error) if is_exhaustion(&error) => {
                    tracing::error!(%error, "cannot accept connections; raise the limit of open files (ulimit -n)");
                    sleep(EXHAUSTED_PAUSE).await;
                }
                // The client gave up before it was accepted.
                Err(error) => tracing::debug!(%error, "accept failed"),
            }
        }
    }

    async fn hand_over(&self, stream: TcpStream, peer: SocketAddr) {
        let Some(worker) = self.workers.iter().min_by_key(|worker| worker.open.load(Relaxed)) else {
            return;
        };
        worker.open.fetch_add(1, Relaxed);
        if worker.connections.send((stream, peer)).await.is_err() {
            worker.open.fetch_sub(1, Relaxed);
        }
    }

    /// Lets requests under way finish, for at most `patience`; then ends what is left. Returns whether all finished.
    pub async fn finish(self, patience: Duration) -> bool {
        self.finish.cancel();
        let threads: Vec<JoinHandle<()>> = self.workers.into_iter().map(|worker| worker.thread).collect();
        let mut joined = tokio::task::spawn_blocking(|| {
            for thread in threads {
                // A worker that panicked has nothing left to finish.
                let _ = thread.join();
            }
        });
        let finished = tokio::time::timeout(patience, &mut joined).await.is_ok();
        self.abort.cancel();
        if !finished {
            let _ = joined.await;
        }
        finished
    }
}

fn is_exhaustion(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

/// The life of a worker.
async fn work(
    mut incoming: mpsc::Receiver<(TcpStream, SocketAddr)>,
    proxy: Arc<Proxy>,
    open: Arc<AtomicUsize>,
    finish: CancellationToken,
) {
    let graceful = GracefulShutdown::new();
    let server = server();
    loop {
        // Ends once nobody can hand over any more and everything that was handed over is served.
        let Some((stream, peer)) = incoming.recv().await else { break };
        let closed = CloseGuard(open.clone());
        let Some(stream) = adopt(stream) else { continue };
        let smuggled = Arc::new(AtomicU64::new(NONE));
        let interim = Arc::new(Interim::default());
        let reset = Arc::new(AtomicBool::new(false));
        let watched = Watched {
            stream,
            reset: reset.clone(),
            framing: Framing::default(),
            smuggled: smuggled.clone(),
            interim: interim.clone(),
            gap: Gap::default(),
        };
        let proxy = proxy.clone();
        let requests = AtomicU64::new(0);
        let service = service_fn(move |request| {
            let number = requests.fetch_add(1, Relaxed);
            let smuggling = smuggled.load(Relaxed) == number;
            let peer = Peer { ip: peer.ip().to_canonical(), smuggling, interim: interim.clone(), reset: reset.clone() };
            let proxy = proxy.clone();
            async move { Ok::<_, std::convert::Infallible>(proxy.handle(request, peer).await) }
        });
        let (watcher, server, finish) = (graceful.watcher(), server.clone(), finish.clone());
        // The graceful shutdown of this worker is what waits for it.
        #[allow(clippy::disallowed_methods)]
        tokio::spawn(async move {
            // hyper's own clock starts only once it knows the version. A connection without a word is held for so long.
            let silent = timeout(HEAD_TIMEOUT, watched.stream.readable());
            if matches!(finish.run_until_cancelled(silent).await, Some(Ok(Ok(())))) {
                let connection = server.serve_connection(TokioIo::new(watched), service).into_owned();
                if let Err(error) = watcher.watch(connection).await {
                    tracing::debug!(%error, "connection ended");
                }
            }
            drop(closed);
        });
    }
    graceful.shutdown().await;
}

/// No request of a connection.
const NONE: u64 = u64::MAX;

struct CloseGuard(Arc<AtomicUsize>);

impl Drop for CloseGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn adopt(stream: TcpStream) -> Option<tokio::net::TcpStream> {
    let adopt = || {
        // Events are small writes; waiting to fill a packet would delay each of them.
        stream.set_nodelay(true)?;
        tokio::net::TcpStream::from_std(stream)
    };
    adopt().inspect_err(|error| tracing::debug!(%error, "connection lost before it was served")).ok()
}

fn server() -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .max_headers(HEADERS_MAX);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_send_buf_size(BUFFER_BYTES)
        .max_header_list_size(u32::try_from(BUFFER_BYTES).unwrap_or(u32::MAX))
        .keep_alive_interval(Duration::from_secs(30));
    server
}

/// A client's connection, watched for requests with two lengths, with room for interim responses.
struct Watched {
    stream: tokio::net::TcpStream,
    framing: Framing,
    smuggled: Arc<AtomicU64>,
    interim: Arc<Interim>,
    gap: Gap,
    reset: Arc<AtomicBool>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.reset.load(Relaxed) {
            // Closing a socket that must not linger resets it.
            let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(number) = self.framing.feed(&buf.filled()[before..]) {
            // Only the first one matters: the connection is closed after it.
            let _ = self.smuggled.compare_exchange(NONE, number, Relaxed, Relaxed);
        }
        polled
    }
}

impl Watched {
    fn poll_close_gap(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Watched { stream, interim, gap, .. } = self;
        gap.poll_close(interim, stream, cx)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_close_gap(cx))?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_close_gap(cx))?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Watched { stream, interim, gap, .. } = &mut *self;
        ready!(gap.poll_fill(interim, stream, cx))?;
        Pin::new(stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
