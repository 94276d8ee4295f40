//! How metrics are told: to whom ([`Report`]), and as Prometheus' text ([`Exposition`]).

use std::fmt::{self, Display, Write as _};

use super::{
    families::Family,
    metrics::{Distribution, Histogram},
};

/// Labels of one series.
pub type Labels<'l> = [(&'static str, &'l dyn Display)];

/// A value that was read from an instrument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(u64),
    /// Any number.
    Float(f64),
}

/// Where metrics are told: a family is begun, and then its series are given.
pub trait Report {
    /// Begins a metric; its series follow.
    fn family(&mut self, family: &'static Family);
    /// One series of a counter or a gauge.
    fn sample(&mut self, labels: &Labels<'_>, value: Value);
    /// One series of a histogram.
    fn histogram(&mut self, labels: &Labels<'_>, histogram: &Histogram);
}

/// Writes the Prometheus text format, version 0.0.4
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>). Units are told as OpenMetrics does;
/// to readers of 0.0.4 that is a comment.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
    family: Option<&'static Family>,
}

// === impl Value ===

impl From<u64> for Value {
    fn from(value: u64) -> Value {
        Value::Int(value)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Value {
        Value::Int(value as u64)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Value {
        Value::Float(value)
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Int(value) => value.fmt(f),
            Value::Float(value) => value.fmt(f),
        }
    }
}

// === impl Exposition ===

impl Report for Exposition {
    fn family(&mut self, family: &'static Family) {
        let Family { name, kind, help, .. } = family;
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str());
        if let Some(unit) = family.unit() {
            let _ = writeln!(self.text, "# UNIT {name} {unit}");
        }
        self.family = Some(family);
    }

    fn sample(&mut self, labels: &Labels<'_>, value: Value) {
        self.line("", labels, None, value);
    }

    fn histogram(&mut self, labels: &Labels<'_>, histogram: &Histogram) {
        let Distribution { bounds, counts, sum } = histogram.distribution();
        let mut count = 0;
        for (i, in_bucket) in counts.iter().enumerate() {
            count += in_bucket;
            let bound: &dyn Display = bounds.get(i).map_or(&"+Inf", |b| b);
            self.line("_bucket", labels, Some(bound), count.into());
        }
        self.line("_sum", labels, None, sum.into());
        self.line("_count", labels, None, count.into());
    }
}

impl Exposition {
    fn line(&mut self, suffix: &str, labels: &Labels<'_>, bound: Option<&dyn Display>, value: Value) {
        let Some(family) = self.family else { return };
        debug_assert!(
            labels.iter().map(|(label, _)| label).eq(family.labels),
            "{} has other labels: {:?}",
            family.name,
            family.labels
        );
        let _ = write!(self.text, "{}{suffix}", family.name);
        let mut opening = '{';
        for (label, text) in labels.iter().copied().chain(bound.map(|bound| ("le", bound))) {
            let _ = write!(self.text, "{opening}{label}=\"");
            opening = ',';
            for c in text.to_string().chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        let _ = writeln!(self.text, "{} {value}", if opening == '{' { "" } else { "}" });
    }

    /// The finished text.
    pub fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::{families::Kind, metrics::SECONDS};

    static D: Family =
        Family { name: "d_seconds", kind: Kind::Histogram, labels: &["model"], help: "How long.", otlp: &[] };

    #[test]
    fn a_family_says_what_it_is_and_its_buckets_are_cumulative_with_inclusive_bounds() {
        let histogram = Histogram::new(&SECONDS);
        for ms in [1, 5, 6, 2_000_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut text = Exposition::default();
        text.family(&D);
        text.histogram(&[("model", &"m")], &histogram);
        let text = text.finish();
        let begin = "# HELP d_seconds How long.\n# TYPE d_seconds histogram\n# UNIT d_seconds seconds\n";
        assert!(text.starts_with(begin), "{text}");
        assert!(text.contains("d_seconds_bucket{model=\"m\",le=\"0.005\"} 2\n"), "{text}");
        assert!(text.contains("d_seconds_bucket{model=\"m\",le=\"0.01\"} 3\n"), "{text}");
        assert!(text.contains("d_seconds_bucket{model=\"m\",le=\"+Inf\"} 4\n"), "{text}");
        assert!(text.ends_with("d_seconds_sum{model=\"m\"} 2000.012\nd_seconds_count{model=\"m\"} 4\n"), "{text}");
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = Exposition { family: Some(&D), ..Exposition::default() };
        text.sample(&[("model", &"a\"b\\c\nd")], 1_u64.into());
        assert_eq!(text.finish(), "d_seconds{model=\"a\\\"b\\\\c\\nd\"} 1\n");
    }
}
