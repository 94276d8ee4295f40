//! Engines that answer oddly: with other types, now and then, or half.

use super::*;
use crate::control::discovery::Incarnation;

fn odd_values() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!(7),
        json!(-1),
        json!(1e300),
        json!("odd"),
        json!(""),
        json!([]),
        json!(["x", 7]),
        json!({}),
        json!({ "x": 1 }),
    ]
}

/// Pointers to all nodes of a value.
fn nodes(value: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(n, value)| (n.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    let mut all = vec![String::new()];
    for (name, child) in children {
        let name = name.replace('~', "~0").replace('/', "~1");
        all.extend(nodes(child).into_iter().map(|below| format!("/{name}{below}")));
    }
    all
}

/// A container on the network of the proxy, which is in a container too.
fn on_network(id: &str, address: &str) -> Value {
    let mut json = container(id, "running");
    json["State"]["Health"] =
        json!({ "Status": "healthy", "FailingStreak": 0, "Log": [{ "Start": "x", "ExitCode": 0 }] });
    json["Config"]["ExposedPorts"] = json!({ "30000/tcp": {} });
    json["Config"]["Labels"]["other"] = "x".into();
    json["Config"]["StopSignal"] = "SIGTERM".into();
    json["Config"]["StopTimeout"] = json!(10);
    json["NetworkSettings"]["Networks"] = json!({
        "app": { "NetworkID": "n1", "IPAddress": address, "GlobalIPv6Address": "", "Gateway": "203.0.113.1", "GwPriority": 0 },
    });
    json
}

async fn in_containers() -> (FakeEngine, Stream) {
    PLACE.set(Standing { candidates: vec!["self".to_owned()], is_inside: true });
    let mut engine = FakeEngine::new(&[]);
    let mut own = on_network("self", "203.0.113.9");
    own["Config"]["Labels"] = json!({});
    own["listed"] = json!({ "Labels": {} });
    engine.change(|script| {
        script.containers.insert("a", on_network("a", "203.0.113.77"));
        script.containers.insert("self", own);
    });
    engine.listen();
    engine.until("reset a").await;
    let stream = engine.stream().await;
    (engine, stream)
}

/// Values that mean something, and something else than before.
fn is_news(node: &str, value: &Value) -> bool {
    match node {
        "/State/Status" => false,
        "/NetworkSettings/Networks" => value.is_object(),
        "/NetworkSettings/Networks/app" => value.is_object(),
        "/NetworkSettings/Networks/app/IPAddress" => value.is_null() || value == "",
        "/NetworkSettings/Networks/app/NetworkID" => value == "odd",
        "/Config/Labels/inference.enable" => value.is_string(),
        "/Config/ExposedPorts" => value.is_object() || value.is_null(),
        _ => false,
    }
}

#[tokio::test(start_paused = true)]
async fn no_field_of_another_type_takes_a_container_out_or_moves_it() {
    let (mut engine, mut stream) = in_containers().await;
    let good = on_network("a", "203.0.113.77");
    let mut at_s = 1;
    for node in nodes(&good) {
        for value in odd_values() {
            if is_news(&node, &value) {
                continue;
            }
            let mut odd = good.clone();
            *odd.pointer_mut(&node).unwrap() = value.clone();
            engine.change(|script| drop(script.containers.insert("a", odd)));
            // Each is looked at, and then the good one.
            for is_odd in [true, false] {
                at_s += 1;
                CLOCK_S.set(at_s);
                stream.send(&event("a", "health_status: healthy", at_s)).await;
                // What is no answer at all is tried again later; nothing is told meanwhile.
                if is_odd && node.is_empty() {
                    let quiet = timeout(Duration::from_millis(10), engine.changes.next()).await;
                    assert!(!matches!(quiet, Ok(Some(Ok(Change::Ended(_))))), "{value}");
                    engine.change(|script| drop(script.containers.insert("a", good.clone())));
                    continue;
                }
                let told = loop {
                    match engine.changes.next().await.unwrap().unwrap() {
                        Change::Upsert(endpoint) => break endpoint,
                        Change::Reset(_) | Change::Notes(_) => {}
                        other => panic!("{node} is {value}: {other:?}"),
                    }
                };
                let targets = told.reach.clone().map(|reach| reach.targets);
                let expected = ["203.0.113.77:30000", "203.0.113.77:8000"].map(|target| target.parse().unwrap());
                assert_eq!(targets, Ok(expected.to_vec()), "{node} is {value}");
                assert_eq!(told.incarnation, Incarnation(STARTED_S * SECOND), "{node} is {value}");
                assert!(told.excluded.is_none(), "{node} is {value}");
                engine.change(|script| drop(script.containers.insert("a", good.clone())));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn no_field_of_another_type_in_the_list_hides_a_container() {
    let good = json!({
        "Id": "a", "Names": ["/a"], "Image": "llm", "ImageID": "x", "Command": "c", "Created": 7, "State": "running",
        "Status": "Up", "Labels": { "inference.enable": "true" }, "Ports": [{ "PrivatePort": 8000, "Type": "tcp" }],
        "HostConfig": { "NetworkMode": "bridge" }, "NetworkSettings": { "Networks": {} }, "Mounts": [],
    });
    for node in nodes(&good).into_iter().filter(|node| !node.is_empty() && node != "/Id") {
        for value in odd_values() {
            let mut engine = FakeEngine::new(&["a", "b"]);
            let mut odd = good.clone();
            *odd.pointer_mut(&node).unwrap() = value;
            set(&engine, "a", |json| json["listed"] = odd);
            engine.listen();
            engine.until("reset a b").await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn no_field_of_another_type_ends_the_event_stream() {
    let (mut engine, mut stream) = FakeEngine::synced(&["a", "b"]).await;
    let of_network = json!({
        "Type": "network", "Action": "disconnect", "timeNano": 5, "time": 5, "scope": "local",
        "Actor": { "ID": "n1", "Attributes": { "container": "a", "name": "na", "type": "bridge" } },
    });
    let of_container: Value = serde_json::from_str(&event("a", "health_status: healthy", 1)).unwrap();
    let mut at_s = 1;
    for good in [of_container, of_network] {
        for node in nodes(&good) {
            for value in odd_values() {
                let mut odd = good.clone();
                *odd.pointer_mut(&node).unwrap() = value.clone();
                stream.send(&odd.to_string()).await;
                at_s += 1;
                CLOCK_S.set(at_s);
                stream.send(&event("b", "oom", at_s)).await;
                let changes = engine.until("oom b").await;
                let is_loss = |change: &String| change.starts_with("ended") || change.starts_with("error");
                assert!(!changes.iter().any(is_loss), "{node} is {value}: {changes:?}");
                assert!(engine.streams.try_recv().is_err(), "{node} is {value}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_answers_every_third_time_loses_no_container_and_keeps_none_that_is_gone() {
    for every in [2, 3] {
        // From the beginning.
        let mut engine = FakeEngine::new(&["a", "b"]);
        engine.change(|script| script.answers_every = Some(every));
        engine.listen();
        let began_at = Instant::now();
        for id in ["a", "b"] {
            let within = Duration::from_secs(120).saturating_sub(began_at.elapsed());
            let reached = timeout(within, reached(&mut engine, id)).await;
            assert!(reached.is_ok(), "{every}: {id} is not reached within two minutes");
        }
        // Ten minutes later nothing is lost.
        let began_at = Instant::now();
        while began_at.elapsed() < Duration::from_secs(600) {
            let change = engine.next().await;
            assert!(!change.starts_with("ended"), "{every}: {change}");
            if let Some(listed) = change.strip_prefix("reset ") {
                assert_eq!(listed, "a b", "{every}");
            }
        }
        engine.change(|script| {
            script.containers.remove("a");
            script.containers.insert("c", container("c", "running"));
        });
        let mut missing = HashSet::from(["ended a", "upsert c"]);
        let began_at = Instant::now();
        while !missing.is_empty() {
            missing.remove(&*engine.next().await);
            assert!(began_at.elapsed() < Duration::from_secs(180), "{every}: {missing:?}");
        }
    }
}

async fn reached(engine: &mut FakeEngine, id: &str) {
    loop {
        match timeout(Duration::from_secs(300), engine.changes.next()).await.unwrap().unwrap() {
            Ok(Change::Upsert(endpoint)) if &*endpoint.id == id && endpoint.reach.is_ok() => return,
            Ok(Change::Reset(endpoints)) if endpoints.iter().any(|e| &*e.id == id && e.reach.is_ok()) => return,
            _ => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_breaks_off_proves_nothing() {
    for path in ["/containers/json", "/a/json"] {
        let (mut engine, mut stream) = FakeEngine::synced(&["a", "b"]).await;
        engine.change(|script| script.breaks_off = Some(path));
        stream.send(&event("a", "health_status: healthy", 1)).await;
        stream.send(r#"{"Type":"container","Action":"die","Actor":{"ID":"a""#).await;
        drop(stream);
        let began_at = Instant::now();
        while began_at.elapsed() < Duration::from_secs(60) {
            let change = engine.next().await;
            assert!(!change.starts_with("ended") && change != "reset b", "{path}: {change}");
        }
        engine.change(|script| script.breaks_off = None);
        engine.until("reset a b").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_that_could_not_be_looked_at_is_looked_at_again_soon_and_then_less_often() {
    let mut engine = FakeEngine::new(&["a", "b"]);
    engine.change(|script| script.failing.push(("/a/json", "500 Oh", "{}")));
    engine.listen();
    engine.until("reset a b").await;
    let mut stream = engine.stream().await;
    engine.change(|script| script.failing.clear());
    let began_at = Instant::now();
    reached(&mut engine, "a").await;
    assert!(began_at.elapsed() < Duration::from_secs(2), "{:?}", began_at.elapsed());
    // One that never can be looked at is not asked for all the time.
    engine.change(|script| {
        script.containers.insert("c", container("c", "running"));
        script.failing.push(("/c/json", "403 Forbidden", "{}"));
    });
    stream.send(&event("c", "start", 1)).await;
    engine.until("reset a b c").await;
    let _ = timeout(Duration::from_secs(300), async { while engine.changes.next().await.is_some() {} }).await;
    engine.change(|script| {
        let asked = script.asked.iter().filter(|path| path.contains("/c/json")).count();
        assert!(asked < 30, "{asked}");
    });
}

#[tokio::test(start_paused = true)]
async fn signals_of_one_second_are_told_apart_where_time_has_no_more_digits() {
    let (mut engine, mut stream) = FakeEngine::synced(&["a"]).await;
    let kill = |signal: &str| {
        json!({
            "Type": "container", "Action": "kill", "time": STARTED_S + 1,
            "Actor": { "ID": "a", "Attributes": { "inference.enable": "true", "signal": signal } },
        })
        .to_string()
    };
    stream.send(&kill("1")).await;
    engine.until("upsert a").await;
    stream.send(&kill("15")).await;
    assert_eq!(engine.next().await, "stopping a");
}

#[tokio::test(start_paused = true)]
async fn what_a_proxy_lists_without_the_filter_takes_no_room() {
    let mut ids: Vec<&'static str> = (0..1_500).map(|n| &*Box::leak(format!("c{n:04}").into_boxed_str())).collect();
    ids.push("z");
    let mut engine = FakeEngine::new(&ids);
    engine.change(|script| {
        for (id, json) in &mut script.containers {
            if *id != "z" {
                json["Config"]["Labels"] = json!({ "other": "x" });
                json["listed"] = json!({ "Labels": { "other": "x" } });
            }
        }
    });
    engine.listen();
    engine.until("reset z").await;
}

#[tokio::test(start_paused = true)]
async fn a_list_that_names_a_container_twice_has_it_once() {
    let mut engine = FakeEngine::new(&["a", "b"]);
    set(&engine, "b", |json| json["listed"] = json!({ "Id": "a", "Names": null }));
    engine.listen();
    assert_eq!(engine.until("reset a").await, ["upsert a"]);
}

#[tokio::test(start_paused = true)]
async fn a_port_that_is_published_on_what_is_no_address_is_published_nowhere() {
    for (host_ip, host_port, is_reached) in [
        (json!(""), json!("8000"), true),
        (json!(null), json!("8000"), true),
        (json!("0.0.0.0"), json!(8000), true),
        (json!("odd"), json!("8000"), false),
        (json!("fe80::1%eth0"), json!("8000"), false),
        (json!(""), json!("0"), false),
        (json!(""), json!(""), false),
        (json!(""), json!("70000"), false),
        (json!(""), json!("-1"), false),
    ] {
        let mut engine = FakeEngine::new(&["a"]);
        set(&engine, "a", |json| {
            json["NetworkSettings"]["Ports"]["8000/tcp"] = json!([{ "HostIp": host_ip, "HostPort": host_port }]);
        });
        engine.listen();
        let reach = upserted(&mut engine, "a").await.reach;
        assert_eq!(reach.is_ok(), is_reached, "{host_ip} {host_port}: {reach:?}");
    }
}
