//! The host's side of a console: opening files, terminals, pseudo-terminals and sockets, and
//! leaving each as it was found.
//!
//! All of this runs on the thread that creates the VM; the console thread opens nothing but the
//! connections it accepts.

use std::fs::Metadata;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, OutputModes, Termios};

use crate::config::{BuildError, Invalid};

/// Where output goes.
pub(super) struct Writer {
    pub fd: OwnedFd,
    pub how: How,
}

/// How to write without ever blocking the thread for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// A regular file: just write.
    File {
        /// Cut it to nothing before the first byte.
        truncate: bool,
    },
    /// A non-blocking descriptor: write until EAGAIN.
    NonBlocking,
    /// A descriptor shared with others, which must stay blocking: write little, and only when
    /// told that there is room.
    Careful,
    /// A socket: send with MSG_DONTWAIT.
    Socket,
}

/// An opened console.
#[derive(Default)]
pub(super) struct Host {
    pub reader: Option<OwnedFd>,
    pub writer: Option<Writer>,
    /// Clients come from here; then there is no reader or writer to begin with.
    pub listener: Option<OwnedFd>,
    pub pty_path: Option<PathBuf>,
    pub leftovers: Leftovers,
}

/// What must be undone on the host when the console goes; dropping it does so.
#[derive(Default)]
#[expect(dead_code, reason = "some are held only to be dropped")]
pub(super) struct Leftovers {
    /// Keeps our pseudo-terminal from hanging up while no client has it open.
    pub pty_client_side: Option<OwnedFd>,
    pub raw_terminal: Option<RawTerminal>,
    pub socket: Option<MadePath>,
    /// A file that was made for us; it goes unless something was written to it.
    pub file: Option<MadePath>,
}

/// A terminal in raw mode; `Drop` gives it its old mode back.
pub(super) struct RawTerminal {
    terminal: OwnedFd,
    saved: Termios,
}

impl RawTerminal {
    /// Puts `terminal` into raw mode; `None` when it is no terminal, or somebody else's turn.
    fn new(terminal: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let Ok(saved) = rustix::termios::tcgetattr(terminal) else {
            return Ok(None);
        };
        // Of a background job's terminal the shell is the master (and SIGTTOU its whip).
        if let Ok(foreground) = rustix::termios::tcgetpgrp(terminal)
            && foreground != rustix::process::getpgrp()
        {
            return Ok(None);
        }
        let mut raw = saved.clone();
        raw.make_raw();
        // Our own log shares the screen: without OPOST its lines would run down it like stairs.
        raw.output_modes |= OutputModes::OPOST;
        // Who gives the mode back must exist before it is changed: whatever fails from here on,
        // its drop does so.
        let this = Self {
            terminal: duplicate(terminal)?,
            saved,
        };
        rustix::termios::tcsetattr(&this.terminal, OptionalActions::Now, &raw)?;
        Ok(Some(this))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        use vmm_sys_util::signal::{block_signal, unblock_signal};
        // From a background job this would stop the process, unless the signal is blocked.
        let blocked = block_signal(libc::SIGTTOU).is_ok();
        // Fails when the terminal is gone, and then nobody minds.
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.saved);
        if blocked {
            let _ = unblock_signal(libc::SIGTTOU);
        }
    }
}

/// A path made by us; `Drop` removes it unless something else has taken its place.
pub(super) struct MadePath {
    path: PathBuf,
    identity: (u64, u64),
}

impl MadePath {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(&path.symlink_metadata()?),
        })
    }

    /// Leaves the path where it is.
    pub fn keep(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for MadePath {
    fn drop(&mut self) {
        if let Ok(found) = self.path.symlink_metadata()
            && identity(&found) == self.identity
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Opens a file to write to. It is truncated when the first byte comes, not now: a VM that is
/// refused or never booted costs nobody an old log.
pub(super) fn file(path: &Path) -> Result<Host, BuildError> {
    let invalid = |reason: String| {
        BuildError::from(Invalid::new(
            "file",
            format!("{}: {reason}", path.display()),
        ))
    };
    // Non-blocking, so that a FIFO or a serial port can't hold us up.
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let (fd, made) = match openat(CWD, path, flags, mode) {
        Err(Errno::NOENT) => {
            let fd = openat(CWD, path, flags | OFlags::CREATE | OFlags::EXCL, mode)
                .map_err(|e| BuildError::cannot_open("file", path, e))?;
            (fd, MadePath::new(path).ok())
        }
        Err(Errno::NXIO) => return Err(invalid("is a FIFO or a socket, not a file".into())),
        other => (
            other.map_err(|e| BuildError::cannot_open("file", path, e))?,
            None,
        ),
    };
    let file = std::fs::File::from(fd);
    let kind = file
        .metadata()
        .map_err(|e| invalid(e.to_string()))?
        .file_type();
    let how = if kind.is_file() {
        How::File { truncate: true }
    } else if kind.is_char_device() {
        How::NonBlocking
    } else {
        return Err(invalid(
            "is neither a regular file nor a character device".into(),
        ));
    };
    Ok(Host {
        writer: Some(Writer {
            fd: file.into(),
            how,
        }),
        leftovers: Leftovers {
            file: made,
            ..Leftovers::default()
        },
        ..Host::default()
    })
}

/// Makes a pseudo-terminal in raw mode.
pub(super) fn pty() -> Result<Host, BuildError> {
    let fail = |error: Errno| BuildError::host("making a pseudo-terminal", error);
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let controller = openat(CWD, "/dev/ptmx", flags, Mode::empty()).map_err(fail)?;
    rustix::pty::grantpt(&controller).map_err(fail)?;
    rustix::pty::unlockpt(&controller).map_err(fail)?;
    let name = rustix::pty::ptsname(&controller, Vec::new()).map_err(fail)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let client_side = rustix::pty::ioctl_tiocgptpeer(&controller, flags).map_err(fail)?;
    let mut termios = rustix::termios::tcgetattr(&client_side).map_err(fail)?;
    termios.make_raw();
    rustix::termios::tcsetattr(&client_side, OptionalActions::Now, &termios).map_err(fail)?;
    let reader = rustix::io::fcntl_dupfd_cloexec(&controller, 3).map_err(fail)?;
    Ok(Host {
        reader: Some(reader),
        writer: Some(Writer {
            fd: controller,
            how: How::NonBlocking,
        }),
        pty_path: Some(PathBuf::from(std::ffi::OsString::from_vec(
            name.into_bytes(),
        ))),
        leftovers: Leftovers {
            pty_client_side: Some(client_side),
            ..Leftovers::default()
        },
        ..Host::default()
    })
}

/// Takes a terminal (or pipe, or file) pair: `output` to write to, `input`, if any, to read from.
pub(super) fn terminal(
    input: Option<BorrowedFd<'_>>,
    output: BorrowedFd<'_>,
) -> Result<Host, BuildError> {
    let fail = |error: io::Error| BuildError::host("taking over the standard streams", error);
    let mut host = Host {
        writer: Some(own_writer(output).map_err(fail)?),
        ..Host::default()
    };
    if let Some(input) = input {
        let nonblocking = OFlags::RDONLY | OFlags::NONBLOCK;
        let reader = match kind_of(input).map_err(fail)? {
            Kind::Stream => reopen(input, nonblocking).or_else(|_| duplicate(input)),
            Kind::Socket | Kind::File => duplicate(input),
        };
        host.reader = Some(reader.map_err(fail)?);
        host.leftovers.raw_terminal = RawTerminal::new(input).map_err(fail)?;
    }
    Ok(host)
}

enum Kind {
    Stream,
    Socket,
    File,
}

fn kind_of(fd: BorrowedFd<'_>) -> io::Result<Kind> {
    use rustix::fs::FileType;
    Ok(
        match FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
            FileType::Socket => Kind::Socket,
            FileType::Fifo | FileType::CharacterDevice => Kind::Stream,
            _ => Kind::File,
        },
    )
}

/// A writer to somebody else's descriptor whose flags must stay as they are: O_NONBLOCK belongs
/// to the open file, which the shell that started us shares.
fn own_writer(output: BorrowedFd<'_>) -> io::Result<Writer> {
    Ok(match kind_of(output)? {
        Kind::File => Writer {
            fd: duplicate(output)?,
            how: How::File { truncate: false },
        },
        Kind::Socket => Writer {
            fd: duplicate(output)?,
            how: How::Socket,
        },
        Kind::Stream => match reopen(output, OFlags::WRONLY | OFlags::NONBLOCK) {
            Ok(fd) => Writer {
                fd,
                how: How::NonBlocking,
            },
            Err(_) => Writer {
                fd: duplicate(output)?,
                how: How::Careful,
            },
        },
    })
}

/// A new open file of our own, on the same terminal or pipe.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = flags | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

/// Listens on a Unix stream socket of mode 0600. A socket nobody listens on is replaced; anything
/// else at `path` is in the way.
pub(super) fn socket(path: &Path) -> Result<Host, BuildError> {
    let invalid = |reason: &str| {
        BuildError::from(Invalid::new(
            "socket",
            format!("{}: {reason}", path.display()),
        ))
    };
    let address = SocketAddrUnix::new(path).map_err(|_| invalid("the path is too long"))?;
    if let Ok(found) = path.symlink_metadata() {
        if !found.file_type().is_socket() {
            return Err(invalid("exists, and is not a socket"));
        }
        let stale = is_stale(&address).map_err(|e| BuildError::host("making a socket", e))?;
        if !stale {
            return Err(invalid("somebody listens there already"));
        }
        std::fs::remove_file(path).map_err(|e| invalid(&e.to_string()))?;
    }
    let fail = |error: Errno| invalid(&error.to_string());
    let listener = stream_socket().map_err(|e| BuildError::host("making a socket", e))?;
    // Before the bind, which gives the path this mode: nobody can be quicker.
    rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR).map_err(fail)?;
    rustix::net::bind(&listener, &address).map_err(fail)?;
    let made = MadePath::new(path).map_err(|e| invalid(&e.to_string()))?;
    rustix::net::listen(&listener, 4).map_err(fail)?;
    Ok(Host {
        listener: Some(listener),
        leftovers: Leftovers {
            socket: Some(made),
            ..Leftovers::default()
        },
        ..Host::default()
    })
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn is_stale(address: &SocketAddrUnix) -> rustix::io::Result<bool> {
    let probe = stream_socket()?;
    let answer = rustix::net::connect(&probe, address);
    Ok(answer == Err(Errno::CONNREFUSED))
}
