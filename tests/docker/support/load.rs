//! Traffic in the background, and what became of each request.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::{Method, StatusCode};
use tokio::{
    task::JoinSet,
    time::{interval, timeout},
};

use super::{
    client::{self, Broken},
    proxy::Proxy,
};

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    /// When it set out.
    pub(crate) sent_at: SystemTime,
    pub(crate) outcome: Outcome,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// 200 and complete; a stream to its `[DONE]`.
    Served {
        /// The container that answered.
        backend: String,
    },
    /// 503 with `Retry-After`.
    Refused,
    /// Any other status.
    Odd(StatusCode),
    /// No answer, or not all of it.
    Broken(String),
}

/// Requests at a fixed rate, whatever becomes of the earlier ones.
pub(crate) struct Pulse {
    running: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    ticker: tokio::task::JoinHandle<()>,
}

/// Clients that send the next request when the last one is done; every second request is streamed.
pub(crate) struct Load {
    running: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    clients: JoinSet<()>,
}

/// How long a pulse waits for one answer.
const PULSE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a client of a [`Load`] waits for one answer.
const LOAD_PATIENCE: Duration = Duration::from_secs(30);
/// What a client of a [`Load`] waits after a request that failed, as a real one would.
const AFTER_FAILURE: Duration = Duration::from_millis(20);

// === impl Pulse ===

impl Pulse {
    /// Begins to send a chat request for `model` to `proxy` once `every` so often.
    pub(crate) fn start(proxy: &Proxy, model: &str, every: Duration) -> Self {
        let (running, samples) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let (to, model) = (proxy.addr, model.to_owned());
        let (still, record) = (Arc::clone(&running), Arc::clone(&samples));
        let ticker = tokio::spawn(async move {
            let mut requests = JoinSet::new();
            let mut tick = interval(every);
            while still.load(Ordering::Relaxed) {
                tick.tick().await;
                let (model, record) = (model.clone(), Arc::clone(&record));
                requests.spawn(async move {
                    let sample = chat_once(to, &model, false, PULSE_PATIENCE).await;
                    record.lock().unwrap().push(sample);
                });
                while requests.try_join_next().is_some() {}
            }
            requests.join_all().await;
        });
        Self { running, samples, ticker }
    }

    /// Whether the latest request that is done was served.
    pub(crate) fn serves(&self) -> bool {
        self.samples.lock().unwrap().last().is_some_and(Sample::was_served)
    }

    /// Ends, waits for what is under way, and returns everything in the order of sending.
    pub(crate) async fn stop(self) -> Vec<Sample> {
        self.running.store(false, Ordering::Relaxed);
        self.ticker.await.unwrap();
        in_order(&self.samples)
    }
}

// === impl Load ===

impl Load {
    /// Begins with `clients` clients.
    pub(crate) fn start(proxy: &Proxy, model: &str, clients: usize) -> Self {
        Self::start_at(proxy.addr, model, clients)
    }

    /// As [`start`](Self::start), with what listens at this address in front of the proxies.
    pub(crate) fn start_at(to: SocketAddr, model: &str, clients: usize) -> Self {
        let (running, samples) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        for client in 0..clients {
            let model = model.to_owned();
            let (still, record) = (Arc::clone(&running), Arc::clone(&samples));
            tasks.spawn(async move {
                let mut streamed = client % 2 == 0;
                while still.load(Ordering::Relaxed) {
                    let sample = chat_once(to, &model, streamed, LOAD_PATIENCE).await;
                    let failed = !matches!(sample.outcome, Outcome::Served { .. });
                    record.lock().unwrap().push(sample);
                    streamed = !streamed;
                    if failed {
                        tokio::time::sleep(AFTER_FAILURE).await;
                    }
                }
            });
        }
        Self { running, samples, clients: tasks }
    }

    /// How many requests have been served.
    pub(crate) fn served(&self) -> usize {
        self.samples.lock().unwrap().iter().filter(|sample| sample.was_served()).count()
    }

    /// Whether `backend` has answered any yet.
    pub(crate) fn has_reached(&self, backend: &str) -> bool {
        self.samples.lock().unwrap().iter().any(|sample| sample.was_served_by(backend))
    }

    /// Ends, waits for what is under way, and returns everything in the order of sending.
    pub(crate) async fn stop(self) -> Vec<Sample> {
        self.running.store(false, Ordering::Relaxed);
        self.clients.join_all().await;
        in_order(&self.samples)
    }
}

// === impl Sample ===

impl Sample {
    /// Answered with 200, and completely.
    pub(crate) fn was_served(&self) -> bool {
        matches!(self.outcome, Outcome::Served { .. })
    }

    /// As [`was_served`](Self::was_served), by this container.
    pub(crate) fn was_served_by(&self, name: &str) -> bool {
        matches!(&self.outcome, Outcome::Served { backend } if backend == name)
    }
}

/// The samples that set out later than `allowance` after `moment`.
pub(crate) fn sent_after(samples: &[Sample], moment: SystemTime, allowance: Duration) -> Vec<&Sample> {
    samples.iter().filter(|sample| sample.sent_at > moment + allowance).collect()
}

/// What was not [`Outcome::Served`], for a message: `4 × Refused, 1 × Broken("...")`.
pub(crate) fn failures(samples: &[Sample]) -> String {
    let mut counts: Vec<(usize, &Outcome)> = Vec::new();
    for sample in samples.iter().filter(|sample| !sample.was_served()) {
        match counts.iter_mut().find(|(_, outcome)| *outcome == &sample.outcome) {
            Some((count, _)) => *count += 1,
            None => counts.push((1, &sample.outcome)),
        }
    }
    counts.iter().map(|(count, outcome)| format!("{count} × {outcome:?}")).collect::<Vec<_>>().join(", ")
}

async fn chat_once(to: SocketAddr, model: &str, streamed: bool, patience: Duration) -> Sample {
    let sent_at = SystemTime::now();
    let outcome = timeout(patience, exchange(to, model, streamed)).await;
    let outcome = outcome.unwrap_or_else(|_| Err(Broken(format!("no complete answer in {patience:?}"))));
    let outcome = outcome.unwrap_or_else(|broken| Outcome::Broken(broken.0));
    Sample { sent_at, outcome }
}

async fn exchange(to: SocketAddr, model: &str, streamed: bool) -> Result<Outcome, Broken> {
    let body = client::chat_body(model, streamed);
    let reply = client::send(to, Method::POST, "/v1/chat/completions", Some(&body)).await?;
    let (status, retry_after) = (reply.status, reply.headers.contains_key(http::header::RETRY_AFTER));
    let backend = reply.backend().unwrap_or_default().to_owned();
    let ending = reply.ending().await;
    if let Some(broken) = ending.cut {
        return Err(broken);
    }
    Ok(match status {
        StatusCode::OK if streamed && !ending.is_complete() => Outcome::Broken("no [DONE]".to_owned()),
        StatusCode::OK => Outcome::Served { backend },
        StatusCode::SERVICE_UNAVAILABLE if retry_after => Outcome::Refused,
        other => Outcome::Odd(other),
    })
}

fn in_order(samples: &Mutex<Vec<Sample>>) -> Vec<Sample> {
    let mut samples = samples.lock().unwrap().clone();
    samples.sort_by_key(|sample| sample.sent_at);
    samples
}
