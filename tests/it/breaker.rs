//! P5, P6, P7, P10: replicas that fail, replicas that say they are busy, and what is remembered of either.

use std::time::{Duration, Instant};

use crate::support::*;

fn fails(status: &str) -> Script {
    reply(status, "content-type: application/json\r\n", r#"{"error":"broken"}"#)
}

fn busy(headers: &str) -> Script {
    reply("503 Service Unavailable", &format!("content-type: application/json\r\n{headers}"), r#"{"error":"busy"}"#)
}

async fn two_with(knobs: &[(&str, &str)]) -> (Upstream, Upstream, TestApp) {
    let [a, b] = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await];
    let app = TestApp::start_with_backends(knobs, &[&a, &b]).await;
    (a, b, app)
}

/// Asks until `upstream` has had `n` requests more.
async fn ask_until_it_had(n: usize, upstream: &Upstream, app: &TestApp) {
    let before = upstream.count();
    eventually(format!("{} has {n} requests", upstream.name), async || {
        app.ask(&Request::chat("m")).await;
        upstream.count() >= before + n
    })
    .await;
}

async fn breaker_is(app: &TestApp, backend: &str, state: f64) {
    eventually(format!("the breaker of {backend} is {state}"), async || {
        app.metric("proxy_backend_breaker_state", &[("backend", backend)]).await == Some(state)
    })
    .await;
}

const CLOSED: f64 = 0.0;
const OPEN: f64 = 2.0;

// === failures ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_failing_fast_attracts_no_traffic() {
    for policy in ["ewma", "least", "round_robin", "prefix"] {
        let (a, b, app) = two_with(&[("PROXY_BALANCE", policy)]).await;
        a.always(fails("500 Internal Server Error"));
        for _ in 0..200 {
            assert_eq!(app.ask(&Request::chat("m")).await.status, 200, "{policy}");
        }
        // Five until the breaker opens, and now and then a trial.
        assert!(a.count() <= 5 + 195 / 20, "{policy}: {} of 200 were sent to it", a.count());
        assert_eq!(b.count(), 200, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_a_backend_that_recovers_is_used_again() {
    let (a, b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
    a.always(fails("502 Bad Gateway"));
    ask_until_it_had(5, &a, &app).await;
    breaker_is(&app, "a", OPEN).await;
    a.always(json_reply(r#"{"served_by":"a"}"#));
    ask_until_it_had(5, &a, &app).await;
    breaker_is(&app, "a", CLOSED).await;
    assert!(b.count() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_the_last_backend_is_tried_however_bad_it_is() {
    let a = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&a]).await;
    a.always(fails("500 Internal Server Error"));
    for _ in 0..20 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 500);
    }
    assert_eq!(a.count(), 20, "its own answers, all of them");
    breaker_is(&app, "a", OPEN).await;
    a.always(json_reply(r#"{"served_by":"a"}"#));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_answers_that_break_off_count() {
    let (a, _b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
    let mut broken = sse_begin();
    broken.extend([Step::SendChunk("data: 1\n\n".into()), Step::Reset]);
    a.always(broken);
    ask_until_it_had(5, &a, &app).await;
    breaker_is(&app, "a", OPEN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_errors_that_are_the_clients_never_count() {
    let a = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&a]).await;
    for status in ["400 Bad Request", "401 Unauthorized", "404 Not Found", "413 Payload Too Large", "422 No"] {
        a.always(fails(status));
        for _ in 0..10 {
            assert_eq!(app.ask(&Request::chat("m")).await.status.to_string(), status[..3]);
        }
    }
    breaker_is(&app, "a", CLOSED).await;
}

// === trials ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p07_half_open_admits_one_trial_while_many_ask() {
    let (a, b, app) = two_with(&[("PROXY_BALANCE", "least")]).await;
    a.always(fails("500 Internal Server Error"));
    ask_until_it_had(5, &a, &app).await;
    breaker_is(&app, "a", OPEN).await;
    let before = a.count();
    let gate = Gate::shut();
    a.always(held_reply(&gate));
    // Whoever gets the trial is held; all others are served, and none of them by the one on trial.
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let addr = app.addr();
            tokio::spawn(async move {
                let mut client = Client::connect(addr).await;
                let until = Instant::now() + Duration::from_millis(2_500);
                while Instant::now() < until {
                    let answer = client.ask(&Request::chat("m")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                }
            })
        })
        .collect();
    eventually("a trial", async || a.count() > before).await;
    settled("one trial", Duration::from_secs(1), || a.count()).await;
    assert_eq!(a.count(), before + 1, "one trial, and {} served by the other", b.count());
    gate.open();
    for asked in asking {
        soon("all answers", asked).await.unwrap();
    }
    breaker_is(&app, "a", CLOSED).await;
    assert!(a.count() > before + 1, "it is used again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p07_a_client_that_leaves_during_the_trial_hands_it_back() {
    let (a, _b, app) = two_with(&[("PROXY_BALANCE", "least")]).await;
    a.always(fails("500 Internal Server Error"));
    ask_until_it_had(5, &a, &app).await;
    let before = a.count();
    let gate = Gate::shut();
    a.always(held_reply(&gate));
    let mut on_trial = None;
    eventually("a trial", async || {
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        let served = async { client.answer().await };
        let is_held = tokio::time::timeout(Duration::from_millis(50), served).await.is_err();
        if is_held {
            on_trial = Some(client);
        }
        a.count() == before + 1
    })
    .await;
    on_trial.unwrap().vanish();
    // The next one makes the trial, at once: nothing has been learnt, so nothing is waited for.
    let second = eventually("another trial", async || {
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        let _ = tokio::time::timeout(Duration::from_millis(50), client.answer()).await;
        a.count() >= before + 2
    });
    second.await;
    gate.open();
    ask_until_it_had(3, &a, &app).await;
    breaker_is(&app, "a", CLOSED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p10_a_restarted_container_starts_with_a_clean_record() {
    let (a, b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
    for upstream in [&a, &b] {
        upstream.always(fails("500 Internal Server Error"));
    }
    ask_until_it_had(8, &a, &app).await;
    breaker_is(&app, "a", OPEN).await;
    breaker_is(&app, "b", OPEN).await;
    app.ended("a").await;
    app.announce(Spec::of(&a).incarnation(2)).await;
    breaker_is(&app, "a", CLOSED).await;
    assert_eq!(
        app.metric("proxy_backend_breaker_state", &[("backend", "b")]).await,
        Some(OPEN),
        "the end of one resets nothing of another"
    );
}

// === push-back ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_whoever_is_busy_is_spared_and_another_one_is_asked() {
    for script in [busy(""), busy("retry-after: 2\r\n"), reply("429 Too Many Requests", "", "slow down")] {
        let (a, b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
        a.always(script);
        for _ in 0..40 {
            let answer = app.ask(&Request::chat("m")).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        assert_eq!(b.count(), 40);
        assert!((1..10).contains(&a.count()), "asked {} times", a.count());
        breaker_is(&app, "a", CLOSED).await;
        assert_eq!(app.metric("proxy_retries_total", &[("reason", "busy")]).await, Some(to_f64(a.count())));
    }
}

#[expect(clippy::cast_precision_loss, reason = "small")]
fn to_f64(n: usize) -> f64 {
    n as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_retry_after_is_honoured() {
    let (a, b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
    a.always(busy("retry-after: 2\r\n"));
    ask_until_it_had(1, &a, &app).await;
    let since = Instant::now();
    a.always(json_reply("{}"));
    let before = a.count();
    ask_until_it_had(1, &a, &app).await;
    assert!(since.elapsed() > Duration::from_millis(1_900), "asked again after {:?}", since.elapsed());
    assert!(before == 1 && b.count() > 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_if_nobody_does_any_better_the_first_answer_stands() {
    // The other one refuses connections, which leaves what the first one said.
    let (a, b, app) = two_with(&[]).await;
    b.refuse().await;
    a.always(busy("x-own: 1\r\nretry-after: 7\r\n"));
    let answer = app.ask(&Request::chat("m")).await;
    assert_eq!((answer.status, answer.text().as_str()), (503, r#"{"error":"busy"}"#));
    assert_eq!((answer.header("x-own"), answer.header("retry-after")), (Some("1"), Some("7")));
    // Both are busy: the last one's words.
    let (a, b, app) = two_with(&[]).await;
    for upstream in [&a, &b] {
        upstream.always(busy(""));
    }
    let answer = app.ask(&Request::chat("m")).await;
    assert_eq!((answer.status, answer.text().as_str()), (503, r#"{"error":"busy"}"#));
    assert_eq!((a.count(), b.count()), (1, 1));
    // There is nobody else.
    let a = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&a]).await;
    a.always(busy(""));
    assert_eq!(app.ask(&Request::chat("m")).await.text(), r#"{"error":"busy"}"#);
    assert_eq!(a.count(), 1);
}

/// Sends requests one after the other, each of which must get this status within the time of a request that is not held up.
async fn ask_at_once(app: &TestApp, n: usize, status: u16) {
    for _ in 0..n {
        let since = Instant::now();
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(since.elapsed() < Duration::from_secs(1), "held up for {:?}", since.elapsed());
    }
}

fn turned_away() -> Script {
    reply("429 Too Many Requests", "retry-after: 3600\r\nx-own: 1\r\n", "your quota")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_a_push_back_of_the_only_replica_holds_up_nobody_else() {
    let overloaded = reply("529 Overloaded", "retry-after: 60\r\n", "no");
    for (status, script) in [(429, turned_away()), (503, busy("retry-after: 60\r\n")), (529, overloaded)] {
        for knobs in [&[][..], &[("PROXY_QUEUE_MAX", "0")], &[("PROXY_BALANCE", "prefix")]] {
            let a = Upstream::start("a", &["m"]).await;
            let app = TestApp::start_with_backends(knobs, &[&a]).await;
            for _ in 0..3 {
                a.script(script.clone());
                let answer = app.ask(&Request::chat("m")).await;
                assert!(answer.status == status && answer.header("retry-after").is_some());
                ask_at_once(&app, 5, 200).await;
            }
            // All of them are sent, and get what the backend says.
            a.always(script.clone());
            ask_at_once(&app, 5, status).await;
            assert_eq!(a.count(), 3 * 6 + 5);
            breaker_is(&app, "a", CLOSED).await;
            assert_eq!(app.metric("proxy_queue_wait_seconds_count", &[("model", "m")]).await, None);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_while_others_are_full_a_replica_that_pushes_back_is_asked() {
    let app = TestApp::start_with(&[("PROXY_BALANCE", "least")]).await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    app.add(Spec::of(&a)).await;
    a.script(busy("retry-after: 60\r\n"));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 503);
    app.add(Spec::of(&b).label("inference.max_inflight", 1)).await;
    let gate = Gate::shut();
    b.always(held_reply(&gate));
    let mut held = app.client().await;
    held.send(Request::chat("m").bytes()).await;
    b.whole(0).await;
    assert_eq!(a.count(), 1, "the other one is preferred");
    ask_at_once(&app, 5, 200).await;
    assert_eq!((a.count(), b.count()), (6, 1));
    gate.open();
    assert_eq!(held.answer().await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_one_clients_quota_is_nobody_elses() {
    // Its quota is used up wherever it is sent; all others are served.
    let (a, b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
    for round in 0..5 {
        let before = [a.count(), b.count()];
        for upstream in [&a, &b] {
            upstream.script(turned_away());
        }
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!((answer.status, answer.header("retry-after")), (429, Some("3600")), "round {round}");
        assert_eq!([a.count(), b.count()], before.map(|count| count + 1), "asked both");
        ask_at_once(&app, 20, 200).await;
        let got = [a.count() - before[0] - 1, b.count() - before[1] - 1];
        assert!(got.iter().all(|got| (8..=12).contains(got)), "neither is spared: {got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_requests_turned_away_in_a_row_make_others_prefer_another_replica_until_one_is_served() {
    let (a, b, app) = two_with(&[("PROXY_BALANCE", "round_robin")]).await;
    a.always(reply("429 Too Many Requests", "retry-after: 60\r\n", "no"));
    ask_at_once(&app, 20, 200).await;
    assert_eq!((a.count(), b.count()), (2, 20));
    // The other one is gone: the one that pushes back is asked, serves, and is as good as any again.
    a.always(json_reply("{}"));
    app.stopping("b").await;
    app.rotation_is(1, "b is out").await;
    ask_at_once(&app, 1, 200).await;
    assert_eq!(a.count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p06_whoever_has_said_that_it_is_busy_is_done_with_the_request() {
    let app = TestApp::start_with(&[("PROXY_BALANCE", "least")]).await;
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    app.add(Spec::of(&b).label("inference.max_inflight", 2)).await;
    let gate = Gate::shut();
    b.always(held_reply(&gate));
    let mut clients = vec![app.client().await, app.client().await];
    clients[0].send(Request::chat("m").bytes()).await;
    b.whole(0).await;
    app.add(Spec::of(&a).label("inference.max_inflight", 1)).await;
    a.script(reply("429 Too Many Requests", "retry-after: 0\r\n", "busy"));
    clients[1].send(Request::chat("m").bytes()).await;
    b.whole(1).await;
    assert_eq!(a.count(), 1, "it was asked first");
    // The other one works on it now, so this one has room again.
    app.inflight_is("a", "m", 0.0).await;
    assert_eq!(app.ask(&Request::chat("m")).await.json()["served_by"], "a");
    gate.open();
    for client in &mut clients {
        assert_eq!(client.answer().await.status, 200);
    }
}

// === the limits of trying again ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_who_has_nobody_else_to_ask_uses_up_no_second_attempts() {
    let a = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with(&[("PROXY_BALANCE", "least")]).await;
    app.add(Spec::of(&a)).await;
    a.always(vec![Step::ReadBody, Step::Close]);
    let mut client = app.client().await;
    for _ in 0..1_500 {
        assert_openai_error(&client.ask(&Request::chat("m")).await, 502, "backend_error");
    }
    let b = Upstream::start("b", &["m"]).await;
    // Every attempt has a connection of its own, so that its end is a failure.
    let well = [json_reply("{}"), vec![Step::Close]].concat();
    for upstream in [&a, &b] {
        upstream.always(well.clone());
    }
    assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
    breaker_is(&app, "a", CLOSED).await;
    app.add(Spec::of(&b)).await;
    for upstream in [&a, &b] {
        upstream.script(vec![Step::ReadBody, Step::Close]);
        let before = upstream.count();
        while upstream.count() == before {
            assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
        }
    }
    assert_eq!(app.metric("proxy_retries_total", &[("reason", "ended")]).await, Some(2.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p05_retries_are_a_share_of_the_traffic() {
    // Nobody ever answers: the budget of a thousand is used up, after that a fifth is tried twice.
    let (a, b, app) = two_with(&[]).await;
    for upstream in [&a, &b] {
        upstream.always(vec![Step::ReadBody, Step::Close]);
    }
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let addr = app.addr();
            tokio::spawn(async move {
                let mut client = Client::connect(addr).await;
                for _ in 0..250 {
                    assert_openai_error(&client.ask(&Request::chat("m")).await, 502, "backend_error");
                }
            })
        })
        .collect();
    for client in clients {
        soon("all answers", client).await.unwrap();
    }
    let retries = a.count() + b.count() - 2_000;
    assert!((1_000..=1_000 + 2_000 / 5).contains(&retries), "{retries} retries of 2000 requests");
}
