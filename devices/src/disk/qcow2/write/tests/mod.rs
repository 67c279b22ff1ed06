//! The engine that writes: against QEMU's tools, against a model, through power cuts and faults.

mod bounds;
mod check;
mod crash;
mod external;
mod geometries;
mod grow;
mod hostile;
mod leaks;
mod pool;
mod populate;
mod sim;
mod take;
mod zero;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::super::{Buffers, Completion, OpenOptions, Operation, Queue, Request};
use super::super::chain::Chain;
use super::super::tests::qemu::{self, Random};
use super::io::Backend;
use super::queue::WriteQueue;
use super::*;
use crate::guest_memory::GuestRam;

pub const DEPTH: u16 = 16;
/// Of guest memory, for each request.
const ROOM: u64 = 1 << 20;

/// What `scripts/soak` asks for; the default is what there is time for in every run.
fn wanted(variable: &str, default: u64) -> u64 {
    let value = std::env::var(variable).ok();
    value.map_or(default, |value| value.parse().unwrap())
}

/// A seed of a test, and of the run that `scripts/soak` makes of it.
fn seed(of: u64) -> u64 {
    let run = wanted("BALLAST_SEED", 0);
    if run != 0 {
        println!("BALLAST_SEED={run}");
    }
    of + run * 1_000_000
}

fn options(path: &Path, direct: bool, sync: bool) -> OpenOptions {
    OpenOptions {
        direct,
        disable_io_uring: sync,
        backing_files: true,
        ..OpenOptions::new(path)
    }
}

fn writable(options: &OpenOptions) -> Writable {
    let (chain, top) = Chain::open(options).unwrap();
    Writable::open(Arc::new(chain), &top, &options.path).unwrap()
}

/// What a sector of the disk may hold.
#[derive(Clone, Debug, Default)]
struct Sector {
    /// Every value that it was given, and when: begun and completed (`u64::MAX`: not yet). The
    /// first is what was there at the beginning.
    values: Vec<(u64, u64, Value)>,
}

/// A sector's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// The beginning of what it holds: different for each write of each sector.
    Stamp(u64),
    /// Not known: discarded, or a write that failed.
    Any,
}

/// The bytes of a stamp: it is all over the sector.
fn bytes_of(stamp: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
    bytes
}

/// The stamp of such bytes; `None` if they are of two.
fn stamp_of(bytes: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes
        .chunks_exact(8)
        .all(|word| word == stamp.to_le_bytes())
        .then_some(stamp)
}

/// A disk that is written to at random, and what should be on it.
struct Driver {
    queue: WriteQueue,
    memory: GuestRam,
    sectors: Vec<Sector>,
    random: Random,
    /// Tags in use: what, where, and how many sectors.
    busy: BTreeMap<u16, (Operation, u64, u64)>,
    /// Counts what happens, for tests without a host that does.
    clock: Box<dyn FnMut() -> u64>,
    /// When a flush that succeeded began and ended.
    flushes: Vec<(u64, u64)>,
    begun: BTreeMap<u16, u64>,
    /// Sectors that were written durably, as a flush of theirs.
    durable: Vec<(u64, u64, u64)>,
    reads_at: BTreeMap<u16, u64>,
    writes: u64,
    /// What is read is not looked at.
    trusting: bool,
    errors: Vec<io::Error>,
    /// What requests look like: the longest, in sectors.
    longest: u64,
}

impl Driver {
    fn new(queue: WriteQueue, content: &[u8], seed: u64) -> Self {
        let bytes = usize::from(DEPTH) * ROOM as usize;
        // Two regions, so that buffers come in pieces.
        let ranges = [
            (GuestAddress(0), 12345 << 9),
            (GuestAddress(12345 << 9), bytes - (12345 << 9)),
        ];
        let sectors = content.chunks(512).map(|bytes| {
            let value = stamp_of(bytes).map_or(Value::Any, Value::Stamp);
            Sector {
                values: vec![(0, 0, value)],
            }
        });
        let mut ticks = 0;
        Self {
            queue,
            memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
            sectors: sectors.collect(),
            random: Random(seed),
            busy: BTreeMap::new(),
            clock: Box::new(move || {
                ticks += 1;
                ticks
            }),
            flushes: Vec::new(),
            begun: BTreeMap::new(),
            durable: Vec::new(),
            reads_at: BTreeMap::new(),
            writes: 0,
            trusting: false,
            errors: Vec::new(),
            longest: 400,
        }
    }

    /// Begins a random request that does not overlap with another one.
    fn push_random(&mut self) {
        let Some(tag) = (0..DEPTH).find(|tag| !self.begun.contains_key(tag)) else {
            return;
        };
        let total = self.sectors.len() as u64;
        let longest = [1, 8, 16, 64, self.longest][self.random.below(5) as usize];
        let mut start = self.random.below(total);
        if self.random.below(3) == 0 {
            start = start / 8 * 8;
        }
        let count = (1 + self.random.below(longest)).min(total - start);
        let overlaps =
            |(_, other, len): &(Operation, u64, u64)| start < other + len && *other < start + count;
        let operation = match self.random.below(20) {
            0 => Operation::Flush,
            1 => Operation::Discard,
            2 => Operation::WriteZeroes {
                unmap: self.random.below(2) == 0,
                durable: self.random.below(4) == 0,
            },
            3..=6 => Operation::Read,
            _ => Operation::Write {
                durable: self.random.below(30) == 0,
            },
        };
        if operation != Operation::Flush && self.busy.values().any(overlaps) {
            return;
        }
        self.push(tag, operation, start, count);
    }

    fn push(&mut self, tag: u16, operation: Operation, start: u64, count: u64) {
        let now = (self.clock)();
        self.begun.insert(tag, now);
        let mut buffers = Buffers::default();
        let base = u64::from(tag) * ROOM;
        let base = base + [0, 0, 512, 24][self.random.below(4) as usize] * u64::from(count < 2000);
        let transfer = matches!(operation, Operation::Read | Operation::Write { .. });
        if transfer {
            let address = GuestAddress(base);
            let len = count as usize * 512;
            buffers.push(&self.memory, address, len).unwrap();
        }
        if operation != Operation::Flush {
            self.busy.insert(tag, (operation, start, count));
        }
        self.writes += 1;
        for index in 0..count {
            let sector = start + index;
            let value = match operation {
                Operation::Flush | Operation::Read => break,
                Operation::Discard => Value::Any,
                Operation::WriteZeroes { .. } => Value::Stamp(0),
                Operation::Write { .. } => {
                    let stamp = sector << 32 | self.writes << 8 | 1;
                    let address = GuestAddress(base + index * 512);
                    self.memory.write_slice(&bytes_of(stamp), address).unwrap();
                    Value::Stamp(stamp)
                }
            };
            let values = &mut self.sectors[sector as usize].values;
            values.push((now, u64::MAX, value));
        }
        if operation == Operation::Read {
            // So that what is read is where the data is.
            self.reads_at.insert(tag, base);
        }
        self.queue.push(Request {
            tag,
            operation,
            offset: start * 512,
            length: count * 512,
            buffers,
        });
    }

    fn completed(&mut self, completion: Completion) {
        let now = (self.clock)();
        let tag = completion.tag;
        let begun = self.begun.remove(&tag).unwrap();
        let Some((operation, start, count)) = self.busy.remove(&tag) else {
            match completion.result {
                Ok(()) => self.flushes.push((begun, now)),
                Err(error) => self.errors.push(error),
            }
            return;
        };
        let failed = completion.result.is_err();
        let durable = matches!(
            operation,
            Operation::Write { durable: true } | Operation::WriteZeroes { durable: true, .. }
        );
        for sector in start..start + count {
            let values = &mut self.sectors[sector as usize].values;
            if operation == Operation::Read {
                continue;
            }
            let last = values.last_mut().unwrap();
            last.1 = now;
            if failed {
                // This value or the one before: nobody knows.
                last.2 = Value::Any;
            }
        }
        if let Err(error) = completion.result {
            self.errors.push(error);
            return;
        }
        if durable {
            // As a flush just after it, of these sectors only.
            for sector in start..start + count {
                self.durable.push((sector, begun, now));
            }
        }
        if operation == Operation::Read && !self.trusting {
            let base = self.reads_at[&tag];
            for index in 0..count {
                let mut bytes = [0; 512];
                let address = GuestAddress(base + index * 512);
                self.memory.read_slice(&mut bytes, address).unwrap();
                self.sectors[(start + index) as usize].assert_now(&bytes, start + index);
            }
        }
    }

    /// Has `count` random requests done, several at a time.
    fn run(&mut self, count: usize) {
        for _ in 0..count {
            self.push_random();
            self.queue.start().unwrap();
            if self.begun.len() >= usize::from(DEPTH) || self.random.below(3) == 0 {
                self.wait();
            }
        }
        self.finish();
    }

    fn wait(&mut self) {
        let mut completed = Vec::new();
        self.queue.wait(&mut completed).unwrap();
        assert!(self.begun.is_empty() || !completed.is_empty(), "it hangs");
        for completion in completed {
            self.completed(completion);
        }
    }

    fn finish(&mut self) {
        while !self.begun.is_empty() {
            self.wait();
        }
    }

    fn flush(&mut self) {
        self.push(0, Operation::Flush, 0, 0);
        self.finish();
    }

    /// Compares what is known with these bytes.
    fn compare(&self, content: &[u8]) {
        assert_eq!(content.len(), self.sectors.len() * 512);
        for (number, (sector, bytes)) in (0..).zip(self.sectors.iter().zip(content.chunks(512))) {
            sector.assert_now(bytes, number);
        }
    }
}

impl Sector {
    /// These bytes must be the newest.
    fn assert_now(&self, bytes: &[u8], number: u64) {
        let (_, _, newest) = self.values.last().unwrap();
        match newest {
            Value::Any => self.assert_known(bytes, number),
            Value::Stamp(stamp) => {
                let found = stamp_of(bytes);
                let same = found == Some(*stamp);
                assert!(
                    same,
                    "sector {number}: {found:x?} is not {:x?}",
                    self.values
                );
            }
        }
    }

    /// These bytes must be its own: zeroes, or something it once held.
    fn assert_known(&self, bytes: &[u8], number: u64) {
        let Some(found) = stamp_of(bytes) else {
            assert!(
                self.values[0].2 == Value::Any,
                "sector {number}: of two minds"
            );
            return;
        };
        let own = found == 0 || found >> 32 == number || self.values[0].2 == Value::Any;
        let known = own || self.values[0].2 == Value::Stamp(found);
        assert!(
            known,
            "sector {number}: foreign {found:x}, {:x?}",
            self.values
        );
    }
}
