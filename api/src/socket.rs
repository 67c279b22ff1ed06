//! The listening socket: made under a lock, removed when dropped.
//!
//! ```text
//!  PATH.lock ── flock ──► who holds it may replace a stale PATH, and removes both at its end
//! ```
//! A socket file outlives its process when that is killed, and can't be told from a live one by
//! looking; so whoever makes or replaces it holds the lock, and a socket that answers is left
//! alone in any case.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open, stat, unlink};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use thiserror::Error;

use crate::cli::Target;
use crate::raw;

/// Why the API can't be served there.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process serves there.
    #[error("{}: another process listens on this socket", .0.display())]
    InUse(PathBuf),
    /// Something else is at the path; it is not touched.
    #[error("{}: is there already and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The inherited descriptor is not fit.
    #[error("fd={number}: {reason}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What is wrong with it.
        reason: String,
    },
    /// The host failed us.
    #[error("{}: {doing}: {source}", path.display())]
    Host {
        /// Where.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// The API's listening socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    files: Option<Files>,
}

/// What is removed at the end.
#[derive(Debug)]
struct Files {
    socket: PathBuf,
    lock: PathBuf,
    /// The inode that was bound; another one at the same path is not ours.
    inode: u64,
    /// Held for as long as the process lives.
    _lock: File,
}

impl ApiSocket {
    /// Listens at a path, or takes over a socket that listens already. Called at the start, while
    /// there is only one thread (the umask belongs to the whole process).
    pub fn open(target: &Target) -> Result<Self, SocketError> {
        match target {
            Target::Path(path) => Self::bind(path),
            Target::Descriptor(number) => Self::adopt(*number),
        }
    }

    /// The listener, for the server; does not block.
    pub fn listener(&self) -> io::Result<UnixListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    fn adopt(number: i32) -> Result<Self, SocketError> {
        let unfit = |reason: String| SocketError::Descriptor { number, reason };
        let socket = raw::adopt(number).map_err(|e| unfit(e.to_string()))?;
        let is_unix = sockopt::socket_domain(&socket).map_err(|e| unfit(e.to_string()))?
            == AddressFamily::UNIX;
        let listens = sockopt::socket_acceptconn(&socket).unwrap_or(false);
        if !is_unix || !listens {
            return Err(unfit("is not a listening Unix socket".to_owned()));
        }
        Ok(Self {
            listener: socket.into(),
            files: None,
        })
    }

    fn bind(path: &Path) -> Result<Self, SocketError> {
        let fail = |doing: &'static str| {
            move |source: io::Error| SocketError::Host {
                path: path.to_owned(),
                doing,
                source,
            }
        };
        let (lock_path, lock) = take_lock(path)?;
        make_room(path)?;
        // 0700 from the first moment on: nobody else can connect in between.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o077));
        let bound = UnixListener::bind(path);
        rustix::process::umask(umask);
        let listener = bound.map_err(fail("listening"))?;
        let inode = std::fs::symlink_metadata(path)
            .map_err(fail("looking at the socket"))?
            .ino();
        Ok(Self {
            listener,
            files: Some(Files {
                socket: path.to_owned(),
                lock: lock_path,
                inode,
                _lock: lock,
            }),
        })
    }
}

impl Drop for ApiSocket {
    /// Removes the socket and its lock, if the process made them.
    fn drop(&mut self) {
        let Some(files) = &self.files else { return };
        let ours = stat(&files.socket).is_ok_and(|stat| stat.st_ino == files.inode);
        if ours && let Err(error) = unlink(&files.socket) {
            tracing::warn!(%error, path = %files.socket.display(), "the socket stays behind");
        }
        // Still under the lock, so nobody can have taken it in between; who has opened the file
        // already finds out that it is not the one at the path any more.
        let _ = unlink(&files.lock);
    }
}

/// Takes the lock of the socket at `path`.
fn take_lock(path: &Path) -> Result<(PathBuf, File), SocketError> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let fail = |doing: &'static str, error: Errno| SocketError::Host {
        path: lock_path.clone(),
        doing,
        source: error.into(),
    };
    // Who ends removes the file; another round is needed only when that happens just now.
    for _ in 0..100 {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock: OwnedFd = open(&lock_path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| fail("opening the lock", e))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(SocketError::InUse(path.to_owned())),
            Err(error) => return Err(fail("locking", error)),
        }
        let held = rustix::fs::fstat(&lock).map_err(|e| fail("looking at the lock", e))?;
        let same = stat(&lock_path)
            .is_ok_and(|found| (found.st_ino, found.st_dev) == (held.st_ino, held.st_dev));
        if same {
            return Ok((lock_path, lock.into()));
        }
    }
    Err(SocketError::InUse(path.to_owned()))
}

/// Removes a stale socket; called under the lock.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let fail = |doing: &'static str, source: io::Error| SocketError::Host {
        path: path.to_owned(),
        doing,
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail("looking at what is there", error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    // Who does not know of the lock may serve there all the same.
    let address = SocketAddrUnix::new(path).map_err(|e| fail("using the path", e.into()))?;
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|e| fail("making a socket", e.into()))?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => {}
        // A full backlog is somebody's too; a datagram socket is in use by something else.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(SocketError::InUse(path.to_owned()));
        }
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(fail("trying the socket", error.into())),
    }
    tracing::info!(path = %path.display(), "a stale socket is replaced");
    unlink(path).map_err(|e| fail("removing the stale socket", e.into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn directory() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        (directory, path)
    }

    fn names(directory: &tempfile::TempDir) -> usize {
        std::fs::read_dir(directory.path()).unwrap().count()
    }

    #[test]
    fn the_socket_is_for_its_owner_only_and_leaves_nothing_behind() {
        let (directory, path) = directory();
        let socket = ApiSocket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert_eq!(names(&directory), 0);
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let (_directory, path) = directory();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = ApiSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_left_alone_with_or_without_its_lock() {
        let (_directory, path) = directory();
        let first = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(_))));
        drop(first);
        let foreign = UnixListener::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(_))));
        UnixStream::connect(&path).unwrap();
        drop(foreign);
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_left_alone() {
        let (_directory, path) = directory();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            ApiSocket::bind(&path),
            Err(SocketError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_somebody_else_has_put_there_is_not_removed() {
        let (_directory, path) = directory();
        let socket = ApiSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(socket);
        UnixStream::connect(&path).unwrap();
        drop(other);
    }

    #[test]
    fn a_path_that_is_too_long_is_refused() {
        let (directory, _) = directory();
        let path = directory.path().join("x".repeat(120));
        assert!(matches!(
            ApiSocket::bind(&path),
            Err(SocketError::Host { .. })
        ));
    }

    #[test]
    fn a_descriptor_must_be_a_unix_socket_that_listens() {
        use std::os::fd::IntoRawFd;
        let (_directory, path) = directory();
        let listening = UnixListener::bind(&path).unwrap().into_raw_fd();
        ApiSocket::adopt(listening).unwrap();
        let (one, _other) = UnixStream::pair().unwrap();
        for unfit in [
            one.into_raw_fd(),
            File::open("/dev/null").unwrap().into_raw_fd(),
        ] {
            assert!(matches!(
                ApiSocket::adopt(unfit),
                Err(SocketError::Descriptor { .. })
            ));
        }
    }
}
