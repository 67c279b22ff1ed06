//! Disks that move on to overlays while their guests use them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::block::ImageType;
use crate::block::snapshot::{SnapshotError, snapshot};
use crate::config::Invalid;
use crate::disk::qcow2::tests::qemu;
use crate::disk::{Format, OpenOptions};

const BLOCK: usize = 4096;

const PLAIN: Setup = Setup {
    direct: false,
    sync: false,
    event_idx: true,
};

fn options(path: &Path, readonly: bool) -> OpenOptions {
    OpenOptions {
        readonly,
        disable_io_uring: true,
        backing_files: true,
        ..OpenOptions::new(path)
    }
}

fn can_open(format: Format, path: &Path, readonly: bool) -> bool {
    match crate::disk::open(format, &options(path, readonly)) {
        Ok(_) => true,
        Err(BuildError::Locked { .. }) => false,
        Err(other) => panic!("{other}"),
    }
}

/// A raw image of the usual content in the folder.
fn raw(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::copy(image().path(), &path).unwrap();
    path
}

/// What is on the disk of a qcow2 image that is in use.
fn content_in_use(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("oracle");
    let (from, to) = (path.display(), raw.display());
    qemu::img(&format!("convert -U -f qcow2 -O raw {from} {to}"));
    std::fs::read(&raw).unwrap()
}

fn numbered(number: u64) -> Vec<u8> {
    let word = (number | 1 << 63).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}

/// How many of the numbered blocks are in `content`; those must be the first.
fn count(content: &[u8]) -> u64 {
    let blocks = content.chunks(BLOCK).zip(0_u64..);
    let there: Vec<_> = blocks
        .map(|(block, number)| block == numbered(number))
        .collect();
    let count = there.iter().take_while(|there| **there).count();
    assert!(
        !there[count..].contains(&true),
        "a later write without an earlier one"
    );
    for (number, block) in content.chunks(BLOCK).enumerate().skip(count) {
        assert!(
            block == expected((number * BLOCK) as u64, BLOCK),
            "{number}"
        );
    }
    count as u64
}

#[test]
fn an_image_keeps_what_was_written_before_its_disk_moved_on_and_the_overlays_have_the_rest() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in engines_in(folder.path()) {
        let base = raw(&folder, "base.raw");
        let mut disk = Disk::on(&base, setup, serde_json::json!({}));
        // Of all that the image has.
        let blocks = 300;
        let done = AtomicU64::new(0);
        let Disk { block, driver, .. } = &mut disk;
        let block = &*block;
        let mut bounds = Vec::new();
        std::thread::scope(|scope| {
            let done = &done;
            let guest = scope.spawn(move || {
                for number in 0..blocks {
                    driver.write_at(number * 8, &numbered(number));
                    done.store(number + 1, Ordering::SeqCst);
                }
            });
            for round in 1..=3_u64 {
                while done.load(Ordering::SeqCst) < round * blocks / 5 {
                    std::thread::yield_now();
                }
                let before = done.load(Ordering::SeqCst);
                let overlay = folder.join(format!("overlay{round}"));
                snapshot(&[(block, &overlay)], true).unwrap();
                // One more may be on its way.
                bounds.push((before, done.load(Ordering::SeqCst) + 1));
            }
            guest.join().unwrap();
        });
        assert!(disk.io_errors().is_empty());
        assert_eq!(disk.flush(), OK);
        for number in 0..blocks {
            let (status, bytes) = disk.read(number * 8, BLOCK as u32);
            assert!(
                status == OK && bytes == numbered(number),
                "{setup:?}: {number}"
            );
        }
        drop(disk);
        let mut frozen = vec![std::fs::read(&base).unwrap()];
        for round in 1..=3 {
            let path = folder.join(format!("overlay{round}"));
            qemu::img(&format!("check -q -f qcow2 {}", path.display()));
            frozen.push(qemu::content(&path));
        }
        assert_eq!(count(&frozen[3]), blocks, "{setup:?}");
        for (content, (least, most)) in frozen.iter().zip(bounds) {
            let count = count(content);
            assert!(
                (least..=most).contains(&count),
                "{setup:?}: {least} {count} {most}"
            );
        }
    }
}

#[test]
fn thin_disks_move_on_with_all_that_was_not_flushed() {
    let Some(folder) = qemu::folder() else { return };
    for (number, (setup, folder)) in engines_in(folder.path()).enumerate() {
        let base = qemu::create(&folder, "base.qcow2", "cluster_size=4096", SIZE);
        qemu::scribble(&base, SIZE, 40, number as u64);
        let mut content = qemu::content(&base);
        let more = serde_json::json!({"image_type": "Qcow2"});
        let mut disk = Disk::on(&base, setup, more);
        let write = |disk: &mut Disk, content: &mut Vec<u8>, seed: u64| {
            for i in 0..60_u64 {
                let sector = (i * 331 + seed * 77) % (SIZE / 512 - 64);
                let bytes: Vec<u8> = (0..4096).map(|n| (n / 16 + i + seed) as u8).collect();
                assert_eq!(disk.write(sector, &bytes), OK, "{setup:?}");
                content[sector as usize * 512..][..4096].copy_from_slice(&bytes);
            }
            // DISCARD, and WRITE_ZEROES with what was discarded.
            let first = 4096 + seed * 64;
            assert_eq!(disk.range(11, first, 64, 0), OK);
            assert_eq!(disk.range(13, first, 64, 1), OK);
            content[first as usize * 512..][..64 * 512].fill(0);
        };
        let mut kept = Vec::new();
        for round in 0..3 {
            write(&mut disk, &mut content, round);
            let overlay = folder.join(format!("overlay{round}"));
            snapshot(&[(&disk.block, &overlay)], true).unwrap();
            kept.push((overlay, content.clone()));
        }
        write(&mut disk, &mut content, 9);
        for at in (0..SIZE).step_by(1 << 20) {
            let (status, bytes) = disk.read(at / 512, 1 << 20);
            assert_eq!(status, OK);
            assert!(
                bytes == content[at as usize..][..1 << 20],
                "{setup:?}: {at}"
            );
        }
        drop(disk);
        let images = std::iter::once(&base).chain(kept.iter().map(|(path, _)| path));
        let contents = kept.iter().map(|(_, content)| content);
        for (path, content) in images.zip(contents.chain([&content])) {
            qemu::img(&format!("check -q -f qcow2 {}", path.display()));
            assert!(qemu::content(path) == *content, "{setup:?}: {path:?}");
        }
    }
}

#[test]
fn the_image_below_is_locked_as_one_that_is_read_and_the_overlay_as_one_that_is_written() {
    let Some(folder) = qemu::folder() else { return };
    let base = raw(folder.path(), "base.raw");
    let overlay = folder.path().join("overlay");
    let disk = Disk::on(&base, PLAIN, serde_json::json!({}));
    assert!(!can_open(Format::Raw, &base, true));
    snapshot(&[(&disk.block, &overlay)], true).unwrap();
    assert!(can_open(Format::Raw, &base, true));
    assert!(!can_open(Format::Raw, &base, false));
    assert!(!can_open(Format::Qcow2, &overlay, true));
    let write = ["-f", "raw", "-c", "write 0 512", base.to_str().unwrap()];
    let output = std::process::Command::new("qemu-io").args(write).output();
    let text = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(text.contains("lock"), "{text}");
    assert!(content_in_use(&overlay) == expected(0, SIZE as usize));
    drop(disk);
    assert!(can_open(Format::Raw, &base, false));
    assert!(can_open(Format::Qcow2, &overlay, false));
}

#[test]
fn what_a_disk_says_of_itself_is_true_of_the_overlay() {
    let Some(folder) = qemu::folder() else { return };
    let base = raw(folder.path(), "base.raw");
    let overlay = folder.path().join("overlay");
    let mut disk = Disk::on(&base, PLAIN, serde_json::json!({}));
    let id = |disk: &mut Disk| {
        assert_eq!(disk.send(8, 0, &[(DATA, 20, true)]).0, OK);
        disk.driver.peek(DATA, 20)
    };
    let serial = id(&mut disk);
    snapshot(&[(&disk.block, &overlay)], true).unwrap();
    let info = disk.block.info("x").unwrap();
    assert_eq!(
        (info.path, info.image_type),
        (overlay.clone(), ImageType::Qcow2)
    );
    assert_eq!(info.virtual_size, SIZE);
    let below = &info.backing_chain[..];
    assert!(matches!(below, [one] if one.path == base && one.image_type == ImageType::Raw));
    assert_eq!(id(&mut disk), serial);
    let config = disk.block.config();
    config.validate().unwrap();
    drop(disk);
    // As after a reboot.
    let (block, events) = build(&config).unwrap();
    let mut driver = Driver::new(memory(), 0, config.queue_size, true);
    driver.activate(&block.workers()[0], 0);
    let image = image();
    let mut disk = Disk {
        block,
        driver,
        image,
        events,
    };
    assert_eq!(id(&mut disk), serial);
    let output = std::process::Command::new("qemu-img")
        .args(["info", "-U", "--output", "json", overlay.to_str().unwrap()])
        .output();
    let info: serde_json::Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["backing-filename"], base.to_str().unwrap());
    assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
}

/// Moves one on that must stay where it is, and says why it does.
fn refused(disks: &[(&Block, &Path)]) -> (usize, Invalid) {
    match snapshot(disks, true) {
        Err(SnapshotError::Disk(number, BuildError::Invalid(invalid))) => (number, invalid),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_disk_that_can_not_move_on_is_refused_and_goes_on_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (fifo, taken) = (at("fifo"), raw(folder.path(), "taken"));
    let mode = rustix::fs::Mode::RUSR;
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
    std::os::unix::fs::symlink(at("nowhere"), at("link")).unwrap();
    let base = raw(folder.path(), "base.raw");
    let mut disk = Disk::on(&base, PLAIN, serde_json::json!({}));
    let names = || std::fs::read_dir(folder.path()).unwrap().count();
    let before = names();
    let ends = [
        fifo,
        taken,
        at("link"),
        base.clone(),
        folder.path().into(),
        at("no/such/folder"),
        at(&"n".repeat(300)),
        at(".."),
        PathBuf::new(),
        PathBuf::from("/proc/overlay"),
        PathBuf::from("/dev/null"),
    ];
    for (number, path) in ends.iter().enumerate() {
        let (which, invalid) = refused(&[(&disk.block, path)]);
        assert_eq!((which, invalid.field.as_str()), (0, "path"), "{path:?}");
        assert_eq!(names(), before, "{path:?}");
        let sector = number as u64 * 8;
        assert_eq!(disk.write(sector, &numbered(number as u64)), OK);
        let mut bytes = vec![0; BLOCK];
        let file = File::open(&base).unwrap();
        file.read_exact_at(&mut bytes, sector * 512).unwrap();
        assert!(bytes == numbered(number as u64), "{path:?}");
        assert_eq!(disk.block.config().path, base);
    }
    for (more, reason) in [
        (serde_json::json!({"readonly": true}), "read-only"),
        (
            serde_json::json!({"num_queues": 33, "queue_size": 512}),
            "num_queues",
        ),
        (
            serde_json::json!({"lock_granularity": "Full"}),
            "lock_granularity",
        ),
    ] {
        let other = raw(folder.path(), "other");
        let disk = Disk::on(&other, PLAIN, more);
        let (_, invalid) = refused(&[(&disk.block, &at("overlay"))]);
        assert!(
            invalid.field == "id" && invalid.reason.contains(reason),
            "{invalid}"
        );
    }
    std::fs::rename(&base, at("elsewhere")).unwrap();
    let (_, invalid) = refused(&[(&disk.block, &at("overlay"))]);
    assert!(invalid.reason.contains("no longer"), "{invalid}");
    raw(folder.path(), "base.raw");
    let (_, invalid) = refused(&[(&disk.block, &at("overlay"))]);
    assert!(invalid.reason.contains("no longer"), "{invalid}");
    assert!(!at("overlay").exists());
    assert_eq!(disk.write(0, &numbered(7)), OK);
}

#[test]
fn of_several_disks_all_move_on_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let bases = ["a", "b", "c"].map(|name| raw(folder.path(), name));
    let mut disks = bases
        .each_ref()
        .map(|base| Disk::on(base, PLAIN, serde_json::json!({})));
    let names = ["oa", "ob", "oc"].map(at);
    fn pairs<'a>(disks: &'a [Disk; 3], names: &'a [PathBuf; 3]) -> Vec<(&'a Block, &'a Path)> {
        let blocks = disks.iter().map(|disk| &disk.block);
        blocks.zip(names.iter().map(PathBuf::as_path)).collect()
    }
    let there = |names: &[PathBuf; 3]| names.each_ref().map(|name| name.exists());

    // Found out at once, and only when the first have their names.
    std::fs::write(at("oc"), "mine").unwrap();
    assert_eq!(refused(&pairs(&disks, &names)).0, 2);
    assert_eq!(there(&names), [false, false, true]);
    std::fs::remove_file(at("oc")).unwrap();
    let same = [at("oa"), at("ob"), folder.path().join("./ob")];
    assert_eq!(refused(&pairs(&disks, &same)).0, 2);
    assert_eq!(there(&names), [false; 3]);
    let twice = [at("oa"), at("ob"), at("oa")];
    assert_eq!(refused(&pairs(&disks, &twice)).0, 2);
    for (disk, base) in disks.iter_mut().zip(&bases) {
        assert_eq!(disk.write(8, &numbered(1)), OK);
        assert_eq!(disk.flush(), OK);
        assert!(std::fs::read(base).unwrap()[BLOCK..2 * BLOCK] == numbered(1));
        assert!(
            !can_open(Format::Raw, base, true),
            "the lock is still a writer's"
        );
    }

    snapshot(&pairs(&disks, &names), true).unwrap();
    for (disk, base) in disks.iter_mut().zip(&bases) {
        assert_eq!(disk.write(16, &numbered(2)), OK);
        assert_eq!(disk.flush(), OK);
        assert!(std::fs::read(base).unwrap()[2 * BLOCK..3 * BLOCK] != numbered(2));
        assert!(disk.read(8, BLOCK as u32) == (OK, numbered(1)));
        assert!(disk.read(16, BLOCK as u32) == (OK, numbered(2)));
        assert!(disk.io_errors().is_empty());
    }
}

#[test]
fn a_disk_of_a_paused_vm_stays_paused_and_one_without_a_driver_moves_on_too() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let base = raw(folder.path(), "base.raw");
    let mut disk = Disk::on(&base, PLAIN, serde_json::json!({}));
    disk.pause();
    snapshot(&[(&disk.block, &at("one"))], false).unwrap();
    disk.write_when_resumed(&numbered(3));

    disk.reset();
    snapshot(&[(&disk.block, &at("two"))], true).unwrap();
    let mut driver = Driver::new(memory(), 0, 128, true);
    driver.activate(disk.worker(), 0);
    disk.driver = driver;
    assert!(disk.read(0, BLOCK as u32) == (OK, numbered(3)));
    assert_eq!(disk.write(8, &numbered(4)), OK);
    assert!(disk.read(8, BLOCK as u32) == (OK, numbered(4)));
    assert!(std::fs::read(&base).unwrap() == expected(0, SIZE as usize));
    let chain = disk.block.info("x").unwrap().backing_chain;
    let paths: Vec<_> = chain.into_iter().map(|below| below.path).collect();
    assert_eq!(paths, [at("one"), base]);
}
