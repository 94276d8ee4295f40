//! H1 and R9 at the connection: how long, how large, how many, and how it ends.

use std::time::{Duration, Instant};

use crate::support::*;

const MIB: usize = 1024 * 1024;

async fn one() -> (Upstream, TestApp) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    (upstream, app)
}

/// The median and the 99th percentile.
fn percentiles(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

// === slow ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_heads_that_drip_slow_nobody_else() {
    const DRIPS: usize = 15;
    let (_upstream, app) = one().await;
    let wire = Request::chat("m").bytes();
    let mut dripping = Vec::new();
    for _ in 0..100 {
        let mut client = app.client().await;
        let wire = wire.clone();
        dripping.push(tokio::spawn(async move {
            client.send_pieces(wire[..DRIPS].chunks(1), Duration::from_millis(100)).await;
            assert!(client.is_quiet(), "an answer to {DRIPS} bytes of a head");
            // Slow is not wrong: what is complete in the end is served.
            client.send(&wire[DRIPS..]).await;
            assert_eq!(client.answer().await.status, 200);
        }));
    }
    let mut client = app.client().await;
    let mut times = Vec::new();
    while !dripping.iter().all(tokio::task::JoinHandle::is_finished) {
        let since = Instant::now();
        assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
        times.push(since.elapsed());
    }
    for dripped in dripping {
        dripped.await.unwrap();
    }
    let (p50, p99) = percentiles(times);
    println!("h01: beside 100 dripping heads: p50 {p50:?}, p99 {p99:?}");
    assert!(p99 < Duration::from_millis(250), "p99 {p99:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_slow_body_that_makes_progress_is_served() {
    let (upstream, app) = one().await;
    let body = br#"{"messages":[{"role":"user","content":"slowly"}],"model":"m","stream":false}"#;
    let requests = [
        Request::post("/v1/chat/completions", body),
        Request::new("POST", "/v1/chat/completions").chunks(body.chunks(7)),
    ];
    for (index, request) in requests.into_iter().enumerate() {
        let mut client = app.client().await;
        let pieces = request.bytes();
        client.send(request.head_bytes()).await;
        client.send_pieces(pieces[request.head_bytes().len()..].chunks(4), Duration::from_millis(50)).await;
        assert_eq!(client.answer().await.status, 200);
        assert_eq!(upstream.whole(index).await.body.bytes, body);
    }
}

// === large ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_heads_of_an_ordinary_size_pass() {
    let (upstream, app) = one().await;
    let many = (0..90).fold(Request::chat("m"), |request, n| request.header(&format!("x-line-{n}"), "value"));
    let long = Request::chat("m").header("cookie", &"c".repeat(16 * 1024));
    let uri = Request::post(&format!("/v1/completions?q={}", "u".repeat(8 * 1024)), r#"{"model":"m"}"#);
    for (index, request) in [many, long, uri].into_iter().enumerate() {
        let answer = app.ask(&request).await;
        assert_eq!(answer.status, 200, "{index}: {}", answer.text());
        let head = upstream.whole(index).await.head;
        let longest = head.headers.iter().map(|(_, value)| value.len()).max().unwrap();
        match index {
            0 => assert_eq!(head.headers.iter().filter(|(name, _)| name.starts_with("x-line-")).count(), 90),
            1 => assert_eq!(longest, 16 * 1024),
            _ => assert_eq!(head.word(1).len(), "/v1/completions?q=".len() + 8 * 1024),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_heads_that_are_too_large_are_told_so() {
    let (upstream, app) = one().await;
    let lines = |n: usize| (0..n).map(|n| format!("x-{n}: y\r\n")).collect::<String>();
    let cases: [(&str, String, &[u16]); 6] = [
        ("a line of 1 MiB", format!("GET /v1/models HTTP/1.1\r\nhost: p\r\nx: {}\r\n\r\n", "y".repeat(MIB)), &[431]),
        ("a name of 1 MiB", format!("GET /v1/models HTTP/1.1\r\nhost: p\r\n{}: y\r\n\r\n", "x".repeat(MIB)), &[431]),
        ("1 MiB of lines", format!("GET /v1/models HTTP/1.1\r\nhost: p\r\n{}\r\n", lines(110_000)), &[400, 431]),
        ("5 000 lines", format!("GET /v1/models HTTP/1.1\r\nhost: p\r\n{}\r\n", lines(5_000)), &[400, 431]),
        ("a path of 1 MiB", format!("GET /v1/{} HTTP/1.1\r\nhost: p\r\n\r\n", "u".repeat(MIB)), &[400, 414, 431]),
        (
            "a method of 1 MiB",
            format!("{} /v1/models HTTP/1.1\r\nhost: p\r\n\r\n", "M".repeat(MIB)),
            &[400, 414, 431, 501],
        ),
    ];
    for (what, wire, statuses) in cases {
        let mut client = app.client().await;
        match client.try_ask(wire.as_bytes()).await {
            Ok(answer) => {
                println!("h01: {what}: {} {}", answer.status, answer.text());
                assert!(statuses.contains(&answer.status), "{what}: {} {}", answer.status, answer.text());
                assert!(answer.is_whole(), "{what}");
            }
            Err(end) => panic!("{what}: no answer: connection {end:?}"),
        }
        // Whatever is left of it must not be taken for a request.
        client.raw_to_end().await;
    }
    assert_eq!(upstream.count(), 0);
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

/// A head that comes in small pieces is measured as a whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_head_that_never_ends_is_ended() {
    let (_upstream, app) = one().await;
    for line in [&b"x: y\r\n"[..], b"y", b"x\r", b"\n\n\n"] {
        let mut client = app.client().await;
        client.send("GET /v1/models HTTP/1.1\r\nx: y").await;
        let flood = client.send_aside(line.repeat(4 * MIB / line.len()));
        let (told, _) = client.raw_to_end().await;
        let told = String::from_utf8_lossy(&told).into_owned();
        // Lines of nothing but line ends may have been the end of a head.
        let status = told.split(' ').nth(1).unwrap_or_default();
        assert!(told.is_empty() || status.starts_with('4') || line == b"\n\n\n", "{told}");
        drop(flood);
    }
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

// === many ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_a_thousand_requests_at_once_are_answered_in_order() {
    const REQUESTS: usize = 1_000;
    let (upstream, app) = one().await;
    let mut wire = Vec::new();
    for n in 0..REQUESTS {
        match n % 4 {
            0 => wire.extend(Request::chat("m").header("x-number", &n.to_string()).bytes()),
            1 => wire.extend(Request::chat(&format!("unheard-{n}")).bytes()),
            2 => wire.extend(Request::get(&format!("/v1/models/unheard-{n}")).bytes()),
            _ => {
                let body = format!(r#"{{"model":"m","number":{n}}}"#);
                let request = Request::new("POST", "/v1/completions").header("x-number", &n.to_string());
                wire.extend(request.chunks(body.as_bytes().chunks(5)).bytes());
            }
        }
        if n % 4 == 0 || n % 4 == 3 {
            upstream.script(json_reply(&format!(r#"{{"number":{n}}}"#)));
        }
    }
    let mut client = app.client().await;
    let sending = client.send_aside(wire);
    for n in 0..REQUESTS {
        let answer = client.answer().await;
        match n % 4 {
            0 | 3 => assert_eq!((answer.status, answer.json()["number"].as_u64()), (200, Some(n as u64))),
            _ => assert!(answer.status == 404 && answer.text().contains(&format!("unheard-{n}")), "{}", answer.text()),
        }
    }
    sending.done().await.unwrap();
    assert!(client.is_quiet());
    assert_eq!(upstream.count(), REQUESTS / 2);
    for index in 0..upstream.count() {
        let number = upstream.peek(index, |request| request.head.header("x-number").unwrap().parse::<usize>().unwrap());
        assert_eq!(number, Some(index / 2 * 4 + index % 2 * 3), "out of order");
    }
    app.inflight_is("a", "m", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_who_asks_and_does_not_read_is_held_back() {
    const CLIENTS: usize = 8;
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    assert_eq!(Client::connect(proxy.addr).await.ask(&Request::chat("m")).await.status, 200);
    let before = proxy.resident();
    let flood = bytes::Bytes::from(Request::get("/v1/models").bytes().repeat(48 * MIB / 60));
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::connect_narrow(proxy.addr).await);
    }
    let sending: Vec<Sending> = clients.iter().map(|client| client.send_aside(flood.clone())).collect();
    let sent = || sending.iter().map(Sending::sent_len).max().unwrap();
    let most = settled("nothing more is taken", Duration::from_millis(500), sent).await;
    let growth = proxy.resident().saturating_sub(before) / CLIENTS as u64;
    println!("h01: {most} bytes of requests taken from one who does not read, {growth} bytes of memory each");
    assert!(most < 24 * MIB, "{most} bytes were taken");
    assert!(growth < 256 * 1024, "{growth} bytes of memory");
    assert_eq!(Client::connect(proxy.addr).await.ask(&Request::chat("m")).await.status, 200);
}

// === the end of a connection ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_connections_without_a_request_are_closed_cleanly_at_shutdown() {
    let (_upstream, app) = one().await;
    let mut silent = app.client().await;
    let mut idle = app.client().await;
    assert_eq!(idle.ask(&Request::chat("m")).await.status, 200);
    let since = Instant::now();
    app.shutdown().await;
    // Nobody waits for those who have asked nothing: the drain time of the suite is 5 s.
    assert!(since.elapsed() < Duration::from_secs(4), "took {:?}", since.elapsed());
    for (what, client) in [("silent", &mut silent), ("idle", &mut idle)] {
        assert_eq!(client.raw_to_end().await, (Vec::new(), End::Closed), "{what}");
    }
}

/// What has not been asked in whole is no work under way: anybody could hold the proxy up with four bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_half_a_head_does_not_hold_up_the_shutdown() {
    let head = "POST /v1/chat/completions HTTP/1.1\r\nho";
    for (begin, first) in [(head, false), ("\r\n", false), (head, true), ("\r\n", true), ("P", true)] {
        let (_upstream, app) = one().await;
        let mut client = app.client().await;
        if !first {
            assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
        }
        client.send(begin).await;
        let since = Instant::now();
        app.shutdown().await;
        let took = since.elapsed();
        assert!(took < Duration::from_secs(4), "{begin:?}, the first thing said {first}: took {took:?}");
        client.raw_to_end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_http_1_0_connections_are_kept_when_asked_and_then_said_so() {
    let (upstream, app) = one().await;
    for keep in [false, true] {
        for streamed in [false, true] {
            upstream.always(if streamed { sse_reply(&["data: 1\n\n"]) } else { json_reply("{}") });
            for target in ["/v1/chat/completions", "/nowhere"] {
                let mut request = Request::post(target, r#"{"model":"m"}"#).http10();
                if keep {
                    request = request.header("Connection", "keep-alive");
                }
                let what = format!("keep {keep}, streamed {streamed}, {target}");
                let mut client = app.client().await;
                let answer = client.ask(&request).await;
                assert_eq!(answer.status, if target == "/nowhere" { 404 } else { 200 }, "{what}");
                assert_eq!(answer.header("transfer-encoding"), None, "{what}");
                let kept = answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("keep-alive"));
                assert!(keep || !kept, "{what}: kept, though nobody asked");
                if kept {
                    assert!(answer.header("content-length").is_some(), "{what}: kept, and no end of the answer");
                    assert_eq!(client.ask(&request).await.status, answer.status, "{what}");
                } else {
                    assert_eq!(client.raw_to_end().await, (Vec::new(), End::Closed), "{what}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_close_means_close() {
    let (upstream, app) = one().await;
    for value in ["close", "Close", "keep-alive, close", "close, x-other"] {
        for (what, request) in [
            ("a backend's answer", Request::chat("m")),
            ("one of the proxy's own", Request::get("/v1/models")),
            ("an error", Request::chat("unheard")),
            ("an error before its body", Request::post("/nowhere", "{}")),
        ] {
            let served = upstream.count();
            let mut client = app.client().await;
            let behind = Request::chat("m").header("x-behind", "1").bytes();
            client.send([request.header("Connection", value).bytes(), behind].concat()).await;
            let answer = client.answer().await;
            assert!(answer.is_whole(), "{what}");
            let said = answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
            assert!(said, "{what}, {value:?}: does not say so: {:?}", answer.head);
            let (more, _) = client.raw_to_end().await;
            assert_eq!(String::from_utf8_lossy(&more), "", "{what}, {value:?}: something behind it was answered");
            let asked = usize::from(what == "a backend's answer");
            assert_eq!(upstream.count(), served + asked, "{what}, {value:?}: something behind it was served");
        }
    }
    // Of a stream, too.
    upstream.always(sse_reply(&["data: 1\n\n"]));
    let mut client = app.client().await;
    let answer = client.ask(&Request::chat("m").header("connection", "close")).await;
    assert_eq!((answer.text().as_str(), answer.end), ("data: 1\n\n", End::Whole));
    assert_eq!(client.ended().await, End::Closed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_without_close_a_connection_stays() {
    let (upstream, app) = one().await;
    let mut client = app.client().await;
    for request in [
        Request::chat("m"),
        Request::chat("m").header("Connection", "keep-alive"),
        Request::chat("m").header("Connection", "x-closed, not-close"),
        Request::chat("unheard"),
        Request::post("/nowhere", "{}"),
        Request::post("/v1/completions", "no json"),
        Request::new("OPTIONS", "/v1/chat/completions"),
        Request::new("DELETE", "/v1/models"),
        Request::get("/metrics"),
    ] {
        let answer = client.ask(&request).await;
        assert_ne!(answer.header("connection"), Some("close"), "{:?}", answer.head);
    }
    upstream.always(sse_reply(&["data: 1\n\n"]));
    assert!(client.ask(&Request::chat("m")).await.is_whole());
    assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
}

/// A refusal that needs no more of a body is given at once, and the rest of the body, when it comes, harms nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_an_early_refusal_costs_no_connection_unless_it_says_so() {
    let (upstream, app) = one().await;
    for chunked in [false, true] {
        let body = br#"{"model":"unheard","messages":[{"role":"user","content":"the rest of it"}]}"#;
        let request = match chunked {
            false => Request::post("/v1/chat/completions", body),
            true => Request::new("POST", "/v1/chat/completions").chunks(body.chunks(20)),
        };
        let wire = request.bytes();
        let cut = request.head_bytes().len() + 40;
        let mut client = app.client().await;
        client.send(&wire[..cut]).await;
        let refusal = client.answer().await;
        assert_openai_error(&refusal, 404, "model_not_found");
        let sent = client.try_send([&wire[cut..], &Request::chat("m").bytes()].concat()).await;
        if refusal.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            continue;
        }
        sent.expect("a connection that is not said to close stays");
        let next = client.next_answer(false).await.expect("a connection that is not said to close stays");
        assert_eq!(next.status, 200, "chunked {chunked}: {}", next.text());
    }
    assert!(upstream.count() <= 2);
}

// === HEAD ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_head_is_get_without_the_body() {
    let (upstream, app) = one().await;
    let mut client = app.client().await;
    for target in [
        "/healthz",
        "/readyz",
        "/metrics",
        "/status",
        "/v1/models",
        "/v1/models/m",
        "/v1/models/unheard",
        "/nowhere",
        "/sleep",
        "/v1/files",
        "/v1/realtime?model=unheard",
        "/v1/chat/completions",
    ] {
        let get = client.ask(&Request::get(target)).await;
        let head = client.ask(&Request::new("HEAD", target)).await;
        assert_eq!(head.status, get.status, "{target}");
        assert_eq!(head.header("content-type"), get.header("content-type"), "{target}");
        // Numbers and times on these two differ from one moment to the next.
        if !["/metrics", "/status"].contains(&target) && head.header("content-length").is_some() {
            assert_eq!(head.header("content-length"), get.header("content-length"), "{target}");
        }
    }
    // A backend that ends its answer to HEAD like one to GET.
    for (answer, length) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n", Some("1234")),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", None),
        ("HTTP/1.1 200 OK\r\n\r\n", None),
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 22\r\n\r\n", Some("22")),
        ("HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 31\r\nallow: GET\r\n\r\n", Some("31")),
    ] {
        upstream.script(vec![Step::ReadBody, Step::Send(answer.into())]);
        let head = client.ask(&Request::new("HEAD", "/v1/realtime?model=m")).await;
        assert_eq!((head.head.word(1), head.header("content-length")), (&answer[9..12], length), "{answer:?}");
        assert_eq!(client.ask(&Request::chat("m")).await.status, 200, "{answer:?}");
    }
    app.inflight_is("a", "m", 0.0).await;
    // With a body of its own, which nobody forbids.
    assert_eq!(client.ask(&Request::new("HEAD", "/v1/completions").body(r#"{"model":"m"}"#)).await.status, 200);
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
}
