//! The VMM thread: one loop over one inbox.
//!
//! Each command is one arm of [`Vmm::command`]; each thing the guest can do to the machine is one
//! line of [`Vmm::guest`]. Whatever happens, the new status is published before the answer is
//! given and before the event tells of it, so that a client that has either reads a `vm.info` that
//! agrees with it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use devices::balloon::BalloonInfo;
use devices::config::DeviceConfig;
use devices::sandbox::{self, Filter, SeccompMode};
use devices::worker::STACK_BYTES;
use vmm_sys_util::signal::block_signal;

use crate::balloons;
use crate::command::{Command, Endpoint, Handle, Message, Reply, channel};
use crate::config::{OvercommitConfig, VmConfig, VmResize};
use crate::created::Created;
use crate::device_manager::Removed;
use crate::disks;
use crate::error::Error;
use crate::event::Events;
use crate::overcommit::Alone;
use crate::overcommit::Coordinator;
use crate::overcommit::control::{COUNTERS_ID, Control};
use crate::overcommit::ledger::{
    Ledger, LedgerStatus, Measures, Reservation, SharedLedger, UPDATE_INTERVAL,
};
use crate::overcommit::psi::{self, Sources};
use crate::overcommit::view::{Governor, Observer};
use crate::state::{State, Verb, check};
use crate::status::{BalloonStats, PciDeviceInfo, VmCounters, VmInfo};
use crate::syscalls;
use crate::vm::Environment;

/// The least time between two boots when it is the guest that resets itself. It may do so in an
/// endless loop; each round costs the host the making of a machine, and five events.
const RESET_INTERVAL: Duration = Duration::from_millis(100);

/// How the process was told to behave.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Mode of all seccomp filters.
    pub seccomp: SeccompMode,
    /// End the process when the guest powers itself off (Cloud Hypervisor's behaviour without
    /// `--no-shutdown`).
    pub exit_on_power_off: bool,
    /// Where the host tells how it is; tests tell it otherwise.
    pub host: psi::Paths,
}

/// Starts the VMM thread. Called once, by the main thread, before it installs its own filter.
pub fn start(options: Options, ledger: Option<Ledger>, events: Events) -> Result<Handle, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::host("starting the VMM thread", e);
    let (handle, endpoint) = channel(events);
    let filter =
        Filter::compile("vmm", options.seccomp, &syscalls::vmm_thread()).map_err(|e| failed(&e))?;
    // Opened before the filter is installed.
    let ledger = ledger.map(SharedLedger::new);
    let coordinator: Box<dyn Coordinator> = match &ledger {
        Some(ledger) => Box::new(ledger.clone()),
        None => Box::new(Alone),
    };
    let control = Control::new(Sources::open(&options.host), coordinator);
    let (installed, outcome) = std::sync::mpsc::channel::<Result<(), sandbox::SandboxError>>();
    std::thread::Builder::new()
        .name("vmm".to_owned())
        .stack_size(2 * STACK_BYTES)
        .spawn(move || {
            // An image that is grown beyond a limit (RLIMIT_FSIZE) is an error and not the end.
            let _ = block_signal(libc::SIGXFSZ);
            let result = filter.install();
            let go = result.is_ok();
            // The spawner waits for this, so it is there to hear it.
            let _ = installed.send(result);
            if go {
                Vmm::new(options, ledger, endpoint, control).run();
            }
        })
        .map_err(|e| failed(&e))?;
    match outcome.recv() {
        Ok(Ok(())) => Ok(handle),
        Ok(Err(error)) => Err(failed(&error)),
        Err(error) => Err(failed(&error)),
    }
}

struct Vmm {
    options: Options,
    /// What the VMs of the host share.
    ledger: Option<SharedLedger>,
    /// What was told there last, and when.
    told: Option<(State, Instant)>,
    endpoint: Endpoint,
    created: Option<Created>,
    observer: Observer,
    control: Control,
    /// A deadline was the last to have its turn.
    expired: bool,
}

enum Flow {
    Go,
    End,
}

impl Vmm {
    fn new(
        options: Options,
        ledger: Option<SharedLedger>,
        endpoint: Endpoint,
        control: Control,
    ) -> Self {
        Self {
            options,
            ledger,
            told: None,
            endpoint,
            created: None,
            observer: Observer::default(),
            control,
            expired: false,
        }
    }

    fn run(mut self) {
        loop {
            let flow = match self.next_message() {
                Some(Message::Command(command)) => self.command(command),
                Some(Message::Guest) => self.guest(),
                Some(Message::Terminate) => {
                    self.delete();
                    Flow::End
                }
                None => {
                    self.expire();
                    Flow::Go
                }
            };
            if let Flow::End = flow {
                break;
            }
            self.tell_ledger();
        }
        // Before the end is told and the process may exit: consoles write out what they hold, give
        // the terminal its mode back and remove their sockets.
        self.created = None;
        if let Some(ledger) = self.ledger.take() {
            ledger.lock().leave();
        }
        self.publish();
        self.emit("vmm", "shutdown", &[]);
        self.endpoint.ended.send_replace(true);
    }

    /// The next message, or `None` when a deadline has passed.
    fn next_message(&mut self) -> Option<Message> {
        let removal = self.created.as_ref().and_then(Created::next_deadline);
        let deadlines = removal.into_iter().chain(self.next_look());
        let deadline = deadlines.chain(self.ledger_due()).min();
        receive(&self.endpoint.inbox, deadline, &mut self.expired)
    }

    fn command(&mut self, command: Command) -> Flow {
        match command {
            Command::Create { config, reply } => {
                let result = self.create(*config);
                self.answer(reply, result);
            }
            Command::Boot { reply } => {
                let result = self.boot(false);
                self.answer(reply, result);
            }
            Command::Shutdown { reply } => {
                let result = self.shutdown();
                self.answer(reply, result);
            }
            Command::Reboot { reply } => {
                let result = self
                    .created(Verb::Reboot)
                    .and_then(|c| c.check_payload())
                    .and_then(|()| self.reboot(false));
                self.answer(reply, result);
            }
            Command::Pause { reply } => {
                let result = self.pause();
                self.answer(reply, result);
            }
            Command::Resume { reply } => {
                let result = self.resume();
                self.answer(reply, result);
            }
            Command::PowerButton { reply } => {
                let result = self.created(Verb::PowerButton).and_then(|c| {
                    c.running()?.power_button();
                    Ok(())
                });
                self.answer(reply, result);
            }
            Command::Nmi { reply } => {
                let result = self
                    .created(Verb::Nmi)
                    .and_then(|c| c.running()?.vcpus.nmi());
                self.answer(reply, result);
            }
            Command::Delete { reply } => {
                self.delete();
                self.answer(reply, Ok(()));
            }
            Command::Counters { reply } => {
                let result = self.counters();
                self.answer(reply, result);
            }
            Command::AddDevice { device, reply } => {
                let result = self.add_device(*device);
                self.answer(reply, result);
            }
            Command::CreateDisk { disk, reply } => {
                let result = disk.create().map_err(Error::from);
                self.answer(reply, result);
            }
            Command::RemoveDevice { id, reply } => {
                let result = self.remove_device(&id);
                self.answer(reply, result);
            }
            Command::Resize { desired, reply } => {
                let result = self.resize(desired);
                self.answer(reply, result);
            }
            Command::ResizeBalloon {
                id,
                desired_size,
                floor_override,
                reply,
            } => {
                let result = self.created(Verb::ResizeBalloon).and_then(|c| {
                    c.resize_balloon(&id, desired_size, "desired_size", floor_override)
                });
                self.answer(reply, result);
            }
            Command::SetOvercommit { config, reply } => {
                let result = self.set_overcommit(*config);
                self.answer(reply, result);
            }
            Command::ResizeDisk {
                id,
                desired_size,
                reply,
            } => {
                let result = self
                    .created(Verb::ResizeDisk)
                    .and_then(|c| c.running()?.devices.resize_disk(&id, desired_size));
                self.answer(reply, result);
            }
            Command::ResumeDisk { id, give_up, reply } => {
                let result = self.resume_disk(&id, give_up);
                self.answer(reply, result);
            }
            Command::DiskInfo { id, reply } => {
                let result = self
                    .created(Verb::DiskInfo)
                    .and_then(|c| Ok(c.running()?.devices.disk(&id)?.info(&id)?));
                self.answer(reply, result);
            }
            Command::Balloons { reply } => self.balloons(reply),
            Command::BalloonStats { reply } => self.balloon_stats(reply),
            Command::Overcommit { reply } => {
                let created = self.created.as_ref().ok_or(Error::NotCreated);
                let mut view = created.map(|c| Box::new(c.overcommit(&mut self.observer)));
                if let Ok(view) = &mut view {
                    view.governor = self.governor();
                }
                self.answer(reply, view);
            }
            Command::Observe { reply } => {
                let created = self.created.as_ref();
                let mut seen = created.map(|c| Box::new(c.observe(&mut self.observer)));
                if let Some(seen) = &mut seen {
                    seen.view.governor = self.governor();
                    seen.counters = self.counters().unwrap_or_default();
                }
                self.answer(reply, Ok(seen));
            }
            Command::VmmShutdown { reply } => {
                self.delete();
                self.answer(reply, Ok(()));
                return Flow::End;
            }
        }
        Flow::Go
    }

    /// Publishes what has become of the VM, then answers. A client that has gone away is not
    /// missed.
    fn answer<T>(&self, reply: Reply<T>, result: Result<T, Error>) {
        self.publish();
        let _ = reply.send(result);
    }

    fn publish(&self) {
        let status = self.created.as_ref().map(|created| {
            let overcommit_ledger = self.ledger_status();
            Arc::new(VmInfo {
                overcommit_ledger,
                ..created.info()
            })
        });
        self.endpoint.status.send_replace(status);
    }

    /// Publishes what has become of the VM, then tells the event.
    fn tell(&self, event: &'static str) {
        self.publish();
        self.emit("vm", event, &[]);
    }

    fn emit(&self, source: &'static str, event: &'static str, properties: &[(&str, &str)]) {
        self.endpoint.events.emit(source, event, properties);
    }

    fn state(&self) -> Option<State> {
        self.created.as_ref().map(Created::state)
    }

    fn legal(&self, verb: Verb) -> Result<(), Error> {
        check(verb, self.state())
    }

    /// The VM, if there is one and it is in a state for `verb`.
    fn created(&mut self, verb: Verb) -> Result<&mut Created, Error> {
        check(verb, self.state())?;
        self.created.as_mut().ok_or(Error::NotCreated)
    }

    fn create(&mut self, config: VmConfig) -> Result<(), Error> {
        self.legal(Verb::Create)?;
        if let Some(ledger) = &self.ledger {
            config.validate()?;
            ledger.lock().check(Reservation::of(&config))?;
        }
        self.created = Some(Created::new(config, self.options.seccomp)?);
        Ok(())
    }

    fn boot(&mut self, paused: bool) -> Result<(), Error> {
        let environment = Environment {
            seccomp: self.options.seccomp,
            events: self.endpoint.events.clone(),
            inbox: self.endpoint.sender.clone(),
        };
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

    fn shutdown(&mut self) -> Result<(), Error> {
        self.observer.forget();
        let removed = self.created(Verb::Shutdown)?.power_off();
        self.release();
        self.tell_removed(removed);
        self.tell("shutdown");
        Ok(())
    }

    /// Also what a reset by the guest comes to. A pending removal completes.
    fn reboot(&mut self, paused: bool) -> Result<(), Error> {
        self.emit("vm", "rebooting", &[]);
        let removed = self
            .created
            .as_mut()
            .map(Created::power_off)
            .unwrap_or_default();
        let result = self.boot(paused);
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

    /// The machine is gone; what was set aside for it is there for others.
    fn release(&mut self) {
        if let Some(ledger) = &self.ledger {
            ledger.lock().release();
        }
    }

    fn ledger_status(&self) -> Option<LedgerStatus> {
        self.ledger.as_ref().map(|ledger| ledger.lock().status())
    }

    /// When the other VMs on the host are to be told how this one is.
    fn ledger_due(&self) -> Option<Instant> {
        self.ledger.as_ref()?;
        let (state, at) = self.told?;
        (state != State::Created).then(|| at + UPDATE_INTERVAL)
    }

    /// Tells them, where the state is another or some time has passed; and our clients, how that
    /// went, where it went otherwise than before.
    fn tell_ledger(&mut self) {
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
    fn set_overcommit(&mut self, config: OvercommitConfig) -> Result<(), Error> {
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

    fn pause(&mut self) -> Result<(), Error> {
        self.legal(Verb::Pause)?;
        self.emit("vm", "pausing", &[]);
        self.created(Verb::Pause)?.pause()?;
        self.tell("paused");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.legal(Verb::Resume)?;
        self.emit("vm", "resuming", &[]);
        self.created(Verb::Resume)?.resume()?;
        self.tell("resumed");
        Ok(())
    }

    /// Has a disk try again what it holds for lack of space; a VM that was paused for that goes on.
    fn resume_disk(&mut self, id: &str, give_up: bool) -> Result<(), Error> {
        let created = self.created(Verb::ResumeDisk)?;
        let disk = created.running()?.devices.disk(id)?;
        if give_up {
            disk.give_up_held();
        }
        disk.retry_held();
        if created.is_paused_for_space() {
            self.resume()?;
        }
        Ok(())
    }

    fn delete(&mut self) {
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

    fn add_device(&mut self, device: DeviceConfig) -> Result<PciDeviceInfo, Error> {
        self.created(Verb::AddDevice)?.add_device(device)
    }

    fn remove_device(&mut self, id: &str) -> Result<(), Error> {
        let removed = self.created(Verb::RemoveDevice)?.remove_device(id)?;
        self.tell_removed(removed);
        Ok(())
    }

    fn resize(&mut self, desired: VmResize) -> Result<(), Error> {
        self.legal(Verb::Resize)?;
        self.emit("vm", "resizing", &[]);
        self.created(Verb::Resize)?.resize(desired)?;
        self.emit("vm", "resized", &[]);
        Ok(())
    }

    /// Has the balloons' threads answer, as the guest is asked for statistics first; one that
    /// stands still is not asked.
    fn balloons(&mut self, reply: Reply<Vec<BalloonInfo>>) {
        let fresh = self.state() == Some(State::Running);
        match self.created(Verb::Balloons).and_then(|c| c.running()) {
            Ok(vm) => balloons::answer_all(vm.devices.balloons(), fresh, reply),
            Err(error) => self.answer(reply, Err(error)),
        }
    }

    fn balloon_stats(&mut self, reply: Reply<BalloonStats>) {
        let balloon = self.created(Verb::BalloonStats).and_then(|created| {
            let id = created.first_balloon()?;
            created.running()?.devices.balloon(&id)
        });
        match balloon {
            Ok(balloon) => balloons::answer_statistics(balloon, reply),
            Err(error) => self.answer(reply, Err(error)),
        }
    }

    fn counters(&mut self) -> Result<VmCounters, Error> {
        let created = self.created(Verb::Counters)?;
        let mut counters = created.running()?.devices.counters();
        if created.info().config.overcommit.is_some() {
            counters.insert(COUNTERS_ID.to_owned(), self.control.counters());
        }
        Ok(counters)
    }

    /// What the governor last found, where it drives a balloon.
    fn governor(&self) -> Option<Governor> {
        self.created.as_ref()?.governed()?;
        self.control.shown()
    }

    /// When the governor is to look; `None` while there is nothing to.
    fn next_look(&self) -> Option<Instant> {
        let (_, interval_ms) = self.created.as_ref()?.governed()?;
        Some(self.control.due(interval_ms))
    }

    /// Has the governor look, if it is time, and does what it says.
    fn govern(&mut self) {
        if self.next_look().is_none_or(|due| due > Instant::now()) {
            return;
        }
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

    fn tell_removed(&self, removed: Vec<Removed>) {
        self.publish();
        for device in removed {
            self.emit(
                "vm",
                "device-removed",
                &[("id", &device.id), ("bdf", &device.bdf)],
            );
        }
    }

    /// The guest has signalled something; several things may have come together.
    fn guest(&mut self) -> Flow {
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

    fn expire(&mut self) {
        self.govern();
        let Some(created) = &mut self.created else {
            return;
        };
        let now = Instant::now();
        let space = created.look_at_disks(now);
        let expired = created.expired(now);
        if !expired.is_empty() {
            self.publish();
        }
        for id in expired {
            self.emit("vm", "device-removal-timed-out", &[("id", &id)]);
        }
        for (id, passed) in space {
            disks::emit(&self.endpoint.events, &id, &passed);
        }
    }
}

/// The next message, or `None` when the deadline has passed, however many messages wait: a guest
/// can see to it that one always does. After a `None` (which `expired` remembers) messages come
/// first, however long the next deadline has passed: what is done then may take longer than it is
/// to the next one.
fn receive(
    inbox: &Receiver<Message>,
    deadline: Option<Instant>,
    expired: &mut bool,
) -> Option<Message> {
    let before = std::mem::take(expired);
    let Some(deadline) = deadline else {
        return Some(inbox.recv().unwrap_or(Message::Terminate));
    };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() && !before {
        *expired = true;
        return None;
    }
    match inbox.recv_timeout(left) {
        Ok(message) => Some(message),
        Err(RecvTimeoutError::Timeout) => {
            *expired = true;
            None
        }
        Err(RecvTimeoutError::Disconnected) => Some(Message::Terminate),
    }
}

#[cfg(test)]
mod tests;
