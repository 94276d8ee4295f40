//! The reference has every label, variable, metric, path, error code, option and key, with its default, and no other; and
//! the README, which has a part of them, says the same.

use std::{fs, path::Path, process::Command};

use inference_proxy::{
    base::{config::KNOBS, error::ProxyError},
    control::labels,
    data::proxy::paths,
    demo::DemoOptions,
    telemetry::{families, operation::Operation},
};

use super::{assert_same, code_words, failures::errors, page, rows, section};

const CONFIGURATION: &str = "docs/configuration.md";
const HTTP: &str = "docs/http.md";
const METRICS: &str = "docs/metrics.md";
const DEMO: &str = "docs/demo-backend.md";

/// Readers do not read a longer README to its end.
const README_LINES_MAX: usize = 250;

fn source(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name)).unwrap()
}

fn help(arguments: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO_BIN_EXE_inference-proxy")).args(arguments).arg("--help").env_clear().output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The long options that a command takes, but for `--help` and `--version`.
fn options(arguments: &[&str]) -> Vec<String> {
    let help = help(arguments);
    let words = help.split("Options:").nth(1).unwrap().split("Environment:").next().unwrap();
    let lines = words.lines().filter(|line| line.trim_start().starts_with('-'));
    let options = lines.filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")));
    options.filter(|option| !["--help", "--version"].contains(option)).map(str::to_owned).collect()
}

/// The first cells, which hold one code word each.
fn names(rows: &[Vec<String>]) -> Vec<String> {
    rows.iter().map(|row| row[0].trim_matches('`').to_owned()).collect()
}

/// The README's rows below a heading are rows of the reference, with the same default.
fn is_a_part(heading: &str, reference: &[Vec<String>]) {
    for row in rows("README.md", heading) {
        let full = reference.iter().find(|full| full[0] == row[0]);
        let full = full.unwrap_or_else(|| panic!("{} of the README is not in {CONFIGURATION}", row[0]));
        assert_eq!(row[1], full[1], "the default of {} in the README, and in {CONFIGURATION}", row[0]);
    }
}

#[test]
fn the_readme_can_be_read_in_one_go() {
    let lines = page("README.md").lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines; put what few need into docs/");
}

#[test]
fn every_variable_is_documented_with_its_default() {
    let rows = rows(CONFIGURATION, "Variables");
    for knob in KNOBS {
        let row = rows.iter().find(|row| row[0].trim_matches('`') == knob.name);
        let row = row.unwrap_or_else(|| panic!("{} is not in {CONFIGURATION}", knob.name));
        assert!(knob.default.is_empty() || row[1].contains(knob.default), "{row:?} should say {}", knob.default);
    }
    assert_same("variables", names(&rows), &KNOBS.iter().map(|knob| knob.name).collect::<Vec<_>>());
    is_a_part("Variables, on the proxy", &rows);
}

#[test]
fn every_label_is_documented_with_its_default() {
    let known: Vec<&str> = labels::KNOWN.iter().map(|label| label.name).collect();
    let reference = rows(CONFIGURATION, "Labels");
    for label in labels::KNOWN {
        let row = reference.iter().find(|row| row[0].trim_matches('`') == label.name);
        let default = row.unwrap_or_else(|| panic!("{} is not in {CONFIGURATION}", label.name))[1].replace('`', "");
        let same = default.to_lowercase().replace("exposed", "") == label.default.to_lowercase().replace("exposed", "");
        assert!(same || (default == "–" && label.default.is_empty()), "{}: {default} or {}", label.name, label.default);
    }
    assert_same("labels", names(&reference), &known);
    let heading = "Labels, on the inference containers";
    assert_same("labels of the README", names(&rows("README.md", heading)), &known);
    is_a_part(heading, &reference);
}

#[test]
fn every_metric_is_documented_with_its_labels_and_kind() {
    let rows = rows(METRICS, "Metrics");
    for family in families::ALL {
        let row = rows.iter().find(|row| row[0].trim_matches('`') == family.name);
        let row = row.unwrap_or_else(|| panic!("{} is not in {METRICS}", family.name));
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = if labels.is_empty() { "–".to_owned() } else { labels.join(", ") };
        assert_eq!(row[1..3], [labels, family.kind.as_str().to_owned()], "{}", family.name);
    }
    assert_same("metrics", names(&rows), &families::ALL.iter().map(|family| family.name).collect::<Vec<_>>());
}

#[test]
fn every_operation_is_documented() {
    let page = page(METRICS);
    let begin = page.find("\n`operation` is").expect("the paragraph must begin so");
    let paragraph = page[begin + 1..].split("\n\n").next().unwrap();
    let documented = code_words(paragraph).into_iter().skip(1);
    assert_same("operations", documented, &Operation::ALL.map(Operation::as_str));
}

#[test]
fn every_error_code_is_documented_with_its_status() {
    let rows = rows(HTTP, "Answers of its own");
    let mut documented: Vec<String> = rows.iter().map(|row| row[2].trim_matches('`').to_owned()).collect();
    documented.sort_unstable();
    documented.dedup();
    assert_same("error codes", documented, ProxyError::CODES);
    for error in errors() {
        for row in rows.iter().filter(|row| row[2].trim_matches('`') == error.code()) {
            assert_eq!(row[1].split(" + ").next(), Some(error.status().as_str()), "{row:?}");
        }
    }
}

#[test]
fn every_page_of_the_proxys_own_is_documented() {
    let code = source("observe/pages/mod.rs");
    let body = code.split("pub fn of(").nth(1).unwrap().split("    }\n\n").next().unwrap();
    let pages: Vec<&str> =
        body.split('"').skip(1).step_by(2).filter(|path| path.starts_with('/') && !path.ends_with("//")).collect();
    assert!(pages.len() > 5, "{pages:?}");
    let gets: Vec<String> = rows(HTTP, "Paths").iter().flat_map(|row| code_words(&row[0])).collect();
    for path in &pages {
        assert!(gets.iter().any(|get| get == &format!("GET {path}")), "GET {path} is not in {HTTP}");
    }
    for path in gets.iter().filter_map(|get| get.strip_prefix("GET ")).filter(|path| !path.starts_with("/v1/")) {
        assert!(pages.contains(&path), "{HTTP} has GET {path}, which the code has not");
    }
}

#[test]
fn every_path_that_is_forwarded_or_refused_is_documented() {
    let paths_in = |heading: &str| code_words(&section(HTTP, heading)).into_iter();
    assert_same("engines' paths", paths_in("Engines' own paths").filter(|path| path != "/v1"), paths::ENGINE_PATHS);
    assert_same("paths without a model", paths_in("Paths that may leave the model out"), paths::MODEL_OPTIONAL);
    // The section names the prefixes that it is about, too.
    let known = ["/v1", "/api/v1", "inference.api.base_path", "/", "/api"];
    let api = paths_in("Behind a prefix that is no version").filter(|word| !known.contains(&word.as_str()));
    assert_same("the API", api, paths::API);
    let never = [paths::CONTROL, paths::CONTROL_PREFIXES, paths::STATEFUL, &["messages/batches"]].concat();
    assert_same("refused", paths_in("Paths that are never forwarded").filter(|path| path != "/v1"), &never);
    let unread = rows(HTTP, "Answers of its own").into_iter().find(|row| row[1] == "415").unwrap();
    assert_same("bytes", code_words(&unread[0]).into_iter().filter(|word| word.starts_with('/')), &paths::RAW);
}

#[test]
fn every_option_is_documented() {
    for row in rows(CONFIGURATION, "Commands") {
        for call in code_words(&row[0]) {
            let words: Vec<&str> = call.split_whitespace().skip(1).take_while(|word| !word.starts_with('[')).collect();
            if words == ["demo-backend"] {
                continue;
            }
            let documented = call.split('[').filter_map(|option| option.split([' ', ']']).next());
            let documented = documented.filter(|word| word.starts_with("--")).map(str::to_owned);
            let known = options(&words);
            assert_same(&call, documented, &known.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
    let all = help(&[]);
    let commands = all.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let commands = commands.lines().filter_map(|line| line.split_whitespace().next()).filter(|word| *word != "help");
    let documented: Vec<String> = rows(CONFIGURATION, "Commands").iter().flat_map(|row| code_words(&row[0])).collect();
    for command in commands {
        let is_there = documented.iter().any(|call| call.split_whitespace().nth(1) == Some(command));
        assert!(is_there, "inference-proxy {command} is not in {CONFIGURATION}");
    }
}

#[test]
fn every_option_and_key_of_the_demo_backend_is_documented() {
    let rows = rows(DEMO, "Demo backend");
    let defaults = DemoOptions::default();
    let option_rows: Vec<_> = rows.iter().filter(|row| row[0].starts_with("`--")).collect();
    let option = |row: &[String]| row[0].trim_matches('`').split(' ').next().unwrap().to_owned();
    let known = options(&["demo-backend"]);
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    assert_same("options", option_rows.iter().map(|row| option(row)), &known);
    for (name, default) in [
        ("--port", defaults.port.to_string()),
        ("--model", defaults.models.join(",")),
        ("--latency-ms", defaults.latency.as_millis().to_string()),
        ("--tokens", defaults.tokens.to_string()),
        ("--token-gap-ms", defaults.token_gap.as_millis().to_string()),
    ] {
        let row = option_rows.iter().find(|row| option(row) == name).unwrap();
        assert_eq!(row[1].trim_matches('`'), default, "{name}");
    }
    let control = source("demo/control.rs");
    let keys = control.split("const KEYS: &str = \"").nth(1).unwrap().split('"').next().unwrap().replace('\\', "");
    let keys: Vec<&str> = keys.split(',').map(str::trim).collect();
    // Of "`hang=models`, `health`" only the first word is a key; the others are its values.
    let key_rows = rows.iter().filter(|row| !row[0].starts_with("`--")).flat_map(|row| {
        let words = code_words(&row[0]);
        let have_values = words.iter().any(|word| word.contains('='));
        let keys = words.into_iter().filter(move |word| !have_values || word.contains('='));
        keys.map(|word| word.split('=').next().unwrap().to_owned()).collect::<Vec<_>>()
    });
    assert_same("keys", key_rows, &keys);
}
