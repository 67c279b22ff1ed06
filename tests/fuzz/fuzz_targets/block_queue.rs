//! The side of virtio-blk that faces the virtqueue: descriptor tables, rings, request headers and
//! doorbells as a hostile driver makes them, on a disk with two queues. Afterwards a reset must
//! make the disk work again.
#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::virtio::testing::{Descriptor, Ring, TestDriver, VERSION_1};
use fuzz::bench::{BUFFERS, Bench, Mode, QUEUES};
use fuzz::input::{Entry, Kind, Length, Place, Rarely, Sector, header};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;

#[derive(Arbitrary, Debug)]
struct Input {
    mode: u8,
    indirect: bool,
    event_idx: bool,
    size_bits: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request in the form a driver makes, of parts that need not make sense.
    Request {
        other: bool,
        kind: Kind,
        sector: Sector,
        header: Rarely<Vec<(Place, Length, bool)>>,
        parts: Vec<(Place, Length, bool)>,
        status: Rarely<Vec<(Place, Length, bool)>>,
        table: Option<u16>,
        segment: [u32; 4],
    },
    Header(Place, Kind, u64),
    Entry(bool, u8, Entry),
    /// An entry of a table that may be used as an indirect one.
    TableEntry(u16, u8, Entry),
    Poke(Place, [u8; 8]),
    Offer {
        other: bool,
        head: u16,
        times: u8,
    },
    AvailableIndex(bool, u16),
    AvailableFlags(bool, u16),
    Kick(bool),
    Settle,
    Config(u8, Vec<u8>),
    Status(u8),
    /// Rings where they need not belong, while the queue is in use or not.
    Move {
        queue: u16,
        size: u16,
        parts: [Place; 3],
    },
    Restart,
}

struct Run<'a> {
    bench: &'a Bench,
    driver: TestDriver,
    features: u64,
    size: u16,
}

impl Run<'_> {
    fn poke(&self, address: u64, bytes: &[u8]) {
        // There need not be memory there.
        let _ = (self.bench.guest.memory).write_slice(bytes, GuestAddress(address));
    }

    fn header(&self, address: u64, kind: Kind, sector: u64) {
        self.poke(address, &header(kind, sector));
    }

    fn request(&mut self, step: &Step) {
        let Step::Request {
            other,
            kind,
            sector,
            header,
            parts,
            status,
            table,
            segment,
        } = step
        else {
            return;
        };
        let place = BUFFERS + 0x1_f000;
        self.header(place, *kind, sector.number());
        // What a DISCARD or WRITE_ZEROES says of itself.
        let words = segment.map(u32::to_le_bytes).concat();
        self.poke(place + 0x20, &words);
        let most = usize::from(self.size);
        let given = |parts: &[(Place, Length, bool)]| -> Vec<(u64, u32, bool)> {
            let parts = parts.iter().take(most);
            let part = |(at, len, writable): &(Place, Length, bool)| {
                (at.address(), len.bytes(), *writable)
            };
            parts.map(part).collect()
        };
        let sound = |parts: &Rarely<Vec<_>>, part| match &parts.0 {
            Some(parts) => given(parts),
            None => vec![part],
        };
        let mut all = sound(header, (place, 16, false));
        if matches!(kind, Kind::Discard | Kind::WriteZeroes) {
            all.push((place + 0x20, 16, false));
        }
        all.extend(given(parts));
        all.extend(sound(status, (place + 0x10, 1, true)));
        let count = all.len();
        for (index, (address, len, writable)) in all.into_iter().enumerate() {
            let next = if index + 1 < count {
                Descriptor::NEXT
            } else {
                0
            };
            let write = if writable { Descriptor::WRITE } else { 0 };
            let descriptor = Descriptor {
                address,
                len,
                flags: next | write,
                next: index as u16 + 1,
            };
            match *table {
                Some(at) => {
                    let at = BUFFERS + u64::from(at) + index as u64 * 16;
                    self.poke(at, &descriptor.bytes());
                }
                None if index < usize::from(self.size) => {
                    self.driver
                        .write_descriptor((*other).into(), index as u16, descriptor);
                }
                None => {}
            }
        }
        if let Some(at) = *table {
            let descriptor = Descriptor {
                address: BUFFERS + u64::from(at),
                len: count as u32 * 16,
                flags: Descriptor::INDIRECT,
                next: 0,
            };
            self.driver.write_descriptor((*other).into(), 0, descriptor);
        }
        self.driver.publish((*other).into(), 0);
        self.driver.kick((*other).into());
        self.bench.settle();
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Request { .. } => self.request(step),
            Step::Header(at, kind, sector) => self.header(at.address(), *kind, *sector),
            Step::Entry(other, index, entry) => {
                let index = u16::from(*index) % self.size;
                self.driver
                    .write_descriptor((*other).into(), index, entry.descriptor(index));
            }
            Step::TableEntry(at, index, entry) => {
                let at = BUFFERS + u64::from(*at) + u64::from(*index) * 16;
                self.poke(at, &entry.descriptor((*index).into()).bytes());
            }
            Step::Poke(at, bytes) => self.poke(at.address(), bytes),
            Step::Offer { other, head, times } => {
                for _ in 0..=times % 80 {
                    self.driver.publish((*other).into(), *head);
                }
            }
            Step::AvailableIndex(other, index) => {
                self.driver.set_available_index((*other).into(), *index);
            }
            Step::AvailableFlags(other, flags) => {
                self.driver.set_available_flags((*other).into(), *flags);
            }
            Step::Kick(other) => self.driver.kick((*other).into()),
            Step::Settle => self.bench.settle(),
            Step::Config(at, bytes) => self.driver.device_write((*at).into(), bytes),
            Step::Status(status) => self.driver.common_write(0x14, &[*status]),
            Step::Move { queue, size, parts } => {
                let [descriptors, available, used] = parts.map(Place::address);
                let ring = Ring {
                    size: *size,
                    descriptors,
                    available,
                    used,
                };
                self.driver.place_queue(*queue, ring);
            }
            Step::Restart => self.driver.start(self.features, self.size),
        }
    }
}

static BENCHES: LazyLock<[Bench; 4]> = LazyLock::new(|| Mode::ALL.map(Bench::new));

fuzz_target!(|input: Input| {
    let bench = &BENCHES[usize::from(input.mode) % BENCHES.len()];
    let driver = bench.fresh();
    let mut features = VERSION_1;
    features |= if input.indirect { INDIRECT } else { 0 };
    features |= if input.event_idx { EVENT_IDX } else { 0 };
    let mut run = Run {
        bench,
        features: features & driver.offered(),
        driver,
        size: 2 << (input.size_bits % 6),
    };
    run.driver.start(run.features, run.size);
    for step in input.steps.iter().take(64) {
        run.step(step);
    }
    for queue in 0..usize::from(QUEUES) {
        run.driver.kick(queue);
    }
    bench.settle();
    bench.check();
});
