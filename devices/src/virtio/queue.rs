//! A split virtqueue (virtio 1.3 §2.7) in the hands of the worker that serves it.
//!
//! Wraps `virtio_queue::Queue`, which checks every index and address the driver writes, together
//! with the doorbell and the interrupt. Indirect descriptors (§2.7.5.3) are followed by the chain
//! iterator; notification suppression (§2.7.7, §2.7.10) is used in both directions.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::QueueInterrupt;
use crate::guest_memory::GuestRam;
use crate::worker::WorkerError;

/// A chain of descriptors that points into guest RAM.
pub type Chain = DescriptorChain<GuestRam>;

/// The driver broke the rules of the ring; the device needs a reset.
#[derive(Debug, Error)]
#[error("queue {index}: {source}")]
pub struct QueueError {
    index: u16,
    source: virtio_queue::Error,
}

impl From<QueueError> for WorkerError {
    fn from(error: QueueError) -> Self {
        Self(error.to_string())
    }
}

/// A queue that the driver has set up and enabled.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: GuestRam,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn QueueInterrupt>,
}

impl VirtQueue {
    /// A queue whose rings the transport has found to lie in guest memory.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GuestRam,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn QueueInterrupt>,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            kick,
            interrupt,
        }
    }

    /// The queue's number on the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many descriptors the driver chose.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The memory the chains point into.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// The doorbell.
    pub fn kick(&self) -> Arc<EventFd> {
        self.kick.clone()
    }

    /// The next chain the driver made available, if any.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let index = self.index;
        match self.queue.iter(self.memory.clone()) {
            Ok(mut chains) => Ok(chains.next()),
            Err(source) => Err(QueueError { index, source }),
        }
    }

    /// Takes back the chain [`VirtQueue::pop`] gave last, to be popped again later.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver with `len` bytes written into it.
    pub fn push_used(&mut self, head_index: u16, len: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(&*self.memory, head_index, len)
            .map_err(|source| QueueError {
                index: self.index,
                source,
            })
    }

    /// Interrupts the driver if it wants to know of what was used since the last time.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let index = self.index;
        let fail = |source| QueueError { index, source };
        // This has a full fence between what was used and what the driver says it wants.
        let wanted = self.queue.needs_notification(&*self.memory).map_err(fail)?;
        if wanted && !self.interrupts_suppressed().map_err(fail)? {
            self.interrupt.trigger();
        }
        Ok(())
    }

    /// VIRTQ_AVAIL_F_NO_INTERRUPT (§2.7.7), which counts only without EVENT_IDX.
    fn interrupts_suppressed(&self) -> Result<bool, virtio_queue::Error> {
        if self.queue.event_idx_enabled() {
            return Ok(false);
        }
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    /// Rings the doorbell in the driver's stead: the worker's loop comes back to this queue, after
    /// it has heard its orders.
    pub fn ring(&self) {
        // Fails only when the counter is full, and then it rings anyway.
        let _ = self.kick.write(1);
    }

    /// Serves chains one by one until there are none left, with the driver's doorbell off
    /// meanwhile. A driver that adds chains as fast as they are served does not keep the worker
    /// from its orders: after twice the size of the queue the rest waits for the next
    /// [`VirtQueue::ring`], which this gives itself.
    pub fn serve(
        &mut self,
        mut serve_one: impl FnMut(&mut Self, Chain) -> Result<(), WorkerError>,
    ) -> Result<(), WorkerError> {
        self.disable_kicks()?;
        for _ in 0..2 * u32::from(self.size()) {
            match self.pop()? {
                Some(chain) => serve_one(self, chain)?,
                None if self.enable_kicks()? => self.disable_kicks()?,
                None => return Ok(()),
            }
        }
        self.ring();
        Ok(())
    }

    /// Asks the driver to ring from now on; true when chains came in meanwhile and must be
    /// popped first.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&*self.memory)
            .map_err(|source| QueueError {
                index: self.index,
                source,
            })
    }

    /// Tells the driver that it need not ring while the queue is being served anyway.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&*self.memory)
            .map_err(|source| QueueError {
                index: self.index,
                source,
            })
    }
}
