use super::*;

fn config(vars: &[(&str, &str)]) -> Result<(Config, Vec<Warning>), ConfigError> {
    Config::from_vars(vars.iter().copied())
}

#[test]
fn defaults_are_the_contracts() {
    let (c, warnings) = config(&[]).unwrap();
    assert_eq!((c.port, c.bind, c.admin_port), (8080, None, None));
    assert_eq!((c.drain_timeout, c.settle), (Duration::from_secs(60), Duration::from_secs(5)));
    assert_eq!(c.model_grace, Duration::from_secs(60));
    assert_eq!(c.models_refresh, Duration::from_secs(30));
    assert_eq!((c.retries, c.connect_timeout), (1, Duration::from_secs(2)));
    assert_eq!((c.first_byte_timeout, c.idle_timeout), (None, None));
    assert_eq!(c.client_idle_timeout, Duration::from_secs(650));
    assert_eq!(c.client_write_timeout, Some(Duration::from_secs(60)));
    assert_eq!((c.max_body_bytes, c.hold_max_bytes), (1 << 30, 64 << 20));
    assert_eq!((c.same_model, c.balance), (SameModel::Balance, Balance::Ewma));
    assert!(!c.require_healthcheck && !c.access_log);
    assert_eq!(warnings, []);
}

#[test]
fn empty_is_unset() {
    assert_eq!(config(&[("PROXY_PORT", " "), ("PROXY_BIND", "")]).unwrap().0.port, 8080);
}

#[test]
fn a_bad_value_names_variable_value_and_what_is_accepted() {
    for (name, value, expected) in [
        ("PROXY_PORT", "eighty", "a port"),
        ("PROXY_PORT", "70000", "a port"),
        ("PROXY_DRAIN_TIMEOUT", "60 apples", "a duration"),
        ("PROXY_SETTLE", "off", "a duration"),
        ("PROXY_MAX_BODY", "1XB", "a size"),
        ("PROXY_SAME_MODEL", "oldest", "balance or newest"),
        ("PROXY_BALANCE", "random", "ewma"),
        ("PROXY_REQUIRE_HEALTHCHECK", "maybe", "true or false"),
        ("PROXY_BIND", "localhost", "an IP address"),
        ("PROXY_LOG", "loud=very", "error, warn"),
        ("PROXY_LOG", "nonsense", "error, warn"),
        ("PROXY_LOG", ",", "error, warn"),
        ("PROXY_QUEUE_MAX", "-1", "a number"),
        ("PROXY_MODELS_REFRESH", "0", "at least 1s"),
        ("PROXY_CLIENT_IDLE_TIMEOUT", "0", "above zero"),
        ("PROXY_CLIENT_IDLE_TIMEOUT", "off", "above zero"),
        ("PROXY_CLIENT_WRITE_TIMEOUT", "never", "off, or a duration"),
        ("DOCKER_HOST", "/var/run/docker.sock", "unix:///path"),
    ] {
        let error = config(&[(name, value)]).unwrap_err();
        assert_eq!((error.name, error.value.as_str()), (name, value));
        assert!(error.expected.contains(expected), "{error}");
    }
}

#[test]
fn a_log_filter_is_made_of_levels_and_targets() {
    for (text, filter) in [
        ("info", "info"),
        ("WARN", "WARN"),
        ("Off", "Off"),
        ("info,", "info"),
        (" , info ,, inference_proxy::control::registry=debug", "info,inference_proxy::control::registry=debug"),
        ("warn,inference_proxy::data::proxy", "warn,inference_proxy::data::proxy"),
        ("inference_proxy", "inference_proxy"),
        ("hyper=trace", "hyper=trace"),
        ("info,hyper=off,bollard=WARN", "info,hyper=off,bollard=WARN"),
    ] {
        assert_eq!(config(&[("PROXY_LOG", text)]).unwrap().0.log, filter, "{text}");
    }
}

#[test]
fn a_word_that_is_no_level_is_refused_with_what_was_probably_meant() {
    for (text, meant) in [
        ("warning", Some("warn")),
        ("WARNING", Some("warn")),
        ("info,inference_proxy=warning", Some("warn")),
        ("information", Some("info")),
        ("err", Some("error")),
        ("debg", Some("debug")),
        ("info,dbug", Some("debug")),
        ("inference-proxy", Some("inference_proxy")),
        ("nonsense", None),
        ("verbose", None),
        ("warn,foo", None),
        ("inference_proxying", Some("inference_proxy")),
        ("info=", None),
        ("=info", None),
        ("a=b=info", None),
        (",,", None),
    ] {
        let error = config(&[("PROXY_LOG", text)]).expect_err(text);
        assert_eq!(error.meant, meant, "{text}");
        let told = error.to_string();
        let end = meant.map_or("=debug".to_owned(), |meant| format!("; did you mean {meant}?"));
        assert!(told.starts_with(&format!("PROXY_LOG={text:?}: expected off, error, warn")), "{told}");
        assert!(told.ends_with(&end), "{told}");
    }
}

#[test]
fn durations_and_sizes() {
    for (text, ms) in
        [("500ms", 500), ("60s", 60_000), ("2m", 120_000), ("1h", 3_600_000), ("5", 5_000), ("1.5", 1_500)]
    {
        assert_eq!(parse_duration(text), Some(Duration::from_millis(ms)), "{text}");
    }
    for text in ["", "s", "-1s", "1d", "1e9s", "999999999999999999999s", "1..2s", "."] {
        assert_eq!(parse_duration(text), None, "{text}");
    }
    for (text, bytes) in [("64KiB", 65_536), ("10MB", 10_000_000), ("1GiB", 1 << 30), ("7", 7), ("2k", 2048)] {
        assert_eq!(parse_size(text), Some(bytes), "{text}");
    }
    for text in ["", "KiB", "-1", "1.5GiB", "99999999999GiB"] {
        assert_eq!(parse_size(text), None, "{text}");
    }
}

#[test]
fn urls_name_a_server_and_a_port_that_there_is() {
    let parsed = |text| parse_url(text, &["http://"]).map_err(|error| error.to_string());
    for (text, port) in [
        ("http://127.0.0.1:8080/status", Some(8080)),
        ("HTTP://proxy:65535", Some(65535)),
        ("http://[::1]:80?x", Some(80)),
        ("http://proxy/a:b", None),
        ("http://user:1@proxy", None),
        ("http://[::1]", None),
    ] {
        assert_eq!(parsed(text).unwrap().port_u16(), port, "{text}");
    }
    for text in ["127.0.0.1:8080/status", "localhost:8080", "proxy", "", "https://proxy", "http:proxy", "\u{1f600}"] {
        assert_eq!(parsed(text).unwrap_err(), "expected a URL that begins with http://", "{text}");
    }
    for text in [
        "http://127.0.0.1:99999",
        "http://127.0.0.1:65536/status",
        "http://proxy:",
        "http://proxy:0",
        "http://proxy:http",
        "http://[::1]:99999",
        "http://user:1@proxy:99999",
        "http://",
        "http://:80",
        "http://a b",
    ] {
        let error = parsed(text).unwrap_err();
        assert!(error.contains("a host after http://") && error.contains("1 to 65535"), "{text}: {error}");
    }
    let both = parse_url("ftp://x", &["http://", "https://"]).unwrap_err().to_string();
    assert_eq!(both, "expected a URL that begins with http:// or https://");
}

#[test]
fn a_public_engine_without_tls_is_warned_about() {
    let warned = |vars: &[(&str, &str)]| !config(vars).unwrap().1.is_empty();
    assert!(warned(&[("DOCKER_HOST", "tcp://198.51.100.7:2375")]));
    assert!(warned(&[("DOCKER_HOST", "http://[2001:db8::1]:2375")]));
    assert!(!warned(&[("DOCKER_HOST", "tcp://198.51.100.7:2376"), ("DOCKER_TLS_VERIFY", "1")]));
    for host in ["tcp://10.0.0.1:2375", "tcp://[::1]:2375", "tcp://docker-api:2375", "unix:///run/docker.sock"] {
        assert!(!warned(&[("DOCKER_HOST", host)]), "{host}");
    }
}

#[test]
fn unknown_variables_get_the_nearest_name() {
    let (_, warnings) = config(&[("PROXY_DRAIN_TIMOUT", "5s"), ("PROXY_ZZZZZZZZZZ", "1"), ("OTHER", "x")]).unwrap();
    let text: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(text.len(), 2, "{text:?}");
    assert!(text[0].contains("did you mean PROXY_DRAIN_TIMEOUT"), "{text:?}");
    assert!(text[1].contains("--help"), "{text:?}");
}
