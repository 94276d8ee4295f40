use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use super::*;
use crate::{data::replay::BodyLimits, wire::http1::body::Framing};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_util::sync::CancellationToken;

const HEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const IDLE_TIMEOUT: Duration = Duration::from_secs(650);
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
const PATIENCE: Patience = Patience { idle: IDLE_TIMEOUT, write: Some(WRITE_TIMEOUT) };

struct Shutdown(Arc<AtomicBool>, CancellationToken);

impl Shutdown {
    fn begin(&self) {
        self.0.store(true, Relaxed);
        self.1.cancel();
    }
}

/// A client, the other end of its connection, and how to shut the proxy down.
fn connected() -> (Client<DuplexStream>, DuplexStream, Shutdown) {
    let (here, there) = tokio::io::duplex(64 * 1024);
    let shutdown = Shutdown(Arc::default(), CancellationToken::new());
    let closing = Closing::new(shutdown.0.clone(), shutdown.1.clone().cancelled_owned());
    (Client::new(here, Vec::new(), PATIENCE, closing), there, shutdown)
}

#[tokio::test(start_paused = true)]
async fn requests_are_read_one_after_the_other() {
    let (mut client, mut peer, _shutdown) = connected();
    let mut head = RequestHead::default();
    peer.write_all(&[HEAD, HEAD].concat()).await.unwrap();
    for _ in 0..2 {
        assert!(matches!(client.next(&mut head).await, Next::Request));
    }
    drop(peer);
    assert!(matches!(client.next(&mut head).await, Next::End));
}

#[tokio::test(start_paused = true)]
async fn silence_between_requests_has_an_end() {
    let (mut client, mut peer, _shutdown) = connected();
    let mut head = RequestHead::default();
    for _ in 0..2 {
        // However late a request comes, the next one has all of its time again.
        let since = Instant::now();
        tokio::join!(async { assert!(matches!(client.next(&mut head).await, Next::Request)) }, async {
            tokio::time::sleep(IDLE_TIMEOUT - Duration::from_secs(1)).await;
            peer.write_all(HEAD).await.unwrap();
        });
        assert_eq!(since.elapsed(), IDLE_TIMEOUT - Duration::from_secs(1));
    }
    let since = Instant::now();
    assert!(matches!(client.next(&mut head).await, Next::End));
    assert!((IDLE_TIMEOUT..IDLE_TIMEOUT + Duration::from_secs(1)).contains(&since.elapsed()), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_empty_line_is_no_request_that_has_begun() {
    let (mut client, mut peer, _shutdown) = connected();
    let mut head = RequestHead::default();
    let since = Instant::now();
    peer.write_all(b"\r\n").await.unwrap();
    let next = client.next(&mut head).await;
    assert!(matches!(next, Next::End), "{next:?} would be told, and taken for the answer to what comes next");
    assert!(since.elapsed() >= IDLE_TIMEOUT, "{:?}", since.elapsed());
    peer.write_all(HEAD).await.unwrap();
    assert!(matches!(client.next(&mut head).await, Next::Request));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_drips_has_an_end_however_it_drips() {
    let (mut client, mut peer, _shutdown) = connected();
    let mut head = RequestHead::default();
    let since = Instant::now();
    let dripping = async {
        for byte in b"GET / HTTP/1.1\r\nx: ".iter().chain(&[b'y'; 200]) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if peer.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        next = client.next(&mut head) => assert!(matches!(next, Next::TooSlow), "{next:?}"),
        () = dripping => panic!("it was listened to for ever"),
    }
    let limit = HEAD_TIMEOUT + Duration::from_secs(1);
    assert!((limit..limit + Duration::from_secs(1)).contains(&since.elapsed()), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_body_may_take_for_ever_but_not_stand_still() {
    let (mut client, mut peer, _shutdown) = connected();
    let body = Replay::new(Framing::Chunked, None, &BodyLimits::new(u64::MAX, usize::MAX));
    for _ in 0..100 {
        tokio::join!(async { assert_eq!(client.more_body(&body).await, Ok(BodyWait::More)) }, async {
            tokio::time::sleep(BODY_TIMEOUT - Duration::from_secs(1)).await;
            peer.write_all(b"x").await.unwrap();
        });
    }
    assert_eq!(client.unread().len(), 100);
    let since = Instant::now();
    assert_eq!(client.more_body(&body).await, Ok(BodyWait::TooSlow));
    assert!((BODY_TIMEOUT..BODY_TIMEOUT + Duration::from_secs(1)).contains(&since.elapsed()), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_is_set_at_the_end_of_a_long_turn_holds() {
    use tokio::task::{consume_budget, coop::has_budget_remaining};
    let (mut client, _peer, _shutdown) = connected();
    client.expect_body();
    let waiting = std::future::poll_fn(|cx| {
        // The first poll finds the task's turn used up: neither socket nor timer tells it anything.
        while !client.deadline.is_armed && has_budget_remaining() {
            let _ = std::pin::pin!(consume_budget()).poll(cx);
        }
        client.poll_body(cx, READ_BYTES)
    });
    let since = Instant::now();
    assert_eq!(tokio::time::timeout(BODY_TIMEOUT * 2, waiting).await, Ok(Ok(BodyWait::TooSlow)));
    assert!(since.elapsed() < BODY_TIMEOUT + Duration::from_secs(1), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn shutdown_ends_what_waits_at_once_and_what_has_begun_soon() {
    for (begun, within) in [(&b""[..], Duration::from_millis(10)), (b"GET / HT", HEAD_TIMEOUT_AT_SHUTDOWN * 2)] {
        let (mut client, mut peer, shutdown) = connected();
        let mut head = RequestHead::default();
        peer.write_all(begun).await.unwrap();
        let mut waiting = Box::pin(client.next(&mut head));
        assert!(futures::poll!(&mut waiting).is_pending());
        assert!(futures::poll!(&mut waiting).is_pending());
        let since = Instant::now();
        shutdown.begin();
        assert!(matches!(waiting.await, Next::End));
        assert!(since.elapsed() <= within, "{:?}", since.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn who_sends_ahead_is_held_back_and_its_leaving_is_noticed() {
    let (mut client, mut peer, _shutdown) = connected();
    peer.write_all(&[b'x'; 3 * AHEAD_BYTES_MAX]).await.unwrap();
    drop(peer);
    for _ in 0..3 {
        let mut waiting = Box::pin(client.unless_gone(std::future::pending::<()>()));
        assert!(futures::poll!(&mut waiting).is_pending(), "there is more to come");
        drop(waiting);
        assert_eq!(client.unread().len(), AHEAD_BYTES_MAX);
        client.take(AHEAD_BYTES_MAX);
    }
    assert_eq!(client.unless_gone(std::future::pending::<()>()).await, Err(Gone));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_of_its_answer_is_given_up() {
    let (mut client, peer, _shutdown) = connected();
    let since = Instant::now();
    client.outbox().extend_from_slice(&[b'x'; 100 * 1024]);
    assert_eq!(tokio::time::timeout(WRITE_TIMEOUT * 2, client.flush()).await, Ok(Err(Gone)));
    let waited = since.elapsed();
    assert!((WRITE_TIMEOUT..WRITE_TIMEOUT + Duration::from_secs(1)).contains(&waited), "{waited:?}");
    drop(peer);
    let (mut client, _peer, _shutdown) = connected();
    client.patience.write = None;
    client.outbox().extend_from_slice(&[b'x'; 100 * 1024]);
    assert!(tokio::time::timeout(WRITE_TIMEOUT * 100, client.flush()).await.is_err(), "the limit is off");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_slowly_is_not_given_up() {
    let (mut client, mut peer, _shutdown) = connected();
    let since = Instant::now();
    client.outbox().extend_from_slice(&[b'x'; 100 * 1024]);
    let (flushed, ()) = tokio::join!(client.flush(), async {
        for _ in 0..36 {
            tokio::time::sleep(WRITE_TIMEOUT - Duration::from_secs(1)).await;
            peer.read_exact(&mut [0; 1024]).await.unwrap();
        }
    });
    assert_eq!(flushed, Ok(()));
    assert!(since.elapsed() > WRITE_TIMEOUT * 30, "{:?}: it was slow", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn time_in_which_nothing_waits_for_the_client_does_not_count() {
    let (mut client, mut peer, _shutdown) = connected();
    for _ in 0..3 {
        client.outbox().extend_from_slice(&[b'x'; 100 * 1024]);
        let (flushed, ()) = tokio::join!(client.flush(), async {
            tokio::time::sleep(WRITE_TIMEOUT - Duration::from_secs(1)).await;
            peer.read_exact(&mut [0; 100 * 1024]).await.unwrap();
        });
        assert_eq!(flushed, Ok(()));
        // The backend sends nothing for long.
        tokio::time::sleep(WRITE_TIMEOUT * 10).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_still_sent_after_an_answer_is_read_within_bounds_of_time_and_not_of_bytes() {
    const MIB: usize = 1024 * 1024;
    let second = Duration::from_secs(1);
    for (gap, shuts_down, ends_after) in [
        (second * 4, false, LINGER_TIME),
        (second / 100, false, LINGER_TIME),
        (second * 6, false, LINGER_SILENCE),
        (second * 4, true, LINGER_SILENCE_AT_SHUTDOWN),
        (second / 2, true, LINGER_TIME),
    ] {
        let (mut client, peer, shutdown) = connected();
        let (mut reading, mut writing) = tokio::io::split(peer);
        client.outbox().extend_from_slice(b"answer");
        if shuts_down {
            shutdown.begin();
        }
        let since = Instant::now();
        let sending = async {
            let mut sent = 0;
            while writing.write_all(&[b'x'; MIB]).await.is_ok() {
                sent += MIB;
                tokio::time::sleep(gap).await;
            }
            sent
        };
        let mut answer = Vec::new();
        let (ended_at, sent, read) = tokio::join!(
            async {
                client.close().await;
                Instant::now()
            },
            sending,
            reading.read_to_end(&mut answer)
        );
        let lasted = ended_at - since;
        let what = format!("{gap:?} between, shutdown {shuts_down}: {lasted:?}, {sent} bytes");
        assert!((ends_after..ends_after + second).contains(&lasted), "{what}");
        assert!(read.is_ok() && answer == b"answer", "{what}");
        assert!(gap > second || sent >= 20 * MIB, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_lets_the_client_read_what_was_sent_to_it() {
    let (mut client, mut peer, _shutdown) = connected();
    client.outbox().extend_from_slice(b"answer");
    let closing = tokio::spawn(client.close());
    let mut got = Vec::new();
    peer.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"answer");
    drop(peer);
    closing.await.unwrap();
}
