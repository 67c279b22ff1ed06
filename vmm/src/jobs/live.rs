//! One job that has not ended.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use devices::block::job::{ConcludeError, Job, JobKind, JobStatus, JobView};

use super::{JobInfo, JobState, NewJob};
use crate::command::Message;
use crate::device_manager::DeviceManager;
use crate::error::Error;
use crate::event::Events;
use crate::vm::Environment;

/// The least time between two events on how far a job has come.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Before the end of a job is tried again, because the disk could not write out in time …
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// … which is done so often.
const ATTEMPTS: u32 = 5;

/// One that has not ended.
pub struct Live {
    /// What it goes by.
    pub id: String,
    /// What it is to be.
    pub order: NewJob,
    /// Where it is told of.
    pub events: Events,
    /// `None` between two machines.
    job: Option<Job>,
    /// As it was seen last.
    seen: JobView,
    /// How far it was told to have come, in bytes done and copied, and when.
    told: ((u64, u64), Instant),
    /// It was told that it waits for space.
    told_waiting: bool,
    retry: Retry,
    /// Why it failed, while its thread still waits for the host.
    failed: Option<String>,
    /// It was told to end, and is not to begin again on another machine.
    pub cancelled: bool,
}

impl Live {
    /// Begins it.
    pub fn begin(
        id: String,
        order: NewJob,
        devices: &DeviceManager,
        environment: &Environment,
    ) -> Result<Self, Error> {
        let job = start(&order, devices, environment)?;
        Ok(Self {
            id,
            events: environment.events.clone(),
            seen: job.view(),
            job: Some(job),
            told: ((0, 0), Instant::now()),
            told_waiting: false,
            retry: Retry::default(),
            failed: None,
            cancelled: false,
            order,
        })
    }

    /// Begins it again, on another machine.
    pub fn begin_again(
        &mut self,
        devices: &DeviceManager,
        environment: &Environment,
    ) -> Result<(), Error> {
        let job = start(&self.order, devices, environment)?;
        self.seen = job.view();
        self.retry = Retry::default();
        self.told_waiting = false;
        self.job = Some(job);
        Ok(())
    }

    /// There is a machine that it is at work on.
    pub fn has_machine(&self) -> bool {
        self.job.is_some()
    }

    /// As it was seen last.
    pub fn info(&self) -> JobInfo {
        let mut info = JobInfo {
            id: self.id.clone(),
            disk: self.order.disk.clone(),
            kind: self.order.kind,
            state: JobState::Running,
            done_bytes: 0,
            total_bytes: 0,
            copied_bytes: 0,
            speed: None,
            waiting_for_space: None,
            reason: None,
        };
        self.fill_in(&mut info, &self.seen);
        info
    }

    /// As it is now.
    pub fn current(&self) -> JobInfo {
        let mut info = self.info();
        if let Some(job) = &self.job {
            self.fill_in(&mut info, &job.view());
        }
        info
    }

    fn fill_in(&self, info: &mut JobInfo, view: &JobView) {
        info.done_bytes = view.done_bytes;
        info.total_bytes = view.total_bytes;
        info.copied_bytes = view.copied_bytes;
        info.waiting_for_space = view.waiting.clone().map(Into::into);
        info.speed = self.order.speed.map(NonZeroU64::get);
    }

    /// As it is to be shown from now on.
    pub fn ended_as(&self, status: JobStatus) -> JobInfo {
        let mut info = self.info();
        info.waiting_for_space = None;
        let failed = self.failed.clone().map(JobStatus::Failed);
        (info.state, info.reason) = match failed.unwrap_or(status) {
            JobStatus::Ready => (JobState::Completed, None),
            JobStatus::Failed(reason) => (JobState::Failed, Some(reason)),
            JobStatus::Running | JobStatus::Cancelled => (JobState::Cancelled, None),
        };
        info
    }

    /// Has it read up to so many bytes a second.
    pub fn set_speed(&mut self, speed: Option<NonZeroU64>) {
        self.order.speed = speed;
        if let Some(job) = &self.job {
            job.set_speed(speed);
            self.seen = job.view();
        }
    }

    /// Has it try at once what lacks space, and fail if there still is none and it is to `give_up`.
    pub fn retry(&self, give_up: bool) {
        self.job.iter().for_each(|job| job.retry(give_up));
    }

    /// Tells it to end.
    pub fn cancel(&mut self) {
        self.cancelled = true;
        // One whose end is put off is looked at soon.
        self.retry.at = None;
        self.job.iter().for_each(Job::cancel);
    }

    /// Has its thread end, and says how it did. A stream that is ready needs no conclusion where the
    /// machine goes: that only closes what the machine has open. A commit does: without it the disk
    /// is where it was.
    pub fn stop(&mut self) -> JobStatus {
        let Some(job) = self.job.take() else {
            return JobStatus::Cancelled;
        };
        self.seen = job.end();
        if let Some(reason) = &self.failed {
            return JobStatus::Failed(reason.clone());
        }
        match (&self.seen.status, self.order.kind) {
            (JobStatus::Ready, JobKind::Commit) => JobStatus::Cancelled,
            (status, _) => status.clone(),
        }
    }

    /// When [`Live::look`] next has something to do, if the job does not tell earlier.
    pub fn next_look(&self) -> Instant {
        self.retry.at.unwrap_or(self.told.1 + PROGRESS_INTERVAL)
    }

    /// Tells that it waits for space, or no longer does.
    fn tell_waiting(&mut self) {
        let waits = self.seen.waiting.is_some();
        // How one ended is told otherwise.
        if waits != self.told_waiting
            && matches!(self.seen.status, JobStatus::Running | JobStatus::Ready)
        {
            self.told_waiting = waits;
            let event = if waits { "job-waiting" } else { "job-resumed" };
            tell(&self.events, event, &self.info());
        }
    }

    /// What has become of it, if it has ended.
    pub fn look(&mut self, devices: &DeviceManager, go_on: bool, now: Instant) -> Option<JobInfo> {
        let job = self.job.as_ref()?;
        let has_ended = job.has_ended();
        self.seen = job.view();
        let status = self.seen.status.clone();
        self.tell_waiting();
        let cancelled = self.cancelled && self.order.kind == JobKind::Commit;
        if self.failed.is_some() || (cancelled && status == JobStatus::Ready) {
            // Its thread may be waiting for the host, and nobody is to wait for that.
            self.told.1 = now;
            return has_ended.then(|| self.ended_as(JobStatus::Cancelled));
        }
        if status == JobStatus::Running {
            if now >= self.told.1 + PROGRESS_INTERVAL {
                let come = (self.seen.done_bytes, self.seen.copied_bytes);
                let before = std::mem::replace(&mut self.told, (come, now));
                if before.0 != come {
                    tell(&self.events, "job-progress", &self.info());
                }
            }
            return None;
        }
        if status != JobStatus::Ready {
            return Some(self.ended_as(status));
        }
        if self.retry.is_later_than(now) {
            return None;
        }
        let job = self.job.as_mut()?;
        let concluded = match devices.disk(&self.order.disk) {
            Ok(block) => job.conclude(block, go_on),
            // Its job went with it.
            Err(_) => return Some(self.ended_as(JobStatus::Cancelled)),
        };
        // What the end took is counted too.
        self.seen = job.view();
        match concluded {
            Ok(reason) => Some(JobInfo {
                reason,
                ..self.ended_as(JobStatus::Ready)
            }),
            // It tells when it is ready again, or has ended.
            Err(ConcludeError::NoSpace | ConcludeError::NotReady) => {
                self.retry = Retry::default();
                None
            }
            Err(ConcludeError::Timeout) if self.retry.put_off(Instant::now()) => None,
            Err(error) => {
                self.failed = Some(error.to_string());
                self.retry = Retry::default();
                // It tells when it has.
                job.cancel();
                let has_ended = job.has_ended();
                has_ended.then(|| self.ended_as(JobStatus::Cancelled))
            }
        }
    }
}

/// When the end of a job is to be tried again, as the disk could not write out in time.
#[derive(Default)]
struct Retry {
    at: Option<Instant>,
    attempts: u32,
}

impl Retry {
    fn is_later_than(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| now < at)
    }

    /// It was tried in vain; whether it is to be tried again.
    fn put_off(&mut self, now: Instant) -> bool {
        self.attempts += 1;
        self.at = Some(now + RETRY_INTERVAL);
        self.attempts < ATTEMPTS
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

/// Tells of a job.
pub fn tell(events: &Events, event: &'static str, job: &JobInfo) {
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
    let wanted = job.waiting_for_space.as_ref();
    let needed = wanted.map(|wanted| wanted.needed_bytes.to_string());
    let free = wanted.and_then(|wanted| wanted.free_bytes);
    let free = free.map(|bytes| bytes.to_string());
    properties.extend(needed.as_deref().map(|needed| ("needed_bytes", needed)));
    properties.extend(free.as_deref().map(|free| ("free_bytes", free)));
    properties.extend(wanted.map(|wanted| ("error", wanted.error.as_str())));
    properties.extend(job.reason.as_deref().map(|reason| ("reason", reason)));
    events.emit("virtio-device", event, &properties);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_takes_too_long_is_tried_again_later_and_not_for_ever() {
        let begin = Instant::now();
        let mut now = begin;
        let mut retry = Retry::default();
        assert!(!retry.is_later_than(now), "the first time is at once");
        for _ in 1..ATTEMPTS {
            assert!(retry.put_off(now));
            assert!(retry.is_later_than(now));
            now += RETRY_INTERVAL;
            assert!(!retry.is_later_than(now));
        }
        assert!(!retry.put_off(now));
        assert_eq!(now - begin, RETRY_INTERVAL * (ATTEMPTS - 1));
    }
}
