//! Jobs on the disks of a VM, and what a disk that has one is not to be asked for.

use std::num::NonZeroU64;
use std::time::Instant;

use devices::config::Invalid;

use super::Created;
use crate::error::Error;
use crate::jobs::{Ended, JobInfo, NewJob};
use crate::vm::Environment;

impl Created {
    /// Begins a job on a disk.
    pub fn begin_job(
        &mut self,
        order: NewJob,
        environment: &Environment,
    ) -> Result<JobInfo, Error> {
        let vm = self.running.as_ref().ok_or(Error::NotCreated)?;
        if vm.devices.is_leaving(&order.disk) {
            let reason = format!("the device `{}` is being removed", order.disk);
            return Err(Invalid::new("id", reason).into());
        }
        self.jobs.begin(order, &vm.devices, environment)
    }

    /// The jobs, with those that have ended last.
    pub fn jobs(&self) -> Vec<JobInfo> {
        self.jobs.list()
    }

    /// Tells a job to end.
    pub fn cancel_job(&mut self, id: &str) -> Result<(), Error> {
        self.jobs.cancel(id)
    }

    /// Has a job read up to so many bytes a second.
    pub fn set_job(&mut self, id: &str, speed: Option<NonZeroU64>) -> Result<(), Error> {
        self.jobs.set_speed(id, speed)
    }

    /// Has the job of a disk try at once what lacks space, and perhaps give up.
    pub fn retry_job_on(&self, disk: &str, give_up: bool) {
        self.jobs.retry_on(disk, give_up);
    }

    /// Looks what has become of the jobs; those that have ended are to be told of, once the
    /// configuration is published.
    pub fn look_at_jobs(&mut self, now: Instant) -> Vec<Ended> {
        let Some(vm) = &self.running else {
            return Vec::new();
        };
        let ended = self.jobs.look(&vm.devices, !self.paused, now);
        let moved = ended.iter().filter_map(Ended::moved);
        let moved: Vec<_> = moved
            .filter_map(|id| Some((id.to_owned(), vm.devices.disk(id).ok()?.config())))
            .collect();
        for (id, config) in moved {
            self.move_disk(&id, config);
        }
        ended
    }

    /// Has the jobs wait for the next machine: this one is about to go.
    pub fn suspend_jobs(&mut self) {
        self.jobs.suspend();
    }

    /// Has them go on, in that machine. Where there is none, they end.
    pub fn begin_jobs_again(&mut self, environment: &Environment) {
        match &self.running {
            Some(vm) => self.jobs.begin_again(&vm.devices, environment),
            None => self.jobs.end(|_| true),
        }
    }

    /// Makes a disk larger, and tells the guest.
    pub fn resize_disk(&mut self, id: &str, desired_size: u64) -> Result<(), Error> {
        self.jobs.check_free(id)?;
        self.running()?.devices.resize_disk(id, desired_size)
    }
}
