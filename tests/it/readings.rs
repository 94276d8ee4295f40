//! R1, R5, H1: no request is routed by one model and served under another. What two servers could read in two ways is
//! refused, what they read alike passes, and a request hidden in the body of another reaches no backend whole.

use crate::support::*;

const MIB: usize = 1024 * 1024;
const BOUNDARY: &str = "xYzZY";
const FORM: &str = "multipart/form-data; boundary=xYzZY";

/// Two backends and a proxy in front of them: `right` has the model `right`, `wrong` has `wrong`.
struct Fork {
    right: Upstream,
    wrong: Upstream,
    app: TestApp,
}

// === impl Fork ===

impl Fork {
    async fn start() -> Fork {
        let right = Upstream::start("right", &["right"]).await;
        let wrong = Upstream::start("wrong", &["wrong"]).await;
        let app = TestApp::with(&[&right, &wrong]).await;
        Fork { right, wrong, app }
    }

    /// Checks that the right backend gets the request, with its body as it was sent.
    async fn assert_served(&self, request: &Request, body: impl AsRef<[u8]>, what: &str) {
        let index = self.right.count();
        let answer = self.app.ask(request).await;
        assert_eq!(answer.status, 200, "{what}: {}", answer.text());
        assert_eq!((self.right.count(), self.wrong.count()), (index + 1, 0), "{what}: went the wrong way");
        let same = self.right.peek(index, |request| request.body.is_done() && request.body.bytes == body.as_ref());
        assert_eq!(same, Some(true), "{what}: the bytes differ");
    }

    /// Checks that the request is refused, and that no backend gets all of it.
    async fn assert_refused(&self, request: &Request, status: u16, what: &str) -> Answer {
        let before = self.right.count();
        let answer = self.app.ask(request).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.text());
        assert_eq!(self.wrong.count(), 0, "{what}: went the wrong way");
        for index in before..self.right.count() {
            assert_ne!(self.right.peek(index, |request| request.body.is_done()), Some(true), "{what}: arrived whole");
        }
        answer
    }
}

fn typed(target: &str, content_type: &str, body: impl AsRef<[u8]>) -> Request {
    Request::new("POST", target).header("content-type", content_type).body(body)
}

/// A form of parts, each with its headers.
fn form(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (headers, content) in parts {
        body.extend_from_slice(format!("--{BOUNDARY}\r\n{headers}\r\n\r\n").as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

fn upload(content_type: &str, body: &[u8]) -> Request {
    typed("/v1/audio/transcriptions", content_type, body)
}

// === raw control characters ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_request_hidden_in_a_json_string_is_refused() {
    let fork = Fork::start().await;
    let hidden =
        "POST /lora-adapters HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]";
    let mut cases: Vec<String> = Vec::new();
    for text in [&format!("\r\n{hidden}"), "\r\n", "\n", "\t", "\0", "\x1f", "0123456789 0123456789 0123456789 \x0b"] {
        cases.extend([
            format!(r#"{{"model":"right","prompt":"{text}"}}"#),
            format!(r#"{{"prompt":"{text}","model":"right"}}"#),
            format!(r#"{{"model":"right","messages":[{{"role":"user","content":["{text}"]}}]}}"#),
            format!(r#"{{"model":"right","{text}":1}}"#),
            format!(r#"{{"model":"right","x":{{"{text}":"y"}}}}"#),
            format!(r#"{{"model":"right","x":"a\n{text}\n"}}"#),
            format!(r#"{{"model":"right{text}"}}"#),
            format!(r#"{{"mod{text}el":"right"}}"#),
        ]);
    }
    for body in &cases {
        for request in [
            Request::post("/v1/chat/completions", body).header("x-large", &"x".repeat(9 * 1024)),
            Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(7)),
            typed("/v1/chat/completions?model=right", "text/plain", body),
            Request::post("/v1/rerank", body),
            Request::new("DELETE", "/v1/responses/x").body(body),
        ] {
            assert_openai_error(&fork.assert_refused(&request, 400, body).await, 400, "invalid_json");
        }
    }
    assert_eq!(fork.right.count(), 0, "nothing of it is sent");
    // White space between tokens may be line ends, and escaped ones may stand anywhere.
    for body in [
        "{\r\n\t\"model\" :\r\n\"right\",\"prompt\":\"\\r\\n\\t\\u0000\\u001f\"\r\n}\r\n",
        r#"{"model":"right","x":""}"#,
    ] {
        fork.assert_served(&Request::post("/v1/chat/completions", body), body, body).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_raw_control_character_that_comes_late_ends_the_backends_request() {
    let fork = Fork::start().await;
    let text = "text ".repeat(MIB / 5);
    for (what, end) in [
        ("in a string", "\r\nPOST /lora-adapters HTTP/1.1\r\n\r\n\"}"),
        ("in a key", "\",\"a\nb\":1}"),
        ("in the last byte of a string", "\n\"}"),
    ] {
        let body = format!(r#"{{"model":"right","prompt":"{text}{end}"#);
        let before = fork.right.count();
        for request in [
            Request::post("/v1/chat/completions", &body),
            Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(50_000)),
        ] {
            fork.assert_refused(&request, 400, what).await;
        }
        for index in before..fork.right.count() {
            fork.right.hung_up(index).await;
        }
    }
    // The client was at fault: the backend's record is clean.
    assert_eq!(fork.app.ask(&Request::chat("right")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_options_with_a_body_stays_here() {
    let fork = Fork::start().await;
    let hidden = "GET /v1/responses/secret HTTP/1.1\r\nHost: x\r\n\r\n";
    for target in ["/v1/chat/completions?model=right", "/v1/realtime?model=right", "/tokenize?mod%65l=right"] {
        for request in [
            Request::new("OPTIONS", target).body(hidden),
            Request::new("OPTIONS", target).chunks([hidden.as_bytes()]),
            Request::new("OPTIONS", target).header("content-type", "application/json").body(r#"{"model":"right"}"#),
            Request::new("OPTIONS", target).header("transfer-encoding", "chunked").raw_body("0\r\n\r\n"),
        ] {
            let answer = fork.app.ask(&request).await;
            assert_eq!(answer.status, 204, "{target}: {}", answer.text());
        }
    }
    assert_eq!(fork.right.count() + fork.wrong.count(), 0);
    // Without one it is the backend's, as it was.
    let answer = fork.app.ask(&Request::new("OPTIONS", "/v1/chat/completions?model=right")).await;
    assert_eq!((answer.status, fork.right.count()), (200, 1));
}

// === the query ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_query_names_one_model_however_its_key_is_written() {
    let fork = Fork::start().await;
    for query in
        ["mod%65l=right", "%4D%6f%64%65%6c=r%69ght", "Model=right", "model=right&x&MODEL=right", "x=1&mode%6C=right"]
    {
        fork.assert_served(&Request::get(&format!("/v1/realtime?{query}")), "", query).await;
        fork.assert_served(&typed(&format!("/v1/audio/x?{query}"), "audio/wav", b"RIFF"), b"RIFF", query).await;
    }
    for query in [
        "model=right&model=wrong",
        "model=wrong&model=right",
        "model=right&mod%65l=wrong",
        "mod%65l=wrong&model=right",
        "model=right&Model=wrong",
        "model=right&model=right&mODEL=wrong",
        "model=right&model=",
        "model&model=right",
        "model=right&model=right+",
        "model=right&model=%ff",
    ] {
        for request in [
            Request::get(&format!("/v1/realtime?{query}")),
            Request::post(&format!("/v1/chat/completions?{query}"), "{}"),
            Request::post(&format!("/v1/chat/completions?{query}"), r#"{"model":"right"}"#),
            typed(&format!("/v1/audio/transcriptions?{query}"), "application/octet-stream", b"RIFF"),
            Request::new("OPTIONS", &format!("/v1/chat/completions?{query}")),
        ] {
            assert_openai_error(&fork.assert_refused(&request, 400, query).await, 400, "invalid_request");
        }
    }
    assert_eq!(fork.right.count(), 10);
}

// === bodies that are not read ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_raw_bytes_pass_where_servers_take_them() {
    let fork = Fork::start().await;
    let json_says_otherwise = br#"{"model":"wrong"}"#;
    let offer = b"v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\n";
    for path in [
        "/v1/realtime/calls",
        "/v1/realtime",
        "/v1/audio/transcriptions",
        "/v1/images/edits",
        "/v1/videos",
        "/invocations",
    ] {
        let target = format!("{path}?model=right");
        for kind in
            ["application/sdp", "application/octet-stream", "audio/wav", "video/mp4", "image/png", "text/plain", "x"]
        {
            for body in [&offer[..], b"\x00\xff{", b"\"", json_says_otherwise] {
                fork.assert_served(&typed(&target, kind, body), body, &format!("{kind} to {path}")).await;
            }
        }
        for coding in ["br", "zstd", "deflate"] {
            let request = typed(&target, "audio/wav", b"\x28\xb5").header("content-encoding", coding);
            fork.assert_served(&request, b"\x28\xb5", coding).await;
        }
        // JSON and forms are read here as everywhere, whatever else their type says.
        for kind in [
            "application/json",
            "application/json; charset=utf-8",
            "application/vnd.x+JSON",
            "text/json",
            "application/json, audio/wav",
        ] {
            fork.assert_refused(&typed(&target, kind, offer), 400, kind).await;
            fork.assert_served(&typed(&target, kind, br#"{"prompt":"x"}"#), br#"{"prompt":"x"}"#, kind).await;
        }
        fork.assert_refused(&Request::new("POST", &target).body(offer), 400, "no type").await;
        fork.assert_refused(&typed(&target, FORM, offer), 400, "no form").await;
        let two = form(&[
            ("Content-Disposition: form-data; name=model", b"right"),
            ("Content-Disposition: form-data; name=model", b"wrong"),
        ]);
        fork.assert_refused(&typed(&target, FORM, &two), 400, "two models").await;
        // Without the model in the query there is nothing to route them by.
        fork.assert_refused(&typed(path, "application/sdp", offer), 400, "no model").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_everywhere_else_a_body_is_read_whatever_it_says_it_is() {
    let fork = Fork::start().await;
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/unheard/of",
        "/v1/audiobooks",
        "/v1/%61udio/speech",
        "/rerank",
        "/api/chat",
    ] {
        let target = format!("{path}?model=wrong");
        for kind in [
            "application/octet-stream",
            "audio/wav",
            "image/png",
            "text/plain",
            "application/sdp",
            "multipart/mixed; boundary=B",
        ] {
            // The body has the last word, because it is what servers obey.
            let body = br#"{"model":"right"}"#;
            fork.assert_served(&typed(&target, kind, body), body, &format!("{kind} to {path}")).await;
            fork.assert_refused(&typed(&target, kind, b"\x00RIFF"), 400, kind).await;
        }
        for coding in ["br", "zstd", "deflate", "compress", "zstd, gzip"] {
            for kind in ["application/json", "application/octet-stream"] {
                let request = typed(&target, kind, br#"{"model":"right"}"#).header("content-encoding", coding);
                let answer = fork.assert_refused(&request, 415, coding).await;
                assert!(answer.text().contains("gzip") && !answer.text().contains("?model="), "{}", answer.text());
            }
        }
    }
}

// === no name ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_null_empty_and_absent_are_one_where_the_model_may_be_left_out() {
    const NONE: [&str; 5] = [
        r#"{"query":"q"}"#,
        r#"{"model":null,"query":"q"}"#,
        r#"{"query":"q","model":""}"#,
        r#"{"Model":null,"model":"","query":"q"}"#,
        r#"{"mod\u0065l" : null }"#,
    ];
    let upstream = Upstream::start("right", &["right"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let paths = [
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/score",
        "/tokenize",
        "/detokenize",
        "/pooling",
        "/classify",
        "/v2/embed",
    ];
    for body in NONE {
        for path in paths {
            for request in [Request::post(path, body), Request::new("POST", path).chunks(body.as_bytes().chunks(3))] {
                let answer = app.ask(&request).await;
                assert_eq!(answer.status, 200, "{body} to {path}: {}", answer.text());
            }
        }
        for request in [
            Request::new("DELETE", "/v1/responses/x").body(body),
            Request::post("/v1/responses/x/cancel", body),
            Request::post("/v1/chat/completions?model=right", body),
        ] {
            assert_eq!(app.ask(&request).await.status, 200, "{body}");
        }
        // Where it may not, it may not.
        let answer = app.ask(&Request::post("/v1/chat/completions", body)).await;
        assert_openai_error(&answer, 400, "model_required");
    }
    let empty_field = form(&[("Content-Disposition: form-data; name=model", b"")]);
    let answer = app.ask(&upload(FORM, &empty_field)).await;
    assert_openai_error(&answer, 400, "model_required");
    assert_eq!(app.ask(&typed("/v1/audio/transcriptions?model=right", FORM, &empty_field)).await.status, 200);
    let served = upstream.count();
    for body in [
        r#"{"model":null,"model":"right"}"#,
        r#"{"model":"right","model":null}"#,
        r#"{"model":"right","Model":""}"#,
        r#"{"model":0}"#,
        r#"{"model":[]}"#,
        r#"{"model":false}"#,
    ] {
        assert_eq!(app.ask(&Request::post("/rerank", body)).await.status, 400, "{body}");
    }
    assert_eq!(upstream.count(), served);
    // With two backends nothing says which of them is meant.
    let fork = Fork::start().await;
    for body in NONE {
        let answer = fork.assert_refused(&Request::post("/rerank", body), 400, body).await;
        assert_openai_error(&answer, 400, "model_required");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_name_that_no_model_can_have_is_not_found() {
    let fork = Fork::start().await;
    for length in [1024, 1025, 1026, 1027, 5000] {
        let name = "m".repeat(length);
        let body = format!(r#"{{"model":"{name}"}}"#);
        let field = form(&[("Content-Disposition: form-data; name=model", name.as_bytes())]);
        for request in [
            Request::post("/v1/chat/completions", &body),
            Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(100)),
            Request::post("/rerank", &body),
            Request::get(&format!("/v1/realtime?model={name}")),
            upload(FORM, &field),
        ] {
            let answer = fork.assert_refused(&request, 404, "a long name").await;
            assert_openai_error(&answer, 404, "model_not_found");
            assert!(answer.text().len() < 2000, "{}", answer.text());
        }
        let anthropic = Request::post("/v1/messages", &body);
        assert_eq!(assert_anthropic_error(&fork.app.ask(&anthropic).await, 404), "not_found_error");
        let two = format!(r#"{{"model":"right","model":"{name}"}}"#);
        fork.assert_refused(&Request::post("/v1/chat/completions", &two), 400, "two models").await;
    }
}

// === forms and types ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_odd_forms_pass_if_no_server_reads_another_model() {
    let fork = Fork::start().await;
    let model = "Content-Disposition: form-data; name=\"model\"";
    for part in [
        "Content-Disposition: form-data; name=\"file\"; filename=\"say \"hi\".wav\"",
        "Content-Disposition: form-data; name=\"file\"; filename=\"5\"disk.img\"\r\nContent-Type: audio/wav",
        "Content-Disposition: form-data; name=\"file\"; filename=\"a\"; b.wav\"",
        "Content-Disposition: form-data; name=\"file\"; filename=\"C:\\dir\\\"",
        "Content-Disposition: form-data; name=\"file\"; filename=\"model\".wav\"",
        "Content-Disposition: form-data; name=\"the \\\"best\\\" field\"",
        "Content-Disposition: form-data; name=\"fi\\le\"",
        "Content-Disposition: form-data; name*=UTF-8''f%C3%A4",
        "Content-Disposition: attachment; name=\"file\"; filename=\"a.wav\"",
        "Content-Disposition: form-data",
        "Content-Type: text/plain; charset=utf-16",
    ] {
        for parts in [&[(part, &b"RIFF"[..]), (model, b"right")], &[(model, &b"right"[..]), (part, b"RIFF")]] {
            let body = form(parts);
            fork.assert_served(&upload(FORM, &body), &body, part).await;
        }
    }
    let body = form(&[(model, b"right")]);
    for charset in ["utf8", "UTF_8", "\"utf-8\"", "us-ascii", "iso-8859-1", "latin1", "windows-1252", "koi8-r"] {
        fork.assert_served(&upload(&format!("{FORM}; charset={charset}"), &body), &body, charset).await;
    }
    let body = form(&[("Content-Disposition: attachment; name=model", b"right")]);
    fork.assert_served(&upload(FORM, &body), &body, "attachment").await;
    for length in [71, 100, 200, 500, 1000] {
        let boundary = "b".repeat(length);
        let body = format!("--{boundary}\r\n{model}\r\n\r\nright\r\n--{boundary}--\r\n");
        let request = upload(&format!("multipart/form-data; boundary={boundary}"), body.as_bytes());
        fork.assert_served(&request, &body, "a long boundary").await;
        let mut client = fork.app.client().await;
        client.send_pieces(request.bytes().chunks(37), std::time::Duration::from_micros(200)).await;
        assert_eq!(client.answer().await.status, 200, "in pieces");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r05_odd_forms_are_refused_if_a_server_could_read_another_model() {
    let fork = Fork::start().await;
    let model = "Content-Disposition: form-data; name=\"model\"";
    for part in [
        "Content-Disposition: form-data; name=\"file\"; filename=\"a\"; name=\"model\".wav\"",
        "Content-Disposition: form-data; filename=\"C:\\\"; name=\"model\"",
        "Content-Disposition: form-data; name=\"file\"; filename=\"\\\"; name=\\\"model\"",
        "Content-Disposition: form-data; name=\"mo\\del\"",
        "Content-Disposition: form-data; name=\"model",
        "Content-Disposition: form-data; name=<model>",
        "Content-Disposition: form-data; name*=UTF-8''%6dodel",
        "Content-Disposition: form-data; name*=UTF-16LE''m%00o%00d%00e%00l%00",
        "Content-Disposition: form-data; name*0=mo; name*1=del",
        "Content-Disposition: form-data; name=\"file\"; name=\"model\"",
        "Content-Disposition: attachment; name=\"model\"",
    ] {
        for parts in [&[(part, &b"wrong"[..]), (model, b"right")], &[(model, &b"right"[..]), (part, b"wrong")]] {
            fork.assert_refused(&upload(FORM, &form(parts)), 400, part).await;
        }
    }
    let body = form(&[(model, b"right")]);
    for charset in ["utf-16", "utf-16le", "utf-32", "utf-7", "cp037", "unheard"] {
        fork.assert_refused(&upload(&format!("{FORM}; charset={charset}"), &body), 400, charset).await;
        let part = format!("Content-Type: text/plain; charset={charset}\r\n{model}");
        fork.assert_refused(&upload(FORM, &form(&[(&part, b"right")])), 400, charset).await;
    }
    let body = form(&[(model, "caf\u{e9}".as_bytes())]);
    fork.assert_refused(&upload(&format!("{FORM}; charset=latin1"), &body), 400, "a name that is not ASCII").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_two_content_types_pass_if_they_mean_the_same() {
    let fork = Fork::start().await;
    let json = r#"{"model":"right"}"#;
    let two = |target: &str, kinds: [&str; 2], body: &[u8]| {
        Request::new("POST", target).header("content-type", kinds[0]).header("content-type", kinds[1]).body(body)
    };
    for kinds in [
        ["application/json", "application/json"],
        ["application/json", "application/json; charset=utf-8"],
        ["Application/JSON", "application/json"],
        ["application/json", "text/plain"],
        ["application/x-www-form-urlencoded", "application/json"],
    ] {
        fork.assert_served(&two("/v1/chat/completions", kinds, json.as_bytes()), json, kinds[1]).await;
    }
    let model = "Content-Disposition: form-data; name=\"model\"";
    let body = form(&[(model, b"right")]);
    let charset = format!("{FORM}; charset=utf-8");
    let quoted = "Multipart/Form-Data; boundary=\"xYzZY\"";
    for kinds in [[FORM, FORM], [FORM, quoted], [&charset, FORM]] {
        fork.assert_served(&two("/v1/audio/transcriptions", kinds, &body), &body, kinds[1]).await;
    }
    let raw = ["audio/wav", "application/octet-stream"];
    fork.assert_served(&two("/v1/audio/transcriptions?model=right", raw, b"RIFF"), b"RIFF", "raw").await;

    for kinds in [
        [FORM, "multipart/form-data; boundary=other"],
        [FORM, "application/json"],
        ["application/json", FORM],
        [FORM, "multipart/form-data"],
        ["text/plain", FORM],
    ] {
        for body in [json.as_bytes(), &body] {
            fork.assert_refused(&two("/v1/audio/transcriptions", kinds, body), 400, kinds[1]).await;
        }
    }
    for kinds in [["audio/wav", "application/json"], ["application/json", "audio/wav"], ["audio/wav", FORM]] {
        fork.assert_refused(&two("/v1/audio/transcriptions?model=right", kinds, json.as_bytes()), 400, kinds[1]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_pairs_are_read_where_servers_take_forms() {
    const PAIRS: &str = "application/x-www-form-urlencoded";
    let fork = Fork::start().await;
    for path in ["/v1/audio/transcriptions", "/v1/images/edits", "/v1/videos", "/v1/realtime/calls", "/invocations"] {
        for (query, body) in [
            ("?model=right", "x=1"),
            ("?model=right", "model=right&x=1"),
            ("?model=right", "model="),
            ("?model=wrong", "model=right"),
            ("", "x=1&mod%65l=right"),
            ("", "MODEL=right"),
            ("", r#"{"model":"right"}"#),
            ("?model=wrong", r#" {"x":1,"model":"right"}"#),
        ] {
            let what = format!("{path}{query} {body}");
            fork.assert_served(&typed(&format!("{path}{query}"), PAIRS, body), body, &what).await;
        }
        for (query, body) in [
            ("?model=right", "model=right&model=wrong"),
            ("?model=right", "model=right;model=wrong"),
            ("?model=right", "x=1;model=wrong"),
            ("", r#"{"model":"right","x":"&model=wrong&"}"#),
            ("", r#"{"model":"right","x":"&mod%65l=wrong"}"#),
            ("", "x=1"),
        ] {
            let what = format!("{path}{query} {body}");
            fork.assert_refused(&typed(&format!("{path}{query}"), PAIRS, body), 400, &what).await;
        }
        // What says that it may name a model, and cannot be read.
        let target = format!("{path}?model=right");
        for kind in ["application/json", "application/x-ndjson+json", PAIRS, FORM] {
            for coding in ["br", "zstd", "deflate", "gzip, br"] {
                let request = typed(&target, kind, "opaque").header("content-encoding", coding);
                fork.assert_refused(&request, 415, &format!("{target} {kind} {coding}")).await;
            }
        }
        let request = Request::new("POST", &target).header("content-encoding", "br").body("opaque");
        fork.assert_refused(&request, 415, &format!("{target} without a type")).await;
        let request = typed(&target, "audio/wav", "opaque").header("content-encoding", "br");
        fork.assert_served(&request, "opaque", &format!("{target} audio")).await;
        // Two types.
        let request = typed(&target, "audio/wav", "model=wrong").header("content-type", PAIRS);
        fork.assert_refused(&request, 400, &format!("{target} two types")).await;
    }
}
