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
//! of them, and their ends. Everything is called on the VMM thread. A job is gone with the machine,
//! what is known of it with the VM.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use devices::block::job::{ConcludeError, Job, JobKind, JobStatus, JobView};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::command::Message;
use crate::device_manager::DeviceManager;
use crate::error::Error;
use crate::event::Events;
use crate::vm::Environment;

/// How many that have ended are still shown.
const KEPT: usize = 16;
/// The least time between two events on how far a job has come.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Before the end of a job is tried again, because the disk could not write out in time …
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// … which is done so often.
const ATTEMPTS: u32 = 5;

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
    /// Bytes of the disk that it has looked at.
    pub done_bytes: u64,
    /// Bytes that there are to look at: the size of the disk.
    pub total_bytes: u64,
    /// Bytes that it had to write so far.
    pub copied_bytes: u64,
    /// The most bytes that it may read in a second; null where there is no limit.
    pub speed: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
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

/// One that has not ended.
struct Live {
    id: String,
    order: NewJob,
    events: Events,
    /// `None` between two machines.
    job: Option<Job>,
    /// As it was seen last.
    seen: JobView,
    /// What was told of it last, and when.
    told: (u64, Instant),
    /// When its end is to be tried again, and how often it was tried.
    retry: (Option<Instant>, u32),
    /// It was told to end, and is not to begin again on another machine.
    cancelled: bool,
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
        let job = start(&order, devices, environment)?;
        let live = Live {
            id: format!("job{}", self.next_number),
            events: environment.events.clone(),
            seen: job.view(),
            job: Some(job),
            told: (0, Instant::now()),
            retry: (None, 0),
            cancelled: false,
            order,
        };
        self.next_number = self.next_number.wrapping_add(1);
        let info = live.info();
        tell(&live.events, "job-started", &info);
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
        let live = self.live.iter().map(|live| {
            let mut info = live.info();
            if let Some(job) = &live.job {
                live.fill_in(&mut info, &job.view());
            }
            info
        });
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
            live.order.speed = speed;
            if let Some(job) = &live.job {
                job.set_speed(speed);
                live.seen = job.view();
            }
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

    /// Tells the one on a disk, if there is one, to end: the disk is to go.
    pub fn cancel_on(&mut self, disk: &str) {
        self.cancel_those(|live| live.order.disk == disk);
    }

    fn cancel_those(&mut self, which: impl Fn(&Live) -> bool) {
        for live in self.live.iter_mut().filter(|live| which(live)) {
            live.cancelled = true;
            live.job.iter().for_each(Job::cancel);
        }
    }

    /// When [`Jobs::look`] next has something to do, if no job tells earlier.
    pub fn next_look(&self) -> Option<Instant> {
        let next = |live: &Live| {
            let (retry, _) = live.retry;
            retry.unwrap_or(live.told.1 + PROGRESS_INTERVAL)
        };
        self.live.iter().map(next).min()
    }

    /// Concludes those whose work is done, tells of those that have ended, and how far the others
    /// have come; `go_on` unless the VM is paused.
    pub fn look(&mut self, devices: &DeviceManager, go_on: bool, now: Instant) {
        let mut ended = Vec::new();
        self.live
            .retain_mut(|live| match live.look(devices, go_on, now) {
                Some(info) => {
                    ended.push((live.events.clone(), info));
                    false
                }
                None => true,
            });
        for (events, info) in ended {
            self.keep(&events, info);
        }
    }

    /// The machine is to be switched off: all end but those that wait for the next one.
    pub fn end_unless_suspended(&mut self) {
        self.end_those(|live| live.job.is_some());
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
            match start(&live.order, devices, environment) {
                Ok(job) => {
                    live.seen = job.view();
                    live.job = Some(job);
                    self.live.push(live);
                }
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
        let event = match info.state {
            JobState::Running | JobState::Completed => "job-completed",
            JobState::Failed => "job-failed",
            JobState::Cancelled => "job-cancelled",
        };
        tell(events, event, &info);
        self.ended.push_front(info);
        self.ended.truncate(KEPT);
    }
}

/// Begins the work.
fn start(order: &NewJob, devices: &DeviceManager, environment: &Environment) -> Result<Job, Error> {
    let block = devices.disk(&order.disk)?;
    let inbox = environment.inbox.clone();
    let wake = Box::new(move || {
        // The VMM thread outlives its machines, and these their jobs.
        let _ = inbox.send(Message::Job);
    });
    Ok(block.begin_job(order.kind, order.speed, wake)?)
}

impl Live {
    fn info(&self) -> JobInfo {
        let mut info = JobInfo {
            id: self.id.clone(),
            disk: self.order.disk.clone(),
            kind: self.order.kind,
            state: JobState::Running,
            done_bytes: 0,
            total_bytes: 0,
            copied_bytes: 0,
            speed: None,
            reason: None,
        };
        self.fill_in(&mut info, &self.seen);
        info
    }

    fn fill_in(&self, info: &mut JobInfo, view: &JobView) {
        info.done_bytes = view.done_bytes;
        info.total_bytes = view.total_bytes;
        info.copied_bytes = view.copied_bytes;
        info.speed = self.order.speed.map(NonZeroU64::get);
    }

    /// As it is to be shown from now on.
    fn ended_as(&self, status: JobStatus) -> JobInfo {
        let mut info = self.info();
        (info.state, info.reason) = match status {
            JobStatus::Ready => (JobState::Completed, None),
            JobStatus::Failed(reason) => (JobState::Failed, Some(reason)),
            JobStatus::Running | JobStatus::Cancelled => (JobState::Cancelled, None),
        };
        info
    }

    /// Has its thread end, and says how it did. What is ready needs no conclusion where the
    /// machine goes: that only closes what the machine has open.
    fn stop(&mut self) -> JobStatus {
        match self.job.take() {
            Some(job) => {
                self.seen = job.end();
                self.seen.status.clone()
            }
            None => JobStatus::Cancelled,
        }
    }

    /// What has become of it, if it has ended.
    fn look(&mut self, devices: &DeviceManager, go_on: bool, now: Instant) -> Option<JobInfo> {
        let job = self.job.as_mut()?;
        self.seen = job.view();
        let status = self.seen.status.clone();
        if status == JobStatus::Running {
            if now >= self.told.1 + PROGRESS_INTERVAL {
                let before = std::mem::replace(&mut self.told, (self.seen.done_bytes, now));
                if before.0 != self.seen.done_bytes {
                    tell(&self.events, "job-progress", &self.info());
                }
            }
            return None;
        }
        if status != JobStatus::Ready {
            return Some(self.ended_as(status));
        }
        let (retry, attempts) = self.retry;
        if retry.is_some_and(|at| now < at) {
            return None;
        }
        let concluded = match devices.disk(&self.order.disk) {
            Ok(block) => job.conclude(block, go_on),
            // Its job went with it.
            Err(_) => return Some(self.ended_as(JobStatus::Cancelled)),
        };
        match concluded {
            Ok(()) => Some(self.ended_as(JobStatus::Ready)),
            Err(ConcludeError::Timeout) if attempts + 1 < ATTEMPTS => {
                self.retry = (Some(Instant::now() + RETRY_INTERVAL), attempts + 1);
                None
            }
            Err(error) => Some(self.ended_as(JobStatus::Failed(error.to_string()))),
        }
    }
}

/// Tells of a job.
fn tell(events: &Events, event: &'static str, job: &JobInfo) {
    let [done, total, copied] =
        [job.done_bytes, job.total_bytes, job.copied_bytes].map(|bytes| bytes.to_string());
    let mut properties = vec![
        ("job", job.id.as_str()),
        ("id", &job.disk),
        ("kind", job.kind.name()),
        ("done_bytes", &done),
        ("total_bytes", &total),
        ("copied_bytes", &copied),
    ];
    properties.extend(job.reason.as_deref().map(|reason| ("reason", reason)));
    events.emit("virtio-device", event, &properties);
}
