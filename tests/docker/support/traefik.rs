//! Traefik as a process on this machine, with its Docker provider and the options of compose.example.yml.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use http::StatusCode;
use tokio::process::{Child, Command};

use super::{
    client,
    engine::{Lab, engine_socket},
    example,
    proxy::free_port,
    wait::eventually,
};

/// Traefik, until it is dropped.
pub(crate) struct Traefik {
    /// Where it takes requests.
    pub(crate) addr: SocketAddr,
    log: PathBuf,
    _child: Child,
}

impl Traefik {
    /// Starts it in front of this lab's containers in `network`; `None`, said on standard error, where it is not installed.
    ///
    /// # Panics
    /// Where `DOCKER_REQUIRED=1` asks for it and it is not there.
    pub(crate) async fn start(lab: &Lab, network: &str) -> Option<Self> {
        let binary = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/traefik-venv/bin/traefik");
        if !binary.exists() {
            let required = std::env::var("DOCKER_REQUIRED").is_ok_and(|value| value == "1");
            assert!(!required, "DOCKER_REQUIRED=1, but {} is missing: .ci/prepare traefik", binary.display());
            eprintln!("skipped: {} is missing (.ci/prepare traefik)", binary.display());
            return None;
        }
        let addr = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), free_port());
        let [_, (label, case)] = lab.ownership_labels();
        let own = [
            ("--entrypoints.web.address", addr.to_string()),
            ("--providers.docker.network", network.to_owned()),
            ("--providers.docker.endpoint", format!("unix://{}", engine_socket().display())),
            // Nothing else on this engine.
            ("--providers.docker.constraints", format!("Label(`{label}`,`{case}`)")),
            ("--log.level", "INFO".to_owned()),
        ];
        let mut command = Command::new(binary);
        for option in example::service("traefik").items("command") {
            let name = option.split('=').next().unwrap_or_default();
            if !own.iter().any(|(own, _)| *own == name) {
                command.arg(option);
            }
        }
        command.args(own.map(|(name, value)| format!("{name}={value}")));
        let log = lab.scratch_dir("traefik").join("log");
        let to_log = || Stdio::from(std::fs::File::options().create(true).append(true).open(&log).unwrap());
        command.stdin(Stdio::null()).stdout(to_log()).stderr(to_log()).kill_on_drop(true);
        let traefik = Self { addr, _child: command.spawn().unwrap(), log };
        let routed = async || {
            let answer = client::get(addr, "/v1/models").await.ok()?;
            (answer.status == StatusCode::OK).then_some(())
        };
        eventually("Traefik routes /v1/models", Duration::from_secs(60), routed).await;
        Some(traefik)
    }
}

impl Drop for Traefik {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- Traefik's log ---\n{log}\n---");
        }
    }
}
