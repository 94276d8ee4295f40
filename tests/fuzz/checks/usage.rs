//! The onlooker that reads an answer's usage while it goes by, against `serde_json`.
//!
//! An input is an answer's payload. It is read as every kind of answer: what is no such answer must do no harm.

use inference_proxy::wire::scan::{AnswerKind, Usage, UsageTap};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::arrivals;

/// Checks an answer.
pub fn check(answer: &[u8]) {
    for kind in [AnswerKind::Json, AnswerKind::Events, AnswerKind::Ndjson] {
        let told = told(kind, &[answer]);
        for pieces in arrivals(answer) {
            assert_eq!(self::told(kind, &pieces), told, "it depends on how it is cut");
        }
        let lines: Vec<&[u8]> = answer.split_inclusive(|byte| *byte == b'\n').collect();
        assert_eq!(self::told(kind, &lines), told, "it depends on how it is cut");
        let Told { usage, answer_id, has_content } = told;
        let ends = answer.iter().filter(|byte| b"\r\n".contains(byte)).count();
        assert!(usage.output_events <= ends as u64 + 1, "more events than lines");
        assert!(answer_id.is_none_or(|id| !id.is_empty() && id.len() <= 128));
        assert!(kind == AnswerKind::Json || has_content == (usage.output_events > 0));

        // Keys are compared as they are written, so nothing is said of an answer that has escapes.
        if let (false, Some(objects)) = (answer.contains(&b'\\'), objects(kind, answer)) {
            let mut counts = Counts::default();
            if objects.iter().all(|object| counts.read(object)) {
                let tokens = |usage: Usage| {
                    (usage.input_tokens, usage.output_tokens, usage.cached_input_tokens, usage.reasoning_tokens)
                };
                assert_eq!(tokens(usage), tokens(counts.usage()), "{counts:?}");
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Told {
    usage: Usage,
    answer_id: Option<String>,
    has_content: bool,
}

/// What the tap says of an answer that comes in these pieces.
fn told(kind: AnswerKind, pieces: &[&[u8]]) -> Told {
    let mut tap = UsageTap::new(kind);
    let mut has_content = false;
    for piece in pieces {
        tap.feed(piece);
        assert!(tap.has_content() || !has_content, "content does not go away");
        has_content = tap.has_content();
    }
    Told { usage: tap.usage(), answer_id: tap.answer_id().map(str::to_owned), has_content }
}

/// The texts of the objects in an answer, each of which may yet be none; `None` for a stream of events that leaves the
/// usual form, where it is a matter of taste what its objects are.
fn objects(kind: AnswerKind, answer: &[u8]) -> Option<Vec<Vec<u8>>> {
    match kind {
        AnswerKind::Json => Some(vec![answer.to_vec()]),
        AnswerKind::Ndjson => Some(answer.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()),
        AnswerKind::Events => {
            let text = std::str::from_utf8(answer).ok()?.replace("\r\n", "\n").replace('\r', "\n");
            let mut objects = Vec::new();
            for event in text.split("\n\n") {
                let mut data = Vec::new();
                for line in event.lines() {
                    if let Some(text) = line.strip_prefix("data:") {
                        data.extend_from_slice(text.as_bytes());
                        data.push(b'\n');
                    }
                }
                objects.push(data);
            }
            Some(objects)
        }
    }
}

/// The last count that was told in each place, but for zeroes behind a number.
#[derive(Debug, Default)]
struct Counts {
    prompt: Option<u64>,
    input: Option<u64>,
    cache_read: Option<u64>,
    cache_creation: Option<u64>,
    cached: Option<u64>,
    output: Option<u64>,
    reasoning: Option<u64>,
    total: Option<u64>,
    timed_cached: Option<u64>,
    timed_prompt: Option<u64>,
    timed_output: Option<u64>,
}

impl Counts {
    /// Reads one object. False if it is none, and what it tells then cannot be compared.
    fn read(&mut self, text: &[u8]) -> bool {
        if matches!(text.trim_ascii(), b"" | b"[DONE]") {
            return true;
        }
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        let walk = Walk { counts: self, path: &mut Vec::new() };
        walk.deserialize(&mut deserializer).is_ok() && deserializer.end().is_ok()
    }

    /// A number in a place.
    fn told(&mut self, path: &[String], number: u64) {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let place = match path[..] {
            ["usage", ref rest @ ..] | ["message" | "response", "usage", ref rest @ ..] => match *rest {
                ["prompt_tokens"] => &mut self.prompt,
                ["input_tokens"] => &mut self.input,
                ["cache_read_input_tokens"] => &mut self.cache_read,
                ["cache_creation_input_tokens"] => &mut self.cache_creation,
                ["completion_tokens" | "output_tokens"] => &mut self.output,
                ["total_tokens"] => &mut self.total,
                ["reasoning_tokens"] => &mut self.reasoning,
                [
                    "prompt_tokens_details"
                    | "input_tokens_details"
                    | "completion_tokens_details"
                    | "output_tokens_details",
                    name,
                ] => match name {
                    "cached_tokens" => &mut self.cached,
                    "reasoning_tokens" => &mut self.reasoning,
                    _ => return,
                },
                _ => return,
            },
            ["prompt_eval_count" | "tokens_evaluated"] => &mut self.prompt,
            ["prompt_eval_cached_count"] => &mut self.cached,
            ["eval_count" | "tokens_predicted"] => &mut self.output,
            ["timings", "cache_n"] => &mut self.timed_cached,
            ["timings", "prompt_n"] => &mut self.timed_prompt,
            ["timings", "predicted_n"] => &mut self.timed_output,
            _ => return,
        };
        if place.is_none() || number > 0 {
            *place = Some(number);
        }
    }

    fn usage(&self) -> Usage {
        let output_tokens = self.output.or(self.timed_output);
        let with_cache =
            self.input.map(|n| n + self.cache_read.unwrap_or_default() + self.cache_creation.unwrap_or_default());
        let timed = self.timed_prompt.zip(self.timed_cached).map(|(prompt, cached)| prompt + cached);
        let less_output = self.total.map(|total| total.saturating_sub(output_tokens.unwrap_or_default()));
        Usage {
            input_tokens: self.prompt.or(with_cache).or(timed).or(less_output),
            output_tokens,
            cached_input_tokens: self.cached.or(self.cache_read).or(self.timed_cached),
            reasoning_tokens: self.reasoning,
            ..Usage::default()
        }
    }
}

/// Walks through a value in the order in which it is written. Objects in arrays are in no place that means something.
struct Walk<'w> {
    counts: &'w mut Counts,
    path: &'w mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key()? {
            self.path.push(key);
            map.next_value_seed(Walk { counts: self.counts, path: self.path })?;
            self.path.pop();
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        // A number of tokens that does not fit is none.
        if u32::try_from(number).is_ok() && !self.path.is_empty() {
            self.counts.told(self.path, number);
        }
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}
