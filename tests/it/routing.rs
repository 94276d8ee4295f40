//! R4, R11, D5: which paths are the backends', which are the proxy's own, and which belong to nobody.

use crate::support::*;

/// Control endpoints of the engines, in the spellings that a server would still take for them.
const CONTROL: [&str; 44] = [
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/lora-adapters",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/pause",
    "/resume",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/update_weights",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/abort_requests",
    "/scale_elastic_ep",
    "/start_profile",
    "/stop_profile",
    "/flush_cache",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/slow_down",
    "/set_internal_state",
    "/models/load",
    "/models/unload",
    "/api/pull",
    "/api/delete",
    // The same in disguise: encoded, doubled, with a slash or a query behind, through dot segments.
    "/%73leep",
    "/%73%6C%65%65%70",
    "//sleep",
    "///sleep",
    "/sleep/",
    "/sleep//",
    "/sleep?level=1",
    "/%2Fsleep",
    "/./sleep",
    "/v1/../sleep",
    "/v1/%2e%2e/sleep",
    "/v1/%6coad_lora_adapter",
    "/v1//load_lora_adapter",
    "/v1%2Fload_lora_adapter",
    "/v1/chat/../load_lora_adapter",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_paths_that_only_look_like_ours_touch_no_backend() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for target in ["/v1beta", "/v1beta/chat/completions", "/v10/x", "/v1x", "/other", "/v2/unheard/of", "/V1"] {
        for request in [Request::post(target, r#"{"messages":[]}"#), Request::get(target)] {
            let answer = app.ask(&request).await;
            assert_eq!(answer.status, 404, "{target}: {}", answer.text());
            assert!(answer.json()["error"].is_object(), "{target}: {}", answer.text());
        }
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_prefixes_beside_v1_are_not_v1_even_when_they_name_a_model() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for target in ["/v1beta/chat/completions", "/v10/chat/completions", "/v1x", "/other"] {
        let answer = app.ask(&Request::post(target, r#"{"model":"m"}"#)).await;
        assert_eq!(answer.status, 404, "{target}: {}", answer.text());
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_collections_that_no_backend_could_answer_for_are_not_forwarded() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for target in [
        "/v1/files",
        "/v1/files/file-1",
        "/v1/files/file-1/content",
        "/v1/batches",
        "/v1/batches/b/cancel",
        "/v1/fine_tuning/jobs",
        "/v1/threads",
        "/v1/threads/t/runs",
        "/v1/vector_stores",
        "/v1/vector_stores/v/search",
        "/v1/%66iles",
        "/v1/fine_tuning/jobs?limit=2",
        "/v1/messages/batches",
        "/v1/messages/batches?limit=2",
        "/v1/messages/batches/msgbatch_1",
        "/v1/messages/batches/msgbatch_1/results",
        "/v1/messages/batches/msgbatch_1/cancel",
        "/v1/messages/%62atches/",
    ] {
        for request in [Request::get(target), Request::post(target, r#"{"model":"m"}"#)] {
            let answer = app.ask(&request).await;
            assert_eq!(answer.status, 404, "{target}: {}", answer.text());
            assert!(answer.json()["error"].is_object(), "{target}: {}", answer.text());
        }
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_method_path_and_query_arrive_as_sent() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let targets = [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/completions?beta=true",
        "/v1/chat/completions?a=%20b&c=%2Fd%2f&e=+&&g=&h=%C3%A9",
        "/v1/chat/completions?",
        "/v1/%63hat/completions",
        "/v1/things/%41%2fb/~x;p=1/(y)'!*,:@$",
        "/v1/a/endpoint/that/nobody/has/heard/of",
    ];
    for (index, target) in targets.into_iter().enumerate() {
        let method = ["POST", "PUT", "PATCH", "DELETE"][index % 4];
        let request = Request::new(method, target).header("content-type", "application/json").body(r#"{"model":"m"}"#);
        assert_eq!(app.ask(&request).await.status, 200, "{method} {target}");
        let received = upstream.whole(index).await;
        assert_eq!(received.head.start, format!("{method} {target} HTTP/1.1"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_absolute_form_is_forwarded_in_origin_form() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let answer = app.ask(&Request::post("http://proxy.test/v1/completions?a=1", r#"{"model":"m"}"#)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(upstream.whole(0).await.head.word(1), "/v1/completions?a=1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d05_the_base_path_is_swapped() {
    for label in ["/api/v1/", "/api/v1", "api/v1"] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::start().await;
        app.add(Spec::of(&upstream).label("inference.api.base_path", label)).await;
        assert_eq!(app.ask(&Request::post("/v1/completions?x=%2F", r#"{"model":"m"}"#)).await.status, 200);
        assert_eq!(upstream.whole(0).await.head.word(1), "/api/v1/completions?x=%2F", "label {label}");
        // Only what is below /v1 moves.
        assert_eq!(app.ask(&Request::post("/tokenize", r#"{"model":"m"}"#)).await.status, 200);
        assert_eq!(upstream.whole(1).await.head.word(1), "/tokenize", "label {label}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d05_a_backend_without_a_base_path_gets_bare_paths() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&upstream).label("inference.api.base_path", "/")).await;
    assert_eq!(app.ask(&Request::post("/v1/embeddings", r#"{"model":"m"}"#)).await.status, 200);
    assert_eq!(upstream.whole(0).await.head.word(1), "/embeddings");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_behind_a_bare_prefix_only_the_api_is_reached() {
    for label in ["/", "/api", "/vllm"] {
        let upstream = Upstream::start("a", &["m"]).await;
        let app = TestApp::start().await;
        app.add(Spec::of(&upstream).label("inference.api.base_path", label)).await;
        for path in [
            "/v1/shutdown",
            "/v1/server_info",
            "/v1/reset_encoder_cache",
            "/v1/slots/0?action=erase",
            "/v1/props",
            "/v1/api/pull",
            "/v1/pull",
            "/v1/%73hutdown",
            "/v1//shutdown",
            "/v1/./shutdown",
            "/v1/%2fshutdown",
            "/v1/;x/shutdown",
            "/v1/SHUTDOWN",
            "/v1/shutdown;x",
            "/v1/chat/./shutdown",
        ] {
            for request in [Request::post(path, r#"{"model":"m"}"#), Request::get(path), Request::new("DELETE", path)] {
                assert_openai_error(&app.ask(&request).await, 404, "not_found");
            }
        }
        assert_eq!(upstream.count(), 0, "behind {label}");
        assert_eq!(app.ask(&Request::post("/v1/chat/completions/render", r#"{"model":"m"}"#)).await.status, 200);
        app.inflight_is("a", "m", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_engines_own_paths_are_routed_by_model_and_left_as_they_are() {
    let [a, b] = [Upstream::start("a", &["m"]).await, Upstream::start("b", &["n"]).await];
    let app = TestApp::with(&[&a, &b]).await;
    let paths =
        ["/tokenize", "/detokenize", "/rerank", "/v2/rerank", "/score", "/pooling", "/classify", "/invocations"];
    for (index, path) in paths.into_iter().enumerate() {
        for (model, upstream) in [("m", &a), ("n", &b)] {
            let answer = app.ask(&Request::post(path, format!(r#"{{"model":"{model}"}}"#))).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            assert_eq!(upstream.whole(index).await.head.word(1), path);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_model_in_the_query_routes_where_there_is_no_body() {
    let [a, b] = [Upstream::start("a", &["m", "org/x y"]).await, Upstream::start("b", &["n"]).await];
    let app = TestApp::with(&[&a, &b]).await;
    assert_eq!(app.ask(&Request::get("/v1/realtime?model=n")).await.status, 200);
    assert_eq!(b.whole(0).await.head.word(1), "/v1/realtime?model=n");
    assert_eq!(app.ask(&Request::get("/v1/realtime?a=1&model=org%2Fx%20y&b")).await.status, 200);
    assert_eq!(a.whole(0).await.head.word(1), "/v1/realtime?a=1&model=org%2Fx%20y&b");
    let answer = app.ask(&Request::get("/v1/realtime?model=unheard")).await;
    assert_openai_error(&answer, 404, "model_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_control_endpoints_never_reach_a_backend() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for target in CONTROL {
        for request in [Request::post(target, r#"{"model":"m"}"#), Request::get(target), Request::new("PUT", target)] {
            let answer = app.ask(&request).await;
            assert_eq!(answer.status, 404, "{target}: {}", answer.text());
        }
    }
    assert_eq!(upstream.count(), 0, "{:?}", upstream.peek(0, |request| request.head.start.clone()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_a_model_in_the_query_opens_no_control_endpoint() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    for target in ["/sleep?model=m", "/v1/load_lora_adapter?model=m", "/flush_cache?model=m", "/%73leep?model=m"] {
        assert_eq!(app.ask(&Request::new("POST", target)).await.status, 404, "{target}");
        assert_eq!(app.ask(&Request::get(target)).await.status, 404, "{target}");
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_a_redirect_does_not_leak_the_backend() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start().await;
    app.add(Spec::of(&upstream).label("inference.api.base_path", "/api/v1")).await;
    let location = format!("location: http://{}/api/v1/completions?x=1\r\n", upstream.addr);
    upstream.always(reply("307 Temporary Redirect", &location, ""));
    let answer = app.ask(&Request::post("/v1/completions/?x=1", r#"{"model":"m"}"#)).await;
    assert_eq!(answer.status, 307);
    let head = String::from_utf8_lossy(&answer.head.raw).into_owned();
    assert!(!head.contains(&upstream.addr.to_string()), "{head}");
    if let Some(location) = answer.header("location") {
        assert!(location.ends_with("/v1/completions?x=1"), "{location}");
        assert!(!location.contains("/api/"), "a path that the client could not use: {location}");
    }
    assert_eq!(upstream.count(), 1, "a redirect is the client's to follow");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_the_proxys_own_paths_answer_without_a_backend() {
    let app = TestApp::start().await;
    for path in ["/healthz", "/health", "/readyz"] {
        assert_eq!(app.ask(&Request::get(path)).await.status, 200, "{path}");
    }
    let metrics = app.ask(&Request::get("/metrics")).await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain"), "{:?}", metrics.head);
    assert!(metrics.text().contains("# TYPE proxy_backends_active gauge\n"), "{}", metrics.text());
    assert!(app.ask(&Request::get("/status")).await.json().is_object());
    let page = app.ask(&Request::get("/").header("accept", "text/html,*/*;q=0.8")).await;
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").unwrap().starts_with("text/"), "{:?}", page.head);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_the_proxys_own_paths_are_for_reading() {
    let app = TestApp::start().await;
    let elsewhere = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    for path in ["/", "/status", "/metrics", "/healthz", "/readyz"] {
        for method in ["POST", "PUT", "DELETE"] {
            let answer = app.ask(&Request::new(method, path)).await;
            assert_openai_error(&answer, 405, "method_not_allowed");
            assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{method} {path}");
            let answer = Client::connect(elsewhere.admin_addr().unwrap()).await.ask(&Request::new(method, path)).await;
            assert_openai_error(&answer, 405, "method_not_allowed");
            assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{method} {path}");
        }
        assert_eq!(app.ask(&Request::new("HEAD", path)).await.status, 200, "{path}");
    }
    assert_eq!(elsewhere.ask(&Request::new("POST", "/status")).await.status, 404, "it is on the other port");
    for path in ["/", "/status", "/metrics"] {
        assert_eq!(app.ask(&Request::new("OPTIONS", path)).await.status, 204, "{path}");
    }
    // Front proxies check health like this.
    assert_eq!(app.ask(&Request::new("OPTIONS", "/healthz")).await.status, 200);
    let gate = Gate::shut();
    let starting = TestApp::start_with_late_scan(&gate, []).await;
    assert_eq!(starting.ask(&Request::new("OPTIONS", "/readyz")).await.status, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_both_ports_answer_alike() {
    let app = TestApp::start().await;
    let elsewhere = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    let admin = elsewhere.admin_addr().unwrap();
    for path in ["/", "/status", "/metrics", "/healthz", "/health/", "/readyz", "/nonsense", "/status/x"] {
        for method in ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH"] {
            let request = Request::new(method, path).header("x-request-id", "mine");
            let (here, there) = (app.ask(&request).await, Client::connect(admin).await.ask(&request).await);
            assert_eq!(here.status, there.status, "{method} {path}");
            for name in ["content-type", "allow", "x-request-id", "vary", "cache-control"] {
                assert_eq!(here.header(name), there.header(name), "{method} {path}: {name}");
            }
            assert_eq!(there.header("x-request-id"), Some("mine"), "{method} {path}");
        }
    }
    // The API is on the other port.
    for path in ["/v1/models", "/v1/chat/completions"] {
        let answer = Client::connect(admin).await.ask(&Request::get(path)).await;
        assert_openai_error(&answer, 404, "not_found");
    }
    // A connection is kept, and bytes that are no request are answered as they are on the data port.
    let mut client = Client::connect(admin).await;
    for _ in 0..3 {
        assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_a_slash_behind_the_proxys_own_paths_makes_no_difference() {
    let upstream = Upstream::start("a", &["m", "org/n"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let elsewhere = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    for path in ["/healthz/", "/health/", "/readyz/", "/metrics/", "/status/"] {
        assert_eq!(app.ask(&Request::get(path)).await.status, 200, "{path}");
        let admin = Client::connect(elsewhere.admin_addr().unwrap()).await.ask(&Request::get(path)).await;
        assert_eq!(admin.status, 200, "{path} on the admin port");
    }
    let list = app.ask(&Request::get("/v1/models")).await;
    for path in ["/v1/models/", "/v1/models//"] {
        assert_eq!(app.ask(&Request::get(path)).await.bytes(), list.bytes(), "{path}");
    }
    for (path, id) in [
        ("/v1/models/m/", "m"),
        ("/v1/models/m%2F", "m"),
        ("/v1/models/m//", "m"),
        ("/v1/models/org/n/", "org/n"),
        ("/v1/models/org%2Fn/?x=1", "org/n"),
    ] {
        let answer = app.ask(&Request::get(path)).await;
        assert_eq!((answer.status, &answer.json()["id"]), (200, &serde_json::json!(id)), "{path}");
        let answer = app.ask(&Request::get(path).header("anthropic-version", "2023-06-01")).await;
        assert_eq!((answer.status, &answer.json()["id"]), (200, &serde_json::json!(id)), "{path}");
    }
    for path in ["/v1/models/org/", "/v1/models/unheard/"] {
        assert_openai_error(&app.ask(&Request::get(path)).await, 404, "model_not_found");
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_the_admin_port_takes_metrics_and_status_along() {
    let app = TestApp::start_with(&[("PROXY_ADMIN_PORT", "0")]).await;
    let admin = app.admin_addr().expect("an admin port was asked for");
    assert_ne!(admin, app.addr());
    for path in ["/metrics", "/status"] {
        assert_eq!(Client::connect(admin).await.ask(&Request::get(path)).await.status, 200, "{path}");
        assert_eq!(app.ask(&Request::get(path)).await.status, 404, "{path} on the data port");
    }
    assert_eq!(app.ask(&Request::get("/healthz")).await.status, 200);
    let page = Request::get("/").header("accept", "text/html");
    assert_eq!(Client::connect(admin).await.ask(&page).await.status, 200);
    assert_eq!(app.ask(&page).await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d01_not_ready_before_the_first_scan_and_its_probes() {
    let upstream = Upstream::start("a", &["m"]).await;
    let (scanned, probed) = (Gate::shut(), Gate::shut());
    upstream.hold_probes(&probed);
    let app = TestApp::start_with_late_scan(&scanned, [Spec::of(&upstream)]).await;
    let is_ready = async || app.ask(&Request::get("/readyz")).await.status;
    assert_eq!(is_ready().await, 503);
    assert_eq!(app.ask(&Request::get("/healthz")).await.status, 200);
    scanned.open();
    eventually("the container is probed", async || upstream.probes() > 0).await;
    assert_eq!(is_ready().await, 503);
    probed.open();
    eventually("/readyz says 200", async || is_ready().await == 200).await;
    // What was found is there at once.
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_names_that_an_engine_would_take_are_routed() {
    let ollama = Upstream::start("ollama", &["llama3.2:latest", "llama3.2:1b", "org/mix:latest"]).await;
    let sglang = Upstream::start("sglang", &["qwen/base", "exact", "exact:one"]).await;
    let other = Upstream::start("other", &["exact:latest", "qwen/base:listed"]).await;
    let app = TestApp::with(&[&ollama, &sglang, &other]).await;
    let forms = |name: &str| {
        [
            Request::chat(name),
            Request::messages(name),
            Request::post("/api/chat", format!(r#"{{"model":"{name}"}}"#)),
            Request::get(&format!("/v1/realtime?model={name}")),
        ]
    };
    for (name, upstream) in [
        ("llama3.2", &ollama),
        ("llama3.2:latest", &ollama),
        ("llama3.2:1b", &ollama),
        ("org/mix", &ollama),
        ("qwen/base:my-adapter", &sglang),
        ("qwen/base:me/adapter_2.0", &sglang),
        ("qwen/base:listed", &other),
        ("exact", &sglang),
        ("exact:one", &sglang),
        ("exact:two", &sglang),
        ("exact:latest", &other),
    ] {
        for request in forms(name) {
            let index = upstream.count();
            let answer = app.ask(&request).await;
            assert_eq!((answer.status, upstream.count()), (200, index + 1), "{name}: {}", answer.text());
            // The engine reads the name that the client sent.
            let received = upstream.whole(index).await;
            let sent = String::from_utf8(request.bytes()).unwrap();
            assert_eq!(received.head.start, sent.lines().next().unwrap());
            assert_eq!(received.body.bytes, sent.split_once("\r\n\r\n").unwrap().1.as_bytes(), "{name}");
        }
    }
    let counts = || (ollama.count(), sglang.count(), other.count());
    let before = counts();
    for name in [
        "llama3.2:70b",
        "llama3.2:",
        "LLAMA3.2",
        "llama3",
        "mix",
        "base:my-adapter",
        "qwen:base",
        "org/mix:1b",
        ":latest",
        "qwen/base: x",
    ] {
        for request in forms(&name.replace(' ', "%20")).into_iter().skip(3).chain([Request::chat(name)]) {
            assert_openai_error(&app.ask(&request).await, 404, "model_not_found");
        }
    }
    assert_eq!(counts(), before);
    // What is told of models, as the engines tell it.
    for (name, status) in
        [("llama3.2", 200), ("org/mix", 200), ("org%2Fmix", 200), ("llama3.2:70b", 404), ("qwen/base:my-adapter", 404)]
    {
        assert_eq!(app.ask(&Request::get(&format!("/v1/models/{name}"))).await.status, status, "{name}");
    }
    // Names that clients make up do not become labels.
    for index in 0..50 {
        assert_eq!(app.ask(&Request::chat(&format!("qwen/base:adapter-{index}"))).await.status, 200);
    }
    let metrics = app.ask(&Request::get("/metrics")).await.text();
    assert!(!metrics.contains("adapter") && !metrics.contains("\"llama3.2\""), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r04_a_known_name_that_nobody_serves_now_is_not_another_one() {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["m:latest", "n:latest"]).await);
    let knobs = [("PROXY_QUEUE_MAX", "0")];
    let app = TestApp::start_with_backends(&knobs, &[&a, &b]).await;
    app.ended("a").await;
    app.rotation_is(1, "a has gone").await;
    assert_openai_error(&app.ask(&Request::chat("m")).await, 503, "model_unavailable");
    assert_eq!(app.ask(&Request::chat("n")).await.json()["served_by"], "b");
    app.ended("b").await;
    app.rotation_is(0, "b has gone").await;
    for name in ["n", "n:latest", "m", "m:adapter"] {
        assert_openai_error(&app.ask(&Request::chat(name)).await, 503, "model_unavailable");
    }
}
