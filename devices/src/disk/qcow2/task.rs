//! What a request does, step by step.
//!
//! A task starts an op for each piece of its range and goes on to the next piece without waiting;
//! it waits only for a slice, or for room.

use std::io;

use rustix::io::Errno;

use super::super::buffers::Buffers;
use super::cache::SliceKey;
use super::chain::{Chain, Found, Lookup};
use super::op::{Op, Use};
use super::queue::ChainQueue;

/// The most bytes that go through memory of our own in one op.
const BOUNCE: u64 = 256 << 10;
/// Beyond this much memory of our own, ops wait for others to end.
const OWN_BYTES: usize = 8 << 20;

/// A request on its way.
pub struct Task {
    pub tag: u16,
    /// What is left to be looked up, and the memory it goes to.
    pub position: u64,
    pub left: u64,
    pub buffers: Buffers,
    /// Ops that have been started and have not ended.
    pub ops: usize,
    pub result: io::Result<()>,
}

/// Why a task can't go on at once.
enum Pause {
    /// Until an op ends.
    Stalled,
    /// Until this slice is here.
    Slice(SliceKey),
    /// Not at all.
    Failed(io::Error),
}

impl From<io::Error> for Pause {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl ChainQueue {
    /// Goes on with all tasks that can.
    pub(super) fn run(&mut self) {
        while let Some(number) = self.ready.pop_front() {
            let slot = self.tasks.get_mut(usize::from(number));
            let mut stalled = false;
            if let Some(mut task) = slot.and_then(Option::take) {
                stalled = self.advance(number, &mut task);
                match task.ops == 0 && (task.left == 0 || task.result.is_err()) {
                    true => self.complete(number, task),
                    false => self.tasks[usize::from(number)] = Some(task),
                }
            }
            // Not all of those that wait look again each time an op ends: there may be thousands.
            if !stalled {
                self.ready.extend(self.stalled.pop_front());
            }
        }
    }

    /// Starts ops for a task until there is nothing left to start, or it has to wait; whether that
    /// is for room.
    fn advance(&mut self, number: u16, task: &mut Task) -> bool {
        while task.left > 0 && task.result.is_ok() {
            match self.step(number, task) {
                Ok(()) => {}
                Err(Pause::Failed(error)) => task.result = Err(error),
                Err(Pause::Stalled) => {
                    if !self.stalled.contains(&number) {
                        self.stalled.push_back(number);
                    }
                    return true;
                }
                Err(Pause::Slice(key)) => {
                    if !self.waiting.contains(&(key, number)) {
                        self.waiting.push((key, number));
                    }
                    return false;
                }
            }
        }
        false
    }

    /// Looks up the next piece of a task's range and does what there is to do.
    fn step(&mut self, number: u16, task: &mut Task) -> Result<(), Pause> {
        let chain = self.chain.clone();
        match chain.look_up(task.position, task.left) {
            Lookup::Missing(key) => self.load(&chain, number, task, key),
            Lookup::Corrupt(layer) => Err(self.corrupt(layer, task.position)),
            Lookup::Found(Found::Zero, span) => {
                let buffers = self.take(task, span);
                buffers.zero();
                self.recycle(buffers);
                Ok(())
            }
            Lookup::Found(Found::Data(layer, offset), span) => {
                self.read(&chain, number, task, layer, offset, span)
            }
            Lookup::Found(Found::Compressed(layer, cluster, within), span) => {
                if self.inflated.holds((layer, cluster)) {
                    let buffers = self.take(task, span);
                    self.inflated.copy(within, &buffers);
                    self.recycle(buffers);
                    return Ok(());
                }
                self.room(cluster.len)?;
                let host = chain.layers.get(usize::from(layer));
                let host = host.ok_or(io::Error::from(Errno::IO))?;
                let buffers = self.take(task, span);
                let purpose = Use::Decompress(cluster, within, buffers);
                let ids = (number, layer);
                let op = Op::own(ids, host, cluster.offset, cluster.len, purpose)?;
                self.start_op(task, op);
                Ok(())
            }
        }
    }

    /// The metadata of a layer contradicts itself. Said once: the guest may ask again and again.
    fn corrupt(&mut self, layer: u16, position: u64) -> Pause {
        if !std::mem::replace(&mut self.corruption_logged, true) {
            tracing::error!(layer, offset = position, "the qcow2 image is corrupt");
        }
        Pause::Failed(Errno::IO.into())
    }

    /// Begins to read a slice, unless somebody does already.
    fn load(
        &mut self,
        chain: &Chain,
        number: u16,
        task: &mut Task,
        key: SliceKey,
    ) -> Result<(), Pause> {
        if self.loading.contains(&key) {
            return Err(Pause::Slice(key));
        }
        let len = chain.slice_bytes(key.layer);
        self.room(len)?;
        let host = chain.layers.get(usize::from(key.layer));
        let host = host.ok_or(io::Error::from(Errno::IO))?;
        if key.offset.saturating_add(len as u64) > host.file_bytes {
            return Err(self.corrupt(key.layer, task.position));
        }
        let ids = (number, key.layer);
        let op = Op::own(ids, host, key.offset, len, Use::Slice(key))?;
        self.loading.push(key);
        self.start_op(task, op);
        match self.loading.contains(&key) {
            true => Err(Pause::Slice(key)),
            // It was read at once.
            false => Ok(()),
        }
    }

    /// Begins to read data.
    fn read(
        &mut self,
        chain: &Chain,
        number: u16,
        task: &mut Task,
        layer: u16,
        offset: u64,
        span: u64,
    ) -> Result<(), Pause> {
        let host = chain.layers.get(usize::from(layer));
        let host = host.ok_or(io::Error::from(Errno::IO))?;
        let straight = host.direct.is_none_or(|direct| {
            (offset | span).is_multiple_of(direct.file.into())
                && task.buffers.is_aligned(direct.memory, direct.file)
        });
        if straight {
            self.room(0)?;
            let buffers = self.take(task, span);
            self.start_op(task, Op::straight(number, layer, offset, buffers));
            return Ok(());
        }
        let span = span.min(BOUNCE);
        self.room(span as usize)?;
        let buffers = self.take(task, span);
        let ids = (number, layer);
        let op = Op::own(ids, host, offset, span as usize, Use::Copy(buffers))?;
        self.start_op(task, op);
        Ok(())
    }

    /// Whether there is room for another op with `own` bytes of memory. Where there is none, some
    /// op is on its way, and makes room when it ends.
    fn room(&self, own: usize) -> Result<(), Pause> {
        let memory = own == 0 || self.own_bytes == 0 || self.own_bytes + own <= OWN_BYTES;
        match memory && !self.free_ops.is_empty() {
            true => Ok(()),
            false => Err(Pause::Stalled),
        }
    }

    /// The memory for the next `span` bytes of a task, which goes on behind them.
    fn take(&mut self, task: &mut Task, span: u64) -> Buffers {
        let mut buffers = self.spare.pop().unwrap_or_default();
        task.buffers.split_to(span, &mut buffers);
        task.position += span;
        task.left = task.left.saturating_sub(span);
        buffers
    }
}
