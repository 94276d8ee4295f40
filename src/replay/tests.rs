//! Bodies as hyper's server hands them out, written to it byte by byte.

use std::{convert::Infallible, sync::Mutex};

use futures::FutureExt as _;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, Response, service::service_fn};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt as _, DuplexStream};

use super::*;

const KIB: usize = 1024;

/// How a client says where its body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
}

/// The client's end of a request whose head has been sent.
struct Client {
    connection: DuplexStream,
    framing: Framing,
}

impl Client {
    /// A request, as its sender and as the body that a server gets.
    async fn request(framing: Framing) -> (Client, Incoming) {
        let (mut connection, server) = tokio::io::duplex(8 * 1024 * KIB);
        let (bodies, body) = oneshot::channel();
        let bodies = Mutex::new(Some(bodies));
        let service = service_fn(move |request: Request<Incoming>| {
            let bodies = bodies.lock().unwrap().take().unwrap();
            bodies.send(request.into_body()).unwrap();
            futures::future::pending::<Result<Response<Empty<Bytes>>, Infallible>>()
        });
        let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service);
        tokio::spawn(serving);
        let framed = match framing {
            Framing::Length(bytes) => format!("content-length: {bytes}"),
            Framing::Chunked => "transfer-encoding: chunked".to_owned(),
        };
        let head = format!("POST / HTTP/1.1\r\nhost: x\r\n{framed}\r\n\r\n");
        connection.write_all(head.as_bytes()).await.unwrap();
        (Client { connection, framing }, body.await.unwrap())
    }

    async fn write(&mut self, piece: &[u8]) {
        if self.framing != Framing::Chunked {
            self.connection.write_all(piece).await.unwrap();
        } else if !piece.is_empty() {
            let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
            self.connection.write_all(&chunk).await.unwrap();
        }
    }

    async fn end(&mut self) {
        if self.framing == Framing::Chunked {
            self.connection.write_all(b"0\r\n\r\n").await.unwrap();
        }
    }
}

async fn read(body: Incoming, limits: &Arc<BodyLimits>) -> Result<(Replay, String), BodyFault> {
    let read = Replay::read(body, Some(ModelScanner::json()), None, limits).await;
    read.map_err(|(fault, _)| fault)
}

/// A request with all of `pieces`, read up to its model.
async fn replay_of(pieces: &[&[u8]], framing: Framing, limits: &Arc<BodyLimits>) -> (Client, Replay) {
    let (mut client, body) = Client::request(framing).await;
    let first = pieces.first().copied().unwrap_or_default();
    client.write(first).await;
    let (replay, _) = async {
        let reading = read(body, limits);
        let writing = async {
            for piece in pieces.iter().skip(1) {
                client.write(piece).await;
                tokio::task::yield_now().await; // lets the server see each piece by itself
            }
            client.end().await;
        };
        futures::join!(reading, writing).0.unwrap()
    }
    .await;
    (client, replay)
}

/// Everything that an attempt passes on, and how it ends.
async fn drain(mut attempt: AttemptBody) -> (Vec<u8>, Result<(), BodyFault>) {
    let mut bytes = Vec::new();
    while let Some(frame) = attempt.frame().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(frame.data_ref().unwrap()),
            Err(fault) => return (bytes, Err(fault)),
        }
    }
    (bytes, Ok(()))
}

fn limits() -> Arc<BodyLimits> {
    BodyLimits::new(1024 * KIB as u64, 256 * KIB)
}

/// `{"pad":"…","model":"m","messages":"…"}`, with so many bytes of padding before and behind the model.
fn body(before: usize, behind: usize) -> Vec<u8> {
    let (before, behind) = ("b".repeat(before), "a".repeat(behind));
    format!(r#"{{"pad":"{before}","model":"m","messages":"{behind}"}}"#).into_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_attempt_sends_exactly_what_came_in_however_it_was_cut(
        (before, behind) in (0..200_usize, 0..200_usize),
        cuts in prop::collection::vec(0..500_usize, 0..12),
        chunked in any::<bool>(),
        given_up_after in prop::collection::vec(0..10_usize, 0..3),
    ) {
        let body = body(before, behind);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % body.len()).collect();
        cuts.sort_unstable();
        let ends = cuts.iter().copied().chain([body.len()]);
        let pieces: Vec<&[u8]> = [0].into_iter().chain(cuts.iter().copied()).zip(ends).map(|(a, b)| &body[a..b]).collect();
        let framing = if chunked { Framing::Chunked } else { Framing::Length(body.len()) };

        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let limits = limits();
            let (_client, mut replay) = replay_of(&pieces, framing, &limits).await;
            // Attempts that fail somewhere on the way.
            for frames in given_up_after {
                let mut attempt = replay.attempt().unwrap();
                for _ in 0..frames {
                    if attempt.frame().await.transpose().unwrap().is_none() {
                        break;
                    }
                }
                drop(attempt);
                assert_eq!(replay.recover().await, Ok(true));
            }
            let (sent, end) = drain(replay.attempt().unwrap()).await;
            assert_eq!((sent, end), (body.clone(), Ok(())));
            assert_eq!(replay.recover().await, Ok(true));
            // All of it has been seen now: as many attempts at a time as you like, with a known length.
            let (one, two) = (replay.attempt().unwrap(), replay.attempt().unwrap());
            assert_eq!(one.size_hint().exact(), Some(body.len() as u64));
            assert_eq!((drain(one).await.0, drain(two).await.0), (body.clone(), body.clone()));
        });
    }
}

#[tokio::test]
async fn the_model_is_enough_to_begin_and_the_rest_flows() {
    let body = body(10, 1_000);
    let (head, rest) = body.split_at(100);
    let (mut client, incoming) = Client::request(Framing::Length(body.len())).await;
    client.write(head).await;
    let (mut replay, model) = read(incoming, &limits()).await.unwrap();
    assert_eq!(model, "m");
    let mut attempt = replay.attempt().unwrap();
    assert_eq!(attempt.size_hint().exact(), Some(body.len() as u64), "the client's length is kept");
    assert!(replay.attempt().is_none(), "the rest is away");
    let first = attempt.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, head);
    assert!(attempt.frame().now_or_never().is_none(), "nothing more has come");
    assert!(!attempt.is_end_stream());
    client.write(rest).await;
    assert_eq!(drain(attempt).await, (rest.to_vec(), Ok(())));
}

#[tokio::test]
async fn more_than_is_held_flows_on_but_has_one_attempt() {
    let limits = BodyLimits::new(1024 * KIB as u64, 4 * KIB);
    let body = body(0, 64 * KIB);
    for framing in [Framing::Chunked, Framing::Length(body.len())] {
        let pieces: Vec<&[u8]> = body.chunks(KIB).collect();
        let (_client, mut replay) = replay_of(&pieces, framing, &limits).await;
        let (sent, end) = drain(replay.attempt().unwrap()).await;
        assert!(sent == body && end == Ok(()), "{framing:?}");
        assert_eq!(replay.recover().await, Ok(false));
        assert!(replay.attempt().is_none());
    }
    // What must be held because the model has not come yet is refused instead.
    let (mut client, incoming) = Client::request(Framing::Length(8 * KIB)).await;
    client.write(&self::body(6 * KIB, 10)).await;
    assert_eq!(read(incoming, &limits).await.unwrap_err(), BodyFault::HoldTooLarge);
    assert_eq!(limits.held_bytes(), 0);
}

#[tokio::test]
async fn a_second_model_stops_the_body_before_its_end_has_passed() {
    let body = format!(r#"{{"model":"a","pad":"{}","model":"b"}}"#, "x".repeat(5_000)).into_bytes();
    for framing in [Framing::Chunked, Framing::Length(body.len())] {
        let pieces: Vec<&[u8]> = body.chunks(1_000).collect();
        let (_client, mut replay) = replay_of(&pieces, framing, &limits()).await;
        let attempt = replay.attempt().unwrap();
        let (sent, end) = drain(attempt).await;
        assert!(matches!(end, Err(BodyFault::Scan(ScanError::ModelsDiffer { .. }))), "{end:?}");
        assert!(
            body.starts_with(&sent) && sent.len() <= 5_000,
            "{} bytes: the piece with the second model must not pass",
            sent.len()
        );
        let fault = replay.recover().await.unwrap_err();
        assert!(matches!(fault, BodyFault::Scan(ScanError::ModelsDiffer { .. })));
        assert!(replay.attempt().is_none());
    }
}

#[tokio::test]
async fn a_backend_never_gets_a_complete_request_of_a_body_that_went_wrong() {
    let body = format!(r#"{{"model":"a","pad":"{}","model":"b"}}"#, "x".repeat(5_000)).into_bytes();
    for framing in [Framing::Chunked, Framing::Length(body.len())] {
        let pieces: Vec<&[u8]> = body.chunks(1_000).collect();
        let (_client, mut replay) = replay_of(&pieces, framing, &limits()).await;

        let (near, far) = tokio::io::duplex(64 * KIB);
        let (sender, mut got) = tokio::sync::mpsc::channel(1);
        let service = service_fn(move |request: Request<Incoming>| {
            let sender = sender.clone();
            async move {
                let complete = request.into_body().collect().await.is_ok();
                sender.send(complete).await.unwrap();
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(far), service));
        let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(near)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post("/").header("host", "x").body(replay.attempt().unwrap()).unwrap();
        assert!(client.send_request(request).await.is_err());
        assert_eq!(got.recv().await, Some(false), "{framing:?}");
        // The rest is home again, and knows that the body was at fault and not the backend.
        assert!(replay.recover().await.is_err());
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_body_is_said_and_is_no_reason_to_try_again() {
    let small = BodyLimits::new(4 * KIB as u64, 256 * KIB);
    let long = body(0, 8 * KIB);
    let pieces: Vec<&[u8]> = long.chunks(KIB).collect();
    let (_client, mut replay) = replay_of(&pieces, Framing::Chunked, &small).await;
    let (sent, end) = drain(replay.attempt().unwrap()).await;
    assert_eq!((sent.len(), end), (4 * KIB, Err(BodyFault::TooLarge)));
    assert_eq!(replay.recover().await, Err(BodyFault::TooLarge));

    // Ends before its object does: chunked framing says so only when all has passed, but never that it is complete.
    let (_client, mut replay) = replay_of(&[br#"{"model":"m","#, br#""x":"#], Framing::Chunked, &limits()).await;
    let (_, end) = drain(replay.attempt().unwrap()).await;
    assert!(matches!(end, Err(BodyFault::Scan(ScanError::InvalidJson { .. }))), "{end:?}");

    // A length tells which piece is the last, so that one is kept back.
    let (mut client, incoming) = Client::request(Framing::Length(17)).await;
    client.write(br#"{"model":"m","#).await;
    let (mut replay, _) = read(incoming, &limits()).await.unwrap();
    let attempt = replay.attempt().unwrap();
    client.write(br#""x":"#).await;
    let (sent, end) = drain(attempt).await;
    assert_eq!(sent, br#"{"model":"m","#);
    assert!(matches!(end, Err(BodyFault::Scan(ScanError::InvalidJson { .. }))), "{end:?}");

    let (mut client, incoming) = Client::request(Framing::Length(100)).await;
    client.write(br#"{"model":"m","#).await;
    let (mut replay, _) = read(incoming, &limits()).await.unwrap();
    let attempt = replay.attempt().unwrap();
    drop(client);
    assert_eq!(drain(attempt).await.1, Err(BodyFault::Broken));
    assert_eq!(replay.recover().await, Err(BodyFault::Broken));

    let (mut client, incoming) = Client::request(Framing::Length(2)).await;
    client.write(b"{}").await;
    assert_eq!(read(incoming, &limits()).await.unwrap_err(), BodyFault::Scan(ScanError::ModelMissing));
    let (client, incoming) = Client::request(Framing::Length(100)).await;
    drop(client);
    assert_eq!(read(incoming, &limits()).await.unwrap_err(), BodyFault::Broken);
}

#[tokio::test]
async fn trailers_are_sent_with_every_attempt() {
    let (mut client, incoming) = Client::request(Framing::Chunked).await;
    client.write(&body(0, 10)).await;
    client.connection.write_all(b"0\r\nx-digest: 7\r\n\r\n").await.unwrap();
    let (mut replay, _) = read(incoming, &limits()).await.unwrap();
    for _ in 0..2 {
        let attempt = replay.attempt().unwrap();
        assert_eq!(attempt.size_hint().exact(), None, "a length leaves no room for trailers");
        let sent = attempt.collect().await.unwrap();
        assert_eq!(sent.trailers().unwrap()["x-digest"], "7");
        assert_eq!(sent.to_bytes(), body(0, 10));
        assert_eq!(replay.recover().await, Ok(true));
    }
}

#[tokio::test]
async fn without_a_scanner_nothing_is_read_before_the_first_attempt() {
    let limits = limits();
    let (mut client, incoming) = Client::request(Framing::Length(5)).await;
    let read = Replay::read(incoming, None, Some("m".to_owned()), &limits).now_or_never();
    let (mut replay, model) = read.expect("there is nothing to wait for").unwrap();
    assert_eq!(model, "m");
    client.write(b"\xff\x00raw").await;
    assert_eq!(drain(replay.attempt().unwrap()).await, (b"\xff\x00raw".to_vec(), Ok(())));

    let mut empty = Replay::empty(&limits);
    assert!(empty.attempt().unwrap().is_end_stream());
    assert_eq!(empty.recover().await, Ok(true));
}

#[tokio::test]
async fn what_is_held_is_counted_and_given_back() {
    let limits = limits();
    let body = body(100 * KIB, 100 * KIB);
    let pieces: Vec<&[u8]> = body.chunks(10 * KIB).collect();
    let (_client, mut replay) = replay_of(&pieces, Framing::Chunked, &limits).await;
    let before = limits.held_bytes();
    assert!(before >= 100 * KIB - UNCOUNTED_BYTES, "{before}");
    let (_, end) = drain(replay.attempt().unwrap()).await;
    assert!(end.is_ok() && limits.held_bytes() > before, "what has passed counts, too");
    assert_eq!(replay.recover().await, Ok(true));
    let most = body.len() + CHUNK_OVERHEAD_BYTES * 100;
    assert!((body.len() - UNCOUNTED_BYTES..most).contains(&limits.held_bytes()), "{}", limits.held_bytes());
    // An attempt that is still under way when the request is over.
    let attempt = replay.attempt();
    drop(replay);
    drop(attempt);
    assert_eq!(limits.held_bytes(), 0);

    let (_client, mut replay) = replay_of(&pieces, Framing::Chunked, &limits).await;
    let mut attempt = replay.attempt().unwrap();
    attempt.frame().await.unwrap().unwrap();
    drop(replay);
    drop(attempt); // nobody is left to take the rest back
    assert_eq!(limits.held_bytes(), 0);
}

#[test]
fn all_bodies_together_hold_no_more_than_they_may() {
    let limits = limits();
    let mut bodies: Vec<Held> = Vec::new();
    let fault = loop {
        let mut held = Held::new(&limits);
        let pushed = (0..25).try_for_each(|_| held.push(Bytes::from_static(&[0; 10 * KIB])));
        bodies.push(held);
        if let Err(fault) = pushed {
            break fault;
        }
    };
    assert_eq!(fault, BodyFault::HoldFull);
    assert!(limits.held_bytes() <= 8 * 256 * KIB && limits.held_bytes() > 7 * 256 * KIB);
    // Small ones need no part of it.
    let mut small = Held::new(&limits);
    assert_eq!(small.push(Bytes::from_static(&[0; 10 * KIB])), Ok(()));
    drop(bodies);
    assert_eq!(limits.held_bytes(), 0);
    // Many small chunks cost more than their bytes.
    let mut crumbs = Held::new(&limits);
    for _ in 0..10_000 {
        crumbs.push(Bytes::from_static(b"x")).unwrap();
    }
    assert!(limits.held_bytes() >= 10_000 * CHUNK_OVERHEAD_BYTES - UNCOUNTED_BYTES);
}
