//! D7, D12, D13: backends that answer `/models` late, differently the next time, or in ways in which no honest server does.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::*;

const NOT_ANSWERED_YET: &str = "it is being asked for its models";

/// The container of this name in the status; `null` before it is known.
async fn container(app: &TestApp, name: &str) -> Value {
    let status = app.ask(&Request::get("/status")).await.json();
    let mut containers = status["containers"].as_array().unwrap().iter();
    containers.find(|container| container["name"] == name).cloned().unwrap_or_default()
}

/// A 200 with this body.
fn ok(body: &str) -> Script {
    bytes(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
}

/// These bytes, and the end of the connection.
fn bytes(answer: &str) -> Script {
    vec![Step::Send(answer.to_owned().into())]
}

/// The list of models of a server that names `ids` of them.
fn listing(ids: usize) -> String {
    let ids: Vec<String> = (0..ids).map(|n| format!(r#"{{"id":"{n}"}}"#)).collect();
    format!(r#"{{"data":[{}]}}"#, ids.join(","))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d12_a_model_that_a_server_learns_is_found_when_a_request_asks_for_it() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    app.models_are(&["m"]).await;
    upstream.set_models(r#"{"data":[{"id":"m"},{"id":"lora"}]}"#);
    eventually("the new model is served", async || app.ask(&Request::chat("lora")).await.status == 200).await;
    app.models_are(&["lora", "m"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d07_a_server_that_never_answers_delays_no_other() {
    let (silent, good) = (Upstream::start("silent", &["n"]).await, Upstream::start("good", &["m"]).await);
    silent.hold_probes(&Gate::shut());
    let app = TestApp::start().await;
    app.announce(Spec::of(&silent)).await;
    eventually("the silent server is asked", async || silent.probes() == 1).await;
    app.add(Spec::of(&good)).await;
    app.stopping("good").await;
    app.rotation_is(0, "the other one drains").await;
    assert_eq!(container(&app, "good").await["state"], "draining");
    let reason = &container(&app, "silent").await["reason"];
    assert_eq!(reason, NOT_ANSWERED_YET, "the other one came and went before the first time-out");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d13_hostile_answers_register_nothing_and_are_bounded() {
    let elsewhere = Upstream::start("elsewhere", &["m"]).await;
    let huge = format!(r#"{{"data":[{{"id":"m","pad":"{}"}}]}}"#, "x".repeat(50_000_000));
    let redirect =
        format!("HTTP/1.1 302 Found\r\nlocation: http://{}/v1/models\r\ncontent-length: 0\r\n\r\n", elsewhere.addr);
    let begin = Step::Send("HTTP/1.1 200 OK\r\n\r\n{\"data\":[".into());
    let slow = (0..1_000).flat_map(|_| [Step::Send(" ".into()), Step::Pause(Duration::from_millis(50))]);
    let cases = [
        ("huge", ok(&huge), "more than"),
        ("endless", vec![begin.clone(), Step::Flood(vec![b' '; 64 * 1024].into())], "more than"),
        ("slow", [begin].into_iter().chain(slow).collect(), "no complete answer"),
        ("redirect", bytes(&redirect), "302"),
        ("html", ok("<!doctype html><html></html>"), "JSON"),
        ("many", ok(&listing(100_000)), "more than"),
        ("too many", ok(&listing(2_000)), "at most 1024"),
        ("control", ok("{\"data\":[{\"id\":\"m\\u001b[2J\"}]}"), "control"),
        ("empty", ok(r#"{"data":[]}"#), "empty"),
        ("cut", bytes("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"), "broke"),
        ("no-http", bytes("SSH-2.0-OpenSSH\r\n"), "broke"),
    ];
    let app = TestApp::start().await;
    let mut upstreams = Vec::new();
    for (name, script, _) in &cases {
        let upstream = Upstream::start(name, &[]).await;
        upstream.script_models(script.clone());
        app.announce(Spec::of(&upstream).health(Health::None)).await;
        upstreams.push(upstream);
    }
    let began = Instant::now();
    for (name, _, why) in &cases {
        let mut seen = Value::Null;
        eventually(format!("the answer of {name} is judged"), async || {
            seen = container(&app, name).await;
            seen["reason"].is_string() && seen["reason"] != NOT_ANSWERED_YET
        })
        .await;
        assert_eq!(seen["state"], "probing", "{name}");
        let reason = seen["reason"].as_str().unwrap();
        assert!(reason.contains(why) && reason.len() < 300, "{name}: {reason}");
        assert!(!reason.contains('\u{1b}'), "{name}: {reason}");
    }
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    app.models_are(&[]).await;
    assert_eq!((elsewhere.probes(), elsewhere.count()), (0, 0), "a redirect was followed");
}
