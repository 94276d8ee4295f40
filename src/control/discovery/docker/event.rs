//! What a Docker event says, read from the engine's message; and whether it is news. Pure.
//!
//! Events are hints: they say when to look, and only a few say what to do before looking. Attributes are the container's
//! own labels with the engine's keys mixed in, so a container can forge any of them; what matters is decided with
//! [`crate::control::discovery::signal`], which knows that.

use std::{
    collections::{HashSet, VecDeque, hash_map::RandomState},
    hash::BuildHasher as _,
};

use serde_json::Value;

use super::answers::{number, text};

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
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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
    /// It was disconnected from this network: its id, or its name where the engine (Podman) tells no id.
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

/// The word under which an event that cannot be read is counted.
pub(super) const UNREADABLE: &str = "unreadable";

/// The words under which events are counted.
pub(super) const COUNTED: &[&str] = &{
    let mut words = [UNREADABLE; ACTIONS.len() + 1];
    let mut n = 0;
    while n < ACTIONS.len() {
        words[n] = ACTIONS[n];
        n += 1;
    }
    words
};

/// What one message of the stream is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    /// It concerns discovery.
    News(Notice),
    /// It does not, or its type or action is not known here.
    Other,
    /// It seems to concern discovery, but lacks what makes sense of it; its time, if there is one.
    Unreadable(Option<i64>),
}

/// Reads one message.
pub(super) fn read(message: &Value) -> Message {
    let time_nanos = number(&message["timeNano"])
        .or_else(|| number(&message["time"]).map(|seconds| seconds.saturating_mul(1_000_000_000)));
    if !message.is_object() {
        return Message::Unreadable(None);
    }
    // Before API 1.22 an event was a container's, and had `status` and `id` only.
    let action = text(&message["Action"]).or_else(|| text(&message["status"]));
    let kind = text(&message["Type"]).unwrap_or("container");
    let Some(action) = action else { return Message::Unreadable(time_nanos) };
    let of_network = match kind {
        "network" => true,
        "container" => false,
        _ => return Message::Other,
    };
    // Health checks add their verdict.
    let name = action.split(':').next().unwrap_or_default();
    let is_heard = matches!(name, "connect" | "disconnect") == of_network;
    let Some(known) = ACTIONS.iter().copied().find(|known| *known == name && is_heard) else {
        return Message::Other;
    };
    let attributes = &message["Actor"]["Attributes"];
    let actor = text(&message["Actor"]["ID"]).or_else(|| text(&message["id"]));
    // Docker's network events name the container among the attributes; the actor of Podman's is the container itself.
    let container = text(&attributes["container"]).filter(|_| of_network);
    let (Some(id), Some(time_nanos)) = (container.or(actor), time_nanos) else {
        return Message::Unreadable(time_nanos);
    };
    let network = match container {
        Some(_) => actor,
        None => text(&attributes["network"]).or_else(|| text(&attributes["name"])),
    };
    let kind = match (known, network) {
        ("disconnect", Some(network)) => Kind::Disconnected(network.to_owned()),
        ("kill", _) => {
            Kind::Signalled(text(&attributes["signal"]).and_then(crate::control::discovery::signal::parse_signal))
        }
        ("die" | "died" | "stop" | "destroy" | "remove", _) => Kind::Ended,
        ("pause", _) => Kind::Paused,
        ("oom", _) => Kind::OutOfMemory,
        _ => Kind::Changed,
    };
    let labelled = !of_network && !attributes["inference.enable"].is_null();
    Message::News(Notice { id: id.to_owned(), kind, action: known, time_nanos, labelled })
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
        self.pass(notice.time_nanos, now_nanos);
        // Some engines tell time in seconds: then much may happen at once.
        let key = self.hasher.hash_one((&notice.id, notice.time_nanos, notice.action, &notice.kind));
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

    /// An event of this time has been heard, whether or not it could be read: it is not asked for again.
    pub(super) fn pass(&mut self, time_nanos: i64, now_nanos: i64) {
        self.newest_nanos = Some(time_nanos.min(now_nanos));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(json: &str) -> Option<Notice> {
        match read(&serde_json::from_str(json).unwrap()) {
            Message::News(notice) => Some(notice),
            Message::Other => None,
            Message::Unreadable(_) => panic!("{json} must be readable"),
        }
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

    #[test]
    fn podmans_network_events_are_about_their_actor() {
        let event = |action: &str, attributes: &str| {
            notice(&format!(
                r#"{{"Type":"network","Action":{action:?},"Actor":{{"ID":"c1","Attributes":{{{attributes}}}}},"timeNano":5}}"#
            ))
            .map(|notice| (notice.id, notice.kind))
        };
        let left = |network: &str| Some(("c1".to_owned(), Kind::Disconnected(network.to_owned())));
        assert_eq!(event("disconnect", r#""image":"","name":"","network":"app","podId":"""#), left("app"));
        assert_eq!(event("disconnect", r#""image":"","name":"app""#), left("app"));
        assert_eq!(event("connect", r#""network":"app""#), Some(("c1".to_owned(), Kind::Changed)));
        // Which network it was is not told: a look tells.
        assert_eq!(event("disconnect", r#""image":"","name":"""#), Some(("c1".to_owned(), Kind::Changed)));
        assert_eq!(event("remove", r#""name":"app""#), None);
    }

    #[test]
    fn no_field_of_another_type_makes_an_event_unreadable_that_can_be_understood() {
        let good = serde_json::json!({
            "Type": "container", "Action": "die", "timeNano": 5, "time": 0, "scope": "local",
            "Actor": { "ID": "c1", "Attributes": { "inference.enable": "true", "exitCode": "0" } },
        });
        let is_news = |event: &Value| matches!(read(event), Message::News(Notice { kind: Kind::Ended, .. }));
        assert!(is_news(&good));
        for (field, value) in [
            ("scope", serde_json::json!(7)),
            ("status", serde_json::json!([])),
            ("from", serde_json::json!({})),
            ("HealthStatus", serde_json::json!("reset")),
            ("timeNano", serde_json::json!("5")),
            ("timeNano", serde_json::json!(null)),
            ("Type", serde_json::json!(null)),
        ] {
            let mut event = good.clone();
            event[field] = value.clone();
            assert!(is_news(&event), "{field}: {value}");
        }
        let mut event = good.clone();
        event["Actor"]["Attributes"] = serde_json::json!([7]);
        assert!(is_news(&event), "{event}");
        // A container whose label has another type is still labelled.
        event["Actor"]["Attributes"] = serde_json::json!({ "inference.enable": true });
        assert!(matches!(read(&event), Message::News(Notice { labelled: true, .. })));
        let of_old = serde_json::json!({ "status": "die", "id": "c1", "time": 7 });
        assert!(is_news(&of_old), "before API 1.22");

        for (field, value) in [("Type", "wormhole"), ("Action", "ascend"), ("Action", "connect")] {
            let mut event = good.clone();
            event[field] = value.into();
            assert_eq!(read(&event), Message::Other, "{field}: {value}");
        }
        for (field, value, time) in [
            ("Action", serde_json::json!(7), Some(5)),
            ("Actor", serde_json::json!("c1"), Some(5)),
            ("Actor", serde_json::json!({ "ID": 7 }), Some(5)),
        ] {
            let mut event = good.clone();
            event[field] = value.clone();
            assert_eq!(read(&event), Message::Unreadable(time), "{field}: {value}");
        }
        let mut timeless = good;
        (timeless["timeNano"], timeless["time"]) = (serde_json::json!("now"), serde_json::json!([]));
        assert_eq!(read(&timeless), Message::Unreadable(None));
        for odd in ["7", "null", "[]", "\"die\""] {
            assert_eq!(read(&serde_json::from_str(odd).unwrap()), Message::Unreadable(None), "{odd}");
        }
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
