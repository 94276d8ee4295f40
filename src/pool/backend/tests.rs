use super::*;
use futures::FutureExt as _;

pub(crate) fn member(name: &str, weight: u32, max_inflight: Option<u32>) -> Arc<Member> {
    let spec = BackendSpec {
        id: name.into(),
        name: name.to_owned(),
        image: String::new(),
        addr: ([127, 0, 0, 1], 9).into(),
        base_path: "/v1".to_owned(),
        weight: NonZeroU32::new(weight).unwrap(),
        max_inflight: max_inflight.and_then(NonZeroU32::new),
    };
    Member::new(Backend::new(spec, Duration::from_secs(1), 1, Instant::now()), Model::new("m"))
}

#[test]
fn closed_lets_nobody_in_and_counts_who_is_still_there() {
    let member = member("a", 1, None);
    let first = member.try_acquire(Instant::now()).unwrap();
    member.backend.close();
    assert_eq!(member.try_acquire(Instant::now()).unwrap_err(), Refused::Closed);
    assert_eq!(member.backend.in_flight(), 1);
    assert!(member.backend.drained().now_or_never().is_none());
    drop(first);
    assert_eq!((member.backend.in_flight(), member.in_flight()), (0, 0));
    assert!(member.backend.drained().now_or_never().is_some());
    member.backend.reopen();
    assert!(member.try_acquire(Instant::now()).is_ok());
}

#[test]
fn full_is_not_closed() {
    let member = member("a", 1, Some(2));
    let one = member.try_acquire(Instant::now()).unwrap();
    let _two = member.try_acquire(Instant::now()).unwrap();
    assert_eq!(member.try_acquire(Instant::now()).unwrap_err(), Refused::Full);
    drop(one);
    assert!(member.try_acquire(Instant::now()).is_ok());
}

#[test]
fn no_request_enters_after_close_under_contention() {
    let member = member("a", 1, None);
    let closed = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    let was_closed = closed.load(Ordering::SeqCst);
                    let entered = member.try_acquire(Instant::now());
                    assert!(!(was_closed && entered.is_ok()), "a request entered a closed backend");
                }
            });
        }
        scope.spawn(|| {
            member.backend.close();
            closed.store(true, Ordering::SeqCst);
        });
    });
    assert_eq!((member.backend.in_flight(), member.in_flight()), (0, 0));
}

#[tokio::test]
async fn drained_wakes_when_the_last_one_leaves() {
    let member = member("a", 1, None);
    let (first, second) = (member.try_acquire(Instant::now()).unwrap(), member.try_acquire(Instant::now()).unwrap());
    member.backend.close();
    let backend = member.backend.clone();
    let mut waiting = tokio_test_spawn(async move { backend.drained().await });
    drop(first);
    assert!(futures::poll!(&mut waiting).is_pending());
    drop(second);
    assert!(futures::poll!(&mut waiting).is_ready());
}

fn trip(member: &Arc<Member>, now: Instant) {
    for _ in 0..5 {
        member.try_acquire(now).unwrap().failed(Trouble::Ended, now);
    }
    assert_eq!(member.backend.breaker.state(), State::Open);
}

#[test]
fn whoever_waits_is_called_when_a_trial_has_succeeded() {
    let member = member("a", 1, None);
    let now = Instant::now();
    trip(&member, now);
    let later = now + Duration::from_secs(1);
    let mut trial = member.try_acquire(later).unwrap();
    let waiting = member.model.waiting.join(9, crate::pool::waiting::Takes::Any).unwrap();
    member.backend.call_when_free(&member.model);
    assert!(member.try_acquire(later).is_err());
    trial.answered(Outcome::Success, later);
    assert!(waiting.called().now_or_never().is_some(), "there is room, though the trial goes on");
    assert!(member.try_acquire(later).is_ok());
}

#[test]
fn a_trial_that_is_handed_back_is_no_opening() {
    let member = member("a", 1, None);
    let now = Instant::now();
    trip(&member, now);
    for _ in 0..3 {
        drop(member.try_acquire(now + Duration::from_secs(1)).unwrap());
    }
    assert_eq!((member.backend.breaker.state(), member.backend.trips.get()), (State::Open, 1));
    let later = now + Duration::from_secs(1);
    member.try_acquire(later).unwrap().failed(Trouble::Ended, later);
    assert_eq!(member.backend.trips.get(), 2);
}

#[test]
fn a_server_error_is_one_failure_and_not_a_fast_answer() {
    let member = member("a", 1, None);
    let now = Instant::now();
    let ask = || member.try_acquire(now).unwrap().expects(Balance::Ewma, 100, now);
    let mut well = ask();
    well.answered(Outcome::Success, now + Duration::from_millis(100));
    well.first_byte(now + Duration::from_millis(100));
    drop(well);
    let before = member.backend.latency.seconds().unwrap();
    for _ in 0..4 {
        let mut broken = ask();
        broken.failed(Trouble::Status(500), now + Duration::from_millis(1));
        broken.says_nothing_of_pace();
        broken.failed(Trouble::BrokeOff, now + Duration::from_millis(2));
    }
    assert_eq!(member.backend.breaker.state(), State::Closed, "four failures, not eight");
    assert!(member.backend.latency.seconds().unwrap() > 2.0 * before);
}

#[test]
fn a_place_that_was_left_is_left_once() {
    let member = member("a", 1, Some(1));
    let now = Instant::now();
    let mut first = member.try_acquire(now).unwrap().expects(Balance::Ewma, 100, now);
    first.leave();
    assert_eq!((member.backend.latency.waiting_bytes(), member.in_flight()), (0, 0));
    let _second = member.try_acquire(now).unwrap();
    first.leave();
    drop(first);
    assert_eq!((member.backend.in_flight(), member.in_flight()), (1, 1));
}

fn tokio_test_spawn<F: Future>(future: F) -> std::pin::Pin<Box<F>> {
    Box::pin(future)
}
