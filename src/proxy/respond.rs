//! Answers of the proxy's own: how they are sent, and what becomes of the connection then.

use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, header};
use tokio::time::timeout;

use super::{
    After, Asked,
    client::{Client, Transport},
    cors::Cors,
    exchange::RequestId,
    headers::{self, Common, Persistence},
};
use crate::{
    error::{DIALECT_HEADER, Dialect, ProxyError},
    http1::body::BodyDecoder,
};

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
    if never_asked_for || !can_discard::<S>(&body) {
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

/// What stands behind the body can be come by.
fn can_discard<S: Transport>(body: &BodyDecoder) -> bool {
    let (bytes_max, _) = Client::<S>::discard_limits();
    !body.is_broken() && body.left().is_none_or(|left| left <= bytes_max)
}

/// Reads what is left of a body that nobody wants, within bounds: what stands behind it is the next request.
pub(super) async fn discard<S: Transport>(client: &mut Client<S>, mut body: BodyDecoder) -> After {
    if body.is_done() {
        return After::KeepAlive;
    }
    if !can_discard::<S>(&body) {
        return After::Close;
    }
    let (bytes_max, time) = Client::<S>::discard_limits();
    let reading = async {
        let mut left = bytes_max;
        loop {
            let unread = client.unread();
            let Ok(decoded) = body.decode(unread) else { return After::Close };
            let consumed = decoded.consumed;
            client.take(consumed);
            if body.is_done() {
                return After::KeepAlive;
            }
            let Some(rest) = left.checked_sub(consumed as u64) else { return After::Close };
            left = rest;
            if client.unread().is_empty() && client.more_body().await.is_err() {
                return After::Abort { by_reset: false };
            }
        }
    };
    timeout(time, reading).await.unwrap_or(After::Close)
}

/// An answer that tells of models, in the shape that its client asked for.
pub(super) fn models(body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::VARY, HeaderValue::from_static(DIALECT_HEADER));
    response
}
