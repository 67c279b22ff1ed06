//! Commits on a host without space.

use super::*;

/// An empty base on a file system without much room, and an overlay elsewhere.
fn over_full(small: &Small, folder: &Path, format: Format) -> (PathBuf, PathBuf) {
    let base = small.path("base");
    let (shown, format) = (base.display(), format.name());
    qemu::img(&format!("create -q -f {format} {shown} {SIZE}"));
    let options = format!("backing_file={shown},backing_fmt={format}");
    let path = qemu::create(folder, &format!("{format}.qcow2"), &options, SIZE);
    (base, path)
}

/// A commit of a disk that shows this comes to its end, and all is in the base.
fn goes_on(mut disk: Disk, (base, format): (&Path, Format), expected: &[u8]) {
    let (mut job, told) = begin(&disk.block, None);
    ready(&job, &told);
    job.conclude(&disk.block, true).unwrap();
    assert!(content(&mut disk) == expected);
    assert!(disk.io_errors().is_empty());
    drop((job, disk));
    assert!(content_of(base, format) == expected);
}

#[test]
fn a_base_without_space_ends_a_commit_and_with_more_space_another_goes_on() {
    let Some(folder) = qemu::folder() else { return };
    for (sync, format) in [(false, Format::Raw), (true, Format::Qcow2)] {
        let Some(small) = Small::new() else { return };
        let (base, path) = over_full(&small, folder.path(), format);
        let mut disk = Disk::on(&path, Setup { sync, ..PLAIN }, reporting());
        let mut expected = vec![0; SIZE as usize];
        for at in (0..SIZE).step_by(1 << 20) {
            let bytes: Vec<u8> = bytes_of(at + 1).repeat(128);
            assert_eq!(disk.write(at / 512, &bytes), OK);
            expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let (job, told) = begin(&disk.block, None);
        told.recv_timeout(PATIENCE).unwrap();
        let JobStatus::Failed(reason) = job.view().status else {
            panic!("{:?}", job.view());
        };
        assert!(reason.contains("No space left"), "{reason}");
        assert!(reason.contains("base"), "{reason}");
        drop(job);
        assert!(content(&mut disk) == expected);
        assert_eq!(disk.flush(), OK);
        assert!(content_shared(&path) == expected);
        small.enlarge();
        goes_on(disk, (&base, format), &expected);
    }
}

#[test]
fn a_base_without_space_for_the_rest_leaves_the_disk_on_its_image() {
    let Some(folder) = qemu::folder() else { return };
    for (sync, format) in [(true, Format::Raw), (false, Format::Qcow2)] {
        let Some(small) = Small::new() else { return };
        let (base, path) = over_full(&small, folder.path(), format);
        let mut disk = Disk::on(&path, Setup { sync, ..PLAIN }, reporting());
        let (mut job, told) = begin(&disk.block, None);
        ready(&job, &told);
        small.fill();
        let mut expected = vec![0; SIZE as usize];
        for at in (0..SIZE).step_by(1 << 20).take(3) {
            let bytes: Vec<u8> = bytes_of(at + 1).repeat(16);
            assert_eq!(disk.write(at / 512, &bytes), OK);
            expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let error = job.conclude(&disk.block, true).unwrap_err().to_string();
        assert!(error.contains("stays on its image"), "{error}");
        assert!(error.contains("No space left"), "{error}");
        let JobStatus::Failed(reason) = job.end().status else {
            panic!("{error}");
        };
        assert!(error.contains(&reason), "{reason}");
        assert_eq!(disk.block.config().path, path);
        assert!(content(&mut disk) == expected);
        assert_eq!(disk.flush(), OK);
        assert!(content_shared(&path) == expected);
        small.make_space();
        goes_on(disk, (&base, format), &expected);
    }
}

#[test]
fn what_an_image_without_space_could_not_take_goes_to_the_base() {
    const WRITES: u64 = 24;
    let Some(folder) = qemu::folder() else { return };
    for sync in [false, true] {
        let Some(small) = Small::new() else { return };
        let base = folder.path().join("base.raw");
        std::fs::copy(image().path(), &base).unwrap();
        let options = format!("backing_file={},backing_fmt=raw", base.display());
        let path = qemu::create(&small.path(""), "top.qcow2", &options, SIZE);
        let mut disk = Disk::on(&path, Setup { sync, ..PLAIN }, over());
        let mut expected = expected(0, SIZE as usize);
        let len = 64 << 10;
        for slot in 0..WRITES {
            let fill = slot as u8 + 1;
            disk.begin_write(slot, slot * len, fill);
            expected[(slot * len) as usize..][..len as usize].fill(fill);
        }
        disk.wait_until("writes are held", |disk| {
            let held = disk.block.info("x").unwrap().held_requests;
            let done = (0..WRITES).filter(|slot| disk.status(*slot) == OK).count() as u64;
            held > 0 && held + done == WRITES
        });
        let (mut job, told) = begin(&disk.block, None);
        ready(&job, &told);
        job.conclude(&disk.block, true).unwrap();
        disk.wait_until("all is written", |disk| {
            (0..WRITES).all(|slot| disk.status(slot) == OK)
        });
        assert!(disk.io_errors().is_empty());
        drop((job, disk));
        assert!(std::fs::read(&base).unwrap() == expected);
        check_leaky(&path);
    }
}
