//! Locks on image files, so that two writers never share one.
//!
//! Open-file-description locks in the byte ranges that QEMU uses (its `block/file-posix.c`), so
//! that we and QEMU's tools respect one another. A *permission* has a bit:
//!
//! ```text
//!   byte 100 + bit   read-locked by everyone who uses the permission
//!   byte 200 + bit   read-locked by everyone who does not let others use it
//!   bits             0 consistent read, 1 write, 2 write unchanged, 3 resize
//! ```
//!
//! One takes one's own locks first and then looks for those of others that contradict them: of two
//! that come at the same time both may fail, never both succeed. All are read locks, so an image
//! that is open for reading only can be locked too.
//!
//! A reader becomes the writer through another opening of the file ([`ImageLock::beside_own_reader`]), and a
//! reader again, without a moment in which somebody else could become one: of an opening's own locks
//! and another's the kernel knows only that they are not the same, so the reader lets go of what
//! excludes writers while the new opening has it already.
//!
//! ```text
//!   reader's opening   not shared ───────┐ let go              taken again ┌───── not shared
//!   writer's opening       not shared, in use ── looks for others ── … ────┴─┘ let go
//! ```
//!
//! With [`LockGranularity::Full`] the whole file is locked, for writing or reading. That covers
//! QEMU's bytes, so QEMU's tools then can't even read the image.
#![expect(unsafe_code, reason = "rustix has no OFD locks on byte ranges")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

/// How much of the image file the lock covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum LockGranularity {
    /// The bytes that QEMU locks too, so that qemu-img and ballast respect one another.
    #[default]
    ByteRange,
    /// The whole file.
    Full,
}

const USED: i64 = 100;
const NOT_SHARED: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a writer does.
const WRITER: [i64; 3] = [CONSISTENT_READ, WRITE, RESIZE];
/// What a reader and a writer do not let others do.
const DENIED: [i64; 2] = [WRITE, RESIZE];

/// Why an image could not be locked.
#[derive(Debug, Error)]
pub enum LockError {
    /// Somebody else has a lock that contradicts ours.
    #[error("another process {0}")]
    Held(&'static str),
    /// The file system has no such locks.
    #[error("the file system does not support locks on open files ({0})")]
    Unsupported(io::Error),
    /// Something else went wrong.
    #[error(transparent)]
    Host(io::Error),
}

/// The locks on one open image; released when dropped.
///
/// Released explicitly and not by closing the file: an io_uring that is being torn down by the
/// kernel keeps the file open a little longer than we do.
pub struct ImageLock {
    file: Arc<File>,
    /// The reader that lets this writer write for as long as there is one.
    reader: Option<Weak<ImageLock>>,
}

impl ImageLock {
    /// Locks `file`, as a writer or as one of any number of readers.
    pub fn take(
        file: Arc<File>,
        writer: bool,
        granularity: LockGranularity,
    ) -> Result<Self, LockError> {
        // From here on, dropping this releases whatever was taken.
        let lock = Self::nothing(file);
        match granularity {
            LockGranularity::ByteRange => lock.take_bytes(writer)?,
            LockGranularity::Full => lock.take_all(writer)?,
        }
        Ok(lock)
    }

    /// Locks `file` as a reader although this process has it locked as its writer, through another
    /// opening: once that lets go the image is locked as one that is only read, and at no moment in
    /// between is it free for another writer.
    pub fn beside_own(file: Arc<File>) -> Result<Self, LockError> {
        let lock = Self::nothing(file);
        lock.use_for(&[CONSISTENT_READ])?;
        lock.deny()?;
        Ok(lock)
    }

    /// Locks `file` as its writer although this process has it locked, byte by byte, as the reader
    /// `reader`, through another opening. Refused where anybody else has it open, and then `reader`
    /// is what it was; so it is when this is dropped. At no moment is the image free for another
    /// writer.
    pub fn beside_own_reader(file: Arc<File>, reader: &Arc<Self>) -> Result<Self, LockError> {
        let mut lock = Self::nothing(file);
        lock.use_for(&WRITER)?;
        lock.deny()?;
        // From here on, dropping this has the reader deny again what it denied.
        lock.reader = Some(Arc::downgrade(reader));
        for bit in DENIED {
            reader.set(libc::F_UNLCK, NOT_SHARED + bit, 1)?;
        }
        lock.look_for_others(&WRITER)?;
        Ok(lock)
    }

    /// No locks: for another opening of a file that this process has locked.
    pub fn nothing(file: Arc<File>) -> Self {
        Self { file, reader: None }
    }

    fn take_bytes(&self, writer: bool) -> Result<(), LockError> {
        let used: &[i64] = if writer { &WRITER } else { &[CONSISTENT_READ] };
        self.use_for(used)?;
        self.deny()?;
        self.look_for_others(used)
    }

    fn use_for(&self, bits: &[i64]) -> Result<(), LockError> {
        let mut bits = bits.iter();
        bits.try_for_each(|bit| self.set(libc::F_RDLCK, USED + bit, 1))
    }

    fn deny(&self) -> Result<(), LockError> {
        let mut bits = DENIED.iter();
        bits.try_for_each(|bit| self.set(libc::F_RDLCK, NOT_SHARED + bit, 1))
    }

    fn look_for_others(&self, used: &[i64]) -> Result<(), LockError> {
        for &bit in used {
            if self.conflicting(NOT_SHARED + bit)?.is_some() {
                return Err(LockError::Held(match bit {
                    CONSISTENT_READ => "has the image to itself",
                    _ => "has the image open and does not share it with a writer",
                }));
            }
        }
        for bit in DENIED {
            if self.conflicting(USED + bit)?.is_some() {
                return Err(LockError::Held("has the image open for writing"));
            }
        }
        Ok(())
    }

    fn take_all(&self, writer: bool) -> Result<(), LockError> {
        if writer {
            return self.set(libc::F_WRLCK, 0, 0);
        }
        self.set(libc::F_RDLCK, 0, 0)?;
        // A writer that locks bytes holds read locks too, so it has to be looked for; a lock to the
        // end of the file (length 0) is another reader's like ours. Whoever comes after us finds
        // our lock on the bytes it looks at.
        for bit in DENIED {
            match self.conflicting(USED + bit)? {
                Some(other) if other.l_len != 0 => {
                    return Err(LockError::Held("has the image open for writing"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn set(&self, kind: i32, start: i64, len: i64) -> Result<(), LockError> {
        match self.fcntl(libc::F_OFD_SETLK, kind, start, len) {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => LockError::Held("has locked the image"),
                Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
                    LockError::Unsupported(error)
                }
                _ => LockError::Host(error),
            }),
        }
    }

    /// A lock of somebody else on this byte.
    fn conflicting(&self, byte: i64) -> Result<Option<libc::flock>, LockError> {
        let found = self
            .fcntl(libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)
            .map_err(LockError::Host)?;
        Ok((i32::from(found.l_type) != libc::F_UNLCK).then_some(found))
    }

    fn fcntl(&self, command: i32, kind: i32, start: i64, len: i64) -> io::Result<libc::flock> {
        let mut lock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: start,
            l_len: len,
            l_pid: 0,
        };
        // SAFETY: these commands read and write one `flock`, which lives until the call returns.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), command, &raw mut lock) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(lock)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take().and_then(|reader| reader.upgrade())
            && reader.deny().is_err()
        {
            // The kernel has no memory for it. Then nobody is to write to what the reader reads:
            // these locks stay for as long as the process lives.
            std::mem::forget(self.file.clone());
            return;
        }
        // Where this fails there is no lock to release; closing the file does it anyway.
        let _ = self.fcntl(libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0);
    }
}

#[cfg(test)]
mod tests;
