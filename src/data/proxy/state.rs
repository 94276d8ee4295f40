//! What the workers share to serve requests.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::Response;

use super::{claim::QueueLimits, client::Patience, cors::Cors, makers::Makers};
use crate::{
    base::{
        config::{Balance, Config},
        error::{Dialect, ProxyError},
    },
    data::{affinity::Affinity, replay::BodyLimits},
    observe::pages::{Admin, Page},
    pool::table::TableReader,
    telemetry::{Telemetry, metrics::Metrics, operation::Operation, otlp::Tracing},
    wire::scan::PromptSeed,
};

/// What the data plane needs to serve requests; one for all workers.
#[derive(Debug)]
pub struct Proxy {
    pub(super) table: TableReader,
    pub(super) metrics: Arc<Metrics>,
    pub(super) tracing: Option<Tracing>,
    pub(super) limits: Arc<BodyLimits>,
    pub(super) patience: Patience,
    pub(super) admin: Admin,
    pub(super) balance: Balance,
    pub(super) queue: QueueLimits,
    pub(super) retries: u32,
    first_byte_timeout: Option<Duration>,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) access_log: bool,
    pub(super) usage_metrics: bool,
    pub(super) cors: Cors,
    pub(super) makers: Makers,
    /// Which replica has been sent which prompts, if the policy goes by it.
    pub(super) affinity: Option<Affinity>,
    /// Admin paths are on a port of their own.
    admin_elsewhere: bool,
}

/// Which paths a port has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The API, and the proxy's own pages unless they are on the admin port (`PROXY_PORT`).
    Data,
    /// The proxy's own pages alone (`PROXY_ADMIN_PORT`).
    Admin,
}

impl Proxy {
    /// A proxy that routes by `table`.
    pub fn new(config: &Config, table: TableReader, telemetry: Telemetry, admin: Admin) -> Proxy {
        Proxy {
            table,
            metrics: telemetry.metrics,
            tracing: telemetry.tracing,
            limits: BodyLimits::new(config.max_body_bytes, config.hold_max_bytes),
            patience: Patience { idle: config.client_idle_timeout, write: config.client_write_timeout },
            admin,
            balance: config.balance,
            queue: QueueLimits::new(config),
            retries: config.retries,
            first_byte_timeout: config.first_byte_timeout,
            idle_timeout: config.idle_timeout,
            access_log: config.access_log,
            usage_metrics: config.usage_metrics,
            cors: Cors::new(&config.cors_origins),
            makers: Makers::default(),
            affinity: (config.balance == Balance::Prefix).then(|| Affinity::new(PromptSeed::new(fastrand::u64(..)))),
            admin_elsewhere: config.admin_port.is_some(),
        }
    }

    /// Whether this page of the proxy's own is on this port.
    pub(super) fn shows(&self, page: Page, port: Port) -> bool {
        port == Port::Admin || page.is_for_everybody() || !self.admin_elsewhere
    }

    /// The shorter of the limits that run until the head of an answer, with its variable.
    pub(super) fn head_limit(&self) -> Option<(Duration, &'static str)> {
        let first = self.first_byte_timeout.map(|limit| (limit, "PROXY_FIRST_BYTE_TIMEOUT"));
        let idle = self.idle_timeout.map(|limit| (limit, "PROXY_IDLE_TIMEOUT"));
        first.into_iter().chain(idle).min_by_key(|(limit, _)| *limit)
    }

    /// The answer to a request that is not served.
    pub(super) fn reject(&self, error: &ProxyError, dialect: Dialect) -> Response<Bytes> {
        self.metrics.rejected.increment(error.code());
        error.response(dialect)
    }

    /// Counts bytes that were refused before they were a request.
    pub(super) fn count_refused(&self, error: &ProxyError) {
        self.metrics.rejected.increment(error.code());
        self.metrics.unknown.of(Operation::Other).requests.increment(error.status().as_u16());
    }
}
