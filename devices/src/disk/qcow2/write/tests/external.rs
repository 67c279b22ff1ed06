//! Images whose data is in a file of its own.

use std::path::PathBuf;

use super::crash::{ALL, Setup, faults, power_cuts};
use super::geometries::exercise;
use super::*;

const MIB: u64 = 1 << 20;

/// Kinds, and whether there is a backing file.
const KINDS: [(&str, bool); 9] = [
    ("data_file=@", false),
    ("data_file=@,cluster_size=4k", true),
    ("data_file=@,cluster_size=512", false),
    ("data_file=@,cluster_size=2M", true),
    ("data_file=@,extended_l2=on,cluster_size=16k", true),
    ("data_file=@,preallocation=metadata,extended_l2=on", false),
    ("data_file=@,data_file_raw=on", false),
    ("data_file=@,data_file_raw=on,cluster_size=4k", false),
    (
        "data_file=@,data_file_raw=on,extended_l2=on,cluster_size=128k",
        false,
    ),
];

/// An image, and its data file.
fn create(folder: &Path, name: &str, kind: &str, size: u64) -> (PathBuf, PathBuf) {
    let data = folder.join(format!("{name}.data"));
    let kind = kind.replace('@', data.to_str().unwrap());
    (qemu::create(folder, name, &kind, size), data)
}

#[test]
fn a_data_file_is_written_as_qemu_reads_it() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    let base = qemu::create(at, "base.qcow2", "", 5 * MIB);
    qemu::scribble(&base, 5 * MIB, 60, 5);
    let base = format!(",backing_fmt=qcow2,backing_file={}", base.display());
    for (number, (kind, overlay)) in (0..).zip(KINDS) {
        let kind = kind.to_owned() + if overlay { &base } else { "" };
        let size = [9 * MIB + 4096, 5 * MIB, 2 * MIB, 12 * MIB][number as usize % 4];
        let (path, data) = create(at, &format!("{number}.qcow2"), &kind, size);
        exercise(&path, 300 + number, 4, 20);
        if kind.contains("data_file_raw") {
            assert!(
                qemu::content(&path) == std::fs::read(&data).unwrap(),
                "{kind}"
            );
        }
        // Nothing of it is in the image.
        let tables = std::fs::metadata(&path).unwrap().len();
        let least = if kind.contains("512") { 3 * MIB } else { MIB };
        assert!(kind.contains("2M") || tables < least, "{kind}: {tables}");
    }
}

#[test]
fn a_power_cut_of_two_files_loses_nothing_flushed_and_a_raw_one_is_the_disk_at_every_moment() {
    let states = wanted("BALLAST_POWER_CUTS", 15);
    for (number, (kind, overlay)) in (1..).zip(KINDS) {
        let Some(setup) = Setup::new(kind, overlay, false, 2 * MIB) else {
            return;
        };
        power_cuts(&setup, seed(number * 1000 + 400_000), 120, states);
        let Some(setup) = Setup::new(kind, overlay, false, MIB) else {
            return;
        };
        power_cuts(&setup, seed(number * 1000 + 400_001), 8, ALL);
    }
}

#[test]
fn a_fault_of_either_file_is_told_and_harms_nothing_else() {
    for (kind, overlay) in [KINDS[1], KINDS[4], KINDS[7]] {
        let Some(setup) = Setup::new(kind, overlay, false, 2 * MIB) else {
            return;
        };
        faults(&setup, Errno::IO, 7);
        faults(&setup, Errno::NOSPC, 7);
    }
}

#[test]
fn where_holes_can_not_be_made_zeroes_are_written_and_a_raw_file_is_still_the_disk() {
    for (kind, overlay) in [KINDS[1], KINDS[7], KINDS[8]] {
        let Some(setup) = Setup::new(kind, overlay, false, 2 * MIB) else {
            return;
        };
        let (mut driver, shared) = setup.driver(11);
        shared.lock().unwrap().no_punch = true;
        driver.run(200);
        driver.flush();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        setup.assert_whole(&mut driver, &shared);
    }
}

#[test]
fn either_file_may_have_no_room_and_what_was_refused_succeeds_when_there_is() {
    for (kind, overlay) in [KINDS[0], KINDS[1], KINDS[7]] {
        for of_data in [false, true] {
            let Some(setup) = Setup::new(kind, overlay, false, 4 * MIB) else {
                return;
            };
            let (mut driver, shared) = setup.driver(3);
            {
                let mut host = shared.lock().unwrap();
                match of_data {
                    true => host.data_room = MIB as usize,
                    false => host.room = host.bytes.image.len(),
                }
            }
            driver.run(200);
            let full = |error: &io::Error| error.raw_os_error() == Some(libc::ENOSPC);
            let errors = &driver.errors;
            assert!(errors.iter().all(full), "{errors:?}");
            // All tables of a raw one are there.
            let all_there = kind.contains("raw") && !of_data;
            assert!(all_there || !errors.is_empty(), "{kind} {of_data}");
            driver.flush();
            driver.errors.clear();
            shared.lock().unwrap().room = usize::MAX;
            shared.lock().unwrap().data_room = usize::MAX;
            driver.run(300);
            driver.flush();
            assert!(driver.errors.is_empty(), "{:?}", driver.errors);
            setup.assert_whole(&mut driver, &shared);
        }
    }
}

#[test]
fn a_sync_of_the_data_file_that_fails_is_the_end_of_the_image() {
    let Some(setup) = Setup::new("data_file=@", false, false, 2 * MIB) else {
        return;
    };
    let (mut driver, shared) = setup.driver(3);
    driver.push(0, Operation::Write { durable: false }, 0, 8);
    driver.finish();
    shared.lock().unwrap().no_data_sync = Some(Errno::IO);
    driver.flush();
    shared.lock().unwrap().no_data_sync = None;
    driver.flush();
    assert!(driver.queue.is_lost());
    assert_eq!(driver.errors.len(), 2);
    // The entry did not get to the disk before what it names.
    let bytes = shared.lock().unwrap().bytes.clone();
    let content = check::Image::new(&bytes).content(&[]);
    assert!(content[0] == Some([0; 512]));
}

#[test]
fn entries_that_lead_elsewhere_are_not_written_to() {
    use std::os::unix::fs::FileExt;
    let Some(folder) = qemu::folder() else { return };
    let (path, data) = create(folder.path(), "a.qcow2", "data_file=@", MIB);
    qemu::io(&path, &["write -P 5 0 1M".into()]);
    let bytes = std::fs::read(&path).unwrap();
    let word = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    };
    let l2 = word(word(40)) & !(1 << 63);
    for operation in [
        Operation::Write { durable: false },
        Operation::Discard,
        Operation::WriteZeroes {
            unmap: true,
            durable: false,
        },
        Operation::WriteZeroes {
            unmap: false,
            durable: false,
        },
    ] {
        for sectors in [128, 8] {
            std::fs::write(&path, &bytes).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&(1 << 63 | 0x5_0000_u64).to_be_bytes(), l2 + 8)
                .unwrap();
            let before = std::fs::read(&data).unwrap();
            let queue = writable(&options(&path, false, true)).for_test(true);
            let mut driver = Driver::new(queue, &vec![5; MIB as usize], 1);
            driver.push(0, operation, 128, sectors);
            driver.finish();
            assert_eq!(driver.errors.len(), 1, "{operation:?}");
            assert!(driver.queue.is_lost(), "{operation:?}");
            drop(driver);
            assert!(std::fs::read(&data).unwrap() == before, "{operation:?}");
            assert!(std::fs::read(&path).unwrap()[79] & 2 != 0, "it is marked");
        }
    }
}

#[test]
fn a_raw_data_file_that_is_too_short_is_not_written_to() {
    let Some(folder) = qemu::folder() else { return };
    let kind = "data_file=@,data_file_raw=on";
    let (path, data) = create(folder.path(), "a.qcow2", kind, MIB);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&data)
        .unwrap()
        .set_len(MIB - 512)
        .unwrap();
    let (chain, top) = Chain::open(&options(&path, false, true)).unwrap();
    let refused = Writable::open(Arc::new(chain), &top, &path)
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("data_file_raw"), "{refused}");
}

#[test]
fn the_promise_of_a_raw_file_is_kept_and_no_other() {
    let Some(folder) = qemu::folder() else { return };
    for (raw, before, after) in [(true, 0x16_u8, 2), (true, 2, 2), (false, 0x14, 0)] {
        use std::os::unix::fs::FileExt;
        let kind = format!(
            "data_file=@,data_file_raw={}",
            if raw { "on" } else { "off" }
        );
        let name = format!("{raw}{before}.qcow2");
        let (path, _) = create(folder.path(), &name, &kind, MIB);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[before], 95).unwrap();
        let queue = writable(&options(&path, false, true)).for_test(true);
        let mut driver = Driver::new(queue, &vec![0; MIB as usize], 1);
        driver.run(20);
        assert!(driver.errors.is_empty());
        drop(driver);
        assert_eq!(std::fs::read(&path).unwrap()[95], after);
    }
}
