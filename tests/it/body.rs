//! R1, R5: the model is found wherever it stands, and the body arrives as it was sent.

use std::time::Duration;

use crate::support::*;

const MIB: usize = 1024 * 1024;

/// One that no file holds by chance, as every real one.
const BOUNDARY: &str = "----it7MA4YWxkTrZu0gW";

/// Bodies whose model is `right`, each with a trap in it that says `wrong`.
const TRAPS: [&str; 28] = [
    r#"{"model":"right"}"#,
    r#"{"model":"right","messages":[{"role":"user","content":"hi"}]}"#,
    r#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":1,"model":"right"}"#,
    "\r\n\t {\n \"model\" \t:\r\n \"right\" ,\"stream\" : true }\n\n",
    // The key and the value may be escaped.
    r#"{"mod\u0065l":"right"}"#,
    r#"{"\u006d\u006f\u0064\u0065\u006C":"right"}"#,
    r#"{"model":"r\u0069ght"}"#,
    r#"{"\u006dodel":"\u0072\u0069\u0067\u0068\u0074"}"#,
    // Not the key: inside a string, with quotes of all sorts before it.
    r#"{"prompt":"\"model\":\"wrong\"","model":"right"}"#,
    r#"{"prompt":"\\\"model\":\"wrong\",","model":"right"}"#,
    r#"{"prompt":"\\","model":"right"}"#,
    r#"{"prompt":"\\\\\"","model":"right","after":"\",\"model\":\"wrong\""}"#,
    r#"{"model":"right","prompt":"{\"model\":\"wrong\"}"}"#,
    r#"{"prompt":"model","x":"model","model":"right"}"#,
    // Not the key: in another object, or another array.
    r#"{"metadata":{"model":"wrong"},"model":"right"}"#,
    r#"{"model":"right","metadata":{"model":"wrong"}}"#,
    r#"{"tools":[{"function":{"parameters":{"properties":{"model":{"model":"wrong"}}}}}],"model":"right"}"#,
    r#"{"a":[[{"model":"wrong"}],["model","wrong"]],"model":"right"}"#,
    r#"{"a":{"b":{}},"c":[],"d":[{}],"model":"right","e":{"f":[{"model":"wrong"}]}}"#,
    // Not the key: another name.
    r#"{"Models":"wrong","MODE":"wrong","model ":"wrong"," model":"wrong","models":"wrong","model":"right"}"#,
    // The key in another case, as servers written in Go take it.
    r#"{"Model":"right"}"#,
    r#"{"model":"right","MODEL":"right","mod\u0045l":"right"}"#,
    r#"{"mode":"wrong","modell":"wrong","model\u0000":"wrong","":"wrong","model":"right"}"#,
    // Values of every kind in between.
    r#"{"a":-1.5e+10,"b":true,"c":false,"d":null,"e":0,"f":"","g":"é\ud83d\ude00","model":"right","h":1E-2}"#,
    "{\"prompt\":\"\u{e9}\u{1f600}\u{7f}\",\"model\":\"right\"}",
    // Twice is fine when both say the same, however they spell it.
    r#"{"model":"right","model":"right"}"#,
    r#"{"model":"right","messages":[],"mod\u0065l":"righ\u0074"}"#,
    r#"{"model":"right","model":"right","metadata":{"model":"wrong"},"model":"right"}"#,
];

/// Bodies that name two models at the top level.
const DISAGREEING: [&str; 10] = [
    r#"{"model":"right","Model":"wrong"}"#,
    r#"{"MODEL":"wrong","model":"right"}"#,
    r#"{"model":"right","\u004dODEL":"wrong"}"#,
    r#"{"model":"right","Model":null}"#,
    r#"{"model":"right","model":"wrong"}"#,
    r#"{"model":"wrong","messages":[],"model":"right"}"#,
    r#"{"model":"right","mod\u0065l":"wrong"}"#,
    r#"{"model":"right","model":"right","model":"wrong"}"#,
    r#"{"model":"right","model":null}"#,
    r#"{"model":"right","model":""}"#,
];

/// Two backends and a proxy in front of them: `right` has the model `right`, `wrong` has `wrong`.
struct Fork {
    right: Upstream,
    wrong: Upstream,
    app: TestApp,
}

// === impl Fork ===

impl Fork {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    async fn start_with(knobs: &[(&str, &str)]) -> Self {
        let right = Upstream::start("right", &["right"]).await;
        let wrong = Upstream::start("wrong", &["wrong"]).await;
        let app = TestApp::start_with_backends(knobs, &[&right, &wrong]).await;
        Self { right, wrong, app }
    }

    /// Checks that request `index` arrived at the right backend with this body, and that the other one saw nothing.
    #[track_caller]
    fn assert_arrived(&self, index: usize, body: &[u8], what: &str) {
        assert_eq!(self.wrong.count(), 0, "{what}: went the wrong way");
        let same = self.right.peek(index, |request| request.body.is_done() && request.body.bytes == body);
        assert_eq!(same, Some(true), "{what}: the bytes differ or are missing");
    }

    #[track_caller]
    fn assert_nothing_whole_arrived(&self, what: &str) {
        assert!(!self.right.has_whole_request() && !self.wrong.has_whole_request(), "{what}: a backend got it all");
    }
}

/// `{"messages":[…],…}` of about `len` bytes with `before` as its first members and `after` as its last ones.
fn large_json(before: &str, len: usize, after: &str) -> Vec<u8> {
    let line = r#"a line with \"model\":\"wrong\" and a \\ in it, é, and some words to make it long. "#;
    let text = line.repeat(len / line.len() + 1);
    let body = format!(r#"{{{before}"messages":[{{"role":"user","content":"{text}","model":"wrong"}}]{after}}}"#);
    body.into_bytes()
}

fn multipart(boundary: &str, parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (headers, content) in parts {
        body.extend_from_slice(format!("--{boundary}\r\n{headers}\r\n\r\n").as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
    body
}

fn upload(boundary: &str, body: &[u8]) -> Request {
    Request::new("POST", "/v1/audio/transcriptions")
        .header("content-type", &format!("multipart/form-data; boundary={boundary}"))
        .body(body)
}

/// Bytes that look like anything: all values, line ends, dashes, and a field that is none.
fn file_bytes(len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(5);
    let decoy = b"\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwrong\r\n--\r\n";
    let mut bytes = Vec::with_capacity(len + 8192);
    while bytes.len() < len {
        bytes.extend_from_slice(decoy);
        bytes.extend(std::iter::repeat_with(|| rng.u8(..)).take(4096));
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_the_right_key_decides_and_the_bytes_are_kept() {
    let fork = Fork::start().await;
    let mut client = fork.app.client().await;
    for (index, body) in TRAPS.into_iter().enumerate() {
        let answer = client.ask(&Request::post("/v1/chat/completions", body)).await;
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        fork.assert_arrived(index, body.as_bytes(), body);
        let length = fork.right.peek(index, |request| request.head.header("content-length").map(str::to_owned));
        assert_eq!(length.flatten(), Some(body.len().to_string()), "{body}: framed as it came");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_chunked_bodies_the_same() {
    let fork = Fork::start().await;
    let mut client = fork.app.client().await;
    let mut index = 0;
    for body in TRAPS {
        for size in [1, 7, body.len()] {
            let request = Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(size));
            let answer = client.ask(&request).await;
            assert_eq!(answer.status, 200, "{body} in chunks of {size}: {}", answer.text());
            fork.assert_arrived(index, body.as_bytes(), body);
            index += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_one_byte_per_segment() {
    let fork = Fork::start().await;
    let bodies = [TRAPS[4], TRAPS[9], TRAPS[24]];
    for (index, body) in bodies.into_iter().enumerate() {
        let mut client = fork.app.client().await;
        let wire = Request::post("/v1/chat/completions", body).bytes();
        client.send_pieces(wire.chunks(1), Duration::from_micros(500)).await;
        assert_eq!(client.answer().await.status, 200, "{body}");
        fork.assert_arrived(index, body.as_bytes(), body);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_random_splits() {
    let fork = Fork::start().await;
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    for index in 0..64 {
        let body = TRAPS[rng.usize(..TRAPS.len())];
        let wire = if rng.bool() {
            Request::post("/v1/chat/completions", body).bytes()
        } else {
            let size = rng.usize(1..=body.len());
            Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(size)).bytes()
        };
        let mut client = fork.app.client().await;
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rng.usize(1..=rest.len()));
            client.send_pieces([piece], Duration::from_micros(rng.u64(..1000))).await;
            rest = after;
        }
        assert_eq!(client.answer().await.status, 200, "seed {seed}: {body}");
        fork.assert_arrived(index, body.as_bytes(), &format!("seed {seed}: {body}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_the_content_type_does_not_decide() {
    let fork = Fork::start().await;
    let types =
        [None, Some("application/json; charset=utf-8"), Some("text/plain"), Some("application/x-www-form-urlencoded")];
    for (index, content_type) in types.into_iter().enumerate() {
        let mut request = Request::new("POST", "/v1/chat/completions");
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let answer = fork.app.ask(&request.body(TRAPS[0])).await;
        assert_eq!(answer.status, 200, "{content_type:?}: {}", answer.text());
        let received = fork.right.whole(index).await;
        assert_eq!(received.head.header("content-type"), content_type);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_twenty_mebibytes_with_the_model_first_and_last() {
    let fork = Fork::start().await;
    let bodies = [large_json(r#""model":"right","#, 20 * MIB, ""), large_json("", 20 * MIB, r#","model":"right""#)];
    let mut index = 0;
    for body in &bodies {
        let chunked = Request::new("POST", "/v1/chat/completions").chunks(body.chunks(60_000));
        for request in [Request::post("/v1/chat/completions", body), chunked] {
            let answer = fork.app.ask(&request).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            fork.assert_arrived(index, body, "20 MiB");
            index += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_body_flows_on_as_soon_as_its_model_is_known() {
    let fork = Fork::start().await;
    let body = large_json(r#""model":"right","#, 4 * MIB, "");
    let request = Request::post("/v1/chat/completions", &body);
    let mut client = fork.app.client().await;
    client.send(request.head_bytes()).await;
    client.send(&body[..MIB]).await;
    eventually("the backend has most of what was sent", async || {
        fork.right.peek(0, |request| request.body.bytes.len()) >= Some(MIB / 2)
    })
    .await;
    client.send(&body[MIB..]).await;
    assert_eq!(client.answer().await.status, 200);
    fork.assert_arrived(0, &body, "4 MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_two_models_are_refused_before_anything_is_forwarded() {
    let fork = Fork::start().await;
    for body in DISAGREEING {
        for request in [
            Request::post("/v1/chat/completions", body),
            Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(5)),
        ] {
            let answer = fork.app.ask(&request).await;
            assert_eq!(answer.status, 400, "{body}: {}", answer.text());
            assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
        }
    }
    fork.assert_nothing_whole_arrived("two models");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_two_models_far_apart_are_refused_and_the_backend_is_cut_off() {
    let fork = Fork::start().await;
    let late = [r#","model":"wrong""#, r#","mod\u0065l":"\u0077rong""#, r#","Model":"wrong""#];
    for after in late {
        let body = large_json(r#""model":"right","#, 4 * MIB, after);
        for request in [
            Request::post("/v1/chat/completions", &body),
            Request::new("POST", "/v1/chat/completions").chunks(body.chunks(100_000)),
        ] {
            let answer = fork.app.ask(&request).await;
            assert_eq!(answer.status, 400, "{after}: {}", answer.text());
            assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
        }
    }
    for index in 0..fork.right.count() {
        fork.right.hung_up(index).await;
    }
    fork.assert_nothing_whole_arrived("two models, far apart");
    assert_eq!(fork.wrong.count(), 0);
    // It was the client's fault: the backend's record is clean.
    assert_eq!(fork.app.ask(&Request::chat("right")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_second_model_in_the_very_last_segment_is_seen_in_time() {
    let fork = Fork::start().await;
    let body = large_json(r#""model":"right","#, MIB, r#","model":"wrong""#);
    let request = Request::post("/v1/chat/completions", &body);
    let mut client = fork.app.client().await;
    client.send(request.head_bytes()).await;
    // All but the last value: the backend has begun to work on a request that still looks good.
    client.send(&body[..body.len() - 8]).await;
    fork.right.request(0).await;
    client.send(&body[body.len() - 8..]).await;
    assert_eq!(client.answer().await.status, 400);
    fork.right.hung_up(0).await;
    fork.assert_nothing_whole_arrived("the last segment");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_deep_json_does_no_harm() {
    let fork = Fork::start().await;
    for (open, close) in [("[", "]"), (r#"{"model":"#, "}")] {
        let depth = 200_000;
        let nested = format!("{}1{}", open.repeat(depth), close.repeat(depth));
        let answer =
            fork.app.ask(&Request::post("/v1/chat/completions", format!(r#"{{"a":{nested},"model":"right"}}"#))).await;
        assert!([200, 400].contains(&answer.status), "{}", answer.text());
        let answer = fork.app.ask(&Request::post("/v1/chat/completions", open.repeat(depth))).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
    }
    assert_eq!(fork.wrong.count(), 0);
    assert_eq!(fork.app.ask(&Request::chat("right")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_one_large_body_costs_less_than_64_mib() {
    for (what, body) in [
        ("model last", large_json("", 20 * MIB, r#","model":"m""#)),
        ("model first", large_json(r#""model":"m","#, 20 * MIB, "")),
    ] {
        let upstream = Upstream::start("a", &["m"]).await;
        let proxy = ProxyProcess::start(&[], &[&upstream]).await;
        assert_eq!(Client::connect(proxy.addr).await.ask(&Request::chat("m")).await.status, 200);
        let before = proxy.resident();
        let answer = Client::connect(proxy.addr).await.ask(&Request::post("/v1/chat/completions", &body)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(upstream.peek(1, |request| request.body.bytes == body), Some(true));
        let growth = proxy.peak_resident().saturating_sub(before);
        println!("r01: 20 MiB with the {what}: {:.1} MiB more at the peak", growth as f64 / MIB as f64);
        assert!(growth < 64 * MIB as u64, "{what}: {growth} bytes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_model_in_the_query_does_not_lift_the_bound_on_what_is_held() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_HOLD_MAX", "64KiB")], &[&upstream]).await;
    let body = large_json("", 200_000, "");
    let answer = app.ask(&Request::post("/v1/chat/completions?model=m", &body)).await;
    // The body has the last word on its model, so it is held until that is known.
    assert_openai_error(&answer, 413, "request_too_large");
    assert_eq!(upstream.count(), 0);
    let small = br#"{"messages":[]}"#;
    assert_eq!(app.ask(&Request::post("/v1/chat/completions?model=m", small)).await.status, 200);
    assert_eq!(upstream.whole(0).await.body.bytes, small);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_large_body_waits_for_a_slow_backend() {
    let upstream = Upstream::start("a", &["m"]).await;
    let gate = Gate::shut();
    let mut script = vec![Step::Hold(gate.clone())];
    script.extend(json_reply("{}"));
    upstream.script(script);
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let before = proxy.resident();
    let body = large_json(r#""model":"m","#, 40 * MIB, "");
    let mut client = Client::connect(proxy.addr).await;
    let request = Request::post("/v1/chat/completions", &body);
    let ask = tokio::spawn(async move { client.ask(&request).await });
    upstream.request(0).await;
    settled("the proxy takes no more", Duration::from_millis(300), || proxy.resident() / MIB as u64).await;
    let growth = proxy.peak_resident().saturating_sub(before);
    println!("r01: 40 MiB for a backend that does not read: {:.1} MiB more", growth as f64 / MIB as f64);
    assert!(growth < 32 * MIB as u64, "{growth} bytes for a body that has begun to flow");
    gate.open();
    assert_eq!(soon("the answer", ask).await.unwrap().status, 200);
    assert_eq!(upstream.peek(0, |request| request.body.bytes == body), Some(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_multipart_is_routed_by_its_field() {
    let fork = Fork::start().await;
    let file = file_bytes(100_000);
    let file_part = "Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav";
    let fields = [
        "Content-Disposition: form-data; name=\"model\"",
        "content-disposition: form-data; name=\"model\"\r\nContent-Type: text/plain; charset=utf-8",
        "Content-Type: text/plain\r\nCONTENT-DISPOSITION:form-data;name=model",
    ];
    let decoy = "Content-Disposition: form-data; name=\"models\"";
    let decoy_file = "Content-Disposition: form-data; name=\"prompt\"; filename=\"model\"";
    let mut index = 0;
    for field in fields {
        for model_first in [true, false] {
            let mut parts: Vec<(&str, &[u8])> = vec![(decoy, b"wrong"), (decoy_file, b"wrong"), (file_part, &file)];
            parts.insert(if model_first { 0 } else { 3 }, (field, b"right"));
            let body = multipart("xYzZY", &parts);
            let answer = fork.app.ask(&upload("xYzZY", &body)).await;
            assert_eq!(answer.status, 200, "{field}: {}", answer.text());
            fork.assert_arrived(index, &body, field);
            let sent = fork.right.request(index).await.head.header("content-type").map(str::to_owned);
            assert_eq!(sent.as_deref(), Some("multipart/form-data; boundary=xYzZY"));
            index += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_boundaries_of_every_sort() {
    let fork = Fork::start().await;
    let field = "Content-Disposition: form-data; name=\"model\"";
    let longest = "a".repeat(70);
    let cases = [
        ("----WebKitFormBoundary7MA4YWxkTrZu0gW", "----WebKitFormBoundary7MA4YWxkTrZu0gW"),
        ("\"quoted boundary:?\"", "quoted boundary:?"),
        ("x; charset=utf-8", "x"),
        (longest.as_str(), longest.as_str()),
    ];
    for (index, (parameter, boundary)) in cases.into_iter().enumerate() {
        let body = multipart(boundary, &[(field, b"right")]);
        let answer = fork.app.ask(&upload(parameter, &body)).await;
        assert_eq!(answer.status, 200, "{parameter}: {}", answer.text());
        fork.assert_arrived(index, &body, parameter);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_multipart_under_random_splits_and_chunked() {
    let fork = Fork::start().await;
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    let file = file_bytes(2_000);
    let file_part = "Content-Disposition: form-data; name=\"file\"; filename=\"a\"";
    let field = "Content-Disposition: form-data; name=\"model\"";
    let body = multipart(BOUNDARY, &[(file_part, &file), (field, b"right")]);
    for index in 0..16 {
        let mut client = fork.app.client().await;
        let size = rng.usize(1..=body.len());
        let request = Request::new("POST", "/v1/images/edits")
            .header("content-type", &format!("multipart/form-data; boundary={BOUNDARY}"))
            .chunks(body.chunks(size));
        let wire = request.bytes();
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rng.usize(1..=rest.len()));
            client.send_pieces([piece], Duration::from_micros(rng.u64(..500))).await;
            rest = after;
        }
        assert_eq!(client.answer().await.status, 200, "seed {seed}");
        fork.assert_arrived(index, &body, &format!("seed {seed}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_multipart_with_two_models_or_none_is_refused() {
    let fork = Fork::start().await;
    let field = "Content-Disposition: form-data; name=\"model\"";
    let other = "Content-Disposition: form-data; name=\"prompt\"";
    let cases: [&[(&str, &[u8])]; 3] =
        [&[(field, b"right"), (field, b"wrong")], &[(other, b"right")], &[(field, b""), (other, b"right")]];
    for parts in cases {
        let answer = fork.app.ask(&upload(BOUNDARY, &multipart(BOUNDARY, parts))).await;
        assert_eq!(answer.status, 400, "{parts:?}: {}", answer.text());
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    fork.assert_nothing_whole_arrived("two models or none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_nothing_is_spooled_to_disk() {
    let upstream = Upstream::start("a", &["m"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let file_part = "Content-Disposition: form-data; name=\"file\"; filename=\"a\"";
    let field = "Content-Disposition: form-data; name=\"model\"";
    let body = multipart(BOUNDARY, &[(file_part, &file_bytes(25 * MIB)), (field, b"m")]);
    let request = upload(BOUNDARY, &body);
    let before = proxy.open_files();
    let mut client = Client::connect(proxy.addr).await;
    client.send(request.head_bytes()).await;
    // All of the file is held, as the model comes last.
    client.send(&body[..25 * MIB]).await;
    assert_eq!(proxy.open_files(), before);
    client.send(&body[25 * MIB..]).await;
    assert_eq!(client.answer().await.status, 200);
    assert_eq!(upstream.peek(0, |request| request.body.bytes == body), Some(true));
    assert_eq!(proxy.open_files(), before);
}
