//! A commit: what it has the queue of the disk do, what it writes itself, and its end.
//!
//! ```text
//!   thread   grow the base ─► all of the image ─► what was changed meanwhile, round by round ─┐
//!                                  ┌──────────── ready ◄──── little is left ◄─────────────────┘
//!   VMM      freeze ─► thread: the rest, flush, close ─► open the base ─► stage ─► empty the image
//!            ─► exchange
//! ```
//!
//! A piece is read while those before it are still being written, a few at a time: within a round no
//! two are of the same place, and each round ends with a flush.
//!
//! Until the image is emptied it hides all that has come into the base, so the job can end, or the
//! process be killed, or the host lose its power, at any moment. When it is emptied the base has
//! everything, durably.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::thread::{End, Told, Unfinished, Work};
use super::{ConcludeError, Job, JobStatus};
use crate::block::frozen::{Frozen, gone};
use crate::block::hold::is_no_space;
use crate::block::{Block, ImageType, Opened, snapshot};
use crate::config::{BuildError, Invalid};
use crate::disk::blocking::Blocking;
use crate::disk::buffers::{AlignedBuffer, Buffers};
use crate::disk::dirty::Tracking;
use crate::disk::steps::{PIECE, Reply, Step, Taken};
use crate::disk::{BackingInfo, Format, Image, Operation, Request};
use crate::worker::{Order, Worker};

/// So little that the guest can wait until it is copied; of a small disk its 16th part.
const LITTLE: u64 = 16 << 20;
/// The most that it can wait for, where it does not become less.
const MUCH: u64 = 64 << 20;
/// Rounds after each of which no less is left than once before.
const IN_VAIN: u32 = 4;
/// So many rounds at most: the guest may write faster than it is copied.
const ROUNDS: u32 = 100;
/// Writes of the base that are under way at the same time, while the next piece is read.
const WRITES: usize = 8;
/// Bytes that are taken out of what has changed at a time.
const RANGE: u64 = 16 << 20;
/// How often it is looked what has changed while the end is waited for.
const LOOK: Duration = Duration::from_secs(1);

/// Data that is written to the base.
struct Write {
    start: u64,
    memory: Arc<AlignedBuffer>,
    len: usize,
}

/// What the thread has for it.
pub struct Base {
    /// Used on the thread; the image is closed on the VMM thread.
    disk: Blocking,
    /// Knows what was changed on the disk.
    tracking: Tracking,
    path: PathBuf,
    /// Writes that are under way, each at the place that is its tag.
    writes: Vec<Option<Write>>,
    /// So little that it is ready.
    little: u64,
}

impl Base {
    /// Of an image that is open for it, for a disk of so many bytes.
    pub fn new(disk: Blocking, tracking: Tracking, path: PathBuf, size_bytes: u64) -> Self {
        Self {
            disk,
            tracking,
            path,
            writes: Vec::new(),
            little: LITTLE.min(size_bytes / 16),
        }
    }

    /// What using it calls.
    pub fn syscalls(&self) -> [&'static [crate::sandbox::Allow]; 2] {
        [self.disk.syscalls(), super::BASE_SYSCALLS]
    }

    fn failed(&self, error: impl std::fmt::Display) -> End {
        End::Failed(format!("writing {}: {error}", self.path.display()))
    }
}

impl Work {
    /// From the beginning to the end. Ends well only when the disk stands still and the base has
    /// everything.
    pub(super) fn commit(&mut self, mut base: Base) -> Result<(), End> {
        let total = self.shared.total_bytes;
        if base.disk.size_bytes() < total {
            self.on_base(&mut base, PIECE, |disk| {
                disk.grow(total).map_err(|error| match error {
                    BuildError::Host { source, .. } => source,
                    error => io::Error::other(error),
                })
            })?;
        }
        let mut position = 0;
        while position < total {
            position = self.copy(&mut base, position, total)?;
            let done = &self.shared.done_bytes;
            done.store(position.min(total), Ordering::SeqCst);
        }
        self.flush(&mut base)?;
        loop {
            self.catch_up(&mut base)?;
            *self.shared.status() = JobStatus::Ready;
            (self.wake)();
            // Until it had to wait for space.
            while *self.shared.status() == JobStatus::Ready {
                if self.finish.is_some() {
                    let result = self.copy_rest(&mut base);
                    if let Some(reply) = self.finish.take() {
                        drop(base);
                        let told = match &result {
                            Ok(()) => Ok(()),
                            Err(end) => Err(Unfinished::Failed(end.to_string())),
                        };
                        // Nobody may be waiting any more.
                        let _ = reply.send(told);
                        return result;
                    }
                    result?;
                    continue;
                }
                self.wait(LOOK)?;
                if self.finish.is_none() && base.tracking.bytes() > base.little {
                    self.copy_changed(&mut base)?;
                    self.flush(&mut base)?;
                }
            }
        }
    }

    /// Copies all that is left, of a disk that stands still for as long as somebody waits for the
    /// end.
    fn copy_rest(&mut self, base: &mut Base) -> Result<(), End> {
        self.copy_changed(base)?;
        // Twice: the first lets go of what the second records.
        self.flush(base)?;
        self.flush(base)?;
        match base.tracking.bytes() {
            0 => Ok(()),
            _ if self.finish.is_none() => Ok(()),
            _ => Err(End::Failed("the disk does not stand still".into())),
        }
    }

    /// Copies what has changed, until little is left.
    fn catch_up(&mut self, base: &mut Base) -> Result<(), End> {
        let (mut least, mut in_vain) = (u64::MAX, 0);
        for _ in 0..ROUNDS {
            let left = base.tracking.bytes();
            in_vain = if left < least { 0 } else { in_vain + 1 };
            least = least.min(left);
            if left <= base.little || (in_vain >= IN_VAIN && left <= MUCH) {
                return Ok(());
            }
            self.copy_changed(base)?;
            self.flush(base)?;
        }
        Err(End::Failed(format!(
            "the guest writes faster than it is copied (`speed`): after {ROUNDS} rounds {} bytes \
             are left",
            base.tracking.bytes()
        )))
    }

    /// Copies once what has changed.
    fn copy_changed(&mut self, base: &mut Base) -> Result<(), End> {
        let mut from = 0;
        while let Some((start, end)) = base.tracking.take(from, RANGE) {
            let mut position = start;
            while position < end {
                position = self.copy(base, position, end)?;
            }
            from = end;
        }
        Ok(())
    }

    /// Copies some of what is in the image at `from`, or behind it up to `end`; how far.
    fn copy(&mut self, base: &mut Base, from: u64, end: u64) -> Result<u64, End> {
        let reached = self.step(Step::Take(from, end))?;
        if reached.position <= from {
            return Err(End::Failed(format!("it does not get beyond byte {from}")));
        }
        match &reached.taken {
            Taken::Nothing => {}
            Taken::Zeroes(start) => {
                let len = reached.position.saturating_sub(*start);
                // What lies around them in a sector may be among what is written.
                self.write_out(base)?;
                self.on_base(base, len.min(PIECE), |disk| {
                    disk.write_zeroes(*start, len, true, false)
                })?;
            }
            Taken::Data(start, memory, len) => {
                let copied = &self.shared.copied_bytes;
                copied.fetch_add(*len as u64, Ordering::SeqCst);
                let write = Write {
                    start: *start,
                    memory: memory.clone(),
                    len: *len,
                };
                self.begin_write(base, write)?;
            }
        }
        self.keep_to_speed(reached.read)?;
        Ok(reached.position)
    }

    /// Has a piece written; not more than a few are at the same time.
    fn begin_write(&mut self, base: &mut Base, write: Write) -> Result<(), End> {
        if !base.disk.is_whole(write.start, write.len) {
            self.write_out(base)?;
            return self.write(base, &write);
        }
        base.writes.resize_with(WRITES, || None);
        self.settle(base, false)?;
        let tag = loop {
            match base.writes.iter().position(Option::is_none) {
                Some(free) => break free,
                None => self.settle(base, true)?,
            }
        };
        let mut buffers = Buffers::default();
        let whole = buffers.push_own(&write.memory, 0, write.len);
        whole.map_err(|error| base.failed(error))?;
        let request = Request {
            tag: tag as u16,
            operation: Operation::Write { durable: false },
            offset: write.start,
            length: write.len as u64,
            buffers,
        };
        if let Some(slot) = base.writes.get_mut(tag) {
            *slot = Some(write);
        }
        base.disk.push(request).map_err(|error| base.failed(error))
    }

    /// Waits until nothing is being written.
    fn write_out(&mut self, base: &mut Base) -> Result<(), End> {
        while base.writes.iter().any(Option::is_some) {
            self.settle(base, true)?;
        }
        Ok(())
    }

    /// Sees to what has been written; with `wait`, when there is some.
    fn settle(&mut self, base: &mut Base, wait: bool) -> Result<(), End> {
        self.check()?;
        let completed = base.disk.completed(wait);
        for completion in completed.map_err(|error| base.failed(error))? {
            let slot = base.writes.get_mut(usize::from(completion.tag));
            let Some(write) = slot.and_then(Option::take) else {
                continue;
            };
            match completion.result {
                Ok(()) => {}
                // There may be space by now: others that failed with it were waited for.
                Err(error) if is_no_space(&error) => self.write(base, &write)?,
                Err(error) => return Err(base.failed(error)),
            }
        }
        Ok(())
    }

    fn write(&mut self, base: &mut Base, write: &Write) -> Result<(), End> {
        let bytes = write.memory.bytes().get(..write.len).unwrap_or(&[]);
        self.on_base(base, bytes.len() as u64, |disk| {
            disk.write(write.start, bytes, false)
        })
    }

    fn flush(&mut self, base: &mut Base) -> Result<(), End> {
        self.write_out(base)?;
        self.check()?;
        self.on_base(base, 0, Blocking::flush)
    }

    /// Has the base do something that may be done again, and that takes up to so many bytes of the
    /// host.
    fn on_base(
        &mut self,
        base: &mut Base,
        needed: u64,
        mut what: impl FnMut(&mut Blocking) -> io::Result<()>,
    ) -> Result<(), End> {
        loop {
            match what(&mut base.disk) {
                Ok(()) => {
                    self.has_space();
                    return Ok(());
                }
                Err(error) => {
                    if !self.lacks_space(&error, needed)? {
                        return Err(base.failed(error));
                    }
                }
            }
        }
    }
}

impl Job {
    /// Has the disk, whose queue stands still when `freeze` has been called, go on with the base.
    /// Says why the image could not be emptied, if so: it then hides what the disk is given from now
    /// on.
    pub(super) fn move_down(
        &mut self,
        block: &Block,
        go_on: bool,
    ) -> Result<Option<String>, ConcludeError> {
        let not_moved = ConcludeError::NotMoved;
        let refuse = |reason| Err(not_moved(Invalid::new("id", reason).into()));
        let Some(old_base) = &self.base else {
            return refuse("the job has no base");
        };
        // The one that has the engine.
        let Some(worker) = block.workers.first() else {
            let error = BuildError::host("looking for the disk's thread", gone());
            return Err(not_moved(error));
        };
        // The disk will be known by that name.
        snapshot::is_still_there(&old_base.info.path, old_base.image.as_ref())
            .map_err(not_moved)?;
        let old = block.opened().image.clone();
        let info = old_base.info.clone();
        let path = block.opened().config.path.display().to_string();
        let image: Box<dyn Image>;
        let mut note = None;
        {
            let frozen = Frozen::freeze_within(self.bounds.write_out, vec![block], go_on);
            let frozen = frozen.map_err(|e| e.of_commit())?;
            self.finish()?;
            image = old_base.image.reopen_base().map_err(not_moved)?;
            if image.size_bytes() != old.size_bytes() {
                return refuse("the base has another size than the disk");
            }
            let failed = |e| not_moved(BuildError::host("opening the disk's base", e));
            block.stage(image.as_ref()).map_err(failed)?;
            match self.empty(worker, old.as_ref()) {
                Ok(()) => {}
                Err((false, error)) => {
                    return Err(not_moved(BuildError::host(
                        format!("emptying {path}"),
                        error,
                    )));
                }
                // Some of it may be gone, and the base has everything.
                Err((true, error)) => {
                    tracing::warn!(%error, "{path} was committed, and could not be emptied");
                    note = Some(format!(
                        "all of {path} is in the image below it, which the disk goes on with; it \
                         could not be emptied ({error}), and is of no use any more"
                    ));
                }
            }
            // Nothing fails any more.
            old.hand_over();
            // A worker that is gone has closed its engine.
            let commits = block.commit_staged();
            commits.iter().for_each(|commit| drop(commit.recv()));
            drop(frozen);
        }
        block.hold.set_file(image.host_file());
        let mut config = block.opened().config.clone();
        config.path = info.path;
        match info.format {
            Format::Qcow2 => config.image_type = ImageType::Qcow2,
            Format::Raw => {
                config.image_type = ImageType::Raw;
                // It has neither.
                config.backing_files = false;
                config.l2_cache_size = None;
            }
        }
        // Derived from the image's file otherwise: the guest shall know the disk again.
        config.serial.get_or_insert_with(|| old.serial());
        *block.opened() = Opened {
            config,
            image: image.into(),
        };
        if note.is_none()
            && let Err(error) = old.reclaim()
        {
            tracing::warn!(%error, "{path} was emptied, and may have lost room");
        }
        Ok(note)
    }

    /// Has the thread copy the rest, and close the base.
    fn finish(&self) -> Result<(), ConcludeError> {
        let not_moved = |error: io::Error| {
            ConcludeError::NotMoved(BuildError::host("copying the rest of it", error))
        };
        let (reply, answer) = channel();
        let told = self.told.send(Told::Finish(reply));
        // One that is gone has said why.
        told.map_err(|_| ConcludeError::NotReady)?;
        match answer.recv_timeout(self.bounds.last_copy) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Unfinished::NoSpace)) => Err(ConcludeError::NoSpace),
            Ok(Err(Unfinished::Failed(reason))) => Err(not_moved(io::Error::other(reason))),
            Err(RecvTimeoutError::Disconnected) => Err(ConcludeError::NotReady),
            Err(RecvTimeoutError::Timeout) => {
                // What it does may take the host any time; nobody waits for that.
                self.cancel();
                Err(not_moved(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "it took too long",
                )))
            }
        }
    }

    /// Empties the image, whose queue stands still. An error says whether it may have lost
    /// anything.
    fn empty(&self, worker: &Worker, image: &dyn Image) -> Result<(), (bool, io::Error)> {
        let Some(base) = &self.base else {
            return Ok(());
        };
        let (tell, told) = channel();
        let reply = Reply::new(move |outcome| {
            // Nobody may be waiting any more.
            let _ = tell.send(outcome);
        });
        let number = base.steps.leave(Step::Empty, reply);
        worker.order(Order::Attend);
        match told.recv_timeout(self.bounds.emptying) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err((image.is_handed_over(), error)),
            // What was begun may still come about.
            Err(_) => {
                let begun = !base.steps.withdraw(number);
                let reason = "it took too long";
                Err((begun, io::Error::new(io::ErrorKind::TimedOut, reason)))
            }
        }
    }
}

/// What the VMM thread keeps for the end of a commit.
pub struct Below {
    /// Closed after the thread has ended: whoever is the last to let go unlocks its file.
    pub image: std::sync::Arc<dyn Image>,
    pub info: BackingInfo,
    pub steps: std::sync::Arc<dyn crate::disk::steps::Steps>,
}
