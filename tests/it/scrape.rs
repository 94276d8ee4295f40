//! Load that engines report: who is asked for it, how often, and what becomes of it.

use std::time::Duration;

use crate::support::*;

fn page(waiting: u32, running: u32) -> Script {
    let text = format!(
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{engine=\"0\",model_name=\"m\"}} {running}.0\n\
         vllm:num_requests_waiting{{engine=\"0\",model_name=\"m\"}} {waiting}.0\n"
    );
    reply("200 OK", "content-type: text/plain; version=0.0.4\r\n", text)
}

/// A backend that reports so many running requests.
async fn reporting(name: &'static str, models: &[&str], running: u32) -> Upstream {
    let upstream = Upstream::start(name, models).await;
    upstream.set_metrics(page(0, running));
    upstream
}

async fn load(app: &TestApp, backend: &str) -> Option<f64> {
    app.metric("proxy_backend_load", &[("backend", backend)]).await
}

async fn asked_times(upstream: &Upstream, n: usize) {
    eventually(format!("{} was asked {n} times", upstream.name), async || upstream.scrapes().len() >= n).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p02_only_replicas_are_asked_and_only_if_it_matters() {
    let [turn_a, turn_b] = [reporting("ta", &["m"], 1).await, reporting("tb", &["m"], 1).await];
    let in_turn = TestApp::start_with_backends(&[("PROXY_BALANCE", "round_robin")], &[&turn_a, &turn_b]).await;
    let [a, b, alone] =
        [reporting("a", &["m"], 3).await, Upstream::start("b", &["m", "n"]).await, reporting("c", &["o"], 1).await];
    let app = TestApp::start().await;
    app.add(Spec::of(&alone)).await;
    // The page is at the root, wherever the API is.
    app.add(Spec::of(&a).label("inference.api.base_path", "/api/v1")).await;
    app.add(Spec::of(&b)).await;
    asked_times(&a, 5).await;
    let times = a.scrapes();
    for pair in times.windows(2) {
        let gap = pair[1] - pair[0];
        assert!(gap >= Duration::from_millis(850), "asked again after {gap:?}");
    }
    assert!(times[4] - times[0] < Duration::from_secs(10), "asked too seldom: {times:?}");
    assert_eq!(b.scrapes().len(), 1, "it has no such page");
    for nobody in [&alone, &turn_a, &turn_b] {
        assert_eq!(nobody.scrapes().len(), 0, "{}", nobody.name);
    }
    assert_eq!((a.count(), b.count(), alone.count()), (0, 0, 0));
    assert_eq!((load(&app, "a").await, load(&app, "b").await, load(&app, "c").await), (Some(3.0), None, None));
    assert_eq!(load(&in_turn, "ta").await, None);
    // When its replica has gone, it is asked no more.
    app.ended("b").await;
    app.rotation_is(2, "b is gone").await;
    let before = a.scrapes().len();
    let d = reporting("d", &["o"], 1).await;
    app.add(Spec::of(&d)).await;
    asked_times(&d, 3).await;
    assert!(a.scrapes().len() <= before + 1, "one question may have been under way");
    asked_times(&alone, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p02_own_requests_are_followed_between_two_reports() {
    let [a, b] = [reporting("a", &["m"], 5).await, reporting("b", &["m"], 0).await];
    let gate = Gate::shut();
    for upstream in [&a, &b] {
        upstream.always(held_reply(&gate));
    }
    let app = TestApp::with(&[&a, &b]).await;
    eventually("both have reported", async || load(&app, "a").await.is_some() && load(&app, "b").await.is_some()).await;
    assert_eq!((load(&app, "a").await, load(&app, "b").await), (Some(5.0), Some(0.0)));
    // From now on they say nothing new, in time or at all.
    for upstream in [&a, &b] {
        upstream.set_metrics(vec![Step::Hold(Gate::shut())]);
    }
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        clients.push(client);
    }
    eventually("all have arrived", async || a.count() + b.count() == 4).await;
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let (at_a, at_b) = (a.count() as f64, b.count() as f64);
    if let (Some(load_a), Some(load_b)) = (load(&app, "a").await, load(&app, "b").await) {
        // One question may have been asked while requests were under way: then ours are part of the report.
        assert!(load_a <= 5.0 + at_a && load_a >= 5.0_f64.max(at_a), "{load_a} with {at_a} of ours");
        assert_eq!(load_b, at_b);
    }
    // They hang, and nothing else does.
    gate.open();
    for mut client in clients {
        assert_eq!(client.answer().await.status, 200);
    }
    eventually("nothing is known any more", async || {
        let status = app.ask(&Request::chat("m")).await.status;
        assert_eq!(status, 200, "whoever does not tell its load is not unwell");
        load(&app, "a").await.is_none() && load(&app, "b").await.is_none()
    })
    .await;
    a.set_metrics(page(2, 2));
    eventually("it tells again", async || load(&app, "a").await == Some(4.0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_metrics_page_that_hangs_floods_or_breaks_delays_nothing() {
    let endless = |head: &str| vec![Step::Send(head.to_owned().into()), Step::Flood(vec![b'x'; 65_536].into())];
    let hostile = [
        ("hangs", vec![Step::Hold(Gate::shut())]),
        ("drips", [Step::Send("HTTP/1.1 200 OK\r\n\r\nvllm:".into()), Step::Hold(Gate::shut())].to_vec()),
        ("floods", endless("HTTP/1.1 200 OK\r\n\r\n")),
        ("resets", vec![Step::Reset]),
        ("closes", vec![Step::Close]),
        ("lies", vec![Step::Send("vllm:num_requests_running 3\r\n\r\n".into()), Step::Close]),
    ];
    let good = reporting("good", &["m"], 2).await;
    let app = TestApp::with(&[&good]).await;
    let mut upstreams = Vec::new();
    for (name, script) in hostile {
        let upstream = Upstream::start(name, &["m"]).await;
        upstream.set_metrics(script);
        app.add(Spec::of(&upstream)).await;
        upstreams.push(upstream);
    }
    let begin = good.scrapes().len();
    while good.scrapes().len() < begin + 4 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    let times = good.scrapes();
    assert!(times[begin + 3] - times[begin] < Duration::from_secs(6), "the good one has had to wait: {times:?}");
    assert_eq!(load(&app, "good").await, Some(2.0));
    for upstream in &upstreams {
        asked_times(upstream, 1).await;
        assert_eq!(load(&app, upstream.name).await, None, "{}", upstream.name);
    }
}
