//! What an engine does to the proxy, from its socket to the answers of clients.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use inference_proxy::control::discovery::{Change, Discovery, DiscoveryError, Looks};
use serde_json::{Value, json};

use crate::support::{
    Client, Gate, Request, TestApp, Upstream,
    engine::{Engine, container_of},
    eventually, held_stream, json_reply, soon, sse_reply,
};

const DRAIN: Duration = Duration::from_millis(400);
const ANSWER: &str = r#"{"choices":[]}"#;

async fn status(app: &TestApp) -> Value {
    app.ask(&Request::get("/status")).await.json()
}

async fn is_connected(app: &TestApp, wanted: bool) {
    eventually(format!("the engine is seen: {wanted}"), async || status(app).await["discovery"]["connected"] == wanted)
        .await;
}

/// The texts of all events about a container, in their order.
async fn told(app: &TestApp, name: &str) -> Vec<String> {
    let status = status(app).await;
    let events = status["events"].as_array().unwrap().iter().filter(|event| event["container"] == name);
    events.map(|event| event["text"].as_str().unwrap().to_owned()).collect()
}

/// Requests, one after the other, until told to end; every one of them must be served.
fn load(app: &Arc<TestApp>, goes_on: &Arc<AtomicBool>) -> tokio::task::JoinHandle<usize> {
    let (app, goes_on) = (app.clone(), goes_on.clone());
    tokio::spawn(async move {
        let mut served = 0;
        while goes_on.load(Ordering::Relaxed) {
            let answer = app.ask(&Request::chat("m")).await;
            assert_eq!(answer.status, 200, "after {served}: {}", answer.text());
            served += 1;
        }
        served
    })
}

/// Docker 25 and later set the health of containers that run on back to `starting` (moby#47051); others may say less.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_engine_takes_no_container_out_whatever_it_says_of_their_health() {
    for required in ["false", "true"] {
        for health in [
            json!({ "Status": "starting", "FailingStreak": 0, "Log": [] }),
            json!({ "Status": "", "FailingStreak": 0, "Log": null }),
            json!({ "Status": "none" }),
            json!({}),
            Value::Null,
        ] {
            let upstream = Upstream::start("a", &["m"]).await;
            let mut engine = Engine::start_new();
            let mut container = container_of(&upstream);
            engine.set(&container);
            let host = engine.host();
            let knobs = [("PROXY_DRAIN_TIMEOUT", "400ms"), ("PROXY_REQUIRE_HEALTHCHECK", required)];
            let app = Arc::new(TestApp::start_on_engine(&host, &knobs).await);
            app.models_are(&["m"]).await;

            let gate = Gate::shut();
            upstream.script(held_stream("one", &gate, "two"));
            let mut stream = Client::connect(app.addr()).await;
            stream.send(Request::chat("m").bytes()).await;
            assert!(stream.head().await.start.contains(" 200 "));
            upstream.always(json_reply(ANSWER));
            let goes_on = Arc::new(AtomicBool::new(true));
            let load = load(&app, &goes_on);

            engine.stop().await;
            is_connected(&app, false).await;
            container["State"]["Health"] = health.clone();
            engine.set(&container);
            engine.start();
            is_connected(&app, true).await;
            engine.tell("a", "health_status", &[]);
            let since = Instant::now();
            eventually("the drain time is over", async || since.elapsed() > 2 * DRAIN).await;
            goes_on.store(false, Ordering::Relaxed);
            assert!(load.await.unwrap() > 0, "{health}");
            gate.open();
            assert!(stream.finish().await.text().contains("two"), "{health}: a stream was cut");

            // What it says in the end counts.
            container["State"]["Health"] = json!({ "Status": "unhealthy", "FailingStreak": 3, "Log": [] });
            engine.set(&container);
            engine.tell("a", "health_status: unhealthy", &[]);
            app.models_are(&[]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_may_take_for_ever_to_stop_holds_up_nothing_else() {
    for grace in [i64::MAX, i64::MAX / 1_000_000_000, -1, i64::MIN] {
        let (first, second) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["n"]).await);
        let engine = Engine::start_new();
        let mut container = container_of(&first);
        container["Config"]["StopTimeout"] = grace.into();
        engine.set(&container);
        let app = TestApp::start_on_engine(&engine.host(), &[]).await;
        app.models_are(&["m"]).await;
        engine.tell("a", "kill", &[("signal", "15")]);
        app.models_are(&[]).await;
        engine.set(&container_of(&second));
        engine.tell("b", "start", &[]);
        app.models_are(&["n"]).await;
        container["State"]["Status"] = "exited".into();
        engine.set(&container);
        engine.tell("a", "die", &[]);
        eventually("a has ended", async || told(&app, "a").await.iter().any(|text| text.contains("has ended"))).await;
    }
}

/// The longest times that are accepted, everywhere at once, and requests of every kind that they bear on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_times_that_can_be_set_work() {
    let names = inference_proxy::base::config::KNOBS.iter().map(|knob| knob.name);
    let times: Vec<(&str, &str)> = names
        .filter(|name| name.starts_with("PROXY_") && !matches!(*name, "PROXY_SETTLE" | "PROXY_DRAIN_TIMEOUT"))
        .filter(|name| name.ends_with("_TIMEOUT") || name.ends_with("_REFRESH") || name.ends_with("_GRACE"))
        .map(|name| (name, "87600h"))
        .chain([("PROXY_DRAIN_TIMEOUT", "87600h"), ("PROXY_MAX_BODY", "18446744073709551615")])
        .chain([("PROXY_HOLD_MAX", "18446744073709551615"), ("PROXY_QUEUE_MAX", "18446744073709551615")])
        .collect();
    assert!(times.len() >= 10, "{times:?}");
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&times, &[&upstream]).await;
    for round in 0..3 {
        upstream.script(if round == 1 { sse_reply(&["data: 1\n\n"]) } else { json_reply(ANSWER) });
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    app.ended("a").await;
    app.models_are(&[]).await;
    soon("the proxy has shut down", app.shutdown()).await;
}

/// A source of containers that breaks the task which reads it, or ends, after it has said that there are none.
struct Broken {
    panics: bool,
}

impl Discovery for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn changes(self: Box<Self>, _: Looks) -> BoxStream<'static, Result<Change, DiscoveryError>> {
        let first = stream::iter([Ok(Change::Reset(Vec::new()))]);
        if !self.panics {
            return first.boxed();
        }
        let breaks = stream::once(async { panic!("the engine said 9223372036854775807") });
        first.chain(breaks).boxed()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_whose_table_nobody_writes_any_more_ends() {
    for (panics, why) in [(true, "it panicked: the engine said 9223372036854775807"), (false, "broken, has ended")] {
        let app = TestApp::start_watching(Box::new(Broken { panics }), &[]).await;
        let told = app.gives_up().await;
        assert!(told.starts_with("the registry task has ended") && told.contains(why), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_that_the_engine_tells_in_two_steps_is_told_as_a_crash() {
    let upstream = Upstream::start("a", &["m"]).await;
    let engine = Engine::start_new();
    let mut container = container_of(&upstream);
    engine.set(&container);
    let app = TestApp::start_on_engine(&engine.host(), &[]).await;
    app.models_are(&["m"]).await;
    container["State"]["Status"] = "exited".into();
    engine.set(&container);
    engine.tell_network("a", "disconnect", "n1");
    engine.tell("a", "die", &[("exitCode", "1")]);
    app.models_are(&[]).await;
    eventually("a has ended", async || told(&app, "a").await.iter().any(|text| text.contains("has ended"))).await;
    let told = told(&app, "a").await;
    assert!(told.iter().all(|text| !text.contains("disconnected")), "{told:?}");
}
