//! Hand-made kernels for tests: a few bytes of machine code in an ELF file with a PVH note, or in
//! a bzImage.

use std::io::Write;

use crate::config::PayloadConfig;

/// Where the code of either is loaded (that of the bzImage 0x200 higher).
pub(crate) const CODE: u32 = 0x10_0000;

/// An ELF file that loads `code` at [`CODE`] and has its PVH entry point there.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 64 + 3 * 56];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &3u16.to_le_bytes());
    // Another note first, as real kernels have.
    let mut notes = Vec::new();
    for (kind, name, value) in [(1u32, b"GNU\0", 7u32), (18, b"Xen\0", CODE)] {
        notes.extend([4, 4, kind].map(u32::to_le_bytes).as_flattened());
        notes.extend(name);
        notes.extend(value.to_le_bytes());
    }
    let notes_at = file.len() as u64;
    file.extend(&notes);
    let code_at = file.len() as u64;
    file.extend(code);
    let mut header = |index: usize, kind: u32, offset: u64, paddr: u64, len: u64, memory: u64| {
        let at = 64 + index * 56;
        put(&mut file, at, &kind.to_le_bytes());
        for (word, value) in [(8, offset), (24, paddr), (32, len), (40, memory)] {
            put(&mut file, at + word, &value.to_le_bytes());
        }
    };
    header(0, 4, notes_at, 0, notes.len() as u64, 0);
    header(1, 1, code_at, CODE.into(), code.len() as u64, 0x1000);
    header(2, 4, notes_at, 0, 20, 0);
    file
}

/// A bzImage whose 64-bit entry is `code`.
pub(crate) fn bz_image(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2 * 512 + 0x200];
    file.extend(code);
    file.resize(file.len().next_multiple_of(16), 0x90);
    file[0x1f1] = 1;
    let paragraphs = (file.len() as u32 - 1024) / 16;
    put(&mut file, 0x1f4, &paragraphs.to_le_bytes());
    put(&mut file, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x020fu16.to_le_bytes());
    file[0x211] = 1;
    put(&mut file, 0x214, &CODE.to_le_bytes());
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x230, &0x20_0000u32.to_le_bytes());
    file[0x234] = 1;
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x258, &0x20_0000u64.to_le_bytes());
    put(&mut file, 0x260, &0x10_0000u32.to_le_bytes());
    file
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A file with these contents, gone when dropped.
pub(crate) fn file(contents: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    file
}

/// A configuration that boots `kernel`.
pub(crate) fn kernel(kernel: &tempfile::NamedTempFile) -> PayloadConfig {
    PayloadConfig {
        kernel: Some(kernel.path().to_owned()),
        ..PayloadConfig::default()
    }
}
