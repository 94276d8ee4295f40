//! The proxy's own want of descriptors is nobody else's fault: no backend is blamed, and connections without a request go
//! before a request does.

use crate::support::*;

async fn two() -> (Upstream, Upstream, ProxyProcess) {
    let (a, b) = (Upstream::start("a", &["m"]).await, Upstream::start("b", &["n"]).await);
    let proxy = ProxyProcess::start(&[], &[&a, &b]).await;
    let mut client = Client::connect(proxy.addr).await;
    eventually("both are there", async || {
        client.ask(&Request::get("/v1/models")).await.json()["data"].as_array().is_some_and(|data| data.len() == 2)
    })
    .await;
    (a, b, proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_go_before_a_request_does() {
    let (a, b, proxy) = two().await;
    let mut client = Client::connect(proxy.addr).await;
    let gate = Gate::shut();
    a.always(held_reply(&gate));
    let mut others = Vec::new();
    for _ in 0..10 {
        let mut other = Client::connect(proxy.addr).await;
        other.send(Request::chat("m").bytes()).await;
        others.push(other);
    }
    eventually("all are there", async || a.count() == 10).await;
    gate.open();
    for other in &mut others {
        assert_eq!(other.answer().await.status, 200);
    }
    // Their connections to `a` are idle now, and there is room for no other one.
    proxy.open_no_more_descriptors();
    let answer = client.ask(&Request::chat("n")).await;
    assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some("b")), "{}", answer.text());
    assert_eq!(b.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_descriptor_the_proxy_says_that_it_is_its_own_shortage() {
    let (a, b, proxy) = two().await;
    let mut client = Client::connect(proxy.addr).await;
    let gate = Gate::shut();
    b.always(held_reply(&gate));
    let mut held = Client::connect(proxy.addr).await;
    held.send(Request::chat("n").bytes()).await;
    b.whole(0).await;
    assert_eq!(client.ask(&Request::get("/healthz")).await.status, 200);
    proxy.open_no_more_descriptors();
    // More often than what trips a breaker.
    for _ in 0..30 {
        let answer = client.ask(&Request::chat("m")).await;
        assert_openai_error(&answer, 503, "proxy_shortage");
        assert!(answer.header("retry-after").is_some() && answer.text().contains("the proxy itself"));
    }
    let status = client.ask(&Request::get("/status")).await.json();
    for container in status["containers"].as_array().unwrap() {
        assert_eq!(
            (container["breaker"].as_str(), container["failed"].as_u64()),
            (Some("closed"), Some(0)),
            "{container}"
        );
        assert!(container["last_error"].is_null(), "{container}");
    }
    proxy.open_descriptors_again();
    let answer = client.ask(&Request::chat("m")).await;
    assert_eq!((answer.status, answer.json()["served_by"].as_str()), (200, Some("a")), "{}", answer.text());
    gate.open();
    assert_eq!(held.answer().await.status, 200);
    assert_eq!(a.count(), 1);
}
