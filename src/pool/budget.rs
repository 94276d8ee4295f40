//! How many retries a pool allows: a share of its traffic, so that retries cannot melt what is left of it.
//!
//! Every request pays in a fraction of a retry and every retry takes out a whole one, as in Finagle's and linkerd's retry
//! budgets. The account is full to begin with and holds a burst: when a replica dies under hundreds of requests, each of
//! them gets its second attempt; when replicas keep failing, retries add no more than a fifth to the load.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Requests that pay for one retry.
const REQUESTS_PER_RETRY: u32 = 5;
/// Retries that can be saved up.
const BURST_RETRIES: u32 = 1_000;

/// The account of one pool, in fractions of a retry.
#[derive(Debug)]
pub struct RetryBudget(AtomicU32);

impl Default for RetryBudget {
    fn default() -> RetryBudget {
        RetryBudget(AtomicU32::new(BURST_RETRIES * REQUESTS_PER_RETRY))
    }
}

impl RetryBudget {
    /// A request has come. One atomic load as long as the account is full.
    pub fn pay_in(&self) {
        // Some threads may pass the limit at the same time; what is over it by as many is of no matter.
        if self.0.load(Relaxed) < BURST_RETRIES * REQUESTS_PER_RETRY {
            self.0.fetch_add(1, Relaxed);
        }
    }

    /// There is none to be taken out.
    pub fn is_used_up(&self) -> bool {
        self.0.load(Relaxed) < REQUESTS_PER_RETRY
    }

    /// Takes out one retry; false if there is none.
    pub fn take_out(&self) -> bool {
        self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(REQUESTS_PER_RETRY)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_at_first_and_a_fifth_of_the_traffic_after_it() {
        let budget = RetryBudget::default();
        let burst = (0..10 * BURST_RETRIES).filter(|_| budget.take_out()).count();
        assert_eq!(burst, BURST_RETRIES as usize);
        assert!(budget.is_used_up() && !RetryBudget::default().is_used_up());
        let retries = (0..10_000)
            .filter(|_| {
                budget.pay_in();
                budget.take_out()
            })
            .count();
        assert_eq!(retries, 2_000);
    }

    #[test]
    fn what_is_saved_up_has_a_limit() {
        let budget = RetryBudget::default();
        for _ in 0..100_000 {
            budget.pay_in();
        }
        assert_eq!((0..10 * BURST_RETRIES).filter(|_| budget.take_out()).count(), BURST_RETRIES as usize);
    }
}
