//! Answers that say that a request was not served, and answers that do not come: another replica is asked, within the
//! limits of retries, and the last answer passes as it is if that one does no better.

use std::time::{Duration, Instant};

use crate::support::*;

const DECLINED: [&str; 6] = [
    "429 Too Many Requests",
    "500 Internal Server Error",
    "502 Bad Gateway",
    "503 Service Unavailable",
    "504 Gateway Timeout",
    "529 Overloaded",
];

/// `a` is asked first.
async fn two_with(knobs: &[(&str, &str)]) -> (Upstream, Upstream, TestApp) {
    let [a, b] = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await];
    let knobs = [&[("PROXY_BALANCE", "least")], knobs].concat();
    let app = TestApp::start_with(&knobs).await;
    // The weight decides among those that have nothing to do, but for one in ten thousand.
    app.add(Spec::of(&a).label("inference.weight", 1_000)).await;
    app.add(Spec::of(&b)).await;
    (a, b, app)
}

fn answers(status: &str) -> Script {
    let headers = "content-type: application/json\r\nretry-after: 7\r\nx-own: 1\r\n";
    reply(status, headers, format!("{{\"error\":\"{status}\"}}"))
}

fn stalls() -> Script {
    vec![Step::ReadBody, Step::Hold(Gate::shut())]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_serves_nobody_is_replaced_by_another_replicas() {
    for status in DECLINED {
        let (a, b, app) = two_with(&[]).await;
        a.script(answers(status));
        let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(190_000));
        let answer = app.ask(&Request::post("/v1/completions", &body)).await;
        assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some("b")), "{status}");
        assert_eq!((a.count(), b.count()), (1, 1), "{status}");
        assert_eq!(b.whole(0).await.body.bytes, body.as_bytes(), "{status}: sent again as it was");
        let reason = if matches!(&status[..3], "429" | "503" | "529") { "busy" } else { "error" };
        assert_eq!(app.metric("proxy_retries_total", &[("reason", reason)]).await, Some(1.0), "{status}");
        app.inflight_is("a", "m", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_answer_passes_byte_for_byte_if_nobody_does_better() {
    for status in DECLINED {
        for last in DECLINED {
            let (a, b, app) = two_with(&[]).await;
            a.always(answers(status));
            b.always(answers(last));
            let answer = app.ask(&Request::chat("m")).await;
            assert_eq!(
                (answer.head.word(1), answer.text()),
                (&last[..3], format!("{{\"error\":\"{last}\"}}")),
                "{status}"
            );
            assert_eq!((answer.header("x-own"), answer.header("retry-after")), (Some("1"), Some("7")));
            assert_eq!((a.count(), b.count()), (1, 1));
        }
        // The other one gives no answer at all, in three ways.
        for how in ["refuses", "breaks", "stalls"] {
            let (a, b, app) = two_with(&[("PROXY_FIRST_BYTE_TIMEOUT", "300ms")]).await;
            a.always(answers(status));
            match how {
                "refuses" => b.refuse().await,
                "breaks" => b.always(vec![Step::ReadBody, Step::Reset]),
                _ => b.always(stalls()),
            }
            let answer = app.ask(&Request::chat("m")).await;
            let own = format!("{{\"error\":\"{status}\"}}");
            assert_eq!((answer.head.word(1), answer.text()), (&status[..3], own), "the other one {how}");
            assert_eq!(answer.header("x-own"), Some("1"));
            app.inflight_is("b", "m", 0.0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_another_replica_would_not_better_passes_at_once() {
    let interim =
        [vec![Step::ReadBody, Step::Send("HTTP/1.1 102 Processing\r\n\r\n".into())], answers("500 No")[1..].to_vec()];
    type Case<'c> = (&'c str, &'c [(&'c str, &'c str)], Script);
    let cases: [Case<'_>; 7] = [
        ("501", &[], answers("501 Not Implemented")),
        ("505", &[], answers("505 HTTP Version Not Supported")),
        ("507", &[], answers("507 Insufficient Storage")),
        ("400", &[], answers("400 Bad Request")),
        ("408", &[], answers("408 Request Timeout")),
        ("500", &[("PROXY_RETRIES", "0")], answers("500 Internal Server Error")),
        ("500", &[], interim.concat()),
    ];
    for (status, knobs, script) in cases {
        let (a, b, app) = two_with(knobs).await;
        a.always(script);
        let mut client = app.client().await;
        let mut answer = client.ask(&Request::chat("m")).await;
        if answer.status == 102 {
            answer = client.answer().await;
        }
        assert_eq!((answer.head.word(1), answer.header("x-own")), (status, Some("1")), "{knobs:?}");
        assert_eq!((a.count(), b.count()), (1, 0), "{status} {knobs:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_waits_for_no_place_and_for_no_broken_replica() {
    for status in DECLINED {
        let app = TestApp::start_with(&[("PROXY_BALANCE", "least")]).await;
        let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
        app.add(Spec::of(&b).label("inference.max_inflight", 1)).await;
        let gate = Gate::shut();
        b.always(held_reply(&gate));
        let mut held = app.client().await;
        held.send(Request::chat("m").bytes()).await;
        b.whole(0).await;
        app.add(Spec::of(&a)).await;
        a.always(answers(status));
        let since = Instant::now();
        assert_eq!(app.ask(&Request::chat("m")).await.head.word(1), &status[..3]);
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
        assert_eq!((a.count(), b.count()), (1, 1));
        gate.open();
        assert_eq!(held.answer().await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_does_not_answer_in_time_is_replaced() {
    for knob in ["PROXY_FIRST_BYTE_TIMEOUT", "PROXY_IDLE_TIMEOUT"] {
        let (a, b, app) = two_with(&[(knob, "300ms")]).await;
        a.always(stalls());
        let mut client = app.client().await;
        // The second one on a client's connection that has been used, and perhaps to a backend's that has.
        for round in 1..=2 {
            let answer = client.ask(&Request::chat("m")).await;
            assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some("b")), "{knob}");
            assert_eq!((a.count(), b.count()), (round, round));
            a.hung_up(round - 1).await;
        }
        assert_eq!(app.metric("proxy_retries_total", &[("reason", "timeout")]).await, Some(2.0));
        // Nobody answers: the error, after both.
        b.always(stalls());
        assert_openai_error(&client.ask(&Request::chat("m")).await, 504, "backend_timeout");
        assert_eq!((a.count(), b.count()), (3, 3));
        for upstream in [&a, &b] {
            app.inflight_is(upstream.name, "m", 0.0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_held_is_not_sent_again() {
    let (a, b, app) = two_with(&[("PROXY_HOLD_MAX", "16KiB")]).await;
    a.always(answers("500 Internal Server Error"));
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(900_000));
    assert_eq!(app.ask(&Request::post("/v1/completions", &body)).await.status, 500);
    assert_eq!((a.count(), b.count()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_breaker_learns_from_answers_that_were_replaced() {
    let (a, b, app) = two_with(&[]).await;
    a.always(answers("500 Internal Server Error"));
    for _ in 0..20 {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
    assert_eq!((a.count(), b.count()), (5, 20));
    assert_eq!(app.metric("proxy_backend_breaker_state", &[("backend", "a")]).await, Some(2.0));
    // A broken one is not asked in place of an answer that there is.
    b.always(answers("502 Bad Gateway"));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 502);
    assert_eq!((a.count(), b.count()), (5, 21));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_answer_is_told_with_its_reason_and_without_its_words() {
    let ok = |lines: &str| format!("HTTP/1.1 200 OK\r\n{lines}\r\nsk-secret");
    let cases: [(String, &str); 12] = [
        (ok("x sk-secret: 1\r\n"), "a header name holds a character that it must not"),
        (ok("x: sk-secret\0\r\n"), "a header value holds a character that it must not"),
        (ok("content-length: sk-secret\r\n"), "Content-Length is not a number"),
        (ok("content-length: 2\r\ncontent-length: 3\r\n"), "two different Content-Length headers"),
        (ok("transfer-encoding: sk-secret\r\n"), "the only Transfer-Encoding understood is `chunked`"),
        (ok(&"x: sk-secret\r\n".repeat(129)), "more than 128 header lines"),
        (ok(&format!("x: {}\r\n", "sk-secret".repeat(10_000))), "more than 64 KiB"),
        ("HTTP/2 200 OK\r\n\r\nsk-secret".to_owned(), "version"),
        ("HTTP/1.1 200 OK\nx: sk-secret\n\n".to_owned(), "a line feed without a carriage return"),
        ("HTTP/1.1 101 Switching\r\nupgrade: sk-secret\r\n\r\n".to_owned(), "protocol that was not asked for"),
        ("HTTP/1.1 102 Wait\r\nx: sk-secret\r\n\r\n".repeat(65), "more than 64 interim answers"),
        ("SSH-2.0-sk-secret".to_owned(), "does not speak HTTP"),
    ];
    for (sent, reason) in cases {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::with(&[&upstream]).await;
        upstream.always(vec![Step::ReadBody, Step::Send(sent.into()), Step::Close]);
        let mut client = app.client().await;
        let mut answer = client.ask(&Request::chat("m").http10()).await;
        while answer.status == 102 {
            answer = client.answer().await;
        }
        assert_openai_error(&answer, 502, "backend_error");
        let status = app.ask(&Request::get("/status")).await.json();
        let last_error = status["containers"][0]["last_error"]["text"].as_str().unwrap_or_default();
        for told in [&answer.text(), last_error] {
            assert!(told.contains(reason) && !told.contains("sk-secret"), "{reason}: {told}");
        }
    }
}
