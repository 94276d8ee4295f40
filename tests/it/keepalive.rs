//! P8: the race that keep-alive cannot win. A backend closes a connection that has been idle for so long, just when the
//! next request is on its way to it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::*;

/// A backend that closes connections idle for `idle`, and says nothing of it, as uvicorn does after 5 s.
struct Hasty {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
}

impl Hasty {
    async fn start(idle: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (connections, closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (opened, ended) = (Arc::clone(&connections), Arc::clone(&closed));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                opened.fetch_add(1, Ordering::Relaxed);
                let ended = Arc::clone(&ended);
                tokio::spawn(async move {
                    if answer_until_idle(stream, idle).await.is_err() {
                        ended.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self { addr, connections, closed }
    }
}

/// # Errors
/// The connection has been idle for too long.
async fn answer_until_idle(mut stream: TcpStream, idle: Duration) -> Result<(), tokio::time::error::Elapsed> {
    stream.set_nodelay(true).unwrap();
    let mut asked = Vec::new();
    loop {
        let mut piece = [0; 4096];
        // The first request may take its time, as that of a fresh connection does.
        let read = tokio::time::timeout(idle, stream.read(&mut piece)).await?;
        let Ok(n @ 1..) = read else { return Ok(()) };
        asked.extend_from_slice(&piece[..n]);
        let text = String::from_utf8_lossy(&asked).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        if body.len() < length.unwrap_or(0) {
            continue;
        }
        asked.clear();
        let json = if head.contains("/models ") { r#"{"object":"list","data":[{"id":"m"}]}"# } else { "{}" };
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{json}", json.len());
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return Ok(());
        }
    }
}

/// Clients that ask once per `idle`, a hair earlier or later, for so long.
async fn race(idle: Duration, clients: u64, time: Duration) {
    let backend = Hasty::start(idle).await;
    let app = TestApp::start_with(&[("PROXY_RETRIES", "0")]).await;
    app.add(Spec::at("hasty", backend.addr)).await;
    let until = Instant::now() + time;
    let addr = app.addr();
    let askers = (0..clients).map(|seed| {
        tokio::spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut client = Client::connect(addr).await;
            let mut asked = 0;
            while Instant::now() < until {
                let answer = client.ask(&Request::chat("m")).await;
                assert_eq!(answer.status, 200, "after {asked} requests: {}", answer.text());
                asked += 1;
                let jitter = Duration::from_micros(rng.u64(..4_000));
                tokio::time::sleep((idle + jitter).saturating_sub(Duration::from_millis(2))).await;
            }
            asked
        })
    });
    let mut asked = 0;
    for asker in askers.collect::<Vec<_>>() {
        asked += asker.await.unwrap();
    }
    let (connections, closed) = (backend.connections.load(Ordering::Relaxed), backend.closed.load(Ordering::Relaxed));
    println!(
        "p08: idle limit {idle:?}: {asked} requests, 0 failed; {connections} connections, {closed} closed by the backend"
    );
    // Where the proxy is the first to close, there is nothing to race with.
    assert!(asked > 0 && (closed > 0 || idle > Duration::from_secs(3)), "there was no race");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p08_requests_at_the_moment_a_backend_closes_its_idle_connections() {
    race(Duration::from_millis(100), 16, Duration::from_secs(3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes five minutes"]
async fn p08_the_same_for_five_minutes() {
    let time = Duration::from_secs(300);
    tokio::join!(race(Duration::from_secs(1), 16, time), race(Duration::from_secs(5), 16, time));
}
