//! R6: a connection that switches protocols (`/v1/realtime` over WebSocket): routed once, then bytes both ways, counted
//! and drained like a stream. What asks for an upgrade and may not have one is an ordinary request.

use std::time::{Duration, Instant};

use crate::support::*;

/// From the end of one side to the end of the other: what the suite insists on.
const HANG_UP_LIMIT: Duration = Duration::from_millis(500);

/// What belongs to an upgrade, without the request line.
const ASKS: &str = "host: proxy.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

fn upgrade(target: &str) -> Request {
    Request::get(target).only_headers(ASKS)
}

/// A backend whose every connection switches and then echoes.
async fn echoing(name: &'static str, models: &[&str]) -> Upstream {
    let upstream = Upstream::start(name, models).await;
    upstream.always([switching(), vec![Step::Echo]].concat());
    upstream
}

async fn one() -> (Upstream, TestApp) {
    let upstream = echoing("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    (upstream, app)
}

/// Sends the request, and fails the test unless the connection switches.
async fn open(client: &mut Client, request: &Request) -> wire::Head {
    client.send(request.bytes()).await;
    let head = client.any_head().await.unwrap();
    assert_eq!(head.word(1), "101", "no switch: {head:?}");
    head
}

async fn opened(app: &TestApp) -> Client {
    let mut client = app.client().await;
    open(&mut client, &upgrade("/v1/realtime?model=m")).await;
    client
}

/// Checks that the connection still carries bytes both ways.
async fn assert_flows(client: &mut Client, what: &str) {
    let sent = format!("ping {what}");
    client.send(&sent).await;
    assert_eq!(String::from_utf8_lossy(&client.raw(sent.len()).await), sent);
}

fn has_token(head: &wire::Head, name: &str, token: &str) -> bool {
    head.all(name).iter().any(|line| line.split(',').any(|one| one.trim().eq_ignore_ascii_case(token)))
}

// === the switch ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_an_upgrade_is_routed_by_its_query_and_both_heads_pass() {
    let (a, b) = (echoing("a", &["m"]).await, echoing("b", &["n", "org/x y"]).await);
    let app = TestApp::start().await;
    app.add(Spec::of(&a)).await;
    app.add(Spec::of(&b).label("inference.api.base_path", "/api/v1")).await;
    for (index, target) in ["/v1/realtime?model=n", "/v1/realtime?intent=x&model=org%2Fx%20y"].into_iter().enumerate() {
        let mut client = app.client().await;
        let request = upgrade(target)
            .header("Sec-WebSocket-Protocol", "realtime, openai-insecure-api-key.sk-1")
            .header("Sec-WebSocket-Extensions", "permessage-deflate")
            .header("Authorization", "Bearer sk-1")
            .header("X-Forwarded-For", "192.0.2.1");
        let head = open(&mut client, &request).await;
        assert!(has_token(&head, "upgrade", "websocket") && has_token(&head, "connection", "upgrade"), "{head:?}");
        assert_eq!(head.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert_eq!(head.header("x-session"), Some("7"));
        assert!(head.header("x-request-id").is_some_and(|id| !id.is_empty()), "{head:?}");
        for framing in ["content-length", "transfer-encoding"] {
            assert_eq!(head.header(framing), None, "a 101 has no body: {head:?}");
        }
        assert_flows(&mut client, target).await;
        let received = b.request(index).await.head;
        assert_eq!(received.start, format!("GET {} HTTP/1.1", target.replace("/v1", "/api/v1")));
        assert!(has_token(&received, "connection", "upgrade"), "{received:?}");
        assert_eq!(received.all("upgrade"), ["websocket"]);
        for (name, value) in [
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "realtime, openai-insecure-api-key.sk-1"),
            ("sec-websocket-extensions", "permessage-deflate"),
            ("authorization", "Bearer sk-1"),
            ("x-forwarded-host", "proxy.test"),
        ] {
            assert_eq!(received.all(name), [value]);
        }
        assert_eq!(received.all("host"), [b.addr.to_string()]);
        assert_eq!(received.all("x-forwarded-for").join(",").replace(' ', ""), "192.0.2.1,127.0.0.1");
    }
    assert_eq!(a.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_every_spelling_of_the_wish_counts() {
    let (upstream, app) = one().await;
    for lines in [
        "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n",
        "connection: upgrade\r\nupgrade: WebSocket\r\n",
        "CONNECTION:UPGRADE\r\nUPGRADE:websocket\r\n",
        "connection: keep-alive\r\nupgrade: websocket\r\nconnection: upgrade\r\n",
    ] {
        let mut client = app.client().await;
        let request = Request::get("/v1/realtime?model=m").only_headers(&format!("host: p\r\n{lines}"));
        open(&mut client, &request).await;
        assert_flows(&mut client, lines).await;
        let received = upstream.request(upstream.count() - 1).await.head;
        assert!(has_token(&received, "connection", "upgrade") && has_token(&received, "upgrade", "websocket"));
        assert_eq!(received.all("keep-alive").len(), 0, "{received:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_a_model_that_is_not_there_is_told_as_ever() {
    let (upstream, app) = one().await;
    let mut client = app.client().await;
    assert_openai_error(&client.ask(&upgrade("/v1/realtime?model=unheard")).await, 404, "model_not_found");
    // Nothing has switched: the connection is as good as before.
    assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
    app.ended("a").await;
    app.models_are(&[]).await;
    let answer = app.ask(&upgrade("/v1/realtime?model=m")).await;
    assert_openai_error(&answer, 503, "model_unavailable");
    assert_retry_after(&answer);
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_without_a_model_the_only_backend_is_meant() {
    let (a, app) = one().await;
    let mut client = app.client().await;
    open(&mut client, &upgrade("/v1/realtime")).await;
    assert_flows(&mut client, "no model").await;
    assert_eq!(a.request(0).await.head.word(1), "/v1/realtime");
    app.inflight_is("a", "m", 1.0).await;

    let b = echoing("b", &["n"]).await;
    app.add(Spec::of(&b)).await;
    for target in ["/v1/realtime", "/v1/realtime?intent=transcription", "/v1/realtime?model="] {
        let answer = app.ask(&upgrade(target)).await;
        assert_openai_error(&answer, 400, "model_required");
        assert!(answer.text().contains("model"), "{}", answer.text());
    }
    assert_eq!((a.count(), b.count()), (1, 0));
    assert_flows(&mut client, "still").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_an_answer_that_is_no_switch_is_an_answer() {
    let (upstream, app) = one().await;
    let mut client = app.client().await;
    for (round, status) in ["200 OK", "400 Bad Request", "401 Unauthorized", "404 Not Found", "426 Upgrade Required"]
        .into_iter()
        .enumerate()
    {
        let body = format!(r#"{{"detail":"{status}"}}"#);
        upstream.script(reply(status, "content-type: application/json\r\nx-from: backend\r\n", &body));
        let answer = client.ask(&upgrade("/v1/realtime?model=m")).await;
        assert_eq!((answer.head.word(1), answer.text().as_str()), (&status[..3], body.as_str()));
        assert_eq!((answer.header("x-from"), answer.end), (Some("backend"), End::Whole));
        assert!(!has_token(&answer.head, "connection", "upgrade"), "{:?}", answer.head);
        assert_eq!(upstream.count(), 2 * round + 1, "{status}: asked again");
        upstream.script(json_reply(r#"{"after":1}"#));
        assert_eq!(client.ask(&Request::chat("m")).await.json()["after"], 1, "{status}");
        app.inflight_is("a", "m", 0.0).await;
    }
    // In chunks, too.
    upstream.script(sse_reply(&["data: 1\n\n"]));
    let answer = client.ask(&upgrade("/v1/realtime?model=m")).await;
    assert_eq!((answer.text().as_str(), answer.end), ("data: 1\n\n", End::Whole));
    open(&mut client, &upgrade("/v1/realtime?model=m")).await;
    assert_flows(&mut client, "at last").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_a_backend_that_fails_before_it_switches() {
    let breaks: [(&str, Script); 4] = [
        ("resets", vec![Step::Reset]),
        ("closes", vec![Step::Close]),
        ("breaks the head", vec![Step::Send("HTTP/1.1 101 Sw".into()), Step::Close]),
        ("stalls", vec![Step::Hold(Gate::shut())]),
    ];
    for (what, script) in breaks {
        let (status, code) = if what == "stalls" { (504, "backend_timeout") } else { (502, "backend_error") };
        let upstream = echoing("a", &["m"]).await;
        let app = TestApp::start_with_backends(&[("PROXY_FIRST_BYTE_TIMEOUT", "300ms")], &[&upstream]).await;
        upstream.script(script);
        let mut client = app.client().await;
        let answer = client.ask(&upgrade("/v1/realtime?model=m")).await;
        println!("r06: {what}: {}", answer.text());
        assert_openai_error(&answer, status, code);
        assert_eq!(upstream.count(), 1, "{what}");
        app.inflight_is("a", "m", 0.0).await;
        open(&mut client, &upgrade("/v1/realtime?model=m")).await;
        assert_flows(&mut client, what).await;
    }
    let (a, b) = (echoing("a", &["m"]).await, echoing("b", &["m"]).await);
    let app = TestApp::with(&[&a, &b]).await;
    a.refuse().await;
    for round in 0..8 {
        let mut client = opened(&app).await;
        assert_flows(&mut client, "the other one").await;
        assert_eq!((a.count(), b.count()), (0, round + 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_what_may_not_switch_does_not() {
    let (upstream, app) = one().await;
    upstream.always(json_reply("{}"));
    let body = r#"{"model":"m","messages":[]}"#;
    let chat = |lines: &str| {
        let lines = format!("host: p\r\ncontent-length: {}\r\n{lines}", body.len());
        Request::new("POST", "/v1/chat/completions").only_headers(&lines).raw_body(body)
    };
    let realtime = |lines: &str| Request::get("/v1/realtime?model=m").only_headers(&format!("host: p\r\n{lines}"));
    let cases = [
        (
            "h2c on an ordinary request",
            chat("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"),
        ),
        ("websocket on an ordinary request", chat("Connection: Upgrade\r\nUpgrade: websocket\r\n")),
        ("TLS on an ordinary request", chat("Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n")),
        // Behind a tunnel of HTTP/2 nobody would look at paths any more.
        ("h2c where websocket may be", realtime("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n")),
        // Servers differ in which of two wishes they grant.
        ("h2c behind websocket", realtime("Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n")),
        ("h2c before websocket", realtime("Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n")),
        ("h2c on a second line", realtime("Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n")),
        ("a name without the wish", realtime("Upgrade: websocket\r\n")),
        ("the wish without a name", realtime("Connection: Upgrade\r\n")),
        ("HTTP/1.0", upgrade("/v1/realtime?model=m").http10()),
    ];
    for (index, (what, request)) in cases.into_iter().enumerate() {
        let answer = app.ask(&request).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "{}"), "{what}");
        let head = upstream.whole(index).await.head;
        for name in ["upgrade", "http2-settings"] {
            assert_eq!(head.header(name), None, "{what}: {head:?}");
        }
        assert!(!has_token(&head, "connection", "upgrade"), "{what}: {head:?}");
    }
    // One that switches all the same is out of its mind.
    upstream.always(switching());
    for request in
        [Request::chat("m"), Request::get("/v1/realtime?model=m"), chat("Connection: Upgrade\r\nUpgrade: x\r\n")]
    {
        assert_openai_error(&app.ask(&request).await, 502, "backend_error");
    }
    let answer = app.ask(&upgrade("/v1/realtime?model=m").http10()).await;
    assert_eq!(answer.status, 502, "{}", answer.text());
    // So is one that switches to what nobody asked for.
    for line in ["Upgrade: h2c\r\n", ""] {
        let head = format!("HTTP/1.1 101 Switching Protocols\r\n{line}Connection: Upgrade\r\n\r\n");
        upstream.script(vec![Step::Send(head.into()), Step::Switch]);
        assert_openai_error(&app.ask(&upgrade("/v1/realtime?model=m")).await, 502, "backend_error");
    }
    app.inflight_is("a", "m", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_control_endpoints_cannot_be_switched_to() {
    let (upstream, app) = one().await;
    for target in ["/sleep?model=m", "/v1/realtime/../sleep?model=m", "/v1/files?model=m", "/other?model=m"] {
        assert_eq!(app.ask(&upgrade(target)).await.status, 404, "{target}");
    }
    assert_eq!(upstream.count(), 0);
}

// === bytes ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_either_side_may_speak_at_any_time() {
    let (upstream, app) = one().await;
    let gate = Gate::shut();
    let like_http = b"\x81\x00\r\n\r\nHTTP/1.1 200 OK\r\n\r\n";
    let script = [
        switching(),
        vec![
            Step::Send("one".into()),
            Step::ReadAtLeast(5),
            Step::Hold(gate.clone()),
            Step::Send("two".into()),
            Step::Send("three".into()),
            Step::ReadAtLeast(6),
            Step::Send(like_http.to_vec().into()),
        ],
    ];
    upstream.script(script.concat());
    let mut client = opened(&app).await;
    assert_eq!(client.raw(3).await, b"one");
    client.send(b"\0abc\xff").await;
    let arrived = async || upstream.peek(0, |request| request.body.bytes.clone()).unwrap();
    eventually("what was sent has arrived", async || arrived().await == b"\0abc\xff").await;
    assert!(client.is_quiet());
    gate.open();
    assert_eq!(client.raw(8).await, b"twothree");
    // What looks like HTTP is none any more.
    client.send("G").await;
    assert_eq!(client.raw(like_http.len()).await, like_http);
    client.send("ET /v1/realtime?model=m HTTP/1.1\r\n\r\n").await;
    eventually("it has arrived", async || arrived().await.ends_with(b"HTTP/1.1\r\n\r\n")).await;
    assert!(arrived().await.starts_with(b"\0abc\xffGET /v1"));
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_what_stands_right_behind_the_heads_is_not_lost() {
    for size in [1, 100, 100_000] {
        let (upstream, app) = one().await;
        let hello = vec![b'h'; size];
        let Some(Step::Send(head)) = switching().into_iter().next() else { unreachable!() };
        // One segment, if it fits: the head of the answer, and what follows it.
        let together: Vec<u8> = [&head[..], &hello].concat();
        upstream.script(vec![
            Step::Send(together.into()),
            Step::Switch,
            Step::ReadAtLeast(size),
            Step::Send("end".into()),
        ]);
        let early = vec![b'e'; size];
        let mut client = app.client().await;
        client.send([&upgrade("/v1/realtime?model=m").bytes()[..], &early].concat()).await;
        assert_eq!(client.any_head().await.unwrap().word(1), "101");
        assert!(client.raw(size).await == hello, "{size}: from the backend");
        assert_eq!(client.raw(3).await, b"end");
        assert_eq!(upstream.peek(0, |request| request.body.bytes == early), Some(true), "{size}: from the client");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_much_goes_both_ways_at_once() {
    let (_upstream, app) = one().await;
    let mut tasks = Vec::new();
    for seed in 0..4 {
        let mut client = opened(&app).await;
        tasks.push(tokio::spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed);
            let sent: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(8 * 1024 * 1024).collect();
            let sending = client.send_aside(sent.clone());
            assert!(client.raw(sent.len()).await == sent, "the bytes differ");
            sending.done().await.unwrap();
        }));
    }
    for task in tasks {
        soon("all of it", task).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_small_frames_are_not_kept_back() {
    let (_upstream, app) = one().await;
    let mut client = opened(&app).await;
    let mut times: Vec<Duration> = Vec::new();
    for round in 0..100 {
        let since = Instant::now();
        assert_flows(&mut client, &round.to_string()).await;
        times.push(since.elapsed());
    }
    times.sort_unstable();
    println!("r06: there and back: p50 {:?}, p99 {:?}", times[50], times[99]);
    assert!(times[50] < Duration::from_millis(20), "p50 {:?}: as if somebody waited for more", times[50]);
}

// === ends ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_the_clients_end_is_the_backends() {
    for how in ["half-close", "close", "reset"] {
        let (upstream, app) = one().await;
        upstream.script(switching());
        let mut client = opened(&app).await;
        client.send("the last words").await;
        let heard = |request: &upstream::Received| request.body.bytes == b"the last words";
        if how == "reset" {
            // A reset may overtake what was sent before it.
            eventually("they have arrived", async || upstream.peek(0, heard) == Some(true)).await;
        }
        app.inflight_is("a", "m", 1.0).await;
        let since = Instant::now();
        let still_here = match how {
            "half-close" => {
                client.half_close();
                Some(client)
            }
            "close" => {
                client.close();
                None
            }
            _ => {
                client.vanish();
                None
            }
        };
        let took = upstream.hung_up(0).await - since;
        println!("r06: {how} by the client: the backend's connection ended after {took:?}");
        assert!(took < HANG_UP_LIMIT, "{how}: {took:?}");
        eventually("what was sent before the end has arrived", async || upstream.peek(0, heard) == Some(true)).await;
        app.inflight_is("a", "m", 0.0).await;
        if let Some(mut client) = still_here {
            assert_eq!(client.raw_to_end().await.0, b"");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_the_backends_end_is_the_clients() {
    for (how, end) in [("close", Step::Close), ("half-close", Step::HalfClose), ("reset", Step::Reset)] {
        let (upstream, app) = one().await;
        let gate = Gate::shut();
        let script = vec![Step::Send("the last words".into()), Step::Hold(gate.clone()), end];
        upstream.script([switching(), script].concat());
        let mut client = opened(&app).await;
        assert_eq!(client.raw(14).await, b"the last words");
        app.inflight_is("a", "m", 1.0).await;
        let since = Instant::now();
        gate.open();
        let (rest, seen) = client.raw_to_end().await;
        println!("r06: {how} by the backend: the client saw {seen:?} after {:?}", since.elapsed());
        assert!(since.elapsed() < HANG_UP_LIMIT, "{how}: {:?}", since.elapsed());
        assert_eq!(rest, b"", "{how}: an error in a protocol that the proxy does not speak");
        if how != "reset" {
            assert_eq!(seen, End::Closed, "{how}");
        }
        client.close();
        app.inflight_is("a", "m", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_what_was_sent_before_a_close_arrives_in_whole() {
    let (upstream, app) = one().await;
    let much = vec![b'x'; 4 * 1024 * 1024];
    upstream.script([switching(), vec![Step::Send(much.clone().into()), Step::HalfClose]].concat());
    let mut client = opened(&app).await;
    let (all, end) = client.raw_to_end().await;
    assert!(all == much, "{} of {} bytes", all.len(), much.len());
    assert_eq!(end, End::Closed);
    drop(client);
    app.inflight_is("a", "m", 0.0).await;

    upstream.script(switching());
    let mut client = opened(&app).await;
    client.send(&much).await;
    client.close();
    eventually("all of it has arrived", async || {
        upstream.peek(1, |request| request.body.bytes.len()) == Some(much.len())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_a_client_that_leaves_before_the_switch_is_followed() {
    let (upstream, app) = one().await;
    for round in 0..2 {
        upstream.script(vec![Step::Hold(Gate::shut())]);
        let mut client = app.client().await;
        client.send(upgrade("/v1/realtime?model=m").bytes()).await;
        upstream.request(round).await;
        let left = if round == 0 { client.close() } else { client.vanish() };
        let took = upstream.hung_up(round).await - left;
        assert!(took < HANG_UP_LIMIT, "{took:?}");
        app.inflight_is("a", "m", 0.0).await;
    }
}

// === counted, and drained ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_it_counts_as_long_as_it_is_open() {
    let upstream = echoing("a", &["m"]).await;
    let app = TestApp::start_with(&[("PROXY_QUEUE_MAX", "0")]).await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 2)).await;
    let (mut first, second) = (opened(&app).await, opened(&app).await);
    app.inflight_is("a", "m", 2.0).await;
    assert_openai_error(&app.ask(&upgrade("/v1/realtime?model=m")).await, 429, "overloaded");
    assert_openai_error(&app.ask(&Request::chat("m")).await, 429, "overloaded");
    second.close();
    app.inflight_is("a", "m", 1.0).await;
    assert_flows(&mut first, "still counted").await;
    assert_eq!(app.inflight("a", "m").await, Some(1.0));
    let third = opened(&app).await;
    app.inflight_is("a", "m", 2.0).await;
    for client in [first, third] {
        client.vanish();
    }
    app.inflight_is("a", "m", 0.0).await;
    assert_eq!(upstream.count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_a_stopping_backend_keeps_what_has_switched() {
    let (upstream, app) = one().await;
    let mut client = opened(&app).await;
    app.stopping("a").await;
    app.models_are(&[]).await;
    assert_openai_error(&app.ask(&upgrade("/v1/realtime?model=m")).await, 503, "model_unavailable");
    for round in 0..10 {
        assert_flows(&mut client, &round.to_string()).await;
    }
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_it_is_cut_when_the_drain_time_is_over() {
    for stops in [true, false] {
        let upstream = echoing("a", &["m"]).await;
        let app = TestApp::start_with_backends(&[("PROXY_DRAIN_TIMEOUT", "400ms")], &[&upstream]).await;
        let mut client = opened(&app).await;
        let since = Instant::now();
        if stops {
            app.stopping("a").await;
        } else {
            app.announce(Spec::of(&upstream).health(Health::Unhealthy)).await;
        }
        assert_flows(&mut client, "still").await;
        assert_eq!(client.raw_to_end().await.0, b"");
        let took = since.elapsed();
        assert!((Duration::from_millis(350)..Duration::from_secs(3)).contains(&took), "cut after {took:?}");
        upstream.hung_up(0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_it_is_cut_at_once_when_the_container_dies() {
    let (upstream, app) = one().await;
    let mut client = opened(&app).await;
    let since = Instant::now();
    app.ended("a").await;
    assert_eq!(client.raw_to_end().await.0, b"");
    // Far below the drain time of the suite.
    assert!(since.elapsed() < Duration::from_secs(3), "cut after {:?}", since.elapsed());
    upstream.hung_up(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_shutdown_waits_for_it_and_no_longer_than_the_drain_time() {
    let (_upstream, app) = one().await;
    let addr = app.addr();
    let mut client = opened(&app).await;
    let down = tokio::spawn(app.shutdown());
    eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
    assert_flows(&mut client, "still").await;
    assert!(!down.is_finished());
    client.close();
    soon("the proxy is down", down).await.unwrap();

    let upstream = echoing("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_DRAIN_TIMEOUT", "500ms")], &[&upstream]).await;
    let mut client = opened(&app).await;
    let since = Instant::now();
    app.shutdown().await;
    let took = since.elapsed();
    assert!((Duration::from_millis(450)..Duration::from_secs(5)).contains(&took), "took {took:?}");
    client.raw_to_end().await;
    upstream.hung_up(0).await;
}

// === back-pressure ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r06_who_does_not_read_slows_the_other_side_and_fills_nothing() {
    const TUNNELS: usize = 32;
    /// The kernel's own buffers, at four ends of two connections, are all that may be in between.
    const MOST: usize = 24 * 1024 * 1024;
    const CALM: Duration = Duration::from_millis(500);
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let request = upgrade("/v1/realtime?model=m");
    // Connections, tasks and the allocator's own needs are not what is measured: have them all once before.
    upstream.always([switching(), vec![Step::Echo]].concat());
    let mut warm = Vec::new();
    for _ in 0..TUNNELS {
        let mut client = Client::connect(proxy.addr).await;
        open(&mut client, &request).await;
        assert_flows(&mut client, "warm").await;
        warm.push(client);
    }
    let before = proxy.resident();
    drop(warm);

    // Towards a client that does not read.
    upstream.always([switching(), vec![Step::Flood(vec![b'x'; 16 * 1024].into())]].concat());
    let mut clients = Vec::new();
    for _ in 0..TUNNELS {
        let mut client = Client::connect_narrow(proxy.addr).await;
        open(&mut client, &request).await;
        clients.push(client);
    }
    let sent = |index: usize| upstream.peek(TUNNELS + index, |request| request.sent_len).unwrap();
    settled("the backend is stopped", CALM, || (0..TUNNELS).map(sent).sum::<usize>()).await;
    let most = (0..TUNNELS).map(sent).max().unwrap();
    let growth = proxy.resident().saturating_sub(before) / TUNNELS as u64;
    println!("r06: towards a client that does not read: {most} bytes taken, {growth} bytes of memory each");
    assert!(most < MOST, "{most} bytes were taken for one who does not read");
    assert!(growth <= 64 * 1024, "{growth} bytes of memory for one who does not read");
    let stopped_at = sent(0);
    clients[0].raw(32 * 1024 * 1024).await;
    eventually("the backend goes on", async || sent(0) > stopped_at).await;
    for client in clients {
        client.vanish();
    }
    for index in 0..TUNNELS {
        upstream.hung_up(TUNNELS + index).await;
    }

    // Towards a backend that does not read.
    let gate = Gate::shut();
    upstream.always(vec![switching()[0].clone(), Step::Hold(gate.clone()), Step::Switch]);
    let mut clients = Vec::new();
    for _ in 0..TUNNELS {
        let mut client = Client::connect(proxy.addr).await;
        open(&mut client, &request).await;
        clients.push(client);
    }
    let flood = bytes::Bytes::from(vec![b'y'; 2 * MOST]);
    let mut sending: Vec<Sending> = clients.iter().map(|client| client.send_aside(flood.clone())).collect();
    settled("the clients are stopped", CALM, || sending.iter().map(Sending::sent_len).sum::<usize>()).await;
    let most = sending.iter().map(Sending::sent_len).max().unwrap();
    let growth = proxy.resident().saturating_sub(before) / TUNNELS as u64;
    println!("r06: towards a backend that does not read: {most} bytes taken, {growth} bytes of memory each");
    assert!(most < MOST, "{most} bytes were taken for one who does not read");
    assert!(growth <= 64 * 1024, "{growth} bytes of memory for one who does not read");
    sending.truncate(1);
    clients.truncate(1);
    gate.open();
    sending.pop().unwrap().done().await.unwrap();
}
