use proptest::{prelude::*, sample::Index};
use serde_json::{Value, json, value::RawValue};

use super::super::{
    ModelScanner,
    tests::{cut, scan},
};
use super::*;

const SEED: u64 = 7;

/// Marks the prompt of a body that arrives in these pieces.
fn marked<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Prompt {
    let mut scanner = ModelScanner::json();
    scanner.mark_prompt(PromptSeed::new(SEED));
    for piece in pieces {
        scanner.feed(piece).unwrap();
    }
    let model = scanner.model().unwrap_or("m").to_owned();
    scanner.take_prompt(&model).unwrap()
}

fn of(body: &str) -> Prompt {
    marked([body.as_bytes()])
}

fn marks(prompt: &Prompt) -> Vec<Mark> {
    prompt.marks().collect()
}

/// Everything that a prompt tells.
fn told(prompt: &Prompt) -> (Vec<Mark>, Option<u64>, Option<u64>, u32) {
    (marks(prompt), prompt.session(), prompt.user(), prompt.bytes())
}

/// How many bytes two prompts have in common, by their marks.
fn common(one: &Prompt, other: &Prompt) -> u32 {
    let others = marks(other);
    marks(one).into_iter().rev().find(|mark| others.contains(mark)).map_or(0, |mark| mark.bytes)
}

/// Every turn repeats the turn before and adds an answer and a question of about so many bytes.
fn turns(n: usize, bytes: usize) -> Vec<Value> {
    let text = |role: &str, i: usize| json!({"role": role, "content": format!("{role} {i} ").repeat(bytes / 8 + 1)});
    let mut messages = vec![text("system", 0)];
    for turn in 0..n {
        messages.push(text("user", turn));
        messages.push(text("assistant", turn));
    }
    messages.pop();
    messages
}

/// The parts of a body as `serde_json` sees them, with the places behind elements that are objects or arrays.
fn parts(body: &str) -> Vec<(Part, String, Vec<usize>)> {
    let map: Vec<(String, Box<RawValue>)> = {
        struct Object;
        impl<'de> serde::de::Visitor<'de> for Object {
            type Value = Vec<(String, Box<RawValue>)>;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    all.push(entry);
                }
                Ok(all)
            }
        }
        serde::Deserializer::deserialize_map(&mut serde_json::Deserializer::from_str(body), Object).unwrap()
    };
    let known = map.into_iter().filter_map(|(key, value)| Some((Part::of(format!("\"{key}\"").as_bytes())?, value)));
    known
        .map(|(part, value)| {
            let text = value.get();
            let elements: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
            let ends = elements.iter().filter(|element| element.get().starts_with(['{', '[']));
            let ends = ends.map(|e| e.get().as_ptr() as usize - text.as_ptr() as usize + e.get().len()).collect();
            (part, text.to_owned(), ends)
        })
        .collect()
}

/// What a whole body's marks must be, each hashed from its beginning. For bodies that name each part once, and whose
/// marks are all kept.
fn reference(body: &str, model: &str) -> Vec<Mark> {
    let seed = PromptSeed::new(SEED);
    let parts = parts(body);
    let find = |wanted: Part| parts.iter().find(|(part, ..)| *part == wanted);
    let mut before = (seed.hash(model.as_bytes()), 0);
    if let Some((_, salt, _)) = find(Part::Salt) {
        before.0 = seed.join(before.0, seed.hash(salt.as_bytes()));
    }
    let mut expected = Vec::new();
    for part in [Part::Tools, Part::System, Part::Main] {
        let Some((_, text, ends)) = find(part) else { continue };
        let mut places: Vec<usize> = ends.clone();
        let mut fixed = STEP_BYTES_MIN;
        while fixed as usize <= text.len() {
            places.push(fixed as usize);
            fixed = next_fixed(fixed);
        }
        places.sort_unstable();
        places.dedup();
        let start = seed.join(before.0, part as u64);
        expected.extend(places.iter().map(|&place| Mark {
            key: seed.join(start, seed.hash(&text.as_bytes()[..place])),
            bytes: before.1 + place as u32,
        }));
        before = (seed.join(start, seed.hash(text.as_bytes())), before.1 + text.len() as u32);
    }
    expected
}

#[test]
fn a_turn_repeats_the_marks_of_the_turn_before() {
    let with = |key: &str, n: usize, bytes: usize| {
        json!({"model": "m", key: turns(n, bytes), "stream": true, "user": "u"}).to_string()
    };
    for key in ["messages", "input"] {
        for bytes in [10, 100, 5_000] {
            for turn in 1..12 {
                let (now, next) = (of(&with(key, turn, bytes)), of(&with(key, turn + 1, bytes)));
                // All but the bracket behind its last message.
                assert_eq!(common(&next, &now), now.bytes() - 1, "{key} {bytes} {turn}");
                assert!(marks(&next).len() > marks(&now).len() || marks(&now).len() == 256);
            }
        }
    }
}

#[test]
fn a_prompt_that_is_one_text_repeats_nearly_all() {
    for (len, most_lost) in [(70, 16), (1_000, 64), (10_000, 512), (300_000, 16 * 1024)] {
        let text: String = (0..len as u64).map(|i| char::from(b'a' + (i * i / 7 % 26) as u8)).collect();
        let now = of(&json!({"prompt": text, "model": "m"}).to_string());
        let next = of(&json!({"prompt": text + " and on", "model": "m"}).to_string());
        let same = common(&next, &now);
        assert!(same <= len as u32 + 1 && same + most_lost > len as u32, "{same} of {len}");
    }
}

#[test]
fn the_order_of_keys_does_not_matter() {
    let (tools, system, messages) = (json!([{"name": "t"}]), json!("You are. ".repeat(20)), json!(turns(2, 50)));
    let write = |order: &[usize]| {
        let all = [("tools", &tools), ("system", &system), ("messages", &messages), ("model", &json!("m"))];
        let members: Vec<String> = order.iter().map(|&i| format!("\"{}\": {}", all[i].0, all[i].1)).collect();
        format!("{{{}}}", members.join(", "))
    };
    let expected = told(&of(&write(&[3, 0, 1, 2])));
    for order in [[2, 3, 0, 1], [1, 0, 2, 3], [2, 1, 3, 0]] {
        assert_eq!(told(&of(&write(&order))), expected, "{order:?}");
    }
}

#[test]
fn what_stands_in_front_for_engines_changes_everything_behind() {
    let body = |model: &str, salt: &str, tools: &str, system: &str| {
        json!({"messages": turns(3, 100), "model": model, "cache_salt": salt, "tools": [{"name": tools}],
            "system": system})
        .to_string()
    };
    let base = of(&body("m", "s", "t", "You are."));
    let tools_len = r#"[{"name":"t"}"#.len() as u32;
    for (other, same) in [
        (body("m", "s", "t", "You are."), base.bytes() - 1),
        (body("n", "s", "t", "You are."), 0),
        (body("m", "x", "t", "You are."), 0),
        (body("m", "s", "x", "You are."), 0),
        (body("m", "s", "t", "You were."), tools_len),
    ] {
        assert_eq!(common(&of(&other), &base), same, "{other}");
    }
    // Texts do not move from one part to another.
    let (one, other) = (of(r#"{"system":"abc","messages":[{}]}"#), of(r#"{"tools":"abc","messages":[{}]}"#));
    assert_eq!(common(&one, &other), 0);
}

#[test]
fn names_of_conversations_are_found() {
    let named = |body: &str| {
        let prompt = of(body);
        (prompt.session().is_some(), prompt.user().is_some())
    };
    for (body, expected) in [
        (r#"{"messages":[]}"#, (false, false)),
        (r#"{"prompt_cache_key":"k","user":"u"}"#, (true, true)),
        (r#"{"session_id":"k"}"#, (true, false)),
        (r#"{"prompt_cache_key":null,"user":5}"#, (false, false)),
        (r#"{"prompt_cache_key":"","user":["u"]}"#, (false, false)),
        (r#"{"x":{"user":"u"},"y":"user"}"#, (false, false)),
        (r#"{"session_id":"a","session_id":null}"#, (true, false)),
    ] {
        assert_eq!(named(body), expected, "{body}");
    }
    let of_model =
        |model: &str, key: &str| of(&json!({"model": model, "prompt_cache_key": key, "user": key}).to_string());
    assert_eq!(of_model("m", "k").session(), of_model("m", "k").session());
    assert_ne!(of_model("m", "k").session(), of_model("n", "k").session());
    assert_ne!(of_model("m", "k").session(), of_model("m", "l").session());
    assert_ne!(of_model("m", "k").session(), of_model("m", "k").user());
    let mut headed = of_model("m", "k");
    headed.set_session(b"");
    assert_eq!(headed.session(), of_model("m", "k").session());
    headed.set_session(b"s");
    let (mut same, mut other) = (of_model("m", "x"), of_model("n", "k"));
    same.set_session(b"s");
    other.set_session(b"s");
    assert_eq!(headed.session(), same.session());
    assert_ne!(headed.session(), other.session());
}

#[test]
fn a_prompt_taken_early_has_the_marks_of_its_beginning() {
    let ordered = format!(
        r#"{{"model":"m","tools":[{{"name":"t"}}],"messages":{},"system":"You are."}}"#,
        Value::from(turns(5, 300))
    );
    // As long as `system` has not come, the marks are those of a body that has none.
    let all = marks(&of(&ordered.replace(r#","system":"You are.""#, "")));
    for end in [60, 500, 1_500, ordered.len() - 5] {
        let early = marks(&marked([&ordered.as_bytes()[..end]]));
        assert!(!early.is_empty() && all.starts_with(&early), "cut at {end}");
    }
    // A part that is not whole is none.
    assert_eq!(marks(&marked([&ordered.as_bytes()[..34]])), []);
    let mut scanner = ModelScanner::json();
    scanner.mark_prompt(PromptSeed::new(SEED));
    scanner.feed(&ordered.as_bytes()[..100]).unwrap();
    assert!(scanner.marks_prompt() && scanner.take_prompt("m").is_some());
    scanner.feed(&ordered.as_bytes()[100..]).unwrap();
    assert!(!scanner.marks_prompt() && scanner.take_prompt("m").is_none());
    scanner.finish().unwrap();
}

#[test]
fn marks_are_bounded() {
    let many = json!({"messages": vec![json!({"a": 1}); 5_000], "tools": vec![json!({}); 500],
        "system": vec![json!({}); 500]});
    let prompt = of(&many.to_string());
    assert_eq!(prompt.marks().count(), 256 + 64 + 32);
    let places: Vec<u32> = prompt.marks().map(|mark| mark.bytes).collect();
    assert!(places.is_sorted(), "{places:?}");
    // The end is among them.
    assert_eq!(places.last(), Some(&(prompt.bytes() - 1)));

    let long = of(&json!({"prompt": "x".repeat(3 << 20)}).to_string());
    assert_eq!(long.bytes(), PROMPT_PART_BYTES_MAX);
    assert_eq!(marks(&long).last().map(|mark| mark.bytes), Some(PROMPT_PART_BYTES_MAX));
    let tokens = of(&json!({"prompt": (0..50_000).collect::<Vec<_>>()}).to_string());
    assert!((150..=256).contains(&tokens.marks().count()), "numbers are no turns");
    assert!(std::mem::size_of::<PromptTap>() <= 5 * 1024, "{}", std::mem::size_of::<PromptTap>());
}

#[test]
fn seeds_differ() {
    let body = json!({"messages": turns(1, 100)}).to_string();
    let keyed = |seed: u64| {
        let mut scanner = ModelScanner::json();
        scanner.mark_prompt(PromptSeed::new(seed));
        scanner.feed(body.as_bytes()).unwrap();
        scanner.take_prompt("m").unwrap().marks().map(|mark| mark.key).collect::<Vec<_>>()
    };
    assert_eq!(keyed(1), keyed(1));
    assert!(keyed(1).iter().all(|key| !keyed(2).contains(key)));
}

#[test]
fn hashes_of_like_texts_differ() {
    let seed = PromptSeed::new(SEED);
    let mut seen = std::collections::HashSet::new();
    for len in 0..70 {
        for at in 0..=len {
            for byte in [0_u8, 1, b'a'] {
                let mut text = vec![b'x'; len];
                if at < len {
                    text[at] = byte;
                }
                if at < len || byte == 0 {
                    assert!(seen.insert(seed.hash(&text)), "{len} {at} {byte}");
                }
            }
        }
    }
}

#[test]
fn forms_have_no_prompt_and_packed_bodies_have() {
    use std::io::Write as _;
    let mut form = ModelScanner::for_content_type(Some(b"multipart/form-data; boundary=B")).unwrap();
    form.mark_prompt(PromptSeed::new(SEED));
    assert!(!form.marks_prompt() && form.take_prompt("m").is_none());

    let body = json!({"messages": turns(3, 100), "model": "m"}).to_string();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(body.as_bytes()).unwrap();
    let packed = encoder.finish().unwrap();
    let mut scanner = ModelScanner::for_body(None, Some(b"gzip")).unwrap();
    scanner.mark_prompt(PromptSeed::new(SEED));
    for piece in packed.chunks(7) {
        scanner.feed(piece).unwrap();
    }
    scanner.finish().unwrap();
    assert!(scanner.marks_prompt());
    assert_eq!(told(&scanner.take_prompt("m").unwrap()), told(&of(&body)));
}

/// Values as they may be in any place, with their white space.
fn value() -> impl Strategy<Value = String> {
    let text = "[a-z{}\\[\\],: ]{0,200}".prop_map(|text| json!(text).to_string());
    let simple = prop::sample::select(vec!["null", "17", "-1.5e3", "[]", "{}", "\"\\\"\\u00e9\\\\\"", "true"]);
    prop_oneof![text, simple.prop_map(str::to_owned)].prop_recursive(3, 24, 6, |inner| {
        let array = prop::collection::vec((inner.clone(), any::<bool>()), 0..6).prop_map(|values| {
            let values = values.into_iter().map(|(value, spaced)| if spaced { format!(" {value}\n") } else { value });
            format!("[{}]", values.collect::<Vec<_>>().join(","))
        });
        let key = prop::sample::select(vec!["messages", "model", "user", "content"]);
        let object = prop::collection::vec((key, inner), 0..4).prop_map(|members| {
            let members = members.into_iter().map(|(key, value)| format!("\"{key}\":{value}"));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        });
        prop_oneof![array, object]
    })
}

/// A body that has each of the keys once, in any order.
fn body() -> impl Strategy<Value = String> {
    let keys = vec!["messages", "system", "tools", "cache_salt", "user", "prompt_cache_key", "stream", "metadata"];
    let len = keys.len();
    let members = (Just(keys), 0..=len).prop_flat_map(|(keys, n)| {
        let keys = prop::sample::subsequence(keys, n).prop_shuffle();
        (keys, prop::collection::vec((value(), any::<bool>()), n))
    });
    (members, any::<Index>()).prop_map(|((keys, values), at)| {
        let mut members: Vec<String> = keys
            .iter()
            .zip(values)
            .map(
                |(key, (value, spaced))| {
                    if spaced { format!("\n \"{key}\" : {value} ") } else { format!("\"{key}\":{value}") }
                },
            )
            .collect();
        members.insert(at.index(members.len() + 1), r#""model":"m""#.to_owned());
        format!("{{{}}}", members.join(","))
    })
}

proptest! {
    #[test]
    fn marks_are_those_of_the_reference_under_every_cut(
        body in body(),
        cuts in prop::collection::vec(any::<Index>(), 0..8),
    ) {
        let whole = of(&body);
        let expected = reference(&body, "m");
        // Of many marks some are left out.
        let kept = marks(&whole);
        if expected.len() < 32 {
            prop_assert_eq!(&kept, &expected, "{}", body);
        } else {
            prop_assert!(kept.iter().all(|mark| expected.contains(mark)), "{}", body);
        }
        prop_assert_eq!(told(&marked(cut(body.as_bytes(), &cuts))), told(&whole), "{}", body);
        prop_assert_eq!(told(&marked(body.as_bytes().chunks(1))), told(&whole), "{}", body);
    }

    #[test]
    fn marking_changes_nothing_of_what_is_found(
        mut body in body().prop_map(String::into_bytes),
        damages in prop::collection::vec((any::<Index>(), prop::sample::select(b"\"\\{}[],:m 0x\xFF".to_vec())), 0..3),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        for (at, byte) in damages {
            let at = at.index(body.len());
            body[at] = byte;
        }
        let marking = || {
            let mut scanner = ModelScanner::json();
            scanner.mark_prompt(PromptSeed::new(SEED));
            scanner
        };
        let plain = scan(ModelScanner::json(), [&body[..]]);
        prop_assert_eq!(scan(marking(), [&body[..]]), plain.clone());
        prop_assert_eq!(scan(marking(), cut(&body, &cuts)), plain.clone());
        prop_assert_eq!(scan(marking(), body.chunks(1)), plain);
    }
}
