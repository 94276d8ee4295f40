//! P4, P7, P9, P10 and L2 after a storm: backends that fail in every way, clients that leave at any moment, containers that
//! come and go. What is random is seeded. Afterwards nothing may be left of it: no request in flight, nobody in line, no
//! place lost, no breaker that stays open, no connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};

use crate::support::*;

/// More than any request needs whose line moves, and less than the line's timeout: whoever is forgotten in it is found.
const PATIENT: Duration = Duration::from_secs(12);
const PLACES: usize = 3;
const CLIENTS: usize = 32;
/// Names and models of the containers; places are shared by the models of a container.
const CONTAINERS: [(&str, &[&str]); 3] = [("a", &["m"]), ("b", &["m", "n"]), ("c", &["n"])];

fn pause(ms: u64) -> Step {
    Step::Pause(Duration::from_millis(ms))
}

/// One of the ways to treat a request.
fn behaviour(rng: &mut fastrand::Rng) -> Script {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    let mut slow = vec![Step::ReadBody, pause(rng.u64(1..60))];
    slow.extend(json_reply(r#"{"id":"resp_1","ok":true}"#));
    match rng.u32(0..22) {
        0 => vec![Step::Reset],
        1 => vec![Step::ReadBody, Step::Close],
        2 => vec![Step::ReadBody, Step::Send("HTTP/1.1 200 OK\r\ncont".into()), Step::Reset],
        3 => vec![Step::ReadBody, Step::Send(head.into()), pause(5), Step::Reset],
        4 => reply("500 Internal Server Error", "", "broken"),
        5 => reply("429 Too Many Requests", "retry-after: 0\r\n", "busy"),
        6 => reply("503 Service Unavailable", "", "busy"),
        7 => {
            vec![Step::Send("HTTP/1.1 429 Slow\r\nretry-after: 1\r\ncontent-length: 4\r\n\r\nbusy".into()), Step::Close]
        }
        8 => vec![Step::Send("HTTP/1.1 413 Large\r\ncontent-length: 2\r\n\r\nno".into())],
        9 => [sse_begin(), vec![Step::SendChunk("data: 1\n\n".into()), pause(20), Step::Reset]].concat(),
        10 => [sse_begin(), vec![Step::Send("zz\r\nnot a chunk".into()), Step::Close]].concat(),
        11 => vec![Step::ReadBody, Step::Send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n".into())],
        12 => vec![Step::ReadBody, Step::Send("nonsense\r\n\r\n".into())],
        13 => vec![Step::ReadBody, pause(200), Step::Close],
        14 => [vec![Step::Send("HTTP/1.1 103 Early Hints\r\n\r\n".into())], slow].concat(),
        15 => [switching(), vec![Step::Echo]].concat(),
        16 => [sse_begin(), vec![Step::SendChunk("data: 1\n\n".into()), pause(30), Step::Send(LAST_CHUNK.into())]]
            .concat(),
        _ => slow,
    }
}

/// One request of some kind, to its end or until its client has had enough.
async fn ask(app: &TestApp, rng: &mut fastrand::Rng, client: &mut Option<Client>, slowest_ms: &AtomicU64) {
    let model = if rng.bool() { "m" } else { "n" };
    let mut with = match client.take() {
        Some(client) => client,
        None => app.client().await,
    };
    let since = Instant::now();
    let request = match rng.u32(0..10) {
        0 => Request::get("/v1/responses/resp_1"),
        1 => Request::new("HEAD", &format!("/v1/x?model={model}")),
        2 => Request::post("/v1/responses", format!(r#"{{"model":"{model}","previous_response_id":"resp_1"}}"#)),
        3 => {
            let upgrade = Request::get(&format!("/v1/realtime?model={model}"));
            upgrade.header("connection", "upgrade").header("upgrade", "websocket")
        }
        4 => {
            let text = "text ".repeat(rng.usize(1..60_000));
            Request::post("/v1/completions", format!(r#"{{"model":"{model}","prompt":"{text}"}}"#))
        }
        _ => Request::chat(model),
    };
    let bytes = request.bytes();
    if rng.u32(0..3) == 0 {
        // Leaves at some moment, perhaps before all is sent.
        let sent = if rng.u32(0..4) == 0 { rng.usize(0..bytes.len()) } else { bytes.len() };
        let sending = with.send_aside(bytes[..sent].to_vec());
        tokio::time::sleep(Duration::from_micros(rng.u64(0..40_000))).await;
        drop(sending);
        if rng.bool() {
            with.vanish()
        } else {
            with.close()
        };
        return;
    }
    let is_head = bytes.starts_with(b"HEAD");
    // The container that made the answer may have ended meanwhile, and the answer with it.
    let names_an_answer = bytes.starts_with(b"GET /v1/responses/");
    let sending = with.send_aside(bytes);
    let answer = with.next_answer(is_head).await;
    drop(sending);
    let elapsed = since.elapsed();
    slowest_ms.fetch_max(u64::try_from(elapsed.as_millis()).unwrap(), Relaxed);
    if let Ok(answer) = answer {
        let known = [101, 200, 400, 413, 429, 500, 502, 503];
        let is_gone = names_an_answer && answer.status == 404;
        assert!(is_gone || known.contains(&answer.status), "{} {}", answer.status, answer.text());
        assert!(elapsed < PATIENT, "{model}: {} after {elapsed:?}: {}", answer.status, answer.text());
        if answer.is_whole() && answer.status != 101 && answer.header("connection") != Some("close") {
            *client = Some(with);
        }
    }
}

/// Requests over one HTTP/2 connection, most of which are reset at some moment.
async fn ask_h2(app: &TestApp, rng: &mut fastrand::Rng) {
    let connection = connect_h2(app.addr()).await;
    for _ in 0..rng.u32(1..20) {
        let model = if rng.bool() { "m" } else { "n" };
        let body = Full::new(Bytes::from(format!(r#"{{"model":"{model}","messages":[]}}"#))).boxed();
        let uri = "http://proxy.test/v1/chat/completions";
        let request = http::Request::post(uri).header("content-type", "application/json").body(body).unwrap();
        let mut to = connection.clone();
        if to.ready().await.is_err() {
            return;
        }
        let whole = async {
            let answer = to.send_request(request).await?;
            let status = answer.status().as_u16();
            // It may break off.
            let _ = answer.into_body().collect().await;
            Ok::<_, hyper::Error>(status)
        };
        let time = if rng.bool() { Duration::from_micros(rng.u64(0..40_000)) } else { PATIENT };
        match tokio::time::timeout(time, whole).await {
            Ok(Ok(status)) => assert!([200, 413, 429, 500, 502, 503].contains(&status), "{status}"),
            Ok(Err(_)) => {}
            Err(_) => assert!(time < PATIENT, "forgotten"),
        }
    }
}

/// A container that lives, with its upstream.
struct Life {
    upstream: Upstream,
    incarnation: i64,
}

impl Life {
    async fn begin(app: &TestApp, at: usize, incarnation: i64) -> Life {
        let (name, models) = CONTAINERS[at];
        let upstream = Upstream::start(name, models).await;
        let spec = Spec::of(&upstream).label("inference.max_inflight", PLACES).incarnation(incarnation);
        app.announce(spec).await;
        Life { upstream, incarnation }
    }
}

async fn storm(seed: u64, time: Duration) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let balance = ["ewma", "least", "round_robin", "prefix"][rng.usize(0..4)];
    let retries = ["0", "1", "2", "3"][rng.usize(0..4)];
    let same = ["balance", "balance", "newest"][rng.usize(0..3)];
    println!("seed {seed}: {balance}, {retries} retries, {same}");
    let knobs = [
        ("PROXY_BALANCE", balance),
        ("PROXY_RETRIES", retries),
        ("PROXY_SAME_MODEL", same),
        ("PROXY_QUEUE_MAX", "20"),
        ("PROXY_DRAIN_TIMEOUT", "300ms"),
    ];
    let app = Arc::new(TestApp::start_with(&knobs).await);
    let mut lives = Vec::new();
    for at in 0..CONTAINERS.len() {
        lives.push(Life::begin(&app, at, 1).await);
    }
    app.models_are(&["m", "n"]).await;

    let is_over = Arc::new(AtomicBool::new(false));
    let slowest_ms = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (app, is_over, slowest_ms) = (app.clone(), is_over.clone(), slowest_ms.clone());
            let mut rng = rng.fork();
            tokio::spawn(async move {
                let (mut client, mut asked) = (None, 0_u64);
                while !is_over.load(Relaxed) {
                    match rng.u32(0..10) {
                        0 => ask_h2(&app, &mut rng).await,
                        _ => ask(&app, &mut rng, &mut client, &slowest_ms).await,
                    }
                    asked += 1;
                }
                asked
            })
        })
        .collect();

    let end = Instant::now() + time;
    while Instant::now() < end {
        for life in &lives {
            life.upstream.always(behaviour(&mut rng));
        }
        let at = rng.usize(0..lives.len());
        let name = CONTAINERS[at].0;
        match rng.u32(0..100) {
            // Killed, and started anew.
            0 => {
                lives[at].upstream.kill().await;
                app.ended(name).await;
                let incarnation = lives[at].incarnation + 1;
                lives[at] = Life::begin(&app, at, incarnation).await;
            }
            // Stopped, and started anew.
            1 => {
                app.stopping(name).await;
                tokio::time::sleep(Duration::from_millis(rng.u64(0..400))).await;
                app.ended(name).await;
                let incarnation = lives[at].incarnation + 1;
                lives[at] = Life::begin(&app, at, incarnation).await;
            }
            // Unhealthy for a while.
            2 => {
                let life = &lives[at];
                let spec =
                    Spec::of(&life.upstream).label("inference.max_inflight", PLACES).incarnation(life.incarnation);
                app.announce(spec.clone().health(Health::Unhealthy)).await;
                tokio::time::sleep(Duration::from_millis(rng.u64(0..400))).await;
                app.announce(spec).await;
            }
            _ => tokio::time::sleep(Duration::from_millis(rng.u64(1..20))).await,
        }
    }
    for life in &lives {
        life.upstream.always(json_reply(r#"{"ok":true}"#));
    }
    is_over.store(true, Relaxed);
    let mut asked = 0;
    for client in clients {
        asked += soon("a client is done", client).await.unwrap();
    }
    println!("seed {seed}: {asked} requests, the slowest {} ms", slowest_ms.load(Relaxed));

    // Nothing is left.
    for (name, models) in CONTAINERS {
        for model in models {
            eventually(format!("seed {seed}: nothing in flight at {name} for {model}"), async || {
                app.inflight(name, model).await == Some(0.0)
            })
            .await;
        }
    }
    for model in ["m", "n"] {
        assert_eq!(app.metric("proxy_queue_depth", &[("model", model)]).await, Some(0.0), "seed {seed}: {model}");
    }
    // Every breaker closes, and every place can be had: as many requests as there are places are there at once.
    if same == "balance" {
        eventually(format!("seed {seed}: every breaker closes"), async || {
            for model in ["m", "n"] {
                app.ask(&Request::chat(model)).await;
            }
            app.metric("proxy_backend_breaker_state", &[]).await == Some(0.0)
        })
        .await;
        // A probe that failed in the storm comes again after a pause, and must not meet the answers that are held below.
        eventually(format!("seed {seed}: every container is ready"), async || {
            app.metric("proxy_backends", &[("state", "ready")]).await == Some(CONTAINERS.len() as f64)
        })
        .await;
        // A backend that has pushed requests back is spared no longer.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let gate = Gate::shut();
        let before: Vec<usize> = lives.iter().map(|life| life.upstream.count()).collect();
        for life in &lives {
            life.upstream.always(held_reply(&gate));
        }
        let mut held = Vec::new();
        for at in 0..CONTAINERS.len() * PLACES {
            let mut client = app.client().await;
            client.send(Request::chat(["m", "n"][at % 2]).bytes()).await;
            held.push(client);
        }
        let counts =
            || -> Vec<usize> { lives.iter().zip(&before).map(|(l, before)| l.upstream.count() - before).collect() };
        eventually(format!("seed {seed}: all places are taken"), async || counts().iter().sum::<usize>() >= 8).await;
        assert!(counts().iter().all(|count| *count <= PLACES), "seed {seed}: {:?}", counts());
        gate.open();
        for mut client in held {
            assert_eq!(client.answer().await.status, 200);
        }
    }
    eventually(format!("seed {seed}: no connection is left"), async || {
        lives.iter().all(|life| life.upstream.open_connections() == 0)
    })
    .await;
    let app = Arc::into_inner(app).unwrap();
    app.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p04_nothing_is_left_of_a_storm() {
    storm(1, Duration::from_secs(3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two minutes"]
async fn p04_nothing_is_left_of_many_storms() {
    for seed in 2..10 {
        storm(seed, Duration::from_secs(10)).await;
    }
}
