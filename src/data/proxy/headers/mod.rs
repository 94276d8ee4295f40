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
mod tests;
