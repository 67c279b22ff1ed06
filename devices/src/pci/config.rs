//! A PCI device's configuration space: a type 0 header with write masks, memory BARs and a chain
//! of capabilities (PCI Local Bus Specification 3.0 §6.1, §6.2, §6.7).
//!
//! ```text
//! 00 vendor, device     04 command, status      08 revision, class    0c cache line … header type
//! 10 … 24 BARs          2c subsystem ids        34 → first capability 3c interrupt line, pin
//! 40 … ff capabilities, chained in the order they were added
//! ```
//!
//! Every register is a few bytes of an image with a write mask of the same shape, so an access of
//! any width at any offset has a meaning and none needs a case of its own. A BAR is sized as the
//! specification says, by the mask: its low bits don't take the ones that the driver writes.
//!
//! There is no INTx (the interrupt pin register is 0), no I/O space and no extended configuration
//! space: bytes from 256 to 4095 read as zeroes, which says that there are no extended
//! capabilities.

use thiserror::Error;

use super::{BarInfo, BarType};

/// Bytes of configuration space that have registers in them.
pub const SIZE: usize = 256;
/// The command register.
pub const COMMAND: usize = 0x04;
/// The status register.
pub const STATUS: usize = 0x06;
/// Command bit: answer accesses to the memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command bit: issue memory writes. Kept for the driver, not enforced: an interrupt or a transfer
/// that a driver set up is carried out whether or not it thought of this bit, as in other VMMs.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command bit: don't assert INTx, which this device never does.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status bit: an INTx interrupt is pending.
pub const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

const CACHE_LINE_SIZE: usize = 0x0c;
const BAR: usize = 0x10;
const BARS: usize = 6;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// What a device says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as in 0x060000.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// A BAR or capability that does not fit; a mistake of the device's author, or an address from
/// outside that is no good.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// There are six BARs, each to be used once.
    #[error("BAR {0} does not exist or is taken")]
    NoSuchBar(usize),
    /// BARs are powers of two from 16 bytes, at multiples of their size, below 4 GiB.
    #[error("a BAR of {size:#x} bytes can't lie at {base:#x}")]
    BadBar {
        /// Where it should have been.
        base: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The capabilities don't fit into 192 bytes.
    #[error("no room for capability {0:#x}")]
    NoRoom(u8),
}

/// A configuration space. Its owner locks it; vCPU threads read and write.
pub struct ConfigSpace {
    image: [u8; SIZE],
    writable: [u8; SIZE],
    bar_sizes: [Option<u32>; BARS],
    /// Where the pointer to the next capability goes.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    /// A header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            image: [0; SIZE],
            writable: [0; SIZE],
            bar_sizes: [None; BARS],
            link: CAPABILITY_POINTER,
            free: FIRST_CAPABILITY,
        };
        let [class_low, class_middle, class_high, _] = identity.class.to_le_bytes();
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(
            0x08,
            &[identity.revision, class_low, class_middle, class_high],
        );
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        space.writable[CACHE_LINE_SIZE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Adds a 32-bit memory BAR, not prefetchable (its reads may have effects), placed at `base`
    /// until the guest moves it.
    pub fn add_memory_bar(
        &mut self,
        index: usize,
        base: u64,
        size: u32,
    ) -> Result<(), LayoutError> {
        match self.bar_sizes.get(index) {
            Some(None) => {}
            _ => return Err(LayoutError::NoSuchBar(index)),
        }
        let misplaced = LayoutError::BadBar {
            base,
            size: size.into(),
        };
        if size < 16 || !size.is_power_of_two() || base & u64::from(size - 1) != 0 {
            return Err(misplaced);
        }
        let base = u32::try_from(base).map_err(|_| misplaced)?;
        let at = BAR + 4 * index;
        self.put(at, &base.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.bar_sizes[index] = Some(size);
        Ok(())
    }

    /// Appends a capability: `id`, the pointer to the next, then `body`, of which the bits set in
    /// `writable` (counted from the start of the body; shorter is allowed) can be written. Returns
    /// the offset of the capability.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<usize, LayoutError> {
        let at = self.free;
        let end = at + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return Err(LayoutError::NoRoom(id));
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.image[STATUS] |= STATUS_CAPABILITIES;
        self.image[self.link] = at as u8;
        self.link = at + 1;
        self.free = end.next_multiple_of(4);
        Ok(at)
    }

    /// A guest read; bytes without registers read as zeroes.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = offset
                .checked_add(index)
                .and_then(|at| self.image.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    /// A guest write; bits that are not writable stay as they are.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let registers = self.image.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), value) in registers.zip(data) {
            *byte = (*byte & !mask) | (value & mask);
        }
    }

    /// The device changes a register itself, whatever its mask; bytes past the end are dropped.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.image.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    /// Whether the guest has the memory BARs switched on.
    pub fn memory_enabled(&self) -> bool {
        u16::from_le_bytes([self.image[COMMAND], self.image[COMMAND + 1]]) & COMMAND_MEMORY != 0
    }

    /// The address that a BAR holds, whether or not it is switched on.
    pub fn bar(&self, index: usize) -> Option<u64> {
        let size = self.bar_sizes.get(index).copied().flatten()?;
        let mut value = [0; 4];
        self.read(BAR + 4 * index, &mut value);
        Some((u32::from_le_bytes(value) & !(size - 1)).into())
    }

    /// The address at which a BAR answers: `None` while the guest has memory decoding off.
    pub fn decoded_bar(&self, index: usize) -> Option<u64> {
        self.bar(index).filter(|_| self.memory_enabled())
    }

    /// All BARs as they are placed now.
    pub fn bars(&self) -> Vec<BarInfo> {
        self.bar_sizes
            .iter()
            .enumerate()
            .filter_map(|(index, size)| {
                Some(BarInfo {
                    index: index as u32,
                    base: self.bar(index)?,
                    size: (*size)?.into(),
                    type_: BarType::Mmio32,
                    prefetchable: false,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1042,
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_memory_bar(0, 0xc000_0000, 0x1_0000).unwrap();
        space
    }

    fn dword(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_names_the_device_and_its_class() {
        let space = space();
        assert_eq!(dword(&space, 0), 0x1042_1af4);
        assert_eq!(dword(&space, 8), 0x0180_0001);
        assert_eq!(dword(&space, 0x2c), 0x1042_1af4);
        assert_eq!(dword(&space, 0x0c), 0, "type 0, one function");
    }

    #[test]
    fn identity_registers_ignore_writes() {
        let mut space = space();
        for offset in [0, 8, 0x2c, 0x34] {
            let before = dword(&space, offset);
            space.write(offset, &[0xff; 4]);
            assert_eq!(dword(&space, offset), before);
        }
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones_and_placed_by_writing_an_address() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(dword(&space, 0x10), 0xffff_0000);
        space.write(0x10, &0xd004_1234u32.to_le_bytes());
        assert_eq!(dword(&space, 0x10), 0xd004_0000);
        assert_eq!(space.bars()[0].base, 0xd004_0000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&space, 0x14), 0, "there is no BAR 1");
    }

    #[test]
    fn a_bar_answers_only_while_memory_decoding_is_on() {
        let mut space = space();
        assert_eq!(space.decoded_bar(0), None);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.decoded_bar(0), Some(0xc000_0000));
        assert_eq!(space.decoded_bar(1), None);
        assert_eq!(space.decoded_bar(9), None);
        space.write(COMMAND, &[0]);
        assert_eq!(space.decoded_bar(0), None);
    }

    #[test]
    fn capabilities_are_chained_in_order_and_writable_only_where_they_say() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[0, 0xf0]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(dword(&space, 0x34) & 0xff, 0x40);
        assert_eq!(dword(&space, 0x40), 0x0201_4809);
        assert_eq!(dword(&space, 0x48) & 0xffff, 0x0011);
        assert_eq!(dword(&space, 4) >> 16, 0x10, "status: has capabilities");
        space.write(0x40, &[0xff; 12]);
        assert_eq!(dword(&space, 0x40), 0xf201_4809);
        assert_eq!(
            space.add_capability(9, &[0; 200], &[]),
            Err(LayoutError::NoRoom(9))
        );
    }

    #[test]
    fn bars_that_make_no_sense_are_refused() {
        let mut space = space();
        assert_eq!(
            space.add_memory_bar(0, 0, 16),
            Err(LayoutError::NoSuchBar(0))
        );
        assert_eq!(
            space.add_memory_bar(6, 0, 16),
            Err(LayoutError::NoSuchBar(6))
        );
        for (base, size) in [(0, 8), (0, 48), (16, 32), (1 << 32, 16)] {
            assert!(space.add_memory_bar(1, base, size).is_err());
        }
    }

    proptest! {
        #[test]
        fn accesses_of_any_width_at_any_offset_agree_with_bytewise_ones(
            offset in 0usize..4200, data in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut wide = space();
            wide.add_capability(9, &[0; 18], &[0xff; 18]).unwrap();
            let mut narrow = space();
            narrow.add_capability(9, &[0; 18], &[0xff; 18]).unwrap();
            wide.write(offset, &data);
            for (index, byte) in data.iter().enumerate() {
                narrow.write(offset + index, &[*byte]);
            }
            prop_assert_eq!(wide.image, narrow.image);
            let mut read = vec![0xff; data.len()];
            wide.read(offset, &mut read);
            for (index, byte) in read.iter().enumerate() {
                let mut one = [0xff];
                narrow.read(offset + index, &mut one);
                prop_assert_eq!(one[0], *byte);
            }
        }
    }
}
