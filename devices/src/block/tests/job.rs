//! Jobs on disks while their guests use them, every thread inside its filter.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::enospc::Small;
use super::*;
use crate::block::job::{Job, JobKind, JobStatus};
use crate::block::snapshot::snapshot;
use crate::config::Invalid;
use crate::disk::qcow2::tests::qemu;
use crate::disk::{Format, OpenOptions};

pub(super) const BLOCK: usize = 4096;
/// For what must come at some time, or the test fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) const PLAIN: Setup = Setup {
    direct: false,
    sync: false,
    event_idx: true,
};

pub(super) fn can_write(format: Format, path: &Path) -> bool {
    let options = OpenOptions {
        disable_io_uring: true,
        backing_files: true,
        ..OpenOptions::new(path)
    };
    match crate::disk::open(format, &options) {
        Ok(_) => true,
        Err(BuildError::Locked { .. }) => false,
        Err(other) => panic!("{other}"),
    }
}

/// A raw image of the usual content, and an overlay of it.
fn images(folder: &Path, options: &str) -> (PathBuf, PathBuf) {
    let base = folder.join("base.raw");
    std::fs::copy(image().path(), &base).unwrap();
    let options = format!("{options},backing_file={},backing_fmt=raw", base.display());
    let path = qemu::create(folder, "overlay.qcow2", &options, SIZE);
    (base, path)
}

pub(super) fn over() -> serde_json::Value {
    serde_json::json!({"image_type": "Qcow2", "backing_files": true})
}

/// One that does not wait for space.
pub(super) fn reporting() -> serde_json::Value {
    let mut config = over();
    config["on_enospc"] = "report".into();
    config
}

pub(super) fn speed(bytes: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(bytes)
}

/// Begins to stream; who hears of the end.
pub(super) fn begin(block: &Block, speed: Option<NonZeroU64>) -> (Job, Receiver<()>) {
    let (tell, told) = channel();
    let wake = Box::new(move || {
        let _ = tell.send(());
    });
    let job = block.begin_job(JobKind::Stream, speed, wake).unwrap();
    (job, told)
}

fn refused(block: &Block) -> Invalid {
    match block.begin_job(JobKind::Stream, None, Box::new(|| ())) {
        Err(BuildError::Invalid(invalid)) => invalid,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was begun"),
    }
}

pub(super) fn bytes_of(number: u64) -> Vec<u8> {
    let word = (number | 1 << 63).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}

/// All of the disk as the guest reads it.
pub(super) fn content(disk: &mut Disk) -> Vec<u8> {
    let pieces = (0..SIZE).step_by(1 << 20).map(|at| {
        let (status, bytes) = disk.read(at / 512, 1 << 20);
        assert_eq!(status, OK, "{at}");
        bytes
    });
    pieces.collect::<Vec<_>>().concat()
}

pub(super) fn check(path: &Path) {
    qemu::img(&format!("check -q -f qcow2 {}", path.display()));
}

#[test]
fn a_disk_in_use_comes_to_stand_alone_and_what_was_below_it_is_free() {
    let Some(folder) = qemu::folder() else { return };
    let kinds = [
        "cluster_size=64k",
        "cluster_size=4k",
        "extended_l2=on,cluster_size=64k",
        "compat=0.10",
    ];
    for (number, ((setup, folder), kind)) in engines_in(folder.path()).zip(kinds).enumerate() {
        let (base, path) = images(&folder, kind);
        let mut expected = expected(0, SIZE as usize);
        let mut disk = Disk::on(&path, setup, over());
        assert!(!can_write(Format::Raw, &base));
        let done = AtomicBool::new(false);
        let mut writes = Vec::new();
        let (mut job, told) = begin(&disk.block, speed(64 << 20));
        std::thread::scope(|scope| {
            let Disk { block, driver, .. } = &mut disk;
            let (done, writes) = (&done, &mut writes);
            scope.spawn(move || {
                let mut random = qemu::Random(number as u64);
                // Some while it goes on, and some when it is over.
                let mut left = 40;
                while left > 0 {
                    left -= u64::from(done.load(Ordering::SeqCst));
                    let block = random.below(SIZE / BLOCK as u64);
                    let stamp = random.below(u64::MAX >> 1);
                    driver.write_at(block * 8, &bytes_of(stamp));
                    writes.push((block, stamp));
                }
            });
            told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(job.view().status, JobStatus::Ready, "{setup:?}");
            assert!(block.has_job());
            job.conclude(block, true).unwrap();
            done.store(true, Ordering::SeqCst);
        });
        let view = job.view();
        assert_eq!((view.done_bytes, view.total_bytes), (SIZE, SIZE));
        assert!(view.copied_bytes > 0 && view.copied_bytes <= SIZE);
        drop(job);
        assert!(!disk.block.has_job());
        for (block, stamp) in writes {
            expected[block as usize * BLOCK..][..BLOCK].copy_from_slice(&bytes_of(stamp));
        }
        assert!(content(&mut disk) == expected, "{setup:?}");
        assert!(disk.block.info("x").unwrap().backing_chain.is_empty());
        assert!(can_write(Format::Raw, &base));
        assert!(!can_write(Format::Qcow2, &path), "the lock was given up");
        assert_eq!(refused(&disk.block).field, "id");
        assert!(disk.io_errors().is_empty());
        // Nobody needs it any more; and a disk that stands alone moves on, and grows.
        std::fs::remove_file(&base).unwrap();
        let next = folder.join("next");
        snapshot(&[(&disk.block, &next)], true).unwrap();
        assert_eq!(disk.write(0, &bytes_of(7)), OK);
        disk.block.grow(SIZE + 65536).unwrap();
        assert_eq!(disk.flush(), OK);
        drop(disk);
        check(&path);
        check(&next);
        assert!(qemu::content(&path) == expected, "{setup:?}");
    }
}

#[test]
fn a_job_that_is_cancelled_leaves_the_disk_as_it_was_and_another_goes_on() {
    let Some(folder) = qemu::folder() else { return };
    let (base, path) = images(folder.path(), "cluster_size=4k");
    let mut disk = Disk::on(&path, PLAIN, over());
    // Each copies a piece of eight at most.
    for round in 0..6 {
        // So slow that it would not end in a day; a piece is copied at once.
        let (job, told) = begin(&disk.block, speed(1));
        if round % 2 == 0 {
            while job.view().copied_bytes == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(job.view().status, JobStatus::Running);
        job.cancel();
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Cancelled);
        assert!(disk.block.has_job(), "until it is dropped");
        drop(job);
        assert_eq!(disk.write(round * 64, &bytes_of(round)), OK);
    }
    // One that is dropped is cancelled.
    drop(begin(&disk.block, speed(1)));
    assert!(!can_write(Format::Raw, &base), "it is still needed");
    let before = content(&mut disk);
    let (job, told) = begin(&disk.block, speed(1));
    assert_eq!(job.view().speed, speed(1));
    job.set_speed(None);
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(job.view().speed, None);
    // What is ready stays so.
    job.cancel();
    assert_eq!(job.view().status, JobStatus::Ready);
    // One that nobody concludes has done no harm, and another can.
    drop(job);
    assert!(!can_write(Format::Raw, &base), "it is still open");
    assert_eq!(disk.write(0, &before[..BLOCK]), OK);
    assert!(content(&mut disk) == before);
    let (mut job, told) = begin(&disk.block, None);
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(job.view().copied_bytes, 0);
    job.conclude(&disk.block, true).unwrap();
    assert!(content(&mut disk) == before);
    drop(disk);
    check(&path);
    assert!(qemu::content(&path) == before);
}

#[test]
fn all_of_a_chain_comes_into_its_topmost_image() {
    let Some(folder) = qemu::folder() else { return };
    let kinds = [
        ("cluster_size=64k", "cluster_size=4k", "cluster_size=64k"),
        ("cluster_size=64k", "compat=0.10", "cluster_size=4k"),
        (
            "extended_l2=on",
            "cluster_size=512",
            "extended_l2=on,cluster_size=16k",
        ),
        ("cluster_size=4k", "extended_l2=on", "cluster_size=1M"),
    ];
    for (number, ((setup, folder), kind)) in engines_in(folder.path()).zip(kinds).enumerate() {
        let seed = number as u64 * 10;
        let plain = qemu::create(&folder, "plain.qcow2", "", SIZE);
        qemu::scribble(&plain, SIZE, 40, seed);
        let base = folder.join("base.qcow2");
        let (from, to, options) = (plain.display(), base.display(), kind.0);
        qemu::img(&format!("convert -c -O qcow2 -o {options} {from} {to}"));
        // What is above may be larger than what is below, and smaller.
        let over = |below: &Path, name: &str, options: &str, size: u64| {
            let below = below.display();
            let options = format!("{options},backing_file={below},backing_fmt=qcow2");
            let path = qemu::create(&folder, name, &options, size);
            qemu::scribble(&path, size, 30, seed + size % 7);
            path
        };
        let middle = over(&base, "middle.qcow2", kind.1, SIZE + 5 * 512);
        let path = over(&middle, "top.qcow2", kind.2, SIZE + 8 * 512);
        let expected = qemu::content(&path);
        let disk = Disk::on(&path, setup, self::over());
        assert_eq!(disk.block.info("x").unwrap().backing_chain.len(), 2);
        let (mut job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready, "{kind:?}");
        job.conclude(&disk.block, true).unwrap();
        drop((job, disk));
        std::fs::remove_file(&base).unwrap();
        std::fs::remove_file(&middle).unwrap();
        check(&path);
        assert!(qemu::content(&path) == expected, "{kind:?}");
    }
}

#[test]
fn a_disk_with_a_job_keeps_its_image_and_its_size() {
    let Some(folder) = qemu::folder() else { return };
    let (_, path) = images(folder.path(), "cluster_size=64k");
    let mut disk = Disk::on(&path, PLAIN, over());
    let (mut job, _) = begin(&disk.block, speed(1));
    let reason = refused(&disk.block).reason;
    assert!(reason.contains("a job"), "{reason}");
    let next = folder.path().join("next");
    let error = snapshot(&[(&disk.block, &next)], true).unwrap_err();
    assert!(error.to_string().contains("a job"), "{error}");
    let error = disk.block.grow(SIZE * 2).unwrap_err();
    assert!(error.to_string().contains("a job"), "{error}");
    job.conclude(&disk.block, true).unwrap_err();
    drop(job);
    disk.block.grow(SIZE * 2).unwrap();
    snapshot(&[(&disk.block, &next)], true).unwrap();
    assert!(content(&mut disk) == expected(0, SIZE as usize));
}

#[test]
fn a_job_goes_on_while_the_vm_is_paused_and_the_disk_stays_paused() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let (base, path) = images(&folder, "cluster_size=64k");
        let mut disk = Disk::on(&path, setup, over());
        assert_eq!(disk.write(8, &bytes_of(1)), OK);
        disk.pause();
        let (mut job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready);
        job.conclude(&disk.block, false).unwrap();
        assert!(can_write(Format::Raw, &base));
        disk.write_when_resumed(&bytes_of(2));
        // A disk that has no driver, too.
        disk.reset();
        let mut expected = expected(0, SIZE as usize);
        expected[..BLOCK].copy_from_slice(&bytes_of(2));
        expected[BLOCK..2 * BLOCK].copy_from_slice(&bytes_of(1));
        drop((job, disk));
        check(&path);
        assert!(qemu::content(&path) == expected);
    }
}

#[test]
fn a_reset_does_not_end_a_job_and_the_end_of_the_disk_does() {
    let Some(folder) = qemu::folder() else { return };
    let (_, path) = images(folder.path(), "cluster_size=4k");
    let disk = Disk::on(&path, PLAIN, over());
    let (mut job, told) = begin(&disk.block, speed(1 << 20));
    for _ in 0..5 {
        disk.reset();
    }
    job.set_speed(None);
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(job.view().status, JobStatus::Ready);
    // Before it was concluded: nothing is lost.
    drop(disk);
    check(&path);
    assert!(qemu::content(&path) == expected(0, SIZE as usize));
    let disk = Disk::on(&path, PLAIN, serde_json::json!({"image_type": "Qcow2"}));
    let error = job.conclude(&disk.block, true).unwrap_err();
    assert!(error.to_string().contains("another disk"), "{error}");
    drop((job, disk));

    std::fs::create_dir(folder.path().join("2")).unwrap();
    let (_, path) = images(&folder.path().join("2"), "cluster_size=4k");
    let disk = Disk::on(&path, PLAIN, over());
    let (job, told) = begin(&disk.block, speed(1));
    drop(disk);
    job.set_speed(None);
    told.recv_timeout(PATIENCE).unwrap();
    let JobStatus::Failed(reason) = job.view().status else {
        panic!("{:?}", job.view());
    };
    assert!(reason.contains("gone"), "{reason}");
    drop(job);
    check(&path);
    assert!(qemu::content(&path) == expected(0, SIZE as usize));
}

#[test]
fn what_can_not_be_read_below_ends_a_job_and_says_where() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let (base, path) = images(&folder, "cluster_size=64k");
        let mut disk = Disk::on(&path, setup, over());
        let file = File::options().write(true).open(&base).unwrap();
        file.set_len(SIZE / 2).unwrap();
        let (mut job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        let JobStatus::Failed(reason) = job.view().status else {
            panic!("{:?}", job.view());
        };
        let place = format!("at byte {}", SIZE / 2);
        assert!(reason.starts_with(&place), "{reason}");
        job.conclude(&disk.block, true).unwrap_err();
        drop(job);
        assert!(disk.io_errors().is_empty());
        file.write_all_at(&expected(SIZE / 2, SIZE as usize / 2), SIZE / 2)
            .unwrap();
        assert!(content(&mut disk) == expected(0, SIZE as usize));
        let (mut job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        job.conclude(&disk.block, true).unwrap();
        assert!(content(&mut disk) == expected(0, SIZE as usize));
        drop((job, disk));
        check(&path);
    }
}

#[test]
fn a_host_that_is_full_ends_a_job_that_does_not_wait_and_with_more_space_another_goes_on() {
    let Some(folder) = qemu::folder() else { return };
    for sync in [false, true] {
        let Some(small) = Small::new() else { return };
        let (base, _) = images(folder.path(), "cluster_size=64k");
        let options = format!("backing_file={},backing_fmt=raw", base.display());
        let path = qemu::create(&small.path(""), "top.qcow2", &options, SIZE);
        let mut disk = Disk::on(&path, Setup { sync, ..PLAIN }, reporting());
        let (job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        let JobStatus::Failed(reason) = job.view().status else {
            panic!("{:?}", job.view());
        };
        assert!(reason.contains("No space left"), "{reason}");
        drop(job);
        assert!(content(&mut disk) == expected(0, SIZE as usize));
        assert!(disk.io_errors().is_empty());
        small.enlarge();
        let (mut job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        job.conclude(&disk.block, true).unwrap();
        assert!(content(&mut disk) == expected(0, SIZE as usize));
        drop((job, disk));
        check(&path);
        assert!(qemu::content(&path) == expected(0, SIZE as usize));
        std::fs::remove_file(folder.path().join("overlay.qcow2")).unwrap();
    }
}

#[test]
fn a_disk_that_can_not_come_to_stand_alone_is_refused_and_says_why() {
    let Some(folder) = qemu::folder() else { return };
    let (base, path) = images(folder.path(), "cluster_size=64k");
    let with = |more: &[(&str, serde_json::Value)]| {
        let mut config = over();
        for (name, value) in more {
            config[name] = value.clone();
        }
        config
    };
    let alone = qemu::create(folder.path(), "alone.qcow2", "", SIZE);
    let cases = [
        (&base, serde_json::json!({}), "no backing file"),
        (&alone, over(), "no backing file"),
        (&path, with(&[("readonly", true.into())]), "read-only"),
        (
            &path,
            with(&[("lock_granularity", "Full".into())]),
            "lock_granularity",
        ),
    ];
    for (path, config, reason) in cases {
        let disk = Disk::on(path, PLAIN, config);
        let invalid = refused(&disk.block);
        assert_eq!(invalid.field, "id");
        assert!(invalid.reason.contains(reason), "{invalid}");
        assert!(!disk.block.has_job());
    }
    qemu::img(&format!("snapshot -c one {}", path.display()));
    let disk = Disk::on(&path, PLAIN, over());
    let invalid = refused(&disk.block);
    assert!(invalid.reason.contains("snapshots inside"), "{invalid}");
}

#[test]
fn a_disk_over_an_image_with_a_data_file_moves_on_grows_and_comes_to_stand_alone() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let (raw, data) = (folder.join("base.raw"), folder.join("base.data"));
        std::fs::copy(image().path(), &raw).unwrap();
        let base = folder.join("base.qcow2");
        qemu::img(&format!(
            "convert -f raw -O qcow2 -o data_file={} {} {}",
            data.display(),
            raw.display(),
            base.display()
        ));
        let options = format!("backing_file={},backing_fmt=qcow2", base.display());
        let path = qemu::create(&folder, "overlay.qcow2", &options, SIZE);
        let mut expected = expected(0, SIZE as usize);
        let mut disk = Disk::on(&path, setup, over());
        let mut write = |disk: &mut Disk, block: usize| {
            assert_eq!(disk.write(block as u64 * 8, &bytes_of(block as u64)), OK);
            expected[block * BLOCK..][..BLOCK].copy_from_slice(&bytes_of(block as u64));
        };
        write(&mut disk, 1);
        let next = folder.join("next");
        snapshot(&[(&disk.block, &next)], true).unwrap();
        write(&mut disk, 2);
        assert_eq!(disk.block.info("x").unwrap().backing_chain.len(), 2);
        assert!(!can_write(Format::Raw, &data), "its lock was given up");
        let (mut job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready, "{setup:?}");
        job.conclude(&disk.block, true).unwrap();
        drop(job);
        assert!(can_write(Format::Raw, &data));
        for file in [&base, &data, &path] {
            std::fs::remove_file(file).unwrap();
        }
        write(&mut disk, 3);
        disk.block.grow(SIZE + 65536).unwrap();
        assert!(content(&mut disk) == expected, "{setup:?}");
        assert!(disk.io_errors().is_empty());
        drop(disk);
        check(&next);
    }
}
