//! Pressure stall information (PSI): how long tasks stood still for want of CPU, memory or I/O
//! (Documentation/accounting/psi.rst).

use std::path::Path;

use serde::Serialize;
use utoipa::ToSchema;

use super::files;

/// How much of the time tasks stood still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Stall {
    /// Percent of the last 10 seconds.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last 5 minutes.
    pub avg300: f64,
    /// Microseconds in all.
    pub total_us: u64,
}

/// The pressure on one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Pressure {
    /// At least one task stood still.
    pub some: Stall,
    /// All tasks that were not idle stood still; the kernel does not tell that of the CPUs of all
    /// the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<Stall>,
}

/// Reads /proc/pressure/RESOURCE or a cgroup's RESOURCE.pressure.
pub fn read(path: &Path) -> Result<Pressure, String> {
    let text = files::read(path)?;
    parse(&text).ok_or_else(|| format!("{}: not what it should be", path.display()))
}

/// `None` where the text has no line `some`, or one that is not what it should be.
pub fn parse(text: &str) -> Option<Pressure> {
    let line = |name| {
        text.lines()
            .find_map(|line: &str| line.strip_prefix(name)?.strip_prefix(' '))
    };
    Some(Pressure {
        some: stall(line("some")?)?,
        full: match line("full") {
            Some(line) => Some(stall(line)?),
            None => None,
        },
    })
}

fn stall(line: &str) -> Option<Stall> {
    let value = |name| {
        line.split_ascii_whitespace()
            .find_map(|word: &str| word.strip_prefix(name)?.strip_prefix('='))
    };
    let percent = |name| {
        let percent: f64 = value(name)?.parse().ok()?;
        // Not a number would be no JSON either.
        (0.0..=100.0).contains(&percent).then_some(percent)
    };
    Some(Stall {
        avg10: percent("avg10")?,
        avg60: percent("avg60")?,
        avg300: percent("avg300")?,
        total_us: value("total")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_kernels_write_is_read() {
        let memory = "some avg10=0.00 avg60=0.12 avg300=0.06 total=702570\n\
                      full avg10=0.00 avg60=0.00 avg300=1.50 total=635696\n";
        let pressure = parse(memory).unwrap();
        assert_eq!(pressure.some.avg60, 0.12);
        assert_eq!(pressure.some.total_us, 702_570);
        assert_eq!(pressure.full.unwrap().avg300, 1.5);
        // The CPU's before Linux 5.13.
        let cpu = "some avg10=99.00 avg60=100.00 avg300=0.06 total=18446744073709551615\n";
        let pressure = parse(cpu).unwrap();
        assert_eq!(pressure.full, None);
        assert_eq!(pressure.some.total_us, u64::MAX);
    }

    #[test]
    fn what_is_not_as_it_should_be_is_no_reading() {
        for text in [
            "",
            "full avg10=0.00 avg60=0.00 avg300=0.06 total=1\n",
            "some avg10=0.00 avg60=0.00 total=1\n",
            "some avg10=NaN avg60=0.00 avg300=0.06 total=1\n",
            "some avg10=inf avg60=0.00 avg300=0.06 total=1\n",
            "some avg10=-1 avg60=0.00 avg300=0.06 total=1\n",
            "some avg10=0 avg60=0.00 avg300=0.06 total=-1\n",
            "some avg10=0 avg60=0 avg300=0 total=1\nfull avg10=x avg60=0 avg300=0 total=1\n",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text in any::<String>()) {
            let _ = parse(&text);
            let _ = parse(&format!("some avg10={text} avg60={text} avg300=0 total={text}"));
        }
    }
}
