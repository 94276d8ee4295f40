//! Reasons for which a container cannot be a backend, in words for clients and for people, with advice. Pure.

use std::fmt;

use crate::control::discovery::Obstacle;

/// Why a model has no ready replica once the containers that served it have ended.
pub(crate) const GONE: &str = "its container has gone";

/// Why a container that exists cannot be a backend now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// Its health check has had no verdict yet.
    HealthStarting,
    /// Its health check fails.
    HealthFailing,
    /// Its health check fails, and has not passed since the container was started.
    HealthNeverPassed,
    /// It has no health check, and the proxy requires one.
    NoHealthCheck,
    /// Its processes are paused.
    Paused,
    /// Its process has ended, and the engine is about to start it again.
    Restarting,
    /// The proxy knows no address that leads to it.
    Unreachable(Obstacle),
    /// It has lost the network over which the proxy reached it.
    Detached,
    /// It was ready and runs, but refuses connections.
    NotAnswering,
    /// It must not be routed, however healthy it is.
    Excluded(Obstacle),
}

impl Unfit {
    /// A few words for the message to a client, without names or addresses.
    pub(crate) fn summary(&self) -> &'static str {
        match self {
            Unfit::HealthStarting => "it is starting",
            Unfit::HealthFailing | Unfit::HealthNeverPassed => "it is unhealthy",
            Unfit::Paused => "it is paused",
            Unfit::Restarting => "it is restarting",
            Unfit::NotAnswering => "it does not answer",
            Unfit::Unreachable(_) | Unfit::Detached => "it cannot be reached",
            Unfit::NoHealthCheck | Unfit::Excluded(_) => "it is not routed",
        }
    }

    /// Advice for the user, with commands that can be typed as they stand: `container` is the name of the container.
    pub(crate) fn advice(&self, container: &str) -> String {
        match self {
            Unfit::HealthStarting => format!(
                "wait while it loads; if that takes too long, see what its check says: \
                 docker inspect -f '{{{{json .State.Health}}}}' {container}"
            ),
            Unfit::HealthFailing | Unfit::HealthNeverPassed => format!(
                "see what its check says: docker inspect -f '{{{{json .State.Health}}}}' {container} \
                 (a common cause: the check calls curl, and the image has none)"
            ),
            Unfit::NoHealthCheck => "add a HEALTHCHECK (healthcheck: in Compose), \
                 or set PROXY_REQUIRE_HEALTHCHECK=false on the proxy, which then probes it by itself"
                .to_owned(),
            Unfit::Paused => format!("bring it back: docker unpause {container}"),
            Unfit::Restarting => format!("see why it ended: docker logs {container}"),
            Unfit::Detached => format!("connect it again: docker network connect NETWORK {container}"),
            Unfit::NotAnswering => format!("see what it is doing: docker logs {container}"),
            Unfit::Unreachable(obstacle) | Unfit::Excluded(obstacle) => obstacle.advice.clone(),
        }
    }
}

impl fmt::Display for Unfit {
    /// Writes the reason for people, without advice.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unfit::HealthStarting => "Docker still calls it starting: its health check has not passed yet",
            Unfit::HealthFailing => "Docker calls it unhealthy: its health check fails",
            Unfit::HealthNeverPassed => {
                "Docker calls it unhealthy: its health check has not passed since it was started"
            }
            Unfit::NoHealthCheck => "it has no HEALTHCHECK, and PROXY_REQUIRE_HEALTHCHECK=true demands one",
            Unfit::Paused => "it is paused",
            Unfit::Restarting => "its process has ended, and Docker is about to restart it",
            Unfit::Detached => "it was disconnected from the network in use",
            Unfit::NotAnswering => "it runs, but refuses connections",
            Unfit::Unreachable(obstacle) | Unfit::Excluded(obstacle) => &obstacle.what,
        })
    }
}
