//! A client that works with bytes: it sends what it is told, in the pieces that it is told, and can stall, half-close
//! and vanish at any point. It reads answers by their framing and tells a cut one from a whole one.

use std::{
    convert::Infallible,
    io,
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use http_body_util::combinators::BoxBody;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use socket2::SockRef;
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
};

use super::{
    upstream::{read_some, reset_on_drop, write_some},
    wait::soon,
    wire::{Body, Head, LAST_CHUNK, chunk},
};

/// One connection to the proxy.
pub(crate) struct Client {
    stream: Arc<TcpStream>,
    /// Arrived, and not yet part of a head or a body.
    buf: Vec<u8>,
    /// The answer being read.
    incoming: Option<Incoming>,
    /// Whether the answer being read is one to HEAD.
    to_head: bool,
}

struct Incoming {
    head: Head,
    body: Body,
    pieces_seen: usize,
}

/// How a connection, or the answer on it, came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By its own framing.
    Whole,
    /// The connection was closed before the answer was over.
    Closed,
    /// The connection was reset.
    Reset,
}

/// Bytes on their way; no more of them go out once this is dropped.
pub(crate) struct Sending {
    task: JoinHandle<io::Result<()>>,
    sent_len: Arc<AtomicUsize>,
}

/// A request to send, built as text: nothing in here is checked, so that it can be wrong.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    start: String,
    headers: String,
    body: Vec<u8>,
}

/// An answer, as far as it came.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: Head,
    pub(crate) body: Body,
    pub(crate) end: End,
}

// === impl Client ===

impl Client {
    pub(crate) async fn connect(addr: SocketAddr) -> Self {
        Self::on(soon("a connection to the proxy", TcpStream::connect(addr)).await.unwrap())
    }

    /// A client whose kernel holds little for it, so that not reading is felt at the other end soon.
    pub(crate) async fn connect_narrow(addr: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 * 1024).unwrap();
        Self::on(soon("a connection to the proxy", socket.connect(addr)).await.unwrap())
    }

    /// A client on a connection that is already there.
    pub(crate) fn on(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self { stream: Arc::new(stream), buf: Vec::new(), incoming: None, to_head: false }
    }

    /// Sends these bytes as they are; fails the test when they are not taken.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        if let Err(error) = self.try_send(bytes).await {
            self.fill("what the proxy has to say").await.ok();
            panic!("not taken: {error}, but told {:?}", String::from_utf8_lossy(&self.buf));
        }
    }

    /// Sends these bytes as they are.
    ///
    /// # Errors
    /// The proxy has ended the connection.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        soon("the proxy takes the bytes", write_all(&self.stream, bytes.as_ref())).await
    }

    /// Sends the pieces one by one, each in a TCP segment of its own, `gap` apart so that the proxy reads them apart.
    pub(crate) async fn send_pieces<'a>(&mut self, pieces: impl IntoIterator<Item = &'a [u8]>, gap: Duration) {
        for piece in pieces {
            self.send(piece).await;
            tokio::time::sleep(gap).await;
        }
    }

    /// Sends the request and reads the answer at the same time, as a server may answer before it has read everything.
    /// What the proxy does not take any more once it has answered is not sent.
    pub(crate) async fn ask(&mut self, request: &Request) -> Answer {
        self.to_head = request.start.starts_with("HEAD ");
        match self.try_ask(&request.bytes()).await {
            Ok(answer) => answer,
            Err(end) => panic!("no answer: connection {end:?}, having sent {:?}", String::from_utf8_lossy(&self.buf)),
        }
    }

    /// As `ask`, with any bytes.
    ///
    /// # Errors
    /// How the connection ended, when it did so without an answer.
    pub(crate) async fn try_ask(&mut self, bytes: &[u8]) -> Result<Answer, End> {
        let stream = Arc::clone(&self.stream);
        let send = async move {
            // An answer may well come after the proxy has stopped reading; no answer at all is told by reading.
            write_all(&stream, bytes).await.ok();
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            answer = self.try_answer() => answer,
            never = send => match never {},
        }
    }

    /// The head of the next answer; interim ones before it are passed over.
    pub(crate) async fn head(&mut self) -> Head {
        match self.try_head().await {
            Ok(head) => head,
            Err(end) => panic!("no answer: connection {end:?}, having sent {:?}", String::from_utf8_lossy(&self.buf)),
        }
    }

    async fn try_head(&mut self) -> Result<Head, End> {
        assert!(self.incoming.is_none(), "the answer before must be read to its end first");
        loop {
            let head = self.any_head().await?;
            if head.word(1).starts_with('1') && head.word(1) != "101" {
                continue;
            }
            let body = Body::new(head.response_framing(self.to_head));
            self.incoming = Some(Incoming { head: head.clone(), body, pieces_seen: 0 });
            return Ok(head);
        }
    }

    /// The next head of any kind, interim ones too.
    ///
    /// # Errors
    /// How the connection ended, if there is none.
    pub(crate) async fn any_head(&mut self) -> Result<Head, End> {
        loop {
            if let Some(head) = Head::take(&mut self.buf) {
                return Ok(head);
            }
            self.fill("the head of an answer").await?;
        }
    }

    /// The next piece of the answer's body, and when it came; none at the end, whatever the end is.
    pub(crate) async fn piece(&mut self) -> Option<(Instant, Vec<u8>)> {
        loop {
            self.digest();
            let incoming = self.incoming.as_mut().unwrap();
            let index = incoming.pieces_seen;
            if let Some(bytes) = incoming.body.piece(index) {
                let piece = (incoming.body.pieces[index].at, bytes.to_vec());
                incoming.pieces_seen += 1;
                return Some(piece);
            }
            if incoming.body.is_done() || self.fill("a piece of the answer").await.is_err() {
                return None;
            }
        }
    }

    /// Reads the answer, whose head was read before, to its end.
    pub(crate) async fn finish(&mut self) -> Answer {
        let end = loop {
            self.digest();
            let body = &self.incoming.as_ref().unwrap().body;
            if body.is_done() {
                break End::Whole;
            }
            let by_close = body.may_end_by_close();
            match self.fill("the rest of the answer").await {
                Ok(()) => {}
                Err(End::Closed) if by_close => break End::Whole,
                Err(end) => break end,
            }
        };
        let Incoming { head, body, .. } = self.incoming.take().unwrap();
        Answer { status: head.word(1).parse().unwrap(), head, body, end }
    }

    /// The next answer, whole or cut.
    pub(crate) async fn answer(&mut self) -> Answer {
        self.head().await;
        self.finish().await
    }

    /// The next answer, to a HEAD request or to any other.
    ///
    /// # Errors
    /// How the connection ended, when it did so without an answer.
    pub(crate) async fn next_answer(&mut self, to_head: bool) -> Result<Answer, End> {
        self.to_head = to_head;
        self.try_answer().await
    }

    async fn try_answer(&mut self) -> Result<Answer, End> {
        self.try_head().await?;
        Ok(self.finish().await)
    }

    /// Waits for the end of the connection; fails the test when more bytes come first.
    pub(crate) async fn ended(&mut self) -> End {
        match self.fill("the end of the connection").await {
            Ok(()) => panic!("expected the end, got {:?}", String::from_utf8_lossy(&self.buf)),
            Err(end) => end,
        }
    }

    /// Whether the connection is open and nothing has come that was not asked for.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let read = self.stream.try_read_buf(&mut self.buf);
        self.buf.is_empty() && matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The next `n` bytes as they are, on a connection that has switched protocols.
    pub(crate) async fn raw(&mut self, n: usize) -> Vec<u8> {
        while self.buf.len() < n {
            if let Err(end) = self.fill("bytes of the other protocol").await {
                panic!("{end:?} after {} bytes of {n}: {:?}", self.buf.len(), String::from_utf8_lossy(&self.buf));
            }
        }
        self.buf.drain(..n).collect()
    }

    /// All bytes that still come, whatever they mean, and how the connection ended.
    pub(crate) async fn raw_to_end(&mut self) -> (Vec<u8>, End) {
        loop {
            if let Err(end) = self.fill("the end of the connection").await {
                return (std::mem::take(&mut self.buf), end);
            }
        }
    }

    /// Sends these bytes while other things happen on the connection.
    pub(crate) fn send_aside(&self, bytes: impl Into<Bytes>) -> Sending {
        self.send_pieces_aside(vec![bytes.into()], Duration::ZERO)
    }

    /// Sends the pieces while other things happen on the connection, each in a TCP segment of its own, `gap` apart.
    pub(crate) fn send_pieces_aside(&self, pieces: Vec<Bytes>, gap: Duration) -> Sending {
        let stream = Arc::clone(&self.stream);
        let sent_len = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sent_len);
        let task = tokio::spawn(async move {
            for (index, mut bytes) in pieces.into_iter().enumerate() {
                if index > 0 && !gap.is_zero() {
                    tokio::time::sleep(gap).await;
                }
                while !bytes.is_empty() {
                    let n = write_some(&stream, &bytes).await?;
                    bytes.advance(n);
                    count.fetch_add(n, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        Sending { task, sent_len }
    }

    /// Says that no more will be sent, and goes on reading.
    pub(crate) fn half_close(&self) {
        match SockRef::from(&*self.stream).shutdown(Shutdown::Write) {
            // The other side was faster.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
            shut => shut.unwrap(),
        }
    }

    /// Ends the connection in an orderly way, and says when.
    pub(crate) fn close(self) -> Instant {
        Instant::now()
    }

    /// Ends the connection with a reset, as when a process is killed with bytes unread, and says when.
    pub(crate) fn vanish(self) -> Instant {
        reset_on_drop(&self.stream);
        Instant::now()
    }

    fn digest(&mut self) {
        let body = &mut self.incoming.as_mut().unwrap().body;
        if let Err(what) = body.feed(&mut self.buf, Instant::now()) {
            panic!("the proxy's framing is broken: {what}");
        }
    }

    async fn fill(&mut self, what: &str) -> Result<(), End> {
        match soon(what, read_some(&self.stream, &mut self.buf)).await {
            Ok(0) => Err(End::Closed),
            Ok(_) => Ok(()),
            Err(_) => Err(End::Reset),
        }
    }
}

// === impl Sending ===

impl Sending {
    /// How many bytes the kernel has taken.
    pub(crate) fn sent_len(&self) -> usize {
        self.sent_len.load(Ordering::Relaxed)
    }

    /// Waits until all of them are out.
    ///
    /// # Errors
    /// The proxy has ended the connection.
    pub(crate) async fn done(mut self) -> io::Result<()> {
        soon("the proxy takes the bytes", &mut self.task).await.unwrap()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === impl Request ===

impl Request {
    /// A request without a body.
    pub(crate) fn new(method: &str, target: &str) -> Self {
        Self {
            start: format!("{method} {target} HTTP/1.1\r\n"),
            headers: "host: proxy.test\r\n".to_owned(),
            body: Vec::new(),
        }
    }

    pub(crate) fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    /// A POST of JSON.
    pub(crate) fn post(target: &str, json: impl AsRef<[u8]>) -> Self {
        Self::new("POST", target).header("content-type", "application/json").body(json)
    }

    /// The least that a chat completion needs.
    pub(crate) fn chat(model: &str) -> Self {
        Self::post("/v1/chat/completions", format!(r#"{{"model":"{model}","messages":[]}}"#))
    }

    /// The least that a message in Anthropic's dialect needs.
    pub(crate) fn messages(model: &str) -> Self {
        Self::post("/v1/messages", format!(r#"{{"max_tokens":1,"messages":[],"model":"{model}"}}"#))
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    /// In place of all headers so far, `host` too.
    pub(crate) fn only_headers(mut self, lines: &str) -> Self {
        lines.clone_into(&mut self.headers);
        self
    }

    /// Speaks HTTP/1.0.
    pub(crate) fn http10(mut self) -> Self {
        self.start = self.start.replace("HTTP/1.1", "HTTP/1.0");
        self
    }

    /// A body with its length.
    pub(crate) fn body(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.body = bytes.as_ref().to_vec();
        let length = self.body.len().to_string();
        self.header("content-length", &length)
    }

    /// A body in these chunks, without trailers.
    pub(crate) fn chunks<'a>(mut self, chunks: impl IntoIterator<Item = &'a [u8]>) -> Self {
        self.body = chunks.into_iter().flat_map(chunk).collect();
        self.body.extend_from_slice(LAST_CHUNK.as_bytes());
        self.header("transfer-encoding", "chunked")
    }

    /// These bytes after the head, whatever the headers say.
    pub(crate) fn raw_body(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.body = bytes.as_ref().to_vec();
        self
    }

    pub(crate) fn head_bytes(&self) -> Vec<u8> {
        format!("{}{}\r\n", self.start, self.headers).into_bytes()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.head_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

// === impl Answer ===

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.body.bytes
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.end == End::Whole
    }

    /// The body as JSON; fails the test, showing the answer, when it is none.
    pub(crate) fn json(&self) -> Value {
        match serde_json::from_slice(self.bytes()) {
            Ok(value) => value,
            Err(error) => panic!("{error} in answer {} with body {:?}", self.head.start, self.text()),
        }
    }
}

/// One HTTP/2 connection in clear text, by prior knowledge, as a front proxy opens it. The streams on it end when the
/// returned sender and the answers are dropped.
pub(crate) async fn connect_h2(addr: SocketAddr) -> http2::SendRequest<BoxBody<Bytes, Infallible>> {
    let stream = TcpStream::connect(addr).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    // How the connection ends is seen by its streams.
    tokio::spawn(connection);
    sender
}

async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = write_some(stream, bytes).await?;
        bytes = &bytes[n..];
    }
    Ok(())
}
