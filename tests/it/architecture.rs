//! Rules about the code itself: which room may use which, and what pure code must not contain.

use std::{fs, path::Path};

/// Files in which decisions are made: state, input and time come in as arguments.
const PURE: &[&str] = &[
    "data/affinity/holders.rs",
    "data/affinity/mod.rs",
    "data/affinity/shares.rs",
    "data/balance/policy/mod.rs",
    "pool/breaker/mod.rs",
    "pool/budget.rs",
    "control/discovery/docker/event.rs",
    "control/discovery/docker/host.rs",
    "control/discovery/docker/inspect/mod.rs",
    "control/discovery/network/mod.rs",
    "control/discovery/network/advice.rs",
    "control/discovery/network/elsewhere.rs",
    "control/discovery/network/standpoint.rs",
    "control/discovery/signal.rs",
    "control/discovery/vantage.rs",
    "base/foreign.rs",
    "control/labels/mod.rs",
    "pool/latency.rs",
    "control/lifecycle/mod.rs",
    "control/lifecycle/unfit.rs",
    "control/probe/error.rs",
    "control/probe/listing.rs",
    "control/probe/object.rs",
    "pool/load/mod.rs",
    "wire/http1/body.rs",
    "wire/http1/head/mod.rs",
    "wire/http1/head/host.rs",
    "wire/http1/head/known.rs",
    "wire/http1/own_address/mod.rs",
    "data/proxy/failure.rs",
    "data/proxy/headers/mod.rs",
    "data/proxy/paths/mod.rs",
    "control/registry/pools/mod.rs",
    "control/registry/rounds.rs",
    "control/registry/source.rs",
    "control/registry/verdict.rs",
    "data/replay/mod.rs",
    "wire/scan/json/mod.rs",
    "wire/scan/json/text.rs",
    "wire/scan/mod.rs",
    "wire/scan/multipart/mod.rs",
    "wire/scan/prompt/mod.rs",
    "wire/scan/usage/mod.rs",
    "wire/scan/usage/findings.rs",
    "wire/scan/usage/object.rs",
    "wire/scan/usage/places.rs",
    "wire/scan/usage/stencil.rs",
    "observe/status/events.rs",
    "observe/status/text.rs",
    "pool/tally.rs",
    "telemetry/log/lines.rs",
    "telemetry/log/repeats.rs",
    "telemetry/operation.rs",
    "telemetry/otlp/w3c.rs",
    "telemetry/routes.rs",
];

fn sources() -> Vec<(String, String)> {
    fn collect(folder: &Path, root: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // Tests may reach anywhere.
            if path.file_stem().is_some_and(|stem| stem == "tests") {
                continue;
            }
            if path.is_dir() {
                collect(&path, root, found);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
                let code = code.split("#[cfg(test)]\npub(crate) mod tests {").next().unwrap_or_default();
                let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                found.push((name, code.join("\n")));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    collect(&root, &root, &mut found);
    found.sort();
    found
}

/// The rows of rooms, from the top. A room is the first word of a module's path; it uses only rooms below its own row.
struct Layers(Vec<Vec<String>>);

impl Layers {
    /// As the crate documentation draws them, which is the only place that says it.
    fn drawn() -> Layers {
        let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
        let lines: Vec<&str> = page.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim).collect();
        let after = |from: usize, what: &str| {
            let at = lines[from..].iter().position(|line| *line == what);
            from + 1 + at.unwrap_or_else(|| panic!("src/lib.rs has no {what:?} where its layers should be"))
        };
        let begin = after(after(0, "# Layers"), "```text");
        let rows = &lines[begin..after(begin, "```") - 1];
        Layers(rows.iter().map(|row| row.split('|').map(|room| room.trim().to_owned()).collect()).collect())
    }

    fn rooms(&self) -> impl Iterator<Item = &String> {
        self.0.iter().flatten()
    }

    fn row(&self, room: &str) -> Option<usize> {
        self.0.iter().position(|row| row.iter().any(|name| name == room))
    }

    /// What this code uses against the layers.
    fn violations(&self, file: &str, code: &str) -> Vec<String> {
        let module = module(file);
        let room = module.first().map_or("main", String::as_str);
        let own = self.row(room).unwrap_or_else(|| panic!("{room} is in no row of the layers in src/lib.rs"));
        let mut found = Vec::new();
        for path in paths(file, &module, code) {
            let wrong = match &path[..] {
                // The root itself, by another name or as a whole, would hide what is used.
                [] => true,
                [first, ..] if first == "*" => true,
                [first, ..] => first != room && self.row(first).is_some_and(|theirs| theirs <= own),
            };
            if wrong {
                found.push(format!("{file} uses crate::{}", path.join("::")));
            }
        }
        found
    }
}

/// The words of the module's path that a file holds; none for the root of a crate.
fn module(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    if matches!(path, "main" | "lib") { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// Every path in this code that begins at the root of the crate or climbs to it, from there on, nested groups included.
fn paths(file: &str, module: &[String], code: &str) -> Vec<Vec<String>> {
    let words = words(code);
    let mut found = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let begins = match *word {
            "crate" | "super" | "self" => true,
            // The binary names the library by its name.
            "inference_proxy" => file == "main.rs",
            _ => false,
        };
        let goes_on = matches!(words.get(at + 1), Some(&("::" | "as")));
        if begins && goes_on && (at == 0 || words[at - 1] != "::") && !is_in_group(&words[..at]) {
            path(&words, at, &mut Vec::new(), &mut found);
        }
    }
    found.into_iter().filter_map(|path| from_root(module, &path)).collect()
}

/// Identifiers and `::`, and every other character that is not blank by itself.
fn words(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let end = match first {
            c if is_name(c) => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            c => c.len_utf8(),
        };
        found.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    found
}

/// Whether what follows is a branch of a group, `a::{b, self::c`, which is read with the path that the group belongs to.
fn is_in_group(before: &[&str]) -> bool {
    let mut open = 0;
    for (at, word) in before.iter().enumerate().rev() {
        match *word {
            ";" => return false,
            "}" => open += 1,
            "{" if open > 0 => open -= 1,
            "{" => return at > 0 && before[at - 1] == "::",
            _ => {}
        }
    }
    false
}

/// Reads one path from `at`, after `prefix`; gives where it ends.
fn path(words: &[&str], mut at: usize, prefix: &mut Vec<String>, found: &mut Vec<Vec<String>>) -> usize {
    let own = prefix.len();
    loop {
        match words.get(at) {
            Some(&"{") => {
                at += 1;
                while !matches!(words.get(at), None | Some(&"}")) {
                    at = path(words, at, prefix, found);
                    // A new name, `as x`, and the comma.
                    while !matches!(words.get(at), None | Some(&("}" | ","))) {
                        at += 1;
                    }
                    at += usize::from(words.get(at) == Some(&","));
                }
                at += 1;
                break;
            }
            Some(word) => {
                prefix.push((*word).to_owned());
                at += 1;
            }
            None => break,
        }
        if words.get(at) != Some(&"::") {
            found.push(prefix.clone());
            break;
        }
        at += 1;
    }
    prefix.truncate(own);
    at
}

/// The path from the root of the crate, if it gets there: `super` climbs, `self` stays.
fn from_root(module: &[String], path: &[String]) -> Option<Vec<String>> {
    let mut at = module.to_vec();
    let mut words = path.iter();
    let is_step = |word: &str| matches!(word, "crate" | "inference_proxy" | "super" | "self");
    for word in words.clone().take_while(|word| is_step(word)) {
        match word.as_str() {
            "super" => drop(at.pop()),
            "self" => {}
            _ => at.clear(),
        }
        words.next();
    }
    at.is_empty().then(|| words.cloned().collect())
}

#[test]
fn rooms_use_only_what_is_below_them() {
    let layers = Layers::drawn();
    let wrong: Vec<String> = sources()
        .iter()
        .filter(|(file, _)| file != "lib.rs")
        .flat_map(|(f, code)| layers.violations(f, code))
        .collect();
    assert!(wrong.is_empty(), "against the layers in src/lib.rs:\n{}", wrong.join("\n"));
}

#[test]
fn every_room_is_in_the_layers_and_every_row_names_rooms() {
    let rooms = sources().into_iter().filter(|(file, _)| file != "lib.rs");
    let mut there: Vec<String> =
        rooms.map(|(file, _)| module(&file).into_iter().next().unwrap_or_else(|| "main".to_owned())).collect();
    let layers = Layers::drawn();
    let mut drawn: Vec<String> = layers.rooms().cloned().collect();
    there.sort();
    there.dedup();
    drawn.sort();
    assert_eq!(drawn, there);
}

#[test]
fn the_demo_backend_is_named_only_where_it_is_started() {
    for (file, code) in sources().iter().filter(|(file, _)| file != "lib.rs") {
        let module = module(file);
        let names_it = paths(file, &module, code).iter().any(|path| path.first().is_some_and(|room| room == "demo"));
        let may = module.first().is_none_or(|room| room == "cli" || room == "demo");
        assert!(may || !names_it, "{file} names the demo backend, which is another program");
    }
}

/// The ways to spell a path into a room, from a file two folders down.
fn spelt(room: &str) -> [String; 10] {
    [
        format!("use crate::{room}::x::Y;"),
        format!("use crate::{room};"),
        format!("use crate::{{\n    self_made::A,\n    {room}::{{x::Y, z}},\n}};"),
        format!("pub(crate) use crate::{{{room} as other}};"),
        format!("fn f(y: &crate::{room}::x::Y) -> u8 {{\n    y.z\n}}"),
        format!("fn f() {{\n    let y = crate::{room}::x::y(1);\n}}"),
        format!("use super::super::super::{room}::x;"),
        format!("use super::{{y, super::{{z, super::{room}::x}}}};"),
        format!("fn f() {{\n    self::super::super::super::{room}::x();\n}}"),
        format!("impl super::super::super::{room}::X for Y {{}}"),
    ]
}

#[test]
fn an_import_in_each_forbidden_direction_is_refused() {
    let layers = Layers::drawn();
    let (mut refused, mut allowed) = (0, 0);
    for (own, from) in layers.0.iter().enumerate().flat_map(|(row, rooms)| rooms.iter().map(move |room| (row, room))) {
        for (theirs, to) in layers.0.iter().enumerate().flat_map(|(row, rooms)| rooms.iter().map(move |r| (row, r))) {
            let is_forbidden = from != to && own >= theirs;
            let planted: Vec<(String, String)> = match from.as_str() {
                "main" => vec![("main.rs".to_owned(), format!("use inference_proxy::{{x, {to}::y}};"))],
                from => spelt(to).map(|code| (format!("{from}/one/two.rs"), code)).into(),
            };
            for (file, code) in planted {
                let found = layers.violations(&file, &code);
                assert_eq!(!found.is_empty(), is_forbidden, "{from} to {to}: {code}\n{found:?}");
            }
            refused += usize::from(is_forbidden);
            allowed += usize::from(!is_forbidden);
        }
    }
    let rooms = layers.rooms().count();
    assert!(refused >= rooms * (rooms - 1) / 2 && allowed > rooms, "{refused} refused, {allowed} allowed");
}

#[test]
fn the_layers_are_read_as_they_are_meant() {
    let layers = Layers::drawn();
    for (from, to, is_allowed) in [
        ("data", "control", false),
        ("control", "data", false),
        ("observe", "data", false),
        ("observe", "control", false),
        ("pool", "data", false),
        ("pool", "control", false),
        ("telemetry", "observe", false),
        ("wire", "base", false),
        ("base", "wire", false),
        ("base", "telemetry", false),
        ("demo", "base", false),
        ("app", "data", true),
        ("data", "pool", true),
        ("control", "observe", true),
        ("observe", "pool", true),
        ("pool", "wire", true),
    ] {
        let found = layers.violations(&format!("{from}/file.rs"), &format!("use crate::{to}::x;"));
        assert_eq!(found.is_empty(), is_allowed, "{from} to {to}: {found:?}");
    }
    // The whole crate, and the crate by another name, would let everything in.
    for code in ["use crate::*;", "use crate as all;", "use super::super::{self as all};", "use super::super::*;"] {
        assert!(!layers.violations("wire/file.rs", code).is_empty(), "{code}");
    }
    // A room of one's own, names that only begin like a room or lie within another, and what stays within.
    for code in [
        "use crate::pool::table::X;",
        "use crate::control_flow::X;",
        "use crate::wire::data::X;",
        "use super::{control, super::pool::data};",
        "use self::data::X;",
        "use std::{data::X, self::control};",
        "pub(crate) fn f(x: u8) {}",
        "pub(in crate::pool) fn f(&self) {\n    self.data::<u8>(control)\n}",
    ] {
        let found = layers.violations("pool/one/two.rs", code);
        assert!(found.is_empty(), "{code}: {found:?}");
    }
}

#[test]
fn pure_files_have_no_clock_task_or_socket() {
    let forbidden = [
        "Instant::now",
        "SystemTime::now",
        "now_utc",
        "tokio::spawn",
        "tokio::net",
        "std::net::Tcp",
        ".await",
        "fastrand::Rng::new",
    ];
    let sources = sources();
    for pure in PURE {
        let (_, code) = sources.iter().find(|(file, _)| file == pure).unwrap_or_else(|| panic!("{pure} has moved"));
        for word in forbidden {
            assert!(!code.contains(word), "{pure} is pure, but holds {word}");
        }
    }
}
