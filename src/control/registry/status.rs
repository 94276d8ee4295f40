//! Containers and models as the status shows them to people and programs.

use std::collections::HashMap;

use time::OffsetDateTime;
use tokio::time::Instant;

use super::{entry::Entry, source::Source};
use crate::{
    control::{labels, lifecycle::State},
    observe::status::{ContainerStatus, Event, LastError, ModelStatus, Status, VERSION, events::rfc3339},
    pool::{
        backend::Backend,
        breaker,
        table::{Route, RoutingTable},
        tally::Tally,
    },
    telemetry::kinds::Named as _,
};

/// Why the proxy does not believe a health check that has stopped.
pub(super) const OVERDUE: &str =
    "its health check is overdue: what it said last is not believed, the proxy's own probe decides";

/// Advice for an overdue health check.
pub(super) fn overdue_advice(container: &str) -> String {
    format!("see whether it hangs: docker inspect -f '{{{{json .State.Health}}}}' {container}")
}

/// The reason for which a container gets no requests, with advice for the user.
#[derive(Debug, Default)]
pub(super) struct Explanation {
    pub(super) reason: Option<String>,
    pub(super) advice: Option<String>,
}

pub(super) fn explain(entry: &Entry) -> Explanation {
    let name = &entry.endpoint.name;
    let (reason, advice) = match entry.life.state() {
        State::Discovered(why) | State::Unhealthy { why, .. } => (why.to_string(), Some(why.advice(name))),
        State::Probing => match &entry.probe_error {
            Some(error) => (error.reason.clone(), Some(error.advice.clone())),
            None => ("it is being asked for its models".to_owned(), None),
        },
        State::Ready if entry.backend.as_ref().is_some_and(|b| b.breaker.state() != breaker::State::Closed) => {
            let reason = "requests to it kept failing, so it rests (its circuit breaker is open)".to_owned();
            (reason, Some(format!("see what it is doing: docker logs {name}")))
        }
        State::Ready | State::Gone => return Explanation::default(),
        State::Draining { .. } => ("it was told to stop; what is in flight may finish".to_owned(), None),
    };
    Explanation { reason: Some(reason), advice }
}

/// Labels that cannot be used, and an overdue health check; a container may be ready in spite of them.
fn problems(entry: &Entry) -> Vec<String> {
    let mut problems = entry.endpoint.problems.clone();
    if entry.verdict.is_overdue() {
        problems.push(format!("{OVERDUE}; {}", overdue_advice(&entry.endpoint.name)));
    }
    problems
}

/// The facts that the status shows beside the containers.
#[derive(Debug)]
pub(super) struct Picture<'r> {
    pub(super) ready: bool,
    pub(super) started: OffsetDateTime,
    pub(super) source: &'r Source,
    pub(super) table: &'r RoutingTable,
    pub(super) events: Vec<Event>,
}

impl Picture<'_> {
    /// The status with these containers, as it is now.
    pub(super) fn of<'e>(self, entries: impl Iterator<Item = &'e Entry>) -> Status {
        let (now, at) = (Instant::now(), OffsetDateTime::now_utc());
        let mut containers: Vec<ContainerStatus> = entries.map(|entry| container(entry, now, at)).collect();
        containers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Status {
            version: VERSION,
            proxy_version: env!("CARGO_PKG_VERSION").to_owned(),
            at: rfc3339(at),
            started: rfc3339(self.started),
            ready: self.ready,
            stopping: false,
            discovery: self.source.status(),
            models: models(self.table),
            containers,
            events: self.events,
        }
    }
}

/// One container. `now` and `at` are the same moment by two clocks.
fn container(entry: &Entry, now: Instant, at: OffsetDateTime) -> ContainerStatus {
    let Explanation { reason, advice } = explain(entry);
    let endpoint = &entry.endpoint;
    let reach = endpoint.reach.as_ref().ok();
    let backend = entry.backend.as_deref();
    let tally = backend.map(|backend| &backend.tally);
    let address = backend.map(|b| b.spec.addr).or_else(|| reach.and_then(|r| r.targets.first().copied()));
    let network = address.zip(reach).and_then(|(addr, reach)| reach.network_of(addr.ip()));
    let probe_error = entry.probe_error.as_ref().map(|error| (error.at, error.reason.clone()));
    let trouble = tally.and_then(|tally| tally.last_trouble(now)).map(|(what, ago)| (at - ago, what.to_string()));
    let last_error = probe_error.into_iter().chain(trouble).max_by_key(|(at, _)| *at);
    let members = entry.offers.iter().filter_map(|offer| offer.member.as_ref());
    ContainerStatus {
        id: endpoint.id.to_string(),
        name: endpoint.name.clone(),
        image: endpoint.image.clone(),
        state: entry.life.state().kind().word().to_owned(),
        since: rfc3339(entry.since),
        reason,
        advice,
        models: entry.models().into_iter().map(str::to_owned).collect(),
        address: address.map(|addr| addr.to_string()),
        network: network.map(|network| network.name.clone()),
        in_flight: entry.in_flight(),
        max_inflight: endpoint.labels.max_inflight.map(std::num::NonZeroU32::get),
        weight: f64::from(endpoint.labels.weight.get()) / f64::from(labels::WEIGHT_ONE.get()),
        waiting: members.map(|member| member.model.waiting.len() as u64).sum(),
        ttft_ms: tally.and_then(|tally| tally.mean_first_token(now)).map(|mean| mean.as_millis() as u64),
        latency_ms: backend.and_then(|b| b.latency.read(now)).map(|reading| tenths(reading.seconds * 1000.0)),
        tokens_per_second: tally.map_or(0.0, |tally| tenths(tally.tokens_per_second(now))),
        breaker: backend.map(|backend: &Backend| backend.breaker.state().as_str().to_owned()),
        served: tally.map_or(0, Tally::served),
        failed: tally.map_or(0, Tally::failed),
        turned_away: tally.map_or(0, Tally::turned_away),
        last_error: last_error.map(|(at, text)| LastError { at: rfc3339(at), text }),
        problems: problems(entry),
    }
}

/// All models of a table, sorted by id.
fn models(table: &RoutingTable) -> Vec<ModelStatus> {
    let mut in_flight: HashMap<&str, u64> = HashMap::new();
    for member in table.members() {
        *in_flight.entry(&member.model.id).or_default() += member.in_flight() as u64;
    }
    let of_route = |route: &&Route| {
        let ready = !route.members.is_empty();
        let mut replicas: Vec<String> = route.members.iter().map(|member| member.backend.spec.name.clone()).collect();
        replicas.sort();
        ModelStatus {
            id: route.model.id.to_string(),
            ready,
            reason: (!ready).then(|| route.why_not_ready.to_owned()),
            replicas,
            in_flight: in_flight.get(&*route.model.id).copied().unwrap_or(0),
            waiting: route.model.waiting.len() as u64,
        }
    };
    table.routes().iter().map(of_route).collect()
}

/// Rounds to one decimal. More digits tell people nothing, and would make every status differ from the last one.
fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}
