//! The memory map that the guest is told: as e820 entries by the Linux boot protocol, and the same
//! numbers by PVH.

use devices::guest_memory::GuestRam;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{
    ACPI_TABLES, ECAM, ECAM_SIZE, HIGH_RAM, HOLE_END, KVM_IDENTITY_MAP, KVM_TSS, LOW_RAM_END,
};

/// What may be done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Use it.
    Ram = 1,
    /// Leave it alone.
    Reserved = 2,
}

/// A range of physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) kind: Kind,
}

fn range(base: u64, end: u64, kind: Kind) -> Range {
    Range {
        base,
        len: end.saturating_sub(base),
        kind,
    }
}

/// The map of a machine with this RAM, in ascending order.
pub(super) fn memory_map(ram: &GuestRam) -> Vec<Range> {
    let low_end = low_end(ram);
    let mut map = vec![
        range(0, LOW_RAM_END, Kind::Ram),
        // ACPI and SMBIOS tables, where a PC has its firmware.
        range(ACPI_TABLES.0, HIGH_RAM.0, Kind::Reserved),
        range(HIGH_RAM.0, low_end, Kind::Ram),
        // Linux uses ECAM only where the memory map reserves it.
        range(ECAM, ECAM + ECAM_SIZE, Kind::Reserved),
        range(KVM_IDENTITY_MAP, KVM_TSS + 3 * 4096, Kind::Reserved),
    ];
    for region in ram.iter().filter(|r| r.start_addr().0 >= HOLE_END) {
        let base = region.start_addr().0;
        map.push(range(base, base + region.len(), Kind::Ram));
    }
    map
}

/// Where RAM below the hole ends.
pub(super) fn low_end(ram: &GuestRam) -> u64 {
    ram.iter()
        .find(|region| region.start_addr().0 == 0)
        .map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn the_map_lists_all_ram_but_the_tables_and_no_range_twice() {
        for size in [16u64 << 20, 3 << 30, 5 << 30] {
            let ram: GuestRam =
                Arc::new(GuestMemoryMmap::from_ranges(&crate::memory::ranges(size)).unwrap());
            let map = memory_map(&ram);
            assert!(
                map.windows(2).all(|w| w[0].base + w[0].len <= w[1].base),
                "{map:x?}"
            );
            let usable: u64 = map
                .iter()
                .filter(|r| r.kind == Kind::Ram)
                .map(|r| {
                    assert!(ram.address_in_range(GuestAddress(r.base)));
                    r.len
                })
                .sum();
            assert_eq!(usable, size - (HIGH_RAM.0 - LOW_RAM_END));
        }
    }
}
