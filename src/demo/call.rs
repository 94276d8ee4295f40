//! What a request asks for, and the words that answer it.
//!
//! Pure: bytes in, values out. Bodies are read as JSON text that is taken apart only where something is needed, so that a
//! body of many megabytes costs little more than one pass over it. Like vLLM, the last of two equal keys wins, and a
//! request without a model gets the first one.

use std::collections::BTreeMap;

use http::StatusCode;
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{control::Settings, load::Finished};

/// Longer texts are not repeated to the user.
const ECHO_MAX_BYTES: usize = 4096;

/// At most so many of the user's words are repeated.
const ECHO_MAX_WORDS: usize = 12;

/// Said again and again until an answer is long enough.
const PADDING: [&str; 16] = [
    "This", "backend", "runs", "no", "model", "at", "all:", "it", "only", "speaks", "until", "it", "has", "said",
    "enough", "words.",
];

/// A JSON body, taken apart at its top level.
#[derive(Default)]
pub(super) struct Call<'a>(BTreeMap<String, &'a RawValue>);

/// Why a request is refused, in vLLM's words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) kind: &'static str,
    pub(super) message: String,
    pub(super) param: Option<String>,
}

/// An answer that is said token by token. The same request gets the same words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    opening: Vec<String>,
    /// Length of the answer; a tool call counts as one.
    pub(super) tokens: u32,
    pub(super) finished: Finished,
    /// Name of the tool to call, instead of words.
    pub(super) tool: Option<String>,
}

/// An element of `messages`, or of the `input` of a response.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(default)]
    role: String,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    r#type: String,
    text: Option<String>,
}

// === impl Call ===

impl<'a> Call<'a> {
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(body).map(Self).map_err(|error| {
            let what = match error.is_data() {
                // Its own words would repeat the value that it found, however long.
                true => "input should be an object".to_owned(),
                false => format!("JSON decode error, {error}"),
            };
            let lines_before = error.line().saturating_sub(1);
            let line_at = memchr::memchr_iter(b'\n', body).take(lines_before).last().map_or(0, |newline| newline + 1);
            Refusal::bad_request(
                Some(format!("body.{}", line_at + error.column())),
                format!("1 validation error: {what}"),
            )
        })
    }

    /// The value of a key; none when it is missing or not of this type.
    pub(super) fn get<T: Deserialize<'a>>(&self, key: &str) -> Option<T> {
        serde_json::from_str(self.raw(key)?.get()).ok()
    }

    /// The JSON text of a key; none when it is missing.
    pub(super) fn raw(&self, key: &str) -> Option<&'a RawValue> {
        self.0.get(key).copied()
    }

    /// The JSON text of a key that the endpoint cannot do without.
    pub(super) fn required(&self, key: &str) -> Result<&'a RawValue, Refusal> {
        self.raw(key).ok_or_else(|| Refusal::bad_request(Some(key.into()), format!("`{key}`: field required")))
    }

    /// The model to answer as.
    pub(super) fn model(&self, models: &[String]) -> Result<String, Refusal> {
        let asked: Option<String> = match self.raw("model") {
            None => None,
            Some(raw) => serde_json::from_str(raw.get()).map_err(|_| {
                Refusal::bad_request(Some("model".into()), "`model`: input should be a valid string".into())
            })?,
        };
        served(asked.as_deref(), models)
    }

    /// Tokens of everything that counts as prompt, in whichever of these fields it stands; none when there is none.
    pub(super) fn prompt_tokens(&self) -> u64 {
        let keys = ["messages", "system", "tools", "prompt", "input", "query", "documents"];
        keys.iter().filter_map(|key| self.raw(key)).map(|raw| tokens_in(raw.get())).sum()
    }

    /// Whether the answer shall be a stream.
    pub(super) fn streams(&self) -> bool {
        self.get("stream").unwrap_or(false)
    }

    /// Whether a stream shall end with a chunk of usage.
    pub(super) fn wants_usage_chunk(&self) -> bool {
        #[derive(Deserialize)]
        struct StreamOptions {
            include_usage: Option<bool>,
        }
        self.get("stream_options").is_some_and(|options: StreamOptions| options.include_usage == Some(true))
    }

    /// The answer to `messages`: to a user who offers tools it is a call of the first one, else words.
    pub(super) fn reply_to_messages(&self, name: &str, settings: &Settings) -> Result<Reply, Refusal> {
        let expected =
            || Refusal::bad_request(Some("messages".into()), "`messages`: expected a list of messages".into());
        let messages = list_of::<Message<'_>>(self.required("messages")?).ok_or_else(expected)?;
        let asks = messages.last().is_some_and(|last| last.role == "user" && !last.is_tool_result());
        Ok(match self.first_tool().filter(|_| asks) {
            Some(tool) => Reply { opening: Vec::new(), tokens: 1, finished: Finished::Stop, tool: Some(tool) },
            None => self.reply(name, last_said(&messages), settings),
        })
    }

    /// The answer to a text or to items under `key` (`prompt`, `input`).
    pub(super) fn reply_to_text(&self, key: &str, name: &str, settings: &Settings) -> Result<Reply, Refusal> {
        let raw = self.required(key)?;
        let said = match list_of::<Message<'_>>(raw) {
            Some(items) => last_said(&items),
            None => text_of(raw),
        };
        Ok(self.reply(name, said, settings))
    }

    fn reply(&self, name: &str, said: Option<String>, settings: &Settings) -> Reply {
        let words = said.iter().flat_map(|said| said.split_whitespace()).take(ECHO_MAX_WORDS).collect::<Vec<_>>();
        let opening = match words.is_empty() {
            true => format!("Hello from {name}."),
            false => format!("Hello from {name}: you said \"{}\".", words.join(" ")),
        };
        let limits = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
        let limit = limits.iter().find_map(|key| self.get::<u32>(key)).unwrap_or(u32::MAX).max(1);
        Reply {
            opening: opening.split(' ').map(str::to_owned).collect(),
            tokens: settings.tokens.min(limit),
            finished: if limit < settings.tokens { Finished::Length } else { Finished::Stop },
            tool: None,
        }
    }

    /// Name of the first tool, in OpenAI's or Anthropic's shape; none when the request forbids tools.
    fn first_tool(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Tool {
            name: Option<String>,
            function: Option<Function>,
        }
        #[derive(Deserialize)]
        struct Function {
            name: String,
        }
        if self.get::<&str>("tool_choice") == Some("none") {
            return None;
        }
        let tool = self.get::<Vec<Tool>>("tools")?.into_iter().next()?;
        tool.function.map(|function| function.name).or(tool.name)
    }
}

/// The model to answer as, when a request names `asked`.
pub(super) fn served(asked: Option<&str>, models: &[String]) -> Result<String, Refusal> {
    let asked = asked.unwrap_or_default();
    let found = models.iter().find(|id| asked.is_empty() || *id == asked);
    found.cloned().ok_or_else(|| Refusal {
        status: StatusCode::NOT_FOUND,
        kind: "NotFoundError",
        message: format!("The model `{asked}` does not exist. Valid aliases: {}.", models.join(", ")),
        param: Some("model".into()),
    })
}

/// The form field `model` of a multipart body; the last one wins.
pub(super) fn form_model(body: &[u8]) -> Option<&str> {
    let field = memmem::rfind(body, b"name=\"model\"")?;
    let value = &body[field + memmem::find(&body[field..], b"\r\n\r\n")? + 4..];
    std::str::from_utf8(&value[..memmem::find(value, b"\r\n")?]).ok()
}

/// Tokens of a text: here a token is four bytes, or what is left at the end.
fn tokens_in(text: &str) -> u64 {
    text.len().div_ceil(4) as u64
}

/// The tokens themselves; [`detokenize`] is the inverse.
pub(super) fn tokenize(text: &str) -> Vec<u32> {
    let pack = |bytes: &[u8]| bytes.iter().rev().fold(0, |token, byte| token << 8 | u32::from(*byte));
    text.as_bytes().chunks(4).map(pack).collect()
}

pub(super) fn detokenize(tokens: &[u32]) -> String {
    let bytes = tokens.iter().flat_map(|token| token.to_le_bytes()).filter(|byte| *byte != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

/// What the last user among them said.
fn last_said(messages: &[Message<'_>]) -> Option<String> {
    messages.iter().rfind(|message| message.role == "user")?.content.and_then(text_of)
}

/// The text of a content: a string, or the first text among its parts.
fn text_of(content: &RawValue) -> Option<String> {
    if content.get().len() > ECHO_MAX_BYTES {
        return None;
    }
    serde_json::from_str(content.get()).ok().or_else(|| parts_of(content).into_iter().find_map(|part| part.text))
}

fn parts_of(content: &RawValue) -> Vec<Part> {
    list_of(content).unwrap_or_default()
}

/// A list of these; none when it is something else. Looks before it parses: serde would put a string of megabytes, escaped,
/// into an error that nobody reads.
fn list_of<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<Vec<T>> {
    raw.get().starts_with('[').then(|| serde_json::from_str(raw.get()).ok())?
}

// === impl Message ===

impl Message<'_> {
    /// Anthropic sends the results of tools as content of a user.
    fn is_tool_result(&self) -> bool {
        self.content.is_some_and(|content| parts_of(content).iter().any(|part| part.r#type == "tool_result"))
    }
}

// === impl Reply ===

impl Reply {
    /// The token at `at`, counted from 0; every one but the first begins with a space.
    pub(super) fn token(&self, at: u32) -> String {
        let at = at as usize;
        let word = match self.opening.get(at) {
            Some(word) => word,
            None => PADDING[(at - self.opening.len()) % PADDING.len()],
        };
        if at == 0 { word.to_owned() } else { format!(" {word}") }
    }

    /// All of it.
    pub(super) fn text(&self) -> String {
        (0..self.tokens).map(|at| self.token(at)).collect()
    }
}

// === impl Refusal ===

impl Refusal {
    pub(super) fn bad_request(param: Option<String>, message: String) -> Self {
        Self { status: StatusCode::BAD_REQUEST, kind: "Bad Request", message, param }
    }

    pub(super) fn no_such_response(id: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            kind: "invalid_request_error",
            message: format!("Response with id '{id}' not found."),
            param: Some("response_id".into()),
        }
    }
}
