//! What an engine says of its own load, and how long to believe it.
//!
//! Requests that this proxy has in flight at a backend are counted exactly by the proxy itself. An engine tells
//! of the requests that come to it by other ways: other proxies, other clients. That share is taken from its metrics page about once a
//! second; what happens in between is known from the proxy's own count. When an engine has said nothing for a while it is
//! neither idle nor dead: nothing is known.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

/// How long a report is believed.
const BELIEVED_MS: u64 = 5_000;

/// Requests at an engine, by its own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineLoad {
    /// In its queue.
    pub waiting: u32,
    /// Being worked on.
    pub running: u32,
}

/// The last report of one backend: one word, so that readers never see half of one.
#[derive(Debug)]
pub struct ReportedLoad {
    /// Above, requests that are not ours; below, when that was so: milliseconds since `born`, plus 1. 0: never.
    word: AtomicU64,
    born: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gauge {
    Waiting,
    Running,
}

/// The gauges of each engine that is understood: vLLM, SGLang, llama.cpp. All series of a name are added up, because
/// vLLM has one per data-parallel rank and SGLang one per scheduler; SGLang has two queues.
const ENGINES: [&[(&[u8], Gauge)]; 3] = [
    &[(b"vllm:num_requests_waiting", Gauge::Waiting), (b"vllm:num_requests_running", Gauge::Running)],
    &[
        (b"sglang:num_queue_reqs", Gauge::Waiting),
        (b"sglang:num_grammar_queue_reqs", Gauge::Waiting),
        (b"sglang:num_running_reqs", Gauge::Running),
    ],
    &[(b"llamacpp:requests_deferred", Gauge::Waiting), (b"llamacpp:requests_processing", Gauge::Running)],
];

/// Bits for the time: 34 years.
const WHEN_BITS: u32 = 40;
const WHEN_MAX: u64 = (1 << WHEN_BITS) - 1;
const OTHERS_MAX: u64 = (1 << (u64::BITS - WHEN_BITS)) - 1;

// === impl EngineLoad ===

impl EngineLoad {
    /// Reads a page in Prometheus' text format, version 0.0.4
    /// (<https://prometheus.io/docs/instrumenting/exposition_formats/>). `None` if no known engine says anything of use on
    /// it: then nothing is known, which is not the same as no load. Lines that make no sense are passed over, and so are
    /// values that no count can have. On a page of several engines the first one counts.
    pub fn parse(page: &[u8]) -> Option<EngineLoad> {
        let mut load: Option<EngineLoad> = None;
        let mut engine: Option<usize> = None;
        for line in page.split(|byte| *byte == b'\n') {
            let Some((owner, gauge, rest)) = gauge_of(line) else { continue };
            if engine.is_some_and(|engine| engine != owner) {
                continue;
            }
            let Some(value) = value_of(rest) else { continue };
            engine = Some(owner);
            let load = load.get_or_insert_default();
            let sum = match gauge {
                Gauge::Waiting => &mut load.waiting,
                Gauge::Running => &mut load.running,
            };
            *sum = sum.saturating_add(value);
        }
        load
    }

    /// Waiting and running.
    pub fn total(self) -> u64 {
        u64::from(self.waiting) + u64::from(self.running)
    }
}

/// The engine whose gauge a line shows, and the rest of the line behind its name.
fn gauge_of(line: &[u8]) -> Option<(usize, Gauge, &[u8])> {
    // Most lines of a page end here.
    if !matches!(line.first(), Some(b'v' | b's' | b'l')) {
        return None;
    }
    let gauges = ENGINES.iter().enumerate().flat_map(|(owner, gauges)| gauges.iter().map(move |gauge| (owner, gauge)));
    gauges.into_iter().find_map(|(owner, (name, gauge))| {
        let rest = line.strip_prefix(*name)?;
        // Else it is a longer name.
        matches!(rest.first(), Some(b'{' | b' ' | b'\t')).then_some((owner, *gauge, rest))
    })
}

/// The value that follows a name and its labels; a timestamp may follow it.
fn value_of(rest: &[u8]) -> Option<u32> {
    let rest = rest.trim_ascii_start();
    let rest = match rest.first() {
        Some(b'{') => after_labels(rest)?,
        _ => rest,
    };
    let word = rest.trim_ascii().split(u8::is_ascii_whitespace).next()?;
    let value: f64 = std::str::from_utf8(word).ok()?.parse().ok()?;
    // A cast of what is too large gives the largest.
    (value.is_finite() && value >= 0.0).then_some(value.round() as u32)
}

/// What follows `{…}`. Values of labels are quoted, may hold braces, and escape quotes with a backslash.
fn after_labels(labels: &[u8]) -> Option<&[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    let end = labels.iter().position(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return true,
            _ => {}
        }
        false
    })?;
    labels.get(end + 1..)
}

// === impl ReportedLoad ===

impl ReportedLoad {
    /// Nothing reported yet.
    pub fn new(now: Instant) -> ReportedLoad {
        ReportedLoad { word: AtomicU64::new(0), born: now }
    }

    /// Takes in a report. `in_flight` is how many requests of ours the backend had when it was asked.
    pub fn set(&self, load: EngineLoad, in_flight: u64, now: Instant) {
        // Fewer than ours: it has ended some whose answers are still on their way, or has not taken in some yet.
        let others = load.total().saturating_sub(in_flight).min(OTHERS_MAX);
        self.word.store(others << WHEN_BITS | (self.clock_ms(now) + 1), Ordering::Relaxed);
    }

    /// Requests at the backend now, with `in_flight` of ours: what it last reported, corrected by what ours have changed
    /// by since. Never fewer than ours. `None` if it has reported nothing for five seconds.
    pub fn estimate(&self, in_flight: u64, now: Instant) -> Option<u64> {
        // The correction needs no arithmetic of its own: reported - ours then + ours now = others + ours now.
        let word = self.word.load(Ordering::Relaxed);
        let reported_at = (word & WHEN_MAX).checked_sub(1)?;
        let age_ms = self.clock_ms(now).saturating_sub(reported_at);
        (age_ms <= BELIEVED_MS).then(|| (word >> WHEN_BITS).saturating_add(in_flight))
    }

    fn clock_ms(&self, now: Instant) -> u64 {
        let since: Duration = now.saturating_duration_since(self.born);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX).min(WHEN_MAX - 1)
    }
}

#[cfg(test)]
mod tests;
