//! Files given as kernel, firmware or initramfs: whatever they hold, they are told apart without a
//! panic and in bounded time; what was found to fit is loaded into memory that is watched.
//!
//! An input is a file as it is, or a sound ELF kernel or bzImage with some bytes changed.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use fuzz::memory::Memory;
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;
use vm_memory::GuestAddress;
use vmm::boot::{Payload, load};
use vmm::config::PayloadConfig;

const RAM: usize = 8 << 20;
const CODE: u64 = 0x10_0000;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    image: Image,
    firmware: bool,
    cmdline: Option<&'a str>,
    initramfs: Option<u32>,
    changes: Vec<(u16, Change)>,
    truncated: Option<u16>,
    bytes: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Image {
    Bytes,
    Elf,
    BzImage,
}

#[derive(Arbitrary, Debug)]
enum Change {
    Byte(u8),
    Half(u16),
    Word(u32),
    Long(u64),
    /// An address near where kernels go.
    Address(u32),
}

/// An ELF file that loads `code` and has a PVH note.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 64 + 3 * 56];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &3u16.to_le_bytes());
    let mut notes = Vec::new();
    for (kind, name, value) in [(1u32, b"GNU\0", 7u32), (18, b"Xen\0", CODE as u32)] {
        notes.extend([4, 4, kind].map(u32::to_le_bytes).as_flattened());
        notes.extend(name);
        notes.extend(value.to_le_bytes());
    }
    let notes_at = file.len() as u64;
    file.extend(&notes);
    let code_at = file.len() as u64;
    file.extend(code);
    let (notes_len, code_len) = (notes.len() as u64, code.len() as u64);
    for (index, kind, offset, address, len, memory) in [
        (0, 4u32, notes_at, 0, notes_len, 0),
        (1, 1, code_at, CODE, code_len, 0x1_0000),
        (2, 4, notes_at, 0, 20, 0),
    ] {
        let at = 64 + index * 56;
        put(&mut file, at, &kind.to_le_bytes());
        for (word, value) in [(8, offset), (24, address), (32, len), (40, memory)] {
            put(&mut file, at + word, &value.to_le_bytes());
        }
    }
    file
}

/// A bzImage with `code` in it.
fn bz_image(code: &[u8]) -> Vec<u8> {
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
    put(&mut file, 0x214, &(CODE as u32).to_le_bytes());
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x230, &0x20_0000u32.to_le_bytes());
    file[0x234] = 1;
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x258, &0x20_0000u64.to_le_bytes());
    put(&mut file, 0x260, &0x10_0000u32.to_le_bytes());
    file
}

/// Writes what there is room for.
fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in file.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

fn build(input: &Input<'_>) -> Vec<u8> {
    let code = &input.bytes[..input.bytes.len().min(1 << 16)];
    let mut file = match input.image {
        Image::Bytes => code.to_vec(),
        Image::Elf => elf(code),
        Image::BzImage => bz_image(code),
    };
    // All that is looked at lies at the beginning.
    let most = file.len().min(1024).max(1);
    for (at, change) in input.changes.iter().take(16) {
        let at = usize::from(*at) % most;
        match change {
            Change::Byte(value) => put(&mut file, at, &value.to_le_bytes()),
            Change::Half(value) => put(&mut file, at, &value.to_le_bytes()),
            Change::Word(value) => put(&mut file, at, &value.to_le_bytes()),
            Change::Long(value) => put(&mut file, at, &value.to_le_bytes()),
            Change::Address(value) => {
                let address = u64::from(value % (2 * RAM as u32));
                put(&mut file, at, &address.to_le_bytes());
            }
        }
    }
    if let Some(len) = input.truncated {
        file.truncate(len.into());
    }
    file
}

fn file(contents: &[u8]) -> (File, String) {
    let file = rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC).expect("memfd");
    let mut file = File::from(file);
    file.write_all(contents).expect("write");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path)
}

static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(RAM));

fuzz_target!(|input: Input<'_>| {
    let (_image, path) = file(&build(&input));
    let (initramfs, initramfs_path) = file(b"");
    let mut config = PayloadConfig {
        cmdline: input.cmdline.map(str::to_owned),
        ..PayloadConfig::default()
    };
    match input.firmware {
        true => config.firmware = Some(path.into()),
        false => config.kernel = Some(path.into()),
    }
    if let Some(len) = input.initramfs {
        // Sparse, so that it may be larger than all of memory.
        let len = u64::from(len % (2 * RAM as u32));
        initramfs.set_len(len).expect("size");
        config.initramfs = Some(initramfs_path.into());
    }
    let Ok(payload) = Payload::open(&config) else {
        return;
    };
    if payload.fits(RAM as u64).is_err() {
        return;
    }
    let loaded = load(&payload, &MEMORY.ram, GuestAddress(0xe_0000));
    MEMORY.assert_guards_untouched();
    if let Err(error) = loaded {
        panic!("what was found to fit can't be loaded: {error}");
    }
});
