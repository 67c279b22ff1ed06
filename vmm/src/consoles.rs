//! The host's ends of the serial port and the debug port. They are opened by `vm.create` (so that
//! the path of a pseudo-terminal is known before the boot) and outlive reboots.

use std::sync::Arc;

use devices::config::{BuildContext, BuildError};
use devices::event::Reporter;
use devices::guest_memory::discard::inhibit::Inhibitor;
use devices::legacy::{ConsoleBackend, ConsoleMode};
use devices::sandbox::SeccompMode;

use crate::config::VmConfig;
use crate::error::Error;

/// The consoles of a VM.
pub struct Consoles {
    serial: ConsoleBackend,
    debug: ConsoleBackend,
}

impl Consoles {
    /// Opens what the configuration says, and fills in the paths of pseudo-terminals.
    pub fn open(config: &mut VmConfig, seccomp: SeccompMode) -> Result<Self, Error> {
        let context = |id| BuildContext {
            reporter: Reporter::new(
                id,
                Arc::new(|id, event| {
                    tracing::warn!(console = id, ?event, "console");
                }),
            ),
            seccomp,
            discards: Inhibitor::default(),
        };
        let at = |field: &'static str| move |e: BuildError| Error::from(e).within(field);
        let serial =
            ConsoleBackend::open(&config.serial, context("__serial")).map_err(at("serial"))?;
        let debug = ConsoleBackend::open_debug(&config.debug_console, context("__debug"))
            .map_err(at("debug_console"))?;
        if let Some(path) = serial.pty_path() {
            config.serial.file = Some(path.to_owned());
        }
        if let Some(path) = debug.pty_path() {
            config.debug_console.file = Some(path.to_owned());
        }
        Ok(Self { serial, debug })
    }

    /// The serial port's end, if there is to be a serial port.
    pub fn serial(&self) -> Option<&ConsoleBackend> {
        present(&self.serial)
    }

    /// The debug port's end, if there is to be a debug port.
    pub fn debug(&self) -> Option<&ConsoleBackend> {
        present(&self.debug)
    }
}

fn present(backend: &ConsoleBackend) -> Option<&ConsoleBackend> {
    (backend.mode() != ConsoleMode::Off).then_some(backend)
}
