//! The VM as `vm.info` shows it. The VMM thread publishes it after every change; readers never
//! wait for that thread.

use std::collections::BTreeMap;

use devices::balloon::{BalloonInfo, GuestStatistics};
use devices::block::DiskReading;
use devices::pci::BarInfo;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::VmConfig;
use crate::jobs::JobInfo;
use crate::overcommit::ledger::LedgerStatus;
use crate::overcommit::view::View;
use crate::state::State;

/// `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct VmInfo {
    /// The configuration, with made-up ids and the paths of pseudo-terminals filled in.
    pub config: VmConfig,
    /// What the VM is doing.
    pub state: State,
    /// Bytes of RAM less those that the guest says its balloons have, as of about a second ago.
    pub memory_actual_size: u64,
    /// The ledger that the VM shares with the others on the host, and whether it works; absent
    /// without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overcommit_ledger: Option<LedgerStatus>,
    /// The devices of a booted VM by id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// A device of a booted VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DeviceNode {
    /// The device's id.
    pub id: String,
    /// Addresses it occupies.
    pub resources: Vec<Resource>,
    /// The device it hangs from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The devices that hang from it.
    pub children: Vec<String>,
    /// Its PCI address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "0000:00:02.0")]
    pub pci_bdf: Option<String>,
    /// Present while the device is on its way out: the guest has been asked to eject it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub removal: Option<Removal>,
}

/// Where a removal stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Removal {
    /// The guest has been asked and has not ejected the device yet.
    Removing,
    /// The guest has not ejected it in time; `vm.remove-device` asks again, and a reset of the
    /// guest completes it.
    TimedOut,
}

/// Addresses a device occupies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub enum Resource {
    /// A PCI base address register.
    PciBar(BarInfo),
}

/// A device that was added: its id and, once the VM is booted, where it was plugged.
///
/// There is one shape for a VM that runs and one that does not, so that a generated client has one
/// type to return (Cloud Hypervisor answers 200 with a body or 204 without).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PciDeviceInfo {
    /// The device's id.
    #[schema(example = "_disk1")]
    pub id: String,
    /// Its PCI address: segment, bus, device, function. Absent while the VM is not booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "0000:00:05.0")]
    pub bdf: Option<String>,
}

/// `vm.balloon-stats`: what the guest tells of its memory, by way of the first balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct BalloonStats {
    /// Bytes the guest says it has given.
    pub balloon_actual: u64,
    /// Its statistics.
    pub stats: GuestStatistics,
}

/// All that is counted of a VM, for who watches it.
#[derive(Clone, Debug)]
pub struct Observation {
    /// What it is doing.
    pub state: State,
    /// Where its memory is.
    pub view: View,
    /// Where its balloons stand.
    pub balloons: Vec<BalloonInfo>,
    /// What its disks take and hold; how old that is, the view says.
    pub disks: Vec<DiskReading>,
    /// The jobs on its disks, with the last that have ended.
    pub jobs: Vec<JobInfo>,
    /// Running totals of its devices.
    pub counters: VmCounters,
    /// How often each vCPU has left the guest, by what it was for.
    pub exits: Vec<BTreeMap<&'static str, u64>>,
}

/// `vm.counters`: running totals by device id and counter name.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;

/// What the VMM thread publishes: `None` while there is no VM.
pub type Status = Option<std::sync::Arc<VmInfo>>;
