//! What a process that works on images may do.

use std::sync::OnceLock;
use std::time::Instant;

use crate::raw::BlockedSignals;
use devices::allow;
use devices::disk::QUEUES;
use devices::sandbox::violation::report_violations;
use devices::sandbox::{Allow, COMMON, Filter, SeccompMode, Test};

/// Files: whichever the user may touch, for that is what the program is for.
const FILES: &[Allow] = &[
    allow!(access),
    allow!(clock_getres),
    allow!(eventfd2),
    allow!(fallocate),
    allow!(fcntl),
    allow!(fdatasync),
    allow!(fstat),
    allow!(fstatfs),
    allow!(fsync),
    allow!(ftruncate),
    allow!(getcwd),
    // Blocks of a disk, and whether the output is a terminal.
    allow!(ioctl, 1 => Test::Is(libc::TCGETS as u32)),
    allow!(ioctl, 1 => Test::Is(BLKSSZGET)),
    allow!(ioctl, 1 => Test::Is(BLKPBSZGET)),
    allow!(io_uring_enter),
    allow!(io_uring_register),
    allow!(io_uring_setup),
    allow!(linkat),
    allow!(lseek),
    allow!(newfstatat),
    allow!(open),
    allow!(openat),
    allow!(poll),
    allow!(pread64),
    allow!(preadv),
    allow!(preadv2),
    allow!(pwrite64),
    allow!(pwritev),
    allow!(pwritev2),
    allow!(read),
    allow!(readlink),
    allow!(readlinkat),
    allow!(readv),
    allow!(renameat2),
    allow!(rt_sigtimedwait),
    allow!(stat),
    allow!(statx),
    allow!(unlink),
    allow!(unlinkat),
];

/// `sigraise`: tests of crashes have the shell kill itself.
const SIGNALS: &[Allow] = &[
    allow!(kill, 1 => Test::Is(libc::SIGKILL as u32)),
    allow!(kill, 1 => Test::Is(libc::SIGTERM as u32)),
    allow!(kill, 1 => Test::Is(libc::SIGINT as u32)),
];

const BLKSSZGET: u32 = 0x1268;
const BLKPBSZGET: u32 = 0x127b;

/// Signals that end a long operation, which cleans up then.
static GIVE_UP: OnceLock<BlockedSignals> = OnceLock::new();

/// Has SIGINT and SIGTERM wait until [`interrupted`] asks for them. For commands that make files and
/// ask often.
pub fn hold_signals() -> std::io::Result<()> {
    let signals = BlockedSignals::block(&[libc::SIGINT, libc::SIGTERM])?;
    let _ = GIVE_UP.set(signals);
    Ok(())
}

/// Whether the user wants it to end.
pub fn interrupted() -> bool {
    GIVE_UP.get().is_some_and(BlockedSignals::is_pending)
}

/// Confines the process, which has one thread, for the rest of its life.
///
/// `signals` lets it send those that a shell of commands can be told to raise.
pub fn enter(signals: bool) -> Result<(), Box<dyn std::error::Error>> {
    report_violations(Instant::now(), None)?;
    let signals = if signals { SIGNALS } else { &[] };
    // Sets no_new_privs too.
    let mut lists = vec![COMMON, FILES, signals];
    lists.extend(QUEUES.iter().map(|(_, calls)| *calls));
    Filter::compile("disk", SeccompMode::Enforce, &lists)?.install()?;
    Ok(())
}
