//! Puts the parts together: discovery and registry on the calling runtime, requests on their workers.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle, time::sleep};
use tokio_util::task::TaskTracker;

use crate::{
    base::{
        config::{Balance, Config},
        phase::{Life, Phase},
        vital::{self, Ended, Ends},
    },
    control::{discovery::Discovery, registry::Registry, scrape},
    data::{
        listen::{self, Workers},
        proxy::{Port, Proxy, Site},
    },
    observe::{
        pages::{Admin, live::Live},
        report::Reporter,
    },
    pool::table::{self, TableReader},
    telemetry::{
        Telemetry,
        metrics::Metrics,
        otlp::{Otlp, OtlpError, OtlpReport},
    },
};

/// Questions to the registry on their way.
const ASKS_MAX: usize = 64;
/// Connections at a time on the admin port.
const ADMIN_CONNECTIONS_MAX: usize = 256;
/// How long the last telemetry gets to reach its collector, once the last request is done.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// A running proxy.
#[derive(Debug)]
pub struct App {
    data_addr: SocketAddr,
    admin_addr: Option<SocketAddr>,
    workers: Arc<Workers>,
    /// The task that accepts connections for the workers; it ends when draining begins.
    accepting: JoinHandle<()>,
    /// The task that serves the admin port, if there is one; it ends when all is over.
    admin: Option<JoinHandle<()>>,
    life: Life,
    /// How long connections are still accepted once `/readyz` says 503, because a front proxy needs time to notice.
    settle: Duration,
    drain_timeout: Duration,
    otlp: Option<Otlp>,
    /// Of tasks that must not end.
    ends: Ends,
}

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port cannot be had.
    #[error(
        "cannot listen on {what} port {port}: {error} (PROXY_PORT, PROXY_ADMIN_PORT and PROXY_BIND say where to listen)"
    )]
    Bind {
        /// `data` or `admin`.
        what: &'static str,
        /// Which.
        port: u16,
        /// Why.
        error: io::Error,
    },
    /// Telemetry is asked for that cannot be sent.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// The operating system refuses what a server needs.
    #[error("cannot start: {0}")]
    Os(#[from] io::Error),
}

impl App {
    /// Starts a proxy that follows `discovery`; returns once it listens.
    ///
    /// # Errors
    /// A port cannot be had, or threads cannot be started.
    pub async fn start(config: Config, mut discovery: Box<dyn Discovery>) -> Result<App, StartError> {
        let listener = listen::bind(config.bind, config.port).map_err(|error| StartError::Bind {
            what: "data",
            port: config.port,
            error,
        })?;
        let admin_listener = match config.admin_port {
            Some(port) => {
                let bound = listen::bind(config.bind, port);
                Some(bound.map_err(|error| StartError::Bind { what: "admin", port, error })?)
            }
            None => None,
        };
        let data_addr = listener.local_addr()?;
        let admin_addr = admin_listener.as_ref().map(std::net::TcpListener::local_addr).transpose()?;

        let config = Arc::new(config);
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let (publisher, reader) = table::table();
        let (telemetry, otlp) = start_telemetry(&config, &reader)?;
        let life = Life::default();
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let tasks = TaskTracker::new();
        let (vital, ends) = vital::watch();

        let source = discovery.name();
        let registry =
            Registry::new(config.clone(), count, source, publisher, telemetry.clone(), life.clone(), tasks.clone());
        discovery.count_in(&telemetry.metrics);
        tasks.spawn(vital.clone().task("registry", registry.run(discovery, asked)));

        if config.balance != Balance::RoundRobin {
            let scraping = scrape::run(reader.clone(), config.connect_timeout);
            let life = life.clone();
            let scraping = returned(async move { life.until(Phase::Draining, scraping).await });
            tasks.spawn(vital.clone().task("scrape", scraping));
        }
        let pages = Admin {
            life: life.clone(),
            reporter: Reporter { table: reader.clone(), metrics: telemetry.metrics.clone() },
            asks,
            live: Live::new(life.clone()),
        };
        let proxy = Arc::new(Proxy::new(&config, reader, telemetry, pages));
        let admin = admin_listener.map(|listener| {
            let (site, life) = (Site::new(proxy.clone(), Port::Admin), life.clone());
            let serving = async move {
                why_ended(listen::serve_here(listener, site, ADMIN_CONNECTIONS_MAX, &life, Phase::Over).await)
            };
            tasks.spawn(vital.clone().task("admin", serving))
        });
        let connections_max = listen::connections_max();
        let site = Site::new(proxy, Port::Data);
        let workers = Arc::new(Workers::start(count, connections_max, &site, &vital)?);
        let accept = {
            let (workers, life) = (workers.clone(), life.clone());
            async move { why_ended(workers.accept(listener, &life, Phase::Draining).await) }
        };
        let accepting = tasks.spawn(vital.task("accept", accept));
        tracing::info!(address = %data_addr, admin = admin_addr.map(|addr| addr.to_string()), workers = count, connections_max, discovery = source, "listening");
        Ok(App {
            data_addr,
            admin_addr,
            workers,
            accepting,
            admin,
            life,
            settle: config.settle,
            drain_timeout: config.drain_timeout,
            otlp,
            ends,
        })
    }

    /// Where requests are served.
    pub fn data_addr(&self) -> SocketAddr {
        self.data_addr
    }

    /// Where metrics and status are served, if not with the requests.
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.admin_addr
    }

    /// Whether the first scan and its probes are done.
    pub fn is_ready(&self) -> bool {
        self.life.phase() == Phase::Ready
    }

    /// Waits until a task has ended without which the proxy cannot do its work; then the process must end, too. May be
    /// dropped and begun again.
    pub async fn failed(&mut self) -> Ended {
        self.ends.next().await
    }

    /// As [`App::shutdown`], for a proxy that has failed: nothing more is accepted.
    pub async fn give_up(mut self) {
        self.settle = Duration::ZERO;
        self.shutdown().await;
    }

    /// Stops: `/readyz` says 503 at once; connections are accepted for the settle time; after that, requests under way
    /// finish within the drain timeout, and the admin port is open as long. Returns whether all of them did.
    pub async fn shutdown(self) -> bool {
        let App { workers, accepting, admin, life, settle, drain_timeout, otlp, ends, .. } = self;
        ends.expect_all();
        life.advance(Phase::Settling);
        tracing::info!(?settle, ?drain_timeout, "shutting down");
        sleep(settle).await;
        life.advance(Phase::Draining);
        // It ends by itself, and then holds the workers no longer.
        let _ = accepting.await;
        let finished = match Arc::into_inner(workers) {
            Some(workers) => workers.finish(drain_timeout).await,
            None => false,
        };
        life.advance(Phase::Over);
        if let Some(admin) = admin {
            let _ = admin.await;
        }
        if !finished {
            tracing::warn!("requests were still under way at the end of the drain timeout and have been cut");
        }
        if let Some(otlp) = otlp
            && !otlp.finish(FLUSH_TIMEOUT).await
        {
            tracing::warn!(limit = ?FLUSH_TIMEOUT, "not all telemetry has reached its collector");
        }
        finished
    }
}

const RETURNED: &str = "it returned";

/// Why a task has ended that explains nothing itself.
async fn returned<T>(task: impl Future<Output = T>) -> String {
    task.await;
    RETURNED.to_owned()
}

/// Why a task has ended that accepts connections.
fn why_ended(accepted: io::Result<()>) -> String {
    accepted.map_or_else(|error| error.to_string(), |()| RETURNED.to_owned())
}

/// What the proxy tells of itself with, and what sends that, if anything does.
fn start_telemetry(config: &Config, table: &TableReader) -> Result<(Telemetry, Option<Otlp>), StartError> {
    let Some(settings) = &config.otlp else { return Ok((Telemetry::default(), None)) };
    let mut otlp = Otlp::start(settings, &Handle::current())?;
    let metrics = Arc::new(Metrics::sent(settings.metrics.is_some()));
    let reporter = Reporter { table: table.clone(), metrics: metrics.clone() };
    let telemetry = Telemetry { metrics, tracing: otlp.tracing() };
    otlp.send_metrics(move |report: &mut OtlpReport| {
        reporter.tell(report);
        reporter.tell_conventions(report);
    });
    for (what, collector) in [
        ("traces", settings.traces.as_ref().map(|traces| &traces.collector)),
        ("metrics", settings.metrics.as_ref().map(|metrics| &metrics.collector)),
    ] {
        if let Some(collector) = collector {
            tracing::info!(what, collector = collector.place(), protocol = ?collector.protocol, "sending telemetry");
        }
    }
    Ok((telemetry, Some(otlp)))
}
