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
    let strict = without_leniencies(body);
    match Values::of(b"model", &strict) {
        Ok(models) => {
            let models = models.into_iter().map(|model| model.map(|(model, _)| model));
            assert_eq!(found.clone().map(|(model, _)| model), expected(models));
        }
        // What the scanner takes and `serde_json` does not: neither can move a key.
        Err(error) if error.to_string().contains("control character") => {}
        Err(error) if error.to_string().contains("recursion limit") => {}
        Err(error) => assert!(found.is_err(), "serde_json says {error}, the scanner {found:?}"),
    }
    if let (Ok((_, continues)), Ok(ids)) = (found, Values::of(b"previous_response_id", &strict)) {
        let last = ids.into_iter().next_back().flatten();
        match last.filter(|(id, _)| !id.is_empty() && id.len() <= 128) {
            // An escape there may stand for a printable character of ASCII only.
            Some((id, true)) if !id.is_ascii() || id.contains('\x7f') => {}
            Some((id, true)) if id.contains(char::is_control) => assert_eq!(continues, None),
            last => assert_eq!(continues, last.map(|(id, _)| id)),
        }
    }
}

/// Reads the values of one key of the body's own object, in their order: a text with whether there were escapes in it,
/// `None` for anything else.
struct Values<'k>(&'k [u8]);

impl Values<'_> {
    fn of(key: &[u8], body: &[u8]) -> serde_json::Result<Vec<Option<(String, bool)>>> {
        let mut deserializer = serde_json::Deserializer::from_slice(body);
        let values = deserializer.deserialize_map(Values(key))?;
        deserializer.end().map(|()| values)
    }
}

impl<'de> Visitor<'de> for Values<'_> {
    type Value = Vec<Option<(String, bool)>>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Key(key)) = map.next_key()? {
            if key != self.0 {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value::<&RawValue>()?.get();
            let text = value.starts_with('"').then(|| serde_json::from_str(value));
            let text = text.transpose().map_err(serde::de::Error::custom)?;
            values.push(text.map(|text| (text, value.contains('\\'))));
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
