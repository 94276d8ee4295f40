//! An answer on its way to the client: bytes pass as they come; what they mean is only looked at.
//!
//! A chunk that was read in one piece is sent in one piece, framing and all. What ends abnormally at the backend ends
//! abnormally at the client, after an event that says so where the answer is a stream of events.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep};

use super::{
    attempt::{ANSWER_READ_BYTES, Attempt, Stop},
    client::{Client, Gone, READ_BYTES, Transport, with_scratch},
    failure::Failure,
    headers::Delivery,
};
use crate::{
    data::replay::Replay,
    wire::http1::body::{BodyDecoder, Framing, FramingError, LAST_CHUNK, push_chunk, push_last_chunk},
};

/// What watches an answer go by.
pub trait Watch {
    /// A stretch of payload, on its way.
    fn payload(&mut self, payload: &[u8]);

    /// What has come so far has been passed on, all of it or what the client takes at the moment.
    fn passed(&mut self, _is_all: bool) {}
}

/// An answer's body on its way.
#[derive(Debug)]
pub struct Relay {
    decoder: BodyDecoder,
    /// The backend sends it in chunks.
    is_chunked: bool,
    delivery: Delivery,
    /// The backend sent more than its answer.
    has_surplus: bool,
    silence: Option<Silence>,
    /// The client has not taken what there is.
    is_held_up: bool,
}

/// Watches for silence, where that is asked for.
#[derive(Debug)]
pub(super) struct Silence {
    pub(super) limit: Duration,
    timer: Pin<Box<Sleep>>,
}

/// Why a transfer was cut. The client sees it as an abnormal end, never as a clean one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Cut {
    /// The backend's connection ended.
    #[error("its connection ended")]
    Ended,
    /// The backend was stopped, or drained for too long.
    #[error("it was stopped")]
    Stopped,
    /// The framing of the answer broke.
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// The backend fell silent for longer than `PROXY_IDLE_TIMEOUT`.
    #[error("it sent nothing for {0:?} (PROXY_IDLE_TIMEOUT)")]
    Silent(Duration),
    /// The client's body turned out to be wrong while it was being answered.
    #[error("the request's body turned out to be wrong")]
    Request,
}

/// How the relaying of an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relayed {
    /// All of it has come. What the client has not been sent yet is in its outbox.
    Complete,
    /// It was cut.
    Cut(Cut),
    /// The client left.
    Gone,
}

impl From<Cut> for Failure {
    fn from(cut: Cut) -> Failure {
        match cut {
            Cut::Ended => Failure::Ended,
            Cut::Stopped => Failure::Stopped,
            Cut::Framing(error) => Failure::InvalidAnswer(error.why()),
            Cut::Silent(_) => Failure::TimedOut,
            Cut::Request => Failure::ClientBroke,
        }
    }
}

impl Silence {
    pub(super) fn new(limit: Duration) -> Silence {
        Silence { limit, timer: Box::pin(sleep(limit)) }
    }

    /// It begins anew.
    pub(super) fn is_broken(&mut self) {
        self.timer.as_mut().reset(Instant::now() + self.limit);
    }

    pub(super) fn poll_too_long(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.timer.as_mut().poll(cx)
    }
}

impl Relay {
    /// A relay for a body with this framing, for a client that is told of it by `delivery`.
    pub fn new(framing: Framing, delivery: Delivery, idle_timeout: Option<Duration>) -> Relay {
        Relay {
            decoder: BodyDecoder::new(framing),
            is_chunked: framing == Framing::Chunked,
            delivery,
            has_surplus: false,
            silence: idle_timeout.map(Silence::new),
            is_held_up: false,
        }
    }

    /// The connection can carry another request, as far as the answer is concerned.
    pub fn is_clean(&self) -> bool {
        self.decoder.is_done() && !self.has_surplus
    }

    /// Relays until the backend has done its part, whatever end that is. What is left of the request goes on being sent
    /// meanwhile.
    ///
    /// The last of a whole answer stays in the client's outbox: its connection and its place are free for the next request
    /// before the client can know that there is room for one, and however slowly it reads.
    pub async fn run<S: Transport>(
        &mut self,
        client: &mut Client<S>,
        attempt: &mut Attempt,
        replay: &mut Replay,
        watch: &mut impl Watch,
    ) -> Relayed {
        std::future::poll_fn(|cx| self.poll(cx, client, attempt, replay, watch)).await
    }

    fn poll<S: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client<S>,
        attempt: &mut Attempt,
        replay: &mut Replay,
        watch: &mut impl Watch,
    ) -> Poll<Relayed> {
        loop {
            // The upload may have come to its end since the answer did.
            let is_sent = attempt.is_sent(replay);
            if !attempt.inbound.is_empty() {
                // What came together with the head goes out together with it.
                let inbound = std::mem::take(&mut attempt.inbound);
                if let Err(ended) = self.pass(cx, client, &inbound, is_sent, watch) {
                    return Poll::Ready(ended);
                }
            }
            if self.decoder.is_done() && is_sent {
                return Poll::Ready(Relayed::Complete);
            }
            if attempt.lease.is_cut() {
                return Poll::Ready(Relayed::Cut(Cut::Stopped));
            }
            let flushed = client.poll_flush(cx);
            watch.passed(flushed.is_ready());
            match flushed {
                Poll::Ready(Ok(())) if self.decoder.is_done() => return Poll::Ready(Relayed::Complete),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(Gone)) => return Poll::Ready(Relayed::Gone),
                // Nothing more is read from the backend until the client has taken what there is.
                Poll::Pending => {
                    self.is_held_up = true;
                    return poll_client(cx, client, attempt, replay);
                }
            }
            // Its silence counts from when it was listened to again.
            if std::mem::take(&mut self.is_held_up)
                && let Some(silence) = &mut self.silence
            {
                silence.is_broken();
            }
            match self.poll_backend(cx, client, attempt, is_sent, watch) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(ended)) => return Poll::Ready(ended),
                Poll::Pending => {
                    if let Poll::Ready(ended) = poll_client(cx, client, attempt, replay) {
                        return Poll::Ready(ended);
                    }
                    let Some(silence) = &mut self.silence else { return Poll::Pending };
                    ready!(silence.poll_too_long(cx));
                    return Poll::Ready(Relayed::Cut(Cut::Silent(silence.limit)));
                }
            }
        }
    }

    /// Reads once from the backend and passes that on.
    fn poll_backend<S: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client<S>,
        attempt: &mut Attempt,
        is_sent: bool,
        watch: &mut impl Watch,
    ) -> Poll<Result<(), Relayed>> {
        with_scratch(|scratch| {
            Poll::Ready(match ready!(attempt.lease.poll_read(cx, &mut scratch[..ANSWER_READ_BYTES])) {
                Ok(n) if n > 0 => {
                    if let Some(silence) = &mut self.silence {
                        silence.is_broken();
                    }
                    self.pass(cx, client, &scratch[..n], is_sent, watch)
                }
                Ok(_) if self.decoder.may_end_by_close() && !attempt.lease.is_cut() => {
                    self.decoder = BodyDecoder::new(Framing::Empty);
                    // The connection is over, too.
                    self.has_surplus = true;
                    if self.delivery == Delivery::Chunked {
                        client.outbox().extend_from_slice(LAST_CHUNK);
                    }
                    Ok(())
                }
                Ok(_) | Err(_) => Err(Relayed::Cut(Cut::Ended)),
            })
        })
    }

    /// Passes on what the backend has sent. `is_sent`: it has all of the request.
    fn pass<S: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client<S>,
        bytes: &[u8],
        is_sent: bool,
        watch: &mut impl Watch,
    ) -> Result<(), Relayed> {
        let before = self.decoder.clone();
        let mut consumed = 0;
        let mut last_payload: &[u8] = &[];
        let followed = loop {
            if consumed == bytes.len() || self.decoder.is_done() {
                break Ok(());
            }
            match self.decoder.decode(&bytes[consumed..]) {
                Ok(decoded) => {
                    consumed += decoded.consumed;
                    if !decoded.payload.is_empty() {
                        watch.payload(decoded.payload);
                        last_payload = decoded.payload;
                    }
                }
                Err(error) => break Err(Relayed::Cut(error.into())),
            }
        };
        self.has_surplus |= consumed < bytes.len();
        let whole_chunks = self.is_chunked && before.is_between_chunks() && self.decoder.is_between_chunks();
        let to_send = match self.delivery {
            Delivery::Chunked if whole_chunks && followed.is_ok() => &bytes[..consumed],
            // Without framing between, there is one stretch of payload.
            Delivery::AsIs => last_payload,
            Delivery::UntilClose if !self.is_chunked => last_payload,
            Delivery::Chunked | Delivery::UntilClose => {
                self.reframe(before, client.outbox(), &bytes[..consumed]);
                &[]
            }
        };
        if self.decoder.is_done() && is_sent {
            client.outbox().extend_from_slice(to_send);
        } else {
            client.poll_send(cx, to_send).map_err(|Gone| Relayed::Gone)?;
        }
        followed
    }

    /// Writes anew what does not begin and end with a chunk: what has been sent must always be whole chunks, so that an
    /// error event can be put behind them.
    fn reframe(&self, mut decoder: BodyDecoder, out: &mut Vec<u8>, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let Ok(decoded) = decoder.decode(&bytes[at..]) else { return };
            at += decoded.consumed;
            match self.delivery {
                Delivery::Chunked => push_chunk(out, decoded.payload),
                Delivery::AsIs | Delivery::UntilClose => out.extend_from_slice(decoded.payload),
            }
        }
        if self.is_chunked && self.delivery == Delivery::Chunked && decoder.is_done() {
            push_last_chunk(out, decoder.trailers());
        }
    }
}

/// Goes on sending the request while its answer comes, and notices if the client leaves.
fn poll_client<S: Transport>(
    cx: &mut Context<'_>,
    client: &mut Client<S>,
    attempt: &mut Attempt,
    replay: &mut Replay,
) -> Poll<Relayed> {
    if attempt.is_refused() && !replay.is_over() {
        return poll_unwanted(cx, client, replay);
    }
    if !replay.is_over() || !attempt.is_sent(replay) {
        match attempt.poll_upload(cx, client, replay) {
            Ok(()) => {}
            Err(Stop::Gone) => return Poll::Ready(Relayed::Gone),
            Err(Stop::Fault(_) | Stop::TooSlow | Stop::Failed(..) | Stop::Refused(_)) => {
                return Poll::Ready(Relayed::Cut(Cut::Request));
            }
        }
    }
    match replay.is_over() {
        true => client.poll_gone(cx).map(|Gone| Relayed::Gone),
        false => Poll::Pending,
    }
}

/// Throws away what the backend, which has answered, does not take: some clients read only when they have sent everything.
fn poll_unwanted<S: Transport>(cx: &mut Context<'_>, client: &mut Client<S>, replay: &mut Replay) -> Poll<Relayed> {
    while !replay.is_over() {
        match replay.pass_over(client.unread()) {
            Ok(taken) => client.take(taken),
            Err(_) => return Poll::Ready(Relayed::Cut(Cut::Request)),
        }
        if !replay.is_over() {
            match ready!(client.poll_fill(cx, READ_BYTES)) {
                Ok(()) => {}
                Err(Gone) => return Poll::Ready(Relayed::Gone),
            }
        }
    }
    client.poll_gone(cx).map(|Gone| Relayed::Gone)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::{
        data::{
            proxy::attempt::tests::{own_address, under_way},
            replay::BodyLimits,
        },
        wire::http1::head::RequestHead,
    };

    struct Nobody;

    impl Watch for Nobody {
        fn payload(&mut self, _payload: &[u8]) {}
    }

    #[tokio::test]
    async fn an_answer_has_ended_when_it_has_come_however_slowly_it_is_read() {
        let chunked = b"3e8\r\n".iter().chain(&[b'x'; 1000]).chain(b"\r\n0\r\n\r\n").copied().collect();
        let cases: [(Framing, Delivery, Vec<u8>); 2] =
            [(Framing::Length(1000), Delivery::AsIs, vec![b'x'; 1000]), (Framing::Chunked, Delivery::Chunked, chunked)];
        for (framing, delivery, body) in cases {
            let (mut client, mut reader, mut attempt, mut backend) = under_way(16).await;
            let mut replay = Replay::new(Framing::Empty, None, &BodyLimits::new(u64::MAX, usize::MAX));
            backend.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            backend.write_all(&body).await.unwrap();
            attempt
                .answer(&mut client, &mut replay, &RequestHead::default(), false, None, &own_address())
                .await
                .unwrap();
            let mut relay = Relay::new(framing, delivery, None);
            let mut watch = Nobody;
            let relaying = relay.run(&mut client, &mut attempt, &mut replay, &mut watch);
            let relayed = tokio::time::timeout(Duration::from_secs(5), relaying).await;
            assert_eq!(relayed, Ok(Relayed::Complete), "{framing:?}");
            assert!(client.has_unsent(), "the reader can hold sixteen bytes");
            let mut read = vec![0; body.len()];
            let (delivered, got) = tokio::join!(client.deliver(|_| {}), reader.read_exact(&mut read));
            assert_eq!((delivered, got.is_ok()), (Ok(()), true), "{framing:?}");
            assert_eq!(read, body, "{framing:?}");
        }
    }
}
