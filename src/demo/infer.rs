//! From the body of an inference request to what answers it. Which tasks there are, and what each gets.
//!
//! Pure: knows neither clock nor socket. When an answer is sent, and at what pace, is decided elsewhere.

use super::{
    body::Events,
    call::{self, Call, Refusal, Reply},
    control::Settings,
    load::Finished,
    pooling,
    shape::{self, Envelope, quoted},
};

/// Longer responses are not stored, in tokens.
const STORED_TOKENS_MAX: u32 = 1000;

/// What an inference endpoint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    Chat,
    Completion,
    Messages,
    CountTokens,
    Responses,
    Embeddings,
    Rerank,
    Tokenize,
    Detokenize,
    Transcription,
}

/// The answer to one inference request.
pub(super) struct Answer {
    pub(super) content: Content,
    pub(super) prompt_tokens: u64,
    /// Tokens that a whole answer holds, or a stream will.
    pub(super) tokens: u32,
    pub(super) finished: Finished,
    /// Set where it can be asked for again.
    pub(super) stored: Option<Stored>,
}

/// A response that can be asked for by its id.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) id: String,
    /// All of it, as JSON, also where it was streamed.
    pub(super) json: String,
}

/// The answer itself.
pub(super) enum Content {
    /// JSON.
    Whole(String),
    /// Server-sent events.
    Stream(Events),
}

/// What a request is answered with, apart from its own body.
pub(super) struct Circumstances<'a> {
    /// Who the backend says it is.
    pub(super) name: &'a str,
    pub(super) settings: &'a Settings,
    /// For the id of the answer.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) now: u64,
}

// === impl Task ===

impl Task {
    pub(super) fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completion,
            "/v1/messages" => Self::Messages,
            "/v1/messages/count_tokens" => Self::CountTokens,
            "/v1/responses" => Self::Responses,
            "/v1/embeddings" => Self::Embeddings,
            "/rerank" | "/v1/rerank" | "/v2/rerank" => Self::Rerank,
            "/tokenize" => Self::Tokenize,
            "/detokenize" => Self::Detokenize,
            "/v1/audio/transcriptions" => Self::Transcription,
            _ => return None,
        })
    }

    /// Whether errors have Anthropic's shape.
    pub(super) fn is_anthropic(self) -> bool {
        matches!(self, Self::Messages | Self::CountTokens)
    }

    /// Whether a real server would run its model, and not only its tokenizer.
    pub(super) fn runs_model(self) -> bool {
        !matches!(self, Self::CountTokens | Self::Tokenize | Self::Detokenize)
    }

    /// The answer to a request with this body.
    pub(super) fn answer(self, body: &[u8], at: Circumstances<'_>) -> Result<Answer, Refusal> {
        let Circumstances { name, settings, id, now } = at;
        let (call, model) = match self {
            Self::Transcription => (Call::default(), call::served(call::form_model(body), &settings.models)?),
            _ => {
                let call = Call::parse(body)?;
                let model = call.model(&settings.models)?;
                (call, model)
            }
        };
        let prompt_tokens = call.prompt_tokens();
        let envelope = Envelope { id, created: now, model, prompt_tokens };
        let whole = |json| Ok(Answer::whole(json, prompt_tokens));
        match self {
            Self::Chat => {
                let reply = call.reply_to_messages(name, settings)?;
                Ok(Answer::said(&call, &envelope, reply, shape::chat, |envelope, reply| {
                    shape::chat_events(envelope, reply, call.wants_usage_chunk())
                }))
            }
            Self::Completion => {
                let reply = call.reply_to_text("prompt", name, settings)?;
                Ok(Answer::said(&call, &envelope, reply, shape::completion, |envelope, reply| {
                    shape::completion_events(envelope, reply, call.wants_usage_chunk())
                }))
            }
            Self::Messages => {
                let reply = call.reply_to_messages(name, settings)?;
                Ok(Answer::said(&call, &envelope, reply, shape::message, shape::message_events))
            }
            Self::Responses => {
                let reply = call.reply_to_text("input", name, settings)?;
                // Longer ones would make a store of a fixed number of responses a large one.
                let is_stored = call.get("store") != Some(false) && reply.tokens <= STORED_TOKENS_MAX;
                let stored = is_stored
                    .then(|| Stored { id: shape::response_id(&envelope), json: shape::response(&envelope, &reply) });
                let answer = Answer::said(&call, &envelope, reply, shape::response, shape::response_events);
                Ok(Answer { stored, ..answer })
            }
            Self::CountTokens => whole(format!(r#"{{"input_tokens":{prompt_tokens}}}"#)),
            Self::Embeddings => whole(pooling::embeddings(&envelope, &call)?),
            Self::Rerank => whole(pooling::rerank(&envelope, &call)?),
            Self::Tokenize => {
                let text: Option<String> = call.get("prompt");
                let text = text.map_or_else(|| call.required("messages").map(|raw| raw.get().to_owned()), Ok)?;
                whole(shape::tokens(&call::tokenize(&text)))
            }
            Self::Detokenize => {
                let tokens: Option<Vec<u32>> = call.get("tokens");
                let expected = || Refusal::bad_request(Some("tokens".into()), "`tokens`: expected numbers".into());
                let text = call::detokenize(&tokens.ok_or_else(expected)?);
                whole(format!(r#"{{"prompt":{}}}"#, quoted(&text)))
            }
            Self::Transcription => {
                let text = quoted(&format!("{} bytes, heard by {name}.", body.len()));
                whole(format!(r#"{{"text":{text}}}"#))
            }
        }
    }
}

// === impl Answer ===

impl Answer {
    fn whole(json: String, prompt_tokens: u64) -> Self {
        Self { content: Content::Whole(json), prompt_tokens, tokens: 0, finished: Finished::Stop, stored: None }
    }

    fn said(
        call: &Call<'_>,
        envelope: &Envelope,
        reply: Reply,
        whole: impl FnOnce(&Envelope, &Reply) -> String,
        events: impl FnOnce(&Envelope, Reply) -> Events,
    ) -> Self {
        let (tokens, finished) = (reply.tokens, reply.finished);
        let content = match call.streams() {
            true => Content::Stream(events(envelope, reply)),
            false => Content::Whole(whole(envelope, &reply)),
        };
        Self { content, prompt_tokens: envelope.prompt_tokens, tokens, finished, stored: None }
    }
}
