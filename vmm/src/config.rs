//! The VM's configuration: the body of `vm.create`, the file of `--config`, and part of `vm.info`.
//!
//! Field names, defaults and meanings are Cloud Hypervisor's. Fields of features that are not
//! built yet are not here; `api` refuses them by name.

use std::collections::HashMap;
use std::path::PathBuf;

use devices::balloon::BalloonConfig;
use devices::block::DiskConfig;
use devices::config::{DeviceConfig, Invalid};
use devices::legacy::{ConsoleConfig, ConsoleMode, DebugConsoleConfig};
use devices::rng::RngConfig;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::device_manager::TRANSPORT_PREFIX;
use crate::error::Error;
use crate::layout::{HOLE_END, HOLE_START};
use crate::overcommit::control::COUNTERS_ID;
use crate::vm::RNG_ID;

mod balloons;
mod cpus;
mod memory;
mod overcommit;
mod platform;

pub use balloons::{BALLOON_ID, VmResize};
pub use cpus::{CoreFeatures, CoreScheduling, CpuAffinity, CpuTopology, CpusConfig};
pub use memory::MemoryConfig;
pub use overcommit::{CpuMax, OvercommitConfig, OvercommitMode};
pub use platform::PlatformConfig;

/// The most vCPUs a VM can have.
pub const MAX_VCPUS: u32 = 64;

/// Everything about a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmConfig {
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the guest boots. Needed by `vm.boot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Disks.
    #[serde(
        default,
        deserialize_with = "null_is_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub disks: Vec<DiskConfig>,
    /// A balloon with the id `__balloon`, unless it is given one; the place where Cloud Hypervisor
    /// has its only balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Balloons, each with a target of its own.
    #[serde(
        default,
        deserialize_with = "null_is_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub balloons: Vec<BalloonConfig>,
    /// What the VM is guaranteed, and what the governor may take of the rest. Without it nothing
    /// is guaranteed and nothing taken but what clients ask for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overcommit: Option<OvercommitConfig>,
    /// The entropy device.
    #[serde(default)]
    pub rng: RngConfig,
    /// The first serial port (COM1).
    #[serde(default)]
    pub serial: ConsoleConfig,
    /// The virtio console, which is not built yet: only `Off` and `Null` are accepted.
    #[serde(default = "no_console")]
    pub console: ConsoleConfig,
    /// A write-only port for early boot messages.
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// What the guest reads in its SMBIOS tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
}

/// What the guest boots: exactly one of `kernel` and `firmware`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PayloadConfig {
    /// A firmware as an ELF file with a PVH note.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub firmware: Option<PathBuf>,
    /// A kernel: an ELF `vmlinux` with a PVH note, or a bzImage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// The kernel's initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initramfs: Option<PathBuf>,
}

fn no_console() -> ConsoleConfig {
    ConsoleConfig {
        mode: ConsoleMode::Off,
        file: None,
        socket: None,
    }
}

/// Generated clients send null for a list they have nothing to say about.
fn null_is_empty<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl VmConfig {
    /// Checks all that can be known without looking at the host.
    pub fn validate(&self) -> Result<(), Error> {
        self.cpus.validate().map_err(|e| e.within("cpus"))?;
        self.memory.validate().map_err(|e| e.within("memory"))?;
        self.validate_addresses(self.cpus.max_phys_bits)?;
        self.validate_overcommit()?;
        if let Some(payload) = &self.payload {
            payload.validate().map_err(|e| e.within("payload"))?;
        }
        if let Some(platform) = &self.platform {
            platform.validate().map_err(|e| e.within("platform"))?;
        }
        self.serial.validate().map_err(|e| e.within("serial"))?;
        self.debug_console
            .validate()
            .map_err(|e| e.within("debug_console"))?;
        if !matches!(self.console.mode, ConsoleMode::Off | ConsoleMode::Null) {
            return Err(Invalid::new(
                "console.mode",
                "not supported yet: the virtio console; use `serial`, and `Off` or `Null` here",
            )
            .into());
        }
        self.validate_devices()
    }

    /// Checks that all of RAM lies within `bits` of physical address.
    pub(crate) fn validate_addresses(&self, bits: u8) -> Result<(), Error> {
        let end = match self.memory.size.checked_sub(HOLE_START) {
            None | Some(0) => HOLE_END,
            Some(high) => HOLE_END.saturating_add(high),
        };
        if end > 1u64.checked_shl(bits.into()).unwrap_or(u64::MAX) {
            return Err(Invalid::new(
                "memory.size",
                format!("ends at {end:#x}, and the vCPUs have {bits} bits of physical address"),
            )
            .into());
        }
        Ok(())
    }

    /// Every pluggable device, with the name of its field, in the order of creation.
    pub fn devices(&self) -> Vec<(String, DeviceConfig)> {
        let disks = self
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| (format!("disks[{index}]"), DeviceConfig::Disk(disk.clone())));
        let rng = ("rng".to_owned(), DeviceConfig::Rng(self.rng.clone()));
        let balloons = self
            .all_balloons()
            .map(|(field, _, balloon)| (field, DeviceConfig::Balloon(balloon.clone())));
        std::iter::once(rng).chain(disks).chain(balloons).collect()
    }

    /// Adds a device; says at which field it then stands.
    pub fn add(&mut self, device: DeviceConfig) -> Result<String, Error> {
        match device {
            DeviceConfig::Balloon(balloon) => {
                self.balloons.push(balloon);
                Ok(format!("balloons[{}]", self.balloons.len() - 1))
            }
            DeviceConfig::Disk(disk) => {
                self.disks.push(disk);
                Ok(format!("disks[{}]", self.disks.len() - 1))
            }
            DeviceConfig::Rng(_) => Err(Invalid::new("rng", "there is one already").into()),
        }
    }

    /// Removes the device `id`; false where there is none.
    pub fn remove(&mut self, id: &str) -> bool {
        let before = self.disks.len();
        self.disks
            .retain(|disk| disk.common.id.as_deref() != Some(id));
        self.disks.len() < before || self.remove_balloon(id)
    }

    fn validate_devices(&self) -> Result<(), Error> {
        // vm.counters has the governor's beside the devices'.
        let mut ids = HashMap::from([(COUNTERS_ID.to_owned(), "overcommit".to_owned())]);
        let mut slots = HashMap::new();
        let devices = self.devices();
        // Slot 0 is the host bridge.
        if devices.len() > 31 {
            return Err(Error::NoSlot(format!(
                "{} devices, and 31 slots to plug them into",
                devices.len()
            )));
        }
        for (field, device) in &devices {
            device.validate().map_err(|e| e.within(field))?;
            let common = device.common();
            if let Some(id) = &common.id
                && ids.insert(id.clone(), field.clone()).is_some()
            {
                return Err(Error::DuplicateId {
                    field: format!("{field}.id"),
                    id: id.clone(),
                });
            }
            if let Some(slot) = common.pci_device_id
                && slots.insert(slot, field.clone()).is_some()
            {
                return Err(Invalid::new(
                    format!("{field}.pci_device_id"),
                    format!("slot {slot} is taken"),
                )
                .into());
            }
        }
        // vm.info names the PCI function of the device `x` so, among the devices.
        for (id, field) in &ids {
            if let Some(other) = id.strip_prefix(TRANSPORT_PREFIX)
                && (other == RNG_ID || ids.contains_key(other))
            {
                return Err(Error::DuplicateId {
                    field: format!("{field}.id"),
                    id: id.clone(),
                });
            }
        }
        self.validate_balloons()?;
        for (index, disk) in self.disks.iter().enumerate() {
            self.validate_disk(&format!("disks[{index}]"), disk, index)?;
        }
        Ok(())
    }

    /// Checks a disk against the VM and against the first `others` disks.
    pub fn validate_disk(
        &self,
        field: &str,
        disk: &DiskConfig,
        others: usize,
    ) -> Result<(), Error> {
        if u32::from(disk.num_queues) > self.cpus.boot_vcpus {
            return Err(Invalid::new(
                format!("{field}.num_queues"),
                format!(
                    "must not exceed the number of vCPUs, {}",
                    self.cpus.boot_vcpus
                ),
            )
            .into());
        }
        for other in self.disks.iter().take(others) {
            if other.path == disk.path && !(other.readonly && disk.readonly) {
                return Err(Error::DuplicatePath {
                    field: format!("{field}.path"),
                    path: disk.path.display().to_string(),
                    id: other.common.id.clone().unwrap_or_default(),
                });
            }
        }
        Ok(())
    }
}

impl PayloadConfig {
    fn validate(&self) -> Result<(), Invalid> {
        match (&self.kernel, &self.firmware) {
            (Some(_), Some(_)) => Err(Invalid::new(
                "firmware",
                "give either a kernel or a firmware, not both",
            )),
            (None, None) => Err(Invalid::new("kernel", "give a kernel or a firmware")),
            (None, Some(_)) if self.initramfs.is_some() => Err(Invalid::new(
                "initramfs",
                "only a kernel takes one, not a firmware",
            )),
            (None, Some(_)) if self.cmdline.is_some() => Err(Invalid::new(
                "cmdline",
                "only a kernel takes one, not a firmware",
            )),
            _ => {
                let length = self.cmdline.as_deref().map_or(0, str::len);
                if length > crate::layout::CMDLINE_MAX_BYTES - 1 {
                    return Err(Invalid::new(
                        "cmdline",
                        format!(
                            "has {length} bytes, at most {} are possible",
                            crate::layout::CMDLINE_MAX_BYTES - 1
                        ),
                    ));
                }
                if self.cmdline.as_deref().is_some_and(|c| c.contains('\0')) {
                    return Err(Invalid::new("cmdline", "must not contain a NUL"));
                }
                Ok(())
            }
        }
    }
}
