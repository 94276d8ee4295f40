//! Reads the answer of `/models`. It is hostile input: nothing of it is used before all of it has been checked. Pure.

use std::{collections::HashSet, sync::Arc};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::object;
use crate::{base::foreign, pool::table::ModelObject, telemetry::metrics::UNKNOWN_MODEL};

/// Most models of one backend.
pub(crate) const MODELS_MAX: usize = 1024;
/// Longest model id.
const ID_BYTES_MAX: usize = 256;
/// Longest quotation of a model id.
const ID_CHARS_SHOWN: usize = 64;

#[derive(Deserialize)]
struct RawListing<'a> {
    #[serde(borrow)]
    data: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawModel {
    id: String,
    #[serde(default)]
    created: Option<serde_json::Number>,
    #[serde(default)]
    root: Option<serde_json::Value>,
    #[serde(default)]
    max_model_len: Option<serde_json::Number>,
}

/// The models of an answer of `/models`, each once, in their order. The error completes "answered, but …".
pub(super) fn parse(body: &[u8]) -> Result<Vec<Arc<ModelObject>>, String> {
    // RFC 8259, 8.1: a byte order mark may be ignored. It stands before the list, and is in no object.
    let body = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    let listing: RawListing<'_> =
        serde_json::from_slice(body).map_err(|e| format!("not with a JSON object that holds a list `data`: {e}"))?;
    if listing.data.is_empty() {
        return Err("with an empty list of models".to_owned());
    }
    if listing.data.len() > MODELS_MAX {
        return Err(format!("with {} models; at most {MODELS_MAX} are taken", listing.data.len()));
    }
    let mut models: Vec<Arc<ModelObject>> = Vec::with_capacity(listing.data.len());
    let mut ids = HashSet::with_capacity(listing.data.len());
    for raw in listing.data {
        object::check(raw.get())?;
        let model: RawModel =
            serde_json::from_str(raw.get()).map_err(|e| format!("a model object cannot be used: {e}"))?;
        if model.id.is_empty() || model.id.len() > ID_BYTES_MAX {
            return Err(format!("a model id has {} bytes; 1 to {ID_BYTES_MAX} are taken", model.id.len()));
        }
        if let Some(c) = model.id.chars().find(|c| foreign::is_misleading(*c)) {
            let (id, c) = (foreign::shown(&model.id, ID_CHARS_SHOWN), c.escape_unicode());
            return Err(format!("the model id \"{id}\" has control or format characters, such as {c}"));
        }
        if model.id.trim().is_empty() {
            return Err(format!("the model id {:?} is blank", model.id));
        }
        if model.id == UNKNOWN_MODEL {
            return Err(format!(
                "the model id {UNKNOWN_MODEL} is reserved: metrics have it for requests without a model"
            ));
        }
        if ids.insert(model.id.clone()) {
            models.push(Arc::new(ModelObject {
                id: model.id.into(),
                json: raw.to_owned(),
                created: model.created.and_then(|n| n.as_i64()),
                root: model.root.and_then(|root| root.as_str().map(str::to_owned)),
                max_model_len: model.max_model_len.and_then(|n| n.as_u64()),
            }));
        }
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(body: &str) -> Result<Vec<String>, String> {
        parse(body.as_bytes()).map(|models| models.iter().map(|m| m.id.to_string()).collect())
    }

    #[test]
    fn listings_of_real_engines_are_understood() {
        let vllm = r#"{"object":"list","data":[{"id":"org/m","object":"model","created":1700000000,"owned_by":"vllm",
            "root":"org/m","parent":null,"max_model_len":4096,"permission":[{"id":"modelperm-1"}]}]}"#;
        let models = parse(vllm.as_bytes()).unwrap();
        assert_eq!(
            (&*models[0].id, models[0].created, models[0].max_model_len),
            ("org/m", Some(1_700_000_000), Some(4096))
        );
        assert_eq!(models[0].root.as_deref(), Some("org/m"));
        assert!(models[0].json.get().contains("\"permission\":[{\"id\":\"modelperm-1\"}]"));
        let llamacpp =
            r#"{"models":[{"name":"x"}],"object":"list","data":[{"id":"x","created":1,"meta":{"n_ctx":9}}]}"#;
        assert_eq!(ids(llamacpp).unwrap(), ["x"]);
        assert_eq!(ids(r#"{"data":[{"id":"a"},{"id":"b"},{"id":"a","x":1}]}"#).unwrap(), ["a", "b"]);
        let odd = ["/models/my model.gguf", r"C:\\m", "模型/я-é-e\u{301}", "🦀"];
        let listing = format!(r#"{{"data":[{}]}}"#, odd.map(|id| format!(r#"{{"id":"{id}"}}"#)).join(","));
        assert_eq!(ids(&listing).unwrap(), ["/models/my model.gguf", r"C:\m", "模型/я-é-e\u{301}", "🦀"]);
    }

    /// A list of two models, of which the second one has this value in its object.
    fn in_object(value: &str) -> String {
        format!(r#"{{"data":[{{"id":"m"}},{{"id":"n","x":{value}}}]}}"#)
    }

    #[test]
    fn a_byte_order_mark_before_the_list_is_ignored() {
        assert_eq!(ids("\u{feff}{\"data\":[{\"id\":\"m\"}]}").unwrap(), ["m"]);
    }

    #[test]
    fn text_that_is_not_utf8_is_refused() {
        for body in [
            &b"{\"data\":[{\"id\":\"m\",\"x\":\"\xff\"}]}"[..],
            b"{\"data\":[{\"id\":\"m\",\"x\":\"\xed\xa0\xbd\"}]}",
            b"{\"data\":[{\"id\":\"m\",\"\xc3\":1}]}",
            b"\xff\xfe{\0}\0",
        ] {
            let error = parse(body).unwrap_err();
            assert!(error.contains("JSON"), "{error}");
        }
    }

    #[test]
    fn unusable_listings_are_refused_with_a_reason() {
        let many = format!(r#"{{"data":[{}]}}"#, vec![r#"{"id":"x"}"#; MODELS_MAX + 1].join(","));
        let long = format!(r#"{{"data":[{{"id":"{}"}}]}}"#, "x".repeat(ID_BYTES_MAX + 1));
        let deep = format!(r#"{{"data":{}"#, "[".repeat(100_000));
        for (body, reason) in [
            ("<html>", "JSON"),
            ("[]", "JSON"),
            (r#"{"object":"list"}"#, "data"),
            (r#"{"data":[]}"#, "empty"),
            (r#"{"data":[{}]}"#, "id"),
            (r#"{"data":[{"id":7}]}"#, "id"),
            (r#"{"data":[{"id":""}]}"#, "0 bytes"),
            (r#"{"data":[{"id":"a\nb"}]}"#, "control"),
            (r#"{"data":[{"id":"a\u0000b"}]}"#, r#""a\0b" has control or format characters, such as \u{0}"#),
            (r#"{"data":[{"id":"m\u202egpj"}]}"#, r#""m\u{202e}gpj" has control or format characters"#),
            (r#"{"data":[{"id":"m"},{"id":"n\u2028"}]}"#, r"such as \u{2028}"),
            (r#"{"data":[{"id":"m\u200b"}]}"#, r"such as \u{200b}"),
            (r#"{"data":[{"id":" "}]}"#, r#"the model id " " is blank"#),
            (r#"{"data":[{"id":"\u3000\u00a0"}]}"#, r#"the model id "\u{3000}\u{a0}" is blank"#),
            (many.as_str(), "at most 1024"),
            (long.as_str(), "257 bytes"),
            (deep.as_str(), "JSON"),
            (r#"{"data":[{"id":"m"},{"id":"n","created":"today"}]}"#, "a model object cannot be used"),
            (in_object(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))).as_str(), "32 levels"),
            (in_object(&format!("{}{}", "[".repeat(20_000), "]".repeat(20_000))).as_str(), "32 levels"),
            (in_object(r#""\ud83e""#).as_str(), "surrogate"),
            (in_object("1e999").as_str(), "number out of range"),
            (in_object("NaN").as_str(), "JSON"),
            (in_object(r#"1,"x":1"#).as_str(), r#"the key "x" twice"#),
            (in_object(&format!(r#""{}""#, "x".repeat(70_000))).as_str(), "at most 65536 are taken"),
            ("\u{feff}\u{feff}{\"data\":[{\"id\":\"m\"}]}", "JSON"),
        ] {
            let error = ids(body).unwrap_err();
            assert!(error.contains(reason), "{error} should mention {reason}");
            assert!(!error.contains(foreign::is_misleading), "{error:?}");
        }
    }

    #[test]
    fn the_model_that_metrics_need_for_themselves_is_refused() {
        let error = ids(r#"{"data":[{"id":"m"},{"id":"_unknown"}]}"#).unwrap_err();
        assert!(error.starts_with("the model id _unknown is reserved"), "{error}");
        assert_eq!(ids(r#"{"data":[{"id":"_unknown_"},{"id":"unknown"}]}"#).unwrap(), ["_unknown_", "unknown"]);
    }
}
