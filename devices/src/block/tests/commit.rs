//! Commits of disks while their guests use them, every thread inside its filter.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use super::enospc::Small;
use super::job::{
    BLOCK, PATIENCE, PLAIN, bytes_of, can_write, check, content, engines, over, speed, write_block,
};
use super::*;
use crate::block::job::{ConcludeError, Job, JobKind, JobStatus};
use crate::block::snapshot::snapshot;
use crate::block::{ImageType, LockGranularity};
use crate::disk::Format;
use crate::disk::qcow2::tests::qemu;

/// Begins a commit; who hears of it.
fn begin(block: &Block, speed: Option<NonZeroU64>) -> (Job, Receiver<()>) {
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

fn ready(job: &Job, told: &Receiver<()>) {
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
    for (number, setup) in engines().enumerate() {
        let folder = folder.path().join(number.to_string());
        std::fs::create_dir(&folder).unwrap();
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
