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
        let found =
            (1..=text.len()).filter(|n| n % step == 0 || *n == text.len()).find_map(|n| end.find(&text[..n]).unwrap());
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
    let head =
        request("POST /v1/x?y=1 HTTP/1.1\r\nHost: a\r\nX-Kept:  é \r\nContent-Length: 5\r\nx-kept:\r\n\r\n").unwrap();
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
    let gone: Vec<_> = named.lines.iter().filter(|h| named.lines.is_named_by_connection(h)).map(|h| h.name).collect();
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
