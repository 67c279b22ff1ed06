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
//! A write for which the host has no space is not given back: it is held ([`super::hold`]) and
//! pushed again when the timer, or a client, says so. All else goes on meanwhile: virtio orders no
//! requests that are under way at the same time, and a flush covers what has been completed, which
//! what is held has not.
//!
//! While the queue is being served the driver is told not to ring. Nothing here is allocated per
//! request, unless it is in very many pieces, and the only lock is the rate limiter's, where there
//! is one: a disk's queues share it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_DISCARD;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::config::DetectZeroes;
use super::counters::QueueCounters;
use super::hold::{Hold, is_no_space};
use super::request::{Action, ID_BYTES, Limits, Malformed, Parser, Status};
use super::shared::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Shared, bit, seg_max};
use crate::disk::{Buffers, Completion, Operation, Queue, Request};
use crate::event::{HoldOutcome, Reporter};
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
    /// What lacks space.
    pub hold: Arc<Hold>,
    /// What to do with writes of zeroes.
    pub detect_zeroes: DetectZeroes,
}

/// A chain that the engine is working on.
struct Pending {
    head: u16,
    status: GuestAddress,
    operation: Operation,
    offset: u64,
    length: u64,
    started: Instant,
    /// The data of a write that the engine does as zeroes.
    zeroes: Option<Buffers>,
    /// When it failed for lack of space, for the first time.
    held_since: Option<Instant>,
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

/// A chain that the engine could not do for lack of space.
struct Held {
    pending: Pending,
    buffers: Buffers,
}

/// The queue while the driver is running.
struct Active {
    queue: VirtQueue,
    /// By the tag of the engine's request.
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    /// The weight of what is pending.
    in_flight: u64,
    /// Has failed for lack of space; waits for the timer.
    held: Vec<Held>,
    /// Is to be tried again now.
    again: VecDeque<Held>,
    /// Something was used since the driver was last interrupted.
    unannounced: bool,
}

impl Active {
    /// Whether something must be completed before more can be taken.
    fn is_full(&self) -> bool {
        // Each that is held gets a tag again.
        self.free.len() <= self.held.len() + self.again.len() || self.in_flight >= MAX_IN_FLIGHT
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
    /// When to try again what is held.
    retry: Timer,
    /// When that timer runs out, from when it was set until its end is heard of.
    retry_due: Option<Instant>,
    /// It is to run out for [`Active::again`], not for what is held.
    going_on: bool,
    /// Rung to have that tried at once.
    retry_now: Arc<EventFd>,
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
        retry_now: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let size = common.queue_size.into();
        Ok(Self {
            timer: Timer::new()?,
            retry: Timer::new()?,
            retry_due: None,
            going_on: false,
            retry_now,
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

    fn submit(&mut self, mut pending: Pending, mut buffers: Buffers) {
        let Some(active) = &mut self.active else {
            return;
        };
        let Some(tag) = active.free.pop() else {
            return;
        };
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
        let request = Request {
            tag,
            operation,
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
        let mut buffers = completion.buffers;
        let Some(active) = &mut self.active else {
            self.recycle(buffers);
            return Ok(());
        };
        let slot = active.pending.get_mut(usize::from(completion.tag));
        let Some(mut pending) = slot.and_then(Option::take) else {
            self.recycle(buffers);
            return Ok(());
        };
        active.free.push(completion.tag);
        active.in_flight = active.in_flight.saturating_sub(pending.weight());
        if let Some(data) = pending.zeroes.take() {
            self.recycle(std::mem::replace(&mut buffers, data));
        }
        let result = match completion.result {
            Err(error) if self.common.hold.wants(&error, pending.held_since, now) => {
                match self.hold(pending, buffers, &error, now) {
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

    /// Holds a chain, or gives it back: a hint is not worth it, and what an engine has kept of the
    /// data can't be written again.
    fn hold(
        &mut self,
        mut pending: Pending,
        mut buffers: Buffers,
        error: &std::io::Error,
        now: Instant,
    ) -> Option<(Pending, Buffers)> {
        buffers.rewind();
        let whole = match pending.operation {
            Operation::Read | Operation::Discard => false,
            Operation::Write { .. } => buffers.len_bytes() == pending.length,
            Operation::Flush | Operation::WriteZeroes { .. } => true,
        };
        let Some(active) = self.active.as_mut().filter(|_| whole) else {
            return Some((pending, buffers));
        };
        let again = pending.held_since.is_some();
        let since = *pending.held_since.get_or_insert(now);
        let hold = &self.common.hold;
        hold.failed(pending.length, error, again);
        active.held.push(Held { pending, buffers });
        let wait = hold.next_try(since, now);
        self.arm_to_try_again(wait);
        None
    }

    /// Sets the timer, unless it runs out before that: whoever fails now must not put off what
    /// failed earlier.
    fn arm(&mut self, wait: Duration) -> std::io::Result<()> {
        let due = Instant::now() + wait;
        if self.retry_due.is_none_or(|earlier| due < earlier) {
            self.retry.set(wait)?;
            self.retry_due = Some(due);
        }
        Ok(())
    }

    fn arm_to_try_again(&mut self, wait: Duration) {
        if let Err(error) = self.arm(wait) {
            // There is still the client.
            tracing::error!(%error, "setting the timer to try again");
        }
    }

    /// Sees to it that what is held is tried again, where the timer ran out for something else.
    fn rearm(&mut self) {
        if self.retry_due.is_some() {
            return;
        }
        // While some are still to be tried, the rest waits for the end of that.
        let Some(active) = self.active.as_ref().filter(|a| a.again.is_empty()) else {
            return;
        };
        let since = active.held.iter().filter_map(|h| h.pending.held_since);
        if let Some(oldest) = since.min() {
            let wait = self.common.hold.next_try(oldest, Instant::now());
            self.arm_to_try_again(wait);
        }
    }

    /// Tries again all that is held.
    fn retry(&mut self) -> Result<(), WorkerError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        active.again.extend(active.held.drain(..));
        self.taken = 0;
        self.go_on_with_held()
    }

    /// Goes on with trying again, as much as may be in flight.
    fn go_on_with_held(&mut self) -> Result<(), WorkerError> {
        while let Some(active) = &mut self.active
            && !active.again.is_empty()
            && active.in_flight < MAX_IN_FLIGHT
        {
            if self.taken >= MAX_IN_FLIGHT {
                // Listen to orders first.
                self.going_on = true;
                let set = self.arm(Duration::ZERO);
                return set.map_err(|e| WorkerError::new("setting the timer to go on", e));
            }
            while let Some(active) = &mut self.active
                && active.in_flight < MAX_IN_FLIGHT
                && self.taken < MAX_IN_FLIGHT
                && let Some(held) = active.again.pop_front()
            {
                self.submit(held.pending, held.buffers);
            }
            self.engine
                .start()
                .map_err(|e| self.fail("submitting to the disk", e))?;
            self.collect()?;
        }
        Ok(())
    }

    /// After something was completed: what waited for that.
    fn go_on(&mut self) -> Result<(), WorkerError> {
        self.go_on_with_held()?;
        if self.starved {
            self.serve()?;
        }
        self.rearm();
        Ok(())
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
        let mut descriptors = vec![
            self.timer.as_raw_fd(),
            self.retry.as_raw_fd(),
            self.retry_now.as_raw_fd(),
        ];
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
            held: Vec::new(),
            again: VecDeque::new(),
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
            Source::Descriptor(1) => {
                self.retry.acknowledge();
                self.retry_due = None;
                let going_on = std::mem::take(&mut self.going_on);
                let active = self.active.as_ref();
                if !going_on && active.is_some_and(|a| a.again.is_empty()) {
                    self.retry()?;
                } else {
                    self.taken = 0;
                }
                self.go_on()
            }
            Source::Descriptor(2) => {
                // Empty when it was read already.
                let _ = self.retry_now.read();
                self.retry()?;
                self.go_on()
            }
            Source::Descriptor(_) => {
                self.engine.acknowledge();
                self.collect()?;
                self.taken = 0;
                self.go_on()
            }
        }
    }

    fn quiesce(&mut self) -> Result<(), WorkerError> {
        self.drain_engine()?;
        self.deliver()
    }

    fn resume(&mut self) -> Result<(), WorkerError> {
        let now = Instant::now();
        if let Some(active) = &mut self.active {
            // Nobody could make space for it, or hear of it, meanwhile.
            for held in active.held.iter_mut().chain(&mut active.again) {
                let since = &mut held.pending.held_since;
                if !since.is_some_and(|since| self.common.hold.is_given_up(since)) {
                    *since = Some(now);
                }
            }
        }
        self.common.hold.vm_resumed();
        self.retry()?;
        self.serve()?;
        self.rearm();
        Ok(())
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
        if let Some(active) = self.active.take() {
            let held = active.held.into_iter().chain(active.again);
            let pending = active.pending.into_iter().flatten();
            for pending in held.map(|held| held.pending).chain(pending) {
                if pending.held_since.is_some() {
                    self.common.hold.ended(pending.length, HoldOutcome::Reset);
                }
            }
        }
        self.starved = false;
        self.retry_due = None;
        self.going_on = false;
    }
}
