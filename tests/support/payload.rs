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
const ENTRY: u32 = 0x10_0000;
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

fn write(folder: &Path, name: &str, code: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, elf(code)).expect("write the payload");
    path
}

/// The ELF file around `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut code = code.to_vec();
    code.resize(64, 0);
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
