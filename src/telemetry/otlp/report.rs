//! Metrics in OTLP's form: the same families and series as in Prometheus' text, cumulative since the proxy's start.

use std::time::SystemTime;

use opentelemetry_proto::tonic::{
    collector::metrics::v1::ExportMetricsServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram as HistogramData, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
    },
    resource::v1::Resource,
};

use super::SCOPE;
use crate::telemetry::{
    exposition::{Labels, Report, Value},
    families::{Family, Kind, Naming, OtlpName},
    metrics::{Distribution, Histogram, UNKNOWN_MODEL},
    operation::Operation,
};

/// A snapshot of all metrics.
#[derive(Debug)]
pub struct OtlpReport {
    start_nanos: u64,
    now_nanos: u64,
    family: Option<&'static Family>,
    /// One for each name of the family that is being told; finished ones before them.
    metrics: Vec<Metric>,
}

impl OtlpReport {
    /// An empty one.
    pub fn new(start: SystemTime, now: SystemTime) -> OtlpReport {
        OtlpReport { start_nanos: nanos(start), now_nanos: nanos(now), family: None, metrics: Vec::new() }
    }

    /// The message for a collector.
    pub fn finish(self, resource: Resource) -> ExportMetricsServiceRequest {
        // A family without series says nothing.
        let has_series = |metric: &Metric| match &metric.data {
            Some(Data::Gauge(data)) => !data.data_points.is_empty(),
            Some(Data::Sum(data)) => !data.data_points.is_empty(),
            Some(Data::Histogram(data)) => !data.data_points.is_empty(),
            _ => false,
        };
        let scope = InstrumentationScope {
            name: SCOPE.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let metrics = self.metrics.into_iter().filter(has_series).collect();
        ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: Some(resource),
                scope_metrics: vec![ScopeMetrics { scope: Some(scope), metrics, schema_url: String::new() }],
                schema_url: String::new(),
            }],
        }
    }

    /// Calls `add` with every name of the present family and its metric.
    fn each(&mut self, mut add: impl FnMut(&OtlpName, &mut Data)) {
        let names = self.family.map_or(&[][..], |family| family.otlp);
        let first = self.metrics.len() - names.len();
        for (name, metric) in names.iter().zip(&mut self.metrics[first..]) {
            if let Some(data) = &mut metric.data {
                add(name, data);
            }
        }
    }
}

impl Report for OtlpReport {
    fn family(&mut self, family: &'static Family) {
        self.family = Some(family);
        let temporality = AggregationTemporality::Cumulative as i32;
        for OtlpName { name, unit, .. } in family.otlp {
            let data = match family.kind {
                Kind::Counter => {
                    Data::Sum(Sum { aggregation_temporality: temporality, is_monotonic: true, ..Sum::default() })
                }
                Kind::Gauge => Data::Gauge(Gauge::default()),
                Kind::Histogram => {
                    Data::Histogram(HistogramData { aggregation_temporality: temporality, ..HistogramData::default() })
                }
            };
            self.metrics.push(Metric {
                name: (*name).to_owned(),
                description: family.help.to_owned(),
                unit: (*unit).to_owned(),
                data: Some(data),
                ..Metric::default()
            });
        }
    }

    fn sample(&mut self, labels: &Labels<'_>, value: Value) {
        let (start, now) = (self.start_nanos, self.now_nanos);
        let value = match value {
            Value::Int(value) => number_data_point::Value::AsInt(i64::try_from(value).unwrap_or(i64::MAX)),
            Value::Float(value) => number_data_point::Value::AsDouble(value),
        };
        self.each(|name, data| {
            let mut point = NumberDataPoint {
                attributes: attributes(name, labels),
                time_unix_nano: now,
                value: Some(value),
                ..NumberDataPoint::default()
            };
            match data {
                Data::Sum(sum) => {
                    point.start_time_unix_nano = start;
                    sum.data_points.push(point);
                }
                Data::Gauge(gauge) => gauge.data_points.push(point),
                _ => debug_assert!(false, "{} is no number", name.name),
            }
        });
    }

    fn histogram(&mut self, labels: &Labels<'_>, histogram: &Histogram) {
        let (start, now) = (self.start_nanos, self.now_nanos);
        let Distribution { bounds, counts, sum } = histogram.distribution();
        self.each(|name, data| {
            let Data::Histogram(histogram) = data else {
                debug_assert!(false, "{} is no histogram", name.name);
                return;
            };
            let point = HistogramDataPoint {
                attributes: attributes(name, labels),
                start_time_unix_nano: start,
                time_unix_nano: now,
                count: counts.iter().sum(),
                sum: Some(sum),
                bucket_counts: counts.clone(),
                explicit_bounds: bounds.to_vec(),
                ..HistogramDataPoint::default()
            };
            match name.naming {
                Naming::Own => histogram.data_points.push(point),
                Naming::Conventions => add_histogram(&mut histogram.data_points, point),
            }
        });
    }
}

fn attributes(name: &OtlpName, labels: &Labels<'_>) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(labels.len() + 1);
    for (label, text) in labels {
        match name.naming {
            Naming::Own => attributes.push(text_attribute(label, text.to_string())),
            Naming::Conventions => push_conventional(&mut attributes, label, text.to_string()),
        }
    }
    attributes
}

/// What OpenTelemetry's conventions say for this label.
fn push_conventional(attributes: &mut Vec<KeyValue>, label: &str, text: String) {
    let attribute = match label {
        // No attribute says that there is nothing to say.
        _ if text.is_empty() => return,
        "model" if text == UNKNOWN_MODEL => return,
        "model" => text_attribute("gen_ai.request.model", text),
        "type" => text_attribute("gen_ai.token.type", text),
        "operation" => {
            let operation = Operation::of_word(&text).unwrap_or(Operation::Other);
            attributes.push(text_attribute("gen_ai.operation.name", operation.gen_ai_name().to_owned()));
            text_attribute("gen_ai.provider.name", operation.provider().to_owned())
        }
        "method" => text_attribute("http.request.method", text),
        "route" => text_attribute("http.route", text),
        "scheme" => text_attribute("url.scheme", text),
        "error" => text_attribute("error.type", text),
        "status" => match text.parse() {
            Ok(status) => attribute("http.response.status_code", any_value::Value::IntValue(status)),
            Err(_) => text_attribute("http.response.status_code", text),
        },
        label => text_attribute(label, text),
    };
    attributes.push(attribute);
}

/// Adds a series of a histogram, to one with the same attributes if there is one: the conventions have one name for what
/// are several operations here. Such series follow closely on each other.
fn add_histogram(points: &mut Vec<HistogramDataPoint>, point: HistogramDataPoint) {
    const NEAR: usize = 2 * Operation::ALL.len();
    let same = points.iter_mut().rev().take(NEAR).find(|other| other.attributes == point.attributes);
    let Some(same) = same else { return points.push(point) };
    same.count += point.count;
    same.sum = Some(same.sum.unwrap_or_default() + point.sum.unwrap_or_default());
    for (count, more) in same.bucket_counts.iter_mut().zip(point.bucket_counts) {
        *count += more;
    }
}

pub(super) fn text_attribute(key: &str, value: String) -> KeyValue {
    attribute(key, any_value::Value::StringValue(value))
}

fn attribute(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn nanos(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::metrics::SECONDS;

    const fn name(name: &'static str, naming: Naming) -> OtlpName {
        OtlpName { name, unit: "s", naming }
    }

    static LASTED: Family = Family {
        name: "lasted_seconds",
        kind: Kind::Histogram,
        help: "h",
        labels: &[],
        otlp: &[name("lasted", Naming::Own), name("http.lasted", Naming::Conventions)],
    };
    static NUMBER: Family =
        Family { name: "number", kind: Kind::Counter, help: "", labels: &[], otlp: &[name("n", Naming::Own)] };
    static SILENT: Family =
        Family { name: "silent", kind: Kind::Gauge, help: "", labels: &[], otlp: &[name("silent", Naming::Own)] };

    #[test]
    fn every_name_of_a_family_gets_its_series() {
        let start = SystemTime::UNIX_EPOCH;
        let mut report = OtlpReport::new(start, start + Duration::from_secs(1));
        let histogram = Histogram::new(&SECONDS);
        histogram.observe(Duration::from_millis(700));
        report.family(&LASTED);
        for operation in ["chat", "tokenize", "responses"] {
            report.histogram(&[("model", &"m"), ("operation", &operation)], &histogram);
        }
        report.family(&SILENT);
        report.family(&NUMBER);
        report.sample(&[("status", &200)], 3_u64.into());
        let mut message = report.finish(Resource::default());
        let metrics = message.resource_metrics.remove(0).scope_metrics.remove(0).metrics;
        let names: Vec<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
        assert_eq!(names, ["lasted", "http.lasted", "n"]);
        let [Some(Data::Histogram(own)), Some(Data::Histogram(convention)), Some(Data::Sum(number))] =
            [&metrics[0].data, &metrics[1].data, &metrics[2].data]
        else {
            panic!("{metrics:?}");
        };
        let keys = |point: &HistogramDataPoint| -> Vec<String> {
            point.attributes.iter().map(|attribute| attribute.key.clone()).collect()
        };
        assert_eq!(keys(&own.data_points[0]), ["model", "operation"]);
        let of_convention = ["gen_ai.request.model", "gen_ai.operation.name", "gen_ai.provider.name"];
        assert_eq!(keys(&convention.data_points[0]), of_convention);
        // The conventions call two of them the same, and a series is told once.
        let counts = |points: &[HistogramDataPoint]| points.iter().map(|point| point.count).collect::<Vec<_>>();
        assert_eq!((counts(&own.data_points), counts(&convention.data_points)), (vec![1, 1, 1], vec![2, 1]));
        assert_eq!(convention.data_points[0].sum, Some(1.4));
        assert_eq!(convention.data_points[0].bucket_counts.iter().sum::<u64>(), 2);
        let point = &own.data_points[0];
        assert_eq!((point.count, point.sum), (1, Some(0.7)));
        assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
        assert_eq!((point.bucket_counts[7], point.explicit_bounds[7]), (1, 1.0));
        assert!(number.is_monotonic);
        assert_eq!(number.data_points[0].value, Some(number_data_point::Value::AsInt(3)));
    }
}
