//! What of an engine's `inspect` the proxy keeps, and the [`Endpoint`] it makes of it. Pure.
//!
//! Everything else, the container's environment above all, is dropped where it is read.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher as _},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::answers::{Summary, number, shown, text, texts};
use crate::{
    base::foreign,
    control::{
        discovery::{
            Endpoint, Health, HealthCheck, Incarnation, Obstacle, Phase,
            network::{self, Attachment, NetworkMode, Published, Vantage, Wiring},
            signal::{DEFAULT_STOP_SIGNAL, parse_signal},
        },
        labels::{self, Opted},
    },
};

/// Length of a whole id.
const FULL_ID: usize = 64;
/// Docker's grace between the stop signal and SIGKILL, unless the container or the call says otherwise.
const STOP_GRACE: Duration = Duration::from_secs(10);
const COMPOSE_PROJECT: &str = "com.docker.compose.project";

/// One look at a container.
#[derive(Debug, Clone)]
pub(super) struct Inspected {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) image: String,
    pub(super) started_nanos: i64,
    pub(super) phase: Phase,
    /// It has been told to stop, and still runs: some versions of Podman say so.
    pub(super) is_stopping: bool,
    pub(super) health: Health,
    pub(super) health_check: HealthCheck,
    pub(super) labels: HashMap<String, String>,
    pub(super) stop_signal: u8,
    stop_grace: Duration,
    pub(super) wiring: Wiring,
    network_owner: Option<String>,
    pub(super) shared: Option<Shared>,
    exposed_tcp: Vec<u16>,
    unread: Unread,
}

/// What of an answer could not be read. A field of another type is no verdict: in the same run, what was known stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Unread {
    config: bool,
    exposed: bool,
    mode: bool,
    networks: bool,
    /// Networks whose address could not be read.
    addresses: Vec<String>,
    published: bool,
}

/// Which run of a container was found beside which run of the owner of its network, and whether the one is in the network
/// of the other. Kept from look to look, because times alone do not tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shared {
    own_run: i64,
    owner: String,
    owner_run: i64,
    is_joined: bool,
}

/// What is known of the proxy's own place, and of what the user set for all containers.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) vantage: Vantage,
    pub(super) self_id: Option<String>,
    pub(super) default_network: Option<String>,
    /// Ports that the proxy itself listens on.
    pub(super) own_ports: Vec<u16>,
    /// For a proxy that runs in the network of another container.
    pub(super) shared: Option<Shared>,
    /// Ports of the host that lead to the proxy's own container.
    pub(super) own_published: Vec<Published>,
    /// The vantage is known; until then it is a guess that nothing may be built on.
    pub(super) is_placed: bool,
    /// Why the engine does not tell about the proxy's own container, if it is in one: then the vantage is what this machine
    /// tells by itself.
    pub(super) untold: Option<String>,
}

impl Inspected {
    /// Keeps what is needed of an answer about `id`. `None` if the answer is none of an engine's: everything else is read
    /// field by field, and a field that cannot be read is no verdict.
    pub(super) fn read(id: &str, answer: &Value) -> Option<Inspected> {
        let (state, config, settings) = (&answer["State"], &answer["Config"], &answer["NetworkSettings"]);
        if !state.is_object() && !config.is_object() {
            return None;
        }
        let told = text(&answer["Id"]);
        if id.len() == FULL_ID && told.is_some_and(|told| told != id) {
            return None; // about another container
        }
        let labels = texts(&config["Labels"]);
        let (phase, is_stopping) = phase(state);
        let mode = match text(&answer["HostConfig"]["NetworkMode"]) {
            Some("host") => NetworkMode::Host,
            Some("none") => NetworkMode::None,
            Some(mode) => match mode.strip_prefix("container:") {
                Some(owner) => NetworkMode::Container(owner.to_owned()),
                None => NetworkMode::Networks,
            },
            None => NetworkMode::Networks,
        };
        let network_owner = match &mode {
            NetworkMode::Container(owner) => Some(owner.clone()),
            NetworkMode::Networks | NetworkMode::Host | NetworkMode::None => None,
        };
        let fields = |value: &'_ Value| value.as_object().cloned().unwrap_or_default();
        let unread = Unread {
            // No container is without an image.
            config: text(&config["Image"]).is_none(),
            exposed: !matches!(config["ExposedPorts"], Value::Object(_) | Value::Null),
            mode: !answer["HostConfig"]["NetworkMode"].is_string(),
            networks: !settings["Networks"].is_object(),
            addresses: fields(&settings["Networks"])
                .into_iter()
                .filter(has_unread_address)
                .map(|(name, _)| name)
                .collect(),
            published: !settings["Ports"].is_object(),
        };
        let attachments = fields(&settings["Networks"]).into_iter().map(attachment).collect();
        let published = fields(&settings["Ports"]).iter().flat_map(published).collect();
        let exposed_tcp = fields(&config["ExposedPorts"]).keys().filter_map(|port| tcp_port(port)).collect();
        let name = text(&answer["Name"]).unwrap_or_default().trim_start_matches('/');
        let image = text(&config["Image"]).or_else(|| text(&answer["Image"]));
        Some(Inspected {
            id: told.unwrap_or(id).to_owned(),
            name: shown(name),
            image: shown(image.unwrap_or_default()),
            started_nanos: state["StartedAt"].as_str().map_or(0, run),
            phase,
            is_stopping,
            health: verdict(&state["Health"]),
            health_check: health_check(&config["Healthcheck"], &state["Health"]),
            stop_signal: text(&config["StopSignal"]).and_then(parse_signal).unwrap_or(DEFAULT_STOP_SIGNAL),
            stop_grace: number(&config["StopTimeout"]).map_or(STOP_GRACE, foreign::seconds),
            wiring: Wiring { mode, attachments, published, compose_project: labels.get(COMPOSE_PROJECT).cloned() },
            network_owner,
            shared: None,
            exposed_tcp,
            unread,
            labels,
        })
    }

    /// Fills what could not be read from the last look at the same container, and from what the list says of it.
    pub(super) fn complete(&mut self, before: Option<&Inspected>, summary: Option<&Summary>) {
        if let Some(before) = before {
            self.complete_run(before);
            if self.started_nanos == before.started_nanos {
                self.complete_wiring(before);
            }
        }
        if self.name.is_empty() {
            let known = before.map(|before| before.name.clone()).or_else(|| Some(summary?.name.clone()));
            self.name = known.unwrap_or_else(|| super::answers::short(&self.id));
        }
        if self.image.is_empty() {
            self.image = summary.map(|summary| summary.image.clone()).unwrap_or_default();
        }
        // A container keeps its labels for life; one that is in the list carries some, because the list was asked for those
        // that do.
        let known = before.map(|before| &before.labels).or_else(|| summary.map(|summary| &summary.labels));
        for (name, value) in known.into_iter().flatten() {
            self.labels.entry(name.clone()).or_insert_with(|| value.clone());
        }
        self.wiring.compose_project = self.labels.get(COMPOSE_PROJECT).cloned();
    }

    /// A start that is told as no time is no other one than that which is known.
    fn complete_run(&mut self, before: &Inspected) {
        let is_no_time = self.started_nanos < 0 && before.started_nanos > 0;
        if self.started_nanos == Incarnation::UNKNOWN.0 || is_no_time {
            self.started_nanos = before.started_nanos;
        }
    }

    /// What could not be read is as it was; `before` is a look at the same run.
    fn complete_wiring(&mut self, before: &Inspected) {
        if self.unread.config {
            (self.stop_signal, self.stop_grace) = (before.stop_signal, before.stop_grace);
        }
        if self.unread.config || self.unread.exposed {
            self.exposed_tcp.clone_from(&before.exposed_tcp);
        }
        if self.unread.mode {
            self.wiring.mode = before.wiring.mode.clone();
            self.network_owner.clone_from(&before.network_owner);
            self.shared.clone_from(&before.shared);
        }
        let is_anothers = self.unread.mode && before.network_owner.is_some();
        if self.unread.networks || is_anothers {
            self.wiring.attachments.clone_from(&before.wiring.attachments);
        }
        for attachment in &mut self.wiring.attachments {
            let known = before.wiring.attachments.iter().find(|known| known.name == attachment.name);
            if let Some(known) = known.filter(|_| self.unread.addresses.contains(&attachment.name)) {
                (attachment.ipv4, attachment.ipv6) = (known.ipv4, known.ipv6);
            }
        }
        if self.unread.published || is_anothers {
            self.wiring.published.clone_from(&before.wiring.published);
        }
    }

    /// The container whose network it uses, if that is not its own; also once that one's wiring has been taken over.
    pub(super) fn network_owner(&self) -> Option<&str> {
        self.network_owner.as_deref()
    }

    /// Takes the network of `owner`, the container in whose network namespace this one runs. `before` is what was found the
    /// last time; `now_nanos` is the time of this machine.
    pub(super) fn share_network_of(&mut self, owner: Option<&Inspected>, before: Option<&Shared>, now_nanos: i64) {
        let Some(owner) = owner.filter(|owner| owner.phase == Phase::Running) else {
            self.shared = before.cloned();
            return;
        };
        let is_same_owner = |shared: &&Shared| shared.owner == owner.id;
        let is_joined = match before.filter(is_same_owner) {
            // An owner that was started again has another network namespace; a container that was started again has joined
            // the one that there is.
            Some(shared) => match (shared.own_run == self.started_nanos, shared.owner_run == owner.started_nanos) {
                (true, true) => shared.is_joined,
                (true, false) => false,
                (false, true) => true,
                (false, false) => self.is_younger_than(owner, now_nanos),
            },
            None => self.is_younger_than(owner, now_nanos),
        };
        let (own_run, owner_run) = (self.started_nanos, owner.started_nanos);
        self.shared = Some(Shared { own_run, owner: owner.id.clone(), owner_run, is_joined });
        if is_joined {
            self.wiring.mode = owner.wiring.mode.clone();
            self.wiring.attachments.clone_from(&owner.wiring.attachments);
            self.wiring.published.clone_from(&owner.wiring.published);
            self.unread.networks = owner.unread.networks;
            self.unread.addresses.clone_from(&owner.unread.addresses);
            self.unread.published = owner.unread.published;
        }
    }

    /// Whether it was started after `owner`, as far as their times tell. A time ahead of the clock tells nothing: the clock
    /// has been put back since.
    fn is_younger_than(&self, owner: &Inspected, now_nanos: i64) -> bool {
        let is_time = self.started_nanos > 0 && owner.started_nanos > 0;
        let is_ahead = owner.started_nanos > now_nanos && self.started_nanos <= now_nanos;
        !is_time || is_ahead || owner.started_nanos <= self.started_nanos
    }

    /// Project and name of its Compose service.
    fn compose_service(&self) -> Option<(&str, &str)> {
        let label = |name| self.labels.get(name).map(String::as_str);
        label(COMPOSE_PROJECT).zip(label("com.docker.compose.service"))
    }

    /// Its Compose service, if it has one; else its name.
    fn role(&self) -> Arc<str> {
        match self.compose_service() {
            Some((project, service)) => format!("{project}/{service}").into(),
            None => self.name.as_str().into(),
        }
    }

    /// Its own labels hide which signal an event is about.
    pub(super) fn forges_signals(&self) -> bool {
        self.labels.contains_key("signal")
    }

    /// What discovery reports of it; `None` if it carries no `inference.enable` label.
    pub(super) fn endpoint(&self, context: &Context) -> Option<Endpoint> {
        let pairs = self.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let labels = labels::parse(pairs)?;
        let ports = network::port_candidates(labels.spec.port, &self.exposed_tcp);
        let wanted = labels.spec.network.as_deref().or(context.default_network.as_deref());
        let reach = network::reach(&self.wiring, &context.vantage, wanted, &ports)
            .map_err(|e| Obstacle { what: e.to_string(), advice: e.advice(&self.name) });
        let obstacle = |what: &str, advice: &str| Obstacle { what: what.to_owned(), advice: advice.to_owned() };
        let excluded = match &labels.opted {
            Opted::In if context.self_id.as_deref() == Some(self.id.as_str()) => {
                Some(obstacle("it is this proxy itself", "remove the label inference.enable from the proxy"))
            }
            Opted::In if reach.as_ref().is_ok_and(|reach| context.leads_here(reach)) => Some(obstacle(
                "its address and port are this proxy's own",
                "set inference.port to the port of the inference server",
            )),
            Opted::In => None,
            Opted::Out => Some(obstacle(
                "its label inference.enable says no",
                "if that is not meant, create it anew with inference.enable=true",
            )),
            Opted::Unclear(value) => Some(obstacle(
                &format!("its label inference.enable={value:?} is neither true nor false"),
                "create it anew with inference.enable=true (1, yes and on do as well)",
            )),
        };
        // What is said already need not be said again.
        let is_said = |name: &str| excluded.is_some() && name == labels::ENABLE;
        let mut problems: Vec<String> =
            labels.problems.iter().filter(|problem| !is_said(&problem.name)).map(ToString::to_string).collect();
        if let (Vantage::Elsewhere { .. }, Some(wanted)) = (&context.vantage, wanted) {
            let name = if labels.spec.network.is_some() { "inference.network" } else { "PROXY_NETWORK" };
            problems.push(format!(
                "{name}={wanted:?} has no effect, because the Docker Engine is on another machine, whose published ports \
                 are the only way from here"
            ));
        }
        Some(Endpoint {
            id: self.id.as_str().into(),
            name: self.name.clone(),
            role: self.role(),
            is_stopped_first: self.compose_service().is_some(),
            image: self.image.clone(),
            incarnation: Incarnation(self.started_nanos),
            phase: self.phase,
            health: self.health,
            health_check: self.health_check,
            reach,
            problems,
            labels: labels.spec,
            excluded,
            stop_grace: self.stop_grace,
        })
    }
}

impl Context {
    /// Whether one of the targets is this proxy: a port it listens on at one of its own addresses, as a container in its
    /// network namespace or in the host's may ask for, or a port of the host that is published for it.
    fn leads_here(&self, reach: &network::Reach) -> bool {
        let is_own_address = |ip: IpAddr| match &self.vantage {
            Vantage::Container { attachments, .. } => attachments
                .iter()
                .any(|own| own.ipv4.is_some_and(|own| own == ip) || own.ipv6.is_some_and(|own| own == ip)),
            Vantage::Inside { own, .. } => ip.is_loopback() || own.contains(&ip),
            Vantage::Host { .. } => ip.is_loopback(),
            Vantage::Elsewhere { .. } => false,
        };
        // Which ports of the host lead here is not known: as a rule they have the same numbers.
        let may_be_published = |target: &SocketAddr| {
            matches!(self.vantage, Vantage::Inside { .. }) && self.own_ports.contains(&target.port())
        };
        let is_published = |target: &SocketAddr| {
            self.own_published.iter().any(|own| {
                let is_there = own.host_ip.is_none_or(|ip| ip.is_unspecified() || ip == target.ip());
                own.host_port == target.port() && self.own_ports.contains(&own.container_port) && is_there
            })
        };
        let through_host = reach.network.is_none();
        reach.targets.iter().any(|target| {
            is_own_address(target.ip()) && self.own_ports.contains(&target.port())
                || through_host && (is_published(target) || may_be_published(target))
        })
    }
}

/// What discovery reports of a container that the list has, and of which the engine tells no more, for the reason `why`;
/// `None` if it does not ask to be routed. Which run it is is not known.
pub(super) fn unreadable(summary: &Summary, why: &str) -> Option<Endpoint> {
    let known = Inspected {
        id: summary.id.clone(),
        name: summary.name.clone(),
        image: summary.image.clone(),
        started_nanos: Incarnation::UNKNOWN.0,
        phase: Phase::Running,
        is_stopping: false,
        health: Health::Unknown,
        health_check: HealthCheck::default(),
        labels: summary.labels.clone(),
        stop_signal: DEFAULT_STOP_SIGNAL,
        stop_grace: STOP_GRACE,
        wiring: Wiring {
            mode: NetworkMode::None,
            attachments: Vec::new(),
            published: Vec::new(),
            compose_project: None,
        },
        network_owner: None,
        shared: None,
        exposed_tcp: Vec::new(),
        unread: Unread::default(),
    };
    let nowhere = Context {
        vantage: Vantage::Host { on_link: Vec::new() },
        self_id: None,
        default_network: None,
        own_ports: Vec::new(),
        shared: None,
        own_published: Vec::new(),
        is_placed: true,
        untold: None,
    };
    let mut endpoint = known.endpoint(&nowhere)?;
    endpoint.reach = Err(Obstacle {
        what: format!("the engine does not tell about it: {why}"),
        advice: format!(
            "see docker inspect {}, and let a Docker API proxy allow GET /containers/{{id}}/json; it is tried again",
            summary.name
        ),
    });
    Some(endpoint)
}

/// Whether it runs, and whether it is being stopped. Of a word that is not known the engine's other fields tell more: a
/// process id means that it runs. If they do not tell either, it runs, because it was in the list of those that do.
fn phase(state: &Value) -> (Phase, bool) {
    let is_set = |field: &str| state[field].as_bool() == Some(true);
    match text(&state["Status"]) {
        Some("running") => (Phase::Running, false),
        Some("paused") => (Phase::Paused, false),
        Some("restarting") => (Phase::Restarting, false),
        Some("stopping") => (Phase::Running, true),
        Some("created" | "configured" | "initialized" | "removing" | "stopped" | "exited" | "dead") => {
            (Phase::Stopped, false)
        }
        _ if is_set("Paused") => (Phase::Paused, false),
        _ if is_set("Restarting") => (Phase::Restarting, false),
        _ if is_set("Dead") || number(&state["Pid"]) == Some(0) => (Phase::Stopped, false),
        _ => (Phase::Running, false),
    }
}

/// Whether an address is neither there nor missing.
fn has_unread_address((_, settings): &(String, Value)) -> bool {
    let is_unread = |field: &str| match &settings[field] {
        Value::String(ip) => !ip.is_empty() && ip.parse::<IpAddr>().is_err(),
        Value::Null => false,
        _ => true,
    };
    !settings.is_object() || is_unread("IPAddress") || is_unread("GlobalIPv6Address")
}

fn attachment((name, settings): (String, Value)) -> Attachment {
    fn ip<T: std::str::FromStr>(value: &Value) -> Option<T> {
        text(value)?.parse().ok()
    }
    Attachment {
        name,
        id: text(&settings["NetworkID"]).unwrap_or_default().to_owned(),
        ipv4: ip(&settings["IPAddress"]),
        ipv6: ip(&settings["GlobalIPv6Address"]),
        gateway: ip::<IpAddr>(&settings["Gateway"]).or_else(|| ip(&settings["IPv6Gateway"])),
        gw_priority: number(&settings["GwPriority"]).unwrap_or(0),
    }
}

fn published((port, bindings): (&String, &Value)) -> Vec<Published> {
    let Some(container_port) = tcp_port(port) else {
        return Vec::new();
    };
    let published = |binding: &Value| {
        let host_ip = match &binding["HostIp"] {
            Value::Null => None,
            // An address that cannot be read is not all addresses: behind those there may be somebody else.
            ip => match ip.as_str()?.trim_matches(['[', ']']) {
                "" => None,
                ip => Some(ip.parse().ok()?),
            },
        };
        let host_port = u16::try_from(number(&binding["HostPort"])?).ok().filter(|port| *port != 0)?;
        Some(Published { container_port, host_ip, host_port })
    };
    bindings.as_array().into_iter().flatten().filter_map(published).collect()
}

fn tcp_port(text: &str) -> Option<u16> {
    let (port, kind) = text.split_once('/').unwrap_or((text, "tcp"));
    let port = port.parse().ok().filter(|port| *port != 0);
    port.filter(|_| kind.eq_ignore_ascii_case("tcp"))
}

/// What a container's health means. Engines without a check say nothing, `none` or an empty word.
fn verdict(health: &Value) -> Health {
    let word = match health {
        Value::Object(health) => health.get("Status").unwrap_or(&Value::Null),
        other => other,
    };
    match word {
        Value::Null => Health::None,
        Value::String(word) => match word.trim() {
            "" | "none" => Health::None,
            "starting" => Health::Starting,
            "healthy" => Health::Healthy,
            "unhealthy" => Health::Unhealthy,
            _ => Health::Unknown,
        },
        _ => Health::Unknown,
    }
}

/// How the health check goes on. Zero means the engine's default, as does what is no time.
fn health_check(config: &Value, state: &Value) -> HealthCheck {
    const INTERVAL: Duration = Duration::from_secs(30);
    const TIMEOUT: Duration = Duration::from_secs(30);
    let time = |nanos: &Value, default: Duration| {
        let nanos = number(nanos).and_then(|nanos| u64::try_from(nanos).ok()).filter(|nanos| *nanos > 0);
        nanos.map_or(default, Duration::from_nanos)
    };
    let check = HealthCheck::every(
        time(&config["Interval"], INTERVAL),
        time(&config["Timeout"], TIMEOUT),
        time(&config["StartPeriod"], Duration::ZERO),
    );
    let mut hasher = DefaultHasher::new();
    if state.is_object() {
        let log = state["Log"].as_array().map_or(&[][..], Vec::as_slice);
        let last = log.last().map(|last| (text(&last["Start"]), text(&last["End"]), number(&last["ExitCode"])));
        (text(&state["Status"]), number(&state["FailingStreak"]), log.len(), last).hash(&mut hasher);
    }
    HealthCheck { mark: hasher.finish(), ..check }
}

/// Which run it is, by when it was started: nanoseconds since 1970. What is no such time is told from others too, by a
/// negative number.
fn run(started_at: &str) -> i64 {
    match nanos(started_at) {
        Some(nanos) => nanos,
        None => {
            let mut hasher = DefaultHasher::new();
            started_at.hash(&mut hasher);
            -1 - i64::try_from(hasher.finish() >> 1).unwrap_or(0)
        }
    }
}

/// RFC 3339, as engines write it, in nanoseconds since 1970; 0 for what is long before, and `None` for what is no time or
/// one that does not fit.
fn nanos(text: &str) -> Option<i64> {
    let nanos = OffsetDateTime::parse(text, &Rfc3339).ok()?.unix_timestamp_nanos();
    i64::try_from(nanos.max(0)).ok()
}

#[cfg(test)]
mod tests;
