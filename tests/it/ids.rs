//! R7: requests that name no model. Those that carry the id of a response go to the backend that made it, however many
//! models and replicas there are; the others go to the only backend there is, or are told why they cannot.

use crate::support::*;

/// A response object, as servers answer `POST /v1/responses`.
fn object(id: &str) -> String {
    format!(
        r#"{{"id":"{id}","object":"response","created_at":1,"model":"m","output":[{{"id":"msg_{id}","type":"message","content":[{{"type":"output_text","text":"\"id\":\"resp_decoy\""}}]}}]}}"#
    )
}

/// The event that begins a streamed response.
fn created(id: &str) -> String {
    format!(
        "event: response.created\ndata: {{\"type\":\"response.created\",\"sequence_number\":0,\"response\":{}}}\n\n",
        object(id)
    )
}

const REST: &str = "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"item_id\":\"msg_1\",\
                    \"delta\":\"\\\"response\\\":{\\\"id\\\":\\\"resp_decoy\\\"}\"}\n\nevent: response.completed\n\
                    data: {\"type\":\"response.completed\"}\n\n";

fn respond(model: &str) -> Request {
    Request::post("/v1/responses", format!(r#"{{"model":"{model}","input":"hi"}}"#))
}

/// Lets `upstream` make a response with this id, for a model that only it has.
async fn make(app: &TestApp, upstream: &Upstream, model: &str, id: &str) {
    upstream.script(json_reply(&object(id)));
    let answer = app.ask(&respond(model)).await;
    assert_eq!((answer.status, answer.text()), (200, object(id)));
}

/// Every request that carries an id, with its method and what stands behind the id.
fn followers(id: &str) -> [Request; 7] {
    [
        Request::get(&format!("/v1/responses/{id}")),
        Request::get(&format!("/v1/responses/{id}?stream=true&starting_after=3")),
        Request::new("HEAD", &format!("/v1/responses/{id}")),
        Request::new("POST", &format!("/v1/responses/{id}/cancel")).body(""),
        Request::post(&format!("/v1/responses/{id}/cancel"), "{}"),
        Request::get(&format!("/v1/responses/{id}/input_items?limit=2")),
        Request::new("DELETE", &format!("/v1/responses/{id}")),
    ]
}

/// Checks that a request with `id` goes to `upstream` and to nobody else.
async fn assert_belongs(app: &TestApp, id: &str, upstream: &Upstream, others: &[&Upstream]) {
    let before: Vec<usize> = others.iter().map(|other| other.count()).collect();
    let index = upstream.count();
    let answer = app.ask(&Request::get(&format!("/v1/responses/{id}"))).await;
    assert_eq!(answer.status, 200, "{id}: {}", answer.text());
    assert_eq!(answer.json()["served_by"], upstream.name, "{id}");
    // Below whatever base path it has.
    assert!(upstream.request(index).await.head.word(1).ends_with(&format!("/v1/responses/{id}")), "{id}");
    assert_eq!(others.iter().map(|other| other.count()).collect::<Vec<_>>(), before, "{id}");
}

/// Three backends, two of which are replicas.
async fn three() -> ([Upstream; 3], TestApp) {
    let upstreams =
        [Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await, Upstream::start("c", &["n"]).await];
    let app = TestApp::with(&[&upstreams[0], &upstreams[1], &upstreams[2]]).await;
    (upstreams, app)
}

/// Two backends with a model of their own each, and one with a base path.
async fn two() -> (Upstream, Upstream, TestApp) {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["n"]).await);
    let app = TestApp::start().await;
    app.add(Spec::of(&a)).await;
    app.add(Spec::of(&b).label("inference.api.base_path", "/api/v1")).await;
    (a, b, app)
}

// === ids that were seen ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_every_request_with_an_id_goes_to_the_backend_that_made_it() {
    let (a, b, app) = two().await;
    make(&app, &a, "m", "resp_at-a").await;
    make(&app, &b, "n", "resp_at-b").await;
    for (id, upstream, other, base) in [("resp_at-a", &a, &b, "/v1"), ("resp_at-b", &b, &a, "/api/v1")] {
        for request in followers(id) {
            let (index, elsewhere) = (upstream.count(), other.count());
            let sent = String::from_utf8(request.bytes()).unwrap();
            let what = sent.lines().next().unwrap().to_owned();
            let answer = app.ask(&request).await;
            assert_eq!(answer.status, 200, "{what}: {}", answer.text());
            assert_eq!(other.count(), elsewhere, "{what}");
            let received = upstream.whole(index).await;
            assert_eq!(received.head.start, what.replace("/v1", base));
            assert_eq!(received.body.bytes, sent.split_once("\r\n\r\n").unwrap().1.as_bytes(), "{what}");
        }
        app.inflight_is(upstream.name, if base == "/v1" { "m" } else { "n" }, 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_what_the_backend_says_to_an_id_passes() {
    let (a, _b, app) = two().await;
    make(&app, &a, "m", "resp_1").await;
    let no = r#"{"error":{"message":"Response with id 'resp_1' not found.","code":404}}"#;
    a.script(reply("404 Not Found", "content-type: application/json\r\n", no));
    let answer = app.ask(&Request::get("/v1/responses/resp_1")).await;
    assert_eq!((answer.status, answer.text().as_str()), (404, no));
    a.script(sse_reply(&[&created("resp_1"), REST]));
    let answer = app.ask(&Request::get("/v1/responses/resp_1?stream=true")).await;
    assert_eq!((answer.end, answer.text()), (End::Whole, format!("{}{REST}", created("resp_1"))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_ids_are_learnt_from_whole_answers_of_every_form() {
    let (a, b, app) = two().await;
    let json = "content-type: application/json\r\n";
    let chunked = |id: &str, size: usize| {
        let mut script = vec![
            Step::ReadBody,
            Step::Send(format!("HTTP/1.1 200 OK\r\n{json}transfer-encoding: chunked\r\n\r\n").into()),
        ];
        script.extend(object(id).into_bytes().chunks(size).map(|piece| Step::SendChunk(piece.to_vec().into())));
        script.push(Step::Send(LAST_CHUNK.into()));
        script
    };
    let by_close = |id: &str| {
        let head = format!("HTTP/1.1 200 OK\r\n{json}\r\n{}", object(id));
        vec![Step::ReadBody, Step::Send(head.into()), Step::Close]
    };
    let long = "x".repeat(300_000);
    let cases: [(&str, Script); 8] = [
        ("resp_length", json_reply(&object("resp_length"))),
        ("resp_bytes", chunked("resp_bytes", 1)),
        ("resp_chunks", chunked("resp_chunks", 7)),
        ("resp_close", by_close("resp_close")),
        ("resp_spaces", json_reply("\r\n{ \"object\" : \"response\" ,\n\t\"id\" : \"resp_spaces\" }\n")),
        ("resp_later", json_reply(r#"{"object":"response","error":{"id":"no"},"x":[{"id":"no"}],"id":"resp_later"}"#)),
        ("resp_long", json_reply(&format!(r#"{{"id":"resp_long","object":"response","text":"{long}"}}"#))),
        ("0b7f-no-prefix", json_reply(&object("0b7f-no-prefix"))),
    ];
    for (index, (id, script)) in cases.into_iter().enumerate() {
        let (model, upstream, other) = if index % 2 == 0 { ("m", &a, &b) } else { ("n", &b, &a) };
        upstream.script(script);
        let answer = app.ask(&respond(model)).await;
        assert_eq!((answer.status, answer.end), (200, End::Whole), "{id}");
        assert_belongs(&app, id, upstream, &[other]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_ids_are_learnt_from_streams_however_they_are_cut() {
    let (a, b, app) = two().await;
    for (index, size) in [usize::MAX, 1, 7, 64].into_iter().enumerate() {
        for spelling in ["as it is", "no spaces", "CRLF", "no event line", "a comment first"] {
            let id = format!("resp_{index}_{}", spelling.replace(' ', "-"));
            let event = match spelling {
                "no spaces" => created(&id).replace("event: ", "event:").replace("data: ", "data:"),
                "CRLF" => created(&id).replace('\n', "\r\n"),
                "no event line" => created(&id).replace("event: response.created\n", ""),
                "a comment first" => format!(": ping\n\n{}", created(&id)),
                _ => created(&id),
            };
            let stream = format!("{event}{REST}");
            let (model, upstream, other) = if index % 2 == 0 { ("m", &a, &b) } else { ("n", &b, &a) };
            let mut script = sse_begin();
            let size = size.min(stream.len());
            script.extend(stream.as_bytes().chunks(size).map(|piece| Step::SendChunk(piece.to_vec().into())));
            script.push(Step::Send(LAST_CHUNK.into()));
            upstream.script(script);
            let answer = app.ask(&respond(model)).await;
            assert_eq!((answer.end, answer.text()), (End::Whole, stream), "{spelling} in pieces of {size}");
            assert_belongs(&app, &id, upstream, &[other]).await;
        }
    }
    let answer = app.ask(&Request::get("/v1/responses/resp_decoy")).await;
    assert_openai_error(&answer, 400, "model_required");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_stream_can_be_cancelled_while_it_runs() {
    let (a, b, app) = two().await;
    let gate = Gate::shut();
    b.script(held_stream(&created("resp_running"), &gate, REST));
    let mut client = app.client().await;
    client.send(respond("n").bytes()).await;
    client.head().await;
    assert_eq!(client.piece().await.unwrap().1, created("resp_running").as_bytes());
    let answer = app.ask(&Request::new("POST", "/v1/responses/resp_running/cancel").body("")).await;
    assert_eq!((answer.status, a.count(), b.count()), (200, 0, 2), "{}", answer.text());
    gate.open();
    assert!(client.finish().await.is_whole());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_many_ids_of_many_backends_are_kept_apart() {
    const IDS: usize = 200;
    let (upstreams, app) = three().await;
    let [a, b, c] = &upstreams;
    let mut made_by = Vec::new();
    for index in 0..IDS {
        let id = format!("resp_{index:04}");
        upstreams.iter().for_each(|upstream| upstream.always(json_reply(&object(&id))));
        let before = [a.count(), b.count(), c.count()];
        assert_eq!(app.ask(&respond(if index % 3 == 0 { "n" } else { "m" })).await.status, 200);
        let maker = (0..3).find(|at| upstreams[*at].count() > before[*at]).unwrap();
        made_by.push((id, maker));
    }
    assert!((0..3).all(|at| made_by.iter().any(|(_, maker)| *maker == at)), "each has made some");
    for upstream in &upstreams {
        upstream.always(json_reply(&format!(r#"{{"served_by":"{}"}}"#, upstream.name)));
    }
    for (id, maker) in made_by {
        let others: Vec<&Upstream> = (0..3).filter(|at| *at != maker).map(|at| &upstreams[at]).collect();
        assert_belongs(&app, &id, &upstreams[maker], &others).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_an_id_is_the_same_however_it_is_encoded() {
    let (a, b, app) = two().await;
    make(&app, &a, "m", "resp_x.y-z").await;
    make(&app, &b, "n", "resp x/é").await;
    for target in ["resp%5Fx.y-z", "%72%65%73%70_x%2Ey%2dz", "resp%5fx.y-z?include[]=a%2Fb"] {
        let index = a.count();
        let answer = app.ask(&Request::get(&format!("/v1/responses/{target}"))).await;
        assert_eq!((answer.status, b.count()), (200, 1), "{target}: {}", answer.text());
        assert_eq!(a.request(index).await.head.word(1), format!("/v1/responses/{target}"), "passed on as it came");
    }
    let answer = app.ask(&Request::get("/v1/responses/resp%20x%2F%C3%A9/input_items")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(b.request(1).await.head.word(1), "/api/v1/responses/resp%20x%2F%C3%A9/input_items");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_model_that_is_named_goes_before_an_id() {
    let (a, b, app) = two().await;
    make(&app, &a, "m", "resp_1").await;
    let answer = app.ask(&Request::get("/v1/responses/resp_1?model=n")).await;
    assert_eq!((answer.status, a.count(), b.count()), (200, 1, 1));
    let answer = app.ask(&Request::post("/v1/responses/resp_1/cancel", r#"{"model":"unheard"}"#)).await;
    assert_openai_error(&answer, 404, "model_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_only_good_answers_teach_an_id() {
    let (a, b, app) = two().await;
    a.script(reply("400 Bad Request", "content-type: application/json\r\n", object("resp_refused")));
    assert_eq!(app.ask(&respond("m")).await.status, 400);
    // Another endpoint has ids of another kind.
    a.script(json_reply(r#"{"id":"chatcmpl-1","object":"chat.completion"}"#));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    for id in ["resp_refused", "chatcmpl-1", "msg_1", ""] {
        let answer = app.ask(&Request::get(&format!("/v1/responses/{id}"))).await;
        assert!((400..500).contains(&answer.status), "{id}: {}", answer.text());
    }
    assert_eq!((a.count(), b.count()), (2, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_control_endpoints_hide_behind_no_id() {
    let (a, _b, app) = two().await;
    make(&app, &a, "m", "resp_1").await;
    for target in [
        "/v1/responses/resp_1/../../sleep",
        "/v1/responses/resp_1/%2e%2e/load_lora_adapter",
        "/v1/responses/resp_1/sleep",
    ] {
        for method in ["GET", "POST"] {
            assert_eq!(app.ask(&Request::new(method, target)).await.status, 404, "{method} {target}");
        }
    }
    assert_eq!(a.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_what_is_remembered_is_bounded_and_never_wrong() {
    const EACH: usize = 10_000;
    let (a, b, app) = two().await;
    let id = |name: &str, index: usize| format!("resp_{name}_{index:05}");
    let mut asking = Vec::new();
    for (model, upstream) in [("m", &a), ("n", &b)] {
        for index in 0..EACH {
            upstream.script(json_reply(&format!(r#"{{"id":"{}","object":"response"}}"#, id(upstream.name, index))));
        }
        let (addr, request) = (app.addr(), respond(model));
        asking.push(tokio::spawn(async move {
            let mut client = Client::connect(addr).await;
            for _ in 0..EACH {
                assert_eq!(client.ask(&request).await.status, 200);
            }
        }));
    }
    for asked in asking {
        // Longer than one wait may be: it is twenty thousand of them.
        asked.await.unwrap();
    }
    let (mut known, mut forgotten) = (0, 0);
    for (upstream, other) in [(&a, &b), (&b, &a)] {
        let elsewhere = other.count();
        for index in (0..100).chain(EACH / 2..EACH / 2 + 100) {
            let answer = app.ask(&Request::get(&format!("/v1/responses/{}", id(upstream.name, index)))).await;
            match answer.status {
                200 => {
                    assert_eq!(answer.json()["served_by"], upstream.name);
                    known += 1;
                }
                _ => {
                    assert_openai_error(&answer, 400, "model_required");
                    forgotten += 1;
                }
            }
        }
        assert_eq!(other.count(), elsewhere);
        for index in EACH - 100..EACH {
            assert_belongs(&app, &id(upstream.name, index), upstream, &[other]).await;
        }
    }
    println!("r07: of 400 older ids {known} are known, {forgotten} forgotten");
    // What has been forgotten is as good as never seen: the only backend is meant.
    app.ended("b").await;
    app.models_are(&["m"]).await;
    let answer = app.ask(&Request::get("/v1/responses/resp_never_seen")).await;
    assert_eq!(answer.json()["served_by"], "a");
}

// === previous_response_id ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_conversation_stays_with_the_replica_that_holds_it() {
    let (upstreams, app) = three().await;
    let [a, b, _] = &upstreams;
    // Each of the replicas makes some.
    for round in 0..6 {
        let id = format!("resp_{round}");
        [a, b].iter().for_each(|upstream| upstream.always(json_reply(&object(&id))));
        let before = a.count();
        assert_eq!(app.ask(&respond("m")).await.status, 200);
        let (maker, other) = if a.count() > before { (a, b) } else { (b, a) };
        for body in [
            format!(r#"{{"model":"m","previous_response_id":"{id}","input":"go on"}}"#),
            format!(r#"{{"previous_response_id":"{id}","input":"go on","model":"m"}}"#),
            format!(
                r#"{{"input":[{{"previous_response_id":"resp_decoy"}}],"previous\u005fresponse_id" : "{id}" ,"model":"m"}}"#
            ),
        ] {
            for _ in 0..5 {
                let (at_maker, at_other) = (maker.count(), other.count());
                assert_eq!(app.ask(&Request::post("/v1/responses", &body)).await.status, 200);
                assert_eq!((maker.count(), other.count()), (at_maker + 1, at_other), "{body}");
                assert_eq!(maker.whole(at_maker).await.body.bytes, body.as_bytes());
            }
        }
    }
}

/// JSON has several spellings for one text, here as for the model.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_an_escaped_id_in_a_body_is_the_same_id() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    let app = TestApp::with(&[&a]).await;
    make(&app, &a, "m", "resp_1").await;
    app.add(Spec::of(&b)).await;
    for _ in 0..20 {
        let body = r#"{"model":"m","previous_response_id":"resp\u005f\u0031","input":"go on"}"#;
        assert_eq!(app.ask(&Request::post("/v1/responses", body)).await.status, 200);
    }
    assert_eq!((a.count(), b.count()), (21, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_conversation_whose_replica_cannot_go_on_goes_elsewhere() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m", "n"]).await);
    let app = TestApp::with(&[&a]).await;
    make(&app, &a, "m", "resp_1").await;
    app.add(Spec::of(&b)).await;
    app.models_are(&["m", "n"]).await;
    let follow = |model: &str, id: &str| {
        Request::post("/v1/responses", format!(r#"{{"model":"{model}","previous_response_id":"{id}"}}"#))
    };
    // Another model than the one that began, which its backend does not have.
    assert_eq!(app.ask(&follow("n", "resp_1")).await.json()["served_by"], "b");
    assert_openai_error(&app.ask(&follow("unheard", "resp_1")).await, 404, "model_not_found");
    for id in ["resp_unheard", ""] {
        assert_eq!(app.ask(&follow("m", id)).await.status, 200);
    }
    for body in [
        r#"{"model":"m","previous_response_id":null}"#,
        r#"{"model":"m","previous_response_id":7,"x":{"previous_response_id":"resp_1"}}"#,
    ] {
        assert_eq!(app.ask(&Request::post("/v1/responses", body)).await.status, 200);
    }
    app.stopping("a").await;
    app.rotation_is(1, "a is out").await;
    assert_eq!(app.ask(&follow("m", "resp_1")).await.json()["served_by"], "b");
    app.ended("a").await;
    assert_eq!(app.ask(&follow("m", "resp_1")).await.json()["served_by"], "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_replica_that_refuses_does_not_end_the_conversation() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m"]).await);
    let app = TestApp::with(&[&a]).await;
    make(&app, &a, "m", "resp_1").await;
    app.add(Spec::of(&b)).await;
    a.kill().await;
    let answer = app.ask(&Request::post("/v1/responses", r#"{"model":"m","previous_response_id":"resp_1"}"#)).await;
    assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some("b")));
}

// === ids that were not seen, or are no good any more ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_an_unknown_id_is_the_only_backends() {
    let a = Upstream::start("a", &["m", "n"]).await;
    let app = TestApp::with(&[&a]).await;
    for request in followers("resp_unheard") {
        let index = a.count();
        let answer = app.ask(&request).await;
        assert_eq!((answer.status, a.count()), (200, index + 1), "{}", answer.text());
    }
    let b = Upstream::start("b", &["o"]).await;
    app.add(Spec::of(&b)).await;
    let before = a.count();
    for request in followers("resp_unheard") {
        let answer = app.ask(&request).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
        if !answer.bytes().is_empty() {
            assert_openai_error(&answer, 400, "model_required");
            assert!(answer.text().to_lowercase().contains("backend"), "does not say why: {}", answer.text());
        }
    }
    let answer = app.ask(&Request::get("/v1/responses/resp_unheard").header("anthropic-version", "2023-06-01")).await;
    assert_eq!(assert_anthropic_error(&answer, 400), "invalid_request_error");
    assert_eq!((a.count(), b.count()), (before, 0));
    app.ended("b").await;
    app.rotation_is(1, "a alone").await;
    assert_eq!(app.ask(&Request::get("/v1/responses/resp_unheard")).await.json()["served_by"], "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_an_id_whose_backend_has_gone_goes_to_nobody_else() {
    for how in ["stopping", "unhealthy", "gone"] {
        let (upstreams, app) = three().await;
        let [a, b, c] = &upstreams;
        app.ended("b").await;
        app.rotation_is(2, "without b").await;
        make(&app, a, "m", "resp_1").await;
        app.announce(Spec::of(b).incarnation(2)).await;
        app.rotation_is(3, "with b again").await;
        match how {
            "stopping" => app.stopping("a").await,
            "unhealthy" => app.announce(Spec::of(a).health(Health::Unhealthy)).await,
            _ => app.ended("a").await,
        }
        app.rotation_is(2, "without a").await;
        for request in followers("resp_1") {
            let answer = app.ask(&request).await;
            println!("r07: {how}: {} {}", answer.status, answer.text());
            assert!([404, 503].contains(&answer.status), "{how}: {} {}", answer.status, answer.text());
            if !answer.bytes().is_empty() {
                let code = answer.json()["error"]["code"].as_str().unwrap().to_owned();
                assert_openai_error(&answer, answer.status, &code);
                assert!(answer.text().to_lowercase().contains("backend"), "does not say why: {}", answer.text());
                assert!(!answer.text().contains(&a.addr.to_string()), "{}", answer.text());
            }
        }
        assert_eq!([a.count(), b.count(), c.count()], [1, 0, 0], "{how}");
    }
}

// === bodies without a model ===

/// Paths of servers that hold one model, whose clients need not name it.
const OPTIONAL: [&str; 12] = [
    "/tokenize",
    "/detokenize",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/v1/score",
    "/pooling",
    "/v1/pooling",
    "/classify",
    "/v1/classify",
    "/reranking",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_where_the_model_is_optional_the_only_backend_is_meant() {
    let a = Upstream::start("a", &["m", "n"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&a).label("inference.api.base_path", "/api/v1")).await;
    let bodies =
        [r#"{"query":"q","documents":["\"model\":\"x\""]}"#, r#"{"prompt":"hi","options":{"model":"x"}}"#, "{}"];
    for path in OPTIONAL {
        for body in bodies {
            for request in [Request::post(path, body), Request::new("POST", path).chunks(body.as_bytes().chunks(3))] {
                let index = a.count();
                let answer = app.ask(&request).await;
                assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text());
                let received = a.whole(index).await;
                assert_eq!(received.head.word(1), path.replace("/v1", "/api/v1"));
                assert_eq!(received.body.bytes, body.as_bytes());
            }
        }
        assert_openai_error(&app.ask(&Request::post(path, r#"{"model":"unheard"}"#)).await, 404, "model_not_found");
        assert_openai_error(&app.ask(&Request::post(path, r#"{"model":"m""#)).await, 400, "invalid_json");
        assert_eq!(app.ask(&Request::post(path, r#"{"model":"m","model":"n"}"#)).await.status, 400, "{path}");
    }
    app.inflight_is("a", "m", 0.0).await;

    let b = Upstream::start("b", &["o"]).await;
    app.add(Spec::of(&b)).await;
    let before = a.count();
    for path in OPTIONAL {
        for body in bodies {
            let answer = app.ask(&Request::post(path, body)).await;
            assert_openai_error(&answer, 400, "model_required");
            assert!(answer.text().to_lowercase().contains("backend"), "does not say why: {}", answer.text());
        }
        let answer = app.ask(&Request::post(path, r#"{"model":"o"}"#)).await;
        assert_eq!(answer.json()["served_by"], "b", "{path}");
    }
    assert_eq!((a.count(), b.count()), (before, OPTIONAL.len()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_large_body_without_a_model_arrives_as_it_was() {
    let a = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&a]).await;
    let body = format!(r#"{{"query":"q","documents":["{}"]}}"#, "text ".repeat(500_000));
    assert_eq!(app.ask(&Request::post("/rerank", &body)).await.status, 200);
    assert_eq!(a.peek(0, |request| request.body.is_done() && request.body.bytes == body.as_bytes()), Some(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_where_the_model_is_needed_it_stays_needed() {
    let a = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&a]).await;
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/audio/speech",
        "/v1/new/api",
    ] {
        assert_openai_error(&app.ask(&Request::post(path, r#"{"input":"hi"}"#)).await, 400, "model_required");
    }
    assert_eq!(
        assert_anthropic_error(&app.ask(&Request::post("/v1/messages", "{}")).await, 400),
        "invalid_request_error"
    );
    assert_eq!(a.count(), 0);
}

// === whatever has an id ===

/// How a backend may answer with an id.
const FORMS: [&str; 8] = ["plain", "gzip", "x-gzip", "deflate", "chunked", "pieces", "events", "ndjson"];

/// An answer that has `id`, in one of the forms.
fn answer_with(id: &str, form: &str) -> Script {
    let text =
        format!(r#"{{"object":"thing","created_at":1,"data":[{{"id":"decoy"}}],"id":"{id}","status":"queued"}}"#);
    let json = "content-type: application/json\r\n";
    let compressed =
        |coding: &str, bytes: Vec<u8>| reply("201 Created", &format!("{json}content-encoding: {coding}\r\n"), bytes);
    match form {
        "gzip" | "x-gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            std::io::Write::write_all(&mut encoder, text.as_bytes()).unwrap();
            compressed(form, encoder.finish().unwrap())
        }
        "deflate" => {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            std::io::Write::write_all(&mut encoder, text.as_bytes()).unwrap();
            compressed(form, encoder.finish().unwrap())
        }
        "chunked" | "pieces" => {
            let head = format!("HTTP/1.1 202 Accepted\r\n{json}transfer-encoding: chunked\r\n\r\n");
            let mut script = vec![Step::ReadBody, Step::Send(head.into())];
            let size = if form == "chunked" { text.len() } else { 3 };
            script.extend(text.as_bytes().chunks(size).map(|piece| Step::SendChunk(piece.to_vec().into())));
            script.push(Step::Send(LAST_CHUNK.into()));
            script
        }
        "events" => sse_reply(&[": ping\n\n", &format!("data: {text}\n\n"), "data: {\"id\":\"decoy\"}\n\n"]),
        "ndjson" => {
            reply("200 OK", "content-type: application/x-ndjson\r\n", format!("{text}\n{{\"id\":\"decoy\"}}\n"))
        }
        _ => json_reply(&text),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_whatever_was_made_is_asked_for_where_it_was_made() {
    let (upstreams, app) = three().await;
    let [a, b, c] = &upstreams;
    let collections = [
        ("/v1/videos", "/v1/videos/ID", "/v1/videos/ID/content"),
        ("/v1/responses", "/v1/responses/ID", "/v1/responses/ID/input_items"),
        ("/v1/images/generations", "/v1/images/ID/content", "/v1/images/generations/ID"),
        ("/v1/video/generations", "/v1/video/generations/ID", "/v1/video/generations/ID/download"),
        ("/v1/things", "/v1/things/ID", "/v1/things/ID/a/b"),
        ("/v1/chat/completions", "/v1/chat/completions/ID", "/v1/chat/completions/ID/messages"),
        ("/v1//%76ideos/", "/v1/videos/ID/", "/v1//videos/ID"),
    ];
    for (collection, one, below) in collections {
        for form in FORMS {
            // By turns, and more than once: chance is no reason to find the right one.
            for round in 0..4 {
                let id = format!("made-{}-{form}-{round}", collection.replace(['/', '%'], ""));
                upstreams.iter().for_each(|upstream| upstream.always(answer_with(&id, form)));
                let before = [a.count(), b.count(), c.count()];
                let create = Request::post(collection, format!(r#"{{"model":"{}"}}"#, ["m", "m", "n", "m"][round]));
                assert_eq!(app.ask(&create).await.end, End::Whole, "{collection} {form}");
                let maker = (0..3).find(|at| upstreams[*at].count() > before[*at]).unwrap();
                for upstream in &upstreams {
                    upstream.always(json_reply(&format!(r#"{{"served_by":"{}"}}"#, upstream.name)));
                }
                for request in [
                    Request::get(&one.replace("ID", &id)),
                    Request::get(&below.replace("ID", &id)),
                    Request::new("HEAD", &one.replace("ID", &id)),
                    Request::new("POST", &format!("{}/cancel", one.replace("ID", &id))).body(""),
                    Request::post(&format!("{}/remix", one.replace("ID", &id)), r#"{"prompt":"x"}"#),
                    Request::new("DELETE", &one.replace("ID", &id)),
                ] {
                    let index = upstreams[maker].count();
                    let answer = app.ask(&request).await;
                    assert_eq!(answer.status, 200, "{form} {one}: {}", answer.text());
                    assert_eq!(upstreams[maker].count(), index + 1, "{collection} {form}: {one} went elsewhere");
                }
            }
        }
    }
    for target in ["/v1/videos/decoy", "/v1/things/decoy", "/v1/videos/made-v1things-plain-0"] {
        assert_openai_error(&app.ask(&Request::get(target)).await, 400, "model_required");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_a_model_beside_an_id_does_not_lead_to_the_wrong_replica() {
    let a = Upstream::start("a", &["m", "k"]).await;
    let b = Upstream::start("b", &["m", "k"]).await;
    let c = Upstream::start("c", &["n"]).await;
    let app = TestApp::with(&[&a, &b, &c]).await;
    for round in 0..6 {
        let id = format!("video_{round}");
        [&a, &b]
            .iter()
            .for_each(|upstream| upstream.always(json_reply(&format!(r#"{{"id":"{id}","object":"video"}}"#))));
        let before = a.count();
        assert_eq!(app.ask(&Request::post("/v1/videos", r#"{"model":"m","prompt":"x"}"#)).await.status, 200);
        let (maker, other) = if a.count() > before { (&a, &b) } else { (&b, &a) };
        for request in [
            Request::get(&format!("/v1/videos/{id}?model=m")),
            Request::get(&format!("/v1/videos/{id}/content?variant=thumbnail&model=m")),
            Request::new("DELETE", &format!("/v1/videos/{id}?model=m")),
            Request::post(&format!("/v1/videos/{id}/remix"), r#"{"model":"m","prompt":"y"}"#),
            // Another model of the same backends.
            Request::get(&format!("/v1/videos/{id}?model=k")),
        ] {
            for _ in 0..4 {
                let (at_maker, at_other) = (maker.count(), other.count());
                assert_eq!(app.ask(&request).await.status, 200);
                assert_eq!((maker.count(), other.count()), (at_maker + 1, at_other), "{id}");
            }
        }
        // A model that the maker does not have is meant as it is said.
        assert_eq!(app.ask(&Request::get(&format!("/v1/videos/{id}?model=n"))).await.json()["served_by"], "c");
        let answer = app.ask(&Request::get(&format!("/v1/videos/{id}?model=unheard"))).await;
        assert_openai_error(&answer, 404, "model_not_found");
    }
    let before = (a.count(), b.count());
    for (name, upstream) in [("a", &a), ("b", &b)] {
        upstream.always(json_reply(&format!(r#"{{"id":"video_of_{name}"}}"#)));
    }
    while app.ask(&Request::post("/v1/videos", r#"{"model":"m"}"#)).await.json()["id"] != "video_of_a" {}
    assert!(before.0 < a.count());
    app.ended("a").await;
    app.rotation_is(2, "a has gone").await;
    let before = b.count();
    for target in ["/v1/videos/video_of_a", "/v1/videos/video_of_a?model=m", "/v1/videos/video_of_a/content?model=m"] {
        assert_openai_error(&app.ask(&Request::get(target)).await, 404, "not_found");
    }
    assert_eq!(b.count(), before, "it does not know what another one made");
    assert_eq!(app.ask(&Request::get("/v1/videos/video_of_a?model=n")).await.json()["served_by"], "c");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_ids_are_learnt_whatever_is_measured() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["n"]).await);
    let app = TestApp::start_with_backends(&[("PROXY_USAGE_METRICS", "false")], &[&a, &b]).await;
    for (model, upstream, form) in [("m", &a, "plain"), ("n", &b, "gzip"), ("m", &a, "events")] {
        let id = format!("thing-{form}");
        upstream.script(answer_with(&id, form));
        assert_eq!(app.ask(&Request::post("/v1/things", format!(r#"{{"model":"{model}"}}"#))).await.end, End::Whole);
        let answer = app.ask(&Request::get(&format!("/v1/things/{id}"))).await;
        assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some(upstream.name)), "{form}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r07_an_id_that_was_not_seen_is_the_only_backends_whatever_it_is_of() {
    let a = Upstream::start("a", &["m", "n"]).await;
    let app = TestApp::with(&[&a]).await;
    let requests = [
        Request::get("/v1/videos/video_1"),
        Request::get("/v1/videos/video_1/content"),
        Request::new("DELETE", "/v1/videos/video_1"),
        Request::post("/v1/videos/video_1/remix", r#"{"prompt":"x"}"#),
        Request::new("POST", "/v1/things/thing_0123/cancel").body(""),
    ];
    for request in &requests {
        let answer = app.ask(request).await;
        assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some("a")), "{}", answer.text());
    }
    let b = Upstream::start("b", &["o"]).await;
    app.add(Spec::of(&b)).await;
    let before = a.count();
    for request in &requests {
        let answer = app.ask(request).await;
        assert_openai_error(&answer, 400, "model_required");
        assert!(answer.text().contains("_"), "does not name what was asked for: {}", answer.text());
    }
    assert_eq!((a.count(), b.count()), (before, 0));
}
