//! An io_uring as the disk engines use one.
//!
//! It is made on the VMM thread, with everything it will ever use registered: the files, one
//! eventfd, and the operations it may do (`IORING_REGISTER_RESTRICTIONS`: seccomp can't see what
//! is submitted to a ring, so the ring itself must be narrow). It stays disabled until its own
//! thread enables it, which makes that thread its only issuer and lets completions be processed
//! when it asks for them instead of by interrupting it.
#![expect(unsafe_code, reason = "submits pointers to an io_uring")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::buffers::{Part, as_iovecs};
use crate::allow;
use crate::sandbox::{Allow, Test};

const REGISTER_ENABLE_RINGS: u32 = 12;

/// What a ring's thread calls.
pub const ENTER: Allow = allow!(io_uring_enter);
/// See [`ENTER`].
pub const ENABLE: Allow = allow!(io_uring_register, 1 => Test::Is(REGISTER_ENABLE_RINGS));

/// All that the rings of images that are written to may do.
pub const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fallocate::CODE,
    opcode::Fsync::CODE,
];

/// How often and how long to wait for the kernel to find memory for a submission.
const SUBMIT_ATTEMPTS: u32 = 1000;
const SUBMIT_PAUSE: Duration = Duration::from_millis(1);
/// Entries that wait for others to be submitted with. With more, disks stand idle while their next
/// requests are being prepared: 8 % fewer requests are done at a depth of 16, for no less
/// processor time.
const TOGETHER: usize = 4;

/// See the module.
pub struct Ring {
    ring: IoUring,
    enabled: bool,
    ready: EventFd,
    /// Entries the kernel has not yet completed.
    in_flight: usize,
}

impl Ring {
    /// A ring that holds `entries` at a time, does `operations` on `files`, and nothing else.
    /// Fails where the kernel has no io_uring.
    pub fn new(entries: u32, files: &[RawFd], operations: &[u8]) -> io::Result<Self> {
        let ring = make(entries)?;
        let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_files(files)?;
        submitter.register_eventfd(ready.as_raw_fd())?;
        let mut restrictions: Vec<_> = operations
            .iter()
            .map(|operation| Restriction::sqe_op(*operation))
            .collect();
        restrictions.push(Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        submitter.register_restrictions(&mut restrictions)?;
        Ok(Self {
            ring,
            enabled: false,
            ready,
            in_flight: 0,
        })
    }

    /// Adds an entry; false if there is no room.
    ///
    /// # Safety
    /// What the entry points to must stay alive and untouched until its completion was returned by
    /// [`Ring::next`].
    #[must_use]
    pub unsafe fn push(&mut self, entry: &Entry) -> bool {
        // SAFETY: the caller promises it.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.in_flight += usize::from(pushed);
        if self.enabled && self.ring.submission().len() >= TOGETHER {
            // What is not taken now is with the next, and then says why.
            let _ = self.ring.submit();
        }
        pushed
    }

    /// How many entries were pushed and their completions not yet returned.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits what was pushed, if anything was.
    pub fn start(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    /// Enables the ring for this thread on first use, then submits, and waits for `want`
    /// completions.
    pub fn enter(&mut self, want: usize) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        let mut attempts = 0;
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory. What is in flight goes on meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    attempts += 1;
                    if attempts > SUBMIT_ATTEMPTS {
                        return Err(error);
                    }
                    std::thread::sleep(SUBMIT_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Has the kernel put completions into the ring that are ready but not yet there.
    pub fn fetch(&mut self) -> io::Result<()> {
        if self.enabled && self.ring.submission().taskrun() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// A completion that is in the ring: the entry's user data, and a number of bytes or an error.
    pub fn next(&mut self) -> Option<(u64, Result<usize, Errno>)> {
        let entry = self.ring.completion().next()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        let result = usize::try_from(entry.result())
            .map_err(|_| Errno::from_raw_os_error(entry.result().wrapping_neg()));
        Some((entry.user_data(), result))
    }

    /// Readable when there may be completions.
    pub fn descriptor(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    /// Makes the descriptor unreadable until the next completion.
    pub fn acknowledge(&mut self) {
        // That completions are ready makes it readable, and that they are put into the ring does so
        // again: not after this. Who fetches next finds, and reports, what goes wrong here.
        let _ = self.fetch();
        // Empty when somebody has been here already.
        let _ = self.ready.read();
    }
}

fn make(entries: u32) -> io::Result<IoUring> {
    let modern = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_clamp()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries.max(1));
    match modern {
        // Linux before 6.1.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .setup_clamp()
            .build(entries.max(1)),
        other => other,
    }
}

/// Whether the kernel does not have io_uring (or not what we need of it), or does not let us.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOMEM)
    )
}

/// The ring, if the kernel let us make one.
pub fn unless_refused(made: io::Result<Ring>) -> io::Result<Option<Ring>> {
    match made {
        Ok(ring) => Ok(Some(ring)),
        Err(error) if is_refusal(&error) => {
            tracing::warn!(%error, "no io_uring; using plain system calls");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Bytes of a part that the kernel takes at a time: at most 2 GiB less a page; the rest is another
/// step.
pub fn short(part: &Part) -> u32 {
    part.len_bytes().min(0x7fff_f000) as u32
}

/// An entry that reads the ring's file number `file` at `offset` into `parts`.
pub fn read(file: u32, parts: &[Part], offset: u64) -> Entry {
    let file = types::Fixed(file);
    match parts {
        [part] => opcode::Read::new(file, part.start(), short(part))
            .offset(offset)
            .build(),
        parts => opcode::Readv::new(file, as_iovecs(parts), parts.len() as u32)
            .offset(offset)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_does_its_operations_on_its_files_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        let other = tempfile::tempfile().unwrap();
        let operations = [opcode::Read::CODE, opcode::Fsync::CODE];
        let mut ring = match Ring::new(4, &[file.as_raw_fd()], &operations) {
            Ok(ring) => ring,
            Err(error) => {
                eprintln!("SKIPPED: this kernel has no io_uring ({error})");
                return;
            }
        };
        let mut result = |entry: Entry| {
            // SAFETY: none of these entries points to memory.
            assert!(unsafe { ring.push(&entry) });
            ring.enter(1).unwrap();
            ring.next().unwrap().1
        };
        let fixed = types::Fixed(0);
        assert_eq!(result(opcode::Fsync::new(fixed).build()), Ok(0));
        let forbidden = [
            opcode::Nop::new().build().flags(Flags::FIXED_FILE),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), std::ptr::null())
                .build()
                .flags(Flags::FIXED_FILE),
            opcode::Write::new(fixed, std::ptr::null(), 0).build(),
            opcode::Fsync::new(types::Fd(other.as_raw_fd())).build(),
            opcode::Fsync::new(fixed).build().flags(Flags::IO_LINK),
        ];
        for entry in forbidden {
            assert_eq!(result(entry), Err(Errno::ACCESS));
        }
        assert!(ring.ring.submitter().unregister_files().is_err());
    }
}
