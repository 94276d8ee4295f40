//! O5: the status explains every container, as JSON, as it changes, and as a page; it holds nobody up.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::*;

const STREAM: &str = "text/event-stream";

/// A client that watches.
async fn watcher(addr: std::net::SocketAddr) -> Client {
    let mut client = Client::connect(addr).await;
    client.send(Request::get("/status").header("accept", STREAM).bytes()).await;
    let head = client.head().await;
    assert_eq!((head.word(1), head.header("content-type")), ("200", Some(STREAM)), "{head:?}");
    assert_eq!(head.header("cache-control"), Some("no-store"));
    client
}

/// The next status that it is told; `None` at the end of the stream.
async fn told(client: &mut Client) -> Option<Value> {
    while let Some((_, piece)) = client.piece().await {
        let text = String::from_utf8(piece).unwrap();
        if let Some(json) = text.strip_prefix("event: status\ndata: ") {
            let json = json.strip_suffix("\n\n").expect("one event per piece");
            assert!(!json.contains('\n'));
            return Some(serde_json::from_str(json).unwrap());
        }
    }
    None
}

/// Waits until it is told a status of which `is_it` holds.
async fn told_that(client: &mut Client, is_it: impl Fn(&Value) -> bool) -> Value {
    loop {
        let status = soon("something is told", told(client)).await.expect("the stream goes on");
        if is_it(&status) {
            return status;
        }
    }
}

fn names(status: &Value) -> Vec<&str> {
    status["containers"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_the_status_tells_what_a_container_does() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_RETRIES", "0")], &[&upstream]).await;
    upstream.script(sse_reply(&[
        "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":70}}\n\n",
        "data: [DONE]\n\n",
    ]));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    upstream.script(reply("500 Internal Server Error", "content-type: application/json\r\n", r#"{"error":"x"}"#));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 500);
    let status = async || app.ask(&Request::get("/status")).await.json();
    eventually("all of it is told", async || {
        let status = status().await;
        let container = &status["containers"][0];
        let tokens = container["tokens_per_second"].as_f64().unwrap();
        let error = container["last_error"]["text"].as_str().unwrap_or_default();
        container["served"] == 1 && container["failed"] == 1 && tokens > 0.0 && error == "it answered 500"
    })
    .await;
    let status = status().await;
    let container = &status["containers"][0];
    assert_eq!(
        (&status["version"], &container["state"], &container["breaker"]),
        (&1.into(), &"ready".into(), &"closed".into())
    );
    assert!(
        container["ttft_ms"].is_u64() && container["reason"].is_null() && container["advice"].is_null(),
        "{container}"
    );
    assert_eq!(status["models"][0]["replicas"], serde_json::json!(["a"]));
    let kinds: Vec<&str> = status["events"].as_array().unwrap().iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["discovery_sees", "probing", "ready"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_watchers_hear_of_changes_and_of_nothing_else() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    let plain = TestApp::start().await;
    let admin = app.admin_addr().unwrap();
    for (app, addr) in [(&app, admin), (&plain, plain.addr())] {
        let mut client = watcher(addr).await;
        assert!(names(&told_that(&mut client, |_| true).await).is_empty());
        app.add(Spec::of(&upstream)).await;
        let status = told_that(&mut client, |status| status["containers"][0]["state"] == "ready").await;
        assert_eq!(names(&status), ["a"]);
        // Nothing changes for as long as it takes to be told twice.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        app.ended("a").await;
        let begun = Instant::now();
        assert!(names(&soon("its end is told", told(&mut client)).await.unwrap()).is_empty(), "told of no change");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }
    assert_eq!(app.ask(&Request::get("/status").header("accept", STREAM)).await.status, 404, "it is on the other port");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_watchers_are_bounded_and_their_places_come_free() {
    let app = TestApp::start().await;
    let mut watchers = Vec::new();
    for _ in 0..16 {
        watchers.push(watcher(app.addr()).await);
    }
    let one_more = Request::get("/status").header("accept", STREAM);
    let refused = app.ask(&one_more).await;
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.header("retry-after").is_some());
    assert_eq!(app.ask(&Request::get("/status").header("accept", "application/json")).await.status, 200);
    assert_eq!(app.ask(&Request::get("/status")).await.status, 200);
    watchers.pop().unwrap().close();
    eventually("the place is free", async || {
        let mut client = app.client().await;
        client.send(one_more.bytes()).await;
        client.head().await.word(1) == "200"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_watchers_are_told_of_the_end_and_do_not_delay_it() {
    for knobs in [&[][..], &[("PROXY_ADMIN_PORT", "0")]] {
        let app = TestApp::start_with(knobs).await;
        let mut client = watcher(app.admin_addr().unwrap_or(app.addr())).await;
        told_that(&mut client, |status| status["stopping"] == false).await;
        let begun = Instant::now();
        let last = async {
            let last = told_that(&mut client, |_| true).await;
            assert_eq!((&last["stopping"], &last["ready"]), (&true.into(), &false.into()));
            assert_eq!(told(&mut client).await, None);
            assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
        };
        tokio::join!(app.shutdown(), last);
        assert!(begun.elapsed() < Duration::from_secs(3), "held up for {:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_old_clients_and_http2_can_watch_too() {
    let app = TestApp::start().await;
    let mut old = app.client().await;
    old.send(Request::get("/status").header("accept", STREAM).http10().bytes()).await;
    assert_eq!(old.head().await.header("transfer-encoding"), None);
    let (_, piece) = old.piece().await.unwrap();
    assert!(piece.starts_with(b"retry: "), "{piece:?}");

    let mut sender = connect_h2(app.addr()).await;
    let request = http::Request::get(format!("http://{}/status", app.addr())).header("accept", STREAM);
    let body = http_body_util::combinators::BoxBody::new(http_body_util::Empty::new());
    let answer = soon("an answer", sender.send_request(request.body(body).unwrap())).await.unwrap();
    assert_eq!(answer.headers()["content-type"], STREAM);
    let mut body = answer.into_body();
    let frame = soon("a piece", http_body_util::BodyExt::frame(&mut body)).await.unwrap().unwrap();
    assert!(frame.into_data().unwrap().starts_with(b"retry: "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_what_a_client_accepts_is_read_to_its_end() {
    let app = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    let plain = TestApp::start().await;
    for addr in [app.admin_addr().unwrap(), plain.addr()] {
        for (accept, kind) in [
            (&["application/json, text/event-stream;q=0"][..], "application/json"),
            (&["application/json;q=0.5", STREAM], STREAM),
        ] {
            let request = Request::get("/status");
            let request = accept.iter().fold(request, |request, line| request.header("accept", line));
            let mut client = Client::connect(addr).await;
            client.send(request.bytes()).await;
            assert_eq!(client.head().await.header("content-type"), Some(kind), "{accept:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_the_page_is_for_browsers_and_guarded() {
    let app = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    let plain = TestApp::start().await;
    for addr in [app.admin_addr().unwrap(), plain.addr()] {
        let browser = Request::get("/").header("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
        let page = Client::connect(addr).await.ask(&browser).await;
        assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
        let policy = page.header("content-security-policy").unwrap();
        for part in [
            "default-src 'none'",
            "script-src 'sha256-",
            "style-src 'sha256-",
            "connect-src 'self'",
            "frame-ancestors 'none'",
        ] {
            assert!(policy.contains(part), "{part} in {policy}");
        }
        assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
        assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(page.header("referrer-policy"), Some("no-referrer"));
        for other in [Request::get("/"), Request::get("/").header("accept", "*/*")] {
            let text = Client::connect(addr).await.ask(&other).await;
            assert!(text.text().starts_with("inference-proxy "), "{}", text.text());
        }
    }
}
