//! D3 to D6, D8 to D12, D14 and D15: what is found, and what is said about what cannot be routed. `measured.rs` has the
//! other lines.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use http::{Method, StatusCode};
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use crate::support::{
    backend::Backend,
    client::{PATIENCE, ask},
    engine::{self, docker, inspect, try_docker},
    events::Events,
    forwarder::{Forwarder, Link, everything, five_gets},
    load::{Pulse, failures},
    proxy::{Proxy, free_port},
    scripted::{Script, Scripted},
    wait::{eventually, ms_between, throughout},
};

/// HEALTHCHECK interval where the moment of the check is part of what is tested.
const OFTEN: Duration = Duration::from_millis(300);
/// HEALTHCHECK interval that leaves time to break a container before its first check.
const SELDOM: Duration = Duration::from_secs(2);

#[tokio::test]
async fn d03_several_models_come_and_go_together() {
    let Some(lab) = engine::shared("d03").await else { return };
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let models = ["chat", "org/embed", "rerank:latest"].map(|model| lab.name(model));
    let mut spec = lab.backend("b").network(&net);
    for model in &models {
        spec = spec.model(model);
    }
    let backend = spec.start().await;
    for model in &models {
        assert_eq!(proxy.until_serves(model).await.backend(), Some(backend.name.as_str()));
        assert!(proxy.lists(model).await, "{model} is served but not listed");
    }
    docker(["stop", "--time", "2", &backend.id]).await;
    let ours = models.into_iter().collect::<BTreeSet<_>>();
    eventually("no model is listed", Duration::from_secs(1), async || {
        proxy.models().await.is_disjoint(&ours).then_some(())
    })
    .await;
    for model in &ours {
        assert_eq!(proxy.chat(model).await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE, "{model}");
    }
}

#[tokio::test]
async fn d04_without_healthcheck_is_probed_or_ignored() {
    let Some(lab) = engine::shared("d04").await else { return };
    let net = lab.network("net").await;
    let loading = lab.backend("loading").network(&net).up().await;
    loading.ctl("models=").await;

    // Probed by default, until there is a model.
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    for stage in ["models=", "models_status=503", "hang=models"] {
        loading.ctl(stage).await;
        throughout("while it loads", Duration::from_millis(2500), async || {
            proxy.lists(loading.model()).await.then(|| format!("listed with {stage}"))
        })
        .await;
    }
    loading.ctl(&format!("hang=none&models_status=200&models={}", loading.model())).await;
    proxy.until_serves(loading.model()).await;

    // Ignored on request, whether it was there first or comes later; one warning for each.
    let relay = Forwarder::unix(&lab, "relay", Link::Open, everything).await;
    let strict = lab.proxy().through(&relay).env("PROXY_REQUIRE_HEALTHCHECK", "true").on_host().await.ready().await;
    let later = lab.backend("later").network(&net).up().await;
    let checked = lab.backend("checked").network(&net).healthcheck(OFTEN).up().await;
    strict.until_serves(checked.model()).await;
    for ignored in [&loading, &later] {
        strict.until_logged(&["warn", &ignored.name]).await;
        assert!(!strict.lists(ignored.model()).await, "{} is listed", ignored.name);
        strict.until_reported(&ignored.name, &["healthcheck"]).await;
    }
    // A new scan finds them again and says nothing new.
    relay.set(Link::Cut).await;
    let asked = relay.asked().len();
    relay.set(Link::Open).await;
    let scanned = async || relay.asked()[asked..].iter().any(|line| line.contains("/containers/json")).then_some(());
    eventually("a new scan", Duration::from_secs(15), scanned).await;
    strict.until_serves(checked.model()).await;
    for ignored in [&loading, &later] {
        let warnings = strict.logged(&["warn", &ignored.name]).await;
        assert_eq!(warnings.len(), 1, "{warnings:#?}");
    }
}

#[tokio::test]
async fn d05_port_and_base_path_are_taken_from_the_container() {
    let Some(lab) = engine::shared("d05").await else { return };
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let labelled = lab.backend("labelled").network(&net).port(9001).label("inference.port", "9001").start().await;
    let exposed = lab.backend("exposed").network(&net).port(9002).run_arg("--expose=9002").start().await;
    // What is exposed is something else; 8000 is tried too.
    let fallback = lab.backend("fallback").network(&net).run_arg("--expose=9003").start().await;
    for backend in [&labelled, &exposed, &fallback] {
        let answer = proxy.until_serves(backend.model()).await;
        assert_eq!(answer.backend(), Some(backend.name.as_str()));
    }

    // A server of our own tells exactly what arrived, which is on its own terms, slash or not.
    let model = lab.name("based");
    let server = Scripted::start(Script::Models(vec![model.clone()])).await;
    let based = server.enrolled(&lab, "based");
    based.label("inference.api.base_path", "/api/v1/").start().await;
    let proxy = lab.proxy().on_host().await.ready().await;
    proxy.until_lists(&model).await;
    let body = json!({"model": model, "prompt": "Say something."});
    ask(proxy.addr, Method::POST, "/v1/completions?a=b", Some(&body), PATIENCE).await.unwrap();
    let targets = server.targets();
    assert!(targets.contains(&"/api/v1/models".to_owned()), "{targets:?}");
    let forwarded: Vec<&String> = targets.iter().filter(|target| target.contains("completions")).collect();
    assert_eq!(forwarded, ["/api/v1/completions?a=b"]);
}

#[tokio::test]
async fn d06_models_that_fail_for_long_after_healthy_are_found_in_time() {
    let Some(lab) = engine::shared("d06").await else { return };
    let events = Events::watch();
    let begun = SystemTime::now();
    let net = lab.network("net").await;
    let proxy = lab.proxy().network(&net).in_container().await.ready().await;
    let backend = lab.backend("b").network(&net).healthcheck(SELDOM).up().await;
    backend.ctl("models_status=500").await;
    let healthy = events.next(&backend.id, "health_status: healthy", begun).await.at;
    // Long enough for any back-off to reach its ceiling.
    throughout("while /models fails", Duration::from_secs(20), async || {
        proxy.lists(backend.model()).await.then(|| "listed".to_owned())
    })
    .await;
    backend.ctl("models_status=200").await;
    let mended = Instant::now();
    proxy.until_serves(backend.model()).await;
    println!("d06: served {:?} after the first good answer was there", mended.elapsed());
    assert!(mended.elapsed() <= Duration::from_secs(5), "served after {:?}", mended.elapsed());
    let meanwhile: Vec<_> = events.of(&backend.id, healthy + Duration::from_millis(1));
    assert!(meanwhile.is_empty(), "Docker helped: {meanwhile:?}");
}

#[tokio::test]
async fn d08_a_broken_event_stream_loses_nothing() {
    let Some(lab) = engine::shared("d08").await else { return };
    let keeper = lab.backend("keeper").up().await;
    let streamer = lab.backend("streamer").demo("--tokens", 320).demo("--token-gap-ms", 100).up().await;
    let goer = lab.backend("goer").up().await;

    let mut watched = Vec::new();
    for fault in [Link::Cut, Link::Held, Link::Ended] {
        let relay = Forwarder::unix(&lab, &format!("{fault:?}"), Link::Open, everything).await;
        let proxy = lab.proxy().through(&relay).on_host().await.ready().await;
        for backend in [&keeper, &streamer, &goer] {
            proxy.until_lists(backend.model()).await;
        }
        watched.push((fault, relay, proxy));
    }
    let mut background = Vec::new();
    for (_, _, proxy) in &watched {
        let stream = proxy.stream(streamer.model()).await.read_on();
        let pulse = Pulse::start(proxy, keeper.model(), Duration::from_millis(50));
        background.push((stream, pulse));
    }
    let in_flight =
        async |proxy: &Proxy| proxy.metric("proxy_backend_inflight", &format!("model=\"{}\"", streamer.model())).await;
    for (fault, _, proxy) in &watched {
        assert_eq!(in_flight(proxy).await, [1.0], "in-flight before {fault:?}");
    }

    for (fault, relay, _) in &watched {
        relay.set(*fault).await;
    }
    let down_until = Instant::now() + Duration::from_secs(20);
    docker(["rm", "--force", &goer.id]).await;
    let comer = lab.backend("comer").up().await;
    sleep_until(down_until).await;
    for (_, relay, _) in &watched {
        relay.set(Link::Open).await;
    }

    let back = Instant::now();
    let here: BTreeSet<String> = [&keeper, &streamer, &comer].map(|b| b.model().to_owned()).into();
    for (fault, _, proxy) in &watched {
        let what = format!("the table equals reality after {fault:?}");
        let left = Duration::from_secs(6).saturating_sub(back.elapsed());
        eventually(&what, left, async || {
            let ours = proxy.models().await.into_iter().filter(|model| model.starts_with(&lab.name(""))).collect();
            (here == ours).then_some(())
        })
        .await;
        println!("d08: table equals reality {:?} after {fault:?} was over", back.elapsed());
        assert_eq!(in_flight(proxy).await, [1.0], "in-flight after {fault:?}");
        let status = proxy.get("/status").await.unwrap().text();
        assert!(!status.to_lowercase().contains("collision"), "{status}");
        let same_model = proxy.logged(&["warn", &keeper.name]).await;
        assert!(same_model.is_empty(), "warnings about an unchanged container after {fault:?}: {same_model:#?}");
    }
    for ((fault, _, proxy), (stream, pulse)) in watched.iter().zip(background) {
        let ending = stream.ending().await;
        assert!(ending.is_complete(), "the stream through {fault:?} broke: {:?}", ending.cut);
        let samples = pulse.stop().await;
        assert!(samples.len() > 300, "only {} requests", samples.len());
        assert_eq!(failures(&samples), "", "of {} through {fault:?}", samples.len());
        eventually("in-flight is 0", Duration::from_secs(1), async || (in_flight(proxy).await == [0.0]).then_some(()))
            .await;
    }
}

#[tokio::test]
async fn d09_a_lost_event_is_found_by_comparison() {
    let Some(lab) = engine::shared("d09").await else { return };
    let events = Events::watch();
    let relay = Forwarder::unix(&lab, "relay", Link::Open, everything).await;
    let proxy = lab.proxy().through(&relay).on_host().await.ready().await;
    let crasher = lab.backend("crasher").up().await;
    proxy.until_serves(crasher.model()).await;

    // The only event between "starting" and "healthy".
    let comer = lab.backend("comer").healthcheck(Duration::from_secs(1)).start().await;
    let id = comer.id.clone();
    relay.lose(move |event| {
        event["Actor"]["ID"] == id && event["Action"].as_str().is_some_and(|a| a.starts_with("health"))
    });
    // A crash has two: its end, and that of its network endpoint.
    let id = crasher.id.clone();
    relay.lose(move |event| event["Actor"]["ID"] == id || event["Actor"]["Attributes"]["container"] == id);
    crasher.crash("exit=3").await;
    let died = events.next(&crasher.id, "die", SystemTime::UNIX_EPOCH).await.at;
    let healthy = events.next(&comer.id, "health_status: healthy", SystemTime::UNIX_EPOCH).await.at;

    let minute = Duration::from_secs(60);
    proxy.until_answers(comer.model(), StatusCode::OK, minute).await;
    let found = ms_between(healthy, SystemTime::now()) / 1e3;
    let gone = async || (!proxy.lists(crasher.model()).await).then_some(());
    eventually("the crashed one is not listed", minute, gone).await;
    let missed = ms_between(died, SystemTime::now()) / 1e3;
    println!("d09: lost healthy found after {found:.1} s, lost die after at most {missed:.1} s");
    assert!(found <= 60.0 && missed <= 60.0, "{found:.1} s, {missed:.1} s");
    let lost = relay.lost();
    let has_lost = |action: &str| lost.iter().any(|e| e["Action"].as_str().is_some_and(|a| a.starts_with(action)));
    assert!(has_lost("health_status") && has_lost("die"), "nothing was lost: the test proves nothing: {lost:?}");
}

#[tokio::test]
async fn d10_the_shared_network_is_used_every_time() {
    let Some(lab) = engine::shared("d10").await else { return };
    // By name, the one that is not shared comes first.
    let (other, common, third) = (lab.network("a").await, lab.network("b").await, lab.network("c").await);
    let proxy = lab.proxy().network(&common).in_container().await.ready().await;
    let backend = lab.backend("b").network(&other).network(&common).start().await;
    for n in 0..20 {
        proxy.until_serves(backend.model()).await;
        let used = used_address(&proxy, &backend).await;
        assert_eq!(used, backend.ip_on(&common).await.to_string(), "restart {n}");
        docker(["restart", "--time", "2", &backend.id]).await;
    }

    let wide = lab.proxy().network(&other).network(&common).network(&third).in_container().await.ready().await;
    for chosen in [&other, &common] {
        let role = format!("only-{chosen}");
        let backend =
            lab.backend(&role).network(&other).network(&common).label("inference.network", chosen).start().await;
        wide.until_serves(backend.model()).await;
        let used = used_address(&wide, &backend).await;
        assert_eq!(used, backend.ip_on(chosen).await.to_string(), "inference.network={chosen}");
    }
    let wrong = lab.backend("wrong").network(&other).network(&common).label("inference.network", "nowhere").up().await;
    let report = wide.until_reported(&wrong.name, &["nowhere"]).await;
    assert!(report.contains(&other) && report.contains(&common), "names what exists: {report}");
    assert!(!wide.lists(wrong.model()).await, "routed by a guess");
}

#[tokio::test]
async fn d11_other_ways_to_be_on_the_network() {
    let Some(lab) = engine::shared("d11").await else { return };
    let (net, apart) = (lab.network("net").await, lab.network("apart").await);
    let outside = lab.proxy().on_host().await.ready().await;
    let inside = lab.proxy().network(&net).in_container().await.ready().await;

    // The host's network: within reach of a proxy on the host; for one in a container that depends, so it is said.
    let port = free_port();
    let label = port.to_string();
    let host = lab.backend("host").run_arg("--network=host").port(port).label("inference.port", &label).up().await;
    outside.until_serves(host.model()).await;
    routed_or_reported(&inside, &host, &["host"]).await;

    // Another container's network: its owner's address.
    let owner = lab.backend("owner").unlabelled().network(&net).port(9000).up().await;
    let joined = format!("--network=container:{}", owner.id);
    let guest = lab.backend("guest").run_arg(&joined).start().await;
    for proxy in [&outside, &inside] {
        assert_eq!(proxy.until_serves(guest.model()).await.backend(), Some(guest.name.as_str()));
    }
    // Once its owner has restarted, the guest sits in a network that nobody can reach. There is no event of its own; the
    // periodic comparison finds it at the latest.
    docker(["restart", "--time", "1", &owner.id]).await;
    let restarted = Instant::now();
    for proxy in [&outside, &inside] {
        let gone = async || (!proxy.lists(guest.model()).await).then_some(());
        let what = "the guest of a restarted owner is not listed";
        eventually(what, Duration::from_secs(60), gone).await;
        println!("d11: guest of a restarted owner gone after {:.1?}", restarted.elapsed());
        proxy.until_reported(&guest.name, &["recreate", "restart", "namespace"]).await;
    }

    // No network at all, and none in common: said, with what to change.
    let isolated = lab.backend("isolated").run_arg("--network=none").start().await;
    for proxy in [&outside, &inside] {
        proxy.until_reported(&isolated.name, &["network"]).await;
    }
    let stranger = lab.backend("stranger").network(&apart).start().await;
    outside.until_serves(stranger.model()).await;
    let report = inside.until_reported(&stranger.name, &["network"]).await;
    assert!(report.contains(&apart), "names its networks: {report}");

    // A published port is another way in.
    let published = lab.backend("published").network(&apart).run_arg("--publish=8000").start().await;
    outside.until_serves(published.model()).await;
    routed_or_reported(&inside, &published, &["network"]).await;

    // A network that came after the proxy; a proxy in a container can be connected to it while it runs.
    let later = lab.network("later").await;
    let newcomer = lab.backend("newcomer").network(&later).start().await;
    outside.until_serves(newcomer.model()).await;
    docker(["network", "connect", &later, inside.container()]).await;
    inside.until_serves(newcomer.model()).await;

    // Addresses of version 6 only. Engines before 28 have no such networks: they refuse, or add version 4 unasked.
    let six = lab.name("six");
    let create = ["network", "create", "--ipv4=false", "--ipv6", "--subnet", "fd9d:b6a0:11::/64"].map(String::from);
    let created = try_docker(create.into_iter().chain(lab.ownership()).chain([six.clone()])).await;
    if created.is_ok() {
        let backend = lab.backend("six").network(&six).start().await;
        let v4 = inspect(&backend.id, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}").await;
        println!("d11: address of version 4 on the IPv6 network: {v4:?}");
        outside.until_serves(backend.model()).await;
    } else {
        println!("d11: IPv6-only network left out, this engine has none: {created:?}");
    }
}

#[tokio::test]
async fn d12_models_that_change_at_run_time_are_followed() {
    let Some(lab) = engine::shared("d12").await else { return };
    let (base, adapter) = (lab.name("base"), lab.name("adapter"));
    let backend = lab.backend("b").model(&base).up().await;
    let proxy = lab.proxy().env("PROXY_MODELS_REFRESH", "2s").on_host().await.ready().await;
    proxy.until_serves(&base).await;
    for (models, is_listed) in [(format!("{base},{adapter}"), true), (base.clone(), false)] {
        backend.ctl(&format!("models={models}")).await;
        let follows = async || (proxy.lists(&adapter).await == is_listed).then_some(());
        // The refresh itself, and a second for a busy machine.
        eventually("/v1/models follows", Duration::from_secs(3), follows).await;
        assert!(proxy.lists(&base).await);
    }
}

#[tokio::test]
async fn d14_the_proxy_is_no_backend_of_itself() {
    let Some(lab) = engine::shared("d14").await else { return };
    let net = lab.network("net").await;
    let backend = lab.backend("b").network(&net).up().await;
    for labels in
        [&["--label=inference.enable=true"][..], &["--label=inference.enable=true", "--label=inference.port=8080"]]
    {
        let mut spec = lab.proxy().network(&net).env("PROXY_MODELS_REFRESH", "1s");
        for label in labels {
            spec = spec.run_arg(label);
        }
        let proxy = spec.in_container().await.ready().await;
        proxy.until_serves(backend.model()).await;
        let me = proxy.container().to_owned();
        proxy.until_reported(&me, &["itself", "own", "self", "proxy"]).await;
        // Long enough for a second look at everybody's models, ours among them if we were a backend.
        let alone = async || {
            let members = proxy.metric("proxy_backend_inflight", &format!("model=\"{}\"", backend.model())).await.len();
            (members != 1).then(|| format!("{members} backends have the model"))
        };
        throughout("with the proxy labelled", Duration::from_secs(3), alone).await;
        docker(["stop", "--time", "1", &backend.id]).await;
        proxy.until_refuses(backend.model()).await;
        docker(["rm", "--force", &me]).await;
        docker(["start", &backend.id]).await;
    }
}

#[tokio::test]
async fn d15_a_socket_that_is_missing_forbidden_or_filtered() {
    let Some(lab) = engine::shared("d15").await else { return };
    let net = lab.network("net").await;
    let backend = lab.backend("b").network(&net).up().await;

    // Missing: serves what it can, says so once, and comes up with the socket.
    let missing = Forwarder::unix(&lab, "missing", Link::Cut, everything).await;
    let proxy = lab.proxy().through(&missing).on_host().await;
    eventually("/healthz answers", Duration::from_secs(5), async || proxy.get("/healthz").await.ok()).await;
    let path = missing.docker_host().trim_start_matches("unix://");
    proxy.until_logged(&[path]).await;
    throughout("without a socket", Duration::from_secs(3), async || {
        let (health, ready) = (proxy.get("/healthz").await.ok()?.status, proxy.readyz().await.ok()?);
        (health != StatusCode::OK || ready != StatusCode::SERVICE_UNAVAILABLE).then(|| format!("{health}, {ready}"))
    })
    .await;
    let said = proxy.logged(&[path]).await;
    assert_eq!(said.len(), 1, "once: {said:#?}");
    missing.set(Link::Open).await;
    proxy.until_answers(backend.model(), StatusCode::OK, Duration::from_secs(8)).await;
    proxy.ready().await;

    // Forbidden: the same, with the reason.
    let proxy = lab.proxy().network(&net).run_arg("--user=65532:65532").in_container().await;
    eventually("/readyz answers", Duration::from_secs(5), async || proxy.readyz().await.ok()).await;
    proxy.until_logged(&["permission denied"]).await;
    assert_eq!(proxy.readyz().await.unwrap(), StatusCode::SERVICE_UNAVAILABLE);

    // Five GETs are enough, for everything from the first scan to the last event.
    let strict = Forwarder::tcp(five_gets).await;
    let proxy = lab.proxy().through(&strict).on_host().await.ready().await;
    proxy.until_serves(backend.model()).await;
    docker(["restart", "--time", "1", &backend.id]).await;
    proxy.until_serves(backend.model()).await;
    assert_eq!(strict.forbidden(), Vec::<String>::new(), "asked for more than five GETs");
    assert!(strict.asked().iter().any(|line| line.contains("/events")));

    // Fewer are not, and then it says which one is missing.
    let deaf = Forwarder::tcp(|method, path| five_gets(method, path) && !path.ends_with("/events")).await;
    let proxy = lab.proxy().through(&deaf).on_host().await;
    proxy.until_logged(&["403"]).await;
    let blind = Forwarder::tcp(|method, path| five_gets(method, path) && !path.ends_with("/containers/json")).await;
    let proxy = lab.proxy().through(&blind).on_host().await;
    proxy.until_logged(&["403"]).await;
    assert_eq!(proxy.readyz().await.unwrap(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn o05_a_newcomer_is_told_what_is_wrong_and_what_to_change() {
    let Some(lab) = engine::shared("o05").await else { return };
    let (net, apart) = (lab.network("net").await, lab.network("apart").await);
    let proxy = lab.proxy().network(&net).env("PROXY_REQUIRE_HEALTHCHECK", "true").in_container().await.ready().await;
    let checked = |role: &str| lab.backend(role).network(&net).healthcheck(OFTEN);
    let unclear = lab.backend("unclear").unlabelled().label("inference.enable", "ture").network(&net).start().await;
    let elsewhere = lab.backend("elsewhere").network(&apart).healthcheck(OFTEN).start().await;
    let sick = checked("sick").up().await;
    // One that has never been well in its run is told in other words.
    proxy.until_serves(sick.model()).await;
    sick.ctl("health=503").await;
    let bare = lab.backend("bare").network(&net).start().await;
    let told = [
        (&unclear, "neither true nor false", "create it anew with inference.enable=true".to_owned()),
        (
            &elsewhere,
            "no network in common with this proxy",
            format!("docker network connect {net} {}", elsewhere.name),
        ),
        (
            &sick,
            "Docker calls it unhealthy: its health check fails",
            format!("docker inspect -f '{{{{json .State.Health}}}}' {}", sick.name),
        ),
        (
            &bare,
            "it has no HEALTHCHECK, and PROXY_REQUIRE_HEALTHCHECK=true demands one",
            "add a HEALTHCHECK".to_owned(),
        ),
    ];
    for (backend, reason, advice) in &told {
        let text = proxy.until_reported(&backend.name, &[reason]).await;
        assert!(text.contains(advice), "/status says only: {text}");
        let lines = proxy.until_logged(&["warn", &backend.name, reason]).await;
        assert!(lines.len() == 1 && lines[0].contains(advice), "one line with the advice: {lines:#?}");
    }
    // A label that is misspelt stops nothing, and is told all the same.
    let misspelt = checked("misspelt").label("inference.prot", "9").up().await;
    proxy.until_serves(misspelt.model()).await;
    proxy.until_reported(&misspelt.name, &["did you mean inference.port?"]).await;
    proxy.until_logged(&["warn", &misspelt.name, "did you mean inference.port?"]).await;
}

// === helpers ===

/// Waits until the proxy lists the container's model, or says in one of these words why it does not.
async fn routed_or_reported(proxy: &Proxy, backend: &Backend, words: &[&str]) {
    let what = format!("{} is routed, or the reason has one of {words:?}", backend.name);
    eventually(&what, Duration::from_secs(10), async || {
        let reason = proxy.reason_for(&backend.name).await.unwrap_or_default();
        (proxy.lists(backend.model()).await || words.iter().any(|word| reason.contains(word))).then_some(())
    })
    .await;
}

/// The address under which the proxy reaches the backend: `Host` of a request just forwarded.
async fn used_address(proxy: &Proxy, backend: &Backend) -> String {
    let answer = proxy.chat(backend.model()).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let host = backend.last_header("host").await.expect("the demo backend must record headers");
    host.rsplit_once(':').map_or(host.clone(), |(ip, _)| ip.to_owned())
}
