//! Where traces and metrics go, by the standard variables of OpenTelemetry.
//!
//! The names and their meaning are those of the specification
//! (<https://opentelemetry.io/docs/specs/otel/protocol/exporter/>,
//! <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>), with three rules of this project:
//! nothing is exported unless an endpoint is named, an unset protocol follows the port, and a value that is not understood
//! stops the start instead of being ignored, as it does for every other variable.

use std::{fmt, path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue, Uri, uri::PathAndQuery};
use percent_encoding::percent_decode_str;

use super::{ConfigError, Env, Knob, Warning, knob, parse_bool, parse_url};

/// The variables, in the order of `--help`.
pub(super) const KNOBS: [Knob; 29] = [
    knob("OTEL_EXPORTER_OTLP_ENDPOINT", "", "collector for traces and metrics; unset: the proxy exports nothing"),
    knob("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "", "collector for traces, path included; unset: the common one"),
    knob("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "", "collector for metrics, path included; unset: the common one"),
    knob(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "",
        "grpc or http/protobuf; unset: grpc when the port is 4317, else http/protobuf",
    ),
    knob("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "", "the same for traces alone"),
    knob("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "", "the same for metrics alone"),
    knob("OTEL_EXPORTER_OTLP_HEADERS", "", "headers for the collector, as key=value,key=value with URL encoding"),
    knob("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "", "the same for traces alone"),
    knob("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "", "the same for metrics alone"),
    knob("OTEL_EXPORTER_OTLP_TIMEOUT", "10000", "time limit in milliseconds for one export"),
    knob("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "", "the same for traces alone"),
    knob("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "", "the same for metrics alone"),
    knob("OTEL_EXPORTER_OTLP_COMPRESSION", "none", "gzip or none"),
    knob("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "", "the same for traces alone"),
    knob("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "", "the same for metrics alone"),
    knob("OTEL_EXPORTER_OTLP_CERTIFICATE", "", "PEM file to trust for https:// endpoints; unset: the public roots"),
    knob("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "", "the same for traces alone"),
    knob("OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE", "", "the same for metrics alone"),
    knob("OTEL_TRACES_EXPORTER", "otlp", "none: no traces"),
    knob("OTEL_METRICS_EXPORTER", "otlp", "none: no metrics over OTLP; /metrics stays"),
    knob("OTEL_SDK_DISABLED", "false", "true: the proxy exports nothing, whatever else is set"),
    knob("OTEL_SERVICE_NAME", "inference-proxy", "service.name in traces and metrics"),
    knob("OTEL_RESOURCE_ATTRIBUTES", "", "further attributes of this proxy, as key=value,key=value with URL encoding"),
    knob(
        "OTEL_TRACES_SAMPLER",
        "parentbased_always_on",
        "always_on, always_off, traceidratio, or one of these after parentbased_, which follows the caller's decision",
    ),
    knob("OTEL_TRACES_SAMPLER_ARG", "1.0", "for traceidratio: the share of requests to trace, 0 to 1"),
    knob("OTEL_METRIC_EXPORT_INTERVAL", "60000", "milliseconds between two exports of metrics"),
    knob("OTEL_BSP_SCHEDULE_DELAY", "5000", "milliseconds between two exports of spans"),
    knob("OTEL_BSP_MAX_QUEUE_SIZE", "2048", "spans that wait for the next export; the proxy drops more"),
    knob("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "512", "spans in one export"),
];

/// Those of the specification that are not used, each with the values that ask for what is done anyway. A name that ends
/// in `_` stands for all that begin so. Others belong to other programs, which may share an environment with this one.
const UNUSED: [(&str, &[&str]); 24] = [
    ("OTEL_ATTRIBUTE_COUNT_LIMIT", &[]),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", &[]),
    ("OTEL_BSP_EXPORT_TIMEOUT", &[]),
    ("OTEL_CONFIG_FILE", &[]),
    ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", &[]),
    ("OTEL_EXPERIMENTAL_CONFIG_FILE", &[]),
    ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &[]),
    ("OTEL_EXPORTER_OTLP_INSECURE", &[]),
    ("OTEL_EXPORTER_OTLP_LOGS_", &[]),
    ("OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY", &[]),
    ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", &["explicit_bucket_histogram"]),
    ("OTEL_EXPORTER_OTLP_METRICS_INSECURE", &[]),
    ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", &["cumulative"]),
    ("OTEL_EXPORTER_OTLP_PROFILES_", &[]),
    ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", &[]),
    ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", &[]),
    ("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT", &[]),
    ("OTEL_LOGS_EXPORTER", &["none"]),
    ("OTEL_LOG_LEVEL", &[]),
    ("OTEL_METRIC_EXPORT_TIMEOUT", &[]),
    ("OTEL_PROPAGATORS", &["tracecontext", "baggage", "none"]),
];

/// What is exported, and how. There is none where nothing is.
#[derive(Debug, Clone, PartialEq)]
pub struct OtlpSettings {
    /// Spans, if they are wanted.
    pub traces: Option<Traces>,
    /// Metrics, if they are wanted.
    pub metrics: Option<Metrics>,
    /// What is said of this process in both: `service.name` first, then `OTEL_RESOURCE_ATTRIBUTES`.
    pub resource: Vec<(String, String)>,
}

/// How spans are made and sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Traces {
    /// Where to.
    pub collector: Collector,
    /// Which requests are traced.
    pub sampler: Sampler,
    /// Time between two exports.
    pub schedule_delay: Duration,
    /// Spans that wait; more are dropped.
    pub queue_max: usize,
    /// Spans that are sent at a time.
    pub batch_max: usize,
}

/// How metrics are sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    /// Where to.
    pub collector: Collector,
    /// Time between two exports.
    pub interval: Duration,
}

/// The collector of one kind of telemetry.
#[derive(Debug, Clone, PartialEq)]
pub struct Collector {
    /// Where each request goes, its path included.
    pub url: Uri,
    /// What is spoken.
    pub protocol: Protocol,
    /// Sent with every request.
    pub headers: Headers,
    /// Time for one request.
    pub timeout: Duration,
    /// Requests are compressed with gzip.
    pub gzip: bool,
    /// Certificates to trust instead of the public roots.
    pub certificate: Option<PathBuf>,
}

/// The two forms of OTLP that are spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Over HTTP/2.
    Grpc,
    /// POST with protobuf.
    HttpProtobuf,
}

/// Headers for a collector. They hold keys: their values are in no log and in no other output.
#[derive(Clone, Default, PartialEq)]
pub struct Headers(pub Vec<(HeaderName, HeaderValue)>);

/// Which requests are traced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Where a caller has decided already, its decision counts.
    pub parent_based: bool,
    /// The share of requests that is traced otherwise, 0 to 1.
    pub ratio: f64,
}

/// What is asked of one kind of telemetry.
struct Signal {
    exporter: &'static str,
    endpoint: &'static str,
    protocol: &'static str,
    headers: &'static str,
    timeout: &'static str,
    compression: &'static str,
    certificate: &'static str,
    /// Below the common endpoint.
    http_path: &'static str,
    grpc_path: &'static str,
}

const TRACES: Signal = Signal {
    exporter: "OTEL_TRACES_EXPORTER",
    endpoint: "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    protocol: "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    headers: "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    timeout: "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    compression: "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
    certificate: "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    http_path: "/v1/traces",
    grpc_path: "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
};

const METRICS: Signal = Signal {
    exporter: "OTEL_METRICS_EXPORTER",
    endpoint: "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    protocol: "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
    headers: "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
    timeout: "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT",
    compression: "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION",
    certificate: "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE",
    http_path: "/v1/metrics",
    grpc_path: "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
};

const ENDPOINT: &str =
    "http://host:port or https://host:port, the port 1 to 65535; user and password go into OTEL_EXPORTER_OTLP_HEADERS";
const PROTOCOL: &str = "grpc or http/protobuf";
const HEADERS: &str = "key=value,key=value with URL encoding";
const MILLIS: &str = "a number of milliseconds above zero";
const COUNT: &str = "a number above zero";
const COMPRESSION: &str = "gzip or none";

/// Reads the variables. `None`: nothing is exported.
///
/// # Errors
/// The first value that is not understood.
pub(super) fn resolve(env: &Env) -> Result<Option<OtlpSettings>, ConfigError> {
    // All of them are read before anything is decided: nonsense is told even where it would do no harm.
    let traces = Traces {
        collector: Collector::placeholder(),
        sampler: sampler(env)?,
        schedule_delay: env.required("OTEL_BSP_SCHEDULE_DELAY", MILLIS, parse_millis)?,
        queue_max: env.required("OTEL_BSP_MAX_QUEUE_SIZE", COUNT, parse_count)?,
        batch_max: env.required("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", COUNT, parse_count)?,
    };
    let interval = env.required("OTEL_METRIC_EXPORT_INTERVAL", MILLIS, parse_millis)?;
    let resource = resource(env)?;
    let disabled = env.required("OTEL_SDK_DISABLED", "true or false", parse_bool)?;
    let traces = TRACES.resolve(env)?.map(|collector| Traces { collector, ..traces });
    let metrics = METRICS.resolve(env)?.map(|collector| Metrics { collector, interval });
    let is_any = !disabled && (traces.is_some() || metrics.is_some());
    Ok(is_any.then_some(OtlpSettings { traces, metrics, resource }))
}

/// What was probably meant otherwise.
pub(super) fn warnings(env: &Env, settings: Option<&OtlpSettings>) -> Vec<Warning> {
    // The letters of the second are easily written for those of the first.
    let is_ours = |name: &str| ["OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OLTP_"].iter().any(|p| name.starts_with(p));
    let (mut warnings, mut unused) = (Vec::new(), Vec::new());
    for (name, value) in &env.vars {
        let is_it = |known: &str| if known.ends_with('_') { name.starts_with(known) } else { name == known };
        match UNUSED.iter().find(|(known, _)| is_it(known)) {
            Some((_, usual)) => {
                let is_usual = |item: &str| usual.iter().any(|usual| item.trim().eq_ignore_ascii_case(usual));
                if !value.split(',').all(is_usual) {
                    unused.push(name.clone());
                }
            }
            None if is_ours(name) => warnings.extend(Warning::unknown(name)),
            None => {}
        }
    }
    if !unused.is_empty() {
        warnings.push(Warning::Unused { names: unused });
    }
    if let Some(path) = settings.and_then(OtlpSettings::path_said_twice) {
        warnings.push(Warning::SaidTwice { path });
    }
    warnings
}

impl OtlpSettings {
    /// The path that the common endpoint should not end in.
    fn path_said_twice(&self) -> Option<&'static str> {
        let traces = self.traces.as_ref().map(|traces| (&traces.collector, TRACES.http_path));
        let metrics = self.metrics.as_ref().map(|metrics| (&metrics.collector, METRICS.http_path));
        traces.into_iter().chain(metrics).find_map(|(collector, added)| {
            let endpoint = collector.url.path().strip_suffix(added)?;
            [TRACES.http_path, METRICS.http_path].into_iter().find(|path| endpoint.ends_with(path))
        })
    }
}

impl Signal {
    fn resolve(&self, env: &Env) -> Result<Option<Collector>, ConfigError> {
        let wanted = env.required(self.exporter, "otlp or none", |v| match v {
            "otlp" => Some(true),
            "none" => Some(false),
            _ => None,
        })?;
        let own = env.secret(self.endpoint, ENDPOINT, parse_endpoint)?;
        let common = env.secret("OTEL_EXPORTER_OTLP_ENDPOINT", ENDPOINT, parse_endpoint)?;
        let protocol = match env.optional(self.protocol, PROTOCOL, Protocol::parse)? {
            None => env.optional("OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOL, Protocol::parse)?,
            own => own,
        };
        let headers = match env.secret(self.headers, HEADERS, parse_headers)? {
            None => env.secret("OTEL_EXPORTER_OTLP_HEADERS", HEADERS, parse_headers)?,
            own => own,
        };
        let timeout = match env.optional(self.timeout, MILLIS, parse_millis)? {
            None => env.required("OTEL_EXPORTER_OTLP_TIMEOUT", MILLIS, parse_millis)?,
            Some(own) => own,
        };
        let gzip = match env.optional(self.compression, COMPRESSION, parse_compression)? {
            None => env.required("OTEL_EXPORTER_OTLP_COMPRESSION", COMPRESSION, parse_compression)?,
            Some(own) => own,
        };
        let file = |name| env.optional(name, "a file", |v| Some(PathBuf::from(v)));
        let certificate = match file(self.certificate)? {
            None => file("OTEL_EXPORTER_OTLP_CERTIFICATE")?,
            own => own,
        };
        let is_common = own.is_none();
        let Some(endpoint) = own.or(common).filter(|_| wanted) else { return Ok(None) };
        let protocol = protocol.unwrap_or(match endpoint.port_u16() {
            Some(4317) => Protocol::Grpc,
            _ => Protocol::HttpProtobuf,
        });
        let path = match protocol {
            Protocol::Grpc => self.grpc_path.to_owned(),
            Protocol::HttpProtobuf if is_common => {
                format!("{}{}", endpoint.path().trim_end_matches('/'), self.http_path)
            }
            Protocol::HttpProtobuf => endpoint.path_and_query().map_or("/", PathAndQuery::as_str).to_owned(),
        };
        let mut parts = endpoint.into_parts();
        parts.path_and_query = path.parse().ok();
        let Ok(url) = Uri::from_parts(parts) else { return Ok(None) };
        Ok(Some(Collector { url, protocol, headers: headers.unwrap_or_default(), timeout, gzip, certificate }))
    }
}

/// What the path of a collector may show: the segments that are the protocol's.
const PATH_WORDS: &[&str] = &[
    "",
    "Export",
    "metrics",
    "opentelemetry.proto.collector.metrics.v1.MetricsService",
    "opentelemetry.proto.collector.trace.v1.TraceService",
    "otlp",
    "traces",
    "v1",
];

impl Collector {
    /// Where it is, for people: host, port and path. Some services take their key in the path, so what is no word of the
    /// protocol is not shown; neither are queries.
    pub fn place(&self) -> String {
        let authority = self.url.authority().map_or("?", |authority| authority.as_str());
        let shown = |segment| if PATH_WORDS.contains(&segment) { segment } else { "\u{2026}" };
        let segments: Vec<&str> = self.url.path().split('/').map(shown).collect();
        format!("{authority}{}", segments.join("/"))
    }

    fn placeholder() -> Collector {
        Collector {
            url: Uri::default(),
            protocol: Protocol::Grpc,
            headers: Headers::default(),
            timeout: Duration::ZERO,
            gzip: false,
            certificate: None,
        }
    }
}

impl Protocol {
    fn parse(text: &str) -> Option<Protocol> {
        match text {
            "grpc" => Some(Protocol::Grpc),
            "http/protobuf" => Some(Protocol::HttpProtobuf),
            _ => None,
        }
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

fn sampler(env: &Env) -> Result<Sampler, ConfigError> {
    let arg = env.required("OTEL_TRACES_SAMPLER_ARG", "a number from 0 to 1", |v| {
        v.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share))
    })?;
    let accepted = "always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off or \
                    parentbased_traceidratio";
    env.required("OTEL_TRACES_SAMPLER", accepted, |v| {
        let root = v.strip_prefix("parentbased_");
        let ratio = match root.unwrap_or(v) {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => arg,
            _ => return None,
        };
        Some(Sampler { parent_based: root.is_some(), ratio })
    })
}

fn resource(env: &Env) -> Result<Vec<(String, String)>, ConfigError> {
    let mut given = env.optional("OTEL_RESOURCE_ATTRIBUTES", HEADERS, parse_pairs)?.unwrap_or_default();
    let at = given.iter().rposition(|(key, _)| key == "service.name");
    let among_them = at.map(|at| given.swap_remove(at).1);
    given.retain(|(key, _)| key != "service.name");
    let name = match (env.optional("OTEL_SERVICE_NAME", "a name", |v| Some(v.to_owned()))?, among_them) {
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => env.required("OTEL_SERVICE_NAME", "a name", |v| Some(v.to_owned()))?,
    };
    given.insert(0, ("service.name".to_owned(), name));
    Ok(given)
}

fn parse_endpoint(text: &str) -> Option<Uri> {
    let uri = parse_url(text, &["http://", "https://"]).ok()?;
    Some(uri).filter(|uri| uri.authority().is_some_and(|authority| !authority.as_str().contains('@')))
}

/// `key=value,key=value`, both sides URL encoded, as the W3C's baggage has it. Blanks around them do not count.
fn parse_pairs(text: &str) -> Option<Vec<(String, String)>> {
    let decoded = |text: &str| percent_decode_str(text.trim()).decode_utf8().ok().map(std::borrow::Cow::into_owned);
    let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=')?;
            let (key, value) = (decoded(key)?, decoded(value)?);
            (!key.is_empty()).then_some((key, value))
        })
        .collect()
}

fn parse_headers(text: &str) -> Option<Headers> {
    let pairs = parse_pairs(text)?;
    let headers = pairs.into_iter().map(|(name, value)| {
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, value))
    });
    headers.collect::<Option<Vec<_>>>().map(Headers)
}

fn parse_millis(text: &str) -> Option<Duration> {
    // A day is more than anybody means, and no sum with it overflows.
    const MAX_MS: u64 = 24 * 3600 * 1000;
    text.parse().ok().filter(|ms| (1..=MAX_MS).contains(ms)).map(Duration::from_millis)
}

fn parse_count<T: std::str::FromStr>(text: &str) -> Option<T> {
    const MAX: u32 = 1 << 20;
    text.parse::<u32>().ok().filter(|n| (1..=MAX).contains(n))?;
    text.parse().ok()
}

fn parse_compression(text: &str) -> Option<bool> {
    match text {
        "gzip" => Some(true),
        "none" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
