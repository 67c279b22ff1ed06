//! What a queue has under way while its driver is running.

use std::collections::VecDeque;
use std::time::Instant;

use vm_memory::GuestAddress;

use super::MAX_IN_FLIGHT;
use crate::disk::{Buffers, Operation};
use crate::virtio::VirtQueue;

/// A chain that the engine is working on.
pub(super) struct Pending {
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) started: Instant,
    /// The data of a write that the engine does as zeroes.
    pub(super) zeroes: Option<Buffers>,
    /// When it failed for lack of space, for the first time.
    pub(super) held_since: Option<Instant>,
}

impl Pending {
    /// How long it may take, in bytes of a transfer; a hole takes little beside its length.
    pub(super) fn weight(&self) -> u64 {
        match self.operation {
            Operation::Discard => self.length / 64,
            _ => self.length,
        }
    }
}

/// A chain that the engine could not do for lack of space.
pub(super) struct Held {
    pub(super) pending: Pending,
    pub(super) buffers: Buffers,
}

/// The queue while the driver is running.
pub(super) struct Active {
    pub(super) queue: VirtQueue,
    /// By the tag of the engine's request.
    pub(super) pending: Vec<Option<Pending>>,
    pub(super) free: Vec<u16>,
    /// The weight of what is pending.
    pub(super) in_flight: u64,
    /// Has failed for lack of space; waits for the timer.
    pub(super) held: Vec<Held>,
    /// Is to be tried again now.
    pub(super) again: VecDeque<Held>,
    /// Something was used since the driver was last interrupted.
    pub(super) unannounced: bool,
}

impl Active {
    /// Whether something must be completed before more can be taken.
    pub(super) fn is_full(&self) -> bool {
        // Each that is held gets a tag again.
        self.free.len() <= self.held.len() + self.again.len() || self.in_flight >= MAX_IN_FLIGHT
    }
}
