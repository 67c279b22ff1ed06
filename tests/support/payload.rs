//! A guest of a few bytes, for what needs a running VM but no operating system. It boots where
//! even a KVM that cannot run a kernel is at hand.
//!
//! The file is an ELF of one segment and one note: the PVH entry point, 32-bit protected mode
//! without paging. One byte tells that it runs, then it does nothing, for ever:
//!
//! ```text
//!   mov dx, 0x3f8; mov al, '!'; out dx, al     COM1
//!   out 0xe9, al                               the debug port
//!   cli; 1: hlt; jmp 1b
//! ```

use std::fs;
use std::path::{Path, PathBuf};

/// What the guest writes to its serial port, and to its debug port.
pub const GREETING: &str = "!";

/// Where the code goes, and starts.
pub(super) const ENTRY: u32 = 0x10_0000;
const CODE_OFFSET: u64 = 0x1000;
const NOTE_OFFSET: u64 = 0x200;

/// Code that greets and sleeps.
const SLEEP: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'!', // mov al, '!'
    0xee, // out dx, al
    0xe6, 0xe9, // out 0xe9, al
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// Code that goes through a list of writes at [`POKES`], greets and sleeps.
const POKE: &[u8] = &[
    0xbe, 0x00, 0x10, 0x10, 0x00, // mov esi, POKES
    0xad, // next: lodsd, the address
    0x85, 0xc0, // test eax, eax
    0x74, 0x1d, // jz done
    0x89, 0xc7, // mov edi, eax
    0xad, // lodsd, the number of bytes
    0x89, 0xc1, // mov ecx, eax
    0xad, // lodsd, the value
    0x83, 0xf9, 0x01, // cmp ecx, 1
    0x74, 0x09, // je byte
    0x83, 0xf9, 0x02, // cmp ecx, 2
    0x74, 0x08, // je word
    0x89, 0x07, // mov [edi], eax
    0xeb, 0xe7, // jmp next
    0x88, 0x07, // byte: mov [edi], al
    0xeb, 0xe3, // jmp next
    0x66, 0x89, 0x07, // word: mov [edi], ax
    0xeb, 0xde, // jmp next
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, // done: the same greeting
    0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp to the hlt
];

/// Where [`POKE`] finds its list: address, bytes (1, 2 or 4) and value, 32 bits each, up to an
/// address of 0.
const POKES: u32 = ENTRY + 0x1000;

/// Code that greets and makes the processor give up: a triple fault, for there is no interrupt
/// table.
const FAULT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, // the same greeting
    0x0f, 0x01, 0x1d, 0x20, 0x00, 0x10, 0x00, // lidt [0x100020], which holds zeros
    0x0f, 0x0b, // ud2
];

/// Writes the sleeping guest into `folder`.
pub fn sleeper(folder: &Path) -> PathBuf {
    write(folder, "sleeper", SLEEP)
}

/// Writes the guest that resets itself by a triple fault into `folder`.
pub fn faulter(folder: &Path) -> PathBuf {
    write(folder, "faulter", FAULT)
}

/// A guest's first queue of a disk: descriptors, and the rings.
const DESCRIPTORS: u32 = ENTRY + 0x4000;
const AVAILABLE: u32 = ENTRY + 0x6000;
const USED: u32 = ENTRY + 0x7000;
/// Where the header and the status of each write of [`disk_writer`] lie, and its data.
const HEADERS: u32 = ENTRY + 0x8000;
const DATA: u32 = ENTRY + 0x1_0000;

/// The PCI slot in which [`disk_writer`] expects its disk.
pub const WRITER_SLOT: u32 = 9;
/// Bytes of each of its writes.
pub const WRITER_CHUNK: usize = 64 << 10;

/// What [`disk_writer`] writes as chunk number `chunk`.
pub fn writer_chunk(chunk: usize) -> Vec<u8> {
    (0..WRITER_CHUNK)
        .map(|byte| (byte / 512 + byte % 251) as u8 ^ (chunk as u8 + 1))
        .collect()
}

/// Writes a guest into `folder` that is a driver: it sets up the disk in [`WRITER_SLOT`] and has it
/// write the first `chunks` (at most 40) chunks, all at once, then sleeps.
pub fn disk_writer(folder: &Path, chunks: usize) -> PathBuf {
    let ecam = 0xe800_0000 + (WRITER_SLOT << 15);
    let bar = 0xc000_0000 + WRITER_SLOT * 0x1_0000;
    let mut pokes = vec![(ecam + 4, 2, 6)];
    // Reset, acknowledge, driver; VERSION_1 and FLUSH; features OK.
    pokes.extend([0, 1, 3].map(|status| (bar + 0x14, 1, status)));
    pokes.extend([(bar + 8, 4, 0), (bar + 0xc, 4, 1 << 9)]);
    pokes.extend([(bar + 8, 4, 1), (bar + 0xc, 4, 1)]);
    pokes.push((bar + 0x14, 1, 11));
    // Queue 0 of 128 descriptors; then DRIVER_OK, and the doorbell.
    pokes.extend([(bar + 0x16, 2, 0), (bar + 0x18, 2, 128)]);
    for (register, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
        pokes.extend([(bar + register, 4, address), (bar + register + 4, 4, 0)]);
    }
    pokes.extend([(bar + 0x1c, 2, 1), (bar + 0x14, 1, 15)]);
    pokes.push((bar + 0x3000, 2, 0));
    let mut image = POKE.to_vec();
    let mut put = |address: u32, bytes: &[u8]| {
        let at = (address - ENTRY) as usize;
        image.resize(image.len().max(at + bytes.len()), 0);
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for (number, (address, bytes, value)) in (0u32..).zip(pokes) {
        for (word, field) in (0u32..).zip([address, bytes, value]) {
            put(POKES + number * 12 + word * 4, &field.to_le_bytes());
        }
    }
    put(AVAILABLE + 2, &(chunks as u16).to_le_bytes());
    for chunk in 0..chunks as u32 {
        let header = HEADERS + chunk * 32;
        let data = DATA + chunk * WRITER_CHUNK as u32;
        let sector = u64::from(chunk) * (WRITER_CHUNK as u64 / 512);
        put(header, &1u32.to_le_bytes());
        put(header + 8, &sector.to_le_bytes());
        put(data, &writer_chunk(chunk as usize));
        let first = chunk as u16 * 3;
        put(AVAILABLE + 4 + chunk * 2, &first.to_le_bytes());
        // Readable and more, readable and more, writable.
        let parts = [
            (header, 16, 1u16),
            (data, WRITER_CHUNK as u32, 1),
            (header + 16, 1, 2),
        ];
        for (number, (address, len, flags)) in (first..).zip(parts) {
            let at = DESCRIPTORS + u32::from(number) * 16;
            put(at, &u64::from(address).to_le_bytes());
            put(at + 8, &len.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &(number + 1).to_le_bytes());
        }
    }
    write(folder, "writer", &image)
}

pub(super) fn write(folder: &Path, name: &str, code: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, elf(code)).expect("write the payload");
    path
}

/// The ELF file around `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut code = code.to_vec();
    code.resize(code.len().max(64), 0);
    let mut file = Vec::new();
    // ELF header: 64 bits, little-endian, executable, x86-64, two program headers at 64.
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&1u32.to_le_bytes());
    for long in [u64::from(ENTRY), 64, 0] {
        file.extend_from_slice(&long.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let note = note();
    program_header(&mut file, 1, CODE_OFFSET, code.len());
    program_header(&mut file, 4, NOTE_OFFSET, note.len());
    file.resize(NOTE_OFFSET as usize, 0);
    file.extend_from_slice(&note);
    file.resize(CODE_OFFSET as usize, 0);
    file.extend_from_slice(&code);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, offset: u64, length: usize) {
    for word in [kind, 5] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    let (entry, length) = (u64::from(ENTRY), length as u64);
    for long in [offset, entry, entry, length, length, 0x1000] {
        file.extend_from_slice(&long.to_le_bytes());
    }
}

/// XEN_ELFNOTE_PHYS32_ENTRY: where PVH starts.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&ENTRY.to_le_bytes());
    note
}
