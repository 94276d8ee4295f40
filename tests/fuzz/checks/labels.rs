//! Labels of containers. An input is lines of `name=value`, of which the last one of a name counts.

use std::collections::BTreeMap;

use inference_proxy::control::labels::{self, KNOWN, LabelSpec, Labels, Opted};

/// Checks the labels of one container.
pub fn check(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let given: BTreeMap<&str, &str> = text.split('\n').map(|line| line.split_once('=').unwrap_or((line, ""))).collect();
    let read = labels::parse(given.iter().map(|(name, value)| (*name, *value)));
    let backwards = labels::parse(given.iter().rev().map(|(name, value)| (*name, *value)));
    assert_eq!(read, backwards, "it depends on the order");
    assert_eq!(read.is_some(), given.contains_key(labels::ENABLE));
    let Some(Labels { opted, spec, problems }) = read else { return };

    assert!(problems.len() <= 16, "{} problems", problems.len());
    for problem in &problems {
        let text = problem.to_string();
        assert!(text.len() < 2000 && !text.contains(char::is_control), "{text:?}");
        let is_known = KNOWN.iter().any(|label| label.name == problem.name);
        assert_eq!(problem.value.is_some(), is_known, "the value of an unknown label may be a secret");
    }
    match &opted {
        Opted::In | Opted::Out => assert!(problems.iter().all(|problem| problem.name != labels::ENABLE)),
        Opted::Unclear(shown) => assert!(shown.len() < 2000 && !shown.contains(char::is_control), "{shown:?}"),
    }
    check_spec(&spec, &given);

    // Written as labels it is read back, and there is nothing to complain of.
    let written = written(&spec);
    let again = labels::parse(written.iter().map(|(name, value)| (*name, value.as_str())));
    assert_eq!(again, Some(Labels { opted: Opted::In, spec, problems: Vec::new() }));
}

fn check_spec(spec: &LabelSpec, given: &BTreeMap<&str, &str>) {
    assert_ne!(spec.port, Some(0));
    assert!((1..=1_000_000).contains(&spec.weight.get()), "{}", spec.weight);
    assert!(spec.base_path.is_empty() || spec.base_path.starts_with('/') && !spec.base_path.ends_with('/'));
    check_target(&format!("{}/models", spec.base_path));
    if let Some(path) = &spec.health_path {
        assert!(path.starts_with('/'), "{path:?}");
        check_target(path);
    }
    if let Some(network) = &spec.network {
        assert!(!network.is_empty() && network.len() <= 1024 && !network.contains(char::is_control), "{network:?}");
    }
    // What is not the default comes from a label.
    let unset = LabelSpec::default();
    for (name, differs) in [
        ("inference.port", spec.port != unset.port),
        ("inference.api.base_path", spec.base_path != unset.base_path),
        ("inference.network", spec.network != unset.network),
        ("inference.health.path", spec.health_path != unset.health_path),
        ("inference.weight", spec.weight != unset.weight),
        ("inference.max_inflight", spec.max_inflight != unset.max_inflight),
    ] {
        assert!(!differs || given.contains_key(name), "{name} is not there");
    }
}

/// It can be sent in a request as it stands, and means one place only.
fn check_target(target: &str) {
    let parsed = target.parse::<http::uri::PathAndQuery>();
    assert!(parsed.is_ok_and(|parsed| parsed.as_str() == target), "{target:?}");
    assert!(target.bytes().all(|byte| byte.is_ascii_graphic()) && !target.contains('#'), "{target:?}");
    let path = target.split('?').next().unwrap_or_default();
    assert!(!path.contains("//"), "{target:?}");
    let decoded = path.to_ascii_lowercase().replace("%2e", ".");
    assert!(!decoded.split('/').any(|segment| matches!(segment, "." | "..")), "{target:?}");
}

/// The labels that say what `spec` says.
fn written(spec: &LabelSpec) -> Vec<(&'static str, String)> {
    let base_path = if spec.base_path.is_empty() { "/".to_owned() } else { spec.base_path.clone() };
    let weight = format!("{}.{:03}", spec.weight.get() / 1000, spec.weight.get() % 1000);
    let labels = [
        (labels::ENABLE, Some("true".to_owned())),
        ("inference.port", spec.port.map(|port| port.to_string())),
        ("inference.api.base_path", Some(base_path)),
        ("inference.network", spec.network.clone()),
        ("inference.health.path", spec.health_path.clone()),
        ("inference.weight", Some(weight)),
        ("inference.max_inflight", spec.max_inflight.map(|most| most.to_string())),
    ];
    labels.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}
