//! Over the threads of a pool.

use std::os::unix::fs::FileExt;

use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn qemu_sees_what_was_written_by_threads() {
    let Some(folder) = qemu::folder() else { return };
    for (seed, direct) in [(900, false), (901, true), (902, true)] {
        let path = qemu::create(folder.path(), "image.qcow2", "", 8 * MIB);
        let content = vec![0; 8 * MIB as usize];
        let queue = writable(&options(&path, direct, true)).for_test_pooled();
        assert!(queue.descriptor().is_some());
        let mut driver = Driver::new(queue, &content, seed);
        driver.run(200);
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        let Driver { queue, sectors, .. } = driver;
        drop(queue);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        let after = qemu::content(&path);
        assert_eq!(after.len(), sectors.len() * 512);
        for (number, (sector, bytes)) in (0..).zip(sectors.iter().zip(after.chunks(512))) {
            sector.assert_now(bytes, number);
        }
    }
}

#[test]
fn a_queue_dropped_while_threads_are_at_its_requests_has_done_them() {
    let Some(folder) = qemu::folder() else { return };
    for round in 0..10_u8 {
        let path = qemu::create(folder.path(), "image.qcow2", "", 8 * MIB);
        let mut queue = writable(&options(&path, true, true)).for_test_pooled();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 65536)]).unwrap();
        memory
            .write_slice(&[round + 1; 65536], GuestAddress(0))
            .unwrap();
        let memory = Arc::new(memory);
        for tag in 0..DEPTH {
            let mut buffers = Buffers::default();
            buffers.push(&memory, GuestAddress(0), 65536).unwrap();
            queue.push(Request {
                tag,
                operation: Operation::Write { durable: false },
                offset: u64::from(tag) * 65536,
                length: 65536,
                buffers,
            });
        }
        queue.start().unwrap();
        drop(queue);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        let after = qemu::content(&path);
        let written = usize::from(DEPTH) * 65536;
        assert!(after[..written].iter().all(|byte| *byte == round + 1));
    }
}

#[test]
fn an_image_cut_short_fails_reads_by_threads_and_nothing_else() {
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "image.qcow2", "", 8 * MIB);
    qemu::io(&path, &["write -P 7 0 4M".into()]);
    let mut queue = writable(&options(&path, true, true)).for_test_pooled();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 65536)]).unwrap();
    let memory = Arc::new(memory);
    let mut read = |offset| {
        let mut buffers = Buffers::default();
        buffers.push(&memory, GuestAddress(0), 4096).unwrap();
        queue.push(Request {
            tag: 0,
            operation: Operation::Read,
            offset,
            length: 4096,
            buffers,
        });
        queue.start().unwrap();
        let mut completed = Vec::new();
        while completed.is_empty() {
            queue.wait(&mut completed).unwrap();
        }
        completed.remove(0).result
    };
    read(0).unwrap();
    let mut end = vec![0; 4096];
    file.set_len(length - 2 * MIB).unwrap();
    assert!(read(4 * MIB - 4096).is_err());
    read(0).unwrap();
    // Closing writes to the tables, which are all there.
    file.set_len(length).unwrap();
    drop(queue);
    let file = std::fs::File::open(&path).unwrap();
    file.read_exact_at(&mut end, 0).unwrap();
    assert_eq!(&end[..4], b"QFI\xfb");
}
