//! Chooses the address of a container that the proxy can reach.
//!
//! A container may sit on several networks, on none, in the host's or in another container's; a choice at random works
//! on one start and fails on the next. So the choice is a pure function of Docker's report and of the proxy's own place. It
//! does not depend on the order of either, and when nothing can be reached it advises the user what to change.
//!
//! This file refuses to know sockets, the Engine's API and DNS: any container on a network may claim a name there, and only
//! the Engine knows to which container an address belongs.

mod advice;
mod elsewhere;
mod standpoint;

use std::{
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use self::standpoint::is_elsewhere;
pub(crate) use self::{
    advice::{Names, Unreachable},
    standpoint::Vantage,
};

/// The port of an inference server whose labels and image name none.
pub(crate) const DEFAULT_PORT: u16 = 8000;

/// Swarm's own network for published ports; it is attached to containers but carries no traffic between them.
const INGRESS: &str = "ingress";
/// The network of a container with `network_mode: host`.
const HOST: &str = "host";
/// Most networks of a container, or addresses of another machine, that are tried.
const WAYS_MAX: usize = 4;
/// The networks of containers that ask for none, in Docker and in Podman.
const DEFAULT_NETWORKS: [&str; 2] = ["bridge", "podman"];

/// One network that a container is on, and its address there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Attachment {
    /// Name of the network.
    pub(crate) name: String,
    /// Id of the network; empty when the Engine does not tell.
    pub(crate) id: String,
    /// The container's IPv4 address.
    pub(crate) ipv4: Option<Ipv4Addr>,
    /// The container's global IPv6 address.
    pub(crate) ipv6: Option<Ipv6Addr>,
    /// The network's gateway, which on a bridge is the host.
    pub(crate) gateway: Option<IpAddr>,
    /// Docker's priority of this network as default route; higher comes first.
    pub(crate) gw_priority: i64,
}

/// The network stack that a container uses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum NetworkMode {
    /// Its own, on the networks it is attached to.
    Networks,
    /// The host's.
    Host,
    /// Its own, connected to nothing.
    None,
    /// That of the container with this id. The builder of the [`Wiring`] puts that container's mode and networks in
    /// place of these; the variant stays only when the other container cannot be used.
    Container(String),
}

/// A container's port that the host forwards.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Published {
    /// TCP port inside the container.
    pub(crate) container_port: u16,
    /// Address on the host; `None` or an unspecified address is all of them.
    pub(crate) host_ip: Option<IpAddr>,
    /// TCP port on the host.
    pub(crate) host_port: u16,
}

/// How a container is connected.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Wiring {
    /// The network stack that it uses.
    pub(crate) mode: NetworkMode,
    /// The networks it is on, in any order.
    pub(crate) attachments: Vec<Attachment>,
    /// The ports that the host forwards to it, in any order.
    pub(crate) published: Vec<Published>,
    /// Its compose project, whose name compose puts in front of the names of networks.
    pub(crate) compose_project: Option<String>,
}

/// The network that an address belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkRef {
    /// Its name.
    pub name: String,
    /// Its id; empty when the Engine does not tell.
    pub id: String,
}

/// The way to a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reach {
    /// The addresses to try, in this order, never none: the address on the best network with each port that could be the
    /// server's, then the same on the next network, because an address that should be reached may not be.
    pub targets: Vec<SocketAddr>,
    /// The network of the first target; `None` when the way goes through the host.
    pub network: Option<NetworkRef>,
    /// The networks of later targets, by the container's address there.
    pub others: Vec<(IpAddr, NetworkRef)>,
}

/// The ports that could be the server's, in the order to try: that of the label, else the only exposed TCP port and
/// then [`DEFAULT_PORT`] (images inherit EXPOSE lines of ports that are not in use), else [`DEFAULT_PORT`]. Never none.
pub(crate) fn port_candidates(label: Option<u16>, exposed_tcp: &[u16]) -> Vec<u16> {
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
///
/// Where the engine is on another machine `wanted_network` has no effect: no network of that machine leads here.
pub(crate) fn reach(
    wiring: &Wiring,
    vantage: &Vantage,
    wanted_network: Option<&str>,
    ports: &[u16],
) -> Result<Reach, Unreachable> {
    let Some(&first_port) = ports.first() else {
        return Err(Unreachable::NoPort);
    };
    if let Vantage::Elsewhere { engine } = vantage {
        return elsewhere::reach(wiring, engine, ports);
    }
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

/// The way over the network with the exact name, else with the name within the compose project.
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

/// The way over the networks that can be reached from the proxy. On a host, an address of a macvlan network looks as if it
/// could be reached, because it lies in the host's own network; so the next one is tried if the first does not answer.
fn on_near_network(wiring: &Wiring, vantage: &Vantage, ports: &[u16]) -> Option<Reach> {
    let attachments = by_preference(&wiring.attachments).into_iter();
    let mut ways = attachments.filter_map(|attachment| Some((attachment, vantage.address_on(attachment)?)));
    let (first, address) = ways.next()?;
    let mut reach = Reach::on(first, on_ports(address, ports));
    for (other, address) in ways.take(WAYS_MAX - 1) {
        if reach.targets.iter().all(|target| target.ip() != address) {
            reach.targets.extend(on_ports(address, ports));
            reach.others.push((address, NetworkRef { name: other.name.clone(), id: other.id.clone() }));
        }
    }
    Some(reach)
}

/// The way through the host: for each port its best binding there. A port without a binding is left out.
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
    let ours = match vantage {
        _ if vantage.is_on_host() && is_nowhere => return Unreachable::NowhereOnHost { port },
        _ if vantage.is_on_host() => return Unreachable::NotPublished { port, theirs },
        Vantage::Host { .. } | Vantage::Elsewhere { .. } => return Unreachable::NotPublished { port, theirs },
        Vantage::Container { attachments, .. } => Names::of(attachments),
        Vantage::Inside { on_link, .. } => {
            let mut prefixes: Vec<String> = on_link.iter().map(|(ip, bits)| format!("{ip}/{bits}")).collect();
            prefixes.sort();
            Names(prefixes)
        }
    };
    match () {
        () if is_nowhere => Unreachable::NoAddress { ours },
        () if is_on_loopback_only(wiring, port) => Unreachable::OnlyOnLoopback { port, theirs, ours },
        () => Unreachable::NothingShared { theirs, ours },
    }
}

fn is_on_loopback_only(wiring: &Wiring, port: u16) -> bool {
    let is_loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
    let mut bindings = wiring.published.iter().filter(|p| p.container_port == port).peekable();
    bindings.peek().is_some() && bindings.all(|p| p.host_ip.is_some_and(is_loopback))
}

// === impl Reach ===

impl Reach {
    fn on(attachment: &Attachment, targets: Vec<SocketAddr>) -> Reach {
        let (name, id) = (attachment.name.clone(), attachment.id.clone());
        let network = Some(NetworkRef { name, id });
        Reach { targets, network, others: Vec::new() }
    }

    fn through_host(targets: Vec<SocketAddr>) -> Reach {
        Reach { targets, network: None, others: Vec::new() }
    }

    /// The network that one of the targets is on; `None` when the way goes through the host.
    pub(crate) fn network_of(&self, target: IpAddr) -> Option<&NetworkRef> {
        let other = self.others.iter().find(|(address, _)| *address == target);
        other.map(|(_, network)| network).or(self.network.as_ref())
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

    /// Compares ids, because two networks may share a name; names where an id is missing.
    fn is_same_network(&self, other: &Attachment) -> bool {
        if self.id.is_empty() || other.id.is_empty() {
            return self.name == other.name;
        }
        self.id == other.id
    }
}

/// Sorts user-defined networks before the default one, then by priority, then by name. The rest of the key only makes
/// the order total, so that it cannot depend on the order of the input.
fn by_preference(attachments: &[Attachment]) -> Vec<&Attachment> {
    let mut sorted: Vec<&Attachment> = attachments.iter().collect();
    sorted.sort_by_key(|a| {
        let is_default = DEFAULT_NETWORKS.contains(&a.name.as_str());
        let rest = (&a.id, a.ipv4, a.ipv6, a.gateway);
        (is_default, Reverse(a.gw_priority), &a.name, rest)
    });
    sorted
}

#[cfg(test)]
mod tests;
