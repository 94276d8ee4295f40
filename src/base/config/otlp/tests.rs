use super::*;
use crate::base::config::Config;

fn resolved(vars: &[(&str, &str)]) -> Option<OtlpSettings> {
    Config::from_vars(vars.iter().copied()).unwrap().0.otlp
}

fn urls(vars: &[(&str, &str)]) -> [String; 2] {
    let settings = resolved(vars).unwrap();
    let show = |c: Collector| format!("{:?} {}", c.protocol, c.url);
    [settings.traces.map(|t| show(t.collector)), settings.metrics.map(|m| show(m.collector))]
        .map(Option::unwrap_or_default)
}

const COMMON: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

#[test]
fn nothing_is_exported_unless_somebody_is_named() {
    assert_eq!(resolved(&[]), None);
    assert_eq!(resolved(&[("OTEL_SERVICE_NAME", "x"), ("OTEL_TRACES_SAMPLER", "always_on")]), None);
    assert_eq!(resolved(&[(COMMON, "http://c:4317"), ("OTEL_SDK_DISABLED", "true")]), None);
    let off = [("OTEL_TRACES_EXPORTER", "none"), ("OTEL_METRICS_EXPORTER", "none"), (COMMON, "http://c")];
    assert_eq!(resolved(&off), None);
    assert!(resolved(&off[1..]).unwrap().metrics.is_none());
}

#[test]
fn the_port_decides_what_is_spoken_unless_it_is_said() {
    let traces = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let metrics = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export";
    assert_eq!(
        urls(&[(COMMON, "http://c:4317")]),
        [format!("Grpc http://c:4317{traces}"), format!("Grpc http://c:4317{metrics}")]
    );
    assert_eq!(
        urls(&[(COMMON, "http://c:4318/base/")]),
        ["HttpProtobuf http://c:4318/base/v1/traces", "HttpProtobuf http://c:4318/base/v1/metrics"]
    );
    assert_eq!(
        urls(&[(COMMON, "https://c"), ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc")]),
        ["HttpProtobuf https://c/v1/traces".to_owned(), format!("Grpc https://c{metrics}")]
    );
    assert_eq!(
        urls(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:9/x?y"), (COMMON, "http://d:4317")]),
        ["HttpProtobuf http://c:9/x?y".to_owned(), format!("Grpc http://d:4317{metrics}")]
    );
    assert_eq!(urls(&[("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://c:9")]), ["", "HttpProtobuf http://c:9/"]);
}

#[test]
fn what_is_said_of_one_kind_counts_more() {
    let vars = [
        (COMMON, "http://c:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b , X-Other=1"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "api-key=m"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "500"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
    ];
    let OtlpSettings { traces, metrics, .. } = resolved(&vars).unwrap();
    let (traces, metrics) = (traces.unwrap().collector, metrics.unwrap().collector);
    let pairs = |c: &Collector| -> Vec<String> {
        c.headers.0.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    };
    assert_eq!(pairs(&traces), ["api-key: a b", "x-other: 1"]);
    assert_eq!(pairs(&metrics), ["api-key: m"]);
    assert_eq!((traces.timeout.as_millis(), metrics.timeout.as_millis()), (500, 2000));
    assert_eq!((traces.gzip, metrics.gzip), (true, false));
}

#[test]
fn samplers_and_resources() {
    let sampler = |vars: &[(&str, &str)]| {
        let vars: Vec<_> = vars.iter().copied().chain([(COMMON, "http://c")]).collect();
        resolved(&vars).unwrap().traces.unwrap().sampler
    };
    assert_eq!(sampler(&[]), Sampler { parent_based: true, ratio: 1.0 });
    let ratio = [("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.25")];
    assert_eq!(sampler(&ratio), Sampler { parent_based: false, ratio: 0.25 });
    let off = [("OTEL_TRACES_SAMPLER", "parentbased_always_off")];
    assert_eq!(sampler(&off), Sampler { parent_based: true, ratio: 0.0 });

    let resource = |vars: &[(&str, &str)]| {
        let vars: Vec<_> = vars.iter().copied().chain([(COMMON, "http://c")]).collect();
        let pairs = resolved(&vars).unwrap().resource;
        pairs.into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
    };
    assert_eq!(resource(&[]), ["service.name=inference-proxy"]);
    let given = ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=a%2Cb,service.name=mine");
    assert_eq!(resource(&[given]), ["service.name=mine", "deployment.environment.name=a,b"]);
    assert_eq!(resource(&[given, ("OTEL_SERVICE_NAME", "ours")])[0], "service.name=ours");
}

#[test]
fn bad_values_are_refused_and_keys_not_repeated() {
    for (name, value) in [
        (COMMON, "collector:4317"),
        (COMMON, "ftp://collector"),
        (COMMON, "http://127.0.0.1:99999"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://[::1]:70000/v1/traces"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://collector:/"),
        (COMMON, "http://user:secret@collector"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "a=secret\u{7f}"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-1"),
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_SDK_DISABLED", "perhaps"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a"),
    ] {
        let error = Config::from_vars([(name, value)]).unwrap_err();
        assert_eq!(error.name, name);
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    let vars = [(COMMON, "http://c"), ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret")];
    let text = format!("{:?}", Config::from_vars(vars).unwrap());
    assert!(text.contains("api-key") && !text.contains("secret"), "{text}");
}

fn warned(vars: &[(&str, &str)]) -> Vec<String> {
    let warnings = Config::from_vars(vars.iter().copied()).unwrap().1;
    warnings.iter().map(ToString::to_string).collect()
}

#[test]
fn misspelt_names_get_the_nearest_one() {
    for (name, meant) in [
        ("OTEL_EXPORTER_OTLP_ENDPONT", "did you mean OTEL_EXPORTER_OTLP_ENDPOINT?"),
        ("OTEL_EXPORTER_OLTP_ENDPOINT", "did you mean OTEL_EXPORTER_OTLP_ENDPOINT?"),
        ("OTEL_EXPORTER_OTLP_TRACE_HEADERS", "did you mean OTEL_EXPORTER_OTLP_TRACES_HEADERS?"),
        ("OTEL_EXPORTER_OTLP_SOMETHING_ELSE_ALTOGETHER", "--help lists all"),
    ] {
        let warned = warned(&[(name, "http://secret")]);
        assert_eq!(warned.len(), 1, "{warned:?}");
        assert!(warned[0].starts_with(&format!("{name} is not")) && warned[0].ends_with(meant), "{warned:?}");
        assert!(!warned[0].contains("secret"), "{warned:?}");
    }
}

#[test]
fn what_is_not_used_is_said_in_one_line_and_other_programs_are_left_alone() {
    let used: Vec<(&str, &str)> = KNOBS.iter().map(|knob| (knob.name, knob.default)).collect();
    assert_eq!(warned(&used), [""; 0]);
    let usual = [
        ("OTEL_PROPAGATORS", "tracecontext, Baggage"),
        ("OTEL_LOGS_EXPORTER", "none"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "CUMULATIVE"),
    ];
    assert_eq!(warned(&usual), [""; 0]);
    let others = [("OTEL_PYTHON_LOG_CORRELATION", "true"), ("OTEL_BLRP_SCHEDULE_DELAY", "1"), ("OTEL_X", "y")];
    assert_eq!(warned(&others), [""; 0]);
    let unused = [
        ("OTEL_PROPAGATORS", "tracecontext,b3"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "key.pem"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://secret"),
    ];
    let warned = warned(&unused);
    assert_eq!(warned.len(), 1, "{warned:?}");
    for (name, value) in unused {
        assert!(warned[0].contains(name) && !warned[0].contains(value), "{warned:?}");
    }
}

#[test]
fn a_path_that_is_added_and_was_there_is_warned_about() {
    for (vars, expected) in [
        (&[(COMMON, "http://c:4318/v1/traces")][..], 1),
        (&[(COMMON, "http://c:4318/base/v1/metrics/"), ("OTEL_METRICS_EXPORTER", "none")], 1),
        (&[(COMMON, "http://c:4318/base")], 0),
        (&[(COMMON, "http://c:4317/v1/traces")], 0),
        (&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4318/v1/traces")], 0),
    ] {
        let warned = warned(vars);
        assert_eq!(warned.len(), expected, "{vars:?}: {warned:?}");
        assert!(warned.iter().all(|text| text.contains("OTEL_EXPORTER_OTLP_ENDPOINT ends in /v1/")), "{warned:?}");
    }
}

#[test]
fn a_collectors_place_shows_nothing_that_may_be_a_key() {
    for (url, place) in [
        ("https://c:4318/v1/traces?api-key=secret", "c:4318/v1/traces"),
        ("https://c/receiver/v1/otlp/ZaVnC4dh/v1/traces", "c/…/v1/otlp/…/v1/traces"),
        ("https://c/v1/traces/v1/traces", "c/v1/traces/v1/traces"),
    ] {
        let vars = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", url)];
        assert_eq!(resolved(&vars).unwrap().traces.unwrap().collector.place(), place);
    }
}
