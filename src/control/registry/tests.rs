//! First the registry by hand, one step at a time, its probes answered by the test and its clock stopped; then as it
//! runs, asking servers over TCP that behave as badly as servers can.

use std::{net::SocketAddr, sync::atomic::AtomicBool};

use serde_json::value::RawValue;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::{advance, sleep},
};

use super::*;
use crate::{
    base::fetch::FetchError,
    control::{
        discovery::{
            Health, HealthCheck, Incarnation, Obstacle,
            fixed::{self, EndpointBuilder, FixedHandle},
        },
        probe::ProbeError,
    },
    pool::{
        backend::Refused,
        table::{Lookup, TableReader, table},
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

/// A container at an address where nobody is; what its own probe finds out is never read.
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
    /// What [`Registry::run`] does after each input.
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
    assert!(bench.is_ready(), "who has ended or is not to be asked is not waited for");
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
async fn a_restart_of_the_engine_takes_no_backend_out() {
    for required in [false, true] {
        for word in [Health::Starting, Health::None, Health::Unknown] {
            let mut bench = bench(|config| config.require_healthcheck = required);
            let seen = |health: Health, mark: u64| {
                let s = Duration::from_secs;
                let check = HealthCheck { mark, ..HealthCheck::every(s(20), s(5), s(0)) };
                container("a").health(health).health_check(check)
            };
            bench.change(Change::Reset(vec![seen(Health::Starting, 0).into()]));
            bench.change(upsert(seen(Health::Healthy, 1)));
            bench.answer("a", &["m"]);
            let member = bench.member("m");
            let request = member.try_acquire(Instant::now()).unwrap();
            // The engine is away, and comes back.
            let away = DiscoveryError { what: "the engine is away".to_owned(), advice: "wait".to_owned() };
            bench.registry.on_change(Err(away));
            bench.pass(Duration::from_secs(600)).await;
            bench.change(Change::Reset(vec![seen(word, 1).into()]));
            bench.change(upsert(seen(word, 1)));
            assert_eq!(bench.table(), ["m: a"], "{word:?}");
            bench.pass(Duration::from_secs(20)).await;
            bench.change(upsert(seen(Health::Healthy, 2)));
            bench.pass(Duration::from_secs(3_600)).await;
            assert!(Arc::ptr_eq(&member, &bench.member("m")) && !member.backend.is_closed(), "{word:?}");
            drop(request);
            assert!(bench.told(Kind::HealthCheck).iter().all(|told| !told.contains("overdue")));
            // What it says after that counts.
            bench.change(upsert(seen(Health::Unhealthy, 3)));
            assert_eq!(bench.why_not_ready("m"), "it is unhealthy");
            bench.change(upsert(seen(word, 3)));
            assert_eq!(bench.why_not_ready("m"), "it is unhealthy", "{word:?} is no news");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_health_check_that_is_frozen_is_looked_at_in_time_and_replaced() {
    for word in [Health::Starting, Health::Unhealthy] {
        let mut bench = bench(|config| config.require_healthcheck = true);
        let (looks, mut looked) = mpsc::channel(8);
        bench.registry.looks = Some(looks);
        let s = Duration::from_secs;
        let seen = |health: Health, mark: u64| {
            container("a").health(health).health_check(HealthCheck { mark, ..HealthCheck::every(s(10), s(5), s(60)) })
        };
        bench.change(upsert(seen(word, 1)));
        assert!(bench.registry.entries["a"].probe.is_none());
        assert_eq!(bench.registry.next_deadline(), Some(Instant::now() + s(85)));
        bench.pass(s(84)).await;
        assert!(looked.try_recv().is_err());
        bench.pass(s(1)).await;
        assert_eq!(&*looked.try_recv().unwrap(), "a");
        assert_eq!(bench.registry.next_deadline(), None, "it is asked for once");
        bench.change(upsert(seen(word, 1)));
        let told = bench.told(Kind::HealthCheck);
        assert!(told.len() == 1 && told[0].contains("overdue"), "{told:?}");
        let status = bench.registry.status().containers.remove(0);
        assert!(status.problems.iter().any(|problem| problem.contains("docker inspect")), "{:?}", status.problems);
        bench.answer("a", &["m"]);
        assert_eq!(bench.table(), ["m: a"], "its own answer has made it ready");
        bench.change(upsert(seen(word, 1)));
        assert_eq!((bench.table(), bench.told(Kind::HealthCheck).len()), (vec!["m: a".to_owned()], 1));
        bench.change(upsert(seen(Health::Unhealthy, 2)));
        assert_eq!(bench.table(), ["m: -"], "a check that goes on counts again");
        assert_eq!(bench.told(Kind::HealthCheck).len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn words_for_health_that_are_not_known_leave_it_to_the_probe() {
    let mut bench = bench(|config| config.require_healthcheck = true);
    bench.change(upsert(container("a").health(Health::Unknown)));
    assert_eq!(bench.told(Kind::HealthCheck).len(), 1, "and it is said");
    bench.answer("a", &["m"]);
    assert_eq!(bench.table(), ["m: a"]);
    bench.change(upsert(container("a").health(Health::Starting)));
    assert_eq!(bench.table(), ["m: a"]);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_has_never_been_well_is_waited_for_whatever_its_check_says() {
    let is_coming = |bench: &Bench| match bench.reader.snapshot().lookup("m") {
        Lookup::NoneReady(route) => route.is_coming,
        other => panic!("m must be known and not ready, not {other:?}"),
    };
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a").health(Health::Healthy)));
    bench.answer("a", &["m"]);
    bench.change(upsert(container("a").health(Health::Unhealthy)));
    assert!(!is_coming(&bench), "it has been well");
    // The next run takes longer to load than its check has patience.
    for first in [Health::Starting, Health::Unhealthy] {
        bench.change(Change::Ended("a".into()));
        bench.change(upsert(container("a").incarnation(2).health(first)));
        bench.change(upsert(container("a").incarnation(2).health(Health::Unhealthy)));
        bench.pass(REPLACED_WITHIN * 2).await;
        assert!(is_coming(&bench));
    }
    bench.change(upsert(container("a").incarnation(2).health(Health::Healthy)));
    assert!(is_coming(&bench));
    bench.answer("a", &["m"]);
    assert_eq!(bench.table(), ["m: a"]);
}

/// Docker >= 28 tells that a container has left its network before it tells that it has ended.
/// What has been told of containers, without their names.
fn told_of_all(bench: &mut Bench) -> Vec<String> {
    bench.registry.status().events.into_iter().filter(|event| event.container.is_some()).map(|e| e.text).collect()
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

#[tokio::test(start_paused = true)]
async fn nothing_is_said_of_the_health_of_a_container_that_cannot_be_read() {
    for is_required in [false, true] {
        let mut bench = bench(|config| config.require_healthcheck = is_required);
        let mut unread: Endpoint = container("a").incarnation(Incarnation::UNKNOWN.0).health(Health::Unknown).into();
        let (what, advice) = ("the engine does not tell about it".to_owned(), "see its log".to_owned());
        unread.reach = Err(Obstacle { what, advice });
        for _ in 0..9 {
            bench.change(Change::Reset(vec![unread.clone()]));
            bench.pass(Duration::from_secs(60)).await;
        }
        assert_eq!(bench.told(Kind::HealthCheck), [""; 0], "nothing is known of its check");
        assert_eq!(bench.told(Kind::NotRouted), ["is not routed: the engine does not tell about it"]);
        let read = || container("a").incarnation(2).health(Health::Healthy);
        bench.change(upsert(read()));
        bench.answer("a", &["m"]);
        assert_eq!((bench.table(), bench.told(Kind::HealthCheck)), (vec!["m: a".to_owned()], Vec::new()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_note_without_advice_alarms_nobody() {
    let mut bench = bench(|_| {});
    let note = |what: &str, advice: Option<&str>| Note { what: what.to_owned(), advice: advice.map(str::to_owned) };
    bench.change(Change::Notes(vec![note("odd but fine", None), note("limited", Some("do this"))]));
    let status = bench.registry.status();
    assert_eq!(status.discovery.notes, ["odd but fine", "limited; do this"]);
    let told: Vec<(bool, &str)> = status.events.iter().map(|event| (event.warning, event.text.as_str())).collect();
    assert_eq!(told, [(false, "odd but fine"), (true, "limited")]);
}

#[tokio::test(start_paused = true)]
async fn a_crash_is_told_as_an_end_and_a_lost_network_as_a_lost_network() {
    let lost = || {
        let mut endpoint: Endpoint = container("a").into();
        let (what, advice) = ("it shares no network with the proxy".to_owned(), "connect it".to_owned());
        endpoint.reach = Err(crate::control::discovery::Obstacle { what, advice });
        Change::Upsert(Box::new(endpoint))
    };
    let ready = || {
        let mut bench = bench(|_| {});
        bench.change(upsert(container("a")));
        bench.answer("a", &["m"]);
        let request = bench.member("m").try_acquire(Instant::now()).unwrap();
        bench.change(Change::Detached("a".into()));
        assert_eq!(bench.table(), ["m: -"], "it is acted upon at once");
        assert!(bench.told(Kind::NotRouted).is_empty());
        (bench, request)
    };
    let (mut crashed, _request) = ready();
    crashed.change(Change::Ended("a".into()));
    assert_eq!(crashed.told(Kind::NotRouted), [""; 0]);
    assert_eq!(crashed.told(Kind::Gone), ["has ended with requests in flight (1)"]);

    let (mut disconnected, _request) = ready();
    disconnected.change(lost());
    assert_eq!(disconnected.told(Kind::NotRouted), ["is not routed: it shares no network with the proxy"]);
    disconnected.pass(Duration::from_secs(60)).await;
    assert_eq!(disconnected.told(Kind::NotRouted).len(), 1);

    let (mut unseen, _request) = ready();
    assert_eq!(unseen.registry.next_deadline(), Some(Instant::now() + TELL_DETACHED_AFTER));
    unseen.pass(TELL_DETACHED_AFTER).await;
    assert_eq!(unseen.told(Kind::NotRouted), ["is not routed: it was disconnected from the network in use"]);
    assert_eq!(unseen.registry.next_deadline(), None);

    let (mut moved, _request) = ready();
    moved.change(upsert(container("a")));
    moved.answer("a", &["m"]);
    moved.pass(Duration::from_secs(60)).await;
    assert_eq!((moved.told(Kind::NotRouted).len(), moved.table()), (0, vec!["m: a".to_owned()]));
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
            (bench.table(), state_name(bench.registry.entries["a"].life.state())),
            (vec!["m: b".to_owned()], "draining")
        );
        bench.change(Change::Ended("a".into()));
        assert_eq!(bench.table(), ["m: b"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_model_is_worth_waiting_for_while_a_container_starts_that_may_have_it() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(60));
    bench.change(upsert(container("a")));
    bench.answer("a", &["m"]);
    bench.change(upsert(container("b")));
    bench.answer("b", &["n"]);
    let is_coming = |bench: &Bench| match bench.reader.snapshot().lookup("m") {
        Lookup::NoneReady(route) => route.is_coming,
        other => panic!("m must be known and not ready, not {other:?}"),
    };
    bench.change(upsert(container("a").health(Health::Unhealthy)));
    assert!(!is_coming(&bench), "who is unhealthy is not starting");
    bench.change(upsert(container("a").health(Health::Healthy)));
    assert!(is_coming(&bench), "it is being probed, and had it before");
    bench.change(Change::Stopping("a".into()));
    assert!(!is_coming(&bench));
    bench.change(Change::Ended("a".into()));
    assert!(!is_coming(&bench));
    // Its models are known only when it has told them: perhaps those of whom it replaces.
    bench.change(upsert(container("other").health(Health::Starting)));
    assert!(!is_coming(&bench), "it has nothing to do with it");
    bench.change(upsert(container("new").role("a").health(Health::Starting)));
    assert!(is_coming(&bench));
    bench.change(upsert(container("new").role("a").health(Health::Healthy)));
    assert!(is_coming(&bench));
    bench.answer("new", &["n"]);
    assert!(!is_coming(&bench), "not this one");
}

#[tokio::test(start_paused = true)]
async fn the_next_container_is_waited_for_where_the_last_one_is_stopped_first() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(60));
    let of_service = |name: &str| container(name).role("app/llm").stopped_first();
    let is_coming = |bench: &Bench| match bench.reader.snapshot().lookup("m") {
        Lookup::NoneReady(route) => Some(route.is_coming),
        _ => None,
    };
    for name in ["one", "two"] {
        bench.change(upsert(of_service(name)));
        bench.answer(name, &["m"]);
    }
    bench.change(Change::Stopping("one".into()));
    bench.change(Change::Ended("one".into()));
    assert_eq!(is_coming(&bench), None, "the other one serves it");
    bench.pass(REPLACED_WITHIN).await;
    bench.change(Change::Stopping("two".into()));
    assert_eq!(is_coming(&bench), Some(true), "who stops it may start another one");
    bench.change(Change::Ended("two".into()));
    assert_eq!(is_coming(&bench), Some(true));
    bench.pass(REPLACED_WITHIN - Duration::from_millis(1)).await;
    assert_eq!(is_coming(&bench), Some(true));
    bench.pass(Duration::from_millis(1)).await;
    assert_eq!(is_coming(&bench), Some(false), "it was stopped to stay so");
    assert_eq!(bench.registry.expected.len(), 0);
    // Nobody has told it to stop: it crashed.
    bench.change(upsert(of_service("three")));
    bench.answer("three", &["m"]);
    bench.change(Change::Ended("three".into()));
    assert_eq!(is_coming(&bench), Some(false));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_is_called_when_a_table_is_published() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(60));
    bench.change(upsert(container("a")));
    bench.answer("a", &["m"]);
    let model = bench.member("m").model.clone();
    let ticket = model.waiting.join(1, crate::pool::waiting::Takes::Any).unwrap();
    let is_called = || ticket.called().now_or_never().is_some();
    assert!(!is_called());
    bench.change(Change::Ended("a".into()));
    assert!(is_called(), "there is nobody to wait for any more");
    bench.pass(Duration::from_secs(61)).await;
    assert_eq!(bench.table(), [""; 0]);
    assert!(is_called(), "its model has been forgotten");
}

/// Whoever finds nobody ready, joins the line and finds nobody still, may sleep: the table that came meanwhile has called.
#[tokio::test(start_paused = true)]
async fn whoever_begins_to_wait_while_a_table_is_made_is_called() {
    use std::{sync::atomic::AtomicUsize, time::Instant};
    const ROUNDS: usize = 500;
    const TOO_LONG: Duration = Duration::from_secs(5);
    let mut bench = bench(|_| {});
    // So that the making of a table takes its time.
    let others: Vec<String> = (0..200).map(|n| format!("other-{n}")).collect();
    bench.change(upsert(container("b")));
    bench.answer("b", &others.iter().map(String::as_str).collect::<Vec<_>>());
    bench.change(upsert(container("a")));
    let since = Instant::now();
    bench.answer("a", &["m"]);
    let usual = since.elapsed();
    let model = bench.member("m").model.clone();
    let (reader, round, served) = (bench.reader.clone(), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for now in 1..=ROUNDS {
                while round.load(Ordering::SeqCst) < now {
                    std::hint::spin_loop();
                }
                if round.load(Ordering::SeqCst) == usize::MAX {
                    return;
                }
                // At another moment of the making each time.
                let since = Instant::now();
                while since.elapsed() < usual * (now % 50) as u32 / 50 {
                    std::hint::spin_loop();
                }
                let ticket = model.waiting.join(9, crate::pool::waiting::Takes::Any).unwrap();
                if !matches!(reader.snapshot().lookup("m"), Lookup::Ready(_)) {
                    while ticket.called().now_or_never().is_none() && since.elapsed() < TOO_LONG {
                        std::thread::yield_now();
                    }
                }
                served.fetch_add(usize::from(since.elapsed() < TOO_LONG), Ordering::SeqCst);
                drop(ticket);
                round.store(0, Ordering::SeqCst);
            }
        });
        let mut lost = 0;
        for now in 1..=ROUNDS {
            bench.change(Change::Suspended("a".into()));
            bench.change(upsert(container("a")));
            round.store(now, Ordering::SeqCst);
            bench.answer("a", &["m"]);
            while round.load(Ordering::SeqCst) != 0 {
                std::thread::yield_now();
            }
            lost = now - served.load(Ordering::SeqCst);
            if lost > 0 {
                break;
            }
        }
        // The other thread ends by itself.
        round.store(usize::MAX, Ordering::SeqCst);
        assert_eq!(lost, 0, "a call was lost");
    });
}

#[tokio::test(start_paused = true)]
async fn who_refuses_connections_is_looked_at_and_probed_once_a_second() {
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
async fn models_of_a_container_come_change_and_go_together() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(60));
    bench.change(upsert(container("a")));
    bench.answer("a", &["x", "y", "z"]);
    assert_eq!(bench.table(), ["x: a", "y: a", "z: a"]);
    let y = bench.member("y");
    bench.answer("a", &["w", "x", "y"]);
    assert_eq!(bench.table(), ["w: a", "x: a", "y: a", "z: -"]);
    assert!(Arc::ptr_eq(&y, &bench.member("y")), "one that stays keeps its place and its count");
    let generation = bench.reader.snapshot().generation;
    bench.answer("a", &["w", "x", "y"]);
    assert_eq!(bench.reader.snapshot().generation, generation, "nothing new, no new table");

    bench.change(Change::Stopping("a".into()));
    assert_eq!(y.try_acquire(Instant::now()).unwrap_err(), Refused::Closed, "whatever snapshot a request holds");
    assert_eq!(bench.table(), ["w: -", "x: -", "y: -", "z: -"]);
    assert_eq!(bench.reader.snapshot().openai_list(), r#"{"object":"list","data":[]}"#);

    bench.pass(Duration::from_secs(20)).await;
    bench.change(Change::Ended("a".into()));
    assert_eq!(bench.why_not_ready("x"), "its container has gone");
    bench.pass(Duration::from_secs(40)).await;
    assert_eq!(bench.table(), ["w: -", "x: -", "y: -"], "each has its grace from when it went");
    bench.pass(Duration::from_secs(20)).await;
    assert_eq!(bench.table(), [""; 0]);
    assert_eq!(bench.registry.next_deadline(), None);
}

#[tokio::test(start_paused = true)]
async fn replicas_share_a_model_or_the_newest_takes_all() {
    for (same_model, both) in [(SameModel::Balance, "m: b a"), (SameModel::Newest, "m: a")] {
        let mut bench = bench(|config| config.same_model = same_model);
        for id in ["a", "b"] {
            bench.change(upsert(container(id)));
        }
        // Newest is who became ready last, whatever their ids and whoever was seen last.
        bench.answer("b", &["m", "only-b"]);
        bench.answer("a", &["m"]);
        assert_eq!(bench.table(), [both, "only-b: b"]);
        bench.change(Change::Stopping("a".into()));
        assert_eq!(bench.table(), ["m: b", "only-b: b"], "the other one takes over at once");
        bench.change(Change::Ended("a".into()));
        bench.change(Change::Ended("b".into()));
        assert_eq!(bench.table(), ["m: -", "only-b: -"]);
    }
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

#[tokio::test(start_paused = true)]
async fn without_a_health_check_nothing_is_routed_where_one_is_required() {
    let mut bench = bench(|config| config.require_healthcheck = true);
    bench.change(Change::Reset(vec![container("a").into(), container("b").health(Health::Healthy).into()]));
    bench.answer("b", &["m"]);
    assert!(bench.registry.entries["a"].probe.is_none());
    let reason = bench.registry.status().containers[0].reason.clone().unwrap();
    assert!(reason.contains("PROXY_REQUIRE_HEALTHCHECK"), "{reason}");
    assert_eq!(bench.table(), ["m: b"]);
}

#[tokio::test(start_paused = true)]
async fn the_status_explains_every_container_and_tells_what_has_happened() {
    let mut bench = bench(|config| config.require_healthcheck = true);
    bench.change(Change::Reset(vec![
        container("bare").into(),
        container("live").health(Health::Healthy).label("inference.max_inflight", "4").into(),
        container("sick").health(Health::Unhealthy).label("inference.prot", "1").into(),
        container("slow").health(Health::Healthy).into(),
    ]));
    bench.answer("live", &["m", "n"]);
    bench.answer("slow", &[]);
    let status = bench.registry.status();
    let explained: Vec<(&str, &str, bool, bool)> = status
        .containers
        .iter()
        .map(|c| (c.name.as_str(), c.state.as_str(), c.reason.is_some(), c.advice.is_some()))
        .collect();
    let expected = [
        ("bare", "discovered", true, true),
        ("live", "ready", false, false),
        ("sick", "discovered", true, true),
        ("slow", "probing", true, true),
    ];
    assert_eq!(explained, expected);
    for container in &status.containers {
        let (reason, advice) = (container.reason.as_deref(), container.advice.as_deref());
        assert!(!reason.is_some_and(|reason| reason.contains("; ")), "{reason:?} holds advice");
        assert!(advice.is_none_or(|advice| !advice.ends_with('.')), "{advice:?}");
    }
    assert!(status.containers[2].problems[0].contains("inference.port"), "{:?}", status.containers[2].problems);
    assert!(status.containers[3].last_error.as_ref().unwrap().text.contains("nobody listens"));
    let live = &status.containers[1];
    assert_eq!((live.max_inflight, live.weight, live.breaker.as_deref()), (Some(4), 1.0, Some("closed")));
    let models: Vec<(&str, bool, &[String])> =
        status.models.iter().map(|model| (model.id.as_str(), model.ready, &*model.replicas)).collect();
    assert_eq!(models, [("m", true, &["live".to_owned()][..]), ("n", true, &["live".to_owned()])]);

    // Requests fail until the breaker opens; then the container ends.
    let member = bench.member("m");
    for _ in 0..5 {
        let mut attempt = member.try_acquire(Instant::now()).unwrap();
        attempt.failed(crate::pool::tally::Trouble::Status(500), Instant::now());
    }
    let resting = bench.registry.status().containers.remove(1);
    assert_eq!((resting.state.as_str(), resting.breaker.as_deref()), ("ready", Some("open")));
    assert!(resting.reason.is_some_and(|reason| reason.contains("circuit breaker")));
    assert_eq!((resting.failed, resting.last_error.unwrap().text.as_str()), (5, "it answered 500"));
    bench.change(Change::Ended("live".into()));
    let status = bench.registry.status();
    assert_eq!(status.containers.len(), 3, "what has ended is no container any more");
    assert!(status.models.iter().all(|model| !model.ready && model.reason.is_some()));
    let kinds: Vec<(&str, &str)> =
        status.events.iter().map(|e| (e.container.as_deref().unwrap_or("-"), e.kind.as_str())).collect();
    let expected = [
        ("bare", "not_routed"),
        ("live", "probing"),
        ("sick", "label"),
        ("sick", "not_routed"),
        ("slow", "probing"),
        ("-", "discovery_sees"),
        ("live", "ready"),
        ("slow", "probe_failed"),
        ("live", "breaker_open"),
        ("live", "gone"),
    ];
    assert_eq!(kinds, expected);
}

/// Ids as long as they may be, and as many: `n` tells one set from the next.
fn endless_ids(n: usize) -> Vec<String> {
    (0..MODELS_MAX).map(|i| format!("{n}-{i}-{:x<240}", "")).collect()
}

#[tokio::test(start_paused = true)]
async fn a_container_with_a_thousand_models_does_not_fill_what_is_told() {
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a")));
    for n in 0..8 {
        bench.answer("a", &endless_ids(n % 2).iter().map(String::as_str).collect::<Vec<_>>());
        if n % 2 == 1 {
            bench.change(Change::Suspended("a".into()));
            bench.change(upsert(container("a")));
        }
    }
    let events = bench.registry.status().events;
    assert!(events.iter().filter(|event| event.text.contains("0-3-xxx")).count() >= 4, "{events:?}");
    let longest = events.iter().map(|event| event.text.len()).max();
    assert!(longest <= Some(1024), "{longest:?} bytes");

    bench.change(upsert(container("b")));
    bench.answer("b", &["1", "2", "3", "4", "5"]);
    bench.answer("b", &["1", "2", "3", "4", "5", "6", "7"]);
    assert!(bench.told(Kind::Ready).pop().unwrap().ends_with(" with 1, 2, 3, 4, 5"));
    assert_eq!(bench.told(Kind::Models).pop().unwrap(), "has other models now: 1, 2, 3, 4, 5 and 2 more");
}

#[tokio::test(start_paused = true)]
async fn models_that_have_gone_are_bounded_for_each_container() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(86_400));
    for id in ["a", "b", "c"] {
        bench.change(upsert(container(id)));
    }
    bench.answer("b", &["of-b", "other"]);
    bench.answer("b", &["other"]);
    bench.answer("c", &["of-c"]);
    bench.change(Change::Ended("c".into()));
    let known = |bench: &Bench| bench.registry.models.len();
    for n in 0..5 {
        bench.pass(Duration::from_secs(1)).await;
        bench.answer("a", &endless_ids(n).iter().map(String::as_str).collect::<Vec<_>>());
        assert!(known(&bench) <= MODELS_MAX + GONE_MAX + 3, "{} after {n}", known(&bench));
    }
    // What it has, what it had last, and what others have and had.
    for n in [3, 4] {
        assert!(endless_ids(n).iter().all(|id| bench.registry.models.contains_key(&**id)), "{n}");
    }
    assert_eq!(bench.why_not_ready("of-b"), "its container has gone");
    assert_eq!(bench.why_not_ready("of-c"), "its container has gone");

    // Fewer at a time: the oldest of them go first.
    bench.pass(Duration::from_secs(1)).await;
    bench.answer("a", &["new"]);
    assert!(endless_ids(4).iter().all(|id| bench.registry.models.contains_key(&**id)));
    assert_eq!(known(&bench), 1 + GONE_MAX + 3);
    bench.pass(Duration::from_secs(1)).await;
    bench.answer("a", &["newer"]);
    assert_eq!((bench.why_not_ready("new"), known(&bench)), ("its container has gone", 1 + GONE_MAX + 3));
    assert_eq!(endless_ids(4).iter().filter(|id| bench.registry.models.contains_key(&***id)).count(), GONE_MAX - 1);
    // Whose container goes away loses nothing of what it had at last.
    bench.change(Change::Ended("a".into()));
    assert_eq!(bench.why_not_ready("newer"), "its container has gone");
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_fails_is_told_once_for_each_kind_of_failure() {
    let path = || "/v1/models".to_owned();
    let unusable = |n: usize| ProbeError::Unusable { path: path(), what: format!("the model id {n} is blank") };
    let status = |n: u16| ProbeError::Status { path: path(), status: http::StatusCode::from_u16(n).unwrap() };
    let mut bench = bench(|_| {});
    bench.change(upsert(container("a")));
    for n in 0..200 {
        bench.pass(Duration::from_secs(1)).await;
        bench.fail("a", unusable(n));
        // Nor does it help to take turns.
        bench.fail("a", status(500 + u16::try_from(n % 90).unwrap()));
        bench.fail("a", unusable(1000 + n));
    }
    let told = bench.told(Kind::ProbeFailed);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains("the model id 0 is blank") && told[1].contains("answered 500"), "{told:?}");
    let reason = bench.registry.status().containers[0].reason.clone().unwrap();
    assert!(reason.contains("the model id 1199 is blank"), "the status has the latest: {reason}");
    bench.fail("a", status(404));
    assert_eq!(bench.told(Kind::ProbeFailed).len(), 3, "another kind is news");

    // What fails after it has worked is news, though not each time.
    let count = |bench: &mut Bench| bench.told(Kind::ProbeFailed).len();
    bench.answer("a", &["m"]);
    for _ in 0..30 {
        bench.fail("a", unusable(1));
        bench.answer("a", &["m"]);
        bench.pass(Duration::from_secs(1)).await;
    }
    assert_eq!(count(&mut bench), 4);
    bench.pass(TELL_AGAIN).await;
    bench.answer("a", &["m"]);
    bench.fail("a", unusable(1));
    assert_eq!(count(&mut bench), 5);
    assert!(bench.told(Kind::ProbeFailed)[4].starts_with("is live, but does not tell its models: "));
}

// === as it runs ===

/// A registry at work, fed by hand.
struct Live {
    fixed: FixedHandle,
    reader: TableReader,
    asks: mpsc::Sender<Ask>,
}

fn live(configure: impl FnOnce(&mut Config)) -> Live {
    let Bench { registry, reader, .. } = bench(configure);
    let (discovery, fixed) = fixed::channel();
    let (asks, asked) = mpsc::channel(1);
    tokio::spawn(registry.run(Box::new(discovery), asked));
    Live { fixed, reader, asks }
}

impl Live {
    async fn status(&self, name: &str) -> ContainerStatus {
        let (reply, status) = oneshot::channel();
        self.asks.send(Ask::Status(reply)).await.unwrap();
        let mut containers = status.await.unwrap().containers.into_iter();
        containers.find(|container| container.name == name).unwrap()
    }

    /// Waits until the container is as `condition` wants it.
    async fn until(&self, name: &str, condition: impl Fn(&ContainerStatus) -> bool) -> ContainerStatus {
        let waiting = async {
            loop {
                match self.status(name).await {
                    status if condition(&status) => return status,
                    _ => sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let waited = timeout(Duration::from_secs(30), waiting).await;
        waited.unwrap_or_else(|_| panic!("{name} never got there"))
    }

    fn is_routed(&self, model: &str) -> bool {
        matches!(self.reader.snapshot().lookup(model), Lookup::Ready(_))
    }
}

/// A server that answers 404 to everything but `/v1/models`, which `answer` takes over: the connection, and how many
/// asked before.
async fn server<F: Future<Output = ()> + Send + 'static>(
    answer: impl Fn(TcpStream, usize) -> F + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut asked = 0;
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match connection.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => break,
                }
            }
            if head.starts_with(b"GET /v1/models ") {
                tokio::spawn(answer(connection, asked));
                asked += 1;
            } else {
                let _ = connection.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
            }
        }
    });
    addr
}

fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// A server that always answers with these bytes.
async fn saying(bytes: Vec<u8>) -> SocketAddr {
    let bytes = Arc::new(bytes);
    server(move |mut connection, _| {
        let bytes = bytes.clone();
        async move {
            let _ = connection.write_all(&bytes).await;
        }
    })
    .await
}

#[tokio::test]
async fn what_a_server_learns_is_found_when_somebody_asks_for_it() {
    let addr = server(|mut connection, asked| async move {
        let models = [r#"{"data":[{"id":"m"}]}"#, r#"{"data":[{"id":"m"},{"id":"lora"}]}"#];
        let _ = connection.write_all(&ok(models[asked.min(1)])).await;
    })
    .await;
    let live = live(|config| config.models_refresh = Duration::from_secs(3_600));
    live.fixed.upsert(fixed::endpoint("a", addr)).await;
    live.until("a", |a| a.state == "ready").await;
    assert!(live.is_routed("m") && !live.is_routed("lora"));
    live.reader.report_miss();
    live.until("a", |a| a.models.len() == 2).await;
    assert!(live.is_routed("lora"));
}

#[tokio::test]
async fn a_server_that_never_answers_delays_no_other() {
    let (hung, mut hanging) = mpsc::channel(1);
    let silent = server(move |connection, _| {
        let hung = hung.clone();
        async move { hung.send(connection).await.unwrap() }
    })
    .await;
    let good = saying(ok(r#"{"data":[{"id":"m"}]}"#)).await;
    let live = live(|_| {});
    live.fixed.upsert(fixed::endpoint("silent", silent)).await;
    let _connection = hanging.recv().await.unwrap();
    live.fixed.upsert(fixed::endpoint("good", good)).await;
    live.until("good", |good| good.state == "ready").await;
    live.fixed.stopping("good").await;
    live.until("good", |good| good.state == "draining").await;
    assert!(!live.is_routed("m"));
    let reason = live.status("silent").await.reason;
    let waiting = "it is being asked for its models";
    assert_eq!(reason.as_deref(), Some(waiting), "all of that came before its first time-out");
}

#[tokio::test]
async fn hostile_answers_register_nothing_and_are_bounded() {
    let followed = Arc::new(AtomicBool::new(false));
    let note = followed.clone();
    let elsewhere = server(move |_, _| {
        note.store(true, Ordering::Release);
        std::future::ready(())
    })
    .await;
    let listing = |ids: usize| {
        let ids: Vec<String> = (0..ids).map(|n| format!(r#"{{"id":"{n}"}}"#)).collect();
        format!(r#"{{"data":[{}]}}"#, ids.join(","))
    };
    let huge = format!(r#"{{"data":[{{"id":"m","pad":"{}"}}]}}"#, "x".repeat(50_000_000));
    let redirect = format!("HTTP/1.1 302 Found\r\nlocation: http://{elsewhere}/v1/models\r\ncontent-length: 0\r\n\r\n");
    let endless = server(|mut connection, _| async move {
        let _ = connection.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"data\":[").await;
        while connection.write_all(&[b' '; 64 * 1024]).await.is_ok() {}
    });
    let slow = server(|mut connection, _| async move {
        let _ = connection.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"data\":[").await;
        while connection.write_all(b" ").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    });
    let control = "{\"data\":[{\"id\":\"m\\u001b[2J\"}]}";
    let servers = [
        ("huge", saying(ok(&huge)).await, "more than"),
        ("endless", endless.await, "more than"),
        ("slow", slow.await, "no complete answer"),
        ("redirect", saying(redirect.into_bytes()).await, "302"),
        ("html", saying(ok("<!doctype html><html></html>")).await, "JSON"),
        ("many", saying(ok(&listing(100_000))).await, "more than"),
        ("too many", saying(ok(&listing(2_000))).await, "at most 1024"),
        ("control", saying(ok(control)).await, "control"),
        ("empty", saying(ok(r#"{"data":[]}"#)).await, "empty"),
        ("cut", saying(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_vec()).await, "broke"),
        ("no-http", saying(b"SSH-2.0-OpenSSH\r\n".to_vec()).await, "broke"),
    ];
    let live = live(|_| {});
    for (name, addr, _) in &servers {
        live.fixed.upsert(fixed::endpoint(name, *addr)).await;
    }
    let began = std::time::Instant::now();
    for (name, _, why) in &servers {
        let asked = |status: &ContainerStatus| status.reason.as_deref() != Some("it is being asked for its models");
        let status = live.until(name, asked).await;
        assert_eq!(status.state, "probing", "{name}");
        let reason = status.reason.unwrap_or_default();
        assert!(reason.contains(why) && reason.len() < 300, "{name}: {reason}");
        assert!(!reason.contains('\u{1b}'), "{name}: {reason}");
    }
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert!(live.reader.snapshot().routes().is_empty());
    assert!(!followed.load(Ordering::Acquire), "a redirect was followed");
}
