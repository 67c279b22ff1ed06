//! Commands to devices: plugged, unplugged, resized, asked.

use std::time::Instant;

use devices::balloon::BalloonInfo;
use devices::block::job::JobKind;
use devices::block::snapshot::DiskSnapshot;
use devices::config::DeviceConfig;

use super::Vmm;
use crate::balloons;
use crate::command::Reply;
use crate::config::VmResize;
use crate::disks::emit_moved_on;
use crate::error::Error;
use crate::jobs::{JobInfo, NewJob};
use crate::overcommit::control::COUNTERS_ID;
use crate::state::{State, Verb};
use crate::status::{BalloonStats, PciDeviceInfo, VmCounters};

impl Vmm {
    pub(super) fn add_device(&mut self, device: DeviceConfig) -> Result<PciDeviceInfo, Error> {
        self.created(Verb::AddDevice)?.add_device(device)
    }

    pub(super) fn remove_device(&mut self, id: &str) -> Result<(), Error> {
        let removed = self.created(Verb::RemoveDevice)?.remove_device(id)?;
        self.tell_removed(removed);
        Ok(())
    }

    pub(super) fn resize(&mut self, desired: VmResize) -> Result<(), Error> {
        self.legal(Verb::Resize)?;
        self.emit("vm", "resizing", &[]);
        self.created(Verb::Resize)?.resize(desired)?;
        self.emit("vm", "resized", &[]);
        Ok(())
    }

    /// Has a disk and its job try again what lacks space; a VM that was paused for that goes on.
    pub(super) fn resume_disk(&mut self, id: &str, give_up: bool) -> Result<(), Error> {
        let created = self.created(Verb::ResumeDisk)?;
        let disk = created.running()?.devices.disk(id)?;
        if give_up {
            disk.give_up_held();
        }
        disk.retry_held();
        created.retry_job_on(id, give_up);
        if created.is_paused_for_space() {
            self.resume()?;
        }
        Ok(())
    }

    pub(super) fn snapshot_disks(&mut self, disks: &[DiskSnapshot]) -> Result<(), Error> {
        let moved = self.created(Verb::SnapshotDisk)?.snapshot_disks(disks)?;
        self.publish();
        for disk in moved {
            emit_moved_on(&self.endpoint.events, &disk);
        }
        Ok(())
    }

    pub(super) fn begin_job(&mut self, order: NewJob) -> Result<JobInfo, Error> {
        let environment = self.environment();
        let verb = match order.kind {
            JobKind::Stream => Verb::StreamDisk,
            JobKind::Commit => Verb::CommitDisk,
        };
        self.created(verb)?.begin_job(order, &environment)
    }

    /// Has jobs whose threads have ended come to their end.
    pub(super) fn look_at_jobs(&mut self) {
        if let Some(created) = &mut self.created {
            let ended = created.look_at_jobs(Instant::now());
            self.tell_jobs(ended);
        }
    }

    /// Has the balloons' threads answer, as the guest is asked for statistics first; one that
    /// stands still is not asked.
    pub(super) fn balloons(&mut self, reply: Reply<Vec<BalloonInfo>>) {
        let fresh = self.state() == Some(State::Running);
        match self.created(Verb::Balloons).and_then(|c| c.running()) {
            Ok(vm) => balloons::answer_all(vm.devices.balloons(), fresh, reply),
            Err(error) => self.answer(reply, Err(error)),
        }
    }

    pub(super) fn balloon_stats(&mut self, reply: Reply<BalloonStats>) {
        let balloon = self.created(Verb::BalloonStats).and_then(|created| {
            let id = created.first_balloon()?;
            created.running()?.devices.balloon(&id)
        });
        match balloon {
            Ok(balloon) => balloons::answer_statistics(balloon, reply),
            Err(error) => self.answer(reply, Err(error)),
        }
    }

    pub(super) fn counters(&mut self) -> Result<VmCounters, Error> {
        let created = self.created(Verb::Counters)?;
        let mut counters = created.running()?.devices.counters();
        if created.info().config.overcommit.is_some() {
            counters.insert(COUNTERS_ID.to_owned(), self.control.counters());
        }
        Ok(counters)
    }
}
