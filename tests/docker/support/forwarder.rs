//! A relay between the proxy and the engine's socket that can be broken: cut, ended, held, filtered.
//!
//! It speaks HTTP on both sides, so that it can tell an event stream from a listing and one event from the next.

use std::{
    convert::Infallible,
    future::pending,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, stream};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    client, server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use super::{
    engine::{Lab, engine_socket},
    proxy::free_port,
};

/// How the relay behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// Relays.
    Open,
    /// Passes nothing, either way: connections stay open and silent. What was held passes when it is open again.
    Held,
    /// Cut: open connections break off, new ones are refused.
    Cut,
    /// Ended: streams end as if all had been said, new connections are refused.
    Ended,
}

/// Which requests may pass; the others are answered with 403.
pub(crate) type Gate = fn(&Method, &str) -> bool;

type EventFilter = Box<dyn Fn(&Value) -> bool + Send>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;
type RelayedBody = StreamBody<Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, BoxError>> + Send>>>;

/// The relay. It is gone when dropped.
pub(crate) struct Forwarder {
    docker_host: String,
    dir: Option<PathBuf>,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

struct Shared {
    link: watch::Sender<Link>,
    /// Whether it listens just now.
    listens: watch::Sender<bool>,
    gate: Gate,
    /// Events for which any of these is true are lost.
    losses: Mutex<Vec<EventFilter>>,
    lost: Mutex<Vec<Value>>,
    asked: Mutex<Vec<String>>,
    forbidden: Mutex<Vec<String>>,
}

enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// How long streams that were told to end may take to say so.
const FAREWELL: Duration = Duration::from_millis(500);

/// Passes everything.
pub(crate) fn everything(_: &Method, _: &str) -> bool {
    true
}

/// Passes what the proxy is documented to need: five kinds of GET, with or without a version prefix.
pub(crate) fn five_gets(method: &Method, path: &str) -> bool {
    let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let is_version = segments[0].starts_with("v1.");
    let known = match if is_version { &segments[1..] } else { &segments[..] } {
        ["_ping" | "version" | "events"] | ["containers", "json"] => true,
        ["containers", id, "json"] => id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        _ => false,
    };
    known && method == Method::GET
}

// === impl Forwarder ===

impl Forwarder {
    /// A relay behind a unix socket in a directory of its own, which can be mounted into a container.
    pub(crate) async fn unix(lab: &Lab, role: &str, link: Link, gate: Gate) -> Self {
        let dir = lab.scratch_dir(role);
        let socket = dir.join("docker.sock");
        let docker_host = format!("unix://{}", socket.display());
        Self::start(docker_host, Some(dir), Place::Unix(socket), link, gate).await
    }

    /// A relay behind a loopback TCP port, as Docker API proxies are.
    pub(crate) async fn tcp(gate: Gate) -> Self {
        Self::tcp_at(Ipv4Addr::LOCALHOST, gate).await
    }

    /// The same at another address of this machine.
    pub(crate) async fn tcp_at(ip: Ipv4Addr, gate: Gate) -> Self {
        let at = SocketAddr::from((ip, free_port()));
        Self::start(format!("tcp://{at}"), None, Place::Tcp(at), Link::Open, gate).await
    }

    async fn start(docker_host: String, dir: Option<PathBuf>, place: Place, link: Link, gate: Gate) -> Self {
        let shared = Arc::new(Shared {
            link: watch::Sender::new(link),
            listens: watch::Sender::new(link.accepts()),
            gate,
            losses: Mutex::default(),
            lost: Mutex::default(),
            asked: Mutex::default(),
            forbidden: Mutex::default(),
        });
        let first = if link.accepts() { Some(place.bind().await) } else { None };
        let serving = tokio::spawn(serve(place, first, Arc::clone(&shared)));
        Self { docker_host, dir, shared, serving }
    }

    /// For `DOCKER_HOST` of a proxy on this machine.
    pub(crate) fn docker_host(&self) -> &str {
        &self.docker_host
    }

    /// The directory of its socket, if that is what it has.
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Changes how it behaves. Returns when it does: when it listens again, or when everything has been hung up on.
    pub(crate) async fn set(&self, link: Link) {
        self.shared.link.send_replace(link);
        let mut listens = self.shared.listens.subscribe();
        listens.wait_for(|listens| *listens == link.accepts()).await.unwrap();
    }

    /// Loses every event for which `is_lost` is true, from now on.
    pub(crate) fn lose(&self, is_lost: impl Fn(&Value) -> bool + Send + 'static) {
        self.shared.losses.lock().unwrap().push(Box::new(is_lost));
    }

    /// The events that were lost so far.
    pub(crate) fn lost(&self) -> Vec<Value> {
        self.shared.lost.lock().unwrap().clone()
    }

    /// Every request so far, as `GET /path?query`.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// The requests that did not pass the gate.
    pub(crate) fn forbidden(&self) -> Vec<String> {
        self.shared.forbidden.lock().unwrap().clone()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

// === impl Link ===

impl Link {
    fn accepts(self) -> bool {
        matches!(self, Self::Open | Self::Held)
    }
}

// === impl Place ===

impl Place {
    async fn bind(&self) -> Listener {
        match self {
            Self::Unix(path) => {
                // The file of an earlier listener is left in place while the relay is down, as a killed engine leaves it.
                let _ = std::fs::remove_file(path);
                Listener::Unix(UnixListener::bind(path).unwrap())
            }
            // Tokio asks for SO_REUSEADDR, so what the last listener left behind does no harm.
            Self::Tcp(at) => Listener::Tcp(TcpListener::bind(at).await.unwrap()),
        }
    }
}

// === impl Listener ===

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
            Self::Tcp(listener) => Box::new(listener.accept().await?.0) as Box<dyn Connection>,
        })
    }
}

// === relaying ===

async fn serve(place: Place, mut listener: Option<Listener>, shared: Arc<Shared>) {
    let mut link = shared.link.subscribe();
    loop {
        let Ok(_) = link.wait_for(|link| link.accepts()).await else {
            return;
        };
        let accepting = match listener.take() {
            Some(first) => first,
            None => place.bind().await,
        };
        shared.listens.send_replace(true);
        let mut connections = JoinSet::new();
        let down = loop {
            tokio::select! {
                accepted = accepting.accept() => {
                    let Ok(stream) = accepted else { continue };
                    let shared = Arc::clone(&shared);
                    connections.spawn(async move {
                        let service = service_fn(|request| relay(request, Arc::clone(&shared)));
                        // A connection that breaks is what this relay is for.
                        let _ = server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .await;
                    });
                }
                changed = link.wait_for(|link| !link.accepts()) => break changed.map(|link| *link),
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
            }
        };
        drop(accepting);
        match down {
            Ok(Link::Ended) => {
                drop(tokio::time::timeout(FAREWELL, async { while connections.join_next().await.is_some() {} }).await)
            }
            Ok(_) => {}
            Err(_) => return,
        }
        connections.shutdown().await;
        shared.listens.send_replace(false);
    }
}

async fn relay(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<RelayedBody>, BoxError> {
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let line = format!("{} {target}", request.method());
    shared.asked.lock().unwrap().push(line.clone());
    let mut link = shared.link.subscribe();
    passes(&mut link).await;
    if !(shared.gate)(request.method(), request.uri().path()) {
        shared.forbidden.lock().unwrap().push(line);
        let refusal = stream::once(async { Ok(Frame::data(Bytes::from_static(b"{\"message\":\"forbidden\"}\n"))) });
        let mut response = Response::new(StreamBody::new(Box::pin(refusal) as Pin<Box<_>>));
        *response.status_mut() = StatusCode::FORBIDDEN;
        return Ok(response);
    }
    let is_events = request.uri().path().ends_with("/events");
    let response = ask_engine(request, &target).await?;
    passes(&mut link).await;
    let (mut head, body) = response.into_parts();
    head.headers.remove(header::TRANSFER_ENCODING);
    head.headers.remove(header::CONNECTION);
    let upstream = Upstream { body, link, shared, unfinished: Vec::new(), is_events };
    let frames = stream::unfold(upstream, |mut upstream| async move {
        let frame = upstream.next().await?;
        Some((frame.map(Frame::data), upstream))
    });
    Ok(Response::from_parts(head, StreamBody::new(Box::pin(frames) as Pin<Box<_>>)))
}

async fn ask_engine(request: Request<Incoming>, target: &str) -> Result<Response<Incoming>, BoxError> {
    let (head, body) = request.into_parts();
    let stream = UnixStream::connect(engine_socket()).await?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut onward =
        Request::builder().method(head.method).uri(target).body(Full::new(body.collect().await?.to_bytes()))?;
    *onward.headers_mut() = head.headers;
    Ok(sender.send_request(onward).await?)
}

/// Waits while the link is held.
async fn passes(link: &mut watch::Receiver<Link>) {
    if link.wait_for(|link| *link != Link::Held).await.is_err() {
        pending::<Infallible>().await;
    }
}

/// The body of one answer of the engine.
struct Upstream {
    body: Incoming,
    link: watch::Receiver<Link>,
    shared: Arc<Shared>,
    /// The beginning of an event whose end has not arrived.
    unfinished: Vec<u8>,
    is_events: bool,
}

impl Upstream {
    /// The next piece to be passed on; `None` at the end.
    async fn next(&mut self) -> Option<Result<Bytes, BoxError>> {
        loop {
            match *self.link.borrow_and_update() {
                Link::Ended => return None,
                Link::Open | Link::Held | Link::Cut => {}
            }
            passes(&mut self.link).await;
            let frame = tokio::select! {
                _ = self.link.changed() => continue,
                frame = self.body.frame() => frame?,
            };
            let data = match frame {
                Ok(frame) => frame.into_data().unwrap_or_default(),
                Err(error) => return Some(Err(error.into())),
            };
            // A piece that was under way when the link was held waits with the others.
            passes(&mut self.link).await;
            let kept = if self.is_events { self.without_losses(&data) } else { data };
            if !kept.is_empty() {
                return Some(Ok(kept));
            }
        }
    }

    fn without_losses(&mut self, data: &[u8]) -> Bytes {
        self.unfinished.extend_from_slice(data);
        let Some(end) = self.unfinished.iter().rposition(|byte| *byte == b'\n') else {
            return Bytes::new();
        };
        let rest = self.unfinished.split_off(end + 1);
        let whole = std::mem::replace(&mut self.unfinished, rest);
        let losses = self.shared.losses.lock().unwrap();
        let mut kept = Vec::with_capacity(whole.len());
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            match serde_json::from_slice::<Value>(line) {
                Ok(event) if losses.iter().any(|is_lost| is_lost(&event)) => {
                    self.shared.lost.lock().unwrap().push(event);
                }
                _ => kept.extend_from_slice(line),
            }
        }
        kept.into()
    }
}
