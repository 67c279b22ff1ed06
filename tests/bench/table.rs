//! Samples, and the Markdown table they end in.

use std::fmt::Write as _;
use std::time::Duration;

/// Measurements of one figure.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds one, in milliseconds.
    pub fn push_ms(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1e3);
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match (sorted.get(middle), sorted.len() % 2) {
            (Some(upper), 0) => (sorted[middle - 1] + upper) / 2.0,
            (Some(only), _) => *only,
            (None, _) => f64::NAN,
        }
    }

    /// "median (least–most) unit".
    pub fn show(&self, unit: &str) -> String {
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let middle = self.median();
        // Three digits say all that such measurements know.
        let digits = match middle.abs() {
            m if m < 10.0 => 2,
            m if m < 100.0 => 1,
            _ => 0,
        };
        format!("{middle:.digits$} ({least:.digits$}–{most:.digits$}) {unit}")
    }
}

/// One line of the table.
pub struct Row {
    /// What is measured.
    pub figure: &'static str,
    /// What ballast reaches.
    pub ballast: String,
    /// What QEMU's microvm reaches, in the same session.
    pub qemu: String,
    /// Cloud Hypervisor's figure, measured on the same kind of machine at another time.
    pub cloud_hypervisor: &'static str,
    /// What is aimed at.
    pub aim: String,
    /// Whether that is reached; none for figures that are only reported.
    pub met: Option<bool>,
}

impl Row {
    /// A figure that should be at most `aim` (in `unit`).
    pub fn at_most(figure: &'static str, samples: &Samples, aim: f64, unit: &str) -> Self {
        Self {
            aim: format!("≤ {aim} {unit}"),
            met: Some(samples.median() <= aim),
            ..Self::report(figure, samples.show(unit))
        }
    }

    /// A figure without an aim.
    pub fn report(figure: &'static str, ballast: String) -> Self {
        Self {
            figure,
            ballast,
            qemu: String::new(),
            cloud_hypervisor: "",
            aim: "report".to_owned(),
            met: None,
        }
    }

    /// Beside it, Cloud Hypervisor's.
    pub fn cloud_hypervisor(self, cloud_hypervisor: &'static str) -> Self {
        Self {
            cloud_hypervisor,
            ..self
        }
    }

    /// Beside it, QEMU's.
    pub fn qemu(self, qemu: String) -> Self {
        Self { qemu, ..self }
    }
}

/// The rows as a Markdown table.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| figure | ballast | QEMU microvm, beside it | Cloud Hypervisor, for scale | aim | met |\n\
         |---|---|---|---|---|---|\n",
    );
    for row in rows {
        let or_dash = |text: &str| if text.is_empty() { "—" } else { text }.to_owned();
        let met = match row.met {
            Some(true) => "yes",
            Some(false) => "no",
            None => "—",
        };
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {met} |",
            row.figure,
            row.ballast,
            or_dash(&row.qemu),
            or_dash(row.cloud_hypervisor),
            row.aim,
        );
    }
    text
}
