//! Heads of requests and answers: header lines as they came, with what decides where the body ends.

mod host;
mod known;

use std::mem::MaybeUninit;

use http::{Method, StatusCode};
use memchr::memchr;

use self::host::is_host;
pub use self::known::Known;
use super::body::Framing;

/// Most header lines in a head.
pub const LINES_MAX: usize = 128;
/// Longest head, in bytes.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Most headers that `Connection` may name: each line is looked up among them.
const NAMED_MAX: usize = 64;

/// Why bytes are not a head that could be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// It breaks the grammar.
    #[error("{0}")]
    Malformed(&'static str),
    /// It says the length of its body in two ways, so that two readers could read two different messages.
    #[error("{0}")]
    Ambiguous(&'static str),
    /// It has more bytes than a head may have.
    #[error("the head has more than {HEAD_BYTES_MAX} bytes")]
    TooLarge,
    /// It has more header lines than a head may have.
    #[error("the head has more than {LINES_MAX} header lines")]
    TooManyLines,
    /// It is of a version that is not spoken here.
    #[error("HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here")]
    Version,
}

/// Which of the two dialects of HTTP/1 a message is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Knows neither chunks nor interim answers, and closes after each answer unless asked not to.
    Http10,
    /// The other one.
    Http11,
}

/// Where a stretch of bytes is in a head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Span {
    start: u32,
    end: u32,
}

#[derive(Debug, Clone, Copy)]
struct Line {
    name: Span,
    value: Span,
    known: Known,
}

/// Header lines, in their order, each with its bytes as they came.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    lines: Vec<Line>,
}

/// One header line.
#[derive(Debug, Clone, Copy)]
pub struct Header<'h> {
    /// Its name, in the sender's case.
    pub name: &'h [u8],
    /// Its value, without white space around it.
    pub value: &'h [u8],
    /// Which one it is.
    pub known: Known,
}

/// The head of a request. It is read into again and again, so that a connection allocates for its first head only.
#[derive(Debug)]
pub struct RequestHead {
    /// Its header lines.
    pub lines: Lines,
    /// Its method.
    pub method: Method,
    /// Its version.
    pub version: Version,
    /// Where its body ends.
    pub framing: Framing,
    /// Path and query. Kept apart from the lines as text, because it is asked for many times.
    target: String,
    /// How much of the target stands before the query.
    path_bytes: usize,
    authority: Span,
}

/// The head of an answer.
#[derive(Debug)]
pub struct ResponseHead {
    /// Its header lines.
    pub lines: Lines,
    /// Its status.
    pub status: StatusCode,
    /// Where its body ends, going by the head alone: no answer to `HEAD`, and none with status 1xx, 204 or 304, has one.
    pub framing: Framing,
    /// The connection may carry another request afterwards.
    pub reusable: bool,
    reason: Span,
}

// === finding the end ===

/// Looks for the end of a head in bytes that come piece by piece, looking at each byte once.
#[derive(Debug, Default)]
pub struct HeadEnd {
    scanned: usize,
    line_start: usize,
    any_line: bool,
}

impl HeadEnd {
    /// How long the head at the beginning of `bytes` is, once all of it is there. `bytes` must begin with what it held at
    /// the last call.
    ///
    /// # Errors
    /// A line that ends in a bare line feed: whether it ends there is what readers differ in. More bytes than a head may
    /// have.
    pub fn find(&mut self, bytes: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(found) = memchr(b'\n', &bytes[self.scanned..]) {
            let end = self.scanned + found;
            if end == self.line_start || bytes[end - 1] != b'\r' {
                return Err(HeadError::Malformed("a header line ends in a line feed without a carriage return"));
            }
            let is_empty = end == self.line_start + 1;
            self.scanned = end + 1;
            self.line_start = end + 1;
            if self.scanned > HEAD_BYTES_MAX {
                return Err(HeadError::TooLarge);
            }
            if !is_empty {
                self.any_line = true;
            } else if self.any_line {
                *self = HeadEnd::default();
                return Ok(Some(end + 1));
            }
        }
        self.scanned = bytes.len();
        if bytes.len() > HEAD_BYTES_MAX { Err(HeadError::TooLarge) } else { Ok(None) }
    }
}

// === impl Lines ===

impl Lines {
    /// All lines, in their order.
    pub fn iter(&self) -> impl Iterator<Item = Header<'_>> {
        self.lines.iter().map(|line| Header {
            name: self.get(line.name),
            value: self.get(line.value),
            known: line.known,
        })
    }

    /// The values of all lines with this name.
    pub fn all(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.lines.iter().filter(move |line| line.known == known).map(|line| self.get(line.value))
    }

    /// The value of the first line with this name.
    pub fn first(&self, known: Known) -> Option<&[u8]> {
        self.all(known).next()
    }

    /// Whether there is a line with this name.
    pub fn has(&self, known: Known) -> bool {
        self.lines.iter().any(|line| line.known == known)
    }

    /// The value of the first line with this name, in lower case, for names that are asked for seldom.
    pub fn named(&self, name: &str) -> Option<&[u8]> {
        self.all_named(name).next()
    }

    /// The values of all lines with this name, in lower case, for names that are asked for seldom.
    pub fn all_named(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.iter().filter(|header| header.name.eq_ignore_ascii_case(name.as_bytes())).map(|header| header.value)
    }

    /// Whether a line of this name lists `token`, in any case.
    pub fn lists(&self, known: Known, token: &str) -> bool {
        self.all(known).any(|value| tokens(value).any(|t| t.eq_ignore_ascii_case(token.as_bytes())))
    }

    /// Whether the lines of this name list `token`, in any case, and nothing else.
    pub fn lists_only(&self, known: Known, token: &str) -> bool {
        self.has(known) && self.all(known).all(|value| value.eq_ignore_ascii_case(token.as_bytes()))
    }

    /// Whether a `Connection` line names this header, so that it ends here. What the next reader needs to read the body as
    /// it was read here, and to know whom it is from, is not the sender's to take away.
    pub fn is_named_by_connection(&self, header: &Header<'_>) -> bool {
        !header.known.is_for_every_reader()
            && self.all(Known::Connection).any(|value| tokens(value).any(|name| name.eq_ignore_ascii_case(header.name)))
    }

    fn get(&self, span: Span) -> &[u8] {
        &self.bytes[span.start as usize..span.end as usize]
    }

    fn span_of(base: &[u8], part: &[u8]) -> Span {
        if part.is_empty() {
            // It may be a literal from elsewhere.
            return Span::default();
        }
        // Both are slices of one buffer of at most HEAD_BYTES_MAX bytes.
        let start = (part.as_ptr() as usize).wrapping_sub(base.as_ptr() as usize);
        debug_assert!(start + part.len() <= base.len(), "a part must lie within its whole");
        Span { start: u32::try_from(start).unwrap_or(0), end: u32::try_from(start + part.len()).unwrap_or(0) }
    }

    fn fill(&mut self, bytes: &[u8], headers: &[httparse::Header<'_>]) {
        self.bytes.clear();
        self.bytes.extend_from_slice(bytes);
        self.lines.clear();
        self.lines.extend(headers.iter().map(|header| Line {
            name: Lines::span_of(bytes, header.name.as_bytes()),
            value: Lines::span_of(bytes, header.value),
            known: Known::of(header.name.as_bytes()),
        }));
    }

    /// Looking each line up among the names that fit into a head would take its square.
    fn check_named(&self) -> Result<(), HeadError> {
        match self.all(Known::Connection).flat_map(tokens).nth(NAMED_MAX) {
            Some(_) => Err(HeadError::Malformed("Connection names too many headers")),
            None => Ok(()),
        }
    }

    /// Where a body ends by `Content-Length`, if there is one.
    fn content_length(&self) -> Result<Option<u64>, HeadError> {
        let mut length = None;
        for value in self.all(Known::ContentLength) {
            let Some(parsed) = number_of(value) else {
                return Err(HeadError::Malformed("Content-Length is not a number"));
            };
            if length.replace(parsed).is_some_and(|before| before != parsed) {
                return Err(HeadError::Ambiguous("the message has two different Content-Length headers"));
            }
        }
        Ok(length)
    }

    /// Whether the body is sent in chunks.
    fn is_chunked(&self) -> Result<bool, HeadError> {
        let mut codings = self.all(Known::TransferEncoding);
        match (codings.next(), codings.next()) {
            (None, _) => Ok(false),
            (Some(only), None) if only.eq_ignore_ascii_case(b"chunked") => Ok(true),
            _ => Err(HeadError::Malformed("the only Transfer-Encoding understood is `chunked`")),
        }
    }
}

/// A number of digits alone, if it is one of 64 bits.
fn number_of(digits: &[u8]) -> Option<u64> {
    let push = |number: u64, digit: &u8| match digit {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    };
    if digits.is_empty() { None } else { digits.iter().try_fold(0, push) }
}

/// The tokens of a list such as the value of `Connection`.
fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}

// === impl RequestHead ===

impl Default for RequestHead {
    fn default() -> RequestHead {
        RequestHead {
            lines: Lines::default(),
            method: Method::GET,
            version: Version::Http11,
            framing: Framing::Empty,
            target: String::new(),
            path_bytes: 0,
            authority: Span::default(),
        }
    }
}

impl RequestHead {
    /// Gives back the memory of a head that was larger than most: the next one may not come for long.
    pub fn forget_large(&mut self) {
        const KEPT_BYTES_MAX: usize = 4 * 1024;
        const KEPT_LINES_MAX: usize = 64;
        let bytes = self.lines.bytes.capacity().max(self.target.capacity());
        if bytes > KEPT_BYTES_MAX || self.lines.lines.capacity() > KEPT_LINES_MAX {
            *self = RequestHead::default();
        }
    }

    /// Reads a whole head, as [`HeadEnd`] found it, in place of what was here before.
    ///
    /// # Errors
    /// It is not one, or one that two readers could read in two ways.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), HeadError> {
        let mut headers = [MaybeUninit::uninit(); LINES_MAX];
        let mut parsed = httparse::Request::new(&mut []);
        match httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut parsed, bytes, &mut headers) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return Err(HeadError::Malformed("the head is cut off")),
            Err(error) => return Err(grammar(error)),
        }
        self.version = if parsed.version == Some(0) { Version::Http10 } else { Version::Http11 };
        self.method = parsed
            .method
            .and_then(|method| Method::from_bytes(method.as_bytes()).ok())
            .ok_or(HeadError::Malformed("the method is not one"))?;
        if self.method == Method::CONNECT {
            return Err(HeadError::Malformed("CONNECT is for proxies of another kind"));
        }
        let target = parsed.path.unwrap_or_default();
        if !target.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
            return Err(HeadError::Malformed("the request target holds a character that must be percent-encoded"));
        }
        let (authority, origin) =
            split_target(target).ok_or(HeadError::Malformed("the request target has a scheme and no host"))?;
        self.target.clear();
        self.target.push_str(origin);
        self.path_bytes = origin.bytes().position(|byte| byte == b'?').unwrap_or(origin.len());
        self.authority = Lines::span_of(bytes, authority.as_bytes());
        self.lines.fill(bytes, parsed.headers);
        self.lines.check_named()?;
        if self.lines.all(Known::Host).nth(1).is_some() {
            return Err(HeadError::Ambiguous("the request has two Host headers"));
        }
        self.framing = match (self.lines.is_chunked()?, self.lines.content_length()?) {
            (true, Some(_)) => {
                return Err(HeadError::Ambiguous(
                    "the request says its length in two ways (Content-Length and Transfer-Encoding)",
                ));
            }
            (true, None) if self.version == Version::Http10 => {
                return Err(HeadError::Malformed("HTTP/1.0 knows no Transfer-Encoding"));
            }
            (true, None) => Framing::Chunked,
            (false, None | Some(0)) => Framing::Empty,
            (false, Some(length)) => Framing::Length(length),
        };
        Ok(())
    }

    /// Path and query, in the client's own encoding. For `OPTIONS *` an asterisk.
    pub fn target(&self) -> &str {
        // Absolute form without a path.
        if self.target.is_empty() { "/" } else { &self.target }
    }

    /// The path alone.
    pub fn path(&self) -> &str {
        if self.target.is_empty() { "/" } else { &self.target[..self.path_bytes] }
    }

    /// The query alone.
    pub fn query(&self) -> Option<&str> {
        self.target.get(self.path_bytes + 1..)
    }

    /// The host that was asked: of the target, if it is in absolute form, else of `Host`.
    pub fn host(&self) -> Option<&[u8]> {
        match self.lines.get(self.authority) {
            [] => self.lines.first(Known::Host),
            authority => Some(authority),
        }
    }

    /// What is wrong with its `Host`, if anything is: HTTP/1.1 must have one, and it must be one (RFC 9112, 3.2). The same
    /// holds for the host in a target of absolute form. That there are not two has been seen to when the head was read.
    pub fn host_fault(&self) -> Option<&'static str> {
        let authority = self.lines.get(self.authority);
        match self.lines.first(Known::Host) {
            None if self.version == Version::Http11 => Some("the request has no Host header"),
            Some(host) if !is_host(host) => Some("the Host header is not a host, with or without a port"),
            // Without an authority the target is in another form, in which it has no host.
            _ if !authority.is_empty() && (!is_host(authority) || authority.starts_with(b":")) => {
                Some("the host in the request target is not one")
            }
            _ => None,
        }
    }

    /// The client wants the connection to go on after this exchange.
    pub fn wants_keep_alive(&self) -> bool {
        match self.version {
            Version::Http11 => !self.lines.lists(Known::Connection, "close"),
            Version::Http10 => self.lines.lists(Known::Connection, "keep-alive"),
        }
    }

    /// The client waits to be told that its body is wanted (RFC 9110, 10.1.1).
    pub fn expects_continue(&self) -> bool {
        self.version == Version::Http11
            && self.lines.first(Known::Expect).is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue"))
    }

    /// The client asks to go on with WebSocket on this connection (RFC 9110, 7.8; RFC 6455, 4.1), and with nothing else:
    /// a backend that is offered several protocols may choose one in which paths are not looked at any more.
    pub fn asks_for_websocket(&self) -> bool {
        self.version == Version::Http11
            && self.framing == Framing::Empty
            && self.lines.lists_only(Known::Upgrade, "websocket")
            && self.lines.lists(Known::Connection, "upgrade")
    }
}

/// Splits an absolute-form target (RFC 9112, 3.2.2) into its authority and the rest; every other form is all rest. `None`
/// if there is no authority where there must be one.
fn split_target(target: &str) -> Option<(&str, &str)> {
    let scheme = |prefix: &str| target.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix));
    let after = match () {
        () if scheme("http://") => &target[7..],
        () if scheme("https://") => &target[8..],
        () => return Some(("", target)),
    };
    let (authority, rest) = match after.find(['/', '?']) {
        Some(at) if after.as_bytes()[at] == b'/' => after.split_at(at),
        // No path: the root. A query without a path is nothing that engines serve.
        _ => (after, ""),
    };
    // Without a host it is to be refused (RFC 9110, 4.2.1).
    (!authority.is_empty()).then_some((authority, rest))
}

// === impl ResponseHead ===

impl ResponseHead {
    /// Reads a whole head, as [`HeadEnd`] found it.
    ///
    /// # Errors
    /// It is not one, or one that two readers could read in two ways.
    pub fn read(bytes: &[u8]) -> Result<ResponseHead, HeadError> {
        let mut headers = [MaybeUninit::uninit(); LINES_MAX];
        let mut parsed = httparse::Response::new(&mut []);
        match httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, bytes, &mut headers) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return Err(HeadError::Malformed("the head is cut off")),
            Err(error) => return Err(grammar(error)),
        }
        let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or(HeadError::Malformed("the status is not one"))?;
        let reason = Lines::span_of(bytes, parsed.reason.unwrap_or_default().as_bytes());
        let mut lines = Lines::default();
        lines.fill(bytes, parsed.headers);
        lines.check_named()?;
        let framing = match (lines.is_chunked()?, lines.content_length()?) {
            (true, _) => Framing::Chunked,
            (false, Some(0)) => Framing::Empty,
            (false, Some(length)) => Framing::Length(length),
            (false, None) => Framing::Close,
        };
        let reusable = parsed.version == Some(1) && !lines.lists(Known::Connection, "close");
        Ok(ResponseHead { lines, status, framing, reusable, reason })
    }

    /// The words behind the status, as the backend chose them.
    pub fn reason(&self) -> &[u8] {
        self.lines.get(self.reason)
    }

    /// Its body is a stream of parts, each of which means something as soon as it has come: events, or lines of JSON.
    pub fn is_stream_of_parts(&self) -> bool {
        const KINDS: [&[u8]; 13] = [
            b"application/json-seq",
            b"application/jsonl",
            b"application/jsonlines",
            b"application/json-lines",
            b"application/ndjson",
            b"application/stream+json",
            b"application/x-json-stream",
            b"application/x-jsonl",
            b"application/x-jsonlines",
            b"application/x-ndjson",
            b"application/x-ndjson-stream",
            b"text/jsonl",
            b"text/x-ndjson",
        ];
        let Some(kind) = self.lines.first(Known::ContentType) else { return false };
        // What most answers are needs no comparing with a list.
        if kind == b"application/json" {
            return false;
        }
        let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        // Structured names of the same thing: `application/geo+json-seq` (RFC 8091).
        let is_sequence = kind.len() > 9 && kind[kind.len() - 9..].eq_ignore_ascii_case(b"+json-seq");
        self.is_event_stream() || is_sequence || KINDS.iter().any(|known| kind.eq_ignore_ascii_case(known))
    }

    /// It is a stream of server-sent events.
    pub fn is_event_stream(&self) -> bool {
        const EVENT_STREAM: &[u8] = b"text/event-stream";
        let kind = self.lines.first(Known::ContentType).and_then(|value| value.get(..EVENT_STREAM.len()));
        kind.is_some_and(|kind| kind.eq_ignore_ascii_case(EVENT_STREAM))
    }
}

fn grammar(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::TooManyHeaders => HeadError::TooManyLines,
        httparse::Error::Version => HeadError::Version,
        httparse::Error::HeaderName => HeadError::Malformed("a header name holds a character that it must not"),
        httparse::Error::HeaderValue => HeadError::Malformed("a header value holds a character that it must not"),
        httparse::Error::NewLine => HeadError::Malformed("a line does not end where it should"),
        httparse::Error::Status => HeadError::Malformed("the status line is none"),
        httparse::Error::Token => HeadError::Malformed("the first line is not that of an HTTP message"),
    }
}

#[cfg(test)]
mod tests;
