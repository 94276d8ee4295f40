//! S1 to S5: chunks pass at once and unchanged, whoever leaves is followed, what breaks is not ended cleanly, and a slow
//! reader slows its backend.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};

use crate::support::*;

/// From the client's departure to the end of the backend's connection: what the suite insists on. The aim is 100 ms; the
/// figure itself is printed.
const HANG_UP_LIMIT: Duration = Duration::from_millis(500);

/// The moments at which a client may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    BeforeFirstByte,
    MidStream,
    WholeAnswerPending,
    MidAnswerWithLength,
    Uploading,
}

async fn one() -> (Upstream, TestApp) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    (upstream, app)
}

fn h2_chat() -> hyper::Request<BoxBody<Bytes, Infallible>> {
    let body = BodyExt::boxed(Full::new(Bytes::from_static(br#"{"model":"m","messages":[]}"#)));
    hyper::Request::post("http://front.test/v1/chat/completions").body(body).unwrap()
}

/// The events of a stream: what stands between empty lines, each as its lines.
fn events(text: &str) -> Vec<Vec<String>> {
    text.replace("\r\n", "\n")
        .split("\n\n")
        .filter(|event| !event.trim().is_empty())
        .map(|event| event.lines().map(str::to_owned).collect())
        .collect()
}

// === S1 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s01_chunks_arrive_at_once_and_as_they_were_cut() {
    const CHUNKS: usize = 50;
    let (upstream, app) = one().await;
    let payload = |index: usize| format!("data: {{\"index\":{index},\"text\":\"{}\"}}\n\n", "x".repeat(index * 7));
    let mut script = sse_begin();
    for index in 0..CHUNKS {
        script.extend([Step::Pause(Duration::from_millis(20)), Step::SendChunk(payload(index).into())]);
    }
    script.push(Step::Send(LAST_CHUNK.into()));
    upstream.always(script);
    // A busy machine only ever adds to the delay, so the best of a few runs tells about the proxy.
    let mut best = Duration::MAX;
    for run in 0..3 {
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        let mut arrived_at = Vec::new();
        for index in 0..CHUNKS {
            let (at, bytes) = client.piece().await.expect("a chunk");
            assert_eq!(String::from_utf8_lossy(&bytes), payload(index));
            arrived_at.push(at);
        }
        assert!(client.finish().await.is_whole());
        // The first thing sent is the head.
        let sent_at = upstream.peek(run, |request| request.sent_at[1..=CHUNKS].to_vec()).unwrap();
        let mut delays: Vec<Duration> =
            arrived_at.iter().zip(sent_at).map(|(arrived, sent)| arrived.saturating_duration_since(sent)).collect();
        delays.sort_unstable();
        let (p50, p99) = (delays[CHUNKS / 2], delays[CHUNKS - 1]);
        println!("s01: added delay per chunk: p50 {p50:?}, p99 {p99:?}");
        best = best.min(p99);
        if best < Duration::from_millis(2) {
            break;
        }
    }
    assert!(best < Duration::from_millis(20), "p99 {best:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s01_the_head_does_not_wait_for_the_first_event() {
    let (upstream, app) = one().await;
    let gate = Gate::shut();
    let mut script = sse_begin();
    script.extend([Step::Hold(gate.clone()), Step::SendChunk("data: 1\n\n".into()), Step::Send(LAST_CHUNK.into())]);
    upstream.script(script);
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    let head = client.head().await;
    assert_eq!(head.header("content-type"), Some("text/event-stream; charset=utf-8"));
    gate.open();
    assert_eq!(client.finish().await.text(), "data: 1\n\n");
}

// === S2 ===

/// A client leaves in this phase; returns how long the backend's connection outlived it.
async fn leave_in(phase: Phase, reset: bool) -> Duration {
    let (upstream, app) = one().await;
    let spare = Upstream::start("b", &["m"]).await;
    let never = Gate::shut();
    upstream.script(match phase {
        Phase::BeforeFirstByte | Phase::WholeAnswerPending => held_reply(&never),
        Phase::MidStream => held_stream("data: 1\n\n", &never, ""),
        Phase::MidAnswerWithLength => vec![
            Step::ReadBody,
            Step::Send("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{".into()),
            Step::Hold(never.clone()),
        ],
        Phase::Uploading => vec![Step::ReadBody],
    });
    let stream = if phase == Phase::WholeAnswerPending { "false" } else { "true" };
    let padding = "x".repeat(100_000);
    let body = format!(r#"{{"model":"m","stream":{stream},"prompt":"{padding}"}}"#);
    let request = Request::post("/v1/completions", &body);
    let mut client = app.client().await;
    let wire = request.bytes();
    let sent = if phase == Phase::Uploading { &wire[..wire.len() - 10] } else { &wire[..] };
    client.send(sent).await;
    match phase {
        Phase::Uploading => {
            upstream.request(0).await;
        }
        Phase::BeforeFirstByte | Phase::WholeAnswerPending => {
            upstream.whole(0).await;
        }
        Phase::MidStream | Phase::MidAnswerWithLength => {
            client.head().await;
            client.piece().await.expect("the first piece");
        }
    }
    app.inflight_is("a", "m", 1.0).await;
    // Only now, so that the request is where it is; from here on it could be asked.
    app.add(Spec::of(&spare)).await;
    let left = if reset { client.vanish() } else { client.close() };
    let took = upstream.hung_up(0).await - left;
    app.inflight_is("a", "m", 0.0).await;
    assert_eq!((upstream.count(), spare.count()), (1, 0), "{phase:?}: asked again");
    if phase == Phase::Uploading {
        assert!(!upstream.has_whole_request(), "half a request was made whole");
    }
    took
}

async fn assert_followed(phase: Phase) {
    for reset in [true, false] {
        let took = leave_in(phase, reset).await;
        let how = if reset { "reset" } else { "close" };
        println!("s02: {phase:?}, {how}: the backend's connection ended after {took:?}");
        assert!(took <= HANG_UP_LIMIT, "{phase:?}, {how}: {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_leaves_before_the_first_byte() {
    assert_followed(Phase::BeforeFirstByte).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_leaves_mid_stream() {
    assert_followed(Phase::MidStream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_leaves_while_a_whole_answer_is_made() {
    assert_followed(Phase::WholeAnswerPending).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_leaves_in_the_midst_of_an_answer_with_a_length() {
    assert_followed(Phase::MidAnswerWithLength).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_leaves_while_it_uploads() {
    assert_followed(Phase::Uploading).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_leaves_the_queue() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 1)).await;
    let gate = Gate::shut();
    upstream.script(held_reply(&gate));
    let mut first = app.client().await;
    first.send(Request::chat("m").bytes()).await;
    upstream.request(0).await;
    for reset in [true, false] {
        let mut waiting = app.client().await;
        waiting.send(Request::chat("m").header("x-left", "1").bytes()).await;
        // Nothing outside tells that it has joined the queue: give it the time to.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(waiting.is_quiet());
        if reset {
            waiting.vanish()
        } else {
            waiting.close()
        };
    }
    let mut last = app.client().await;
    last.send(Request::chat("m").header("x-stayed", "1").bytes()).await;
    gate.open();
    assert_eq!(first.answer().await.status, 200);
    assert_eq!(last.answer().await.status, 200);
    assert_eq!(upstream.request(1).await.head.header("x-stayed"), Some("1"), "it waited behind the dead");
    assert_eq!(upstream.count(), 2);
    app.inflight_is("a", "m", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_an_http_2_stream_that_is_cancelled() {
    for begun in [false, true] {
        let (upstream, app) = one().await;
        let never = Gate::shut();
        upstream.script(if begun { held_stream("data: 1\n\n", &never, "") } else { held_reply(&never) });
        let mut front = connect_h2(app.addr()).await;
        let pending = tokio::spawn(front.send_request(h2_chat()));
        upstream.whole(0).await;
        let left = if begun {
            let mut answer = soon("the head", pending).await.unwrap().unwrap();
            answer.body_mut().frame().await.unwrap().unwrap();
            let left = Instant::now();
            drop(answer);
            left
        } else {
            let left = Instant::now();
            pending.abort();
            left
        };
        let took = upstream.hung_up(0).await - left;
        println!("s02: HTTP/2, begun {begun}: the backend's connection ended after {took:?}");
        assert!(took <= HANG_UP_LIMIT, "begun {begun}: {took:?}");
        app.inflight_is("a", "m", 0.0).await;
        // The other streams of the connection live on.
        assert_eq!(front.send_request(h2_chat()).await.unwrap().status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_a_client_that_half_closes_is_answered_or_followed() {
    let (upstream, app) = one().await;
    let gate = Gate::shut();
    upstream.script(held_reply(&gate));
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    upstream.whole(0).await;
    client.half_close();
    // Servers differ in what they make of it; what may not happen is neither the one nor the other.
    let decided = Instant::now() + HANG_UP_LIMIT;
    eventually("the time to follow is over", async || !upstream.is_connected(0) || Instant::now() > decided).await;
    if upstream.is_connected(0) {
        gate.open();
        assert_eq!(client.answer().await.json()["held"], true);
    }
    app.inflight_is("a", "m", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_the_slot_of_one_who_left_is_free() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with(&[("PROXY_QUEUE_MAX", "0")]).await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 1)).await;
    for round in 0..5 {
        upstream.script(held_reply(&Gate::shut()));
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        upstream.whole(round * 2).await;
        client.vanish();
        app.inflight_is("a", "m", 0.0).await;
        // Its place is given back before the last byte goes, so the client cannot be back before it.
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200, "round {round}");
    }
}

// === S3 ===

/// How a stream may break: what comes after the first, whole event.
fn breaks() -> [(&'static str, Script); 5] {
    [
        ("a reset", vec![Step::Reset]),
        ("a close without the last chunk", vec![Step::Close]),
        ("a close in the middle of a chunk", vec![Step::Send("ff\r\ndata: {\"half\"".into()), Step::Close]),
        ("bad framing", vec![Step::Send("oops\r\n".into())]),
        ("a close in the middle of an event", vec![Step::SendChunk("data: {\"half\":".into()), Step::Close]),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s03_a_broken_stream_is_told_in_the_dialect_of_the_endpoint_and_cut() {
    for (what, tail) in breaks() {
        for request in
            [Request::chat("m"), Request::post("/v1/completions", r#"{"model":"m"}"#), Request::messages("m")]
        {
            let (upstream, app) = one().await;
            let gate = Gate::shut();
            let mut script = sse_begin();
            script.extend([Step::SendChunk("data: {\"n\":1}\n\n".into()), Step::Hold(gate.clone())]);
            script.extend(tail.clone());
            upstream.script(script);
            let mut client = app.client().await;
            client.send(request.bytes()).await;
            client.head().await;
            assert_eq!(client.piece().await.unwrap().1, b"data: {\"n\":1}\n\n");
            gate.open();
            let answer = client.finish().await;
            let text = answer.text();
            assert!(!answer.is_whole(), "{what}: ended cleanly: {text}");
            assert!(!text.contains("[DONE]"), "{what}: {text}");
            let events = events(&text);
            assert_eq!(events[0], [r#"data: {"n":1}"#]);
            let last = events.last().unwrap();
            let data = last.iter().find_map(|line| line.strip_prefix("data: ")).unwrap_or_default();
            let json: serde_json::Value = serde_json::from_str(data)
                .unwrap_or_else(|error| panic!("{what}: {error} in the last event {last:?} of {text:?}"));
            assert!(json["error"]["message"].is_string(), "{what}: {text}");
            if String::from_utf8_lossy(&request.bytes()).contains("/v1/messages") {
                assert_eq!(last[0], "event: error", "{what}: {text}");
                assert_eq!(json["type"], "error", "{what}: {text}");
            } else {
                assert_eq!(last.len(), 1, "{what}: {text}");
            }
            app.inflight_is("a", "m", 0.0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s03_what_is_no_event_stream_is_cut_without_a_word() {
    let chunked = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let length = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    let by_close = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n";
    let coded = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
    let cases = [
        (chunked, Step::SendChunk("{\"a\":1,".into()), Step::Reset),
        (chunked, Step::SendChunk("{\"a\":1,".into()), Step::Close),
        (length, Step::Send("{\"a\":1,".into()), Step::Reset),
        (length, Step::Send("{\"a\":1,".into()), Step::Close),
        (by_close, Step::Send("{\"a\":1,".into()), Step::Reset),
        (coded, Step::SendChunk("{\"a\":1,".into()), Step::Close),
    ];
    for (head, piece, end) in cases {
        let (upstream, app) = one().await;
        let gate = Gate::shut();
        upstream.script(vec![Step::ReadBody, Step::Send(head.into()), piece, Step::Hold(gate.clone()), end.clone()]);
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        client.piece().await.expect("the first piece");
        gate.open();
        let answer = client.finish().await;
        assert!(!answer.is_whole(), "{head:?}, {end:?}: ended cleanly");
        assert_eq!(answer.text(), "{\"a\":1,", "{head:?}, {end:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s03_an_http_2_stream_is_reset() {
    let (upstream, app) = one().await;
    let gate = Gate::shut();
    let mut script = sse_begin();
    script.extend([Step::SendChunk("data: 1\n\n".into()), Step::Hold(gate.clone()), Step::Close]);
    upstream.script(script);
    let mut front = connect_h2(app.addr()).await;
    let mut answer = front.send_request(h2_chat()).await.unwrap();
    answer.body_mut().frame().await.unwrap().unwrap();
    gate.open();
    let mut text = Vec::new();
    let error = soon("the end of the stream", async {
        loop {
            match answer.body_mut().frame().await {
                None => panic!("ended cleanly: {:?}", String::from_utf8_lossy(&text)),
                Some(Err(error)) => return error,
                Some(Ok(frame)) => text.extend_from_slice(frame.data_ref().unwrap()),
            }
        }
    })
    .await;
    assert!(!error.is_canceled(), "{error}");
    assert!(!String::from_utf8_lossy(&text).contains("[DONE]"));
}

/// A reset takes everything with it that has not been sent yet, so it has to come behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s03_over_http_2_a_broken_stream_says_why_before_its_reset() {
    for pieces in [0, 1, 50] {
        let (upstream, app) = one().await;
        let mut front = connect_h2(app.addr()).await;
        for round in 0..5 {
            let mut script = sse_begin();
            script.extend((0..pieces).map(|index| Step::SendChunk(format!("data: {index}\n\n").into())));
            script.push(Step::Close);
            upstream.script(script);
            let what = format!("{pieces} pieces, round {round}");
            let mut answer = front.send_request(h2_chat()).await.expect(&what);
            assert_eq!(answer.status(), 200, "{what}");
            let mut text = Vec::new();
            let error = soon("the end of the stream", async {
                loop {
                    match answer.body_mut().frame().await {
                        None => panic!("{what}: ended cleanly: {:?}", String::from_utf8_lossy(&text)),
                        Some(Err(error)) => return error,
                        Some(Ok(frame)) => text.extend_from_slice(frame.data_ref().unwrap()),
                    }
                }
            })
            .await;
            let text = String::from_utf8(text).unwrap();
            assert_eq!(text.matches("data: ").count(), pieces + 1, "{what}: {text} {error}");
            assert!(text.contains("backend_error"), "{what}: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s03_an_idle_timeout_that_was_set_cuts_a_silent_stream() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_IDLE_TIMEOUT", "300ms")], &[&upstream]).await;
    let mut script = sse_begin();
    // Longer in all than the limit, and never silent for so long.
    for _ in 0..5 {
        script.extend([Step::Pause(Duration::from_millis(100)), Step::SendChunk(": ping\n\n".into())]);
    }
    script.push(Step::Hold(Gate::shut()));
    upstream.script(script);
    let answer = app.ask(&Request::chat("m")).await;
    assert!(!answer.is_whole());
    assert!(answer.text().starts_with(&": ping\n\n".repeat(5)), "{}", answer.text());
    upstream.hung_up(0).await;
}

// === S4 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s04_a_slow_reader_slows_its_backend() {
    const STREAMS: usize = 64;
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    // Connections, tasks and the allocator's own needs are not what is measured: have them all once before.
    let gate = Gate::shut();
    upstream.always(held_stream("data: 1\n\n", &gate, "data: 2\n\n"));
    let mut warm = Vec::new();
    for _ in 0..STREAMS {
        let mut client = Client::connect_narrow(proxy.addr).await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        warm.push(client);
    }
    let before = proxy.resident();
    gate.open();
    for client in &mut warm {
        assert!(client.finish().await.is_whole());
    }
    let mut script = sse_begin();
    script.push(Step::Flood(chunk(vec![b'x'; 16 * 1024]).into()));
    upstream.always(script);
    for client in &mut warm {
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
    }
    let sent = |index: usize| upstream.peek(STREAMS + index, |request| request.sent_len).unwrap();
    let total =
        settled("the backend is stopped", Duration::from_millis(500), || (0..STREAMS).map(sent).sum::<usize>()).await;
    let most = (0..STREAMS).map(sent).max().unwrap();
    let growth = proxy.resident().saturating_sub(before) / STREAMS as u64;
    println!("s04: at most {most} bytes taken per stream, {total} in all, {growth} bytes of memory each");
    // The kernel's own buffers, at four ends of two connections, are all that may be in between.
    assert!(most < 24 * 1024 * 1024, "{most} bytes were taken for one who does not read");
    assert!(growth <= 64 * 1024, "{growth} bytes of memory for one who does not read");
    // It is a slow reader, not a dead one: what it reads makes room for more.
    let stopped_at = sent(0);
    for _ in 0..2_000 {
        warm[0].piece().await.expect("a chunk");
    }
    eventually("the backend goes on", async || sent(0) > stopped_at).await;
    for client in warm {
        client.vanish();
    }
    for index in 0..STREAMS {
        upstream.hung_up(STREAMS + index).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s04_a_slow_reader_slows_nobody_else() {
    let (upstream, app) = one().await;
    let mut slow = Vec::new();
    for index in 0..8 {
        let mut script = sse_begin();
        script.push(Step::Flood(chunk(vec![b'x'; 16 * 1024]).into()));
        upstream.script(script);
        let mut client = Client::connect_narrow(app.addr()).await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        upstream.request(index).await;
        slow.push(client);
    }
    for _ in 0..50 {
        let asked = tokio::time::timeout(Duration::from_secs(5), app.ask(&Request::chat("m"))).await;
        assert_eq!(asked.expect("others are served").status, 200);
    }
}

// === S5 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s05_streams_pass_byte_for_byte() {
    let (upstream, app) = one().await;
    let mut rng = fastrand::Rng::with_seed(5);
    let coded: Vec<u8> =
        [0x1f, 0x8b, 8, 0].into_iter().chain(std::iter::repeat_with(|| rng.u8(..)).take(2000)).collect();
    let streams: [(&str, Vec<u8>); 9] = [
        ("a space after the colon", b"data: {\"a\":1}\n\ndata: [DONE]\n\n".to_vec()),
        ("no space", b"data:{\"a\":1}\n\ndata:[DONE]\n\n".to_vec()),
        ("CRLF", b"event: message\r\ndata: {\"a\":1}\r\n\r\ndata: [DONE]\r\n\r\n".to_vec()),
        ("CR", b"data: 1\r\rdata: [DONE]\r\r".to_vec()),
        (
            "comments and pings",
            b": keep-alive\n\n:\n\nevent: ping\ndata: {\"type\": \"ping\"}\n\n: OPENROUTER\n\n".to_vec(),
        ),
        ("several lines, an id, a retry", b"id: 7\nretry: 100\ndata: a\ndata: b\n\nnonsense\n\n".to_vec()),
        ("no end of the last event", b"data: {\"a\":1}\n\ndata: [DONE]".to_vec()),
        ("what is no UTF-8", b"data: \xff\xfe\x00\n\n".to_vec()),
        ("what is compressed", coded),
    ];
    for (what, stream) in streams {
        for size in [1, 5, 64, stream.len()] {
            let coding = if what == "what is compressed" { "content-encoding: gzip\r\n" } else { "" };
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{coding}transfer-encoding: chunked\r\n\r\n"
            );
            let mut script = vec![Step::ReadBody, Step::Send(head.into())];
            script.extend(stream.chunks(size).map(|piece| Step::SendChunk(piece.to_vec().into())));
            script.push(Step::Send(LAST_CHUNK.into()));
            upstream.script(script);
            let answer = app.ask(&Request::chat("m")).await;
            assert!(answer.is_whole(), "{what} in pieces of {size}");
            assert_eq!(answer.bytes(), stream, "{what} in pieces of {size}");
            assert_eq!(answer.header("content-encoding").is_some(), !coding.is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s05_other_streams_and_answers_pass_byte_for_byte() {
    let (upstream, app) = one().await;
    let mut rng = fastrand::Rng::with_seed(7);
    for content_type in ["application/x-ndjson", "application/octet-stream", "audio/mpeg", "application/json"] {
        let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(300_000).collect();
        let header = format!("content-type: {content_type}\r\n");
        upstream.script(reply("200 OK", &header, &bytes));
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(
            (answer.header("content-type"), answer.header("content-length")),
            (Some(content_type), Some("300000"))
        );
        assert!(answer.bytes() == bytes, "{content_type}");
        let head = format!("HTTP/1.1 200 OK\r\n{header}transfer-encoding: chunked\r\n\r\n");
        let mut script = vec![Step::ReadBody, Step::Send(head.into())];
        script.extend(bytes.chunks(9_999).map(|piece| Step::SendChunk(piece.to_vec().into())));
        script.push(Step::Send(LAST_CHUNK.into()));
        upstream.script(script);
        let answer = app.ask(&Request::chat("m")).await;
        assert!(answer.is_whole() && answer.bytes() == bytes, "{content_type}, chunked");
    }
}

/// HTTP/1.0 has no chunks: only a reset tells a cut from the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s03_an_http_1_0_client_sees_that_its_answer_was_cut() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n";
    upstream.script(vec![Step::ReadBody, Step::Send(head.into()), Step::SendChunk("half of it".into()), Step::Reset]);
    let mut client = app.client().await;
    client.send(Request::chat("m").http10().bytes()).await;
    let answer = client.answer().await;
    assert_eq!((answer.text().as_str(), answer.end), ("half of it", End::Reset));
}
