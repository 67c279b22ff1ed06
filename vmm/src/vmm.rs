//! The VMM thread: one loop over one inbox.

use devices::sandbox::SeccompMode;

use crate::command::Handle;
use crate::error::Error;
use crate::event::Events;

/// How the process was told to behave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Mode of all seccomp filters.
    pub seccomp: SeccompMode,
    /// End the process when the guest powers itself off (Cloud Hypervisor's behaviour without
    /// `--no-shutdown`).
    pub exit_on_power_off: bool,
}

/// Starts the VMM thread. Called once, by the main thread, before it installs its own filter.
pub fn start(_options: Options, _events: Events) -> Result<Handle, Error> {
    todo!()
}
