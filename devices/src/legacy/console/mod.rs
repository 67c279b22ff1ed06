//! Where a character device's bytes go on the host, and where its input comes from.
//!
//! ```text
//!  vCPU ── push ──► ring ──► console thread ──► file, terminal, pty, socket
//!  UART ◄─ offer ── backlog ◄────┘
//! ```
//!
//! A [`ConsoleBackend`] is made once, when the VM is created, and outlives every boot of it; each
//! boot attaches a new device. vCPU threads only push bytes into a bounded ring, a thread of the
//! backend's own does all I/O.
//!
//! | mode | output that nobody takes | input |
//! |---|---|---|
//! | `Off`, `Null` | thrown away | none |
//! | `File` | the newest 256 KiB are kept while the disk is slow | none |
//! | `Tty` | the newest 256 KiB are kept while the terminal is stopped | standard input |
//! | `Pty` | the newest 64 KiB are kept | the pseudo-terminal |
//! | `Socket` | the newest 64 KiB are kept, and greet the next client | the client |
//!
//! A file is truncated at the first byte the guest writes. A socket has one client at a time, the
//! last one to come.

mod host;
mod shared;
#[cfg(test)]
mod tests;
mod thread;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::host::{Host, Leftovers};
pub(crate) use self::shared::{InputPort, Shared};
use self::thread::Console;
use super::{ConsoleConfig, ConsoleMode, DebugConsoleConfig};
use crate::allow;
use crate::config::{BuildContext, BuildError, Invalid};
use crate::sandbox::{self, Allow, Filter, Test};
use crate::worker::Worker;

/// What the console thread needs beside the common lists.
const ANY_MODE: &[Allow] = &[
    // Debug builds of the standard library look whether a descriptor is open before closing it.
    allow!(fcntl, 1 => Test::Is(libc::F_GETFD as u32)),
    allow!(timerfd_settime),
];
const FILE: &[Allow] = &[allow!(ftruncate)];
const TTY: &[Allow] = &[allow!(sendto)];
const SOCKET: &[Allow] = &[
    allow!(accept4),
    allow!(fcntl, 1 => Test::Is(libc::F_DUPFD_CLOEXEC as u32)),
    allow!(sendto),
];

/// What [`ConsoleBackend::open`] and dropping a backend need of the thread that does it, beside
/// [`sandbox::COMMON`], [`sandbox::WORKER`] and what spawning any thread needs; it covers what the
/// console thread itself is allowed.
pub const OPEN: &[Allow] = &[
    allow!(accept4),
    allow!(bind),
    allow!(connect),
    allow!(epoll_create1),
    allow!(epoll_ctl),
    allow!(eventfd2),
    allow!(fchmod),
    allow!(fcntl, 1 => Test::Is(libc::F_DUPFD_CLOEXEC as u32)),
    allow!(fcntl, 1 => Test::Is(libc::F_GETFD as u32)),
    allow!(fstat),
    allow!(ftruncate),
    allow!(getpgrp),
    allow!(ioctl, 1 => Test::Is(libc::TCGETS as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TCGETS2 as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TCSETS as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TCSETS2 as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TIOCGPGRP as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TIOCGPTN as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TIOCGPTPEER as u32)),
    allow!(ioctl, 1 => Test::Is(libc::TIOCSPTLCK as u32)),
    allow!(listen),
    allow!(newfstatat),
    allow!(openat),
    allow!(sendto),
    allow!(socket, 0 => Test::Is(libc::AF_UNIX as u32)),
    allow!(statx),
    allow!(timerfd_create),
    allow!(timerfd_settime),
    allow!(unlink),
    allow!(unlinkat),
];

/// The kinds of thread there are, one per mode that has any, with the lists of their filters.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    [
        ("console-file", FILE),
        ("console-tty", TTY),
        ("console-pty", &[][..]),
        ("console-socket", SOCKET),
    ]
    .map(|(kind, list)| (kind, vec![sandbox::COMMON, sandbox::WORKER, ANY_MODE, list]))
    .into()
}

/// The host's side of a character device; dropped when the VM is deleted.
///
/// Dropping it writes out what can be written without waiting, gives the terminal its mode back
/// and removes the socket's path, and a file that was made for it and stayed empty.
pub struct ConsoleBackend {
    shared: Arc<Shared>,
    mode: ConsoleMode,
    pty_path: Option<PathBuf>,
    thread: Option<Worker>,
    leftovers: Leftovers,
}

impl Drop for ConsoleBackend {
    fn drop(&mut self) {
        // The thread ends before what it uses is undone.
        self.thread = None;
        if self.shared.written()
            && let Some(file) = self.leftovers.file.take()
        {
            file.keep();
        }
    }
}

impl ConsoleBackend {
    /// Opens what the configuration of a serial port says, and starts its thread,
    /// `serial-manager`. Called on the VMM thread.
    ///
    /// What does not fit the host is [`BuildError::Invalid`] with the field's name, and leaves
    /// nothing behind.
    pub fn open(config: &ConsoleConfig, context: BuildContext) -> Result<Self, BuildError> {
        let (file, socket) = (config.file.as_deref(), config.socket.as_deref());
        let host = open_host(config.mode, file, socket, true)?;
        Self::start(config.mode, host, "serial-manager", context)
    }

    /// Opens what the configuration of the debug port says: output only. Called on the VMM
    /// thread.
    pub fn open_debug(
        config: &DebugConsoleConfig,
        context: BuildContext,
    ) -> Result<Self, BuildError> {
        let host = open_host(config.mode, config.file.as_deref(), None, false)?;
        Self::start(config.mode, host, "debug-console", context)
    }

    fn start(
        mode: ConsoleMode,
        mut host: Host,
        thread: &str,
        context: BuildContext,
    ) -> Result<Self, BuildError> {
        let fail = |error: std::io::Error| BuildError::host("starting a console thread", error);
        let (bound, list) = match mode {
            ConsoleMode::Off | ConsoleMode::Null => (0, None),
            ConsoleMode::File => (256 << 10, Some(FILE)),
            ConsoleMode::Tty => (256 << 10, Some(TTY)),
            ConsoleMode::Pty => (64 << 10, Some(&[][..])),
            ConsoleMode::Socket => (64 << 10, Some(SOCKET)),
        };
        let shared = Arc::new(Shared::new(bound).map_err(fail)?);
        let worker = match list {
            None => None,
            Some(list) => {
                let lists = [sandbox::COMMON, sandbox::WORKER, ANY_MODE, list];
                let filter = Filter::compile(thread, context.seccomp, &lists)
                    .map_err(|e| fail(std::io::Error::other(e)))?;
                let console = Console::new(
                    shared.clone(),
                    context.reporter.clone(),
                    host.reader.take(),
                    host.writer.take(),
                    host.listener.take(),
                )
                .map_err(fail)?;
                let worker =
                    Worker::spawn(thread, filter, context.reporter, console).map_err(fail)?;
                // The first look, at files that are readable without ever saying so.
                shared.wake();
                Some(worker)
            }
        };
        Ok(Self {
            shared,
            mode,
            pty_path: host.pty_path,
            thread: worker,
            leftovers: host.leftovers,
        })
    }

    /// The mode it was opened in; with `Off` there is to be no device.
    pub fn mode(&self) -> ConsoleMode {
        self.mode
    }

    /// In mode `Pty`: the pseudo-terminal's path, for the configuration that `vm.info` shows.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty_path.as_deref()
    }

    /// Bytes of output that were lost so far because nobody took them.
    pub fn dropped_bytes(&self) -> u64 {
        self.shared.dropped()
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }
}

fn open_host(
    mode: ConsoleMode,
    file: Option<&Path>,
    socket: Option<&Path>,
    input: bool,
) -> Result<Host, BuildError> {
    let missing = |field| BuildError::from(Invalid::new(field, "the mode needs one"));
    match mode {
        ConsoleMode::Off | ConsoleMode::Null => Ok(Host::default()),
        ConsoleMode::File => host::file(file.ok_or_else(|| missing("file"))?),
        ConsoleMode::Socket => host::socket(socket.ok_or_else(|| missing("socket"))?),
        ConsoleMode::Pty => host::pty(),
        ConsoleMode::Tty => {
            let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
            host::terminal(input.then_some(stdin.as_fd()), stdout.as_fd())
        }
    }
}
