//! How soon the proxy follows the engine, and how large it is: one table, to be copied into a note.

use std::{
    fmt::Write,
    time::{Duration, SystemTime},
};

use futures::{StreamExt, stream};
use http::StatusCode;
use tokio::{net::TcpStream, time::Instant};

use crate::support::{
    client::PATIENCE,
    engine::{self, Lab, docker},
    events::Events,
    load::Pulse,
    proxy::Proxy,
    wait::{eventually, ms_between, percentile},
};

/// Times that each thing is done.
const REPETITIONS: usize = 20;
/// HEALTHCHECK interval of the containers measured.
const INTERVAL: Duration = Duration::from_millis(300);
/// Time between two requests where the last one accepted is looked for; also how exact that can be.
const BEAT: Duration = Duration::from_millis(2);
/// Labelled containers that a proxy finds when it starts.
const CROWD: usize = 50;

/// Delays of one kind, in milliseconds.
#[derive(Default)]
struct Row {
    values: Vec<f64>,
}

#[tokio::test]
async fn measure_latencies() {
    let Some(lab) = engine::alone("latency").await else {
        return;
    };
    let mut table = String::from("| what | n | p50 | p95 | max |\n|---|---|---|---|---|\n");

    let [served, accepted, unlisted] = one_life_at_a_time(&lab).await;
    served.print(&mut table, "health event → first 200, ms");
    accepted.print(&mut table, "`kill` event → last request accepted, ms (negative: before it)");
    unlisted.print(&mut table, "`die` event → out of `/v1/models`, ms (after a crash)");

    let [listening, rss] = alone_on_the_engine(&lab).await;
    listening.print(&mut table, "process start → listening, ms");
    rss.print(&mut table, "RSS when ready, no backend, MiB");

    let [ready, complete, rss] = among_a_crowd(&lab).await;
    ready.print(&mut table, &format!("process start → `/readyz` 200 with {CROWD} labelled containers, ms"));
    complete.print(&mut table, &format!("process start → all {CROWD} models listed, ms"));
    rss.print(&mut table, &format!("RSS when ready, {CROWD} backends, MiB"));

    let image = docker(["image", "inspect", "--format", "{{.Size}}", lab.proxy_image()]).await;
    let megabytes = image.parse::<f64>().unwrap() / 1e6;
    println!("\n{table}| image size, MB | | {megabytes:.2} | | |\n");
    assert!(megabytes < 12.0, "the image has {megabytes:.2} MB");
}

/// A container comes up, is stopped under traffic, comes up again, and crashes.
async fn one_life_at_a_time(lab: &Lab) -> [Row; 3] {
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let (mut served, mut accepted, mut unlisted) = (Row::default(), Row::default(), Row::default());
    for n in 0..REPETITIONS {
        let born = SystemTime::now();
        let backend = lab.backend(&format!("b{n}")).network(&net).healthcheck(INTERVAL).start().await;
        proxy.until_serves(backend.model()).await;
        let first = SystemTime::now();
        served.push(ms_between(events.next(&backend.id, "health_status: healthy", born).await.at, first));

        // It refuses to die, so that what keeps requests away is the proxy.
        backend.ctl("sigterm=ignore").await;
        let pulse = Pulse::start(&proxy, backend.model(), BEAT);
        eventually("the pulse is served", Duration::from_secs(5), async || pulse.serves().then_some(())).await;
        docker(["stop", "--time", "1", &backend.id]).await;
        let killed = events.next(&backend.id, "kill", born).await.at;
        let samples = pulse.stop().await;
        let last = samples.iter().filter(|sample| sample.was_served()).map(|sample| sample.sent_at).max();
        accepted.push(ms_between(killed, last.expect("the pulse was served")));

        let again = SystemTime::now();
        docker(["start", &backend.id]).await;
        proxy.until_lists(backend.model()).await;
        backend.crash("exit=3").await;
        let gone = proxy.until_unlisted(backend.model()).await;
        unlisted.push(ms_between(events.next(&backend.id, "die", again).await.at, gone));
        docker(["rm", "--force", &backend.id]).await;
    }
    [served, accepted, unlisted]
}

/// Starts with nothing to find.
async fn alone_on_the_engine(lab: &Lab) -> [Row; 2] {
    let (mut listening, mut rss) = (Row::default(), Row::default());
    for _ in 0..REPETITIONS {
        let begun = Instant::now();
        let proxy = lab.proxy().on_host().await;
        while TcpStream::connect(proxy.addr).await.is_err() {
            tokio::task::yield_now().await;
        }
        listening.push(begun.elapsed().as_secs_f64() * 1e3);
        rss.push(resident_mib(&proxy.ready().await).await);
    }
    [listening, rss]
}

/// Starts with a crowd to find.
async fn among_a_crowd(lab: &Lab) -> [Row; 3] {
    let crowd: Vec<_> = (0..CROWD).map(|n| lab.backend(&format!("crowd{n}"))).collect();
    let crowd: Vec<_> = stream::iter(crowd).map(|spec| spec.up()).buffer_unordered(4).collect().await;
    let (mut ready, mut complete, mut rss) = (Row::default(), Row::default(), Row::default());
    for _ in 0..REPETITIONS {
        let begun = Instant::now();
        let proxy = lab.proxy().on_host().await;
        let is_ready =
            async || proxy.readyz().await.is_ok_and(|status| status == StatusCode::OK).then(|| begun.elapsed());
        let lists_all = async || {
            let models = proxy.try_models().await?;
            crowd.iter().all(|backend| models.contains(backend.model())).then(|| begun.elapsed())
        };
        let (until_ready, until_complete) = tokio::join!(
            eventually("it is ready", PATIENCE, is_ready),
            eventually("all are listed", PATIENCE, lists_all)
        );
        ready.push(until_ready.as_secs_f64() * 1e3);
        complete.push(until_complete.as_secs_f64() * 1e3);
        rss.push(resident_mib(&proxy).await);
    }
    [ready, complete, rss]
}

async fn resident_mib(proxy: &Proxy) -> f64 {
    proxy.memory_kib("VmRSS").await as f64 / 1024.0
}

// === impl Row ===

impl Row {
    fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    fn print(&self, table: &mut String, what: &str) {
        let [p50, p95, max] = [50.0, 95.0, 100.0].map(|p| percentile(&self.values, p));
        writeln!(table, "| {what} | {} | {p50:.1} | {p95:.1} | {max:.1} |", self.values.len()).unwrap();
    }
}
