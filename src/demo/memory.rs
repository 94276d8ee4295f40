//! Takes memory on request, so that an out-of-memory kill can be watched: of this process, or of a child of it.

use std::{io, process::Command, thread, time::Duration};

/// How long [`allocate_mb`] holds what it has.
const HELD: Duration = Duration::from_secs(60);

/// What `--allocate-mb` runs, as a child of the demo backend: allocates and holds `mib` MiB, after asking the
/// kernel to kill this process first. Left to itself, it may pick the parent, and the container would be gone.
pub fn allocate_as_child(mib: usize) {
    // Where that is not allowed, the kernel picks whom it likes.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    allocate_mb(mib);
}

/// Allocates and touches `mib` MiB, holds them for a minute and returns, to provoke an OOM kill.
pub(super) fn allocate_mb(mib: usize) {
    let mut memory: Vec<u8> = Vec::new();
    match memory.try_reserve_exact(mib << 20) {
        // Not zero: the kernel gives pages of zeros without taking memory for them.
        Ok(()) => memory.resize(mib << 20, 1),
        Err(error) => tracing::warn!(mib, %error, "could not allocate"),
    }
    std::hint::black_box(&memory);
    thread::sleep(HELD);
}

/// Runs this program again with the hidden flag for it, and waits for it, so that no zombie stays.
pub(super) fn allocate_in_child(mib: usize) {
    let run = || -> io::Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["demo-backend", "--allocate-mb", &mib.to_string()]).spawn()?.wait()?;
        Ok(())
    };
    if let Err(error) = run() {
        tracing::warn!(%error, "could not run a child process to allocate in");
    }
}
