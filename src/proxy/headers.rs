//! Headers on their way through: what must not pass, what the proxy adds. Pure.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Correlates a request with its answers and log lines.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Asks front proxies (nginx) not to hold events back.
pub const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Headers that belong to one connection (RFC 9110, 7.6.1), beside those that `Connection` names. `Trailer` is not one
/// of them; `TE` may pass as far as it asks for trailers.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(*name, header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE | header::TE)
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
}

/// Removes what belongs to the connection the message came on. Order and repetitions of the rest stay as they are.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(is_hop_by_hop) {
        return;
    }
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        // Framing is not the sender's to remove, whatever it names.
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| *name != header::CONTENT_LENGTH && *name != header::HOST)
        .collect();
    let wants_trailers = headers.get_all(header::TE).iter().any(|te| {
        te.to_str().is_ok_and(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
    });
    // Removing from a header map moves its last entry into the gap; a new map keeps the order.
    let mut kept = HeaderMap::with_capacity(headers.len());
    let mut current = None;
    for (name, value) in headers.drain() {
        if name.is_some() {
            current = name;
        }
        let Some(name) = &current else { continue };
        if !is_hop_by_hop(name) && !named.contains(name) {
            kept.append(name, value);
        }
    }
    if wants_trailers {
        kept.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    *headers = kept;
}

/// What the proxy knows of the client.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    /// Its address on the connection.
    pub ip: IpAddr,
}

/// Turns a request's headers into those for a backend, but for `Host`, which differs from one to the next.
pub fn prepare_request(headers: &mut HeaderMap, client: Client, request_id: &HeaderValue) {
    strip_hop_by_hop(headers);
    // The body has been asked for already; the backend's 100 would come too late.
    headers.remove(header::EXPECT);
    if let (Some(host), false) = (headers.get(header::HOST).cloned(), headers.contains_key(X_FORWARDED_HOST)) {
        headers.insert(X_FORWARDED_HOST, host);
    }
    if !headers.contains_key(X_FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    forwarded_for(headers, client.ip);
    if !headers.contains_key(X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, request_id.clone());
    }
}

/// HTTP/2 splits a cookie line into crumbs, which HTTP/1.1 knows as one line (RFC 9113, 8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter();
    if crumbs.next().is_none() || crumbs.next().is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(line) = HeaderValue::try_from(crumbs.join(&b"; "[..])) {
        headers.insert(header::COOKIE, line);
    }
}

/// Appends the client's address once, to the last line there is: lines are one list (RFC 9110, 5.3).
fn forwarded_for(headers: &mut HeaderMap, ip: IpAddr) {
    let ip = ip.to_canonical();
    let own = match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => ip.to_string(),
    };
    match headers.entry(X_FORWARDED_FOR) {
        header::Entry::Vacant(vacant) => {
            if let Ok(value) = HeaderValue::try_from(own) {
                vacant.insert(value);
            }
        }
        header::Entry::Occupied(mut occupied) => {
            let Some(last) = occupied.iter_mut().last() else { return };
            let line = [last.as_bytes(), b", ", own.as_bytes()].concat();
            if let Ok(value) = HeaderValue::try_from(line) {
                *last = value;
            }
        }
    }
}

/// Turns a backend's response headers into those for the client.
pub fn prepare_response(headers: &mut HeaderMap, request_id: &HeaderValue, to_http_1_0: bool) {
    strip_hop_by_hop(headers);
    if to_http_1_0 {
        headers.remove(header::TRAILER);
        if !headers.contains_key(header::CONTENT_LENGTH) {
            // Only the end of the connection can end this answer.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
    if !headers.contains_key(X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, request_id.clone());
    }
    if is_event_stream(headers) && !headers.contains_key(X_ACCEL_BUFFERING) {
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    }
}

/// Makes a redirect to the backend itself one to the same place here: its address means nothing to the client, and its
/// base path stands for `/v1`.
pub fn hide_backend(headers: &mut HeaderMap, authority: &HeaderValue, base_path: &str) {
    let Some(location) = headers.get_mut(header::LOCATION) else { return };
    let Some(path) = location.to_str().ok().and_then(|location| {
        let rest = location.strip_prefix("http:").unwrap_or(location).strip_prefix("//")?;
        rest.strip_prefix(authority.to_str().ok()?).filter(|path| path.is_empty() || path.starts_with(['/', '?']))
    }) else {
        return;
    };
    let here = match path.strip_prefix(base_path) {
        Some(rest) if rest.starts_with('/') => format!("/v1{rest}"),
        _ if path.starts_with('/') => path.to_owned(),
        _ => format!("/{path}"),
    };
    if let Ok(here) = HeaderValue::try_from(here) {
        *location = here;
    }
}

/// Whether a response is a stream of server-sent events.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    const EVENT_STREAM: &[u8] = b"text/event-stream";
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.as_bytes().get(..EVENT_STREAM.len()))
        .is_some_and(|kind| kind.eq_ignore_ascii_case(EVENT_STREAM))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    fn lines(map: &HeaderMap) -> Vec<(&str, &str)> {
        map.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect()
    }

    #[test]
    fn hop_by_hop_headers_go_and_the_rest_keeps_its_order() {
        let mut headers = map(&[
            ("a", "1"),
            ("connection", "keep-alive, X-Secret"),
            ("keep-alive", "timeout=5"),
            ("b", "2"),
            ("x-secret", "s"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, Trailers"),
            ("upgrade", "h2c"),
            ("proxy-connection", "x"),
            ("b", "3"),
            ("trailer", "x-sum"),
            ("c", "4"),
        ]);
        strip_hop_by_hop(&mut headers);
        let expect = [("a", "1"), ("b", "2"), ("b", "3"), ("trailer", "x-sum"), ("c", "4"), ("te", "trailers")];
        assert_eq!(lines(&headers), expect);
    }

    #[test]
    fn connection_cannot_name_away_the_framing() {
        let mut headers =
            map(&[("content-length", "5"), ("host", "h"), ("connection", "content-length, host, nonsense name")]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(lines(&headers), [("content-length", "5"), ("host", "h")]);
    }

    fn prepared(request: &[(&'static str, &str)], ip: &str) -> HeaderMap {
        let mut headers = map(request);
        let client = Client { ip: ip.parse().unwrap() };
        prepare_request(&mut headers, client, &HeaderValue::from_static("id-1"));
        headers
    }

    #[test]
    fn forwarding_headers_are_set_once() {
        let headers = prepared(&[("host", "api.example"), ("x", "1")], "192.0.2.7");
        assert_eq!(
            lines(&headers),
            [
                ("host", "api.example"),
                ("x", "1"),
                ("x-forwarded-host", "api.example"),
                ("x-forwarded-proto", "http"),
                ("x-forwarded-for", "192.0.2.7"),
                ("x-request-id", "id-1"),
            ]
        );
    }

    #[test]
    fn what_the_front_proxy_said_is_kept_and_all_lines_stay() {
        let headers = prepared(
            &[
                ("host", "inner"),
                ("x-forwarded-for", "198.51.100.1, 198.51.100.2"),
                ("x-forwarded-for", "198.51.100.3"),
                ("x-forwarded-host", "api.example"),
                ("x-forwarded-proto", "https"),
                ("forwarded", "for=198.51.100.1"),
                ("x-request-id", "theirs"),
                ("expect", "100-continue"),
            ],
            "::ffff:192.0.2.7",
        );
        let all: Vec<_> = headers.get_all("x-forwarded-for").iter().collect();
        assert_eq!(all, ["198.51.100.1, 198.51.100.2", "198.51.100.3, 192.0.2.7"]);
        assert_eq!(headers["x-forwarded-host"], "api.example");
        assert_eq!(headers["x-forwarded-proto"], "https");
        assert_eq!(headers["forwarded"], "for=198.51.100.1");
        assert_eq!(headers["x-request-id"], "theirs");
        assert!(!headers.contains_key("expect"));
    }

    #[test]
    fn cookie_crumbs_become_one_line_in_their_place() {
        let mut headers = map(&[("a", "1"), ("cookie", "x=1"), ("b", "2"), ("cookie", "y=2")]);
        join_cookies(&mut headers);
        assert_eq!(lines(&headers), [("a", "1"), ("cookie", "x=1; y=2"), ("b", "2")]);
    }

    #[test]
    fn redirects_do_not_name_the_backend() {
        for (from, to) in [
            ("http://10.0.0.1:8000/api/v1/models/?x=1", "/v1/models/?x=1"),
            ("//10.0.0.1:8000/docs", "/docs"),
            ("http://10.0.0.1:8000", "/"),
            ("http://10.0.0.1:80001/x", "http://10.0.0.1:80001/x"),
            ("https://example.org/x", "https://example.org/x"),
            ("/api/v1/x", "/api/v1/x"),
        ] {
            let mut headers = map(&[("location", from)]);
            hide_backend(&mut headers, &HeaderValue::from_static("10.0.0.1:8000"), "/api/v1");
            assert_eq!(headers["location"], to);
        }
    }

    #[test]
    fn event_streams_are_recognised_and_unbuffered() {
        let mut headers = map(&[("content-type", "Text/Event-Stream; charset=utf-8")]);
        prepare_response(&mut headers, &HeaderValue::from_static("id"), false);
        assert_eq!(headers["x-accel-buffering"], "no");
        assert_eq!(headers["x-request-id"], "id");
        let mut headers = map(&[("content-type", "application/json"), ("x-request-id", "backend's")]);
        prepare_response(&mut headers, &HeaderValue::from_static("id"), false);
        assert!(!headers.contains_key("x-accel-buffering"));
        assert_eq!(headers["x-request-id"], "backend's");
    }
}
