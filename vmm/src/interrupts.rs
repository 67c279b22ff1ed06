//! Interrupts and doorbells between devices and KVM, with no thread of ours in between.
//!
//! ```text
//! device ─ write(eventfd) ─► irqfd ─► GSI ─┬ 0…23: PIC and IOAPIC pins (lines)
//!                                          └ 24…:  a message, MSI-X (vectors)
//! guest ── MMIO write ─────► ioeventfd ─► device
//! ```
//! KVM takes the table of all routes at once (KVM_SET_GSI_ROUTING), so it is kept here, and given
//! to KVM only when a route has changed.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::allow;
use devices::machine::{Machine, MsiVector};
use devices::sandbox::{Allow, Test};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::ioctls::{KVM_IOEVENTFD, KVM_IRQFD, KVM_SET_GSI_ROUTING};
use crate::layout::MSI_GSI_BASE;

/// What is called here, on the VMM thread and on vCPU threads, beyond
/// [`devices::sandbox::COMMON`].
pub const SYSCALLS: &[Allow] = &[
    allow!(eventfd2),
    allow!(ioctl, 1 => Test::Is(KVM_IOEVENTFD)),
    allow!(ioctl, 1 => Test::Is(KVM_IRQFD)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_GSI_ROUTING)),
];

/// The most message-signalled vectors of a VM; KVM has room for 4096 routes in all.
const MAX_VECTORS: u32 = 2048;
/// Pins of one PIC.
const PIC_PINS: u32 = 8;

/// The interrupts and doorbells of one VM; clones are the same one.
#[derive(Clone)]
pub struct Interrupts(Arc<Shared>);

struct Shared {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// The messages that are routed, by GSI: address and data.
    messages: BTreeMap<u32, (u64, u32)>,
    /// GSIs that were given back.
    free: Vec<u32>,
    /// Vectors ever in use at once.
    used: u32,
}

impl Interrupts {
    /// The interrupts of `vm`, whose interrupt controllers exist already.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self(Arc::new(Shared {
            vm,
            table: Mutex::default(),
        }))
    }

    /// An eventfd that pulses the edge-triggered line `gsi` (an IOAPIC pin) when written to. It
    /// does so until it is closed.
    pub fn line(&self, gsi: u32) -> io::Result<EventFd> {
        if gsi >= MSI_GSI_BASE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.0.vm.register_irqfd(&event, gsi)?;
        Ok(event)
    }
}

impl Machine for Interrupts {
    fn allocate_msi(&self, count: u16) -> io::Result<Vec<Arc<dyn MsiVector>>> {
        (0..count)
            .map(|_| Ok(Arc::new(Vector::new(&self.0)?) as Arc<dyn MsiVector>))
            .collect()
    }

    fn bind_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.0
            .vm
            .register_ioevent(doorbell, &address, NoDatamatch)?;
        Ok(())
    }

    fn unbind_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.0
            .vm
            .unregister_ioevent(doorbell, &address, NoDatamatch)?;
        Ok(())
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Routes `gsi` to `message`, or nowhere.
    fn route(&self, gsi: u32, message: Option<(u64, u32)>) -> io::Result<()> {
        let mut table = self.table();
        let before = match message {
            Some(message) => table.messages.insert(gsi, message),
            None => table.messages.remove(&gsi),
        };
        if before == message {
            return Ok(());
        }
        let outcome = table
            .routing()
            .and_then(|routing| Ok(self.vm.set_gsi_routing(&routing)?));
        if outcome.is_err() {
            match before {
                Some(before) => table.messages.insert(gsi, before),
                None => table.messages.remove(&gsi),
            };
        }
        outcome
    }
}

impl Table {
    fn take_gsi(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let index = self.used;
            (index < MAX_VECTORS).then(|| {
                self.used += 1;
                MSI_GSI_BASE + index
            })
        })
    }

    /// The table as KVM takes it: the lines as KVM itself routes them, and the messages.
    fn routing(&self) -> io::Result<KvmIrqRouting> {
        let pic = (0..2 * PIC_PINS).map(|gsi| {
            let chip = if gsi < PIC_PINS {
                KVM_IRQCHIP_PIC_MASTER
            } else {
                KVM_IRQCHIP_PIC_SLAVE
            };
            pin(gsi, chip, gsi % PIC_PINS)
        });
        let ioapic = (0..MSI_GSI_BASE).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        let messages = self
            .messages
            .iter()
            .map(|(gsi, (address, data))| kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: *address as u32,
                        address_hi: (address >> 32) as u32,
                        data: *data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            });
        let entries: Vec<_> = pic.chain(ioapic).chain(messages).collect();
        KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))
    }
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

/// A vector: its eventfd is tied to its GSI from the start, and without a route KVM drops what is
/// triggered.
struct Vector {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
}

impl Vector {
    fn new(shared: &Arc<Shared>) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = shared
            .table()
            .take_gsi()
            .ok_or_else(|| io::Error::other("the VM has no interrupt vector left"))?;
        if let Err(error) = shared.vm.register_irqfd(&event, gsi) {
            shared.table().free.push(gsi);
            return Err(error.into());
        }
        Ok(Self {
            shared: shared.clone(),
            gsi,
            event,
        })
    }
}

impl MsiVector for Vector {
    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        self.shared.route(self.gsi, Some((address, data)))
    }

    fn trigger(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // Both can fail only where the VM is beyond help; the eventfd's closing unties it too.
        let _ = self.shared.vm.unregister_irqfd(&self.event, self.gsi);
        match self.shared.route(self.gsi, None) {
            Ok(()) => self.shared.table().free.push(self.gsi),
            // A GSI whose route stays must not be given to another vector.
            Err(error) => tracing::warn!(gsi = self.gsi, %error, "a route can't be taken back"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gsis_are_used_again_and_never_run_past_the_bound() {
        let mut table = Table::default();
        let all: Vec<_> = std::iter::from_fn(|| table.take_gsi()).collect();
        assert_eq!(all.len(), MAX_VECTORS as usize);
        assert_eq!(all[0], MSI_GSI_BASE);
        table.free.push(77);
        assert_eq!(table.take_gsi(), Some(77));
        assert_eq!(table.take_gsi(), None);
    }

    #[test]
    fn the_lines_keep_the_routes_that_kvm_gives_them() {
        let mut table = Table::default();
        table.messages.insert(30, (0xfee0_1000, 0x41));
        let routing = table.routing().unwrap();
        let entries = routing.as_slice();
        assert_eq!(entries.len(), 16 + 24 + 1);
        let of_gsi = |gsi| entries.iter().filter(|e| e.gsi == gsi).count();
        assert_eq!(of_gsi(4), 2, "PIC and IOAPIC");
        assert_eq!(of_gsi(20), 1, "IOAPIC only");
        let message = entries.iter().find(|e| e.gsi == 30).unwrap();
        assert_eq!(message.type_, KVM_IRQ_ROUTING_MSI);
    }
}
