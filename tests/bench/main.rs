//! Takes the figures that `scripts/bench` shows, and prints them as a Markdown table:
//! `figures host|guest|inflate|thin|density --ballast BINARY [--guest-dir DIR] [--qemu PROGRAM] [--runs N]`,
//! and for density `[--case NAME] [--first N] [--period SECONDS] [--interval MS] [--traces DIR]`.
//!
//! Each is the median of ten runs, with the least and the most in parentheses. MB are 10⁶ bytes.

use std::path::PathBuf;

mod density;
mod guest;
mod host;
mod inflate;
mod memory;
mod table;
mod thin;

#[path = "../support/mod.rs"]
mod support;

/// 10⁶ bytes.
const MB: f64 = 1e6;

/// With what to measure.
struct Options {
    ballast: PathBuf,
    guest_dir: PathBuf,
    qemu: Option<PathBuf>,
    runs: usize,
    /// The one case to try; all of them otherwise.
    case: Option<String>,
    /// How many guests are started before anything is looked at.
    first: usize,
    /// Seconds from one burst of a guest to its next.
    period: u64,
    /// Milliseconds between two looks of a governor.
    interval_ms: u32,
    /// Where traces of the governor are to be left.
    traces: Option<PathBuf>,
}

impl Options {
    fn guest_file(&self, name: &str) -> PathBuf {
        self.guest_dir.join(name)
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let mut options = Options {
        ballast: PathBuf::new(),
        guest_dir: PathBuf::new(),
        qemu: None,
        runs: 10,
        case: None,
        first: 16,
        period: 120,
        interval_ms: 1000,
        traces: None,
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().expect("an option needs a value");
        match name.as_str() {
            "--ballast" => options.ballast = value.into(),
            "--guest-dir" => options.guest_dir = value.into(),
            "--qemu" => options.qemu = Some(value.into()),
            "--runs" => options.runs = value.parse().expect("a number of runs"),
            "--case" => options.case = Some(value),
            "--first" => options.first = value.parse().expect("a number of guests"),
            "--period" => options.period = value.parse().expect("seconds"),
            "--interval" => options.interval_ms = value.parse().expect("milliseconds"),
            "--traces" => options.traces = Some(value.into()),
            _ => panic!("unknown option {name}"),
        }
    }
    let rows = match what.as_str() {
        "host" => host::measure(&options),
        "guest" => guest::measure(&options),
        "inflate" => inflate::measure(&options),
        "thin" => thin::measure(&options),
        "density" => {
            density::measure(&options);
            return;
        }
        // `cargo bench` ends here: the release binary and a guest are needed too.
        _ => {
            eprintln!("scripts/bench takes the figures");
            return;
        }
    };
    print!("{}", table::markdown(&rows));
}
