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
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/completion", "/api/chat"]
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
    for path in
        ["/v1beta", "/v1beta/chat", "/v10/x", "/other", "/v1", "/v1/", "/v1%2Fmodels", "//v1/chat", "/V1/chat", "*", ""]
    {
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
