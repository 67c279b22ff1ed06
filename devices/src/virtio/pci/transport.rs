//! What vCPU threads and device threads share of the transport: registers, ISR status, interrupts,
//! and the way in and out of the workers.
//!
//! It holds no reference to the device, and nothing here does: a worker keeps this alive (as its
//! [`TransportSignals`]), and a device that is kept alive by its own worker would never end.
//!
//! Two locks. `writes` is taken by vCPU threads for a whole register write with all that follows
//! from it, so that orders reach the workers in the order of the status writes. `registers` is
//! taken inside it, or alone by device threads, for a few memory accesses only, and nothing is
//! called while it is held.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::registers::{NO_VECTOR, QueueRegisters, Registers, Reset, Vectors};
use crate::event::{DeviceEvent, Reporter};
use crate::guest_memory::GuestRam;
use crate::pci::msix::Msix;
use crate::virtio::{Activation, QueueInterrupt, TransportSignals, VirtQueue, VirtioDevice};
use crate::worker::Order;

/// ISR status (§4.1.4.5): a queue was used.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 2;

pub(super) struct Transport {
    writes: Mutex<()>,
    registers: Mutex<Registers>,
    vectors: Arc<Vectors>,
    msix: Msix,
    isr: AtomicU8,
    generation: AtomicU8,
    kicks: Vec<Arc<EventFd>>,
    memory: GuestRam,
    reporter: Reporter,
}

impl Transport {
    pub(super) fn new(
        registers: Registers,
        msix: Msix,
        kicks: Vec<Arc<EventFd>>,
        memory: GuestRam,
        reporter: Reporter,
    ) -> Self {
        Self {
            writes: Mutex::default(),
            vectors: registers.vectors(),
            registers: Mutex::new(registers),
            msix,
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            kicks,
            memory,
            reporter,
        }
    }

    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    pub(super) fn status(&self) -> u8 {
        self.registers().status()
    }

    /// ISR status, as it stands.
    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// ISR status for the driver, whose read clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        // Under the lock, as it changes there.
        let generation = self.generation.load(Ordering::SeqCst);
        registers.read(generation, offset, data);
    }

    /// A driver's write to the common configuration, and what follows from it. Called on vCPU
    /// threads.
    pub(super) fn write_common(
        self: &Arc<Self>,
        device: &dyn VirtioDevice,
        offset: u64,
        data: &[u8],
    ) {
        let _serialized = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        let effects = self.registers().write(offset, data);
        if effects.features_accepted {
            let features = self.registers().driver_features();
            device.features_accepted(features);
        }
        if effects.activate {
            self.activate(device);
        }
        if let Some(reset) = effects.reset {
            device.features_accepted(0);
            match reset {
                Reset::Done => self.quiet(),
                Reset::Workers => self.reset_workers(device),
            }
        }
    }

    /// A write to the status alone.
    pub(super) fn write_status(self: &Arc<Self>, device: &dyn VirtioDevice, status: u8) {
        self.write_common(device, super::registers::DEVICE_STATUS, &[status]);
    }

    /// Hands the queues to the workers.
    fn activate(self: &Arc<Self>, device: &dyn VirtioDevice) {
        let (features, settings) = {
            let registers = self.registers();
            (registers.driver_features(), registers.queues().to_vec())
        };
        let workers = device.workers();
        let mut shares: Vec<Vec<VirtQueue>> = workers.iter().map(|_| Vec::new()).collect();
        for (index, setting) in settings.iter().enumerate().filter(|(_, q)| q.enabled) {
            let queue = match build_queue(setting, features, &self.memory) {
                Ok(queue) => queue,
                Err(reason) => return self.refuse(&format!("queue {index}: {reason}")),
            };
            let share = shares.get_mut(device.worker_of_queue(index));
            let (Some(share), Some(kick)) = (share, self.kicks.get(index)) else {
                return self.refuse(&format!("queue {index} has no worker"));
            };
            let interrupt = Arc::new(QueueLine {
                transport: self.clone(),
                index,
            });
            share.push(VirtQueue::new(
                index as u16,
                queue,
                self.memory.clone(),
                kick.clone(),
                interrupt,
            ));
        }
        self.registers().set_activated();
        // Reported first, so that a failure of the worker is reported after it.
        self.reporter.report(DeviceEvent::Activated);
        for (worker, queues) in workers.iter().zip(shares).filter(|(_, q)| !q.is_empty()) {
            worker.order(Order::Activate(Box::new(Activation {
                features,
                queues,
                signals: self.clone(),
            })));
        }
    }

    /// The driver set up something that can't be served.
    fn refuse(&self, reason: &str) {
        self.needs_reset();
        self.reporter.report(DeviceEvent::Failed {
            reason: reason.to_owned(),
        });
    }

    /// Orders every worker to give up its queues; the last one to have done so resets the
    /// registers.
    fn reset_workers(self: &Arc<Self>, device: &dyn VirtioDevice) {
        let pending = Arc::new(PendingReset(self.clone()));
        for worker in device.workers() {
            let pending = pending.clone();
            worker.order(Order::Reset(Box::new(move || drop(pending))));
        }
    }

    /// Nothing is left of interrupts on their way.
    fn quiet(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.msix.clear_pending();
    }

    /// Interrupts the driver because of the configuration (§4.1.5.3).
    fn interrupt_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        let vector = self.vectors.config.load(Ordering::SeqCst);
        self.msix.trigger(vector);
    }

    /// See [`super::VirtioPciDevice::change_config`].
    pub(super) fn change_config(&self, change: impl FnOnce()) {
        let live = {
            let registers = self.registers();
            change();
            self.generation.fetch_add(1, Ordering::SeqCst);
            registers.is_live()
        };
        if live {
            self.interrupt_config();
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl TransportSignals for Transport {
    fn needs_reset(&self) {
        let tell = self.registers().set_needs_reset();
        if tell {
            self.interrupt_config();
        }
    }

    fn config_changed(&self) {
        self.change_config(|| {});
    }
}

/// A queue's interrupt: the vector is looked up when it is needed, as the driver may change it.
struct QueueLine {
    transport: Arc<Transport>,
    index: usize,
}

impl QueueInterrupt for QueueLine {
    fn trigger(&self) {
        let transport = &self.transport;
        if transport.msix.enabled() {
            let vector = transport.vectors.queues.get(self.index);
            let vector = vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst));
            // Refused although there is such a vector: MSI-X has just been disabled.
            if transport.msix.trigger(vector) || vector == NO_VECTOR {
                return;
            }
        }
        // §4.1.4.5.1: the bit is for drivers without MSI-X.
        transport.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
    }
}

/// A reset under way: each order holds a reference, and so does who gives the orders. The last one
/// to be dropped ends the reset, whether a worker carried the order out or is gone and dropped it.
struct PendingReset(Arc<Transport>);

impl Drop for PendingReset {
    fn drop(&mut self) {
        // Reported first: as soon as the status reads 0 the driver may activate the device again.
        self.0.reporter.report(DeviceEvent::Reset);
        self.0.quiet();
        self.0.registers().reset();
    }
}

/// The queue that the driver described, if its rings are aligned and lie in guest memory.
fn build_queue(
    setting: &QueueRegisters,
    features: u64,
    memory: &GuestRam,
) -> Result<Queue, virtio_queue::Error> {
    let mut queue = Queue::new(setting.max_size)?;
    queue.try_set_size(setting.size)?;
    queue.try_set_desc_table_address(GuestAddress(setting.descriptors))?;
    queue.try_set_avail_ring_address(GuestAddress(setting.driver_area))?;
    queue.try_set_used_ring_address(GuestAddress(setting.device_area))?;
    queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
    queue.set_ready(true);
    if queue.is_valid(&**memory) {
        Ok(queue)
    } else {
        Err(virtio_queue::Error::FindMemoryRegion)
    }
}
