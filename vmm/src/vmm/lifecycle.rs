//! From `vm.create` to `vm.delete`: the VM's changes of state, each with its events.

use super::Vmm;
use crate::config::VmConfig;
use crate::created::Created;
use crate::error::Error;
use crate::overcommit::ledger::Reservation;
use crate::state::{State, Verb};
use crate::vm::Environment;

impl Vmm {
    pub(super) fn create(&mut self, config: VmConfig) -> Result<(), Error> {
        self.legal(Verb::Create)?;
        if let Some(ledger) = &self.ledger {
            config.validate()?;
            ledger.lock().check(Reservation::of(&config))?;
        }
        self.created = Some(Created::new(config, self.options.seccomp)?);
        Ok(())
    }

    pub(super) fn boot(&mut self, paused: bool) -> Result<(), Error> {
        let environment = self.environment();
        let events = self.endpoint.events.clone();
        self.observer.forget();
        let config = self.created(Verb::Boot)?.config();
        let asked = Reservation::of(config);
        let weight = config.weight();
        events.emit("vm", "booting", &[]);
        // Before the machine is built, so that two VMs that boot at the same moment do not get
        // the same memory.
        let admitted = match &self.ledger {
            Some(ledger) => ledger.lock().reserve(asked, weight),
            None => Ok(()),
        };
        let created = self.created(Verb::Boot)?;
        let result = admitted.and_then(|()| created.boot(environment, paused));
        self.control.restart();
        if result.is_err() {
            self.release();
        }
        match &result {
            Ok(()) => self.tell("booted"),
            Err(error) => {
                self.publish();
                self.emit("vm", "boot-failed", &[("reason", &error.to_string())]);
            }
        }
        result
    }

    /// What machines are built in, and jobs begun.
    pub(super) fn environment(&self) -> Environment {
        Environment {
            seccomp: self.options.seccomp,
            events: self.endpoint.events.clone(),
            inbox: self.endpoint.sender.clone(),
        }
    }

    pub(super) fn shutdown(&mut self) -> Result<(), Error> {
        self.observer.forget();
        let removed = self.created(Verb::Shutdown)?.power_off();
        self.release();
        self.tell_removed(removed);
        self.tell("shutdown");
        Ok(())
    }

    /// Also what a reset by the guest comes to. A pending removal completes; jobs go on, if the
    /// machine does.
    pub(super) fn reboot(&mut self, paused: bool) -> Result<(), Error> {
        self.emit("vm", "rebooting", &[]);
        let power_off = |created: &mut Created| {
            created.suspend_jobs();
            created.power_off()
        };
        let removed = self.created.as_mut().map(power_off).unwrap_or_default();
        let result = self.boot(paused);
        let environment = self.environment();
        if let Some(created) = &mut self.created {
            created.begin_jobs_again(&environment);
        }
        self.tell_removed(removed);
        // After a failure the VM is off, which clients of Cloud Hypervisor know by this name.
        let outcome = if result.is_ok() {
            "rebooted"
        } else {
            "shutdown"
        };
        self.tell(outcome);
        result
    }

    pub(super) fn pause(&mut self) -> Result<(), Error> {
        self.legal(Verb::Pause)?;
        self.emit("vm", "pausing", &[]);
        self.created(Verb::Pause)?.pause()?;
        self.tell("paused");
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), Error> {
        self.legal(Verb::Resume)?;
        self.emit("vm", "resuming", &[]);
        self.created(Verb::Resume)?.resume()?;
        self.tell("resumed");
        Ok(())
    }

    pub(super) fn delete(&mut self) {
        let Some(created) = &mut self.created else {
            return;
        };
        if created.state() != State::Created {
            created.power_off();
            self.release();
            self.tell("shutdown");
        }
        self.created = None;
        self.tell("deleted");
    }
}
