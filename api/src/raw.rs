//! The things for which there is no safe interface: descriptors that are inherited by number,
//! waiting for a signal, and having tokio watch a file of any kind.

#![expect(
    unsafe_code,
    reason = "taking over an inherited descriptor, sigwaitinfo(2), sigtimedwait(2), and AsyncFd::register"
)]

use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes over the descriptor `fd`, which the process inherited, and keeps it from its children.
///
/// Called once for each number, at the start, before anything else is opened: a number that is
/// open then was inherited.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "standard input, output and error can't be taken over",
        ));
    }
    // SAFETY: the borrow lasts for this call only, and whether the descriptor is open is just what
    // the call finds out.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nothing in this process owns it yet, as the caller promises.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A set of signals that are blocked, to be waited for instead of handled.
#[derive(Clone, Copy)]
pub struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    /// Blocks `signals` in the calling thread and in all that it spawns from now on.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the set it is given, and fails only for a bad address.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in signals {
            // SAFETY: the set is initialized.
            if unsafe { libc::sigaddset(&raw mut set, *signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the set is initialized; the old mask is not asked for.
        let error =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if error == 0 {
            Ok(Self(set))
        } else {
            Err(io::Error::from_raw_os_error(error))
        }
    }

    /// Whether one of the signals has come; takes it. Does not wait.
    pub fn is_pending(&self) -> bool {
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: set and time are initialized; details about the signal are not asked for.
        let signal =
            unsafe { libc::sigtimedwait(&raw const self.0, std::ptr::null_mut(), &raw const now) };
        signal > 0
    }

    /// Waits for one of the signals and takes it; one `rt_sigtimedwait` system call.
    pub fn wait(&self) -> io::Result<i32> {
        loop {
            // SAFETY: the set is initialized; details about the signal are not asked for.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.0, std::ptr::null_mut()) };
            if signal > 0 {
                return Ok(signal);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// A non-blocking file (FIFO, socket, terminal, …) that can be waited for.
///
/// The [`AsyncFd`] is not shown to anyone: who could take the file out of it while it is watched
/// would break the promise made to it.
pub struct WatchedFile(AsyncFd<File>);

impl WatchedFile {
    /// Has tokio watch `file`; gives it back where that can't be done (EPERM: a regular file).
    /// Called inside the runtime.
    pub fn new(file: File) -> Result<Self, (File, io::Error)> {
        // SAFETY: a File is open for as long as it lives and its descriptor never changes; the
        // AsyncFd owns it, and nothing here replaces it.
        let registered = unsafe { AsyncFd::register_with_interest(file, Interest::WRITABLE) };
        registered
            .map(Self)
            .map_err(tokio::io::unix::AsyncFdRegisterError::into_parts)
    }

    /// Waits until the file takes some of `bytes`; says how many.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .async_io(Interest::WRITABLE, |mut file| file.write(bytes))
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn a_number_that_is_not_open_is_not_taken_over() {
        assert!(adopt(-1).is_err());
        assert!(adopt(2).is_err());
        assert_eq!(
            adopt(1_000_000).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
    }

    #[test]
    fn a_descriptor_that_is_taken_over_is_kept_from_children() {
        let number = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty())
            .unwrap()
            .into_raw_fd();
        let owned = adopt(number).unwrap();
        assert_eq!(owned.as_raw_fd(), number);
        let flags = rustix::io::fcntl_getfd(&owned).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn a_blocked_signal_is_waited_for() {
        let signals = BlockedSignals::block(&[libc::SIGUSR1]).unwrap();
        assert!(!signals.is_pending());
        // SAFETY: the signal goes to this thread, which has blocked it.
        unsafe { libc::raise(libc::SIGUSR1) };
        assert!(signals.is_pending() && !signals.is_pending());
        // SAFETY: the signal goes to this thread, which has blocked it.
        unsafe { libc::raise(libc::SIGUSR1) };
        assert_eq!(signals.wait().unwrap(), libc::SIGUSR1);
    }
}
