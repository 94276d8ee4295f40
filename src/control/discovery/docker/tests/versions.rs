//! Engines, or proxies before them, that take some paths only.

use super::*;

#[tokio::test(start_paused = true)]
async fn paths_with_a_version_are_used_where_others_are_refused() {
    let too_new = Some("client version 1.44 is too new. Maximum supported API version is 1.25");
    let too_old = Some("client version 1.44 is too old. Minimum supported API version is 1.59, please upgrade");
    for (prefix, refusal, most) in [
        ("/v1.44", None, 2),
        ("/v1.41", None, 3),
        ("/v1.24", None, 40),
        ("/v1.60", None, 40),
        ("/v1.47", None, 40),
        ("/v1.25", too_new, 3),
        ("/v1.59", too_old, 3),
    ] {
        let mut engine = FakeEngine::new(&["a"]);
        engine.change(|script| (script.prefix, script.refusal) = (prefix, refusal));
        engine.listen();
        let changes = engine.until("reset a").await;
        let note = changes.iter().find(|change| change.starts_with("notes")).expect("it is said");
        assert!(changes.len() <= 3 && note.contains(&format!("those with {} are used", &prefix[1..])), "{changes:?}");
        let lists = |script: &Script| script.asked.iter().filter(|path| path.contains("/containers/json")).count();
        engine.change(|script| assert!(lists(script) <= most, "{:?}", script.asked));
        let mut stream = engine.stream().await;
        stream.send(&event("a", "pause", 1)).await;
        assert_eq!(engine.until("suspended a").await, [""; 0], "{prefix}: events, too");
        engine.change(|script| script.asked.clear());
        // The next list goes there at once.
        engine.until("reset a").await;
        engine.change(|script| assert!(script.asked.iter().all(|path| path.starts_with(prefix)), "{:?}", script.asked));
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_that_works_no_longer_is_replaced() {
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.prefix = "/v1.41");
    engine.listen();
    engine.until("reset a").await;
    for prefix in ["/v1.44", ""] {
        engine.change(|script| script.prefix = prefix);
        engine.change(|script| drop(script.containers.insert("b", container("b", "running"))));
        engine.until("reset a b").await;
        engine.change(|script| drop(script.containers.remove("b")));
        engine.until("reset a").await;
    }
}

#[tokio::test(start_paused = true)]
async fn where_no_path_is_allowed_it_is_said_what_to_allow_and_asked_on() {
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.prefix = "/nowhere");
    engine.listen();
    let error = engine.next().await;
    assert!(error.contains("403") && error.contains("GET /events") && error.contains("/v1.24 to /v1.60"), "{error}");
    engine.change(|script| script.asked.clear());
    for _ in 0..5 {
        engine.next().await;
    }
    engine.change(|script| assert!(script.asked.len() < 40, "not all versions each time: {}", script.asked.len()));
    engine.change(|script| script.prefix = "");
    while engine.next().await != "reset a" {}
}

/// The first of the changes whose notes hold a text.
async fn noted(engine: &mut FakeEngine, text: &str) -> String {
    loop {
        let change = engine.next().await;
        if change.starts_with("notes") && change.contains(text) {
            return change;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn each_kind_of_path_may_need_a_version_of_its_own() {
    const LIST: &str = "/containers/json";
    const INSPECT: &str = "/a/json";
    const EVENTS: &str = "/events";
    for (prefixes, inspect, events) in [
        (vec![(EVENTS, "/v1.44")], "", "/v1.44"),
        (vec![(INSPECT, "/v1.41")], "/v1.41", ""),
        (vec![(EVENTS, "/v1.25"), (INSPECT, "/v1.25")], "/v1.25", "/v1.25"),
        (vec![(LIST, "/v1.44")], "", ""),
        (vec![(LIST, "/v1.44"), (EVENTS, "/v1.41")], "", "/v1.41"),
        (vec![(LIST, "/v1.44"), (INSPECT, "/v1.41"), (EVENTS, "/v1.60")], "/v1.41", "/v1.60"),
    ] {
        let mut engine = FakeEngine::new(&["a"]);
        engine.change(|script| script.prefixes = prefixes.clone());
        engine.listen();
        assert!(upserted(&mut engine, "a").await.reach.is_ok(), "{prefixes:?}");
        let mut stream = loop {
            tokio::select! {
                stream = engine.streams.recv() => break stream.unwrap(),
                change = engine.changes.next() => drop(change.unwrap().unwrap()),
            }
        };
        stream.send(&event("a", "oom", 1)).await;
        engine.until("oom a").await;
        engine.until("reset a").await;
        // From then on every kind goes its own way.
        engine.change(|script| script.asked.clear());
        drop(stream);
        engine.until("reset a").await;
        engine.change(|script| {
            let asked: HashSet<&str> = script.asked.iter().map(String::as_str).collect();
            let (inspected, heard) = (format!("{inspect}/containers/a/json"), format!("{events}/events"));
            assert!(asked.contains(&*inspected) && asked.contains(&*heard), "{prefixes:?}: {asked:?}");
            assert!(asked.len() == 3, "nothing is refused any more: {asked:?}");
        });
    }
}

#[tokio::test(start_paused = true)]
async fn versions_that_differ_are_said_with_what_they_are_for() {
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.prefixes = vec![("/events", "/v1.44")]);
    engine.listen();
    let said = noted(&mut engine, "v1.44 for GET /events").await;
    assert!(said.contains("none for GET /containers/json"), "{said}");
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.prefix = "/v1.44");
    engine.listen();
    let notes = loop {
        if let Ok(Change::Notes(notes)) = engine.changes.next().await.unwrap() {
            break notes;
        }
    };
    assert_eq!(notes[0].advice, None, "nothing needs to be done");
}

#[tokio::test(start_paused = true)]
async fn a_container_that_may_not_be_inspected_has_no_versions_tried_for_it() {
    let mut engine = FakeEngine::new(&["a", "b"]);
    engine.change(|script| script.failing.push(("/a/json", "403 Forbidden", "{}")));
    engine.listen();
    engine.until("reset a b").await;
    engine.change(|script| script.asked.clear());
    for _ in 0..4 {
        engine.until("reset a b").await;
    }
    engine.change(|script| assert!(script.asked.iter().all(|path| !path.starts_with("/v")), "{:?}", script.asked));
}

#[tokio::test(start_paused = true)]
async fn an_error_without_an_end_is_cut_and_its_status_counts() {
    // A page of 1 MiB, of which the engine's words are the start; and one that never ends.
    let page = &*Box::leak(format!("secret {}", "x".repeat(1 << 20)).into_boxed_str());
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.failing.push(("/a/json", "503 Oh", page)));
    engine.listen();
    let reach = upserted(&mut engine, "a").await.reach.unwrap_err();
    assert!(reach.what.contains("the answer was 503") && !reach.what.contains("secret"), "{}", &reach.what[..200]);

    let path = std::env::temp_dir().join(format!("engine-{}-endless.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            let count = count.clone();
            tokio::spawn(async move {
                let head = b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n";
                let _ = connection.write_all(head).await;
                let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
                while connection.write_all(chunk.as_bytes()).await.is_ok() {
                    count.fetch_add(0x10000, Ordering::Relaxed);
                }
            });
        }
    });
    let host = Some(format!("unix://{}", path.display()));
    let endpoint = DockerEndpoint { host, ..DockerEndpoint::default() };
    let client = Engine::connect(&endpoint, Arc::default()).unwrap();
    let asked_at = Instant::now();
    let error = client.list().await.unwrap_err();
    assert!(error.what.contains("the answer was 500"), "{error}");
    assert!(asked_at.elapsed() < ANSWER_TIMEOUT, "its status is there");
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent < 2 << 20, "{sent} bytes were taken");
    let _ = std::fs::remove_file(&path);
}
