//! All of a hostile guest at once: vCPUs that write registers in any order, one that writes over
//! rings and requests while they are being served, and a VMM that pauses, resumes and unplugs
//! meanwhile. Nothing may panic, break a filter's rules or hang.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;
use crate::virtio::testing::{TestDriver, TestGuest, VERSION_1};

/// How long each combination of engine and cache mode is tried.
const DURATION: Duration = Duration::from_millis(300);
/// What an order may take at most.
const PATIENCE: Duration = Duration::from_secs(20);

/// A small generator (xorshift64*); proptest's would cost more than what it tests.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }
}

/// Rings at `0x1_0000 * (queue + 1)`: 16 descriptors, and rings of the same page.
fn set_up_and_start(guest: &TestGuest, slot: u8, random: &mut Random) {
    let bar = TestGuest::bar_base(slot);
    guest.config_write(slot, 0x10, &(bar as u32).to_le_bytes());
    guest.config_write(slot, 4, &[6, 0]);
    let common = |offset: u64, data: &[u8]| guest.mmio_write(bar + offset, data);
    let mut status = [0];
    guest.mmio_read(bar + 0x14, &mut status);
    if status[0] & 0x40 == 0 && status[0] & 0x4 != 0 && random.below(50) > 0 {
        return;
    }
    common(0x14, &[0]);
    for _ in 0..1000 {
        guest.mmio_read(bar + 0x14, &mut status);
        if status[0] == 0 {
            break;
        }
        std::thread::yield_now();
    }
    common(0x14, &[3]);
    for (select, features) in [(0u32, random.next() as u32 & 0x3000_0a40), (1, 1)] {
        common(0x08, &select.to_le_bytes());
        common(0x0c, &features.to_le_bytes());
    }
    common(0x14, &[11]);
    for queue in 0..2u16 {
        let base = 0x1_0000 * (u64::from(queue) + 1);
        common(0x16, &queue.to_le_bytes());
        common(0x1a, &queue.to_le_bytes());
        common(0x18, &16u16.to_le_bytes());
        common(0x20, &base.to_le_bytes());
        common(0x28, &(base + 0x400).to_le_bytes());
        common(0x30, &(base + 0x800).to_le_bytes());
        guest.poke(base + 0x400, &[0; 64]);
        guest.poke(base + 0x800, &[0; 256]);
        common(0x1c, &[1, 0]);
    }
    common(0x14, &[15]);
}

fn registers(guest: &TestGuest, slot: u8, random: &mut Random) {
    let bar = TestGuest::bar_base(slot);
    let noise = random.next().to_le_bytes();
    let width = [1, 2, 4, 8][random.below(4) as usize];
    let mut data = [0; 8];
    match random.below(200) {
        0 => {
            guest.mmio_write(bar + 0x14, &[0]);
        }
        1..=9 => set_up_and_start(guest, slot, random),
        10 => guest.mmio_write(bar + random.below(0x40), &noise[..width]),
        11 => guest.mmio_write(bar + 0x2000 + random.below(0x40), &noise[..width]),
        12 => guest.mmio_read(bar + 0x2000 + random.below(0x40), &mut data[..width]),
        13 => guest.mmio_write(bar + 0x8000 + random.below(0x30), &noise[..width]),
        14 if noise[0] & 7 == 0 => {
            guest.config_write(slot, random.below(0x100), &noise[..width]);
        }
        15 => guest.config_write(slot, 0x42, &[0, noise[0]]),
        16 => guest.config_write(slot, 4, &[noise[0] & 6, 0]),
        18 => guest.config_read(slot, random.below(0x100), &mut data[..width]),
        _ => guest.mmio_write(bar + 0x3000 + random.below(2) * 4, &noise[..2]),
    }
}

fn scribble(guest: &TestGuest, random: &mut Random) {
    let ring = 0x1_0000 * (random.below(2) + 1);
    match random.below(12) {
        // A chain of header, data and status; sometimes with an indirect table or nonsense.
        0..4 => {
            let first = random.below(16);
            for (step, (len, flags)) in [(16, 1), (random.below(16) * 512, 1), (1, 2)]
                .into_iter()
                .enumerate()
            {
                let step = step as u64;
                let flags = flags
                    | if step == 1 { random.below(2) * 2 } else { 0 }
                    | if random.below(30) == 0 {
                        random.below(8)
                    } else {
                        0
                    };
                let address = 0x8_0000 + random.below(0x200) * 0x100;
                let at = ring + (first + step) % 16 * 16;
                guest.poke(at, &address.to_le_bytes());
                guest.poke(at + 8, &(len as u32).to_le_bytes());
                guest.poke(at + 12, &(flags as u16).to_le_bytes());
                guest.poke(at + 14, &(((first + step + 1) % 16) as u16).to_le_bytes());
            }
        }
        4..7 => {
            let index = guest.peek_u16(ring + 0x402);
            let waiting = index.wrapping_sub(guest.peek_u16(ring + 0x802));
            if waiting >= 8 && random.below(3000) > 0 {
                return;
            }
            guest.poke(
                ring + 0x404 + u64::from(index % 16) * 2,
                &(random.below(16) as u16).to_le_bytes(),
            );
            guest.poke(ring + 0x402, &index.wrapping_add(1).to_le_bytes());
        }
        7..11 => {
            let at = 0x8_0000 + random.below(0x200) * 0x100;
            let kind = [0u32, 1, 4, 8, 11, 13, 99][random.below(7) as usize];
            guest.poke(at, &kind.to_le_bytes());
            guest.poke(at + 8, &random.below(1 << 14).to_le_bytes());
        }
        _ if random.below(300) > 0 => {}
        _ => guest.poke(ring + random.below(0x1000), &random.next().to_le_bytes()),
    }
}

#[test]
fn a_guest_that_breaks_every_rule_at_once_hangs_and_crashes_nothing() {
    let mut served = 0;
    for (seed, setup) in setups().filter(|setup| setup.event_idx).enumerate() {
        let image = image();
        let mut config = config(&image, setup);
        config.num_queues = 2;
        let (block, _) = build(&config).unwrap();
        let guest = TestGuest::new(1 << 20);
        let (slot, device) = guest.plug(Arc::new(block));
        drop(TestDriver::new(&guest, slot));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for vcpu in 0..4 {
                let (guest, over) = (&guest, &over);
                scope.spawn(move || {
                    let mut random = Random(1 + vcpu + 100 * seed as u64);
                    while !over.load(Ordering::Relaxed) {
                        match vcpu {
                            0 | 1 => registers(guest, slot, &mut random),
                            _ => scribble(guest, &mut random),
                        }
                    }
                });
            }
            let end = Instant::now() + DURATION;
            while Instant::now() < end {
                let (done, all) = mpsc::channel();
                for worker in device.device().workers() {
                    let done = done.clone();
                    worker.order(Order::Pause(Box::new(move || done.send(()).unwrap())));
                }
                for _ in 0..2 {
                    all.recv_timeout(PATIENCE).expect("a worker did not pause");
                }
                for worker in device.device().workers() {
                    worker.order(Order::Resume);
                }
                std::thread::sleep(Duration::from_millis(3));
            }
            // Half of the devices go while the guest is at them, as when it ejects them.
            if seed % 2 == 0 {
                guest.bus.unplug(slot).unwrap();
                device.reset();
                device.retire();
            }
            over.store(true, Ordering::Relaxed);
        });
        let counters = device.device().counters();
        served += counters["read_ops"] + counters["write_ops"];
        let begin = Instant::now();
        if seed % 2 == 1 {
            let mut driver = TestDriver::new(&guest, slot);
            assert!(driver.reset(), "the reset did not end: {setup:?}");
            assert!(driver.negotiate(VERSION_1));
            guest.bus.unplug(slot).unwrap();
        }
        drop(device);
        assert!(begin.elapsed() < PATIENCE);
    }
    assert!(served > 0, "nothing ever was as it should be");
}
