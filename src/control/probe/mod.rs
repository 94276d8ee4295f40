//! Asking a backend what it serves: `GET {base}/models`, in a task of its own per incarnation.
//!
//! The task asks until it gets an answer, then again at every refresh, and reports each outcome; what an outcome means is
//! decided in [`crate::control::lifecycle`]. A backend's answer is hostile input: it is bounded in time, size and
//! count, redirects are answers like any other that is not 200, and nothing of it is used before all of it has been
//! checked.

mod object;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    base::{
        fetch::{Fetch, FetchError},
        foreign,
    },
    control::discovery::{EndpointId, Incarnation},
    pool::table::ModelObject,
    telemetry::{kinds::ProbeFailure, metrics::UNKNOWN_MODEL},
};

/// Time for one answer of `/models`, from connecting to its last byte.
const MODELS_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for one answer of a health path. Some engines generate a token to answer it.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer of `/models`.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Most models of one backend.
pub const MODELS_MAX: usize = 1024;
/// Longest model id.
const ID_BYTES_MAX: usize = 256;
/// How much of a model id is quoted.
const ID_CHARS_SHOWN: usize = 64;
/// How much is said about an answer that cannot be used.
const WHAT_CHARS_MAX: usize = 200;
/// First wait after a failed probe; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(250);
/// Longest wait after a failed probe: a model that takes an hour to load is live a moment after it has loaded.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// What to probe, and how.
#[derive(Debug, Clone)]
pub struct Target {
    /// Whose answers these are.
    pub id: EndpointId,
    /// Of which start of it.
    pub incarnation: Incarnation,
    /// Addresses to try, in this order, until one answers.
    pub addrs: Vec<SocketAddr>,
    /// Prefix of the API.
    pub base_path: String,
    /// What to ask before `/models`.
    pub health: HealthPath,
    /// Time for connecting.
    pub connect_timeout: Duration,
    /// How often to ask again once it has answered.
    pub refresh: Duration,
}

/// What to ask a backend before its models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthPath {
    /// Nothing: somebody else has checked its health.
    None,
    /// `/health`, if there is such a thing: only a server error says no.
    Usual,
    /// This path: only success says yes.
    Required(String),
}

/// A complete, checked answer.
#[derive(Debug, Clone)]
pub struct Listing {
    /// Which of the addresses answered.
    pub addr: SocketAddr,
    /// Its models, at least one, in its order, no id twice.
    pub models: Vec<Arc<ModelObject>>,
}

/// Why a probe got no usable answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// There is no complete answer.
    #[error("{error} (asked for {path})")]
    NoAnswer {
        /// What was asked.
        path: String,
        /// What came instead.
        error: FetchError,
    },
    /// An answer with a status that says no.
    #[error("{path} answered {status}")]
    Status {
        /// What was asked.
        path: String,
        /// The status.
        status: StatusCode,
    },
    /// An answer that cannot be used.
    #[error("{path} answered, but {what}")]
    Unusable {
        /// What was asked.
        path: String,
        /// What is wrong with the answer.
        what: String,
    },
}

/// Kinds of failures. There are few, so that a server cannot fail in a new way every time; what is to be done is the same
/// within each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Nobody listens.
    Refused,
    /// There is no way to it.
    NoWay,
    /// No answer in time.
    TimedOut,
    /// What came is no answer, or has no end.
    Broken,
    /// It sends elsewhere.
    Redirect,
    /// It wants a key.
    Denied,
    /// There is no such path.
    NotFound,
    /// Any other status that says no.
    Status,
    /// An answer that cannot be used.
    Unusable,
}

impl ProbeError {
    /// What kind of failure it is.
    pub fn kind(&self) -> FailureKind {
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

    /// What to do about it, for people; `container` is its name.
    pub fn advice(&self, container: &str) -> String {
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

    /// Whether there is no connection, so that another address may be the right one.
    fn is_elsewhere(&self) -> bool {
        self.refused() || matches!(self, ProbeError::NoAnswer { error: FetchError::NoConnection(..), .. })
    }

    /// Whether a server that only needs time looks like this.
    pub fn may_be_loading(&self) -> bool {
        match self {
            ProbeError::NoAnswer { error, .. } => matches!(error, FetchError::Refused(_) | FetchError::TimedOut(_)),
            ProbeError::Status { status, .. } => status.is_server_error(),
            ProbeError::Unusable { .. } => false,
        }
    }

    /// The failure as metrics count it.
    pub fn counted_as(&self) -> ProbeFailure {
        match self {
            ProbeError::NoAnswer { .. } => ProbeFailure::NoAnswer,
            ProbeError::Status { .. } => ProbeFailure::Status,
            ProbeError::Unusable { .. } => ProbeFailure::Unusable,
        }
    }

    /// Whether it is certain that nobody serves there.
    pub fn refused(&self) -> bool {
        matches!(self, ProbeError::NoAnswer { error: FetchError::Refused(_) | FetchError::Unreachable(..), .. })
    }
}

/// One outcome, tagged with whom it is about.
#[derive(Debug)]
pub struct Answer {
    /// Who was asked.
    pub id: EndpointId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Which probing of it: an answer to an earlier one is stale.
    pub serial: u64,
    /// What came.
    pub outcome: Result<Listing, ProbeError>,
    /// How long that took.
    pub took: Duration,
}

/// A running probe; dropping it ends the task.
#[derive(Debug)]
pub struct ProbeHandle {
    /// Tells its answers from those of earlier probes.
    pub serial: u64,
    nudge: Arc<Notify>,
    _stop: DropGuard,
}

impl ProbeHandle {
    /// A handle, and what the task behind it needs.
    pub fn new(serial: u64) -> (ProbeHandle, Arc<Notify>, CancellationToken) {
        let stop = CancellationToken::new();
        let nudge = Arc::new(Notify::new());
        let handle = ProbeHandle { serial, nudge: nudge.clone(), _stop: stop.clone().drop_guard() };
        (handle, nudge, stop)
    }

    /// Asks now instead of at the next refresh.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }
}

/// Asks until `stop`, and sends every outcome.
pub async fn run(
    mut target: Target,
    serial: u64,
    answers: mpsc::Sender<Answer>,
    nudge: Arc<Notify>,
    stop: CancellationToken,
) {
    let asking = async {
        let mut retry = RETRY_MIN;
        loop {
            let began = Instant::now();
            let outcome = ask(&target).await;
            let took = began.elapsed();
            let wait = if let Ok(listing) = &outcome {
                retry = RETRY_MIN;
                // Where it has answered it is asked first from now on: another address that begins to answer later is
                // no reason to move, which would cut its streams.
                target.addrs.sort_by_key(|addr| *addr != listing.addr);
                target.refresh
            } else {
                let wait = retry;
                retry = (retry * 2).min(RETRY_MAX);
                wait
            };
            let (id, incarnation) = (target.id.clone(), target.incarnation);
            if answers.send(Answer { id, incarnation, serial, outcome, took }).await.is_err() {
                return;
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = nudge.notified() => {}
            }
        }
    };
    // A probe that nobody wants any more must not delay anything: it ends in the middle of whatever it does.
    let _ = stop.run_until_cancelled(asking).await;
}

/// Asks once, at each address in turn.
///
/// # Errors
/// What the last address had to say.
pub async fn ask(target: &Target) -> Result<Listing, ProbeError> {
    let mut last = None;
    for addr in &target.addrs {
        match ask_at(target, *addr).await {
            Ok(models) => return Ok(Listing { addr: *addr, models }),
            // Only an address where nobody listens leaves room for another one.
            Err(error) if error.is_elsewhere() => last = last.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(last
        .unwrap_or_else(|| ProbeError::Unusable { path: String::new(), what: "there is no address to ask".to_owned() }))
}

async fn ask_at(target: &Target, addr: SocketAddr) -> Result<Vec<Arc<ModelObject>>, ProbeError> {
    match &target.health {
        HealthPath::None => {}
        HealthPath::Usual => match get(target, addr, "/health", HEALTH_TIMEOUT).await {
            Err(error) if error.is_elsewhere() => return Err(error),
            Ok((status, _)) if status.is_server_error() => {
                return Err(ProbeError::Status { path: "/health".to_owned(), status });
            }
            // No such path, a slow one or an odd one: /models decides.
            Ok(_) | Err(_) => {}
        },
        HealthPath::Required(path) => {
            let (status, _) = get(target, addr, path, HEALTH_TIMEOUT).await?;
            if !status.is_success() {
                return Err(ProbeError::Status { path: path.clone(), status });
            }
        }
    }
    let path = format!("{}/models", target.base_path);
    let (status, body) = get(target, addr, &path, MODELS_TIMEOUT).await?;
    if status != StatusCode::OK {
        return Err(ProbeError::Status { path, status });
    }
    parse_models(&body).map_err(|mut what| {
        // It quotes the answer, which may be long.
        if let Some((end, _)) = what.char_indices().nth(WHAT_CHARS_MAX) {
            what.truncate(end);
        }
        ProbeError::Unusable { path, what }
    })
}

async fn get(
    target: &Target,
    addr: SocketAddr,
    path: &str,
    limit: Duration,
) -> Result<(StatusCode, Bytes), ProbeError> {
    let connect_timeout = target.connect_timeout;
    let fetch = Fetch { addr, path, connect_timeout, timeout: limit, max_bytes: ANSWER_BYTES_MAX };
    fetch.get().await.map_err(|error| ProbeError::NoAnswer { path: path.to_owned(), error })
}

#[derive(Deserialize)]
struct RawListing<'a> {
    #[serde(borrow)]
    data: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawModel {
    id: String,
    #[serde(default)]
    created: Option<serde_json::Number>,
    #[serde(default)]
    root: Option<serde_json::Value>,
    #[serde(default)]
    max_model_len: Option<serde_json::Number>,
}

/// Checks the answer of `/models`. The error completes "answered, but …".
fn parse_models(body: &[u8]) -> Result<Vec<Arc<ModelObject>>, String> {
    // RFC 8259, 8.1: a byte order mark may be ignored. It stands before the list, and is in no object.
    let body = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    let listing: RawListing<'_> =
        serde_json::from_slice(body).map_err(|e| format!("not with a JSON object that holds a list `data`: {e}"))?;
    if listing.data.is_empty() {
        return Err("with an empty list of models".to_owned());
    }
    if listing.data.len() > MODELS_MAX {
        return Err(format!("with {} models; at most {MODELS_MAX} are taken", listing.data.len()));
    }
    let mut models: Vec<Arc<ModelObject>> = Vec::with_capacity(listing.data.len());
    let mut ids = std::collections::HashSet::with_capacity(listing.data.len());
    for raw in listing.data {
        object::check(raw.get())?;
        let model: RawModel =
            serde_json::from_str(raw.get()).map_err(|e| format!("a model object cannot be used: {e}"))?;
        if model.id.is_empty() || model.id.len() > ID_BYTES_MAX {
            return Err(format!("a model id has {} bytes; 1 to {ID_BYTES_MAX} are taken", model.id.len()));
        }
        if let Some(c) = model.id.chars().find(|c| foreign::is_misleading(*c)) {
            let (id, c) = (foreign::shown(&model.id, ID_CHARS_SHOWN), c.escape_unicode());
            return Err(format!("the model id \"{id}\" has control or format characters, such as {c}"));
        }
        if model.id.trim().is_empty() {
            return Err(format!("the model id {:?} is blank", model.id));
        }
        if model.id == UNKNOWN_MODEL {
            return Err(format!(
                "the model id {UNKNOWN_MODEL} is reserved: metrics have it for requests without a model"
            ));
        }
        if ids.insert(model.id.clone()) {
            models.push(Arc::new(ModelObject {
                id: model.id.into(),
                json: raw.to_owned(),
                created: model.created.and_then(|n| n.as_i64()),
                root: model.root.and_then(|root| root.as_str().map(str::to_owned)),
                max_model_len: model.max_model_len.and_then(|n| n.as_u64()),
            }));
        }
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(body: &str) -> Result<Vec<String>, String> {
        parse_models(body.as_bytes()).map(|models| models.iter().map(|m| m.id.to_string()).collect())
    }

    #[test]
    fn listings_of_real_engines_are_understood() {
        let vllm = r#"{"object":"list","data":[{"id":"org/m","object":"model","created":1700000000,"owned_by":"vllm",
            "root":"org/m","parent":null,"max_model_len":4096,"permission":[{"id":"modelperm-1"}]}]}"#;
        let models = parse_models(vllm.as_bytes()).unwrap();
        assert_eq!(
            (&*models[0].id, models[0].created, models[0].max_model_len),
            ("org/m", Some(1_700_000_000), Some(4096))
        );
        assert_eq!(models[0].root.as_deref(), Some("org/m"));
        assert!(models[0].json.get().contains("\"permission\":[{\"id\":\"modelperm-1\"}]"));
        let llamacpp =
            r#"{"models":[{"name":"x"}],"object":"list","data":[{"id":"x","created":1,"meta":{"n_ctx":9}}]}"#;
        assert_eq!(ids(llamacpp).unwrap(), ["x"]);
        assert_eq!(ids(r#"{"data":[{"id":"a"},{"id":"b"},{"id":"a","x":1}]}"#).unwrap(), ["a", "b"]);
        let odd = ["/models/my model.gguf", r"C:\\m", "模型/я-é-e\u{301}", "🦀"];
        let listing = format!(r#"{{"data":[{}]}}"#, odd.map(|id| format!(r#"{{"id":"{id}"}}"#)).join(","));
        assert_eq!(ids(&listing).unwrap(), ["/models/my model.gguf", r"C:\m", "模型/я-é-e\u{301}", "🦀"]);
    }

    /// A list of two models, of which the second one has this value in its object.
    fn in_object(value: &str) -> String {
        format!(r#"{{"data":[{{"id":"m"}},{{"id":"n","x":{value}}}]}}"#)
    }

    #[test]
    fn a_byte_order_mark_before_the_list_is_ignored() {
        assert_eq!(ids("\u{feff}{\"data\":[{\"id\":\"m\"}]}").unwrap(), ["m"]);
    }

    #[test]
    fn text_that_is_not_utf8_is_refused() {
        for body in [
            &b"{\"data\":[{\"id\":\"m\",\"x\":\"\xff\"}]}"[..],
            b"{\"data\":[{\"id\":\"m\",\"x\":\"\xed\xa0\xbd\"}]}",
            b"{\"data\":[{\"id\":\"m\",\"\xc3\":1}]}",
            b"\xff\xfe{\0}\0",
        ] {
            let error = parse_models(body).unwrap_err();
            assert!(error.contains("JSON"), "{error}");
        }
    }

    #[test]
    fn unusable_listings_are_refused_with_a_reason() {
        let many = format!(r#"{{"data":[{}]}}"#, vec![r#"{"id":"x"}"#; MODELS_MAX + 1].join(","));
        let long = format!(r#"{{"data":[{{"id":"{}"}}]}}"#, "x".repeat(ID_BYTES_MAX + 1));
        let deep = format!(r#"{{"data":{}"#, "[".repeat(100_000));
        for (body, reason) in [
            ("<html>", "JSON"),
            ("[]", "JSON"),
            (r#"{"object":"list"}"#, "data"),
            (r#"{"data":[]}"#, "empty"),
            (r#"{"data":[{}]}"#, "id"),
            (r#"{"data":[{"id":7}]}"#, "id"),
            (r#"{"data":[{"id":""}]}"#, "0 bytes"),
            (r#"{"data":[{"id":"a\nb"}]}"#, "control"),
            (r#"{"data":[{"id":"a\u0000b"}]}"#, r#""a\0b" has control or format characters, such as \u{0}"#),
            (r#"{"data":[{"id":"m\u202egpj"}]}"#, r#""m\u{202e}gpj" has control or format characters"#),
            (r#"{"data":[{"id":"m"},{"id":"n\u2028"}]}"#, r"such as \u{2028}"),
            (r#"{"data":[{"id":"m\u200b"}]}"#, r"such as \u{200b}"),
            (r#"{"data":[{"id":" "}]}"#, r#"the model id " " is blank"#),
            (r#"{"data":[{"id":"\u3000\u00a0"}]}"#, r#"the model id "\u{3000}\u{a0}" is blank"#),
            (many.as_str(), "at most 1024"),
            (long.as_str(), "257 bytes"),
            (deep.as_str(), "JSON"),
            (r#"{"data":[{"id":"m"},{"id":"n","created":"today"}]}"#, "a model object cannot be used"),
            (in_object(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))).as_str(), "32 levels"),
            (in_object(&format!("{}{}", "[".repeat(20_000), "]".repeat(20_000))).as_str(), "32 levels"),
            (in_object(r#""\ud83e""#).as_str(), "surrogate"),
            (in_object("1e999").as_str(), "number out of range"),
            (in_object("NaN").as_str(), "JSON"),
            (in_object(r#"1,"x":1"#).as_str(), r#"the key "x" twice"#),
            (in_object(&format!(r#""{}""#, "x".repeat(70_000))).as_str(), "at most 65536 are taken"),
            ("\u{feff}\u{feff}{\"data\":[{\"id\":\"m\"}]}", "JSON"),
        ] {
            let error = ids(body).unwrap_err();
            assert!(error.contains(reason), "{error} should mention {reason}");
            assert!(!error.contains(foreign::is_misleading), "{error:?}");
        }
    }

    #[test]
    fn the_model_that_metrics_need_for_themselves_is_refused() {
        let error = ids(r#"{"data":[{"id":"m"},{"id":"_unknown"}]}"#).unwrap_err();
        assert!(error.starts_with("the model id _unknown is reserved"), "{error}");
        assert_eq!(ids(r#"{"data":[{"id":"_unknown_"},{"id":"unknown"}]}"#).unwrap(), ["_unknown_", "unknown"]);
    }
}
