//! Commits of disks while their guests use them, every thread inside its filter.

mod full;
mod refused;

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use super::enospc::Small;
use super::guest::Guest;
use super::job::{
    BLOCK, PATIENCE, PLAIN, bytes_of, can_write, check, content, over, reporting, speed,
};
use super::*;
use crate::block::ImageType;
use crate::block::job::{Job, JobKind, JobStatus};
use crate::block::snapshot::snapshot;
use crate::disk::Format;
use crate::disk::qcow2::tests::qemu;

/// Begins a commit; who hears of it.
pub(super) fn begin(block: &Block, speed: Option<NonZeroU64>) -> (Job, Receiver<()>) {
    let (tell, told) = channel();
    let wake = Box::new(move || {
        let _ = tell.send(());
    });
    let job = block.begin_job(JobKind::Commit, speed, wake).unwrap();
    (job, told)
}

fn refused(block: &Block) -> String {
    match block.begin_job(JobKind::Commit, None, Box::new(|| ())) {
        Err(BuildError::Invalid(invalid)) => {
            assert_eq!(invalid.field, "id");
            invalid.reason
        }
        Err(other) => other.to_string(),
        Ok(_) => panic!("it was begun"),
    }
}

pub(super) fn ready(job: &Job, told: &Receiver<()>) {
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(job.view().status, JobStatus::Ready);
}

/// What an image has, whatever its format.
fn content_of(path: &Path, format: Format) -> Vec<u8> {
    match format {
        Format::Raw => std::fs::read(path).unwrap(),
        Format::Qcow2 => qemu::content(path),
    }
}

/// What an image of a chain shows that this process has open.
fn content_shared(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("oracle");
    let (from, to) = (path.display(), raw.display());
    qemu::img(&format!("convert -U -f qcow2 -O raw {from} {to}"));
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// Nothing is wrong with it but leaks.
fn check_leaky(path: &Path) {
    let path = path.to_str().unwrap();
    let mut command = std::process::Command::new("qemu-img");
    let command = command.args(["check", "-U", "-f", "qcow2", path]);
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{told}");
}

/// What a file takes of the host's space.
fn space_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// An overlay of an image, with some content.
fn overlay(folder: &Path, base: (&Path, Format), options: &str, seed: u64) -> PathBuf {
    let (below, format) = (base.0.display(), base.1.name());
    let options = format!("{options},backing_file={below},backing_fmt={format}");
    let path = qemu::create(folder, "overlay.qcow2", &options, SIZE);
    qemu::scribble(&path, SIZE, 60, seed);
    path
}

/// A raw image of the usual content, and an overlay of it.
fn images(folder: &Path, options: &str) -> (PathBuf, PathBuf) {
    let base = folder.join("base.raw");
    std::fs::copy(image().path(), &base).unwrap();
    let path = overlay(folder, (&base, Format::Raw), options, 1);
    (base, path)
}

#[test]
fn a_disk_moves_down_to_its_raw_base_and_leaves_an_empty_image() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let (base, path) = images(&folder, "cluster_size=64k");
        let before = qemu::content(&path);
        let mut disk = Disk::on(&path, setup, over());
        let serial = disk.block.opened().image.serial();
        let (mut job, told) = begin(&disk.block, None);
        ready(&job, &told);
        assert!(disk.block.has_job());
        job.conclude(&disk.block, true).unwrap();
        let view = job.view();
        assert_eq!((view.status, view.done_bytes), (JobStatus::Ready, SIZE));
        assert!(view.copied_bytes > 0 && view.copied_bytes <= SIZE);
        drop(job);
        let config = disk.block.config();
        assert_eq!((&config.path, config.image_type), (&base, ImageType::Raw));
        assert_eq!(config.serial, Some(serial));
        config.validate().unwrap();
        assert!(disk.block.info("x").unwrap().backing_chain.is_empty());
        assert!(content(&mut disk) == before, "{setup:?}");
        assert!(!can_write(Format::Raw, &base), "nobody has it");
        assert!(!disk.block.has_job());
        // The image is nobody's any more, and shows the same for as long as the base stays.
        check_leaky(&path);
        assert!(content_shared(&path) == before, "{setup:?}");
        assert!(space_of(&path) < 1 << 20, "{}", space_of(&path));
        assert_eq!(disk.write(8, &bytes_of(5)), OK);
        assert_eq!(disk.flush(), OK);
        assert!(disk.io_errors().is_empty());
        // It moves on, and grows.
        disk.block.grow(SIZE + 65536).unwrap();
        let next = folder.join("next");
        snapshot(&[(&disk.block, &next)], true).unwrap();
        drop(disk);
        let mut expected = before;
        expected[BLOCK..2 * BLOCK].copy_from_slice(&bytes_of(5));
        expected.resize(SIZE as usize + 65536, 0);
        assert!(std::fs::read(&base).unwrap() == expected, "{setup:?}");
        assert!(qemu::content(&next) == expected);
        assert!(can_write(Format::Qcow2, &path));
        check_leaky(&path);
    }
}

#[test]
fn a_disk_of_several_queues_that_is_on_its_raw_base_is_refused_for_that_and_no_other_reason() {
    let Some(folder) = qemu::folder() else { return };
    let (_, path) = images(folder.path(), "cluster_size=64k");
    let mut config = over();
    config["num_queues"] = serde_json::json!(2);
    let disk = Disk::on(&path, PLAIN, config);
    let (mut job, told) = begin(&disk.block, None);
    ready(&job, &told);
    job.conclude(&disk.block, true).unwrap();
    drop(job);
    let reason = refused(&disk.block);
    assert!(reason.contains("has no backing file"), "{reason}");
    assert!(!disk.block.has_job());
}

/// Bases and overlays: the base's format and options, how it was made, and the overlay's options.
const KINDS: [(&str, &str, &str); 11] = [
    ("raw", "", "cluster_size=64k"),
    ("raw", "", "extended_l2=on,cluster_size=64k"),
    ("cluster_size=64k", "snapshot", "cluster_size=64k"),
    ("cluster_size=64k", "compressed", "cluster_size=4k"),
    (
        "extended_l2=on,cluster_size=64k",
        "snapshot",
        "cluster_size=4k",
    ),
    (
        "extended_l2=on,cluster_size=16k",
        "compressed",
        "extended_l2=on,cluster_size=64k",
    ),
    ("cluster_size=2M", "", "cluster_size=4k"),
    (
        "cluster_size=4k,refcount_bits=64",
        "chain",
        "cluster_size=2M",
    ),
    ("cluster_size=512", "compressed snapshot", "cluster_size=4k"),
    ("compat=0.10,cluster_size=4k", "chain", "cluster_size=64k"),
    ("cluster_size=64k", "", "compat=0.10,cluster_size=64k"),
];

/// Makes the base and the overlay of a kind.
fn of_kind(folder: &Path, kind: usize, seed: u64) -> (PathBuf, Format, PathBuf) {
    let (options, how, above) = KINDS[kind];
    if options == "raw" {
        let (base, path) = images(folder, above);
        return (base, Format::Raw, path);
    }
    let mut base = match how.contains("chain") {
        true => {
            let below = qemu::create(folder, "below.qcow2", "", SIZE);
            qemu::scribble(&below, SIZE, 40, seed + 1);
            let below = below.display();
            let options = format!("{options},backing_file={below},backing_fmt=qcow2");
            qemu::create(folder, "base.qcow2", &options, SIZE)
        }
        false => qemu::create(folder, "base.qcow2", options, SIZE),
    };
    qemu::scribble(&base, SIZE, 60, seed + 2);
    if how.contains("compressed") {
        let packed = folder.join("packed.qcow2");
        let (from, to) = (base.display(), packed.display());
        qemu::img(&format!("convert -c -O qcow2 -o {options} {from} {to}"));
        base = packed;
    }
    if how.contains("snapshot") {
        qemu::img(&format!("snapshot -c one {}", base.display()));
        qemu::scribble(&base, SIZE, 10, seed + 3);
    }
    let path = overlay(folder, (&base, Format::Qcow2), above, seed);
    (base, Format::Qcow2, path)
}

/// Has a guest end, whatever happens.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What an internal snapshot of an image has.
fn snapshot_of(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("snapshot");
    let (from, to) = (path.display(), raw.display());
    qemu::img(&format!("convert -U -l one -f qcow2 -O raw {from} {to}"));
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

#[test]
fn whatever_a_guest_does_meanwhile_is_on_its_disk_and_then_in_a_raw_base() {
    commit_while_it_is_used(0..2);
}

#[test]
fn whatever_a_guest_does_meanwhile_is_on_its_disk_and_then_in_a_qcow2_base() {
    commit_while_it_is_used(2..6);
}

#[test]
fn whatever_a_guest_does_meanwhile_is_in_a_base_with_other_clusters_too() {
    commit_while_it_is_used(6..9);
}

#[test]
fn whatever_a_guest_does_meanwhile_is_in_a_base_of_another_version_too() {
    commit_while_it_is_used(9..KINDS.len());
}

fn commit_while_it_is_used(kinds: impl Iterator<Item = usize>) {
    let Some(folder) = qemu::folder() else { return };
    let setups: Vec<Setup> = setups().filter(|s| s.event_idx == s.direct).collect();
    for kind in kinds {
        let folder = folder.path().join(kind.to_string());
        std::fs::create_dir(&folder).unwrap();
        let seed = kind as u64 * 100;
        let (base, format, path) = of_kind(&folder, kind, seed);
        let has_snapshot = KINDS[kind].1.contains("snapshot");
        let snapshot_before = has_snapshot.then(|| snapshot_of(&base));
        let mut setup = setups[kind % setups.len()];
        // With clusters that are smaller than what the host transfers there is no O_DIRECT.
        setup.direct &= !KINDS[kind].0.contains("512");
        let unit = if setup.direct { 8 } else { 1 };
        let before = qemu::content(&path);
        let mut disk = Disk::on(&path, setup, over());
        let (mut job, told) = begin(&disk.block, speed(64 << 20));
        let done = AtomicBool::new(false);
        let end = End(&done);
        let Disk { block, driver, .. } = &mut disk;
        let mut guest = Guest {
            driver,
            model: before,
            random: qemu::Random(seed),
        };
        std::thread::scope(|scope| {
            let (done, guest) = (&done, &mut guest);
            scope.spawn(move || {
                // Some while it goes on, and some when it is over.
                let mut left = 60;
                while left > 0 {
                    left -= u64::from(done.load(Ordering::SeqCst));
                    guest.step(unit);
                }
            });
            ready(&job, &told);
            job.conclude(block, true).unwrap();
            drop(end);
        });
        drop(job);
        let expected = guest.model;
        assert!(
            content(&mut disk) == expected,
            "{:?} {setup:?}",
            KINDS[kind]
        );
        assert!(disk.io_errors().is_empty());
        drop(disk);
        assert!(content_of(&base, format) == expected, "{:?}", KINDS[kind]);
        if format == Format::Qcow2 {
            check_leaky(&base);
            let mut again = Disk::on(&base, setup, over());
            assert!(content(&mut again) == expected, "{:?}", KINDS[kind]);
        }
        assert!(snapshot_before == has_snapshot.then(|| snapshot_of(&base)));
        check_leaky(&path);
        assert!(qemu::content(&path) == expected, "the image is not empty");
    }
}

#[test]
fn a_commit_that_ends_early_leaves_the_disk_as_it_was_and_another_goes_on() {
    let Some(folder) = qemu::folder() else { return };
    let setups: Vec<Setup> = setups().filter(|s| s.event_idx == s.direct).collect();
    for kind in [1, 5, 8] {
        let folder = folder.path().join(kind.to_string());
        std::fs::create_dir(&folder).unwrap();
        let seed = kind as u64 * 100 + 7;
        let (base, format, path) = of_kind(&folder, kind, seed);
        let mut setup = setups[(kind + 1) % setups.len()];
        setup.direct &= !KINDS[kind].0.contains("512");
        let unit = if setup.direct { 8 } else { 1 };
        let model = qemu::content(&path);
        let mut disk = Disk::on(&path, setup, over());
        let mut guest = Guest {
            driver: &mut disk.driver,
            model,
            random: qemu::Random(seed),
        };
        for round in 0..2_u64 {
            let (job, _) = begin(&disk.block, speed(8 << 20));
            let until = (round + 1) * (SIZE / 4);
            while job.view().done_bytes < until && job.view().status == JobStatus::Running {
                guest.step(unit);
            }
            // Killed here, it would be the same.
            guest.send(4, 0, &[]);
            assert!(content_shared(&path) == guest.model, "{:?}", KINDS[kind]);
            // It may be ready by now.
            assert_eq!(job.end().status, JobStatus::Cancelled, "{round}");
            assert!(!disk.block.has_job() && !can_write(format, &base));
            for _ in 0..10 {
                guest.step(unit);
            }
        }
        // One that is ready, and that nobody concludes.
        let (job, told) = begin(&disk.block, None);
        ready(&job, &told);
        for _ in 0..10 {
            guest.step(unit);
        }
        assert_eq!(job.end().status, JobStatus::Cancelled);
        let (mut job, told) = begin(&disk.block, None);
        ready(&job, &told);
        for _ in 0..10 {
            guest.step(unit);
        }
        job.conclude(&disk.block, true).unwrap();
        for _ in 0..20 {
            guest.step(unit);
        }
        let expected = guest.model;
        assert!(
            content(&mut disk) == expected,
            "{:?} {setup:?}",
            KINDS[kind]
        );
        drop((job, disk));
        assert!(content_of(&base, format) == expected, "{:?}", KINDS[kind]);
        if format == Format::Qcow2 {
            check_leaky(&base);
        }
    }
}

#[test]
fn a_commit_goes_on_while_the_vm_is_paused_and_the_disk_stays_paused() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let (base, path) = images(&folder, "cluster_size=64k");
        let mut expected = qemu::content(&path);
        let mut disk = Disk::on(&path, setup, over());
        assert_eq!(disk.write(8, &bytes_of(1)), OK);
        disk.pause();
        let (mut job, told) = begin(&disk.block, None);
        ready(&job, &told);
        job.conclude(&disk.block, false).unwrap();
        disk.write_when_resumed(&bytes_of(2));
        disk.reset();
        expected[..BLOCK].copy_from_slice(&bytes_of(2));
        expected[BLOCK..2 * BLOCK].copy_from_slice(&bytes_of(1));
        drop((job, disk));
        assert!(std::fs::read(&base).unwrap() == expected);
    }
}

#[test]
fn a_base_that_is_smaller_grows_first() {
    let Some(folder) = qemu::folder() else { return };
    let kinds = [("raw", ""), ("qcow2", "-o cluster_size=64k")];
    let kinds = kinds.into_iter().cycle();
    for ((setup, folder), (format, options)) in engines_in(folder.path()).zip(kinds) {
        let base = folder.join("base");
        let shown = base.display();
        qemu::img(&format!(
            "create -q -f {format} {options} {shown} {}",
            SIZE / 4
        ));
        let format = match format {
            "raw" => Format::Raw,
            _ => Format::Qcow2,
        };
        let path = overlay(&folder, (&base, format), "cluster_size=64k", 3);
        let expected = qemu::content(&path);
        let mut disk = Disk::on(&path, setup, over());
        let (mut job, told) = begin(&disk.block, None);
        ready(&job, &told);
        job.conclude(&disk.block, true).unwrap();
        assert!(content(&mut disk) == expected);
        assert_eq!(disk.write(SIZE / 512 - 8, &bytes_of(1)), OK);
        drop((job, disk));
        let mut expected = expected;
        let at = SIZE as usize - BLOCK;
        expected[at..].copy_from_slice(&bytes_of(1));
        assert!(content_of(&base, format) == expected, "{format:?}");
    }
}

#[test]
fn disks_move_up_and_down_again_and_again() {
    let Some(folder) = qemu::folder() else { return };
    for (number, (setup, folder)) in engines_in(folder.path()).enumerate() {
        let base = folder.join("base.qcow2");
        let format = match number % 2 {
            0 => {
                std::fs::copy(image().path(), &base).unwrap();
                Format::Raw
            }
            _ => {
                let (from, to) = (image(), base.display());
                let from = from.path().display().to_string();
                qemu::img(&format!("convert -f raw -O qcow2 {from} {to}"));
                Format::Qcow2
            }
        };
        let config = match format {
            Format::Raw => serde_json::json!({}),
            Format::Qcow2 => over(),
        };
        let mut disk = Disk::on(&base, setup, config);
        let mut guest = Guest {
            driver: &mut disk.driver,
            model: expected(0, SIZE as usize),
            random: qemu::Random(number as u64),
        };
        for round in 0..4 {
            let next = folder.join(format!("next{round}"));
            snapshot(&[(&disk.block, &next)], true).unwrap();
            for _ in 0..30 {
                guest.step(8);
            }
            let (mut job, told) = begin(&disk.block, None);
            ready(&job, &told);
            job.conclude(&disk.block, true).unwrap();
            assert_eq!(disk.block.config().path, base);
            for _ in 0..30 {
                guest.step(8);
            }
        }
        let expected = guest.model;
        assert!(content(&mut disk) == expected, "{setup:?}");
        drop(disk);
        assert!(content_of(&base, format) == expected, "{setup:?}");
        if format == Format::Qcow2 {
            // Leaks were searched for each time.
            check(&base);
        }
    }
}
