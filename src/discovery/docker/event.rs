//! What a Docker event says, read from the engine's message; and whether it is news. Pure.
//!
//! Events are hints: they say when to look, and only a few say what to do before looking. Attributes are the container's
//! own labels with the engine's keys mixed in, so a container can forge any of them; what matters is decided with
//! [`crate::discovery::signal`], which knows that.

use std::{
    collections::{HashSet, VecDeque, hash_map::RandomState},
    hash::BuildHasher as _,
};

use bollard::models::{EventMessage, EventMessageTypeEnum};

/// One event that concerns discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Notice {
    /// The container it is about.
    pub(super) id: String,
    /// What it says.
    pub(super) kind: Kind,
    /// What the engine calls it: one of [`ACTIONS`].
    pub(super) action: &'static str,
    /// When it happened, nanoseconds since 1970.
    pub(super) time_nanos: i64,
    /// The container asks to be routed, as far as the event tells; networks' events do not tell.
    pub(super) labelled: bool,
}

/// What an event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// Something about it changed: look.
    Changed,
    /// A signal was sent to it; `None` where the engine does not tell which.
    Signalled(Option<u8>),
    /// Its process has ended, or it is gone altogether.
    Ended,
    /// It was paused.
    Paused,
    /// A process in it was killed for want of memory.
    OutOfMemory,
    /// It was disconnected from this network.
    Disconnected(String),
}

/// The events worth hearing. Naming them keeps the noise of health checks (three events each) from being sent at all.
/// `died` and `remove` are Podman's names.
pub(super) const ACTIONS: &[&str] = &[
    "start",
    "restart",
    "health_status",
    "kill",
    "die",
    "died",
    "stop",
    "destroy",
    "remove",
    "oom",
    "pause",
    "unpause",
    "rename",
    "update",
    "connect",
    "disconnect",
];

/// Reads one message; `None` if it does not concern discovery.
pub(super) fn read(message: EventMessage) -> Option<Notice> {
    let actor = message.actor?;
    let attributes = actor.attributes.unwrap_or_default();
    let time_nanos = message.time_nano.or_else(|| message.time.map(|s| s.saturating_mul(1_000_000_000)))?;
    let action = message.action?;
    let of_network = message.typ == Some(EventMessageTypeEnum::NETWORK);
    let id = if of_network { attributes.get("container")?.clone() } else { actor.id.clone()? };
    let kind = match (of_network, action.as_str()) {
        (true, "connect") => Kind::Changed,
        (true, "disconnect") => Kind::Disconnected(actor.id?),
        (true, _) => return None,
        (false, "kill") => {
            Kind::Signalled(attributes.get("signal").and_then(|signal| crate::discovery::signal::parse_signal(signal)))
        }
        (false, "die" | "died" | "stop" | "destroy" | "remove") => Kind::Ended,
        (false, "pause") => Kind::Paused,
        (false, "oom") => Kind::OutOfMemory,
        (false, "start" | "restart" | "unpause" | "rename" | "update") => Kind::Changed,
        (false, action) if action.starts_with("health_status") => Kind::Changed,
        (false, _) => return None,
    };
    // Health checks add their verdict.
    let name = action.split(':').next().unwrap_or_default();
    let action = ACTIONS.iter().copied().find(|known| *known == name)?;
    let labelled = !of_network && attributes.contains_key("inference.enable");
    Some(Notice { id, kind, action, time_nanos, labelled })
}

/// How many events are remembered to recognise them when they are replayed.
const REMEMBERED: usize = 1024;

/// Tells events from their repetitions: a subscription that begins again overlaps with the one before, and acting twice
/// on a `pause` that is long over would take a healthy backend out.
#[derive(Debug, Default)]
pub(super) struct Seen {
    order: VecDeque<u64>,
    keys: HashSet<u64>,
    hasher: RandomState,
    /// Time of the event that was heard last, but not later than the clock was then: a subscription that begins again
    /// must not begin in the future.
    pub(super) newest_nanos: Option<i64>,
}

impl Seen {
    /// Whether this is the first time; remembers it. `now_nanos` is the time of this machine.
    pub(super) fn is_new(&mut self, notice: &Notice, now_nanos: i64) -> bool {
        self.newest_nanos = Some(notice.time_nanos.min(now_nanos));
        let kind = std::mem::discriminant(&notice.kind);
        let key = self.hasher.hash_one((&notice.id, notice.time_nanos, kind));
        if !self.keys.insert(key) {
            return false;
        }
        self.order.push_back(key);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.keys.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(json: &str) -> Option<Notice> {
        read(serde_json::from_str(json).unwrap())
    }

    fn container(action: &str, attributes: &str) -> Option<Notice> {
        notice(&format!(
            r#"{{"Type":"container","Action":{action:?},"Actor":{{"ID":"c1","Attributes":{{{attributes}}}}},"timeNano":5}}"#
        ))
    }

    #[test]
    fn actions_mean_what_the_engine_means() {
        let labelled = r#""inference.enable":"true""#;
        for (action, kind) in [
            ("start", Kind::Changed),
            ("health_status: healthy", Kind::Changed),
            ("health_status", Kind::Changed),
            ("die", Kind::Ended),
            ("died", Kind::Ended),
            ("stop", Kind::Ended),
            ("destroy", Kind::Ended),
            ("pause", Kind::Paused),
            ("oom", Kind::OutOfMemory),
            ("kill", Kind::Signalled(None)),
        ] {
            let name = action.split(':').next().unwrap();
            let known = ACTIONS.iter().find(|known| **known == name).unwrap();
            let expect = Notice { id: "c1".into(), kind, action: known, time_nanos: 5, labelled: true };
            assert_eq!(container(action, labelled), Some(expect), "{action}");
        }
        for action in ["exec_create: /bin/sh", "exec_die", "create", "top", "attach"] {
            assert_eq!(container(action, labelled), None, "{action}");
        }
        assert_eq!(container("kill", r#""signal":"15""#).unwrap().kind, Kind::Signalled(Some(15)));
        assert!(!container("start", "").unwrap().labelled);
    }

    #[test]
    fn network_events_are_about_the_container_they_name() {
        let event = |action: &str| {
            notice(&format!(
                r#"{{"Type":"network","Action":{action:?},"Actor":{{"ID":"n1","Attributes":{{"container":"c1","name":"na"}}}},"time":7}}"#
            ))
        };
        let disconnected = Notice {
            id: "c1".into(),
            kind: Kind::Disconnected("n1".into()),
            action: "disconnect",
            time_nanos: 7_000_000_000,
            labelled: false,
        };
        assert_eq!(event("disconnect"), Some(disconnected));
        assert_eq!(event("connect").unwrap().kind, Kind::Changed);
        assert_eq!(event("create"), None);
    }

    /// What engines were recorded to send, one scenario per file.
    fn recorded(file: &str) -> Vec<Option<Notice>> {
        let path = format!("{}/testdata/docker-events/{file}.jsonl", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.map(notice).collect()
    }

    fn in_short(notice: &Notice) -> String {
        match &notice.kind {
            Kind::Changed => "look".to_owned(),
            Kind::Signalled(Some(signal)) => format!("signal-{signal}"),
            Kind::Signalled(None) => "signal-?".to_owned(),
            Kind::Ended => "ended".to_owned(),
            Kind::Paused => "paused".to_owned(),
            Kind::OutOfMemory => "oom".to_owned(),
            Kind::Disconnected(_) => "disconnected".to_owned(),
        }
    }

    #[test]
    fn recorded_scenarios_are_read_as_what_they_were() {
        // "look look" at the start: connected to its network, started. "ended" twice: die and destroy, or die and stop.
        for (file, expect) in [
            ("01-health-cycle", "look look look look look signal-15 ended disconnected ended ended"),
            ("02-stop-ignores-sigterm", "look look signal-15 signal-9 ended disconnected ended ended"),
            ("03-kill-sigkill", "look look signal-9 ended disconnected ended"),
            ("04-kill-hup", "look look signal-1 signal-10 signal-15 ended disconnected ended"),
            ("05-crash-exit3", "look look ended disconnected ended"),
            ("06-oom", "look look oom ended disconnected ended"),
            (
                "07-docker-restart",
                "look look look signal-15 ended disconnected ended look look look look signal-9 ended disconnected ended",
            ),
            (
                "08b-restart-always-then-stop",
                "look look ended disconnected look look ended disconnected look look signal-15 ended disconnected ended \
                 look look signal-9 ended disconnected ended",
            ),
            (
                "09-pause-unpause",
                "look look look paused look look paused signal-15 look signal-9 ended disconnected ended ended",
            ),
            ("13-rm-f", "look look signal-9 ended disconnected ended"),
            (
                "17-stopsignal",
                "look look signal-2 ended disconnected ended ended \
                 look look signal-37 signal-9 ended disconnected ended ended \
                 look look signal-3 signal-9 ended disconnected ended ended \
                 look look signal-15 signal-9 ended disconnected ended ended",
            ),
            (
                "22-stop-during-restart-backoff",
                "look look ended disconnected look look ended disconnected look look ended disconnected \
                 look look ended disconnected look look ended disconnected look look ended disconnected ended ended",
            ),
            ("23-oom-child", "look look oom signal-9 ended disconnected ended"),
            ("24-host-kill9", "look look ended disconnected ended"),
            ("29-healthy-after-kill", "look look look signal-15 look ended disconnected ended ended"),
            // The label `signal=1` hides SIGTERM and SIGKILL.
            ("33-label-injection", "look look signal-1 signal-1 ended disconnected ended ended"),
            // Podman tells no signal, repeats health on every check, and says remove for destroy.
            ("podman-30-lifecycle", "look look look look look look signal-? paused look ended look ended ended ended"),
            // Podman's stop gives no notice, and its restart comes before the end.
            ("podman-32-cli-stop", "ended look look ended look"),
        ] {
            let read: Vec<String> = recorded(file).iter().flatten().map(in_short).collect();
            assert_eq!(read.join(" "), expect, "{file}");
        }
    }

    #[test]
    fn recorded_network_changes_name_container_and_network() {
        let notices: Vec<Notice> = recorded("11-network-ip-change").into_iter().flatten().collect();
        let labelled = notices.iter().find(|notice| notice.labelled).unwrap();
        let networks: Vec<&str> = notices
            .iter()
            .filter(|notice| notice.id == labelled.id)
            .filter_map(|notice| match &notice.kind {
                Kind::Disconnected(network) => Some(network.as_str()),
                _ => None,
            })
            .collect();
        // Each disconnection is told twice, the last one (at its end) once; two networks in all.
        assert_eq!(networks.len(), 5);
        assert!(networks[0] == networks[1] && networks[2] == networks[3] && networks[0] != networks[2]);
        // Repetitions are told apart from news by their time: two events, both are news.
        let mut seen = Seen::default();
        assert!(notices.iter().all(|notice| seen.is_new(notice, i64::MAX)));
        assert!(!notices.iter().any(|notice| seen.is_new(notice, i64::MAX)), "all of them replayed");
    }

    #[test]
    fn every_recorded_line_can_be_read() {
        let folder = format!("{}/testdata/docker-events", env!("CARGO_MANIFEST_DIR"));
        let mut noise = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            for notice in recorded(name.trim_end_matches(".jsonl")) {
                match notice {
                    // 2026 or later, in nanoseconds: not seconds taken for them.
                    Some(notice) => assert!(notice.id.len() == 64 && notice.time_nanos > 1_767_225_600_000_000_000),
                    None => noise += 1,
                }
            }
        }
        assert!(noise > 30, "health checks and creations are no news: {noise}");
    }

    #[test]
    fn replayed_events_are_recognised_and_memory_is_bounded() {
        let mut seen = Seen::default();
        let at =
            |time_nanos| Notice { id: "c".into(), kind: Kind::Paused, action: "pause", time_nanos, labelled: true };
        let mut is_new = |notice: &Notice, now| seen.is_new(notice, now);
        assert!(is_new(&at(1), 9) && !is_new(&at(1), 9) && is_new(&at(2), 9));
        assert!(is_new(&Notice { kind: Kind::Ended, ..at(1) }, 9));
        for time in 0..5_000 {
            is_new(&at(time), i64::MAX);
        }
        assert_eq!(seen.order.len(), REMEMBERED);
        assert_eq!(seen.keys.len(), REMEMBERED);
        assert_eq!(seen.newest_nanos, Some(4_999));
        // A clock that was ahead, and one that was put back.
        seen.is_new(&at(9_000_000), 6_000);
        assert_eq!(seen.newest_nanos, Some(6_000));
        seen.is_new(&at(3_000), 6_001);
        assert_eq!(seen.newest_nanos, Some(3_000));
    }
}
