//! Discarding, on every kind of memory that can be had without a pool of huge pages.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;

const SIZE: u64 = 4 << 20;
/// Where a second region begins, right behind the first: on the host it is elsewhere.
const SEAM: u64 = 2 << 20;

fn private() -> GuestRam {
    let half = SEAM as usize;
    let ranges = [(GuestAddress(0), half), (GuestAddress(SEAM), half)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn shared() -> (GuestRam, File) {
    let file: File = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC)
        .unwrap()
        .into();
    file.set_len(SIZE).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let mapping = MmapRegion::from_file(offset, SIZE as usize).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let ram = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    (Arc::new(ram), file)
}

fn fill(ram: &GuestRam) {
    let bytes = vec![0x5a; SIZE as usize];
    ram.write_slice(&bytes, GuestAddress(0)).unwrap();
}

/// The numbers of the pages that read as zeroes; all others must be as they were.
fn zeroed(ram: &GuestRam) -> Vec<u64> {
    let mut page = [0; PAGE as usize];
    let pages = (0..SIZE / PAGE).filter(|number| {
        ram.read_slice(&mut page, GuestAddress(number * PAGE))
            .unwrap();
        let zero = page.iter().all(|byte| *byte == 0);
        assert!(zero || page.iter().all(|byte| *byte == 0x5a), "{number}");
        zero
    });
    pages.collect()
}

fn pages(numbers: impl IntoIterator<Item = u64>) -> Vec<Range<u64>> {
    let ranges = numbers.into_iter().map(|n| n * PAGE..(n + 1) * PAGE);
    ranges.collect()
}

/// With batching, where this kernel can, and without.
fn ways() -> Vec<Option<Batching>> {
    let mut ways = vec![None];
    ways.extend(Batching::probe().map(Some));
    ways
}

#[test]
fn just_the_pages_asked_for_read_as_zeroes_afterwards() {
    for batching in ways() {
        let batched = batching.is_some();
        let ram = private();
        fill(&ram);
        let mut discarder = Discarder::new(&ram, batching, Inhibitor::default()).unwrap();
        assert_eq!(discarder.page(), PAGE);
        let odd: Vec<u64> = (0..SIZE / PAGE).filter(|n| n % 2 == 1).collect();
        let outcome = discarder.discard(&pages(odd.iter().copied()));
        assert_eq!(zeroed(&ram), odd);
        let expected = Discarded {
            bytes: odd.len() as u64 * PAGE,
            calls: if batched { 1 } else { odd.len() as u64 },
            ..Discarded::default()
        };
        assert_eq!(outcome, expected);
    }
}

#[test]
fn a_range_over_the_seam_of_two_regions_is_discarded_in_both() {
    for batching in ways() {
        let ram = private();
        fill(&ram);
        let mut discarder = Discarder::new(&ram, batching, Inhibitor::default()).unwrap();
        let range = SEAM - PAGE..SEAM + 2 * PAGE;
        assert_eq!(discarder.ram_in(&range), 3 * PAGE);
        assert_eq!(discarder.discard(&[range]).bytes, 3 * PAGE);
        let seam = SEAM / PAGE;
        assert_eq!(zeroed(&ram), [seam - 1, seam, seam + 1]);
    }
}

#[test]
fn what_is_not_ram_is_left_out_and_counted() {
    let ram = private();
    fill(&ram);
    let mut discarder = Discarder::new(&ram, None, Inhibitor::default()).unwrap();
    let outcome = discarder.discard(&[
        SIZE - PAGE..SIZE + PAGE,
        1 << 40..(1 << 40) + PAGE,
        u64::MAX - PAGE..u64::MAX,
    ]);
    assert_eq!((outcome.bytes, outcome.outside), (PAGE, 3 * PAGE));
    assert_eq!(zeroed(&ram), [SIZE / PAGE - 1]);
    let mut ranges = vec![
        0..PAGE,
        SEAM - PAGE..SEAM + PAGE,
        SIZE - PAGE..SIZE + PAGE,
        1 << 40..(1 << 40) + PAGE,
    ];
    assert_eq!(discarder.clip(&mut ranges), 2 * PAGE);
    let left = [
        0..PAGE,
        SEAM - PAGE..SEAM,
        SEAM..SEAM + PAGE,
        SIZE - PAGE..SIZE,
    ];
    assert_eq!(ranges, left);
    let nothing = discarder.discard(&[]);
    assert_eq!(nothing, Discarded::default());
}

#[test]
fn shared_memory_is_freed_in_the_file_as_well() {
    for batching in ways() {
        let batched = batching.is_some();
        let (ram, file) = shared();
        fill(&ram);
        assert_eq!(file.metadata().unwrap().blocks() * 512, SIZE);
        let mut discarder = Discarder::new(&ram, batching, Inhibitor::default()).unwrap();
        let outcome = discarder.discard(&[PAGE..3 * PAGE, SEAM..SIZE]);
        assert_eq!(outcome.bytes, 2 * PAGE + SEAM);
        assert_eq!(outcome.calls, if batched { 1 } else { 2 });
        assert_eq!(file.metadata().unwrap().blocks() * 512, SEAM - 2 * PAGE);
        assert_eq!(zeroed(&ram).len() as u64, outcome.bytes / PAGE);
    }
}

#[test]
fn scattered_pages_of_shared_memory_leave_the_file_and_those_between_them_stay() {
    for batching in ways() {
        let batched = batching.is_some();
        let (ram, file) = shared();
        fill(&ram);
        let mut discarder = Discarder::new(&ram, batching, Inhibitor::default()).unwrap();
        let some: Vec<u64> = (0..SIZE / PAGE).step_by(2).collect();
        let outcome = discarder.discard(&pages(some.iter().copied()));
        let count = some.len() as u64;
        assert_eq!(outcome.bytes, count * PAGE);
        // Unmapped together, and then punched.
        let batches = count.div_ceil(BATCH as u64);
        assert_eq!(outcome.calls, if batched { 2 * batches } else { count });
        assert_eq!(
            file.metadata().unwrap().blocks() * 512,
            SIZE - outcome.bytes
        );
        assert_eq!(zeroed(&ram), some);
    }
}

#[test]
fn a_locked_page_is_kept_and_counted_and_the_rest_goes() {
    for batching in ways() {
        let ram = private();
        fill(&ram);
        let locked = ram.get_host_address(GuestAddress(4 * PAGE)).unwrap();
        // SAFETY: locking takes nothing away.
        unsafe { rustix::mm::mlock(locked.cast(), PAGE as usize) }.unwrap();
        let mut discarder = Discarder::new(&ram, batching, Inhibitor::default()).unwrap();
        let outcome = discarder.discard(&pages([0, 2, 4, 6, 8]));
        assert_eq!(zeroed(&ram), [0, 2, 6, 8]);
        assert_eq!((outcome.bytes, outcome.locked), (4 * PAGE, PAGE));
    }
}

#[test]
fn batches_of_any_length_end_in_the_same() {
    for batching in ways() {
        let ram = private();
        for count in [1, BATCH as u64 - 1] {
            fill(&ram);
            let mut discarder =
                Discarder::new(&ram, batching.clone(), Inhibitor::default()).unwrap();
            // Twice as many as the pages, by way of going over them again.
            let some: Vec<u64> = (0..count.min(SIZE / PAGE / 2)).map(|n| n * 2).collect();
            let mut ranges = pages(some.iter().copied());
            ranges.extend(pages(some.iter().copied()));
            ranges.extend(pages(some.iter().copied()));
            discarder.discard(&ranges);
            assert_eq!(zeroed(&ram), some);
        }
    }
}

#[test]
fn what_is_held_off_is_kept_and_counted_until_it_is_no_more() {
    for (ram, _file) in [(private(), None), {
        let (ram, file) = shared();
        (ram, Some(file))
    }] {
        fill(&ram);
        let inhibitor = Inhibitor::default();
        let mut discarder = Discarder::new(&ram, None, inhibitor.clone()).unwrap();
        let inhibition = inhibitor.inhibit(Reason::DirtyLog);
        let outcome = discarder.discard(&pages([1, 3, SIZE / PAGE]));
        let expected = Discarded {
            inhibited: Some((Reason::DirtyLog, 2 * PAGE)),
            outside: PAGE,
            ..Discarded::default()
        };
        assert_eq!(outcome, expected);
        assert_eq!(zeroed(&ram), [0; 0]);
        drop(inhibition);
        // What was held off before does not come along.
        assert_eq!(discarder.discard(&pages([5])).bytes, PAGE);
        assert_eq!(zeroed(&ram), [5]);
    }
}
