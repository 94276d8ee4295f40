//! Marks on the prompt of a request while its body goes by: hashes of ever longer prefixes of it, by which a replica that
//! has seen the beginning of the prompt can be found again.
//!
//! Engines keep what they computed for a prompt and use it for the next one that begins alike, so what has to be known
//! of a prompt is how far it equals earlier ones. A mark is the hash of everything up to its place: two prompts with
//! one mark in common are the same up to there. Nothing is parsed twice, copied or kept but the marks, whose number is
//! bounded.
//!
//! **Where the marks are.** Behind every element of an array that is an object or an array itself, because turns of a
//! conversation are elements of `messages` and `input`: the next turn repeats them byte for byte and goes on behind
//! them. And at fixed places within the bytes of a value, every 16 at first, later a 16th to a 32nd of what lies before
//! apart, for prompts that are one string and messages that only begin alike. The place of
//! a mark depends on the bytes before it alone, never on those behind or on how the body was cut into chunks. Of many
//! marks the first quarter is kept, for what is shared with others, and the last three, for the conversation's own end.
//!
//! **In what order.** Clients write the keys of a body in any order, `tools` and `system` often behind `messages`, but
//! engines put them in front. So each of the parts is hashed by itself, and when the prompt is taken they are joined in
//! the order in which engines read them: model and cache salt, tools, system text, messages.
//!
//! What is hashed are the bytes as written. Clients that write the same prompt in different ways, with other white space
//! or escapes, do not share marks; one client does with itself. A key written with escape sequences is not recognised.
//! Hashes are seeded, so that no client can aim at the marks of others; if two prompts do fall on one hash, one of
//! them goes to a replica that has to compute it anew, and nothing else happens.

/// Most bytes of one part of the prompt that are hashed; what lies behind is taken to be the same. A million bytes are
/// some 250 000 tokens.
pub const PROMPT_PART_BYTES_MAX: u32 = 1024 * 1024;

/// The smallest distance between two fixed marks, in bytes.
const STEP_BYTES_MIN: u32 = 16;
/// Fixed marks are at most this part of what lies before them apart.
const STEP_SHARE: u32 = 16;

/// The longest key that matters, with its quotes.
const KEY_BYTES_MAX: usize = 18;

/// What the hashes of this process begin with.
#[derive(Debug, Clone, Copy)]
pub struct PromptSeed([u64; 3]);

/// One mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Hash of the model and of the prompt up to here.
    pub key: u64,
    /// How much of the prompt lies before it, in bytes.
    pub bytes: u32,
}

/// What is known of the prompt of one request.
#[derive(Debug)]
pub struct Prompt {
    tap: Box<PromptTap>,
    /// Hash of the model: names of conversations are of one model each.
    model: u64,
    session: Option<u64>,
    user: Option<u64>,
    bytes: u32,
}

/// Reads the prompt of one body.
#[derive(Debug)]
pub(super) struct PromptTap {
    seed: PromptSeed,
    key: Key,
    /// What the value behind the last key is.
    next: Option<Part>,
    /// What the value is that is being read.
    reading: Option<Part>,
    tools: Marked<32>,
    system: Marked<64>,
    main: Marked<256>,
    salt: Hash,
    session: Hash,
    user: Hash,
}

/// What a value of the body's own object is to the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Tools,
    System,
    /// What grows from turn to turn.
    Main,
    /// Prompts with different salts share nothing in the engine's cache.
    Salt,
    /// Names a conversation, or requests that begin alike.
    Session,
    /// Names an end user, or no more than the application.
    User,
}

/// A key of the body's own object as it comes, with its quotes, as far as it can matter.
#[derive(Debug, Default)]
struct Key {
    bytes: [u8; KEY_BYTES_MAX],
    len: usize,
}

/// A part of the prompt with marks on it.
#[derive(Debug)]
struct Marked<const N: usize> {
    hash: Hash,
    /// Where the next fixed mark is.
    next: u32,
    /// Where the last mark is.
    last: u32,
    keys: [u64; N],
    bytes: [u32; N],
    /// How many marks there were.
    count: usize,
}

/// A hash of bytes that come in pieces: two words at a time are multiplied to 128 bits and folded, as wyhash does.
#[derive(Debug, Clone, Copy, Default)]
struct Hash {
    state: u64,
    len: u32,
    /// The last bytes that do not make two words yet, `len % 16` of them; zeros behind.
    tail: [u8; 16],
}

// === impl PromptSeed ===

impl PromptSeed {
    /// A seed from 64 bits of chance.
    pub fn new(chance: u64) -> PromptSeed {
        // SplitMix64, by Vigna: https://prng.di.unimi.it/splitmix64.c
        let mut state = chance;
        PromptSeed(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        }))
    }

    fn join(&self, one: u64, other: u64) -> u64 {
        fold(one ^ self.0[1], other ^ self.0[2])
    }

    fn hash(&self, bytes: &[u8]) -> u64 {
        let mut hash = Hash::default();
        hash.push(self, bytes);
        hash.end(self)
    }
}

// === impl Prompt ===

impl Prompt {
    /// The marks, from the shortest prefix to the longest.
    pub fn marks(&self) -> impl DoubleEndedIterator<Item = Mark> {
        self.tap.tools.marks().chain(self.tap.system.marks()).chain(self.tap.main.marks())
    }

    /// Hash of the model that it is for.
    pub fn model(&self) -> u64 {
        self.model
    }

    /// Bytes of the prompt that were read.
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// Hash of what names the conversation, if something does.
    pub fn session(&self) -> Option<u64> {
        self.session
    }

    /// Hash of what names the user, if something does. It may be one name for all requests of an application.
    pub fn user(&self) -> Option<u64> {
        self.user
    }

    /// The request's head has named the conversation, which stands above what the body says.
    pub fn set_session(&mut self, name: &[u8]) {
        if !name.is_empty() {
            let seed = &self.tap.seed;
            self.session = Some(seed.join(seed.join(seed.hash(name), Part::Session as u64), self.model));
        }
    }
}

// === impl PromptTap ===

impl PromptTap {
    pub(super) fn new(seed: PromptSeed) -> Box<PromptTap> {
        Box::new(PromptTap {
            seed,
            key: Key::default(),
            next: None,
            reading: None,
            tools: Marked::new(),
            system: Marked::new(),
            main: Marked::new(),
            salt: Hash::default(),
            session: Hash::default(),
            user: Hash::default(),
        })
    }

    /// Takes a stretch of a key of the body's own object, quotes included.
    pub(super) fn key(&mut self, bytes: &[u8]) {
        self.key.push(bytes);
    }

    /// The key has ended.
    pub(super) fn key_ended(&mut self) {
        self.next = Part::of(&self.key.bytes[..self.key.len]);
        self.key.len = 0;
    }

    /// The value behind the last key begins with this byte. Whether its bytes matter.
    pub(super) fn begin(&mut self, first: u8) -> bool {
        let named = |part: &Part| first == b'"' || !matches!(part, Part::Session | Part::User);
        self.reading = self.next.take().filter(named);
        // The last one counts, where they are not joined.
        match self.reading {
            Some(Part::Session) => self.session = Hash::default(),
            Some(Part::User) => self.user = Hash::default(),
            _ => {}
        }
        self.reading.is_some()
    }

    /// A value that matters is being read.
    pub(super) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Takes a stretch of the value.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let seed = &self.seed;
        match self.reading {
            Some(Part::Tools) => self.tools.push(seed, bytes),
            Some(Part::System) => self.system.push(seed, bytes),
            Some(Part::Main) => self.main.push(seed, bytes),
            Some(Part::Salt) => self.salt.push(seed, bytes),
            Some(Part::Session) => self.session.push(seed, bytes),
            Some(Part::User) => self.user.push(seed, bytes),
            None => {}
        }
    }

    /// An element of the value has ended.
    pub(super) fn element_ended(&mut self) {
        let seed = &self.seed;
        match self.reading {
            Some(Part::Tools) => self.tools.mark(seed),
            Some(Part::System) => self.system.mark(seed),
            Some(Part::Main) => self.main.mark(seed),
            Some(Part::Salt | Part::Session | Part::User) | None => {}
        }
    }

    /// The value has ended.
    pub(super) fn end(&mut self) {
        self.reading = None;
    }

    /// Joins the parts, as far as they have been read, to the prompt for this model. A part in front of the main one
    /// counts only when it is whole.
    pub(super) fn finish(mut self: Box<Self>, model: &str) -> Prompt {
        let seed = self.seed;
        let model = seed.hash(model.as_bytes());
        let mut before = (model, 0);
        if self.salt.len > 0 && self.reading != Some(Part::Salt) {
            before.0 = seed.join(before.0, self.salt.end(&seed));
        }
        let reading = self.reading;
        before = self.tools.join(&seed, before, Part::Tools, reading);
        before = self.system.join(&seed, before, Part::System, reading);
        self.main.join(&seed, before, Part::Main, None);
        let named = |hash: &Hash, part: Part| {
            // Two quotes name nothing.
            let is_name = hash.len > 2 && reading != Some(part);
            is_name.then(|| seed.join(seed.join(hash.end(&seed), part as u64), model))
        };
        Prompt {
            model,
            session: named(&self.session, Part::Session),
            user: named(&self.user, Part::User),
            bytes: before.1 + self.main.hash.len,
            tap: self,
        }
    }
}

// === impl Part ===

impl Part {
    /// What the value of this key is; the key comes with its quotes.
    fn of(key: &[u8]) -> Option<Part> {
        Some(match key {
            b"\"messages\"" | b"\"prompt\"" | b"\"input\"" => Part::Main,
            b"\"system\"" | b"\"instructions\"" => Part::System,
            b"\"tools\"" | b"\"functions\"" => Part::Tools,
            b"\"cache_salt\"" => Part::Salt,
            b"\"prompt_cache_key\"" | b"\"session_id\"" => Part::Session,
            b"\"user\"" => Part::User,
            _ => return None,
        })
    }
}

// === impl Key ===

impl Key {
    fn push(&mut self, bytes: &[u8]) {
        // What does not fit ends without its quote, and so is no key that matters.
        let fits = bytes.len().min(KEY_BYTES_MAX - self.len);
        self.bytes[self.len..self.len + fits].copy_from_slice(&bytes[..fits]);
        self.len += fits;
    }
}

// === impl Marked ===

impl<const N: usize> Marked<N> {
    /// So many marks are kept from the start, and the others from the end.
    const FIRST: usize = N / 4;

    fn new() -> Marked<N> {
        Marked { hash: Hash::default(), next: STEP_BYTES_MIN, last: 0, keys: [0; N], bytes: [0; N], count: 0 }
    }

    fn push(&mut self, seed: &PromptSeed, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.hash.len < PROMPT_PART_BYTES_MAX {
            let room = (self.next - self.hash.len) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.hash.push(seed, now);
            if self.hash.len == self.next {
                self.mark(seed);
                self.next = next_fixed(self.next);
            }
            bytes = later;
        }
    }

    fn mark(&mut self, seed: &PromptSeed) {
        // The place may be a fixed one and the end of an element, and past the limit all are one.
        if self.last == self.hash.len {
            return;
        }
        self.last = self.hash.len;
        let slot = Self::slot(self.count);
        self.keys[slot] = self.hash.end(seed);
        self.bytes[slot] = self.hash.len;
        self.count += 1;
    }

    /// Puts `before`, a hash and a number of bytes, in front of every mark; returns what the part and all before it come
    /// to. The part is nothing if it is still being read.
    fn join(&mut self, seed: &PromptSeed, before: (u64, u32), part: Part, reading: Option<Part>) -> (u64, u32) {
        if reading == Some(part) {
            self.count = 0;
        }
        if self.hash.len == 0 || reading == Some(part) {
            return before;
        }
        let before = (seed.join(before.0, part as u64), before.1);
        for slot in 0..self.count.min(N) {
            self.keys[slot] = seed.join(before.0, self.keys[slot]);
            self.bytes[slot] += before.1;
        }
        (seed.join(before.0, self.hash.end(seed)), before.1 + self.hash.len)
    }

    fn marks(&self) -> impl DoubleEndedIterator<Item = Mark> {
        let first = 0..self.count.min(Self::FIRST);
        let last = first.end.max(self.count.saturating_sub(N - Self::FIRST))..self.count;
        first.chain(last).map(|mark| {
            let slot = Self::slot(mark);
            Mark { key: self.keys[slot], bytes: self.bytes[slot] }
        })
    }

    fn slot(mark: usize) -> usize {
        if mark < Self::FIRST { mark } else { Self::FIRST + (mark - Self::FIRST) % (N - Self::FIRST) }
    }
}

/// The fixed place behind `at`, which is one itself.
fn next_fixed(at: u32) -> u32 {
    let step = 1 << (at / STEP_SHARE).max(STEP_BYTES_MIN).ilog2();
    (at / step + 1) * step
}

// === impl Hash ===

impl Hash {
    fn push(&mut self, seed: &PromptSeed, mut bytes: &[u8]) {
        let held = self.len as usize % 16;
        self.len = self.len.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        if held > 0 {
            let (fill, rest) = bytes.split_at(bytes.len().min(16 - held));
            self.tail[held..held + fill.len()].copy_from_slice(fill);
            if held + fill.len() < 16 {
                return;
            }
            self.state = absorb(self.state, seed, &self.tail);
            self.tail = [0; 16];
            bytes = rest;
        }
        let (pairs, rest) = bytes.as_chunks::<16>();
        self.state = pairs.iter().fold(self.state, |state, pair| absorb(state, seed, pair));
        self.tail[..rest.len()].copy_from_slice(rest);
    }

    /// The hash of what has come so far.
    fn end(&self, seed: &PromptSeed) -> u64 {
        let state = absorb(self.state, seed, &self.tail);
        fold(state ^ seed.0[1], u64::from(self.len) ^ seed.0[2])
    }
}

/// Takes in two words.
fn absorb(state: u64, seed: &PromptSeed, pair: &[u8; 16]) -> u64 {
    let words = u128::from_le_bytes(*pair);
    fold(words as u64 ^ seed.0[0], (words >> 64) as u64 ^ seed.0[1] ^ state)
}

fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests;
