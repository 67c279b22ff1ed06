//! Raw disks with several queues, each with a thread of its own, that come to images with one owner,
//! and back: every thread inside its real filter.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::enospc::Small;
use super::queues::*;
use super::*;
use crate::block::ImageType;
use crate::block::snapshot::{SnapshotError, snapshot};
use crate::disk::qcow2::tests::qemu;
use crate::event::HoldOutcome;

/// Blocks of each queue.
const EACH: u64 = 48;

/// An empty raw image.
fn raw(folder: &Path) -> PathBuf {
    let path = folder.join("base");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn wide(path: &Path, setup: Setup) -> Wide {
    Wide::of_type(path, ImageType::Raw, setup)
}

/// Has guests write to the queues from `first` on, again and again and each time something else, and read it, until
/// `meanwhile` has ended, which gets a function that returns when all have come further. Says how
/// often each queue's blocks were written.
fn under_writes(
    wide: &mut Wide,
    first: usize,
    meanwhile: impl FnOnce(&Block, &dyn Fn()),
) -> Vec<u64> {
    let Wide { block, drivers, .. } = wide;
    let (stop, passes) = (&AtomicBool::new(false), &[const { AtomicU64::new(0) }; 4]);
    std::thread::scope(|scope| {
        let stop_at_end = Stop(stop);
        let guests = drivers.iter_mut().enumerate().skip(first);
        let guests = guests.map(|(queue, driver)| {
            scope.spawn(move || {
                let mut pass = 0;
                while !stop.load(Ordering::SeqCst) {
                    pass += 1;
                    for blocks in blocks_of(queue, EACH).chunks(BATCH) {
                        write_pass(driver, blocks, pass);
                        if blocks[0] % 5 == 0 {
                            flush(driver);
                        }
                        check_pass(driver, blocks, pass);
                    }
                    passes[queue].store(pass, Ordering::SeqCst);
                }
                pass
            })
        });
        let guests: Vec<_> = guests.collect();
        meanwhile(block, &|| {
            let before = passes.each_ref().map(|p| p.load(Ordering::SeqCst));
            for (pass, before) in passes.iter().zip(before).skip(first) {
                while pass.load(Ordering::SeqCst) < before + 1 {
                    assert!(!guests.iter().any(|guest| guest.is_finished()));
                    std::thread::yield_now();
                }
            }
        });
        drop(stop_at_end);
        guests.into_iter().map(|g| g.join().unwrap()).collect()
    })
}

/// Has the guests stop, also where the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What is in a block after so many passes.
fn block_after(block: u64, pass: u64) -> Vec<u8> {
    content_of(block | pass << 32)
}

fn write_pass(driver: &mut Driver, blocks: &[u64], pass: u64) {
    write_as(driver, blocks, |block| block_after(block, pass));
}

fn check_pass(driver: &mut Driver, blocks: &[u64], pass: u64) {
    for (block, found) in blocks.iter().zip(read(driver, blocks)) {
        assert!(found == block_after(*block, pass), "{block}: {pass}");
    }
}

/// All queues read what all of them have written.
fn check_all(wide: &mut Wide, passes: &[u64]) {
    for driver in &mut wide.drivers {
        for (queue, pass) in passes.iter().enumerate() {
            for blocks in blocks_of(queue, EACH).chunks(BATCH) {
                check_pass(driver, blocks, *pass);
            }
        }
    }
}

/// The same of an image that nobody has.
fn check_content(content: &[u8], passes: &[u64]) {
    for (queue, pass) in passes.iter().enumerate() {
        for block in blocks_of(queue, EACH) {
            let found = &content[block as usize * 4096..][..4096];
            assert!(found == block_after(block, *pass), "{block}");
        }
    }
}

fn commit(block: &Block) {
    let (mut job, told) = super::commit::begin(block, None);
    super::commit::ready(&job, &told);
    assert_eq!(job.conclude(block, true).unwrap(), None);
}

fn stream(block: &Block) {
    let (mut job, told) = super::job::begin(block, None);
    super::commit::ready(&job, &told);
    assert_eq!(job.conclude(block, true).unwrap(), None);
}

#[test]
fn a_raw_disk_moves_on_and_down_again_and_comes_to_stand_alone_while_all_its_queues_write() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in super::engines_in(folder.path()) {
        let at = |name: &str| folder.join(name);
        let base = raw(&folder);
        let mut wide = wide(&base, setup);
        let passes = under_writes(&mut wide, 0, |block, further| {
            let is_on = |path: &Path| assert_eq!(block.config().path, path);
            for name in ["a", "b"] {
                further();
                snapshot(&[(block, &at(name))], true).unwrap();
                is_on(&at(name));
                further();
                commit(block);
                is_on(&base);
                assert_eq!(block.config().image_type, ImageType::Raw);
            }
            for name in ["c", "d"] {
                snapshot(&[(block, &at(name))], true).unwrap();
                further();
            }
            commit(block);
            is_on(&at("c"));
            further();
            stream(block);
            assert!(block.info("x").unwrap().backing_chain.is_empty());
            further();
        });
        assert_eq!(wide.block.workers().len(), usize::from(QUEUES));
        check_all(&mut wide, &passes);
        let config = wide.block.config();
        config.validate().unwrap();
        drop(wide);
        qemu::img(&format!("check -q -f qcow2 {}", at("c").display()));
        check_content(&qemu::content(&at("c")), &passes);
        // As after a reboot: with one thread.
        check_all(&mut Wide::of(&config, setup), &passes);
    }
}

/// Has the disk stand still several times, and move on once meanwhile.
fn pause_and_resume(block: &Block, overlay: &Path, further: &dyn Fn()) {
    for round in 0..4 {
        // Whose engine it is stands still first, or last.
        let mut workers: Vec<_> = block.workers().iter().collect();
        if round % 2 == 0 {
            workers.reverse();
        }
        for worker in &workers {
            order_and_wait(worker, Order::Pause);
        }
        let before = block.counters();
        if round == 1 {
            snapshot(&[(block, overlay)], false).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(block.counters()["write_ops"], before["write_ops"]);
        for worker in workers {
            worker.order(Order::Resume);
        }
        further();
    }
}

#[test]
fn queues_that_pass_on_what_they_have_stand_still_and_go_on_and_can_be_reset() {
    let Some(folder) = qemu::folder() else { return };
    for (setup, folder) in super::engines_in(folder.path()) {
        let mut wide = wide(&raw(&folder), setup);
        snapshot(&[(&wide.block, &folder.join("a"))], true).unwrap();
        let mut passes = under_writes(&mut wide, 0, |block, further| {
            pause_and_resume(block, &folder.join("p"), further);
        });
        check_all(&mut wide, &passes);
        // With all that they can have under way.
        for round in 0..4 {
            for driver in &mut wide.drivers {
                for slot in 0..BATCH {
                    offer(driver, slot, 1, 1024 + slot as u64, 4096);
                }
                driver.ring();
            }
            wide.order(Order::Reset);
            if round == 2 {
                // The queue of the thread that has the engine is not used.
                for (index, driver) in wide.drivers.iter_mut().enumerate().skip(1) {
                    driver.activate(&wide.block.workers()[index], index as u16);
                }
                let others = under_writes(&mut wide, 1, |block, further| {
                    pause_and_resume(block, &folder.join("q"), further);
                    snapshot(&[(block, &folder.join("r"))], true).unwrap();
                    further();
                });
                passes.splice(1.., others);
                wide.order(Order::Reset);
            }
            wide.activate();
            check_all(&mut wide, &passes);
        }
        // A driver that breaks the rules of one queue does no harm to the others.
        let broken = &mut wide.drivers[0];
        broken.set_avail_index(30_000);
        broken.ring_anyway();
        while *broken.signals.needs_reset.lock().unwrap() == 0 {
            std::thread::yield_now();
        }
        for (index, driver) in wide.drivers.iter_mut().enumerate().skip(1) {
            check_pass(driver, &[index as u64], passes[index]);
        }
        wide.order(Order::Reset);
        wide.activate();
        check_all(&mut wide, &passes);
        let path = wide.block.config().path;
        drop(wide);
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        check_content(&qemu::content(&path), &passes);
    }
}

#[test]
fn a_disk_whose_queues_pass_on_what_they_have_grows_and_takes_discards_and_zeroes() {
    let folder = tempfile::tempdir().unwrap();
    for (setup, folder) in super::engines_in(folder.path()) {
        let mut wide = wide(&raw(&folder), setup);
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            write(driver, &blocks_of(queue, 8));
        }
        snapshot(&[(&wide.block, &folder.join("a"))], true).unwrap();
        wide.block.grow(2 * SIZE).unwrap();
        wide.block.set_size();
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            let beyond = SIZE / 4096 + queue as u64;
            write(driver, &[beyond]);
            // DISCARD of a block that is below, WRITE_ZEROES of another.
            for (kind, nth) in [(11, 0), (13, 1)] {
                let sector = blocks_of(queue, 8)[nth] * 8;
                let mut segment = [0; 16];
                segment[..8].copy_from_slice(&sector.to_le_bytes());
                segment[8] = 8;
                driver.poke(DATA, &segment);
                assert_eq!(driver.send(kind, 0, &[(DATA, 16, false)]).0, OK);
            }
        }
        for queue in 0..usize::from(QUEUES) {
            let driver = &mut wide.drivers[(queue + 1) % usize::from(QUEUES)];
            let beyond = SIZE / 4096 + queue as u64;
            assert!(read(driver, &[beyond]) == [content_of(beyond)]);
            let blocks = blocks_of(queue, 8);
            let found = read(driver, &blocks);
            assert!(found[1] == vec![0; 4096], "{setup:?}");
            assert!(
                found[2..]
                    == blocks[2..]
                        .iter()
                        .map(|b| content_of(*b))
                        .collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn what_queues_that_pass_it_on_hold_for_lack_of_space_is_done_when_there_is_some() {
    for setup in engines().filter(|setup| !setup.direct) {
        let Some(small) = Small::new() else { return };
        let mut wide = wide(&raw(&small.path("")), setup);
        snapshot(&[(&wide.block, &small.path("a"))], true).unwrap();
        small.fill();
        let begin = |wide: &mut Wide, from: u64| {
            for (queue, driver) in wide.drivers.iter_mut().enumerate() {
                for slot in 0..BATCH {
                    // Each in a cluster of its own.
                    let block = (from + slot as u64 * 4 + queue as u64) * 32;
                    driver.poke(0x10_1000 + slot as u64 * 0x4000, &content_of(block));
                    offer(driver, slot, 1, block, 4096);
                }
                driver.ring();
            }
        };
        begin(&mut wide, 0);
        let all = u64::from(QUEUES) * BATCH as u64;
        wide.wait_held(all);
        // There is not even room for what the disk would write before it moves on.
        wide.order(Order::Pause);
        wide.resume();
        wide.wait_held(all);
        small.make_space();
        small.enlarge();
        wide.block.retry_held();
        for driver in &mut wide.drivers {
            for _ in 0..BATCH {
                driver.wait_used();
            }
        }
        wide.wait_held(0);
        assert_eq!(wide.outcomes(), [HoldOutcome::Done], "{setup:?}");
        for (queue, driver) in wide.drivers.iter_mut().enumerate() {
            let blocks = (0..BATCH as u64).map(|slot| (slot * 4 + queue as u64) * 32);
            let blocks: Vec<_> = blocks.collect();
            let expected: Vec<_> = blocks.iter().map(|b| content_of(*b)).collect();
            assert!(read(driver, &blocks) == expected, "{setup:?}");
        }
    }
}

#[test]
fn of_disks_with_several_queues_all_move_on_or_all_stay_on_their_raw_images() {
    let folder = tempfile::tempdir().unwrap();
    for (setup, folder) in super::engines_in(folder.path()) {
        let folders = ["x", "y"].map(|name| folder.join(name));
        let mut disks = folders.each_ref().map(|folder| {
            std::fs::create_dir(folder).unwrap();
            wide(&raw(folder), setup)
        });
        std::os::unix::fs::symlink(&folder, folder.join("link")).unwrap();
        // Another name of the same place: found out when the first has its name already.
        let (first, second) = (folder.join("new"), folder.join("link/new"));
        for round in 0..8 {
            let [one, other] = &disks;
            let both: [(&Block, &Path); 2] = [(&one.block, &first), (&other.block, &second)];
            match snapshot(&both, true) {
                Err(SnapshotError::Disk(1, BuildError::Invalid(_))) => {}
                other => panic!("{other:?}"),
            }
            assert!(!first.exists());
            for (disk, folder) in disks.iter_mut().zip(&folders) {
                assert_eq!(disk.block.config().image_type, ImageType::Raw);
                for (queue, driver) in disk.drivers.iter_mut().enumerate() {
                    let block = blocks_of(queue, 8)[round];
                    write(driver, &[block]);
                    flush(driver);
                    let base = std::fs::read(folder.join("base")).unwrap();
                    assert!(base[block as usize * 4096..][..4096] == content_of(block));
                }
            }
        }
        let [one, other] = &disks;
        let second = folder.join("other");
        let both: [(&Block, &Path); 2] = [(&one.block, &first), (&other.block, &second)];
        snapshot(&both, true).unwrap();
        for (disk, folder) in disks.iter_mut().zip(&folders) {
            let before = std::fs::read(folder.join("base")).unwrap();
            for (queue, driver) in disk.drivers.iter_mut().enumerate() {
                let known = blocks_of(queue, 8);
                let expected: Vec<_> = known.iter().map(|b| content_of(*b)).collect();
                assert!(read(driver, &known) == expected, "{setup:?}");
                write(driver, &[1000 + queue as u64]);
                flush(driver);
            }
            assert!(std::fs::read(folder.join("base")).unwrap() == before);
        }
    }
}
