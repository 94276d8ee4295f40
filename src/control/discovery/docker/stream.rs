//! The event stream: begun, heard, and begun again; and what each event means for what is known.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    CONTAINERS_MAX, LAG_MAX, LOOK_BACK, OVERLAP, RECONNECT_MAX, RECONNECT_MIN, REPLAYED_WITHIN, Watcher,
    engine::{Engine, Heard},
    event::{self, Kind, Notice},
    track::{Signalled, Track, is_before},
};
use crate::control::discovery::{Change, DiscoveryError};

impl Watcher {
    pub(super) fn on_heard(&mut self, heard: Option<Heard>) {
        if matches!(heard, Some(Heard::Notice(_) | Heard::Unreadable(_) | Heard::Other | Heard::Overflow)) {
            self.stream_spoke = true;
            self.doubt_at = None;
            self.is_silent = false;
            self.stream_trouble = None;
        }
        match heard {
            Some(Heard::Notice(notice)) => self.on_notice(notice),
            Some(Heard::Unreadable(time_nanos)) => self.on_unreadable(time_nanos),
            Some(Heard::Other) => {}
            Some(Heard::Overflow) => self.on_overflow(),
            Some(Heard::Over(error)) => self.on_stream_over(error),
            // Its reader has ended without a word.
            None => {
                let what = "the reader of the event stream has ended".to_owned();
                self.on_stream_over(DiscoveryError { what, advice: "it is begun again".to_owned() });
            }
        }
    }

    /// `since` for a subscription, as the engine reads it: seconds, a dot, nanoseconds.
    pub(super) fn since(&self) -> String {
        let (newest, back) = match self.seen.newest_nanos {
            Some(newest) => (newest, OVERLAP),
            None => ((self.settings.clock)(), LOOK_BACK),
        };
        let nanos = (i128::from(newest) - i128::try_from(back.as_nanos()).unwrap_or(0)).max(0);
        format!("{}.{:09}", nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000))
    }

    pub(super) fn subscribe(&mut self, engine: &Engine) {
        self.subscribed_at = Instant::now();
        self.subscribed_nanos = (self.settings.clock)();
        self.stream_spoke = false;
        self.heard = Some(engine.subscribe(&self.since()));
    }

    /// Streams end: socket proxies cut them every few minutes, engines restart. Begin again at once; one that never lasts
    /// is begun again at growing intervals, with a list each time, so that discovery goes on without events.
    pub(super) fn on_stream_over(&mut self, error: DiscoveryError) {
        tracing::debug!(%error, "event stream is over, subscribing again");
        self.heard = None;
        if self.subscribed_at.elapsed() >= RECONNECT_MAX {
            self.stream_trouble = None;
            self.stream_retry = RECONNECT_MIN;
            self.list_at = Instant::now();
            return;
        }
        self.list_at = Instant::now() + self.stream_retry;
        self.stream_retry = (self.stream_retry * 2).min(RECONNECT_MAX);
        if self.stream_retry >= RECONNECT_MAX {
            // Lists go on and tell nearly all. An engine that has gone is told of by them.
            self.stream_trouble = Some(error);
            // It is not silent, because it is not there.
            (self.is_silent, self.doubt_at) = (false, None);
        }
    }

    /// Events were lost here. The list tells most of what they said, but no stop notice: the engine is asked again for
    /// those.
    pub(super) fn on_overflow(&mut self) {
        self.list_at = Instant::now();
        if let Some(engine) = self.engine.clone() {
            self.subscribe(&engine);
        }
    }

    /// An event cannot be read: it is skipped, and the list tells what it said.
    pub(super) fn on_unreadable(&mut self, time_nanos: Option<i64>) {
        if let Some(time_nanos) = time_nanos {
            self.seen.pass(time_nanos, (self.settings.clock)());
        }
        if let Some(events) = self.settings.metrics.as_ref().and_then(|metrics| metrics.discovery.events.get()) {
            events.increment(event::UNREADABLE);
        }
        if !self.told_unreadable {
            self.told_unreadable = true;
            tracing::warn!("an event of the engine cannot be read and is skipped; more of them are only counted");
        }
        self.list_at = self.list_at.min(Instant::now() + RECONNECT_MAX);
    }

    pub(super) fn on_notice(&mut self, notice: Notice) {
        let now_nanos = (self.settings.clock)();
        if !self.seen.is_new(&notice, now_nanos) {
            return;
        }
        self.count(&notice);
        let Notice { id, mut kind, time_nanos, labelled, action } = notice;
        let is_replay = time_nanos < self.subscribed_nanos && self.subscribed_at.elapsed() < REPLAYED_WITHIN;
        // What happened before this process began may be long over, and no look could tell: a pause, for one. Only a stop
        // notice still counts, because no look shows it.
        if is_replay && time_nanos < self.began_nanos && !matches!(kind, Kind::Signalled(_) | Kind::Ended) {
            kind = Kind::Changed;
        }
        if self.context.self_id.as_deref() == Some(id.as_str()) {
            // Our own networks may have changed, and with them every address.
            self.list_at = Instant::now();
        }
        self.look_at_dependents(&id);
        if !self.tracks.contains_key(&id) {
            if !labelled {
                return;
            }
            if self.tracks.len() >= CONTAINERS_MAX {
                // The list tells how many are too many.
                self.list_at = self.list_at.min(Instant::now() + RECONNECT_MAX);
                return;
            }
            self.tracks.insert(id.clone(), Track::default());
        }
        let Some(track) = self.tracks.get_mut(&id) else { return };
        if is_replay && track.seen.as_ref().is_some_and(|seen| is_before(time_nanos, seen, now_nanos)) {
            return; // about an earlier run
        }
        if matches!(action, "start" | "restart") {
            track.signalled = None;
        }
        track.heard += 1;
        track.is_unlisted = false;
        let endpoint_id = || id.as_str().into();
        match kind {
            Kind::Changed => {}
            Kind::Signalled(signal) => {
                track.signalled = Some(Signalled { signal, time_nanos, is_replay });
                if let Some(stopping) = track.stop_notice(now_nanos) {
                    self.out.push_back(Ok(Change::Stopping(stopping.as_str().into())));
                    return; // nothing to see: a stop in progress is invisible
                }
            }
            Kind::Ended => {
                track.signalled = None;
                if track.endpoint.take().is_some() {
                    self.out.push_back(Ok(Change::Ended(endpoint_id())));
                }
            }
            Kind::Paused => self.out.push_back(Ok(Change::Suspended(endpoint_id()))),
            Kind::OutOfMemory => self.out.push_back(Ok(Change::OutOfMemory(endpoint_id()))),
            Kind::Disconnected(network) => {
                if track.needs(&network) {
                    self.out.push_back(Ok(Change::Detached(endpoint_id())));
                }
            }
        }
        self.look_at(&id);
    }

    pub(super) fn count(&self, notice: &Notice) {
        let Some(metrics) = &self.settings.metrics else { return };
        if let Some(events) = metrics.discovery.events.get() {
            events.increment(notice.action);
        }
        // What was asked for again from before this process began says nothing of how late events come.
        if notice.time_nanos >= self.began_nanos {
            let lag = (self.settings.clock)().saturating_sub(notice.time_nanos);
            // A remote engine's clock may be ahead, or hours behind.
            let lag = Duration::from_nanos(u64::try_from(lag).unwrap_or(0));
            metrics.discovery.event_lag.observe(lag.min(LAG_MAX));
        }
    }
}
