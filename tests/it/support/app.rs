//! The only file that knows how the product is called: starts it in this process, or in one of its own where its memory
//! is to be measured, feeds it containers by hand, and reads its metrics.

use std::{
    collections::BTreeMap,
    env,
    io::Read,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use inference_proxy::{
    app::App,
    base::config::{Config, DockerEndpoint},
    control::discovery::{
        Change, Discovery, DiscoveryError, Looks,
        docker::DockerDiscovery,
        fixed::{self, EndpointBuilder, FixedHandle},
    },
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

pub(crate) use inference_proxy::control::discovery::Health;

use super::{
    client::{Answer, Client, Request},
    upstream::Upstream,
    wait::{Gate, eventually, soon},
};

/// What every proxy of the suite is configured with, unless the test says otherwise.
const KNOBS: [(&str, &str); 5] = [
    ("PROXY_PORT", "0"),
    ("PROXY_BIND", "127.0.0.1"),
    ("PROXY_DRAIN_TIMEOUT", "5s"),
    ("PROXY_SETTLE", "1s"),
    // No test may depend on a refresh that happens to come by; those that need one ask for it.
    ("PROXY_MODELS_REFRESH", "1h"),
];

/// A proxy in this process.
pub(crate) struct TestApp {
    app: App,
    discovery: FixedHandle,
    /// How many backends should be in rotation by now.
    expected: AtomicUsize,
}

/// A container, as discovery would report it.
#[derive(Clone)]
pub(crate) struct Spec {
    name: &'static str,
    role: &'static str,
    is_stopped_first: bool,
    addr: SocketAddr,
    labels: Vec<(&'static str, String)>,
    image: Option<&'static str>,
    health: Health,
    incarnation: i64,
}

/// A proxy in a process of its own, which holds nothing else: its memory and its files are the proxy's.
pub(crate) struct ProxyProcess {
    child: Child,
    pub(crate) addr: SocketAddr,
    /// Kept open: after a minute the test harness in the child has something to say, and dies if nobody could hear it.
    _says: Lines<BufReader<ChildStdout>>,
}

/// A discovery that has one thing to say, and takes its time.
struct LateScan {
    gate: Gate,
    found: Vec<EndpointBuilder>,
}

// === impl LateScan ===

impl Discovery for LateScan {
    fn name(&self) -> &'static str {
        "late"
    }

    fn changes(self: Box<Self>, _looks: Looks) -> BoxStream<'static, Result<Change, DiscoveryError>> {
        let scan = async move {
            self.gate.passed().await;
            Ok(Change::Reset(self.found.into_iter().map(Into::into).collect()))
        };
        stream::once(scan).chain(stream::pending()).boxed()
    }
}

// === impl Spec ===

impl Spec {
    /// A healthy container, in its first incarnation.
    pub(crate) fn of(upstream: &Upstream) -> Self {
        Self::at(upstream.name, upstream.addr)
    }

    pub(crate) fn at(name: &'static str, addr: SocketAddr) -> Self {
        Self {
            name,
            role: name,
            is_stopped_first: false,
            addr,
            labels: Vec::new(),
            image: None,
            health: Health::Healthy,
            incarnation: 1,
        }
    }

    pub(crate) fn label(mut self, name: &'static str, value: impl ToString) -> Self {
        self.labels.push((name, value.to_string()));
        self
    }

    pub(crate) fn image(mut self, image: &'static str) -> Self {
        self.image = Some(image);
        self
    }

    /// Sets what it stands for; its name, if not set.
    pub(crate) fn role(mut self, role: &'static str) -> Self {
        self.role = role;
        self
    }

    /// Makes it one of a Compose service.
    pub(crate) fn service(self, role: &'static str) -> Self {
        Self { is_stopped_first: true, ..self.role(role) }
    }

    pub(crate) fn health(mut self, health: Health) -> Self {
        self.health = health;
        self
    }

    pub(crate) fn incarnation(mut self, incarnation: i64) -> Self {
        self.incarnation = incarnation;
        self
    }

    fn build(self) -> EndpointBuilder {
        let mut endpoint =
            fixed::endpoint(self.name, self.addr).role(self.role).health(self.health).incarnation(self.incarnation);
        for (name, value) in &self.labels {
            endpoint = endpoint.label(name, value);
        }
        if self.is_stopped_first {
            endpoint = endpoint.stopped_first();
        }
        match self.image {
            Some(image) => endpoint.image(image),
            None => endpoint,
        }
    }
}

// === impl TestApp ===

impl TestApp {
    /// A proxy that has seen all containers there are: none.
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same with these variables set.
    pub(crate) async fn start_with(knobs: &[(&str, &str)]) -> Self {
        let (discovery, handle) = fixed::channel();
        let app = Self::start_on(knobs, Box::new(discovery), handle).await;
        eventually("/readyz says 200", async || app.ask(&Request::get("/readyz")).await.status == 200).await;
        app
    }

    /// A proxy whose first scan ends when the gate opens, and finds these containers.
    pub(crate) async fn start_with_late_scan(gate: &Gate, found: impl IntoIterator<Item = Spec>) -> Self {
        let found = found.into_iter().map(Spec::build).collect();
        // Its handle reports to nobody.
        let (_, handle) = fixed::channel();
        Self::start_on(&[], Box::new(LateScan { gate: gate.clone(), found }), handle).await
    }

    /// A proxy that watches the Docker Engine at `host`.
    pub(crate) async fn start_on_engine(host: &str, knobs: &[(&str, &str)]) -> Self {
        let endpoint = DockerEndpoint { host: Some(host.to_owned()), ..DockerEndpoint::default() };
        let discovery = DockerDiscovery::new(endpoint, None, Vec::new());
        Self::start_watching(Box::new(discovery), knobs).await
    }

    /// A proxy that watches what this source reports.
    pub(crate) async fn start_watching(discovery: Box<dyn Discovery>, knobs: &[(&str, &str)]) -> Self {
        // Its handle reports to nobody.
        let (_, handle) = fixed::channel();
        Self::start_on(knobs, discovery, handle).await
    }

    /// Waits until the proxy says that it cannot go on, and why; then ends it.
    pub(crate) async fn gives_up(mut self) -> String {
        let ended = soon("the proxy fails", self.app.failed()).await;
        soon("the proxy has given up", self.app.give_up()).await;
        ended.to_string()
    }

    async fn start_on(knobs: &[(&str, &str)], discovery: Box<dyn Discovery>, handle: FixedHandle) -> Self {
        let mut vars = BTreeMap::from(KNOBS);
        vars.extend(knobs.iter().copied());
        let config = Config::from_vars(vars).unwrap().0;
        let app = App::start(config, discovery).await.unwrap();
        Self { app, discovery: handle, expected: AtomicUsize::new(0) }
    }

    /// A proxy that routes to these backends.
    pub(crate) async fn with(upstreams: &[&Upstream]) -> Self {
        Self::start_with_backends(&[], upstreams).await
    }

    pub(crate) async fn start_with_backends(knobs: &[(&str, &str)], upstreams: &[&Upstream]) -> Self {
        let app = Self::start_with(knobs).await;
        for upstream in upstreams {
            app.add(Spec::of(upstream)).await;
        }
        app
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.app.data_addr()
    }

    pub(crate) fn admin_addr(&self) -> Option<SocketAddr> {
        self.app.admin_addr()
    }

    /// Announces a new container and waits until it is in rotation.
    pub(crate) async fn add(&self, spec: Spec) {
        let name = spec.name;
        self.announce(spec).await;
        let expected = self.expected.fetch_add(1, Ordering::Relaxed) + 1;
        self.rotation_is(expected, &format!("{name} in rotation")).await;
    }

    /// Announces a container, or a change of one, and waits for nothing.
    pub(crate) async fn announce(&self, spec: Spec) {
        self.discovery.upsert(spec.build()).await;
    }

    /// The container has been told to stop.
    pub(crate) async fn stopping(&self, name: &str) {
        self.discovery.stopping(name).await;
    }

    /// The container has died.
    pub(crate) async fn ended(&self, name: &str) {
        self.discovery.ended(name).await;
    }

    /// These are all containers that there are.
    pub(crate) async fn reset(&self, all: impl IntoIterator<Item = Spec>) {
        self.discovery.reset(all.into_iter().map(Spec::build).collect()).await;
    }

    /// Waits until exactly `n` backends are in rotation.
    pub(crate) async fn rotation_is(&self, n: usize, what: &str) {
        self.expected.store(n, Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let wanted = n as f64;
        eventually(format!("{what}: {n} backends active"), async || {
            self.metric("proxy_backends_active", &[]).await == Some(wanted)
        })
        .await;
    }

    /// Waits until `GET /v1/models` lists exactly these, in this order.
    pub(crate) async fn models_are(&self, ids: &[&str]) {
        eventually(format!("/v1/models lists {ids:?}"), async || {
            let json = self.ask(&Request::get("/v1/models")).await.json();
            json["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).eq(ids.iter().copied())
        })
        .await;
    }

    /// One request on a connection of its own.
    pub(crate) async fn ask(&self, request: &Request) -> Answer {
        self.client().await.ask(request).await
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(self.addr()).await
    }

    /// How many requests the proxy says it has under way at this backend.
    pub(crate) async fn inflight(&self, backend: &str, model: &str) -> Option<f64> {
        self.metric("proxy_backend_inflight", &[("backend", backend), ("model", model)]).await
    }

    /// Waits until the proxy says that it has `n` requests under way at this backend.
    pub(crate) async fn inflight_is(&self, backend: &str, model: &str, n: f64) {
        eventually(format!("{n} requests in flight at {backend} for {model}"), async || {
            self.inflight(backend, model).await == Some(n)
        })
        .await;
    }

    /// Waits until `n` requests stand in line for this model.
    pub(crate) async fn waiting_is(&self, model: &str, n: f64) {
        eventually(format!("{n} requests wait for {model}"), async || {
            self.metric("proxy_queue_depth", &[("model", model)]).await == Some(n)
        })
        .await;
    }

    /// The sum of all series of this name that have all of these labels; none when there is no such series.
    pub(crate) async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        metric_at(self.admin_addr().unwrap_or_else(|| self.addr()), name, labels).await
    }

    /// Ends the proxy as SIGTERM does.
    pub(crate) async fn shutdown(self) {
        soon("the proxy has shut down", self.app.shutdown()).await;
    }
}

async fn metric_at(addr: SocketAddr, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let page = Client::connect(addr).await.ask(&Request::get("/metrics")).await.text();
    sum_of_series(&page, name, labels)
}

fn sum_of_series(page: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    page.lines()
        .filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, rest) = series.split_once('{').unwrap_or((series, ""));
            let matches = labels.iter().all(|(key, value)| rest.contains(&format!("{key}=\"{value}\"")));
            (found == name && matches).then(|| value.parse::<f64>().unwrap())
        })
        .reduce(|a, b| a + b)
}

// === impl ProxyProcess ===

/// Variables that tell the child what to be.
const CHILD_BACKENDS: &str = "IT_PROXY_BACKENDS";
const CHILD_KNOBS: &str = "IT_PROXY_KNOBS";
const CHILD_LOGS: &str = "IT_PROXY_LOGS";
const CHILD_FILES: &str = "IT_PROXY_FILES";
const CHILD_SAYS: &str = "proxy listens on ";

impl ProxyProcess {
    /// Starts this very test binary again, with nothing to do but `proxy_process` below.
    pub(crate) async fn start(knobs: &[(&str, &str)], upstreams: &[&Upstream]) -> Self {
        Self::spawn(knobs, upstreams, None, None).await
    }

    /// The same, in a process that may have so many files open.
    pub(crate) async fn start_with_files(files: u64, knobs: &[(&str, &str)], upstreams: &[&Upstream]) -> Self {
        Self::spawn(knobs, upstreams, None, Some(files)).await
    }

    /// The same, with everything there is to log in this file.
    pub(crate) async fn start_logged(knobs: &[(&str, &str)], upstreams: &[&Upstream], log: &Path) -> Self {
        Self::spawn(knobs, upstreams, Some(log), None).await
    }

    async fn spawn(knobs: &[(&str, &str)], upstreams: &[&Upstream], log: Option<&Path>, files: Option<u64>) -> Self {
        let backends: Vec<String> = upstreams.iter().map(|one| format!("{}={}", one.name, one.addr)).collect();
        let knobs: Vec<String> = knobs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut command = Command::new(env::current_exe().unwrap());
        if let Some(log) = log {
            command.env(CHILD_LOGS, "1").stderr(std::fs::File::create(log).unwrap());
        }
        if let Some(files) = files {
            command.env(CHILD_FILES, files.to_string());
        }
        let mut child = command
            .args(["support::app::proxy_process", "--exact", "--ignored", "--nocapture"])
            .env(CHILD_BACKENDS, backends.join(","))
            .env(CHILD_KNOBS, knobs.join(","))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let addr = soon("the proxy process listens", async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the child must say where it listens");
                if let Some(addr) = line.strip_prefix(CHILD_SAYS) {
                    return addr.parse().unwrap();
                }
            }
        })
        .await;
        Self { child, addr, _says: lines }
    }

    /// The sum of all series of this name that have all of these labels; none when there is no such series.
    pub(crate) async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        metric_at(self.addr, name, labels).await
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// How many sockets it holds open.
    pub(crate) fn open_sockets(&self) -> usize {
        self.descriptors().filter(|target| target.starts_with("socket:")).count()
    }

    /// Bytes of memory in use now.
    pub(crate) fn resident(&self) -> u64 {
        self.status_kib("VmRSS:") * 1024
    }

    /// The most bytes of memory that were ever in use.
    pub(crate) fn peak_resident(&self) -> u64 {
        self.status_kib("VmHWM:") * 1024
    }

    /// Regular files that the process holds open, deleted ones too.
    pub(crate) fn open_files(&self) -> Vec<String> {
        self.descriptors().filter(|target| target.starts_with('/') && !target.starts_with("/dev/")).collect()
    }

    /// Lets it open no descriptor, unless it closes another one first.
    pub(crate) fn open_no_more_descriptors(&self) {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let open: std::collections::BTreeSet<u64> =
            entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        let first_free = (0..).find(|number| !open.contains(number)).unwrap();
        self.limit_descriptors(first_free);
    }

    /// Takes that back.
    pub(crate) fn open_descriptors_again(&self) {
        self.limit_descriptors(1_024);
    }

    fn limit_descriptors(&self, limit: u64) {
        let pid = rustix::process::Pid::from_raw(self.pid().cast_signed());
        let nofile = rustix::process::Resource::Nofile;
        let maximum = rustix::process::getrlimit(nofile).maximum;
        rustix::process::prlimit(pid, nofile, rustix::process::Rlimit { current: Some(limit), maximum }).unwrap();
    }

    fn descriptors(&self) -> impl Iterator<Item = String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        entries
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
    }

    fn status_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn pid(&self) -> u32 {
        self.child.id().expect("the proxy process must be alive")
    }
}

/// Not a test: the body of `ProxyProcess`. It serves until its standard input ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by other tests, as the proxy whose memory they measure"]
#[expect(clippy::disallowed_methods, reason = "the environment is how its parent speaks to this process")]
async fn proxy_process() {
    let Ok(backends) = env::var(CHILD_BACKENDS) else { return };
    let knobs = env::var(CHILD_KNOBS).unwrap();
    let knobs: Vec<(&str, &str)> = knobs.split(',').filter_map(|knob| knob.split_once('=')).collect();
    if env::var(CHILD_LOGS).is_ok() {
        inference_proxy::telemetry::log::init("trace", None).unwrap();
    }
    if let Ok(files) = env::var(CHILD_FILES) {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let files = files.parse().ok();
        setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files }).unwrap();
    }
    let app = TestApp::start_with(&knobs).await;
    for backend in backends.split(',') {
        let (name, addr) = backend.split_once('=').unwrap();
        app.add(Spec::at(name.to_owned().leak(), addr.parse().unwrap())).await;
    }
    // On a line of its own, as the test harness has begun one.
    println!("\n{CHILD_SAYS}{}", app.addr());
    let parent_is_gone = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    parent_is_gone.await.unwrap().unwrap();
    soon("the proxy has shut down", tokio::time::timeout(Duration::from_secs(1), app.shutdown())).await.ok();
    inference_proxy::telemetry::log::flush();
}

#[test]
fn series_are_summed_by_label() {
    let page = "# TYPE a gauge\na{backend=\"x\",model=\"m\"} 1\na{backend=\"y\",model=\"m\"} 2\nab 7\nb 3\n";
    assert_eq!(sum_of_series(page, "a", &[("model", "m")]), Some(3.0));
    assert_eq!(sum_of_series(page, "a", &[("backend", "y"), ("model", "m")]), Some(2.0));
    assert_eq!(sum_of_series(page, "b", &[]), Some(3.0));
    assert_eq!(sum_of_series(page, "c", &[]), None);
}
