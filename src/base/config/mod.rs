//! Settings: every environment variable, defined once.
//!
//! [`KNOBS`] is the single table that parsing, `--help` and the test of `docs/configuration.md` read. A [`Config`] is the resolved form: no
//! option that must be set later, no text that must be parsed again. Only `main` reads the process environment; everything
//! else gets it as pairs, so tests configure by value.

pub mod otlp;
mod targets;

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, time::Duration};

use http::Uri;
use tracing_subscriber::filter::{LevelFilter, Targets};

use self::otlp::OtlpSettings;
use crate::base::foreign::FOREVER;

/// One environment variable: its name, its default as a user would write it, and what it does.
#[derive(Debug, Clone, Copy)]
pub struct Knob {
    /// Name of the environment variable.
    pub name: &'static str,
    /// Default, in the notation a user would write; empty when there is none.
    pub default: &'static str,
    /// One sentence for `--help`.
    pub help: &'static str,
}

const fn knob(name: &'static str, default: &'static str, help: &'static str) -> Knob {
    Knob { name, default, help }
}

/// Every variable that the proxy reads.
pub const KNOBS: &[Knob] = &{
    let mut all = [OWN[0]; OWN.len() + otlp::KNOBS.len()];
    let mut at = 0;
    while at < all.len() {
        all[at] = if at < OWN.len() { OWN[at] } else { otlp::KNOBS[at - OWN.len()] };
        at += 1;
    }
    all
};

/// Those that are its own, and Docker's.
const OWN: &[Knob] = &[
    knob("PROXY_PORT", "8080", "data port"),
    knob("PROXY_BIND", "", "address to listen on; unset: all addresses, IPv4 and IPv6"),
    knob("PROXY_ADMIN_PORT", "", "when set, /metrics, /status and the status page move to this port"),
    knob("PROXY_DRAIN_TIMEOUT", "60s", "how long in-flight requests may go on when a backend, or the proxy, goes away"),
    knob(
        "PROXY_SETTLE",
        "5s",
        "how long the proxy still accepts connections after SIGTERM, while /readyz answers 503: longer than a front \
         proxy's check interval and time-out together",
    ),
    knob("PROXY_NETWORK", "", "default for the label inference.network"),
    knob(
        "PROXY_SAME_MODEL",
        "balance",
        "several containers with one model id: balance (one pool) or newest (the last one wins)",
    ),
    knob(
        "PROXY_BALANCE",
        "ewma",
        "which replica gets a request: ewma (fastest to the first byte for its load), least, round_robin or prefix",
    ),
    knob("PROXY_REQUIRE_HEALTHCHECK", "false", "true: ignore containers that have no HEALTHCHECK; false: probe them"),
    knob("PROXY_MODELS_REFRESH", "30s", "interval at which the proxy asks live backends again for their models"),
    knob("PROXY_MODEL_GRACE", "60s", "how long requests for a model that has gone get 503 instead of 404"),
    knob(
        "PROXY_RETRIES",
        "1",
        "further attempts on another backend, only before the proxy has passed on any byte of an answer",
    ),
    knob(
        "PROXY_QUEUE_MAX",
        "256",
        "requests per model that wait, in order, while all replicas are full or its container is starting; 0: no queue",
    ),
    knob("PROXY_QUEUE_TIMEOUT", "30s", "how long a request waits in that queue; 0: no queue"),
    knob("PROXY_CONNECT_TIMEOUT", "2s", "time limit for connecting to a backend"),
    knob("PROXY_CLIENT_IDLE_TIMEOUT", "650s", "how long a client's connection may be without a request"),
    knob("PROXY_CLIENT_WRITE_TIMEOUT", "60s", "how long a client may take no byte of an answer that is ready for it"),
    knob("PROXY_FIRST_BYTE_TIMEOUT", "off", "time limit from the request to the first byte of its answer"),
    knob("PROXY_IDLE_TIMEOUT", "off", "longest silence of a backend, before or within its answer"),
    knob("PROXY_MAX_BODY", "1GiB", "larger request bodies get 413"),
    knob("PROXY_HOLD_MAX", "64MiB", "how many bytes of one body the proxy holds while it does not know the model yet"),
    knob("PROXY_CORS_ORIGINS", "", "origins that get CORS headers, comma-separated; * for all"),
    knob(
        "PROXY_LOG",
        "info",
        "off, error, warn, info, debug, trace, or a filter such as info,inference_proxy::control::registry=debug",
    ),
    knob("PROXY_ACCESS_LOG", "off", "on: one line per request at info"),
    knob("PROXY_USAGE_METRICS", "on", "off: the proxy does not look into answers for token counts and finish reasons"),
    knob("PROXY_LOG_FORMAT", "", "text, json or yaml; unset: text on a terminal, else json"),
    knob("DOCKER_HOST", "", "Docker Engine to watch; unset: unix:///var/run/docker.sock"),
    knob("DOCKER_CERT_PATH", "", "folder with ca.pem, cert.pem and key.pem for a Docker Engine behind TLS"),
    knob("DOCKER_TLS_VERIFY", "", "any value: use TLS with DOCKER_CERT_PATH for a tcp:// DOCKER_HOST"),
];

/// What to do when several containers announce one model id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SameModel {
    /// One pool; traffic goes to all of them.
    Balance,
    /// The last one to become ready gets everything; an earlier one takes over when it goes.
    Newest,
}

/// Which member of a pool gets the next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// Latency-aware.
    Ewma,
    /// Least in-flight relative to weight.
    Least,
    /// In turn.
    RoundRobin,
    /// Affinity of conversations to the replica that has their prefix.
    Prefix,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
    /// One YAML document a line group.
    Yaml,
}

/// Where the Docker Engine is, as every Docker client reads it from `DOCKER_HOST` and its companions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DockerEndpoint {
    /// `DOCKER_HOST`; `None` is the local socket.
    pub host: Option<String>,
    /// `DOCKER_CERT_PATH`; else `.docker` in the home folder, if there is one.
    pub cert_path: Option<PathBuf>,
    /// `DOCKER_TLS_VERIFY` is set.
    pub tls: bool,
}

/// The resolved settings.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each field is the knob of the same name; KNOBS says what it means")]
pub struct Config {
    pub bind: Option<IpAddr>,
    pub port: u16,
    pub admin_port: Option<u16>,
    pub drain_timeout: Duration,
    pub settle: Duration,
    pub network: Option<String>,
    pub same_model: SameModel,
    pub balance: Balance,
    pub require_healthcheck: bool,
    pub models_refresh: Duration,
    pub model_grace: Duration,
    pub retries: u32,
    pub queue_max: usize,
    pub queue_timeout: Duration,
    pub connect_timeout: Duration,
    pub client_idle_timeout: Duration,
    pub client_write_timeout: Option<Duration>,
    pub first_byte_timeout: Option<Duration>,
    pub idle_timeout: Option<Duration>,
    pub max_body_bytes: u64,
    pub hold_max_bytes: usize,
    pub cors_origins: Vec<String>,
    pub log: String,
    pub access_log: bool,
    pub usage_metrics: bool,
    pub log_format: Option<LogFormat>,
    pub docker: DockerEndpoint,
    /// Telemetry over OTLP; `None`: there is none.
    pub otlp: Option<OtlpSettings>,
}

/// A variable whose value is not understood. The process ends with exit code 2.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value:?}: expected {expected}{}", .meant.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default())]
pub struct ConfigError {
    /// The variable.
    pub name: &'static str,
    /// Its value as given.
    pub value: String,
    /// What is accepted.
    pub expected: &'static str,
    /// What was probably meant.
    pub meant: Option<&'static str>,
}

/// Something in the environment that a user probably did not mean; it stops nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// A variable that does not exist, and whose name begins like those that do.
    Unknown {
        /// Its name.
        name: String,
        /// The nearest name that does exist.
        nearest: Option<&'static str>,
    },
    /// Variables of OpenTelemetry's specification that are not used here.
    Unused {
        /// Their names.
        names: Vec<String>,
    },
    /// The common endpoint ends in what is added to it.
    SaidTwice {
        /// In what.
        path: &'static str,
    },
    /// `PROXY_LOG` names targets that have been renamed.
    Renamed {
        /// The old name of each, and that of today.
        targets: Vec<(String, String)>,
    },
    /// Anybody on the way to this engine could take it over.
    PlainDocker {
        /// `DOCKER_HOST`.
        host: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::Unknown { name, nearest: Some(nearest) } => {
                write!(f, "{name} is not a variable of this proxy and is ignored; did you mean {nearest}?")
            }
            Warning::Unknown { name, nearest: None } => {
                write!(f, "{name} is not a variable of this proxy and is ignored; --help lists all")
            }
            Warning::Unused { names } => {
                let names = names.join(", ");
                write!(f, "of OpenTelemetry's variables, this proxy does not use {names}; --help lists those it does")
            }
            Warning::SaidTwice { path } => write!(
                f,
                "OTEL_EXPORTER_OTLP_ENDPOINT ends in {path}, which is added to it: leave it out there, or set \
                 OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
            ),
            Warning::Renamed { targets } => {
                let pairs: Vec<String> = targets.iter().map(|(old, now)| format!("{now} for {old}")).collect();
                let pairs = pairs.join(", ");
                write!(f, "PROXY_LOG has a target that was renamed and still works; write {pairs}")
            }
            Warning::PlainDocker { host } => write!(
                f,
                "DOCKER_HOST={host} is a public address without TLS: every client that reaches it controls that machine; \
                 set DOCKER_TLS_VERIFY"
            ),
        }
    }
}

impl Warning {
    /// That a variable of this name does not exist, if that is so.
    fn unknown(name: &str) -> Option<Warning> {
        let names = || KNOBS.iter().map(|knob| knob.name);
        let is_known = names().any(|known| known == name);
        (!is_known).then(|| Warning::Unknown { name: name.to_owned(), nearest: nearest(name, names()) })
    }
}

impl Config {
    /// Resolves the environment given as pairs. A variable set to the empty string counts as unset, as compose files
    /// with `${VAR:-}` mean it.
    ///
    /// # Errors
    /// The first value that does not parse, with what would.
    pub fn from_vars<K, V>(vars: impl IntoIterator<Item = (K, V)>) -> Result<(Config, Vec<Warning>), ConfigError>
    where
        K: Into<String>,
        V: Into<String>,
    {
        let vars: BTreeMap<String, String> =
            vars.into_iter().map(|(k, v)| (k.into(), v.into())).filter(|(_, v)| !v.trim().is_empty()).collect();
        let env = Env { vars };
        let config = Config {
            bind: env.optional("PROXY_BIND", "an IP address such as 127.0.0.1 or ::", |v| v.parse().ok())?,
            port: env.required("PROXY_PORT", "a port, 0 to 65535", |v| v.parse().ok())?,
            admin_port: env.optional("PROXY_ADMIN_PORT", "a port, 0 to 65535", |v| v.parse().ok())?,
            drain_timeout: env.required("PROXY_DRAIN_TIMEOUT", DURATION, parse_duration)?,
            settle: env.required("PROXY_SETTLE", DURATION, parse_duration)?,
            network: env.optional("PROXY_NETWORK", "a network name", |v| Some(v.to_owned()))?,
            same_model: env.required("PROXY_SAME_MODEL", "balance or newest", |v| match v {
                "balance" => Some(SameModel::Balance),
                "newest" => Some(SameModel::Newest),
                _ => None,
            })?,
            balance: env.required("PROXY_BALANCE", "ewma, least, round_robin or prefix", |v| match v {
                "ewma" => Some(Balance::Ewma),
                "least" => Some(Balance::Least),
                "round_robin" => Some(Balance::RoundRobin),
                "prefix" => Some(Balance::Prefix),
                _ => None,
            })?,
            require_healthcheck: env.required("PROXY_REQUIRE_HEALTHCHECK", "true or false", parse_bool)?,
            models_refresh: env.required("PROXY_MODELS_REFRESH", "a duration of at least 1s, such as 30s", |v| {
                parse_duration(v).filter(|d| *d >= Duration::from_secs(1))
            })?,
            model_grace: env.required("PROXY_MODEL_GRACE", DURATION, parse_duration)?,
            retries: env.required("PROXY_RETRIES", "a number, 0 to 10", |v| v.parse().ok().filter(|n| *n <= 10))?,
            queue_max: env.required("PROXY_QUEUE_MAX", "a number; 0 turns waiting off", |v| v.parse().ok())?,
            queue_timeout: env.required("PROXY_QUEUE_TIMEOUT", DURATION, parse_duration)?,
            connect_timeout: env.required("PROXY_CONNECT_TIMEOUT", "a duration above zero, such as 2s", |v| {
                parse_duration(v).filter(|d| !d.is_zero())
            })?,
            client_idle_timeout: env.required(
                "PROXY_CLIENT_IDLE_TIMEOUT",
                "a duration above zero, such as 650s",
                |v| parse_duration(v).filter(|d| !d.is_zero()),
            )?,
            client_write_timeout: env.required("PROXY_CLIENT_WRITE_TIMEOUT", DURATION_OR_OFF, parse_duration_or_off)?,
            first_byte_timeout: env.required("PROXY_FIRST_BYTE_TIMEOUT", DURATION_OR_OFF, parse_duration_or_off)?,
            idle_timeout: env.required("PROXY_IDLE_TIMEOUT", DURATION_OR_OFF, parse_duration_or_off)?,
            max_body_bytes: env.required("PROXY_MAX_BODY", SIZE, parse_size)?,
            hold_max_bytes: env.required("PROXY_HOLD_MAX", SIZE, |v| parse_size(v)?.try_into().ok())?,
            cors_origins: env.list("PROXY_CORS_ORIGINS"),
            log: env
                .required("PROXY_LOG", LOG_FILTER, parse_log_filter)
                .map_err(|error| ConfigError { meant: meant_in_log_filter(&error.value), ..error })?,
            access_log: env.required("PROXY_ACCESS_LOG", "on or off", parse_bool)?,
            usage_metrics: env.required("PROXY_USAGE_METRICS", "on or off", parse_bool)?,
            log_format: env.optional("PROXY_LOG_FORMAT", "text, json or yaml", LogFormat::parse)?,
            docker: DockerEndpoint {
                host: env.optional("DOCKER_HOST", "unix:///path, tcp://host:port, http:// or https://", |v| {
                    ["unix://", "tcp://", "http://", "https://"].iter().any(|s| v.starts_with(s)).then(|| v.to_owned())
                })?,
                cert_path: env
                    .optional("DOCKER_CERT_PATH", "a folder", |v| Some(PathBuf::from(v)))?
                    .or_else(|| env.vars.get("HOME").map(|home| PathBuf::from(home).join(".docker"))),
                tls: env.vars.contains_key("DOCKER_TLS_VERIFY"),
            },
            otlp: otlp::resolve(&env)?,
        };
        let warnings = env.warnings(&config);
        Ok((config, warnings))
    }
}

impl LogFormat {
    /// `text`, `json` or `yaml`.
    pub fn parse(text: &str) -> Option<LogFormat> {
        match text {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            "yaml" => Some(LogFormat::Yaml),
            _ => None,
        }
    }
}

const DURATION: &str = "a duration such as 500ms, 60s or 2m, ten years at most (a bare number is seconds)";
const DURATION_OR_OFF: &str =
    "off, or a duration such as 500ms, 60s or 2m, ten years at most (a bare number is seconds)";
const SIZE: &str = "a size such as 64KiB, 10MB or 1GiB (a bare number is bytes)";
const LOG_FILTER: &str =
    "off, error, warn, info, debug, trace, or a filter such as info,inference_proxy::control::registry=debug";

/// What of a log filter is a level.
const LOG_LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];
/// What the target of every line of ours begins with.
const OWN_TARGET: &str = env!("CARGO_CRATE_NAME");

struct Env {
    vars: BTreeMap<String, String>,
}

impl Env {
    fn required<T>(
        &self,
        name: &'static str,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let default = KNOBS.iter().find(|k| k.name == name).map_or("", |k| k.default);
        let value = self.vars.get(name).map_or(default, |v| v.trim());
        parse(value).ok_or_else(|| ConfigError { name, value: value.to_owned(), expected, meant: None })
    }

    fn optional<T>(
        &self,
        name: &'static str,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        debug_assert!(KNOBS.iter().any(|k| k.name == name), "{name} must be in KNOBS");
        let Some(value) = self.vars.get(name) else {
            return Ok(None);
        };
        let value = value.trim();
        parse(value).map(Some).ok_or_else(|| ConfigError { name, value: value.to_owned(), expected, meant: None })
    }

    /// The same for a value that may hold a key: it is not repeated in the error.
    fn secret<T>(
        &self,
        name: &'static str,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let hide = |error| ConfigError { value: "(not shown)".to_owned(), ..error };
        self.optional(name, expected, parse).map_err(hide)
    }

    fn list(&self, name: &'static str) -> Vec<String> {
        debug_assert!(KNOBS.iter().any(|k| k.name == name), "{name} must be in KNOBS");
        let value = self.vars.get(name).map_or("", String::as_str);
        value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect()
    }

    fn warnings(&self, config: &Config) -> Vec<Warning> {
        let own = self.vars.keys().filter(|name| name.starts_with("PROXY_"));
        let mut warnings: Vec<Warning> = own.filter_map(|name| Warning::unknown(name)).collect();
        warnings.extend(otlp::warnings(self, config.otlp.as_ref()));
        let log = self.vars.get("PROXY_LOG").map_or("", String::as_str);
        let targets: Vec<(String, String)> = parts_of_log_filter(log).filter_map(targets::renamed).collect();
        if !targets.is_empty() {
            warnings.push(Warning::Renamed { targets });
        }
        if let Some(host) = config.docker.host.as_ref().filter(|host| !config.docker.tls && is_plain_and_public(host)) {
            warnings.push(Warning::PlainDocker { host: host.clone() });
        }
        warnings
    }
}

/// Whether a `DOCKER_HOST` goes to a public address without TLS. Names are taken to be local: those of compose services
/// are.
fn is_plain_and_public(host: &str) -> bool {
    let Some(authority) = host.strip_prefix("tcp://").or_else(|| host.strip_prefix("http://")) else { return false };
    let ip = authority.parse::<std::net::SocketAddr>().map(|addr| addr.ip()).or_else(|_| authority.parse());
    match ip.map(|ip: IpAddr| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => !(ip.is_loopback() || ip.is_private() || ip.is_link_local()),
        Ok(IpAddr::V6(ip)) => !(ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local()),
        Err(_) => false,
    }
}

/// The candidate nearest to `name` by edit distance, if it is near enough to be what was meant.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len() / 3)
        .map(|(_, candidate)| candidate)
}

/// `500ms`, `60s`, `2m`, `1h`; a bare number is seconds. At most ten years, so that sums with "now" cannot overflow.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds_per_unit = match unit.trim_start() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let seconds = number.parse::<f64>().ok()? * seconds_per_unit;
    Duration::try_from_secs_f64(seconds).ok().filter(|duration| *duration <= FOREVER)
}

fn parse_duration_or_off(text: &str) -> Option<Option<Duration>> {
    match text {
        "off" => Some(None),
        text => parse_duration(text).map(|d| (!d.is_zero()).then_some(d)),
    }
}

/// `64KiB`, `10MB`, `1GiB`; a bare number is bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let bytes_per_unit: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(bytes_per_unit)
}

/// A filter of log lines as tracing reads it, with the targets of today and without parts that are empty. For tracing
/// any word is a target, at least that of some program: one that can only be a level gone wrong would silence
/// everything, so it must be a level or ours.
fn parse_log_filter(text: &str) -> Option<String> {
    let parts: Vec<&str> = parts_of_log_filter(text).collect();
    let is_known = !parts.is_empty() && parts.iter().all(|part| is_log_directive(part));
    let today = |part: &&str| targets::translated(part).unwrap_or_else(|| (*part).to_owned());
    let filter = parts.iter().map(today).collect::<Vec<String>>().join(",");
    (is_known && filter.parse::<Targets>().is_ok()).then_some(filter)
}

fn parts_of_log_filter(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// `target=level`, a level, or a target of ours. Whether that level is one, tracing itself says.
fn is_log_directive(part: &str) -> bool {
    match part.split_once('=') {
        Some((target, level)) => !target.is_empty() && !level.is_empty(),
        None => part.parse::<LevelFilter>().is_ok() || part.split("::").next() == Some(OWN_TARGET),
    }
}

/// The level, or the target, that the first wrong word of this filter resembles.
fn meant_in_log_filter(text: &str) -> Option<&'static str> {
    let wrong = parts_of_log_filter(text).find(|part| parse_log_filter(part).is_none())?;
    let word = wrong.rsplit('=').next().unwrap_or(wrong).to_ascii_lowercase();
    let longer_or_shorter = |level: &&&str| word.len() > 2 && (word.starts_with(**level) || level.starts_with(&*word));
    let level = LOG_LEVELS.iter().find(longer_or_shorter).copied();
    let meant = level.or_else(|| nearest(&word, LOG_LEVELS.iter().copied().chain([OWN_TARGET])));
    // It is not that word that is wrong.
    meant.filter(|meant| *meant != word)
}

/// Why a text is not the URL of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It begins otherwise.
    #[error("expected a URL that begins with {}", schemes.join(" or "))]
    Scheme {
        /// How it may begin.
        schemes: &'static [&'static str],
    },
    /// What follows names no server.
    #[error("expected a host after {scheme}, and behind it no port or one from 1 to 65535")]
    Server {
        /// How it begins.
        scheme: &'static str,
    },
}

/// The URL of a server that begins with one of these `schemes`, such as `http://`. [`Uri`] takes any port, and knows none
/// where it cannot be one: requests would go to the port of the scheme.
///
/// # Errors
/// It begins otherwise, or has no host, or a port that cannot be.
pub fn parse_url(text: &str, schemes: &'static [&'static str]) -> Result<Uri, UrlError> {
    let begins_with = |scheme: &&&str| text.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme));
    let scheme = schemes.iter().find(begins_with).ok_or(UrlError::Scheme { schemes })?;
    let uri = text.parse::<Uri>().ok().filter(|uri| {
        uri.authority().is_some_and(|authority| {
            let server = authority.as_str().rsplit('@').next();
            let port = authority.port_u16().filter(|port| *port > 0);
            !authority.host().is_empty() && (port.is_some() || server == Some(authority.host()))
        })
    });
    uri.ok_or(UrlError::Server { scheme })
}

/// `true`, `1`, `yes`, `on` and their opposites, in any case.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
