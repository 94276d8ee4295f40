//! The Docker Engine as the tests use it: the `docker` command for every action, and a [`Lab`] that cleans up.
//!
//! A lab belongs to one test. Everything created in it carries two labels, one for the run and one for the test, and is
//! removed by them when the lab is dropped; what a killed run left behind is swept an hour later by the next one.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command as Blocking, Stdio},
    sync::{LazyLock, Mutex},
    time::{Duration, SystemTime},
};

use tokio::{
    io::AsyncWriteExt,
    process::Command,
    sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard},
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::{backend::BackendSpec, proxy::ProxySpec};

/// Label of everything this suite creates; its value is the run.
const RUN_LABEL: &str = "inference-proxy.test";
/// Label with the run and the test.
const CASE_LABEL: &str = "inference-proxy.test.case";
/// What a run leaves behind is somebody else's garbage after this long.
const STALE_SECS: u64 = 3600;

/// `ipt<unix seconds>x<process id>`: fit for names, and tells its age.
static RUN: LazyLock<String> = LazyLock::new(|| format!("ipt{}x{}", unix_secs(), std::process::id()));

/// Tests that measure have the machine to themselves; the others share it.
static TURN: RwLock<()> = RwLock::const_new(());

static IMAGES: OnceCell<Result<Images, String>> = OnceCell::const_new();

/// What is run.
#[derive(Debug, Clone)]
struct Images {
    /// The image under test.
    proxy: String,
    /// The same binary as an inference server: no exposed port, and a HEALTHCHECK that asks port 8000.
    backend: String,
    /// The binary itself, for a proxy outside of any container.
    binary: PathBuf,
}

/// One test's place on the engine.
pub(crate) struct Lab {
    case: String,
    images: Images,
    /// Directories handed out to sockets and compose files.
    scratch: Mutex<Vec<PathBuf>>,
    begun: Instant,
    _turn: Turn,
}

#[expect(dead_code, reason = "held for its drop")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// A lab for a test that bears company; `None`, said on standard error, where there is no engine to test against.
///
/// # Panics
/// Where `DOCKER_REQUIRED=1` asks for the engine and there is none.
pub(crate) async fn shared(test: &str) -> Option<Lab> {
    let images = images(test).await?;
    Some(Lab::new(test, images, Turn::Shared(TURN.read().await)))
}

/// As [`shared`], for a test that measures milliseconds: no other test runs meanwhile.
pub(crate) async fn alone(test: &str) -> Option<Lab> {
    let images = images(test).await?;
    Some(Lab::new(test, images, Turn::Alone(TURN.write().await)))
}

/// Runs `docker` and returns what it printed, trimmed.
///
/// # Panics
/// When the command fails.
pub(crate) async fn docker(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    try_docker(args).await.unwrap_or_else(|error| panic!("{error}"))
}

/// As [`docker`], for a command that may fail.
pub(crate) async fn try_docker(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String, String> {
    let mut command = Command::new("docker");
    command.args(args);
    run(command, "").await
}

/// As [`docker`], for a command that takes its time while the test goes on.
pub(crate) fn docker_meanwhile(args: &[&str]) -> JoinHandle<String> {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    tokio::spawn(docker(args))
}

/// Runs a command with `input` and returns what it printed, trimmed; the error is what it complained about.
pub(crate) async fn run(mut command: Command, input: &str) -> Result<String, String> {
    let shown = format!("{:?}", command.as_std());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("{shown}: {error}"))?;
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.map_err(|error| format!("{shown}: {error}"))?;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(format!("{shown}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// One field of `docker inspect`, as Go templates name it.
pub(crate) async fn inspect(id: &str, field: &str) -> String {
    docker(["inspect", "--format", field, id]).await
}

/// Path of the engine's socket.
///
/// # Panics
/// When `DOCKER_HOST` is something else than a unix socket: the tests put themselves between the proxy and the engine.
pub(crate) fn engine_socket() -> PathBuf {
    match std::env::var("DOCKER_HOST") {
        Err(_) => PathBuf::from("/var/run/docker.sock"),
        Ok(host) => match host.strip_prefix("unix://") {
            Some(path) => PathBuf::from(path),
            None => panic!("DOCKER_HOST={host}: this suite needs a unix:// socket"),
        },
    }
}

// === impl Lab ===

impl Lab {
    fn new(test: &str, images: Images, turn: Turn) -> Self {
        Self { case: format!("{}-{test}", *RUN), images, scratch: Mutex::default(), begun: Instant::now(), _turn: turn }
    }

    /// A name on the engine, or a model, that no other test and no other run has.
    pub(crate) fn name(&self, role: &str) -> String {
        format!("{}-{role}", self.case)
    }

    /// The labels by which everything of this test is found again, as arguments of `docker`.
    pub(crate) fn ownership(&self) -> [String; 4] {
        let [(run_label, run), (case_label, case)] = self.ownership_labels();
        ["--label".to_owned(), format!("{run_label}={run}"), "--label".to_owned(), format!("{case_label}={case}")]
    }

    /// The same labels, as pairs.
    pub(crate) fn ownership_labels(&self) -> [(&'static str, &str); 2] {
        [(RUN_LABEL, RUN.as_str()), (CASE_LABEL, self.case.as_str())]
    }

    /// Creates a bridge network and returns its name.
    pub(crate) async fn network(&self, role: &str) -> String {
        let name = self.name(role);
        docker(["network", "create"].map(String::from).into_iter().chain(self.ownership()).chain([name.clone()])).await;
        name
    }

    /// An inference server to be started.
    pub(crate) fn backend(&self, role: &str) -> BackendSpec<'_> {
        BackendSpec::new(self, role)
    }

    /// A proxy to be started.
    pub(crate) fn proxy(&self) -> ProxySpec<'_> {
        ProxySpec::new(self)
    }

    /// A new directory, gone with the lab. Its path is short enough for a socket in it.
    pub(crate) fn scratch_dir(&self, role: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(self.name(role));
        std::fs::create_dir_all(&dir).unwrap();
        self.scratch.lock().unwrap().push(dir.clone());
        dir
    }

    /// The image under test.
    pub(crate) fn proxy_image(&self) -> &str {
        &self.images.proxy
    }

    /// The demo backend's image.
    pub(crate) fn backend_image(&self) -> &str {
        &self.images.backend
    }

    /// The proxy's binary on this machine.
    pub(crate) fn binary(&self) -> &Path {
        &self.images.binary
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        println!("{}: {:.1} s, without waiting for its turn", self.case, self.begun.elapsed().as_secs_f64());
        let filter = format!("label={CASE_LABEL}={}", self.case);
        remove(&["rm", "--force", "--volumes"], &blocking(&["ps", "--all", "--quiet", "--filter", &filter]));
        remove(&["network", "rm"], &blocking(&["network", "ls", "--quiet", "--filter", &filter]));
        for dir in self.scratch.lock().unwrap().drain(..) {
            // A leftover directory harms nobody, and a panic in here would hide why the test failed.
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

// === setting up ===

async fn images(test: &str) -> Option<Images> {
    match IMAGES.get_or_init(prepare).await {
        Ok(images) => Some(images.clone()),
        Err(why) if std::env::var("DOCKER_REQUIRED").is_ok_and(|value| value == "1") => {
            panic!("DOCKER_REQUIRED=1, but {why}")
        }
        Err(why) => {
            eprintln!("{test} skipped: {why}");
            None
        }
    }
}

async fn prepare() -> Result<Images, String> {
    let engine = timeout(Duration::from_secs(10), try_docker(["version", "--format", "{{.Server.Version}}"])).await;
    engine.map_err(|_| "the Docker Engine does not answer".to_owned())??;
    let proxy = std::env::var("INFERENCE_PROXY_IMAGE").unwrap_or_else(|_| "inference-proxy:test".to_owned());
    let digest = try_docker(["image", "inspect", "--format", "{{.Id}}", &proxy])
        .await
        .map_err(|error| format!("the image {proxy} is missing (INFERENCE_PROXY_IMAGE names another): {error}"))?;
    sweep().await;

    let short = digest.trim_start_matches("sha256:").get(..12).unwrap_or("unknown");
    let backend = format!("inference-proxy-test-backend:{short}");
    let dockerfile = format!(
        "FROM {proxy} AS product\n\
         FROM scratch\n\
         COPY --from=product /inference-proxy /inference-proxy\n\
         ENTRYPOINT [\"/inference-proxy\"]\n\
         HEALTHCHECK --interval=1s --timeout=5s --retries=1 \
         CMD [\"/inference-proxy\", \"healthcheck\", \"--url\", \"http://127.0.0.1:8000/health\"]\n\
         LABEL {RUN_LABEL}=image\n"
    );
    let mut build = Command::new("docker");
    build.args(["build", "--quiet", "--tag", &backend, "-"]);
    run(build, &dockerfile).await?;

    let binary = match std::env::var_os("INFERENCE_PROXY_BIN") {
        Some(path) => PathBuf::from(path),
        None => extract(&proxy, short).await?,
    };
    Ok(Images { proxy, backend, binary })
}

/// Copies the binary out of the image, so that what runs on the host is what runs in the containers.
async fn extract(image: &str, short: &str) -> Result<PathBuf, String> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("docker-suite-{short}"));
    std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let binary = dir.join("inference-proxy");
    let holder = try_docker(["create", "--label", &format!("{RUN_LABEL}={}", *RUN), image]).await?;
    let copied = try_docker(["cp", &format!("{holder}:/inference-proxy"), &binary.display().to_string()]).await;
    docker(["rm", &holder]).await;
    copied.map(|_| binary)
}

/// Removes what runs of more than an hour ago left behind.
async fn sweep() {
    let every = format!("label={RUN_LABEL}");
    let with_run = format!("{{{{.ID}}}} {{{{.Label {RUN_LABEL:?}}}}}");
    let stale = |listing: String| {
        let old = |run: &str| {
            let started = run.strip_prefix("ipt").and_then(|rest| rest.split('x').next()?.parse::<u64>().ok());
            started.is_none_or(|started| unix_secs().saturating_sub(started) > STALE_SECS)
        };
        let rows = listing.lines().filter_map(|row| row.split_once(' '));
        rows.filter(|(_, run)| old(run)).map(|(id, _)| id).collect::<Vec<_>>().join("\n")
    };
    let listing = try_docker(["ps", "--all", "--filter", &every, "--format", &with_run]).await;
    remove(&["rm", "--force", "--volumes"], &stale(listing.unwrap_or_default()));
    let listing = try_docker(["network", "ls", "--filter", &every, "--format", &with_run]).await;
    remove(&["network", "rm"], &stale(listing.unwrap_or_default()));
    let until = format!("until={STALE_SECS}s");
    // Images of earlier builds; one in use stays, and that is no error.
    let _ = try_docker(["image", "prune", "--all", "--force", "--filter", &every, "--filter", &until]).await;
}

/// Runs `docker`, for use where nothing can be awaited; failures are shown, since the clean-up must go on.
fn blocking(args: &[&str]) -> String {
    match Blocking::new("docker").args(args).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Ok(output) => {
            eprintln!("docker {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
            String::new()
        }
        Err(error) => {
            eprintln!("docker {args:?}: {error}");
            String::new()
        }
    }
}

fn remove(how: &[&str], ids: &str) {
    let ids: Vec<&str> = ids.split_whitespace().collect();
    if !ids.is_empty() {
        blocking(&[how, &ids].concat());
    }
}

fn unix_secs() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}
