//! The threads that run the guest: `vcpu0`, `vcpu1`, …
//!
//! ```text
//!            resume                    Shutdown, error
//!   paused ◄────────► in KVM_RUN ──────────────────────► parked until stopped
//!      │      pause        │                                    │
//!      └───────────────────┴──────────── stop (Drop) ───────────┘
//! ```
//! A vCPU thread answers register accesses through the two buses, and does nothing else: no files,
//! no device work. It is spawned by the VMM thread and paused until told otherwise. To be told
//! anything while in KVM_RUN it must come out: a signal, whose handler also sets `immediate_exit`
//! so that a thread that was just about to enter does not.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use devices::allow;
use devices::bus::Bus;
use devices::guest_memory::GuestRam;
use devices::sandbox::{Allow, COMMON, Filter, SeccompMode, Test};
use devices::signals::GuestSignals;
use devices::worker::STACK_BYTES;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::signal::{Killable, register_signal_handler};

use crate::boot::Entry;
use crate::config::CpusConfig;
use crate::cpuid::{Supported, apic_id};
use crate::error::Error;
use crate::event::Events;
use crate::interrupts;
use crate::ioctls::{
    KVM_CREATE_VCPU, KVM_GET_LAPIC, KVM_GET_MP_STATE, KVM_GET_REGS, KVM_GET_SREGS,
    KVM_GET_SUPPORTED_CPUID, KVM_KVMCLOCK_CTRL, KVM_NMI, KVM_RUN, KVM_SET_CPUID2, KVM_SET_FPU,
    KVM_SET_LAPIC, KVM_SET_MSRS, KVM_SET_REGS, KVM_SET_SREGS,
};

mod control;
mod exits;
pub mod placement;
mod reset;
mod runner;

use control::{Control, Order};
use exits::Exits;
use placement::Placement;
use runner::Runner;

/// The signal that gets a vCPU thread out of KVM_RUN: a real-time signal that neither C library
/// keeps for itself.
pub const KICK_SIGNAL: i32 = 40;

/// What a vCPU thread calls beyond [`devices::sandbox::COMMON`] and [`interrupts::SYSCALLS`]
/// (a guest that programs MSI-X or places a BAR changes routes and doorbells; a device that was
/// unplugged in the midst of an access to it gives its vectors back).
pub const SYSCALLS: &[Allow] = &[
    // Debug builds of the standard library look at a descriptor before they close it.
    allow!(fcntl, 1 => Test::Is(libc::F_GETFD as u32)),
    allow!(ioctl, 1 => Test::Is(KVM_RUN)),
    allow!(ioctl, 1 => Test::Is(KVM_NMI)),
    allow!(ioctl, 1 => Test::Is(KVM_GET_MP_STATE)),
    allow!(ioctl, 1 => Test::Is(KVM_KVMCLOCK_CTRL)),
    // What a failed vCPU reports.
    allow!(ioctl, 1 => Test::Is(KVM_GET_REGS)),
    allow!(ioctl, 1 => Test::Is(KVM_GET_SREGS)),
];

/// What the VMM thread calls to make and to control vCPUs, beyond [`devices::sandbox::COMMON`],
/// [`SYSCALLS`] and what any spawning of threads needs.
pub const CONTROL_SYSCALLS: &[Allow] = &[
    allow!(ioctl, 1 => Test::Is(KVM_CREATE_VCPU)),
    allow!(ioctl, 1 => Test::Is(KVM_GET_LAPIC)),
    allow!(ioctl, 1 => Test::Is(KVM_GET_SUPPORTED_CPUID)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_CPUID2)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_FPU)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_LAPIC)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_MSRS)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_REGS)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_SREGS)),
    allow!(rt_sigaction, 0 => Test::Is(KICK_SIGNAL as u32)),
    allow!(tgkill, 2 => Test::Is(KICK_SIGNAL as u32)),
];

/// What vCPUs are made of and what they answer to.
pub struct VcpuContext<'a> {
    /// KVM.
    pub kvm: &'a Kvm,
    /// The VM, with memory and interrupt controllers.
    pub vm: &'a VmFd,
    /// How many, and what they look like.
    pub cpus: &'a CpusConfig,
    /// Where the first one starts; the others wait for the guest to start them.
    pub entry: Entry,
    /// What is attached to the VM, kept for as long as the threads live.
    pub ram: GuestRam,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where resets and failures are signalled.
    pub signals: Arc<GuestSignals>,
    /// Where failures are told in full.
    pub events: Events,
    /// Mode of the threads' filter.
    pub seccomp: SeccompMode,
}

/// All vCPUs of a VM. Dropping it stops them.
pub struct Vcpus {
    control: Arc<Control>,
    threads: Vec<VcpuThread>,
}

/// A vCPU's thread.
struct VcpuThread {
    handle: JoinHandle<()>,
    /// What the kernel calls it.
    id: u32,
    exits: Arc<Exits>,
}

impl Vcpus {
    /// Makes the vCPUs and their threads, which wait for [`Vcpus::resume`]. Called on the VMM
    /// thread.
    pub fn spawn(context: VcpuContext) -> Result<Self, Error> {
        register_signal_handler(KICK_SIGNAL, runner::on_kick)
            .map_err(|error| Error::host("handling the vCPU signal", error))?;
        let filter = Filter::compile(
            "vcpu",
            context.seccomp,
            &[COMMON, SYSCALLS, interrupts::SYSCALLS],
        )
        .map_err(|error| Error::host("making the vCPU threads' filter", error))?;
        let supported = Supported::ask(context.kvm)?;
        let mut descriptors = Vec::new();
        for index in 0..context.cpus.boot_vcpus {
            let id = apic_id(context.cpus, index);
            let vcpu = context
                .vm
                .create_vcpu(id.into())
                .map_err(|error| Error::os(format!("making vCPU {index}"), error))?;
            let cpuid = supported.for_vcpu(context.cpus, index);
            let entry = (index == 0).then_some(&context.entry);
            reset::initialise(&vcpu, &cpuid, entry)
                .map_err(|error| Error::host(format!("setting up vCPU {index}"), error))?;
            descriptors.push(vcpu);
        }
        let mut vcpus = Self {
            control: Arc::new(Control::new(context.cpus.boot_vcpus)),
            threads: Vec::new(),
        };
        let placement = Placement::new(context.cpus);
        for (index, vcpu) in (0..).zip(descriptors) {
            // An error drops, and so stops, those that run already.
            vcpus.start(&context, (&filter, &placement), index, vcpu)?;
        }
        Ok(vcpus)
    }

    fn start(
        &mut self,
        context: &VcpuContext,
        (filter, placement): (&Filter, &Arc<Placement>),
        index: u32,
        vcpu: kvm_ioctls::VcpuFd,
    ) -> Result<(), Error> {
        let exits = Arc::new(Exits::default());
        let runner = Runner {
            index,
            vcpu,
            pio: context.pio.clone(),
            mmio: context.mmio.clone(),
            signals: context.signals.clone(),
            events: context.events.clone(),
            control: self.control.clone(),
            waits: 0,
            exits: exits.clone(),
            _ram: context.ram.clone(),
        };
        let (filter, placement) = (filter.clone(), placement.clone());
        let (ready, outcome) = channel::<Result<u32, Error>>();
        let failed = move |error: &dyn std::fmt::Display| {
            Error::host(format!("starting vCPU {index}"), error)
        };
        let handle = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let prepared = (placement.apply(index))
                    .map_err(|invalid| Error::from(invalid.within("cpus")))
                    .and_then(|()| filter.install().map_err(|error| failed(&error)));
                match prepared {
                    Ok(()) => runner.run(|| {
                        let id = rustix::thread::gettid().as_raw_nonzero().get();
                        // The spawner waits for this, so it is there to hear it.
                        let _ = ready.send(Ok(id.unsigned_abs()));
                    }),
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })
            .map_err(|error| failed(&error))?;
        match outcome.recv() {
            Ok(Ok(id)) => {
                self.threads.push(VcpuThread { handle, id, exits });
                Ok(())
            }
            // It ends by itself.
            Ok(Err(error)) => Err(error),
            Err(_) => Err(failed(&"the thread ended before it was ready")),
        }
    }

    /// What the kernel calls the vCPUs' threads, in the order of the vCPUs.
    pub fn thread_ids(&self) -> Vec<u32> {
        self.threads.iter().map(|thread| thread.id).collect()
    }

    /// How often each vCPU has left the guest for us, by what it was for.
    pub fn exits(&self) -> Vec<BTreeMap<&'static str, u64>> {
        let threads = self.threads.iter();
        threads.map(|thread| thread.exits.totals()).collect()
    }

    /// Lets the vCPUs run. Called on the VMM thread.
    pub fn resume(&self) {
        self.control.order(Order::Run);
    }

    /// Stops the vCPUs between two instructions, and returns when all stand still. When one does
    /// not within a few seconds, all run on and this is [`Error::Timeout`].
    pub fn pause(&self) -> Result<(), Error> {
        self.control.order(Order::Pause);
        self.kick();
        if self.control.all_parked() {
            return Ok(());
        }
        self.control.order(Order::Run);
        Err(Error::Timeout("pausing the vCPUs"))
    }

    /// Sends a non-maskable interrupt to every vCPU that the guest has started.
    pub fn nmi(&self) -> Result<(), Error> {
        self.control.request_nmi();
        self.kick();
        if self.control.all_nmi_sent() {
            Ok(())
        } else {
            Err(Error::Timeout("interrupting the vCPUs"))
        }
    }

    fn kick(&self) {
        for thread in &self.threads {
            // Fails only for a thread that has ended, which needs no kick.
            let _ = thread.handle.kill(KICK_SIGNAL);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.control.order(Order::Stop);
        self.kick();
        for thread in self.threads.drain(..) {
            // A panic aborts the process, so a join can't report one.
            let _ = thread.handle.join();
        }
    }
}

/// A KVM call failed while `doing`.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
struct StepError {
    doing: &'static str,
    source: io::Error,
}

#[cfg(test)]
mod tests;
