//! The requests of one thread.
//!
//! ```text
//!   request ─► task: look up ─┬─ zeroes ─────────────────────────► filled in
//!                 ▲           ├─ data ────────────► op ──────────► in the guest's memory
//!                 │           ├─ compressed ──────► op ─► inflate ─► copied
//!                 └── slice ──┴─ slice not here ──► op ─► cache
//! ```
//!
//! What a task does is decided in `task`. Ops are done by an io_uring, or where the kernel refuses
//! to make one by the threads of a pool, or without one by plain system calls; through the page
//! cache, what is cached is read at once.
//!
//! The rule that makes the `unsafe` code sound: from the moment an entry is pushed into the ring
//! until its completion has been seen, its op stays in its slot, untouched; a queue that is dropped
//! earlier waits, and where it can't, leaks its ops.
#![expect(unsafe_code, reason = "hands pointers to an io_uring")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::opcode;
use rustix::io::Errno;

use super::super::buffers::{Buffers, read_at};
use super::super::pool::{Pool, Threads, Work};
use super::super::ring::{self, Ring};
use super::super::{Completion, Operation, Queue, Request};
use super::cache::SliceKey;
use super::chain::Chain;
use super::decompress::Inflated;
use super::op::{After, Op, Own, Then, Use};
use super::task::Task;
use crate::allow;
use crate::sandbox::Allow;

/// What the thread of a queue with a ring needs.
pub const URING_SYSCALLS: &[Allow] = &[ring::ENTER, ring::ENABLE, allow!(preadv2)];
/// What the thread of a queue without one needs, and those of its pool.
pub const SYNC_SYSCALLS: &[Allow] = &[allow!(preadv), allow!(preadv2)];

const OPERATIONS: [u8; 2] = [opcode::Read::CODE, opcode::Readv::CODE];

/// Ops at a time, beside one for each request.
const EXTRA_OPS: u16 = 64;

/// Who does the ops.
enum Backend {
    Ring(Box<Ring>),
    Pool(Pool<Op>),
    Plain,
}

impl Work for Op {
    fn perform(&mut self, files: &[Arc<File>]) -> Result<usize, Errno> {
        let file = files.get(usize::from(self.layer)).ok_or(Errno::BADF)?;
        read(file, self, false)
    }
}

/// Reads what is left of an op; `nowait` has it fail with EAGAIN where that would wait for the disk.
fn read(file: &File, op: &Op, nowait: bool) -> Result<usize, Errno> {
    read_at(file.as_fd(), op.buffers.parts(), op.offset, nowait)
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

/// See the module.
pub struct ChainQueue {
    pub(super) chain: Arc<Chain>,
    backend: Backend,
    pub(super) tasks: Vec<Option<Task>>,
    free_tasks: Vec<u16>,
    ops: Vec<Option<Op>>,
    pub(super) free_ops: Vec<u16>,
    /// Tasks to go on with.
    pub(super) ready: VecDeque<u16>,
    /// Tasks that wait for a slice.
    pub(super) waiting: Vec<(SliceKey, u16)>,
    /// Slices that are being read.
    pub(super) loading: Vec<SliceKey>,
    /// Tasks that wait for an op, or for memory.
    pub(super) stalled: VecDeque<u16>,
    pub(super) own_bytes: usize,
    pub(super) spare: Vec<Buffers>,
    done: Vec<Completion>,
    pub(super) inflated: Inflated,
    /// A file system can't tell whether a read would wait.
    no_nowait: bool,
    pub(super) corruption_logged: bool,
}

impl ChainQueue {
    /// A queue that holds up to `depth` requests.
    pub fn new(
        chain: Arc<Chain>,
        depth: u16,
        disable_io_uring: bool,
        threads: Option<&Threads>,
    ) -> io::Result<Self> {
        let count = depth.saturating_add(EXTRA_OPS);
        let files: Vec<RawFd> = chain
            .layers
            .iter()
            .map(|layer| layer.file.as_raw_fd())
            .collect();
        let ring = match disable_io_uring {
            true => None,
            false => ring::unless_refused(Ring::new(count.into(), &files, &OPERATIONS))?,
        };
        let backend = match ring {
            Some(ring) => Backend::Ring(Box::new(ring)),
            None => {
                let files = chain.layers.iter().map(|layer| layer.file.clone());
                let pool = Pool::open(threads, depth, files.collect(), SYNC_SYSCALLS)?;
                pool.map_or(Backend::Plain, Backend::Pool)
            }
        };
        Ok(Self {
            chain,
            backend,
            tasks: (0..depth).map(|_| None).collect(),
            free_tasks: (0..depth).rev().collect(),
            ops: (0..count).map(|_| None).collect(),
            free_ops: (0..count).rev().collect(),
            ready: VecDeque::new(),
            waiting: Vec::new(),
            loading: Vec::new(),
            stalled: VecDeque::new(),
            own_bytes: 0,
            spare: Vec::new(),
            done: Vec::with_capacity(depth.into()),
            inflated: Inflated::default(),
            no_nowait: false,
            corruption_logged: false,
        })
    }

    pub(super) fn recycle(&mut self, mut buffers: Buffers) {
        buffers.clear();
        if self.spare.len() < self.ops.len() {
            self.spare.push(buffers);
        }
    }

    /// Begins an op; there is room for it.
    pub(super) fn start_op(&mut self, task: &mut Task, op: Op) {
        let Some(slot) = self.free_ops.pop() else {
            task.result = Err(Errno::BUSY.into());
            return;
        };
        if let Then::Own(own, _) = &op.then {
            self.own_bytes += own.footprint();
        }
        task.ops += 1;
        self.ops[usize::from(slot)] = Some(op);
        if let Some(result) = self.perform(slot) {
            let result = self.end_op(slot, result);
            task.ops -= 1;
            if task.result.is_ok() {
                task.result = result;
            }
        }
    }

    /// Has the host read, at once or in its own time; the result if it was at once.
    fn perform(&mut self, slot: u16) -> Option<io::Result<()>> {
        let op = self.ops.get_mut(usize::from(slot))?.as_mut()?;
        let layer = self.chain.layers.get(usize::from(op.layer))?;
        loop {
            let waits = matches!(self.backend, Backend::Plain);
            if waits || (layer.direct.is_none() && !self.no_nowait) {
                match read(&layer.file, op, !waits) {
                    Err(Errno::AGAIN) if !waits => {}
                    Err(Errno::OPNOTSUPP) if !waits => self.no_nowait = true,
                    result => match op.finished(result, layer) {
                        After::More => continue,
                        After::Done(result) => return Some(result),
                    },
                }
            }
            let ring = match &mut self.backend {
                Backend::Ring(ring) => ring,
                Backend::Pool(pool) => {
                    let op = self.ops.get_mut(usize::from(slot))?.take()?;
                    pool.push(slot.into(), op);
                    return None;
                }
                Backend::Plain => return None,
            };
            let entry = ring::read(op.layer.into(), op.buffers.parts(), op.offset);
            // SAFETY: the entry points to memory that the op's buffers keep alive, and the op stays
            // in its slot until the completion is seen (see the module).
            if unsafe { ring.push(&entry.user_data(slot.into())) } {
                return None;
            }
            // Can't be: there is an entry for each op.
            return Some(Err(Errno::BUSY.into()));
        }
    }

    /// Puts the bytes of an op that is done where they belong; has those go on who waited.
    fn end_op(&mut self, slot: u16, result: io::Result<()>) -> io::Result<()> {
        let op = self.ops.get_mut(usize::from(slot)).and_then(Option::take);
        let Some(op) = op else {
            return result;
        };
        self.free_ops.push(slot);
        let layer = op.layer;
        let result = match op.then {
            Then::Nothing => result,
            Then::Own(own, purpose) => {
                self.own_bytes = self.own_bytes.saturating_sub(own.footprint());
                self.use_own(layer, &own, purpose, result)
            }
        };
        self.recycle(op.buffers);
        // One is enough: it has the next one go on, unless there is no room for itself.
        self.ready.extend(self.stalled.pop_front());
        result
    }

    fn use_own(
        &mut self,
        layer: u16,
        own: &Own,
        purpose: Use,
        result: io::Result<()>,
    ) -> io::Result<()> {
        match purpose {
            Use::Copy(buffers) => {
                if result.is_ok() {
                    buffers.copy_from(own.bytes());
                }
                self.recycle(buffers);
                result
            }
            Use::Decompress(cluster, within, buffers) => {
                let image = self.chain.layers.get(usize::from(layer));
                let layout = image.and_then(|image| image.layout()).ok_or(Errno::IO)?;
                let result =
                    result.and_then(|()| self.inflated.fill((layer, cluster), layout, own.bytes()));
                if result.is_ok() {
                    self.inflated.copy(within, &buffers);
                }
                self.recycle(buffers);
                result
            }
            Use::Slice(key) => {
                if result.is_ok() {
                    self.chain.slice_read(key, own.bytes());
                }
                self.loading.retain(|other| *other != key);
                // Those who waited try again themselves if it failed.
                let ready = &mut self.ready;
                self.waiting.retain(|(other, task)| {
                    let over = *other == key;
                    if over {
                        ready.push_back(*task);
                    }
                    !over
                });
                result
            }
        }
    }

    pub(super) fn complete(&mut self, number: u16, task: Task) {
        self.free_tasks.push(number);
        self.done.push(Completion {
            tag: task.tag,
            result: task.result,
            buffers: task.buffers,
        });
    }

    /// An op that the host has done, which is in its slot again, and what came of it.
    fn next(&mut self) -> Option<(u16, Result<usize, Errno>)> {
        match &mut self.backend {
            Backend::Ring(ring) => ring.next().map(|(slot, result)| (slot as u16, result)),
            Backend::Pool(pool) => {
                let (slot, op, result) = pool.take()?;
                if let Some(place) = self.ops.get_mut(slot) {
                    *place = Some(op);
                }
                Some((slot as u16, result))
            }
            Backend::Plain => None,
        }
    }

    /// Takes what the host has done, and goes on with those tasks.
    fn harvest(&mut self) -> io::Result<()> {
        while let Some((slot, result)) = self.next() {
            let Some(Some(op)) = self.ops.get_mut(usize::from(slot)) else {
                continue;
            };
            let number = op.task;
            let Some(layer) = self.chain.layers.get(usize::from(op.layer)) else {
                continue;
            };
            let ended = match op.finished(result, layer) {
                After::More => self.perform(slot),
                After::Done(result) => Some(result),
            };
            let Some(result) = ended else {
                continue;
            };
            let result = self.end_op(slot, result);
            if let Some(Some(task)) = self.tasks.get_mut(usize::from(number)) {
                task.ops = task.ops.saturating_sub(1);
                if task.result.is_ok() {
                    task.result = result;
                }
            }
            self.ready.push_back(number);
            self.run();
        }
        self.start()
    }

    fn in_flight(&self) -> usize {
        match &self.backend {
            Backend::Ring(ring) => ring.in_flight(),
            Backend::Pool(pool) => pool.in_flight(),
            Backend::Plain => 0,
        }
    }

    fn check(&self, request: &Request) -> Result<(), Errno> {
        match request.operation {
            Operation::Flush => return Ok(()),
            Operation::Read => {}
            _ => return Err(Errno::ROFS),
        }
        let end = request.offset.checked_add(request.length);
        let inside = end.is_some_and(|end| end <= self.chain.size_bytes());
        match inside && request.buffers.len_bytes() == request.length {
            true => Ok(()),
            false => Err(Errno::INVAL),
        }
    }
}

impl Queue for ChainQueue {
    fn push(&mut self, request: Request) {
        let checked = self.check(&request);
        let reading = request.operation == Operation::Read;
        let number = match self.free_tasks.last() {
            None => Err(Errno::BUSY),
            Some(number) => checked.map(|()| *number),
        };
        match number {
            Ok(number) if reading => {
                self.free_tasks.pop();
                self.tasks[usize::from(number)] = Some(Task {
                    tag: request.tag,
                    position: request.offset,
                    left: request.length,
                    buffers: request.buffers,
                    ops: 0,
                    result: Ok(()),
                });
                self.ready.push_back(number);
                self.run();
            }
            other => self.done.push(Completion {
                tag: request.tag,
                result: other.map(drop).map_err(Into::into),
                buffers: request.buffers,
            }),
        }
    }

    fn start(&mut self) -> io::Result<()> {
        match &mut self.backend {
            Backend::Ring(ring) => ring.start(),
            _ => Ok(()),
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
                Backend::Plain => {}
            }
        }
    }

    fn held(&self) -> usize {
        self.tasks.len() - self.free_tasks.len() + self.done.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        match &self.backend {
            Backend::Ring(ring) => Some(ring.descriptor()),
            Backend::Pool(pool) => Some(pool.descriptor()),
            Backend::Plain => None,
        }
    }

    fn acknowledge(&mut self) {
        match &mut self.backend {
            Backend::Ring(ring) => ring.acknowledge(),
            Backend::Pool(pool) => pool.acknowledge(),
            Backend::Plain => {}
        }
    }

    fn syscalls(&self) -> &'static [Allow] {
        match self.backend {
            Backend::Ring(_) => URING_SYSCALLS,
            Backend::Pool(_) | Backend::Plain => SYNC_SYSCALLS,
        }
    }
}

impl Drop for ChainQueue {
    fn drop(&mut self) {
        let mut completed = Vec::new();
        while self.in_flight() > 0 {
            if self.wait(&mut completed).is_err() {
                // The kernel may still write to what these point to.
                std::mem::forget(std::mem::take(&mut self.ops));
                return;
            }
        }
    }
}
