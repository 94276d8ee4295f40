//! Where the proxy stands, as an engine tells it, or does not.

use super::*;
use crate::control::discovery::{Obstacle, network::Reach};

/// A process in a container that may be one of these.
fn inside(candidates: &[&str]) -> Standing {
    Standing { candidates: candidates.iter().map(|id| (*id).to_owned()).collect(), is_inside: true }
}

/// An engine with the container of the proxy, a client for it, and what a watcher knows at first.
fn with_self() -> (FakeEngine, Engine, Context) {
    let engine = FakeEngine::new(&["self"]);
    set(&engine, "self", |json| {
        let networks = json!({ "app": { "NetworkID": "n1", "IPAddress": "172.18.0.9", "Gateway": "172.18.0.1" } });
        json["NetworkSettings"]["Networks"] = networks;
    });
    engine.listen();
    let host = Some(format!("unix://{}", engine.path.display()));
    let endpoint = DockerEndpoint { host, ..DockerEndpoint::default() };
    let client = Engine::connect(&endpoint, Arc::default()).unwrap();
    let unknown = Watcher::new(DockerDiscovery::new(endpoint, None, Vec::new()), mpsc::channel(1).1).context;
    (engine, client, unknown)
}

fn is_in_app(context: &Context) -> bool {
    matches!(&context.vantage, Vantage::Container { attachments, .. } if attachments.iter().any(|on| on.name == "app"))
}

async fn located(client: &Engine, context: &Context, standing: Standing) -> Context {
    locate(client, context.clone(), Ok(standing), clock()).await.unwrap()
}

/// What is no answer of an engine about a container.
const NO_ANSWERS: [(&str, &str); 7] = [
    ("404 Not Found", PAGE),
    ("404 Not Found", "nothing here"),
    ("403 Forbidden", "no"),
    ("403 Forbidden", r#"{"message":"#),
    ("409 Conflict", "{}"),
    ("500 Oh", "{}"),
    ("200 OK", "garbage"),
];

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_the_engines_never_moves_a_proxy_out_of_its_container() {
    let (engine, client, unknown) = with_self();
    let known = located(&client, &unknown, inside(&["short", "self"])).await;
    assert!(known.self_id.as_deref() == Some("self") && is_in_app(&known), "{known:?}");
    for (status, body) in NO_ANSWERS {
        engine.change(|script| script.failing = vec![("/self/json", status, body)]);
        let later = located(&client, &known, inside(&["short", "self"])).await;
        assert!(later.self_id.as_deref() == Some("self") && is_in_app(&later), "{status} {body}: {later:?}");
        assert_eq!(later.untold, None, "what is known needs no excuse");

        // At first: it is in a container, and nothing else is made up.
        for candidates in [&["self"][..], &["short", "self"], &["self", "short"]] {
            let first = located(&client, &unknown, inside(candidates)).await;
            assert!(matches!(first.vantage, Vantage::Inside { .. }), "{status} {body}: {first:?}");
            assert!(first.self_id.is_none() && first.untold.is_some() && first.is_placed, "{first:?}");
            // Once the engine tells, it is where it is.
            engine.change(|script| script.failing.clear());
            let told = located(&client, &first, inside(candidates)).await;
            assert!(is_in_app(&told) && told.untold.is_none(), "{told:?}");
            engine.change(|script| script.failing = vec![("/self/json", status, body)]);
        }
    }
    // That there is no such container is an answer.
    engine.change(|script| *script = Script::default());
    let moved = located(&client, &known, inside(&["short", "self"])).await;
    assert!(moved.self_id.is_none() && matches!(moved.vantage, Vantage::Host { .. }), "{moved:?}");
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_is_not_told_hides_no_other() {
    let (engine, client, unknown) = with_self();
    engine.change(|script| script.failing = vec![("/other/json", "403 Forbidden", "no")]);
    for context in [&unknown, &located(&client, &unknown, inside(&["self"])).await] {
        let located = located(&client, context, inside(&["other", "self"])).await;
        assert!(is_in_app(&located) && located.untold.is_none(), "{located:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_proxy_in_no_container_is_on_the_host_whatever_the_engine_says() {
    let (engine, client, unknown) = with_self();
    engine.change(|script| script.failing = vec![("/self/json", "403 Forbidden", "no")]);
    let standing = Standing { is_inside: false, ..inside(&["self"]) };
    let host = located(&client, &unknown, standing).await;
    assert!(matches!(host.vantage, Vantage::Host { .. }), "{host:?}");
}

#[tokio::test(start_paused = true)]
async fn a_hanging_look_at_the_proxys_own_container_holds_up_no_list() {
    PLACE.set(inside(&["self"]));
    let mut engine = FakeEngine::new(&["a"]);
    engine.change(|script| script.held.push("/self/json"));
    engine.listen();
    let began_at = Instant::now();
    let untold = engine.until("reset a").await;
    assert!(began_at.elapsed() < ANSWER_TIMEOUT, "{:?}", began_at.elapsed());
    assert!(
        untold.iter().any(|change| change.contains("does not tell about the container of this proxy")),
        "{untold:?}"
    );
}

/// How container `id` is reached, each time that it is told.
async fn reaches(engine: &mut FakeEngine, id: &str, until: fn(&Result<Reach, Obstacle>) -> bool) -> Vec<String> {
    let mut told = Vec::new();
    loop {
        let reach = upserted(engine, id).await.reach;
        told.push(format!("{reach:?}"));
        if until(&reach) {
            return told;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_is_not_told_of_is_never_on_the_hosts_loopback_and_is_placed_later() {
    PLACE.set(inside(&["self"]));
    let mut engine = FakeEngine::new(&["a"]);
    // It is reached by the network in common, and its port is published on the loopback of the host.
    set(&engine, "a", |json| {
        let networks = json!({ "app": { "NetworkID": "n1", "IPAddress": "203.0.113.77" } });
        json["NetworkSettings"]["Networks"] = networks;
    });
    engine.change(|script| script.failing.push(("/self/json", "403 Forbidden", "{}")));
    engine.listen();
    let reach = upserted(&mut engine, "a").await.reach;
    let obstacle = reach.unwrap_err();
    assert!(obstacle.what.contains("loopback of the host only"), "{obstacle:?}");
    // It is asked for again, before the next list would be due.
    let mut own = container("self", "running");
    own["Config"]["Labels"] = json!({});
    own["NetworkSettings"]["Networks"] = json!({ "app": { "NetworkID": "n1", "IPAddress": "203.0.113.9" } });
    engine.change(|script| {
        script.failing.clear();
        script.containers.insert("self", own);
        script.containers.get_mut("self").unwrap()["State"]["Status"] = "running".into();
    });
    let told_at = Instant::now();
    let told = reaches(&mut engine, "a", Result::is_ok).await;
    assert!(told.last().unwrap().contains("203.0.113.77:8000"), "{told:?}");
    assert!(told_at.elapsed() < Duration::from_secs(6), "{:?}", told_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_told_of_a_container_before_the_place_of_the_proxy_is_known() {
    PLACE.set(inside(&["self"]));
    let mut engine = FakeEngine::new(&["a"]);
    set(&engine, "a", |json| {
        json["NetworkSettings"] = json!({ "Networks": { "app": { "NetworkID": "n1", "IPAddress": "203.0.113.77" } } });
    });
    let mut own = container("self", "running");
    own["NetworkSettings"]["Networks"] = json!({ "app": { "NetworkID": "n1", "IPAddress": "203.0.113.9" } });
    own["listed"] = json!({ "State": "running" });
    engine.change(|script| {
        script.containers.insert("self", own);
        script.held.push("/self/json");
    });
    engine.listen();
    let own = engine.held().await;
    let mut stream = engine.stream().await;
    // Events of the first moments wait, too.
    stream.send(&event("a", "health_status: healthy", 1)).await;
    assert!(timeout(Duration::from_millis(900), engine.changes.next()).await.is_err(), "nothing is said yet");
    engine.change(|script| script.held.clear());
    own.release().await;
    let reach = upserted(&mut engine, "a").await.reach;
    assert_eq!(reach.unwrap().targets, ["203.0.113.77:8000".parse().unwrap()]);
}
