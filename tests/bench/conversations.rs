//! Conversations with several applications, over replicas whose caches are bounded, in virtual time: how much of what
//! is sent has been computed before where it is sent. Seeded and pure; the bodies are real ones and go through the scanner.
//!
//! A replica computes one prompt after the other, the part that is not in its cache, then makes its answer beside the
//! others. Its cache keeps whole messages, the last used ones, and forgets the ends of conversations before their
//! beginnings, as engines do. Nobody tells a policy what is in a cache, except the oracle.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    fmt::Write as _,
};

use inference_proxy::{
    data::affinity::{Affinity, Candidate, Preference},
    wire::scan::{ModelScanner, Prompt, PromptSeed},
};

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mix {
    pub(crate) replicas: usize,
    /// How much prompt the cache of a replica holds, in bytes.
    pub(crate) cache_bytes: usize,
    pub(crate) applications: usize,
    pub(crate) conversations: usize,
    /// Turns of a conversation, on average.
    pub(crate) turns: f64,
    /// Mean time between new conversations.
    pub(crate) between_s: f64,
    /// Mean time between an answer and the next turn.
    pub(crate) think_s: f64,
    /// Bytes of prompt that a replica computes in a second.
    pub(crate) prefill_bytes_per_s: f64,
    /// Bytes of an answer that it makes in a second.
    pub(crate) decode_bytes_per_s: f64,
    /// Bytes of the longest system prompt, tools included.
    pub(crate) system_bytes_max: usize,
    /// One conversation in so many brings a document.
    pub(crate) document_in: usize,
}

/// Who chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    RoundRobin,
    Least,
    Prefix,
    /// Sees what is in the caches, and keeps to the same bound of load.
    Oracle,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) prompt_bytes: u64,
    pub(crate) cached_bytes: u64,
    /// Requests of the busiest replica over the mean.
    pub(crate) max_requests: f64,
    /// Mean in flight of the busiest replica over the mean of all.
    pub(crate) max_in_flight: f64,
    /// Later turns at the replica of the turn before.
    pub(crate) stayed: f64,
    pub(crate) first_byte_mean_s: f64,
    pub(crate) first_byte_p95_s: f64,
}

struct Application {
    system: String,
    tools: Option<String>,
    /// In which order and by which names its client writes.
    dialect: usize,
}

struct Conversation {
    application: usize,
    messages: Vec<String>,
    turns: usize,
    last: Option<usize>,
}

#[derive(Default)]
struct Replica {
    in_flight: u64,
    /// When it has computed all prompts that it has.
    prefill_free_s: f64,
    cache: Cache,
    requests: u64,
    in_flight_seconds: f64,
    since_s: f64,
}

/// Segments of prompts by a number for all up to their end; the last used are kept.
#[derive(Default)]
struct Cache {
    segments: HashMap<u64, (u64, usize)>,
    by_use: BTreeMap<u64, u64>,
    bytes: usize,
    uses: u64,
}

/// Times to be sorted by.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct At(f64);

impl Eq for At {}

#[expect(clippy::derive_ord_xor_partial_ord, reason = "there is no NaN among times")]
impl Ord for At {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Turn(usize),
    Done { replica: usize, conversation: usize },
}

impl Mix {
    /// Runs the mix; the same seed is the same traffic for every policy, but for when turns come.
    pub(crate) fn run(&self, policy: Policy, seed: u64) -> Outcome {
        let mut rng = fastrand::Rng::with_seed(seed);
        let applications: Vec<Application> = (0..self.applications).map(|i| self.application(i, &mut rng)).collect();
        let mut conversations: Vec<Conversation> =
            (0..self.conversations).map(|_| self.conversation(&applications, &mut rng)).collect();
        let mut events = BinaryHeap::new();
        let mut at = 0.0;
        for conversation in 0..conversations.len() {
            at += exponential(&mut rng, self.between_s);
            events.push(Reverse((At(at), Event::Turn(conversation))));
        }

        let prompt_seed = PromptSeed::new(rng.u64(..));
        let affinity = Affinity::new(prompt_seed);
        let mut replicas: Vec<Replica> = (0..self.replicas).map(|_| Replica::default()).collect();
        let mut turn = 0;
        let (mut prompt_bytes, mut cached_bytes, mut later, mut stayed) = (0_u64, 0_u64, 0_u64, 0_u64);
        let mut first_bytes_s = Vec::new();
        let mut end_s = 0.0;
        while let Some(Reverse((At(now), event))) = events.pop() {
            end_s = now;
            match event {
                Event::Turn(index) => {
                    let conversation = &mut conversations[index];
                    let application = &applications[conversation.application];
                    let asked = rng.usize(30..2_000);
                    conversation.messages.push(message("user", &text(&mut rng, asked)));
                    let segments = application.segments(&conversation.messages);
                    let bytes: usize = segments.iter().map(|segment| segment.1).sum();
                    let prompt = (policy == Policy::Prefix)
                        .then(|| application.prompt(&conversation.messages, prompt_seed, &mut rng));
                    let chosen = match policy {
                        Policy::RoundRobin => {
                            turn += 1;
                            turn % replicas.len()
                        }
                        Policy::Least => least(&replicas, |_| true, &mut rng),
                        Policy::Oracle => oracle(&replicas, &segments, &mut rng),
                        Policy::Prefix => by_affinity(&affinity, &replicas, prompt.as_ref().unwrap(), &mut rng),
                    };
                    if let Some(prompt) = prompt {
                        affinity.learn(&prompt, chosen as u32 + 1);
                    }
                    if let Some(last) = conversation.last.replace(chosen) {
                        later += 1;
                        stayed += u64::from(last == chosen);
                    }
                    let replica = &mut replicas[chosen];
                    let cached = replica.cache.cached(&segments);
                    replica.cache.add(&segments, self.cache_bytes);
                    prompt_bytes += bytes as u64;
                    cached_bytes += cached as u64;
                    replica.requests += 1;
                    replica.changes(now, 1);
                    let begins = replica.prefill_free_s.max(now);
                    replica.prefill_free_s = begins + (bytes - cached) as f64 / self.prefill_bytes_per_s;
                    first_bytes_s.push(replica.prefill_free_s - now);
                    let answer = rng.usize(100..3_000);
                    conversation.messages.push(message("assistant", &text(&mut rng, answer)));
                    let done = replica.prefill_free_s + answer as f64 / self.decode_bytes_per_s;
                    events.push(Reverse((At(done), Event::Done { replica: chosen, conversation: index })));
                }
                Event::Done { replica, conversation } => {
                    replicas[replica].changes(now, -1);
                    conversations[conversation].turns -= 1;
                    if conversations[conversation].turns > 0 {
                        let next = now + exponential(&mut rng, self.think_s);
                        events.push(Reverse((At(next), Event::Turn(conversation))));
                    }
                }
            }
        }
        for replica in &mut replicas {
            replica.changes(end_s, 0);
        }
        first_bytes_s.sort_by(f64::total_cmp);
        Outcome {
            prompt_bytes,
            cached_bytes,
            max_requests: max_over_mean(replicas.iter().map(|replica| replica.requests as f64)),
            max_in_flight: max_over_mean(replicas.iter().map(|replica| replica.in_flight_seconds)),
            stayed: stayed as f64 / later.max(1) as f64,
            first_byte_mean_s: first_bytes_s.iter().sum::<f64>() / first_bytes_s.len() as f64,
            first_byte_p95_s: first_bytes_s[first_bytes_s.len() * 95 / 100],
        }
    }

    fn application(&self, index: usize, rng: &mut fastrand::Rng) -> Application {
        let mut bytes = rng.usize(self.system_bytes_max / 10..=self.system_bytes_max);
        let tools = index.is_multiple_of(2).then(|| {
            let each = bytes / 2 / 8;
            bytes /= 2;
            let tool = |rng: &mut fastrand::Rng| format!(r#"{{"name":"t","description":"{}"}}"#, text(rng, each));
            format!("[{}]", (0..8).map(|_| tool(rng)).collect::<Vec<_>>().join(","))
        });
        Application { system: text(rng, bytes), tools, dialect: index }
    }

    fn conversation(&self, applications: &[Application], rng: &mut fastrand::Rng) -> Conversation {
        // Some applications are used far more than others.
        let application = (applications.len() as f64 * rng.f64().powi(2)) as usize;
        let mut messages = Vec::new();
        if applications[application].has_system_message() {
            messages.push(message("system", &applications[application].system));
        }
        if rng.usize(0..self.document_in) == 0 {
            let bytes = rng.usize(5_000..60_000);
            messages.push(message("user", &text(rng, bytes)));
        }
        let mut turns = 1;
        while rng.f64() < 1.0 - 1.0 / self.turns {
            turns += 1;
        }
        Conversation { application, messages, turns, last: None }
    }
}

impl Application {
    fn has_system_message(&self) -> bool {
        self.dialect % 4 < 2
    }

    /// The request as a client writes it, through the scanner.
    fn prompt(&self, messages: &[String], seed: PromptSeed, rng: &mut fastrand::Rng) -> Prompt {
        let messages = messages.join(",");
        let tools = self.tools.as_ref().map_or(String::new(), |tools| format!(r#","tools":{tools}"#));
        let system = &self.system;
        let body = match self.dialect % 4 {
            0 => format!(r#"{{"messages":[{messages}],"model":"m"{tools},"stream":true}}"#),
            1 => format!(r#"{{"model":"m","temperature":0.2,"messages":[{messages}]{tools}}}"#),
            2 => format!(r#"{{"max_tokens":500,"messages":[{messages}],"model":"m","system":"{system}"{tools}}}"#),
            _ => format!(r#"{{"model":"m","instructions":"{system}"{tools},"input":[{messages}],"stream":true}}"#),
        };
        let mut scanner = ModelScanner::json();
        scanner.mark_prompt(seed);
        let mut rest = body.as_bytes();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rng.usize(1..=16 * 1024).min(rest.len()));
            scanner.feed(now).unwrap();
            rest = later;
        }
        scanner.finish().unwrap();
        scanner.take_prompt("m").unwrap()
    }

    /// The prompt as an engine sees it: for each of its segments a number for all up to its end, and its bytes.
    fn segments(&self, messages: &[String]) -> Vec<(u64, usize)> {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let system = (!self.has_system_message()).then_some(&self.system);
        let all = self.tools.iter().chain(system).chain(messages);
        let mut hasher = DefaultHasher::new();
        all.map(|segment| {
            segment.hash(&mut hasher);
            (hasher.finish(), segment.len())
        })
        .collect()
    }
}

impl Replica {
    fn changes(&mut self, now: f64, by: i64) {
        self.in_flight_seconds += self.in_flight as f64 * (now - self.since_s);
        self.since_s = now;
        self.in_flight = self.in_flight.checked_add_signed(by).unwrap();
    }
}

impl Cache {
    fn cached(&self, segments: &[(u64, usize)]) -> usize {
        segments.iter().take_while(|(key, _)| self.segments.contains_key(key)).map(|(_, bytes)| bytes).sum()
    }

    fn add(&mut self, segments: &[(u64, usize)], most_bytes: usize) {
        // From the end, so that the beginning is the last used.
        for &(key, bytes) in segments.iter().rev() {
            self.uses += 1;
            match self.segments.insert(key, (self.uses, bytes)) {
                Some((before, _)) => drop(self.by_use.remove(&before)),
                None => self.bytes += bytes,
            }
            self.by_use.insert(self.uses, key);
        }
        while self.bytes > most_bytes {
            let (_, key) = self.by_use.pop_first().unwrap();
            self.bytes -= self.segments.remove(&key).unwrap().1;
        }
    }
}

fn least(replicas: &[Replica], may: impl Fn(usize) -> bool, rng: &mut fastrand::Rng) -> usize {
    let may = (0..replicas.len()).filter(|&index| may(index));
    may.min_by_key(|&index| (replicas[index].in_flight, rng.u32(..))).unwrap()
}

fn oracle(replicas: &[Replica], segments: &[(u64, usize)], rng: &mut fastrand::Rng) -> usize {
    let mean = replicas.iter().map(|replica| replica.in_flight as f64).sum::<f64>() / replicas.len() as f64;
    let is_free = |replica: &Replica| replica.in_flight as f64 + 1.0 <= (1.25 * mean).max(mean + 4.0);
    let best = (0..replicas.len())
        .filter(|&index| is_free(&replicas[index]))
        .max_by_key(|&index| (replicas[index].cache.cached(segments), Reverse(replicas[index].in_flight), rng.u32(..)));
    best.unwrap_or_else(|| least(replicas, |_| true, rng))
}

fn by_affinity(affinity: &Affinity, replicas: &[Replica], prompt: &Prompt, rng: &mut fastrand::Rng) -> usize {
    let candidate =
        |index: usize| Candidate { index, replica: index as u32 + 1, in_flight: replicas[index].in_flight, weight: 1 };
    match affinity.prefer(prompt, (0..replicas.len()).map(candidate)) {
        Preference::At { index, .. } => index,
        Preference::Spread(spread) => least(replicas, |index| spread.allows(&candidate(index)), rng),
    }
}

fn message(role: &str, text: &str) -> String {
    format!(r#"{{"role":"{role}","content":"{text}"}}"#)
}

/// Words of no meaning. Nearly the same all over, as language is, so that beginnings of texts are often alike.
fn text(rng: &mut fastrand::Rng, bytes: usize) -> String {
    const WORDS: [&str; 12] =
        ["please", "write", "a", "the", "of", "summary", "function", "that", "and", "in", "text", "explain"];
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        text.push_str(WORDS[(12.0 * rng.f64().powi(2)) as usize]);
        text.push(' ');
    }
    let _ = write!(text, "{:x}", rng.u16(..));
    text
}

fn exponential(rng: &mut fastrand::Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.f64()).ln()
}

fn max_over_mean(of: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = of.clone().count() as f64;
    let sum: f64 = of.clone().sum();
    of.fold(0.0, f64::max) * count / sum
}
