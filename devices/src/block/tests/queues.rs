//! Several queues on one thread: a thin disk that is written to, the thread inside its real filter.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use super::enospc::Small;
use super::*;
use crate::block::snapshot::snapshot;
use crate::block::{ImageType, counters};
use crate::disk::qcow2::tests::qemu;
use crate::event::HoldOutcome;

pub(super) const QUEUES: u16 = 4;
const BLOCK: usize = 4096;
/// Requests that a driver has on offer at a time.
pub(super) const BATCH: usize = 8;
/// Where in its memory a driver has the first of them, and how far apart they are.
const SLOTS: u64 = BUFFERS;
const SLOT: u64 = 0x4000;

/// Each engine, through the page cache and past it.
fn engines() -> impl Iterator<Item = Setup> {
    setups().filter(|setup| setup.event_idx != setup.sync)
}

pub(super) struct Wide {
    pub block: Block,
    pub drivers: Vec<Driver>,
    events: Events,
}

impl Wide {
    pub fn on(path: &Path, setup: Setup) -> Self {
        Self::of_type(path, ImageType::Qcow2, setup)
    }

    pub fn of_type(path: &Path, image_type: ImageType, setup: Setup) -> Self {
        let config = json!({
            "path": path, "image_type": image_type, "num_queues": QUEUES, "queue_size": 32,
            "backing_files": image_type == ImageType::Qcow2, "direct": setup.direct,
            "disable_io_uring": setup.sync,
        });
        let config: DiskConfig = serde_json::from_value(config).unwrap();
        config.validate().unwrap();
        Self::of(&config, setup)
    }

    pub fn of(config: &DiskConfig, setup: Setup) -> Self {
        let (block, events) = build(config).unwrap();
        // An image that has an owner has one thread.
        let threads = match config.image_type {
            ImageType::Qcow2 => 1,
            _ => QUEUES.into(),
        };
        assert_eq!(block.workers().len(), threads);
        assert_eq!(block.queue_sizes(), [32; QUEUES as usize]);
        let driver = |index| Driver::new(memory(), index, config.queue_size, setup.event_idx);
        let drivers: Vec<Driver> = (0..QUEUES).map(driver).collect();
        let mut wide = Self {
            block,
            drivers,
            events,
        };
        wide.activate();
        wide
    }

    /// DRIVER_OK.
    pub fn activate(&mut self) {
        let (drivers, workers) = (&mut self.drivers, self.block.workers());
        if let [worker] = workers {
            assert_eq!(self.block.worker_of_queue(3), 0);
            return Driver::activate_all(drivers, worker);
        }
        for (driver, index) in drivers.iter_mut().zip(0..) {
            assert_eq!(self.block.worker_of_queue(index), index);
            driver.activate(&workers[index], index as u16);
        }
    }

    /// Has all threads do it, one after the other.
    pub fn order(&self, order: fn(crate::worker::Done) -> Order) {
        for worker in self.block.workers() {
            order_and_wait(worker, order);
        }
    }

    pub fn resume(&self) {
        for worker in self.block.workers() {
            worker.order(Order::Resume);
        }
    }

    pub fn outcomes(&self) -> Vec<HoldOutcome> {
        let events = self.events.lock().unwrap();
        let outcomes = events.iter().filter_map(|event| match event {
            DeviceEvent::DiskResumed { outcome } => Some(*outcome),
            _ => None,
        });
        outcomes.collect()
    }

    pub fn wait_held(&self, requests: u64) {
        for _ in 0..60_000 {
            if self.block.hold.held().0 == requests {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("never held: {requests}");
    }
}

/// What is written into a block, by its number.
pub(super) fn content_of(number: u64) -> Vec<u8> {
    let word = (number | 1 << 63).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}

/// Offers a request of `len` bytes in one of the driver's slots.
pub(super) fn offer(driver: &mut Driver, slot: usize, kind: u32, block: u64, len: usize) {
    let at = SLOTS + slot as u64 * SLOT;
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&(block * 8).to_le_bytes());
    driver.poke(at, &header);
    driver.poke(at + 0x100, &[0xee]);
    let mut pieces = vec![(at, 16, false)];
    if len > 0 {
        pieces.push((at + 0x1000, len as u32, kind == 0));
    }
    pieces.push((at + 0x100, 1, true));
    let head = driver.chain(&pieces);
    driver.offer(head);
}

pub(super) fn finish(driver: &mut Driver, count: usize) {
    driver.ring();
    for _ in 0..count {
        driver.wait_used();
    }
    for slot in 0..count {
        let status = SLOTS + slot as u64 * SLOT + 0x100;
        assert_eq!(driver.peek(status, 1), [OK], "{slot}");
    }
}

pub(super) fn write(driver: &mut Driver, blocks: &[u64]) {
    write_as(driver, blocks, content_of);
}

/// Writes to these blocks what `content` says.
pub(super) fn write_as(driver: &mut Driver, blocks: &[u64], content: impl Fn(u64) -> Vec<u8>) {
    for (slot, block) in blocks.iter().enumerate() {
        let data = SLOTS + slot as u64 * SLOT + 0x1000;
        driver.poke(data, &content(*block));
        offer(driver, slot, 1, *block, BLOCK);
    }
    finish(driver, blocks.len());
}

pub(super) fn read(driver: &mut Driver, blocks: &[u64]) -> Vec<Vec<u8>> {
    for (slot, block) in blocks.iter().enumerate() {
        offer(driver, slot, 0, *block, BLOCK);
    }
    finish(driver, blocks.len());
    let data = (0..blocks.len() as u64).map(|slot| SLOTS + slot * SLOT + 0x1000);
    data.map(|at| driver.peek(at, BLOCK)).collect()
}

pub(super) fn flush(driver: &mut Driver) {
    offer(driver, 0, 4, 0, 0);
    finish(driver, 1);
}

/// The blocks that a queue writes: of each cluster each queue has some.
pub(super) fn blocks_of(queue: usize, count: u64) -> Vec<u64> {
    let blocks = (0..count).map(|n| n * u64::from(QUEUES) + queue as u64);
    blocks.collect()
}

#[test]
fn queues_that_write_into_the_same_clusters_at_once_lose_nothing() {
    let Some(folder) = qemu::folder() else { return };
    for (number, setup) in engines().enumerate() {
        let folder = folder.path().join(number.to_string());
        std::fs::create_dir(&folder).unwrap();
        let (path, mut content) = super::qcow2::overlay(&folder);
        let mut wide = Wide::on(&path, setup);
        std::thread::scope(|scope| {
            for (queue, driver) in wide.drivers.iter_mut().enumerate() {
                scope.spawn(move || {
                    for blocks in blocks_of(queue, 128).chunks(BATCH) {
                        write(driver, blocks);
                        if blocks[0] % 3 == 0 {
                            flush(driver);
                        }
                        let found = read(driver, blocks);
                        for (block, found) in blocks.iter().zip(found) {
                            assert!(found == content_of(*block), "{setup:?}: {block}");
                        }
                    }
                });
            }
        });
        for queue in 0..usize::from(QUEUES) {
            for block in blocks_of(queue, 128) {
                content[block as usize * BLOCK..][..BLOCK].copy_from_slice(&content_of(block));
            }
            // Each counts its own.
            let counted = counters::sum([&*wide.block.counters[queue]].into_iter());
            assert_eq!((counted["write_ops"], counted["read_ops"]), (128, 128));
            // And sees what the others have written.
            let other = (queue + 1) % usize::from(QUEUES);
            let theirs = &blocks_of(other, BATCH as u64)[..];
            let found = read(&mut wide.drivers[queue], theirs);
            assert!(found == theirs.iter().map(|b| content_of(*b)).collect::<Vec<_>>());
        }
        flush(&mut wide.drivers[2]);
        drop(wide);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        assert!(qemu::content(&path) == content, "{setup:?}");
    }
}

#[test]
fn all_queues_stand_still_while_the_disk_is_paused_and_go_on_afterwards() {
    let Some(folder) = qemu::folder() else { return };
    for (number, setup) in engines().enumerate() {
        let path = qemu::create(folder.path(), &number.to_string(), "", SIZE);
        let mut wide = Wide::on(&path, setup);
        let Wide { block, drivers, .. } = &mut wide;
        let block = &*block;
        let running = AtomicU64::new(QUEUES.into());
        std::thread::scope(|scope| {
            for (queue, driver) in drivers.iter_mut().enumerate() {
                let running = &running;
                scope.spawn(move || {
                    for blocks in blocks_of(queue, 256).chunks(BATCH) {
                        write(driver, blocks);
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            while running.load(Ordering::SeqCst) > 0 {
                order_and_wait(&block.workers()[0], Order::Pause);
                let before = block.counters();
                std::thread::sleep(Duration::from_millis(2));
                let after = block.counters();
                assert_eq!(before["write_ops"], after["write_ops"], "{setup:?}");
                block.workers()[0].order(Order::Resume);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        drop(wide);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        let content = qemu::content(&path);
        for block in 0..256 * u64::from(QUEUES) {
            let found = &content[block as usize * BLOCK..][..BLOCK];
            assert!(found == content_of(block), "{setup:?}: {block}");
        }
    }
}

#[test]
fn what_several_queues_hold_for_lack_of_space_is_done_when_there_is_some_or_given_up_at_a_reset() {
    let Some(_) = qemu::folder() else { return };
    for setup in engines().filter(|setup| !setup.direct) {
        let Some(small) = Small::new() else { return };
        let path = qemu::create(&small.path(""), "image", "cluster_size=4096", SIZE);
        let mut wide = Wide::on(&path, setup);
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            write(driver, &blocks_of(queue, 1));
        }
        flush(&mut wide.drivers[0]);
        small.fill();
        // More than what may have been allocated ahead.
        let begin = |wide: &mut Wide| {
            for (queue, driver) in wide.drivers.iter_mut().enumerate() {
                let blocks = blocks_of(queue, 1 + BATCH as u64);
                for (slot, block) in blocks[1..].iter().enumerate() {
                    let slot = slot + 1;
                    let data = SLOTS + slot as u64 * SLOT + 0x1000;
                    driver.poke(data, &content_of(*block));
                    offer(driver, slot, 1, *block, BLOCK);
                }
                driver.ring();
            }
        };
        begin(&mut wide);
        let all = u64::from(QUEUES) * BATCH as u64;
        wide.wait_held(all);
        order_and_wait(&wide.block.workers()[0], Order::Pause);
        wide.block.workers()[0].order(Order::Resume);
        wide.wait_held(all);
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            // What has its space is read meanwhile, by each of them.
            assert!(read(driver, &blocks_of(queue, 1)) == [content_of(queue as u64)]);
        }
        small.make_space();
        wide.block.retry_held();
        for driver in &mut wide.drivers {
            for _ in 0..BATCH {
                driver.wait_used();
            }
            for slot in 1..=BATCH as u64 {
                assert_eq!(
                    driver.peek(SLOTS + slot * SLOT + 0x100, 1),
                    [OK],
                    "{setup:?}"
                );
            }
        }
        wide.wait_held(0);
        assert_eq!(wide.outcomes(), [HoldOutcome::Done], "{setup:?}");

        // The same beyond, and nobody waits for it.
        flush(&mut wide.drivers[1]);
        small.fill();
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            let block = 1024 + 16 * queue as u64;
            offer(driver, 1, 1, block, BLOCK);
            driver.ring();
        }
        wide.wait_held(QUEUES.into());
        order_and_wait(&wide.block.workers()[0], Order::Reset);
        assert_eq!(wide.block.hold.held(), (0, 0));
        assert_eq!(wide.outcomes(), [HoldOutcome::Done, HoldOutcome::Reset]);
        small.make_space();
        let Wide { block, drivers, .. } = &mut wide;
        Driver::activate_all(drivers, &block.workers()[0]);
        for (queue, driver) in drivers.iter_mut().enumerate() {
            let found = read(driver, &blocks_of(queue, BATCH as u64));
            let expected: Vec<_> = blocks_of(queue, BATCH as u64)
                .into_iter()
                .map(content_of)
                .collect();
            assert!(found == expected, "{setup:?}");
            let found = read(driver, &[1024 + 16 * queue as u64]);
            assert!(found == [vec![0; BLOCK]], "never written");
        }
        drop(wide);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
    }
}

#[test]
fn a_disk_with_several_queues_moves_on_to_an_overlay_with_as_many_while_all_of_them_write() {
    for setup in engines() {
        moves_on(ImageType::Qcow2, setup);
        moves_on(ImageType::Raw, setup);
    }
}

fn moves_on(kind: ImageType, setup: Setup) {
    if let Some(folder) = qemu::folder() {
        let at = |name: &str| folder.path().join(name);
        let base = match kind {
            ImageType::Qcow2 => qemu::create(folder.path(), "base", "", SIZE),
            _ => {
                File::create(at("base")).unwrap().set_len(SIZE).unwrap();
                at("base")
            }
        };
        let mut wide = Wide::of_type(&base, kind, setup);
        let done = AtomicU64::new(0);
        let each = 128;
        {
            let Wide { block, drivers, .. } = &mut wide;
            let block = &*block;
            std::thread::scope(|scope| {
                let done = &done;
                for (queue, driver) in drivers.iter_mut().enumerate() {
                    scope.spawn(move || {
                        // One by one: in each image must be the first so many of each queue.
                        for number in blocks_of(queue, each) {
                            write(driver, &[number]);
                            done.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                }
                for round in 1..=2 {
                    while done.load(Ordering::SeqCst) < round * each {
                        std::thread::yield_now();
                    }
                    let overlay = at(&round.to_string());
                    snapshot(&[(block, &overlay)], true).unwrap();
                }
            });
        }
        let config = wide.block.config();
        assert_eq!(config.num_queues, QUEUES);
        config.validate().unwrap();
        drop(wide);
        // As after a reboot.
        let mut wide = Wide::of(&config, setup);
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            for blocks in blocks_of(queue, each).chunks(BATCH) {
                let expected: Vec<_> = blocks.iter().map(|b| content_of(*b)).collect();
                assert!(read(driver, blocks) == expected, "{setup:?}");
            }
        }
        drop(wide);
        let mut least = 0;
        for path in [base, at("1"), at("2")] {
            let content = match path == at("base") && kind == ImageType::Raw {
                true => std::fs::read(&path).unwrap(),
                false => {
                    qemu::img(&format!("check -q -f qcow2 {}", path.display()));
                    qemu::content(&path)
                }
            };
            let is_there = |block: u64| {
                let found = &content[block as usize * BLOCK..][..BLOCK];
                let there = found == content_of(block);
                assert!(there || found.iter().all(|b| *b == 0), "{path:?}: {block}");
                there
            };
            let mut total = 0;
            for queue in 0..usize::from(QUEUES) {
                let there: Vec<bool> = blocks_of(queue, each).into_iter().map(is_there).collect();
                let count = there.iter().take_while(|there| **there).count();
                assert!(!there[count..].contains(&true), "{path:?}");
                total += count as u64;
            }
            least += each;
            assert!(total >= least.min(2 * each), "{path:?}: {total}");
        }
        assert_eq!(done.into_inner(), each * u64::from(QUEUES));
    }
}
