//! The failures of probes, with advice for people. Pure.

use http::StatusCode;

use crate::{base::fetch::FetchError, telemetry::kinds::ProbeFailure};

/// The reason for which a probe got no usable answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProbeError {
    /// No complete answer came.
    #[error("{error} (asked for {path})")]
    NoAnswer {
        /// The path that was asked for.
        path: String,
        /// The failure of the request.
        error: FetchError,
    },
    /// The answer has a status other than success.
    #[error("{path} answered {status}")]
    Status {
        /// The path that was asked for.
        path: String,
        /// The status of the answer.
        status: StatusCode,
    },
    /// The answer is complete, but cannot be used.
    #[error("{path} answered, but {what}")]
    Unusable {
        /// The path that was asked for.
        path: String,
        /// The mistake in the answer.
        what: String,
    },
}

/// The kinds of failures. There are few of them, so that a server cannot fail in a new way every time; the advice is the
/// same within each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// No process listens at the address.
    Refused,
    /// The address cannot be reached.
    NoWay,
    /// The answer took too long.
    TimedOut,
    /// The bytes that came are no HTTP answer, or have no end.
    Broken,
    /// The server redirects elsewhere.
    Redirect,
    /// The server wants a key.
    Denied,
    /// The server has no such path.
    NotFound,
    /// The status is another one that is no success.
    Status,
    /// The answer cannot be used.
    Unusable,
}

impl ProbeError {
    /// The kind of this failure.
    pub(crate) fn kind(&self) -> FailureKind {
        match self {
            ProbeError::NoAnswer { error, .. } => match error {
                FetchError::Refused(_) => FailureKind::Refused,
                FetchError::Unreachable(..) | FetchError::NoConnection(..) => FailureKind::NoWay,
                FetchError::TimedOut(_) => FailureKind::TimedOut,
                FetchError::Broke(_) | FetchError::TooLarge(_) => FailureKind::Broken,
            },
            ProbeError::Status { status, .. } => match status.as_u16() {
                300..=399 => FailureKind::Redirect,
                401 | 403 => FailureKind::Denied,
                404 => FailureKind::NotFound,
                _ => FailureKind::Status,
            },
            ProbeError::Unusable { .. } => FailureKind::Unusable,
        }
    }

    /// Advice for the user; `container` is the name of the container.
    pub(crate) fn advice(&self, container: &str) -> String {
        let advice = match self.kind() {
            FailureKind::Refused => {
                return format!(
                    "wait if it is still loading; else let it listen on 0.0.0.0 (--host 0.0.0.0) and set \
                     inference.port to its port; see docker logs {container}"
                );
            }
            FailureKind::TimedOut | FailureKind::Status => {
                return format!("wait if it is still loading; else see docker logs {container}");
            }
            FailureKind::NoWay => "use a network that it shares with the proxy, without a firewall in between",
            FailureKind::Broken => "set inference.port to where its HTTP API is",
            FailureKind::Redirect => "set inference.api.base_path to where the API is; redirects are not followed",
            FailureKind::Denied => {
                "start it without an API key, and check keys in front of the proxy, which holds none"
            }
            FailureKind::NotFound => "set inference.api.base_path, or inference.port, to where the API is",
            FailureKind::Unusable => {
                "let it list its models as an OpenAI-compatible API does, or set inference.port and \
                 inference.api.base_path to where one does"
            }
        };
        advice.to_owned()
    }

    /// Whether there was no connection, so that another address may be the right one.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.refused() || matches!(self, ProbeError::NoAnswer { error: FetchError::NoConnection(..), .. })
    }

    /// Whether a server that is still loading looks like this.
    pub(crate) fn may_be_loading(&self) -> bool {
        match self {
            ProbeError::NoAnswer { error, .. } => matches!(error, FetchError::Refused(_) | FetchError::TimedOut(_)),
            ProbeError::Status { status, .. } => status.is_server_error(),
            ProbeError::Unusable { .. } => false,
        }
    }

    /// The failure as metrics count it.
    pub(crate) fn counted_as(&self) -> ProbeFailure {
        match self {
            ProbeError::NoAnswer { .. } => ProbeFailure::NoAnswer,
            ProbeError::Status { .. } => ProbeFailure::Status,
            ProbeError::Unusable { .. } => ProbeFailure::Unusable,
        }
    }

    /// Whether it is certain that no server is there.
    pub(crate) fn refused(&self) -> bool {
        matches!(self, ProbeError::NoAnswer { error: FetchError::Refused(_) | FetchError::Unreachable(..), .. })
    }
}
