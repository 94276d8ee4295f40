//! HTTP/1.1 as the strictest of servers reads it (RFC 9112). What it accepts beyond that says why.

#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    /// As a backend gets it: without scheme, host and fragment.
    pub(super) target: String,
    pub(super) body: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Nothing is left over.
    Clean,
    /// What is left over is the begin of something.
    Incomplete,
    /// What is left over is nothing, for this reason.
    Broken(&'static str),
}

#[derive(Debug)]
pub(super) struct Reading {
    pub(super) requests: Vec<Request>,
    /// One whose head is in order, and whose body is not, or not yet: as far as it goes.
    pub(super) begun: Option<Request>,
    pub(super) ending: Ending,
    /// What is left over asks, or seems to ask, for a head only.
    pub(super) rest_is_head: bool,
}

enum Framing {
    Length(u64),
    Chunked,
}

/// Why reading stops: nothing more is there, or something wrong is.
enum Stop {
    Short,
    Wrong(&'static str),
}

/// A name, and a value without the blanks around it.
type Field<'b> = (&'b [u8], &'b [u8]);

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
}

pub(super) fn read(bytes: &[u8]) -> Reading {
    let mut reader = Reader { bytes, at: 0 };
    let mut reading = Reading { requests: Vec::new(), begun: None, ending: Ending::Clean, rest_is_head: false };
    loop {
        // Empty lines before a request are passed over (RFC 9112, 2.2).
        while reader.bytes[reader.at..].starts_with(b"\r\n") {
            reader.at += 2;
        }
        if reader.at == bytes.len() {
            return reading;
        }
        reading.rest_is_head = bytes[reader.at..].starts_with(b"HEAD ");
        let stop = match reader.head() {
            Ok((mut request, framing, closes)) => match reader.body(framing, &mut request.body) {
                Ok(()) => {
                    reading.requests.push(request);
                    if closes {
                        return reading;
                    }
                    continue;
                }
                Err(stop) => {
                    reading.begun = Some(request);
                    stop
                }
            },
            Err(stop) => stop,
        };
        reading.ending = match stop {
            Stop::Short => Ending::Incomplete,
            Stop::Wrong(why) => Ending::Broken(why),
        };
        return reading;
    }
}

fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

fn trimmed(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

// === impl Reader ===

impl<'b> Reader<'b> {
    /// A line, without its end.
    fn line(&mut self) -> Result<&'b [u8], Stop> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|b| *b == b'\n').ok_or(Stop::Short)?;
        let line = rest[..end].strip_suffix(b"\r").ok_or(Stop::Wrong("LF alone"))?;
        if line.iter().any(|b| matches!(b, b'\r' | b'\0')) {
            return Err(Stop::Wrong("CR or NUL in a line"));
        }
        self.at += end + 1;
        Ok(line)
    }

    fn head(&mut self) -> Result<(Request, Framing, bool), Stop> {
        // All of it must be there before any of it counts, as for those who wait for the empty line.
        let line = self.line()?;
        let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let [method, target, version] = words[..] else { return Err(Stop::Wrong("start line")) };
        let [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'0'..=b'9'] = version else {
            return Err(Stop::Wrong("version"));
        };
        let old = *minor == b'0';
        if !is_token(method) || target.is_empty() || target.iter().any(|b| *b <= b' ' || *b == 0x7f) {
            return Err(Stop::Wrong("method or target"));
        }
        if method == b"CONNECT" {
            return Err(Stop::Wrong("CONNECT"));
        }
        let (mut length, mut chunked, mut closes) = (None, false, old);
        while let Some((name, value)) = self.field()? {
            match name.to_ascii_lowercase().as_slice() {
                b"content-length" => {
                    // A list of one number again and again may be taken for that number (RFC 9110, 8.6).
                    for number in value.split(|b| *b == b',') {
                        let number = trimmed(number);
                        if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
                            return Err(Stop::Wrong("length"));
                        }
                        let text = std::str::from_utf8(number).unwrap_or_default();
                        let number: u64 = text.parse().map_err(|_| Stop::Wrong("length"))?;
                        if length.is_some_and(|other| other != number) {
                            return Err(Stop::Wrong("two lengths"));
                        }
                        length = Some(number);
                    }
                }
                b"transfer-encoding" if chunked => return Err(Stop::Wrong("two transfer encodings")),
                b"transfer-encoding" if !value.eq_ignore_ascii_case(b"chunked") => {
                    return Err(Stop::Wrong("transfer encoding"));
                }
                b"transfer-encoding" => chunked = true,
                b"connection" => {
                    for option in value.split(|b| *b == b',') {
                        closes |= trimmed(option).eq_ignore_ascii_case(b"close");
                        closes &= !(old && trimmed(option).eq_ignore_ascii_case(b"keep-alive"));
                    }
                }
                _ => {}
            }
        }
        let framing = match (length, chunked) {
            (Some(_), true) => return Err(Stop::Wrong("length and transfer encoding")),
            (None, true) if old => return Err(Stop::Wrong("chunks in HTTP/1.0")),
            (None, true) => Framing::Chunked,
            (length, false) => Framing::Length(length.unwrap_or(0)),
        };
        let text = String::from_utf8_lossy(target).into_owned();
        let target = match text.split_once("://") {
            Some((_, rest)) if !text.starts_with('/') => {
                rest.find(['/', '?']).map_or_else(|| "/".to_owned(), |at| rest[at..].to_owned())
            }
            _ => text,
        };
        let target = target.split('#').next().unwrap_or_default().to_owned();
        let method = String::from_utf8_lossy(method).into_owned();
        Ok((Request { method, target, body: Vec::new() }, framing, closes))
    }

    /// A field of a head or of trailers; none at the empty line.
    fn field(&mut self) -> Result<Option<Field<'b>>, Stop> {
        let line = self.line()?;
        if line.is_empty() {
            return Ok(None);
        }
        let colon = line.iter().position(|b| *b == b':').ok_or(Stop::Wrong("no colon"))?;
        if !is_token(&line[..colon]) {
            return Err(Stop::Wrong("name"));
        }
        Ok(Some((&line[..colon], trimmed(&line[colon + 1..]))))
    }

    fn body(&mut self, framing: Framing, body: &mut Vec<u8>) -> Result<(), Stop> {
        match framing {
            Framing::Length(length) => self.take(length, body),
            Framing::Chunked => loop {
                let line = self.line()?;
                let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
                // Blanks before an extension, or in place of one, are bad and change nothing (RFC 9112, 7.1.1).
                let rest = trimmed(&line[digits..]);
                if !rest.is_empty() && !rest.starts_with(b";") {
                    return Err(Stop::Wrong("chunk size"));
                }
                let text = std::str::from_utf8(&line[..digits]).unwrap_or_default();
                let size = u64::from_str_radix(text, 16).map_err(|_| Stop::Wrong("chunk size"))?;
                if size == 0 {
                    while self.field()?.is_some() {}
                    return Ok(());
                }
                self.take(size, body)?;
                match self.bytes.get(self.at..self.at + 2) {
                    Some(b"\r\n") => self.at += 2,
                    None if b"\r\n".starts_with(&self.bytes[self.at..]) => return Err(Stop::Short),
                    _ => return Err(Stop::Wrong("chunk end")),
                }
            },
        }
    }

    fn take(&mut self, length: u64, body: &mut Vec<u8>) -> Result<(), Stop> {
        let rest = &self.bytes[self.at..];
        let n = rest.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        body.extend_from_slice(&rest[..n]);
        self.at += n;
        if n as u64 == length { Ok(()) } else { Err(Stop::Short) }
    }
}

#[test]
fn it_reads_what_is_sound_and_nothing_else() {
    let check = |wire: &str, bodies: &[&str], ending: Ending| {
        let reading = read(wire.as_bytes());
        let found: Vec<String> =
            reading.requests.iter().map(|request| String::from_utf8_lossy(&request.body).into_owned()).collect();
        assert_eq!((found, reading.ending), (bodies.iter().map(|s| (*s).to_owned()).collect(), ending), "{wire:?}");
    };
    let get = "GET /a HTTP/1.1\r\nhost: h\r\n\r\n";
    let two = "POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\nab";
    let chunks = "POST /a HTTP/1.1\r\ntransfer-encoding:\tChunked\r\n\r\n1 ;x\r\na\r\n01\r\nb\r\n0\r\nt: 1\r\n\r\n";
    check(&[get, two, chunks, "\r\n", get].concat(), &["", "ab", "ab", ""], Ending::Clean);
    for wire in [two, chunks] {
        for cut in 1..wire.len() {
            check(&wire[..cut], &[], Ending::Incomplete);
        }
    }
    check("GET / HTTP/1.1\r\nconnection: x, Close\r\n\r\nGET", &[""], Ending::Clean);
    check("GET / HTTP/1.0\r\n\r\nGET", &[""], Ending::Clean);
    check("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\nGET", &[""], Ending::Incomplete);
    check("GET / HTTP/1.1\n\n", &[], Ending::Broken("LF alone"));
    check("GET / HTTP/1.1\r\n a: b\r\n\r\n", &[], Ending::Broken("name"));
    check("GET / HTTP/1.1\r\na : b\r\n\r\n", &[], Ending::Broken("name"));
    check(&two.replace("2\r\n", "2\r\ncontent-length: 3\r\n"), &[], Ending::Broken("two lengths"));
    check(&two.replace("2\r\n", "2\r\ncontent-length: 2, 02\r\n"), &["ab"], Ending::Clean);
    check(
        &chunks.replace("\r\n\r\n1", "\r\ncontent-length: 2\r\n\r\n1"),
        &[],
        Ending::Broken("length and transfer encoding"),
    );
    check(&chunks.replace("HTTP/1.1", "HTTP/1.0"), &[], Ending::Broken("chunks in HTTP/1.0"));
    check(&chunks.replace("1 ;x", "+1"), &[], Ending::Broken("chunk size"));
    check(&chunks.replace("a\r\n01", "ab\r\n01"), &[], Ending::Broken("chunk end"));
    let absolute = read(b"GET http://h:1/a?b#c HTTP/1.1\r\n\r\n");
    assert_eq!(absolute.requests[0].target, "/a?b");
}
