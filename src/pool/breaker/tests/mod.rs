use super::{
    push_back::{PUSH_BACK_MIN_MS, PUSH_BACK_MS},
    *,
};

const SUCCESS: Outcome = Outcome::Success;
const FAILURE: Outcome = Outcome::Failure;
const ABANDONED: Outcome = Outcome::Abandoned;
const BUSY: Outcome = Outcome::PushBack { of_all: true, retry_after: None };

fn busy_for(ms: u64) -> Outcome {
    Outcome::PushBack { of_all: true, retry_after: Some(Duration::from_millis(ms)) }
}

/// A breaker with a clock that is set by hand.
struct Bench {
    breaker: CircuitBreaker,
    born: Instant,
    now_ms: u64,
}

impl Bench {
    fn new() -> Bench {
        let born = Instant::now();
        Bench { breaker: CircuitBreaker::new(born), born, now_ms: 0 }
    }

    fn now(&self) -> Instant {
        self.born + Duration::from_millis(self.now_ms)
    }

    fn enter(&self) -> Result<Pass, Resting> {
        self.breaker.enter(self.now())
    }

    fn learn(&self, pass: Pass, outcome: Outcome) -> Option<(State, State)> {
        self.breaker.learn(pass, outcome, self.now()).map(|t| (t.from, t.to))
    }

    /// One attempt that must be let in.
    fn attempt(&self, outcome: Outcome) -> Option<(State, State)> {
        let pass = self.enter().unwrap_or_else(|r| panic!("at {} ms it rests for {r:?}", self.now_ms));
        self.learn(pass, outcome)
    }

    /// As often as trips it.
    fn fail_often(&self) {
        for _ in 0..5 {
            self.attempt(FAILURE);
        }
    }

    fn state(&self) -> State {
        self.breaker.state()
    }

    fn ready_in_ms(&self) -> u128 {
        let ready_in = self.breaker.ready_in(self.now());
        let rest = self.rest_ms();
        assert_eq!(self.breaker.is_resting(self.now()), !ready_in.is_zero() || rest > 0);
        ready_in.as_millis()
    }

    /// For how long others had better go elsewhere, by push-backs alone.
    fn rest_ms(&self) -> u128 {
        self.breaker.push_backs.rest(self.breaker.clock_ms(self.now())).as_millis()
    }

    /// Open as of now, for a second.
    fn tripped() -> Bench {
        let bench = Bench::new();
        bench.fail_often();
        assert_eq!((bench.state(), bench.ready_in_ms()), (State::Open, 1_000));
        bench
    }
}

/// `s` and `f` are outcomes, `b` a push-back, `a` an abandonment, `<` the next five seconds.
fn play(bench: &mut Bench, script: &str) {
    for c in script.chars() {
        match c {
            's' => _ = bench.attempt(SUCCESS),
            'f' => _ = bench.attempt(FAILURE),
            'a' => _ = bench.attempt(ABANDONED),
            'b' => {
                bench.attempt(busy_for(0));
                bench.now_ms += PUSH_BACK_MIN_MS;
            }
            '<' => bench.now_ms += HALF_MS,
            _ => panic!("{c}"),
        }
    }
}

#[test]
fn what_trips_it_and_what_does_not() {
    let halves = |n: usize| "sf".repeat(n);
    for (script, state) in [
        // In a row.
        ("ffff".to_owned(), State::Closed),
        ("fffff".to_owned(), State::Open),
        ("ffffsffff".to_owned(), State::Closed),
        ("ffffaf".to_owned(), State::Open),
        ("ffffbf".to_owned(), State::Open),
        ("ffffbbbbbbaaaaaa".to_owned(), State::Closed),
        ("ff<<<<fff".to_owned(), State::Open),
        // By ratio: the twentieth attempt decides.
        (halves(9) + "s", State::Closed),
        (halves(10), State::Open),
        (halves(9) + "bababab", State::Closed),
        // A success trips nothing: half of twenty are failures, but the last of them is not.
        ("fs".repeat(10), State::Closed),
        ("fs".repeat(10) + "f", State::Open),
        ("s".repeat(11) + "fffsfffsff", State::Closed),
        ("s".repeat(10) + "ffffsffffsffff", State::Open),
        // The window: five to ten seconds.
        (halves(9) + "<" + &halves(1), State::Open),
        (halves(9) + "<<" + &halves(9), State::Closed),
        ("s".repeat(25) + "<" + &"ffffs".repeat(4) + "f", State::Closed),
        ("s".repeat(25) + "<<" + &"ffffs".repeat(4) + "f", State::Open),
        // Any number of successes does not hide a backend that fails from then on.
        ("s".repeat(1_000) + &"ffffs".repeat(7), State::Closed),
        ("s".repeat(1_000) + &"ffffs".repeat(7) + "f", State::Open),
        ("ssf".repeat(1_000), State::Closed),
    ] {
        // By ratio it may trip before the end of the script: then nothing more gets in.
        let mut bench = Bench::new();
        let (all, last) = script.split_at(script.len() - 1);
        for (i, c) in all.char_indices() {
            play(&mut bench, &c.to_string());
            assert_eq!(bench.state(), State::Closed, "{script} trips at its character {i}");
        }
        play(&mut bench, last);
        assert_eq!(bench.state(), state, "{script}");
    }
}

#[test]
fn open_rests_then_admits_one_trial() {
    let mut bench = Bench::tripped();
    for (now_ms, rest_ms) in [(0, 1_000), (1, 999), (999, 1)] {
        bench.now_ms = now_ms;
        assert_eq!(bench.enter().unwrap_err().for_at_least, Duration::from_millis(rest_ms));
    }
    bench.now_ms = 1_000;
    assert_eq!((bench.ready_in_ms(), bench.state()), (0, State::Open));
    let trial = bench.enter().unwrap();
    assert!(trial.is_trial());
    assert_eq!((bench.ready_in_ms(), bench.state()), (1_000, State::HalfOpen));
    bench.now_ms = 1_000 + TRIAL_MS - 1_000;
    assert_eq!(bench.enter(), Err(Resting { for_at_least: Duration::from_secs(1) }));
    // Handed back: the next one gets it, at once.
    assert_eq!(bench.learn(trial, ABANDONED), Some((State::HalfOpen, State::Open)));
    let trial = bench.enter().unwrap();
    assert!(trial.is_trial() && bench.enter().is_err());
    assert_eq!(bench.learn(trial, SUCCESS), Some((State::HalfOpen, State::Closed)));
    // Clean: nothing of what was before counts.
    play(&mut bench, "ffff");
    assert_eq!((bench.state(), bench.ready_in_ms()), (State::Closed, 0));
    assert!(!bench.enter().unwrap().is_trial());
    assert_eq!(bench.attempt(FAILURE), Some((State::Closed, State::Open)));
}

#[test]
fn each_failed_trial_makes_the_next_rest_longer() {
    let mut bench = Bench::tripped();
    for rest_ms in [2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000] {
        bench.now_ms += bench.ready_in_ms() as u64;
        assert_eq!(bench.attempt(FAILURE), Some((State::HalfOpen, State::Open)));
        assert_eq!(bench.ready_in_ms(), rest_ms);
    }
}

#[test]
fn closed_takes_back_one_doubling_in_five_seconds() {
    // 16 s is the fifth rest.
    for (closed_for_ms, rest_ms) in [(0, 16_000), (5_000, 8_000), (10_000, 4_000), (20_000, 1_000), (600_000, 1_000)] {
        for traffic in [false, true] {
            let mut bench = Bench::tripped();
            for _ in 0..4 {
                bench.now_ms += bench.ready_in_ms() as u64;
                bench.attempt(FAILURE);
            }
            // Halves of the window begin at multiples of their length.
            bench.now_ms = (bench.now_ms + bench.ready_in_ms() as u64).next_multiple_of(HALF_MS);
            bench.attempt(SUCCESS);
            let until_ms = bench.now_ms + closed_for_ms;
            while bench.now_ms < until_ms {
                bench.now_ms = if traffic { bench.now_ms + 2_500 } else { until_ms };
                bench.attempt(SUCCESS);
            }
            bench.fail_often();
            assert_eq!((bench.state(), bench.ready_in_ms()), (State::Open, rest_ms), "closed for {closed_for_ms} ms");
        }
    }
}

#[test]
fn a_push_back_rests_for_as_long_as_it_says_and_bars_nobody() {
    for (outcome, rest_ms) in [
        (BUSY, 250_u64),
        (busy_for(0), 50),
        (busy_for(50), 50),
        (busy_for(1_500), 1_500),
        (busy_for(10_000), 10_000),
        (busy_for(10_001), 10_000),
        (Outcome::PushBack { of_all: true, retry_after: Some(Duration::MAX) }, 10_000),
        (Outcome::PushBack { of_all: false, retry_after: Some(Duration::MAX) }, 0),
    ] {
        let mut bench = Bench::new();
        assert_eq!(bench.attempt(outcome), None);
        for now_ms in [0, rest_ms.saturating_sub(1), rest_ms] {
            bench.now_ms = now_ms;
            assert_eq!((bench.state(), bench.ready_in_ms()), (State::Closed, 0));
            assert_eq!(bench.rest_ms(), u128::from(rest_ms - now_ms));
            assert!((0..10).all(|_| !bench.enter().unwrap().is_trial()));
        }
    }
}

#[test]
fn a_shorter_push_back_does_not_end_a_longer_one_and_a_success_does() {
    let bench = Bench::new();
    bench.attempt(busy_for(2_000));
    bench.attempt(busy_for(100));
    assert_eq!(bench.rest_ms(), 2_000);
    bench.breaker.has_served();
    assert_eq!(bench.rest_ms(), 0);
}

#[test]
fn a_lost_trial_is_handed_back_and_has_no_say_any_more() {
    for outcome in [SUCCESS, FAILURE, ABANDONED, BUSY] {
        let mut bench = Bench::tripped();
        bench.now_ms = 1_000;
        let lost = bench.enter().unwrap();
        bench.now_ms += TRIAL_MS - 1;
        assert!(lost.is_trial() && bench.enter().is_err());
        assert_eq!(bench.ready_in_ms(), 1, "it need not be waited for any longer");
        bench.now_ms += 1;
        let second = bench.enter().unwrap();
        assert!(second.is_trial() && bench.enter().is_err());
        assert_eq!(bench.learn(lost, outcome), None);
        assert_eq!(bench.state(), State::HalfOpen, "{outcome:?} of the lost one");
        assert!(bench.enter().is_err());
        assert_eq!(bench.learn(second, SUCCESS), Some((State::HalfOpen, State::Closed)));
    }
    // One that answers late, but before another one is out, still counts.
    let mut bench = Bench::tripped();
    bench.now_ms = 1_000;
    let late = bench.enter().unwrap();
    bench.now_ms += 10 * TRIAL_MS;
    assert_eq!(bench.learn(late, SUCCESS), Some((State::HalfOpen, State::Closed)));
}

#[test]
fn a_trial_that_is_pushed_back_closes_and_rests() {
    let mut bench = Bench::tripped();
    bench.now_ms = 1_000;
    assert_eq!(bench.attempt(busy_for(3_000)), Some((State::HalfOpen, State::Closed)));
    assert_eq!((bench.ready_in_ms(), bench.rest_ms()), (0, 3_000));
    bench.now_ms = 4_000;
    // It has not made the rest of the breaker longer.
    bench.fail_often();
    assert_eq!(bench.ready_in_ms(), 1_000);
}

#[test]
fn a_push_back_makes_no_opening_longer() {
    for push_back_ms in [300, 5_000] {
        let mut bench = Bench::new();
        let late = bench.enter().unwrap();
        bench.fail_often();
        assert_eq!(bench.learn(late, busy_for(push_back_ms)), None);
        assert_eq!((bench.state(), bench.ready_in_ms()), (State::Open, 1_000));
        assert_eq!(bench.enter().unwrap_err().for_at_least.as_millis(), 1_000);
        bench.now_ms = 1_000;
        assert!(bench.enter().unwrap().is_trial());
    }
}

#[test]
fn who_answers_late_changes_nothing() {
    for outcome in [SUCCESS, FAILURE, ABANDONED, BUSY] {
        // Of the closed period, while open, half-open, and closed again.
        let mut bench = Bench::new();
        let [open, half_open, closed] = [(); 3].map(|()| bench.enter().unwrap());
        bench.fail_often();
        let check = |bench: &mut Bench, pass: Pass, state: State| {
            let before = bench.breaker.breaker();
            assert_eq!(bench.learn(pass, outcome), None);
            assert_eq!((bench.breaker.breaker(), bench.state()), (before, state), "{outcome:?}");
            // If it has pushed back, that is honoured.
            bench.now_ms += PUSH_BACK_MS;
        };
        check(&mut bench, open, State::Open);
        bench.now_ms = 1_000;
        let trial = bench.enter().unwrap();
        check(&mut bench, half_open, State::HalfOpen);
        bench.learn(trial, SUCCESS);
        play(&mut bench, "ffff");
        check(&mut bench, closed, State::Closed);
        // A trial and a forced attempt of an earlier opening, during a later one.
        let mut bench = Bench::tripped();
        let forced = [(); 2].map(|()| bench.breaker.force(bench.now()));
        bench.now_ms = 1_000;
        let trial = bench.enter().unwrap();
        assert_eq!(bench.learn(forced[0], SUCCESS), Some((State::HalfOpen, State::Closed)));
        check(&mut bench, trial, State::Closed);
        bench.fail_often();
        check(&mut bench, trial, State::Open);
        bench.now_ms += 1_000;
        let later = bench.enter().unwrap();
        check(&mut bench, trial, State::HalfOpen);
        check(&mut bench, forced[1], State::HalfOpen);
        assert_eq!(bench.learn(later, FAILURE), Some((State::HalfOpen, State::Open)));
        check(&mut bench, trial, State::Open);
    }
}

#[test]
fn what_is_forced_upon_a_resting_backend_counts() {
    type Case = (u64, bool, Outcome, Option<(State, State)>, State, u128);
    let (closed, open, half) = (State::Closed, State::Open, State::HalfOpen);
    // When it answers, whether a trial is out then, how; what changes, what is then, and for how long it rests.
    let cases: [Case; 11] = [
        (500, false, SUCCESS, Some((open, closed)), closed, 0),
        (500, false, BUSY, Some((open, closed)), closed, 0),
        (500, false, FAILURE, None, open, 500),
        (500, false, ABANDONED, None, open, 500),
        (1_500, false, SUCCESS, Some((open, closed)), closed, 0),
        (1_500, false, FAILURE, None, open, 2_000),
        (1_500, false, ABANDONED, None, open, 0),
        (1_500, true, SUCCESS, Some((half, closed)), closed, 0),
        (1_500, true, BUSY, Some((half, closed)), closed, 0),
        (1_500, true, FAILURE, None, half, 1_000),
        (1_500, true, ABANDONED, None, half, 1_000),
    ];
    for (now_ms, trial, outcome, change, state, rest_ms) in cases {
        let mut bench = Bench::tripped();
        let forced = bench.breaker.force(bench.now());
        assert!(!forced.is_trial());
        bench.now_ms = now_ms;
        let trial = trial.then(|| bench.breaker.force(bench.now()));
        assert!(trial.is_none_or(Pass::is_trial), "what may be the trial is the trial");
        assert_eq!(bench.learn(forced, outcome), change, "{outcome:?} at {now_ms} ms");
        assert_eq!((bench.state(), bench.ready_in_ms()), (state, rest_ms), "{outcome:?} at {now_ms} ms");
    }
    // In spite of a push-back.
    let bench = Bench::new();
    bench.attempt(BUSY);
    let forced = [(); 5].map(|()| bench.breaker.force(bench.now()));
    for pass in forced {
        bench.learn(pass, FAILURE);
    }
    assert_eq!(bench.state(), State::Open);
}

#[test]
fn the_clock_stops_after_years_and_never_goes_back() {
    let year_ms = 365 * 24 * 3_600_000_u64;
    let mut bench = Bench::new();
    for years in [0, 1, 5, 20, 22, 100, 1_000] {
        bench.now_ms = years * year_ms;
        let now_ms = bench.breaker.clock_ms(bench.now());
        assert!(now_ms == bench.now_ms || (years > 21 && now_ms == CLOCK_MAX_MS));
        bench.fail_often();
        assert_eq!(bench.state(), State::Open);
        // At the end of the clock there is no waiting any more, and still no more than one trial.
        assert_eq!(bench.ready_in_ms(), if years > 21 { 0 } else { 1_000 });
        bench.now_ms += 1_000;
        let trial = bench.enter().unwrap();
        assert!(trial.is_trial() && bench.enter().is_err());
        bench.learn(trial, SUCCESS);
        assert_eq!(bench.state(), State::Closed);
    }
    // Before its birth, too: another thread has read the clock earlier.
    assert_eq!(bench.breaker.clock_ms(bench.born - Duration::from_secs(1)), 0);
    bench.breaker.learn(bench.enter().unwrap(), FAILURE, bench.born);
    assert_eq!(bench.state(), State::Closed);
}

#[test]
fn periods_may_repeat_without_harm() {
    let mut bench = Bench::tripped();
    for _ in 0..5_000 {
        bench.now_ms += bench.ready_in_ms() as u64;
        let trial = bench.enter().unwrap();
        assert!(trial.is_trial() && bench.enter().is_err());
        assert!(bench.learn(trial, if bench.now_ms.is_multiple_of(3) { SUCCESS } else { FAILURE }).is_some());
        if bench.state() == State::Closed {
            bench.fail_often();
        }
        assert_eq!(bench.state(), State::Open);
    }
}

#[test]
fn half_open_admits_one_while_eight_threads_race() {
    use std::sync::{Barrier, Mutex, atomic::AtomicUsize};
    const ROUNDS: u64 = 10;
    let born = Instant::now();
    let breaker = CircuitBreaker::new(born);
    let (out, handed_back) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let kept: Mutex<Vec<Pass>> = Mutex::default();
    // Who panics while others wait at the barrier makes them wait for ever.
    let wrong: Mutex<Vec<String>> = Mutex::default();
    let expect = |right: bool, what: String| {
        if !right {
            wrong.lock().unwrap().push(what);
        }
    };
    let barrier = Barrier::new(8);
    let race = |thread: usize| {
        for round in 0..ROUNDS {
            let now = born + Duration::from_secs(round * 100);
            if thread == 0 {
                for _ in 0..5 {
                    breaker.learn(breaker.force(now), FAILURE, now);
                }
                expect(breaker.state() == State::Open, format!("round {round}: not open"));
            }
            barrier.wait();
            let now = now + Duration::from_secs(60);
            // Who gets the trial hands it back, and the next one gets it.
            for turn in 0..20_000 {
                let Ok(pass) = breaker.enter(now) else { continue };
                let others = out.fetch_add(1, Ordering::SeqCst);
                let is_alone = pass.is_trial() && others == 0 && breaker.state() == State::HalfOpen;
                expect(is_alone, format!("round {round}: {pass:?} beside {others} others"));
                // Seldom: on a busy machine, whoever yields waits for everybody else's time slice.
                if turn % 256 == 0 {
                    std::thread::yield_now();
                }
                out.fetch_sub(1, Ordering::SeqCst);
                handed_back.fetch_add(1, Ordering::Relaxed);
                breaker.learn(pass, ABANDONED, now);
            }
            barrier.wait();
            // Who gets it keeps it.
            kept.lock().unwrap().extend(breaker.enter(now).ok());
            if barrier.wait().is_leader() {
                let kept = std::mem::take(&mut *kept.lock().unwrap());
                expect(matches!(kept[..], [pass] if pass.is_trial()), format!("round {round}: {kept:?}"));
                for pass in kept {
                    breaker.learn(pass, SUCCESS, now);
                }
            }
            barrier.wait();
        }
    };
    let race = &race;
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || race(thread));
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} times, first {}", wrong.len(), wrong[0]);
    assert!(handed_back.into_inner() as u64 >= ROUNDS);
}

mod histories;
