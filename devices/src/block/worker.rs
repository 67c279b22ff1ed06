//! A disk's thread: from the chains of its queues to the disk engine and back.
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
//!
//! # One thread for each queue, or one for all
//! An image without metadata, or with none that changes, has a thread and an engine for each of its
//! queues. What a qcow2 image that is written to knows of itself is owned by one thread
//! ([`crate::disk::qcow2`]), and that thread serves all queues through one engine, without a lock.
//! Each queue has tags and a share of [`MAX_IN_FLIGHT`] of its own, so that none takes the room of
//! another; where the limiter makes them wait, they go on in turns.
//!
//! Threads of a disk that begins with one for each queue stay, whatever image it comes to.

mod active;
mod completing;
mod exchange;
mod holding;
mod taking;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use self::active::{Active, lanes};
use super::config::DetectZeroes;
use super::counters::QueueCounters;
use super::hold::Hold;
use super::request::{ID_BYTES, Parser};
use super::shared::Shared;
use crate::disk::exchange::Exchange;
use crate::disk::{Buffers, Completion, Queue};
use crate::event::{HoldOutcome, Reporter};
use crate::rate_limiter::RateLimiter;
use crate::timer::Timer;
use crate::virtio::Activation;
use crate::worker::{Handler, Source, WorkerError};

/// Work that a thread takes on before it looks at its orders again, and has in flight at most beside
/// one request of each queue, in bytes as [`active::Pending::weight`] counts: a driver may ask for 4 GiB in each request,
/// and all of what is in flight is waited for when the device is paused or reset.
pub const MAX_IN_FLIGHT: u64 = 64 << 20;
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
    /// A flush of ours failed: the driver's next one is to, in whatever queue.
    pub flush_lost: Arc<AtomicBool>,
    /// What to do with writes of zeroes.
    pub detect_zeroes: DetectZeroes,
}

/// See the module.
pub struct QueueHandler {
    common: Common,
    /// Of the queues that it serves, from the number `first` on.
    counters: Vec<Arc<QueueCounters>>,
    first: u16,
    engine: Box<dyn Queue>,
    timer: Timer,
    /// That timer is set: whoever comes meanwhile has to wait as well.
    throttled: bool,
    /// The queue whose turn is next.
    turn: usize,
    /// When to try again what is held.
    retry: Timer,
    /// When that timer runs out, from when it was set until its end is heard of.
    retry_due: Option<Instant>,
    /// It is to run out for [`Active::again`], not for what is held.
    going_on: bool,
    /// Rung to have that tried at once.
    retry_now: Arc<EventFd>,
    parser: Parser,
    /// The queues, while their driver is running.
    active: Vec<Active>,
    /// The weight of what was taken since orders were looked at.
    taken: u64,
    /// The engine is about to be exchanged: it must not be given anything to do.
    frozen: bool,
    /// The engine that is to come.
    staged: Option<Box<dyn Queue>>,
    /// The engine failed with requests in flight; their tags must never be used again.
    broken: bool,
    spare: Vec<Buffers>,
    completed: Vec<Completion>,
    malformed: u64,
    malformed_logged: Option<Instant>,
}

impl QueueHandler {
    /// The handler of the queues with these counters, which have the numbers from `first` on, with
    /// their engine: its depth is the descriptors of all of them. Called on the VMM thread.
    pub fn new(
        common: Common,
        first: u16,
        counters: Vec<Arc<QueueCounters>>,
        engine: Box<dyn Queue>,
        retry_now: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let size = usize::from(common.queue_size) * counters.len();
        Ok(Self {
            timer: Timer::new()?,
            throttled: false,
            turn: 0,
            first,
            retry: Timer::new()?,
            retry_due: None,
            going_on: false,
            retry_now,
            common,
            counters,
            engine,
            parser: Parser::default(),
            active: Vec::new(),
            taken: 0,
            frozen: false,
            staged: None,
            broken: false,
            spare: Vec::with_capacity(size),
            completed: Vec::with_capacity(size),
            malformed: 0,
            malformed_logged: None,
        })
    }

    /// After something was completed: what waited for that.
    fn go_on(&mut self) -> Result<(), WorkerError> {
        self.go_on_with_held()?;
        for lane in 0..self.active.len() {
            if self.active.get(lane).is_some_and(|a| a.starved) {
                self.serve(lane)?;
            }
        }
        self.rearm();
        Ok(())
    }

    fn recycle(&mut self, mut buffers: Buffers) {
        buffers.clear();
        self.spare.push(buffers);
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

    fn activate(&mut self, activation: Activation) -> Result<(), WorkerError> {
        if self.broken {
            return Err(WorkerError("the disk engine has failed before".into()));
        }
        self.active = lanes(
            activation.queues,
            self.common.queue_size,
            self.first,
            &self.counters,
        )?;
        self.throttled = false;
        self.turn = 0;
        self.serve_all()
    }

    fn ready(&mut self, source: Source) -> Result<(), WorkerError> {
        match source {
            Source::Queue(lane) => self.serve(lane),
            Source::Descriptor(0) => {
                self.timer.acknowledge();
                self.throttled = false;
                self.serve_all()
            }
            Source::Descriptor(1) => {
                self.retry.acknowledge();
                self.retry_due = None;
                let going_on = std::mem::take(&mut self.going_on);
                if !going_on && self.active.iter().all(|a| a.again.is_empty()) {
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

    fn attend(&mut self) -> Result<(), WorkerError> {
        let attended = self.engine.attend();
        attended.map_err(|e| self.fail("attending to the disk", e))?;
        self.collect()
    }

    fn quiesce(&mut self) -> Result<(), WorkerError> {
        self.drain_engine()?;
        self.deliver()
    }

    /// Other queues of the disk may have what they do done by this thread.
    fn quiesce_idle(&mut self) -> Result<(), WorkerError> {
        match self.broken {
            true => Ok(()),
            false => self.quiesce(),
        }
    }

    fn exchange(&mut self, step: Exchange, epoll: &Epoll) {
        self.take_step(step, epoll);
    }

    fn resume(&mut self) -> Result<(), WorkerError> {
        if self.broken {
            return Err(WorkerError("the disk engine has failed before".into()));
        }
        let now = Instant::now();
        for active in &mut self.active {
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
        self.throttled = false;
        self.serve_all()?;
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
        for active in std::mem::take(&mut self.active) {
            let held = active.held.into_iter().chain(active.again);
            let pending = active.pending.into_iter().flatten();
            for pending in held.map(|held| held.pending).chain(pending) {
                if pending.held_since.is_some() {
                    self.common.hold.ended(pending.length, HoldOutcome::Reset);
                }
            }
        }
        self.throttled = false;
        self.retry_due = None;
        self.going_on = false;
    }
}
