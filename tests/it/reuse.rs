//! When a backend's connection carries another request, and when that could confuse the answers of two clients.

use crate::support::*;

const UNREAD: &str = "POST /lora-adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n";

fn raw(head: &str, body: &str) -> Step {
    Step::Send(format!("HTTP/1.1 {head}\r\n\r\n{body}").into())
}

/// One exchange after which the connection must not be used again, and one before which it is.
async fn check(what: &str, request: &Request, script: Script, is_reused: bool, says_close: bool) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut client = app.client().await;
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    upstream.script(script);
    let mut answer = client.ask(request).await;
    while answer.status < 200 {
        answer = client.answer().await;
    }
    assert!(answer.status >= 200, "{what}");
    app.inflight_is("a", "m", 0.0).await;
    // On the same thread, because the client's connection stays there.
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200, "{what}");
    let connection = |index| upstream.peek(index, |request| request.connection).unwrap();
    let says = upstream.peek(1, |request| request.head.all("connection").contains(&"close")).unwrap();
    assert_eq!(says, says_close, "{what}: says that it closes");
    assert_eq!(connection(0), connection(1), "{what}: nothing speaks against the first one");
    if is_reused {
        assert_eq!(connection(2), connection(1), "{what}: nothing is left on it");
    } else {
        assert_ne!(connection(2), connection(1), "{what}: something may be left on it");
    }
}

fn with_body(method: &str) -> Request {
    let body = format!(r#"{{"model":"m","p":{UNREAD:?}}}"#);
    Request::new(method, "/v1/chat/completions?model=m").header("content-type", "application/json").body(body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_the_backend_may_not_have_read_is_the_last_on_its_connection() {
    let served = || json_reply("{}");
    for method in ["GET", "DELETE", "QUERY", "PURGE", "LOCK"] {
        check(method, &with_body(method), served(), false, true).await;
        check(method, &Request::new(method, "/v1/realtime?model=m"), served(), true, false).await;
    }
    for method in ["POST", "PUT", "PATCH"] {
        check(method, &with_body(method), served(), true, false).await;
        for status in
            ["400 Bad Request", "401 Unauthorized", "404 Not Found", "413 No", "431 No", "500 No", "307 There"]
        {
            let unread = vec![raw(&format!("{status}\r\ncontent-length: 2"), "no")];
            check(&format!("{method} {status}"), &with_body(method), unread, false, false).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_may_not_be_over_is_the_last_on_its_connection() {
    let get = || Request::get("/v1/realtime?model=m");
    let head = || Request::new("HEAD", "/v1/realtime?model=m");
    let upgrade = || get().header("connection", "upgrade").header("upgrade", "websocket");
    let body = |head: &str, body: &str| vec![Step::ReadBody, raw(head, body)];
    let early = [raw("103 Early Hints\r\nlink: x", ""), raw("200 OK\r\ncontent-length: 2", "{}")];
    let cases: [(&str, Request, Script); 10] = [
        ("HEAD", head(), body("200 OK\r\ncontent-length: 2", "")),
        ("HEAD without a length", head(), body("200 OK", "")),
        ("204", get(), body("204 No Content", "")),
        ("304", get(), body("304 Not Modified\r\ncontent-length: 2", "")),
        ("205", get(), body("205 Reset Content\r\ncontent-length: 0", "")),
        (
            "both framings",
            get(),
            body("200 OK\r\ncontent-length: 12\r\ntransfer-encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"),
        ),
        ("one length twice", get(), body("200 OK\r\ncontent-length: 2\r\ncontent-length: 2", "{}")),
        (
            "HTTP/1.0",
            get(),
            vec![Step::Send("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n{}".into())],
        ),
        ("after an interim answer", get(), [vec![Step::ReadBody], early.to_vec()].concat()),
        ("an upgrade that is refused", upgrade(), body("200 OK\r\ncontent-length: 2", "{}")),
    ];
    for (what, request, script) in cases {
        check(what, &request, script, false, false).await;
    }
}

/// The rest of a body that was answered before it had come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_answer_came_early_is_not_used_again() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    upstream.script(vec![Step::ReadAtLeast(10), raw("200 OK\r\ncontent-length: 2", "{}"), Step::ReadBody]);
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(1_000));
    let mut client = app.client().await;
    client.send(Request::post("/v1/completions", &body).head_bytes()).await;
    client.send(&body[..100]).await;
    eventually("it is answered", async || upstream.peek(0, |request| request.sent_len > 0) == Some(true)).await;
    client.head().await;
    client.send(&body[100..]).await;
    assert!(client.finish().await.is_whole());
    app.inflight_is("a", "m", 0.0).await;
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    assert_eq!(upstream.connections_used(), 2);
}
