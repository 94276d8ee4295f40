//! Traces and metrics for a collector (OTLP), where one is named in the environment.
//!
//! Spans are spans of `tracing`, on a dispatcher that belongs to the proxy (`spans.rs`): unset or not sampled, none is made.
//! OpenTelemetry's SDK gets them when they close, queues them and exports them from a thread of its own; the queue is
//! bounded, and what does not fit is dropped. Metrics are read from the same instruments as `/metrics` each time they are sent, so
//! requests pay for them once. The way to the collector is `client.rs`. A collector that is slow or dead costs telemetry, and
//! one line in the log.

mod client;
mod report;
mod spans;
pub mod w3c;

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_proto::tonic::resource::v1::Resource as ResourceMessage;
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider},
};
use prost::Message as _;
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{client::CollectorClient, report::text_attribute};
pub use self::{
    report::OtlpReport,
    spans::{LiveSpan, Served, Tracing},
};
use crate::base::config::otlp::{Metrics, OtlpSettings, Traces};

/// The resource that these spans and metrics belong to.
const SCOPE: &str = "inference-proxy";

/// Why telemetry cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The file is not there, or does not hold certificates.
    #[error("cannot trust {}: {error} (OTEL_EXPORTER_OTLP_CERTIFICATE)", path.display())]
    Certificate {
        /// Which.
        path: PathBuf,
        /// Why.
        error: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS for telemetry: {0}")]
    Tls(String),
    /// The SDK refuses.
    #[error("cannot set up telemetry: {0}")]
    Sdk(String),
}

/// Telemetry that is being sent. Dropping it ends that at once; [`Otlp::finish`] sends the rest first.
#[derive(Debug)]
pub struct Otlp {
    provider: Option<SdkTracerProvider>,
    tracing: Option<Tracing>,
    metrics: Option<MetricsSender>,
    sending: Option<JoinHandle<()>>,
    runtime: Handle,
    /// The last metrics are to be sent.
    ending: CancellationToken,
    /// Nothing is to be sent any more.
    closing: CancellationToken,
}

impl Otlp {
    /// Begins to send what `settings` ask for. Connections are made on `runtime`, which must go on running as long as this
    /// lives.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub fn start(settings: &OtlpSettings, runtime: &Handle) -> Result<Otlp, OtlpError> {
        let (ending, closing) = (CancellationToken::new(), CancellationToken::new());
        let resource = resource(&settings.resource);
        let client = |what, collector: &crate::base::config::otlp::Collector| {
            CollectorClient::new(what, collector.clone(), runtime.clone(), closing.clone())
        };
        let (provider, tracing) = match &settings.traces {
            Some(traces) => {
                let provider = provider(traces, client("traces", &traces.collector)?, &resource)?;
                let tracing = Tracing::new(provider.tracer_with_scope(spans::scope()), traces.sampler);
                (Some(provider), Some(tracing))
            }
            None => (None, None),
        };
        let metrics = match &settings.metrics {
            Some(Metrics { collector, interval }) => Some(MetricsSender {
                client: client("metrics", collector)?,
                interval: *interval,
                resource: message(&resource),
                start: SystemTime::now(),
            }),
            None => None,
        };
        Ok(Otlp { provider, tracing, metrics, sending: None, runtime: runtime.clone(), ending, closing })
    }

    /// What makes spans, if any are wanted.
    pub fn tracing(&self) -> Option<Tracing> {
        self.tracing.clone()
    }

    /// Begins to send metrics, if any are wanted, as `tell` tells them.
    pub fn send_metrics(&mut self, tell: impl Fn(&mut OtlpReport) + Send + 'static) {
        let sender = self.metrics.take();
        self.sending = sender.map(|sender| self.runtime.spawn(sender.run(tell, self.ending.clone())));
    }

    /// Sends what is left, for at most `limit`. Returns whether all of it has been sent, or thrown away for a reason of
    /// the collector's.
    pub async fn finish(mut self, limit: Duration) -> bool {
        self.ending.cancel();
        let spans = self.provider.take().map(|provider| {
            // It waits for the SDK's thread, which waits for tasks of this runtime.
            tokio::task::spawn_blocking(move || drop(provider.shutdown_with_timeout(limit)))
        });
        let metrics = self.sending.take();
        let all = async {
            if let Some(spans) = spans {
                let _ = spans.await;
            }
            if let Some(metrics) = metrics {
                let _ = metrics.await;
            }
        };
        timeout(limit, all).await.is_ok()
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        // First, so that nothing waits for a runtime that is no longer there to do it.
        self.closing.cancel();
        self.ending.cancel();
    }
}

fn provider(traces: &Traces, client: CollectorClient, resource: &Resource) -> Result<SdkTracerProvider, OtlpError> {
    let collector = &traces.collector;
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .with_endpoint(collector.url.to_string())
        .with_timeout(collector.timeout);
    let exporter = match collector.gzip {
        true => exporter.with_compression(opentelemetry_otlp::Compression::Gzip),
        false => exporter,
    };
    let exporter = exporter.build().map_err(|error| OtlpError::Sdk(error.to_string()))?;
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(traces.queue_max)
        .with_max_export_batch_size(traces.batch_max.min(traces.queue_max))
        .with_scheduled_delay(traces.schedule_delay)
        .build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    Ok(SdkTracerProvider::builder()
        .with_sampler(spans::decided())
        .with_id_generator(spans::Ids::default())
        .with_resource(resource.clone())
        .with_span_processor(processor)
        .build())
}

/// What is said of this process.
fn resource(given: &[(String, String)]) -> Resource {
    let id = fastrand::u128(..);
    let own = [
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", format!("{id:032x}")),
        KeyValue::new("process.pid", i64::from(std::process::id())),
        KeyValue::new("telemetry.sdk.name", "opentelemetry"),
        KeyValue::new("telemetry.sdk.language", "rust"),
    ];
    // What the user says counts more.
    let given = given.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    Resource::builder_empty().with_attributes(own).with_attributes(given).build()
}

fn message(resource: &Resource) -> ResourceMessage {
    let attributes = resource.iter().map(|(key, value)| text_attribute(key.as_str(), value.to_string())).collect();
    ResourceMessage { attributes, ..ResourceMessage::default() }
}

#[derive(Debug)]
struct MetricsSender {
    client: CollectorClient,
    interval: Duration,
    resource: ResourceMessage,
    start: SystemTime,
}

impl MetricsSender {
    /// Sends the metrics each interval, and once more when told to end.
    async fn run(self, tell: impl Fn(&mut OtlpReport), ending: CancellationToken) {
        loop {
            let is_over = ending.run_until_cancelled(sleep(self.interval)).await.is_none();
            let mut report = OtlpReport::new(self.start, SystemTime::now());
            tell(&mut report);
            let message = report.finish(self.resource.clone()).encode_to_vec();
            let gzip = self.client.wants_gzip();
            let message = if gzip { compressed(&message) } else { message };
            // The client says what went wrong; the next time sends everything anyway.
            let _ = self.client.send(Bytes::from(message), gzip).await;
            if is_over {
                return;
            }
        }
    }
}

fn compressed(message: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing to a vector does not fail.
    let _ = encoder.write_all(message);
    encoder.finish().unwrap_or_default()
}
