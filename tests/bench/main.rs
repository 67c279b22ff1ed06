//! Takes the figures that `scripts/bench` shows.
//!
//! `figures host|guest --ballast BINARY [--guest-dir DIR] [--qemu PROGRAM] [--runs N]` prints a
//! Markdown table. Medians of ten runs, with the least and the most of them in parentheses. MB are
//! 10⁶ bytes.

use std::path::PathBuf;
use std::process::ExitCode;

mod client;
mod guest;
mod host;
mod process;
mod table;

/// Whatever went wrong: it ends the run.
type Failure = Box<dyn std::error::Error>;

/// 10⁶ bytes.
const MB: f64 = 1e6;

fn fail<T>(text: impl Into<String>) -> Result<T, Failure> {
    Err(text.into().into())
}

/// What is measured, and with what.
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

fn run() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let mut options = Options {
        ballast: PathBuf::new(),
        guest_dir: PathBuf::new(),
        qemu: None,
        runs: 10,
    };
    while let Some(name) = arguments.next() {
        let Some(value) = arguments.next() else {
            return fail(format!("{name} needs a value"));
        };
        match name.as_str() {
            "--ballast" => options.ballast = value.into(),
            "--guest-dir" => options.guest_dir = value.into(),
            "--qemu" => options.qemu = Some(value.into()),
            "--runs" => options.runs = value.parse()?,
            _ => return fail(format!("unknown option {name}")),
        }
    }
    if options.ballast.as_os_str().is_empty() {
        return fail("--ballast BINARY is needed: the figures are the release binary's");
    }
    let rows = match what.as_str() {
        "host" => host::measure(&options)?,
        "guest" => guest::measure(&options)?,
        // `cargo bench` alone ends here: the figures need the release binary and a guest.
        _ => return fail("say `host` or `guest`; scripts/bench does"),
    };
    print!("{}", table::markdown(&rows));
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
