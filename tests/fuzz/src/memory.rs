//! Guest memory between two guards, so that a write beside it does not go unseen, whether the
//! process made it or the kernel on its behalf.
#![expect(
    unsafe_code,
    reason = "guest memory is made out of the middle of a mapping"
)]

use std::sync::Arc;

use devices::guest_memory::GuestRam;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileMemory,
};

const GUARD: usize = 64 << 10;
const CANARY: u8 = 0xa5;

/// RAM from address 0.
pub struct Memory {
    /// As devices see it.
    pub ram: GuestRam,
    len: usize,
    whole: &'static MmapRegion,
}

impl Memory {
    /// `len` bytes of RAM, a multiple of the page size, that are never given back.
    pub fn new(len: usize) -> Self {
        let whole = MmapRegion::<()>::new(len + 2 * GUARD).expect("map memory");
        let whole = Box::leak(Box::new(whole));
        // SAFETY: the range lies within `whole`, is page-aligned, has this protection and these
        // flags, and is never unmapped, because `whole` is leaked.
        let middle = unsafe {
            let start = whole.as_ptr().add(GUARD);
            MmapRegion::<()>::build_raw(start, len, whole.prot(), whole.flags())
        };
        let region = GuestRegionMmap::new(middle.expect("aligned"), GuestAddress(0));
        let ram = GuestMemoryMmap::from_regions(vec![region.expect("no overflow")]);
        let memory = Self {
            ram: Arc::new(ram.expect("one region")),
            len,
            whole,
        };
        for guard in memory.guards() {
            let slice = memory.whole.get_slice(guard, GUARD).expect("within");
            slice.write_slice(&[CANARY; GUARD], 0).expect("within");
        }
        memory
    }

    fn guards(&self) -> [usize; 2] {
        [0, GUARD + self.len]
    }

    /// All zeroes again.
    pub fn clear(&self) {
        const ZEROES: &[u8] = &[0; 64 << 10];
        for at in (0..self.len).step_by(ZEROES.len()) {
            let part = &ZEROES[..ZEROES.len().min(self.len - at)];
            let address = GuestAddress(at as u64);
            self.ram.write_slice(part, address).expect("within");
        }
    }

    /// Panics where something was written beside guest memory.
    pub fn assert_guards_untouched(&self) {
        for guard in self.guards() {
            let mut bytes = [0; GUARD];
            let slice = self.whole.get_slice(guard, GUARD).expect("within");
            slice.read_slice(&mut bytes, 0).expect("within");
            assert!(
                bytes.iter().all(|byte| *byte == CANARY),
                "a write beside guest memory"
            );
        }
    }
}
