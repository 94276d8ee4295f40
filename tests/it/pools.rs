//! P1, P4, P9: several backends with one model.

use crate::support::*;

/// Two replicas that hold every request until the gate is open.
async fn two_that_hold(app: &TestApp) -> (Upstream, Upstream, Gate) {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    let gate = Gate::shut();
    for upstream in [&a, &b] {
        upstream.always(held_reply(&gate));
        app.add(Spec::of(upstream)).await;
    }
    (a, b, gate)
}

/// Sends `n` requests, each on a connection of its own, one after the other has reached a backend.
async fn send_held(app: &TestApp, n: usize, arrived: impl Fn() -> usize) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..n {
        let before = arrived();
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        eventually("it has reached a backend", async || arrived() == before + 1).await;
        clients.push(client);
    }
    clients
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p01_one_model_of_two_containers_is_one_entry_with_two_backends() {
    let app = TestApp::start().await;
    let (a, b, gate) = two_that_hold(&app).await;
    app.models_are(&["m"]).await;
    let clients = send_held(&app, 8, || a.count() + b.count()).await;
    assert!(a.count() >= 3 && b.count() >= 3, "{} and {}", a.count(), b.count());
    gate.open();
    for mut client in clients {
        assert_eq!(client.answer().await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p04_long_streams_are_spread_evenly() {
    let app = TestApp::start().await;
    let (a, b, gate) = two_that_hold(&app).await;
    // The answer has begun, and the request still counts until its body ends.
    for upstream in [&a, &b] {
        upstream.always(held_stream("data: 1\n\n", &gate, "data: 2\n\n"));
    }
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        clients.push(client);
    }
    let (at_a, at_b) = (a.count(), b.count());
    assert!(at_a.abs_diff(at_b) <= 2, "{at_a} and {at_b}");
    for (upstream, count) in [(&a, at_a), (&b, at_b)] {
        #[expect(clippy::cast_precision_loss, reason = "small")]
        app.inflight_is(upstream.name, "m", count as f64).await;
    }
    gate.open();
    for mut client in clients {
        assert!(client.finish().await.is_whole());
    }
    for upstream in [&a, &b] {
        app.inflight_is(upstream.name, "m", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p01_when_one_goes_nothing_is_lost() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    let app = TestApp::with(&[&a, &b]).await;
    let asking: Vec<_> = (0..4)
        .map(|_| {
            let addr = app.addr();
            tokio::spawn(async move {
                let mut client = Client::connect(addr).await;
                for _ in 0..100 {
                    let answer = client.ask(&Request::chat("m")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                }
            })
        })
        .collect();
    eventually("traffic flows", async || a.count() + b.count() > 40).await;
    app.stopping("a").await;
    app.rotation_is(1, "a is out").await;
    a.kill().await;
    app.ended("a").await;
    for asked in asking {
        soon("all answers", asked).await.unwrap();
    }
    app.models_are(&["m"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p01_models_of_one_replica_only_go_to_it() {
    let (a, b) = (Upstream::start("a", &["m", "lora"]).await, Upstream::start("b", &["m"]).await);
    let app = TestApp::with(&[&a, &b]).await;
    app.models_are(&["lora", "m"]).await;
    for _ in 0..20 {
        assert_eq!(app.ask(&Request::chat("lora")).await.json()["served_by"], "a");
    }
    app.ended("a").await;
    app.models_are(&["m"]).await;
    assert_openai_error(&app.ask(&Request::chat("lora")).await, 503, "model_unavailable");
    assert_eq!(app.ask(&Request::chat("m")).await.json()["served_by"], "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p01_newest_gets_all_and_the_older_one_takes_over() {
    let (old, new) = (Upstream::start("old", &["m", "n"]).await, Upstream::start("new", &["m"]).await);
    let app = TestApp::start_with(&[("PROXY_SAME_MODEL", "newest")]).await;
    app.announce(Spec::of(&old).image("engine:1")).await;
    app.models_are(&["m", "n"]).await;
    let served_by = async |model: &str| {
        let answer = app.ask(&Request::chat(model)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["served_by"].as_str().unwrap().to_owned()
    };
    assert_eq!(served_by("m").await, "old");
    app.announce(Spec::of(&new).image("engine:2")).await;
    eventually("the newest one is asked", async || served_by("m").await == "new").await;
    app.models_are(&["m", "n"]).await;
    for _ in 0..20 {
        assert_eq!(served_by("m").await, "new");
        assert_eq!(served_by("n").await, "old", "what only the older one has stays with it");
    }
    // Also when it is busy: the older one is a stand-in, not a replica.
    let gate = Gate::shut();
    new.always(held_reply(&gate));
    let clients = send_held(&app, 4, || new.count() - 21).await;
    gate.open();
    for mut client in clients {
        assert_eq!(client.answer().await.json()["held"], true);
    }
    app.ended("new").await;
    eventually("the older one takes over", async || {
        let answer = app.ask(&Request::chat("m")).await;
        answer.status == 200 && answer.json()["served_by"] == "old"
    })
    .await;
    app.models_are(&["m", "n"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p01_newest_means_the_last_to_become_ready() {
    let (first, second) = (Upstream::start("first", &["m"]).await, Upstream::start("second", &["m"]).await);
    let app = TestApp::start_with(&[("PROXY_SAME_MODEL", "newest")]).await;
    let served_by = async || app.ask(&Request::chat("m")).await.json()["served_by"].clone();
    app.announce(Spec::of(&first).health(Health::Starting)).await;
    app.announce(Spec::of(&second)).await;
    eventually("the one that is ready is asked", async || served_by().await == "second").await;
    app.announce(Spec::of(&first)).await;
    eventually("the one that became ready last is asked", async || served_by().await == "first").await;
    for _ in 0..10 {
        assert_eq!(served_by().await, "first");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p09_a_full_replica_is_left_alone() {
    let app = TestApp::start().await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    let gate = Gate::shut();
    for (upstream, limit) in [(&a, 1), (&b, 5)] {
        upstream.always(held_reply(&gate));
        app.add(Spec::of(upstream).label("inference.max_inflight", limit)).await;
    }
    let clients = send_held(&app, 6, || a.count() + b.count()).await;
    assert_eq!((a.count(), b.count()), (1, 5));
    gate.open();
    for mut client in clients {
        assert_eq!(client.answer().await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "nobody waits yet: the queue comes with the pools"]
async fn p09_who_waits_is_served_in_order() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&upstream).label("inference.max_inflight", 1)).await;
    let first_gate = Gate::shut();
    upstream.script(held_reply(&first_gate));
    let mut clients = send_held(&app, 1, || upstream.count()).await;
    for turn in 0..5 {
        let mut client = app.client().await;
        client.send(Request::chat("m").header("x-turn", &turn.to_string()).bytes()).await;
        // Nothing outside tells that it has joined the queue: give it the time to.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        clients.push(client);
    }
    assert_eq!(upstream.count(), 1);
    first_gate.open();
    for client in &mut clients {
        assert_eq!(client.answer().await.status, 200);
    }
    for turn in 0..5 {
        let arrived = upstream.request(turn + 1).await.head.header("x-turn").map(str::to_owned);
        assert_eq!(arrived, Some(turn.to_string()));
    }
}
