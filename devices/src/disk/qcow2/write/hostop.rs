//! One operation on an image file: what it is, and each of the steps that it takes, a system call or
//! an entry of an io_uring.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::super::super::buffers::{Buffers, as_iovecs, read_at, write_at};
use super::super::super::pool::Work;
use super::super::super::ring;

/// `fallocate` that gives space back.
pub const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fill the buffers; what is beyond the end of the file is zeroes, unless the file should be
    /// longer.
    Read,
    /// Write the buffers.
    Write,
    /// Make all that was done before survive a power cut.
    Sync,
    /// Allocate `len` bytes, and make the file longer where it ends before.
    Allocate,
    /// Give `len` bytes back to the host.
    Punch,
    /// Cut the file there.
    Truncate,
}

/// One operation on one file.
pub struct HostOp {
    /// Which of the files.
    pub file: u16,
    pub kind: Kind,
    pub offset: u64,
    /// Of an allocation.
    pub len: u64,
    /// What is left to be read or written.
    pub buffers: Buffers,
    /// The file should have so many bytes.
    pub expected_bytes: u64,
    /// Not to be done at once where there is a ring or a pool.
    pub apart: bool,
}

/// A file that is operated on.
pub struct HostFile {
    pub file: Arc<File>,
    /// With O_DIRECT: what file offsets must be multiples of.
    pub direct: Option<u32>,
}

impl Work for HostOp {
    fn perform(&mut self, files: &[Arc<File>]) -> Result<usize, Errno> {
        let file = files.get(usize::from(self.file)).ok_or(Errno::BADF)?;
        perform(file, self, false)
    }
}

/// One system call.
pub fn perform(file: &File, op: &HostOp, nowait: bool) -> Result<usize, Errno> {
    let bytes = |result: io::Result<usize>| {
        result.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
    };
    let allocate = |mode| rustix::fs::fallocate(file, mode, op.offset, op.len).map(|()| 0);
    match op.kind {
        Kind::Read => bytes(read_at(file.as_fd(), op.buffers.parts(), op.offset, nowait)),
        Kind::Write => bytes(write_at(file.as_fd(), op.buffers.parts(), op.offset, false)),
        Kind::Sync => rustix::fs::fdatasync(file).map(|()| 0),
        Kind::Allocate => allocate(FallocateFlags::empty()),
        Kind::Punch => allocate(FallocateFlags::from_bits_retain(PUNCH_HOLE as u32)),
        Kind::Truncate => rustix::fs::ftruncate(file, op.offset).map(|()| 0),
    }
}

/// Takes the result of a step; `None` where another one must follow.
pub fn finish(
    op: &mut HostOp,
    host: &HostFile,
    result: Result<usize, Errno>,
) -> Option<io::Result<()>> {
    let count = match result {
        Ok(count) => count as u64,
        Err(Errno::INTR) => return None,
        Err(error) => return Some(Err(error.into())),
    };
    if !matches!(op.kind, Kind::Read | Kind::Write) {
        return Some(Ok(()));
    }
    op.offset = op.offset.saturating_add(count);
    op.buffers.advance(count);
    if op.buffers.len_bytes() == 0 {
        return Some(Ok(()));
    }
    let unit = u64::from(host.direct.unwrap_or(1).max(1));
    if count > 0 && op.offset.is_multiple_of(unit) {
        return None;
    }
    if op.kind == Kind::Write {
        return Some(Err(io::ErrorKind::WriteZero.into()));
    }
    if op.offset < op.expected_bytes {
        return Some(Err(io::ErrorKind::UnexpectedEof.into()));
    }
    op.buffers.zero();
    Some(Ok(()))
}

/// What the ring is given for it.
pub fn entry(op: &HostOp) -> Entry {
    let file = types::Fixed(op.file.into());
    let parts = op.buffers.parts();
    match op.kind {
        Kind::Read => ring::read(op.file.into(), parts, op.offset),
        Kind::Write => match parts {
            [part] => opcode::Write::new(file, part.start(), ring::short(part))
                .offset(op.offset)
                .build(),
            parts => opcode::Writev::new(file, as_iovecs(parts), parts.len() as u32)
                .offset(op.offset)
                .build(),
        },
        Kind::Allocate | Kind::Punch => {
            let mode = if op.kind == Kind::Punch {
                PUNCH_HOLE
            } else {
                0
            };
            opcode::Fallocate::new(file, op.len)
                .offset(op.offset)
                .mode(mode)
                .build()
        }
        // Truncation is never put into the ring.
        Kind::Sync | Kind::Truncate => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}
