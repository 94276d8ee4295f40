//! One stream: its request as HTTP/1.1 has it, into a pipe to the engine, and the engine's answer back.
//!
//! Both go on at the same time, because an answer may come before its request is over. What a client still sends then goes
//! on to the engine, which throws it away as it does for HTTP/1.1: a stream that is reset early may cost the answer.

use std::{
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf, WriteHalf},
    sync::Notify,
    time::timeout,
};

use super::super::{
    Stopper,
    places::{Places, STREAM},
};
use crate::{
    data::proxy::{Site, client::with_scratch},
    wire::http1::{
        body::{BodyDecoder, Framing, LAST_CHUNK, push_chunk, push_last_chunk},
        head::{HeadEnd, Lines, ResponseHead},
    },
};

/// The pipe between a stream and the engine, and the largest piece of an answer that is read at a time.
const PIPE_BYTES: usize = 16 * 1024;

/// How long the last words of a broken answer may take.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

/// Why a stream ended before its answer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// The client has reset it, or the connection is gone.
    ByClient,
    /// The engine broke off, as it does when the backend does.
    ByEngine,
    /// The client did not take any of the answer for too long.
    Stalled,
}

/// The answer, as it comes out of the pipe.
struct Answer {
    pipe: ReadHalf<DuplexStream>,
    /// Come, and not yet passed on.
    inbox: Vec<u8>,
    write_limit: Option<Duration>,
    /// Told when the connection has sent all that it may.
    flushed: Arc<Notify>,
}

/// Serves one stream, once there is room for it in `places`.
pub(super) async fn serve(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    site: Site,
    client_ip: IpAddr,
    places: Option<Arc<Places>>,
    flushed: Arc<Notify>,
) {
    let _place = match places {
        None => None,
        Some(places) => {
            let waiting = places.wait(STREAM);
            tokio::pin!(waiting);
            let place = std::future::poll_fn(|cx| match respond.poll_reset(cx) {
                Poll::Ready(_) => Poll::Ready(None),
                Poll::Pending => waiting.as_mut().poll(cx).map(Some),
            });
            match place.await {
                None => return,
                place => place,
            }
        }
    };
    let (here, there) = tokio::io::duplex(PIPE_BYTES);
    let write_limit = site.patience().write;
    // Shutting down is between the client and the library, which goes on taking streams until the client knows of it. A
    // stream that it took is a request under way, even if the engine has not read a byte of it.
    let closing = Stopper::default().closing();
    // Ends with the pipe, and the pipe with the stream.
    let engine = tokio::spawn(async move { site.serve(there, Vec::new(), client_ip, closing).await });
    let (pipe, mut to_engine) = tokio::io::split(here);
    let is_head = request.method() == Method::HEAD;
    let mut answer = Answer { pipe, inbox: Vec::new(), write_limit, flushed };
    let mut upload = Box::pin(async move { upload(request, &mut to_engine).await });
    let mut is_uploaded = false;
    let passed = {
        let passing = answer.pass(&mut respond, is_head);
        tokio::pin!(passing);
        loop {
            tokio::select! {
                biased;
                passed = &mut passing => break passed,
                uploaded = &mut upload, if !is_uploaded => match uploaded {
                    Ok(()) => is_uploaded = true,
                    Err(broken) => break Err(broken),
                },
            }
        }
    };
    match passed {
        Ok(()) if is_uploaded => {}
        // The engine reads on for as long as it has patience. That it says no more is not yet its end.
        Ok(()) => tokio::select! {
            _ = &mut upload => {}
            _ = engine => {}
        },
        Err(Broken::ByClient) => {}
        Err(Broken::ByEngine) => respond.send_reset(Reason::INTERNAL_ERROR),
        Err(Broken::Stalled) => {
            tracing::debug!("an HTTP/2 stream took nothing of its answer and is given up (PROXY_CLIENT_WRITE_TIMEOUT)");
            respond.send_reset(Reason::CANCEL);
        }
    }
}

/// Sends the request to the engine, and its body as it comes.
///
/// # Errors
/// The client has broken off. That the engine takes no more is none: it has answered, or will.
async fn upload(request: Request<RecvStream>, engine: &mut WriteHalf<DuplexStream>) -> Result<(), Broken> {
    let (head, mut body) = request.into_parts();
    let is_chunked = !body.is_end_stream() && !head.headers.contains_key(header::CONTENT_LENGTH);
    let bytes = as_http1(&head, is_chunked);
    // Large heads are refused, and the client's copy of one is not needed for that.
    drop(head);
    let mut is_taken = engine.write_all(&bytes).await.is_ok();
    drop(bytes);
    let mut framed = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(|_| Broken::ByClient)?;
        if is_taken && is_chunked && !data.is_empty() {
            framed.clear();
            push_chunk(&mut framed, &data);
            is_taken = engine.write_all(&framed).await.is_ok();
        } else if is_taken {
            is_taken = engine.write_all(&data).await.is_ok();
        }
        if !is_taken {
            return Ok(());
        }
        body.flow_control().release_capacity(data.len()).map_err(|_| Broken::ByClient)?;
    }
    let trailers = body.trailers().await.map_err(|_| Broken::ByClient)?;
    if is_taken && is_chunked {
        framed.clear();
        match trailers {
            None => framed.extend_from_slice(LAST_CHUNK),
            Some(trailers) => {
                let mut lines = Vec::new();
                trailers.iter().for_each(|(name, value)| push_line(&mut lines, name, value.as_bytes()));
                push_last_chunk(&mut framed, &lines);
            }
        }
        let _ = engine.write_all(&framed).await;
    }
    Ok(())
}

/// The head of the request as HTTP/1.1 has it.
fn as_http1(head: &http::request::Parts, is_chunked: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    let target = head.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    for part in [head.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
    if let Some(authority) = authority {
        push_line(&mut out, &header::HOST, authority);
    }
    let mut has_cookies = false;
    for (name, value) in &head.headers {
        match *name {
            // One that says something else stays, and the engine refuses the two (RFC 9113, 8.3.1).
            header::HOST if authority.is_some_and(|host| host.eq_ignore_ascii_case(value.as_bytes())) => {}
            header::COOKIE if std::mem::replace(&mut has_cookies, true) => {}
            header::COOKIE => push_line(&mut out, name, &cookies(&head.headers)),
            _ => push_line(&mut out, name, value.as_bytes()),
        }
    }
    if is_chunked {
        push_line(&mut out, &header::TRANSFER_ENCODING, b"chunked");
    }
    out.extend_from_slice(b"\r\n");
    out
}

fn push_line(out: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    for part in [name.as_str().as_bytes(), b": ", value, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

/// HTTP/2 splits a cookie line into crumbs, which HTTP/1.1 knows as one line (RFC 9113, 8.2.3).
fn cookies(headers: &HeaderMap) -> Vec<u8> {
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    crumbs.join(&b"; "[..])
}

// === impl Answer ===

impl Answer {
    /// Passes the answer on, interim ones before it too.
    async fn pass(&mut self, respond: &mut SendResponse<Bytes>, is_head: bool) -> Result<(), Broken> {
        let mut end = HeadEnd::default();
        let head = loop {
            let length = match end.find(&self.inbox) {
                Ok(Some(length)) => length,
                Ok(None) => {
                    self.read(|cx| respond.poll_reset(cx).is_ready()).await?;
                    continue;
                }
                Err(_) => return Err(Broken::ByEngine),
            };
            let head = ResponseHead::read(&self.inbox[..length]).map_err(|_| Broken::ByEngine)?;
            self.inbox.drain(..length);
            if !head.status.is_informational() {
                break head;
            }
            // A hint: if it cannot be sent, what follows cannot either.
            let _ = respond.send_informational(as_http2(&head));
        };
        let has_body = !is_head && !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let mut decoder = BodyDecoder::new(if has_body { head.framing } else { Framing::Empty });
        let response = as_http2(&head);
        drop(head);
        let mut stream = respond.send_response(response, decoder.is_done()).map_err(|_| Broken::ByClient)?;
        if decoder.is_done() {
            return Ok(());
        }
        let mut has_ended = false;
        while !decoder.is_done() {
            if self.inbox.is_empty() {
                match self.read(|cx| stream.poll_reset(cx).is_ready()).await {
                    Err(Broken::ByEngine) if decoder.may_end_by_close() => break,
                    Err(Broken::ByEngine) => {
                        self.send_last_words(&mut stream).await;
                        return Err(Broken::ByEngine);
                    }
                    read => read?,
                }
            }
            let inbox = Bytes::from(std::mem::take(&mut self.inbox));
            let mut at = 0;
            while at < inbox.len() && !decoder.is_done() {
                let decoded = decoder.decode(&inbox[at..]).map_err(|_| Broken::ByEngine)?;
                let payload = inbox.slice_ref(decoded.payload);
                at += decoded.consumed;
                has_ended = decoder.is_done() && decoder.trailers().is_empty() && !payload.is_empty();
                self.send(&mut stream, payload, has_ended).await?;
            }
        }
        let trailers = trailers_of(decoder.trailers());
        let ended = match trailers.is_empty() {
            _ if has_ended => Ok(()),
            true => stream.send_data(Bytes::new(), true),
            false => stream.send_trailers(trailers),
        };
        ended.map_err(|_| Broken::ByClient)
    }

    /// Reads once, unless the stream is reset first.
    async fn read(&mut self, mut is_reset: impl FnMut(&mut Context<'_>) -> bool) -> Result<(), Broken> {
        std::future::poll_fn(|cx| {
            if is_reset(cx) {
                return Poll::Ready(Err(Broken::ByClient));
            }
            let Answer { pipe, inbox, .. } = self;
            with_scratch(|scratch| {
                let mut buf = ReadBuf::new(&mut scratch[..PIPE_BYTES]);
                match ready!(Pin::new(pipe).poll_read(cx, &mut buf)) {
                    Ok(()) if !buf.filled().is_empty() => {
                        inbox.extend_from_slice(buf.filled());
                        Poll::Ready(Ok(()))
                    }
                    Ok(()) | Err(_) => Poll::Ready(Err(Broken::ByEngine)),
                }
            })
        })
        .await
    }

    /// Sends these bytes as far as the client opens its window for them, and waits for it while it does so at all.
    async fn send(&self, stream: &mut SendStream<Bytes>, mut bytes: Bytes, is_last: bool) -> Result<(), Broken> {
        while !bytes.is_empty() {
            stream.reserve_capacity(bytes.len());
            let room = std::future::poll_fn(|cx| match stream.poll_reset(cx) {
                Poll::Ready(_) => Poll::Ready(None),
                Poll::Pending if stream.capacity() > 0 => Poll::Ready(Some(Ok(stream.capacity()))),
                Poll::Pending => stream.poll_capacity(cx),
            });
            let room = match self.write_limit {
                Some(limit) => timeout(limit, room).await.map_err(|_| Broken::Stalled)?,
                None => room.await,
            };
            let Some(Ok(room)) = room else { return Err(Broken::ByClient) };
            let piece = bytes.split_to(room.min(bytes.len()));
            stream.send_data(piece, is_last && bytes.is_empty()).map_err(|_| Broken::ByClient)?;
        }
        Ok(())
    }

    /// Waits until what has been handed over is sent: a reset takes everything with it that still waits, and the end of a
    /// broken stream of events says why it broke.
    async fn send_last_words(&self, stream: &mut SendStream<Bytes>) {
        let flushed = self.flushed.notified();
        tokio::pin!(flushed);
        flushed.as_mut().enable();
        // Behind everything else, so that there is something to send.
        if stream.send_data(Bytes::new(), false).is_ok() {
            let is_reset = std::future::poll_fn(|cx| stream.poll_reset(cx));
            tokio::select! {
                _ = timeout(LAST_WORDS_TIME, flushed) => {}
                _ = is_reset => {}
            }
        }
    }
}

/// The head of an answer as HTTP/2 has it: what belongs to one connection is left out (RFC 9113, 8.2.2).
fn as_http2(head: &ResponseHead) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = head.status;
    *response.headers_mut() = map_of(&head.lines);
    response
}

fn map_of(lines: &Lines) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(16);
    for line in lines.iter().filter(|line| !line.known.is_hop_by_hop()) {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(line.name), HeaderValue::from_bytes(line.value)) {
            map.append(name, value);
        }
    }
    map
}

/// Trailer lines, each with its line end.
fn trailers_of(lines: &[u8]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(build: impl FnOnce(http::request::Builder) -> http::request::Builder) -> http::request::Parts {
        build(Request::builder().uri("http://front.test/v1/x?y")).body(()).unwrap().into_parts().0
    }

    fn text(head: &http::request::Parts, is_chunked: bool) -> String {
        String::from_utf8(as_http1(head, is_chunked)).unwrap()
    }

    #[test]
    fn cookie_crumbs_become_one_line_in_their_place() {
        let head = head(|b| b.header("a", "1").header("cookie", "x=1").header("b", "2").header("cookie", "y=2"));
        let expected = "GET /v1/x?y HTTP/1.1\r\nhost: front.test\r\na: 1\r\ncookie: x=1; y=2\r\nb: 2\r\n\r\n";
        assert_eq!(text(&head, false), expected);
    }

    #[test]
    fn a_host_line_is_the_authority_or_refused_beside_it() {
        let same = head(|b| b.header("host", "FRONT.test"));
        assert_eq!(text(&same, false), "GET /v1/x?y HTTP/1.1\r\nhost: front.test\r\n\r\n");
        let other = head(|b| b.header("host", "other.test"));
        assert_eq!(text(&other, false), "GET /v1/x?y HTTP/1.1\r\nhost: front.test\r\nhost: other.test\r\n\r\n");
    }

    #[test]
    fn a_body_without_a_length_is_in_chunks_whatever_the_method() {
        for method in ["GET", "POST", "PURGE"] {
            let head = head(|b| b.method(method));
            assert!(text(&head, true).ends_with("transfer-encoding: chunked\r\n\r\n"), "{method}");
        }
    }

    #[test]
    fn what_belongs_to_one_connection_is_left_out_of_an_answer() {
        let head = ResponseHead::read(
            b"HTTP/1.1 426 Upgrade Required\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-A: 1\r\nx-a: 2\r\n\r\n",
        );
        let response = as_http2(&head.unwrap());
        let lines: Vec<_> = response.headers().iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        assert_eq!((response.status().as_u16(), lines), (426, vec![("x-a", "1"), ("x-a", "2")]));
    }

    #[test]
    fn trailers_are_read_line_by_line() {
        let map = trailers_of(b"x-sum: 9\r\nX-Sum:8 \r\nno line\r\n");
        assert_eq!(map.get_all("x-sum").iter().collect::<Vec<_>>(), ["9", "8"]);
        assert_eq!(map.len(), 2);
    }
}
