//! Which backend made which answer: requests that carry the id of an answer (`GET /v1/videos/{id}`) go to the backend that made it,
//! because it alone remembers it.
//!
//! What is remembered is a hash of the id and of the collection that it belongs to, the first segment below `/v1`. Answers
//! that are seldom asked for again (`POST /v1/chat/completions`) come by the thousand: they have places of their own, where
//! a new one takes the place of an old one, so that they push nothing else out.

use std::{
    collections::VecDeque,
    hash::BuildHasher as _,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use dashmap::DashMap;
use foldhash::fast::RandomState;

use crate::pool::backend::Member;

/// Most answers remembered; the oldest are forgotten first. They take 5 MB.
const ANSWERS_MAX: usize = 64 * 1024;
/// Most answers remembered of those that come by the thousand, and in how many parts, each with a lock of its own. They
/// take 400 KB.
const PASSING_MAX: usize = 16 * 1024;
const PASSING_PARTS: usize = 64;

/// Ids of answers, and who made them. An id outlives its backend, so that its end can be told from an id never seen.
#[derive(Debug)]
pub struct Makers {
    hasher: RandomState,
    kept: DashMap<u64, Made>,
    /// In the order in which they came. Taken only when an answer that is kept begins, which is seldom.
    order: Mutex<VecDeque<u64>>,
    passing: Box<[Mutex<Vec<Passing>>]>,
}

#[derive(Debug, Clone)]
struct Made {
    by: Weak<Member>,
    /// Hash of the model's id.
    model: u64,
}

#[derive(Debug, Clone)]
struct Passing {
    id: u64,
    made: Made,
}

/// What is known of the maker of an answer.
#[derive(Debug)]
pub enum Maker {
    /// No answer of this id has passed.
    Unknown,
    /// Its backend is no more.
    Gone {
        /// Which model it was for, as [`Makers::hash_of`] has it.
        model: u64,
    },
    /// It can be asked.
    Here(Arc<Member>),
}

impl Default for Makers {
    fn default() -> Makers {
        Makers {
            hasher: RandomState::default(),
            kept: DashMap::new(),
            order: Mutex::default(),
            passing: (0..PASSING_PARTS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl Makers {
    /// Remembers that `member` made the answer with this id in this collection. `is_passing`: one of very many.
    pub fn learn(&self, collection: &str, id: &str, is_passing: bool, member: &Arc<Member>) {
        let key = self.key(collection, id);
        let made = Made { by: Arc::downgrade(member), model: self.hash_of(&member.model.id) };
        if is_passing {
            return self.learn_in_passing(key, made);
        }
        let is_new = self.kept.insert(key, made).is_none();
        if !is_new {
            return;
        }
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.push_back(key);
        let forgotten = if order.len() > ANSWERS_MAX { order.pop_front() } else { None };
        drop(order);
        if let Some(key) = forgotten {
            self.kept.remove(&key);
        }
    }

    /// The backend that made the answer with this id in this collection.
    pub fn of(&self, collection: &str, id: &str) -> Maker {
        let key = self.key(collection, id);
        let made = self.kept.get(&key).map(|made| made.clone()).or_else(|| self.in_passing(key));
        match made.map(|made| (made.by.upgrade(), made.model)) {
            None => Maker::Unknown,
            Some((None, model)) => Maker::Gone { model },
            Some((Some(member), _)) => Maker::Here(member),
        }
    }

    /// The hash of a model's id.
    pub fn hash_of(&self, model: &str) -> u64 {
        self.hasher.hash_one(model)
    }

    fn key(&self, collection: &str, id: &str) -> u64 {
        self.hasher.hash_one((collection, id))
    }

    fn learn_in_passing(&self, id: u64, made: Made) {
        let (part, place) = place_of(id);
        let mut places = self.passing[part].lock().unwrap_or_else(PoisonError::into_inner);
        if places.is_empty() {
            let nobody = Passing { id: 0, made: Made { by: Weak::new(), model: 0 } };
            places.resize(PASSING_MAX / PASSING_PARTS, nobody);
        }
        places[place] = Passing { id, made };
    }

    fn in_passing(&self, id: u64) -> Option<Made> {
        let (part, place) = place_of(id);
        let places = self.passing[part].lock().unwrap_or_else(PoisonError::into_inner);
        places.get(place).filter(|passing| passing.id == id).map(|passing| passing.made.clone())
    }
}

/// In which part, and where in it.
fn place_of(id: u64) -> (usize, usize) {
    // The remainders fit.
    let within = |n: usize, divisor: u64| (id / divisor % n as u64) as usize;
    (within(PASSING_PARTS, 1), within(PASSING_MAX / PASSING_PARTS, PASSING_PARTS as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::backend::tests::member;

    #[test]
    fn makers_are_remembered_and_their_end_is_known() {
        for is_passing in [false, true] {
            let makers = Makers::default();
            let (a, b) = (member("a", 1, None), member("b", 1, None));
            makers.learn("responses", "1", is_passing, &a);
            makers.learn("responses", "2", is_passing, &a);
            makers.learn("responses", "2", is_passing, &b);
            makers.learn("videos", "1", is_passing, &b);
            let is = |collection: &str, id: &str, member: &Arc<Member>| matches!(makers.of(collection, id), Maker::Here(found) if Arc::ptr_eq(&found, member));
            assert!(is("responses", "1", &a) && is("responses", "2", &b) && is("videos", "1", &b));
            assert!(matches!(makers.of("responses", "3"), Maker::Unknown));
            assert!(matches!(makers.of("videos", "2"), Maker::Unknown));
            let model = makers.hash_of(&a.model.id);
            drop(a);
            assert!(matches!(makers.of("responses", "1"), Maker::Gone { model: of } if of == model));
        }
    }

    #[test]
    fn only_so_many_are_remembered() {
        let makers = Makers::default();
        let a = member("a", 1, None);
        for id in 0..ANSWERS_MAX + 10 {
            makers.learn("responses", &id.to_string(), false, &a);
        }
        assert_eq!((makers.kept.len(), makers.order.lock().unwrap().len()), (ANSWERS_MAX, ANSWERS_MAX));
        assert!(matches!(makers.of("responses", "9"), Maker::Unknown));
        assert!(matches!(makers.of("responses", "10"), Maker::Here(_)));
    }

    #[test]
    fn what_comes_by_the_thousand_pushes_nothing_else_out() {
        let makers = Makers::default();
        let a = member("a", 1, None);
        makers.learn("videos", "v", false, &a);
        for id in 0..ANSWERS_MAX * 2 {
            makers.learn("chat", &id.to_string(), true, &a);
        }
        assert!(matches!(makers.of("videos", "v"), Maker::Here(_)));
        assert!(matches!(makers.of("chat", &(ANSWERS_MAX * 2 - 1).to_string()), Maker::Here(_)));
        let held: usize = makers.passing.iter().map(|part| part.lock().unwrap().capacity()).sum();
        assert!(held <= PASSING_MAX, "{held}");
    }
}
