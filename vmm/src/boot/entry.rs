//! The state of the boot CPU at its first instruction, by the protocol the kernel is entered with:
//!
//! - PVH (Xen, docs/misc/pvh.pandoc): 32-bit protected mode without paging, EBX at the start info.
//! - Linux 64-bit (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): long mode, the low
//!   4 GiB mapped onto themselves, RSI at the zero page, code segment 0x10, data segments 0x18.

use devices::guest_memory::GuestRam;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::error::Error;
use crate::layout::{BOOT_GDT, BOOT_INFO, BOOT_STACK, PAGE_TABLES};

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PVH, for ELF kernels and firmwares.
    Pvh,
    /// The Linux 64-bit boot protocol, for bzImages.
    Linux64,
}

/// Where and how the boot CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How.
    pub protocol: Protocol,
    /// Where.
    pub address: GuestAddress,
}

const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;

/// The GDT: two null entries, code, data, and a task state segment (16 bytes in long mode).
fn gdt(protocol: Protocol) -> [u64; 6] {
    let code = match protocol {
        Protocol::Pvh => 0x00cf_9b00_0000_ffff,
        Protocol::Linux64 => 0x00af_9b00_0000_ffff,
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0]
}

/// A segment register as the CPU would load it from the GDT (Intel SDM vol. 3, §3.4.5). All
/// bases are zero.
fn segment(gdt: &[u64; 6], index: u16) -> kvm_segment {
    let descriptor = gdt[usize::from(index)];
    let bits = |shift: u32, count: u32| (descriptor >> shift & ((1 << count) - 1)) as u32;
    let limit = bits(0, 16) | bits(48, 4) << 16;
    let granular = bits(55, 1) != 0;
    kvm_segment {
        base: 0,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector: index * 8,
        type_: bits(40, 4) as u8,
        s: bits(44, 1) as u8,
        dpl: bits(45, 2) as u8,
        present: bits(47, 1) as u8,
        avl: bits(52, 1) as u8,
        l: bits(53, 1) as u8,
        db: bits(54, 1) as u8,
        g: bits(55, 1) as u8,
        ..Default::default()
    }
}

/// Writes the tables that the registers point to.
pub(super) fn write_tables(ram: &GuestRam, protocol: Protocol) -> Result<(), Error> {
    let put = |at: GuestAddress, table: &[u64]| {
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        ram.write_slice(&bytes, at)
            .map_err(|error| Error::host("writing boot tables to guest memory", error))
    };
    put(BOOT_GDT, &gdt(protocol))?;
    if protocol == Protocol::Pvh {
        return Ok(());
    }
    // One PML4, one page directory pointer table, four page directories of 2 MiB pages.
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let page = |index: u64| PAGE_TABLES.unchecked_add(index * 4096);
    put(page(0), &[page(1).0 | PRESENT_WRITABLE])?;
    let directories: Vec<u64> = (2..6).map(|i| page(i).0 | PRESENT_WRITABLE).collect();
    put(page(1), &directories)?;
    let pages: Vec<u64> = (0..4 * 512)
        .map(|i| i << 21 | PRESENT_WRITABLE | LARGE)
        .collect();
    put(page(2), &pages)
}

/// General registers at the entry.
pub(crate) fn registers(entry: &Entry) -> kvm_regs {
    let start = kvm_regs {
        rip: entry.address.0,
        // Bit 1 is always set; interrupts are off.
        rflags: 2,
        ..Default::default()
    };
    match entry.protocol {
        Protocol::Pvh => kvm_regs {
            rbx: BOOT_INFO.0,
            ..start
        },
        Protocol::Linux64 => kvm_regs {
            rsi: BOOT_INFO.0,
            rsp: BOOT_STACK.0,
            rbp: BOOT_STACK.0,
            ..start
        },
    }
}

/// Special registers at the entry; `sregs` as KVM has reset them.
pub(crate) fn special_registers(sregs: &mut kvm_sregs, entry: &Entry) {
    const PE: u64 = 1;
    const ET: u64 = 1 << 4;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    let gdt = gdt(entry.protocol);
    sregs.cs = segment(&gdt, CODE);
    let data = segment(&gdt, DATA);
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = segment(&gdt, TASK);
    sregs.gdt = kvm_dtable {
        base: BOOT_GDT.0,
        limit: size_of_val(&gdt) as u16 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    match entry.protocol {
        Protocol::Pvh => {
            sregs.cr0 = PE | ET;
            sregs.cr4 = 0;
        }
        Protocol::Linux64 => {
            sregs.cr0 = PE | ET | PG;
            sregs.cr3 = PAGE_TABLES.0;
            sregs.cr4 = PAE;
            sregs.efer = LME | LMA;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pvh_segments_are_flat_and_32_bits_wide() {
        let entry = Entry {
            protocol: Protocol::Pvh,
            address: GuestAddress(0x10_0000),
        };
        let mut sregs = kvm_sregs::default();
        special_registers(&mut sregs, &entry);
        assert_eq!((sregs.cs.limit, sregs.cs.db, sregs.cs.l), (u32::MAX, 1, 0));
        assert_eq!((sregs.cs.selector, sregs.ss.selector), (0x10, 0x18));
        assert_eq!((sregs.ds.limit, sregs.ds.type_), (u32::MAX, 3));
        assert_eq!((sregs.tr.limit, sregs.tr.type_, sregs.tr.s), (0x67, 0xb, 0));
        assert_eq!(sregs.cr0 & 1 << 31, 0);
        assert_eq!(registers(&entry).rbx, BOOT_INFO.0);
    }

    #[test]
    fn linux_starts_in_long_mode_with_low_memory_mapped_onto_itself() {
        let ram: GuestRam = std::sync::Arc::new(
            vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap(),
        );
        write_tables(&ram, Protocol::Linux64).unwrap();
        let read = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0u64, 0x10_0000, 0xe_0000, 0xffe0_0000] {
            let pointers = read(PAGE_TABLES.0) & !0xfff;
            let directory = read(pointers + (address >> 30) * 8) & !0xfff;
            let page = read(directory + (address >> 21 & 511) * 8);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(page & 0x83, 0x83);
        }
        const { assert!(PAGE_TABLES.0 + 6 * 4096 <= crate::layout::CMDLINE.0) };
        let entry = Entry {
            protocol: Protocol::Linux64,
            address: GuestAddress(0x10_0200),
        };
        let mut sregs = kvm_sregs::default();
        special_registers(&mut sregs, &entry);
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_eq!(registers(&entry).rsi, BOOT_INFO.0);
    }
}
