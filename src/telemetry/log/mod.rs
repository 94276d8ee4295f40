//! Logs: text for people, JSON or YAML for machines, on standard error.
//!
//! Libraries would print what passes through them (Docker's answers hold the environment of containers, HTTP heads hold
//! keys): whatever the filter says, only this crate is heard below `info`.
//!
//! A warning that says the same of the same container again and again is let through three times, and then once a minute,
//! with the number of those that were left out meanwhile (`left_out`).
//!
//! A thread that logs never waits for the reader of the log: lines go through a bounded queue to one thread that writes them, so nothing
//! may print to standard error beside it once [`init`] has begun.

mod lines;
mod repeats;
mod writer;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fmt,
    io::{self, IsTerminal as _},
    panic,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    filter::{FilterExt as _, Targets, filter_fn},
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{JsonFields, Writer},
        time::FormatTime as _,
    },
    layer::{Layer as _, SubscriberExt as _},
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use self::{
    repeats::Repeats,
    writer::{Dropped, Queue},
};
use crate::base::config::LogFormat;

/// How long the last lines get to be written. The end of the program waits no longer for a log that is not read.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// There is one standard error, so there is one queue to it.
static QUEUE: Queue = Queue::new();

/// A line as tracing writes it: whole, at once.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends events to standard error. `filter` has been validated by the configuration; what does not parse means `info`.
///
/// # Errors
/// The thread that writes cannot be had.
pub fn init(filter: &str, format: Option<LogFormat>) -> io::Result<()> {
    let targets: Targets = filter.parse().unwrap_or_else(|_| Targets::new().with_default(Level::INFO));
    let terminal = io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let layer = tracing_subscriber::fmt::layer().with_writer(|| Line);
    let calm = |format| Calm { format, repeats: Mutex::default(), clock: Instant::now };
    let layer = match format {
        LogFormat::Text => {
            let event = tracing_subscriber::fmt::format().with_target(false);
            layer.with_ansi(terminal).event_format(calm(format).around(event)).boxed()
        }
        LogFormat::Json => {
            let event = tracing_subscriber::fmt::format().json().flatten_event(true);
            layer.fmt_fields(JsonFields::new()).event_format(calm(format).around(event)).boxed()
        }
        LogFormat::Yaml => layer.with_ansi(false).event_format(calm(format).around(Yaml)).boxed(),
    };
    // One filter and not two on top of each other: where two disagree about an event, they are asked again each time it comes.
    let subscriber = tracing_subscriber::registry().with(layer.with_filter(targets.and(filter_fn(is_discreet))));
    // A second call (tests start several proxies in one process) keeps the first subscriber, and its writer.
    if subscriber.try_init().is_ok() {
        thread::Builder::new().name("log".to_owned()).spawn(|| QUEUE.write_to(io::stderr(), tell_dropped))?;
    }
    Ok(())
}

fn tell_dropped(Dropped { lately, in_all }: Dropped) {
    // The sum makes each of these lines another one: none is left out as a repetition.
    tracing::warn!(dropped = lately, dropped_total = in_all, "lines of this log were dropped, as nobody took them");
}

/// Says this as it is, in its place among the lines, whatever the filter.
pub fn say(text: &str) {
    QUEUE.push_urgent(format!("{text}\n").as_bytes());
}

/// Waits until all that was logged has been written, for at most a second.
pub fn flush() {
    QUEUE.flush(FLUSH_TIMEOUT);
}

/// How many lines were not written, because the log was not read or could not be written.
pub fn dropped() -> u64 {
    QUEUE.dropped()
}

/// Panics say what they say by default, in their place among the lines. They are waited for: the next thing may be the end
/// of the process.
pub fn report_panics() {
    panic::set_hook(Box::new(|panic| {
        let (thread, backtrace) = (thread::current(), Backtrace::capture());
        say(&format!("\nthread '{}' {panic}", thread.name().unwrap_or("<unnamed>")));
        if backtrace.status() == BacktraceStatus::Captured {
            say(&format!("stack backtrace:\n{backtrace}"));
        }
        flush();
    }));
}

/// Whether an event cannot carry what passed through a library.
fn is_discreet(metadata: &Metadata<'_>) -> bool {
    const OWN: &str = env!("CARGO_CRATE_NAME");
    metadata.target().split("::").next() == Some(OWN) || *metadata.level() <= Level::INFO
}

/// Leaves out warnings that say the same again and again.
struct Calm {
    format: LogFormat,
    repeats: Mutex<Repeats>,
    clock: fn() -> Instant,
}

/// A format with repeated warnings left out.
struct Calmed<F> {
    calm: Calm,
    event: F,
}

impl Calm {
    fn around<F>(self, event: F) -> Calmed<F> {
        Calmed { calm: self, event }
    }

    /// How many of its kind were left out since the last one, if this one is to be written.
    fn admit(&self, event: &Event<'_>) -> Option<u64> {
        if *event.metadata().level() > Level::WARN {
            return Some(0);
        }
        let key = repeats::key(event);
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.repeats.lock().unwrap_or_else(PoisonError::into_inner).admit(key, (self.clock)())
    }
}

impl<S, N, F> FormatEvent<S, N> for Calmed<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        match self.calm.admit(event) {
            None => Ok(()),
            Some(0) => self.event.format_event(context, writer, event),
            Some(left_out) => {
                let mut line = String::new();
                self.event.format_event(context, Writer::new(&mut line), event)?;
                let line = line.trim_end_matches('\n');
                match self.calm.format {
                    LogFormat::Text => writeln!(writer, "{line} left_out={left_out}"),
                    LogFormat::Json => writeln!(writer, "{},\"left_out\":{left_out}}}", line.trim_end_matches('}')),
                    LogFormat::Yaml => writeln!(writer, "{line}\nleft_out: {left_out}"),
                }
            }
        }
    }
}

/// One YAML document per event: `---`, then one `key: "value"` a line.
struct Yaml;

impl<S, N> FormatEvent<S, N> for Yaml
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        write!(writer, "---\ntimestamp: \"")?;
        tracing_subscriber::fmt::time::SystemTime.format_time(&mut writer)?;
        writeln!(writer, "\"\nlevel: {}\ntarget: {:?}", metadata.level(), metadata.target())?;
        let mut fields = YamlFields { writer: &mut writer, result: Ok(()) };
        event.record(&mut fields);
        fields.result
    }
}

struct YamlFields<'w, 'f> {
    writer: &'w mut Writer<'f>,
    result: fmt::Result,
}

impl Visit for YamlFields<'_, '_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        // A JSON string is a valid YAML double-quoted scalar.
        let quoted = serde_json::Value::from(value);
        self.result = self.result.and_then(|()| writeln!(self.writer, "{}: {quoted}", field.name()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.result = self.result.and_then(|()| writeln!(self.writer, "{}: {value}", field.name()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.result = self.result.and_then(|()| writeln!(self.writer, "{}: {value}", field.name()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        match value.is_finite() {
            true => self.result = self.result.and_then(|()| writeln!(self.writer, "{}: {value}", field.name())),
            false => self.record_str(field, &value.to_string()),
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.result = self.result.and_then(|()| writeln!(self.writer, "{}: {value}", field.name()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        cell::Cell,
        io::Write,
        sync::{Arc, Mutex},
        time::Duration,
    };

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    thread_local! {
        static BEGAN: Instant = Instant::now();
        static MINUTES: Cell<u64> = const { Cell::new(0) };
    }

    /// A clock that goes when it is told to.
    fn clock() -> Instant {
        BEGAN.with(|began| *began + Duration::from_secs(60 * MINUTES.get()))
    }

    /// What is written in this format while `log` runs.
    fn captured(format: LogFormat, filter: fn(&Metadata<'_>) -> bool, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let calm = Calm { format, repeats: Mutex::default(), clock };
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let layer = match format {
            LogFormat::Text => layer
                .with_ansi(false)
                .event_format(calm.around(tracing_subscriber::fmt::format().with_target(false)))
                .boxed(),
            LogFormat::Json => layer
                .fmt_fields(JsonFields::new())
                .event_format(calm.around(tracing_subscriber::fmt::format().json().flatten_event(true)))
                .boxed(),
            LogFormat::Yaml => layer.event_format(calm.around(Yaml)).boxed(),
        };
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(filter_fn(filter)));
        tracing::subscriber::with_default(subscriber, log);
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn yaml_is_one_document_per_event_with_quoted_text() {
        let text = captured(LogFormat::Yaml, is_discreet, || {
            tracing::info!(container = "a\nb: \"c\"", attempt = 2, seconds = 0.5, "backend is ready");
        });
        assert!(text.starts_with("---\ntimestamp: \""), "{text}");
        assert!(text.contains("container: \"a\\nb: \\\"c\\\"\"\n"), "{text}");
        assert!(text.contains("attempt: 2\nseconds: 0.5\n"), "{text}");
        assert!(text.contains("message: \"backend is ready\"\n"), "{text}");
    }

    #[test]
    fn json_is_one_object_per_event_whatever_is_in_it() {
        let text = captured(LogFormat::Json, is_discreet, || {
            for container in ["a\nb: \"c\"", "\u{1b}[31m", "}"] {
                for _ in 0..9 {
                    tracing::warn!(container, models = ?["x\"y"], seconds = 0.5, "{container}");
                }
            }
        });
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 9, "three of each: {text}");
        assert_eq!((&lines[0]["container"], &lines[0]["level"]), (&"a\nb: \"c\"".into(), &"WARN".into()));
        assert_eq!(lines[8]["message"], "}");
    }

    #[test]
    fn what_was_left_out_is_told_in_every_format() {
        for format in [LogFormat::Text, LogFormat::Json, LogFormat::Yaml] {
            let text = captured(format, is_discreet, || {
                for n in 0..1000 {
                    // As if hours passed between.
                    MINUTES.set(if n < 10 { 0 } else { n });
                    tracing::warn!(container = "{a}", request_id = n, trace_id = n, "answer cut");
                }
            });
            let told = text.lines().find(|line| line.contains("left_out")).unwrap_or_else(|| panic!("{text}"));
            match format {
                LogFormat::Text => assert!(told.ends_with("left_out=7"), "{told}"),
                LogFormat::Json => {
                    let line: serde_json::Value = serde_json::from_str(told).unwrap();
                    assert_eq!((&line["left_out"], &line["container"]), (&7.into(), &"{a}".into()));
                }
                LogFormat::Yaml => assert_eq!(told, "left_out: 7"),
            }
            assert_eq!(text.matches("left_out").count(), 1);
        }
    }

    #[test]
    fn libraries_cannot_print_what_passes_through_them() {
        let log = || {
            tracing::debug!(target: "bollard::docker", "Decoded into string: HF_TOKEN=secret");
            tracing::trace!(target: "hyper_util::client", "authorization: secret");
            tracing::trace!(target: "some_new_library", "secret");
            tracing::debug!("ours");
            tracing::info!(target: "some_new_library", "theirs");
        };
        let text = captured(LogFormat::Text, is_discreet, log);
        assert!(!text.contains("secret") && text.contains("ours") && text.contains("theirs"), "{text}");
    }
}
