//! The way to a collector: one POST, or one unary gRPC call, over hyper.
//!
//! The SDK exports from a thread of its own, where no tokio runtime can be found: a client that needed one would panic
//! there, and every later span would be lost in silence. So each request is a task on the proxy's runtime, and the SDK's
//! thread waits for that task, which any thread may do.
//!
//! gRPC is that same POST with a frame of five bytes around the message and the outcome in trailers
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>); the SDK is told the outcome as an HTTP status, and
//! repeats what may be repeated.

use std::{
    error::Error,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::future::{Either, select};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message as _;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tokio::{
    runtime::Handle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::OtlpError;
use crate::base::config::otlp::{Collector, Protocol};

/// Collectors answer with a few bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Flag and length before a gRPC message.
const FRAME_HEAD_BYTES: usize = 5;
/// Least time between two complaints of the same kind about one collector that works in between.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);
/// Complaints about one collector until it works: one that fails in ever new ways does not fill the log.
const COMPLAINTS_MAX: usize = 8;
/// The answer that the SDK gets once nothing is to be sent any more: one after which it does not try again.
const CLOSED: StatusCode = StatusCode::GONE;

type Connector = HttpsConnector<HttpConnector>;

/// One kind of telemetry on its way to its collector. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct CollectorClient(Arc<Inner>);

struct Inner {
    /// `traces` or `metrics`.
    what: &'static str,
    collector: Collector,
    http: Client<Connector, Full<Bytes>>,
    runtime: Handle,
    closing: CancellationToken,
    reach: Mutex<Reach>,
}

/// Whether the collector takes what it is sent, as far as the log knows.
#[derive(Debug, Default)]
struct Reach {
    failing: bool,
    /// What has been complained of since it last worked, or shortly before, and when.
    complaints: Vec<(SendError, Instant)>,
    /// It was said that the collector does not take this kind of telemetry, which will not change by itself.
    is_known_to_take_none: bool,
}

/// What the log is told of an export that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    /// The collector does not take this kind of telemetry.
    TakesNone,
    /// Something has gone wrong.
    Failed,
    /// Nothing that has not been said.
    Known,
}

/// Why something was not taken. None of these names a header.
#[derive(Debug, Clone, thiserror::Error)]
enum SendError {
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("{0}")]
    Broke(String),
    #[error("it answered {0}")]
    Status(StatusCode),
    #[error("it answered with gRPC status {code}{message}")]
    Grpc { code: u32, message: String },
    #[error("it rejected {rejected} of what it was sent: {message}")]
    Rejected { rejected: i64, message: String },
}

// === impl CollectorClient ===

impl CollectorClient {
    /// A client that works on `runtime` until `closing`. It keeps no connection between two exports, seconds or minutes
    /// apart: there is none that could have died in the meantime.
    ///
    /// # Errors
    /// The certificate cannot be used.
    pub(super) fn new(
        what: &'static str,
        collector: Collector,
        runtime: Handle,
        closing: CancellationToken,
    ) -> Result<CollectorClient, OtlpError> {
        let builder = HttpsConnectorBuilder::new();
        let builder = match &collector.certificate {
            None => builder
                .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())
                .map_err(|error| OtlpError::Tls(error.to_string()))?,
            Some(path) => {
                let bad =
                    |error: &dyn fmt::Display| OtlpError::Certificate { path: path.clone(), error: error.to_string() };
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(&error))? {
                    let certificate = certificate.map_err(|error| bad(&error))?;
                    roots.add(certificate).map_err(|error| bad(&error))?;
                }
                if roots.is_empty() {
                    return Err(bad(&"it holds no certificate"));
                }
                let provider = Arc::new(rustls::crypto::ring::default_provider());
                let config =
                    rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
                let config = config.map_err(|error| OtlpError::Tls(error.to_string()))?;
                builder.with_tls_config(config.with_root_certificates(roots).with_no_client_auth())
            }
        };
        let mut client = Client::builder(TokioExecutor::new());
        client.pool_max_idle_per_host(0);
        let http = match collector.protocol {
            Protocol::Grpc => client.http2_only(true).build(builder.https_or_http().enable_http2().build()),
            Protocol::HttpProtobuf => client.build(builder.https_or_http().enable_http1().build()),
        };
        Ok(CollectorClient(Arc::new(Inner { what, collector, http, runtime, closing, reach: Mutex::default() })))
    }

    /// Sends one message, which is compressed if `gzip` says so; to be called from any thread. What comes back is an
    /// answer in the words of HTTP, whatever is spoken.
    ///
    /// # Errors
    /// There was none.
    pub(super) async fn send(&self, message: Bytes, gzip: bool) -> Result<Response<Bytes>, HttpError> {
        let inner = self.0.clone();
        let sending = self.0.runtime.spawn(async move { inner.send(message, gzip).await });
        let abort = sending.abort_handle();
        let closed = self.0.closing.cancelled();
        tokio::pin!(sending, closed);
        match select(sending, closed).await {
            Either::Left((outcome, _)) => Ok(outcome??),
            Either::Right(_) => {
                abort.abort();
                let mut response = Response::new(Bytes::new());
                *response.status_mut() = CLOSED;
                Ok(response)
            }
        }
    }

    /// Sends messages compressed, if that was asked for.
    pub(super) fn wants_gzip(&self) -> bool {
        self.0.collector.gzip
    }
}

impl HttpClient for CollectorClient {
    // What `#[async_trait]` makes of an async function.
    fn send_bytes<'c, 'f>(
        &'c self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'f>>
    where
        'c: 'f,
        Self: 'f,
    {
        let gzip = request.headers().contains_key(header::CONTENT_ENCODING);
        Box::pin(self.send(request.into_body(), gzip))
    }
}

// === impl SendError ===

impl SendError {
    /// Whether the collector says that it does not take this kind of telemetry: no such path, or no such service.
    fn says_that_none_is_taken(&self) -> bool {
        const UNIMPLEMENTED: u32 = 12;
        match self {
            SendError::Status(status) => {
                matches!(*status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
            }
            SendError::Grpc { code, .. } => *code == UNIMPLEMENTED,
            SendError::TimedOut(_) | SendError::Broke(_) | SendError::Rejected { .. } => false,
        }
    }

    /// Whether somebody who knows the other one learns nothing new.
    fn is_like(&self, other: &SendError) -> bool {
        match (self, other) {
            (SendError::Broke(one), SendError::Broke(other)) => one == other,
            (SendError::Status(one), SendError::Status(other)) => one == other,
            (SendError::Grpc { code: one, .. }, SendError::Grpc { code: other, .. }) => one == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

// === impl Reach ===

impl Reach {
    /// An export has failed. Nothing is said twice until the collector works, and that it takes nothing of this kind is
    /// said once for all.
    fn failed(&mut self, error: &SendError, now: Instant) -> News {
        self.failing = true;
        if error.says_that_none_is_taken() {
            let is_known = std::mem::replace(&mut self.is_known_to_take_none, true);
            return if is_known { News::Known } else { News::TakesNone };
        }
        if self.complaints.len() >= COMPLAINTS_MAX || self.complaints.iter().any(|(known, _)| known.is_like(error)) {
            return News::Known;
        }
        self.complaints.push((error.clone(), now));
        News::Failed
    }

    /// An export has got through. Returns whether the one before had not.
    fn worked(&mut self, now: Instant) -> bool {
        // A collector that works now and then is not complained of each time.
        self.complaints.retain(|(_, at)| now.duration_since(*at) < COMPLAINT_INTERVAL);
        std::mem::replace(&mut self.failing, false)
    }
}

// === impl Inner ===

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CollectorClient").field("what", &self.what).field("collector", &self.collector).finish()
    }
}

impl Inner {
    async fn send(&self, message: Bytes, gzip: bool) -> Result<Response<Bytes>, SendError> {
        let limit = self.collector.timeout;
        let outcome = match timeout(limit, self.exchange(message, gzip)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(SendError::TimedOut(limit)),
        };
        match outcome {
            Ok(response) => {
                self.note(&refusal(&response));
                Ok(response)
            }
            // An outcome of the call, not of the transport: the SDK decides by its status.
            Err(error @ SendError::Grpc { code, .. }) => {
                let mut response = Response::new(Bytes::new());
                *response.status_mut() = http_status(code);
                self.note(&Some(error));
                Ok(response)
            }
            Err(error) => {
                let error = Some(error);
                self.note(&error);
                error.map_or_else(|| Ok(Response::new(Bytes::new())), Err)
            }
        }
    }

    async fn exchange(&self, message: Bytes, gzip: bool) -> Result<Response<Bytes>, SendError> {
        let broke = |error: &(dyn Error + 'static)| SendError::Broke(in_words(error, self.collector.protocol));
        let response = self.http.request(self.request(message, gzip)?).await.map_err(|error| broke(&error))?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| broke(error.as_ref()))?;
        let trailers = body.trailers().cloned();
        let bytes = body.to_bytes();
        match self.collector.protocol {
            Protocol::HttpProtobuf => Ok(Response::from_parts(parts, bytes)),
            Protocol::Grpc => {
                if parts.status != StatusCode::OK {
                    return Ok(Response::from_parts(parts, Bytes::new()));
                }
                // An answer without a message says its status at once.
                let status = trailers.as_ref().and_then(grpc_status).or_else(|| grpc_status(&parts.headers));
                match status {
                    Some((0, _)) => Ok(Response::new(bytes.slice(FRAME_HEAD_BYTES.min(bytes.len())..))),
                    Some((code, message)) => Err(SendError::Grpc { code, message }),
                    None => Err(SendError::Broke("it does not speak gRPC".to_owned())),
                }
            }
        }
    }

    fn request(&self, message: Bytes, gzip: bool) -> Result<Request<Full<Bytes>>, SendError> {
        let mut request = Request::post(self.collector.url.clone())
            .header(header::USER_AGENT, concat!("inference-proxy/", env!("CARGO_PKG_VERSION")));
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.collector.headers.0.iter().cloned());
        }
        let (request, body) = match self.collector.protocol {
            Protocol::HttpProtobuf => {
                let request = request.header(header::CONTENT_TYPE, "application/x-protobuf");
                (if gzip { request.header(header::CONTENT_ENCODING, "gzip") } else { request }, message)
            }
            Protocol::Grpc => {
                let milliseconds = self.collector.timeout.as_millis();
                let request = request
                    .header(header::CONTENT_TYPE, "application/grpc")
                    .header(header::TE, "trailers")
                    .header("grpc-timeout", format!("{milliseconds}m"));
                let request = if gzip { request.header("grpc-encoding", "gzip") } else { request };
                (request, frame(&message, gzip)?)
            }
        };
        request.body(Full::new(body)).map_err(|error| SendError::Broke(error.to_string()))
    }

    /// Tells the log how it went, where that is news.
    fn note(&self, error: &Option<SendError>) {
        let mut reach = self.reach.lock().unwrap_or_else(PoisonError::into_inner);
        let (what, now) = (self.what, Instant::now());
        let collector = self.collector.place();
        match error {
            Some(error) => match reach.failed(error, now) {
                News::TakesNone => tracing::warn!(
                    what, collector, %error,
                    "telemetry does not get through; requests are served as ever; if this collector takes no {what}, set \
                     OTEL_{}_EXPORTER=none",
                    what.to_ascii_uppercase()
                ),
                News::Failed => {
                    tracing::warn!(what, collector, %error, "telemetry does not get through; requests are served as ever");
                }
                News::Known => tracing::debug!(what, collector, %error, "telemetry does not get through"),
            },
            None if reach.worked(now) => tracing::info!(what, collector, "telemetry gets through again"),
            None => {}
        }
    }
}

// === helpers ===

/// What a collector has against what it was sent.
fn refusal(response: &Response<Bytes>) -> Option<SendError> {
    if !response.status().is_success() {
        return Some(SendError::Status(response.status()));
    }
    // The answers about traces and about metrics have the same form.
    let answer = ExportTraceServiceResponse::decode(response.body().clone()).ok()?;
    let partial = answer.partial_success.filter(|p| p.rejected_spans > 0 || !p.error_message.is_empty())?;
    Some(SendError::Rejected { rejected: partial.rejected_spans, message: shown(&partial.error_message) })
}

fn frame(message: &Bytes, gzip: bool) -> Result<Bytes, SendError> {
    let length = u32::try_from(message.len())
        .map_err(|_| SendError::Broke("there is more to send than fits one message".to_owned()))?;
    let mut framed = BytesMut::with_capacity(FRAME_HEAD_BYTES + message.len());
    framed.put_u8(u8::from(gzip));
    framed.put_u32(length);
    framed.extend_from_slice(message);
    Ok(framed.freeze())
}

fn grpc_status(headers: &HeaderMap) -> Option<(u32, String)> {
    let code = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message = headers.get("grpc-message").and_then(|message: &HeaderValue| message.to_str().ok());
    Some((code, message.map_or_else(String::new, |message| format!(": {}", shown(message)))))
}

/// The HTTP status by which the SDK decides what it would decide by this status of gRPC
/// (<https://opentelemetry.io/docs/specs/otlp/#failures>).
fn http_status(code: u32) -> StatusCode {
    const CANCELLED: u32 = 1;
    const DEADLINE_EXCEEDED: u32 = 4;
    const RESOURCE_EXHAUSTED: u32 = 8;
    const ABORTED: u32 = 10;
    const OUT_OF_RANGE: u32 = 11;
    const UNAVAILABLE: u32 = 14;
    const DATA_LOSS: u32 = 15;
    match code {
        RESOURCE_EXHAUSTED => StatusCode::TOO_MANY_REQUESTS,
        CANCELLED | DEADLINE_EXCEEDED | ABORTED | OUT_OF_RANGE | UNAVAILABLE | DATA_LOSS => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        _ => StatusCode::BAD_REQUEST,
    }
}

/// What a collector says, as far as it belongs into a log line.
fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}

/// What went wrong, and what to do about it where that is known: what users meet is said in other words than a library's.
fn in_words(error: &(dyn Error + 'static), protocol: Protocol) -> String {
    let tls = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>());
    let http = causes(error).find_map(|cause| cause.downcast_ref::<hyper::Error>());
    let text = with_causes(error);
    let (spoken, other) = match protocol {
        Protocol::Grpc => ("HTTP/2, as gRPC does", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
        Protocol::HttpProtobuf => {
            ("HTTP/1", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or let the endpoint begin with https://")
        }
    };
    match (io_cause(error), tls, http) {
        (Some(io::ErrorKind::ConnectionRefused), ..) => "nobody listens there".to_owned(),
        (_, Some(rustls::Error::InvalidMessage(_)), _) => {
            "what answers there does not speak TLS: let the endpoint begin with http://".to_owned()
        }
        (_, Some(rustls::Error::InvalidCertificate(_)), _) => {
            format!("{text}: OTEL_EXPORTER_OTLP_CERTIFICATE says what to trust")
        }
        // The latter are the first bytes of any answer of HTTP/1, read as the length of a frame of HTTP/2.
        (_, _, Some(http)) if http.is_parse() || text.contains("frame with invalid size") => {
            format!("what answers there does not speak {spoken}: set {other}")
        }
        // Whether the answer was seen before the connection broke for it is a matter of luck.
        (None, _, Some(_)) => format!("{text}; if what answers there does not speak {spoken}, set {other}"),
        _ => text,
    }
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1) {
        let also = cause.to_string();
        if !text.contains(&also) {
            text = format!("{text}: {also}");
        }
    }
    shown(&text)
}

fn io_cause(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    causes(error).filter_map(|cause| cause.downcast_ref::<io::Error>()).last().map(io::Error::kind)
}

/// The error and what is behind it. An [`io::Error`] does not name what it wraps as its source, but what is behind that.
fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| {
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|wrapped| wrapped as &(dyn Error + 'static)).or_else(|| error.source())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_say_length_and_compression() {
        assert_eq!(&frame(&Bytes::from_static(b"abc"), false).unwrap()[..], b"\0\0\0\0\x03abc");
        assert_eq!(&frame(&Bytes::from(vec![7; 258]), true).unwrap()[..6], b"\x01\0\0\x01\x02\x07");
    }

    #[test]
    fn what_may_be_repeated_gets_a_status_that_is() {
        for (code, status) in [(14, 503), (8, 429), (4, 503), (3, 400), (12, 400), (16, 400)] {
            assert_eq!(http_status(code).as_u16(), status, "gRPC {code}");
        }
    }

    #[test]
    fn what_users_meet_is_said_with_what_to_do() {
        let tls = |error: rustls::Error| io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error));
        for (error, expected) in [
            (io::ErrorKind::ConnectionRefused.into(), "nobody listens there"),
            (tls(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)), "begin with http://"),
            (tls(rustls::CertificateError::UnknownIssuer.into()), "OTEL_EXPORTER_OTLP_CERTIFICATE says"),
            (io::ErrorKind::ConnectionReset.into(), "connection reset"),
        ] {
            let words = in_words(&error, Protocol::Grpc);
            assert!(words.contains(expected), "{words}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_complained_of_twice_until_the_collector_works() {
        let mut reach = Reach::default();
        let broke = |text: &str| SendError::Broke(text.to_owned());
        let begun = Instant::now();
        let later = |minutes: u32| begun + COMPLAINT_INTERVAL * minutes;
        for error in [broke("a"), broke("b"), SendError::Status(StatusCode::FORBIDDEN)] {
            assert_eq!(reach.failed(&error, begun), News::Failed, "{error} is new");
            assert_eq!(reach.failed(&error, later(100)), News::Known, "{error}");
        }
        let grpc = |message: &str| SendError::Grpc { code: 14, message: message.to_owned() };
        assert_eq!(reach.failed(&grpc("one"), begun), News::Failed);
        assert_eq!(reach.failed(&grpc("other"), begun), News::Known);
        let rejected = |rejected| SendError::Rejected { rejected, message: String::new() };
        assert_eq!(reach.failed(&rejected(1), begun), News::Failed);
        assert_eq!(reach.failed(&rejected(2), later(9)), News::Known);
        let news = (0..100).filter(|n| reach.failed(&broke(&n.to_string()), later(1)) == News::Failed).count();
        assert_eq!(news, COMPLAINTS_MAX - 5, "however many kinds there are");
        assert!(reach.worked(later(3)) && !reach.worked(later(3)));
        assert_eq!(reach.failed(&broke("a"), later(3)), News::Failed, "it had worked");
        assert!(reach.worked(later(3)));
        assert_eq!(reach.failed(&broke("a"), later(3)), News::Known, "it works now and then");
    }

    #[tokio::test(start_paused = true)]
    async fn that_a_collector_takes_none_of_a_kind_is_said_once_in_the_life_of_the_process() {
        let status = SendError::Status;
        let grpc = SendError::Grpc { code: 12, message: ": unknown service".to_owned() };
        for error in [status(StatusCode::NOT_FOUND), status(StatusCode::NOT_IMPLEMENTED), grpc] {
            let mut reach = Reach::default();
            let begun = Instant::now();
            assert_eq!(reach.failed(&error, begun), News::TakesNone, "{error}");
            for minutes in [0, 1, 2, 60, 100_000] {
                let now = begun + COMPLAINT_INTERVAL * minutes;
                assert_eq!(reach.failed(&error, now), News::Known, "{error}");
                // Whatever comes in between.
                reach.failed(&SendError::TimedOut(Duration::from_secs(1)), now);
                reach.worked(now);
                assert_eq!(reach.failed(&error, now), News::Known, "{error}");
            }
        }
        for code in [400, 401, 403, 408, 429, 500, 503] {
            let error = status(StatusCode::from_u16(code).unwrap());
            assert_eq!(Reach::default().failed(&error, Instant::now()), News::Failed, "{error}");
        }
    }

    #[test]
    fn partial_success_is_a_refusal() {
        use opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess;
        let answer = |rejected_spans, message: &str| {
            let partial = ExportTracePartialSuccess { rejected_spans, error_message: message.to_owned() };
            let answer = ExportTraceServiceResponse { partial_success: Some(partial) };
            refusal(&Response::new(answer.encode_to_vec().into())).map(|error| error.to_string())
        };
        assert_eq!(answer(0, ""), None);
        assert_eq!(answer(3, "too old").as_deref(), Some("it rejected 3 of what it was sent: too old"));
        assert!(refusal(&Response::new(Bytes::new())).is_none());
        assert!(refusal(&Response::new(Bytes::from_static(b"<html>"))).is_none());
    }
}
