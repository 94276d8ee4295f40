//! The reasons for which a container cannot be reached, with advice for people.

use std::fmt;

use super::{Attachment, DEFAULT_NETWORKS, INGRESS};
use crate::base::foreign;

/// How many networks a message names.
const MAX_SHOWN_NAMES: usize = 8;

/// Longest name of a network in a message.
const NAME_CHARS_MAX: usize = 64;

/// Names of networks as a message shows them: sorted, and not too many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names(pub(super) Vec<String>);

/// The reason for which a container cannot be reached; [`Unreachable::advice`] helps the user to change it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreachable {
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
    /// The engine is on another machine, which publishes nothing of it.
    #[error("the Docker Engine is on another machine ({engine}), and its port {port} is not published there")]
    NotPublishedThere {
        /// The container's port.
        port: u16,
        /// The addresses of that machine.
        engine: String,
    },
    /// The engine is on another machine, which publishes it for itself only.
    #[error(
        "the Docker Engine is on another machine ({engine}), and its port {port} is published on the loopback of that \
         machine only"
    )]
    OnlyOnLoopbackThere {
        /// The container's port.
        port: u16,
        /// The addresses of that machine.
        engine: String,
    },
    /// The engine is on another machine, which publishes it on addresses that are not the engine's.
    #[error(
        "the Docker Engine is on another machine ({engine}), and its port {port} is published there on {there} only, \
         which may be another machine's as seen from here"
    )]
    PublishedApartThere {
        /// The container's port.
        port: u16,
        /// The addresses it is published on.
        there: String,
        /// The addresses of that machine.
        engine: String,
    },
    /// There is no port to try.
    #[error("it has no port to try")]
    NoPort,
}

// === impl Unreachable ===

impl Unreachable {
    /// Advice for the user, with commands that can be typed as they stand; `container` is the name of the container.
    pub(crate) fn advice(&self, container: &str) -> String {
        // A label may hold any text, and users paste the command into a shell.
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
            Unreachable::NotPublishedThere { port, .. } | Unreachable::OnlyOnLoopbackThere { port, .. } => format!(
                "publish the port on that machine's address (-p {port}:{port}), or run the proxy on that machine"
            ),
            Unreachable::PublishedApartThere { port, engine, .. } => format!(
                "publish the port on all addresses of that machine (-p {port}:{port}) or on the engine's ({engine}), or \
                 set DOCKER_HOST to the address that it is published on"
            ),
            Unreachable::NoPort => "set inference.port".to_owned(),
        }
    }
}

// === impl Names ===

impl Names {
    /// The name for an example: that of a network that a user has made, if there is one.
    fn preferred(&self) -> Option<&str> {
        let is_made = |name: &&String| !DEFAULT_NETWORKS.contains(&name.as_str());
        self.0.iter().find(is_made).or(self.0.first()).map(String::as_str)
    }

    pub(super) fn of<'a>(attachments: impl IntoIterator<Item = &'a Attachment>) -> Names {
        let usable = attachments.into_iter().filter(|a| a.name != INGRESS);
        let mut names: Vec<String> = usable.map(|a| foreign::name(&a.name, NAME_CHARS_MAX)).collect();
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
