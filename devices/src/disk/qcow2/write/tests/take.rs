//! What an image has is given out while it is written to, and copied again where it changes; and
//! the image is emptied, through power cuts.

use std::sync::Arc;

use super::super::super::super::dirty::Tracking;
use super::super::super::super::steps::{Step, Taken};
use super::crash::{Setup, assert_survived};
use super::populate::step;
use super::sim::Files;
use super::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 5 * MIB / 2 + 1536;

/// Kinds of image, and how large the backing file is.
const KINDS: [(&str, u64); 8] = [
    ("cluster_size=64k", SIZE),
    ("cluster_size=4k", MIB + 512),
    ("cluster_size=512,refcount_bits=64", SIZE),
    ("cluster_size=2M", SIZE),
    ("extended_l2=on,cluster_size=16k", SIZE),
    ("compat=0.10,cluster_size=4k", SIZE),
    ("data_file=@,cluster_size=4k", SIZE),
    ("data_file=@,extended_l2=on,cluster_size=16k", MIB + 512),
];

/// Copies some of what the image has from `from` on and before `end`; how far.
fn copy(driver: &mut Driver, base: &mut [u8], from: u64, end: u64, requests: u64) -> u64 {
    let reached = step(driver, Step::Take(from, end), requests).unwrap();
    assert!(reached.position > from && reached.position <= end);
    let stop = reached.position as usize;
    match reached.taken {
        Taken::Nothing => {}
        Taken::Zeroes(start) => base[start as usize..stop].fill(0),
        Taken::Data(start, memory, len) => {
            assert!(start >= from && start as usize + len == stop);
            base[start as usize..stop].copy_from_slice(&memory.bytes()[..len]);
        }
    }
    reached.position
}

fn copy_changed(driver: &mut Driver, base: &mut [u8], tracking: &Tracking, requests: u64) {
    let mut from = 0;
    while let Some((start, end)) = tracking.take(from, MIB) {
        let mut position = start;
        while position < end {
            position = copy(driver, base, position, end, requests);
        }
        from = end;
    }
}

/// All that a commit does, with up to so many requests of the guest beside it but at the end.
fn commit(driver: &mut Driver, base: &mut [u8], requests: u64) {
    let tracking = driver.queue.control().dirty.track(SIZE).unwrap();
    let mut position = 0;
    while position < SIZE {
        position = copy(driver, base, position, SIZE, requests);
    }
    for _ in 0..3 {
        copy_changed(driver, base, &tracking, requests);
    }
    driver.finish();
    driver.flush();
    copy_changed(driver, base, &tracking, 0);
    assert_eq!(tracking.bytes(), 0);
}

fn content(bytes: &Files, below: &[u8]) -> Vec<u8> {
    let sectors = check::Image::new(bytes).content(below).into_iter();
    sectors.flat_map(Option::unwrap).collect()
}

fn below(setup: &Setup) -> Vec<u8> {
    let mut base = setup.backing().to_vec();
    base.resize(SIZE as usize, 0);
    base
}

#[test]
fn what_many_requests_change_at_a_time_is_copied_in_the_end() {
    let rounds = wanted("BALLAST_COMMITS", 2);
    for (number, (kind, below_bytes)) in (1..).zip(KINDS) {
        for round in 0..rounds {
            let seed = seed(number * 100 + round);
            let Some(setup) = Setup::over(kind, Some(below_bytes), false, SIZE) else {
                return;
            };
            let (mut driver, shared) = setup.driver(seed);
            // Some of it stays as it was below.
            driver.run(8);
            let mut base = below(&setup);
            commit(&mut driver, &mut base, round % 3 * 2);
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            driver.compare(&base);
            let bytes = shared.lock().unwrap().bytes.clone();
            assert!(content(&bytes, setup.backing()) == base, "{kind}");
            // All that the image hides is what the base has: so it is with any of it.
            assert!(content(&bytes, &base) == base, "{kind}");
        }
    }
}

#[test]
fn an_image_that_is_emptied_shows_the_base_at_every_moment() {
    let mut gone = 0;
    for (number, (kind, below_bytes)) in (1..).zip(KINDS) {
        let Some(setup) = Setup::over(kind, Some(below_bytes), false, SIZE) else {
            return;
        };
        let (mut driver, shared) = setup.driver(number);
        driver.run(60);
        let mut base = below(&setup);
        commit(&mut driver, &mut base, 4);
        let begin = shared.lock().unwrap().now;
        step(&mut driver, Step::Empty, 0).unwrap();
        let end = shared.lock().unwrap().now;
        let mut random = Random(number);
        for time in (begin..=end).step_by(((end - begin) / 12).max(1) as usize) {
            let bytes = shared.lock().unwrap().after_cut(time, &mut random);
            let image = check::Image::new(&bytes);
            image.check();
            assert!(content(&bytes, &base) == base, "{kind} at {time}");
        }
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        let leaks = check::Image::new(&bytes).check();
        assert!(leaks > 0, "{kind}");
        setup.ask_qemu(&bytes);
        // It is the one that was emptied that is closed.
        let other = vec![7; SIZE as usize];
        assert!(content(&bytes, &other) == other, "{kind}");
        let zeroes = bytes.chunks(512).filter(|chunk| **chunk == [0; 512]);
        gone += zeroes.count() * 512;

        // Whoever uses it next gets the space.
        drop(driver);
        std::fs::write(&setup.path, &bytes).unwrap();
        let (mut driver, shared) = setup.driver(number + 1);
        driver.run(40);
        super::leaks::search(&mut driver);
        driver.flush();
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        assert_eq!(check::Image::new(&bytes).check(), 0, "{kind}");
        driver.compare(&content(&bytes, setup.backing()));
    }
    assert!(gone > MIB as usize, "{gone}");
}

#[test]
fn an_image_that_can_not_be_emptied_shows_the_base_all_the_same() {
    let mut seen = [0, 0];
    for kind in [
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "data_file=@,cluster_size=4k",
    ] {
        for which in 0..3 {
            let Some(setup) = Setup::over(kind, Some(SIZE), false, SIZE) else {
                return;
            };
            let (mut driver, shared) = setup.driver(which);
            driver.run(40);
            let mut base = below(&setup);
            commit(&mut driver, &mut base, 4);
            let next = shared.lock().unwrap().changes + which;
            shared.lock().unwrap().fail = Some((next, Errno::IO));
            let outcome = step(&mut driver, Step::Empty, 0);
            // What gives space back may fail.
            assert!(which > 1 || outcome.is_err(), "{which}");
            let begun = driver.queue.control().is_handed_over();
            assert!(begun || outcome.is_err());
            seen[usize::from(begun)] += 1;
            driver.queue.close().unwrap();
            let bytes = shared.lock().unwrap().bytes.clone();
            check::Image::new(&bytes).check();
            assert!(content(&bytes, &base) == base, "{kind}");
            // What was not begun has taken nothing away.
            assert!(begun || content(&bytes, setup.backing()) == base);
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn a_power_cut_leaves_leaks_at_most_where_somebody_reads_the_image_too() {
    let cuts = wanted("BALLAST_POWER_CUTS", 10);
    let setups = [
        Setup::over("cluster_size=64k", None, false, 2 * MIB),
        Setup::over("cluster_size=4k", Some(2 * MIB), true, 2 * MIB),
        Setup::over("extended_l2=on,cluster_size=16k", Some(MIB), true, 2 * MIB),
        Setup::compressed("cluster_size=16k", 2 * MIB),
    ];
    for (number, setup) in (1..).zip(setups) {
        let Some(mut setup) = setup else { return };
        setup.has_reader = true;
        let seed = seed(number * 10);
        let (mut driver, shared) = setup.driver(seed);
        driver.run(150);
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        let end = shared.lock().unwrap().now;
        let mut random = Random(seed);
        for _ in 0..cuts {
            let time = random.below(end + 1);
            let bytes = shared.lock().unwrap().after_cut(time, &mut random);
            let image = check::Image::new(&bytes);
            image.check();
            assert_survived(&driver, &image.content(setup.backing()), time);
        }
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        check::Image::new(&bytes).check();
        setup.ask_qemu(&bytes);
        driver.compare(&content(&bytes, setup.backing()));
    }
}

/// An image that a reader reads with the tables that it had once, while it is written to where
/// the reader does not look.
struct Kept {
    path: std::path::PathBuf,
    l1: (u64, Vec<u8>),
    header: Vec<u8>,
    /// The L2 tables that its entries name.
    l2: Vec<(usize, Vec<u8>)>,
    before: Vec<u8>,
    hidden: Vec<bool>,
}

impl Kept {
    /// What the reader sees now must be what it saw.
    fn look(&self) {
        let mut bytes = std::fs::read(&self.path).unwrap();
        bytes[..self.header.len()].copy_from_slice(&self.header);
        let (at, l1) = &self.l1;
        bytes[*at as usize..][..l1.len()].copy_from_slice(l1);
        for (at, l2) in &self.l2 {
            assert!(bytes[*at..][..l2.len()] == *l2, "the table at {at:#x}");
        }
        let seen = self.path.with_extension("seen");
        std::fs::write(&seen, &bytes).unwrap();
        let now = qemu::content(&seen);
        let sectors = now.chunks(512).zip(self.before.chunks(512));
        for (number, ((now, before), hidden)) in sectors.zip(&self.hidden).enumerate() {
            assert!(*hidden || now == before, "sector {number}");
        }
    }
}

#[test]
fn a_reader_with_old_tables_sees_nothing_of_what_is_written_where_it_does_not_look() {
    let kinds = [
        ("cluster_size=64k", ""),
        ("cluster_size=4k", "snapshot"),
        ("cluster_size=64k", "compressed"),
        ("extended_l2=on,cluster_size=16k", "snapshot"),
        ("extended_l2=on,cluster_size=64k", "compressed"),
        ("cluster_size=512", "compressed snapshot"),
        ("compat=0.10,cluster_size=4k", ""),
    ];
    for (number, (kind, how)) in (1..).zip(kinds) {
        let Some(folder) = qemu::folder() else { return };
        let mut path = qemu::create(folder.path(), "base.qcow2", kind, 2 * MIB);
        qemu::scribble(&path, 2 * MIB, 40, number);
        if how.contains("compressed") {
            let packed = folder.path().join("packed.qcow2");
            let (from, to) = (path.display(), packed.display());
            qemu::img(&format!("convert -c -O qcow2 -o {kind} {from} {to}"));
            path = packed;
        }
        if how.contains("snapshot") {
            qemu::img(&format!("snapshot -c one {}", path.display()));
            qemu::scribble(&path, 2 * MIB, 10, number + 50);
        }
        let before = qemu::content(&path);
        let bytes = std::fs::read(&path).unwrap();
        let number_at = |at: usize, len: usize| {
            let bytes = &bytes[at..at + len];
            bytes
                .iter()
                .fold(0_u64, |n, byte| n << 8 | u64::from(*byte))
        };
        let (entries, at) = (number_at(36, 4), number_at(40, 8));
        let mut random = Random(number);
        let mut hidden = vec![false; before.len() / 512];
        for _ in 0..12 {
            let start = random.below(hidden.len() as u64) as usize;
            let len = [1, 40, 400][random.below(3) as usize];
            let end = (start + len).min(hidden.len());
            hidden[start..end].fill(true);
        }
        let cluster = 1 << number_at(20, 4);
        let l2 = (0..entries).filter_map(|index| {
            let table = number_at(at as usize + index as usize * 8, 8) << 8 >> 8;
            let table = table as usize;
            (table > 0).then(|| (table, bytes[table..table + cluster].to_vec()))
        });
        let kept = Kept {
            l2: l2.collect(),
            header: bytes[..512].to_vec(),
            l1: (at, bytes[at as usize..][..entries as usize * 8].to_vec()),
            path: path.clone(),
            before: before.clone(),
            hidden,
        };
        let opened = writable(&options(&path, false, true)).beside_reader();
        let mut driver = Driver::new(opened.for_test(number % 2 == 0), &before, number);
        for round in 0..4 {
            for _ in 0..40 {
                driver.push_within(&kept.hidden);
                driver.queue.start().unwrap();
                if driver.random.below(3) == 0 {
                    driver.finish();
                }
            }
            driver.finish();
            driver.flush();
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            kept.look();
            if round == 1 {
                // A reader may stay when a commit has ended early, and another begins.
                let sectors = std::mem::take(&mut driver.sectors);
                drop(driver);
                kept.look();
                let opened = writable(&options(&path, false, true)).beside_reader();
                driver = Driver::new(opened.for_test(number % 2 == 1), &[], number + 9);
                // Later than all that was.
                driver.writes = 1 << 16;
                driver.sectors = sectors;
            }
        }
        let sectors = std::mem::take(&mut driver.sectors);
        drop(driver);
        kept.look();
        let expected = qemu::content(&path);
        for ((at, sector), bytes) in (0..).zip(&sectors).zip(expected.chunks(512)) {
            sector.assert_now(bytes, at);
        }
        let bytes = std::fs::read(&path).unwrap();
        let leaks = check::Image::new(&bytes).check();
        // What it has left is found when it is opened next.
        let options = options(&path, false, true);
        let (chain, top) = Chain::open(&options).unwrap();
        let chain = Arc::new(chain);
        let opened = Writable::open(chain, &top, &path).unwrap();
        let mut queue = opened.search_leaks(&top.header).for_test(true);
        queue.start().unwrap();
        for _ in 0..1_000_000 {
            if queue.control().leaks().is_none() {
                queue.poll(&mut Vec::new()).unwrap();
            }
        }
        assert!(queue.control().leaks().is_some(), "it does not end");
        assert!(leaks == 0 || queue.control().returned() > 0, "{leaks}");
        queue.close().unwrap();
        drop((queue, top));
        qemu::img(&format!("check -q -f qcow2 {}", path.display()));
        assert!(qemu::content(&path) == expected, "{kind} {how}");
    }
}

impl Driver {
    /// Begins a random request where this is set.
    fn push_within(&mut self, allowed: &[bool]) {
        let total = self.sectors.len() as u64;
        let start = self.random.below(total);
        let most = 1 + self.random.below(100);
        let rest = allowed[start as usize..].iter().take(most as usize);
        let count = rest.take_while(|allowed| **allowed).count() as u64;
        let free = (0..DEPTH).find(|tag| !self.begun.contains_key(tag));
        let busy =
            |(_, other, len): &(Operation, u64, u64)| start < other + len && *other < start + count;
        let (Some(tag), false) = (free, count == 0 || self.busy.values().any(busy)) else {
            return;
        };
        let operation = match self.random.below(6) {
            0 => Operation::Discard,
            1 | 2 => Operation::WriteZeroes {
                unmap: self.random.below(4) != 0,
                durable: false,
            },
            _ => Operation::Write { durable: false },
        };
        self.push(tag, operation, start, count);
    }
}
