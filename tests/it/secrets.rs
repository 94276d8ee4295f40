//! R10: what clients send in confidence goes to the backend, and nowhere else, at any level of logging.

use crate::support::*;

const KEY: &str = "sk-in-confidence-1";
const OTHER_KEY: &str = "sk-in-confidence-2";
const COOKIE: &str = "session-in-confidence-3";
const PROMPT: &str = "prompt-in-confidence-4";
const ANSWER: &str = "answer-in-confidence-5";

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
    let proxy = ProxyProcess::start_logged(&[("PROXY_ACCESS_LOG", "on")], &[&upstream], &log).await;
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
    let logged = std::fs::read_to_string(&log).unwrap();
    assert!(logged.contains("/v1/chat/completions") && logged.contains("answer cut"), "logging is on: {logged}");
    seen.push(("the log".to_owned(), logged));
    std::fs::remove_file(&log).unwrap();
    for (what, text) in seen {
        for secret in [KEY, OTHER_KEY, COOKIE, PROMPT, ANSWER] {
            assert!(!text.contains(secret), "{secret} is in {what}: {text}");
        }
    }
}
