//! The proxy on a real Docker Engine: one test for each line of the acceptance list (`tests/README.md`), by its number.
//!
//! Everything is seen from outside. Containers of the image under test run as the proxy and, by its `demo-backend`
//! subcommand, as inference servers; tests act with the `docker` command and judge by answers, by the engine's own events
//! and by `/status`, `/metrics` and the log.
//!
//! | variable | default | meaning |
//! |---|---|---|
//! | `INFERENCE_PROXY_IMAGE` | `inference-proxy:test` | image under test |
//! | `INFERENCE_PROXY_BIN` | the binary in that image | what runs as the proxy outside of a container |
//! | `DOCKER_REQUIRED` | – | `1`: fail where there is no engine or no image; otherwise tests say so and pass |
//!
//! Needs Linux, where containers' addresses can be reached from the machine, and the engine's unix socket. A proxy sees
//! every labelled container on the engine: each test has model names of its own and looks at nothing else.
//!
//! Tests that measure run alone, whatever `--test-threads` says. The others wait most of their time, so more threads than
//! cores help: `--test-threads=6` does well with two. Tests are taken in the order of their names, and modules are named so
//! that those which share the machine come first. `--show-output` shows the figures.

#![cfg(target_os = "linux")]
// The switches for tests in .clippy.toml know the tests themselves, but not their helpers.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]
#![expect(clippy::disallowed_methods, reason = "which image and engine to use stands in the environment")]

mod discovery;
mod elsewhere;
mod lifecycle;
mod measured;
mod pools;
mod restarts;
mod rolling;
mod rolling_proxies;
mod support;
mod timings;
