//! How busy the demo backend is, and the page that says so under vLLM's names.
//!
//! Every number is true: it is counted where the thing happens, and a request that its client gave up counts as aborted.
//! Nothing is ever queued here, so `num_requests_waiting` is always 0.

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// So many running requests fill the pretended KV cache.
const KV_SLOTS: u64 = 64;

/// Counters and gauges of one backend.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Requests but probes and control requests, by arrival of their head.
    requests: AtomicU64,
    in_flight: AtomicU64,
    running: AtomicU64,
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    finished: [AtomicU64; 3],
}

/// How a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finished {
    /// The answer was complete.
    Stop,
    /// The request wanted fewer tokens than there were.
    Length,
    /// The client left, or the backend went away.
    Abort,
}

/// One request in flight, from its head to the last byte of its answer. Lives in the handler, then in the response body;
/// dropping it is the only way to end it.
#[derive(Debug)]
pub(super) struct Flight {
    load: Arc<Load>,
    /// Its place among the counted requests, from 1.
    pub(super) number: u64,
    /// Set while it generates.
    generation: Option<Finished>,
}

// === impl Load ===

impl Load {
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }

    /// The Prometheus page. Like vLLM, an engine with several names reports under the first.
    pub(super) fn page(&self, model: &str) -> String {
        let model = model.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        let labels = format!(r#"engine="0",model_name="{model}""#);
        let running = self.running.load(Relaxed);
        let kv_cache = running.min(KV_SLOTS) as f64 / KV_SLOTS as f64;
        let mut page = String::with_capacity(2048);
        let mut family = |name: &str, kind: &str, help: &str, value: f64| {
            // Writing to a String cannot fail.
            let _ = write!(
                page,
                "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\nvllm:{name}{{{labels}}} {value:?}\n"
            );
        };
        let count = |counter: &AtomicU64| counter.load(Relaxed) as f64;
        family("num_requests_running", "gauge", "Requests that are being answered.", running as f64);
        family("num_requests_waiting", "gauge", "Requests that wait; none ever does.", 0.0);
        family("kv_cache_usage_perc", "gauge", "KV-cache usage, 1 = full: running requests of 64.", kv_cache);
        family("num_preemptions_total", "counter", "Preemptions; there are none.", 0.0);
        family("prompt_tokens_total", "counter", "Prompt tokens processed.", count(&self.prompt_tokens));
        family("generation_tokens_total", "counter", "Tokens generated.", count(&self.generation_tokens));
        page.push_str("# HELP vllm:request_success_total Requests by how they ended.\n");
        page.push_str("# TYPE vllm:request_success_total counter\n");
        for (reason, counter) in ["stop", "length", "abort"].iter().zip(&self.finished) {
            let value = count(counter);
            let labels = format!(r#"engine="0",finished_reason="{reason}",model_name="{model}""#);
            let _ = writeln!(page, "vllm:request_success_total{{{labels}}} {value:?}");
        }
        page
    }
}

// === impl Flight ===

impl Flight {
    pub(super) fn begin(load: &Arc<Load>) -> Self {
        load.in_flight.fetch_add(1, Relaxed);
        let number = load.requests.fetch_add(1, Relaxed) + 1;
        Self { load: load.clone(), number, generation: None }
    }

    /// The request is understood and will be answered.
    pub(super) fn admit(&mut self, prompt_tokens: u64) {
        debug_assert!(self.generation.is_none(), "a request must be admitted once");
        self.load.running.fetch_add(1, Relaxed);
        self.load.prompt_tokens.fetch_add(prompt_tokens, Relaxed);
        self.generation = Some(Finished::Abort);
    }

    pub(super) fn generated(&self, tokens: u32) {
        self.load.generation_tokens.fetch_add(u64::from(tokens), Relaxed);
    }

    /// The answer is complete; without this call the request counts as aborted.
    pub(super) fn finish(&mut self, how: Finished) {
        self.generation = self.generation.map(|_| how);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(how) = self.generation {
            self.load.running.fetch_sub(1, Relaxed);
            self.load.finished[how as usize].fetch_add(1, Relaxed);
        }
        self.load.in_flight.fetch_sub(1, Relaxed);
    }
}
