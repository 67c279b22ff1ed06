//! The engine by itself, over images that qemu-img made and over hostile ones.

mod chains;
mod data_file;
mod dirty;
mod hostile;
mod kinds;
pub(crate) mod qemu;

use std::path::Path;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use self::qemu::Random;
use super::super::{Buffers, Completion, Operation, Request};
use super::*;
use crate::guest_memory::GuestRam;
use crate::sandbox::SeccompMode;

const MEMORY: usize = 8 << 20;
const DEPTH: u16 = 16;
/// Of guest memory, for each request.
const ROOM: u64 = MEMORY as u64 / DEPTH as u64;

fn options(path: &Path) -> OpenOptions {
    OpenOptions {
        readonly: true,
        backing_files: true,
        ..OpenOptions::new(path)
    }
}

/// What is said when the image is refused.
fn refusal(options: &OpenOptions) -> String {
    match Qcow2Image::open(options) {
        Ok(_) => panic!("{} was accepted", options.path.display()),
        Err(error) => error.to_string(),
    }
}

struct Engine {
    image: Qcow2Image,
    queue: Box<dyn Queue>,
    memory: GuestRam,
}

impl Engine {
    fn open(options: &OpenOptions) -> Result<Self, BuildError> {
        Self::open_with(options, None)
    }

    fn open_with(options: &OpenOptions, threads: Option<&Threads>) -> Result<Self, BuildError> {
        let image = Qcow2Image::open(options)?;
        let ranges = [
            (GuestAddress(0), 12345 << 8),
            (GuestAddress(12345 << 8), MEMORY - (12345 << 8)),
        ];
        Ok(Self {
            queue: image.open_queue_with(DEPTH, threads).unwrap(),
            image,
            memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
        })
    }

    fn push(&mut self, tag: u16, offset: u64, length: u64, shift: u64) {
        let mut buffers = Buffers::default();
        let at = GuestAddress(u64::from(tag) * ROOM + shift);
        buffers.push(&self.memory, at, length as usize).unwrap();
        self.queue.push(Request {
            tag,
            operation: Operation::Read,
            offset,
            length,
            buffers,
        });
    }

    fn finish(&mut self) -> Vec<Completion> {
        let mut completed = Vec::new();
        self.queue.start().unwrap();
        while self.queue.held() > 0 {
            self.queue.wait(&mut completed).unwrap();
        }
        completed
    }

    fn read(&mut self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        self.push(0, offset, length, 0);
        self.finish().remove(0).result?;
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        Ok(bytes)
    }

    /// Reads all of the disk, and random pieces of it to odd addresses, several at a time.
    fn compare(&mut self, expected: &[u8], random: &mut Random) {
        let size = self.image.size_bytes();
        assert_eq!(size, expected.len() as u64);
        let mut pieces: Vec<(u64, u64, u64)> = Vec::new();
        let mut at = 0;
        while at < size {
            let len = (ROOM - 512).min(size - at);
            pieces.push((at, len, 0));
            at += len;
        }
        for _ in 0..64 {
            let offset = random.below(size / 512) * 512;
            let longest = [1, 8, 16, 200][random.below(4) as usize];
            let len = (1 + random.below(longest)) * 512;
            let shift = [0, 0, 512, 511][random.below(4) as usize];
            pieces.push((offset, len.min(size - offset), shift));
        }
        for group in pieces.chunks(DEPTH.into()) {
            for (tag, (offset, len, shift)) in group.iter().enumerate() {
                self.push(tag as u16, *offset, *len, *shift);
            }
            let completed = self.finish();
            assert_eq!(completed.len(), group.len());
            for completion in completed {
                completion.result.unwrap();
                let (offset, len, shift) = group[usize::from(completion.tag)];
                let mut bytes = vec![0; len as usize];
                let from = u64::from(completion.tag) * ROOM + shift;
                self.memory
                    .read_slice(&mut bytes, GuestAddress(from))
                    .unwrap();
                let range = offset as usize..(offset + len) as usize;
                let same = bytes == expected[range];
                assert!(same, "{len} bytes at {offset} differ");
            }
        }
    }
}

/// Compares what the engine reads with what qemu-img reads, for every way to read.
fn compare_with_qemu(path: &Path) {
    let expected = qemu::content(path);
    let mut random = Random(path.as_os_str().len() as u64);
    for (direct, sync) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut options = options(path);
        options.direct = direct;
        options.disable_io_uring = sync;
        let mut engine = Engine::open(&options).unwrap();
        engine.compare(&expected, &mut random);
        if sync {
            let threads = Threads::of_queue("qcow2_io".into(), SeccompMode::Enforce, 1);
            let mut engine = Engine::open_with(&options, Some(&threads)).unwrap();
            assert!(engine.queue.descriptor().is_some());
            engine.compare(&expected, &mut random);
        }
    }
}
