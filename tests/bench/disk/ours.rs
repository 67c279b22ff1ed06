//! The engine, driven as the thread of a disk drives it.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use devices::disk::{
    self, Buffers, Completion, Format, Image, OpenOptions, Operation, Queue, Request, Threads,
};
use devices::sandbox::SeccompMode;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::cases::{Case, Peer};
use super::{KIB, Run, processor_seconds};

const HUGE_PAGE: usize = 2 << 20;

/// Opens an image for reading and writing.
pub fn open(path: &Path, direct: bool, ring: bool) -> Box<dyn Image> {
    let options = OpenOptions {
        direct,
        disable_io_uring: !ring,
        backing_files: true,
        ..OpenOptions::new(path)
    };
    let raw = path.extension().is_some_and(|extension| extension == "raw");
    let format = if raw { Format::Raw } else { Format::Qcow2 };
    disk::open(format, &options).expect("the image")
}

/// Memory of at least `bytes` as the VMM makes a guest's, with transparent huge pages and, as with
/// the peer, all of it there. (One request for 1 MiB of small pages would be two for the device.)
#[expect(unsafe_code, reason = "madvise has no safe interface")]
fn memory(bytes: u64) -> Arc<GuestMemoryMmap> {
    let bytes = (bytes as usize).next_multiple_of(HUGE_PAGE);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
    for region in memory.iter() {
        for advice in [Advice::LinuxHugepage, Advice::LinuxPopulateWrite] {
            // SAFETY: the mapping lives, and is anonymous: neither changes what it holds.
            unsafe { madvise(region.as_ptr().cast(), region.size(), advice) }.expect("madvise");
        }
    }
    Arc::new(memory)
}

/// Requests a second of ours.
pub fn run(image: &Path, case: &Case) -> Run {
    let image = open(image, case.direct, case.peer != Peer::Threads);
    let mut queue = Driven::new(image.as_ref(), case.depth);
    let memory = memory(u64::from(case.depth) * case.bytes);
    let mut free: Vec<u16> = (0..case.depth).collect();
    let (mut begun, mut ended, mut offset) = (0, 0, 0);
    let mut completed = Vec::new();
    let processor = processor_seconds().0;
    let start = Instant::now();
    while ended < case.count {
        while begun < case.count
            && let Some(tag) = free.pop()
        {
            let mut buffers = Buffers::default();
            let address = GuestAddress(u64::from(tag) * case.bytes);
            buffers
                .push(&memory, address, case.bytes as usize)
                .expect("memory");
            let operation = match case.write {
                true => Operation::Write { durable: false },
                false => Operation::Read,
            };
            queue.queue.push(Request {
                tag,
                operation,
                offset,
                length: case.bytes,
                buffers,
            });
            offset = (offset + case.step) % (case.size() - case.bytes);
            offset = offset / (4 * KIB) * (4 * KIB);
            begun += 1;
        }
        queue.wait(&mut completed);
        for completion in completed.drain(..) {
            completion.result.expect("a request that is done");
            free.push(completion.tag);
            ended += 1;
        }
        if case.flush {
            queue.push(Operation::Flush, 0, 0);
            queue.finish(&mut completed);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let processor = processor_seconds().0 - processor;
    drop(queue);
    Run {
        rate: case.count as f64 / seconds,
        cpu: processor * 1e6 / case.count as f64,
    }
}

/// A queue that is waited for as the thread of a disk does.
pub struct Driven {
    pub queue: Box<dyn Queue>,
    epoll: Option<Epoll>,
}

impl Driven {
    /// A queue of an image.
    pub fn new(image: &dyn Image, depth: u16) -> Self {
        let threads = Threads::of_queue("pool".to_owned(), SeccompMode::Enforce, 1);
        let queue = image.open_queue_with(depth, Some(&threads));
        let queue = queue.expect("a queue");
        let epoll = queue.descriptor().map(|descriptor| {
            let epoll = Epoll::new().expect("an epoll");
            let event = EpollEvent::new(EventSet::IN, 0);
            let added = epoll.ctl(ControlOperation::Add, descriptor, event);
            added.expect("the descriptor");
            epoll
        });
        Self { queue, epoll }
    }

    /// Begins something that has no buffers.
    pub fn push(&mut self, operation: Operation, offset: u64, length: u64) {
        self.queue.push(Request {
            tag: 0,
            operation,
            offset,
            length,
            buffers: Buffers::default(),
        });
    }

    /// Waits until the only thing that was begun is done.
    pub fn finish(&mut self, completed: &mut Vec<Completion>) {
        self.wait(completed);
        completed
            .drain(..)
            .for_each(|done| done.result.expect("what was done"));
    }

    /// Waits until something is done.
    pub fn wait(&mut self, completed: &mut Vec<Completion>) {
        self.queue.start().expect("a start");
        let Some(epoll) = &self.epoll else {
            return self.queue.wait(completed).expect("a completion");
        };
        self.queue.poll(completed).expect("completions");
        while completed.is_empty() {
            // Interrupted by the kernel's work for the ring: there may be something.
            let _ = epoll.wait(-1, &mut [EpollEvent::default()]);
            self.queue.acknowledge();
            self.queue.poll(completed).expect("completions");
        }
    }
}
