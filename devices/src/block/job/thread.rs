//! The thread of a job: one step after the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::commit::Base;
use super::space::{Host, Lack};
use super::{JobStatus, Shared};
use crate::disk::steps::{Outcome, PIECE, Reached, Reply, Step, Steps};
use crate::worker::{Order, Orders};

/// After this the queue's thread is told again to look: it may be gone.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Before the queue, which has too much to do, is asked again.
const BUSY: Duration = Duration::from_millis(20);
/// The longest that is waited in one piece.
const LONGEST: Duration = Duration::from_secs(3600);

/// What the thread is told.
pub enum Told {
    /// What came of the step.
    Answer(Outcome),
    /// Something has changed: whether it is to end, how fast it may be.
    Look,
    /// What lacks space is to be tried at once; and to fail if there is still none, where that is
    /// said.
    Retry { give_up: bool },
    /// The disk stands still: a commit that is ready is to do the rest, and say how that went.
    Finish(Finish),
}

/// Who waits for the end of a commit.
pub type Finish = Sender<Result<(), Unfinished>>;

/// Why a commit could not do the rest.
#[derive(Clone, Debug)]
pub enum Unfinished {
    /// The host has no space: it waits for that, with the disk in use, and is ready again later.
    NoSpace,
    /// It has ended; why.
    Failed(String),
}

/// What it does.
pub enum Task {
    Stream,
    Commit(Base),
}

/// What it works with.
pub struct Parts {
    pub shared: Arc<Shared>,
    /// Taken by the image of the disk.
    pub steps: Arc<dyn Steps>,
    /// Heard by the thread of its first queue.
    pub orders: Orders,
    pub host: Host,
    /// How long it waits for a step that is being done when it is to end.
    pub last_step: Duration,
    /// Called when there is something to see.
    pub wake: Box<dyn Fn() + Send>,
}

/// See the module.
pub struct Work {
    pub(super) shared: Arc<Shared>,
    steps: Arc<dyn Steps>,
    orders: Orders,
    pub(super) host: Host,
    last_step: Duration,
    pub(super) wake: Box<dyn Fn() + Send>,
    told: Sender<Told>,
    inbox: Receiver<Told>,
    /// Bytes that were moved faster than they may be, and since when.
    ahead: (f64, Instant),
    /// Waits for the rest; until it has an answer there is no limit to the speed.
    pub(super) finish: Option<Finish>,
    pub(super) finishing: bool,
    pub(super) lack: Option<Lack>,
}

/// Why it ends early.
#[derive(Debug, thiserror::Error)]
pub enum End {
    #[error("it was cancelled")]
    Cancelled,
    #[error("{0}")]
    Failed(String),
}

impl Work {
    /// Hears what is sent to `told`.
    pub fn new(parts: Parts, (told, inbox): (Sender<Told>, Receiver<Told>)) -> Self {
        Self {
            shared: parts.shared,
            steps: parts.steps,
            orders: parts.orders,
            host: parts.host,
            last_step: parts.last_step,
            wake: parts.wake,
            told,
            inbox,
            ahead: (0.0, Instant::now()),
            finish: None,
            finishing: false,
            lack: None,
        }
    }

    /// From the beginning to the end.
    pub fn run(mut self, task: Task) {
        let result = match task {
            Task::Stream => self.stream(),
            Task::Commit(base) => self.commit(base),
        };
        let status = match result {
            Ok(()) => JobStatus::Ready,
            Err(End::Cancelled) => JobStatus::Cancelled,
            Err(End::Failed(reason)) => JobStatus::Failed(reason),
        };
        *self.shared.waiting() = None;
        *self.shared.status() = status;
        self.shared.ended.store(true, Ordering::SeqCst);
        (self.wake)();
    }

    fn stream(&mut self) -> Result<(), End> {
        self.step(Step::CheckDetach)?;
        let total = self.shared.total_bytes;
        let mut position = 0;
        while position < total {
            let reached = self.step(Step::Populate(position))?;
            if reached.position <= position {
                return Err(End::Failed(format!(
                    "it does not get beyond byte {position}"
                )));
            }
            position = reached.position;
            let done = &self.shared.done_bytes;
            done.store(position.min(total), Ordering::SeqCst);
            let copied = &self.shared.copied_bytes;
            copied.fetch_add(reached.copied, Ordering::SeqCst);
            self.keep_to_speed(reached.read)?;
        }
        self.step(Step::Detach(total))?;
        Ok(())
    }

    /// Has a step done, and waits for it.
    pub(super) fn step(&mut self, step: Step) -> Result<Reached, End> {
        loop {
            match self.try_step(step)? {
                Ok(reached) => {
                    self.has_space();
                    return Ok(reached);
                }
                // What was given up by one that was cancelled may still be under way.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
                    self.wait(BUSY)?;
                }
                Err(error) => {
                    if self.lacks_space(&error, PIECE)? {
                        continue;
                    }
                    let reason = match step {
                        Step::Populate(position) | Step::Take(position, _) => {
                            format!("at byte {position}: {error}")
                        }
                        Step::Empty => format!("emptying the image: {error}"),
                        Step::CheckDetach => format!("looking at the image: {error}"),
                        Step::Detach(_) => format!("writing the image's header: {error}"),
                    };
                    return Err(End::Failed(reason));
                }
            }
        }
    }

    fn try_step(&mut self, step: Step) -> Result<Outcome, End> {
        self.check()?;
        let told = self.told.clone();
        let reply = Reply::new(move |outcome| {
            // Nobody may be waiting any more.
            let _ = told.send(Told::Answer(outcome));
        });
        let number = self.steps.leave(step, reply);
        let mut give_up = None;
        let mut attend = Instant::now();
        loop {
            let now = Instant::now();
            if now >= attend {
                if !self.orders.send(Order::Attend) {
                    self.steps.withdraw(number);
                    return Err(End::Failed("the disk's thread is gone".into()));
                }
                attend = now + LOOK_AGAIN;
            }
            match self.inbox.recv_timeout(attend - now) {
                Ok(told) => {
                    if let Some(outcome) = self.hear(told) {
                        return Ok(outcome);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // We have a sender ourselves.
                Err(RecvTimeoutError::Disconnected) => return Err(End::Cancelled),
            }
            if self.check().is_err() {
                let until = *give_up.get_or_insert_with(|| Instant::now() + self.last_step);
                if self.steps.withdraw(number) || Instant::now() >= until {
                    return Err(End::Cancelled);
                }
            }
        }
    }

    pub(super) fn check(&self) -> Result<(), End> {
        match self.shared.cancelled.load(Ordering::SeqCst) {
            true => Err(End::Cancelled),
            false => Ok(()),
        }
    }

    /// Waits until so many bytes more are not too many.
    pub(super) fn keep_to_speed(&mut self, bytes: u64) -> Result<(), End> {
        self.ahead.0 += bytes as f64;
        loop {
            self.check()?;
            let now = Instant::now();
            let speed = self.shared.speed.load(Ordering::SeqCst) as f64;
            if speed == 0.0 || self.finishing {
                self.ahead = (0.0, now);
                return Ok(());
            }
            let passed = now.saturating_duration_since(self.ahead.1).as_secs_f64();
            let ahead = (self.ahead.0 - passed * speed).max(0.0);
            self.ahead = (ahead, now);
            if ahead == 0.0 {
                return Ok(());
            }
            let wait = Duration::try_from_secs_f64(ahead / speed).unwrap_or(LONGEST);
            self.wait(wait.clamp(Duration::from_millis(1), LONGEST))?;
        }
    }

    /// Waits so long, or until something changes.
    pub(super) fn wait(&mut self, wait: Duration) -> Result<(), End> {
        if let Ok(told) = self.inbox.recv_timeout(wait) {
            // A late answer says nothing any more.
            self.hear(told);
        }
        self.check()
    }

    fn hear(&mut self, told: Told) -> Option<Outcome> {
        match told {
            Told::Answer(outcome) => return Some(outcome),
            Told::Look => {}
            Told::Retry { give_up } => {
                if let Some(lack) = &mut self.lack {
                    lack.retry(give_up);
                }
            }
            // From now on a guest waits.
            Told::Finish(reply) => {
                self.finish = Some(reply);
                self.finishing = true;
            }
        }
        None
    }
}
