//! The engine's own account of what happened, with its own time stamps.

use std::{
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::wait::eventually;

/// How long an event may be in coming.
const PATIENCE: Duration = Duration::from_secs(40);

/// What the tests look at. Leaving the rest out keeps the commands of health checks from filling the stream.
const WANTED: &[&str] = &[
    "create",
    "start",
    "health_status",
    "kill",
    "die",
    "stop",
    "destroy",
    "restart",
    "pause",
    "unpause",
    "oom",
    "connect",
    "disconnect",
];

/// One event.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// When it happened, by the engine.
    pub(crate) at: SystemTime,
    /// `start`, `die`, `health_status: healthy`, ...
    pub(crate) action: String,
    /// The container; for network events the container in question, not the network.
    pub(crate) container: String,
    /// What else the engine says, the container's labels among it.
    pub(crate) attributes: Value,
}

/// Everything that has happened since [`Events::watch`].
pub(crate) struct Events {
    seen: Arc<Mutex<Vec<Event>>>,
    _reader: Child,
}

// === impl Events ===

impl Events {
    /// Begins to record. Nothing that happens after the call is missed.
    pub(crate) fn watch() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let mut command = Command::new("docker");
        command.args(["events", "--format", "{{json .}}", "--since"]);
        command.arg(format!("{}.{:09}", since.as_secs(), since.subsec_nanos()));
        for action in WANTED {
            command.args(["--filter", &format!("event={action}")]);
        }
        let mut reader = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                record.lock().unwrap().extend(Event::parse(&line));
            }
        });
        Self { seen, _reader: reader }
    }

    /// The first event of `container` at or after `since` whose action begins with `action`; waits for it.
    pub(crate) async fn next(&self, container: &str, action: &str, since: SystemTime) -> Event {
        let what = format!("event `{action}` of container {container:.12}");
        eventually(&what, PATIENCE, async || {
            let seen = self.seen.lock().unwrap();
            seen.iter().find(|e| e.at >= since && e.container == container && e.action.starts_with(action)).cloned()
        })
        .await
    }

    /// Every event of `container` at or after `since`, so far, in order.
    pub(crate) fn of(&self, container: &str, since: SystemTime) -> Vec<Event> {
        self.matching(|event| event.at >= since && event.container == container)
    }

    /// Every event, so far, for which `is_wanted` is true, in order.
    pub(crate) fn matching(&self, is_wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
        self.seen.lock().unwrap().iter().filter(|event| is_wanted(event)).cloned().collect()
    }
}

// === impl Event ===

impl Event {
    fn parse(line: &str) -> Option<Self> {
        let event: Value = serde_json::from_str(line).ok()?;
        let attributes = event["Actor"]["Attributes"].clone();
        let container = match event["Type"].as_str()? {
            "container" => event["Actor"]["ID"].as_str()?,
            "network" => attributes["container"].as_str()?,
            _ => return None,
        };
        Some(Self {
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(event["timeNano"].as_u64()?),
            action: event["Action"].as_str()?.to_owned(),
            container: container.to_owned(),
            attributes,
        })
    }
}
