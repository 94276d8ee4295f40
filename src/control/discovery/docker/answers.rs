//! What an engine's answers say, field by field. Pure.
//!
//! Every field is optional and may have any type, because engines add words and change types with their releases: a field
//! that cannot be read is no verdict, and makes nothing else unreadable. Only the fields that are used are kept; the rest
//! of an answer, the container's environment above all, is dropped here.

use std::collections::HashMap;

use serde_json::Value;

use crate::base::foreign;

/// Longest name of a container or image that is told.
const NAME_CHARS_MAX: usize = 255;

/// An answer that is not JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotJson;

/// The JSON value of an answer. Bytes that are no UTF-8 are replaced, because they may stand in a field that is not used.
pub(super) fn json(body: &[u8]) -> Result<Value, NotJson> {
    serde_json::from_str(&String::from_utf8_lossy(body)).map_err(|_| NotJson)
}

/// A text that is not empty.
pub(super) fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

/// A whole number, also one that is written as a text; the nearest one for what is larger.
pub(super) fn number(value: &Value) -> Option<i64> {
    match value {
        Value::String(text) => text.trim().parse().ok(),
        // A cast of floating point to whole numbers gives the nearest.
        value => value.as_i64().or_else(|| value.as_f64().map(|number| number as i64)),
    }
}

/// Texts by name; values of other types are left out.
pub(super) fn texts(value: &Value) -> HashMap<String, String> {
    let pairs = value.as_object().into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

/// Whether these are an engine's words for a container that does not exist: `No such container: X` (Docker), `no container
/// with name or ID "X" found: no such container` (Podman). `message` is that of the answer's JSON, else the whole answer:
/// the page of a proxy in between, or its JSON, is none of the engine's words whatever it says.
pub(super) fn says_no_such_container(message: &str) -> bool {
    let is_text = !message.trim_start().starts_with(['<', '{', '[', '"']);
    is_text && message.to_ascii_lowercase().contains("no such container")
}

/// What the list says of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) image: String,
    pub(super) labels: HashMap<String, String>,
    /// The engine's word for its state, if there is one.
    pub(super) state: Option<String>,
}

/// The list of containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) containers: Vec<Summary>,
    /// Entries without a readable id: whatever is missing from the list may be one of them.
    pub(super) unreadable: usize,
}

impl Listed {
    /// Reads the list; `None` if the answer is no list, or one of which nothing can be read.
    pub(super) fn read(answer: &Value) -> Option<Listed> {
        let entries = answer.as_array()?;
        let containers: Vec<Summary> = entries.iter().filter_map(Summary::read).collect();
        let unreadable = entries.len() - containers.len();
        (!containers.is_empty() || unreadable == 0).then_some(Listed { containers, unreadable })
    }
}

impl Summary {
    fn read(entry: &Value) -> Option<Summary> {
        let id = text(&entry["Id"])?;
        let names = entry["Names"].as_array().into_iter().flatten().filter_map(text);
        // Links of other containers are names with a slash in them.
        let name = names.map(|name| name.trim_start_matches('/')).find(|name| !name.is_empty() && !name.contains('/'));
        Some(Summary {
            id: id.to_owned(),
            name: name.map_or_else(|| short(id), shown),
            image: shown(text(&entry["Image"]).unwrap_or_default()),
            labels: texts(&entry["Labels"]),
            state: text(&entry["State"]).map(str::to_owned),
        })
    }
}

/// A name that an engine tells: it may be somebody else's engine.
pub(super) fn shown(name: &str) -> String {
    foreign::name(name, NAME_CHARS_MAX)
}

/// An id as people know it.
pub(super) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Whether an answer to `/version` is Podman's.
pub(super) fn is_version_of_podman(answer: &Value) -> bool {
    let components = answer["Components"].as_array().into_iter().flatten();
    components.filter_map(|component| text(&component["Name"])).any(|name| name.contains("Podman"))
}

/// The API version that an engine names as the one to use, when it refuses another: `client version 1.53 is too new.
/// Maximum supported API version is 1.41`, `client version 1.24 is too old. Minimum supported API version is 1.44`.
pub(super) fn version_named(message: &str) -> Option<(u16, u16)> {
    let (_, named) = message.rsplit_once("API version is ")?;
    let version: String = named.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let (major, minor) = version.trim_end_matches('.').split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Longest line of the event stream that is read; an event carries the labels of its container.
pub(super) const LINE_BYTES_MAX: usize = 1 << 20;

/// Takes the event stream apart: one JSON value per line, as every engine sends it; also several on a line, one over
/// several lines, and one whose line has not ended yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// A value that did not end with its line.
    begun: Vec<u8>,
    /// The rest of a line that was too long is passed over.
    skipping: bool,
}

/// What a piece of the event stream held.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    Value(Value),
    /// It cannot be read; the time of its event, in nanoseconds since 1970, if that can.
    Unreadable(Option<i64>),
}

impl Lines {
    /// Takes in the next bytes and gives what has become complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut read = Vec::new();
        let mut rest = bytes;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            self.extend(&rest[..end], &mut read);
            rest = &rest[end + 1..];
            if !std::mem::take(&mut self.skipping) {
                let line = std::mem::take(&mut self.buffer);
                self.take_line(line, &mut read);
            }
        }
        self.extend(rest, &mut read);
        // An engine need not end its lines: what is complete is taken at once.
        if self.begun.is_empty()
            && rest.ends_with(b"}")
            && let Ok(values) = values(&self.buffer)
        {
            self.buffer.clear();
            read.extend(values.into_iter().map(Line::Value));
        }
        read
    }

    fn extend(&mut self, bytes: &[u8], read: &mut Vec<Line>) {
        if self.skipping {
            return;
        }
        if self.buffer.len() + bytes.len() > LINE_BYTES_MAX {
            read.push(Line::Unreadable(event_time(&self.buffer)));
            self.buffer.clear();
            self.skipping = true;
            return;
        }
        self.buffer.extend_from_slice(bytes);
    }

    fn take_line(&mut self, line: Vec<u8>, read: &mut Vec<Line>) {
        if line.trim_ascii().is_empty() {
            return;
        }
        match values(&line) {
            Ok(values) => {
                self.give_up_begun(read);
                read.extend(values.into_iter().map(Line::Value));
            }
            Err(_) if !self.begun.is_empty() => {
                let mut joined = std::mem::take(&mut self.begun);
                joined.push(b'\n');
                joined.extend_from_slice(&line);
                match values(&joined) {
                    Ok(values) => read.extend(values.into_iter().map(Line::Value)),
                    Err(Ended::Early) if joined.len() <= LINE_BYTES_MAX => self.begun = joined,
                    Err(_) => read.push(Line::Unreadable(event_time(&joined))),
                }
            }
            Err(Ended::Early) => self.begun = line,
            Err(Ended::Broken) => read.push(Line::Unreadable(event_time(&line))),
        }
    }

    fn give_up_begun(&mut self, read: &mut Vec<Line>) {
        if !self.begun.is_empty() {
            read.push(Line::Unreadable(event_time(&std::mem::take(&mut self.begun))));
        }
    }
}

/// Why some bytes are no values.
enum Ended {
    /// More may come.
    Early,
    Broken,
}

fn values(bytes: &[u8]) -> Result<Vec<Value>, Ended> {
    let text = String::from_utf8_lossy(bytes);
    let values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    values.collect::<Result<_, _>>().map_err(|error| if error.is_eof() { Ended::Early } else { Ended::Broken })
}

/// The time in the text of an event that cannot be read otherwise.
fn event_time(bytes: &[u8]) -> Option<i64> {
    let key = b"\"timeNano\":";
    let at = memchr::memmem::find(bytes, key)? + key.len();
    let digits: Vec<u8> =
        bytes[at..].iter().copied().skip_while(|b| *b == b' ').take_while(u8::is_ascii_digit).collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_entry_that_cannot_be_read_leaves_the_rest_of_the_list() {
        let good = json!({ "Id": "c1", "Names": ["/other/alias", "/llm"], "Image": "vllm", "State": "running",
                           "Labels": { "inference.enable": "true", "odd": 7 } });
        let read = |list: Value| Listed::read(&list);
        let listed = read(json!([good, { "Id": 7 }, "text", null, { "Names": ["/x"] }])).unwrap();
        assert_eq!((listed.containers.len(), listed.unreadable), (1, 4));
        let summary = &listed.containers[0];
        assert_eq!((summary.id.as_str(), summary.name.as_str(), summary.image.as_str()), ("c1", "llm", "vllm"));
        assert_eq!(summary.labels.len(), 1, "{:?}", summary.labels);
        for (field, values) in [
            ("State", [json!("hibernating"), json!(7), json!(null), json!(["running"])]),
            ("Names", [json!(null), json!("llm"), json!([7]), json!({})]),
            ("Labels", [json!(null), json!([]), json!("a=b"), json!(1)]),
            ("Ports", [json!([{ "Type": "quic", "PrivatePort": "no" }]), json!(7), json!({}), json!(null)]),
            ("Health", [json!({ "Status": "reset" }), json!("reset"), json!([]), json!(0)]),
            ("Image", [json!(null), json!(1), json!([]), json!({})]),
        ] {
            for value in values {
                let mut entry = good.clone();
                entry[field] = value.clone();
                let listed = read(json!([entry])).unwrap_or_else(|| panic!("{field}: {value}"));
                assert_eq!((listed.containers[0].id.as_str(), listed.unreadable), ("c1", 0), "{field}: {value}");
            }
        }
        assert_eq!(read(json!([])), Some(Listed::default()));
        for no_list in [json!({ "message": "weird" }), json!(null), json!("x"), json!([{ "Id": 7 }]), json!([null])] {
            assert_eq!(read(no_list.clone()), None, "{no_list}");
        }
        assert_eq!(read(json!([{ "Id": "0123456789abcdef" }])).unwrap().containers[0].name, "0123456789ab");
    }

    #[test]
    fn only_an_engine_says_that_there_is_no_such_container() {
        for message in [
            "No such container: abc",
            "no such container",
            r#"no container with name or ID "abc" found: no such container"#,
            "no container with ID abc found in database: no such container",
        ] {
            assert!(says_no_such_container(message), "{message}");
        }
        for message in [
            "",
            "404 page not found",
            "page not found",
            "<html><body>404: no such container</body></html>",
            r#"{"error":"No such container: abc"}"#,
            r#" ["No such container"]"#,
            r#""No such container""#,
            "No such image: abc",
        ] {
            assert!(!says_no_such_container(message), "{message}");
        }
    }

    #[test]
    fn a_version_is_read_from_the_words_in_which_an_engine_names_it() {
        for (message, version) in [
            ("client version 1.53 is too new. Maximum supported API version is 1.41", Some((1, 41))),
            (
                "client version 1.24 is too old. Minimum supported API version is 1.44, please upgrade your client to \
                 a newer version",
                Some((1, 44)),
            ),
            ("client version 1.24 is too old. Minimum supported API version is 1.44.", Some((1, 44))),
            ("Maximum supported API version is soon", None),
            ("forbidden", None),
            ("", None),
        ] {
            assert_eq!(version_named(message), version, "{message}");
        }
        assert!(is_version_of_podman(&json!({ "Components": [{ "Name": "Podman Engine" }] })));
        assert!(!is_version_of_podman(&json!({ "Components": [{ "Name": "Engine" }, 7, null] })));
        assert!(!is_version_of_podman(&json!({ "Components": "Podman" })));
    }

    fn lines(pieces: &[&str]) -> Vec<String> {
        let mut lines = Lines::default();
        let read = pieces.iter().flat_map(|piece| lines.push(piece.as_bytes()));
        read.map(|line| match line {
            Line::Value(value) => value.to_string(),
            Line::Unreadable(time) => format!("? {time:?}"),
        })
        .collect()
    }

    #[test]
    fn events_are_taken_apart_however_they_are_cut() {
        for (pieces, expect) in [
            (&["{\"a\":1}\n{\"b\":2}\n"][..], &[r#"{"a":1}"#, r#"{"b":2}"#][..]),
            (&["{\"a\":", "1}", "\n", "\n", "{\"b\":2}\n"], &[r#"{"a":1}"#, r#"{"b":2}"#]),
            (&["{\"a\":1}{\"b\":2}", "{\"c\":3}\n"], &[r#"{"a":1}"#, r#"{"b":2}"#, r#"{"c":3}"#]),
            (&["{\r\n\"a\":\n1}\n{\"b\":2}\r\n"], &[r#"{"a":1}"#, r#"{"b":2}"#]),
            (&["<html>\n{\"b\":2}\n"], &["? None", r#"{"b":2}"#]),
            (&["{\"a\":\n{\"b\":2}\n"], &["? None", r#"{"b":2}"#]),
            (&["{\"timeNano\":77,\"a\":bad}\n{\"b\":2}\n"], &["? Some(77)", r#"{"b":2}"#]),
            (&["7\n[]\n"], &["7", "[]"]),
            (&["{\"a\":\"\u{fffd}"], &[]),
        ] {
            assert_eq!(lines(pieces), expect, "{pieces:?}");
        }
        let mut broken = Lines::default();
        assert_eq!(broken.push(b"{\"a\":\"\xff\"}\n"), [Line::Value(json!({ "a": "\u{fffd}" }))]);
    }

    #[test]
    fn a_line_that_never_ends_is_passed_over_in_bounded_memory() {
        let mut lines = Lines::default();
        let mut unreadable = 0;
        for _ in 0..64 {
            unreadable += lines.push(&[b'x'; 100_000]).len();
            assert!(lines.buffer.len() + lines.begun.len() <= 2 * LINE_BYTES_MAX);
        }
        assert_eq!(unreadable, 1, "it is counted once");
        assert_eq!(lines.push(b"\n{\"b\":2}\n"), [Line::Value(json!({ "b": 2 }))]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

        #[test]
        fn the_same_events_come_out_wherever_the_bytes_are_cut(
            events in proptest::collection::vec("[a-z{}\"\\\\]{0,8}", 1..6),
            cut in 1usize..16,
        ) {
            let events: Vec<Value> = events.into_iter().map(|text| json!({ "text": text })).collect();
            let stream: String = events.iter().map(|event| format!("{event}\n")).collect();
            let mut lines = Lines::default();
            let read: Vec<Line> = stream.as_bytes().chunks(cut).flat_map(|piece| lines.push(piece)).collect();
            prop_assert_eq!(read, events.into_iter().map(Line::Value).collect::<Vec<_>>());
        }
    }
}
