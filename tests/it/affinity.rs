//! P11: `PROXY_BALANCE=prefix`.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

#[path = "../bench/conversations.rs"]
mod conversations;

use self::conversations::{Mix, Policy};
use crate::support::*;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// How a client of each API writes a turn.
#[derive(Clone, Copy, Debug)]
enum Api {
    /// `model` behind the messages, and the tools behind that.
    Chat,
    Completions,
    Messages,
    Responses,
}

impl Api {
    const ALL: [Api; 4] = [Api::Chat, Api::Completions, Api::Messages, Api::Responses];

    /// The request of a turn: everything that was said before, and a new question.
    fn turn(self, conversation: usize, turn: usize) -> Request {
        let system = "You are a helpful assistant. Answer in few words. ".repeat(20);
        let asks = |turn: usize| format!("Question {turn} of conversation {conversation}: and then?");
        let answers = |turn: usize| format!("Answer {turn}.");
        let mut messages = Vec::new();
        for before in 0..turn {
            messages.push(json!({"role": "user", "content": asks(before)}));
            messages.push(json!({"role": "assistant", "content": answers(before)}));
        }
        messages.push(json!({"role": "user", "content": asks(turn)}));
        let (path, body) = match self {
            Api::Chat => {
                messages.insert(0, json!({"role": "system", "content": system}));
                let messages = Value::from(messages);
                (
                    "/v1/chat/completions",
                    format!(r#"{{"messages":{messages},"model":"m","tools":[{{"type":"function"}}]}}"#),
                )
            }
            Api::Completions => {
                let said: String = (0..turn).map(|turn| format!("{}\n{}\n", asks(turn), answers(turn))).collect();
                let prompt = Value::from(format!("{said}{}", asks(turn)));
                ("/v1/completions", format!(r#"{{"model":"m","prompt":{prompt},"max_tokens":5}}"#))
            }
            Api::Messages => {
                let messages = Value::from(messages);
                ("/v1/messages", format!(r#"{{"max_tokens":5,"messages":{messages},"model":"m","system":"{system}"}}"#))
            }
            Api::Responses => {
                let messages = Value::from(messages);
                ("/v1/responses", format!(r#"{{"model":"m","instructions":"{system}","input":{messages}}}"#))
            }
        };
        Request::post(path, body)
    }
}

async fn replicas() -> Vec<Upstream> {
    let mut replicas = Vec::new();
    for name in NAMES {
        replicas.push(Upstream::start(name, &["m"]).await);
    }
    replicas
}

async fn proxy(replicas: &[Upstream]) -> TestApp {
    TestApp::start_with_backends(&[("PROXY_BALANCE", "prefix")], &replicas.iter().collect::<Vec<_>>()).await
}

fn place(answer: &Answer) -> usize {
    let served_by = answer.json()["served_by"].clone();
    NAMES.iter().position(|name| served_by == *name).unwrap_or_else(|| panic!("{}", answer.text()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p11_conversations_stay_at_their_replica_and_the_load_is_even() {
    for api in Api::ALL {
        for concurrency in [1, 10] {
            let replicas = replicas().await;
            let app = proxy(&replicas).await;
            let next = AtomicUsize::new(0);
            let stayed = AtomicUsize::new(0);
            let talk = async || {
                let mut client = app.client().await;
                loop {
                    let conversation = next.fetch_add(1, Ordering::Relaxed);
                    if conversation >= 50 {
                        break;
                    }
                    let mut last = None;
                    for turn in 0..6 {
                        let now = place(&client.ask(&api.turn(conversation, turn)).await);
                        stayed.fetch_add(usize::from(last == Some(now)), Ordering::Relaxed);
                        last = Some(now);
                    }
                }
            };
            futures::future::join_all((0..concurrency).map(|_| talk())).await;
            let stayed = stayed.into_inner();
            assert!(stayed >= 225, "{api:?} at {concurrency}: {stayed} of 250 later turns stayed");
            let counts: Vec<usize> = replicas.iter().map(Upstream::count).collect();
            assert!(counts.iter().all(|&count| count * 4 * 2 <= 300 * 3), "{api:?} at {concurrency}: {counts:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p11_conversations_of_a_replica_that_goes_go_on_elsewhere() {
    let replicas = replicas().await;
    let app = proxy(&replicas).await;
    let mut client = app.client().await;
    let mut places = Vec::new();
    for conversation in 0..12 {
        client.ask(&Api::Chat.turn(conversation, 0)).await;
        places.push(place(&client.ask(&Api::Chat.turn(conversation, 1)).await));
    }
    app.ended("a").await;
    app.rotation_is(3, "a is out").await;
    for (conversation, before) in places.into_iter().enumerate() {
        let now = place(&client.ask(&Api::Chat.turn(conversation, 2)).await);
        assert!(now != 0 && (before == 0 || now == before), "{conversation} went from {before} to {now}");
        assert_eq!(place(&client.ask(&Api::Chat.turn(conversation, 3)).await), now, "{conversation} has a new place");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p11_a_name_in_the_head_keeps_a_conversation_together() {
    let replicas = replicas().await;
    let app = proxy(&replicas).await;
    let mut client = app.client().await;
    for session in 0..8 {
        let mut last = None;
        for part in 0..4 {
            // Nothing of the prompt is repeated.
            let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{part} {session}"}}]}}"#);
            let request = Request::post("/v1/messages", body).header("X-Claude-Code-Session-Id", &session.to_string());
            let now = place(&client.ask(&request).await);
            assert!(last.is_none_or(|last| last == now), "{session}: from {last:?} to {now}");
            last = Some(now);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p11_a_prompt_that_takes_its_time_is_not_waited_for_without_end() {
    let replicas = replicas().await;
    let app = proxy(&replicas).await;
    let mut client = app.client().await;
    // The model is known, and more of the prompt has come than is waited for; the rest never does.
    let sent = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"#, "x".repeat(2 << 20));
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: p\r\nContent-Length: {}\r\n\r\n", 4 << 20);
    client.send([head.as_bytes(), sent.as_bytes()].concat()).await;
    eventually("a replica has it", async || replicas.iter().map(Upstream::count).sum::<usize>() == 1).await;
}

#[test]
fn affinity_saves_most_of_the_prefill_and_keeps_the_load_even() {
    let mix = Mix {
        replicas: 4,
        cache_bytes: 1_000_000,
        applications: 6,
        conversations: 150,
        turns: 6.0,
        between_s: 1.0,
        think_s: 20.0,
        prefill_bytes_per_s: 40_000.0,
        decode_bytes_per_s: 250.0,
        system_bytes_max: 10_000,
        document_in: 10,
    };
    let saved = |policy| {
        let of = mix.run(policy, 1);
        (of.cached_bytes as f64 / of.prompt_bytes as f64, of)
    };
    let (least, _) = saved(Policy::Least);
    let (prefix, of) = saved(Policy::Prefix);
    let (oracle, _) = saved(Policy::Oracle);
    assert!(prefix >= 0.6 && prefix > least + 0.05 && prefix > oracle - 0.02, "{least} {prefix} {oracle}");
    assert!(of.stayed >= 0.9 && of.max_requests <= 1.5 && of.max_in_flight <= 1.5, "{of:?}");
    let (_, in_turn) = saved(Policy::RoundRobin);
    assert!(
        of.first_byte_p95_s < in_turn.first_byte_p95_s && of.first_byte_mean_s < in_turn.first_byte_mean_s,
        "{of:?}"
    );
}
