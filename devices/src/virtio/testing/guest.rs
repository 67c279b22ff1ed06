//! A guest's view of the machine: memory, and the bus through its three faces.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::TestMachine;
use crate::bus::BusDevice;
use crate::event::Reporter;
use crate::guest_memory::GuestRam;
use crate::pci::bus::PciBus;
use crate::virtio::VirtioDevice;
use crate::virtio::pci::{VIRTIO_BAR_SIZE, VirtioPciDevice};

/// Where the window for BARs begins.
pub const WINDOW_BASE: u64 = 0xc000_0000;

/// A guest.
#[derive(Clone)]
pub struct TestGuest {
    /// RAM from address 0.
    pub memory: GuestRam,
    /// The machine.
    pub machine: Arc<TestMachine>,
    /// The bus.
    pub bus: Arc<PciBus>,
    ecam: Arc<dyn BusDevice>,
    ports: Arc<dyn BusDevice>,
    window: Arc<dyn BusDevice>,
}

impl TestGuest {
    /// A guest with `memory_bytes` of RAM and an empty bus.
    pub fn new(memory_bytes: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), memory_bytes)]).unwrap();
        Self::with_memory(Arc::new(memory))
    }

    /// A guest with this RAM and an empty bus.
    pub fn with_memory(memory: GuestRam) -> Self {
        let bus = PciBus::new();
        Self {
            memory,
            machine: Arc::default(),
            ecam: bus.ecam(),
            ports: bus.ports(),
            window: bus.memory_window(WINDOW_BASE),
            bus,
        }
    }

    /// Plugs a device into the lowest free slot.
    pub fn plug(&self, device: Arc<dyn VirtioDevice>) -> (u8, Arc<VirtioPciDevice>) {
        self.plug_reporting(device, Reporter::silent())
    }

    /// Plugs a device that reports to `reporter`.
    pub fn plug_reporting(
        &self,
        device: Arc<dyn VirtioDevice>,
        reporter: Reporter,
    ) -> (u8, Arc<VirtioPciDevice>) {
        let slot = self.bus.free_slot().unwrap();
        let device = VirtioPciDevice::new(
            device,
            self.memory.clone(),
            self.machine.clone(),
            reporter,
            Self::bar_base(slot),
        )
        .unwrap();
        self.bus.plug(slot, device.clone()).unwrap();
        (slot, device)
    }

    /// Takes a device off the bus, as the VMM does.
    pub fn unplug(&self, slot: u8, device: Arc<VirtioPciDevice>) {
        self.bus.unplug(slot).unwrap();
        device.retire();
    }

    /// Where [`TestGuest::plug`] puts the BAR of the device in `slot`.
    pub fn bar_base(slot: u8) -> u64 {
        WINDOW_BASE + u64::from(slot) * VIRTIO_BAR_SIZE
    }

    /// Reads configuration space by ECAM.
    pub fn config_read(&self, slot: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.ecam.read((u64::from(slot) << 15) + offset, data);
    }

    /// Writes configuration space by ECAM.
    pub fn config_write(&self, slot: u8, offset: u64, data: &[u8]) {
        self.ecam.write((u64::from(slot) << 15) + offset, data);
    }

    /// Reads one of the eight ports of mechanism 1, counted from 0xCF8.
    pub fn port_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.ports.read(offset, data);
    }

    /// Writes one of the eight ports of mechanism 1.
    pub fn port_write(&self, offset: u64, data: &[u8]) {
        self.ports.write(offset, data);
    }

    /// Reads memory-mapped registers at a physical address.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = address.checked_sub(WINDOW_BASE) {
            self.window.read(offset, data);
        }
    }

    /// Writes memory-mapped registers at a physical address; a doorbell bound there gets the write
    /// instead of the bus, as KVM has it.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if !self.machine.ring(address)
            && let Some(offset) = address.checked_sub(WINDOW_BASE)
        {
            self.window.write(offset, data);
        }
    }

    /// Writes RAM.
    pub fn poke(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    /// Reads RAM.
    pub fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    /// Reads a little-endian number from RAM.
    pub fn peek_u16(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}
