//! All VMs of a ledger at once, for people and their tools; reads only.

use std::path::Path;

use serde::Serialize;
use utoipa::ToSchema;

use super::host::{Host, boot_clock_ms};
use super::{Directory, LedgerError, Limits, Record};

/// A ledger at one moment. Sizes are in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Overview {
    /// The host.
    pub host: HostMemory,
    /// All VMs together.
    pub totals: Totals,
    /// Each VM.
    pub vms: Vec<VmOverview>,
    /// Records of processes that have died; the next VM that starts or boots removes them.
    pub stale_records: usize,
    /// Records of living processes that can't be read, and why; nothing is admitted beside them.
    pub unreadable_records: Vec<String>,
    /// Entries of the directory that are nothing of ours.
    pub foreign_entries: usize,
}

/// What the VMs share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct HostMemory {
    /// Memory that is not in a pool of huge pages.
    pub memory: u64,
    /// Where a cgroup (v2) of who asks has less: that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup_memory: Option<u64>,
    /// What no guarantee may use.
    pub reserve: u64,
    /// Most that may be promised for each byte of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ratio: Option<f64>,
}

/// Sums over all VMs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Totals {
    /// VMs that have memory set aside.
    pub vms: usize,
    /// The most they can have, and what their VMMs need.
    pub promised: u64,
    /// What is guaranteed to them, and what their VMMs need.
    pub guaranteed: u64,
    /// RAM less what is in balloons, as the guests say.
    pub actual: u64,
    /// Host memory they have now, of those that know.
    pub resident: u64,
    /// What of them lies on the host's swap, of those that know.
    pub swap: u64,
    /// What KSM saves, less what that costs, of those that know; below 0 where it costs more.
    pub ksm_profit: i64,
    /// Bytes of disks whose images are files, as the guests see them.
    pub disk_virtual: u64,
    /// Bytes that the host keeps for these files. Those that several VMs read count for each.
    pub disk_allocated: u64,
    /// Bytes that they may yet come to take.
    pub disk_unallocated: u64,
    /// What more could be guaranteed.
    pub free_for_guarantees: u64,
    /// Promised for each byte of memory.
    pub overcommit_ratio: f64,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct VmOverview {
    /// What it tells.
    #[serde(flatten)]
    pub record: Record,
    /// Milliseconds since it told that.
    pub age_ms: u64,
}

/// Reads a ledger.
pub fn read(path: &Path) -> Result<Overview, LedgerError> {
    let fail = |reason: String| LedgerError {
        path: path.to_owned(),
        reason,
    };
    let directory = Directory::open(path).map_err(|e| fail(e.to_string()))?;
    let limits = super::limits(&directory).map_err(fail)?;
    let snapshot = directory.snapshot().map_err(|e| fail(e.to_string()))?;
    let mut overview = empty(&limits).map_err(fail)?;
    let now = boot_clock_ms();
    overview.stale_records = snapshot.stale.len();
    overview.foreign_entries = snapshot.foreign;
    let unreadable = snapshot.unreadable.into_iter();
    overview.unreadable_records = unreadable
        .map(|u| format!("{}: {}", u.name, u.reason))
        .collect();
    for (_, record) in snapshot.records {
        overview.add(VmOverview {
            age_ms: now.saturating_sub(record.written_at_ms),
            record,
        });
    }
    overview.finish();
    Ok(overview)
}

/// The host without any VM.
pub fn empty(limits: &Limits) -> Result<Overview, String> {
    let host = Host::default();
    let ceilings = host.ceilings(&host.home(), std::iter::empty())?;
    let memory = ceilings.first().map_or(0, |host| host.bytes);
    let smallest = ceilings.iter().map(|ceiling| ceiling.bytes).min();
    let cgroup_memory = smallest.filter(|bytes| *bytes < memory);
    let mut overview = Overview {
        host: HostMemory {
            memory,
            cgroup_memory,
            reserve: limits.reserve(cgroup_memory.unwrap_or(memory)),
            max_ratio: limits.ratio,
        },
        ..Overview::default()
    };
    overview.finish();
    Ok(overview)
}

impl Overview {
    fn add(&mut self, vm: VmOverview) {
        let totals = &mut self.totals;
        let reservation = &vm.record.reservation;
        if reservation.overhead > 0 {
            totals.vms += 1;
        }
        for (total, more) in [
            (&mut totals.promised, Some(reservation.promised())),
            (&mut totals.guaranteed, Some(reservation.fixed())),
            (&mut totals.actual, vm.record.measures.actual),
            (&mut totals.resident, vm.record.measures.resident),
            (&mut totals.swap, vm.record.measures.swap),
            (&mut totals.disk_virtual, vm.record.measures.disk_virtual),
            (
                &mut totals.disk_allocated,
                vm.record.measures.disk_allocated,
            ),
            (
                &mut totals.disk_unallocated,
                vm.record.measures.disk_unallocated,
            ),
        ] {
            *total = total.saturating_add(more.unwrap_or_default());
        }
        let profit = vm.record.measures.ksm_profit.unwrap_or_default();
        totals.ksm_profit = totals.ksm_profit.saturating_add(profit.cast_signed());
        self.vms.push(vm);
    }

    fn finish(&mut self) {
        let memory = self.host.cgroup_memory.unwrap_or(self.host.memory);
        let taken = self.totals.guaranteed.saturating_add(self.host.reserve);
        self.totals.free_for_guarantees = memory.saturating_sub(taken);
        if memory > 0 {
            self.totals.overcommit_ratio = self.totals.promised as f64 / memory as f64;
        }
    }
}
