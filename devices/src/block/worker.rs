//! The thread of one queue: from chains to the disk engine and back.
//!
//! ```text
//!   doorbell ─► serve: pop, parse, admit ─► engine.push … engine.start (one system call)
//!                 ▲        │ enough in flight    │ not admitted
//!                 │        ▼                     ▼
//!                 │   wait for a completion   wait for the timer
//!   engine ───► collect: status byte, used ring … one interrupt for all
//! ```
//!
//! While the queue is being served the driver is told not to ring. Nothing here is allocated per
//! request, unless it is in very many pieces, and the only lock is the rate limiter's, where there
//! is one: a disk's queues share it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_DISCARD;
use vm_memory::{Bytes, GuestAddress};

use super::counters::QueueCounters;
use super::request::{Action, ID_BYTES, Limits, Malformed, Parser, Status};
use super::shared::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Shared, bit, seg_max};
use crate::disk::{Buffers, Completion, Operation, Queue, Request};
use crate::event::Reporter;
use crate::rate_limiter::RateLimiter;
use crate::timer::Timer;
use crate::virtio::{Activation, VirtQueue};
use crate::worker::{Handler, Source, WorkerError};

/// Chains taken before those done are given back, where the engine blocks.
const BLOCKING_BATCH: usize = 16;
/// Batches served in a row before orders are looked at: a driver that never stops adding chains
/// must not keep its device from being paused.
const ROUNDS: usize = 8;
/// Work that a queue takes on before it looks at its orders again, and has in flight at most beside
/// one request, in bytes as [`Pending::weight`] counts: a driver may ask for 4 GiB in each request,
/// and all of what is in flight is waited for when the device is paused or reset.
pub const MAX_IN_FLIGHT: u64 = 64 << 20;
/// Seconds between log lines about chains that make no sense.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// All that a disk's queues share.
#[derive(Clone)]
pub struct Common {
    /// State and limits of the device.
    pub shared: Arc<Shared>,
    /// The disk's limiter, and when its time began.
    pub limiter: Option<Arc<Mutex<RateLimiter>>>,
    /// When the limiter's time began.
    pub epoch: Instant,
    /// The answer to GET_ID.
    pub serial: [u8; ID_BYTES],
    /// Where I/O errors go.
    pub reporter: Reporter,
    /// Descriptors of each queue, as configured.
    pub queue_size: u16,
}

/// A chain that the engine is working on.
struct Pending {
    head: u16,
    status: GuestAddress,
    operation: Operation,
    offset: u64,
    length: u64,
    started: Instant,
}

impl Pending {
    /// How long it may take, in bytes of a transfer; a hole takes little beside its length.
    fn weight(&self) -> u64 {
        match self.operation {
            Operation::Discard => self.length / 64,
            _ => self.length,
        }
    }
}

/// The queue while the driver is running.
struct Active {
    queue: VirtQueue,
    /// By the tag of the engine's request.
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    /// The weight of what is pending.
    in_flight: u64,
    /// Something was used since the driver was last interrupted.
    unannounced: bool,
}

impl Active {
    /// Whether something must be completed before more can be taken.
    fn is_full(&self) -> bool {
        self.free.is_empty() || self.in_flight >= MAX_IN_FLIGHT
    }
}

/// Why popping stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    Empty,
    BatchFull,
    Full,
    Throttled,
}

/// See the module.
pub struct QueueHandler {
    common: Common,
    counters: Arc<QueueCounters>,
    engine: Box<dyn Queue>,
    timer: Timer,
    parser: Parser,
    active: Option<Active>,
    /// The weight of what was taken since orders were looked at.
    taken: u64,
    /// Chains wait for a completion.
    starved: bool,
    /// The engine failed with requests in flight; their tags must never be used again.
    broken: bool,
    spare: Vec<Buffers>,
    completed: Vec<Completion>,
    malformed: u64,
    malformed_logged: Option<Instant>,
}

impl QueueHandler {
    /// The handler of one queue, with its engine. Called on the VMM thread.
    pub fn new(
        common: Common,
        counters: Arc<QueueCounters>,
        engine: Box<dyn Queue>,
    ) -> std::io::Result<Self> {
        let size = common.queue_size.into();
        Ok(Self {
            timer: Timer::new()?,
            common,
            counters,
            engine,
            parser: Parser::default(),
            active: None,
            taken: 0,
            starved: false,
            broken: false,
            spare: Vec::with_capacity(size),
            completed: Vec::with_capacity(size),
            malformed: 0,
            malformed_logged: None,
        })
    }

    /// Takes what the driver has made available, until there is nothing or nothing more can be
    /// taken.
    fn serve(&mut self) -> Result<(), WorkerError> {
        self.taken = 0;
        for _ in 0..ROUNDS {
            if self.taken >= MAX_IN_FLIGHT {
                break;
            }
            let Some(active) = &mut self.active else {
                return Ok(());
            };
            active.queue.disable_kicks()?;
            let stop = self.take_batch()?;
            self.engine
                .start()
                .map_err(|e| self.fail("submitting to the disk", e))?;
            self.collect()?;
            let Some(active) = &mut self.active else {
                return Ok(());
            };
            self.starved = false;
            match stop {
                Stop::Empty => {
                    if !active.queue.enable_kicks()? {
                        return Ok(());
                    }
                }
                Stop::Full if active.is_full() => {
                    self.starved = true;
                    return Ok(());
                }
                Stop::Full | Stop::BatchFull => {}
                Stop::Throttled => return Ok(()),
            }
        }
        if let Some(active) = &self.active {
            // Come back after having listened to orders. Fails only when it is set anyway.
            let _ = active.queue.kick().write(1);
        }
        Ok(())
    }

    /// Pops chains and gives them to the engine.
    fn take_batch(&mut self) -> Result<Stop, WorkerError> {
        let now = Instant::now();
        let limits = self.limits();
        let batch = match self.engine.descriptor() {
            Some(_) => usize::from(self.common.queue_size),
            None => BLOCKING_BATCH,
        };
        for _ in 0..batch {
            let Some(active) = &mut self.active else {
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
                    self.give_back(head, 0)?;
                }
                Ok(parsed) => match parsed.action {
                    Action::Refuse(status) => {
                        self.recycle(buffers);
                        self.answer(head, parsed.status, status, 0)?;
                    }
                    Action::GetId => {
                        let written = buffers.copy_from(&self.common.serial);
                        self.recycle(buffers);
                        self.answer(head, parsed.status, Status::Ok, written as u32)?;
                    }
                    Action::Submit {
                        operation,
                        offset,
                        length,
                    } => {
                        if let Err(wait) = self.admit(operation, length) {
                            self.recycle(buffers);
                            if let Some(active) = &mut self.active {
                                active.queue.undo_pop();
                            }
                            self.timer
                                .set(wait)
                                .map_err(|e| WorkerError::new("setting the limiter's timer", e))?;
                            return Ok(Stop::Throttled);
                        }
                        self.submit(
                            Pending {
                                head,
                                status: parsed.status,
                                operation,
                                offset,
                                length,
                                started: now,
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

    fn submit(&mut self, pending: Pending, buffers: Buffers) {
        let Some(active) = &mut self.active else {
            return;
        };
        let Some(tag) = active.free.pop() else {
            return;
        };
        let request = Request {
            tag,
            operation: pending.operation,
            offset: pending.offset,
            length: pending.length,
            buffers,
        };
        self.taken += pending.weight();
        active.in_flight += pending.weight();
        active.pending[usize::from(tag)] = Some(pending);
        self.engine.push(request);
    }

    /// Gives the driver back what the engine has done.
    fn collect(&mut self) -> Result<(), WorkerError> {
        let polled = self.engine.poll(&mut self.completed);
        polled.map_err(|e| self.fail("asking the disk for completions", e))?;
        self.deliver()
    }

    fn deliver(&mut self) -> Result<(), WorkerError> {
        if !self.completed.is_empty() {
            let now = Instant::now();
            let mut completed = std::mem::take(&mut self.completed);
            for completion in completed.drain(..) {
                self.complete(completion, now)?;
            }
            self.completed = completed;
        }
        if let Some(active) = &mut self.active
            && std::mem::take(&mut active.unannounced)
        {
            active.queue.notify()?;
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion, now: Instant) -> Result<(), WorkerError> {
        self.recycle(completion.buffers);
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let slot = active.pending.get_mut(usize::from(completion.tag));
        let Some(pending) = slot.and_then(Option::take) else {
            return Ok(());
        };
        active.free.push(completion.tag);
        active.in_flight = active.in_flight.saturating_sub(pending.weight());
        let (status, written) = match completion.result {
            Ok(()) => {
                let latency = now.saturating_duration_since(pending.started);
                match pending.operation {
                    Operation::Read => self.counters.read.count(pending.length, latency),
                    Operation::Write { .. } => self.counters.write.count(pending.length, latency),
                    _ => {}
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
        self.answer(pending.head, pending.status, status, written)
    }

    /// Writes the status byte and gives the chain back, with `written` bytes of data in it.
    fn answer(
        &mut self,
        head: u16,
        address: GuestAddress,
        status: Status,
        written: u32,
    ) -> Result<(), WorkerError> {
        if let Some(active) = &self.active {
            active
                .queue
                .memory()
                .write_obj(status as u8, address)
                .map_err(|e| WorkerError::new("writing a status byte", e))?;
        }
        self.give_back(head, written.saturating_add(1))
    }

    fn give_back(&mut self, head: u16, len: u32) -> Result<(), WorkerError> {
        if let Some(active) = &mut self.active {
            active.queue.push_used(head, len)?;
            active.unannounced = true;
        }
        Ok(())
    }

    fn recycle(&mut self, mut buffers: Buffers) {
        buffers.clear();
        self.spare.push(buffers);
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

    fn fail(&mut self, doing: &str, error: std::io::Error) -> WorkerError {
        self.broken = true;
        WorkerError::new(doing, error)
    }

    /// Waits until the engine holds nothing; the completions are in `completed`.
    fn drain_engine(&mut self) -> Result<(), WorkerError> {
        let mut result = self.engine.start();
        while result.is_ok() && self.engine.held() > 0 {
            result = self.engine.wait(&mut self.completed);
        }
        result.map_err(|e| self.fail("waiting for the disk", e))
    }
}

impl Handler for QueueHandler {
    fn descriptors(&self) -> Vec<RawFd> {
        let mut descriptors = vec![self.timer.as_raw_fd()];
        descriptors.extend(self.engine.descriptor());
        descriptors
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), WorkerError> {
        if self.broken {
            return Err(WorkerError("the disk engine has failed before".into()));
        }
        let Some(queue) = activation.queues.pop() else {
            return Ok(());
        };
        let depth = self.common.queue_size;
        self.active = Some(Active {
            queue,
            pending: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            in_flight: 0,
            unannounced: false,
        });
        self.serve()
    }

    fn ready(&mut self, source: Source) -> Result<(), WorkerError> {
        match source {
            Source::Queue(_) => self.serve(),
            Source::Descriptor(0) => {
                self.timer.acknowledge();
                self.serve()
            }
            Source::Descriptor(_) => {
                self.engine.acknowledge();
                self.collect()?;
                if self.starved { self.serve() } else { Ok(()) }
            }
        }
    }

    fn quiesce(&mut self) -> Result<(), WorkerError> {
        self.drain_engine()?;
        self.deliver()
    }

    fn resume(&mut self) -> Result<(), WorkerError> {
        self.serve()
    }

    fn reset(&mut self) {
        if let Err(error) = self.drain_engine() {
            tracing::error!(device = self.common.reporter.id(), %error, "reset");
        }
        let mut completed = std::mem::take(&mut self.completed);
        for completion in completed.drain(..) {
            self.recycle(completion.buffers);
        }
        self.completed = completed;
        self.active = None;
        self.starved = false;
    }
}
