//! What to do when an exchange goes wrong: the failure matrix, as one pure function.
//!
//! Three things decide: what failed, how far the exchange had come, and whether the request can be sent once more. An
//! answer that has begun is never begun again by somebody else, and nothing is retried for a client that has left. What
//! a failure says about the backend's health is part of the same table, because both are judged by the same facts.

use std::time::{Duration, SystemTime};

use http::StatusCode;

use crate::{
    base::foreign::FOREVER,
    pool::{breaker::Outcome, tally::Trouble, upstream::ConnectError},
    telemetry::metrics::Retry,
    wire::http1::head::HeadError,
};

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// No connection could be had.
    Connect(ConnectError),
    /// The backend's connection ended: closed, reset, or cut because the backend was removed.
    Ended,
    /// The backend sent what is no answer, for this reason: bad grammar, an oversized head, a flood of interim answers, an
    /// upgrade that was not asked for. The reason is a fixed text, which holds nothing of what was sent.
    Nonsense(&'static str),
    /// A time limit that the user set ran out.
    TimedOut,
    /// The backend answered that it does not serve the request ([`is_declined`]).
    Declined,
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
            What::Connect(ConnectError::Shortage) => "proxy_shortage",
            What::Ended => "connection_ended",
            What::Nonsense(_) => "invalid_answer",
            What::TimedOut => "timeout",
            What::Declined => "declined",
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
    /// The client has got something of it.
    Answered,
}

/// What is left of a request's chances when an attempt has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// All of the request that was sent is still there to be sent again.
    pub can_replay: bool,
    /// The proxy has not yet given up its idle connections for this request.
    pub can_relieve: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send again to the same backend, on a fresh connection, at once.
    SendAgain,
    /// Send again to another backend, if there is one and the user allows another attempt; else give up.
    Elsewhere,
    /// Give up the idle connections of all backends, and send again to the same backend, on a fresh connection.
    Relieve,
    /// Send again to another backend that has a place at once, if the user allows another attempt; else pass the answer on.
    ElsewhereAtOnce,
    /// Pass the answer on.
    Pass,
    /// Give up: 503, because it is the proxy that falls short.
    Shortage,
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

/// The row of the matrix for one failure.
pub fn judge(what: What, stage: Stage, left: Left) -> (Action, Lesson) {
    use Stage::{Answered, Begun, Unanswered};
    let Left { can_replay, can_relieve } = left;
    match (what, stage) {
        // What its status teaches, `outcome` says.
        (What::Declined, Unanswered { .. } | Begun) if can_replay => (Action::ElsewhereAtOnce, Lesson::None),
        (What::Declined, _) => (Action::Pass, Lesson::None),
        (What::Connect(ConnectError::Shortage), _) if can_relieve => (Action::Relieve, Lesson::None),
        (What::Connect(ConnectError::Shortage), _) => (Action::Shortage, Lesson::None),
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
        (What::Nonsense(_), Unanswered { .. } | Begun) => (Action::BadGateway, Lesson::Failure),
        // It stops working on it when its connection is closed.
        (What::TimedOut, Unanswered { .. }) if can_replay => (Action::Elsewhere, Lesson::Failure),
        (What::TimedOut, Unanswered { .. } | Begun) => (Action::GatewayTimeout, Lesson::Failure),
        (What::Ended | What::Nonsense(_) | What::TimedOut, Answered) => (Action::Cut, Lesson::Failure),
    }
}

/// What people are told of a failure; nothing of what was not the backend's fault.
pub fn trouble(what: What) -> Option<Trouble> {
    match what {
        What::Connect(ConnectError::Refused) => Some(Trouble::Refused),
        What::Connect(ConnectError::TimedOut) => Some(Trouble::ConnectTimedOut),
        What::Connect(ConnectError::Unreachable) => Some(Trouble::Unreachable),
        What::Ended => Some(Trouble::Ended),
        What::Nonsense(why) => Some(Trouble::Nonsense(why)),
        What::TimedOut => Some(Trouble::TimedOut),
        What::Connect(ConnectError::Cut | ConnectError::Shortage) => None,
        // The status tells.
        What::Declined => None,
        What::ClientGone | What::ClientFault => None,
    }
}

/// Why a second attempt is made after this, for the metrics.
pub fn retry(what: What) -> Retry {
    match what {
        What::Connect(_) => Retry::Connect,
        What::TimedOut => Retry::TimedOut,
        What::Ended | What::Nonsense(_) | What::Declined | What::ClientGone | What::ClientFault => Retry::Ended,
    }
}

/// Whether an answer of this status says that the request was not served, so that another replica may do better. Not 501
/// and the like, which speak of the request.
pub fn is_declined(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 500 | 502 | 503 | 504 | 529)
}

/// Why bytes are no head of an answer, without a word of theirs.
pub fn why_no_head(error: HeadError) -> &'static str {
    match error {
        HeadError::Malformed(why) | HeadError::Ambiguous(why) => why,
        HeadError::TooLarge => "the head has more than 64 KiB",
        HeadError::TooManyLines => "the head has more than 128 header lines",
        HeadError::Version => "the version is neither HTTP/1.0 nor HTTP/1.1",
    }
}

/// Why bytes that end before the end of a head are none, if they tell.
pub fn why_no_http(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        // An alert or a handshake record of any version.
        [0x15 | 0x16, 0x03, ..] => Some("it speaks TLS on this port, and is asked without"),
        // A frame of settings.
        [0, 0, _, 0x04, ..] => Some("it speaks HTTP/2 alone on this port"),
        bytes if !bytes.starts_with(&b"HTTP/"[..bytes.len().min(5)]) => Some("it does not speak HTTP on this port"),
        _ => None,
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
            (What::Nonsense("why"), fresh, true, Action::BadGateway, failed),
            (What::Nonsense("why"), Stage::Begun, true, Action::BadGateway, failed),
            (What::Nonsense("why"), Stage::Answered, false, Action::Cut, failed),
            (What::Connect(ConnectError::Shortage), fresh, true, Action::Relieve, Lesson::None),
            (What::TimedOut, fresh, true, Action::Elsewhere, failed),
            (What::TimedOut, reused, true, Action::Elsewhere, failed),
            (What::TimedOut, fresh, false, Action::GatewayTimeout, failed),
            (What::TimedOut, Stage::Begun, true, Action::GatewayTimeout, failed),
            (What::Declined, Stage::Begun, true, Action::ElsewhereAtOnce, Lesson::None),
            (What::Declined, Stage::Begun, false, Action::Pass, Lesson::None),
            (What::Declined, Stage::Answered, true, Action::Pass, Lesson::None),
            (What::TimedOut, Stage::Answered, false, Action::Cut, failed),
            (What::ClientFault, fresh, true, Action::Refuse, Lesson::None),
            (What::ClientFault, Stage::Answered, true, Action::Cut, Lesson::None),
            (What::ClientGone, fresh, true, Action::Abandon, Lesson::None),
            (What::ClientGone, Stage::Answered, true, Action::Abandon, Lesson::None),
        ] {
            let left = Left { can_replay, can_relieve: true };
            assert_eq!(judge(what, stage, left), (action, lesson), "{what:?} {stage:?} {can_replay}");
            let without = match action {
                Action::Relieve => Action::Shortage,
                action => action,
            };
            assert_eq!(judge(what, stage, Left { can_relieve: false, ..left }), (without, lesson), "{what:?}");
            assert!(lesson == Lesson::None || trouble(what).is_some(), "{what:?} must have a name");
        }
    }

    #[test]
    fn nothing_is_sent_twice_once_an_answer_has_begun_or_the_client_has_gone() {
        let stages =
            [Stage::Unanswered { reused: false }, Stage::Unanswered { reused: true }, Stage::Begun, Stage::Answered];
        let all =
            [What::Ended, What::Nonsense("why"), What::TimedOut, What::Declined, What::ClientGone, What::ClientFault];
        for what in all {
            for stage in stages {
                for can_replay in [false, true] {
                    let action = judge(what, stage, Left { can_replay, can_relieve: true }).0;
                    let again = matches!(action, Action::SendAgain | Action::Elsewhere | Action::ElsewhereAtOnce);
                    let may = can_replay
                        && match what {
                            What::Ended | What::TimedOut => matches!(stage, Stage::Unanswered { .. }),
                            // Its answer is held back until it is clear that it will not be bettered.
                            What::Declined => stage != Stage::Answered,
                            _ => false,
                        };
                    assert_eq!(again, may, "{what:?} {stage:?} {can_replay}");
                }
            }
        }
    }

    #[test]
    fn which_answers_another_replica_may_better() {
        let declined = [429, 500, 502, 503, 504, 529];
        for status in 100..=999 {
            let got = is_declined(StatusCode::from_u16(status).unwrap());
            assert_eq!(got, declined.contains(&status), "{status}");
        }
    }

    #[test]
    fn the_reason_says_nothing_of_what_was_sent() {
        for (bytes, told) in [
            (&b"\x15\x03\x01\0\x02\x02\x46"[..], Some("it speaks TLS on this port, and is asked without")),
            (b"\x16\x03\x03", Some("it speaks TLS on this port, and is asked without")),
            (b"\0\0\x12\x04\0\0\0\0\0", Some("it speaks HTTP/2 alone on this port")),
            (b"SSH-2.0-OpenSSH_9", Some("it does not speak HTTP on this port")),
            (b"secret", Some("it does not speak HTTP on this port")),
            (b"", None),
            (b"HT", None),
            (b"HTTP/1.1 200 O", None),
        ] {
            assert_eq!(why_no_http(bytes), told, "{bytes:?}");
        }
    }
}
