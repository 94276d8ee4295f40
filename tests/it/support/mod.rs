//! What the tests stand on: a proxy (`app`), backends that do what a script says (`upstream`), byte-level clients
//! (`client`), a collector of telemetry (`collector`), a Docker Engine (`engine`), waiting with a deadline (`wait`), and HTTP/1.1 read by hand
//! (`wire`).

pub(crate) mod app;
pub(crate) mod client;
pub(crate) mod collector;
pub(crate) mod engine;
pub(crate) mod upstream;
pub(crate) mod wait;
pub(crate) mod wire;

mod selftest;

pub(crate) use app::{Health, ProxyProcess, Spec, TestApp};
pub(crate) use client::{Answer, Client, End, Request, Sending, connect_h2};
pub(crate) use upstream::{
    Script, Step, Upstream, held_reply, held_stream, json_reply, reply, sse_begin, sse_reply, switching,
};
pub(crate) use wait::{Gate, PATIENCE, eventually, settled, soon};
pub(crate) use wire::{LAST_CHUNK, chunk};

/// Checks an error of the proxy's own in OpenAI's shape.
#[track_caller]
pub(crate) fn assert_openai_error(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"), "{:?}", answer.head);
    let json = answer.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("no `error` object in {json}"));
    let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["code", "message", "param", "type"], "{json}");
    assert_eq!(error["code"], code, "{json}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{json}");
    assert!(error["type"].as_str().is_some_and(|kind| !kind.is_empty()), "{json}");
    assert!(answer.header("x-request-id").is_some_and(|id| !id.is_empty()), "{:?}", answer.head);
}

/// Checks an error of the proxy's own in Anthropic's shape, and returns its type.
#[track_caller]
pub(crate) fn assert_anthropic_error(answer: &Answer, status: u16) -> String {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"), "{:?}", answer.head);
    let json = answer.json();
    assert_eq!(json["type"], "error", "{json}");
    assert!(json["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{json}");
    assert!(answer.header("x-request-id").is_some_and(|id| !id.is_empty()), "{:?}", answer.head);
    match json["error"]["type"].as_str() {
        Some(kind) if !kind.is_empty() => kind.to_owned(),
        _ => panic!("no `error.type` in {json}"),
    }
}

/// Checks that the answer asks to come back later, in whole seconds.
#[track_caller]
pub(crate) fn assert_retry_after(answer: &Answer) {
    let seconds = answer.header("retry-after").and_then(|value| value.parse::<u32>().ok());
    assert!(seconds.is_some_and(|seconds| seconds >= 1), "Retry-After in {:?}", answer.head);
}
