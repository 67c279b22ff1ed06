//! One request of the raw engine, as a sequence of steps for the host kernel.
//!
//! ```text
//!   Read ──────► read… ─────────────────────────────────────────────► done
//!   Write ─────► write… ────────────────────────────────────────────► done
//!   Flush ─────► sync ──────────────────────────────────────────────► done
//!   Discard ───► punch hole (or nothing) ───────────────────────────► done
//!   WriteZeroes► [punch hole] ► [zero range] ► write zeroes… ► [sync] ► done
//!                     └── success ──┴──────── success ───────────┘
//! ```
//!
//! Pure: it tells what to do next and is told the result; who does it is not its business. With
//! O_DIRECT, buffers that the disk can't use as they are go through a bounce buffer, in chunks.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::super::buffers::{AlignedBuffer, Part};
use super::super::{Completion, Operation, Request};
use super::Host;

/// `fallocate` modes in use.
pub const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
pub const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Bytes of a bounce buffer.
pub const BOUNCE: usize = 256 << 10;

/// What the host kernel is to do next. Reads and writes are of [`Job::parts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Read { offset: u64 },
    Write { offset: u64, durable: bool },
    Allocate { mode: i32, offset: u64, len: u64 },
    Sync,
}

/// How often a step is tried that the kernel puts off with EAGAIN (it is short of memory, or of
/// requests to the disk), and how long to wait before each but the first time.
const ATTEMPTS: u32 = 1000;
pub const AGAIN_PAUSE: Duration = Duration::from_millis(1);

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Transfer,
    Discard,
    PunchHole,
    ZeroRange,
    WriteZeroes,
    Sync,
    Nothing,
}

/// A request on its way.
pub struct Job {
    request: Request,
    plan: Plan,
    done: u64,
    bounce: Option<AlignedBuffer>,
    /// Whether the bounce buffer stands in for the request's own buffers.
    bounced: bool,
    /// How often the kernel has put it off since it last got on.
    put_off: u32,
}

/// What comes after a step.
pub enum After {
    /// Another step.
    Next,
    /// The same step, after [`AGAIN_PAUSE`].
    Again,
    /// The end.
    Done(io::Result<()>),
}

impl Job {
    /// Begins a request.
    pub fn new(mut request: Request, host: &Host) -> Result<Self, Completion> {
        let block = u64::from(host.logical_block);
        let mut aligned = (request.offset | request.length).is_multiple_of(block);
        let plan = match request.operation {
            Operation::Flush => {
                if let Err(error) = host.synced(Ok(())) {
                    return Err(refusal(request, error));
                }
                aligned = true;
                Plan::Sync
            }
            Operation::Read | Operation::Write { .. } => {
                // The page cache takes any offset.
                aligned |= host.direct_memory_align.is_none();
                Plan::Transfer
            }
            Operation::Discard => {
                if host.block_device && !aligned {
                    shrink(&mut request, block);
                    aligned = true;
                }
                match request.length == 0 || host.no_punch_hole.load(Ordering::Relaxed) {
                    true => Plan::Nothing,
                    false => Plan::Discard,
                }
            }
            Operation::WriteZeroes { unmap, .. } => {
                let whole = aligned || !host.block_device;
                aligned |= host.direct_memory_align.is_none();
                if unmap && whole && !host.no_punch_hole.load(Ordering::Relaxed) {
                    Plan::PunchHole
                } else if whole && !host.no_zero_range.load(Ordering::Relaxed) {
                    Plan::ZeroRange
                } else {
                    Plan::WriteZeroes
                }
            }
        };
        let transfer = matches!(plan, Plan::Transfer);
        if !aligned || (transfer && request.buffers.len_bytes() != request.length) {
            return Err(refusal(request, Errno::INVAL));
        }
        let bounced = transfer
            && host
                .direct_memory_align
                .is_some_and(|align| !request.buffers.is_aligned(align, host.logical_block));
        Ok(Self {
            request,
            plan,
            done: 0,
            bounce: None,
            bounced,
            put_off: 0,
        })
    }

    /// Whether it can't go on without a bounce buffer.
    pub fn wants_bounce(&self) -> bool {
        self.bounce.is_none() && (self.bounced || self.plan == Plan::WriteZeroes)
    }

    /// Lends it one, of [`BOUNCE`] bytes.
    pub fn lend_bounce(&mut self, mut buffer: AlignedBuffer) {
        if self.plan == Plan::WriteZeroes {
            buffer.bytes_mut().fill(0);
        }
        self.bounce = Some(buffer);
    }

    /// What to do now; `None` where nothing is left to do, and all is well.
    pub fn step(&mut self) -> Option<Step> {
        let (offset, len) = (self.request.offset, self.request.length);
        let at = offset + self.done;
        Some(match self.plan {
            Plan::Nothing => return None,
            Plan::Transfer => match self.request.operation {
                Operation::Write { durable } => {
                    if let Some(bounce) = &mut self.bounce {
                        self.request.buffers.copy_to(bounce.bytes_mut());
                    }
                    Step::Write {
                        offset: at,
                        durable,
                    }
                }
                _ => Step::Read { offset: at },
            },
            Plan::Discard | Plan::PunchHole => Step::Allocate {
                mode: PUNCH_HOLE,
                offset,
                len,
            },
            Plan::ZeroRange => Step::Allocate {
                mode: ZERO_RANGE,
                offset,
                len,
            },
            Plan::WriteZeroes => Step::Write {
                offset: at,
                durable: false,
            },
            Plan::Sync => Step::Sync,
        })
    }

    /// The memory that the current step reads into or writes from.
    pub fn parts(&mut self) -> &[Part] {
        let left = usize::try_from(self.request.length - self.done).unwrap_or(usize::MAX);
        match &mut self.bounce {
            Some(bounce) => bounce.parts(left),
            None => self.request.buffers.parts(),
        }
    }

    /// Takes the result of the step: a number of bytes, or an error.
    pub fn finished(&mut self, result: Result<usize, Errno>, host: &Host) -> After {
        if result == Err(Errno::AGAIN) && self.put_off < ATTEMPTS {
            self.put_off += 1;
            return match self.put_off {
                1 => After::Next,
                _ => After::Again,
            };
        }
        self.put_off = 0;
        match (self.plan, result) {
            (_, Err(Errno::INTR)) => After::Next,
            (Plan::Transfer | Plan::WriteZeroes, Ok(count)) => self.transferred(count as u64),
            (Plan::Discard, Err(error)) if is_unsupported(error) => {
                // It was only a hint.
                host.no_punch_hole.store(true, Ordering::Relaxed);
                After::Done(Ok(()))
            }
            (Plan::PunchHole, Err(error)) if is_unsupported(error) => {
                host.no_punch_hole.store(true, Ordering::Relaxed);
                self.plan = Plan::ZeroRange;
                After::Next
            }
            (Plan::ZeroRange, Err(error)) if is_unsupported(error) => {
                host.no_zero_range.store(true, Ordering::Relaxed);
                self.plan = Plan::WriteZeroes;
                After::Next
            }
            (Plan::PunchHole | Plan::ZeroRange, Ok(_)) => self.zeroed(),
            (Plan::Sync, result) => {
                After::Done(host.synced(result.map(drop)).map_err(io::Error::from))
            }
            (_, Ok(_)) => After::Done(Ok(())),
            (_, Err(error)) => After::Done(Err(error.into())),
        }
    }

    fn transferred(&mut self, count: u64) -> After {
        let writing = self.request.operation != Operation::Read;
        if count == 0 {
            return After::Done(Err(if writing {
                io::ErrorKind::WriteZero.into()
            } else {
                io::ErrorKind::UnexpectedEof.into()
            }));
        }
        let count = count.min(self.request.length - self.done);
        if let Some(bounce) = &self.bounce
            && !writing
        {
            let bytes = bounce.bytes();
            self.request
                .buffers
                .copy_from(&bytes[..bytes.len().min(count as usize)]);
        }
        self.done += count;
        self.request.buffers.advance(count);
        if self.done < self.request.length {
            return After::Next;
        }
        if self.plan == Plan::WriteZeroes {
            return self.zeroed();
        }
        After::Done(Ok(()))
    }

    fn zeroed(&mut self) -> After {
        if let Operation::WriteZeroes { durable: true, .. } = self.request.operation {
            self.plan = Plan::Sync;
            return After::Next;
        }
        After::Done(Ok(()))
    }

    /// Ends it, and gives back the bounce buffer.
    pub fn into_completion(self, result: io::Result<()>) -> (Completion, Option<AlignedBuffer>) {
        let completion = Completion {
            tag: self.request.tag,
            result,
            buffers: self.request.buffers,
        };
        (completion, self.bounce)
    }
}

/// A request that ends before it began.
pub fn refusal(request: Request, error: Errno) -> Completion {
    Completion {
        tag: request.tag,
        result: Err(error.into()),
        buffers: request.buffers,
    }
}

/// Cuts a hint down to the whole blocks in it.
fn shrink(request: &mut Request, block: u64) {
    let end = request.offset.saturating_add(request.length) / block * block;
    let start = request
        .offset
        .checked_next_multiple_of(block)
        .unwrap_or(end);
    request.offset = start;
    request.length = end.saturating_sub(start);
}

fn is_unsupported(error: Errno) -> bool {
    // ENODEV and ENOSYS: `fallocate` itself is missing. EINVAL: from a block device.
    [Errno::OPNOTSUPP, Errno::NODEV, Errno::NOSYS, Errno::INVAL].contains(&error)
}
