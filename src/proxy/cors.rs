//! Which origins' scripts may read answers, and what browsers are told that ask before they send.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};

use super::Asked;
use crate::http1::head::{Known, Lines};

/// Which origins' scripts may read answers.
#[derive(Debug, Clone)]
pub(super) enum Cors {
    /// Nobody's, as far as it is for the proxy to say.
    Off,
    /// Everybody's.
    Any,
    /// Theirs.
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

    /// The origin to allow, if this request's is.
    pub(super) fn allow<'l>(&self, lines: &'l Lines) -> Option<&'l [u8]> {
        match self {
            Cors::Off => None,
            Cors::Any => lines.first(Known::Origin).map(|_| &b"*"[..]),
            Cors::Listed(origins) => {
                lines.first(Known::Origin).filter(|origin| origins.iter().any(|allowed| allowed.as_bytes() == *origin))
            }
        }
    }

    /// The answer to a preflight: what the browser asked about is allowed where its origin is.
    pub(super) fn preflight(&self, asked: &Asked<'_>) -> Response<Bytes> {
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = StatusCode::NO_CONTENT;
        if asked.origin.is_some() {
            let headers = response.headers_mut();
            let methods = HeaderValue::from_static("GET, HEAD, POST, DELETE, OPTIONS");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            let wanted = asked.head.lines.named("access-control-request-headers");
            if let Some(wanted) = wanted.and_then(|value| HeaderValue::from_bytes(value).ok()) {
                headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted);
            }
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        }
        response
    }
}
