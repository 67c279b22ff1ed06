//! A thin disk, its threads inside their real filters.

use serde_json::json;

use super::*;
use crate::block::ImageType;
use crate::disk::qcow2::tests::qemu;

const MIB: u64 = 1 << 20;

/// An overlay with subclusters over a compressed image, and what is in it.
pub(super) fn overlay(folder: &std::path::Path) -> (std::path::PathBuf, Vec<u8>) {
    let source = qemu::create(folder, "source.qcow2", "", SIZE);
    qemu::scribble(&source, SIZE, 60, 1);
    let base = folder.join("base.qcow2");
    let (source, base) = (source.display(), base.display());
    qemu::img(&format!(
        "convert -c -f qcow2 -O qcow2 -o compression_type=zstd {source} {base}"
    ));
    let options = format!("extended_l2=on,backing_file={base},backing_fmt=qcow2");
    let path = qemu::create(folder, "top.qcow2", &options, SIZE);
    qemu::scribble(&path, SIZE, 60, 2);
    let content = qemu::content(&path);
    (path, content)
}

/// Offers a read whose header is at `base`, with the data and the status so far behind it.
fn offer_read(disk: &mut Disk, sector: u64, base: u64, (data, len): (u64, u32), status: u64) {
    disk.header(base, 0, sector);
    let pieces = [
        (base, 16, false),
        (base + data, len, true),
        (base + status, 1, true),
    ];
    let head = disk.driver.chain(&pieces);
    disk.driver.offer(head);
}

#[test]
fn a_thin_disk_is_read_within_the_filter_and_its_writes_are_refused() {
    let Some(folder) = qemu::folder() else { return };
    let (path, content) = overlay(folder.path());
    for setup in setups() {
        let mut disk = Disk::with(setup, |config| {
            config.path = path.clone();
            config.image_type = ImageType::Qcow2;
            config.backing_files = true;
            config.readonly = true;
            config.validate().unwrap();
        });
        let mut at = 0;
        while at < SIZE {
            let (status, bytes) = disk.read(at / 512, MIB as u32);
            assert_eq!(status, OK, "{setup:?}");
            let range = at as usize..(at + MIB) as usize;
            assert!(bytes == content[range], "{setup:?}: {at}");
            at += MIB;
        }
        // Deep, and through memory that O_DIRECT does not take.
        for round in 0..8_u64 {
            let sector = |i: u64| (i * 331 + round * 1009) % (SIZE / 512 - 8);
            for i in 0..40 {
                let base = BUFFERS + 0x10_0000 + i * 0x4000;
                offer_read(&mut disk, sector(i), base, (0x101, 4096), 0x2000);
            }
            disk.driver.ring();
            for _ in 0..40 {
                disk.driver.wait_used();
            }
            for i in 0..40 {
                let base = BUFFERS + 0x10_0000 + i * 0x4000;
                assert_eq!(disk.driver.peek(base + 0x2000, 1), [OK], "{setup:?}");
                let from = sector(i) as usize * 512;
                let bytes = disk.driver.peek(base + 0x101, 4096);
                assert!(bytes == content[from..from + 4096], "{setup:?}: {from}");
            }
        }
        assert_eq!(disk.flush(), OK);
        assert_eq!(disk.write(0, &[1; 512]), IOERR);
        assert!(disk.io_errors().is_empty());
    }
}

#[test]
fn a_thin_disk_is_written_within_the_filter() {
    let Some(folder) = qemu::folder() else { return };
    for (number, setup) in setups().enumerate() {
        let folder = folder.path().join(number.to_string());
        std::fs::create_dir(&folder).unwrap();
        let (path, mut content) = overlay(&folder);
        let mut disk = Disk::with(setup, |config| {
            config.path = path.clone();
            config.image_type = ImageType::Qcow2;
            config.backing_files = true;
            config.validate().unwrap();
        });
        for i in 0..200_u64 {
            let sector = (i * 331) % (SIZE / 512 - 64);
            let bytes: Vec<u8> = (0..4096).map(|n| (n / 16 + i) as u8).collect();
            assert_eq!(disk.write(sector, &bytes), OK, "{setup:?}");
            content[sector as usize * 512..][..4096].copy_from_slice(&bytes);
            if i % 50 == 0 {
                assert_eq!(disk.flush(), OK);
            }
        }
        for (kind, first) in [(11, 64_u64), (13, 4096)] {
            // DISCARD and WRITE_ZEROES.
            assert_eq!(disk.range(kind, first, 2048, 0), OK, "{setup:?}");
            content[first as usize * 512..][..1 << 20].fill(0);
        }
        assert_eq!(disk.flush(), OK);
        let mut at = 0;
        while at < SIZE {
            let (status, bytes) = disk.read(at / 512, MIB as u32);
            assert_eq!(status, OK, "{setup:?}");
            assert!(bytes == content[at as usize..(at + MIB) as usize], "{at}");
            at += MIB;
        }
        assert!(disk.io_errors().is_empty());
        // The image is closed within the filter as well.
        drop(disk);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        assert!(qemu::content(&path) == content, "{setup:?}");
    }
}

#[test]
fn several_queues_read_one_thin_disk_at_once() {
    let Some(folder) = qemu::folder() else { return };
    let (path, content) = overlay(folder.path());
    let image = image();
    let plain = Setup {
        direct: false,
        sync: false,
        event_idx: true,
    };
    let mut config = config(&image, plain);
    config.path = path;
    config.image_type = ImageType::Qcow2;
    config.backing_files = true;
    config.readonly = true;
    config.num_queues = 4;
    let (block, _events) = build(&config).unwrap();
    let block = &block;
    std::thread::scope(|scope| {
        for index in 0..4_u16 {
            let content = &content;
            scope.spawn(move || {
                let memory = memory();
                let mut driver = Driver::new(memory, index, config_queue(), true);
                driver.activate(&block.workers()[usize::from(index)], index);
                for i in 0..64_u64 {
                    let sector = (i * 251 + u64::from(index)) % (SIZE / 512 - 64);
                    let mut header = [0; 16];
                    header[8..].copy_from_slice(&sector.to_le_bytes());
                    driver.poke(HEADER, &header);
                    let pieces = [(HEADER, 16, false), (DATA, 32768, true), (STATUS, 1, true)];
                    let head = driver.chain(&pieces);
                    driver.offer(head);
                    driver.ring();
                    driver.wait_used();
                    assert_eq!(driver.peek(STATUS, 1), [OK]);
                    let from = sector as usize * 512;
                    assert!(driver.peek(DATA, 32768) == content[from..from + 32768]);
                }
            });
        }
    });
}

fn config_queue() -> u16 {
    128
}

/// The ratio after all slices of tables of 72 MiB were asked for, twice and in order.
fn hit_ratio(path: &std::path::Path, readonly: bool, cache: Option<u64>) -> f64 {
    let setup = Setup {
        direct: false,
        sync: false,
        event_idx: true,
    };
    let mut disk = Disk::with(setup, |config| {
        config.path = path.into();
        config.image_type = ImageType::Qcow2;
        config.readonly = readonly;
        config.l2_cache_size = cache;
        config.validate().unwrap();
    });
    let ratio = |disk: &Disk| disk.block.info("a").unwrap().cache_hit_ratio;
    assert_eq!(ratio(&disk), None, "nobody has asked yet");
    for _ in 0..2 {
        // Of 64 entries each, for clusters of 512 bytes.
        for first in (0..72 * MIB / (32 << 10)).step_by(32) {
            for i in 0..32 {
                let base = BUFFERS + i * 0x1000;
                offer_read(&mut disk, (first + i) * 64, base, (0x200, 512), 0x400);
            }
            disk.driver.ring();
            for _ in 0..32 {
                disk.driver.wait_used();
            }
        }
    }
    ratio(&disk).unwrap()
}

#[test]
fn the_cache_of_tables_is_as_large_as_is_configured_and_its_hits_are_counted() {
    let Some(folder) = qemu::folder() else { return };
    let options = "cluster_size=512,preallocation=metadata";
    let path = qemu::create(folder.path(), "tables.qcow2", options, 72 * MIB);
    for readonly in [true, false] {
        let all = hit_ratio(&path, readonly, None);
        assert_eq!(all, 0.5, "the second round finds all: {readonly}");
        let none = hit_ratio(&path, readonly, Some(MIB));
        assert_eq!(
            none, 0.0,
            "each is gone when it is needed again: {readonly}"
        );
    }
}

#[test]
fn a_cache_of_tables_that_can_not_be_is_refused() {
    let image = image();
    let plain = Setup {
        direct: false,
        sync: false,
        event_idx: false,
    };
    let mut config = config(&image, plain);
    let refused = |config: &DiskConfig| config.validate().unwrap_err().field == "l2_cache_size";
    config.l2_cache_size = Some(MIB);
    assert!(refused(&config), "a raw image has no tables");
    config.image_type = ImageType::Unknown;
    assert!(refused(&config), "which means raw");
    config.image_type = ImageType::Qcow2;
    for (bytes, is_valid) in [
        (0, false),
        (MIB - 1, false),
        (MIB, true),
        (1 << 30, true),
        ((1 << 30) + 1, false),
        (u64::MAX, false),
    ] {
        config.l2_cache_size = Some(bytes);
        assert_eq!(config.validate().is_ok(), is_valid, "{bytes}");
        assert!(is_valid || refused(&config));
    }
}

#[test]
fn what_is_not_built_for_thin_disks_is_refused() {
    let image = image();
    let plain = Setup {
        direct: false,
        sync: false,
        event_idx: false,
    };
    let mut config = config(&image, plain);
    config.backing_files = true;
    assert_eq!(config.validate().unwrap_err().field, "backing_files");
    config.image_type = ImageType::Qcow2;
    config.validate().unwrap();
    for (queues, size, is_valid) in [
        (64, 256, true),
        (64, 512, false),
        (16, 1024, true),
        (17, 1024, false),
        (64, 1024, false),
    ] {
        (config.num_queues, config.queue_size) = (queues, size);
        match config.validate() {
            Ok(()) => assert!(is_valid, "{queues} of {size}"),
            Err(refused) => assert!(!is_valid && refused.field == "num_queues", "{refused}"),
        }
        config.readonly = true;
        config.validate().unwrap();
        config.readonly = false;
    }
    (config.num_queues, config.queue_size) = (1, 128);
    let refused = build(&config).err().unwrap().to_string();
    assert!(refused.contains("it is not a qcow2 image"), "{refused}");
}

#[test]
fn a_thin_disk_grows_while_the_guest_uses_it_and_while_it_stands_still() {
    for setup in setups() {
        let Some(folder) = qemu::folder() else { return };
        // One L2 table describes 2 MiB.
        let options = "cluster_size=4k";
        let path = qemu::create(folder.path(), "thin.qcow2", options, SIZE);
        let mut disk = Disk::on(&path, setup, json!({"image_type": "Qcow2"}));
        let end = SIZE / 512;
        assert_eq!(disk.write(0, &[1; 4096]), OK);
        assert_eq!(disk.write(end, &[3; 4096]), IOERR);
        for size in [SIZE - 4096, SIZE + 1, 1 << 60, u64::MAX] {
            assert!(disk.block.grow(size).is_err(), "{size}");
        }
        disk.block.grow(2 * SIZE).unwrap();
        assert!(disk.block.has_new_size());
        assert_eq!(disk.write(end, &[3; 4096]), IOERR, "it was not told");
        disk.block.set_size();
        assert!(!disk.block.has_new_size());
        assert_eq!(disk.write(end, &[3; 4096]), OK);
        disk.pause();
        disk.block.grow(32 * SIZE).unwrap();
        disk.block.set_size();
        disk.worker().order(Order::Resume);
        assert_eq!(disk.write(32 * end - 8, &[4; 4096]), OK);
        disk.reset();
        disk.block.grow(33 * SIZE).unwrap();
        drop(disk);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        let content = qemu::content(&path);
        assert_eq!(content.len() as u64, 33 * SIZE);
        let mut expected = vec![0; content.len()];
        expected[..4096].fill(1);
        expected[SIZE as usize..][..4096].fill(3);
        expected[32 * SIZE as usize - 4096..][..4096].fill(4);
        assert!(content == expected);
    }
}

#[test]
fn a_thin_disk_whose_snapshots_do_not_say_how_large_it_was_keeps_its_size() {
    let Some(folder) = qemu::folder() else { return };
    for (name, options, grows) in [("two", "compat=0.10", false), ("three", "compat=1.1", true)] {
        let path = qemu::create(folder.path(), name, options, SIZE);
        for snapshot in ["first", "second one"] {
            qemu::run(
                "qemu-img",
                &["snapshot", "-c", snapshot, path.to_str().unwrap()],
            );
        }
        let setup = setups().next().unwrap();
        let disk = Disk::on(&path, setup, json!({"image_type": "Qcow2"}));
        let info = disk.block.info("disk").unwrap();
        let names = ["first".to_owned(), "second one".to_owned()];
        assert_eq!(info.snapshots.as_deref(), Some(&names[..]));
        let grown = disk.block.grow(2 * SIZE);
        assert_eq!(grown.is_ok(), grows, "{grown:?}");
        if let Err(error) = grown {
            assert!(error.to_string().contains("desired_size"), "{error}");
        }
    }
}
