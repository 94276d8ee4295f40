//! Asks engines for their load: `GET /metrics`, about once a second, where the answer can make a difference.
//!
//! One task does this for the whole proxy. It asks the backends that share a pool with another one in the routing table, and
//! no others. No request waits for it: it leaves each load in [`Backend::reported`], where it grows old unless the next
//! answer replaces it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use http::StatusCode;
use tokio::time::{Instant, sleep_until};

use crate::{
    base::fetch::{Fetch, FetchError},
    pool::{
        backend::Backend,
        load::EngineLoad,
        table::{RoutingTable, TableReader},
    },
};

/// Every engine has its metrics at the root, even if its API is below another path.
const PATH: &str = "/metrics";
/// Time between two questions to a backend that answers.
const EVERY: Duration = Duration::from_secs(1);
/// Most time between two questions to a backend that does not answer. The time begins with [`EVERY`] and doubles.
const SILENT_EVERY_MAX: Duration = Duration::from_secs(16);
/// Time between two questions to a backend that has no such page, or not the numbers on it. An engine may begin to report
/// them with its first request. (One that is restarted with other options is another incarnation.)
const UNABLE_EVERY: Duration = Duration::from_secs(60);
/// Time for one answer, from connecting to its last byte. Less than [`EVERY`].
const TIMEOUT: Duration = Duration::from_millis(900);
/// Largest page. vLLM's has 60 KB for one model.
const PAGE_BYTES_MAX: usize = 1024 * 1024;
/// Most questions at a time, and so most connections.
const ASKED_MAX: usize = 32;

/// The outcome of one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Load(EngineLoad),
    /// No answer came, or a server error. The next question may succeed.
    NoAnswer,
    /// The backend does not report its load.
    Unable,
}

/// The plan for one backend.
#[derive(Debug)]
struct Plan {
    backend: Arc<Backend>,
    /// When it is to be asked; `None` while it is being asked.
    due: Option<Instant>,
    asked_at: Instant,
    /// Questions without an answer since the last answer.
    silent: u32,
}

/// The plans for all backends that are asked, by the serial of the backend.
#[derive(Debug, Default)]
struct Plans {
    plans: HashMap<u32, Plan>,
    generation: Option<u64>,
}

/// Asks for ever. Questions that are under way end when this is dropped.
pub(crate) async fn run(table: TableReader, connect_timeout: Duration) {
    let mut plans = Plans::default();
    let mut asking = FuturesUnordered::new();
    loop {
        let now = Instant::now();
        plans.follow(&table.snapshot(), now);
        while asking.len() < ASKED_MAX
            && let Some(backend) = plans.next_due(now)
        {
            asking.push(async move {
                let outcome = ask(&backend, connect_timeout).await;
                (backend, outcome)
            });
        }
        // Nothing reports new backends, so the loop looks for them once in a while. If no more questions may be under way,
        // the next answer makes room.
        let wake = if asking.len() < ASKED_MAX { plans.wake(now) } else { now + EVERY };
        tokio::select! {
            Some((backend, outcome)) = asking.next() => plans.answered(&backend, outcome, Instant::now()),
            () = sleep_until(wake) => {}
        }
    }
}

async fn ask(backend: &Backend, connect_timeout: Duration) -> Outcome {
    let addr = backend.spec.addr;
    let fetch = Fetch { addr, path: PATH, connect_timeout, timeout: TIMEOUT, max_bytes: PAGE_BYTES_MAX };
    // Read before the answer comes: a request of ours that arrives meanwhile is counted twice rather than not at all.
    let in_flight = backend.in_flight();
    let outcome = read(fetch.get().await.as_ref().map(|(status, page)| (*status, &**page)));
    if let Outcome::Load(load) = outcome {
        backend.reported.set(load, in_flight, Instant::now());
    }
    outcome
}

fn read(answer: Result<(StatusCode, &[u8]), &FetchError>) -> Outcome {
    match answer {
        Ok((StatusCode::OK, page)) => EngineLoad::parse(page).map_or(Outcome::Unable, Outcome::Load),
        // llama.cpp answers 501 if its metrics are switched off.
        Ok((status, _)) if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => Outcome::NoAnswer,
        Ok(_) | Err(FetchError::TooLarge(_)) => Outcome::Unable,
        Err(_) => Outcome::NoAnswer,
    }
}

// === impl Plans ===

impl Plans {
    /// Makes plans for the backends that share a pool in this table. A backend that has a plan keeps it, and the plans of
    /// all others are forgotten.
    fn follow(&mut self, table: &RoutingTable, now: Instant) {
        if self.generation.replace(table.generation) == Some(table.generation) {
            return;
        }
        let mut before = std::mem::take(&mut self.plans);
        for route in table.routes().into_iter().filter(|route| route.members.len() > 1) {
            for member in &route.members {
                let serial = member.backend.serial;
                self.plans.entry(serial).or_insert_with(|| {
                    before.remove(&serial).unwrap_or_else(|| Plan {
                        backend: member.backend.clone(),
                        // Spread over time, because after a start all are new.
                        due: Some(now + EVERY.mul_f64(fastrand::f64())),
                        asked_at: now,
                        silent: 0,
                    })
                });
            }
        }
    }

    /// The backend that has been due for longest, if any is due. It counts as being asked from now on.
    fn next_due(&mut self, now: Instant) -> Option<Arc<Backend>> {
        let due = self.plans.values_mut().filter(|plan| plan.due.is_some_and(|due| due <= now));
        let next = due.min_by_key(|plan| plan.due)?;
        next.due = None;
        next.asked_at = now;
        Some(next.backend.clone())
    }

    /// When to look again: when the next backend is due, but not later than [`EVERY`] from now.
    fn wake(&self, now: Instant) -> Instant {
        self.plans.values().filter_map(|plan| plan.due).fold(now + EVERY, Instant::min)
    }

    fn answered(&mut self, backend: &Arc<Backend>, outcome: Outcome, now: Instant) {
        // It may have left the table meanwhile.
        let Some(plan) = self.plans.get_mut(&backend.serial) else { return };
        let every = match outcome {
            Outcome::Load(_) => {
                plan.silent = 0;
                EVERY
            }
            Outcome::NoAnswer => {
                let every = EVERY.saturating_mul(1 << plan.silent.min(16)).min(SILENT_EVERY_MAX);
                plan.silent += 1;
                every
            }
            Outcome::Unable => UNABLE_EVERY,
        };
        tracing::trace!(container = %backend.spec.name, ?outcome, "load");
        // A tenth more or less, so that several proxies do not keep asking at the same moment.
        let due = plan.asked_at + every.mul_f64(0.9 + 0.2 * fastrand::f64());
        plan.due = Some(due.max(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{
        backend::{Member, Model, tests::member},
        table::Route,
    };

    fn table(generation: u64, pools: &[&[&Arc<Backend>]]) -> RoutingTable {
        let routes = pools.iter().enumerate().map(|(i, pool)| {
            let model = Model::new(&format!("m{i}"));
            let members = pool.iter().map(|backend| Member::new(Arc::clone(backend), model.clone())).collect();
            Route { model, members, object: None, why_not_ready: "", is_coming: false }
        });
        let mut table = RoutingTable::new(routes.collect(), Vec::new(), Vec::new());
        table.generation = generation;
        table
    }

    /// Names of all that are due, sorted.
    fn due(plans: &mut Plans, now: Instant) -> String {
        let mut names: Vec<String> =
            std::iter::from_fn(|| plans.next_due(now)).take(9).map(|backend| backend.spec.name.clone()).collect();
        names.sort();
        names.concat()
    }

    #[test]
    fn only_those_who_share_a_pool_are_asked_and_each_once() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| member(name, 1, None).backend.clone());
        let (mut plans, start) = (Plans::default(), Instant::now());
        let later = start + EVERY;
        plans.follow(&table(1, &[&[&a], &[&b]]), start);
        assert_eq!(due(&mut plans, later), "");
        assert_eq!(plans.wake(start), later);
        plans.follow(&table(2, &[&[&a, &b], &[&a, &b, &c], &[&d]]), start);
        assert_eq!(due(&mut plans, start - Duration::from_millis(1)), "");
        assert_eq!(due(&mut plans, later), "abc");
        assert_eq!(due(&mut plans, later), "", "they are being asked");
        // A backend that stays keeps its plan. One that leaves is forgotten, and its late answer changes nothing.
        plans.follow(&table(3, &[&[&b, &d], &[&c]]), later);
        plans.answered(&a, Outcome::NoAnswer, later);
        assert_eq!(due(&mut plans, later + EVERY), "d");
        assert_eq!(plans.plans.len(), 2);
    }

    #[test]
    fn the_time_between_questions_depends_on_the_last_outcome() {
        let load = Outcome::Load(EngineLoad::default());
        let [a, b] = ["a", "b"].map(|name| member(name, 1, None).backend.clone());
        let (mut plans, mut now) = (Plans::default(), Instant::now());
        plans.follow(&table(1, &[&[&a, &b]]), now);
        // A backend that takes its time keeps no other one from being asked.
        assert_eq!(due(&mut plans, now + EVERY), "ab");
        plans.answered(&a, load, now + EVERY);
        for (outcome, seconds) in [
            (load, 1),
            (Outcome::NoAnswer, 1),
            (Outcome::NoAnswer, 2),
            (Outcome::NoAnswer, 4),
            (load, 1),
            (Outcome::NoAnswer, 1),
            (Outcome::NoAnswer, 2),
            (Outcome::NoAnswer, 4),
            (Outcome::NoAnswer, 8),
            (Outcome::NoAnswer, 16),
            (Outcome::NoAnswer, 16),
            (Outcome::Unable, 60),
            (load, 1),
        ] {
            now += UNABLE_EVERY * 2;
            assert_eq!(due(&mut plans, now), "a");
            plans.answered(&a, outcome, now + Duration::from_millis(800));
            let every = Duration::from_secs(seconds);
            let next = plans.plans[&a.serial].due.unwrap();
            assert!(
                next >= now + every.mul_f64(0.9) && next <= now + every.mul_f64(1.1),
                "{outcome:?}: {:?}",
                next - now
            );
        }
    }

    #[test]
    fn every_answer_is_an_outcome() {
        let addr = ([127, 0, 0, 1], 9).into();
        let page: &[u8] = b"vllm:num_requests_running 3\n";
        for (answer, outcome) in [
            (Ok((StatusCode::OK, page)), Outcome::Load(EngineLoad { waiting: 0, running: 3 })),
            (Ok((StatusCode::OK, b"{}")), Outcome::Unable),
            (Ok((StatusCode::NO_CONTENT, page)), Outcome::Unable),
            (Ok((StatusCode::FOUND, page)), Outcome::Unable),
            (Ok((StatusCode::UNAUTHORIZED, page)), Outcome::Unable),
            (Ok((StatusCode::NOT_FOUND, page)), Outcome::Unable),
            (Ok((StatusCode::NOT_IMPLEMENTED, page)), Outcome::Unable),
            (Ok((StatusCode::INTERNAL_SERVER_ERROR, page)), Outcome::NoAnswer),
            (Ok((StatusCode::SERVICE_UNAVAILABLE, page)), Outcome::NoAnswer),
            (Err(&FetchError::TooLarge(1)), Outcome::Unable),
            (Err(&FetchError::TimedOut(TIMEOUT)), Outcome::NoAnswer),
            (Err(&FetchError::Refused(addr)), Outcome::NoAnswer),
            (Err(&FetchError::Broke(String::new())), Outcome::NoAnswer),
        ] {
            assert_eq!(read(answer), outcome, "{answer:?}");
        }
    }
}
