//! Sleep control, sleep status and reset registers of a hardware-reduced machine (ACPI 6.5
//! §4.8.3.6, §4.8.3.7).
//!
//! | offset | register |
//! |---|---|
//! | 0 | sleep control: SLP_TYP in bits 2–4, SLP_EN in bit 5 |
//! | 1 | sleep status: always 0, as nothing but S5 is offered, from which nobody wakes |
//! | 2 | reset: [`RESET_VALUE`] resets |

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::signals::GuestSignals;

/// I/O ports of the three registers.
pub const SLEEP_PORTS: u64 = 3;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL_OFFSET: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS_OFFSET: u64 = 1;
/// Offset of the reset register.
pub const RESET_OFFSET: u64 = 2;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means "off", as the `_S5` object says.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The three registers.
pub struct SleepAndReset {
    signals: Arc<GuestSignals>,
}

impl SleepAndReset {
    /// Registers that report through `signals`.
    pub fn new(signals: Arc<GuestSignals>) -> Self {
        Self { signals }
    }
}

impl BusDevice for SleepAndReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, &value) in (offset..SLEEP_PORTS).zip(data) {
            match register {
                SLEEP_CONTROL_OFFSET => {
                    let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                    if value & SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE {
                        self.signals.power_off();
                    }
                }
                RESET_OFFSET if value == RESET_VALUE => self.signals.reset(),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let signals = Arc::new(GuestSignals::new(|| {}));
        let device = SleepAndReset::new(signals.clone());
        for value in 0..=255u8 {
            device.write(SLEEP_CONTROL_OFFSET, &[value]);
            let wanted = value & 0b11_1100 == 0b11_0100;
            assert_eq!(signals.take().power_off, wanted, "{value:#x}");
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        let signals = Arc::new(GuestSignals::new(|| {}));
        let device = SleepAndReset::new(signals.clone());
        for value in 0..=255u8 {
            device.write(RESET_OFFSET, &[value]);
            assert_eq!(signals.take().reset, value == RESET_VALUE);
        }
    }

    proptest! {
        #[test]
        fn accesses_of_every_width_and_offset_do_no_harm(
            offset in prop_oneof![0..8u64, any::<u64>()],
            mut data in prop::collection::vec(any::<u8>(), 0..17),
        ) {
            let device = SleepAndReset::new(Arc::new(GuestSignals::new(|| {})));
            device.write(offset, &data);
            device.read(offset, &mut data);
        }
    }
}
