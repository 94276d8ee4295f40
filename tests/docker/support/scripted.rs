//! Servers on raw TCP that answer `/models` in every way a server should not.
//!
//! They run in the test's own process. What enrols them is a container in the host's network whose `inference.port`
//! names their port, and a proxy on the same machine.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::{backend::BackendSpec, engine::Lab, proxy::free_port};

/// How a server answers every request.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// A proper list with these models, and 404 for anything else.
    Models(Vec<String>),
    /// One proper list of 50 MB.
    Huge(String),
    /// A list that never ends.
    Endless(String),
    /// A list, one byte each half second.
    Slow(String),
    /// 302 to another server.
    Redirect(SocketAddr),
    /// A page with status 200.
    Html,
    /// 100 000 models.
    ManyIds(String),
    /// Ids with control characters in them.
    ControlChars(String),
    /// Arrays in arrays, 100 000 deep.
    Deep,
    /// A head that never ends.
    EndlessHead,
}

/// A server that follows a [`Script`].
pub(crate) struct Scripted {
    pub(crate) addr: SocketAddr,
    targets: Arc<Mutex<Vec<String>>>,
    accepting: JoinHandle<()>,
}

// === impl Scripted ===

impl Scripted {
    /// Starts one on a free loopback port.
    pub(crate) async fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let targets = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&targets);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, record) = (script.clone(), Arc::clone(&record));
                // The other side hangs up on most of these; that is the point.
                tokio::spawn(async move { drop(script.answer(stream, &record).await) });
            }
        });
        Self { addr, targets, accepting }
    }

    /// A container in the host's network that sends proxies on this machine here.
    pub(crate) fn enrolled<'l>(&self, lab: &'l Lab, role: &str) -> BackendSpec<'l> {
        let port = self.addr.port().to_string();
        lab.backend(role).run_arg("--network=host").port(free_port()).label("inference.port", &port)
    }

    /// Path and query of every request so far.
    pub(crate) fn targets(&self) -> Vec<String> {
        self.targets.lock().unwrap().clone()
    }

    /// How many requests for a list of models have arrived.
    pub(crate) fn probes(&self) -> usize {
        self.targets.lock().unwrap().iter().filter(|target| target.ends_with("/models")).count()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

// === impl Script ===

impl Script {
    async fn answer(&self, mut stream: TcpStream, record: &Mutex<Vec<String>>) -> io::Result<()> {
        let target = read_request(&mut stream).await?;
        record.lock().unwrap().push(target.clone());
        if !target.ends_with("/models") {
            // Readiness paths that are tried first, such as `/health`.
            return stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
        }
        match self {
            Self::Models(ids) => {
                let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
                json(&mut stream, &list(&ids)).await
            }
            Self::Huge(id) => {
                let padding = "x".repeat(50 << 20);
                let body = format!(r#"{{"object":"list","data":[{{"id":"{id}","padding":"{padding}"}}]}}"#);
                json(&mut stream, &body).await
            }
            Self::Endless(id) => {
                head(&mut stream, "application/json", None).await?;
                stream.write_all(format!(r#"{{"object":"list","data":[{{"id":"{id}"}}"#).as_bytes()).await?;
                let more = r#",{"id":"more"}"#.repeat(4096);
                loop {
                    stream.write_all(more.as_bytes()).await?;
                }
            }
            Self::Slow(id) => {
                let body = list(&[id]);
                head(&mut stream, "application/json", Some(body.len())).await?;
                for byte in body.as_bytes() {
                    stream.write_all(&[*byte]).await?;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                Ok(())
            }
            Self::Redirect(to) => {
                let answer = format!(
                    "HTTP/1.1 302 Found\r\nlocation: http://{to}/v1/models\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                );
                stream.write_all(answer.as_bytes()).await
            }
            Self::Html => {
                let body = "<!doctype html><title>Welcome</title><p>It works!</p>";
                head(&mut stream, "text/html", Some(body.len())).await?;
                stream.write_all(body.as_bytes()).await
            }
            Self::ManyIds(prefix) => {
                let ids: Vec<String> = (0..100_000).map(|n| format!("{prefix}-{n}")).collect();
                let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
                json(&mut stream, &list(&ids)).await
            }
            Self::ControlChars(prefix) => {
                let body = format!(
                    r#"{{"object":"list","data":[{{"id":"{prefix}\r\nx-injected: 1"}},{{"id":"{prefix}\u0000"}},{{"id":"{prefix}\u001b[2J"}}]}}"#
                );
                json(&mut stream, &body).await
            }
            Self::Deep => json(&mut stream, &format!(r#"{{"data":{}"#, "[".repeat(100_000))).await,
            Self::EndlessHead => {
                stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
                loop {
                    stream.write_all(b"x-more: and more and more and more\r\n").await?;
                }
            }
        }
    }
}

// === helpers ===

/// Reads a request, its body too when its length is told, and returns its target.
async fn read_request(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    stream.read_exact(&mut vec![0; length.unwrap_or(0)]).await?;
    Ok(head.split_whitespace().nth(1).unwrap_or_default().to_owned())
}

async fn head(stream: &mut TcpStream, kind: &str, length: Option<usize>) -> io::Result<()> {
    let length = length.map(|length| format!("content-length: {length}\r\n")).unwrap_or_default();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{length}connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await
}

async fn json(stream: &mut TcpStream, body: &str) -> io::Result<()> {
    head(stream, "application/json", Some(body.len())).await?;
    stream.write_all(body.as_bytes()).await
}

fn list(ids: &[&str]) -> String {
    let models: Vec<String> = ids.iter().map(|id| format!(r#"{{"id":"{id}","object":"model"}}"#)).collect();
    format!(r#"{{"object":"list","data":[{}]}}"#, models.join(","))
}
