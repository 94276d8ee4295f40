//! The lines that promise a time or an amount: D1, D2, D7, D12's bound, D13, L1 to L4, L9 and L13. Each has the machine to
//! itself.

use std::time::{Duration, SystemTime};

use futures::future::join_all;
use http::StatusCode;
use tokio::time::{Instant, sleep_until};

use crate::support::{
    client::Reply,
    engine::{self, Lab, docker, docker_meanwhile, inspect},
    events::Events,
    forwarder::{Forwarder, Link, everything},
    load::{Outcome, Pulse, Sample, failures, sent_after},
    proxy::{Proxy, is_running},
    scripted::{Script, Scripted},
    wait::{eventually, ms_between, percentile, throughout},
};

/// HEALTHCHECK interval where Docker's verdict is part of what is tested.
const OFTEN: Duration = Duration::from_millis(300);
/// HEALTHCHECK interval that leaves time to break a container before its first check.
const SELDOM: Duration = Duration::from_secs(2);
/// Time between the requests of a pulse.
const BEAT: Duration = Duration::from_millis(5);
/// From the beginning of time, for events of containers that are new.
const EVER: SystemTime = SystemTime::UNIX_EPOCH;

#[tokio::test]
async fn d01_running_before_start_is_listed_and_routed() {
    let Some(lab) = engine::alone("d01").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let begun = SystemTime::now();
    let backends = join_all((0..3).map(|n| lab.backend(&format!("b{n}")).network(&net).healthcheck(OFTEN).up())).await;
    for backend in &backends {
        events.next(&backend.id, "health_status: healthy", begun).await;
    }

    let proxy = lab.proxy().network(&net).in_container().await;
    let started = events.next(proxy.container(), "start", begun).await.at;
    for backend in &backends {
        proxy.until_serves(backend.model()).await;
        assert!(proxy.lists(backend.model()).await, "{} is served but not listed", backend.model());
    }
    let took = ms_between(started, SystemTime::now());
    println!("d01: three backends served {took:.0} ms after the start of the proxy's container");
    assert!(took <= 2000.0, "served {took:.0} ms after the start");

    // With the engine's answers held back there is nothing to be ready with.
    let relay = Forwarder::unix(&lab, "relay", Link::Held, everything).await;
    let proxy = lab.proxy().through(&relay).on_host().await;
    eventually("/readyz answers at all", Duration::from_secs(5), async || proxy.readyz().await.ok()).await;
    throughout("before the first scan", Duration::from_millis(500), async || match proxy.readyz().await {
        Ok(StatusCode::SERVICE_UNAVAILABLE) => None,
        other => Some(format!("/readyz: {other:?}")),
    })
    .await;
    relay.set(Link::Open).await;
    let opened = Instant::now();
    let proxy = proxy.ready().await;
    assert!(opened.elapsed() <= Duration::from_secs(2), "ready {:?} after the engine answered", opened.elapsed());
    for backend in &backends {
        let answer = proxy.chat(backend.model()).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "ready before {} was: {}", backend.model(), answer.text());
        assert!(proxy.lists(backend.model()).await);
    }
}

#[tokio::test]
async fn d02_becoming_healthy_is_served_within_200_ms() {
    let Some(lab) = engine::alone("d02").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let mut delays = Vec::new();
    for n in 0..20 {
        delays.push(health_to_first_answer(&lab, &proxy, &events, &net, &format!("b{n}")).await);
    }
    let (p50, p95) = (percentile(&delays, 50.0), percentile(&delays, 95.0));
    println!("d02: health event to first 200: p50 {p50:.1} ms, p95 {p95:.1} ms, n = {}", delays.len());
    assert!(p95 <= 200.0, "p95 of {delays:.1?}");
}

#[tokio::test]
async fn d07_a_hanging_probe_delays_nothing() {
    let Some(lab) = engine::alone("d07").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let measure = async |round: &str| {
        let mut delays = Vec::new();
        for n in 0..7 {
            delays.push(health_to_first_answer(&lab, &proxy, &events, &net, &format!("{round}{n}")).await);
        }
        delays
    };
    let free = measure("free").await;
    let hangers =
        join_all((0..4).map(|n| lab.backend(&format!("hanger{n}")).network(&net).healthcheck(SELDOM).up())).await;
    for hanger in &hangers {
        hanger.ctl("hang=models").await;
    }
    for hanger in &hangers {
        events.next(&hanger.id, "health_status: healthy", SystemTime::UNIX_EPOCH).await;
        assert!(
            !proxy.lists(hanger.model()).await,
            "{} was listed before it hung: the test proves nothing",
            hanger.name
        );
    }
    let held = measure("held").await;
    let (free_p50, held_p50) = (percentile(&free, 50.0), percentile(&held, 50.0));
    println!("d07: health event to first 200: p50 {free_p50:.1} ms, with four hanging probes {held_p50:.1} ms");
    assert!(held_p50 - free_p50 < 100.0, "{free:.1?} became {held:.1?}");
    assert!(percentile(&held, 100.0) <= 300.0, "{held:.1?}");

    // A proxy that starts among them serves the good one as soon.
    let good = lab.backend("good").network(&net).up().await;
    let second = lab.proxy().network(&net).in_container().await;
    let started = events.next(second.container(), "start", SystemTime::UNIX_EPOCH).await.at;
    second.until_serves(good.model()).await;
    let took = ms_between(started, SystemTime::now());
    assert!(took <= 2000.0, "served {took:.0} ms after the start of a proxy");
}

#[tokio::test]
async fn d12_an_unknown_model_is_asked_for_once_a_second() {
    let Some(lab) = engine::alone("d12b").await else { return };
    let counted = Scripted::start(Script::Models(vec![lab.name("counted")])).await;
    counted.enrolled(&lab, "counted").start().await;
    let (base, adapter) = (lab.name("base"), lab.name("adapter"));
    let backend = lab.backend("b").model(&base).up().await;
    let proxy = lab.proxy().env("PROXY_MODELS_REFRESH", "5m").on_host().await.ready().await;
    proxy.until_lists(&lab.name("counted")).await;
    proxy.until_lists(&base).await;

    let before = counted.probes();
    let pulse = Pulse::start(&proxy, &adapter, Duration::from_millis(20));
    let asked = async || (counted.probes() > before).then_some(());
    eventually("an early refresh", Duration::from_secs(2), asked).await;
    let (begun, first) = (Instant::now(), counted.probes());
    sleep_until(begun + Duration::from_secs(4)).await;
    let refreshes = counted.probes() - first;
    println!("d12: {refreshes} more refreshes in the 4 s after the first");
    assert!((1..=4).contains(&refreshes), "{refreshes} refreshes in 4 s");

    // And it pays: a model that has just appeared need not wait for the regular refresh.
    backend.ctl(&format!("models={base},{adapter}")).await;
    proxy.until_answers(&adapter, StatusCode::OK, Duration::from_secs(2)).await;
    drop(pulse.stop().await);
}

#[tokio::test]
async fn d13_hostile_model_lists_are_not_registered() {
    let Some(lab) = engine::alone("d13").await else { return };
    let bait = Scripted::start(Script::Models(vec![lab.name("bait")])).await;
    let evil = |role: &str| lab.name(&format!("evil-{role}"));
    let scripts = [
        ("huge", Script::Huge(evil("huge"))),
        ("endless", Script::Endless(evil("endless"))),
        ("slow", Script::Slow(evil("slow"))),
        ("redirect", Script::Redirect(bait.addr)),
        ("html", Script::Html),
        ("many", Script::ManyIds(evil("many"))),
        ("control", Script::ControlChars(evil("control"))),
        ("deep", Script::Deep),
        ("head", Script::EndlessHead),
    ];
    let mut hostile = Vec::new();
    for (role, script) in scripts {
        let server = Scripted::start(script).await;
        let container = server.enrolled(&lab, role).start().await;
        hostile.push((role, server, container));
    }
    let good = lab.backend("good").up().await;
    let proxy = lab.proxy().on_host().await;
    proxy.until_serves(good.model()).await;
    let idle_kib = proxy.memory_kib("VmRSS").await;

    for (role, server, container) in &hostile {
        let asked = async || (server.probes() >= 2).then_some(());
        eventually(&format!("{role} is asked, and asked again"), Duration::from_secs(30), asked).await;
        let said = async || {
            let reason = proxy.reason_for(&container.name).await;
            reason.filter(|reason| !reason.is_empty())
        };
        let reason = eventually(&format!("a reason for {role}"), Duration::from_secs(10), said).await;
        println!("d13: {role}: {reason}");
    }
    let listed: Vec<String> =
        proxy.models().await.into_iter().filter(|model| model.contains(&lab.name("evil"))).collect();
    assert!(listed.is_empty(), "registered: {:?} of {}", listed.first(), listed.len());
    assert!(!proxy.lists(&lab.name("bait")).await && bait.targets().is_empty(), "the redirect was followed");
    let peak_kib = proxy.memory_kib("VmHWM").await;
    println!("d13: peak memory {peak_kib} KiB, {idle_kib} KiB at first");
    assert!(peak_kib < 64 << 10, "{peak_kib} KiB at its peak");
    assert_eq!(proxy.chat(good.model()).await.unwrap().status, StatusCode::OK);
}

#[tokio::test]
async fn l01_stop_drains_and_the_stream_completes() {
    let Some(lab) = engine::alone("l01").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let backend = lab.backend("b").network(&net).up().await;
    proxy.until_serves(backend.model()).await;
    // A request keeps the settings it began with: the stream is slow, the pulse is quick.
    backend.ctl("tokens=50&token_gap_ms=100").await;
    let stream = proxy.stream(backend.model()).await.read_on();
    backend.ctl("tokens=1&token_gap_ms=0").await;
    let pulse = Pulse::start(&proxy, backend.model(), BEAT);
    eventually("the pulse is served", Duration::from_secs(5), async || pulse.serves().then_some(())).await;

    let stopping = docker_meanwhile(&["stop", "--time", "20", &backend.id]);
    let killed = events.next(&backend.id, "kill", EVER).await.at;
    let unlisted = proxy.until_unlisted(backend.model()).await;
    let refusal = proxy.until_refuses(backend.model()).await;
    assert!(refusal.has_retry_after(), "{:?}", refusal.headers);
    assert!(!stream.has_ended(), "the stream was over before the drain was seen: the test proves nothing");

    let ending = stream.ending().await;
    assert!(ending.is_complete(), "cut: {:?}", ending.cut);
    stopping.await.unwrap();
    let died = events.next(&backend.id, "die", killed).await.at;
    let samples = pulse.stop().await;
    let last = last_served(&samples, &backend.name).map_or(f64::NEG_INFINITY, |sent| ms_between(killed, sent));
    println!(
        "l01: last request accepted {last:.1} ms after kill, unlisted after {:.1} ms, died after {:.0} ms",
        ms_between(killed, unlisted),
        ms_between(killed, died)
    );
    assert!(last <= 50.0, "a request sent {last:.1} ms after kill reached the backend");
    let late = sent_after(&samples, killed, Duration::from_millis(50));
    let odd: Vec<_> = late.iter().filter(|sample| sample.outcome != Outcome::Refused).collect();
    assert!(!late.is_empty() && odd.is_empty(), "not 503 with Retry-After: {odd:?}");
    assert!(unlisted < died);
}

#[tokio::test]
async fn l02_the_containers_own_stop_signal_drains_and_others_do_not() {
    let Some(lab) = engine::alone("l02").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    for signal in ["SIGINT", "SIGQUIT", "SIGRTMIN+3"] {
        let role = signal.replace('+', "-");
        let stop_signal = format!("--stop-signal={signal}");
        let backend = lab.backend(&role).network(&net).run_arg(&stop_signal).demo("--tokens", 30).up().await;
        backend.ctl("sigterm=ignore&token_gap_ms=100").await;
        proxy.until_lists(backend.model()).await;
        let stream = proxy.stream(backend.model()).await.read_on();
        let stopping = docker_meanwhile(&["stop", "--time", "4", &backend.id]);
        let killed = events.next(&backend.id, "kill", EVER).await.at;
        let unlisted = proxy.until_unlisted(backend.model()).await;
        let took = ms_between(killed, unlisted);
        println!("l02: {signal}: unlisted {took:.1} ms after kill");
        assert!(took <= 100.0, "{signal}: unlisted {took:.1} ms after kill");
        assert!(is_running(&backend.id).await, "{signal} ended the container at once: the test proves nothing");
        assert_eq!(proxy.chat(backend.model()).await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
        stopping.await.unwrap();
        drop(stream);
    }

    let backend = lab.backend("other").network(&net).up().await;
    proxy.until_serves(backend.model()).await;
    let pulse = Pulse::start(&proxy, backend.model(), BEAT);
    for signal in ["HUP", "USR1", "WINCH"] {
        let begun = SystemTime::now();
        docker(["kill", "--signal", signal, &backend.id]).await;
        events.next(&backend.id, "kill", begun).await;
        let listed = async || (!proxy.lists(backend.model()).await).then(|| "not listed".to_owned());
        throughout(&format!("after SIG{signal}"), Duration::from_millis(500), listed).await;
        assert!(is_running(&backend.id).await, "SIG{signal} ended the demo backend: the test proves nothing");
    }
    let samples = pulse.stop().await;
    assert_eq!(failures(&samples), "", "of {}", samples.len());
}

#[tokio::test]
async fn l03_labels_cannot_hide_a_stop() {
    let Some(lab) = engine::alone("l03").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    for (role, key, value) in
        [("one", "signal", "1"), ("winch", "signal", "28"), ("word", "signal", "none"), ("exit", "exitCode", "0")]
    {
        let backend = lab.backend(role).network(&net).label(key, value).up().await;
        backend.ctl("sigterm=ignore").await;
        proxy.until_serves(backend.model()).await;
        let stopping = docker_meanwhile(&["stop", "--time", "2", &backend.id]);
        let kill = events.next(&backend.id, "kill", EVER).await;
        assert!(key != "signal" || kill.attributes["signal"] == value, "this engine does not mix labels in");
        let took = ms_between(kill.at, proxy.until_unlisted(backend.model()).await);
        println!("l03: {key}={value}: unlisted {took:.1} ms after kill");
        assert!(took <= 100.0, "{key}={value}: unlisted {took:.1} ms after kill");
        assert!(is_running(&backend.id).await, "already dead: the test proves nothing");
        stopping.await.unwrap();
    }
    let backend = lab.backend("crash").network(&net).label("exitCode", "0").label("signal", "1").up().await;
    proxy.until_serves(backend.model()).await;
    backend.crash("exit=3").await;
    let died = events.next(&backend.id, "die", EVER).await.at;
    let took = ms_between(died, proxy.until_unlisted(backend.model()).await);
    assert!(took <= 100.0, "unlisted {took:.1} ms after die");
}

#[tokio::test]
async fn l04_sudden_death_is_noticed_and_covered() {
    let Some(lab) = engine::alone("l04").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let model = lab.name("model");
    let survivor = lab.backend("survivor").network(&net).model(&model).up().await;
    proxy.until_serves(&model).await;
    for way in ["kill", "crash", "oom"] {
        // Its second model is nobody else's: its leaving the list is the victim's leaving the rotation.
        let own = lab.name(&format!("own-{way}"));
        let victim = lab.backend(way).network(&net).model(&model).model(&own).run_arg("--memory=64m").up().await;
        proxy.until_lists(&own).await;

        // Streams, at least one of them from the victim.
        for backend in [&survivor, &victim] {
            backend.ctl("tokens=100&token_gap_ms=50").await;
        }
        let streams = join_all((0..8).map(|_| proxy.stream(&model))).await;
        let (doomed, safe): (Vec<_>, Vec<_>) = streams.into_iter().partition(|s| s.backend() == Some(&victim.name));
        assert!(!doomed.is_empty(), "all {} streams went to the survivor", safe.len());
        let n_doomed = doomed.len() as u64;
        let doomed: Vec<_> = doomed.into_iter().map(Reply::read_on).collect();
        drop(safe);

        // Requests that have no byte of an answer yet, some of them at the victim.
        for backend in [&survivor, &victim] {
            backend.ctl("tokens=1&token_gap_ms=0&latency_ms=3000").await;
        }
        let waiting = join_all((0..8).map(|_| proxy.chat(&model)));
        let death = async {
            let at_victim = async || {
                let in_flight = victim.stats().await["in_flight"].as_u64()?;
                (in_flight > n_doomed).then_some(())
            };
            eventually("requests wait at the victim", Duration::from_secs(2), at_victim).await;
            survivor.ctl("latency_ms=0").await;
            let die = async {
                match way {
                    "kill" => drop(docker(["kill", &victim.id]).await),
                    "crash" => victim.crash("exit=3").await,
                    _ => victim.crash("alloc_mb=512").await,
                }
                events.next(&victim.id, "die", EVER).await
            };
            tokio::join!(die, proxy.until_unlisted(&own))
        };
        let (answers, (died, unlisted)) = tokio::join!(waiting, death);
        if way == "oom" {
            assert_eq!(inspect(&victim.id, "{{.State.OOMKilled}}").await, "true", "it was no OOM kill");
        }
        let took = ms_between(died.at, unlisted);
        println!("l04: {way}: out of rotation {took:.1} ms after die");
        assert!(took <= 100.0, "{way}: out of rotation {took:.1} ms after die");
        for answer in answers {
            let answer = answer.unwrap_or_else(|broken| panic!("{way}: {broken}"));
            assert_eq!(answer.status, StatusCode::OK, "{way}: {}", answer.text());
            assert_eq!(answer.backend(), Some(survivor.name.as_str()), "{way}");
        }
        for stream in doomed {
            let ending = stream.ending().await;
            assert!(ending.is_cut(), "{way}: a stream of the victim ended like this: {ending:?}");
        }
    }
}

#[tokio::test]
async fn l09_pause_and_network_changes() {
    let Some(lab) = engine::alone("l09").await else { return };
    let events = Events::watch();
    let (a, b) = (lab.network("a").await, lab.network("b").await);
    let proxy = lab.proxy().network(&a).network(&b).in_container().await.ready().await;

    for (role, spec) in [("plain", lab.backend("plain")), ("checked", lab.backend("checked").healthcheck(OFTEN))] {
        let backend = spec.network(&a).up().await;
        proxy.until_serves(backend.model()).await;
        let pulse = Pulse::start(&proxy, backend.model(), BEAT);
        eventually("the pulse is served", Duration::from_secs(5), async || pulse.serves().then_some(())).await;
        docker(["pause", &backend.id]).await;
        let paused = events.next(&backend.id, "pause", EVER).await.at;
        proxy.until_refuses(backend.model()).await;
        throughout("paused", Duration::from_secs(1), async || {
            proxy.lists(backend.model()).await.then(|| "listed".to_owned())
        })
        .await;
        let samples = pulse.stop().await;
        let late = sent_after(&samples, paused, Duration::from_millis(100));
        let odd: Vec<_> = late.iter().filter(|sample| sample.outcome != Outcome::Refused).collect();
        assert!(!late.is_empty() && odd.is_empty(), "{role}: sent 100 ms after pause: {odd:?}");

        docker(["unpause", &backend.id]).await;
        let unpaused = events.next(&backend.id, "unpause", paused).await.at;
        proxy.until_serves(backend.model()).await;
        println!("l09: {role}: serving again {:.0} ms after unpause", ms_between(unpaused, SystemTime::now()));
    }

    // Taken off the network in use: its streams would hang for ever.
    let backend = lab.backend("moved").network(&a).network(&b).up().await;
    proxy.until_serves(backend.model()).await;
    let host = backend.last_header("host").await.expect("the demo backend must record headers");
    let (used, left) = if host.starts_with(&backend.ip_on(&a).await.to_string()) { (&a, &b) } else { (&b, &a) };
    backend.ctl("tokens=300&token_gap_ms=100").await;
    let stream = proxy.stream(backend.model()).await.read_on();
    backend.ctl("tokens=1&token_gap_ms=0").await;
    let begun = SystemTime::now();
    docker(["network", "disconnect", used, &backend.id]).await;
    let disconnected = events.next(&backend.id, "disconnect", begun).await.at;
    let ending = stream.ending().await;
    let took = ms_between(disconnected, ending.at);
    println!("l09: hanging stream cut {took:.0} ms after disconnect");
    assert!(ending.is_cut() && took <= 1000.0, "{took:.0} ms after disconnect: {ending:?}");
    proxy.until_serves(backend.model()).await;
    let host = backend.last_header("host").await.unwrap();
    assert!(host.starts_with(&backend.ip_on(left).await.to_string()), "reached at {host}, not on {left}");

    // Off the last one, and on again.
    docker(["network", "disconnect", left, &backend.id]).await;
    proxy.until_refuses(backend.model()).await;
    proxy.until_reported(&backend.name, &["network", "address"]).await;
    docker(["network", "connect", used, &backend.id]).await;
    proxy.until_serves(backend.model()).await;
}

#[tokio::test]
async fn l13_the_proxys_own_end() {
    let Some(lab) = engine::alone("l13").await else { return };
    let backend = lab.backend("b").up().await;
    backend.ctl("tokens=30&token_gap_ms=100").await;

    // A stream of 3 s is under way.
    let mut proxy = lab.proxy().on_host().await.ready().await;
    proxy.until_lists(backend.model()).await;
    let stream = proxy.stream(backend.model()).await.read_on();
    proxy.signal("TERM").await;
    let told = Instant::now();
    let unready = async || (proxy.readyz().await.ok()? == StatusCode::SERVICE_UNAVAILABLE).then_some(());
    eventually("/readyz answers 503", Duration::from_millis(300), unready).await;
    // The front proxy needs a moment to notice; until then, requests are still welcome.
    backend.ctl("tokens=1&token_gap_ms=0").await;
    assert_eq!(proxy.chat(backend.model()).await.unwrap().status, StatusCode::OK, "during the settle time");
    let refused = async || match proxy.readyz().await {
        Err(_) => Some(told.elapsed()),
        Ok(status) => {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "ready again while ending");
            None
        }
    };
    let settle = eventually("no new connections", Duration::from_secs(15), refused).await;
    let ending = stream.ending().await;
    assert!(ending.is_complete(), "{:?}", ending.cut);
    let status = proxy.ended(Duration::from_secs(10)).await;
    println!("l13: listened for {settle:?} after SIGTERM, ended after {:?} with {status}", told.elapsed());
    assert!(status.success(), "{status}");

    // A stream that takes longer than the drain timeout.
    backend.ctl("tokens=600&token_gap_ms=100").await;
    let mut proxy = lab.proxy().env("PROXY_DRAIN_TIMEOUT", "2s").on_host().await.ready().await;
    proxy.until_lists(backend.model()).await;
    let stream = proxy.stream(backend.model()).await.read_on();
    proxy.signal("TERM").await;
    let told = Instant::now();
    let status = proxy.ended(Duration::from_secs(15)).await;
    let took = told.elapsed();
    println!("l13: PROXY_DRAIN_TIMEOUT=2s: ended after {took:?}");
    assert!(status.success() && took >= Duration::from_millis(1900), "{status} after {took:?}");
    assert!(stream.ending().await.is_cut());

    // A second signal ends the waiting.
    let mut proxy = lab.proxy().on_host().await.ready().await;
    proxy.until_lists(backend.model()).await;
    let stream = proxy.stream(backend.model()).await.read_on();
    proxy.signal("TERM").await;
    eventually("/readyz answers 503", Duration::from_secs(1), async || {
        (proxy.readyz().await.ok()? == StatusCode::SERVICE_UNAVAILABLE).then_some(())
    })
    .await;
    proxy.signal("TERM").await;
    let again = Instant::now();
    proxy.ended(Duration::from_secs(2)).await;
    assert!(again.elapsed() <= Duration::from_secs(1), "ended {:?} after the second signal", again.elapsed());
    assert!(stream.ending().await.is_cut());

    // In a container, by `docker stop`.
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    docker(["stop", "--time", "20", proxy.container()]).await;
    assert_eq!(inspect(proxy.container(), "{{.State.ExitCode}}").await, "0");
}

// === helpers ===

/// Starts a fresh container with a HEALTHCHECK, and removes it. Returns the milliseconds from Docker's health event to the
/// first 200 through the proxy.
async fn health_to_first_answer(lab: &Lab, proxy: &Proxy, events: &Events, net: &str, role: &str) -> f64 {
    let backend = lab.backend(role).network(net).healthcheck(OFTEN).start().await;
    proxy.until_serves(backend.model()).await;
    let served = SystemTime::now();
    let healthy = events.next(&backend.id, "health_status: healthy", SystemTime::UNIX_EPOCH).await.at;
    docker(["rm", "--force", &backend.id]).await;
    ms_between(healthy, served)
}

/// When the last request set out that this backend still answered.
fn last_served(samples: &[Sample], backend: &str) -> Option<SystemTime> {
    samples.iter().filter(|sample| sample.was_served_by(backend)).map(|sample| sample.sent_at).max()
}
