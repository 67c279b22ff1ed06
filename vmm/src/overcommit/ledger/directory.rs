//! The ledger's directory.
//!
//! ```text
//!  DIR                       its own lock (flock on the directory): held while something is
//!                            decided, made or removed
//!  DIR/vm-PID-RANDOM.record  locked (flock, exclusive) by its VM's process for all its life
//!  DIR/limits                what the operator sets; see `limits.rs`
//! ```
//! **A record is alive while its lock is held.** The kernel gives locks back when a process ends,
//! whatever ended it, and only after it has freed the process's memory; so there is no heartbeat,
//! no timeout, and no pid to be mistaken for another. A file gets its lock once, when it is made,
//! and that is done under the directory's lock; whoever holds that and finds a record unlocked
//! knows that it is dead for ever. Looking takes a *shared* lock for a moment, so that those who
//! look don't take one another for owners.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::io::Errno;

use super::record::{RECORD_BYTES, Record, RecordError};

pub(super) const PREFIX: &str = "vm-";
pub(super) const SUFFIX: &str = ".record";
pub(super) const LIMITS: &str = "limits";

/// Entries that are looked at; a directory with more is none of ours.
const MAX_ENTRIES: usize = 16_384;
/// How often a record is read again that is being written.
const ATTEMPTS: u32 = 50;

/// A record of a living process that can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its file's name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// The ledger at one moment; each record by itself is whole, all of them together may be some
/// microseconds apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Living VMs by the names of their records, in that order.
    pub records: Vec<(String, Record)>,
    /// Records of processes that have died.
    pub stale: Vec<String>,
    /// Records of living processes that can't be read.
    pub unreadable: Vec<Unreadable>,
    /// Entries that are nothing of ours.
    pub foreign: usize,
}

/// The directory, opened once: it may be renamed, or hidden by a mount, later.
pub struct Directory(OwnedFd);

/// How the directory's lock is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How long, by the pauses alone: where the CPUs are overloaded, whoever has the lock needs
    /// longer, too.
    pub time: Duration,
    /// The time from one try to the next.
    pub pause: Duration,
}

/// The directory's lock; released when dropped, or when the process ends.
pub struct Locked<'a>(&'a OwnedFd);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Fails for no reason that a lock which is held can have.
        let _ = flock(self.0, FlockOperation::Unlock);
    }
}

impl Directory {
    /// Opens it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Whether its mode lets others than its owner and group do anything with it.
    pub(super) fn others_may_open(&self) -> io::Result<bool> {
        Ok(fstat(&self.0)?.st_mode & 0o007 != 0)
    }

    /// Makes a record and locks it for as long as the file returned is open.
    pub(super) fn make(&self, _: &Locked<'_>, name: &str, record: &Record) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let file = File::from(openat(&self.0, name, flags, mode)?);
        // From here on, whoever reads without the lock takes it for one of the dead.
        let made = file
            .write_all_at(&record.encode(), 0)
            .and_then(|()| lock_exclusively(&file));
        if let Err(error) = made {
            let _ = rustix::fs::unlinkat(&self.0, name, AtFlags::empty());
            return Err(error);
        }
        Ok(file)
    }

    /// Takes the lock; an error of kind `TimedOut` where somebody else keeps it for longer than
    /// the `patience` (he was stopped, perhaps: who dies gives it back).
    pub fn lock(&self, patience: Patience) -> io::Result<Locked<'_>> {
        let Patience { time, pause } = patience;
        let mut attempts = time.as_millis() / pause.as_millis().max(1);
        loop {
            match flock(&self.0, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Locked(&self.0)),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            attempts = attempts
                .checked_sub(1)
                .ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))?;
            std::thread::sleep(pause);
        }
    }

    /// The names in it, ours or not.
    pub(super) fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
            if names.len() > MAX_ENTRIES {
                return Err(io::Error::other(format!(
                    "it has more than {MAX_ENTRIES} entries, so it is no ledger"
                )));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads all of it; changes nothing.
    pub fn snapshot(&self) -> io::Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        for name in self.names()? {
            let Ok(name) = String::from_utf8(name) else {
                snapshot.foreign += 1;
                continue;
            };
            if name == LIMITS {
                continue;
            }
            if !name.starts_with(PREFIX) || !name.ends_with(SUFFIX) {
                snapshot.foreign += 1;
                continue;
            }
            match self.look(&name)? {
                Found::Nothing => {}
                Found::Foreign => snapshot.foreign += 1,
                Found::Dead => snapshot.stale.push(name),
                Found::Alive(Ok(record)) => snapshot.records.push((name, *record)),
                Found::Alive(Err(reason)) => {
                    snapshot.unreadable.push(Unreadable { name, reason });
                }
            }
        }
        Ok(snapshot)
    }

    fn look(&self, name: &str) -> io::Result<Found> {
        // Not through a link, and without waiting for the other end of a FIFO.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.0, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            // Gone in the meantime.
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            // A link; a socket.
            Err(Errno::LOOP | Errno::NXIO) => return Ok(Found::Foreign),
            Err(error @ (Errno::ACCESS | Errno::PERM)) => {
                return Ok(Found::Alive(Err(error.to_string())));
            }
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
            return Ok(Found::Foreign);
        }
        if !is_locked(&file)? {
            return Ok(Found::Dead);
        }
        for _ in 0..ATTEMPTS {
            match read(&file) {
                Err(ReadError::Record(RecordError::Checksum)) => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(ReadError::Record(error)) => return Ok(Found::Alive(Err(error.to_string()))),
                Err(ReadError::Host(error)) => return Ok(Found::Alive(Err(error.to_string()))),
                Ok(record) => return Ok(Found::Alive(Ok(Box::new(record)))),
            }
        }
        Ok(Found::Alive(Err(RecordError::Checksum.to_string())))
    }

    /// Removes a record that was seen dead by who has held the lock since; false where it is gone
    /// already.
    pub(super) fn remove(&self, _: &Locked<'_>, name: &str) -> io::Result<bool> {
        match rustix::fs::unlinkat(&self.0, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The text of `limits`; `None` where there is none.
    pub(super) fn limits(&self) -> io::Result<Option<String>> {
        const MOST: usize = 4096;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.0, LIMITS, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = vec![0; MOST + 1];
        let mut len = 0;
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], len as u64) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(len);
        let text = String::from_utf8(bytes).ok().filter(|_| len <= MOST);
        text.map(Some).ok_or_else(|| {
            let problem = "is not a short text";
            io::Error::new(io::ErrorKind::InvalidData, problem)
        })
    }
}

enum Found {
    Nothing,
    Foreign,
    Dead,
    Alive(Result<Box<Record>, String>),
}

enum ReadError {
    Record(RecordError),
    Host(io::Error),
}

fn read(file: &File) -> Result<Record, ReadError> {
    let mut bytes = [0; RECORD_BYTES + 1];
    let len = file.read_at(&mut bytes, 0).map_err(ReadError::Host)?;
    Record::decode(&bytes[..len]).map_err(ReadError::Record)
}

/// Locks a new record; those who look at it have it for an instant only.
fn lock_exclusively(file: &File) -> io::Result<()> {
    for _ in 0..1000 {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(1)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Whether somebody has the exclusive lock.
fn is_locked(file: impl AsFd) -> io::Result<bool> {
    loop {
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            // Closing the file gives it back.
            Ok(()) => return Ok(false),
            Err(Errno::WOULDBLOCK) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
