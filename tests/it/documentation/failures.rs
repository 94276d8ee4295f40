//! `docs/failures.md` says what the code does: its tables are compared with those in the code, in both directions.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use http::StatusCode;
use inference_proxy::{
    base::error::ProxyError,
    data::proxy::failure::{self, Failure, Left, Lesson, Next, Stage},
    pool::breaker::Outcome,
};

/// The rows of the only table below this heading of `docs/failures.md`, without code marks.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let rows = super::rows("docs/failures.md", heading);
    rows.into_iter().map(|row| row.into_iter().map(|cell| cell.replace('`', "")).collect()).collect()
}

/// One error of each kind.
pub(super) fn errors() -> Vec<ProxyError> {
    let text = || "x".to_owned();
    let bad = |code| ProxyError::BadRequest { code, message: text() };
    vec![
        bad("model_required"),
        bad("invalid_json"),
        bad("invalid_request"),
        ProxyError::UnsupportedEncoding { message: text() },
        ProxyError::DecodesTooLarge { message: text() },
        ProxyError::HeadTooLarge { message: text() },
        ProxyError::RequestTimeout { what: "x" },
        ProxyError::NoSuchPath { message: text() },
        ProxyError::AnswerGone { id: text() },
        ProxyError::MethodNotAllowed { allow: "GET" },
        ProxyError::ModelNotFound { model: text() },
        ProxyError::ModelUnavailable { model: text(), why: "x" },
        ProxyError::NoBackend,
        ProxyError::Overloaded { what: text(), retry_after: None },
        ProxyError::TooLarge { limit_bytes: 1, knob: "x" },
        ProxyError::Backend { backend: text(), what: "x", attempts: 1 },
        ProxyError::BadAnswer { backend: text(), why: "x", attempts: 1 },
        ProxyError::Shortage,
        ProxyError::BrokenOff { backend: text(), why: text() },
        ProxyError::BackendTimeout { backend: text(), limit: Duration::from_secs(1), knob: "x" },
    ]
}

#[test]
fn documentation_of_failures_has_every_error_code_and_its_status() {
    let documented: BTreeMap<String, String> =
        rows("Errors of the proxy's own").into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    let mut codes: Vec<&str> = ProxyError::CODES.to_vec();
    codes.sort_unstable();
    assert_eq!(documented.keys().map(String::as_str).collect::<Vec<_>>(), codes);
    for error in errors() {
        assert_eq!(documented[error.code()], error.status().as_str(), "{}: {error}", error.code());
        codes.retain(|code| *code != error.code());
    }
    assert_eq!(codes, [""; 0], "no error of this code is compared");
}

const FAILURES: [Failure; 11] = [
    Failure::Refused,
    Failure::ConnectTimedOut,
    Failure::Unreachable,
    Failure::Stopped,
    Failure::Shortage,
    Failure::Ended,
    Failure::InvalidAnswer("x"),
    Failure::Declined,
    Failure::TimedOut,
    Failure::ClientGone,
    Failure::ClientBroke,
];

/// The stages with the words for them.
const STAGES: [(Stage, &str); 4] = [
    (Stage::Unanswered { reused: false }, "no byte, fresh connection"),
    (Stage::Unanswered { reused: true }, "no byte, reused connection"),
    (Stage::Begun, "a part of the head"),
    (Stage::Answered, "the client has the head"),
];

/// What happens next, in words. `error`: what the client gets if nothing more can be tried.
fn step(next: Next, error: &ProxyError) -> String {
    let words = match next {
        Next::SendAgain => "again",
        Next::Elsewhere => "elsewhere",
        Next::Relieve => "again, once idle connections are closed",
        Next::ElsewhereAtOnce => "elsewhere, at once",
        Next::AwaitNews => "news",
        Next::Pass => "no: the answer passes",
        Next::Fail => return format!("no: {} {}", error.status().as_u16(), error.code()),
        Next::Refuse => "no: 4xx that says what is wrong",
        Next::Cut => "no: cut",
        Next::Abandon => "no: nobody is there",
    };
    words.to_owned()
}

fn lesson(lesson: Lesson) -> &'static str {
    match lesson {
        Lesson::None => "nothing",
        Lesson::Failure => "a failure",
    }
}

/// What the code does: by what failed, how far the answer had come and whether the request is held, what is done and learnt.
fn matrix() -> BTreeMap<[String; 3], [String; 2]> {
    let limit = Some((Duration::from_secs(1), "PROXY_FIRST_BYTE_TIMEOUT"));
    let mut matrix = BTreeMap::new();
    for failure in FAILURES {
        for (stage, words) in STAGES {
            // Connecting fails before anything is sent; a backend may be stopped later as well.
            let is_late = failure == Failure::Stopped && stage == Stage::Answered;
            if failure.is_of_connecting() && stage != (Stage::Unanswered { reused: false }) && !is_late {
                continue;
            }
            for (can_replay, held) in [(true, "held"), (false, "not held")] {
                let left = Left { can_replay, can_relieve: true, may_go_elsewhere: true, may_await_news: true };
                let (next, learnt) = failure::judge(failure, stage, left);
                let key = [failure.word(), words, held].map(str::to_owned);
                let error = failure.error(stage, "backend", 1, limit);
                matrix.insert(key, [step(next, &error), lesson(learnt).to_owned()]);
            }
        }
    }
    matrix
}

#[test]
fn documentation_of_failures_has_every_row_of_the_matrix() {
    let mut documented = BTreeMap::new();
    for row in rows("Attempts that fail") {
        let [whats, _, stages, held, done, learnt, advice] = &row[..] else { panic!("{row:?} has other cells") };
        assert!(!advice.is_empty(), "{row:?}");
        let any = |cell: &str, all: &[&str]| -> Vec<String> {
            let all = if cell == "any" { all.join("; ") } else { cell.to_owned() };
            all.split("; ").map(str::to_owned).collect()
        };
        let is_connect = FAILURES.iter().any(|known| known.is_of_connecting() && known.word() == whats);
        let all_stages = STAGES.map(|(_, words)| words);
        let all_stages = if is_connect { &all_stages[..1] } else { &all_stages[..] };
        for what in whats.split(", ") {
            for stage in any(stages, all_stages) {
                for held in any(held, &["held", "not held"]) {
                    let key = [what.to_owned(), stage.clone(), held];
                    let before = documented.insert(key.clone(), [done.clone(), learnt.clone()]);
                    assert!(before.is_none(), "{key:?} stands there twice");
                }
            }
        }
    }
    let matrix = matrix();
    for (key, expected) in &matrix {
        assert_eq!(documented.get(key), Some(expected), "{key:?}");
    }
    let unknown: Vec<_> = documented.keys().filter(|key| !matrix.contains_key(*key)).collect();
    assert!(unknown.is_empty(), "docs/failures.md has rows that the code has not: {unknown:?}");
}

#[test]
fn documentation_of_failures_says_what_each_status_teaches() {
    let mut documented = Vec::new();
    for row in rows("Answers of backends that say no") {
        for status in row[0].split(", ") {
            let code = StatusCode::from_bytes(status.as_bytes()).unwrap();
            let learnt = match failure::outcome(code, None, || SystemTime::UNIX_EPOCH) {
                Outcome::Success => "nothing",
                Outcome::Failure => "a failure",
                Outcome::PushBack { .. } => "to spare it",
                other => panic!("{status} teaches {other:?}"),
            };
            assert_eq!(row[2], learnt, "{status}");
            documented.push(code.as_u16());
        }
    }
    // Whatever teaches more than nothing, and what does not although it might.
    for status in 500..=599 {
        let outcome = failure::outcome(StatusCode::from_u16(status).unwrap(), None, || SystemTime::UNIX_EPOCH);
        assert!(documented.contains(&status) || outcome == Outcome::Failure, "{status} is not documented");
    }
    assert!(documented.contains(&429));
}
