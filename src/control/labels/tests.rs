//! Each label with values that are used and values that are refused, and what must hold of any labels.

use proptest::prelude::*;

use super::*;

/// The labels of a container that opts in and carries `more`.
fn enabled(more: &[(&str, &str)]) -> Labels {
    parse([(ENABLE, "true")].into_iter().chain(more.iter().copied())).unwrap()
}

/// The spec and the one problem that `name=value` leads to.
fn refused(name: &str, value: &str) -> LabelProblem {
    let labels = enabled(&[(name, value)]);
    assert_eq!(labels.spec, LabelSpec::default(), "{name}={value:?} must leave the default");
    assert_eq!(labels.problems.len(), 1, "{name}={value:?}: {:?}", labels.problems);
    labels.problems.into_iter().next().unwrap()
}

#[test]
fn without_the_enable_label_there_is_nothing() {
    assert_eq!(parse([]), None);
    assert_eq!(parse([("inference.port", "8000"), ("inference.enabled", "true"), ("Inference.Enable", "true")]), None);
}

#[test]
fn enable() {
    for value in ["true", "TRUE", "True", " true ", "\t1\n", "1", "yes", "On"] {
        let labels = parse([(ENABLE, value)]).unwrap();
        assert_eq!((labels.opted, labels.problems), (Opted::In, vec![]), "{value:?}");
    }
    for value in ["false", "0", "NO", " off "] {
        let labels = parse([(ENABLE, value)]).unwrap();
        assert_eq!((labels.opted, labels.problems), (Opted::Out, vec![]), "{value:?}");
    }
    for (value, shown) in [("", ""), (" ture", "ture"), ("2", "2"), ("true,", "true,"), ("a\nb\"", "a\\nb\\\"")] {
        let labels = parse([(ENABLE, value)]).unwrap();
        assert_eq!(labels.opted, Opted::Unclear(shown.to_owned()), "{value:?}");
        assert_eq!(labels.problems.len(), 1, "{value:?}");
        assert!(labels.problems[0].to_string().contains("expected true or false"), "{}", labels.problems[0]);
    }
}

#[test]
fn nothing_but_enable_gives_the_defaults() {
    let labels = enabled(&[("com.docker.compose.project", "llm"), ("signal", "1"), ("inferences.port", "1")]);
    assert_eq!(labels, Labels { opted: Opted::In, spec: LabelSpec::default(), problems: vec![] });
    assert_eq!((labels.spec.base_path.as_str(), labels.spec.weight.get()), ("/v1", 1000));
}

#[test]
fn every_label_is_read() {
    let labels = enabled(&[
        ("inference.port", " 9000 "),
        ("inference.api.base_path", "/api/v1/"),
        ("inference.network", "llm-net"),
        ("inference.health.path", "/ready?full=1"),
        ("inference.weight", "2.5"),
        ("inference.max_inflight", "64"),
    ]);
    let spec = LabelSpec {
        port: Some(9000),
        base_path: "/api/v1".to_owned(),
        network: Some("llm-net".to_owned()),
        health_path: Some("/ready?full=1".to_owned()),
        weight: NonZeroU32::new(2500).unwrap(),
        max_inflight: NonZeroU32::new(64),
    };
    assert_eq!(labels, Labels { opted: Opted::In, spec, problems: vec![] });
}

#[test]
fn base_paths() {
    for (value, base_path) in [
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/v1//", "/v1"),
        ("v1", "/v1"),
        ("api/v1/", "/api/v1"),
        ("/", ""),
        (" / ", ""),
        ("/a..b/v1.", "/a..b/v1."),
        ("/openai/deployments/gpt%204o/", "/openai/deployments/gpt%204o"),
        ("/~u/x:y@z!$&'()*+,;=", "/~u/x:y@z!$&'()*+,;="),
    ] {
        let labels = enabled(&[(BASE_PATH, value)]);
        assert_eq!((labels.spec.base_path.as_str(), &labels.problems), (base_path, &vec![]), "{value:?}");
    }
    for value in [
        "",
        "  ",
        "..",
        "/..",
        "/v1/../admin",
        "/v1/%2e%2E/admin",
        "/v1/.%2e/",
        "/./v1",
        "/v1?x=1",
        "/v1#top",
        "/v 1",
        "/v1\u{7}",
        "/v1\r\nX: y",
        "/vé1",
        "/a//b",
        "//host/v1",
        "http://host/v1",
        "/v1%",
        "/v1%2",
        "/v1%zz",
        "/v1%+1",
        "/v\\1",
        "/{id}",
    ] {
        let problem = refused(BASE_PATH, value);
        assert!(problem.to_string().contains("expected a path such as /v1"), "{problem}");
    }
}

#[test]
fn health_paths() {
    for (value, path) in [
        ("/health", "/health"),
        ("health", "/health"),
        ("/ready/", "/ready/"),
        ("/", "/"),
        ("/ready?a=b&c=/d?e%20f", "/ready?a=b&c=/d?e%20f"),
        ("/ready?", "/ready?"),
    ] {
        let labels = enabled(&[(HEALTH_PATH, value)]);
        assert_eq!((labels.spec.health_path.as_deref(), &labels.problems), (Some(path), &vec![]), "{value:?}");
    }
    for value in ["?x", "/a/../b", "/h#x", "/h?x y", "/h?x#y", "/h?%", "http://169.254.169.254/", "//host/", "/h\u{0}"]
    {
        refused(HEALTH_PATH, value);
    }
}

#[test]
fn numbers() {
    for (value, thousandths) in [
        ("1", 1000),
        ("3", 3000),
        ("0.5", 500),
        (".25", 250),
        ("2.", 2000),
        ("0.001", 1),
        ("007", 7000),
        ("1000.000", 1_000_000),
    ] {
        let labels = enabled(&[(WEIGHT, value)]);
        assert_eq!((labels.spec.weight.get(), &labels.problems), (thousandths, &vec![]), "{value:?}");
    }
    for value in
        ["0", "0.000", "-1", "+1", "1000.001", "1001", "0.0001", "1,5", "1e3", "NaN", "inf", ".", "1.2.3", "1.+2", "٣"]
    {
        assert_eq!(refused(WEIGHT, value).name, WEIGHT);
    }
    for value in ["0", "65536", "-1", "80a", "8000/tcp", "8000:8000"] {
        assert_eq!(refused(PORT, value).expected, "a port, 1 to 65535");
    }
    for value in ["0", "-1", "1.5", "many", "4294967296"] {
        assert_eq!(refused(MAX_INFLIGHT, value).name, MAX_INFLIGHT);
    }
    assert_eq!(enabled(&[(PORT, "65535")]).spec.port, Some(65535));
    assert_eq!(enabled(&[(MAX_INFLIGHT, "1")]).spec.max_inflight, NonZeroU32::new(1));
}

#[test]
fn an_empty_value_is_unset() {
    let labels = enabled(&[(PORT, ""), (NETWORK, " "), (HEALTH_PATH, ""), (WEIGHT, "\t"), (MAX_INFLIGHT, "")]);
    assert_eq!((labels.spec, labels.problems), (LabelSpec::default(), vec![]));
}

#[test]
fn a_network_name_holds_nothing_that_cannot_be_seen() {
    assert_eq!(enabled(&[(NETWORK, "my net_1.x")]).spec.network.as_deref(), Some("my net_1.x"));
    assert_eq!(refused(NETWORK, "a\u{1b}[2Jb").value.as_deref(), Some("a\\u{1b}[2Jb"));
    assert_eq!(refused(NETWORK, "a\u{202e}b").value.as_deref(), Some("a\\u{202e}b"));
}

#[test]
fn a_problem_is_one_clear_sentence() {
    for (name, value, sentence) in [
        (PORT, "80a", r#"inference.port="80a" is ignored: expected a port, 1 to 65535"#),
        (
            "inference.prot",
            "8000",
            "inference.prot is no label of this proxy and is ignored; did you mean inference.port?",
        ),
        (
            "inference.api_key",
            "secret",
            "inference.api_key is no label of this proxy and is ignored: expected a name that --help lists",
        ),
    ] {
        assert_eq!(refused(name, value).to_string(), sentence);
    }
}

#[test]
fn unknown_names_get_the_nearest_known_one_when_it_is_close() {
    for (name, suggestion) in [
        ("inference.ports", Some(PORT)),
        ("INFERENCE.PORT", Some(PORT)),
        ("inference.enabled", Some(ENABLE)),
        ("inference.api.basepath", Some(BASE_PATH)),
        ("inference.base_path", Some(BASE_PATH)),
        ("inference.api-base-path", Some(BASE_PATH)),
        ("inference.health_path", Some(HEALTH_PATH)),
        ("inference.healthpath", Some(HEALTH_PATH)),
        ("inference.max-in-flight", Some(MAX_INFLIGHT)),
        ("inference.wieght", Some(WEIGHT)),
        ("inference.networks", Some(NETWORK)),
        ("inference.host", None),
        ("inference.models", None),
        ("inference.", None),
        ("inference.\u{1F980}", None),
    ] {
        let problem = refused(name, "x");
        assert_eq!((problem.suggestion, problem.value), (suggestion, None), "{name}");
    }
}

#[test]
fn giant_labels_cost_nothing() {
    let giant = "x".repeat(4 << 20);
    for name in KNOWN.iter().map(|label| label.name).filter(|name| *name != ENABLE) {
        let problem = refused(name, &giant);
        assert_eq!(problem.expected, "at most 1024 bytes");
        assert_eq!(problem.value.unwrap().chars().count(), MAX_SHOWN_CHARS + 1);
    }
    let labels = parse([(ENABLE, giant.as_str())]).unwrap();
    assert!(matches!(labels.opted, Opted::Unclear(shown) if shown.chars().count() == MAX_SHOWN_CHARS + 1));

    let problem = refused(&format!("inference.{giant}"), &giant);
    assert_eq!((problem.suggestion, problem.name.chars().count()), (None, MAX_SHOWN_CHARS + 1));

    let longest = format!("/{}", "x".repeat(MAX_VALUE_BYTES - 1));
    assert_eq!(enabled(&[(BASE_PATH, &longest)]).spec.base_path, longest);
    assert_eq!(refused(BASE_PATH, &format!("{longest}x")).expected, "at most 1024 bytes");
}

#[test]
fn problems_are_bounded_and_known_labels_come_first() {
    let unknown: Vec<String> = (0..100).map(|i| format!("inference.unknown{i:02}")).collect();
    let mut pairs: Vec<(&str, &str)> = unknown.iter().map(|name| (name.as_str(), "x")).collect();
    pairs.extend([(WEIGHT, "heavy"), (PORT, "x")]);
    let labels = enabled(&pairs);
    let names: Vec<&str> = labels.problems.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names.len(), MAX_PROBLEMS);
    assert_eq!(names[..3], [PORT, WEIGHT, "inference.unknown00"]);
    assert_eq!(names[MAX_PROBLEMS - 1], "inference.unknown13");
}

#[test]
fn known_labels_are_those_that_are_read() {
    // A label that only KNOWN has would be ignored in silence; one that only the parser has would be "unknown".
    for label in KNOWN {
        let labels = parse([(ENABLE, "true"), (label.name, "\u{0}")]).unwrap();
        assert_eq!(labels.problems.len(), 1, "{}", label.name);
        assert!(labels.problems[0].value.is_some(), "{} is not read", label.name);
        assert!(label.name.starts_with(PREFIX) && !label.help.is_empty() && !label.help.ends_with('.'));
    }
}

/// Names near and far from the known ones, values near and far from usable ones.
fn any_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    let known = || prop::sample::select(KNOWN.iter().map(|label| label.name.to_owned()).collect::<Vec<_>>());
    let name = prop_oneof![4 => known(), 1 => "[iI]nference\\.[a-z._]{0,14}", 1 => any::<String>()];
    let value = prop_oneof![
        2 => "[a-z0-9/.?%#&=+ -]{0,12}",
        2 => "(/?[a-z0-9.%]{0,3}){0,4}/{0,2}(\\?[a-z=&/?%2e]{0,4})?",
        1 => "[0-9]{1,5}(\\.[0-9]{0,4})?",
        1 => prop::sample::select(vec!["true", "off", " Yes "]).prop_map(str::to_owned),
        1 => any::<String>(),
        1 => "/x{1019,1029}",
    ];
    prop::collection::btree_map(name, value, 0..12)
}

fn parse_map(labels: &BTreeMap<String, String>) -> Option<Labels> {
    parse(labels.iter().map(|(name, value)| (name.as_str(), value.as_str())))
}

/// The labels that say what `spec` says.
fn labels_for(spec: &LabelSpec) -> BTreeMap<String, String> {
    let base_path = if spec.base_path.is_empty() { "/".to_owned() } else { spec.base_path.clone() };
    let weight = format!("{}.{:03}", spec.weight.get() / 1000, spec.weight.get() % 1000);
    [
        (ENABLE, Some("true".to_owned())),
        (PORT, spec.port.map(|port| port.to_string())),
        (BASE_PATH, Some(base_path)),
        (NETWORK, spec.network.clone()),
        (HEALTH_PATH, spec.health_path.clone()),
        (WEIGHT, Some(weight)),
        (MAX_INFLIGHT, spec.max_inflight.map(|n| n.to_string())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn whatever_the_labels_the_result_is_bounded_and_printable(labels in any_labels()) {
        let parsed = parse_map(&labels);
        prop_assert_eq!(parsed.is_some(), labels.contains_key(ENABLE));
        for problem in parsed.iter().flat_map(|p| &p.problems) {
            let text = problem.to_string();
            prop_assert!(text.len() < 2000 && !text.contains(char::is_control), "{:?}", text);
        }
        prop_assert!(parsed.is_none_or(|p| p.problems.len() <= MAX_PROBLEMS));
    }

    #[test]
    fn the_order_of_labels_changes_nothing(labels in any_labels()) {
        let reversed = parse(labels.iter().rev().map(|(name, value)| (name.as_str(), value.as_str())));
        prop_assert_eq!(parse_map(&labels), reversed);
    }

    #[test]
    fn a_spec_written_as_labels_is_read_back(mut labels in any_labels()) {
        labels.insert(ENABLE.to_owned(), "on".to_owned());
        let spec = parse_map(&labels).unwrap().spec;
        let again = parse_map(&labels_for(&spec)).unwrap();
        prop_assert_eq!(again, Labels { opted: Opted::In, spec, problems: vec![] });
    }

    #[test]
    fn accepted_paths_make_request_targets(mut labels in any_labels()) {
        labels.insert(ENABLE.to_owned(), "on".to_owned());
        let spec = parse_map(&labels).unwrap().spec;
        let is_target = |text: &str| text.parse::<http::uri::PathAndQuery>().is_ok_and(|t| t.as_str() == text);
        prop_assert!(spec.base_path.is_empty() || spec.base_path.starts_with('/'));
        prop_assert!(!spec.base_path.ends_with('/'));
        prop_assert!(is_target(&format!("{}/models", spec.base_path)), "{:?}", spec.base_path);
        if let Some(path) = spec.health_path {
            prop_assert!(path.starts_with('/') && is_target(&path), "{:?}", path);
        }
    }
}
