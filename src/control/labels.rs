//! Labels of an inference container: what its owner asks of the proxy.
//!
//! Every other part works with a checked [`LabelSpec`]; only this file knows how a label is spelt. It refuses to know
//! Docker, which ports are exposed and which networks exist: that is decided later, with the spec in hand.
//!
//! Labels are foreign text (an image can carry them, and the Engine accepts megabytes of it), so parsing never fails
//! and all that comes out is bounded: what cannot be used becomes a [`LabelProblem`] and its default stands.

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

/// No path, network name or number that means something is longer.
const MAX_VALUE_BYTES: usize = 1024;
/// Enough to show what is wrong; a container with more is not worth more memory or log.
const MAX_PROBLEMS: usize = 16;
/// How much of a foreign name or value is repeated in a message.
const MAX_SHOWN_CHARS: usize = 64;

/// One label: its name, its default as a user would write it, and what it does.
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

/// What the labels of one container ask for, defaults filled in.
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

/// What `inference.enable` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opted {
    /// Route to this container.
    In,
    /// Deliberately not: an owner who says no has no problem to be told about.
    Out,
    /// Neither; not routed. Holds the value as a message may show it.
    Unclear(String),
}

/// The labels of one container, understood as far as they can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Whether the container takes part.
    pub opted: Opted,
    /// What it asks for.
    pub spec: LabelSpec,
    /// What could not be used: at most 16, in an order that depends on the labels alone, so that equal labels compare
    /// equal and are reported once.
    pub problems: Vec<LabelProblem>,
}

/// A label that is ignored, and why. Its text is safe to log: bounded, and free of control characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelProblem {
    /// Name of the label.
    pub name: String,
    /// Its value, cut and escaped. `None` when the name is unknown: nobody knows whether such a value is a secret.
    pub value: Option<String>,
    /// What is accepted.
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
/// `None` when there is no `inference.enable` among them: such a container has nothing to do with this proxy, whatever
/// else it carries. Blanks around a value mean nothing. An empty value counts as unset, as compose files with
/// `${VAR:-}` mean it, but for `inference.enable` and `inference.api.base_path`, where it could mean two things and is
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
    /// The parsed value; `None` when the label is absent, empty, or not what is expected (which is noted).
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

    /// The same where an empty value is not what is expected either.
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

/// Whether a label is meant for this proxy. Docker's labels are case-sensitive, so `Inference.Port` is another name,
/// but one whose author should hear of it.
fn is_ours(name: &str) -> bool {
    name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
}

/// The common prefix is left out of the comparison: it would make any two names look alike.
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
    // What follows a percent sign starts with its two hex digits.
    let mut parts = text.split('%');
    parts.next().is_some_and(|first| first.bytes().all(is_plain))
        && parts
            .all(|part| part.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2 && part.bytes().all(is_plain))
}

/// Docker and Podman differ in what they allow in a network's name; an unknown name is found out by comparison.
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The labels of a container that opts in and carries `more`.
    fn enabled(more: &[(&str, &str)]) -> Labels {
        parse([(ENABLE, "true")].into_iter().chain(more.iter().copied())).unwrap()
    }

    /// The spec and the one problem that `name=value` leads to.
    fn refused(name: &str, value: &str) -> LabelProblem {
        let labels = enabled(&[(name, value)]);
        assert_eq!(labels.spec, LabelSpec::default(), "{name}={value:?} must leave the default");
        assert_eq!(labels.problems.len(), 1, "{name}={value:?}: {:?}", labels.problems);
        labels.problems.into_iter().next().unwrap()
    }

    #[test]
    fn without_the_enable_label_there_is_nothing() {
        assert_eq!(parse([]), None);
        assert_eq!(
            parse([("inference.port", "8000"), ("inference.enabled", "true"), ("Inference.Enable", "true")]),
            None
        );
    }

    #[test]
    fn enable() {
        for value in ["true", "TRUE", "True", " true ", "\t1\n", "1", "yes", "On"] {
            let labels = parse([(ENABLE, value)]).unwrap();
            assert_eq!((labels.opted, labels.problems), (Opted::In, vec![]), "{value:?}");
        }
        for value in ["false", "0", "NO", " off "] {
            let labels = parse([(ENABLE, value)]).unwrap();
            assert_eq!((labels.opted, labels.problems), (Opted::Out, vec![]), "{value:?}");
        }
        for (value, shown) in [("", ""), (" ture", "ture"), ("2", "2"), ("true,", "true,"), ("a\nb\"", "a\\nb\\\"")] {
            let labels = parse([(ENABLE, value)]).unwrap();
            assert_eq!(labels.opted, Opted::Unclear(shown.to_owned()), "{value:?}");
            assert_eq!(labels.problems.len(), 1, "{value:?}");
            assert!(labels.problems[0].to_string().contains("expected true or false"), "{}", labels.problems[0]);
        }
    }

    #[test]
    fn nothing_but_enable_gives_the_defaults() {
        let labels = enabled(&[("com.docker.compose.project", "llm"), ("signal", "1"), ("inferences.port", "1")]);
        assert_eq!(labels, Labels { opted: Opted::In, spec: LabelSpec::default(), problems: vec![] });
        assert_eq!((labels.spec.base_path.as_str(), labels.spec.weight.get()), ("/v1", 1000));
    }

    #[test]
    fn every_label_is_read() {
        let labels = enabled(&[
            ("inference.port", " 9000 "),
            ("inference.api.base_path", "/api/v1/"),
            ("inference.network", "llm-net"),
            ("inference.health.path", "/ready?full=1"),
            ("inference.weight", "2.5"),
            ("inference.max_inflight", "64"),
        ]);
        let spec = LabelSpec {
            port: Some(9000),
            base_path: "/api/v1".to_owned(),
            network: Some("llm-net".to_owned()),
            health_path: Some("/ready?full=1".to_owned()),
            weight: NonZeroU32::new(2500).unwrap(),
            max_inflight: NonZeroU32::new(64),
        };
        assert_eq!(labels, Labels { opted: Opted::In, spec, problems: vec![] });
    }

    #[test]
    fn base_paths() {
        for (value, base_path) in [
            ("/v1", "/v1"),
            ("/v1/", "/v1"),
            ("/v1//", "/v1"),
            ("v1", "/v1"),
            ("api/v1/", "/api/v1"),
            ("/", ""),
            (" / ", ""),
            ("/a..b/v1.", "/a..b/v1."),
            ("/openai/deployments/gpt%204o/", "/openai/deployments/gpt%204o"),
            ("/~u/x:y@z!$&'()*+,;=", "/~u/x:y@z!$&'()*+,;="),
        ] {
            let labels = enabled(&[(BASE_PATH, value)]);
            assert_eq!((labels.spec.base_path.as_str(), &labels.problems), (base_path, &vec![]), "{value:?}");
        }
        for value in [
            "",
            "  ",
            "..",
            "/..",
            "/v1/../admin",
            "/v1/%2e%2E/admin",
            "/v1/.%2e/",
            "/./v1",
            "/v1?x=1",
            "/v1#top",
            "/v 1",
            "/v1\u{7}",
            "/v1\r\nX: y",
            "/vé1",
            "/a//b",
            "//host/v1",
            "http://host/v1",
            "/v1%",
            "/v1%2",
            "/v1%zz",
            "/v1%+1",
            "/v\\1",
            "/{id}",
        ] {
            let problem = refused(BASE_PATH, value);
            assert!(problem.to_string().contains("expected a path such as /v1"), "{problem}");
        }
    }

    #[test]
    fn health_paths() {
        for (value, path) in [
            ("/health", "/health"),
            ("health", "/health"),
            ("/ready/", "/ready/"),
            ("/", "/"),
            ("/ready?a=b&c=/d?e%20f", "/ready?a=b&c=/d?e%20f"),
            ("/ready?", "/ready?"),
        ] {
            let labels = enabled(&[(HEALTH_PATH, value)]);
            assert_eq!((labels.spec.health_path.as_deref(), &labels.problems), (Some(path), &vec![]), "{value:?}");
        }
        for value in
            ["?x", "/a/../b", "/h#x", "/h?x y", "/h?x#y", "/h?%", "http://169.254.169.254/", "//host/", "/h\u{0}"]
        {
            refused(HEALTH_PATH, value);
        }
    }

    #[test]
    fn numbers() {
        for (value, thousandths) in [
            ("1", 1000),
            ("3", 3000),
            ("0.5", 500),
            (".25", 250),
            ("2.", 2000),
            ("0.001", 1),
            ("007", 7000),
            ("1000.000", 1_000_000),
        ] {
            let labels = enabled(&[(WEIGHT, value)]);
            assert_eq!((labels.spec.weight.get(), &labels.problems), (thousandths, &vec![]), "{value:?}");
        }
        for value in [
            "0", "0.000", "-1", "+1", "1000.001", "1001", "0.0001", "1,5", "1e3", "NaN", "inf", ".", "1.2.3", "1.+2",
            "٣",
        ] {
            assert_eq!(refused(WEIGHT, value).name, WEIGHT);
        }
        for value in ["0", "65536", "-1", "80a", "8000/tcp", "8000:8000"] {
            assert_eq!(refused(PORT, value).expected, "a port, 1 to 65535");
        }
        for value in ["0", "-1", "1.5", "many", "4294967296"] {
            assert_eq!(refused(MAX_INFLIGHT, value).name, MAX_INFLIGHT);
        }
        assert_eq!(enabled(&[(PORT, "65535")]).spec.port, Some(65535));
        assert_eq!(enabled(&[(MAX_INFLIGHT, "1")]).spec.max_inflight, NonZeroU32::new(1));
    }

    #[test]
    fn an_empty_value_is_unset() {
        let labels = enabled(&[(PORT, ""), (NETWORK, " "), (HEALTH_PATH, ""), (WEIGHT, "\t"), (MAX_INFLIGHT, "")]);
        assert_eq!((labels.spec, labels.problems), (LabelSpec::default(), vec![]));
    }

    #[test]
    fn a_network_name_holds_nothing_that_cannot_be_seen() {
        assert_eq!(enabled(&[(NETWORK, "my net_1.x")]).spec.network.as_deref(), Some("my net_1.x"));
        assert_eq!(refused(NETWORK, "a\u{1b}[2Jb").value.as_deref(), Some("a\\u{1b}[2Jb"));
        assert_eq!(refused(NETWORK, "a\u{202e}b").value.as_deref(), Some("a\\u{202e}b"));
    }

    #[test]
    fn a_problem_is_one_clear_sentence() {
        for (name, value, sentence) in [
            (PORT, "80a", r#"inference.port="80a" is ignored: expected a port, 1 to 65535"#),
            (
                "inference.prot",
                "8000",
                "inference.prot is no label of this proxy and is ignored; did you mean inference.port?",
            ),
            (
                "inference.api_key",
                "secret",
                "inference.api_key is no label of this proxy and is ignored: expected a name that --help lists",
            ),
        ] {
            assert_eq!(refused(name, value).to_string(), sentence);
        }
    }

    #[test]
    fn unknown_names_get_the_nearest_known_one_when_it_is_close() {
        for (name, suggestion) in [
            ("inference.ports", Some(PORT)),
            ("INFERENCE.PORT", Some(PORT)),
            ("inference.enabled", Some(ENABLE)),
            ("inference.api.basepath", Some(BASE_PATH)),
            ("inference.base_path", Some(BASE_PATH)),
            ("inference.api-base-path", Some(BASE_PATH)),
            ("inference.health_path", Some(HEALTH_PATH)),
            ("inference.healthpath", Some(HEALTH_PATH)),
            ("inference.max-in-flight", Some(MAX_INFLIGHT)),
            ("inference.wieght", Some(WEIGHT)),
            ("inference.networks", Some(NETWORK)),
            ("inference.host", None),
            ("inference.models", None),
            ("inference.", None),
            ("inference.\u{1F980}", None),
        ] {
            let problem = refused(name, "x");
            assert_eq!((problem.suggestion, problem.value), (suggestion, None), "{name}");
        }
    }

    #[test]
    fn giant_labels_cost_nothing() {
        let giant = "x".repeat(4 << 20);
        for name in KNOWN.iter().map(|label| label.name).filter(|name| *name != ENABLE) {
            let problem = refused(name, &giant);
            assert_eq!(problem.expected, "at most 1024 bytes");
            assert_eq!(problem.value.unwrap().chars().count(), MAX_SHOWN_CHARS + 1);
        }
        let labels = parse([(ENABLE, giant.as_str())]).unwrap();
        assert!(matches!(labels.opted, Opted::Unclear(shown) if shown.chars().count() == MAX_SHOWN_CHARS + 1));

        let problem = refused(&format!("inference.{giant}"), &giant);
        assert_eq!((problem.suggestion, problem.name.chars().count()), (None, MAX_SHOWN_CHARS + 1));

        let longest = format!("/{}", "x".repeat(MAX_VALUE_BYTES - 1));
        assert_eq!(enabled(&[(BASE_PATH, &longest)]).spec.base_path, longest);
        assert_eq!(refused(BASE_PATH, &format!("{longest}x")).expected, "at most 1024 bytes");
    }

    #[test]
    fn problems_are_bounded_and_known_labels_come_first() {
        let unknown: Vec<String> = (0..100).map(|i| format!("inference.unknown{i:02}")).collect();
        let mut pairs: Vec<(&str, &str)> = unknown.iter().map(|name| (name.as_str(), "x")).collect();
        pairs.extend([(WEIGHT, "heavy"), (PORT, "x")]);
        let labels = enabled(&pairs);
        let names: Vec<&str> = labels.problems.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names.len(), MAX_PROBLEMS);
        assert_eq!(names[..3], [PORT, WEIGHT, "inference.unknown00"]);
        assert_eq!(names[MAX_PROBLEMS - 1], "inference.unknown13");
    }

    #[test]
    fn known_labels_are_those_that_are_read() {
        // A label that only KNOWN has would be ignored in silence; one that only the parser has would be "unknown".
        for label in KNOWN {
            let labels = parse([(ENABLE, "true"), (label.name, "\u{0}")]).unwrap();
            assert_eq!(labels.problems.len(), 1, "{}", label.name);
            assert!(labels.problems[0].value.is_some(), "{} is not read", label.name);
            assert!(label.name.starts_with(PREFIX) && !label.help.is_empty() && !label.help.ends_with('.'));
        }
    }

    /// Names near and far from the known ones, values near and far from usable ones.
    fn any_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
        let known = || prop::sample::select(KNOWN.iter().map(|label| label.name.to_owned()).collect::<Vec<_>>());
        let name = prop_oneof![4 => known(), 1 => "[iI]nference\\.[a-z._]{0,14}", 1 => any::<String>()];
        let value = prop_oneof![
            2 => "[a-z0-9/.?%#&=+ -]{0,12}",
            2 => "(/?[a-z0-9.%]{0,3}){0,4}/{0,2}(\\?[a-z=&/?%2e]{0,4})?",
            1 => "[0-9]{1,5}(\\.[0-9]{0,4})?",
            1 => prop::sample::select(vec!["true", "off", " Yes "]).prop_map(str::to_owned),
            1 => any::<String>(),
            1 => "/x{1019,1029}",
        ];
        prop::collection::btree_map(name, value, 0..12)
    }

    fn parse_map(labels: &BTreeMap<String, String>) -> Option<Labels> {
        parse(labels.iter().map(|(name, value)| (name.as_str(), value.as_str())))
    }

    /// The labels that say what `spec` says.
    fn labels_for(spec: &LabelSpec) -> BTreeMap<String, String> {
        let base_path = if spec.base_path.is_empty() { "/".to_owned() } else { spec.base_path.clone() };
        let weight = format!("{}.{:03}", spec.weight.get() / 1000, spec.weight.get() % 1000);
        [
            (ENABLE, Some("true".to_owned())),
            (PORT, spec.port.map(|port| port.to_string())),
            (BASE_PATH, Some(base_path)),
            (NETWORK, spec.network.clone()),
            (HEALTH_PATH, spec.health_path.clone()),
            (WEIGHT, Some(weight)),
            (MAX_INFLIGHT, spec.max_inflight.map(|n| n.to_string())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

        #[test]
        fn whatever_the_labels_the_result_is_bounded_and_printable(labels in any_labels()) {
            let parsed = parse_map(&labels);
            prop_assert_eq!(parsed.is_some(), labels.contains_key(ENABLE));
            for problem in parsed.iter().flat_map(|p| &p.problems) {
                let text = problem.to_string();
                prop_assert!(text.len() < 2000 && !text.contains(char::is_control), "{:?}", text);
            }
            prop_assert!(parsed.is_none_or(|p| p.problems.len() <= MAX_PROBLEMS));
        }

        #[test]
        fn the_order_of_labels_changes_nothing(labels in any_labels()) {
            let reversed = parse(labels.iter().rev().map(|(name, value)| (name.as_str(), value.as_str())));
            prop_assert_eq!(parse_map(&labels), reversed);
        }

        #[test]
        fn a_spec_written_as_labels_is_read_back(mut labels in any_labels()) {
            labels.insert(ENABLE.to_owned(), "on".to_owned());
            let spec = parse_map(&labels).unwrap().spec;
            let again = parse_map(&labels_for(&spec)).unwrap();
            prop_assert_eq!(again, Labels { opted: Opted::In, spec, problems: vec![] });
        }

        #[test]
        fn accepted_paths_make_request_targets(mut labels in any_labels()) {
            labels.insert(ENABLE.to_owned(), "on".to_owned());
            let spec = parse_map(&labels).unwrap().spec;
            let is_target = |text: &str| text.parse::<http::uri::PathAndQuery>().is_ok_and(|t| t.as_str() == text);
            prop_assert!(spec.base_path.is_empty() || spec.base_path.starts_with('/'));
            prop_assert!(!spec.base_path.ends_with('/'));
            prop_assert!(is_target(&format!("{}/models", spec.base_path)), "{:?}", spec.base_path);
            if let Some(path) = spec.health_path {
                prop_assert!(path.starts_with('/') && is_target(&path), "{:?}", path);
            }
        }
    }
}
