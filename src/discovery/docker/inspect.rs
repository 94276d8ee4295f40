//! What of an engine's `inspect` the proxy keeps, and the [`Endpoint`] it makes of it. Pure.
//!
//! Everything else, the container's environment above all, is dropped where it is read.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum, EndpointSettings, HealthStatusEnum, PortBinding,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    discovery::{
        Endpoint, Health, Incarnation, Obstacle, Phase,
        network::{self, Attachment, NetworkMode, Published, Vantage, Wiring},
        signal::parse_signal,
    },
    labels::{self, Opted},
};

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
    pub(super) health: Health,
    pub(super) labels: HashMap<String, String>,
    pub(super) stop_signal: u8,
    stop_grace: Duration,
    pub(super) wiring: Wiring,
    network_owner: Option<String>,
    exposed_tcp: Vec<u16>,
}

/// What is known of the proxy's own place, and of what the user set for all containers.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) vantage: Vantage,
    pub(super) self_id: Option<String>,
    pub(super) default_network: Option<String>,
    /// Ports that the proxy itself listens on.
    pub(super) own_ports: Vec<u16>,
}

impl Inspected {
    /// Keeps what is needed. `None` if the answer lacks what every engine sends.
    pub(super) fn read(answer: ContainerInspectResponse) -> Option<Inspected> {
        let state = answer.state?;
        let config = answer.config?;
        let settings = answer.network_settings.unwrap_or_default();
        let labels: HashMap<String, String> = config.labels.unwrap_or_default();
        let phase = match state.status {
            Some(ContainerStateStatusEnum::RUNNING) => Phase::Running,
            Some(ContainerStateStatusEnum::PAUSED) => Phase::Paused,
            Some(ContainerStateStatusEnum::RESTARTING) => Phase::Restarting,
            _ => Phase::Stopped,
        };
        let health = match state.health.and_then(|health| health.status) {
            Some(HealthStatusEnum::HEALTHY) => Health::Healthy,
            Some(HealthStatusEnum::UNHEALTHY) => Health::Unhealthy,
            Some(HealthStatusEnum::STARTING) => Health::Starting,
            Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY) | None => Health::None,
        };
        let mode = match answer.host_config.and_then(|host| host.network_mode).as_deref() {
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
        let attachments = settings.networks.unwrap_or_default().into_iter().map(attachment).collect();
        let published = settings.ports.unwrap_or_default().into_iter().flat_map(published).collect();
        let exposed_tcp = config.exposed_ports.unwrap_or_default().iter().filter_map(|port| tcp_port(port)).collect();
        Some(Inspected {
            id: answer.id?,
            name: answer.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            image: config.image.or(answer.image).unwrap_or_default(),
            started_nanos: state.started_at.as_deref().map_or(0, nanos),
            phase,
            health,
            stop_signal: config.stop_signal.as_deref().and_then(parse_signal).unwrap_or(SIGTERM),
            stop_grace: config
                .stop_timeout
                .and_then(|seconds| u64::try_from(seconds).ok())
                .map_or(STOP_GRACE, Duration::from_secs),
            wiring: Wiring {
                mode,
                attachments,
                published,
                compose_project: labels.get("com.docker.compose.project").cloned(),
            },
            network_owner,
            exposed_tcp,
            labels,
        })
    }

    /// The container whose network it uses, if that is not its own; also once that one's wiring has been taken over.
    pub(super) fn network_owner(&self) -> Option<&str> {
        self.network_owner.as_deref()
    }

    /// Takes the network of `owner`, the container in whose network namespace this one runs.
    pub(super) fn share_network_of(&mut self, owner: Option<&Inspected>) {
        let usable = owner.filter(|o| o.phase == Phase::Running && o.started_nanos <= self.started_nanos);
        if let Some(owner) = usable {
            self.wiring.mode = owner.wiring.mode.clone();
            self.wiring.attachments.clone_from(&owner.wiring.attachments);
            self.wiring.published.clone_from(&owner.wiring.published);
        }
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
            Opted::In if self.is_own_port(&reach, context) => Some(obstacle(
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
        let problems =
            labels.problems.iter().filter(|problem| !is_said(&problem.name)).map(ToString::to_string).collect();
        Some(Endpoint {
            id: self.id.as_str().into(),
            name: self.name.clone(),
            role: self.role(),
            is_stopped_first: self.compose_service().is_some(),
            image: self.image.clone(),
            incarnation: Incarnation(self.started_nanos),
            phase: self.phase,
            health: self.health,
            reach,
            problems,
            labels: labels.spec,
            excluded,
            stop_grace: self.stop_grace,
        })
    }

    /// A container in host mode can be given the proxy's own address.
    fn is_own_port(&self, reach: &Result<network::Reach, Obstacle>, context: &Context) -> bool {
        let shares_host = matches!(self.wiring.mode, NetworkMode::Host);
        let proxy_on_host = match &context.vantage {
            Vantage::Host { .. } => true,
            Vantage::Container { host_network, .. } => *host_network,
        };
        let own = |port: u16| context.own_ports.contains(&port);
        shares_host && proxy_on_host && reach.as_ref().is_ok_and(|r| r.targets.iter().any(|t| own(t.port())))
    }
}

fn attachment((name, settings): (String, EndpointSettings)) -> Attachment {
    fn ip<T: std::str::FromStr>(text: Option<String>) -> Option<T> {
        text.and_then(|t| t.parse().ok())
    }
    Attachment {
        name,
        id: settings.network_id.unwrap_or_default(),
        ipv4: ip(settings.ip_address),
        ipv6: ip(settings.global_ipv6_address),
        gateway: ip::<IpAddr>(settings.gateway).or_else(|| ip(settings.ipv6_gateway)),
        gw_priority: settings.gw_priority.unwrap_or(0),
    }
}

fn published((port, bindings): (String, Option<Vec<PortBinding>>)) -> Vec<Published> {
    let Some(container_port) = tcp_port(&port) else {
        return Vec::new();
    };
    let published = |binding: PortBinding| {
        Some(Published {
            container_port,
            host_ip: binding.host_ip.filter(|ip| !ip.is_empty()).and_then(|ip| ip.parse().ok()),
            host_port: binding.host_port?.parse().ok()?,
        })
    };
    bindings.unwrap_or_default().into_iter().filter_map(published).collect()
}

fn tcp_port(text: &str) -> Option<u16> {
    match text.split_once('/') {
        Some((port, "tcp")) => port.parse().ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}

/// RFC 3339, as engines write it, in nanoseconds since 1970; 0 for what is not a time or long before.
pub(super) fn nanos(text: &str) -> i64 {
    let nanos = OffsetDateTime::parse(text, &Rfc3339).map_or(0, OffsetDateTime::unix_timestamp_nanos);
    i64::try_from(nanos.max(0)).unwrap_or(0)
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
        Inspected::read(serde_json::from_value(json).unwrap()).unwrap()
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
        Context { vantage, self_id: Some("self".into()), default_network: None, own_ports: vec![8080] }
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
        assert_eq!(nanos("2026-01-01T02:00:01+02:00"), 1_767_225_601_000_000_000);
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
    fn a_sidecar_is_reached_through_the_owner_of_its_network() {
        let owner = inspected(|json| json["Id"] = "owner".into());
        let sidecar = || {
            inspected(|json| {
                json["HostConfig"]["NetworkMode"] = "container:owner".into();
                json["NetworkSettings"] = serde_json::json!({ "Networks": {} });
            })
        };
        let mut look = sidecar();
        assert_eq!(look.network_owner(), Some("owner"));
        look.share_network_of(Some(&owner));
        assert_eq!(look.network_owner(), Some("owner"), "its events concern this one, too");
        assert!(look.endpoint(&context()).unwrap().reach.is_ok());
        // an owner that was started again has another network namespace: the sidecar's is dead
        let restarted = inspected(|json| json["State"]["StartedAt"] = "2026-01-01T00:00:02Z".into());
        for owner in [Some(&restarted), None] {
            let mut look = sidecar();
            look.share_network_of(owner);
            assert!(look.endpoint(&context()).unwrap().reach.is_err());
        }
    }
}
