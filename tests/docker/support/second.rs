//! A second Docker Engine, in a network namespace of its own: it can be restarted, and configured as no shared engine may
//! be. It has a bridge `docker0`, containers, images and a containerd of its own; a pair of veth links it to this machine.
//!
//! Needs root, `ip` (iproute2) and `nsenter` (util-linux).

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command as Blocking, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::process::{Child, Command};

use super::{
    engine::{Lab, docker, run},
    wait::eventually,
};

/// How long the engine may take to answer, or to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where a proxy in the namespace listens.
const PROXY_PORT: u16 = 8080;
/// RFC 2544 reserves these for tests; each engine takes four of them.
const ADDRESSES: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const ADDRESS_BLOCKS: u32 = 1 << 15;

/// An engine that runs until this is dropped.
pub(crate) struct SecondEngine {
    dir: PathBuf,
    namespace: String,
    addr: Ipv4Addr,
    daemon: Child,
}

// === impl SecondEngine ===

impl SecondEngine {
    /// Starts an engine with these settings of `daemon.json` added to those that keep it apart.
    ///
    /// # Panics
    /// When the engine does not start: without root, `ip` or `nsenter`, for example. Its log is shown.
    pub(crate) async fn start(lab: &Lab, settings: Value) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = (std::process::id() * 8 + NUMBER.fetch_add(1, Ordering::Relaxed)) % ADDRESS_BLOCKS;
        let base = u32::from(ADDRESSES) + number * 4;
        let (here, addr) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        let dir = lab.scratch_dir("engine");
        let namespace = lab.name("engine");
        let (outer, inner) = (format!("ipt{number}o"), format!("ipt{number}i"));
        for line in [
            format!("netns add {namespace}"),
            format!("link add {outer} type veth peer name {inner} netns {namespace}"),
            format!("addr add {here}/30 dev {outer}"),
            format!("link set {outer} up"),
            format!("-n {namespace} addr add {addr}/30 dev {inner}"),
            format!("-n {namespace} link set {inner} up"),
            format!("-n {namespace} link set lo up"),
            format!("-n {namespace} route add default via {here}"),
        ] {
            ip(&line).await;
        }
        let own = json!({
            "data-root": dir.join("data"),
            "exec-root": dir.join("exec"),
            "pidfile": dir.join("pid"),
            "hosts": [format!("unix://{}", socket(&dir).display())],
            // What works for the engine that is there already works for this one.
            "storage-driver": docker(["info", "--format", "{{.Driver}}"]).await,
        });
        let config: serde_json::Map<String, Value> =
            [own, settings].iter().filter_map(Value::as_object).flat_map(Clone::clone).collect();
        std::fs::write(dir.join("daemon.json"), Value::from(config).to_string()).unwrap();
        let daemon = daemon(&dir, &namespace);
        let engine = Self { dir, namespace, addr, daemon };
        engine.answers().await;
        engine
    }

    /// Runs `docker` on this engine and returns what it printed, trimmed.
    ///
    /// # Panics
    /// When the command fails.
    pub(crate) async fn docker(&self, args: &[&str]) -> String {
        self.try_docker(args).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Brings an image of the first engine to this one.
    pub(crate) async fn load(&self, image: &str) {
        let file = self.dir.join("image.tar").display().to_string();
        docker(["save", "--output", &file, image]).await;
        self.docker(&["load", "--quiet", "--input", &file]).await;
        std::fs::remove_file(file).unwrap();
    }

    /// Ends the engine as its service manager would, and starts it again. Containers run on where `live-restore` is set.
    pub(crate) async fn restart(&mut self) {
        let pid = self.daemon.id().expect("the engine must be running").to_string();
        let mut kill = Command::new("kill");
        kill.args(["-s", "TERM", &pid]);
        run(kill, "").await.unwrap();
        let ended = tokio::time::timeout(PATIENCE, self.daemon.wait()).await;
        ended.expect("the engine must end").unwrap();
        self.daemon = daemon(&self.dir, &self.namespace);
        self.answers().await;
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.dir)
    }

    /// Where a proxy beside it listens, as seen from this machine.
    pub(crate) fn proxy_addr(&self) -> SocketAddr {
        SocketAddr::from((self.addr, PROXY_PORT))
    }

    /// A command that runs `program` in its network namespace.
    pub(crate) fn command(&self, program: &Path) -> Command {
        in_namespace(&self.namespace, program)
    }

    async fn try_docker(&self, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket().display())).args(args);
        run(command, "").await
    }

    async fn answers(&self) {
        let answers = async || self.try_docker(&["version"]).await.ok();
        eventually(&format!("the second engine answers ({})", log(&self.dir).display()), PATIENCE, answers).await;
    }
}

impl Drop for SecondEngine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = std::fs::read_to_string(log(&self.dir)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!(
                "--- the end of the engine's log ---\n{}\n---",
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
        // Its containers would outlive it where `live-restore` is set.
        let host = format!("unix://{}", self.socket().display());
        let ids = blocking("docker", &["--host", &host, "ps", "--all", "--quiet"]);
        let ids: Vec<&str> = ids.split_whitespace().collect();
        if !ids.is_empty() {
            blocking("docker", &[&["--host", &host, "rm", "--force", "--volumes"], &ids[..]].concat());
        }
        if let Some(pid) = self.daemon.id() {
            blocking("kill", &["-s", "TERM", &pid.to_string()]);
            for _ in 0..200 {
                if !matches!(self.daemon.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = self.daemon.start_kill();
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let own: Vec<&str> = points.filter(|point| Path::new(point).starts_with(&self.dir)).collect();
        for point in own.into_iter().rev() {
            blocking("umount", &["--lazy", point]);
        }
        // The pair of links goes with it.
        blocking("ip", &["netns", "del", &self.namespace]);
    }
}

// === helpers ===

fn socket(dir: &Path) -> PathBuf {
    dir.join("docker.sock")
}

fn log(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// `ip netns exec` would mount another `/sys`, without the control groups in it.
fn in_namespace(namespace: &str, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg(program);
    command
}

fn daemon(dir: &Path, namespace: &str) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(log(dir)).unwrap();
    let mut command = in_namespace(namespace, Path::new("dockerd"));
    command.arg("--config-file").arg(dir.join("daemon.json"));
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
    command.spawn().unwrap_or_else(|error| panic!("nsenter (util-linux) or dockerd is missing: {error}"))
}

async fn ip(line: &str) {
    let mut command = Command::new("ip");
    command.args(line.split(' '));
    run(command, "").await.unwrap_or_else(|error| panic!("{error} (needs root and iproute2)"));
}

/// Runs a command where nothing can be awaited; failures are shown, since the clean-up must go on.
fn blocking(program: &str, args: &[&str]) -> String {
    match Blocking::new(program).args(args).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => {
            eprintln!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
            String::new()
        }
        Err(error) => {
            eprintln!("{program} {args:?}: {error}");
            String::new()
        }
    }
}
