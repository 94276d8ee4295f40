//! What the kernel says of this process, read from `/proc` when somebody asks. What cannot be read is left out.

use std::fs;

/// What this process uses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// Processor time, user and system, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Memory, in bytes.
    pub resident_bytes: Option<u64>,
    /// Open files.
    pub files: Option<u64>,
    /// Most open files.
    pub files_max: Option<u64>,
    /// When it was started, in seconds since 1970.
    pub started_seconds: Option<f64>,
}

/// `USER_HZ`, the unit of times in `/proc`: 100 on every architecture that this builds for.
const TICKS_PER_SECOND: f64 = 100.0;

impl Usage {
    /// As it is now. Reads four small files and one folder.
    pub fn now() -> Usage {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let system = fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks = Ticks::read(&stat);
        let booted: Option<f64> = value_of(&system, "btime ");
        Usage {
            cpu_seconds: ticks.map(|ticks| ticks.cpu / TICKS_PER_SECOND),
            resident_bytes: value_of(&status, "VmRSS:").map(|kib: u64| kib * 1024),
            // The folder itself is open while it is read.
            files: fs::read_dir("/proc/self/fd").ok().map(|files| files.count().saturating_sub(1) as u64),
            files_max: rlimit::getrlimit(rlimit::Resource::NOFILE).ok().map(|(soft, _)| soft),
            started_seconds: ticks.zip(booted).map(|(ticks, booted)| booted + ticks.started / TICKS_PER_SECOND),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Ticks {
    cpu: f64,
    started: f64,
}

impl Ticks {
    /// From a line of `/proc/PID/stat` (proc_pid_stat(5)).
    fn read(stat: &str) -> Option<Ticks> {
        // The name of the program stands in parentheses, and may hold any of them.
        let (_, rest) = stat.rsplit_once(')')?;
        // The third field is the first one here.
        let field = |number: usize| rest.split_ascii_whitespace().nth(number - 3)?.parse::<f64>().ok();
        Some(Ticks { cpu: field(14)? + field(15)?, started: field(22)? })
    }
}

/// The number behind `key` at the beginning of a line.
fn value_of<T: std::str::FromStr>(text: &str, key: &str) -> Option<T> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_stat_is_read_whatever_the_program_is_called() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 3 0 12345 1 2 3";
        assert_eq!(Ticks::read(stat), Some(Ticks { cpu: 200.0, started: 12345.0 }));
        assert_eq!(Ticks::read("7 (a"), None);
    }

    #[test]
    fn this_process_is_seen() {
        let usage = Usage::now();
        assert!(usage.resident_bytes.unwrap() > 1024 * 1024, "{usage:?}");
        assert!(usage.files.unwrap() >= 3 && usage.files_max.unwrap() >= usage.files.unwrap(), "{usage:?}");
        let age = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64()
            - usage.started_seconds.unwrap();
        assert!((-2.0..3600.0).contains(&age), "started {age} s ago");
        assert!(usage.cpu_seconds.is_some());
    }
}
