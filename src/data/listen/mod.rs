//! The listener and its workers.
//!
//! One task accepts and hands every connection to the worker that has the fewest; a worker is a thread with a runtime of
//! its own, so a request, its client's connection and its backend's connection never change threads.

mod h2;
mod loopback;
mod places;
mod reserve;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    thread::JoinHandle,
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::places::{Place, Places};
use crate::{
    base::{
        phase::{Life, Phase},
        vital::Vital,
    },
    data::proxy::{Site, client::Closing},
    pool::upstream,
    telemetry::metrics::Metrics,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// Connections on their way to one worker.
const HANDOVER_MAX: usize = 1024;
/// How often it is looked whether the workers have ended.
const ENDED_POLL: Duration = Duration::from_millis(5);
/// Pause when no descriptor is left: closing connections will free some.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// A client sends its request right after connecting. A connection that is younger than this when the proxy stops is
/// therefore not closed before its first bytes have had time to come.
const FIRST_BYTES_GRACE: Duration = Duration::from_secs(1);
/// How much of an answer the kernel takes in beyond what it has sent. Otherwise it takes megabytes, and a client that reads
/// slowly looks for minutes like one that does not read at all.
#[cfg(target_os = "linux")]
const UNSENT_BYTES_MAX: u32 = 32 * 1024;
/// A client whose machine is gone says nothing. Asked so often, it is noticed while its answer is still being computed.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How long requests for pages that are under way when their port closes may take.
const LAST_PAGES_TIME: Duration = Duration::from_secs(1);
/// The first bytes of every HTTP/2 connection (RFC 9113, 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

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

/// Lets this process open as many files as it may, and returns how many clients' connections that is enough for: each
/// may need another one to a backend, and a fifth is left for everything else.
pub fn connections_max() -> usize {
    // Where the limit cannot be raised, what it is must do.
    let files = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    usize::try_from(files / 5 * 2).unwrap_or(usize::MAX)
}

/// The threads that serve connections.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    /// Finish what is under way, take no more.
    finish: Stopper,
    /// End now.
    abort: CancellationToken,
    places: Arc<Places>,
}

#[derive(Debug)]
struct Worker {
    connections: mpsc::Sender<Arrived>,
    open: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

/// A client's connection on its way to the worker that serves it.
#[derive(Debug)]
struct Arrived {
    stream: TcpStream,
    peer: SocketAddr,
    /// It may be one of the reserve.
    place: Place,
}

// === impl Workers ===

impl Workers {
    /// Starts `count` workers that serve `site`, at most `connections_max` connections at a time. `vital` learns when
    /// one ends.
    ///
    /// # Errors
    /// A thread or its runtime cannot be had.
    pub fn start(count: usize, connections_max: usize, site: &Site, vital: &Vital) -> io::Result<Workers> {
        let (finish, abort) = (Stopper::default(), CancellationToken::new());
        let places = Places::new(connections_max.saturating_mul(places::CONNECTION));
        let start = |index: usize| {
            let (connections, incoming) = mpsc::channel(HANDOVER_MAX);
            let open = Arc::new(AtomicUsize::new(0));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let work = work(incoming, site.clone(), open.clone(), places.clone(), finish.clone());
            let (abort, vital) = (abort.clone(), vital.clone());
            let serve = move || {
                upstream::set_worker(index);
                runtime.block_on(abort.run_until_cancelled(work));
                // Whatever is still open is closed without waiting for it.
                runtime.shutdown_background();
                "it returned".to_owned()
            };
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || vital.thread("worker", serve))?;
            Ok(Worker { connections, open, thread })
        };
        let workers = (0..count.max(1)).map(start).collect::<io::Result<Vec<Worker>>>()?;
        Ok(Workers { workers, finish, abort, places })
    }

    /// Accepts connections and hands them out until `life` has come as far as `closing`, and then those that the kernel has accepted already: their
    /// clients may have sent requests. Closes the listener.
    ///
    /// # Errors
    /// The listener cannot be waited for.
    pub async fn accept(&self, listener: TcpListener, life: &Life, closing: Phase) -> io::Result<()> {
        let local = loopback::beside(&listener, BACKLOG).into_iter().map(|listener| (listener, true));
        let is_local = listener.local_addr()?.ip().to_canonical().is_loopback();
        let doors = local.chain([(listener, is_local)]);
        let until = (life, closing);
        let accepting = doors.map(|(listener, is_local)| accept_from(listener, is_local, &self.places, until, self));
        futures::future::try_join_all(accepting).await.map(|_| ())
    }

    /// Lets requests under way finish, for at most `patience`; then ends what is left. Returns whether all finished.
    pub async fn finish(self, patience: Duration) -> bool {
        self.finish.stop();
        let threads: Vec<JoinHandle<()>> = self.workers.into_iter().map(|worker| worker.thread).collect();
        // No other thread waits for them, because there may be no memory for one.
        let all_ended = async || {
            while !threads.iter().all(JoinHandle::is_finished) {
                sleep(ENDED_POLL).await;
            }
        };
        let finished = timeout(patience, all_ended()).await.is_ok();
        self.abort.cancel();
        if !finished {
            all_ended().await;
        }
        finished
    }
}

/// Serves `site` on the calling runtime, at most `connections_max` connections at a time, until `life` has come as far as
/// `closing`. It is for pages that must be shown whatever the workers have to do.
///
/// # Errors
/// The listener cannot be waited for.
pub async fn serve_here(
    listener: TcpListener,
    site: Site,
    connections_max: usize,
    life: &Life,
    closing: Phase,
) -> io::Result<()> {
    let places = Places::new(connections_max.saturating_mul(places::CONNECTION));
    let here = Here { site, places: places.clone(), stopper: Stopper::default(), connections: TaskTracker::new() };
    let accepted = accept_from(listener, false, &places, (life, closing), &here).await;
    here.stopper.stop();
    here.connections.close();
    let _ = timeout(LAST_PAGES_TIME, here.connections.wait()).await;
    accepted
}

/// What takes over connections that have been accepted.
trait TakesOver {
    fn take_over(&self, arrived: Arrived) -> impl Future<Output = ()> + Send;
}

/// Serves connections on the runtime that accepts them.
struct Here {
    site: Site,
    places: Arc<Places>,
    stopper: Stopper,
    connections: TaskTracker,
}

impl TakesOver for Here {
    async fn take_over(&self, Arrived { stream, peer, mut place }: Arrived) {
        let (site, stopper, places) = (self.site.clone(), self.stopper.clone(), self.places.clone());
        self.connections.spawn(async move {
            serve(stream, peer.ip().to_canonical(), site, stopper, (&places, &mut place)).await;
        });
    }
}

impl TakesOver for Workers {
    async fn take_over(&self, arrived: Arrived) {
        let Some(worker) = self.workers.iter().min_by_key(|worker| worker.open.load(Relaxed)) else {
            return;
        };
        worker.open.fetch_add(1, Relaxed);
        if worker.connections.send(arrived).await.is_err() {
            worker.open.fetch_sub(1, Relaxed);
        }
    }
}

/// Accepts connections until `life` has come as far as `closing`, and then those that the kernel has accepted already. All
/// ports are accepted on here, so that all have one policy for the errors of accepting.
async fn accept_from(
    listener: TcpListener,
    is_local: bool,
    places: &Arc<Places>,
    (life, closing): (&Life, Phase),
    server: &impl TakesOver,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let next = async {
            // Others wait in the kernel meanwhile.
            places.room(is_local).await;
            listener.accept().await
        };
        let Some(accepted) = life.until(closing, next).await else { break };
        match accepted {
            // Back to a plain socket: the worker that serves it registers it with its own runtime.
            Ok((stream, peer)) => match stream.into_std() {
                Ok(stream) => server.take_over(Arrived { stream, peer, place: places.admit(is_local) }).await,
                Err(error) => tracing::debug!(%error, "connection lost before it was served"),
            },
            Err(error) if is_exhaustion(&error) => {
                let now = Instant::now();
                let given_up = places.give_up_idle(now);
                places.send_guest_away(now, false);
                tracing::error!(%error, given_up, "cannot accept connections; raise the limit of open files (ulimit -n)");
                sleep(EXHAUSTED_PAUSE).await;
            }
            // The client gave up before it was accepted.
            Err(error) => tracing::debug!(%error, "accept failed"),
        }
    }
    let listener = listener.into_std()?;
    for _ in 0..BACKLOG {
        if !places.has_room(is_local) {
            break;
        }
        match listener.accept() {
            Ok((stream, peer)) if stream.set_nonblocking(true).is_ok() => {
                server.take_over(Arrived { stream, peer, place: places.admit(is_local) }).await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_exhaustion(&error) => break,
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

/// The proxy, or the machine, has no descriptor or memory for another connection.
fn is_exhaustion(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOMEM | Errno::NFILE | Errno::MFILE | Errno::NOBUFS))
}

/// The life of a worker.
async fn work(
    mut incoming: mpsc::Receiver<Arrived>,
    site: Site,
    open: Arc<AtomicUsize>,
    places: Arc<Places>,
    stopper: Stopper,
) {
    let connections = TaskTracker::new();
    // Ends once no connection can be handed over any more and every one that was handed over is served.
    while let Some(Arrived { stream, peer, mut place }) = incoming.recv().await {
        let closed = CloseGuard { open: open.clone(), metrics: site.metrics().clone() };
        closed.metrics.clients_accepted.increment();
        let (site, stopper, places) = (site.clone(), stopper.clone(), places.clone());
        connections.spawn(async move {
            serve(stream, peer.ip().to_canonical(), site, stopper, (&places, &mut place)).await;
            drop((closed, place));
        });
    }
    connections.close();
    connections.wait().await;
}

/// Serves one connection, for which `place` has been taken.
async fn serve(
    stream: TcpStream,
    client_ip: IpAddr,
    site: Site,
    stopper: Stopper,
    (places, place): (&Arc<Places>, &mut Place),
) {
    let stream = match adopt(stream) {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(%error, "connection lost before it was served"),
    };
    let (mut stream, first) = match place.is_reserved() {
        false => (stream, None),
        // Seldom, and large: not part of every connection's state.
        true => match Box::pin(reserve::serve(stream, client_ip, &site, &stopper, (places, place))).await {
            Some((stream, first)) => (stream, Some(first)),
            None => return,
        },
    };
    let now = Instant::now();
    let (seated, young_until) = (places.seat(now), now + FIRST_BYTES_GRACE);
    let told_to_end = async {
        stopper.begun().await;
        sleep_until(young_until).await;
    };
    let read = async {
        match first {
            Some(first) => Some(first),
            None => timeout(site.patience().idle, first_bytes(&mut stream, |_| true)).await.ok().flatten(),
        }
    };
    let first = tokio::select! {
        biased;
        first = read => first,
        () = told_to_end => None,
        () = std::future::poll_fn(|cx| seated.seat.poll_given_up(cx)) => None,
    };
    let Some(first) = first else { return };
    if first.starts_with(HTTP2_PREFACE) {
        h2::serve(stream, first, site, client_ip, stopper, (&seated.seat, places)).await;
    } else {
        site.serve(stream, first, client_ip, stopper.closing().with_seat(seated.seat.clone())).await;
    }
}

/// Reads until it is clear whether this is HTTP/2, and if it is not, until `is_enough`. `None` if the connection ends
/// before.
async fn first_bytes(stream: &mut tokio::net::TcpStream, mut is_enough: impl FnMut(&[u8]) -> bool) -> Option<Vec<u8>> {
    let mut first = Vec::new();
    loop {
        let read = std::future::poll_fn(|cx| {
            crate::data::proxy::client::with_scratch(|scratch| {
                let mut buf = ReadBuf::new(scratch);
                Pin::new(&mut *stream).poll_read(cx, &mut buf).map_ok(|()| {
                    first.extend_from_slice(buf.filled());
                    buf.filled().len()
                })
            })
        });
        if !matches!(read.await, Ok(n) if n > 0) {
            return None;
        }
        let common = first.len().min(HTTP2_PREFACE.len());
        let may_be_http2 = first[..common] == HTTP2_PREFACE[..common];
        if may_be_http2 && common == HTTP2_PREFACE.len() || !may_be_http2 && is_enough(&first) {
            return Some(first);
        }
    }
}

struct CloseGuard {
    open: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

impl Drop for CloseGuard {
    fn drop(&mut self) {
        self.metrics.clients_closed.increment();
        self.open.fetch_sub(1, Relaxed);
    }
}

fn adopt(stream: TcpStream) -> io::Result<tokio::net::TcpStream> {
    // Events are small writes; waiting to fill a packet would delay each of them.
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3);
    let socket = SockRef::from(&stream);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX)?;
    tokio::net::TcpStream::from_std(stream)
}

/// Tells connections that they should come to their end.
#[derive(Debug, Clone, Default)]
struct Stopper {
    has_begun: Arc<AtomicBool>,
    token: CancellationToken,
}

impl Stopper {
    fn stop(&self) {
        self.has_begun.store(true, Relaxed);
        self.token.cancel();
    }

    async fn begun(&self) {
        self.token.cancelled().await;
    }

    fn closing(&self) -> Closing {
        Closing::new(self.has_begun.clone(), self.token.clone().cancelled_owned())
    }
}

/// A connection whose first bytes have been read already.
struct Rewound {
    first: Vec<u8>,
    read: usize,
    stream: tokio::net::TcpStream,
}

impl Rewound {
    fn new(stream: tokio::net::TcpStream, first: Vec<u8>) -> Rewound {
        Rewound { first, read: 0, stream }
    }
}

impl AsyncRead for Rewound {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let rest = &self.first[self.read..];
        if rest.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let n = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..n]);
        self.read += n;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
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
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::{
        base::{
            config::Config,
            phase::{Life, Phase},
        },
        data::proxy::{Port, Proxy},
        observe::{
            pages::{Admin, live::Live},
            report::Reporter,
        },
        pool::table,
        telemetry::Telemetry,
    };

    /// A proxy without backends, which has been told to stop.
    fn site() -> Site {
        let (config, _) = Config::from_vars::<&str, &str>([]).unwrap();
        let (_, table) = table::table();
        let (telemetry, life) = (Telemetry::default(), Life::default());
        life.advance(Phase::Settling);
        let admin = Admin {
            life: life.clone(),
            reporter: Reporter { table: table.clone(), metrics: telemetry.metrics.clone() },
            asks: mpsc::channel(1).0,
            live: Live::new(life),
        };
        Site::new(Arc::new(Proxy::new(&config, table, telemetry, admin)), Port::Data)
    }

    #[tokio::test]
    async fn connections_that_the_kernel_has_accepted_are_served_before_the_port_closes() {
        let listener = bind(Some(Ipv4Addr::LOCALHOST.into()), 0).unwrap();
        let addr = listener.local_addr().unwrap();
        let workers = Workers::start(1, 16, &site(), &crate::base::vital::watch().0).unwrap();
        let mut clients: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(addr).unwrap()).collect();
        for client in &mut clients {
            client.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
        }
        workers.accept(listener, &Life::default(), Phase::Starting).await.unwrap();
        assert!(TcpStream::connect(addr).is_err(), "the port is open");
        assert!(workers.finish(Duration::from_secs(10)).await);
        for mut client in clients {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn what_a_connection_holds_is_small() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let places = Places::new(100);
        let mut place = places.admit(false);
        let serving = serve(stream, Ipv4Addr::LOCALHOST.into(), site(), Stopper::default(), (&places, &mut place));
        // Ten thousand open streams have one each.
        let bytes = size_of_val(&serving);
        assert!(bytes <= 5 * 1024, "{bytes}");
    }
}
