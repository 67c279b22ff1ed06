//! Power cuts and faults, over a host that the test plays.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use super::sim::{Files, Player, Shared, host};
use super::*;

const MIB: u64 = 1 << 20;

/// An image over a raw file of stamped sectors, or over nothing.
pub struct Setup {
    pub folder: tempfile::TempDir,
    pub path: std::path::PathBuf,
    backing: Option<(std::path::PathBuf, Vec<u8>)>,
    /// Its external data file.
    pub data: Option<std::path::PathBuf>,
    size: u64,
    /// Clusters that only a bitmap refers to, which is none any more after the first write.
    given_up: u64,
    /// Somebody reads it as a backing file meanwhile.
    pub has_reader: bool,
}

impl Setup {
    pub fn new(kind: &str, overlay: bool, snapshot: bool, size: u64) -> Option<Self> {
        Self::over(kind, overlay.then_some(size), snapshot, size)
    }

    /// The same over a backing file of another size. With `data_file=@` in its kind the data is in
    /// a file of its own.
    pub fn over(kind: &str, below: Option<u64>, snapshot: bool, size: u64) -> Option<Self> {
        let folder = qemu::folder()?;
        let at = folder.path();
        let backing = below.map(|below| {
            let sectors = (0..below / 512).flat_map(|n| bytes_of(n << 32 | 0xee));
            let bytes: Vec<u8> = sectors.collect();
            let path = at.join("base.raw");
            std::fs::write(&path, &bytes).unwrap();
            (path, bytes)
        });
        let data = at.join("data.raw");
        let mut options = kind.replace('@', data.to_str().unwrap());
        let data = kind.contains('@').then_some(data);
        if let Some((path, _)) = &backing {
            options += &format!(",backing_file={},backing_fmt=raw", path.display());
        }
        let path = qemu::create(at, "image.qcow2", &options, size);
        if let Some(data) = &data
            && !kind.contains("data_file_raw")
            && !kind.contains("preallocation")
        {
            // Places that do not count may have anything, and so may what is beyond the disk.
            std::fs::write(data, vec![0xee; size as usize + (1 << 20)]).unwrap();
        }
        if kind.contains("data_file_raw") {
            // QEMU has all of it count at first.
            qemu::io(&path, &[format!("write -z 0 {}", size / 4)]);
            qemu::io(&path, &[format!("discard {} {}", size / 2, size / 8)]);
        }
        if snapshot {
            // What is there is of one kind, so that it can be told from what is foreign.
            qemu::io(&path, &[format!("write -z 0 {}", size / 4)]);
            qemu::io(&path, &[format!("write -P 0 {} {}", size / 2, size / 8)]);
            qemu::img(&format!("snapshot -c one {}", path.display()));
        }
        Some(Self {
            folder,
            path,
            backing,
            data,
            size,
            given_up: 0,
            has_reader: false,
        })
    }

    /// One whose clusters are compressed, some of them twice: in a snapshot as well.
    pub fn compressed(kind: &str, size: u64) -> Option<Self> {
        let setup = Self::over(kind, None, false, size)?;
        let raw = setup.folder.path().join("content.raw");
        let sectors = (0..size / 512).flat_map(|n| bytes_of(n << 32 | 0xee));
        std::fs::write(&raw, sectors.collect::<Vec<u8>>()).unwrap();
        let path = setup.path.display();
        std::fs::remove_file(&setup.path).unwrap();
        qemu::img(&format!(
            "convert -c -f raw -O qcow2 -o {kind} {} {path}",
            raw.display()
        ));
        qemu::img(&format!("snapshot -c one {path}"));
        Some(setup)
    }

    /// One with a bitmap that QEMU keeps.
    fn with_bitmap(kind: &str, size: u64) -> Option<Self> {
        let mut setup = Self::over(kind, None, false, size)?;
        let path = setup.path.display();
        qemu::img(&format!("bitmap --add {path} dirty"));
        qemu::io(&setup.path, &[format!("write -P 0 0 {}", size / 2)]);
        let bytes = std::fs::read(&setup.path).unwrap();
        let image = check::Image::new(&bytes);
        assert!(image.has_autoclear());
        setup.given_up = image.check();
        assert!(setup.given_up > 0);
        Some(setup)
    }

    pub fn backing(&self) -> &[u8] {
        self.backing.as_ref().map_or(&[], |(_, bytes)| bytes)
    }

    /// What the disk holds, all of which is to be there.
    pub fn content(&self, image: &check::Image<'_>) -> Vec<u8> {
        let sectors = image.content(self.backing());
        sectors.into_iter().flat_map(Option::unwrap).collect()
    }

    /// Closes the image, in which there is to be all that was written, and nothing wrong.
    pub fn assert_whole(&self, driver: &mut Driver, shared: &Shared) {
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        let image = check::Image::new(&bytes);
        assert_eq!(image.check(), 0);
        driver.compare(&self.content(&image));
    }

    /// Has a range of the backing file hold zeroes.
    pub fn zero_below(&mut self, offset: u64, len: u64) {
        if let Some((path, bytes)) = &mut self.backing {
            let zeroes = &mut bytes[offset as usize..][..len as usize];
            zeroes.fill(0);
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(zeroes, offset).unwrap();
        }
    }

    /// The same, with nothing on the host for it.
    pub fn hole_below(&mut self, offset: u64, len: u64) {
        self.zero_below(offset, len);
        if let Some((path, _)) = &self.backing {
            let file = File::options().write(true).open(path).unwrap();
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, punch, offset, len).unwrap();
        }
    }

    pub fn driver(&self, seed: u64) -> (Driver, Shared) {
        let below: Vec<&Path> = self.backing.iter().map(|(p, _)| p.as_path()).collect();
        let shared = host(&self.path, &below, self.data.as_deref(), seed);
        let content = qemu::content(&self.path);
        assert_eq!(content.len() as u64, self.size);
        let player = Box::new(Player(shared.clone()));
        let mut writable = writable(&options(&self.path, false, true));
        if self.has_reader {
            writable = writable.beside_reader();
        }
        let engine = writable.into_engine(Backend::Simulated(player), 256);
        let queue = WriteQueue::new(Arc::new(engine), DEPTH);
        let mut driver = Driver::new(queue, &content, seed);
        let clock = shared.clone();
        driver.clock = Box::new(move || {
            let mut host = clock.lock().unwrap();
            host.now += 1;
            host.now
        });
        driver.longest = 100;
        (driver, shared)
    }

    /// Writes a state to files of its own.
    fn write(&self, name: &str, files: &Files) -> std::path::PathBuf {
        let path = self.folder.path().join(name);
        let mut image = files.image.clone();
        if self.data.is_some() {
            // A name as long as the other.
            let find = |bytes: &[u8]| bytes == b"/data.raw";
            if let Some(at) = image.windows(9).take(4096).position(find) {
                image[at..at + 9].copy_from_slice(b"/copy.raw");
            }
            std::fs::write(self.folder.path().join("copy.raw"), &files.data).unwrap();
        }
        std::fs::write(&path, image).unwrap();
        path
    }

    /// Has qemu-img look at a state, too.
    pub fn ask_qemu(&self, files: &Files) {
        let path = self.write("state.qcow2", files);
        let checked = std::process::Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2", path.to_str().unwrap()])
            .output()
            .unwrap();
        // 3: there are leaks, and nothing else.
        let code = checked.status.code();
        let said = String::from_utf8_lossy(&checked.stdout);
        assert!(matches!(code, Some(0 | 3)), "{code:?}: {said}");
    }
}

/// What every sector may hold after a cut at `time`.
pub fn assert_survived(driver: &Driver, content: &[Option<[u8; 512]>], time: u64) {
    let flushed = driver
        .flushes
        .iter()
        .filter(|(_, done)| *done <= time)
        .map(|(begun, _)| *begun)
        .max()
        .unwrap_or(0);
    let mut flushed_sectors = vec![flushed; driver.sectors.len()];
    for (sector, begun, done) in &driver.durable {
        if *done <= time {
            let last = &mut flushed_sectors[*sector as usize];
            *last = (*last).max(begun + 1);
        }
    }
    for (number, (sector, bytes)) in (0..).zip(driver.sectors.iter().zip(content)) {
        let bytes = bytes.as_ref().unwrap();
        let flushed = flushed_sectors[number as usize];
        let begun: Vec<_> = sector.values.iter().filter(|v| v.0 <= time).collect();
        // The last that was complete before the flush began; nothing older may be there.
        let first = begun
            .iter()
            .rposition(|value| {
                value.1 < flushed
                    || (value.0 < flushed && value.1 <= time && {
                        // Written durably itself.
                        driver
                            .durable
                            .iter()
                            .any(|(s, b, d)| *s == number && *b == value.0 && *d <= time)
                    })
            })
            .unwrap_or(0);
        let found = stamp_of(bytes);
        let allowed = begun[first..].iter().any(|value| match value.2 {
            Value::Stamp(stamp) => found == Some(stamp),
            Value::Any => {
                sector.assert_known(bytes, number);
                true
            }
        });
        assert!(
            allowed,
            "cut at {time}, flushed at {flushed}: sector {number} holds {found:x?}, of {:x?}",
            sector.values
        );
    }
}

/// At every moment there is, once.
pub const ALL: u64 = u64::MAX;

pub fn power_cuts(setup: &Setup, seed: u64, operations: usize, cuts: u64) {
    let (mut driver, shared) = setup.driver(seed);
    driver.run(operations);
    assert!(driver.errors.is_empty(), "{:?}", driver.errors);
    let end = shared.lock().unwrap().now;
    let mut random = Random(seed ^ 0x5555);
    for cut in 0..cuts {
        let time = match cuts == ALL {
            true if cut > end => break,
            true => cut,
            false => random.below(end + 1),
        };
        let bytes = shared.lock().unwrap().after_cut(time, &mut random);
        let image = check::Image::new(&bytes);
        image.check();
        let content = image.content(setup.backing());
        assert_survived(&driver, &content, time);
        if image.has_autoclear() {
            // Nothing may have changed without the bitmap.
            for (number, (sector, bytes)) in (0..).zip(driver.sectors.iter().zip(&content)) {
                let first = &sector.values[..1];
                let then = Sector {
                    values: first.to_vec(),
                };
                then.assert_now(bytes.as_ref().unwrap(), number);
            }
        }
        if cut % 50 == 0 {
            setup.ask_qemu(&bytes);
        }
        if cut % 100 == 7 {
            reopen(setup, &bytes, seed + cut);
        }
    }
    println!("{} states", cuts.min(end + 1));
    driver.flush();
    driver.queue.close().unwrap();
    let bytes = shared.lock().unwrap().bytes.clone();
    let image = check::Image::new(&bytes);
    assert_eq!(image.check(), setup.given_up, "leaks");
    setup.ask_qemu(&bytes);
    driver.compare(&setup.content(&image));
}

/// Goes on with an image after a power cut.
fn reopen(setup: &Setup, bytes: &Files, seed: u64) {
    let path = setup.write("again.qcow2", bytes);
    let content = qemu::content(&path);
    let queue = writable(&options(&path, false, false)).for_test(false);
    let mut driver = Driver::new(queue, &content, seed);
    driver.run(60);
    assert!(driver.errors.is_empty(), "{:?}", driver.errors);
    driver.queue.close().unwrap();
    let data = setup
        .data
        .as_ref()
        .map(|data| data.with_file_name("copy.raw"));
    let bytes = Files {
        image: std::fs::read(&path).unwrap(),
        data: data.map_or(Vec::new(), |data| std::fs::read(data).unwrap()),
    };
    check::Image::new(&bytes).check();
    let Driver { queue, sectors, .. } = driver;
    drop(queue);
    setup.ask_qemu(&bytes);
    let after = qemu::content(&path);
    for (number, (sector, bytes)) in (0..).zip(sectors.iter().zip(after.chunks(512))) {
        sector.assert_now(bytes, number);
    }
}

const KINDS: [(&str, bool, bool); 9] = [
    ("cluster_size=64k", false, false),
    ("cluster_size=4k", false, false),
    ("cluster_size=512,refcount_bits=64", false, false),
    ("cluster_size=64k", true, false),
    ("cluster_size=4k", true, false),
    ("extended_l2=on,cluster_size=16k", true, false),
    ("extended_l2=on,cluster_size=64k", false, true),
    ("cluster_size=4k", false, true),
    ("compat=0.10,cluster_size=4k", true, true),
];

#[test]
fn a_power_cut_at_any_moment_leaves_leaks_at_most_and_loses_nothing_flushed() {
    let states = wanted("BALLAST_POWER_CUTS", 40);
    for (number, (kind, overlay, snapshot)) in (1..).zip(KINDS) {
        let Some(setup) = Setup::new(kind, overlay, snapshot, 2 * MIB) else {
            return;
        };
        for round in 1..=2 {
            power_cuts(&setup, seed(number * 1000 + round), 120, states);
        }
    }
}

#[test]
fn a_power_cut_at_every_moment_of_a_short_workload_is_survived() {
    for (number, (kind, overlay, snapshot)) in (50..).zip(KINDS) {
        let Some(setup) = Setup::new(kind, overlay, snapshot, MIB) else {
            return;
        };
        power_cuts(&setup, seed(number), 12, ALL);
    }
}

#[test]
fn a_power_cut_harms_neither_compressed_clusters_nor_bitmaps() {
    let states = wanted("BALLAST_POWER_CUTS", 40);
    let compressed = [
        "compat=1.1",
        "cluster_size=4k,compression_type=zstd",
        "extended_l2=on,cluster_size=16k",
        "compat=0.10,cluster_size=4k",
    ];
    for (number, kind) in (70..).zip(compressed) {
        let Some(setup) = Setup::compressed(kind, 2 * MIB) else {
            return;
        };
        power_cuts(&setup, seed(number * 1000), 120, states);
        power_cuts(&setup, seed(number * 1000 + 1), 12, ALL);
    }
    for (number, kind) in (80..).zip(["cluster_size=64k", "cluster_size=4k"]) {
        let Some(setup) = Setup::with_bitmap(kind, 2 * MIB) else {
            return;
        };
        power_cuts(&setup, seed(number * 1000), 120, states);
        power_cuts(&setup, seed(number * 1000 + 1), 12, ALL);
    }
}

/// Every operation on the host fails once, in turn.
pub fn faults(setup: &Setup, errno: Errno, step: u64) {
    let count = {
        let (mut driver, shared) = setup.driver(7);
        driver.run(60);
        driver.queue.close().unwrap();
        shared.lock().unwrap().changes
    };
    assert!(count > 60);
    for which in (0..count).step_by(step as usize) {
        let (mut driver, shared) = setup.driver(7);
        shared.lock().unwrap().fail = Some((which, errno));
        driver.run(60);
        let failed = driver.errors.len();
        let closing = shared.lock().unwrap().changes <= which;
        driver.queue.close().unwrap();
        assert!(shared.lock().unwrap().changes > which, "{which} of {count}");
        let bytes = shared.lock().unwrap().bytes.clone();
        let image = check::Image::new(&bytes);
        image.check();
        let lost = driver.queue.is_lost();
        // What was not flushed before is lost if it is the last flush that fails.
        if lost || closing {
            continue;
        }
        // One fault is told at most to one request of each kind that waited for it.
        assert!(failed <= usize::from(DEPTH), "{failed}");
        driver.compare(&setup.content(&image));
    }
}

#[test]
fn a_fault_of_the_host_is_told_and_harms_nothing_else() {
    for (kind, overlay, snapshot) in [
        ("cluster_size=4k", true, false),
        ("cluster_size=512,refcount_bits=64", false, false),
        ("extended_l2=on,cluster_size=16k", true, true),
    ] {
        let Some(setup) = Setup::new(kind, overlay, snapshot, 2 * MIB) else {
            return;
        };
        faults(&setup, Errno::IO, 7);
        faults(&setup, Errno::NOSPC, 7);
    }
}

#[test]
fn a_full_host_is_told_and_what_was_refused_succeeds_when_there_is_room() {
    for (kind, overlay) in [("cluster_size=64k", false), ("cluster_size=4k", true)] {
        let Some(setup) = Setup::new(kind, overlay, false, 4 * MIB) else {
            return;
        };
        let (mut driver, shared) = setup.driver(3);
        shared.lock().unwrap().room = 2 * MIB as usize;
        for _ in 0..20 {
            if driver.errors.is_empty() {
                driver.run(100);
            }
        }
        let full = |error: &io::Error| error.raw_os_error() == Some(libc::ENOSPC);
        let errors = &driver.errors;
        assert!(!errors.is_empty() && errors.iter().all(full), "{errors:?}");
        driver.flush();
        driver.errors.clear();
        shared.lock().unwrap().room = usize::MAX;
        driver.run(300);
        driver.flush();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        setup.assert_whole(&mut driver, &shared);
    }
}

#[test]
fn a_sync_that_fails_for_want_of_room_is_no_reason_to_try_again() {
    for errno in [Errno::NOSPC, Errno::DQUOT] {
        let Some(setup) = Setup::new("cluster_size=64k", false, false, 4 * MIB) else {
            return;
        };
        let (mut driver, shared) = setup.driver(3);
        driver.push(0, Operation::Write { durable: false }, 0, 8);
        driver.finish();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        shared.lock().unwrap().no_sync = Some(errno);
        driver.flush();
        // What the page cache has forgotten does not come back with the room.
        shared.lock().unwrap().no_sync = None;
        driver.flush();
        driver.push(0, Operation::Write { durable: false }, 8, 8);
        driver.finish();
        driver.flush();
        assert!(driver.queue.is_lost());
        let codes: Vec<_> = driver.errors.iter().map(io::Error::raw_os_error).collect();
        assert_eq!(codes, [Some(libc::EIO); 4]);
    }
}
