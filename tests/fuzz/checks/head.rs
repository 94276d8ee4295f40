//! Heads of requests and answers, from the bytes that come to the bytes that go, against a plain reading of both.

use http::{Method, StatusCode};
use inference_proxy::{
    base::error::Dialect,
    data::proxy::{
        cors::CrossOrigin,
        headers::{Common, Delivery, Persistence, ToBackend, ToClient, push_interim, push_request, push_response},
    },
    wire::http1::{
        body::Framing,
        head::{HEAD_BYTES_MAX, HeadEnd, HeadError, Header, RequestHead, ResponseHead, Version},
        own_address::{Concealed, OwnAddress},
    },
};

use super::arrivals;

/// Checks what begins with the head of a request or of an answer.
pub fn check(input: &[u8]) {
    if let Some(length) = end(input) {
        check_request(&input[..length]);
        check_response(&input[..length]);
    }
}

/// Headers that belong to one connection (RFC 9110, 7.6.1), those of bygone proxies among them.
const HOP_BY_HOP: [&str; 6] = ["connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];
/// Headers that a sender cannot have taken away by naming them in `Connection`: they decide where a body ends, how it is
/// read, and who is told of the client.
const NOT_TO_BE_NAMED: [&str; 8] = [
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-request-id",
];

/// Where the head ends.
fn end(input: &[u8]) -> Option<usize> {
    let found = HeadEnd::default().find(input);
    for pieces in arrivals(input) {
        let (mut end, mut come) = (HeadEnd::default(), 0);
        let mut found_so = Ok(None);
        for piece in pieces {
            come += piece.len();
            found_so = end.find(&input[..come]);
            if found_so != Ok(None) {
                break;
            }
        }
        // Where there is more than one thing wrong, it depends on the cuts which of them is noticed first.
        let both_wrong = input.len() > HEAD_BYTES_MAX && found_so.is_err() && found.is_err();
        assert!(found_so == found || both_wrong, "cut, it is {found_so:?}; whole, {found:?}");
    }
    // Plainly: lines that end in CR LF, up to the first empty one behind one that is not.
    let mut lines = input.split_inclusive(|byte| *byte == b'\n').take_while(|line| line.ends_with(b"\n"));
    let (mut length, mut begun) = (0, false);
    let plainly = loop {
        let Some(line) = lines.next() else { break Ok(None) };
        length += line.len();
        match line {
            [b'\r', b'\n'] if begun => break Ok(Some(length)),
            [b'\r', b'\n'] => {}
            [.., b'\r', b'\n'] => begun = true,
            _ => break Err(()),
        }
    };
    match found {
        Err(HeadError::TooLarge) => assert!(input.len() > HEAD_BYTES_MAX, "it is not too large"),
        found => assert_eq!(found.map_err(|_| ()), plainly),
    }
    found.ok().flatten()
}

/// A head taken apart at its line ends and first colons.
#[derive(Debug, PartialEq, Eq)]
struct Plain<'h> {
    first: &'h [u8],
    lines: Vec<(&'h str, &'h [u8])>,
}

impl<'h> Plain<'h> {
    fn of(head: &'h [u8]) -> Plain<'h> {
        let mut rest = head;
        while let Some(behind) = rest.strip_prefix(b"\r\n") {
            rest = behind;
        }
        let mut lines = Vec::new();
        while !rest.is_empty() {
            let end = rest.windows(2).position(|window| window == b"\r\n").expect("a head must end in a line end");
            let (line, behind) = (&rest[..end], &rest[end + 2..]);
            assert!(!line.iter().any(|byte| b"\r\n\0".contains(byte)), "within a line: {}", line.escape_ascii());
            lines.push(line);
            rest = behind;
        }
        assert_eq!(lines.pop(), Some(&b""[..]), "a head must end in an empty line");
        assert!(lines.iter().all(|line| !line.is_empty()), "there must be one empty line");
        let mut lines = lines.into_iter();
        let first = lines.next().expect("a head must have a first line");
        let lines = lines.map(|line| {
            let colon = line.iter().position(|byte| *byte == b':').expect("a header line must have a colon");
            let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
            let start =
                line[colon + 1..].iter().position(|byte| !is_blank(byte)).map_or(line.len(), |at| colon + 1 + at);
            let end = line.iter().rposition(|byte| !is_blank(byte)).map_or(start, |at| at + 1).max(start);
            (std::str::from_utf8(&line[..colon]).expect("a name must be a token"), &line[start..end])
        });
        Plain { first, lines: lines.collect() }
    }

    /// The values of all lines of this name.
    fn all(&self, name: &str) -> Vec<&'h [u8]> {
        self.lines.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name)).map(|(_, value)| *value).collect()
    }

    fn has(&self, name: &str) -> bool {
        !self.all(name).is_empty()
    }

    /// Whether lines of this name list a token.
    fn lists(&self, name: &str, token: &str) -> bool {
        let values = self.all(name);
        let mut tokens = values.iter().flat_map(|value| value.split(|byte| *byte == b','));
        tokens.any(|listed| listed.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    }

    /// The lines that are for whoever gets the message, and not for this connection.
    fn end_to_end(&self) -> impl Iterator<Item = (&'h str, &'h [u8])> {
        let is_one_of = |names: &[&str], name: &str| names.iter().any(|other| other.eq_ignore_ascii_case(name));
        self.lines.iter().copied().filter(move |(name, _)| {
            !is_one_of(&HOP_BY_HOP, name) && (is_one_of(&NOT_TO_BE_NAMED, name) || !self.lists("connection", name))
        })
    }

    /// Where the body ends, as far as the lines tell: chunks, or a length, or neither. Panics if they tell it in two ways.
    fn framing(&self) -> (bool, Option<u64>) {
        let lengths = self.all("content-length");
        let length = lengths.first().map(|value| {
            assert!(!value.is_empty() && value.iter().all(u8::is_ascii_digit), "{}", value.escape_ascii());
            let digits = std::str::from_utf8(value).expect("digits must be text");
            digits.parse::<u64>().expect("an accepted length must be a number")
        });
        let parse = |value: &[u8]| std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        assert!(lengths.iter().all(|other| parse(other) == length), "two lengths");
        let codings = self.all("transfer-encoding");
        assert!(codings.len() <= 1 && codings.iter().all(|coding| coding.eq_ignore_ascii_case(b"chunked")));
        (!codings.is_empty(), length)
    }
}

/// Reads what was written as its receiver will: as one head, with nothing behind it.
fn sent<'s>(out: &'s [u8], is_request: bool) -> Plain<'s> {
    let mut headers = [httparse::EMPTY_HEADER; 256];
    let parsed = match is_request {
        true => httparse::Request::new(&mut headers).parse(out),
        false => httparse::Response::new(&mut headers).parse(out),
    };
    assert_eq!(parsed, Ok(httparse::Status::Complete(out.len())), "{}", out.escape_ascii());
    assert_eq!(HeadEnd::default().find(out).ok().flatten().unwrap_or(out.len()), out.len());
    let plain = Plain::of(out);
    let ends_told = plain.all("content-length").len() + plain.all("transfer-encoding").len();
    assert!(ends_told <= 1, "its end is told twice: {}", out.escape_ascii());
    plain
}

fn check_same_lines<'h>(lines: impl Iterator<Item = Header<'h>>, plain: &Plain<'_>) {
    let lines: Vec<_> = lines.map(|header| (header.name, header.value)).collect();
    let plain: Vec<_> = plain.lines.iter().map(|(name, value)| (name.as_bytes(), *value)).collect();
    assert_eq!(lines, plain);
}

// === requests ===

fn check_request(bytes: &[u8]) {
    let mut head = RequestHead::default();
    let mut again = RequestHead::default();
    again.read(b"PUT http://a/b?c HTTP/1.0\r\nHost: d\r\nContent-Length: 3\r\n\r\n").expect("a good head must be read");
    let read = head.read(bytes);
    assert_eq!(again.read(bytes), read);
    if read.is_err() {
        return;
    }
    let plain = Plain::of(bytes);
    check_same_lines(head.lines.iter(), &plain);
    let first: Vec<&[u8]> = plain.first.split(|byte| *byte == b' ').collect();
    let [method, target, version] = first[..] else { panic!("{}", plain.first.escape_ascii()) };
    assert_eq!(method, head.method.as_str().as_bytes());
    let expect: &[u8] = if head.version == Version::Http11 { b"HTTP/1.1" } else { b"HTTP/1.0" };
    assert_eq!(version, expect);
    assert!(target.ends_with(head.target().as_bytes()) || head.target() == "/", "{}", target.escape_ascii());
    assert!(head.target().bytes().all(|byte| byte.is_ascii_graphic()));
    assert_eq!(head.path(), head.target().split('?').next().unwrap_or_default());
    let framing = match plain.framing() {
        (true, Some(_)) => panic!("its end is told twice"),
        (true, None) => Framing::Chunked,
        (false, Some(length @ 1..)) => Framing::Length(length),
        (false, _) => Framing::Empty,
    };
    assert_eq!(head.framing, framing);
    assert!(plain.all("host").len() <= 1);

    let upgrades = head.method == Method::GET && head.asks_for_websocket();
    for upgrades in [false, upgrades] {
        for base_path in [None, Some("/api/v1"), Some("")] {
            // Something is put in the place of `/v1` only where that is a whole segment.
            let base_path = base_path.filter(|_| head.path().starts_with("/v1/"));
            for client_ip in ["192.0.2.7", "2001:db8::7"] {
                let client_ip = client_ip.parse().expect("an address must be one");
                let to = ToBackend {
                    base_path,
                    authority: "10.0.0.1:8000",
                    client_ip,
                    request_id: b"id-1",
                    trace: None,
                    upgrades,
                };
                let (mut out, mut out_again) = (Vec::new(), Vec::new());
                push_request(&mut out, &head, &to);
                push_request(&mut out_again, &again, &to);
                assert_eq!(out, out_again, "it depends on what was read before");
                check_sent_request(&out, &head, &plain, &to);
            }
        }
    }
}

fn check_sent_request(out: &[u8], head: &RequestHead, plain: &Plain<'_>, to: &ToBackend<'_>) {
    let sent = sent(out, true);
    let target = match (to.base_path, head.target().strip_prefix("/v1")) {
        (Some(base_path), Some(rest)) => format!("{base_path}{rest}"),
        _ => head.target().to_owned(),
    };
    assert_eq!(sent.first, format!("{} {target} HTTP/1.1", head.method).as_bytes());

    // What the client said to the server, word for word but for the address at the end of X-Forwarded-For.
    let mut through: Vec<(&str, Vec<u8>)> = plain
        .end_to_end()
        .filter(|(name, _)| !["host", "expect", "content-length"].iter().any(|ours| ours.eq_ignore_ascii_case(name)))
        .map(|(name, value)| (name, value.to_vec()))
        .collect();
    if to.upgrades {
        // They have kept their places among the others, which is not looked at here.
        assert_eq!(sent.all("upgrade"), plain.all("upgrade"));
    } else {
        assert!(!sent.has("upgrade"));
    }
    let ip = to.client_ip.to_string();
    let forwarded = through.iter_mut().rfind(|(name, _)| name.eq_ignore_ascii_case("x-forwarded-for"));
    let mut added: Vec<(&str, Vec<u8>)> = vec![];
    match forwarded {
        Some((_, value)) if value.is_empty() => *value = ip.into_bytes(),
        Some((_, value)) => value.extend_from_slice(format!(", {ip}").as_bytes()),
        None => added.push(("x-forwarded-for", ip.into_bytes())),
    }
    if let (Some(host @ [_, ..]), false) = (head.host(), plain.has("x-forwarded-host")) {
        added.push(("x-forwarded-host", host.to_vec()));
    }
    if !plain.has("x-forwarded-proto") {
        added.push(("x-forwarded-proto", b"http".to_vec()));
    }
    if !plain.has("x-request-id") {
        added.push(("x-request-id", b"id-1".to_vec()));
    }
    if plain.lists("te", "trailers") {
        added.push(("te", b"trailers".to_vec()));
    }
    if to.upgrades {
        added.push(("connection", b"upgrade".to_vec()));
    }
    match head.framing {
        Framing::Chunked => added.push(("transfer-encoding", b"chunked".to_vec())),
        Framing::Length(length) => added.push(("content-length", length.to_string().into_bytes())),
        Framing::Empty | Framing::Close if plain.has("content-length") => added.push(("content-length", b"0".to_vec())),
        Framing::Empty | Framing::Close => {}
    }
    let mut expect = vec![("host", to.authority.as_bytes().to_vec())];
    expect.extend(through);
    expect.extend(added);
    let lines = sent.lines.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("upgrade"));
    assert_eq!(lines.map(|(name, value)| (*name, value.to_vec())).collect::<Vec<_>>(), expect);
}

// === answers ===

fn check_response(bytes: &[u8]) {
    let own_address = OwnAddress::new(([10, 0, 0, 1], 8000).into(), ["backend"], "/api/v1");
    let Ok(head) = ResponseHead::read(bytes) else { return };
    let plain = Plain::of(bytes);
    check_same_lines(head.lines.iter(), &plain);
    let framing = match plain.framing() {
        (true, _) => Framing::Chunked,
        (false, None) => Framing::Close,
        (false, Some(0)) => Framing::Empty,
        (false, Some(length)) => Framing::Length(length),
    };
    assert_eq!(head.framing, framing);
    assert!(!(head.reusable && plain.lists("connection", "close")));

    for framing in [Delivery::AsIs, Delivery::Chunked, Delivery::UntilClose] {
        for connection in [Persistence::Unsaid, Persistence::KeepAlive, Persistence::Close, Persistence::Upgrade] {
            for origin in [None, Some(&b"https://ui.example"[..])] {
                let cross_origin = origin.map_or(CrossOrigin::Unsaid, CrossOrigin::Allowed);
                let dialect = if origin.is_some() { Dialect::Anthropic } else { Dialect::OpenAi };
                let common = Common { request_id: b"id-1", dialect, connection, cross_origin };
                let to = ToClient { framing, common, own_address: &own_address };
                let mut out = Vec::new();
                push_response(&mut out, &head, &to);
                check_sent_response(&out, &head, &plain, &to);
            }
        }
    }
    if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS {
        let mut out = Vec::new();
        push_interim(&mut out, &head, &own_address);
        let sent = sent(&out, false);
        let theirs = plain.end_to_end().filter(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
        check_passed(sent.lines, theirs.collect(), &own_address);
    }
}

/// What has passed is what was there, but for the backend's own address.
fn check_passed(passed: Vec<(&str, &[u8])>, theirs: Vec<(&str, &[u8])>, own_address: &OwnAddress) {
    let told = |name: &str, value: &[u8]| match own_address.conceal(name.as_bytes(), value) {
        Concealed::AsIs => {
            let finder = |needle: &[u8]| value.windows(needle.len()).any(|window| window == needle);
            assert!(!finder(b"http://10.0.0.1:8000/"), "{}", value.escape_ascii());
            Some(value.to_vec())
        }
        Concealed::Changed(to) => Some(to),
        Concealed::Dropped => None,
    };
    let theirs = theirs.into_iter().filter_map(|(name, value)| Some((name, told(name, value)?))).collect::<Vec<_>>();
    assert_eq!(passed.into_iter().map(|(name, value)| (name, value.to_vec())).collect::<Vec<_>>(), theirs);
}

fn check_sent_response(out: &[u8], head: &ResponseHead, plain: &Plain<'_>, to: &ToClient<'_>) {
    let sent = sent(out, false);
    let first = [format!("HTTP/1.1 {} ", head.status.as_str()).as_bytes(), head.reason()].concat();
    assert_eq!(sent.first, first);
    match to.framing {
        Delivery::AsIs => {
            assert!(!sent.has("transfer-encoding"));
            let never = head.status.is_informational()
                || head.status == StatusCode::NO_CONTENT
                || plain.has("transfer-encoding");
            let length = plain.all("content-length").first().copied().filter(|_| !never);
            assert_eq!(sent.all("content-length").first().copied(), length);
        }
        Delivery::Chunked => assert_eq!(sent.all("transfer-encoding"), [b"chunked"]),
        Delivery::UntilClose => assert!(!sent.has("transfer-encoding") && !sent.has("content-length")),
    }
    let said = to.common.connection;
    let demands = head.status == StatusCode::UPGRADE_REQUIRED && plain.has("upgrade");
    let connection: &[&[u8]] = match said {
        Persistence::Unsaid if demands => &[b"upgrade"],
        Persistence::Unsaid => &[],
        Persistence::KeepAlive if demands => &[b"upgrade", b"keep-alive"],
        Persistence::KeepAlive => &[b"keep-alive"],
        Persistence::Close if demands => &[b"upgrade", b"close"],
        Persistence::Close => &[b"close"],
        Persistence::Upgrade => &[b"upgrade"],
    };
    assert_eq!(sent.all("connection"), connection);
    let upgrade = if demands || said == Persistence::Upgrade { plain.all("upgrade") } else { vec![] };
    assert_eq!(sent.all("upgrade"), upgrade);
    for name in ["keep-alive", "proxy-connection", "te"] {
        assert!(!sent.has(name), "{name} has passed");
    }
    if let CrossOrigin::Allowed(origin) = to.common.cross_origin {
        assert_eq!(sent.all("access-control-allow-origin"), [origin]);
    }
    if to.common.dialect == Dialect::Anthropic {
        let passes = |name: &str| plain.end_to_end().find(|(other, _)| name.eq_ignore_ascii_case(other));
        let theirs = passes("request-id").or_else(|| passes("x-request-id")).map(|(_, value)| value);
        assert_eq!(sent.all("request-id").first().copied(), Some(theirs.unwrap_or(b"id-1")));
    }
    let is_theirs = |name: &str| {
        let gone = |other: &str| name.eq_ignore_ascii_case(other);
        !(gone("content-length")
            || to.framing == Delivery::UntilClose && gone("trailer")
            || to.common.cross_origin.is_allowed() && gone("access-control-allow-origin"))
    };
    // The backend's lines come first and in their order, then the proxy's own.
    let theirs: Vec<_> = plain.end_to_end().filter(|(name, _)| is_theirs(name)).collect();
    let is_kept = |(name, value): &&(&str, &[u8])| to.own_address.conceal(name.as_bytes(), value) != Concealed::Dropped;
    let mut passed = sent
        .lines
        .iter()
        .copied()
        .filter(|(name, _)| is_theirs(name) && !HOP_BY_HOP.contains(&&*name.to_ascii_lowercase()));
    let kept = theirs.iter().filter(is_kept).count();
    check_passed(passed.by_ref().take(kept).collect(), theirs, to.own_address);
    let added: Vec<_> = passed.collect();
    let ours = ["x-request-id", "request-id", "x-accel-buffering", "vary"];
    let shows = |name: &str| to.common.cross_origin.is_allowed() && name == "access-control-expose-headers";
    assert!(added.iter().all(|(name, _)| ours.contains(name) || shows(name)), "{added:?}");
}
