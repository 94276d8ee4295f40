//! Kinds of things that are counted and named: closed sets, so that no client and no backend can create a series. Each
//! kind has one word, which stands in metrics, in traces, in the status and in the terminal.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// A closed set of kinds.
pub trait Named: Copy + Eq + 'static {
    /// The whole set, in the order in which metrics list it.
    const ALL: &'static [Self];

    /// The word for this kind; no two kinds of a set share one.
    fn word(self) -> &'static str;
}

/// One number for each kind of a set.
#[derive(Debug)]
pub struct PerKind<K> {
    /// In the order of [`Named::ALL`].
    numbers: Box<[AtomicU64]>,
    kinds: PhantomData<K>,
}

impl<K: Named> Default for PerKind<K> {
    fn default() -> PerKind<K> {
        PerKind { numbers: K::ALL.iter().map(|_| AtomicU64::new(0)).collect(), kinds: PhantomData }
    }
}

impl<K: Named> PerKind<K> {
    fn of(&self, kind: K) -> Option<&AtomicU64> {
        let index = K::ALL.iter().position(|known| *known == kind);
        debug_assert!(index.is_some(), "{} is missing in ALL", kind.word());
        self.numbers.get(index?)
    }

    /// Adds one to the number of this kind.
    pub fn increment(&self, kind: K) {
        if let Some(number) = self.of(kind) {
            number.fetch_add(1, Relaxed);
        }
    }

    /// Sets the number of this kind.
    pub fn set(&self, kind: K, n: u64) {
        if let Some(number) = self.of(kind) {
            number.store(n, Relaxed);
        }
    }

    /// Every kind with its number.
    pub fn each(&self) -> impl Iterator<Item = (K, u64)> {
        K::ALL.iter().copied().zip(&self.numbers).map(|(kind, number)| (kind, number.load(Relaxed)))
    }
}

/// The states of a container's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContainerState {
    /// The container is known, and something keeps it from being probed.
    Discovered,
    /// The container is asked for its models and has not answered yet.
    Probing,
    /// The container gets requests.
    Ready,
    /// The container was ready. It gets no new requests, and those in flight may finish.
    Unhealthy,
    /// The container was told to stop. It gets no new requests, and those in flight may finish.
    Draining,
    /// The process of the container has ended.
    Gone,
}

impl Named for ContainerState {
    const ALL: &'static [ContainerState] = &[
        ContainerState::Discovered,
        ContainerState::Probing,
        ContainerState::Ready,
        ContainerState::Unhealthy,
        ContainerState::Draining,
        ContainerState::Gone,
    ];

    fn word(self) -> &'static str {
        match self {
            ContainerState::Discovered => "discovered",
            ContainerState::Probing => "probing",
            ContainerState::Ready => "ready",
            ContainerState::Unhealthy => "unhealthy",
            ContainerState::Draining => "draining",
            ContainerState::Gone => "gone",
        }
    }
}

/// The ways in which a probe fails to get a usable answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeFailure {
    /// No complete answer came.
    NoAnswer,
    /// The answer had a status other than success.
    Status,
    /// The answer was complete, but its list of models cannot be used.
    Unusable,
}

impl Named for ProbeFailure {
    const ALL: &'static [ProbeFailure] = &[ProbeFailure::NoAnswer, ProbeFailure::Status, ProbeFailure::Unusable];

    fn word(self) -> &'static str {
        match self {
            ProbeFailure::NoAnswer => "no_answer",
            ProbeFailure::Status => "status",
            ProbeFailure::Unusable => "unusable",
        }
    }
}

/// The changes of the routing table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TableAction {
    /// A backend became ready.
    Add,
    /// A backend stopped being ready.
    Remove,
    /// The models of a ready backend changed.
    Update,
}

impl Named for TableAction {
    const ALL: &'static [TableAction] = &[TableAction::Add, TableAction::Remove, TableAction::Update];

    fn word(self) -> &'static str {
        match self {
            TableAction::Add => "add",
            TableAction::Remove => "remove",
            TableAction::Update => "update",
        }
    }
}

/// The reasons for which a request is sent once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// The connection had been closed while it was idle; the request goes to the same backend.
    StaleConnection,
    /// A backend could not be connected to.
    Connect,
    /// A backend's connection ended before an answer.
    Ended,
    /// A backend did not answer in the time that the user set.
    TimedOut,
    /// A backend pushed back.
    Busy,
    /// A backend answered with an error of its own.
    Error,
}

impl Named for Retry {
    const ALL: &'static [Retry] =
        &[Retry::StaleConnection, Retry::Connect, Retry::Ended, Retry::TimedOut, Retry::Busy, Retry::Error];

    fn word(self) -> &'static str {
        match self {
            Retry::StaleConnection => "stale_connection",
            Retry::Connect => "connect",
            Retry::Ended => "ended",
            Retry::TimedOut => "timeout",
            Retry::Busy => "busy",
            Retry::Error => "error",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_kind_has_a_number_of_its_own() {
        let numbers = PerKind::default();
        numbers.increment(TableAction::Update);
        numbers.increment(TableAction::Update);
        numbers.set(TableAction::Add, 7);
        let expected = [(TableAction::Add, 7), (TableAction::Remove, 0), (TableAction::Update, 2)];
        assert_eq!(numbers.each().collect::<Vec<_>>(), expected);
    }

    /// The number of kinds, so that a new variant cannot be forgotten in `ALL`; `last` is the last variant.
    fn check<K: Named>(last: usize) {
        let words: HashSet<&str> = K::ALL.iter().map(|kind| kind.word()).collect();
        assert_eq!(K::ALL.len(), last + 1, "a variant is missing in ALL, or stands there twice");
        assert_eq!(words.len(), K::ALL.len(), "two kinds share a word");
    }

    #[test]
    fn every_kind_is_listed_once_with_a_word_of_its_own() {
        check::<ContainerState>(ContainerState::Gone as usize);
        check::<ProbeFailure>(ProbeFailure::Unusable as usize);
        check::<TableAction>(TableAction::Update as usize);
        check::<Retry>(Retry::Error as usize);
    }
}
