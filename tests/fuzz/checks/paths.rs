//! What paths mean: no request reaches an engine's control endpoints, however its path is written.
//!
//! An input is a method and a target, with a blank between them.

use http::Method;
use inference_proxy::{
    data::proxy::{
        headers::{ToBackend, push_request},
        paths::{self, Target},
    },
    wire::http1::head::RequestHead,
};

/// Checks a request line.
pub fn check(input: &[u8]) {
    let line = String::from_utf8_lossy(input);
    let (method, target) = line.split_once(' ').unwrap_or(("POST", &line));
    let method = Method::from_bytes(method.as_bytes()).unwrap_or(Method::POST);
    // Whatever it is given.
    let _ = (paths::classify(&method, target), paths::may_name_no_model(&method, target));
    check_query(target);

    // What a head may hold.
    let mut head = RequestHead::default();
    if head.read(format!("{method} {target} HTTP/1.1\r\n\r\n").as_bytes()).is_err() {
        return;
    }
    let path = head.path();
    let Target::Forward { below_v1 } = paths::classify(&head.method, path) else { return };
    if let Some(below_v1) = below_v1 {
        assert_eq!(path.strip_prefix("/v1"), Some(below_v1));
        assert!(below_v1.starts_with('/'));
    }
    for base_path in ["/v1", "", "/api/v1", "/openai/deployments/a%20b"] {
        if below_v1.is_some() && !paths::may_be_below(base_path, path) {
            continue;
        }
        let to = ToBackend {
            base_path: Some(base_path).filter(|base_path| below_v1.is_some() && *base_path != "/v1"),
            authority: "10.0.0.1:8000",
            client_ip: [192, 0, 2, 7].into(),
            request_id: b"id-1",
            trace: None,
            upgrades: false,
        };
        let mut out = Vec::new();
        push_request(&mut out, &head, &to);
        let line = out.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let sent = line.split(|byte| *byte == b' ').nth(1).expect("a request line must have a target");
        assert!(sent.starts_with(b"/"), "{}", sent.escape_ascii());
        // The query may hold anything: it is no path, unless its question mark is encoded.
        check_harmless(sent.split(|byte| *byte == b'?').next().unwrap_or_default());
    }
}

/// The model in a query against a plain reading of what forms look like: split, then decoded.
fn check_query(query: &str) {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        let bytes = decode_once(text.as_bytes());
        String::from_utf8(bytes).unwrap_or(text)
    };
    let values: Vec<String> = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .filter(|(key, _)| decode(key).eq_ignore_ascii_case("model"))
        .map(|(_, value)| decode(value))
        .collect();
    match paths::model_in_query(Some(query)) {
        Ok(model) => {
            assert!(values.iter().all(|value| *value == values[0]), "{values:?} are taken for {model:?}");
            assert_eq!(model, values.first().filter(|value| !value.is_empty()).cloned());
        }
        Err(_) => assert!(values.iter().any(|value| *value != values[0]), "{values:?} do not differ"),
    }
}

/// Decodings that servers and the proxies before them may do one after the other.
const DECODINGS: usize = 4;

/// Endpoints by which whoever reaches an engine can stop it, change it or read its memory, and the beginnings of more.
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
const CONTROL_BEGINS: &[&str] = &["dump_", "load_lora", "unload_lora", "update_weight"];

fn check_harmless(path: &[u8]) {
    let mut path = path.to_vec();
    for round in 0..=DECODINGS {
        for segment in path.split(|byte| b"/\\;?#".contains(byte)) {
            let segment = segment.trim_ascii().to_ascii_lowercase();
            let is_control = CONTROL.iter().any(|name| segment == name.as_bytes())
                || CONTROL_BEGINS.iter().any(|begin| segment.starts_with(begin.as_bytes()));
            assert!(!is_control, "decoded {round} times it is {}", path.escape_ascii());
            assert_ne!(segment, b"..", "decoded {round} times it is {}", path.escape_ascii());
        }
        path = decode_once(&path);
    }
}

fn decode_once(path: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::new();
    let mut rest = path;
    while let [byte, behind @ ..] = rest {
        let digit = |at: usize| behind.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        (rest, _) = match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => (&behind[2..], decoded.push((high << 4 | low) as u8)),
            _ => (behind, decoded.push(*byte)),
        };
    }
    decoded
}
