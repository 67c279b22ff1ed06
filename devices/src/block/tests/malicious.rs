//! What a hostile driver does: nothing of it may end the thread, stall the queue, or reach beyond
//! the disk and the guest's memory.

use std::cell::RefCell;

use proptest::prelude::*;

use super::driver::{BUFFERS, Descriptor, INDIRECT, MEMORY, NEXT, WRITE};
use super::*;

const PLAIN: Setup = Setup {
    direct: false,
    sync: false,
    event_idx: false,
};

/// Address, length, flags, next.
type Entry = (u64, u32, u16, u16);

/// Lays these descriptors at 0…, offers the first, and returns how much was "written".
fn provoke(disk: &mut Disk, descriptors: &[Entry]) -> u32 {
    for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
        let descriptor = Descriptor {
            address,
            len,
            flags,
            next,
        };
        disk.driver.set(index as u16, descriptor);
    }
    disk.driver.poke(STATUS, &[0xee]);
    disk.driver.offer(0);
    disk.driver.ring_anyway();
    let (head, len) = disk.driver.wait_used();
    assert_eq!(head, 0);
    len
}

fn still_works(disk: &mut Disk) {
    assert_eq!(disk.read(1, 512), (OK, expected(512, 512)));
}

#[test]
fn chains_without_a_place_for_a_status_are_given_back_with_nothing_written() {
    let mut disk = Disk::new(PLAIN);
    disk.header(HEADER, 0, 0);
    let table = BUFFERS + 0x8000;
    let outside = MEMORY + 0x1000;
    let cases: &[(&str, &[Entry])] = &[
        ("a header only", &[(HEADER, 16, 0, 0)]),
        ("to itself", &[(HEADER, 16, NEXT, 0)]),
        (
            "in a circle",
            &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 0)],
        ),
        ("out of the table", &[(HEADER, 16, NEXT, 128)]),
        ("far out of the table", &[(HEADER, 16, NEXT, u16::MAX)]),
        (
            "open at the end",
            &[(HEADER, 16, NEXT, 1), (STATUS, 1, WRITE | NEXT, 60_000)],
        ),
        (
            "status of no length",
            &[(HEADER, 16, NEXT, 1), (STATUS, 0, WRITE, 0)],
        ),
        (
            "status outside memory",
            &[(HEADER, 16, NEXT, 1), (outside, 1, WRITE, 0)],
        ),
        (
            "status at the end of the world",
            &[(HEADER, 16, NEXT, 1), (u64::MAX, 1, WRITE, 0)],
        ),
        (
            "status beyond it",
            &[(HEADER, 16, NEXT, 1), (u64::MAX, u32::MAX, WRITE, 0)],
        ),
        (
            "status half outside",
            &[(HEADER, 16, NEXT, 1), (MEMORY - 1, 2, WRITE, 0)],
        ),
        (
            "readable status",
            &[(HEADER, 16, NEXT, 1), (STATUS, 1, 0, 0)],
        ),
        (
            "readable after writable",
            &[
                (HEADER, 16, NEXT, 1),
                (DATA, 512, NEXT | WRITE, 2),
                (DATA, 512, NEXT, 3),
                (STATUS, 1, WRITE, 0),
            ],
        ),
        (
            "more than 4 GiB",
            &[
                (HEADER, 16, NEXT, 1),
                (DATA, u32::MAX, NEXT | WRITE, 2),
                (STATUS, 1, WRITE, 0),
            ],
        ),
        ("empty indirect table", &[(table, 0, INDIRECT, 0)]),
        ("broken indirect table", &[(table, 17, INDIRECT, 0)]),
        (
            "huge indirect table",
            &[(table, u32::MAX - 15, INDIRECT, 0)],
        ),
        (
            "indirect table outside memory",
            &[(outside, 64, INDIRECT, 0)],
        ),
    ];
    for (name, descriptors) in cases {
        assert_eq!(provoke(&mut disk, descriptors), 0, "{name}");
        assert_eq!(disk.driver.peek(STATUS, 1), [0xee], "{name}");
        still_works(&mut disk);
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table_and_an_endless_one_are_given_back() {
    let mut disk = Disk::new(PLAIN);
    let table = BUFFERS + 0x8000;
    let entry = |flags, next| Descriptor {
        address: table,
        len: 16,
        flags,
        next,
    };
    disk.driver.set_at(table, 0, entry(INDIRECT, 0));
    assert_eq!(provoke(&mut disk, &[(table, 16, INDIRECT, 0)]), 0);
    // 65,535 descriptors, all of them chained.
    for index in 0..u16::MAX {
        disk.driver
            .set_at(table, index, entry(NEXT, index.wrapping_add(1)));
    }
    assert_eq!(provoke(&mut disk, &[(table, 16 * 0xffff, INDIRECT, 0)]), 0);
    still_works(&mut disk);
}

#[test]
fn requests_that_make_no_sense_get_an_error_status() {
    let mut disk = Disk::new(PLAIN);
    let outside = MEMORY + 0x1000;
    let sectors = SIZE / 512;
    for (name, kind, sector, data) in [
        ("read past the end", 0, sectors, vec![(DATA, 512, true)]),
        (
            "read across the end",
            0,
            sectors - 1,
            vec![(DATA, 1024, true)],
        ),
        (
            "read at the end of the world",
            0,
            u64::MAX,
            vec![(DATA, 512, true)],
        ),
        (
            "wraps in bytes",
            0,
            u64::MAX / 512 + 1,
            vec![(DATA, 512, true)],
        ),
        ("read of no length", 0, 0, vec![]),
        ("read of half a sector", 0, 0, vec![(DATA, 256, true)]),
        ("read into nowhere", 0, 0, vec![(outside, 512, true)]),
        (
            "read into half of nowhere",
            0,
            0,
            vec![(MEMORY - 256, 512, true)],
        ),
        (
            "read into the end of the world",
            0,
            0,
            vec![(u64::MAX - 100, 512, true)],
        ),
        ("read with readable data", 0, 0, vec![(DATA, 512, false)]),
        ("write past the end", 1, sectors, vec![(DATA, 512, false)]),
        ("write from nowhere", 1, 0, vec![(outside, 512, false)]),
        ("write of no length", 1, 0, vec![(DATA, 0, false)]),
        ("write with writable data", 1, 0, vec![(DATA, 512, true)]),
        ("write of 2 GiB", 1, 0, vec![(DATA, 1 << 31, false)]),
        ("serial into nothing", 8, 0, vec![]),
        ("serial into nowhere", 8, 0, vec![(outside, 20, true)]),
        ("discard from nowhere", 11, 0, vec![(outside, 16, false)]),
    ] {
        assert_eq!(disk.send(kind, sector, &data), (IOERR, 1), "{name}");
        still_works(&mut disk);
    }
    // Too short a header, and one that is not in memory.
    let short = [(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)];
    assert_eq!(provoke(&mut disk, &short), 1);
    assert_eq!(disk.driver.peek(STATUS, 1), [IOERR]);
    let nowhere = [(outside, 16, NEXT, 1), (STATUS, 1, WRITE, 0)];
    assert_eq!(provoke(&mut disk, &nowhere), 1);
    assert_eq!(disk.driver.peek(STATUS, 1), [IOERR]);
    assert_eq!(disk.on_host(0, SIZE as usize), expected(0, SIZE as usize));
    assert!(disk.io_errors().is_empty(), "none reached the host");
}

#[test]
fn a_broken_ring_fails_the_device_until_it_is_reset() {
    for wild_head in [false, true] {
        let mut disk = Disk::new(PLAIN);
        still_works(&mut disk);
        if wild_head {
            disk.driver.offer(40_000);
        } else {
            disk.driver.set_avail_index(20_000);
        }
        disk.driver.ring_anyway();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while *disk.driver.signals.needs_reset.lock().unwrap() == 0 {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let failed = |event: &DeviceEvent| matches!(event, DeviceEvent::Failed { .. });
        disk.reset();
        assert!(disk.events.lock().unwrap().iter().any(failed));
        let worker = &disk.block.workers()[0];
        disk.driver.activate(worker, 0);
        still_works(&mut disk);
    }
}

#[test]
fn the_same_chain_offered_many_times_is_done_as_often() {
    for setup in setups() {
        let mut disk = Disk::with(setup, |config| config.queue_size = 16);
        disk.header(HEADER, 0, 0);
        let head = disk
            .driver
            .chain(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        for _ in 0..50 {
            for _ in 0..16 {
                disk.driver.offer(head);
            }
            disk.driver.ring();
            for _ in 0..16 {
                assert_eq!(disk.driver.wait_used(), (head, 513));
            }
        }
    }
}

#[test]
fn a_driver_that_never_stops_does_not_keep_the_disk_from_pausing() {
    for setup in setups() {
        let mut disk = Disk::with(setup, |config| config.queue_size = 16);
        disk.header(HEADER, 0, 0);
        let head = disk
            .driver
            .chain(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        let Disk {
            block, mut driver, ..
        } = disk;
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut offered = 0_u64;
                let mut used = 0_u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    while offered - used < 16 {
                        driver.offer(head);
                        offered += 1;
                    }
                    driver.ring_anyway();
                    used += std::iter::from_fn(|| driver.try_used()).count() as u64;
                }
            });
            for _ in 0..10 {
                order_and_wait(&block.workers()[0], Order::Pause);
                block.workers()[0].order(Order::Resume);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}

/// Addresses and lengths that are often, but not always, sensible.
fn descriptor() -> impl Strategy<Value = Entry> {
    let address = prop_oneof![
        4 => BUFFERS..BUFFERS + 0x8000,
        1 => 0..MEMORY + 0x1000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        3 => prop_oneof![Just(16), Just(512), Just(1), Just(20), Just(4096)],
        1 => 0..0x1_0000_u32,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0..4_u16, 1 => 0..8_u16];
    let next = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    (address, len, flags, next)
}

#[test]
fn random_descriptor_tables_never_stall_the_queue() {
    use proptest::collection::vec;
    use proptest::test_runner::{Config, TestRunner};
    for sync in [false, true] {
        // Read-only, so that what is on the disk is known.
        let disk = Disk::with(Setup { sync, ..PLAIN }, |config| {
            config.readonly = true;
            config.queue_size = 16;
        });
        let disk = RefCell::new(disk);
        let cases = (
            vec(descriptor(), 16),
            vec((0..16_u32, 0..20_000_u64), 8),
            vec(0..16_u16, 1..16),
        );
        let mut runner = TestRunner::new(Config::with_cases(300));
        runner
            .run(&cases, |(table, headers, heads)| {
                let disk = &mut *disk.borrow_mut();
                for (index, (kind, sector)) in headers.into_iter().enumerate() {
                    disk.header(BUFFERS + index as u64 * 0x1000, kind, sector);
                }
                for (index, (address, len, flags, next)) in table.into_iter().enumerate() {
                    let descriptor = Descriptor {
                        address,
                        len,
                        flags,
                        next,
                    };
                    disk.driver.set(index as u16, descriptor);
                }
                for head in heads {
                    disk.driver.offer(head);
                }
                disk.driver.ring_anyway();
                // Random buffers may lie over the rings themselves; then the device may fail,
                // but it must still obey.
                disk.reset();
                let worker = &disk.block.workers()[0];
                disk.driver.activate(worker, 0);
                still_works(disk);
                Ok(())
            })
            .unwrap();
    }
}
