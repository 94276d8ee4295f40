//! The place of the proxy, and the address that leads from there to a network, to the host and to its ports.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Attachment, by_preference};

/// The place of the proxy in the network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Vantage {
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
    /// In a container of which the Engine does not tell the networks.
    Inside {
        /// Prefixes that are reached without a gateway, as address and length in bits: those of its networks.
        on_link: Vec<(IpAddr, u8)>,
        /// Its own addresses there.
        own: Vec<IpAddr>,
        /// The host's address as this container knows it.
        host_gateway: Option<IpAddr>,
    },
    /// In the network stack of the host, or of some other machine.
    Host {
        /// Prefixes that are reached without a gateway, as address and length in bits.
        on_link: Vec<(IpAddr, u8)>,
    },
    /// On another machine than the Engine.
    Elsewhere {
        /// Addresses of the Engine's machine, in any order.
        engine: Vec<IpAddr>,
    },
}

// === impl Vantage ===

impl Vantage {
    pub(super) fn is_on_host(&self) -> bool {
        match self {
            Vantage::Host { .. } => true,
            Vantage::Container { host_network, .. } => *host_network,
            Vantage::Inside { .. } | Vantage::Elsewhere { .. } => false,
        }
    }

    /// The container's address on this network, if it can be reached from here.
    pub(super) fn address_on(&self, network: &Attachment) -> Option<IpAddr> {
        let mut addresses = network.addresses();
        match self {
            Vantage::Host { on_link } | Vantage::Inside { on_link, .. } => {
                addresses.find(|ip| on_link.iter().any(|prefix| contains(*prefix, *ip)))
            }
            Vantage::Elsewhere { .. } => None,
            Vantage::Container { host_network: true, .. } => addresses.next(),
            Vantage::Container { attachments, .. } => {
                let is_shared = attachments.iter().any(|own| own.is_same_network(network));
                addresses.next().filter(|_| is_shared)
            }
        }
    }

    /// The host's address, for ports that are open on all addresses of the host.
    pub(super) fn host(&self) -> Option<IpAddr> {
        match self {
            Vantage::Container { attachments, host_network: false, host_gateway } => {
                let gateways = by_preference(attachments).into_iter().map(|own| own.gateway);
                [*host_gateway].into_iter().chain(gateways).flatten().find(is_elsewhere)
            }
            Vantage::Inside { host_gateway, .. } => host_gateway.filter(is_elsewhere),
            Vantage::Container { .. } | Vantage::Host { .. } => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            Vantage::Elsewhere { .. } => None,
        }
    }

    /// The address at which the proxy reaches a port that is published on `host_ip`.
    pub(super) fn published_address(&self, host_ip: Option<IpAddr>) -> Option<IpAddr> {
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
pub(super) fn is_elsewhere(ip: &IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !is_link_local && !ip.is_unspecified() && !ip.is_loopback()
}

/// Whether `ip` starts with the first bits of the prefix, as many as it counts.
pub(super) fn contains((prefix, bits): (IpAddr, u8), ip: IpAddr) -> bool {
    let bits = u32::from(bits);
    // Shift out the bits that are not compared. A shift by the full width is refused: no bit is compared, so all match.
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
