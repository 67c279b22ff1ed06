//! The body of a vCPU thread.
#![expect(
    unsafe_code,
    reason = "the element size of string I/O and the signal handler's flag are fields of the page \
              that KVM shares with us, which kvm-ioctls does not give out"
)]

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

use devices::bus::Bus;
use devices::guest_memory::GuestRam;
use devices::signals::GuestSignals;
use kvm_bindings::kvm_run;
use kvm_bindings::{
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::unblock_signal;

use super::KICK_SIGNAL;
use super::control::{Control, Next};
use super::exits::{Exits, Kind};
use crate::event::Events;

/// More exits than any one instruction needs to be completed.
const COMPLETION_EXITS: u32 = 1024;
/// More times than a vCPU that is being started has nothing to run yet.
const PATIENT_WAITS: u32 = 16;

thread_local! {
    /// Where a vCPU thread's `kvm_run.immediate_exit` is; null in other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// Handles [`KICK_SIGNAL`]: whether the thread is in KVM_RUN or on its way, it comes out.
pub(super) extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // Constant-initialised and without a destructor: reading it is a plain memory access.
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Runner::run` sets the pointer to a byte of the vCPU's page and takes it away
        // before the page goes; we are on its thread, so neither happens meanwhile.
        unsafe { flag.write_volatile(1) };
    }
}

/// A vCPU and all it needs.
pub(super) struct Runner {
    pub(super) index: u32,
    pub(super) vcpu: VcpuFd,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) signals: Arc<GuestSignals>,
    pub(super) events: Events,
    pub(super) control: Arc<Control>,
    /// Times in a row that KVM_RUN had nothing to run.
    pub(super) waits: u32,
    /// What it left the guest for.
    pub(super) exits: Arc<Exits>,
    /// What the guest runs in must stay mapped.
    pub(super) _ram: GuestRam,
}

/// How an entry into the guest ended.
enum Exit {
    /// Answered; go on.
    Done,
    /// Somebody wants something.
    Interrupted,
    /// This vCPU is not to run any more.
    End,
    /// This vCPU can't run any more.
    Failed(String),
}

impl Runner {
    /// Obeys and runs until told to stop; calls `ready` when kicks are heard.
    pub(super) fn run(mut self, ready: impl FnOnce()) {
        let page: *mut kvm_run = self.vcpu.get_kvm_run();
        // SAFETY: the page is mapped as long as `self.vcpu` lives; only the address is taken.
        IMMEDIATE_EXIT.set(unsafe { &raw mut (*page).immediate_exit });
        // The spawner may have blocked it. A thread that can't hear would be noticed at the first
        // pause.
        let _ = unblock_signal(KICK_SIGNAL);
        ready();
        self.work(page);
        IMMEDIATE_EXIT.set(null_mut());
    }

    fn work(&mut self, page: *mut kvm_run) {
        let mut dead = false;
        loop {
            if dead || self.control.attention() {
                let mut settled = false;
                loop {
                    match self.control.next(self.index, dead, settled) {
                        Next::Run => break,
                        Next::Stop => return,
                        Next::Nmi => {
                            self.send_nmi();
                            self.control.nmi_sent(self.index);
                        }
                        Next::Settle => {
                            if !dead {
                                dead = self.settle(page);
                            }
                            settled = true;
                        }
                    }
                }
            }
            dead = self.step(page);
        }
    }

    /// Enters the guest and answers its exit; true when this vCPU is through.
    fn step(&mut self, page: *mut kvm_run) -> bool {
        match self.enter(page) {
            Exit::Done => false,
            Exit::Interrupted => {
                // Cleared before it is looked what the kick was for, so that no kick is lost.
                self.vcpu.set_kvm_immediate_exit(0);
                false
            }
            Exit::End => true,
            Exit::Failed(reason) => {
                self.report(&reason);
                true
            }
        }
    }

    /// Completes the instruction whose access was answered last (KVM does that on the next entry)
    /// without beginning another; true when this vCPU is through.
    fn settle(&mut self, page: *mut kvm_run) -> bool {
        for _ in 0..COMPLETION_EXITS {
            self.vcpu.set_kvm_immediate_exit(1);
            match self.enter(page) {
                Exit::Done => {}
                Exit::Interrupted => break,
                Exit::End => return true,
                Exit::Failed(reason) => {
                    self.report(&reason);
                    return true;
                }
            }
        }
        self.vcpu.set_kvm_immediate_exit(0);
        // Tells the guest that it was stopped, lest it take that for a lockup. Refused where it
        // does not use kvmclock.
        let _ = self.vcpu.kvmclock_ctrl();
        false
    }

    fn enter(&mut self, page: *mut kvm_run) -> Exit {
        let waits = std::mem::take(&mut self.waits);
        let result = self.vcpu.run();
        self.exits.count(match &result {
            Ok(VcpuExit::IoIn(..)) => Kind::PortRead,
            Ok(VcpuExit::IoOut(..)) => Kind::PortWrite,
            Ok(VcpuExit::MmioRead(..)) => Kind::MmioRead,
            Ok(VcpuExit::MmioWrite(..)) => Kind::MmioWrite,
            Ok(VcpuExit::Intr) => Kind::Interrupted,
            Err(error) if error.errno() == libc::EINTR => Kind::Interrupted,
            _ => Kind::Other,
        });
        match result {
            Ok(VcpuExit::IoIn(port, data)) => {
                for element in data.chunks_mut(element_size(page)) {
                    self.pio.read(port.into(), element);
                }
                Exit::Done
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                for element in data.chunks(element_size(page)) {
                    self.pio.write(port.into(), element);
                }
                Exit::Done
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.mmio.read(address, data);
                Exit::Done
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.mmio.write(address, data);
                Exit::Done
            }
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            // A triple fault: on a PC the chipset answers it with a reset.
            Ok(VcpuExit::Shutdown) => {
                self.signals.reset();
                Exit::End
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => {
                    self.signals.power_off();
                    Exit::End
                }
                KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => {
                    self.signals.reset();
                    Exit::End
                }
                other => Exit::Failed(format!("unknown system event {other}")),
            },
            Ok(other) => Exit::Failed(format!("{other:?}")),
            Err(error) => match error.errno() {
                libc::EINTR => Exit::Interrupted,
                // A vCPU that waited to be started, and now is. One with an interrupt that it
                // can't take yet says so all the time.
                libc::EAGAIN => {
                    self.waits = waits.saturating_add(1);
                    if self.waits > PATIENT_WAITS {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Exit::Done
                }
                _ => Exit::Failed(format!("KVM_RUN: {error}")),
            },
        }
    }

    /// Sends this vCPU an NMI, which like a real CPU it loses as long as it waits to be started.
    fn send_nmi(&self) {
        let waiting = self.vcpu.get_mp_state().is_ok_and(|state| {
            matches!(
                state.mp_state,
                KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED
            )
        });
        if !waiting {
            // Fails only for arguments it does not have.
            let _ = self.vcpu.nmi();
        }
    }

    /// Tells that this vCPU has failed, and where.
    fn report(&mut self, reason: &str) {
        let hex = |value: u64| format!("{value:#x}");
        let mut properties = vec![
            ("vcpu", self.index.to_string()),
            ("reason", reason.to_owned()),
        ];
        if let Ok(regs) = self.vcpu.get_regs() {
            properties.push(("rip", hex(regs.rip)));
            properties.push(("rsp", hex(regs.rsp)));
            properties.push(("rflags", hex(regs.rflags)));
        }
        if let Ok(sregs) = self.vcpu.get_sregs() {
            properties.push(("cs", hex(sregs.cs.base)));
            properties.push(("cr0", hex(sregs.cr0)));
            properties.push(("cr3", hex(sregs.cr3)));
            properties.push(("cr4", hex(sregs.cr4)));
            properties.push(("efer", hex(sregs.efer)));
        }
        let properties: Vec<_> = properties
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        self.events.emit("vm", "vcpu-error", &properties);
        self.signals.vcpu_failed();
    }
}

/// The size of one access of the string I/O instruction that has just exited: KVM hands over
/// several at once.
fn element_size(page: *mut kvm_run) -> usize {
    // SAFETY: called only upon KVM_EXIT_IO, for which `io` is the union's valid field; the page
    // is mapped while the runner lives, and the data that the exit borrows lies behind it.
    let size = unsafe { (&raw const (*page).__bindgen_anon_1.io.size).read() };
    usize::from(size.max(1))
}
