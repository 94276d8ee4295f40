//! Turns for work that takes long, among the requests of one thread.
//!
//! A request with a lot to decode does it in pieces. If it yielded once between two pieces, many such requests would
//! still keep all others waiting: each round of the thread would hold one piece of every one of them. So each waits for as
//! many rounds as there are such requests, on average, and a round holds about one piece, however many they are.

use std::{
    cell::Cell,
    pin::pin,
    task::{Context, Poll},
};

/// Longest wait, in rounds of the thread.
const ROUNDS_MAX: usize = 1024;

thread_local! {
    static WAITING: Cell<usize> = const { Cell::new(0) };
}

/// A wait for the next turn. It counts as long as it exists.
#[derive(Debug)]
pub(super) struct Turn {
    rounds_left: usize,
}

impl Turn {
    /// Begins to wait.
    pub(super) fn begin() -> Turn {
        let waiting = WAITING.get() + 1;
        WAITING.set(waiting);
        // At random, because requests that began together would else have all their turns in the same round.
        let rounds_left = fastrand::usize(1..=(2 * waiting - 1).min(ROUNDS_MAX));
        Turn { rounds_left }
    }

    /// Ready when all rounds are over; until then the task is woken in every round.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(left) = self.rounds_left.checked_sub(1) else { return Poll::Ready(()) };
        self.rounds_left = left;
        // Polled once, it has this task woken when all others have been served, sockets included.
        let _ = pin!(tokio::task::yield_now()).poll(cx);
        Poll::Pending
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        WAITING.set(WAITING.get().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, rc::Rc};

    use tokio::task::LocalSet;

    use super::*;

    async fn rounds() -> usize {
        let mut turn = Turn::begin();
        let mut polls = 0;
        poll_fn(|cx| {
            polls += 1;
            turn.poll(cx)
        })
        .await;
        polls - 1
    }

    #[tokio::test]
    async fn one_alone_waits_one_round() {
        for _ in 0..100 {
            assert_eq!(rounds().await, 1);
        }
    }

    #[tokio::test]
    async fn a_round_holds_few_turns_however_many_wait() {
        const WAITING_NUMBER: usize = 64;
        const ROUNDS: usize = 640;
        let local = LocalSet::new();
        let turns = Rc::new(Cell::new(0));
        for _ in 0..WAITING_NUMBER {
            let turns = turns.clone();
            local.spawn_local(async move {
                loop {
                    rounds().await;
                    turns.set(turns.get() + 1);
                }
            });
        }
        let most = local
            .run_until(async {
                for _ in 0..WAITING_NUMBER {
                    tokio::task::yield_now().await;
                }
                let (mut most, before) = (0, turns.get());
                for _ in 0..ROUNDS {
                    let begun = turns.get();
                    tokio::task::yield_now().await;
                    most = most.max(turns.get() - begun);
                }
                let all = turns.get() - before;
                assert!((ROUNDS / 3..ROUNDS * 3).contains(&all), "{all} turns in {ROUNDS} rounds");
                most
            })
            .await;
        assert!(most < WAITING_NUMBER / 3, "{most} turns in one round");
        drop(local);
        assert_eq!(WAITING.get(), 0);
    }
}
