//! What is below comes into the image while the disk is used, through power cuts and faults; and
//! the image then stands alone.

use std::sync::mpsc::channel;

use super::super::super::super::steps::{Outcome, Reply, Step, Steps};
use super::super::super::header::Header;
use super::crash::{Setup, assert_survived};
use super::*;

const MIB: u64 = 1 << 20;

/// Has a step done, with requests of the guest beside it.
pub fn step(driver: &mut Driver, step: Step, requests: u64) -> Outcome {
    let (tell, told) = channel();
    let reply = Reply::new(move |outcome| tell.send(outcome).unwrap());
    driver.queue.control().leave(step, reply);
    driver.queue.attend().unwrap();
    for _ in 0..1_000_000 {
        for _ in 0..driver.random.below(requests + 1) {
            driver.push_random();
        }
        driver.queue.start().unwrap();
        if let Ok(outcome) = told.try_recv() {
            return outcome;
        }
        driver.wait();
    }
    panic!("it does not end");
}

/// All that a job does, as its thread has it done; how many bytes were copied.
fn stream(driver: &mut Driver, requests: u64) -> io::Result<u64> {
    let total = driver.sectors.len() as u64 * 512;
    step(driver, Step::CheckDetach, requests)?;
    let (mut position, mut copied) = (0, 0);
    while position < total {
        let reached = step(driver, Step::Populate(position), requests)?;
        assert!(reached.position > position && reached.position <= total);
        position = reached.position;
        copied += reached.copied;
    }
    step(driver, Step::Detach(total), requests)?;
    Ok(copied)
}

fn stands_alone(bytes: &[u8]) -> bool {
    Header::parse(bytes).unwrap().backing.is_none()
}

/// What is below an image: nothing, once it has forgotten it.
fn below<'a>(setup: &'a Setup, bytes: &[u8]) -> &'a [u8] {
    match stands_alone(bytes) {
        true => &[],
        false => setup.backing(),
    }
}

fn content(image: &check::Image<'_>, below: &[u8]) -> Vec<u8> {
    let sectors = image.content(below).into_iter();
    sectors.flat_map(Option::unwrap).collect()
}

/// Of the disks.
const SIZE: u64 = 5 * MIB / 2 + 1536;

/// Kind, and how large the backing file is.
const KINDS: [(&str, u64); 9] = [
    ("cluster_size=64k", SIZE),
    ("cluster_size=4k", SIZE),
    ("cluster_size=512,refcount_bits=64", MIB + 512),
    ("cluster_size=2M", 2 * MIB + 1536),
    ("extended_l2=on,cluster_size=16k", SIZE),
    ("extended_l2=on,cluster_size=64k", 3 * MIB),
    ("compat=0.10,cluster_size=4k", 3 * MIB / 2),
    ("data_file=@,cluster_size=4k", SIZE),
    ("data_file=@,extended_l2=on,cluster_size=64k", MIB + 512),
];

fn setup(kind: &str, below: u64) -> Option<Setup> {
    let mut setup = Setup::over(kind, Some(below), false, SIZE)?;
    setup.hole_below(MIB / 2, MIB / 4);
    setup.hole_below(MIB - 16384, 8192);
    setup.zero_below(MIB / 4 + 512, 40 << 10);
    Some(setup)
}

#[test]
fn a_power_cut_while_an_image_comes_to_stand_alone_loses_nothing() {
    let cuts = wanted("BALLAST_POWER_CUTS", 20);
    let mut seen = [0, 0];
    for (number, (kind, below_bytes)) in (1..).zip(KINDS) {
        let Some(setup) = setup(kind, below_bytes) else {
            return;
        };
        let seed = seed(number * 1000);
        let (mut driver, shared) = setup.driver(seed);
        driver.run(30);
        let copied = stream(&mut driver, 3).unwrap();
        assert!(copied <= SIZE);
        driver.run(30);
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        let end = shared.lock().unwrap().now;
        let mut random = Random(seed ^ 0x5555);
        for cut in 0..cuts {
            // Half of them about the end, where the header changes.
            let time = match cut % 2 {
                0 => random.below(end + 1),
                _ => end - random.below(end / 4),
            };
            let bytes = shared.lock().unwrap().after_cut(time, &mut random);
            let image = check::Image::new(&bytes);
            image.check();
            seen[usize::from(stands_alone(&bytes))] += 1;
            let sectors = image.content(below(&setup, &bytes));
            assert_survived(&driver, &sectors, time);
            if cut % 15 == 0 {
                setup.ask_qemu(&bytes);
            }
        }
        driver.flush();
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        assert!(stands_alone(&bytes));
        let image = check::Image::new(&bytes);
        assert_eq!(image.check(), 0, "leaks");
        setup.ask_qemu(&bytes);
        driver.compare(&content(&image, &[]));
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn a_power_cut_at_every_moment_of_the_end_is_survived() {
    for (number, kind) in (1..).zip(["cluster_size=64k", "extended_l2=on,cluster_size=16k"]) {
        let Some(setup) = setup(kind, SIZE) else {
            return;
        };
        let (mut driver, shared) = setup.driver(number);
        let mut position = 0;
        while position < SIZE {
            let reached = step(&mut driver, Step::Populate(position), 1).unwrap();
            position = reached.position;
        }
        let begin = shared.lock().unwrap().now;
        step(&mut driver, Step::Detach(SIZE), 2).unwrap();
        driver.finish();
        let end = shared.lock().unwrap().now;
        let mut random = Random(number);
        let mut seen = [0, 0];
        for time in (begin..=end).flat_map(|time| [time; 2]) {
            let bytes = shared.lock().unwrap().after_cut(time, &mut random);
            let image = check::Image::new(&bytes);
            image.check();
            seen[usize::from(stands_alone(&bytes))] += 1;
            assert_survived(&driver, &image.content(below(&setup, &bytes)), time);
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    }
}

#[test]
fn an_image_that_stands_alone_has_only_what_is_not_zero() {
    for (kind, below_bytes) in KINDS {
        let Some(setup) = setup(kind, below_bytes) else {
            return;
        };
        let expected = qemu::content(&setup.path);
        let (mut driver, shared) = setup.driver(1);
        let copied = stream(&mut driver, 0).unwrap();
        let data = expected.chunks(512).filter(|s| **s != [0; 512]).count() as u64 * 512;
        let header = Header::parse(&shared.lock().unwrap().bytes).unwrap();
        let unit = match header.extended_l2 {
            true => (1_u64 << header.cluster_bits) / 32,
            false => 1 << header.cluster_bits,
        };
        let units = expected.chunks(unit as usize);
        let wanted: usize = units
            .filter(|unit| unit.iter().any(|byte| *byte != 0))
            .map(<[u8]>::len)
            .sum();
        assert!(copied >= data && copied == wanted as u64, "{kind}");
        // A second time there is nothing to do.
        assert_eq!(stream(&mut driver, 0).unwrap(), 0, "{kind}");
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        let image = check::Image::new(&bytes);
        assert_eq!(image.check(), 0);
        assert!(content(&image, &[]) == expected, "{kind}");
        setup.ask_qemu(&bytes);
        // What is behind its end is not what was below.
        let mut larger = bytes.clone();
        let size = SIZE.next_multiple_of(1 << header.cluster_bits);
        larger[24..32].copy_from_slice(&size.to_be_bytes());
        let behind = content(&check::Image::new(&larger), &[]).split_off(SIZE as usize);
        assert!(behind.iter().all(|byte| *byte == 0), "{kind}");
    }
}

#[test]
fn holes_below_are_passed_over_and_not_read() {
    for (kind, unit) in [
        ("cluster_size=64k", 64 << 10),
        ("cluster_size=2M", 2 * MIB),
        ("extended_l2=on,cluster_size=128k", 4096),
    ] {
        let size = 64 * MIB;
        let Some(mut setup) = Setup::over(kind, Some(size), false, size) else {
            return;
        };
        // Data is at the beginning, in one block in the midst of a cluster, and at the end.
        let block = 33 * MIB + (40 << 10);
        setup.hole_below(4096, block - 4096);
        setup.hole_below(block + 4096, size - MIB - block - 4096);
        let expected = qemu::content(&setup.path);
        let (mut driver, shared) = setup.driver(1);
        let (mut position, mut read) = (0, 0);
        while position < size {
            let reached = step(&mut driver, Step::Populate(position), 0).unwrap();
            assert!(reached.position > position, "{kind}");
            position = reached.position;
            read += reached.read;
        }
        // From each of the three so much at a time, or a unit.
        assert!(read <= 3 * MIB.max(unit), "{kind}: {read}");
        step(&mut driver, Step::Detach(size), 0).unwrap();
        driver.queue.close().unwrap();
        let bytes = shared.lock().unwrap().bytes.clone();
        let image = check::Image::new(&bytes);
        assert_eq!(image.check(), 0, "{kind}");
        assert!(content(&image, &[]) == expected, "{kind}");
    }
}

#[test]
fn a_hole_of_a_file_that_was_cut_short_is_no_hole() {
    let size = 8 * MIB;
    let Some(mut setup) = Setup::over("cluster_size=64k", Some(size), false, size) else {
        return;
    };
    setup.hole_below(MIB, 6 * MIB);
    // The queue of a real host, which sees what becomes of the file.
    let queue = writable(&options(&setup.path, false, false)).for_test(true);
    let mut driver = Driver::new(queue, &vec![0; size as usize], 1);
    let base = setup.folder.path().join("base.raw");
    let file = std::fs::File::options().write(true).open(base).unwrap();
    file.set_len(4 * MIB).unwrap();
    let mut position = 0;
    let error = loop {
        match step(&mut driver, Step::Populate(position), 0) {
            Ok(reached) if reached.position < size => position = reached.position,
            Ok(_) => panic!("what is gone was taken for zeroes"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "at {position}");
}

#[test]
fn a_fault_of_the_host_ends_a_step_and_harms_nothing() {
    for kind in ["cluster_size=4k", "extended_l2=on,cluster_size=64k"] {
        let Some(setup) = setup(kind, SIZE) else {
            return;
        };
        let count = {
            let (mut driver, shared) = setup.driver(7);
            stream(&mut driver, 1).unwrap();
            shared.lock().unwrap().changes
        };
        let mut failed = 0;
        for errno in [Errno::IO, Errno::NOSPC] {
            for which in (0..count).step_by((count as usize / 12).max(1)) {
                let (mut driver, shared) = setup.driver(7);
                shared.lock().unwrap().fail = Some((which, errno));
                let first = stream(&mut driver, 1);
                driver.finish();
                shared.lock().unwrap().fail = None;
                failed += u64::from(first.is_err());
                if driver.queue.is_lost() {
                    assert!(first.is_err() || !driver.errors.is_empty());
                    let bytes = shared.lock().unwrap().bytes.clone();
                    check::Image::new(&bytes).check();
                    continue;
                }
                driver.errors.clear();
                if first.is_err() {
                    // It goes on from anywhere.
                    stream(&mut driver, 1).unwrap();
                    driver.finish();
                }
                driver.flush();
                assert!(driver.errors.is_empty(), "{:?}", driver.errors);
                driver.queue.close().unwrap();
                let bytes = shared.lock().unwrap().bytes.clone();
                assert!(stands_alone(&bytes));
                let image = check::Image::new(&bytes);
                image.check();
                driver.compare(&content(&image, &[]));
            }
        }
        assert!(failed > 0);
    }
}

#[test]
fn a_disk_that_has_grown_meanwhile_does_not_come_to_stand_alone() {
    let Some(setup) = setup("cluster_size=64k", 3 * MIB) else {
        return;
    };
    let (mut driver, shared) = setup.driver(1);
    let before = shared.lock().unwrap().bytes[..512].to_vec();
    let error = step(&mut driver, Step::Detach(3 * MIB), 0).unwrap_err();
    assert!(error.to_string().contains("size"), "{error}");
    assert!(shared.lock().unwrap().bytes[..512] == before);
    // Beyond the end there is nothing.
    let reached = step(&mut driver, Step::Populate(u64::MAX), 0).unwrap();
    assert_eq!((reached.position, reached.copied), (SIZE, 0));
}

#[test]
fn a_header_that_makes_no_sense_without_the_name_keeps_it() {
    let Some(setup) = setup("cluster_size=64k", SIZE) else {
        return;
    };
    // The area of the extensions is full and ends with the name: that is not an extension.
    let mut bytes = std::fs::read(&setup.path).unwrap();
    let at = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize;
    let len = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
    let name = bytes[at..at + len].to_vec();
    let end = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    let mut area = [0xe279_2aca_u32.to_be_bytes(), 3_u32.to_be_bytes()].concat();
    area.extend(b"raw\0\0\0\0\0");
    bytes[end..end + 4096].fill(0);
    bytes[end..end + 16].copy_from_slice(&area);
    bytes[end + 16..end + 16 + len].copy_from_slice(&name);
    bytes[8..16].copy_from_slice(&(end as u64 + 16).to_be_bytes());
    std::fs::write(&setup.path, &bytes).unwrap();
    let (mut driver, shared) = setup.driver(1);
    for wanted in [Step::CheckDetach, Step::Detach(SIZE)] {
        let error = step(&mut driver, wanted, 0).unwrap_err();
        assert!(error.to_string().contains("header"), "{error}");
        assert!(shared.lock().unwrap().bytes[..65536] == bytes[..65536]);
    }
}
