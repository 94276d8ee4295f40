//! Answers of the proxy's own: how they are sent, and what becomes of the connection then.

use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, header};

use super::{
    After, Asked,
    client::{Client, Transport},
    cors::Cors,
    exchange::RequestId,
    headers::{self, Common, Persistence},
};
use crate::{
    base::error::{DIALECT_HEADER, Dialect, ProxyError},
    wire::http1::body::BodyDecoder,
};

/// Most bytes of a body that are read after the answer to keep the connection. Past it the connection is told to end, and
/// only read for as long as the client goes on sending.
const REST_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Sends an answer of the proxy's own, then reads what is left of the request's body.
pub(super) async fn respond<S: Transport>(
    client: &mut Client<S>,
    asked: &Asked<'_>,
    response: &Response<Bytes>,
    body: BodyDecoder,
) -> After {
    // A client that waits for 100 has sent nothing, and may never.
    let never_asked_for = asked.head.expects_continue() && !body.is_done() && client.unread().is_empty();
    let mut connection = asked.persistence(false);
    if never_asked_for || !is_worth_reading(&body) {
        connection = Persistence::Close;
    }
    push_own(client, response, asked.head.method == Method::HEAD, &asked.common(connection));
    if client.flush().await.is_err() {
        return After::Abort { by_reset: false };
    }
    match connection {
        Persistence::Close => After::Close,
        _ => discard(client, body).await,
    }
}

/// Answers a client that sent no request that could be read.
pub(super) async fn refuse_connection<S: Transport>(client: &mut Client<S>, error: &ProxyError, cors: &Cors) {
    let (dialect, id) = (Dialect::OpenAi, RequestId::new());
    let common = Common {
        request_id: id.as_bytes(),
        dialect,
        connection: Persistence::Close,
        cross_origin: cors.says_to_nobody(),
    };
    push_own(client, &error.response(dialect), false, &common);
}

fn push_own<S: Transport>(client: &mut Client<S>, response: &Response<Bytes>, is_head: bool, common: &Common<'_>) {
    let body = response.body();
    let (status, headers, now) = (response.status(), response.headers(), SystemTime::now());
    headers::push_own(client.outbox(), status, headers, body.len(), common, now);
    if !is_head {
        client.outbox().extend_from_slice(body);
    }
}

/// The rest of the body is small enough to be read for the sake of the connection. A client that is told of the end of its
/// connection may spare itself the rest.
fn is_worth_reading(body: &BodyDecoder) -> bool {
    !body.is_broken() && body.left().is_none_or(|left| left <= REST_BYTES_MAX)
}

/// Reads what is left of a body that nobody wants: what stands behind it is the next request.
pub(super) async fn discard<S: Transport>(client: &mut Client<S>, mut body: BodyDecoder) -> After {
    while !body.is_done() {
        let Ok(decoded) = body.decode(client.unread()) else { return After::Close };
        let consumed = decoded.consumed;
        client.take(consumed);
        if !body.is_done() && client.unread().is_empty() && client.more_unwanted().await.is_err() {
            return After::Close;
        }
    }
    client.has_caught_up();
    After::KeepAlive
}

/// An answer that tells of models, in the shape that its client asked for.
pub(super) fn models(body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::VARY, HeaderValue::from_static(DIALECT_HEADER));
    response
}
