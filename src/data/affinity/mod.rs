//! Sends prompts that begin alike to the replica that has computed their beginning (`PROXY_BALANCE=prefix`). Pure: marks
//! on a prompt and the load of a pool come in, a preference goes out.
//!
//! Engines keep the keys and values of prompts they have computed, and a conversation repeats all of it in every turn: a
//! replica that served the turn before has to compute the new message only. So what is remembered here is which replica
//! has been sent which prefix, as hashes ([`Prompt::marks`]). That is a guess, since no engine says what it has thrown
//! away, but it needs no help from engines and cannot do harm: a wrong guess costs what every other choice would have cost.
//!
//! Three rules decide, in this order ([`Affinity::prefer`]):
//!
//! 1. *The longest prefix wins.* A prefix that is continued once or twice is a conversation, and its next turn stays where
//!    it is. One that is continued more often is shared, a system prompt or a template, and goes to any of its
//!    holders that does not have more than its share of recent requests.
//! 2. *Load stands above it.* A holder with more than 1.25 times the mean in flight is left; the replica that gets the request
//!    instead is a holder from then on.
//! 3. *A prefix without a holder is spread*, by the policy for all else, over those that have no more than their share.
//!
//! The share of recent requests matters because load alone does not spread anything where there is little of it: with
//! one request at a time every replica is idle, and the first one to see a common system prompt would get them all.
//!
//! Names of conversations (a header, `prompt_cache_key`) decide where marks leave a choice, and where there are none.

mod holders;
mod shares;

use std::{
    collections::HashSet,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::wire::scan::{Prompt, PromptSeed};

use holders::Holders;
use shares::{Loads, Shares};

/// Headers by which clients name a conversation, the most telling first. Codex sends `session-id` and `thread-id` (and
/// `session_id`, `conversation_id` before), Claude Code its own; the others are common among gateways.
pub const SESSION_HEADERS: [&str; 9] = [
    "x-claude-code-session-id",
    "x-session-id",
    "session-id",
    "session_id",
    "x-conversation-id",
    "conversation_id",
    "thread-id",
    "x-thread-id",
    "x-session-affinity",
];

/// How much of a body is waited for before a replica is chosen, in bytes: the prompt may stand behind the model. An engine
/// cannot begin before it has all of it either, so this delays no more than the overlap of two transfers.
pub const WAIT_BYTES_MAX: u64 = 1024 * 1024;

/// A prefix that has been continued so often is shared. Not one, because a short turn of a long text may not reach the
/// next mark, and then the turn behind it continues the same prefix.
const SHARED_BY: u32 = 2;

/// Which replicas have which prefixes, for all models.
#[derive(Debug)]
pub struct Affinity {
    seed: PromptSeed,
    holders: Holders,
    shares: Shares,
    /// The replicas of the last routing table that was seen. A request that still has an older one may teach a replica
    /// that is not among them; what it left is forgotten as anything that is not used.
    known: Mutex<HashSet<u32>>,
    generation: AtomicU64,
}

/// One that may get the request.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Its place in the pool.
    pub index: usize,
    /// The incarnation of its backend, as a number that no other gets; not 0.
    pub replica: u32,
    /// Requests it has.
    pub in_flight: u64,
    /// Its share of traffic, at least 1.
    pub weight: u32,
}

/// Where a request should go.
#[derive(Debug)]
pub enum Preference<'a> {
    /// To this place in the pool.
    At {
        /// The place.
        index: usize,
        /// How much of the prompt is there, in bytes.
        bytes: u32,
    },
    /// To any of those that these shares allow.
    Spread(Spread<'a>),
}

/// Tells whom something new may be sent to.
#[derive(Debug)]
pub struct Spread<'a> {
    loads: Loads<'a>,
    /// No other replica is left.
    all: bool,
}

// === impl Affinity ===

impl Affinity {
    /// Remembers nothing yet. Takes 4 MiB, and never more. Prompts must be marked with this seed.
    pub fn new(seed: PromptSeed) -> Affinity {
        Affinity {
            seed,
            holders: Holders::new(),
            shares: Shares::new(),
            known: Mutex::default(),
            generation: AtomicU64::new(0),
        }
    }

    /// What prompts must be marked with.
    pub fn seed(&self) -> PromptSeed {
        self.seed
    }

    /// Where among `pool` the request with this prompt should go. The pool is all who may get it.
    pub fn prefer(&self, prompt: &Prompt, pool: impl Iterator<Item = Candidate> + Clone) -> Preference<'_> {
        let loads = self.shares.loads(prompt.model(), pool.clone());
        let session = prompt.session().and_then(|key| self.holders.find(key, false));
        let user = prompt.user().and_then(|key| self.holders.find(key, false));
        let is_last =
            |named: &Option<holders::Found>, of: &Candidate| named.is_some_and(|found| found.replicas[0] == of.replica);
        let mut is_longest = true;
        let mut is_shared = false;
        // Shorter prefixes mostly have the same holders.
        let mut refused = [0; holders::REPLICAS];
        for mark in prompt.marks().rev() {
            let Some(found) = self.holders.find(mark.key, is_longest) else { continue };
            // Whatever is shorter than the longest is shared by two at least.
            is_shared |= found.continued >= SHARED_BY || !is_longest;
            is_longest = false;
            if found.replicas == refused {
                continue;
            }
            let may = pool.clone().filter(|one| {
                found.replicas.contains(&one.replica)
                    && !loads.is_busy(one)
                    && (!is_shared || !loads.has_more_than_its_share(one) || is_last(&session, one))
            });
            let best = may.min_by(|a, b| {
                let order = is_last(&session, b).cmp(&is_last(&session, a));
                let order = order.then_with(|| Loads::compare(a, b));
                let order = order.then_with(|| is_last(&user, b).cmp(&is_last(&user, a)));
                order.then_with(|| loads.compare_shares(a, b))
            });
            if let Some(best) = best {
                return Preference::At { index: best.index, bytes: mark.bytes };
            }
            refused = found.replicas;
        }
        let named = pool.clone().find(|one| is_last(&session, one));
        if let Some(named) = named.filter(|one| !loads.is_busy(one)) {
            return Preference::At { index: named.index, bytes: 0 };
        }
        let mut spread = Spread { loads, all: false };
        spread.all = !pool.clone().any(|one| spread.allows(&one));
        Preference::Spread(spread)
    }

    /// A place for the request has been claimed: the replica will have this prompt.
    pub fn learn(&self, prompt: &Prompt, replica: u32) {
        self.shares.count(prompt.model(), replica);
        for key in prompt.marks().map(|mark| mark.key).chain(prompt.session()).chain(prompt.user()) {
            self.holders.learn(key, replica);
        }
    }

    /// Forgets the replicas that have gone since the last call. `living` are those of the routing table of this generation;
    /// while that is the same, nothing is done. Going through the memory takes less than a millisecond, and holds up nobody
    /// else for more than a few microseconds.
    pub fn follow(&self, generation: u64, living: impl Iterator<Item = u32>) {
        if self.generation.load(Ordering::Relaxed) >= generation {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have been here, with a later table even.
        if self.generation.fetch_max(generation, Ordering::Relaxed) >= generation {
            return;
        }
        let living: HashSet<u32> = living.collect();
        let gone: Vec<u32> = known.difference(&living).copied().collect();
        *known = living;
        drop(known);
        if !gone.is_empty() {
            self.holders.forget(&gone);
        }
    }

    /// How many prefixes are remembered.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// === impl Spread ===

impl Spread<'_> {
    /// Whether it may go to this one of the pool; at least to one of them it may.
    pub fn allows(&self, candidate: &Candidate) -> bool {
        self.all || !self.loads.is_busy(candidate) && !self.loads.has_more_than_its_share(candidate)
    }
}

#[cfg(test)]
mod tests;
