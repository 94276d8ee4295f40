//! The proxy's own pages: health, readiness, metrics, status.

pub mod live;
mod page;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use self::live::{Live, Watcher};
use crate::{
    base::phase::{Life, Phase},
    observe::{
        report::Reporter,
        status::{self, Ask, Status, text::Look},
    },
    telemetry::exposition::Exposition,
};

/// How long the registry gets to describe itself.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// What the pages are made from.
#[derive(Debug, Clone)]
pub struct Admin {
    /// How far the process has come.
    pub life: Life,
    /// The instruments.
    pub reporter: Reporter,
    /// The way to the registry.
    pub asks: mpsc::Sender<Ask>,
    /// The connections that watch the status.
    pub live: Live,
}

/// The methods that the pages take: the value of `Allow`.
pub const ALLOW: &str = "GET, HEAD";

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// Liveness: 200 while the process serves.
    Health,
    /// Readiness: 200 between the first complete scan and the beginning of shutdown.
    Ready,
    /// Prometheus text.
    Metrics,
    /// Status as JSON.
    Status,
    /// Status for a person with a browser.
    Overview,
}

impl Page {
    /// The page at `path`.
    pub fn of(path: &str) -> Option<Page> {
        // A slash behind it makes no difference.
        match path.strip_suffix('/').filter(|path| path.len() > 1).unwrap_or(path) {
            "/" => Some(Page::Overview),
            "/healthz" | "/health" => Some(Page::Health),
            "/readyz" => Some(Page::Ready),
            "/metrics" => Some(Page::Metrics),
            "/status" => Some(Page::Status),
            _ => None,
        }
    }

    /// What is asked with this method is answered with the page. Health checks may ask with `OPTIONS`: HAProxy's do, unless
    /// they are told otherwise.
    pub fn answers(self, method: &Method) -> bool {
        matches!(*method, Method::GET | Method::HEAD) || (*method == Method::OPTIONS && self.is_for_everybody())
    }

    /// Shown on the data port even where there is an admin port.
    pub fn is_for_everybody(self) -> bool {
        matches!(self, Page::Health | Page::Ready)
    }
}

impl Admin {
    /// Shows a page to a client that says it can take what the lines of `accept` list.
    pub async fn show(&self, page: Page, accept: &[&[u8]]) -> Response<Bytes> {
        match page {
            Page::Health => text(StatusCode::OK, "ok\n".to_owned()),
            Page::Ready => self.ready(),
            Page::Metrics => self.metrics(),
            Page::Status => self.status().await,
            Page::Overview if lists(accept, "text/html") => page::page(),
            Page::Overview => {
                let mut response = self.overview().await;
                response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
                response
            }
        }
    }

    /// A watcher, if this asks for the status as it changes; or why there cannot be one more.
    pub fn watch(&self, page: Page, method: &Method, accept: &[&[u8]]) -> Option<Result<Watcher, Response<Bytes>>> {
        if page != Page::Status || *method != Method::GET || !lists(accept, live::CONTENT_TYPE) {
            return None;
        }
        Some(self.live.watcher(self).ok_or_else(|| {
            let why =
                format!("shutting down, or {} watch already; GET /status works at any time\n", live::WATCHERS_MAX);
            let mut response = text(StatusCode::SERVICE_UNAVAILABLE, why);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("10"));
            response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
            response
        }))
    }

    /// 200 between the first complete scan and the beginning of shutdown.
    fn ready(&self) -> Response<Bytes> {
        match self.life.phase() {
            Phase::Starting => {
                let why = "waiting for the first complete scan and its probes; /status says what is missing\n";
                text(StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
            }
            Phase::Ready => text(StatusCode::OK, "ready\n".to_owned()),
            Phase::Settling | Phase::Draining | Phase::Over => {
                text(StatusCode::SERVICE_UNAVAILABLE, "shutting down\n".to_owned())
            }
        }
    }

    /// Prometheus text.
    fn metrics(&self) -> Response<Bytes> {
        let mut exposition = Exposition::default();
        self.reporter.tell(&mut exposition);
        let mut response = text(StatusCode::OK, exposition.finish());
        let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    /// Status as JSON.
    async fn status(&self) -> Response<Bytes> {
        match self.ask().await {
            Some(status) => match serde_json::to_vec(&status) {
                Ok(json) => {
                    let mut response = Response::new(Bytes::from(json));
                    let headers = response.headers_mut();
                    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
                    headers.insert(header::VARY, HeaderValue::from_static("accept"));
                    response
                }
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            None => text(StatusCode::SERVICE_UNAVAILABLE, "the registry does not answer\n".to_owned()),
        }
    }

    /// Status for a person with a browser.
    async fn overview(&self) -> Response<Bytes> {
        match self.ask().await {
            Some(status) => text(StatusCode::OK, status::text::render(&status, Look::default())),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "the registry does not answer\n".to_owned()),
        }
    }

    async fn ask(&self) -> Option<Status> {
        let (reply, answer) = oneshot::channel();
        let asking = async {
            self.asks.send(Ask::Status(reply)).await.ok()?;
            answer.await.ok()
        };
        let mut status = timeout(ASK_TIMEOUT, asking).await.ok().flatten()?;
        status.stopping = self.life.is_stopping();
        status.ready &= !status.stopping;
        Some(status)
    }
}

/// Whether `Accept`, whose lines are one list, names this media type. Parameters and the order of preference say nothing
/// here: a client that names it can take it, unless it is named to be refused (`q=0`, RFC 9110, 12.4.2).
fn lists(accept: &[&[u8]], media_type: &str) -> bool {
    let refuses = |parameter: &[u8]| match parameter {
        [b'q' | b'Q', b'=', b'0', digits @ ..] => digits.iter().all(|digit| matches!(digit, b'.' | b'0')),
        _ => false,
    };
    let is_it = |item: &[u8]| {
        let mut parts = item.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        let name = parts.next().unwrap_or_default();
        name.eq_ignore_ascii_case(media_type.as_bytes()) && !parts.any(refuses)
    };
    accept.iter().any(|line| line.split(|byte| *byte == b',').any(is_it))
}

fn text(status: StatusCode, text: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_accepted_is_named_and_not_refused() {
        for (accept, expected) in [
            (&["text/event-stream"][..], true),
            (&["*/*", "text/html, Text/Event-Stream;charset=utf-8 ; q=0.001"], true),
            (&["text/event-stream;q=0", "text/event-stream"], true),
            (&[], false),
            (&["*/*"], false),
            (&["text/event-stream;q=0"], false),
            (&["text/html,text/event-stream ; Q=0.000"], false),
        ] {
            let lines: Vec<&[u8]> = accept.iter().map(|line| line.as_bytes()).collect();
            assert_eq!(lists(&lines, live::CONTENT_TYPE), expected, "{accept:?}");
        }
    }
}
