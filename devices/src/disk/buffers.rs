//! Memory that the host kernel reads and writes for us: the guest's own, and bounce buffers.
//!
//! This is one of the modules that may hold `unsafe` code. The rule it keeps: a pointer into guest
//! memory lives in a [`Buffers`] together with a reference to the mapping it points into; the
//! engine owns the `Buffers` until the kernel is done. The guest may change the bytes at any time,
//! so they are touched only by the kernel and by volatile copies, never through a reference.
#![expect(
    unsafe_code,
    reason = "hands pointers into guest memory to preadv, pwritev and io_uring"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::guest_memory::GuestRam;

/// The most parts one vectored system call takes (`IOV_MAX`).
const MAX_PARTS: usize = libc::UIO_MAXIOV as usize;

/// The most parts whose allocation outlives a request: a guest may send a thousand requests of a
/// thousand parts each once, and is not to be remembered for it.
const KEPT_PARTS: usize = 64;

/// Part of the range is not guest memory.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the range is not in guest memory")]
pub struct OutOfRange;

/// One contiguous piece of memory. Made in this module only, and borrowed from what keeps the
/// memory alive.
#[repr(transparent)]
pub struct Part(libc::iovec);

impl Part {
    fn new(start: *mut libc::c_void, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: start,
            iov_len: len,
        })
    }

    /// Where it begins; to be dereferenced by the kernel only.
    pub fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// How many bytes it has.
    pub fn len_bytes(&self) -> usize {
        self.0.iov_len
    }
}

/// The parts as the kernel wants them.
pub(super) fn as_iovecs(parts: &[Part]) -> *const libc::iovec {
    parts.as_ptr().cast()
}

/// Pieces of guest memory, in order, to read into or write from.
///
/// Keeps its allocation when cleared, so that one can serve many requests; a large one is given
/// back.
#[derive(Default)]
pub struct Buffers {
    parts: Vec<Part>,
    /// Parts before this one are used up; they stay as they were, for [`Buffers::rewind`].
    first: usize,
    /// Bytes used up of the part `first`.
    cut: usize,
    bytes: u64,
    memory: Option<GuestRam>,
    /// Memory of our own that some of the parts point into.
    own: Vec<Arc<AlignedBuffer>>,
}

// SAFETY: the pointers are into memory that `memory` and `own` keep alive, which any thread may
// access.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Appends `len` bytes of guest memory at `address`. On error it may hold a part of them, and
    /// should be cleared.
    pub fn push(
        &mut self,
        memory: &GuestRam,
        address: GuestAddress,
        len: usize,
    ) -> Result<(), OutOfRange> {
        match &self.memory {
            None => self.memory = Some(memory.clone()),
            // All pointers must be covered by the one reference.
            Some(other) if !Arc::ptr_eq(other, memory) => return Err(OutOfRange),
            Some(_) => {}
        }
        for slice in memory.get_slices(address, len) {
            let slice = slice.map_err(|_| OutOfRange)?;
            let start = slice.ptr_guard_mut().as_ptr();
            match self.parts.last_mut() {
                Some(Part(last))
                    if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() =>
                {
                    last.iov_len += slice.len();
                }
                _ => self.parts.push(Part::new(start.cast(), slice.len())),
            }
            self.bytes += slice.len() as u64;
        }
        Ok(())
    }

    /// Appends `len` bytes of our own memory from `offset` on. While they are here nobody may look
    /// at them but through [`Buffers`] and the kernel.
    pub fn push_own(
        &mut self,
        buffer: &Arc<AlignedBuffer>,
        offset: usize,
        len: usize,
    ) -> Result<(), OutOfRange> {
        let end = offset.checked_add(len).ok_or(OutOfRange)?;
        if end > buffer.len_bytes() {
            return Err(OutOfRange);
        }
        if len > 0 {
            let start = buffer.start.as_ptr().wrapping_add(offset);
            self.parts.push(Part::new(start.cast(), len));
            self.bytes += len as u64;
            self.own.push(buffer.clone());
        }
        Ok(())
    }

    /// Moves the first `count` bytes (or all there are) to the end of `front`, which must be empty
    /// or hold memory of the same guest.
    pub fn split_to(&mut self, count: u64, front: &mut Self) {
        if front.memory.is_none() {
            front.memory.clone_from(&self.memory);
        }
        front.own.extend(self.own.iter().cloned());
        let mut left = count.min(self.bytes);
        while left > 0
            && let Some(part) = self.use_up(left)
        {
            left -= part.len_bytes() as u64;
            front.bytes += part.len_bytes() as u64;
            front.parts.push(part);
        }
    }

    /// Uses up a piece at the front that lies in one part and has at most `most` bytes.
    fn use_up(&mut self, most: u64) -> Option<Part> {
        let Part(part) = self.parts.get_mut(self.first)?;
        let step = most.min(part.iov_len as u64) as usize;
        let piece = Part::new(part.iov_base, step);
        if step == part.iov_len {
            restore(part, std::mem::take(&mut self.cut));
            self.first += 1;
        } else {
            part.iov_base = part.iov_base.wrapping_byte_add(step);
            part.iov_len -= step;
            self.cut += step;
        }
        self.bytes -= step as u64;
        Some(piece)
    }

    /// Takes back what [`Buffers::advance`] and [`Buffers::split_to`] used up, so that the request
    /// can be done once more.
    pub fn rewind(&mut self) {
        if let Some(Part(part)) = self.parts.get_mut(self.first) {
            restore(part, self.cut);
        }
        (self.first, self.cut) = (0, 0);
        self.bytes = self.parts.iter().map(|part| part.len_bytes() as u64).sum();
    }

    /// Whether all bytes are zero; looks no further than the first that is not.
    pub fn is_zero(&self) -> bool {
        let mut chunk = [0_u8; 4096];
        self.parts[self.first..].iter().all(|Part(part)| {
            let mut done = 0;
            while done < part.iov_len {
                // Most that is not zero shows it at once.
                let most = if done == 0 { 64 } else { chunk.len() };
                let len = (part.iov_len - done).min(most);
                let start = part.iov_base.wrapping_byte_add(done);
                // SAFETY: as in `copy_to`.
                let slice = unsafe { VolatileSlice::new(start.cast(), len) };
                slice.copy_to(&mut chunk[..len]);
                if chunk[..len].iter().any(|byte| *byte != 0) {
                    return false;
                }
                done += len;
            }
            true
        })
    }

    /// Fills the memory with zeroes.
    pub fn zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for Part(part) in &self.parts[self.first..] {
            let mut done = 0;
            while done < part.iov_len {
                let len = (part.iov_len - done).min(ZEROES.len());
                let start = part.iov_base.wrapping_byte_add(done);
                // SAFETY: as in `copy_to`.
                let slice = unsafe { VolatileSlice::new(start.cast(), len) };
                slice.copy_from(&ZEROES[..len]);
                done += len;
            }
        }
    }

    /// Forgets all parts and lets go of the memory.
    pub fn clear(&mut self) {
        self.parts.clear();
        if self.parts.capacity() > KEPT_PARTS {
            self.parts = Vec::new();
        }
        (self.first, self.cut) = (0, 0);
        self.bytes = 0;
        self.memory = None;
        self.own.clear();
    }

    /// How many bytes they hold.
    pub fn len_bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether every part begins at a multiple of `address` and has a multiple of `length` bytes;
    /// both powers of two.
    pub fn is_aligned(&self, address: u32, length: u32) -> bool {
        let address_mask = (address as usize).wrapping_sub(1);
        let length_mask = (length as usize).wrapping_sub(1);
        self.parts[self.first..].iter().all(|Part(part)| {
            (part.iov_base as usize) & address_mask == 0 && part.iov_len & length_mask == 0
        })
    }

    /// The parts, as many as one system call takes.
    pub fn parts(&self) -> &[Part] {
        let parts = &self.parts[self.first..];
        &parts[..parts.len().min(MAX_PARTS)]
    }

    /// Takes away the first `count` bytes.
    pub fn advance(&mut self, count: u64) {
        let mut left = count.min(self.bytes);
        while left > 0
            && let Some(part) = self.use_up(left)
        {
            left -= part.len_bytes() as u64;
        }
    }

    /// Copies from the front of the guest's memory into `target`; returns how many bytes.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for Part(part) in &self.parts[self.first..] {
            let rest = &mut target[done..];
            if rest.is_empty() {
                break;
            }
            // SAFETY: the part lies in memory that `self.memory` or `self.own` keeps alive, and
            // that is accessed by volatile copies only while it is here.
            let slice = unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies `source` to the front of the guest's memory; returns how many bytes.
    pub fn copy_from(&self, source: &[u8]) -> usize {
        let mut done = 0;
        for Part(part) in &self.parts[self.first..] {
            let rest = &source[done..];
            if rest.is_empty() {
                break;
            }
            let len = part.iov_len.min(rest.len());
            // SAFETY: as in `copy_to`.
            let slice = unsafe { VolatileSlice::new(part.iov_base.cast(), len) };
            slice.copy_from(&rest[..len]);
            done += len;
        }
        done
    }
}

/// Gives a part the `cut` bytes before it back.
fn restore(part: &mut libc::iovec, cut: usize) {
    part.iov_base = part.iov_base.wrapping_byte_sub(cut);
    part.iov_len += cut;
}

/// Memory of our own, aligned for O_DIRECT, zeroed when made.
pub struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
    part: [Part; 1],
}

// SAFETY: it owns its memory.
unsafe impl Send for AlignedBuffer {}

// SAFETY: what is shared gives out shared references only; [`Buffers::push_own`] says who may look
// at the bytes while pointers to them are about.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` bytes (not 0) at a multiple of `align` (a power of two).
    pub fn zeroed(len: usize, align: u32) -> io::Result<Self> {
        let layout = Layout::from_size_align(len.max(1), align as usize)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            start,
            layout,
            part: [Part::new(start.as_ptr().cast(), 0)],
        })
    }

    /// How many bytes it has.
    pub fn len_bytes(&self) -> usize {
        self.layout.size()
    }

    /// Its first `len` bytes, for a system call.
    pub fn parts(&mut self, len: usize) -> &[Part] {
        self.part[0].0.iov_len = len.min(self.layout.size());
        &self.part
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised, and lives as long as `self`. Engines give it to
        // the kernel only while nobody calls this.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    /// Its bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// `preadv2` or `pwritev2`.
type Vectored = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
    libc::c_int,
) -> libc::ssize_t;

/// Reads a file at `offset` into memory; `nowait` fails with EAGAIN where it would wait for the
/// device. Returns the number of bytes, 0 at the end of the file.
pub(super) fn read_at(
    file: BorrowedFd<'_>,
    parts: &[Part],
    offset: u64,
    nowait: bool,
) -> io::Result<usize> {
    let flags = if nowait { libc::RWF_NOWAIT } else { 0 };
    transfer(libc::preadv2, file, parts, offset, flags)
}

/// Writes memory to a file at `offset`; `durable` as in [`super::Operation::Write`]. Returns the
/// number of bytes.
pub(super) fn write_at(
    file: BorrowedFd<'_>,
    parts: &[Part],
    offset: u64,
    durable: bool,
) -> io::Result<usize> {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    transfer(libc::pwritev2, file, parts, offset, flags)
}

fn transfer(
    call: Vectored,
    file: BorrowedFd<'_>,
    parts: &[Part],
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let (start, count) = (as_iovecs(parts), parts.len() as i32);
    // SAFETY: `parts` is an array of `iovec`s, and whoever it is borrowed from keeps the memory
    // alive that they point to.
    let done = unsafe { call(file.as_raw_fd(), start, count, offset as i64, flags) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn buffers_keep_an_ordinary_allocation_and_give_a_large_one_back() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let mut buffers = Buffers::default();
        for (pieces, kept) in [(KEPT_PARTS, true), (1000, false)] {
            for piece in 0..pieces as u64 {
                buffers
                    .push(&memory, GuestAddress(piece * 1024), 512)
                    .unwrap();
            }
            assert_eq!(buffers.len_bytes(), 512 * pieces as u64);
            buffers.clear();
            assert_eq!(buffers.parts.capacity() >= pieces, kept);
            assert!(buffers.parts.capacity() <= KEPT_PARTS);
        }
    }

    #[test]
    fn what_was_used_up_comes_back_however_it_was_used() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let memory = Arc::new(memory);
        for steps in [
            &[1_u64][..],
            &[512, 512],
            &[100, 700, 224],
            &[1024, 1, 511],
            &[9999],
        ] {
            for split in [false, true] {
                let mut buffers = Buffers::default();
                for (address, len) in [(0, 512), (4096, 512), (8192, 512)] {
                    buffers.push(&memory, GuestAddress(address), len).unwrap();
                }
                let whole: Vec<_> = layout(&buffers);
                let mut used = 0;
                for step in steps {
                    if split {
                        let mut front = Buffers::default();
                        buffers.split_to(*step, &mut front);
                        assert_eq!(front.len_bytes(), (*step).min(1536 - used));
                    } else {
                        buffers.advance(*step);
                    }
                    used = (used + step).min(1536);
                    assert_eq!(buffers.len_bytes(), 1536 - used);
                    let left: usize = layout(&buffers).iter().map(|part| part.1).sum();
                    assert_eq!(left as u64, 1536 - used);
                }
                buffers.rewind();
                assert_eq!(layout(&buffers), whole, "{steps:?}");
                assert_eq!(buffers.len_bytes(), 1536);
            }
        }
    }

    fn layout(buffers: &Buffers) -> Vec<(*mut u8, usize)> {
        let parts = buffers.parts().iter();
        parts.map(|part| (part.start(), part.len_bytes())).collect()
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        use vm_memory::Bytes;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let mut buffers = Buffers::default();
        assert!(buffers.is_zero());
        for (address, len) in [(0, 512), (8192, 16384)] {
            buffers.push(&memory, GuestAddress(address), len).unwrap();
        }
        assert!(buffers.is_zero());
        for address in [0, 63, 64, 511, 8192, 12287, 12288, 8192 + 16383] {
            memory.write_obj(1_u8, GuestAddress(address)).unwrap();
            assert!(!buffers.is_zero(), "{address}");
            memory.write_obj(0_u8, GuestAddress(address)).unwrap();
        }
        memory.write_obj(1_u8, GuestAddress(600)).unwrap();
        assert!(
            buffers.is_zero(),
            "what is between the parts does not count"
        );
    }
}
