//! Engines of which one part fails while the others work.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_list_that_fails_silences_no_event() {
    for (status, body) in [
        ("500 Internal Server Error", r#"{"message":"No such container: x"}"#),
        ("403 Forbidden", "{}"),
        ("200 OK", "<html>"),
        ("200 OK", "[{\"Id\":7}]"),
    ] {
        let (mut engine, stream) = FakeEngine::synced(&["a", "b"]).await;
        engine.change(|script| script.failing.push(("/containers/json", status, body)));
        drop(stream); // makes it list
        // The attempts are seconds apart after some failures.
        for _ in 0..8 {
            let error = engine.next().await;
            assert!(error.starts_with("error cannot list"), "{error}");
        }
        let mut last = None;
        while let Ok(Some(stream)) = timeout(Duration::from_millis(100), engine.streams.recv()).await {
            last = Some(stream);
        }
        let stopped_at = Instant::now();
        last.unwrap().send(&event("a", "kill", 9)).await;
        let changes = engine.until("stopping a").await;
        assert!(changes.is_empty() && stopped_at.elapsed() < Duration::from_secs(1), "{status}: {changes:?}");
        engine.change(|script| script.failing.clear());
        let changes = engine.until("reset a b").await;
        assert!(changes.iter().any(|change| change == "upsert b"), "{changes:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_that_names_containers_twice_leaves_none_out() {
    let ids: Vec<&'static str> =
        (0..CONTAINERS_MAX).map(|n| &*Box::leak(format!("c{n:04}").into_boxed_str())).collect();
    let mut engine = FakeEngine::new(&ids);
    engine.change(|script| {
        // Another entry of the same container.
        for n in 0..100 {
            let mut twin = container("twin", "running");
            twin["listed"] = json!({ "Id": "c0000", "Names": ["/c0000"] });
            script.containers.insert(&*Box::leak(format!("a{n:04}").into_boxed_str()), twin);
        }
    });
    engine.listen();
    let mut seen = HashSet::new();
    loop {
        match engine.next().await {
            change if change.starts_with("reset") => break,
            change => assert!(change.starts_with("upsert") && seen.insert(change.clone()), "{change}"),
        }
    }
    assert_eq!(seen.len(), CONTAINERS_MAX);
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_one_network_of_several_cuts_nothing_before_a_look() {
    let mut engine = FakeEngine::new(&["self", "a"]);
    PLACE.set(Standing { candidates: vec!["self".to_owned()], is_inside: true });
    let networks = |names: &[(&str, &str)]| -> Value {
        let settings = |(n, (_, ip)): (usize, &(&str, &str))| json!({ "NetworkID": format!("n{n}"), "IPAddress": ip });
        names
            .iter()
            .enumerate()
            .map(|each| (each.1.0.to_owned(), settings(each)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let both = [("app", "203.0.113.2"), ("back", "198.51.100.2")];
    engine.change(|script| {
        let mut own = container("self", "running");
        own["listed"] = json!({ "Id": null });
        own["NetworkSettings"]["Networks"] = networks(&[("app", "203.0.113.9"), ("back", "198.51.100.9")]);
        script.containers.insert("self", own);
    });
    set(&engine, "a", |json| json["NetworkSettings"]["Networks"] = networks(&both));
    engine.listen();
    engine.until("reset a").await;
    let mut stream = engine.stream().await;
    let left = |network: &str, at_s: i64| {
        json!({
            "Type": "network", "Action": "disconnect", "timeNano": (STARTED_S + at_s) * SECOND,
            "Actor": { "ID": network, "Attributes": { "container": "a", "name": network } },
        })
        .to_string()
    };
    // The address in use may be the other one: what is left is in the next look.
    set(&engine, "a", |json| {
        json["NetworkSettings"]["Networks"] = json!({ "back": { "NetworkID": "n1", "IPAddress": "198.51.100.2" } });
    });
    stream.send(&left("n0", 1)).await;
    assert_eq!(engine.next().await, "upsert a");
    stream.send(&left("n1", 2)).await;
    assert_eq!(engine.next().await, "detached a", "the last one");
}
