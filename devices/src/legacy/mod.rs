//! Devices of the PC that PCI did not replace.

mod config;

pub use config::{ConsoleConfig, ConsoleMode, DebugConsoleConfig};
