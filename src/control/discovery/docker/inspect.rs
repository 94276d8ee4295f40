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
            signal::parse_signal,
        },
        labels::{self, Opted},
    },
};

/// Length of a whole id.
const FULL_ID: usize = 64;
/// Docker's grace between the stop signal and SIGKILL, unless the container or the call says otherwise.
const STOP_GRACE: Duration = Duration::from_secs(10);
const SIGTERM: u8 = 15;

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
            stop_signal: text(&config["StopSignal"]).and_then(parse_signal).unwrap_or(SIGTERM),
            stop_grace: number(&config["StopTimeout"]).map_or(STOP_GRACE, foreign::seconds),
            wiring: Wiring {
                mode,
                attachments,
                published,
                compose_project: labels.get("com.docker.compose.project").cloned(),
            },
            network_owner,
            shared: None,
            exposed_tcp,
            labels,
        })
    }

    /// Fills what could not be read from the last look at the same container, and from what the list says of it.
    pub(super) fn complete(&mut self, before: Option<&Inspected>, summary: Option<&Summary>) {
        if self.started_nanos == 0 {
            self.started_nanos = before.map_or(0, |before| before.started_nanos);
        }
        if self.name.is_empty() {
            let known = before.map(|before| before.name.clone()).or_else(|| Some(summary?.name.clone()));
            self.name = known.unwrap_or_else(|| super::answers::short(&self.id));
        }
        if self.image.is_empty() {
            self.image = summary.map(|summary| summary.image.clone()).unwrap_or_default();
        }
        if self.labels.is_empty() {
            // A container that is in the list carries labels, because the list was asked for those that do.
            let known = before.map(|before| &before.labels).or_else(|| summary.map(|summary| &summary.labels));
            self.labels = known.cloned().unwrap_or_default();
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
        label("com.docker.compose.project").zip(label("com.docker.compose.service"))
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
        stop_signal: SIGTERM,
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
mod tests {
    use super::*;

    fn inspected(change: impl FnOnce(&mut serde_json::Value)) -> Inspected {
        let mut json = serde_json::json!({
            "Id": "c1", "Name": "/vllm", "Image": "sha256:0",
            "State": { "Status": "running", "Running": true, "StartedAt": "2026-01-01T00:00:01.000000005Z",
                       "Health": { "Status": "healthy" } },
            "Config": { "Image": "vllm/vllm-openai", "Env": ["HF_TOKEN=secret"], "ExposedPorts": { "8000/tcp": {}, "53/udp": {} },
                        "Labels": { "inference.enable": "true", "com.docker.compose.project": "app" } },
            "HostConfig": { "NetworkMode": "app_default" },
            "NetworkSettings": { "Ports": { "8000/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "32768" }] },
                "Networks": { "app_default": { "NetworkID": "n1", "IPAddress": "172.18.0.2", "Gateway": "172.18.0.1" } } },
        });
        change(&mut json);
        Inspected::read("c1", &json).unwrap()
    }

    #[test]
    fn a_binding_that_cannot_be_read_is_no_binding() {
        let published = |port: &str, host_ip: Value, host_port: Value| {
            let binding = serde_json::json!({ "HostIp": host_ip, "HostPort": host_port });
            let ports = serde_json::json!({ port: [binding, null, "0.0.0.0:8000"] });
            let published = inspected(|json| json["NetworkSettings"]["Ports"] = ports).wiring.published;
            published.iter().map(|p| format!("{:?}:{}", p.host_ip, p.host_port)).collect::<Vec<_>>().join(" ")
        };
        let text = |text: &str| Value::from(text);
        for (port, host_ip, host_port, expected) in [
            ("8000/tcp", text("0.0.0.0"), text("18000"), "Some(0.0.0.0):18000"),
            ("8000", text(""), text("18000"), "None:18000"),
            ("8000/TCP", Value::Null, Value::from(18000), "None:18000"),
            ("8000/tcp", text("[::1]"), text("18000"), "Some(::1):18000"),
            // Somebody else may be behind all addresses.
            ("8000/tcp", text("fe80::1%eth0"), text("18000"), ""),
            ("8000/tcp", text("localhost"), text("18000"), ""),
            ("8000/tcp", Value::from(7), text("18000"), ""),
            ("8000/tcp", text("0.0.0.0"), text("0"), ""),
            ("8000/tcp", text("0.0.0.0"), text(""), ""),
            ("8000/tcp", text("0.0.0.0"), text("65536"), ""),
            ("8000/tcp", text("0.0.0.0"), text("18000-18010"), ""),
            ("8000/tcp", text("0.0.0.0"), Value::from(-1), ""),
            ("8000/quic", text("0.0.0.0"), text("18000"), ""),
            ("0/tcp", text("0.0.0.0"), text("18000"), ""),
        ] {
            assert_eq!(published(port, host_ip.clone(), host_port.clone()), expected, "{port} {host_ip} {host_port}");
        }
    }

    #[test]
    fn an_answer_about_another_container_is_none() {
        let (id, other) = ("a".repeat(64), "b".repeat(64));
        let answer = |told: Value| serde_json::json!({ "Id": told, "State": { "Status": "running" }, "Config": {} });
        let read = |asked: &str, told: Value| Inspected::read(asked, &answer(told)).map(|seen| seen.id);
        assert_eq!(read(&id, id.clone().into()), Some(id.clone()));
        assert_eq!(read(&id, Value::Null), Some(id.clone()));
        assert_eq!(read(&id, other.clone().into()), None);
        // What is asked for by its name or the beginning of its id is told by its whole id.
        assert_eq!(read(&id[..12], id.clone().into()), Some(id.clone()));
        assert_eq!(read("llm", other.clone().into()), Some(other));
    }

    #[test]
    fn names_that_mislead_are_told_escaped_and_short() {
        let seen = inspected(|json| {
            json["Name"] = "/llm\u{1b}[31m\nready".into();
            json["Config"]["Image"] = "x".repeat(10_000).into();
        });
        assert_eq!(seen.name, "llm\\u{1b}[31m\\nready");
        assert_eq!(seen.image.chars().count(), 256);
    }

    fn context() -> Context {
        let own = Attachment {
            name: "app_default".into(),
            id: "n1".into(),
            ipv4: Some([172, 18, 0, 9].into()),
            ipv6: None,
            gateway: None,
            gw_priority: 0,
        };
        let vantage = Vantage::Container { attachments: vec![own], host_network: false, host_gateway: None };
        Context {
            vantage,
            self_id: Some("self".into()),
            default_network: None,
            own_ports: vec![8080],
            own_published: Vec::new(),
            is_placed: true,
            untold: None,
            shared: None,
        }
    }

    #[test]
    fn containers_of_one_compose_service_or_of_one_name_stand_for_each_other() {
        let role = |change: fn(&mut serde_json::Value)| {
            let endpoint = inspected(change).endpoint(&context()).unwrap();
            (endpoint.role.to_string(), endpoint.is_stopped_first)
        };
        let unnamed = |json: &mut serde_json::Value| {
            json["Config"]["Labels"].as_object_mut().unwrap().remove("com.docker.compose.project");
        };
        assert_eq!(role(unnamed), ("vllm".to_owned(), false));
        let service = |json: &mut serde_json::Value| {
            json["Name"] = "/3f2a_app-llm-1".into();
            json["Config"]["Labels"]["com.docker.compose.service"] = "llm".into();
        };
        assert_eq!(role(service), ("app/llm".to_owned(), true));
    }

    #[test]
    fn a_running_container_becomes_an_endpoint() {
        let look = inspected(|_| {});
        let endpoint = look.endpoint(&context()).unwrap();
        assert_eq!(
            (endpoint.name.as_str(), endpoint.phase, endpoint.health),
            ("vllm", Phase::Running, Health::Healthy)
        );
        assert_eq!(endpoint.incarnation, Incarnation(1_767_225_601_000_000_005));
        assert_eq!(endpoint.reach.unwrap().targets, ["172.18.0.2:8000".parse().unwrap()]);
        assert_eq!((look.stop_signal, endpoint.stop_grace, endpoint.excluded), (15, STOP_GRACE, None));
        assert!(!format!("{look:?}").contains("secret"));
    }

    #[test]
    fn states_and_health_are_read_as_the_engine_means_them() {
        for (status, phase) in [
            ("paused", Phase::Paused),
            ("restarting", Phase::Restarting),
            ("exited", Phase::Stopped),
            ("dead", Phase::Stopped),
        ] {
            assert_eq!(inspected(|json| json["State"]["Status"] = status.into()).phase, phase);
        }
        assert_eq!(inspected(|json| json["State"]["Health"] = serde_json::Value::Null).health, Health::None);
        assert_eq!(inspected(|json| json["State"]["Health"]["Status"] = "none".into()).health, Health::None);
        assert_eq!(inspected(|json| json["Config"]["StopSignal"] = "SIGQUIT".into()).stop_signal, 3);
        assert_eq!(inspected(|json| json["State"]["StartedAt"] = "0001-01-01T00:00:00Z".into()).started_nanos, 0);
        assert_eq!(nanos("2026-01-01T02:00:01+02:00"), Some(1_767_225_601_000_000_000));
    }

    #[test]
    fn words_for_health_that_are_not_known_are_no_bad_verdict() {
        for (word, health) in [
            (None, Health::None),
            (Some(""), Health::None),
            (Some(" "), Health::None),
            (Some("none"), Health::None),
            (Some("starting"), Health::Starting),
            (Some("healthy"), Health::Healthy),
            (Some("unhealthy"), Health::Unhealthy),
            (Some("reset"), Health::Unknown),
            (Some("stopped"), Health::Unknown),
            (Some("HEALTHY!"), Health::Unknown),
        ] {
            assert_eq!(verdict(&serde_json::json!({ "Status": word })), health, "{word:?}");
            assert_eq!(verdict(&serde_json::json!(word)), health, "{word:?}");
        }
        for odd in [serde_json::json!(["reset"]), serde_json::json!(7), serde_json::json!({ "Status": {} })] {
            assert_eq!(verdict(&odd), Health::Unknown, "{odd}");
        }
    }

    #[test]
    fn a_health_check_is_overdue_by_its_own_times_and_each_check_leaves_a_mark() {
        let overdue_after = |check: serde_json::Value| {
            inspected(|json| json["Config"]["Healthcheck"] = check).health_check.overdue_after.as_secs()
        };
        let s = 1_000_000_000_i64;
        assert_eq!(overdue_after(serde_json::Value::Null), 90, "30 s each, as Docker does");
        assert_eq!(overdue_after(serde_json::json!({})), 90);
        assert_eq!(overdue_after(serde_json::json!({ "Interval": 0, "Timeout": 0, "StartPeriod": 0 })), 90);
        assert_eq!(
            overdue_after(serde_json::json!({ "Interval": 5 * s, "Timeout": 3 * s, "StartPeriod": 600 * s })),
            613
        );
        assert_eq!(overdue_after(serde_json::json!({ "Interval": -5 * s, "Timeout": -1 })), 90);
        let longest = serde_json::json!({ "Interval": i64::MAX, "Timeout": i64::MAX, "StartPeriod": i64::MAX });
        assert_eq!(overdue_after(longest), foreign::FOREVER.as_secs());

        let mark = |health: serde_json::Value| inspected(|json| json["State"]["Health"] = health).health_check.mark;
        let check =
            |end: &str, code: i64| serde_json::json!({ "Start": "2026-01-01T00:00:00Z", "End": end, "ExitCode": code });
        let healthy = |streak: i64, log: serde_json::Value| {
            mark(serde_json::json!({ "Status": "healthy", "FailingStreak": streak, "Log": log }))
        };
        let (one, two) = (check("2026-01-01T00:00:01Z", 0), check("2026-01-01T00:00:02Z", 0));
        let first = healthy(0, serde_json::json!([one]));
        assert_eq!(first, healthy(0, serde_json::json!([one])));
        for later in [
            healthy(0, serde_json::json!([one, two])),
            healthy(0, serde_json::json!([two])),
            healthy(1, serde_json::json!([one])),
            healthy(0, serde_json::json!([check("2026-01-01T00:00:01Z", 1)])),
            healthy(0, serde_json::Value::Null),
        ] {
            assert_ne!(first, later);
        }
    }

    #[test]
    fn every_grace_is_bounded_and_minus_one_is_for_ever() {
        let grace = |seconds: i64| inspected(|json| json["Config"]["StopTimeout"] = seconds.into()).stop_grace;
        for (seconds, taken) in
            [(0, Duration::ZERO), (1, Duration::from_secs(1)), (-1, foreign::FOREVER), (i64::MIN, foreign::FOREVER)]
        {
            assert_eq!(grace(seconds), taken, "{seconds}");
        }
        for seconds in [i64::MAX, i64::MAX / 1_000_000_000, 1 << 40] {
            assert_eq!(grace(seconds), foreign::FOREVER, "{seconds}");
        }
    }

    #[test]
    fn runs_are_told_apart_whatever_their_time_is() {
        let started = |text: &str| inspected(|json| json["State"]["StartedAt"] = text.into()).started_nanos;
        let odd = ["9999-12-31T23:59:59Z", "9999-12-31T23:59:58Z", "yesterday", "", "2026-13-01T00:00:00Z"];
        for (n, text) in odd.iter().enumerate() {
            assert_eq!(started(text), started(text));
            assert!(started(text) < 0, "{text:?} has no place among times");
            assert!(odd[..n].iter().all(|other| started(other) != started(text)), "{text:?}");
        }
    }

    #[test]
    fn what_must_not_be_routed_says_why() {
        let own = inspected(|json| json["Id"] = "self".into()).endpoint(&context()).unwrap();
        assert!(own.excluded.unwrap().what.contains("this proxy itself"));
        let odd = inspected(|json| json["Config"]["Labels"]["inference.enable"] = "maybe".into());
        assert!(odd.endpoint(&context()).unwrap().excluded.unwrap().what.contains("maybe"));
        let host = inspected(|json| {
            json["HostConfig"]["NetworkMode"] = "host".into();
            json["Config"]["Labels"]["inference.port"] = "8080".into();
        });
        let on_host = Context { vantage: Vantage::Host { on_link: Vec::new() }, ..context() };
        assert!(host.endpoint(&on_host).unwrap().excluded.unwrap().what.contains("own"));
        let unlabelled = inspected(|json| json["Config"]["Labels"] = serde_json::json!({}));
        assert!(unlabelled.endpoint(&context()).is_none());
    }

    #[test]
    fn the_proxy_never_becomes_its_own_backend() {
        let own_published = |host_ip: Option<&str>| {
            let host_ip = host_ip.map(|ip| ip.parse().unwrap());
            vec![Published { container_port: 8080, host_ip, host_port: 9000 }]
        };
        let gateway = |context: Context| {
            let Vantage::Container { attachments, .. } = context.vantage.clone() else { panic!("in a container") };
            let host_gateway = Some("172.18.0.1".parse().unwrap());
            Context { vantage: Vantage::Container { attachments, host_network: false, host_gateway }, ..context }
        };
        let with_port = |mode: &str, port: u16, published: serde_json::Value| {
            inspected(|json| {
                json["HostConfig"]["NetworkMode"] = mode.into();
                json["Config"]["Labels"]["inference.port"] = port.to_string().into();
                json["NetworkSettings"]["Ports"] = published;
                json["NetworkSettings"]["Networks"]["app_default"]["IPAddress"] = "172.18.0.9".into();
            })
        };
        let none = || serde_json::json!({});
        let on_8000 =
            |host_ip: &str, port: &str| serde_json::json!({ "8000/tcp": [{ "HostIp": host_ip, "HostPort": port }] });
        let in_container = |published| gateway(Context { own_published: published, ..context() });
        for (what, look, context, is_own) in [
            ("its address, its port", with_port("app_default", 8080, none()), in_container(vec![]), true),
            ("its address, another port", with_port("app_default", 8000, none()), in_container(vec![]), false),
            ("its port, by the gateway", with_port("host", 9000, none()), in_container(own_published(None)), true),
            ("its port on all", with_port("host", 9000, none()), in_container(own_published(Some("0.0.0.0"))), true),
            (
                "its port elsewhere",
                with_port("host", 9000, none()),
                in_container(own_published(Some("192.0.2.1"))),
                false,
            ),
            ("another port", with_port("host", 9001, none()), in_container(own_published(None)), false),
            ("not published", with_port("host", 8080, none()), in_container(vec![]), false),
        ] {
            let excluded = look.endpoint(&context).unwrap().excluded;
            assert_eq!(excluded.is_some_and(|why| why.what.contains("own")), is_own, "{what}");
        }
        // Another container in the proxy's own network namespace.
        let proxy = inspected(|json| {
            json["Id"] = "self".into();
            json["NetworkSettings"]["Networks"]["app_default"]["IPAddress"] = "172.18.0.9".into();
        });
        for (port, is_own) in [(8080, true), (8000, false)] {
            let mut look = with_port("container:self", port, on_8000("0.0.0.0", "8080"));
            look.share_network_of(Some(&proxy), None, look.started_nanos);
            assert_eq!(look.endpoint(&context()).unwrap().excluded.is_some(), is_own, "{port}");
        }
    }

    #[test]
    fn a_network_has_no_effect_where_the_engine_is_elsewhere() {
        let vantage = Vantage::Elsewhere { engine: vec!["203.0.113.5".parse().unwrap()] };
        let elsewhere = Context { vantage, ..context() };
        let endpoint = inspected(|_| {}).endpoint(&elsewhere).unwrap();
        assert_eq!(endpoint.reach.unwrap().targets, ["203.0.113.5:32768".parse().unwrap()]);
        assert!(endpoint.problems.is_empty());
        let wanted = inspected(|json| json["Config"]["Labels"]["inference.network"] = "front".into());
        let endpoint = wanted.endpoint(&elsewhere).unwrap();
        assert!(endpoint.reach.is_ok());
        assert!(
            endpoint.problems.concat().contains("inference.network=\"front\" has no effect"),
            "{:?}",
            endpoint.problems
        );
        let by_default = Context { default_network: Some("front".into()), ..elsewhere };
        let endpoint = inspected(|_| {}).endpoint(&by_default).unwrap();
        assert!(
            endpoint.reach.is_ok() && endpoint.problems.concat().contains("PROXY_NETWORK"),
            "{:?}",
            endpoint.problems
        );
    }

    #[test]
    fn a_sidecar_is_reached_through_the_owner_of_its_network() {
        let owner = inspected(|json| json["Id"] = "owner".into());
        let sidecar = || {
            inspected(|json| {
                json["HostConfig"]["NetworkMode"] = "container:owner".into();
                json["NetworkSettings"] = serde_json::json!({ "Networks": {} });
            })
        };
        let now = i64::MAX;
        let mut look = sidecar();
        assert_eq!(look.network_owner(), Some("owner"));
        look.share_network_of(Some(&owner), None, now);
        assert_eq!(look.network_owner(), Some("owner"), "its events concern this one, too");
        assert!(look.endpoint(&context()).unwrap().reach.is_ok());
        // an owner that was started again has another network namespace: the sidecar's is dead
        let restarted = inspected(|json| json["State"]["StartedAt"] = "2026-01-01T00:00:02Z".into());
        for owner in [Some(&restarted), None] {
            let mut look = sidecar();
            look.share_network_of(owner, None, now);
            assert!(look.endpoint(&context()).unwrap().reach.is_err());
        }
    }

    /// Looks at a sidecar and its owner, one after the other; each is the time both were started and that of the clock.
    fn reached(looks: &[(i64, i64, i64)]) -> Vec<bool> {
        let mut before = None;
        let look = |(owner_at, own_at, now): &(i64, i64, i64)| {
            let mut owner = inspected(|json| json["Id"] = "owner".into());
            owner.started_nanos = *owner_at;
            let mut sidecar = inspected(|json| {
                json["HostConfig"]["NetworkMode"] = "container:owner".into();
                json["NetworkSettings"] = serde_json::json!({ "Networks": {} });
            });
            sidecar.started_nanos = *own_at;
            sidecar.share_network_of(Some(&owner), before.as_ref(), *now);
            before.clone_from(&sidecar.shared);
            sidecar.endpoint(&context()).unwrap().reach.is_ok()
        };
        looks.iter().map(look).collect()
    }

    #[test]
    fn a_clock_that_was_put_back_parts_no_sidecar_from_its_owner() {
        assert_eq!(reached(&[(10, 11, 20)]), [true]);
        assert_eq!(reached(&[(12, 11, 20)]), [false], "the owner was started again");
        // The owner was started by a clock that was ahead, and that the time catches up with later.
        for ahead in [16, 25, 7_200] {
            assert_eq!(reached(&[(ahead, 11, 15), (ahead, 11, ahead + 1), (ahead, 11, 10_000)]), [true; 3], "{ahead}");
        }
        // Runs that are seen to change need no clock at all.
        assert_eq!(
            reached(&[(10, 11, 20), (9, 11, 20)]),
            [true, false],
            "the owner was started again, by another clock"
        );
        assert_eq!(reached(&[(10, 11, 20), (9, 11, 20), (9, 8, 20)]), [true, false, true], "then the sidecar, too");
        assert_eq!(reached(&[(10, 11, 20), (10, 5, 20)]), [true, true], "the sidecar alone");
        assert_eq!(reached(&[(12, 11, 20), (12, 11, 30)]), [false, false]);
        assert_eq!(reached(&[(-5, 11, 20), (-9, 11, 20)]), [true, false], "times that cannot be read are runs as well");
    }
}
