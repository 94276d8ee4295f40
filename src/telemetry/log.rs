//! Logs: text for people, JSON or YAML for machines, on standard error.
//!
//! Libraries that would print what passes through them (Docker's answers hold the environment of containers, HTTP heads
//! hold keys) are kept at `info` whatever the filter says.

use std::{fmt, io::IsTerminal as _};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    filter::{Targets, filter_fn},
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer, time::FormatTime as _},
    layer::{Layer as _, SubscriberExt as _},
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use crate::config::LogFormat;

/// Sends events to standard error. `filter` has been validated by the configuration; what does not parse means `info`.
pub fn init(filter: &str, format: Option<LogFormat>) {
    let targets: Targets = filter.parse().unwrap_or_else(|_| Targets::new().with_default(Level::INFO));
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match format {
        LogFormat::Text => layer.with_ansi(terminal).with_target(false).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Yaml => layer.with_ansi(false).event_format(Yaml).boxed(),
    };
    // A second call (tests start several proxies in one process) keeps the first subscriber.
    let _ =
        tracing_subscriber::registry().with(layer.with_filter(targets).with_filter(filter_fn(is_discreet))).try_init();
}

/// Whether an event cannot carry what passed through a library.
fn is_discreet(metadata: &Metadata<'_>) -> bool {
    const TALKATIVE: [&str; 5] = ["bollard", "hyper", "h2", "hyperlocal", "mio"];
    let library = metadata.target().split("::").next().unwrap_or_default();
    let library = library.split('_').next().unwrap_or_default();
    !TALKATIVE.contains(&library) || *metadata.level() <= Level::INFO
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
        io::Write,
        sync::{Arc, Mutex},
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

    fn captured(log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).event_format(Yaml);
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(filter_fn(is_discreet)));
        tracing::subscriber::with_default(subscriber, log);
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn yaml_is_one_document_per_event_with_quoted_text() {
        let text = captured(|| tracing::info!(container = "a\nb: \"c\"", attempt = 2, "backend is ready"));
        assert!(text.starts_with("---\ntimestamp: \""), "{text}");
        assert!(text.contains("container: \"a\\nb: \\\"c\\\"\"\n"), "{text}");
        assert!(text.contains("attempt: 2\n") && text.contains("message: \"backend is ready\"\n"), "{text}");
    }

    #[test]
    fn libraries_cannot_print_what_passes_through_them() {
        let text = captured(|| {
            tracing::debug!(target: "bollard::docker", "Decoded into string: HF_TOKEN=secret");
            tracing::trace!(target: "hyper_util::client", "authorization: secret");
            tracing::debug!(target: "inference_proxy::registry", "ours");
        });
        assert!(!text.contains("secret") && text.contains("ours"), "{text}");
    }
}
