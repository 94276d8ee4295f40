//! The proxy's own pages: health, readiness, metrics, status.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    scan::Finish,
    status::{Ask, Status},
    table::TableReader,
    telemetry::metrics::{Exposition, Metrics, ModelMetrics},
};

/// How long the registry gets to describe itself.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// What the pages are made from.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The first scan and its probes are done.
    pub ready: Arc<AtomicBool>,
    /// The proxy is shutting down.
    pub stopping: Arc<AtomicBool>,
    /// What is live.
    pub table: TableReader,
    /// Instruments that belong to no model.
    pub metrics: Arc<Metrics>,
    /// The way to the registry.
    pub asks: mpsc::Sender<Ask>,
}

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
        match path {
            "/" => Some(Page::Overview),
            "/healthz" | "/health" => Some(Page::Health),
            "/readyz" => Some(Page::Ready),
            "/metrics" => Some(Page::Metrics),
            "/status" => Some(Page::Status),
            _ => None,
        }
    }

    /// Shown on the data port even where there is an admin port.
    pub fn is_for_everybody(self) -> bool {
        matches!(self, Page::Health | Page::Ready)
    }
}

impl Admin {
    /// Shows a page.
    pub async fn show(&self, page: Page) -> Response<Bytes> {
        match page {
            Page::Health => text(StatusCode::OK, "ok\n".to_owned()),
            Page::Ready => self.ready(),
            Page::Metrics => self.metrics(),
            Page::Status => self.status().await,
            Page::Overview => self.overview().await,
        }
    }

    /// Serves a request on the admin port.
    pub async fn handle<B>(&self, request: &Request<B>) -> Response<Bytes> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET here\n".to_owned());
        }
        match Page::of(request.uri().path()) {
            Some(page) => self.show(page).await,
            None => text(StatusCode::NOT_FOUND, "here are /, /status, /metrics, /healthz and /readyz\n".to_owned()),
        }
    }

    /// 200 between the first complete scan and the beginning of shutdown.
    fn ready(&self) -> Response<Bytes> {
        if self.stopping.load(Ordering::Acquire) {
            text(StatusCode::SERVICE_UNAVAILABLE, "shutting down\n".to_owned())
        } else if self.ready.load(Ordering::Acquire) {
            text(StatusCode::OK, "ready\n".to_owned())
        } else {
            let why = "waiting for the first complete scan and its probes; /status says what is missing\n";
            text(StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
        }
    }

    /// Prometheus text.
    fn metrics(&self) -> Response<Bytes> {
        let mut response = text(StatusCode::OK, self.exposition());
        let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    fn exposition(&self) -> String {
        let table = self.table.snapshot();
        let routes = table.routes();
        let models: Vec<(&str, &ModelMetrics)> = routes
            .iter()
            .map(|route| (&*route.model.id, &route.model.metrics))
            .chain([("_unknown", &self.metrics.unknown)])
            .collect();
        let mut text = Exposition::default();
        text.family(
            "proxy_requests_total",
            "counter",
            "Requests by model and by the status their client got; 499: it left first.",
        );
        for (model, metrics) in &models {
            metrics.requests.each(|status, count| {
                text.sample("proxy_requests_total", &[("model", model), ("status", status)], count);
            });
        }
        text.family("proxy_request_duration_seconds", "histogram", "From a request's head to the end of its answer.");
        for (model, metrics) in &models {
            text.histogram("proxy_request_duration_seconds", ("model", model), &metrics.duration);
        }
        text.family(
            "proxy_time_to_first_token_seconds",
            "histogram",
            "From a request's head to the first token of its answer.",
        );
        for (model, metrics) in &models {
            text.histogram("proxy_time_to_first_token_seconds", ("model", model), &metrics.time_to_first_token);
        }
        text.family(
            "proxy_tokens_total",
            "counter",
            "Tokens as backends count them; cached_input is part of input, reasoning of output.",
        );
        for (model, metrics) in &models {
            let tokens = &metrics.tokens;
            for (kind, counter) in [
                ("input", &tokens.input),
                ("cached_input", &tokens.cached_input),
                ("output", &tokens.output),
                ("reasoning", &tokens.reasoning),
            ] {
                text.sample("proxy_tokens_total", &[("model", model), ("type", &kind)], counter.get());
            }
        }
        text.family("proxy_finish_reasons_total", "counter", "Why answers ended, as backends say it.");
        for (model, metrics) in &models {
            for (finish, counter) in Finish::ALL.iter().zip(&metrics.finishes).filter(|(_, counter)| counter.get() > 0)
            {
                text.sample(
                    "proxy_finish_reasons_total",
                    &[("model", model), ("reason", &finish.as_str())],
                    counter.get(),
                );
            }
        }
        text.family("proxy_backend_inflight", "gauge", "Requests that a backend is serving.");
        for member in table.members() {
            let labels: [(&str, &dyn std::fmt::Display); 2] =
                [("backend", &member.backend.spec.name), ("model", &member.model.id)];
            text.sample("proxy_backend_inflight", &labels, member.in_flight());
        }
        text.family("proxy_backends_active", "gauge", "Backends that may get requests.");
        let active = table.backends().iter().filter(|backend| !backend.is_closed()).count();
        text.sample("proxy_backends_active", &[], active);
        text.family("proxy_routing_table_updates_total", "counter", "Changes of the routing table by action.");
        for (action, count) in self.metrics.table_updates() {
            text.sample("proxy_routing_table_updates_total", &[("action", &action)], count);
        }
        text.finish()
    }

    /// Status as JSON.
    async fn status(&self) -> Response<Bytes> {
        match self.ask().await {
            Some(status) => match serde_json::to_vec(&status) {
                Ok(json) => {
                    let mut response = Response::new(Bytes::from(json));
                    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
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
            Some(status) => text(StatusCode::OK, status.to_string()),
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
        status.ready &= !self.stopping.load(Ordering::Acquire);
        Some(status)
    }
}

fn text(status: StatusCode, text: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
