//! Filling guest memory: the kernel and the initramfs are read from their files right into it,
//! the structures that tell the kernel about its machine are written beside them.

use devices::config::Invalid;
use devices::guest_memory::GuestRam;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, load_cmdline};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::entry::{Entry, Protocol, write_tables};
use super::image::Image;
use super::map::{low_end, memory_map};
use super::payload::Payload;
use crate::error::Error;
use crate::layout::{BOOT_INFO, CMDLINE, HIGH_RAM, PVH_MEMORY_MAP, PVH_MODULES};

/// The 64-bit entry point of a bzImage lies this far behind its start.
const ENTRY_64: u64 = 0x200;
/// "Any other boot loader".
const LOADER_OTHER: u8 = 0xff;
/// Set by a loader that has set up segments itself (only of old protocols).
const KEEP_SEGMENTS: u8 = 1 << 6;

/// An initramfs in guest memory.
#[derive(Clone, Copy)]
struct Module {
    address: GuestAddress,
    len: u64,
}

/// Loads the payload into fresh (zeroed) RAM and tells it where the ACPI tables will be. Called
/// on the VMM thread.
pub fn load(payload: &Payload, ram: &GuestRam, rsdp: GuestAddress) -> Result<Entry, Error> {
    let changed = |error: &dyn std::fmt::Display| {
        Error::from(Invalid::new(
            payload.field,
            format!("can't be loaded, though it could be when it was checked: {error}"),
        ))
    };
    let memory = ram.as_ref();
    let place = payload.place_initramfs(low_end(ram))?;
    let mut file = &payload.file;
    let mut header = None;
    let entry = match payload.image {
        Image::Elf { entry, .. } => {
            Elf::load(memory, None, &mut file, None).map_err(|error| changed(&error))?;
            Entry {
                protocol: Protocol::Pvh,
                address: GuestAddress(entry.into()),
            }
        }
        Image::BzImage { .. } => {
            let loaded = BzImage::load(memory, Some(HIGH_RAM), &mut file, None)
                .map_err(|error| changed(&error))?;
            header = loaded.setup_header;
            Entry {
                protocol: Protocol::Linux64,
                address: GuestAddress(loaded.kernel_load.0 + ENTRY_64),
            }
        }
    };
    let module = match (place, &payload.initramfs) {
        (Some(address), Some(initramfs)) => {
            let mut file = &initramfs.file;
            rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))
                .map_err(|error| Error::host("reading the initramfs", error))?;
            ram.read_exact_volatile_from(address, &mut file, initramfs.len as usize)
                .map_err(|error| Invalid::new("initramfs", error.to_string()))?;
            Some(Module {
                address,
                len: initramfs.len,
            })
        }
        _ => None,
    };
    let told = |error: &dyn std::fmt::Display| Error::host("telling the kernel", error);
    load_cmdline(memory, CMDLINE, &payload.cmdline).map_err(|error| told(&error))?;
    match header {
        None => write_start_info(ram, module, rsdp),
        Some(header) => write_zero_page(ram, header, module, rsdp),
    }
    .map_err(|error| told(&error))?;
    write_tables(ram, entry.protocol)?;
    Ok(entry)
}

/// PVH's start info (Xen, public/arch-x86/hvm/start_info.h), version 1.
fn write_start_info(
    ram: &GuestRam,
    module: Option<Module>,
    rsdp: GuestAddress,
) -> linux_loader::configurator::Result<()> {
    let map: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.base,
            size: range.len,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = module
        .iter()
        .map(|module| hvm_modlist_entry {
            paddr: module.address.0,
            size: module.len,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { PVH_MODULES.0 },
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: rsdp.0,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, BOOT_INFO);
    params.set_sections(&map, PVH_MEMORY_MAP);
    params.set_modules(&modules, PVH_MODULES);
    PvhBootConfigurator::write_bootparams(&params, ram.as_ref())
}

/// Linux's zero page (Documentation/arch/x86/zero-page.rst).
fn write_zero_page(
    ram: &GuestRam,
    header: setup_header,
    module: Option<Module>,
    rsdp: GuestAddress,
) -> linux_loader::configurator::Result<()> {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp.0,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.loadflags &= !KEEP_SEGMENTS;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some(module) = module {
        // Both are below the hole, so below 4 GiB.
        params.hdr.ramdisk_image = module.address.0 as u32;
        params.hdr.ramdisk_size = module.len as u32;
    }
    let map = memory_map(ram);
    let mut entries = 0;
    for (entry, range) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: range.base,
            size: range.len,
            r#type: range.kind as u32,
        };
        entries += 1;
    }
    params.e820_entries = entries;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, BOOT_INFO), ram.as_ref())
}

#[cfg(test)]
mod tests;
