//! Disks that become larger while they are written to.

use std::sync::mpsc::TryRecvError;

use super::crash::{Setup, assert_survived};
use super::*;

const MIB: u64 = 1 << 20;

/// Kind, size of the backing file, whether there is a snapshot, and the sizes before and after.
type Case = (&'static str, Option<u64>, bool, u64, u64);

const CASES: [Case; 13] = [
    ("cluster_size=64k", None, false, 2 * MIB, 5 * MIB),
    ("cluster_size=4k", None, false, 2 * MIB, 9 * MIB),
    ("cluster_size=4k", None, false, MIB + 512, 2 * MIB),
    (
        "cluster_size=512,refcount_bits=64",
        None,
        false,
        MIB,
        9 * MIB + 512,
    ),
    (
        "cluster_size=4k",
        Some(4 * MIB),
        false,
        2 * MIB - 512,
        7 * MIB,
    ),
    (
        "cluster_size=64k",
        Some(4 * MIB),
        false,
        2 * MIB + 1536,
        3 * MIB,
    ),
    (
        "extended_l2=on,cluster_size=16k",
        Some(5 * MIB),
        false,
        MIB + 512,
        9 * MIB,
    ),
    ("cluster_size=4k", None, true, 2 * MIB, 9 * MIB),
    ("compat=0.10,cluster_size=4k", None, false, 2 * MIB, 9 * MIB),
    (
        "compat=0.10,cluster_size=4k",
        Some(3 * MIB),
        false,
        2 * MIB,
        5 * MIB,
    ),
    ("data_file=@", None, false, 2 * MIB + 512, 5 * MIB),
    (
        "data_file=@,extended_l2=on,cluster_size=16k",
        Some(4 * MIB),
        false,
        2 * MIB - 512,
        7 * MIB,
    ),
    (
        "data_file=@,data_file_raw=on,cluster_size=4k",
        None,
        false,
        2 * MIB + 1536,
        5 * MIB,
    ),
];

/// Grows while requests go on; whether it did.
fn grow(driver: &mut Driver, size: u64, requests: usize) -> bool {
    let (_, answer) = driver.queue.control().order(size);
    driver.queue.attend().unwrap();
    driver.run(requests);
    let mut completed = Vec::new();
    let result = loop {
        match answer.try_recv() {
            Ok(result) => break result,
            Err(TryRecvError::Empty) => {
                assert!(driver.queue.held() > 0, "it hangs");
                driver.queue.wait(&mut completed).unwrap();
            }
            Err(TryRecvError::Disconnected) => panic!("nobody answers"),
        }
    };
    assert!(completed.is_empty());
    if result.is_ok() {
        let zero = Sector {
            values: vec![(0, 0, Value::Stamp(0))],
        };
        driver.sectors.resize(size as usize / 512, zero);
        assert_eq!(driver.queue.control().size_bytes(), size);
    }
    result.is_ok()
}

#[test]
fn a_power_cut_while_a_disk_grows_leaves_it_as_large_as_before_or_after() {
    let cuts: u64 = match std::env::var("BALLAST_POWER_CUTS") {
        Ok(count) => count.parse().unwrap(),
        Err(_) => 12,
    };
    for (number, (kind, below, snapshot, old, new)) in (1..).zip(CASES) {
        let Some(setup) = Setup::over(kind, below, snapshot, old) else {
            return;
        };
        let (mut driver, shared) = setup.driver(number);
        driver.run(40);
        let begun = shared.lock().unwrap().now;
        assert!(grow(&mut driver, new, 20));
        let grown = shared.lock().unwrap().now;
        driver.run(60);
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        let end = shared.lock().unwrap().now;
        let mut random = Random(number ^ 0x77);
        for cut in 0..cuts {
            // Most of them while it grows.
            let time = match cut % 4 {
                0 => random.below(end + 1),
                _ => begun + random.below(grown + 10 - begun),
            };
            let bytes = shared.lock().unwrap().after_cut(time, &mut random);
            let image = check::Image::new(&bytes);
            image.check();
            let size = image.size_bytes();
            assert!(size == new || (size == old && time <= grown), "{size}");
            assert_survived(&driver, &image.content(setup.backing()), time);
            if cut % 10 == 0 {
                setup.ask_qemu(&bytes);
            }
        }
        driver.flush();
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        let image = check::Image::new(&bytes);
        assert_eq!(image.check(), 0, "leaks");
        assert_eq!(image.size_bytes(), new);
        setup.ask_qemu(&bytes);
        driver.compare(&setup.content(&image));
    }
}

#[test]
fn qemu_sees_what_was_written_after_a_disk_grew_and_in_its_snapshot_what_was_there_before() {
    for (number, (kind, below, snapshot, old, new)) in (1..).zip(CASES) {
        let Some(setup) = Setup::over(kind, below, snapshot, old) else {
            return;
        };
        let before = qemu::content(&setup.path);
        for direct in [false, true] {
            // O_DIRECT may ask for larger clusters, or another size.
            if direct && (kind.contains("512") || old % 4096 != 0) {
                continue;
            }
            let at = qemu::content(&setup.path);
            let queue = writable(&options(&setup.path, direct, false)).for_test(false);
            let mut driver = Driver::new(queue, &at, 100 + number);
            assert!(grow(&mut driver, new + u64::from(direct) * MIB, 20));
            driver.run(100);
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            let Driver { queue, sectors, .. } = driver;
            drop(queue);
            qemu::img(&format!("check -q -f qcow2 {}", setup.path.display()));
            let after = qemu::content(&setup.path);
            assert_eq!(after.len(), sectors.len() * 512);
            for (number, (sector, bytes)) in (0..).zip(sectors.iter().zip(after.chunks(512))) {
                sector.assert_now(bytes, number);
            }
        }
        if let Some(data) = setup
            .data
            .as_ref()
            .filter(|_| kind.contains("data_file_raw"))
        {
            assert!(qemu::content(&setup.path) == std::fs::read(data).unwrap());
        }
        if snapshot {
            qemu::img(&format!("snapshot -a one {}", setup.path.display()));
            assert!(qemu::content(&setup.path) == before, "{kind}");
        }
    }
}

#[test]
fn a_fault_while_a_disk_grows_is_told_and_it_can_be_tried_again() {
    for (kind, below, snapshot, old, new) in [CASES[1], CASES[3], CASES[6], CASES[7], CASES[12]] {
        let Some(setup) = Setup::over(kind, below, snapshot, old) else {
            return;
        };
        let (mut driver, shared) = setup.driver(5);
        driver.run(20);
        let first = shared.lock().unwrap().changes;
        assert!(grow(&mut driver, new, 0));
        let count = shared.lock().unwrap().changes;
        assert!(count > first + 5);
        drop(driver);
        let all = (first..count).flat_map(|n| [(n, Errno::IO), (n, Errno::NOSPC)]);
        let step = match std::env::var("BALLAST_POWER_CUTS") {
            Ok(_) => 1,
            Err(_) => 9,
        };
        for (which, errno) in all.step_by(step) {
            let (mut driver, shared) = setup.driver(5);
            driver.run(20);
            shared.lock().unwrap().fail = Some((which, errno));
            let grew = grow(&mut driver, new, 0);
            let lost = driver.queue.is_lost();
            // Whatever happened, the image is in order.
            let bytes = shared.lock().unwrap().bytes.clone();
            let image = check::Image::new(&bytes);
            image.check();
            assert!(grew == (image.size_bytes() == new) || lost);
            if lost {
                continue;
            }
            assert!(grew || grow(&mut driver, new, 10));
            driver.run(40);
            driver.flush();
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            driver.queue.close().unwrap();
            let bytes = shared.lock().unwrap().bytes.clone();
            let image = check::Image::new(&bytes);
            image.check();
            driver.compare(&setup.content(&image));
        }
    }
}

#[test]
fn a_disk_does_not_grow_beyond_the_format_nor_shrink_nor_hide_a_huge_backing_file() {
    let kind = "cluster_size=4k";
    let Some(setup) = Setup::over(kind, None, false, 2 * MIB) else {
        return;
    };
    let (mut driver, shared) = setup.driver(1);
    let before = shared.lock().unwrap().changes;
    for size in [MIB, 1 << 60] {
        assert!(!grow(&mut driver, size, 0), "{size}");
    }
    assert_eq!(shared.lock().unwrap().changes, before);
    assert!(grow(&mut driver, 2 * MIB, 0), "as large as it is");
    driver.run(20);
    assert!(driver.errors.is_empty());

    let folder = qemu::folder().unwrap();
    let base = qemu::create(folder.path(), "base.qcow2", "", 1 << 40);
    let options = format!("backing_file={},backing_fmt=qcow2", base.display());
    let top = qemu::create(folder.path(), "top.qcow2", &options, MIB);
    let queue = writable(&super::options(&top, false, false)).for_test(false);
    let mut driver = Driver::new(queue, &vec![0; MIB as usize], 1);
    let (_, answer) = driver.queue.control().order(1 << 41);
    driver.queue.attend().unwrap();
    let error = answer.recv().unwrap().unwrap_err();
    assert!(format!("{error:?}").contains("hidden"), "{error:?}");
    driver.run(20);
}

#[test]
fn what_a_data_file_has_beyond_the_disk_does_not_come_to_light() {
    let Some(folder) = qemu::folder() else { return };
    let sizes = [
        // The last cluster is written to; the backing file ends in one behind.
        (2 * MIB + 4096, MIB),
        (MIB + 4096, MIB + 160 * 1024),
    ];
    for (number, (old, below)) in sizes.into_iter().enumerate() {
        for by_qemu in [true, false] {
            let name = |what: &str| format!("{number}{by_qemu}.{what}");
            let base = qemu::create(folder.path(), &name("base"), "", below);
            qemu::io(&base, &[format!("write -P 7 0 {below}")]);
            let data = folder.path().join(name("data"));
            let kind = format!(
                "data_file={},backing_fmt=qcow2,backing_file={}",
                data.display(),
                base.display()
            );
            let path = qemu::create(folder.path(), &name("qcow2"), &kind, old);
            std::fs::write(&data, vec![0xee; 4 * MIB as usize]).unwrap();
            let before = qemu::content(&path);
            let queue = writable(&options(&path, false, false)).for_test(false);
            let mut driver = Driver::new(queue, &before, number as u64);
            driver.push(0, Operation::Write { durable: false }, old / 512 - 1, 1);
            driver.finish();
            if !by_qemu {
                assert!(grow(&mut driver, 3 * MIB, 0));
            }
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            drop(driver);
            if by_qemu {
                qemu::img(&format!("resize -q -f qcow2 {} 3M", path.display()));
            }
            let after = qemu::content(&path);
            let end = old as usize;
            assert!(after[..end - 512] == before[..end - 512]);
            let shown = after[end..].iter().position(|byte| *byte != 0);
            assert_eq!(shown, None, "{old} {below} {by_qemu}");
        }
    }
}
