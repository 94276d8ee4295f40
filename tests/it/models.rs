//! R3, D3: the list of models, answered from memory in the words of the backends.

use serde_json::{Value, json};

use crate::support::*;

/// What a vLLM says about a model and an adapter of it, with numbers that a careless copy would change.
const VLLM: &str = r#"{"object":"list","data":[
 {"id":"org/base","object":"model","created":1763714812,"owned_by":"vllm","root":"/models/base","parent":null,
  "max_model_len":131072,"permission":[{"id":"modelperm-1","allow_sampling":true,"group":null}]},
 {"id":"adapter","object":"model","created":1763714813,"owned_by":"vllm","root":"/models/a","parent":"org/base"}]}"#;

/// What a llama.cpp says: `meta`, and numbers past 64 bits.
const LLAMA: &str = r#"{"models":[{"name":"tiny"}],"object":"list","data":[
 {"id":"tiny","aliases":["t"],"object":"model","created":1,"owned_by":"llamacpp",
  "meta":{"vocab_type":2,"n_params":123456789012345678901234567890,"ratio":1.50,"note":"\u00e9 \/ \"q\""}}]}"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_the_list_is_the_union_sorted_by_id_with_all_metadata() {
    let (vllm, llama) = (Upstream::start("a", &[]).await, Upstream::start("b", &[]).await);
    vllm.set_models(VLLM);
    llama.set_models(LLAMA);
    let app = TestApp::with(&[&vllm, &llama]).await;
    let answer = app.ask(&Request::get("/v1/models")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let list = answer.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["adapter", "org/base", "tiny"]);
    for (source, backend_index, listed) in [(VLLM, 1, 0), (VLLM, 0, 1), (LLAMA, 0, 2)] {
        let told: Value = serde_json::from_str(source).unwrap();
        for (key, value) in told["data"][backend_index].as_object().unwrap() {
            assert_eq!(&list["data"][listed][key], value, "{key} of {}", ids[listed]);
        }
    }
    assert!(answer.text().contains("123456789012345678901234567890"), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_the_same_table_gives_the_same_bytes_whatever_the_order_of_arrival() {
    let (vllm, llama) = (Upstream::start("a", &[]).await, Upstream::start("b", &[]).await);
    vllm.set_models(VLLM);
    llama.set_models(LLAMA);
    let one = TestApp::with(&[&vllm, &llama]).await;
    let first = one.ask(&Request::get("/v1/models")).await;
    assert_eq!(one.ask(&Request::get("/v1/models?limit=1000")).await.bytes(), first.bytes());
    let other = TestApp::with(&[&llama, &vllm]).await;
    assert_eq!(other.ask(&Request::get("/v1/models")).await.bytes(), first.bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_no_backend_is_asked() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let probes = upstream.probes();
    for target in ["/v1/models", "/v1/models/m", "/v1/models/m?x"].into_iter().cycle().take(30) {
        assert_eq!(app.ask(&Request::get(target)).await.status, 200, "{target}");
    }
    assert_eq!((upstream.probes(), upstream.count()), (probes, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_an_empty_table_is_an_empty_list() {
    let app = TestApp::start().await;
    assert_eq!(app.ask(&Request::get("/v1/models")).await.json(), json!({"object":"list","data":[]}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_one_model_by_id_with_slashes_raw_and_encoded() {
    let upstream = Upstream::start("a", &[]).await;
    upstream.set_models(VLLM);
    let app = TestApp::with(&[&upstream]).await;
    let told: Value = serde_json::from_str(VLLM).unwrap();
    for target in ["/v1/models/org/base", "/v1/models/org%2Fbase", "/v1/models/org%2fb%61se"] {
        let answer = app.ask(&Request::get(target)).await;
        assert_eq!(answer.status, 200, "{target}: {}", answer.text());
        for (key, value) in told["data"][0].as_object().unwrap() {
            assert_eq!(&answer.json()[key], value, "{key} of {target}");
        }
    }
    for target in ["/v1/models/org", "/v1/models/base", "/v1/models/Adapter", "/v1/models/unheard%2Fof"] {
        assert_openai_error(&app.ask(&Request::get(target)).await, 404, "model_not_found");
    }
    let answer = app.ask(&Request::get("/v1/models/unheard").header("anthropic-version", "2023-06-01")).await;
    assert_eq!(assert_anthropic_error(&answer, 404), "not_found_error");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_anthropics_shape_for_its_clients() {
    let upstream = Upstream::start("a", &[]).await;
    upstream.set_models(VLLM);
    let app = TestApp::with(&[&upstream]).await;
    let list = app.ask(&Request::get("/v1/models?limit=1000").header("anthropic-version", "2023-06-01")).await.json();
    assert_eq!(list["has_more"], false);
    assert_eq!(list["first_id"], "adapter");
    assert_eq!(list["last_id"], "org/base");
    let data = list["data"].as_array().unwrap();
    assert_eq!(data.len(), 2);
    for model in data {
        assert_eq!(model["type"], "model", "{model}");
        assert!(model["id"].is_string() && model["display_name"].is_string(), "{model}");
        let created = model["created_at"].as_str().unwrap();
        assert!(created.starts_with("2025-11-21T08:46:5"), "RFC 3339 of `created`: {created}");
    }
    let one = app.ask(&Request::get("/v1/models/org%2Fbase").header("anthropic-version", "2023-06-01")).await.json();
    assert_eq!((&one["type"], &one["id"]), (&json!("model"), &json!("org/base")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d03_models_come_and_go_with_their_container() {
    let (a, b) = (Upstream::start("a", &["m1", "m2"]).await, Upstream::start("b", &["n"]).await);
    let app = TestApp::with(&[&a, &b]).await;
    app.models_are(&["m1", "m2", "n"]).await;
    for model in ["m1", "m2"] {
        assert_eq!(app.ask(&Request::chat(model)).await.json()["served_by"], "a");
    }
    app.ended("a").await;
    app.models_are(&["n"]).await;
    for model in ["m1", "m2"] {
        assert_openai_error(&app.ask(&Request::chat(model)).await, 503, "model_unavailable");
    }
    assert_eq!(app.ask(&Request::chat("n")).await.json()["served_by"], "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d12_a_refresh_follows_the_backend_and_one_failure_removes_nothing() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MODELS_REFRESH", "1s")], &[&upstream]).await;
    upstream.set_models(r#"{"object":"list","data":[{"id":"lora"},{"id":"m"}]}"#);
    app.models_are(&["lora", "m"]).await;
    assert_eq!(app.ask(&Request::chat("lora")).await.status, 200);
    let probes = upstream.probes();
    upstream.set_models("not a list of models");
    eventually("a refresh has failed", async || upstream.probes() > probes).await;
    upstream.set_models(r#"{"object":"list","data":[{"id":"m"}]}"#);
    // From the failed refresh to the good one, no moment without the model that is served all along.
    eventually("the adapter is gone", async || {
        assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
        let list = app.ask(&Request::get("/v1/models")).await.json();
        let ids: Vec<&str> =
            list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
        assert!(ids.contains(&"m"), "{ids:?}");
        ids == ["m"]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d13_an_object_that_clients_cannot_read_spoils_no_list() {
    let objects = [
        (
            "nested too deep",
            format!(r#"{{"id":"bad","x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000)),
            "levels deep",
        ),
        ("half a pair", r#"{"id":"bad","x":"\ud83e"}"#.to_owned(), "surrogate"),
        ("too long", format!(r#"{{"id":"bad","x":"{}"}}"#, "x".repeat(70_000)), "65536"),
        ("beyond a double", r#"{"id":"bad","x":1e999}"#.to_owned(), "out of range"),
        ("no number", r#"{"id":"bad","x":NaN}"#.to_owned(), "JSON"),
        ("a key twice", r#"{"id":"bad","owned_by":"a","owned_by":"b"}"#.to_owned(), "twice"),
    ];
    let good = Upstream::start("good", &["m"]).await;
    let app = TestApp::start_with_backends(&[("PROXY_MODELS_REFRESH", "1s")], &[&good]).await;
    for (what, object, reason) in objects {
        let list = format!(r#"{{"object":"list","data":[{object}]}}"#);
        let bad = Upstream::start("bad", &[]).await;
        bad.set_models(&list);
        app.announce(Spec::of(&bad)).await;
        eventually(what, async || {
            let status = app.ask(&Request::get("/status")).await.json();
            let backends = status["containers"].as_array().unwrap();
            let told = backends.iter().find(|one| one["name"] == "bad").map(ToString::to_string);
            told.is_some_and(|told| told.contains(reason))
        })
        .await;
        for dialect in ["", "2023-06-01"] {
            let answer = app.ask(&Request::get("/v1/models").header("anthropic-version", dialect)).await;
            assert_eq!(answer.json()["data"][0]["id"], "m", "{what}: {}", answer.text());
            assert_eq!(answer.json()["data"].as_array().unwrap().len(), 1, "{what}");
        }
        app.ended("bad").await;
        // One that turns bad keeps what it has said before.
        let probes = good.probes();
        good.set_models(list);
        eventually("a refresh has failed", async || good.probes() > probes + 1).await;
        app.models_are(&["m"]).await;
        good.set_models(r#"{"object":"list","data":[{"id":"m"}]}"#);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_models_are_not_deleted_through_the_proxy() {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    let status = app.ask(&Request::new("DELETE", "/v1/models/m")).await.status;
    assert!([404, 405].contains(&status), "{status}");
    assert_eq!(upstream.count(), 0);
}
