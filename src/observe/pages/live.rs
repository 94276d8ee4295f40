//! The status as it changes: server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>) for the
//! page, and for any other client that asks for `text/event-stream`.
//!
//! There is no task: each watcher's own connection asks once a second, and what one has been told is told to others that
//! ask within that second, so that many watchers cost the registry hardly more than one.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};

use super::Admin;
use crate::{
    base::phase::{Life, Phase},
    observe::status::Status,
};

/// Watchers at a time: a few people with a few tabs each.
pub const WATCHERS_MAX: usize = 16;
/// A watcher is told at most so often.
const EVERY: Duration = Duration::from_secs(1);
/// What was told so recently is told again.
const FRESH: Duration = Duration::from_millis(900);
/// After so long without a change an event says that all is as it was: proxies in between take silence for death after
/// 30 s or more, and a browser does not see that the other end has gone.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How long a watcher that does not read is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How soon a browser that has lost the stream asks for it again.
const RETRY_MS: u32 = 2000;

/// What a stream of events is called.
pub const CONTENT_TYPE: &str = "text/event-stream";

/// Where watchers meet.
#[derive(Debug, Clone)]
pub struct Live {
    places: Arc<Semaphore>,
    latest: Arc<Mutex<Option<Latest>>>,
    life: Life,
}

#[derive(Debug, Clone)]
struct Latest {
    taken: Instant,
    snapshot: Arc<Snapshot>,
}

/// One state of affairs, as it is sent.
#[derive(Debug)]
struct Snapshot {
    /// Without the time it was taken at, to tell whether anything has changed.
    status: Status,
    event: Bytes,
}

/// A client that watches. Dropping it gives its place to another one.
#[derive(Debug)]
pub struct Watcher {
    admin: Admin,
    told: Option<Arc<Snapshot>>,
    /// When something was sent last.
    sent: Option<Instant>,
    ended: bool,
    _place: OwnedSemaphorePermit,
}

/// The head of the stream.
pub fn head() -> Response<()> {
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("accept"));
    // nginx would keep it back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

// === impl Live ===

impl Live {
    /// A meeting place without watchers. All are told a last time, and let go, when the process is told to stop.
    pub fn new(life: Life) -> Live {
        Live { places: Arc::new(Semaphore::new(WATCHERS_MAX)), latest: Arc::default(), life }
    }

    /// One watcher more, unless there are too many or the proxy is shutting down.
    pub(super) fn watcher(&self, admin: &Admin) -> Option<Watcher> {
        if self.life.is_stopping() {
            return None;
        }
        let place = self.places.clone().try_acquire_owned().ok()?;
        Some(Watcher { admin: admin.clone(), told: None, sent: None, ended: false, _place: place })
    }

    fn fresh(&self, now: Instant) -> Option<Arc<Snapshot>> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = latest.as_ref().filter(|latest| latest.taken + FRESH > now)?;
        Some(latest.snapshot.clone())
    }

    fn keep(&self, snapshot: &Arc<Snapshot>, now: Instant) {
        let latest = Latest { taken: now, snapshot: snapshot.clone() };
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(latest);
    }
}

// === impl Snapshot ===

impl Snapshot {
    fn of(mut status: Status) -> Option<Snapshot> {
        // Data may not hold a line's end, and compact JSON holds none.
        let json = serde_json::to_string(&status).ok()?;
        let event = Bytes::from(format!("event: status\ndata: {json}\n\n"));
        status.at.clear();
        Some(Snapshot { status, event })
    }
}

// === impl Watcher ===

impl Watcher {
    /// Waits for the next piece of the stream; `None` when it is over.
    pub async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if self.sent.is_none() {
            self.sent = Some(Instant::now());
            return Some(Bytes::from(format!("retry: {RETRY_MS}\n\n")));
        }
        loop {
            if self.told.is_some() {
                tokio::select! {
                    () = sleep(EVERY) => {}
                    () = self.admin.live.life.reached(Phase::Settling) => {}
                }
            }
            // The last thing said is that this is the end.
            self.ended = self.admin.live.life.is_stopping();
            let now = Instant::now();
            if let Some(snapshot) = self.snapshot(now).await
                && self.told.as_ref().is_none_or(|told| told.status != snapshot.status)
            {
                let event = snapshot.event.clone();
                self.told = Some(snapshot);
                self.sent = Some(now);
                return Some(event);
            }
            if self.ended {
                return None;
            }
            if self.told.is_none() || self.sent.is_none_or(|sent| sent + HEARTBEAT <= now) {
                // Without an answer, too, because a watcher that has left is noticed by writing.
                self.sent = Some(now);
                if self.told.is_none() {
                    sleep(EVERY).await;
                }
                return Some(Bytes::from_static(b"event: alive\ndata: {}\n\n"));
            }
        }
    }

    async fn snapshot(&self, now: Instant) -> Option<Arc<Snapshot>> {
        if !self.ended
            && let Some(fresh) = self.admin.live.fresh(now)
        {
            return Some(fresh);
        }
        let snapshot = Arc::new(Snapshot::of(self.admin.ask().await?)?);
        self.admin.live.keep(&snapshot, now);
        Some(snapshot)
    }
}
