//! The status as a table in a terminal: what is not live comes first, with its reason and what to change below its line.

use std::fmt::Write as _;

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{ContainerStatus, ModelStatus, Status};
use crate::{
    base::foreign::few,
    telemetry::kinds::{ContainerState, Named as _},
};

/// How many of the latest events are shown.
const EVENTS_SHOWN: usize = 8;
/// How many of the models that somebody may miss are shown.
const MODELS_SHOWN: usize = 8;
/// What stands below a line is indented by this.
const INDENT: &str = "    ";

/// The size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Screen {
    /// Characters in a row; not none.
    pub columns: usize,
    /// Rows; not none.
    pub rows: usize,
}

/// How to show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Columns; longer texts go on in the next line.
    pub width: usize,
    /// The terminal that it is shown on, if its size is known.
    pub screen: Option<Screen>,
    /// With colours (ECMA-48).
    pub colours: bool,
}

impl Default for Look {
    fn default() -> Look {
        Look { width: 100, screen: None, colours: false }
    }
}

/// What to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The table, once.
    Table,
    /// JSON, once.
    Json,
    /// The table, kept up to date.
    Watch,
}

impl Look {
    /// What suits a terminal with these variables; `is_terminal`: whether it is one. `COLUMNS` counts more than what the
    /// terminal says. See <https://no-color.org>.
    pub fn of(is_terminal: bool, screen: Option<Screen>, var: impl Fn(&str) -> Option<String>) -> Look {
        const WIDTHS: std::ops::RangeInclusive<usize> = 40..=500;
        let said = var("COLUMNS").and_then(|columns| columns.parse().ok()).filter(|width| WIDTHS.contains(width));
        let screen = screen.filter(|_| is_terminal);
        let width = said.or(screen.map(|screen| screen.columns.clamp(*WIDTHS.start(), *WIDTHS.end())));
        let is_plain = var("NO_COLOR").is_some_and(|value| !value.is_empty())
            || var("TERM").is_some_and(|terminal| terminal == "dumb");
        Look { width: width.unwrap_or(Look::default().width), screen, colours: is_terminal && !is_plain }
    }
}

#[derive(Debug, Clone, Copy)]
enum Ink {
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
    Strong,
}

/// The whole picture as text that ends with a line's end.
pub fn render(status: &Status, look: Look) -> String {
    let mut page = Page { text: String::new(), look };
    page.head(status);
    page.containers(status);
    page.models(status);
    page.events(status);
    page.text
}

/// What makes a terminal show this text instead of what it showed before, without a flicker: from the top, each line up to
/// its end, then nothing more. What has no room on the `screen` is left out at the end, as the top must not scroll away.
pub fn frame(text: &str, screen: Option<Screen>) -> String {
    let rows = |line: &str| screen.map_or(1, |screen| shown_chars(line).div_ceil(screen.columns).max(1));
    let lines: Vec<&str> = text.lines().collect();
    let mut shown = lines.len();
    let mut more = None;
    if let Some(screen) = screen
        && lines.iter().map(|line| rows(line)).sum::<usize>() > screen.rows
    {
        // One row is for saying so.
        let mut room = screen.rows - 1;
        let fits = |line: &&&str| {
            let left = room.checked_sub(rows(line));
            room = left.unwrap_or(0);
            left.is_some()
        };
        shown = lines.iter().take_while(fits).count();
        more = Some(format!("… {} more lines", lines.len() - shown));
    }
    let mut frame = "\x1b[H".to_owned();
    let mut lines = lines[..shown].iter().copied().chain(more.as_deref()).peekable();
    while let Some(line) = lines.next() {
        if lines.peek().is_none() {
            // The last one has no line's end: below the last row, that would scroll.
            frame.push_str("\x1b[J");
            frame.push_str(line);
            break;
        }
        frame.push_str(line);
        // Where a line ends in the last column, the cursor is still there: the character would be erased again.
        if screen.is_none_or(|screen| line.is_empty() || !shown_chars(line).is_multiple_of(screen.columns)) {
            frame.push_str("\x1b[K");
        }
        frame.push_str("\r\n");
    }
    frame
}

/// How many characters of a line are seen: all but those that set the colour.
fn shown_chars(line: &str) -> usize {
    let coloured = line.split("\x1b[").skip(1).map(|part| part.split_once('m').map_or(part, |(_, rest)| rest));
    let plain = line.split("\x1b[").next();
    plain.into_iter().chain(coloured).map(|part| part.chars().count()).sum()
}

struct Page {
    text: String,
    look: Look,
}

impl Page {
    fn head(&mut self, status: &Status) {
        let Status { proxy_version, discovery, containers, .. } = status;
        let live = containers.iter().filter(|container| state_of(container) == Some(ContainerState::Ready)).count();
        let (word, ink) = match (status.stopping, status.ready) {
            (true, _) => ("shutting down", Ink::Warning),
            (false, true) => ("ready", Ink::Good),
            (false, false) => ("not ready yet", Ink::Warning),
        };
        let up = age(&status.started, &status.at);
        let word = self.ink(word, ink);
        let all = containers.len();
        let _ =
            writeln!(self.text, "inference-proxy {proxy_version}: {word}, up {up}; {live} of {all} containers live");
        let seen = discovery.last_sync.as_deref().map(|sync| age(sync, &status.at));
        let (sight, ink) = match (&discovery.error, discovery.connected, seen) {
            (None, true, Some(seen)) => (format!("connected, compared {seen} ago"), Ink::Plain),
            (None, true, None) => ("connected".to_owned(), Ink::Plain),
            (None, false, _) => ("not scanned yet".to_owned(), Ink::Warning),
            (Some(error), true, _) => (format!("connected again, but not long ago: {error}"), Ink::Warning),
            (Some(error), false, Some(seen)) => {
                (format!("CANNOT SEE (last look {seen} ago; what was known stays routed): {error}"), Ink::Bad)
            }
            (Some(error), false, None) => (format!("CANNOT SEE: {error}"), Ink::Bad),
        };
        self.wrapped("", &format!("{}: {sight}", discovery.source), ink);
        if let Some(advice) = &discovery.advice {
            self.wrapped(INDENT, &format!("→ {advice}"), Ink::Strong);
        }
        for note in &discovery.notes {
            self.wrapped(INDENT, note, Ink::Warning);
        }
        self.text.push('\n');
    }

    fn containers(&mut self, status: &Status) {
        if status.containers.is_empty() {
            self.text.push_str("no container carries the label inference.enable=true\n");
            return;
        }
        let mut containers: Vec<&ContainerStatus> = status.containers.iter().collect();
        containers.sort_by_key(|container| rank(state_of(container)));
        let header =
            ["CONTAINER", "STATE", "FOR", "IN FLIGHT", "WAITING", "TTFT", "TOKENS/S", "SERVED", "FAILED", "BREAKER"];
        let rows: Vec<[String; 10]> = std::iter::once(header.map(str::to_owned))
            .chain(containers.iter().map(|container| row(container, &status.at)))
            .collect();
        let mut widths = [0; 10];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for (index, row) in rows.iter().enumerate() {
            let container = index.checked_sub(1).and_then(|i| containers.get(i));
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
                let is_number = (3..9).contains(&column);
                let padded = if is_number { format!("{cell:>width$}") } else { format!("{cell:width$}") };
                let ink = match (container, column) {
                    (None, _) => Ink::Faint,
                    (Some(container), 1) => state_ink(state_of(container)),
                    (Some(container), 8) if container.failed > 0 => Ink::Warning,
                    (Some(_), 9) if cell != "closed" && cell != "-" => Ink::Bad,
                    _ => Ink::Plain,
                };
                line.push_str(&self.ink(&padded, ink));
                line.push_str(if column == 9 { "" } else { "  " });
            }
            let _ = writeln!(self.text, "{}", line.trim_end());
            if let Some(container) = container {
                self.details(container, &status.at);
            }
        }
    }

    fn details(&mut self, container: &ContainerStatus, now: &str) {
        if let Some(reason) = &container.reason {
            self.wrapped(INDENT, reason, Ink::Warning);
        }
        if let Some(advice) = &container.advice {
            self.wrapped(INDENT, &format!("→ {advice}"), Ink::Strong);
        }
        for problem in &container.problems {
            self.wrapped(INDENT, problem, Ink::Warning);
        }
        if let Some(error) = &container.last_error
            && container.reason.as_ref() != Some(&error.text)
        {
            self.wrapped(INDENT, &format!("last error, {} ago: {}", age(&error.at, now), error.text), Ink::Faint);
        }
        let way = container.address.as_ref().map(|address| match &container.network {
            Some(network) => format!("{address} on {network}"),
            None => address.clone(),
        });
        let facts: Vec<String> = [few(&container.models)].into_iter().chain(way).filter(|t| !t.is_empty()).collect();
        if !facts.is_empty() {
            self.wrapped(INDENT, &facts.join(" · "), Ink::Faint);
        }
    }

    fn models(&mut self, status: &Status) {
        let mut missed: Vec<&ModelStatus> =
            status.models.iter().filter(|model| !model.ready || model.waiting > 0).collect();
        if missed.is_empty() {
            return;
        }
        // Somebody does miss those.
        missed.sort_by_key(|model| model.waiting == 0);
        self.text.push('\n');
        for model in missed.iter().take(MODELS_SHOWN) {
            let text = match &model.reason {
                Some(reason) => format!("model {}: nobody can serve it now: {reason}", model.id),
                None => format!("model {}: {} requests wait for a place", model.id, model.waiting),
            };
            self.wrapped("", &text, Ink::Warning);
        }
        if let more @ 1.. = missed.len().saturating_sub(MODELS_SHOWN) {
            self.wrapped(
                "",
                &format!("and {more} more models that nobody can serve now, or not at once"),
                Ink::Warning,
            );
        }
    }

    fn events(&mut self, status: &Status) {
        let shown = &status.events[status.events.len().saturating_sub(EVENTS_SHOWN)..];
        if shown.is_empty() {
            return;
        }
        let title = self.ink("LATELY", Ink::Faint);
        let _ = writeln!(self.text, "\n{title}");
        for event in shown.iter().rev() {
            let who = event.container.as_deref().map(|name| format!("{name}: ")).unwrap_or_default();
            let ink = if event.warning { Ink::Warning } else { Ink::Plain };
            self.wrapped("", &format!("{:>4} ago  {who}{}", age(&event.at, &status.at), event.text), ink);
        }
    }

    /// A text in as many lines as it takes; words that are longer than a line stay whole, as they may be commands.
    fn wrapped(&mut self, indent: &str, text: &str, ink: Ink) {
        let (first, rest) = (indent.to_owned(), format!("{indent}{INDENT}"));
        let mut lines = vec![first];
        let mut is_empty = true;
        for word in text.split(' ') {
            let line = lines.last_mut().map_or(0, |line| line.chars().count());
            if !is_empty && line + 1 + word.chars().count() > self.look.width {
                lines.push(rest.clone());
                is_empty = true;
            }
            if let Some(line) = lines.last_mut() {
                if !std::mem::replace(&mut is_empty, false) {
                    line.push(' ');
                }
                line.push_str(word);
            }
        }
        for line in lines {
            let line = self.ink(&line, ink);
            let _ = writeln!(self.text, "{line}");
        }
    }

    fn ink(&self, text: &str, ink: Ink) -> String {
        let code = match ink {
            Ink::Plain => return text.to_owned(),
            _ if !self.look.colours || text.trim().is_empty() => return text.to_owned(),
            Ink::Good => "32",
            Ink::Warning => "33",
            Ink::Bad => "1;31",
            Ink::Faint => "2",
            Ink::Strong => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// The container's state; `None` for a word that only a later version of the proxy uses.
fn state_of(container: &ContainerStatus) -> Option<ContainerState> {
    ContainerState::ALL.iter().copied().find(|state| state.word() == container.state)
}

/// Containers that are not live come first.
fn rank(state: Option<ContainerState>) -> u8 {
    match state {
        Some(ContainerState::Unhealthy) => 0,
        Some(ContainerState::Discovered) => 1,
        Some(ContainerState::Probing) => 2,
        Some(ContainerState::Draining) => 3,
        Some(ContainerState::Ready | ContainerState::Gone) | None => 4,
    }
}

fn state_ink(state: Option<ContainerState>) -> Ink {
    match state {
        Some(ContainerState::Ready) => Ink::Good,
        Some(ContainerState::Unhealthy) => Ink::Bad,
        _ => Ink::Warning,
    }
}

fn row(container: &ContainerStatus, now: &str) -> [String; 10] {
    let ContainerStatus { in_flight, max_inflight, .. } = container;
    let has_backend = container.breaker.is_some();
    let dash = |text: String| if has_backend { text } else { "-".to_owned() };
    [
        container.name.clone(),
        container.state.clone(),
        age(&container.since, now),
        dash(max_inflight.map_or_else(|| in_flight.to_string(), |most| format!("{in_flight}/{most}"))),
        dash(container.waiting.to_string()),
        container.ttft_ms.map_or_else(|| "-".to_owned(), millis),
        dash(format!("{:.1}", container.tokens_per_second)),
        dash(container.served.to_string()),
        dash(container.failed.to_string()),
        container.breaker.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}

fn millis(ms: u64) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { format!("{:.1} s", ms as f64 / 1000.0) }
}

/// How long ago `then` was, in its largest unit.
fn age(then: &str, now: &str) -> String {
    let at = |text: &str| OffsetDateTime::parse(text, &Rfc3339).ok();
    let (Some(then), Some(now)) = (at(then), at(now)) else { return "?".to_owned() };
    let seconds = (now - then).whole_seconds().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::observe::status::{DiscoveryStatus, Event, LastError, ModelStatus};

    pub(crate) fn container(name: &str, state: &str) -> ContainerStatus {
        let is_live = state == "ready";
        ContainerStatus {
            id: "0".repeat(64),
            name: name.to_owned(),
            image: "i".to_owned(),
            state: state.to_owned(),
            since: "2026-01-01T00:00:00Z".to_owned(),
            reason: (!is_live).then(|| "it has no network in common with this proxy".to_owned()),
            advice: (!is_live).then(|| format!("connect it: docker network connect inference {name}")),
            models: if is_live { vec!["a".to_owned(), "b".to_owned()] } else { Vec::new() },
            address: is_live.then(|| "172.18.0.3:8000".to_owned()),
            network: is_live.then(|| "inference".to_owned()),
            in_flight: 3,
            max_inflight: Some(8),
            weight: 1.0,
            waiting: 0,
            ttft_ms: is_live.then_some(120),
            latency_ms: None,
            tokens_per_second: 84.25,
            breaker: is_live.then(|| "closed".to_owned()),
            served: 1402,
            failed: 3,
            turned_away: 0,
            last_error: None,
            problems: Vec::new(),
        }
    }

    pub(crate) fn status(containers: Vec<ContainerStatus>) -> Status {
        Status {
            version: 1,
            proxy_version: "0".to_owned(),
            at: "2026-01-01T00:04:00Z".to_owned(),
            started: "2025-12-30T00:00:00Z".to_owned(),
            ready: true,
            stopping: false,
            discovery: DiscoveryStatus {
                source: "docker".to_owned(),
                connected: true,
                since: None,
                last_sync: Some("2026-01-01T00:03:48Z".to_owned()),
                error: None,
                advice: None,
                notes: Vec::new(),
            },
            models: vec![ModelStatus {
                id: "gone".to_owned(),
                ready: false,
                reason: Some("its container has gone".to_owned()),
                replicas: Vec::new(),
                in_flight: 0,
                waiting: 0,
            }],
            containers,
            events: vec![Event {
                serial: 1,
                at: "2026-01-01T00:00:00Z".to_owned(),
                container: Some("one".to_owned()),
                kind: "ready".to_owned(),
                warning: false,
                text: "ready".to_owned(),
            }],
        }
    }

    #[test]
    fn what_is_not_live_comes_first_with_what_to_change() {
        let mut broken = container("one", "ready");
        broken.last_error =
            Some(LastError { at: "2026-01-01T00:03:59Z".to_owned(), text: "it answered 500".to_owned() });
        let status = status(vec![broken, container("longer-name", "discovered")]);
        let text = render(&status, Look::default());
        let lines: Vec<&str> = text.lines().collect();
        let expected = [
            "inference-proxy 0: ready, up 2d; 1 of 2 containers live",
            "docker: connected, compared 12s ago",
            "",
            "CONTAINER    STATE       FOR  IN FLIGHT  WAITING    TTFT  TOKENS/S  SERVED  FAILED  BREAKER",
            "longer-name  discovered  4m           -        -       -         -       -       -  -",
            "    it has no network in common with this proxy",
            "    → connect it: docker network connect inference longer-name",
            "one          ready       4m         3/8        0  120 ms      84.2    1402       3  closed",
            "    last error, 1s ago: it answered 500",
            "    a, b · 172.18.0.3:8000 on inference",
            "",
            "model gone: nobody can serve it now: its container has gone",
            "",
            "LATELY",
            "  4m ago  one: ready",
        ];
        assert_eq!(lines, expected, "{text}");
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
    }

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        let look = |is_terminal, vars: &[(&str, &str)]| {
            let var = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            Look::of(is_terminal, None, var)
        };
        assert_eq!(look(false, &[]), Look::default());
        assert_eq!(look(true, &[("COLUMNS", "80")]), Look { width: 80, screen: None, colours: true });
        assert!(look(true, &[("NO_COLOR", ""), ("COLUMNS", "wide")]).colours);
        assert!(!look(true, &[("NO_COLOR", "1")]).colours && !look(true, &[("TERM", "dumb")]).colours);
    }

    #[test]
    fn the_terminal_says_its_size_and_columns_counts_more() {
        let look = |is_terminal, columns, said: Option<&str>| {
            let screen = Some(Screen { columns, rows: 10 });
            let look = Look::of(is_terminal, screen, |name| said.filter(|_| name == "COLUMNS").map(str::to_owned));
            assert_eq!(look.screen, screen.filter(|_| is_terminal));
            look.width
        };
        assert_eq!(look(true, 60, None), 60);
        assert_eq!(look(true, 60, Some("80")), 80);
        assert_eq!(look(true, 60, Some("wide")), 60);
        // What is narrower cannot be read, however it is wrapped.
        assert_eq!((look(true, 3, None), look(true, 9999, None)), (40, 500));
        assert_eq!(look(false, 60, None), 100);
    }

    #[test]
    fn a_frame_fits_its_screen_and_says_what_it_leaves_out() {
        let framed = |text: &str, columns, rows| frame(text, Some(Screen { columns, rows })).replace('\x1b', "^");
        assert_eq!(framed("a\n\nb\n", 10, 3), "^[Ha^[K\r\n^[K\r\n^[Jb");
        assert_eq!(framed("a\nb\nc\nd\n", 10, 3), "^[Ha^[K\r\nb^[K\r\n^[J… 2 more lines");
        assert_eq!(framed("a\nb\n", 10, 1), "^[H^[J… 2 more lines");
        // What is longer than a row takes several; colours take no room.
        assert_eq!(framed("12345\nb\nc\n", 4, 3), "^[H12345^[K\r\n^[J… 2 more lines");
        assert_eq!(framed("1\n12345\nb\n", 4, 3), "^[H1^[K\r\n^[J… 2 more lines");
        let colours = "\x1b[1;31m1234\x1b[0m\nb\n";
        assert_eq!(framed(colours, 4, 2), "^[H^[1;31m1234^[0m\r\n^[Jb");
        assert_eq!(frame("12345\nb\nc\n", None), "\x1b[H12345\x1b[K\r\nb\x1b[K\r\n\x1b[Jc");
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        let status = status(vec![container("one", "ready"), container("two", "unhealthy")]);
        let plain = render(&status, Look::default());
        let coloured = render(&status, Look { colours: true, ..Look::default() });
        assert!(!plain.contains('\x1b') && coloured.contains("\x1b[1;31munhealthy"), "{coloured}");
        let mut stripped = String::new();
        for part in coloured.split("\x1b[") {
            stripped.push_str(
                part.split_once('m')
                    .filter(|(code, _)| code.len() < 6 && !code.contains(' '))
                    .map_or(part, |(_, rest)| rest),
            );
        }
        assert_eq!(stripped.lines().map(str::trim_end).collect::<Vec<_>>(), plain.lines().collect::<Vec<_>>());
    }

    #[test]
    fn long_texts_go_on_below_and_lose_nothing() {
        let mut long = container("one", "discovered");
        let reason: Vec<String> = (0..60).map(|n| format!("word{n}")).collect();
        long.reason = Some(reason.join(" "));
        let text = render(&status(vec![long]), Look { width: 60, ..Look::default() });
        for word in reason {
            assert!(text.contains(&word), "{word}: {text}");
        }
        let long: Vec<&str> =
            text.lines().filter(|line| line.starts_with("    ") && line.chars().count() > 60).collect();
        assert!(long.is_empty(), "{long:?}");
    }

    #[test]
    fn a_thousand_models_take_a_few_lines() {
        let ids: Vec<String> = (0..1000).map(|n| format!("model-{n:03}")).collect();
        let mut container = container("one", "ready");
        container.models.clone_from(&ids);
        let mut status = status(vec![container]);
        let gone = status.models.remove(0);
        status.models = ids.into_iter().map(|id| ModelStatus { id, ..gone.clone() }).collect();
        status.models[999] = ModelStatus { ready: true, reason: None, waiting: 3, ..status.models[999].clone() };
        let text = render(&status, Look::default());
        assert!(text.contains("    model-000, model-001, model-002, model-003, model-004 and 995 more · "), "{text}");
        let told: Vec<&str> = text.lines().filter(|line| line.contains("model") && !line.starts_with(' ')).collect();
        assert_eq!(told.len(), MODELS_SHOWN + 1, "{text}");
        assert_eq!(told[0], "model model-999: 3 requests wait for a place");
        assert_eq!(told[1], "model model-000: nobody can serve it now: its container has gone");
        assert_eq!(told[MODELS_SHOWN], "and 992 more models that nobody can serve now, or not at once");
    }

    #[test]
    fn blindness_is_told_with_what_to_do() {
        let mut blind = status(Vec::new());
        blind.discovery.connected = false;
        blind.discovery.error = Some("cannot reach the Docker Engine: no such socket".to_owned());
        blind.discovery.advice = Some("mount it".to_owned());
        let text = render(&blind, Look::default());
        assert!(text.contains("CANNOT SEE (last look 12s ago; what was known stays routed)"), "{text}");
        assert!(text.contains("    → mount it\n"), "{text}");
        assert!(text.contains("no container carries the label inference.enable=true"), "{text}");
    }
}
