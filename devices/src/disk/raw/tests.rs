//! The engine by itself, without virtio.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::{Buffers, Completion, Operation, Request};
use super::*;
use crate::guest_memory::GuestRam;
use crate::sandbox::SeccompMode;

const SIZE: u64 = 4 << 20;

struct Engine {
    queue: Box<dyn Queue>,
    memory: GuestRam,
    file: tempfile::NamedTempFile,
    _image: RawImage,
}

/// An image in `folder`, and a queue of four requests.
fn engine(folder: &str, sync: bool, direct: bool) -> Engine {
    engine_with(folder, sync, direct, None)
}

/// The same without io_uring, with threads.
fn pooled(direct: bool) -> Engine {
    let threads = Threads::of_queue("raw_io".into(), SeccompMode::Enforce, 1);
    let engine = engine_with(&folder(), true, direct, Some(&threads));
    assert!(engine.queue.descriptor().is_some());
    engine
}

fn engine_with(folder: &str, sync: bool, direct: bool, threads: Option<&Threads>) -> Engine {
    let file = tempfile::NamedTempFile::new_in(folder).unwrap();
    file.as_file()
        .write_all_at(&vec![0xaa; SIZE as usize], 0)
        .unwrap();
    let image = RawImage::open(&OpenOptions {
        direct,
        disable_io_uring: sync,
        ..OpenOptions::new(file.path())
    })
    .unwrap();
    Engine {
        queue: image.open_queue_with(4, threads).unwrap(),
        memory: Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()),
        file,
        _image: image,
    }
}

impl Engine {
    fn request(&self, tag: u16, operation: Operation, offset: u64, length: u64) -> Request {
        let mut buffers = Buffers::default();
        if let Operation::Read | Operation::Write { .. } = operation {
            buffers
                .push(&self.memory, GuestAddress(0), length as usize)
                .unwrap();
        }
        Request {
            tag,
            operation,
            offset,
            length,
            buffers,
        }
    }

    fn finish(&mut self) -> Vec<Completion> {
        let mut completed = Vec::new();
        self.queue.start().unwrap();
        while self.queue.held() > 0 {
            self.queue.wait(&mut completed).unwrap();
        }
        completed
    }

    fn run(&mut self, operation: Operation, offset: u64, length: u64) -> io::Result<()> {
        let request = self.request(0, operation, offset, length);
        self.queue.push(request);
        self.finish().remove(0).result
    }

    fn content(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file
            .as_file()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }
}

fn folder() -> String {
    std::env::temp_dir().to_str().unwrap().to_owned()
}

#[test]
fn the_kernels_io_uring_is_used_where_it_has_one() {
    let refused = match io_uring::IoUring::new(4) {
        Ok(_) => false,
        Err(error) => {
            eprintln!("SKIPPED: this kernel has no io_uring ({error})");
            true
        }
    };
    assert_eq!(
        engine(&folder(), false, false).queue.descriptor().is_none(),
        refused
    );
    assert!(engine(&folder(), true, false).queue.descriptor().is_none());
}

#[test]
fn plain_system_calls_are_used_where_the_kernel_refuses_an_io_uring() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    for errno in [libc::EPERM, libc::ENOSYS] {
        std::thread::spawn(move || {
            let filter = SeccompFilter::new(
                [(libc::SYS_io_uring_setup, Vec::new())].into(),
                SeccompAction::Allow,
                SeccompAction::Errno(errno as u32),
                TargetArch::x86_64,
            );
            let program = BpfProgram::try_from(filter.unwrap()).unwrap();
            seccompiler::apply_filter(&program).unwrap();
            let mut engine = engine(&folder(), false, true);
            assert!(engine.queue.descriptor().is_none());
            engine.run(Operation::Read, 0, 4096).unwrap();
        })
        .join()
        .unwrap();
    }
}

#[test]
fn one_request_too_many_is_refused_and_the_rest_are_done() {
    for (sync, direct) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut engine = engine(&folder(), sync, direct);
        for tag in 0..5 {
            let request = engine.request(tag, Operation::Read, 0, 4096);
            engine.queue.push(request);
        }
        let mut completed = engine.finish();
        completed.sort_by_key(|completion| completion.tag);
        assert_eq!(completed.len(), 5);
        // Through the page cache, requests may be done as they are pushed.
        for completion in &completed[..4] {
            completion.result.as_ref().unwrap();
        }
        if let Err(error) = &completed[4].result {
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        }
        engine.run(Operation::Flush, 0, 0).unwrap();
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_has_no_zero_range() {
    // tmpfs punches holes but has no FALLOC_FL_ZERO_RANGE.
    for sync in [false, true] {
        let mut engine = engine("/dev/shm", sync, false);
        let zeroes = |unmap| Operation::WriteZeroes {
            unmap,
            durable: true,
        };
        engine.run(zeroes(false), 512, 1 << 20).unwrap();
        assert_eq!(engine.content(512, 1 << 20), vec![0; 1 << 20]);
        assert_eq!(engine.content(0, 512), [0xaa; 512]);
        assert_eq!(engine.content(512 + (1 << 20), 512), [0xaa; 512]);
        engine.run(zeroes(true), 2 << 20, 4096).unwrap();
        assert_eq!(engine.content(2 << 20, 4096), [0; 4096]);
        engine.run(Operation::Discard, 3 << 20, 4096).unwrap();
        assert_eq!(engine.content(3 << 20, 4096), [0; 4096]);
    }
}

#[test]
fn a_direct_image_takes_no_part_of_a_block() {
    for sync in [false, true] {
        let mut engine = engine(&folder(), sync, true);
        let error = engine.run(Operation::Read, 100, 512).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        engine.run(Operation::Read, 4096, 4096).unwrap();
    }
}

#[test]
fn reads_past_the_end_fail_and_holes_read_as_zeroes() {
    for (sync, direct) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut engine = engine(&folder(), sync, direct);
        engine.file.as_file().set_len(1 << 20).unwrap();
        let error = engine.run(Operation::Read, 1 << 20, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        engine.file.as_file().set_len(SIZE).unwrap();
        engine
            .memory
            .write_slice(&[1; 4096], GuestAddress(0))
            .unwrap();
        engine.run(Operation::Read, 1 << 20, 4096).unwrap();
        let mut bytes = [1; 4096];
        engine
            .memory
            .read_slice(&mut bytes, GuestAddress(0))
            .unwrap();
        assert_eq!(bytes, [0; 4096]);
    }
}

#[test]
fn a_completion_wakes_the_thread_once() {
    assert_wakes_once(engine(&folder(), false, true));
    assert_wakes_once(pooled(true));
}

fn assert_wakes_once(mut engine: Engine) {
    let Some(descriptor) = engine.queue.descriptor() else {
        return;
    };
    let epoll = Epoll::new().unwrap();
    epoll
        .ctl(
            ControlOperation::Add,
            descriptor,
            EpollEvent::new(EventSet::IN, 0),
        )
        .unwrap();
    let readable = |ms| loop {
        // The kernel's work for a ring may interrupt it.
        match epoll.wait(ms, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => return result.unwrap() == 1,
        }
    };
    for _ in 0..100 {
        let request = engine.request(0, Operation::Read, 0, 4096);
        engine.queue.push(request);
        engine.queue.start().unwrap();
        let mut completed = Vec::new();
        while completed.is_empty() {
            assert!(readable(20_000), "it was never told");
            engine.queue.acknowledge();
            engine.queue.poll(&mut completed).unwrap();
        }
        assert!(!readable(0), "it would be woken for nothing");
    }
}

#[test]
fn a_queue_dropped_with_requests_in_flight_waits_for_them() {
    for round in 0..50 {
        let mut engine = match round % 2 {
            0 => engine(&folder(), false, true),
            _ => pooled(true),
        };
        for tag in 0..4 {
            let write = Operation::Write { durable: true };
            let request = engine.request(tag, write, u64::from(tag) * 65536, 65536);
            engine.queue.push(request);
        }
        engine.queue.start().unwrap();
        let Engine { queue, file, .. } = engine;
        drop(queue);
        let mut bytes = vec![1; 4 * 65536];
        file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, vec![0; 4 * 65536]);
    }
}

#[test]
fn threads_do_what_a_ring_does() {
    for direct in [false, true] {
        let mut engine = pooled(direct);
        for durable in [false, true] {
            let bytes: Vec<u8> = (0..65536).map(|i| (i % 251) as u8).collect();
            engine.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
            engine
                .run(Operation::Write { durable }, 1 << 20, 65536)
                .unwrap();
            assert!(engine.content(1 << 20, 65536) == bytes);
            engine
                .memory
                .write_slice(&[1; 65536], GuestAddress(0))
                .unwrap();
            engine.run(Operation::Read, 1 << 20, 65536).unwrap();
            let mut read = vec![0; 65536];
            engine
                .memory
                .read_slice(&mut read, GuestAddress(0))
                .unwrap();
            assert!(read == bytes, "direct {direct}");
            for unmap in [false, true] {
                let zeroes = Operation::WriteZeroes { unmap, durable };
                engine.run(zeroes, 1 << 20, 8192).unwrap();
                assert_eq!(engine.content(1 << 20, 8192), [0; 8192]);
                let write = Operation::Write { durable };
                engine.run(write, 1 << 20, 8192).unwrap();
            }
        }
        engine.run(Operation::Discard, 2 << 20, 1 << 20).unwrap();
        engine.run(Operation::Flush, 0, 0).unwrap();
        // One too many is refused, whatever the threads are at.
        for tag in 0..5 {
            let request = engine.request(tag, Operation::Read, u64::from(tag) * 4096, 4096);
            engine.queue.push(request);
        }
        let mut results: Vec<_> = (engine.finish().into_iter())
            .map(|done| (done.tag, done.result.is_ok()))
            .collect();
        results.sort_unstable();
        assert_eq!(results.len(), 5);
        assert!(results[..4].iter().all(|(_, ok)| *ok));
        if direct {
            assert_eq!(results[4], (4, false));
        }
        engine.file.as_file().set_len(1 << 20).unwrap();
        let error = engine.run(Operation::Read, 1 << 20, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

/// A loop device over a file; detached when dropped.
struct Loop {
    device: String,
    backing: tempfile::NamedTempFile,
}

impl Loop {
    /// `None`, loudly, where there can be none.
    fn new(block: u32) -> Option<Self> {
        let backing = tempfile::NamedTempFile::new().unwrap();
        backing
            .as_file()
            .write_all_at(&vec![0xaa; SIZE as usize], 0)
            .unwrap();
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block.to_string()])
            .arg(backing.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self {
                device: String::from_utf8(output.stdout).unwrap().trim().into(),
                backing,
            }),
            other => {
                eprintln!("SKIPPED: no loop device: {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = std::process::Command::new("losetup")
            .args(["--detach", &self.device])
            .status();
        assert!(status.unwrap().success());
    }
}

fn host(direct: bool) -> Host {
    Host {
        file: Arc::new(tempfile::tempfile().unwrap()),
        direct_memory_align: direct.then_some(512),
        logical_block: 512,
        block_device: false,
        no_punch_hole: AtomicBool::new(false),
        no_zero_range: AtomicBool::new(false),
        lost: AtomicI32::new(0),
    }
}

/// A flush of an image through the page cache or not, to which the host kernel says `result`.
fn flush(host: &Host, result: Result<usize, Errno>) -> io::Result<()> {
    use super::job::{After, Job, Step};
    let request = Request {
        tag: 0,
        operation: Operation::Flush,
        offset: 0,
        length: 0,
        buffers: Buffers::default(),
    };
    let mut job = match Job::new(request, host) {
        Ok(job) => job,
        Err(refused) => return refused.result,
    };
    assert_eq!(job.step(), Some(Step::Sync));
    match job.finished(result, host) {
        After::Done(result) => result,
        After::Next | After::Again => panic!("a flush has one step"),
    }
}

#[test]
fn after_a_failed_flush_through_the_page_cache_none_succeeds_any_more() {
    for (direct, later) in [(false, Some(libc::EIO)), (true, None)] {
        let host = host(direct);
        flush(&host, Ok(0)).unwrap();
        let first = flush(&host, Err(Errno::IO)).unwrap_err();
        assert_eq!(first.raw_os_error(), Some(libc::EIO));
        // The kernel tells each error once, and has forgotten the data.
        let second = flush(&host, Ok(0)).err();
        assert_eq!(second.and_then(|e| e.raw_os_error()), later, "{direct}");
    }
}

#[test]
fn a_flush_that_lacked_space_after_the_fact_is_a_loss_and_can_not_be_tried_again() {
    let host = host(false);
    for _ in 0..2 {
        let error = flush(&host, Err(Errno::NOSPC)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    // Without the page cache nothing was completed that could be lost.
    let host = self::host(true);
    let error = flush(&host, Err(Errno::NOSPC)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    flush(&host, Ok(0)).unwrap();
}

#[test]
fn what_the_kernel_puts_off_is_tried_again_but_not_for_ever() {
    use super::job::{After, Job, Step};
    let host = host(false);
    let request = Request {
        tag: 0,
        operation: Operation::Flush,
        offset: 0,
        length: 0,
        buffers: Buffers::default(),
    };
    let Ok(mut job) = Job::new(request, &host) else {
        panic!("a flush was refused");
    };
    let mut pauses = 0;
    let result = loop {
        assert_eq!(job.step(), Some(Step::Sync), "the same step again");
        match job.finished(Err(Errno::AGAIN), &host) {
            After::Next => {}
            After::Again => pauses += 1,
            After::Done(result) => break result,
        }
        assert!(pauses < 10_000, "it never ends");
    };
    assert!(pauses > 100, "{pauses}");
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EAGAIN));
}

#[test]
fn a_raw_image_grows_and_a_device_only_as_far_as_it_goes() {
    let engine = engine(&folder(), true, false);
    assert_eq!(engine._image.info().unwrap().virtual_bytes, SIZE);
    engine._image.grow(SIZE * 2, &|| ()).unwrap();
    assert_eq!(engine._image.size_bytes(), SIZE * 2);
    assert_eq!(engine.file.as_file().metadata().unwrap().len(), SIZE * 2);
    // Somebody else made it larger already.
    engine.file.as_file().set_len(SIZE * 4).unwrap();
    engine._image.grow(SIZE * 3, &|| ()).unwrap();
    assert_eq!(engine.file.as_file().metadata().unwrap().len(), SIZE * 4);
    match engine._image.grow(1 << 63, &|| ()) {
        Err(BuildError::Invalid(invalid)) => assert_eq!(invalid.field, "desired_size"),
        other => panic!("{other:?}"),
    }
    assert_eq!(engine._image.size_bytes(), SIZE * 3);
    let Some(device) = Loop::new(512) else { return };
    let image = RawImage::open(&OpenOptions {
        disable_io_uring: true,
        ..OpenOptions::new(device.device.clone())
    })
    .unwrap();
    assert!(matches!(
        image.grow(SIZE * 2, &|| ()),
        Err(BuildError::Invalid(_))
    ));
    assert_eq!(image.size_bytes(), SIZE);
}

#[test]
fn a_block_device_is_a_disk_like_any_other() {
    for block in [512_u32, 4096] {
        for (sync, direct) in [(false, false), (false, true), (true, false), (true, true)] {
            let Some(device) = Loop::new(block) else {
                return;
            };
            let image = RawImage::open(&OpenOptions {
                direct,
                disable_io_uring: sync,
                ..OpenOptions::new(device.device.clone())
            })
            .unwrap();
            assert_eq!(image.size_bytes(), SIZE);
            assert_eq!(image.geometry().logical_block, block);
            let mut engine = Engine {
                queue: image.open_queue(4).unwrap(),
                memory: Arc::new(
                    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap(),
                ),
                file: tempfile::NamedTempFile::new().unwrap(),
                _image: image,
            };
            let case = format!("{block} sync {sync} direct {direct}");
            let write = Operation::Write { durable: false };
            engine
                .memory
                .write_slice(&[7; 8192], GuestAddress(0))
                .unwrap();
            engine.run(write, 8192, 8192).unwrap();
            for unmap in [false, true] {
                let zeroes = Operation::WriteZeroes {
                    unmap,
                    durable: true,
                };
                let offset = (1 << 20) + (u64::from(unmap) << 18);
                engine.run(zeroes, offset, 65536).expect(&case);
            }
            // A hint of half blocks frees the whole ones in it, or nothing.
            engine.run(Operation::Discard, 512, 512).expect(&case);
            engine
                .run(Operation::Discard, (2 << 20) - 512, 8192)
                .expect(&case);
            engine.run(Operation::Flush, 0, 0).unwrap();
            drop(engine);
            let mut bytes = vec![0; SIZE as usize];
            device
                .backing
                .as_file()
                .read_exact_at(&mut bytes, 0)
                .unwrap();
            let all = |from: usize, to: usize, value| bytes[from..to].iter().all(|b| *b == value);
            assert!(all(0, 512, 0xaa) && all(4096, 8192, 0xaa), "{case}");
            assert!(all(8192, 16384, 7), "{case}");
            for start in [1 << 20, (1 << 20) + (1 << 18)] {
                assert!(all(start, start + 65536, 0), "{case}");
                assert!(all(start + 65536, start + 65537, 0xaa), "{case}");
            }
            assert!(all((2 << 20) - 1024, (2 << 20) - 512, 0xaa), "{case}");
        }
    }
}
