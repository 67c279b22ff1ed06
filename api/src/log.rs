//! The log, and the last words of a panic.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;

/// Starts logging to `path` (appended to) or to standard error. Warnings by default, more with
/// each step of `verbosity`. Timestamps are UTC.
pub fn init(path: Option<&Path>, verbosity: u8) -> io::Result<()> {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt().with_max_level(level);
    match path {
        Some(path) => {
            let file = open(path)?;
            log.with_ansi(false).with_writer(Mutex::new(file)).init();
        }
        None => {
            let colours = io::stderr().is_terminal();
            log.with_ansi(colours).with_writer(io::stderr).init();
        }
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Has a panic leave one line on standard error, naming the thread and the place. The default hook
/// may open files to make a backtrace, which a sandboxed thread can't. The process aborts next.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let place = panic
            .location()
            .map_or_else(|| "unknown place".to_owned(), ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        let line = format!("ballast: thread `{name}` panicked at {place}: {message}\n");
        // Nothing is left to be done when even this fails.
        let _ = io::stderr().write_all(line.as_bytes());
    }));
}
