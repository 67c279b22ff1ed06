//! Telling kernels from other files: an ELF file with a PVH note, or a bzImage with a 64-bit
//! entry. Nothing is loaded here, and nothing in the file is trusted.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued;

use crate::layout::{HIGH_RAM, HOLE_START};

/// What a file turned out to be, and what it asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Image {
    /// An ELF file to be entered by PVH at `entry`; its segments end at `end`.
    Elf { entry: u32, end: u64 },
    /// A bzImage; what it unpacks to ends at `end`.
    BzImage { end: u64, initramfs_end: u64 },
}

/// More program headers than any kernel has.
const MAX_HEADERS: u16 = 128;
/// More bytes of notes than any kernel has.
const MAX_NOTES: u64 = 1 << 20;
const EM_X86_64: u16 = 62;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PVH_NOTE: u32 = 18;

const SETUP_HEADER: u64 = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
/// The first version with `xloadflags`.
const VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;

const UNKNOWN: &str = "is neither an ELF kernel nor a bzImage";

/// Looks at a kernel of `len` bytes (with `bzimage`, that is possible too); `cmdline_len` without
/// the terminator. The error is what to say of the file.
pub(super) fn recognise(
    file: &File,
    len: u64,
    bzimage: bool,
    cmdline_len: usize,
) -> Result<Image, String> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)
        .map_err(|_| UNKNOWN.to_owned())?;
    if &magic == b"\x7fELF" {
        return elf(file, len);
    }
    if bzimage {
        return bz_image(file, len, cmdline_len);
    }
    Err("is not an ELF file".to_owned())
}

fn read<T: ByteValued + Default>(file: &File, offset: u64) -> Result<T, String> {
    let mut value = T::default();
    file.read_exact_at(value.as_mut_slice(), offset)
        .map_err(|_| "is truncated".to_owned())?;
    Ok(value)
}

fn elf(file: &File, len: u64) -> Result<Image, String> {
    let header: Elf64_Ehdr = read(file, 0)?;
    if header.e_ident[4] != ELFCLASS64
        || header.e_ident[5] != ELFDATA2LSB
        || header.e_machine != EM_X86_64
    {
        return Err("is an ELF file, but not for x86-64".to_owned());
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>()
        || header.e_phoff < size_of::<Elf64_Ehdr>() as u64
        || header.e_phnum > MAX_HEADERS
    {
        return Err("has a malformed ELF header".to_owned());
    }
    let mut segments = Vec::new();
    let mut entry = None;
    for index in 0..u64::from(header.e_phnum) {
        let offset = index * size_of::<Elf64_Phdr>() as u64;
        let offset = header.e_phoff.checked_add(offset).ok_or("is truncated")?;
        let program: Elf64_Phdr = read(file, offset)?;
        let in_file = program
            .p_offset
            .checked_add(program.p_filesz)
            .is_some_and(|end| end <= len);
        match program.p_type {
            PT_LOAD if !in_file => return Err("is truncated".to_owned()),
            PT_LOAD if program.p_filesz > program.p_memsz => {
                return Err("has a malformed ELF segment".to_owned());
            }
            PT_LOAD if program.p_memsz > 0 => {
                let end = program.p_paddr.checked_add(program.p_memsz);
                match end {
                    Some(end) if program.p_paddr >= HIGH_RAM.0 && end <= HOLE_START => {
                        segments.push(program.p_paddr..end);
                    }
                    _ => {
                        return Err(format!(
                            "wants {:#x} bytes at {:#x}, where there is no RAM for it",
                            program.p_memsz, program.p_paddr
                        ));
                    }
                }
            }
            PT_NOTE if !in_file || program.p_filesz > MAX_NOTES => {
                return Err("is truncated, or has malformed notes".to_owned());
            }
            PT_NOTE if entry.is_none() => {
                let mut notes = vec![0; program.p_filesz as usize];
                file.read_exact_at(&mut notes, program.p_offset)
                    .map_err(|_| "is truncated")?;
                entry = pvh_entry(&notes);
            }
            _ => {}
        }
    }
    let entry = entry
        .ok_or("is an ELF file without a PVH note; Linux has one when built with CONFIG_PVH")?;
    if !segments.iter().any(|s| s.contains(&u64::from(entry))) {
        return Err("has a PVH entry point outside of what it loads".to_owned());
    }
    let end = segments.iter().map(|s| s.end).max().unwrap_or(0);
    Ok(Image::Elf { entry, end })
}

/// The entry point in a segment of notes (System V ABI, "Note Section").
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (header, rest) = notes.split_at_checked(size_of::<Elf64_Nhdr>())?;
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(header);
        let padded = |size: u32| (size as usize).next_multiple_of(4);
        let (name, rest) = rest.split_at_checked(padded(note.n_namesz))?;
        // The last one need not be padded.
        let descriptor = rest.get(..note.n_descsz as usize)?;
        if note.n_type == PVH_NOTE && name == b"Xen\0" {
            return Some(u32::from_le_bytes(*descriptor.first_chunk()?));
        }
        notes = rest.get(padded(note.n_descsz)..)?;
    }
}

fn bz_image(file: &File, len: u64, cmdline_len: usize) -> Result<Image, String> {
    let header: setup_header = read(file, SETUP_HEADER).map_err(|_| UNKNOWN.to_owned())?;
    if { header.boot_flag } != BOOT_FLAG || { header.header } != HDRS {
        return Err(UNKNOWN.to_owned());
    }
    let version = { header.version };
    if version < VERSION || header.loadflags & LOADED_HIGH == 0 || { header.xloadflags }
        & XLF_KERNEL_64
        == 0
    {
        return Err(format!(
            "is a kernel without a 64-bit entry (boot protocol {}.{:02})",
            version >> 8,
            version & 0xff
        ));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup_bytes = (setup_sectors + 1) * 512;
    let system_bytes = u64::from(header.syssize) * 16;
    if system_bytes == 0 || len < setup_bytes + system_bytes {
        return Err(format!(
            "is truncated: has {len} bytes of {}",
            setup_bytes + system_bytes
        ));
    }
    let most = { header.cmdline_size } as usize;
    if cmdline_len > most {
        return Err(format!(
            "takes a command line of at most {most} bytes, not {cmdline_len}"
        ));
    }
    // It unpacks itself to where it prefers to be, or higher up if it was loaded higher up.
    let alignment = u64::from(header.kernel_alignment).max(1);
    let unpacked = { header.pref_address }.max(HIGH_RAM.0.next_multiple_of(alignment));
    let end = unpacked
        .checked_add({ header.init_size }.into())
        .filter(|end| *end <= HOLE_START)
        .ok_or("wants to be where there is no RAM")?;
    Ok(Image::BzImage {
        end: end.max(HIGH_RAM.0 + (len - setup_bytes)),
        initramfs_end: u64::from(header.initrd_addr_max) + 1,
    })
}
