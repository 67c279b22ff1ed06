//! The Generic Event Device's register (ACPI 6.5 §5.6.9): which events are pending, and the
//! interrupt that says so.
//!
//! The guest's `_EVT` method reads the register, which clears it, and notifies whoever each bit is
//! for. An event raised between the interrupt and the read is seen twice or merged, never lost:
//! the bit is set before the interrupt is raised.

use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// I/O ports of the register.
pub const GED_PORTS: u64 = 1;

/// Bits of the register.
pub mod event {
    /// The power button was pressed.
    pub const POWER_BUTTON: u8 = 1 << 0;
    /// The PCI hotplug registers have news.
    pub const PCI: u8 = 1 << 1;
}

/// A Generic Event Device; made anew for each boot.
pub struct Ged {
    pending: AtomicU8,
    interrupt: EventFd,
}

impl Ged {
    /// A device with nothing pending; `interrupt` raises its line (edge).
    pub fn new(interrupt: EventFd) -> Self {
        Self {
            pending: AtomicU8::new(0),
            interrupt,
        }
    }

    /// Presses the power button. Called on the VMM thread.
    pub fn press_power_button(&self) {
        self.raise(event::POWER_BUTTON);
    }

    /// Has the guest look at the PCI hotplug registers. Called on the VMM thread, after they have
    /// changed.
    pub fn pci_changed(&self) {
        self.raise(event::PCI);
    }

    fn raise(&self, event: u8) {
        self.pending.fetch_or(event, Ordering::SeqCst);
        // An eventfd write fails only when the counter is full: the interrupt is raised already.
        let _ = self.interrupt.write(1);
    }
}

impl BusDevice for Ged {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0
            && let Some(register) = data.first_mut()
        {
            *register = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn events_are_pending_until_they_are_read_and_each_raises_the_interrupt() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let ged = Ged::new(interrupt.try_clone().unwrap());
        let read = || {
            let mut byte = [0xff];
            ged.read(0, &mut byte);
            byte[0]
        };
        assert_eq!(read(), 0);
        ged.press_power_button();
        ged.pci_changed();
        assert_eq!(interrupt.read().unwrap(), 2);
        assert_eq!(read(), event::POWER_BUTTON | event::PCI);
        assert_eq!(read(), 0);
    }

    proptest! {
        #[test]
        fn accesses_of_every_width_and_offset_do_no_harm(
            offset in prop_oneof![0..8u64, any::<u64>()],
            mut data in prop::collection::vec(any::<u8>(), 0..17),
        ) {
            let ged = Ged::new(EventFd::new(EFD_NONBLOCK).unwrap());
            ged.write(offset, &data);
            ged.read(offset, &mut data);
        }
    }
}
