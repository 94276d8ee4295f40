//! Which replica holds which prefix: a table of fixed size that forgets what has not been used for longest.
//!
//! It is cut into shards with a lock each, held for one look at a few entries that lie side by side. Keys are hashes, so
//! they choose shard and row by themselves. Within a row of eight the least recently used one makes room, which is nearly
//! the same as the least recently used of all.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most prefixes remembered. With some 150 bytes of prompt between two marks that is 20 MB of text, or 5 million tokens,
/// which is as much as ten large accelerators have room for.
const ENTRIES_MAX: usize = 128 * 1024;

/// How many holders of one prefix are remembered.
pub(super) const REPLICAS: usize = 4;

const SHARDS: usize = 64;
const ROW: usize = 8;
const ROWS: usize = ENTRIES_MAX / SHARDS / ROW;

#[derive(Debug)]
pub(super) struct Holders {
    shards: Box<[Mutex<Shard>]>,
}

/// What is known of a prefix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    /// The replicas that have it, the last one first; 0 for none.
    pub(super) replicas: [u32; REPLICAS],
    /// How often it has been the longest that was known of a prompt.
    pub(super) continued: u32,
}

#[derive(Debug)]
struct Shard {
    entries: Box<[Entry]>,
    /// Grows with every use.
    uses: u32,
}

/// Empty if it has no holder.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    key: u64,
    replicas: [u32; REPLICAS],
    /// When it was learned last, in uses of the shard.
    used: u32,
    continued: u32,
}

// === impl Holders ===

impl Holders {
    pub(super) fn new() -> Holders {
        let shard = || Mutex::new(Shard { entries: vec![Entry::default(); ROWS * ROW].into(), uses: 0 });
        Holders { shards: (0..SHARDS).map(|_| shard()).collect() }
    }

    /// The replicas that have the prefix. `continues`: and a prompt has come that goes on from here.
    pub(super) fn find(&self, key: u64, continues: bool) -> Option<Found> {
        let mut shard = self.shard(key);
        let entry = shard.row(key).iter_mut().find(|entry| entry.is(key))?;
        let found = Found { replicas: entry.replicas, continued: entry.continued };
        entry.continued = entry.continued.saturating_add(u32::from(continues));
        Some(found)
    }

    /// The replica has the prefix from now on.
    pub(super) fn learn(&self, key: u64, replica: u32) {
        let mut shard = self.shard(key);
        shard.uses = shard.uses.wrapping_add(1);
        let now = shard.uses;
        let row = shard.row(key);
        let place = row.iter().position(|entry| entry.is(key)).unwrap_or_else(|| {
            let age = |entry: &Entry| if entry.is_empty() { u32::MAX } else { now.wrapping_sub(entry.used) };
            let oldest = (0..ROW).max_by_key(|&place| age(&row[place])).unwrap_or(0);
            row[oldest] = Entry { key, ..Entry::default() };
            oldest
        });
        let entry = &mut row[place];
        entry.used = now;
        let known = entry.replicas.iter().position(|&known| known == replica).unwrap_or(REPLICAS - 1);
        entry.replicas[..=known].rotate_right(1);
        entry.replicas[0] = replica;
    }

    /// These replicas have nothing any more.
    pub(super) fn forget(&self, gone: &[u32]) {
        for shard in &self.shards {
            let mut shard = lock(shard);
            for entry in &mut shard.entries {
                if entry.replicas.iter().any(|replica| gone.contains(replica)) {
                    let mut kept = [0; REPLICAS];
                    let alive = entry.replicas.into_iter().filter(|replica| !gone.contains(replica));
                    kept.iter_mut().zip(alive).for_each(|(place, replica)| *place = replica);
                    entry.replicas = kept;
                }
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        let len = |shard: &Mutex<Shard>| lock(shard).entries.iter().filter(|entry| !entry.is_empty()).count();
        self.shards.iter().map(len).sum()
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, Shard> {
        lock(&self.shards[key as usize % SHARDS])
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Shard ===

impl Shard {
    /// The entries among which the key is, if it is anywhere.
    fn row(&mut self, key: u64) -> &mut [Entry] {
        let row = (key >> 32) as usize % ROWS;
        &mut self.entries[row * ROW..][..ROW]
    }
}

// === impl Entry ===

impl Entry {
    fn is(&self, key: u64) -> bool {
        self.key == key && !self.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.replicas[0] == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key of this shard and row.
    fn key(shard: u64, row: u64, n: u64) -> u64 {
        shard | row << 32 | n << 48
    }

    #[test]
    fn the_last_holders_are_known_the_last_one_first() {
        let holders = Holders::new();
        assert!(holders.find(1, false).is_none());
        for replica in [1, 2, 3, 1, 4, 5, 4] {
            holders.learn(1, replica);
        }
        assert_eq!(holders.find(1, false).unwrap().replicas, [4, 5, 1, 3]);
        assert_eq!(holders.len(), 1);
    }

    #[test]
    fn continuations_are_counted() {
        let holders = Holders::new();
        holders.learn(1, 1);
        let counts: Vec<u32> = [true, false, true, false].map(|c| holders.find(1, c).unwrap().continued).into();
        assert_eq!(counts, [0, 1, 1, 2]);
        holders.learn(1, 2);
        assert_eq!(holders.find(1, false).unwrap().continued, 2);
    }

    #[test]
    fn what_was_not_used_for_longest_is_forgotten() {
        let holders = Holders::new();
        for n in 0..8 {
            holders.learn(key(3, 5, n), 1);
        }
        // In use again; only looking at it is no use.
        holders.learn(key(3, 5, 0), 1);
        assert!(holders.find(key(3, 5, 1), true).is_some());
        for n in 8..10 {
            holders.learn(key(3, 5, n), 1);
        }
        let known: Vec<u64> = (0..10).filter(|&n| holders.find(key(3, 5, n), false).is_some()).collect();
        assert_eq!(known, [0, 3, 4, 5, 6, 7, 8, 9]);
        // A place that is empty is taken first.
        holders.learn(key(3, 5, 20), 2);
        holders.forget(&[2]);
        holders.learn(key(3, 5, 21), 1);
        assert!(holders.find(key(3, 5, 4), false).is_some());
    }

    #[test]
    fn a_replica_that_is_gone_is_forgotten() {
        let holders = Holders::new();
        for n in 0..1_000_u64 {
            holders.learn(n.wrapping_mul(0x9e37_79b9_7f4a_7c15), 1 + n as u32 % 3);
        }
        holders.learn(7, 1);
        holders.learn(7, 2);
        holders.learn(7, 3);
        assert_eq!(holders.len(), 1_001);
        holders.forget(&[2]);
        assert_eq!(holders.len(), 1_001 - 333);
        assert_eq!(holders.find(7, false).unwrap().replicas, [3, 1, 0, 0]);
        holders.forget(&[1, 3]);
        assert_eq!(holders.len(), 0);
    }

    #[test]
    fn it_never_grows() {
        let holders = Holders::new();
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..3 * ENTRIES_MAX {
            holders.learn(rng.u64(..), 1);
        }
        assert!((ENTRIES_MAX * 99 / 100..=ENTRIES_MAX).contains(&holders.len()), "{}", holders.len());
        let bytes = std::mem::size_of::<Entry>() * holders.shards.iter().map(|s| lock(s).entries.len()).sum::<usize>();
        assert_eq!(bytes, 4 * 1024 * 1024);
    }

    #[test]
    fn workers_may_learn_and_look_at_once() {
        let holders = Holders::new();
        std::thread::scope(|scope| {
            for replica in 1..=4 {
                let holders = &holders;
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(u64::from(replica));
                    for _ in 0..20_000 {
                        let key = rng.u64(0..500);
                        holders.learn(key, replica);
                        let found = holders.find(key, true).unwrap();
                        assert!(found.replicas.iter().all(|replica| *replica <= 4));
                        let mut known: Vec<u32> = found.replicas.into_iter().filter(|replica| *replica > 0).collect();
                        known.sort_unstable();
                        known.dedup();
                        assert_eq!(known.len(), found.replicas.iter().filter(|replica| **replica > 0).count());
                    }
                });
            }
        });
        // Row 0 of each shard has room for 8 of the keys.
        assert!(holders.len() <= 500);
    }
}
