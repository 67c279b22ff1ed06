//! The event devices that the ACPI tables point at: Generic Event Device, sleep and reset.

mod ged;
mod sleep;

pub use ged::{GED_PORTS, Ged, event};
pub use sleep::{
    RESET_OFFSET, RESET_VALUE, S5_SLEEP_TYPE, SLEEP_CONTROL_OFFSET, SLEEP_PORTS,
    SLEEP_STATUS_OFFSET, SleepAndReset,
};
