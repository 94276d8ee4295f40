//! `demo-backend`: an OpenAI- and Anthropic-compatible server that needs no GPU and no weights.
//!
//! It serves the quick start, the tests and the benchmarks, so it must be right on the wire (shapes and timing are vLLM's)
//! and fast enough not to be what a benchmark measures. It refuses to know the proxy: nothing else of this crate is used
//! here, and a request is answered from its own body and the settings alone.
//!
//! Reading order: this file listens and ends; `dispatch` takes one request; `infer` answers it; `call` reads its body;
//! `shape` and `pooling` write answers; `body` sends them at their pace; `load` counts; `control` says how to break things
//! on purpose, and `memory` is one of the ways.
//!
//! How time passes: a request waits `latency` before the head of its answer. A stream then sends one token per `token_gap`,
//! the first at once; a whole answer comes when the stream's last token would.

mod body;
mod call;
mod control;
mod dispatch;
mod infer;
mod load;
mod memory;
mod pooling;
mod shape;
#[cfg(test)]
mod tests;

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use http::HeaderValue;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub use self::memory::allocate_as_child;
use self::{
    control::{OnSigterm, Settings},
    dispatch::Shared,
};

/// How long requests in flight may go on after a shutdown has begun; `docker stop` kills long before, unless told not to.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// Pause after a failed accept, so that running out of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Connections that the kernel may hold until they are accepted: a benchmark opens them all at once.
const BACKLOG: i32 = 4096;

/// How a demo backend starts.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Address to listen on; `::` means IPv4 too, and falls back to it where there is no IPv6.
    pub bind: IpAddr,
    /// Port to listen on; 0 picks a free one.
    pub port: u16,
    /// What it calls itself in its answers and in `x-demo-backend`; unset: the host name.
    pub name: Option<String>,
    /// Ids it announces and answers to.
    pub models: Vec<String>,
    /// From the end of a request to the first byte of its answer.
    pub latency: Duration,
    /// Tokens of an answer, from 1 to 1 000 000, unless the request wants fewer.
    pub tokens: u32,
    /// Between two tokens.
    pub token_gap: Duration,
    /// Whether `/_ctl` and `/_stats` exist. Anyone who reaches them can end the process.
    pub control: bool,
}

/// A demo backend that listens but does not serve yet.
#[derive(Debug)]
pub struct DemoBackend {
    listener: TcpListener,
    local_addr: SocketAddr,
    shared: Arc<Shared>,
}

/// How serving came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// After a shutdown.
    Finished,
    /// At once, with this exit code.
    Exit(u8),
}

/// The signals that end the backend.
struct Signals {
    term: Signal,
    interrupt: Signal,
    quit: Signal,
}

/// What the subcommand runs: serves until SIGTERM, SIGINT or SIGQUIT, then finishes what is in flight.
///
/// A second signal ends it at once. The exit code is 0 after a shutdown, 1 when it could not listen, 143 or the wanted one
/// when `/_ctl` said so. Handlers are installed before the port is opened: as first process of a container it would get no
/// signal without them.
pub async fn serve(options: DemoOptions) -> ExitCode {
    let started = async { Ok::<_, io::Error>((Signals::install()?, DemoBackend::bind(options).await?)) };
    let (mut signals, backend) = match started.await {
        Ok(started) => started,
        Err(error) => {
            tracing::error!(%error, "demo backend could not start");
            return ExitCode::FAILURE;
        }
    };
    let shared = backend.shared.clone();
    let models = shared.settings.load().models.join(",");
    tracing::info!(address = %backend.local_addr(), name = shared.name, models, "demo backend listening");
    let shutdown = CancellationToken::new();
    let mut running = pin!(backend.run_to_end(shutdown.cancelled()));
    loop {
        let is_sigterm = tokio::select! {
            ending = &mut running => match ending {
                Ok(Ending::Finished) => return ExitCode::SUCCESS,
                Ok(Ending::Exit(code)) => return ExitCode::from(code),
                Err(error) => {
                    tracing::error!(%error, "demo backend failed");
                    return ExitCode::FAILURE;
                }
            },
            is_sigterm = signals.next() => is_sigterm,
        };
        let on_signal = if is_sigterm { shared.settings.load().sigterm } else { OnSigterm::Finish };
        match on_signal {
            OnSigterm::Ignore => tracing::info!("SIGTERM ignored"),
            OnSigterm::Finish if !shutdown.is_cancelled() => {
                tracing::info!(in_flight = shared.load.in_flight(), "demo backend shutting down");
                shutdown.cancel();
            }
            OnSigterm::Finish | OnSigterm::Exit => return ExitCode::from(143),
        }
    }
}

// === impl DemoOptions ===

impl Default for DemoOptions {
    /// The defaults of the subcommand.
    fn default() -> Self {
        Self {
            bind: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            port: 8000,
            name: None,
            models: vec!["demo".into()],
            latency: Duration::ZERO,
            tokens: 16,
            token_gap: Duration::from_millis(20),
            control: false,
        }
    }
}

// === impl DemoBackend ===

impl DemoBackend {
    /// Listens on the address of the options.
    ///
    /// # Errors
    /// When the port cannot be had, or the name cannot stand in a header.
    pub async fn bind(options: DemoOptions) -> io::Result<Self> {
        let name = options.name.unwrap_or_else(host_name);
        let name_header = HeaderValue::from_str(&name).map_err(|_| {
            let message = format!("name `{}`: expected visible characters only", name.escape_debug());
            io::Error::new(io::ErrorKind::InvalidInput, message)
        })?;
        let settings = Settings::new(options.models, options.latency, options.tokens, options.token_gap);
        let listener = listen(options.bind, options.port)?;
        let shared = Shared::new(name, name_header, settings, options.control);
        Ok(Self { local_addr: listener.local_addr()?, listener, shared: Arc::new(shared) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `shutdown` resolves, then closes the listener, finishes what is in flight (for at most a minute) and
    /// returns. Dropping the future ends everything at once; so does `/_ctl?exit=N`.
    ///
    /// # Errors
    /// When the listener breaks for good.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> io::Result<()> {
        self.run_to_end(shutdown).await.map(|_ending| ())
    }

    async fn run_to_end(self, shutdown: impl Future<Output = ()>) -> io::Result<Ending> {
        let Self { listener, shared, .. } = self;
        let mut exits = shared.exit.subscribe();
        let mut exit =
            pin!(async move { exits.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(0) });
        let mut shutdown = pin!(shutdown);
        // Owns the connections: dropping it, on any way out of here, cuts them.
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                code = &mut exit => return Ok(Ending::Exit(code)),
                accepted = listener.accept() => match accepted {
                    Ok((stream, _peer)) => drop(connections.spawn(serve_connection(shared.clone(), stream))),
                    Err(error) if accept_may_recover(&error) => {
                        tracing::warn!(%error, "could not accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                    Err(error) => return Err(error),
                },
                Some(_) = connections.join_next() => {}
            }
        }
        drop(listener);
        shared.closing.cancel();
        let drained = async { while connections.join_next().await.is_some() {} };
        tokio::select! {
            () = drained => {}
            code = &mut exit => return Ok(Ending::Exit(code)),
            () = tokio::time::sleep(DRAIN_LIMIT) => {
                tracing::warn!(in_flight = shared.load.in_flight(), "requests cut: they did not finish in time");
            }
        }
        Ok(Ending::Finished)
    }
}

fn listen(bind: IpAddr, port: u16) -> io::Result<TcpListener> {
    let at = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    match at(SocketAddr::new(bind, port)) {
        // No IPv6 in this kernel or container. A port in use is no reason: that stays the error it is.
        Err(error) if bind == Ipv6Addr::UNSPECIFIED && error.kind() != io::ErrorKind::AddrInUse => {
            at(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
        }
        listened => listened,
    }
}

/// Whether accepting may work again later: the peer has gone already, or descriptors or memory have run out.
fn accept_may_recover(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

fn host_name() -> String {
    let files = ["/proc/sys/kernel/hostname", "/etc/hostname"];
    let names = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
    let name = names.map(|name| name.trim().to_owned()).find(|name| !name.is_empty());
    name.unwrap_or_else(|| "demo".into())
}

async fn serve_connection(shared: Arc<Shared>, stream: TcpStream) {
    // Events are small and must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let closing = shared.closing.clone();
    let service = service_fn(move |request| dispatch::answer(shared.clone(), request));
    let mut connection = pin!(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended early");
    }
}

// === impl Signals ===

impl Signals {
    fn install() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    /// Waits for one; true = SIGTERM.
    async fn next(&mut self) -> bool {
        tokio::select! {
            _ = self.term.recv() => true,
            _ = self.interrupt.recv() => false,
            _ = self.quit.recv() => false,
        }
    }
}
