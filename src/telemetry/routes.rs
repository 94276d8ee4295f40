//! What a path is called in telemetry, where names must be few whatever clients invent. Pure.

use super::operation::Operation;

/// A kind of request: its place in the table of all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route(u8);

/// Paths, with what varies in braces, and what they ask for. Sorted by path.
const ROUTES: &[(&str, Operation)] = &[
    ("/", Operation::Other),
    ("/*", Operation::Other),
    ("/api/chat", Operation::Chat),
    ("/api/embed", Operation::Embeddings),
    ("/api/embeddings", Operation::Embeddings),
    ("/api/generate", Operation::TextCompletion),
    ("/api/show", Operation::Other),
    ("/apply-template", Operation::Other),
    ("/chat/completions", Operation::Chat),
    ("/classify", Operation::Classify),
    ("/cohere/v2/chat", Operation::Chat),
    ("/completion", Operation::TextCompletion),
    ("/completions", Operation::TextCompletion),
    ("/detokenize", Operation::Detokenize),
    ("/embed", Operation::Embeddings),
    ("/embedding", Operation::Embeddings),
    ("/embeddings", Operation::Embeddings),
    ("/generate", Operation::TextCompletion),
    ("/generative_scoring", Operation::Score),
    ("/health", Operation::Other),
    ("/healthz", Operation::Other),
    ("/inference/v1/generate", Operation::TextCompletion),
    ("/infill", Operation::TextCompletion),
    ("/invocations", Operation::Invocations),
    ("/metrics", Operation::Other),
    ("/pooling", Operation::Pooling),
    ("/readyz", Operation::Other),
    ("/rerank", Operation::Rerank),
    ("/reranking", Operation::Rerank),
    ("/responses", Operation::Responses),
    ("/score", Operation::Score),
    ("/status", Operation::Other),
    ("/tokenize", Operation::Tokenize),
    ("/v1/*", Operation::Other),
    ("/v1/audio/speech", Operation::Speech),
    ("/v1/audio/transcriptions", Operation::Transcription),
    ("/v1/audio/translations", Operation::Translation),
    ("/v1/chat/completions", Operation::Chat),
    ("/v1/classify", Operation::Classify),
    ("/v1/completions", Operation::TextCompletion),
    ("/v1/detokenize", Operation::Detokenize),
    ("/v1/embeddings", Operation::Embeddings),
    ("/v1/images/edits", Operation::ImageEdit),
    ("/v1/images/generations", Operation::ImageGeneration),
    ("/v1/images/variations", Operation::ImageVariation),
    ("/v1/messages", Operation::Messages),
    ("/v1/messages/count_tokens", Operation::CountTokens),
    ("/v1/models", Operation::Models),
    ("/v1/models/{id}", Operation::Models),
    ("/v1/moderations", Operation::Moderation),
    ("/v1/pooling", Operation::Pooling),
    ("/v1/realtime", Operation::Realtime),
    ("/v1/rerank", Operation::Rerank),
    ("/v1/responses", Operation::Responses),
    ("/v1/responses/compact", Operation::Responses),
    ("/v1/responses/input_tokens", Operation::InputTokens),
    ("/v1/responses/{id}", Operation::Lookup),
    ("/v1/responses/{id}/*", Operation::Lookup),
    ("/v1/responses/{id}/cancel", Operation::Lookup),
    ("/v1/responses/{id}/input_items", Operation::Lookup),
    ("/v1/score", Operation::Score),
    ("/v1/tokenize", Operation::Tokenize),
    ("/v1/videos", Operation::VideoGeneration),
    ("/v1/videos/{id}", Operation::Lookup),
    ("/v1/videos/{id}/*", Operation::Lookup),
    ("/v1/videos/{id}/content", Operation::Lookup),
    ("/v2/embed", Operation::Embeddings),
    ("/v2/rerank", Operation::Rerank),
];

impl Route {
    /// How many there are.
    pub const COUNT: usize = ROUTES.len();

    /// The kind of a request with this path, which is as the client sent it, without the query.
    pub fn of(path: &str) -> Route {
        if let Some(route) = Route::named(path) {
            return route;
        }
        let pattern = match path.strip_prefix("/v1/") {
            Some("models/") => "/v1/models",
            Some(rest) if rest.starts_with("models/") => "/v1/models/{id}",
            Some(rest) => match rest.split_once('/') {
                Some(("responses", id)) => match below_id(id) {
                    "" => "/v1/responses/{id}",
                    "cancel" => "/v1/responses/{id}/cancel",
                    "input_items" => "/v1/responses/{id}/input_items",
                    _ => "/v1/responses/{id}/*",
                },
                Some(("videos", id)) => match below_id(id) {
                    "" => "/v1/videos/{id}",
                    "content" => "/v1/videos/{id}/content",
                    _ => "/v1/videos/{id}/*",
                },
                _ => "/v1/*",
            },
            None => "/*",
        };
        Route::named(pattern).unwrap_or(Route(0))
    }

    fn named(path: &str) -> Option<Route> {
        // Most requests have this one, and comparing once is less than searching.
        const USUAL: Route = route_of("/v1/chat/completions");
        if path == USUAL.path() {
            return Some(USUAL);
        }
        let place = ROUTES.binary_search_by(|(route, _)| (*route).cmp(path)).ok()?;
        u8::try_from(place).ok().map(Route)
    }

    /// Its path, with what varies in braces (`http.route`).
    pub fn path(self) -> &'static str {
        ROUTES[self.index()].0
    }

    /// What it asks for.
    pub fn operation(self) -> Operation {
        ROUTES[self.index()].1
    }

    /// Its place among [`Route::COUNT`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// The route of a path that is in the table, for constants.
const fn route_of(path: &str) -> Route {
    let mut place = 0;
    while place < ROUTES.len() {
        let route = ROUTES[place].0.as_bytes();
        let mut same = 0;
        while same < route.len() && same < path.len() && route[same] == path.as_bytes()[same] {
            same += 1;
        }
        if same == route.len() && same == path.len() {
            return Route(place as u8);
        }
        place += 1;
    }
    panic!("the path must be in the table")
}

/// What follows an id.
fn below_id(rest: &str) -> &str {
    rest.split_once('/').map_or("", |(_, below)| below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_sorted() {
        assert!(ROUTES.is_sorted_by(|a, b| a.0 < b.0));
        assert!(u8::try_from(Route::COUNT).is_ok());
    }

    #[test]
    fn names_are_few() {
        for (path, name, operation) in [
            ("/v1/chat/completions", "/v1/chat/completions", "chat"),
            ("/v1/messages", "/v1/messages", "messages"),
            ("/v1/messages/count_tokens", "/v1/messages/count_tokens", "count_tokens"),
            ("/v1/models", "/v1/models", "models"),
            ("/v1/models/", "/v1/models", "models"),
            ("/v1/models/org/tiny", "/v1/models/{id}", "models"),
            ("/v1/models/org%2Ftiny", "/v1/models/{id}", "models"),
            ("/v1/responses", "/v1/responses", "responses"),
            ("/v1/responses/input_tokens", "/v1/responses/input_tokens", "input_tokens"),
            ("/v1/responses/resp_1", "/v1/responses/{id}", "lookup"),
            ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel", "lookup"),
            ("/v1/responses/resp_1/x/y", "/v1/responses/{id}/*", "lookup"),
            ("/v1/videos/v_1", "/v1/videos/{id}", "lookup"),
            ("/v1/videos/v_1/content", "/v1/videos/{id}/content", "lookup"),
            ("/v1/videos/v_1/anything", "/v1/videos/{id}/*", "lookup"),
            ("/v1/anything/else", "/v1/*", "other"),
            ("/v1/", "/v1/*", "other"),
            ("/anything", "/*", "other"),
            ("", "/*", "other"),
            ("*", "/*", "other"),
            ("/score", "/score", "score"),
            ("/tokenize", "/tokenize", "tokenize"),
            ("/api/chat", "/api/chat", "chat"),
            ("/healthz", "/healthz", "other"),
        ] {
            let route = Route::of(path);
            assert_eq!((route.path(), route.operation().as_str()), (name, operation), "{path}");
        }
    }
}
