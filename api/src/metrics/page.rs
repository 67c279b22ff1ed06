//! A page under construction: families of samples, each with its name, help and type.

use prometheus::TextEncoder;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// What all names begin with.
const PREFIX: &str = "ballast_";

/// The labels and the value of a sample.
pub(super) type Sample = (Vec<(&'static str, String)>, f64);

/// What a sample means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A total that only grows, until the VM or the process starts anew.
    Counter,
    /// A value as it is now.
    Gauge,
}

/// The families so far.
#[derive(Debug, Default)]
pub(super) struct Page(Vec<MetricFamily>);

impl Page {
    /// Adds a family; one without samples is left out, as the format has no place for it.
    pub(super) fn family(
        &mut self,
        name: &str,
        help: &str,
        kind: Kind,
        samples: impl IntoIterator<Item = Sample>,
    ) {
        let samples = samples.into_iter();
        let metrics: Vec<_> = samples.map(|sample| metric(kind, sample)).collect();
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(format!("{PREFIX}{name}"));
        family.set_help(help.to_owned());
        family.set_field_type(match kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
        });
        family.set_metric(metrics);
        self.0.push(family);
    }

    /// Adds a gauge of one sample.
    pub(super) fn one(
        &mut self,
        name: &str,
        help: &str,
        labels: &[(&'static str, &str)],
        value: impl Into<f64>,
    ) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).into()));
        let sample = (labels.collect(), value.into());
        self.family(name, help, Kind::Gauge, [sample]);
    }

    /// Adds a gauge of bytes or pages, where there is a value.
    pub(super) fn amount(&mut self, name: &str, help: &str, value: impl Into<Option<u64>>) {
        let sample = value.into().map(|value| (Vec::new(), value as f64));
        self.family(name, help, Kind::Gauge, sample);
    }

    /// The page as text.
    pub(super) fn text(self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.0)
    }
}

fn metric(kind: Kind, (labels, value): Sample) -> Metric {
    let labels = labels.into_iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value);
        pair
    });
    let mut metric = Metric::from_label(labels.collect());
    match kind {
        Kind::Counter => {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        }
        Kind::Gauge => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
    }
    metric
}
