//! Answers of the proxy's own: models, pages, refusals; how they are sent, and what becomes of the connection then.

use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, header};
use tokio::time::timeout;

use super::{
    account::{Account, RequestId},
    call::{After, Asked, bounded},
    client::{Client, Gone, Transport},
    cors::Cors,
    failure::Ending,
    headers::{self, Common, Delivery, Persistence},
    state::Proxy,
    trace::Trace,
};
use crate::{
    base::error::{DIALECT_HEADER, Dialect, ProxyError},
    observe::pages::{
        Page,
        live::{self, Watcher},
    },
    wire::http1::body::{BodyDecoder, Framing, LAST_CHUNK, push_chunk},
};

/// Most bytes of a body that are read after the answer to keep the connection. Past it the connection is told to end, and
/// only read for as long as the client goes on sending.
const REST_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Sends an answer of the proxy's own to a request that no backend is needed for.
pub(super) async fn answer<S: Transport>(
    proxy: &Proxy,
    client: &mut Client<S>,
    asked: &Asked<'_>,
    response: &Response<Bytes>,
) -> After {
    let trace = Trace::begin(proxy.tracing.as_ref(), asked.head);
    let mut account = Account::new(asked.head, asked.id, asked.client_ip, trace, &proxy.metrics, proxy.access_log);
    account.answered_by_proxy(response);
    account.end(Ending::Complete);
    respond(client, asked, response, BodyDecoder::new(asked.head.framing)).await
}

/// Shows a page. Such requests are not counted, because looking at the proxy must not change what is seen.
pub(super) async fn show_page<S: Transport>(
    proxy: &Proxy,
    client: &mut Client<S>,
    asked: &Asked<'_>,
    page: Page,
) -> After {
    let accept: Vec<&[u8]> = asked.head.lines.all_named("accept").collect();
    let response = match proxy.admin.watch(page, &asked.head.method, &accept) {
        Some(Ok(watcher)) => return stream_status(client, asked, watcher).await,
        Some(Err(refused)) => Ok(refused),
        None => client.unless_gone(proxy.admin.show(page, &accept)).await,
    };
    match response {
        Ok(response) => respond(client, asked, &response, BodyDecoder::new(asked.head.framing)).await,
        Err(Gone) => After::Abort { by_reset: false },
    }
}

/// The answer to `/v1/models`.
pub(super) fn list_models(proxy: &Proxy, asked: &Asked<'_>) -> Response<Bytes> {
    if !matches!(asked.head.method, Method::GET | Method::HEAD) {
        return proxy.reject(&ProxyError::MethodNotAllowed { allow: "GET, HEAD" }, asked.dialect);
    }
    let table = proxy.table.snapshot();
    models(match asked.dialect {
        Dialect::OpenAi => table.openai_list(),
        Dialect::Anthropic => table.anthropic_list(),
    })
}

/// The answer to `/v1/models/{id}`.
pub(super) fn show_model(proxy: &Proxy, id: &str, dialect: Dialect) -> Response<Bytes> {
    let table = proxy.table.snapshot();
    // A slash behind the name makes no difference, unless a name ends in one.
    let object = table.object(id).or_else(|| table.object(id.trim_end_matches('/')));
    match (object, dialect) {
        (Some(object), Dialect::OpenAi) => models(Bytes::copy_from_slice(object.json.get().as_bytes())),
        (Some(object), Dialect::Anthropic) => models(Bytes::from(object.to_anthropic().to_string())),
        (None, dialect) => proxy.reject(&ProxyError::ModelNotFound { model: bounded(id) }, dialect),
    }
}

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

/// Reads what is left of a body that is not needed: what stands behind it is the next request.
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
fn models(body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::VARY, HeaderValue::from_static(DIALECT_HEADER));
    response
}

/// Sends the status as it changes, until `watcher` or the client ends it. The connection ends with it.
async fn stream_status<S: Transport>(client: &mut Client<S>, asked: &Asked<'_>, mut watcher: Watcher) -> After {
    const ABORT: After = After::Abort { by_reset: false };
    let delivery = Delivery::of(Framing::Chunked, asked.head.version);
    let (common, now) = (asked.common(Persistence::Close), SystemTime::now());
    headers::push_own_stream(client.outbox(), &live::head(), delivery, &common, now);
    loop {
        // A client that does not read must not keep its watcher.
        if !matches!(timeout(live::PATIENCE, client.flush()).await, Ok(Ok(()))) {
            return ABORT;
        }
        let piece: Option<Bytes> = match client.unless_gone(watcher.next()).await {
            Ok(piece) => piece,
            Err(Gone) => return ABORT,
        };
        match (piece, delivery) {
            (Some(piece), Delivery::Chunked) => push_chunk(client.outbox(), &piece),
            (Some(piece), _) => client.outbox().extend_from_slice(&piece),
            (None, Delivery::Chunked) => {
                client.outbox().extend_from_slice(LAST_CHUNK);
                return After::Close;
            }
            (None, _) => return After::Close,
        }
    }
}
