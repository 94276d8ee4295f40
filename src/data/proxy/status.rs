//! The status as it changes, to a client of the data port.

use std::time::SystemTime;

use bytes::Bytes;
use tokio::time::timeout;

use super::{
    After, Asked,
    client::{Client, Gone, Transport},
    headers::{self, Delivery, Persistence},
};
use crate::{
    observe::pages::live::{self, Watcher},
    wire::http1::body::{Framing, LAST_CHUNK, push_chunk},
};

/// Tells `watcher`'s news until it, or the client, has had enough. The connection ends with it.
pub(super) async fn stream<S: Transport>(client: &mut Client<S>, asked: &Asked<'_>, mut watcher: Watcher) -> After {
    const ABORT: After = After::Abort { by_reset: false };
    let delivery = Delivery::of(Framing::Chunked, asked.head.version);
    let (common, now) = (asked.common(Persistence::Close), SystemTime::now());
    headers::push_own_stream(client.outbox(), &live::head(), delivery, &common, now);
    loop {
        // One that does not read must not keep its place.
        if !matches!(timeout(live::PATIENCE, client.flush()).await, Ok(Ok(()))) {
            return ABORT;
        }
        let piece: Option<Bytes> = match client.unless_gone(watcher.next()).await {
            Ok(piece) => piece,
            Err(Gone) => return ABORT,
        };
        match (piece, delivery) {
            (Some(piece), Delivery::Chunked) => push_chunk(client.outbox(), &piece),
            (Some(piece), _) => client.outbox().extend_from_slice(&piece),
            (None, Delivery::Chunked) => {
                client.outbox().extend_from_slice(LAST_CHUNK);
                return After::Close;
            }
            (None, _) => return After::Close,
        }
    }
}
