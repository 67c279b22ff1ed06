//! `ballast disk …`: images that no VM uses, by the verbs, options and output of qemu-img and
//! qemu-io, over the engines of `devices::disk`.
//!
//! Thin: options are parsed, one function is called, its answer is printed. Where this is stricter
//! than qemu-img, on purpose:
//!
//! - Formats are never probed: `-f` (and `-O`, `-F`) must be given.
//! - Names in headers are followed only with `--backing-files`.
//! - What exists is never replaced, and what fails leaves nothing behind.
//!
//! There is no VM and no guest here, but the images may be anybody's: the process gives up the
//! right to gain privileges and runs under a filter of its own, which lets it work on files and
//! nothing else: no sockets, no programs, no threads (`sandbox`).

pub mod arguments;
mod check;
mod copy;
mod image;
pub mod io;
mod make;
pub mod number;
mod options;
mod print;
mod sandbox;

use std::io::Write;
use std::process::ExitCode;

use devices::config::BuildError;
use thiserror::Error;

use self::arguments::DiskCommand;

/// Why a command failed.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The image, the options or the host.
    #[error("{0}")]
    Image(#[from] BuildError),
    /// Options that do not fit one another.
    #[error("{0}")]
    Usage(String),
    /// The answer could not be written.
    #[error("writing the answer: {0}")]
    Output(#[from] std::io::Error),
}

/// Does what was asked for. The process ends afterwards.
pub fn run(command: &DiskCommand) -> ExitCode {
    if keeps_order(command)
        && let Err(error) = sandbox::hold_signals()
    {
        eprintln!("ballast disk: {error}");
        return ExitCode::FAILURE;
    }
    if let Err(error) = sandbox::enter(matches!(command, DiskCommand::Io(_))) {
        eprintln!("ballast disk: {error}");
        return ExitCode::FAILURE;
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let result = match command {
        DiskCommand::Create(create) => make::create(create, &mut out),
        DiskCommand::Info(info) => image::info(info, &mut out),
        DiskCommand::Map(map) => image::map(map, &mut out),
        DiskCommand::Convert(convert) => copy::convert(convert, &mut out),
        DiskCommand::Resize(resize) => image::resize(resize, &mut out),
        DiskCommand::Commit(commit) => copy::commit(commit, &mut out),
        DiskCommand::Compare(compare) => copy::compare(compare, &mut out),
        DiskCommand::Measure(measure) => make::measure(measure, &mut out),
        DiskCommand::Check(check) => check::check(check, &mut out),
        DiskCommand::Repair(repair) => check::repair(repair, &mut out),
        DiskCommand::Io(shell) => io::run(shell, &mut out),
    };
    let result = result.and_then(|code| {
        out.flush()?;
        Ok(code)
    });
    match result {
        Ok(code) => code,
        // Who does not read any more does not want to be told.
        Err(DiskError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::FAILURE
        }
        Err(error) => {
            let _ = out.flush();
            eprintln!("ballast disk: {error}");
            match command {
                // 1 says that they differ.
                DiskCommand::Compare(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether a signal waits until it is asked for, so that what is half made is taken away.
fn keeps_order(command: &DiskCommand) -> bool {
    match command {
        DiskCommand::Create(_) => true,
        // Others have no name until they are whole, or ask for none.
        DiskCommand::Convert(convert) => convert.asks_for_signals(),
        _ => false,
    }
}
