use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    base::{config::Config, phase::Life},
    observe::{
        pages::{Admin, live::Live},
        report::Reporter,
    },
    pool::table,
    telemetry::Telemetry,
};

const SECOND: Duration = Duration::from_secs(1);

/// A proxy without backends, which may hold 8 KiB of bodies.
fn proxy() -> Arc<Proxy> {
    let (config, _) = Config::from_vars([("PROXY_HOLD_MAX", "1KiB")]).unwrap();
    let (_, table) = table::table();
    let telemetry = Telemetry::default();
    let admin = Admin {
        life: Life::default(),
        reporter: Reporter { table: table.clone(), metrics: telemetry.metrics.clone() },
        asks: mpsc::channel(1).0,
        live: Live::new(Life::default()),
    };
    Arc::new(Proxy::new(&config, table, telemetry, admin))
}

/// A client that has sent this much of a body whose model has not come.
async fn begun(proxy: &Arc<Proxy>, begin: &str) -> DuplexStream {
    let (mut client, there) = tokio::io::duplex(64 * 1024);
    let proxy = proxy.clone();
    tokio::spawn(async move {
        let closing = Closing::new(Arc::default(), CancellationToken::new().cancelled_owned());
        proxy.serve(Port::Data, there, Vec::new(), std::net::Ipv4Addr::LOCALHOST.into(), closing).await;
    });
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n";
    client.write_all(format!("{head}{begin}").as_bytes()).await.unwrap();
    // Its task takes that in.
    sleep(Duration::from_millis(1)).await;
    client
}

/// The status of the next answer, if one comes soon.
async fn status(client: &mut DuplexStream) -> Option<u16> {
    let mut answer = vec![0; 4096];
    let n = timeout(SECOND, client.read(&mut answer)).await.ok()?.unwrap();
    std::str::from_utf8(&answer[..n]).unwrap().split(' ').nth(1)?.parse().ok()
}

#[tokio::test(start_paused = true)]
async fn slow_bodies_without_a_model_give_way_when_others_need_the_room() {
    let proxy = proxy();
    let mut slow = begun(&proxy, r#"{"a":"#).await;
    let mut less_slow = begun(&proxy, r#"{"messages":[],"#).await;
    assert_eq!(proxy.limits.held_bytes(), 8 * 1024, "both are counted, and there is no more room");
    let mut third = begun(&proxy, r#"{"a":"#).await;
    assert_eq!(status(&mut third).await, Some(429));
    for _ in 0..3 {
        sleep(SECOND * 29).await;
        slow.write_all(b" ").await.unwrap();
        less_slow.write_all(b"   ").await.unwrap();
    }
    assert_eq!(status(&mut slow).await, None, "nobody needs its room");
    let mut late = begun(&proxy, r#"{"a":1,"#).await;
    assert_eq!(status(&mut slow).await, Some(408));
    assert_eq!(status(&mut less_slow).await, None);
    late.write_all(br#""model":"unheard","#).await.unwrap();
    assert_eq!(status(&mut late).await, Some(404), "its model has come, which nobody serves");
    less_slow.write_all(br#""model":"unheard","#).await.unwrap();
    assert_eq!(status(&mut less_slow).await, Some(404), "it was left alone");
    drop((slow, less_slow, third, late));
    sleep(SECOND * 60).await;
    assert_eq!(proxy.limits.held_bytes(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_slow_body_is_left_alone_while_there_is_room() {
    let proxy = proxy();
    let mut slow = begun(&proxy, r#"{"a":"#).await;
    for _ in 0..100 {
        sleep(SECOND * 50).await;
        slow.write_all(b" ").await.unwrap();
    }
    let mut other = begun(&proxy, r#"{"model":"unheard","#).await;
    assert_eq!((status(&mut other).await, status(&mut slow).await), (Some(404), None));
    slow.write_all(br#"1,"model":"unheard","#).await.unwrap();
    assert_eq!(status(&mut slow).await, Some(404));
}
