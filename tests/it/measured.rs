//! Figures, not tests: what the proxy adds to each chunk, and how soon a backend hears that a client has left; with answers
//! being looked at for their usage and without, in turns. `cargo test --release --test it measured -- --ignored --nocapture`

use std::time::{Duration, Instant};

use crate::support::*;

const CHUNKS: usize = 200;
const STREAMS: usize = 20;
const LEAVES: usize = 50;

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)];
    let us = |time: Duration| time.as_micros();
    format!("p50 {} µs, p95 {} µs, p99 {} µs, n = {}", us(at(50)), us(at(95)), us(at(99)), times.len())
}

/// From the writing of each chunk to its arrival, over `STREAMS` streams one after the other.
async fn transit(upstream: &Upstream, addr: std::net::SocketAddr) -> Vec<Duration> {
    let mut delays = Vec::new();
    for _ in 0..STREAMS {
        let index = upstream.count();
        let mut client = Client::connect(addr).await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        let mut arrived = Vec::new();
        while let Some((at, _)) = client.piece().await {
            arrived.push(at);
        }
        assert_eq!(arrived.len(), CHUNKS);
        // The first thing sent is the head.
        let sent = upstream.peek(index, |request| request.sent_at[1..=CHUNKS].to_vec()).unwrap();
        delays.extend(arrived.iter().zip(sent).map(|(arrived, sent)| arrived.saturating_duration_since(sent)));
    }
    delays
}

/// From a client's leaving mid-stream to the end of the backend's connection.
async fn departures(upstream: &Upstream, addr: std::net::SocketAddr) -> Vec<Duration> {
    let mut delays = Vec::new();
    for _ in 0..LEAVES {
        let index = upstream.count();
        upstream.script(held_stream("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n", &Gate::shut(), ""));
        let mut client = Client::connect(addr).await;
        client.send(Request::chat("m").bytes()).await;
        client.head().await;
        client.piece().await.unwrap();
        let left: Instant = client.close();
        delays.push(upstream.hung_up(index).await.saturating_duration_since(left));
    }
    delays
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn measure_what_the_proxy_adds() {
    let upstream = Upstream::start("a", &["m"]).await;
    let with = ProxyProcess::start(&[("PROXY_USAGE_METRICS", "on")], &[&upstream]).await;
    let without = ProxyProcess::start(&[("PROXY_USAGE_METRICS", "off")], &[&upstream]).await;
    let mut script = sse_begin();
    for index in 0..CHUNKS {
        let event = format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":\
             [{{\"index\":0,\"delta\":{{\"content\":\" word{index}\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
        );
        script.extend([Step::Pause(Duration::from_millis(2)), Step::SendChunk(event.into())]);
    }
    script.push(Step::Send(LAST_CHUNK.into()));
    upstream.always(script);
    let targets = [("direct", upstream.addr), ("usage on", with.addr), ("usage off", without.addr)];
    for round in 0..3 {
        for (what, addr) in targets {
            println!(
                "measured: round {round}, chunk in transit, {what}: {}",
                percentiles(transit(&upstream, addr).await)
            );
        }
        for (what, addr) in &targets[1..] {
            let left = percentiles(departures(&upstream, *addr).await);
            println!("measured: round {round}, client left → backend's connection closed, {what}: {left}");
        }
    }
}
