//! The VMM thread: one loop over one inbox.
//!
//! Each command is one arm of [`Vmm::command`]; each thing the guest can do to the machine is one
//! line of [`Vmm::guest`]. What is then done stands in the files beside this one. Whatever happens,
//! the new status is published before the answer is given and before the event tells of it, so
//! that a client that has either reads a `vm.info` that agrees with it.

mod admission;
mod deadlines;
mod device_commands;
mod governing;
mod guest;
mod lifecycle;
mod telling;

use std::time::Instant;

use devices::sandbox::{self, Filter, SeccompMode};
use devices::worker::STACK_BYTES;
use vmm_sys_util::signal::block_signal;

use crate::command::{Command, Endpoint, Handle, Message, channel};
use crate::created::Created;
use crate::error::Error;
use crate::event::Events;
use crate::overcommit::Alone;
use crate::overcommit::Coordinator;
use crate::overcommit::control::Control;
use crate::overcommit::ledger::{Ledger, SharedLedger};
use crate::overcommit::psi::{self, Sources};
use crate::overcommit::triggers::Triggers;
use crate::overcommit::view::Observer;
use crate::state::{State, Verb, check};
use crate::syscalls;

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
    let control = Control::new(Sources::open(&options.host), coordinator)
        .with_triggers(Triggers::open(&options.host, options.seccomp));
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
                Some(Message::Job) => {
                    self.look_at_jobs();
                    Flow::Go
                }
                Some(Message::Pressure) => {
                    // When the governor is to look is asked before the next message.
                    self.control.press();
                    Flow::Go
                }
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
            self.rest_unless_governed();
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
                    .and_then(|c| c.resize_disk(&id, desired_size));
                self.answer(reply, result);
            }
            Command::SnapshotDisk { disks, reply } => {
                let result = self.snapshot_disks(&disks);
                self.answer(reply, result);
            }
            Command::BeginJob { order, reply } => {
                let result = self.begin_job(order);
                self.answer(reply, result);
            }
            Command::Jobs { reply } => {
                let result = self.created(Verb::Jobs).map(|c| c.jobs());
                self.answer(reply, result);
            }
            Command::SetJob { id, speed, reply } => {
                let created = self.created(Verb::SetJob);
                let result = created.and_then(|c| c.set_job(&id, speed));
                self.answer(reply, result);
            }
            Command::CancelJob { id, reply } => {
                let created = self.created(Verb::CancelJob);
                let result = created.and_then(|c| c.cancel_job(&id));
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
}

#[cfg(test)]
mod tests;
