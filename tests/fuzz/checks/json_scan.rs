//! The scanner for JSON bodies against `serde_json`.

use inference_proxy::scan::ModelScanner;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{arrivals, expected, scan};

/// Checks a request body.
pub fn check(body: &[u8]) {
    let found = scan(ModelScanner::json(), &[body]);
    for pieces in arrivals(body) {
        assert_eq!(scan(ModelScanner::json(), &pieces), found, "it depends on how it is cut");
    }
    match serde_json::from_slice::<TopLevel>(&without_leniencies(body)) {
        Ok(read) => {
            assert_eq!(found.clone().map(|(model, _)| model), expected(read.models));
            if let Ok((_, continues)) = found {
                let last = read.continued.into_iter().next_back().flatten();
                let last = last.filter(|(id, _)| !id.is_empty() && id.len() <= 128);
                match last {
                    // An escape there may stand for a printable character of ASCII only.
                    Some((id, true)) if !id.is_ascii() || id.contains('\x7f') => {}
                    Some((id, true)) if id.contains(char::is_control) => assert_eq!(continues, None),
                    last => assert_eq!(continues, last.map(|(id, _)| id)),
                }
            }
        }
        // What the scanner takes and `serde_json` does not: neither can move a key.
        Err(error) if error.to_string().contains("control character") => {}
        Err(error) if error.to_string().contains("recursion limit") => {}
        Err(error) => assert!(found.is_err(), "serde_json says {error}, the scanner {found:?}"),
    }
}

/// The values of the keys that matter, `None` for what is not a string.
#[derive(Debug, Default)]
struct TopLevel {
    models: Vec<Option<String>>,
    /// With whether there were escapes in it.
    continued: Vec<Option<(String, bool)>>,
}

/// A key as bytes, since halves of surrogate pairs are allowed in it.
struct Key(Vec<u8>);

impl<'de> Deserialize<'de> for TopLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = TopLevel;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TopLevel, A::Error> {
                let mut read = TopLevel::default();
                while let Some(Key(key)) = map.next_key()? {
                    match &key[..] {
                        b"model" => {
                            let value = map.next_value::<&RawValue>()?.get();
                            let text = value.starts_with('"').then(|| serde_json::from_str(value));
                            read.models.push(text.transpose().map_err(serde::de::Error::custom)?);
                        }
                        b"previous_response_id" => {
                            let value = map.next_value::<&RawValue>()?.get();
                            // Any text will do there, so one that cannot be read is not an error.
                            let text = serde_json::from_str(value).ok();
                            read.continued.push(text.map(|text| (text, value.contains('\\'))));
                        }
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(read)
            }
        }

        deserializer.deserialize_map(Object)
    }
}

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

/// The body without its byte order mark, and with `null` for every number, `NaN` and `Infinity`: there the scanner takes
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
            Some(word) => (word.len(), &b"null"[..]),
            None if starts_number => (number, &b"null"[..]),
            None => (1, &rest[..1]),
        };
        in_string ^= *byte == b'"';
        strict.extend_from_slice(text);
        rest = &rest[used..];
    }
    strict
}
