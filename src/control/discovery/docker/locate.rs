//! Finds out where the proxy stands, seen from the engine: in one of its containers, on its host, or on another machine.
//!
//! Every address depends on it. So what cannot be told now changes nothing that is known, and as long as nothing is known
//! no container is looked at.

use std::{io, net::IpAddr, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    Engine,
    inspect::{Context, Inspected},
    place,
};
use crate::control::discovery::{
    DiscoveryError,
    network::{NetworkMode, Vantage},
};

/// Time for resolving the name of the engine's machine.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an engine that fails is asked for the proxy's own container before that is given up, and the wait between.
const ASKED_MAX: usize = 3;
const ASK_AGAIN: Duration = Duration::from_millis(300);

/// `context` with the place of the proxy as it is now. `candidates` may be its own container.
///
/// # Errors
/// It cannot be told, and never could.
pub(super) async fn locate(
    engine: &Engine,
    context: Context,
    candidates: io::Result<Vec<String>>,
    now_nanos: i64,
) -> Result<Context, DiscoveryError> {
    let located = async {
        let candidates = candidates.map_err(|error| error.to_string())?;
        let own = find(engine, candidates, &context, now_nanos).await?;
        let vantage = vantage(engine, &context, own.as_ref()).await?;
        Ok((own, vantage))
    };
    match located.await {
        Ok((own, vantage)) => {
            let own_published = own.as_ref().map(|own| own.wiring.published.clone()).unwrap_or_default();
            let sharing = own.as_ref().filter(|own| own.network_owner().is_some());
            let shared = sharing.map_or(context.shared, |own| own.shared.clone());
            let self_id = own.map(|own| own.id);
            Ok(Context { vantage, self_id, own_published, shared, is_placed: true, ..context })
        }
        Err(error) if context.is_placed => {
            tracing::debug!(%error, "cannot tell where this proxy stands, keeping to what is known");
            Ok(context)
        }
        Err(error) => Err(cannot_tell(&error)),
    }
}

fn cannot_tell(error: &String) -> DiscoveryError {
    DiscoveryError {
        what: format!("cannot tell where this proxy stands: {error}"),
        advice: "it is tried again until it works".to_owned(),
    }
}

/// The container of this proxy, wired as the one whose network it shares.
async fn find(
    engine: &Engine,
    candidates: Vec<String>,
    context: &Context,
    now_nanos: i64,
) -> Result<Option<Inspected>, String> {
    let is_placed = context.is_placed;
    for candidate in candidates {
        let mut own = match ask(engine, &candidate, is_placed).await {
            Ok(Some(own)) => own,
            Ok(None) => continue,
            Err(error) if is_placed => return Err(error),
            Err(_) => continue,
        };
        if let Some(owner) = own.network_owner().map(str::to_owned) {
            let owner = match ask(engine, &owner, is_placed).await {
                Err(error) if is_placed => return Err(error),
                owner => owner.ok().flatten(),
            };
            own.share_network_of(owner.as_ref(), context.shared.as_ref(), now_nanos);
        }
        return Ok(Some(own));
    }
    Ok(None)
}

/// Asks once; more often at first, when a wrong answer would have the proxy in the wrong place.
async fn ask(engine: &Engine, id: &str, is_placed: bool) -> Result<Option<Inspected>, String> {
    let mut asked = 1;
    loop {
        match engine.inspect(id).await {
            Err(_) if !is_placed && asked < ASKED_MAX => sleep(ASK_AGAIN).await,
            answer => return answer.map_err(|error| error.to_string()),
        }
        asked += 1;
    }
}

async fn vantage(engine: &Engine, context: &Context, own: Option<&Inspected>) -> Result<Vantage, String> {
    match own {
        Some(own) if own.wiring.mode == NetworkMode::Host => Ok(Vantage::Host { on_link: on_link(context)? }),
        Some(own) => {
            let host_gateway = place::host_gateway().map_err(|error| error.to_string())?;
            Ok(Vantage::Container { attachments: own.wiring.attachments.clone(), host_network: false, host_gateway })
        }
        None => match elsewhere(&engine.host).await? {
            Some(engine) => Ok(Vantage::Elsewhere { engine }),
            None => Ok(Vantage::Host { on_link: on_link(context)? }),
        },
    }
}

/// The prefixes that are on link; as they were, if they cannot be read.
fn on_link(context: &Context) -> Result<Vec<(IpAddr, u8)>, String> {
    match (place::on_link_prefixes(), &context.vantage) {
        (Ok(on_link), _) => Ok(on_link),
        (Err(_), Vantage::Host { on_link }) if context.is_placed => Ok(on_link.clone()),
        // Systems without such a file never have it.
        (Err(error), _) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(Vec::new())
        }
        (Err(error), _) => Err(error.to_string()),
    }
}

/// The addresses of the engine's machine, if that is another one than this.
async fn elsewhere(host: &str) -> Result<Option<Vec<IpAddr>>, String> {
    let Some(name) = host_name(host) else { return Ok(None) };
    let addresses: Vec<IpAddr> = match name.parse() {
        Ok(ip) => vec![ip],
        Err(_) => match timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((name, 0))).await {
            Ok(Ok(found)) => found.map(|addr| addr.ip()).collect(),
            Ok(Err(error)) => return Err(format!("{name} cannot be resolved: {error}")),
            Err(_) => return Err(format!("{name} is not resolved within {RESOLVE_TIMEOUT:?}")),
        },
    };
    if addresses.is_empty() {
        return Err(format!("{name} has no address"));
    }
    let mut engine: Vec<IpAddr> = addresses.into_iter().map(|ip| ip.to_canonical()).collect();
    engine.sort();
    engine.dedup();
    for ip in &engine {
        if place::is_here(*ip).map_err(|error| error.to_string())? {
            return Ok(None);
        }
    }
    Ok(Some(engine))
}

/// The name or address in a `DOCKER_HOST`; `None` for a socket, or for none, which is this machine.
fn host_name(host: &str) -> Option<&str> {
    let (scheme, rest) = host.split_once("://").unwrap_or(("tcp", host));
    if !matches!(scheme, "tcp" | "http" | "https") {
        return None;
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    let name = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None if authority.parse::<IpAddr>().is_ok() => authority,
        None => authority.split(':').next().unwrap_or_default(),
    };
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_engines() {
        for (host, name) in [
            ("unix:///var/run/docker.sock", None),
            ("tcp://203.0.113.5:2375", Some("203.0.113.5")),
            ("tcp://203.0.113.5", Some("203.0.113.5")),
            ("http://docker.example:2375/", Some("docker.example")),
            ("https://docker.example", Some("docker.example")),
            ("tcp://[2001:db8::5]:2376", Some("2001:db8::5")),
            ("tcp://2001:db8::5", Some("2001:db8::5")),
            ("tcp://:2375", None),
        ] {
            assert_eq!(host_name(host), name, "{host}");
        }
    }

    #[tokio::test]
    async fn an_engine_is_elsewhere_unless_its_address_is_here() {
        for here in [
            "unix:///var/run/docker.sock",
            "tcp://127.0.0.1:2375",
            "tcp://127.8.8.8:2375",
            "tcp://localhost:2375",
            "tcp://[::1]:2375",
            "tcp://[::ffff:127.0.0.1]:2375",
            "tcp://0.0.0.0:2375",
        ] {
            assert_eq!(elsewhere(here).await, Ok(None), "{here}");
        }
        for (host, ip) in [
            ("tcp://203.0.113.5:2375", "203.0.113.5"),
            ("https://203.0.113.5", "203.0.113.5"),
            ("tcp://[2001:db8::5]:2375", "2001:db8::5"),
            ("tcp://[::ffff:203.0.113.5]:2375", "203.0.113.5"),
        ] {
            assert_eq!(elsewhere(host).await, Ok(Some(vec![ip.parse().unwrap()])), "{host}");
        }
        // What cannot be resolved now may be anywhere.
        assert!(elsewhere("tcp://no-such-host.invalid:2375").await.is_err());
    }
}
