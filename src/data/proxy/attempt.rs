//! One attempt to have a request served: it is sent over one connection of one backend, until the head of an answer comes.
//!
//! Sending, waiting and watching the client go on at the same time, in the client's own task: a backend may answer before
//! it has read everything, and a client may leave at any moment.

use std::{
    io::IoSlice,
    task::{Context, Poll},
    time::Duration,
};

use http::{Method, StatusCode};
use tokio::time::{Instant, sleep};

use super::{
    call::Call,
    client::{BodyWait, Client, Gone, READ_BYTES, Transport, with_scratch},
    failure::{Failure, Stage, why_no_head, why_no_http},
    headers::{self, ToBackend},
    paths,
};
use crate::{
    base::error::ProxyError,
    data::replay::{BodyFault, Cursor, Replay},
    pool::{backend::InFlight, upstream::Lease},
    wire::http1::{
        head::{HeadEnd, Known, RequestHead, ResponseHead, Version},
        own_address::OwnAddress,
    },
};

/// Most bytes of an answer read at a time, and so the most that one stalled stream holds here.
pub const ANSWER_READ_BYTES: usize = 32 * 1024;
/// Most interim answers before the final one.
const INTERIM_MAX: u32 = 64;
/// Interim answers that a client has not read yet; more are dropped, they are hints.
const INTERIM_BYTES_MAX: usize = 16 * 1024;

/// So much of a request a backend's machine takes in, though the backend itself reads nothing of it.
const UNREAD_BYTES_MAX: u64 = 48 * 1024;

/// A request on its way over one connection.
#[derive(Debug)]
pub struct Attempt {
    /// The connection.
    pub lease: Lease,
    /// The head, as it is sent.
    head: Vec<u8>,
    head_gone: usize,
    /// When as much had been written as could be at first.
    pub written_at: Option<Instant>,
    cursor: Cursor,
    /// What has come of the answer and has not been passed on.
    pub inbound: Vec<u8>,
    end: HeadEnd,
    has_heard: bool,
    /// The backend takes no more of the request. It may have answered all the same.
    write_failed: bool,
    interim_left: u32,
    /// Interim answers have been passed on to the client.
    has_passed_on: bool,
    /// The head of the answer had come before all of the request was sent.
    is_early: bool,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Stop {
    /// The backend failed, or ran out of time.
    Failed(Failure, Stage),
    /// The client left.
    Gone,
    /// The request's body cannot be passed on.
    Fault(BodyFault),
    /// The request's body stands still.
    TooSlow,
    /// The request may not be sent to this backend.
    Refused(ProxyError),
}

impl<S: Transport> Call<'_, S> {
    /// Sends the request once, to the backend where it has a slot, and waits for the head of an answer.
    ///
    /// # Errors
    /// There will be no answer to this attempt.
    pub(super) async fn attempt(
        &mut self,
        in_flight: &InFlight,
        fresh_only: bool,
    ) -> Result<(ResponseHead, Attempt), Stop> {
        let Call { proxy, client, asked, is_below_v1, replay, account } = self;
        let now = Instant::now();
        account.is_sent(now);
        let backend = in_flight.backend();
        if *is_below_v1 && !paths::may_be_below(&backend.spec.base_path, asked.head.path()) {
            let message = "no such path here: inference.api.base_path of the model's container is no version, \
                           such as /v1, and behind it only paths of known APIs are forwarded";
            return Err(Stop::Refused(ProxyError::NoSuchPath { message: message.to_owned() }));
        }
        account.trace.attempt_begins(asked.head, backend, in_flight.model());
        let idle = if fresh_only { None } else { backend.upstream.lease_idle(now) };
        let lease = match idle {
            Some(lease) => {
                proxy.metrics.upstream_reused.increment();
                lease
            }
            None => {
                let began = Instant::now();
                let leased = client.unless_gone(backend.upstream.lease_fresh()).await?;
                account.has_waited(began.elapsed());
                let unanswered = Stage::Unanswered { reused: false };
                let lease = leased.map_err(|error| Stop::Failed(error.into(), unanswered))?;
                proxy.metrics.upstream_opened.increment();
                lease
            }
        };
        let upgrades = asked.head.method == Method::GET && asked.head.asks_for_websocket();
        let mut sent = Vec::with_capacity(1024);
        let to = ToBackend {
            base_path: Some(&*backend.spec.base_path).filter(|path| *is_below_v1 && *path != "/v1"),
            authority: &backend.authority,
            client_ip: asked.client_ip,
            request_id: asked.id.as_bytes(),
            trace: account.trace.headers(),
            upgrades,
        };
        headers::push_request(&mut sent, asked.head, &to);
        let mut attempt = Attempt::new(lease, sent);
        let limit = proxy.head_limit().map(|(limit, _)| limit);
        let head = attempt.answer(client, replay, asked.head, upgrades, limit, &backend.own_address).await?;
        Ok((head, attempt))
    }
}

impl From<Gone> for Stop {
    fn from(Gone: Gone) -> Stop {
        Stop::Gone
    }
}

impl From<BodyFault> for Stop {
    fn from(fault: BodyFault) -> Stop {
        Stop::Fault(fault)
    }
}

impl Attempt {
    /// A request with this head, about to be sent over `lease`.
    pub fn new(lease: Lease, head: Vec<u8>) -> Attempt {
        Attempt {
            lease,
            head,
            head_gone: 0,
            written_at: None,
            cursor: Cursor::default(),
            inbound: Vec::new(),
            end: HeadEnd::default(),
            has_heard: false,
            write_failed: false,
            interim_left: INTERIM_MAX,
            has_passed_on: false,
            is_early: false,
        }
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        match (self.has_heard, self.has_passed_on) {
            (_, true) => Stage::Answered,
            (true, false) => Stage::Begun,
            (false, false) => Stage::Unanswered { reused: self.lease.reused },
        }
    }

    /// The way to its answer leaves a doubt where the next one on this connection would begin: it came before all of the
    /// request was sent, so perhaps the rest was not read, or after interim answers, so perhaps another one is on its way.
    pub fn leaves_doubt(&self) -> bool {
        self.is_early || self.interim_left < INTERIM_MAX
    }

    /// No head of an answer comes any more.
    fn failed(&self, failure: Failure) -> Stop {
        // Interim answers are no answer: what the client gets can still be an error of the proxy's own.
        let stage = if self.has_passed_on { Stage::Begun } else { self.stage() };
        Stop::Failed(failure, stage)
    }

    /// Sends, and waits for the head of the answer, for up to `limit` where it is the backend that is waited for.
    ///
    /// # Errors
    /// There will be none on this connection.
    pub async fn answer<S: Transport>(
        &mut self,
        client: &mut Client<S>,
        replay: &mut Replay,
        request: &RequestHead,
        upgrades: bool,
        limit: Option<Duration>,
        own_address: &OwnAddress,
    ) -> Result<ResponseHead, Stop> {
        let mut timer = limit.map(|limit| (limit, Box::pin(sleep(limit))));
        let mut is_held_up = false;
        std::future::poll_fn(|cx| {
            self.lease.use_in(cx);
            loop {
                if self.lease.is_cut() {
                    return Poll::Ready(Err(self.failed(Failure::Ended)));
                }
                if let Poll::Ready(Err(Gone)) = client.poll_flush(cx) {
                    return Poll::Ready(Err(Stop::Gone));
                }
                if let Err(stop) = self.poll_upload(cx, client, replay) {
                    return Poll::Ready(Err(stop));
                }
                if self.written_at.is_none() {
                    self.written_at = Some(Instant::now());
                }
                match self.poll_head(cx) {
                    Poll::Pending => break,
                    Poll::Ready(Err(failure)) => return Poll::Ready(Err(self.failed(failure))),
                    Poll::Ready(Ok(head)) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                        return Poll::Ready(if upgrades && head.lines.lists_only(Known::Upgrade, "websocket") {
                            Ok(head)
                        } else {
                            Err(self.failed(Failure::InvalidAnswer("it changes to a protocol that was not asked for")))
                        });
                    }
                    Poll::Ready(Ok(head)) if head.status.is_informational() => {
                        let Some(left) = self.interim_left.checked_sub(1) else {
                            let why = "it sends more than 64 interim answers (1xx) before the answer";
                            return Poll::Ready(Err(self.failed(Failure::InvalidAnswer(why))));
                        };
                        self.interim_left = left;
                        // The client was told to go on by the proxy, and HTTP/1.0 knows no interim answers.
                        let passes = head.status != StatusCode::CONTINUE && request.version == Version::Http11;
                        if passes && client.outbox().len() < INTERIM_BYTES_MAX {
                            self.has_passed_on = true;
                            headers::push_interim(client.outbox(), &head, own_address);
                        }
                    }
                    Poll::Ready(Ok(head)) => {
                        self.is_early = !self.is_sent(replay);
                        return Poll::Ready(Ok(head));
                    }
                }
            }
            if replay.is_over() && client.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(Stop::Gone));
            }
            let Some((limit, timer)) = &mut timer else { return Poll::Pending };
            // As long as it is the client that does not go on, the time is not the backend's.
            if self.awaits_client(replay) {
                is_held_up = true;
                return Poll::Pending;
            }
            if std::mem::take(&mut is_held_up) {
                timer.as_mut().reset(Instant::now() + *limit);
            }
            timer.as_mut().poll(cx).map(|()| Err(self.failed(Failure::TimedOut)))
        })
        .await
    }

    /// Sends what can be sent, and takes in more of the body as long as the backend keeps up.
    ///
    /// # Errors
    /// The client left, or its body is no good.
    pub fn poll_upload<S: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client<S>,
        replay: &mut Replay,
    ) -> Result<(), Stop> {
        loop {
            self.poll_write(cx, replay);
            if replay.is_over() {
                return Ok(());
            }
            if self.write_failed || !replay.takes_more(self.cursor) {
                // Nothing can be done with more of it; but whether its sender is still there matters.
                client.expect_nothing();
                return if client.poll_gone(cx).is_ready() { Err(Stop::Gone) } else { Ok(()) };
            }
            if client.unread().is_empty() {
                match client.poll_body(cx, replay.read_bytes(READ_BYTES)) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Err(Gone)) => return Err(Stop::Gone),
                    Poll::Ready(Ok(BodyWait::TooSlow)) => return Err(Stop::TooSlow),
                    Poll::Ready(Ok(BodyWait::More)) => {}
                }
            }
            if client.poll_turn(cx).is_pending() {
                return Ok(());
            }
            client.feed(replay, true)?;
            if replay.is_over() { client.expect_nothing() } else { client.expect_body() }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, replay: &mut Replay) {
        const SLICES: usize = 8;
        while !self.write_failed {
            let head = &self.head[self.head_gone..];
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut filled = 0;
            if !head.is_empty() {
                slices[0] = IoSlice::new(head);
                filled = 1;
            }
            filled += replay.unsent(self.cursor, &mut slices[filled..]);
            if filled == 0 {
                return;
            }
            let of_head = head.len();
            match self.lease.poll_write(cx, &slices[..filled]) {
                Poll::Pending => return,
                Poll::Ready(Ok(n)) if n > 0 => {
                    self.head_gone += n.min(of_head);
                    replay.advance(&mut self.cursor, n.saturating_sub(of_head));
                    if self.cursor.sent_bytes() > UNREAD_BYTES_MAX {
                        self.lease.wait_for_its_reader();
                    }
                }
                Poll::Ready(_) => self.write_failed = true,
            }
        }
    }

    /// The next head that the backend sends.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, Failure>> {
        loop {
            match self.end.find(&self.inbound) {
                Err(error) => return Poll::Ready(Err(Failure::InvalidAnswer(why_no_head(error)))),
                Ok(None) => {}
                Ok(Some(length)) => {
                    let head = ResponseHead::read(&self.inbound[..length]);
                    self.inbound.drain(..length);
                    return Poll::Ready(head.map_err(|error| Failure::InvalidAnswer(why_no_head(error))));
                }
            }
            let Attempt { lease, inbound, .. } = self;
            let read = with_scratch(|scratch| {
                lease.poll_read(cx, &mut scratch[..ANSWER_READ_BYTES]).map_ok(|n| {
                    inbound.extend_from_slice(&scratch[..n]);
                    n
                })
            });
            match read {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(n)) if n > 0 => self.has_heard = true,
                Poll::Ready(_) => {
                    return Poll::Ready(Err(why_no_http(&self.inbound).map_or(Failure::Ended, Failure::InvalidAnswer)));
                }
            }
        }
    }

    /// All that has come of the request has been sent, and there is more to come.
    fn awaits_client(&self, replay: &Replay) -> bool {
        !self.write_failed
            && !replay.is_over()
            && self.head_gone == self.head.len()
            && replay.unsent_bytes(self.cursor) == 0
    }

    /// The answer has begun: there will be no other attempt.
    pub fn forget_sent(&mut self, replay: &mut Replay) {
        self.head = Vec::new();
        self.head_gone = 0;
        replay.forget_sent(self.cursor);
    }

    /// The backend takes no more of the request.
    pub fn is_refused(&self) -> bool {
        self.write_failed
    }

    /// The whole request has been sent.
    pub fn is_sent(&self, replay: &Replay) -> bool {
        !self.write_failed && self.head_gone == self.head.len() && replay.is_sent(self.cursor)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{net::SocketAddr, sync::Arc, time::Duration};

    use tokio::{
        io::DuplexStream,
        net::{TcpListener, TcpStream},
    };
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        data::{
            proxy::client::{Closing, Patience},
            replay::BodyLimits,
        },
        pool::upstream::Upstream,
        wire::http1::body::Framing,
    };

    /// A client with the other end of its connection, which takes `room` bytes before they are read, and an attempt with
    /// the backend's end of its own.
    pub(in crate::data::proxy) async fn under_way(
        room: usize,
    ) -> (Client<DuplexStream>, DuplexStream, Attempt, TcpStream) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let upstream = Upstream::new(listener.local_addr().unwrap(), Duration::from_secs(60), 1);
        let lease = upstream.lease_fresh().await.unwrap();
        let (backend, _) = listener.accept().await.unwrap();
        let (here, there) = tokio::io::duplex(room);
        let closing = Closing::new(Arc::default(), CancellationToken::new().cancelled_owned());
        let patience = Patience { idle: Duration::from_secs(650), write: Some(Duration::from_secs(60)) };
        (Client::new(here, Vec::new(), patience, closing), there, Attempt::new(lease, b"head".to_vec()), backend)
    }

    pub(in crate::data::proxy) fn own_address() -> OwnAddress {
        OwnAddress::new(SocketAddr::from(([127, 0, 0, 1], 1)), [], "/v1")
    }

    fn replay() -> Replay {
        Replay::new(Framing::Length(1 << 30), None, &BodyLimits::new(u64::MAX, usize::MAX))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stands_still_once_its_model_is_known_has_an_end() {
        let (mut client, _there, mut attempt, _backend) = under_way(64 * 1024).await;
        let (mut replay, head, own) = (replay(), RequestHead::default(), own_address());
        let answer = attempt.answer(&mut client, &mut replay, &head, false, None, &own);
        let stopped = tokio::time::timeout(Duration::from_secs(600), answer).await;
        assert!(matches!(stopped, Ok(Err(Stop::TooSlow))), "{stopped:?}");
    }
}
