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
