//! What a request asks for: the value of the label `operation`. Pure.

/// A kind of work. The set is closed, so no client can create series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each word says it")]
pub enum Operation {
    Chat,
    TextCompletion,
    Embeddings,
    Messages,
    CountTokens,
    Responses,
    InputTokens,
    Rerank,
    Score,
    Classify,
    Pooling,
    Tokenize,
    Detokenize,
    Transcription,
    Translation,
    Speech,
    ImageGeneration,
    ImageEdit,
    ImageVariation,
    VideoGeneration,
    Moderation,
    Realtime,
    Invocations,
    /// Reading, ending or deleting an earlier answer that is named by its id.
    Lookup,
    /// Asking for models.
    Models,
    Other,
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 26] = [
        Operation::Chat,
        Operation::TextCompletion,
        Operation::Embeddings,
        Operation::Messages,
        Operation::CountTokens,
        Operation::Responses,
        Operation::InputTokens,
        Operation::Rerank,
        Operation::Score,
        Operation::Classify,
        Operation::Pooling,
        Operation::Tokenize,
        Operation::Detokenize,
        Operation::Transcription,
        Operation::Translation,
        Operation::Speech,
        Operation::ImageGeneration,
        Operation::ImageEdit,
        Operation::ImageVariation,
        Operation::VideoGeneration,
        Operation::Moderation,
        Operation::Realtime,
        Operation::Invocations,
        Operation::Lookup,
        Operation::Models,
        Operation::Other,
    ];

    /// As a label's value: the word of `gen_ai.operation.name` where one means just this, else our own.
    pub const fn as_str(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::TextCompletion => "text_completion",
            Operation::Embeddings => "embeddings",
            Operation::Messages => "messages",
            Operation::CountTokens => "count_tokens",
            Operation::Responses => "responses",
            Operation::InputTokens => "input_tokens",
            Operation::Rerank => "rerank",
            Operation::Score => "score",
            Operation::Classify => "classify",
            Operation::Pooling => "pooling",
            Operation::Tokenize => "tokenize",
            Operation::Detokenize => "detokenize",
            Operation::Transcription => "transcription",
            Operation::Translation => "translation",
            Operation::Speech => "speech",
            Operation::ImageGeneration => "image_generation",
            Operation::ImageEdit => "image_edit",
            Operation::ImageVariation => "image_variation",
            Operation::VideoGeneration => "video_generation",
            Operation::Moderation => "moderation",
            Operation::Realtime => "realtime",
            Operation::Invocations => "invocations",
            Operation::Lookup => "lookup",
            Operation::Models => "models",
            Operation::Other => "other",
        }
    }

    /// As `gen_ai.operation.name`: a predefined value must be used where one applies
    /// (<https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/>), and a chat is one in every dialect.
    pub const fn gen_ai_name(self) -> &'static str {
        match self {
            Operation::Messages | Operation::Responses => Operation::Chat.as_str(),
            other => other.as_str(),
        }
    }

    /// As `gen_ai.provider.name`: whose dialect is spoken. Which engine speaks it is not known here.
    pub const fn provider(self) -> &'static str {
        match self {
            Operation::Messages | Operation::CountTokens => "anthropic",
            _ => "openai",
        }
    }

    /// The operation with this word.
    pub fn of_word(word: &str) -> Option<Operation> {
        Operation::ALL.into_iter().find(|operation| operation.as_str() == word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_place_and_a_word_of_its_own() {
        for (place, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, place, "{operation:?}");
            assert_eq!(Operation::of_word(operation.as_str()), Some(operation));
        }
        assert_eq!(Operation::of_word("anything"), None);
    }

    #[test]
    fn a_chat_is_one_in_every_dialect() {
        for (operation, name, provider) in [
            (Operation::Chat, "chat", "openai"),
            (Operation::Responses, "chat", "openai"),
            (Operation::Messages, "chat", "anthropic"),
            (Operation::CountTokens, "count_tokens", "anthropic"),
            (Operation::Embeddings, "embeddings", "openai"),
        ] {
            assert_eq!((operation.gen_ai_name(), operation.provider()), (name, provider));
        }
    }
}
