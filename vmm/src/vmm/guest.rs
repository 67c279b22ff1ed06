//! What the guest does to the machine: it ejects, resets, powers off; a vCPU of it fails, a disk of
//! it finds the host full.

use std::time::Duration;

use super::{Flow, Vmm};
use crate::created::Created;
use crate::state::State;

/// The least time between two boots when it is the guest that resets itself. It may do so in an
/// endless loop; each round costs the host the making of a machine, and five events.
const RESET_INTERVAL: Duration = Duration::from_millis(100);

impl Vmm {
    /// The guest has signalled something; several things may have come together.
    pub(super) fn guest(&mut self) -> Flow {
        let Some(signalled) = self.created.as_ref().map(Created::take_signals) else {
            return Flow::Go;
        };
        if signalled.ejected != 0
            && let Some(created) = &mut self.created
        {
            let removed = created.ejected(signalled.ejected);
            self.tell_removed(removed);
        }
        if signalled.power_off {
            return self.guest_power_off();
        }
        if signalled.reset {
            self.emit("vm", "guest-reset", &[]);
            // The guest may have done it just before it was paused. By a disk for lack of space
            // is no reason any more: that disk has let go of what it held.
            let for_space = |c: &Created| c.is_paused_for_space();
            let paused = self.state() == Some(State::Paused)
                && !self.created.as_ref().is_some_and(for_space);
            let since = self.created.as_ref().and_then(Created::booted_at);
            if let Some(wait) = since.and_then(|at| RESET_INTERVAL.checked_sub(at.elapsed())) {
                std::thread::sleep(wait);
            }
            if let Err(error) = self.reboot(paused) {
                tracing::error!(%error, "the VM could not boot again after a reset by the guest");
            }
        } else if signalled.vcpu_failed
            && self.state() == Some(State::Running)
            && let Err(error) = self.pause()
        {
            tracing::error!(%error, "the VM could not be paused after a vCPU failed");
        } else if signalled.disk_full && self.state() == Some(State::Running) {
            self.pause_for_space();
        }
        self.publish();
        Flow::Go
    }

    /// Pauses the VM for a disk that wants it, if that has not found space meanwhile.
    fn pause_for_space(&mut self) {
        if !self.created.as_ref().is_some_and(Created::wants_pause) {
            return;
        }
        match self.pause() {
            Ok(()) => {
                if let Some(created) = &mut self.created {
                    created.set_paused_for_space();
                }
            }
            Err(error) => {
                tracing::error!(%error, "the VM could not be paused for lack of space");
            }
        }
    }

    fn guest_power_off(&mut self) -> Flow {
        if let Some(created) = &mut self.created {
            let removed = created.power_off();
            self.release();
            self.tell_removed(removed);
            self.tell("shutdown");
        }
        self.publish();
        if self.options.exit_on_power_off {
            Flow::End
        } else {
            Flow::Go
        }
    }
}
