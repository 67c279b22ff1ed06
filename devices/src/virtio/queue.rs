//! A split virtqueue (virtio 1.3 §2.7) in the hands of the worker that serves it.
//!
//! Wraps `virtio_queue::Queue`, which checks every index and address the driver writes, together
//! with the doorbell and the interrupt. Indirect descriptors (§2.7.5.3) are followed by the chain
//! iterator; notification suppression (§2.7.7, §2.7.10) is used in both directions.

use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::QueueInterrupt;
use crate::guest_memory::GuestRam;

/// A chain of descriptors that points into guest RAM.
pub type Chain = DescriptorChain<GuestRam>;

/// The driver broke the rules of the ring; the device needs a reset.
#[derive(Debug, Error)]
#[error("queue {index}: {source}")]
pub struct QueueError {
    index: u16,
    source: virtio_queue::Error,
}

impl From<QueueError> for crate::worker::WorkerError {
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
        let wanted = self
            .queue
            .needs_notification(&*self.memory)
            .map_err(|source| QueueError {
                index: self.index,
                source,
            })?;
        if wanted {
            self.interrupt.trigger();
        }
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
