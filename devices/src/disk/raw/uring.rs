//! The raw engine over an io_uring.
//!
//! The ring is made on the VMM thread, with everything it will ever use registered: one file, one
//! eventfd, six operations (`IORING_REGISTER_RESTRICTIONS`: seccomp can't see what is submitted to
//! a ring, so the ring itself must be narrow). It stays disabled until the queue's thread enables
//! it, which makes that thread its only issuer and lets completions be processed when it asks for
//! them instead of by interrupting it.
//!
//! Through the page cache, reads of what is cached and writes are done at once by plain system
//! calls: in a ring they would cost a round through a kernel worker thread.
//!
//! The rule that makes the `unsafe` code sound: from the moment an entry is pushed until its
//! completion has been seen, its job stays in its slot, untouched; a queue that is dropped earlier
//! waits, and where it can't, leaks its slots.
#![expect(unsafe_code, reason = "hands pointers to an io_uring")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::buffers::{AlignedBuffer, Part, as_iovecs};
use super::super::{Completion, Queue, Request};
use super::Host;
use super::job::{After, BOUNCE, Job, Step, refusal};
use super::sync::perform;
use crate::allow;
use crate::sandbox::{Allow, Test};

const REGISTER_ENABLE_RINGS: u32 = 12;

/// What the thread needs beside the ring's own operations.
pub const SYSCALLS: &[Allow] = &[
    allow!(io_uring_enter),
    allow!(io_uring_register, 1 => Test::Is(REGISTER_ENABLE_RINGS)),
    // Through the page cache.
    allow!(preadv2),
    allow!(pwritev),
    allow!(pwritev2),
];

const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fallocate::CODE,
    opcode::Fsync::CODE,
];

/// The only file there is, by its place in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// Bounce buffers per queue; requests beyond them wait for one.
const MAX_BOUNCES: usize = 4;

/// How often and how long to wait for the kernel to find memory for a submission.
const SUBMIT_ATTEMPTS: u32 = 1000;
const SUBMIT_PAUSE: Duration = Duration::from_millis(1);

/// See the module.
pub struct UringQueue {
    host: Arc<Host>,
    ring: IoUring,
    enabled: bool,
    ready: EventFd,
    slots: Vec<Option<Job>>,
    free: Vec<u16>,
    /// Slots whose job waits for a bounce buffer.
    waiting: VecDeque<u16>,
    bounces: Vec<AlignedBuffer>,
    bounces_made: usize,
    /// Completed without the ring.
    done: Vec<Completion>,
    /// Entries the kernel has not yet completed.
    in_ring: usize,
    /// The file system can't tell whether a read would wait.
    no_nowait: bool,
}

impl UringQueue {
    /// A queue that holds up to `depth` requests. Fails where the kernel has no io_uring.
    pub fn new(host: Arc<Host>, depth: u16) -> io::Result<Self> {
        let ring = make_ring(depth)?;
        let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_files(&[host.file.as_raw_fd()])?;
        submitter.register_eventfd(ready.as_raw_fd())?;
        let mut restrictions: Vec<_> = OPERATIONS.map(Restriction::sqe_op).into();
        restrictions.push(Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        submitter.register_restrictions(&mut restrictions)?;
        Ok(Self {
            host,
            ring,
            enabled: false,
            ready,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::new(),
            bounces: Vec::new(),
            bounces_made: 0,
            done: Vec::with_capacity(depth.into()),
            in_ring: 0,
            no_nowait: false,
        })
    }

    /// Goes on with the job in `slot` until it waits for the kernel or is done.
    fn advance(&mut self, slot: u16) {
        while let Some(job) = self
            .slots
            .get_mut(usize::from(slot))
            .and_then(Option::as_mut)
        {
            if job.wants_bounce() {
                match take_bounce(&mut self.bounces, &mut self.bounces_made) {
                    Ok(Some(buffer)) => job.lend_bounce(buffer),
                    Ok(None) => {
                        self.waiting.push_back(slot);
                        return;
                    }
                    Err(error) => return self.finish(slot, Err(error)),
                }
            }
            let Some(step) = job.step() else {
                return self.finish(slot, Ok(()));
            };
            let cached = self.host.direct_memory_align.is_none();
            let at_once = match step {
                Step::Read { .. } => cached && !self.no_nowait,
                Step::Write { durable, .. } => cached && !durable,
                Step::Allocate { .. } | Step::Sync => false,
            };
            let result = match at_once.then(|| perform(&self.host.file, step, job, true)) {
                None | Some(Err(Errno::AGAIN)) => return self.submit(slot, step),
                Some(Err(Errno::OPNOTSUPP)) => {
                    self.no_nowait = true;
                    return self.submit(slot, step);
                }
                Some(result) => result,
            };
            if let After::Done(result) = job.finished(result, &self.host) {
                return self.finish(slot, result);
            }
        }
    }

    /// Puts a step into the ring.
    fn submit(&mut self, slot: u16, step: Step) {
        let Some(job) = self
            .slots
            .get_mut(usize::from(slot))
            .and_then(Option::as_mut)
        else {
            return;
        };
        let entry = entry(step, job.parts()).user_data(slot.into());
        // SAFETY: the pointers in the entry are to memory that the job keeps alive, and the job
        // stays in its slot until the completion is seen (see the module).
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.in_ring += 1;
        } else {
            // Can't be: there is an entry for each slot, and a job has one at a time.
            self.finish(slot, Err(Errno::BUSY.into()));
        }
    }

    fn finish(&mut self, slot: u16, result: io::Result<()>) {
        let Some(job) = self.slots.get_mut(usize::from(slot)).and_then(Option::take) else {
            return;
        };
        let (completion, bounce) = job.into_completion(result);
        self.done.push(completion);
        self.free.push(slot);
        self.bounces.extend(bounce);
    }

    /// Enables the ring for this thread on first use, then submits, and waits for `want`
    /// completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
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

    /// Has completions that are ready but not yet in the ring put there.
    fn gather(&mut self) -> io::Result<()> {
        if self.enabled && self.ring.submission().taskrun() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Takes what the kernel has completed, and goes on with those jobs.
    fn harvest(&mut self) -> io::Result<()> {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            self.in_ring = self.in_ring.saturating_sub(1);
            let result = usize::try_from(entry.result())
                .map_err(|_| Errno::from_raw_os_error(entry.result().wrapping_neg()));
            let slot = entry.user_data() as u16;
            let Some(job) = self
                .slots
                .get_mut(usize::from(slot))
                .and_then(Option::as_mut)
            else {
                continue;
            };
            match job.finished(result, &self.host) {
                After::Next => self.advance(slot),
                After::Done(result) => self.finish(slot, result),
            }
        }
        while !self.bounces.is_empty()
            && let Some(slot) = self.waiting.pop_front()
        {
            self.advance(slot);
        }
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }
}

fn make_ring(depth: u16) -> io::Result<IoUring> {
    let entries = u32::from(depth.max(1));
    let modern = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_clamp()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match modern {
        // Linux before 6.1.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .setup_clamp()
            .build(entries),
        other => other,
    }
}

fn take_bounce(
    spare: &mut Vec<AlignedBuffer>,
    made: &mut usize,
) -> io::Result<Option<AlignedBuffer>> {
    if let Some(buffer) = spare.pop() {
        return Ok(Some(buffer));
    }
    if *made >= MAX_BOUNCES {
        return Ok(None);
    }
    let buffer = AlignedBuffer::zeroed(BOUNCE, 4096)?;
    *made += 1;
    Ok(Some(buffer))
}

fn entry(step: Step, parts: &[Part]) -> Entry {
    // The kernel transfers at most 2 GiB less a page at a time; the rest is another step.
    let short = |part: &Part| part.len_bytes().min(0x7fff_f000) as u32;
    match step {
        Step::Read { offset } => match parts {
            [part] => opcode::Read::new(FILE, part.start(), short(part))
                .offset(offset)
                .build(),
            parts => opcode::Readv::new(FILE, as_iovecs(parts), parts.len() as u32)
                .offset(offset)
                .build(),
        },
        Step::Write { offset, durable } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            match parts {
                [part] => opcode::Write::new(FILE, part.start(), short(part))
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                parts => opcode::Writev::new(FILE, as_iovecs(parts), parts.len() as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Step::Allocate { mode, offset, len } => opcode::Fallocate::new(FILE, len)
            .offset(offset)
            .mode(mode)
            .build(),
        Step::Sync => opcode::Fsync::new(FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

impl Queue for UringQueue {
    fn push(&mut self, request: Request) {
        let Some(slot) = self.free.pop() else {
            self.done.push(refusal(request, Errno::BUSY));
            return;
        };
        match Job::new(request, &self.host) {
            Ok(job) => {
                self.slots[usize::from(slot)] = Some(job);
                self.advance(slot);
            }
            Err(refused) => {
                self.free.push(slot);
                self.done.push(refused);
            }
        }
    }

    fn start(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        self.gather()?;
        self.harvest()?;
        completed.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        loop {
            self.harvest()?;
            if !self.done.is_empty() || self.in_ring == 0 {
                completed.append(&mut self.done);
                return Ok(());
            }
            self.enter(1)?;
        }
    }

    fn held(&self) -> usize {
        self.slots.len() - self.free.len() + self.done.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.ready.as_raw_fd())
    }

    fn acknowledge(&mut self) {
        // That completions are ready makes it readable, and that they are put into the ring does so
        // again: not after this. `poll` finds, and reports, what goes wrong here.
        let _ = self.gather();
        // Empty when somebody has been here already.
        let _ = self.ready.read();
    }

    fn syscalls(&self) -> &'static [Allow] {
        SYSCALLS
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        let mut completed = Vec::new();
        while self.in_ring > 0 {
            if self.wait(&mut completed).is_err() {
                // The kernel may still write to what these point to.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicI32};

    use super::*;

    #[test]
    fn the_ring_does_six_operations_on_one_file_and_nothing_else() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let other = tempfile::tempfile().unwrap();
        let host = Arc::new(Host {
            file,
            direct_memory_align: None,
            logical_block: 512,
            block_device: false,
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            lost: AtomicI32::new(0),
        });
        let mut queue = match UringQueue::new(host, 4) {
            Ok(queue) => queue,
            Err(error) => {
                eprintln!("SKIPPED: this kernel has no io_uring ({error})");
                return;
            }
        };
        queue.enter(0).unwrap();
        let mut result = |entry: Entry| {
            // SAFETY: none of these entries points to memory.
            unsafe { queue.ring.submission().push(&entry) }.unwrap();
            queue.ring.submit_and_wait(1).unwrap();
            queue.ring.completion().next().unwrap().result()
        };
        assert_eq!(result(opcode::Fsync::new(FILE).build()), 0);
        let forbidden = [
            opcode::Nop::new().build().flags(Flags::FIXED_FILE),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), std::ptr::null())
                .build()
                .flags(Flags::FIXED_FILE),
            opcode::Fsync::new(types::Fd(other.as_raw_fd())).build(),
            opcode::Fsync::new(FILE).build().flags(Flags::IO_LINK),
        ];
        for entry in forbidden {
            assert_eq!(result(entry), -libc::EACCES);
        }
        assert!(queue.ring.submitter().unregister_files().is_err());
    }
}
