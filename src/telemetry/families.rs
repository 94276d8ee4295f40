//! Every metric there is: what it is called and what it means, in each of the places where it is told.
//!
//! This table is what `/metrics`, OTLP, the table of `docs/metrics.md` and the dashboard are checked against. A new
//! instrument gets a row here and its series in [`crate::observe::report`].

/// One metric.
#[derive(Debug)]
pub struct Family {
    /// Its name in Prometheus, with unit and `_total`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
    /// Its names over OTLP: the proxy's own first, then those of conventions that mean the same.
    pub otlp: &'static [OtlpName],
}

/// Kinds of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Values by bucket.
    Histogram,
}

/// A name over OTLP.
#[derive(Debug)]
pub struct OtlpName {
    /// The name, with dots.
    pub name: &'static str,
    /// Its unit in UCUM, as OpenTelemetry writes them.
    pub unit: &'static str,
    /// How its labels are called.
    pub naming: Naming,
}

/// Which convention names the labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// This proxy: as in Prometheus.
    Own,
    /// OpenTelemetry's conventions for HTTP and for generative AI.
    Conventions,
}

impl Kind {
    /// As Prometheus writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

impl Family {
    /// Its unit as Prometheus writes it, if it has one: the base unit in its name.
    pub fn unit(&self) -> Option<&'static str> {
        let name = self.name.strip_suffix("_total").unwrap_or(self.name);
        ["seconds", "bytes"].into_iter().find(|unit| name.strip_suffix(unit).is_some_and(|rest| rest.ends_with('_')))
    }
}

const fn own(name: &'static str, unit: &'static str) -> OtlpName {
    OtlpName { name, unit, naming: Naming::Own }
}

const fn convention(name: &'static str, unit: &'static str) -> OtlpName {
    OtlpName { name, unit, naming: Naming::Conventions }
}

/// Requests by the status that their client got.
pub static REQUESTS: Family = Family {
    name: "proxy_requests_total",
    kind: Kind::Counter,
    labels: &["model", "status", "operation"],
    help: "Requests by model, operation and the status their client got; 499: it left first.",
    otlp: &[own("proxy.requests.total", "{request}")],
};

/// How long requests took.
pub static DURATION: Family = Family {
    name: "proxy_request_duration_seconds",
    kind: Kind::Histogram,
    labels: &["model", "operation"],
    help: "From a request's head to the end of its answer.",
    otlp: &[own("proxy.request.duration", "s"), convention("gen_ai.server.request.duration", "s")],
};

/// How soon answers began.
pub static FIRST_TOKEN: Family = Family {
    name: "proxy_time_to_first_token_seconds",
    kind: Kind::Histogram,
    labels: &["model", "operation"],
    help: "From a request's head to the first token of its answer.",
    otlp: &[own("proxy.time_to_first_token", "s"), convention("gen_ai.server.time_to_first_token", "s")],
};

/// How fast answers went on.
pub static PER_TOKEN: Family = Family {
    name: "proxy_time_per_output_token_seconds",
    kind: Kind::Histogram,
    labels: &["model", "operation"],
    help: "From the first token of a streamed answer to its end, by the tokens after the first.",
    otlp: &[own("proxy.time_per_output_token", "s"), convention("gen_ai.server.time_per_output_token", "s")],
};

/// Tokens in all.
pub static TOKENS: Family = Family {
    name: "proxy_tokens_total",
    kind: Kind::Counter,
    labels: &["model", "type", "operation"],
    help: "Tokens as backends count them; cached_input is part of input, reasoning of output.",
    otlp: &[own("proxy.tokens.total", "{token}")],
};

/// Tokens by request.
pub static REQUEST_TOKENS: Family = Family {
    name: "proxy_request_tokens",
    kind: Kind::Histogram,
    labels: &["model", "type", "operation"],
    help: "Tokens of one request as backends count them.",
    otlp: &[own("proxy.request.tokens", "{token}"), convention("gen_ai.client.token.usage", "{token}")],
};

/// Why answers ended.
pub static FINISHES: Family = Family {
    name: "proxy_finish_reasons_total",
    kind: Kind::Counter,
    labels: &["model", "reason", "operation"],
    help: "Why answers ended, as backends say it.",
    otlp: &[own("proxy.finish_reasons.total", "{answer}")],
};

/// Sizes of requests.
pub static REQUEST_BYTES: Family = Family {
    name: "proxy_request_body_bytes",
    kind: Kind::Histogram,
    labels: &["model", "operation"],
    help: "Size of the bodies of requests that a backend answered.",
    otlp: &[own("proxy.request.body.size", "By")],
};

/// Sizes of answers.
pub static RESPONSE_BYTES: Family = Family {
    name: "proxy_response_body_bytes",
    kind: Kind::Histogram,
    labels: &["model", "operation"],
    help: "Size of the bodies of backends' answers, as far as they were passed on.",
    otlp: &[own("proxy.response.body.size", "By")],
};

/// The time that the proxy itself took.
pub static OVERHEAD: Family = Family {
    name: "proxy_overhead_seconds",
    kind: Kind::Histogram,
    labels: &[],
    help: "Time that the proxy itself added: head read to request sent, and answer's head read to passed on; without waits.",
    otlp: &[own("proxy.overhead", "s")],
};

/// What the proxy answered itself.
pub static REJECTED: Family = Family {
    name: "proxy_rejected_total",
    kind: Kind::Counter,
    labels: &["reason"],
    help: "Requests that the proxy itself answered with an error, by the error's code.",
    otlp: &[own("proxy.rejected", "{request}")],
};

/// Clients that left.
pub static DISCONNECTS: Family = Family {
    name: "proxy_client_disconnects_total",
    kind: Kind::Counter,
    labels: &["phase"],
    help: "Clients that left before the end of their answer, by how far it was.",
    otlp: &[own("proxy.client.disconnects", "{request}")],
};

/// Answers that broke off.
pub static CUTS: Family = Family {
    name: "proxy_answers_cut_total",
    kind: Kind::Counter,
    labels: &["reason"],
    help: "Answers that broke off after they had begun, by what ended them.",
    otlp: &[own("proxy.answers.cut", "{answer}")],
};

/// Load of backends.
pub static INFLIGHT: Family = Family {
    name: "proxy_backend_inflight",
    kind: Kind::Gauge,
    labels: &["backend", "model"],
    help: "Requests that a backend is serving.",
    otlp: &[own("proxy.backend.inflight", "{request}")],
};

/// Load of backends as they say it.
pub static LOAD: Family = Family {
    name: "proxy_backend_load",
    kind: Kind::Gauge,
    labels: &["backend"],
    help: "Requests at a backend by its own account; absent if it tells none.",
    otlp: &[own("proxy.backend.load", "{request}")],
};

/// Breakers.
pub static BREAKER_STATE: Family = Family {
    name: "proxy_backend_breaker_state",
    kind: Kind::Gauge,
    labels: &["backend"],
    help: "Circuit breaker: 0 closed, 1 half-open, 2 open.",
    otlp: &[own("proxy.backend.breaker_state", "1")],
};

/// How often breakers opened.
pub static BREAKER_TRIPS: Family = Family {
    name: "proxy_backend_breaker_trips_total",
    kind: Kind::Counter,
    labels: &["backend"],
    help: "How often a backend's circuit breaker has opened.",
    otlp: &[own("proxy.backend.breaker.trips", "{trip}")],
};

/// Lines.
pub static QUEUE_DEPTH: Family = Family {
    name: "proxy_queue_depth",
    kind: Kind::Gauge,
    labels: &["model"],
    help: "Requests that wait for a place on a backend.",
    otlp: &[own("proxy.queue.depth", "{request}")],
};

/// Waiting in lines.
pub static QUEUE_WAIT: Family = Family {
    name: "proxy_queue_wait_seconds",
    kind: Kind::Histogram,
    labels: &["model"],
    help: "How long requests waited for a place, those that had to.",
    otlp: &[own("proxy.queue.wait", "s")],
};

/// Second attempts.
pub static RETRIES: Family = Family {
    name: "proxy_retries_total",
    kind: Kind::Counter,
    labels: &["reason"],
    help: "Requests sent once more, by the reason.",
    otlp: &[own("proxy.retries.total", "{request}")],
};

/// Connections to backends.
pub static UPSTREAM_CONNECTIONS: Family = Family {
    name: "proxy_upstream_connections_total",
    kind: Kind::Counter,
    labels: &["kind"],
    help: "Connections to backends taken for a request: opened for it, or reused.",
    otlp: &[own("proxy.upstream.connections", "{connection}")],
};

/// Clients that are connected.
pub static CLIENTS: Family = Family {
    name: "proxy_client_connections",
    kind: Kind::Gauge,
    labels: &[],
    help: "Open connections of clients.",
    otlp: &[own("proxy.client.connections", "{connection}")],
};

/// Clients that have connected.
pub static CLIENTS_ACCEPTED: Family = Family {
    name: "proxy_client_connections_accepted_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Connections of clients accepted so far.",
    otlp: &[own("proxy.client.connections.accepted", "{connection}")],
};

/// Backends in rotation.
pub static ACTIVE: Family = Family {
    name: "proxy_backends_active",
    kind: Kind::Gauge,
    labels: &[],
    help: "Backends that may get requests.",
    otlp: &[own("proxy.backends.active", "{backend}")],
};

/// Containers by state.
pub static BACKENDS: Family = Family {
    name: "proxy_backends",
    kind: Kind::Gauge,
    labels: &["state"],
    help: "Labelled containers by state.",
    otlp: &[own("proxy.backends", "{backend}")],
};

/// Changes of state.
pub static TRANSITIONS: Family = Family {
    name: "proxy_backend_transitions_total",
    kind: Kind::Counter,
    labels: &["state"],
    help: "Changes of containers' states, by the state entered.",
    otlp: &[own("proxy.backend.transitions", "{transition}")],
};

/// Drains.
pub static DRAINS: Family = Family {
    name: "proxy_drain_duration_seconds",
    kind: Kind::Histogram,
    labels: &[],
    help: "From a container's stop notice to the end of its last request.",
    otlp: &[own("proxy.drain.duration", "s")],
};

/// Probes.
pub static PROBES: Family = Family {
    name: "proxy_probe_duration_seconds",
    kind: Kind::Histogram,
    labels: &[],
    help: "How long backends took to tell their health and their models, or to fail to.",
    otlp: &[own("proxy.probe.duration", "s")],
};

/// Probes without a usable answer.
pub static PROBE_FAILURES: Family = Family {
    name: "proxy_probe_failures_total",
    kind: Kind::Counter,
    labels: &["reason"],
    help: "Probes without a usable answer, by the reason.",
    otlp: &[own("proxy.probe.failures", "{probe}")],
};

/// Changes of the routing table.
pub static TABLE_UPDATES: Family = Family {
    name: "proxy_routing_table_updates_total",
    kind: Kind::Counter,
    labels: &["action"],
    help: "Changes of the routing table by action.",
    otlp: &[own("proxy.routing_table.updates", "{update}")],
};

/// Whether discovery sees.
pub static CONNECTED: Family = Family {
    name: "proxy_discovery_connected",
    kind: Kind::Gauge,
    labels: &[],
    help: "1 while discovery sees the containers, 0 while it cannot.",
    otlp: &[own("proxy.discovery.connected", "1")],
};

/// When discovery last saw everything.
pub static LAST_SYNC: Family = Family {
    name: "proxy_discovery_last_sync_timestamp_seconds",
    kind: Kind::Gauge,
    labels: &[],
    help: "When discovery last had the whole list of containers, in seconds since 1970; 0: never.",
    otlp: &[own("proxy.discovery.last_sync", "s")],
};

/// What discovery heard.
pub static EVENTS: Family = Family {
    name: "proxy_discovery_events_total",
    kind: Kind::Counter,
    labels: &["action"],
    help: "Events of the container engine, without repetitions.",
    otlp: &[own("proxy.discovery.events", "{event}")],
};

/// How late discovery heard it.
pub static EVENT_LAG: Family = Family {
    name: "proxy_discovery_event_lag_seconds",
    kind: Kind::Histogram,
    labels: &[],
    help: "From an event's own time to its arrival here.",
    otlp: &[own("proxy.discovery.event_lag", "s")],
};

/// Lines of the log that got lost.
pub static LOG_DROPPED: Family = Family {
    name: "proxy_log_lines_dropped_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Lines of the log that were dropped, as nobody took them in time.",
    otlp: &[own("proxy.log.lines.dropped", "{line}")],
};

/// What runs.
pub static BUILD: Family = Family {
    name: "proxy_build_info",
    kind: Kind::Gauge,
    labels: &["version"],
    help: "Always 1; the label says what runs.",
    otlp: &[own("proxy.build.info", "1")],
};

/// Processor time.
pub static CPU: Family = Family {
    name: "process_cpu_seconds_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Processor time of the proxy's process, user and system.",
    otlp: &[own("process.cpu.time", "s")],
};

/// Memory.
pub static MEMORY: Family = Family {
    name: "process_resident_memory_bytes",
    kind: Kind::Gauge,
    labels: &[],
    help: "Memory of the proxy's process.",
    otlp: &[own("process.memory.usage", "By")],
};

/// Files.
pub static FILES: Family = Family {
    name: "process_open_fds",
    kind: Kind::Gauge,
    labels: &[],
    help: "Open files of the proxy's process, connections included.",
    otlp: &[own("process.open_file_descriptor.count", "{file_descriptor}")],
};

/// Most files.
pub static FILES_MAX: Family = Family {
    name: "process_max_fds",
    kind: Kind::Gauge,
    labels: &[],
    help: "Most files that the proxy's process may have open.",
    otlp: &[own("process.max_file_descriptor.count", "{file_descriptor}")],
};

/// Start of the process.
pub static STARTED: Family = Family {
    name: "process_start_time_seconds",
    kind: Kind::Gauge,
    labels: &[],
    help: "When the proxy's process was started, in seconds since 1970.",
    otlp: &[own("process.start_time", "s")],
};

/// What requests are called in OpenTelemetry's conventions for HTTP servers. These are told over OTLP alone; the names are
/// those under which Prometheus shows them behind a collector.
const HTTP_LABELS: &[&str] = &["method", "route", "scheme", "status", "error"];

/// How long requests took.
pub static HTTP_DURATION: Family = Family {
    name: "http_server_request_duration_seconds",
    kind: Kind::Histogram,
    labels: HTTP_LABELS,
    help: "Duration of HTTP server requests.",
    otlp: &[convention("http.server.request.duration", "s")],
};

/// Sizes of requests.
pub static HTTP_REQUEST_BYTES: Family = Family {
    name: "http_server_request_body_size_bytes",
    kind: Kind::Histogram,
    labels: HTTP_LABELS,
    help: "Size of HTTP server request bodies.",
    otlp: &[convention("http.server.request.body.size", "By")],
};

/// Sizes of answers.
pub static HTTP_RESPONSE_BYTES: Family = Family {
    name: "http_server_response_body_size_bytes",
    kind: Kind::Histogram,
    labels: HTTP_LABELS,
    help: "Size of HTTP server response bodies.",
    otlp: &[convention("http.server.response.body.size", "By")],
};

/// All that `/metrics` tells, in the order in which they are told.
pub static ALL: &[&Family] = &[
    &REQUESTS,
    &DURATION,
    &FIRST_TOKEN,
    &PER_TOKEN,
    &TOKENS,
    &REQUEST_TOKENS,
    &FINISHES,
    &REQUEST_BYTES,
    &RESPONSE_BYTES,
    &QUEUE_DEPTH,
    &QUEUE_WAIT,
    &OVERHEAD,
    &REJECTED,
    &RETRIES,
    &DISCONNECTS,
    &CUTS,
    &CLIENTS,
    &CLIENTS_ACCEPTED,
    &UPSTREAM_CONNECTIONS,
    &INFLIGHT,
    &LOAD,
    &BREAKER_STATE,
    &BREAKER_TRIPS,
    &ACTIVE,
    &BACKENDS,
    &TRANSITIONS,
    &DRAINS,
    &PROBES,
    &PROBE_FAILURES,
    &TABLE_UPDATES,
    &CONNECTED,
    &LAST_SYNC,
    &EVENTS,
    &EVENT_LAG,
    &LOG_DROPPED,
    &BUILD,
    &CPU,
    &MEMORY,
    &FILES,
    &FILES_MAX,
    &STARTED,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_kind_and_unit_they_are() {
        let mut names = std::collections::HashSet::new();
        for family in ALL {
            let Family { name, kind, help, otlp, labels } = family;
            assert!(names.insert(*name), "{name} is there twice");
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            assert!(help.ends_with('.') && !help.contains('\n'), "{name}: {help}");
            assert!(!labels.contains(&"le"), "{name}");
            assert!(otlp.iter().all(|one| one.name.contains('.') && !one.name.contains(' ')), "{name}");
            let unit = match family.unit() {
                Some("seconds") => "s",
                Some("bytes") => "By",
                _ => continue,
            };
            assert!(otlp.iter().all(|one| one.unit == unit), "{name}");
        }
    }
}
