//! Leaks are found and returned while the disk is written to, and nothing else is.

use super::crash::{Setup, assert_survived};
use super::*;

const MIB: u64 = 1 << 20;

/// Goes on until all leaks are returned.
pub fn search(driver: &mut Driver) {
    driver.queue.start().unwrap();
    for round in 0..100_000 {
        if round > 20_000 {
            // A real host that has much else to do.
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        if driver.queue.control().leaks().is_some() {
            return;
        }
        let mut completed = Vec::new();
        driver.queue.poll(&mut completed).unwrap();
        for completion in completed {
            driver.completed(completion);
        }
    }
    panic!("it does not end");
}

/// An image as a power cut left it, with leaks; how many.
fn leaky(setup: &Setup, seed: u64) -> Option<(Vec<u8>, u64)> {
    let (mut driver, shared) = setup.driver(seed);
    driver.run(100);
    let mut random = Random(seed);
    let end = shared.lock().unwrap().now;
    (0..200).find_map(|_| {
        let time = random.below(end);
        let bytes = shared.lock().unwrap().after_cut(time, &mut random);
        let leaks = check::Image::new(&bytes).check();
        (leaks > 0).then_some((bytes.image, leaks))
    })
}

/// Kind, whether it is an overlay, and whether it has a snapshot: then a refcount may stay too high.
const KINDS: [(&str, bool, bool); 8] = [
    ("cluster_size=64k", false, false),
    ("cluster_size=4k", false, false),
    ("cluster_size=512,refcount_bits=64", false, false),
    ("extended_l2=on,cluster_size=16k", true, false),
    ("cluster_size=4k", true, true),
    ("compat=0.10,cluster_size=4k", true, false),
    ("data_file=@,cluster_size=512", true, false),
    ("data_file=@,data_file_raw=on,cluster_size=4k", false, false),
];

#[test]
fn leaks_go_while_the_disk_is_written_to_and_a_power_cut_in_the_middle_does_no_harm() {
    let rounds: u64 = match std::env::var("BALLAST_POWER_CUTS") {
        Ok(_) => 20,
        Err(_) => 1,
    };
    let mut returned = 0;
    for (number, (kind, overlay, snapshot)) in (1..).zip(KINDS) {
        for round in 0..rounds {
            let seed = number * 100 + round;
            let Some(setup) = Setup::new(kind, overlay, snapshot, 2 * MIB) else {
                return;
            };
            let Some((bytes, _)) = leaky(&setup, seed) else {
                continue;
            };
            std::fs::write(&setup.path, &bytes).unwrap();
            let (mut driver, shared) = setup.driver(seed + 50);
            driver.run(60);
            search(&mut driver);
            driver.run(20);
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            returned += driver.queue.control().returned();
            let end = shared.lock().unwrap().now;
            let mut random = Random(seed);
            for _ in 0..20 {
                let time = random.below(end + 1);
                let bytes = shared.lock().unwrap().after_cut(time, &mut random);
                let image = check::Image::new(&bytes);
                image.check();
                assert_survived(&driver, &image.content(setup.backing()), time);
            }
            driver.flush();
            driver.queue.close().unwrap();
            let bytes = shared.lock().unwrap().bytes.clone();
            let image = check::Image::new(&bytes);
            let left = image.check();
            assert!(left == 0 || snapshot, "{kind}: {left} are left");
            setup.ask_qemu(&bytes);
            let sectors = image.content(setup.backing());
            let content: Vec<u8> = sectors.into_iter().flat_map(Option::unwrap).collect();
            driver.compare(&content);
        }
    }
    assert!(returned > 10, "{returned}");
}

/// An image with all that may refer to clusters, and what its disk holds.
fn rich(folder: &Path, options: &str, seed: u64) -> std::path::PathBuf {
    let source = qemu::create(folder, "source.qcow2", "", 6 * MIB);
    qemu::scribble(&source, 6 * MIB, 60, seed);
    let path = folder.join("rich.qcow2");
    let (from, to) = (source.display(), path.display());
    qemu::img(&format!(
        "convert -c -f qcow2 -O qcow2 -o {options} {from} {to}"
    ));
    for name in ["one", "two"] {
        qemu::img(&format!("snapshot -c {name} {to}"));
        qemu::scribble(&path, 6 * MIB, 30, seed + 7);
    }
    path
}

#[test]
fn nothing_that_a_snapshot_or_compressed_data_needs_is_taken_for_a_leak() {
    let Some(folder) = qemu::folder() else { return };
    for (seed, options) in (1..).zip(["cluster_size=64k", "cluster_size=4k", "extended_l2=on"]) {
        for sync in [false, true] {
            let path = rich(folder.path(), options, seed);
            let content = qemu::content(&path);
            let queue = writable(&super::options(&path, false, sync)).for_test(sync);
            let mut driver = Driver::new(queue, &content, seed);
            driver.run(40);
            search(&mut driver);
            assert_eq!(driver.queue.control().leaks(), Some(0));
            assert_eq!(driver.queue.control().returned(), 0);
            driver.run(40);
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            drop(driver);
            qemu::img(&format!("check -q -f qcow2 {}", path.display()));
            for name in ["one", "two"] {
                qemu::img(&format!("snapshot -a {name} {}", path.display()));
                qemu::img(&format!("check -q -f qcow2 {}", path.display()));
            }
        }
    }
}

/// Opens it, has the search go as far as it goes, and closes it.
fn open_and_look(path: &Path) {
    let queue = writable(&super::options(path, false, false)).for_test(true);
    let mut driver = Driver::new(queue, &vec![0; 2 << 20], 1);
    for _ in 0..100 {
        driver.queue.start().unwrap();
        driver.queue.poll(&mut Vec::new()).unwrap();
    }
    assert_eq!(driver.queue.control().leaks(), None);
}

#[test]
fn nothing_is_freed_where_an_entry_makes_no_sense_or_somebody_else_may_own_clusters() {
    let Some(folder) = qemu::folder() else { return };
    let options = "cluster_size=4k";
    let path = qemu::create(folder.path(), "image.qcow2", options, 2 * MIB);
    qemu::scribble(&path, 2 * MIB, 30, 1);
    let sound = std::fs::read(&path).unwrap();
    let image = check::Image::new(&sound);
    assert_eq!(image.check(), 0);
    let l1 = u64::from_be_bytes(sound[40..48].try_into().unwrap()) as usize;
    let l2 =
        (u64::from_be_bytes(sound[l1..l1 + 8].try_into().unwrap()) & ((1 << 56) - 512)) as usize;
    // An entry with a reserved bit: what it refers to is not to be freed, nor anything else.
    let mut damaged = sound.clone();
    let at = (0..512)
        .map(|index| l2 + index * 8)
        .find(|at| sound[at + 4..at + 8] != [0; 4])
        .unwrap();
    damaged[at + 7] |= 2;
    std::fs::write(&path, &damaged).unwrap();
    open_and_look(&path);
    assert!(std::fs::read(&path).unwrap() == damaged, "it was changed");

    // What an extension that we don't know may own.
    std::fs::write(&path, &sound).unwrap();
    let mut header = sound.clone();
    assert_eq!(header[104..112], [0; 8], "it has no compression type");
    let start = u32::from_be_bytes(sound[100..104].try_into().unwrap()) as usize;
    header[start..start + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    std::fs::write(&path, &header).unwrap();
    open_and_look(&path);
    assert!(std::fs::read(&path).unwrap() == header, "it was changed");

    // A bitmap that is in use.
    std::fs::write(&path, &sound).unwrap();
    qemu::img(&format!("bitmap --add {} dirty", path.display()));
    let before = std::fs::read(&path).unwrap();
    open_and_look(&path);
    assert!(std::fs::read(&path).unwrap() == before, "it was changed");
}

#[test]
fn clusters_of_a_bitmap_are_free_once_something_was_written_without_it() {
    let Some(folder) = qemu::folder() else { return };
    for (number, options) in ["cluster_size=64k", "cluster_size=4k"].iter().enumerate() {
        for sync in [false, true] {
            let name = format!("{number}-{sync}.qcow2");
            let path = qemu::create(folder.path(), &name, options, 8 * MIB);
            let name = path.display();
            qemu::img(&format!("bitmap --add -g 512 {name} dirty"));
            qemu::img(&format!("bitmap --add -g 4096 {name} other"));
            qemu::io(&path, &["write -P 0 0 4M".to_owned()]);
            qemu::img(&format!("check -q -f qcow2 {name}"));
            let queue = writable(&super::options(&path, false, sync)).for_test(sync);
            let mut driver = Driver::new(queue, &vec![0; 8 << 20], 1);
            driver.push(0, Operation::Read, 0, 8);
            driver.finish();
            assert_eq!(driver.queue.control().leaks(), None);
            driver.run(40);
            search(&mut driver);
            // A directory, and a table for each.
            assert!(driver.queue.control().returned() >= 3);
            driver.run(40);
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            driver.flush();
            let Driver { queue, sectors, .. } = driver;
            drop(queue);
            qemu::img(&format!("check -q -f qcow2 {name}"));
            let content = qemu::content(&path);
            for (number, (sector, bytes)) in (0..).zip(sectors.iter().zip(content.chunks(512))) {
                sector.assert_now(bytes, number);
            }
            // It may have bitmaps again.
            qemu::img(&format!("bitmap --add {name} new"));
            qemu::img(&format!("check -q -f qcow2 {name}"));
        }
    }
}

#[test]
fn clusters_of_a_bitmap_that_somebody_else_took_the_meaning_are_leaks() {
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "a.qcow2", "cluster_size=4k", 8 * MIB);
    let name = path.display();
    qemu::img(&format!("bitmap --add {name} dirty"));
    let mut bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[88..96], [0, 0, 0, 0, 0, 0, 0, 1]);
    bytes[95] = 0;
    std::fs::write(&path, &bytes).unwrap();
    let leaks = check::Image::new(&bytes).check();
    assert!(leaks > 0);
    let queue = writable(&super::options(&path, false, true)).for_test(true);
    let mut driver = Driver::new(queue, &vec![0; 8 << 20], 1);
    search(&mut driver);
    assert_eq!(driver.queue.control().returned(), leaks);
    drop(driver);
    qemu::img(&format!("check -q -f qcow2 {name}"));
}

/// Closes an image with which nothing is wrong.
fn close_soundly(mut driver: Driver, path: &Path) {
    driver.flush();
    assert!(driver.errors.is_empty(), "{:?}", driver.errors);
    assert!(!driver.queue.is_lost());
    drop(driver);
    qemu::img(&format!("check -q -f qcow2 {}", path.display()));
}

#[test]
fn what_was_given_up_and_not_flushed_yet_is_not_freed_twice() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    let plain = qemu::create(at, "plain.qcow2", "cluster_size=4k", 2 * MIB);
    qemu::io(&plain, &["write -P 0 0 1M".to_owned()]);
    let packed = at.join("packed.qcow2");
    qemu::img(&format!(
        "convert -c -f qcow2 -O qcow2 -o cluster_size=4k -S 0 {} {}",
        plain.display(),
        packed.display()
    ));
    for path in [plain, packed] {
        let queue = writable(&super::options(&path, false, true)).for_test(true);
        let mut driver = Driver::new(queue, &vec![0; 2 << 20], 1);
        // Done when it was pushed; the search has not begun.
        driver.push(0, Operation::Discard, 0, 1024);
        search(&mut driver);
        assert_eq!(driver.queue.control().returned(), 0);
        close_soundly(driver, &path);
    }
}

#[test]
fn what_was_given_up_by_a_flush_that_failed_halfway_is_not_freed_twice() {
    let Some(setup) = Setup::new("cluster_size=4k", false, false, 4 * MIB) else {
        return;
    };
    qemu::io(&setup.path, &["write -P 0 0 4M".to_owned()]);
    let mut failed = 0;
    for which in 0..6 {
        let (mut driver, shared) = setup.driver(which);
        // Two L2 tables, of which one may be on the disk and the other not.
        driver.push(0, Operation::Discard, 0, 8192);
        driver.finish();
        {
            let mut host = shared.lock().unwrap();
            host.fail = Some((host.changes + which, Errno::IO));
        }
        driver.flush();
        shared.lock().unwrap().fail = None;
        failed += driver.errors.len();
        if driver.queue.is_lost() {
            continue;
        }
        driver.errors.clear();
        search(&mut driver);
        assert_eq!(driver.queue.control().returned(), 0);
        driver.flush();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        assert_eq!(check::Image::new(&bytes).check(), 0);
    }
    assert!(failed > 0);
}

#[test]
fn a_table_that_moved_before_the_search_began_is_not_freed_twice() {
    let Some(folder) = qemu::folder() else { return };
    let options = "cluster_size=512,refcount_bits=64";
    let path = qemu::create(folder.path(), "image.qcow2", options, 8 * MIB);
    let table = |bytes: &[u8]| bytes[48..60].to_vec();
    let before = table(&std::fs::read(&path).unwrap());
    let queue = writable(&super::options(&path, false, true)).for_test(true);
    let mut driver = Driver::new(queue, &vec![0; 8 << 20], 1);
    for tag in 0..4 {
        driver.push(
            tag,
            Operation::Write { durable: false },
            2048 * u64::from(tag),
            2048,
        );
    }
    assert!(table(&std::fs::read(&path).unwrap()) != before);
    search(&mut driver);
    assert_eq!(driver.queue.control().returned(), 0);
    close_soundly(driver, &path);
}

#[test]
fn what_a_killed_process_unlinked_is_on_the_disk_before_it_is_freed() {
    let Some(setup) = Setup::new("cluster_size=4k", false, false, 2 * MIB) else {
        return;
    };
    qemu::io(&setup.path, &["write -P 0x5a 0 512k".to_owned()]);
    let (mut killed, old) = setup.driver(1);
    let unmap = Operation::WriteZeroes {
        unmap: true,
        durable: false,
    };
    killed.push(0, unmap, 0, 1024);
    killed.finish();
    // All is written, and nothing is on the disk.
    old.lock().unwrap().no_sync = Some(Errno::IO);
    killed.flush();
    drop(killed);
    std::fs::write(&setup.path, &old.lock().unwrap().bytes).unwrap();
    let (mut driver, new) = setup.driver(2);
    {
        let (mut old, mut new) = (old.lock().unwrap(), new.lock().unwrap());
        new.base = std::mem::take(&mut old.base);
        new.log = std::mem::take(&mut old.log);
        new.now = old.now;
    }
    search(&mut driver);
    assert!(driver.queue.control().returned() >= 128);
    for tag in 0..8 {
        let write = Operation::Write { durable: false };
        driver.push(tag, write, 2048 + 64 * u64::from(tag), 64);
    }
    driver.finish();
    let end = new.lock().unwrap().now;
    let mut random = Random(3);
    let mut seen = [0; 2];
    for _ in 0..200 {
        let time = random.below(end + 1);
        let bytes = new.lock().unwrap().after_cut(time, &mut random);
        let image = check::Image::new(&bytes);
        image.check();
        for (number, sector) in image.content(&[])[..1024].iter().enumerate() {
            let sector = sector.as_ref().unwrap();
            let value = [0x5a, 0].iter().position(|byte| *sector == [*byte; 512]);
            seen[value.unwrap_or_else(|| panic!("cut at {time}: sector {number}"))] += 1;
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}
