//! L5 to L8, L10 and L11: how backends go, and come back. `measured.rs` has the other lines, `rolling.rs` L12.

use std::time::{Duration, SystemTime};

use http::StatusCode;
use tokio::time::{Instant, sleep_until};

use crate::support::{
    engine::{self, docker, docker_meanwhile, inspect},
    events::Events,
    forwarder::{Forwarder, Link, everything},
    load::{Outcome, Pulse, failures},
    proxy::is_running,
    wait::{ms_between, throughout},
};

/// HEALTHCHECK interval where Docker's verdict is part of what is tested.
const OFTEN: Duration = Duration::from_millis(300);
/// From the beginning of time, for events of containers that are new.
const EVER: SystemTime = SystemTime::UNIX_EPOCH;

#[tokio::test]
async fn l05_a_childs_oom_is_probed_and_survived() {
    let Some(lab) = engine::shared("l05").await else { return };
    let events = Events::watch();
    let (base, fresh) = (lab.name("base"), lab.name("fresh"));
    let backend = lab.backend("b").model(&base).run_arg("--memory=64m").up().await;
    // No refresh of its own accord during the test: what is learnt afterwards was asked for because of the event.
    let proxy = lab.proxy().env("PROXY_MODELS_REFRESH", "10m").on_host().await.ready().await;
    proxy.until_serves(&base).await;
    let pulse = Pulse::start(&proxy, &base, Duration::from_millis(20));
    backend.ctl(&format!("models={base},{fresh}")).await;
    backend.crash("alloc_child_mb=512").await;
    let oom = events.next(&backend.id, "oom", EVER).await.at;
    proxy.until_lists(&fresh).await;
    let took = ms_between(oom, SystemTime::now());
    println!("l05: probed again {took:.0} ms after oom");
    assert!(took <= 2000.0, "{took:.0} ms");
    let listed = async || (!proxy.lists(&base).await).then(|| "not listed".to_owned());
    throughout("after the child's end", Duration::from_secs(3), listed).await;
    assert!(is_running(&backend.id).await && events.of(&backend.id, oom).iter().all(|event| event.action != "die"));
    let samples = pulse.stop().await;
    assert_eq!(failures(&samples), "", "of {}", samples.len());
}

#[tokio::test]
async fn l06_unhealthy_drains_by_its_deadline_and_may_return() {
    let Some(lab) = engine::shared("l06").await else { return };
    let events = Events::watch();
    let drain = Duration::from_secs(4);
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).env("PROXY_DRAIN_TIMEOUT", "4s").in_container().await.ready().await;
    let (first, second) = (lab.name("first"), lab.name("second"));
    let leaver = lab.backend("leaver").network(&net).model(&first).model(&second).healthcheck(OFTEN);
    let returner = lab.backend("returner").network(&net).healthcheck(OFTEN);
    let (leaver, returner) = tokio::join!(leaver.up(), returner.up());
    for model in [&first, &second, returner.model()] {
        proxy.until_serves(model).await;
    }
    leaver.ctl("tokens=300&token_gap_ms=100").await;
    returner.ctl("tokens=80&token_gap_ms=100").await;
    let doomed = [proxy.stream(&first).await.read_on(), proxy.stream(&second).await.read_on()];
    let kept = proxy.stream(returner.model()).await.read_on();
    for backend in [&leaver, &returner] {
        backend.ctl("tokens=1&token_gap_ms=0").await;
    }

    let broken = SystemTime::now();
    tokio::join!(leaver.ctl("health=503"), returner.ctl("health=503"));
    let unhealthy = events.next(&leaver.id, "health_status: unhealthy", broken).await.at;
    let briefly = events.next(&returner.id, "health_status: unhealthy", broken).await.at;
    for model in [&first, &second, returner.model()] {
        assert!(proxy.until_refuses(model).await.has_retry_after(), "{model}");
    }
    let took = ms_between(unhealthy.max(briefly), SystemTime::now());
    println!("l06: refused at most {took:.0} ms after unhealthy");
    assert!(took <= 500.0, "refused {took:.0} ms after unhealthy");

    returner.ctl("health=200").await;
    let healthy = events.next(&returner.id, "health_status: healthy", briefly).await.at;
    assert!(healthy < briefly + drain, "Docker took too long: the test proves nothing");
    proxy.until_serves(returner.model()).await;
    let pulse = Pulse::start(&proxy, returner.model(), Duration::from_millis(20));

    let mut cuts = Vec::new();
    for stream in doomed {
        let ending = stream.ending().await;
        assert!(ending.is_cut(), "past the deadline: {ending:?}");
        cuts.push(ms_between(unhealthy, ending.at) / 1e3);
    }
    println!("l06: streams cut {cuts:.2?} s after unhealthy, with PROXY_DRAIN_TIMEOUT={drain:?}");
    let on_time = drain.as_secs_f64() - 0.5..drain.as_secs_f64() + 1.5;
    assert!(cuts.iter().all(|cut| on_time.contains(cut)), "{cuts:.2?}");
    assert!((cuts[0] - cuts[1]).abs() < 0.5, "once per container: {cuts:.2?}");
    assert!(!proxy.lists(&first).await && !proxy.lists(&second).await, "still there after its deadline");

    let ending = kept.ending().await;
    assert!(ending.is_complete(), "healthy again in time, but the stream was cut: {:?}", ending.cut);
    // Long past the deadline that was called off.
    let past = briefly + drain + Duration::from_secs(6);
    let left = past.duration_since(SystemTime::now()).unwrap_or_default();
    let listed = async || (!proxy.lists(returner.model()).await).then(|| "not listed".to_owned());
    throughout("long after the old deadline", left, listed).await;
    let samples = pulse.stop().await;
    assert_eq!(failures(&samples), "", "of {}", samples.len());

    // What was removed can come back too.
    leaver.ctl("health=200").await;
    proxy.until_serves(&first).await;
    proxy.until_serves(&second).await;
}

#[tokio::test]
async fn l07_nothing_revives_a_stopping_container_but_its_own_deadline() {
    let Some(lab) = engine::shared("l07").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let spec = lab.proxy().network(&net).env("PROXY_DRAIN_TIMEOUT", "3s");
    let proxy = spec.in_container().await.ready().await;

    let stopping = lab.backend("stopping").network(&net).healthcheck(OFTEN).run_arg("--stop-timeout=12").up().await;
    proxy.until_serves(stopping.model()).await;
    stopping.ctl("sigterm=ignore").await;
    let stop = docker_meanwhile(&["stop", "--time", "12", &stopping.id]);
    let killed = events.next(&stopping.id, "kill", EVER).await.at;
    proxy.until_unlisted(stopping.model()).await;
    stopping.ctl("health=503").await;
    let unhealthy = events.next(&stopping.id, "health_status: unhealthy", killed).await.at;
    stopping.ctl("health=200").await;
    let healthy = events.next(&stopping.id, "health_status: healthy", unhealthy).await.at;
    let revived = async || proxy.lists(stopping.model()).await.then(|| "listed".to_owned());
    throughout("healthy, but stopping", Duration::from_secs(3), revived).await;
    assert!(is_running(&stopping.id).await, "already dead: the test proves nothing");
    println!("l07: healthy {:.1} s after kill, and not revived", ms_between(killed, healthy) / 1e3);
    drop(stop);

    let stubborn = lab.backend("stubborn").network(&net).run_arg("--stop-timeout=2").up().await;
    proxy.until_serves(stubborn.model()).await;
    stubborn.ctl("sigterm=ignore").await;
    docker(["kill", "--signal", "TERM", &stubborn.id]).await;
    let killed = events.next(&stubborn.id, "kill", EVER).await.at;
    proxy.until_unlisted(stubborn.model()).await;
    // The longest of what such a container might be granted: Docker's own 10 s, and a probe.
    proxy.until_answers(stubborn.model(), StatusCode::OK, Duration::from_secs(16)).await;
    let back = ms_between(killed, SystemTime::now()) / 1e3;
    println!("l07: serving again {back:.1} s after a SIGTERM that was ignored");
    assert!(back >= 2.0, "back after {back:.1} s, before its deadline");
}

#[tokio::test]
async fn l08_a_restart_is_a_new_run_at_a_new_address() {
    let Some(lab) = engine::shared("l08").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let backend = lab.backend("b").network(&net).up().await;
    proxy.until_serves(backend.model()).await;
    let pulse = Pulse::start(&proxy, backend.model(), Duration::from_millis(10));

    // While it is down, somebody else gets its address and would answer for its model.
    let old = backend.addr().await;
    docker(["stop", "--time", "1", &backend.id]).await;
    let thief = lab.backend("thief").unlabelled().network(&net).model(backend.model()).up().await;
    assert_eq!(thief.addr().await, old, "the engine gave the address to nobody: the test proves nothing");
    docker(["start", &backend.id]).await;
    proxy.until_serves(backend.model()).await;
    assert_ne!(backend.addr().await, old);

    // In one go: the last events of the old run come after the first of the new one.
    for n in 0..5 {
        let begun = SystemTime::now();
        docker(["restart", "--time", "1", &backend.id]).await;
        proxy.until_serves(backend.model()).await;
        events.next(&backend.id, "restart", begun).await;
        let listed = async || (!proxy.lists(backend.model()).await).then(|| "not listed".to_owned());
        throughout(&format!("after restart {n}"), Duration::from_secs(1), listed).await;
    }
    let samples = pulse.stop().await;
    let stolen = samples.iter().filter(|sample| sample.was_served_by(&thief.name)).count();
    assert_eq!(stolen, 0, "answered by the container at the old address, of {}", samples.len());
    assert!(thief.stats().await["last_request"].is_null(), "a request went to the old address");
    let hung = samples.iter().filter(|sample| matches!(sample.outcome, Outcome::Broken(_))).count();
    println!("l08: {} requests through six restarts: {}", samples.len(), failures(&samples));
    assert_eq!(hung, 0, "{}", failures(&samples));
}

#[tokio::test]
async fn l10_restart_loops_and_a_stop_during_back_off() {
    let Some(lab) = engine::shared("l10").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let looper = lab.backend("looper").network(&net).run_arg("--restart=always").up().await;
    proxy.until_serves(looper.model()).await;

    // Every crash doubles the pause before the next run: 0.1 s, 0.2 s, ...
    for crash in 0..5 {
        let begun = SystemTime::now();
        looper.crash("exit=3").await;
        events.next(&looper.id, "die", begun).await;
        proxy.until_unlisted(looper.model()).await;
        let refused = Instant::now();
        while inspect(&looper.id, "{{.State.Status}}").await == "restarting" {
            let answer = proxy.chat(looper.model()).await.unwrap();
            let restarting = inspect(&looper.id, "{{.State.Status}}").await == "restarting";
            assert!(
                !restarting || answer.status == StatusCode::SERVICE_UNAVAILABLE,
                "crash {crash}: {}",
                answer.status
            );
        }
        println!("l10: crash {crash}: refused for {:?} of back-off", refused.elapsed());
        proxy.until_serves(looper.model()).await;
    }
    let begun = SystemTime::now();
    looper.crash("exit=3").await;
    let died = events.next(&looper.id, "die", begun).await.at;
    assert_eq!(inspect(&looper.id, "{{.State.Status}}").await, "restarting");
    docker(["stop", &looper.id]).await;
    let stopped = events.next(&looper.id, "stop", died).await.at;
    let between: Vec<_> = events.of(&looper.id, died).into_iter().map(|event| event.action).collect();
    assert!(
        !between.contains(&"kill".to_owned()),
        "the engine announced the stop: the test proves nothing: {between:?}"
    );
    let gone = async || proxy.lists(looper.model()).await.then(|| "listed".to_owned());
    throughout("stopped during back-off", Duration::from_secs(5), gone).await;
    assert_eq!(proxy.chat(looper.model()).await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(events.of(&looper.id, stopped).iter().all(|event| event.action != "start"), "it came back");
    docker(["start", &looper.id]).await;
    proxy.until_serves(looper.model()).await;

    // One that never comes up is never routed, and said to be so.
    let hopeless =
        lab.backend("hopeless").network(&net).run_arg("--restart=always").demo("--port", "none").start().await;
    let unrouted = async || proxy.lists(hopeless.model()).await.then(|| "listed".to_owned());
    throughout("a crash loop", Duration::from_secs(3), unrouted).await;
    proxy.until_reported(&hopeless.name, &["restart", "exit", "not running", "stopped", "gone"]).await;
}

#[tokio::test]
async fn l11_without_the_engine_known_backends_keep_serving() {
    let Some(lab) = engine::shared("l11").await else { return };
    let events = Events::watch();
    let net = lab.network("net").await;
    let backend = lab.backend("b").network(&net).up().await;
    // A killed engine refuses; a booting one accepts and hangs. One proxy on the host, one in a container.
    let refusing = Forwarder::unix(&lab, "refusing", Link::Open, everything).await;
    let hanging = Forwarder::unix(&lab, "hanging", Link::Open, everything).await;
    let outside = lab.proxy().through(&refusing).on_host().await.ready().await;
    let inside = lab.proxy().network(&net).through(&hanging).in_container().await.ready().await;
    let mut pulses = Vec::new();
    for proxy in [&outside, &inside] {
        proxy.until_serves(backend.model()).await;
        pulses.push(Pulse::start(proxy, backend.model(), Duration::from_millis(20)));
    }
    refusing.set(Link::Cut).await;
    hanging.set(Link::Held).await;
    // Longer than one regular comparison takes to come round, and to fail.
    for proxy in [&outside, &inside] {
        assert_eq!(proxy.readyz().await.unwrap(), StatusCode::OK);
    }
    sleep_until(Instant::now() + Duration::from_secs(40)).await;
    for (proxy, pulse) in [&outside, &inside].into_iter().zip(pulses) {
        assert!(proxy.lists(backend.model()).await, "forgotten");
        assert_eq!(proxy.readyz().await.unwrap(), StatusCode::OK);
        let samples = pulse.stop().await;
        assert!(samples.len() > 1000 && failures(&samples).is_empty(), "of {}: {}", samples.len(), failures(&samples));
    }
    refusing.set(Link::Open).await;
    hanging.set(Link::Open).await;
    let comer = lab.backend("comer").network(&net).start().await;
    for proxy in [&outside, &inside] {
        proxy.until_answers(comer.model(), StatusCode::OK, Duration::from_secs(12)).await;
    }

    // A daemon that shuts down in order stops its containers first, says so, and only then hangs up.
    docker(["stop", "--time", "1", &comer.id]).await;
    events.next(&comer.id, "stop", EVER).await;
    for proxy in [&outside, &inside] {
        proxy.until_unlisted(comer.model()).await;
    }
    refusing.set(Link::Cut).await;
    hanging.set(Link::Cut).await;
    for proxy in [&outside, &inside] {
        let forgotten = async || {
            let models = proxy.models().await;
            (models.contains(comer.model()) || !models.contains(backend.model())).then(|| format!("{models:?}"))
        };
        throughout("after the engine's farewell", Duration::from_secs(2), forgotten).await;
    }
}
