//! Finds out where the proxy stands, seen from the engine: in one of its containers, on its host, or on another machine.
//!
//! Every address depends on it. So what cannot be told now changes nothing that is known, and as long as nothing is known
//! no container is looked at.

use std::{io, net::IpAddr, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    Engine, host,
    inspect::{Context, Inspected},
    place::{self, Standing},
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
/// How long all of that may take; the list of containers waits for it.
const FIND_PATIENCE: Duration = Duration::from_secs(5);
/// Addresses of one name that are looked at.
const ADDRESSES_MAX: usize = 64;

/// What an engine says of the container that this process is in.
enum Own {
    Found(Box<Inspected>),
    /// It has no such container.
    None,
    /// It does not tell, for this reason.
    Untold(String),
}

/// `context` with the place of the proxy as it is now. `standing` is what this machine tells of it.
///
/// An engine that does not tell about the proxy's own container, though there is one, is no reason to wait for ever: a
/// proxy before it may forbid that. Until it tells, what can be reached is judged by this process's own addresses.
///
/// # Errors
/// It cannot be told, and never could.
pub(super) async fn locate(
    engine: &Engine,
    context: Context,
    standing: io::Result<Standing>,
    now_nanos: i64,
) -> Result<Context, DiscoveryError> {
    let located = async {
        let standing = standing.map_err(|error| error.to_string())?;
        let is_known = context.is_placed && context.untold.is_none();
        let find = find(engine, &standing.candidates, &context, now_nanos);
        let own = timeout(FIND_PATIENCE, find).await;
        let own = own.unwrap_or_else(|_| Own::Untold(format!("no answer within {FIND_PATIENCE:?}")));
        if let (Own::Untold(error), true) = (&own, is_known) {
            return Err(error.clone());
        }
        let vantage = vantage(engine, &context, &standing, &own).await?;
        Ok((own, vantage))
    };
    match located.await {
        Ok((own, vantage)) => {
            let context = Context { vantage, self_id: None, own_published: Vec::new(), is_placed: true, ..context };
            Ok(match own {
                Own::Found(own) => {
                    let shared = own.network_owner().is_some().then(|| own.shared.clone());
                    let shared = shared.unwrap_or(context.shared);
                    let (self_id, own_published) = (Some(own.id), own.wiring.published);
                    Context { self_id, own_published, shared, untold: None, ..context }
                }
                Own::None => Context { untold: None, ..context },
                Own::Untold(why) => Context { untold: Some(why), ..context },
            })
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
async fn find(engine: &Engine, candidates: &[String], context: &Context, now_nanos: i64) -> Own {
    let asked_max = if context.is_placed { 1 } else { ASKED_MAX };
    let mut untold = None;
    for candidate in candidates {
        let mut own = match ask(engine, candidate, asked_max).await {
            Ok(Some(own)) => own,
            Ok(None) => continue,
            Err(error) => {
                untold.get_or_insert(error);
                continue;
            }
        };
        if let Some(owner) = own.network_owner().map(str::to_owned) {
            let owner = match ask(engine, &owner, asked_max).await {
                Err(error) => return Own::Untold(error),
                Ok(owner) => owner,
            };
            own.share_network_of(owner.as_ref(), context.shared.as_ref(), now_nanos);
        }
        return Own::Found(Box::new(own));
    }
    untold.map_or(Own::None, Own::Untold)
}

/// Asks so often, if the engine fails.
async fn ask(engine: &Engine, id: &str, asked_max: usize) -> Result<Option<Inspected>, String> {
    let mut asked = 1;
    loop {
        match engine.inspect(id).await {
            Err(_) if asked < asked_max => sleep(ASK_AGAIN).await,
            answer => return answer,
        }
        asked += 1;
    }
}

async fn vantage(engine: &Engine, context: &Context, standing: &Standing, own: &Own) -> Result<Vantage, String> {
    let gateway = || place::host_gateway().map_err(|error| error.to_string());
    let is_untold = match own {
        Own::Found(own) if own.wiring.mode == NetworkMode::Host => {
            return Ok(Vantage::Host { on_link: on_link(context)? });
        }
        Own::Found(own) => {
            let attachments = own.wiring.attachments.clone();
            return Ok(Vantage::Container { attachments, host_network: false, host_gateway: gateway()? });
        }
        Own::Untold(_) => true,
        Own::None => false,
    };
    if let Some(engine) = elsewhere(&engine.host, is_untold || standing.candidates.is_empty()).await? {
        return Ok(Vantage::Elsewhere { engine });
    }
    let on_link = on_link(context)?;
    Ok(match is_untold && standing.is_inside {
        true => Vantage::Inside { own: place::own_addresses(&on_link), on_link, host_gateway: gateway()? },
        false => Vantage::Host { on_link },
    })
}

/// The prefixes that are on link; as they were, if they cannot be read.
fn on_link(context: &Context) -> Result<Vec<(IpAddr, u8)>, String> {
    match (place::on_link_prefixes(), &context.vantage) {
        (Ok(on_link), _) => Ok(on_link),
        (Err(_), Vantage::Host { on_link } | Vantage::Inside { on_link, .. }) if context.is_placed => {
            Ok(on_link.clone())
        }
        // Systems without such a file never have it.
        (Err(error), _) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(Vec::new())
        }
        (Err(error), _) => Err(error.to_string()),
    }
}

/// The addresses of the engine's machine, if that is another one than this. `is_nameless`: this process may be in a
/// container of the engine that it does not know.
async fn elsewhere(host: &str, is_nameless: bool) -> Result<Option<Vec<IpAddr>>, String> {
    let Some((name, _)) = host::machine(host) else { return Ok(None) };
    let addresses: Vec<IpAddr> = match name.parse() {
        Ok(ip) => vec![ip],
        Err(_) => match timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((name, 0))).await {
            Ok(Ok(found)) => found.map(|addr| addr.ip()).take(ADDRESSES_MAX).collect(),
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
        if place::is_here(*ip, is_nameless).map_err(|error| error.to_string())? {
            return Ok(None);
        }
    }
    Ok(Some(engine))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(elsewhere(here, false).await, Ok(None), "{here}");
        }
        for (host, ip) in [
            ("tcp://203.0.113.5:2375", "203.0.113.5"),
            ("https://203.0.113.5", "203.0.113.5"),
            ("tcp://[2001:db8::5]:2375", "2001:db8::5"),
            ("tcp://[::ffff:203.0.113.5]:2375", "203.0.113.5"),
        ] {
            assert_eq!(elsewhere(host, false).await, Ok(Some(vec![ip.parse().unwrap()])), "{host}");
        }
        // What cannot be resolved now may be anywhere.
        assert!(elsewhere("tcp://no-such-host.invalid:2375", false).await.is_err());
    }
}
