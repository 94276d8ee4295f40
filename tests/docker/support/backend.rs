//! Inference servers in containers: demo backends that can be broken on purpose.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use serde_json::Value;

use super::{
    client,
    engine::{Lab, docker, inspect},
    wait::eventually,
};

/// Where the demo backend listens when the test does not say.
const PORT: u16 = 8000;

/// A container to be started. Built up from [`Lab::backend`]; without further ado it is opted in on port 8000, has no
/// HEALTHCHECK, announces one model that no other container has, and answers at once.
#[must_use = "nothing runs before `start`"]
pub(crate) struct BackendSpec<'l> {
    lab: &'l Lab,
    name: String,
    models: Vec<String>,
    labels: Vec<(String, String)>,
    networks: Vec<String>,
    health_interval: Option<Duration>,
    port: u16,
    run_args: Vec<String>,
    options: BTreeMap<&'static str, String>,
}

/// A container that was started. It is removed with its lab.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    /// The container's id, in full.
    pub(crate) id: String,
    /// The container's name, also what it calls itself in `x-demo-backend`.
    pub(crate) name: String,
    /// What it announced when it was started.
    pub(crate) models: Vec<String>,
    port: u16,
}

// === impl BackendSpec ===

impl<'l> BackendSpec<'l> {
    pub(crate) fn new(lab: &'l Lab, role: &str) -> Self {
        Self {
            lab,
            name: lab.name(role),
            models: Vec::new(),
            labels: vec![("inference.enable".to_owned(), "true".to_owned())],
            networks: Vec::new(),
            health_interval: None,
            port: PORT,
            run_args: Vec::new(),
            options: BTreeMap::from([("--tokens", "1".to_owned()), ("--token-gap-ms", "0".to_owned())]),
        }
    }

    /// Announces this model; may be repeated. Without any, one named like the container.
    pub(crate) fn model(mut self, model: &str) -> Self {
        self.models.push(model.to_owned());
        self
    }

    /// Adds a label.
    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Takes away every label of ours.
    pub(crate) fn unlabelled(mut self) -> Self {
        self.labels.clear();
        self
    }

    /// Connects to this network; may be repeated. Without any, the default bridge.
    pub(crate) fn network(mut self, name: &str) -> Self {
        self.networks.push(name.to_owned());
        self
    }

    /// Has a HEALTHCHECK that runs this often and fails at once.
    pub(crate) fn healthcheck(mut self, interval: Duration) -> Self {
        self.health_interval = Some(interval);
        self
    }

    /// Listens here. Does not tell the proxy: that takes a label or an exposed port.
    pub(crate) fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Adds an argument of `docker run`.
    pub(crate) fn run_arg(mut self, arg: &str) -> Self {
        self.run_args.push(arg.to_owned());
        self
    }

    /// Sets an option of the demo backend.
    pub(crate) fn demo(mut self, option: &'static str, value: impl ToString) -> Self {
        self.options.insert(option, value.to_string());
        self
    }

    /// Creates the container, connects it and starts it. Does not wait for the server in it.
    pub(crate) async fn start(mut self) -> Backend {
        if self.models.is_empty() {
            self.models.push(self.name.clone());
        }
        let mut args: Vec<String> = ["create", "--name", &self.name].map(String::from).into();
        args.extend(self.lab.ownership());
        for (key, value) in &self.labels {
            args.extend(["--label".to_owned(), format!("{key}={value}")]);
        }
        if let Some(first) = self.networks.first() {
            args.extend(["--network".to_owned(), first.clone()]);
        }
        match self.health_interval {
            Some(interval) => args.extend(["--health-interval".to_owned(), format!("{}ms", interval.as_millis())]),
            None => args.push("--no-healthcheck".to_owned()),
        }
        args.extend(self.run_args);
        args.push(self.lab.backend_image().to_owned());
        args.extend(["demo-backend", "--control", "--name", &self.name].map(String::from));
        self.options.entry("--port").or_insert_with(|| self.port.to_string());
        for (option, value) in self.options {
            args.extend([option.to_owned(), value]);
        }
        for model in &self.models {
            args.extend(["--model".to_owned(), model.clone()]);
        }
        let id = docker(args).await;
        for network in self.networks.iter().skip(1) {
            docker(["network", "connect", network, &id]).await;
        }
        docker(["start", &id]).await;
        Backend { id, name: self.name, models: self.models, port: self.port }
    }

    /// As [`start`](Self::start), and waits until the server in it answers.
    pub(crate) async fn up(self) -> Backend {
        let backend = self.start().await;
        backend.answers().await;
        backend
    }
}

// === impl Backend ===

impl Backend {
    /// Its only model, or the first of several.
    pub(crate) fn model(&self) -> &str {
        &self.models[0]
    }

    /// Changes its behaviour: `key=value&...` for `/_ctl`.
    pub(crate) async fn ctl(&self, query: &str) {
        self.fetch(&format!("/_ctl?{query}")).await;
    }

    /// Ends or breaks the process by `/_ctl`; there may be no answer.
    pub(crate) async fn crash(&self, query: &str) {
        let at = self.addr().await;
        let _ = client::get(at, &format!("/_ctl?{query}")).await;
    }

    /// What it has seen: `requests`, `in_flight`, `last_request`.
    pub(crate) async fn stats(&self) -> Value {
        self.fetch("/_stats").await
    }

    /// A header of the last inference request that it got.
    pub(crate) async fn last_header(&self, name: &str) -> Option<String> {
        let stats = self.stats().await;
        let headers = stats["last_request"]["headers"].as_array()?;
        let pair = headers.iter().find(|pair| pair[0].as_str().is_some_and(|key| key.eq_ignore_ascii_case(name)))?;
        Some(pair[1].as_str()?.to_owned())
    }

    /// Waits until its server answers.
    pub(crate) async fn answers(&self) {
        self.ctl("").await;
    }

    /// Its address on one network.
    pub(crate) async fn ip_on(&self, network: &str) -> IpAddr {
        let ip = inspect(&self.id, &format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}")).await;
        ip.parse().unwrap_or_else(|_| panic!("{} has no address on {network}: {ip:?}", self.name))
    }

    /// Where this machine reaches it: on any of its networks, or on loopback when it has none of its own.
    pub(crate) async fn addr(&self) -> SocketAddr {
        let ips = inspect(&self.id, "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}").await;
        let ip = ips.split_whitespace().find_map(|ip| ip.parse().ok()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        SocketAddr::new(ip, self.port)
    }

    async fn fetch(&self, path: &str) -> Value {
        let at = self.addr().await;
        let what = format!("{} answers {path}", self.name);
        eventually(&what, Duration::from_secs(10), async || client::get(at, path).await.ok()).await.json()
    }
}
