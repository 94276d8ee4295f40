//! Which API version stands before the paths of an engine, for each kind of question, and which others are tried where
//! one is refused.
//!
//! A proxy before an engine allows paths by patterns: without a version, with one, or each kind in its own way. So each
//! kind keeps what works for it. Versions are tried where a path is refused, by one task at a time and not too often:
//! a container that may not be inspected is no reason to try forty paths for each look at it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// API versions that are tried, as minor versions of 1: first those of the engines in use (Docker 29 takes none below
/// 1.44, Docker 20.10 none above 1.41, Podman calls itself 1.41), then all others.
const VERSIONS_FIRST: [u16; 3] = [44, 41, 40];
const VERSIONS_ALL: std::ops::RangeInclusive<u16> = 24..=60;
/// How long versions are not tried again after none of them worked.
const TRIED_AGAIN: Duration = Duration::from_secs(30);
/// A path to one container that is refused, while others have been told of within this time, is no matter of versions.
const WORKS_FOR_OTHERS: Duration = Duration::from_secs(90);

/// A kind of question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    List,
    Inspect,
    Events,
}

const CALLS: [Call; 3] = [Call::List, Call::Inspect, Call::Events];

/// What stands before the paths of an engine. It outlives connections.
#[derive(Debug, Default)]
pub(super) struct Paths {
    ways: Mutex<[Way; CALLS.len()]>,
    /// Held by the task that tries versions; the others wait for what it finds.
    searches: [Arc<tokio::sync::Mutex<()>>; CALLS.len()],
}

/// One kind's own.
#[derive(Debug, Default)]
struct Way {
    /// Nothing, or `/v1.44`.
    prefix: Arc<str>,
    /// When it was answered last.
    worked_at: Option<Instant>,
    tried_at: Option<Instant>,
}

/// One attempt to find a version that is not refused.
#[derive(Debug)]
pub(super) struct Search {
    untried: VecDeque<Arc<str>>,
    tried: Vec<Arc<str>>,
    _alone: tokio::sync::OwnedMutexGuard<()>,
}

// === impl Paths ===

impl Paths {
    fn ways(&self) -> MutexGuard<'_, [Way; CALLS.len()]> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands before paths of this kind.
    pub(super) fn prefix(&self, call: Call) -> Arc<str> {
        self.ways()[call as usize].prefix.clone()
    }

    /// A question was answered with this before its path. Kinds that have not been answered yet begin with the same.
    pub(super) fn worked(&self, call: Call, prefix: &Arc<str>) {
        let mut ways = self.ways();
        for (way, of) in ways.iter_mut().zip(CALLS) {
            if of == call || way.worked_at.is_none() {
                way.prefix.clone_from(prefix);
            }
        }
        ways[call as usize].worked_at = Some(Instant::now());
    }

    /// What else may be tried, because a path with `refused` before it was refused; `None` if that has just been tried in
    /// vain, or if it is not a matter of versions.
    pub(super) async fn search(&self, call: Call, refused: &Arc<str>) -> Option<Search> {
        let alone = self.searches[call as usize].clone().lock_owned().await;
        let now = Instant::now();
        let mut ways = self.ways();
        let others = CALLS.map(|of| ways[of as usize].prefix.clone());
        let way = &mut ways[call as usize];
        if way.prefix != *refused {
            // Another task has found one meanwhile.
            return Some(Search { untried: [way.prefix.clone()].into(), tried: vec![refused.clone()], _alone: alone });
        }
        let is_recent = |at: Option<Instant>, age: Duration| at.is_some_and(|at| now.duration_since(at) < age);
        if is_recent(way.tried_at, TRIED_AGAIN) || call == Call::Inspect && is_recent(way.worked_at, WORKS_FOR_OTHERS) {
            return None;
        }
        way.tried_at = Some(now);
        let rest = VERSIONS_ALL.rev().filter(|minor| !VERSIONS_FIRST.contains(minor));
        let versions = VERSIONS_FIRST.into_iter().chain(rest).map(|minor| format!("/v1.{minor}").into());
        let untried = others.into_iter().chain([Arc::default()]).chain(versions).collect();
        Some(Search { untried, tried: vec![refused.clone()], _alone: alone })
    }

    /// What is used because paths without a version are refused, in words; `None` if that is not so.
    pub(super) fn told(&self) -> Option<String> {
        let ways = self.ways();
        let versions = CALLS.map(|call| ways[call as usize].prefix.trim_start_matches('/'));
        let [list, inspect, events] = versions;
        if list == inspect && inspect == events {
            return (!list.is_empty())
                .then(|| format!("refuses paths without an API version, so that those with {list} are used"));
        }
        let names = ["GET /containers/json", "GET /containers/{id}/json", "GET /events"];
        let used = |(version, name): (&str, &str)| match version {
            "" => format!("none for {name}"),
            version => format!("{version} for {name}"),
        };
        let used: Vec<String> = versions.into_iter().zip(names).map(used).collect();
        Some(format!("does not take every path with the same API version; used are {}", used.join(", ")))
    }
}

// === impl Search ===

impl Search {
    /// What is tried next; `named` is the version that the last refusal asked for.
    pub(super) fn next(&mut self, named: Option<(u16, u16)>) -> Option<Arc<str>> {
        if let Some((major, minor)) = named {
            self.untried.push_front(format!("/v{major}.{minor}").into());
        }
        while let Some(prefix) = self.untried.pop_front() {
            if !self.tried.contains(&prefix) {
                self.tried.push(prefix.clone());
                return Some(prefix);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut search: Search) -> Vec<String> {
        std::iter::from_fn(|| search.next(None)).map(|prefix| prefix.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn all_versions_are_tried_once_and_not_too_often() {
        let paths = Paths::default();
        let tried = all(paths.search(Call::List, &"".into()).await.unwrap());
        assert_eq!(tried[..4], ["/v1.44", "/v1.41", "/v1.40", "/v1.60"]);
        assert_eq!(tried.len(), VERSIONS_ALL.count());
        assert!(paths.search(Call::List, &"".into()).await.is_none());
        assert!(paths.search(Call::Events, &"".into()).await.is_some(), "each kind for itself");
        tokio::time::advance(TRIED_AGAIN).await;
        let mut search = paths.search(Call::List, &"".into()).await.unwrap();
        assert_eq!(search.next(Some((1, 25))).as_deref(), Some("/v1.25"), "the one that is named comes first");
        assert_eq!(search.next(Some((1, 25))).as_deref(), Some("/v1.44"), "and once");
        assert!(!all(search).contains(&"/v1.25".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn each_kind_keeps_what_works_for_it() {
        let paths = Paths::default();
        paths.worked(Call::List, &"".into());
        assert_eq!(paths.told(), None);
        paths.worked(Call::Inspect, &"/v1.41".into());
        assert_eq!(CALLS.map(|call| paths.prefix(call).to_string()), ["", "/v1.41", "/v1.41"]);
        assert!(paths.told().unwrap().contains("v1.41 for GET /containers/{id}/json"), "{:?}", paths.told());
        // The ways of the others come first, then the one without a version.
        let tried = all(paths.search(Call::Events, &"/v1.41".into()).await.unwrap());
        assert_eq!(tried[..2], ["", "/v1.44"]);
        paths.worked(Call::Events, &"".into());
        paths.worked(Call::List, &"/v1.41".into());
        assert_eq!(CALLS.map(|call| paths.prefix(call).to_string()), ["/v1.41", "/v1.41", ""]);
        paths.worked(Call::Events, &"/v1.41".into());
        assert!(paths.told().unwrap().contains("those with v1.41 are used"), "{:?}", paths.told());
    }

    #[tokio::test(start_paused = true)]
    async fn one_container_that_may_not_be_inspected_is_no_matter_of_versions() {
        let paths = Paths::default();
        paths.worked(Call::Inspect, &"".into());
        assert!(paths.search(Call::Inspect, &"".into()).await.is_none());
        tokio::time::advance(WORKS_FOR_OTHERS).await;
        assert!(paths.search(Call::Inspect, &"".into()).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_waited_take_what_was_found() {
        let paths = Arc::new(Paths::default());
        let search = paths.search(Call::Inspect, &"".into()).await.unwrap();
        let waiting = tokio::spawn({
            let paths = paths.clone();
            async move { all(paths.search(Call::Inspect, &"".into()).await.unwrap()) }
        });
        tokio::task::yield_now().await;
        paths.worked(Call::Inspect, &"/v1.44".into());
        drop(search);
        assert_eq!(waiting.await.unwrap(), ["/v1.44"]);
    }
}
