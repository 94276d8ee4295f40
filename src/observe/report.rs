//! Tells every metric, from the instruments and the live table, to `/metrics` and to the exporter.
//!
//! `/metrics` and OTLP are two [`Report`]s of the same telling, so neither can know what the other does not, and nothing is
//! recorded twice. What is told of models and backends is what the table holds at that moment: their series go with them.
//! Series of a model appear once there is something to tell, so a backend that announces a thousand models which are not used
//! swells the page by no more than the list of what it serves (`proxy_backend_inflight`).

use std::{
    collections::BTreeMap,
    fmt::Display,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use tokio::time::Instant;

use crate::{
    pool::{
        breaker::State,
        table::{Route, RoutingTable, TableReader},
    },
    telemetry::{
        exposition::Report,
        families::{self, Family},
        http_server::{HttpLabels, HttpMetrics, HttpSeries},
        kinds::{ContainerState, Named, PerKind},
        log,
        metrics::{Histogram, Metrics, ModelMetrics, OperationMetrics, PerWord, UNKNOWN_MODEL},
        process::Usage,
    },
    wire::scan::Finish,
};

/// What tells the metrics.
#[derive(Debug, Clone)]
pub struct Reporter {
    /// What is live.
    pub table: TableReader,
    /// Instruments that belong to no model.
    pub metrics: Arc<Metrics>,
}

impl Reporter {
    /// Tells every metric, in the order of [`families::ALL`].
    pub fn tell(&self, to: &mut impl Report) {
        let table = self.table.snapshot();
        let routes = table.routes();
        // A model that no request has named has nothing to tell: there may be thousands of them.
        let models = routes.iter().map(|route| (&*route.model.id, &route.model.metrics));
        let models = models.chain([(UNKNOWN_MODEL, &self.metrics.unknown)]);
        let models: Vec<(&str, &ModelMetrics)> = models.filter(|(_, metrics)| !metrics.is_empty()).collect();
        tell_models(&models, to);
        to.family(&families::QUEUE_DEPTH);
        for Route { model, .. } in routes {
            let waiting = model.waiting.len();
            if waiting > 0 || !model.metrics.is_empty() {
                to.sample(&[("model", &model.id)], waiting.into());
            }
        }
        to.family(&families::QUEUE_WAIT);
        for (model, metrics) in models.iter().filter(|(_, metrics)| !metrics.queue_wait.is_empty()) {
            to.histogram(&[("model", model)], &metrics.queue_wait);
        }
        self.tell_requests(to);
        tell_backends(&table, to);
        self.tell_lives(to);
        self.tell_discovery(to);
        tell_process(to);
    }

    /// Tells requests in the words of OpenTelemetry's conventions for HTTP servers, which `/metrics` leaves out.
    pub fn tell_conventions(&self, to: &mut impl Report) {
        type Instrument = fn(&HttpSeries) -> &Histogram;
        let all = self.metrics.http.as_ref().map(HttpMetrics::each).unwrap_or_default();
        let instruments: [(&Family, Instrument); 3] = [
            (&families::HTTP_DURATION, |series| &series.duration),
            (&families::HTTP_REQUEST_BYTES, |series| &series.request_bytes),
            (&families::HTTP_RESPONSE_BYTES, |series| &series.response_bytes),
        ];
        for (family, of) in instruments {
            to.family(family);
            for (labels, series) in all.iter().filter(|(_, series)| !of(series).is_empty()) {
                let HttpLabels { method, route, scheme, status, error } = labels;
                let labels: [(&str, &dyn Display); 5] =
                    [("method", method), ("route", route), ("scheme", scheme), ("status", status), ("error", error)];
                to.histogram(&labels, of(series));
            }
        }
    }

    /// Requests of all models together.
    fn tell_requests(&self, to: &mut impl Report) {
        let metrics = &self.metrics;
        to.family(&families::OVERHEAD);
        to.histogram(&[], &metrics.overhead);
        per_word(&families::REJECTED, &metrics.rejected, to);
        per_kind(&families::RETRIES, &metrics.retries, to);
        per_word(&families::DISCONNECTS, &metrics.disconnects, to);
        per_word(&families::CUTS, &metrics.cuts, to);
        // In this order: what is closed between the two reads has been accepted before.
        let closed = metrics.clients_closed.get();
        let accepted = metrics.clients_accepted.get();
        to.family(&families::CLIENTS);
        to.sample(&[], accepted.saturating_sub(closed).into());
        to.family(&families::CLIENTS_ACCEPTED);
        to.sample(&[], accepted.into());
        to.family(&families::UPSTREAM_CONNECTIONS);
        to.sample(&[("kind", &"opened")], metrics.upstream_opened.get().into());
        to.sample(&[("kind", &"reused")], metrics.upstream_reused.get().into());
    }

    /// Containers and what becomes of them.
    fn tell_lives(&self, to: &mut impl Report) {
        let metrics = &self.metrics;
        to.family(&families::BACKENDS);
        for (state, count) in metrics.backends.each().filter(|(state, _)| *state != ContainerState::Gone) {
            to.sample(&[("state", &state.word())], count.into());
        }
        per_kind(&families::TRANSITIONS, &metrics.transitions, to);
        to.family(&families::DRAINS);
        to.histogram(&[], &metrics.drains);
        to.family(&families::PROBES);
        to.histogram(&[], &metrics.probes);
        per_kind(&families::PROBE_FAILURES, &metrics.probe_failures, to);
        per_kind(&families::TABLE_UPDATES, &metrics.table_updates, to);
    }

    fn tell_discovery(&self, to: &mut impl Report) {
        let discovery = &self.metrics.discovery;
        to.family(&families::CONNECTED);
        to.sample(&[], u64::from(discovery.connected.load(Relaxed)).into());
        to.family(&families::LAST_SYNC);
        to.sample(&[], (discovery.last_sync_ms.load(Relaxed) as f64 / 1e3).into());
        to.family(&families::EVENTS);
        for (action, count) in discovery.events.get().into_iter().flat_map(PerWord::each) {
            to.sample(&[("action", &action)], count.into());
        }
        to.family(&families::EVENT_LAG);
        to.histogram(&[], &discovery.event_lag);
    }
}

fn tell_models(models: &[(&str, &ModelMetrics)], to: &mut impl Report) {
    let all: Vec<(&str, &str, &OperationMetrics)> = models
        .iter()
        .flat_map(|(model, metrics)| metrics.each().map(|(operation, metrics)| (*model, operation.as_str(), metrics)))
        .collect();
    to.family(&families::REQUESTS);
    for (model, operation, metrics) in &all {
        metrics.requests.each(|status, count| {
            to.sample(&[("model", model), ("status", status), ("operation", operation)], count.into());
        });
    }
    per_operation(&families::DURATION, &all, |metrics| &metrics.duration, to);
    per_operation(&families::FIRST_TOKEN, &all, |metrics| &metrics.time_to_first_token, to);
    per_operation(&families::PER_TOKEN, &all, |metrics| &metrics.time_per_output_token, to);
    to.family(&families::TOKENS);
    for (model, operation, metrics) in &all {
        let tokens = &metrics.tokens;
        for (kind, count) in [
            ("input", tokens.input.total()),
            ("cached_input", tokens.cached_input.get()),
            ("output", tokens.output.total()),
            ("reasoning", tokens.reasoning.get()),
        ] {
            to.sample(&[("model", model), ("type", &kind), ("operation", operation)], count.into());
        }
    }
    to.family(&families::REQUEST_TOKENS);
    for (model, operation, metrics) in &all {
        for (kind, histogram) in [("input", &metrics.tokens.input), ("output", &metrics.tokens.output)] {
            if !histogram.is_empty() {
                to.histogram(&[("model", model), ("type", &kind), ("operation", operation)], histogram);
            }
        }
    }
    to.family(&families::FINISHES);
    for (model, operation, metrics) in &all {
        for (finish, counter) in Finish::ALL.iter().zip(&metrics.finishes).filter(|(_, counter)| counter.get() > 0) {
            let labels: [(&str, &dyn Display); 3] =
                [("model", model), ("reason", &finish.as_str()), ("operation", operation)];
            to.sample(&labels, counter.get().into());
        }
    }
    per_operation(&families::REQUEST_BYTES, &all, |metrics| &metrics.request_bytes, to);
    per_operation(&families::RESPONSE_BYTES, &all, |metrics| &metrics.response_bytes, to);
}

/// Names of containers are their own only at one moment: the old one and the new one of a replacement may bear the same,
/// and count as one while both are there.
fn tell_backends(table: &RoutingTable, to: &mut impl Report) {
    let mut in_flight: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for member in table.members() {
        *in_flight.entry((&member.backend.spec.name, &member.model.id)).or_default() += member.in_flight() as u64;
    }
    let now = Instant::now();
    let mut loads: BTreeMap<&str, u64> = BTreeMap::new();
    let mut breakers: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for backend in table.backends() {
        let state = match backend.breaker.state() {
            State::Closed => 0,
            State::HalfOpen => 1,
            State::Open => 2,
        };
        if let Some(load) = backend.reported.estimate(backend.in_flight(), now) {
            *loads.entry(&backend.spec.name).or_default() += load;
        }
        let (worst, trips) = breakers.entry(&backend.spec.name).or_default();
        *worst = (*worst).max(state);
        *trips += backend.trips.get();
    }
    to.family(&families::INFLIGHT);
    for ((backend, model), count) in &in_flight {
        to.sample(&[("backend", backend), ("model", model)], (*count).into());
    }
    to.family(&families::LOAD);
    for (backend, load) in &loads {
        to.sample(&[("backend", backend)], (*load).into());
    }
    to.family(&families::BREAKER_STATE);
    for (backend, (state, _)) in &breakers {
        to.sample(&[("backend", backend)], (*state).into());
    }
    to.family(&families::BREAKER_TRIPS);
    for (backend, (_, trips)) in &breakers {
        to.sample(&[("backend", backend)], (*trips).into());
    }
    to.family(&families::ACTIVE);
    to.sample(&[], table.backends().iter().filter(|backend| !backend.is_closed()).count().into());
}

fn tell_process(to: &mut impl Report) {
    to.family(&families::LOG_DROPPED);
    to.sample(&[], log::dropped().into());
    to.family(&families::BUILD);
    to.sample(&[("version", &env!("CARGO_PKG_VERSION"))], 1_u64.into());
    let usage = Usage::now();
    let whole = |n: Option<u64>| n.map(Into::into);
    for (family, value) in [
        (&families::CPU, usage.cpu_seconds.map(Into::into)),
        (&families::MEMORY, whole(usage.resident_bytes)),
        (&families::FILES, whole(usage.files)),
        (&families::FILES_MAX, whole(usage.files_max)),
        (&families::STARTED, usage.started_seconds.map(Into::into)),
    ] {
        if let Some(value) = value {
            to.family(family);
            to.sample(&[], value);
        }
    }
}

fn per_operation(
    family: &'static Family,
    all: &[(&str, &str, &OperationMetrics)],
    of: impl Fn(&OperationMetrics) -> &Histogram,
    to: &mut impl Report,
) {
    to.family(family);
    for (model, operation, metrics) in all {
        let histogram = of(metrics);
        if !histogram.is_empty() {
            to.histogram(&[("model", model), ("operation", operation)], histogram);
        }
    }
}

fn per_kind<K: Named>(family: &'static Family, numbers: &PerKind<K>, to: &mut impl Report) {
    let label = family.labels.first().copied().unwrap_or_default();
    to.family(family);
    for (kind, number) in numbers.each() {
        to.sample(&[(label, &kind.word())], number.into());
    }
}

fn per_word(family: &'static Family, numbers: &PerWord, to: &mut impl Report) {
    let label = family.labels.first().copied().unwrap_or_default();
    to.family(family);
    for (word, number) in numbers.each() {
        to.sample(&[(label, &word)], number.into());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        pool::{
            backend::{Model, tests::member},
            table,
        },
        telemetry::{
            exposition::{Exposition, Labels, Value},
            operation::Operation,
        },
    };

    #[derive(Default)]
    struct Order(Vec<&'static str>);

    impl Report for Order {
        fn family(&mut self, family: &'static Family) {
            self.0.push(family.name);
        }

        fn sample(&mut self, _: &Labels<'_>, _: Value) {}

        fn histogram(&mut self, _: &Labels<'_>, _: &Histogram) {}
    }

    #[test]
    fn everything_in_the_table_is_told_once_and_in_its_order() {
        let (_publisher, reader) = table::table();
        let reporter = Reporter { table: reader, metrics: Arc::new(Metrics::default()) };
        let mut order = Order::default();
        reporter.tell(&mut order);
        let all: Vec<&str> = families::ALL.iter().map(|family| family.name).collect();
        assert_eq!(order.0, all);
    }

    fn route(id: &str) -> Route {
        Route { model: Model::new(id), members: Box::default(), object: None, why_not_ready: "", is_coming: false }
    }

    #[test]
    fn a_model_that_nobody_asks_for_has_no_series_of_its_own() {
        let (mut publisher, reader) = table::table();
        let (idle, asked, wanted) = (route("idle"), route("asked"), route("wanted"));
        asked.model.metrics.of(Operation::Chat).request_done(200, Duration::from_secs(1));
        let line = wanted.model.clone();
        let _ticket = line.waiting.join(1, crate::pool::waiting::Takes::Any).unwrap();
        publisher.publish(RoutingTable::new(vec![idle, asked, wanted], Vec::new(), Vec::new()));
        let mut text = Exposition::default();
        Reporter { table: reader, metrics: Arc::new(Metrics::default()) }.tell(&mut text);
        let text = text.finish();
        for absent in ["model=\"idle\"", "model=\"_unknown\"", "proxy_tokens_total{model=\"wanted\""] {
            assert!(!text.contains(absent), "{absent} in {text}");
        }
        for there in [
            "proxy_requests_total{model=\"asked\",status=\"200\",operation=\"chat\"} 1\n",
            "proxy_tokens_total{model=\"asked\",type=\"output\",operation=\"chat\"} 0\n",
            "proxy_queue_depth{model=\"asked\"} 0\n",
            "proxy_queue_depth{model=\"wanted\"} 1\n",
        ] {
            assert!(text.contains(there), "{there} not in {text}");
        }
    }

    #[test]
    fn no_series_is_told_twice_whatever_containers_call_themselves() {
        let (mut publisher, reader) = table::table();
        let (old, new) = (member("web", 1, None), member("web", 1, None));
        let _one = old.try_acquire(tokio::time::Instant::now()).unwrap();
        publisher.publish(RoutingTable::new(
            vec![route("m")],
            vec![old.backend.clone(), new.backend.clone()],
            vec![old, new],
        ));
        let mut text = Exposition::default();
        Reporter { table: reader, metrics: Arc::new(Metrics::default()) }.tell(&mut text);
        let text = text.finish();
        let mut series: Vec<&str> = text.lines().filter_map(|line| Some(line.rsplit_once(' ')?.0)).collect();
        series.retain(|series| !series.starts_with('#'));
        let all = series.len();
        series.sort_unstable();
        series.dedup();
        assert_eq!(series.len(), all, "{text}");
        assert!(text.contains("proxy_backend_inflight{backend=\"web\",model=\"m\"} 1\n"), "{text}");
    }
}
