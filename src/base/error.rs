//! Every answer the proxy gives by itself when something is wrong: status, code, words and shape, decided here only.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};

/// The API whose error shape a client understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error":{"message","type","param","code"}}`.
    OpenAi,
    /// `{"type":"error","error":{"type","message"}}`, on `/v1/messages*` and wherever `anthropic-version` is sent.
    Anthropic,
}

/// The header that tells in which dialect a client reads, so that caches keep the answers apart (RFC 9110, 12.5.5).
pub const DIALECT_HEADER: &str = "anthropic-version";

/// Why a request could not be served. The text of every variant goes to the client: it names who failed and what can be
/// done, and never holds an address, a key or a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// The request itself is wrong.
    #[error("{message}")]
    BadRequest {
        /// `model_required`, `invalid_json`, …
        code: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The body is compressed in a way that is not understood here, and would have to be.
    #[error("{message}")]
    UnsupportedEncoding {
        /// What is understood.
        message: String,
    },
    /// The body decodes to more than it may.
    #[error("{message}")]
    DecodesTooLarge {
        /// To how much.
        message: String,
    },
    /// The head of the request is larger than the limit.
    #[error("{message}")]
    HeadTooLarge {
        /// What is too large.
        message: String,
    },
    /// The request came too slowly.
    #[error("{what} did not come in time")]
    RequestTimeout {
        /// Which part of it.
        what: &'static str,
    },
    /// No such path, or one that is never forwarded.
    #[error("{message}")]
    NoSuchPath {
        /// What was asked for, and what there is instead.
        message: String,
    },
    /// The method is not one for this path.
    #[error("method not allowed here; use {allow}")]
    MethodNotAllowed {
        /// Value of the `Allow` header.
        allow: &'static str,
    },
    /// No backend has ever announced this model.
    #[error("the model `{model}` does not exist; GET /v1/models lists what is live")]
    ModelNotFound {
        /// The model as the client named it.
        model: String,
    },
    /// The model is known, but no backend can take the request now.
    #[error("the model `{model}` is known but no backend is ready for it ({why}); try again shortly")]
    ModelUnavailable {
        /// The model.
        model: String,
        /// State of its backends.
        why: &'static str,
    },
    /// No backend is ready for anything.
    #[error("no backend is ready; try again shortly")]
    NoBackend,
    /// The backend that made an answer is no more.
    #[error("the backend that made `{id}` is gone, and what it remembered with it")]
    AnswerGone {
        /// The answer's id.
        id: String,
    },
    /// Every backend is full, or the proxy holds as many bodies as it may.
    #[error("{what}; try again shortly")]
    Overloaded {
        /// What is full.
        what: String,
        /// When it may not be any more, if that is known.
        retry_after: Option<Duration>,
    },
    /// The body is larger than the limit.
    #[error("the request body is larger than {limit_bytes} bytes ({knob})")]
    TooLarge {
        /// The limit.
        limit_bytes: u64,
        /// The variable that sets it.
        knob: &'static str,
    },
    /// The backend refused the connection, or broke before the first byte of its answer.
    #[error("backend `{backend}` {what} ({attempts} attempt(s) made)")]
    Backend {
        /// Container name.
        backend: String,
        /// What it did.
        what: &'static str,
        /// Attempts in all.
        attempts: u32,
    },
    /// The backend sent what is no answer.
    #[error("backend `{backend}` sent something that is no HTTP answer: {why} ({attempts} attempt(s) made)")]
    BadAnswer {
        /// Container name.
        backend: String,
        /// What is wrong with it; a fixed text.
        why: &'static str,
        /// Attempts in all.
        attempts: u32,
    },
    /// The proxy has no descriptor, port or memory left for a connection.
    #[error(
        "the proxy itself is short of file descriptors, ports or memory for a connection to a backend; try again shortly, \
         and raise its limit (`ulimit -n`, or `ulimits: nofile` in Compose) if this happens often"
    )]
    Shortage,
    /// As many clients are connected as may be.
    #[error(
        "the proxy serves as many clients as it may, and none of their connections is idle; try again shortly, and raise its \
         limit (`ulimit -n`, or `ulimits: nofile` in Compose) if this happens often"
    )]
    Full,
    /// The backend broke off in the middle of its answer.
    #[error("backend `{backend}` broke off its answer ({why}); nothing more of it will come")]
    BrokenOff {
        /// Container name.
        backend: String,
        /// How.
        why: String,
    },
    /// A time limit that the user set ran out before the first byte.
    #[error("backend `{backend}` gave no answer within {limit:?} ({knob})")]
    BackendTimeout {
        /// Container name.
        backend: String,
        /// The limit.
        limit: Duration,
        /// The variable that sets it.
        knob: &'static str,
    },
}

/// Seconds a client is asked to wait before it tries again.
const RETRY_AFTER_SECONDS: u64 = 2;

impl ProxyError {
    /// HTTP status of the answer.
    pub fn status(&self) -> StatusCode {
        match self {
            ProxyError::BadRequest { .. } => StatusCode::BAD_REQUEST,
            ProxyError::UnsupportedEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ProxyError::HeadTooLarge { .. } => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProxyError::RequestTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            ProxyError::NoSuchPath { .. } | ProxyError::ModelNotFound { .. } => StatusCode::NOT_FOUND,
            ProxyError::AnswerGone { .. } => StatusCode::NOT_FOUND,
            ProxyError::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            ProxyError::ModelUnavailable { .. } | ProxyError::NoBackend | ProxyError::Shortage | ProxyError::Full => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            ProxyError::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            ProxyError::TooLarge { .. } | ProxyError::DecodesTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ProxyError::Backend { .. } | ProxyError::BadAnswer { .. } | ProxyError::BrokenOff { .. } => {
                StatusCode::BAD_GATEWAY
            }
            ProxyError::BackendTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Every code there is.
    pub const CODES: &[&str] = &[
        "model_required",
        "invalid_json",
        "invalid_request",
        "unsupported_encoding",
        "request_header_too_large",
        "request_timeout",
        "not_found",
        "method_not_allowed",
        "model_not_found",
        "model_unavailable",
        "overloaded",
        "proxy_shortage",
        "request_too_large",
        "backend_error",
        "backend_timeout",
    ];

    /// `error.code` of the OpenAI shape; one of [`ProxyError::CODES`].
    pub fn code(&self) -> &'static str {
        match self {
            ProxyError::BadRequest { code, .. } => code,
            ProxyError::UnsupportedEncoding { .. } => "unsupported_encoding",
            ProxyError::HeadTooLarge { .. } => "request_header_too_large",
            ProxyError::RequestTimeout { .. } => "request_timeout",
            ProxyError::NoSuchPath { .. } | ProxyError::AnswerGone { .. } => "not_found",
            ProxyError::MethodNotAllowed { .. } => "method_not_allowed",
            ProxyError::ModelNotFound { .. } => "model_not_found",
            ProxyError::ModelUnavailable { .. } | ProxyError::NoBackend => "model_unavailable",
            ProxyError::Overloaded { .. } => "overloaded",
            ProxyError::Shortage | ProxyError::Full => "proxy_shortage",
            ProxyError::TooLarge { .. } | ProxyError::DecodesTooLarge { .. } => "request_too_large",
            ProxyError::Backend { .. } | ProxyError::BadAnswer { .. } | ProxyError::BrokenOff { .. } => "backend_error",
            ProxyError::BackendTimeout { .. } => "backend_timeout",
        }
    }

    fn openai_type(&self) -> &'static str {
        match self.status().as_u16() {
            429 => "rate_limit_error",
            503 => "service_unavailable_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// <https://docs.anthropic.com/en/api/errors>
    fn anthropic_type(&self) -> &'static str {
        match self.status().as_u16() {
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The error as a JSON object in the client's dialect.
    pub fn body(&self, dialect: Dialect) -> String {
        let message = self.to_string();
        match dialect {
            Dialect::OpenAi => {
                let param = matches!(self, ProxyError::ModelNotFound { .. } | ProxyError::ModelUnavailable { .. })
                    .then_some("model");
                let error = serde_json::json!({
                    "message": message, "type": self.openai_type(), "param": param, "code": self.code(),
                });
                serde_json::json!({ "error": error }).to_string()
            }
            Dialect::Anthropic => {
                let error = serde_json::json!({ "type": self.anthropic_type(), "message": message });
                serde_json::json!({ "type": "error", "error": error }).to_string()
            }
        }
    }

    /// The whole answer.
    pub fn response(&self, dialect: Dialect) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(self.body(dialect)));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::VARY, HeaderValue::from_static(DIALECT_HEADER));
        match self {
            ProxyError::ModelUnavailable { .. }
            | ProxyError::NoBackend
            | ProxyError::Shortage
            | ProxyError::Full
            | ProxyError::Overloaded { .. } => {
                let known = if let ProxyError::Overloaded { retry_after, .. } = self { *retry_after } else { None };
                // Whole seconds, rounded up: who comes back early comes in vain.
                let seconds = known.map_or(RETRY_AFTER_SECONDS, |wait| wait.as_millis().div_ceil(1_000).max(1) as u64);
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            ProxyError::MethodNotAllowed { allow } => {
                headers.insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            _ => {}
        }
        response
    }

    /// The error as an event for a stream whose head has already gone out, so that SDKs raise it instead of reading a
    /// cut as the end. `path` tells the Responses API, whose events carry their type, from the rest.
    pub fn stream_event(&self, dialect: Dialect, path: &str) -> Bytes {
        // The backend may have died inside an event: blank lines first end whatever it had begun.
        let text = match dialect {
            Dialect::Anthropic => format!("\n\nevent: error\ndata: {}\n\n", self.body(dialect)),
            Dialect::OpenAi if path.contains("/responses") => {
                let event = serde_json::json!({
                    "type": "error", "code": self.code(), "message": self.to_string(), "param": null,
                });
                format!("\n\nevent: error\ndata: {event}\n\n")
            }
            Dialect::OpenAi => format!("\n\ndata: {}\n\n", self.body(dialect)),
        };
        Bytes::from(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each() -> Vec<(ProxyError, u16, &'static str)> {
        let text = || "x".to_owned();
        vec![
            (ProxyError::BadRequest { code: "model_required", message: text() }, 400, "model_required"),
            (ProxyError::NoSuchPath { message: text() }, 404, "not_found"),
            (ProxyError::AnswerGone { id: text() }, 404, "not_found"),
            (ProxyError::UnsupportedEncoding { message: text() }, 415, "unsupported_encoding"),
            (ProxyError::DecodesTooLarge { message: text() }, 413, "request_too_large"),
            (ProxyError::HeadTooLarge { message: text() }, 431, "request_header_too_large"),
            (ProxyError::RequestTimeout { what: "x" }, 408, "request_timeout"),
            (ProxyError::NoBackend, 503, "model_unavailable"),
            (ProxyError::ModelNotFound { model: text() }, 404, "model_not_found"),
            (ProxyError::ModelUnavailable { model: text(), why: "it is draining" }, 503, "model_unavailable"),
            (ProxyError::Overloaded { what: text(), retry_after: None }, 429, "overloaded"),
            (ProxyError::TooLarge { limit_bytes: 1, knob: "PROXY_MAX_BODY" }, 413, "request_too_large"),
            (ProxyError::Backend { backend: text(), what: "refused", attempts: 1 }, 502, "backend_error"),
            (ProxyError::BadAnswer { backend: text(), why: "x", attempts: 1 }, 502, "backend_error"),
            (ProxyError::Shortage, 503, "proxy_shortage"),
            (ProxyError::Full, 503, "proxy_shortage"),
            (ProxyError::BrokenOff { backend: text(), why: text() }, 502, "backend_error"),
            (
                ProxyError::BackendTimeout { backend: text(), limit: Duration::from_secs(1), knob: "K" },
                504,
                "backend_timeout",
            ),
        ]
    }

    #[test]
    fn status_and_code_are_the_contracts_in_both_dialects() {
        for (error, status, code) in each() {
            let response = error.response(Dialect::OpenAi);
            assert_eq!(response.status().as_u16(), status);
            let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
            assert_eq!(body["error"]["code"], code);
            for key in ["message", "type", "param", "code"] {
                assert!(body["error"].get(key).is_some(), "{key} in {body}");
            }
            let retry = matches!(status, 429 | 503);
            assert_eq!(response.headers().contains_key("retry-after"), retry, "{code}");
            let body: serde_json::Value = serde_json::from_slice(error.response(Dialect::Anthropic).body()).unwrap();
            assert_eq!(body["type"], "error");
            assert!(body["error"]["type"].is_string() && body["error"]["message"].is_string());
        }
    }

    #[test]
    fn hostile_model_names_stay_inside_their_string() {
        let error = ProxyError::ModelNotFound { model: "a\"}\n\ndata: [DONE]\n\n".to_owned() };
        let event = error.stream_event(Dialect::OpenAi, "/v1/chat/completions");
        assert_eq!(event.iter().filter(|b| **b == b'\n').count(), 4, "{event:?}");
    }
}
