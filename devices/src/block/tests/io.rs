//! What a well-behaved driver does.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::driver::{BUFFERS, SEAM};
use super::*;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const PLAIN: Setup = Setup {
    direct: false,
    sync: false,
    event_idx: true,
};

#[test]
fn what_is_written_is_in_the_file_and_read_back() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        assert_eq!(
            disk.read(3, 4096),
            (OK, expected(3 * 512, 4096)),
            "{setup:?}"
        );
        let bytes: Vec<u8> = (0..64 << 10).map(|i| (i % 199) as u8).collect();
        assert_eq!(disk.write(16, &bytes), OK, "{setup:?}");
        assert_eq!(disk.flush(), OK);
        assert_eq!(disk.on_host(16 * 512, bytes.len()), bytes);
        assert_eq!(disk.on_host(0, 16 * 512), expected(0, 16 * 512));
        assert_eq!(disk.read(16, bytes.len() as u32), (OK, bytes));
        let last = SIZE / 512 - 1;
        assert_eq!(disk.read(last, 512), (OK, expected(last * 512, 512)));
        assert!(disk.io_errors().is_empty());
    }
}

#[test]
fn buffers_that_the_disk_cannot_use_directly_are_bounced() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        // Odd addresses and lengths, across the seam between two host mappings, and longer than a
        // bounce buffer.
        let len: u32 = 600 << 10;
        let pieces = |writable| {
            [
                (SEAM - 1001, 3001, writable),
                (SEAM + 0x2_0001, 1, writable),
                (SEAM + 0x4_0003, len - 3002, writable),
            ]
        };
        let (status, written) = disk.send(0, 8, &pieces(true));
        assert_eq!((status, written), (OK, len + 1), "{setup:?}");
        let mut bytes = Vec::new();
        for (address, len, _) in pieces(true) {
            bytes.extend(disk.driver.peek(address, len as usize));
        }
        assert_eq!(bytes, expected(8 * 512, len as usize), "{setup:?}");
        assert_eq!(disk.send(1, 2048, &pieces(false)).0, OK, "{setup:?}");
        assert_eq!(disk.on_host(2048 * 512, len as usize), bytes);
    }
}

#[test]
fn a_deep_queue_of_requests_is_served_whole() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        // Three descriptors each, all misaligned so that bounce buffers run short; indirect ones
        // in between.
        for round in 0..20_u64 {
            let count = 40_u64;
            for i in 0..count {
                let base = BUFFERS + 0x10_0000 + i * 0x4000;
                disk.header(base, 0, i * 8 + round);
                let pieces = [
                    (base, 16, false),
                    (base + 0x101, 4096, true),
                    (base + 0x2000, 1, true),
                ];
                let head = match i % 3 {
                    0 => disk.driver.indirect_chain(base + 0x3000, &pieces),
                    _ => disk.driver.chain(&pieces),
                };
                disk.driver.offer(head);
            }
            disk.driver.ring();
            for _ in 0..count {
                disk.driver.wait_used();
            }
            for i in 0..count {
                let base = BUFFERS + 0x10_0000 + i * 0x4000;
                assert_eq!(disk.driver.peek(base + 0x2000, 1), [OK], "{setup:?}");
                let bytes = disk.driver.peek(base + 0x101, 4096);
                assert_eq!(bytes, expected((i * 8 + round) * 512, 4096), "{setup:?}");
            }
        }
    }
}

#[test]
fn discard_frees_space_and_write_zeroes_writes_zeroes() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        let before = disk.file().metadata().unwrap().blocks();
        assert_eq!(disk.range(DISCARD, 2048, 4096, 0), OK, "{setup:?}");
        let after = disk.file().metadata().unwrap().blocks();
        assert!(after < before, "{setup:?}: {before} to {after} blocks");
        assert_eq!(disk.range(WRITE_ZEROES, 1, 9, 0), OK);
        assert_eq!(disk.on_host(512, 9 * 512), vec![0; 9 * 512]);
        assert_eq!(disk.on_host(10 * 512, 512), expected(10 * 512, 512));
        assert_eq!(disk.range(WRITE_ZEROES, 100, 1000, 1), OK);
        assert_eq!(disk.on_host(100 * 512, 512_000), vec![0; 512_000]);
        assert_eq!(disk.on_host(1100 * 512, 512), expected(1100 * 512, 512));
        assert_eq!(disk.file().metadata().unwrap().len(), SIZE);
    }
}

#[test]
fn a_disk_that_is_not_sparse_keeps_its_space() {
    let mut disk = Disk::with(PLAIN, |config| config.sparse = false);
    let before = disk.file().metadata().unwrap().blocks();
    assert_eq!(disk.range(DISCARD, 2048, 4096, 0), UNSUPP);
    assert_eq!(disk.range(WRITE_ZEROES, 0, 4096, 1), OK);
    assert_eq!(disk.on_host(0, 4096 * 512), vec![0; 4096 * 512]);
    assert!(disk.file().metadata().unwrap().blocks() >= before);
}

#[test]
fn flags_and_sizes_of_ranges_are_checked() {
    let mut disk = Disk::new(PLAIN);
    let sectors = (SIZE / 512) as u32;
    assert_eq!(disk.range(DISCARD, 0, 8, 1), UNSUPP, "unmap with discard");
    assert_eq!(disk.range(DISCARD, 0, 8, 2), UNSUPP);
    assert_eq!(disk.range(WRITE_ZEROES, 0, 8, 2), UNSUPP);
    assert_eq!(disk.range(WRITE_ZEROES, 0, 0, 0), IOERR);
    assert_eq!(disk.range(WRITE_ZEROES, 1, sectors, 0), IOERR);
    assert_eq!(disk.range(WRITE_ZEROES, u64::MAX, 2, 0), IOERR);
    assert_eq!(disk.range(DISCARD, 0, u32::MAX, 0), IOERR);
    assert_eq!(disk.send(DISCARD, 0, &[(DATA, 32, false)]).0, UNSUPP);
    assert_eq!(disk.send(DISCARD, 0, &[(DATA, 17, false)]).0, IOERR);
    assert_eq!(disk.send(DISCARD, 0, &[]).0, IOERR);
    assert_eq!(disk.on_host(0, 4096), expected(0, 4096));
    assert!(disk.io_errors().is_empty(), "none reached the host");
}

#[test]
fn the_serial_number_is_the_configured_or_the_files() {
    let mut disk = Disk::with(PLAIN, |config| config.serial = Some("ballast-1".into()));
    assert_eq!(disk.send(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(
        disk.driver.peek(DATA, 20),
        b"ballast-1\0\0\0\0\0\0\0\0\0\0\0"
    );
    let mut disk = Disk::new(PLAIN);
    assert_eq!(disk.send(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    let meta = disk.file().metadata().unwrap();
    let expected = format!("{}{}{}", meta.dev(), meta.rdev(), meta.ino());
    let serial = disk.driver.peek(DATA, 20);
    let len = expected.len().min(20);
    assert_eq!(serial[..len], expected.as_bytes()[..len]);
    assert_eq!(disk.send(GET_ID, 0, &[(DATA, 4, true)]), (OK, 5));
    assert_eq!(disk.send(99, 0, &[]).0, UNSUPP);
}

#[test]
fn a_readonly_disk_is_read_and_refuses_the_rest() {
    for setup in setups() {
        let mut disk = Disk::with(setup, |config| config.readonly = true);
        assert_eq!(disk.read(0, 512), (OK, expected(0, 512)));
        assert_eq!(disk.write(0, &[1; 512]), IOERR);
        assert_eq!(disk.range(DISCARD, 0, 8, 0), UNSUPP);
        assert_eq!(disk.range(WRITE_ZEROES, 0, 8, 0), IOERR);
        assert_eq!(disk.flush(), OK);
        assert_eq!(disk.on_host(0, 4096), expected(0, 4096));
    }
}

#[test]
fn with_the_write_cache_off_writes_go_through_in_every_mode() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        disk.block.features_accepted((1 << 9) | (1 << 11));
        disk.block.write_config(32, &[0]);
        assert_eq!(disk.write(8, &[5; 8192]), OK);
        assert_eq!(disk.range(WRITE_ZEROES, 16, 8, 1), OK);
        assert_eq!(disk.on_host(8 * 512, 4096), [5; 4096]);
        assert_eq!(disk.on_host(16 * 512, 4096), [0; 4096]);
    }
}

#[test]
fn a_header_may_be_split_in_any_way() {
    let mut disk = Disk::new(PLAIN);
    disk.header(HEADER, 0, 5);
    let mut pieces: Vec<_> = (0..16).map(|i| (HEADER + i, 1, false)).collect();
    // Data and status in one.
    pieces.push((DATA, 513, true));
    let head = disk.driver.chain(&pieces);
    disk.driver.offer(head);
    disk.driver.ring();
    assert_eq!(disk.driver.wait_used(), (head, 513));
    assert_eq!(disk.driver.peek(DATA, 512), expected(5 * 512, 512));
    assert_eq!(disk.driver.peek(DATA + 512, 1), [OK]);
}

#[test]
fn queues_work_side_by_side_each_on_its_own_thread() {
    let image = image();
    let mut config = config(&image, PLAIN);
    config.num_queues = 4;
    let (block, _) = build(&config).unwrap();
    assert_eq!(block.workers().len(), 4);
    assert_eq!(block.queue_sizes(), [128; 4]);
    let memory = memory();
    let mut drivers = Vec::new();
    for index in 0..4_u16 {
        let mut driver = Driver::new(memory.clone(), index, 128, true);
        assert_eq!(block.worker_of_queue(index.into()), usize::from(index));
        driver.activate(&block.workers()[usize::from(index)], index);
        let base = DATA + u64::from(index) * 0x2000;
        driver.poke(base, &[0; 16]);
        driver.poke(base + 8, &[index as u8]);
        let head = driver.chain(&[
            (base, 16, false),
            (base + 0x1000, 512, true),
            (base + 0x800, 1, true),
        ]);
        driver.offer(head);
        driver.ring();
        drivers.push(driver);
    }
    for (index, driver) in drivers.iter_mut().enumerate() {
        driver.wait_used();
        let bytes = driver.peek(DATA + index as u64 * 0x2000 + 0x1000, 512);
        assert_eq!(bytes, expected(index as u64 * 512, 512));
    }
    let totals = block.counters();
    assert_eq!((totals["read_ops"], totals["read_bytes"]), (4, 2048));
    assert!(totals["read_latency_max"] >= totals["read_latency_min"]);
}

#[test]
fn a_throttled_disk_is_slow_but_loses_nothing() {
    for setup in setups().filter(|setup| !setup.direct) {
        let mut disk = Disk::with(setup, |config| {
            config.rate_limiter_config = Some(RateLimiterConfig {
                bandwidth: Some(TokenBucketConfig {
                    size: 4096,
                    one_time_burst: Some(8192),
                    refill_time: 50,
                }),
                ops: None,
            });
        });
        let begin = Instant::now();
        // The burst, the bucket, and one request on credit. The next two wait until what the one
        // before them borrowed is paid back: one refill, and three.
        for _ in 0..4 {
            assert_eq!(disk.read(0, 4096).0, OK);
        }
        assert_eq!(disk.read(0, 12288), (OK, expected(0, 12288)));
        assert!(begin.elapsed() >= Duration::from_millis(50), "{setup:?}");
        assert_eq!(disk.read(8, 4096), (OK, expected(4096, 4096)));
        assert!(begin.elapsed() >= Duration::from_millis(200), "{setup:?}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{setup:?}");
    }
}

#[test]
fn a_disk_that_has_grown_is_read_and_written_beyond_its_old_end() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        let capacity = |disk: &Disk| {
            let mut bytes = [0; 8];
            disk.block.read_config(0, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let end = SIZE / 512;
        assert_eq!(disk.write(end, &[3; 4096]), IOERR);
        for size in [SIZE - 4096, SIZE + 1, u64::MAX] {
            assert!(disk.block.grow(size).is_err(), "{size}");
        }
        disk.block.grow(2 * SIZE).unwrap();
        assert_eq!(
            capacity(&disk),
            end,
            "the driver is told when the transport is ready"
        );
        assert_eq!(disk.write(end, &[3; 4096]), IOERR);
        disk.block.set_size();
        assert_eq!(capacity(&disk), 2 * end);
        assert_eq!(disk.write(end, &[3; 4096]), OK);
        assert_eq!(disk.read(end, 4096), (OK, vec![3; 4096]));
        assert_eq!(disk.read(2 * end - 8, 4096), (OK, vec![0; 4096]));
        assert_eq!(disk.read(2 * end - 7, 4096).0, IOERR);
        assert_eq!(disk.on_host(SIZE, 4096), [3; 4096]);
    }
}
