//! Rules about the code itself: who may use whom, what pure code must not contain, and that the README knows everything
//! a user can set or see.

use std::{fs, path::Path};

use inference_proxy::{
    base::{config::KNOBS, error::ProxyError},
    control::labels,
    telemetry::families,
};

/// Layers from the top; a module uses only those below its own. The order is that of the crate documentation.
const LAYERS: &[&[&str]] = &[
    &["main"],
    &["app", "cli::commands", "cli"],
    &["data::listen", "control::discovery::docker", "control::discovery::fixed"],
    &["data::proxy", "demo"],
    &["observe::pages"],
    &["control::registry", "observe::report"],
    &["control::probe", "control::scrape"],
    &["pool::table", "observe::status"],
    &["data::balance"],
    &["pool::backend"],
    &["pool::upstream", "data::affinity"],
    &[
        "data::replay",
        "control::lifecycle",
        "base::fetch",
        "pool::breaker",
        "pool::budget",
        "pool::load",
        "pool::tally",
        "pool::waiting",
    ],
    &["control::discovery"],
    &["control::discovery::network", "control::discovery::signal", "control::discovery::vantage"],
    &["telemetry"],
    &["wire::scan", "control::labels", "wire::http1", "pool::latency"],
    &["base::config", "base::error"],
    &["base::foreign", "base::vital"],
    &["data", "control", "observe", "pool", "wire", "base"],
];

/// Files in which decisions are made: state, input and time come in as arguments.
const PURE: &[&str] = &[
    "data/affinity/holders.rs",
    "data/affinity/mod.rs",
    "data/affinity/shares.rs",
    "data/balance/policy/mod.rs",
    "pool/breaker/mod.rs",
    "pool/budget.rs",
    "control/discovery/docker/event.rs",
    "control/discovery/docker/inspect.rs",
    "control/discovery/network/mod.rs",
    "control/discovery/network/advice.rs",
    "control/discovery/network/elsewhere.rs",
    "control/discovery/network/standpoint.rs",
    "control/discovery/signal.rs",
    "control/discovery/vantage.rs",
    "base/foreign.rs",
    "control/labels.rs",
    "pool/latency.rs",
    "control/lifecycle.rs",
    "pool/load/mod.rs",
    "wire/http1/body.rs",
    "wire/http1/head.rs",
    "data/proxy/failure.rs",
    "data/proxy/headers.rs",
    "data/proxy/paths.rs",
    "control/registry/verdict.rs",
    "data/replay/mod.rs",
    "wire/scan/json.rs",
    "wire/scan/mod.rs",
    "wire/scan/multipart.rs",
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
            if path.is_dir() {
                collect(&path, root, found);
            } else if path.extension().is_some_and(|ext| ext == "rs") && path.file_stem().is_some_and(|s| s != "tests")
            {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                let text = fs::read_to_string(&path).unwrap();
                // Tests may reach anywhere.
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
                let code = code.split("#[cfg(test)]\npub(crate) mod tests").next().unwrap_or_default();
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

/// The layer of a module path such as `discovery::docker::event`; the longest name that matches counts.
fn layer(module: &str) -> Option<usize> {
    let named = LAYERS.iter().enumerate().flat_map(|(rank, names)| names.iter().map(move |name| (rank, *name)));
    named
        .filter(|(_, name)| module == *name || module.starts_with(&format!("{name}::")))
        .max_by_key(|(_, name)| name.len())
        .map(|(rank, _)| rank)
}

/// The module paths that follow `crate::` in this code, nested groups included.
fn used(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (start, _) in code.match_indices("crate::") {
        let rest = &code[start + "crate::".len()..];
        // `{` opens a group only where `crate::` itself is the prefix of the group.
        if let Some(group) = rest.strip_prefix('{') {
            let (mut depth, mut item) = (0, String::new());
            for c in group.chars() {
                match c {
                    '{' => {
                        depth += 1;
                        item.push(c);
                    }
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => found.push(std::mem::take(&mut item)),
                    c if c.is_whitespace() => {}
                    c => item.push(c),
                }
            }
            found.push(item);
        } else {
            found.push(rest.chars().take_while(|c| c.is_alphanumeric() || matches!(c, ':' | '_')).collect());
        }
    }
    found
        .into_iter()
        .map(|item| item.split("::{").next().unwrap_or_default().to_owned())
        .filter(|i| !i.is_empty())
        .collect()
}

#[test]
fn modules_use_only_what_is_below_them() {
    let mut wrong = Vec::new();
    for (file, code) in sources() {
        let module = file.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
        if module == "lib" {
            continue;
        }
        let own = layer(&module).unwrap_or_else(|| panic!("{module} has no layer: add it to LAYERS and to src/lib.rs"));
        for used in used(&code) {
            let Some(theirs) = layer(&used) else { continue };
            let same = module.split("::").next() == used.split("::").next();
            if theirs <= own && !same {
                wrong.push(format!("{file} uses crate::{used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "against the layers:\n{}", wrong.join("\n"));
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

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

#[test]
fn the_readme_has_every_variable_and_its_default() {
    let readme = readme();
    for knob in KNOBS {
        let row = readme.lines().find(|line| line.starts_with(&format!("| `{}` |", knob.name)));
        let row = row.unwrap_or_else(|| panic!("{} is not in the README's table", knob.name));
        assert!(knob.default.is_empty() || row.contains(knob.default), "{row} should say {}", knob.default);
    }
}

#[test]
fn the_readme_has_every_label_and_its_default() {
    let readme = readme();
    for label in labels::KNOWN {
        assert!(readme.lines().any(|line| line.starts_with(&format!("| `{}` |", label.name))), "{}", label.name);
    }
}

#[test]
fn the_readme_has_every_metric_and_every_error_code() {
    let readme = readme();
    for family in families::ALL {
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = if labels.is_empty() { "–".to_owned() } else { labels.join(", ") };
        let row = format!("| `{}` | {labels} | {} |", family.name, family.kind.as_str());
        assert!(readme.contains(&row), "the README's table of metrics lacks: {row}");
    }
    let rows = readme.lines().filter(|line| {
        let name = line.strip_prefix("| `").and_then(|rest| rest.split('`').next()).unwrap_or_default();
        name.starts_with("proxy_") || name.starts_with("process_")
    });
    assert_eq!(rows.count(), families::ALL.len(), "the README has metrics that there are not");
    for error in ProxyError::CODES {
        assert!(readme.contains(&format!("`{error}`")), "{error} is not in the README");
    }
}
