//! Queues of disks that stand still, so that the engine under them can be exchanged.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::Block;
use crate::config::BuildError;
use crate::disk::exchange::Exchange;
use crate::disk::{self, Image};
use crate::worker::{Order, Worker};

/// How long the queues may take to write out what they have.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why they do not.
pub enum FreezeError {
    /// Because of the n-th of them.
    Worker(usize, BuildError),
    /// One could not write out in time what it has; may be tried again.
    Timeout,
}

/// Queues that stand still.
pub struct Frozen<'a> {
    workers: Vec<&'a Worker>,
    go_on: bool,
    /// All of them stand still, and hear only orders.
    listening: bool,
}

impl<'a> Frozen<'a> {
    /// Has them stand still until this is dropped, with all that they have on the disk; `go_on`
    /// unless the VM is paused.
    pub fn freeze(workers: Vec<&'a Worker>, go_on: bool) -> Result<Self, FreezeError> {
        let mut frozen = Self {
            workers,
            go_on,
            listening: false,
        };
        frozen.write_out()?;
        frozen.listening = true;
        Ok(frozen)
    }

    fn write_out(&mut self) -> Result<(), FreezeError> {
        let order = |worker: &&Worker| {
            worker.order(Order::Pause(Box::new(|| ())));
            ask(worker, Exchange::Freeze)
        };
        let answers: Vec<_> = self.workers.iter().map(order).collect();
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        for (number, answer) in answers.into_iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let failed = |error: std::io::Error| {
                let doing = "writing out what the disk has";
                FreezeError::Worker(number, BuildError::host(doing, error))
            };
            match answer.recv_timeout(left) {
                Ok(result) => result.map_err(failed)?,
                Err(RecvTimeoutError::Timeout) => return Err(FreezeError::Timeout),
                Err(RecvTimeoutError::Disconnected) => return Err(failed(gone())),
            }
        }
        Ok(())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // Has no effect on one that has got its new engine.
        let abort = |worker: &&Worker| ask(worker, Exchange::Abort);
        let answers: Vec<_> = self.workers.iter().map(abort).collect();
        if self.listening {
            // What is staged must be closed before its image is: whoever is the last to let go
            // unlocks the files, and a device's thread may not.
            answers.iter().for_each(|answer| drop(answer.recv()));
        }
        if self.go_on {
            self.workers.iter().for_each(|w| w.order(Order::Resume));
        }
    }
}

/// Hears of the end of a step.
pub type Answer = Receiver<std::io::Result<()>>;

/// Has a worker do a step.
pub fn ask(worker: &Worker, step: impl FnOnce(disk::exchange::Reply) -> Exchange) -> Answer {
    let (reply, answer) = channel();
    worker.order(Order::Exchange(step(reply)));
    answer
}

impl Block {
    /// Opens a queue of an image for a worker that stands still, which takes it in.
    pub(super) fn stage(&self, worker: &Worker, image: &dyn Image) -> std::io::Result<()> {
        let queue = image.open_queue_with(self.engine_depth(), Some(&self.threads))?;
        let staged = ask(worker, |reply| Exchange::Stage(queue, reply));
        staged.recv().unwrap_or_else(|_| Err(gone()))
    }
}

/// A worker is.
pub fn gone() -> std::io::Error {
    std::io::Error::other("the disk's thread is gone")
}
