//! Images that QEMU left dirty: their refcounts are built anew when they are opened for writing.

use std::io::{Read, Write};
use std::path::Path;

use super::qemu::{self, Random};
use super::*;
use crate::disk::qcow2::header::Header;

const MIB: u64 = 1 << 20;

fn header(path: &Path) -> Header {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).unwrap();
    file.take(2 << 20).read_to_end(&mut bytes).unwrap();
    Header::parse(&bytes).unwrap()
}

fn writable(path: &Path) -> OpenOptions {
    OpenOptions {
        readonly: false,
        ..options(path)
    }
}

/// An image whose writer was killed before it wrote the refcounts.
fn killed(folder: &Path, kind: &str, seed: u64) -> std::path::PathBuf {
    let path = qemu::create(folder, "image.qcow2", kind, 8 * MIB);
    qemu::scribble(&path, 8 * MIB, 20, seed);
    if seed.is_multiple_of(2) {
        qemu::img(&format!("snapshot -c one {}", path.display()));
    }
    let mut random = Random(seed);
    let mut shell = std::process::Command::new("qemu-io");
    shell.args(["-f", "qcow2"]);
    for _ in 0..30 {
        let offset = random.below(8 * MIB / 512 - 256) * 512;
        let len = (1 + random.below(255)) * 512;
        let command = match random.below(5) {
            0 => format!("discard {offset} {len}"),
            1 => format!("write -z {offset} {len}"),
            _ => format!("write -P {} {offset} {len}", 1 + random.below(200)),
        };
        shell.args(["-c", &command]);
    }
    // What it has in its cache goes to the file, but for the refcounts.
    shell.args(["-c", "flush", "-c", "sigraise 9"]);
    let killed = shell.arg(&path).output().unwrap();
    assert!(!killed.status.success());
    assert!(header(&path).writing.dirty, "{kind}: it was closed");
    path
}

/// Opens it for writing, writes, and has QEMU look.
fn is_sound(path: &Path, content: &[u8]) {
    let image = Qcow2Image::open(&writable(path)).unwrap();
    assert!(!header(path).writing.dirty);
    let mut queue = image.open_queue(4).unwrap();
    let memory = crate::disk::buffers::AlignedBuffer::zeroed(65536, 4096).unwrap();
    let memory = Arc::new(memory);
    let mut buffers = crate::disk::Buffers::default();
    buffers.push_own(&memory, 0, 65536).unwrap();
    let mut done = Vec::new();
    for (tag, operation, len) in [
        (0, Operation::Write { durable: true }, 65536),
        (1, Operation::Flush, 0),
    ] {
        queue.push(Request {
            tag,
            operation,
            offset: 0,
            length: len,
            buffers: std::mem::take(&mut buffers),
        });
        queue.start().unwrap();
        queue.wait(&mut done).unwrap();
        done.pop().unwrap().result.unwrap();
    }
    drop(queue);
    drop(image);
    qemu::img(&format!("check -q -f qcow2 {}", path.display()));
    assert!(qemu::content(path)[65536..] == content[65536..]);
}

const KINDS: [&str; 6] = [
    "lazy_refcounts=on",
    "lazy_refcounts=on,cluster_size=4k",
    "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
    "lazy_refcounts=on,cluster_size=4k,refcount_bits=8",
    "lazy_refcounts=on,extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on,cluster_size=2M",
];

#[test]
fn what_qemu_left_dirty_is_mended_when_it_is_opened_for_writing() {
    let Some(folder) = qemu::folder() else { return };
    for (seed, kind) in (1..).zip(KINDS) {
        let path = killed(folder.path(), kind, seed);
        let before = std::fs::read(&path).unwrap();
        // Reading needs no refcounts, and changes nothing.
        drop(Qcow2Image::open(&options(&path)).unwrap());
        assert!(std::fs::read(&path).unwrap() == before);
        let copy = folder.path().join("copy.qcow2");
        std::fs::copy(&path, &copy).unwrap();
        let content = qemu::content(&copy);
        is_sound(&path, &content);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_power_cut_while_it_is_mended_leaves_it_dirty_and_it_is_mended_then() {
    let Some(folder) = qemu::folder() else { return };
    let mut changes = 0;
    for (seed, kind) in (11..).zip(&KINDS[..5]) {
        let path = killed(folder.path(), kind, seed);
        let before = std::fs::read(&path).unwrap();
        drop(Qcow2Image::open(&writable(&path)).unwrap());
        let after = std::fs::read(&path).unwrap();
        // Where refcounts are written beside the old ones, the switch is synced before and after.
        let switched = before[48..60] != after[48..60];
        let content = qemu::content(&path);
        let mut random = Random(seed);
        for _ in 0..8 {
            let mut bytes = before.clone();
            bytes.resize(before.len().max(after.len()), 0);
            let changed = (1..after.len() / 512)
                .map(|sector| sector * 512..sector * 512 + 512)
                .filter(|sector| bytes[sector.clone()] != after[sector.clone()]);
            let changed: Vec<_> = changed.collect();
            changes += changed.len() + usize::from(switched);
            let luck = random.below(3);
            for sector in changed {
                if luck == 0 || random.below(2) == 0 {
                    bytes[sector.clone()].copy_from_slice(&after[sector]);
                }
            }
            let mut file = std::fs::File::create(&path).unwrap();
            file.write_all(&bytes).unwrap();
            drop(file);
            assert!(header(&path).writing.dirty);
            is_sound(&path, &content);
        }
        std::fs::remove_file(path).unwrap();
    }
    assert!(changes > 0, "nothing had to be mended");
    println!("40 states");
}

#[test]
fn one_that_contradicts_itself_is_left_as_it_is() {
    let Some(folder) = qemu::folder() else { return };
    let path = killed(folder.path(), KINDS[0], 3);
    let before = std::fs::read(&path).unwrap();
    let found = header(&path);
    // An L2 table that is not aligned.
    let mut bytes = before.clone();
    let at = found.l1_offset as usize;
    bytes[at..at + 8].copy_from_slice(&(0x5_1000_u64 | 1 << 63).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let refused = match Qcow2Image::open(&writable(&path)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted"),
    };
    assert!(refused.contains("dirty bit"), "{refused}");
    assert!(header(&path).writing.dirty);
    // More tables than there is time for.
    let mut bytes = before;
    bytes[24..32].copy_from_slice(&(1_u64 << 50).to_be_bytes());
    let entries = 1_u32 << 21;
    bytes[36..40].copy_from_slice(&entries.to_be_bytes());
    let l1 = bytes.len().next_multiple_of(65536);
    bytes[40..48].copy_from_slice(&(l1 as u64).to_be_bytes());
    bytes.resize(l1, 0);
    bytes.extend((1..=u64::from(entries)).flat_map(|n| ((1 << 30) + (n << 16)).to_be_bytes()));
    std::fs::write(&path, &bytes).unwrap();
    let refused = match Qcow2Image::open(&writable(&path)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted"),
    };
    assert!(refused.contains("too many tables"), "{refused}");
}

#[test]
fn one_that_makes_endless_work_is_given_up_soon() {
    let Some(folder) = qemu::folder() else { return };
    let path = killed(folder.path(), KINDS[0], 7);
    // Snapshots whose L1 tables are holes of 32 GiB each.
    let mut bytes = std::fs::read(&path).unwrap();
    let (at, count) = (bytes.len().next_multiple_of(65536), 64_u32);
    bytes[60..64].copy_from_slice(&count.to_be_bytes());
    bytes[64..72].copy_from_slice(&(at as u64).to_be_bytes());
    bytes.resize(at, 0);
    for _ in 0..count {
        bytes.extend((1_u64 << 30).to_be_bytes());
        bytes.extend(u32::MAX.to_be_bytes());
        bytes.extend([0; 28]);
    }
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(3 << 40).unwrap();
    let start = std::time::Instant::now();
    let refused = match Qcow2Image::open(&writable(&path)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted"),
    };
    assert!(refused.contains("too long"), "{refused}");
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    assert!(header(&path).writing.dirty);
}

#[test]
fn one_that_somebody_else_is_writing_to_is_not_mended() {
    let Some(folder) = qemu::folder() else { return };
    let path = killed(folder.path(), KINDS[0], 5);
    let before = std::fs::read(&path).unwrap();
    let holder = crate::disk::open::open_file(&writable(&path)).unwrap();
    assert!(Qcow2Image::open(&writable(&path)).is_err());
    assert!(std::fs::read(&path).unwrap() == before);
    drop(holder);
    drop(Qcow2Image::open(&writable(&path)).unwrap());
    assert!(!header(&path).writing.dirty);
}
