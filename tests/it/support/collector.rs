//! A collector on the official protobuf definitions, over HTTP and gRPC: it keeps everything that it is sent.

use std::{
    convert::Infallible,
    io::Read as _,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use flate2::read::GzDecoder;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{HeaderMap, Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use opentelemetry_proto::tonic::{
    collector::{metrics::v1::ExportMetricsServiceRequest, trace::v1::ExportTraceServiceRequest},
    common::v1::{KeyValue, any_value::Value},
    metrics::v1::{Metric, metric::Data, number_data_point},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message as _;
use tokio::{net::TcpListener, task::JoinHandle};

use super::wait::eventually;

/// It is gone when this is dropped.
pub(crate) struct Collector {
    pub(crate) addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    connections: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    spans: Vec<Span>,
    /// The last message with metrics.
    metrics: Option<ExportMetricsServiceRequest>,
    /// What was said of the sender, as `key=value`.
    resource: Vec<String>,
    /// Path and headers of each message.
    heads: Vec<(String, HeaderMap)>,
    /// What is answered instead of taking it, as a status of HTTP or gRPC, so many times.
    refusing: (u16, usize),
}

// === impl Collector ===

impl Collector {
    pub(crate) async fn start() -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into()).await
    }

    pub(crate) async fn start_at(addr: SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let serving = shared.clone();
        let accepting = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                serving.connections.fetch_add(1, Ordering::Relaxed);
                let shared = serving.clone();
                let service = service_fn(move |request| {
                    let shared = shared.clone();
                    async move { Ok::<_, Infallible>(shared.take(request).await) }
                });
                connections.spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { addr, shared, accepting }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Answers the next `times` messages with this status, of HTTP or of gRPC.
    pub(crate) fn refuse(&self, status: u16, times: usize) {
        self.shared.state.lock().unwrap().refusing = (status, times);
    }

    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// All spans so far.
    pub(crate) fn spans(&self) -> Vec<Span> {
        self.shared.state.lock().unwrap().spans.clone()
    }

    /// Spans of this kind, once there are `n` of them.
    pub(crate) async fn spans_of(&self, kind: SpanKind, n: usize) -> Vec<Span> {
        let found = || self.spans().into_iter().filter(|span| span.kind() == kind).collect::<Vec<_>>();
        eventually(format!("{n} spans of kind {kind:?}"), async || found().len() >= n).await;
        found()
    }

    /// Path and headers of each message.
    pub(crate) fn heads(&self) -> Vec<(String, HeaderMap)> {
        self.shared.state.lock().unwrap().heads.clone()
    }

    /// What was last said of the sender, as `key=value`.
    pub(crate) fn resource(&self) -> Vec<String> {
        self.shared.state.lock().unwrap().resource.clone()
    }

    /// The last metrics.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let state = self.shared.state.lock().unwrap();
        let resources = state.metrics.iter().flat_map(|message| &message.resource_metrics);
        resources.flat_map(|resource| &resource.scope_metrics).flat_map(|scope| scope.metrics.clone()).collect()
    }

    /// The sum of the series of this name that have these attributes: of histograms, of how many they counted.
    pub(crate) fn metric(&self, name: &str, attributes: &[(&str, &str)]) -> Option<f64> {
        let metric = self.metrics().into_iter().find(|metric| metric.name == name)?;
        let fits =
            |given: &[KeyValue]| attributes.iter().all(|(key, value)| text(given, key).as_deref() == Some(value));
        let number = |value: &Option<number_data_point::Value>| match value {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            Some(number_data_point::Value::AsInt(n)) => *n as f64,
            Some(number_data_point::Value::AsDouble(n)) => *n,
            None => panic!("{name} has a point without a value"),
        };
        let points: Vec<f64> = match metric.data.unwrap() {
            Data::Sum(sum) => {
                sum.data_points.iter().filter(|p| fits(&p.attributes)).map(|p| number(&p.value)).collect()
            }
            Data::Gauge(gauge) => {
                gauge.data_points.iter().filter(|p| fits(&p.attributes)).map(|p| number(&p.value)).collect()
            }
            #[expect(clippy::cast_precision_loss, reason = "small")]
            Data::Histogram(histogram) => {
                histogram.data_points.iter().filter(|p| fits(&p.attributes)).map(|p| p.count as f64).collect()
            }
            other => panic!("{name} is {other:?}"),
        };
        points.into_iter().reduce(|a, b| a + b)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

// === impl Shared ===

impl Shared {
    async fn take(&self, request: Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        let (head, body) = request.into_parts();
        let mut message = body.collect().await.unwrap().to_bytes();
        let is_grpc = head.headers["content-type"] == "application/grpc";
        if is_grpc {
            assert_eq!(head.headers["te"], "trailers");
            let frame = message.split_to(5);
            assert_eq!(u32::from_be_bytes(frame[1..].try_into().unwrap()) as usize, message.len());
            assert_eq!(frame[0] == 1, head.headers.contains_key("grpc-encoding"));
        } else {
            assert_eq!(head.headers["content-type"], "application/x-protobuf");
        }
        if ["grpc-encoding", "content-encoding"].iter().any(|name| head.headers.contains_key(*name)) {
            let mut plain = Vec::new();
            GzDecoder::new(&message[..]).read_to_end(&mut plain).unwrap();
            message = plain.into();
        }
        let mut state = self.state.lock().unwrap();
        let path = head.uri.path().to_owned();
        state.heads.push((path.clone(), head.headers));
        let status = match &mut state.refusing {
            (status, times) if *times > 0 => {
                *times -= 1;
                *status
            }
            _ => 0,
        };
        if status == 0 {
            state.keep(&path, message);
        }
        answer(is_grpc, status)
    }
}

fn answer(is_grpc: bool, status: u16) -> Response<BoxBody<Bytes, Infallible>> {
    if !is_grpc {
        let mut response = Response::new(Full::new(Bytes::new()).boxed());
        if status != 0 {
            *response.status_mut() = status.try_into().unwrap();
        }
        return response;
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.into());
    // An empty message.
    let body = Full::new(Bytes::from_static(&[0; 5])).with_trailers(async move { Some(Ok(trailers)) });
    Response::builder().header("content-type", "application/grpc").body(body.boxed()).unwrap()
}

impl State {
    fn keep(&mut self, path: &str, message: Bytes) {
        let pairs = |attributes: &[KeyValue]| -> Vec<String> {
            attributes.iter().map(|a| format!("{}={}", a.key, text(attributes, &a.key).unwrap())).collect()
        };
        match path {
            "/v1/traces" | "/opentelemetry.proto.collector.trace.v1.TraceService/Export" => {
                let message = ExportTraceServiceRequest::decode(message).unwrap();
                for resource in message.resource_spans {
                    self.resource = pairs(&resource.resource.unwrap().attributes);
                    self.spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
                }
            }
            "/v1/metrics" | "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export" => {
                let message = ExportMetricsServiceRequest::decode(message).unwrap();
                self.resource = pairs(&message.resource_metrics[0].resource.as_ref().unwrap().attributes);
                self.metrics = Some(message);
            }
            path => panic!("nobody exports to {path}"),
        }
    }
}

/// The attribute of this name, as text.
pub(crate) fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref()?.value.as_ref()?;
    Some(shown(value))
}

fn shown(value: &Value) -> String {
    match value {
        Value::StringValue(text) => text.clone(),
        Value::BoolValue(flag) => flag.to_string(),
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        Value::ArrayValue(array) => {
            let values = array.values.iter().filter_map(|value| value.value.as_ref());
            values.map(shown).collect::<Vec<_>>().join(",")
        }
        other => panic!("unexpected: {other:?}"),
    }
}
