//! How long is waited for what, so that a host that stands still does not take the VMM with it.

use std::time::Duration;

use crate::block::frozen::FREEZE_TIMEOUT;

/// See the module; the same for every disk but in tests.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// A job that is to end waits so long for a step that is being done.
    pub last_step: Duration,
    /// The VMM thread does until the disk has written out what it has, and stands still …
    pub write_out: Duration,
    /// … then, with the guest, until a commit has copied the rest …
    pub last_copy: Duration,
    /// … and until the image is emptied.
    pub emptying: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            last_step: Duration::from_secs(10),
            write_out: FREEZE_TIMEOUT,
            last_copy: Duration::from_secs(30),
            emptying: Duration::from_secs(10),
        }
    }
}
