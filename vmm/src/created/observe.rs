//! What others are shown of the VM: where its memory is, what its disks take, what is counted.

use super::Created;
use crate::overcommit::ledger::Measures;
use crate::overcommit::storage::{DiskTotals, Seen};
use crate::overcommit::view::{Observer, Subject, View};
use crate::status::{Observation, VmCounters};

impl Created {
    /// What the other VMs on the host are told of this one.
    pub fn measures(&self, observer: &mut Observer) -> Measures {
        let mut measures = Measures {
            actual: self.running.as_ref().map(|_| self.memory_actual_bytes()),
            ..Measures::default()
        };
        if let Ok(cost) = observer.cost(self.shared_ram()) {
            measures.resident = Some(cost.resident);
            measures.swap = cost.swap;
        }
        let disks = self.disks(observer);
        if !disks.disks.is_empty() {
            let totals = DiskTotals::of(&disks);
            measures.disk_virtual = Some(totals.virtual_size);
            measures.disk_allocated = Some(totals.allocated_size);
            measures.disk_unallocated = Some(totals.unallocated_size);
            measures.disk_host_free = Some(totals.host_free);
        }
        let profit = observer.ksm().net_profit;
        measures.ksm_profit = profit.map(i64::cast_unsigned);
        let balloons = self.running.iter().flat_map(|vm| vm.devices.balloons());
        for (id, balloon) in balloons {
            let info = balloon.viewer().info(id);
            let add = |sum: &mut Option<u64>, more: u64| {
                *sum = Some(sum.unwrap_or_default().saturating_add(more));
            };
            add(&mut measures.balloon_target, info.target);
            add(&mut measures.balloon_actual, info.actual);
            add(&mut measures.balloon_given, info.given);
            add(&mut measures.reported_free, info.reported_free);
            // Whoever of them told last: it is one guest.
            if let Some(sample) = info.statistics.get("available_memory")
                && measures.idle_age_ms.is_none_or(|age| sample.age_ms < age)
            {
                measures.idle = Some(sample.value);
                measures.idle_age_ms = Some(sample.age_ms);
            }
        }
        measures
    }

    /// Where the VM's memory is, and what its disks take.
    pub fn overcommit(&self, observer: &mut Observer) -> View {
        let disks = self.disks(observer);
        self.view(observer, &disks)
    }

    fn view(&self, observer: &mut Observer, disks: &Seen) -> View {
        let vm = self.running.as_ref();
        let balloons = vm.map(|vm| vm.devices.balloon_infos()).unwrap_or_default();
        let threads = vm.map(|vm| vm.vcpus.thread_ids()).unwrap_or_default();
        observer.view(&Subject {
            config: &self.config,
            balloons: &balloons,
            disks,
            vcpu_threads: &threads,
            shared_ram: self.shared_ram(),
        })
    }

    /// What its disks take of the host, as it was seen last where looking is slow.
    fn disks(&self, observer: &mut Observer) -> Seen {
        let Some(vm) = &self.running else {
            return Seen::default();
        };
        let ids = vm.devices.disks().map(|(id, _)| id);
        let disks = || vm.devices.disks().map(|(id, disk)| disk.reading(id));
        observer.disks(ids, || disks().collect())
    }

    /// What there is to count but the devices' totals, without asking the guest.
    pub fn observe(&self, observer: &mut Observer) -> Observation {
        let vm = self.running.as_ref();
        let disks = self.disks(observer);
        Observation {
            state: self.state(),
            view: self.view(observer, &disks),
            balloons: vm.map(|vm| vm.devices.balloon_infos()).unwrap_or_default(),
            disks: disks.disks,
            jobs: self.jobs.list(),
            counters: VmCounters::new(),
            exits: vm.map(|vm| vm.vcpus.exits()).unwrap_or_default(),
        }
    }
}
