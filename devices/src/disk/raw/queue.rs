//! The raw engine over an io_uring, or over the threads of a pool.
//!
//! The ring ([`super::super::ring`]) does six operations on one file. To a pool
//! ([`super::super::pool`]) a job moves for each of its steps.
//!
//! Through the page cache, reads of what is cached and writes are done at once by plain system
//! calls: they would cost a round through a thread of the kernel, or of ours.
//!
//! The rule that makes the `unsafe` code sound: from the moment an entry is pushed until its
//! completion has been seen, its job stays in its slot, untouched; a queue that is dropped earlier
//! waits, and where it can't, leaks its slots.
#![expect(unsafe_code, reason = "hands pointers to an io_uring")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use rustix::io::Errno;

use super::super::buffers::{AlignedBuffer, Part, as_iovecs};
use super::super::pool::{Pool, Work};
use super::super::ring::{self, Ring, short};
use super::super::{Completion, Queue, Request};
use super::Host;
use super::job::{AGAIN_PAUSE, After, BOUNCE, Job, Step, refusal};
use super::sync::{self, perform};
use crate::allow;
use crate::sandbox::Allow;

/// What the thread of a queue with a ring needs beside the ring's own operations.
pub const SYSCALLS: &[Allow] = &[
    ring::ENTER,
    ring::ENABLE,
    // Through the page cache.
    allow!(preadv2),
    allow!(pwritev),
    allow!(pwritev2),
];

/// The only file there is, by its place in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// Bounce buffers per queue; requests beyond them wait for one.
const MAX_BOUNCES: usize = 4;

/// A ring for a queue of `depth` requests. Fails where the kernel has no io_uring.
pub fn ring(host: &Host, depth: u16) -> io::Result<Ring> {
    Ring::new(depth.into(), &[host.file.as_raw_fd()], &ring::OPERATIONS)
}

/// A step of a job, on its way through a pool.
pub struct Piece {
    job: Job,
    step: Step,
}

impl Work for Piece {
    fn perform(&mut self, files: &[Arc<File>]) -> Result<usize, Errno> {
        let file = files.first().ok_or(Errno::BADF)?;
        perform(file, self.step, &mut self.job, false)
    }
}

/// Who does the steps.
pub enum Backend {
    Ring(Box<Ring>),
    Pool(Box<Pool<Piece>>),
}

impl From<Ring> for Backend {
    fn from(ring: Ring) -> Self {
        Self::Ring(Box::new(ring))
    }
}

impl From<Pool<Piece>> for Backend {
    fn from(pool: Pool<Piece>) -> Self {
        Self::Pool(Box::new(pool))
    }
}

/// See the module.
pub struct RawQueue {
    host: Arc<Host>,
    backend: Backend,
    /// Empty while a pool is at the job.
    slots: Vec<Option<Job>>,
    free: Vec<u16>,
    /// Slots whose job waits for a bounce buffer.
    waiting: VecDeque<u16>,
    bounces: Vec<AlignedBuffer>,
    bounces_made: usize,
    /// Completed, and not yet given back.
    done: Vec<Completion>,
    /// The file system can't tell whether a read would wait.
    no_nowait: bool,
}

impl RawQueue {
    /// A queue that holds up to `depth` requests, as many as the backend has room for.
    pub fn new(host: Arc<Host>, depth: u16, backend: Backend) -> Self {
        Self {
            host,
            backend,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::new(),
            bounces: Vec::new(),
            bounces_made: 0,
            done: Vec::with_capacity(depth.into()),
            no_nowait: false,
        }
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
            match job.finished(result, &self.host) {
                After::Done(result) => return self.finish(slot, result),
                After::Next => {}
                After::Again => std::thread::sleep(AGAIN_PAUSE),
            }
        }
    }

    /// Has the host do a step in its own time.
    fn submit(&mut self, slot: u16, step: Step) {
        let Some(place) = self.slots.get_mut(usize::from(slot)) else {
            return;
        };
        let ring = match &mut self.backend {
            Backend::Ring(ring) => ring,
            Backend::Pool(pool) => {
                if let Some(job) = place.take() {
                    pool.push(slot.into(), Piece { job, step });
                }
                return;
            }
        };
        let Some(job) = place else {
            return;
        };
        let entry = entry(step, job.parts()).user_data(slot.into());
        // SAFETY: the pointers in the entry are to memory that the job keeps alive, and the job
        // stays in its slot until the completion is seen (see the module).
        if !unsafe { ring.push(&entry) } {
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

    /// A job of which the host has done a step, which is in its slot again, and the result.
    fn next(&mut self) -> Option<(u16, Result<usize, Errno>)> {
        match &mut self.backend {
            Backend::Ring(ring) => ring.next().map(|(slot, result)| (slot as u16, result)),
            Backend::Pool(pool) => {
                let (slot, piece, result) = pool.take()?;
                if let Some(place) = self.slots.get_mut(slot) {
                    *place = Some(piece.job);
                }
                Some((slot as u16, result))
            }
        }
    }

    fn in_flight(&self) -> usize {
        match &self.backend {
            Backend::Ring(ring) => ring.in_flight(),
            Backend::Pool(pool) => pool.in_flight(),
        }
    }

    /// Takes what the host has done, and goes on with those jobs.
    fn harvest(&mut self) -> io::Result<()> {
        while let Some((slot, result)) = self.next() {
            let Some(job) = self
                .slots
                .get_mut(usize::from(slot))
                .and_then(Option::as_mut)
            else {
                continue;
            };
            match job.finished(result, &self.host) {
                After::Next => self.advance(slot),
                After::Again => {
                    std::thread::sleep(AGAIN_PAUSE);
                    self.advance(slot);
                }
                After::Done(result) => self.finish(slot, result),
            }
        }
        while !self.bounces.is_empty()
            && let Some(slot) = self.waiting.pop_front()
        {
            self.advance(slot);
        }
        self.start()
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
    match step {
        Step::Read { offset } => ring::read(FILE.0, parts, offset),
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

impl Queue for RawQueue {
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
        match &mut self.backend {
            Backend::Ring(ring) => ring.start(),
            Backend::Pool(_) => Ok(()),
        }
    }

    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        if let Backend::Ring(ring) = &mut self.backend {
            ring.fetch()?;
        }
        self.harvest()?;
        completed.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        loop {
            self.harvest()?;
            if !self.done.is_empty() || self.in_flight() == 0 {
                completed.append(&mut self.done);
                return Ok(());
            }
            match &mut self.backend {
                Backend::Ring(ring) => ring.enter(1)?,
                Backend::Pool(pool) => pool.wait(),
            }
        }
    }

    fn held(&self) -> usize {
        self.slots.len() - self.free.len() + self.done.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(match &self.backend {
            Backend::Ring(ring) => ring.descriptor(),
            Backend::Pool(pool) => pool.descriptor(),
        })
    }

    fn acknowledge(&mut self) {
        match &mut self.backend {
            Backend::Ring(ring) => ring.acknowledge(),
            Backend::Pool(pool) => pool.acknowledge(),
        }
    }

    fn syscalls(&self) -> &'static [Allow] {
        match &self.backend {
            Backend::Ring(_) => SYSCALLS,
            Backend::Pool(_) => sync::SYSCALLS,
        }
    }
}

impl Drop for RawQueue {
    fn drop(&mut self) {
        let mut completed = Vec::new();
        while self.in_flight() > 0 {
            if self.wait(&mut completed).is_err() {
                // The kernel may still write to what these point to.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
        }
    }
}
