//! Disks whose queues stand still, so that the engines under them can be exchanged.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::{Block, threads};
use crate::config::BuildError;
use crate::disk::exchange::Exchange;
use crate::disk::relay::{Mailboxes, Wake};
use crate::disk::{self, Image, Queue};
use crate::worker::{Order, Worker};

/// How long the queues may take to write out what they have.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why they do not.
pub enum FreezeError {
    /// Because of the n-th of them.
    Disk(usize, BuildError),
    /// A queue could not write out in time what it has; may be tried again.
    Timeout,
}

/// Disks that stand still.
pub struct Frozen<'a> {
    disks: Vec<&'a Block>,
    go_on: bool,
    /// All of them stand still, and hear only orders.
    listening: bool,
}

impl<'a> Frozen<'a> {
    /// Has them stand still until this is dropped, with all that they have on the disk; `go_on`
    /// unless the VM is paused.
    pub fn freeze(disks: Vec<&'a Block>, go_on: bool) -> Result<Self, FreezeError> {
        Self::freeze_within(FREEZE_TIMEOUT, disks, go_on)
    }

    /// The same, where they may take so long.
    pub fn freeze_within(
        timeout: Duration,
        disks: Vec<&'a Block>,
        go_on: bool,
    ) -> Result<Self, FreezeError> {
        let mut frozen = Self {
            disks,
            go_on,
            listening: false,
        };
        frozen.write_out(timeout)?;
        frozen.listening = true;
        Ok(frozen)
    }

    /// All their threads, each with the number of its disk.
    fn workers(&self) -> impl Iterator<Item = (usize, &'a Worker)> {
        let numbered = self.disks.iter().enumerate();
        numbered.flat_map(|(number, disk)| disk.workers.iter().map(move |w| (number, w)))
    }

    fn write_out(&mut self, timeout: Duration) -> Result<(), FreezeError> {
        let order = |(number, worker): (usize, &Worker)| {
            worker.order(Order::Pause(Box::new(|| ())));
            (number, ask(worker, Exchange::Freeze))
        };
        let answers: Vec<_> = self.workers().map(order).collect();
        let deadline = Instant::now() + timeout;
        for (number, answer) in answers {
            let left = deadline.saturating_duration_since(Instant::now());
            let failed = |error: std::io::Error| {
                let doing = "writing out what the disk has";
                FreezeError::Disk(number, BuildError::host(doing, error))
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
        let abort = |(_, worker): (_, &Worker)| ask(worker, Exchange::Abort);
        let answers: Vec<_> = self.workers().map(abort).collect();
        if self.listening {
            // What is staged must be closed before its image is: whoever is the last to let go
            // unlocks the files, and a device's thread may not.
            answers.iter().for_each(|answer| drop(answer.recv()));
        }
        if self.go_on {
            self.workers().for_each(|(_, w)| w.order(Order::Resume));
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
    /// Opens queues of an image for the disk's workers, which stand still and take them in. Where the
    /// image's metadata has an owner that is the first of them, and the others pass on to it what
    /// they have. Where it fails the image must not be closed before they have heard that it is off,
    /// which dropping [`Frozen`] tells them.
    pub(super) fn stage(&self, image: &dyn Image) -> std::io::Result<()> {
        let threads = |first, engines| threads(&self.id, self.seccomp, first, engines);
        let queues = match &self.workers[..] {
            [first, others @ ..] if image.has_owner() && !others.is_empty() => {
                let size = self.queue_sizes.first().copied().unwrap_or(0);
                let mailboxes = Mailboxes::new(others.len(), size)?;
                let engine = image.open_queue_with(self.depth_of_all(), Some(&threads(0, 1)))?;
                // Guests make them do so: orders must not pile up.
                let wake: Wake = Arc::new(first.orders().attend_all());
                let (hub, spokes) = mailboxes.share(engine, &wake);
                let spokes = spokes.into_iter().map(|spoke| Box::new(spoke) as _);
                std::iter::once(Box::new(hub) as _).chain(spokes).collect()
            }
            workers => {
                let count = workers.len().max(1) as u16;
                let depth = self.depth_of_all() / count;
                let open = |n| image.open_queue_with(depth, Some(&threads(n, count)));
                (0..count).map(open).collect::<Result<Vec<_>, _>>()?
            }
        };
        let stage = |(worker, queue): (_, Box<dyn Queue>)| {
            ask(worker, |reply| Exchange::Stage(queue, reply))
        };
        let staged: Vec<_> = self.workers.iter().zip(queues).map(stage).collect();
        // All of them, whatever the first one says.
        let results = staged.into_iter().map(|answer| answer.recv());
        let results: Vec<_> = results.map(|r| r.unwrap_or_else(|_| Err(gone()))).collect();
        results.into_iter().collect()
    }

    /// Has the workers go on with what is staged; that has happened when all have answered.
    pub(super) fn commit_staged(&self) -> Vec<Answer> {
        let workers = self.workers.iter();
        workers.map(|w| ask(w, Exchange::Commit)).collect()
    }
}

/// A worker is.
pub fn gone() -> std::io::Error {
    std::io::Error::other("the disk's thread is gone")
}
