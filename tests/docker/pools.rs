//! P1, P3, P5, P10: several containers with one model.

use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;

use crate::support::{
    backend::Backend,
    engine::{self, Lab, docker},
    load::{Load, Sample, failures, sent_after},
    proxy::Proxy,
    wait::eventually,
};

const CLIENTS: usize = 8;

/// A replica that answers after so many milliseconds, twice at a time as fast as one token a millisecond.
async fn replica(lab: &Lab, net: &str, model: &str, role: &str, latency_ms: u64) -> Backend {
    let spec = lab.backend(role).network(net).model(model);
    spec.demo("--tokens", 5).demo("--token-gap-ms", 1).demo("--latency-ms", latency_ms).up().await
}

async fn reaches(load: &Load, backend: &Backend) {
    let reached = async || load.has_reached(&backend.name).then_some(());
    eventually(&format!("{} gets traffic", backend.name), Duration::from_secs(20), reached).await;
}

/// How many of `samples` this backend has served, and of how many.
fn share(samples: &[&Sample], backend: &Backend) -> (usize, usize) {
    (samples.iter().filter(|sample| sample.was_served_by(&backend.name)).count(), samples.len())
}

async fn breaker(proxy: &Proxy, backend: &Backend) -> Vec<f64> {
    proxy.metric("proxy_backend_breaker_state", &format!("backend=\"{}\"", backend.name)).await
}

#[tokio::test]
async fn p01_two_containers_are_one_pool_and_lose_nothing_when_one_goes() {
    let Some(lab) = engine::shared("p01").await else { return };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let (a, b) = (replica(&lab, &net, &model, "a", 5).await, replica(&lab, &net, &model, "b", 5).await);
    proxy.until_serves(&model).await;
    let load = Load::start(&proxy, &model, CLIENTS);
    reaches(&load, &a).await;
    reaches(&load, &b).await;
    let listed = proxy.get("/v1/models").await.unwrap().json();
    let entries = listed["data"].as_array().unwrap().iter().filter(|object| object["id"] == *model).count();
    assert_eq!(entries, 1);
    docker(["stop", "--time", "20", &a.id]).await;
    let before = load.served();
    eventually("traffic after it", Duration::from_secs(20), async || (load.served() > before + 100).then_some(()))
        .await;
    let samples = load.stop().await;
    assert_eq!(failures(&samples), "", "of {}", samples.len());
    println!("p01: {} requests, one of two containers stopped meanwhile: 0 failed", samples.len());
}

#[tokio::test]
async fn p01_with_newest_the_last_one_gets_all_and_the_earlier_one_takes_over() {
    let Some(lab) = engine::shared("p01n").await else { return };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let proxy = lab.proxy().network(&net).env("PROXY_SAME_MODEL", "newest").in_container().await.ready().await;
    let old = replica(&lab, &net, &model, "old", 1).await;
    proxy.until_serves(&model).await;
    let new = replica(&lab, &net, &model, "new", 1).await;
    let is_served_by = async |backend: &Backend| {
        let answer = proxy.chat(&model).await.ok()?;
        (answer.backend() == Some(&*backend.name)).then_some(())
    };
    eventually("the new one is asked", Duration::from_secs(20), async || is_served_by(&new).await).await;
    for _ in 0..20 {
        assert_eq!(proxy.chat(&model).await.unwrap().backend(), Some(&*new.name));
    }
    docker(["kill", &new.id]).await;
    eventually("the old one takes over", Duration::from_secs(5), async || is_served_by(&old).await).await;
}

#[tokio::test]
async fn p03_a_cold_replica_gets_its_share_soon_and_not_more() {
    let Some(lab) = engine::alone("p03").await else { return };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let mut warm = Vec::new();
    for role in ["a", "b", "c"] {
        warm.push(replica(&lab, &net, &model, role, 20).await);
    }
    proxy.until_serves(&model).await;
    let load = Load::start(&proxy, &model, CLIENTS);
    for backend in &warm {
        reaches(&load, backend).await;
    }
    let cold = replica(&lab, &net, &model, "cold", 20).await;
    let ready = async || {
        let count = proxy.metric("proxy_backend_inflight", &format!("backend=\"{}\"", cold.name)).await;
        (!count.is_empty()).then(SystemTime::now)
    };
    let joined = eventually("it is ready", Duration::from_secs(20), ready).await;
    reaches(&load, &cold).await;
    let waited = joined.elapsed().unwrap_or_default();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let samples = load.stop().await;
    let after = sent_after(&samples, joined, Duration::ZERO);
    let first_second: Vec<&Sample> =
        after.iter().filter(|s| s.sent_at < joined + Duration::from_secs(1)).copied().collect();
    let (at_once, of_first) = share(&first_second, &cold);
    let (in_all, of_all) = share(&after, &cold);
    println!(
        "p03: first request {waited:?} after it was ready; {at_once} of {of_first} in the first second, {in_all} of {of_all} in ten"
    );
    assert_eq!(failures(&samples), "");
    assert!(waited < Duration::from_secs(1));
    assert!(at_once * 4 < of_first * 3, "three times its share");
    assert!(
        in_all * 10 > of_all * 2,
        "with four replicas its share is a quarter; nine tenths of 30 % of a half is 15 %"
    );
}

#[tokio::test]
async fn p05_failing_fast_attracts_no_traffic() {
    let Some(lab) = engine::shared("p05").await else { return };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let (good, bad) = (replica(&lab, &net, &model, "good", 10).await, replica(&lab, &net, &model, "bad", 1).await);
    proxy.until_serves(&model).await;
    bad.ctl("error_status=500").await;
    let mut failed = 0;
    for _ in 0..200 {
        let answer = proxy.chat(&model).await.unwrap();
        failed += usize::from(answer.status != StatusCode::OK);
    }
    println!("p05: {failed} of 200 failed while one of two replicas answered every request with 500 at once");
    assert!(failed <= 5 + 195 / 20, "{failed}");
    // One that refuses connections, though its container runs: nobody notices.
    bad.ctl("error_status=200").await;
    let stopped = lab.backend("shut").network(&net).model(&model).up().await;
    eventually("it is routed", Duration::from_secs(20), async || {
        let count = proxy.metric("proxy_backend_inflight", &format!("backend=\"{}\"", stopped.name)).await;
        (!count.is_empty()).then_some(())
    })
    .await;
    stopped.crash("exit=3").await;
    for _ in 0..200 {
        assert_eq!(proxy.chat(&model).await.unwrap().status, StatusCode::OK);
    }
    drop(good);
}

#[tokio::test]
async fn p10_a_restarted_container_starts_with_a_clean_record() {
    let Some(lab) = engine::shared("p10").await else { return };
    let net = lab.network("net").await;
    let model = lab.name("model");
    let proxy = lab.proxy().network(&net).env("PROXY_BALANCE", "round_robin").in_container().await.ready().await;
    let (a, b) = (replica(&lab, &net, &model, "a", 1).await, replica(&lab, &net, &model, "b", 1).await);
    proxy.until_serves(&model).await;
    for backend in [&a, &b] {
        backend.ctl("error_status=500").await;
    }
    eventually("both breakers are open", Duration::from_secs(20), async || {
        let _ = proxy.chat(&model).await;
        (breaker(&proxy, &a).await == [2.0] && breaker(&proxy, &b).await == [2.0]).then_some(())
    })
    .await;
    docker(["restart", "--time", "1", &a.id]).await;
    eventually("a clean record", Duration::from_secs(20), async || (breaker(&proxy, &a).await == [0.0]).then_some(()))
        .await;
    assert_eq!(breaker(&proxy, &b).await, [2.0], "the end of one resets nothing of another");
    // But for its trials, which are a second apart at least; the first may be due by now.
    let since = Instant::now();
    let mut trials = 0;
    for _ in 0..20 {
        trials += u64::from(proxy.chat(&model).await.unwrap().status != StatusCode::OK);
    }
    assert!(trials <= 1 + since.elapsed().as_secs(), "{trials} requests to the one that fails");
}
