//! What is set aside for this VM among those of the host, and what they are told of it: the VMM
//! thread's side of the [ledger](crate::overcommit::ledger).

use std::time::Instant;

use super::Vmm;
use crate::config::OvercommitConfig;
use crate::error::Error;
use crate::overcommit::ledger::{
    LedgerStatus, Measures, Reservation, SharedLedger, UPDATE_INTERVAL,
};
use crate::state::{State, Verb};

impl Vmm {
    /// The machine is gone; what was set aside for it is there for others.
    pub(super) fn release(&mut self) {
        self.control.gone();
        if let Some(ledger) = &self.ledger {
            ledger.lock().release();
        }
    }

    pub(super) fn ledger_status(&self) -> Option<LedgerStatus> {
        self.ledger.as_ref().map(|ledger| ledger.lock().status())
    }

    /// When the other VMs on the host are to be told how this one is.
    pub(super) fn ledger_due(&self) -> Option<Instant> {
        self.ledger.as_ref()?;
        let (state, at) = self.told?;
        (state != State::Created).then(|| at + UPDATE_INTERVAL)
    }

    /// Tells them, where the state is another or some time has passed; and our clients, how that
    /// went, where it went otherwise than before.
    pub(super) fn tell_ledger(&mut self) {
        let Some(ledger) = self.ledger.clone() else {
            return;
        };
        let state = self.state();
        let now = Instant::now();
        let same = state == self.told.map(|(told, _)| told);
        if !same || self.ledger_due().is_some_and(|due| due <= now) {
            self.told = state.map(|state| (state, now));
            self.update_ledger(&ledger);
        }
        let changed = ledger.lock().has_news();
        if changed {
            self.publish();
            ledger.lock().tell_news();
        }
    }

    fn update_ledger(&mut self, ledger: &SharedLedger) {
        let Some(created) = &self.created else {
            ledger.lock().update("", "", Measures::default());
            return;
        };
        let platform = created.config().platform.as_ref();
        let id = platform.and_then(|platform| platform.system_uuid.as_deref());
        let state = created.state().to_string();
        let measures = created.measures(&mut self.observer);
        ledger
            .lock()
            .update(id.unwrap_or_default(), &state, measures);
    }

    /// Changes the policy, and what is set aside for the VM with it.
    pub(super) fn set_overcommit(&mut self, config: OvercommitConfig) -> Result<(), Error> {
        let ledger = self.ledger.clone();
        let created = self.created(Verb::SetOvercommit)?;
        let old = Reservation::of(created.config());
        let old_weight = created.config().weight();
        let mut desired = created.config().clone();
        desired.overcommit = Some(config.clone());
        desired
            .validate()
            .map_err(|e| e.relative_to("overcommit"))?;
        let new = Reservation::of(&desired);
        let booted = created.state() != State::Created;
        let Some(ledger) = ledger.filter(|_| booted) else {
            return created.set_overcommit(config);
        };
        // What is given back is never refused, whichever way it turns out.
        if !old.covers(&new) {
            ledger.lock().reserve(new, desired.weight())?;
        }
        match created.set_overcommit(config) {
            Ok(()) => ledger.lock().reserve(new, desired.weight()),
            Err(error) => {
                ledger.lock().reserve(old, old_weight)?;
                Err(error)
            }
        }
    }
}
