//! Health checks: their verdicts, and the proxy's own probe where they give none.

use super::*;
use crate::control::{discovery::HealthCheck, registry::pools::REPLACED_WITHIN};

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
            // A later verdict counts.
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
