//! R10: what clients send in confidence goes to the backend, and nowhere else, at any level of logging.

use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

use crate::support::{collector::Collector, *};

const KEY: &str = "sk-in-confidence-1";
const OTHER_KEY: &str = "sk-in-confidence-2";
const COOKIE: &str = "session-in-confidence-3";
const PROMPT: &str = "prompt-in-confidence-4";
const ANSWER: &str = "answer-in-confidence-5";
const COLLECTOR_KEY: &str = "collector-in-confidence-6";

fn confidential(request: Request) -> Request {
    request
        .header("Authorization", &format!("Bearer {KEY}"))
        .header("X-Api-Key", OTHER_KEY)
        .header("Cookie", &format!("id={COOKIE}"))
}

fn chat(model: &str) -> Request {
    confidential(Request::post("/v1/chat/completions", format!(r#"{{"model":"{model}","prompt":"{PROMPT}"}}"#)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r10_what_is_confidential_is_in_no_log_and_on_no_page() {
    let upstream = Upstream::start("a", &["m"]).await;
    let log = std::env::temp_dir().join(format!("it-secrets-{}.log", fastrand::u64(..)));
    let collector = Collector::start().await;
    let (url, header) = (collector.url(), format!("api-key={COLLECTOR_KEY}"));
    let knobs = [
        ("PROXY_ACCESS_LOG", "on"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", &header),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
    ];
    let proxy = ProxyProcess::start_logged(&knobs, &[&upstream], &log).await;
    let ask = async |request: &Request| Client::connect(proxy.addr).await.ask(request).await;

    upstream.always(json_reply(&format!(r#"{{"text":"{ANSWER}"}}"#)));
    let answer = ask(&chat("m")).await;
    assert_eq!(answer.status, 200);
    let got = upstream.whole(0).await;
    assert_eq!(got.head.header("authorization"), Some(&*format!("Bearer {KEY}")));
    assert_eq!(got.head.header("x-api-key"), Some(OTHER_KEY));

    // Every way in which a request can end has words of its own.
    let mut told = Vec::new();
    upstream.script(vec![Step::ReadBody, Step::Reset]);
    upstream.script(vec![Step::ReadBody, Step::Send(format!("HTTP/1.1 {ANSWER}\r\n\r\n").into())]);
    told.push(ask(&chat("m")).await);
    told.push(ask(&chat("m")).await);
    let mut cut = sse_begin();
    cut.extend([Step::SendChunk(format!("data: {ANSWER}\n\n").into()), Step::Reset]);
    upstream.script(cut);
    assert!(!ask(&chat("m")).await.is_whole());
    told.push(ask(&chat("unheard")).await);
    for body in [
        format!(r#"{{"prompt":"{PROMPT}"}}"#),
        format!(r#"{{"model":"m","prompt":"{PROMPT}"x}}"#),
        PROMPT.to_owned(),
        format!(r#"{{"model":5,"prompt":"{PROMPT}"}}"#),
    ] {
        told.push(ask(&confidential(Request::post("/v1/chat/completions", body))).await);
    }
    told.push(ask(&confidential(Request::get("/nowhere"))).await);
    told.push(ask(&confidential(Request::get("/sleep"))).await);
    let broken = format!("POST /v1/x HTTP/1.1\r\nauthorization: Bearer {KEY}\nx-api-key {OTHER_KEY}\r\n\r\n");
    told.extend(Client::connect(proxy.addr).await.try_ask(broken.as_bytes()).await);
    // What the backend itself says may be said.
    told.retain(|answer| answer.status >= 400);
    assert!(told.len() >= 8, "{} errors", told.len());
    for page in ["/metrics", "/status", "/"] {
        told.push(ask(&confidential(Request::get(page))).await);
    }

    let mut seen: Vec<(String, String)> =
        told.iter().map(|answer| (format!("an answer {}", answer.status), answer.text())).collect();
    // Lines are written in their order: with that of the last request, all are there.
    ask(&confidential(Request::get("/v1/models").header("x-request-id", "the-last"))).await;
    let logged = || std::fs::read_to_string(&log).unwrap();
    eventually("the last request is logged", async || logged().contains("the-last")).await;
    let logged = logged();
    assert!(logged.contains("/v1/chat/completions") && logged.contains("answer cut"), "logging is on: {logged}");
    seen.push(("the log".to_owned(), logged));
    let spans = collector.spans_of(SpanKind::Server, 8).await;
    assert_eq!(collector.heads()[0].1["api-key"], COLLECTOR_KEY);
    seen.push(("a span".to_owned(), format!("{spans:?} {:?}", collector.spans_of(SpanKind::Client, 4).await)));
    std::fs::remove_file(&log).unwrap();
    for (what, text) in seen {
        for secret in [KEY, OTHER_KEY, COOKIE, PROMPT, ANSWER, COLLECTOR_KEY] {
            assert!(!text.contains(secret), "{secret} is in {what}: {text}");
        }
    }
}
