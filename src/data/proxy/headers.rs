//! Heads on their way through: what must not pass, what the proxy adds, how the end of a body is told. Pure.

use std::{io::Write as _, net::IpAddr, time::SystemTime};

use http::{HeaderMap, StatusCode};

use super::{cors::CrossOrigin, reuse, trace::TraceHeaders};
use crate::{
    base::error::Dialect,
    wire::http1::{
        body::Framing,
        date::push_date,
        head::{Header, Known, Lines, RequestHead, ResponseHead, Version},
        own_address::{Concealed, OwnAddress},
    },
};

/// What is added to a request on its way to a backend.
#[derive(Debug, Clone, Copy)]
pub struct ToBackend<'a> {
    /// Prefix of the backend's API, if the path is below `/v1` and that is not its prefix.
    pub base_path: Option<&'a str>,
    /// Value of `Host`.
    pub authority: &'a str,
    /// The client's address.
    pub client_ip: IpAddr,
    /// Correlates the request with its answers and log lines.
    pub request_id: &'a [u8],
    /// The trace that the request belongs to; `None`: as the client said it.
    pub trace: Option<&'a TraceHeaders>,
    /// The client may go on with another protocol on this connection.
    pub upgrades: bool,
}

/// Appends the head of a request as a backend gets it. Lines keep their order, their case and their repetitions.
pub fn push_request(out: &mut Vec<u8>, head: &RequestHead, to: &ToBackend<'_>) {
    let target = head.target();
    let (base_path, rest) = match (to.base_path, target.strip_prefix("/v1")) {
        (Some(base_path), Some(rest)) => (base_path, rest),
        _ => ("", target),
    };
    push_all(out, &[head.method.as_str(), " ", base_path, rest, " HTTP/1.1\r\nhost: ", to.authority, "\r\n"]);
    let lines = &head.lines;
    let names_others = connection_names_others(lines);
    let mut forwarded_left = lines.all(Known::XForwardedFor).count();
    let had_forwarded = forwarded_left > 0;
    for header in lines.iter() {
        match header.known {
            // The body has been asked for already; the backend's 100 would come too late.
            Known::Host | Known::Expect => continue,
            Known::Upgrade if to.upgrades => {}
            known if known.is_hop_by_hop() => continue,
            _ if names_others && lines.is_named_by_connection(&header) => continue,
            // Lines are one list (RFC 9110, 5.3): the address goes to the end of the last one.
            Known::XForwardedFor => {
                forwarded_left -= 1;
                if forwarded_left == 0 {
                    out.extend_from_slice(header.name);
                    out.extend_from_slice(b": ");
                    out.extend_from_slice(header.value);
                    out.extend_from_slice(if header.value.is_empty() { b"" } else { b", " });
                    push_ip(out, to.client_ip);
                    out.extend_from_slice(b"\r\n");
                    continue;
                }
            }
            // Two equal ones may come; one goes.
            Known::ContentLength => continue,
            Known::TraceParent if to.trace.is_some() => continue,
            Known::TraceState if to.trace.is_some_and(|trace| !trace.keeps_state) => continue,
            _ => {}
        }
        push_line(out, header.name, header.value);
    }
    if !had_forwarded {
        out.extend_from_slice(b"x-forwarded-for: ");
        push_ip(out, to.client_ip);
        out.extend_from_slice(b"\r\n");
    }
    let host = head.host().filter(|host| !host.is_empty());
    if let (Some(host), false) = (host, lines.has(Known::XForwardedHost)) {
        push_line(out, b"x-forwarded-host", host);
    }
    if !lines.has(Known::XForwardedProto) {
        out.extend_from_slice(b"x-forwarded-proto: http\r\n");
    }
    if !lines.has(Known::XRequestId) {
        push_line(out, b"x-request-id", to.request_id);
    }
    if let Some(trace) = to.trace {
        push_line(out, b"traceparent", &trace.traceparent);
    }
    if lines.lists(Known::Te, "trailers") {
        out.extend_from_slice(b"te: trailers\r\n");
    }
    if to.upgrades {
        out.extend_from_slice(b"connection: upgrade\r\n");
    } else if reuse::is_last(head) {
        out.extend_from_slice(b"connection: close\r\n");
    }
    match head.framing {
        Framing::Length(length) => push_length(out, length),
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        // A body of no bytes is still one: servers ask for a length where a method calls for a body.
        Framing::Empty | Framing::Close if lines.has(Known::ContentLength) => push_length(out, 0),
        Framing::Empty | Framing::Close => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// What every answer says, a backend's or the proxy's own.
#[derive(Debug, Clone, Copy)]
pub struct Common<'a> {
    /// Correlates the answer with its request.
    pub request_id: &'a [u8],
    /// In whose dialect the client speaks: Anthropic's SDKs read the id from `request-id`.
    pub dialect: Dialect,
    /// What is said of the connection.
    pub connection: Persistence,
    /// What is said of other origins' scripts.
    pub cross_origin: CrossOrigin<'a>,
}

/// What is added to an answer on its way to the client.
#[derive(Debug, Clone, Copy)]
pub struct ToClient<'a> {
    /// How the client is told where the body ends.
    pub framing: Delivery,
    /// What every answer says.
    pub common: Common<'a>,
    /// The backend's address, which means nothing to the client.
    pub own_address: &'a OwnAddress,
}

/// How a client is told where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// As the backend said it: by its length, or because there is none.
    AsIs,
    /// In chunks.
    Chunked,
    /// By the end of the connection, which is all that HTTP/1.0 knows for a body of unknown length.
    UntilClose,
}

impl Delivery {
    /// How a client of this version is told of a body with this framing.
    pub fn of(framing: Framing, version: Version) -> Delivery {
        match (framing, version) {
            (Framing::Empty | Framing::Length(_), _) => Delivery::AsIs,
            (Framing::Chunked | Framing::Close, Version::Http11) => Delivery::Chunked,
            (Framing::Chunked | Framing::Close, Version::Http10) => Delivery::UntilClose,
        }
    }
}

/// What happens to the client's connection after an answer, as far as it must be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// What the client takes for granted.
    Unsaid,
    /// It goes on, which HTTP/1.0 must be told.
    KeepAlive,
    /// It is closed.
    Close,
    /// It goes on with another protocol.
    Upgrade,
}

/// Appends the head of a backend's answer as the client gets it.
pub fn push_response(out: &mut Vec<u8>, head: &ResponseHead, to: &ToClient<'_>) {
    push_status(out, head.status.as_u16(), head.reason());
    let lines = &head.lines;
    let names_others = connection_names_others(lines);
    // Chunks override a length, which may stand beside them (RFC 9112, 6.3).
    let mut may_say_length =
        to.framing == Delivery::AsIs && head.framing != Framing::Chunked && may_have_length(head.status);
    // 426 says with it what the client is to use instead (RFC 9110, 15.5.22).
    let demands_upgrade = head.status == StatusCode::UPGRADE_REQUIRED && lines.has(Known::Upgrade);
    let keeps_upgrade = demands_upgrade || to.common.connection == Persistence::Upgrade;
    for header in lines.iter() {
        match header.known {
            Known::Upgrade if keeps_upgrade => {}
            known if known.is_hop_by_hop() => continue,
            _ if names_others && lines.is_named_by_connection(&header) => continue,
            // Two equal ones may come; one goes.
            Known::ContentLength if !std::mem::replace(&mut may_say_length, false) => continue,
            Known::AllowOrigin if to.common.cross_origin.is_allowed() => continue,
            // There will be none.
            Known::Other if to.framing == Delivery::UntilClose && is_trailer(&header) => continue,
            _ => {}
        }
        push_concealed(out, &header, to.own_address);
    }
    let request_id = match lines.first(Known::XRequestId) {
        Some(theirs) => theirs,
        None => {
            push_line(out, b"x-request-id", to.common.request_id);
            to.common.request_id
        }
    };
    // A backend that has an id of its own here is asked about by that.
    if to.common.dialect == Dialect::Anthropic && !passes(lines, "request-id", names_others) {
        push_line(out, b"request-id", request_id);
    }
    // Front proxies (nginx) would hold the parts of a stream back.
    if head.is_stream_of_parts() && !lines.has(Known::XAccelBuffering) {
        out.extend_from_slice(b"x-accel-buffering: no\r\n");
    }
    if demands_upgrade && to.common.connection != Persistence::Upgrade {
        out.extend_from_slice(b"connection: upgrade\r\n");
    }
    push_end(out, to.framing, &to.common);
}

/// Appends an interim answer of a backend that has this address.
pub fn push_interim(out: &mut Vec<u8>, head: &ResponseHead, own_address: &OwnAddress) {
    push_status(out, head.status.as_u16(), head.reason());
    for header in head.lines.iter() {
        let ends_here = header.known.is_hop_by_hop() || head.lines.is_named_by_connection(&header);
        if !ends_here && header.known != Known::ContentLength {
            push_concealed(out, &header, own_address);
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends a line of a backend's, without its address.
fn push_concealed(out: &mut Vec<u8>, header: &Header<'_>, own_address: &OwnAddress) {
    let concealed = match header.known {
        // Digits, and a time, say nothing of it.
        Known::ContentLength | Known::Date => Concealed::AsIs,
        _ => own_address.conceal(header.name, header.value),
    };
    match concealed {
        Concealed::AsIs => push_line(out, header.name, header.value),
        Concealed::Changed(value) => push_line(out, header.name, &value),
        Concealed::Dropped => {}
    }
}

/// Appends the head of an answer of the proxy's own, whose body has `length` bytes.
pub fn push_own(
    out: &mut Vec<u8>,
    status: StatusCode,
    headers: &HeaderMap,
    length: usize,
    common: &Common<'_>,
    now: SystemTime,
) {
    push_own_lines(out, status, headers, common, now);
    if may_have_length(status) {
        push_length(out, length as u64);
    }
    push_end(out, Delivery::AsIs, common);
}

/// Writes the head of an answer of the proxy's own whose body comes by and by; `framing` says how its end is told.
pub fn push_own_stream(
    out: &mut Vec<u8>,
    head: &http::Response<()>,
    framing: Delivery,
    common: &Common<'_>,
    now: SystemTime,
) {
    push_own_lines(out, head.status(), head.headers(), common, now);
    push_end(out, framing, common);
}

fn push_own_lines(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap, common: &Common<'_>, now: SystemTime) {
    push_status(out, status.as_u16(), status.canonical_reason().unwrap_or_default().as_bytes());
    out.extend_from_slice(b"date: ");
    push_date(out, now);
    out.extend_from_slice(b"\r\n");
    for (name, value) in headers {
        push_line(out, name.as_str().as_bytes(), value.as_bytes());
    }
    push_line(out, b"x-request-id", common.request_id);
    if common.dialect == Dialect::Anthropic {
        push_line(out, b"request-id", common.request_id);
    }
}

fn push_end(out: &mut Vec<u8>, framing: Delivery, common: &Common<'_>) {
    if let CrossOrigin::Allowed(origin) = common.cross_origin {
        push_line(out, b"access-control-allow-origin", origin);
        // What a script would else not see of the answer it reads (Fetch, 3.2.3).
        push_line(out, b"access-control-expose-headers", b"x-request-id, request-id, retry-after");
    }
    // Caches must know that another origin, or none, would have got another answer (Fetch, 3.2.5).
    if !matches!(common.cross_origin, CrossOrigin::Unsaid) {
        out.extend_from_slice(b"vary: origin\r\n");
    }
    if framing == Delivery::Chunked {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    }
    out.extend_from_slice(match common.connection {
        Persistence::Unsaid => b"",
        Persistence::KeepAlive => b"connection: keep-alive\r\n",
        Persistence::Close => b"connection: close\r\n",
        Persistence::Upgrade => b"connection: upgrade\r\n",
    });
    out.extend_from_slice(b"\r\n");
}

/// Whether `Connection` names any header but those that never pass anyway.
fn connection_names_others(lines: &Lines) -> bool {
    lines.all(Known::Connection).any(|value| {
        value.split(|b| *b == b',').map(<[u8]>::trim_ascii).any(|token| {
            !(token.is_empty() || token.eq_ignore_ascii_case(b"keep-alive") || token.eq_ignore_ascii_case(b"close"))
        })
    })
}

/// Whether there is a line of this name, in lower case, that does not end here.
fn passes(lines: &Lines, name: &str, names_others: bool) -> bool {
    let is_it = |header: &Header<'_>| header.name.eq_ignore_ascii_case(name.as_bytes());
    lines.iter().any(|header| is_it(&header) && !(names_others && lines.is_named_by_connection(&header)))
}

/// Whether an answer with this status may say the length of a body (RFC 9110, 8.6).
fn may_have_length(status: StatusCode) -> bool {
    !status.is_informational() && status != StatusCode::NO_CONTENT
}

fn is_trailer(header: &Header<'_>) -> bool {
    header.name.eq_ignore_ascii_case(b"trailer")
}

fn push_status(out: &mut Vec<u8>, status: u16, reason: &[u8]) {
    out.extend_from_slice(b"HTTP/1.1 ");
    // Three digits: `StatusCode` knows no others.
    out.extend([status / 100, status / 10 % 10, status % 10].map(|digit| b'0' + (digit % 10) as u8));
    out.push(b' ');
    out.extend_from_slice(reason);
    out.extend_from_slice(b"\r\n");
}

fn push_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn push_all(out: &mut Vec<u8>, parts: &[&str]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

fn push_length(out: &mut Vec<u8>, length: u64) {
    push_line(out, b"content-length", itoa::Buffer::new().format(length).as_bytes());
}

fn push_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip.to_canonical() {
        // What is formatted for every request is worth not being formatted by the general means.
        IpAddr::V4(ip) => {
            for (index, octet) in ip.octets().into_iter().enumerate() {
                out.extend_from_slice(if index > 0 { b"." } else { b"" });
                out.extend_from_slice(itoa::Buffer::new().format(octet).as_bytes());
            }
        }
        // Writing to a vector does not fail.
        IpAddr::V6(ip) => drop(write!(out, "{ip}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::http1::head::HeadEnd;

    fn request(text: &str) -> RequestHead {
        let mut head = RequestHead::default();
        let bytes = text.replace('\n', "\r\n");
        assert_eq!(HeadEnd::default().find(bytes.as_bytes()), Ok(Some(bytes.len())));
        head.read(bytes.as_bytes()).unwrap();
        head
    }

    fn sent(text: &str, ip: &str, base_path: Option<&str>) -> String {
        let to = ToBackend {
            base_path,
            authority: "10.0.0.1:8000",
            client_ip: ip.parse().unwrap(),
            request_id: b"id-1",
            trace: None,
            upgrades: false,
        };
        let mut out = Vec::new();
        push_request(&mut out, &request(text), &to);
        String::from_utf8(out).unwrap().replace("\r\n", "\n")
    }

    fn own_address() -> OwnAddress {
        OwnAddress::new("10.0.0.1:8000".parse().unwrap(), ["vllm-1"], "/api/v1")
    }

    fn answered(text: &str, framing: Delivery, connection: Persistence, origin: Option<&[u8]>) -> String {
        let head = ResponseHead::read(text.replace('\n', "\r\n").as_bytes()).unwrap();
        let cross_origin = origin.map_or(CrossOrigin::Unsaid, CrossOrigin::Allowed);
        let common = Common { request_id: b"id-1", dialect: Dialect::OpenAi, connection, cross_origin };
        let to = ToClient { framing, common, own_address: &own_address() };
        let mut out = Vec::new();
        push_response(&mut out, &head, &to);
        String::from_utf8(out).unwrap().replace("\r\n", "\n")
    }

    #[test]
    fn hop_by_hop_headers_go_and_the_rest_keeps_its_order_and_case() {
        let text = "POST /v1/x?y HTTP/1.1\nHost: api.example\nA: 1\nConnection: keep-alive, X-Secret\nKeep-Alive: timeout=5\n\
                    b: 2\nx-secret: s\nTransfer-Encoding: chunked\nTE: gzip, Trailers\nUpgrade: h2c\nProxy-Connection: x\n\
                    B: 3\nTrailer: x-sum\nc:\nExpect: 100-continue\n\n";
        let expect = "POST /v1/x?y HTTP/1.1\nhost: 10.0.0.1:8000\nA: 1\nb: 2\nB: 3\nTrailer: x-sum\nc: \n\
                      x-forwarded-for: 192.0.2.7\nx-forwarded-host: api.example\nx-forwarded-proto: http\n\
                      x-request-id: id-1\nte: trailers\ntransfer-encoding: chunked\n\n";
        assert_eq!(sent(text, "192.0.2.7", None), expect);
    }

    #[test]
    fn connection_cannot_name_away_the_framing() {
        let text =
            "POST /v1/x HTTP/1.1\nContent-Length: 5\ncontent-length: 5\nHost: h\nConnection: content-length, host\n\n";
        let sent = sent(text, "192.0.2.7", None);
        assert_eq!(sent.matches("ontent-length: 5").count(), 1, "{sent}");
        assert_eq!(sent.matches("host: 10.0.0.1:8000").count(), 1, "{sent}");
    }

    #[test]
    fn connection_cannot_name_away_how_the_body_is_read_or_whom_it_is_from() {
        let text = "POST /v1/x HTTP/1.1\nContent-Type: a\nContent-Encoding: gzip\nX-Forwarded-For: 198.51.100.1\n\
                    X-Forwarded-Host: b\nX-Forwarded-Proto: https\nX-Request-Id: theirs\nConnection: content-type, \
                    Content-Encoding, x-forwarded-for, x-forwarded-host, x-forwarded-proto, x-request-id\n\n";
        let expect = "POST /v1/x HTTP/1.1\nhost: 10.0.0.1:8000\nContent-Type: a\nContent-Encoding: gzip\n\
                      X-Forwarded-For: 198.51.100.1, 192.0.2.7\nX-Forwarded-Host: b\nX-Forwarded-Proto: https\n\
                      X-Request-Id: theirs\n\n";
        assert_eq!(sent(text, "192.0.2.7", None), expect);
    }

    #[test]
    fn what_the_front_proxy_said_is_kept_and_all_lines_stay() {
        let text = "GET /v1/x HTTP/1.1\nHost: inner\nX-Forwarded-For: 198.51.100.1, 198.51.100.2\nx-forwarded-for: 198.51.100.3\n\
                    X-Forwarded-Host: api.example\nX-Forwarded-Proto: https\nForwarded: for=198.51.100.1\nX-Request-Id: theirs\n\n";
        let expect = "GET /v1/x HTTP/1.1\nhost: 10.0.0.1:8000\nX-Forwarded-For: 198.51.100.1, 198.51.100.2\n\
                      x-forwarded-for: 198.51.100.3, 192.0.2.7\nX-Forwarded-Host: api.example\nX-Forwarded-Proto: https\n\
                      Forwarded: for=198.51.100.1\nX-Request-Id: theirs\n\n";
        assert_eq!(sent(text, "::ffff:192.0.2.7", None), expect);
    }

    #[test]
    fn the_base_path_stands_for_v1() {
        for (base_path, first) in [
            (None, "GET /v1/a%2Fb?v1 HTTP/1.1"),
            (Some("/api/v1"), "GET /api/v1/a%2Fb?v1 HTTP/1.1"),
            (Some(""), "GET /a%2Fb?v1 HTTP/1.1"),
        ] {
            let sent = sent("GET /v1/a%2Fb?v1 HTTP/1.1\n\n", "192.0.2.7", base_path);
            assert_eq!(sent.lines().next(), Some(first));
        }
    }

    #[test]
    fn bodies_of_no_bytes_stay_bodies() {
        let length = |text: &str| sent(text, "::1", None).contains("content-length: 0\n");
        assert!(length("POST /v1/x HTTP/1.1\nContent-Length: 0\n\n"));
        assert!(!length("GET /v1/x HTTP/1.1\n\n"));
    }

    #[test]
    fn upgrades_pass_where_they_are_wanted() {
        let text =
            "GET /v1/realtime HTTP/1.1\nConnection: Upgrade, keep-alive\nUpgrade: websocket\nSec-WebSocket-Key: k\n\n";
        let mut out = Vec::new();
        let to = ToBackend {
            base_path: None,
            authority: "b",
            client_ip: [192, 0, 2, 7].into(),
            request_id: b"id",
            trace: None,
            upgrades: true,
        };
        push_request(&mut out, &request(text), &to);
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n"), "{out}");
        assert!(out.ends_with("connection: upgrade\r\n\r\n"), "{out}");
    }

    #[test]
    fn answers_keep_their_lines_and_lose_those_of_their_connection() {
        let text = "HTTP/1.1 418 I'm a teapot\nServer: x\nConnection: close, X-Hop\nKeep-Alive: timeout=5\nx-hop: 1\nset-cookie: a\n\
                    Set-Cookie: b\nContent-Length: 5\n\n";
        assert_eq!(
            answered(text, Delivery::AsIs, Persistence::Unsaid, None),
            "HTTP/1.1 418 I'm a teapot\nServer: x\nset-cookie: a\nSet-Cookie: b\nContent-Length: 5\nx-request-id: id-1\n\n"
        );
        let text = "HTTP/1.1 200\nX-Request-Id: theirs\nContent-Type: text/event-stream\nTransfer-Encoding: chunked\nTrailer: x\n\n";
        assert_eq!(
            answered(text, Delivery::Chunked, Persistence::Close, Some(b"https://ui.example")),
            "HTTP/1.1 200 \nX-Request-Id: theirs\nContent-Type: text/event-stream\nTrailer: x\nx-accel-buffering: no\n\
             access-control-allow-origin: https://ui.example\n\
             access-control-expose-headers: x-request-id, request-id, retry-after\nvary: origin\ntransfer-encoding: chunked\nconnection: close\n\n"
        );
        let until_close = answered(text, Delivery::UntilClose, Persistence::Close, None);
        assert!(!until_close.contains("Trailer") && !until_close.contains("chunked"), "{until_close}");
    }

    #[test]
    fn anthropics_clients_find_the_id_of_their_request_where_they_look_for_it() {
        let answered = |text: &str, dialect: Dialect| {
            let head = ResponseHead::read(text.replace('\n', "\r\n").as_bytes()).unwrap();
            let (connection, cross_origin) = (Persistence::Unsaid, CrossOrigin::Unsaid);
            let common = Common { request_id: b"id-1", dialect, connection, cross_origin };
            let to = ToClient { framing: Delivery::AsIs, common, own_address: &own_address() };
            let mut out = Vec::new();
            push_response(&mut out, &head, &to);
            String::from_utf8(out)
                .unwrap()
                .split("\r\n")
                .skip(1)
                .filter(|line| !line.is_empty())
                .collect::<Vec<_>>()
                .join("|")
        };
        for (lines, dialect, expected) in [
            ("", Dialect::Anthropic, "x-request-id: id-1|request-id: id-1"),
            ("", Dialect::OpenAi, "x-request-id: id-1"),
            ("X-Request-Id: b\n", Dialect::Anthropic, "X-Request-Id: b|request-id: b"),
            ("Request-Id: b\n", Dialect::Anthropic, "Request-Id: b|x-request-id: id-1"),
            ("Request-Id: b\nX-Request-Id: c\n", Dialect::Anthropic, "Request-Id: b|X-Request-Id: c"),
            ("Request-Id: b\nConnection: request-id\n", Dialect::Anthropic, "x-request-id: id-1|request-id: id-1"),
        ] {
            assert_eq!(answered(&format!("HTTP/1.1 200 OK\n{lines}\n"), dialect), expected, "{lines:?}");
        }
    }

    #[test]
    fn streams_of_parts_are_not_held_back() {
        for kind in [
            "text/event-stream",
            "Text/Event-Stream; charset=utf-8",
            "application/x-ndjson",
            "application/x-ndjson; charset=utf-8",
            "APPLICATION/NDJSON ;x",
            "application/jsonl",
            "application/x-jsonlines",
            "application/json-seq",
            "application/vnd.x+json-seq",
            "application/stream+json",
        ] {
            let text = format!("HTTP/1.1 200 OK\nContent-Type: {kind}\n\n");
            let sent = answered(&text, Delivery::Chunked, Persistence::Unsaid, None);
            assert_eq!(sent.matches("x-accel-buffering: no\n").count(), 1, "{kind}: {sent}");
            let text = text.replace("\n\n", "\nX-Accel-Buffering: yes\n\n");
            let sent = answered(&text, Delivery::Chunked, Persistence::Unsaid, None);
            assert_eq!(sent.to_lowercase().matches("x-accel-buffering").count(), 1, "the backend decides: {sent}");
        }
        for kind in ["application/json", "application/jsonp", "audio/mpeg", "application/seq", "+json-sequel", ""] {
            let text = format!("HTTP/1.1 200 OK\nContent-Type: {kind}\n\n");
            assert!(!answered(&text, Delivery::Chunked, Persistence::Unsaid, None).contains("accel"), "{kind}");
        }
    }

    #[test]
    fn what_426_demands_passes_and_what_others_offer_does_not() {
        for (status, connection, expected) in [
            (
                "426 Upgrade Required",
                Persistence::Unsaid,
                "Upgrade: websocket\nx-request-id: id-1\nconnection: upgrade\n\n",
            ),
            (
                "426 Upgrade Required",
                Persistence::Close,
                "Upgrade: websocket\nx-request-id: id-1\nconnection: upgrade\nconnection: close\n\n",
            ),
            ("200 OK", Persistence::Unsaid, "x-request-id: id-1\n\n"),
            ("400 Bad Request", Persistence::Close, "x-request-id: id-1\nconnection: close\n\n"),
        ] {
            let text = format!("HTTP/1.1 {status}\nConnection: Upgrade\nUpgrade: websocket\n\n");
            let sent = answered(&text, Delivery::AsIs, connection, None);
            assert_eq!(sent.split_once('\n').unwrap().1, expected, "{status}");
        }
    }

    #[test]
    fn an_answer_says_its_length_once_and_only_if_it_can_have_one() {
        for (text, lengths) in [
            ("HTTP/1.1 200 OK\nContent-Length: 5\ncontent-length: 5\n\n", 1),
            // To HEAD, or with 304: both say what would have come.
            ("HTTP/1.1 200 OK\nContent-Length: 5\nTransfer-Encoding: chunked\n\n", 0),
            ("HTTP/1.1 204 No Content\nContent-Length: 5\n\n", 0),
            ("HTTP/1.1 101 x\nUpgrade: websocket\nContent-Length: 5\n\n", 0),
        ] {
            let sent = answered(text, Delivery::AsIs, Persistence::Unsaid, None);
            assert_eq!(sent.to_ascii_lowercase().matches("content-length").count(), lengths, "{sent}");
        }
    }

    #[test]
    fn interim_answers_have_no_body_and_lose_the_lines_of_their_connection() {
        let text = "HTTP/1.1 103 Early Hints\nLink: a\nContent-Length: 5\nTransfer-Encoding: chunked\nConnection: x-hop\n\
                    X-Hop: 1\n\n";
        let mut out = Vec::new();
        push_interim(&mut out, &ResponseHead::read(text.replace('\n', "\r\n").as_bytes()).unwrap(), &own_address());
        assert_eq!(out, b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n");
    }

    #[test]
    fn redirects_do_not_name_the_backend() {
        for (from, to) in [
            ("http://10.0.0.1:8000/api/v1/models/?x=1", "/v1/models/?x=1"),
            ("//10.0.0.1:8000/docs", "/docs"),
            ("http://10.0.0.1:8000", "/"),
            ("http://10.0.0.1:8000#x", "/#x"),
            ("http://10.0.0.1:8000//example.org/x", "/example.org/x"),
            ("http://10.0.0.1:8000/\\example.org/x", "/example.org/x"),
            ("http://10.0.0.1:8000/api/v1//x", "/v1//x"),
            ("http://10.0.0.1:80001/x", "http://10.0.0.1:80001/x"),
            ("https://example.org/x", "https://example.org/x"),
            ("/api/v1/x", "/api/v1/x"),
        ] {
            let text = format!("HTTP/1.1 307 x\nLocation: {from}\n\n");
            let sent = answered(&text, Delivery::AsIs, Persistence::Unsaid, None);
            assert!(sent.contains(&format!("\nLocation: {to}\n")), "{from}: {sent}");
        }
        for (from, to) in [
            ("Set-Cookie: a=1; Domain=vllm-1; Secure", "Set-Cookie: a=1; Secure"),
            ("set-cookie: a=1; domain=localhost", "set-cookie: a=1"),
            ("X-Served-By: vllm-1:8000", "X-Served-By: -"),
        ] {
            let sent = answered(&format!("HTTP/1.1 200 x\n{from}\n\n"), Delivery::AsIs, Persistence::Unsaid, None);
            assert!(sent.contains(&format!("\n{to}\n")), "{from}: {sent}");
        }
        // Nor if they hold something that is not UTF-8.
        let hidden = own_address().conceal(b"location", b"http://10.0.0.1:8000/\xe9");
        assert_eq!(hidden, Concealed::Changed(b"/\xe9".to_vec()));
    }

    #[test]
    fn the_end_is_told_so_that_the_client_understands() {
        for (framing, version, delivery) in [
            (Framing::Length(5), Version::Http10, Delivery::AsIs),
            (Framing::Empty, Version::Http11, Delivery::AsIs),
            (Framing::Chunked, Version::Http11, Delivery::Chunked),
            (Framing::Close, Version::Http11, Delivery::Chunked),
            (Framing::Chunked, Version::Http10, Delivery::UntilClose),
            (Framing::Close, Version::Http10, Delivery::UntilClose),
        ] {
            assert_eq!(Delivery::of(framing, version), delivery, "{framing:?} {version:?}");
        }
    }
}
