//! HTTP/2 in clear text, as a front proxy may speak it: each of its streams is served as a connection of its own.
//!
//! Backends speak HTTP/1.1, so a request has to become one of HTTP/1.1 somewhere. It does so here, at the door: the h2
//! library takes the connection apart into streams, and each goes on over a pipe in memory to the one engine that serves
//! all ([`stream`]). So there is one way a request is read, limited, retried and cut, and what holds for it holds for both
//! versions.

mod stream;

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, PingPong};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Notify,
    time::{Instant, sleep, timeout},
};

use super::{Rewound, Stopper, places::Places};
use crate::data::proxy::{Site, seat::Seat};

/// Requests at a time on one connection.
const STREAMS_MAX: u32 = 256;
/// Largest list of headers that the library takes. It answers to a larger one by itself, without a word, so that what is
/// too large for the engine has to fit.
const HEADERS_BYTES_MAX: u32 = 512 * 1024;
/// What may wait to be written for one stream.
const BUFFER_BYTES: usize = 32 * 1024;
/// How much a client may send ahead of what is read, of one stream and of all.
const WINDOW_BYTES: u32 = 1024 * 1024;
/// Streams that the client's own mistakes may cost before they cost the connection.
const MISTAKES_MAX: usize = 1024;
/// How often a client is asked whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long it may take to answer while nothing else moves, at least.
const PONG_TIME_MIN: Duration = Duration::from_secs(20);
/// How long the beginning and the end of a connection may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How long a connection that has been told to end may be without a stream.
const GOODBYE_TIME: Duration = Duration::from_secs(1);

/// The streams of one connection that are open.
#[derive(Debug)]
struct Streams {
    open: AtomicUsize,
    changed: Notify,
    seat: Arc<Seat>,
}

/// One of them.
struct OpenStream(Arc<Streams>);

/// A connection that counts the bytes that pass, either way, and tells when all that was to be sent has been.
struct Counted {
    io: Rewound,
    passed: Arc<AtomicUsize>,
    flushed: Arc<Notify>,
}

/// Serves a connection, of which `first` has been read already, to its end.
pub(super) async fn serve(
    io: TcpStream,
    first: Vec<u8>,
    site: Site,
    client_ip: IpAddr,
    stopper: Stopper,
    (seat, places): (&Arc<Seat>, &Arc<Places>),
) {
    let passed = Arc::new(AtomicUsize::new(0));
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(STREAMS_MAX)
        .max_send_buffer_size(BUFFER_BYTES)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_local_error_reset_streams(Some(MISTAKES_MAX))
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    let flushed = Arc::new(Notify::new());
    let io = Counted { io: Rewound::new(io, first), passed: passed.clone(), flushed: flushed.clone() };
    let mut connection = match timeout(HANDSHAKE_TIME, builder.handshake::<_, Bytes>(io)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%error, "HTTP/2 connection ended"),
        Err(_) => return tracing::debug!("HTTP/2 connection did not begin in time"),
    };
    let patience = site.patience();
    let dead = match connection.ping_pong() {
        Some(ping) => until_dead(ping, passed, patience.write.map(|limit| limit.max(PONG_TIME_MIN))),
        None => return,
    };
    tokio::pin!(dead);
    let streams = Arc::new(Streams { open: AtomicUsize::new(0), changed: Notify::new(), seat: seat.clone() });
    seat.is_idle(Instant::now());
    let mut is_closing = false;
    loop {
        let idle_limit = if is_closing { GOODBYE_TIME } else { patience.idle };
        let is_over = tokio::select! {
            biased;
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (site, stream, flushed) = (site.clone(), OpenStream::of(&streams), flushed.clone());
                    // The connection has come with a descriptor for the only one.
                    let places = (streams.open.load(Relaxed) > 1).then(|| places.clone());
                    // Ends with the stream, which the connection outlives.
                    tokio::spawn(async move {
                        stream::serve(request, respond, site, client_ip, places, flushed).await;
                        drop(stream);
                    });
                    continue;
                }
                Some(Err(error)) => return tracing::debug!(%error, "HTTP/2 connection ended"),
                None => return,
            },
            () = stopper.begun(), if !is_closing => false,
            () = std::future::poll_fn(|cx| seat.poll_given_up(cx)), if !is_closing => false,
            () = streams.idle_for(idle_limit) => is_closing,
            () = &mut dead => return tracing::debug!("HTTP/2 connection is dead: its client answers nothing and takes nothing"),
        };
        if is_over {
            return;
        }
        connection.graceful_shutdown();
        is_closing = true;
    }
}

/// Asks the client from time to time whether it is there, and ends once it has not answered for `limit` in which it has
/// sent nothing and taken nothing either. A client that reads slowly gets to the question late.
async fn until_dead(mut ping: PingPong, passed: Arc<AtomicUsize>, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    loop {
        sleep(PING_INTERVAL).await;
        let mut answered = Box::pin(ping.ping(Ping::opaque()));
        let mut before = passed.load(Relaxed);
        loop {
            match timeout(limit, &mut answered).await {
                Ok(Ok(_)) => break,
                // The connection has ended, which is found out elsewhere.
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => {
                    let now = passed.load(Relaxed);
                    if std::mem::replace(&mut before, now) == now {
                        return;
                    }
                }
            }
        }
    }
}

// === impl Streams ===

impl Streams {
    /// Waits until no stream has been open for so long.
    async fn idle_for(&self, limit: Duration) {
        loop {
            let changed = self.changed.notified();
            if self.open.load(Relaxed) > 0 {
                changed.await;
            } else if timeout(limit, changed).await.is_err() {
                return;
            }
        }
    }
}

impl OpenStream {
    fn of(streams: &Arc<Streams>) -> OpenStream {
        streams.open.fetch_add(1, Relaxed);
        streams.seat.is_busy();
        streams.changed.notify_one();
        OpenStream(streams.clone())
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Relaxed) == 1 {
            self.0.seat.is_idle(Instant::now());
        }
        self.0.changed.notify_one();
    }
}

// === impl Counted ===

impl Counted {
    fn count(&self, passed: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(n)) = passed {
            self.passed.fetch_add(*n, Relaxed);
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        self.passed.fetch_add(buf.filled().len() - before, Relaxed);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.count(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.count(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if flushed.is_ready() {
            self.flushed.notify_waiters();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
