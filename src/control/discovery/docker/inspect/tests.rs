//! Answers of engines of all ages, read.

use super::*;

fn inspected(change: impl FnOnce(&mut serde_json::Value)) -> Inspected {
    let mut json = serde_json::json!({
        "Id": "c1", "Name": "/vllm", "Image": "sha256:0",
        "State": { "Status": "running", "Running": true, "StartedAt": "2026-01-01T00:00:01.000000005Z",
                   "Health": { "Status": "healthy" } },
        "Config": { "Image": "vllm/vllm-openai", "Env": ["HF_TOKEN=secret"], "ExposedPorts": { "8000/tcp": {}, "53/udp": {} },
                    "Labels": { "inference.enable": "true", "com.docker.compose.project": "app" } },
        "HostConfig": { "NetworkMode": "app_default" },
        "NetworkSettings": { "Ports": { "8000/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "32768" }] },
            "Networks": { "app_default": { "NetworkID": "n1", "IPAddress": "172.18.0.2", "Gateway": "172.18.0.1" } } },
    });
    change(&mut json);
    Inspected::read("c1", &json).unwrap()
}

#[test]
fn a_binding_that_cannot_be_read_is_no_binding() {
    let published = |port: &str, host_ip: Value, host_port: Value| {
        let binding = serde_json::json!({ "HostIp": host_ip, "HostPort": host_port });
        let ports = serde_json::json!({ port: [binding, null, "0.0.0.0:8000"] });
        let published = inspected(|json| json["NetworkSettings"]["Ports"] = ports).wiring.published;
        published.iter().map(|p| format!("{:?}:{}", p.host_ip, p.host_port)).collect::<Vec<_>>().join(" ")
    };
    let text = |text: &str| Value::from(text);
    for (port, host_ip, host_port, expected) in [
        ("8000/tcp", text("0.0.0.0"), text("18000"), "Some(0.0.0.0):18000"),
        ("8000", text(""), text("18000"), "None:18000"),
        ("8000/TCP", Value::Null, Value::from(18000), "None:18000"),
        ("8000/tcp", text("[::1]"), text("18000"), "Some(::1):18000"),
        // Somebody else may be behind all addresses.
        ("8000/tcp", text("fe80::1%eth0"), text("18000"), ""),
        ("8000/tcp", text("localhost"), text("18000"), ""),
        ("8000/tcp", Value::from(7), text("18000"), ""),
        ("8000/tcp", text("0.0.0.0"), text("0"), ""),
        ("8000/tcp", text("0.0.0.0"), text(""), ""),
        ("8000/tcp", text("0.0.0.0"), text("65536"), ""),
        ("8000/tcp", text("0.0.0.0"), text("18000-18010"), ""),
        ("8000/tcp", text("0.0.0.0"), Value::from(-1), ""),
        ("8000/quic", text("0.0.0.0"), text("18000"), ""),
        ("0/tcp", text("0.0.0.0"), text("18000"), ""),
    ] {
        assert_eq!(published(port, host_ip.clone(), host_port.clone()), expected, "{port} {host_ip} {host_port}");
    }
}

#[test]
fn an_answer_about_another_container_is_none() {
    let (id, other) = ("a".repeat(64), "b".repeat(64));
    let answer = |told: Value| serde_json::json!({ "Id": told, "State": { "Status": "running" }, "Config": {} });
    let read = |asked: &str, told: Value| Inspected::read(asked, &answer(told)).map(|seen| seen.id);
    assert_eq!(read(&id, id.clone().into()), Some(id.clone()));
    assert_eq!(read(&id, Value::Null), Some(id.clone()));
    assert_eq!(read(&id, other.clone().into()), None);
    // What is asked for by its name or the beginning of its id is told by its whole id.
    assert_eq!(read(&id[..12], id.clone().into()), Some(id.clone()));
    assert_eq!(read("llm", other.clone().into()), Some(other));
}

#[test]
fn names_that_mislead_are_told_escaped_and_short() {
    let seen = inspected(|json| {
        json["Name"] = "/llm\u{1b}[31m\nready".into();
        json["Config"]["Image"] = "x".repeat(10_000).into();
    });
    assert_eq!(seen.name, "llm\\u{1b}[31m\\nready");
    assert_eq!(seen.image.chars().count(), 256);
}

fn context() -> Context {
    let own = Attachment {
        name: "app_default".into(),
        id: "n1".into(),
        ipv4: Some([172, 18, 0, 9].into()),
        ipv6: None,
        gateway: None,
        gw_priority: 0,
    };
    let vantage = Vantage::Container { attachments: vec![own], host_network: false, host_gateway: None };
    Context {
        vantage,
        self_id: Some("self".into()),
        default_network: None,
        own_ports: vec![8080],
        own_published: Vec::new(),
        is_placed: true,
        untold: None,
        shared: None,
    }
}

#[test]
fn containers_of_one_compose_service_or_of_one_name_stand_for_each_other() {
    let role = |change: fn(&mut serde_json::Value)| {
        let endpoint = inspected(change).endpoint(&context()).unwrap();
        (endpoint.role.to_string(), endpoint.is_stopped_first)
    };
    let unnamed = |json: &mut serde_json::Value| {
        json["Config"]["Labels"].as_object_mut().unwrap().remove("com.docker.compose.project");
    };
    assert_eq!(role(unnamed), ("vllm".to_owned(), false));
    let service = |json: &mut serde_json::Value| {
        json["Name"] = "/3f2a_app-llm-1".into();
        json["Config"]["Labels"]["com.docker.compose.service"] = "llm".into();
    };
    assert_eq!(role(service), ("app/llm".to_owned(), true));
}

#[test]
fn a_running_container_becomes_an_endpoint() {
    let look = inspected(|_| {});
    let endpoint = look.endpoint(&context()).unwrap();
    assert_eq!((endpoint.name.as_str(), endpoint.phase, endpoint.health), ("vllm", Phase::Running, Health::Healthy));
    assert_eq!(endpoint.incarnation, Incarnation(1_767_225_601_000_000_005));
    assert_eq!(endpoint.reach.unwrap().targets, ["172.18.0.2:8000".parse().unwrap()]);
    assert_eq!((look.stop_signal, endpoint.stop_grace, endpoint.excluded), (15, STOP_GRACE, None));
    assert!(!format!("{look:?}").contains("secret"));
}

#[test]
fn states_and_health_are_read_as_the_engine_means_them() {
    for (status, phase) in [
        ("paused", Phase::Paused),
        ("restarting", Phase::Restarting),
        ("exited", Phase::Stopped),
        ("dead", Phase::Stopped),
    ] {
        assert_eq!(inspected(|json| json["State"]["Status"] = status.into()).phase, phase);
    }
    assert_eq!(inspected(|json| json["State"]["Health"] = serde_json::Value::Null).health, Health::None);
    assert_eq!(inspected(|json| json["State"]["Health"]["Status"] = "none".into()).health, Health::None);
    assert_eq!(inspected(|json| json["Config"]["StopSignal"] = "SIGQUIT".into()).stop_signal, 3);
    assert_eq!(inspected(|json| json["State"]["StartedAt"] = "0001-01-01T00:00:00Z".into()).started_nanos, 0);
    assert_eq!(nanos("2026-01-01T02:00:01+02:00"), Some(1_767_225_601_000_000_000));
}

#[test]
fn words_for_health_that_are_not_known_are_no_bad_verdict() {
    for (word, health) in [
        (None, Health::None),
        (Some(""), Health::None),
        (Some(" "), Health::None),
        (Some("none"), Health::None),
        (Some("starting"), Health::Starting),
        (Some("healthy"), Health::Healthy),
        (Some("unhealthy"), Health::Unhealthy),
        (Some("reset"), Health::Unknown),
        (Some("stopped"), Health::Unknown),
        (Some("HEALTHY!"), Health::Unknown),
    ] {
        assert_eq!(verdict(&serde_json::json!({ "Status": word })), health, "{word:?}");
        assert_eq!(verdict(&serde_json::json!(word)), health, "{word:?}");
    }
    for odd in [serde_json::json!(["reset"]), serde_json::json!(7), serde_json::json!({ "Status": {} })] {
        assert_eq!(verdict(&odd), Health::Unknown, "{odd}");
    }
}

#[test]
fn a_health_check_is_overdue_by_its_own_times_and_each_check_leaves_a_mark() {
    let overdue_after = |check: serde_json::Value| {
        inspected(|json| json["Config"]["Healthcheck"] = check).health_check.overdue_after.as_secs()
    };
    let s = 1_000_000_000_i64;
    assert_eq!(overdue_after(serde_json::Value::Null), 90, "30 s each, as Docker does");
    assert_eq!(overdue_after(serde_json::json!({})), 90);
    assert_eq!(overdue_after(serde_json::json!({ "Interval": 0, "Timeout": 0, "StartPeriod": 0 })), 90);
    assert_eq!(overdue_after(serde_json::json!({ "Interval": 5 * s, "Timeout": 3 * s, "StartPeriod": 600 * s })), 613);
    assert_eq!(overdue_after(serde_json::json!({ "Interval": -5 * s, "Timeout": -1 })), 90);
    let longest = serde_json::json!({ "Interval": i64::MAX, "Timeout": i64::MAX, "StartPeriod": i64::MAX });
    assert_eq!(overdue_after(longest), foreign::FOREVER.as_secs());

    let mark = |health: serde_json::Value| inspected(|json| json["State"]["Health"] = health).health_check.mark;
    let check =
        |end: &str, code: i64| serde_json::json!({ "Start": "2026-01-01T00:00:00Z", "End": end, "ExitCode": code });
    let healthy = |streak: i64, log: serde_json::Value| {
        mark(serde_json::json!({ "Status": "healthy", "FailingStreak": streak, "Log": log }))
    };
    let (one, two) = (check("2026-01-01T00:00:01Z", 0), check("2026-01-01T00:00:02Z", 0));
    let first = healthy(0, serde_json::json!([one]));
    assert_eq!(first, healthy(0, serde_json::json!([one])));
    for later in [
        healthy(0, serde_json::json!([one, two])),
        healthy(0, serde_json::json!([two])),
        healthy(1, serde_json::json!([one])),
        healthy(0, serde_json::json!([check("2026-01-01T00:00:01Z", 1)])),
        healthy(0, serde_json::Value::Null),
    ] {
        assert_ne!(first, later);
    }
}

#[test]
fn every_grace_is_bounded_and_minus_one_is_for_ever() {
    let grace = |seconds: i64| inspected(|json| json["Config"]["StopTimeout"] = seconds.into()).stop_grace;
    for (seconds, taken) in
        [(0, Duration::ZERO), (1, Duration::from_secs(1)), (-1, foreign::FOREVER), (i64::MIN, foreign::FOREVER)]
    {
        assert_eq!(grace(seconds), taken, "{seconds}");
    }
    for seconds in [i64::MAX, i64::MAX / 1_000_000_000, 1 << 40] {
        assert_eq!(grace(seconds), foreign::FOREVER, "{seconds}");
    }
}

#[test]
fn runs_are_told_apart_whatever_their_time_is() {
    let started = |text: &str| inspected(|json| json["State"]["StartedAt"] = text.into()).started_nanos;
    let odd = ["9999-12-31T23:59:59Z", "9999-12-31T23:59:58Z", "yesterday", "", "2026-13-01T00:00:00Z"];
    for (n, text) in odd.iter().enumerate() {
        assert_eq!(started(text), started(text));
        assert!(started(text) < 0, "{text:?} has no place among times");
        assert!(odd[..n].iter().all(|other| started(other) != started(text)), "{text:?}");
    }
}

#[test]
fn what_must_not_be_routed_says_why() {
    let own = inspected(|json| json["Id"] = "self".into()).endpoint(&context()).unwrap();
    assert!(own.excluded.unwrap().what.contains("this proxy itself"));
    let odd = inspected(|json| json["Config"]["Labels"]["inference.enable"] = "maybe".into());
    assert!(odd.endpoint(&context()).unwrap().excluded.unwrap().what.contains("maybe"));
    let host = inspected(|json| {
        json["HostConfig"]["NetworkMode"] = "host".into();
        json["Config"]["Labels"]["inference.port"] = "8080".into();
    });
    let on_host = Context { vantage: Vantage::Host { on_link: Vec::new() }, ..context() };
    assert!(host.endpoint(&on_host).unwrap().excluded.unwrap().what.contains("own"));
    let unlabelled = inspected(|json| json["Config"]["Labels"] = serde_json::json!({}));
    assert!(unlabelled.endpoint(&context()).is_none());
}

#[test]
fn the_proxy_never_becomes_its_own_backend() {
    let own_published = |host_ip: Option<&str>| {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        vec![Published { container_port: 8080, host_ip, host_port: 9000 }]
    };
    let gateway = |context: Context| {
        let Vantage::Container { attachments, .. } = context.vantage.clone() else { panic!("in a container") };
        let host_gateway = Some("172.18.0.1".parse().unwrap());
        Context { vantage: Vantage::Container { attachments, host_network: false, host_gateway }, ..context }
    };
    let with_port = |mode: &str, port: u16, published: serde_json::Value| {
        inspected(|json| {
            json["HostConfig"]["NetworkMode"] = mode.into();
            json["Config"]["Labels"]["inference.port"] = port.to_string().into();
            json["NetworkSettings"]["Ports"] = published;
            json["NetworkSettings"]["Networks"]["app_default"]["IPAddress"] = "172.18.0.9".into();
        })
    };
    let none = || serde_json::json!({});
    let on_8000 =
        |host_ip: &str, port: &str| serde_json::json!({ "8000/tcp": [{ "HostIp": host_ip, "HostPort": port }] });
    let in_container = |published| gateway(Context { own_published: published, ..context() });
    for (what, look, context, is_own) in [
        ("its address, its port", with_port("app_default", 8080, none()), in_container(vec![]), true),
        ("its address, another port", with_port("app_default", 8000, none()), in_container(vec![]), false),
        ("its port, by the gateway", with_port("host", 9000, none()), in_container(own_published(None)), true),
        ("its port on all", with_port("host", 9000, none()), in_container(own_published(Some("0.0.0.0"))), true),
        ("its port elsewhere", with_port("host", 9000, none()), in_container(own_published(Some("192.0.2.1"))), false),
        ("another port", with_port("host", 9001, none()), in_container(own_published(None)), false),
        ("not published", with_port("host", 8080, none()), in_container(vec![]), false),
    ] {
        let excluded = look.endpoint(&context).unwrap().excluded;
        assert_eq!(excluded.is_some_and(|why| why.what.contains("own")), is_own, "{what}");
    }
    // Another container in the proxy's own network namespace.
    let proxy = inspected(|json| {
        json["Id"] = "self".into();
        json["NetworkSettings"]["Networks"]["app_default"]["IPAddress"] = "172.18.0.9".into();
    });
    for (port, is_own) in [(8080, true), (8000, false)] {
        let mut look = with_port("container:self", port, on_8000("0.0.0.0", "8080"));
        look.share_network_of(Some(&proxy), None, look.started_nanos);
        assert_eq!(look.endpoint(&context()).unwrap().excluded.is_some(), is_own, "{port}");
    }
}

#[test]
fn a_network_has_no_effect_where_the_engine_is_elsewhere() {
    let vantage = Vantage::Elsewhere { engine: vec!["203.0.113.5".parse().unwrap()] };
    let elsewhere = Context { vantage, ..context() };
    let endpoint = inspected(|_| {}).endpoint(&elsewhere).unwrap();
    assert_eq!(endpoint.reach.unwrap().targets, ["203.0.113.5:32768".parse().unwrap()]);
    assert!(endpoint.problems.is_empty());
    let wanted = inspected(|json| json["Config"]["Labels"]["inference.network"] = "front".into());
    let endpoint = wanted.endpoint(&elsewhere).unwrap();
    assert!(endpoint.reach.is_ok());
    assert!(
        endpoint.problems.concat().contains("inference.network=\"front\" has no effect"),
        "{:?}",
        endpoint.problems
    );
    let by_default = Context { default_network: Some("front".into()), ..elsewhere };
    let endpoint = inspected(|_| {}).endpoint(&by_default).unwrap();
    assert!(endpoint.reach.is_ok() && endpoint.problems.concat().contains("PROXY_NETWORK"), "{:?}", endpoint.problems);
}

#[test]
fn a_sidecar_is_reached_through_the_owner_of_its_network() {
    let owner = inspected(|json| json["Id"] = "owner".into());
    let sidecar = || {
        inspected(|json| {
            json["HostConfig"]["NetworkMode"] = "container:owner".into();
            json["NetworkSettings"] = serde_json::json!({ "Networks": {} });
        })
    };
    let now = i64::MAX;
    let mut look = sidecar();
    assert_eq!(look.network_owner(), Some("owner"));
    look.share_network_of(Some(&owner), None, now);
    assert_eq!(look.network_owner(), Some("owner"), "its events concern this one, too");
    assert!(look.endpoint(&context()).unwrap().reach.is_ok());
    // an owner that was started again has another network namespace: the sidecar's is dead
    let restarted = inspected(|json| json["State"]["StartedAt"] = "2026-01-01T00:00:02Z".into());
    for owner in [Some(&restarted), None] {
        let mut look = sidecar();
        look.share_network_of(owner, None, now);
        assert!(look.endpoint(&context()).unwrap().reach.is_err());
    }
}

/// Looks at a sidecar and its owner, one after the other; each is the time both were started and that of the clock.
fn reached(looks: &[(i64, i64, i64)]) -> Vec<bool> {
    let mut before = None;
    let look = |(owner_at, own_at, now): &(i64, i64, i64)| {
        let mut owner = inspected(|json| json["Id"] = "owner".into());
        owner.started_nanos = *owner_at;
        let mut sidecar = inspected(|json| {
            json["HostConfig"]["NetworkMode"] = "container:owner".into();
            json["NetworkSettings"] = serde_json::json!({ "Networks": {} });
        });
        sidecar.started_nanos = *own_at;
        sidecar.share_network_of(Some(&owner), before.as_ref(), *now);
        before.clone_from(&sidecar.shared);
        sidecar.endpoint(&context()).unwrap().reach.is_ok()
    };
    looks.iter().map(look).collect()
}

#[test]
fn a_clock_that_was_put_back_parts_no_sidecar_from_its_owner() {
    assert_eq!(reached(&[(10, 11, 20)]), [true]);
    assert_eq!(reached(&[(12, 11, 20)]), [false], "the owner was started again");
    // The owner was started by a clock that was ahead, and that the time catches up with later.
    for ahead in [16, 25, 7_200] {
        assert_eq!(reached(&[(ahead, 11, 15), (ahead, 11, ahead + 1), (ahead, 11, 10_000)]), [true; 3], "{ahead}");
    }
    // Runs that are seen to change need no clock at all.
    assert_eq!(reached(&[(10, 11, 20), (9, 11, 20)]), [true, false], "the owner was started again, by another clock");
    assert_eq!(reached(&[(10, 11, 20), (9, 11, 20), (9, 8, 20)]), [true, false, true], "then the sidecar, too");
    assert_eq!(reached(&[(10, 11, 20), (10, 5, 20)]), [true, true], "the sidecar alone");
    assert_eq!(reached(&[(12, 11, 20), (12, 11, 30)]), [false, false]);
    assert_eq!(reached(&[(-5, 11, 20), (-9, 11, 20)]), [true, false], "times that cannot be read are runs as well");
}
