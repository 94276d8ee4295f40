//! How patient the proxy is with its clients: those that still send when they have been answered, those that do not read,
//! those that say nothing, and those that take up room.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};

use crate::support::*;

const MIB: usize = 1024 * 1024;

async fn one(knobs: &[(&str, &str)]) -> (Upstream, TestApp) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(knobs, &[&upstream]).await;
    (upstream, app)
}

/// A body that begins with its model and goes on for so long.
fn long_body(model: &str, len: usize) -> Vec<u8> {
    let mut body = format!(r#"{{"model":"{model}","pad":""#).into_bytes();
    body.resize(len - 2, b'x');
    body.extend_from_slice(b"\"}");
    body
}

fn h2_post(body: impl Into<Bytes>) -> hyper::Request<BoxBody<Bytes, Infallible>> {
    let request =
        hyper::Request::post("http://front.test/v1/chat/completions").header("content-type", "application/json");
    request.body(Full::new(body.into()).boxed()).unwrap()
}

// === answers that come early ===

/// A client that reads only when it has sent everything, as many do.
async fn send_all_then_read(app: &TestApp, request: &Request) -> Answer {
    let mut client = app.client().await;
    let sent = client.try_send(request.bytes()).await;
    assert!(sent.is_ok(), "{}: {sent:?}", String::from_utf8_lossy(&request.head_bytes()));
    client.answer().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_error_reaches_a_client_that_sends_everything_first() {
    let (_upstream, app) = one(&[("PROXY_MAX_BODY", "30MiB")]).await;
    let (body, over) = (long_body("unheard", 20 * MIB), long_body("m", 40 * MIB));
    let chunked = |body: &[u8]| Request::new("POST", "/v1/completions").chunks(body.chunks(60_000));
    for (status, request) in [
        (404, Request::post("/v1/chat/completions", &body)),
        (404, Request::post("/v1/chat/completions", &body).header("connection", "close")),
        (404, Request::post("/v1/chat/completions", &body).http10()),
        (404, chunked(&body)),
        (404, chunked(&body).header("connection", "close")),
        (404, Request::post("/nowhere", &body)),
        (400, Request::post("/v1/chat/completions", [&b"no json"[..], &body].concat())),
        (413, Request::post("/v1/chat/completions", &over)),
    ] {
        let answer = send_all_then_read(&app, &request).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(answer.is_whole() && answer.json()["error"].is_object());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backends_early_answer_reaches_a_client_that_sends_everything_first() {
    let (upstream, app) = one(&[]).await;
    let body = long_body("m", 20 * MIB);
    let head = "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n";
    for close in [false, true] {
        for client_closes in [false, true] {
            let said = if close { "connection: close\r\n" } else { "" };
            let answer = Step::Send(format!("{head}{said}\r\n{{}}").into());
            // It reads a little, so that its end is no reset.
            let mut script = vec![Step::ReadAtLeast(1), answer];
            if close {
                script.extend([Step::HalfClose, Step::ReadBody]);
            }
            upstream.script(script);
            let mut request = Request::post("/v1/chat/completions", &body);
            if client_closes {
                request = request.header("connection", "close");
            }
            let answer = send_all_then_read(&app, &request).await;
            assert_eq!((answer.status, answer.text().as_str()), (400, "{}"), "{close}, {client_closes}");
        }
    }
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_kept_when_what_was_left_of_a_request_has_come() {
    let (_upstream, app) = one(&[]).await;
    let mut client = app.client().await;
    let body = long_body("unheard", 20 * MIB);
    client.send(Request::new("POST", "/v1/completions").chunks(body.chunks(60_000)).bytes()).await;
    assert_eq!(client.answer().await.status, 404);
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_error_reaches_a_client_while_the_proxy_shuts_down() {
    let (_upstream, app) = one(&[("PROXY_DRAIN_TIMEOUT", "20s")]).await;
    let mut client = app.client().await;
    let wire = Request::post("/v1/chat/completions", long_body("unheard", 20 * MIB)).bytes();
    client.send(&wire[..4 * MIB]).await;
    let stopping = tokio::spawn(app.shutdown());
    for piece in wire[4 * MIB..].chunks(2 * MIB) {
        client.send(piece).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.is_whole()), (404, true));
    drop(client);
    soon("the proxy has shut down", stopping).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_error_costs_no_http_2_stream() {
    let (_upstream, app) = one(&[]).await;
    let body = Bytes::from(long_body("unheard", 20 * MIB));
    // With a length the proxy knows how much there is to come, and says all that it has to say at once.
    for length in [None, Some(body.len())] {
        let mut front = h2_raw(&app, 1 << 20).await;
        let mut request = hyper::Request::post("http://front.test/v1/chat/completions");
        if let Some(length) = length {
            request = request.header("content-length", length);
        }
        let (answer, mut sending) = front.send_request(request.body(()).unwrap(), false).unwrap();
        // All of the body is taken, although the answer came long before its end.
        let mut left = body.clone();
        while !left.is_empty() {
            sending.reserve_capacity(left.len());
            let room = soon("a window", std::future::poll_fn(|cx| sending.poll_capacity(cx))).await;
            let room = room.expect("the stream was reset").expect("the stream was reset");
            let piece = left.split_to(room.min(left.len()));
            sending.send_data(piece, left.is_empty()).expect("the stream was reset");
        }
        let answer = soon("the answer", answer).await.unwrap();
        assert_eq!(answer.status(), 404, "{length:?}");
        let mut body = answer.into_body();
        let mut text = Vec::new();
        while let Some(data) = soon("the body", body.data()).await {
            text.extend_from_slice(&data.unwrap());
        }
        assert!(String::from_utf8_lossy(&text).contains("model_not_found"), "{length:?}");
    }
}

/// An HTTP/2 connection by hand, whose streams may each be sent `window` bytes ahead of what is read.
async fn h2_raw(app: &TestApp, window: u32) -> h2::client::SendRequest<Bytes> {
    let stream = tokio::net::TcpStream::connect(app.addr()).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(window).initial_connection_window_size(1 << 20).enable_push(false);
    let (sender, connection) = builder.handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

// === clients that do not read ===

fn flood() -> Script {
    [sse_begin(), vec![Step::Flood(chunk(vec![b'x'; 16 * 1024]).into())]].concat()
}

async fn full(upstream: &Upstream, app: &TestApp) {
    app.add(Spec::of(upstream).label("inference.max_inflight", "2")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_read_do_not_hold_a_backend() {
    for way in ["HTTP/1.1", "HTTP/1.0", "HTTP/2", "WebSocket"] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::start_with(&[("PROXY_CLIENT_WRITE_TIMEOUT", "1s")]).await;
        full(&upstream, &app).await;
        let mut held: Vec<Box<dyn std::any::Any>> = Vec::new();
        for index in 0..2 {
            match way {
                "HTTP/2" => {
                    upstream.script(flood());
                    let mut front = h2_raw(&app, 1000).await;
                    let request = hyper::Request::post("http://front.test/v1/chat/completions").body(()).unwrap();
                    let (answer, mut sending) = front.send_request(request, false).unwrap();
                    sending.send_data(r#"{"model":"m"}"#.into(), true).unwrap();
                    // Its body is there, and nobody reads it.
                    held.push(Box::new((soon("the head", answer).await.unwrap(), front)));
                }
                "WebSocket" => {
                    upstream.script([switching(), vec![Step::Flood(vec![b'x'; 16 * 1024].into())]].concat());
                    let asks = "host: p\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                                Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
                    let mut client = Client::connect_narrow(app.addr()).await;
                    client.send(Request::get("/v1/realtime?model=m").only_headers(asks).bytes()).await;
                    held.push(Box::new(client));
                }
                _ => {
                    upstream.script(flood());
                    let mut client = Client::connect_narrow(app.addr()).await;
                    let request = Request::chat("m");
                    client.send(if way == "HTTP/1.0" { request.http10() } else { request }.bytes()).await;
                    held.push(Box::new(client));
                }
            }
            upstream.request(index).await;
        }
        let since = Instant::now();
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(answer.status, 200, "{way}: {}", answer.text());
        let waited = since.elapsed();
        println!("{way}: a place was free after {waited:?}");
        assert!(waited < Duration::from_secs(8), "{way}: {waited:?}");
        for index in 0..2 {
            upstream.hung_up(index).await;
        }
        drop(held);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_slowly_gets_all_of_its_answer() {
    let (upstream, app) = one(&[("PROXY_CLIENT_WRITE_TIMEOUT", "1s")]).await;
    upstream.always(flood());
    for narrow in [false, true] {
        let addr = app.addr();
        let mut client = if narrow { Client::connect_narrow(addr).await } else { Client::connect(addr).await };
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        // Nothing is read until the kernel holds as much as it takes.
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(4) {
            for _ in 0..8 {
                assert!(client.piece().await.is_some(), "narrow {narrow}: cut after {:?}", since.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        client.vanish();
    }
    // A window that opens little by little.
    let mut front = h2_raw(&app, 1000).await;
    let request = hyper::Request::post("http://front.test/v1/chat/completions").body(()).unwrap();
    let (answer, mut sending) = front.send_request(request, false).unwrap();
    sending.send_data(r#"{"model":"m"}"#.into(), true).unwrap();
    let mut body = soon("the head", answer).await.unwrap().into_body();
    for _ in 0..12 {
        let data = soon("a piece", body.data()).await.expect("the stream has ended").expect("the stream was reset");
        tokio::time::sleep(Duration::from_millis(400)).await;
        body.flow_control().release_capacity(data.len()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_of_the_backend_is_not_the_clients() {
    let (upstream, app) = one(&[("PROXY_CLIENT_WRITE_TIMEOUT", "300ms")]).await;
    upstream.always(
        [
            sse_begin(),
            vec![
                Step::SendChunk("data: 1\n\n".into()),
                Step::Pause(Duration::from_secs(2)),
                Step::SendChunk("data: 2\n\n".into()),
                Step::Send(LAST_CHUNK.into()),
            ],
        ]
        .concat(),
    );
    let answer = app.ask(&Request::chat("m")).await;
    assert_eq!((answer.text().as_str(), answer.is_whole()), ("data: 1\n\ndata: 2\n\n", true));
    let mut front = connect_h2(app.addr()).await;
    let answer = front.send_request(h2_post(r#"{"model":"m"}"#)).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "data: 1\n\ndata: 2\n\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_timeout_that_was_set_ends_a_silent_tunnel() {
    let (upstream, app) = one(&[("PROXY_IDLE_TIMEOUT", "1s")]).await;
    upstream.always([switching(), vec![Step::Echo]].concat());
    let asks = "host: p\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let mut client = app.client().await;
    client.send(Request::get("/v1/realtime?model=m").only_headers(asks).bytes()).await;
    assert_eq!(client.any_head().await.unwrap().word(1), "101");
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        client.send("ping").await;
        assert_eq!(client.raw(4).await, b"ping");
    }
    let since = Instant::now();
    client.raw_to_end().await;
    assert!(since.elapsed() > Duration::from_millis(800), "{:?}", since.elapsed());
    upstream.hung_up(0).await;
    app.inflight_is("a", "m", 0.0).await;
}

// === clients that say nothing ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_are_closed_after_the_time_that_was_set() {
    let (upstream, app) = one(&[("PROXY_CLIENT_IDLE_TIMEOUT", "1s")]).await;
    let gate = Gate::shut();
    let mut silent = app.client().await;
    let mut idle = app.client().await;
    assert_eq!(idle.ask(&Request::chat("m")).await.status, 200);
    let mut front = h2_raw(&app, 1 << 16).await;
    upstream.script(held_stream("data: 1\n\n", &gate, "data: 2\n\n"));
    let mut busy = h2_raw(&app, 1 << 16).await;
    let request = || hyper::Request::post("http://front.test/v1/chat/completions").body(()).unwrap();
    let (answer, mut sending) = busy.send_request(request(), false).unwrap();
    sending.send_data(r#"{"model":"m"}"#.into(), true).unwrap();
    let mut body = soon("the head", answer).await.unwrap().into_body();
    let since = Instant::now();
    for (what, client) in [("silent", &mut silent), ("idle", &mut idle)] {
        assert_eq!(client.raw_to_end().await, (Vec::new(), End::Closed), "{what}");
    }
    eventually("the HTTP/2 connection has ended", async || {
        std::future::poll_fn(|cx| {
            std::task::Poll::Ready(!matches!(front.poll_ready(cx), std::task::Poll::Ready(Ok(()))))
        })
        .await
    })
    .await;
    assert!((700..5_000).contains(&since.elapsed().as_millis()), "{:?}", since.elapsed());
    tokio::time::sleep(Duration::from_secs(2)).await;
    gate.open();
    let mut text = Vec::new();
    while let Some(data) = soon("the rest", body.data()).await {
        text.extend_from_slice(&data.expect("a connection with a stream is not idle"));
    }
    assert_eq!(text, b"data: 1\n\ndata: 2\n\n");
}

// === HTTP/2 as HTTP/1.1 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_may_be_as_large_over_http_2_as_over_http_1() {
    let (upstream, app) = one(&[]).await;
    let front = connect_h2(app.addr()).await;
    for (lines, bytes, status) in
        [(100, 10, 200), (10, 4_000, 200), (60, 1_000, 200), (200, 10, 431), (20, 4_000, 431), (2_000, 100, 431)]
    {
        let mut request = h2_post(r#"{"model":"m"}"#);
        for n in 0..lines {
            let name: hyper::header::HeaderName = format!("x-line-{n}").parse().unwrap();
            request.headers_mut().insert(name, "v".repeat(bytes).parse().unwrap());
        }
        let answer = front.clone().send_request(request).await.unwrap();
        assert_eq!(answer.status(), status, "{lines} lines of {bytes} bytes");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let json: serde_json::Value = serde_json::from_slice(&body).expect("JSON whatever the status");
        assert_eq!(json["error"]["code"].is_string(), status != 200, "{json}");
    }
    // Answers of as many lines as a backend may send.
    for lines in [90, 101, 125] {
        let lines: String = (0..lines).map(|n| format!("x-line-{n}: {n}\r\n")).collect();
        upstream.script(vec![
            Step::ReadBody,
            Step::Send(format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{lines}\r\n{{}}").into()),
        ]);
        let answer = front.clone().send_request(h2_post(r#"{"model":"m"}"#)).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(
            answer.headers().keys().filter(|name| name.as_str().starts_with("x-line-")).count(),
            lines.lines().count()
        );
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "{}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interim_answers_and_trailers_pass_over_http_2() {
    let (upstream, app) = one(&[]).await;
    upstream.script(vec![
        Step::ReadBody,
        Step::Send("HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n".into()),
        Step::Send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n".into()),
        Step::SendChunk("text".into()),
        Step::Send("0\r\nx-sum: 9\r\n\r\n".into()),
    ]);
    let mut front = h2_raw(&app, 1 << 16).await;
    let request = hyper::Request::post("http://front.test/v1/chat/completions").body(()).unwrap();
    let (mut answer, mut sending) = front.send_request(request, false).unwrap();
    sending.send_data(r#"{"model":"m"}"#.into(), false).unwrap();
    let mut trailers = hyper::HeaderMap::new();
    trailers.insert("x-checked", "1".parse().unwrap());
    sending.send_trailers(trailers).unwrap();
    for (status, link) in [(103, Some("</a>")), (102, None)] {
        let interim = soon("an interim answer", std::future::poll_fn(|cx| answer.poll_informational(cx))).await;
        let interim = interim.unwrap().unwrap();
        let told = interim.headers().get("link").map(|value| value.to_str().unwrap());
        assert_eq!((interim.status().as_u16(), told), (status, link));
    }
    let mut body = soon("the head", answer).await.unwrap().into_body();
    let mut text = Vec::new();
    while let Some(data) = soon("the body", body.data()).await {
        text.extend_from_slice(&data.unwrap());
    }
    assert_eq!(text, b"text");
    let trailers = soon("trailers", body.trailers()).await.unwrap().expect("trailers");
    assert_eq!(trailers.get("x-sum").unwrap(), "9");
    let received = upstream.whole(0).await;
    assert_eq!(received.body.trailers, [("x-checked".to_owned(), "1".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_for_100_over_http_2_gets_it() {
    let (upstream, app) = one(&[]).await;
    let mut front = h2_raw(&app, 1 << 16).await;
    let request = hyper::Request::post("http://front.test/v1/chat/completions").header("expect", "100-continue");
    let (mut answer, mut sending) = front.send_request(request.body(()).unwrap(), false).unwrap();
    let interim = soon("100", std::future::poll_fn(|cx| answer.poll_informational(cx))).await.unwrap().unwrap();
    assert_eq!(interim.status(), 100);
    sending.send_data(r#"{"model":"m"}"#.into(), true).unwrap();
    assert_eq!(soon("the answer", answer).await.unwrap().status(), 200);
    upstream.whole(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_http_1_could_not_say_costs_its_stream_and_not_the_connection() {
    let (_upstream, app) = one(&[]).await;
    let front = connect_h2(app.addr()).await;
    for (name, value) in [("host", "other.test"), ("content-length", "7, 7"), ("x-forwarded-for", "\u{7f}")] {
        let mut request = h2_post(r#"{"model":"m"}"#);
        let Ok(value) = value.parse() else { continue };
        request.headers_mut().insert(name, value);
        // By an answer or a reset.
        if let Ok(answer) = front.clone().send_request(request).await {
            assert!(answer.status().is_client_error(), "{name}: {}", answer.status());
        }
        let next = front.clone().send_request(h2_post(r#"{"model":"m"}"#)).await;
        assert_eq!(next.expect("the connection lives").status(), 200, "{name}");
    }
}

// === memory ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_have_only_begun_take_no_more_room_than_they_may() {
    const CLIENTS: usize = 600;
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start(&[("PROXY_HOLD_MAX", "1MiB")], &[&upstream]).await;
    assert_eq!(Client::connect(proxy.addr).await.ask(&Request::chat("m")).await.status, 200);
    let before = proxy.resident();
    let half = Request::post("/v1/chat/completions", vec![b' '; 128 * 1024]);
    let half = &half.bytes()[..half.head_bytes().len() + 62 * 1024];
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = Client::connect(proxy.addr).await;
        client.send(half).await;
        clients.push(client);
    }
    let mut refused = 0;
    for client in &mut clients {
        if !client.is_quiet() {
            refused += 1;
        }
    }
    let growth = settled("nothing more is taken", Duration::from_millis(500), || proxy.resident() / 4096).await * 4096;
    let growth = growth.saturating_sub(before);
    println!("{CLIENTS} half bodies: {} MiB of memory, {refused} refused", growth / MIB as u64);
    assert!(growth < 24 * MIB as u64, "{} MiB", growth / MIB as u64);
    drop(clients);
    let late = Request::post("/v1/chat/completions", br#"{"messages":[],"model":"m"}"#);
    eventually("there is room again", async || Client::connect(proxy.addr).await.ask(&late).await.status == 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_keeps_nothing_of_a_large_head() {
    const CLIENTS: usize = 200;
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let ask = async |request: &Request| {
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let mut client = Client::connect(proxy.addr).await;
            assert_eq!(client.ask(request).await.status, 200);
            clients.push(client);
        }
        clients
    };
    let small = ask(&Request::chat("m")).await;
    let before = proxy.resident();
    let large = ask(&Request::chat("m").header("x-large", &"x".repeat(60 * 1024))).await;
    let growth = proxy.resident().saturating_sub(before) / CLIENTS as u64;
    println!("{growth} bytes of memory for an idle connection that sent a head of 60 KiB");
    assert!(growth < 24 * 1024, "{growth} bytes");
    drop((small, large));
}

// === descriptors ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_make_room_for_clients_that_ask() {
    const FILES: u64 = 256;
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start_with_files(FILES, &[], &[&upstream]).await;
    // Some have been served, some have not said a word, some speak HTTP/2.
    let mut idle = Vec::new();
    for n in 0..FILES / 5 * 2 - 2 {
        let mut client = Client::connect(proxy.addr).await;
        match n % 3 {
            0 => assert_eq!(client.ask(&Request::chat("m")).await.status, 200),
            1 => client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await,
            _ => {}
        }
        idle.push(client);
    }
    let since = Instant::now();
    let mut asking = Vec::new();
    for _ in 0..60 {
        let mut client = Client::connect(proxy.addr).await;
        asking.push(tokio::spawn(async move {
            assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
            client
        }));
    }
    let mut asked = Vec::new();
    for asking in asking {
        asked.push(soon("an answer", asking).await.unwrap());
    }
    println!("60 more clients than there is room for were served after {:?}", since.elapsed());
    idle[0].raw_to_end().await;
    assert!(asked.iter_mut().all(Client::is_quiet), "one that was in use was closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_2_streams_do_not_use_up_the_descriptors() {
    const FILES: u64 = 512;
    const STREAMS: usize = 200;
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start_with_files(FILES, &[], &[&upstream]).await;
    let gate = Gate::shut();
    upstream.always(held_reply(&gate));
    let mut asking = Vec::new();
    for _ in 0..4 {
        let front = connect_h2(proxy.addr).await;
        for _ in 0..STREAMS {
            let mut front = front.clone();
            asking.push(tokio::spawn(async move {
                let answer = front.send_request(h2_post(r#"{"model":"m"}"#)).await.expect("an answer");
                answer.status()
            }));
        }
    }
    let most = settled("no more are sent", Duration::from_secs(1), || proxy.open_sockets()).await;
    println!("{} streams: {most} sockets of {FILES} descriptors", asking.len());
    assert!(most as u64 <= FILES / 5 * 4 + 20, "{most} sockets");
    assert!(upstream.count() >= 300, "{} reached the backend", upstream.count());
    gate.open();
    for asking in asking {
        assert_eq!(soon("an answer", asking).await.unwrap(), 200);
    }
}

/// An address of this machine that is none of its loopback's, if it has one.
fn address_of_this_machine() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent; this only asks which address would be used.
    socket.connect("192.0.2.1:9").ok()?;
    let ip = socket.local_addr().unwrap().ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_health_check_gets_in_when_the_proxy_is_full() {
    const FILES: u64 = 256;
    let Some(ip) = address_of_this_machine() else { return };
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start_with_files(FILES, &[("PROXY_BIND", "::")], &[&upstream]).await;
    let port = proxy.addr.port();
    let gate = Gate::shut();
    upstream.always(held_stream("data: 1\n\n", &gate, "data: 2\n\n"));
    let mut busy = Vec::new();
    for _ in 0..FILES {
        let mut client = Client::connect(SocketAddr::new(ip, port)).await;
        client.send(Request::chat("m").bytes()).await;
        busy.push(client);
    }
    settled("no more are served", Duration::from_secs(1), || upstream.count()).await;
    assert!(upstream.count() < FILES as usize / 2, "{}: it is not full", upstream.count());
    for _ in 0..20 {
        let mut client = Client::connect(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)).await;
        let asked = tokio::time::timeout(Duration::from_secs(5), client.ask(&Request::get("/healthz"))).await;
        assert_eq!(asked.expect("the health check waits behind clients").status, 200);
    }
    gate.open();
    for client in &mut busy {
        assert_eq!(client.answer().await.status, 200, "those that waited are served in the end");
    }
}
