//! Random requests on images of all kinds, on a real file; QEMU's tools are the judges.

use super::*;

const MIB: u64 = 1 << 20;

fn check(path: &Path) {
    qemu::img(&format!("check -q -f qcow2 {}", path.display()));
    let len = std::fs::metadata(path).unwrap().len();
    assert!(len < 512 * MIB, "{} has {len} bytes", path.display());
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(check::Image::new(&bytes).check(), 0, "leaks");
}

/// Opens, works, closes, has QEMU check and scribble, and once more. Most of the time goes to QEMU's
/// tools, so as many `operations` as that are done fifteen times over; all tests here together do
/// 200,000, and `scripts/soak` has more done.
pub fn exercise(path: &Path, of: u64, rounds: usize, operations: usize) {
    let seed = seed(of);
    let operations = operations * wanted("BALLAST_OPERATIONS", 15) as usize;
    for round in 0..rounds {
        let (direct, sync) = (round & 1 != 0, round & 2 != 0);
        let content = qemu::content(path);
        let queue = writable(&options(path, direct, sync)).for_test(sync);
        let mut driver = Driver::new(queue, &content, seed * 100 + round as u64);
        driver.run(operations);
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        let Driver { queue, sectors, .. } = driver;
        drop(queue);
        check(path);
        println!("{operations} operations");
        let after = qemu::content(path);
        for (number, (sector, bytes)) in (0..).zip(sectors.iter().zip(after.chunks(512))) {
            sector.assert_now(bytes, number);
        }
        qemu::scribble(path, content.len() as u64, 20, seed + round as u64);
        check(path);
    }
}

const KINDS: [(&str, u64); 16] = [
    ("compat=0.10", 24 * MIB),
    ("compat=0.10,cluster_size=512", 2 * MIB),
    ("compat=1.1,cluster_size=512,refcount_bits=1", 2 * MIB),
    ("compat=1.1,cluster_size=512,refcount_bits=64", 3 * MIB),
    ("compat=1.1,cluster_size=1k,refcount_bits=2", 3 * MIB),
    ("compat=1.1,cluster_size=2k,refcount_bits=32", 4 * MIB),
    ("compat=1.1,cluster_size=4k,refcount_bits=4", 9 * MIB + 4096),
    ("compat=1.1,cluster_size=4k,lazy_refcounts=on", 9 * MIB),
    ("compat=1.1,cluster_size=64k", 40 * MIB + 512 * 8),
    ("compat=1.1,cluster_size=64k,refcount_bits=8", 24 * MIB),
    ("compat=1.1,cluster_size=2M", 40 * MIB),
    ("extended_l2=on,cluster_size=16k", 12 * MIB),
    ("extended_l2=on,cluster_size=128k", 24 * MIB),
    ("extended_l2=on,cluster_size=2M", 24 * MIB),
    ("preallocation=metadata,cluster_size=64k", 8 * MIB),
    ("preallocation=metadata,extended_l2=on", 8 * MIB),
];

#[test]
fn every_geometry_is_written_as_qemu_reads_it() {
    let Some(folder) = qemu::folder() else { return };
    for (number, (options, size)) in (1..).zip(KINDS) {
        let path = qemu::create(folder.path(), &format!("{number}.qcow2"), options, size);
        // O_DIRECT may ask for more than the smallest clusters have.
        exercise(&path, number, 4, 120);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn overlays_copy_what_they_do_not_cover() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    let source = qemu::create(at, "source.qcow2", "", 9 * MIB);
    qemu::scribble(&source, 9 * MIB, 100, 5);
    let compressed = at.join("compressed.qcow2");
    qemu::img(&format!(
        "convert -c -f qcow2 -O qcow2 -o compression_type=zstd {} {}",
        source.display(),
        compressed.display()
    ));
    let raw = at.join("base.raw");
    qemu::img(&format!(
        "convert -f qcow2 -O raw {} {}",
        source.display(),
        raw.display()
    ));
    let bases = [(source, "qcow2"), (compressed, "qcow2"), (raw, "raw")];
    let kinds = [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=4k",
        "extended_l2=on,cluster_size=128k",
        "extended_l2=on,cluster_size=16k",
    ];
    for (number, options) in (1..).zip(kinds) {
        let (base, format) = &bases[number % bases.len()];
        let before = std::fs::read(base).unwrap();
        let base_text = base.display();
        let options = format!("{options},backing_file={base_text},backing_fmt={format}");
        let size = [9, 12, 6][number % 3] * MIB;
        let path = qemu::create(at, &format!("top-{number}.qcow2"), &options, size);
        exercise(&path, 50 + number as u64, 3, 120);
        assert!(
            std::fs::read(base).unwrap() == before,
            "the base is written"
        );
    }
}

#[test]
fn compressed_clusters_are_replaced_and_given_back() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    for (number, options) in (1..).zip([
        "compat=1.1",
        "cluster_size=4k",
        "extended_l2=on,compression_type=zstd",
    ]) {
        let source = qemu::create(at, &format!("s{number}.qcow2"), "", 6 * MIB);
        qemu::scribble(&source, 6 * MIB, 60, number);
        let path = at.join(format!("c{number}.qcow2"));
        let (from, to) = (source.display(), path.display());
        qemu::img(&format!(
            "convert -c -f qcow2 -O qcow2 -o {options} {from} {to}"
        ));
        exercise(&path, 70 + number, 3, 150);
    }
}

#[test]
fn snapshots_keep_what_they_hold() {
    let Some(folder) = qemu::folder() else { return };
    for (number, (options, size)) in (1..).zip([
        ("compat=1.1", 12 * MIB),
        ("compat=0.10", 12 * MIB),
        ("cluster_size=4k", 6 * MIB),
        ("cluster_size=512", 2 * MIB),
        ("extended_l2=on", 12 * MIB),
    ]) {
        let name = format!("{number}.qcow2");
        let path = qemu::create(folder.path(), &name, options, size);
        qemu::scribble(&path, size, 60, number);
        let text = path.display().to_string();
        qemu::img(&format!("snapshot -c one {text}"));
        let one = qemu::content(&path);
        exercise(&path, 80 + number, 2, 150);
        qemu::img(&format!("snapshot -c two {text}"));
        let two = qemu::content(&path);
        exercise(&path, 90 + number, 2, 150);
        qemu::img(&format!("snapshot -a one {text}"));
        assert!(qemu::content(&path) == one, "{options}: snapshot one");
        exercise(&path, 95 + number, 1, 100);
        qemu::img(&format!("snapshot -a two {text}"));
        assert!(qemu::content(&path) == two, "{options}: snapshot two");
        qemu::img(&format!("snapshot -d one {text}"));
        check(&path);
    }
}

#[test]
fn discarded_space_goes_back_to_the_host_and_the_end_of_the_file_is_cut() {
    use std::os::unix::fs::MetadataExt;
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "a.qcow2", "", 64 * MIB);
    let blocks = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let content = qemu::content(&path);
    let queue = writable(&options(&path, false, false)).for_test(false);
    let mut driver = Driver::new(queue, &content, 1);
    for tag in 0..DEPTH {
        let write = Operation::Write { durable: false };
        driver.push(tag, write, u64::from(tag) * 2000, 2000);
    }
    driver.finish();
    driver.flush();
    assert!(blocks() > 15 * MIB);
    driver.push(0, Operation::Discard, 0, 40000);
    driver.finish();
    driver.flush();
    // The end of the file is still allocated ahead.
    assert!(blocks() < 33 * MIB, "{}", blocks());
    drop(driver);
    assert!(blocks() < 2 * MIB, "{}", blocks());
    check(&path);
}
