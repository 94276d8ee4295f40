//! What a path means: the proxy's own, to be forwarded, or never to be forwarded. Pure.

use std::borrow::Cow;

use http::Method;
use percent_encoding::percent_decode_str;

use crate::observe::pages::Page;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target<'p> {
    /// `GET /v1/models`.
    ModelList,
    /// `GET /v1/models/{id}`, the id decoded.
    ModelObject(Cow<'p, str>),
    /// To be routed by the model it names.
    Forward {
        /// For paths under `/v1`: what follows it, beginning with a slash; the backend's base path goes before it. `None`
        /// for engines' own paths, which stay as they are.
        below_v1: Option<&'p str>,
    },
    /// One of the proxy's own pages.
    Own(Page),
    /// An engine's control endpoint: never forwarded.
    Control,
    /// An API that keeps state no single backend could answer for.
    Stateful,
    /// Nothing.
    Unknown,
}

/// Segments by which engines let anybody who reaches them change or stop them, mostly without a key. A path that holds one
/// of them anywhere, however it is encoded, is never forwarded.
const CONTROL: &[&str] = &[
    "abort_request",
    "abort_requests",
    "adapters",
    "collective_rpc",
    "configure_logging",
    "continue_generation",
    "destroy_weights_update_group",
    "flush_cache",
    "freeze_gc",
    "init_weights_update_group",
    "is_sleeping",
    "load_lora_adapter",
    "lora-adapters",
    "pause",
    "pause_generation",
    "release_memory_occupation",
    "reset_mm_cache",
    "reset_prefix_cache",
    "resume",
    "resume_memory_occupation",
    "scale_elastic_ep",
    "set_internal_state",
    "set_trace_level",
    "sleep",
    "slow_down",
    "start_expert_distribution_record",
    "start_profile",
    "stop_expert_distribution_record",
    "stop_profile",
    "unload_lora_adapter",
    "wake_up",
];

/// Families of such segments, by their beginning.
const CONTROL_PREFIXES: &[&str] = &["update_weights", "update_weight", "dump_", "load_lora", "unload_lora"];

/// First segments under `/v1` of APIs that keep state.
const STATEFUL: &[&str] =
    &["assistants", "batches", "conversations", "files", "fine_tuning", "threads", "uploads", "vector_stores"];

/// Paths outside `/v1` that engines serve and that name a model in their body.
const ENGINE_PATHS: &[&str] = &[
    "/api/chat",
    "/api/embed",
    "/api/embeddings",
    "/api/generate",
    "/api/show",
    "/apply-template",
    "/chat/completions",
    "/classify",
    "/cohere/v2/chat",
    "/completion",
    "/completions",
    "/detokenize",
    "/embedding",
    "/embeddings",
    "/generative_scoring",
    "/inference/v1/generate",
    "/infill",
    "/invocations",
    "/pooling",
    "/rerank",
    "/reranking",
    "/responses",
    "/score",
    "/tokenize",
    "/v2/embed",
    "/v2/rerank",
];

/// Engines' paths whose body need not name a model, as an engine serves one only.
const MODEL_OPTIONAL: &[&str] = &[
    "/classify",
    "/detokenize",
    "/pooling",
    "/rerank",
    "/reranking",
    "/score",
    "/tokenize",
    "/v1/classify",
    "/v1/detokenize",
    "/v1/pooling",
    "/v1/rerank",
    "/v1/score",
    "/v1/tokenize",
    "/v2/embed",
    "/v2/rerank",
];

/// First segments below `/v1` of the APIs that engines serve. Behind a prefix that is no version, nothing else is: what an
/// engine serves beside `/v1` is mostly there to control it.
const API: &[&str] = &[
    "audio",
    "chat",
    "classify",
    "completion",
    "completions",
    "decisions",
    "detokenize",
    "embed",
    "embed_all",
    "embed_sparse",
    "embedding",
    "embeddings",
    "generate",
    "images",
    "infill",
    "messages",
    "moderations",
    "pooling",
    "predict",
    "realtime",
    "rerank",
    "reranking",
    "responses",
    "score",
    "similarity",
    "systemone",
    "tokenize",
    "videos",
];

/// What most requests ask for, to be forwarded without a closer look.
const USUAL: &[&str] = &[
    "/v1/audio/transcriptions",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v1/responses",
];

/// Whether a request may leave the model out: those that read or delete something, those about an answer that is named
/// by its id, and those that engines take without one.
pub fn may_name_no_model(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::DELETE)
        || (!USUAL.contains(&path) && answer_id(path).is_some())
        || MODEL_OPTIONAL.binary_search(&path).is_ok()
}

/// Whether servers take bytes of any kind here: audio, pictures, offers of a call. Everywhere else a body is JSON or a form,
/// whatever its Content-Type says.
pub fn takes_raw_bytes(path: &str) -> bool {
    const RAW: [&str; 5] = ["/v1/audio", "/v1/images", "/v1/videos", "/v1/realtime", "/invocations"];
    let is_below = |rest: &str| rest.is_empty() || rest.starts_with('/');
    RAW.iter().any(|base| path.strip_prefix(base).is_some_and(is_below))
}

/// Whether engines write on from a prompt here, and may have computed its beginning before.
pub fn continues_prompt(path: &str) -> bool {
    const ENDS: [&str; 8] =
        ["/completions", "/messages", "/responses", "/completion", "/infill", "/generate", "/invocations", "/api/chat"];
    ENDS.iter().any(|end| path.ends_with(end))
}

/// Collections whose members engines are known to keep, so that what follows in the path is an id even if it has not been
/// seen.
const KEPT: &[&str] = &["responses", "videos"];
/// What else stands in their place.
const NOT_IDS: &[&str] = &["characters", "compact", "edits", "extensions", "generations", "input_tokens", "sync"];
/// Longest id that is looked for.
const ID_BYTES_MAX: usize = 128;
/// Most segments that are looked at for an id.
const IDS_MAX: usize = 3;

/// Whether an answer to this may be asked for again by its id. Messages never are.
pub fn makes(method: &Method, path: &str) -> bool {
    method == Method::POST && path.starts_with("/v1/") && !path.starts_with("/v1/messages")
}

/// Whether the answers of `path` come by the thousand and are seldom asked for again.
pub fn is_stateless(path: &str) -> bool {
    path != "/v1/responses" && USUAL.contains(&path)
}

/// The collection that a path is about, decoded: the first segment below `/v1`.
pub fn collection(path: &str) -> Option<Cow<'_, str>> {
    segments_below_v1(path).next()
}

/// The ids of answers that a path may be about, decoded: `/v1/videos/{id}/content`, `/v1/images/generations/{id}`.
pub fn ids(path: &str) -> impl Iterator<Item = Cow<'_, str>> {
    segments_below_v1(path).skip(1).take(IDS_MAX).filter(|id| id.len() <= ID_BYTES_MAX)
}

/// The id of the answer that a path is about, as far as it can be told from the path.
pub fn answer_id(path: &str) -> Option<Cow<'_, str>> {
    let keeps = collection(path).is_some_and(|collection| KEPT.contains(&&*collection));
    let is_id = |id: &str| match keeps {
        true => !NOT_IDS.contains(&id),
        // Words are without digits, and names of versions are short.
        false => id.len() >= 8 && id.bytes().any(|byte| byte.is_ascii_digit()),
    };
    ids(path).take(if keeps { 1 } else { IDS_MAX }).find(|id| is_id(id))
}

fn segments_below_v1(path: &str) -> impl Iterator<Item = Cow<'_, str>> {
    let below = path.strip_prefix("/v1/").unwrap_or_default();
    let segments = below.split('/').filter(|segment| !segment.is_empty());
    segments.map_while(|segment| match segment.contains('%') {
        true => percent_decode_str(segment).decode_utf8().ok(),
        false => Some(Cow::Borrowed(segment)),
    })
}

/// What `path` means for `method`. `path` is as the client sent it, without the query.
pub fn classify<'p>(method: &Method, path: &'p str) -> Target<'p> {
    if USUAL.contains(&path) {
        return Target::Forward { below_v1: path.strip_prefix("/v1") };
    }
    classify_closely(method, path)
}

fn classify_closely<'p>(method: &Method, path: &'p str) -> Target<'p> {
    let reads = method == Method::GET || method == Method::HEAD;
    if let Some(page) = Page::of(path) {
        return Target::Own(page);
    }
    if path.strip_prefix("/v1/models").is_some_and(|rest| rest.bytes().all(|byte| byte == b'/')) {
        return Target::ModelList;
    }
    if let Some(below_v1) = path.strip_prefix("/v1").filter(|rest| rest.starts_with('/')) {
        if let Some(id) = below_v1.strip_prefix("/models/")
            && reads
        {
            return Target::ModelObject(percent_decode_str(id).decode_utf8_lossy());
        }
        let Some(segments) = decoded_segments(path) else {
            return Target::Control;
        };
        if segments.iter().any(|segment| is_control(segment)) {
            return Target::Control;
        }
        // The segments after "v1": what a server that decodes before it routes would see.
        let mut below = segments.iter().map(String::as_str).filter(|segment| !segment.is_empty()).skip(1);
        return match (below.next(), below.next()) {
            (None | Some("models"), _) => Target::Unknown,
            (Some("messages"), Some("batches")) => Target::Stateful,
            (Some(first), _) if STATEFUL.contains(&first) => Target::Stateful,
            (Some(_), _) => Target::Forward { below_v1: Some(below_v1) },
        };
    }
    match ENGINE_PATHS.binary_search(&path) {
        Ok(_) => Target::Forward { below_v1: None },
        Err(_) => Target::Unknown,
    }
}

/// Whether `path`, which begins with `/v1/`, may be sent to a backend whose API has the prefix `base_path`.
///
/// Below a version, such as `/v1` or `/api/v1`, engines have their API, whose paths grow faster than any list. Below
/// anything else (`/`, Ollama's `/api`, the prefix of a proxy before the engine) they may have everything.
pub fn may_be_below(base_path: &str, path: &str) -> bool {
    let last = base_path.rsplit('/').next().unwrap_or_default();
    let is_version = last.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let is_api = |first: &str| API.binary_search(&first).is_ok();
    is_version
        || USUAL.contains(&path)
        || decoded_segments(path).is_some_and(|segments| {
            let mut segments = segments.iter().filter(|segment| !segment.is_empty());
            segments.nth(1).is_some_and(|first| is_api(first)) && !segments.any(|segment| segment == ".")
        })
}

fn is_control(segment: &str) -> bool {
    let segment = segment.to_ascii_lowercase();
    CONTROL.binary_search(&segment.as_str()).is_ok()
        || CONTROL_PREFIXES.iter().any(|prefix| segment.starts_with(prefix))
}

/// The segments that any server could see in `path`: decoded until nothing is left to decode. `None` for paths made to be
/// read in two ways: with `..`, control characters, or escapes within escapes beyond reason.
fn decoded_segments(path: &str) -> Option<Vec<String>> {
    const DECODINGS_MAX: usize = 4;
    let mut decoded = path.to_owned();
    let mut rounds = 0;
    while decoded.contains('%') {
        let next = percent_decode_str(&decoded).decode_utf8_lossy().into_owned();
        if next == decoded {
            break;
        }
        rounds += 1;
        if rounds > DECODINGS_MAX {
            return None;
        }
        decoded = next;
    }
    if decoded.chars().any(char::is_control) {
        return None;
    }
    // Matrix parameters and back slashes end a segment for some servers.
    let segments: Vec<String> = decoded.split(['/', '\\', ';', '?', '#']).map(|s| s.trim().to_owned()).collect();
    (!segments.iter().any(|segment| segment == "..")).then_some(segments)
}

/// Two models in one query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the query names two models, {0:?} and {1:?}: name one")]
pub struct QueryModelsDiffer(pub String, pub String);

/// The model named in a query such as `model=llama&x=1`, decoded. Servers decode keys too, and some of them match keys
/// without regard to case.
///
/// # Errors
/// It is named more than once and not the same each time: one server takes the first, another the last.
pub fn model_in_query(query: Option<&str>) -> Result<Option<String>, QueryModelsDiffer> {
    let mut model: Option<Cow<'_, str>> = None;
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !is_model_key(key) {
            continue;
        }
        let value = match value.contains('+') {
            true => Cow::Owned(value.replace('+', " ")),
            false => Cow::Borrowed(value),
        };
        let value = match percent_decode_str(&value).decode_utf8() {
            Ok(decoded) => decoded.into_owned(),
            // No model is named so, but it is not the same as another.
            Err(_) => value.into_owned(),
        };
        match &model {
            Some(first) if *first != value => return Err(QueryModelsDiffer(first.clone().into_owned(), value)),
            _ => model = Some(Cow::Owned(value)),
        }
    }
    Ok(model.filter(|model| !model.is_empty()).map(Cow::into_owned))
}

fn is_model_key(key: &str) -> bool {
    const KEY: &[u8] = b"model";
    // Most queries are short, and hold no escapes.
    match key.contains('%') {
        false => key.as_bytes().eq_ignore_ascii_case(KEY),
        true => percent_decode_str(key).map(|byte| byte.to_ascii_lowercase()).eq(KEY.iter().copied()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_closer_look_at_what_is_usual_shows_nothing_else() {
        for path in USUAL {
            for method in [Method::GET, Method::POST, Method::OPTIONS] {
                assert_eq!(classify(&method, path), classify_closely(&method, path), "{method} {path}");
            }
        }
    }

    #[test]
    fn what_continues_a_prompt() {
        for path in
            ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/completion", "/api/chat"]
        {
            assert!(continues_prompt(path), "{path}");
        }
        for path in
            ["/v1/embeddings", "/v1/messages/count_tokens", "/rerank", "/v1/audio/transcriptions", "/v1/responses/x"]
        {
            assert!(!continues_prompt(path), "{path}");
        }
    }

    fn post(path: &str) -> Target<'_> {
        classify(&Method::POST, path)
    }

    fn get(path: &str) -> Target<'_> {
        classify(&Method::GET, path)
    }

    #[test]
    fn tables_are_sorted_for_binary_search() {
        for table in [CONTROL, STATEFUL, ENGINE_PATHS, MODEL_OPTIONAL, API] {
            assert!(table.is_sorted(), "{table:?}");
        }
    }

    #[test]
    fn own_paths() {
        for path in ["/v1/models", "/v1/models/", "/v1/models//"] {
            assert_eq!((get(path), post(path)), (Target::ModelList, Target::ModelList), "{path}");
        }
        assert_eq!(get("/v1/models/org%2Ftiny"), Target::ModelObject("org/tiny".into()));
        assert_eq!(get("/v1/models/org/tiny"), Target::ModelObject("org/tiny".into()));
        assert_eq!(post("/v1/models/load"), Target::Unknown);
        for (path, page) in [
            ("/", Page::Overview),
            ("/healthz", Page::Health),
            ("/health", Page::Health),
            ("/readyz", Page::Ready),
            ("/metrics", Page::Metrics),
            ("/status", Page::Status),
            ("/healthz/", Page::Health),
            ("/readyz/", Page::Ready),
            ("/metrics/", Page::Metrics),
            ("/status/", Page::Status),
        ] {
            assert_eq!((get(path), post(path)), (Target::Own(page), Target::Own(page)));
        }
    }

    #[test]
    fn forwarded_paths_keep_their_encoding() {
        assert_eq!(post("/v1/chat/completions"), Target::Forward { below_v1: Some("/chat/completions") });
        assert_eq!(post("/v1/a%20b/%2e"), Target::Forward { below_v1: Some("/a%20b/%2e") });
        assert_eq!(post("/tokenize"), Target::Forward { below_v1: None });
        assert_eq!(get("/v1/responses/resp_1"), Target::Forward { below_v1: Some("/responses/resp_1") });
    }

    #[test]
    fn everything_else_is_unknown() {
        for path in [
            "/v1beta",
            "/v1beta/chat",
            "/v10/x",
            "/other",
            "/v1",
            "/v1/",
            "/v1%2Fmodels",
            "//v1/chat",
            "/V1/chat",
            "*",
            "",
        ] {
            assert_eq!(post(path), Target::Unknown, "{path}");
        }
        for path in ["/healthz//", "//", "/v1models", "/v1/models/x"] {
            assert_eq!(post(path), Target::Unknown, "{path}");
        }
        for path in [
            "/v1/messages/batches",
            "/v1/messages/batches/",
            "/v1/messages/batches/msgbatch_1/results",
            "/v1//messages//batches",
            "/v1/%6dessages/batche%73/msgbatch_1",
        ] {
            assert_eq!((get(path), post(path)), (Target::Stateful, Target::Stateful), "{path}");
        }
        for path in ["/v1/messages/count_tokens", "/v1/messages/batch", "/v1/messages", "/v1/messages/x/batches"] {
            assert!(matches!(post(path), Target::Forward { .. }), "{path}");
        }
        for path in ["/v1/files", "/v1/batches/1", "/v1/fine_tuning/jobs", "/v1//threads", "/v1/%66iles"] {
            assert_eq!(post(path), Target::Stateful, "{path}");
        }
    }

    #[test]
    fn control_endpoints_are_found_in_every_disguise() {
        for path in [
            "/v1/load_lora_adapter",
            "/v1/%6coad_lora_adapter",
            "/v1/%256coad_lora_adapter",
            "/v1//sleep",
            "/v1/%2Fsleep",
            "/v1/SLEEP",
            "/v1/x/../sleep",
            "/v1/x/%2e%2e/chat",
            "/v1/sleep;x=1",
            "/v1/sleep%3Flevel=1",
            "/v1/chat%5csleep",
            "/v1/update_weights_from_disk",
            "/v1/pause ",
            "/v1/%00",
            "/v1/sleep%20",
        ] {
            assert_eq!(post(path), Target::Control, "{path}");
        }
        for path in ["/sleep", "/%73leep", "//sleep", "/collective_rpc"] {
            assert_eq!(post(path), Target::Unknown, "{path}");
        }
    }

    /// What engines serve beside their API: vLLM, SGLang, llama.cpp, TEI, Ollama. None of it is on the list of segments that
    /// are refused everywhere.
    const BESIDE_THE_API: &[&str] = &[
        "shutdown",
        "server_info",
        "get_server_info",
        "get_internal_state",
        "get_weights_by_name",
        "reset_encoder_cache",
        "clear_hicache_storage_backend",
        "open_session",
        "close_session",
        "parse_function_call",
        "hf3fs/config",
        "slots/0",
        "props",
        "metrics",
        "load",
        "ping",
        "docs",
        "openapi.json",
        "api/pull",
        "api/delete",
        "pull",
        "push",
        "create",
        "copy",
        "delete",
        "blobs/sha256:0",
        "ps",
        "tags",
        "version",
        "engines/x",
    ];

    #[test]
    fn behind_a_prefix_that_is_no_version_there_is_only_the_api() {
        for base_path in ["", "/api", "/llm", "/openai/deployments/v", "/vllm", "/version", "/V1"] {
            for name in BESIDE_THE_API {
                for path in [
                    format!("/v1/{name}"),
                    format!("/v1//{name}"),
                    format!("/v1/./{name}"),
                    format!("/v1/chat/.//{name}"),
                    format!("/v1/%2f{name}"),
                    format!("/v1/;/{name}"),
                    format!("/v1/%2E/{name}"),
                    format!("/v1/{}", name.to_uppercase()),
                    format!("/v1/%{:02x}{}", name.as_bytes()[0], &name[1..]),
                    format!("/v1/%25{:02x}{}", name.as_bytes()[0], &name[1..]),
                    format!("/v1/{name};chat"),
                    format!("/v1/{name}%3f/chat"),
                    format!("/v1/{name}/"),
                ] {
                    assert!(!may_be_below(base_path, &path), "{path} behind {base_path:?}");
                }
            }
            for path in [
                "/v1/chat/completions",
                "/v1/chat%2Fcompletions",
                "/v1//chat/completions",
                "/v1/chat/completions/render",
                "/v1/responses/resp_1/cancel",
                "/v1/embeddings",
                "/v1/audio/speech",
                "/v1/realtime",
                "/v1/images/generations",
                "/v1/videos/v_1/content",
                "/v1/rerank/",
                "/v1/tokenize",
            ] {
                assert!(may_be_below(base_path, path), "{path} behind {base_path:?}");
            }
        }
        for base_path in ["/v1", "/api/v1", "/v2", "/v1beta", "/openai/v1"] {
            assert!(may_be_below(base_path, "/v1/an_api_of_tomorrow"), "{base_path}");
        }
    }

    #[test]
    fn answers_are_named_by_their_id() {
        for (path, id) in [
            ("/v1/responses/resp_1", Some("resp_1")),
            ("/v1/responses/resp%5F1/cancel", Some("resp_1")),
            ("/v1/responses/resp_1/input_items", Some("resp_1")),
            ("/v1/responses/", None),
            ("/v1/responses", None),
            ("/v1/responses/input_tokens", None),
            ("/v1/responses/input_tokens/resp_1", None),
            ("/v1/chat/completions/x", None),
            ("/v1/videos/x/content", Some("x")),
            ("/v1/videos", None),
            ("/v1//videos//x/", Some("x")),
            ("/v1/%76ideos/x%2Fy", Some("x/y")),
            ("/v1/videos/sync", None),
            ("/v1/images/img_0123/content", Some("img_0123")),
            ("/v1/images/generations/img_0123", Some("img_0123")),
            ("/v1/chat/completions/chatcmpl-1/messages", Some("chatcmpl-1")),
            ("/v1/audio/speech", None),
            ("/v1/some/thing/v2", None),
            ("/v2/videos/x", None),
        ] {
            assert_eq!(answer_id(path).as_deref(), id, "{path}");
        }
        for (method, path, may) in [
            (Method::POST, "/v1/responses/resp_1/cancel", true),
            (Method::DELETE, "/v1/responses/resp_1", true),
            (Method::GET, "/v1/anything", true),
            (Method::POST, "/tokenize", true),
            (Method::POST, "/v1/responses", false),
            (Method::POST, "/v1/videos/video_1/remix", true),
            (Method::POST, "/v1/videos", false),
            (Method::POST, "/v1/videos/sync", false),
            (Method::POST, "/v1/new/api", false),
            (Method::POST, "/v1/chat/completions", false),
            (Method::POST, "/v1/embeddings", false),
        ] {
            assert_eq!(may_name_no_model(&method, path), may, "{method} {path}");
        }
    }

    #[test]
    fn models_in_queries() {
        for (query, model) in [
            (Some("model=a"), Some("a")),
            (Some("x=1&model=org%2Fa+b"), Some("org/a b")),
            (Some("model=org%2fa&x&model=org/a"), Some("org/a")),
            (Some("mod%65l=a"), Some("a")),
            (Some("%6D%6f%64%65%6C=a"), Some("a")),
            (Some("Model=a&MODEL=a&%4dodel=%61"), Some("a")),
            (Some("model=a+b&model=a%20b"), Some("a b")),
            (Some("model=a=b"), Some("a=b")),
            (Some("submodel=a&models=a&mode=a&model%20=a&model+=a&+model=a&model[]=a&mod+el=a"), None),
            (Some("model%2565=a&mod%2565l=a&model%00=a"), None),
            (Some("model="), None),
            (Some("model"), None),
            (Some("&&="), None),
            (Some(""), None),
            (None, None),
        ] {
            assert_eq!(model_in_query(query).unwrap().as_deref(), model, "{query:?}");
        }
    }

    #[test]
    fn two_models_in_a_query_are_none() {
        for (query, first, second) in [
            ("model=a&model=b", "a", "b"),
            ("model=a&x=1&mod%65l=b", "a", "b"),
            ("mod%65l=b&model=a", "b", "a"),
            ("model=a&Model=b", "a", "b"),
            ("model=a&model=a&model=A", "a", "A"),
            ("model=&model=b", "", "b"),
            ("model&model=b", "", "b"),
            ("model=a&model=", "a", ""),
            ("model=a&model", "a", ""),
            ("model=a&model=a+", "a", "a "),
            ("model=a&model=%ff", "a", "%ff"),
        ] {
            let differ = QueryModelsDiffer(first.to_owned(), second.to_owned());
            assert_eq!(model_in_query(Some(query)), Err(differ), "{query}");
        }
    }

    #[test]
    fn raw_bytes_are_taken_in_few_places() {
        for path in [
            "/v1/audio/transcriptions",
            "/v1/audio",
            "/v1/images/edits",
            "/v1/videos",
            "/v1/realtime",
            "/v1/realtime/calls",
            "/invocations",
        ] {
            assert!(takes_raw_bytes(path), "{path}");
        }
        for path in [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/messages",
            "/v1/responses",
            "/v1/embeddings",
            "/v1/audiobooks",
            "/v1/videosx/y",
            "/v1/Audio/speech",
            "/v1/%61udio/speech",
            "/v1//audio/speech",
            "/invocationsx",
            "/audio/speech",
            "/rerank",
        ] {
            assert!(!takes_raw_bytes(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_encoding_hides_a_control_endpoint(index in 0..CONTROL.len(), encode in proptest::collection::vec(0..3u8, 40)) {
            let encoded: String = CONTROL[index].bytes().zip(encode).map(|(byte, how)| match how {
                0 => (byte as char).to_string(),
                1 => format!("%{byte:02x}"),
                _ => format!("%25{byte:02X}"),
            }).collect();
            let path = format!("/v1/{encoded}");
            prop_assert_eq!(post(&path), Target::Control);
        }

        #[test]
        fn any_path_gets_an_answer(path in "\\PC{0,60}") {
            let _ = (post(&path), get(&path));
        }
    }
}
