//! Which of a container's addresses the proxy can reach.
//!
//! A container may sit on several networks, on none, in the host's or in another container's; a choice at random works
//! on one start and fails on the next. So the choice is a pure function of what Docker reports and of where the proxy
//! stands, it does not depend on the order of either, and when nothing can be reached it says what to change.
//!
//! This file refuses to know sockets, the Engine's API and DNS: any container on a network may claim a name on it, only
//! the Engine knows whose an address is.

use std::{
    cmp::Reverse,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// The port of an inference server that says nothing else.
pub const DEFAULT_PORT: u16 = 8000;

/// Swarm's own network for published ports; it is attached to containers but carries no traffic between them.
const INGRESS: &str = "ingress";
/// The network of a container with `network_mode: host`.
const HOST: &str = "host";
/// Where Docker and Podman put containers that ask for no network.
const DEFAULT_NETWORKS: [&str; 2] = ["bridge", "podman"];
/// How many networks a message names.
const MAX_SHOWN_NAMES: usize = 8;

/// One network that a container is on, and its address there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Attachment {
    /// Name of the network.
    pub name: String,
    /// Id of the network; empty when the Engine does not tell.
    pub id: String,
    /// The container's IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// The container's global IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The network's gateway, which on a bridge is the host.
    pub gateway: Option<IpAddr>,
    /// Docker's priority of this network as default route; higher comes first.
    pub gw_priority: i64,
}

/// Whose network stack a container uses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    /// Its own, on the networks it is attached to.
    Networks,
    /// The host's.
    Host,
    /// Its own, connected to nothing.
    None,
    /// That of the container with this id. Whoever builds the [`Wiring`] puts that container's mode and networks in
    /// place of these; the variant stays only when the other container cannot be used.
    Container(String),
}

/// A container's port that the host forwards.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Published {
    /// TCP port inside the container.
    pub container_port: u16,
    /// Address on the host; `None` or an unspecified address is all of them.
    pub host_ip: Option<IpAddr>,
    /// TCP port on the host.
    pub host_port: u16,
}

/// How a container is connected.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Wiring {
    /// Whose network stack it uses.
    pub mode: NetworkMode,
    /// The networks it is on, in any order.
    pub attachments: Vec<Attachment>,
    /// The ports that the host forwards to it, in any order.
    pub published: Vec<Published>,
    /// Its compose project, whose name compose puts in front of the names of networks.
    pub compose_project: Option<String>,
}

/// Where the proxy stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Vantage {
    /// In a container of the Engine it watches.
    Container {
        /// The networks this container is on, in any order.
        attachments: Vec<Attachment>,
        /// It uses the host's network stack. Every address of the host's containers is then taken to be reachable;
        /// [`Vantage::Host`] is more exact for those who can read the prefixes.
        host_network: bool,
        /// The host's address as this container knows it: `host.docker.internal`, else the default route's gateway.
        /// Without it the gateway of a network is taken, which may be an internal one that leads to no published port.
        host_gateway: Option<IpAddr>,
    },
    /// In the network stack of the host, or of some other machine.
    Host {
        /// Prefixes that are reached without a gateway, as address and length in bits.
        on_link: Vec<(IpAddr, u8)>,
    },
}

/// The network that an address belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkRef {
    /// Its name.
    pub name: String,
    /// Its id; empty when the Engine does not tell.
    pub id: String,
}

/// How to reach a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reach {
    /// What to try, in this order: one address for each port that could be the server's, never none. A container has
    /// one address only, so that one on two networks does not count twice.
    pub targets: Vec<SocketAddr>,
    /// The network in use; `None` when the way goes through the host.
    pub network: Option<NetworkRef>,
}

/// Names of networks as a message shows them: sorted, and not too many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names(Vec<String>);

/// Why a container cannot be reached; [`Unreachable::advice`] says what to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// The wanted network is not one of the container's.
    #[error(
        "it is not on the network {wanted:?} that inference.network (or PROXY_NETWORK) asks for; it is on: {existing}"
    )]
    NotOnWanted {
        /// The name that was asked for.
        wanted: String,
        /// The networks it is on.
        existing: Names,
    },
    /// The wanted network is one of the container's but gives it no address.
    #[error("it has no address on the network {wanted:?} that inference.network (or PROXY_NETWORK) asks for")]
    NoAddressOnWanted {
        /// The name of the network.
        wanted: String,
    },
    /// Its network stack belongs to a container that is gone, or that was started again after it.
    #[error("it uses the network of container {owner:.12}, which is gone or was restarted")]
    NamespaceGone {
        /// Id of the other container.
        owner: String,
    },
    /// It is cut off on purpose.
    #[error("it has network mode none")]
    NoNetwork,
    /// It is in the host's network stack and the proxy knows no way there.
    #[error("it uses the network of the host, to which this proxy has no way")]
    NoWayToHost,
    /// It has networks, the proxy has others.
    #[error("it has no network in common with this proxy: it is on {theirs}, the proxy is on {ours}")]
    NothingShared {
        /// The container's networks.
        theirs: Names,
        /// The proxy's networks.
        ours: Names,
    },
    /// The same, and its published port is none that a container can reach.
    #[error(
        "it has no network in common with this proxy: it is on {theirs}, the proxy is on {ours}; \
         and its port {port} is published on the loopback of the host only"
    )]
    OnlyOnLoopback {
        /// The container's port.
        port: u16,
        /// The container's networks.
        theirs: Names,
        /// The proxy's networks.
        ours: Names,
    },
    /// It has no address on any network.
    #[error("it has no address on any network")]
    NoAddress {
        /// The proxy's networks.
        ours: Names,
    },
    /// The proxy is on a host that has no interface on any of the container's networks.
    #[error("none of its networks ({theirs}) can be reached from here, and its port {port} is not published")]
    NotPublished {
        /// The container's port.
        port: u16,
        /// The container's networks.
        theirs: Names,
    },
    /// Neither has the container an address nor the host a port for it.
    #[error("it has no address on any network, and its port {port} is not published")]
    NowhereOnHost {
        /// The container's port.
        port: u16,
    },
    /// There is no port to try.
    #[error("it has no port to try")]
    NoPort,
}

/// The ports that could be the server's, in the order to try: what the label says, else the only exposed TCP port and
/// then [`DEFAULT_PORT`] (images inherit EXPOSE lines that nobody listens on), else [`DEFAULT_PORT`]. Never none.
pub fn port_candidates(label: Option<u16>, exposed_tcp: &[u16]) -> Vec<u16> {
    match (label, exposed_tcp) {
        (Some(port), _) => vec![port],
        (None, [first, rest @ ..]) if *first != DEFAULT_PORT && rest.iter().all(|port| port == first) => {
            vec![*first, DEFAULT_PORT]
        }
        _ => vec![DEFAULT_PORT],
    }
}

/// Chooses the address under which the proxy at `vantage` reaches the container, and tries `ports` there.
///
/// `wanted_network` names the one network that may be used (compose's project prefix may be left out); it is never
/// replaced by a guess, nor checked against the proxy's own networks: routes between networks exist. Without it, the
/// first is taken of: a network in common, a network of the host the proxy runs on, a published port.
///
/// # Errors
/// Nothing can be reached: the reason, with advice. It holds until the wiring or the vantage changes.
pub fn reach(
    wiring: &Wiring,
    vantage: &Vantage,
    wanted_network: Option<&str>,
    ports: &[u16],
) -> Result<Reach, Unreachable> {
    let Some(&first_port) = ports.first() else {
        return Err(Unreachable::NoPort);
    };
    match (&wiring.mode, wanted_network) {
        (NetworkMode::Container(owner), _) => Err(Unreachable::NamespaceGone { owner: owner.clone() }),
        (NetworkMode::None, _) => Err(Unreachable::NoNetwork),
        (NetworkMode::Host, Some(wanted)) if wanted != HOST => {
            let (wanted, existing) = (wanted.to_owned(), Names(vec![HOST.to_owned()]));
            Err(Unreachable::NotOnWanted { wanted, existing })
        }
        (NetworkMode::Host, _) => {
            let host = vantage.host().ok_or(Unreachable::NoWayToHost)?;
            Ok(Reach::through_host(on_ports(host, ports)))
        }
        (NetworkMode::Networks, Some(wanted)) => on_wanted_network(wiring, wanted, ports),
        (NetworkMode::Networks, None) => on_near_network(wiring, vantage, ports)
            .or_else(|| by_published_port(wiring, vantage, ports))
            .ok_or_else(|| no_way(wiring, vantage, first_port)),
    }
}

/// By the exact name, else by the name within the compose project.
fn on_wanted_network(wiring: &Wiring, wanted: &str, ports: &[u16]) -> Result<Reach, Unreachable> {
    let attachments = by_preference(&wiring.attachments);
    let named = |name: &str| attachments.iter().find(|a| a.name == name && a.name != INGRESS);
    let in_project = || named(&format!("{}_{wanted}", wiring.compose_project.as_deref()?));
    let Some(attachment) = named(wanted).or_else(in_project) else {
        let (wanted, existing) = (wanted.to_owned(), Names::of(&wiring.attachments));
        return Err(Unreachable::NotOnWanted { wanted, existing });
    };
    let wanted = attachment.name.clone();
    let address = attachment.addresses().next();
    let address = address.ok_or(Unreachable::NoAddressOnWanted { wanted })?;
    Ok(Reach::on(attachment, on_ports(address, ports)))
}

/// On the first network that can be reached from where the proxy stands.
fn on_near_network(wiring: &Wiring, vantage: &Vantage, ports: &[u16]) -> Option<Reach> {
    by_preference(&wiring.attachments).into_iter().find_map(|attachment| {
        let address = vantage.address_on(attachment)?;
        Some(Reach::on(attachment, on_ports(address, ports)))
    })
}

/// For each port its best binding on the host. A port without one is left out.
fn by_published_port(wiring: &Wiring, vantage: &Vantage, ports: &[u16]) -> Option<Reach> {
    let target = |binding: &Published| {
        let host = vantage.published_address(binding.host_ip)?;
        Some(SocketAddr::new(host, binding.host_port))
    };
    let best = |port: &u16| {
        let bindings = wiring.published.iter().filter(|p| p.container_port == *port);
        bindings.filter_map(target).min() // IPv4 before IPv6, then the lowest address and port
    };
    let targets: Vec<SocketAddr> = ports.iter().filter_map(best).collect();
    (!targets.is_empty()).then(|| Reach::through_host(targets))
}

fn on_ports(address: IpAddr, ports: &[u16]) -> Vec<SocketAddr> {
    ports.iter().map(|port| SocketAddr::new(address, *port)).collect()
}

fn no_way(wiring: &Wiring, vantage: &Vantage, port: u16) -> Unreachable {
    let theirs = Names::of(wiring.attachments.iter().filter(|a| a.addresses().next().is_some()));
    let is_nowhere = theirs.0.is_empty();
    match vantage {
        _ if vantage.is_on_host() && is_nowhere => Unreachable::NowhereOnHost { port },
        _ if vantage.is_on_host() => Unreachable::NotPublished { port, theirs },
        Vantage::Container { attachments, .. } if is_nowhere => {
            let ours = Names::of(attachments);
            Unreachable::NoAddress { ours }
        }
        Vantage::Container { attachments, .. } if is_on_loopback_only(wiring, port) => {
            Unreachable::OnlyOnLoopback { port, theirs, ours: Names::of(attachments) }
        }
        Vantage::Container { attachments, .. } => Unreachable::NothingShared { theirs, ours: Names::of(attachments) },
        Vantage::Host { .. } => Unreachable::NotPublished { port, theirs },
    }
}

fn is_on_loopback_only(wiring: &Wiring, port: u16) -> bool {
    let is_loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
    let mut bindings = wiring.published.iter().filter(|p| p.container_port == port).peekable();
    bindings.peek().is_some() && bindings.all(|p| p.host_ip.is_some_and(is_loopback))
}

// === impl Unreachable ===

impl Unreachable {
    /// What to do about it; `container` is its name, for commands that can be typed as they stand.
    pub fn advice(&self, container: &str) -> String {
        // Labels say what they like, and these are pasted into a shell.
        let typed = |name: &str| match name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
            true => name.to_owned(),
            false => "NETWORK".to_owned(),
        };
        match self {
            Unreachable::NotOnWanted { wanted, .. } => format!(
                "correct the name (docker network ls has them all; Compose puts the project's name in front), \
                 or connect the container: docker network connect {} {container}",
                typed(wanted)
            ),
            Unreachable::NoAddressOnWanted { wanted } => {
                let wanted = typed(wanted);
                format!("connect it anew: docker network disconnect -f {wanted} {container}, then connect")
            }
            Unreachable::NamespaceGone { .. } => format!("recreate {container}"),
            Unreachable::NoNetwork => "create it with a network instead of network_mode: none".to_owned(),
            Unreachable::NoWayToHost => "give the proxy's container the extra host \
                 host.docker.internal:host-gateway (--add-host, extra_hosts), or network mode host"
                .to_owned(),
            Unreachable::NothingShared { theirs, ours } | Unreachable::OnlyOnLoopback { theirs, ours, .. } => {
                match (ours.preferred(), theirs.preferred()) {
                    (Some(ours), _) => format!(
                        "connect it to a network of the proxy (docker network connect {} {container}), \
                         or name one network in both Compose files",
                        typed(ours)
                    ),
                    (None, theirs) => {
                        format!(
                            "connect the proxy: docker network connect {} PROXY",
                            typed(theirs.unwrap_or("NETWORK"))
                        )
                    }
                }
            }
            Unreachable::NoAddress { ours } => {
                let network = typed(ours.preferred().unwrap_or("NETWORK"));
                format!("connect it to a network of the proxy: docker network connect {network} {container}")
            }
            Unreachable::NotPublished { port, .. } => {
                format!("publish the port (-p 127.0.0.1:{port}:{port}), or run the proxy in a container on its network")
            }
            Unreachable::NowhereOnHost { port } => {
                format!("publish the port (-p 127.0.0.1:{port}:{port}), or connect the container to a network")
            }
            Unreachable::NoPort => "set inference.port".to_owned(),
        }
    }
}

// === impl Reach ===

impl Reach {
    fn on(attachment: &Attachment, targets: Vec<SocketAddr>) -> Reach {
        let (name, id) = (attachment.name.clone(), attachment.id.clone());
        let network = Some(NetworkRef { name, id });
        Reach { targets, network }
    }

    fn through_host(targets: Vec<SocketAddr>) -> Reach {
        let network = None;
        Reach { targets, network }
    }
}

// === impl Attachment ===

impl Attachment {
    /// Its addresses that can be used, IPv4 first.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let both = [self.ipv4.map(IpAddr::V4), self.ipv6.map(IpAddr::V6)];
        let is_way = self.name != INGRESS;
        both.into_iter().flatten().filter(move |ip| is_way && is_elsewhere(ip))
    }

    /// By id: two networks may share a name. By name where an id is missing.
    fn is_same_network(&self, other: &Attachment) -> bool {
        if self.id.is_empty() || other.id.is_empty() {
            return self.name == other.name;
        }
        self.id == other.id
    }
}

/// User-defined networks before the default one, then by priority, then by name. The rest of the key only makes the
/// order total, so that it cannot depend on the order of the input.
fn by_preference(attachments: &[Attachment]) -> Vec<&Attachment> {
    let mut sorted: Vec<&Attachment> = attachments.iter().collect();
    sorted.sort_by_key(|a| {
        let is_default = DEFAULT_NETWORKS.contains(&a.name.as_str());
        let rest = (&a.id, a.ipv4, a.ipv6, a.gateway);
        (is_default, Reverse(a.gw_priority), &a.name, rest)
    });
    sorted
}

// === impl Vantage ===

impl Vantage {
    fn is_on_host(&self) -> bool {
        match self {
            Vantage::Host { .. } => true,
            Vantage::Container { host_network, .. } => *host_network,
        }
    }

    /// The container's address on this network, if it can be reached from here.
    fn address_on(&self, network: &Attachment) -> Option<IpAddr> {
        let mut addresses = network.addresses();
        match self {
            Vantage::Host { on_link } => addresses.find(|ip| on_link.iter().any(|prefix| contains(*prefix, *ip))),
            Vantage::Container { host_network: true, .. } => addresses.next(),
            Vantage::Container { attachments, .. } => {
                let is_shared = attachments.iter().any(|own| own.is_same_network(network));
                addresses.next().filter(|_| is_shared)
            }
        }
    }

    /// The host's address, for what listens on all of the host's addresses.
    fn host(&self) -> Option<IpAddr> {
        match self {
            Vantage::Container { attachments, host_network: false, host_gateway } => {
                let gateways = by_preference(attachments).into_iter().map(|own| own.gateway);
                [*host_gateway].into_iter().chain(gateways).flatten().find(is_elsewhere)
            }
            Vantage::Container { .. } | Vantage::Host { .. } => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        }
    }

    /// Where a port that is published on `host_ip` is reached from here.
    fn published_address(&self, host_ip: Option<IpAddr>) -> Option<IpAddr> {
        let on_host = self.is_on_host();
        match host_ip.map(|ip| ip.to_canonical()) {
            None => self.host(),
            Some(ip) if !ip.is_unspecified() => (on_host || !ip.is_loopback()).then_some(ip),
            Some(IpAddr::V6(_)) if on_host => Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
            Some(any) => self.host().filter(|host| host.is_ipv4() == any.is_ipv4()),
        }
    }
}

/// Whether an address can lead out of the proxy's own network stack. A link-local one means nothing without an
/// interface, and 169.254.169.254 is the metadata service of a cloud.
fn is_elsewhere(ip: &IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !is_link_local && !ip.is_unspecified() && !ip.is_loopback()
}

/// Whether `ip` starts with the first bits of the prefix, as many as it counts.
fn contains((prefix, bits): (IpAddr, u8), ip: IpAddr) -> bool {
    let bits = u32::from(bits);
    // Shift out what is not compared. A shift by the full width is refused: nothing is compared, all addresses match.
    match (prefix, ip) {
        (IpAddr::V4(prefix), IpAddr::V4(ip)) => {
            let differing = prefix.to_bits() ^ ip.to_bits();
            differing.checked_shr(32_u32.saturating_sub(bits)).is_none_or(|bits| bits == 0)
        }
        (IpAddr::V6(prefix), IpAddr::V6(ip)) => {
            let differing = prefix.to_bits() ^ ip.to_bits();
            differing.checked_shr(128_u32.saturating_sub(bits)).is_none_or(|bits| bits == 0)
        }
        _ => false,
    }
}

// === impl Names ===

impl Names {
    /// The one to name in an example: one that somebody made, if there is one.
    fn preferred(&self) -> Option<&str> {
        let is_made = |name: &&String| !DEFAULT_NETWORKS.contains(&name.as_str());
        self.0.iter().find(is_made).or(self.0.first()).map(String::as_str)
    }

    fn of<'a>(attachments: impl IntoIterator<Item = &'a Attachment>) -> Names {
        let usable = attachments.into_iter().filter(|a| a.name != INGRESS);
        let mut names: Vec<String> = usable.map(|a| a.name.clone()).collect();
        names.sort();
        Names(names)
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.len().min(MAX_SHOWN_NAMES);
        match self.0.len() - shown {
            _ if shown == 0 => f.write_str("none"),
            0 => f.write_str(&self.0.join(", ")),
            more => write!(f, "{} and {more} more", self.0[..shown].join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn v4_of(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
        addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None })
    }

    fn v6_of(addresses: &[IpAddr]) -> Option<Ipv6Addr> {
        addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None })
    }

    /// `name [address]... [gw=address] [prio=number] [id=text]`, several with `;` between; the id is `id-<name>` unless
    /// told.
    fn nets(text: &str) -> Vec<Attachment> {
        let net = |text: &str| {
            let mut words = text.split_whitespace();
            let name = words.next().unwrap().to_owned();
            let (options, addresses): (Vec<&str>, Vec<&str>) = words.partition(|word| word.contains('='));
            let option = |key| options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
            let addresses: Vec<IpAddr> = addresses.into_iter().map(ip).collect();
            Attachment {
                id: option("id").map_or_else(|| format!("id-{name}"), str::to_owned),
                name,
                ipv4: v4_of(&addresses),
                ipv6: v6_of(&addresses),
                gateway: option("gw").map(ip),
                gw_priority: option("prio").map_or(0, |number| number.parse().unwrap()),
            }
        };
        text.split(';').filter(|text| !text.trim().is_empty()).map(net).collect()
    }

    /// A container of the compose project `llm` on these networks.
    fn on(networks: &str) -> Wiring {
        Wiring {
            mode: NetworkMode::Networks,
            attachments: nets(networks),
            published: vec![],
            compose_project: Some("llm".to_owned()),
        }
    }

    fn with_mode(mode: NetworkMode) -> Wiring {
        Wiring { mode, ..on("") }
    }

    /// `container_port` is published on `host_ip` (empty: not told).
    fn published(container_port: u16, host_ip: &str, host_port: u16) -> Published {
        let host_ip = (!host_ip.is_empty()).then(|| ip(host_ip));
        Published { container_port, host_ip, host_port }
    }

    fn publishing(networks: &str, ports: &[Published]) -> Wiring {
        Wiring { published: ports.to_vec(), ..on(networks) }
    }

    fn in_container(networks: &str) -> Vantage {
        Vantage::Container { attachments: nets(networks), host_network: false, host_gateway: None }
    }

    fn in_container_with_gateway(networks: &str, host_gateway: &str) -> Vantage {
        Vantage::Container { attachments: nets(networks), host_network: false, host_gateway: Some(ip(host_gateway)) }
    }

    fn in_host_network() -> Vantage {
        Vantage::Container { attachments: nets("host"), host_network: true, host_gateway: Some(ip("10.0.0.1")) }
    }

    fn on_host(on_link: &[(&str, u8)]) -> Vantage {
        Vantage::Host { on_link: on_link.iter().map(|(prefix, bits)| (ip(prefix), *bits)).collect() }
    }

    /// The first target and its network, as text; an error as its message.
    fn reached(wiring: &Wiring, vantage: &Vantage, wanted: Option<&str>) -> String {
        match reach(wiring, vantage, wanted, &[8000]) {
            Ok(Reach { targets, network: Some(network) }) => format!("{} on {}", targets[0], network.name),
            Ok(Reach { targets, network: None }) => format!("{}", targets[0]),
            Err(unreachable) => unreachable.to_string(),
        }
    }

    #[test]
    fn advice_can_be_typed_as_it_stands() {
        let ours = in_container("bridge 172.17.0.9; z 10.9.0.9");
        for (container, vantage, wanted, expected) in [
            (on("a 10.0.0.2"), ours.clone(), None, "docker network connect z vllm"),
            (on("a 10.0.0.2"), in_container("bridge 172.17.0.9"), None, "docker network connect bridge vllm"),
            (on("a 10.0.0.2"), in_container(""), None, "docker network connect a PROXY"),
            (on("dead"), ours.clone(), None, "docker network connect z vllm"),
            (on("a 10.0.0.2"), ours.clone(), Some("b"), "docker network connect b vllm"),
            (on("a 10.0.0.2"), ours.clone(), Some("$(rm b)"), "docker network connect NETWORK vllm"),
            (on("a 10.0.0.2"), on_host(&[]), None, "-p 127.0.0.1:8000:8000"),
            (with_mode(NetworkMode::Host), in_container(""), None, "host.docker.internal:host-gateway"),
        ] {
            let advice = reach(&container, &vantage, wanted, &[8000]).unwrap_err().advice("vllm");
            assert!(advice.contains(expected), "{advice}");
        }
    }

    #[test]
    fn ports_to_try() {
        for (label, exposed, expected) in [
            (Some(9000), &[8080][..], &[9000][..]),
            (Some(8000), &[], &[8000]),
            (None, &[], &[8000]),
            (None, &[8000], &[8000]),
            (None, &[30000], &[30000, 8000]),
            (None, &[30000, 30000], &[30000, 8000]),
            (None, &[8080, 9090], &[8000]),
            (None, &[8000, 9090], &[8000]),
        ] {
            assert_eq!(port_candidates(label, exposed), expected, "{label:?} {exposed:?}");
        }
    }

    #[test]
    fn every_port_becomes_a_target_in_order() {
        let container = on("a 10.0.0.2");
        let reached = reach(&container, &in_container("a 10.0.0.9"), None, &[30000, 8000]).unwrap();
        assert_eq!(reached.targets, ["10.0.0.2:30000".parse().unwrap(), "10.0.0.2:8000".parse().unwrap()]);
        assert_eq!(reached.network, Some(NetworkRef { name: "a".to_owned(), id: "id-a".to_owned() }));
        assert_eq!(reach(&container, &in_container("a"), None, &[]), Err(Unreachable::NoPort));
    }

    #[test]
    fn the_shared_network_is_used() {
        let proxy = in_container("front 10.9.0.9; mid 10.1.0.9; bridge 172.17.0.9; podman 10.88.0.9");
        for (networks, expected) in [
            ("aaa 10.0.0.2; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
            ("bridge 172.17.0.2; zzz 10.7.0.2", "172.17.0.2:8000 on bridge"),
            // user-defined before default, whatever else
            ("bridge 172.17.0.2; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
            ("bridge 172.17.0.2 prio=9; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
            ("podman 10.88.0.2; zzz 10.7.0.2; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
            // then by priority, then by name
            ("mid 10.1.0.2; front 10.9.0.2", "10.9.0.2:8000 on front"),
            ("front 10.9.0.2; mid 10.1.0.2 prio=1", "10.1.0.2:8000 on mid"),
            ("front 10.9.0.2 prio=-1; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
            // IPv4 before IPv6, and only what is an address
            ("mid fd00::2", "[fd00::2]:8000 on mid"),
            ("mid fd00::2 10.1.0.2", "10.1.0.2:8000 on mid"),
            ("mid 0.0.0.0 fd00::2", "[fd00::2]:8000 on mid"),
            ("front; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
            ("front fe80::2 169.254.169.254; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        ] {
            assert_eq!(reached(&on(networks), &proxy, None), expected, "{networks}");
        }
    }

    #[test]
    fn networks_are_compared_by_id_and_by_name_without_one() {
        let nothing_shared =
            |ours: &str| format!("it has no network in common with this proxy: it is on net, the proxy is on {ours}");
        let reached_on = |name: &str| format!("10.0.0.2:8000 on {name}");
        for (theirs, ours, expected) in [
            ("net 10.0.0.2 id=other", "net 10.0.0.9", nothing_shared("net")),
            ("alias 10.0.0.2 id=1", "net 10.0.0.9 id=1", reached_on("alias")),
            ("net 10.0.0.2 id=", "net 10.0.0.9", reached_on("net")),
            ("net 10.0.0.2", "net 10.0.0.9 id=", reached_on("net")),
            ("net 10.0.0.2 id=", "other 10.0.0.9 id=", nothing_shared("other")),
        ] {
            assert_eq!(reached(&on(theirs), &in_container(ours), None), expected, "{theirs} | {ours}");
        }
    }

    #[test]
    fn swarm_ingress_is_no_way() {
        let container = on("ingress 10.0.0.2; llm_net 10.1.0.2");
        let proxy = in_container("ingress 10.0.0.9");
        let elsewhere = "it has no network in common with this proxy: it is on llm_net, the proxy is on none";
        assert_eq!(reached(&container, &proxy, None), elsewhere);
        assert_eq!(reached(&container, &on_host(&[("10.0.0.0", 24)]), None), not_published("llm_net"));
        assert_eq!(reached(&container, &proxy, Some("ingress")), not_on("ingress", "llm_net"));
    }

    fn not_on(wanted: &str, existing: &str) -> String {
        format!(
            "it is not on the network {wanted:?} that inference.network (or PROXY_NETWORK) asks for; it is on: {existing}"
        )
    }

    #[test]
    fn the_wanted_network_decides() {
        let container = on("a 10.0.0.2; llm_b fd00::2; llm_a 10.2.0.2; dead");
        let no_address = "it has no address on the network \"dead\" that inference.network (or PROXY_NETWORK) asks for";
        for proxy in [in_container("a 10.0.0.9"), in_container(""), on_host(&[("10.0.0.0", 24)])] {
            assert_eq!(reached(&container, &proxy, Some("a")), "10.0.0.2:8000 on a");
            assert_eq!(reached(&container, &proxy, Some("llm_a")), "10.2.0.2:8000 on llm_a");
            assert_eq!(reached(&container, &proxy, Some("b")), "[fd00::2]:8000 on llm_b");
            assert_eq!(reached(&container, &proxy, Some("dead")), no_address);
            for wanted in ["c", "A", "", "llm", "other_a"] {
                let missing = not_on(wanted, "a, dead, llm_a, llm_b");
                assert_eq!(reached(&container, &proxy, Some(wanted)), missing);
            }
        }
        let no_project = Wiring { compose_project: None, ..container };
        let missing = not_on("b", "a, dead, llm_a, llm_b");
        assert_eq!(reached(&no_project, &in_container(""), Some("b")), missing);
    }

    #[test]
    fn a_wanted_network_is_never_replaced_by_a_published_port() {
        let container = publishing("a 10.0.0.2", &[published(8000, "0.0.0.0", 18000)]);
        assert_eq!(reached(&container, &on_host(&[("10.0.0.0", 8)]), Some("b")), not_on("b", "a"));
    }

    #[test]
    fn host_network_containers() {
        let docker = Wiring { attachments: nets("host"), ..with_mode(NetworkMode::Host) };
        let podman = with_mode(NetworkMode::Host);
        let no_way = "it uses the network of the host, to which this proxy has no way";
        let ours = "bridge 172.17.0.9 gw=172.17.0.1; a 10.0.0.9 gw=10.0.0.1; aa 10.2.0.9";
        for (proxy, expected) in [
            (on_host(&[]), "127.0.0.1:8000"),
            (in_host_network(), "127.0.0.1:8000"),
            (in_container_with_gateway(ours, "192.168.65.254"), "192.168.65.254:8000"),
            (in_container_with_gateway(ours, "fd00::1"), "[fd00::1]:8000"),
            (in_container_with_gateway(ours, "127.0.0.1"), "10.0.0.1:8000"),
            (in_container(ours), "10.0.0.1:8000"),
            (in_container("bridge 172.17.0.9 gw=172.17.0.1; a fd00::9 gw=fe80::1"), "172.17.0.1:8000"),
            (in_container("internal 10.0.0.9"), no_way),
            (in_container(""), no_way),
        ] {
            for container in [&docker, &podman] {
                assert_eq!(reached(container, &proxy, None), expected, "{proxy:?}");
                assert_eq!(reached(container, &proxy, Some("host")), expected, "{proxy:?}");
                assert_eq!(reached(container, &proxy, Some("a")), not_on("a", "host"));
            }
        }
    }

    #[test]
    fn containers_without_a_network_of_their_own() {
        let proxy = in_container("a 10.0.0.9");
        let owner = NetworkMode::Container("0123456789ab".repeat(5) + "cdef");
        let gone = "it uses the network of container 0123456789ab, which is gone or was restarted";
        for wanted in [None, Some("a")] {
            let none = "it has network mode none";
            assert_eq!(reached(&with_mode(NetworkMode::None), &proxy, wanted), none);
            assert_eq!(reached(&with_mode(owner.clone()), &proxy, wanted), gone);
        }
    }

    #[test]
    fn from_the_host_by_a_network_of_the_host() {
        let networks = "bridge 172.17.0.2; a 10.0.0.2 fd00::2; b 10.1.0.2";
        let container = publishing(networks, &[published(8000, "0.0.0.0", 18000)]);
        for (on_link, expected) in [
            (&[("172.17.0.0", 16)][..], "172.17.0.2:8000 on bridge"),
            (&[("172.17.0.0", 16), ("10.0.0.0", 24)], "10.0.0.2:8000 on a"),
            (&[("172.17.0.0", 16), ("10.1.0.0", 24)], "10.1.0.2:8000 on b"),
            (&[("fd00::", 64)], "[fd00::2]:8000 on a"),
            (&[("10.0.0.2", 32)], "10.0.0.2:8000 on a"),
            (&[("10.0.0.4", 30)], "127.0.0.1:18000"),
            (&[], "127.0.0.1:18000"),
        ] {
            assert_eq!(reached(&container, &on_host(on_link), None), expected, "{on_link:?}");
        }
        assert_eq!(reached(&container, &in_host_network(), None), "10.0.0.2:8000 on a");
    }

    const NOWHERE: &str = "it has no address on any network, and its port 8000 is not published";
    const NO_ADDRESS: &str = "it has no address on any network";

    fn not_published(theirs: &str) -> String {
        format!("none of its networks ({theirs}) can be reached from here, and its port 8000 is not published")
    }

    #[test]
    fn published_ports() {
        let v4_gateway = in_container("z 10.0.0.9 gw=10.0.0.1");
        let v6_gateway = in_container("z fd00::9 gw=fd00::1");
        for (host_ip, from_host, from_v4, from_v6) in [
            ("", "127.0.0.1:18000", "10.0.0.1:18000", "[fd00::1]:18000"),
            ("0.0.0.0", "127.0.0.1:18000", "10.0.0.1:18000", NO_ADDRESS),
            ("::", "[::1]:18000", NO_ADDRESS, "[fd00::1]:18000"),
            ("127.0.0.1", "127.0.0.1:18000", NO_ADDRESS, NO_ADDRESS),
            ("127.1.2.3", "127.1.2.3:18000", NO_ADDRESS, NO_ADDRESS),
            ("::1", "[::1]:18000", NO_ADDRESS, NO_ADDRESS),
            ("::ffff:127.0.0.1", "127.0.0.1:18000", NO_ADDRESS, NO_ADDRESS),
            ("192.168.1.5", "192.168.1.5:18000", "192.168.1.5:18000", "192.168.1.5:18000"),
        ] {
            let container = publishing("", &[published(8000, host_ip, 18000)]);
            assert_eq!(reached(&container, &on_host(&[]), None), from_host, "{host_ip}");
            assert_eq!(reached(&container, &in_host_network(), None), from_host, "{host_ip}");
            assert_eq!(reached(&container, &v4_gateway, None), from_v4, "{host_ip}");
            assert_eq!(reached(&container, &v6_gateway, None), from_v6, "{host_ip}");

            let other_port = publishing("", &[published(9000, host_ip, 18000)]);
            assert_eq!(reached(&other_port, &on_host(&[]), None), NOWHERE, "{host_ip}");
            assert_eq!(reached(&other_port, &v4_gateway, None), NO_ADDRESS, "{host_ip}");
        }
        let everywhere = publishing("", &[published(8000, "", 18000)]);
        assert_eq!(reached(&everywhere, &in_container("z 10.0.0.9"), None), NO_ADDRESS);
    }

    #[test]
    fn each_port_gets_its_best_binding() {
        let bindings = [("::", 18000), ("0.0.0.0", 18002), ("0.0.0.0", 18001)];
        let mut ports: Vec<Published> = bindings.map(|(host_ip, port)| published(8000, host_ip, port)).to_vec();
        ports.push(published(30000, "0.0.0.0", 13000));
        let container = publishing("", &ports);
        let targets = |ports| reach(&container, &on_host(&[]), None, ports).unwrap().targets;
        assert_eq!(targets(&[30000, 8000]), ["127.0.0.1:13000".parse().unwrap(), "127.0.0.1:18001".parse().unwrap()]);
        assert_eq!(targets(&[30001, 8000]), ["127.0.0.1:18001".parse().unwrap()]);
    }

    #[test]
    fn what_cannot_be_reached_says_what_to_change() {
        let networks = "b 10.1.0.2; a 10.0.0.2; dead";
        let proxy = in_container("z 10.9.0.9; y 10.8.0.9");
        let connect = "it has no network in common with this proxy: it is on a, b, the proxy is on y, z";
        let only_loopback = format!("{connect}; and its port 8000 is published on the loopback of the host only");
        let (loopback, everywhere) = (published(8000, "127.0.0.1", 8000), published(8000, "0.0.0.0", 8000));
        for (ports, expected) in [
            (&[][..], connect),
            (std::slice::from_ref(&loopback), &*only_loopback),
            (std::slice::from_ref(&everywhere), connect),
            (&[loopback.clone(), everywhere.clone()], connect),
        ] {
            assert_eq!(reached(&publishing(networks, ports), &proxy, None), expected, "{ports:?}");
        }
        let publish = not_published("a, b");
        assert_eq!(reached(&on(networks), &on_host(&[("10.5.0.0", 16)]), None), publish);
        assert_eq!(reached(&on("dead"), &on_host(&[]), None), NOWHERE);
        assert_eq!(reached(&on("dead"), &proxy, None), NO_ADDRESS);
    }

    #[test]
    fn messages_name_a_bounded_number_of_networks() {
        let many: String = (10..60).map(|i| format!("n{i} 10.0.0.{i};")).collect();
        let text = reached(&on(&many), &in_container(""), None);
        assert!(text.contains("n10, n11, n12, n13, n14, n15, n16, n17 and 42 more"), "{text}");
    }

    #[test]
    fn prefixes() {
        for (prefix, bits, address, expected) in [
            ("172.17.0.0", 16, "172.17.255.1", true),
            ("172.17.0.0", 16, "172.18.0.1", false),
            ("10.0.0.0", 8, "10.200.0.1", true),
            ("10.0.0.7", 32, "10.0.0.7", true),
            ("10.0.0.7", 32, "10.0.0.6", false),
            ("10.0.0.7", 255, "10.0.0.6", false),
            ("0.0.0.0", 0, "203.0.113.9", true),
            ("::", 0, "2001:db8::1", true),
            ("fd00:1::", 32, "fd00:1:2::3", true),
            ("fd00:1::", 32, "fd00:2::3", false),
            ("::", 0, "10.0.0.1", false),
        ] {
            assert_eq!(contains((ip(prefix), bits), ip(address)), expected, "{prefix}/{bits} {address}");
        }
    }

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        let known = ["0.0.0.0", "::", "127.0.0.1", "::1", "10.0.0.1", "10.1.0.2", "fd00::1", "fe80::1", "169.254.0.1"];
        prop::sample::select(known.map(ip).to_vec())
    }

    fn any_attachment() -> impl Strategy<Value = Attachment> {
        let name = prop::sample::select(vec!["a", "b", "llm_a", "bridge", "ingress", "host"]);
        let id = prop::sample::select(vec!["", "1", "2", "3"]);
        let addresses = prop::collection::vec(any_ip(), 0..4);
        (name, id, addresses, prop::option::of(any_ip()), -1i64..2).prop_map(
            |(name, id, addresses, gateway, priority)| Attachment {
                name: name.to_owned(),
                id: id.to_owned(),
                ipv4: v4_of(&addresses),
                ipv6: v6_of(&addresses),
                gateway,
                gw_priority: priority,
            },
        )
    }

    fn any_wiring() -> impl Strategy<Value = Wiring> {
        let mode = prop_oneof![
            6 => Just(NetworkMode::Networks),
            1 => Just(NetworkMode::Host),
            1 => Just(NetworkMode::None),
            1 => Just(NetworkMode::Container("0123".to_owned())),
        ];
        let published = (8000u16..8002, prop::option::of(any_ip()), 1u16..4)
            .prop_map(|(container_port, host_ip, host_port)| Published { container_port, host_ip, host_port });
        let attachments = prop::collection::vec(any_attachment(), 0..5);
        (mode, attachments, prop::collection::vec(published, 0..4)).prop_map(|(mode, attachments, published)| Wiring {
            mode,
            attachments,
            published,
            ..on("")
        })
    }

    fn any_vantage() -> impl Strategy<Value = Vantage> {
        let attachments = prop::collection::vec(any_attachment(), 0..4);
        let container =
            (attachments, any::<bool>(), prop::option::of(any_ip())).prop_map(|(attachments, host, gateway)| {
                Vantage::Container { attachments, host_network: host, host_gateway: gateway }
            });
        let on_link = prop::collection::vec((any_ip(), 0u8..=128), 0..4);
        prop_oneof![2 => container, 1 => on_link.prop_map(|on_link| Vantage::Host { on_link })]
    }

    fn any_wanted() -> impl Strategy<Value = Option<&'static str>> {
        prop::option::of(prop::sample::select(vec!["a", "b", "host", "ingress"]))
    }

    /// Another order of the same list.
    fn turn<T>(list: &mut [T], by: usize) {
        let by = by % list.len().max(1);
        list.reverse();
        list.rotate_left(by);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn the_order_of_lists_changes_nothing(
            wiring in any_wiring(),
            vantage in any_vantage(),
            wanted in any_wanted(),
            by in 0usize..8,
        ) {
            let (mut other_wiring, mut other_vantage) = (wiring.clone(), vantage.clone());
            turn(&mut other_wiring.attachments, by);
            turn(&mut other_wiring.published, by);
            match &mut other_vantage {
                Vantage::Container { attachments, .. } => turn(attachments, by),
                Vantage::Host { on_link } => turn(on_link, by),
            }
            let other = reach(&other_wiring, &other_vantage, wanted, &[8000, 8001]);
            prop_assert_eq!(reach(&wiring, &vantage, wanted, &[8000, 8001]), other);
        }

        #[test]
        fn what_is_reached_belongs_to_the_container(
            wiring in any_wiring(),
            vantage in any_vantage(),
            wanted in any_wanted(),
        ) {
            let Ok(Reach { targets, network }) = reach(&wiring, &vantage, wanted, &[8000, 8001]) else { return Ok(()) };
            prop_assert!((1..=2).contains(&targets.len()));
            prop_assert!(targets.iter().all(|target| !target.ip().is_unspecified() && target.port() != 0));
            let Some(network) = network else {
                // through the host: only a container of the host, or one for which no network was named
                prop_assert!(wanted.is_none() || wiring.mode == NetworkMode::Host);
                return Ok(());
            };
            let mut own = wiring.attachments.iter().filter(|a| (&a.name, &a.id) == (&network.name, &network.id));
            prop_assert!(own.any(|a| a.addresses().any(|ip| ip == targets[0].ip())));
            prop_assert_ne!(&network.name, INGRESS);
            let in_project = |wanted| network.name.strip_prefix("llm_") == Some(wanted);
            prop_assert!(wanted.is_none_or(|wanted| network.name == wanted || in_project(wanted)));
        }

        #[test]
        fn a_network_in_common_is_always_used(
            mut wiring in any_wiring(),
            shared in any_attachment(),
            own in prop::collection::vec(any_attachment(), 0..3),
        ) {
            let shared = Attachment { name: "a".to_owned(), ipv4: Some(Ipv4Addr::new(10, 0, 0, 2)), ..shared };
            wiring.mode = NetworkMode::Networks;
            wiring.attachments.push(shared.clone());
            let attachments = [own, vec![shared]].concat();
            let vantage = Vantage::Container { attachments, host_network: false, host_gateway: None };
            prop_assert!(reach(&wiring, &vantage, None, &[8000]).is_ok_and(|reached| reached.network.is_some()));
        }

        #[test]
        fn messages_are_short_and_in_the_house_style(
            wiring in any_wiring(),
            vantage in any_vantage(),
            wanted in any_wanted(),
        ) {
            let Err(unreachable) = reach(&wiring, &vantage, wanted, &[8000]) else { return Ok(()) };
            for text in [unreachable.to_string(), unreachable.advice("c")] {
                prop_assert!(text.len() < 400 && !text.ends_with('.') && !text.is_empty(), "{}", text);
                prop_assert!(text.starts_with(|c: char| c.is_ascii_lowercase()), "{}", text);
            }
        }
    }
}
