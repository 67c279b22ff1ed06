//! The ACPI PCI hotplug registers: which slots have news for the guest, and what it lets go of.
//!
//! | offset | register |
//! |---|---|
//! | 0 | up: slots with a new device, one bit each; reading clears it |
//! | 4 | down: slots whose device is to go, one bit each; reading clears it |
//! | 8 | eject: writing a slot's bit lets go of its device |
//!
//! The registers are 32 bits wide, and only whole ones can be read or written; the tables' AML
//! does nothing else. The Generic Event Device ([`crate::acpi::Ged`]) tells the guest to look.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::BusDevice;
use crate::signals::GuestSignals;

/// I/O ports of the three registers.
pub const HOTPLUG_PORTS: u64 = 12;
/// Offset of the up register.
pub const UP_OFFSET: u64 = 0;
/// Offset of the down register.
pub const DOWN_OFFSET: u64 = 4;
/// Offset of the eject register.
pub const EJECT_OFFSET: u64 = 8;

/// The hotplug registers of the one PCI bus.
pub struct PciHotplug {
    up: AtomicU32,
    down: AtomicU32,
    signals: Arc<GuestSignals>,
}

impl PciHotplug {
    /// Registers without news; ejections are reported to `signals`.
    pub fn new(signals: Arc<GuestSignals>) -> Self {
        Self {
            up: AtomicU32::new(0),
            down: AtomicU32::new(0),
            signals,
        }
    }

    /// A device was plugged into `slot` (0–31; others are ignored). Called on the VMM thread,
    /// which then tells the Generic Event Device.
    pub fn slot_added(&self, slot: u8) {
        let bit = bit(slot);
        // A removal the guest has not heard of yet was of the device that was there before.
        self.down.fetch_and(!bit, Ordering::SeqCst);
        self.up.fetch_or(bit, Ordering::SeqCst);
    }

    /// The guest is to let go of the device in `slot`; may be asked again. Called on the VMM
    /// thread, which then tells the Generic Event Device.
    pub fn request_removal(&self, slot: u8) {
        self.down.fetch_or(bit(slot), Ordering::SeqCst);
    }

    /// The machine is reset: a guest that boots finds all there is by itself.
    pub fn reset(&self) {
        self.up.store(0, Ordering::SeqCst);
        self.down.store(0, Ordering::SeqCst);
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match offset {
            UP_OFFSET => self.up.swap(0, Ordering::SeqCst),
            DOWN_OFFSET => self.down.swap(0, Ordering::SeqCst),
            EJECT_OFFSET => 0,
            _ => return,
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (EJECT_OFFSET, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            let slots = u32::from_le_bytes(data);
            for slot in (0..32).filter(|slot| slots & bit(*slot) != 0) {
                self.signals.eject(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(device: &PciHotplug, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn news_is_read_once_and_ejections_are_reported() {
        let signals = Arc::new(GuestSignals::new(|| {}));
        let device = PciHotplug::new(signals.clone());
        device.slot_added(3);
        device.slot_added(31);
        device.request_removal(5);
        device.slot_added(32);
        assert_eq!(read(&device, UP_OFFSET), 1 << 3 | 1 << 31);
        assert_eq!(read(&device, UP_OFFSET), 0);
        assert_eq!(read(&device, DOWN_OFFSET), 1 << 5);
        device.request_removal(5);
        assert_eq!(read(&device, DOWN_OFFSET), 1 << 5, "it may be asked again");
        device.write(EJECT_OFFSET, &(1u32 << 5 | 1 << 7).to_le_bytes());
        assert_eq!(signals.take().ejected, 1 << 5 | 1 << 7);
    }

    #[test]
    fn a_reset_or_a_new_device_makes_old_news_void() {
        let device = PciHotplug::new(Arc::new(GuestSignals::new(|| {})));
        device.request_removal(5);
        device.slot_added(5);
        assert_eq!(read(&device, DOWN_OFFSET), 0);
        device.request_removal(6);
        device.reset();
        assert_eq!(
            (read(&device, UP_OFFSET), read(&device, DOWN_OFFSET)),
            (0, 0)
        );
    }

    proptest! {
        #[test]
        fn accesses_of_every_width_and_offset_do_no_harm(
            offset in prop_oneof![0..16u64, any::<u64>()],
            mut data in prop::collection::vec(any::<u8>(), 0..17),
        ) {
            let signals = Arc::new(GuestSignals::new(|| {}));
            let device = PciHotplug::new(signals.clone());
            device.write(offset, &data);
            let whole = offset == EJECT_OFFSET && data.len() == 4 && data != [0; 4];
            prop_assert_eq!(signals.take().ejected != 0, whole);
            device.read(offset, &mut data);
        }
    }
}
