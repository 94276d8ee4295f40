//! The scanner for JSON bodies against `serde_json`.

use inference_proxy::wire::scan::{ModelScanner, ScanError};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Model, arrivals, expected, scan};

/// Checks a request body.
pub fn check(body: &[u8]) {
    let found = scan(ModelScanner::json(), &[body]);
    for pieces in arrivals(body) {
        assert_eq!(scan(ModelScanner::json(), &pieces), found, "it depends on how it is cut");
    }
    let optional = || {
        let mut scanner = ModelScanner::json();
        scanner.let_model_be_none();
        scanner
    };
    let found_optional = scan(optional(), &[body]);
    for pieces in arrivals(body) {
        assert_eq!(scan(optional(), &pieces), found_optional, "it depends on how it is cut");
    }
    let strict = without_leniencies(body);
    match Values::of(|key| key.eq_ignore_ascii_case(b"model"), &strict) {
        // `serde_json` takes them in keys that it hands out as bytes.
        Ok(_) if has_raw_control(&strict) => assert!(found.is_err() && found_optional.is_err(), "{found:?}"),
        Ok(models) => {
            let models: Vec<Model> = models.into_iter().map(|(model, _)| model).collect();
            for (found, may_be_none) in [(&found, false), (&found_optional, true)] {
                let found = found.clone().map(|(model, _)| model);
                assert_eq!(found, expected(models.iter().cloned(), may_be_none), "may be none: {may_be_none}");
            }
        }
        // What the scanner takes and `serde_json` does not: it cannot move a key.
        Err(error) if error.to_string().contains("recursion limit") => {}
        Err(error) => {
            for found in [&found, &found_optional] {
                let is_refused = matches!(found, Err(error) if *error != ScanError::ModelMissing);
                assert!(is_refused, "serde_json says {error}, the scanner {found:?}");
            }
        }
    }
    if let (Ok((_, continues)), Ok(ids)) = (found, Values::of(|key| key == b"previous_response_id", &strict)) {
        let last = ids.into_iter().next_back().and_then(|(id, has_escapes)| match id {
            Model::Text(id) => Some((id, has_escapes)),
            Model::Null | Model::Other => None,
        });
        match last.filter(|(id, _)| !id.is_empty() && id.len() <= 128) {
            // An escape there may stand for a printable character of ASCII only.
            Some((id, true)) if !id.is_ascii() || id.contains('\x7f') => {}
            Some((id, true)) if id.contains(char::is_control) => assert_eq!(continues, None),
            last => assert_eq!(continues, last.map(|(id, _)| id)),
        }
    }
}

/// Reads the values of some keys of the body's own object, in their order, with whether there were escapes in them.
struct Values<F>(F);

impl<F: Fn(&[u8]) -> bool> Values<F> {
    fn of(is_key: F, body: &[u8]) -> serde_json::Result<Vec<(Model, bool)>> {
        let mut deserializer = serde_json::Deserializer::from_slice(body);
        let values = deserializer.deserialize_map(Values(is_key))?;
        deserializer.end().map(|()| values)
    }
}

impl<'de, F: Fn(&[u8]) -> bool> Visitor<'de> for Values<F> {
    type Value = Vec<(Model, bool)>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Key(key)) = map.next_key()? {
            if !(self.0)(&key) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value::<&RawValue>()?.get();
            let model = match value {
                "null" => Model::Null,
                text if text.starts_with('"') => {
                    Model::Text(serde_json::from_str(text).map_err(serde::de::Error::custom)?)
                }
                _ => Model::Other,
            };
            values.push((model, value.contains('\\')));
        }
        Ok(values)
    }
}

/// A key as bytes, since halves of surrogate pairs are allowed in it.
struct Key(Vec<u8>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = Key;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a key")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Key, E> {
                Ok(Key(bytes.to_vec()))
            }
        }

        deserializer.deserialize_bytes(Bytes)
    }
}

/// A string of valid JSON holds a raw control character.
fn has_raw_control(text: &[u8]) -> bool {
    let (mut in_string, mut escaped) = (false, false);
    text.iter().any(|&byte| {
        let is_escaped = std::mem::take(&mut escaped);
        escaped = in_string && !is_escaped && byte == b'\\';
        in_string ^= byte == b'"' && !is_escaped;
        in_string && byte < b' '
    })
}

/// The body without its byte order mark, and with 0 for every number, `NaN` and `Infinity`: there the scanner takes
/// more than `serde_json`.
fn without_leniencies(body: &[u8]) -> Vec<u8> {
    let mut rest = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    let mut strict = Vec::new();
    let mut in_string = false;
    while let [byte, ..] = rest {
        let words: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
        let word = words.iter().find(|word| rest.starts_with(word));
        let number = rest.iter().take_while(|byte| b"0123456789.eE+-".contains(byte)).count();
        let starts_number = matches!(rest, [b'0'..=b'9', ..] | [b'-', b'0'..=b'9', ..]);
        let (used, text) = match word {
            _ if in_string && *byte == b'\\' => (rest.len().min(2), &rest[..rest.len().min(2)]),
            _ if in_string || *byte == b'"' => (1, &rest[..1]),
            Some(word) => (word.len(), &b"0"[..]),
            None if starts_number => (number, &b"0"[..]),
            None => (1, &rest[..1]),
        };
        in_string ^= *byte == b'"';
        strict.extend_from_slice(text);
        rest = &rest[used..];
    }
    strict
}
