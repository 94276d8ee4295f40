//! O1, O4: what `/metrics` says is what has happened, and nothing that a client invents makes it grow.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::*;

/// An answer of `n` tokens as a stream, its usage told at the end.
fn stream_of(n: usize) -> Script {
    let mut chunks: Vec<String> =
        (0..n).map(|i| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"t{i}\"}}}}]}}\n\n")).collect();
    chunks.push(format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":{n}}}}}\n\ndata: [DONE]\n\n"
    ));
    sse_reply(&chunks.iter().map(String::as_str).collect::<Vec<_>>())
}

async fn page(app: &TestApp) -> String {
    app.ask(&Request::get("/metrics")).await.text()
}

/// The names and labels of all series.
fn series(page: &str) -> BTreeSet<String> {
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    samples.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

/// Requests by status, over all models.
fn by_status(page: &str) -> BTreeMap<u16, u64> {
    let mut counts = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("proxy_requests_total{")) {
        let (labels, count) = line.rsplit_once(' ').unwrap();
        let status = labels.split("status=\"").nth(1).unwrap().split('"').next().unwrap();
        *counts.entry(status.parse().unwrap()).or_default() += count.parse::<u64>().unwrap();
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o01_a_thousand_mixed_requests_are_counted_as_their_clients_count_them() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MAX_BODY", "64KiB")], &[&upstream]).await;
    let mut counts: BTreeMap<u16, u64> = BTreeMap::new();
    let mut client = app.client().await;
    for turn in 0..1000 {
        let status = match turn % 20 {
            // The backend's own.
            0 => {
                upstream.script(reply("400 Bad Request", "", "no"));
                client.ask(&Request::chat("m")).await.status
            }
            1 => {
                upstream.script(reply("404 Not Found", "", "no"));
                client.ask(&Request::messages("m")).await.status
            }
            2 => {
                upstream.script(reply("500 Internal Server Error", "", "no"));
                client.ask(&Request::chat("m")).await.status
            }
            3 => {
                upstream.script(reply("204 No Content", "", ""));
                client.ask(&Request::chat("m")).await.status
            }
            // The proxy's own.
            4 => client.ask(&Request::chat("unheard-of")).await.status,
            5 => client.ask(&Request::post("/v1/chat/completions", "{")).await.status,
            6 => client.ask(&Request::get("/nowhere")).await.status,
            7 => client.ask(&Request::post("/v1/models", "{}")).await.status,
            8 => client.ask(&Request::get("/v1/models")).await.status,
            9 => {
                let large = format!(r#"{{"model":"m","prompt":"{}"}}"#, " ".repeat(64 * 1024));
                app.ask(&Request::post("/v1/chat/completions", large)).await.status
            }
            10 => {
                let nonsense = app.client().await.try_ask(b"GET / HTTP/1.1\r\nhost : x\r\n\r\n").await.unwrap();
                nonsense.status
            }
            // The backend breaks, before and after the begin of its answer.
            11 => {
                upstream.script(vec![Step::ReadBody, Step::Send("nonsense\r\n\r\n".into())]);
                client.ask(&Request::chat("m")).await.status
            }
            12 => {
                let mut cut = sse_begin();
                cut.extend([Step::SendChunk("data: {}\n\n".into()), Step::Reset]);
                upstream.script(cut);
                app.ask(&Request::chat("m")).await.status
            }
            // The client leaves, before and after.
            13 | 14 if turn < 200 => {
                let gate = Gate::shut();
                let index = upstream.count();
                upstream.script(if turn % 20 == 13 {
                    held_reply(&gate)
                } else {
                    held_stream("data: 1\n\n", &gate, "")
                });
                let mut leaver = app.client().await;
                leaver.send(Request::chat("m").bytes()).await;
                let status = match turn % 20 {
                    13 => 499,
                    _ => leaver.head().await.word(1).parse().unwrap(),
                };
                upstream.whole(index).await;
                leaver.close();
                status
            }
            15 => {
                upstream.script(stream_of(5));
                client.ask(&Request::chat("m")).await.status
            }
            _ => client.ask(&Request::chat("m")).await.status,
        };
        *counts.entry(status).or_default() += 1;
    }
    assert!(
        [200, 204, 400, 404, 405, 413, 499, 500, 502].iter().all(|status| counts.contains_key(status)),
        "{counts:?}"
    );
    // Whoever has left is counted when the proxy notices.
    eventually(format!("/metrics says {counts:?}"), async || by_status(&page(&app).await) == counts).await;
    eventually("every request but what was none took its time", async || {
        app.metric("proxy_request_duration_seconds_count", &[]).await == Some(950.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o01_what_clients_invent_makes_no_series() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut client = app.client().await;
    for model in ["m", "unheard-of"] {
        client.ask(&Request::chat(model)).await;
    }
    client.ask(&Request::get("/nowhere")).await;
    client.ask(&Request::post("/v1/nowhere", r#"{"model":"m"}"#)).await;
    // A client may have its answer a moment before the request is counted.
    eventually("the request is counted", async || {
        let labels = [("model", "m"), ("operation", "other")];
        app.metric("proxy_request_body_bytes_count", &labels).await == Some(1.0)
    })
    .await;
    let before = series(&page(&app).await);
    for i in 0..200 {
        let name = format!("{:x}\\\"-{i}", fastrand::u64(..));
        assert_eq!(client.ask(&Request::chat(&name)).await.status, 404);
        assert_eq!(client.ask(&Request::get(&format!("/{i}"))).await.status, 404);
        assert_eq!(client.ask(&Request::post(&format!("/v1/x{i}"), r#"{"model":"m"}"#)).await.status, 200);
        assert_eq!(client.ask(&Request::new(&format!("BREW{i}"), "/nowhere")).await.status, 404);
    }
    let after = series(&page(&app).await);
    assert_eq!(after.difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o04_operations_of_one_model_are_told_apart() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let mut client = app.client().await;
    let operations = [
        ("chat", "/v1/chat/completions"),
        ("chat", "/api/chat"),
        ("text_completion", "/v1/completions"),
        ("embeddings", "/v1/embeddings"),
        ("messages", "/v1/messages"),
        ("responses", "/v1/responses"),
        ("rerank", "/rerank"),
        ("rerank", "/v2/rerank"),
        ("tokenize", "/tokenize"),
        ("score", "/v1/score"),
        ("other", "/v1/invented"),
        ("other", "/v1/invented/17"),
    ];
    let mut expected: BTreeMap<&str, f64> = BTreeMap::new();
    for (turn, (operation, path)) in operations.iter().cycle().take(50).enumerate() {
        if turn % 5 == 0 {
            upstream.script(stream_of(3));
        }
        let body = r#"{"model":"m","messages":[],"prompt":"x"}"#;
        assert_eq!(client.ask(&Request::post(path, body)).await.status, 200, "{path}");
        *expected.entry(operation).or_default() += 1.0;
    }
    for (operation, count) in expected {
        let labels = [("model", "m"), ("operation", operation)];
        let counted = [("model", "m"), ("status", "200"), ("operation", operation)];
        eventually(format!("{operation} is counted"), async || {
            app.metric("proxy_requests_total", &counted).await == Some(count)
        })
        .await;
        for histogram in ["proxy_request_duration_seconds_count", "proxy_request_body_bytes_count"] {
            assert_eq!(app.metric(histogram, &labels).await, Some(count), "{operation}: {histogram}");
        }
    }
    // The names of before, without the new label, are sums over it.
    assert_eq!(app.metric("proxy_requests_total", &[("model", "m"), ("status", "200")]).await, Some(50.0));
    assert_eq!(app.metric("proxy_request_duration_seconds_count", &[("model", "m")]).await, Some(50.0));
    assert_eq!(app.metric("proxy_tokens_total", &[("type", "output")]).await, Some(30.0));
    // The time per token has a bucket wherever engines are.
    let text = page(&app).await;
    let bounds: BTreeSet<&str> = text
        .lines()
        .filter(|line| line.starts_with("proxy_time_per_output_token_seconds_bucket"))
        .filter_map(|line| line.split("le=\"").nth(1)?.split('"').next())
        .collect();
    for bound in ["0.01", "0.0125", "0.015", "0.0175", "0.02", "0.0225", "0.025"] {
        assert!(bounds.contains(bound), "{bound} in {bounds:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o01_the_series_of_what_is_gone_are_gone() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m", "only-b"]).await);
    let app = TestApp::start_with_backends(&[("PROXY_MODEL_GRACE", "1s")], &[&a, &b]).await;
    for model in ["m", "only-b", "only-b"] {
        b.script(stream_of(3));
        assert_eq!(app.ask(&Request::chat(model)).await.status, 200);
    }
    let has = async |what: &str| series(&page(&app).await).iter().any(|one| one.contains(what));
    assert!(has("backend=\"b\"").await && has("model=\"only-b\"").await);
    app.ended("b").await;
    app.rotation_is(1, "b has gone").await;
    eventually("no series of b", async || !has("backend=\"b\"").await).await;
    eventually("no series of its model, once its grace is over", async || !has("model=\"only-b\"").await).await;
    assert!(has("backend=\"a\"").await && has("model=\"m\"").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o04_an_answer_tells_its_pace_its_sizes_and_what_the_proxy_added() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let request = Request::chat("m");
    let mut paced = sse_begin();
    for _ in 0..11 {
        paced.push(Step::SendChunk("data: {\"choices\":[{\"delta\":{\"content\":\"t\"}}]}\n\n".into()));
        paced.push(Step::Pause(std::time::Duration::from_millis(20)));
    }
    paced.push(Step::SendChunk("data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":11}}\n\n".into()));
    paced.push(Step::Send(LAST_CHUNK.into()));
    upstream.script(paced);
    // One connection, and so one worker: each keeps its own connections to the backend.
    let mut client = app.client().await;
    let answer = client.ask(&request).await;
    let model = [("model", "m")];
    let metric = async |name: &str| app.metric(name, &model).await;
    let counted = async |what: &str, times: f64| {
        eventually(format!("{times} in {what}"), async || metric(what).await == Some(times)).await;
    };
    counted("proxy_time_per_output_token_seconds_count", 1.0).await;
    let pace = metric("proxy_time_per_output_token_seconds_sum").await.unwrap();
    assert!((0.02..1.0).contains(&pace), "{pace} s per token");
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let (sent, got) = (request.bytes().len() as f64 - request.head_bytes().len() as f64, answer.bytes().len() as f64);
    assert_eq!(metric("proxy_request_body_bytes_sum").await, Some(sent));
    assert_eq!(metric("proxy_response_body_bytes_sum").await, Some(got));
    assert_eq!(app.metric("proxy_request_tokens_sum", &[("type", "output")]).await, Some(11.0));
    assert_eq!(app.metric("proxy_overhead_seconds_count", &[]).await, Some(1.0));
    // The backend took 220 ms over its answer; that is not the proxy's.
    let overhead = app.metric("proxy_overhead_seconds_sum", &[]).await.unwrap();
    assert!(overhead > 0.0 && overhead < 0.2, "{overhead} s");

    // Nor is what a client takes over its request.
    let bytes = request.bytes();
    let (head, body) = bytes.split_at(request.head_bytes().len());
    client.send_pieces([head, &body[..1], &body[1..]], std::time::Duration::from_millis(200)).await;
    assert_eq!(client.answer().await.status, 200);
    counted("proxy_request_body_bytes_count", 2.0).await;
    assert_eq!(app.metric("proxy_overhead_seconds_count", &[]).await, Some(2.0));
    let both = app.metric("proxy_overhead_seconds_sum", &[]).await.unwrap();
    assert!(both - overhead < 0.2, "{both} s");
    // An answer that is not streamed has no pace.
    assert_eq!(metric("proxy_time_per_output_token_seconds_count").await, Some(1.0));
    // Connections are kept by the worker that opened them: the second request may have come to another one.
    let connections =
        async |kind: &str| app.metric("proxy_upstream_connections_total", &[("kind", kind)]).await.unwrap();
    let (opened, reused) = (connections("opened").await, connections("reused").await);
    assert!(opened >= 1.0 && (opened + reused - 2.0).abs() < 0.1, "{opened} opened, {reused} reused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o04_who_leaves_is_counted_by_how_far_it_was() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 1)).await;
    let left = async |phase: &str| {
        eventually(format!("one has left: {phase}"), async || {
            app.metric("proxy_client_disconnects_total", &[("phase", phase)]).await == Some(1.0)
        })
        .await;
    };
    let request = Request::chat("m").bytes();

    let mut client = app.client().await;
    // Before the model is known, so that nothing of it reaches the backend.
    client.send(&request[..Request::chat("m").head_bytes().len() + 4]).await;
    client.close();
    left("upload").await;

    let gate = Gate::shut();
    upstream.script(held_reply(&gate));
    let mut served = app.client().await;
    served.send(&request).await;
    upstream.whole(0).await;
    let mut waits = app.client().await;
    waits.send(&request).await;
    eventually("it stands in line", async || app.metric("proxy_queue_depth", &[]).await == Some(1.0)).await;
    waits.close();
    left("queue").await;
    served.close();
    left("before_first_byte").await;

    upstream.script(held_stream("data: 1\n\n", &gate, ""));
    let mut client = app.client().await;
    client.send(&request).await;
    client.head().await;
    client.close();
    left("mid_answer").await;
    assert_eq!(app.metric("proxy_client_disconnects_total", &[]).await, Some(4.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o04_the_lives_of_containers_are_counted() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    b.refuse().await;
    let app = TestApp::with(&[&a]).await;
    app.announce(Spec::of(&b)).await;
    let state = async |name: &str| app.metric("proxy_backends", &[("state", name)]).await;
    eventually("one is ready, one is asked", async || {
        (state("ready").await, state("probing").await) == (Some(1.0), Some(1.0))
    })
    .await;
    eventually("a probe has failed", async || app.metric("proxy_probe_failures_total", &[]).await > Some(0.0)).await;
    assert_eq!(app.metric("proxy_discovery_connected", &[]).await, Some(1.0));
    assert!(app.metric("proxy_discovery_last_sync_timestamp_seconds", &[]).await > Some(1.7e9));
    assert!(app.metric("proxy_probe_duration_seconds_count", &[]).await >= Some(2.0));

    let gate = Gate::shut();
    a.script(held_reply(&gate));
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    a.whole(0).await;
    app.stopping("a").await;
    eventually("it drains", async || state("draining").await == Some(1.0)).await;
    assert_eq!(app.metric("proxy_drain_duration_seconds_count", &[]).await, Some(0.0));
    gate.open();
    assert_eq!(client.answer().await.status, 200);
    eventually("it has drained", async || app.metric("proxy_drain_duration_seconds_count", &[]).await == Some(1.0))
        .await;
    app.ended("a").await;
    eventually("it is gone", async || state("draining").await == Some(0.0)).await;
    for (name, times) in [("ready", 1.0), ("draining", 1.0), ("gone", 1.0), ("probing", 2.0)] {
        let entered = app.metric("proxy_backend_transitions_total", &[("state", name)]).await;
        assert_eq!(entered, Some(times), "{name}");
    }
}
