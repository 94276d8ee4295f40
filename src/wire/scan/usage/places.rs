//! The places in which the dialects tell things: every key that means something, by the object that it stands in.

use super::findings::Count;

/// An object or an array, by its brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Brackets {
    Object,
    Array,
}

/// An object or an array on the path to something that means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// The one object of an answer.
    Answer,
    /// The object of an event, or of a line.
    Event,
    /// `choices`: OpenAI.
    Choices,
    Choice,
    /// `choices[].delta`
    ChoiceDelta,
    /// `tool_calls` in a delta or a message.
    ToolCalls,
    /// `message` of an event: the answer as it begins (Anthropic), or what there is to add to it (Ollama).
    Message,
    /// `delta` of an event: Anthropic.
    Delta,
    /// `content_block` of an event: Anthropic.
    ContentBlock,
    /// `response` of an event: the Responses API.
    Response,
    /// `incomplete_details` of such a response.
    IncompleteDetails,
    Usage,
    /// `prompt_tokens_details` and the like.
    Details,
    /// `timings`: llama.cpp.
    Timings,
}

/// What a member of an object means, or an element of an array.
#[derive(Debug, Clone, Copy)]
pub(super) enum Member {
    Nothing,
    /// A number that counts something.
    Count(Count),
    /// A string that is content, unless it is empty.
    Text,
    /// The same, or an object to be read: the key has two meanings.
    TextOr(Scope),
    /// An object that is content.
    Content,
    /// An object or array to be read.
    Scope(Scope),
    /// A string that is one of a few, or an id.
    Word(Word),
    /// The answer failed, unless it is null.
    Error,
}

/// What a word is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    Finish,
    Status,
    IncompleteReason,
    /// What an object is.
    Object,
    /// What an event is.
    Type,
    /// The id of what may be an object of the Responses API.
    Id,
    /// The id of an object of the Responses API.
    ResponseId,
}

// === impl Scope ===

impl Scope {
    /// How many scopes lie in each other: event, choices, choice, delta, tool calls.
    pub(super) const DEPTH: usize = 5;

    pub(super) fn brackets(self) -> Brackets {
        match self.element() {
            None => Brackets::Object,
            Some(_) => Brackets::Array,
        }
    }

    /// What the elements mean, if it is an array.
    pub(super) fn element(self) -> Option<Member> {
        match self {
            Scope::Choices => Some(Member::Scope(Scope::Choice)),
            Scope::ToolCalls => Some(Member::Content),
            _ => None,
        }
    }

    /// What a member means, if it is an object.
    pub(super) fn member(self, key: &[u8]) -> Member {
        match self {
            Scope::Answer => match key {
                b"id" => Member::Word(Word::Id),
                b"object" => Member::Word(Word::Object),
                b"status" => Member::Word(Word::Status),
                b"incomplete_details" => Member::Scope(Scope::IncompleteDetails),
                _ => of_event(key),
            },
            Scope::Event => of_event(key),
            Scope::Choice => match key {
                b"delta" => Member::Scope(Scope::ChoiceDelta),
                b"text" => Member::Text,
                b"finish_reason" => Member::Word(Word::Finish),
                _ => Member::Nothing,
            },
            Scope::ChoiceDelta => match key {
                b"content" | b"reasoning_content" | b"reasoning" | b"refusal" => Member::Text,
                b"tool_calls" => Member::Scope(Scope::ToolCalls),
                b"function_call" | b"audio" => Member::Content,
                _ => Member::Nothing,
            },
            Scope::Message => match key {
                b"usage" => Member::Scope(Scope::Usage),
                b"stop_reason" => Member::Word(Word::Finish),
                b"content" | b"thinking" => Member::Text,
                b"tool_calls" => Member::Scope(Scope::ToolCalls),
                _ => Member::Nothing,
            },
            Scope::Delta => match key {
                b"text" | b"thinking" | b"partial_json" => Member::Text,
                b"stop_reason" => Member::Word(Word::Finish),
                _ => Member::Nothing,
            },
            Scope::ContentBlock => match key {
                // The name is that of a tool that is called.
                b"text" | b"thinking" | b"name" => Member::Text,
                _ => Member::Nothing,
            },
            Scope::Response => match key {
                b"id" => Member::Word(Word::ResponseId),
                b"status" => Member::Word(Word::Status),
                b"incomplete_details" => Member::Scope(Scope::IncompleteDetails),
                b"usage" => Member::Scope(Scope::Usage),
                b"error" => Member::Error,
                _ => Member::Nothing,
            },
            Scope::IncompleteDetails => match key {
                b"reason" => Member::Word(Word::IncompleteReason),
                _ => Member::Nothing,
            },
            Scope::Usage => match key {
                b"prompt_tokens" => Member::Count(Count::Prompt),
                b"input_tokens" => Member::Count(Count::Input),
                b"cache_read_input_tokens" => Member::Count(Count::CacheRead),
                b"cache_creation_input_tokens" => Member::Count(Count::CacheCreation),
                b"completion_tokens" | b"output_tokens" => Member::Count(Count::Output),
                b"total_tokens" => Member::Count(Count::Total),
                b"prompt_tokens_details"
                | b"input_tokens_details"
                | b"completion_tokens_details"
                | b"output_tokens_details" => Member::Scope(Scope::Details),
                // SGLang has it here.
                b"reasoning_tokens" => Member::Count(Count::Reasoning),
                _ => Member::Nothing,
            },
            Scope::Details => match key {
                b"cached_tokens" => Member::Count(Count::Cached),
                b"reasoning_tokens" => Member::Count(Count::Reasoning),
                _ => Member::Nothing,
            },
            Scope::Timings => match key {
                b"cache_n" => Member::Count(Count::TimedCached),
                b"prompt_n" => Member::Count(Count::TimedPrompt),
                b"predicted_n" => Member::Count(Count::TimedOutput),
                _ => Member::Nothing,
            },
            Scope::Choices | Scope::ToolCalls => Member::Nothing,
        }
    }
}

/// What a member of an event's object means, or of the object of an answer that is no stream.
fn of_event(key: &[u8]) -> Member {
    match key {
        b"usage" => Member::Scope(Scope::Usage),
        b"error" => Member::Error,
        b"choices" => Member::Scope(Scope::Choices),
        // Anthropic and the Responses API.
        b"type" => Member::Word(Word::Type),
        b"delta" => Member::TextOr(Scope::Delta),
        b"message" => Member::Scope(Scope::Message),
        b"content_block" => Member::Scope(Scope::ContentBlock),
        b"stop_reason" => Member::Word(Word::Finish),
        // The Responses API and, as a text, Ollama.
        b"response" => Member::TextOr(Scope::Response),
        // Ollama.
        b"thinking" => Member::Text,
        b"prompt_eval_count" => Member::Count(Count::Prompt),
        b"prompt_eval_cached_count" => Member::Count(Count::Cached),
        b"eval_count" => Member::Count(Count::Output),
        b"done_reason" => Member::Word(Word::Finish),
        // llama.cpp.
        b"content" => Member::Text,
        b"tokens_evaluated" => Member::Count(Count::Prompt),
        b"tokens_predicted" => Member::Count(Count::Output),
        b"stop_type" => Member::Word(Word::Finish),
        b"timings" => Member::Scope(Scope::Timings),
        _ => Member::Nothing,
    }
}
