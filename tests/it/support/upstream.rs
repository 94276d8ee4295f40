//! A backend on raw TCP that does what a script says, and writes down everything that reaches it.
//!
//! It answers the proxy's own questions (`GET …/models`, `GET /health` and `GET /metrics`) by itself and keeps them apart,
//! so that a test sees the requests that were forwarded and nothing else. A script may hold, break the framing, reset, or
//! never answer. It notices the proxy's hang-up at any time, also while it holds an answer back and bytes are waiting to
//! be read.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::{
    wait::{Gate, eventually},
    wire::{Body, Framing, Head, LAST_CHUNK, chunk},
};

/// What a backend does with one request, once it has read the head; when the script is over, it waits for the next
/// request on the same connection.
pub(crate) type Script = Vec<Step>;

#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Reads the request's body to its end.
    ReadBody,
    /// Reads until at least this much of the request's body is there.
    ReadAtLeast(usize),
    /// Writes these bytes as they are.
    Send(Bytes),
    /// Writes these bytes as one chunk.
    SendChunk(Bytes),
    /// Writes these bytes again and again, as fast as they are taken, and never ends.
    Flood(Bytes),
    /// From here on the connection speaks another protocol: everything that comes is body, to its end.
    Switch,
    /// Sends back everything that has come since `Switch` and still comes, to its end.
    Echo,
    /// Waits until the gate is open.
    Hold(Gate),
    /// Keeps a rhythm; not for waiting until something has happened.
    Pause(Duration),
    /// Says that no more will be sent, and goes on.
    HalfClose,
    /// Ends the connection in an orderly way.
    Close,
    /// Ends the connection with a reset.
    Reset,
}

/// One request as it arrived, as far as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) head: Head,
    pub(crate) body: Body,
    /// Which connection it came on, counted from 0.
    pub(crate) connection: usize,
    /// What is wrong with the framing of its body, if anything.
    pub(crate) malformed: Option<String>,
    /// When the writing of each `Send` and `SendChunk` of the answer began.
    pub(crate) sent_at: Vec<Instant>,
    /// How many bytes of the answer the kernel has taken.
    pub(crate) sent_len: usize,
}

/// A scripted backend; it is gone when this is dropped.
pub(crate) struct Upstream {
    /// The name to announce it by.
    pub(crate) name: &'static str,
    pub(crate) addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    /// Open once the backend is killed: every connection is reset.
    killed: Gate,
    /// Open once nothing is accepted any more, though the listener stays.
    jammed: Gate,
}

struct State {
    models: String,
    /// Answers `GET …/models` instead of `models`, if there is one.
    listing: Option<Script>,
    health: u16,
    always: Script,
    scripts: VecDeque<Script>,
    metrics: Script,
    /// When metrics were asked for.
    scrapes: Vec<Instant>,
    probes: usize,
    probes_held: Gate,
    received: Vec<Received>,
    connections: Vec<Connection>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Connection {
    /// When the proxy ended it.
    closed_at: Option<Instant>,
    /// One of the two ends has ended it.
    is_over: bool,
}

/// One connection being served.
struct Session<'a> {
    stream: &'a TcpStream,
    shared: &'a Shared,
    id: usize,
    /// Arrived, and not yet part of a head or a body.
    buf: Vec<u8>,
    /// The request that is being answered, as an index into `State::received`; none for a probe.
    current: Option<usize>,
}

/// Why a script stopped before its end.
enum Stop {
    /// The script says so.
    Ours,
    /// The connection broke or was ended by the proxy.
    Theirs,
}

// === impl Upstream ===

impl Upstream {
    /// A backend that announces `models` and answers every request with 200 and a small JSON object.
    pub(crate) async fn start(name: &'static str, models: &[&str]) -> Self {
        Self::start_with_backlog(name, models, 1024).await
    }

    /// The same with `backlog` connections that may wait to be accepted.
    pub(crate) async fn start_with_backlog(name: &'static str, models: &[&str], backlog: i32) -> Self {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)), backlog);
        let addr = listener.local_addr().unwrap();
        let objects: Vec<String> = models.iter().map(|id| format!(r#"{{"id":"{id}","object":"model"}}"#)).collect();
        let state = State {
            models: format!(r#"{{"object":"list","data":[{}]}}"#, objects.join(",")),
            listing: None,
            health: 200,
            always: json_reply(&format!(r#"{{"object":"chat.completion","served_by":"{name}"}}"#)),
            scripts: VecDeque::new(),
            metrics: reply("404 Not Found", "", ""),
            scrapes: Vec::new(),
            probes: 0,
            probes_held: Gate::open_one(),
            received: Vec::new(),
            connections: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), killed: Gate::shut(), jammed: Gate::shut() });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { name, addr, shared, accepting }
    }

    /// Answers `GET …/models` with this from now on.
    pub(crate) fn set_models(&self, body: impl Into<String>) {
        self.state().models = body.into();
    }

    /// Does this for every `GET …/models` from now on, and closes the connection.
    pub(crate) fn script_models(&self, script: Script) {
        self.state().listing = Some(script);
    }

    /// Answers `GET /health` with this status from now on.
    pub(crate) fn set_health(&self, status: u16) {
        self.state().health = status;
    }

    /// Answers `GET /metrics` so from now on; before that, there is no such page.
    pub(crate) fn set_metrics(&self, script: Script) {
        self.state().metrics = script;
    }

    /// When metrics were asked for, each time.
    pub(crate) fn scrapes(&self) -> Vec<Instant> {
        self.state().scrapes.clone()
    }

    /// Answers probes only once the gate is open.
    pub(crate) fn hold_probes(&self, gate: &Gate) {
        self.state().probes_held = gate.clone();
    }

    /// Does this for the next request that no earlier script is waiting for.
    pub(crate) fn script(&self, script: Script) {
        self.state().scripts.push_back(script);
    }

    /// Does this for every request that no script is waiting for.
    pub(crate) fn always(&self, script: Script) {
        self.state().always = script;
    }

    /// How many requests have come, beside the probes.
    pub(crate) fn count(&self) -> usize {
        self.state().received.len()
    }

    /// How many probes have come.
    pub(crate) fn probes(&self) -> usize {
        self.state().probes
    }

    /// How many connections carried requests that were not probes.
    pub(crate) fn connections_used(&self) -> usize {
        let mut used: Vec<usize> = self.state().received.iter().map(|request| request.connection).collect();
        used.sort_unstable();
        used.dedup();
        used.len()
    }

    /// How many connections are open, those of the proxy's own questions too.
    pub(crate) fn open_connections(&self) -> usize {
        self.state().connections.iter().filter(|connection| !connection.is_over).count()
    }

    /// Whether any request has come in whole.
    pub(crate) fn has_whole_request(&self) -> bool {
        self.state().received.iter().any(|request| request.body.is_done())
    }

    /// Looks at request `index` without copying it; none before its head is there.
    pub(crate) fn peek<T>(&self, index: usize, look: impl FnOnce(&Received) -> T) -> Option<T> {
        self.state().received.get(index).map(look)
    }

    /// Request `index`, as soon as its head is there.
    pub(crate) async fn request(&self, index: usize) -> Received {
        let what = format!("request {index} at backend {}", self.name);
        eventually(what, async || self.count() > index).await;
        self.peek(index, Received::clone).unwrap()
    }

    /// Request `index`, as soon as its body is there too.
    pub(crate) async fn whole(&self, index: usize) -> Received {
        let what = format!("all of request {index} at backend {}", self.name);
        eventually(what, async || self.peek(index, |request| request.body.is_done()) == Some(true)).await;
        self.peek(index, Received::clone).unwrap()
    }

    /// When the proxy ended the connection that carried request `index`.
    pub(crate) async fn hung_up(&self, index: usize) -> Instant {
        let connection = self.request(index).await.connection;
        let closed_at = || self.state().connections[connection].closed_at;
        let what = format!("backend {} sees the connection of request {index} end", self.name);
        eventually(what, async || closed_at().is_some()).await;
        closed_at().unwrap()
    }

    /// Whether the connection that carried request `index` is still open at the proxy's end.
    pub(crate) fn is_connected(&self, index: usize) -> bool {
        let state = self.state();
        state.connections[state.received[index].connection].closed_at.is_none()
    }

    /// New connections are refused from now on; the open ones go on.
    pub(crate) async fn refuse(&self) {
        self.accepting.abort();
        eventually("the listener is gone", async || self.accepting.is_finished()).await;
    }

    /// As `kill -9` would: every connection is reset, new ones are refused.
    pub(crate) async fn kill(&self) {
        self.shared.killed.open();
        self.refuse().await;
    }

    /// Fills the queue of connections that wait to be accepted, of a backend that was started with a small backlog.
    /// From now on nothing is accepted, and an attempt to connect gets no answer at all. The connections are returned:
    /// the queue stays full while they live.
    pub(crate) async fn jam(&self) -> Vec<TcpStream> {
        self.shared.jammed.open();
        let mut queued = Vec::new();
        while let Ok(stream) = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(self.addr)).await {
            queued.push(stream.unwrap());
            assert!(queued.len() < 64, "the queue of waiting connections must be finite");
        }
        queued
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
        self.shared.killed.open();
    }
}

// === impl Shared ===

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

// === impl Session ===

impl Session<'_> {
    /// Answers one request after the other until one of the two ends has had enough.
    async fn run(&mut self) {
        while let Some(head) = self.next_head().await {
            let script = self.begin(head);
            let stream = self.stream;
            let stop = tokio::select! {
                biased;
                played = self.play(script) => played.err(),
                () = peer_closed(stream) => Some(Stop::Theirs),
            };
            match stop {
                None => {}
                Some(Stop::Ours) => return,
                Some(Stop::Theirs) => {
                    self.note_hang_up();
                    self.take_the_rest();
                    return;
                }
            }
        }
    }

    /// The next head; none when the proxy has ended the connection.
    async fn next_head(&mut self) -> Option<Head> {
        loop {
            if let Some(head) = Head::take(&mut self.buf) {
                return Some(head);
            }
            if self.fill().await.is_err() {
                self.note_hang_up();
                return None;
            }
        }
    }

    /// Enters the request into the book, and says what to do with it.
    fn begin(&mut self, head: Head) -> Script {
        let mut state = self.shared.state();
        let path = head.word(1).split('?').next().unwrap_or_default();
        if head.word(0) == "GET" && (path.ends_with("/models") || path == "/health") {
            state.probes += 1;
            let answer = if path == "/health" {
                let health = state.health;
                format!("HTTP/1.1 {health} Health\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            } else {
                let (models, length) = (&state.models, state.models.len());
                format!(
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\n\
                     content-length: {length}\r\n\r\n{models}"
                )
            };
            self.current = None;
            let answer = match &state.listing {
                Some(script) if path != "/health" => script.clone(),
                _ => vec![Step::Send(answer.into())],
            };
            let held = Step::Hold(state.probes_held.clone());
            return [vec![held], answer, vec![Step::Close]].concat();
        }
        if head.word(0) == "GET" && path == "/metrics" {
            state.scrapes.push(Instant::now());
            self.current = None;
            return state.metrics.clone();
        }
        self.current = Some(state.received.len());
        let body = Body::new(head.request_framing());
        let connection = self.id;
        state.received.push(Received { head, body, connection, malformed: None, sent_at: Vec::new(), sent_len: 0 });
        match state.scripts.pop_front() {
            Some(script) => script,
            None => state.always.clone(),
        }
    }

    async fn play(&mut self, script: Script) -> Result<(), Stop> {
        // What is there already counts, even when the script never reads.
        self.absorb()?;
        for step in script {
            match step {
                Step::ReadBody => self.read_until(|body| body.is_done()).await?,
                Step::ReadAtLeast(n) => self.read_until(|body| body.is_done() || body.bytes.len() >= n).await?,
                Step::Send(bytes) => self.send(&bytes).await?,
                Step::SendChunk(bytes) => self.send(&chunk(&bytes)).await?,
                Step::Flood(bytes) => loop {
                    self.write(&bytes).await?;
                },
                Step::Switch => self.switch()?,
                Step::Echo => self.echo().await?,
                Step::Hold(gate) => gate.passed().await,
                Step::Pause(time) => tokio::time::sleep(time).await,
                Step::HalfClose => SockRef::from(self.stream).shutdown(std::net::Shutdown::Write).map_err(theirs)?,
                Step::Close => return Err(Stop::Ours),
                Step::Reset => {
                    reset_on_drop(self.stream);
                    return Err(Stop::Ours);
                }
            }
        }
        self.read_until(|body| body.is_done()).await
    }

    async fn read_until(&mut self, enough: impl Fn(&Body) -> bool) -> Result<(), Stop> {
        let Some(current) = self.current else { return Ok(()) };
        loop {
            self.absorb()?;
            if enough(&self.shared.state().received[current].body) {
                return Ok(());
            }
            self.fill().await.map_err(theirs)?;
        }
    }

    fn switch(&mut self) -> Result<(), Stop> {
        if let Some(current) = self.current {
            self.shared.state().received[current].body = Body::new(Framing::UntilClose);
        }
        self.absorb()
    }

    async fn echo(&mut self) -> Result<(), Stop> {
        let Some(current) = self.current else { return Ok(()) };
        let mut echoed = 0;
        loop {
            self.absorb()?;
            let news = self.shared.state().received[current].body.bytes[echoed..].to_vec();
            echoed += news.len();
            match news.is_empty() {
                true => self.fill().await.map_err(theirs)?,
                false => self.write(&news).await?,
            }
        }
    }

    /// Gives what has arrived to the request that is being read.
    fn absorb(&mut self) -> Result<(), Stop> {
        let Some(current) = self.current else { return Ok(()) };
        let request = &mut self.shared.state().received[current];
        request.body.feed(&mut self.buf, Instant::now()).map_err(|what| {
            request.malformed = Some(what);
            Stop::Ours
        })
    }

    /// Reads what the proxy sent before it hung up, so that the book tells all that a server could have seen.
    fn take_the_rest(&mut self) {
        while let Ok(1..) = self.stream.try_read_buf(&mut self.buf) {
            if self.absorb().is_err() {
                break;
            }
        }
    }

    /// Reads once.
    ///
    /// # Errors
    /// When the connection has ended, in whatever way.
    async fn fill(&mut self) -> io::Result<()> {
        match read_some(self.stream, &mut self.buf).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        if let Some(current) = self.current {
            self.shared.state().received[current].sent_at.push(Instant::now());
        }
        self.write(bytes).await
    }

    async fn write(&mut self, mut bytes: &[u8]) -> Result<(), Stop> {
        while !bytes.is_empty() {
            let n = write_some(self.stream, bytes).await.map_err(theirs)?;
            bytes = &bytes[n..];
            if let Some(current) = self.current {
                self.shared.state().received[current].sent_len += n;
            }
        }
        Ok(())
    }

    fn note_hang_up(&self) {
        self.shared.state().connections[self.id].closed_at.get_or_insert_with(Instant::now);
    }
}

/// 200 with a JSON body, once the request has been read.
pub(crate) fn json_reply(json: &str) -> Script {
    reply("200 OK", "content-type: application/json\r\n", json)
}

/// Any answer with a length, once the request has been read. `headers` is a block of lines, each with its line end.
pub(crate) fn reply(status: &str, headers: &str, body: impl AsRef<[u8]>) -> Script {
    let body = body.as_ref();
    let mut answer = format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\n\r\n", body.len()).into_bytes();
    answer.extend_from_slice(body);
    vec![Step::ReadBody, Step::Send(answer.into())]
}

/// The begin of an event stream, once the request has been read.
pub(crate) fn sse_begin() -> Script {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    vec![Step::ReadBody, Step::Send(head.into())]
}

/// An event stream of these chunks, whole.
pub(crate) fn sse_reply(chunks: &[&str]) -> Script {
    let mut script = sse_begin();
    script.extend(chunks.iter().map(|chunk| Step::SendChunk((*chunk).to_owned().into())));
    script.push(Step::Send(LAST_CHUNK.into()));
    script
}

/// Takes the connection over to another protocol, with a head such as a WebSocket server sends.
pub(crate) fn switching() -> Script {
    let head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nX-Session: 7\r\n\r\n";
    vec![Step::Send(head.into()), Step::Switch]
}

/// Reads the request, and waits at the gate with the answer.
pub(crate) fn held_reply(gate: &Gate) -> Script {
    let mut script = vec![Step::ReadBody, Step::Hold(gate.clone())];
    script.extend(json_reply(r#"{"held":true}"#));
    script
}

/// An event stream that sends `first`, waits at the gate, sends `last` and ends well.
pub(crate) fn held_stream(first: &str, gate: &Gate, last: &str) -> Script {
    let mut script = sse_begin();
    script.extend([
        Step::SendChunk(first.to_owned().into()),
        Step::Hold(gate.clone()),
        Step::SendChunk(last.to_owned().into()),
        Step::Send(LAST_CHUNK.into()),
    ]);
    script
}

/// Reads once into `buf`, without taking the stream away from others who watch it.
pub(crate) async fn read_some(stream: &TcpStream, buf: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        buf.reserve(64 * 1024);
        match stream.try_read_buf(buf) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

/// Writes once, some of `bytes`.
pub(crate) async fn write_some(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => return written,
        }
    }
}

/// Makes the end of this connection a reset.
pub(crate) fn reset_on_drop(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.jammed.passed() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, _) = accepted.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(serve(Arc::clone(&shared), stream));
    }
    // Jammed: the listener lives on, and so does its queue.
    std::future::pending().await
}

async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    let id = {
        let mut state = shared.state();
        state.connections.push(Connection::default());
        state.connections.len() - 1
    };
    let mut session = Session { stream: &stream, shared: &shared, id, buf: Vec::new(), current: None };
    tokio::select! {
        () = session.run() => {}
        () = shared.killed.passed() => reset_on_drop(&stream),
    }
    shared.state().connections[id].is_over = true;
}

/// Waits until the other end has closed, without reading: what it sent before stays where it is.
async fn peer_closed(stream: &TcpStream) {
    // An error of the wait itself can only mean that the socket is of no use any more.
    while let Ok(ready) = stream.ready(Interest::READABLE).await {
        if ready.is_read_closed() {
            return;
        }
        // Bytes are waiting, so the socket stays readable: look again in a moment.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn listen(addr: SocketAddr, backlog: i32) -> TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&addr.into()).unwrap();
    socket.listen(backlog).unwrap();
    socket.set_nonblocking(true).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

fn theirs(_: io::Error) -> Stop {
    Stop::Theirs
}
