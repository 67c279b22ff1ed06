//! Drivers that break the rules of the ring: the device ends up asking for a reset or ignores
//! them, its worker is still there to hear, and after a reset it works again.

use std::time::Duration;

use proptest::prelude::*;

use super::{Bench, EVENT_IDX, INDIRECT, bench, bench_with};
use crate::event::DeviceEvent;
use crate::virtio::testing::{
    Descriptor, EchoDevice, Ring, TestDriver, VERSION_1, eventually, within,
};

const SIZE: u16 = 16;
const FEATURES: u64 = VERSION_1 | INDIRECT;

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// Starts the device with these descriptors and heads, kicks, and gives the worker time; says
/// whether it used as many chains as were available or asked for a reset. Then the device has to
/// come back to work.
fn survives(driver: &mut TestDriver, table: &[Descriptor], heads: &[u16]) -> (usize, bool) {
    driver.start(FEATURES, SIZE);
    for (index, descriptor) in table.iter().enumerate() {
        driver.write_descriptor(0, index as u16, *descriptor);
    }
    for head in heads {
        driver.publish(0, *head);
    }
    driver.kick(0);
    let mut used = 0;
    within(Duration::from_secs(10), || {
        used += usize::from(driver.take_used(0).is_some());
        used == heads.len() || driver.needs_reset()
    });
    let outcome = (used, driver.needs_reset());
    comes_back(driver);
    outcome
}

fn comes_back(driver: &mut TestDriver) {
    driver.start(FEATURES, SIZE);
    assert_eq!(driver.exchange(0, b"well again", 10), b"well again");
}

#[test]
fn chains_that_loop_are_cut_off() {
    let Bench { mut driver, .. } = bench();
    let itself = [descriptor(0x10_0000, 1, Descriptor::NEXT, 0)];
    assert_eq!(survives(&mut driver, &itself, &[0]), (1, false));
    let pair = [
        descriptor(0x10_0000, 1, Descriptor::NEXT, 1),
        descriptor(0x10_0000, 1, Descriptor::NEXT | Descriptor::WRITE, 0),
    ];
    assert_eq!(survives(&mut driver, &pair, &[0, 1]), (2, false));
}

#[test]
fn chains_longer_than_the_queue_and_next_out_of_range_are_cut_off() {
    let Bench { mut driver, .. } = bench();
    let long: Vec<_> = (0..SIZE)
        .map(|index| descriptor(0x10_0000, 1, Descriptor::NEXT, (index + 1) % SIZE))
        .collect();
    assert_eq!(survives(&mut driver, &long, &[3]), (1, false));
    let wild = [descriptor(0x10_0000, 1, Descriptor::NEXT, 0xffff)];
    assert_eq!(survives(&mut driver, &wild, &[0]), (1, false));
}

#[test]
fn buffers_out_of_memory_of_no_length_or_of_4_gib_are_harmless() {
    let Bench { mut driver, .. } = bench();
    for flags in [0, Descriptor::WRITE] {
        for (address, len) in [
            (0x10_0000, 0),
            (0x10_0000, u32::MAX),
            (u64::MAX, 1),
            (u64::MAX - 15, u32::MAX),
            ((4 << 20) - 1, 2),
            (0xfee0_0000, 4),
        ] {
            let table = [
                descriptor(0x10_0000, 64, Descriptor::NEXT, 1),
                descriptor(address, len, flags, 0),
            ];
            assert_eq!(survives(&mut driver, &table, &[0]), (1, false));
        }
    }
}

#[test]
fn a_head_that_is_no_descriptor_needs_a_reset() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    let fired = guest.machine.vectors()[2].fired();
    assert_eq!(survives(&mut driver, &[], &[SIZE]), (0, true));
    assert_eq!(survives(&mut driver, &[], &[0xffff]), (0, true));
    assert_eq!(guest.machine.vectors()[2].fired(), fired + 2);
}

#[test]
fn wild_available_indices_need_a_reset() {
    let Bench { mut driver, .. } = bench();
    for index in [SIZE + 1, 0x8000, 0xffff] {
        driver.start(FEATURES, SIZE);
        driver.set_available_index(0, index);
        driver.kick(0);
        assert!(eventually(|| driver.needs_reset()), "{index:#x}");
        comes_back(&mut driver);
    }
}

#[test]
fn indirect_tables_in_tables_of_bad_lengths_or_out_of_memory_are_harmless() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    let inner = descriptor(0x20_0000, 16, Descriptor::INDIRECT, 0);
    guest.poke(0x20_0000, &inner.bytes());
    // A table of 65535 entries that all point at the next.
    let each = descriptor(0x10_0000, u32::MAX, Descriptor::NEXT | Descriptor::WRITE, 0);
    guest.poke(0x21_0000, &each.bytes());
    for (address, len) in [
        (0x20_0000, 16),
        (0x20_0000, 0),
        (0x20_0000, 17),
        (0x20_0000, u32::MAX),
        (0x20_0000, 16 * 0x1_0000),
        (0x21_0000, 16 * 0xffff),
        (u64::MAX - 8, 16),
        (1 << 40, 64),
    ] {
        for flags in [
            Descriptor::INDIRECT,
            Descriptor::INDIRECT | Descriptor::NEXT,
        ] {
            let table = [descriptor(address, len, flags, 0)];
            assert_eq!(survives(&mut driver, &table, &[0]), (1, false));
        }
    }
}

#[test]
fn one_descriptor_made_available_many_times_is_answered_as_often() {
    let Bench { mut driver, .. } = bench();
    let table = [descriptor(0x10_0000, 1, 0, 0)];
    let heads = [0; SIZE as usize];
    assert_eq!(survives(&mut driver, &table, &heads), (heads.len(), false));
}

#[test]
fn rings_that_are_not_in_memory_or_not_aligned_need_a_reset() {
    let Bench {
        mut driver,
        guest,
        events,
        ..
    } = bench();
    let good = Ring {
        size: SIZE,
        descriptors: 0x1_0000,
        available: 0x2_0000,
        used: 0x3_0000,
    };
    let end = 4 << 20;
    for ring in [
        Ring {
            descriptors: end - 16,
            ..good
        },
        Ring {
            available: end,
            ..good
        },
        Ring { used: !3, ..good },
        Ring {
            used: end - 8,
            ..good
        },
        Ring {
            descriptors: 0x1_0008,
            ..good
        },
        Ring {
            available: 0x2_0001,
            ..good
        },
        Ring {
            used: 0x3_0002,
            ..good
        },
        Ring {
            descriptors: !0xf,
            ..good
        },
    ] {
        assert!(driver.reset());
        events.lock().unwrap().clear();
        let told = guest.machine.vectors()[2].fired();
        assert!(driver.negotiate(FEATURES));
        driver.place_queue(0, ring);
        driver.driver_ok();
        assert_eq!(driver.status(), 0x4f, "{ring:x?}");
        assert_eq!(guest.machine.vectors()[2].fired(), told + 1);
        assert!(matches!(
            events.lock().unwrap()[..],
            [DeviceEvent::Failed { .. }]
        ));
        comes_back(&mut driver);
    }
}

#[test]
fn rings_that_lie_on_one_another_are_the_drivers_own_trouble() {
    let Bench { mut driver, .. } = bench();
    for fill in [0u8, 1, 0xff] {
        assert!(driver.reset());
        assert!(driver.negotiate(FEATURES | EVENT_IDX));
        driver.guest.poke(0x1_0000, &[fill; 0x1000]);
        let ring = Ring {
            size: SIZE,
            descriptors: 0x1_0000,
            available: 0x1_0000,
            used: 0x1_0000,
        };
        driver.place_queue(0, ring);
        driver.driver_ok();
        for _ in 0..20 {
            driver.kick(0);
        }
        comes_back(&mut driver);
    }
}

#[test]
fn reconfiguring_an_active_queue_has_no_effect() {
    let Bench { mut driver, .. } = bench();
    driver.start(FEATURES, SIZE);
    let wild = Ring {
        size: 8,
        descriptors: 1 << 40,
        available: 1 << 41,
        used: 1 << 42,
    };
    driver.place_queue(0, wild);
    driver.common_write(0x1c, &[0, 0]);
    assert_eq!(driver.exchange(0, b"as before", 9), b"as before");
    assert!(!driver.needs_reset());
}

#[test]
fn a_driver_that_never_stops_adding_can_be_reset() {
    let Bench { mut driver, .. } = bench_with(EchoDevice::new(&[8]));
    driver.start(FEATURES, 8);
    driver.write_descriptor(0, 0, descriptor(0x10_0000, 0, 0, 0));
    let (guest, ring) = (driver.guest.clone(), driver.ring(0));
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopping = stop.clone();
    // Another vCPU, which always has more to do for the device.
    let feeder = std::thread::spawn(move || {
        while !stopping.load(std::sync::atomic::Ordering::SeqCst) {
            let used = guest.peek_u16(ring.used + 2);
            guest.poke(ring.available + 2, &used.wrapping_add(8).to_le_bytes());
        }
    });
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    let done = driver.reset();
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    feeder.join().unwrap();
    assert!(done);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn rings_of_arbitrary_bytes_are_survived(
        bytes in proptest::collection::vec(any::<u8>(), 16 * SIZE as usize),
        plausible in proptest::collection::vec((0u64..8 << 20, 0u32..0x2_0000, 0u16..8, 0u16..20), 8),
        heads in proptest::collection::vec(0u16..20, 0..20),
        index in any::<u16>(),
        event_idx in any::<bool>(),
    ) {
        let Bench { mut driver, .. } = bench_with(EchoDevice::new(&[SIZE]));
        driver.start(if event_idx { FEATURES | EVENT_IDX } else { FEATURES }, SIZE);
        driver.guest.poke(driver.ring(0).descriptors, &bytes);
        for (at, (address, len, flags, next)) in plausible.into_iter().enumerate() {
            driver.write_descriptor(0, at as u16, descriptor(address, len, flags, next));
        }
        for head in heads {
            driver.publish(0, head);
        }
        driver.kick(0);
        driver.set_available_index(0, index);
        driver.kick(0);
        comes_back(&mut driver);
    }
}
