//! News for people: each change is one line of the log and one event of the status, in the same words, and a span where
//! traces are wanted.

use time::OffsetDateTime;
use tokio::time::Instant;

use super::{
    entry::{Entry, LostNetwork},
    pools::Difference,
    status::{self, OVERDUE, overdue_advice},
    verdict::HealthNews,
};
use crate::{
    base::foreign::few,
    control::{
        discovery::{DiscoveryError, Endpoint, Note},
        lifecycle::{State, Unfit},
        probe::ProbeError,
    },
    observe::status::{
        Event,
        events::{Events, Kind},
    },
    telemetry::{kinds::Named as _, otlp::Tracing},
};

/// The events of the status, and the way to traces.
#[derive(Debug)]
pub(super) struct News {
    events: Events,
    tracing: Option<Tracing>,
}

/// The level of a line of the log; a warning asks for attention in the status, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Debug,
    Info,
    Warning,
}

impl News {
    pub(super) fn new(tracing: Option<Tracing>) -> News {
        News { events: Events::default(), tracing }
    }

    /// The latest events, oldest first.
    pub(super) fn latest(&self) -> Vec<Event> {
        self.events.latest()
    }

    // --- the source of containers ---

    /// The source `name` cannot see any more, or fails in another way than before.
    pub(super) fn source_lost(&mut self, name: &'static str, error: &DiscoveryError) {
        tracing::warn!(source = name, %error, "discovery cannot see; what is known stays routed");
        self.source(Kind::DiscoveryLost, true, format!("{name} cannot be seen, what is known stays routed: {error}"));
    }

    /// The same for traces, once each time that the source is lost.
    pub(super) fn trace_source_lost(&self, error: &DiscoveryError) {
        if let Some(tracing) = &self.tracing {
            tracing.happened("discovery.lost", || vec![("reason", error.to_string())]);
        }
    }

    /// The source has seen for a while.
    pub(super) fn source_sees(&mut self, name: &'static str) {
        tracing::info!(source = name, "discovery sees again");
        self.source(Kind::DiscoverySees, false, format!("{name} is seen again"));
    }

    /// The source has listed everything for the first time.
    pub(super) fn first_scan(&mut self, name: &'static str, containers: usize) {
        tracing::info!(source = name, containers, "first scan done");
        let text = format!("first look at {name}: {containers} containers carry the label inference.enable");
        self.source(Kind::DiscoverySees, false, text);
    }

    /// Something limits what the source sees.
    pub(super) fn source_noted(&mut self, name: &'static str, note: &Note) {
        let needs_doing = note.advice.is_some();
        match needs_doing {
            true => tracing::warn!(source = name, "{note}"),
            false => tracing::info!(source = name, "{note}"),
        }
        self.source(Kind::DiscoveryNote, needs_doing, note.what.clone());
    }

    fn source(&mut self, kind: Kind, is_warning: bool, text: String) {
        self.events.push(OffsetDateTime::now_utc(), kind, None, is_warning, text);
    }

    // --- containers ---

    /// Labels of the container cannot be used.
    pub(super) fn problems(&mut self, endpoint: &Endpoint) {
        for problem in &endpoint.problems {
            let text = format!("has a label that is wrong: {problem}");
            self.container(Level::Warning, Kind::Label, &endpoint.name, text, None);
        }
    }

    /// The health check of the container has changed in a way that people should know.
    pub(super) fn health(&mut self, endpoint: &Endpoint, news: Option<HealthNews>) {
        if endpoint.is_unread() {
            return; // nothing is known of its check
        }
        let name = &endpoint.name;
        let advice = overdue_advice(name);
        let (level, text, advice) = match news {
            None => return,
            Some(HealthNews::UnknownWord) => {
                let text = "has a health that this proxy has no word for: its own probe, or the last verdict, decides";
                (Level::Info, text.to_owned(), None)
            }
            Some(HealthNews::Overdue) => {
                (Level::Warning, format!("is not checked any more: {OVERDUE}"), Some(&*advice))
            }
            Some(HealthNews::ChecksAgain) => {
                (Level::Info, "is checked again: its health check counts".to_owned(), None)
            }
        };
        self.container(level, Kind::HealthCheck, name, text, advice);
    }

    /// A process in the container was killed because there was no memory left.
    pub(super) fn out_of_memory(&mut self, endpoint: &Endpoint) {
        let text = "ran out of memory in one of its processes; it may or may not still work".to_owned();
        self.container(Level::Warning, Kind::OutOfMemory, &endpoint.name, text, None);
    }

    /// A probe of the container has failed in a new way.
    pub(super) fn probe_failed(&mut self, entry: &Entry, error: &ProbeError) {
        let name = &entry.endpoint.name;
        let (level, text) = match entry.is_ready() {
            true => (Level::Warning, format!("is live, but does not tell its models: {error}")),
            false => (Level::Info, format!("is not live yet, it is asked until it answers: {error}")),
        };
        // Most containers that do not answer are still loading, and need no advice.
        let advice = (!error.may_be_loading()).then(|| error.advice(name));
        self.container(level, Kind::ProbeFailed, name, text, advice.as_deref());
    }

    /// A ready container announces other models than before.
    pub(super) fn models(&mut self, entry: &Entry) {
        let text = format!("has other models now: {}", few(&entry.models()));
        self.container(Level::Info, Kind::Models, &entry.endpoint.name, text, None);
    }

    /// The container has entered another state. Also a trace, if traces are wanted.
    pub(super) fn state(&mut self, entry: &Entry) {
        let name = &entry.endpoint.name;
        let in_flight = match (&entry.backend, entry.lost_network) {
            (Some(backend), _) => backend.in_flight(),
            (None, Some(LostNetwork { in_flight, .. })) => in_flight,
            (None, None) => 0,
        };
        let (level, kind, text, advice) = in_words(entry, in_flight);
        self.container(level, kind, name, text, advice.as_deref());
        self.trace_state(entry);
    }

    fn trace_state(&self, entry: &Entry) {
        let Some(tracing) = &self.tracing else { return };
        let (endpoint, state) = (&entry.endpoint, entry.life.state().kind().word());
        tracing.happened(format_args!("backend.{state}"), || {
            let reason = status::explain(entry).reason.map(|reason| ("reason", reason));
            let facts = [
                ("container.id", endpoint.id.to_string()),
                ("container.name", endpoint.name.clone()),
                ("container.image.name", endpoint.image.clone()),
                ("backend.state", state.to_owned()),
                ("models", few(&entry.models())),
            ];
            facts.into_iter().chain(reason).collect()
        });
    }

    /// Takes over how requests have turned the container's breaker. These are events only, because requests have logged
    /// them already.
    pub(super) fn breaker_turns(&mut self, entry: &Entry) {
        let Some(backend) = &entry.backend else { return };
        let (now, at) = (Instant::now(), OffsetDateTime::now_utc());
        for turn in backend.tally.take_turns() {
            let (kind, text) = match turn.opened {
                true => (Kind::BreakerOpen, "keeps failing: it gets no requests for now (its circuit breaker is open)"),
                false => (Kind::BreakerClosed, "answers again: it gets requests (its circuit breaker is closed)"),
            };
            let then = at - now.saturating_duration_since(turn.at);
            self.events.push(then, kind, Some(&entry.endpoint.name), turn.opened, text.to_owned());
        }
    }

    /// Containers announce the same model, but differ.
    pub(super) fn differs(&mut self, difference: &Difference) {
        let Difference { model, first, other, properties } = difference;
        tracing::warn!(
            %model, one = %first, %other, differ_in = ?properties,
            "containers announce the same model but differ; they share its traffic unless PROXY_SAME_MODEL=newest"
        );
        let text = format!(
            "announces {model} as {first} does, but they differ in {}; they share its traffic unless \
             PROXY_SAME_MODEL=newest",
            properties.join(", ")
        );
        self.events.push(OffsetDateTime::now_utc(), Kind::Differs, Some(other), true, text);
    }

    /// One line of the log and one event about the container `name`. `text` goes on after the name; `advice` is for the
    /// log, because the status shows it beside the container.
    fn container(&mut self, level: Level, kind: Kind, name: &str, text: String, advice: Option<&str>) {
        let (separator, advice) = advice.map_or(("", ""), |advice| ("; ", advice));
        match level {
            Level::Debug => tracing::debug!(container = %name, "{name} {text}{separator}{advice}"),
            Level::Info => tracing::info!(container = %name, "{name} {text}{separator}{advice}"),
            Level::Warning => tracing::warn!(container = %name, "{name} {text}{separator}{advice}"),
        }
        self.events.push(OffsetDateTime::now_utc(), kind, Some(name), level == Level::Warning, text);
    }
}

/// The container's state as a sentence without its subject, with advice where the user has to do something.
fn in_words(entry: &Entry, in_flight: u64) -> (Level, Kind, String, Option<String>) {
    let name = &entry.endpoint.name;
    let may_finish = match in_flight {
        0 => String::new(),
        1 => " (1 in flight may finish)".to_owned(),
        n => format!(" ({n} in flight may finish)"),
    };
    match entry.life.state() {
        State::Discovered(why @ (Unfit::HealthStarting | Unfit::Restarting | Unfit::Paused)) => {
            (Level::Info, Kind::NotRouted, format!("is not routed yet: {why}"), None)
        }
        State::Discovered(why) => {
            (Level::Warning, Kind::NotRouted, format!("is not routed: {why}"), Some(why.advice(name)))
        }
        State::Probing => (Level::Debug, Kind::Probing, "is being asked for its models".to_owned(), None),
        State::Ready => {
            let at = entry.backend.as_ref().map(|backend| format!(" at {}", backend.spec.addr)).unwrap_or_default();
            (Level::Info, Kind::Ready, format!("is live{at} with {}", few(&entry.models())), None)
        }
        State::Unhealthy { why, .. } => {
            let text = format!("gets no new requests{may_finish}: {why}");
            (Level::Warning, Kind::Unhealthy, text, Some(why.advice(name)))
        }
        State::Draining { .. } => {
            let text = format!("was told to stop: it gets no new requests{may_finish}");
            (Level::Info, Kind::Draining, text, None)
        }
        State::Gone if in_flight > 0 => {
            (Level::Warning, Kind::Gone, format!("has ended with requests in flight ({in_flight})"), None)
        }
        State::Gone => (Level::Info, Kind::Gone, "has ended".to_owned(), None),
    }
}
