//! Address decoding: which device answers a guest access to an I/O port or a physical address.
//!
//! One [`Bus`] serves port I/O, another memory-mapped I/O. vCPU threads look up, the VMM thread
//! plugs and unplugs; the lock is held only while the map is read, never while a device works.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

/// A device that answers reads and writes at an offset from where it is mapped.
///
/// Called on vCPU threads. Offsets, lengths and values come from the guest: implementations must
/// not panic, block or do I/O.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the registers at `offset` hold; `data` arrives filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a write of `data` to the registers at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same addresses, or a range is empty or runs past the end.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the bus range {base:#x}+{len:#x} is empty, too long, or overlaps another device")]
pub struct RangeConflict {
    /// First address of the refused range.
    pub base: u64,
    /// Its length in bytes.
    pub len: u64,
}

struct Mapping {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space (port I/O or memory-mapped I/O) and the devices in it.
#[derive(Default)]
pub struct Bus {
    mappings: RwLock<BTreeMap<u64, Mapping>>,
}

impl Bus {
    /// Maps `device` at `base..base + len`.
    pub fn insert(
        &self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeConflict> {
        let conflict = RangeConflict { base, len };
        if len == 0 {
            return Err(conflict);
        }
        let Some(last) = base.checked_add(len - 1) else {
            return Err(conflict);
        };
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((other, mapping)) = mappings.range(..=last).next_back()
            && other + (mapping.len - 1) >= base
        {
            return Err(conflict);
        }
        mappings.insert(base, Mapping { len, device });
        Ok(())
    }

    /// Takes away the device mapped at exactly `base`; `false` where there is none.
    pub fn remove(&self, base: u64) -> bool {
        self.mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    /// A guest read: unclaimed addresses read as ones, as an empty bus does.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// A guest write: unclaimed addresses swallow it.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let (base, mapping) = mappings.range(..=address).next_back()?;
        let offset = address - base;
        let fits = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= mapping.len);
        fits.then(|| (mapping.device.clone(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);
    impl BusDevice for Constant {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn read_byte(bus: &Bus, address: u64) -> u8 {
        let mut byte = [0];
        bus.read(address, &mut byte);
        byte[0]
    }

    #[test]
    fn an_access_reaches_the_device_that_covers_it_and_nothing_else() {
        let bus = Bus::default();
        bus.insert(0x10, 0x10, Arc::new(Constant(1))).unwrap();
        bus.insert(0x20, 1, Arc::new(Constant(2))).unwrap();
        assert_eq!(read_byte(&bus, 0xf), 0xff);
        assert_eq!(read_byte(&bus, 0x10), 1);
        assert_eq!(read_byte(&bus, 0x1f), 1);
        assert_eq!(read_byte(&bus, 0x20), 2);
        assert_eq!(read_byte(&bus, 0x21), 0xff);
    }

    #[test]
    fn an_access_that_straddles_the_end_of_a_device_reads_as_ones() {
        let bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Constant(1))).unwrap();
        let mut data = [0; 4];
        bus.read(0x12, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let bus = Bus::default();
        bus.insert(0x10, 0x10, Arc::new(Constant(1))).unwrap();
        for (base, len) in [(0x10, 1), (0x1f, 8), (0x8, 0x9), (0, 0x100), (0x30, 0)] {
            assert!(bus.insert(base, len, Arc::new(Constant(2))).is_err());
        }
        assert!(bus.insert(u64::MAX, 2, Arc::new(Constant(2))).is_err());
        assert!(bus.remove(0x10));
        assert!(!bus.remove(0x10));
        bus.insert(0, 0x100, Arc::new(Constant(2))).unwrap();
    }
}
