//! A Docker Engine that says what a test wants: a list, `inspect` and events on a unix socket, and restarts.

use std::{
    collections::BTreeMap,
    env, fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::broadcast,
    task::JoinHandle,
};

use super::upstream::Upstream;

/// Events on their way to subscribers.
const EVENTS_MAX: usize = 64;

/// An engine. It answers from [`Engine::start`] to [`Engine::stop`], again and again.
pub(crate) struct Engine {
    path: PathBuf,
    containers: Arc<Mutex<BTreeMap<String, Value>>>,
    running: Option<Running>,
}

struct Running {
    accepting: JoinHandle<()>,
    events: Arc<Events>,
}

/// What has happened since the engine was started. Like a real engine's, a subscription begins with the events since the
/// time that it names, so that none is lost between the list and the moment when it reaches the engine.
struct Events {
    past: Mutex<Vec<(i64, String)>>,
    to_all: broadcast::Sender<String>,
}

impl Events {
    fn push(&self, event: &Value) {
        let mut past = self.past.lock().unwrap();
        past.push((event["timeNano"].as_i64().unwrap(), event.to_string()));
        // There need not be a subscriber.
        let _ = self.to_all.send(event.to_string());
    }

    /// The events since this time, and those to come.
    fn since(&self, nanos: i64) -> (Vec<String>, broadcast::Receiver<String>) {
        let past = self.past.lock().unwrap();
        let replayed = past.iter().filter(|(time, _)| *time >= nanos).map(|(_, event)| event.clone()).collect();
        (replayed, self.to_all.subscribe())
    }
}

// === impl Engine ===

impl Engine {
    /// An engine that answers, without containers.
    pub(crate) fn start_new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("it-engine-{}-{number}.sock", std::process::id()));
        let mut engine = Self { path, containers: Arc::default(), running: None };
        engine.start();
        engine
    }

    /// As `DOCKER_HOST` names it.
    pub(crate) fn host(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Begins to answer.
    pub(crate) fn start(&mut self) {
        let _ = fs::remove_file(&self.path);
        let listener = UnixListener::bind(&self.path).unwrap();
        let events = Arc::new(Events { past: Mutex::default(), to_all: broadcast::channel(EVENTS_MAX).0 });
        let (containers, told) = (self.containers.clone(), events.clone());
        let accepting = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                connections.spawn(serve(connection, containers.clone(), told.clone()));
            }
        });
        self.running = Some(Running { accepting, events });
    }

    /// Ends, and every connection with it. The socket stays behind, as that of a killed engine does.
    pub(crate) async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.accepting.abort();
            let _ = running.accepting.await;
        }
    }

    /// What it says of a container from now on.
    pub(crate) fn set(&self, container: &Value) {
        let id = container["Id"].as_str().unwrap().to_owned();
        self.containers.lock().unwrap().insert(id, container.clone());
    }

    /// Sends an event about a container. `attributes` are those that the engine adds to its labels.
    pub(crate) fn tell(&self, id: &str, action: &str, attributes: &[(&str, &str)]) {
        let mut all = BTreeMap::from([("inference.enable", "true")]);
        all.extend(attributes.iter().copied());
        self.send(&json!({
            "Type": "container", "Action": action, "timeNano": now_nanos(), "Actor": { "ID": id, "Attributes": all },
        }));
    }

    /// Sends an event about a network that a container leaves or joins.
    pub(crate) fn tell_network(&self, id: &str, action: &str, network: &str) {
        self.send(&json!({
            "Type": "network", "Action": action, "timeNano": now_nanos(),
            "Actor": { "ID": network, "Attributes": { "container": id, "name": network } },
        }));
    }

    fn send(&self, event: &Value) {
        if let Some(running) = &self.running {
            running.events.push(event);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.accepting.abort();
        }
        let _ = fs::remove_file(&self.path);
    }
}

/// A running container that publishes the port of `upstream`, and has a health check each 20 s.
pub(crate) fn container_of(upstream: &Upstream) -> Value {
    let port = format!("{}/tcp", upstream.addr.port());
    json!({
        "Id": upstream.name, "Name": format!("/{}", upstream.name),
        "State": {
            "Status": "running", "StartedAt": "2026-01-01T00:00:00.5Z",
            "Health": { "Status": "healthy", "FailingStreak": 0, "Log": [] },
        },
        "Config": {
            "Image": "llm",
            "Labels": { "inference.enable": "true", "inference.port": upstream.addr.port().to_string() },
            "Healthcheck": { "Test": ["CMD", "true"], "Interval": 20_000_000_000_i64, "Timeout": 5_000_000_000_i64 },
        },
        "HostConfig": { "NetworkMode": "bridge" },
        "NetworkSettings": {
            "Networks": {},
            "Ports": { port: [{ "HostIp": "127.0.0.1", "HostPort": upstream.addr.port().to_string() }] },
        },
    })
}

async fn serve(mut connection: UnixStream, containers: Arc<Mutex<BTreeMap<String, Value>>>, events: Arc<Events>) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match connection.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let target = head.split(' ').nth(1).unwrap_or_default();
        let path = target.split('?').next().unwrap_or_default();
        // Clients may name a version.
        let path = path.find("/containers/").or(path.find("/events")).map_or(path, |at| &path[at..]);
        if path == "/events" {
            let begin = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
            let mut sent = connection.write_all(begin).await;
            let (replayed, mut to_come) = events.since(since(target));
            let mut replayed = replayed.into_iter();
            while sent.is_ok() {
                let event = match replayed.next() {
                    Some(event) => event,
                    None => match to_come.recv().await {
                        Ok(event) => event,
                        Err(_) => return,
                    },
                };
                sent = connection.write_all(format!("{:x}\r\n{event}\n\r\n", event.len() + 1).as_bytes()).await;
            }
            return;
        }
        let (status, body) = answer(path, &containers.lock().unwrap());
        let length = body.len();
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}");
        if connection.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// `since=SECONDS.NANOSECONDS` of a subscription, in nanoseconds; now if it names none.
fn since(target: &str) -> i64 {
    let value = target.split(['?', '&']).find_map(|pair| pair.strip_prefix("since="));
    let Some((seconds, nanos)) = value.and_then(|value| value.split_once('.')) else { return now_nanos() };
    seconds.parse::<i64>().unwrap() * 1_000_000_000 + nanos.parse::<i64>().unwrap()
}

fn answer(path: &str, containers: &BTreeMap<String, Value>) -> (&'static str, String) {
    if path == "/containers/json" {
        let alive = containers.values().filter(|container| container["State"]["Status"] != "exited");
        let list: Vec<Value> = alive
            .map(|container| json!({ "Id": container["Id"], "State": container["State"]["Status"], "Labels": container["Config"]["Labels"] }))
            .collect();
        return ("200 OK", Value::from(list).to_string());
    }
    let id = path.trim_start_matches("/containers/").trim_end_matches("/json");
    match containers.get(id) {
        Some(container) => ("200 OK", container.to_string()),
        None => ("404 Not Found", json!({ "message": format!("No such container: {id}") }).to_string()),
    }
}

fn now_nanos() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_nanos()).unwrap()
}
