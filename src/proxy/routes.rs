//! What a path is called in telemetry, where names must be few whatever clients invent. Pure.

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Its path, with what varies in braces (`http.route`).
    pub path: &'static str,
    /// What it asks for (`gen_ai.operation.name`): OpenTelemetry's word where there is one.
    pub operation: &'static str,
}

const fn route(path: &'static str, operation: &'static str) -> Route {
    Route { path, operation }
}

/// Sorted by path.
const ROUTES: &[Route] = &[
    route("/classify", "classify"),
    route("/detokenize", "detokenize"),
    route("/embed", "embeddings"),
    route("/embeddings", "embeddings"),
    route("/generate", "text_completion"),
    route("/generative_scoring", "score"),
    route("/invocations", "invocations"),
    route("/pooling", "embeddings"),
    route("/rerank", "rerank"),
    route("/score", "score"),
    route("/tokenize", "tokenize"),
    route("/v1/audio/speech", "speech"),
    route("/v1/audio/transcriptions", "transcription"),
    route("/v1/audio/translations", "translation"),
    route("/v1/chat/completions", "chat"),
    route("/v1/classify", "classify"),
    route("/v1/completions", "text_completion"),
    route("/v1/detokenize", "detokenize"),
    route("/v1/embeddings", "embeddings"),
    route("/v1/images/edits", "image_edit"),
    route("/v1/images/generations", "image_generation"),
    route("/v1/images/variations", "image_variation"),
    route("/v1/messages", "chat"),
    route("/v1/messages/count_tokens", "count_tokens"),
    route("/v1/moderations", "moderation"),
    route("/v1/pooling", "embeddings"),
    route("/v1/realtime", "realtime"),
    route("/v1/rerank", "rerank"),
    route("/v1/responses", "chat"),
    route("/v1/score", "score"),
    route("/v1/tokenize", "tokenize"),
    route("/v2/embed", "embeddings"),
    route("/v2/rerank", "rerank"),
];

/// The kind of a request with this path, which is as the client sent it, without the query.
pub fn of(path: &str) -> Route {
    if let Ok(at) = ROUTES.binary_search_by(|route| route.path.cmp(path)) {
        return ROUTES[at];
    }
    if let Some(rest) = path.strip_prefix("/v1/responses/") {
        return match rest.split_once('/').map(|(_, below)| below) {
            None => route("/v1/responses/{id}", "response"),
            Some("cancel") => route("/v1/responses/{id}/cancel", "response"),
            Some("input_items") => route("/v1/responses/{id}/input_items", "response"),
            Some(_) => route("/v1/responses/{id}/*", "response"),
        };
    }
    match path.starts_with("/v1/") {
        true => route("/v1/*", "other"),
        false => route("/*", "other"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_sorted() {
        assert!(ROUTES.is_sorted_by(|a, b| a.path < b.path));
    }

    #[test]
    fn names_are_few() {
        for (path, route, operation) in [
            ("/v1/chat/completions", "/v1/chat/completions", "chat"),
            ("/v1/messages", "/v1/messages", "chat"),
            ("/v1/responses/resp_1", "/v1/responses/{id}", "response"),
            ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel", "response"),
            ("/v1/responses/resp_1/x/y", "/v1/responses/{id}/*", "response"),
            ("/v1/anything/else", "/v1/*", "other"),
            ("/score", "/score", "score"),
        ] {
            assert_eq!(of(path), Route { path: route, operation }, "{path}");
        }
    }
}
