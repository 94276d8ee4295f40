//! The registry by hand, one step at a time: the test answers its probes and moves its clock.

mod health;
mod news;
mod routes;

use std::{net::SocketAddr, time::Duration};

use serde_json::value::RawValue;
use tokio::time::{advance, timeout};

use super::{
    entry::LOOK_AGAIN,
    rounds::{EARLY_REFRESH, FIRST_PROBES},
    *,
};
use crate::{
    base::fetch::FetchError,
    control::{
        discovery::{
            Health, Incarnation, Note, Obstacle,
            fixed::{self, EndpointBuilder},
        },
        probe::{Listing, MODELS_MAX, ProbeError, ProbeHandle},
    },
    observe::status::events::Kind,
    pool::{
        backend::{Member, Refused},
        table::{Lookup, ModelObject, Route, TableReader, table},
    },
};

struct Bench {
    registry: Registry,
    reader: TableReader,
    life: Life,
}

fn bench(configure: impl FnOnce(&mut Config)) -> Bench {
    let mut config = Config::from_vars([("", "")]).unwrap().0;
    configure(&mut config);
    let (publisher, reader) = table();
    let life = Life::default();
    let tasks = TaskTracker::new();
    let registry = Registry::new(Arc::new(config), 1, "test", publisher, Telemetry::default(), life.clone(), tasks);
    Bench { registry, reader, life }
}

/// A container at an address where nobody listens; the answers of its real probe are never read.
fn container(name: &str) -> EndpointBuilder {
    fixed::endpoint(name, SocketAddr::from(([127, 0, 0, 1], 9)))
}

fn upsert(endpoint: EndpointBuilder) -> Change {
    Change::Upsert(Box::new(endpoint.into()))
}

fn refused() -> ProbeError {
    ProbeError::NoAnswer {
        path: "/models".to_owned(),
        error: FetchError::Refused(SocketAddr::from(([127, 0, 0, 1], 9))),
    }
}

impl Bench {
    /// Publishes as [`Registry::run`] does after each input.
    fn settle(&mut self) {
        if std::mem::take(&mut self.registry.dirty) {
            self.registry.publish();
        }
        self.registry.check_first_round();
    }

    fn change(&mut self, change: Change) {
        self.registry.on_change(Ok(change));
        self.settle();
    }

    /// The tag of the probe that is under way.
    fn tag(&self, id: &str) -> (Incarnation, u64) {
        let entry = &self.registry.entries[id];
        (entry.endpoint.incarnation, entry.probe.as_ref().unwrap().serial)
    }

    fn answer_to(&mut self, id: &str, (incarnation, serial): (Incarnation, u64), models: &[&str]) {
        let object = |id: &&str| ModelObject {
            id: (*id).into(),
            json: RawValue::from_string(format!(r#"{{"id":"{id}"}}"#)).unwrap(),
            created: None,
            root: None,
            max_model_len: None,
        };
        let addr = self.registry.entries[id].endpoint.reach.as_ref().unwrap().targets[0];
        let models: Vec<_> = models.iter().map(|id| Arc::new(object(id))).collect();
        let outcome = if models.is_empty() { Err(refused()) } else { Ok(Listing { addr, models }) };
        self.registry.on_answer(Answer { id: id.into(), incarnation, serial, outcome, took: Duration::ZERO });
        self.settle();
    }

    /// The backend answers its probe with these models; it refuses if there are none.
    fn answer(&mut self, id: &str, models: &[&str]) {
        self.answer_to(id, self.tag(id), models);
    }

    /// The backend's answer to its probe is of no use.
    fn fail(&mut self, id: &str, error: ProbeError) {
        let (incarnation, serial) = self.tag(id);
        let outcome = Err(error);
        self.registry.on_answer(Answer { id: id.into(), incarnation, serial, outcome, took: Duration::ZERO });
        self.settle();
    }

    /// The texts of all events of this kind.
    fn told(&mut self, kind: Kind) -> Vec<String> {
        let events = self.registry.status().events.into_iter();
        events.filter(|event| event.kind == kind.as_str()).map(|event| event.text).collect()
    }

    async fn pass(&mut self, time: Duration) {
        advance(time).await;
        self.registry.on_deadlines();
        self.settle();
    }

    /// `model: containers`, sorted by model; a dash where none is ready.
    fn table(&self) -> Vec<String> {
        let table = self.reader.snapshot();
        let line = |route: &&Route| {
            let names: Vec<&str> = route.members.iter().map(|m| m.backend.spec.name.as_str()).collect();
            let names = if names.is_empty() { "-".to_owned() } else { names.join(" ") };
            format!("{}: {names}", route.model.id)
        };
        table.routes().iter().map(line).collect()
    }

    fn member(&self, model: &str) -> Arc<Member> {
        match self.reader.snapshot().lookup(model) {
            Lookup::Ready(route) => route.members[0].clone(),
            other => panic!("{model} must be ready, not {other:?}"),
        }
    }

    fn why_not_ready(&self, model: &str) -> &'static str {
        match self.reader.snapshot().lookup(model) {
            Lookup::NoneReady(route) => route.why_not_ready,
            other => panic!("{model} must be known and not ready, not {other:?}"),
        }
    }

    fn is_ready(&self) -> bool {
        self.life.phase() == phase::Phase::Ready
    }
}

/// The texts of all events about containers, without their names.
fn told_of_all(bench: &mut Bench) -> Vec<String> {
    bench.registry.status().events.into_iter().filter(|event| event.container.is_some()).map(|e| e.text).collect()
}

/// Ids as long as they may be, and as many: `n` tells one set from the next.
fn endless_ids(n: usize) -> Vec<String> {
    (0..MODELS_MAX).map(|i| format!("{n}-{i}-{:x<240}", "")).collect()
}

#[tokio::test(start_paused = true)]
async fn readiness_waits_for_the_first_scan_and_its_probes() {
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a")));
    bench.answer("a", &["m"]);
    assert_eq!(bench.table(), ["m: a"]);
    assert!(!bench.is_ready(), "there may be more that has not been seen");

    let all = ["a", "b", "c", "d"].map(container);
    let starting = container("e").health(Health::Starting);
    bench.change(Change::Reset(all.into_iter().chain([starting]).map(Into::into).collect()));
    assert!(!bench.is_ready());
    bench.answer("a", &["m"]);
    bench.answer("b", &["n"]);
    assert!(!bench.is_ready());
    bench.answer("c", &[]);
    assert!(!bench.is_ready(), "a refusal is an answer, but one is still missing");
    bench.change(Change::Ended("d".into()));
    assert!(bench.is_ready(), "a container that has ended or may not be probed is not waited for");
}

#[tokio::test(start_paused = true)]
async fn readiness_does_not_wait_for_ever() {
    let mut bench = bench(|_| {});
    bench.change(Change::Reset(vec![container("a").into()]));
    let wake_at = bench.registry.next_deadline().unwrap();
    assert_eq!(wake_at - Instant::now(), FIRST_PROBES);
    bench.pass(FIRST_PROBES - Duration::from_millis(1)).await;
    assert!(!bench.is_ready());
    bench.pass(Duration::from_millis(1)).await;
    assert!(bench.is_ready());
}

#[tokio::test(start_paused = true)]
async fn answers_about_what_has_been_change_nothing() {
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a").incarnation(1)));
    let first_run = bench.tag("a");
    bench.change(upsert(container("a").incarnation(2)));
    bench.answer_to("a", first_run, &["old"]);
    assert_eq!(bench.table(), [""; 0]);
    bench.answer("a", &["m"]);
    assert_eq!(bench.table(), ["m: a"]);

    // The same run, an earlier probing of it.
    let tag = bench.tag("a");
    bench.change(upsert(container("a").incarnation(2).health(Health::Unhealthy)));
    bench.answer_to("a", tag, &["m"]);
    bench.change(upsert(container("a").incarnation(2).health(Health::Healthy)));
    bench.answer_to("a", tag, &["m"]);
    assert_eq!(bench.table(), ["m: -"]);
    bench.answer("a", &["m"]);
    assert_eq!(bench.table(), ["m: a"]);

    // An answer that was on its way when the notice to stop came.
    let tag = bench.tag("a");
    bench.change(Change::Stopping("a".into()));
    bench.answer_to("a", tag, &["m"]);
    assert_eq!((bench.table(), bench.why_not_ready("m")), (vec!["m: -".to_owned()], "it is stopping"));
}

#[tokio::test(start_paused = true)]
async fn another_start_is_another_run_whatever_the_clock_said() {
    const HOUR: i64 = 3_600_000_000_000;
    let now = i64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos()).unwrap();
    for (before, after) in [(now + 2 * HOUR, now), (now + 5_000_000_000, now), (now, now + 1), (now, 0), (-7, -8)] {
        let mut bench = bench(|_| {});
        bench.change(upsert(container("a").incarnation(before)));
        bench.answer("a", &["m"]);
        let old = bench.member("m");
        let moved = SocketAddr::from(([127, 0, 0, 1], 10));
        bench.change(upsert(fixed::endpoint("a", moved).incarnation(after)));
        assert!(old.backend.is_closed(), "{before}, then {after}: its address may be another container's by now");
        assert_eq!(bench.table(), ["m: -"]);
        bench.answer("a", &["m"]);
        assert_eq!(bench.member("m").backend.spec.addr, moved);
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_that_cannot_be_read_at_first_has_not_ended_when_it_can() {
    let unread = || {
        let mut endpoint: Endpoint = container("c1").into();
        (endpoint.incarnation, endpoint.health) = (Incarnation::UNKNOWN, Health::Unknown);
        let (what, advice) = ("the engine does not tell about it".to_owned(), "wait".to_owned());
        endpoint.reach = Err(Obstacle { what, advice });
        Change::Upsert(Box::new(endpoint))
    };
    let mut bench = bench(|_| {});
    bench.change(unread());
    bench.change(upsert(container("c1").incarnation(7)));
    bench.answer("c1", &["m"]);
    let told = told_of_all(&mut bench);
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(told[0], "is not routed: the engine does not tell about it");
    assert_eq!(told[1], "is being asked for its models");
    assert!(told[2].starts_with("is live"), "{told:?}");
    assert_eq!(bench.table(), ["m: c1"]);
    // A run that is known and another one are two, also where the other one cannot be read yet.
    bench.change(unread());
    assert_eq!(bench.table(), ["m: -"]);
    assert_eq!(told_of_all(&mut bench).iter().filter(|text| text.contains("has ended")).count(), 1);
}

/// A source that ends, or breaks the task that reads it.
#[tokio::test]
async fn a_source_that_ends_ends_the_registry_with_the_reason() {
    struct Ending;
    impl Discovery for Ending {
        fn name(&self) -> &'static str {
            "ending"
        }
        fn changes(
            self: Box<Self>,
            _: crate::control::discovery::Looks,
        ) -> futures::stream::BoxStream<'static, Result<Change, DiscoveryError>> {
            futures::stream::iter([Ok(Change::Reset(Vec::new()))]).boxed()
        }
    }
    let (_asks, asked) = mpsc::channel(1);
    let ended = timeout(Duration::from_secs(30), bench(|_| {}).registry.run(Box::new(Ending), asked)).await;
    assert_eq!(ended.unwrap(), "its source of containers, test, has ended");
}

#[tokio::test(start_paused = true)]
async fn a_grace_without_end_stops_nothing_else() {
    for grace in [Duration::MAX, Duration::from_secs(i64::MAX as u64), crate::base::foreign::FOREVER] {
        let mut bench = bench(|_| {});
        for name in ["a", "b"] {
            bench.change(upsert(container(name).stop_grace(grace)));
            bench.answer(name, &["m"]);
        }
        bench.change(Change::Stopping("a".into()));
        assert_eq!(bench.table(), ["m: b"]);
        bench.pass(Duration::from_secs(86_400)).await;
        assert_eq!(
            (bench.table(), bench.registry.entries["a"].life.state().kind().word()),
            (vec!["m: b".to_owned()], "draining")
        );
        bench.change(Change::Ended("a".into()));
        assert_eq!(bench.table(), ["m: b"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_refuses_connections_is_looked_at_and_probed_once_a_second() {
    let mut bench = bench(|_| {});
    let (looks, mut looked) = mpsc::channel(8);
    bench.registry.looks = Some(looks);
    for id in ["a", "b"] {
        bench.change(upsert(container(id)));
        bench.answer(id, &[id]);
    }
    let backend = bench.member("a").backend.clone();
    let mut suspect = async |bench: &mut Bench| {
        bench.reader.report_suspect(&backend);
        bench.registry.publisher.suspected().await;
        bench.registry.on_suspects();
        std::iter::from_fn(|| looked.try_recv().ok()).map(|id| id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(suspect(&mut bench).await, ["a"]);
    advance(LOOK_AGAIN / 2).await;
    assert_eq!(suspect(&mut bench).await, [""; 0], "it has just been looked at");
    advance(LOOK_AGAIN).await;
    assert_eq!(suspect(&mut bench).await, ["a"]);
}

#[tokio::test(start_paused = true)]
async fn requests_survive_what_their_backend_survives() {
    let mut bench = bench(|config| config.drain_timeout = Duration::from_secs(30));
    let (healthy, unhealthy) = (|| container("a").health(Health::Healthy), container("a").health(Health::Unhealthy));
    bench.change(upsert(healthy()));
    bench.answer("a", &["m"]);
    let member = bench.member("m");
    let request = member.try_acquire(Instant::now()).unwrap();

    // Discovery begins again: nothing that is still there is touched.
    bench.registry.on_change(Err(DiscoveryError { what: "the engine is away".to_owned(), advice: "wait".to_owned() }));
    bench.settle();
    let status = bench.registry.status();
    assert!(!status.discovery.connected && status.discovery.error.is_some());
    assert_eq!(bench.table(), ["m: a"]);
    bench.change(Change::Reset(vec![healthy().into()]));
    assert!(bench.registry.status().discovery.connected);
    assert!(Arc::ptr_eq(&member, &bench.member("m")));
    assert_eq!(request.backend().in_flight(), 1);

    // Unhealthy and healthy again: the same backend with the same requests, also long after the deadline.
    bench.change(upsert(unhealthy.clone()));
    assert_eq!(member.try_acquire(Instant::now()).unwrap_err(), Refused::Closed);
    assert_eq!(bench.why_not_ready("m"), "it is unhealthy");
    bench.pass(Duration::from_secs(29)).await;
    bench.change(upsert(healthy()));
    bench.answer("a", &["m"]);
    bench.pass(Duration::from_secs(3_600)).await;
    assert!(Arc::ptr_eq(&member, &bench.member("m")) && member.try_acquire(Instant::now()).is_ok());

    // Unhealthy for too long: cut, and what comes back later is another backend.
    bench.change(upsert(unhealthy));
    bench.pass(Duration::from_secs(30)).await;
    assert!(bench.reader.snapshot().backends().is_empty());
    bench.change(upsert(healthy()));
    bench.answer("a", &["m"]);
    assert!(!Arc::ptr_eq(&member.backend, &bench.member("m").backend) && member.backend.is_closed());
}

#[tokio::test(start_paused = true)]
async fn another_address_is_another_backend() {
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a")));
    bench.answer("a", &["m"]);
    let before = bench.member("m");
    let moved = SocketAddr::from(([127, 0, 0, 1], 10));
    bench.change(upsert(fixed::endpoint("a", moved)));
    assert!(before.backend.is_closed());
    assert_eq!(bench.table(), ["m: -"]);
    bench.answer("a", &["m"]);
    assert_eq!(bench.member("m").backend.spec.addr, moved);
}

#[tokio::test(start_paused = true)]
async fn missed_models_are_looked_for_once_a_second_at_most() {
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a")));
    bench.answer("a", &["m"]);
    let (handle, nudge, _stop) = ProbeHandle::new(99);
    bench.registry.entries.get_mut("a").unwrap().probe = Some(handle);
    let asked = || nudge.notified().now_or_never().is_some();

    bench.registry.on_miss();
    assert!(!asked(), "it has just answered");
    bench.pass(EARLY_REFRESH).await;
    assert!(asked(), "but somebody missed a model since");
    bench.pass(EARLY_REFRESH).await;
    bench.registry.on_miss();
    assert!(asked(), "the first one after a while at once");
    for _ in 0..100 {
        bench.registry.on_miss();
    }
    assert!(!asked());
    assert_eq!(bench.registry.next_deadline(), Some(Instant::now() + EARLY_REFRESH));
    bench.pass(EARLY_REFRESH - Duration::from_millis(1)).await;
    assert!(!asked());
    bench.pass(Duration::from_millis(1)).await;
    assert!(asked(), "and one for all of those after a second");
    bench.pass(Duration::from_secs(10)).await;
    assert!(!asked() && bench.registry.next_deadline().is_none());
    bench.registry.on_miss();
    assert!(asked(), "at once again after a quiet time");
}
