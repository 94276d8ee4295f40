//! Instruments.
//!
//! Recording is a few atomic additions: no lock, no allocation, no label lookup; each part that records holds its instrument.
//! Label values come from our own sets only (models and backends in the routing table), so a client cannot create series,
//! and series vanish with what they describe.

use std::{
    fmt::Display,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{
    http_server::HttpMetrics,
    kinds::{ContainerState, PerKind, ProbeFailure, Retry, TableAction},
    operation::Operation,
};
use crate::{
    base::error::ProxyError,
    wire::scan::{Finish, Usage},
};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The buckets of a histogram.
#[derive(Debug)]
pub struct Scale {
    /// Upper bounds, inclusive.
    pub bounds: &'static [f64],
    /// Sums are kept in whole numbers; so many of them make one.
    parts_per_unit: f64,
}

/// Seconds of a whole request: the buckets that OpenTelemetry advises for `http.server.request.duration`, finer where most
/// requests are, and far beyond what web servers use, because generation takes minutes.
pub static REQUEST_SECONDS: Scale = Scale {
    bounds: &[
        0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 5.0, 7.5, 10.0, 15.0,
        20.0, 30.0, 40.0, 60.0, 80.0, 160.0, 320.0, 640.0,
    ],
    parts_per_unit: 1e6,
};

/// Seconds. Generation takes minutes, so the scale goes far beyond what web servers use.
pub static SECONDS: Scale = Scale {
    bounds: &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0],
    parts_per_unit: 1e6,
};

/// Seconds to the first token: the buckets that OpenTelemetry advises for `gen_ai.server.time_to_first_token`, finer where
/// people look, and a few more because long prompts take long.
pub static FIRST_TOKEN_SECONDS: Scale = Scale {
    bounds: &[
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5,
        10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0,
    ],
    parts_per_unit: 1e6,
};

/// Seconds per token: the buckets that OpenTelemetry advises for `gen_ai.server.time_per_output_token`, and finer ones up to
/// 50 ms, where engines are.
pub static PER_TOKEN_SECONDS: Scale = Scale {
    bounds: &[
        0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.0175, 0.02, 0.0225, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.075,
        0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    ],
    parts_per_unit: 1e9,
};

/// Seconds of what should take no time.
pub static SHORT_SECONDS: Scale = Scale {
    bounds: &[
        0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
        1.0, 2.5, 5.0, 10.0,
    ],
    parts_per_unit: 1e9,
};

/// Tokens of one request, in the buckets that OpenTelemetry advises for `gen_ai.client.token.usage`.
pub static TOKENS: Scale = Scale {
    bounds: &[
        1.0,
        4.0,
        16.0,
        64.0,
        256.0,
        1024.0,
        4096.0,
        16384.0,
        65536.0,
        262_144.0,
        1_048_576.0,
        4_194_304.0,
        16_777_216.0,
        67_108_864.0,
    ],
    parts_per_unit: 1.0,
};

/// Bytes of one body, in powers of four.
pub static BYTES: Scale = Scale {
    bounds: &[
        64.0,
        256.0,
        1024.0,
        4096.0,
        16384.0,
        65536.0,
        262_144.0,
        1_048_576.0,
        4_194_304.0,
        16_777_216.0,
        67_108_864.0,
        268_435_456.0,
    ],
    parts_per_unit: 1.0,
};

/// Values, counted by bucket.
#[derive(Debug)]
pub struct Histogram {
    scale: &'static Scale,
    buckets: Box<[AtomicU64]>,
    sum_parts: AtomicU64,
}

/// What a histogram holds at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// Upper bounds, inclusive; what is above the last one has a bucket of its own.
    pub bounds: &'static [f64],
    /// How many fell into each bucket: one more than there are bounds.
    pub counts: Vec<u64>,
    /// The sum of all of them.
    pub sum: f64,
}

impl Histogram {
    /// An empty one.
    pub fn new(scale: &'static Scale) -> Histogram {
        let buckets = (0..=scale.bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Histogram { scale, buckets, sum_parts: AtomicU64::new(0) }
    }

    /// Counts one duration, on a scale of seconds.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        // a duration is not negative; this saturates
        self.add(seconds, (seconds * self.scale.parts_per_unit).round() as u64);
    }

    /// Counts one number of things.
    pub fn observe_count(&self, n: u64) {
        self.add(n as f64, n);
    }

    fn add(&self, value: f64, parts: u64) {
        let bucket = self.scale.bounds.partition_point(|bound| *bound < value);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_parts.fetch_add(parts, Relaxed);
    }

    /// The sum of all numbers of things counted.
    pub fn total(&self) -> u64 {
        self.sum_parts.load(Relaxed)
    }

    /// Nothing has been counted.
    pub fn is_empty(&self) -> bool {
        self.buckets.iter().all(|bucket| bucket.load(Relaxed) == 0)
    }

    /// What it holds now.
    pub fn distribution(&self) -> Distribution {
        let sum = self.total() as f64 / self.scale.parts_per_unit;
        let counts = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        Distribution { bounds: self.scale.bounds, counts, sum }
    }
}

/// One number for each of a closed set of words. Not for the request path: the word is looked for.
#[derive(Debug)]
pub struct PerWord {
    words: &'static [&'static str],
    numbers: Box<[AtomicU64]>,
}

impl PerWord {
    /// Zero for each of these words.
    pub fn new(words: &'static [&'static str]) -> PerWord {
        PerWord { words, numbers: words.iter().map(|_| AtomicU64::new(0)).collect() }
    }

    fn of(&self, word: &str) -> Option<&AtomicU64> {
        let place = self.words.iter().position(|known| *known == word);
        debug_assert!(place.is_some(), "{word} is none of {:?}", self.words);
        self.numbers.get(place?)
    }

    /// Adds one to the number of this word, which must be one of the set.
    pub fn increment(&self, word: &str) {
        if let Some(number) = self.of(word) {
            number.fetch_add(1, Relaxed);
        }
    }

    /// Every word with its number.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.words.iter().copied().zip(&self.numbers).map(|(word, number)| (word, number.load(Relaxed)))
    }
}

/// The model in series of requests whose model is not known. No backend may announce it.
pub const UNKNOWN_MODEL: &str = "_unknown";

/// How many distinct statuses one model keeps apart; what comes after them is counted as status `other`.
const STATUS_SLOTS: usize = 32;

/// Counts by HTTP status: an append-only table of slots, claimed by compare-and-swap, so counting takes no lock and a
/// backend that invents statuses cannot grow it.
#[derive(Debug, Default)]
pub struct StatusCounts {
    slots: [(AtomicU16, AtomicU64); STATUS_SLOTS],
    other: AtomicU64,
}

impl StatusCounts {
    /// Counts one answer with this status (never 0).
    pub fn increment(&self, status: u16) {
        debug_assert!(status != 0, "0 marks a free slot");
        for (code, count) in &self.slots {
            let mut owner = code.load(Relaxed);
            if owner == 0 {
                owner = match code.compare_exchange(0, status, Relaxed, Relaxed) {
                    Ok(_) => status,
                    Err(winner) => winner,
                };
            }
            if owner == status {
                count.fetch_add(1, Relaxed);
                return;
            }
        }
        self.other.fetch_add(1, Relaxed);
    }

    /// Nothing has been counted.
    pub fn is_empty(&self) -> bool {
        // The first free slot is claimed by the first count of a new word.
        self.slots[0].0.load(Relaxed) == 0
    }

    /// Calls `visit` with every status seen and its count.
    pub fn each(&self, mut visit: impl FnMut(&dyn Display, u64)) {
        for (code, count) in &self.slots {
            match code.load(Relaxed) {
                0 => break,
                code => visit(&code, count.load(Relaxed)),
            }
        }
        match self.other.load(Relaxed) {
            0 => {}
            count => visit(&"other", count),
        }
    }
}

/// Instruments of one model.
#[derive(Debug)]
pub struct ModelMetrics {
    /// By operation, in the order of [`Operation::ALL`]; those of an operation are made with its first request.
    operations: [OnceLock<Box<OperationMetrics>>; Operation::ALL.len()],
    /// How long requests waited in line, those that waited.
    pub queue_wait: Histogram,
}

/// Instruments of one operation of one model.
#[derive(Debug)]
pub struct OperationMetrics {
    /// Requests by the status their client got; 499 when the client left before one.
    pub requests: StatusCounts,
    /// From the request's head to the last byte of its answer.
    pub duration: Histogram,
    /// From the request's head to the first token of its answer; of an answer that is not streamed, to its first byte.
    pub time_to_first_token: Histogram,
    /// From the first token of a streamed answer to its end, by the tokens after the first.
    pub time_per_output_token: Histogram,
    /// Sizes of the bodies of requests that were answered by a backend.
    pub request_bytes: Histogram,
    /// Sizes of the bodies of backends' answers.
    pub response_bytes: Histogram,
    /// Tokens, as backends count them.
    pub tokens: Tokens,
    /// Why answers ended, as backends say it, in the order of [`Finish::ALL`].
    pub finishes: [Counter; Finish::ALL.len()],
}

/// Tokens of one model.
#[derive(Debug)]
pub struct Tokens {
    /// Of prompts, by request.
    pub input: Histogram,
    /// Of prompts, found in a cache; counted in `input` too.
    pub cached_input: Counter,
    /// Generated, by request.
    pub output: Histogram,
    /// Generated while reasoning; counted in `output` too.
    pub reasoning: Counter,
}

impl Default for ModelMetrics {
    fn default() -> ModelMetrics {
        ModelMetrics {
            operations: [const { OnceLock::new() }; Operation::ALL.len()],
            queue_wait: Histogram::new(&SECONDS),
        }
    }
}

impl ModelMetrics {
    /// The instruments of this operation.
    pub fn of(&self, operation: Operation) -> &OperationMetrics {
        self.operations[operation as usize].get_or_init(Box::default)
    }

    /// The operations that were asked for, with their instruments.
    pub fn each(&self) -> impl Iterator<Item = (Operation, &OperationMetrics)> {
        let all = Operation::ALL.into_iter().zip(&self.operations);
        let made = all.filter_map(|(operation, metrics)| Some((operation, &**metrics.get()?)));
        made.filter(|(_, metrics)| !metrics.requests.is_empty())
    }

    /// No request has ended.
    pub fn is_empty(&self) -> bool {
        self.each().next().is_none()
    }
}

impl Default for OperationMetrics {
    fn default() -> OperationMetrics {
        OperationMetrics {
            requests: StatusCounts::default(),
            duration: Histogram::new(&REQUEST_SECONDS),
            time_to_first_token: Histogram::new(&FIRST_TOKEN_SECONDS),
            time_per_output_token: Histogram::new(&PER_TOKEN_SECONDS),
            request_bytes: Histogram::new(&BYTES),
            response_bytes: Histogram::new(&BYTES),
            tokens: Tokens {
                input: Histogram::new(&TOKENS),
                cached_input: Counter::default(),
                output: Histogram::new(&TOKENS),
                reasoning: Counter::default(),
            },
            finishes: std::array::from_fn(|_| Counter::default()),
        }
    }
}

impl OperationMetrics {
    /// A request has ended.
    pub fn request_done(&self, status: u16, duration: Duration) {
        self.requests.increment(status);
        self.duration.observe(duration);
    }

    /// An answer has told what it took.
    pub fn answer_told(&self, usage: &Usage) {
        for (histogram, tokens) in
            [(&self.tokens.input, usage.input_tokens), (&self.tokens.output, usage.output_tokens)]
        {
            if let Some(tokens) = tokens {
                histogram.observe_count(tokens);
            }
        }
        self.tokens.cached_input.add(usage.cached_input_tokens.unwrap_or(0));
        self.tokens.reasoning.add(usage.reasoning_tokens.unwrap_or(0));
        if let Some(finish) = usage.finish
            && let Some(index) = Finish::ALL.iter().position(|known| *known == finish)
        {
            self.finishes[index].increment();
        }
    }

    /// A streamed answer has come whole: so many tokens, the last of them so long after the first.
    pub fn streamed(&self, output_tokens: u64, after_first: Duration) {
        // The first token is the end of another wait.
        if let Some(later) = u32::try_from(output_tokens).ok().and_then(|n| n.checked_sub(1)).filter(|n| *n > 0) {
            self.time_per_output_token.observe(after_first / later);
        }
    }
}

/// How far a request was when its client left.
pub const DISCONNECT_PHASES: &[&str] = &["upload", "queue", "before_first_byte", "mid_answer"];
/// What ended an answer that had begun.
pub const CUT_REASONS: &[&str] = &["ended", "stopped", "framing", "silent", "request"];
/// Instruments that belong to no model.
#[derive(Debug)]
pub struct Metrics {
    /// Requests whose model no backend has ever announced, or that named none.
    pub unknown: ModelMetrics,
    /// Requests as OpenTelemetry counts them, where metrics are sent to a collector.
    pub http: Option<HttpMetrics>,
    /// Time that the proxy itself added to a request: what `proxy_overhead_seconds` says.
    pub overhead: Histogram,
    /// Errors that the proxy answered with, by their code.
    pub rejected: PerWord,
    /// Clients that left, by how far their request was: [`DISCONNECT_PHASES`].
    pub disconnects: PerWord,
    /// Answers that broke off, by what ended them: [`CUT_REASONS`].
    pub cuts: PerWord,
    /// Connections to backends that were opened for a request.
    pub upstream_opened: Counter,
    /// Connections to backends that were used once more.
    pub upstream_reused: Counter,
    /// Connections of clients that were accepted.
    pub clients_accepted: Counter,
    /// Those of them that have ended.
    pub clients_closed: Counter,
    /// Labelled containers by state.
    pub backends: PerKind<ContainerState>,
    /// Changes of state, by the one entered.
    pub transitions: PerKind<ContainerState>,
    /// From a stop notice to the end of the last request.
    pub drains: Histogram,
    /// How long probes took.
    pub probes: Histogram,
    /// Probes without a usable answer.
    pub probe_failures: PerKind<ProbeFailure>,
    /// What discovery sees and hears.
    pub discovery: DiscoveryMetrics,
    /// Changes of the routing table.
    pub table_updates: PerKind<TableAction>,
    /// Requests that were sent once more, by reason.
    pub retries: PerKind<Retry>,
}

/// Instruments of discovery.
#[derive(Debug)]
pub struct DiscoveryMetrics {
    /// It sees.
    pub connected: AtomicBool,
    /// When it last had the whole list, in milliseconds since 1970; 0: never.
    pub last_sync_ms: AtomicU64,
    /// From an event's own time to its arrival.
    pub event_lag: Histogram,
    /// Events by action; the source brings the words.
    pub events: OnceLock<PerWord>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            http: None,
            unknown: ModelMetrics::default(),
            overhead: Histogram::new(&SHORT_SECONDS),
            rejected: PerWord::new(ProxyError::CODES),
            disconnects: PerWord::new(DISCONNECT_PHASES),
            cuts: PerWord::new(CUT_REASONS),
            upstream_opened: Counter::default(),
            upstream_reused: Counter::default(),
            clients_accepted: Counter::default(),
            clients_closed: Counter::default(),
            backends: PerKind::default(),
            transitions: PerKind::default(),
            drains: Histogram::new(&SECONDS),
            probes: Histogram::new(&SECONDS),
            probe_failures: PerKind::default(),
            discovery: DiscoveryMetrics {
                connected: AtomicBool::new(false),
                last_sync_ms: AtomicU64::new(0),
                event_lag: Histogram::new(&SHORT_SECONDS),
                events: OnceLock::new(),
            },
            table_updates: PerKind::default(),
            retries: PerKind::default(),
        }
    }
}

impl Metrics {
    /// Instruments of a proxy whose metrics are sent to a collector, if `is_sent`.
    pub fn sent(is_sent: bool) -> Metrics {
        Metrics { http: is_sent.then(HttpMetrics::default), ..Metrics::default() }
    }
}

#[cfg(test)]
mod tests;
