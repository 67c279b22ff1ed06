//! From the available ring to the engine: pop, parse, admit, submit.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_DISCARD;

use super::QueueHandler;
use super::active::Pending;
use crate::block::config::DetectZeroes;
use crate::block::request::{Action, Limits, Malformed, Status};
use crate::block::shared::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, bit, seg_max};
use crate::disk::{Buffers, Operation, Request};
use crate::worker::WorkerError;

/// Chains taken before those done are given back, where the engine blocks.
const BLOCKING_BATCH: usize = 16;
/// Batches served in a row before orders are looked at: a driver that never stops adding chains
/// must not keep its device from being paused.
const ROUNDS: usize = 8;
/// Seconds between log lines about chains that make no sense.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Why popping stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    Empty,
    BatchFull,
    Full,
    Throttled,
}

impl QueueHandler {
    /// Takes what the driver has made available in all queues, those first whose turn it is.
    pub(super) fn serve_all(&mut self) -> Result<(), WorkerError> {
        let (first, count) = (self.turn, self.active.len());
        for lane in (first..count).chain(0..first.min(count)) {
            self.serve(lane)?;
        }
        Ok(())
    }

    /// Takes what the driver has made available in a queue, until there is nothing or nothing more
    /// can be taken.
    pub(super) fn serve(&mut self, lane: usize) -> Result<(), WorkerError> {
        self.taken = 0;
        // A driver that has just come is served when the worker goes on; the limiter's timer serves
        // all queues.
        if self.frozen || self.throttled {
            return Ok(());
        }
        let mut admitted = false;
        for _ in 0..ROUNDS {
            let Some(active) = self.active.get_mut(lane) else {
                return Ok(());
            };
            if self.taken >= active.share {
                break;
            }
            active.queue.disable_kicks()?;
            let stop = self.take_batch(lane)?;
            admitted |= self.taken > 0;
            self.engine
                .start()
                .map_err(|e| self.fail("submitting to the disk", e))?;
            self.collect()?;
            let Some(active) = self.active.get_mut(lane) else {
                return Ok(());
            };
            active.starved = false;
            match stop {
                Stop::Empty => {
                    if !active.queue.enable_kicks()? {
                        return Ok(());
                    }
                }
                Stop::Full if active.is_full() => {
                    active.starved = true;
                    return Ok(());
                }
                Stop::Full | Stop::BatchFull => {}
                Stop::Throttled => {
                    self.throttled = true;
                    // The turn is the next one's as soon as one has got something.
                    self.turn = lane + usize::from(admitted);
                    return Ok(());
                }
            }
        }
        if let Some(active) = self.active.get(lane) {
            // Come back after having listened to orders.
            active.queue.ring();
        }
        Ok(())
    }

    /// Pops chains and gives them to the engine.
    fn take_batch(&mut self, lane: usize) -> Result<Stop, WorkerError> {
        let now = Instant::now();
        let limits = self.limits();
        let batch = match self.engine.descriptor() {
            Some(_) => usize::from(self.common.queue_size),
            None => BLOCKING_BATCH,
        };
        for _ in 0..batch {
            let Some(active) = self.active.get_mut(lane) else {
                break;
            };
            if active.is_full() {
                return Ok(Stop::Full);
            }
            let Some(chain) = active.queue.pop()? else {
                return Ok(Stop::Empty);
            };
            let head = chain.head_index();
            let mut buffers = self.spare.pop().unwrap_or_default();
            let parsed = self
                .parser
                .parse(chain, active.queue.memory(), &limits, &mut buffers);
            match parsed {
                Err(malformed) => {
                    self.recycle(buffers);
                    self.log(malformed);
                    self.give_back(lane, head, 0)?;
                }
                Ok(parsed) => match parsed.action {
                    Action::Refuse(status) => {
                        self.recycle(buffers);
                        self.answer(lane, head, parsed.status, status, 0)?;
                    }
                    Action::GetId => {
                        let written = buffers.copy_from(&self.common.serial);
                        self.recycle(buffers);
                        self.answer(lane, head, parsed.status, Status::Ok, written as u32)?;
                    }
                    Action::Submit {
                        operation,
                        offset,
                        length,
                    } => {
                        if let Err(wait) = self.admit(operation, length) {
                            self.recycle(buffers);
                            if let Some(active) = self.active.get_mut(lane) {
                                active.queue.undo_pop();
                            }
                            self.timer
                                .set(wait)
                                .map_err(|e| WorkerError::new("setting the limiter's timer", e))?;
                            return Ok(Stop::Throttled);
                        }
                        self.submit(
                            lane,
                            Pending {
                                head,
                                status: parsed.status,
                                operation,
                                offset,
                                length,
                                started: now,
                                zeroes: None,
                                held_since: None,
                            },
                            buffers,
                        );
                    }
                },
            }
        }
        Ok(Stop::BatchFull)
    }

    fn limits(&self) -> Limits {
        let shared = &self.common.shared;
        Limits {
            capacity_sectors: shared.capacity_sectors(),
            readonly: shared.readonly(),
            sparse: shared.features & bit(VIRTIO_BLK_F_DISCARD) != 0,
            writethrough: shared.writethrough(),
            // Header and status, each split as finely as can be, beside the data.
            max_descriptors: seg_max(self.common.queue_size) as usize + 17,
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS,
        }
    }

    fn admit(&self, operation: Operation, length: u64) -> Result<(), Duration> {
        let Some(limiter) = &self.common.limiter else {
            return Ok(());
        };
        let bytes = match operation {
            Operation::Read | Operation::Write { .. } => length,
            // They move no data; they count as operations.
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => 0,
        };
        limiter
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .admit(bytes, self.common.epoch.elapsed())
    }

    pub(super) fn submit(&mut self, lane: usize, mut pending: Pending, mut buffers: Buffers) {
        let mut operation = pending.operation;
        if let Operation::Write { durable } = operation
            && self.common.detect_zeroes != DetectZeroes::Off
            && buffers.is_zero()
        {
            let unmap = self.common.detect_zeroes == DetectZeroes::Unmap;
            operation = Operation::WriteZeroes { unmap, durable };
            pending.zeroes = Some(std::mem::replace(
                &mut buffers,
                self.spare.pop().unwrap_or_default(),
            ));
        }
        let (offset, length, weight) = (pending.offset, pending.length, pending.weight());
        // Whoever calls has seen that there is a tag.
        let Some(active) = self.active.get_mut(lane) else {
            return;
        };
        if let Some(tag) = active.begin(pending) {
            // Flushes weigh nothing, and are something all the same.
            self.taken += weight.max(1);
            self.engine.push(Request {
                tag,
                operation,
                offset,
                length,
                buffers,
            });
        }
    }

    fn log(&mut self, malformed: Malformed) {
        self.malformed += 1;
        if self
            .malformed_logged
            .is_none_or(|at| at.elapsed() >= LOG_INTERVAL)
        {
            self.malformed_logged = Some(Instant::now());
            tracing::warn!(
                device = self.common.reporter.id(),
                total = self.malformed,
                "a request was dropped: {malformed}"
            );
        }
    }
}
