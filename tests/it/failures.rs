//! H2: every place where a backend, a client or the way between them can fail. Each has a row: what the client sees, how
//! often a backend was asked, and that afterwards nothing is in flight and the next request is served.
//!
//! Rows that have a test elsewhere:
//!
//! | where it fails | test |
//! |---|---|
//! | refused, another one there | `retry::p05_a_backend_that_refuses_costs_nobody_a_request` |
//! | refused, nobody else | `answers::r02_502_when_the_only_backend_refuses` |
//! | connect timeout, another one there | `retry::h02_a_backend_that_does_not_answer_the_connect_is_given_up` |
//! | closed or reset on a reused connection | `retry::p08_a_reused_connection_that_dies_is_replaced_even_with_one_backend` |
//! | the same on the fresh one after it | `retry::p08_the_fresh_connection_is_not_replaced_in_turn` |
//! | closed or reset on a fresh connection, another one there | `retry::h02_dead_before_its_first_byte_another_one_is_asked` |
//! | the same, nobody else | `answers::r02_502_when_the_only_backend_breaks_before_its_first_byte` |
//! | half a head, then a reset | `retry::h02_half_a_head_is_a_first_byte` |
//! | reset or close after the head, in a body, in a stream | `retry::h02_never_after_the_first_byte` |
//! | a stream breaks: reset, close, close within a chunk, bad framing | `streaming::s03_a_broken_stream_is_told_in_the_dialect_of_the_endpoint_and_cut` |
//! | an answer that is no stream breaks | `streaming::s03_what_is_no_event_stream_is_cut_without_a_word` |
//! | stall before the head, one backend, a limit set | `answers::r02_504_when_a_timeout_that_was_set_runs_out` |
//! | stall before the head, no limit set | `answers::r02_no_timeout_that_was_not_set` |
//! | stall in a stream, a limit set | `streaming::s03_an_idle_timeout_that_was_set_cuts_a_silent_stream` |
//! | the request's body is not read | `retry::h02_a_backend_that_does_not_read_is_given_up_in_time` |
//! | an endless head, no HTTP, two lengths, a switch unasked for | `answers::r02_502_when_the_only_backend_breaks_before_its_first_byte` |
//! | an answer before the request is over | `retry::h02_an_answer_that_comes_before_the_request_is_over`, `retry::h02_nothing_is_left_of_a_request_that_was_answered_early` |
//! | 429, 500, 502, 503, 504, 529, and a stall before the head with another one there | `failover::*` |
//! | a body that was not read, an answer that is not over | `reuse::*` |
//! | 4xx and 501 | `retry::h02_an_error_answer_is_an_answer`, `answers::r02_a_backends_own_errors_pass_byte_for_byte` |
//! | the client leaves: before the head, in the stream, while it uploads | `streaming::s02_*` |
//! | the container dies before the first byte, another one there | `retry::l04_requests_without_a_byte_move_on_when_their_container_dies` |
//! | the container dies in a stream, nobody else | `drain::l04_a_dead_backends_streams_are_cut` |
//! | the proxy ends in a stream | `drain::l13_shutdown_lets_streams_finish_and_takes_nothing_new`, `drain::l13_shutdown_ends_with_the_drain_time` |

use std::time::{Duration, Instant};

use crate::support::*;

const JSON: &str = "content-type: application/json\r\n";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";

type Knobs = &'static [(&'static str, &'static str)];

const NO_KNOBS: Knobs = &[];
const FIRST_BYTE: Knobs = &[("PROXY_FIRST_BYTE_TIMEOUT", "300ms")];
const IDLE: Knobs = &[("PROXY_IDLE_TIMEOUT", "300ms")];

/// What a client may see of a failure.
#[derive(Clone, Copy, Debug)]
enum Sees {
    /// An error of the proxy's own.
    Own(u16, &'static str),
    /// The backend's answer: status and body.
    Passed(u16, &'static str),
    /// An answer of this that has no end.
    Cut(&'static str),
    /// An answer of this, or less of it, that has no end: the break may have come together with what was in order.
    CutWithin(&'static str),
    /// 502, or a cut with no more than a head before it: which one depends on how much came at once.
    OwnOrCut,
}

/// One place to fail at. Both backends of the row fail alike.
struct Row {
    name: &'static str,
    knobs: Knobs,
    fails: Script,
    sees: Sees,
    /// How often backends are asked in all.
    asked: usize,
}

fn row(name: &'static str, knobs: Knobs, fails: Script, sees: Sees, asked: usize) -> Row {
    Row { name, knobs, fails, sees, asked }
}

fn answers_with(text: impl Into<String>) -> Script {
    vec![Step::ReadBody, Step::Send(text.into().into())]
}

fn answers_then(text: impl Into<String>, then: Step) -> Script {
    [answers_with(text), vec![then]].concat()
}

// === impl Row ===

impl Row {
    async fn check(&self) {
        let what = self.name;
        let [a, b] = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await];
        let app = TestApp::start_with_backends(self.knobs, &[&a, &b]).await;
        for upstream in [&a, &b] {
            upstream.always(self.fails.clone());
        }
        let mut client = app.client().await;
        let limit = Duration::from_secs(10);
        let wire = Request::chat("m").bytes();
        let Ok(answer) = tokio::time::timeout(limit, client.try_ask(&wire)).await else {
            panic!("{what}: no answer, and no end of one, within {limit:?}");
        };
        let is_whole = answer.as_ref().is_ok_and(Answer::is_whole);
        match (self.sees, answer) {
            (Sees::OwnOrCut, Err(_)) => {}
            (_, Err(end)) => panic!("{what}: no answer: connection {end:?}"),
            (sees, Ok(answer)) => self.check_answer(sees, &answer),
        }
        assert_eq!(a.count() + b.count(), self.asked, "{what}: asked so often");
        for upstream in [&a, &b] {
            app.inflight_is(upstream.name, "m", 0.0).await;
            upstream.always(json_reply(r#"{"next":"served"}"#));
        }
        // On the same connection where that has survived: what is left of one answer must not be taken for the next.
        let mut client = if is_whole { client } else { app.client().await };
        for _ in 0..3 {
            let next = client.ask(&Request::chat("m")).await;
            assert_eq!((next.status, next.json()["next"].as_str()), (200, Some("served")), "{what}");
        }
    }

    fn check_answer(&self, sees: Sees, answer: &Answer) {
        let what = self.name;
        match sees {
            Sees::Own(status, code) => {
                assert_eq!(answer.status, status, "{what}: {}", answer.text());
                assert_openai_error(answer, status, code);
            }
            Sees::Passed(status, body) => {
                assert_eq!((answer.status, answer.text().as_str(), answer.end), (status, body, End::Whole), "{what}");
            }
            Sees::Cut(begin) => assert_cut(answer, begin, what),
            Sees::CutWithin(most) => {
                assert!(!answer.is_whole(), "{what}: ended cleanly: {} {}", answer.status, answer.text());
                assert!(answer.status == 200 && most.starts_with(&answer.text()), "{what}: {}", answer.text());
            }
            Sees::OwnOrCut if answer.status == 502 => assert_openai_error(answer, 502, "backend_error"),
            Sees::OwnOrCut => assert_cut(answer, "", what),
        }
    }
}

fn assert_cut(answer: &Answer, begin: &str, what: &str) {
    assert!(!answer.is_whole(), "{what}: ended cleanly: {} {}", answer.status, answer.text());
    assert_eq!((answer.status, answer.text().as_str()), (200, begin), "{what}");
}

async fn check(rows: impl IntoIterator<Item = Row>) {
    for row in rows {
        println!("h02: {}", row.name);
        row.check().await;
    }
}

// === time ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_stalls() {
    let stalls = |text: &str| answers_then(text, Step::Hold(Gate::shut()));
    let length = format!("HTTP/1.1 200 OK\r\n{JSON}content-length: 100\r\n\r\n{{\"a\":1,");
    let timeout = Sees::Own(504, "backend_timeout");
    check([
        row("before the head, another one there", FIRST_BYTE, stalls(""), timeout, 2),
        row("before the head, silence limited", IDLE, stalls(""), timeout, 2),
        row("in the head", FIRST_BYTE, stalls("HTTP/1.1 200 OK\r\nx-a: "), timeout, 1),
        row("after an interim answer", FIRST_BYTE, stalls("HTTP/1.1 102 Processing\r\n\r\n"), timeout, 1),
        row("in a body with a length", IDLE, stalls(&length), Sees::Cut("{\"a\":1,"), 1),
        row("in a chunk", IDLE, stalls(&format!("{CHUNKED}5\r\n{{\"a\"")), Sees::Cut("{\"a\""), 1),
        row("in a chunk's size", IDLE, stalls(&format!("{CHUNKED}1\r\n{{\r\n1")), Sees::Cut("{"), 1),
        row("before the last chunk", IDLE, stalls(&format!("{CHUNKED}2\r\n{{}}\r\n")), Sees::Cut("{}"), 1),
        row("in the trailers", IDLE, stalls(&format!("{CHUNKED}2\r\n{{}}\r\n0\r\nx: ")), Sees::Cut("{}"), 1),
        row("until the close", IDLE, stalls(&format!("HTTP/1.1 200 OK\r\n{JSON}\r\n{{}}")), Sees::Cut("{}"), 1),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_no_answer_to_the_connect_and_nobody_else_there() {
    let jammed = Upstream::start_with_backlog("a", &["m"], 1).await;
    let app = TestApp::start_with_backends(&[("PROXY_CONNECT_TIMEOUT", "200ms")], &[&jammed]).await;
    let queued = jammed.jam().await;
    let since = Instant::now();
    let answer = app.ask(&Request::chat("m")).await;
    assert_openai_error(&answer, 502, "backend_error");
    assert!((Duration::from_millis(150)..Duration::from_secs(3)).contains(&since.elapsed()), "{:?}", since.elapsed());
    app.inflight_is("a", "m", 0.0).await;
    drop(queued);
}

/// A body that comes slowly is its client's affair.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_slow_upload_is_no_failure() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for model_first in [true, false] {
        let body = if model_first { r#"{"model":"m","p":"slow"}"# } else { r#"{"p":"slow","model":"m"}"# };
        let mut client = app.client().await;
        client.send_pieces(Request::post("/v1/completions", body).bytes().chunks(4), Duration::from_millis(10)).await;
        assert_eq!(client.answer().await.status, 200);
    }
}

// === framing ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_heads_that_are_none() {
    let none = Sees::Own(502, "backend_error");
    let ok = |lines: &str| answers_with(format!("HTTP/1.1 200 OK\r\n{lines}content-length: 2\r\n\r\n{{}}"));
    let start = |line: &str| answers_with(format!("{line}\r\ncontent-length: 2\r\n\r\n{{}}"));
    check([
        row("a head of 300 KiB", NO_KNOBS, ok(&format!("x-long: {}\r\n", "y".repeat(300 * 1024))), none, 1),
        row("300 KiB of small lines", NO_KNOBS, ok(&"x-small: y\r\n".repeat(26_000)), none, 1),
        row("a line without a colon", NO_KNOBS, ok("nonsense\r\n"), none, 1),
        row("a name with a blank in it", NO_KNOBS, ok("x y: z\r\n"), none, 1),
        row("a line without a name", NO_KNOBS, ok(": z\r\n"), none, 1),
        row("a NUL in a value", NO_KNOBS, ok("x: a\0b\r\n"), none, 1),
        row("a bare CR in a value", NO_KNOBS, ok("x: a\rset-cookie: b=1\r\n"), none, 1),
        row("a status of four digits", NO_KNOBS, start("HTTP/1.1 2000 OK"), none, 1),
        row("a status of two digits", NO_KNOBS, start("HTTP/1.1 20 OK"), none, 1),
        row("a status of letters", NO_KNOBS, start("HTTP/1.1 two OK"), none, 1),
        row("a status of zero", NO_KNOBS, start("HTTP/1.1 000 OK"), none, 1),
        row("another version", NO_KNOBS, start("HTTP/3.0 200 OK"), none, 1),
        row("another protocol", NO_KNOBS, start("ICY 200 OK"), none, 1),
        row("a request", NO_KNOBS, start("GET / HTTP/1.1"), none, 1),
        row("binary", NO_KNOBS, answers_then("\0\x01\x02\u{7f}\r\n\r\n", Step::Close), none, 1),
        row("a length below zero", NO_KNOBS, answers_with("HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}"), none, 1),
        row(
            "a length of 2^64",
            NO_KNOBS,
            answers_with("HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551616\r\n\r\n{}"),
            none,
            1,
        ),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_heads_that_are_odd() {
    let served = Sees::Passed(200, "{}");
    let head = |text: &str| answers_with(format!("{text}\r\ncontent-length: 2\r\n\r\n{{}}"));
    check([
        row("no reason", NO_KNOBS, head("HTTP/1.1 200 "), served, 1),
        row("no reason, and no blank", NO_KNOBS, head("HTTP/1.1 200"), served, 1),
        row("a reason that is no ASCII", NO_KNOBS, head("HTTP/1.1 200 Ça va"), served, 1),
        row("one length twice", NO_KNOBS, head("HTTP/1.1 200 OK\r\ncontent-length: 2"), served, 1),
        row("a value that is no ASCII", NO_KNOBS, head("HTTP/1.1 200 OK\r\nx: \u{e9}\u{1f600}"), served, 1),
        row("many lines", NO_KNOBS, head(&format!("HTTP/1.1 200 OK{}", "\r\nx-line: y".repeat(90))), served, 1),
        row("a long line", NO_KNOBS, head(&format!("HTTP/1.1 200 OK\r\nx-long: {}", "y".repeat(8 * 1024))), served, 1),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_chunks_that_are_none() {
    let broken = |tail: &str| answers_with(format!("{CHUNKED}2\r\n{{}}\r\n{tail}"));
    let cut = Sees::CutWithin("{}");
    let rows = [
        ("no size", "oops\r\n"),
        ("an empty size", "\r\n"),
        ("a size below zero", "-1\r\n"),
        ("a size with a sign", "+2\r\n{}\r\n0\r\n\r\n"),
        ("a size as in C", "0x2\r\n{}\r\n0\r\n\r\n"),
        ("a size of 2^64", "10000000000000000\r\n{}"),
        ("a size of many digits", "fffffffffffffffffffffffffffff\r\n{}"),
        ("no line end after the bytes", "2\r\n{}0\r\n\r\n"),
        ("too many bytes", "2\r\n{}{}\r\n0\r\n\r\n"),
    ];
    // The first piece may or may not have been passed on by the time the break is seen.
    for (name, tail) in rows {
        let gate = Gate::shut();
        let script = vec![
            Step::ReadBody,
            Step::Send(format!("{CHUNKED}2\r\n{{}}\r\n").into()),
            Step::Hold(gate.clone()),
            Step::Send(tail.into()),
            Step::Hold(Gate::shut()),
        ];
        let (upstream, other) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
        let app = TestApp::with(&[&upstream]).await;
        upstream.script(script);
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        assert_eq!(client.piece().await.unwrap().1, b"{}");
        app.add(Spec::of(&other)).await;
        gate.open();
        let answer = client.finish().await;
        let text = answer.text();
        // What was in order before the break may have been passed on.
        assert!(!answer.is_whole() && ["{}", "{}{}"].contains(&text.as_str()), "{name}: {:?} {text}", answer.end);
        upstream.hung_up(0).await;
        app.inflight_is("a", "m", 0.0).await;
        assert_eq!((upstream.count(), other.count()), (1, 0), "{name}");
    }
    let at_once = ["zz\r\n", "-1\r\n", "10000000000000000\r\n"]
        .map(|size| row("at once", NO_KNOBS, answers_with(format!("{CHUNKED}{size}")), Sees::OwnOrCut, 1));
    check(at_once).await;
    check([row("closed within the last line", NO_KNOBS, [broken("0\r\n"), vec![Step::Close]].concat(), cut, 1)]).await;
}

/// What has no end must find one here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_floods_between_the_bytes() {
    let flood = |begin: &str, flood: String| {
        vec![Step::ReadBody, Step::Send(begin.to_owned().into()), Step::Flood(flood.into())]
    };
    let begun = format!("{CHUNKED}2\r\n{{}}\r\n");
    check([
        row(
            "an endless extension",
            NO_KNOBS,
            flood(&format!("{begun}2;x="), "y".repeat(10_000)),
            Sees::CutWithin("{}"),
            1,
        ),
        row(
            "endless trailers",
            NO_KNOBS,
            flood(&format!("{begun}0\r\n"), "x: y\r\n".repeat(1_000)),
            Sees::CutWithin("{}"),
            1,
        ),
        row(
            "an endless trailer",
            NO_KNOBS,
            flood(&format!("{begun}0\r\nx: "), "y".repeat(10_000)),
            Sees::CutWithin("{}"),
            1,
        ),
        row(
            "an endless status line",
            NO_KNOBS,
            flood("HTTP/1.1 200 O", "K".repeat(10_000)),
            Sees::Own(502, "backend_error"),
            1,
        ),
        row("empty lines", NO_KNOBS, flood("", "\r\n".repeat(5_000)), Sees::Own(502, "backend_error"), 1),
    ])
    .await;
}

/// Digits that change nothing, without end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_chunk_size_without_end() {
    let begin = format!("{CHUNKED}2\r\n{{}}\r\n");
    let script = vec![Step::ReadBody, Step::Send(begin.into()), Step::Flood("0".repeat(10_000).into())];
    check([row("an endless size", NO_KNOBS, script, Sees::CutWithin("{}"), 1)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_interim_answers_without_end() {
    for http10 in [false, true] {
        let [a, b] = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await];
        let app = TestApp::with(&[&a, &b]).await;
        let interim = "HTTP/1.1 102 Processing\r\n\r\n".repeat(100);
        for upstream in [&a, &b] {
            upstream.always(vec![Step::ReadBody, Step::Flood(interim.clone().into())]);
        }
        let request = if http10 { Request::chat("m").http10() } else { Request::chat("m") };
        let mut client = app.client().await;
        client.send(request.bytes()).await;
        let limit = Duration::from_secs(10);
        let Ok(answer) = tokio::time::timeout(limit, client.answer()).await else {
            panic!("HTTP/1.0 {http10}: interim answers and nothing else for {limit:?}");
        };
        assert_openai_error(&answer, 502, "backend_error");
        assert_eq!(a.count() + b.count(), 1);
        for upstream in [&a, &b] {
            app.inflight_is(upstream.name, "m", 0.0).await;
            upstream.always(json_reply("{}"));
        }
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_some_interim_answers_are_no_flood() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    upstream
        .always([answers_with("HTTP/1.1 102 Processing\r\n\r\n".repeat(20)), json_reply("{}")[1..].to_vec()].concat());
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

/// An answer must never be taken for that to another request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_more_than_an_answer_is_not_the_next_answer() {
    let stale = "HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{\"it\":\"stale!\"}";
    let first = |head: &str, body: &str| format!("HTTP/1.1 {head}\r\n\r\n{body}");
    let cases: [(&str, Request, String, &str); 8] = [
        ("bytes past the length", Request::chat("m"), first("200 OK\r\ncontent-length: 2", "{}"), "{}"),
        (
            "bytes past the last chunk",
            Request::chat("m"),
            first("200 OK\r\ntransfer-encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"),
            "{}",
        ),
        ("bytes past nothing", Request::chat("m"), first("200 OK\r\ncontent-length: 0", ""), ""),
        ("a body that a 204 cannot have", Request::chat("m"), first("204 No Content", ""), ""),
        ("a body of a 204 with a length", Request::chat("m"), first("204 No Content\r\ncontent-length: 2", "{}"), ""),
        ("a body that a 304 cannot have", Request::chat("m"), first("304 Not Modified\r\ncontent-length: 2", ""), ""),
        (
            "a body after HEAD",
            Request::new("HEAD", "/v1/realtime?model=m"),
            first("200 OK\r\ncontent-length: 2", "{}"),
            "",
        ),
        (
            "chunks after HEAD",
            Request::new("HEAD", "/v1/realtime?model=m"),
            first("200 OK\r\ntransfer-encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"),
            "",
        ),
    ];
    for (what, request, answer, body) in cases {
        for later in [false, true] {
            let upstream = Upstream::start("a", &["m"]).await;
            let app = TestApp::with(&[&upstream]).await;
            let gate = if later { Gate::shut() } else { Gate::open_one() };
            let mut script = vec![Step::ReadBody];
            if later {
                script.extend([Step::Send(answer.clone().into()), Step::Hold(gate.clone()), Step::Send(stale.into())]);
            } else {
                script.push(Step::Send(format!("{answer}{stale}").into()));
            }
            upstream.script(script);
            upstream.always(json_reply(r#"{"it":"fresh"}"#));
            let mut client = app.client().await;
            let seen = client.ask(&request).await;
            assert_eq!((seen.text().as_str(), seen.end), (body, End::Whole), "{what}, later {later}");
            app.inflight_is("a", "m", 0.0).await;
            gate.open();
            let sent_len = answer.len() + stale.len();
            eventually("all of it has been sent, or the proxy has hung up", async || {
                upstream.peek(0, |request| request.sent_len) == Some(sent_len) || !upstream.is_connected(0)
            })
            .await;
            for _ in 0..3 {
                let next = client.ask(&Request::chat("m")).await;
                assert_eq!((next.status, next.json()["it"].as_str()), (200, Some("fresh")), "{what}, later {later}");
            }
            // What else may come on the first one nobody knows.
            assert_eq!(upstream.connections_used(), 2, "{what}, later {later}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_an_answer_with_two_framings_reaches_nobody_with_two() {
    for (lines, body) in [
        ("content-length: 2\r\ntransfer-encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked\r\ncontent-length: 12", "2\r\n{}\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked\r\nTransfer-Encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked, identity", "2\r\n{}\r\n0\r\n\r\n"),
    ] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::with(&[&upstream]).await;
        upstream.script(answers_then(format!("HTTP/1.1 200 OK\r\n{lines}\r\n\r\n{body}"), Step::Close));
        let mut client = app.client().await;
        let answer = client.ask(&Request::chat("m")).await;
        let framings = answer.head.all("content-length").len() + answer.head.all("transfer-encoding").len();
        assert!(framings <= 1, "{lines:?}: {:?}", answer.head);
        match answer.status {
            502 => assert_openai_error(&answer, 502, "backend_error"),
            // Chunks that were read as such, or passed on as the bytes that they are.
            status => assert!(
                status == 200 && [&b"{}"[..], body.as_bytes()].contains(&answer.bytes()),
                "{lines:?}: {answer:?}"
            ),
        }
        let mut client = if answer.is_whole() && framings == 1 { client } else { app.client().await };
        assert_eq!(client.ask(&Request::chat("m")).await.status, 200);
        app.inflight_is("a", "m", 0.0).await;
    }
}

// === push-back ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_push_back_of_the_only_backend_is_its_answer() {
    for (status, body) in [
        ("429 Too Many Requests", r#"{"error":{"message":"slow down","code":429}}"#),
        ("503 Service Unavailable", r#"{"error":{"message":"The engine is currently busy"}}"#),
        ("529 Overloaded", r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#),
    ] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::with(&[&upstream]).await;
        upstream.script(reply(status, &format!("{JSON}Retry-After: 7\r\nx-should-retry: true\r\n"), body));
        let answer = app.ask(&Request::chat("m")).await;
        assert_eq!((answer.head.word(1), answer.text().as_str()), (&status[..3], body));
        assert_eq!((answer.header("retry-after"), answer.header("x-should-retry")), (Some("7"), Some("true")));
        assert_eq!(upstream.count(), 1, "{status}: asked again");
        app.inflight_is("a", "m", 0.0).await;
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    }
}

// === while the request is still on its way ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_backend_that_goes_while_the_request_is_uploaded() {
    for how in ["reset", "close", "container died"] {
        let a = Upstream::start("a", &["m"]).await;
        let app = TestApp::with(&[&a]).await;
        let gate = Gate::shut();
        let end = if how == "close" { Step::Close } else { Step::Reset };
        a.always(vec![Step::ReadAtLeast(1000), Step::Hold(gate.clone()), end]);
        let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(40_000));
        let request = Request::post("/v1/completions", &body);
        let mut client = app.client().await;
        client.send(request.head_bytes()).await;
        client.send(&body[..100_000]).await;
        eventually("the backend has some", async || a.peek(0, |request| request.body.bytes.len() > 1000) == Some(true))
            .await;
        let b = Upstream::start("b", &["m"]).await;
        app.add(Spec::of(&b)).await;
        match how {
            "container died" => {
                app.ended("a").await;
                a.hung_up(0).await;
            }
            _ => gate.open(),
        }
        client.send(&body[100_000..]).await;
        let answer = client.answer().await;
        assert_eq!(answer.status, 200, "{how}: {}", answer.text());
        assert_eq!((a.count(), b.count()), (1, 1), "{how}");
        assert_eq!(b.peek(0, |request| request.body.bytes == body.as_bytes()), Some(true), "{how}");
        app.inflight_is("b", "m", 0.0).await;
    }
}

// === going away ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_container_that_dies_before_the_first_byte_with_nobody_else_there() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    upstream.always(held_reply(&Gate::shut()));
    let mut client = app.client().await;
    client.send(Request::chat("m").bytes()).await;
    upstream.whole(0).await;
    app.ended("a").await;
    let answer = client.answer().await;
    assert!([502, 503].contains(&answer.status), "{} {}", answer.status, answer.text());
    let code = answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    assert_openai_error(&answer, answer.status, &code);
    upstream.hung_up(0).await;
    assert_eq!(upstream.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_container_that_dies_in_a_stream_with_another_one_there() {
    for how in ["died", "not listed any more"] {
        let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
        let app = TestApp::with(&[&a]).await;
        a.always(held_stream("data: 1\n\n", &Gate::shut(), ""));
        let mut client = app.client().await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        assert_eq!(client.piece().await.unwrap().1, b"data: 1\n\n");
        app.add(Spec::of(&b)).await;
        match how {
            "died" => app.ended("a").await,
            _ => app.reset([Spec::of(&b)]).await,
        }
        let answer = client.finish().await;
        assert!(!answer.is_whole(), "{how}: ended cleanly: {}", answer.text());
        let told = answer.text();
        let last = told.trim_end().rsplit("\n\n").next().unwrap().trim_start_matches("data: ");
        assert!(told.starts_with("data: 1\n\n") && last.starts_with('{'), "{how}: no error event in {told:?}");
        let json: serde_json::Value = serde_json::from_str(last).unwrap();
        assert!(json["error"]["message"].is_string(), "{how}: {told}");
        a.hung_up(0).await;
        app.rotation_is(1, "b alone").await;
        assert_eq!((a.count(), b.count()), (1, 0), "{how}: asked again");
        assert_eq!(app.ask(&Request::chat("m")).await.json()["served_by"], "b");
        app.inflight_is("b", "m", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_the_proxy_ends_before_the_first_byte_and_while_a_request_is_uploaded() {
    for uploading in [false, true] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::with(&[&upstream]).await;
        let gate = Gate::shut();
        upstream.always(held_reply(&gate));
        let addr = app.addr();
        let wire = Request::chat("m").bytes();
        let now = if uploading { wire.len() - 5 } else { wire.len() };
        let mut client = app.client().await;
        client.send(&wire[..now]).await;
        if !uploading {
            upstream.whole(0).await;
        }
        let down = tokio::spawn(app.shutdown());
        eventually("nobody listens any more", async || tokio::net::TcpStream::connect(addr).await.is_err()).await;
        client.send(&wire[now..]).await;
        gate.open();
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.end), (200, End::Whole), "uploading {uploading}: {}", answer.text());
        assert_eq!(client.ended().await, End::Closed);
        soon("the proxy is down", down).await.unwrap();
    }
}

/// Whose client takes its time to send is not slow to answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_the_time_of_an_upload_is_not_the_backends() {
    for knob in ["PROXY_FIRST_BYTE_TIMEOUT", "PROXY_IDLE_TIMEOUT"] {
        let a = Upstream::start("a", &["m"]).await;
        let app = TestApp::start_with_backends(&[(knob, "300ms")], &[&a]).await;
        let request = Request::post("/v1/completions", format!(r#"{{"model":"m","prompt":"{}"}}"#, "text ".repeat(99)));
        let bytes = request.bytes();
        let mut client = app.client().await;
        client.send_pieces(bytes.chunks(bytes.len() / 3), Duration::from_millis(400)).await;
        let answer = client.answer().await;
        assert_eq!(answer.status, 200, "{knob}: {}", answer.text());
        // But from its end on.
        a.always(vec![Step::ReadBody, Step::Hold(Gate::shut())]);
        client.send(&bytes).await;
        assert_openai_error(&client.answer().await, 504, "backend_timeout");
    }
}
