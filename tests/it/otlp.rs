//! O2, O3: traces and metrics over OTLP.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    metrics::v1::metric::Data,
    trace::v1::{Span, span::SpanKind},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::support::{
    collector::{Collector, text},
    *,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const GRPC: &str = "grpc";
const HTTP: &str = "http/protobuf";

const USAGE: &str = r#"{"id":"x","object":"chat.completion","model":"m","choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}"#;

/// A proxy that exports to this collector, often.
async fn exporting(collector: &Collector, protocol: &str, knobs: &[(&str, &str)], upstreams: &[&Upstream]) -> TestApp {
    let url = collector.url();
    let mut all = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "50"),
    ];
    all.extend_from_slice(knobs);
    TestApp::start_with_backends(&all, upstreams).await
}

fn traced(request: Request, flags: &str) -> Request {
    let parent = format!("00-{TRACE}-{CALLER}-{flags}");
    request.header("traceparent", &parent).header("tracestate", "vendor=1").header("baggage", "k=v")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn event_names(span: &Span) -> Vec<&str> {
    span.events.iter().map(|event| event.name.as_str()).collect()
}

fn keys(span: &Span) -> Vec<&str> {
    span.attributes.iter().map(|attribute| attribute.key.as_str()).collect()
}

#[track_caller]
fn has(span: &Span, facts: &[(&str, &str)]) {
    for (key, value) in facts {
        assert_eq!(
            text(&span.attributes, key).as_deref(),
            Some(*value),
            "{key} of {}: {:?}",
            span.name,
            span.attributes
        );
    }
}

async fn o02_one_request(protocol: &str, gzip: &str) {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply(USAGE));
    let knobs = [
        ("OTEL_EXPORTER_OTLP_COMPRESSION", gzip),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%20b"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab"),
    ];
    let app = exporting(&collector, protocol, &knobs, &[]).await;
    app.add(Spec::of(&upstream).image("vllm/vllm-openai:v1")).await;
    let request = traced(Request::chat("m"), "01").header("user-agent", "tester/1");
    assert_eq!(app.ask(&request).await.status, 200);

    let [server] = collector.spans_of(SpanKind::Server, 1).await.try_into().unwrap();
    let [client] = collector.spans_of(SpanKind::Client, 1).await.try_into().unwrap();
    assert_eq!((server.name.as_str(), client.name.as_str()), ("POST /v1/chat/completions", "chat m"));
    assert_eq!((hex(&server.trace_id), hex(&client.trace_id)), (TRACE.to_owned(), TRACE.to_owned()));
    assert_eq!((hex(&server.parent_span_id), &client.parent_span_id), (CALLER.to_owned(), &server.span_id));
    assert_eq!(server.trace_state, "vendor=1");
    assert!(server.start_time_unix_nano <= client.start_time_unix_nano);
    assert!(client.end_time_unix_nano <= server.end_time_unix_nano);

    let backend_url = format!("http://{}/v1", upstream.addr);
    let seed = [("model", "m"), ("backend_url", backend_url.as_str()), ("streaming", "false")];
    has(&server, &seed);
    has(&client, &seed);
    has(&server, &[("http.method", "POST"), ("http.status_code", "200")]);
    has(
        &server,
        &[
            ("http.request.method", "POST"),
            ("http.route", "/v1/chat/completions"),
            ("url.path", "/v1/chat/completions"),
            ("url.scheme", "http"),
            ("http.response.status_code", "200"),
            ("client.address", "127.0.0.1"),
            ("user_agent.original", "tester/1"),
            ("network.protocol.version", "1.1"),
        ],
    );
    let port = upstream.addr.port().to_string();
    has(
        &client,
        &[
            ("http.request.method", "POST"),
            ("http.response.status_code", "200"),
            ("server.address", "127.0.0.1"),
            ("server.port", &port),
            ("container.name", "b"),
            ("container.image.name", "vllm/vllm-openai:v1"),
        ],
    );
    // Trace viewers add up the tokens of all spans.
    has(&client, &[("gen_ai.usage.input_tokens", "7"), ("gen_ai.usage.output_tokens", "3")]);
    assert!(!server.attributes.iter().any(|attribute| attribute.key.starts_with("gen_ai.usage.")), "{server:?}");
    for span in [&server, &client] {
        has(
            span,
            &[
                ("gen_ai.operation.name", "chat"),
                ("gen_ai.provider.name", "openai"),
                ("gen_ai.request.model", "m"),
                ("gen_ai.response.finish_reasons", "stop"),
            ],
        );
        assert_eq!(text(&span.attributes, "error.type"), None);
    }
    assert!(event_names(&client).contains(&"first_byte"), "{client:?}");
    // Nothing is told beside that, such as where in the code or on which thread a span was begun.
    assert_eq!(
        keys(&server),
        [
            "http.request.method",
            "http.method",
            "http.route",
            "url.path",
            "url.scheme",
            "http.response.status_code",
            "http.status_code",
            "network.protocol.version",
            "client.address",
            "gen_ai.operation.name",
            "gen_ai.provider.name",
            "streaming",
            "http.response.body.size",
            "request.id",
            "user_agent.original",
            "server.address",
            "model",
            "gen_ai.request.model",
            "backend_url",
            "container.id",
            "container.name",
            "gen_ai.response.finish_reasons",
        ]
    );
    assert_eq!(
        keys(&client),
        [
            "http.request.method",
            "server.address",
            "server.port",
            "url.scheme",
            "network.protocol.version",
            "gen_ai.operation.name",
            "gen_ai.provider.name",
            "gen_ai.request.model",
            "model",
            "backend_url",
            "container.id",
            "container.name",
            "container.image.name",
            "http.response.status_code",
            "streaming",
            "gen_ai.response.time_to_first_chunk",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.output_tokens",
            "gen_ai.response.finish_reasons",
        ]
    );
    for span in [&server, &client] {
        assert!(span.events.iter().all(|event| event.attributes.is_empty()) && span.links.is_empty(), "{span:?}");
    }
    assert_eq!((server.flags, client.flags), (0x301, 0x101), "sampled; the caller is remote, the request is not");

    // The backend is a child of the attempt.
    let head = upstream.peek(0, |received| received.head.clone()).unwrap();
    assert_eq!(head.all("traceparent"), [format!("00-{TRACE}-{}-01", hex(&client.span_id))]);
    assert_eq!((head.all("tracestate"), head.all("baggage")), (vec!["vendor=1"], vec!["k=v"]));

    let resource = collector.resource();
    for fact in ["service.name=inference-proxy", "deployment.environment.name=lab"] {
        assert!(resource.iter().any(|given| given == fact), "{resource:?}");
    }
    let (_, headers) = collector.heads().remove(0);
    assert_eq!(headers["x-key"], "a b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_one_request_over_http() {
    o02_one_request(HTTP, "none").await;
    o02_one_request(HTTP, "gzip").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_one_request_over_grpc() {
    o02_one_request(GRPC, "none").await;
    o02_one_request(GRPC, "gzip").await;
}

/// Asks until one of two replicas has been asked. Returns how often.
async fn ask_until_reached(app: &TestApp, replica: &Upstream) -> usize {
    let mut asked = 0;
    while replica.count() == 0 {
        assert!(asked < 100, "nothing reaches one of two replicas");
        asked += 1;
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    asked
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_every_attempt_has_a_span() {
    let collector = Collector::start().await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    for upstream in [&a, &b] {
        // The first to be asked breaks off.
        upstream.always(json_reply("{}"));
    }
    let app = exporting(&collector, HTTP, &[("PROXY_RETRIES", "1")], &[&a, &b]).await;
    a.always(vec![Step::ReadBody, Step::Close]);
    let asked = ask_until_reached(&app, &a).await;
    let servers = collector.spans_of(SpanKind::Server, asked).await;
    assert_eq!(servers.len(), asked);
    let server = servers.iter().find(|span| event_names(span).contains(&"retry")).unwrap();
    assert_eq!(event_names(server), ["attempt.failed", "retry"]);
    has(server, &[("http.request.resend_count", "1"), ("http.response.status_code", "200")]);
    let clients = collector.spans_of(SpanKind::Client, asked + 1).await;
    let attempts: Vec<&Span> = clients.iter().filter(|span| span.parent_span_id == server.span_id).collect();
    let [failed, served] = attempts[..] else { panic!("{attempts:?}") };
    has(failed, &[("container.name", "a"), ("error.type", "connection_ended")]);
    has(served, &[("container.name", "b"), ("http.response.status_code", "200"), ("http.request.resend_count", "1")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_an_attempt_that_is_pushed_back_is_told() {
    let collector = Collector::start().await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    a.always(reply("429 Too Many Requests", "", "later"));
    b.always(json_reply("{}"));
    let app = exporting(&collector, HTTP, &[("PROXY_BALANCE", "round_robin")], &[&a, &b]).await;
    let asked = ask_until_reached(&app, &a).await;
    let servers = collector.spans_of(SpanKind::Server, asked).await;
    let server = servers.iter().find(|span| event_names(span).contains(&"retry")).unwrap();
    assert_eq!(event_names(server), ["attempt.failed", "retry"]);
    let clients = collector.spans_of(SpanKind::Client, asked + 1).await;
    let attempts: Vec<&Span> = clients.iter().filter(|span| span.parent_span_id == server.span_id).collect();
    let [refused, served] = attempts[..] else { panic!("{attempts:?}") };
    has(refused, &[("container.name", "a"), ("http.response.status_code", "429"), ("error.type", "429")]);
    has(served, &[("container.name", "b"), ("http.response.status_code", "200")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_waiting_is_told() {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    let gate = Gate::shut();
    upstream.always(held_reply(&gate));
    let app = exporting(&collector, HTTP, &[], &[]).await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 1)).await;
    let (mut first, mut second) = (app.client().await, app.client().await);
    first.send(Request::chat("m").bytes()).await;
    eventually("the only place is taken", async || upstream.count() == 1).await;
    second.send(Request::chat("m").bytes()).await;
    app.waiting_is("m", 1.0).await;
    gate.open();
    for client in [&mut first, &mut second] {
        assert_eq!(client.answer().await.status, 200);
    }
    let servers = collector.spans_of(SpanKind::Server, 2).await;
    let waited = servers.iter().find(|span| !span.events.is_empty()).unwrap();
    assert_eq!(event_names(waited), ["queue.enter", "queue.leave"]);
    assert_eq!(text(&waited.events[0].attributes, "queue.length").as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_misses_streams_and_broken_answers_are_told() {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    let app = exporting(&collector, HTTP, &[], &[&upstream]).await;

    assert_eq!(app.ask(&Request::chat("nobody")).await.status, 404);
    let server = collector.spans_of(SpanKind::Server, 1).await.remove(0);
    assert_eq!(event_names(&server), ["routing.miss"]);
    has(&server, &[("http.response.status_code", "404"), ("error.type", "404")]);
    assert_eq!(server.status.unwrap().code, 0, "a client's mistake is no error of the server");

    upstream.script(sse_reply(&["data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n", "data: [DONE]\n\n"]));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    let server = collector.spans_of(SpanKind::Server, 2).await.remove(1);
    has(&server, &[("streaming", "true"), ("http.response.status_code", "200")]);
    let client = collector.spans_of(SpanKind::Client, 1).await.remove(0);
    assert_eq!(event_names(&client), ["first_byte", "first_token"]);

    let mut broken = sse_begin();
    broken.extend([Step::SendChunk("data: 1\n\n".into()), Step::Reset]);
    upstream.script(broken);
    assert_ne!(app.ask(&Request::chat("m")).await.end, End::Whole);
    let server = collector.spans_of(SpanKind::Server, 3).await.remove(2);
    has(&server, &[("error.type", "backend_broke")]);
    assert_eq!(server.status.unwrap().code, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_changes_of_backends_are_told() {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    let app = exporting(&collector, HTTP, &[], &[&upstream]).await;
    app.stopping("b").await;
    eventually("it is told that the backend drains", async || {
        collector.spans().iter().any(|span| span.name == "backend.draining")
    })
    .await;
    let spans = collector.spans();
    let ready = spans.iter().find(|span| span.name == "backend.ready").unwrap();
    has(ready, &[("container.name", "b"), ("models", "m")]);
    assert_eq!(ready.parent_span_id, [0_u8; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_who_is_not_sampled_is_not_recorded_and_the_backend_knows() {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply("{}"));
    let app = exporting(&collector, HTTP, &[], &[&upstream]).await;
    app.ask(&traced(Request::chat("m"), "00")).await;
    let sent = |index| upstream.peek(index, |received| received.head.clone()).unwrap();
    let parent = sent(0).all("traceparent").join("|");
    assert!(parent.starts_with(&format!("00-{TRACE}-")) && parent.ends_with("-00"), "{parent}");
    assert_eq!(sent(0).all("tracestate"), ["vendor=1"]);
    // A caller that cannot be read begins nothing; what it says of its state goes with it.
    app.ask(&Request::chat("m").header("traceparent", "nonsense").header("tracestate", "vendor=1")).await;
    let server = collector.spans_of(SpanKind::Server, 1).await.remove(0);
    assert_eq!((server.parent_span_id.len(), server.trace_state.as_str()), (0, ""));
    assert_ne!(hex(&server.trace_id), TRACE);
    assert_eq!(sent(1).all("tracestate"), [""; 0]);
    assert!(sent(1).all("traceparent")[0].starts_with(&format!("00-{}-", hex(&server.trace_id))));
    assert_eq!(collector.spans_of(SpanKind::Server, 1).await.len(), 1);
}

/// Three proxies in one process, of which two export and one does not: each collector hears of its own proxy alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_proxies_of_one_process_stay_apart() {
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply("{}"));
    let (here, there) = (Collector::start().await, Collector::start().await);
    let apps = [
        exporting(&here, HTTP, &[], &[&upstream]).await,
        exporting(&there, HTTP, &[("OTEL_TRACES_SAMPLER", "parentbased_always_off")], &[&upstream]).await,
        TestApp::start_with_backends(&[], &[&upstream]).await,
    ];
    let id = |app: usize, n: usize| format!("{app}-{n}");
    for n in 0..20 {
        for (index, app) in apps.iter().enumerate() {
            let request = Request::chat("m").header("x-request-id", &id(index, n));
            // The second one records what its caller records, and nothing else.
            let request = if index == 1 && n % 2 == 0 { traced(request, "01") } else { request };
            assert_eq!(app.ask(&request).await.status, 200);
        }
    }
    for (collector, expected) in [(&here, 20), (&there, 10)] {
        collector.spans_of(SpanKind::Server, expected).await;
        collector.spans_of(SpanKind::Client, expected).await;
    }
    for app in apps {
        app.shutdown().await;
    }
    for (index, collector, step) in [(0, &here, 1), (1, &there, 2)] {
        let spans = collector.spans();
        let of = |kind: SpanKind| spans.iter().filter(move |span| span.kind == kind as i32);
        let mut ids: Vec<String> =
            of(SpanKind::Server).map(|span| text(&span.attributes, "request.id").unwrap()).collect();
        let mut expected: Vec<String> = (0..20).step_by(step).map(|n| id(index, n)).collect();
        ids.sort_unstable();
        expected.sort_unstable();
        assert_eq!(ids, expected);
        for client in of(SpanKind::Client) {
            assert!(of(SpanKind::Server).any(|server| server.span_id == client.parent_span_id), "{client:?}");
        }
        assert_eq!(of(SpanKind::Client).count(), expected.len());
    }
}

async fn o02_metrics_are_those_of_the_page(protocol: &str) {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply(USAGE));
    let app = exporting(&collector, protocol, &[], &[&upstream]).await;
    for _ in 0..5 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    assert_eq!(app.ask(&Request::chat("nobody")).await.status, 404);
    let requests = [("model", "m"), ("status", "200")];
    eventually("five requests are told", async || {
        collector.metric("proxy.requests.total", &requests) == Some(5.0)
            && collector.metric("proxy.requests.total", &[("model", "_unknown")]) == Some(1.0)
    })
    .await;
    for (otlp, page, labels) in [
        ("proxy.requests.total", "proxy_requests_total", &requests[..]),
        ("proxy.request.duration", "proxy_request_duration_seconds_count", &requests[..1]),
        ("proxy.time_to_first_token", "proxy_time_to_first_token_seconds_count", &requests[..1]),
        ("proxy.tokens.total", "proxy_tokens_total", &[("type", "input")]),
        ("proxy.request.tokens", "proxy_request_tokens_count", &[]),
        ("proxy.backend.inflight", "proxy_backend_inflight", &[("backend", "b"), ("model", "m")]),
        ("proxy.backends.active", "proxy_backends_active", &[]),
        ("proxy.backend.breaker_state", "proxy_backend_breaker_state", &[("backend", "b")]),
        ("proxy.queue.depth", "proxy_queue_depth", &[("model", "m")]),
        ("proxy.probe.duration", "proxy_probe_duration_seconds_count", &[]),
        ("proxy.retries.total", "proxy_retries_total", &[("reason", "connect")]),
        ("proxy.routing_table.updates", "proxy_routing_table_updates_total", &[("action", "add")]),
    ] {
        let told = collector.metric(otlp, labels);
        let names = || collector.metrics().iter().map(|metric| metric.name.clone()).collect::<Vec<_>>();
        assert!(told.is_some(), "{otlp} is none of {:?}", names());
        assert_eq!(told, app.metric(page, labels).await, "{otlp}");
    }
    let required = [
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.provider.name", "openai"),
        ("gen_ai.request.model", "m"),
        ("gen_ai.token.type", "input"),
    ];
    for name in ["gen_ai.server.request.duration", "gen_ai.server.time_to_first_token"] {
        assert_eq!(collector.metric(name, &required[..3]), Some(5.0), "{name}");
    }
    assert_eq!(collector.metric("gen_ai.client.token.usage", &required), Some(5.0));
    for (status, count) in [("200", 5.0), ("404", 1.0)] {
        let required = [
            ("http.request.method", "POST"),
            ("http.route", "/v1/chat/completions"),
            ("url.scheme", "http"),
            ("http.response.status_code", status),
        ];
        for name in ["http.server.request.duration", "http.server.response.body.size"] {
            assert_eq!(collector.metric(name, &required), Some(count), "{name} {status}");
        }
    }
    // What has gone is told no more.
    app.ended("b").await;
    eventually("its series are gone", async || collector.metric("proxy.backend.inflight", &[]).is_none()).await;
}

/// Spans and metrics of requests of many kinds: each route has its name, and clients invent none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_each_route_has_its_name_and_each_series_the_attributes_that_are_required() {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply(USAGE));
    let app = exporting(&collector, HTTP, &[], &[&upstream]).await;
    let named = |path: &str| Request::post(path, r#"{"model":"m"}"#);
    let requests = [
        (Request::get("/v1/models"), "GET /v1/models"),
        (Request::new("HEAD", "/v1/models"), "HEAD /v1/models"),
        (Request::get("/v1/models/m"), "GET /v1/models/{id}"),
        (Request::get("/v1/models/no%2Fsuch"), "GET /v1/models/{id}"),
        (named("/v1/embeddings"), "POST /v1/embeddings"),
        (named("/v1/responses"), "POST /v1/responses"),
        (Request::messages("m"), "POST /v1/messages"),
        (named("/tokenize"), "POST /tokenize"),
        (named("/api/chat"), "POST /api/chat"),
        (Request::get("/v1/responses/resp_17"), "GET /v1/responses/{id}"),
        (Request::get("/v1/videos/v_17/content"), "GET /v1/videos/{id}/content"),
        (named("/v1/invented/17"), "POST /v1/*"),
        (Request::get("/invented/17"), "GET /*"),
        (Request::new("BREW", "/v1/models"), "HTTP /v1/models"),
        (Request::chat("m").header("x-forwarded-proto", "https"), "POST /v1/chat/completions"),
    ];
    for (request, _) in &requests {
        let mut client = app.client().await;
        client.send(request.bytes()).await;
        client.next_answer(request.bytes().starts_with(b"HEAD")).await.unwrap();
    }
    let spans = collector.spans_of(SpanKind::Server, requests.len()).await;
    let mut names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    let mut expected: Vec<&str> = requests.iter().map(|(_, name)| *name).collect();
    names.sort_unstable();
    expected.sort_unstable();
    assert_eq!(names, expected);
    let brewed = spans.iter().find(|span| span.name == "HTTP /v1/models").unwrap();
    has(brewed, &[("http.request.method", "_OTHER"), ("http.request.method_original", "BREW")]);
    let chat = spans.iter().find(|span| span.name == "POST /v1/chat/completions").unwrap();
    has(chat, &[("url.scheme", "https")]);
    let told_twice: Vec<_> =
        spans.iter().filter(|span| text(&span.attributes, "gen_ai.usage.input_tokens").is_some()).collect();
    assert!(told_twice.is_empty(), "{told_twice:?}");

    // A chat is one in every dialect: `/v1/chat/completions`, `/api/chat` and `/v1/responses` are one series.
    let duration = "gen_ai.server.request.duration";
    let by = |name: &str, provider: &str| {
        let labels =
            [("gen_ai.operation.name", name), ("gen_ai.provider.name", provider), ("gen_ai.request.model", "m")];
        collector.metric(duration, &labels)
    };
    eventually("all requests are told", async || by("chat", "openai") == Some(3.0)).await;
    assert_eq!(
        (by("chat", "anthropic"), by("embeddings", "openai"), by("tokenize", "openai")),
        (Some(1.0), Some(1.0), Some(1.0))
    );
    for metric in collector.metrics() {
        let Some(Data::Histogram(histogram)) = metric.data else { continue };
        let required: &[&str] = match metric.name.as_str() {
            name if name.starts_with("http.server.") => {
                &["http.request.method", "http.route", "url.scheme", "http.response.status_code"]
            }
            name if name.starts_with("gen_ai.") => &["gen_ai.operation.name", "gen_ai.provider.name"],
            _ => continue,
        };
        let mut seen = std::collections::BTreeSet::new();
        for point in histogram.data_points {
            for key in required {
                assert!(
                    text(&point.attributes, key).is_some(),
                    "{} without {key}: {:?}",
                    metric.name,
                    point.attributes
                );
            }
            assert!(
                seen.insert(format!("{:?}", point.attributes)),
                "{} is told twice: {:?}",
                metric.name,
                point.attributes
            );
        }
        assert!(!seen.is_empty(), "{} has no series", metric.name);
    }
    for (labels, count) in [
        (&[("http.request.method", "_OTHER"), ("http.route", "/v1/models")][..], 1.0),
        (&[("url.scheme", "https"), ("http.response.status_code", "200")], 1.0),
        (&[("http.route", "/v1/models/{id}"), ("http.response.status_code", "404")], 1.0),
        (&[("http.route", "/v1/*")], 1.0),
    ] {
        assert_eq!(collector.metric("http.server.request.duration", labels), Some(count), "{labels:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_metrics_are_those_of_the_page_over_http() {
    o02_metrics_are_those_of_the_page(HTTP).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_metrics_are_those_of_the_page_over_grpc() {
    o02_metrics_are_those_of_the_page(GRPC).await;
}

/// Spans go on arriving: an exporter that is lost with its first export, or with its first idle time, says nothing of it.
async fn o02_spans_go_on_arriving(rounds: usize, pause: Duration) {
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply("{}"));
    for protocol in [HTTP, GRPC] {
        let collector = Collector::start().await;
        let app = exporting(&collector, protocol, &[], &[&upstream]).await;
        for round in 1..=rounds {
            assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
            collector.spans_of(SpanKind::Server, round).await;
            // Many exports' time without anything to export.
            tokio::time::sleep(pause).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_spans_go_on_arriving_after_a_while() {
    o02_spans_go_on_arriving(5, Duration::from_millis(300)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes six minutes"]
async fn o02_spans_go_on_arriving_after_minutes() {
    o02_spans_go_on_arriving(3, Duration::from_secs(60)).await;
}

/// As the binary does it: all of the proxy's control on one thread, which must not be waited for on itself.
#[tokio::test]
async fn o02_what_is_left_is_sent_at_the_end() {
    for protocol in [HTTP, GRPC] {
        let collector = Collector::start().await;
        let upstream = Upstream::start("b", &["m"]).await;
        upstream.always(json_reply("{}"));
        let never = [("OTEL_BSP_SCHEDULE_DELAY", "3600000"), ("OTEL_METRIC_EXPORT_INTERVAL", "3600000")];
        let app = exporting(&collector, protocol, &never, &[&upstream]).await;
        for _ in 0..20 {
            assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
        }
        assert_eq!(collector.connections(), 0);
        app.shutdown().await;
        assert_eq!(collector.spans_of(SpanKind::Server, 20).await.len(), 20);
        assert_eq!(collector.metric("proxy.requests.total", &[("status", "200")]), Some(20.0));
    }
}

/// A dead collector at this address costs neither the requests of a proxy nor its end any time worth mentioning.
async fn a_dead_collector_costs_nothing(addr: SocketAddr, protocol: &str) {
    let url = format!("http://{addr}");
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply("{}"));
    let knobs = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "10"),
    ];
    let app = TestApp::start_with_backends(&knobs, &[&upstream]).await;
    let begun = Instant::now();
    let mut client = app.client().await;
    for _ in 0..300 {
        assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    }
    let served = begun.elapsed();
    let begun = Instant::now();
    app.shutdown().await;
    let ended = begun.elapsed();
    assert!(served < Duration::from_secs(5), "300 requests took {served:?}");
    // A moment for those who balance over several proxies, then 5 s for telemetry.
    assert!(ended < Duration::from_secs(8), "the end took {ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_a_collector_that_refuses_costs_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    for protocol in [HTTP, GRPC] {
        a_dead_collector_costs_nothing(addr, protocol).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_a_collector_that_says_nothing_costs_nothing() {
    // It accepts, and that is all.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    a_dead_collector_costs_nothing(listener.local_addr().unwrap(), HTTP).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_a_dead_collector_is_said_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply("{}"));
    let log = std::env::temp_dir().join(format!("it-otlp-{}.log", fastrand::u64(..)));
    let url = format!("http://{addr}");
    let knobs = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "10"),
    ];
    let proxy = ProxyProcess::start_logged(&knobs, &[&upstream], &log).await;
    let lines = |level: &str, message: &str| {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines()
            .filter(|line| line.contains(level) && line.contains(message))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let ask = async || Client::connect(proxy.addr).await.ask(&Request::chat("m")).await.status;
    eventually("many exports have failed", async || {
        assert_eq!(ask().await, 200);
        lines("DEBUG", "telemetry does not get through").len() > 8
    })
    .await;
    let said = lines("WARN", "telemetry does not get through");
    assert_eq!(said.len(), 2, "once for each kind: {said:?}");
    assert!(said[0].contains("nobody listens there") && said[0].contains(&addr.to_string()), "{said:?}");
    let collector = Collector::start_at(addr).await;
    eventually("it is said that it works", async || {
        assert_eq!(ask().await, 200);
        lines("INFO", "telemetry gets through again").len() == 2
    })
    .await;
    collector.spans_of(SpanKind::Server, 1).await;
    std::fs::remove_file(&log).unwrap();
}

/// Who connects to this server gets this answer, whatever was said, or before anything was if it `speaks_first`.
async fn deaf(answer: &'static [u8], speaks_first: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                if !speaks_first {
                    let _ = stream.read_u8().await;
                }
                let _ = stream.write_all(answer).await;
                // Not closed with something unread, which would be a reset.
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            });
        }
    });
    addr
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_who_speaks_otherwise_is_told_with_what_to_set() {
    const HTTP1: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
    const HTTP2: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    let upstream = Upstream::start("b", &["m"]).await;
    for (scheme, protocol, answer, speaks_first, advice) in [
        ("https", HTTP, HTTP1, false, "let the endpoint begin with http://"),
        ("https", GRPC, HTTP2, true, "let the endpoint begin with http://"),
        ("http", GRPC, HTTP1, false, "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
        ("http", HTTP, HTTP2, false, "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"),
        ("http", HTTP, HTTP2, true, "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"),
    ] {
        let log = std::env::temp_dir().join(format!("it-otlp-{}.log", fastrand::u64(..)));
        let url = format!("{scheme}://{}", deaf(answer, speaks_first).await);
        let knobs = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_METRIC_EXPORT_INTERVAL", "10"),
        ];
        let _proxy = ProxyProcess::start_logged(&knobs, &[&upstream], &log).await;
        let complaint = || {
            let text = std::fs::read_to_string(&log).unwrap();
            text.lines().find(|line| line.contains("telemetry does not get through")).map(str::to_owned)
        };
        eventually("it is complained of", async || complaint().is_some()).await;
        let complaint = complaint().unwrap();
        assert!(complaint.contains(advice), "{url} {protocol}: {complaint}");
        std::fs::remove_file(&log).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_a_complaint_names_the_path_and_another_kind_of_trouble_is_said_at_once() {
    const MANY: usize = 1_000_000;
    let collector = Collector::start().await;
    collector.refuse(404, MANY);
    let upstream = Upstream::start("b", &["m"]).await;
    let log = std::env::temp_dir().join(format!("it-otlp-{}.log", fastrand::u64(..)));
    let url = format!("{}/v1/metrics", collector.url());
    let knobs = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "10"),
    ];
    let _proxy = ProxyProcess::start_logged(&knobs, &[&upstream], &log).await;
    let said = || {
        let text = std::fs::read_to_string(&log).unwrap();
        let complaints =
            text.lines().filter(|line| line.contains("WARN") && line.contains("telemetry does not get through"));
        complaints.map(str::to_owned).collect::<Vec<_>>()
    };
    for (statuses, status) in [(1, 404), (2, 403)] {
        collector.refuse(status, MANY);
        let answered = collector.heads().len();
        eventually("it is refused many times", async || collector.heads().len() > answered + 20).await;
        eventually("it is said", async || said().len() >= statuses).await;
        let said = said();
        let place = format!("{}/v1/metrics/v1/metrics", collector.addr);
        assert_eq!(said.len(), statuses, "once for each kind: {said:?}");
        let last = said.last().unwrap();
        assert!(last.contains(&place) && last.contains(&status.to_string()), "{last}");
        // A collector that takes no metrics at all is not wrong: the user is told what ends the attempts.
        assert_eq!(last.contains("OTEL_METRICS_EXPORTER=none"), status == 404, "{last}");
    }
    std::fs::remove_file(&log).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_what_a_collector_could_not_take_is_sent_again() {
    for (protocol, busy) in [(HTTP, 503), (GRPC, 14)] {
        let collector = Collector::start().await;
        collector.refuse(busy, 2);
        let upstream = Upstream::start("b", &["m"]).await;
        upstream.always(json_reply("{}"));
        let app = exporting(&collector, protocol, &[("OTEL_METRICS_EXPORTER", "none")], &[&upstream]).await;
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
        collector.spans_of(SpanKind::Server, 1).await;
        assert!(collector.heads().len() >= 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o03_unset_or_disabled_nothing_is_sent_and_nothing_is_changed() {
    let collector = Collector::start().await;
    let upstream = Upstream::start("b", &["m"]).await;
    upstream.always(json_reply("{}"));
    let url = collector.url();
    let disabled = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_SDK_DISABLED", "true")];
    for (index, knobs) in [&disabled[..], &[]].into_iter().enumerate() {
        let app = TestApp::start_with_backends(knobs, &[&upstream]).await;
        assert_eq!(app.ask(&traced(Request::chat("m"), "01")).await.status, 200);
        let head = upstream.peek(index, |received| received.head.clone()).unwrap();
        assert_eq!(head.all("traceparent"), [format!("00-{TRACE}-{CALLER}-01")]);
        assert_eq!(head.all("tracestate"), ["vendor=1"]);
        app.shutdown().await;
    }
    assert_eq!(collector.connections(), 0);
}
