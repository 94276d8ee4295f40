//! HTTP/2 in clear text, as a front proxy may speak it: each of its streams is served as a connection of its own.
//!
//! Backends speak HTTP/1.1, so a request has to become one of HTTP/1.1 somewhere. It does so here, at the door: hyper
//! takes the connection apart into requests, and each goes on over a pipe in memory to the one engine that serves all.
//! So there is one way a request is read, limited, retried and cut, and what holds for it holds for both versions.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version, header};
use http_body_util::{Either, Empty};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::{Rewound, Stopper};
use crate::proxy::Proxy;

/// Requests at a time on one connection.
const STREAMS_MAX: u32 = 256;
/// Largest list of headers, and what may wait to be written for one stream.
const BUFFER_BYTES: usize = 32 * 1024;
/// The pipe between a stream and the engine.
const PIPE_BYTES: usize = 16 * 1024;

type AnswerBody = Either<Incoming, Empty<Bytes>>;

/// Serves a connection, of which `first` has been read already, to its end.
pub(super) async fn serve(stream: TcpStream, first: Vec<u8>, proxy: Arc<Proxy>, client_ip: IpAddr, stopper: Stopper) {
    let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_send_buf_size(BUFFER_BYTES)
        .max_header_list_size(u32::try_from(BUFFER_BYTES).unwrap_or(u32::MAX))
        .keep_alive_interval(Duration::from_secs(30));
    let service = hyper::service::service_fn(move |request| {
        let proxy = proxy.clone();
        async move { Ok::<_, Infallible>(pass(request, proxy, client_ip).await) }
    });
    let connection = server.serve_connection(TokioIo::new(Rewound::new(stream, first)), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopper.begun() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP/2 connection ended");
    }
}

/// Serves one stream.
async fn pass(request: Request<Incoming>, proxy: Arc<Proxy>, client_ip: IpAddr) -> Response<AnswerBody> {
    let (here, there) = tokio::io::duplex(PIPE_BYTES);
    // Shutting down is between the client and hyper, which goes on taking streams until the client knows of it. A stream
    // that it took is a request under way, even if the engine has not read a byte of it.
    let closing = Stopper::default().closing();
    // Both tasks end with the pipe, and the pipe with the stream.
    #[allow(clippy::disallowed_methods)]
    tokio::spawn(async move { proxy.serve(there, Vec::new(), client_ip, closing).await });
    let answered = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(here)).await?;
        #[allow(clippy::disallowed_methods)]
        tokio::spawn(connection);
        sender.send_request(as_http1(request)).await
    };
    match answered.await {
        Ok(answer) => {
            let (mut head, body) = answer.into_parts();
            head.version = Version::HTTP_2;
            for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE] {
                head.headers.remove(name);
            }
            Response::from_parts(head, Either::Left(body))
        }
        Err(error) => {
            tracing::debug!(%error, "HTTP/2 stream ended without an answer");
            let mut answer = Response::new(Either::Right(Empty::new()));
            *answer.status_mut() = StatusCode::BAD_REQUEST;
            answer
        }
    }
}

/// The request as HTTP/1.1 would have it.
fn as_http1(request: Request<Incoming>) -> Request<Incoming> {
    let (mut head, body) = request.into_parts();
    head.version = Version::HTTP_11;
    if let Some(authority) = head.uri.authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok()) {
        // A `Host` that says something else stays beside it, and the engine refuses the two (RFC 9113, 8.3.1).
        let differs = |host: &HeaderValue| !host.as_bytes().eq_ignore_ascii_case(authority.as_bytes());
        if head.headers.get_all(header::HOST).iter().any(differs) {
            head.headers.append(header::HOST, authority);
        } else {
            head.headers.insert(header::HOST, authority);
        }
    }
    // HTTP/1.1 must be told that there is a body; the library tells it for some methods only.
    if !body.is_end_stream() && !head.headers.contains_key(header::CONTENT_LENGTH) {
        head.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let mut origin = http::uri::Parts::default();
    origin.path_and_query = head.uri.path_and_query().cloned();
    head.uri = Uri::from_parts(origin).unwrap_or_default();
    head.headers.remove(header::EXPECT);
    join_cookies(&mut head.headers);
    Request::from_parts(head, body)
}

/// HTTP/2 splits a cookie line into crumbs, which HTTP/1.1 knows as one line (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(line) = HeaderValue::try_from(crumbs.join(&b"; "[..])) {
        headers.insert(header::COOKIE, line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_crumbs_become_one_line_in_their_place() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("a", "1"), ("cookie", "x=1"), ("b", "2"), ("cookie", "y=2")] {
            headers.append(name, HeaderValue::from_static(value));
        }
        join_cookies(&mut headers);
        let lines: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(lines, [("a", "1"), ("cookie", "x=1; y=2"), ("b", "2")]);
    }
}
