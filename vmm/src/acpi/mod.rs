//! The ACPI tables (ACPI 6.5 §5.2): a hardware-reduced machine.
//!
//! Hardware-reduced means that there is no fixed event hardware: events come through the Generic
//! Event Device, sleep and reset through registers of their own, and nothing of the 8259 and 8254
//! is needed. The tables follow one another from [`layout::ACPI_TABLES`]:
//!
//! ```text
//! RSDP ──► XSDT ──► FADT ──► DSDT
//!              ├──► MADT
//!              └──► MCFG
//! ```

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use devices::acpi::{RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET};
use devices::guest_memory::GuestRam;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::error::Error;
use crate::layout;

const OEM_ID: [u8; 6] = *b"BALLST";
const OEM_TABLE_ID: [u8; 8] = *b"BALLAST ";
const OEM_REVISION: u32 = 1;

/// FADT boot architecture flags (ACPI 6.5 table 5.10).
mod boot_flags {
    /// There are devices on an ISA bus: the serial port.
    pub(super) const LEGACY_DEVICES: u16 = 1 << 0;
    /// Do not probe for VGA. That there is no 8042 is said by leaving its bit (1) clear: ours is a
    /// reset line and nothing more, and a guest that probes it waits for keyboards in vain.
    pub(super) const VGA_NOT_PRESENT: u16 = 1 << 2;
}

/// What the tables say about this particular machine.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// The local APIC id of each vCPU, by vCPU index.
    pub apic_ids: &'a [u8],
    /// Whether COM1 is there.
    pub serial: bool,
}

/// Writes the tables into guest memory and says where the RSDP is. Called on the VMM thread for
/// each boot.
pub fn write_tables(ram: &GuestRam, machine: &Machine<'_>) -> Result<GuestAddress, Error> {
    let mut area = Area {
        ram,
        next: layout::ACPI_TABLES,
    };
    // The RSDP comes first, where it is looked for, but must know where the XSDT is.
    let rsdp = area.reserve(Rsdp::len())?;
    let dsdt = area.write(&dsdt::dsdt(machine))?;
    let tables = [
        area.write(&serialized(&fadt(dsdt)))?,
        area.write(&serialized(&madt(machine)))?,
        area.write(&serialized(&mcfg()))?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table.raw_value());
    }
    let xsdt = area.write(&serialized(&xsdt))?;
    area.put(&serialized(&Rsdp::new(OEM_ID, xsdt.raw_value())), rsdp)?;
    Ok(rsdp)
}

fn serialized(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The part of guest memory that is for the tables, filled from its start.
struct Area<'a> {
    ram: &'a GuestRam,
    next: GuestAddress,
}

impl Area<'_> {
    /// Tables begin at addresses divisible by this; the RSDP must at 16.
    const ALIGNMENT: u64 = 64;

    fn reserve(&mut self, len: usize) -> Result<GuestAddress, Error> {
        let address = self.next;
        let end = address
            .checked_add(len as u64)
            .and_then(|end| end.checked_align_up(Self::ALIGNMENT))
            .filter(|end| *end <= layout::SMBIOS)
            .ok_or_else(|| Error::host("writing ACPI tables", "they are too long"))?;
        self.next = end;
        Ok(address)
    }

    fn write(&mut self, table: &[u8]) -> Result<GuestAddress, Error> {
        let address = self.reserve(table.len())?;
        self.put(table, address)?;
        Ok(address)
    }

    fn put(&self, table: &[u8], address: GuestAddress) -> Result<(), Error> {
        self.ram
            .write_slice(table, address)
            .map_err(|e| Error::host("writing ACPI tables", e))
    }
}

fn io_register(port: u64, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port)
}

fn fadt(dsdt: GuestAddress) -> acpi_tables::fadt::FADT {
    let sleep_register =
        |offset| io_register(layout::ACPI_SLEEP_PORT + offset, 8, AccessSize::ByteAccess);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.raw_value())
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::TmrValExt)
        .flag(Flags::Wbinvd)
        // Buttons, where there are any, are devices in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (boot_flags::LEGACY_DEVICES | boot_flags::VGA_NOT_PRESENT).into();
    fadt.pm_tmr_blk = (layout::PM_TIMER_PORT as u32).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = io_register(layout::PM_TIMER_PORT, 32, AccessSize::DwordAccess);
    fadt.reset_reg = sleep_register(RESET_OFFSET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = sleep_register(SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = sleep_register(SLEEP_STATUS_OFFSET);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(machine: &Machine<'_>) -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for (uid, apic_id) in machine.apic_ids.iter().enumerate() {
        madt.add_structure(ProcessorLocalApic::new(
            uid as u8,
            *apic_id,
            EnabledStatus::Enabled,
        ));
    }
    // ISA interrupts keep their numbers, edge and active high, which is what no override means.
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::config::MAX_VCPUS;

    fn ram() -> GuestRam {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap())
    }

    fn bytes(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn u32_at(table: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(table[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(table: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
    }

    fn assert_sums_to_zero(bytes: &[u8]) {
        assert_eq!(bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
    }

    /// Reads a table as a guest does: its length from its header, its checksum over all.
    fn table(ram: &GuestRam, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let len = u32_at(&bytes(ram, address, 8), 4) as usize;
        let table = bytes(ram, address, len);
        assert_eq!(&table[..4], signature);
        assert_sums_to_zero(&table);
        assert!(address + len as u64 <= layout::SMBIOS.raw_value());
        table
    }

    /// FADT, DSDT, MADT and MCFG, found from the RSDP.
    fn tables(apic_ids: &[u8], serial: bool) -> [Vec<u8>; 4] {
        let ram = ram();
        let machine = Machine { apic_ids, serial };
        let rsdp_address = write_tables(&ram, &machine).unwrap().raw_value();
        assert!(rsdp_address.is_multiple_of(16));
        assert!((0xe0000..0x100000).contains(&rsdp_address));
        let rsdp = bytes(&ram, rsdp_address, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(rsdp[15], 2);
        assert_sums_to_zero(&rsdp[..20]);
        assert_sums_to_zero(&rsdp);
        let xsdt = table(&ram, u64_at(&rsdp, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 3 * 8);
        let fadt = table(&ram, u64_at(&xsdt, 36), b"FACP");
        let madt = table(&ram, u64_at(&xsdt, 44), b"APIC");
        let mcfg = table(&ram, u64_at(&xsdt, 52), b"MCFG");
        let dsdt = table(&ram, u64_at(&fadt, 140), b"DSDT");
        [fadt, dsdt, madt, mcfg]
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_with_a_right_checksum_and_length() {
        for count in [1, 2, 64] {
            let ids: Vec<u8> = (0..count).collect();
            tables(&ids, true);
            tables(&ids, false);
        }
    }

    #[test]
    fn the_fadt_says_where_to_sleep_reset_and_count() {
        let [fadt, ..] = tables(&[0], true);
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        let flags = u32_at(&fadt, 112);
        assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
        assert_ne!(flags & 1 << 10, 0, "has a reset register");
        for (offset, port) in [(116, 0x602), (208, 0x608), (244, 0x600), (256, 0x601)] {
            assert_eq!((fadt[offset], u64_at(&fadt, offset + 4)), (1, port));
        }
        assert_eq!(fadt[128], RESET_VALUE);
        assert_eq!(fadt[109] & 0b110, 0b100, "neither 8042 nor VGA");
    }

    #[test]
    fn the_madt_lists_every_vcpu_with_its_apic_id_and_the_ioapic() {
        let ids = [0, 1, 4, 5];
        let [_, _, madt, _] = tables(&ids, true);
        assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
        for (index, id) in ids.iter().enumerate() {
            let entry = &madt[44 + 8 * index..][..8];
            assert_eq!(entry, [0, 8, index as u8, *id, 1, 0, 0, 0]);
        }
        let ioapic = &madt[44 + 8 * ids.len()..];
        assert_eq!((ioapic.len(), ioapic[0]), (12, 1));
        assert_eq!((u32_at(ioapic, 4), u32_at(ioapic, 8)), (0xfec0_0000, 0));
    }

    #[test]
    fn the_mcfg_covers_bus_0_and_no_more() {
        let [.., mcfg] = tables(&[0], true);
        assert_eq!(u64_at(&mcfg, 44), layout::ECAM);
        assert_eq!(mcfg[54..56], [0, 0]);
        assert_eq!(layout::ECAM_SIZE, 1 << 20);
    }

    #[test]
    fn the_dsdt_has_com1_only_when_the_machine_has() {
        let has_com1 = |serial| tables(&[0], serial)[1].windows(4).any(|w| w == b"COM1");
        assert!(has_com1(true));
        assert!(!has_com1(false));
    }

    /// The disassembler of ACPICA reads the DSDT and its compiler takes what it reads, without a
    /// warning. Says so and passes where acpica-tools are not installed.
    #[test]
    fn acpica_disassembles_the_dsdt_and_compiles_it_again() {
        use std::process::Command;
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("SKIPPED: iasl (acpica-tools) is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<u8> = (0..MAX_VCPUS as u8).collect();
        std::fs::write(dir.path().join("dsdt.aml"), &tables(&ids, true)[1]).unwrap();
        for arguments in [&["-d", "dsdt.aml"][..], &["-we", "dsdt.dsl"]] {
            let output = Command::new("iasl")
                .args(arguments)
                .current_dir(dir.path())
                .output()
                .unwrap();
            let said =
                String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {said}");
            if let Some(keep) = std::env::var_os("BALLAST_KEEP_DSL") {
                std::fs::copy(dir.path().join("dsdt.dsl"), keep).unwrap();
                eprintln!("{said}");
            }
        }
    }

    #[test]
    fn memory_too_small_for_the_tables_is_an_error() {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        let machine = Machine {
            apic_ids: &[0],
            serial: true,
        };
        assert!(write_tables(&ram, &machine).is_err());
    }
}
