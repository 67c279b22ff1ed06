//! Where things lie in the guest's physical address space and I/O ports.
//!
//! ```text
//! 0                RAM (page 0 … 640 KiB: boot structures)
//! 0xA0000          ACPI and SMBIOS tables (0xE0000…)
//! 0x100000         RAM: kernel, initramfs at the end of low RAM
//! 0xC0000000       32-bit PCI window: BARs
//! 0xE8000000       ECAM, one bus (1 MiB)
//! 0xFEC00000       IOAPIC, 0xFEE00000 local APIC, 0xFFFB_D000 KVM's TSS and identity map
//! 0x1_0000_0000    RAM beyond the hole
//! ```

use vm_memory::GuestAddress;

/// Where PVH's start info and bzImage's zero page lie.
pub const BOOT_INFO: GuestAddress = GuestAddress(0x7000);
/// PVH's list of modules: the initramfs.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x7100);
/// PVH's memory map.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7200);
/// Page tables for the 64-bit entry: six pages.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// GDT of the boot vCPU.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// Stack of the 64-bit entry.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// The kernel's command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x20000);
/// Its longest length, terminator included.
pub const CMDLINE_MAX_BYTES: usize = 0x1_0000;
/// End of conventional memory; what is between here and 1 MiB is for tables.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// ACPI tables, RSDP first.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// SMBIOS entry point and tables.
pub const SMBIOS: GuestAddress = GuestAddress(0xf_0000);
/// Where a PC's firmware begins: a guest that jumps there wants to restart.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Where kernels go.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// Start of the hole below 4 GiB; RAM goes on beyond [`HOLE_END`].
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// 32-bit window for BARs.
pub const PCI_WINDOW: u64 = HOLE_START;
/// Its size in bytes.
pub const PCI_WINDOW_SIZE: u64 = ECAM - PCI_WINDOW;
/// PCI Express enhanced configuration access.
pub const ECAM: u64 = 0xe800_0000;
/// Its size: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// IOAPIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// KVM's identity-map page, needed by Intel hosts.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's task state segment (three pages), needed by Intel hosts.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// i8042 keyboard controller.
pub const I8042_PORT: u64 = 0x60;
/// CMOS and real-time clock.
pub const CMOS_PORT: u64 = 0x70;
/// POST code port.
pub const POST_PORT: u64 = 0x80;
/// ACPI sleep control, sleep status and reset registers.
pub const ACPI_SLEEP_PORT: u64 = 0x600;
/// ACPI PM timer.
pub const PM_TIMER_PORT: u64 = 0x608;
/// Generic Event Device: which events are pending.
pub const GED_PORT: u64 = 0x620;
/// Its interrupt.
pub const GED_GSI: u32 = 5;
/// ACPI PCI hotplug registers.
pub const HOTPLUG_PORT: u64 = 0xae00;
/// PCI configuration mechanism 1.
pub const PCI_CONFIG_PORT: u64 = 0xcf8;
/// First interrupt number free for message-signalled interrupts (the IOAPIC has 24 pins).
pub const MSI_GSI_BASE: u32 = 24;
