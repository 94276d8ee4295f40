//! The failure policy: what happens next when a request goes wrong, as one pure function.
//!
//! Three things decide: what failed, how far the answer had come, and what the request may still do. An answer that has
//! begun is never begun again by another backend, and nothing is retried for a client that has left. The same table says
//! what the backend's circuit breaker learns, because both are judged by the same facts.
//!
//! A [`Failure`] has one word for spans and logs, one for the metrics, one for the status page, and one error for the
//! client. All of them stand here, so that one failure cannot be told in two ways.

use std::time::{Duration, SystemTime};

use http::StatusCode;

use crate::{
    base::{error::ProxyError, foreign::FOREVER},
    pool::{breaker::Outcome, tally::Trouble, upstream::ConnectError},
    telemetry::kinds::Retry,
    wire::http1::head::HeadError,
};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its answer went out whole.
    Complete,
    /// Its backend broke off in the middle of the answer.
    BackendBroke,
    /// Its client left first.
    ClientGone,
    /// Its client's body turned out to be wrong when the answer had begun.
    ClientBroke,
}

impl Ending {
    /// Why a request did not end well, as telemetry says it.
    pub fn error(self) -> Option<&'static str> {
        match self {
            Ending::Complete => None,
            Ending::BackendBroke => Some("backend_broke"),
            Ending::ClientGone => Some("client_gone"),
            Ending::ClientBroke => Some("client_broke"),
        }
    }
}

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Nothing listens at the backend's address.
    Refused,
    /// No connection came about within the connect timeout.
    ConnectTimedOut,
    /// There is no route to the backend.
    Unreachable,
    /// The backend was stopped or removed.
    Stopped,
    /// The proxy itself has no descriptor, port or memory left for a connection.
    Shortage,
    /// The backend's connection ended: it was closed, reset, or cut because the backend was removed.
    Ended,
    /// The backend sent bytes that are no HTTP answer, for this reason: bad grammar, an oversized head, too many interim
    /// answers, an upgrade that was not asked for. The reason is a fixed text, which holds nothing of what was sent.
    InvalidAnswer(&'static str),
    /// A time limit that the user set ran out.
    TimedOut,
    /// The backend answered that it does not serve the request ([`is_declined`]).
    Declined,
    /// The client left.
    ClientGone,
    /// The client's body turned out to be wrong or too large, or stood still.
    ClientBroke,
}

/// How far the answer had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// No byte of an answer has come.
    Unanswered {
        /// The connection had carried a request before: the backend may have closed it while it was idle.
        reused: bool,
    },
    /// The answer has begun, and the client knows nothing of it.
    Begun,
    /// The client has got something of it.
    Answered,
}

/// What a request may still do when an attempt has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// All of the request that was sent is still held, so it can be sent again.
    pub can_replay: bool,
    /// The proxy has not yet closed its idle connections for this request.
    pub can_relieve: bool,
    /// Another replica could serve the request, and `PROXY_RETRIES` and the retry budget of the pool allow another attempt.
    pub may_go_elsewhere: bool,
    /// No backend could be connected to so far, and Docker has not been asked yet whether all of them were being stopped.
    pub may_await_news: bool,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The request is sent to the same backend again, over a fresh connection, at once.
    SendAgain,
    /// The idle connections of all backends are closed, and the request is sent to the same backend again.
    Relieve,
    /// The request is sent to another replica, and waits for a slot of one if it must.
    Elsewhere,
    /// The request is sent to another replica that has a free slot; if there is none, the answer passes.
    ElsewhereAtOnce,
    /// The request waits for a moment to learn whether the backends were being stopped; if so, it gets another one.
    AwaitNews,
    /// The answer passes to the client.
    Pass,
    /// The client gets the last answer that was held for it, else the error of the failure ([`Failure::error`]).
    Fail,
    /// The client is told what is wrong with its request.
    Refuse,
    /// The answer is cut, after an error event where it is a stream of events.
    Cut,
    /// Everything ends, because the client has gone.
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

/// What happens next after this failure, and what the backend's record learns from it.
pub fn judge(failure: Failure, stage: Stage, left: Left) -> (Next, Lesson) {
    use Stage::{Answered, Begun, Unanswered};
    let elsewhere = match left {
        Left { may_go_elsewhere: true, .. } => Next::Elsewhere,
        Left { may_await_news: true, .. } if failure.is_of_connecting() => Next::AwaitNews,
        _ => Next::Fail,
    };
    match (failure, stage) {
        (Failure::ClientGone, _) => (Next::Abandon, Lesson::None),
        (Failure::ClientBroke, Unanswered { .. } | Begun) => (Next::Refuse, Lesson::None),
        (Failure::ClientBroke | Failure::Stopped, Answered) => (Next::Cut, Lesson::None),
        // `outcome` says what the status teaches.
        (Failure::Declined, Unanswered { .. } | Begun) if left.can_replay && left.may_go_elsewhere => {
            (Next::ElsewhereAtOnce, Lesson::None)
        }
        (Failure::Declined, _) => (Next::Pass, Lesson::None),
        (Failure::Shortage, _) if left.can_relieve => (Next::Relieve, Lesson::None),
        (Failure::Shortage, _) => (Next::Fail, Lesson::None),
        (Failure::Stopped, _) => (elsewhere, Lesson::None),
        (Failure::Refused | Failure::ConnectTimedOut | Failure::Unreachable, _) => (elsewhere, Lesson::Failure),
        // The race that keep-alive cannot win: the backend closed the connection while the request was under way to it.
        (Failure::Ended, Unanswered { reused: true }) if left.can_replay => (Next::SendAgain, Lesson::None),
        (Failure::Ended, Unanswered { reused: true }) => (Next::Fail, Lesson::None),
        (Failure::Ended, Unanswered { reused: false }) if left.can_replay => (elsewhere, Lesson::Failure),
        // The backend stops working on the request when its connection is closed.
        (Failure::TimedOut, Unanswered { .. }) if left.can_replay => (elsewhere, Lesson::Failure),
        (Failure::Ended | Failure::TimedOut | Failure::InvalidAnswer(_), Unanswered { .. } | Begun) => {
            (Next::Fail, Lesson::Failure)
        }
        (Failure::Ended | Failure::TimedOut | Failure::InvalidAnswer(_), Answered) => (Next::Cut, Lesson::Failure),
    }
}

// === impl Failure ===

impl Failure {
    /// One word for spans and logs.
    pub fn word(self) -> &'static str {
        match self {
            Failure::Refused => "connection_refused",
            Failure::ConnectTimedOut => "connect_timeout",
            Failure::Unreachable => "unreachable",
            Failure::Stopped => "backend_stopped",
            Failure::Shortage => "proxy_shortage",
            Failure::Ended => "connection_ended",
            Failure::InvalidAnswer(_) => "invalid_answer",
            Failure::TimedOut => "timeout",
            Failure::Declined => "declined",
            Failure::ClientGone => "client_gone",
            Failure::ClientBroke => "client_broke",
        }
    }

    /// No connection came about, so the backend has not seen the request.
    pub fn is_of_connecting(self) -> bool {
        matches!(
            self,
            Failure::Refused | Failure::ConnectTimedOut | Failure::Unreachable | Failure::Stopped | Failure::Shortage
        )
    }

    /// Why an answer that had begun was cut: one of [`crate::telemetry::metrics::CUT_REASONS`].
    pub fn cut_reason(self) -> &'static str {
        match self {
            Failure::Stopped => "stopped",
            Failure::InvalidAnswer(_) => "framing",
            Failure::TimedOut => "silent",
            Failure::ClientGone | Failure::ClientBroke => "request",
            _ => "ended",
        }
    }

    /// Why a second attempt is made after this, for the metrics.
    pub fn retry(self) -> Retry {
        match self {
            Failure::TimedOut => Retry::TimedOut,
            failure if failure.is_of_connecting() => Retry::Connect,
            _ => Retry::Ended,
        }
    }

    /// What the status page says of the backend; nothing of what was not its fault.
    pub fn trouble(self, stage: Stage) -> Option<Trouble> {
        Some(match (self, stage) {
            (Failure::Refused, _) => Trouble::Refused,
            (Failure::ConnectTimedOut, _) => Trouble::ConnectTimedOut,
            (Failure::Unreachable, _) => Trouble::Unreachable,
            (Failure::Ended | Failure::TimedOut, Stage::Answered) => Trouble::BrokeOff,
            (Failure::InvalidAnswer(why), Stage::Answered) => Trouble::BadFraming(why),
            (Failure::Ended, _) => Trouble::Ended,
            (Failure::InvalidAnswer(why), _) => Trouble::Nonsense(why),
            (Failure::TimedOut, _) => Trouble::TimedOut,
            // The status of a declined request tells more.
            (Failure::Stopped | Failure::Shortage | Failure::Declined, _) => return None,
            (Failure::ClientGone | Failure::ClientBroke, _) => return None,
        })
    }

    /// What the client is told when nothing more can be tried. `limit`: the time that the backend had, and the variable
    /// that says so.
    pub fn error(
        self,
        stage: Stage,
        backend: &str,
        attempts: u32,
        limit: Option<(Duration, &'static str)>,
    ) -> ProxyError {
        let backend = backend.to_owned();
        let what = match (self, limit) {
            (Failure::Shortage, _) => return ProxyError::Shortage,
            (Failure::InvalidAnswer(why), _) => return ProxyError::BadAnswer { backend, why, attempts },
            (Failure::TimedOut, Some((limit, knob))) => return ProxyError::BackendTimeout { backend, limit, knob },
            (Failure::Refused, _) => "refused the connection",
            (Failure::ConnectTimedOut, _) => "did not accept the connection in time",
            (Failure::Unreachable, _) => "could not be reached",
            (Failure::Stopped, _) => "was stopped",
            (Failure::Ended, _) if stage == Stage::Begun => "closed the connection within the head of its answer",
            _ => "closed the connection before it answered",
        };
        ProxyError::Backend { backend, what, attempts }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Failure {
        match error {
            ConnectError::Refused => Failure::Refused,
            ConnectError::TimedOut => Failure::ConnectTimedOut,
            ConnectError::Unreachable => Failure::Unreachable,
            ConnectError::Shortage => Failure::Shortage,
            ConnectError::Cut => Failure::Stopped,
        }
    }
}

// === what bytes and statuses mean ===

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

    const ALL: Left = Left { can_replay: true, can_relieve: true, may_go_elsewhere: true, may_await_news: true };
    const STAGES: [Stage; 4] =
        [Stage::Unanswered { reused: false }, Stage::Unanswered { reused: true }, Stage::Begun, Stage::Answered];
    const FAILURES: [Failure; 11] = [
        Failure::Refused,
        Failure::ConnectTimedOut,
        Failure::Unreachable,
        Failure::Stopped,
        Failure::Shortage,
        Failure::Ended,
        Failure::InvalidAnswer("why"),
        Failure::TimedOut,
        Failure::Declined,
        Failure::ClientGone,
        Failure::ClientBroke,
    ];

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
    fn the_policy() {
        let fresh = Stage::Unanswered { reused: false };
        let reused = Stage::Unanswered { reused: true };
        let failed = Lesson::Failure;
        for (failure, stage, can_replay, next, lesson) in [
            (Failure::Refused, fresh, true, Next::Elsewhere, failed),
            (Failure::ConnectTimedOut, fresh, true, Next::Elsewhere, failed),
            (Failure::Unreachable, fresh, true, Next::Elsewhere, failed),
            (Failure::Stopped, fresh, true, Next::Elsewhere, Lesson::None),
            (Failure::Stopped, Stage::Answered, true, Next::Cut, Lesson::None),
            (Failure::Shortage, fresh, true, Next::Relieve, Lesson::None),
            (Failure::Ended, reused, true, Next::SendAgain, Lesson::None),
            (Failure::Ended, reused, false, Next::Fail, Lesson::None),
            (Failure::Ended, fresh, true, Next::Elsewhere, failed),
            (Failure::Ended, fresh, false, Next::Fail, failed),
            (Failure::Ended, Stage::Begun, true, Next::Fail, failed),
            (Failure::Ended, Stage::Answered, true, Next::Cut, failed),
            (Failure::InvalidAnswer("why"), fresh, true, Next::Fail, failed),
            (Failure::InvalidAnswer("why"), Stage::Begun, true, Next::Fail, failed),
            (Failure::InvalidAnswer("why"), Stage::Answered, false, Next::Cut, failed),
            (Failure::TimedOut, fresh, true, Next::Elsewhere, failed),
            (Failure::TimedOut, reused, true, Next::Elsewhere, failed),
            (Failure::TimedOut, fresh, false, Next::Fail, failed),
            (Failure::TimedOut, Stage::Begun, true, Next::Fail, failed),
            (Failure::TimedOut, Stage::Answered, false, Next::Cut, failed),
            (Failure::Declined, Stage::Begun, true, Next::ElsewhereAtOnce, Lesson::None),
            (Failure::Declined, Stage::Begun, false, Next::Pass, Lesson::None),
            (Failure::Declined, Stage::Answered, true, Next::Pass, Lesson::None),
            (Failure::ClientBroke, fresh, true, Next::Refuse, Lesson::None),
            (Failure::ClientBroke, Stage::Answered, true, Next::Cut, Lesson::None),
            (Failure::ClientGone, fresh, true, Next::Abandon, Lesson::None),
            (Failure::ClientGone, Stage::Answered, true, Next::Abandon, Lesson::None),
        ] {
            let left = Left { can_replay, ..ALL };
            assert_eq!(judge(failure, stage, left), (next, lesson), "{failure:?} {stage:?} {can_replay}");
            assert!(lesson == Lesson::None || failure.trouble(stage).is_some(), "{failure:?} must have a name");
            let without = |left: Left| judge(failure, stage, Left { can_replay, ..left }).0;
            let unrelieved = if next == Next::Relieve { Next::Fail } else { next };
            assert_eq!(without(Left { can_relieve: false, ..ALL }), unrelieved, "{failure:?}");
            // Where no other replica may be asked, only old news about all of them is worth a moment.
            let alone = match next {
                Next::Elsewhere if failure.is_of_connecting() => Next::AwaitNews,
                Next::Elsewhere => Next::Fail,
                Next::ElsewhereAtOnce => Next::Pass,
                next => next,
            };
            assert_eq!(without(Left { may_go_elsewhere: false, ..ALL }), alone, "{failure:?} {stage:?}");
            let last = if alone == Next::AwaitNews { Next::Fail } else { alone };
            let nothing_left = Left { may_go_elsewhere: false, may_await_news: false, ..ALL };
            assert_eq!(without(nothing_left), last, "{failure:?} {stage:?}");
        }
    }

    #[test]
    fn nothing_is_sent_twice_once_an_answer_has_begun_or_the_client_has_gone() {
        for failure in FAILURES.into_iter().filter(|failure| !failure.is_of_connecting()) {
            for stage in STAGES {
                for can_replay in [false, true] {
                    let next = judge(failure, stage, Left { can_replay, ..ALL }).0;
                    let again = matches!(next, Next::SendAgain | Next::Elsewhere | Next::ElsewhereAtOnce);
                    let may = can_replay
                        && match failure {
                            Failure::Ended | Failure::TimedOut => matches!(stage, Stage::Unanswered { .. }),
                            // Its answer is held back until it is clear that no other replica gives a better one.
                            Failure::Declined => stage != Stage::Answered,
                            _ => false,
                        };
                    assert_eq!(again, may, "{failure:?} {stage:?} {can_replay}");
                    assert_ne!(next, Next::AwaitNews, "{failure:?}: the backend has seen the request");
                }
            }
        }
    }

    #[test]
    fn words_are_different_and_errors_say_whose_fault_it_was() {
        let words: std::collections::BTreeSet<&str> = FAILURES.iter().map(|failure| failure.word()).collect();
        assert_eq!(words.len(), FAILURES.len());
        let limit = Some((Duration::from_secs(5), "PROXY_FIRST_BYTE_TIMEOUT"));
        for (failure, stage, code) in [
            (Failure::Refused, STAGES[0], "backend_error"),
            (Failure::Stopped, STAGES[0], "backend_error"),
            (Failure::Ended, Stage::Begun, "backend_error"),
            (Failure::InvalidAnswer("why"), Stage::Begun, "backend_error"),
            (Failure::TimedOut, STAGES[1], "backend_timeout"),
            (Failure::Shortage, STAGES[0], "proxy_shortage"),
        ] {
            assert_eq!(failure.error(stage, "b", 1, limit).code(), code, "{failure:?}");
        }
        for failure in FAILURES {
            assert!(crate::telemetry::metrics::CUT_REASONS.contains(&failure.cut_reason()), "{failure:?}");
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
