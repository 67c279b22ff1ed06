//! Takes the figures that `scripts/bench` shows, and prints them as a Markdown table:
//! `figures host|guest|inflate|density --ballast BINARY [--guest-dir DIR] [--qemu PROGRAM] [--runs N]`.
//!
//! Each is the median of ten runs, with the least and the most in parentheses. MB are 10⁶ bytes.

use std::path::PathBuf;

mod density;
mod guest;
mod host;
mod inflate;
mod memory;
mod table;

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
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().expect("an option needs a value");
        match name.as_str() {
            "--ballast" => options.ballast = value.into(),
            "--guest-dir" => options.guest_dir = value.into(),
            "--qemu" => options.qemu = Some(value.into()),
            "--runs" => options.runs = value.parse().expect("a number of runs"),
            _ => panic!("unknown option {name}"),
        }
    }
    let rows = match what.as_str() {
        "host" => host::measure(&options),
        "guest" => guest::measure(&options),
        "inflate" => inflate::measure(&options),
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
