//! L1, L4, L6, L8, L13, D8: what goes on, and what does not, while a backend or the proxy itself is going away.

use std::time::{Duration, Instant};

use crate::support::*;

/// A proxy with one backend, and a client that has the first event of a stream which waits at the gate.
async fn streaming(knobs: &[(&str, &str)]) -> (Upstream, TestApp, Gate, Client) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(knobs, &[&upstream]).await;
    let gate = Gate::shut();
    upstream.script(held_stream("data: 1\n\n", &gate, "data: 2\n\ndata: [DONE]\n\n"));
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    client.head().await;
    assert_eq!(client.piece().await.unwrap().1, b"data: 1\n\n");
    (upstream, app, gate, client)
}

/// Checks that the stream of `streaming` comes to its own end.
async fn assert_ends_well(gate: &Gate, mut client: Client) {
    gate.open();
    let answer = client.finish().await;
    assert_eq!((answer.end, answer.text().as_str()), (End::Whole, "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"));
}

/// Checks that the stream of `streaming` is cut, without an end that a client could take for one.
async fn assert_is_cut(mut client: Client) {
    let answer = client.finish().await;
    assert!(!answer.is_whole(), "ended cleanly: {}", answer.text());
    assert!(!answer.text().contains("[DONE]"), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l01_a_stopping_backend_keeps_its_streams_and_gets_nothing_new() {
    let (upstream, app, gate, client) = streaming(&[]).await;
    app.stopping("a").await;
    app.models_are(&[]).await;
    let answer = app.ask(&Request::chat("m")).await;
    assert_openai_error(&answer, 503, "model_unavailable");
    assert_retry_after(&answer);
    assert_eq!(upstream.count(), 1);
    assert_ends_well(&gate, client).await;
    app.ended("a").await;
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l01_others_take_over_from_a_stopping_backend() {
    let (a, app, gate, client) = streaming(&[]).await;
    let b = Upstream::start("b", &["m"]).await;
    app.add(Spec::of(&b)).await;
    app.stopping("a").await;
    app.rotation_is(1, "a is out").await;
    for _ in 0..50 {
        assert_eq!(app.ask(&Request::chat("m")).await.json()["served_by"], "b");
    }
    assert_eq!((a.count(), b.count()), (1, 50));
    app.models_are(&["m"]).await;
    assert_ends_well(&gate, client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l04_a_dead_backends_streams_are_cut() {
    // It is the event that cuts: the connection itself never shows a sign.
    let (upstream, app, _gate, client) = streaming(&[]).await;
    app.ended("a").await;
    assert_is_cut(client).await;
    upstream.hung_up(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l06_an_unhealthy_backend_finishes_its_work_within_the_drain_time() {
    let (upstream, app, gate, client) = streaming(&[]).await;
    app.announce(Spec::of(&upstream).health(Health::Unhealthy)).await;
    app.models_are(&[]).await;
    assert_openai_error(&app.ask(&Request::chat("m")).await, 503, "model_unavailable");
    assert_ends_well(&gate, client).await;
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l06_an_unhealthy_backends_streams_are_cut_when_the_drain_time_is_over() {
    let (upstream, app, _gate, client) = streaming(&[("PROXY_DRAIN_TIMEOUT", "400ms")]).await;
    let since = Instant::now();
    app.announce(Spec::of(&upstream).health(Health::Unhealthy)).await;
    assert_is_cut(client).await;
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(350), "cut after {took:?}");
    upstream.hung_up(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l06_healthy_again_before_the_deadline_nothing_is_lost() {
    let (upstream, app, gate, client) = streaming(&[("PROXY_DRAIN_TIMEOUT", "400ms")]).await;
    let since = Instant::now();
    app.announce(Spec::of(&upstream).health(Health::Unhealthy)).await;
    app.models_are(&[]).await;
    app.announce(Spec::of(&upstream)).await;
    app.models_are(&["m"]).await;
    // Still there long after the old deadline.
    eventually("the old deadline is past", async || since.elapsed() > Duration::from_millis(800)).await;
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    assert!(upstream.is_connected(0));
    assert_ends_well(&gate, client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l08_a_restarted_container_is_asked_at_its_new_address_only() {
    let old = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&old]).await;
    for _ in 0..3 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    app.ended("a").await;
    let new = Upstream::start("a", &["m", "n"]).await;
    app.announce(Spec::of(&new).incarnation(2)).await;
    app.models_are(&["m", "n"]).await;
    for _ in 0..20 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    assert_eq!((old.count(), new.count()), (3, 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l08_a_new_incarnation_replaces_the_old_one_even_when_its_end_was_never_told() {
    let old = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&old]).await;
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    let new = Upstream::start("a", &["m", "n"]).await;
    app.announce(Spec::of(&new).incarnation(2)).await;
    app.models_are(&["m", "n"]).await;
    for _ in 0..20 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    assert_eq!((old.count(), new.count()), (1, 20));
    app.rotation_is(1, "the old one is no backend any more").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d08_a_full_listing_removes_what_it_does_not_name_and_disturbs_nothing_else() {
    let (a, app, gate, client) = streaming(&[]).await;
    let (b, c) = (Upstream::start("b", &["n"]).await, Upstream::start("c", &["o"]).await);
    app.add(Spec::of(&b)).await;
    app.models_are(&["m", "n"]).await;
    app.inflight_is("a", "m", 1.0).await;
    app.reset([Spec::of(&a), Spec::of(&c)]).await;
    app.models_are(&["m", "o"]).await;
    assert_eq!(app.inflight("a", "m").await, Some(1.0), "the count survives");
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    assert_openai_error(&app.ask(&Request::chat("n")).await, 503, "model_unavailable");
    assert_ends_well(&gate, client).await;
    app.inflight_is("a", "m", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_shutdown_lets_streams_finish_and_takes_nothing_new() {
    let (upstream, app, gate, client) = streaming(&[]).await;
    let addr = app.addr();
    // A connection that does nothing must not keep the proxy up.
    let mut idle = app.client().await;
    assert_eq!(idle.ask(&Request::get("/healthz")).await.status, 200);
    let down = tokio::spawn(app.shutdown());
    eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
    assert!(!down.is_finished(), "a stream is under way");
    assert_ne!(idle.ended().await, End::Whole);
    assert_ends_well(&gate, client).await;
    soon("the proxy is down", down).await.unwrap();
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_not_ready_any_more_and_still_serving_for_a_moment() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let addr = app.addr();
    let down = tokio::spawn(app.shutdown());
    // Every question on a connection of its own: who balances over several proxies asks like that, and must be told to
    // go elsewhere before the door is shut.
    eventually("/readyz says 503", async || {
        Client::connect(addr).await.ask(&Request::get("/readyz")).await.status == 503
    })
    .await;
    assert_eq!(Client::connect(addr).await.ask(&Request::chat("m")).await.status, 200);
    eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
    soon("the proxy is down", down).await.unwrap();
}

/// A front proxy may take as long as `PROXY_SETTLE` to notice. Until then it opens connections and sends requests on those
/// that it keeps, and each answer tells it to use that connection no more. The drain time has nothing to do with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_requests_are_taken_for_the_settle_time_on_new_and_on_kept_connections() {
    const SETTLE: Duration = Duration::from_secs(4);
    const STEP: Duration = Duration::from_millis(500);
    let upstream = Upstream::start("a", &["m"]).await;
    let app =
        TestApp::start_with_backends(&[("PROXY_SETTLE", "4s"), ("PROXY_DRAIN_TIMEOUT", "100ms")], &[&upstream]).await;
    let addr = app.addr();
    let mut kept = Vec::new();
    for _ in 0..4 {
        let mut client = app.client().await;
        let answer = client.ask(&Request::chat("m")).await;
        assert_eq!((answer.status, answer.header("connection")), (200, None));
        kept.push(client);
    }
    let since = Instant::now();
    let down = tokio::spawn(app.shutdown());
    eventually("/readyz says 503", async || {
        Client::connect(addr).await.ask(&Request::get("/readyz")).await.status == 503
    })
    .await;
    assert!(since.elapsed() < Duration::from_secs(1), "503 after {:?}", since.elapsed());
    for (step, mut client) in (0..).zip(kept) {
        eventually("the next step", async || since.elapsed() >= STEP * step).await;
        for client in [&mut client, &mut Client::connect(addr).await] {
            let answer = client.ask(&Request::chat("m")).await;
            let told = (answer.status, answer.header("connection"));
            assert_eq!(told, (200, Some("close")), "after {:?}", since.elapsed());
            assert_eq!(client.ended().await, End::Closed);
        }
        assert_eq!(Client::connect(addr).await.ask(&Request::get("/readyz")).await.status, 503);
    }
    eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
    assert!(since.elapsed() >= SETTLE, "the port was closed after {:?}", since.elapsed());
    soon("the proxy is down", down).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_without_a_settle_time_the_port_closes_at_once() {
    let app = TestApp::start_with(&[("PROXY_SETTLE", "0")]).await;
    let since = Instant::now();
    app.shutdown().await;
    assert!(since.elapsed() < Duration::from_secs(1), "took {:?}", since.elapsed());
}

/// The port closes between the moment when a client connects and the moment when its request arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_a_request_on_a_connection_that_was_opened_just_before_the_end_is_served() {
    for begun in ["", "P", "POST /v1/chat/comp"] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::start_with_backends(&[("PROXY_SETTLE", "0")], &[&upstream]).await;
        let addr = app.addr();
        let mut client = app.client().await;
        client.send(begun).await;
        let down = tokio::spawn(app.shutdown());
        eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
        client.send(&Request::chat("m").bytes()[begun.len()..]).await;
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "{begun:?} came before");
        soon("the proxy is down", down).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_the_admin_port_shows_the_drain_to_its_end() {
    let (_upstream, app, gate, client) = streaming(&[("PROXY_ADMIN_PORT", "0")]).await;
    let (addr, admin) = (app.addr(), app.admin_addr().unwrap());
    let down = tokio::spawn(app.shutdown());
    eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
    // On connections of their own, as whoever looks now and then has none.
    let ask = async |path: &str| Client::connect(admin).await.ask(&Request::get(path)).await;
    let status = ask("/status").await.json();
    assert_eq!((&status["stopping"], &status["containers"][0]["in_flight"]), (&true.into(), &1.into()), "{status}");
    assert!(ask("/metrics").await.text().contains("proxy_backend_inflight{backend=\"a\",model=\"m\"} 1\n"));
    assert_eq!((ask("/healthz").await.status, ask("/readyz").await.status), (200, 503));
    assert!(!down.is_finished(), "a stream is under way");
    assert_ends_well(&gate, client).await;
    soon("the proxy is down", down).await.unwrap();
    eventually("the admin port is closed", async || tokio::net::TcpStream::connect(admin).await.is_err()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_shutdown_ends_with_the_drain_time() {
    let (upstream, app, _gate, client) = streaming(&[("PROXY_DRAIN_TIMEOUT", "500ms")]).await;
    let since = Instant::now();
    app.shutdown().await;
    let took = since.elapsed();
    assert!((Duration::from_millis(450)..Duration::from_secs(5)).contains(&took), "took {took:?}");
    assert_is_cut(client).await;
    upstream.hung_up(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_shutdown_without_work_is_short() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_DRAIN_TIMEOUT", "60s")], &[&upstream]).await;
    let mut client = app.client().await;
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    app.shutdown().await;
    assert_ne!(client.ended().await, End::Whole);
}

/// One frame of HTTP/2: its type, its flags, its stream and what it holds.
async fn h2_frame(client: &mut Client) -> (u8, u8, u32, Vec<u8>) {
    let head = client.raw(9).await;
    let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    (head[3], head[4], stream, client.raw(len).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l13_an_http_2_stream_that_crosses_the_goodbye_is_served() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const ACK: u8 = 1;
    const HEADERS: u8 = 1;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    // GET http://x/v1/models, the end of head and stream.
    let fields = b"\x82\x86\x04\x0a/v1/models\x01\x01x";
    let request = [&[0, 0, 17, HEADERS, 5, 0, 0, 0, 1][..], fields].concat();
    assert_eq!(fields.len(), 17);

    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut front = app.client().await;
    front.send(PREFACE).await;
    let down = tokio::spawn(app.shutdown());
    while h2_frame(&mut front).await.0 != GOAWAY {}
    // The front proxy has not read it yet.
    front.send(&request).await;
    loop {
        match h2_frame(&mut front).await {
            (HEADERS, _, 1, fields) => {
                // 200 has a number of its own in the table of fields.
                assert_eq!(fields[0], 0x88, "{}", fields.escape_ascii());
                break;
            }
            (PING, 0, 0, payload) => {
                front.send([&[0, 0, 8, PING, ACK, 0, 0, 0, 0][..], &payload].concat()).await;
            }
            _ => {}
        }
    }
    drop(front);
    soon("the proxy is down", down).await.unwrap();
}
