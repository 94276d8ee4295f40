//! How to reach the containers of an engine on another machine: by what that machine publishes, and by nothing else.
//!
//! The addresses of its networks and its loopback mean nothing here, or something else: there may be a bridge of the same
//! prefix on this machine, with another container at the same address.

use std::net::{IpAddr, SocketAddr};

use super::{
    NetworkMode, Published, Reach, Unreachable, WAYS_MAX, Wiring, is_on_loopback_only,
    standpoint::{contains, is_elsewhere},
};

/// Chooses the addresses of a container whose engine is on the machine with the addresses `engine`.
pub(super) fn reach(
    wiring: &Wiring,
    engine: &[IpAddr],
    on_link: &[(IpAddr, u8)],
    ports: &[u16],
) -> Result<Reach, Unreachable> {
    let (mut engine, port) = (engine.to_vec(), ports.first().copied().unwrap_or(super::DEFAULT_PORT));
    engine.retain(is_elsewhere);
    engine.sort();
    engine.dedup();
    let named = || engine.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match &wiring.mode {
        NetworkMode::Container(owner) => return Err(Unreachable::NamespaceGone { owner: owner.clone() }),
        NetworkMode::None => return Err(Unreachable::NoNetwork),
        NetworkMode::Host if engine.is_empty() => return Err(Unreachable::NoWayToHost),
        NetworkMode::Host => {
            let on_ports = |ip: &IpAddr| ports.iter().map(|port| SocketAddr::new(*ip, *port)).collect::<Vec<_>>();
            let targets = engine.iter().take(WAYS_MAX).flat_map(on_ports).collect();
            return Ok(Reach::through_host(targets));
        }
        NetworkMode::Networks => {}
    }
    let machine = Machine { engine: &engine, on_link, wiring };
    // For each port all bindings: which of that machine's addresses can be reached from here, only trying tells.
    let mut targets: Vec<SocketAddr> = Vec::new();
    for port in ports {
        let bindings = wiring.published.iter().filter(|binding| binding.container_port == *port);
        let mut found: Vec<(bool, SocketAddr)> = bindings.flat_map(|binding| machine.addresses(binding)).collect();
        found.sort();
        found.dedup();
        targets.extend(found.into_iter().map(|(_, target)| target).take(WAYS_MAX));
    }
    match targets.is_empty() {
        false => Ok(Reach::through_host(targets)),
        true if is_on_loopback_only(wiring, port) => Err(Unreachable::OnlyOnLoopbackThere { port, engine: named() }),
        true => Err(Unreachable::NotPublishedThere { port, engine: named() }),
    }
}

/// The other machine, as far as one of its containers tells.
struct Machine<'a> {
    engine: &'a [IpAddr],
    on_link: &'a [(IpAddr, u8)],
    wiring: &'a Wiring,
}

impl Machine<'_> {
    /// Where a binding is reached; those at the engine's own address, which is known to be reached, sort first.
    fn addresses(&self, binding: &Published) -> Vec<(bool, SocketAddr)> {
        let at = |ip: IpAddr| (!self.engine.contains(&ip), SocketAddr::new(ip, binding.host_port));
        match binding.host_ip.map(|ip| ip.to_canonical()) {
            None => self.engine.iter().copied().map(at).collect(),
            Some(any) if any.is_unspecified() => {
                self.engine.iter().copied().filter(|ip| ip.is_ipv4() == any.is_ipv4()).map(at).collect()
            }
            Some(ip) => Some(at(ip)).filter(|_| self.is_its_own(ip)).into_iter().collect(),
        }
    }

    /// Whether an address is certain to be that machine's: the gateway of one of its bridges may be one of this machine's,
    /// and so may be whatever is reached from here without a gateway.
    fn is_its_own(&self, ip: IpAddr) -> bool {
        let is_gateway = |ip: IpAddr| self.wiring.attachments.iter().any(|network| network.gateway == Some(ip));
        let is_near = |ip: IpAddr| self.on_link.iter().any(|prefix| contains(*prefix, ip));
        self.engine.contains(&ip) || is_elsewhere(&ip) && !is_gateway(ip) && !is_near(ip)
    }
}
