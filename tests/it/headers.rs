//! R8, R9, and the forwarding rules of the contract: what of a head passes, what is dropped, what is set, and the forms
//! of HTTP that a client may come with. H1's smuggling is here too, as it is about heads.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::Frame;

use crate::support::*;

/// Headers that end at the next hop (RFC 9110, section 7.6.1, and those that old software still sends).
const HOP_BY_HOP: [&str; 5] = ["connection", "keep-alive", "proxy-connection", "te", "upgrade"];

async fn one() -> (Upstream, TestApp) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    (upstream, app)
}

fn full(body: &str) -> BoxBody<Bytes, Infallible> {
    Full::new(Bytes::from(body.to_owned())).boxed()
}

fn h2_chat(body: BoxBody<Bytes, Infallible>) -> hyper::Request<BoxBody<Bytes, Infallible>> {
    hyper::Request::post("http://front.test/v1/chat/completions").body(body).unwrap()
}

// === requests ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_request_headers_arrive_in_order_with_duplicates() {
    let (upstream, app) = one().await;
    let lines = [
        ("x-first", "1"),
        ("accept", "text/event-stream"),
        ("x-twice", "a"),
        ("x-twice", "b, c"),
        ("authorization", "Bearer sk-1"),
        ("x-api-key", "k"),
        ("x-empty", ""),
        ("accept-encoding", "gzip, br"),
        ("user-agent", "it/1 (é)"),
        ("cookie", "a=1; b=2"),
        ("anthropic-beta", "x"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "k=v"),
        ("forwarded", "for=192.0.2.60;proto=http;by=203.0.113.43"),
        ("x-last", "z"),
    ];
    let request = lines.iter().fold(Request::chat("m"), |request, (name, value)| request.header(name, value));
    assert_eq!(app.ask(&request).await.status, 200);
    let received = upstream.whole(0).await;
    let names: Vec<&str> = lines.iter().map(|(name, _)| *name).collect();
    let arrived: Vec<(&str, &str)> = received
        .head
        .headers
        .iter()
        .filter(|(name, _)| names.contains(&name.as_str()))
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    assert_eq!(arrived, lines);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_host_becomes_the_backends_and_nothing_is_announced() {
    let (upstream, app) = one().await;
    let answer = app.ask(&Request::chat("m")).await;
    let received = upstream.whole(0).await;
    assert_eq!(received.head.all("host"), [upstream.addr.to_string()]);
    for name in ["via", "server", "forwarded"] {
        assert_eq!(received.head.header(name), None, "{name} towards the backend");
        assert_eq!(answer.header(name), None, "{name} towards the client");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_forwarded_for_is_set_or_continued() {
    let (upstream, app) = one().await;
    let plain = Request::chat("m");
    let chain =
        plain.clone().header("X-Forwarded-For", "192.0.2.1").header("x-forwarded-for", "192.0.2.2,  2001:db8::3");
    let cases: [(Request, &[&str]); 2] =
        [(plain, &["127.0.0.1"]), (chain, &["192.0.2.1", "192.0.2.2", "2001:db8::3", "127.0.0.1"])];
    for (index, (request, expected)) in cases.into_iter().enumerate() {
        assert_eq!(app.ask(&request).await.status, 200);
        let received = upstream.whole(index).await;
        let lines = received.head.all("x-forwarded-for").join(",");
        let entries: Vec<&str> = lines.split(',').map(str::trim).collect();
        assert_eq!(entries, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_forwarded_host_and_proto_are_set_or_kept() {
    let (upstream, app) = one().await;
    let plain = Request::chat("m");
    let front = plain.clone().header("X-Forwarded-Host", "api.example.org").header("X-Forwarded-Proto", "https");
    let cases = [(plain, "proxy.test", "http"), (front, "api.example.org", "https")];
    for (index, (request, host, proto)) in cases.into_iter().enumerate() {
        assert_eq!(app.ask(&request).await.status, 200);
        let received = upstream.whole(index).await;
        assert_eq!(received.head.all("x-forwarded-host"), [host]);
        assert_eq!(received.head.all("x-forwarded-proto"), [proto]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_hop_by_hop_headers_of_the_client_stay_here() {
    let (upstream, app) = one().await;
    let request = Request::chat("m")
        .header("Connection", "keep-alive, X-Hop")
        .header("connection", "x-other-hop")
        .header("X-Hop", "1")
        .header("X-Other-Hop", "1")
        .header("X-Kept", "1")
        .header("Keep-Alive", "timeout=5")
        .header("Proxy-Connection", "keep-alive")
        .header("TE", "gzip");
    assert_eq!(app.ask(&request).await.status, 200);
    let head = upstream.whole(0).await.head;
    for name in HOP_BY_HOP.into_iter().chain(["x-hop", "x-other-hop"]) {
        // The proxy's own hop may say `connection: keep-alive`, and nothing else.
        let said = head.header(name).filter(|value| (name, *value) != ("connection", "keep-alive"));
        assert_eq!(said, None, "{name} in {:?}", head.headers);
    }
    assert_eq!(head.header("x-kept"), Some("1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_connection_cannot_name_away_the_framing() {
    let (upstream, app) = one().await;
    for (index, named) in
        ["content-length", "host", "content-length, close", "transfer-encoding"].into_iter().enumerate()
    {
        let answer = app.ask(&Request::chat("m").header("Connection", named)).await;
        assert_eq!(answer.status, 200, "{named}: {}", answer.text());
        let received = upstream.whole(index).await;
        assert_eq!(received.body.bytes, br#"{"model":"m","messages":[]}"#, "{named}");
        assert_eq!(received.head.all("host").len(), 1, "{named}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_connection_cannot_name_away_where_a_request_comes_from() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let request = Request::chat("m")
        .header("connection", "x-forwarded-for, x-forwarded-host, x-forwarded-proto, x-request-id, content-type")
        .header("x-forwarded-for", "192.0.2.1")
        .header("x-forwarded-host", "front.test")
        .header("x-forwarded-proto", "https")
        .header("x-request-id", "r-1");
    assert_eq!(app.ask(&request).await.status, 200);
    let head = upstream.whole(0).await.head;
    assert_eq!(head.all("x-forwarded-for"), ["192.0.2.1, 127.0.0.1"]);
    assert_eq!(head.all("x-forwarded-host"), ["front.test"]);
    assert_eq!(head.all("x-forwarded-proto"), ["https"]);
    assert_eq!(head.all("x-request-id"), ["r-1"]);
    // The model was read by it.
    assert_eq!(head.all("content-type"), ["application/json"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_request_trailers_pass() {
    let (upstream, app) = one().await;
    let request = Request::new("POST", "/v1/chat/completions")
        .header("transfer-encoding", "chunked")
        .header("trailer", "x-checksum")
        .raw_body([&chunk(r#"{"model":"m"}"#)[..], b"0\r\nx-checksum: abc\r\n\r\n"].concat());
    assert_eq!(app.ask(&request).await.status, 200);
    let received = upstream.whole(0).await;
    assert_eq!(received.body.bytes, br#"{"model":"m"}"#);
    assert_eq!(received.body.trailers, [("x-checksum".to_owned(), "abc".to_owned())]);
}

// === answers ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_answers_pass_with_status_headers_and_coding() {
    let (upstream, app) = one().await;
    let headers = "x-one: 1\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-type: application/octet-stream\r\n\
                   content-encoding: gzip\r\nvary: accept-encoding\r\netag: \"x\"\r\nx-empty:\r\nserver: engine/1\r\n\
                   openai-processing-ms: 5\r\nx-last: z\r\n";
    let body: Vec<u8> = (0..=255).collect();
    for (index, status) in
        ["200 OK", "418 I'm a teapot", "201 Created", "429 Slow", "529 Overloaded"].into_iter().enumerate()
    {
        upstream.script(reply(status, headers, &body));
        let answer = app.ask(&Request::chat("m").header("accept-encoding", "gzip")).await;
        assert_eq!(answer.head.word(1), &status[..3]);
        assert_eq!(answer.bytes(), body);
        assert_eq!(answer.header("content-length"), Some("256"));
        let sent: Vec<(String, String)> = headers
            .trim_end()
            .split("\r\n")
            .map(|line| line.split_once(':').unwrap())
            .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
            .collect();
        let arrived: Vec<(String, String)> =
            answer.head.headers.iter().filter(|(name, _)| sent.iter().any(|(n, _)| n == name)).cloned().collect();
        assert_eq!(arrived, sent, "{status}");
        assert_eq!(upstream.count(), index + 1, "{status} is the backend's answer, not a reason to ask again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_hop_by_hop_headers_of_the_backend_stay_there() {
    let (upstream, app) = one().await;
    let headers = "connection: keep-alive, X-Hop-B\r\nkeep-alive: timeout=5, max=100\r\nx-hop-b: 1\r\nx-kept: 1\r\n\
                   proxy-connection: keep-alive\r\n";
    upstream.script(reply("200 OK", headers, "{}"));
    let mut client = app.client().await;
    let answer = client.ask(&Request::chat("m")).await;
    for name in ["keep-alive", "x-hop-b", "proxy-connection"] {
        assert_eq!(answer.header(name), None, "{name}");
    }
    assert_eq!(answer.header("x-kept"), Some("1"));
    // Nor does the backend's `close` end the client's connection.
    upstream.script(reply("400 Bad Request", "connection: close\r\n", "{}"));
    assert_eq!(client.ask(&Request::chat("m")).await.status, 400);
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_answer_trailers_pass() {
    let (upstream, app) = one().await;
    upstream.script(vec![
        Step::ReadBody,
        Step::Send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-usage\r\n\r\n".into()),
        Step::SendChunk("abc".into()),
        Step::Send("0\r\nx-usage: 7\r\n\r\n".into()),
    ]);
    let answer = app.ask(&Request::chat("m").header("te", "trailers")).await;
    assert!(answer.is_whole());
    assert_eq!(answer.bytes(), b"abc");
    assert_eq!(answer.header("trailer"), Some("x-usage"));
    assert_eq!(answer.body.trailers, [("x-usage".to_owned(), "7".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_interim_answers_do_not_end_the_exchange() {
    let (upstream, app) = one().await;
    let mut script = vec![
        Step::ReadBody,
        Step::Send("HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n".into()),
    ];
    script.extend(json_reply(r#"{"after":"hints"}"#));
    upstream.script(script);
    let answer = app.ask(&Request::chat("m")).await;
    assert_eq!((answer.status, answer.json()["after"].as_str()), (200, Some("hints")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_interim_answers_pass() {
    let (upstream, app) = one().await;
    let gate = Gate::shut();
    let mut script = vec![
        Step::ReadBody,
        Step::Send("HTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n".into()),
        Step::Hold(gate.clone()),
    ];
    script.extend(json_reply("{}"));
    upstream.script(script);
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    // At once, and not together with the final answer.
    let hints = client.any_head().await.unwrap();
    assert_eq!((hints.word(1), hints.header("link")), ("103", Some("</x>; rel=preload")));
    gate.open();
    assert_eq!(client.answer().await.status, 200);
}

// === forms of HTTP ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_expect_continue_is_answered_before_the_body() {
    let (upstream, app) = one().await;
    let request = Request::chat("m").header("Expect", "100-continue");
    let mut client = app.client().await;
    client.send(request.head_bytes()).await;
    let interim = client.any_head().await.unwrap();
    assert_eq!(interim.word(1), "100");
    client.send(&request.bytes()[request.head_bytes().len()..]).await;
    assert_eq!(client.answer().await.status, 200);
    assert_eq!(upstream.whole(0).await.body.bytes, br#"{"model":"m","messages":[]}"#);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_expect_continue_is_not_answered_for_a_body_that_is_too_large() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MAX_BODY", "1KiB")], &[&upstream]).await;
    let request = Request::post("/v1/chat/completions", vec![b' '; 2000]).header("Expect", "100-continue");
    let mut client = app.client().await;
    client.send(request.head_bytes()).await;
    let first = client.any_head().await.unwrap();
    assert_eq!(first.word(1), "413", "the body was asked for, to be thrown away");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_http_1_0_gets_no_chunked_framing() {
    let (upstream, app) = one().await;
    upstream.script(sse_reply(&["data: 1\n\n", "data: 2\n\n"]));
    for host in ["host: old.test\r\n", ""] {
        let request = Request::chat("m").http10().only_headers(&format!("{host}content-length: 27\r\n"));
        let mut client = app.client().await;
        let answer = client.ask(&request).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("transfer-encoding"), None);
        assert!(answer.is_whole());
        if host.is_empty() {
            assert_eq!(answer.json()["served_by"], "a");
        } else {
            assert_eq!(answer.bytes(), b"data: 1\n\ndata: 2\n\n");
        }
    }
    // Upstream it is HTTP/1.1 all the same.
    assert_eq!(upstream.whole(0).await.head.word(2), "HTTP/1.1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_a_backend_that_ends_its_answer_by_closing_is_understood() {
    let (upstream, app) = one().await;
    let mut client = app.client().await;
    for version in ["HTTP/1.0", "HTTP/1.1"] {
        for end in [Step::Close, Step::HalfClose] {
            let answer = format!("{version} 200 OK\r\ncontent-type: text/plain\r\n\r\nuntil the end");
            upstream.script(vec![Step::ReadBody, Step::Send(answer.into()), end]);
            let answer = client.ask(&Request::chat("m")).await;
            assert_eq!((answer.status, answer.text().as_str(), answer.end), (200, "until the end", End::Whole));
        }
    }
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200, "the client's connection lives on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_head_has_no_body_and_leaves_the_connection_usable() {
    let (upstream, app) = one().await;
    upstream.always(vec![
        Step::ReadBody,
        Step::Send("HTTP/1.1 200 OK\r\nx-from: backend\r\ncontent-length: 1234\r\n\r\n".into()),
    ]);
    let mut client = app.client().await;
    for (target, status) in
        [("/healthz", 200), ("/v1/models", 200), ("/v1/models/m", 200), ("/v1/realtime?model=m", 200)]
    {
        let answer = client.ask(&Request::new("HEAD", target)).await;
        assert_eq!(answer.status, status, "{target}");
        assert!(client.is_quiet(), "{target}: a body after HEAD");
    }
    assert_eq!(upstream.whole(0).await.head.word(0), "HEAD");
    let answer = client.ask(&Request::new("HEAD", "/v1/realtime?model=m")).await;
    assert_eq!((answer.header("x-from"), answer.header("content-length")), (Some("backend"), Some("1234")));
    // Claude Code asks this first, and any answer will do.
    client.ask(&Request::new("HEAD", "/")).await;
    assert!(client.is_quiet());
    assert_eq!(client.ask(&Request::new("HEAD", "/v1/models/unheard")).await.status, 404);
    assert!(client.is_quiet());
    assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_preflight_is_answered_by_policy() {
    let preflight = |origin: &str| {
        Request::new("OPTIONS", "/v1/chat/completions")
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "POST")
            .header("Access-Control-Request-Headers", "authorization,content-type")
    };
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let answer = app.ask(&preflight("https://ui.example")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (204, None));
    let answer = app.ask(&Request::chat("m").header("Origin", "https://ui.example")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, None));

    let origins = "https://ui.example,http://localhost:3000";
    let app = TestApp::start_with_backends(&[("PROXY_CORS_ORIGINS", origins)], &[&upstream]).await;
    for origin in origins.split(',') {
        let answer = app.ask(&preflight(origin)).await;
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (204, Some(origin)));
        assert!(answer.header("access-control-allow-methods").unwrap().contains("POST"));
        let allowed = answer.header("access-control-allow-headers").unwrap().to_ascii_lowercase();
        assert!(allowed == "*" || (allowed.contains("authorization") && allowed.contains("content-type")), "{allowed}");
        // On other answers too: a backend's, and the proxy's own, errors above all.
        for request in [Request::chat("m"), Request::chat("unheard"), Request::get("/v1/models")] {
            let answer = app.ask(&request.header("Origin", origin)).await;
            assert_eq!(answer.header("access-control-allow-origin"), Some(origin), "{:?}", answer.head);
            let exposed = answer.header("access-control-expose-headers").unwrap();
            assert!(
                ["x-request-id", "request-id", "retry-after"].iter().all(|name| exposed.contains(name)),
                "{exposed}"
            );
        }
    }
    let answer = app.ask(&preflight("https://evil.example")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (204, None));

    let app = TestApp::start_with_backends(&[("PROXY_CORS_ORIGINS", "*")], &[&upstream]).await;
    let answer = app.ask(&preflight("https://any.example")).await;
    let allowed = answer.header("access-control-allow-origin");
    assert!([Some("*"), Some("https://any.example")].contains(&allowed), "{allowed:?}");
    assert_eq!(upstream.count(), 1 + 2, "no preflight reached the backend");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_preflight_is_answered_by_policy_wherever_it_leads() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_CORS_ORIGINS", "https://ui.example")], &[&upstream]).await;
    for target in [
        "/v1/chat/completions",
        "/v1/chat/completions?model=m",
        "/v1/chat/completions?model=unheard",
        "/v1/responses/resp_1",
        "/v1/responses/resp_1?model=m",
        "/v1/models",
        "/v1/models?model=m",
        "/v1/models/m",
        "/v1/models/org%2Funheard/",
        "/v1/files",
        "/v1/messages/batches?model=m",
        "/v1/load_lora_adapter",
        "/tokenize?model=m",
        "/healthz",
        "/metrics",
        "/",
        "/other",
        "/v1",
        "*",
    ] {
        for method in ["GET", "POST", "PATCH", "DELETE"] {
            let request = Request::new("OPTIONS", target)
                .header("Access-Control-Request-Method", method)
                .header("access-control-request-headers", "x-a, x-b");
            for (origin, allowed) in [("https://ui.example", true), ("https://evil.example", false)] {
                let answer = app.ask(&request.clone().header("origin", origin)).await;
                let what = format!("{method} {target} for {origin}: {:?}", answer.head);
                assert_eq!(answer.status, 204, "{what}");
                assert_eq!(answer.header("access-control-allow-origin"), allowed.then_some(origin), "{what}");
                assert_eq!(answer.header("access-control-allow-headers"), allowed.then_some("x-a, x-b"), "{what}");
                let methods = answer.header("access-control-allow-methods");
                assert_eq!(methods.map(|methods| methods.contains(method)), allowed.then_some(true), "{what}");
                assert!(answer.head.all("vary").contains(&"origin"), "{what}");
            }
        }
    }
    assert_eq!(upstream.count(), 0);
    // Without a policy the answer is the same, and allows nothing.
    let app = TestApp::with(&[&upstream]).await;
    let preflight = Request::new("OPTIONS", "/v1/chat/completions?model=m")
        .header("origin", "https://ui.example")
        .header("access-control-request-method", "POST");
    let answer = app.ask(&preflight).await;
    assert_eq!((answer.status, answer.header("access-control-allow-methods")), (204, None));
    assert_eq!(upstream.count(), 0);
    // A question about a path that names a model and is no preflight is the backend's.
    for lines in ["host: p\r\n", "host: p\r\norigin: https://ui.example\r\n"] {
        let options = Request::new("OPTIONS", "/v1/chat/completions?model=m").only_headers(lines);
        assert_eq!(app.ask(&options).await.json()["served_by"], "a", "{lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_options_that_names_no_model_is_answered_here() {
    let (upstream, app) = one().await;
    for target in
        ["/v1/chat/completions", "/v1/models/m", "/v1/responses/resp_1", "/v1/files", "/other", "*", "/status"]
    {
        let answer = app.ask(&Request::new("OPTIONS", target)).await;
        assert_eq!((answer.status, answer.bytes().len()), (204, 0), "{target}: {:?}", answer.head);
    }
    for target in
        ["/sleep", "/v1/load_lora_adapter", "/v1/x/%2e%2e/sleep", "/other?model=m", "/v1/load_lora_adapter?model=m"]
    {
        let status = app.ask(&Request::new("OPTIONS", target)).await.status;
        assert!(matches!(status, 204 | 404), "{target}: {status}");
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_every_answer_says_that_it_varies_with_the_origin() {
    let upstream = Upstream::start("a", &["m"]).await;
    let requests = [
        (Request::chat("m"), 200),
        (Request::chat("unheard"), 404),
        (Request::get("/v1/models"), 200),
        (Request::get("/v1/models/m"), 200),
        (Request::get("/healthz"), 200),
        (Request::get("/other"), 404),
        (Request::new("POST", "/status"), 405),
        (Request::new("OPTIONS", "/v1/models"), 204),
        (Request::get("/healthz").only_headers(""), 400),
        (Request::get("/healthz").header("x y", "1"), 400),
    ];
    for (policy, varies) in [("", false), ("https://ui.example", true), ("*", true)] {
        let knobs = [("PROXY_CORS_ORIGINS", policy)];
        let app = TestApp::start_with_backends(&knobs[usize::from(policy.is_empty())..], &[&upstream]).await;
        upstream.script(reply("200 OK", "vary: Accept-Encoding\r\n", "{}"));
        for (request, status) in &requests {
            for origin in ["", "https://ui.example", "https://evil.example"] {
                let request = match origin {
                    "" => request.clone(),
                    _ => request.clone().header("origin", origin),
                };
                let answer = app.ask(&request).await;
                assert_eq!(answer.status, *status, "{:?}", answer.head);
                assert_eq!(answer.head.all("vary").contains(&"origin"), varies, "{policy} {origin}: {:?}", answer.head);
            }
        }
    }
}

// === Host, Date, Vary, request-id ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_a_request_says_which_host_it_asks() {
    let (upstream, app) = one().await;
    let json = r#"{"model":"m"}"#;
    let chat = |start: &str, lines: &str| {
        format!("{start}\r\ncontent-type: application/json\r\n{lines}content-length: {}\r\n\r\n{json}", json.len())
    };
    let origin = "POST /v1/chat/completions HTTP/1.1";
    let absolute = "POST http://api.example/v1/chat/completions HTTP/1.1";
    for wire in [
        chat(origin, ""),
        chat(origin, "x-forwarded-host: api.example\r\n"),
        chat(origin, "host: a b\r\n"),
        chat(origin, "host: a, b\r\n"),
        chat(origin, "host: user@a\r\n"),
        chat(origin, "host: http://a/\r\n"),
        chat(origin, "host: a:port\r\n"),
        chat(origin, "host: [::1\r\n"),
        chat(origin, "host: a\r\nhost: a\r\n"),
        chat(origin, "host: a\r\nHost: b\r\n"),
        chat(&origin.replace("1.1", "1.0"), "host: a\r\nHost: b\r\n"),
        chat(&origin.replace("1.1", "1.0"), "host: a/b\r\n"),
        chat(absolute, ""),
        chat(&absolute.replace("api.example", "user@api.example"), "host: a\r\n"),
        chat(&absolute.replace("api.example", ""), "host: a\r\n"),
        "GET /v1/models HTTP/1.1\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.1\r\n\r\n".to_owned(),
        "OPTIONS * HTTP/1.1\r\n\r\n".to_owned(),
    ] {
        let answer = app.client().await.try_ask(wire.as_bytes()).await.unwrap();
        assert_openai_error(&answer, 400, "invalid_request");
        assert!(answer.text().contains("ost"), "does not say what is wrong: {}", answer.text());
    }
    assert_eq!(upstream.count(), 0);
    for (index, (wire, host)) in [
        (chat(origin, "host:\r\n"), None),
        (chat(origin, "Host: API.example:8080\r\n"), Some("API.example:8080")),
        (chat(origin, "host: [2001:db8::1]:80\r\n"), Some("[2001:db8::1]:80")),
        (chat(&origin.replace("1.1", "1.0"), ""), None),
        (chat(&origin.replace("1.1", "1.0"), "host: a_b.example\r\n"), Some("a_b.example")),
        (chat(absolute, "host: other\r\n"), Some("api.example")),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = app.client().await.try_ask(wire.as_bytes()).await.unwrap();
        assert_eq!(answer.status, 200, "{wire:?}: {}", answer.text());
        assert_eq!(upstream.whole(index).await.head.header("x-forwarded-host"), host, "{wire:?}");
    }
    // A refused host costs the request and not its connection.
    let mut client = app.client().await;
    client.send(chat(origin, "host: a b\r\n")).await;
    assert_eq!(client.answer().await.status, 400);
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_http_2_says_which_host_it_asks() {
    let (upstream, app) = one().await;
    let mut front = connect_h2(app.addr()).await;
    let body = || full(r#"{"model":"m"}"#);
    let with_host = |host: &'static str| {
        let mut request = h2_chat(body());
        request.headers_mut().append("host", host.parse().unwrap());
        request
    };
    for (request, expected) in [
        (h2_chat(body()), 200),
        (with_host("front.test"), 200),
        (with_host("FRONT.test"), 200),
        (with_host("other.test"), 400),
        (hyper::Request::post("http://user@front.test/v1/chat/completions").body(body()).unwrap(), 400),
    ] {
        let shown = format!("{:?} {:?}", request.uri(), request.headers());
        let answer = front.send_request(request).await.unwrap();
        assert_eq!(answer.status(), expected, "{shown}");
    }
    assert_eq!(upstream.count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_http_2_bodies_pass_with_every_method() {
    let (upstream, app) = one().await;
    let mut front = connect_h2(app.addr()).await;
    let pieces = || {
        let frames = [r#"{"mod"#, r#"el":"m"}"#].map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::from(piece))));
        BodyExt::boxed(StreamBody::new(futures::stream::iter(frames)))
    };
    for (index, method) in ["GET", "DELETE", "POST", "PUT", "PATCH", "QUERY"].into_iter().enumerate() {
        let request =
            hyper::Request::builder().method(method).uri("http://front.test/v1/things/t1").body(pieces()).unwrap();
        let answer = front.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200, "{method}");
        answer.into_body().collect().await.unwrap();
        let received = upstream.whole(index).await;
        assert_eq!(received.head.word(0), method);
        assert_eq!(received.body.bytes, br#"{"model":"m"}"#, "{method}");
    }
    // A request without a body stays one.
    let index = upstream.count();
    let empty =
        hyper::Request::get("http://front.test/v1/things/t1").body(BodyExt::boxed(http_body_util::Empty::new()));
    assert_eq!(front.send_request(empty.unwrap()).await.unwrap().status(), 200);
    let head = upstream.whole(index).await.head;
    assert_eq!((head.header("transfer-encoding"), head.header("content-length")), (None, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_a_426_says_what_it_demands() {
    let (upstream, app) = one().await;
    upstream.always(reply(
        "426 Upgrade Required",
        "upgrade: websocket\r\nconnection: upgrade, x-hop\r\nx-hop: 1\r\n",
        "{}",
    ));
    let mut client = app.client().await;
    for _ in 0..2 {
        let answer = client.ask(&Request::get("/v1/realtime?model=m")).await;
        assert_eq!((answer.status, answer.header("upgrade")), (426, Some("websocket")));
        assert!(answer.head.all("connection").contains(&"upgrade"), "{:?}", answer.head);
        assert_eq!(answer.header("x-hop"), None);
    }
    let mut front = connect_h2(app.addr()).await;
    let request = hyper::Request::get("http://front.test/v1/realtime?model=m").body(full("")).unwrap();
    let answer = front.send_request(request).await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers().get("upgrade")), (426, None), "HTTP/2 knows no upgrade");
    // Elsewhere it is an offer for a connection that is not the client's.
    upstream.always(reply("200 OK", "upgrade: h2c\r\nconnection: upgrade\r\n", "{}"));
    let answer = client.ask(&Request::get("/v1/realtime?model=m")).await;
    assert_eq!((answer.status, answer.header("upgrade"), answer.header("connection")), (200, None, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_ndjson_is_not_held_back_by_front_proxies() {
    let (upstream, app) = one().await;
    for kind in
        ["application/x-ndjson", "application/jsonl; charset=utf-8", "application/json-seq", "text/event-stream"]
    {
        let headers = format!("content-type: {kind}\r\n");
        upstream.script(reply("200 OK", &headers, "{}\n"));
        let answer = app.ask(&Request::post("/api/chat", r#"{"model":"m"}"#)).await;
        assert_eq!((answer.status, answer.header("x-accel-buffering")), (200, Some("no")), "{kind}");
    }
    upstream.script(json_reply("{}"));
    assert_eq!(app.ask(&Request::chat("m")).await.header("x-accel-buffering"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_http_2_in_clear_text() {
    let (upstream, app) = one().await;
    let mut front = connect_h2(app.addr()).await;
    let sent = r#"{"messages":[],"model":"m"}"#;
    let mut request = h2_chat(full(sent));
    request.headers_mut().insert("x-kept", "1".parse().unwrap());
    let answer = front.send_request(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    for name in ["connection", "transfer-encoding", "keep-alive"] {
        assert_eq!(answer.headers().get(name), None, "{name} is not of HTTP/2");
    }
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, Bytes::from(r#"{"object":"chat.completion","served_by":"a"}"#));
    let received = upstream.whole(0).await;
    assert_eq!(received.head.start, "POST /v1/chat/completions HTTP/1.1");
    assert_eq!(received.head.all("host"), [upstream.addr.to_string()]);
    assert_eq!(received.head.header("x-forwarded-host"), Some("front.test"));
    assert_eq!(received.head.header("x-kept"), Some("1"));
    assert_eq!(received.body.bytes, sent.as_bytes());
    let answer = front.send_request(h2_chat(full(r#"{"model":"unheard"}"#))).await.unwrap();
    assert_eq!(answer.status(), 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_http_2_bodies_without_a_length_and_many_streams_at_once() {
    let (upstream, app) = one().await;
    let front = connect_h2(app.addr()).await;
    let gate = Gate::shut();
    upstream.always(held_stream("data: 1\n\n", &gate, "data: 2\n\n"));
    let mut streams = Vec::new();
    for _ in 0..32 {
        let pieces = [r#"{"messages":[],"#, r#""model":"#, r#""m"}"#];
        let frames = pieces.map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::from(piece))));
        let body = BodyExt::boxed(StreamBody::new(futures::stream::iter(frames)));
        let mut front = front.clone();
        streams.push(tokio::spawn(async move {
            let answer = front.send_request(h2_chat(body)).await.unwrap();
            assert_eq!(answer.status(), 200);
            answer.into_body().collect().await.unwrap().to_bytes()
        }));
    }
    eventually("all 32 streams have reached the backend", async || upstream.count() == 32).await;
    gate.open();
    for stream in streams {
        assert_eq!(soon("a stream", stream).await.unwrap(), Bytes::from("data: 1\n\ndata: 2\n\n"));
    }
    for index in 0..32 {
        assert_eq!(upstream.whole(index).await.body.bytes, br#"{"messages":[],"model":"m"}"#);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r09_keep_alive_and_pipelining_are_served_in_order() {
    let (upstream, app) = one().await;
    let gate = Gate::shut();
    upstream.script(held_reply(&gate));
    let mut client = app.client().await;
    let three = [Request::chat("m").bytes(), Request::get("/v1/models").bytes(), Request::chat("unheard").bytes()];
    client.send(three.concat()).await;
    upstream.request(0).await;
    gate.open();
    assert_eq!(client.answer().await.json()["held"], true);
    assert_eq!(client.answer().await.json()["object"], "list");
    assert_eq!(client.answer().await.status, 404);
}

// === hostile heads ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_length_and_transfer_encoding_together_are_refused() {
    let (upstream, app) = one().await;
    let json = r#"{"model":"m"}"#;
    let framed = [&chunk(json)[..], LAST_CHUNK.as_bytes()].concat();
    let smuggled = Request::chat("m").bytes();
    let cases = [
        "content-length: 23\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 23\r\n",
        "content-length: 23\r\nTransfer-Encoding: Chunked\r\n",
        "content-length: 13\r\ncontent-length: 14\r\n",
        "content-length: 14\r\ncontent-length: 13\r\n",
        "content-length: 13, 14\r\n",
        "content-length: 13\r\nx: y\r\nContent-Length: 0\r\n",
    ];
    for lines in cases {
        let request = Request::new("POST", "/v1/chat/completions")
            .only_headers(&format!("host: proxy.test\r\ncontent-type: application/json\r\n{lines}"))
            .raw_body(&framed);
        let mut client = app.client().await;
        client.send([request.bytes(), smuggled.clone()].concat()).await;
        let answer = client.answer().await;
        assert_eq!(answer.status, 400, "{lines:?}: {}", answer.text());
        // Whether by FIN or by RST: what was behind it must not be taken for a request.
        assert_ne!(client.ended().await, End::Whole);
    }
    assert_eq!(upstream.count(), 0);
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_malformed_requests_get_4xx_and_no_backend() {
    let (upstream, app) = one().await;
    let post = |lines: &str| format!("POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\n{lines}\r\n");
    let json = r#"{"model":"m"}"#;
    let cases = [
        format!("{}d\r\n{json}\r\n0\r\n\r\n", post("transfer-encoding: xchunked\r\n")),
        format!("{}d\r\n{json}\r\n0\r\n\r\n", post("transfer-encoding: chunked, gzip\r\n")),
        format!("{}{json}", post("content-length: -13\r\n")),
        format!("{}{json}", post("content-length: +13\r\n")),
        format!("{}{json}", post("content-length: 13 13\r\n")),
        format!("{}{json}", post("content-length : 13\r\n")),
        format!("{}{json}", post("content-length: 99999999999999999999999\r\n")),
        format!("{}{json}", post("x: a\0b\r\ncontent-length: 13\r\n")),
        format!("{}{json}", post(" folded: 1\r\ncontent-length: 13\r\n")),
        format!("{}x\r\n", post("transfer-encoding: chunked\r\n")),
        format!("{}d\r\n{json}XX0\r\n\r\n", post("transfer-encoding: chunked\r\n")),
        format!("{}fffffffffffffffff\r\n{json}", post("transfer-encoding: chunked\r\n")),
        "POST /v1/chat completions HTTP/1.1\r\nhost: p\r\n\r\n".to_owned(),
        "GET\0/ HTTP/1.1\r\n\r\n".to_owned(),
        "\0\0\0\0\r\n\r\n".to_owned(),
        "GET /v1/models HTTP/9.9\r\nhost: p\r\n\r\n".to_owned(),
        format!("GET /v1/models HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(2_000_000)),
        format!("GET /v1/models HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(20_000)),
    ];
    for case in &cases {
        let shown = &case[..case.len().min(200)];
        let mut client = app.client().await;
        // A connection that is cut without a word is as good a refusal.
        if let Ok(answer) = client.try_ask(case.as_bytes()).await {
            assert!((400..500).contains(&answer.status), "{shown:?}: {} {}", answer.status, answer.text());
        }
    }
    assert!(!upstream.has_whole_request());
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_slow_head_keeps_nobody_waiting() {
    let (_upstream, app) = one().await;
    let mut slow = Vec::new();
    for _ in 0..64 {
        let mut client = app.client().await;
        client.send("POST /v1/chat/completions HTTP/1.1\r\nho").await;
        slow.push(client);
    }
    let asked = tokio::time::timeout(Duration::from_secs(5), app.ask(&Request::chat("m"))).await;
    assert_eq!(asked.expect("others are served meanwhile").status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r08_a_body_of_unknown_length_passes_with_every_method() {
    let (upstream, app) = one().await;
    for method in ["GET", "DELETE", "POST"] {
        let count = upstream.count();
        let body: &[u8] = br#"{"model":"m"}"#;
        let answer = app.ask(&Request::new(method, "/v1/responses/r1").chunks([body])).await;
        assert_eq!(answer.status, 200, "{method}: {}", answer.text());
        assert_eq!(upstream.whole(count).await.body.bytes, body, "{method}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_two_content_types_are_refused() {
    let (upstream, app) = one().await;
    let form = "multipart/form-data; boundary=x";
    let request = Request::chat("m").header("content-type", "application/json").header("content-type", form);
    assert_eq!(app.ask(&request).await.status, 400);
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_no_header_of_an_answer_tells_the_backends_address() {
    let upstream = Upstream::start("engine-1", &["m"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&upstream).label("inference.api.base_path", "/api/v1")).await;
    let (ip, port) = (upstream.addr.ip().to_string(), upstream.addr.port());
    let encoded = ip.replace('.', "%2E");
    for authority in [
        format!("http://{ip}:{port}"),
        format!("https://{ip}:{port}"),
        format!("HTTPS://{ip}:{port}"),
        format!("wss://{ip}:{port}"),
        format!("//{ip}:{port}"),
        format!("https://{ip}"),
        format!("http://{ip}"),
        format!("https://user:secret@{ip}:{port}"),
        format!("http://{encoded}:{port}"),
        format!("http%3A%2F%2F{ip}%3A{port}"),
        format!("http://2130706433:{port}"),
        format!("http://[::ffff:{ip}]:{port}"),
        format!("http://Engine-1:{port}"),
        "https://engine-1".to_owned(),
        format!("http://localhost:{port}"),
    ] {
        let headers = format!(
            "Location: {authority}/api/v1/things?x=1\r\nContent-Location: {authority}/api/v1/things?x=1\r\n\
             Refresh: 5; url={authority}/api/v1/things?x=1\r\nOperation-Location: {authority}/api/v1/things?x=1\r\n\
             Link: <{authority}/api/v1/things?x=1>; rel=\"next\", <https://example.org/x>; rel=a\r\n"
        );
        for status in ["200 OK", "201 Created", "307 Temporary Redirect", "404 Not Found"] {
            upstream.script(reply(status, &headers, "{}"));
            let answer = app.ask(&Request::chat("m")).await;
            let what = format!("{authority}: {:?}", answer.head);
            for name in ["location", "content-location", "operation-location"] {
                assert_eq!(answer.header(name), Some("/v1/things?x=1"), "{name}: {what}");
            }
            assert_eq!(answer.header("refresh"), Some("5; url=/v1/things?x=1"), "{what}");
            let link = "</v1/things?x=1>; rel=\"next\", <https://example.org/x>; rel=a";
            assert_eq!(answer.header("link"), Some(link), "{what}");
        }
    }
    let (address, lines) = (format!("{ip}:{port}"), |address: &str| {
        format!(
            "alt-svc: h2=\"{address}\"; ma=60\r\nset-cookie: a=1; Domain={ip}; Path=/\r\nx-served-by: {address}\r\n\
             access-control-allow-origin: http://{address}\r\nwww-authenticate: Bearer resource_metadata=\"http://{address}/x\"\r\n"
        )
    });
    upstream.script(reply("401 Unauthorized", &lines(&address), "{}"));
    let answer = app.ask(&Request::chat("m")).await;
    let raw = String::from_utf8_lossy(&answer.head.raw).into_owned();
    assert!(!raw.contains(&ip), "{raw}");
    assert_eq!((answer.header("alt-svc"), answer.header("set-cookie")), (None, Some("a=1; Path=/")));
    assert_eq!(answer.header("www-authenticate"), Some("Bearer resource_metadata=\"/x\""));
    // Hints that come ahead of the answer.
    let mut script = vec![
        Step::ReadBody,
        Step::Send(
            format!("HTTP/1.1 103 Early Hints\r\nlink: <http://{address}/api/v1/style>; rel=preload\r\n\r\n").into(),
        ),
    ];
    script.extend(json_reply("{}"));
    upstream.script(script);
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    let hints = client.any_head().await.unwrap();
    assert_eq!((hints.word(1), hints.header("link")), ("103", Some("</v1/style>; rel=preload")));
    // What leads elsewhere passes.
    for value in ["https://example.org/x", "http://127.0.0.1:1/x", "/api/v1/x", "things/1", "//example.org/x"] {
        upstream.script(reply("201 Created", &format!("location: {value}\r\n"), "{}"));
        assert_eq!(app.ask(&Request::chat("m")).await.header("location"), Some(value));
    }
}
