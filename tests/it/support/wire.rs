//! HTTP/1.1 heads and bodies taken apart by hand, for both ends of the suite.
//!
//! Written without the library that the proxy is built on: a mistake of that library must not be able to hide itself.
//! It is strict about framing and knows nothing of semantics: what a header means is for the tests to say.

use std::{fmt, ops::Range, time::Instant};

/// A request or response head, as it stood on the wire.
#[derive(Clone)]
pub(crate) struct Head {
    /// Everything up to and with the empty line.
    pub(crate) raw: Vec<u8>,
    /// The request line or the status line.
    pub(crate) start: String,
    /// Names in lower case, in the order of the wire, one entry per line.
    pub(crate) headers: Vec<(String, String)>,
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// A body on its way in: feed it what arrives.
#[derive(Clone, Debug)]
pub(crate) struct Body {
    state: State,
    /// Without framing.
    pub(crate) bytes: Vec<u8>,
    /// The chunks of a chunked body, else whatever one read brought.
    pub(crate) pieces: Vec<Piece>,
    pub(crate) trailers: Vec<(String, String)>,
    chunk_start: usize,
}

/// One piece of a body, and when the last of it came in.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) at: Instant,
    pub(crate) range: Range<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// This many bytes are still to come.
    Length(usize),
    ChunkSize,
    /// This many bytes of the chunk are still to come.
    ChunkData(usize),
    ChunkEnd,
    Trailers,
    UntilClose,
    Done,
}

// === impl Head ===

impl Head {
    /// Takes the head off the front of `buf`, once all of it is there.
    pub(crate) fn take(buf: &mut Vec<u8>) -> Option<Self> {
        let end = find(buf, b"\r\n\r\n")? + 4;
        let raw: Vec<u8> = buf.drain(..end).collect();
        let text = String::from_utf8_lossy(&raw).into_owned();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let headers = lines.map(header_line).collect();
        Some(Self { raw, start, headers })
    }

    /// The first value of `name` (in lower case).
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// All values of `name` (in lower case), in order, one per line.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str()).collect()
    }

    /// The word at `index` of the request or status line.
    pub(crate) fn word(&self, index: usize) -> &str {
        self.start.split(' ').nth(index).unwrap_or_default()
    }

    /// How the body of a request with this head ends.
    pub(crate) fn request_framing(&self) -> Framing {
        self.declared_framing().unwrap_or(Framing::Length(0))
    }

    /// How the body of a response with this head ends, where `to_head` says that it answers a HEAD request.
    pub(crate) fn response_framing(&self, to_head: bool) -> Framing {
        let status = self.word(1);
        if to_head || status.starts_with('1') || status == "204" || status == "304" {
            return Framing::Length(0);
        }
        self.declared_framing().unwrap_or(Framing::UntilClose)
    }

    fn declared_framing(&self) -> Option<Framing> {
        if self.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return Some(Framing::Chunked);
        }
        self.header("content-length").map(|value| Framing::Length(value.parse().unwrap()))
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.raw), f)
    }
}

// === impl Body ===

impl Body {
    pub(crate) fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkSize,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state, bytes: Vec::new(), pieces: Vec::new(), trailers: Vec::new(), chunk_start: 0 }
    }

    /// Whether the last byte has come.
    pub(crate) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether an orderly end of the connection would be the end of this body.
    pub(crate) fn may_end_by_close(&self) -> bool {
        matches!(self.state, State::UntilClose | State::Done)
    }

    pub(crate) fn piece(&self, index: usize) -> Option<&[u8]> {
        self.pieces.get(index).map(|piece| &self.bytes[piece.range.clone()])
    }

    /// Takes from the front of `buf` what belongs to this body.
    ///
    /// # Errors
    /// Says what is wrong when the framing is broken.
    pub(crate) fn feed(&mut self, buf: &mut Vec<u8>, now: Instant) -> Result<(), String> {
        let mut used = 0;
        let result = loop {
            let rest = &buf[used..];
            if self.is_done() || rest.is_empty() {
                break Ok(());
            }
            match self.step(rest, now) {
                Ok(0) => break Ok(()),
                Ok(n) => used += n,
                Err(what) => break Err(what),
            }
        };
        buf.drain(..used);
        result
    }

    /// Uses some of `rest`, which is not empty, and says how much; 0 when more is needed first.
    fn step(&mut self, rest: &[u8], now: Instant) -> Result<usize, String> {
        match self.state {
            State::Length(missing) => {
                let n = missing.min(rest.len());
                self.piece_of(&rest[..n], now);
                self.state = if n == missing { State::Done } else { State::Length(missing - n) };
                Ok(n)
            }
            State::UntilClose => {
                self.piece_of(rest, now);
                Ok(rest.len())
            }
            State::ChunkSize => {
                let Some(end) = find(rest, b"\r\n") else { return Ok(0) };
                let line = String::from_utf8_lossy(&rest[..end]);
                let digits = line.split(';').next().unwrap_or_default().trim();
                let size = usize::from_str_radix(digits, 16).map_err(|_| format!("chunk size {line:?}"))?;
                self.chunk_start = self.bytes.len();
                self.state = if size == 0 { State::Trailers } else { State::ChunkData(size) };
                Ok(end + 2)
            }
            State::ChunkData(missing) => {
                let n = missing.min(rest.len());
                self.bytes.extend_from_slice(&rest[..n]);
                self.state = State::ChunkData(missing - n);
                if n == missing {
                    self.pieces.push(Piece { at: now, range: self.chunk_start..self.bytes.len() });
                    self.state = State::ChunkEnd;
                }
                Ok(n)
            }
            State::ChunkEnd if rest.len() < 2 => Ok(0),
            State::ChunkEnd if rest.starts_with(b"\r\n") => {
                self.state = State::ChunkSize;
                Ok(2)
            }
            State::ChunkEnd => Err("no line end after a chunk".to_owned()),
            State::Trailers => {
                let Some(end) = find(rest, b"\r\n") else { return Ok(0) };
                if end == 0 {
                    self.state = State::Done;
                } else {
                    self.trailers.push(header_line(&String::from_utf8_lossy(&rest[..end])));
                }
                Ok(end + 2)
            }
            State::Done => Ok(0),
        }
    }

    fn piece_of(&mut self, bytes: &[u8], now: Instant) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.pieces.push(Piece { at: now, range: start..self.bytes.len() });
    }
}

/// `bytes` as one chunk of a chunked body.
pub(crate) fn chunk(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(b"\r\n");
    framed
}

/// The end of a chunked body without trailers.
pub(crate) const LAST_CHUNK: &str = "0\r\n\r\n";

fn header_line(line: &str) -> (String, String) {
    let (name, value) = line.split_once(':').unwrap_or((line, ""));
    (name.to_ascii_lowercase(), value.trim().to_owned())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

mod tests {
    use super::*;

    /// `wire` fed in pieces of `step` bytes.
    fn decode(wire: &[u8], step: usize) -> Body {
        let mut body = Body::new(Framing::Chunked);
        let mut buf = Vec::new();
        for bytes in wire.chunks(step) {
            buf.extend_from_slice(bytes);
            body.feed(&mut buf, Instant::now()).unwrap();
        }
        assert!(buf.is_empty() || body.is_done(), "left over: {buf:?}");
        body
    }

    #[test]
    fn chunks_are_read_the_same_under_every_split() {
        let wire = b"3\r\nabc\r\nA;ext=1\r\n0123456789\r\n0\r\nx-sum: 9\r\n\r\n";
        for step in 1..=wire.len() {
            let body = decode(wire, step);
            assert!(body.is_done());
            assert_eq!(body.bytes, b"abc0123456789");
            assert_eq!(body.piece(0), Some(&b"abc"[..]));
            assert_eq!(body.piece(1), Some(&b"0123456789"[..]));
            assert_eq!(body.trailers, [("x-sum".to_owned(), "9".to_owned())]);
        }
    }

    #[test]
    fn broken_chunks_are_told() {
        for wire in ["x\r\n", "1\r\nab\r\n", "\r\n"] {
            let mut body = Body::new(Framing::Chunked);
            let told = body.feed(&mut wire.as_bytes().to_vec(), Instant::now());
            assert!(told.is_err(), "{wire:?} was taken: {body:?}");
        }
    }

    #[test]
    fn a_body_leaves_what_follows_it() {
        let mut buf = b"abcdeGET / HTTP/1.1".to_vec();
        let mut body = Body::new(Framing::Length(5));
        body.feed(&mut buf, Instant::now()).unwrap();
        assert!(body.is_done());
        assert_eq!(buf, b"GET / HTTP/1.1");
    }

    #[test]
    fn a_head_keeps_order_and_duplicates() {
        let mut buf = b"GET /a HTTP/1.1\r\nB: 1\r\na:2 \r\nb: 3\r\n\r\nrest".to_vec();
        let head = Head::take(&mut buf).unwrap();
        assert_eq!((head.word(0), head.word(1)), ("GET", "/a"));
        assert_eq!(head.all("b"), ["1", "3"]);
        assert_eq!(head.header("a"), Some("2"));
        assert_eq!(head.headers[1].0, "a");
        assert_eq!(buf, b"rest");
    }
}
