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

use memchr::memchr2;

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

/// Splits a string in front of its closing quote, its next escape sequence or its first raw control character.
fn split_text(rest: &[u8]) -> (&[u8], &[u8]) {
    rest.split_at(plain_len(rest))
}

/// The length of the text at the start of `rest` that needs no closer look: up to the closing quote, a raw control
/// character, or an escape sequence that is wrong or cut off.
fn skip_text(rest: &[u8]) -> usize {
    let mut at = 0;
    loop {
        at += plain_len(&rest[at..]);
        if rest.get(at) != Some(&b'\\') {
            return at;
        }
        // Escapes come in rows (`\r\n`, `\u4f60\u597d`), where a search for the next costs more than a look.
        while rest.get(at) == Some(&b'\\') {
            match unescape(&rest[at..]) {
                Ok(Some((_, len))) => at += len,
                Ok(None) | Err(_) => return at,
            }
        }
    }
}

/// The length of the text at the start of `text` that holds no quote, backslash or raw control character.
fn plain_len(text: &[u8]) -> usize {
    // Most strings are short.
    let (words, tail) = text.as_chunks();
    for (index, word) in words.iter().take(SHORT_WORDS).enumerate() {
        let stops = stops_in(*word);
        if stops != 0 {
            return index * 8 + stops.trailing_zeros() as usize / 8;
        }
    }
    if words.len() <= SHORT_WORDS {
        let before = text.len() - tail.len();
        return before + tail.iter().position(|&byte| is_stop(byte)).unwrap_or(tail.len());
    }
    let (short, rest) = text.split_at(SHORT_WORDS * 8);
    let len = memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
    let run = &rest[..len];
    let control = if holds_control(run) { run.iter().position(|&byte| byte < b' ') } else { None };
    short.len() + control.unwrap_or(len)
}

/// How many words of a string are looked at one by one before it is taken for a long one.
const SHORT_WORDS: usize = 6;

/// A quote, a backslash or a raw control character.
fn is_stop(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\' | 0..b' ')
}

/// One in every byte of a word.
const ONES: u64 = u64::MAX / 0xFF;
/// The highest bit of every byte of a word.
const HIGH_BITS: u64 = ONES * 0x80;

/// The highest bit of a byte is set where the byte is below `limit` (at most 0x80). Bytes behind such a byte may be marked
/// wrongly, because it borrows from them; bytes before it are not. The other bits mean nothing.
fn mark_below(word: u64, limit: u8) -> u64 {
    word.wrapping_sub(ONES * u64::from(limit)) & !word
}

/// A number whose lowest set bit lies in the byte that is the first stop of the word; 0 if there is none.
fn stops_in(word: [u8; 8]) -> u64 {
    let word = u64::from_le_bytes(word);
    let mark_equal = |byte: u8| mark_below(word ^ (ONES * u64::from(byte)), 1);
    (mark_equal(b'"') | mark_equal(b'\\') | mark_below(word, b' ')) & HIGH_BITS
}

/// Whether there is a raw control character in the text. In large blocks where it can be, because the compiler has vector
/// instructions for the least of many bytes; else in words, of which the last may overlap the one before it.
fn holds_control(text: &[u8]) -> bool {
    let (blocks, text) = text.as_chunks::<256>();
    if blocks.iter().any(|block| block.iter().fold(u8::MAX, |least, &byte| least.min(byte)) < b' ') {
        return true;
    }
    let Some(last) = text.last_chunk() else { return text.iter().any(|&byte| byte < b' ') };
    let (words, _) = text.as_chunks();
    let mark = |word: &[u8; 8]| mark_below(u64::from_le_bytes(*word), b' ');
    words.iter().fold(mark(last), |marks, word| marks | mark(word)) & HIGH_BITS != 0
}

/// The UTF-16 code unit and the length of the escape sequence that `text` begins with; `None` if it is cut off.
fn unescape(text: &[u8]) -> Result<Option<(u16, usize)>, &'static str> {
    let unit = match text.get(1) {
        Some(&byte @ (b'"' | b'\\' | b'/')) => u16::from(byte),
        Some(b'b') => 0x08,
        Some(b't') => 0x09,
        Some(b'n') => 0x0A,
        Some(b'f') => 0x0C,
        Some(b'r') => 0x0D,
        Some(b'u') => {
            let digits = &text[2..text.len().min(6)];
            let mut unit = 0;
            for &digit in digits {
                let digit = char::from(digit).to_digit(16).ok_or("expected four hex digits")?;
                unit = unit << 4 | digit as u16;
            }
            return Ok((digits.len() == 4).then_some((unit, 6)));
        }
        Some(_) => return Err("unknown escape sequence"),
        None => return Ok(None),
    };
    Ok(Some((unit, 2)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::{Index, select};
    use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
    use serde_json::value::RawValue;

    use super::super::tests::{cut, expected, scan, scan_cut_everywhere};
    use super::super::{MODEL_LIMIT_BYTES, MODEL_SHOWN_CHARS, ModelScanner, ScanError};
    use super::{DEPTH_LIMIT, LONE_SURROGATE, is_stop, plain_len};

    fn check(body: impl AsRef<[u8]>, expected: Result<&str, ScanError>) {
        let body = body.as_ref();
        let found = scan_cut_everywhere(ModelScanner::json, body);
        assert_eq!(found, expected.map(str::to_owned), "{}", body.escape_ascii());
    }

    fn check_invalid(body: impl AsRef<[u8]>, why: &'static str, offset: u64) {
        check(body, Err(ScanError::InvalidJson { why, offset }));
    }

    #[test]
    fn finds_the_key() {
        for body in [
            r#"{"model":"m"}"#,
            " \r\n\t{ \n\"model\" : \"m\" } \r\n",
            "\u{feff} {\"model\":\"m\"}",
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}"#,
            r#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":5,"model":"m"}"#,
            // Behind escapes.
            r#"{"mod\u0065l":"m"}"#,
            r#"{"\u006D\u006f\u0064\u0065\u006C":"\u006d"}"#,
            // Not the key: in strings, in keys, further in.
            r#"{"a":"\"model\":\"x\"","model":"m"}"#,
            r#"{"\"model\":\"x\",":0,"model":"m","z":"{\"model\":\"x\"}\\"}"#,
            r#"{"metadata":{"model":"x","":{"model":5}},"tools":[{"model":["x"]},"model"],"model":"m"}"#,
            r#"{"models":"x","mode":"x","":"x","model ":"x","model\u0000":"x","xmodel":"x","model":"m"}"#,
            r#"{"Models":"x","MODE":"x","\u0130odel":"x","mod\u0119l":"x","mode\u216c":"x","model":"m"}"#,
            "{\"\u{ff2d}odel\":\"x\",\"mode\u{217c}\":\"x\",\"m\u{f6}del\":\"x\",\"model\":\"m\"}",
            // The key, for servers that match keys without regard to case.
            r#"{"Model":"m"}"#,
            r#"{"MODEL":"m","metadata":{"Model":"x"}}"#,
            r#"{"m\u004FdeL":"m"}"#,
            r#"{"model":"m","Model":"m","mODEL":"m"}"#,
            // Twice, but the same.
            r#"{"model":"m","messages":[],"mod\u0065l":"\u006d"}"#,
        ] {
            check(body, Ok("m"));
        }
    }

    #[test]
    fn unescapes_the_value() {
        check(r#"{"model":"\uD800\uDC00\udbff\udfff\uE000"}"#, Ok("\u{10000}\u{10ffff}\u{e000}"));
        check(r#"{"model":"\"\\\/\b\f\n\r\t\u0000"}"#, Ok("\"\\/\u{8}\u{c}\n\r\t\0"));
        check(r#"{"model":"org\/caf\u00E9 \ud83d\uDE00\u4f60"}"#, Ok("org/caf\u{e9} \u{1f600}\u{4f60}"));
        check("{\"model\":\" \u{e9}\u{1f600}\u{7f} \"}", Ok(" \u{e9}\u{1f600}\u{7f} "));
    }

    #[test]
    fn takes_every_kind_of_value() {
        for value in [
            "null",
            "true",
            "false",
            "NaN",
            "Infinity",
            "-Infinity",
            "0",
            "-0.5e+10",
            "1E9",
            "[]",
            "{}",
            "[[],{}]",
            "[1,2 , 3]",
            r#"{"a":{"b":[{"c":"d"}]}}"#,
            r#""\ud83d""#,
            "\"\u{7f}\u{80}\u{a0}\u{2028}\"",
        ] {
            check(format!(r#"{{"a":{value},"model":"m","z":{value}}}"#), Ok("m"));
        }
        check(b"{\"\xFF\":\"\xC3\",\"model\":\"m\"}", Ok("m"));
    }

    #[test]
    fn tells_what_is_wrong_with_the_model() {
        for body in ["", " \n", "\u{feff}", "{}", r#"{"a":{"model":"m"}}"#, r#"{"Models":"m"}"#] {
            check(body, Err(ScanError::ModelMissing));
        }
        for value in ["5", "-1", "null", "true", "NaN", "[\"m\"]", "{\"model\":\"m\"}"] {
            check(format!(r#"{{"model":{value}}}"#), Err(ScanError::ModelNotAString));
            check(format!(r#"{{"model":"m","model":{value}}}"#), Err(ScanError::ModelNotAString));
            check(format!(r#"{{"model":"m","MoDel":{value}}}"#), Err(ScanError::ModelNotAString));
        }
        check(r#"{"model":""}"#, Err(ScanError::ModelEmpty));
        for second in ["n", "M", "m ", "mm", "\\u006d\\u0000"] {
            let found =
                scan_cut_everywhere(ModelScanner::json, format!(r#"{{"model":"m","model":"{second}"}}"#).as_bytes());
            assert!(matches!(found, Err(ScanError::ModelsDiffer { ref first, .. }) if first == "m"), "{found:?}");
        }
        for unit in ["m", "\\u006d"] {
            let longest = unit.repeat(MODEL_LIMIT_BYTES);
            check(format!(r#"{{"model":"{longest}"}}"#), Ok(&"m".repeat(MODEL_LIMIT_BYTES)));
            for excess in ["x", "xy", "xyz", "xyzxyz"] {
                let body = format!(r#"{{"model":"{longest}{excess}"}}"#);
                check(body, Err(ScanError::ModelTooLong { begin: "m".repeat(MODEL_SHOWN_CHARS) }));
                let second = format!("{}\u{2026}", "m".repeat(MODEL_SHOWN_CHARS));
                let body = format!(r#"{{"model":"m","model":"{longest}{excess}"}}"#);
                check(body, Err(ScanError::ModelsDiffer { first: "m".to_owned(), second }));
            }
        }
        check_invalid(b"{\"model\":\"m\xFF\"}", "`model` is not UTF-8", 12);
        check_invalid("{\"model\":\"m\n\"}", "`model` holds a raw control character", 11);
        let too_long = "m".repeat(MODEL_LIMIT_BYTES + 3);
        let begin = "m".repeat(MODEL_SHOWN_CHARS);
        check(format!("{{\"model\":\"{too_long}\n\"}}"), Err(ScanError::ModelTooLong { begin }));
        let begin = "\u{e9}".repeat(MODEL_SHOWN_CHARS);
        check(format!(r#"{{"model":"{}"}}"#, "\u{e9}".repeat(600)), Err(ScanError::ModelTooLong { begin }));
        check_invalid(r#"{"model":"\ud83d"}"#, LONE_SURROGATE, 16);
        check_invalid(r#"{"model":"\ud83dx"}"#, LONE_SURROGATE, 16);
        check_invalid(r#"{"model":"\ud83dx\ude00"}"#, LONE_SURROGATE, 16);
        check_invalid(r#"{"model":"\ud83d\n"}"#, LONE_SURROGATE, 17);
        check_invalid(r#"{"model":"\ud83d\ud83d"}"#, LONE_SURROGATE, 21);
        check_invalid(r#"{"model":"\ude00"}"#, LONE_SURROGATE, 15);
    }

    #[test]
    fn a_raw_control_character_in_a_string_is_refused_wherever_it_stands() {
        const WHY: &str = "a string holds a raw control character";
        let long = "x".repeat(100);
        let smuggled = "POST /lora-adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]";
        for (before, after) in [
            (r#"{"model":"m","a":""#.to_owned(), r#""}"#),
            (r#"{"a":""#.to_owned(), r#"","model":"m"}"#),
            (r#"{""#.to_owned(), r#"":1,"model":"m"}"#),
            (r#"{"mod"#.to_owned(), r#"el":"m"}"#),
            (r#"{"model"#.to_owned(), r#"":"m"}"#),
            (r#"{"model":"m","previous"#.to_owned(), r#"_response_id":"x"}"#),
            (r#"{"model":"m","previous_response_id":"x"#.to_owned(), r#"y"}"#),
            (r#"{"model":"m","a":{"b":["c",""#.to_owned(), r#""]}}"#),
            (r#"{"model":"m","a":{""#.to_owned(), r#"":1}}"#),
            (r#"{"model":"m","a":"\n\u00e9"#.to_owned(), r#"\n"}"#),
            (format!(r#"{{"model":"m","a":"{long}\n{long}"#), r#"xxxxxxxxxx\n"}"#),
            (format!(r#"{{"model":"m","a":"{long}{long}"#), r#""}"#),
        ] {
            for control in ["\r\n", "\n", "\t", "\0", "\u{1f}", smuggled] {
                if control == smuggled {
                    let body = format!("{before} {control}{after}");
                    check_invalid(body, WHY, before.len() as u64 + 29);
                } else {
                    check_invalid(format!("{before}{control}{after}"), WHY, before.len() as u64);
                }
            }
            check_invalid(format!("{before}\n"), WHY, before.len() as u64);
        }
        // Between tokens, line ends are white space.
        check("{\r\n\"model\":\r\n\"m\"\r\n}\r\n", Ok("m"));
    }

    #[test]
    fn the_first_stop_is_found_at_every_place_among_all_bytes() {
        for byte in 0..=u8::MAX {
            for filler in [b'x', 0x20, 0x21, 0x23, 0x5B, 0x5D, 0x7F, 0x80, 0xFF] {
                for at in 0..80 {
                    let mut text = [filler; 80];
                    text[at] = byte;
                    let expected = if is_stop(byte) { at } else { 80 };
                    assert_eq!(plain_len(&text), expected, "{byte:#x} among {filler:#x} at {at}");
                }
            }
        }
        for (first, second) in [(b'"', 0), (0, b'"'), (b'\\', 0x1F), (b'\n', b'\\')] {
            for at in 0..79 {
                let mut text = [b'x'; 80];
                (text[at], text[at + 1], text[79]) = (first, second, b'"');
                assert_eq!(plain_len(&text), at);
            }
        }
    }

    #[test]
    fn no_character_outside_of_ascii_folds_to_a_letter_of_the_key() {
        let mut folds_elsewhere = 0;
        for character in ('\u{80}'..=char::MAX).filter(|c| !c.is_ascii()) {
            let letters = || character.to_lowercase().chain(character.to_uppercase());
            // A special casing of several characters, such as that of the ligature fi, is no folding of one.
            if character.to_lowercase().count() == 1 && character.to_uppercase().count() == 1 {
                assert!(!letters().any(|letter| "modelMODEL".contains(letter)), "{character:?}");
                folds_elsewhere += usize::from(letters().any(|letter| letter.is_ascii()));
            }
        }
        // The long s, the Kelvin sign and the dotless i, which show that the loop sees them.
        assert!(folds_elsewhere >= 2, "{folds_elsewhere}");
    }

    #[test]
    fn null_and_the_empty_string_are_no_name_where_there_need_be_none() {
        let scanner = || {
            let mut scanner = ModelScanner::json();
            scanner.let_model_be_none();
            scanner
        };
        for (body, expected) in [
            (r#"{}"#, Err(ScanError::ModelMissing)),
            (r#"{"model":null}"#, Err(ScanError::ModelMissing)),
            (r#"{"model":"","query":"q"}"#, Err(ScanError::ModelMissing)),
            (r#"{"query":"q","Model" : null , "model":"","model":null}"#, Err(ScanError::ModelMissing)),
            (r#"{"model":"m"}"#, Ok("m")),
            (r#"{"model":"m","model":null}"#, Err(ScanError::ModelNotAString)),
            (r#"{"model":"m","model":""}"#, Err(ScanError::ModelEmpty)),
            (r#"{"model":false}"#, Err(ScanError::ModelNotAString)),
            (r#"{"model":[]}"#, Err(ScanError::ModelNotAString)),
            (r#"{"model":0}"#, Err(ScanError::ModelNotAString)),
            (r#"{"model":nul}"#, Err(ScanError::InvalidJson { why: "unknown literal", offset: 12 })),
            (
                r#"{"model":nulll}"#,
                Err(ScanError::InvalidJson { why: "expected a comma or the closing bracket", offset: 13 }),
            ),
        ] {
            assert_eq!(scan_cut_everywhere(scanner, body.as_bytes()), expected.map(str::to_owned), "{body}");
        }
        for nothing in ["null", "\"\""] {
            let body = format!(r#"{{"model":{nothing},"model":"m"}}"#);
            let differ = ScanError::ModelsDiffer { first: String::new(), second: "m".to_owned() };
            assert_eq!(scan_cut_everywhere(scanner, body.as_bytes()), Err(differ), "{body}");
        }
    }

    #[test]
    fn refuses_what_is_not_json() {
        for body in ["[]", "\"model\"", "-1", "0", "true", "null", "NaN", "--B\r\n", " [{\"model\":\"m\"}]"] {
            check(body, Err(ScanError::NotAnObject));
        }
        for (body, why, offset) in [
            ("model=m", "expected a value", 0),
            ("{\0\"\0m\0", "expected a key", 1),
            ("\u{feff}\u{feff}{}", "expected a value", 3),
            ("{\"model\":\"m\"", "the body ends inside its object", 12),
            ("{\"model\":\"m", "the body ends inside its object", 11),
            ("{\"model\":\"m\"}}", "expected nothing behind the object", 13),
            ("{\"model\":\"m\"}\0", "expected nothing behind the object", 13),
            ("{\"model\":\"m\"} {\"model\":\"n\"}", "expected nothing behind the object", 14),
            ("{\"model\":}", "expected a value", 9),
            ("{\"model\"}", "expected a colon", 8),
            ("{\"model\" \"m\"}", "expected a colon", 9),
            ("{model:\"m\"}", "expected a key", 1),
            ("{'model':'m'}", "expected a key", 1),
            ("{,\"model\":\"m\"}", "expected a key", 1),
            ("{\"model\":\"m\",}", "expected a key", 13),
            ("{/**/\"model\":\"m\"}", "expected a key", 1),
            ("{\"a\":[1,],\"model\":\"m\"}", "expected a value", 8),
            ("{\"a\":[,1]}", "expected a value", 6),
            ("{\"a\":[1}", "expected a comma or the closing bracket", 7),
            ("{\"a\":{\"b\":1]", "expected a comma or the closing bracket", 11),
            ("{\"a\":{]", "expected a key", 6),
            ("{\"a\":[}", "expected a value", 6),
            ("{\"a\":1 2}", "expected a comma or the closing bracket", 7),
            ("{\"a\":\"\" \"\"}", "expected a comma or the closing bracket", 8),
            ("{\"a\":[1:2]}", "expected a comma or the closing bracket", 7),
            ("{\"a\":nul}", "unknown literal", 8),
            ("{\"a\":nulll}", "expected a comma or the closing bracket", 9),
            ("{\"a\":-NaN}", "unknown literal", 6),
            ("{\"a\":+1}", "expected a value", 5),
            ("{\"a\":.5}", "expected a value", 5),
            ("{\"a\":1x}", "expected a comma or the closing bracket", 6),
            ("{\"a\":\"\\x\"}", "unknown escape sequence", 7),
            ("{\"a\":\"\\u12\"}", "expected four hex digits", 10),
            ("{\"a\":\"\\u+123\"}", "expected four hex digits", 8),
            ("{\"\\'\":1}", "unknown escape sequence", 3),
        ] {
            check_invalid(body, why, offset);
        }
        check_invalid(b"\xFF\xFE{\0}\0", "expected a value", 0);
        check_invalid(b"\xEF\xBBx", "unknown literal", 2);
    }

    #[test]
    fn the_answer_that_is_continued_is_noted() {
        let long = "x".repeat(129);
        for (body, expect) in [
            (r#"{"model":"m","previous_response_id":"resp_1","input":"x"}"#.to_owned(), Some("resp_1")),
            (r#"{"previous_response_id" : "resp_1","model":"m"}"#.to_owned(), Some("resp_1")),
            (r#"{"previous_response_id":"a","previous_response_id":"b","model":"m"}"#.to_owned(), Some("b")),
            (r#"{"previous\u005Fresponse_id":"a","model":"m"}"#.to_owned(), Some("a")),
            (r#"{"\u0070revious_response_i\u0064":"a","model":"m"}"#.to_owned(), Some("a")),
            (r#"{"previous\u005Ersponse_id":"a","model":"m"}"#.to_owned(), None),
            (r#"{"previous_response_id":null,"model":"m","x":"y"}"#.to_owned(), None),
            (r#"{"previous_response_id":["a"],"model":"m"}"#.to_owned(), None),
            (r#"{"previous_response_id":"a\u0062c","model":"m"}"#.to_owned(), Some("abc")),
            (r#"{"previous_response_id":"a\u00e9","model":"m"}"#.to_owned(), None),
            (r#"{"previous":"a","previous_response_ids":"b","p":"c","model":"m"}"#.to_owned(), None),
            (r#"{"x":{"previous_response_id":"a"},"model":"m"}"#.to_owned(), None),
            (r#"{"x":"previous_response_id","y":"a","model":"m"}"#.to_owned(), None),
            (format!(r#"{{"previous_response_id":"{long}","model":"m"}}"#), None),
        ] {
            check(&body, Ok("m"));
            for step in 1..body.len() {
                let mut scanner = ModelScanner::json();
                for piece in body.as_bytes().chunks(step) {
                    scanner.feed(piece).unwrap();
                }
                assert_eq!(scanner.continues(), expect, "{body} in pieces of {step}");
            }
        }
    }

    #[test]
    fn depth_is_bounded() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let nested = |depth: usize| {
                let (open, close) = (open.repeat(depth - 1), close.repeat(depth - 1));
                format!(r#"{{"a":{open}null{close},"model":"m"}}"#)
            };
            assert_eq!(scan(ModelScanner::json(), [nested(DEPTH_LIMIT).as_bytes()]), Ok("m".to_owned()));
            let found = scan(ModelScanner::json(), [nested(DEPTH_LIMIT + 1).as_bytes()]);
            assert!(matches!(found, Err(ScanError::InvalidJson { why: "nested too deeply", .. })), "{found:?}");
        }
        // Every bracket must match the one that it closes, across the words of the stack too.
        let body = format!(r#"{{"a":{}{}}}"#, r#"[{"a":"#.repeat(50), "}]".repeat(49) + "]]");
        assert!(matches!(scan(ModelScanner::json(), [body.as_bytes()]), Err(ScanError::InvalidJson { .. })));
    }

    #[test]
    fn the_model_is_known_at_its_closing_quote() {
        let mut scanner = ModelScanner::json();
        let mut feed = |chunk: &str| {
            scanner.feed(chunk.as_bytes()).expect("the body must be valid so far");
            scanner.model().map(str::to_owned)
        };
        assert_eq!(feed(r#"{"model":"m"#), None);
        assert_eq!(feed("\""), Some("m".to_owned()));
        assert_eq!(feed(r#","model":"#), Some("m".to_owned()));
        assert_eq!(feed(r#""m","messages":["#), Some("m".to_owned()));
    }

    /// The values of the top-level `model` keys as `serde_json` reads them, `None` for what is not a string.
    #[derive(Debug)]
    struct Models(Vec<Option<String>>);

    /// A key as bytes, since halves of surrogate pairs are allowed in it.
    struct Key(Vec<u8>);

    impl<'de> Deserialize<'de> for Models {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Object;

            impl<'de> Visitor<'de> for Object {
                type Value = Models;

                fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    formatter.write_str("an object")
                }

                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Models, A::Error> {
                    let mut models = Vec::new();
                    while let Some(Key(key)) = map.next_key()? {
                        if !key.eq_ignore_ascii_case(b"model") {
                            map.next_value::<serde::de::IgnoredAny>()?;
                            continue;
                        }
                        let value = map.next_value::<&RawValue>()?.get();
                        let text = value.starts_with('"').then(|| serde_json::from_str(value));
                        models.push(text.transpose().map_err(serde::de::Error::custom)?);
                    }
                    Ok(Models(models))
                }
            }

            deserializer.deserialize_map(Object)
        }
    }

    impl<'de> Deserialize<'de> for Key {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Bytes;

            impl Visitor<'_> for Bytes {
                type Value = Key;

                fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    formatter.write_str("a key")
                }

                fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Key, E> {
                    Ok(Key(bytes.to_vec()))
                }
            }

            deserializer.deserialize_bytes(Bytes)
        }
    }

    /// The body without its byte order mark, and with `null` for every number, `NaN` and `Infinity`: there the scanner
    /// takes more than `serde_json`.
    fn strict(body: &[u8]) -> Vec<u8> {
        let mut rest = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
        let mut strict = Vec::new();
        let mut in_string = false;
        while let [byte, ..] = rest {
            let words: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
            let word = words.iter().find(|word| rest.starts_with(word));
            let number = rest.iter().take_while(|byte| b"0123456789.eE+-".contains(byte)).count();
            let starts_number = matches!(rest, [b'0'..=b'9', ..] | [b'-', b'0'..=b'9', ..]);
            let (used, text) = match word {
                _ if in_string && *byte == b'\\' => (rest.len().min(2), &rest[..rest.len().min(2)]),
                _ if in_string || *byte == b'"' => (1, &rest[..1]),
                Some(word) => (word.len(), &b"null"[..]),
                None if starts_number => (number, &b"null"[..]),
                None => (1, &rest[..1]),
            };
            in_string ^= *byte == b'"';
            strict.extend_from_slice(text);
            rest = &rest[used..];
        }
        strict
    }

    /// A string of valid JSON holds a raw control character.
    fn has_raw_control(text: &[u8]) -> bool {
        let (mut in_string, mut escaped) = (false, false);
        text.iter().any(|&byte| {
            let is_escaped = std::mem::take(&mut escaped);
            escaped = in_string && !is_escaped && byte == b'\\';
            in_string ^= byte == b'"' && !is_escaped;
            in_string && byte < b' '
        })
    }

    /// Compares the scanner with `serde_json` on any bytes.
    fn check_against_serde(body: &[u8], cuts: &[Index]) -> Result<(), TestCaseError> {
        let found = scan(ModelScanner::json(), [body]);
        prop_assert_eq!(scan(ModelScanner::json(), cut(body, cuts)), found.clone());
        prop_assert_eq!(scan(ModelScanner::json(), body.chunks(1)), found.clone());
        let strict = strict(body);
        match serde_json::from_slice::<Models>(&strict) {
            // `serde_json` takes them in keys that it hands out as bytes.
            Ok(_) if has_raw_control(&strict) => prop_assert!(found.is_err(), "{found:?} {}", body.escape_ascii()),
            Ok(Models(models)) => prop_assert_eq!(
                found,
                expected(models.into_iter().map(|model| model.ok_or(ScanError::ModelNotAString))),
                "{}",
                body.escape_ascii()
            ),
            Err(error) => prop_assert!(found.is_err(), "{error}: {found:?} {}", body.escape_ascii()),
        }
        Ok(())
    }

    fn space() -> impl Strategy<Value = &'static str> {
        select(vec!["", "", "", " ", "\n", "\r\n\t "])
    }

    /// A string literal of the text, every character of it in one of the ways in which it can be written.
    fn literal(text: &str) -> BoxedStrategy<String> {
        let characters: Vec<char> = text.chars().collect();
        prop::collection::vec(0..4_u8, characters.len())
            .prop_map(move |ways| {
                let written = characters.iter().zip(ways).map(|(&character, way)| match (way, character) {
                    (0, _) => {
                        let mut units = [0; 2];
                        character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect()
                    }
                    (1, '/') => "\\/".to_owned(),
                    (1, '\t') => "\\t".to_owned(),
                    (_, '"' | '\\') => format!("\\{character}"),
                    (_, '\0'..='\x1f') => format!("\\u{:04X}", u32::from(character)),
                    _ => character.to_string(),
                });
                format!("\"{}\"", written.collect::<String>())
            })
            .boxed()
    }

    fn string() -> impl Strategy<Value = String> {
        let pieces = select(vec![
            "model",
            "\"",
            "\\",
            "\":\"",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "/",
            "\t",
            "a",
            "\u{e9}",
            "\u{1f600}",
            "\0",
        ]);
        prop::collection::vec(pieces, 0..6).prop_flat_map(|pieces| literal(&pieces.concat()))
    }

    fn object(member: impl Strategy<Value = (String, String)>) -> impl Strategy<Value = String> {
        prop::collection::vec((space(), member, space()), 0..5).prop_map(|members| {
            let members = members
                .into_iter()
                .map(|(before, (key, value), after)| format!("{before}{key}{after}:{before}{value}{after}"));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        })
    }

    fn value() -> impl Strategy<Value = String> {
        let simple =
            select(vec!["null", "true", "false", "0", "-1.5e3", "17", "[]", "{}", "NaN", "-Infinity", "\"\\ud83d\""]);
        prop_oneof![simple.prop_map(str::to_owned), string()].prop_recursive(3, 16, 4, |inner| {
            let key = prop_oneof![literal("model"), string()];
            let array = prop::collection::vec((space(), inner.clone(), space()), 0..4).prop_map(|values| {
                let values = values.into_iter().map(|(before, value, after)| format!("{before}{value}{after}"));
                format!("[{}]", values.collect::<Vec<_>>().join(","))
            });
            prop_oneof![array, object((key, inner))]
        })
    }

    fn document() -> impl Strategy<Value = String> {
        let name = select(vec!["m", "m", "m", "m", "n", "\u{e9}/\u{1f600}", ""]).prop_flat_map(literal);
        let member = prop_oneof![
            6 => (literal("model"), name),
            1 => (literal("model"), value()),
            8 => (string(), value()),
            2 => (literal("Model"), value()),
        ];
        (select(vec!["", "", "\u{feff}"]), space(), object(member), space())
            .prop_map(|(mark, before, object, after)| format!("{mark}{before}{object}{after}"))
    }

    #[derive(Debug, Clone)]
    enum Damage {
        Replace(u8),
        Insert(u8),
        Remove,
        Truncate,
        Repeat(Index),
    }

    fn damage() -> impl Strategy<Value = (Index, Damage)> {
        let byte = select(b"\"\"\\{}[],: \n0-.eENIut/'\0\xEF\xFF".to_vec());
        let damage = prop_oneof![
            4 => byte.clone().prop_map(Damage::Replace),
            4 => byte.prop_map(Damage::Insert),
            4 => Just(Damage::Remove),
            1 => Just(Damage::Truncate),
            2 => any::<Index>().prop_map(Damage::Repeat),
        ];
        (any::<Index>(), damage)
    }

    proptest! {
        #[test]
        fn agrees_with_serde_on_documents(
            document in document(),
            cuts in prop::collection::vec(any::<Index>(), 0..6),
        ) {
            check_against_serde(document.as_bytes(), &cuts)?;
        }

        #[test]
        fn agrees_with_serde_on_damaged_documents(
            document in document(),
            damages in prop::collection::vec(damage(), 1..4),
            cuts in prop::collection::vec(any::<Index>(), 0..6),
        ) {
            let mut body = document.into_bytes();
            for (at, damage) in damages {
                let at = at.index(body.len() + 1);
                match damage {
                    Damage::Insert(byte) => body.insert(at, byte),
                    Damage::Truncate => body.truncate(at),
                    Damage::Repeat(from) => {
                        let piece = body[from.index(at + 1)..at].to_vec();
                        body.splice(at..at, piece);
                    }
                    Damage::Replace(_) | Damage::Remove if at == body.len() => {}
                    Damage::Replace(byte) => body[at] = byte,
                    Damage::Remove => {
                        body.remove(at);
                    }
                }
            }
            check_against_serde(&body, &cuts)?;
        }

        #[test]
        fn agrees_with_serde_on_anything(body in prop::collection::vec(select(b"\"\"\\{}[],: model1u0".to_vec()), 0..60)) {
            check_against_serde(&[b"{\"model\":\"m\"".as_slice(), &body].concat(), &[])?;
        }
    }
}
