//! Where the structures of the transport lie in BAR 0, and the capabilities that say so
//! (virtio 1.3 §4.1.4).
//!
//! ```text
//! 0x0000 common configuration   0x3000 notifications, 4 bytes a queue
//! 0x1000 ISR status             0x8000 MSI-X table
//! 0x2000 device configuration   0xc000 MSI-X pending bits
//! ```
//!
//! Structures stand on pages of their own, so that an access which starts in one and runs past its
//! end meets nothing else.

use super::registers::COMMON_SIZE;
use crate::pci::config::{ConfigSpace, LayoutError};

/// The BAR that holds everything.
pub(super) const BAR: u8 = 0;
pub(super) const COMMON: u64 = 0;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
const NOTIFY_END: u64 = 0x8000;
pub(super) const MSIX_TABLE: u64 = 0x8000;
pub(super) const MSIX_PENDING: u64 = 0xc000;
/// notify_off_multiplier: bytes between the doorbells of two queues.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// A table of 16 KiB has a vector for each of these, and one for the configuration.
pub(super) const MAX_QUEUES: usize = 1023;

const VENDOR_SPECIFIC: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI_ACCESS: u8 = 5;

/// One of the structures in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
    Nothing,
}

/// The structure at an offset into the BAR, and the offset within it.
pub(super) fn region(offset: u64) -> (Region, u64) {
    match offset {
        COMMON..ISR => (Region::Common, offset - COMMON),
        ISR..DEVICE => (Region::Isr, offset - ISR),
        DEVICE..NOTIFY => (Region::Device, offset - DEVICE),
        NOTIFY..NOTIFY_END => (Region::Notify, offset - NOTIFY),
        MSIX_TABLE..MSIX_PENDING => (Region::MsixTable, offset - MSIX_TABLE),
        MSIX_PENDING..super::VIRTIO_BAR_SIZE => (Region::MsixPending, offset - MSIX_PENDING),
        _ => (Region::Nothing, 0),
    }
}

/// Adds the five capabilities; returns the offset of the last, the PCI configuration access
/// capability (§4.1.4.9).
pub(super) fn add_capabilities(
    space: &mut ConfigSpace,
    queues: usize,
) -> Result<usize, LayoutError> {
    let mut add = |kind, offset: u64, length: u64, extra: &[u8], writable: &[u8]| {
        // Length, type, BAR, id and padding, offset, length, as struct virtio_pci_cap has them
        // behind the two bytes common to all capabilities.
        let mut body = vec![(16 + extra.len()) as u8, kind, BAR, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(extra);
        space.add_capability(VENDOR_SPECIFIC, &body, writable)
    };
    add(CAP_COMMON, COMMON, COMMON_SIZE as u64, &[], &[])?;
    add(CAP_ISR, ISR, 1, &[], &[])?;
    add(CAP_DEVICE, DEVICE, NOTIFY - DEVICE, &[], &[])?;
    let doorbells = queues as u64 * u64::from(NOTIFY_MULTIPLIER);
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    add(CAP_NOTIFY, NOTIFY, doorbells, &multiplier, &[])?;
    // The driver writes BAR, offset, length and data.
    let mut writable = [0xff; 18];
    (writable[0], writable[1]) = (0, 0);
    (writable[3], writable[4], writable[5]) = (0, 0, 0);
    add(CAP_PCI_ACCESS, 0, 0, &[0; 4], &writable)
}

/// An access that the driver asks for through the PCI configuration access capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) offset: u64,
    pub(super) length: usize,
    pub(super) data: [u8; 4],
}

impl Window {
    /// Where pci_cfg_data lies from the start of the capability.
    pub(super) const DATA: usize = 16;

    /// What the capability at `at` asks for; `None` for what a driver must not ask for
    /// (§4.1.4.9.2): another BAR, a length that is not 1, 2 or 4, an unaligned offset or one past
    /// the end.
    pub(super) fn of(space: &ConfigSpace, at: usize) -> Option<Self> {
        let mut cap = [0; 20];
        space.read(at, &mut cap);
        let [
            _,
            _,
            _,
            _,
            bar,
            _,
            _,
            _,
            o0,
            o1,
            o2,
            o3,
            l0,
            l1,
            l2,
            l3,
            data @ ..,
        ] = cap;
        let offset = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let sound = bar == BAR
            && matches!(length, 1 | 2 | 4)
            && offset % u64::from(length) == 0
            && offset < super::VIRTIO_BAR_SIZE;
        sound.then_some(Self {
            offset,
            length: length as usize,
            data,
        })
    }

    /// Whether an access to configuration space touches pci_cfg_data of the capability at `at`.
    pub(super) fn touched(at: usize, offset: usize, len: usize) -> bool {
        let data = at + Self::DATA;
        offset < data + 4 && offset.saturating_add(len) > data
    }
}
