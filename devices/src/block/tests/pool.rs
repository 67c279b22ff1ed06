//! Without io_uring: the threads of the queues.

use std::fs;

use super::driver::BUFFERS;
use super::*;

const SYNC: Setup = Setup {
    direct: true,
    sync: true,
    event_idx: true,
};
const QUEUES: u16 = 4;
const REQUESTS: u64 = 40;

/// The seccomp modes of the threads of this process with such a name.
fn modes(name: &str) -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks
        .filter_map(|task| {
            // Other tests' threads come and go.
            let comm = fs::read_to_string(task.path().join("comm")).ok()?;
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let mode = status.lines().find_map(|l| l.strip_prefix("Seccomp:\t"))?;
            (comm.trim() == name).then(|| mode.to_owned())
        })
        .collect()
}

fn build_as(id: &str, config: &DiskConfig) -> Block {
    let context = BuildContext {
        reporter: Reporter::new(id, Arc::new(|_, _| ())),
        seccomp: SeccompMode::Enforce,
        discards: Inhibitor::default(),
    };
    Block::new(config, context).unwrap()
}

/// Offers as many requests as fit, each of a sector of its own, which differ from queue to queue.
fn offer(driver: &mut Driver, index: u16, kind: u32) {
    for number in 0..REQUESTS {
        let sector = u64::from(index) * REQUESTS + number;
        let base = base(index, number);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        driver.poke(base, &header);
        let head = driver.chain(&[
            (base, 16, false),
            (base + 0x200, 512, kind == 0),
            (base + 0x400, 1, true),
        ]);
        driver.offer(head);
    }
    driver.ring();
}

fn base(index: u16, number: u64) -> u64 {
    BUFFERS + u64::from(index) * 0x10_0000 + number * 0x1000
}

#[test]
fn each_queue_has_threads_of_its_own_each_under_a_filter_and_none_is_left_behind() {
    let image = image();
    let mut config = config(&image, SYNC);
    config.num_queues = QUEUES;
    let block = build_as("pooled", &config);
    let names: Vec<_> = (0..QUEUES)
        .map(|index| crate::block::thread_name("pooled", index, "_io"))
        .collect();
    for name in &names {
        assert_eq!(modes(name), ["2"; 8], "{name}");
    }
    let memory = memory();
    let mut drivers = Vec::new();
    for index in 0..QUEUES {
        let mut driver = Driver::new(memory.clone(), index, 128, true);
        driver.activate(&block.workers()[usize::from(index)], index);
        offer(&mut driver, index, 0);
        drivers.push(driver);
    }
    for (index, driver) in (0..).zip(&mut drivers) {
        for _ in 0..REQUESTS {
            driver.wait_used();
        }
        for number in 0..REQUESTS {
            let sector = u64::from(index) * REQUESTS + number;
            let bytes = driver.peek(base(index, number) + 0x200, 512);
            assert_eq!(bytes, expected(sector * 512, 512));
        }
    }
    // Dropped while the threads are at it.
    for (index, driver) in (0..).zip(&mut drivers) {
        offer(driver, index, 1);
    }
    drop(block);
    let after = memory_of(&drivers);
    for name in &names {
        assert!(modes(name).is_empty(), "{name}");
    }
    assert!(memory_of(&drivers) == after, "memory was touched");
}

fn memory_of(drivers: &[Driver]) -> Vec<Vec<u8>> {
    let all = drivers.iter().map(|driver| driver.peek(0, 0x80_0000));
    all.collect()
}

#[test]
fn many_queues_share_a_bounded_number_of_threads_and_a_queue_of_one_request_has_none() {
    let image = image();
    let mut config = config(&image, SYNC);
    config.num_queues = 16;
    let block = build_as("crowd", &config);
    for index in 0..16 {
        let name = crate::block::thread_name("crowd", index, "_io");
        assert_eq!(modes(&name).len(), 2, "{name}");
    }
    drop(block);
    config.num_queues = 1;
    config.queue_size = 2;
    config.disable_io_uring = true;
    let block = build_as("short", &config);
    assert_eq!(modes("short_q0_io").len(), 2);
    drop(block);
}
