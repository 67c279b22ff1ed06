//! Every register a guest can reach of a virtio PCI device: configuration space by ECAM and by
//! ports, the BAR with its virtio and MSI-X structures; any width, any offset, any order.
//! Afterwards a reset must make the device work again.
#![no_main]

use std::sync::LazyLock;
use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use devices::virtio::testing::{TestDriver, VERSION_1};
use fuzz::bench::{BUFFERS, Bench, Mode, RINGS};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    started: bool,
    refuse_doorbells: bool,
    accesses: Vec<Access>,
}

#[derive(Arbitrary, Debug)]
enum Access {
    ConfigRead(u16, u8),
    ConfigWrite(u16, Value),
    OtherSlot(u8, u16, Value),
    PortRead(u8, u8),
    PortWrite(u8, Value),
    BarRead(Offset, u8),
    BarWrite(Offset, Value),
    /// Where the BAR was moved to, or is thought to be.
    Memory(u64, Value),
    /// The registers that move the device on.
    Common(u8, Value),
    VectorRead(u16, u8, bool),
    VectorWrite(u16, u8, Value),
    Doorbell(u8),
    Status(u8),
    Queue {
        index: u8,
        size: u16,
        parts: [u16; 3],
    },
    Window(u32, u8, [u8; 4]),
    Settle,
}

/// Where in the BAR, or from its beginning.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Offset {
    Within(u16),
    /// In the structure that begins there, near its beginning.
    Structure(u8, u8),
    Any(u32),
}

impl Offset {
    fn bytes(self) -> u64 {
        match self {
            Self::Within(at) => at.into(),
            Self::Structure(page, at) => u64::from(page % 16) << 12 | u64::from(at),
            Self::Any(at) => at.into(),
        }
    }
}

/// What is written: mostly as wide as processors write.
#[derive(Arbitrary, Debug)]
enum Value {
    Byte(u8),
    Word(u16),
    Dword(u32),
    Qword(u64),
    Bytes(Vec<u8>),
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Byte(value) => value.to_le_bytes().into(),
            Self::Word(value) => value.to_le_bytes().into(),
            Self::Dword(value) => value.to_le_bytes().into(),
            Self::Qword(value) => value.to_le_bytes().into(),
            Self::Bytes(bytes) => bytes.iter().take(64).copied().collect(),
        }
    }
}

fn perform(bench: &Bench, driver: &TestDriver, access: &Access) {
    let (guest, slot) = (&bench.guest, bench.slot);
    let buffer = |width: &u8| vec![0; usize::from(width % 65)];
    match access {
        Access::ConfigRead(at, width) => guest.config_read(slot, (*at).into(), &mut buffer(width)),
        Access::ConfigWrite(at, value) => guest.config_write(slot, (*at).into(), &value.bytes()),
        Access::OtherSlot(other, at, value) => {
            guest.config_write(*other, (*at).into(), &value.bytes());
        }
        Access::PortRead(at, width) => guest.port_read((*at).into(), &mut buffer(width)),
        Access::PortWrite(at, value) => guest.port_write((*at).into(), &value.bytes()),
        Access::BarRead(at, width) => {
            guest.mmio_read(driver.bar + at.bytes(), &mut buffer(width));
        }
        Access::BarWrite(at, value) => guest.mmio_write(driver.bar + at.bytes(), &value.bytes()),
        Access::Memory(address, value) => guest.mmio_write(*address, &value.bytes()),
        Access::Common(at, value) => driver.common_write((*at).into(), &value.bytes()),
        Access::VectorRead(vector, dword, long) => {
            let entry = u64::from(*vector) * 16 + u64::from(dword % 4) * 4;
            let width = if *long { 8 } else { 4 };
            guest.mmio_read(driver.bar + 0x8000 + entry, &mut vec![0; width]);
        }
        Access::VectorWrite(vector, at, value) => {
            let entry = u64::from(*vector) * 16 + u64::from(at % 16);
            guest.mmio_write(driver.bar + 0x8000 + entry, &value.bytes());
        }
        Access::Doorbell(queue) => driver.kick((*queue).into()),
        Access::Status(status) => driver.common_write(0x14, &[*status]),
        Access::Queue { index, size, parts } => {
            driver.common_write(0x16, &u16::from(index % 4).to_le_bytes());
            driver.common_write(0x18, &size.to_le_bytes());
            for (part, register) in parts.iter().zip([0x20, 0x28, 0x30]) {
                let address = RINGS + u64::from(*part) * 0x10;
                driver.common_write(register, &address.to_le_bytes());
            }
            driver.common_write(0x1c, &[1, 0]);
        }
        Access::Window(offset, length, data) => {
            let at = driver.access.at;
            guest.config_write(slot, at + 8, &offset.to_le_bytes());
            guest.config_write(slot, at + 12, &u32::from(*length).to_le_bytes());
            guest.config_write(slot, at + 16, data);
            guest.config_read(slot, at + 16, &mut [0; 4]);
        }
        Access::Settle => bench.settle(),
    }
}

static BENCH: LazyLock<Bench> = LazyLock::new(|| Bench::new(Mode::ALL[1]));

fuzz_target!(|input: Input| {
    let bench = &*BENCH;
    let refuse = &bench.guest.machine.refuse_doorbells;
    refuse.store(input.refuse_doorbells, Ordering::SeqCst);
    let mut driver = bench.fresh();
    if input.started {
        driver.start(VERSION_1, 16);
    } else {
        // Rings that are sound, wherever the registers may be made to say they lie.
        bench.guest.poke(BUFFERS, &[0; 64]);
    }
    let select = 1u32 << 31 | u32::from(bench.slot) << 11;
    bench.guest.port_write(0, &select.to_le_bytes());
    for access in input.accesses.iter().take(256) {
        perform(bench, &driver, access);
    }
    bench.settle();
    refuse.store(false, Ordering::SeqCst);
    bench.check();
});
