//! Devices of the PC that PCI did not replace.

mod cmos;
mod config;
pub mod console;
mod debug;
mod i8042;
mod pm_timer;
mod serial;

pub use cmos::{CMOS_PORTS, Cmos};
pub use config::{ConsoleConfig, ConsoleMode, DebugConsoleConfig};
pub use console::ConsoleBackend;
pub use debug::{BootMarker, DebugConsole, DebugPort};
pub use i8042::{I8042, I8042_PORTS};
pub use pm_timer::{PM_TIMER_PORTS, PmTimer};
pub use serial::{SERIAL_PORTS, SerialDevice};

#[cfg(test)]
mod tests;
