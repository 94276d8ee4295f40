//! A client's connection: what has come and is not yet read, what is to be sent and is not yet gone.
//!
//! While nothing waits, a connection holds no buffer: bytes are read into one that all connections of a thread share, and
//! only what must be kept is copied out of it. That, and not the speed of copying, is what makes ten thousand open streams
//! cheap.

mod closing;

use std::{
    cell::RefCell,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};

pub use self::closing::Closing;
use super::turn::Turn;
use crate::{
    data::replay::{BodyFault, Replay},
    wire::http1::head::{HeadEnd, HeadError, RequestHead},
};

/// Most bytes read at a time.
pub const READ_BYTES: usize = 64 * 1024;
/// Most bytes that are taken in from a client whose turn it is not: of a request sent behind the one being served, or of a
/// body that its backend does not read yet. Past it the client has to wait, and it is not noticed if it leaves.
pub const AHEAD_BYTES_MAX: usize = 16 * 1024;
/// Time for a request's head, from its first byte.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a body may stand still. However long it takes in all is the client's business.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a head that has begun may take while the proxy shuts down.
const HEAD_TIMEOUT_AT_SHUTDOWN: Duration = Duration::from_secs(1);
/// How much is decoded of a compressed body before others have a turn: about half a millisecond.
const DECODED_BYTES_A_TURN: u64 = 64 * 1024;
/// How long a client that has its answer may go on sending. What it sends is thrown away, because a reset would reach it
/// before it has read the answer (RFC 9112, 9.6).
const LINGER_TIME: Duration = Duration::from_secs(30);
/// How long such a client may send nothing.
const LINGER_SILENCE: Duration = Duration::from_secs(5);
/// The same while the proxy shuts down.
const LINGER_SILENCE_AT_SHUTDOWN: Duration = Duration::from_secs(1);
/// Buffers larger than this are given back when they are empty.
const KEPT_BYTES_MAX: usize = 4 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Lends the buffer that all connections of this thread read into.
pub fn with_scratch<R>(use_it: impl FnOnce(&mut [u8]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| use_it(scratch))
}

/// What a client's connection runs over.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// The end of the connection must not look like the end of an answer: make it a reset.
    fn reset_on_close(&self);
}

impl Transport for TcpStream {
    fn reset_on_close(&self) {
        // Closing a socket that must not linger resets it.
        let _ = socket2::SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
}

impl Transport for tokio::io::DuplexStream {
    fn reset_on_close(&self) {}
}

/// One client's connection.
#[derive(Debug)]
pub struct Client<S> {
    io: S,
    /// Come, and read up to `read`.
    inbox: Vec<u8>,
    read: usize,
    /// To be sent, and gone up to `gone`.
    outbox: Vec<u8>,
    gone: usize,
    deadline: Deadline,
    /// When a client that takes nothing is given up; allocated when one takes nothing for the first time.
    stall: Option<Deadline>,
    /// When a client that has its answer may no longer send.
    lingers_until: Option<Instant>,
    patience: Patience,
    closing: Closing,
    has_left: bool,
    /// More of a body can be decoded, when others have been served.
    turn: Option<Turn>,
    /// It took nothing of its answer for too long.
    has_stalled: bool,
}

/// How long a connection waits for its client.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a request: `PROXY_CLIENT_IDLE_TIMEOUT`. Longer than front proxies keep idle connections, so that they close
    /// first: a request that is sent into a connection while it is being closed is lost.
    pub idle: Duration,
    /// For the client to take any of what waits to be sent: `PROXY_CLIENT_WRITE_TIMEOUT`. `None`: for ever.
    pub write: Option<Duration>,
}

/// The client has closed its connection, or it broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// What comes next on a connection.
#[derive(Debug)]
pub enum Next {
    /// A request, whose head has been read.
    Request,
    /// Nothing: the client has left, stays silent, or is told to go elsewhere because the proxy is shutting down.
    End,
    /// Something that is no request.
    Nonsense(HeadError),
    /// A head that takes too long.
    TooSlow,
}

/// A point in time that may be moved often and is seldom reached: moving it later costs nothing.
#[derive(Debug)]
struct Deadline {
    at: Option<Instant>,
    timer: Pin<Box<Sleep>>,
    is_armed: bool,
}

// === impl Client ===

impl<S: Transport> Client<S> {
    /// The connection `io`, of which `first` has been read already. `closing` tells when it should come to its end.
    pub fn new(io: S, first: Vec<u8>, patience: Patience, closing: Closing) -> Client<S> {
        Client {
            io,
            inbox: first,
            read: 0,
            outbox: Vec::new(),
            gone: 0,
            deadline: Deadline::unset(),
            stall: None,
            lingers_until: None,
            patience,
            closing,
            has_left: false,
            turn: None,
            has_stalled: false,
        }
    }

    /// The connection carries one request.
    pub fn is_for_one(&self) -> bool {
        self.closing.is_after_one
    }

    // --- reading ---

    /// What has come and has not been taken.
    pub fn unread(&self) -> &[u8] {
        &self.inbox[self.read..]
    }

    /// Takes the first `n` bytes of what has come.
    pub fn take(&mut self, n: usize) {
        self.read += n;
        debug_assert!(self.read <= self.inbox.len(), "only what has come can be taken");
        if self.read == self.inbox.len() {
            clear(&mut self.inbox, &mut self.read);
        }
    }

    /// Reads once, at most `most` bytes.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<Result<(), Gone>> {
        let Client { io, inbox, read, .. } = self;
        let filled = with_scratch(|scratch| {
            let mut buf = ReadBuf::new(&mut scratch[..most]);
            match ready!(Pin::new(io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {
                    if *read > 0 {
                        inbox.drain(..*read);
                        *read = 0;
                    }
                    inbox.extend_from_slice(buf.filled());
                    Poll::Ready(Ok(()))
                }
                Ok(()) | Err(_) => Poll::Ready(Err(Gone)),
            }
        });
        self.has_left |= filled == Poll::Ready(Err(Gone));
        filled
    }

    /// Reads ahead of what is being served, to notice if the client leaves. Never ready otherwise.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        while let room @ 1.. = AHEAD_BYTES_MAX.saturating_sub(self.unread().len()) {
            match ready!(self.poll_fill(cx, room)) {
                Ok(()) => {}
                Err(gone) => return Poll::Ready(gone),
            }
        }
        Poll::Pending
    }

    /// Waits for `future`, unless the client leaves before it is done.
    ///
    /// # Errors
    /// The client has left.
    pub async fn unless_gone<F: Future>(&mut self, future: F) -> Result<F::Output, Gone> {
        tokio::pin!(future);
        std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => self.poll_gone(cx).map(Err),
        })
        .await
    }

    /// Reads the head of the next request into `head`.
    pub async fn next(&mut self, head: &mut RequestHead) -> Next {
        self.turn = None;
        let mut end = HeadEnd::default();
        let mut begun = has_begun(self.unread());
        let now = Instant::now();
        self.deadline.at = Some(now + if begun { HEAD_TIMEOUT } else { self.patience.idle });
        if begun {
            self.closing.is_busy();
        } else {
            self.closing.is_idle(now);
        }
        loop {
            match end.find(self.unread()) {
                Ok(Some(length)) => {
                    self.deadline.at = None;
                    let read = head.read(&self.inbox[self.read..][..length]);
                    self.take(length);
                    return read.map_or_else(Next::Nonsense, |()| Next::Request);
                }
                Ok(None) => {}
                Err(error) => return Next::Nonsense(error),
            }
            let waited = std::future::poll_fn(|cx| {
                if let Poll::Ready(filled) = self.poll_fill(cx, READ_BYTES) {
                    return Poll::Ready(filled.map_err(|Gone| Next::End));
                }
                let closes = self.closing.poll_begun(cx);
                if closes && begun {
                    self.deadline.no_later_than(Instant::now() + HEAD_TIMEOUT_AT_SHUTDOWN);
                } else if closes {
                    return Poll::Ready(Err(Next::End));
                }
                if !begun && self.closing.poll_given_up(cx).is_ready() {
                    return Poll::Ready(Err(Next::End));
                }
                match self.deadline.poll(cx) {
                    Poll::Ready(()) => Poll::Ready(Err(if begun && !closes { Next::TooSlow } else { Next::End })),
                    Poll::Pending => Poll::Pending,
                }
            });
            if let Err(end) = waited.await {
                return end;
            }
            if !begun && has_begun(self.unread()) {
                begun = true;
                self.closing.is_busy();
                self.deadline.at = Some(Instant::now() + HEAD_TIMEOUT);
            }
        }
    }

    /// Waits for more of `body`, having sent all that is to be sent, or until it has to give way to others.
    ///
    /// # Errors
    /// The client has left.
    pub async fn more_body(&mut self, body: &Replay) -> Result<BodyWait, Gone> {
        self.expect_body();
        std::future::poll_fn(|cx| {
            if body.poll_gave_way(cx).is_ready() {
                return Poll::Ready(Ok(BodyWait::TooSlow));
            }
            if let Poll::Ready(Err(gone)) = self.poll_flush(cx) {
                return Poll::Ready(Err(gone));
            }
            self.poll_body(cx, READ_BYTES)
        })
        .await
    }

    /// Gives what has come to the body it belongs to, as much as is good at a time; returns whether some is left.
    ///
    /// # Errors
    /// The body cannot be passed on.
    pub fn feed(&mut self, body: &mut Replay, model_is_known: bool) -> Result<bool, BodyFault> {
        if !model_is_known {
            body.at(Instant::now());
        }
        self.turn = None;
        let enough = body.decoded_bytes().saturating_add(DECODED_BYTES_A_TURN);
        loop {
            let unread = self.unread();
            let bite = unread.len().min(body.bite_bytes());
            let is_last = bite == unread.len();
            let (taken, kept) = body.take_in(&unread[..bite], model_is_known);
            self.take(taken);
            kept?;
            if is_last || taken == 0 || body.is_over() {
                return Ok(false);
            }
            if body.decoded_bytes() >= enough {
                self.turn = Some(Turn::begin());
                return Ok(true);
            }
        }
    }

    /// Ready when [`feed`](Self::feed) may be called: others go first if it has left something.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.turn.as_mut().map_or(Poll::Ready(()), |turn| turn.poll(cx))
    }

    /// From now on the client is expected to go on with its body.
    pub fn expect_body(&mut self) {
        self.deadline.at = Some(Instant::now() + BODY_TIMEOUT);
    }

    /// The client is not expected to send anything.
    pub fn expect_nothing(&mut self) {
        self.turn = None;
        self.deadline.at = None;
    }

    /// More of a request's body has come, at most `most` bytes, or it takes too long.
    pub fn poll_body(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<Result<BodyWait, Gone>> {
        if self.deadline.at.is_none() {
            self.expect_body();
        }
        match self.poll_fill(cx, most) {
            Poll::Ready(filled) => Poll::Ready(filled.map(|()| BodyWait::More)),
            Poll::Pending => self.deadline.poll(cx).map(|()| Ok(BodyWait::TooSlow)),
        }
    }

    // --- writing ---

    /// Where to put what is to be sent.
    pub fn outbox(&mut self) -> &mut Vec<u8> {
        &mut self.outbox
    }

    /// Something waits to be sent.
    pub fn has_unsent(&self) -> bool {
        self.gone < self.outbox.len()
    }

    /// Sends what waits to be sent.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        while self.gone < self.outbox.len() {
            match Pin::new(&mut self.io).poll_write(cx, &self.outbox[self.gone..]) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    self.gone += n;
                    if let Some(stall) = &mut self.stall {
                        stall.at = None;
                    }
                }
                Poll::Ready(_) => {
                    self.has_left = true;
                    return Poll::Ready(Err(Gone));
                }
                Poll::Pending => return self.poll_stalled(cx),
            }
        }
        if self.gone > 0 {
            clear(&mut self.outbox, &mut self.gone);
        }
        Poll::Ready(Ok(()))
    }

    /// The client takes nothing at the moment: ready once that has lasted for too long.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        let Some(limit) = self.patience.write else { return Poll::Pending };
        let stall = self.stall.get_or_insert_with(Deadline::unset);
        stall.at.get_or_insert_with(|| Instant::now() + limit);
        ready!(stall.poll(cx));
        tracing::debug!(?limit, "a client took nothing of its answer and is given up (PROXY_CLIENT_WRITE_TIMEOUT)");
        (self.has_left, self.has_stalled) = (true, true);
        Poll::Ready(Err(Gone))
    }

    /// Sends these bytes behind what waits to be sent; keeps what cannot be sent now.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, mut bytes: &[u8]) -> Result<(), Gone> {
        if !self.has_unsent() {
            while !bytes.is_empty() {
                match Pin::new(&mut self.io).poll_write(cx, bytes) {
                    Poll::Ready(Ok(n)) if n > 0 => bytes = &bytes[n..],
                    Poll::Ready(_) => {
                        self.has_left = true;
                        return Err(Gone);
                    }
                    Poll::Pending => break,
                }
            }
        }
        self.outbox.extend_from_slice(bytes);
        Ok(())
    }

    /// Sends all that waits to be sent.
    ///
    /// # Errors
    /// The client has left.
    pub async fn flush(&mut self) -> Result<(), Gone> {
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Sends all that waits to be sent, unless the client leaves before it has taken it. Tells `passed` each time whether
    /// it has taken all.
    ///
    /// # Errors
    /// The client has left.
    pub async fn deliver(&mut self, mut passed: impl FnMut(bool)) -> Result<(), Gone> {
        std::future::poll_fn(|cx| {
            let flushed = self.poll_flush(cx);
            passed(flushed.is_ready());
            match flushed {
                Poll::Pending => self.poll_gone(cx).map(Err),
                taken @ Poll::Ready(_) => taken,
            }
        })
        .await
    }

    // --- the end ---

    /// Ends the connection in an orderly way: the client gets all that was sent to it, even if it is still sending.
    pub async fn close(mut self) {
        // Fails if the client has left or does not read: there is nothing to wait for.
        let _ = self.linger().await;
        let by_reset = false;
        self.abort(by_reset);
    }

    async fn linger(&mut self) -> Result<(), Gone> {
        self.flush().await?;
        std::future::poll_fn(|cx| Pin::new(&mut self.io).poll_shutdown(cx)).await.map_err(|_| Gone)?;
        loop {
            self.take(self.unread().len());
            self.more_unwanted().await?;
        }
    }

    /// Waits for more of a body that is not needed.
    ///
    /// # Errors
    /// The client has left, is silent, or has been sending for too long since it was first waited for like this.
    pub async fn more_unwanted(&mut self) -> Result<(), Gone> {
        if self.has_left {
            return Err(Gone);
        }
        let until = *self.lingers_until.get_or_insert_with(|| Instant::now() + LINGER_TIME);
        self.deadline.at = Some(until.min(Instant::now() + LINGER_SILENCE));
        let more = std::future::poll_fn(|cx| {
            if let filled @ Poll::Ready(_) = self.poll_fill(cx, READ_BYTES) {
                return filled;
            }
            if self.closing.poll_begun(cx) {
                self.deadline.no_later_than(Instant::now() + LINGER_SILENCE_AT_SHUTDOWN);
            }
            self.deadline.poll(cx).map(|()| Err(Gone))
        });
        let more = more.await;
        self.deadline.at = None;
        // A client that always has something to say is never waited for.
        if Instant::now() < until { more } else { Err(Gone) }
    }

    /// Nothing that the client sends now belongs to an answered request: the next one has all of its time.
    pub fn has_caught_up(&mut self) {
        self.lingers_until = None;
    }

    /// Ends the connection at once, and not cleanly if that could be taken for the end of an answer.
    pub fn abort(self, by_reset: bool) {
        // The kernel would keep what a client does not read for as long as that client wants.
        if by_reset || self.has_stalled {
            self.io.reset_on_close();
        }
    }
}

/// What waiting for more of a body came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyWait {
    /// More has come.
    More,
    /// It has stood still for too long, or was held for too long where others needed the room.
    TooSlow,
}

/// Empty lines in front of a request are none of it (RFC 9112, 2.2): some clients send one behind a body.
fn has_begun(unread: &[u8]) -> bool {
    unread.iter().any(|byte| !matches!(byte, b'\r' | b'\n'))
}

fn clear(buffer: &mut Vec<u8>, position: &mut usize) {
    *position = 0;
    if buffer.capacity() > KEPT_BYTES_MAX { *buffer = Vec::new() } else { buffer.clear() }
}

// === impl Deadline ===

impl Deadline {
    fn unset() -> Deadline {
        Deadline { at: None, timer: Box::pin(sleep_until(Instant::now())), is_armed: false }
    }

    fn no_later_than(&mut self, at: Instant) {
        if self.at.is_none_or(|before| before > at) {
            self.at = Some(at);
        }
    }

    /// Ready once the point in time has been reached. Always to be polled by the same task.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.at else { return Poll::Pending };
        // The timer wakes the task by itself, early if the point has moved since: there is nothing to do until then.
        if self.is_armed && !self.timer.is_elapsed() && self.timer.deadline() <= at {
            return Poll::Pending;
        }
        self.timer.as_mut().reset(at);
        self.is_armed = true;
        // A task that has used up its turn would not be entered into the timer, and this is the only time it is asked.
        let timer = tokio::task::unconstrained(self.timer.as_mut());
        std::pin::pin!(timer).poll(cx)
    }
}

#[cfg(test)]
mod tests;
