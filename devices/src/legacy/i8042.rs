//! The keyboard controller's one surviving duty: pulling the CPU's reset line (command 0xfe).
//!
//! There is no keyboard, and the FADT says that there is no 8042, so that guests do not spend
//! their time probing for one; `reboot=k` and firmware still find the reset line.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::signals::GuestSignals;

/// I/O ports from the data port 0x60 to the command port 0x64.
pub const I8042_PORTS: u64 = 5;

struct ResetLine(Arc<GuestSignals>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.reset();
        Ok(())
    }
}

/// A keyboard controller without a keyboard.
pub struct I8042(Mutex<I8042Device<ResetLine>>);

impl I8042 {
    /// A controller that resets the machine through `signals`.
    pub fn new(signals: Arc<GuestSignals>) -> Self {
        Self(Mutex::new(I8042Device::new(ResetLine(signals))))
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (offset..I8042_PORTS).zip(data) {
            *byte = device.read(register as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (offset..I8042_PORTS).zip(data) {
            let Ok(()) = device.write(register as u8, *byte);
        }
    }
}
