//! A small HTTP client on hyper that keeps time and does not forgive.
//!
//! Every request has its own connection, so one that hangs or breaks says nothing about the next. A body that ends
//! without its framing is reported as cut, never as an end.

use std::{
    fmt,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

/// How long a request may take when the test does not say.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A request that got no complete answer.
#[derive(Debug, Clone)]
pub(crate) struct Broken(pub(crate) String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A complete answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// An answer whose head has arrived. Dropping it closes the connection.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
}

/// How the body of a [`Reply`] ended.
#[derive(Debug)]
pub(crate) struct Ending {
    /// Everything that arrived.
    pub(crate) text: String,
    /// Why it broke off; `None` for a clean end.
    pub(crate) cut: Option<Broken>,
    /// When the end was seen.
    pub(crate) at: SystemTime,
}

/// A body that is read to its end, whatever the test does meanwhile.
pub(crate) struct Reading(JoinHandle<Ending>);

/// Sends a request and waits for the head of its answer.
pub(crate) async fn send(to: SocketAddr, method: Method, path: &str, body: Option<&Value>) -> Result<Reply, Broken> {
    let failed = |what: &str, error: &dyn fmt::Display| Broken(format!("{what}: {error}"));
    let stream = TcpStream::connect(to).await.map_err(|error| failed("connect", &error))?;
    stream.set_nodelay(true).map_err(|error| failed("connect", &error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed("handshake", &error))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, to.to_string())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body.map(|json| Bytes::from(json.to_string())).unwrap_or_default()))
        .unwrap();
    let response = sender.send_request(request).await.map_err(|error| failed("no answer", &error))?;
    let (head, body) = response.into_parts();
    Ok(Reply { status: head.status, headers: head.headers, body })
}

/// Sends a request and reads the whole answer, all within `patience`.
pub(crate) async fn ask(
    to: SocketAddr,
    method: Method,
    path: &str,
    body: Option<&Value>,
    patience: Duration,
) -> Result<Answer, Broken> {
    let exchange = async { send(to, method, path, body).await?.whole().await };
    timeout(patience, exchange).await.unwrap_or_else(|_| Err(Broken(format!("no complete answer in {patience:?}"))))
}

/// `GET path`.
pub(crate) async fn get(to: SocketAddr, path: &str) -> Result<Answer, Broken> {
    ask(to, Method::GET, path, None, PATIENCE).await
}

/// A chat request for `model` as an OpenAI client sends it.
pub(crate) fn chat_body(model: &str, stream: bool) -> Value {
    json!({"model": model, "stream": stream, "messages": [{"role": "user", "content": "Say something."}]})
}

// === impl Reply ===

impl Reply {
    /// Which demo backend answered, if one did.
    pub(crate) fn backend(&self) -> Option<&str> {
        backend_of(&self.headers)
    }

    /// The next piece of the body; `None` at its clean end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| Broken(format!("body: {error}")))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// Goes on reading in the background.
    pub(crate) fn read_on(self) -> Reading {
        Reading(tokio::spawn(self.ending()))
    }

    /// Reads to the end, however it comes.
    pub(crate) async fn ending(mut self) -> Ending {
        let mut text = Vec::new();
        let cut = loop {
            match self.chunk().await {
                Ok(Some(data)) => text.extend_from_slice(&data),
                Ok(None) => break None,
                Err(broken) => break Some(broken),
            }
        };
        Ending { text: String::from_utf8_lossy(&text).into_owned(), cut, at: SystemTime::now() }
    }

    async fn whole(self) -> Result<Answer, Broken> {
        let body = self.body.collect().await.map_err(|error| Broken(format!("body: {error}")))?.to_bytes();
        Ok(Answer { status: self.status, headers: self.headers, body })
    }
}

// === impl Reading ===

impl Reading {
    /// Whether the end has been seen.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.is_finished()
    }

    /// How it ended.
    ///
    /// # Panics
    /// When it has not within [`PATIENCE`].
    pub(crate) async fn ending(self) -> Ending {
        let ending = timeout(PATIENCE, self.0).await;
        ending.unwrap_or_else(|_| panic!("the stream did not end within {PATIENCE:?}")).unwrap()
    }
}

// === impl Ending ===

impl Ending {
    /// Ended as a finished event stream does.
    pub(crate) fn is_complete(&self) -> bool {
        self.cut.is_none() && self.text.trim_end().ends_with("data: [DONE]")
    }

    /// Broke off, and did not pretend to be finished.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.is_some() && !self.text.contains("[DONE]")
    }
}

// === impl Answer ===

impl Answer {
    /// Which demo backend answered, if one did.
    pub(crate) fn backend(&self) -> Option<&str> {
        backend_of(&self.headers)
    }

    /// Says when to come back.
    pub(crate) fn has_retry_after(&self) -> bool {
        self.headers.contains_key(header::RETRY_AFTER)
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }

    /// The body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

fn backend_of(headers: &HeaderMap) -> Option<&str> {
    headers.get("x-demo-backend")?.to_str().ok()
}
