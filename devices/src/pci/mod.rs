//! PCI: one segment, one bus, 32 slots, single-function devices with MSI-X.

pub mod bus;
pub mod config;
pub mod hotplug;
pub mod msix;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A device in a slot of the [`bus::PciBus`].
///
/// Called on vCPU threads; offsets and values come from the guest, implementations must not panic,
/// block or do I/O.
pub trait PciDevice: Send + Sync {
    /// Reads configuration space (4096 bytes by ECAM, the first 256 by ports); `data` arrives
    /// filled with zeroes. The bus has made sure that `offset + data.len() <= 4096`.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// Reads memory at a physical `address`; `false` where no enabled BAR of this device covers
    /// it all.
    fn read_memory(&self, address: u64, data: &mut [u8]) -> bool;
    /// Writes memory at a physical `address`; `false` as above.
    fn write_memory(&self, address: u64, data: &[u8]) -> bool;
    /// The BARs as they are placed now, for `device_tree`.
    fn bars(&self) -> Vec<BarInfo>;
}

/// A base address register as `vm.info` shows it (Cloud Hypervisor's `PciBar` resource).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BarInfo {
    /// Which BAR, 0–5.
    pub index: u32,
    /// Guest physical address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
    /// Kind of address space.
    pub type_: BarType,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

/// The address space of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = PciBarType)]
pub enum BarType {
    /// 32-bit memory.
    Mmio32,
    /// 64-bit memory.
    Mmio64,
    /// I/O ports.
    Pio,
}
