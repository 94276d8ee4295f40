//! Two proxies behind Traefik, as in compose.example.yml, are restarted one after the other, and no request is lost.

use std::time::{Duration, Instant};

use http::StatusCode;

use crate::support::{
    client,
    engine::{self, Lab, docker, engine_socket, inspect},
    example::{self, Service},
    load::{Load, failures},
    traefik::Traefik,
    wait::eventually,
};

/// Clients that keep sending, each as soon as its last request is done; every second request is streamed.
const CLIENTS: usize = 12;
const RESTARTS: usize = 8;
/// Fewer requests than this prove little.
const REQUESTS: usize = 1000;
/// How long a restarted proxy may take until it gets requests again.
const BACK_WITHIN: Duration = Duration::from_secs(60);

#[tokio::test]
async fn l13_rolling_restart_of_two_proxies_behind_traefik_loses_no_request() {
    let Some(lab) = engine::alone("l13t").await else { return };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let demo = example::service("demo-a").field("command");
    // Traefik breaks streams of a server that has answered before Traefik's own threads had their turn. They wait longer
    // for it here, among other tests, than where the example runs.
    assert!(demo.contains(r#"--latency-ms, "20""#), "{demo}");
    for role in ["a", "b"] {
        let spec = lab.backend(role).network(&net).model(&model).demo("--latency-ms", 60);
        spec.demo("--tokens", 10).demo("--token-gap-ms", 5).up().await;
    }
    let service = example::service("proxy");
    let proxies = [proxy(&lab, &net, "0", &service).await, proxy(&lab, &net, "1", &service).await];
    for proxy in &proxies {
        until_healthy(proxy).await;
    }
    let Some(traefik) = Traefik::start(&lab, &net).await else { return };
    let served = async || {
        let body = client::chat_body(&model, false);
        let (method, path) = (http::Method::POST, "/v1/chat/completions");
        let answer = client::ask(traefik.addr, method, path, Some(&body), client::PATIENCE).await.ok()?;
        (answer.status == StatusCode::OK).then_some(())
    };
    eventually("the model is served through Traefik", BACK_WITHIN, served).await;

    let begun = Instant::now();
    let load = Load::start_at(traefik.addr, &model, CLIENTS);
    for proxy in proxies.iter().cycle().take(RESTARTS) {
        docker(["restart", proxy]).await;
        until_healthy(proxy).await;
        let takes_part = async || (requests_at(proxy).await? > 0).then_some(());
        eventually("Traefik sends requests to the restarted proxy", BACK_WITHIN, takes_part).await;
    }
    let samples = load.stop().await;
    println!("l13: {RESTARTS} restarts in {:.1?}, {} requests through Traefik", begun.elapsed(), samples.len());
    assert!(samples.len() >= REQUESTS, "only {}", samples.len());
    assert_eq!(failures(&samples), "", "of {}", samples.len());
}

/// The times of the example fit each other: Traefik notices within the settle time, and Docker kills after the drain.
#[test]
fn l13_the_times_of_the_example_fit_each_other() {
    let service = example::service("proxy");
    let check = |what: &str| {
        example::seconds(
            &service.value("labels", &format!("traefik.http.services.inference.loadbalancer.healthcheck.{what}")),
        )
    };
    let env = |name: &str| example::seconds(&service.value("environment", name));
    let (settle, drain) = (env("PROXY_SETTLE"), env("PROXY_DRAIN_TIMEOUT"));
    assert!(check("interval") + check("timeout") < settle, "Traefik notices too late");
    assert!(example::seconds(&service.field("stop_grace_period")) > settle + drain, "Docker kills too early");
}

/// A proxy as the example has it, but with no port on this machine; Docker checks its health more often.
async fn proxy(lab: &Lab, net: &str, role: &str, service: &Service) -> String {
    let mut args: Vec<String> = ["create", "--network", net, "--name"].map(String::from).into();
    args.push(lab.name(&format!("proxy{role}")));
    args.extend(lab.ownership());
    args.extend(["--health-interval", "1s", "--user", "0:0"].map(String::from));
    let grace = example::seconds(&service.field("stop_grace_period"));
    args.extend(["--stop-timeout".to_owned(), grace.as_secs().to_string()]);
    args.extend(["--volume".to_owned(), format!("{}:/var/run/docker.sock", engine_socket().display())]);
    for (key, value) in service.pairs("labels") {
        args.extend(["--label".to_owned(), format!("{key}={value}")]);
    }
    for (name, value) in service.pairs("environment").iter().filter(|(name, _)| name.starts_with("PROXY_")) {
        args.extend(["--env".to_owned(), format!("{name}={value}")]);
    }
    args.extend([lab.proxy_image().to_owned(), "serve".to_owned()]);
    let id = docker(args).await;
    docker(["start", &id]).await;
    id
}

async fn until_healthy(proxy: &str) {
    let healthy = async || (inspect(proxy, "{{.State.Health.Status}}").await == "healthy").then_some(());
    eventually("Docker calls the proxy healthy", BACK_WITHIN, healthy).await;
}

/// How many requests this proxy has served since it started.
async fn requests_at(proxy: &str) -> Option<u64> {
    let ip = inspect(proxy, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}").await;
    let page = client::get(format!("{ip}:8080").parse().ok()?, "/metrics").await.ok()?.text();
    let served = page.lines().filter(|line| line.starts_with("proxy_requests_total{"));
    Some(served.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum())
}
