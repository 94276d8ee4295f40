//! O6: what the log says, what it never says, and that nobody has to wait for its reader: the real program, beside an
//! engine that tells it secrets.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::support::{collector::Collector, *};

const SECRET: &str = "hf_in-confidence";
const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A Docker Engine with one container.
struct Engine {
    addr: SocketAddr,
    /// Who listens to events.
    listeners: Arc<Mutex<Vec<TcpStream>>>,
    is_dead: Arc<AtomicBool>,
}

impl Engine {
    async fn start(backend: &Upstream) -> Engine {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let listeners = Arc::<Mutex<Vec<TcpStream>>>::default();
        let container = json!({
            "Id": ID, "Name": "/web",
            "State": { "Status": "running", "StartedAt": "2020-01-01T00:00:00Z" },
            "Config": { "Image": "llm", "Labels": { "inference.enable": "true" }, "Env": [format!("HF_TOKEN={SECRET}")] },
            "HostConfig": { "NetworkMode": "bridge" },
            "NetworkSettings": {
                "Networks": {},
                "Ports": { "8000/tcp": [{ "HostIp": "127.0.0.1", "HostPort": backend.addr.port().to_string() }] },
            },
        });
        let is_dead = Arc::new(AtomicBool::new(false));
        let (to_listeners, died) = (listeners.clone(), is_dead.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mut container = container.clone();
                if died.load(Ordering::Relaxed) {
                    container["State"]["Status"] = "exited".into();
                }
                tokio::spawn(answer(stream, container, to_listeners.clone()));
            }
        });
        Engine { addr, listeners, is_dead }
    }

    /// Tells whoever listens what has happened to the container.
    async fn tell(&self, action: &str) {
        self.is_dead.fetch_or(action == "die", Ordering::Relaxed);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let event = json!({
            "Type": "container", "Action": action, "timeNano": u64::try_from(now.as_nanos()).unwrap(),
            "Actor": { "ID": ID, "Attributes": { "inference.enable": "true", "signal": "15" } },
        });
        let line = chunk(format!("{event}\n"));
        let mut listeners = std::mem::take(&mut *self.listeners.lock().unwrap());
        for listener in &mut listeners {
            let _ = listener.write_all(&line).await;
        }
        self.listeners.lock().unwrap().extend(listeners);
    }

    fn is_heard(&self) -> bool {
        !self.listeners.lock().unwrap().is_empty()
    }
}

async fn answer(mut stream: TcpStream, container: Value, listeners: Arc<Mutex<Vec<TcpStream>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap();
    if path.contains("/events") {
        let begin = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        if stream.write_all(begin.as_bytes()).await.is_ok() {
            listeners.lock().unwrap().push(stream);
        }
        return;
    }
    let (status, body) = match path {
        _ if path.contains("/containers/json") => ("200 OK", json!([{ "Id": ID }]).to_string()),
        _ if path.contains(ID) => ("200 OK", container.to_string()),
        _ => ("404 Not Found", json!({ "message": "no such container" }).to_string()),
    };
    let _ = stream
        .write_all(
            format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
        .await;
}

/// The program, and what it has said so far.
struct Program {
    child: Child,
    log: PathBuf,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

impl Program {
    fn start(engine: &Engine, args: &[&str], vars: &[(&str, &str)]) -> Program {
        let log = std::env::temp_dir().join(format!("it-log-{}", fastrand::u64(..)));
        let child = command(engine, args, vars).stderr(File::create(&log).unwrap()).spawn().unwrap();
        Program { child, log }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn listens_at(&self) -> SocketAddr {
        let said = self.said();
        let (_, rest) = said.split_once("address").and_then(|(_, rest)| rest.split_once("127.0.0.1:")).unwrap();
        let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
        SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()))
    }

    async fn says(&self, what: &str) {
        eventually(format!("the log says {what:?}"), async || self.said().contains(what)).await;
    }
}

fn command(engine: &Engine, args: &[&str], vars: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inference-proxy"));
    command
        .args(args)
        .env_clear()
        .envs([("PROXY_PORT", "0"), ("PROXY_BIND", "127.0.0.1"), ("PROXY_DRAIN_TIMEOUT", "5s"), ("PROXY_SETTLE", "1s")])
        .env("DOCKER_HOST", format!("tcp://{}", engine.addr))
        .envs(vars.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// The exit code of a program that does not start, and what it says.
fn ended(engine: &Engine, vars: &[(&str, &str)]) -> (Option<i32>, String) {
    let output = command(engine, &[], vars).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// The program with its log in a pipe that is read when the test wants to.
struct Piped {
    child: Child,
    addr: SocketAddr,
    pipe: Option<BufReader<ChildStderr>>,
    /// Lines that were read until it was known where it listens.
    read: Vec<Value>,
}

impl Drop for Piped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Piped {
    /// Reads no further than to the line that says that there is a backend.
    fn start(engine: &Engine, vars: &[(&str, &str)]) -> Piped {
        let mut child = command(engine, &[], vars).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = BufReader::new(child.stderr.take().unwrap());
        let mut read: Vec<Value> = Vec::new();
        while read.last().is_none_or(|line| line["message"] != "ready") {
            let mut line = String::new();
            assert_ne!(pipe.read_line(&mut line).unwrap(), 0, "it has ended: {read:?}");
            read.push(serde_json::from_str(&line).unwrap());
        }
        let address = read.iter().find_map(|line| line["address"].as_str()).unwrap();
        Piped { addr: address.parse().unwrap(), child, pipe: Some(pipe), read }
    }

    /// Asks until so many lines that nobody reads must have been dropped; returns how often.
    async fn ask_until_lines_are_dropped(&self) -> usize {
        // Such a line takes three kilobytes, so that there need not be too many of them.
        let path = format!("/{}", "long/".repeat(600));
        let mut client = Client::connect(self.addr).await;
        let mut asked = 0;
        loop {
            for _ in 0..500 {
                let request = Request::get(&path).header("x-request-id", &asked.to_string());
                assert_eq!(client.ask(&request).await.status, 404);
                asked += 1;
            }
            if self.dropped(&mut client).await > 0 {
                return asked;
            }
            assert!(asked < 50_000, "nothing is dropped");
        }
    }

    async fn dropped(&self, client: &mut Client) -> u64 {
        let page = client.ask(&Request::get("/metrics")).await.text();
        let value = page.lines().find_map(|line| line.strip_prefix("proxy_log_lines_dropped_total "));
        value.unwrap().parse().unwrap()
    }

    async fn ends_on_sigterm(&mut self) -> ExitStatus {
        let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", self.child.id())]).status();
        assert!(kill.unwrap().success());
        let mut status = None;
        eventually("it ends", async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_json_parses_at_every_level_and_holds_no_environment() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let program = Program::start(&engine, &[], &[("PROXY_LOG", "trace")]);
    let lines = || -> Vec<Value> {
        let said = program.said();
        // The last line may not be whole yet.
        let whole = &said[..said.rfind('\n').map_or(0, |end| end + 1)];
        whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    };
    program.says("\"ready\",\"models\":").await;
    let listening = lines().into_iter().find(|line| line["message"] == "listening").unwrap();
    let addr: SocketAddr = listening["address"].as_str().unwrap().parse().unwrap();

    let mut client = Client::connect(addr).await;
    let odd = "/v1/chat/completions?a=\"b\"\\";
    let requests = [
        (Request::chat("m").header("x-request-id", "id-1"), 200),
        (Request::post(odd, r#"{"model":"m\u0000\n\"}"}"#).header("x-request-id", "id-2"), 404),
        (Request::get("/nowhere").header("x-request-id", "id-3"), 404),
        (Request::get("/v1/models").header("x-request-id", "id-4"), 200),
    ];
    for (i, (request, status)) in requests.iter().enumerate() {
        let answer = client.ask(request).await;
        assert_eq!(answer.status, *status);
        let id = format!("id-{}", i + 1);
        let is_told = || lines().into_iter().find(|line| line["message"] == "request" && line["request_id"] == *id);
        eventually(format!("an access line of {id}"), async || is_told().is_some()).await;
        let line = is_told().unwrap();
        assert_eq!((&line["level"], &line["status"]), (&"DEBUG".into(), &(*status).into()), "{line}");
        // The proxy's own answers count as much as those of backends.
        assert_eq!(line["bytes"], answer.text().len(), "{line}");
    }
    upstream.script(vec![Step::ReadBody, Step::Send("nonsense\r\n\r\n".into())]);
    assert_eq!(client.ask(&Request::chat("m").header("x-request-id", "id-5")).await.status, 502);
    eventually("a line of the attempt", async || {
        lines().iter().any(|line| line["message"] == "attempt failed" && line["request_id"] == "id-5")
    })
    .await;

    eventually("it listens to events", async || engine.is_heard()).await;
    engine.tell("kill").await;
    program.says("web was told to stop").await;
    engine.tell("die").await;
    program.says("web has ended").await;
    let of_container: Vec<String> = lines()
        .iter()
        .filter(|line| line["container"] == "web" && ["INFO", "WARN"].contains(&line["level"].as_str().unwrap()))
        .map(|line| line["message"].as_str().unwrap().to_owned())
        .collect();
    let expected = [
        format!("web is live at {} with m", upstream.addr),
        "web was told to stop: it gets no new requests".to_owned(),
        "web has ended".to_owned(),
    ];
    assert_eq!(of_container, expected, "one line per change of state");
    let said = program.said();
    assert!(!said.contains(SECRET) && !said.contains("HF_TOKEN"), "{said}");
    let others: Vec<&str> = said
        .lines()
        .filter(|line| !line.contains("\"target\":\"inference_proxy") && line.contains("\"DEBUG\""))
        .collect();
    assert!(others.is_empty(), "libraries are heard: {others:?}");
}

/// Each line of a request leads to its trace where one is recorded, and names none where nothing could be found by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_lines_of_a_traced_request_carry_its_trace_id() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let collector = Collector::start().await;
    let url = collector.url();
    for (format, field) in [
        ("text", format!("trace_id={TRACE}")),
        ("json", format!("\"trace_id\":\"{TRACE}\"")),
        ("yaml", format!("trace_id: \"{TRACE}\"")),
    ] {
        let vars = [
            ("PROXY_LOG", "debug"),
            ("PROXY_ACCESS_LOG", "on"),
            ("PROXY_LOG_FORMAT", format),
            ("PROXY_RETRIES", "0"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ];
        let program = Program::start(&engine, &[], &vars);
        program.says("web is live").await;
        let addr = program.listens_at();
        // As YAML, a line is a document.
        let end = if format == "yaml" { "---\n" } else { "\n" };
        let lines_with = |what: &str, id: &str| -> Vec<String> {
            let said = program.said();
            said.split(end).filter(|line| line.contains(what) && line.contains(id)).map(str::to_owned).collect()
        };
        let nonsense = vec![Step::ReadBody, Step::Send("nonsense\r\n\r\n".into())];
        let mut broken = sse_begin();
        broken.extend([Step::SendChunk("data: 1\n\n".into()), Step::Reset]);
        for (kind, steps, messages) in [
            ("whole", json_reply("{}"), &["request"][..]),
            ("nonsense", nonsense, &["no HTTP answer", "attempt failed", "request"]),
            ("broken", broken, &["answer cut", "request"]),
        ] {
            for (flags, is_traced) in [("01", true), ("00", false)] {
                let id = format!("{kind}-{flags}");
                upstream.script(steps.clone());
                let request = Request::chat("m")
                    .header("x-request-id", &id)
                    .header("traceparent", &format!("00-{TRACE}-00f067aa0ba902b7-{flags}"));
                let _ = Client::connect(addr).await.ask(&request).await;
                for message in messages {
                    eventually(format!("a line {message:?} of {id}"), async || !lines_with(message, &id).is_empty())
                        .await;
                    for line in lines_with(message, &id) {
                        assert_eq!(line.contains(&field), is_traced, "{line}");
                        assert_eq!(line.contains("trace_id"), is_traced, "{line}");
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_yaml_and_text_on_request_and_quiet_means_quiet() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let yaml = Program::start(&engine, &["-L", "yaml"], &[("PROXY_ACCESS_LOG", "on")]);
    yaml.says(&format!("message: \"web is live at {} with m\"\ncontainer: \"web\"\n", upstream.addr)).await;
    let address =
        yaml.said().lines().find_map(|line| Some(line.strip_prefix("address: ")?.trim_matches('"').to_owned()));
    let ask = Client::connect(address.unwrap().parse().unwrap()).await.ask(&Request::chat("m")).await;
    assert_eq!(ask.status, 200);
    let id = ask.header("x-request-id").unwrap().to_owned();
    yaml.says(&format!("message: \"request\"\nrequest_id: \"{id}\"\n")).await;
    let said = yaml.said();
    for document in said.split("---\n").skip(1) {
        assert!(document.starts_with("timestamp: \"") && document.contains("\nlevel: INFO\n"), "{document}");
        assert!(document.lines().all(|line| line.split_once(": ").is_some()), "{document}");
    }

    let text = Program::start(&engine, &["-v"], &[("PROXY_LOG_FORMAT", "text"), ("PROXY_LOG", "error")]);
    text.says("web is live").await;
    assert!(text.said().contains("DEBUG") && text.said().contains("container=web"), "{}", text.said());
    assert!(!text.said().contains('\u{1b}'), "no colours but on a terminal");

    let before = upstream.probes();
    let quiet = Program::start(&engine, &["-q"], &[]);
    eventually("it has seen the container", async || upstream.probes() > before).await;
    assert_eq!(quiet.said(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_a_log_that_nobody_reads_holds_nothing_up() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let mut program = Piped::start(&engine, &[("PROXY_ACCESS_LOG", "on")]);
    let asked = program.ask_until_lines_are_dropped().await;
    assert!(asked >= 1000, "{asked}");
    // Whoever changes the routing table logs, too.
    eventually("it listens to events", async || engine.is_heard()).await;
    engine.tell("die").await;
    let mut client = Client::connect(program.addr).await;
    eventually("the container is gone", async || client.ask(&Request::chat("m")).await.status != 200).await;
    assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
    assert_eq!(program.ends_on_sigterm().await.code(), Some(0));

    let mut left = String::new();
    program.pipe.take().unwrap().read_to_string(&mut left).unwrap();
    assert!(left.ends_with('\n'), "no line is cut in two: {:?}", left.lines().last());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_what_was_dropped_is_told_to_a_reader_that_comes_back() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let mut program = Piped::start(&engine, &[("PROXY_ACCESS_LOG", "on")]);
    let asked = program.ask_until_lines_are_dropped().await;
    let mut client = Client::connect(program.addr).await;
    let dropped = program.dropped(&mut client).await;

    // Its reader comes back.
    let lines = Arc::new(Mutex::new(std::mem::take(&mut program.read)));
    let (mut pipe, to_test) = (program.pipe.take().unwrap(), lines.clone());
    let reader = std::thread::spawn(move || {
        for line in pipe.by_ref().lines() {
            to_test.lock().unwrap().push(serde_json::from_str(&line.unwrap()).unwrap());
        }
    });
    let told =
        |field: &str| -> u64 { lines.lock().unwrap().iter().filter_map(|line: &Value| line[field].as_u64()).sum() };
    eventually("it is told how many were dropped", async || told("dropped") >= dropped).await;
    assert_eq!(client.ask(&Request::get("/nowhere").header("x-request-id", "after")).await.status, 404);
    let in_all = program.dropped(&mut client).await;
    assert_eq!(program.ends_on_sigterm().await.code(), Some(0));
    reader.join().unwrap();

    assert_eq!((told("dropped"), in_all), (dropped, dropped), "reading again, nothing more is lost");
    let lines = lines.lock().unwrap();
    let warning = lines.iter().find(|line| line["dropped"].is_u64()).unwrap();
    assert_eq!((&warning["level"], &warning["dropped_total"]), (&"WARN".into(), &dropped.into()));
    let of_requests: Vec<&Value> = lines.iter().filter(|line| line["message"] == "request").collect();
    assert_eq!(of_requests.last().unwrap()["request_id"], "after");
    let numbers: Vec<u64> = of_requests.iter().filter_map(|line| line["request_id"].as_str()?.parse().ok()).collect();
    assert!(numbers.is_sorted(), "lines keep their order");
    assert_eq!(numbers.len() as u64 + dropped, asked as u64, "a line is written or counted");
    assert_eq!(lines.last().unwrap()["message"], "shutting down", "the last line is written before the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_what_is_said_before_a_failed_start_comes_out_in_its_order() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let vars = [("PROXY_PORT", port.as_str()), ("PROXY_NONSENSE", "1"), ("PROXY_LOG_FORMAT", "text")];
    let (code, said) = ended(&engine, &vars);
    assert_eq!(code, Some(1), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    let [warning, error] = lines[..] else { panic!("{said}") };
    assert!(warning.contains("PROXY_NONSENSE is not a variable of this proxy"), "{said}");
    assert!(error.starts_with(&format!("inference-proxy: cannot listen on data port {port}")), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_a_filter_that_would_silence_everything_by_mistake_stops_the_start() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    // With a port that cannot be had, so that it ends whatever it makes of the filter.
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for filter in ["warning", "debg", "nonsense", "warn,foo"] {
        let (code, said) = ended(&engine, &[("PROXY_PORT", &port), ("PROXY_LOG", filter)]);
        assert_eq!(code, Some(2), "{said}");
        let expected = format!("inference-proxy: bad configuration: PROXY_LOG={filter:?}: expected off, error, warn");
        assert!(said.starts_with(&expected) && said.lines().count() == 1, "{said}");
    }
    let (code, said) = ended(&engine, &[("PROXY_PORT", &port), ("PROXY_LOG", "info,"), ("PROXY_NONSENSE", "1")]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("PROXY_NONSENSE is not a variable"), "a comma too many silences nothing: {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o06_a_target_from_before_modules_moved_still_works() {
    let upstream = Upstream::start("web", &["m"]).await;
    let engine = Engine::start(&upstream).await;
    let program = Program::start(&engine, &[], &[("PROXY_LOG", "warn,inference_proxy::registry=info")]);
    program.says("web is live").await;
    let said = program.said();
    let renamed = "write inference_proxy::control::registry for inference_proxy::registry";
    assert_eq!(said.matches(renamed).count(), 1, "{said}");
    assert!(!said.contains("\"listening\""), "the other targets stay at warn: {said}");
}

/// Tells the child what to be.
const PANICKING: &str = "IT_LOGS_PANICKING";

/// Not a test: a program that panics between two lines of its log.
#[test]
#[ignore = "started by another test, which reads what it says"]
#[expect(clippy::disallowed_methods, reason = "the environment is how its parent speaks to this process")]
fn panicking_process() {
    if std::env::var(PANICKING).is_err() {
        return;
    }
    inference_proxy::telemetry::log::init("info", Some(inference_proxy::base::config::LogFormat::Text)).unwrap();
    inference_proxy::telemetry::log::report_panics();
    tracing::info!("before");
    let panicked = std::thread::Builder::new().name("worker-7".to_owned()).spawn(|| panic!("on purpose")).unwrap();
    assert!(panicked.join().is_err());
    tracing::info!("after");
    inference_proxy::telemetry::log::flush();
}

#[test]
fn o06_a_panic_is_told_in_its_place_among_the_lines() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["logs::panicking_process", "--exact", "--ignored", "--nocapture"])
        .env(PANICKING, "1")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let place = |what: &str| said.find(what).unwrap_or_else(|| panic!("no {what:?} in {said}"));
    assert!(place("before") < place("\nthread 'worker-7' panicked at tests/it/logs.rs:"), "{said}");
    assert!(place("on purpose\n") < place("after"), "{said}");
}
