//! Talking to the engine: connecting to it, its GETs, its event stream, and what to say when that fails.
//!
//! Of bollard is kept: the client, one type for every kind of host; TLS with the files of `DOCKER_CERT_PATH`; and the
//! kinds of its errors. Its models are not used, because their closed enums make a whole answer unreadable for one word
//! that they do not know: answers come as bytes and are read in [`super::answers`]. Its framing of events is not
//! used either, because it ends the stream at the first line that it cannot read. Sockets and plain TCP have a transport
//! of our own, because bollard shows no header of an answer, and a header tells Podman.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bollard::{BollardRequest, Docker, errors::Error};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http::{HeaderValue, Uri, header, uri::PathAndQuery};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::{
    net::{TcpStream, UnixStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    answers::{self, Line, Lines, Listed},
    event::{self, Message, Notice},
    host,
    inspect::Inspected,
    paths::{Call, Paths},
};
use crate::{base::config::DockerEndpoint, control::discovery::DiscoveryError};

const LOCAL_SOCKET: &str = "unix:///var/run/docker.sock";
/// Time for one answer of the engine. `inspect` waits for the container's lock: seconds, with GPU hooks.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the head of the event stream: some versions of Podman hold it back until the first event. The list, which is
/// asked for beside it, tells whether the engine answers at all.
const STREAM_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
/// Largest answer that is taken: a thousand containers in the list are some megabytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Events between the reader and the loop. More than that at once means that the list is compared instead.
const EVENTS_MAX: usize = 1024;
/// How much of the body of an error is read, and for how long: enough for an engine's own words.
const ERROR_BYTES_MAX: usize = 64 << 10;
const ERROR_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an engine that answers with a failure is asked before that is told, and the longest wait between.
const ASKED_MAX: usize = 3;
const ASK_AGAIN_MS: u64 = 150;
/// An event stream that is not refused within this time is taken.
const REFUSED_WITHIN: Duration = Duration::from_secs(1);
/// What stands for itself in a path or a query.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client and the address it goes to, for messages.
#[derive(Clone)]
pub(super) struct Engine {
    client: Docker,
    pub(super) host: Arc<str>,
    /// What stands before its paths.
    paths: Arc<Paths>,
    seen: Arc<Known>,
}

/// What the answers of an engine have told about it.
#[derive(Debug, Default)]
struct Known {
    /// It is Podman: its answers carry the header `Libpod-Api-Version`.
    is_podman: AtomicBool,
    /// Its headers are not seen here: it is reached over TLS.
    is_veiled: bool,
}

/// Why there is no answer that can be used.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The answer has this status. The message is the engine's own, and is repeated nowhere.
    Status(u16, String),
    /// There was none in time.
    TimedOut,
    /// It is larger than [`ANSWER_BYTES_MAX`].
    TooLarge,
    /// It is not what the engine answers.
    Unreadable,
    /// There is no connection, or it broke.
    Client(Error),
}

/// What the event stream brings.
pub(super) enum Heard {
    Notice(Notice),
    /// An event that cannot be read was skipped; its time, if there is one.
    Unreadable(Option<i64>),
    /// Something that does not concern discovery: the stream works.
    Other,
    /// More came than there was room for.
    Overflow,
    /// The stream is over; the text is for the log.
    Over(DiscoveryError),
}

impl Engine {
    /// A client for the engine at `endpoint`, whose `paths` have been found to work before, or will be found.
    pub(super) fn connect(endpoint: &DockerEndpoint, paths: Arc<Paths>) -> Result<Engine, DiscoveryError> {
        let host = endpoint.host.as_deref().unwrap_or(LOCAL_SOCKET);
        let seconds = ANSWER_TIMEOUT.as_secs();
        let api = bollard::API_DEFAULT_VERSION;
        let is_veiled = endpoint.tls || host.starts_with("https://");
        let known = Arc::new(Known { is_veiled: is_veiled && !host.starts_with("unix://"), ..Known::default() });
        let transport = |place: Place| {
            let known = known.clone();
            // The host of a request to a socket says nothing.
            let name = place.authority();
            let send = move |request: BollardRequest| send(place.clone(), known.clone(), request);
            Docker::connect_with_custom_transport(send, Some(format!("http://{name}")), seconds, api)
        };
        let client = if let Some(path) = host.strip_prefix("unix://") {
            match Path::new(path).exists() {
                true => transport(Place::Socket(path.into())),
                false => Err(Error::SocketNotFoundError(path.to_owned())),
            }
        } else if is_veiled {
            let certs = endpoint.cert_path.clone().unwrap_or_default();
            let pem = |name: &str| certs.join(name);
            Docker::connect_with_ssl(host, &pem("key.pem"), &pem("cert.pem"), &pem("ca.pem"), seconds, api)
        } else {
            let (name, port) = host::machine(host).unwrap_or_default();
            transport(Place::Tcp(name.into(), port))
        };
        let shown = host::shown(host);
        match client {
            Ok(client) => Ok(Engine { client, host: shown.into(), paths, seen: known }),
            Err(error) => Err(explain("cannot reach the Docker Engine", &shown, &Trouble::Client(error))),
        }
    }

    /// It has answered as Podman does.
    pub(super) fn is_podman(&self) -> bool {
        self.seen.is_podman.load(Ordering::Relaxed)
    }

    /// The bytes that answer a GET. bollard reads every answer but one kind for its caller; the method for that kind is
    /// borrowed, and asks for another path.
    fn stream(&self, path: String, patience: Duration) -> impl Stream<Item = Result<Bytes, Error>> + Unpin + use<> {
        let client = self.client.clone().with_timeout(patience).with_request_modifier(move |mut request| {
            let mut parts = request.uri().clone().into_parts();
            if let Ok(path) = PathAndQuery::try_from(&*path) {
                parts.path_and_query = Some(path);
            }
            if let Ok(uri) = Uri::from_parts(parts) {
                *request.uri_mut() = uri;
            }
            request
        });
        Box::pin(client.export_container("_"))
    }

    /// One GET of a path that begins with a slash.
    async fn get(&self, path: String) -> Result<Bytes, Trouble> {
        let mut pieces = self.stream(path, ANSWER_TIMEOUT);
        let whole = async {
            let mut body = Vec::new();
            while let Some(piece) = pieces.next().await {
                let piece = piece.map_err(Trouble::from)?;
                if body.len() + piece.len() > ANSWER_BYTES_MAX {
                    return Err(Trouble::TooLarge);
                }
                body.extend_from_slice(&piece);
            }
            Ok(Bytes::from(body))
        };
        timeout(ANSWER_TIMEOUT, whole).await.map_err(|_| Trouble::TimedOut)?
    }

    async fn get_json(&self, path: String) -> Result<Value, Trouble> {
        answers::json(&self.get(path).await?).map_err(|answers::NotJson| Trouble::Unreadable)
    }

    /// Asks, and finds out which API version has to stand before the path, if the engine or the proxy before it refuses
    /// it: the one that works is kept.
    ///
    /// One failure of an engine that works is not made much of: it is asked again at once.
    async fn ask(&self, call: Call, path: &str) -> Result<Value, Trouble> {
        let mut asked = 1;
        loop {
            match self.ask_once(call, path).await {
                // What is asked at the same time is not to come in step.
                Err(Trouble::Status(500.., _)) if asked < ASKED_MAX => {
                    sleep(Duration::from_millis(fastrand::u64(ASK_AGAIN_MS / 3..=ASK_AGAIN_MS))).await;
                }
                answer => return answer,
            }
            asked += 1;
        }
    }

    async fn ask_once(&self, call: Call, path: &str) -> Result<Value, Trouble> {
        let prefix = self.paths.prefix(call);
        let refused = match self.get_json(format!("{prefix}{path}")).await {
            Err(trouble) if trouble.is_refusal() => trouble,
            answer => return self.answered(call, &prefix, answer),
        };
        let Some(mut search) = self.paths.search(call, &prefix).await else { return Err(refused) };
        let mut named = refused.version_named();
        while let Some(prefix) = search.next(named.take()) {
            match self.get_json(format!("{prefix}{path}")).await {
                Err(trouble) if trouble.is_refusal() => named = trouble.version_named(),
                // It does not answer any more, so that no other version will do better.
                Err(Trouble::TimedOut | Trouble::Client(_)) => break,
                answer => return self.answered(call, &prefix, answer),
            }
        }
        Err(refused)
    }

    fn answered(&self, call: Call, prefix: &Arc<str>, answer: Result<Value, Trouble>) -> Result<Value, Trouble> {
        if answer.is_ok() || answer.as_ref().is_err_and(Trouble::says_no_such_container) {
            self.paths.worked(call, prefix);
        }
        answer
    }

    /// One `inspect`; `None` if there is no such container. Only the engine's own words say so: a page with status 404
    /// that comes from elsewhere is a failure like any other.
    pub(super) async fn inspect(&self, id: &str) -> Result<Option<Inspected>, String> {
        let path = format!("/containers/{}/json", utf8_percent_encode(id, PLAIN));
        match self.ask(Call::Inspect, &path).await {
            Ok(answer) => match Inspected::read(id, &answer) {
                Some(seen) => Ok(Some(seen)),
                None => Err(reason(&Trouble::Unreadable)),
            },
            Err(trouble) if trouble.says_no_such_container() => Ok(None),
            Err(trouble) => Err(reason(&trouble)),
        }
    }

    /// The list of labelled containers that run.
    pub(super) async fn list(&self) -> Result<Listed, DiscoveryError> {
        let listed = self.try_list().await;
        if self.seen.is_veiled && !self.is_podman() && listed.is_ok() {
            self.ask_whether_podman().await;
        }
        listed.map_err(|trouble| explain("cannot list containers", &self.host, &trouble))
    }

    async fn try_list(&self) -> Result<Listed, Trouble> {
        let filters = utf8_percent_encode(r#"{"label":["inference.enable"]}"#, PLAIN);
        let answer = self.ask(Call::List, &format!("/containers/json?filters={filters}")).await?;
        Listed::read(&answer).ok_or(Trouble::Unreadable)
    }

    async fn ask_whether_podman(&self) {
        let path = format!("{}/version", self.paths.prefix(Call::List));
        if let Ok(answer) = self.get_json(path).await {
            self.seen.is_podman.store(answers::is_version_of_podman(&answer), Ordering::Relaxed);
        }
    }

    /// Starts the reader of events since `since`: a task that does nothing but read. It ends when its guard is dropped.
    pub(super) fn subscribe(&self, since: &str) -> (mpsc::Receiver<Heard>, DropGuard) {
        let (heard, receiver) = mpsc::channel(EVENTS_MAX);
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let filters: HashMap<&str, Vec<&str>> =
            HashMap::from([("type", vec!["container", "network"]), ("event", event::ACTIONS.to_vec())]);
        let filters = serde_json::to_string(&filters).unwrap_or_default();
        let filters = utf8_percent_encode(&filters, PLAIN);
        let path = format!("/events?since={since}&filters={filters}");
        let engine = self.clone();
        let read = async move {
            let (begun, pieces) = engine.begin_events(&path).await;
            read_events(futures::stream::iter(begun).chain(pieces), engine.host, heard).await;
        };
        // Ended by its guard, which the loop holds: it needs no place among the application's tasks.
        tokio::spawn(async move { stop.run_until_cancelled(read).await });
        (receiver, guard)
    }

    /// The event stream by a path that is not refused, if there is one, and what has come of it already.
    async fn begin_events(
        &self,
        path: &str,
    ) -> (Option<Result<Bytes, Trouble>>, impl Stream<Item = Result<Bytes, Trouble>> + Unpin + use<>) {
        let mut prefix = self.paths.prefix(Call::Events);
        let mut search = None;
        loop {
            let mut pieces =
                self.stream(format!("{prefix}{path}"), STREAM_TIMEOUT).map(|piece| piece.map_err(Trouble::from));
            let first = timeout(REFUSED_WITHIN, pieces.next()).await;
            let named = match &first {
                Ok(Some(Err(trouble))) if trouble.is_refusal() => trouble.version_named(),
                Ok(Some(Err(_))) => return (first.ok().flatten(), pieces),
                Ok(Some(Ok(_)) | None) | Err(_) => {
                    self.paths.worked(Call::Events, &prefix);
                    return (first.ok().flatten(), pieces);
                }
            };
            if search.is_none() {
                search = self.paths.search(Call::Events, &prefix).await;
            }
            match search.as_mut().and_then(|search| search.next(named)) {
                Some(next) => prefix = next,
                None => return (first.ok().flatten(), pieces),
            }
        }
    }
}

async fn read_events(
    mut pieces: impl Stream<Item = Result<Bytes, Trouble>> + Unpin,
    host: Arc<str>,
    heard: mpsc::Sender<Heard>,
) {
    let mut lines = Lines::default();
    let error = loop {
        let piece = match pieces.next().await {
            Some(Ok(piece)) => piece,
            Some(Err(trouble)) => break explain("the event stream broke", &host, &trouble),
            None => {
                let what = "the event stream ended".to_owned();
                break DiscoveryError { what, advice: "it is begun again until it works".to_owned() };
            }
        };
        for line in lines.push(&piece) {
            let news = match line {
                Line::Unreadable(time) => Heard::Unreadable(time),
                Line::Value(value) => match event::read(&value) {
                    Message::News(notice) => Heard::Notice(notice),
                    Message::Unreadable(time) => Heard::Unreadable(time),
                    Message::Other => Heard::Other,
                },
            };
            if heard.try_send(news).is_err() {
                // The list tells what is lost here.
                tracing::warn!("more events at once than there is room for, comparing the list instead");
                if heard.send(Heard::Overflow).await.is_err() {
                    return;
                }
            }
        }
    };
    let _ = heard.send(Heard::Over(error)).await;
}

// === transport ===

/// Where an engine listens.
#[derive(Debug, Clone)]
enum Place {
    Socket(Arc<str>),
    /// Name or address, and port.
    Tcp(Arc<str>, u16),
}

impl Place {
    fn authority(&self) -> Arc<str> {
        match self {
            Place::Socket(_) => "localhost".into(),
            Place::Tcp(name, port) if name.contains(':') => format!("[{name}]:{port}").into(),
            Place::Tcp(name, port) => format!("{name}:{port}").into(),
        }
    }
}

/// Sends one request over a connection of its own, and notes what the head of the answer tells.
async fn send(place: Place, known: Arc<Known>, request: BollardRequest) -> Result<http::Response<Incoming>, Error> {
    let response = match &place {
        Place::Socket(path) => exchange(UnixStream::connect(&**path).await?, &place, request).await?,
        Place::Tcp(name, port) => exchange(TcpStream::connect((&**name, *port)).await?, &place, request).await?,
    };
    if response.headers().contains_key("libpod-api-version") {
        known.is_podman.store(true, Ordering::Relaxed);
    }
    match response.status().is_success() {
        true => Ok(response),
        // bollard would collect the whole of it.
        false => Err(error_of(response).await),
    }
}

/// An answer that is an error, with the engine's message as far as it is read; whatever else a body holds is the message.
async fn error_of(response: http::Response<Incoming>) -> Error {
    let status_code = response.status().as_u16();
    let mut body = response.into_body();
    let mut read = Vec::new();
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            let piece = frame.into_data().unwrap_or_default();
            let room = ERROR_BYTES_MAX.saturating_sub(read.len());
            read.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.len() >= room {
                break;
            }
        }
    };
    // Slow bodies are cut, too: the status has come.
    let _ = timeout(ERROR_TIMEOUT, reading).await;
    let message = answers::json(&read).ok().and_then(|answer| Some(answers::text(&answer["message"])?.to_owned()));
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(&read).into_owned());
    Error::DockerResponseServerError { status_code, message }
}

async fn exchange<S>(stream: S, place: &Place, mut request: BollardRequest) -> Result<http::Response<Incoming>, Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
    let host = HeaderValue::try_from(&*place.authority()).unwrap_or(HeaderValue::from_static("localhost"));
    request.headers_mut().insert(header::HOST, host);
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer, or as soon as the answer is dropped before its end.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

// === words ===

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        match error {
            Error::DockerResponseServerError { status_code, message } => Trouble::Status(status_code, message),
            Error::RequestTimeoutError => Trouble::TimedOut,
            Error::JsonSerdeError { .. } | Error::JsonDataError { .. } => Trouble::Unreadable,
            error => Trouble::Client(error),
        }
    }
}

impl Trouble {
    /// The path was refused, which another API version before it may change. A conflict is about the container.
    fn is_refusal(&self) -> bool {
        matches!(self, Trouble::Status(300..=499 | 501, _))
            && !matches!(self, Trouble::Status(408 | 409 | 429, _))
            && !self.says_no_such_container()
    }

    fn says_no_such_container(&self) -> bool {
        matches!(self, Trouble::Status(404, message) if answers::says_no_such_container(message))
    }

    fn version_named(&self) -> Option<(u16, u16)> {
        match self {
            Trouble::Status(_, message) => answers::version_named(message),
            _ => None,
        }
    }
}

/// What was wrong with one answer, in the words of a reason, without quoting what the engine sent.
fn reason(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Status(status, _) => format!("the answer was {status}"),
        Trouble::TimedOut => format!("no answer within {ANSWER_TIMEOUT:?}"),
        Trouble::TooLarge => format!("the answer has more than {} MiB", ANSWER_BYTES_MAX >> 20),
        Trouble::Unreadable => "the answer cannot be read".to_owned(),
        Trouble::Client(error) => chain(error),
    }
}

fn chain(error: &Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// Says what failed and what to do about it, without quoting what the engine sent: its answers hold the environment of
/// containers.
fn explain(what: &str, host: &str, trouble: &Trouble) -> DiscoveryError {
    let (detail, advice) = match trouble {
        Trouble::Status(400..=499, _) => (
            reason(trouble),
            "let the Docker API proxy allow GET /events, /containers/json and /containers/{id}/json, as they are or with \
             one API version before them: /v1.24 to /v1.60 are tried",
        ),
        Trouble::Status(..) => (reason(trouble), "see the log of the Docker Engine"),
        Trouble::TimedOut => ("it gave no answer".to_owned(), "see whether the Docker Engine hangs"),
        Trouble::TooLarge => (reason(trouble), "see what answers there: it is no list of containers"),
        Trouble::Unreadable => (
            "its answer cannot be read".to_owned(),
            "see what answers there: it is no Docker Engine, or one that is too new for this proxy",
        ),
        Trouble::Client(Error::SocketNotFoundError(_)) => (
            "there is no such socket".to_owned(),
            "mount it into this container (-v /var/run/docker.sock:/var/run/docker.sock:ro) or set DOCKER_HOST",
        ),
        Trouble::Client(
            Error::CertPathError { path } | Error::CertParseError { path } | Error::CertMultipleKeys { path, .. },
        ) => (format!("{} cannot be used", path.display()), "DOCKER_CERT_PATH must hold ca.pem, cert.pem and key.pem"),
        Trouble::Client(other) => {
            let text = chain(other);
            let advice = if text.contains("ermission denied") {
                "run this container with the group of the socket (group_add), or as root"
            } else if text.contains("refused") {
                "is the Docker Engine running? a socket mounted as a file goes stale when the engine is restarted: \
                 restart this container, or mount the folder"
            } else {
                "it is tried again until it works"
            };
            (text, advice)
        }
    };
    DiscoveryError { what: format!("{what} at {host}: {detail}"), advice: advice.to_owned() }
}
