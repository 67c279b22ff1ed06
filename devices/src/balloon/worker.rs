//! The balloon's thread: takes what the driver sends, gives memory back, asks for statistics and
//! watches the progress.
//!
//! ```text
//!  inflate ─► numbers ─► ranges ─► reclaim ─► used ─► one interrupt ─► look at the ring a moment
//!  deflate ─► used (the guest's next access brings the pages back)
//!  stats   ─► kept; given back when somebody asks ─► the driver fills it ─► answered
//!  report  ─► ranges ─► reclaim ─► used
//! ```
//!
//! A page is discarded before its request is used, as the driver may do with it what it likes
//! afterwards; unless it has promised to tell before it does: then pages may wait for their
//! neighbours, see [`super::reclaim`].

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::features::{self, Role};
use super::pages::{self, Pages};
use super::progress::Watch;
use super::reclaim::Reclaim;
use super::requests::{self, Scratch};
use super::shared::{Asked, Shared};
use super::stats;
use crate::event::Reporter;
use crate::guest_memory::discard::{Batching, PAGE};
use crate::timer::Timer;
use crate::virtio::{Activation, TransportSignals, VirtQueue};
use crate::worker::{Handler, Source, WorkerError};

/// Requests taken before their pages are discarded.
const BATCH: usize = 64;
/// Pages after which no more requests are added to a batch (64 MiB).
const BATCH_PAGES: usize = 16384;
/// Batches in a row before orders and the other queues are looked at.
const ROUNDS: usize = 32;
/// How long the ring is looked at for the driver's next request before the thread sleeps. Linux
/// sends 1 MiB at a time and waits for the answer; being there when it goes on spares a wake-up
/// for each, and an exit of the guest.
const POLL: Duration = Duration::from_micros(50);
/// Between two looks at what waits to be discarded: nothing waits for longer than two of them.
const WAIT: Duration = Duration::from_millis(250);
/// How long the guest may take to answer a question for statistics.
const PATIENCE: Duration = Duration::from_secs(1);

/// The descriptors that are watched, in this order.
const WAKE: usize = 0;
const TICK: usize = 1;
const FLUSH: usize = 3;

/// The queues while the driver is running.
struct Active {
    /// What each queue of the activation is for.
    roles: Vec<Option<Role>>,
    inflate: Option<VirtQueue>,
    deflate: Option<VirtQueue>,
    stats: Option<VirtQueue>,
    report: Option<VirtQueue>,
    /// The buffer of statistics that the driver waits to get back.
    held: Option<u16>,
    reclaim: Reclaim,
    signals: Arc<dyn TransportSignals>,
}

/// Where a queue is kept.
type Place = fn(&mut Active) -> &mut Option<VirtQueue>;
/// Serves a batch of requests; says whether there were any.
type Step = fn(&mut BalloonHandler, &mut VirtQueue) -> Result<bool, WorkerError>;

/// See the module.
pub struct BalloonHandler {
    shared: Arc<Shared>,
    batching: Option<Batching>,
    active: Option<Active>,
    watch: Watch,
    tick: Timer,
    patience: Timer,
    /// Set when something begins to wait to be discarded.
    flush: Timer,
    flush_set: bool,
    /// Who has asked for statistics and has no answer yet.
    asked: Vec<Asked>,
    scratch: Scratch,
    pages: Pages,
    ranges: Vec<Range<u64>>,
    heads: Vec<u16>,
}

impl BalloonHandler {
    /// Called on the VMM thread.
    pub fn new(shared: Arc<Shared>, reporter: Reporter) -> std::io::Result<Self> {
        Ok(Self {
            watch: Watch::new(shared.clone(), reporter),
            shared,
            batching: Batching::probe(),
            active: None,
            tick: Timer::new()?,
            patience: Timer::new()?,
            flush: Timer::new()?,
            flush_set: false,
            asked: Vec::new(),
            scratch: Scratch::default(),
            pages: Pages::default(),
            ranges: Vec::new(),
            heads: Vec::with_capacity(BATCH),
        })
    }

    /// Serves a queue until there is nothing left to do: `step` says whether there was anything.
    fn drain(&mut self, place: Place, step: Step) -> Result<(), WorkerError> {
        let Some(mut queue) = self.active.as_mut().and_then(|a| place(a).take()) else {
            return Ok(());
        };
        let result = self.drain_queue(&mut queue, step);
        if let Some(active) = &mut self.active {
            *place(active) = Some(queue);
        }
        result
    }

    fn drain_queue(&mut self, queue: &mut VirtQueue, step: Step) -> Result<(), WorkerError> {
        queue.disable_kicks()?;
        for _ in 0..ROUNDS {
            if step(self, queue)? {
                continue;
            }
            if !queue.enable_kicks()? {
                return Ok(());
            }
            queue.disable_kicks()?;
        }
        queue.ring();
        Ok(())
    }

    fn inflate(&mut self) -> Result<(), WorkerError> {
        self.drain(|active| &mut active.inflate, Self::inflate_batch)?;
        self.set_flush()
    }

    fn inflate_batch(&mut self, queue: &mut VirtQueue) -> Result<bool, WorkerError> {
        if !self.gather_pages(queue)? && !self.poll(queue)? {
            return Ok(false);
        }
        self.pages.drain_into(&mut self.ranges);
        if let Some(active) = &mut self.active {
            active.reclaim.inflate(&mut self.ranges);
        }
        self.use_gathered(queue)?;
        Ok(true)
    }

    /// Looks at the ring for a moment, while the guest is on its way to the target.
    fn poll(&mut self, queue: &mut VirtQueue) -> Result<bool, WorkerError> {
        if self.shared.reached() {
            return Ok(false);
        }
        let end = Instant::now() + POLL;
        while Instant::now() < end {
            if self.gather_pages(queue)? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    /// Takes requests and the numbers in them; says whether there were any.
    fn gather_pages(&mut self, queue: &mut VirtQueue) -> Result<bool, WorkerError> {
        self.heads.clear();
        while self.heads.len() < BATCH && self.pages.len() < BATCH_PAGES {
            let Some(chain) = queue.pop()? else {
                break;
            };
            self.heads.push(chain.head_index());
            let memory = queue.memory();
            let ignored = self.scratch.read_pages(chain, memory, &mut self.pages);
            let counter = &self.shared.counters.ignored;
            counter.fetch_add(ignored, Ordering::Relaxed);
        }
        Ok(!self.heads.is_empty())
    }

    /// Gives the gathered requests back, with one interrupt.
    fn use_gathered(&mut self, queue: &mut VirtQueue) -> Result<(), WorkerError> {
        for head in self.heads.drain(..) {
            queue.push_used(head, 0)?;
        }
        Ok(queue.notify()?)
    }

    fn deflate(&mut self) -> Result<(), WorkerError> {
        self.drain(|active| &mut active.deflate, Self::deflate_batch)
    }

    fn deflate_batch(&mut self, queue: &mut VirtQueue) -> Result<bool, WorkerError> {
        if !self.gather_pages(queue)? {
            return Ok(false);
        }
        let bytes = self.pages.len() as u64 * PAGE;
        let deflated = &self.shared.counters.deflated;
        deflated.fetch_add(bytes, Ordering::Relaxed);
        self.pages.drain_into(&mut self.ranges);
        if let Some(active) = &mut self.active {
            active.reclaim.deflate(&self.ranges);
        }
        self.use_gathered(queue)?;
        Ok(true)
    }

    fn report(&mut self) -> Result<(), WorkerError> {
        self.drain(|active| &mut active.report, Self::report_batch)
    }

    fn report_batch(&mut self, queue: &mut VirtQueue) -> Result<bool, WorkerError> {
        self.heads.clear();
        self.ranges.clear();
        while self.heads.len() < BATCH {
            let Some(chain) = queue.pop()? else {
                break;
            };
            self.heads.push(chain.head_index());
            requests::read_report(chain, &mut self.ranges);
        }
        if self.heads.is_empty() {
            return Ok(false);
        }
        pages::merge(&mut self.ranges);
        if let Some(active) = &mut self.active {
            active.reclaim.report(&self.ranges);
        }
        self.use_gathered(queue)?;
        Ok(true)
    }

    /// Sees to it that what waits to be discarded does not wait for ever.
    fn set_flush(&mut self) -> Result<(), WorkerError> {
        let waits = self.active.as_ref().is_some_and(|a| a.reclaim.waits());
        if waits && !self.flush_set {
            self.flush
                .set(WAIT)
                .map_err(|e| WorkerError::new("setting the timer of what waits", e))?;
            self.flush_set = true;
        }
        Ok(())
    }

    /// The driver has sent statistics: keeps the buffer, so that it can be asked for more.
    fn statistics(&mut self) -> Result<(), WorkerError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(queue) = &mut active.stats else {
            return Ok(());
        };
        let (shared, scratch, held) = (&self.shared, &mut self.scratch, &mut active.held);
        let mut came = false;
        queue.serve(|queue, chain| {
            let head = chain.head_index();
            let memory = queue.memory().clone();
            let bytes = scratch.read_statistics(chain, &memory, stats::MAX_BYTES);
            shared.statistics.update(bytes, shared.now_ms());
            came = true;
            // A driver has one buffer. One that sends more gets the older ones back.
            if let Some(older) = held.replace(head) {
                queue.push_used(older, 0)?;
                queue.notify()?;
            }
            Ok(())
        })?;
        if came {
            self.answer(true);
        }
        Ok(())
    }

    /// Somebody may want fresh statistics: gives the driver its buffer back.
    fn ask(&mut self) -> Result<(), WorkerError> {
        let questions = self.shared.take_questions();
        if questions.is_empty() {
            return Ok(());
        }
        self.asked.extend(questions);
        let Some(active) = &mut self.active else {
            self.answer(false);
            return Ok(());
        };
        let Some(queue) = &mut active.stats else {
            self.answer(false);
            return Ok(());
        };
        if let Some(head) = active.held.take() {
            queue.push_used(head, 0)?;
            queue.notify()?;
        }
        self.patience
            .set(PATIENCE)
            .map_err(|e| WorkerError::new("setting the timer for statistics", e))
    }

    fn answer(&mut self, fresh: bool) {
        for asked in self.asked.drain(..) {
            asked(fresh);
        }
    }

    /// The target may be another: tells the driver, and watches what it does.
    fn look_at_target(&mut self) -> Result<(), WorkerError> {
        if self.watch.take_new_target()
            && let Some(active) = &self.active
        {
            active.signals.config_changed();
        }
        self.look_at_progress()
    }

    fn look_at_progress(&mut self) -> Result<(), WorkerError> {
        if let Some(wait) = self.watch.look() {
            self.tick
                .set(wait)
                .map_err(|e| WorkerError::new("setting the timer of the progress", e))?;
        }
        Ok(())
    }

    fn flush(&mut self) {
        if let Some(active) = &mut self.active {
            active.reclaim.flush();
        }
    }

    /// Tries again what was held off, if nothing holds it off any more: some of it, so that it holds
    /// up neither the queues nor orders for long.
    fn retry(&mut self) {
        if let Some(active) = &mut self.active
            && active.reclaim.retry()
        {
            self.shared.wake();
        }
    }

    fn serve_all(&mut self) -> Result<(), WorkerError> {
        self.inflate()?;
        self.deflate()?;
        self.statistics()?;
        self.report()
    }
}

impl Handler for BalloonHandler {
    fn descriptors(&self) -> Vec<RawFd> {
        vec![
            self.shared.wake.as_raw_fd(),
            self.tick.as_raw_fd(),
            self.patience.as_raw_fd(),
            self.flush.as_raw_fd(),
        ]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), WorkerError> {
        let Activation {
            features,
            queues,
            signals,
        } = activation;
        let Some(memory) = queues.first().map(|queue| queue.memory().clone()) else {
            return Ok(());
        };
        let batching = self.batching.clone();
        let reclaim = Reclaim::new(self.shared.clone(), &memory, batching, features)
            .map_err(|e| WorkerError::new("looking at guest memory", e))?;
        let mut active = Active {
            roles: Vec::new(),
            inflate: None,
            deflate: None,
            stats: None,
            report: None,
            held: None,
            reclaim,
            signals,
        };
        let indices: Vec<u16> = queues.iter().map(VirtQueue::index).collect();
        for queue in queues {
            let role = features::role(queue.index(), features, &indices);
            active.roles.push(role);
            match role {
                Some(Role::Inflate) => active.inflate = Some(queue),
                Some(Role::Deflate) => active.deflate = Some(queue),
                Some(Role::Statistics) => active.stats = Some(queue),
                Some(Role::Report) => active.report = Some(queue),
                None => {}
            }
        }
        self.active = Some(active);
        self.shared.set_live(true);
        self.shared.set_out();
        self.watch.forget_target();
        self.look_at_target()?;
        self.serve_all()
    }

    fn ready(&mut self, source: Source) -> Result<(), WorkerError> {
        match source {
            Source::Queue(index) => {
                let roles = self.active.as_ref().map(|active| &active.roles);
                match roles.and_then(|roles| roles.get(index).copied().flatten()) {
                    Some(Role::Inflate) => self.inflate(),
                    Some(Role::Deflate) => self.deflate(),
                    Some(Role::Statistics) => self.statistics(),
                    Some(Role::Report) => self.report(),
                    None => Ok(()),
                }
            }
            Source::Descriptor(WAKE) => {
                let _ = self.shared.wake.read();
                if self.shared.reached() {
                    // No more comes that would make anything whole.
                    self.flush();
                }
                self.retry();
                self.ask()?;
                self.look_at_target()
            }
            Source::Descriptor(TICK) => {
                self.tick.acknowledge();
                self.look_at_progress()
            }
            Source::Descriptor(FLUSH) => {
                self.flush.acknowledge();
                self.flush_set = false;
                if let Some(active) = &mut self.active {
                    active.reclaim.tick();
                }
                self.set_flush()
            }
            Source::Descriptor(_) => {
                self.patience.acknowledge();
                self.answer(false);
                Ok(())
            }
        }
    }

    fn quiesce(&mut self) -> Result<(), WorkerError> {
        // It may stand still for long.
        self.flush();
        // Who asks a guest that stands still is not kept waiting.
        self.asked.extend(self.shared.take_questions());
        self.answer(false);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), WorkerError> {
        // The time that the guest stood still does not count against it.
        self.shared.set_out();
        self.look_at_target()?;
        self.serve_all()
    }

    fn reset(&mut self) {
        self.active = None;
        // Where a broken ring ended a batch, its pages must not be those of the next driver.
        self.pages.clear();
        self.heads.clear();
        self.shared.set_live(false);
        self.shared.statistics.clear();
        self.asked.extend(self.shared.take_questions());
        self.answer(false);
    }
}
