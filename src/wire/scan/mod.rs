//! Finds the routing key, `model`, in a request body while the body goes by.
//!
//! Clients name the model first, after twenty megabytes of messages, or behind a file in a form. So the key is looked
//! for in the stream, without holding the body: a scanner takes chunks cut anywhere, keeps a few hundred bytes, and
//! tells the model as soon as its value is complete. It then reads on to the last byte, because servers obey the *last*
//! `model` of a body: a proxy that stopped at the first could be talked into sending a request to a backend under one
//! name and having it served under another. Two values that differ are an error however late the second comes, and a
//! body that parsers are known to read in two ways is refused rather than guessed at.
//!
//! This module knows nothing of HTTP, tables or backends: bytes go in, a name or a reason comes out. `json` holds
//! the grammar of JSON (RFC 8259) as far as it can move a key, `multipart` that of forms (RFC 7578), `encoded` unpacks
//! what is compressed. `prompt` marks the prompt beside it, for those who want to send alike prompts to one place. `usage`
//! is for the way back: it reads in an answer what that tells of its tokens.

mod answer_id;
mod encoded;
mod json;
mod multipart;
mod pairs;
mod prompt;
mod usage;

pub use answer_id::{Found, IdReader};
use encoded::GzipScanner;
use json::JsonScanner;
use multipart::FormScanner;
use pairs::PairScanner;
pub use prompt::{Mark, PROMPT_PART_BYTES_MAX, Prompt, PromptSeed};
pub use usage::{AnswerKind, Finish, Usage, UsageTap};

/// The longest model name, in bytes after unescaping. The longest in use are paths and repository ids of some 200.
pub const MODEL_LIMIT_BYTES: usize = 1024;

/// How much of a longer one is told to its sender, in characters.
pub const MODEL_SHOWN_CHARS: usize = 200;

/// The name of the key in an object, and of the field in a form.
const KEY: &[u8] = b"model";

/// Finds the routing key in a request body that arrives in chunks.
#[derive(Debug)]
pub struct ModelScanner {
    format: Format,
    /// The first error. It is final: the bytes behind it have not been read.
    failure: Option<ScanError>,
}

#[expect(clippy::large_enum_variant, reason = "nearly every body is JSON, and is to be scanned without an allocation")]
#[derive(Debug)]
enum Format {
    Json(JsonScanner),
    Form(Box<FormScanner>),
    Pairs(Box<PairScanner>),
    Gzip(Box<GzipScanner>),
}

/// Why a body names no model that could be routed by. Every one of them is the client's error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// The body is not JSON text, or ends before its object does.
    #[error("request body is not valid JSON: {why} at byte {offset}")]
    InvalidJson {
        /// What was wrong or expected.
        why: &'static str,
        /// Where in the body, counted from 0.
        offset: u64,
    },
    /// The body is JSON, but an array, a string, a number or a literal.
    #[error("request body must be a JSON object")]
    NotAnObject,
    /// The body is not the multipart form that its Content-Type announces, or one that servers read in different ways.
    #[error("request body is not a valid multipart form: {why}")]
    InvalidForm {
        /// What was wrong or expected.
        why: &'static str,
    },
    /// The body is not what its `Content-Encoding: gzip` says.
    #[error("request body is not valid gzip: it is corrupt or cut off")]
    InvalidGzip,
    /// The body decodes to more than a body of its size may.
    #[error("request body decodes to more than {ratio} times its size")]
    DecodesTooLarge {
        /// How many times its size it may be.
        ratio: u64,
    },
    /// The body is compressed in a way that is not understood here, so the model in it cannot be read.
    #[error(
        "request body has Content-Encoding {coding:?}, in which its model cannot be read; send it plain or with gzip"
    )]
    UnsupportedCoding {
        /// The coding, cut to a bearable length.
        coding: String,
    },
    /// The body is complete and well-formed, or empty, and has no `model`.
    #[error("request body names no `model`")]
    ModelMissing,
    /// The value of `model` is a number, a literal, an array or an object.
    #[error("`model` must be a string")]
    ModelNotAString,
    /// The value of `model` is the empty string.
    #[error("`model` must not be empty")]
    ModelEmpty,
    /// The value of `model` is longer than any model's name, so it names none that exists.
    #[error("`model` is longer than the name of any model: {begin:?}…")]
    ModelTooLong {
        /// Its first [`MODEL_SHOWN_CHARS`].
        begin: String,
    },
    /// `model` is there more than once and the values are not the same.
    #[error("`model` is named twice, as {first:?} and as {second:?}")]
    ModelsDiffer {
        /// The value that [`ModelScanner::model`] told.
        first: String,
        /// The next one that was not the same.
        second: String,
    },
}

/// The values of `model` met so far: the one being read and the one that was read first.
#[derive(Debug, Default)]
struct ModelValue {
    reading: Vec<u8>,
    first: Option<String>,
    /// No name is as good as a name: null and the empty string say that there is none.
    may_be_none: bool,
    /// They have said so.
    is_none: bool,
}

// === impl ModelScanner ===

impl ModelScanner {
    /// A scanner for a JSON body.
    pub fn json() -> Self {
        Self::new(Format::Json(JsonScanner::default()))
    }

    /// The scanner for a request with this Content-Type: the one for forms if it is `multipart/form-data`, the one for
    /// JSON for everything else and for none, as clients send JSON under any name.
    ///
    /// The caller has to make sure that there is one Content-Type line only, since servers differ in which of two they
    /// believe.
    ///
    /// # Errors
    ///
    /// [`ScanError::InvalidForm`] for a form without a usable boundary, or in a charset other than UTF-8.
    pub fn for_content_type(content_type: Option<&[u8]>) -> Result<Self, ScanError> {
        // What most requests say needs no closer look.
        if content_type == Some(b"application/json") {
            return Ok(Self::json());
        }
        match content_type.map(FormScanner::for_content_type).transpose()?.flatten() {
            Some(form) => Ok(Self::new(Format::Form(Box::new(form)))),
            None => Ok(Self::json()),
        }
    }

    /// As [`for_content_type`](Self::for_content_type), for a path where servers take forms of every kind:
    /// `application/x-www-form-urlencoded` is read as one, too.
    ///
    /// # Errors
    ///
    /// Those of `for_content_type`.
    pub fn for_fields(content_type: Option<&[u8]>) -> Result<Self, ScanError> {
        match content_type {
            Some(kind) if is_urlencoded(kind) => Ok(Self::new(Format::Pairs(Box::default()))),
            kind => Self::for_content_type(kind),
        }
    }

    /// As [`for_content_type`](Self::for_content_type), for a body that may be compressed.
    ///
    /// # Errors
    ///
    /// Those of `for_content_type`; [`ScanError::UnsupportedCoding`] for every coding but gzip.
    pub fn for_body(content_type: Option<&[u8]>, content_encoding: Option<&[u8]>) -> Result<Self, ScanError> {
        Self::for_content_type(content_type)?.coded(content_encoding)
    }

    /// As `self`, for a body that may be compressed.
    ///
    /// # Errors
    ///
    /// [`ScanError::UnsupportedCoding`] for every coding but gzip.
    pub fn coded(self, content_encoding: Option<&[u8]>) -> Result<Self, ScanError> {
        let coding = content_encoding.unwrap_or_default().trim_ascii();
        if coding.is_empty() || coding.eq_ignore_ascii_case(b"identity") {
            Ok(self)
        } else if coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip") {
            Ok(Self::new(Format::Gzip(Box::new(GzipScanner::new(self.format)))))
        } else {
            const SHOWN_BYTES: usize = 40;
            let shown = String::from_utf8_lossy(&coding[..coding.len().min(SHOWN_BYTES)]).into_owned();
            Err(ScanError::UnsupportedCoding { coding: shown })
        }
    }

    /// Takes null and the empty string for no name at all, as if the key were absent; to be asked for before the first byte.
    pub fn let_model_be_none(&mut self) {
        self.format.let_model_be_none();
    }

    /// Whether both would read the same in every body.
    pub fn reads_as(&self, other: &ModelScanner) -> bool {
        match (&self.format, &other.format) {
            (Format::Json(_), Format::Json(_)) => true,
            (Format::Pairs(_), Format::Pairs(_)) => true,
            (Format::Form(one), Format::Form(other)) => one.reads_as(other),
            (Format::Gzip(one), Format::Gzip(other)) => match (one.format(), other.format()) {
                (Format::Json(_), Format::Json(_)) | (Format::Pairs(_), Format::Pairs(_)) => true,
                (Format::Form(one), Format::Form(other)) => one.reads_as(other),
                _ => false,
            },
            _ => false,
        }
    }

    /// How much is best fed at a time, so that a thread that has others to serve is not kept from them.
    pub fn bite_bytes(&self) -> usize {
        match &self.format {
            Format::Json(_) | Format::Form(_) | Format::Pairs(_) => usize::MAX,
            Format::Gzip(gzip) => gzip.bite_bytes(),
        }
    }

    /// How much has come out of the decoder, in bytes; 0 for a body that is not compressed.
    pub fn decoded_bytes(&self) -> u64 {
        match &self.format {
            Format::Json(_) | Format::Form(_) | Format::Pairs(_) => 0,
            Format::Gzip(gzip) => gzip.decoded_bytes(),
        }
    }

    /// The body is compressed, and decoding it takes memory of its own.
    pub fn decodes(&self) -> bool {
        matches!(self.format, Format::Gzip(_))
    }

    /// Reads the next chunk. Chunks may be cut anywhere; how they are cut changes no result.
    ///
    /// # Errors
    ///
    /// As soon as the body can no longer be routed. Errors are final: every later call returns the same one.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        self.unless_failed(|format| format.feed(chunk))
    }

    /// The model, as soon as its value has been read completely; `None` after an error.
    ///
    /// Until [`finish`](Self::finish) has succeeded it is a promise that may still be broken: a caller that sends bytes
    /// to a backend on the strength of it must keep back the end of the body, and abort when a later call fails.
    pub fn model(&self) -> Option<&str> {
        self.failure.as_ref().map_or_else(|| self.format.model(), |_| None)
    }

    /// The id of the answer that this request continues (`previous_response_id`), if it has said so by now. The
    /// backend that made that answer can continue it.
    pub fn continues(&self) -> Option<&str> {
        self.format.continues()
    }

    /// Has the prompt in the body marked while it goes by; to be asked for before the first byte. A form has none.
    pub fn mark_prompt(&mut self, seed: PromptSeed) {
        if let Some(json) = self.format.json() {
            json.mark_prompt(seed);
        }
    }

    /// The prompt is being marked, and has not been taken.
    pub fn marks_prompt(&self) -> bool {
        self.format.marks_prompt()
    }

    /// The prompt for `model` as far as it has come, if it was to be marked. From then on it is not marked any more, and
    /// costs nothing.
    pub fn take_prompt(&mut self, model: &str) -> Option<Prompt> {
        self.format.json()?.take_prompt(model)
    }

    /// Ends the body. If this succeeds, [`model`](Self::model) is the one and only model that the body names.
    ///
    /// # Errors
    ///
    /// [`ScanError::ModelMissing`] if the body was complete, or empty, without a model; [`ScanError::InvalidJson`] or
    /// [`ScanError::InvalidForm`] if it was cut off; else the error that an earlier call returned.
    pub fn finish(&mut self) -> Result<(), ScanError> {
        self.unless_failed(Format::finish)
    }

    fn new(format: Format) -> Self {
        Self { format, failure: None }
    }

    fn unless_failed(&mut self, act: impl FnOnce(&mut Format) -> Result<(), ScanError>) -> Result<(), ScanError> {
        if self.failure.is_none() {
            self.failure = act(&mut self.format).err();
        }
        self.failure.clone().map_or(Ok(()), Err)
    }
}

// === impl Format ===

impl Format {
    fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        match self {
            Format::Json(json) => json.feed(chunk),
            Format::Form(form) => form.feed(chunk),
            Format::Pairs(pairs) => pairs.feed(chunk),
            Format::Gzip(gzip) => gzip.feed(chunk),
        }
    }

    fn finish(&mut self) -> Result<(), ScanError> {
        match self {
            Format::Json(json) => json.finish(),
            Format::Form(form) => form.finish(),
            Format::Pairs(pairs) => pairs.finish(),
            Format::Gzip(gzip) => gzip.finish(),
        }
    }

    fn let_model_be_none(&mut self) {
        match self {
            Format::Json(json) => json.let_model_be_none(),
            Format::Form(form) => form.let_model_be_none(),
            Format::Pairs(pairs) => pairs.let_model_be_none(),
            Format::Gzip(gzip) => gzip.format_mut().let_model_be_none(),
        }
    }

    fn model(&self) -> Option<&str> {
        match self {
            Format::Json(json) => json.model(),
            Format::Form(form) => form.model(),
            Format::Pairs(pairs) => pairs.model(),
            Format::Gzip(gzip) => gzip.format().model(),
        }
    }

    fn json(&mut self) -> Option<&mut JsonScanner> {
        match self {
            Format::Json(json) => Some(json),
            Format::Form(_) | Format::Pairs(_) => None,
            Format::Gzip(gzip) => gzip.format_mut().json(),
        }
    }

    fn marks_prompt(&self) -> bool {
        match self {
            Format::Json(json) => json.marks_prompt(),
            Format::Form(_) | Format::Pairs(_) => false,
            Format::Gzip(gzip) => gzip.format().marks_prompt(),
        }
    }

    fn continues(&self) -> Option<&str> {
        match self {
            Format::Json(json) => json.noted(),
            Format::Form(_) | Format::Pairs(_) => None,
            Format::Gzip(gzip) => gzip.format().continues(),
        }
    }
}

// === impl ScanError ===

impl ScanError {
    /// The `error.code` of the answer.
    ///
    /// `model_required` where the body could be read and its `model` is no name, `model_not_found` where no model can have
    /// that name; `invalid_json` where the body could not be read, or in two ways, broken forms and models that differ
    /// among them; two more for compressed bodies.
    pub fn code(&self) -> &'static str {
        match self {
            Self::ModelMissing | Self::ModelNotAString | Self::ModelEmpty => "model_required",
            Self::ModelTooLong { .. } => "model_not_found",
            Self::InvalidJson { .. }
            | Self::NotAnObject
            | Self::InvalidForm { .. }
            | Self::InvalidGzip
            | Self::ModelsDiffer { .. } => "invalid_json",
            Self::DecodesTooLarge { .. } => "request_too_large",
            Self::UnsupportedCoding { .. } => "unsupported_encoding",
        }
    }
}

/// Whether this Content-Type is that of pairs.
fn is_urlencoded(content_type: &[u8]) -> bool {
    const KIND: &[u8] = b"application/x-www-form-urlencoded";
    content_type.windows(KIND.len()).any(|window| window.eq_ignore_ascii_case(KIND))
}

// === impl ModelValue ===

impl ModelValue {
    /// Adds to the value being read. Two bytes more than the limit may be held: a form's value is followed by the line
    /// end of its boundary, which is known as such only later.
    fn push(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        let room = MODEL_LIMIT_BYTES + 2 - self.reading.len();
        self.reading.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if bytes.len() > room { Err(self.too_long()) } else { Ok(()) }
    }

    /// Ends the value being read: it becomes the first one, or has to equal it. `not_utf8` is the error if it is not
    /// UTF-8.
    fn complete(&mut self, not_utf8: ScanError) -> Result<(), ScanError> {
        if self.reading.is_empty() {
            return self.say_none(ScanError::ModelEmpty);
        }
        if self.reading.len() > MODEL_LIMIT_BYTES {
            return Err(self.too_long());
        }
        let value = String::from_utf8(std::mem::take(&mut self.reading)).map_err(|_| not_utf8)?;
        match self.said() {
            None => self.first = Some(value),
            Some(first) if first == value => {}
            Some(first) => {
                return Err(ScanError::ModelsDiffer { first: first.to_owned(), second: value });
            }
        }
        Ok(())
    }

    /// Takes a value that is no name; `error` is what it is where there has to be one.
    fn say_none(&mut self, error: ScanError) -> Result<(), ScanError> {
        if !self.may_be_none || self.first.is_some() {
            return Err(error);
        }
        self.is_none = true;
        Ok(())
    }

    /// What has been said before.
    fn said(&self) -> Option<&str> {
        self.first.as_deref().or(self.is_none.then_some(""))
    }

    /// The error for the value being read, which is longer than a name.
    fn too_long(&self) -> ScanError {
        let begin: String = String::from_utf8_lossy(&self.reading).chars().take(MODEL_SHOWN_CHARS).collect();
        match self.said() {
            None => ScanError::ModelTooLong { begin },
            Some(first) => ScanError::ModelsDiffer { first: first.to_owned(), second: format!("{begin}…") },
        }
    }

    /// Ends the body.
    fn finish(&self) -> Result<(), ScanError> {
        self.first.as_ref().map(|_| ()).ok_or(ScanError::ModelMissing)
    }
}

#[cfg(test)]
mod tests;
