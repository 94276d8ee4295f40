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
pub const CONTROL: &[&str] = &[
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
pub const CONTROL_PREFIXES: &[&str] = &["update_weights", "update_weight", "dump_", "load_lora", "unload_lora"];

/// First segments under `/v1` of APIs that keep state.
pub const STATEFUL: &[&str] =
    &["assistants", "batches", "conversations", "files", "fine_tuning", "threads", "uploads", "vector_stores"];

/// Paths outside `/v1` that engines serve and that name a model in their body.
pub const ENGINE_PATHS: &[&str] = &[
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
pub const MODEL_OPTIONAL: &[&str] = &[
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
pub const API: &[&str] = &[
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

/// Paths at and below which servers take bytes of any kind.
pub const RAW: [&str; 5] = ["/v1/audio", "/v1/images", "/v1/videos", "/v1/realtime", "/invocations"];

/// Whether servers take bytes of any kind here: audio, pictures, offers of a call. Everywhere else a body is JSON or a form,
/// whatever its Content-Type says.
pub fn takes_raw_bytes(path: &str) -> bool {
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

/// What `path` means where the proxy's own pages are all there is.
pub fn classify_page(path: &str) -> Target<'static> {
    Page::of(path).map_or(Target::Unknown, Target::Own)
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
mod tests;
