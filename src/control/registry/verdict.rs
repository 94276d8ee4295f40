//! The verdict of a container's health check, drawn from all looks at one run of it. Pure.
//!
//! Only `healthy` and `unhealthy` are verdicts, and the last one stands, because an engine that is restarted goes back to
//! `starting` while its containers run on (Docker ≥ 25 with `live-restore`, moby#47051). Engines may also stop checking
//! without a word (moby#41871). So the registry stops believing a check that has left no mark for too long, and the proxy's
//! own probe decides.

use tokio::time::Instant;

use crate::control::{
    discovery::{Health, HealthCheck},
    lifecycle::Unfit,
};

/// The health of one run, as far as its looks have shown it.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    word: Health,
    /// Whether the last verdict was `healthy`; `None` before the first one.
    last: Option<bool>,
    was_healthy: bool,
    was_ready: bool,
    check: HealthCheck,
    /// Since when the check looks the same; `None` while its silence means nothing.
    since: Option<Instant>,
    is_overdue: bool,
    /// Discovery has been asked to look at the container because the check seemed overdue.
    is_look_asked: bool,
}

/// A change of the health check that people should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HealthNews {
    /// The engine uses a word for the health that the proxy does not know.
    UnknownWord,
    /// The check is overdue.
    Overdue,
    /// An overdue check has ended after all.
    ChecksAgain,
}

// === impl Verdict ===

impl Verdict {
    /// The verdict after the first look at a run.
    pub(super) fn first(word: Health, check: HealthCheck, now: Instant) -> (Verdict, Option<HealthNews>) {
        let mut verdict = Verdict {
            word: Health::None,
            last: None,
            was_healthy: false,
            was_ready: false,
            check,
            since: None,
            is_overdue: false,
            is_look_asked: false,
        };
        let news = verdict.look(word, check, now);
        (verdict, news)
    }

    /// Takes in another look at the same run.
    pub(super) fn look(&mut self, word: Health, check: HealthCheck, now: Instant) -> Option<HealthNews> {
        let is_same = (self.word, self.check.mark) == (word, check.mark);
        let is_new_word = self.word != word;
        self.word = word;
        self.check = check;
        self.is_look_asked = false;
        match word {
            Health::Healthy => (self.last, self.was_healthy) = (Some(true), true),
            Health::Unhealthy => self.last = Some(false),
            Health::None | Health::Unknown | Health::Starting => {}
        }
        let since = *self.since.get_or_insert(now);
        let was_overdue = self.is_overdue;
        if is_same {
            self.is_overdue |= self.may_be_overdue() && now.saturating_duration_since(since) >= check.overdue_after;
        } else {
            (self.since, self.is_overdue) = (Some(now), false);
        }
        match (was_overdue, self.is_overdue) {
            (false, true) => Some(HealthNews::Overdue),
            (true, false) => Some(HealthNews::ChecksAgain),
            _ => (is_new_word && word == Health::Unknown).then_some(HealthNews::UnknownWord),
        }
    }

    /// Notes that the run has become ready.
    pub(super) fn became_ready(&mut self) {
        self.was_ready = true;
    }

    /// Stops the clock of an overdue check, because the engine does not check for now, or the proxy cannot see whether it
    /// does.
    pub(super) fn interrupted(&mut self) {
        self.since = None;
    }

    /// Whether the container has a check at all, or had one.
    fn may_be_overdue(&self) -> bool {
        self.word != Health::None || self.last.is_some()
    }

    /// When another look could find that the check is overdue; `None` unless the check keeps the run from being routed.
    pub(super) fn due_at(&self) -> Option<Instant> {
        let is_held = !self.is_overdue && (self.last == Some(false) || self.starts());
        let since = self.since.filter(|_| is_held && !self.is_look_asked)?;
        since.checked_add(self.check.overdue_after)
    }

    /// Notes that discovery has been asked for a look.
    pub(super) fn look_asked(&mut self) {
        self.is_look_asked = true;
    }

    /// Whether the proxy's own probe decides alone, because the check says nothing that counts.
    pub(super) fn is_own(&self) -> bool {
        self.is_overdue || (self.last.is_none() && !self.starts())
    }

    /// Whether the check should have ended long ago.
    pub(super) fn is_overdue(&self) -> bool {
        self.is_overdue
    }

    /// Whether the run is still starting: it has had no verdict, and has never been ready.
    fn starts(&self) -> bool {
        self.last.is_none() && self.word == Health::Starting && !self.was_ready
    }

    /// Whether the run may be probed. With `is_required`, a run without a health check may not.
    pub(super) fn fitness(&self, is_required: bool) -> Result<(), Unfit> {
        match self.last {
            _ if self.is_overdue => Ok(()),
            Some(true) => Ok(()),
            Some(false) if self.was_ready || self.was_healthy => Err(Unfit::HealthFailing),
            Some(false) => Err(Unfit::HealthNeverPassed),
            None if self.starts() => Err(Unfit::HealthStarting),
            None if self.word == Health::None && is_required && !self.was_ready => Err(Unfit::NoHealthCheck),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const WORDS: [Health; 5] = [Health::None, Health::Unknown, Health::Starting, Health::Healthy, Health::Unhealthy];
    const NO_VERDICTS: [Health; 3] = [Health::None, Health::Unknown, Health::Starting];

    fn check(mark: u64) -> HealthCheck {
        let s = Duration::from_secs;
        HealthCheck { mark, ..HealthCheck::every(s(10), s(5), s(3)) }
    }

    /// A run at which each look finds another check ended.
    struct Run {
        verdict: Verdict,
        now: Instant,
        looks: u64,
    }

    impl Run {
        fn first(word: Health) -> Run {
            let now = Instant::now();
            Run { verdict: Verdict::first(word, check(0), now).0, now, looks: 0 }
        }

        fn ready(word: Health) -> Run {
            let mut run = Run::first(word);
            assert_eq!(run.verdict.fitness(false), Ok(()));
            run.verdict.became_ready();
            run
        }

        fn sees(&mut self, word: Health) -> Result<(), Unfit> {
            self.looks += 1;
            self.verdict.look(word, check(self.looks), self.now);
            self.verdict.fitness(true)
        }

        /// A look this many seconds later, which finds that nothing has happened.
        fn silence(&mut self, seconds: u64) -> Option<HealthNews> {
            self.now += Duration::from_secs(seconds);
            self.verdict.look(self.verdict.word, self.verdict.check, self.now)
        }
    }

    #[test]
    fn the_first_word_decides_what_is_waited_for() {
        for (word, optional, required, own) in [
            (Health::None, Ok(()), Err(Unfit::NoHealthCheck), true),
            (Health::Unknown, Ok(()), Ok(()), true),
            (Health::Starting, Err(Unfit::HealthStarting), Err(Unfit::HealthStarting), false),
            (Health::Healthy, Ok(()), Ok(()), false),
            (Health::Unhealthy, Err(Unfit::HealthNeverPassed), Err(Unfit::HealthNeverPassed), false),
        ] {
            let verdict = Run::first(word).verdict;
            assert_eq!((verdict.fitness(false), verdict.fitness(true)), (optional, required), "{word:?}");
            assert_eq!(verdict.is_own(), own, "{word:?}");
        }
        let now = Instant::now();
        assert_eq!(Verdict::first(Health::Unknown, check(0), now).1, Some(HealthNews::UnknownWord));
        assert_eq!(Verdict::first(Health::Starting, check(0), now).1, None);
    }

    #[test]
    fn no_word_but_a_verdict_changes_anything_for_a_run_that_has_been_ready() {
        for first in [Health::Healthy, Health::Unknown, Health::None] {
            for word in NO_VERDICTS {
                let mut run = Run::ready(first);
                assert_eq!(run.sees(word), Ok(()), "{first:?}, then {word:?}");
                assert_eq!(run.sees(Health::Unhealthy), Err(Unfit::HealthFailing));
                for other in NO_VERDICTS {
                    assert_eq!(run.sees(other), Err(Unfit::HealthFailing), "the last verdict stands at {other:?}");
                }
                assert_eq!(run.sees(Health::Healthy), Ok(()));
                assert_eq!(run.sees(word), Ok(()));
            }
        }
    }

    #[test]
    fn a_run_that_starts_is_waited_for_until_it_is_well() {
        let mut run = Run::first(Health::Starting);
        assert_eq!(run.sees(Health::Starting), Err(Unfit::HealthStarting));
        assert_eq!(run.sees(Health::Unhealthy), Err(Unfit::HealthNeverPassed));
        assert_eq!(run.sees(Health::Starting), Err(Unfit::HealthNeverPassed));
        assert_eq!(run.sees(Health::Healthy), Ok(()));
        assert_eq!(run.sees(Health::Starting), Ok(()), "it has been well, if not ready");
        assert_eq!(run.sees(Health::Unhealthy), Err(Unfit::HealthFailing));
    }

    #[test]
    fn a_check_that_leaves_no_mark_for_too_long_is_replaced() {
        // 2 × interval + timeout + start period
        for word in [Health::Unknown, Health::Starting, Health::Healthy, Health::Unhealthy] {
            let mut run = Run::first(word);
            assert_eq!(run.silence(27), None, "{word:?}");
            assert_eq!(run.silence(1), Some(HealthNews::Overdue), "{word:?}");
            assert_eq!((run.verdict.fitness(true), run.verdict.is_own()), (Ok(()), true), "{word:?}");
            assert_eq!(run.silence(3_600), None, "said once");
            assert_eq!(run.verdict.due_at(), None);
            let verdict = run.sees(Health::Unhealthy);
            assert!(verdict.is_err() && !run.verdict.is_overdue(), "it counts again when it speaks again");
        }
        let mut run = Run::ready(Health::Healthy);
        assert_eq!(run.silence(28), Some(HealthNews::Overdue));
        run.looks += 1;
        assert_eq!(run.verdict.look(Health::Healthy, check(run.looks), run.now), Some(HealthNews::ChecksAgain));

        let mut run = Run::first(Health::None);
        assert_eq!(run.silence(3_600), None, "what is not checked is not overdue");
        assert_eq!(run.verdict.fitness(true), Err(Unfit::NoHealthCheck));
        // A verdict whose check has gone altogether.
        assert_eq!(run.sees(Health::Unhealthy), Err(Unfit::HealthNeverPassed));
        assert_eq!(run.sees(Health::None), Err(Unfit::HealthNeverPassed));
        assert_eq!((run.silence(28), run.verdict.fitness(false)), (Some(HealthNews::Overdue), Ok(())));
    }

    #[test]
    fn checks_that_go_on_are_never_overdue_however_long_they_take_to_pass() {
        let mut run = Run::first(Health::Starting);
        for _ in 0..1_000 {
            run.now += Duration::from_secs(27);
            assert_eq!(run.sees(Health::Starting), Err(Unfit::HealthStarting));
        }
    }

    #[test]
    fn time_without_sight_or_without_checks_does_not_count() {
        let mut run = Run::first(Health::Unhealthy);
        assert_eq!(run.silence(27), None);
        run.verdict.interrupted();
        assert_eq!(run.verdict.due_at(), None);
        assert_eq!(run.silence(3_600), None, "from now on");
        assert_eq!(run.silence(27), None);
        assert_eq!(run.silence(1), Some(HealthNews::Overdue));
    }

    #[test]
    fn a_look_is_due_once_where_a_check_keeps_a_run_out() {
        for (word, is_due) in WORDS.map(|word| (word, matches!(word, Health::Starting | Health::Unhealthy))) {
            let mut run = Run::first(word);
            let due_at = is_due.then(|| run.now + Duration::from_secs(28));
            assert_eq!(run.verdict.due_at(), due_at, "{word:?}");
            run.verdict.look_asked();
            assert_eq!(run.verdict.due_at(), None);
            run.silence(1);
            assert_eq!(run.verdict.due_at(), due_at, "it has been looked at too early");
        }
        assert_eq!(Run::ready(Health::Healthy).verdict.due_at(), None);
    }

    proptest! {
        #[test]
        fn what_has_been_ready_is_taken_out_by_the_last_verdict_and_by_nothing_else(
            first in prop::sample::select(&[Health::None, Health::Unknown, Health::Healthy][..]),
            words in prop::collection::vec(prop::sample::select(&WORDS[..]), 0..30),
        ) {
            let mut run = Run::ready(first);
            let mut expected = Ok(());
            for word in words {
                match word {
                    Health::Healthy => expected = Ok(()),
                    Health::Unhealthy => expected = Err(Unfit::HealthFailing),
                    Health::None | Health::Unknown | Health::Starting => {}
                }
                prop_assert_eq!(run.sees(word), expected.clone());
            }
        }
    }
}
