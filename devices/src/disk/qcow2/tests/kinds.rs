//! Every kind of image that qemu-img makes, read as QEMU reads it.

use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn every_geometry_reads_as_qemu_reads_it() {
    let Some(folder) = qemu::folder() else { return };
    let kinds = [
        ("compat=0.10,cluster_size=512", 4 * MIB),
        ("compat=0.10", 40 * MIB),
        ("compat=1.1,cluster_size=512,refcount_bits=1", 4 * MIB),
        ("compat=1.1,cluster_size=1k,refcount_bits=64", 5 * MIB),
        (
            "compat=1.1,cluster_size=4k,lazy_refcounts=on",
            9 * MIB + 512,
        ),
        ("compat=1.1,cluster_size=64k", 40 * MIB + 1536),
        ("compat=1.1,cluster_size=2M", 70 * MIB),
        ("extended_l2=on,cluster_size=16k", 20 * MIB + 1024),
        ("extended_l2=on,cluster_size=128k", 40 * MIB),
        ("extended_l2=on,cluster_size=2M", 50 * MIB),
        ("preallocation=metadata,cluster_size=4k", 8 * MIB),
        ("preallocation=metadata,extended_l2=on", 8 * MIB),
        ("preallocation=falloc", 8 * MIB),
    ];
    for (number, (options, size)) in (0..).zip(kinds) {
        let path = qemu::create(folder.path(), &format!("{number}.qcow2"), options, size);
        compare_with_qemu(&path);
        qemu::scribble(&path, size, 120, number);
        compare_with_qemu(&path);
    }
}

#[test]
fn compressed_clusters_read_as_qemu_reads_them() {
    let Some(folder) = qemu::folder() else { return };
    let size = 3 * MIB;
    let source = qemu::create(folder.path(), "source.qcow2", "", size);
    qemu::scribble(&source, size, 100, 7);
    // Something that does not compress at all.
    let noise = folder.path().join("noise");
    let mut random = qemu::Random(1);
    let bytes: Vec<u8> = (0..256 << 10).map(|_| random.below(256) as u8).collect();
    std::fs::write(&noise, bytes).unwrap();
    qemu::io(
        &source,
        &[format!("write -s {} 1234432 256k", noise.display())],
    );
    for options in [
        "compat=0.10",
        "compat=1.1,cluster_size=512",
        "compat=1.1,cluster_size=4k",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,compression_type=zstd",
        "compat=1.1,compression_type=zstd,cluster_size=2M",
        "compat=1.1,compression_type=zstd,cluster_size=1k",
        "extended_l2=on,cluster_size=32k",
        "extended_l2=on,compression_type=zstd",
    ] {
        let path = folder.path().join("compressed.qcow2");
        qemu::img(&format!(
            "convert -q -c -f qcow2 -O qcow2 -o {options} {} {}",
            source.display(),
            path.display()
        ));
        compare_with_qemu(&path);
        qemu::scribble(&path, size, 20, 3);
        compare_with_qemu(&path);
    }
}

#[test]
fn an_image_with_snapshots_and_bitmaps_reads_as_its_present() {
    let Some(folder) = qemu::folder() else { return };
    for (name, options) in [("plain", ""), ("extended", "extended_l2=on")] {
        let size = 8 * MIB;
        let path = qemu::create(folder.path(), &format!("{name}.qcow2"), options, size);
        for round in 0..3 {
            qemu::scribble(&path, size, 60, round);
            qemu::img(&format!("snapshot -c {round} {}", path.display()));
        }
        qemu::img(&format!("bitmap --add {} changes", path.display()));
        qemu::scribble(&path, size, 30, 9);
        compare_with_qemu(&path);
    }
}

#[test]
fn an_image_that_is_marked_dirty_or_corrupt_can_still_be_read() {
    use std::os::unix::fs::FileExt;
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "image.qcow2", "", MIB);
    qemu::scribble(&path, MIB, 20, 1);
    let expected = qemu::content(&path);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for bits in 1..4 {
        file.write_all_at(&[bits], 79).unwrap();
        let mut engine = Engine::open(&options(&path)).unwrap();
        engine.compare(&expected, &mut Random(1));
    }
}

#[test]
fn an_image_that_is_only_read_is_not_written_to() {
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "image.qcow2", "", MIB);
    let before = std::fs::read(&path).unwrap();
    let mut engine = Engine::open(&options(&path)).unwrap();
    let operations = [
        (Operation::Flush, None),
        (Operation::Write { durable: false }, Some(libc::EROFS)),
        (Operation::Discard, Some(libc::EROFS)),
        (
            Operation::WriteZeroes {
                unmap: true,
                durable: false,
            },
            Some(libc::EROFS),
        ),
    ];
    for (operation, errno) in operations {
        engine.queue.push(Request {
            tag: 3,
            operation,
            offset: 0,
            length: 0,
            buffers: Buffers::default(),
        });
        let result = engine.finish().remove(0).result;
        assert_eq!(result.err().and_then(|e| e.raw_os_error()), errno);
    }
    let beyond = engine.read(MIB - 512, 1024).unwrap_err();
    assert_eq!(beyond.raw_os_error(), Some(libc::EINVAL));
    for tag in 0..=DEPTH {
        engine.push(tag % DEPTH, 0, 512, 0);
    }
    assert_eq!(engine.finish().len(), usize::from(DEPTH) + 1);
    drop(engine);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn a_file_that_is_cut_short_while_open_fails_reads() {
    let Some(folder) = qemu::folder() else { return };
    for sync in [false, true] {
        let path = qemu::create(folder.path(), "image.qcow2", "", 4 * MIB);
        qemu::io(&path, &["write -P 7 0 4M".into()]);
        let mut options = options(&path);
        options.disable_io_uring = sync;
        let mut engine = Engine::open(&options).unwrap();
        engine.read(0, 512).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(2 * MIB).unwrap();
        let error = engine.read(3 * MIB, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        engine.read(0, 512).unwrap();
    }
}

#[test]
fn reads_of_compressed_clusters_take_only_so_much_memory_however_many_there_are() {
    let Some(folder) = qemu::folder() else { return };
    const CLUSTER: usize = 2 << 20;
    const COUNT: usize = 12;
    let mut random = Random(1);
    let mut content = vec![0; COUNT * CLUSTER];
    for cluster in content.chunks_mut(CLUSTER) {
        // The half of it can't be compressed.
        for word in cluster[..CLUSTER / 2].chunks_exact_mut(8) {
            word.copy_from_slice(&random.below(u64::MAX).to_le_bytes());
        }
    }
    let (raw, path) = (folder.path().join("raw"), folder.path().join("packed"));
    std::fs::write(&raw, &content).unwrap();
    let (from, to) = (raw.display(), path.display());
    qemu::img(&format!(
        "convert -c -f raw -O qcow2 -o cluster_size=2M {from} {to}"
    ));
    let mut options = options(&path);
    // Nothing is there at once.
    options.direct = true;
    let (chain, _) = chain::Chain::open(&options).unwrap();
    let depth = 1200;
    let mut queue = queue::ChainQueue::new(Arc::new(chain), depth, false, None).unwrap();
    let ranges = [(GuestAddress(0), usize::from(depth) * 4096)];
    let memory: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let place = |tag: u16| {
        let (cluster, piece) = (usize::from(tag) % COUNT, usize::from(tag) / COUNT);
        cluster * CLUSTER + piece * 512
    };
    let mut most = 0;
    for tag in 0..depth {
        let mut buffers = Buffers::default();
        let at = GuestAddress(u64::from(tag) * 4096);
        buffers.push(&memory, at, 4096).unwrap();
        queue.push(Request {
            tag,
            operation: Operation::Read,
            offset: place(tag) as u64,
            length: 4096,
            buffers,
        });
        most = most.max(queue.own_bytes);
    }
    queue.start().unwrap();
    let mut completed = Vec::new();
    while queue.held() > 0 {
        queue.wait(&mut completed).unwrap();
        most = most.max(queue.own_bytes);
    }
    assert!((4 << 20..=9 << 20).contains(&most), "{most}");
    assert_eq!(completed.len(), usize::from(depth));
    for completion in completed {
        completion.result.unwrap();
        let mut bytes = [0; 4096];
        let at = GuestAddress(u64::from(completion.tag) * 4096);
        memory.read_slice(&mut bytes, at).unwrap();
        let start = place(completion.tag);
        assert!(bytes == content[start..start + 4096], "{}", completion.tag);
    }
}
