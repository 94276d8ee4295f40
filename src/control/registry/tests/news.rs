//! The status and its events, as people read them.

use super::{
    super::entry::{REPORT_LOST_NETWORK_AFTER, TELL_AGAIN},
    *,
};
use crate::pool::tally::Trouble;

/// Docker >= 28 tells that a container has left its network before it tells that it has ended.
#[tokio::test(start_paused = true)]
async fn a_crash_is_told_as_an_end_and_a_lost_network_as_a_lost_network() {
    let lost = || {
        let mut endpoint: Endpoint = container("a").into();
        let (what, advice) = ("it shares no network with the proxy".to_owned(), "connect it".to_owned());
        endpoint.reach = Err(Obstacle { what, advice });
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
    assert_eq!(unseen.registry.next_deadline(), Some(Instant::now() + REPORT_LOST_NETWORK_AFTER));
    unseen.pass(REPORT_LOST_NETWORK_AFTER).await;
    assert_eq!(unseen.told(Kind::NotRouted), ["is not routed: it was disconnected from the network in use"]);
    assert_eq!(unseen.registry.next_deadline(), None);

    let (mut moved, _request) = ready();
    moved.change(upsert(container("a")));
    moved.answer("a", &["m"]);
    moved.pass(Duration::from_secs(60)).await;
    assert_eq!((moved.told(Kind::NotRouted).len(), moved.table()), (0, vec!["m: a".to_owned()]));
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
        attempt.failed(Trouble::Status(500), Instant::now());
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

    // A failure after a success is news, though not each time.
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
