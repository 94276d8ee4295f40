//! Reads an answer's JSON object, or one of its events', for what [`Findings`] keeps.
//!
//! Only the paths that lead to a place of interest ([`Scope`]) are followed. Everything else is skipped: a string by a
//! search for its end, an array by a search for its brackets and for strings, since whatever else it holds its own
//! brackets must match. So a text, a tool's arguments or an embedding may hold what looks like usage and is never read,
//! a megabyte of numbers costs little, and nothing depends on how deep it nests. What bends the grammar a little is read
//! all the same; where the reader no longer knows what it sees, it gives up on this object and waits for the next.
//!
//! Keys are compared as they are written: no server escapes the letters of its keys.

use std::borrow::Cow;

use memchr::{memchr2, memchr3};

use super::{
    Finish, ID_LIMIT_BYTES,
    findings::Findings,
    places::{Brackets, Member, Scope, Word},
    stencil::Value,
};

/// How long a key or a word may be that is looked at.
const TOKEN_LIMIT_BYTES: usize = ID_LIMIT_BYTES;

/// Reads one JSON object after another.
#[derive(Debug)]
pub(super) struct ObjectReader {
    state: State,
    /// The outermost scope.
    root: Scope,
    /// The scopes that are open, up to `depth`.
    open: [Scope; Scope::DEPTH],
    depth: u8,
    /// What the elements of the innermost of them mean, if it is an array.
    element: Option<Member>,
    /// What the value that comes next, or is being read, means.
    member: Member,
    /// The value of the number that is being read, if it is one that counts something.
    number: Option<u32>,
    /// Brackets of the kind being skipped that are open.
    skipped: u64,
    /// The start of the key or the word that the end of a chunk went through.
    token: Vec<u8>,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The object.
    Start,
    /// A key or the end, in an object; a value or the end, in an array.
    Next,
    /// The rest of a key.
    Key,
    /// The rest of a key that means nothing, or that of an escape sequence in it.
    OtherKey,
    OtherKeyEscape,
    Colon,
    Value,
    /// A text's first byte, or its end if it is empty.
    Text,
    /// The rest of a string that means something.
    Word,
    /// The rest of a string that means nothing, or nothing any more.
    OtherText,
    OtherTextEscape,
    Number,
    /// The rest of a literal, or of a number that means nothing.
    Bare,
    /// The rest of an object or an array that means nothing, of a string in it, of an escape sequence in that.
    Skip(Brackets),
    SkipText(Brackets),
    SkipEscape(Brackets),
    /// Nothing: the object is complete.
    Complete,
    /// Anything: this is not the object that it seemed to be.
    Lost,
}

// === impl ObjectReader ===

impl ObjectReader {
    /// A reader for the one object of an answer (`whole`), or for the objects of a stream.
    pub(super) fn new(whole: bool) -> ObjectReader {
        let root = if whole { Scope::Answer } else { Scope::Event };
        ObjectReader {
            state: State::Start,
            root,
            open: [root; Scope::DEPTH],
            depth: 0,
            element: None,
            member: Member::Nothing,
            number: None,
            skipped: 0,
            token: Vec::new(),
        }
    }

    /// Forgets the object that is being read: another begins.
    pub(super) fn restart(&mut self) {
        self.state = State::Start;
        self.depth = 0;
        self.token = Vec::new();
    }

    /// Nothing of an object has been read.
    pub(super) fn is_fresh(&self) -> bool {
        self.state == State::Start
    }

    /// An object has been read to its end.
    pub(super) fn is_complete(&self) -> bool {
        self.state == State::Complete
    }

    /// Reads on in the object. The chunk has `beyond` bytes behind the text.
    pub(super) fn feed(&mut self, text: &[u8], beyond: usize, findings: &mut Findings) {
        findings.line(beyond);
        // Everything below takes the rest of the text and returns what it leaves of it.
        let mut rest = text;
        while let [byte, after @ ..] = rest {
            rest = match (self.state, byte) {
                (State::Complete | State::Lost, _) => return,

                (State::Key, _) => self.key(rest, findings),
                (State::OtherKey, _) => self.other_key(rest),
                (State::OtherKeyEscape, _) => self.then(State::OtherKey, after),
                (State::Text, b'"') => self.then(State::Next, after),
                (State::Text, _) => {
                    findings.content();
                    findings.mark(Value::Text, rest);
                    self.other_text(rest)
                }
                (State::Word, _) => self.word(rest, findings),
                (State::OtherText, _) => self.other_text(rest),
                (State::OtherTextEscape, _) => self.then(State::OtherText, after),
                (State::Number, _) => self.number(rest, findings),
                (State::Bare, _) => self.bare(rest),
                (State::Skip(brackets), _) => self.skip(brackets, rest, findings),
                (State::SkipText(brackets), _) => self.skip_text(brackets, rest),
                (State::SkipEscape(brackets), _) => self.then(State::SkipText(brackets), after),

                (_, byte) if is_space(*byte) => after,

                (State::Colon, b':') => self.then(State::Value, after),
                (State::Value, _) => self.value(rest, findings),
                (State::Next, b',') => match (self.element, after) {
                    (None, [b'"', after @ ..]) => self.key(after, findings),
                    _ => after,
                },
                (State::Next, b'}' | b']') => self.close(after),
                (State::Next, _) => match (self.element, byte) {
                    (None, b'"') => self.key(after, findings),
                    (None, _) => self.then(State::Lost, &[]),
                    (Some(member), _) => {
                        self.member = member;
                        self.value(rest, findings)
                    }
                },

                (State::Start, b'{') => self.open(self.root, after),
                // A byte order mark.
                (State::Start, 0xEF | 0xBB | 0xBF) => after,
                (State::Start | State::Colon, _) => self.then(State::Lost, &[]),
            };
        }
    }

    /// Begins a value.
    fn value<'a>(&mut self, rest: &'a [u8], findings: &mut Findings) -> &'a [u8] {
        let after = &rest[1..];
        match (rest[0], self.member) {
            (b'"', Member::Text | Member::TextOr(_)) => self.then(State::Text, after),
            (b'"', Member::Word(_)) => self.word(after, findings),
            (b'"' | b'{' | b'[', Member::Error) => {
                findings.finish(Finish::Error);
                self.member = Member::Nothing;
                self.value(rest, findings)
            }
            (b'"', _) => {
                findings.mark(Value::Other, after);
                self.other_text(after)
            }
            (b'{', Member::Scope(scope) | Member::TextOr(scope)) if scope.brackets() == Brackets::Object => {
                self.open(scope, after)
            }
            (b'[', Member::Scope(scope)) if scope.brackets() == Brackets::Array => self.open(scope, after),
            (b'{', Member::Content) => {
                findings.content();
                self.begin_skip(Brackets::Object, after, findings)
            }
            (b'{', _) => self.begin_skip(Brackets::Object, after, findings),
            (b'[', _) => self.begin_skip(Brackets::Array, after, findings),
            (b'0'..=b'9', Member::Count(_)) => {
                self.number = Some(0);
                self.number(rest, findings)
            }
            (_, Member::Nothing) => {
                findings.mark(Value::Bare, rest);
                self.bare(rest)
            }
            _ => self.bare(rest),
        }
    }

    /// Enters an object or an array.
    fn open<'a>(&mut self, scope: Scope, after: &'a [u8]) -> &'a [u8] {
        debug_assert!(usize::from(self.depth) < Scope::DEPTH, "scopes must not lie deeper in each other");
        self.open[usize::from(self.depth)] = scope;
        self.depth += 1;
        self.element = scope.element();
        self.then(State::Next, after)
    }

    /// Leaves the innermost of them.
    fn close<'a>(&mut self, after: &'a [u8]) -> &'a [u8] {
        self.depth -= 1;
        if self.depth == 0 {
            return self.then(State::Complete, after);
        }
        self.element = self.open[usize::from(self.depth) - 1].element();
        self.then(State::Next, after)
    }

    /// Reads the rest of a key.
    fn key<'a>(&mut self, rest: &'a [u8], findings: &mut Findings) -> &'a [u8] {
        match split_text(rest) {
            (run, [b'"', after @ ..]) => {
                let key = self.joined(run);
                let scope = self.open[usize::from(self.depth) - 1];
                self.member = key.map_or(Member::Nothing, |key| scope.member(&key));
                match after {
                    [b':', first, ..] if !is_space(*first) => self.value(&after[1..], findings),
                    _ => self.then(State::Colon, after),
                }
            }
            (run, []) if self.keep(run) => self.then(State::Key, &[]),
            // Too long, or with an escape sequence.
            (_, stop) => {
                self.token = Vec::new();
                self.then(State::OtherKey, stop)
            }
        }
    }

    /// Reads the rest of a key that means nothing.
    fn other_key<'a>(&mut self, rest: &'a [u8]) -> &'a [u8] {
        self.member = Member::Nothing;
        match end_of_text(rest) {
            TextEnd::Quote(at) => self.then(State::Colon, &rest[at + 1..]),
            TextEnd::Open => self.then(State::OtherKey, &[]),
            TextEnd::Escape => self.then(State::OtherKeyEscape, &[]),
        }
    }

    /// Reads the rest of a word.
    fn word<'a>(&mut self, rest: &'a [u8], findings: &mut Findings) -> &'a [u8] {
        match split_text(rest) {
            (run, [b'"', after @ ..]) => {
                if let Some(word) = self.joined(run) {
                    self.told(&word, findings);
                }
                self.then(State::Next, after)
            }
            (run, []) if self.keep(run) => self.then(State::Word, &[]),
            (_, stop) => {
                self.token = Vec::new();
                self.then(State::OtherText, stop)
            }
        }
    }

    /// Takes a word.
    fn told(&self, word: &[u8], findings: &mut Findings) {
        let Member::Word(kind) = self.member else { return };
        match (kind, Finish::of(word)) {
            (Word::Finish, Some(finish)) => findings.finish(finish),
            (Word::Status, Some(status)) => findings.status(status),
            (Word::Finish | Word::Status, None) => {}
            (Word::IncompleteReason, reason) => findings.incomplete_reason(reason),
            (Word::Object | Word::Type, Some(Finish::Error)) => findings.finish(Finish::Error),
            (Word::Object, _) if word == b"response" => findings.response(),
            (Word::Object | Word::Type, _) => {}
            (Word::Id, _) => findings.id(word),
            (Word::ResponseId, _) => {
                findings.response();
                findings.id(word);
            }
        }
    }

    /// Keeps the start of a key or word for when the rest comes, unless it is longer than any that means something.
    fn keep(&mut self, run: &[u8]) -> bool {
        let fits = self.token.len() + run.len() <= TOKEN_LIMIT_BYTES;
        if fits {
            self.token.extend_from_slice(run);
        }
        fits
    }

    /// A key or word of which this is the end; `None` if it is longer than any that means something.
    fn joined<'a>(&mut self, run: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        let mut token = std::mem::take(&mut self.token);
        if token.len() + run.len() > TOKEN_LIMIT_BYTES {
            return None;
        }
        if token.is_empty() {
            return Some(Cow::Borrowed(run));
        }
        token.extend_from_slice(run);
        Some(Cow::Owned(token))
    }

    /// Reads the rest of a string that means nothing.
    fn other_text<'a>(&mut self, rest: &'a [u8]) -> &'a [u8] {
        match end_of_text(rest) {
            TextEnd::Quote(at) => self.then(State::Next, &rest[at + 1..]),
            TextEnd::Open => self.then(State::OtherText, &[]),
            TextEnd::Escape => self.then(State::OtherTextEscape, &[]),
        }
    }

    /// Reads the rest of a number.
    fn number<'a>(&mut self, rest: &'a [u8], findings: &mut Findings) -> &'a [u8] {
        for (at, &byte) in rest.iter().enumerate() {
            self.number = match byte {
                b'0'..=b'9' => self
                    .number
                    .and_then(|number| number.checked_mul(10))
                    .and_then(|number| number.checked_add(u32::from(byte - b'0'))),
                b'.' | b'e' | b'E' | b'+' | b'-' => None,
                _ => {
                    if let (Some(number), Member::Count(count)) = (self.number, self.member) {
                        findings.count(count, number);
                    }
                    return self.then(State::Next, &rest[at..]);
                }
            };
        }
        self.then(State::Number, &[])
    }

    /// Reads the rest of a literal, or of a number that means nothing.
    fn bare<'a>(&mut self, rest: &'a [u8]) -> &'a [u8] {
        match end_of_bare(rest) {
            Some(at) => self.then(State::Next, &rest[at..]),
            None => self.then(State::Bare, &[]),
        }
    }

    /// Begins an object or array that means nothing.
    fn begin_skip<'a>(&mut self, brackets: Brackets, after: &'a [u8], findings: &mut Findings) -> &'a [u8] {
        self.skipped = 1;
        self.skip(brackets, after, findings)
    }

    /// Reads the rest of an object or array that means nothing.
    fn skip<'a>(&mut self, brackets: Brackets, mut rest: &'a [u8], findings: &mut Findings) -> &'a [u8] {
        let (open, close) = match brackets {
            Brackets::Object => (b'{', b'}'),
            Brackets::Array => (b'[', b']'),
        };
        while let Some(at) = memchr3(b'"', open, close, rest) {
            let byte = rest[at];
            rest = &rest[at + 1..];
            if byte == b'"' {
                findings.mark(Value::Other, rest);
                return self.skip_text(brackets, rest);
            } else if byte == open {
                self.skipped += 1;
            } else {
                self.skipped -= 1;
                if self.skipped == 0 {
                    return self.then(State::Next, rest);
                }
            }
        }
        self.then(State::Skip(brackets), &[])
    }

    /// Reads the rest of a string in an object or array that means nothing.
    fn skip_text<'a>(&mut self, brackets: Brackets, rest: &'a [u8]) -> &'a [u8] {
        match end_of_text(rest) {
            TextEnd::Quote(at) => self.then(State::Skip(brackets), &rest[at + 1..]),
            TextEnd::Open => self.then(State::SkipText(brackets), &[]),
            TextEnd::Escape => self.then(State::SkipEscape(brackets), &[]),
        }
    }

    /// Sets what comes next.
    fn then<'a>(&mut self, next: State, rest: &'a [u8]) -> &'a [u8] {
        self.state = next;
        rest
    }
}

#[cfg(test)]
impl ObjectReader {
    pub(super) fn held_bytes(&self) -> usize {
        self.token.capacity()
    }
}

/// Looks for the end of a literal or number.
pub(super) fn end_of_bare(rest: &[u8]) -> Option<usize> {
    rest.iter().position(|&byte| matches!(byte, b',' | b'}' | b']') || is_space(byte))
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

/// Where a string ends.
pub(super) enum TextEnd {
    /// In front of the quote that is there.
    Quote(usize),
    /// Not here.
    Open,
    /// Not here, and the backslash of an escape sequence is the last byte.
    Escape,
}

/// Splits a string in front of its closing quote or its first escape sequence.
fn split_text(rest: &[u8]) -> (&[u8], &[u8]) {
    rest.split_at(memchr2(b'"', b'\\', rest).unwrap_or(rest.len()))
}

/// Looks for the end of a string.
pub(super) fn end_of_text(rest: &[u8]) -> TextEnd {
    let mut at = 0;
    while let Some(run) = memchr2(b'"', b'\\', &rest[at..]) {
        at += run;
        if rest[at] == b'"' {
            return TextEnd::Quote(at);
        }
        if at + 1 == rest.len() {
            return TextEnd::Escape;
        }
        // Whatever is escaped, and be it a quote.
        at += 2;
    }
    TextEnd::Open
}
