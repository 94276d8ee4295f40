//! Who made which answer: requests that name an answer by its id and no model (`GET /v1/responses/{id}`) go to the
//! backend that made it, because it alone remembers it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use dashmap::DashMap;

use crate::backend::Member;

/// Most answers remembered; the oldest are forgotten first. With ids of some 40 bytes they take 10 MB.
const ANSWERS_MAX: usize = 64 * 1024;

/// Ids of answers, and who made them. An id outlives its backend, so that its end can be told from an id never seen.
#[derive(Debug, Default)]
pub struct Makers {
    by_id: DashMap<Arc<str>, Weak<Member>>,
    /// In the order in which they came. Taken only when an answer with an id begins, which is seldom.
    order: Mutex<VecDeque<Arc<str>>>,
}

/// What is known of the maker of an answer.
#[derive(Debug)]
pub enum Maker {
    /// No answer of this id has passed.
    Unknown,
    /// Its backend is no more.
    Gone,
    /// It can be asked.
    Here(Arc<Member>),
}

impl Makers {
    /// Remembers that `member` made the answer with this id.
    pub fn learn(&self, id: &str, member: &Arc<Member>) {
        let id: Arc<str> = id.into();
        let is_new = self.by_id.insert(id.clone(), Arc::downgrade(member)).is_none();
        if !is_new {
            return;
        }
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.push_back(id);
        let forgotten = if order.len() > ANSWERS_MAX { order.pop_front() } else { None };
        drop(order);
        if let Some(id) = forgotten {
            self.by_id.remove(&id);
        }
    }

    /// Who made the answer with this id.
    pub fn of(&self, id: &str) -> Maker {
        match self.by_id.get(id).map(|maker| maker.upgrade()) {
            None => Maker::Unknown,
            Some(None) => Maker::Gone,
            Some(Some(member)) => Maker::Here(member),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::member;

    #[test]
    fn makers_are_remembered_and_their_end_is_known() {
        let makers = Makers::default();
        let (a, b) = (member("a", 1, None), member("b", 1, None));
        makers.learn("1", &a);
        makers.learn("2", &a);
        makers.learn("2", &b);
        let is =
            |id: &str, member: &Arc<Member>| matches!(makers.of(id), Maker::Here(found) if Arc::ptr_eq(&found, member));
        assert!(is("1", &a) && is("2", &b));
        assert!(matches!(makers.of("3"), Maker::Unknown));
        drop(a);
        assert!(matches!(makers.of("1"), Maker::Gone));
    }

    #[test]
    fn only_so_many_are_remembered() {
        let makers = Makers::default();
        let a = member("a", 1, None);
        for id in 0..ANSWERS_MAX + 10 {
            makers.learn(&id.to_string(), &a);
        }
        assert_eq!((makers.by_id.len(), makers.order.lock().unwrap().len()), (ANSWERS_MAX, ANSWERS_MAX));
        assert!(matches!(makers.of("9"), Maker::Unknown));
        assert!(matches!(makers.of("10"), Maker::Here(_)));
    }
}
