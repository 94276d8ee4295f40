//! R2: every answer that the proxy gives by itself, in both dialects, and those of backends byte for byte.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

/// One request in each way of asking for Anthropic's dialect.
fn anthropic_requests(body: &str) -> [Request; 3] {
    [
        Request::post("/v1/messages", body),
        Request::post("/v1/messages/count_tokens?beta=true", body),
        Request::post("/v1/chat/completions", body).header("anthropic-version", "2023-06-01"),
    ]
}

fn model(name: &str) -> String {
    format!(r#"{{"model":"{name}","messages":[]}}"#)
}

/// A backend that takes one request at a time, and holds the first one until the gate is open.
async fn one_at_a_time(knobs: &[(&str, &str)]) -> (Upstream, TestApp, Gate, Client) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with(knobs).await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 1)).await;
    let gate = Gate::shut();
    upstream.script(held_reply(&gate));
    let mut first = app.client().await;
    first.send(Request::chat("m").bytes()).await;
    upstream.request(0).await;
    (upstream, app, gate, first)
}

// === 400 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_400_when_no_model_can_be_read() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let cases: [(&[u8], &str); 18] = [
        (b"not json", "invalid_json"),
        (b"{", "invalid_json"),
        (br#"{"messages":["#, "invalid_json"),
        (br#"{"messages":[}],"x":1}"#, "invalid_json"),
        (br#"{messages:1}"#, "invalid_json"),
        (b"{\x00\"\x00}\x00", "invalid_json"),
        (b"[]", "invalid_json"),
        (br#"[{"model":"m"}]"#, "invalid_json"),
        (br#""model""#, "invalid_json"),
        (b"null", "invalid_json"),
        (b"17", "invalid_json"),
        (b"{}", "model_required"),
        (br#"{"messages":[]}"#, "model_required"),
        (br#"{"Models":"m","mode":"m","MODEL ":"m"}"#, "model_required"),
        (br#"{"model":""}"#, "model_required"),
        (br#"{"model":null}"#, "model_required"),
        (br#"{"model":5}"#, "model_required"),
        (br#"{"model":["m"],"x":{"model":"m"}}"#, "model_required"),
    ];
    for (body, code) in cases {
        let shown = String::from_utf8_lossy(body);
        for request in [
            Request::post("/v1/chat/completions", body),
            Request::post("/v1/embeddings", body),
            Request::new("POST", "/v1/chat/completions").chunks(body.chunks(3)),
        ] {
            let answer = app.ask(&request).await;
            let error = &answer.json()["error"];
            assert_eq!((answer.status, &error["code"]), (400, &json!(code)), "{shown}: {error}");
            assert_openai_error(&answer, 400, code);
            assert_eq!(error["type"], "invalid_request_error", "{shown}");
        }
    }
    // No body at all, or text that is no text: neither of the two is wrong.
    for request in [
        Request::post("/v1/chat/completions", b"{\"a\":\"\xff\xfe\"}"),
        Request::post("/v1/chat/completions", ""),
        Request::post("/v1/chat/completions", " "),
        Request::new("POST", "/v1/chat/completions"),
    ] {
        let answer = app.ask(&request).await;
        let code = answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
        assert!(["invalid_json", "model_required"].contains(&code.as_str()), "{}", answer.text());
        assert_openai_error(&answer, 400, &code);
    }
    for request in anthropic_requests("{}").into_iter().chain(anthropic_requests("not json")) {
        assert_eq!(assert_anthropic_error(&app.ask(&request).await, 400), "invalid_request_error");
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_400_leaves_the_connection_usable() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut client = app.client().await;
    for _ in 0..3 {
        assert_openai_error(&client.ask(&Request::post("/v1/completions", "{}")).await, 400, "model_required");
        assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    }
}

// === 404 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_404_for_a_model_that_was_never_seen() {
    let upstream = Upstream::start("a", &["org/m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for name in ["unheard", "M", "org", "org/M", "org/m ", " org/m", "org%2Fm", "org/m:latest?", "é"] {
        let answer = app.ask(&Request::chat(name)).await;
        assert_openai_error(&answer, 404, "model_not_found");
        assert_eq!(answer.json()["error"]["param"], "model");
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(name), "{}", answer.text());
    }
    // A name is the client's text: it comes back as text, whatever it holds.
    let answer = app.ask(&Request::chat(r#"a\"b\\c\u0000\ud83d\ude00"#)).await;
    assert_openai_error(&answer, 404, "model_not_found");
    for request in anthropic_requests(&model("unheard")) {
        assert_eq!(assert_anthropic_error(&app.ask(&request).await, 404), "not_found_error");
    }
    assert_eq!(upstream.count(), 0);
}

// === 503 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_503_while_the_only_backend_is_not_ready() {
    let knobs = [("PROXY_QUEUE_MAX", "0")];
    for state in ["unhealthy", "stopping", "gone", "starting again"] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::start_with_backends(&knobs, &[&upstream]).await;
        match state {
            "unhealthy" => app.announce(Spec::of(&upstream).health(Health::Unhealthy)).await,
            "stopping" => app.stopping("a").await,
            "gone" => app.ended("a").await,
            _ => {
                app.ended("a").await;
                app.announce(Spec::of(&upstream).incarnation(2).health(Health::Starting)).await;
            }
        }
        app.models_are(&[]).await;
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(answer.status, 503, "{state}: {}", answer.text());
        assert_openai_error(&answer, 503, "model_unavailable");
        assert_retry_after(&answer);
        for request in anthropic_requests(&model("m")) {
            let answer = app.ask(&request).await;
            assert_anthropic_error(&answer, 503);
            assert_retry_after(&answer);
        }
        assert_eq!(upstream.count(), 0, "{state}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_503_becomes_404_when_the_grace_time_is_over() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MODEL_GRACE", "300ms")], &[&upstream]).await;
    app.ended("a").await;
    app.models_are(&[]).await;
    let since = Instant::now();
    let mut said_503 = false;
    eventually("the model is forgotten", async || match app.ask(&Request::chat("m")).await.status {
        503 => {
            said_503 = true;
            false
        }
        404 => true,
        other => panic!("{other}"),
    })
    .await;
    let (took, forgotten_early) = (since.elapsed(), since.elapsed() < Duration::from_millis(200));
    assert!(said_503 && !forgotten_early, "forgotten after {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_503_once_the_wait_for_a_starting_container_is_over() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_QUEUE_TIMEOUT", "400ms")], &[&upstream]).await;
    app.ended("a").await;
    app.announce(Spec::of(&upstream).incarnation(2).health(Health::Starting)).await;
    eventually("it is known to start", async || {
        app.metric("proxy_backends", &[("state", "discovered")]).await == Some(1.0)
    })
    .await;
    let since = Instant::now();
    let answer = app.ask(&Request::chat("m")).await;
    assert_openai_error(&answer, 503, "model_unavailable");
    assert_retry_after(&answer);
    assert!(since.elapsed() >= Duration::from_millis(400), "after {:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_a_request_that_waits_is_served_when_the_container_is_ready() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    app.ended("a").await;
    let starting = Spec::of(&upstream).incarnation(2).health(Health::Starting);
    app.announce(starting.clone()).await;
    eventually("it is known to start", async || {
        app.metric("proxy_backends", &[("state", "discovered")]).await == Some(1.0)
    })
    .await;
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    // Nothing tells that it waits, but no answer within this time does not hurt either.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(client.is_quiet());
    app.announce(starting.health(Health::Healthy)).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

// === 429 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_429_when_every_backend_is_full_and_nobody_may_wait() {
    let (upstream, app, gate, mut first) = one_at_a_time(&[("PROXY_QUEUE_MAX", "0")]).await;
    let answer = app.ask(&Request::chat("m")).await;
    assert_openai_error(&answer, 429, "overloaded");
    assert_retry_after(&answer);
    for request in anthropic_requests(&model("m")) {
        let answer = app.ask(&request).await;
        assert_anthropic_error(&answer, 429);
        assert_retry_after(&answer);
    }
    assert_eq!(upstream.count(), 1);
    gate.open();
    assert_eq!(first.answer().await.json()["held"], true);
    // The slot is free again.
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_429_when_the_wait_is_over() {
    let (upstream, app, gate, mut first) = one_at_a_time(&[("PROXY_QUEUE_TIMEOUT", "300ms")]).await;
    let since = Instant::now();
    let answer = app.ask(&Request::chat("m")).await;
    assert_openai_error(&answer, 429, "overloaded");
    assert_retry_after(&answer);
    assert!(since.elapsed() >= Duration::from_millis(300), "after {:?}", since.elapsed());
    gate.open();
    assert_eq!(first.answer().await.status, 200);
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_429_when_the_queue_is_full() {
    let (upstream, app, gate, mut first) = one_at_a_time(&[("PROXY_QUEUE_MAX", "2")]).await;
    // Three come at once, two of them may wait: which one is turned away is not told, that it is just one is.
    let asking: Vec<_> = (0..3)
        .map(|_| {
            let addr = app.addr();
            tokio::spawn(async move { Client::connect(addr).await.ask(&Request::chat("m")).await })
        })
        .collect();
    eventually("one is turned away", async || asking.iter().any(tokio::task::JoinHandle::is_finished)).await;
    assert_eq!(upstream.count(), 1);
    gate.open();
    assert_eq!(first.answer().await.status, 200);
    let mut statuses = Vec::new();
    for asked in asking {
        statuses.push(soon("an answer", asked).await.unwrap().status);
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 429]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_429_when_all_requests_together_hold_too_much() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_HOLD_MAX", "4MiB")], &[&upstream]).await;
    let begin = format!(r#"{{"prompt":"{}"#, "x".repeat(3_900_000));
    let whole = format!(r#"{begin}","model":"m"}}"#);
    let request = Request::post("/v1/completions", &whole);
    // Eight times 4 MiB have no room for more than eight of these.
    let mut clients = Vec::new();
    for _ in 0..12 {
        let mut client = app.client().await;
        client.send(request.head_bytes()).await;
        // Who is turned away may find the door shut while it still speaks.
        client.try_send(&begin).await.ok();
        clients.push(client);
    }
    eventually("at least four are turned away", async || {
        clients.iter_mut().filter_map(|client| (!client.is_quiet()).then_some(())).count() >= 4
    })
    .await;
    let mut served = 0;
    for mut client in clients {
        let turned_away = !client.is_quiet();
        if !turned_away {
            client.try_send(&whole.as_bytes()[begin.len()..]).await.ok();
        }
        let answer = client.answer().await;
        if turned_away || answer.status != 200 {
            assert_openai_error(&answer, 429, "overloaded");
            assert_retry_after(&answer);
        } else {
            served += 1;
        }
    }
    assert!((1..=8).contains(&served), "{served} were served");
    assert_eq!(app.ask(&request).await.status, 200, "what was held is free again");
}

// === 413 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_413_for_a_body_past_the_limit() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MAX_BODY", "16KiB")], &[&upstream]).await;
    let fits = format!(r#"{{"model":"m","p":"{}"}}"#, "x".repeat(16 * 1024 - 20));
    assert!((16 * 1024 - 8..=16 * 1024).contains(&fits.len()), "{}", fits.len());
    assert_eq!(app.ask(&Request::post("/v1/completions", &fits)).await.status, 200);
    let model_last = format!(r#"{{"p":"{}","model":"m"}}"#, "x".repeat(17 * 1024));
    let model_first = format!(r#"{{"model":"m","p":"{}"}}"#, "x".repeat(200 * 1024));
    for body in [&model_last, &model_first] {
        for request in [
            Request::post("/v1/completions", body),
            Request::new("POST", "/v1/completions").chunks(body.as_bytes().chunks(1000)),
        ] {
            assert_openai_error(&app.ask(&request).await, 413, "request_too_large");
        }
        for request in anthropic_requests(body) {
            assert_eq!(assert_anthropic_error(&app.ask(&request).await, 413), "request_too_large");
        }
    }
    for index in 1..upstream.count() {
        assert_eq!(upstream.peek(index, |request| request.body.is_done()), Some(false), "a backend got too much");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_413_by_the_length_alone() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MAX_BODY", "16KiB")], &[&upstream]).await;
    let mut client = app.client().await;
    client.send(Request::post("/v1/completions", vec![b' '; 20_000]).head_bytes()).await;
    assert_openai_error(&client.answer().await, 413, "request_too_large");
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_413_when_the_model_does_not_come_in_time() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_HOLD_MAX", "16KiB")], &[&upstream]).await;
    let late = format!(r#"{{"p":"{}","model":"m"}}"#, "x".repeat(20 * 1024));
    assert_openai_error(&app.ask(&Request::post("/v1/completions", &late)).await, 413, "request_too_large");
    // The limit is on what is held, not on what flows.
    let early = format!(r#"{{"model":"m","p":"{}"}}"#, "x".repeat(200 * 1024));
    assert_eq!(app.ask(&Request::post("/v1/completions", &early)).await.status, 200);
    assert_eq!(upstream.peek(0, |request| request.body.bytes == early.as_bytes()), Some(true));
}

// === 502 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_502_when_the_only_backend_breaks_before_its_first_byte() {
    let breaks: [(&str, Script); 9] = [
        ("resets", vec![Step::ReadBody, Step::Reset]),
        ("closes", vec![Step::ReadBody, Step::Close]),
        ("resets in the head", vec![Step::ReadBody, Step::Send("HTTP/1.1 200 OK\r\nx:".into()), Step::Reset]),
        ("closes in the head", vec![Step::ReadBody, Step::Send("HTTP/1.1 2".into()), Step::Close]),
        ("speaks no HTTP", vec![Step::ReadBody, Step::Send("SSH-2.0-OpenSSH_9.6\r\n\r\n".into()), Step::Close]),
        (
            "sends two lengths",
            vec![
                Step::ReadBody,
                Step::Send("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab".into()),
            ],
        ),
        (
            "sends no length that is one",
            vec![Step::ReadBody, Step::Send("HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\nab".into())],
        ),
        (
            "sends an endless head",
            vec![
                Step::ReadBody,
                Step::Send("HTTP/1.1 200 OK\r\n".into()),
                Step::Flood(format!("x-flood: {}\r\n", "y".repeat(1000)).into()),
            ],
        ),
        (
            "switches protocols unasked",
            vec![
                Step::ReadBody,
                Step::Send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n".into()),
            ],
        ),
    ];
    for (what, script) in breaks {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::with(&[&upstream]).await;
        upstream.always(script);
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(answer.status, 502, "{what}: {}", answer.text());
        assert_openai_error(&answer, 502, "backend_error");
        assert!(!answer.text().contains(&upstream.addr.to_string()), "the address is nobody's business");
        assert_eq!(upstream.count(), 1, "{what}: asked again, though the connection was fresh");
        assert_anthropic_error(&app.ask(&Request::messages("m")).await, 502);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_502_when_the_only_backend_refuses() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    upstream.refuse().await;
    assert_openai_error(&app.ask(&Request::chat("m")).await, 502, "backend_error");
    for request in anthropic_requests(&model("m")) {
        let answer = app.ask(&request).await;
        // The breaker may have opened by now, which makes it a model without a ready backend.
        assert!([502, 503].contains(&answer.status), "{}", answer.text());
        assert_anthropic_error(&answer, answer.status);
    }
}

// === 504 ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_504_when_a_timeout_that_was_set_runs_out() {
    for knob in ["PROXY_FIRST_BYTE_TIMEOUT", "PROXY_IDLE_TIMEOUT"] {
        let upstream = Upstream::start("a", &["m"]).await;
        let knobs = [(knob, "300ms"), ("PROXY_RETRIES", "0")];
        let app = TestApp::start_with_backends(&knobs, &[&upstream]).await;
        upstream.always(vec![Step::ReadBody, Step::Hold(Gate::shut())]);
        let since = Instant::now();
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(answer.status, 504, "{knob}: {}", answer.text());
        assert_openai_error(&answer, 504, "backend_timeout");
        assert!(since.elapsed() >= Duration::from_millis(300), "{knob}: after {:?}", since.elapsed());
        upstream.hung_up(0).await;
        assert_anthropic_error(&app.ask(&Request::messages("m")).await, 504);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_no_timeout_that_was_not_set() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_CONNECT_TIMEOUT", "100ms")], &[&upstream]).await;
    let mut script = vec![Step::ReadBody, Step::Pause(Duration::from_secs(1))];
    script.extend(json_reply("{}"));
    upstream.script(script);
    // Ten times the time to connect, and longer than any test should be: a long prefill in small.
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

// === what a backend says ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_a_backends_own_errors_pass_byte_for_byte() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let json = "content-type: application/json\r\n";
    let cases = [
        (
            "400 Bad Request",
            json,
            r#"{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}"#,
        ),
        ("401 Unauthorized", json, r#"{"error":"Unauthorized"}"#),
        ("404 Not Found", json, r#"{"detail":"Not Found"}"#),
        ("415 Unsupported Media Type", "", ""),
        ("422 Unprocessable", json, "{ \"detail\" :\n[ {\"loc\":[\"body\"]} ] }\n"),
        // The requests behind it wait that long.
        ("429 Too Many Requests", "retry-after: 1\r\n", "{\"error\":\"slow down\",\"error_type\":\"Overloaded\"}"),
        ("500 Internal Server Error", "content-type: text/plain; charset=utf-8\r\n", "Internal Server Error"),
        (
            "503 Service Unavailable",
            json,
            r#"{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}"#,
        ),
    ];
    for (status, headers, body) in cases {
        for request in [Request::chat("m"), Request::messages("m")] {
            upstream.script(reply(status, headers, body));
            let answer = app.ask(&request).await;
            assert_eq!(answer.head.word(1), &status[..3]);
            assert_eq!(answer.text(), body, "{status}");
            for line in headers.trim_end().lines() {
                let (name, value) = line.split_once(": ").unwrap();
                assert_eq!(answer.header(name), Some(value), "{status}");
            }
        }
    }
}

// === every answer ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_every_answer_has_a_request_id() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let requests = [
        Request::chat("m"),
        Request::chat("unheard"),
        Request::post("/v1/completions", "{}"),
        Request::get("/v1/models"),
        Request::get("/nowhere"),
        Request::get("/sleep"),
        Request::get("/healthz"),
    ];
    let mut seen = Vec::new();
    for request in requests {
        let answer = app.ask(&request).await;
        let id = answer.header("x-request-id").unwrap_or_default().to_owned();
        assert!(!id.is_empty() && !seen.contains(&id), "{id:?} in {:?}", answer.head);
        seen.push(id);
        let answer = app.ask(&request.header("X-Request-Id", "mine-1")).await;
        assert_eq!(answer.head.all("x-request-id"), ["mine-1"]);
    }
    assert_eq!(upstream.whole(1).await.head.all("x-request-id"), ["mine-1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_own_answers_say_when_they_were_made_and_others_are_left_alone() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for (request, status) in [
        (Request::get("/healthz"), 200),
        (Request::get("/v1/models"), 200),
        (Request::new("HEAD", "/v1/models"), 200),
        (Request::get("/metrics"), 200),
        (Request::get("/status"), 200),
        (Request::chat("unheard"), 404),
        (Request::post("/v1/chat/completions", "{}"), 400),
        (Request::get("/other"), 404),
        (Request::new("POST", "/metrics"), 405),
        (Request::new("OPTIONS", "/v1/models"), 204),
        (Request::get("/healthz").only_headers(""), 400),
        (Request::get("/healthz").header("x y", "1"), 400),
    ] {
        let answer = app.ask(&request).await;
        assert_eq!(answer.status, status, "{:?}", answer.head);
        let dates = answer.head.all("date");
        assert_eq!(dates.len(), 1, "{:?}", answer.head);
        let date = httpdate::parse_http_date(dates[0]).unwrap();
        let age = std::time::SystemTime::now().duration_since(date).unwrap_or_default();
        assert!(age < Duration::from_secs(60), "{}", dates[0]);
    }
    let theirs = "Sun, 06 Nov 1994 08:49:37 GMT";
    upstream.script(reply("200 OK", &format!("Date: {theirs}\r\n"), "{}"));
    assert_eq!(app.ask(&Request::chat("m")).await.head.all("date"), [theirs]);
    upstream.script(json_reply("{}"));
    assert_eq!(app.ask(&Request::chat("m")).await.header("date"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_what_changes_with_a_header_says_so() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for (target, header) in [
        ("/v1/models", "anthropic-version"),
        ("/v1/models/m", "anthropic-version"),
        ("/v1/models/unheard", "anthropic-version"),
        ("/other", "anthropic-version"),
        ("/", "accept"),
        ("/status", "accept"),
    ] {
        for lines in ["", "anthropic-version: 2023-06-01\r\n", "accept: text/html\r\n"] {
            let request = Request::get(target).only_headers(&format!("host: p\r\n{lines}"));
            let answer = app.ask(&request).await;
            assert!(answer.head.all("vary").contains(&header), "{target} {lines:?}: {:?}", answer.head);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r02_anthropics_clients_find_the_id_of_their_request() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let version = |request: Request| request.header("anthropic-version", "2023-06-01");
    let mine = |request: Request| request.header("x-request-id", "mine-1");
    for (request, status) in [
        (Request::messages("m"), 200),
        (Request::messages("unheard"), 404),
        (Request::post("/v1/messages/count_tokens", r#"{"model":"m"}"#), 200),
        (Request::get("/v1/messages/batches"), 404),
        (version(Request::get("/v1/models")), 200),
        (version(Request::get("/v1/models/unheard")), 404),
        (version(Request::chat("m")), 200),
        (version(Request::get("/healthz")), 200),
    ] {
        let answer = app.ask(&request).await;
        assert_eq!(answer.status, status);
        let ids = answer.head.all("x-request-id");
        assert!(ids.len() == 1 && !ids[0].is_empty(), "{:?}", answer.head);
        assert_eq!(answer.head.all("request-id"), ids);
        let answer = app.ask(&mine(request)).await;
        assert_eq!((answer.head.all("request-id"), answer.head.all("x-request-id")), (vec!["mine-1"], vec!["mine-1"]));
    }
    for request in [Request::chat("m"), Request::get("/v1/models"), Request::chat("unheard")] {
        assert_eq!(app.ask(&request).await.header("request-id"), None);
    }
    // A backend's own word for it stands: its operator finds the request by that.
    upstream.script(reply("200 OK", "Request-Id: req_theirs\r\n", "{}"));
    let answer = app.ask(&mine(Request::messages("m"))).await;
    assert_eq!((answer.head.all("request-id"), answer.head.all("x-request-id")), (vec!["req_theirs"], vec!["mine-1"]));
    upstream.script(reply("429 Slow", "X-Request-Id: theirs\r\n", "{}"));
    let answer = app.ask(&Request::messages("m")).await;
    assert_eq!((answer.head.all("request-id"), answer.head.all("x-request-id")), (vec!["theirs"], vec!["theirs"]));
}
