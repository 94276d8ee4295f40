use std::{future::pending, str, task::Poll};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1 as client};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::{
    body::{DemoBody, Event, EventStream},
    call::{self, Call},
    control::MAX_TOKENS,
    dispatch::{MAX_BODY_BYTES, STORED_MAX},
    infer::{self, Circumstances, Content, Task},
    load::{Finished, Flight, Load},
    *,
};

/// Nothing here takes long; a test that does not get there in this time has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running backend, and how to end it.
struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    ended: JoinHandle<io::Result<()>>,
}

/// A whole answer.
struct Seen {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

fn options() -> DemoOptions {
    let name = Some("alpha".into());
    DemoOptions { bind: Ipv4Addr::LOCALHOST.into(), port: 0, name, token_gap: Duration::ZERO, ..Default::default() }
}

fn with_control() -> DemoOptions {
    DemoOptions { control: true, ..options() }
}

async fn start(options: DemoOptions) -> Running {
    let backend = DemoBackend::bind(options).await.unwrap();
    let (address, shutdown) = (backend.local_addr(), CancellationToken::new());
    let ended = tokio::spawn(backend.run(shutdown.clone().cancelled_owned()));
    Running { address, shutdown, ended }
}

impl Running {
    /// Sends a request on a connection of its own.
    async fn open(&self, method: &str, path: &str, body: &str) -> hyper::Result<Response<Incoming>> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        let request = Request::builder().method(method).uri(path).header("host", "demo").body(body).unwrap();
        timeout(PATIENCE, sender.send_request(request)).await.unwrap()
    }

    async fn send(&self, method: &str, path: &str, body: &str) -> Seen {
        let (head, body) = self.open(method, path, body).await.unwrap().into_parts();
        let body = timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes();
        Seen { status: head.status.as_u16(), headers: head.headers, body }
    }

    async fn get(&self, path: &str) -> Seen {
        self.send("GET", path, "").await
    }

    async fn post(&self, path: &str, body: Value) -> Seen {
        self.send("POST", path, &body.to_string()).await
    }

    /// The chunks of a stream.
    async fn events(&self, path: &str, body: Value) -> Vec<String> {
        let mut response = self.open("POST", path, &body.to_string()).await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        let mut chunks = Vec::new();
        while let Some(chunk) = next_chunk(response.body_mut()).await {
            chunks.push(chunk.unwrap());
        }
        chunks
    }

    /// Asks for the metrics until they hold this line.
    async fn expect_metric(&self, line: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let page = self.get("/metrics").await.text();
            if page.lines().any(|found| found == line) {
                return;
            }
            assert!(Instant::now() < deadline, "no `{line}` in\n{page}");
        }
    }

    async fn ended(self) {
        timeout(PATIENCE, self.ended).await.unwrap().unwrap().unwrap();
    }
}

impl Seen {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn text(&self) -> String {
        str::from_utf8(&self.body).unwrap().into()
    }
}

async fn next_chunk(body: &mut Incoming) -> Option<hyper::Result<String>> {
    let frame = timeout(PATIENCE, body.frame()).await.unwrap()?;
    Some(frame.map(|frame| str::from_utf8(frame.data_ref().unwrap()).unwrap().to_owned()))
}

/// The data of an event, which must be one whole event.
fn data(event: &str) -> Value {
    assert!(event.ends_with("\n\n") && event.matches("\n\n").count() == 1, "not one event: {event:?}");
    let data = event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    serde_json::from_str(data).unwrap()
}

fn chat() -> Value {
    json!({"model": "demo", "messages": [{"role": "user", "content": "hello  \"world\""}]})
}

fn with(mut value: Value, more: Value) -> Value {
    value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    value
}

// === probes ===

#[tokio::test]
async fn announces_its_models_as_vllm_does() {
    let demo = start(DemoOptions { models: vec!["demo".into(), "org/other".into()], ..options() }).await;
    let list = demo.get("/v1/models").await.json();
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["demo", "org/other"]);
    let first = list["data"][0].as_object().unwrap();
    for key in ["object", "created", "owned_by", "root", "parent", "max_model_len", "permission"] {
        assert!(first.contains_key(key), "{key}");
    }
    let health = demo.get("/health").await;
    assert_eq!((health.status, health.body.len()), (200, 0));
    assert_eq!(demo.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn refuses_as_vllm_does() {
    let demo = start(options()).await;
    let message = json!({"model": "nope", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}).to_string();
    let table = [
        ("POST", "/v1/chat/completions", r#"{"model":"nope","messages":[]}"#, 404, "/error/type", "NotFoundError"),
        ("POST", "/v1/messages", &message, 404, "/type", "error"),
        ("POST", "/v1/chat/completions", r#"{"model": "x", "messages": ["#, 400, "/error/param", "body.28"),
        ("POST", "/v1/chat/completions", r#"{"model":5,"messages":[]}"#, 400, "/error/param", "model"),
        ("POST", "/v1/chat/completions", r#"{"model":"demo"}"#, 400, "/error/param", "messages"),
        ("POST", "/v1/completions", r#"{"model":"demo"}"#, 400, "/error/param", "prompt"),
        ("POST", "/v1/embeddings", "[]", 400, "/error/type", "Bad Request"),
        ("POST", "/v1/rerank", r#"{"query":"x"}"#, 400, "/error/param", "documents"),
        ("POST", "/detokenize", "{}", 400, "/error/param", "tokens"),
        ("GET", "/v1/chat/completions", "", 405, "/detail", "Method Not Allowed"),
        ("POST", "/v1/models", "{}", 405, "/detail", "Method Not Allowed"),
        ("GET", "/props", "", 404, "/detail", "Not Found"),
        ("GET", "/_ctl", "", 404, "/detail", "Not Found"),
        ("GET", "/_stats", "", 404, "/detail", "Not Found"),
    ];
    for (method, path, body, status, pointer, expected) in table {
        let seen = demo.send(method, path, body).await;
        assert_eq!(seen.status, status, "{method} {path} {body}");
        assert_eq!(seen.json().pointer(pointer).unwrap(), expected, "{method} {path} {body}");
    }
}

#[tokio::test]
async fn refuses_a_body_that_is_too_large_before_it_is_sent() {
    let demo = start(options()).await;
    let mut stream = TcpStream::connect(demo.address).await.unwrap();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: demo\r\ncontent-length: {}\r\n\r\n", MAX_BODY_BYTES + 1);
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 413 "), "{}", answer.escape_ascii());
}

// === answers ===

#[tokio::test]
async fn answers_chat_whole() {
    let demo = start(options()).await;
    let seen = demo.post("/v1/chat/completions", chat()).await;
    assert_eq!((seen.status, &seen.headers["x-demo-backend"]), (200, &HeaderValue::from_static("alpha")));
    let answer = seen.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with("Hello from alpha: you said \"hello \"world\"\". This backend"), "{text}");
    assert_eq!(text.split(' ').count(), 16);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let total = &answer["usage"]["prompt_tokens"].as_u64().unwrap() + 16;
    assert_eq!(answer["usage"]["total_tokens"], total);
    let again = demo.post("/v1/chat/completions", chat()).await.json();
    assert_eq!(again["choices"], answer["choices"], "the same request gets the same words");

    let short = demo.post("/v1/chat/completions", with(chat(), json!({"max_tokens": 2}))).await.json();
    assert_eq!(short["choices"][0]["message"]["content"], "Hello from");
    assert_eq!(
        (&short["choices"][0]["finish_reason"], &short["usage"]["completion_tokens"]),
        (&json!("length"), &json!(2))
    );
}

#[tokio::test]
async fn streams_the_same_words_one_event_at_a_time() {
    for gap in [Duration::ZERO, Duration::from_millis(1)] {
        let demo = start(DemoOptions { token_gap: gap, ..options() }).await;
        for (path, request, pointer, marks) in [
            ("/v1/chat/completions", chat(), "/choices/0/delta/content", 1),
            ("/v1/completions", json!({"prompt": "hello"}), "/choices/0/text", 0),
        ] {
            let whole = demo.post(path, request.clone()).await.json();
            let mut events = demo.events(path, with(request.clone(), json!({"stream": true}))).await;
            assert_eq!(events.pop().unwrap(), "data: [DONE]\n\n");
            assert_eq!(events.len(), marks + 16, "one event per token");
            let words: String =
                events.iter().map(|event| data(event).pointer(pointer).unwrap().as_str().unwrap().to_owned()).collect();
            let expected = whole.pointer("/choices/0/message/content").or(whole.pointer("/choices/0/text")).unwrap();
            assert_eq!(&words, expected);
            let reasons: Vec<Value> =
                events.iter().map(|event| data(event)["choices"][0]["finish_reason"].clone()).collect();
            assert!(reasons[..reasons.len() - 1].iter().all(Value::is_null));
            assert_eq!(reasons.last().unwrap(), "stop");

            let asked = json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 3});
            let events = demo.events(path, with(request, asked)).await;
            assert_eq!(events.len(), marks + 3 + 2);
            let usage = data(&events[events.len() - 2]);
            assert_eq!(usage["choices"], json!([]));
            assert_eq!(usage["usage"]["completion_tokens"], 3);
            assert_eq!(usage["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
        }
    }
}

#[tokio::test]
async fn streams_messages_in_anthropics_order() {
    let demo = start(options()).await;
    let request = json!({"model": "demo", "max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]});
    let whole = demo.post("/v1/messages", request.clone()).await.json();
    assert_eq!((&whole["stop_reason"], &whole["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(3)));
    let events = demo.events("/v1/messages", with(request.clone(), json!({"stream": true}))).await;
    let names: Vec<String> = events
        .iter()
        .map(|event| {
            let name = event.lines().next().unwrap().strip_prefix("event: ").unwrap().to_owned();
            assert_eq!(data(event)["type"], name);
            name
        })
        .collect();
    let (delta, stop) = ("content_block_delta", "content_block_stop");
    let expected = ["message_start", "content_block_start", delta, delta, delta, stop, "message_delta", "message_stop"];
    assert_eq!(names, expected);
    let words: String =
        events[2..5].iter().map(|event| data(event)["delta"]["text"].as_str().unwrap().to_owned()).collect();
    assert_eq!(whole["content"][0]["text"], words);
    assert_eq!(data(&events[0])["message"]["usage"]["input_tokens"], whole["usage"]["input_tokens"]);
    assert_eq!(data(&events[6])["usage"]["output_tokens"], 3);
    let count = demo.post("/v1/messages/count_tokens", request).await.json();
    assert_eq!(count["input_tokens"], whole["usage"]["input_tokens"]);
}

#[tokio::test]
async fn streams_a_response_with_numbered_events() {
    let demo = start(options()).await;
    let request = json!({"model": "demo", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "max_output_tokens": 2});
    let whole = demo.post("/v1/responses", request.clone()).await.json();
    assert_eq!(whole["output"][0]["content"][0]["text"], "Hello from");
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    let events = demo.events("/v1/responses", with(request, json!({"stream": true}))).await;
    let events: Vec<Value> = events.iter().map(|event| data(event)).collect();
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..10).collect::<Vec<u64>>());
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert!(events.iter().map(|event| &event["type"]).eq(expected.iter()), "{events:?}");
    assert_eq!(events[6]["text"], "Hello from");
    assert_eq!(events[9]["response"]["usage"], whole["usage"]);
    assert_eq!(events[9]["response"]["status"], "incomplete");
}

#[tokio::test]
async fn remembers_the_latest_responses() {
    let demo = start(options()).await;
    let request = json!({"model": "demo", "input": "hi"});
    let whole = demo.post("/v1/responses", request.clone()).await.json();
    let path = |response: &Value| format!("/v1/responses/{}", response["id"].as_str().unwrap());
    assert_eq!(demo.get(&path(&whole)).await.json(), whole);
    let events = demo.events("/v1/responses", with(request.clone(), json!({"stream": true}))).await;
    let completed = &data(events.last().unwrap())["response"];
    assert_eq!(demo.get(&path(completed)).await.json(), *completed);

    let unstored = demo.post("/v1/responses", with(request.clone(), json!({"store": false}))).await.json();
    assert_eq!(demo.get(&path(&unstored)).await.status, 404);
    for _ in 0..STORED_MAX {
        demo.post("/v1/responses", request.clone()).await;
    }
    let forgotten = demo.get(&path(&whole)).await;
    assert_eq!((forgotten.status, &forgotten.json()["error"]["param"]), (404, &json!("response_id")));
}

#[tokio::test]
async fn calls_the_first_tool_and_then_answers() {
    let demo = start(options()).await;
    let tools = json!({"tools": [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]});
    let asked = with(chat(), tools);
    let answer = demo.post("/v1/chat/completions", asked.clone()).await.json();
    let call = &answer["choices"][0]["message"]["tool_calls"][0];
    assert_eq!((&call["function"]["name"], &call["function"]["arguments"]), (&json!("look_up"), &json!("{}")));
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");

    let events = demo.events("/v1/chat/completions", with(asked.clone(), json!({"stream": true}))).await;
    let call = &data(&events[1])["choices"][0]["delta"]["tool_calls"][0];
    assert_eq!((&call["index"], &call["function"]["name"]), (&json!(0), &json!("look_up")));
    assert_eq!(data(&events[2])["choices"][0]["finish_reason"], "tool_calls");

    let mut told = asked.clone();
    told["messages"].as_array_mut().unwrap().push(json!({"role": "tool", "tool_call_id": "x", "content": "42"}));
    for request in [told, with(asked, json!({"tool_choice": "none"}))] {
        let answer = demo.post("/v1/chat/completions", request).await.json();
        assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().starts_with("Hello from alpha"));
    }

    let tools = json!([{"name": "look_up", "input_schema": {}}]);
    let mut request = json!({"model": "demo", "tools": tools, "messages": [{"role": "user", "content": "hi"}]});
    let answer = demo.post("/v1/messages", request.clone()).await.json();
    assert_eq!((&answer["content"][0]["type"], &answer["stop_reason"]), (&json!("tool_use"), &json!("tool_use")));
    let events = demo.events("/v1/messages", with(request.clone(), json!({"stream": true}))).await;
    assert_eq!(data(&events[1])["content_block"]["name"], "look_up");
    assert_eq!(data(&events[2])["delta"], json!({"type": "input_json_delta", "partial_json": "{}"}));
    let result = json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "42"}]});
    request["messages"].as_array_mut().unwrap().push(result);
    assert_eq!(demo.post("/v1/messages", request).await.json()["stop_reason"], "end_turn");
}

#[tokio::test]
async fn answers_the_other_tasks() {
    let demo = start(options()).await;
    let floats = demo.post("/v1/embeddings", json!({"model": "demo", "input": ["a", "b"]})).await.json();
    assert_eq!(floats["data"].as_array().unwrap().len(), 2);
    assert_eq!(floats["data"][1]["embedding"].as_array().unwrap().len(), 16);
    let packed = json!({"input": "a", "encoding_format": "base64", "dimensions": 3});
    let packed = demo.post("/v1/embeddings", packed).await.json();
    assert_eq!(packed["data"][0]["embedding"].as_str().unwrap().len(), 16, "3 floats are 12 bytes");

    let ask = json!({"query": "Red fox", "documents": ["a dog", {"text": "the red fox"}, "a red hat"], "top_n": 2});
    for path in ["/rerank", "/v1/rerank"] {
        let ranked = demo.post(path, ask.clone()).await.json();
        let order: Vec<u64> =
            ranked["results"].as_array().unwrap().iter().map(|one| one["index"].as_u64().unwrap()).collect();
        assert_eq!(order, [1, 2]);
        assert_eq!(ranked["results"][0]["relevance_score"], 1.0);
    }

    let tokens = demo.post("/tokenize", json!({"prompt": "hello"})).await.json();
    assert_eq!(tokens["count"], 2);
    let text = demo.post("/detokenize", json!({"tokens": tokens["tokens"]})).await.json();
    assert_eq!(text["prompt"], "hello");

    let form = |model: &str| {
        format!(
            "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\r\n--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--x--\r\n"
        )
    };
    let heard = demo.send("POST", "/v1/audio/transcriptions", &form("demo")).await;
    assert!(heard.json()["text"].as_str().unwrap().contains("heard by alpha"));
    assert_eq!(demo.send("POST", "/v1/audio/transcriptions", &form("nope")).await.status, 404);
}

#[tokio::test(start_paused = true)]
async fn a_stream_keeps_its_pace() {
    let load = Arc::<Load>::default();
    let mut flight = Flight::begin(&load);
    flight.admit(1);
    let tokens = (0..5).map(|_| Event::Token("x".into()));
    let events = Box::new([Event::Mark("head".into())].into_iter().chain(tokens).chain([Event::Mark("end".into())]));
    let gap = Duration::from_millis(20);
    let mut body = DemoBody::Events(EventStream::new(events, gap, flight, Finished::Stop));
    let start = Instant::now();
    let mut at = Vec::new();
    while body.frame().await.is_some() {
        at.push(start.elapsed().as_millis());
    }
    assert_eq!(at, [0, 0, 20, 40, 60, 80, 80], "the head and the first token at once, the end with the last token");
    assert_eq!(load.in_flight(), 1, "in flight until the body is dropped");
    drop(body);
    assert_eq!(load.in_flight(), 0);
}

#[tokio::test]
async fn every_event_is_a_write_of_its_own() {
    let load = Arc::<Load>::default();
    let events = Box::new((0..3).map(|_| Event::Token("x".into())));
    let mut body = DemoBody::Events(EventStream::new(events, Duration::ZERO, Flight::begin(&load), Finished::Stop));
    // hyper writes what it has when a body is pending, so this one must be that between any two events.
    for at in 0..3 {
        if at > 0 {
            assert!(futures::poll!(body.frame()).is_pending(), "before event {at}");
        }
        let Poll::Ready(Some(Ok(frame))) = futures::poll!(body.frame()) else {
            panic!("no event {at}");
        };
        assert_eq!(frame.into_data().unwrap(), "x");
    }
    assert!(matches!(futures::poll!(body.frame()), Poll::Ready(None)));
}

// === counting, control, shutdown ===

#[tokio::test]
async fn counts_what_runs_and_how_it_ended() {
    let demo = start(DemoOptions { tokens: 3, ..with_control() }).await;
    demo.post("/v1/chat/completions", chat()).await;
    demo.post("/v1/chat/completions", with(chat(), json!({"max_tokens": 1}))).await;
    demo.events("/v1/chat/completions", with(chat(), json!({"stream": true}))).await;
    demo.expect_metric("vllm:generation_tokens_total{engine=\"0\",model_name=\"demo\"} 7.0").await;
    demo.get("/_ctl?token_gap_ms=60000").await;
    let mut left =
        demo.open("POST", "/v1/chat/completions", &with(chat(), json!({"stream": true})).to_string()).await.unwrap();
    next_chunk(left.body_mut()).await.unwrap().unwrap();
    demo.expect_metric("vllm:num_requests_running{engine=\"0\",model_name=\"demo\"} 1.0").await;
    demo.expect_metric("vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"demo\"} 0.015625").await;
    assert_eq!(demo.get("/_stats").await.json()["in_flight"], 1);
    drop(left);
    demo.expect_metric("vllm:num_requests_running{engine=\"0\",model_name=\"demo\"} 0.0").await;
    for (reason, count) in [("stop", "2.0"), ("length", "1.0"), ("abort", "1.0")] {
        let labels = format!("engine=\"0\",finished_reason=\"{reason}\",model_name=\"demo\"");
        demo.expect_metric(&format!("vllm:request_success_total{{{labels}}} {count}")).await;
    }
    let stats = demo.get("/_stats").await.json();
    assert_eq!(
        (&stats["requests"], &stats["in_flight"]),
        (&json!(4), &json!(0)),
        "probes and control requests do not count"
    );
}

#[tokio::test]
async fn notices_that_the_client_of_a_whole_answer_leaves() {
    let demo = start(DemoOptions { latency: Duration::from_secs(600), ..with_control() }).await;
    let mut stream = TcpStream::connect(demo.address).await.unwrap();
    stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: demo\r\ncontent-length: 14\r\n\r\n{\"prompt\":\"x\"}")
        .await
        .unwrap();
    demo.expect_metric("vllm:num_requests_running{engine=\"0\",model_name=\"demo\"} 1.0").await;
    drop(stream);
    demo.expect_metric("vllm:num_requests_running{engine=\"0\",model_name=\"demo\"} 0.0").await;
}

#[tokio::test]
async fn remembers_the_last_request() {
    let demo = start(with_control()).await;
    assert_eq!(demo.get("/_stats").await.json()["last_request"], Value::Null);
    demo.send("POST", "/elsewhere%2F?q=1", "a").await;
    let last = demo.get("/_stats").await.json()["last_request"].clone();
    assert_eq!((&last["method"], &last["path"]), (&json!("POST"), &json!("/elsewhere%2F?q=1")));
    assert_eq!((&last["body_len"], &last["body_fnv1a64"]), (&json!(1), &json!("af63dc4c8601ec8c")));
    assert!(last["headers"].as_array().unwrap().contains(&json!(["host", "demo"])));

    // A body that never becomes complete must not look as if it had.
    let mut stream = TcpStream::connect(demo.address).await.unwrap();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: demo\r\ncontent-length: 9\r\n\r\n{").await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stats = demo.get("/_stats").await.json();
        if stats["requests"] == 2 {
            assert_eq!(stats["last_request"]["path"], "/v1/completions");
            assert_eq!(stats["last_request"].get("body_len"), None);
            break;
        }
        assert!(Instant::now() < deadline, "{stats}");
    }
}

#[tokio::test]
async fn control_changes_what_it_does() {
    let demo = start(with_control()).await;
    let set = demo.get("/_ctl?models=a,b%2Fc&health=503&tokens=2&error_status=429&close=1").await.json();
    assert_eq!(
        (&set["models"], &set["health"], &set["error_status"]),
        (&json!(["a", "b/c"]), &json!(503), &json!(429))
    );
    assert_eq!(demo.get("/_ctl").await.json(), set, "asking changes nothing");
    assert_eq!(demo.get("/health").await.status, 503);
    let refused = demo.post("/v1/chat/completions", chat()).await;
    assert_eq!((refused.status, &refused.headers["connection"]), (429, &HeaderValue::from_static("close")));
    assert_eq!(refused.json()["error"]["code"], 429);
    assert_eq!(demo.post("/v1/messages", chat()).await.json()["type"], "error");

    demo.get("/_ctl?models=&models_status=500&error_status=200").await;
    assert_eq!(demo.get("/v1/models").await.status, 500);
    demo.get("/_ctl?models_status=200").await;
    assert_eq!(demo.get("/v1/models").await.json()["data"], json!([]));
    assert_eq!(demo.post("/v1/chat/completions", json!({"messages": []})).await.status, 404, "no model at all");

    let bad = demo.get("/_ctl?tokens=9&health=no").await;
    assert_eq!(
        (bad.status, bad.json()["error"].as_str().unwrap()),
        (400, "health `no`: expected a status from 200 to 599")
    );
    assert!(demo.get("/_ctl?helth=200").await.text().contains("unknown key `helth`"));
    assert_eq!(demo.get("/_ctl").await.json()["tokens"], 2, "a refused query changes nothing");
}

#[tokio::test]
async fn a_hanging_endpoint_lets_go_at_shutdown() {
    for (hang, method, path) in
        [("health", "GET", "/health"), ("models", "GET", "/v1/models"), ("chat", "POST", "/v1/chat/completions")]
    {
        let demo = start(with_control()).await;
        demo.get(&format!("/_ctl?hang={hang}")).await;
        let mut stream = TcpStream::connect(demo.address).await.unwrap();
        stream
            .write_all(format!("{method} {path} HTTP/1.1\r\nhost: demo\r\ncontent-length: 0\r\n\r\n").as_bytes())
            .await
            .unwrap();
        // Two round trips later the hanging one has long been accepted; others are served meanwhile.
        assert_eq!(demo.get("/version").await.status, 200);
        demo.shutdown.cancel();
        let mut answer = Vec::new();
        // A reset is as good as an end: there was no answer.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
        assert_eq!(answer.escape_ascii().to_string(), "", "{hang}");
        demo.ended().await;
    }
}

#[tokio::test]
async fn shutdown_finishes_streams_and_takes_nothing_new() {
    let demo = start(DemoOptions { tokens: 5, token_gap: Duration::from_millis(50), ..options() }).await;
    let idle = TcpStream::connect(demo.address).await.unwrap();
    let mut response = demo.open("POST", "/v1/completions", r#"{"prompt":"x","stream":true}"#).await.unwrap();
    next_chunk(response.body_mut()).await.unwrap().unwrap();
    demo.shutdown.cancel();
    let mut last = String::new();
    while let Some(chunk) = next_chunk(response.body_mut()).await {
        last = chunk.unwrap();
    }
    assert_eq!(last, "data: [DONE]\n\n");
    let address = demo.address;
    demo.ended().await;
    assert_eq!(TcpStream::connect(address).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    drop(idle);
}

#[tokio::test]
async fn exit_cuts_streams_at_once() {
    let backend =
        DemoBackend::bind(DemoOptions { token_gap: Duration::from_secs(600), ..with_control() }).await.unwrap();
    let address = backend.local_addr();
    let ending = tokio::spawn(backend.run_to_end(pending()));
    let demo = Running { address, shutdown: CancellationToken::new(), ended: tokio::spawn(async { Ok(()) }) };
    let mut response = demo.open("POST", "/v1/completions", r#"{"prompt":"x","stream":true}"#).await.unwrap();
    next_chunk(response.body_mut()).await.unwrap().unwrap();
    let _unanswered = demo.open("GET", "/_ctl?exit=42", "").await;
    assert_eq!(timeout(PATIENCE, ending).await.unwrap().unwrap().unwrap(), Ending::Exit(42));
    assert!(next_chunk(response.body_mut()).await.unwrap().is_err(), "a cut stream must not look complete");
}

#[tokio::test]
async fn bind_says_what_is_wrong() {
    let name = Some("two\nlines".into());
    let error = DemoBackend::bind(DemoOptions { name, ..options() }).await.unwrap_err();
    assert_eq!(error.to_string(), r"name `two\nlines`: expected visible characters only");
    let first = start(options()).await;
    let error = DemoBackend::bind(DemoOptions { port: first.address.port(), ..options() }).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let any = start(DemoOptions { bind: Ipv6Addr::UNSPECIFIED.into(), ..options() }).await;
    let by_v4 = Running { address: (Ipv4Addr::LOCALHOST, any.address.port()).into(), ..any };
    assert_eq!(by_v4.get("/health").await.status, 200, "all addresses means IPv4 too");
}

// === parsing ===

#[test]
fn the_last_model_wins_whatever_its_spelling() {
    let models = ["a".to_owned(), "b".to_owned()];
    for (body, expected) in [
        (r#"{"model":"b"}"#, Ok("b")),
        (r#"{"model":"x","mo\u0064el":"b"}"#, Ok("b")),
        (r#"{"tools":[{"model":"b"}],"model":"a"}"#, Ok("a")),
        (r#"{"model":""}"#, Ok("a")),
        (r#"{"model":null}"#, Ok("a")),
        (r#"{"Model":"b"}"#, Ok("a")),
        (r#"{"model":" b"}"#, Err(404)),
        (r#"{"model":["b"]}"#, Err(400)),
    ] {
        let found = Call::parse(body.as_bytes()).unwrap().model(&models).map_err(|refusal| refusal.status.as_u16());
        assert_eq!(found.as_deref(), expected.as_ref().copied(), "{body}");
    }
}

proptest! {
    #[test]
    fn any_body_is_answered_or_refused(body in ".*", fields in prop::collection::vec(("model|messages|input|prompt|query|documents|tools|tokens|stream", "[\\[\\]{}\",:a-z0-9]{0,12}"), 0..4)) {
        let settings = settings();
        let object: Vec<String> = fields.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
        let object = format!("{{{}}}", object.join(","));
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/rerank", "/tokenize", "/detokenize", "/v1/audio/transcriptions"] {
            for body in [&body, &object] {
                let at = Circumstances { name: "alpha", settings: &settings, id: "1\"".into(), now: 0 };
                if let Ok(infer::Answer { content: Content::Whole(text), .. }) = Task::at(path).unwrap().answer(body.as_bytes(), at) {
                    prop_assert!(serde_json::from_str::<Value>(&text).is_ok(), "{} {} {}", path, body, text);
                }
            }
        }
    }

    #[test]
    fn any_control_query_is_applied_or_refused(query in "([a-z_]{0,14}(=[a-z0-9,%]{0,5})?&?){0,4}") {
        if let Ok((next, _)) = settings().apply(&query) {
            prop_assert!((1..=MAX_TOKENS).contains(&next.tokens));
        }
    }

    #[test]
    fn tokens_turn_back_into_their_text(text in "[^\0]*") {
        prop_assert_eq!(call::detokenize(&call::tokenize(&text)), text);
    }

    #[test]
    fn a_form_field_is_found_in_any_company(model in "[a-z/]{1,9}", before in "[^\"]*") {
        let field = |model| format!("\r\nname=\"model\"\r\n\r\n{model}\r\n--x");
        let body = format!("{before}{}{}", field("first"), field(&model));
        prop_assert_eq!(call::form_model(body.as_bytes()), Some(model.as_str()));
        prop_assert_eq!(call::form_model(before.as_bytes()), None);
    }
}

fn settings() -> Settings {
    Settings::new(vec!["demo".into()], Duration::ZERO, 4, Duration::ZERO)
}
