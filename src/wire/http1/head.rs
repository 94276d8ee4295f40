//! Heads of requests and answers: header lines as they came, with what decides where the body ends.

use std::mem::MaybeUninit;

use http::{Method, StatusCode};
use memchr::memchr;

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

/// Headers that the proxy looks at; recognised once, while a head is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each is the header of the same name
pub enum Known {
    AllowOrigin,
    AnthropicVersion,
    Connection,
    ContentEncoding,
    ContentLength,
    ContentType,
    Cookie,
    Date,
    Expect,
    Host,
    KeepAlive,
    Origin,
    ProxyConnection,
    RetryAfter,
    Te,
    TraceParent,
    TraceState,
    TransferEncoding,
    Upgrade,
    XAccelBuffering,
    XForwardedFor,
    XForwardedHost,
    XForwardedProto,
    XRequestId,
    /// Any other one.
    Other,
}

impl Known {
    fn of(name: &[u8]) -> Known {
        // The length leaves at most four names to compare with.
        match name.len() {
            2 => one_of(name, [(b"te", Known::Te)]),
            4 => one_of(name, [(b"date", Known::Date), (b"host", Known::Host)]),
            6 => one_of(name, [(b"expect", Known::Expect), (b"origin", Known::Origin), (b"cookie", Known::Cookie)]),
            7 => one_of(name, [(b"upgrade", Known::Upgrade)]),
            10 => one_of(
                name,
                [
                    (b"connection", Known::Connection),
                    (b"keep-alive", Known::KeepAlive),
                    (b"tracestate", Known::TraceState),
                ],
            ),
            11 => one_of(name, [(b"retry-after", Known::RetryAfter), (b"traceparent", Known::TraceParent)]),
            12 => one_of(name, [(b"content-type", Known::ContentType), (b"x-request-id", Known::XRequestId)]),
            14 => one_of(name, [(b"content-length", Known::ContentLength)]),
            15 => one_of(name, [(b"x-forwarded-for", Known::XForwardedFor)]),
            16 => one_of(
                name,
                [
                    (b"content-encoding", Known::ContentEncoding),
                    (b"x-forwarded-host", Known::XForwardedHost),
                    (b"proxy-connection", Known::ProxyConnection),
                ],
            ),
            17 => one_of(
                name,
                [
                    (b"transfer-encoding", Known::TransferEncoding),
                    (b"x-forwarded-proto", Known::XForwardedProto),
                    (b"anthropic-version", Known::AnthropicVersion),
                    (b"x-accel-buffering", Known::XAccelBuffering),
                ],
            ),
            27 => one_of(name, [(b"access-control-allow-origin", Known::AllowOrigin)]),
            _ => Known::Other,
        }
    }

    /// Belongs to one connection (RFC 9110, 7.6.1), as does what `Connection` names. `Trailer` does not.
    pub fn is_hop_by_hop(self) -> bool {
        matches!(
            self,
            Known::Connection
                | Known::KeepAlive
                | Known::ProxyConnection
                | Known::Te
                | Known::TransferEncoding
                | Known::Upgrade
        )
    }

    /// Says where the body ends, how it is to be read, or on whose behalf: never ends at a connection.
    fn is_for_every_reader(self) -> bool {
        matches!(
            self,
            Known::ContentEncoding
                | Known::ContentLength
                | Known::ContentType
                | Known::Host
                | Known::XForwardedFor
                | Known::XForwardedHost
                | Known::XForwardedProto
                | Known::XRequestId
        )
    }
}

/// Which of the candidates a name is, in any case.
fn one_of<const LENGTH: usize, const COUNT: usize>(name: &[u8], candidates: [(&[u8; LENGTH], Known); COUNT]) -> Known {
    let Ok(name) = <&[u8; LENGTH]>::try_from(name) else { return Known::Other };
    for (candidate, known) in candidates {
        // The cases of a letter differ in this bit. No character that a name may hold differs from `-` in it alone.
        let differences = std::iter::zip(name, candidate).fold(0, |all, (byte, known)| all | ((byte | 0x20) ^ known));
        if differences == 0 {
            return known;
        }
    }
    Known::Other
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

    /// The whole head, as it came.
    pub fn raw(&self) -> &[u8] {
        &self.bytes
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
    /// whoever is offered several protocols may choose one in which nobody looks at paths any more.
    pub fn asks_for_websocket(&self) -> bool {
        self.version == Version::Http11
            && self.framing == Framing::Empty
            && self.lines.lists_only(Known::Upgrade, "websocket")
            && self.lines.lists(Known::Connection, "upgrade")
    }
}

/// Whether this is a host with or without a port, as `Host` holds it (RFC 3986, 3.2.2 and 3.2.3). An empty one is: the
/// client does not know which host it asks.
fn is_host(value: &[u8]) -> bool {
    let (host, port) = match value {
        [b'[', rest @ ..] => {
            let Some(end) = memchr(b']', rest) else { return false };
            if !is_ip_literal(&rest[..end]) {
                return false;
            }
            (&[][..], &rest[end + 1..])
        }
        // Names are short, so that a plain loop is faster than a search made for long texts.
        _ => {
            let plain = value.iter().position(|&byte| !NAME_BYTES[usize::from(byte)]).unwrap_or(value.len());
            let (name, rest) = value.split_at(plain);
            match rest {
                [] | [b':', ..] => (&[][..], rest),
                // An escape, or what is wrong.
                _ => {
                    let end = rest.iter().position(|&byte| byte == b':').unwrap_or(rest.len());
                    (&value[name.len()..name.len() + end], &rest[end..])
                }
            }
        }
    };
    let is_port = match port {
        [] => true,
        [b':', digits @ ..] => {
            digits.iter().all(u8::is_ascii_digit)
                && digits.iter().fold(0u32, |port, digit| (port * 10 + u32::from(digit - b'0')).min(1 << 16)) < 1 << 16
        }
        _ => false,
    };
    is_port && is_registered_name(host)
}

/// Bytes that stand for themselves in a registered name (RFC 3986, 3.2.2).
const NAME_BYTES: [bool; 256] = {
    let mut names = [false; 256];
    let mut byte = 0;
    while byte < names.len() {
        let plain = b"-._~!$&'()*+,;=";
        let mut at = 0;
        while at < plain.len() {
            names[plain[at] as usize] = true;
            at += 1;
        }
        names[byte] |= (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    names
};

fn is_registered_name(name: &[u8]) -> bool {
    let mut rest = name;
    while let Some(at) = rest.iter().position(|&byte| !NAME_BYTES[usize::from(byte)]) {
        rest = match &rest[at..] {
            [b'%', high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => after,
            _ => return false,
        };
    }
    true
}

/// What stands between the brackets of a host: an IPv6 address, perhaps with its zone (RFC 6874), or one of the future.
fn is_ip_literal(inner: &[u8]) -> bool {
    if let [b'v' | b'V', version @ ..] = inner {
        let Some(dot) = memchr(b'.', version) else { return false };
        let address = &version[dot + 1..];
        return dot > 0
            && version[..dot].iter().all(u8::is_ascii_hexdigit)
            && !address.is_empty()
            && address.split(|byte| *byte == b':').all(|part| !part.contains(&b'%') && is_registered_name(part));
    }
    let (address, zone) = inner.split_at(memchr(b'%', inner).unwrap_or(inner.len()));
    let is_zone = zone.is_empty() || zone.len() > 1 && zone[1..].iter().all(u8::is_ascii_graphic);
    is_zone && std::str::from_utf8(address).is_ok_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok())
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
mod tests {
    use super::*;

    #[test]
    fn names_are_known_in_any_case_and_no_others_are() {
        let names = [
            "te",
            "date",
            "host",
            "expect",
            "origin",
            "cookie",
            "upgrade",
            "connection",
            "keep-alive",
            "tracestate",
            "retry-after",
            "traceparent",
            "content-type",
            "x-request-id",
            "content-length",
            "x-forwarded-for",
            "content-encoding",
            "x-forwarded-host",
            "proxy-connection",
            "transfer-encoding",
            "x-forwarded-proto",
            "anthropic-version",
            "x-accel-buffering",
            "access-control-allow-origin",
        ];
        for name in names {
            let known = Known::of(name.as_bytes());
            assert_ne!(known, Known::Other, "{name}");
            assert_eq!(Known::of(name.to_ascii_uppercase().as_bytes()), known, "{name}");
            for at in 0..name.len() {
                for byte in (0..=u8::MAX).filter(|byte| may_be_in_a_name(*byte)) {
                    let mut other = name.as_bytes().to_vec();
                    other[at] = byte;
                    let is_same = other.eq_ignore_ascii_case(name.as_bytes());
                    assert_eq!(Known::of(&other) == known, is_same, "{}", other.escape_ascii());
                }
                assert_ne!(Known::of(&name.as_bytes()[..at]), known, "{name}");
            }
        }
    }

    /// RFC 9110, 5.6.2.
    fn may_be_in_a_name(byte: u8) -> bool {
        byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
    }
    use proptest::prelude::*;

    fn request(text: &str) -> Result<RequestHead, HeadError> {
        let mut head = RequestHead::default();
        assert_eq!(HeadEnd::default().find(text.as_bytes())?, Some(text.len()), "{text:?}");
        head.read(text.as_bytes()).map(|()| head)
    }

    fn response(text: &str) -> Result<ResponseHead, HeadError> {
        ResponseHead::read(text.as_bytes())
    }

    #[test]
    fn the_end_is_found_under_every_split() {
        let text = b"\r\nGET / HTTP/1.1\r\nA: b\r\n\r\nGET /next";
        for step in 1..text.len() {
            let mut end = HeadEnd::default();
            let found = (1..=text.len())
                .filter(|n| n % step == 0 || *n == text.len())
                .find_map(|n| end.find(&text[..n]).unwrap());
            assert_eq!(found, Some(26), "pieces of {step}");
        }
    }

    #[test]
    fn heads_that_never_end_are_refused() {
        let mut end = HeadEnd::default();
        assert_eq!(end.find(&vec![b'x'; HEAD_BYTES_MAX]), Ok(None));
        assert_eq!(end.find(&vec![b'x'; HEAD_BYTES_MAX + 1]), Err(HeadError::TooLarge));
        let lines = b"x: y\r\n".repeat(HEAD_BYTES_MAX / 6 + 1);
        assert_eq!(HeadEnd::default().find(&lines), Err(HeadError::TooLarge));
        for bare in ["GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\r\nHost: a\n\r\n", "\n"] {
            assert!(matches!(HeadEnd::default().find(bare.as_bytes()), Err(HeadError::Malformed(_))), "{bare:?}");
        }
    }

    #[test]
    fn requests_are_read() {
        let head = request("POST /v1/x?y=1 HTTP/1.1\r\nHost: a\r\nX-Kept:  é \r\nContent-Length: 5\r\nx-kept:\r\n\r\n")
            .unwrap();
        assert_eq!(
            (head.method.as_str(), head.target(), head.path(), head.query()),
            ("POST", "/v1/x?y=1", "/v1/x", Some("y=1"))
        );
        assert_eq!((head.version, head.framing), (Version::Http11, Framing::Length(5)));
        let lines: Vec<_> = head.lines.iter().map(|header| (header.name, header.value)).collect();
        let expect: [(&[u8], &[u8]); 4] =
            [(b"Host", b"a"), (b"X-Kept", "é".as_bytes()), (b"Content-Length", b"5"), (b"x-kept", b"")];
        assert_eq!(lines, expect);
        assert_eq!(head.lines.named("x-kept"), Some("é".as_bytes()));
        assert!(head.wants_keep_alive());
    }

    #[test]
    fn targets_of_every_form() {
        for (target, path, host) in [
            ("/v1/x", "/v1/x", "h"),
            ("http://front.test/v1/x?y", "/v1/x?y", "front.test"),
            ("HTTP://front.test:80", "/", "front.test:80"),
            ("https://front.test?y", "/", "front.test?y"),
            ("*", "*", "h"),
            ("front.test:80", "front.test:80", "h"),
        ] {
            let head = request(&format!("OPTIONS {target} HTTP/1.1\r\nHost: h\r\n\r\n")).unwrap();
            assert_eq!((head.target(), head.host()), (path, Some(host.as_bytes())), "{target}");
        }
        assert!(request("CONNECT front.test:443 HTTP/1.1\r\n\r\n").is_err());
        for target in ["/a b", "/a#b", "/\u{e9}", "/a\u{7f}"] {
            assert!(request(&format!("GET {target} HTTP/1.1\r\n\r\n")).is_err(), "{target:?}");
        }
    }

    #[test]
    fn framing_that_two_readers_could_read_in_two_ways_is_refused() {
        let framing =
            |lines: &str, version: &str| request(&format!("POST / {version}\r\n{lines}\r\n")).map(|head| head.framing);
        for (lines, expect) in [
            ("", Framing::Empty),
            ("Content-Length: 0\r\n", Framing::Empty),
            ("Content-Length: 7\r\ncontent-length: 7\r\n", Framing::Length(7)),
            ("Transfer-Encoding: CHUNKED\r\n", Framing::Chunked),
        ] {
            assert_eq!(framing(lines, "HTTP/1.1"), Ok(expect), "{lines:?}");
        }
        for lines in [
            "Content-Length: 7\r\nTransfer-Encoding: chunked\r\n",
            "transfer-encoding: chunked\r\ncontent-length: 0\r\n",
            "Content-Length: 7\r\nContent-Length: 8\r\n",
            "Content-Length: 7, 7\r\n",
            "Content-Length: +7\r\n",
            "Content-Length: -7\r\n",
            "Content-Length: 0x7\r\n",
            "Content-Length: 7 7\r\n",
            "Content-Length:\r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Content-Length : 7\r\n",
            "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: chunked, identity\r\n",
            "Transfer-Encoding: gzip, chunked\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: \x0bchunked\r\n",
            "Transfer-Encoding:\r\n",
            "Host: a\r\nHost: a\r\n",
            &format!("Connection: {}close\r\n", "x, ".repeat(NAMED_MAX)),
            &"Connection: x\r\n".repeat(NAMED_MAX + 1),
            "X: a\r\n folded\r\n",
            "X: a\0b\r\n",
            "X: a\rb\r\n",
            ": b\r\n",
        ] {
            assert!(framing(lines, "HTTP/1.1").is_err(), "{lines:?}");
        }
        assert!(framing("Transfer-Encoding: chunked\r\n", "HTTP/1.0").is_err());
        assert_eq!(framing("", "HTTP/2.0"), Err(HeadError::Version));
        assert_eq!(framing(&"a: b\r\n".repeat(LINES_MAX + 1), "HTTP/1.1"), Err(HeadError::TooManyLines));
    }

    #[test]
    fn what_a_connection_is_for() {
        let head = |version: &str, lines: &str| request(&format!("GET / {version}\r\n{lines}\r\n")).unwrap();
        for (version, lines, keeps) in [
            ("HTTP/1.1", "", true),
            ("HTTP/1.1", "Connection: x, Close\r\n", false),
            ("HTTP/1.0", "", false),
            ("HTTP/1.0", "Connection: Keep-Alive\r\n", true),
        ] {
            assert_eq!(head(version, lines).wants_keep_alive(), keeps, "{version} {lines:?}");
        }
        let upgrade = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n";
        assert!(head("HTTP/1.1", upgrade).asks_for_websocket());
        assert!(!head("HTTP/1.0", upgrade).asks_for_websocket());
        assert!(!head("HTTP/1.1", "Upgrade: websocket\r\n").asks_for_websocket());
        assert!(!head("HTTP/1.1", "Connection: upgrade\r\nUpgrade: h2c\r\n").asks_for_websocket());
        let named = head(
            "HTTP/1.1",
            "Connection: X-Hop, host, content-length, content-type, x-forwarded-for\r\nx-hop: 1\r\nHost: a\r\ny: 1\r\n\
             Content-Type: b\r\nX-Forwarded-For: c\r\n",
        );
        let gone: Vec<_> =
            named.lines.iter().filter(|h| named.lines.is_named_by_connection(h)).map(|h| h.name).collect();
        assert_eq!(gone, [&b"x-hop"[..]]);
        assert!(head("HTTP/1.1", "Expect: 100-Continue\r\n").expects_continue());
        assert!(!head("HTTP/1.0", "Expect: 100-continue\r\n").expects_continue());
    }

    #[test]
    fn a_host_is_one_or_is_missed() {
        let fault = |line: &str, host: &str| request(&format!("GET {line}\r\n{host}\r\n")).unwrap().host_fault();
        for host in [
            "",
            "a",
            "api.example:8080",
            "API_1.example.:",
            "192.0.2.1:80",
            "[::1]",
            "[2001:DB8::1]:443",
            "[fe80::1%25eth0]:80",
            "[v1.x:y]",
            "%41.example",
            "a~!$&'()*+,;=",
            "a:65535",
        ] {
            assert_eq!(fault("/ HTTP/1.1", &format!("Host: {host}\r\n")), None, "{host:?}");
            if !host.is_empty() {
                assert_eq!(fault(&format!("http://{host}/ HTTP/1.1"), "Host:\r\n"), None, "{host:?}");
            }
        }
        for host in [
            "a b",
            "a, b",
            "a/b",
            "a?b",
            "a#b",
            "user@a",
            "user:1@a",
            "http://a",
            "a:b",
            "a:80:80",
            "a:65536",
            "a:99999999999999999999",
            "a:-1",
            "a:+80",
            "a:0x50",
            "[::1",
            "[::1]a",
            "[]",
            "[1.2.3.4]",
            "[::g]",
            "[v.x]",
            "[v1.]",
            "::1",
            "a%4",
            "a%zz",
            "a\\b",
            "a\"b",
            "a<b>",
            "caf\u{e9}.example",
        ] {
            for version in ["HTTP/1.1", "HTTP/1.0"] {
                assert!(fault(&format!("/ {version}"), &format!("Host: {host}\r\n")).is_some(), "{version} {host:?}");
            }
            if host.bytes().all(|byte| byte.is_ascii_graphic() && !b"/?#".contains(&byte)) {
                assert!(fault(&format!("http://{host}/ HTTP/1.1"), "Host: a\r\n").is_some(), "{host:?}");
            }
        }
        assert!(fault("/ HTTP/1.1", "").is_some() && fault("http://a/ HTTP/1.1", "").is_some());
        assert!(fault("http://:80/ HTTP/1.1", "Host: a\r\n").is_some());
        assert_eq!(fault("/ HTTP/1.0", ""), None);
        for target in ["http:///v1/x", "https://", "HTTP:///"] {
            assert!(request(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")).is_err(), "{target}");
        }
    }

    #[test]
    fn answers_are_read() {
        let head = response(
            "HTTP/1.1 418 I'm a teapot\r\nContent-Type: Text/Event-Stream; x\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        .unwrap();
        assert_eq!((head.status.as_u16(), head.reason(), head.framing), (418, &b"I'm a teapot"[..], Framing::Chunked));
        assert!(head.is_event_stream() && head.reusable);
        for (text, framing, reusable) in [
            ("HTTP/1.1 200\r\n\r\n", Framing::Close, true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", Framing::Empty, true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n", Framing::Length(5), false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n", Framing::Length(5), false),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", Framing::Chunked, true),
        ] {
            let head = response(text).unwrap();
            assert_eq!((head.framing, head.reusable), (framing, reusable), "{text:?}");
        }
        for text in [
            "SSH-2.0-OpenSSH_9.6\r\n\r\n",
            "HTTP/1.1 2xx\r\n\r\n",
            "HTTP/1.1 99 Low\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        ] {
            assert!(response(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_head_makes_trouble(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = HeadEnd::default().find(&bytes);
            let _ = RequestHead::default().read(&bytes);
            let _ = ResponseHead::read(&bytes);
        }

        #[test]
        fn no_lines_make_trouble(lines in "([A-Za-z-]{1,10}:[ -~]{0,20}\r\n){0,9}") {
            let _ = request(&format!("GET / HTTP/1.1\r\n{lines}\r\n"));
            let _ = response(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n"));
        }
    }
}
