//! P1, P4, P9: several backends with one model.

use std::time::{Duration, Instant};

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
        tokio::time::sleep(Duration::from_millis(50)).await;
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

/// Sends a request that has to wait. Nothing outside tells that it waits but the length of the line.
async fn send_waiting(app: &TestApp, request: &Request, length: f64) -> Client {
    let mut client = app.client().await;
    client.send(request.bytes()).await;
    app.waiting_is("m", length).await;
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p09_a_request_that_is_sent_again_does_not_wait_as_long_again() {
    let timeout = Duration::from_secs(4);
    let app = TestApp::start_with(&[("PROXY_QUEUE_TIMEOUT", "4s")]).await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    let (gate_a, gate_b) = (Gate::shut(), Gate::shut());
    for (upstream, gate) in [(&a, &gate_a), (&b, &gate_b)] {
        app.add(Spec::of(upstream).label("inference.max_inflight", 1)).await;
        upstream.script(held_reply(gate));
    }
    a.always(vec![Step::ReadBody, Step::Reset]);
    let busy = send_held(&app, 2, || a.count() + b.count()).await;
    let since = Instant::now();
    let mut waiting = send_waiting(&app, &Request::chat("m"), 1.0).await;
    // Most of its time is over when it comes to one that fails, and waits for the other one.
    tokio::time::sleep(timeout * 3 / 4).await;
    gate_a.open();
    let answer = waiting.answer().await;
    let took = since.elapsed();
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert!(took >= timeout && took < timeout * 3 / 2, "after {took:?}");
    gate_b.open();
    drop(busy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p09_who_waits_for_one_backend_holds_up_nobody_who_may_go_to_another() {
    let app = TestApp::start().await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    app.add(Spec::of(&a).label("inference.max_inflight", 1)).await;
    a.script(json_reply(r#"{"id":"resp_1","object":"response"}"#));
    assert_eq!(app.ask(&Request::post("/v1/responses", r#"{"model":"m","input":"hi"}"#)).await.status, 200);
    let gate = Gate::shut();
    a.script(held_reply(&gate));
    let busy = send_held(&app, 1, || a.count() - 1).await;
    app.add(Spec::of(&b)).await;
    // What is behind this id is at `a`, which is full.
    let follower = send_waiting(&app, &Request::get("/v1/responses/resp_1"), 1.0).await;
    for _ in 0..5 {
        assert_eq!(app.ask(&Request::chat("m")).await.json()["served_by"], "b");
    }
    gate.open();
    for mut client in busy.into_iter().chain([follower]) {
        assert_eq!(client.answer().await.status, 200);
    }
    assert_eq!(a.request(2).await.head.word(1), "/v1/responses/resp_1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p09_who_waits_for_a_second_attempt_holds_up_nobody() {
    let app = TestApp::start().await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    app.add(Spec::of(&a).label("inference.max_inflight", 1)).await;
    let gate = Gate::shut();
    a.script(held_reply(&gate));
    let busy = send_held(&app, 1, || a.count()).await;
    app.add(Spec::of(&b)).await;
    b.script(vec![Step::ReadBody, Step::Close]);
    let unlucky = send_waiting(&app, &Request::chat("m"), 1.0).await;
    for _ in 0..5 {
        assert_eq!(app.ask(&Request::chat("m")).await.json()["served_by"], "b");
    }
    gate.open();
    for mut client in busy.into_iter().chain([unlucky]) {
        assert_eq!(client.answer().await.status, 200);
    }
    assert_eq!((a.count(), b.count()), (2, 6));
}

/// `compose up` stops what it replaces, and only then starts the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l12_requests_wait_for_the_container_in_place_of_one_that_was_stopped_first() {
    let (old, new) = (Upstream::start("old", &["m"]).await, Upstream::start("new", &["m"]).await);
    let app = TestApp::start().await;
    app.add(Spec::of(&old).service("app/llm")).await;
    app.stopping("old").await;
    app.rotation_is(0, "it is out").await;
    let mut early = send_waiting(&app, &Request::chat("m"), 1.0).await;
    app.ended("old").await;
    let mut late = send_waiting(&app, &Request::messages("m"), 2.0).await;
    app.add(Spec::of(&new).service("app/llm")).await;
    for client in [&mut early, &mut late] {
        assert_eq!(client.answer().await.json()["served_by"], "new");
    }
    assert_eq!(old.count(), 0);
}

/// A container that is told to stop may close its port before Docker says that it was told to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l12_a_port_that_closes_ahead_of_the_news_costs_nobody_a_request() {
    a_port_closes_ahead_of_the_news(false).await;
}

/// The same for a request that was first sent over a connection which had died while it was idle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l12_nor_does_it_behind_a_connection_that_had_died() {
    a_port_closes_ahead_of_the_news(true).await;
}

async fn a_port_closes_ahead_of_the_news(behind_an_idle_connection: bool) {
    // The news has to come within a moment that a busy machine may miss.
    for round in 1.. {
        let (old, new) = (Upstream::start("old", &["m"]).await, Upstream::start("new", &["m"]).await);
        let app = TestApp::start().await;
        app.add(Spec::of(&old).service("app/llm")).await;
        // One client, so that the second request finds the connection of the first.
        let mut client = app.client().await;
        if behind_an_idle_connection {
            assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
            old.script(vec![Step::ReadBody, Step::Reset]);
        }
        old.refuse().await;
        client.send(Request::chat("m").bytes()).await;
        eventually("it is refused", async || {
            let status = app.ask(&Request::get("/status")).await.json();
            status["containers"][0]["last_error"].is_object()
        })
        .await;
        app.stopping("old").await;
        app.rotation_is(0, "it is out").await;
        app.ended("old").await;
        app.add(Spec::of(&new).service("app/llm")).await;
        let answer = client.answer().await;
        if answer.status == 502 && round < 5 {
            continue;
        }
        assert_eq!(answer.json()["served_by"], "new", "round {round}: {}", answer.text());
        break;
    }
}

/// A container that is replaced over and over, while another one is starting for good: there is always somebody coming,
/// so requests wait, and none is refused in the moment between the end of the one and the news of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l12_while_somebody_is_coming_nobody_is_refused() {
    let (a, starting) = (Upstream::start("a", &["m"]).await, Upstream::start("starting", &["m"]).await);
    let app = std::sync::Arc::new(TestApp::with(&[&a]).await);
    starting.hold_probes(&Gate::shut());
    app.announce(Spec::of(&starting).role("a")).await;
    let is_over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let asking: Vec<_> = (0..8)
        .map(|_| {
            let (addr, is_over) = (app.addr(), is_over.clone());
            tokio::spawn(async move {
                let mut client = Client::connect(addr).await;
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    let since = Instant::now();
                    let answer = client.ask(&Request::chat("m")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    assert!(since.elapsed() < Duration::from_secs(10), "forgotten in the line");
                }
            })
        })
        .collect();
    for incarnation in 2..80 {
        app.stopping("a").await;
        app.rotation_is(0, "a is out").await;
        app.inflight_is("a", "m", 0.0).await;
        app.ended("a").await;
        app.announce(Spec::of(&a).incarnation(incarnation)).await;
        app.rotation_is(1, "a is back").await;
        let before = a.count();
        eventually("traffic flows", async || a.count() > before + 20).await;
    }
    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    for asked in asking {
        soon("all answers", asked).await.unwrap();
    }
}

/// So many clients ask, each as soon as it has its last answer, `n` times in all.
async fn ask_at_once(app: &TestApp, clients: usize, n: usize) {
    let left = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(n));
    let asking: Vec<_> = (0..clients)
        .map(|_| {
            let (addr, left) = (app.addr(), left.clone());
            tokio::spawn(async move {
                use std::sync::atomic::Ordering::Relaxed;
                let mut client = Client::connect(addr).await;
                while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let answer = client.ask(&Request::chat("m")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                }
            })
        })
        .collect();
    for asked in asking {
        asked.await.unwrap();
    }
}

/// Answers after so long.
fn slow_reply(ms: u64) -> Script {
    let mut script = vec![Step::ReadBody, Step::Pause(Duration::from_millis(ms))];
    script.extend(json_reply("{}").into_iter().skip(1));
    script
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p02_the_fast_replica_gets_most_and_the_slow_one_some() {
    let (fast, slow) = (Upstream::start("fast", &["m"]).await, Upstream::start("slow", &["m"]).await);
    let app = TestApp::with(&[&fast, &slow]).await;
    fast.always(slow_reply(10));
    slow.always(slow_reply(200));
    ask_at_once(&app, 8, 1_000).await;
    assert_eq!(fast.count() + slow.count(), 1_000);
    assert!((1..=100).contains(&slow.count()), "{} of 1000 went to the slow one", slow.count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p03_a_cold_replica_is_neither_starved_nor_flooded() {
    let warm = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await];
    let cold = Upstream::start("cold", &["m"]).await;
    let app = TestApp::with(&[&warm[0], &warm[1]]).await;
    for upstream in warm.iter().chain([&cold]) {
        upstream.always(slow_reply(20));
    }
    ask_at_once(&app, 8, 200).await;
    // The pool of two has had time to settle; a third of the traffic is the newcomer's share.
    app.add(Spec::of(&cold)).await;
    let since = Instant::now();
    let asking = ask_at_once(&app, 8, 200);
    let first = async {
        eventually("the first request", async || cold.count() > 0).await;
        since.elapsed()
    };
    let ((), first) = tokio::join!(asking, first);
    assert!(first < Duration::from_secs(1), "first request after {first:?}");
    assert!(cold.count() < 200, "flooded: {} of 200", cold.count());
    let before = cold.count();
    ask_at_once(&app, 8, 600).await;
    let share = cold.count() - before;
    assert!(share >= 600 * 3 / 10 * 2 / 3, "{share} of 600, where a third is its share");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p09_weights_are_kept_to() {
    for policy in ["ewma", "least", "round_robin"] {
        let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
        let app = TestApp::start_with(&[("PROXY_BALANCE", policy)]).await;
        app.add(Spec::of(&a)).await;
        app.add(Spec::of(&b).label("inference.weight", 3)).await;
        for upstream in [&a, &b] {
            upstream.always(slow_reply(5));
        }
        ask_at_once(&app, 8, 400).await;
        assert!((70..=130).contains(&a.count()), "{policy}: {} to {}, for 1 to 3", a.count(), b.count());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_others_keep_busy_is_seen_to_be() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    // Somebody else has forty requests there.
    let page = "vllm:num_requests_running{model_name=\"m\"} 30\nvllm:num_requests_waiting{model_name=\"m\"} 10\n";
    a.set_metrics(reply("200 OK", "content-type: text/plain\r\n", page));
    let app = TestApp::start_with(&[("PROXY_BALANCE", "least")]).await;
    for upstream in [&a, &b] {
        app.add(Spec::of(upstream)).await;
    }
    eventually("it has been asked", async || app.metric("proxy_backend_load", &[("backend", "a")]).await == Some(40.0))
        .await;
    let before = a.count();
    let gate = Gate::shut();
    b.always(held_reply(&gate));
    let clients = send_held(&app, 10, || a.count() + b.count()).await;
    assert_eq!((a.count() - before, b.count()), (0, 10));
    gate.open();
    for mut client in clients {
        assert_eq!(client.answer().await.status, 200);
    }
}
