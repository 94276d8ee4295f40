//! The labels of an inference container, by which its owner configures the proxy.
//!
//! Every other part works with a checked [`LabelSpec`]; only this module knows how a label is spelt. It refuses to know
//! Docker, the exposed ports and the networks that exist, because these are considered later, with the spec in hand.
//!
//! Labels are foreign text (an image can carry them, and the Engine accepts megabytes of it). So parsing never fails, and
//! the result is bounded: a label that cannot be used becomes a [`LabelProblem`], and its default stands.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    num::{NonZeroU16, NonZeroU32},
};

use crate::base::{
    config::{nearest, parse_bool},
    foreign,
};

/// The label that opts a container in; a list of containers can be filtered by its presence.
pub const ENABLE: &str = "inference.enable";

/// [`LabelSpec::weight`] of a container without `inference.weight`, which is the weight `1`.
pub const WEIGHT_ONE: NonZeroU32 = NonZeroU32::new(1000).expect("one must not be zero");

const PREFIX: &str = "inference.";
const PORT: &str = "inference.port";
const BASE_PATH: &str = "inference.api.base_path";
const NETWORK: &str = "inference.network";
const HEALTH_PATH: &str = "inference.health.path";
const WEIGHT: &str = "inference.weight";
const MAX_INFLIGHT: &str = "inference.max_inflight";

const DEFAULT_BASE_PATH: &str = "/v1";
const MAX_WEIGHT: u32 = 1000 * WEIGHT_ONE.get();

/// Longest value; no useful path, network name or number is longer.
const MAX_VALUE_BYTES: usize = 1024;
/// Most problems of one container. So many are enough to show the mistake, and more are not worth memory or log.
const MAX_PROBLEMS: usize = 16;
/// Longest part of a foreign name or value that a message repeats.
const MAX_SHOWN_CHARS: usize = 64;

/// One label, with its default as a user would write it, and its purpose.
#[derive(Debug, Clone, Copy)]
pub struct LabelHelp {
    /// Name of the label.
    pub name: &'static str,
    /// Default, in the notation a user would write; empty when there is none.
    pub default: &'static str,
    /// One sentence for `--help`.
    pub help: &'static str,
}

const fn label(name: &'static str, default: &'static str, help: &'static str) -> LabelHelp {
    LabelHelp { name, default, help }
}

/// Every label that the proxy reads, in the order in which problems with them are reported.
pub const KNOWN: &[LabelHelp] = &[
    label(ENABLE, "", "true (also 1, yes, on) opts the container in; with any other value it is not routed"),
    label(PORT, "the only exposed TCP port, else 8000", "port of the inference server"),
    label(BASE_PATH, DEFAULT_BASE_PATH, "prefix of its API; / for none, a trailing slash makes no difference"),
    label(
        NETWORK,
        "",
        "use the container's address on this Docker network; a container that is not on it is not routed",
    ),
    label(HEALTH_PATH, "", "extra readiness path that must answer 2xx before the proxy asks for the models"),
    label(WEIGHT, "1", "share of traffic among replicas, 0.001 to 1000"),
    label(MAX_INFLIGHT, "no limit", "the most requests that this backend gets at the same time"),
];

/// The wishes in the labels of one container, with defaults where there are none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LabelSpec {
    /// Port of the inference server, never 0; `None` leaves the choice to the exposed ports.
    pub port: Option<u16>,
    /// Prefix of the API with a leading and without a trailing slash; empty when the API is at the root.
    pub base_path: String,
    /// The one network whose address may be used.
    pub network: Option<String>,
    /// Extra readiness path, with a leading slash and perhaps a query.
    pub health_path: Option<String>,
    /// Share of traffic in thousandths: [`WEIGHT_ONE`] is weight 1. Only the ratio between replicas means anything.
    pub weight: NonZeroU32,
    /// Most concurrent requests; `None` is no limit.
    pub max_inflight: Option<NonZeroU32>,
}

impl Default for LabelSpec {
    /// The spec of a container whose only label is `inference.enable`.
    fn default() -> LabelSpec {
        LabelSpec {
            port: None,
            base_path: DEFAULT_BASE_PATH.to_owned(),
            network: None,
            health_path: None,
            weight: WEIGHT_ONE,
            max_inflight: None,
        }
    }
}

/// The meaning of `inference.enable`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opted {
    /// The container is to be routed.
    In,
    /// The container is not to be routed, which is no problem to report.
    Out,
    /// The value means neither, so the container is not routed. Holds the value as a message may show it.
    Unclear(String),
}

/// The labels of one container, understood as far as they can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Whether the container takes part.
    pub opted: Opted,
    /// Its wishes.
    pub spec: LabelSpec,
    /// Labels that cannot be used: at most 16, in an order that depends on the labels alone, so that equal labels compare
    /// equal and are reported once.
    pub problems: Vec<LabelProblem>,
}

/// A label that is ignored, with the reason. Its text is safe to log: bounded, and free of control characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelProblem {
    /// Name of the label.
    pub name: String,
    /// Its value, cut and escaped. `None` when the name is unknown, because such a value may be a secret.
    pub value: Option<String>,
    /// A description of the values that are accepted.
    pub expected: &'static str,
    /// The nearest known name, when an unknown one is close to it.
    pub suggestion: Option<&'static str>,
}

impl fmt::Display for LabelProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LabelProblem { name, value, expected, suggestion } = self;
        match (value, suggestion) {
            (Some(value), _) => write!(f, "{name}=\"{value}\" is ignored: expected {expected}"),
            (None, Some(known)) => write!(f, "{name} is no label of this proxy and is ignored; did you mean {known}?"),
            (None, None) => write!(f, "{name} is no label of this proxy and is ignored: expected {expected}"),
        }
    }
}

/// Reads the labels of one container, in any order.
///
/// `None` when there is no `inference.enable` among them: such a container has nothing to do with this proxy, even if it
/// carries other labels of it. Blanks around a value mean nothing. An empty value counts as unset, as compose files with
/// `${VAR:-}` mean it, except for `inference.enable` and `inference.api.base_path`, where it could mean two things and is
/// reported.
pub fn parse<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<Labels> {
    let mut given = BTreeMap::new();
    let mut unknown = BTreeSet::new();
    for (name, value) in labels {
        if let Some(label) = KNOWN.iter().find(|label| label.name == name) {
            given.insert(label.name, value);
        } else if is_ours(name) {
            unknown.insert(name);
            if unknown.len() > MAX_PROBLEMS {
                unknown.pop_last();
            }
        }
    }
    let enable = *given.get(ENABLE)?;

    let mut reader = Reader { given, problems: Vec::new() };
    let opted = match reader.strict(ENABLE, "true or false (also 1, yes, on; 0, no, off)", parse_bool) {
        Some(true) => Opted::In,
        Some(false) => Opted::Out,
        None => Opted::Unclear(shown(enable.trim())),
    };
    let defaults = LabelSpec::default();
    let spec = LabelSpec {
        port: reader.unless_empty(PORT, "a port, 1 to 65535", |v| v.parse::<NonZeroU16>().ok()).map(NonZeroU16::get),
        base_path: reader
            .strict(BASE_PATH, "a path such as /v1, or / for none", parse_base_path)
            .unwrap_or(defaults.base_path),
        network: reader.unless_empty(NETWORK, "the name of a Docker network", parse_network),
        health_path: reader.unless_empty(
            HEALTH_PATH,
            "a path such as /health, perhaps with a query",
            parse_health_path,
        ),
        weight: reader
            .unless_empty(WEIGHT, "a number from 0.001 to 1000 with at most three decimals", parse_weight)
            .unwrap_or(defaults.weight),
        max_inflight: reader.unless_empty(MAX_INFLIGHT, "a whole number above zero", |v| v.parse().ok()),
    };

    let mut problems = reader.problems;
    let room = MAX_PROBLEMS.saturating_sub(problems.len());
    problems.extend(unknown.into_iter().take(room).map(LabelProblem::unknown));
    Some(Labels { opted, spec, problems })
}

impl LabelProblem {
    fn unknown(name: &str) -> LabelProblem {
        LabelProblem {
            name: shown(name),
            value: None,
            expected: "a name that --help lists",
            suggestion: nearest_known(name),
        }
    }
}

/// The known labels of one container on their way into a [`LabelSpec`].
struct Reader<'a> {
    given: BTreeMap<&'static str, &'a str>,
    problems: Vec<LabelProblem>,
}

impl Reader<'_> {
    /// The parsed value; `None` when the label is absent or empty, or when it cannot be used, which is a problem.
    fn unless_empty<T>(
        &mut self,
        name: &'static str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        if self.given.get(name)?.trim().is_empty() {
            return None;
        }
        self.strict(name, expected, parse)
    }

    /// The same for a label whose empty value cannot be used, either.
    fn strict<T>(
        &mut self,
        name: &'static str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = *self.given.get(name)?;
        let (parsed, expected) = match value.len() {
            0..=MAX_VALUE_BYTES => (parse(value.trim()), expected),
            _ => (None, "at most 1024 bytes"),
        };
        if parsed.is_none() {
            let value = Some(shown(value.trim()));
            self.problems.push(LabelProblem { name: name.to_owned(), value, expected, suggestion: None });
        }
        parsed
    }
}

/// Whether a label is meant for this proxy. Docker's labels are case-sensitive, so `Inference.Port` is another name, but
/// its author should be told.
fn is_ours(name: &str) -> bool {
    name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
}

/// The known name that is nearest to this one. The common prefix is not compared, because it would make any two names
/// look alike.
fn nearest_known(name: &str) -> Option<&'static str> {
    // Edit distance costs time and memory in proportion to the name, which the container chooses.
    let rest = name.get(PREFIX.len()..).filter(|rest| rest.len() <= MAX_SHOWN_CHARS)?.to_ascii_lowercase();
    let known = || KNOWN.iter().filter_map(|label| Some((label.name, label.name.strip_prefix(PREFIX)?)));
    let best = nearest(&rest, known().map(|(_, rest)| rest))?;
    known().find(|(_, rest)| *rest == best).map(|(name, _)| name)
}

/// The start of a foreign text as a message may show it.
fn shown(text: &str) -> String {
    foreign::shown(text, MAX_SHOWN_CHARS)
}

fn parse_base_path(text: &str) -> Option<String> {
    match text.trim_end_matches('/') {
        "" if text.is_empty() => None,
        "" => Some(String::new()),
        path => parse_path(path),
    }
}

fn parse_health_path(text: &str) -> Option<String> {
    let Some((path, query)) = text.split_once('?') else {
        return parse_path(text);
    };
    let path = parse_path(path)?;
    is_uri_text(query, b"/?").then(|| format!("{path}?{query}"))
}

/// A path that is sent as it stands, with the leading slash that was perhaps forgotten.
///
/// Dot segments and empty segments are refused, encoded ones too: servers disagree about which path they mean. An
/// absolute URL is refused by its `//`.
fn parse_path(text: &str) -> Option<String> {
    let path = if text.starts_with('/') { text.to_owned() } else { format!("/{text}") };
    let segments = path.strip_prefix('/')?.split('/');
    let is_dots = |segment: &str| matches!(segment.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
    let last = segments.clone().count() - 1;
    let is_plain = |(i, segment): (usize, &str)| !is_dots(segment) && (!segment.is_empty() || i == last);
    (!text.is_empty() && segments.enumerate().all(is_plain) && is_uri_text(&path, b"/")).then_some(path)
}

/// Whether all of `text` is `pchar` (RFC 3986, section 3.3) or one of `also`.
fn is_uri_text(text: &str, also: &[u8]) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&b) || also.contains(&b);
    // Each part after a percent sign begins with its two hex digits.
    let mut parts = text.split('%');
    parts.next().is_some_and(|first| first.bytes().all(is_plain))
        && parts
            .all(|part| part.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2 && part.bytes().all(is_plain))
}

/// Docker and Podman allow different characters in the name of a network, so only misleading ones are refused here. A name
/// that does not exist is found later, by comparison.
fn parse_network(text: &str) -> Option<String> {
    (!text.contains(foreign::is_misleading)).then(|| text.to_owned())
}

/// A decimal number in thousandths, exactly.
fn parse_weight(text: &str) -> Option<NonZeroU32> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    if decimals.len() > 3 || !whole.bytes().chain(decimals.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let thousandths: u32 = format!("{whole}{decimals:0<3}").parse().ok()?;
    NonZeroU32::new(thousandths).filter(|weight| weight.get() <= MAX_WEIGHT)
}

#[cfg(test)]
mod tests;
