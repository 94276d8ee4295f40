//! O5: the commands as people call them: the real program.

use std::process::{Output, Stdio};

use tokio::process::Command;

use crate::support::*;

/// The program with these arguments, and nothing in its environment.
fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inference-proxy"));
    command.args(args).env_clear().stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// What it says until it ends.
async fn output(command: &mut Command) -> Output {
    soon("the program has ended", command.output()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_a_url_that_cannot_be_is_said_with_what_can() {
    for (url, expected) in [
        ("http://127.0.0.1:99999", "no port or one from 1 to 65535"),
        ("127.0.0.1:18505", "expected a URL that begins with http://"),
        ("https://127.0.0.1:18505", "expected a URL that begins with http://"),
    ] {
        for args in [&["status"][..], &["status", "--watch"], &["healthcheck"]] {
            let output = output(program(args).args(["--url", url])).await;
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{args:?} {said}");
            assert!(said.contains(url) && said.contains(expected) && !said.contains(":80:"), "{args:?} {said}");
            assert!(!said.contains("nobody listens") && !said.contains("is the proxy running"), "{args:?} {said}");
        }
    }
    let mut serve = program(&[]);
    serve.env("PROXY_PORT", "0").env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:99999");
    let Output { status, stderr, .. } = output(&mut serve).await;
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("OTEL_EXPORTER_OTLP_ENDPOINT") && said.contains("1 to 65535"), "{said}");
}
