//! Second attempts: when another backend is asked, when the same one is, and when nobody is. P5, P8, H2, L4.

use std::time::{Duration, Instant};

use crate::support::*;

/// Reads the whole request and breaks without a word.
fn dies() -> Script {
    vec![Step::ReadBody, Step::Reset]
}

async fn two() -> (Upstream, Upstream, TestApp) {
    two_with(&[]).await
}

async fn two_with(knobs: &[(&str, &str)]) -> (Upstream, Upstream, TestApp) {
    let [a, b] = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await];
    let app = TestApp::start_with_backends(knobs, &[&a, &b]).await;
    (a, b, app)
}

/// Sends requests until one has reached `upstream`, and returns the answer to that one; the others must succeed.
async fn ask_until_it_reaches(upstream: &Upstream, app: &TestApp, request: &Request) -> Answer {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let before = upstream.count();
        let answer = app.ask(request).await;
        if upstream.count() > before {
            return answer;
        }
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(Instant::now() < deadline, "no request reaches {}", upstream.name);
    }
}

// === another backend ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_a_backend_that_refuses_costs_nobody_a_request() {
    let (a, b, app) = two().await;
    a.refuse().await;
    for _ in 0..200 {
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!((a.count(), b.count()), (0, 200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_dead_before_its_first_byte_another_one_is_asked() {
    let breaks: [(&str, Script); 3] = [
        ("reset after the request", dies()),
        ("closed after the request", vec![Step::ReadBody, Step::Close]),
        ("reset before the body", vec![Step::Reset]),
    ];
    for (what, script) in breaks {
        let (a, b, app) = two().await;
        a.always(script);
        let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(20_000));
        let request = Request::post("/v1/completions", &body).header("x-kept", "1");
        let answer = ask_until_it_reaches(&a, &app, &request).await;
        assert_eq!(answer.status, 200, "{what}: {}", answer.text());
        assert_eq!(answer.json()["served_by"], "b");
        let again = b.whole(b.count() - 1).await;
        assert_eq!(again.body.bytes, body.as_bytes(), "{what}: sent again as it was");
        assert_eq!(again.head.header("x-kept"), Some("1"));
        assert_eq!(again.head.all("x-forwarded-for").join(","), "127.0.0.1", "{what}: set once");
        assert_eq!(again.head.all("host"), [b.addr.to_string()]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_backend_that_does_not_answer_the_connect_is_given_up() {
    let jammed = Upstream::start_with_backlog("a", &["m"], 1).await;
    let b = Upstream::start("b", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_CONNECT_TIMEOUT", "200ms")], &[&jammed, &b]).await;
    let _queued = jammed.jam().await;
    for _ in 0..10 {
        let since = Instant::now();
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
        assert!(since.elapsed() < Duration::from_secs(2), "took {:?}", since.elapsed());
    }
    assert_eq!((jammed.count(), b.count()), (0, 10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l04_requests_without_a_byte_move_on_when_their_container_dies() {
    for kills in [false, true] {
        let (a, b, app) = two().await;
        let gate = Gate::shut();
        a.always(held_reply(&gate));
        b.always(held_reply(&gate));
        let mut clients = Vec::new();
        for _ in 0..8 {
            let mut client = app.client().await;
            client.send(Request::chat("m").bytes()).await;
            clients.push(client);
        }
        eventually("all are with a backend", async || a.count() + b.count() == 8).await;
        let moved = a.count();
        assert!(moved > 0, "the load was shared");
        if kills {
            a.kill().await;
        }
        app.ended("a").await;
        eventually("all are with the other one", async || b.count() == 8).await;
        gate.open();
        for mut client in clients {
            assert_eq!(client.answer().await.status, 200);
        }
        assert_eq!((a.count(), b.count()), (moved, 8));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_the_number_of_attempts_is_kept_to() {
    for (retries, attempts) in [("0", 1), ("1", 2), ("2", 3)] {
        let upstreams = [
            Upstream::start("a", &["m"]).await,
            Upstream::start("b", &["m"]).await,
            Upstream::start("c", &["m"]).await,
            Upstream::start("d", &["m"]).await,
        ];
        let all: Vec<&Upstream> = upstreams.iter().collect();
        let app = TestApp::start_with_backends(&[("PROXY_RETRIES", retries)], &all).await;
        upstreams.iter().for_each(|upstream| upstream.always(dies()));
        assert_openai_error(&app.ask(&Request::chat("m")).await, 502, "backend_error");
        let counts: Vec<usize> = upstreams.iter().map(Upstream::count).collect();
        assert_eq!(counts.iter().sum::<usize>(), attempts, "PROXY_RETRIES={retries}: {counts:?}");
        assert!(counts.iter().all(|count| *count <= 1), "PROXY_RETRIES={retries}: the same one again, {counts:?}");
    }
}

// === the same backend, on a fresh connection ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p08_a_reused_connection_that_dies_is_replaced_even_with_one_backend() {
    let breaks: [(&str, Script); 3] = [
        ("reset after the request", dies()),
        ("closed after the request", vec![Step::ReadBody, Step::Close]),
        ("reset before the body", vec![Step::Reset]),
    ];
    for retries in ["1", "0"] {
        for (what, script) in breaks.clone() {
            let upstream = Upstream::start("a", &["m"]).await;
            let app = TestApp::start_with_backends(&[("PROXY_RETRIES", retries)], &[&upstream]).await;
            // One client's requests share what the proxy keeps open; whether those of several do is its own business.
            let mut client = app.client().await;
            assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
            upstream.script(script);
            let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(20_000));
            let answer = client.ask(&Request::post("/v1/completions", &body)).await;
            assert_eq!(answer.status, 200, "{what}: {}", answer.text());
            assert_eq!(upstream.count(), 3, "{what}");
            let connections: Vec<usize> =
                (0..3).map(|index| upstream.peek(index, |request| request.connection).unwrap()).collect();
            assert_eq!(connections[0], connections[1], "{what}: the second came on the connection of the first");
            assert_ne!(connections[1], connections[2], "{what}: the third came on a fresh one");
            assert_eq!(upstream.whole(2).await.body.bytes, body.as_bytes());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p08_the_fresh_connection_is_not_replaced_in_turn() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut client = app.client().await;
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    upstream.always(dies());
    assert_openai_error(&client.ask(&Request::chat("m")).await, 502, "backend_error");
    assert_eq!(upstream.count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p08_backends_that_close_after_every_answer() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    // As llama.cpp does after a stream, and without saying so.
    let mut script = sse_reply(&["data: 1\n\n"]);
    script.push(Step::Close);
    upstream.always(script);
    let mut client = app.client().await;
    for _ in 0..50 {
        let answer = client.ask(&Request::chat("m")).await;
        assert_eq!((answer.status, answer.text().as_str(), answer.end), (200, "data: 1\n\n", End::Whole));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p12_connections_are_reused() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut client = app.client().await;
    for _ in 0..50 {
        assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    }
    assert_eq!(upstream.connections_used(), 1, "one after the other, over one connection");
}

// === nobody ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_never_after_the_first_byte() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    let breaks: [(&str, Script); 3] = [
        ("after the head", vec![Step::ReadBody, Step::Send(head.into())]),
        ("in the body", vec![Step::ReadBody, Step::Send(format!("{head}{{\"a\":").into())]),
        ("in a stream", [sse_begin(), vec![Step::SendChunk("data: 1\n\n".into())]].concat()),
    ];
    for (what, begin) in breaks {
        for end in [Step::Reset, Step::Close] {
            let (a, b, app) = two().await;
            let mut client = app.client().await;
            // On fresh connections, and on reused ones.
            for round in 0..2 {
                if round == 1 {
                    for upstream in [&a, &b] {
                        upstream.always(json_reply("{}"));
                    }
                    client = app.client().await;
                    for _ in 0..8 {
                        assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
                    }
                }
                let gate = Gate::shut();
                let script = [begin.clone(), vec![Step::Hold(gate.clone()), end.clone()]].concat();
                a.always(script.clone());
                b.always(script);
                let before = a.count() + b.count();
                client.send(Request::chat("m").bytes()).await;
                let head = client.head().await;
                assert_eq!(head.word(1), "200");
                gate.open();
                let answer = client.finish().await;
                assert!(!answer.is_whole(), "{what}: ended cleanly");
                assert_eq!(a.count() + b.count(), before + 1, "{what}: asked again");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_half_a_head_is_a_first_byte() {
    let (a, b, app) = two().await;
    for upstream in [&a, &b] {
        upstream.always(vec![Step::ReadBody, Step::Send("HTTP/1.1 200 OK\r\ncontent-".into()), Step::Reset]);
    }
    assert_openai_error(&app.ask(&Request::chat("m")).await, 502, "backend_error");
    assert_eq!(a.count() + b.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_an_error_answer_is_an_answer() {
    let (a, b, app) = two().await;
    for status in ["501 Not Implemented", "400 Bad Request", "404 Not Found"] {
        for upstream in [&a, &b] {
            upstream.always(reply(status, "", "no"));
        }
        let before = a.count() + b.count();
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!((answer.head.word(1), answer.text().as_str()), (&status[..3], "no"));
        assert_eq!(a.count() + b.count(), before + 1, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s02_nobody_is_asked_for_a_client_that_has_gone() {
    let (a, b, app) = two().await;
    let gate = Gate::shut();
    for upstream in [&a, &b] {
        upstream.always(vec![Step::ReadBody, Step::Hold(gate.clone()), Step::Reset]);
    }
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    eventually("a backend has it", async || a.has_whole_request() || b.has_whole_request()).await;
    client.vanish();
    let (has_it, other) = if a.count() == 1 { (&a, &b) } else { (&b, &a) };
    has_it.hung_up(0).await;
    gate.open();
    app.inflight_is(has_it.name, "m", 0.0).await;
    assert_eq!((has_it.count(), other.count()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_an_answer_that_comes_before_the_request_is_over() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let refusal = r#"{"error":"I have seen enough"}"#;
    let answer = format!("HTTP/1.1 400 Bad Request\r\ncontent-length: {}\r\n\r\n{refusal}", refusal.len());
    upstream.script(vec![Step::ReadAtLeast(1000), Step::Send(answer.into()), Step::Hold(Gate::shut())]);
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(200_000));
    let request = Request::post("/v1/completions", &body);
    let mut client = app.client().await;
    client.send(request.head_bytes()).await;
    // The rest is never sent: the answer must not wait for it.
    client.send(&body[..100_000]).await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.text().as_str()), (400, refusal));
    assert_eq!(upstream.count(), 1);
}

/// A body that its backend does not read must not keep the answer from its client, nor the backend's place from others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_backend_that_does_not_read_is_given_up_in_time() {
    let upstream = Upstream::start("a", &["m"]).await;
    let knobs = [("PROXY_FIRST_BYTE_TIMEOUT", "500ms"), ("PROXY_RETRIES", "0")];
    let app = TestApp::start_with_backends(&knobs, &[&upstream]).await;
    upstream.script(vec![Step::Hold(Gate::shut())]);
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(4_000_000));
    let request = Request::post("/v1/completions", &body);
    let mut client = app.client().await;
    client.send(request.head_bytes()).await;
    // The client may be cut in the midst of its upload: the answer is on its way by then.
    let _ = client.try_send(&body).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 504, "{}", answer.text());
    app.inflight_is("a", "m", 0.0).await;
}

/// Whoever has been answered is done, on both sides, even if the backend never read the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_nothing_is_left_of_a_request_that_was_answered_early() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let refusal = "HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno";
    upstream.script(vec![Step::ReadAtLeast(1), Step::Send(refusal.into()), Step::Hold(Gate::shut())]);
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(4_000_000));
    let mut client = app.client().await;
    client.send(Request::post("/v1/completions", &body).head_bytes()).await;
    client.send(&body[..50_000]).await;
    assert_eq!(client.answer().await.status, 413);
    client.close();
    upstream.hung_up(0).await;
    app.inflight_is("a", "m", 0.0).await;
}
