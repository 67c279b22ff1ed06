//! Disks whose data is in a file beside the image, every thread inside its filter.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use super::enospc::Small;
use super::job::{BLOCK, PATIENCE, PLAIN, can_write, check, content, over};
use super::*;
use crate::block::job::{JobKind, JobStatus};
use crate::block::snapshot::snapshot;
use crate::disk::Format;
use crate::disk::qcow2::tests::qemu;

const KINDS: [&str; 4] = [
    "cluster_size=64k",
    "data_file_raw=on",
    "extended_l2=on,cluster_size=128k",
    "data_file_raw=on,cluster_size=4k",
];

/// An image and its data file, of the usual content.
fn images(folder: &Path, kind: &str) -> (PathBuf, PathBuf) {
    let (raw, data) = (folder.join("source.raw"), folder.join("a.data"));
    std::fs::copy(image().path(), &raw).unwrap();
    let path = folder.join("a.qcow2");
    let (from, to) = (raw.display(), path.display());
    let options = format!("{kind},data_file={}", data.display());
    qemu::img(&format!("convert -f raw -O qcow2 -o {options} {from} {to}"));
    (path, data)
}

/// What a guest does to a disk that it knows.
fn work(disk: &mut Disk, expected: &mut [u8], seed: u64) {
    for i in 0..60_u64 {
        let sector = (i * 331 + seed * 77) % (SIZE / 512 - 64);
        // O_DIRECT may ask for as much.
        let sector = sector / 8 * 8;
        let bytes: Vec<u8> = (0..4096).map(|n| (n / 16 + i + seed) as u8).collect();
        assert_eq!(disk.write(sector, &bytes), OK);
        expected[sector as usize * 512..][..4096].copy_from_slice(&bytes);
    }
    for (kind, first, flags) in [(11, 4096, 0), (13, 4096, 1), (13, 6000, 0)] {
        let first = first + seed * 64;
        assert_eq!(disk.range(kind, first, 200, flags), OK);
        if kind == 13 {
            expected[first as usize * 512..][..200 * 512].fill(0);
        }
    }
}

#[test]
fn a_data_file_is_written_to_grows_moves_on_and_its_overlay_comes_to_stand_alone() {
    let Some(folder) = qemu::folder() else { return };
    for ((setup, folder), kind) in engines_in(folder.path()).zip(KINDS) {
        let (path, data) = images(&folder, kind);
        let mut expected = expected(0, SIZE as usize);
        let mut disk = Disk::on(&path, setup, over());
        assert!(!can_write(Format::Raw, &data), "it is locked");
        work(&mut disk, &mut expected, 1);
        assert!(content(&mut disk) == expected, "{setup:?}");
        assert_eq!(disk.flush(), OK);
        if kind.contains("raw") {
            assert!(std::fs::read(&data).unwrap() == expected, "{setup:?}");
        }
        let info = disk.block.info("x").unwrap();
        assert_eq!(info.file_size, Some(SIZE), "of the data file");
        let more = SIZE + 65536;
        disk.block.grow(more).unwrap();
        disk.block.set_size();
        expected.resize(more as usize, 0);
        assert_eq!(disk.write(SIZE / 512, &[3; BLOCK]), OK);
        expected[SIZE as usize..][..BLOCK].fill(3);
        let next = folder.join("next");
        snapshot(&[(&disk.block, &next)], true).unwrap();
        let before = expected.clone();
        work(&mut disk, &mut expected, 2);
        let (tell, told) = channel();
        let wake = Box::new(move || {
            let _ = tell.send(());
        });
        let mut job = disk.block.begin_job(JobKind::Stream, None, wake).unwrap();
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready);
        job.conclude(&disk.block, true).unwrap();
        drop(job);
        assert!(can_write(Format::Raw, &data));
        assert!(disk.io_errors().is_empty());
        drop(disk);
        check(&path);
        check(&next);
        assert!(qemu::content(&path) == before, "{setup:?}");
        assert!(qemu::content(&next) == expected, "{setup:?}");
        if kind.contains("raw") {
            assert!(std::fs::read(&data).unwrap() == before, "{setup:?}");
        }
    }
}

#[test]
fn an_overlay_with_a_data_file_is_committed_and_gives_its_space_back() {
    use std::os::unix::fs::MetadataExt;
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let base = folder.join("base.raw");
        std::fs::copy(image().path(), &base).unwrap();
        let data = folder.join("a.data");
        let options = format!(
            "data_file={},backing_file={},backing_fmt=raw",
            data.display(),
            base.display()
        );
        let path = qemu::create(&folder, "a.qcow2", &options, SIZE);
        let mut expected = expected(0, SIZE as usize);
        let mut disk = Disk::on(&path, setup, over());
        work(&mut disk, &mut expected, 1);
        let (tell, told) = channel();
        let wake = Box::new(move || {
            let _ = tell.send(());
        });
        let mut job = disk.block.begin_job(JobKind::Commit, None, wake).unwrap();
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready);
        job.conclude(&disk.block, true).unwrap();
        drop(job);
        assert!(content(&mut disk) == expected, "{setup:?}");
        drop(disk);
        assert!(std::fs::read(&base).unwrap() == expected, "{setup:?}");
        check(&path);
        assert!(qemu::content(&path) == expected, "{setup:?}");
        assert_eq!(std::fs::metadata(&data).unwrap().blocks(), 0);
    }
}

#[test]
fn an_overlay_with_a_data_file_comes_to_stand_alone_and_goes_on() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let base = folder.join("base.raw");
        std::fs::copy(image().path(), &base).unwrap();
        let data = folder.join("a.data");
        let options = format!(
            "data_file={},backing_file={},backing_fmt=raw",
            data.display(),
            base.display()
        );
        let path = qemu::create(&folder, "a.qcow2", &options, SIZE);
        let mut expected = expected(0, SIZE as usize);
        let mut disk = Disk::on(&path, setup, over());
        work(&mut disk, &mut expected, 1);
        let (tell, told) = channel();
        let wake = Box::new(move || {
            let _ = tell.send(());
        });
        let mut job = disk.block.begin_job(JobKind::Stream, None, wake).unwrap();
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready);
        job.conclude(&disk.block, true).unwrap();
        drop(job);
        std::fs::remove_file(&base).unwrap();
        assert!(!can_write(Format::Raw, &data), "it is still locked");
        work(&mut disk, &mut expected, 2);
        assert!(content(&mut disk) == expected, "{setup:?}");
        assert!(disk.io_errors().is_empty());
        drop(disk);
        check(&path);
        assert!(qemu::content(&path) == expected, "{setup:?}");
    }
}

#[test]
fn a_base_with_a_data_file_is_not_committed_to_while_it_is_in_use() {
    let Some(folder) = qemu::folder() else { return };
    let (base, _) = images(folder.path(), KINDS[0]);
    let options = format!("backing_file={},backing_fmt=qcow2", base.display());
    let path = qemu::create(folder.path(), "top.qcow2", &options, SIZE);
    let disk = Disk::on(&path, PLAIN, over());
    match disk.block.begin_job(JobKind::Commit, None, Box::new(|| ())) {
        Err(BuildError::Invalid(wrong)) => {
            assert_eq!(wrong.field, "id");
            assert!(wrong.reason.contains("not supported yet"), "{wrong}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was begun"),
    }
}

#[test]
fn a_data_file_is_followed_only_where_the_configuration_says_so() {
    let Some(folder) = qemu::folder() else { return };
    let (path, _) = images(folder.path(), KINDS[0]);
    for readonly in [true, false] {
        let config: DiskConfig = serde_json::from_value(serde_json::json!({
            "path": path, "image_type": "Qcow2", "readonly": readonly,
        }))
        .unwrap();
        match build(&config) {
            Err(BuildError::Invalid(wrong)) => assert_eq!(wrong.field, "backing_files"),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was opened"),
        }
    }
}

#[test]
fn writes_wait_for_room_in_the_file_system_of_the_data_file() {
    let Some(folder) = qemu::folder() else { return };
    let Some(small) = Small::new() else { return };
    let data = small.path("data");
    let options = format!("data_file={}", data.display());
    let path = qemu::create(folder.path(), "a.qcow2", &options, SIZE);
    let mut more = over();
    more["on_enospc"] = "hold".into();
    let mut disk = Disk::on(&path, PLAIN, more);
    let info = disk.block.info("x").unwrap();
    assert_eq!(info.host_total, Some(1 << 20));
    assert_eq!(disk.write(0, &[1; 65536]), OK);
    small.fill();
    disk.begin_write(1, 1 << 20, 2);
    disk.wait_until("held", |disk| disk.block.hold.held().0 == 1);
    assert_eq!(disk.block.info("x").unwrap().host_free, Some(0));
    small.make_space();
    disk.wait_until("done", |disk| disk.status(1) == OK);
    disk.driver.wait_used();
    assert_eq!(disk.flush(), OK);
    drop(disk);
    check(&path);
    let content = qemu::content(&path);
    assert!(content[..65536] == [1; 65536] && content[1 << 20..][..65536] == [2; 65536]);
}
