//! Finds the way to containers of an engine on another machine: by the ports that this machine publishes at the engine's own
//! address, and by nothing else.
//!
//! The addresses of its networks, its loopback and its other interfaces mean nothing here, or something else: there may be
//! a bridge of the same prefix on this machine, with another container at the same address.

use std::net::{IpAddr, SocketAddr};

use crate::base::foreign::few;

use super::{
    NetworkMode, Published, Reach, Unreachable, WAYS_MAX, Wiring, is_on_loopback_only, standpoint::is_elsewhere,
};

/// Chooses the addresses of a container whose engine is on the machine with the addresses `engine`.
pub(super) fn reach(wiring: &Wiring, engine: &[IpAddr], ports: &[u16]) -> Result<Reach, Unreachable> {
    let (mut engine, port) = (engine.to_vec(), ports.first().copied().unwrap_or(super::DEFAULT_PORT));
    engine.retain(is_elsewhere);
    engine.sort();
    engine.dedup();
    let named = || few(&engine.iter().map(ToString::to_string).collect::<Vec<_>>());
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
    // All bindings of each port, because only a try shows which addresses of that machine can be reached from here.
    let mut targets: Vec<SocketAddr> = Vec::new();
    for port in ports {
        let bindings = wiring.published.iter().filter(|binding| binding.container_port == *port);
        let mut found: Vec<SocketAddr> = bindings.flat_map(|binding| addresses(&engine, binding)).collect();
        found.sort();
        found.dedup();
        targets.extend(found.into_iter().take(WAYS_MAX));
    }
    match targets.is_empty() {
        false => Ok(Reach::through_host(targets)),
        true if is_on_loopback_only(wiring, port) => Err(Unreachable::OnlyOnLoopbackThere { port, engine: named() }),
        true => Err(match published_on(wiring, port) {
            Some(there) => Unreachable::PublishedApartThere { port, there, engine: named() },
            None => Unreachable::NotPublishedThere { port, engine: named() },
        }),
    }
}

/// The addresses at which a binding is reached: only the engine's own. The engine's machine has the address of any other
/// binding, too, but seen from here it may belong to this machine or to one beside it.
fn addresses(engine: &[IpAddr], binding: &Published) -> Vec<SocketAddr> {
    let host_ip = binding.host_ip.map(|ip| ip.to_canonical());
    let is_bound = |ip: &&IpAddr| match host_ip {
        None => true,
        Some(any) if any.is_unspecified() => ip.is_ipv4() == any.is_ipv4(),
        Some(bound) => **ip == bound,
    };
    engine.iter().filter(is_bound).map(|ip| SocketAddr::new(*ip, binding.host_port)).collect()
}

/// The addresses that a port is published on, as a message names them; `None` without any.
fn published_on(wiring: &Wiring, port: u16) -> Option<String> {
    let bindings = wiring.published.iter().filter(|binding| binding.container_port == port);
    let mut addresses: Vec<IpAddr> = bindings.filter_map(|binding| Some(binding.host_ip?.to_canonical())).collect();
    addresses.sort();
    addresses.dedup();
    let named: Vec<String> = addresses.iter().take(WAYS_MAX).map(ToString::to_string).collect();
    (!named.is_empty()).then(|| named.join(", "))
}
