//! Jobs on disks as clients know them: which there are, how far they have come, how they ended.
//!
//! ```text
//!            its thread has ended       the VMM thread concludes it
//!   running ─────────────────────► ready ─────────────────────────► completed
//!    │ ▲ │                           └───────────┬────────────────► failed
//!    │ │ └─ cancelled, machine off ──► cancelled │
//!    ▼ │                                  too slow: tried again a few times
//!   between machines (a reset of the guest): begun again on the new one
//! ```
//!
//! The work is done by [`devices::block::job`]; here are the numbers that jobs go by, what is told
//! of them, and their ends; one job's own part is in [`live`]. Everything is called on the VMM
//! thread. A job is gone with the machine, what is known of it with the VM.
//!
//! One that waits for space runs ([`JobInfo::waiting_for_space`]). One that has failed at its end while
//! its thread waits for the host is shown as running until that has come back: nobody else waits for it.
//!
//! What ends when it is looked at may have changed the disk's configuration (a commit): the end is
//! told ([`Ended::tell`]) when that has been published.

mod live;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Instant;

use devices::block::job::{JobKind, JobStatus, Waiting};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::live::Live;
use crate::device_manager::DeviceManager;
use crate::error::Error;
use crate::event::Events;
use crate::vm::Environment;

/// How many that have ended are still shown.
const KEPT: usize = 16;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It is at work.
    Running,
    /// All of it is done.
    Completed,
    /// It could not go on; `reason` says why. The disk is whole, and what was done stays done.
    Failed,
    /// It was told to end, or its machine was switched off. The disk is whole, and what was done
    /// stays done.
    Cancelled,
}

/// A job on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(example = json!({
    "id": "job0", "disk": "_disk0", "kind": "stream", "state": "running",
    "done_bytes": 1073741824, "total_bytes": 10737418240_u64, "copied_bytes": 268435456,
    "speed": 104857600
}))]
pub struct JobInfo {
    /// What it goes by; never given to another one of the same VM.
    pub id: String,
    /// The id of its disk.
    pub disk: String,
    /// What it does.
    pub kind: JobKind,
    /// Where it stands.
    pub state: JobState,
    /// Bytes of the disk that it has looked at, once: what the guest writes later is looked at again
    /// by a commit.
    pub done_bytes: u64,
    /// Bytes that there are to look at: the size of the disk.
    pub total_bytes: u64,
    /// Bytes that it had to write so far.
    pub copied_bytes: u64,
    /// The most bytes that it may read in a second; null where there is no limit.
    pub speed: Option<u64>,
    /// There while the host has no space for what it is to write: it is tried again every second.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub waiting_for_space: Option<SpaceWanted>,
    /// Why it failed, or what could not be done although it completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
}

/// The space that a job waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(example = json!({
    "needed_bytes": 1048576, "free_bytes": 65536, "error": "No space left on device (os error 28)"
}))]
pub struct SpaceWanted {
    /// Bytes that are to be written at once; no more than these are needed for them.
    pub needed_bytes: u64,
    /// Bytes that were free on the host's file system when it was tried last; null where that does
    /// not say.
    pub free_bytes: Option<u64>,
    /// What the host said: it may be a quota that leaves no more.
    pub error: String,
}

impl From<Waiting> for SpaceWanted {
    fn from(waiting: Waiting) -> Self {
        Self {
            needed_bytes: waiting.needed_bytes,
            free_bytes: waiting.free_bytes,
            error: waiting.error,
        }
    }
}

/// What a job is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewJob {
    /// The id of its disk.
    pub disk: String,
    /// What it is to do.
    pub kind: JobKind,
    /// The most bytes that it may read in a second.
    pub speed: Option<NonZeroU64>,
}

/// The jobs of a VM.
#[derive(Default)]
pub struct Jobs {
    next_number: u64,
    live: Vec<Live>,
    /// The last ones first.
    ended: VecDeque<JobInfo>,
}

impl Jobs {
    /// Begins one. The disk must have none yet.
    pub fn begin(
        &mut self,
        order: NewJob,
        devices: &DeviceManager,
        environment: &Environment,
    ) -> Result<JobInfo, Error> {
        self.check_free(&order.disk)?;
        let id = format!("job{}", self.next_number);
        let live = Live::begin(id, order, devices, environment)?;
        self.next_number = self.next_number.wrapping_add(1);
        let info = live.info();
        live::tell(&live.events, "job-started", &info);
        self.live.push(live);
        Ok(info)
    }

    /// Refuses what can't be done to a disk that has a job.
    pub fn check_free(&self, disk: &str) -> Result<(), Error> {
        match self.live.iter().find(|live| live.order.disk == disk) {
            Some(live) => Err(Error::HasJob {
                disk: disk.to_owned(),
                job: live.id.clone(),
                kind: live.order.kind.name(),
            }),
            None => Ok(()),
        }
    }

    /// All that are known: those that have not ended, then the last that have.
    pub fn list(&self) -> Vec<JobInfo> {
        let live = self.live.iter().map(Live::current);
        live.chain(self.ended.iter().cloned()).collect()
    }

    /// Tells one to end; [`Jobs::look`] tells when it has. One whose work is done completes.
    pub fn cancel(&mut self, id: &str) -> Result<(), Error> {
        self.find(id)?;
        self.cancel_those(|live| live.id == id);
        Ok(())
    }

    /// Has one read up to so many bytes a second from now on.
    pub fn set_speed(&mut self, id: &str, speed: Option<NonZeroU64>) -> Result<(), Error> {
        self.find(id)?;
        for live in self.live.iter_mut().filter(|live| live.id == id) {
            live.set_speed(speed);
        }
        Ok(())
    }

    fn find(&self, id: &str) -> Result<&Live, Error> {
        if let Some(live) = self.live.iter().find(|live| live.id == id) {
            return Ok(live);
        }
        match self.ended.iter().any(|ended| ended.id == id) {
            true => Err(Error::JobEnded { id: id.to_owned() }),
            false => Err(Error::UnknownJob { id: id.to_owned() }),
        }
    }

    /// Has the one on a disk, if there is one, try at once what lacks space; to `give_up` is to have
    /// it fail where there still is none.
    pub fn retry_on(&self, disk: &str, give_up: bool) {
        let of_disk = self.live.iter().filter(|live| live.order.disk == disk);
        of_disk.for_each(|live| live.retry(give_up));
    }

    /// Tells the one on a disk, if there is one, to end: the disk is to go.
    pub fn cancel_on(&mut self, disk: &str) {
        self.cancel_those(|live| live.order.disk == disk);
    }

    fn cancel_those(&mut self, which: impl Fn(&Live) -> bool) {
        for live in self.live.iter_mut().filter(|live| which(live)) {
            live.cancel();
        }
    }

    /// When [`Jobs::look`] next has something to do, if no job tells earlier.
    pub fn next_look(&self) -> Option<Instant> {
        self.live.iter().map(Live::next_look).min()
    }

    /// Concludes those whose work is done, tells how far the others have come, and says which have
    /// ended; `go_on` unless the VM is paused.
    pub fn look(&mut self, devices: &DeviceManager, go_on: bool, now: Instant) -> Vec<Ended> {
        let mut ended = Vec::new();
        self.live
            .retain_mut(|live| match live.look(devices, go_on, now) {
                Some(info) => {
                    let events = live.events.clone();
                    ended.push(Ended { events, info });
                    false
                }
                None => true,
            });
        for one in &ended {
            self.remember(one.info.clone());
        }
        ended
    }

    /// The machine is to be switched off: all end but those that wait for the next one.
    pub fn end_unless_suspended(&mut self) {
        self.end_those(|live| live.has_machine());
    }

    /// The jobs on these disks end.
    pub fn end(&mut self, of: impl Fn(&str) -> bool) {
        self.end_those(|live| of(&live.order.disk));
    }

    fn end_those(&mut self, which: impl Fn(&Live) -> bool) {
        let (gone, live) = std::mem::take(&mut self.live)
            .into_iter()
            .partition::<Vec<_>, _>(which);
        self.live = live;
        for mut live in gone {
            let status = live.stop();
            let info = live.ended_as(status);
            self.keep(&live.events, info);
        }
    }

    /// The machine is to be replaced by another one: jobs stop, and wait for
    /// [`Jobs::begin_again`].
    pub fn suspend(&mut self) {
        for mut live in std::mem::take(&mut self.live) {
            match live.stop() {
                JobStatus::Running | JobStatus::Cancelled if !live.cancelled => {
                    self.live.push(live);
                }
                status => {
                    let info = live.ended_as(status);
                    self.keep(&live.events, info);
                }
            }
        }
    }

    /// There is the other machine. A job finds what it has done already, and does not do it again.
    pub fn begin_again(&mut self, devices: &DeviceManager, environment: &Environment) {
        for mut live in std::mem::take(&mut self.live) {
            match live.begin_again(devices, environment) {
                Ok(()) => self.live.push(live),
                Err(error) => {
                    // A disk whose removal the reset has completed is no failure.
                    let status = match error {
                        Error::UnknownDevice { .. } => JobStatus::Cancelled,
                        error => JobStatus::Failed(format!("after a reset: {error}")),
                    };
                    let info = live.ended_as(status);
                    self.keep(&live.events, info);
                }
            }
        }
    }

    /// Tells that one has ended, and remembers it.
    fn keep(&mut self, events: &Events, info: JobInfo) {
        let events = events.clone();
        self.remember(info.clone());
        Ended { events, info }.tell();
    }

    fn remember(&mut self, info: JobInfo) {
        self.ended.push_front(info);
        self.ended.truncate(KEPT);
    }
}

/// A job that has ended, and is to be told of.
#[must_use]
pub struct Ended {
    events: Events,
    info: JobInfo,
}

impl Ended {
    /// The disk that has another image since.
    pub fn moved(&self) -> Option<&str> {
        let completed = self.info.state == JobState::Completed;
        (completed && self.info.kind == JobKind::Commit).then_some(&self.info.disk)
    }

    /// Tells of it.
    pub fn tell(self) {
        let event = match self.info.state {
            JobState::Running | JobState::Completed => "job-completed",
            JobState::Failed => "job-failed",
            JobState::Cancelled => "job-cancelled",
        };
        live::tell(&self.events, event, &self.info);
    }
}
