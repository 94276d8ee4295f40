//! The proxy under test, in a container or as a process on this machine.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use http::{Method, StatusCode};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
};

use super::{
    client::{self, Answer, Broken, Reply},
    engine::{Lab, docker, engine_socket, inspect, run, try_docker},
    forwarder::Forwarder,
    second::SecondEngine,
    wait::eventually,
};

/// Where the engine's socket, or the directory of a forwarder's, appears in a proxy's container.
const MOUNTED: &str = "/run/engine";
/// How long a proxy may take to become ready, with the containers of other tests on the same engine.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// How long the table may take to show what a test has just done.
const SETTLED_WITHIN: Duration = Duration::from_secs(10);

/// A proxy to be started. Built up from [`Lab::proxy`].
#[must_use = "nothing runs before `in_container` or `on_host`"]
pub(crate) struct ProxySpec<'l> {
    lab: &'l Lab,
    env: Vec<(String, String)>,
    networks: Vec<String>,
    run_args: Vec<String>,
    /// Directory with the socket `docker.sock` to be mounted instead of the engine's.
    socket_dir: Option<String>,
}

/// A proxy that was started.
pub(crate) struct Proxy {
    /// Where it listens.
    pub(crate) addr: SocketAddr,
    runs: Runs,
}

enum Runs {
    Container { id: String },
    Process { child: Box<Child>, log: Arc<Mutex<String>> },
}

// === impl ProxySpec ===

impl<'l> ProxySpec<'l> {
    pub(crate) fn new(lab: &'l Lab) -> Self {
        Self { lab, env: Vec::new(), networks: Vec::new(), run_args: Vec::new(), socket_dir: None }
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// In a container: connects to this network; may be repeated.
    pub(crate) fn network(mut self, name: &str) -> Self {
        self.networks.push(name.to_owned());
        self
    }

    /// In a container: adds an argument of `docker run`.
    pub(crate) fn run_arg(mut self, arg: &str) -> Self {
        self.run_args.push(arg.to_owned());
        self
    }

    /// Reaches the engine through `forwarder`.
    pub(crate) fn through(mut self, forwarder: &Forwarder) -> Self {
        self.socket_dir = forwarder.dir().map(|dir| dir.display().to_string());
        self.env("DOCKER_HOST", forwarder.docker_host())
    }

    /// Starts it as a container, with the engine's socket mounted.
    pub(crate) async fn in_container(self) -> Proxy {
        let mut args: Vec<String> = ["create", "--no-healthcheck", "--name"].map(String::from).into();
        args.push(self.lab.name(&format!("proxy{}", fastrand::u32(..))));
        args.extend(self.lab.ownership());
        // A socket file goes stale when the engine restarts and a directory does not, so both ways are in use here.
        let (mount, host) = match &self.socket_dir {
            Some(dir) => (format!("{dir}:{MOUNTED}"), format!("unix://{MOUNTED}/docker.sock")),
            None => (format!("{}:{MOUNTED}.sock", engine_socket().display()), format!("unix://{MOUNTED}.sock")),
        };
        args.extend(["--volume".to_owned(), mount]);
        // The engine's socket belongs to root, whatever user the image names. An argument of the test's comes later and
        // wins.
        args.extend(["--user", "0:0"].map(String::from));
        for (name, value) in self.env.iter().filter(|(name, _)| name != "DOCKER_HOST") {
            args.extend(["--env".to_owned(), format!("{name}={value}")]);
        }
        args.extend(["--env".to_owned(), format!("DOCKER_HOST={host}")]);
        if let Some(first) = self.networks.first() {
            args.extend(["--network".to_owned(), first.clone()]);
        }
        args.extend(self.run_args);
        args.extend([self.lab.proxy_image().to_owned(), "serve".to_owned()]);
        let id = docker(args).await;
        for network in self.networks.iter().skip(1) {
            docker(["network", "connect", network, &id]).await;
        }
        docker(["start", &id]).await;
        let ips = inspect(&id, "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}").await;
        let ip = ips.split_whitespace().next().unwrap_or_else(|| panic!("the proxy ended at once: {id}"));
        Proxy { addr: SocketAddr::new(ip.parse().unwrap(), 8080), runs: Runs::Container { id } }
    }

    /// Starts it as a process on this machine, on a free loopback port, with no environment but the test's.
    pub(crate) async fn on_host(self) -> Proxy {
        let addr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), free_port());
        let command = Command::new(self.lab.binary());
        self.run(command, addr, &engine_socket())
    }

    /// Starts it as a process in the network namespace of `second`, which it watches.
    pub(crate) async fn beside(self, second: &SecondEngine) -> Proxy {
        let command = second.command(self.lab.binary());
        self.run(command, second.proxy_addr(), &second.socket())
    }

    /// Starts it by `command`, which runs the binary somewhere else, to listen at `addr`.
    pub(crate) fn with(self, command: Command, addr: SocketAddr) -> Proxy {
        self.run(command, addr, &engine_socket())
    }

    fn run(self, mut command: Command, addr: SocketAddr, engine: &Path) -> Proxy {
        command.arg("serve").env_clear();
        command.env("PROXY_PORT", addr.port().to_string()).env("PROXY_BIND", addr.ip().to_string());
        command.env("DOCKER_HOST", format!("unix://{}", engine.display()));
        command.envs(self.env);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.lab.binary().display()));
        let log = Arc::new(Mutex::new(String::new()));
        record(child.stdout.take().unwrap(), &log);
        record(child.stderr.take().unwrap(), &log);
        Proxy { addr, runs: Runs::Process { child: Box::new(child), log } }
    }
}

// === impl Proxy ===

impl Proxy {
    /// Waits for `/readyz`.
    pub(crate) async fn ready(self) -> Self {
        let ready = async || self.readyz().await.is_ok_and(|status| status == StatusCode::OK).then_some(());
        eventually("/readyz answers 200", READY_WITHIN, ready).await;
        self
    }

    /// What `/readyz` answers.
    pub(crate) async fn readyz(&self) -> Result<StatusCode, Broken> {
        Ok(self.get("/readyz").await?.status)
    }

    /// `GET path`.
    pub(crate) async fn get(&self, path: &str) -> Result<Answer, Broken> {
        client::get(self.addr, path).await
    }

    /// A whole chat completion.
    pub(crate) async fn chat(&self, model: &str) -> Result<Answer, Broken> {
        let body = client::chat_body(model, false);
        client::ask(self.addr, Method::POST, "/v1/chat/completions", Some(&body), client::PATIENCE).await
    }

    /// The head of a streamed chat completion.
    pub(crate) async fn stream(&self, model: &str) -> Reply {
        let body = client::chat_body(model, true);
        let reply = client::send(self.addr, Method::POST, "/v1/chat/completions", Some(&body)).await;
        let reply = reply.unwrap_or_else(|broken| panic!("stream of {model}: {broken}"));
        assert_eq!(reply.status, StatusCode::OK, "stream of {model}");
        reply
    }

    /// The ids in `/v1/models`.
    ///
    /// # Panics
    /// When there is no such answer: then nothing can be said about what is listed.
    pub(crate) async fn models(&self) -> BTreeSet<String> {
        self.try_models().await.expect("/v1/models must answer")
    }

    /// As [`models`](Self::models), for a proxy that may not listen yet.
    pub(crate) async fn try_models(&self) -> Option<BTreeSet<String>> {
        Some(ids(&self.get("/v1/models").await.ok()?.json()))
    }

    /// Whether `/v1/models` has this one.
    pub(crate) async fn lists(&self, model: &str) -> bool {
        self.models().await.contains(model)
    }

    /// Waits until `/v1/models` has this one.
    pub(crate) async fn until_lists(&self, model: &str) {
        let listed = async || self.try_models().await?.contains(model).then_some(());
        eventually(&format!("{model} is listed"), SETTLED_WITHIN, listed).await;
    }

    /// Waits until `/v1/models` has this one no longer; returns when that was seen.
    pub(crate) async fn until_unlisted(&self, model: &str) -> SystemTime {
        let gone = async || (!self.lists(model).await).then(SystemTime::now);
        eventually(&format!("{model} is no longer listed"), SETTLED_WITHIN, gone).await
    }

    /// Waits until a request for `model` is answered with 200, and returns that answer.
    pub(crate) async fn until_serves(&self, model: &str) -> Answer {
        self.until_answers(model, StatusCode::OK, SETTLED_WITHIN).await
    }

    /// Waits until a request for `model` is answered with 503, and returns that answer.
    pub(crate) async fn until_refuses(&self, model: &str) -> Answer {
        self.until_answers(model, StatusCode::SERVICE_UNAVAILABLE, SETTLED_WITHIN).await
    }

    /// Waits until a request for `model` is answered with `status`, and returns that answer.
    pub(crate) async fn until_answers(&self, model: &str, status: StatusCode, within: Duration) -> Answer {
        let what = format!("a request for {model} is answered with {status}");
        eventually(&what, within, async || self.chat(model).await.ok().filter(|answer| answer.status == status)).await
    }

    /// Why `/status` says that a container, found by its name or id, is not routed, what to change, and what is odd about its
    /// labels; empty
    /// when it is routed and all is well, `None` when it is not there.
    pub(crate) async fn reason_for(&self, container: &str) -> Option<String> {
        let status = self.get("/status").await.ok()?.json();
        let containers = status["containers"].as_array()?;
        let found = containers.iter().find(|entry| entry["name"] == container || entry["id"] == container)?;
        let problems = found["problems"].as_array().into_iter().flatten();
        let texts = [&found["reason"], &found["advice"]].into_iter().chain(problems).filter_map(Value::as_str);
        Some(texts.collect::<Vec<_>>().join("; "))
    }

    /// Waits until [`reason_for`](Self::reason_for) a container has one of `words` in it, in any case, and returns it.
    pub(crate) async fn until_reported(&self, container: &str, words: &[&str]) -> String {
        let what = format!("/status says {words:?} about {container}");
        eventually(&what, SETTLED_WITHIN, async || {
            let reason = self.reason_for(container).await?;
            let lower = reason.to_lowercase();
            words.iter().any(|word| lower.contains(&word.to_lowercase())).then_some(reason)
        })
        .await
    }

    /// The values of a metric's series whose labels contain `label`, as `/metrics` writes them.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> Vec<f64> {
        let Ok(answer) = self.get("/metrics").await else {
            return Vec::new();
        };
        let text = answer.text();
        let series = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        series.filter_map(|line| line.rsplit_once(' ')?.1.parse().ok()).collect()
    }

    /// Everything it has logged so far.
    pub(crate) async fn log(&self) -> String {
        match &self.runs {
            Runs::Process { log, .. } => log.lock().unwrap().clone(),
            Runs::Container { id } => {
                // `docker logs` writes the container's standard error to its own; both are the log.
                let mut command = Command::new("sh");
                command.args(["-c", "docker logs \"$0\" 2>&1", id]);
                run(command, "").await.unwrap_or_default()
            }
        }
    }

    /// Waits until a line of the log has all of `words`, in any case, and returns such lines.
    pub(crate) async fn until_logged(&self, words: &[&str]) -> Vec<String> {
        eventually(&format!("a log line with {words:?}"), SETTLED_WITHIN, async || {
            let lines = lines_with(&self.log().await, words);
            (!lines.is_empty()).then_some(lines)
        })
        .await
    }

    /// The lines of the log that have all of `words`, in any case.
    pub(crate) async fn logged(&self, words: &[&str]) -> Vec<String> {
        lines_with(&self.log().await, words)
    }

    /// The container's id.
    ///
    /// # Panics
    /// When it is a process.
    pub(crate) fn container(&self) -> &str {
        match &self.runs {
            Runs::Container { id } => id,
            Runs::Process { .. } => panic!("this proxy has no container"),
        }
    }

    /// Its process on this machine.
    pub(crate) async fn pid(&self) -> u32 {
        match &self.runs {
            Runs::Container { id } => inspect(id, "{{.State.Pid}}").await.parse().unwrap(),
            Runs::Process { child, .. } => child.id().expect("the proxy must be running"),
        }
    }

    /// A line of `/proc/<pid>/status` in KiB, such as `VmRSS` or `VmHWM`.
    pub(crate) async fn memory_kib(&self, line: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid().await);
        let text = std::fs::read_to_string(Path::new(&path)).unwrap();
        let found = text.lines().find_map(|row| row.strip_prefix(line)?.strip_prefix(':'));
        found.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or_else(|| panic!("{line}: {text}"))
    }

    /// Sends a signal by name, such as `TERM`.
    pub(crate) async fn signal(&self, name: &str) {
        match &self.runs {
            Runs::Container { id } => drop(docker(["kill", "--signal", name, id]).await),
            Runs::Process { .. } => {
                let mut command = Command::new("kill");
                command.args(["-s", name, &self.pid().await.to_string()]);
                run(command, "").await.unwrap();
            }
        }
    }

    /// Waits for the end of its process.
    ///
    /// # Panics
    /// When it is a container, or does not end in time.
    pub(crate) async fn ended(&mut self, within: Duration) -> ExitStatus {
        let Runs::Process { child, .. } = &mut self.runs else { panic!("this proxy is a container") };
        let ended = tokio::time::timeout(within, child.wait()).await;
        ended.unwrap_or_else(|_| panic!("the proxy did not end within {within:?}")).unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let log = match &self.runs {
            _ if !std::thread::panicking() => return,
            Runs::Process { log, .. } => log.lock().unwrap().clone(),
            Runs::Container { id } => {
                let output = std::process::Command::new("docker").args(["logs", id]).output();
                output
                    .map(|o| [o.stdout, o.stderr].map(|part| String::from_utf8_lossy(&part).into_owned()).concat())
                    .unwrap_or_default()
            }
        };
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(60)..];
        eprintln!("--- the end of the proxy's log ---\n{}\n---", last.join("\n"));
    }
}

// === helpers ===

/// A TCP port of this machine that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Whether the container's main process runs.
pub(crate) async fn is_running(id: &str) -> bool {
    try_docker(["inspect", "--format", "{{.State.Status}}", id]).await.is_ok_and(|status| status == "running")
}

fn record(output: impl AsyncRead + Send + Unpin + 'static, log: &Arc<Mutex<String>>) {
    let log = Arc::clone(log);
    let mut lines = BufReader::new(output).lines();
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            let mut log = log.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        }
    });
}

fn lines_with(log: &str, words: &[&str]) -> Vec<String> {
    let has_all = |line: &&str| {
        let line = line.to_lowercase();
        words.iter().all(|word| line.contains(&word.to_lowercase()))
    };
    log.lines().filter(has_all).map(String::from).collect()
}

fn ids(list: &Value) -> BTreeSet<String> {
    let models = list["data"].as_array().unwrap_or_else(|| panic!("no list of models: {list}"));
    models.iter().filter_map(|model| Some(model["id"].as_str()?.to_owned())).collect()
}
