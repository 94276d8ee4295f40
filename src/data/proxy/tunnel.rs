//! Two connections joined after a switch of protocols (WebSocket): bytes pass both ways until one of the ends closes.

use std::{
    io::IoSlice,
    task::{Context, Poll, ready},
    time::Duration,
};

use super::{
    attempt::Attempt,
    client::{AHEAD_BYTES_MAX, Client, Gone, Transport, with_scratch},
    relay::{Cut, Relayed, Silence, Watch},
};

/// Passes bytes both ways. The end of either side, once what it had sent has been passed on, is the end of both; so is
/// `idle_timeout` without a byte from either, or a client that does not take what there is.
pub async fn run<S: Transport>(
    client: &mut Client<S>,
    attempt: &mut Attempt,
    watch: &mut impl Watch,
    idle_timeout: Option<Duration>,
) -> Relayed {
    let inbound = std::mem::take(&mut attempt.inbound);
    watch.payload(&inbound);
    client.outbox().extend_from_slice(&inbound);
    let mut sides = Sides { client_left: false, backend_left: false, has_passed: false };
    let mut silence = idle_timeout.map(Silence::new);
    std::future::poll_fn(|cx| {
        if attempt.lease.is_cut() {
            return Poll::Ready(Relayed::Cut(Cut::Stopped));
        }
        let to_backend = sides.poll_to_backend(cx, client, attempt);
        let to_client = sides.poll_to_client(cx, client, attempt, watch);
        if to_backend.is_ready() || to_client.is_ready() {
            return Poll::Ready(Relayed::Complete);
        }
        let Some(silence) = &mut silence else { return Poll::Pending };
        // As long as the client does not take what there is, its own limit runs.
        if std::mem::take(&mut sides.has_passed) || client.has_unsent() {
            silence.is_broken();
        }
        silence.poll_too_long(cx).map(|()| Relayed::Cut(Cut::Silent(silence.limit)))
    })
    .await
}

/// Which sides will send no more.
struct Sides {
    client_left: bool,
    backend_left: bool,
    /// Something has come from either since that was asked last.
    has_passed: bool,
}

impl Sides {
    /// Ready once nothing more can come from the client.
    fn poll_to_backend<S: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client<S>,
        attempt: &mut Attempt,
    ) -> Poll<()> {
        loop {
            while !client.unread().is_empty() {
                match ready!(attempt.lease.poll_write(cx, &[IoSlice::new(client.unread())])) {
                    Ok(n) if n > 0 => {
                        client.take(n);
                        self.has_passed = true;
                    }
                    Ok(_) | Err(_) => return Poll::Ready(()),
                }
            }
            if self.client_left {
                return Poll::Ready(());
            }
            match ready!(client.poll_fill(cx, AHEAD_BYTES_MAX)) {
                Ok(()) => {}
                Err(Gone) => self.client_left = true,
            }
        }
    }

    /// Ready once nothing more can come from the backend, and all that came has been passed on.
    fn poll_to_client<S: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client<S>,
        attempt: &mut Attempt,
        watch: &mut impl Watch,
    ) -> Poll<()> {
        loop {
            if ready!(client.poll_flush(cx)).is_err() || self.backend_left {
                return Poll::Ready(());
            }
            let passed =
                with_scratch(|scratch| match ready!(attempt.lease.poll_read(cx, &mut scratch[..AHEAD_BYTES_MAX])) {
                    Ok(n) if n > 0 => {
                        watch.payload(&scratch[..n]);
                        self.has_passed = true;
                        Poll::Ready(client.poll_send(cx, &scratch[..n]).is_ok())
                    }
                    Ok(_) | Err(_) => Poll::Ready(false),
                });
            self.backend_left = !ready!(passed);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncWriteExt as _,
        time::{Instant, sleep, timeout},
    };

    use super::*;
    use crate::data::proxy::attempt::tests::under_way;

    const LIMIT: Duration = Duration::from_secs(60);
    const SECOND: Duration = Duration::from_secs(1);

    struct Nobody;

    impl Watch for Nobody {
        fn payload(&mut self, _payload: &[u8]) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_lasts_while_either_side_speaks_and_no_longer() {
        let (mut client, mut peer, mut attempt, _backend) = under_way(16).await;
        let since = Instant::now();
        let mut watch = Nobody;
        let tunnel = run(&mut client, &mut attempt, &mut watch, Some(LIMIT));
        let (ended, ()) = tokio::join!(tunnel, async {
            for _ in 0..10 {
                sleep(LIMIT - SECOND).await;
                peer.write_all(b"frame").await.unwrap();
            }
        });
        assert_eq!(ended, Relayed::Cut(Cut::Silent(LIMIT)));
        let lasted = since.elapsed();
        let expected = (LIMIT - SECOND) * 10 + LIMIT;
        assert!((expected..expected + SECOND).contains(&lasted), "{lasted:?}");
        let (mut client, _peer, mut attempt, _backend) = under_way(16).await;
        let tunnel = run(&mut client, &mut attempt, &mut watch, None);
        assert!(timeout(LIMIT * 1000, tunnel).await.is_err(), "no limit is set");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_ends_its_tunnel() {
        let (mut client, _peer, mut attempt, _backend) = under_way(16).await;
        attempt.inbound.extend_from_slice(&[b'x'; 1000]);
        let since = Instant::now();
        let ended = timeout(LIMIT * 2, run(&mut client, &mut attempt, &mut Nobody, None)).await;
        assert!(ended.is_ok(), "it held the backend");
        assert!((LIMIT..LIMIT + SECOND).contains(&since.elapsed()), "{:?}", since.elapsed());
    }
}
