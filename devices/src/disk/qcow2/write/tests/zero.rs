//! What a discard leaves, where a backing file would show.

use super::crash::Setup;
use super::*;

const MIB: u64 = 1 << 20;

fn discard(driver: &mut Driver, offset: u64, len: u64) {
    driver.push(0, Operation::Discard, offset / 512, len / 512);
    driver.finish();
}

/// An overlay of `size` bytes, or more than one, over a raw file of `below` that is all nines.
fn overlay(folder: &Path, name: &str, options: &str, below: u64, size: u64) -> std::path::PathBuf {
    let base = folder.join("base.raw");
    std::fs::write(&base, vec![9; below as usize]).unwrap();
    let options = format!("{options},backing_file={},backing_fmt=raw", base.display());
    qemu::create(folder, name, &options, size)
}

#[test]
fn a_discard_hides_the_backing_file_as_with_qemu() {
    let Some(folder) = qemu::folder() else { return };
    let ranges = [
        (0, 4 * MIB),
        (5 * MIB - 512, MIB),
        (7 * MIB + 4096, 3 * 65536),
        (8 * MIB, 65536),
        (11 * MIB + 65536, MIB - 65536),
    ];
    for options in [
        "compat=1.1",
        "compat=1.1,cluster_size=512",
        "compat=1.1,cluster_size=4k",
        "compat=0.10,cluster_size=4k",
    ] {
        let at = folder.path();
        let path = overlay(at, "ours.qcow2", options, 10 * MIB, 12 * MIB);
        qemu::io(&path, &["write -P 3 8M 16k".into()]);
        let theirs = at.join("theirs.qcow2");
        std::fs::copy(&path, &theirs).unwrap();
        let content = qemu::content(&path);
        let queue = writable(&super::options(&path, false, false)).for_test(false);
        let mut driver = Driver::new(queue, &content, 1);
        for (offset, len) in ranges {
            discard(&mut driver, offset, len);
            // QEMU says that it can't where a cluster is not covered, and in version 2.
            let command = format!("discard {offset} {len}");
            qemu::io(&theirs, &[command]);
        }
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        driver.queue.close().unwrap();
        drop(driver);
        assert!(
            qemu::content(&path) == qemu::content(&theirs),
            "{options}: not as QEMU does it"
        );
        if !options.contains("0.10") {
            assert!(qemu::content(&path)[..4 << 20].iter().all(|b| *b == 0));
        }
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
    }
}

#[test]
fn a_discard_makes_no_tables_where_nothing_shows() {
    let Some(folder) = qemu::folder() else { return };
    let path = overlay(
        folder.path(),
        "image.qcow2",
        "cluster_size=4k",
        MIB,
        64 * MIB,
    );
    let before = std::fs::metadata(&path).unwrap().len();
    let content = qemu::content(&path);
    let queue = writable(&super::options(&path, false, false)).for_test(false);
    let mut driver = Driver::new(queue, &content, 1);
    discard(&mut driver, 4 * MIB, 60 * MIB);
    driver.queue.close().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), before);
}

#[test]
fn a_host_without_room_does_not_stop_a_discard() {
    for kind in ["cluster_size=4k", "extended_l2=on,cluster_size=16k"] {
        let Some(setup) = Setup::new(kind, true, false, 4 * MIB) else {
            return;
        };
        let before = qemu::content(&setup.path);
        let (mut driver, shared) = setup.driver(3);
        let len = shared.lock().unwrap().bytes.len();
        shared.lock().unwrap().room = len;
        discard(&mut driver, 0, 4 * MIB);
        driver.flush();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        let content = || {
            let bytes = shared.lock().unwrap().bytes.clone();
            let image = check::Image::new(&bytes);
            image.check();
            let sectors = image.content(setup.backing());
            let bytes: Vec<u8> = sectors.into_iter().flat_map(Option::unwrap).collect();
            bytes
        };
        assert!(content() == before, "{kind}: it can't have been noted");
        shared.lock().unwrap().room = usize::MAX;
        discard(&mut driver, 0, 4 * MIB);
        driver.flush();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        assert!(content().iter().all(|byte| *byte == 0), "{kind}");
        driver.queue.close().unwrap();
    }
}
