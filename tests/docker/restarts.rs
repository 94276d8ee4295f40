//! The engine is restarted under load while its containers run on (`live-restore`), and no request notices.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use crate::support::{
    engine::{self, Lab},
    load::{Load, failures},
    second::SecondEngine,
    wait::eventually,
};

const CLIENTS: usize = 8;
const ROUNDS: usize = 3;
/// Long enough for the engine to be back before the first check after its restart.
const INTERVAL: &str = "4s";
/// A stream that is told to end by a restart ends so much later.
const DRAIN: &str = "2s";
/// What another run of a container would have differ.
const RUN: &str = "{{.State.Status}} {{.State.StartedAt}} {{.State.Pid}}";

/// Since Docker 25 a restart sets the health of every container back to `starting` until its next check (moby#47051).
#[tokio::test]
async fn a_restart_of_the_engine_with_live_restore_loses_no_request() {
    let Some(lab) = engine::alone("live").await else { return };
    let mut second = SecondEngine::start(&lab, json!({ "live-restore": true })).await;
    second.load(lab.backend_image()).await;
    let model = lab.name("model");
    let slow = lab.name("slow");
    let replicas = [
        replica(&lab, &second, "a", &model, "5").await,
        replica(&lab, &second, "b", &model, "5").await,
        replica(&lab, &second, "c", &slow, "800").await,
    ];
    let before = inspect(&second, &replicas, RUN).await;
    let proxy = lab.proxy().env("PROXY_DRAIN_TIMEOUT", DRAIN).beside(&second).await.ready().await;
    proxy.until_serves(&model).await;
    proxy.until_lists(&slow).await;

    let load = Load::start(&proxy, &model, CLIENTS);
    for round in 0..ROUNDS {
        let served = load.served();
        let stream = proxy.stream(&slow).await.read_on();
        let begun = Instant::now();
        second.restart().await;
        let health = inspect(&second, &replicas, "{{.State.Health.Status}}").await;
        println!("live: restart {round} took {:.1?}, Docker calls the replicas {health:?}", begun.elapsed());
        let sees = async || {
            let status = proxy.get("/status").await.ok()?.json();
            (status["discovery"]["connected"] == true).then_some(())
        };
        eventually("the proxy sees the engine again", Duration::from_secs(20), sees).await;
        // Past the drain timeout of whatever the restart may have told the proxy to drain.
        let ending = stream.ending().await;
        assert!(ending.is_complete(), "a stream across the restart: {ending:?}");
        let flows = async || (load.served() >= served + 200).then_some(());
        eventually("requests after the restart", Duration::from_secs(60), flows).await;
    }
    let samples = load.stop().await;
    println!("live: {ROUNDS} restarts of dockerd, {} requests", samples.len());
    assert_eq!(failures(&samples), "", "of {}", samples.len());
    let after = inspect(&second, &replicas, RUN).await;
    assert_eq!(after, before, "the containers have run on, else the test proves nothing");
}

/// One field of all replicas, as Go templates name it.
async fn inspect(second: &SecondEngine, replicas: &[String], field: &str) -> String {
    let names = replicas.iter().map(String::as_str);
    second.docker(&["inspect", "--format", field].into_iter().chain(names).collect::<Vec<_>>()).await
}

/// A replica that the second engine calls healthy. It streams ten tokens, one each `gap_ms`.
async fn replica(lab: &Lab, second: &SecondEngine, role: &str, model: &str, gap_ms: &str) -> String {
    let name = lab.name(role);
    let interval = format!("--health-interval={INTERVAL}");
    let run = ["run", "--detach", "--name", &name, "--label", "inference.enable=true", &interval, lab.backend_image()];
    let serve = ["demo-backend", "--name", &name, "--port", "8000", "--model", model];
    let pace = ["--tokens", "10", "--token-gap-ms", gap_ms, "--latency-ms", "10"];
    second.docker(&[&run[..], &serve, &pace].concat()).await;
    let healthy = async || {
        let health = second.docker(&["inspect", "--format", "{{.State.Health.Status}}", &name]).await;
        (health == "healthy").then_some(())
    };
    eventually(&format!("{name} is healthy"), Duration::from_secs(30), healthy).await;
    name
}
