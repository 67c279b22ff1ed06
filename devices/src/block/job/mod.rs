//! Jobs: long work on a disk while the guest uses it.
//!
//! ```text
//!   begin ─► running ─► ready ─► conclude: the VMM thread exchanges the engine
//!             │  │ ▲     └─► no space for the rest of a commit: running
//!             │  │ └─ (may wait for space: [`space`])
//!             │  └──► failed
//!             └─────► cancelled
//! ```
//!
//! A job has a thread of its own ([`thread`]), which opens and reads nothing: it has the disk's
//! queue do one step after the other ([`crate::disk::steps`]), waits in between as its speed asks
//! for, and looks whether it is to end. What opens files is left to the VMM thread, once there is
//! nothing else to do. A job that is dropped is cancelled; wherever it ends, the disk is whole.
//!
//! **Stream**: all that a disk has only below its image comes into the image, which then stands
//! alone: the files below are closed and unlocked. It is safe at any moment (see
//! `disk/qcow2/write/populate.rs`), also where the last step never comes: the image has forgotten
//! what is below it, and what is still open is not needed.
//!
//! **Commit**: all that is in a disk's image comes into the one below it, the *base*, which the
//! thread writes itself, through an engine that the VMM thread has opened beside the disk's; what
//! the guest writes meanwhile is noted in the disk's queue, and copied again. At any moment the
//! image over the base shows the disk: what has come into the base is what the image hides. In the
//! end ([`Job::conclude`]) the queue stands still, the last of it is copied, and the disk goes on
//! with the base under the configuration that [`Block::config`] then has ([`super::DiskConfig::path`],
//! `image_type` and `serial` differ); the image, which nobody uses any more, is emptied.
//! While there is such a job the base is locked as one that is written to.

mod bounds;
mod commit;
mod conclude;
mod space;
mod thread;

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub(super) use self::bounds::Bounds;
use self::commit::{Base, Below};
pub use self::conclude::ConcludeError;
use self::space::Host;
pub use self::space::Waiting;
use self::thread::{Parts, Task, Told, Work};
use super::frozen::gone;
use super::{Block, LockGranularity, NAME_BYTES};
use crate::allow;
use crate::config::{BuildError, Invalid};
use crate::disk::Image;
use crate::disk::blocking::Blocking;
use crate::sandbox::{Allow, COMMON, Filter};

/// What its thread calls: it waits, has others do the rest, and looks how much space there is.
pub const SYSCALLS: &[&[Allow]] = &[COMMON, crate::disk::space::SYSCALLS];

/// What it calls beside that for a base: where it makes a raw image larger, and to look what is
/// written while it does something else.
pub const BASE_SYSCALLS: &[Allow] = &[allow!(ftruncate), allow!(lseek), allow!(read)];

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Has the image stand alone.
    Stream,
    /// Has what is in the image come into the one below it, on which the disk goes on; the image
    /// is then empty.
    Commit,
}

impl JobKind {
    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Commit => "commit",
        }
    }
}

/// How a job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobStatus {
    /// It is at work.
    Running,
    /// It has done its part; [`Job::conclude`] is to be called.
    Ready,
    /// It could not go on; why, for a person. The disk is as it was for the guest, and what was
    /// done stays done.
    Failed(String),
    /// It was told to end before it was done.
    Cancelled,
}

/// A job as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    /// What it does.
    pub kind: JobKind,
    /// Bytes of the disk that are done.
    pub done_bytes: u64,
    /// Bytes that the disk has.
    pub total_bytes: u64,
    /// Bytes that were written for it so far.
    pub copied_bytes: u64,
    /// The most bytes that it may read from below in a second, to write what is not zero.
    pub speed: Option<NonZeroU64>,
    /// What it waits for, while it runs: the host has no space.
    pub waiting: Option<Waiting>,
    /// How it stands.
    pub status: JobStatus,
}

/// A job. Kept by the VMM thread; dropped before or after its disk, which waits until the step that
/// is being done is.
pub struct Job {
    kind: JobKind,
    shared: Arc<Shared>,
    told: Sender<Told>,
    thread: Option<JoinHandle<()>>,
    /// Of a commit. Closed when the thread has ended.
    base: Option<Below>,
    pub(super) bounds: Bounds,
    on_disk: OnDisk,
}

/// What the thread and its owner share.
struct Shared {
    done_bytes: AtomicU64,
    copied_bytes: AtomicU64,
    total_bytes: u64,
    /// Bytes per second; 0 for no limit.
    speed: AtomicU64,
    cancelled: AtomicBool,
    /// The thread is about to be gone.
    ended: AtomicBool,
    status: Mutex<JobStatus>,
    waiting: Mutex<Option<Waiting>>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, JobStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that a disk has a job, for as long as it has.
struct OnDisk(Arc<AtomicBool>);

impl Drop for OnDisk {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Block {
    /// Whether a job is at work on the disk, or waits for its end. Its size and its image can't be
    /// changed meanwhile.
    pub fn has_job(&self) -> bool {
        self.job.load(Ordering::SeqCst)
    }

    /// Begins a job that moves up to `speed` bytes a second; it calls `wake`, which must not wait
    /// for anybody, when it is ready, when it begins and ends to wait for space, and when its thread
    /// has ended, whatever the outcome, last.
    /// Refusals name the field `id`. Called on the VMM thread.
    pub fn begin_job(
        &self,
        kind: JobKind,
        speed: Option<NonZeroU64>,
        wake: Box<dyn Fn() + Send>,
    ) -> Result<Job, BuildError> {
        let refuse = |reason: &str| Err(Invalid::new("id", reason).into());
        let (config, image) = {
            let opened = self.opened();
            (opened.config.clone(), opened.image.clone())
        };
        if config.readonly {
            return refuse("the disk is read-only: nothing can come into its image");
        }
        if config.lock_granularity == LockGranularity::Full {
            return refuse("not supported yet: a disk whose `lock_granularity` is Full");
        }
        if self.job.swap(true, Ordering::SeqCst) {
            return refuse("there is a job on the disk already");
        }
        let on_disk = OnDisk(self.job.clone());
        let (task, base, steps) = match kind {
            JobKind::Stream => (Task::Stream, None, image.stream()?),
            JobKind::Commit => {
                let (base, below) = self.open_base(image.as_ref())?;
                let steps = below.steps.clone();
                (Task::Commit(base), Some(below), steps)
            }
        };
        let shared = Arc::new(Shared {
            done_bytes: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
            total_bytes: image.size_bytes(),
            speed: AtomicU64::new(speed.map_or(0, NonZeroU64::get)),
            cancelled: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            status: Mutex::new(JobStatus::Running),
            waiting: Mutex::default(),
        });
        let (told, inbox) = channel();
        // The one that has the engine.
        let Some(worker) = self.workers.first() else {
            return Err(BuildError::host("looking for the disk's thread", gone()));
        };
        let parts = Parts {
            shared: shared.clone(),
            steps,
            orders: worker.orders(),
            host: Host {
                hold: self.hold.clone(),
                // Where it writes.
                file: match &base {
                    Some(below) => below.image.host_file(),
                    None => image.host_file(),
                },
            },
            last_step: self.bounds.last_step,
            wake,
        };
        let work = Work::new(parts, (told.clone(), inbox));
        let thread = spawn(&thread_name(&self.id), self.seccomp, work, task)?;
        Ok(Job {
            kind,
            shared,
            told,
            thread: Some(thread),
            base,
            bounds: self.bounds,
            on_disk,
        })
    }

    /// Opens what a commit of `image` writes to, and begins to note what changes.
    fn open_base(&self, image: &dyn Image) -> Result<(Base, Below), BuildError> {
        let commit = image.begin_commit()?;
        let block = commit.base.geometry().logical_block;
        let guest_block = self.shared.logical_block();
        if block > guest_block {
            let reason = format!(
                "{} is where the host transfers {block} bytes at a time, and the guest uses the \
                 disk in blocks of {guest_block}",
                commit.info.path.display()
            );
            return Err(Invalid::new("id", reason).into());
        }
        let failed = |e| BuildError::host(format!("opening {}", commit.info.path.display()), e);
        let disk = Blocking::over(commit.base.clone()).map_err(failed)?;
        let tracking = commit.dirty.track(image.size_bytes());
        let tracking = tracking.map_err(|e| BuildError::host("noting what changes", e))?;
        let base = Base::new(disk, tracking, commit.info.path.clone(), image.size_bytes());
        let below = Below {
            image: commit.base,
            info: commit.info,
            steps: commit.steps,
        };
        Ok((base, below))
    }
}

impl Job {
    /// How it stands.
    pub fn view(&self) -> JobView {
        let shared = &self.shared;
        JobView {
            kind: self.kind,
            done_bytes: shared.done_bytes.load(Ordering::SeqCst),
            total_bytes: shared.total_bytes,
            copied_bytes: shared.copied_bytes.load(Ordering::SeqCst),
            speed: NonZeroU64::new(shared.speed.load(Ordering::SeqCst)),
            waiting: shared.waiting().clone(),
            status: shared.status().clone(),
        }
    }

    /// Has it move up to so many bytes a second from now on.
    pub fn set_speed(&self, speed: Option<NonZeroU64>) {
        let speed = speed.map_or(0, NonZeroU64::get);
        self.shared.speed.store(speed, Ordering::SeqCst);
        self.look();
    }

    /// Whether its thread has ended, so that nobody waits for the host when it is dropped. It tells
    /// when it does.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::SeqCst)
    }

    /// Has it try at once what it waits to have space for; to `give_up` is to have it fail if there
    /// still is none. Does not wait for that.
    pub fn retry(&self, give_up: bool) {
        // One that has ended waits for nothing.
        let _ = self.told.send(Told::Retry { give_up });
    }

    /// Has it end soon; does not wait for that. One that is ready stays so.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        self.look();
    }

    /// Cancels it, waits until its thread has ended, and says how.
    pub fn end(mut self) -> JobView {
        self.stop();
        self.view()
    }

    fn stop(&mut self) {
        self.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic aborts the process, so a join can't report one.
            let _ = thread.join();
        }
    }

    fn look(&self) {
        // One that has ended looks no more.
        let _ = self.told.send(Told::Look);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.stop();
    }
}

/// `<id>_job`; of a long id the beginning is kept.
fn thread_name(id: &str) -> String {
    let mut room = NAME_BYTES.saturating_sub("_job".len()).min(id.len());
    while !id.is_char_boundary(room) {
        room -= 1;
    }
    format!("{}_job", &id[..room])
}

fn spawn(
    name: &str,
    seccomp: crate::sandbox::SeccompMode,
    work: Work,
    task: Task,
) -> Result<JoinHandle<()>, BuildError> {
    let failed = |error| BuildError::host(format!("starting the thread {name}"), error);
    let lists = match &task {
        Task::Stream => SYSCALLS.to_vec(),
        Task::Commit(base) => [SYSCALLS, &base.syscalls()].concat(),
    };
    let filter =
        Filter::compile(name, seccomp, &lists).map_err(|e| failed(std::io::Error::other(e)))?;
    let (installed, outcome) = channel();
    let thread = std::thread::Builder::new()
        .name(name.replace('\0', ""))
        .stack_size(crate::worker::STACK_BYTES)
        .spawn(move || {
            let result = filter.install();
            let go = result.is_ok();
            // The spawner waits for this, so it is there to hear it.
            let _ = installed.send(result);
            if go {
                work.run(task);
            }
        })
        .map_err(failed)?;
    match outcome.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(failed(std::io::Error::other(error))),
        Err(error) => Err(failed(std::io::Error::other(error))),
    }
}
