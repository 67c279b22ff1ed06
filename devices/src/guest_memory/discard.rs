//! Giving pages of guest RAM back to the host; afterwards they read as zeroes.
//!
//! Private memory is dropped by `madvise(MADV_DONTNEED)`. That frees nothing of shared memory,
//! whose pages belong to the file: there it is MADV_REMOVE, which punches a hole into the file
//! and, unlike `fallocate`, tells a userfaultfd of it. Many ranges go at once, by
//! `process_madvise` on ourselves, where the kernel can (Linux 6.13 on). Neither takes the mmap lock
//! for writing, splits a mapping or needs another descriptor. Huge pages of hugetlb come and go
//! whole: what covers one in part is left alone, and counted.
//!
//! A hole is unmapped from whoever has it mapped before it is punched, which interrupts their
//! processors for each hole. So small pieces of shared memory are unmapped all together first, by
//! MADV_DONTNEED, which flushes once: the holes then find nothing mapped. That is worth about half
//! of the time; the rest is the kernel's work in the file, and a call for several holes there is
//! not. Unmapping what lies between them too would be faster still, and the guest would pay.
#![expect(
    unsafe_code,
    reason = "throwing pages of guest RAM away takes raw addresses"
)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::mm::Advice;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use self::inhibit::{Inhibitor, Reason};
use super::GuestRam;
use crate::allow;
use crate::sandbox::{Allow, Test};

pub mod inhibit;

/// Bytes of a page of the guest, and of the host unless it is a huge one.
pub const PAGE: u64 = 4096;
/// Ranges given to one `process_madvise` at most (UIO_MAXIOV).
const BATCH: usize = 1024;

/// Pieces that are smaller than this on average are unmapped together before they are punched.
const SMALL: usize = 16 * PAGE as usize;

/// What [`Discarder`] calls beside [`crate::sandbox::COMMON`].
pub const SYSCALLS: &[Allow] = &[
    allow!(fstat),
    allow!(
        process_madvise,
        3 => Test::Is(libc::MADV_DONTNEED as u32),
        4 => Test::Is(0),
    ),
    allow!(
        process_madvise,
        3 => Test::Is(libc::MADV_REMOVE as u32),
        4 => Test::Is(0),
    ),
];

/// What became of the bytes that were to be discarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Given back.
    pub bytes: u64,
    /// Not RAM.
    pub outside: u64,
    /// Parts of huge pages.
    pub partial: u64,
    /// Locked into memory (mlock), or of a kind the kernel does not discard.
    pub locked: u64,
    /// The host failed.
    pub failed: u64,
    /// Held off for a reason.
    pub inhibited: Option<(Reason, u64)>,
    /// System calls made.
    pub calls: u64,
}

/// A piece of host memory, as the kernel's `struct iovec` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    base: usize,
    len: usize,
}

/// The way to discard many ranges by one system call.
#[derive(Clone, Debug)]
pub struct Batching(Arc<OwnedFd>);

impl Batching {
    /// Tries it on a page of its own; `None` where the kernel can't. Called on the VMM thread.
    pub fn probe() -> Option<Self> {
        let batching = Self(Arc::new(pidfd_open(getpid(), PidfdFlags::empty()).ok()?));
        let page = PAGE as usize;
        let trial = vm_memory::MmapRegion::<()>::new(page).ok()?;
        let piece = Piece {
            base: trial.as_ptr() as usize,
            len: page,
        };
        let done = batching.advise(&[piece], Advice::LinuxDontNeed).ok();
        (done == Some(page)).then_some(batching)
    }

    /// Discards pieces; says how many bytes were discarded before something was in the way.
    fn advise(&self, pieces: &[Piece], advice: Advice) -> io::Result<usize> {
        // SAFETY: the pieces lie in guest RAM (or in the page of the probe), which is alive, and
        // whose contents nobody counts on but the guest, who has given these pages up. `Piece`
        // has the layout of `struct iovec`.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.0.as_raw_fd(),
                pieces.as_ptr(),
                pieces.len(),
                advice as i32,
                0,
            )
        };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}

/// Where a region of guest RAM is on the host, and of what kind.
struct Mapping {
    guest: Range<u64>,
    host: usize,
    page: u64,
    shared: bool,
}

/// Discards guest RAM. Keeps it mapped for as long as it lives.
pub struct Discarder {
    mappings: Vec<Mapping>,
    batching: Option<Batching>,
    inhibitor: Inhibitor,
    private: Vec<Piece>,
    shared: Vec<Piece>,
    _ram: GuestRam,
}

impl Discarder {
    /// Looks how `ram` is mapped.
    pub fn new(
        ram: &GuestRam,
        batching: Option<Batching>,
        inhibitor: Inhibitor,
    ) -> io::Result<Self> {
        let mappings = ram.iter().map(|region| {
            let start = region.start_addr().0;
            let flags = region.flags();
            let page = match (region.is_hugetlbfs(), region.file_offset()) {
                (Some(true), Some(file)) => {
                    u64::try_from(rustix::fs::fstat(file.file())?.st_blksize).unwrap_or(PAGE)
                }
                (Some(true), None) => match flags & libc::MAP_HUGE_1GB {
                    libc::MAP_HUGE_1GB => 1 << 30,
                    _ => 2 << 20,
                },
                _ => PAGE,
            };
            Ok(Mapping {
                guest: start..start.saturating_add(region.len()),
                host: region.as_ptr() as usize,
                page: page.max(PAGE),
                shared: flags & libc::MAP_SHARED != 0,
            })
        });
        Ok(Self {
            mappings: mappings.collect::<io::Result<_>>()?,
            batching,
            inhibitor,
            private: Vec::new(),
            shared: Vec::new(),
            _ram: ram.clone(),
        })
    }

    /// Bytes of the largest page behind guest RAM; all of it is of one kind.
    pub fn page(&self) -> u64 {
        self.mappings.iter().map(|m| m.page).max().unwrap_or(PAGE)
    }

    /// The part of `range` that is RAM, in bytes.
    pub fn ram_in(&self, range: &Range<u64>) -> u64 {
        let covered = self.mappings.iter().map(|m| overlap(&m.guest, range));
        covered.map(|part| part.end - part.start).sum()
    }

    /// Leaves of `ranges` what is RAM; says how many bytes were not.
    pub fn clip(&self, ranges: &mut Vec<Range<u64>>) -> u64 {
        let mut outside = 0;
        if ranges.iter().all(|r| self.ram_in(r) == r.end - r.start) {
            return outside;
        }
        let mut clipped = Vec::with_capacity(ranges.len());
        for range in ranges.drain(..) {
            outside += range.end - range.start - self.ram_in(&range);
            let parts = self.mappings.iter().map(|m| overlap(&m.guest, &range));
            clipped.extend(parts.filter(|part| part.start < part.end));
        }
        *ranges = clipped;
        outside
    }

    /// Discards guest physical `ranges`, which should ascend and not overlap, with as few calls
    /// as possible. What can't be is counted.
    pub fn discard(&mut self, ranges: &[Range<u64>]) -> Discarded {
        let mut outcome = Discarded::default();
        for range in ranges.iter().filter(|range| range.start < range.end) {
            self.collect(range, &mut outcome);
        }
        let inhibitor = self.inhibitor.clone();
        let _permit = match inhibitor.enter() {
            Ok(permit) => permit,
            Err(reason) => {
                let bytes = |piece: Piece| piece.len as u64;
                let private = self.private.drain(..).map(bytes).sum::<u64>();
                let shared = self.shared.drain(..).map(bytes).sum::<u64>();
                outcome.inhibited = Some((reason, private + shared));
                return outcome;
            }
        };
        for (pieces, advice) in [
            (&mut self.private, Advice::LinuxDontNeed),
            (&mut self.shared, Advice::LinuxRemove),
        ] {
            let mut rest = &pieces[..];
            if let Some(batching) = &self.batching
                && rest.len() > 1
            {
                let bytes: usize = rest.iter().map(|piece| piece.len).sum();
                let unmap = advice == Advice::LinuxRemove && bytes / rest.len() < SMALL;
                rest = advise_batches(batching, rest, advice, unmap, &mut outcome);
            }
            for piece in rest {
                advise(*piece, advice, &mut outcome);
            }
            pieces.clear();
        }
        outcome
    }

    /// Notes where on the host `range` lies.
    fn collect(&mut self, range: &Range<u64>, outcome: &mut Discarded) {
        let mut outside = range.end - range.start;
        for mapping in &self.mappings {
            let part = overlap(&mapping.guest, range);
            let asked = part.end - part.start;
            if asked == 0 {
                continue;
            }
            outside -= asked;
            // Regions begin and end at whole pages, counted from their beginning.
            let offset = |address: u64| address - mapping.guest.start;
            let first = offset(part.start).next_multiple_of(mapping.page);
            let last = offset(part.end) / mapping.page * mapping.page;
            let len = last.saturating_sub(first);
            outcome.partial += asked - len;
            if len == 0 {
                continue;
            }
            let list = if mapping.shared {
                &mut self.shared
            } else {
                &mut self.private
            };
            let base = mapping.host + first as usize;
            match list.last_mut() {
                Some(before) if before.base + before.len == base => before.len += len as usize,
                _ => list.push(Piece {
                    base,
                    len: len as usize,
                }),
            }
        }
        outcome.outside += outside;
    }
}

/// What both cover; empty, but not reversed, where that is nothing.
fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// Discards `pieces` in batches, which are unmapped before where that is worth it; gives back those
/// at which it had to end, for lack of a way around.
fn advise_batches<'a>(
    batching: &Batching,
    mut pieces: &'a [Piece],
    advice: Advice,
    unmap: bool,
    outcome: &mut Discarded,
) -> &'a [Piece] {
    while !pieces.is_empty() {
        let batch = &pieces[..pieces.len().min(BATCH)];
        if unmap {
            outcome.calls += 1;
            // What is not unmapped now is when its hole is punched.
            let _ = batching.advise(batch, Advice::LinuxDontNeed);
        }
        outcome.calls += 1;
        let Ok(mut done) = batching.advise(batch, advice) else {
            // Nothing was done: the first piece is the trouble, and one by one it is told apart
            // from the rest.
            return pieces;
        };
        outcome.bytes += done as u64;
        let whole = batch.iter().take_while(|piece| {
            let fits = piece.len <= done;
            done -= if fits { piece.len } else { 0 };
            fits
        });
        let whole = whole.count();
        // A piece done in part is done again, as it costs little; its bytes count once.
        outcome.bytes -= done as u64;
        if whole == 0 {
            return pieces;
        }
        pieces = &pieces[whole..];
    }
    pieces
}

fn advise(piece: Piece, advice: Advice, outcome: &mut Discarded) {
    let bytes = piece.len as u64;
    loop {
        outcome.calls += 1;
        // SAFETY: the piece lies in guest RAM, which is alive and mapped, and whose contents
        // nobody counts on but the guest, who has given these pages up.
        let result = unsafe { rustix::mm::madvise(piece.base as *mut _, piece.len, advice) };
        match result {
            Ok(()) => outcome.bytes += bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::INVAL) => outcome.locked += bytes,
            Err(_) => outcome.failed += bytes,
        }
        return;
    }
}

#[cfg(test)]
mod tests;
