//! What one request carries from its head to the end of its answer.

use std::net::IpAddr;

use super::{
    account::{Account, RequestId},
    client::{Client, Gone, Transport},
    cors::CrossOrigin,
    headers::{Common, Persistence},
    state::Proxy,
    trace::Trace,
};
use crate::{
    base::error::{Dialect, ProxyError},
    data::replay::{BodyFault, Replay},
    wire::{
        http1::head::{Known, Lines, RequestHead, Version},
        scan::ScanError,
    },
};

/// Why a body had to give way: others waited for the memory that it took.
pub(super) const GAVE_WAY: &str =
    "the `model` of a body that took up room which others needed (put `model` first in the body)";

/// A request that is forwarded, with all that is done for it. Its methods are the steps of its life, one file each.
pub(super) struct Call<'r, S> {
    pub(super) proxy: &'r Proxy,
    pub(super) client: &'r mut Client<S>,
    pub(super) asked: Asked<'r>,
    /// Its path is below `/v1`, which the backend may have elsewhere.
    pub(super) is_below_v1: bool,
    /// Its body, as far as it has come.
    pub(super) replay: Replay,
    pub(super) account: Account<'r>,
}

/// A request with what is known of it from its head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'r> {
    pub(super) head: &'r RequestHead,
    pub(super) id: &'r RequestId<'r>,
    pub(super) client_ip: IpAddr,
    /// In whose shape this client reads errors.
    pub(super) dialect: Dialect,
    /// What its answer says of other origins' scripts.
    pub(super) cross_origin: CrossOrigin<'r>,
    /// The client's connection may carry another request.
    keeps_alive: bool,
}

/// What becomes of the client's connection after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// The next request may come.
    KeepAlive,
    /// It is closed in an orderly way.
    Close,
    /// It is ended at once.
    Abort {
        /// So that its end is not taken for the end of an answer.
        by_reset: bool,
    },
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The client is told why.
    Error(ProxyError),
    /// The client left.
    Gone,
}

impl From<ProxyError> for NoAnswer {
    fn from(error: ProxyError) -> NoAnswer {
        NoAnswer::Error(error)
    }
}

impl From<Gone> for NoAnswer {
    fn from(Gone: Gone) -> NoAnswer {
        NoAnswer::Gone
    }
}

// === impl Call ===

impl<'r, S: Transport> Call<'r, S> {
    /// A request that is about to be forwarded.
    pub(super) fn new(proxy: &'r Proxy, client: &'r mut Client<S>, asked: Asked<'r>, is_below_v1: bool) -> Call<'r, S> {
        let trace = Trace::begin(proxy.tracing.as_ref(), asked.head);
        let account = Account::new(asked.head, asked.id, asked.client_ip, trace, &proxy.metrics, proxy.access_log);
        let replay = Replay::new(asked.head.framing, None, &proxy.limits);
        Call { proxy, client, asked, is_below_v1, replay, account }
    }
}

// === impl Asked ===

impl<'r> Asked<'r> {
    /// The request with this head, of a client at `client_ip`. `is_last`: the connection ends after it.
    pub(super) fn new(
        proxy: &'r Proxy,
        head: &'r RequestHead,
        id: &'r RequestId<'r>,
        client_ip: IpAddr,
        is_last: bool,
    ) -> Asked<'r> {
        Asked {
            head,
            id,
            client_ip,
            dialect: dialect(head.path(), &head.lines),
            cross_origin: proxy.cors.says(&head.lines),
            // A client that keeps its connection while the proxy shuts down would lose the request that it sends just when
            // the connection is closed.
            keeps_alive: head.wants_keep_alive() && !is_last && !proxy.admin.life.is_stopping(),
        }
    }

    /// What every answer to it says.
    pub(super) fn common(&self, connection: Persistence) -> Common<'_> {
        Common { request_id: self.id.as_bytes(), dialect: self.dialect, connection, cross_origin: self.cross_origin }
    }

    /// What is said of the client's connection. `ends_by_close`: only its end can end this answer.
    pub(super) fn persistence(&self, ends_by_close: bool) -> Persistence {
        match self.head.version {
            _ if ends_by_close || !self.keeps_alive => Persistence::Close,
            Version::Http11 => Persistence::Unsaid,
            Version::Http10 => Persistence::KeepAlive,
        }
    }
}

// === errors that are the request's own ===

/// What a client is told of its body.
pub(super) fn body_error(proxy: &Proxy, fault: BodyFault) -> ProxyError {
    match fault {
        BodyFault::Scan(error @ ScanError::UnsupportedCoding { .. }) => {
            ProxyError::UnsupportedEncoding { message: error.to_string() }
        }
        BodyFault::Scan(error @ ScanError::DecodesTooLarge { .. }) => {
            ProxyError::DecodesTooLarge { message: error.to_string() }
        }
        BodyFault::Scan(ScanError::ModelTooLong { begin }) => {
            ProxyError::ModelNotFound { model: format!("{begin}…") }
        }
        BodyFault::Scan(error) => ProxyError::BadRequest { code: error.code(), message: error.to_string() },
        BodyFault::Framing(error) => ProxyError::BadRequest {
            code: "invalid_request",
            message: format!("the request's body is broken: {error}"),
        },
        BodyFault::TooLarge => {
            ProxyError::TooLarge { limit_bytes: proxy.limits.max_body_bytes, knob: "PROXY_MAX_BODY" }
        }
        BodyFault::HoldTooLarge => ProxyError::TooLarge {
            limit_bytes: proxy.limits.hold_max_bytes as u64,
            knob: "PROXY_HOLD_MAX; put `model` first in the body",
        },
        BodyFault::GaveWay => ProxyError::RequestTimeout { what: GAVE_WAY },
        BodyFault::HoldFull => {
            let what = "too many request bodies are being held".to_owned();
            ProxyError::Overloaded { what, retry_after: None }
        }
    }
}

/// A model name as it may stand in a message.
pub(super) fn bounded(model: &str) -> String {
    const SHOWN_CHARS: usize = 200;
    match model.char_indices().nth(SHOWN_CHARS) {
        None => model.to_owned(),
        Some((end, _)) => format!("{}…", &model[..end]),
    }
}

/// In whose shape this client reads errors.
fn dialect(path: &str, lines: &Lines) -> Dialect {
    let messages = path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if messages || lines.has(Known::AnthropicVersion) { Dialect::Anthropic } else { Dialect::OpenAi }
}
