//! The account of one request: what it was, how it ended, told once to metrics and log.

use std::{net::IpAddr, sync::Arc};

use http::{HeaderValue, Method, Uri};
use tokio::time::Instant;

use crate::{
    backend::{Backend, Model},
    telemetry::metrics::{Metrics, ModelMetrics},
};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its answer went out whole.
    Complete,
    /// Its backend broke off in the middle of the answer.
    BackendBroke,
    /// Its client left first.
    ClientGone,
}

/// Facts of one request. Dropped without [`Exchange::end`], its client has gone.
#[derive(Debug)]
pub struct Exchange {
    started: Instant,
    method: Method,
    uri: Uri,
    client_ip: IpAddr,
    request_id: HeaderValue,
    metrics: Arc<Metrics>,
    access_log: bool,
    /// The model, once it is known to exist.
    pub model: Option<Arc<Model>>,
    /// Who served it last.
    pub backend: Option<Arc<Backend>>,
    /// How often it was sent to a backend.
    pub attempts: u32,
    /// Status that the client got; 0 before it got one.
    pub status: u16,
    response_bytes: u64,
    ended: bool,
}

/// Status in the account of a request whose client left before it got one.
const CLIENT_GONE: u16 = 499;

impl Exchange {
    /// A request that has just arrived.
    pub fn new(
        method: Method,
        uri: Uri,
        client_ip: IpAddr,
        request_id: HeaderValue,
        metrics: Arc<Metrics>,
        access_log: bool,
    ) -> Exchange {
        Exchange {
            started: Instant::now(),
            method,
            uri,
            client_ip,
            request_id,
            metrics,
            access_log,
            model: None,
            backend: None,
            attempts: 0,
            status: 0,
            response_bytes: 0,
            ended: false,
        }
    }

    /// When it arrived.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Its id, for logs.
    pub fn request_id(&self) -> &str {
        self.request_id.to_str().unwrap_or("?")
    }

    /// Its path.
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// Bytes of its answer have gone out.
    pub fn count_bytes(&mut self, bytes: usize) {
        self.response_bytes += bytes as u64;
    }

    /// Closes the account.
    pub fn end(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let status = match (ending, self.status) {
            (Ending::ClientGone, 0) => CLIENT_GONE,
            (_, status) => status,
        };
        let duration = self.started.elapsed();
        let instruments: &ModelMetrics = self.model.as_ref().map_or(&self.metrics.unknown, |model| &model.metrics);
        instruments.request_done(status, duration);
        if self.access_log {
            tracing::info!(
                request_id = self.request_id(), client = %self.client_ip, method = %self.method, path = self.path(),
                status, model = self.model_id(), container = self.container(), attempts = self.attempts,
                bytes = self.response_bytes, seconds = duration.as_secs_f64(), ending = ?ending, "request"
            );
        } else {
            tracing::debug!(
                request_id = self.request_id(), client = %self.client_ip, method = %self.method, path = self.path(),
                status, model = self.model_id(), container = self.container(), attempts = self.attempts,
                bytes = self.response_bytes, seconds = duration.as_secs_f64(), ending = ?ending, "request"
            );
        }
    }

    fn model_id(&self) -> Option<&str> {
        self.model.as_ref().map(|model| &*model.id)
    }

    fn container(&self) -> Option<&str> {
        self.backend.as_ref().map(|backend| backend.spec.name.as_str())
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}
