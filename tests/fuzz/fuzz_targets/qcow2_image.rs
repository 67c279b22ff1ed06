//! qcow2 images that may be anything: told about, checked, mended, read and written to, without a
//! panic and in bounded memory and time. An image in which the check finds nothing wrong is written
//! to as a model has it, keeps what its snapshot holds, and is found as sound afterwards; and what
//! the check says it has mended, it has.
//!
//! An input is a sound image of some kind, with some bytes changed, and what is done with it. With
//! BALLAST_FUZZ_IMAGE in the environment the image is put there, for other programs to look at.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::disk::blocking::Blocking;
use devices::disk::qcow2::check::{Listener, Repair, Report, check};
use devices::disk::qcow2::extents::Extents;
use devices::disk::qcow2::info::info;
use devices::disk::{Format, OpenOptions};
use fuzz::qcow2::{Built, Changes, Shape};
use fuzz::seeds;
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;

/// So much of a disk is looked at, in pieces.
const LOOKED_AT: u64 = 256 << 10;
const PIECE: usize = 4096;

#[derive(Arbitrary, Debug)]
struct Input {
    shape: Shape,
    changes: Changes,
    truncated: Option<u16>,
    sync: bool,
    backing_files: bool,
    repair: Mend,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Mend {
    Nothing,
    Leaks,
    All,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Read(Range),
    Write(Range, u8),
    Zero(Range, bool),
    Discard(Range),
    Flush,
    Reopen,
}

/// In sectors.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Range {
    start: u16,
    count: Count,
    end: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Count {
    One,
    Few(u8),
    Cluster,
    Clusters(u8),
}

impl Range {
    fn within(self, size: u64, cluster: usize) -> (u64, usize) {
        let sectors = size / 512;
        let start = match self.end {
            true => sectors.saturating_sub(1 + u64::from(self.start) % 64),
            false => u64::from(self.start) % sectors.min(LOOKED_AT / 512),
        };
        let cluster = cluster / 512;
        let (start, count) = match self.count {
            Count::One => (start, 1),
            Count::Few(count) => (start, usize::from(count) + 1),
            Count::Cluster => (start - start % cluster as u64, cluster),
            Count::Clusters(count) => {
                let count = cluster * (1 + usize::from(count) % 4);
                (start - start % cluster as u64, count)
            }
        };
        let count = (count as u64).min(sectors - start) as usize;
        (start * 512, count * 512)
    }
}

fn file(contents: &[u8]) -> (File, PathBuf) {
    let file = rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC).expect("memfd");
    let file = File::from(file);
    file.write_all_at(contents, 0).expect("write");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path.into())
}

/// What lies below images that have a backing file; some are larger.
static BELOW: LazyLock<(File, PathBuf)> = LazyLock::new(|| {
    let bytes: Vec<u8> = (0..700 << 9).map(|n: u32| (n >> 9) as u8 | 0x80).collect();
    file(&bytes)
});

fn look(options: &OpenOptions, repair: Repair) -> Option<Report> {
    let mut listener = Listener {
        finding: &mut |_| {},
        progress: &mut |_, _| {},
    };
    check(options, repair, &mut listener).ok()
}

/// What can be read of its beginning, piece by piece; `None` where the image can't be opened.
fn content(options: &OpenOptions) -> Option<Vec<Option<Vec<u8>>>> {
    let options = OpenOptions {
        readonly: true,
        ..options.clone()
    };
    let mut disk = Blocking::open(Format::Qcow2, &options).ok()?;
    let size = disk.size_bytes();
    let mut pieces = Vec::new();
    for start in (0..size.min(LOOKED_AT)).step_by(PIECE) {
        let len = PIECE.min((size - start) as usize);
        let found = disk.read(start, len);
        pieces.push(found.ok().map(|bytes| bytes.get().to_vec()));
    }
    // Where the offsets are largest.
    let _ = disk.read(size.saturating_sub(512), 512);
    Some(pieces)
}

/// What can be read of the snapshot that the image was made with.
fn snapshot_content(
    options: &OpenOptions,
    file: &File,
    image: &Built,
) -> Option<Vec<Option<Vec<u8>>>> {
    let (offset, entries) = image.snapshot?;
    let len = file.metadata().expect("metadata").len();
    let mut bytes = vec![0; len.min(64 << 20) as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes[36..40].copy_from_slice(&entries.to_be_bytes());
    bytes[40..48].copy_from_slice(&offset.to_be_bytes());
    let (_copy, path) = self::file(&bytes);
    content(&OpenOptions {
        path,
        ..options.clone()
    })
}

/// Everything that reads an image must agree on it.
fn tell(options: &OpenOptions) {
    let _ = info(Format::Qcow2, options, true);
    let Ok(mut extents) = Extents::open(Format::Qcow2, options, true) else {
        return;
    };
    let size = extents.size_bytes();
    let (mut position, mut steps) = (0, 0);
    while position < size.min(LOOKED_AT) && steps < 1000 {
        let Ok(extent) = extents.next(position, size) else {
            break;
        };
        assert!(extent.length > 0 && extent.start == position);
        position += extent.length;
        steps += 1;
    }
}

/// What the disk should hold; `None` for sectors that may hold anything.
struct Model {
    sectors: Vec<Option<[u8; 512]>>,
}

impl Model {
    fn new(pieces: &[Option<Vec<u8>>]) -> Self {
        let mut sectors = Vec::new();
        for piece in pieces {
            match piece {
                Some(bytes) => {
                    let (whole, _) = bytes.as_chunks();
                    sectors.extend(whole.iter().copied().map(Some));
                }
                None => sectors.extend([None; PIECE / 512]),
            }
        }
        Self { sectors }
    }

    fn set(&mut self, start: u64, count: usize, value: Option<[u8; 512]>) {
        let start = (start / 512) as usize;
        for sector in self.sectors.iter_mut().skip(start).take(count / 512) {
            *sector = value;
        }
    }

    fn compare(&self, start: u64, found: &[u8]) {
        let first = (start / 512) as usize;
        let (found, _) = found.as_chunks::<512>();
        for (number, (found, expected)) in found
            .iter()
            .zip(self.sectors.iter().skip(first))
            .enumerate()
        {
            if let Some(expected) = expected {
                assert!(found == expected, "sector {} is another", first + number);
            }
        }
    }
}

/// Opens the image and does all this. Whether everything succeeded; `None` where it can't be
/// opened for writing.
fn work(
    options: &OpenOptions,
    steps: &[Step],
    cluster: usize,
    model: &mut Model,
    sound: bool,
) -> Option<bool> {
    let mut disk = Blocking::open(Format::Qcow2, options).ok()?;
    let mut good = true;
    for step in steps.iter().take(24) {
        let size = disk.size_bytes();
        let result = match *step {
            Step::Read(range) => {
                let (start, len) = range.within(size, cluster);
                disk.read(start, len).map(|bytes| {
                    if sound {
                        model.compare(start, bytes.get());
                    }
                })
            }
            Step::Write(range, byte) => {
                let (start, len) = range.within(size, cluster);
                let result = disk.write(start, &vec![byte; len], byte % 16 == 0);
                model.set(start, len, result.is_ok().then_some([byte; 512]));
                result
            }
            Step::Zero(range, unmap) => {
                let (start, len) = range.within(size, cluster);
                let result = disk.write_zeroes(start, len as u64, unmap, false);
                model.set(start, len, result.is_ok().then_some([0; 512]));
                result
            }
            Step::Discard(range) => {
                let (start, len) = range.within(size, cluster);
                model.set(start, len, None);
                disk.discard(start, len as u64)
            }
            Step::Flush => disk.flush(),
            Step::Reopen => {
                drop(disk);
                match Blocking::open(Format::Qcow2, options) {
                    Ok(again) => disk = again,
                    Err(error) => {
                        assert!(!sound || !good, "it can't be opened any more: {error}");
                        return Some(false);
                    }
                }
                Ok(())
            }
        };
        good &= result.is_ok();
    }
    Some(good)
}

/// Numbers that look like chance, the same each time.
fn examples() -> Vec<(String, Vec<u8>)> {
    let mut state = 1_u64;
    let mut byte = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..64)
        .map(|number| {
            let bytes = (0..512 + number * 32).map(|_| byte()).collect();
            (number.to_string(), bytes)
        })
        .collect()
}

fuzz_target!(
    init: {
        let examples = examples();
        seeds::plant(examples.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())));
    },
    |input: Input| {
        let (_, below) = &*BELOW;
        let mut image = input.shape.build(below.to_str().expect("UTF-8"));
        let whole = input.truncated.is_none_or(|len| len % 4 != 0);
        for change in &input.changes.0 {
            image.change(*change);
        }
        if !whole {
            let len = usize::from(input.truncated.unwrap_or(0)) * 16;
            image.bytes.truncate(len);
        }
        if let Some(path) = std::env::var_os("BALLAST_FUZZ_IMAGE") {
            std::fs::write(path, &image.bytes).expect("write the image");
        }
        let untouched = whole && input.changes.0.is_empty();
        let (file, path) = file(&image.bytes);
        let options = OpenOptions {
            disable_io_uring: input.sync,
            backing_files: input.backing_files || untouched,
            ..OpenOptions::new(path)
        };
        tell(&options);
        let before = content(&options);
        let mended = match input.repair {
            Mend::Nothing => None,
            Mend::Leaks => look(&options, Repair::Leaks),
            Mend::All => look(&options, Repair::All),
        };
        let found = look(&options, Repair::Nothing);
        if let Some(mended) = mended {
            let found = found.expect("what was mended is looked at again");
            assert_eq!((found.corruptions, found.leaks), (mended.corruptions, mended.leaks));
            if let (Some(before), Some(after)) = (&before, content(&options)) {
                for (before, after) in before.iter().zip(after) {
                    assert!(before.is_none() || *before == after, "mending has changed it");
                }
            }
        }
        let sound = found.is_some_and(|found| found.corruptions == 0);
        if untouched {
            let found = found.expect("a sound image");
            assert_eq!((found.corruptions, found.leaks), (0, 0), "it was built wrong");
        }
        let (Some(before), Some(found)) = (before, found) else {
            // Whatever it is, it is not written to with success.
            work(&options, &input.steps, image.cluster, &mut Model::new(&[]), false);
            return;
        };
        let kept = sound.then(|| snapshot_content(&options, &file, &image)).flatten();
        let mut model = Model::new(&before);
        let worked = work(&options, &input.steps, image.cluster, &mut model, sound);
        assert!(!untouched || worked.is_some(), "a sound image is refused");
        if !sound || worked.is_none() {
            return;
        }
        let after = look(&options, Repair::Nothing).expect("it can be looked at still");
        assert_eq!(after.corruptions, 0, "corrupted");
        // With their autoclear bit bitmaps are given up, and so is their space. And refcounts of
        // what is beyond the end of the file are looked at only when it has grown.
        if worked == Some(true) && !image.has_bitmap && !image.refcounts_changed {
            assert!(after.leaks <= found.leaks, "{} clusters leak", after.leaks);
        }
        let mut start = 0;
        for piece in content(&options).expect("it can be read still") {
            if let Some(bytes) = &piece {
                model.compare(start, bytes);
            }
            start += PIECE as u64;
        }
        if let Some(kept) = kept {
            let now = snapshot_content(&options, &file, &image).expect("a snapshot");
            for (before, after) in kept.iter().zip(&now) {
                assert!(before.is_none() || before == after, "the snapshot has changed");
            }
        }
    }
);
