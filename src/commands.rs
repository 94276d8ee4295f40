//! The subcommands that ask a running proxy.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{StatusCode, Uri};

use crate::{config::Config, fetch::Fetch, status::Status};

const TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Asks `url`, or `/healthz` of the proxy that this environment describes.
///
/// # Errors
/// It does not answer with 2xx; the text says what it does instead.
pub async fn healthcheck(config: &Config, url: Option<&str>) -> Result<(), String> {
    let url = match url {
        Some(url) => url.to_owned(),
        None => format!("http://{}/healthz", own_addr(config, config.port)),
    };
    let (status, _) = get(&url).await?;
    if status.is_success() { Ok(()) } else { Err(format!("{url} answered {status}")) }
}

/// Asks the proxy at `url`, or the one that this environment describes, for its status; as text for people, or as JSON.
///
/// # Errors
/// It cannot be asked, or answers with something else; the text says so.
pub async fn status(config: &Config, url: Option<&str>, json: bool) -> Result<String, String> {
    let url = match url {
        Some(url) => format!("{}/status", url.trim_end_matches('/').trim_end_matches("/status")),
        None => format!("http://{}/status", own_addr(config, config.admin_port.unwrap_or(config.port))),
    };
    let (status, body) = get(&url).await?;
    if status != StatusCode::OK {
        return Err(format!("{url} answered {status}: {}", String::from_utf8_lossy(&body).trim()));
    }
    if json {
        return Ok(String::from_utf8_lossy(&body).into_owned());
    }
    let status: Status = serde_json::from_slice(&body)
        .map_err(|error| format!("{url} does not answer like an inference-proxy: {error}"))?;
    Ok(status.to_string())
}

fn own_addr(config: &Config, port: u16) -> SocketAddr {
    let ip = config.bind.filter(|ip| !ip.is_unspecified()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    SocketAddr::new(ip, port)
}

async fn get(url: &str) -> Result<(StatusCode, Bytes), String> {
    let uri: Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("{url:?}: expected a URL that begins with http://"));
    }
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(80);
    let resolved =
        tokio::net::lookup_host((host, port)).await.map_err(|error| format!("cannot resolve {host:?}: {error}"))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut last = format!("{host:?} has no address");
    for addr in resolved {
        let fetch = Fetch { addr, path, connect_timeout: TIMEOUT, timeout: TIMEOUT, max_bytes: ANSWER_BYTES_MAX };
        match fetch.get().await {
            Ok(answer) => return Ok(answer),
            Err(error) => last = format!("{url}: {error}"),
        }
    }
    Err(last)
}
