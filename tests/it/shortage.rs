//! The proxy's own want of descriptors is nobody else's fault: no backend is blamed, and connections without a request go
//! before a request does.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use crate::support::*;

/// Open files of a proxy that may have a hundred clients.
const FILES: u64 = 256;
/// Clients that come and send no whole request.
const LOITERERS: usize = 200;
/// What a health check waits for its answer.
const HEALTH_TIME: Duration = Duration::from_secs(1);

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

// === the health check ===

/// A proxy with room for few, and where it is reached from this machine.
async fn small(bind: &str, upstream: &Upstream) -> (ProxyProcess, SocketAddr) {
    let proxy = ProxyProcess::start_with_files(FILES, &[("PROXY_BIND", bind)], &[upstream]).await;
    let addr = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), proxy.addr.port());
    (proxy, addr)
}

/// Connections that have sent so much, and go on byte by byte if they drip; they end with the set.
async fn loiterers(addr: SocketAddr, begin: &'static str, drips: bool) -> JoinSet<()> {
    let mut all = JoinSet::new();
    for _ in 0..LOITERERS {
        let mut client = Client::connect(addr).await;
        all.spawn(async move {
            let mut is_open = client.try_send(begin).await.is_ok();
            let mut tick = tokio::time::interval(Duration::from_millis(50));
            while drips && is_open {
                tick.tick().await;
                is_open = client.try_send("x").await.is_ok();
            }
            std::future::pending::<()>().await;
            drop(client);
        });
    }
    all
}

async fn assert_healthy(addr: SocketAddr, what: &str) {
    for page in ["/healthz", "/health", "/readyz", "/metrics", "/status"] {
        let since = Instant::now();
        let answer = Client::connect(addr).await.ask(&Request::get(page)).await;
        assert_eq!(answer.status, 200, "{page}, {what}");
        assert!(since.elapsed() < HEALTH_TIME, "{page} took {:?}, {what}", since.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_health_check_gets_in_past_clients_of_the_same_machine() {
    let upstream = Upstream::start("a", &["m"]).await;
    for bind in ["127.0.0.1", "::"] {
        let (proxy, addr) = small(bind, &upstream).await;
        for (begin, drips) in [
            ("", false),
            ("GET /v1/models HTTP/1.1\r\nhost: a\r\nx: ", false),
            ("GET /healthz HTTP/1.1\r\nhost: a\r\nx: ", true),
            ("PRI * HTTP/2.0\r\n\r\nS", false),
        ] {
            let what = format!("{bind}: {LOITERERS} that sent {begin:?}, dripping: {drips}");
            let all = loiterers(addr, begin, drips).await;
            // Again and again: what the check itself leaves behind is in nobody's way.
            for _ in 0..5 {
                assert_healthy(addr, &what).await;
            }
            drop(all);
            eventually(format!("all are served again, {what}"), async || {
                Client::connect(addr).await.ask(&Request::chat("m")).await.status == 200
            })
            .await;
        }
        drop(proxy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_the_same_machine_is_refused_when_the_proxy_is_full() {
    let upstream = Upstream::start("a", &["m"]).await;
    let (_proxy, addr) = small("127.0.0.1", &upstream).await;
    let gate = Gate::shut();
    upstream.always(held_stream("data: 1\n\n", &gate, "data: 2\n\n"));
    let mut busy = Vec::new();
    for _ in 0..FILES / 5 * 2 {
        let mut client = Client::connect(addr).await;
        client.send(Request::chat("m").bytes()).await;
        busy.push(client);
    }
    eventually("the proxy is full", async || upstream.count() == busy.len()).await;
    let refused = async |request: Request| {
        let mut client = Client::connect(addr).await;
        let answer = client.ask(&request).await;
        assert_retry_after(&answer);
        assert_eq!((answer.status, answer.header("connection")), (503, Some("close")));
        assert!(matches!(client.ended().await, End::Closed));
        answer
    };
    for request in [Request::get("/v1/models"), Request::chat("m"), Request::get("/no/such/path")] {
        assert_openai_error(&refused(request).await, 503, "proxy_shortage");
    }
    assert_anthropic_error(&refused(Request::messages("m")).await, 503);
    // Many at a time are refused as well, and not one is left without an answer.
    let mut all = JoinSet::new();
    for _ in 0..LOITERERS {
        let mut client = Client::connect(addr).await;
        client.send(Request::chat("m").bytes()).await;
        all.spawn(async move { client.answer().await.status });
    }
    assert_healthy(addr, "many want more than there is").await;
    for status in soon("all are answered", all.join_all()).await {
        assert_eq!(status, 503);
    }
    // A head that never comes is waited for, but not for long.
    let mut dripping = Client::connect(addr).await;
    let drip = dripping.send_pieces_aside(vec!["GET / HTTP/1.1\r\nx: ".into(); 100], Duration::from_millis(100));
    let since = Instant::now();
    let _ = dripping.ended().await;
    assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
    drop(drip);
    let mut front = Client::connect(addr).await;
    front.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    let (said, _) = front.raw_to_end().await;
    assert!(said.is_empty(), "{said:?}");
    assert_eq!(upstream.count(), busy.len());
    gate.open();
    for client in &mut busy {
        assert_eq!(client.answer().await.status, 200);
    }
    eventually("their connections, which are idle now, make room", async || {
        Client::connect(addr).await.ask(&Request::chat("m")).await.status == 200
    })
    .await;
}
