//! What a queue has under way while its driver is running.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestAddress;

use super::MAX_IN_FLIGHT;
use crate::block::counters::QueueCounters;
use crate::disk::{Buffers, Operation};
use crate::virtio::VirtQueue;
use crate::worker::WorkerError;

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

/// A queue while the driver is running.
pub(super) struct Active {
    pub(super) queue: VirtQueue,
    pub(super) counters: Arc<QueueCounters>,
    /// The least of its tags: those of the engine's requests, of which it has as many as there are
    /// entries in `pending`.
    first_tag: u16,
    pub(super) pending: Vec<Option<Pending>>,
    /// Those of `pending` that are.
    pub(super) free: Vec<u16>,
    /// The weight of what is pending.
    pub(super) in_flight: u64,
    /// How much that may be for more to be taken.
    pub(super) share: u64,
    /// Has failed for lack of space; waits for the timer.
    pub(super) held: Vec<Held>,
    /// Is to be tried again now.
    pub(super) again: VecDeque<Held>,
    /// Something was used since the driver was last interrupted.
    pub(super) unannounced: bool,
    /// Chains wait for a completion.
    pub(super) starved: bool,
}

/// The queues of an activation, each with `depth` tags of its own; `counters` are those of the
/// queues from the number `first` on.
pub(super) fn lanes(
    queues: Vec<VirtQueue>,
    depth: u16,
    first: u16,
    counters: &[Arc<QueueCounters>],
) -> Result<Vec<Active>, WorkerError> {
    let share = MAX_IN_FLIGHT / queues.len().max(1) as u64;
    let lanes = queues.into_iter().enumerate().map(|(lane, queue)| {
        let number = queue.index();
        let counters = (number.checked_sub(first))
            .and_then(|at| counters.get(usize::from(at)))
            .ok_or_else(|| WorkerError(format!("queue {number} is not served here")))?;
        Ok(Active {
            queue,
            counters: counters.clone(),
            // There are no more than the counters, for all of which there are tags.
            first_tag: lane as u16 * depth,
            pending: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            in_flight: 0,
            share,
            held: Vec::new(),
            again: VecDeque::new(),
            unannounced: false,
            starved: false,
        })
    });
    lanes.collect()
}

impl Active {
    /// Whether something must be completed before more can be taken.
    pub(super) fn is_full(&self) -> bool {
        // Each that is held gets a tag again.
        self.free.len() <= self.held.len() + self.again.len() || self.in_flight >= self.share
    }

    /// Whether something of what is to be tried again can be tried now.
    pub(super) fn can_try_again(&self) -> bool {
        !self.again.is_empty() && self.in_flight < self.share
    }

    /// Takes a tag for what is given, if there is one.
    pub(super) fn begin(&mut self, pending: Pending) -> Option<u16> {
        let slot = self.free.pop()?;
        self.in_flight += pending.weight();
        self.pending[usize::from(slot)] = Some(pending);
        Some(self.first_tag + slot)
    }

    /// What has this tag, if it is one of ours and in use.
    pub(super) fn end(&mut self, tag: u16) -> Option<Pending> {
        let slot = tag.checked_sub(self.first_tag)?;
        let pending = self.pending.get_mut(usize::from(slot))?.take()?;
        self.free.push(slot);
        self.in_flight = self.in_flight.saturating_sub(pending.weight());
        Some(pending)
    }
}
