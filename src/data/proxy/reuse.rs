//! Whether a backend's connection may carry another request. Pure.
//!
//! A connection is used again only if nothing about the exchange leaves a doubt where the next answer begins. Servers
//! differ in when they read the body of a request and when they write one for an answer; a body that one of them leaves
//! unread is the next request to it, and a body that it should not have written is the next answer to us.

use http::{Method, StatusCode};

use crate::wire::http1::{
    body::Framing,
    head::{Known, RequestHead, ResponseHead},
};

/// The request is the last one on its connection, and says so: it has a body that not every server would read.
pub fn is_last(request: &RequestHead) -> bool {
    has_body(request) && !matches!(request.method, Method::POST | Method::PUT | Method::PATCH)
}

/// By its head and that of its answer, nothing of this exchange is left on the connection behind the end of the answer.
pub fn is_certain(request: &RequestHead, answer: &ResponseHead) -> bool {
    // An error may come from a server that has not read the body; so may a redirect.
    let is_body_read = !has_body(request) || (!is_last(request) && answer.status.is_success());
    // Some servers write a body where there must be none.
    let may_have_body = request.method != Method::HEAD
        && !matches!(answer.status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED);
    // A server that was asked to change the protocol may have done so without saying it.
    let is_http = !request.lines.has(Known::Upgrade) && answer.status != StatusCode::SWITCHING_PROTOCOLS;
    // The length was said once, in one way.
    let lengths = answer.lines.all(Known::ContentLength).count();
    let is_length_clear = lengths + answer.lines.all(Known::TransferEncoding).count() == 1;
    answer.reusable && is_body_read && may_have_body && is_http && is_length_clear
}

fn has_body(request: &RequestHead) -> bool {
    request.framing != Framing::Empty
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(line: &str, lines: &str) -> RequestHead {
        let mut head = RequestHead::default();
        head.read(format!("{line} / HTTP/1.1\r\nhost: a\r\n{lines}\r\n").as_bytes()).unwrap();
        head
    }

    fn answer(status: &str, lines: &str) -> ResponseHead {
        ResponseHead::read(format!("HTTP/1.1 {status} x\r\n{lines}\r\n").as_bytes()).unwrap()
    }

    const LENGTH: &str = "content-length: 2\r\n";
    const CHUNKED: &str = "transfer-encoding: chunked\r\n";

    #[test]
    fn a_body_on_a_method_that_calls_for_none_is_the_last_request() {
        for body in [LENGTH, CHUNKED] {
            for method in ["GET", "HEAD", "OPTIONS", "DELETE", "TRACE", "QUERY", "PURGE", "post", "PROPFIND"] {
                assert!(is_last(&request(method, body)), "{method} {body:?}");
                assert!(!is_last(&request(method, "")), "{method}");
                assert!(!is_last(&request(method, "content-length: 0\r\n")), "{method}");
                assert!(!is_certain(&request(method, body), &answer("200", LENGTH)), "{method} {body:?}");
            }
            for method in ["POST", "PUT", "PATCH"] {
                assert!(!is_last(&request(method, body)), "{method}");
                assert!(is_certain(&request(method, body), &answer("200", LENGTH)), "{method} {body:?}");
            }
        }
    }

    #[test]
    fn what_leaves_a_doubt() {
        let post = || request("POST", LENGTH);
        let empty = || request("POST", "content-length: 0\r\n");
        let get = || request("GET", "");
        let upgrade = request("GET", "connection: upgrade\r\nupgrade: websocket\r\n");
        let cases = [
            (post(), answer("200", CHUNKED), true),
            (post(), answer("201", LENGTH), true),
            (post(), answer("200", "content-length: 0\r\n"), true),
            // Perhaps its body was not read.
            (post(), answer("307", LENGTH), false),
            (post(), answer("400", LENGTH), false),
            (post(), answer("431", LENGTH), false),
            (post(), answer("500", CHUNKED), false),
            (empty(), answer("400", LENGTH), true),
            (get(), answer("404", LENGTH), true),
            (get(), answer("500", CHUNKED), true),
            // Perhaps there is a body all the same.
            (request("HEAD", ""), answer("200", LENGTH), false),
            (request("HEAD", ""), answer("200", ""), false),
            (get(), answer("204", ""), false),
            (get(), answer("204", LENGTH), false),
            (get(), answer("205", "content-length: 0\r\n"), false),
            (get(), answer("304", LENGTH), false),
            // Perhaps it ends elsewhere.
            (get(), answer("200", ""), false),
            (get(), answer("200", "content-length: 2\r\ntransfer-encoding: chunked\r\n"), false),
            (get(), answer("200", "content-length: 2\r\ncontent-length: 2\r\n"), false),
            (get(), answer("200", "content-length: 2\r\nconnection: close\r\n"), false),
            (get(), answer("200", "content-length: 2\r\nconnection: x, Close\r\n"), false),
            // Perhaps this is not HTTP any more.
            (upgrade, answer("200", LENGTH), false),
            (get(), answer("101", ""), false),
        ];
        for (request, answer, expect) in cases {
            let what = format!("{} {:?}: {answer:?}", request.method, request.framing);
            assert_eq!(is_certain(&request, &answer), expect, "{what}");
        }
        // HTTP/1.0 closes, whatever it says.
        let old = ResponseHead::read(b"HTTP/1.0 200 x\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n").unwrap();
        assert!(!is_certain(&get(), &old));
    }
}
