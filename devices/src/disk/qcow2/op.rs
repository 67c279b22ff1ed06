//! One read of a host file, and what becomes of the bytes.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::super::buffers::{AlignedBuffer, Buffers};
use super::cache::SliceKey;
use super::chain::{Layer, enclosing};
use super::map::Compressed;

/// A read on its way. Whoever gives [`Op::buffers`] to the kernel leaves the op alone until the
/// kernel is done.
pub struct Op {
    /// The task that it is for.
    pub task: u16,
    /// The layer whose file is read.
    pub layer: u16,
    /// Where in the file.
    pub offset: u64,
    /// What is still to be filled.
    pub buffers: Buffers,
    /// What comes then.
    pub then: Then,
}

/// What becomes of the bytes.
pub enum Then {
    /// They are where they should be.
    Nothing,
    /// They go through memory of our own.
    Own(Own, Use),
}

/// Memory of our own, and which part of it was asked for.
pub struct Own {
    buffer: Arc<AlignedBuffer>,
    skip: usize,
    len: usize,
}

impl Own {
    /// The bytes that were asked for; to be called when all of them were read.
    pub fn bytes(&self) -> &[u8] {
        let bytes = self.buffer.bytes();
        bytes.get(self.skip..self.skip + self.len).unwrap_or(&[])
    }

    /// What it takes of the memory.
    pub fn footprint(&self) -> usize {
        self.buffer.len_bytes()
    }
}

/// What bytes in memory of our own are for.
pub enum Use {
    /// To be copied.
    Copy(Buffers),
    /// A compressed cluster, the rest of which, from this byte on, goes to the buffers.
    Decompress(Compressed, usize, Buffers),
    /// To be kept.
    Slice(SliceKey),
}

/// What comes after a system call.
#[derive(Debug)]
pub enum After {
    /// Another one.
    More,
    /// The end.
    Done(io::Result<()>),
}

impl Op {
    /// A read straight to where the bytes should be.
    pub fn straight(task: u16, layer: u16, offset: u64, buffers: Buffers) -> Self {
        Self {
            task,
            layer,
            offset,
            buffers,
            then: Then::Nothing,
        }
    }

    /// A read of `len` bytes at `offset`, whatever O_DIRECT asks for.
    pub fn own(
        (task, number): (u16, u16),
        layer: &Layer,
        offset: u64,
        len: usize,
        purpose: Use,
    ) -> io::Result<Self> {
        let (start, skip, total) = enclosing(layer.direct, offset, len);
        let buffer = Arc::new(AlignedBuffer::zeroed(total, 4096)?);
        let mut buffers = Buffers::default();
        buffers
            .push_own(&buffer, 0, total)
            .map_err(io::Error::other)?;
        Ok(Self {
            task,
            layer: number,
            offset: start,
            buffers,
            then: Then::Own(Own { buffer, skip, len }, purpose),
        })
    }

    /// Takes the result of a system call that read from [`Op::offset`] into [`Op::buffers`].
    pub fn finished(&mut self, result: Result<usize, Errno>, layer: &Layer) -> After {
        let count = match result {
            Ok(count) => count as u64,
            Err(Errno::INTR) => return After::More,
            Err(error) => return After::Done(Err(error.into())),
        };
        self.offset = self.offset.saturating_add(count);
        self.buffers.advance(count);
        if self.buffers.len_bytes() == 0 {
            return After::Done(Ok(()));
        }
        let unit = layer.direct.map_or(1, |direct| direct.file.max(1));
        if count > 0 && self.offset.is_multiple_of(unit.into()) {
            return After::More;
        }
        // The end of the file. What is allocated beyond it was never written, if it ended here when
        // it was opened.
        if self.offset < layer.file_bytes {
            return After::Done(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.buffers.zero();
        After::Done(Ok(()))
    }
}
