//! O6: what the log says, and what it never says: the real program, beside an engine that tells it secrets.

use std::{
    fs::File,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
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

use crate::support::*;

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
        let child = Command::new(env!("CARGO_BIN_EXE_inference-proxy"))
            .args(args)
            .env_clear()
            .envs([("PROXY_PORT", "0"), ("PROXY_BIND", "127.0.0.1"), ("PROXY_DRAIN_TIMEOUT", "5s")])
            .env("DOCKER_HOST", format!("tcp://{}", engine.addr))
            .envs(vars.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Program { child, log }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    async fn says(&self, what: &str) {
        eventually(format!("the log says {what:?}"), async || self.said().contains(what)).await;
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
