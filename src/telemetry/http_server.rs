//! Requests in the words of OpenTelemetry's conventions for HTTP servers
//! (<https://opentelemetry.io/docs/specs/semconv/http/http-metrics/>): by method, route, scheme, status and error.
//!
//! There is an instrument only where metrics are sent to a collector. Series are made when the first request of their kind
//! ends, in places that are claimed by compare-and-swap: counting takes no lock, and none of the parts of a key can be
//! invented by a client.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
    time::Duration,
};

use http::Method;

use super::{
    metrics::{BYTES, Histogram, REQUEST_SECONDS},
    routes::Route,
};

/// The methods that keep their names: those of RFC 9110, and PATCH.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
/// Every other method.
const OTHER_METHOD: &str = "_OTHER";
/// By what clients reach the proxy, or what is in front of it.
const SCHEMES: [&str; 2] = ["http", "https"];
/// How requests end that do not end well, whatever their status.
const BROKEN: [&str; 3] = ["backend_broke", "client_broke", "client_gone"];
/// Most pairs of status and ending that are kept apart for one method, route and scheme.
const ENDS_MAX: usize = 16;

/// A request that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Its route.
    pub route: Route,
    /// The status that its client got; 0: none.
    pub status: u16,
    /// Why it did not end well, as one of few words.
    pub broken: Option<&'static str>,
    /// From its head to the end of its answer.
    pub duration: Duration,
    /// The size of its body, if a backend got it.
    pub request_bytes: Option<u64>,
    /// The size of its answer.
    pub response_bytes: u64,
}

/// All of them.
#[derive(Debug)]
pub struct HttpMetrics {
    /// One for each route, method and scheme.
    kinds: Box<[OnceLock<Box<Kind>>]>,
}

/// Requests of one route, method and scheme.
#[derive(Debug)]
struct Kind {
    route: Route,
    method: &'static str,
    scheme: &'static str,
    ends: [End; ENDS_MAX],
    /// What does not fit.
    other: OnceLock<Box<HttpSeries>>,
}

/// Requests that ended in one way.
#[derive(Debug, Default)]
struct End {
    /// [`end_key`], and 0 while it is free.
    key: AtomicU16,
    series: OnceLock<Box<HttpSeries>>,
}

/// The instruments of one series.
#[derive(Debug)]
pub struct HttpSeries {
    /// From the head to the end of the answer.
    pub duration: Histogram,
    /// Sizes of the bodies of requests.
    pub request_bytes: Histogram,
    /// Sizes of the bodies of answers.
    pub response_bytes: Histogram,
}

/// The labels of one series; an empty one is not told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpLabels {
    /// `http.request.method`.
    pub method: &'static str,
    /// `http.route`.
    pub route: &'static str,
    /// `url.scheme`.
    pub scheme: &'static str,
    /// `http.response.status_code`.
    pub status: String,
    /// `error.type`.
    pub error: String,
}

/// The name of a method in telemetry.
pub fn method_name(method: &Method) -> &'static str {
    METHODS.into_iter().find(|known| *known == method.as_str()).unwrap_or(OTHER_METHOD)
}

/// The scheme by which the client, or what is in front of the proxy, was reached. `forwarded` is `X-Forwarded-Proto`.
pub fn scheme(forwarded: Option<&[u8]>) -> &'static str {
    let is_https = forwarded.is_some_and(|proto| proto.eq_ignore_ascii_case(b"https"));
    SCHEMES[usize::from(is_https)]
}

// === impl HttpMetrics ===

impl Default for HttpMetrics {
    fn default() -> HttpMetrics {
        let count = Route::COUNT * (METHODS.len() + 1) * SCHEMES.len();
        HttpMetrics { kinds: (0..count).map(|_| OnceLock::new()).collect() }
    }
}

impl HttpMetrics {
    /// Counts a request with this method and scheme, which are what [`method_name`] and [`scheme`] say.
    pub fn observe(&self, method: &'static str, scheme: &'static str, ended: &Ended) {
        let of_method = METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len());
        let of_scheme = usize::from(scheme == SCHEMES[1]);
        let place = (ended.route.index() * (METHODS.len() + 1) + of_method) * SCHEMES.len() + of_scheme;
        let Some(kind) = self.kinds.get(place) else { return };
        let new = || Box::new(Kind::new(ended.route, method, scheme));
        let series = kind.get_or_init(new).series(end_key(ended.status, ended.broken));
        series.duration.observe(ended.duration);
        if let Some(bytes) = ended.request_bytes {
            series.request_bytes.observe_count(bytes);
        }
        series.response_bytes.observe_count(ended.response_bytes);
    }

    /// Every series there is.
    pub fn each(&self) -> Vec<(HttpLabels, &HttpSeries)> {
        let kinds = self.kinds.iter().filter_map(|kind| kind.get());
        kinds.flat_map(|kind| kind.each()).collect()
    }
}

// === impl Kind ===

impl Kind {
    fn new(route: Route, method: &'static str, scheme: &'static str) -> Kind {
        Kind { route, method, scheme, ends: Default::default(), other: OnceLock::new() }
    }

    fn series(&self, key: u16) -> &HttpSeries {
        for end in &self.ends {
            let mut owner = end.key.load(Relaxed);
            if owner == 0 {
                owner = match end.key.compare_exchange(0, key, Relaxed, Relaxed) {
                    Ok(_) => key,
                    Err(winner) => winner,
                };
            }
            if owner == key {
                return end.series.get_or_init(HttpSeries::boxed);
            }
        }
        self.other.get_or_init(HttpSeries::boxed)
    }

    fn each(&self) -> impl Iterator<Item = (HttpLabels, &HttpSeries)> {
        let ends = self.ends.iter().filter_map(|end| Some((end.series.get()?, end_of(end.key.load(Relaxed)))));
        let other = self.other.get().map(|series| (series, (0, Some("_OTHER"))));
        ends.chain(other).map(|(series, (status, broken))| {
            let status = if status == 0 { String::new() } else { status.to_string() };
            let error = match broken {
                Some(word) => word.to_owned(),
                // What a client did wrong is no error of a server.
                None if status.starts_with('5') => status.clone(),
                None => String::new(),
            };
            (
                HttpLabels { method: self.method, route: self.route.path(), scheme: self.scheme, status, error },
                &**series,
            )
        })
    }
}

impl HttpSeries {
    fn boxed() -> Box<HttpSeries> {
        Box::new(HttpSeries {
            duration: Histogram::new(&REQUEST_SECONDS),
            request_bytes: Histogram::new(&BYTES),
            response_bytes: Histogram::new(&BYTES),
        })
    }
}

/// Status and ending in one number, which is never 0.
fn end_key(status: u16, broken: Option<&str>) -> u16 {
    let broken = broken.and_then(|word| BROKEN.iter().position(|known| *known == word)).map_or(0, |place| place + 1);
    1 + status.min(999) * 4 + u16::try_from(broken).unwrap_or(0)
}

fn end_of(key: u16) -> (u16, Option<&'static str>) {
    let key = key.saturating_sub(1);
    (key / 4, usize::from(key % 4).checked_sub(1).map(|place| BROKEN[place]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(path: &str, status: u16, broken: Option<&'static str>) -> Ended {
        let (duration, request_bytes) = (Duration::from_millis(700), Some(3));
        Ended { route: Route::of(path), status, broken, duration, request_bytes, response_bytes: 5 }
    }

    #[test]
    fn series_have_the_labels_of_the_conventions() {
        let metrics = HttpMetrics::default();
        for (method, proto, path, status, broken) in [
            ("POST", None, "/v1/chat/completions", 200, None),
            ("POST", Some("HTTPS"), "/v1/chat/completions", 200, None),
            ("POST", None, "/v1/chat/completions", 503, None),
            ("POST", None, "/v1/chat/completions", 404, None),
            ("POST", None, "/v1/chat/completions", 200, Some("backend_broke")),
            ("POST", None, "/v1/chat/completions", 0, Some("client_gone")),
            ("GET", None, "/v1/models/a", 200, None),
            ("BREW", None, "/coffee", 404, None),
        ] {
            let method = method_name(&method.parse().unwrap());
            metrics.observe(method, scheme(proto.map(str::as_bytes)), &ended(path, status, broken));
        }
        let each = metrics.each();
        let told: Vec<[&str; 5]> =
            each.iter().map(|(l, _)| [l.method, l.route, l.scheme, l.status.as_str(), l.error.as_str()]).collect();
        let chat = "/v1/chat/completions";
        for expected in [
            ["POST", chat, "http", "200", ""],
            ["POST", chat, "https", "200", ""],
            ["POST", chat, "http", "503", "503"],
            ["POST", chat, "http", "404", ""],
            ["POST", chat, "http", "200", "backend_broke"],
            ["POST", chat, "http", "", "client_gone"],
            ["GET", "/v1/models/{id}", "http", "200", ""],
            ["_OTHER", "/*", "http", "404", ""],
        ] {
            assert_eq!(told.iter().filter(|labels| **labels == expected).count(), 1, "{expected:?} in {told:?}");
        }
        assert_eq!(told.len(), 8, "{told:?}");
        let distribution = each[0].1.duration.distribution();
        assert_eq!((distribution.counts.iter().sum::<u64>(), distribution.sum), (1, 0.7));
    }

    #[test]
    fn nothing_that_clients_and_backends_invent_makes_series_without_end() {
        let metrics = HttpMetrics::default();
        for n in 0..2000_u16 {
            let method = method_name(&format!("M{n}").parse().unwrap());
            metrics.observe(method, scheme(Some(b"gopher")), &ended(&format!("/v1/x{n}"), n % 900 + 100, None));
        }
        let each = metrics.each();
        assert_eq!(each.len(), ENDS_MAX + 1);
        let counted: u64 = each.iter().flat_map(|(_, series)| series.duration.distribution().counts).sum();
        assert_eq!(counted, 2000);
        assert_eq!(each[ENDS_MAX].0.error, "_OTHER");
    }
}
