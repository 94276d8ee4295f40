//! Asking engines for their load: `GET /metrics`, about once a second, where the answer can make a difference.
//!
//! One task for the whole proxy. It asks the backends that share a pool with another one, as the table says, and no
//! others; whoever has left the table is not asked any more. Nothing waits for it: what it learns is left in
//! [`Backend::reported`], and what it does not learn grows old there.

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

/// Every engine has it at the root, wherever its API is.
const PATH: &str = "/metrics";
/// How often a backend is asked that answers.
const EVERY: Duration = Duration::from_secs(1);
/// How often one that does not answer, at most: from [`EVERY`] on it is doubled up to this.
const SILENT_EVERY_MAX: Duration = Duration::from_secs(16);
/// How often one that has no such page, or not the numbers on it. It may be restarted with other options, but then it is
/// another incarnation; what this finds is an engine that begins to tell with its first request.
const UNABLE_EVERY: Duration = Duration::from_secs(60);
/// Time for one answer, from connecting to its last byte. Less than [`EVERY`].
const TIMEOUT: Duration = Duration::from_millis(900);
/// Largest page. vLLM's has 60 KB for one model.
const PAGE_BYTES_MAX: usize = 1024 * 1024;
/// Most questions at a time, and so most connections.
const ASKED_MAX: usize = 32;

/// What came of one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Load(EngineLoad),
    /// No answer, or a server error: it may be better next time.
    Nothing,
    /// It does not tell its load.
    Unable,
}

/// When to ask one backend.
#[derive(Debug)]
struct Plan {
    backend: Arc<Backend>,
    /// `None` while it is being asked.
    due: Option<Instant>,
    asked_at: Instant,
    /// Questions without an answer since the last answer.
    silent: u32,
}

/// Takes to ask, by the serial of the backend.
#[derive(Debug, Default)]
struct Plans {
    plans: HashMap<u32, Plan>,
    generation: Option<u64>,
}

/// Asks for ever. What is under way when this is dropped ends with it.
pub async fn run(table: TableReader, connect_timeout: Duration) {
    let mut plans = Plans::default();
    let mut asking = FuturesUnordered::new();
    loop {
        let now = Instant::now();
        plans.follow(&table.snapshot(), now);
        while asking.len() < ASKED_MAX
            && let Some(backend) = plans.next_due(now)
        {
            asking.push(async move {
                let told = ask(&backend, connect_timeout).await;
                (backend, told)
            });
        }
        // New backends are found by looking, so it looks once in a while. With no room left, an answer makes some.
        let wake = if asking.len() < ASKED_MAX { plans.wake(now) } else { now + EVERY };
        tokio::select! {
            Some((backend, told)) = asking.next() => plans.told(&backend, told, Instant::now()),
            () = sleep_until(wake) => {}
        }
    }
}

async fn ask(backend: &Backend, connect_timeout: Duration) -> Told {
    let addr = backend.spec.addr;
    let fetch = Fetch { addr, path: PATH, connect_timeout, timeout: TIMEOUT, max_bytes: PAGE_BYTES_MAX };
    // Ours that arrive while it answers are counted twice rather than not at all.
    let in_flight = backend.in_flight();
    let told = read(fetch.get().await.as_ref().map(|(status, page)| (*status, &**page)));
    if let Told::Load(load) = told {
        backend.reported.set(load, in_flight, Instant::now());
    }
    told
}

fn read(answer: Result<(StatusCode, &[u8]), &FetchError>) -> Told {
    match answer {
        Ok((StatusCode::OK, page)) => EngineLoad::parse(page).map_or(Told::Unable, Told::Load),
        // llama.cpp says 501 if it was not told to have metrics.
        Ok((status, _)) if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => Told::Nothing,
        Ok(_) | Err(FetchError::TooLarge(_)) => Told::Unable,
        Err(_) => Told::Nothing,
    }
}

// === impl Plans ===

impl Plans {
    /// Plans for those who share a pool, as of this table; those who already have a plan keep it.
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
                        // Spread, for after a start all are new.
                        due: Some(now + EVERY.mul_f64(fastrand::f64())),
                        asked_at: now,
                        silent: 0,
                    })
                });
            }
        }
    }

    /// Whoever has waited longest of those whose time has come; it counts as being asked from now on.
    fn next_due(&mut self, now: Instant) -> Option<Arc<Backend>> {
        let due = self.plans.values_mut().filter(|plan| plan.due.is_some_and(|due| due <= now));
        let next = due.min_by_key(|plan| plan.due)?;
        next.due = None;
        next.asked_at = now;
        Some(next.backend.clone())
    }

    /// When to look again: when the next one is due, and soon in any case.
    fn wake(&self, now: Instant) -> Instant {
        self.plans.values().filter_map(|plan| plan.due).fold(now + EVERY, Instant::min)
    }

    fn told(&mut self, backend: &Arc<Backend>, told: Told, now: Instant) {
        // It may have left the table meanwhile.
        let Some(plan) = self.plans.get_mut(&backend.serial) else { return };
        let every = match told {
            Told::Load(_) => {
                plan.silent = 0;
                EVERY
            }
            Told::Nothing => {
                let every = EVERY.saturating_mul(1 << plan.silent.min(16)).min(SILENT_EVERY_MAX);
                plan.silent += 1;
                every
            }
            Told::Unable => UNABLE_EVERY,
        };
        tracing::trace!(container = %backend.spec.name, ?told, "load");
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
        // Who stays keeps its plan, who leaves is forgotten, whatever it has to say then.
        plans.follow(&table(3, &[&[&b, &d], &[&c]]), later);
        plans.told(&a, Told::Nothing, later);
        assert_eq!(due(&mut plans, later + EVERY), "d");
        assert_eq!(plans.plans.len(), 2);
    }

    #[test]
    fn how_often_depends_on_what_it_told() {
        let load = Told::Load(EngineLoad::default());
        let [a, b] = ["a", "b"].map(|name| member(name, 1, None).backend.clone());
        let (mut plans, mut now) = (Plans::default(), Instant::now());
        plans.follow(&table(1, &[&[&a, &b]]), now);
        // One that takes its time keeps nobody else from being asked.
        assert_eq!(due(&mut plans, now + EVERY), "ab");
        plans.told(&a, load, now + EVERY);
        for (told, seconds) in [
            (load, 1),
            (Told::Nothing, 1),
            (Told::Nothing, 2),
            (Told::Nothing, 4),
            (load, 1),
            (Told::Nothing, 1),
            (Told::Nothing, 2),
            (Told::Nothing, 4),
            (Told::Nothing, 8),
            (Told::Nothing, 16),
            (Told::Nothing, 16),
            (Told::Unable, 60),
            (load, 1),
        ] {
            now += UNABLE_EVERY * 2;
            assert_eq!(due(&mut plans, now), "a");
            plans.told(&a, told, now + Duration::from_millis(800));
            let every = Duration::from_secs(seconds);
            let next = plans.plans[&a.serial].due.unwrap();
            assert!(next >= now + every.mul_f64(0.9) && next <= now + every.mul_f64(1.1), "{told:?}: {:?}", next - now);
        }
    }

    #[test]
    fn what_answers_mean() {
        let addr = ([127, 0, 0, 1], 9).into();
        let page: &[u8] = b"vllm:num_requests_running 3\n";
        for (answer, told) in [
            (Ok((StatusCode::OK, page)), Told::Load(EngineLoad { waiting: 0, running: 3 })),
            (Ok((StatusCode::OK, b"{}")), Told::Unable),
            (Ok((StatusCode::NO_CONTENT, page)), Told::Unable),
            (Ok((StatusCode::FOUND, page)), Told::Unable),
            (Ok((StatusCode::UNAUTHORIZED, page)), Told::Unable),
            (Ok((StatusCode::NOT_FOUND, page)), Told::Unable),
            (Ok((StatusCode::NOT_IMPLEMENTED, page)), Told::Unable),
            (Ok((StatusCode::INTERNAL_SERVER_ERROR, page)), Told::Nothing),
            (Ok((StatusCode::SERVICE_UNAVAILABLE, page)), Told::Nothing),
            (Err(&FetchError::TooLarge(1)), Told::Unable),
            (Err(&FetchError::TimedOut(TIMEOUT)), Told::Nothing),
            (Err(&FetchError::Refused(addr)), Told::Nothing),
            (Err(&FetchError::Broke(String::new())), Told::Nothing),
        ] {
            assert_eq!(read(answer), told, "{answer:?}");
        }
    }
}
