//! L12: replicas are replaced under load and no request notices.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use tokio::process::Command;

use crate::support::{
    backend::Backend,
    engine::{self, Lab, docker, run, try_docker},
    events::{Event, Events},
    load::{Load, Outcome, Sample, failures},
    wait::eventually,
};

/// Clients that keep sending, each as soon as its last request is done.
const CLIENTS: usize = 16;
/// Fewer requests than this prove little.
const REQUESTS: usize = 2000;
const ROUNDS: usize = 5;
/// For so long at least the next replica is waited for.
const GAP: Duration = Duration::from_secs(9);
/// HEALTHCHECK interval of the replicas.
const INTERVAL: Duration = Duration::from_millis(500);

#[tokio::test]
async fn l12_rolling_replacement_loses_no_request() {
    let Some(lab) = engine::alone("l12").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let model = lab.name("model");
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let mut replicas =
        vec![replica(&lab, &net, &model, "0a", &events).await, replica(&lab, &net, &model, "0b", &events).await];
    proxy.until_serves(&model).await;

    let begun = SystemTime::now();
    let load = Load::start(&proxy, &model, CLIENTS);
    for round in 1..=ROUNDS {
        for side in ["a", "b"] {
            // As an operator would: the old one is told to stop as soon as Docker calls the new one healthy.
            let new = replica(&lab, &net, &model, &format!("{round}{side}"), &events).await;
            let old = std::mem::replace(&mut replicas[usize::from(side == "b")], new);
            docker(["stop", "--time", "20", &old.id]).await;
            docker(["rm", &old.id]).await;
        }
    }
    for new in &replicas {
        let reached = async || load.has_reached(&new.name).then_some(());
        eventually(&format!("{} gets traffic", new.name), Duration::from_secs(10), reached).await;
    }
    eventually("enough requests", Duration::from_secs(60), async || (load.served() >= REQUESTS).then_some(())).await;
    let samples = load.stop().await;
    println!("l12: {ROUNDS} rounds, both of 2 replicas replaced in each: {}", summary(&samples, begun));
    assert_eq!(failures(&samples), "", "of {}", samples.len());
}

/// Compose stops a container before it starts the one in its place, and does so for all replicas of a service at once: for
/// a while there is no backend at all, and before that two that refuse and that Docker has not said to be stopping. Requests
/// wait for the new ones.
#[tokio::test]
async fn l12_compose_recreation_loses_no_request() {
    let Some(lab) = engine::alone("l12c").await else { return };
    let Some(compose) = Compose::find().await else {
        let required = std::env::var("DOCKER_REQUIRED").is_ok_and(|value| value == "1");
        assert!(!required, "DOCKER_REQUIRED=1, but neither `docker compose` nor `docker-compose` is there");
        eprintln!("l12 with compose skipped: neither `docker compose` nor `docker-compose` is there");
        return;
    };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let dir = lab.scratch_dir("compose");
    let project = lab.name("project");
    write_compose_file(&lab, &dir, &net, &model);
    let events = Events::watch();
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    compose.up(&dir, &project, false).await;
    proxy.until_serves(&model).await;

    let begun = SystemTime::now();
    let load = Load::start(&proxy, &model, CLIENTS);
    for _ in 0..ROUNDS {
        let before = load.served();
        compose.up(&dir, &project, true).await;
        proxy.until_serves(&model).await;
        let flows = async || (load.served() >= before + REQUESTS / ROUNDS).then_some(());
        eventually("requests between two rounds", Duration::from_secs(60), flows).await;
    }
    let samples = load.stop().await;
    println!("l12: {ROUNDS} × compose up --force-recreate --scale 2: {}", summary(&samples, begun));
    assert!(samples.len() >= REQUESTS, "{}", summary(&samples, begun));
    let gap = longest_gap(&events.matching(|event| event.attributes["com.docker.compose.project"] == project));
    assert!(!gap.is_zero(), "Compose has left no gap");
    println!("l12: no replica ran for up to {gap:?}");
    // Whoever waits is sent away in the end; an engine that takes as long to start a container shows nothing else.
    let is_excused = |sample: &Sample| gap > GAP && sample.outcome == Outcome::Refused;
    let lost: Vec<Sample> = samples.iter().filter(|sample| !is_excused(sample)).cloned().collect();
    assert_eq!(failures(&lost), "", "of {}", samples.len());
}

/// The longest time between the end of the last replica and the start of the next, by the engine.
fn longest_gap(events: &[Event]) -> Duration {
    let (mut running, mut since, mut longest) = (0, None, Duration::ZERO);
    for event in events {
        match event.action.as_str() {
            "start" => {
                running += 1;
                let gap = since.take().and_then(|since| event.at.duration_since(since).ok());
                longest = longest.max(gap.unwrap_or_default());
            }
            "die" => {
                running -= 1;
                since = (running == 0).then_some(event.at);
            }
            _ => {}
        }
    }
    longest
}

/// A replica that Docker calls healthy.
async fn replica(lab: &Lab, net: &str, model: &str, role: &str, events: &Events) -> Backend {
    let spec = lab.backend(role).network(net).model(model).healthcheck(INTERVAL);
    let replica = spec.demo("--tokens", 10).demo("--token-gap-ms", 5).demo("--latency-ms", 10).start().await;
    events.next(&replica.id, "health_status: healthy", SystemTime::UNIX_EPOCH).await;
    replica
}

/// The figures of a run, for a note.
fn summary(samples: &[Sample], begun: SystemTime) -> String {
    let served = samples.iter().filter(|sample| sample.was_served()).count();
    let refused = samples.iter().filter(|sample| sample.outcome == Outcome::Refused).count();
    let mut names: Vec<&str> = samples
        .iter()
        .filter_map(|sample| match &sample.outcome {
            Outcome::Served { backend } => Some(backend.as_str()),
            _ => None,
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    let took = begun.elapsed().unwrap_or_default().as_secs_f64();
    format!(
        "{} requests in {took:.1} s, every second one streamed, answered by {} containers; {refused} told to come back, {} failed",
        samples.len(),
        names.len(),
        samples.len() - served - refused
    )
}

// === Compose ===

/// Either generation of Compose.
enum Compose {
    Plugin,
    Standalone,
}

impl Compose {
    async fn find() -> Option<Self> {
        if try_docker(["compose", "version"]).await.is_ok() {
            return Some(Self::Plugin);
        }
        let mut command = Command::new("docker-compose");
        command.arg("version");
        run(command, "").await.is_ok().then_some(Self::Standalone)
    }

    async fn up(&self, dir: &Path, project: &str, recreate: bool) {
        let mut command = match self {
            Self::Plugin => {
                let mut command = Command::new("docker");
                command.arg("compose");
                command
            }
            Self::Standalone => Command::new("docker-compose"),
        };
        command.current_dir(dir).args(["--project-name", project, "up", "--detach", "--scale", "llm=2"]);
        if recreate {
            command.arg("--force-recreate");
        }
        run(command, "").await.unwrap();
    }
}

fn write_compose_file(lab: &Lab, dir: &Path, net: &str, model: &str) {
    let [run, case] = lab.ownership_labels().map(|(key, value)| format!("      {key}: \"{value}\"\n"));
    // JSON strings are YAML strings. The container names itself by its host name, as it has no other of its own.
    let file = format!(
        "version: \"2.4\"\n\
         services:\n\
         \x20 llm:\n\
         \x20   image: {image:?}\n\
         \x20   command: [demo-backend, --port, \"8000\", --model, {model:?}, --tokens, \"10\", --token-gap-ms, \"5\"]\n\
         \x20   stop_grace_period: 20s\n\
         \x20   labels:\n\
         \x20     inference.enable: \"true\"\n\
         {run}{case}\
         networks:\n\
         \x20 default:\n\
         \x20   external: true\n\
         \x20   name: {net:?}\n",
        image = lab.backend_image(),
    );
    std::fs::write(dir.join("docker-compose.yml"), file).unwrap();
}
