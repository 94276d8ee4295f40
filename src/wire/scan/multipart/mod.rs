//! The field `model` of the multipart form that is a request body (RFC 7578, whose framing is RFC 2046, section 5.1).
//!
//! A form is cut at the boundary that its Content-Type announces, and nothing else of it is looked at but the headers
//! of its parts and the value of `model`. Files pass through one substring search and are never held.
//!
//! Form readers are far less alike than JSON parsers. Where two of them could read another `model` in a body, this one
//! refuses it, for a field that it missed could be the one that a backend obeys: a boundary that is not a line of its own
//! or not ended by CR LF, header lines that are folded or end in a bare LF, a charset in which ASCII is not ASCII. The
//! clients of inference APIs send none of these. What stands in front of the first boundary and behind the last is
//! ignored.
//!
//! The header that names a part is written in many ways, and a part with an odd one is refused only if some reader could
//! take it for `model` (`could_name_model`): quotes in the name of a file, an escaped name of another field, a part with
//! no name and another disposition than `form-data` pass.
//!
//! A part named `model` with a file name counts as the field: servers keep it under that name too, so that it displaces
//! a `model` in front of it.

use memchr::memchr;
use memchr::memmem::{self, Finder};
use percent_encoding::percent_decode;

use super::{KEY, ModelValue, ScanError};

/// The longest boundary. RFC 2046, section 5.1.1, allows 70, but servers take more; past this a body could cost too much
/// time.
const BOUNDARY_LIMIT_BYTES: usize = 1024;

/// How many bytes the headers of one part may have, and how many lines. Clients send two or three short ones.
const HEADERS_LIMIT_BYTES: usize = 8 * 1024;
const HEADERS_LIMIT_LINES: usize = 32;

/// How many parts a form may have. Starlette, which vLLM and SGLang are built on, takes 1000 fields and 1000 files.
const PARTS_LIMIT: usize = 1000;

/// Reads one form for its `model`.
#[derive(Debug)]
pub(super) struct FormScanner {
    state: State,
    /// Finds `--boundary`.
    boundary: Finder<'static>,
    charset: Charset,
    parts: usize,
    model: ModelValue,
}

/// How servers may read the bytes of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Charset {
    Utf8,
    /// Bytes of ASCII are ASCII, others depend on the reader.
    Ascii,
}

/// What is being read.
#[derive(Debug)]
enum State {
    Content(Content),
    /// The two bytes behind a boundary; the first of them, once it is there.
    AfterBoundary(Option<u8>),
    Headers(Headers),
    /// Anything: the form has ended.
    Epilogue,
}

/// The bytes in front of a boundary: those of a part, or of nothing in front of the first.
#[derive(Debug)]
struct Content {
    /// Whether they are a value of `model`.
    model: bool,
    /// How that is written.
    charset: Charset,
    /// The last two bytes of it, not counting those withheld.
    last: [u8; 2],
    /// How many bytes more were read. They equal the start of the boundary, and whether they are one or content is for
    /// the next bytes to say.
    withheld: usize,
}

/// The headers of a part, as far as they have been read.
#[derive(Debug, Default)]
struct Headers {
    line: Vec<u8>,
    bytes: usize,
    lines: usize,
    /// Whether the name of the part is `model`; `None` while it is not known.
    model: Option<bool>,
    /// Another header than Content-Disposition reads like the one that names `model`.
    looks_like_model: bool,
    /// Whether the content has to be decoded to be read.
    encoded: bool,
    /// What the part's own Content-Type says, if it says something.
    charset: Option<Result<Charset, ScanError>>,
}

// === impl FormScanner ===

impl FormScanner {
    /// The scanner for a body of this Content-Type; `None` if that is not `multipart/form-data`.
    pub(super) fn for_content_type(content_type: &[u8]) -> Result<Option<Self>, ScanError> {
        let (media_type, parameters) = split_header_value(content_type);
        if !media_type.eq_ignore_ascii_case(b"multipart/form-data") {
            return Ok(None);
        }
        // Starlette decodes the fields by it.
        let charset = parameter(parameters, b"charset")?.map_or(Ok(Charset::Utf8), Charset::of)?;
        match parameter(parameters, b"boundary")? {
            Some(boundary) if is_boundary(boundary) => Ok(Some(Self::new(boundary, charset))),
            Some(_) => Err(invalid("its boundary is too long, or holds characters that servers read differently")),
            None => Err(invalid("its Content-Type has no boundary")),
        }
    }

    fn new(boundary: &[u8], charset: Charset) -> Self {
        Self {
            // A body may begin with its boundary: it is read as if a line had ended in front of it.
            state: State::Content(Content { model: false, charset, last: *b"\r\n", withheld: 0 }),
            boundary: Finder::new(&[b"--", boundary].concat()).into_owned(),
            charset,
            parts: 0,
            model: ModelValue::default(),
        }
    }

    pub(super) fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        let mut rest = chunk;
        while !rest.is_empty() {
            let used = self.step(rest)?;
            rest = &rest[used..];
        }
        Ok(())
    }

    pub(super) fn model(&self) -> Option<&str> {
        self.model.first.as_deref()
    }

    pub(super) fn let_model_be_none(&mut self) {
        self.model.may_be_none = true;
    }

    pub(super) fn reads_as(&self, other: &FormScanner) -> bool {
        self.boundary.needle() == other.boundary.needle()
    }

    pub(super) fn finish(&self) -> Result<(), ScanError> {
        match self.state {
            State::Epilogue => self.model.finish(),
            _ => Err(invalid("the body ends before its last boundary")),
        }
    }

    /// Reads as much as belongs together; returns the number of bytes read.
    fn step(&mut self, rest: &[u8]) -> Result<usize, ScanError> {
        match &mut self.state {
            State::Content(content) => {
                let Some(used) = content.read(rest, &self.boundary, &mut self.model)? else {
                    return Ok(rest.len());
                };
                content.end(&mut self.model)?;
                self.state = State::AfterBoundary(None);
                Ok(used)
            }
            State::AfterBoundary(first) => {
                self.state = match (*first, rest[0]) {
                    (None, byte) => State::AfterBoundary(Some(byte)),
                    (Some(b'-'), b'-') => State::Epilogue,
                    (Some(b'\r'), b'\n') if self.parts == PARTS_LIMIT => return Err(invalid("it has too many parts")),
                    (Some(b'\r'), b'\n') => State::Headers(Headers::default()),
                    _ => return Err(invalid("a boundary is not followed by a line end")),
                };
                Ok(1)
            }
            State::Headers(headers) => {
                let used = headers.read(rest, self.boundary.needle())?;
                if headers.line == b"\r\n" {
                    let model = headers.end()?;
                    let charset = match headers.charset.take().filter(|_| model) {
                        Some(charset) if self.charset == Charset::Utf8 => charset?,
                        Some(charset) => charset.and(Ok(Charset::Ascii))?,
                        None => self.charset,
                    };
                    self.state = State::Content(Content { model, charset, last: [0; 2], withheld: 0 });
                    self.parts += 1;
                }
                Ok(used)
            }
            State::Epilogue => Ok(rest.len()),
        }
    }
}

// === impl Content ===

impl Content {
    /// Reads up to the end of the next boundary and returns how many bytes that was; `None` if all of `rest` was read
    /// and no boundary has ended yet.
    fn read(
        &mut self,
        rest: &[u8],
        boundary: &Finder<'static>,
        model: &mut ModelValue,
    ) -> Result<Option<usize>, ScanError> {
        let needle = boundary.needle();
        let mut at = 0;
        // A boundary that began in an earlier chunk is followed byte by byte, for at most its own length.
        while self.withheld > at {
            let Some(&byte) = rest.get(at) else { return Ok(None) };
            at += 1;
            let mut window = [0; 2 + BOUNDARY_LIMIT_BYTES];
            window[..self.withheld].copy_from_slice(&needle[..self.withheld]);
            window[self.withheld] = byte;
            let window = &window[..=self.withheld];
            self.withheld = overlap(window, needle);
            self.take(&window[..window.len() - self.withheld], model)?;
            if self.withheld == needle.len() {
                return Ok(Some(at));
            }
        }
        // What is withheld now lies in this chunk and is searched again together with the rest of it.
        at -= std::mem::take(&mut self.withheld);
        let unread = &rest[at..];
        if let Some(found) = boundary.find(unread) {
            self.take(&unread[..found], model)?;
            return Ok(Some(at + found + needle.len()));
        }
        self.withheld = overlap(unread, needle);
        self.take(&unread[..unread.len() - self.withheld], model)?;
        Ok(None)
    }

    /// Takes bytes that are no part of a boundary.
    fn take(&mut self, bytes: &[u8], model: &mut ModelValue) -> Result<(), ScanError> {
        match *bytes {
            [] => {}
            [byte] => self.last = [self.last[1], byte],
            [.., byte, last] => self.last = [byte, last],
        }
        if self.model { model.push(bytes) } else { Ok(()) }
    }

    /// Ends at a boundary, to which the line end in front of it belongs.
    fn end(&self, model: &mut ModelValue) -> Result<(), ScanError> {
        if self.last != *b"\r\n" {
            return Err(invalid("a boundary is not preceded by a line end"));
        }
        if self.model {
            model.reading.truncate(model.reading.len().saturating_sub(2));
            if self.charset == Charset::Ascii && !model.reading.is_ascii() {
                return Err(invalid("`model` is not ASCII, and the charset is not UTF-8"));
            }
            model.complete(invalid("`model` is not UTF-8"))?;
        }
        Ok(())
    }
}

// === impl Headers ===

impl Headers {
    /// Reads up to the end of the line, or all of `rest`; returns the number of bytes read. The line stays in `line` if
    /// it is the empty one behind the headers.
    fn read(&mut self, rest: &[u8], boundary: &[u8]) -> Result<usize, ScanError> {
        let used = memchr(b'\n', rest).map_or(rest.len(), |end| end + 1);
        self.bytes += used;
        if self.bytes > HEADERS_LIMIT_BYTES {
            return Err(invalid("the headers of a part are too long"));
        }
        self.line.extend_from_slice(&rest[..used]);
        if self.line.ends_with(b"\n") && self.line != b"\r\n" {
            let mut line = std::mem::take(&mut self.line);
            // It has the form of a header's name, but readers that look for boundaries first see a part that ends here.
            if line.starts_with(boundary) {
                return Err(invalid("a boundary stands among the headers of a part"));
            }
            self.header(&line)?;
            line.clear();
            self.line = line;
        }
        Ok(used)
    }

    /// Reads one line.
    fn header(&mut self, line: &[u8]) -> Result<(), ScanError> {
        self.lines += 1;
        if self.lines > HEADERS_LIMIT_LINES {
            return Err(invalid("a part has too many headers"));
        }
        let Some(line) = line.strip_suffix(b"\r\n") else {
            return Err(invalid("a header of a part does not end in CR LF"));
        };
        if line.iter().any(|&byte| byte.is_ascii_control() && byte != b'\t') {
            return Err(invalid("a header of a part holds a control character"));
        }
        let colon = memchr(b':', line).ok_or(invalid("a header of a part has no colon"))?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        // This also refuses folded lines, which begin with a space.
        if !is_token(name) {
            return Err(invalid("a header of a part has no valid name"));
        }
        if name.eq_ignore_ascii_case(b"content-disposition") {
            let is_model = names_model(value)?;
            if self.model.replace(is_model).is_some_and(|before| before != is_model) {
                return Err(invalid("a part has two Content-Dispositions"));
            }
            return Ok(());
        }
        self.looks_like_model |= memmem::find(value, b"name").is_some() && could_name_model(value);
        if name.eq_ignore_ascii_case(b"content-transfer-encoding") {
            let identities: [&[u8]; 3] = [b"7bit", b"8bit", b"binary"];
            self.encoded |= !identities.iter().any(|identity| value.eq_ignore_ascii_case(identity));
        } else if name.eq_ignore_ascii_case(b"content-type") {
            let (_, parameters) = split_header_value(value);
            // Some servers decode a field by it. Of parameters that cannot be read, none says a charset.
            if let Ok(Some(charset)) = parameter(parameters, b"charset") {
                let charset = Charset::of(charset);
                self.charset = Some(match self.charset.take() {
                    Some(other) if other != charset => other.and(charset).and(Ok(Charset::Ascii)),
                    _ => charset,
                });
            }
        }
        Ok(())
    }

    /// Ends the headers; tells whether the part is the field `model`.
    fn end(&self) -> Result<bool, ScanError> {
        match self.model {
            Some(true) if self.encoded => Err(invalid("`model` has a Content-Transfer-Encoding")),
            Some(model) => Ok(model),
            None if self.looks_like_model => Err(invalid("a part has no Content-Disposition")),
            // A part without a name is no server's `model`.
            None => Ok(false),
        }
    }
}

// === impl Charset ===

impl Charset {
    /// How this charset reads. Only those are known in which every byte of ASCII stands for itself: in others a value, or
    /// the name of a field, may be another one.
    fn of(name: &[u8]) -> Result<Charset, ScanError> {
        // Servers look names up without regard to case and punctuation.
        let name: Vec<u8> =
            name.iter().filter(|byte| byte.is_ascii_alphanumeric()).map(u8::to_ascii_lowercase).collect();
        let is_number = |rest: &[u8]| matches!(rest.len(), 1..=2) && rest.iter().all(u8::is_ascii_digit);
        match &name[..] {
            b"utf8" => Ok(Charset::Utf8),
            b"ascii" | b"usascii" | b"ansix341968" | b"ansix341986" | b"iso646us" => Ok(Charset::Ascii),
            b"iso8859" | b"latin" | b"koi8r" | b"koi8u" | b"koi8t" | b"macroman" | b"macintosh" | b"maccyrillic"
            | b"tis620" | b"cp437" | b"cp850" | b"cp852" | b"cp855" | b"cp858" | b"cp866" | b"cp874"
            | b"windows874" => Ok(Charset::Ascii),
            // Of two bytes, but a lone one of ASCII stands for itself.
            b"gbk" | b"gb2312" | b"gb18030" | b"big5" | b"big5hkscs" | b"eucjp" | b"euckr" | b"euctw" => {
                Ok(Charset::Ascii)
            }
            name => {
                let families: [&[u8]; 4] = [b"iso8859", b"latin", b"windows125", b"cp125"];
                let is_known = families.iter().filter_map(|family| name.strip_prefix(*family)).any(is_number);
                if is_known { Ok(Charset::Ascii) } else { Err(invalid("its charset is not UTF-8 or one like ASCII")) }
            }
        }
    }
}

/// Whether a Content-Disposition is that of the field `model`. Its first word does not count: Starlette never looks at it.
fn names_model(disposition: &[u8]) -> Result<bool, ScanError> {
    let (kind, parameters) = split_header_value(disposition);
    let doubt = match parameter(parameters, b"name") {
        _ if !is_token(kind) => invalid("a Content-Disposition is malformed"),
        // Python drops angle brackets as it drops quotes.
        Ok(Some(name)) if name.contains(&b'\\') || name.starts_with(b"<") => invalid("the name of a part is escaped"),
        Ok(Some(KEY)) => return Ok(true),
        // What is escaped elsewhere may look like a name to a reader that knows no escapes.
        Ok(Some(_)) if parameters.contains(&b'\\') => invalid("the parameters of a header are escaped"),
        Ok(Some(_)) => return Ok(false),
        Ok(None) => invalid("a part has no name"),
        Err(why) => why,
    };
    if could_name_model(disposition) { Err(doubt) } else { Ok(false) }
}

/// Whether any reader could take this for the Content-Disposition of the field `model`: one that does not know quotes or
/// escapes, that looks for `name=` anywhere, that believes the first of two names or the last, or that decodes them.
fn could_name_model(disposition: &[u8]) -> bool {
    let text: Vec<u8> = percent_decode(disposition).collect();
    (0..text.len()).any(|at| {
        // Not the end of `filename`.
        let is_begin = at == 0 || !is_in_word(text[at - 1]);
        let Some(mut rest) = after_word(&text[at..], b"name").filter(|_| is_begin).map(skip_marks) else {
            return false;
        };
        if let Some(section) = rest.strip_prefix(b"*") {
            if section.first().is_some_and(u8::is_ascii_digit) {
                return true;
            }
            // `name*=charset'language'value` (RFC 8187).
            let Some(value) = skip_marks(section).strip_prefix(b"=") else { return true };
            let is_like_ascii =
                [&b"utf-8"[..], b"iso-8859-1"].iter().any(|charset| after_word(value, charset).is_some());
            return !is_like_ascii || value.split(|byte| *byte == b'\'').any(is_key);
        }
        rest = skip_marks(rest);
        rest.strip_prefix(b"=").is_some_and(is_key)
    })
}

/// Whether `text` begins with the key, but for what readers may drop.
fn is_key(text: &[u8]) -> bool {
    after_word(skip_marks(text), KEY).is_some_and(|rest| rest.first().is_none_or(|byte| !is_in_word(*byte)))
}

/// What is behind `word` at the beginning of `text`, without regard to case and to marks within it.
fn after_word<'t>(mut text: &'t [u8], word: &[u8]) -> Option<&'t [u8]> {
    for letter in word {
        let (first, rest) = skip_marks(text).split_first()?;
        if !first.eq_ignore_ascii_case(letter) {
            return None;
        }
        text = rest;
    }
    Some(text)
}

/// `text` without what it begins with that readers may drop: quotes of any kind, escapes, blanks.
fn skip_marks(text: &[u8]) -> &[u8] {
    let is_mark = |byte: &u8| matches!(byte, b'"' | b'\\' | b'\'' | b'<' | b' ' | b'\t');
    &text[text.iter().take_while(|byte| is_mark(byte)).count()..]
}

fn is_in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// Splits a header value into what precedes the first semicolon, and the rest.
fn split_header_value(value: &[u8]) -> (&[u8], &[u8]) {
    let (head, parameters) = value.split_at(memchr(b';', value).unwrap_or(value.len()));
    (head.trim_ascii(), parameters)
}

/// The value of the parameter `wanted` among parameters such as `; name="model"; filename=a.wav` (RFC 9110, section
/// 5.6.6), without its quotes, but with any escapes between them.
fn parameter<'a>(mut parameters: &'a [u8], wanted: &[u8]) -> Result<Option<&'a [u8]>, ScanError> {
    let mut found = None;
    loop {
        parameters = parameters.trim_ascii();
        // A last semicolon with nothing behind it is common and harmless.
        if parameters.is_empty() || parameters == b";" {
            return Ok(found);
        }
        let Some((name, value, rest)) = split_parameter(parameters) else {
            return Err(invalid("the parameters of a header are malformed"));
        };
        // `wanted*`, `wanted*0` and so on: RFC 2231, RFC 8187.
        let base = name.split(|&byte| byte == b'*').next().unwrap_or(name);
        if base.eq_ignore_ascii_case(wanted) && (base.len() < name.len() || found.replace(value).is_some()) {
            return Err(invalid("a parameter of a header is there twice, or encoded"));
        }
        parameters = rest;
    }
}

/// Splits `; name=value...` into name, value and what is behind; `None` if it is malformed.
fn split_parameter(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let text = text.strip_prefix(b";")?.trim_ascii_start();
    let (name, text) = text.split_at(memchr(b'=', text)?);
    if !is_token(name) {
        return None;
    }
    let value = &text[1..];
    let Some(quoted) = value.strip_prefix(b"\"") else {
        let (value, rest) = value.split_at(memchr(b';', value).unwrap_or(value.len()));
        let malformed = value.contains(&b'"') || value.trim_ascii_start().len() < value.len();
        return (!malformed).then_some((name, value.trim_ascii_end(), rest));
    };
    let mut end = 0;
    while *quoted.get(end)? != b'"' {
        end += if quoted[end] == b'\\' { 2 } else { 1 };
    }
    Some((name, &quoted[..end], &quoted[end + 1..]))
}

/// A token of RFC 9110, section 5.6.2.
fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// A boundary that all servers read alike. RFC 2046, section 5.1.1, allows fewer characters; those that may end a parameter,
/// or that servers drop, are none.
fn is_boundary(text: &[u8]) -> bool {
    (1..=BOUNDARY_LIMIT_BYTES).contains(&text.len())
        && text.iter().all(|byte| matches!(byte, b' '..=b'~') && !b"\"\\;<>".contains(byte))
        && !text.ends_with(b" ")
}

/// The length of the longest end of `text` that `needle` begins with.
fn overlap(text: &[u8], needle: &[u8]) -> usize {
    (1..=needle.len().min(text.len())).rev().find(|&length| text.ends_with(&needle[..length])).unwrap_or(0)
}

fn invalid(why: &'static str) -> ScanError {
    ScanError::InvalidForm { why }
}

#[cfg(test)]
mod tests;
