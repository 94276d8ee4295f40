//! The watcher against an engine that does what no real one can be made to do at the right moment. Its time is virtual:
//! waits cost nothing, and what takes 30 s is over at once.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use super::{engine::ANSWER_TIMEOUT, *};
use crate::control::discovery::Endpoint;

mod failing;
mod odd;
mod standing;
mod versions;

/// 2100-01-01T00:00:00Z, when every container here was started: what happens to them happens after watching began.
const STARTED_S: i64 = 4_102_444_800;
const SECOND: i64 = 1_000_000_000;

std::thread_local! {
    /// What the watcher takes for this machine's time, in seconds after the start.
    static CLOCK_S: Cell<i64> = const { Cell::new(0) };
    /// Where it stands, as far as its machine tells.
    static PLACE: RefCell<Standing> = RefCell::default();
}

fn clock() -> i64 {
    (STARTED_S + CLOCK_S.get()) * SECOND
}

fn place() -> io::Result<Standing> {
    PLACE.with_borrow(|standing| Ok(standing.clone()))
}

/// An engine: its containers, and what is wrong with it. Requests whose path holds a text in `held` wait for the test.
#[derive(Default)]
struct Script {
    containers: BTreeMap<&'static str, Value>,
    held: Vec<&'static str>,
    /// Answers to everything under this path.
    broken: Option<(&'static str, &'static str)>,
    /// Status and body for paths that hold a text.
    failing: Vec<(&'static str, &'static str, &'static str)>,
    /// Paths without this before them are refused with 403.
    prefix: &'static str,
    /// The same for paths that hold a text.
    prefixes: Vec<(&'static str, &'static str)>,
    /// What the engine says to a version that it does not take; else that is refused, too.
    refusal: Option<&'static str>,
    /// It is Podman.
    is_podman: bool,
    /// Only every so many-th question is answered, the others with 500.
    answers_every: Option<usize>,
    /// Answers under this path break off in the middle.
    breaks_off: Option<&'static str>,
    /// Paths that were asked for.
    asked: Vec<String>,
}

/// A request that waits for its answer, which was made when it came.
struct Held {
    connection: UnixStream,
    answer: String,
}

/// One subscription: the test writes its events.
struct Stream {
    connection: UnixStream,
    /// `since`, in nanoseconds.
    since: i64,
}

struct FakeEngine {
    path: PathBuf,
    script: Arc<Mutex<Script>>,
    streams: mpsc::Receiver<Stream>,
    held: mpsc::Receiver<Held>,
    changes: BoxStream<'static, Result<Change, DiscoveryError>>,
    wanted: mpsc::Sender<crate::control::discovery::EndpointId>,
    to_test: (mpsc::Sender<Stream>, mpsc::Sender<Held>),
}

fn container(id: &str, status: &str) -> Value {
    json!({
        "Id": id, "Name": format!("/{id}"),
        "State": { "Status": status, "StartedAt": "2100-01-01T00:00:00Z" },
        "Config": { "Image": "llm", "Labels": { "inference.enable": "true" } },
        "HostConfig": { "NetworkMode": "bridge" },
        "NetworkSettings": { "Networks": {}, "Ports": { "8000/tcp": [{ "HostIp": "127.0.0.1", "HostPort": "8000" }] } },
    })
}

/// An event, so many seconds after the start.
fn event(id: &str, action: &str, at_s: i64) -> String {
    let signal = if action == "kill" { "15" } else { "" };
    json!({
        "Type": "container", "Action": action, "timeNano": (STARTED_S + at_s) * 1_000_000_000,
        "Actor": { "ID": id, "Attributes": { "inference.enable": "true", "signal": signal } },
    })
    .to_string()
}

fn answer(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

impl Script {
    fn answer(&mut self, path: &str) -> String {
        self.asked.push(path.to_owned());
        if let Some(refusal) = self.refuses(path) {
            return refusal;
        }
        if self.answers_every.is_some_and(|every| !self.asked.len().is_multiple_of(every)) {
            return answer("500 Oh", r#"{"message":"not now"}"#);
        }
        let path = path.strip_prefix(self.prefix_of(path)).unwrap();
        let mut answer = self.answer_plainly(path);
        if self.breaks_off.is_some_and(|under| path.contains(under)) {
            answer.truncate(answer.len() - 20);
        }
        match self.is_podman {
            true => answer.replacen("\r\n", "\r\nLibpod-Api-Version: 5.4.2\r\n", 1),
            false => answer,
        }
    }

    fn prefix_of(&self, path: &str) -> &'static str {
        let own = self.prefixes.iter().find(|(part, _)| path.contains(part));
        own.map_or(self.prefix, |(_, prefix)| prefix)
    }

    fn refuses(&self, path: &str) -> Option<String> {
        let version = path.find("/containers").or(path.find("/events")).map_or("", |end| &path[..end]);
        if version == self.prefix_of(path) {
            return None;
        }
        let (status, message) = match self.refusal.filter(|_| path.starts_with("/v")) {
            Some(refusal) => ("400 Bad Request", refusal),
            None => ("403 Forbidden", "no"),
        };
        Some(answer(status, &json!({ "message": message }).to_string()))
    }

    /// What the list says of a container: `listed` in its JSON is put over the usual.
    fn listed(&self, id: &str) -> Value {
        let mut entry = json!({
            "Id": id, "Names": [format!("/{id}")], "Image": "llm", "State": "running",
            "Labels": { "inference.enable": "true" },
        });
        for (field, value) in self.containers[id]["listed"].as_object().into_iter().flatten() {
            entry[field] = value.clone();
        }
        entry
    }

    fn answer_plainly(&self, path: &str) -> String {
        if let Some((_, status, body)) = self.failing.iter().find(|(part, ..)| path.contains(part)) {
            return answer(status, body);
        }
        if let Some((_, body)) = self.broken.filter(|(under, _)| path.starts_with(under)) {
            return answer("200 OK", body);
        }
        if path == "/containers/json" {
            let is_left_out = |status: &str| matches!(status, "exited" | "stopping" | "stopped");
            let alive = |json: &Value| !json["State"]["Status"].as_str().is_some_and(is_left_out);
            let ids = self.containers.iter().filter(|(_, json)| alive(json));
            let list: Vec<Value> = ids.map(|(id, _)| self.listed(id)).collect();
            return answer("200 OK", &Value::from(list).to_string());
        }
        let id = path.trim_start_matches("/containers/").trim_end_matches("/json");
        match self.containers.get(id) {
            Some(json) => answer("200 OK", &json.to_string()),
            None => answer("404 Not Found", r#"{"message":"No such container"}"#),
        }
    }
}

async fn serve(
    mut connection: UnixStream,
    script: Arc<Mutex<Script>>,
    streams: mpsc::Sender<Stream>,
    held: mpsc::Sender<Held>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match connection.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.split(' ').nth(1).unwrap();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (broken, is_held, refusal, answer) = {
        let mut script = script.lock().unwrap();
        let broken = script.broken.is_some_and(|(under, _)| path.starts_with(under));
        let is_held = script.held.iter().any(|part| path.contains(part));
        (broken, is_held, script.refuses(path), script.answer(path))
    };
    if path.ends_with("/events") {
        if let Some(refusal) = refusal {
            let _ = connection.write_all(refusal.as_bytes()).await;
            return;
        }
        if broken {
            let forbidden = self::answer("403 Forbidden", r#"{"message":"not allowed"}"#);
            let _ = connection.write_all(forbidden.as_bytes()).await;
            return;
        }
        let since = query.split('&').find_map(|pair| pair.strip_prefix("since=")).unwrap();
        let (seconds, nanos) = since.split_once('.').unwrap();
        let since = seconds.parse::<i64>().unwrap() * 1_000_000_000 + nanos.parse::<i64>().unwrap();
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        if connection.write_all(head).await.is_err() {
            return; // the watcher begins anew
        }
        let _ = streams.send(Stream { connection, since }).await;
    } else if is_held {
        let _ = held.send(Held { connection, answer }).await;
    } else {
        // Who asked may have left.
        let _ = connection.write_all(answer.as_bytes()).await;
    }
}

impl FakeEngine {
    /// An engine with these containers, all running, and a watcher on it; not listening yet.
    fn new(containers: &[&'static str]) -> FakeEngine {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("engine-{}-{number}.sock", std::process::id()));
        let host = Some(format!("unix://{}", path.display()));
        let endpoint = DockerEndpoint { host, ..DockerEndpoint::default() };
        let (streams_sender, streams) = mpsc::channel(16);
        let (held_sender, held) = mpsc::channel(16);
        let (wanted, looks) = mpsc::channel(16);
        let script = Script {
            containers: containers.iter().map(|id| (*id, container(id, "running"))).collect(),
            ..Script::default()
        };
        FakeEngine {
            path,
            script: Arc::new(Mutex::new(script)),
            streams,
            held,
            changes: Box::new(DockerDiscovery { clock, place, ..DockerDiscovery::new(endpoint, None, Vec::new()) })
                .changes(looks),
            wanted,
            to_test: (streams_sender, held_sender),
        }
    }

    fn listen(&self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        let (script, (streams, held)) = (self.script.clone(), self.to_test.clone());
        tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(connection, script.clone(), streams.clone(), held.clone()));
            }
        });
    }

    /// One that listens, whose containers have been reported.
    async fn synced(containers: &[&'static str]) -> (FakeEngine, Stream) {
        let mut engine = FakeEngine::new(containers);
        engine.listen();
        engine.until(&format!("reset {}", containers.join(" "))).await;
        let stream = engine.stream().await;
        (engine, stream)
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    async fn next(&mut self) -> String {
        let next = timeout(Duration::from_secs(120), self.changes.next());
        match next.await.expect("a change must come").unwrap() {
            Err(error) => format!("error {error}"),
            Ok(Change::Reset(endpoints)) => {
                let mut ids: Vec<&str> = endpoints.iter().map(|endpoint| &*endpoint.id).collect();
                ids.sort_unstable();
                format!("reset {}", ids.join(" "))
            }
            Ok(Change::Upsert(endpoint)) => format!("upsert {}", endpoint.id),
            Ok(Change::Stopping(id)) => format!("stopping {id}"),
            Ok(Change::Suspended(id)) => format!("suspended {id}"),
            Ok(Change::Detached(id)) => format!("detached {id}"),
            Ok(Change::OutOfMemory(id)) => format!("oom {id}"),
            Ok(Change::Ended(id)) => format!("ended {id}"),
            Ok(Change::Notes(notes)) => {
                let texts: Vec<String> = notes.iter().map(ToString::to_string).collect();
                format!("notes {}", texts.join(" | "))
            }
        }
    }

    /// All changes until one is `last`, which is left out.
    async fn until(&mut self, last: &str) -> Vec<String> {
        let mut changes = Vec::new();
        for _ in 0..100 {
            match self.next().await {
                change if change == last => return changes,
                change => changes.push(change),
            }
        }
        panic!("no {last:?} in {changes:?}")
    }

    /// The next subscription. Changes on the way to it are not to be lost: whoever waits for those waits for them first.
    async fn stream(&mut self) -> Stream {
        tokio::select! {
            stream = self.streams.recv() => stream.unwrap(),
            change = self.changes.next() => panic!("{change:?} before a subscription"),
        }
    }

    async fn held(&mut self) -> Held {
        tokio::select! {
            held = self.held.recv() => held.unwrap(),
            change = self.changes.next() => panic!("{change:?} while a request was waited for"),
        }
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Stream {
    async fn send(&mut self, event: &str) {
        let chunk = format!("{:x}\r\n{event}\n\r\n", event.len() + 1);
        self.connection.write_all(chunk.as_bytes()).await.unwrap();
    }

    async fn end(&mut self) {
        self.connection.write_all(b"0\r\n\r\n").await.unwrap();
    }
}

impl Held {
    async fn release(mut self) {
        let _ = self.connection.write_all(self.answer.as_bytes()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_is_asked_for_is_looked_at_at_once() {
    let (mut engine, _stream) = FakeEngine::synced(&["a", "b"]).await;
    let since = Instant::now();
    engine.change(|script| {
        script.containers.remove("a");
    });
    engine.wanted.send("nobody".into()).await.unwrap();
    engine.wanted.send("a".into()).await.unwrap();
    assert_eq!(engine.next().await, "ended a", "no event has told");
    assert!(since.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn what_runs_is_reported_and_events_are_followed() {
    let mut engine = FakeEngine::new(&["a", "b"]);
    engine.listen();
    let mut first = [engine.next().await, engine.next().await];
    first.sort();
    assert_eq!(first, ["upsert a", "upsert b"]);
    assert_eq!(engine.next().await, "reset a b");
    let mut stream = engine.stream().await;

    engine.change(|script| drop(script.containers.insert("c", container("c", "running"))));
    stream.send(&event("c", "start", 1)).await;
    assert_eq!(engine.next().await, "upsert c");
    stream.send(&event("x", "exec_create: noise", 2)).await;
    stream.send(&event("a", "kill", 2)).await;
    assert_eq!(engine.next().await, "stopping a");
    // What has ended is not asked about first.
    engine.change(|script| script.held.push("a/json"));
    stream.send(&event("a", "die", 3)).await;
    assert_eq!(engine.next().await, "ended a");
    stream.send(&event("b", "pause", 4)).await;
    assert_eq!(engine.next().await, "suspended b");
    assert_eq!(engine.next().await, "upsert b");
    stream.send(&event("b", "oom", 5)).await;
    assert_eq!(engine.next().await, "oom b");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_in_any_way_is_begun_again_with_an_overlap() {
    for ending in ["cut", "cut mid-event", "clean end", "partial JSON, clean end", "unknown type"] {
        let (mut engine, mut stream) = FakeEngine::synced(&["a"]).await;
        CLOCK_S.set(10);
        let pause = event("a", "pause", 10);
        stream.send(&pause).await;
        assert_eq!(engine.until("suspended a").await, [""; 0]);
        assert_eq!(engine.next().await, "upsert a");
        match ending {
            "cut mid-event" => stream.connection.write_all(b"400\r\n{\"Type\":\"conta").await.unwrap(),
            "clean end" => stream.end().await,
            "partial JSON, clean end" => {
                stream.send(r#"{"Type":"container","Acti"#).await;
                stream.end().await;
            }
            "unknown type" => stream.send(r#"{"Type":"wormhole","Action":"open","timeNano":1}"#).await,
            _ => {}
        }
        drop(stream);

        let broke_at = Instant::now();
        let mut again = engine.stream().await;
        assert!(broke_at.elapsed() < Duration::from_secs(6), "{ending}");
        assert_eq!(again.since, (STARTED_S + 9) * 1_000_000_000, "{ending}");
        // Nothing was lost with the stream, and what is told twice is heard once.
        again.send(&pause).await;
        again.send(&event("a", "oom", 11)).await;
        let changes = engine.until("oom a").await;
        assert!(changes.iter().all(|change| change == "upsert a" || change == "reset a"), "{ending}: {changes:?}");
    }
}

/// The container `a`, as it was started so many seconds after the beginning.
fn started_at(at_s: i64) -> Value {
    let mut a = container("a", "running");
    let at = OffsetDateTime::from_unix_timestamp(STARTED_S + at_s).unwrap();
    a["State"]["StartedAt"] = at.format(&time::format_description::well_known::Rfc3339).unwrap().into();
    a
}

#[tokio::test(start_paused = true)]
async fn a_start_ahead_of_the_clock_makes_no_event_old() {
    for ahead_s in [1, 5, 7_200, 31_536_000] {
        let mut engine = FakeEngine::new(&[]);
        CLOCK_S.set(0);
        engine.change(|script| drop(script.containers.insert("a", started_at(ahead_s))));
        engine.listen();
        engine.until("reset a").await;
        let mut stream = engine.stream().await;
        stream.send(&event("a", "kill", 0)).await;
        assert_eq!(engine.next().await, "stopping a", "{ahead_s}");
        stream.send(&event("a", "die", 0)).await;
        assert_eq!(engine.next().await, "ended a", "{ahead_s}");
        // Its next run has an earlier time than the one before.
        engine.change(|script| drop(script.containers.insert("a", started_at(0))));
        stream.send(&event("a", "start", 0)).await;
        assert_eq!(engine.next().await, "upsert a", "{ahead_s}");
        stream.send(&event("a", "oom", 0)).await;
        assert_eq!(engine.next().await, "oom a", "{ahead_s}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_put_back_while_events_come_makes_none_of_them_old() {
    let (mut engine, mut stream) = FakeEngine::synced(&["a"]).await;
    tokio::time::advance(REPLAYED_WITHIN).await;
    for (action, expected) in [("kill", "stopping a"), ("oom", "oom a"), ("die", "ended a")] {
        stream.send(&event("a", action, -3_600)).await;
        assert_eq!(engine.until(expected).await.iter().filter(|change| *change != "upsert a").count(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_replayed_of_an_earlier_run_is_old() {
    CLOCK_S.set(30);
    let mut engine = FakeEngine::new(&[]);
    engine.change(|script| drop(script.containers.insert("a", started_at(20))));
    engine.listen();
    engine.until("reset a").await;
    let mut stream = engine.stream().await;
    for (action, at_s) in [("kill", 10), ("die", 11), ("stop", 11)] {
        stream.send(&event("a", action, at_s)).await;
    }
    stream.send(&event("a", "start", 20)).await;
    assert_eq!(engine.next().await, "upsert a", "the run before was stopped");
    // What happened to this run before the subscription counts.
    stream.send(&event("a", "kill", 25)).await;
    assert_eq!(engine.next().await, "stopping a");
}

#[tokio::test(start_paused = true)]
async fn a_subscription_never_begins_in_the_future() {
    for (event_s, clock_s, since_s) in [(7_200, 50, 49), (50, 50, 49), (45, 50, 44), (-3_600, 50, -3_601)] {
        let (mut engine, mut stream) = FakeEngine::synced(&["a"]).await;
        CLOCK_S.set(clock_s);
        tokio::time::advance(REPLAYED_WITHIN).await;
        stream.send(&event("a", "oom", 40)).await;
        stream.send(&event("a", "oom", event_s)).await;
        assert_eq!(engine.until("oom a").await.len(), 0);
        engine.until("oom a").await;
        engine.until("upsert a").await;
        drop(stream);
        let again = engine.stream().await;
        assert_eq!(again.since, (STARTED_S + since_s) * SECOND, "{event_s} at {clock_s}");
        CLOCK_S.set(0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_while_the_list_is_made_is_begun_again_at_once() {
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.held.push("/containers/json"));
    engine.listen();
    let list = engine.held().await;
    drop(engine.stream().await);
    // Gives the watcher the time to hear of it while the list is still outstanding.
    assert!(timeout(Duration::from_secs(1), engine.changes.next()).await.is_err());
    engine.change(|script| script.held.clear());
    list.release().await;
    let released_at = Instant::now();
    loop {
        tokio::select! {
            _again = engine.streams.recv() => break,
            _change = engine.changes.next() => {}
        }
    }
    assert!(released_at.elapsed() < Duration::from_secs(6), "{:?}", released_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn lost_events_are_found_by_the_list_and_the_stream_is_not_trusted_any_more() {
    let (mut engine, _stream) = FakeEngine::synced(&["a", "b"]).await;
    engine.change(|script| {
        script.containers.remove("a");
        script.containers.insert("c", container("c", "running"));
    });
    let lost_at = Instant::now();
    let mut changes = engine.until("reset b c").await;
    changes.sort();
    assert_eq!(changes, ["ended a", "upsert b", "upsert c"]);
    assert!(lost_at.elapsed() <= Duration::from_secs(60), "{:?}", lost_at.elapsed());
    let _another = engine.stream().await;
}

#[tokio::test(start_paused = true)]
async fn a_look_that_an_event_has_overtaken_says_nothing() {
    let (mut engine, mut stream) = FakeEngine::synced(&["a", "b"]).await;
    engine.change(|script| script.held.push("a/json"));
    stream.send(&event("a", "health_status: healthy", 1)).await;
    let stale = engine.held().await; // it runs, says this answer
    stream.send(&event("a", "die", 2)).await;
    assert_eq!(engine.next().await, "ended a");
    engine.change(|script| {
        script.held.clear();
        script.containers.insert("a", container("a", "exited"));
    });
    stale.release().await;
    assert_eq!(engine.until("reset b").await, ["upsert b"], "nothing of a, also in the next list");
}

#[tokio::test(start_paused = true)]
async fn a_container_that_cannot_be_looked_at_delays_no_other() {
    let mut engine = FakeEngine::new(&["a", "b"]);
    engine.change(|script| script.held.push("a/json"));
    engine.listen();
    let began_at = Instant::now();
    assert_eq!(engine.next().await, "upsert b");
    let mut stream = engine.stream().await;
    let _hanging = engine.held().await;
    stream.send(&event("b", "kill", 1)).await;
    assert_eq!(engine.next().await, "stopping b");
    engine.change(|script| drop(script.containers.insert("b", container("b", "exited"))));
    stream.send(&event("b", "die", 2)).await;
    assert_eq!(engine.next().await, "ended b");
    assert!(began_at.elapsed() < Duration::from_millis(100), "{:?}", began_at.elapsed());
    // The whole truth needs all looks, but does not wait for ever.
    let changes = engine.until("reset ").await;
    assert!(changes.iter().all(|change| change == "upsert b" || change == "ended b"), "{changes:?}");
    assert!(began_at.elapsed() <= Duration::from_secs(1), "{:?}", began_at.elapsed());
    // It is told of with the reason, once the engine has had its time.
    let changes = engine.until("upsert a").await;
    assert!(changes.iter().all(|change| change == "reset "), "{changes:?}");
    assert!(began_at.elapsed() <= ANSWER_TIMEOUT + Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn without_events_the_list_goes_on_and_what_is_missing_is_said() {
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.broken = Some(("/events", "")));
    engine.listen();
    assert_eq!(engine.until("reset a").await, ["upsert a"]);
    // That is no reason to say that nothing is seen.
    let changes = loop {
        match engine.next().await {
            note if note.starts_with("notes") => break note,
            change => assert!(matches!(change.as_str(), "upsert a" | "reset a"), "{change}"),
        }
    };
    assert!(
        changes.contains("listing every 5 s") && changes.contains("403") && changes.contains("GET /events"),
        "{changes}"
    );
    engine.change(|script| drop(script.containers.insert("b", container("b", "running"))));
    let (started_at, mut seen) = (Instant::now(), String::new());
    while seen != "upsert b" {
        seen = engine.next().await;
    }
    assert!(started_at.elapsed() <= Duration::from_secs(6), "{:?}", started_at.elapsed());
    engine.change(|script| script.broken = None);
    engine.until("notes ").await;
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_appears_later_is_found() {
    let mut engine = FakeEngine::new(&["a"]);
    for _ in 0..10 {
        let error = engine.next().await;
        assert!(error.contains("no such socket") && error.contains("DOCKER_HOST"), "{error}");
    }
    let appeared_at = Instant::now();
    engine.listen();
    assert_eq!(engine.until("reset a").await, ["upsert a"]);
    assert!(appeared_at.elapsed() < Duration::from_secs(6), "{:?}", appeared_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_list_that_cannot_be_read_proves_nothing() {
    for garbage in ["<html>", r#"[{"Id":7}]"#, r#"{"message":"weird"}"#] {
        let (mut engine, stream) = FakeEngine::synced(&["a"]).await;
        engine.change(|script| script.broken = Some(("/containers/json", garbage)));
        drop(stream); // makes it list
        let error = engine.next().await;
        assert!(error.starts_with("error cannot list containers"), "{garbage}: {error}");
        assert!(!error.contains(garbage), "what engines send is not repeated: {error}");
        engine.change(|script| script.broken = None);
        let changes = engine.until("reset a").await;
        assert!(changes.iter().all(|change| change == "upsert a" || change.starts_with("error")), "{changes:?}");
    }
}

/// Changes a container of the script.
fn set(engine: &FakeEngine, id: &'static str, change: impl FnOnce(&mut Value)) {
    engine.change(|script| change(script.containers.get_mut(id).unwrap()));
}

#[tokio::test(start_paused = true)]
async fn one_container_with_unknown_words_hides_no_other_and_not_itself() {
    for (what, change) in [
        ("health", (|json| json["State"]["Health"] = json!({ "Status": "reset" })) as fn(&mut Value)),
        ("health of another type", |json| json["State"]["Health"] = json!(["reset"])),
        ("state", |json| json["State"]["Status"] = "hibernating".into()),
        ("state of another type", |json| json["State"]["Status"] = json!(7)),
        ("port type", |json| {
            json["NetworkSettings"]["Ports"]["443/quic"] = json!([{ "HostIp": 7, "HostPort": "x" }]);
            json["Config"]["ExposedPorts"] = json!({ "443/quic": {}, "8000/tcp": [] });
        }),
        ("restart policy", |json| json["HostConfig"]["RestartPolicy"] = json!({ "Name": "sometimes" })),
        ("list: state", |json| json["listed"] = json!({ "State": "hibernating" })),
        ("list: health", |json| json["listed"] = json!({ "Health": { "Status": "reset", "FailingStreak": "0" } })),
        ("list: ports", |json| json["listed"] = json!({ "Ports": [{ "Type": "quic", "PrivatePort": "443" }] })),
        ("list: all of another type", |json| {
            json["listed"] =
                json!({ "Names": 7, "Image": [], "Labels": "x", "State": {}, "Mounts": 1, "Created": "x" });
        }),
        ("no name", |json| json["Name"] = json!(null)),
        ("no config", |json| json["Config"] = json!("secret")),
        ("no state", |json| json["State"] = json!(null)),
        ("no host config", |json| json["HostConfig"] = json!([])),
    ] {
        let mut engine = FakeEngine::new(&["a", "b"]);
        set(&engine, "a", change);
        engine.listen();
        let mut changes = engine.until("reset a b").await;
        changes.sort();
        assert_eq!(changes, ["upsert a", "upsert b"], "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_entry_of_the_list_without_an_id_hides_no_other() {
    let mut engine = FakeEngine::new(&["a", "b"]);
    set(&engine, "a", |json| json["listed"] = json!({ "Id": 7 }));
    engine.listen();
    assert_eq!(engine.until("reset b").await, ["upsert b"]);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_is_skipped_and_never_asked_for_again() {
    for line in [
        "<html>",
        r#"{"Type":"container","Action":7,"timeNano":4102444812000000000}"#,
        r#"{"Type":"container","Action":"die","Actor":{"ID":7},"timeNano":4102444812000000000}"#,
        r#"{"Type":"container","Action":"die",bad,"timeNano":4102444812000000000}"#,
        r#"{"Type":"wormhole","Action":"open","timeNano":4102444812000000000}"#,
        r#"[1,2]"#,
    ] {
        CLOCK_S.set(0);
        let (mut engine, mut stream) = FakeEngine::synced(&["a"]).await;
        CLOCK_S.set(20);
        stream.send(line).await;
        stream.send(&event("a", "oom", 11)).await;
        assert_eq!(engine.next().await, "oom a", "the stream goes on after {line}");
        assert_eq!(engine.next().await, "upsert a");
        assert!(engine.streams.try_recv().is_err(), "{line}");
        // Its time has passed also when it is the last that is heard.
        stream.send(line).await;
        drop(stream);
        let again = engine.stream().await;
        let is_timed = line.contains("4102444812") && !line.contains("wormhole");
        assert_eq!(again.since, (STARTED_S + if is_timed { 11 } else { 10 }) * SECOND, "{line}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_brings_the_list_soon() {
    let (mut engine, mut stream) = FakeEngine::synced(&["a", "b"]).await;
    engine.change(|script| drop(script.containers.remove("a")));
    let began_at = Instant::now();
    stream.send(r#"{"Type":"container","Action":"die","Actor":"a","timeNano":4102444812000000000}"#).await;
    let changes = engine.until("ended a").await;
    assert!(changes.iter().all(|change| change == "upsert b"), "{changes:?}");
    assert!(began_at.elapsed() <= Duration::from_secs(6), "{:?}", began_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn podmans_stop_is_noticed_by_what_the_list_lacks() {
    let mut engine = FakeEngine::new(&["a", "b", "c"]);
    engine.change(|script| script.is_podman = true);
    engine.listen();
    engine.until("reset a b c").await;
    let _stream = engine.stream().await;
    // Some seconds of peace: the list is asked for, containers are not.
    engine.change(|script| script.asked.clear());
    assert!(timeout(Duration::from_millis(5_500), engine.changes.next()).await.is_err());
    engine.change(|script| {
        let lists = script.asked.iter().filter(|path| *path == "/containers/json").count();
        assert!((5..=6).contains(&lists) && script.asked.len() == lists, "{:?}", script.asked);
        script.asked.clear();
    });
    set(&engine, "a", |json| json["State"]["Status"] = "stopping".into());
    let stopped_at = Instant::now();
    assert_eq!(engine.until("stopping a").await, ["upsert a"]);
    assert!(stopped_at.elapsed() <= Duration::from_millis(1_200), "{:?}", stopped_at.elapsed());
    engine.change(|script| {
        let looks: Vec<&String> = script.asked.iter().filter(|path| *path != "/containers/json").collect();
        assert!(looks.iter().all(|path| *path == "/containers/a/json"), "{looks:?}");
    });
    for status in ["stopped", "exited"] {
        let id = if status == "stopped" { "a" } else { "b" };
        set(&engine, id, |json| json["State"]["Status"] = status.into());
        let ended_at = Instant::now();
        let changes = engine.until(&format!("ended {id}")).await;
        assert!(
            changes.iter().all(|change| change == "upsert a" || change == "stopping a"),
            "{changes:?} {:?}",
            ended_at.elapsed()
        );
        assert!(ended_at.elapsed() <= Duration::from_millis(1_200), "{status}: {:?}", ended_at.elapsed());
    }
    // What Podman lists as stopping, as later versions do, is looked at as well.
    engine.change(|script| script.containers.get_mut("c").unwrap()["listed"] = json!({ "State": "stopping" }));
    set(&engine, "c", |json| json["State"]["Status"] = "stopping".into());
    assert_eq!(engine.until("stopping c").await, ["upsert c"]);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_is_not_podman_is_not_listed_each_second() {
    let (mut engine, _stream) = FakeEngine::synced(&["a"]).await;
    engine.change(|script| script.asked.clear());
    assert!(timeout(Duration::from_secs(20), engine.changes.next()).await.is_err());
    engine.change(|script| assert_eq!(script.asked, [""; 0]));
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_being_stopped_when_the_proxy_begins_is_never_open() {
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.is_podman = true);
    set(&engine, "a", |json| json["State"]["Status"] = "stopping".into());
    engine.change(|script| drop(script.containers.insert("b", container("b", "running"))));
    engine.listen();
    engine.until("reset b").await;
    let mut stream = engine.stream().await;
    stream.send(&event("a", "update", 1)).await;
    assert_eq!([engine.next().await, engine.next().await], ["upsert a", "stopping a"]);
}

#[tokio::test(start_paused = true)]
async fn podmans_network_events_are_heard() {
    let mut engine = FakeEngine::new(&["a"]);
    set(&engine, "a", |json| {
        json["NetworkSettings"] = json!({ "Networks": { "app": { "NetworkID": "n1", "IPAddress": "127.0.0.9" } } });
        json["Config"]["Labels"]["inference.port"] = "8000".into();
    });
    engine.listen();
    engine.until("reset a").await;
    let mut stream = engine.stream().await;
    let of_network = |action: &str, network: &str, at_s: i64| {
        json!({
            "Type": "network", "Action": action, "timeNano": (STARTED_S + at_s) * 1_000_000_000,
            "Actor": { "ID": "a", "Attributes": { "image": "", "name": "", "network": network, "podId": "" } },
        })
        .to_string()
    };
    stream.send(&of_network("connect", "other", 1)).await;
    assert_eq!(engine.next().await, "upsert a");
    stream.send(&of_network("disconnect", "other", 2)).await;
    assert_eq!(engine.next().await, "upsert a", "that network is not used");
}

/// The endpoint of the next [`Change::Upsert`] of this container.
async fn upserted(engine: &mut FakeEngine, id: &str) -> Endpoint {
    loop {
        match timeout(Duration::from_secs(120), engine.changes.next()).await.unwrap().unwrap() {
            Ok(Change::Upsert(endpoint)) if &*endpoint.id == id => return *endpoint,
            _ => {}
        }
    }
}

const PAGE: &str = "<html><head><title>404 Not Found</title></head><body>no such container</body></html>";

#[tokio::test(start_paused = true)]
async fn a_container_that_cannot_be_inspected_is_in_the_table_with_the_reason() {
    for (status, body, expect) in [
        ("403 Forbidden", r#"{"message":"secret"}"#, "403"),
        ("404 Not Found", PAGE, "404"),
        ("404 Not Found", "404 page not found", "404"),
        ("404 Not Found", "", "404"),
        ("409 Conflict", r#"{"message":"secret"}"#, "409"),
        ("500 Internal Server Error", r#"{"message":"secret"}"#, "500"),
        ("502 Bad Gateway", PAGE, "502"),
        ("200 OK", "secret", "cannot be read"),
        ("200 OK", r#"{"Id":"a","State":{"Stat"#, "cannot be read"),
        ("200 OK", r#"{"message":"secret"}"#, "cannot be read"),
        ("200 OK", "[]", "cannot be read"),
        ("200 OK", "", "cannot be read"),
    ] {
        let mut engine = FakeEngine::new(&["a", "b"]);
        engine.change(|script| script.failing.push(("/a/json", status, body)));
        engine.listen();
        let endpoint = upserted(&mut engine, "a").await;
        let obstacle = endpoint.reach.unwrap_err();
        assert!(obstacle.what.contains(expect) && !obstacle.what.contains("secret"), "{status}: {obstacle:?}");
        assert_eq!((endpoint.name.as_str(), endpoint.image.as_str()), ("a", "llm"), "{status}");
        engine.until("reset a b").await;
        // It is tried again, and is as any other then.
        engine.change(|script| script.failing.clear());
        assert!(upserted(&mut engine, "a").await.reach.is_ok(), "{status} {body}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_the_engines_removes_nothing_and_its_list_does() {
    for (status, body) in [("404 Not Found", PAGE), ("404 Not Found", ""), ("403 Forbidden", "{}"), ("500 Oh", "{}")] {
        let (mut engine, mut stream) = FakeEngine::synced(&["a", "b"]).await;
        engine.change(|script| script.failing.push(("/a/json", status, body)));
        stream.send(&event("a", "health_status: healthy", 1)).await;
        let changes = engine.until("reset a b").await;
        assert!(!changes.iter().any(|change| change.starts_with("ended") || change == "upsert a"), "{changes:?}");
        let notes = changes.iter().find(|change| change.starts_with("notes")).unwrap();
        assert!(notes.contains("inspect fails for a"), "{notes}");
        engine.change(|script| drop(script.containers.remove("a")));
        engine.until("ended a").await;
        engine.until("reset b").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_leaves_containers_out_is_said() {
    let ids: Vec<&'static str> = (0..1_100).map(|n| &*Box::leak(format!("c{n:04}").into_boxed_str())).collect();
    let mut engine = FakeEngine::new(&ids);
    engine.listen();
    let mut seen = HashSet::new();
    let mut said = String::new();
    loop {
        match engine.next().await {
            change if change.starts_with("reset") => break,
            change if change.starts_with("notes") => said = change,
            change => drop(seen.insert(change)),
        }
    }
    assert_eq!(seen.len(), CONTAINERS_MAX);
    assert!(said.contains("1100") && said.contains("1000") && said.contains("100 are left out"), "{said}");
    engine.change(|script| script.containers.retain(|id, _| *id < "c0050"));
    engine.until("notes ").await;
}

#[tokio::test(start_paused = true)]
async fn many_containers_that_cannot_be_looked_at_delay_no_other() {
    for hanging in [8, 40, 200] {
        let ids: Vec<&'static str> = (0..hanging).map(|n| &*Box::leak(format!("a{n:03}").into_boxed_str())).collect();
        let mut engine = FakeEngine::new(&ids);
        engine.to_test.1 = mpsc::channel(1024).0;
        let (sender, held) = mpsc::channel(1024);
        (engine.to_test.1, engine.held) = (sender, held);
        engine.change(|script| {
            script.held.push("/a");
            script.containers.insert("z", container("z", "running"));
        });
        engine.listen();
        let began_at = Instant::now();
        engine.until("upsert z").await;
        engine.until("reset z").await;
        assert!(began_at.elapsed() < Duration::from_secs(3), "{hanging}: {:?}", began_at.elapsed());
        let mut stream = engine.stream().await;
        engine.change(|script| drop(script.containers.insert("y", container("y", "running"))));
        let began_at = Instant::now();
        stream.send(&event("y", "start", 1)).await;
        engine.until("upsert y").await;
        assert!(began_at.elapsed() < Duration::from_millis(200), "{hanging}: {:?}", began_at.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_stream_that_stays_silent_is_said_and_replaced_by_lists() {
    let (mut engine, stream) = FakeEngine::synced(&["a"]).await;
    engine.change(|script| drop(script.containers.insert("b", container("b", "running"))));
    engine.until("reset a b").await;
    let said = loop {
        match engine.next().await {
            change if change.starts_with("notes") => break change,
            _ => {}
        }
    };
    assert!(said.contains("silent") && said.contains("GET /events"), "{said}");
    engine.change(|script| drop(script.containers.insert("c", container("c", "running"))));
    let began_at = Instant::now();
    engine.until("upsert c").await;
    assert!(began_at.elapsed() < Duration::from_secs(7), "{:?}", began_at.elapsed());
    engine.until("reset a b c").await;
    // It speaks after all.
    drop(stream);
    let mut streams = Vec::new();
    while let Ok(Some(stream)) = timeout(Duration::from_millis(100), engine.streams.recv()).await {
        streams.push(stream);
    }
    streams.last_mut().unwrap().send(&event("a", "oom", 40)).await;
    engine.until("notes ").await;
}
