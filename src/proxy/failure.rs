//! What to do when an exchange goes wrong: the failure matrix, as one pure function.
//!
//! Three things decide: what failed, how far the exchange had come, and whether the request can be sent once more. An
//! answer that has begun is never begun again by somebody else, and nothing is retried for a client that has left. What
//! a failure says about the backend's health is part of the same table, because both are judged by the same facts.

use std::time::{Duration, SystemTime};

use http::StatusCode;

use crate::{breaker::Outcome, foreign::FOREVER, tally::Trouble, upstream::ConnectError};

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// No connection could be had.
    Connect(ConnectError),
    /// The backend's connection ended: closed, reset, or cut because the backend was removed.
    Ended,
    /// The backend sent what is no answer: bad grammar, an oversized head, a flood of interim answers, an upgrade that
    /// nobody asked for, broken framing.
    Nonsense,
    /// A time limit that the user set ran out.
    TimedOut,
    /// The client left.
    ClientGone,
    /// The client's body turned out to be wrong or too large, or stood still.
    ClientFault,
}

impl What {
    /// One word for telemetry.
    pub fn name(self) -> &'static str {
        match self {
            What::Connect(ConnectError::Refused) => "connection_refused",
            What::Connect(ConnectError::TimedOut) => "connect_timeout",
            What::Connect(ConnectError::Unreachable) => "unreachable",
            What::Connect(ConnectError::Cut) => "backend_stopped",
            What::Ended => "connection_ended",
            What::Nonsense => "invalid_answer",
            What::TimedOut => "timeout",
            What::ClientGone => "client_gone",
            What::ClientFault => "client_broke",
        }
    }
}

/// How far the exchange had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// No byte of an answer has come.
    Unanswered {
        /// The connection had carried a request before: it may have been closed while it was idle.
        reused: bool,
    },
    /// The answer has begun, and the client knows nothing of it.
    Begun,
    /// The client has got the head of the answer.
    Answered,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send again to the same backend, on a fresh connection, at once.
    SendAgain,
    /// Send again to another backend, if there is one and the user allows another attempt; else give up.
    Elsewhere,
    /// Give up: 502.
    BadGateway,
    /// Give up: 504.
    GatewayTimeout,
    /// Answer what is wrong with the request.
    Refuse,
    /// Cut the answer, with an error event first where it is a stream of events.
    Cut,
    /// End everything; there is nobody to tell.
    Abandon,
}

/// What a backend's record learns from the end of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lesson {
    /// Nothing: it was not its fault, or it cannot be told whose fault it was.
    None,
    /// It failed.
    Failure,
}

/// The row of the matrix for one failure. `can_replay`: all of the request that was sent is still there to be sent again.
pub fn judge(what: What, stage: Stage, can_replay: bool) -> (Action, Lesson) {
    use Stage::{Answered, Begun, Unanswered};
    match (what, stage) {
        (What::ClientGone, _) => (Action::Abandon, Lesson::None),
        (What::ClientFault, Unanswered { .. } | Begun) => (Action::Refuse, Lesson::None),
        (What::ClientFault, Answered) => (Action::Cut, Lesson::None),
        // The race that keep-alive cannot win: the backend closed the connection while the request was under way to it.
        (What::Ended, Unanswered { reused: true }) if can_replay => (Action::SendAgain, Lesson::None),
        (What::Ended, Unanswered { reused: true }) => (Action::BadGateway, Lesson::None),
        (What::Connect(ConnectError::Cut), _) => (Action::Elsewhere, Lesson::None),
        (What::Connect(_), _) => (Action::Elsewhere, Lesson::Failure),
        (What::Ended, Unanswered { reused: false }) if can_replay => (Action::Elsewhere, Lesson::Failure),
        (What::Ended, Unanswered { reused: false } | Begun) => (Action::BadGateway, Lesson::Failure),
        (What::Nonsense, Unanswered { .. } | Begun) => (Action::BadGateway, Lesson::Failure),
        // It may be working on it: somebody else would do the same work once more.
        (What::TimedOut, Unanswered { .. } | Begun) => (Action::GatewayTimeout, Lesson::Failure),
        (What::Ended | What::Nonsense | What::TimedOut, Answered) => (Action::Cut, Lesson::Failure),
    }
}

/// What people are told of a failure; nothing of what was not the backend's fault.
pub fn trouble(what: What) -> Option<Trouble> {
    match what {
        What::Connect(ConnectError::Refused) => Some(Trouble::Refused),
        What::Connect(ConnectError::TimedOut) => Some(Trouble::ConnectTimedOut),
        What::Connect(ConnectError::Unreachable) => Some(Trouble::Unreachable),
        What::Ended => Some(Trouble::Ended),
        What::Nonsense => Some(Trouble::Nonsense),
        What::TimedOut => Some(Trouble::TimedOut),
        What::Connect(ConnectError::Cut) | What::ClientGone | What::ClientFault => None,
    }
}

/// What a backend's record learns from the status of an answer. An error that is the client's (4xx) is none of the
/// backend's; 429, 503 and 529 push back: it does not take this request now (429), or any (503, 529); 501 and 505 speak of the request. `retry_after`:
/// the header of that name, in seconds or as a date (RFC 9110, 10.2.3), compared with what `clock` says.
pub fn outcome(status: StatusCode, retry_after: Option<&[u8]>, clock: impl FnOnce() -> SystemTime) -> Outcome {
    match status.as_u16() {
        status @ (429 | 503 | 529) => {
            Outcome::PushBack { of_all: status != 429, retry_after: retry_after.and_then(|text| wait(text, clock)) }
        }
        501 | 505 => Outcome::Success,
        500.. => Outcome::Failure,
        _ => Outcome::Success,
    }
}

fn wait(text: &[u8], clock: impl FnOnce() -> SystemTime) -> Option<Duration> {
    let text = std::str::from_utf8(text).ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // What does not fit is long enough.
        return Some(text.parse().map_or(FOREVER, |seconds| Duration::from_secs(seconds).min(FOREVER)));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(clock()).unwrap_or_default().min(FOREVER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_status_teaches() {
        let clock = || SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let pushed =
            |of_all, seconds: Option<u64>| Outcome::PushBack { of_all, retry_after: seconds.map(Duration::from_secs) };
        for (status, retry_after, expect) in [
            (200, None, Outcome::Success),
            (302, None, Outcome::Success),
            (400, None, Outcome::Success),
            (404, Some("7"), Outcome::Success),
            (499, None, Outcome::Success),
            (501, None, Outcome::Success),
            (500, Some("7"), Outcome::Failure),
            (502, None, Outcome::Failure),
            (504, None, Outcome::Failure),
            (599, None, Outcome::Failure),
            (429, None, pushed(false, None)),
            (429, Some(" 7 "), pushed(false, Some(7))),
            (529, Some("0"), pushed(true, Some(0))),
            (503, Some("315360001"), pushed(true, Some(315_360_000))),
            (503, Some("4294967296"), pushed(true, Some(315_360_000))),
            (429, Some("99999999999999999999999999"), pushed(false, Some(315_360_000))),
            (429, Some("Fri, 31 Dec 9999 23:59:59 GMT"), pushed(false, Some(315_360_000))),
            (429, Some(""), pushed(false, None)),
            (503, Some("soon"), pushed(true, None)),
            (503, Some("-1"), pushed(true, None)),
            (503, Some("99999999999"), pushed(true, Some(315_360_000))),
            (503, Some("Sun, 09 Sep 2001 01:47:10 GMT"), pushed(true, Some(30))),
            (503, Some("Sun, 09 Sep 2001 01:46:10 GMT"), pushed(true, Some(0))),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let got = outcome(status, retry_after.map(str::as_bytes), clock);
            assert_eq!(got, expect, "{status} {retry_after:?}");
        }
    }

    #[test]
    fn the_matrix() {
        let fresh = Stage::Unanswered { reused: false };
        let reused = Stage::Unanswered { reused: true };
        let failed = Lesson::Failure;
        for (what, stage, can_replay, action, lesson) in [
            (What::Connect(ConnectError::Refused), fresh, true, Action::Elsewhere, failed),
            (What::Connect(ConnectError::TimedOut), fresh, true, Action::Elsewhere, failed),
            (What::Connect(ConnectError::Unreachable), fresh, true, Action::Elsewhere, failed),
            (What::Connect(ConnectError::Cut), fresh, true, Action::Elsewhere, Lesson::None),
            (What::Ended, reused, true, Action::SendAgain, Lesson::None),
            (What::Ended, reused, false, Action::BadGateway, Lesson::None),
            (What::Ended, fresh, true, Action::Elsewhere, failed),
            (What::Ended, fresh, false, Action::BadGateway, failed),
            (What::Ended, Stage::Begun, true, Action::BadGateway, failed),
            (What::Ended, Stage::Answered, true, Action::Cut, failed),
            (What::Nonsense, fresh, true, Action::BadGateway, failed),
            (What::Nonsense, Stage::Begun, true, Action::BadGateway, failed),
            (What::Nonsense, Stage::Answered, false, Action::Cut, failed),
            (What::TimedOut, fresh, true, Action::GatewayTimeout, failed),
            (What::TimedOut, reused, true, Action::GatewayTimeout, failed),
            (What::TimedOut, Stage::Answered, false, Action::Cut, failed),
            (What::ClientFault, fresh, true, Action::Refuse, Lesson::None),
            (What::ClientFault, Stage::Answered, true, Action::Cut, Lesson::None),
            (What::ClientGone, fresh, true, Action::Abandon, Lesson::None),
            (What::ClientGone, Stage::Answered, true, Action::Abandon, Lesson::None),
        ] {
            assert_eq!(judge(what, stage, can_replay), (action, lesson), "{what:?} {stage:?} {can_replay}");
            assert!(lesson == Lesson::None || trouble(what).is_some(), "{what:?} must have a name");
        }
    }

    #[test]
    fn nothing_is_sent_twice_once_an_answer_has_begun_or_the_client_has_gone() {
        let stages =
            [Stage::Unanswered { reused: false }, Stage::Unanswered { reused: true }, Stage::Begun, Stage::Answered];
        for what in [What::Ended, What::Nonsense, What::TimedOut, What::ClientGone, What::ClientFault] {
            for stage in stages {
                for can_replay in [false, true] {
                    let again = matches!(judge(what, stage, can_replay).0, Action::SendAgain | Action::Elsewhere);
                    let may = what == What::Ended && matches!(stage, Stage::Unanswered { .. }) && can_replay;
                    assert_eq!(again, may, "{what:?} {stage:?} {can_replay}");
                }
            }
        }
    }
}
