//! When the [governor](crate::overcommit::governor) looks, and how what it says is carried out.

use std::time::Instant;

use super::Vmm;
use crate::command::Message;
use crate::created::Created;
use crate::overcommit::triggers::Refused;
use crate::overcommit::view::Governor;

impl Vmm {
    /// What the governor last found, where it drives a balloon.
    pub(super) fn governor(&self) -> Option<Governor> {
        self.created.as_ref()?.governed()?;
        self.control.shown()
    }

    /// When the governor is to look; `None` while there is nothing to.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let (_, interval_ms) = self.created.as_ref()?.governed()?;
        Some(self.control.due(interval_ms))
    }

    /// Has the kernel tell of pressure, from the first look on.
    fn arm_triggers(&mut self) {
        let sender = self.endpoint.sender.clone();
        let refused = self.control.arm(move || {
            // Nobody hears it when the VMM is at its end.
            let _ = sender.send(Message::Pressure);
        });
        for Refused { scope, reason } in refused {
            let properties = [("scope", scope.name()), ("reason", reason.as_str())];
            self.emit("vm", "overcommit-trigger-refused", &properties);
        }
    }

    /// Tells the other VMs, once, that the governor drives nothing: the VM is paused, the mode is
    /// off, or the balloon is gone.
    pub(super) fn rest_unless_governed(&mut self) {
        let governed = self.created.as_ref().and_then(Created::governed);
        if governed.is_none() {
            self.control.rest();
        }
    }

    /// Has the governor look, if it is time, and does what it says.
    pub(super) fn govern(&mut self) {
        if self.next_look().is_none_or(|due| due > Instant::now()) {
            return;
        }
        self.arm_triggers();
        let Some(created) = &self.created else {
            return;
        };
        let Some((driven, _)) = created.governed() else {
            return;
        };
        let Some(step) = self.control.look(driven) else {
            return;
        };
        if let Err(error) = created.carry_out(&step) {
            tracing::error!(%error, ?step, "a step of the overcommit policy could not be taken");
            return;
        }
        let (from, to) = (step.from.to_string(), step.to.to_string());
        let mut properties = vec![
            ("id", step.id.as_str()),
            ("action", step.action()),
            ("reason", step.reason.name()),
            ("from", &from),
            ("to", &to),
        ];
        let rest = step.rest_ms.map(|ms| (ms / 1000).to_string());
        properties.extend(
            rest.iter()
                .map(|seconds| ("rest_seconds", seconds.as_str())),
        );
        self.emit("vm", "overcommit-action", &properties);
    }
}
