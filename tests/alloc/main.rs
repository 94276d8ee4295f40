//! What must not allocate. In a binary of its own, because an allocator that counts is there for all of a binary, and
//! with one test, because others beside it would be counted too.

use std::{alloc::System, num::NonZeroU32, time::Duration};

use inference_proxy::{
    base::config::Balance,
    data::balance::{Wanted, claim},
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::time::Instant;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[path = "../bench/pool.rs"]
mod pool;

/// The thread of the test harness allocates for a moment after it has started the test, and the allocator counts it, too.
fn wait_for_the_harness() {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let before = Region::new(COUNTING);
        std::thread::sleep(Duration::from_millis(20));
        let change = before.change();
        if (change.allocations, change.deallocations, change.reallocations) == (0, 0, 0) {
            return;
        }
        assert!(Instant::now() < deadline, "another thread goes on allocating");
    }
}

#[test]
fn choosing_allocates_nothing() {
    wait_for_the_harness();
    let mut rng = fastrand::Rng::with_seed(1);
    let now = Instant::now();
    for size in [1, 2, 8, 64, 200] {
        for policy in [Balance::Ewma, Balance::Least, Balance::RoundRobin, Balance::Prefix] {
            let limits = |i| (NonZeroU32::new(1 + i % 3).unwrap(), NonZeroU32::new(4));
            let members = pool::pool(size, now, limits);
            let tried = [members[0].backend.clone()];
            let mut held = Vec::with_capacity(10_000);
            let before = Region::new(COUNTING);
            // Until all are full and the last ones have been refused.
            for n in 0..size * 4 + 50 {
                let wanted =
                    Wanted { tried: if n % 2 == 0 { &[] } else { &tried }, prompt_bytes: 1_000, ..Wanted::default() };
                if let Ok(mut in_flight) = claim(&members, policy, &wanted, &mut rng, now) {
                    in_flight.first_byte(now + Duration::from_millis(9));
                    held.push(in_flight);
                }
            }
            let change = before.change();
            assert_eq!((change.allocations, change.reallocations), (0, 0), "{policy:?} of {size}");
            assert_eq!(held.len(), size as usize * 4, "{policy:?} of {size}: all places were given");
        }
    }
    let before = Region::new(COUNTING);
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(before.change().allocations, 1, "what is allocated is counted");
}
