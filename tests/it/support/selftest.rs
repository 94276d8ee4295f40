//! The instruments measured against each other: a client that talks to a scripted backend with nothing in between.
//! What is asserted here is what makes the failure of any other test believable.

use std::time::Duration;

use super::*;

#[tokio::test]
async fn a_backend_writes_down_what_a_client_sent() {
    let upstream = Upstream::start("a", &["m"]).await;
    let mut client = Client::connect(upstream.addr).await;
    let request = Request::post("/v1/x?y", "{}").header("X-Two", "1").header("x-two", "2");
    let answer = client.ask(&request).await;
    assert_eq!((answer.status, answer.end), (200, End::Whole));
    let received = upstream.whole(0).await;
    assert_eq!(received.head.raw, request.head_bytes());
    assert_eq!(received.head.all("x-two"), ["1", "2"]);
    assert_eq!(received.body.bytes, b"{}");
    let again = client.ask(&Request::chat("m").chunks([&b"{"[..], b"}"])).await;
    assert_eq!(again.json()["served_by"], "a");
    let received = upstream.whole(1).await;
    assert_eq!((received.connection, received.body.bytes.as_slice()), (0, &b"{}"[..]));
    assert_eq!(upstream.connections_used(), 1);
    let pieces = upstream.peek(1, |request| request.body.pieces.len());
    assert_eq!(pieces, Some(2));
}

#[tokio::test]
async fn probes_are_kept_apart() {
    let upstream = Upstream::start("a", &["m"]).await;
    upstream.set_health(503);
    let models = Client::connect(upstream.addr).await.ask(&Request::get("/v1/models")).await;
    assert_eq!(models.json()["data"][0]["id"], "m");
    let health = Client::connect(upstream.addr).await.ask(&Request::get("/health")).await;
    assert_eq!(health.status, 503);
    assert_eq!((upstream.count(), upstream.probes()), (0, 2));
}

#[tokio::test]
async fn a_hang_up_is_noticed_while_holding_and_with_bytes_unread() {
    for unread in [false, true] {
        for reset in [false, true] {
            let upstream = Upstream::start("a", &["m"]).await;
            let mut script = vec![Step::Hold(Gate::shut())];
            if !unread {
                script.insert(0, Step::ReadBody);
            }
            upstream.script(script);
            let mut client = Client::connect(upstream.addr).await;
            let request = Request::post("/", "x".repeat(100_000));
            client.send(request.head_bytes()).await;
            upstream.request(0).await;
            client.send(&request.bytes()[request.head_bytes().len()..]).await;
            if !unread {
                upstream.whole(0).await;
            }
            assert!(upstream.is_connected(0));
            let left = if reset { client.vanish() } else { client.close() };
            let took = upstream.hung_up(0).await - left;
            assert!(took < Duration::from_millis(500), "unread {unread}, reset {reset}: noticed after {took:?}");
        }
    }
}

#[tokio::test]
async fn a_cut_is_told_from_an_end() {
    let cases = [
        (vec![Step::Send(LAST_CHUNK.into())], End::Whole),
        (vec![Step::Close], End::Closed),
        (vec![Step::Reset], End::Reset),
    ];
    for (tail, end) in cases {
        let upstream = Upstream::start("a", &["m"]).await;
        let gate = Gate::shut();
        let mut script = sse_begin();
        script.extend([Step::SendChunk("one".into()), Step::Hold(gate.clone())]);
        script.extend(tail);
        upstream.script(script);
        let mut client = Client::connect(upstream.addr).await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        assert_eq!(client.piece().await.unwrap().1, b"one");
        gate.open();
        assert_eq!(client.finish().await.end, end);
    }
}

#[tokio::test]
async fn a_writer_stops_when_nobody_reads() {
    let upstream = Upstream::start("a", &["m"]).await;
    upstream.script(vec![
        Step::Send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n".into()),
        Step::Flood(vec![b'x'; 64 * 1024].into()),
    ]);
    let mut client = Client::connect_narrow(upstream.addr).await;
    client.send(Request::get("/x").bytes()).await;
    upstream.request(0).await;
    let sent_len = || upstream.peek(0, |request| request.sent_len).unwrap();
    let stuck_at = settled("the flood stops", Duration::from_millis(200), sent_len).await;
    assert!((1..16_000_000).contains(&stuck_at), "{stuck_at} bytes");
    client.vanish();
    upstream.hung_up(0).await;
}

#[tokio::test]
async fn a_connection_that_has_switched_carries_bytes_both_ways() {
    let upstream = Upstream::start("a", &["m"]).await;
    upstream.script([switching(), vec![Step::Send("hello".into()), Step::Echo]].concat());
    let mut client = Client::connect(upstream.addr).await;
    client.send([&Request::get("/v1/realtime").bytes()[..], b"early"].concat()).await;
    assert_eq!(client.any_head().await.unwrap().word(1), "101");
    assert_eq!(client.raw(10).await, b"helloearly");
    // More than the kernel holds: one side has to read while it writes.
    let sent = vec![b'x'; 16 * 1024 * 1024];
    let sending = client.send_aside(sent.clone());
    assert!(client.raw(sent.len()).await == sent);
    sending.done().await.unwrap();
    client.half_close();
    assert_eq!(client.raw_to_end().await, (Vec::new(), End::Closed));
    assert_eq!(upstream.peek(0, |request| request.body.bytes.len()), Some(5 + sent.len()));
}

#[tokio::test]
async fn a_refused_a_killed_and_a_jammed_backend_do_what_they_say() {
    let upstream = Upstream::start_with_backlog("a", &["m"], 1).await;
    let queued = upstream.jam().await;
    assert!(!queued.is_empty());

    let upstream = Upstream::start("b", &["m"]).await;
    let mut client = Client::connect(upstream.addr).await;
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    upstream.refuse().await;
    assert!(tokio::net::TcpStream::connect(upstream.addr).await.is_err());
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    upstream.kill().await;
    assert_eq!(client.ended().await, End::Reset);
}
