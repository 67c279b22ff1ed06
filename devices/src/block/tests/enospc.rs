//! A host file system that is really full: a tmpfs of one MiB, sparse images in it, and the queue's
//! thread inside its real filter.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::worker::MAX_IN_FLIGHT;
use super::driver::BUFFERS;
use super::{Disk, IOERR, OK, SIZE, Setup, setups};
use crate::disk::qcow2::tests::qemu;
use crate::event::{DeviceEvent, HoldOutcome};
use crate::virtio::VirtioDevice;
use crate::worker::Order;

const MIB: u64 = 1 << 20;
/// Bytes of each write here.
const CHUNK: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// A file system of one MiB; gone when dropped.
pub struct Small(tempfile::TempDir);

impl Small {
    /// `None`, loudly, where nothing can be mounted.
    pub fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(folder.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(folder));
        }
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        None
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A sparse image.
    fn image(&self) -> PathBuf {
        let path = self.path("image");
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        path
    }

    /// Takes all the space there is.
    pub(super) fn fill(&self) {
        let mut file = File::create(self.path("filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    pub(super) fn make_space(&self) {
        fs::remove_file(self.path("filler")).unwrap();
    }

    /// Makes it a larger one.
    pub fn enlarge(&self) {
        let mounted = Command::new("mount")
            .args(["-o", "remount,size=64m"])
            .arg(self.0.path())
            .status();
        assert!(mounted.unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

impl Disk {
    /// Offers a write of [`CHUNK`] bytes of `fill` at `offset`, and rings.
    pub(super) fn begin_write(&mut self, slot: u64, offset: u64, fill: u8) -> u16 {
        let data = BUFFERS + 0x2_0000 + slot * CHUNK;
        self.driver.poke(data, &vec![fill; CHUNK as usize]);
        self.begin_write_of(slot, offset, data, CHUNK as u32)
    }

    /// The same, of what lies at `data`.
    fn begin_write_of(&mut self, slot: u64, offset: u64, data: u64, len: u32) -> u16 {
        let header = BUFFERS + slot * 0x200;
        self.header(header, 1, offset / 512);
        self.driver.poke(header + 0x100, &[0xee]);
        let pieces = [
            (header, 16, false),
            (data, len, false),
            (header + 0x100, 1, true),
        ];
        let head = self.driver.chain(&pieces);
        self.driver.offer(head);
        self.driver.ring();
        head
    }

    pub(super) fn status(&self, slot: u64) -> u8 {
        self.driver.peek(BUFFERS + slot * 0x200 + 0x100, 1)[0]
    }

    pub(super) fn wait_until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn wait_held(&self, requests: u64) {
        self.wait_until("held", |disk| disk.block.hold.held().0 == requests);
    }

    fn outcomes(&self) -> Vec<HoldOutcome> {
        let events = self.events.lock().unwrap();
        let outcomes = events.iter().filter_map(|event| match event {
            DeviceEvent::DiskResumed { outcome } => Some(*outcome),
            _ => None,
        });
        outcomes.collect()
    }

    fn times_full(&self) -> usize {
        let events = self.events.lock().unwrap();
        let full = |event: &&DeviceEvent| matches!(event, DeviceEvent::DiskFull { .. });
        events.iter().filter(full).count()
    }
}

/// A disk in a file system that was filled after its first chunk was written.
fn full_disk(setup: Setup, more: Value) -> Option<(Small, Disk)> {
    let small = Small::new()?;
    let mut disk = Disk::on(&small.image(), setup, more);
    disk.begin_write(0, 0, 7);
    disk.driver.wait_used();
    assert_eq!(disk.status(0), OK);
    small.fill();
    Some((small, disk))
}

fn plain() -> Setup {
    Setup {
        direct: false,
        sync: false,
        event_idx: true,
    }
}

fn on_host(small: &Small, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK as usize];
    let file = File::open(small.path("image")).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn writes_that_lack_space_wait_for_it_and_all_else_goes_on() {
    for setup in setups() {
        let Some((small, mut disk)) = full_disk(setup, json!({})) else {
            return;
        };
        let held: Vec<u16> = (1..9)
            .map(|slot| disk.begin_write(slot, slot * CHUNK, slot as u8))
            .collect();
        disk.wait_held(8);
        assert_eq!(disk.block.hold.held(), (8, 8 * CHUNK), "{setup:?}");
        assert_eq!(disk.driver.try_used(), None);
        // What has its space is written over, and read; flushes are done.
        let over = disk.begin_write(0, 0, 9);
        assert_eq!(disk.driver.wait_used().0, over);
        assert_eq!(disk.status(0), OK);
        let flush = disk.flush();
        assert_eq!(flush, OK);
        let (status, bytes) = disk.read(0, 4096);
        assert_eq!((status, &bytes[..]), (OK, &[9; 4096][..]));
        small.make_space();
        let mut done: Vec<u16> = held.iter().map(|_| disk.driver.wait_used().0).collect();
        done.sort_unstable();
        let mut expected = held.clone();
        expected.sort_unstable();
        assert_eq!(done, expected, "each is given back once");
        for slot in 1..9 {
            assert_eq!(disk.status(slot), OK);
            assert!(
                on_host(&small, slot * CHUNK)
                    .iter()
                    .all(|b| *b == slot as u8)
            );
        }
        disk.wait_held(0);
        assert_eq!(disk.outcomes(), [HoldOutcome::Done]);
        assert_eq!(disk.times_full(), 1, "{setup:?}");
        assert!(disk.io_errors().is_empty());
        let events = disk.events.lock().unwrap();
        let Some(DeviceEvent::DiskFull {
            pause,
            needed_bytes,
            free_bytes,
            ..
        }) = events
            .iter()
            .find(|e| matches!(e, DeviceEvent::DiskFull { .. }))
        else {
            panic!("{events:?}");
        };
        assert!(!*pause && *needed_bytes == CHUNK);
        assert!(
            free_bytes.is_some_and(|free| free < CHUNK),
            "{free_bytes:?}"
        );
    }
}

#[test]
fn a_queue_full_of_held_writes_holds_no_more_and_loses_none() {
    for sync in [false, true] {
        let setup = Setup { sync, ..plain() };
        let Some((small, mut disk)) = full_disk(setup, json!({"queue_size": 16})) else {
            return;
        };
        // Five chains fill the table; the driver has no more, and a hostile one offers one twice.
        let heads: Vec<u16> = (1..6)
            .map(|slot| disk.begin_write(slot, slot * CHUNK, slot as u8))
            .collect();
        disk.wait_held(5);
        for _ in 0..11 {
            disk.driver.offer(heads[0]);
        }
        disk.driver.ring_anyway();
        disk.wait_held(16);
        for _ in 0..8 {
            disk.driver.offer(heads[1]);
        }
        disk.driver.ring_anyway();
        // An order that is carried out after the queue was looked at.
        disk.pause();
        disk.worker().order(Order::Resume);
        disk.wait_held(16);
        small.make_space();
        for _ in 0..5 + 11 + 8 {
            disk.driver.wait_used();
        }
        disk.wait_held(0);
        for slot in 1..6 {
            assert!(
                on_host(&small, slot * CHUNK)
                    .iter()
                    .all(|b| *b == slot as u8)
            );
        }
        assert_eq!(*disk.driver.signals.needs_reset.lock().unwrap(), 0);
    }
}

#[test]
fn what_fails_again_while_the_rest_of_very_much_succeeds_is_not_forgotten() {
    for sync in [true, false] {
        let setup = Setup { sync, ..plain() };
        let Some((small, mut disk)) = full_disk(setup, json!({})) else {
            return;
        };
        // As much as is tried at a time, of which none will fit; and one that will.
        let large = MAX_IN_FLIGHT / SIZE;
        for slot in 1..=large {
            disk.begin_write_of(slot, 0, BUFFERS + MIB, SIZE as u32);
        }
        let last = disk.begin_write(large + 1, CHUNK, 5);
        disk.wait_held(large + 1);
        small.make_space();
        assert_eq!(disk.driver.wait_used().0, last);
        assert_eq!(disk.block.hold.held(), (large, large * SIZE));
        // Nobody asks for it.
        small.enlarge();
        for _ in 0..large {
            disk.driver.wait_used();
        }
        assert!((1..=large + 1).all(|slot| disk.status(slot) == OK));
        disk.wait_held(0);
    }
}

#[test]
fn a_write_that_was_held_too_long_fails_and_it_is_told() {
    let more = json!({"enospc_grace_ms": 50});
    let Some((small, mut disk)) = full_disk(plain(), more) else {
        return;
    };
    let head = disk.begin_write(1, CHUNK, 1);
    assert_eq!(disk.driver.wait_used().0, head);
    assert_eq!(disk.status(1), IOERR);
    assert_eq!(disk.io_errors(), ["write"]);
    assert_eq!(disk.times_full(), 1);
    assert_eq!(disk.outcomes(), [HoldOutcome::Reported]);
    assert!(on_host(&small, 0).iter().all(|byte| *byte == 7));
}

#[test]
fn who_wants_the_guest_to_know_at_once_has_it_told() {
    for setup in setups() {
        let more = json!({"on_enospc": "report"});
        let Some((_small, mut disk)) = full_disk(setup, more) else {
            return;
        };
        disk.begin_write(1, CHUNK, 1);
        disk.driver.wait_used();
        assert_eq!(disk.status(1), IOERR);
        assert_eq!((disk.times_full(), disk.block.hold.held().0), (0, 0));
    }
}

#[test]
fn a_disk_that_holds_is_paused_and_resumed_and_reset_like_any_other() {
    for setup in setups() {
        let Some((small, mut disk)) = full_disk(setup, json!({})) else {
            return;
        };
        disk.begin_write(1, CHUNK, 1);
        disk.wait_held(1);
        disk.pause();
        small.make_space();
        disk.block.retry_held();
        assert_eq!(disk.driver.try_used(), None, "it is paused");
        disk.worker().order(Order::Resume);
        disk.driver.wait_used();
        assert_eq!(disk.status(1), OK);
        disk.wait_held(0);

        small.fill();
        disk.begin_write(2, 2 * CHUNK, 2);
        disk.wait_held(1);
        disk.reset();
        assert_eq!(disk.block.hold.held(), (0, 0));
        assert_eq!(disk.outcomes(), [HoldOutcome::Done, HoldOutcome::Reset]);
        small.make_space();
        let Disk { block, driver, .. } = &mut disk;
        driver.activate(&block.workers()[0], 0);
        let (status, bytes) = disk.read(2 * CHUNK / 512, 512);
        assert_eq!((status, &bytes[..]), (OK, &[0; 512][..]), "never written");

        small.fill();
        disk.begin_write(1, 3 * CHUNK, 3);
        disk.wait_held(1);
        // And a disk that goes away while it holds something does so.
        drop(disk);
    }
}

#[test]
fn a_pausing_disk_says_so_again_after_the_vm_was_resumed_in_vain() {
    let more = json!({"on_enospc": "pause-vm"});
    let Some((small, mut disk)) = full_disk(plain(), more) else {
        return;
    };
    disk.begin_write(1, CHUNK, 1);
    disk.wait_held(1);
    assert!(disk.block.wants_pause());
    disk.pause();
    disk.worker().order(Order::Resume);
    disk.wait_until("told twice", |disk| disk.times_full() == 2);
    disk.pause();
    small.make_space();
    disk.worker().order(Order::Resume);
    disk.driver.wait_used();
    assert_eq!(disk.status(1), OK);
    disk.wait_held(0);
    assert!(!disk.block.wants_pause());
    let events = disk.events.lock().unwrap();
    let paused = |e: &&DeviceEvent| matches!(e, DeviceEvent::DiskFull { pause: true, .. });
    assert_eq!(events.iter().filter(paused).count(), 2);
}

#[test]
fn a_hint_to_give_space_back_is_never_held() {
    // Punching a part of a page into a full tmpfs needs no space; what matters is that it ends.
    let Some((_small, mut disk)) = full_disk(plain(), json!({})) else {
        return;
    };
    assert_eq!(disk.range(11, 1, 3, 0), OK);
    assert_eq!(disk.range(13, 8, 8, 1), OK);
    assert_eq!(disk.block.hold.held().0, 0);
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn zeroes_take_space_or_give_it_back_as_is_configured() {
    for setup in setups() {
        for (mode, fresh, over) in [("off", true, true), ("unmap", false, false)] {
            let Some(small) = Small::new() else { return };
            let path = small.image();
            let mut disk = Disk::on(&path, setup, json!({"detect_zeroes": mode}));
            let case = format!("{setup:?} {mode}");
            let write = |disk: &mut Disk, fill| {
                disk.begin_write(0, CHUNK, fill);
                disk.driver.wait_used();
                assert_eq!(disk.status(0), OK, "{case}");
            };
            write(&mut disk, 0);
            assert_eq!(allocated(&path) > 0, fresh, "{case}");
            write(&mut disk, 5);
            assert_eq!(allocated(&path), CHUNK, "{case}");
            assert!(on_host(&small, CHUNK).iter().all(|byte| *byte == 5));
            write(&mut disk, 0);
            assert_eq!(allocated(&path) > 0, over, "{case}");
            assert!(on_host(&small, CHUNK).iter().all(|byte| *byte == 0));
            assert_eq!(disk.block.counters()["write_bytes"], 3 * CHUNK);
        }
    }
}

#[test]
fn zeroes_that_keep_their_space_are_zeroes_too_and_lack_space_like_data() {
    for setup in setups() {
        let more = json!({"detect_zeroes": "on"});
        let Some((small, mut disk)) = full_disk(setup, more) else {
            return;
        };
        let path = small.path("image");
        disk.begin_write(0, 0, 0);
        disk.driver.wait_used();
        assert_eq!((disk.status(0), allocated(&path)), (OK, CHUNK));
        assert!(on_host(&small, 0).iter().all(|byte| *byte == 0));
        disk.begin_write(1, CHUNK, 0);
        disk.wait_held(1);
        small.make_space();
        disk.driver.wait_used();
        assert_eq!((disk.status(1), allocated(&path)), (OK, 2 * CHUNK));
    }
}

#[test]
fn a_thin_image_that_lacks_space_waits_and_is_sound_after_that() {
    for setup in setups() {
        let Some(small) = Small::new() else { return };
        let Some(_) = qemu::folder() else { return };
        let path = small.path("image");
        qemu::img(&format!("create -q -f qcow2 {} {SIZE}", path.display()));
        let more = json!({"image_type": "Qcow2"});
        let mut disk = Disk::on(&path, setup, more);
        let mut done = 0;
        while done < 24 {
            disk.begin_write(0, done * CHUNK, done as u8 + 1);
            disk.wait_until("done or held", |disk| {
                disk.status(0) != 0xee || disk.block.hold.held().0 > 0
            });
            if disk.block.hold.held().0 > 0 {
                break;
            }
            disk.driver.wait_used();
            assert_eq!(disk.status(0), OK);
            done += 1;
        }
        let (held, _) = disk.block.hold.held();
        assert!(held > 0, "{setup:?}: {done} chunks do not fit into one MiB");
        assert!(disk.io_errors().is_empty(), "{setup:?}");
        small.enlarge();
        disk.block.retry_held();
        disk.driver.wait_used();
        assert_eq!(disk.status(0), OK);
        disk.wait_held(0);
        assert_eq!(disk.outcomes(), [HoldOutcome::Done], "{setup:?}");
        assert_eq!(disk.flush(), OK);
        disk.block.grow(2 * SIZE).unwrap();
        let info = disk.block.info("disk").unwrap();
        assert_eq!(
            (info.virtual_size, info.cluster_size),
            (2 * SIZE, Some(65536))
        );
        drop(disk);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        let content = qemu::content(&path);
        for (chunk, bytes) in content.chunks(CHUNK as usize).enumerate() {
            let fill = if chunk as u64 <= done {
                chunk as u8 + 1
            } else {
                0
            };
            assert!(bytes.iter().all(|byte| *byte == fill), "{setup:?} {chunk}");
        }
    }
}

/// What the test below starts as a process of its own: acknowledges as much as there is space for,
/// tells of it, and holds the rest until it is killed.
#[test]
#[ignore = "started by another test"]
fn acknowledging_child() {
    let path = PathBuf::from(std::env::var_os("BALLAST_TEST_IMAGE").unwrap());
    let sync = std::env::var("BALLAST_TEST_SYNC").unwrap() == "true";
    let setup = Setup { sync, ..plain() };
    let mut disk = Disk::on(&path, setup, json!({}));
    for chunk in 0..SIZE / CHUNK {
        disk.begin_write(0, chunk * CHUNK, chunk as u8 + 1);
        let mut out = std::io::stdout().lock();
        disk.wait_until("done or held", |disk| {
            disk.status(0) != 0xee || disk.block.hold.held().0 > 0
        });
        if disk.block.hold.held().0 > 0 {
            writeln!(out, "\nheld").unwrap();
            break;
        }
        disk.driver.wait_used();
        assert_eq!(disk.status(0), OK);
        writeln!(out, "\nacknowledged {chunk}").unwrap();
    }
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn what_was_acknowledged_survives_a_kill_while_the_rest_is_held() {
    use std::io::{BufRead, BufReader};
    for sync in [false, true] {
        let Some(small) = Small::new() else { return };
        let image = small.image();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "block::tests::enospc::acknowledging_child"])
            .args(["--ignored", "--nocapture"])
            .env("BALLAST_TEST_IMAGE", &image)
            .env("BALLAST_TEST_SYNC", sync.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = Vec::new();
        for line in lines.map_while(Result::ok) {
            if line == "held" {
                break;
            }
            if let Some(chunk) = line.strip_prefix("acknowledged ") {
                acknowledged.push(chunk.parse::<u64>().unwrap());
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            acknowledged.len() as u64 >= MIB / CHUNK / 2,
            "{acknowledged:?}"
        );
        for chunk in acknowledged {
            let fill = chunk as u8 + 1;
            assert!(on_host(&small, chunk * CHUNK).iter().all(|b| *b == fill));
        }
        // And nobody is in the way of opening it again. A ring that a killed process leaves behind
        // keeps the file, and its lock, until the kernel has got to taking it down.
        if !sync {
            continue;
        }
        let mut disk = Disk::on(&image, plain(), json!({}));
        let (status, bytes) = disk.read(0, 512);
        assert_eq!((status, &bytes[..]), (OK, &[1; 512][..]));
    }
}
