//! A task without which the proxy cannot do its work ends in the real program, and the program with it.

use std::{fs, process::Stdio};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
    process::Command,
    task::{JoinHandle, JoinSet},
};

use crate::support::{engine::Engine, *};

/// Less than the stack of a thread, and more than what is needed to tell of the end.
const MEMORY_LEFT: u64 = 1024 * 1024;
/// How the threads are called that look up addresses. One that has nothing to do ends after ten seconds.
const LOOKUP_THREAD: &str = "tokio-rt-worker";

/// Makes an engine on a unix socket known at a port of this machine; ends, with all connections, when aborted.
async fn relay(to: &Engine) -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let path = to.host().trim_start_matches("unix://").to_owned();
    let relaying = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut engine = UnixStream::connect(&path).await.unwrap();
            connections.spawn(async move { copy_bidirectional(&mut client, &mut engine).await });
        }
    });
    (port, relaying)
}

fn lookup_threads(pid: u32) -> usize {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == LOOKUP_THREAD).count()
}

/// Lets a process have so much more memory than it has.
fn limit_memory(pid: u32, left_bytes: u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let has_bytes = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024;
    let limit = Rlimit { current: Some(has_bytes + left_bytes), maximum: getrlimit(Resource::As).maximum };
    prlimit(Pid::from_raw(pid.cast_signed()), Resource::As, limit).unwrap();
}

/// The engine is named, so that its address has to be looked up, which takes a thread. Once the threads of the first time
/// have ended and the process gets no memory for another one, the task that follows the engine cannot go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_ends_with_exit_code_1_when_the_registry_cannot_go_on() {
    let engine = Engine::start_new();
    let (port, relaying) = relay(&engine).await;
    let child = Command::new(env!("CARGO_BIN_EXE_inference-proxy"))
        .env_clear()
        .env("DOCKER_HOST", format!("tcp://localhost:{port}"))
        .envs([("PROXY_PORT", "0"), ("PROXY_BIND", "127.0.0.1")])
        // Stacks of threads that have ended are not kept for others.
        .env("GLIBC_TUNABLES", "glibc.pthread.stack_cache_size=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    eventually("the program has looked up its engine", async || lookup_threads(pid) > 0).await;
    eventually("nothing is to be looked up", async || lookup_threads(pid) == 0).await;
    limit_memory(pid, MEMORY_LEFT);
    relaying.abort();
    let output = soon("the program has ended", child.wait_with_output()).await.unwrap();
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{said}{told}");
    assert!(told.contains("the registry task has ended"), "{said}{told}");
    assert!(told.contains("it panicked: OS can't spawn worker thread"), "{said}{told}");
}
