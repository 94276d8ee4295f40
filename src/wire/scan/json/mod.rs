//! The key `model` of the JSON object that is a request body.
//!
//! A state machine over RFC 8259, the same at every depth. Commas, colons, brackets (which must match), literals and
//! escapes are checked, since text that leaves the grammar is where parsers begin to disagree about which string is
//! the key. What cannot move a key is not checked, or lightly: a number is a run of the characters of numbers, and
//! strings other than the value of `model` may hold invalid UTF-8 and halves of surrogate pairs. So this scanner takes
//! whatever `serde_json` takes and a little more, and where both take a body they see the same `model`.
//!
//! A raw control character in a string ends the scan. No JSON parser takes one, and a line end in a string is how a
//! second request is hidden in a body from a server that answers without reading it.
//!
//! Beyond the RFC it takes what servers written in Python do: `NaN`, `Infinity`, `-Infinity`, and a byte order mark in
//! front. UTF-16, which Python would take as well, is not JSON here. Keys are compared after unescaping and without
//! regard to case, because servers written in Go take `Model` for `model`. Go folds the case of all of Unicode, but no
//! letter of `model` has a relative outside of ASCII (a test goes through all characters).
//!
//! Prompts and images are strings, so strings have to be fast: a short one costs a few operations on one word, a long one
//! is skipped by `memchr2` and then searched for its least byte, both in vector registers. Nothing is stored but the value
//! of `model`: keys are compared as they come, and an open bracket is one bit.

mod text;

use self::text::{skip_text, split_text, unescape};
use super::{
    KEY, ModelValue, ScanError,
    prompt::{Prompt, PromptSeed, PromptTap},
};

/// How deep arrays and objects may nest. Python gives up near 1000, `serde_json` at 128.
const DEPTH_LIMIT: usize = 512;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

const LONE_SURROGATE: &str = "`model` holds half a surrogate pair";

/// Reads one JSON object for its `model`.
#[derive(Debug, Default)]
pub(super) struct JsonScanner {
    state: State,
    open: Brackets,
    /// How many bytes of the body have come, to the end of the current chunk.
    seen: u64,
    /// The first bytes of the escape sequence that [`State::Escape`] reads, and how many they are. Not in that state, as
    /// a small state makes the scanner faster.
    escape: ([u8; 6], usize),
    model: ModelValue,
    /// The value of [`NOTED_KEY`], of which more than is kept means none.
    noted: Vec<u8>,
    /// Its key has just been read.
    notes_value: bool,
    /// Marks the prompt, if that is wanted.
    prompt: Option<Box<PromptTap>>,
}

/// A key of the body's own object whose value says who should get the request, where that matters and can be: the answer
/// that this request continues. It decides nothing, so a value that is no plain id is passed over without complaint.
const NOTED_KEY: &[u8] = b"previous_response_id";
/// Longest value of it.
const NOTED_BYTES_MAX: usize = 128;

/// What comes next.
#[derive(Debug, Clone, Copy, Default)]
enum State {
    /// The body's `{`; at the very first byte, it may be a byte order mark.
    #[default]
    Start,
    KeyOrEnd,
    Key,
    /// The colon behind a key, which is the body's own `model` or another.
    Colon {
        model: bool,
    },
    Value {
        model: bool,
    },
    ValueOrEnd,
    CommaOrEnd,
    /// The rest of a string.
    Text(Role),
    /// The rest of an escape sequence in a string.
    Escape(Role),
    /// A number, or `Infinity`, behind a minus sign.
    Minus,
    /// The rest of a number.
    Number,
    /// The rest of `true`, `NaN`, ..., or of the byte order mark.
    Word(&'static [u8]),
    /// White space.
    End,
}

/// What a string is.
#[derive(Debug, Clone, Copy)]
enum Role {
    /// A key of the body's own object that equals the start of `model` so far, but for case; `ahead` is what that lacks.
    Key { ahead: &'static [u8] },
    /// A key of the body's own object that equals the start of [`NOTED_KEY`] so far.
    NotedKey { ahead: &'static [u8] },
    /// A key that is not `model`.
    OtherKey,
    /// The value of [`NOTED_KEY`].
    Noted,
    /// The value of `model`; `high` is half a surrogate pair that waits for the other half.
    Model { high: Option<u16> },
    /// A value of anything else.
    OtherValue,
}

/// The brackets that are open: a stack of bits, 1 for an object's and 0 for an array's.
#[derive(Debug, Default)]
struct Brackets {
    objects: [u64; DEPTH_LIMIT / 64],
    depth: usize,
    /// The innermost of them.
    in_object: bool,
}

// === impl JsonScanner ===

impl JsonScanner {
    pub(super) fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        self.seen += chunk.len() as u64;
        if let Some(mut prompt) = self.prompt.take() {
            let fed = self.feed_marking(&mut prompt, chunk);
            self.prompt = Some(prompt);
            return fed;
        }
        let mut rest = chunk;
        while let [byte, after @ ..] = rest {
            rest = self.step(*byte, rest, after)?;
        }
        Ok(())
    }

    /// As [`feed`](Self::feed), and shows `prompt` what is its: the keys of the body's own object, and the bytes of the
    /// values that it asks for, in stretches as long as they lie together.
    fn feed_marking(&mut self, prompt: &mut PromptTap, chunk: &[u8]) -> Result<(), ScanError> {
        let mut rest = chunk;
        // Where the bytes of the value begin that have not been shown.
        let mut shown = chunk;
        while let [byte, after @ ..] = rest {
            let (state, depth, before) = (self.state, self.open.depth, rest);
            rest = self.step(*byte, rest, after)?;
            // Most steps are further in.
            if depth > 2 && self.open.depth != 2 {
                continue;
            }
            let upto = |from: &'_ [u8]| from.len() - rest.len();
            if depth == 1 {
                match state {
                    State::Value { .. } if !matches!(self.state, State::Value { .. }) && prompt.begin(*byte) => {
                        shown = before;
                    }
                    _ if state.is_in_key(*byte) => {
                        prompt.key(&before[..upto(before)]);
                        if let State::Colon { .. } = self.state {
                            prompt.key_ended();
                        }
                    }
                    _ => {}
                }
            }
            if !prompt.is_reading() {
                continue;
            }
            let element_ended = depth == 3 && self.open.depth == 2 && !self.open.in_object;
            let ended = self.open.depth == 1 && matches!(self.state, State::CommaOrEnd);
            if element_ended || ended {
                prompt.push(&shown[..upto(shown)]);
                shown = rest;
            }
            if element_ended {
                prompt.element_ended();
            }
            if ended {
                prompt.end();
            }
        }
        if prompt.is_reading() {
            prompt.push(shown);
        }
        Ok(())
    }

    /// Has the prompt marked from now on, which is before the first byte.
    pub(super) fn mark_prompt(&mut self, seed: PromptSeed) {
        self.prompt = Some(PromptTap::new(seed));
    }

    /// The prompt for `model` as far as it has come, if it was to be marked. It is not marked any further.
    pub(super) fn take_prompt(&mut self, model: &str) -> Option<Prompt> {
        self.prompt.take().map(|prompt| prompt.finish(model))
    }

    pub(super) fn marks_prompt(&self) -> bool {
        self.prompt.is_some()
    }

    /// Takes what begins with `byte`, a piece of `rest`, and returns what it leaves of it; `after` is what is behind
    /// the byte.
    #[inline(always)]
    fn step<'a>(&mut self, byte: u8, rest: &'a [u8], after: &'a [u8]) -> Result<&'a [u8], ScanError> {
        // Everything below takes the rest of the chunk and returns what it leaves of it.
        Ok(match (self.state, byte) {
            (State::Text(role), _) => self.text(role, rest)?,
            (State::Escape(role), _) => self.escape(role, rest)?,
            (State::Number, _) => self.number(rest),
            (State::Minus, b'0'..=b'9') => self.number(after),
            (State::Minus, _) => self.word(b"Infinity", rest)?,
            (State::Word(word), _) => self.word(word, rest)?,

            (_, b' ' | b'\n' | b'\r' | b'\t') => after,

            (State::Key | State::KeyOrEnd, b'"') if self.open.depth == 1 => self.key(KEY, after)?,
            (State::Key | State::KeyOrEnd, b'"') => self.skip(Role::OtherKey, after)?,
            (State::Colon { model }, b':') => self.then(State::Value { model }, after),
            (State::CommaOrEnd, b',') if self.open.in_object => self.then(State::Key, after),
            (State::CommaOrEnd, b',') => self.then(State::Value { model: false }, after),
            (State::CommaOrEnd | State::KeyOrEnd, b'}') if self.open.in_object => self.close(after),
            (State::CommaOrEnd | State::ValueOrEnd, b']') if !self.open.in_object => self.close(after),
            (State::Value { model: false } | State::ValueOrEnd, _) => self.value(rest)?,
            (State::Value { model: true }, b'"') => self.model_value(None, after)?,
            (State::Value { model: true }, b'n') => self.model_null(rest)?,
            (State::Value { model: true }, _) => self.value(rest).and(Err(ScanError::ModelNotAString))?,

            (State::Start, b'{') => self.value(rest)?,
            (State::Start, 0xEF) if self.offset(rest) == 0 => self.word(BYTE_ORDER_MARK, rest)?,
            (State::Start, b'"') => return Err(ScanError::NotAnObject),
            (State::Start, _) => self.value(rest).and(Err(ScanError::NotAnObject))?,

            (State::Key | State::KeyOrEnd, _) => return Err(self.invalid("expected a key", rest)),
            (State::Colon { .. }, _) => return Err(self.invalid("expected a colon", rest)),
            (State::CommaOrEnd, _) => return Err(self.invalid("expected a comma or the closing bracket", rest)),
            (State::End, _) => return Err(self.invalid("expected nothing behind the object", rest)),
        })
    }

    pub(super) fn model(&self) -> Option<&str> {
        self.model.first.as_deref()
    }

    pub(super) fn let_model_be_none(&mut self) {
        self.model.may_be_none = true;
    }

    pub(super) fn finish(&self) -> Result<(), ScanError> {
        match self.state {
            // An empty body is not broken JSON: its sender should be told what is missing.
            State::Start | State::End => self.model.finish(),
            _ => Err(self.invalid("the body ends inside its object", &[])),
        }
    }

    /// Begins a value, other than that of `model`.
    fn value<'a>(&mut self, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        let after = &rest[1..];
        let notes = std::mem::take(&mut self.notes_value);
        Ok(match rest[0] {
            b'"' if notes => self.note(after)?,
            b'"' => self.skip(Role::OtherValue, after)?,
            b'0'..=b'9' => self.number(after),
            b'-' => self.then(State::Minus, after),
            b't' => self.then(State::Word(b"rue"), after),
            b'f' => self.then(State::Word(b"alse"), after),
            b'n' => self.then(State::Word(b"ull"), after),
            b'N' => self.then(State::Word(b"aN"), after),
            b'I' => self.then(State::Word(b"nfinity"), after),
            b'{' | b'[' if self.open.depth == DEPTH_LIMIT => return Err(self.invalid("nested too deeply", rest)),
            b'{' => {
                self.open.push(true);
                self.then(State::KeyOrEnd, after)
            }
            b'[' => {
                self.open.push(false);
                self.then(State::ValueOrEnd, after)
            }
            _ => return Err(self.invalid("expected a value", rest)),
        })
    }

    /// Reads a bracket that closes the innermost open one.
    fn close<'a>(&mut self, after: &'a [u8]) -> &'a [u8] {
        self.open.pop();
        let next = match self.open.depth {
            0 => State::End,
            _ => State::CommaOrEnd,
        };
        self.then(next, after)
    }

    /// Reads the rest of a number, which ends where something else begins.
    fn number<'a>(&mut self, rest: &'a [u8]) -> &'a [u8] {
        let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
        match rest.iter().position(|byte| !is_part(byte)) {
            Some(run) => self.then(State::CommaOrEnd, &rest[run..]),
            None => self.then(State::Number, &[]),
        }
    }

    /// Reads the next byte of a word, of which `ahead` is what has not been read.
    fn word<'a>(&mut self, ahead: &'static [u8], rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        let next = match ahead {
            [expected, ..] if *expected != rest[0] => return Err(self.invalid("unknown literal", rest)),
            [_, ahead @ ..] if !ahead.is_empty() => State::Word(ahead),
            // The only word outside the body's object is the byte order mark.
            _ if self.open.depth == 0 => State::Start,
            _ => State::CommaOrEnd,
        };
        Ok(self.then(next, &rest[1..]))
    }

    /// Reads a string up to its end, or to an escape sequence.
    fn text<'a>(&mut self, role: Role, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        match role {
            Role::Key { ahead } => self.key(ahead, rest),
            Role::NotedKey { ahead } => self.noted_key(ahead, rest),
            Role::Noted => self.note(rest),
            Role::Model { high } => self.model_value(high, rest),
            Role::OtherKey | Role::OtherValue => self.skip(role, rest),
        }
    }

    /// Reads a key that may be `model`.
    fn key<'a>(&mut self, ahead: &'static [u8], rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        let (run, stop) = split_text(rest);
        Ok(match (strip_folded(ahead, run), stop) {
            (None, _) if ahead.len() == KEY.len() && run.first() == NOTED_KEY.first() => {
                return self.noted_key(NOTED_KEY, rest);
            }
            (Some(ahead), []) => self.then(State::Text(Role::Key { ahead }), &[]),
            (Some(ahead), [b'\\', after @ ..]) => self.begin_escape(Role::Key { ahead }, after),
            (Some(ahead), [b'"', after @ ..]) => self.then(State::Colon { model: ahead.is_empty() }, after),
            _ => return self.skip(Role::OtherKey, stop),
        })
    }

    /// Reads a key that may be the noted one.
    fn noted_key<'a>(&mut self, ahead: &'static [u8], rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        let (run, stop) = split_text(rest);
        Ok(match (ahead.strip_prefix(run), stop) {
            (Some(ahead), []) => self.then(State::Text(Role::NotedKey { ahead }), &[]),
            (Some(ahead), [b'\\', after @ ..]) => self.begin_escape(Role::NotedKey { ahead }, after),
            (Some([]), [b'"', after @ ..]) => {
                self.noted.clear();
                self.notes_value = true;
                self.then(State::Colon { model: false }, after)
            }
            _ => return self.skip(Role::OtherKey, stop),
        })
    }

    /// Reads the noted value.
    fn note<'a>(&mut self, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        let (run, stop) = split_text(rest);
        let fits = self.noted.len() + run.len() <= NOTED_BYTES_MAX;
        Ok(match stop {
            [] if fits => {
                self.noted.extend_from_slice(run);
                self.then(State::Text(Role::Noted), &[])
            }
            [b'"', after @ ..] if fits => {
                self.noted.extend_from_slice(run);
                self.then(State::CommaOrEnd, after)
            }
            [b'\\', after @ ..] if fits => {
                self.noted.extend_from_slice(run);
                self.begin_escape(Role::Noted, after)
            }
            _ => {
                self.noted.clear();
                return self.skip(Role::OtherValue, stop);
            }
        })
    }

    /// The value of the noted key, once it has been read.
    pub(super) fn noted(&self) -> Option<&str> {
        let is_whole =
            !matches!(self.state, State::Text(Role::Noted) | State::Escape(Role::Noted)) && !self.noted.is_empty();
        std::str::from_utf8(&self.noted).ok().filter(|_| is_whole)
    }

    /// Reads the value of `model`.
    fn model_value<'a>(&mut self, high: Option<u16>, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        // Half a surrogate pair needs an escape sequence right behind it.
        if high.is_some() && rest.first() != Some(&b'\\') {
            return Err(self.invalid(LONE_SURROGATE, rest));
        }
        let (run, stop) = split_text(rest);
        // Of two faults the first is told, however the value is cut.
        self.model.push(run)?;
        match stop {
            [] => Ok(self.then(State::Text(Role::Model { high }), &[])),
            [b'\\', after @ ..] => Ok(self.begin_escape(Role::Model { high }, after)),
            [b'"', after @ ..] => {
                self.model.complete(self.invalid("`model` is not UTF-8", stop))?;
                Ok(self.then(State::CommaOrEnd, after))
            }
            _ => Err(self.invalid("`model` holds a raw control character", stop)),
        }
    }

    /// Begins the value `null` of `model`.
    fn model_null<'a>(&mut self, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        self.model.say_none(ScanError::ModelNotAString)?;
        self.value(rest)
    }

    /// Reads a string that does not matter.
    fn skip<'a>(&mut self, role: Role, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        Ok(match (&rest[skip_text(rest)..], role) {
            ([], _) => self.then(State::Text(role), &[]),
            ([b'\\', after @ ..], _) => self.begin_escape(role, after),
            ([b'"', after @ ..], Role::OtherKey) => self.then(State::Colon { model: false }, after),
            ([b'"', after @ ..], _) => self.then(State::CommaOrEnd, after),
            (control, _) => return Err(self.invalid("a string holds a raw control character", control)),
        })
    }

    /// Reads the backslash of an escape sequence.
    fn begin_escape<'a>(&mut self, role: Role, after: &'a [u8]) -> &'a [u8] {
        self.escape = (*b"\\.....", 1);
        self.then(State::Escape(role), after)
    }

    /// Reads the next byte of an escape sequence.
    fn escape<'a>(&mut self, role: Role, rest: &'a [u8]) -> Result<&'a [u8], ScanError> {
        let (bytes, len) = &mut self.escape;
        bytes[*len] = rest[0];
        *len += 1;
        let next = match unescape(&bytes[..*len]) {
            Ok(Some((unit, _))) => State::Text(self.escaped(role, unit, rest)?),
            Ok(None) => State::Escape(role),
            Err(why) => return Err(self.invalid(why, rest)),
        };
        Ok(self.then(next, &rest[1..]))
    }

    /// Takes the UTF-16 code unit of an escape sequence, of which `rest` begins with the last byte.
    fn escaped(&mut self, role: Role, unit: u16, rest: &[u8]) -> Result<Role, ScanError> {
        let decoded = match role {
            Role::OtherKey | Role::OtherValue => return Ok(role),
            Role::Noted => match u8::try_from(unit) {
                Ok(byte @ b' '..=b'~') => {
                    self.noted.push(byte);
                    return Ok(Role::Noted);
                }
                _ => {
                    self.noted.clear();
                    return Ok(Role::OtherValue);
                }
            },
            Role::NotedKey { ahead: [expected, ahead @ ..] } if u16::from(*expected) == unit => {
                return Ok(Role::NotedKey { ahead });
            }
            Role::Key { ahead: KEY } if u16::from(NOTED_KEY[0]) == unit => {
                return Ok(Role::NotedKey { ahead: &NOTED_KEY[1..] });
            }
            Role::NotedKey { .. } => return Ok(Role::OtherKey),
            Role::Key { ahead: [expected, ahead @ ..] }
                if u8::try_from(unit).is_ok_and(|byte| byte.eq_ignore_ascii_case(expected)) =>
            {
                return Ok(Role::Key { ahead });
            }
            Role::Key { .. } => return Ok(Role::OtherKey),
            Role::Model { high: None } if (0xD800..0xDC00).contains(&unit) => {
                return Ok(Role::Model { high: Some(unit) });
            }
            Role::Model { high } => char::decode_utf16(high.into_iter().chain([unit])).next(),
        };
        let Some(Ok(character)) = decoded else {
            return Err(self.invalid(LONE_SURROGATE, rest));
        };
        self.model.push(character.encode_utf8(&mut [0; 4]).as_bytes())?;
        Ok(Role::Model { high: None })
    }

    /// Sets what comes next.
    fn then<'a>(&mut self, next: State, rest: &'a [u8]) -> &'a [u8] {
        self.state = next;
        rest
    }

    /// Where in the body the rest of the chunk begins.
    fn offset(&self, rest: &[u8]) -> u64 {
        self.seen - rest.len() as u64
    }

    /// The error for the first byte of `rest`.
    fn invalid(&self, why: &'static str, rest: &[u8]) -> ScanError {
        ScanError::InvalidJson { why, offset: self.offset(rest) }
    }
}

// === impl State ===

impl State {
    /// What begins with `byte` is a piece of a key.
    fn is_in_key(self, byte: u8) -> bool {
        match self {
            State::Key | State::KeyOrEnd => byte == b'"',
            State::Text(role) | State::Escape(role) => {
                matches!(role, Role::Key { .. } | Role::NotedKey { .. } | Role::OtherKey)
            }
            _ => false,
        }
    }
}

// === impl Brackets ===

impl Brackets {
    fn push(&mut self, object: bool) {
        debug_assert!(self.depth < DEPTH_LIMIT, "the depth must be checked before");
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        if object {
            self.objects[word] |= bit;
        } else {
            self.objects[word] &= !bit;
        }
        self.depth += 1;
        self.in_object = object;
    }

    fn pop(&mut self) {
        debug_assert!(self.depth > 0, "only an open bracket can be closed");
        self.depth -= 1;
        let parent = self.depth.saturating_sub(1);
        self.in_object = self.objects[parent / 64] >> (parent % 64) & 1 == 1;
    }
}

/// What `expected` lacks behind `run`, if it begins with that but for case.
fn strip_folded(expected: &'static [u8], run: &[u8]) -> Option<&'static [u8]> {
    let (begin, ahead) = expected.split_at_checked(run.len())?;
    begin.eq_ignore_ascii_case(run).then_some(ahead)
}

#[cfg(test)]
mod tests;
