//! The virtio PCI transport, modern only (virtio 1.3 §4.1).
//!
//! ```text
//!  vCPU ─ config space ─► ConfigSpace ─► BAR placed, MSI-X enabled ─► doorbells, vectors
//!       ─ BAR ──────────► common ─► Transport ── Activate/Reset ──► workers
//!                         isr, MSI-X              ▲ needs_reset, config_changed, queue used
//!                         device ──► VirtioDevice └──────────────── workers
//!                         notify ─► doorbells (mostly in the kernel, by ioeventfd)
//! ```
//!
//! There is one 32-bit memory BAR, and interrupts are MSI-X only; a driver without MSI-X has to
//! look at the ISR status by itself. VIRTIO_F_RING_RESET, VIRTIO_F_NOTIFICATION_DATA and
//! VIRTIO_F_SR_IOV are not offered.

mod layout;
mod notify;
mod registers;
#[cfg(test)]
mod tests;
mod transport;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::layout::{Region, Window};
use self::notify::Doorbells;
use self::registers::Registers;
use self::transport::Transport;
use super::{TransportSignals, VirtioDevice};
use crate::event::Reporter;
use crate::guest_memory::GuestRam;
use crate::machine::Machine;
use crate::pci::config::{ConfigSpace, Identity, STATUS, STATUS_INTERRUPT};
use crate::pci::msix::Msix;
use crate::pci::{BarInfo, PciDevice};

/// Bytes of the one BAR.
pub const VIRTIO_BAR_SIZE: u64 = 0x1_0000;

/// Features of the transport and the ring, which every device has.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Bits 24 to 49, which are not the device's to offer (§2.2, §6).
const RESERVED_FEATURES: u64 = (1 << 50) - (1 << 24);

/// [`VirtioPciDevice::decoded`] while the BAR answers nowhere.
const NOWHERE: u64 = u64::MAX;

/// A virtio device in a PCI slot.
pub struct VirtioPciDevice {
    device: Arc<dyn VirtioDevice>,
    transport: Arc<Transport>,
    config: Mutex<ConfigSpace>,
    /// Where the BAR answers: a copy for the many accesses that only want to know that.
    decoded: AtomicU64,
    doorbells: Doorbells,
    /// Offset of the MSI-X message control register.
    msix_control: usize,
    /// Offset of the PCI configuration access capability.
    access: usize,
}

impl VirtioPciDevice {
    /// Puts a virtio device behind PCI registers, with its BAR at `bar_base` (below 4 GiB, a
    /// multiple of [`VIRTIO_BAR_SIZE`]) until the guest moves it. Called on the VMM thread.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestRam,
        machine: Arc<dyn Machine>,
        reporter: Reporter,
        bar_base: u64,
    ) -> io::Result<Arc<Self>> {
        let queue_sizes = device.queue_sizes();
        if queue_sizes.len() > layout::MAX_QUEUES
            || queue_sizes.iter().any(|size| Queue::new(*size).is_err())
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a device has at most 1023 queues, their sizes are powers of two up to 32768",
            ));
        }
        let msix = Msix::new(machine.allocate_msi(queue_sizes.len() as u16 + 1)?);
        let mut config = ConfigSpace::new(&identity(device.device_type()));
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        config
            .add_memory_bar(layout::BAR.into(), bar_base, VIRTIO_BAR_SIZE as u32)
            .map_err(invalid)?;
        let msix_capability = msix
            .add_capability(
                &mut config,
                layout::BAR,
                layout::MSIX_TABLE as u32,
                layout::MSIX_PENDING as u32,
            )
            .map_err(invalid)?;
        let access = layout::add_capabilities(&mut config, queue_sizes.len()).map_err(invalid)?;
        let kicks = queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let offered = device.features() & !RESERVED_FEATURES | TRANSPORT_FEATURES;
        let registers = Registers::new(offered, queue_sizes, msix.vectors());
        Ok(Arc::new(Self {
            transport: Arc::new(Transport::new(
                registers,
                msix,
                kicks.clone(),
                memory,
                reporter,
            )),
            device,
            config: Mutex::new(config),
            decoded: AtomicU64::new(NOWHERE),
            doorbells: Doorbells::new(machine, kicks),
            msix_control: msix_capability + 2,
            access,
        }))
    }

    /// The device behind the registers.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// The device status (virtio 1.3 §2.1) as the driver reads it.
    pub fn status(&self) -> u8 {
        self.transport.status()
    }

    /// Resets the virtio half as a driver's write of 0 to the status does, for when the machine is
    /// reset under the driver; it is done when [`VirtioPciDevice::status`] is 0. Never blocks.
    pub fn reset(&self) {
        self.transport.write_status(&*self.device, 0);
    }

    /// Takes doorbells and interrupt vectors back from the machine, for when the device has been
    /// unplugged; dropping it does the same. Called on the VMM thread, so that it is done there
    /// even if a vCPU or a worker holds the last reference.
    pub fn retire(&self) {
        self.doorbells.retire();
        self.transport.msix().release();
    }

    /// Makes a `change` to what the driver reads in the device's configuration space, and tells the
    /// driver. Whoever reads the generation before and after the fields sees it change if they did
    /// (virtio 1.3 §2.5.1). `change` must be short, and not call the transport. Called on the VMM
    /// thread.
    pub fn change_config(&self, change: impl FnOnce()) {
        self.transport.change_config(change);
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where in the BAR an access to a physical address falls, if it falls there as a whole.
    fn bar_offset(&self, address: u64, len: usize) -> Option<u64> {
        let base = self.decoded.load(Ordering::SeqCst);
        let offset = address.checked_sub(base)?;
        let end = offset.checked_add(len as u64)?;
        (base != NOWHERE && end <= VIRTIO_BAR_SIZE).then_some(offset)
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match layout::region(offset) {
            (Region::Common, offset) => self.transport.read_common(offset, data),
            (Region::Isr, 0) => {
                if let Some(first) = data.first_mut() {
                    *first = self.transport.take_isr();
                }
            }
            (Region::Device, offset) => self.device.read_config(offset, data),
            (Region::MsixTable, offset) => self.transport.msix().read_table(offset, data),
            (Region::MsixPending, offset) => self.transport.msix().read_pending(offset, data),
            (Region::Isr | Region::Notify | Region::Nothing, _) => {}
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        match layout::region(offset) {
            (Region::Common, offset) => {
                self.transport.write_common(&*self.device, offset, data);
            }
            (Region::Device, offset) => self.device.write_config(offset, data),
            (Region::Notify, offset) => self.doorbells.write(offset),
            (Region::MsixTable, offset) => self.transport.msix().write_table(offset, data),
            (Region::Isr | Region::MsixPending | Region::Nothing, _) => {}
        }
    }

    /// Makes doorbells and interrupts follow the configuration space, whose lock the caller holds.
    fn follow(&self, config: &ConfigSpace) {
        let base = config.decoded_bar(layout::BAR.into());
        self.decoded
            .store(base.unwrap_or(NOWHERE), Ordering::SeqCst);
        self.doorbells.place(base);
        let mut control = [0; 2];
        config.read(self.msix_control, &mut control);
        self.transport
            .msix()
            .set_control(u16::from_le_bytes(control));
    }
}

impl PciDevice for VirtioPciDevice {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        if Window::touched(self.access, offset, data.len()) {
            // Statements of their own, so that the lock is free while the BAR is read.
            let window = Window::of(&self.config(), self.access);
            if let Some(mut window) = window {
                let bytes = &mut window.data[..window.length];
                self.read_bar(window.offset, bytes);
                self.config().put(self.access + Window::DATA, bytes);
            }
        }
        self.config().read(offset, data);
        // §4.1.4.5.1: without MSI-X the status register shows whether the ISR status is set.
        let status = STATUS
            .checked_sub(offset)
            .and_then(|index| data.get_mut(index));
        if let Some(status) = status
            && !self.transport.msix().enabled()
            && self.transport.isr() != 0
        {
            *status |= STATUS_INTERRUPT;
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let window = {
            let mut config = self.config();
            config.write(offset, data);
            self.follow(&config);
            Window::touched(self.access, offset, data.len())
                .then(|| Window::of(&config, self.access))
                .flatten()
        };
        if let Some(window) = window {
            self.write_bar(window.offset, &window.data[..window.length]);
        }
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        let Some(offset) = self.bar_offset(address, data.len()) else {
            return false;
        };
        self.read_bar(offset, data);
        true
    }

    fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        let Some(offset) = self.bar_offset(address, data.len()) else {
            return false;
        };
        self.write_bar(offset, data);
        true
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.config().bars()
    }
}

impl TransportSignals for VirtioPciDevice {
    fn needs_reset(&self) {
        self.transport.needs_reset();
    }

    fn config_changed(&self) {
        self.transport.config_changed();
    }
}

impl Drop for VirtioPciDevice {
    fn drop(&mut self) {
        self.retire();
    }
}

/// Ids and class of a device (§4.1.2).
fn identity(device_type: u16) -> Identity {
    let device = device_type.saturating_add(0x1040);
    Identity {
        vendor: 0x1af4,
        device,
        revision: 1,
        class: match device_type {
            1 => 0x02_00_00, // network: Ethernet
            2 => 0x01_80_00, // mass storage: other
            3 => 0x07_80_00, // communication: other
            _ => 0xff_00_00, // none of the defined classes
        },
        subsystem_vendor: 0x1af4,
        subsystem: device,
    }
}
