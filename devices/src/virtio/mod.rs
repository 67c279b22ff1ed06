//! Virtio (version 1.3): the virtqueue, the modern PCI transport, and what a device must offer to
//! be carried by it.
//!
//! The transport ([`pci`]) owns all registers and lives on vCPU threads. When the driver sets
//! DRIVER_OK it hands the queues to the device's workers as an [`Activation`]; when the driver
//! writes 0 to the status it orders a reset, and `device_status` reads non-zero until every worker
//! has carried it out (virtio 1.3 §4.1.4.3.1 has the driver wait for that).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::balloon::Balloon;
use crate::block::Block;
use crate::worker::Worker;

pub mod config_space;
pub mod pci;
pub mod queue;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;

pub use queue::VirtQueue;

/// How the transport of a device is told about the device's state; called on device threads.
pub trait TransportSignals: Send + Sync {
    /// Sets DEVICE_NEEDS_RESET and interrupts the driver (virtio 1.3 §2.1.2).
    fn needs_reset(&self);
    /// The device changed its configuration space: bumps the generation, interrupts the driver.
    fn config_changed(&self);
}

/// How a queue interrupts the driver; called on device threads.
pub trait QueueInterrupt: Send + Sync {
    /// Delivers the queue's interrupt, or sets its pending bit while it is masked.
    fn trigger(&self);
}

/// What a worker gets when the driver is ready.
pub struct Activation {
    /// The features both sides agreed on.
    pub features: u64,
    /// The queues this worker serves, by ascending index; only those the driver enabled.
    pub queues: Vec<VirtQueue>,
    /// Where to report a change or a failure.
    pub signals: Arc<dyn TransportSignals>,
}

/// A virtio device as the transport sees it: the shared half, touched by vCPU threads (registers)
/// and by the VMM thread (control).
///
/// Offsets and values come from the guest; implementations must not panic, block or do I/O.
pub trait VirtioDevice: Send + Sync {
    /// The device's number (virtio 1.3 §5: 2 block, 4 entropy, 5 balloon …).
    fn device_type(&self) -> u16;
    /// The device-specific features offered. The transport adds VIRTIO_F_VERSION_1, and EVENT_IDX
    /// and INDIRECT_DESC, which [`VirtQueue`] implements for all.
    fn features(&self) -> u64;
    /// The most descriptors each queue can have: one entry per queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device-specific configuration space; `data` arrives filled with zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device-specific configuration space.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// The driver accepted these features (FEATURES_OK), or 0 when the device is reset. For
    /// devices whose shared half depends on it.
    fn features_accepted(&self, _features: u64) {}
    /// The device's threads.
    fn workers(&self) -> &[Worker];
    /// Running totals for `vm.counters`; empty for devices that count nothing.
    fn counters(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::new()
    }
    /// The device as a balloon, where it is one, for who sets its target and asks where it stands.
    fn as_balloon(&self) -> Option<&Balloon> {
        None
    }
    /// The device as a disk, where it is one, for who resizes it and asks how it stands.
    fn as_block(&self) -> Option<&Block> {
        None
    }
    /// Which of [`VirtioDevice::workers`] serves the queue `index`.
    fn worker_of_queue(&self, _index: usize) -> usize {
        0
    }
}
