//! Instruments and their Prometheus text form.
//!
//! Recording is a few atomic additions: no lock, no allocation, no label lookup; whoever records holds the instrument.
//! Label values come from our own sets only (models and backends in the routing table), so a client cannot create series,
//! and series vanish with what they describe.

use std::{
    fmt::{Display, Write as _},
    sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::scan::{Finish, Usage};

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

/// Upper bounds in seconds. Generation takes minutes, so the scale goes far beyond what web servers use.
pub const DURATION_BOUNDS: [f64; 17] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0];

/// Durations, counted by bucket.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; DURATION_BOUNDS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = DURATION_BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_micros.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }
}

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
#[derive(Debug, Default)]
pub struct ModelMetrics {
    /// Requests by the status their client got; 499 when the client left before one.
    pub requests: StatusCounts,
    /// From the request's head to the last byte of its answer.
    pub duration: Histogram,
    /// From the request's head to the first token of its answer; of an answer that is not streamed, to its first byte.
    pub time_to_first_token: Histogram,
    /// Tokens, as backends count them.
    pub tokens: Tokens,
    /// Why answers ended, as backends say it, in the order of [`Finish::ALL`].
    pub finishes: [Counter; Finish::ALL.len()],
}

/// Tokens of one model.
#[derive(Debug, Default)]
pub struct Tokens {
    /// Of prompts.
    pub input: Counter,
    /// Of prompts, found in a cache; counted in `input` too.
    pub cached_input: Counter,
    /// Generated.
    pub output: Counter,
    /// Generated while reasoning; counted in `output` too.
    pub reasoning: Counter,
}

impl ModelMetrics {
    /// A request has ended.
    pub fn request_done(&self, status: u16, duration: Duration) {
        self.requests.increment(status);
        self.duration.observe(duration);
    }

    /// An answer has told what it took.
    pub fn answer_told(&self, usage: &Usage) {
        for (counter, tokens) in [
            (&self.tokens.input, usage.input_tokens),
            (&self.tokens.cached_input, usage.cached_input_tokens),
            (&self.tokens.output, usage.output_tokens),
            (&self.tokens.reasoning, usage.reasoning_tokens),
        ] {
            counter.add(tokens.unwrap_or(0));
        }
        if let Some(finish) = usage.finish
            && let Some(index) = Finish::ALL.iter().position(|known| *known == finish)
        {
            self.finishes[index].increment();
        }
    }
}

/// Why the routing table was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableAction {
    /// A backend came.
    Add,
    /// A backend went.
    Remove,
    /// A backend's models changed.
    Update,
}

/// Instruments that belong to no model.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests whose model no backend has ever announced, or that named none.
    pub unknown: ModelMetrics,
    added: Counter,
    removed: Counter,
    updated: Counter,
}

impl Metrics {
    /// The routing table has changed.
    pub fn table_updated(&self, action: TableAction) {
        match action {
            TableAction::Add => self.added.increment(),
            TableAction::Remove => self.removed.increment(),
            TableAction::Update => self.updated.increment(),
        }
    }

    /// Changes of the routing table so far, by action.
    pub fn table_updates(&self) -> [(&'static str, u64); 3] {
        [("add", self.added.get()), ("remove", self.removed.get()), ("update", self.updated.get())]
    }
}

/// Writes the Prometheus text format, version 0.0.4
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>).
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

impl Exposition {
    /// Begins a metric: its name, type and meaning. Samples follow.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One sample.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
        self.text.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"", if i == 0 { '{' } else { ',' });
            for c in text.to_string().chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// The samples of one histogram; `label` tells it from others of its family.
    pub fn histogram(&mut self, name: &str, label: (&str, &dyn Display), histogram: &Histogram) {
        let mut count = 0;
        let bucket_name = format!("{name}_bucket");
        for (i, bucket) in histogram.buckets.iter().enumerate() {
            count += bucket.load(Relaxed);
            let bound: &dyn Display = DURATION_BOUNDS.get(i).map_or(&"+Inf", |b| b);
            self.sample(&bucket_name, &[label, ("le", bound)], count);
        }
        #[allow(clippy::cast_precision_loss)] // a sum of microseconds in a float: more digits than anyone reads
        let seconds = histogram.sum_micros.load(Relaxed) as f64 / 1e6;
        self.sample(&format!("{name}_sum"), &[label], seconds);
        self.sample(&format!("{name}_count"), &[label], count);
    }

    /// The finished text.
    pub fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_counted_apart_and_bounded() {
        let counts = StatusCounts::default();
        for status in 100..200 {
            counts.increment(status);
            counts.increment(status);
        }
        let mut seen = Vec::new();
        counts.each(|status, count| seen.push((status.to_string(), count)));
        assert_eq!(seen.len(), STATUS_SLOTS + 1);
        assert_eq!(seen[0], ("100".to_owned(), 2));
        assert_eq!(seen[STATUS_SLOTS], ("other".to_owned(), 2 * (100 - STATUS_SLOTS as u64)));
    }

    #[test]
    fn histogram_buckets_are_cumulative_and_bounds_inclusive() {
        let histogram = Histogram::default();
        for ms in [1, 5, 6, 2_000_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut text = Exposition::default();
        text.histogram("d", ("model", &"m"), &histogram);
        let text = text.finish();
        assert!(text.contains("d_bucket{model=\"m\",le=\"0.005\"} 2\n"), "{text}");
        assert!(text.contains("d_bucket{model=\"m\",le=\"0.01\"} 3\n"), "{text}");
        assert!(text.contains("d_bucket{model=\"m\",le=\"+Inf\"} 4\n"), "{text}");
        assert!(text.contains("d_count{model=\"m\"} 4\n"), "{text}");
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = Exposition::default();
        text.sample("x", &[("model", &"a\"b\\c\nd")], 1);
        assert_eq!(text.finish(), "x{model=\"a\\\"b\\\\c\\nd\"} 1\n");
    }
}
