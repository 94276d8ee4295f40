//! Checks that a model object can be shown to clients as it is. Pure.
//!
//! Objects go verbatim, one beside the other, into one list. So an object that some client cannot read makes the whole
//! list unreadable for that client, and hides every other backend's models. Parsers differ in what they read: strict ones
//! refuse half a surrogate pair, a number beyond a double, or a key that stands twice, and recursive ones give up at some
//! depth. Real engines send none of that.

use std::{collections::HashSet, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

/// Levels of objects and arrays, the model object itself being the first. Real ones have three.
pub(super) const DEPTH_MAX: usize = 32;
/// Longest model object. Real ones have some hundred bytes.
pub(super) const OBJECT_BYTES_MAX: usize = 64 * 1024;
/// Longest quotation of a key.
const KEY_CHARS_SHOWN: usize = 40;

/// Checks that every client can read this object. The error completes "answered, but …".
pub(super) fn check(json: &str) -> Result<(), String> {
    let mut parser = serde_json::Deserializer::from_str(json);
    Readable { levels_left: DEPTH_MAX }.deserialize(&mut parser).and_then(|()| parser.end()).map_err(|error| {
        let what = error.to_string();
        // The parser only names the step at which it stopped.
        let half = if what.contains("hex escape") { ", which is half a surrogate pair" } else { "" };
        format!("a model object is not JSON that every client can read: {what}{half}")
    })?;
    match json.len() {
        0..=OBJECT_BYTES_MAX => Ok(()),
        bytes => Err(format!("a model object has {bytes} bytes; at most {OBJECT_BYTES_MAX} are taken")),
    }
}

/// A value that every parser reads, and reads in the same way.
#[derive(Clone, Copy)]
struct Readable {
    levels_left: usize,
}

impl Readable {
    /// The check of the values inside this one, if they may be that deep.
    fn inside<E: serde::de::Error>(self) -> Result<Readable, E> {
        match self.levels_left.checked_sub(1) {
            Some(levels_left) => Ok(Readable { levels_left }),
            None => Err(E::custom(format_args!("it is nested more than {DEPTH_MAX} levels deep"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Readable {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        // The parser itself refuses half surrogate pairs, control characters and numbers beyond a double.
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Readable {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let inside = self.inside()?;
        while items.next_element_seed(inside)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let inside = self.inside()?;
        let mut keys: HashSet<String> = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            if keys.contains(&key) {
                let key = crate::base::foreign::shown(&key, KEY_CHARS_SHOWN);
                return Err(A::Error::custom(format_args!("it has the key \"{key}\" twice")));
            }
            keys.insert(key);
            entries.next_value_seed(inside)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(levels: usize) -> String {
        // The object is one of the levels.
        format!(r#"{{"id":"m","x":{}{}}}"#, "[".repeat(levels - 1), "]".repeat(levels - 1))
    }

    #[test]
    fn what_every_client_can_read_passes() {
        for json in [
            r#"{"id":"m","created":1700000000,"n":-1.5e300,"small":1e-999,"b":[true,null,{"x":{}}],"e":"\u0000\ud83e\udd80"}"#,
            r#"{"id":"m","outer":{"same":1},"other":{"same":2},"SAME":3}"#,
            r#"{"id":"m","big":123456789012345678901234567890}"#,
            "{\n  \"id\": \"m\",\t\"text\": \"\u{2028}\u{7f}\u{fffd}\"\r\n}",
            &nested(DEPTH_MAX),
            &format!(r#"{{"id":"m","x":"{}"}}"#, "x".repeat(OBJECT_BYTES_MAX - 17)),
        ] {
            assert_eq!(check(json), Ok(()), "{json:.80}");
        }
    }

    #[test]
    fn what_some_client_cannot_read_is_refused_with_the_reason() {
        for (json, reason) in [
            (nested(DEPTH_MAX + 1).as_str(), "nested more than 32 levels deep"),
            (&nested(100_000)[..60_000], "nested more than 32 levels deep"),
            (&r#"{"x":"#.repeat(40), "nested more than 32 levels deep"),
            (&format!(r#"{{"id":"m","x":"{}"}}"#, "x".repeat(OBJECT_BYTES_MAX)), "at most 65536 are taken"),
            (r#"{"id":"m","x":"\ud83e"}"#, "half a surrogate pair"),
            (r#"{"id":"m","x":"\udd80"}"#, "half a surrogate pair"),
            (r#"{"id":"m","x":"\ud83ex"}"#, "half a surrogate pair"),
            (r#"{"id":"m","x":"\ud83e\ud83e"}"#, "half a surrogate pair"),
            (r#"{"id":"m","x\ud83e":1}"#, "half a surrogate pair"),
            (r#"{"id":"m","deep":[{"x":["\udd80"]}]}"#, "half a surrogate pair"),
            (r#"{"id":"m","x":1e999}"#, "number out of range"),
            (r#"{"id":"m","x":[-1e400]}"#, "number out of range"),
            (&format!(r#"{{"id":"m","x":{}}}"#, "9".repeat(5000)), "number out of range"),
            (r#"{"id":"m","x":NaN}"#, "expected value"),
            (r#"{"id":"m","x":-Infinity}"#, "invalid number"),
            (r#"{"id":"m","x":01}"#, "invalid number"),
            ("{\"id\":\"m\",\"x\":\"a\nb\"}", "control character"),
            (r#"{"id":"m","owned_by":"a","owned_by":"b"}"#, r#"the key "owned_by" twice"#),
            (r#"{"id":"m","meta":{"a":1,"\u0061":1}}"#, r#"the key "a" twice"#),
            (r#"{"id":"m"} {}"#, "trailing characters"),
        ] {
            let error = check(json).unwrap_err();
            assert!(error.contains(reason), "{error} should mention {reason}");
            assert!(error.len() < 200, "{error}");
        }
    }
}
