//! Two connections joined after a switch of protocols (WebSocket): bytes pass both ways until one of the ends closes.

use std::{
    io::IoSlice,
    task::{Context, Poll, ready},
};

use super::{
    attempt::Attempt,
    client::{AHEAD_BYTES_MAX, Client, Gone, Transport, with_scratch},
    relay::{Cut, Relayed, Watch},
};

/// Passes bytes both ways. The end of either side, once what it had sent has been passed on, is the end of both.
pub async fn run<S: Transport>(client: &mut Client<S>, attempt: &mut Attempt, watch: &mut impl Watch) -> Relayed {
    let inbound = std::mem::take(&mut attempt.inbound);
    watch.payload(&inbound);
    client.outbox().extend_from_slice(&inbound);
    let mut sides = Sides { client_left: false, backend_left: false };
    std::future::poll_fn(|cx| {
        if attempt.lease.is_cut() {
            return Poll::Ready(Relayed::Cut(Cut::Stopped));
        }
        let to_backend = sides.poll_to_backend(cx, client, attempt);
        let to_client = sides.poll_to_client(cx, client, attempt, watch);
        if to_backend.is_ready() || to_client.is_ready() { Poll::Ready(Relayed::Complete) } else { Poll::Pending }
    })
    .await
}

/// Which sides will send no more.
struct Sides {
    client_left: bool,
    backend_left: bool,
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
                    Ok(n) if n > 0 => client.take(n),
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
                        Poll::Ready(client.poll_send(cx, &scratch[..n]).is_ok())
                    }
                    Ok(_) | Err(_) => Poll::Ready(false),
                });
            self.backend_left = !ready!(passed);
        }
    }
}
