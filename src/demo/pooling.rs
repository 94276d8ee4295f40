//! Embeddings and rerank scores without a model: stable, of the right shape, and for rerank even plausible.
//!
//! Pure: text out of values. An embedding depends on nothing but the JSON text of its input.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    call::{Call, Refusal},
    control::fnv1a64,
    shape::{Envelope, quoted},
};

/// Length of an embedding, unless the request asks for another.
const DIMENSIONS: usize = 16;

/// Longest embedding that can be asked for.
const DIMENSIONS_MAX: usize = 8192;

/// The answer to `/v1/embeddings`.
pub(super) fn embeddings(envelope: &Envelope, call: &Call<'_>) -> Result<String, Refusal> {
    let dimensions = call.get("dimensions").unwrap_or(DIMENSIONS).clamp(1, DIMENSIONS_MAX);
    let as_base64 = call.get::<&str>("encoding_format") == Some("base64");
    let inputs = inputs_of(call.required("input")?);
    let data = inputs.iter().enumerate().map(|(index, input)| {
        let vector = embedding(input.get(), dimensions);
        let vector = if as_base64 {
            quoted(&base64(&vector.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()))
        } else {
            format!("{vector:?}")
        };
        format!(r#"{{"index":{index},"object":"embedding","embedding":{vector}}}"#)
    });
    let data = data.collect::<Vec<_>>().join(",");
    let (id, model) = (quoted(&format!("embd-{}", envelope.id)), quoted(&envelope.model));
    let (created, tokens) = (envelope.created, envelope.prompt_tokens);
    Ok(format!(
        r#"{{"id":{id},"object":"list","created":{created},"model":{model},"data":[{data}],"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens},"completion_tokens":0,"prompt_tokens_details":null}}}}"#
    ))
}

/// The answer to `/rerank`: a document scores the share of the query's words that it holds; best first.
pub(super) fn rerank(envelope: &Envelope, call: &Call<'_>) -> Result<String, Refusal> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Document {
        Text(String),
        Object { text: String },
    }
    let bad = |key: &str, expected| Refusal::bad_request(Some(key.into()), format!("`{key}`: expected {expected}"));
    let query: String = call.get("query").ok_or_else(|| bad("query", "a string"))?;
    let documents: Vec<Document> = call.get("documents").ok_or_else(|| bad("documents", "a list of strings"))?;
    let words: Vec<String> = query.split_whitespace().map(str::to_lowercase).collect();
    let mut ranked: Vec<(f64, usize, &str)> = Vec::with_capacity(documents.len());
    for (index, document) in documents.iter().enumerate() {
        let (Document::Text(text) | Document::Object { text }) = document;
        let lower = text.to_lowercase();
        let held = words.iter().filter(|word| lower.contains(word.as_str())).count();
        ranked.push((held as f64 / words.len().max(1) as f64, index, text));
    }
    // Stable: equal scores stay in the order of the request.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let wanted = call.get("top_n").filter(|wanted| *wanted > 0).unwrap_or(ranked.len());
    let results = ranked.iter().take(wanted).map(|(score, index, text)| {
        let text = quoted(text);
        format!(r#"{{"index":{index},"document":{{"text":{text}}},"relevance_score":{score:?}}}"#)
    });
    let results = results.collect::<Vec<_>>().join(",");
    let (id, model) = (quoted(&format!("rerank-{}", envelope.id)), quoted(&envelope.model));
    let tokens = envelope.prompt_tokens;
    Ok(format!(
        r#"{{"id":{id},"model":{model},"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}},"results":[{results}]}}"#
    ))
}

/// A text or a list of token numbers is one input; a list of either is many.
fn inputs_of(input: &RawValue) -> Vec<&RawValue> {
    match serde_json::from_str::<Vec<&RawValue>>(input.get()) {
        Ok(items) if items.first().is_some_and(|item| item.get().starts_with(['"', '['])) => items,
        _ => vec![input],
    }
}

/// A vector of length 1.
fn embedding(text: &str, dimensions: usize) -> Vec<f32> {
    let mut state = fnv1a64(text.as_bytes());
    let mut vector: Vec<f32> = Vec::with_capacity(dimensions);
    for _ in 0..dimensions {
        state = fnv1a64(&state.to_le_bytes());
        // The upper 24 bits as a number from -1 to 1.
        vector.push((state >> 40) as f32 / (1 << 23) as f32 - 1.0);
    }
    let norm = vector.iter().map(|value| value * value).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    vector.iter().map(|value| value / norm).collect()
}

/// RFC 4648 section 4, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - chunk.len()));
        for sextet in 0..4 {
            let letter = ALPHABET[bits >> (18 - 6 * sextet) & 63];
            text.push(if sextet <= chunk.len() { letter.into() } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_rfc() {
        let table =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (bytes, text) in table {
            assert_eq!(base64(bytes.as_bytes()), text, "{bytes}");
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn embeddings_are_stable_and_of_length_one() {
        let vector = embedding("\"hello\"", 16);
        assert_eq!(vector, embedding("\"hello\"", 16));
        assert_ne!(vector, embedding("\"world\"", 16));
        let norm: f32 = vector.iter().map(|value| value * value).sum();
        assert!((norm - 1.0).abs() < 1e-5, "{norm}");
    }

    #[test]
    fn one_input_or_many() {
        for (input, count) in [(r#""a""#, 1), (r#"["a","b"]"#, 2), ("[1,2,3]", 1), ("[[1,2],[3]]", 2), ("[]", 1)] {
            let raw: &RawValue = serde_json::from_str(input).unwrap();
            assert_eq!(inputs_of(raw).len(), count, "{input}");
        }
    }
}
