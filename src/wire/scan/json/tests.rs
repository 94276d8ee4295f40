use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::super::tests::{cut, expected, scan, scan_cut_everywhere};
use super::super::{MODEL_LIMIT_BYTES, MODEL_SHOWN_CHARS, ModelScanner, ScanError};
use super::{
    DEPTH_LIMIT, LONE_SURROGATE,
    text::{is_stop, plain_len},
};

fn check(body: impl AsRef<[u8]>, expected: Result<&str, ScanError>) {
    let body = body.as_ref();
    let found = scan_cut_everywhere(ModelScanner::json, body);
    assert_eq!(found, expected.map(str::to_owned), "{}", body.escape_ascii());
}

fn check_invalid(body: impl AsRef<[u8]>, why: &'static str, offset: u64) {
    check(body, Err(ScanError::InvalidJson { why, offset }));
}

#[test]
fn finds_the_key() {
    for body in [
        r#"{"model":"m"}"#,
        " \r\n\t{ \n\"model\" : \"m\" } \r\n",
        "\u{feff} {\"model\":\"m\"}",
        r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}"#,
        r#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":5,"model":"m"}"#,
        // Behind escapes.
        r#"{"mod\u0065l":"m"}"#,
        r#"{"\u006D\u006f\u0064\u0065\u006C":"\u006d"}"#,
        // Not the key: in strings, in keys, further in.
        r#"{"a":"\"model\":\"x\"","model":"m"}"#,
        r#"{"\"model\":\"x\",":0,"model":"m","z":"{\"model\":\"x\"}\\"}"#,
        r#"{"metadata":{"model":"x","":{"model":5}},"tools":[{"model":["x"]},"model"],"model":"m"}"#,
        r#"{"models":"x","mode":"x","":"x","model ":"x","model\u0000":"x","xmodel":"x","model":"m"}"#,
        r#"{"Models":"x","MODE":"x","\u0130odel":"x","mod\u0119l":"x","mode\u216c":"x","model":"m"}"#,
        "{\"\u{ff2d}odel\":\"x\",\"mode\u{217c}\":\"x\",\"m\u{f6}del\":\"x\",\"model\":\"m\"}",
        // The key, for servers that match keys without regard to case.
        r#"{"Model":"m"}"#,
        r#"{"MODEL":"m","metadata":{"Model":"x"}}"#,
        r#"{"m\u004FdeL":"m"}"#,
        r#"{"model":"m","Model":"m","mODEL":"m"}"#,
        // Twice, but the same.
        r#"{"model":"m","messages":[],"mod\u0065l":"\u006d"}"#,
    ] {
        check(body, Ok("m"));
    }
}

#[test]
fn unescapes_the_value() {
    check(r#"{"model":"\uD800\uDC00\udbff\udfff\uE000"}"#, Ok("\u{10000}\u{10ffff}\u{e000}"));
    check(r#"{"model":"\"\\\/\b\f\n\r\t\u0000"}"#, Ok("\"\\/\u{8}\u{c}\n\r\t\0"));
    check(r#"{"model":"org\/caf\u00E9 \ud83d\uDE00\u4f60"}"#, Ok("org/caf\u{e9} \u{1f600}\u{4f60}"));
    check("{\"model\":\" \u{e9}\u{1f600}\u{7f} \"}", Ok(" \u{e9}\u{1f600}\u{7f} "));
}

#[test]
fn takes_every_kind_of_value() {
    for value in [
        "null",
        "true",
        "false",
        "NaN",
        "Infinity",
        "-Infinity",
        "0",
        "-0.5e+10",
        "1E9",
        "[]",
        "{}",
        "[[],{}]",
        "[1,2 , 3]",
        r#"{"a":{"b":[{"c":"d"}]}}"#,
        r#""\ud83d""#,
        "\"\u{7f}\u{80}\u{a0}\u{2028}\"",
    ] {
        check(format!(r#"{{"a":{value},"model":"m","z":{value}}}"#), Ok("m"));
    }
    check(b"{\"\xFF\":\"\xC3\",\"model\":\"m\"}", Ok("m"));
}

#[test]
fn tells_what_is_wrong_with_the_model() {
    for body in ["", " \n", "\u{feff}", "{}", r#"{"a":{"model":"m"}}"#, r#"{"Models":"m"}"#] {
        check(body, Err(ScanError::ModelMissing));
    }
    for value in ["5", "-1", "null", "true", "NaN", "[\"m\"]", "{\"model\":\"m\"}"] {
        check(format!(r#"{{"model":{value}}}"#), Err(ScanError::ModelNotAString));
        check(format!(r#"{{"model":"m","model":{value}}}"#), Err(ScanError::ModelNotAString));
        check(format!(r#"{{"model":"m","MoDel":{value}}}"#), Err(ScanError::ModelNotAString));
    }
    check(r#"{"model":""}"#, Err(ScanError::ModelEmpty));
    for second in ["n", "M", "m ", "mm", "\\u006d\\u0000"] {
        let found =
            scan_cut_everywhere(ModelScanner::json, format!(r#"{{"model":"m","model":"{second}"}}"#).as_bytes());
        assert!(matches!(found, Err(ScanError::ModelsDiffer { ref first, .. }) if first == "m"), "{found:?}");
    }
    for unit in ["m", "\\u006d"] {
        let longest = unit.repeat(MODEL_LIMIT_BYTES);
        check(format!(r#"{{"model":"{longest}"}}"#), Ok(&"m".repeat(MODEL_LIMIT_BYTES)));
        for excess in ["x", "xy", "xyz", "xyzxyz"] {
            let body = format!(r#"{{"model":"{longest}{excess}"}}"#);
            check(body, Err(ScanError::ModelTooLong { begin: "m".repeat(MODEL_SHOWN_CHARS) }));
            let second = format!("{}\u{2026}", "m".repeat(MODEL_SHOWN_CHARS));
            let body = format!(r#"{{"model":"m","model":"{longest}{excess}"}}"#);
            check(body, Err(ScanError::ModelsDiffer { first: "m".to_owned(), second }));
        }
    }
    check_invalid(b"{\"model\":\"m\xFF\"}", "`model` is not UTF-8", 12);
    check_invalid("{\"model\":\"m\n\"}", "`model` holds a raw control character", 11);
    let too_long = "m".repeat(MODEL_LIMIT_BYTES + 3);
    let begin = "m".repeat(MODEL_SHOWN_CHARS);
    check(format!("{{\"model\":\"{too_long}\n\"}}"), Err(ScanError::ModelTooLong { begin }));
    let begin = "\u{e9}".repeat(MODEL_SHOWN_CHARS);
    check(format!(r#"{{"model":"{}"}}"#, "\u{e9}".repeat(600)), Err(ScanError::ModelTooLong { begin }));
    check_invalid(r#"{"model":"\ud83d"}"#, LONE_SURROGATE, 16);
    check_invalid(r#"{"model":"\ud83dx"}"#, LONE_SURROGATE, 16);
    check_invalid(r#"{"model":"\ud83dx\ude00"}"#, LONE_SURROGATE, 16);
    check_invalid(r#"{"model":"\ud83d\n"}"#, LONE_SURROGATE, 17);
    check_invalid(r#"{"model":"\ud83d\ud83d"}"#, LONE_SURROGATE, 21);
    check_invalid(r#"{"model":"\ude00"}"#, LONE_SURROGATE, 15);
}

#[test]
fn a_raw_control_character_in_a_string_is_refused_wherever_it_stands() {
    const WHY: &str = "a string holds a raw control character";
    let long = "x".repeat(100);
    let smuggled = "POST /lora-adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]";
    for (before, after) in [
        (r#"{"model":"m","a":""#.to_owned(), r#""}"#),
        (r#"{"a":""#.to_owned(), r#"","model":"m"}"#),
        (r#"{""#.to_owned(), r#"":1,"model":"m"}"#),
        (r#"{"mod"#.to_owned(), r#"el":"m"}"#),
        (r#"{"model"#.to_owned(), r#"":"m"}"#),
        (r#"{"model":"m","previous"#.to_owned(), r#"_response_id":"x"}"#),
        (r#"{"model":"m","previous_response_id":"x"#.to_owned(), r#"y"}"#),
        (r#"{"model":"m","a":{"b":["c",""#.to_owned(), r#""]}}"#),
        (r#"{"model":"m","a":{""#.to_owned(), r#"":1}}"#),
        (r#"{"model":"m","a":"\n\u00e9"#.to_owned(), r#"\n"}"#),
        (format!(r#"{{"model":"m","a":"{long}\n{long}"#), r#"xxxxxxxxxx\n"}"#),
        (format!(r#"{{"model":"m","a":"{long}{long}"#), r#""}"#),
    ] {
        for control in ["\r\n", "\n", "\t", "\0", "\u{1f}", smuggled] {
            if control == smuggled {
                let body = format!("{before} {control}{after}");
                check_invalid(body, WHY, before.len() as u64 + 29);
            } else {
                check_invalid(format!("{before}{control}{after}"), WHY, before.len() as u64);
            }
        }
        check_invalid(format!("{before}\n"), WHY, before.len() as u64);
    }
    // Between tokens, line ends are white space.
    check("{\r\n\"model\":\r\n\"m\"\r\n}\r\n", Ok("m"));
}

#[test]
fn the_first_stop_is_found_at_every_place_among_all_bytes() {
    for byte in 0..=u8::MAX {
        for filler in [b'x', 0x20, 0x21, 0x23, 0x5B, 0x5D, 0x7F, 0x80, 0xFF] {
            for at in 0..80 {
                let mut text = [filler; 80];
                text[at] = byte;
                let expected = if is_stop(byte) { at } else { 80 };
                assert_eq!(plain_len(&text), expected, "{byte:#x} among {filler:#x} at {at}");
            }
        }
    }
    for (first, second) in [(b'"', 0), (0, b'"'), (b'\\', 0x1F), (b'\n', b'\\')] {
        for at in 0..79 {
            let mut text = [b'x'; 80];
            (text[at], text[at + 1], text[79]) = (first, second, b'"');
            assert_eq!(plain_len(&text), at);
        }
    }
}

#[test]
fn no_character_outside_of_ascii_folds_to_a_letter_of_the_key() {
    let mut folds_elsewhere = 0;
    for character in ('\u{80}'..=char::MAX).filter(|c| !c.is_ascii()) {
        let letters = || character.to_lowercase().chain(character.to_uppercase());
        // A special casing of several characters, such as that of the ligature fi, is no folding of one.
        if character.to_lowercase().count() == 1 && character.to_uppercase().count() == 1 {
            assert!(!letters().any(|letter| "modelMODEL".contains(letter)), "{character:?}");
            folds_elsewhere += usize::from(letters().any(|letter| letter.is_ascii()));
        }
    }
    // The long s, the Kelvin sign and the dotless i, which show that the loop sees them.
    assert!(folds_elsewhere >= 2, "{folds_elsewhere}");
}

#[test]
fn null_and_the_empty_string_are_no_name_where_there_need_be_none() {
    let scanner = || {
        let mut scanner = ModelScanner::json();
        scanner.let_model_be_none();
        scanner
    };
    for (body, expected) in [
        (r#"{}"#, Err(ScanError::ModelMissing)),
        (r#"{"model":null}"#, Err(ScanError::ModelMissing)),
        (r#"{"model":"","query":"q"}"#, Err(ScanError::ModelMissing)),
        (r#"{"query":"q","Model" : null , "model":"","model":null}"#, Err(ScanError::ModelMissing)),
        (r#"{"model":"m"}"#, Ok("m")),
        (r#"{"model":"m","model":null}"#, Err(ScanError::ModelNotAString)),
        (r#"{"model":"m","model":""}"#, Err(ScanError::ModelEmpty)),
        (r#"{"model":false}"#, Err(ScanError::ModelNotAString)),
        (r#"{"model":[]}"#, Err(ScanError::ModelNotAString)),
        (r#"{"model":0}"#, Err(ScanError::ModelNotAString)),
        (r#"{"model":nul}"#, Err(ScanError::InvalidJson { why: "unknown literal", offset: 12 })),
        (
            r#"{"model":nulll}"#,
            Err(ScanError::InvalidJson { why: "expected a comma or the closing bracket", offset: 13 }),
        ),
    ] {
        assert_eq!(scan_cut_everywhere(scanner, body.as_bytes()), expected.map(str::to_owned), "{body}");
    }
    for nothing in ["null", "\"\""] {
        let body = format!(r#"{{"model":{nothing},"model":"m"}}"#);
        let differ = ScanError::ModelsDiffer { first: String::new(), second: "m".to_owned() };
        assert_eq!(scan_cut_everywhere(scanner, body.as_bytes()), Err(differ), "{body}");
    }
}

#[test]
fn refuses_what_is_not_json() {
    for body in ["[]", "\"model\"", "-1", "0", "true", "null", "NaN", "--B\r\n", " [{\"model\":\"m\"}]"] {
        check(body, Err(ScanError::NotAnObject));
    }
    for (body, why, offset) in [
        ("model=m", "expected a value", 0),
        ("{\0\"\0m\0", "expected a key", 1),
        ("\u{feff}\u{feff}{}", "expected a value", 3),
        ("{\"model\":\"m\"", "the body ends inside its object", 12),
        ("{\"model\":\"m", "the body ends inside its object", 11),
        ("{\"model\":\"m\"}}", "expected nothing behind the object", 13),
        ("{\"model\":\"m\"}\0", "expected nothing behind the object", 13),
        ("{\"model\":\"m\"} {\"model\":\"n\"}", "expected nothing behind the object", 14),
        ("{\"model\":}", "expected a value", 9),
        ("{\"model\"}", "expected a colon", 8),
        ("{\"model\" \"m\"}", "expected a colon", 9),
        ("{model:\"m\"}", "expected a key", 1),
        ("{'model':'m'}", "expected a key", 1),
        ("{,\"model\":\"m\"}", "expected a key", 1),
        ("{\"model\":\"m\",}", "expected a key", 13),
        ("{/**/\"model\":\"m\"}", "expected a key", 1),
        ("{\"a\":[1,],\"model\":\"m\"}", "expected a value", 8),
        ("{\"a\":[,1]}", "expected a value", 6),
        ("{\"a\":[1}", "expected a comma or the closing bracket", 7),
        ("{\"a\":{\"b\":1]", "expected a comma or the closing bracket", 11),
        ("{\"a\":{]", "expected a key", 6),
        ("{\"a\":[}", "expected a value", 6),
        ("{\"a\":1 2}", "expected a comma or the closing bracket", 7),
        ("{\"a\":\"\" \"\"}", "expected a comma or the closing bracket", 8),
        ("{\"a\":[1:2]}", "expected a comma or the closing bracket", 7),
        ("{\"a\":nul}", "unknown literal", 8),
        ("{\"a\":nulll}", "expected a comma or the closing bracket", 9),
        ("{\"a\":-NaN}", "unknown literal", 6),
        ("{\"a\":+1}", "expected a value", 5),
        ("{\"a\":.5}", "expected a value", 5),
        ("{\"a\":1x}", "expected a comma or the closing bracket", 6),
        ("{\"a\":\"\\x\"}", "unknown escape sequence", 7),
        ("{\"a\":\"\\u12\"}", "expected four hex digits", 10),
        ("{\"a\":\"\\u+123\"}", "expected four hex digits", 8),
        ("{\"\\'\":1}", "unknown escape sequence", 3),
    ] {
        check_invalid(body, why, offset);
    }
    check_invalid(b"\xFF\xFE{\0}\0", "expected a value", 0);
    check_invalid(b"\xEF\xBBx", "unknown literal", 2);
}

#[test]
fn the_answer_that_is_continued_is_noted() {
    let long = "x".repeat(129);
    for (body, expect) in [
        (r#"{"model":"m","previous_response_id":"resp_1","input":"x"}"#.to_owned(), Some("resp_1")),
        (r#"{"previous_response_id" : "resp_1","model":"m"}"#.to_owned(), Some("resp_1")),
        (r#"{"previous_response_id":"a","previous_response_id":"b","model":"m"}"#.to_owned(), Some("b")),
        (r#"{"previous\u005Fresponse_id":"a","model":"m"}"#.to_owned(), Some("a")),
        (r#"{"\u0070revious_response_i\u0064":"a","model":"m"}"#.to_owned(), Some("a")),
        (r#"{"previous\u005Ersponse_id":"a","model":"m"}"#.to_owned(), None),
        (r#"{"previous_response_id":null,"model":"m","x":"y"}"#.to_owned(), None),
        (r#"{"previous_response_id":["a"],"model":"m"}"#.to_owned(), None),
        (r#"{"previous_response_id":"a\u0062c","model":"m"}"#.to_owned(), Some("abc")),
        (r#"{"previous_response_id":"a\u00e9","model":"m"}"#.to_owned(), None),
        (r#"{"previous":"a","previous_response_ids":"b","p":"c","model":"m"}"#.to_owned(), None),
        (r#"{"x":{"previous_response_id":"a"},"model":"m"}"#.to_owned(), None),
        (r#"{"x":"previous_response_id","y":"a","model":"m"}"#.to_owned(), None),
        (format!(r#"{{"previous_response_id":"{long}","model":"m"}}"#), None),
    ] {
        check(&body, Ok("m"));
        for step in 1..body.len() {
            let mut scanner = ModelScanner::json();
            for piece in body.as_bytes().chunks(step) {
                scanner.feed(piece).unwrap();
            }
            assert_eq!(scanner.continues(), expect, "{body} in pieces of {step}");
        }
    }
}

#[test]
fn depth_is_bounded() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let nested = |depth: usize| {
            let (open, close) = (open.repeat(depth - 1), close.repeat(depth - 1));
            format!(r#"{{"a":{open}null{close},"model":"m"}}"#)
        };
        assert_eq!(scan(ModelScanner::json(), [nested(DEPTH_LIMIT).as_bytes()]), Ok("m".to_owned()));
        let found = scan(ModelScanner::json(), [nested(DEPTH_LIMIT + 1).as_bytes()]);
        assert!(matches!(found, Err(ScanError::InvalidJson { why: "nested too deeply", .. })), "{found:?}");
    }
    // Every bracket must match the one that it closes, across the words of the stack too.
    let body = format!(r#"{{"a":{}{}}}"#, r#"[{"a":"#.repeat(50), "}]".repeat(49) + "]]");
    assert!(matches!(scan(ModelScanner::json(), [body.as_bytes()]), Err(ScanError::InvalidJson { .. })));
}

#[test]
fn the_model_is_known_at_its_closing_quote() {
    let mut scanner = ModelScanner::json();
    let mut feed = |chunk: &str| {
        scanner.feed(chunk.as_bytes()).expect("the body must be valid so far");
        scanner.model().map(str::to_owned)
    };
    assert_eq!(feed(r#"{"model":"m"#), None);
    assert_eq!(feed("\""), Some("m".to_owned()));
    assert_eq!(feed(r#","model":"#), Some("m".to_owned()));
    assert_eq!(feed(r#""m","messages":["#), Some("m".to_owned()));
}

/// The values of the top-level `model` keys as `serde_json` reads them, `None` for what is not a string.
#[derive(Debug)]
struct Models(Vec<Option<String>>);

/// A key as bytes, since halves of surrogate pairs are allowed in it.
struct Key(Vec<u8>);

impl<'de> Deserialize<'de> for Models {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Models;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Models, A::Error> {
                let mut models = Vec::new();
                while let Some(Key(key)) = map.next_key()? {
                    if !key.eq_ignore_ascii_case(b"model") {
                        map.next_value::<serde::de::IgnoredAny>()?;
                        continue;
                    }
                    let value = map.next_value::<&RawValue>()?.get();
                    let text = value.starts_with('"').then(|| serde_json::from_str(value));
                    models.push(text.transpose().map_err(serde::de::Error::custom)?);
                }
                Ok(Models(models))
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

/// The body without its byte order mark, and with `null` for every number, `NaN` and `Infinity`: there the scanner
/// takes more than `serde_json`.
fn strict(body: &[u8]) -> Vec<u8> {
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

/// Compares the scanner with `serde_json` on any bytes.
fn check_against_serde(body: &[u8], cuts: &[Index]) -> Result<(), TestCaseError> {
    let found = scan(ModelScanner::json(), [body]);
    prop_assert_eq!(scan(ModelScanner::json(), cut(body, cuts)), found.clone());
    prop_assert_eq!(scan(ModelScanner::json(), body.chunks(1)), found.clone());
    let strict = strict(body);
    match serde_json::from_slice::<Models>(&strict) {
        // `serde_json` takes them in keys that it hands out as bytes.
        Ok(_) if has_raw_control(&strict) => prop_assert!(found.is_err(), "{found:?} {}", body.escape_ascii()),
        Ok(Models(models)) => prop_assert_eq!(
            found,
            expected(models.into_iter().map(|model| model.ok_or(ScanError::ModelNotAString))),
            "{}",
            body.escape_ascii()
        ),
        Err(error) => prop_assert!(found.is_err(), "{error}: {found:?} {}", body.escape_ascii()),
    }
    Ok(())
}

fn space() -> impl Strategy<Value = &'static str> {
    select(vec!["", "", "", " ", "\n", "\r\n\t "])
}

/// A string literal of the text, every character of it in one of the ways in which it can be written.
fn literal(text: &str) -> BoxedStrategy<String> {
    let characters: Vec<char> = text.chars().collect();
    prop::collection::vec(0..4_u8, characters.len())
        .prop_map(move |ways| {
            let written = characters.iter().zip(ways).map(|(&character, way)| match (way, character) {
                (0, _) => {
                    let mut units = [0; 2];
                    character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect()
                }
                (1, '/') => "\\/".to_owned(),
                (1, '\t') => "\\t".to_owned(),
                (_, '"' | '\\') => format!("\\{character}"),
                (_, '\0'..='\x1f') => format!("\\u{:04X}", u32::from(character)),
                _ => character.to_string(),
            });
            format!("\"{}\"", written.collect::<String>())
        })
        .boxed()
}

fn string() -> impl Strategy<Value = String> {
    let pieces = select(vec![
        "model",
        "\"",
        "\\",
        "\":\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "/",
        "\t",
        "a",
        "\u{e9}",
        "\u{1f600}",
        "\0",
    ]);
    prop::collection::vec(pieces, 0..6).prop_flat_map(|pieces| literal(&pieces.concat()))
}

fn object(member: impl Strategy<Value = (String, String)>) -> impl Strategy<Value = String> {
    prop::collection::vec((space(), member, space()), 0..5).prop_map(|members| {
        let members = members
            .into_iter()
            .map(|(before, (key, value), after)| format!("{before}{key}{after}:{before}{value}{after}"));
        format!("{{{}}}", members.collect::<Vec<_>>().join(","))
    })
}

fn value() -> impl Strategy<Value = String> {
    let simple =
        select(vec!["null", "true", "false", "0", "-1.5e3", "17", "[]", "{}", "NaN", "-Infinity", "\"\\ud83d\""]);
    prop_oneof![simple.prop_map(str::to_owned), string()].prop_recursive(3, 16, 4, |inner| {
        let key = prop_oneof![literal("model"), string()];
        let array = prop::collection::vec((space(), inner.clone(), space()), 0..4).prop_map(|values| {
            let values = values.into_iter().map(|(before, value, after)| format!("{before}{value}{after}"));
            format!("[{}]", values.collect::<Vec<_>>().join(","))
        });
        prop_oneof![array, object((key, inner))]
    })
}

fn document() -> impl Strategy<Value = String> {
    let name = select(vec!["m", "m", "m", "m", "n", "\u{e9}/\u{1f600}", ""]).prop_flat_map(literal);
    let member = prop_oneof![
        6 => (literal("model"), name),
        1 => (literal("model"), value()),
        8 => (string(), value()),
        2 => (literal("Model"), value()),
    ];
    (select(vec!["", "", "\u{feff}"]), space(), object(member), space())
        .prop_map(|(mark, before, object, after)| format!("{mark}{before}{object}{after}"))
}

#[derive(Debug, Clone)]
enum Damage {
    Replace(u8),
    Insert(u8),
    Remove,
    Truncate,
    Repeat(Index),
}

fn damage() -> impl Strategy<Value = (Index, Damage)> {
    let byte = select(b"\"\"\\{}[],: \n0-.eENIut/'\0\xEF\xFF".to_vec());
    let damage = prop_oneof![
        4 => byte.clone().prop_map(Damage::Replace),
        4 => byte.prop_map(Damage::Insert),
        4 => Just(Damage::Remove),
        1 => Just(Damage::Truncate),
        2 => any::<Index>().prop_map(Damage::Repeat),
    ];
    (any::<Index>(), damage)
}

proptest! {
    #[test]
    fn agrees_with_serde_on_documents(
        document in document(),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        check_against_serde(document.as_bytes(), &cuts)?;
    }

    #[test]
    fn agrees_with_serde_on_damaged_documents(
        document in document(),
        damages in prop::collection::vec(damage(), 1..4),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let mut body = document.into_bytes();
        for (at, damage) in damages {
            let at = at.index(body.len() + 1);
            match damage {
                Damage::Insert(byte) => body.insert(at, byte),
                Damage::Truncate => body.truncate(at),
                Damage::Repeat(from) => {
                    let piece = body[from.index(at + 1)..at].to_vec();
                    body.splice(at..at, piece);
                }
                Damage::Replace(_) | Damage::Remove if at == body.len() => {}
                Damage::Replace(byte) => body[at] = byte,
                Damage::Remove => {
                    body.remove(at);
                }
            }
        }
        check_against_serde(&body, &cuts)?;
    }

    #[test]
    fn agrees_with_serde_on_anything(body in prop::collection::vec(select(b"\"\"\\{}[],: model1u0".to_vec()), 0..60)) {
        check_against_serde(&[b"{\"model\":\"m\"".as_slice(), &body].concat(), &[])?;
    }
}
