//! The thread of a job: one step after the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::commit::Base;
use super::{JobStatus, Shared};
use crate::disk::steps::{Outcome, Reached, Reply, Step, Steps};
use crate::worker::{Order, Orders};

/// After this the queue's thread is told again to look: it may be gone.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long a job that is to end waits for a step that is being done.
const LAST_STEP: Duration = Duration::from_secs(10);
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
    /// The disk stands still: a commit that is ready is to do the rest, and say how that went.
    Finish(Sender<Result<(), String>>),
}

/// What it does.
pub enum Task {
    Stream,
    Commit(Base),
}

/// See the module.
pub struct Work {
    pub(super) shared: Arc<Shared>,
    steps: Arc<dyn Steps>,
    orders: Orders,
    told: Sender<Told>,
    inbox: Receiver<Told>,
    /// Bytes that were moved faster than they may be, and since when.
    ahead: (f64, Instant),
    /// Waits for the rest; from then on there is no limit to the speed.
    pub(super) finish: Option<Sender<Result<(), String>>>,
    finishing: bool,
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
    /// On a disk whose image takes these steps, and whose first queue's thread these orders.
    pub fn new(
        shared: Arc<Shared>,
        steps: Arc<dyn Steps>,
        orders: Orders,
        (told, inbox): (Sender<Told>, Receiver<Told>),
    ) -> Self {
        Self {
            shared,
            steps,
            orders,
            told,
            inbox,
            ahead: (0.0, Instant::now()),
            finish: None,
            finishing: false,
        }
    }

    /// From the beginning to the end; calls `wake` when there is something to see.
    pub fn run(mut self, task: Task, wake: &dyn Fn()) {
        let result = match task {
            Task::Stream => self.stream(),
            Task::Commit(base) => self.commit(base, wake),
        };
        let status = match result {
            Ok(()) => JobStatus::Ready,
            Err(End::Cancelled) => JobStatus::Cancelled,
            Err(End::Failed(reason)) => JobStatus::Failed(reason),
        };
        *self.shared.status() = status;
        wake();
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
                Ok(reached) => return Ok(reached),
                // What was given up by one that was cancelled may still be under way.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
                    self.wait(BUSY)?;
                }
                Err(error) => {
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
                Ok(Told::Answer(outcome)) => return Ok(outcome),
                Ok(Told::Finish(reply)) => self.finish_with(reply),
                Ok(Told::Look) | Err(RecvTimeoutError::Timeout) => {}
                // We have a sender ourselves.
                Err(RecvTimeoutError::Disconnected) => return Err(End::Cancelled),
            }
            if self.check().is_err() {
                let until = *give_up.get_or_insert_with(|| Instant::now() + LAST_STEP);
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
        // A late answer says nothing any more.
        if let Ok(Told::Finish(reply)) = self.inbox.recv_timeout(wait) {
            self.finish_with(reply);
        }
        self.check()
    }

    /// From now on a guest waits.
    fn finish_with(&mut self, reply: Sender<Result<(), String>>) {
        self.finish = Some(reply);
        self.finishing = true;
    }
}
