//! From the engine to the used ring: status byte, counters, the chain given back, one interrupt for
//! all.

use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};

use super::QueueHandler;
use super::active::Active;
use crate::block::hold::is_no_space;
use crate::block::request::Status;
use crate::disk::{Completion, Operation};
use crate::event::HoldOutcome;
use crate::worker::WorkerError;

impl QueueHandler {
    /// Gives the driver back what the engine has done.
    pub(super) fn collect(&mut self) -> Result<(), WorkerError> {
        let polled = self.engine.poll(&mut self.completed);
        polled.map_err(|e| self.fail("asking the disk for completions", e))?;
        self.deliver()
    }

    pub(super) fn deliver(&mut self) -> Result<(), WorkerError> {
        if !self.completed.is_empty() {
            let now = Instant::now();
            let mut completed = std::mem::take(&mut self.completed);
            for completion in completed.drain(..) {
                self.complete(completion, now)?;
            }
            self.completed = completed;
        }
        for active in &mut self.active {
            if std::mem::take(&mut active.unannounced) {
                active.queue.notify()?;
            }
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion, now: Instant) -> Result<(), WorkerError> {
        let mut buffers = completion.buffers;
        let lane = usize::from(completion.tag / self.common.queue_size);
        let active = self.active.get_mut(lane);
        let Some(mut pending) = active.and_then(|active| active.end(completion.tag)) else {
            self.recycle(buffers);
            return Ok(());
        };
        if let Some(data) = pending.zeroes.take() {
            self.recycle(std::mem::replace(&mut buffers, data));
        }
        let result = match completion.result {
            Err(error) if self.common.hold.wants(&error, pending.held_since, now) => {
                match self.hold(lane, pending, buffers, &error, now) {
                    Some((its, buffers)) => {
                        pending = its;
                        self.recycle(buffers);
                    }
                    None => return Ok(()),
                }
                Err(error)
            }
            result => {
                self.recycle(buffers);
                result
            }
        };
        let flushed = pending.operation == Operation::Flush;
        let result = match flushed && self.common.flush_lost.swap(false, Ordering::SeqCst) {
            true => result.and(Err(Errno::IO.into())),
            false => result,
        };
        // Only a hint, which there is no sense in waiting with.
        let result = match result {
            Err(error) if pending.operation == Operation::Discard && is_no_space(&error) => Ok(()),
            result => result,
        };
        if pending.held_since.is_some() {
            let outcome = match &result {
                Ok(()) => HoldOutcome::Done,
                Err(_) => HoldOutcome::Reported,
            };
            self.common.hold.ended(pending.length, outcome);
        }
        let (status, written) = match result {
            Ok(()) => {
                let latency = now.saturating_duration_since(pending.started);
                if let Some(Active { counters, .. }) = self.active.get(lane) {
                    match pending.operation {
                        Operation::Read => counters.read.count(pending.length, latency),
                        Operation::Write { .. } => counters.write.count(pending.length, latency),
                        _ => {}
                    }
                }
                match pending.operation {
                    // A chain has less than 4 GiB.
                    Operation::Read => (Status::Ok, pending.length as u32),
                    _ => (Status::Ok, 0),
                }
            }
            Err(error) => {
                let operation = pending.operation.name();
                self.common
                    .reporter
                    .io_error(operation, pending.offset, &error);
                (Status::IoErr, 0)
            }
        };
        self.answer(lane, pending.head, pending.status, status, written)
    }

    /// Writes the status byte and gives the chain back, with `written` bytes of data in it.
    pub(super) fn answer(
        &mut self,
        lane: usize,
        head: u16,
        address: GuestAddress,
        status: Status,
        written: u32,
    ) -> Result<(), WorkerError> {
        if let Some(active) = self.active.get(lane) {
            active
                .queue
                .memory()
                .write_obj(status as u8, address)
                .map_err(|e| WorkerError::new("writing a status byte", e))?;
        }
        self.give_back(lane, head, written.saturating_add(1))
    }

    pub(super) fn give_back(
        &mut self,
        lane: usize,
        head: u16,
        len: u32,
    ) -> Result<(), WorkerError> {
        if let Some(active) = self.active.get_mut(lane) {
            active.queue.push_used(head, len)?;
            active.unannounced = true;
        }
        Ok(())
    }
}
