//! The guest decides how deep a queue is, and the image how long its clusters are; not how much
//! memory that takes.

use std::os::unix::fs::FileExt;

use super::crash::Setup;
use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn only_so_many_compressed_clusters_are_read_at_a_time() {
    let kind = "cluster_size=2M";
    let Some(setup) = Setup::compressed(kind, 2 * MIB * u64::from(DEPTH)) else {
        return;
    };
    let (mut driver, shared) = setup.driver(1);
    for round in 0..4 {
        for tag in 0..DEPTH {
            let start = (u64::from(tag) * 2 * MIB + round * 4096) / 512;
            driver.push(tag, Operation::Read, start, 8);
        }
        driver.finish();
    }
    assert!(driver.errors.is_empty(), "{:?}", driver.errors);
    let most = shared.lock().unwrap().most_begun;
    // Each may take 4 MiB.
    assert!((2..=4).contains(&most), "{most}");
}

#[test]
fn those_who_read_the_same_compressed_cluster_read_it_once() {
    let Some(setup) = Setup::compressed("cluster_size=64k", MIB) else {
        return;
    };
    let (mut driver, shared) = setup.driver(1);
    // The table that leads there.
    driver.push(0, Operation::Read, 1024, 8);
    driver.finish();
    let before = shared.lock().unwrap().now;
    for tag in 0..DEPTH {
        driver.push(tag, Operation::Read, u64::from(tag) * 8, 8);
    }
    driver.finish();
    assert!(driver.errors.is_empty(), "{:?}", driver.errors);
    // The clock ticks where something begins or ends: each request, and one read.
    let ticks = shared.lock().unwrap().now - before;
    assert_eq!(ticks, 2 * u64::from(DEPTH) + 2);
}

#[test]
fn memory_that_o_direct_does_not_take_is_read_and_written_at_any_depth() {
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "image.qcow2", "", 8 * MIB);
    let mut content = vec![0; 8 * MIB as usize];
    for (number, sector) in (0..).zip(content.chunks_mut(512)) {
        sector.copy_from_slice(&bytes_of(number << 32 | 0xee));
    }
    let raw = folder.path().join("content.raw");
    std::fs::write(&raw, &content).unwrap();
    let (from, to) = (raw.display(), path.display());
    qemu::img(&format!("convert -n -f raw -O qcow2 {from} {to}"));
    let queue = writable(&options(&path, true, false)).for_test(false);
    let mut driver = Driver::new(queue, &content, 1);
    driver.longest = 1400;
    driver.run(300);
    assert!(driver.errors.is_empty(), "{:?}", driver.errors);
    driver.flush();
    let Driver { queue, sectors, .. } = driver;
    drop(queue);
    qemu::img(&format!("check -q -f qcow2 {}", path.display()));
    let after = qemu::content(&path);
    for (number, (sector, bytes)) in (0..).zip(sectors.iter().zip(after.chunks(512))) {
        sector.assert_now(bytes, number);
    }
    let mut magic = [0; 4];
    let file = std::fs::File::open(&path).unwrap();
    file.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"QFI\xfb");
}
