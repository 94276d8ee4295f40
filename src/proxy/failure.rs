//! What to do when an exchange goes wrong: the failure matrix, as one pure function.
//!
//! Three things decide: what failed, how far the exchange had come, and whether the request can be sent once more. An
//! answer that has begun is never begun again by somebody else, and nothing is retried for a client that has left. What
//! a failure says about the backend's health is part of the same table, because both are judged by the same facts.

use crate::upstream::ConnectError;

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

#[cfg(test)]
mod tests {
    use super::*;

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
