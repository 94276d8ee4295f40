//! What can be changed while the demo backend runs, and what it remembers of the requests it got.
//!
//! `/_ctl` breaks the backend on purpose, `/_stats` shows what arrived. Both exist only with `--control`. This file turns
//! a query into settings and actions; it performs none of them.

use std::time::Duration;

use http::{HeaderMap, StatusCode, request};
use percent_encoding::percent_decode_str;
use serde::{Serialize, Serializer};

/// Longest answer, in tokens; an answer that is not streamed is built in memory.
pub(super) const MAX_TOKENS: u32 = 1_000_000;

/// Which endpoint accepts requests and never answers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Hang {
    None,
    Health,
    Models,
    /// Every inference endpoint, not only chat.
    Chat,
}

/// What a SIGTERM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnSigterm {
    /// Close the listener, finish what is in flight, exit 0.
    Finish,
    /// Go on serving.
    Ignore,
    /// Exit at once with 143, as a process without a handler would.
    Exit,
}

/// How the backend behaves now. Read once per request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Settings {
    /// From the end of the request to the first byte of the answer.
    #[serde(rename = "latency_ms", serialize_with = "as_millis")]
    pub(super) latency: Duration,
    /// Length of an answer, unless the request asks for less.
    pub(super) tokens: u32,
    /// Between two tokens.
    #[serde(rename = "token_gap_ms", serialize_with = "as_millis")]
    pub(super) token_gap: Duration,
    pub(super) models: Vec<String>,
    #[serde(serialize_with = "as_code")]
    pub(super) health: StatusCode,
    #[serde(serialize_with = "as_code")]
    pub(super) models_status: StatusCode,
    pub(super) hang: Hang,
    /// Status of every inference request; 200 = answer it.
    #[serde(serialize_with = "as_code")]
    pub(super) error_status: StatusCode,
    pub(super) sigterm: OnSigterm,
    /// Whether every answer says `Connection: close`.
    pub(super) close: bool,
}

/// Something to do once, as opposed to a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Exit(u8),
    Allocate { mib: usize },
    AllocateInChild { mib: usize },
}

/// Why a `/_ctl` query was refused; nothing of it has been applied then.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    #[error("unknown key `{0}`: accepted are {KEYS}")]
    UnknownKey(String),
    #[error("{key} `{value}`: expected {expected}")]
    BadValue { key: String, value: String, expected: &'static str },
}

const KEYS: &str = "latency_ms, tokens, token_gap_ms, models, health, models_status, hang, error_status, sigterm, close, \
                    exit, alloc_mb, alloc_child_mb";

/// The last request other than a probe or a control request, as `/_stats` shows it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LastRequest {
    /// Its place among the counted requests: tells whether a body that has just been read belongs to this one.
    #[serde(skip)]
    pub(super) number: u64,
    pub(super) method: String,
    /// Path and query, as they arrived.
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    /// Absent while the body is incomplete, and for good when it never was completed.
    #[serde(flatten)]
    pub(super) body: Option<BodySeen>,
}

/// What is kept of a body: enough to see that a proxy changed no byte of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct BodySeen {
    pub(super) body_len: usize,
    /// FNV-1a, 64 bits, as 16 hexadecimal digits.
    #[serde(serialize_with = "as_hex")]
    pub(super) body_fnv1a64: u64,
}

// === impl Settings ===

impl Settings {
    /// Settings under which nothing is broken.
    pub(super) fn new(models: Vec<String>, latency: Duration, tokens: u32, token_gap: Duration) -> Self {
        Self {
            latency,
            tokens: tokens.clamp(1, MAX_TOKENS),
            token_gap,
            models,
            health: StatusCode::OK,
            models_status: StatusCode::OK,
            hang: Hang::None,
            error_status: StatusCode::OK,
            sigterm: OnSigterm::Finish,
            close: false,
        }
    }

    /// These settings changed by a query (`key=value&…`, percent-encoded), and what else it asks for.
    pub(super) fn apply(&self, query: &str) -> Result<(Self, Vec<Action>), ControlError> {
        let mut next = self.clone();
        let mut actions = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode_str(value).decode_utf8_lossy();
            next.apply_one(key, &value, &mut actions)?;
        }
        Ok((next, actions))
    }

    fn apply_one(&mut self, key: &str, value: &str, actions: &mut Vec<Action>) -> Result<(), ControlError> {
        let bad = |expected| ControlError::BadValue { key: key.into(), value: value.into(), expected };
        let millis = || value.parse().map(Duration::from_millis).map_err(|_| bad("milliseconds"));
        let mib = || value.parse().ok().filter(|mib| *mib <= 1 << 20).ok_or_else(|| bad("MiB, up to 1048576"));
        let status = || {
            let code = value.parse().ok().filter(|code| (200..600).contains(code));
            code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or_else(|| bad("a status from 200 to 599"))
        };
        match key {
            "latency_ms" => self.latency = millis()?,
            "token_gap_ms" => self.token_gap = millis()?,
            "tokens" => {
                let tokens = value.parse().ok().filter(|tokens| (1..=MAX_TOKENS).contains(tokens));
                self.tokens = tokens.ok_or_else(|| bad("a number from 1 to 1000000"))?;
            }
            "models" => self.models = value.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect(),
            "health" => self.health = status()?,
            "models_status" => self.models_status = status()?,
            "error_status" => self.error_status = status()?,
            "hang" => {
                self.hang = match value {
                    "none" => Hang::None,
                    "health" => Hang::Health,
                    "models" => Hang::Models,
                    "chat" => Hang::Chat,
                    _ => return Err(bad("none, health, models or chat")),
                }
            }
            "sigterm" => {
                self.sigterm = match value {
                    "finish" => OnSigterm::Finish,
                    "ignore" => OnSigterm::Ignore,
                    "exit" => OnSigterm::Exit,
                    _ => return Err(bad("finish, ignore or exit")),
                }
            }
            "close" => {
                self.close = match value {
                    "1" => true,
                    "0" => false,
                    _ => return Err(bad("1 or 0")),
                }
            }
            "exit" => actions.push(Action::Exit(value.parse().map_err(|_| bad("an exit code from 0 to 255"))?)),
            "alloc_mb" => actions.push(Action::Allocate { mib: mib()? }),
            "alloc_child_mb" => actions.push(Action::AllocateInChild { mib: mib()? }),
            _ => return Err(ControlError::UnknownKey(key.into())),
        }
        Ok(())
    }
}

// === impl LastRequest ===

impl LastRequest {
    /// A request whose body has not been read yet.
    pub(super) fn new(number: u64, head: &request::Parts) -> Self {
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        Self {
            number,
            method: head.method.to_string(),
            path: path.to_owned(),
            headers: pairs(&head.headers),
            body: None,
        }
    }
}

fn pairs(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect()
}

// === impl BodySeen ===

impl BodySeen {
    pub(super) fn of(body: &[u8]) -> Self {
        Self { body_len: body.len(), body_fnv1a64: fnv1a64(body) }
    }
}

/// FNV-1a with 64 bits: not cryptographic, but any accidental change of a body shows, and a test in any language can
/// compute it in three lines.
pub(super) fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

// === serialisers ===

fn as_millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

fn as_code<S: Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

fn as_hex<S: Serializer>(hash: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{hash:016x}"))
}
