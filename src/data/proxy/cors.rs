//! Which origins' scripts may read answers, and what browsers are told that ask before they send.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};

use crate::wire::http1::head::{Known, Lines, RequestHead};

/// What an answer says of other origins' scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrossOrigin<'a> {
    /// Nothing, whichever origin asks: it is not for the proxy to say.
    Unsaid,
    /// Nothing, because this request has no origin, or one that is not allowed. Another one may be.
    Refused,
    /// They may read it: the value of `Access-Control-Allow-Origin`.
    Allowed(&'a [u8]),
}

impl CrossOrigin<'_> {
    /// The origin that asks may read the answer.
    pub fn is_allowed(self) -> bool {
        matches!(self, CrossOrigin::Allowed(_))
    }
}

/// Whether this is a question that a browser asks before it sends a request of a script (Fetch, 3.2.2).
pub(super) fn is_preflight(head: &RequestHead) -> bool {
    head.method == Method::OPTIONS
        && head.lines.has(Known::Origin)
        && head.lines.named("access-control-request-method").is_some()
}

/// Which origins' scripts may read answers.
#[derive(Debug, Clone)]
pub(super) enum Cors {
    /// None, as far as it is for the proxy to say.
    Off,
    /// Every origin's.
    Any,
    /// Those of these origins.
    Listed(Vec<String>),
}

impl Cors {
    /// The policy for these origins, `*` among them meaning all.
    pub(super) fn new(origins: &[String]) -> Cors {
        match origins {
            [] => Cors::Off,
            origins if origins.iter().any(|origin| origin == "*") => Cors::Any,
            origins => Cors::Listed(origins.to_vec()),
        }
    }

    /// What the answer to a request with these headers says.
    pub(super) fn says<'l>(&self, lines: &'l Lines) -> CrossOrigin<'l> {
        let origin = lines.first(Known::Origin);
        let allowed = match self {
            Cors::Off => return CrossOrigin::Unsaid,
            Cors::Any => origin.map(|_| &b"*"[..]),
            Cors::Listed(origins) => {
                origin.filter(|origin| origins.iter().any(|allowed| allowed.as_bytes() == *origin))
            }
        };
        allowed.map_or(CrossOrigin::Refused, CrossOrigin::Allowed)
    }

    /// What the answer to a request that could not be read says.
    pub(super) fn says_to_nobody(&self) -> CrossOrigin<'static> {
        if matches!(self, Cors::Off) { CrossOrigin::Unsaid } else { CrossOrigin::Refused }
    }

    /// The answer to a preflight: what the browser asked about is allowed where its origin is.
    pub(super) fn preflight(&self, head: &RequestHead, cross_origin: CrossOrigin<'_>) -> Response<Bytes> {
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        if cross_origin.is_allowed() {
            let methods = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            let wanted = head.lines.named("access-control-request-headers");
            if let Some(wanted) = wanted.and_then(|value| HeaderValue::from_bytes(value).ok()) {
                headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted);
            }
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
            headers.insert(header::VARY, HeaderValue::from_static("access-control-request-headers"));
        }
        response
    }
}
