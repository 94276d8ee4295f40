//! The models that are routed, known and waited for, as the registry publishes them.

use super::{
    super::pools::{GONE_MAX, REPLACED_WITHIN},
    *,
};
use crate::{base::config::SameModel, pool::waiting::Takes};

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
    assert!(!is_coming(&bench), "an unhealthy container is not starting");
    bench.change(upsert(container("a").health(Health::Healthy)));
    assert!(is_coming(&bench), "it is being probed, and had it before");
    bench.change(Change::Stopping("a".into()));
    assert!(!is_coming(&bench));
    bench.change(Change::Ended("a".into()));
    assert!(!is_coming(&bench));
    // A starting container has announced nothing yet: it may serve the models of the one that it replaces.
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
    assert_eq!(is_coming(&bench), Some(true), "another one may be started in its place");
    bench.change(Change::Ended("two".into()));
    assert_eq!(is_coming(&bench), Some(true));
    bench.pass(REPLACED_WITHIN - Duration::from_millis(1)).await;
    assert_eq!(is_coming(&bench), Some(true));
    bench.pass(Duration::from_millis(1)).await;
    assert_eq!(is_coming(&bench), Some(false), "it was stopped to stay so");
    assert_eq!(bench.registry.known.expected.len(), 0);
    // It crashed: it was not told to stop.
    bench.change(upsert(of_service("three")));
    bench.answer("three", &["m"]);
    bench.change(Change::Ended("three".into()));
    assert_eq!(is_coming(&bench), Some(false));
}

#[tokio::test(start_paused = true)]
async fn waiting_requests_are_called_when_a_table_is_published() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(60));
    bench.change(upsert(container("a")));
    bench.answer("a", &["m"]);
    let model = bench.member("m").model.clone();
    let ticket = model.waiting.join(1, Takes::Any).unwrap();
    let is_called = || ticket.called().now_or_never().is_some();
    assert!(!is_called());
    bench.change(Change::Ended("a".into()));
    assert!(is_called(), "no container is left to wait for");
    bench.pass(Duration::from_secs(61)).await;
    assert_eq!(bench.table(), [""; 0]);
    assert!(is_called(), "its model has been forgotten");
}

/// A request that finds no replica ready joins the queue and looks once more. If it still finds none, it may sleep,
/// because a table that was published meanwhile has called it.
#[tokio::test(start_paused = true)]
async fn a_request_that_joins_the_queue_while_a_table_is_made_is_called() {
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
                let ticket = model.waiting.join(9, Takes::Any).unwrap();
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
        // The newest is the one that became ready last, not the one that was seen last or has the last id.
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
async fn models_that_have_gone_are_bounded_for_each_container() {
    let mut bench = bench(|config| config.model_grace = Duration::from_secs(86_400));
    for id in ["a", "b", "c"] {
        bench.change(upsert(container(id)));
    }
    bench.answer("b", &["of-b", "other"]);
    bench.answer("b", &["other"]);
    bench.answer("c", &["of-c"]);
    bench.change(Change::Ended("c".into()));
    let known = |bench: &Bench| bench.registry.known.models.len();
    for n in 0..5 {
        bench.pass(Duration::from_secs(1)).await;
        bench.answer("a", &endless_ids(n).iter().map(String::as_str).collect::<Vec<_>>());
        assert!(known(&bench) <= MODELS_MAX + GONE_MAX + 3, "{} after {n}", known(&bench));
    }
    // Its present models, its last ones, and the present and past ones of other containers.
    for n in [3, 4] {
        assert!(endless_ids(n).iter().all(|id| bench.registry.known.models.contains_key(&**id)), "{n}");
    }
    assert_eq!(bench.why_not_ready("of-b"), "its container has gone");
    assert_eq!(bench.why_not_ready("of-c"), "its container has gone");

    // Fewer at a time: the oldest of them go first.
    bench.pass(Duration::from_secs(1)).await;
    bench.answer("a", &["new"]);
    assert!(endless_ids(4).iter().all(|id| bench.registry.known.models.contains_key(&**id)));
    assert_eq!(known(&bench), 1 + GONE_MAX + 3);
    bench.pass(Duration::from_secs(1)).await;
    bench.answer("a", &["newer"]);
    assert_eq!((bench.why_not_ready("new"), known(&bench)), ("its container has gone", 1 + GONE_MAX + 3));
    assert_eq!(
        endless_ids(4).iter().filter(|id| bench.registry.known.models.contains_key(&***id)).count(),
        GONE_MAX - 1
    );
    // The models that a container had when it went away all stay known.
    bench.change(Change::Ended("a".into()));
    assert_eq!(bench.why_not_ready("newer"), "its container has gone");
}
