//! The state machine: single histories that matter, and random ones that must keep the rules.

use proptest::prelude::*;

use super::{Effect::*, *};
use crate::control::discovery::Obstacle;

fn obstacle(what: &str) -> Obstacle {
    Obstacle { what: what.to_owned(), advice: "change it".to_owned() }
}

const DRAIN: Duration = Duration::from_secs(30);
const GRACE: Duration = Duration::from_secs(10);

const OK: Event = Event::Seen(Ok(()));
const UNHEALTHY: Event = Event::Seen(Err(Unfit::HealthFailing));
const STOP: Event = Event::StopNotice { grace: GRACE };
const REFUSED: Event = Event::ProbeFailed { refused: true };
const TIMED_OUT: Event = Event::ProbeFailed { refused: false };

/// A state machine with a clock that stands still until it is told otherwise.
struct Run {
    life: Lifecycle,
    start: Instant,
    now: Instant,
}

impl Run {
    fn found(seen: Result<(), Unfit>) -> Run {
        let (life, _) = Lifecycle::found(seen, DRAIN);
        let now = Instant::now();
        Run { life, start: now, now }
    }

    fn ready() -> Run {
        let mut run = Run::found(Ok(()));
        assert_eq!(run.on(Event::ProbeOk), [Open]);
        run
    }

    fn on(&mut self, event: Event) -> Vec<Effect> {
        self.life.on(event, self.now)
    }

    /// The same this many seconds after the beginning.
    fn at(&mut self, seconds: u64, event: Event) -> Vec<Effect> {
        self.now = self.start + Duration::from_secs(seconds);
        self.on(event)
    }

    fn deadline_s(&self) -> Option<u64> {
        self.life.deadline().map(|at| (at - self.start).as_secs())
    }
}

#[test]
fn only_what_is_fit_is_probed_and_only_an_answer_makes_it_ready() {
    assert_eq!(Lifecycle::found(Ok(()), DRAIN).1, [StartProbing]);
    let (life, effects) = Lifecycle::found(Err(Unfit::HealthStarting), DRAIN);
    assert_eq!((life.state(), effects), (&State::Discovered(Unfit::HealthStarting), vec![]));

    let mut run = Run::found(Err(Unfit::HealthStarting));
    assert_eq!(run.on(Event::ProbeOk), [], "nobody asked");
    assert_eq!(run.on(UNHEALTHY), []);
    assert_eq!(run.life.state(), &State::Discovered(Unfit::HealthFailing));
    assert_eq!(run.on(OK), [StartProbing], "its health check alone makes nothing ready");
    assert_eq!(run.on(OK), [], "it is being asked already");
    for failed in [REFUSED, TIMED_OUT] {
        assert_eq!(run.on(failed), [], "a model load takes as long as it takes");
    }
    assert_eq!(run.on(Event::ProbeOk), [Open]);
    assert_eq!(run.life.state(), &State::Ready);
    assert_eq!(run.on(Event::ProbeOk), [], "a refresh");
    assert_eq!(run.life.deadline(), None);
}

#[test]
fn unhealthy_keeps_what_is_in_flight_until_one_deadline() {
    let mut run = Run::ready();
    assert_eq!(run.at(5, UNHEALTHY), [Close, StopProbing]);
    assert_eq!(run.deadline_s(), Some(35));
    // Said again, or for another reason: the time that was promised stays as it is.
    assert_eq!(run.at(20, UNHEALTHY), [StopProbing]);
    assert_eq!(run.at(25, Event::Seen(Err(Unfit::Restarting))), [StopProbing]);
    assert_eq!(run.deadline_s(), Some(35));
    assert_eq!(run.at(34, Event::Deadline), [], "not yet");
    assert_eq!(run.at(35, Event::Deadline), [Cut]);
    assert_eq!(run.life.state(), &State::Discovered(Unfit::Restarting));
    assert_eq!(run.deadline_s(), None, "cut once, not again and again");
}

#[test]
fn healthy_again_before_the_deadline_serves_long_after_it() {
    let mut run = Run::ready();
    run.at(5, UNHEALTHY);
    assert_eq!(run.at(10, OK), [StartProbing]);
    assert_eq!(run.deadline_s(), None, "the promise to cut is forgotten");
    assert_eq!(run.at(11, Event::ProbeOk), [Open]);
    // A timer that was set before may still fire.
    assert_eq!(run.at(35, Event::Deadline), []);
    assert_eq!(run.at(3_600, Event::Deadline), []);
    assert_eq!(run.life.state(), &State::Ready);
    // The next time counts from the next time.
    run.at(4_000, UNHEALTHY);
    assert_eq!(run.deadline_s(), Some(4_030));
}

#[test]
fn unhealthy_while_probed_again_still_gives_requests_their_time() {
    let mut run = Run::ready();
    run.at(5, UNHEALTHY);
    run.at(10, OK);
    assert_eq!(run.at(12, UNHEALTHY), [Close, StopProbing]);
    assert_eq!(run.deadline_s(), Some(42));
}

#[test]
fn nothing_but_its_end_or_its_grace_ends_draining() {
    let ignored = [
        OK,
        UNHEALTHY,
        Event::Seen(Err(Unfit::Unreachable(obstacle("x")))),
        Event::ProbeOk, // an answer that was on its way
        REFUSED,
        STOP,
        Event::Suspended,
        Event::OutOfMemory,
        Event::Deadline,
    ];
    for event in ignored {
        let mut run = Run::ready();
        assert_eq!(run.on(STOP), [Close, StopProbing]);
        let before = run.life.state().clone();
        assert_eq!(run.at(1, event.clone()), [], "{event:?}");
        assert_eq!(run.life.state(), &before, "{event:?}");
        assert_eq!(run.at(2, Event::Ended), [Close, StopProbing, CutSoon]);
        assert_eq!(run.life.state(), &State::Gone);
    }
}

#[test]
fn an_ignored_stop_notice_is_followed_by_probing() {
    // (its own grace, when requests are cut, when it is asked again)
    for (grace_s, cut_at, again_at) in [(10, 30, 30), (120, 30, 120)] {
        let mut run = Run::ready();
        run.on(Event::StopNotice { grace: Duration::from_secs(grace_s) });
        assert_eq!(run.deadline_s(), Some(cut_at));
        if cut_at < again_at {
            assert_eq!(run.at(cut_at, Event::Deadline), [Cut]);
            assert_eq!(run.deadline_s(), Some(again_at));
            assert_eq!(run.at(again_at - 1, Event::Deadline), [], "it may still be stopping");
            assert_eq!(run.at(again_at, Event::Deadline), [StartProbing]);
        } else {
            assert_eq!(run.at(cut_at, Event::Deadline), [Cut, StartProbing]);
        }
        assert_eq!(run.life.state(), &State::Probing);
        assert_eq!(run.at(again_at + 1, Event::ProbeOk), [Open], "and serves again");
    }
    // The last look before the end of the grace counts.
    let mut run = Run::ready();
    run.on(STOP);
    run.at(5, UNHEALTHY);
    assert_eq!(run.at(30, Event::Deadline), [Cut]);
    assert_eq!(run.life.state(), &State::Discovered(Unfit::HealthFailing));
}

#[test]
fn no_grace_is_too_long_to_be_waited_for() {
    for grace in [FOREVER, FOREVER * 2, Duration::from_secs(i64::MAX as u64), Duration::MAX] {
        for drain_timeout in [DRAIN, Duration::MAX] {
            let (mut life, _) = Lifecycle::found(Ok(()), drain_timeout);
            let now = Instant::now();
            life.on(Event::ProbeOk, now);
            assert_eq!(life.on(Event::StopNotice { grace }, now), [Close, StopProbing]);
            let first = life.deadline().unwrap();
            assert_eq!(first, now + drain_timeout.min(FOREVER), "{grace:?}");
            assert_eq!(life.on(Event::Deadline, first)[0], Cut);
            let (mut life, _) = Lifecycle::found(Ok(()), drain_timeout);
            life.on(Event::ProbeOk, now);
            life.on(UNHEALTHY, now);
            assert!(life.deadline().is_some());
        }
    }
}

#[test]
fn what_may_still_be_loading_is_worth_waiting_for() {
    for (why, is_coming) in [
        (Unfit::HealthStarting, true),
        (Unfit::HealthNeverPassed, true),
        (Unfit::Restarting, true),
        (Unfit::HealthFailing, false),
        (Unfit::NoHealthCheck, false),
        (Unfit::Paused, false),
        (Unfit::Detached, false),
        (Unfit::Unreachable(obstacle("x")), false),
    ] {
        let mut run = Run::found(Err(why.clone()));
        assert_eq!(run.life.is_coming(), is_coming, "{why:?}");
        // The same for one that had been fit to be probed before.
        run.on(OK);
        run.on(Event::Seen(Err(why.clone())));
        assert_eq!(run.life.is_coming(), is_coming, "{why:?}");
    }
}

#[test]
fn paused_is_held_and_never_cut() {
    let mut run = Run::ready();
    assert_eq!(run.on(Event::Suspended), [Close, StopProbing]);
    assert_eq!(run.on(Event::Seen(Err(Unfit::Paused))), [StopProbing]);
    assert_eq!(run.deadline_s(), None);
    assert_eq!(run.at(86_400, Event::Deadline), []);
    // Resumed: its health check is stale and says no; from now on the requests have their time.
    assert_eq!(run.at(90_000, UNHEALTHY), [StopProbing]);
    assert_eq!(run.deadline_s(), Some(90_030));
    assert_eq!(run.at(90_001, OK), [StartProbing]);
    assert_eq!(run.on(Event::ProbeOk), [Open]);
}

#[test]
fn losing_the_network_cuts_at_once_in_every_state() {
    let lost = [Event::Detached, Event::Seen(Err(Unfit::Unreachable(obstacle("no network"))))];
    for (lost, before) in lost.iter().flat_map(|l| [None, Some(UNHEALTHY), Some(Event::Suspended)].map(|b| (l, b))) {
        let mut run = Run::ready();
        before.map(|event| run.on(event));
        assert_eq!(run.on(lost.clone()), [Close, StopProbing, Cut]);
        assert!(matches!(run.life.state(), State::Discovered(Unfit::Detached | Unfit::Unreachable(_))));
        assert_eq!(run.life.deadline(), None);
        assert_eq!(run.on(OK), [StartProbing], "looked up again");
    }
    let mut run = Run::ready();
    run.on(STOP);
    assert_eq!(run.at(1, Event::Detached), [Cut], "also while it drains");
    assert_eq!(run.at(30, Event::Deadline), [StartProbing], "and not twice");
    let mut run = Run::found(Err(Unfit::HealthStarting));
    assert_eq!(run.on(Event::Detached), [], "nothing in flight");
    assert_eq!(run.life.state(), &State::Discovered(Unfit::Detached));
}

#[test]
fn three_refusals_take_a_ready_backend_out_and_time_outs_never_do() {
    let mut run = Run::ready();
    for _ in 0..100 {
        assert_eq!(run.on(TIMED_OUT), []);
    }
    assert_eq!((run.on(REFUSED), run.on(REFUSED)), (vec![], vec![]));
    assert_eq!(run.on(Event::ProbeOk), [], "counts anew");
    assert_eq!((run.on(REFUSED), run.on(TIMED_OUT), run.on(REFUSED)), (vec![], vec![], vec![]));
    assert_eq!(run.at(7, REFUSED), [Close], "probing goes on");
    let why = Unfit::NotAnswering;
    let cut_at = Some(run.start + Duration::from_secs(37));
    assert_eq!(run.life.state(), &State::Unhealthy { why, cut_at });
    assert_eq!(run.on(OK), [], "that it runs is known");
    assert_eq!(run.at(8, Event::ProbeOk), [Open], "back by its own answer, nothing cut");

    for _ in 0..3 {
        run.at(10, REFUSED);
    }
    assert_eq!(run.at(40, Event::Deadline), [Cut]);
    assert_eq!(run.life.state(), &State::Probing);
    assert_eq!(run.at(41, Event::ProbeOk), [Open]);
}

#[test]
fn running_out_of_memory_is_a_question_not_an_answer() {
    let mut run = Run::ready();
    assert_eq!(run.on(Event::OutOfMemory), [ProbeNow]);
    assert_eq!(run.life.state(), &State::Ready);
}

#[test]
fn the_end_is_the_end() {
    let mut run = Run::ready();
    assert_eq!(run.on(Event::Ended), [Close, StopProbing, CutSoon]);
    for event in [OK, Event::ProbeOk, STOP, Event::Detached, Event::Deadline, Event::Ended] {
        assert_eq!(run.at(100, event), []);
    }
    assert_eq!((run.life.state(), run.life.deadline()), (&State::Gone, None));
}

fn seen() -> impl Strategy<Value = Result<(), Unfit>> {
    let unfit = prop_oneof![
        Just(Unfit::HealthStarting),
        Just(Unfit::HealthFailing),
        Just(Unfit::Paused),
        Just(Unfit::Restarting),
        Just(Unfit::Unreachable(obstacle("no way"))),
    ];
    prop_oneof![3 => Just(Ok(())), 2 => unfit.prop_map(Err)]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => seen().prop_map(Event::Seen),
        2 => (0..90_u64).prop_map(|s| Event::StopNotice { grace: Duration::from_secs(s) }),
        1 => Just(Event::Suspended),
        1 => Just(Event::Detached),
        1 => Just(Event::OutOfMemory),
        8 => Just(Event::ProbeOk),
        6 => any::<bool>().prop_map(|refused| Event::ProbeFailed { refused }),
        5 => Just(Event::Deadline),
        1 => Just(Event::Ended),
    ]
}

/// The world after all effects so far, as their executor would have it.
#[derive(Default)]
struct World {
    open: bool,
    probing: bool,
}

impl World {
    fn apply(&mut self, event: Option<&Event>, effects: &[Effect], after: &Lifecycle) {
        for effect in effects {
            match effect {
                StartProbing => {
                    assert!(!self.probing, "probing begins twice");
                    self.probing = true;
                }
                StopProbing => self.probing = false,
                ProbeNow => assert!(self.probing, "nobody is there to ask"),
                Open => {
                    assert_eq!(event, Some(&Event::ProbeOk), "opened without an answer");
                    assert!(self.probing && !self.open);
                    self.open = true;
                }
                Close => self.open = false,
                Cut | CutSoon => assert!(!self.open, "cut while new requests may enter"),
            }
        }
        assert_eq!(self.open, *after.state() == State::Ready, "{:?}", after.state());
        let asks = match after.state() {
            State::Probing | State::Ready => true,
            State::Unhealthy { why, .. } => *why == Unfit::NotAnswering,
            State::Discovered(_) | State::Draining { .. } | State::Gone => false,
        };
        assert_eq!(self.probing, asks, "{:?}", after.state());
        match after.state() {
            State::Unhealthy { why, .. } if *why != Unfit::Paused => assert!(after.deadline().is_some()),
            State::Draining { .. } => assert!(after.deadline().is_some()),
            State::Unhealthy { .. } => {}
            State::Discovered(_) | State::Probing | State::Ready | State::Gone => {
                assert_eq!(after.deadline(), None);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_history_keeps_the_rules(
        first in seen(),
        history in prop::collection::vec((0..40_u64, event()), 1..40),
    ) {
        let (mut life, effects) = Lifecycle::found(first, DRAIN);
        let mut world = World::default();
        world.apply(None, &effects, &life);
        let mut now = Instant::now();
        for (pause, event) in history {
            now += Duration::from_secs(pause);
            let before = life.clone();
            let effects = life.on(event.clone(), now);
            world.apply(Some(&event), &effects, &life);

            if let (State::Draining { grace_ends, .. }, false) =
                (before.state(), matches!(life.state(), State::Draining { .. }))
            {
                let over = event == Event::Deadline && *grace_ends <= now;
                prop_assert!(over || event == Event::Ended, "{event:?} ended draining");
            }
            if let State::Gone = before.state() {
                prop_assert!(*life.state() == State::Gone && effects.is_empty());
            }
            if event == Event::Deadline {
                // Otherwise the registry would be woken again at once, for ever.
                prop_assert!(life.deadline().is_none_or(|at| at > now));
                let due = before.deadline().is_some_and(|at| at <= now);
                prop_assert_eq!(due, life.state() != before.state() || !effects.is_empty(), "{:?}", before);
            }
            // A promise to cut is moved only by becoming fit, never by being unfit once more.
            if let (State::Unhealthy { cut_at: Some(old), .. }, State::Unhealthy { cut_at, .. }) =
                (before.state(), life.state())
            {
                prop_assert_eq!(*cut_at, Some(*old));
            }
            if let (State::Draining { grace_ends: old, .. }, State::Draining { grace_ends, .. }) =
                (before.state(), life.state())
            {
                prop_assert_eq!(grace_ends, old);
            }
        }
    }
}
