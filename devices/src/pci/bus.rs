//! The PCI bus: 32 slots on bus 0 of segment 0, one function each, and the three ways a guest
//! reaches them.
//!
//! - configuration space by ECAM (PCI Express Base Specification §7.2.2): bus, device, function
//!   and register are bits of the offset;
//! - configuration space by mechanism 1 (PCI Local Bus Specification 3.0 §3.2.2.3.2): an address
//!   register at port 0xCF8 and four bytes of data at 0xCFC;
//! - the memory window in which BARs lie. Each device is asked whether the address is one of its
//!   own, so a BAR that the guest moves needs no re-mapping.
//!
//! What is not there reads as ones. The lock is held while a slot is looked up and never while a
//! device works, so a device may be unplugged while another vCPU is still inside it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use thiserror::Error;

use super::config::{ConfigSpace, Identity};
use super::{BarInfo, PciDevice};
use crate::bus::BusDevice;

/// Slots on the bus; slot 0 holds the host bridge.
pub const SLOTS: u8 = 32;
/// Bytes of the ECAM region of one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// Ports of mechanism 1, from 0xCF8.
pub const PORTS: u64 = 8;
const FUNCTION_SIZE: usize = 4096;

/// A device can't be plugged into the slot asked for.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SlotError {
    /// Slots are numbered 0 to 31.
    #[error("there is no PCI slot {0}")]
    NoSuchSlot(u8),
    /// There is a device in it.
    #[error("PCI slot {0} is taken")]
    Taken(u8),
}

/// The bus. The VMM thread plugs and unplugs, vCPU threads look up.
pub struct PciBus {
    slots: RwLock<Slots>,
}

type Slots = [Option<Arc<dyn PciDevice>>; SLOTS as usize];

impl PciBus {
    /// A bus with nothing but the host bridge in slot 0.
    pub fn new() -> Arc<Self> {
        let mut slots = Slots::default();
        slots[0] = Some(Arc::new(HostBridge::new()));
        Arc::new(Self {
            slots: RwLock::new(slots),
        })
    }

    /// Puts `device` into `slot`; the guest sees it from now on.
    pub fn plug(&self, slot: u8, device: Arc<dyn PciDevice>) -> Result<(), SlotError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        match slots.get_mut(usize::from(slot)) {
            None => Err(SlotError::NoSuchSlot(slot)),
            Some(Some(_)) => Err(SlotError::Taken(slot)),
            Some(place) => {
                *place = Some(device);
                Ok(())
            }
        }
    }

    /// Takes the device out of `slot`, if there is one. A vCPU that is just inside it may hold it
    /// a moment longer.
    pub fn unplug(&self, slot: u8) -> Option<Arc<dyn PciDevice>> {
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(usize::from(slot))?
            .take()
    }

    /// The lowest free slot.
    pub fn free_slot(&self) -> Option<u8> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let free = slots.iter().position(Option::is_none)?;
        u8::try_from(free).ok()
    }

    /// The device in `slot`.
    pub fn find(&self, slot: u8) -> Option<Arc<dyn PciDevice>> {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(usize::from(slot))?
            .clone()
    }

    /// The face to map at the ECAM base, [`ECAM_SIZE`] bytes.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(self.clone()))
    }

    /// The face to map at port 0xCF8, [`PORTS`] ports.
    pub fn ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ports {
            bus: self.clone(),
            address: AtomicU32::new(0),
        })
    }

    /// The face to map at `base`, over all of the window that BARs may lie in.
    pub fn memory_window(self: &Arc<Self>, base: u64) -> Arc<dyn BusDevice> {
        Arc::new(MemoryWindow {
            bus: self.clone(),
            base,
        })
    }

    fn read_config(&self, slot: u8, register: usize, data: &mut [u8]) {
        let fits = register
            .checked_add(data.len())
            .is_some_and(|end| end <= FUNCTION_SIZE);
        if let Some(device) = self.find(slot).filter(|_| fits) {
            data.fill(0);
            device.read_config(register, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write_config(&self, slot: u8, register: usize, data: &[u8]) {
        let fits = register
            .checked_add(data.len())
            .is_some_and(|end| end <= FUNCTION_SIZE);
        if let Some(device) = self.find(slot).filter(|_| fits) {
            device.write_config(register, data);
        }
    }
}

struct Ecam(Arc<PciBus>);

impl Ecam {
    /// Slot and register at an offset; other buses and functions are absent.
    fn decode(offset: u64) -> Option<(u8, usize)> {
        let function = offset >> 12;
        (offset < ECAM_SIZE && function & 7 == 0)
            .then_some(((function >> 3) as u8, (offset & 0xfff) as usize))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::decode(offset) {
            Some((slot, register)) => self.0.read_config(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = Self::decode(offset) {
            self.0.write_config(slot, register, data);
        }
    }
}

struct Ports {
    bus: Arc<PciBus>,
    address: AtomicU32,
}

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Reserved bits and the two lowest ones read as zeroes.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

impl Ports {
    /// Slot and register that an access of `len` bytes to the ports at `offset` means. Any width
    /// within the four data ports has a meaning; an access across their edges has none.
    fn decode(&self, offset: u64, len: usize) -> Option<(u8, usize)> {
        let byte = offset.checked_sub(4).filter(|byte| *byte < 4)? as usize;
        if len == 0 || byte + len > 4 {
            return None;
        }
        let address = self.address.load(Ordering::Relaxed);
        let bus_and_function = address & 0x00ff_0700;
        if address & ADDRESS_ENABLE == 0 || bus_and_function != 0 {
            return None;
        }
        let slot = (address >> 11) & 0x1f;
        Some((slot as u8, (address & 0xfc) as usize + byte))
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((slot, register)) = self.decode(offset, data.len()) {
            self.bus.read_config(slot, register, data);
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = self.decode(offset, data.len()) {
            self.bus.write_config(slot, register, data);
        } else if offset == 0
            && let Ok(address) = data.try_into()
        {
            // Only a write of all four bytes is one to the address register (§3.2.2.3.2).
            let address = u32::from_le_bytes(address) & ADDRESS_BITS;
            self.address.store(address, Ordering::Relaxed);
        }
    }
}

struct MemoryWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl MemoryWindow {
    fn devices(&self) -> impl Iterator<Item = Arc<dyn PciDevice>> {
        (0..SLOTS).filter_map(|slot| self.bus.find(slot))
    }
}

impl BusDevice for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let found = self
            .base
            .checked_add(offset)
            .is_some_and(|address| self.devices().any(|d| d.read_memory(address, data)));
        if !found {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(address) = self.base.checked_add(offset) {
            // The first device that claims the address gets the write.
            let _ = self.devices().any(|d| d.write_memory(address, data));
        }
    }
}

/// The bridge that a bus needs at its head for guests to believe in it; Intel's "virtual
/// processor to I/O controller", as Cloud Hypervisor shows it.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        })))
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        space.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut space = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        space.write(offset, data);
    }

    fn read_memory(&self, _: u64, _: &mut [u8]) -> bool {
        false
    }

    fn write_memory(&self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn bars(&self) -> Vec<BarInfo> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Configuration space that reads as its own offsets, and a BAR of 16 bytes at 0xc0000100.
    #[derive(Default)]
    struct Fake {
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl PciDevice for Fake {
        fn read_config(&self, offset: usize, data: &mut [u8]) {
            assert!(offset + data.len() <= 4096);
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = (offset + index) as u8;
            }
        }
        fn write_config(&self, offset: usize, data: &[u8]) {
            assert!(offset + data.len() <= 4096);
            let mut written = self.written.lock().unwrap();
            written.push((offset as u64, data.to_vec()));
        }
        fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
            let mine = (0xc000_0100..0xc000_0110).contains(&address);
            if mine {
                data.fill(7);
            }
            mine
        }
        fn write_memory(&self, address: u64, data: &[u8]) -> bool {
            let mine = (0xc000_0100..0xc000_0110).contains(&address);
            if mine {
                self.write_config((address & 0xf) as usize, data);
            }
            mine
        }
        fn bars(&self) -> Vec<BarInfo> {
            Vec::new()
        }
    }

    fn dword(face: &dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        face.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_host_bridge_is_in_slot_0_and_slots_are_given_out_from_1() {
        let bus = PciBus::new();
        assert_eq!(dword(&*bus.ecam(), 0), 0x0d57_8086);
        assert_eq!(dword(&*bus.ecam(), 8), 0x0600_0000);
        for slot in 1..32 {
            assert_eq!(bus.free_slot(), Some(slot));
            bus.plug(slot, Arc::new(Fake::default())).unwrap();
        }
        assert_eq!(bus.free_slot(), None);
        let one_more = Arc::new(Fake::default());
        assert_eq!(bus.plug(5, one_more.clone()), Err(SlotError::Taken(5)));
        assert_eq!(bus.plug(32, one_more), Err(SlotError::NoSuchSlot(32)));
        assert!(bus.unplug(5).is_some() && bus.unplug(5).is_none() && bus.unplug(32).is_none());
        assert_eq!(bus.free_slot(), Some(5));
    }

    #[test]
    fn ecam_finds_slot_and_register_and_absent_functions_read_as_ones() {
        let bus = PciBus::new();
        bus.plug(3, Arc::new(Fake::default())).unwrap();
        let ecam = bus.ecam();
        assert_eq!(dword(&*ecam, 3 << 15 | 0x10), 0x1312_1110);
        assert_eq!(dword(&*ecam, 2 << 15), u32::MAX);
        assert_eq!(dword(&*ecam, 3 << 15 | 1 << 12), u32::MAX, "function 1");
        assert_eq!(dword(&*ecam, 1 << 20 | 3 << 15), u32::MAX, "bus 1");
        assert_eq!(dword(&*ecam, 3 << 15 | 0xffe), u32::MAX, "straddles");
    }

    #[test]
    fn mechanism_1_takes_any_width_within_the_data_ports() {
        let bus = PciBus::new();
        let device = Arc::new(Fake::default());
        bus.plug(3, device.clone()).unwrap();
        let ports = bus.ports();
        assert_eq!(dword(&*ports, 4), u32::MAX, "not enabled");
        ports.write(0, &(1u32 << 31 | 3 << 11 | 0x13).to_le_bytes());
        assert_eq!(dword(&*ports, 0), 1 << 31 | 3 << 11 | 0x10);
        assert_eq!(dword(&*ports, 4), 0x1312_1110);
        let mut word = [0; 2];
        ports.read(6, &mut word);
        assert_eq!(word, [0x12, 0x13]);
        ports.read(7, &mut word);
        assert_eq!(word, [0xff; 2], "past the ports");
        ports.write(3, &[0xff; 1]);
        ports.write(2, &[0xff; 4]);
        ports.write(5, &[1, 2]);
        assert_eq!(*device.written.lock().unwrap(), [(0x11, vec![1, 2])]);
        for absent in [1u32 << 16, 1 << 8, 1 << 11] {
            ports.write(0, &((1 << 31 | 3 << 11) ^ absent).to_le_bytes());
            assert_eq!(dword(&*ports, 4), u32::MAX);
        }
    }

    #[test]
    fn the_memory_window_asks_the_devices_and_reads_as_ones_where_none_answers() {
        let bus = PciBus::new();
        let device = Arc::new(Fake::default());
        bus.plug(3, device.clone()).unwrap();
        let window = bus.memory_window(0xc000_0000);
        assert_eq!(dword(&*window, 0x104), 0x0707_0707);
        assert_eq!(dword(&*window, 0x200), u32::MAX);
        window.write(0x104, &[5]);
        window.write(0x300, &[6]);
        window.write(u64::MAX, &[6]);
        assert_eq!(*device.written.lock().unwrap(), [(4, vec![5])]);
    }

    proptest! {
        #[test]
        fn accesses_of_any_width_and_offset_reach_only_registers_that_exist(
            accesses in proptest::collection::vec(
                (0u8..3, prop_oneof![0u64..16, 0u64..1 << 21, any::<u64>()],
                 proptest::collection::vec(any::<u8>(), 0..17), any::<bool>()), 1..60),
        ) {
            let bus = PciBus::new();
            bus.plug(1, Arc::new(Fake::default())).unwrap();
            let faces = [bus.ecam(), bus.ports(), bus.memory_window(0xc000_0000)];
            for (face, offset, mut data, write) in accesses {
                let face = &faces[usize::from(face)];
                if write { face.write(offset, &data) } else { face.read(offset, &mut data) }
            }
        }
    }
}
