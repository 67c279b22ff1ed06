//! The raw engine by plain system calls: each request is done when it is pushed, on the queue's own
//! thread, which waits for the disk meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::super::buffers::{AlignedBuffer, read_at, write_at};
use super::super::{Completion, Queue, Request};
use super::Host;
use super::job::{AGAIN_PAUSE, After, BOUNCE, Job, PUNCH_HOLE, Step, ZERO_RANGE, refusal};
use crate::allow;
use crate::sandbox::{Allow, Test};

/// What reads, writes, syncs and allocations need.
pub const SYSCALLS: &[Allow] = &[
    allow!(preadv),
    allow!(preadv2),
    allow!(pwritev),
    allow!(pwritev2),
    allow!(fdatasync),
    allow!(fallocate, 1 => Test::Is(PUNCH_HOLE as u32)),
    allow!(fallocate, 1 => Test::Is(ZERO_RANGE as u32)),
];

/// See the module.
pub struct SyncQueue {
    host: Arc<Host>,
    depth: usize,
    done: Vec<Completion>,
    bounce: Option<AlignedBuffer>,
}

impl SyncQueue {
    /// A queue that holds up to `depth` requests.
    pub fn new(host: Arc<Host>, depth: u16) -> Self {
        Self {
            host,
            depth: depth.into(),
            done: Vec::with_capacity(depth.into()),
            bounce: None,
        }
    }

    fn run(&mut self, job: &mut Job) -> io::Result<()> {
        loop {
            if job.wants_bounce() {
                let buffer = match self.bounce.take() {
                    Some(buffer) => buffer,
                    None => AlignedBuffer::zeroed(BOUNCE, 4096)?,
                };
                job.lend_bounce(buffer);
            }
            let Some(step) = job.step() else {
                return Ok(());
            };
            let result = perform(&self.host.file, step, job, false);
            match job.finished(result, &self.host) {
                After::Done(result) => return result,
                After::Next => {}
                After::Again => std::thread::sleep(AGAIN_PAUSE),
            }
        }
    }
}

/// Does a step; `nowait` has reads fail with EAGAIN where they would wait for the disk.
pub fn perform(file: &File, step: Step, job: &mut Job, nowait: bool) -> Result<usize, Errno> {
    let bytes = |result: io::Result<usize>| {
        result.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
    };
    match step {
        Step::Read { offset } => bytes(read_at(file.as_fd(), job.parts(), offset, nowait)),
        Step::Write { offset, durable } => {
            bytes(write_at(file.as_fd(), job.parts(), offset, durable))
        }
        Step::Allocate { mode, offset, len } => {
            let mode = FallocateFlags::from_bits_retain(mode as u32);
            rustix::fs::fallocate(file, mode, offset, len).map(|()| 0)
        }
        Step::Sync => rustix::fs::fdatasync(file).map(|()| 0),
    }
}

impl Queue for SyncQueue {
    fn push(&mut self, request: Request) {
        if self.done.len() >= self.depth {
            self.done.push(refusal(request, Errno::BUSY));
            return;
        }
        let completion = match Job::new(request, &self.host) {
            Ok(mut job) => {
                let result = self.run(&mut job);
                let (completion, bounce) = job.into_completion(result);
                self.bounce = self.bounce.take().or(bounce);
                completion
            }
            Err(refused) => refused,
        };
        self.done.push(completion);
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        completed.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        self.poll(completed)
    }

    fn held(&self) -> usize {
        self.done.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    fn acknowledge(&mut self) {}

    fn syscalls(&self) -> &'static [Allow] {
        SYSCALLS
    }
}
