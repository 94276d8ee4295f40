//! The subcommands that ask a running proxy.

use std::{
    io::{ErrorKind, IsTerminal as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{StatusCode, Uri};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};

use crate::{
    base::{
        config::{self, Config},
        fetch::Fetch,
    },
    observe::status::{
        Status,
        text::{self, Form, Look, Screen},
    },
};

/// How often the status is shown anew while it is watched.
const EVERY: Duration = Duration::from_secs(1);
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
    let (status, _) = get(&url, &parsed(&url)?).await?;
    if status.is_success() { Ok(()) } else { Err(format!("{url} answered {status}")) }
}

/// The terminal that is printed to, if it is one that tells its size. Serial lines and the like do not.
pub fn screen() -> Option<Screen> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    let (columns, rows) = (usize::from(size.ws_col), usize::from(size.ws_row));
    (columns > 0 && rows > 0).then_some(Screen { columns, rows })
}

/// Asks the proxy at `url`, or the one that this environment describes, for its status, and prints it. `look` says how,
/// each time it is printed.
///
/// # Errors
/// It cannot be asked, or answers with something else; the text says so, and what to do.
pub async fn status(config: &Config, url: Option<&str>, form: Form, look: impl Fn() -> Look) -> Result<(), String> {
    let url = match url {
        Some(url) => format!("{}/status", url.trim_end_matches('/').trim_end_matches("/status").trim_end_matches('/')),
        None => format!("http://{}/status", own_addr(config, config.admin_port.unwrap_or(config.port))),
    };
    let uri = parsed(&url)?;
    match form {
        Form::Json => {
            let body = ask(&url, &uri).await?;
            let _: Status = read(&url, &body)?;
            print(&format!("{}\n", String::from_utf8_lossy(&body)))?;
        }
        Form::Table => {
            let status = read(&url, &ask(&url, &uri).await?)?;
            print(&text::render(&status, look()))?;
        }
        Form::Watch => watch(&url, &uri, look).await?,
    }
    Ok(())
}

/// Whether the reader of the output wants more of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    There,
    /// It has seen enough (`| head`): that is no error.
    Gone,
}

/// Shows it again and again, until Ctrl-C. A proxy that does not answer is shown, too: it may be back in a moment.
async fn watch(url: &str, uri: &Uri, look: impl Fn() -> Look) -> Result<(), String> {
    let wait_for = |kind| signal(kind).map_err(|error| format!("cannot wait for Ctrl-C: {error}"));
    let mut interrupt = wait_for(SignalKind::interrupt())?;
    // A terminal whose window is closed says so with the latter.
    let (mut terminate, mut hangup) = (wait_for(SignalKind::terminate())?, wait_for(SignalKind::hangup())?);
    let is_terminal = std::io::stdout().is_terminal();
    let showing = async {
        loop {
            let status = ask(url, uri).await.and_then(|body| read(url, &body));
            // Its size may be another one by now.
            let look = look();
            let shown = match status {
                Ok(status) => text::render(&status, look),
                Err(error) => format!("inference-proxy: {error}\n"),
            };
            let shown = if is_terminal { text::frame(&shown, look.screen) } else { format!("{shown}\n") };
            if print(&shown)? == Reader::Gone {
                return Ok(());
            }
            sleep(EVERY).await;
        }
    };
    if is_terminal {
        // A screen of its own; what was there before comes back at the end.
        print("\x1b[?1049h\x1b[?25l")?;
    }
    let ended = tokio::select! {
        ended = showing => ended,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = hangup.recv() => Ok(()),
    };
    if is_terminal {
        // A terminal that is no more has nothing to be restored.
        let _ = print("\x1b[?25h\x1b[?1049l");
    }
    ended
}

fn print(text: &str) -> Result<Reader, String> {
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(format!("cannot print: {error}")),
    }
}

async fn ask(url: &str, uri: &Uri) -> Result<Bytes, String> {
    let answer = get(url, uri).await.map_err(|error| {
        let ports = "--url, else PROXY_ADMIN_PORT, else PROXY_PORT";
        format!("{error}; is the proxy running, and is this its port? ({ports})")
    });
    match answer? {
        (StatusCode::OK, body) => Ok(body),
        (StatusCode::NOT_FOUND, _) => Err(format!(
            "{url} answered 404: either this is no inference-proxy, or its status is on its PROXY_ADMIN_PORT \
             (--url http://HOST:PORT)"
        )),
        (status, body) => {
            let body: String =
                String::from_utf8_lossy(&body).trim().chars().filter(|c| !c.is_control()).take(200).collect();
            Err(format!("{url} answered {status}: {body}"))
        }
    }
}

fn read(url: &str, body: &[u8]) -> Result<Status, String> {
    serde_json::from_slice(body).map_err(|_| {
        format!(
            "{url} does not answer like an inference-proxy of this version ({}): is this its port?",
            env!("CARGO_PKG_VERSION")
        )
    })
}

fn own_addr(config: &Config, port: u16) -> SocketAddr {
    let ip = config.bind.filter(|ip| !ip.is_unspecified()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    SocketAddr::new(ip, port)
}

fn parsed(url: &str) -> Result<Uri, String> {
    config::parse_url(url, &["http://"]).map_err(|error| format!("{url:?}: {error}"))
}

async fn get(url: &str, uri: &Uri) -> Result<(StatusCode, Bytes), String> {
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
