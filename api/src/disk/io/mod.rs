//! `ballast disk io`: commands over the disk engine, by the names, options and output of qemu-io,
//! so that test suites made for that can drive this.
//!
//! Requests go through `disk::open` and its queue, as those of a guest do; `aio_*` leaves them
//! under way and other commands go on meanwhile. What is not aligned to sectors is read, changed
//! and written back, as a block layer would do it.
//!
//! Suites pass options to every call that say what is so anyhow (`--cache writeback --aio threads`):
//! they are understood (`arguments`, `choices`), and mean what they mean there.
//!
//! Not there: VM state (`-b`), compressed writes (`-c`), breakpoints (`break` and its kin), an overlay
//! for the moment (`-s`), copying on read (`-C`), and `-U`. They are refused.

mod access;
pub mod arguments;
mod asynchronous;
mod choices;
mod options;
mod report;
mod session;
mod table;

use std::io::{BufRead, Write};
use std::process::ExitCode;

use self::arguments::Io;
use self::choices::Wrong;
use self::options::{Options, Unknown};
use self::session::Session;
use self::table::{COMMANDS, Command};
use super::DiskError;

/// Whether the shell goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    On,
    Quit,
}

/// Why a command failed.
enum Failure {
    /// This was wrong, and goes to standard output.
    Said(String),
    /// A request under way failed, which is no failure of the command that began it.
    Later(String),
    /// This goes to standard error.
    Error(String),
    /// How it is used is printed.
    Usage,
    /// There is nobody to tell.
    Output(std::io::Error),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}

/// Does the commands of the command line, or those of standard input.
pub fn run(arguments: &Io, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let session = match Session::new(arguments) {
        Ok(session) => session,
        Err(Wrong(reason)) => {
            eprintln!("qemu-io: {reason}");
            return Ok(ExitCode::FAILURE);
        }
    };
    let mut shell = Shell {
        session,
        out,
        failed: false,
    };
    if arguments.commands.is_empty() {
        shell.interact()?;
    } else {
        for line in &arguments.commands {
            if shell.line(line)? == Next::Quit {
                break;
            }
        }
    }
    shell.session.finish(shell.out)?;
    Ok(match shell.failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

struct Shell<'a> {
    session: Session,
    out: &'a mut dyn Write,
    failed: bool,
}

impl Shell<'_> {
    fn interact(&mut self) -> std::io::Result<()> {
        let mut lines = std::io::stdin().lock().lines();
        loop {
            write!(self.out, "qemu-io> ")?;
            self.out.flush()?;
            let Some(line) = lines.next() else {
                return Ok(());
            };
            if self.line(&line?)? == Next::Quit {
                return Ok(());
            }
        }
    }

    /// Does one command. Errors are told and remembered; an `Err` ends the shell.
    fn line(&mut self, line: &str) -> std::io::Result<Next> {
        let mut words = line
            .split([' ', '\t', '\n'])
            .filter(|word| !word.is_empty());
        let Some(name) = words.next() else {
            return Ok(Next::On);
        };
        let arguments: Vec<&str> = words.collect();
        let Some(command) = Command::find(name) else {
            return self.fail(
                Failure::Error(format!("command \"{name}\" not found")),
                None,
            );
        };
        if !command.without_image && !self.session.is_open() {
            let message = "no file open, try 'help open'".to_owned();
            return self.fail(Failure::Error(message), None);
        }
        if let Some(message) = command.refuses(arguments.len()) {
            return self.fail(Failure::Error(message), None);
        }
        let options = match Options::read(command.options, &arguments) {
            Ok(options) => options,
            Err(unknown) => {
                let message = match unknown {
                    Unknown::Option(letter) => format!("{name}: invalid option -- '{letter}'"),
                    Unknown::Argument(letter) => {
                        format!("{name}: option requires an argument -- '{letter}'")
                    }
                };
                self.fail(Failure::Error(message), None)?;
                return self.fail(Failure::Usage, Some(command));
            }
        };
        let result = self.perform(command, &options);
        let told = self.session.reap(self.out, false);
        match result {
            Ok(next) => told.map(|()| next),
            Err(failure) => {
                told?;
                self.fail(failure, Some(command))
            }
        }
    }

    fn perform(&mut self, command: &Command, options: &Options<'_>) -> Result<Next, Failure> {
        let (session, out) = (&mut self.session, &mut *self.out);
        match command.name {
            "read" | "readv" => session.read(options, command.name == "readv", out)?,
            "write" | "writev" => session.write(options, command.name == "writev", out)?,
            "aio_read" => session.aio_read(options, out)?,
            "aio_write" => session.aio_write(options, out)?,
            "aio_flush" => session.reap(out, true)?,
            "flush" => session.flush()?,
            "discard" => session.discard(options, out)?,
            "alloc" => session.alloc(options, out)?,
            "map" => session.map(out)?,
            "length" => session.length(out)?,
            "info" => session.info(out)?,
            "truncate" => session.truncate(options, out)?,
            "open" => session.open(options)?,
            "close" => session.close(out)?,
            "reopen" => session.reopen(options, out)?,
            "sleep" => {
                let text = options.rest.first().copied().unwrap_or("");
                let time = text.parse().map_err(|_| {
                    Failure::Said(format!("{text} is not a number of milliseconds\n"))
                })?;
                out.flush()?;
                std::thread::sleep(std::time::Duration::from_millis(time));
            }
            "sigraise" => {
                let text = options.rest.first().copied().unwrap_or("");
                out.flush()?;
                raise(text)?;
            }
            "help" => help(options, out)?,
            "quit" => return Ok(Next::Quit),
            // Every name in the table is above.
            _ => return Err(Failure::Usage),
        }
        Ok(Next::On)
    }

    fn fail(&mut self, failure: Failure, command: Option<&Command>) -> std::io::Result<Next> {
        self.failed |= !matches!(failure, Failure::Later(_));
        match failure {
            Failure::Later(text) => write!(self.out, "{text}")?,
            Failure::Said(text) => write!(self.out, "{text}")?,
            Failure::Error(text) => {
                // So that it comes after what was printed before.
                self.out.flush()?;
                eprintln!("{text}");
            }
            Failure::Usage => {
                let usage = command.map(Command::usage);
                write!(self.out, "{}", usage.unwrap_or_default())?;
            }
            Failure::Output(error) => return Err(error),
        }
        Ok(Next::On)
    }
}

fn help(options: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
    match options.rest.first() {
        Some(name) => match Command::find(name) {
            Some(command) => write!(out, "{}", command.usage())?,
            None => return Err(Failure::Said(format!("command {name} not found\n"))),
        },
        None => {
            for command in COMMANDS {
                write!(out, "{}", command.usage())?;
            }
            write!(out, "\nUse 'help commandname' for extended help.\n")?;
        }
    }
    Ok(())
}

/// Sends this process a signal, by number or name; tests of crashes want it.
fn raise(text: &str) -> Result<(), Failure> {
    use rustix::process::{Signal, getpid, kill_process};
    let signal = match text {
        "9" | "KILL" | "SIGKILL" => Signal::KILL,
        "15" | "TERM" | "SIGTERM" => Signal::TERM,
        "2" | "INT" | "SIGINT" => Signal::INT,
        _ => return Err(Failure::Said(format!("{text} is not KILL, TERM or INT\n"))),
    };
    kill_process(getpid(), signal).map_err(|e| Failure::Error(e.to_string()))
}
