//! Images that must not be written to, or that lie.

use super::*;
use crate::config::BuildError;

const MIB: u64 = 1 << 20;

fn refusal(path: &Path) -> String {
    let options = options(path, false, false);
    let opened = Chain::open(&options)
        .and_then(|(chain, top)| Writable::open(Arc::new(chain), &top, &options.path));
    match opened {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(BuildError::Invalid(invalid)) => format!("{}: {}", invalid.field, invalid.reason),
        Err(other) => panic!("{other}"),
    }
}

fn patch(path: &Path, offset: usize, bytes: &[u8]) {
    let mut image = std::fs::read(path).unwrap();
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, image).unwrap();
}

fn word(path: &Path, offset: u64) -> u64 {
    let image = std::fs::read(path).unwrap();
    let at = offset as usize;
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

fn open(path: &Path) -> Driver {
    let content = vec![0; 4 * MIB as usize];
    Driver::new(
        writable(&options(path, false, true)).for_test(true),
        &content,
        1,
    )
}

#[test]
fn what_could_not_be_kept_safe_is_refused() {
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "a.qcow2", "", 4 * MIB);
    for (bit, reason) in [
        (1_u64, "dirty bit"),
        (2, "marked as corrupt"),
        (4, "external"),
    ] {
        patch(&path, 72, &bit.to_be_bytes());
        let refused = match bit {
            4 => match Chain::open(&options(&path, false, false)) {
                Err(error) => error.to_string(),
                Ok(_) => panic!("accepted"),
            },
            _ => refusal(&path),
        };
        assert!(refused.contains(reason), "{refused}");
    }
    patch(&path, 72, &0_u64.to_be_bytes());
    // The refcount of nothing at all.
    let block = word(&path, word(&path, 48));
    patch(&path, block as usize, &[0; 64]);
    assert!(refusal(&path).contains("nothing is in use"));
    patch(&path, 48, &(1_u64 << 40).to_be_bytes());
    assert!(refusal(&path).contains("ends within its refcount table"));
}

#[test]
fn autoclear_features_go_with_the_first_write_and_not_before() {
    let Some(folder) = qemu::folder() else { return };
    let path = qemu::create(folder.path(), "a.qcow2", "", 4 * MIB);
    patch(&path, 88, &5_u64.to_be_bytes());
    let mut driver = open(&path);
    driver.push(0, Operation::Read, 0, 8);
    driver.finish();
    drop(driver);
    assert_eq!(word(&path, 88), 5);
    let mut driver = open(&path);
    driver.push(0, Operation::Write { durable: false }, 0, 8);
    driver.finish();
    assert_eq!(word(&path, 88), 0);
}

#[test]
fn an_entry_that_leads_to_metadata_marks_the_image_as_corrupt() {
    let Some(folder) = qemu::folder() else { return };
    let base = qemu::create(folder.path(), "a.qcow2", "", 4 * MIB);
    qemu::io(&base, &["write -P 1 0 128k".into()]);
    let good = std::fs::read(&base).unwrap();
    let l1 = word(&base, 40);
    let l2 = word(&base, l1) & 0x00ff_ffff_ffff_fe00;
    let block = word(&base, word(&base, 48));
    let beyond = (good.len() as u64).next_multiple_of(65536) + (1 << 30);
    for target in [0x1_0000, l1, l2, block, beyond] {
        std::fs::write(&base, &good).unwrap();
        patch(&base, l2 as usize, &(target | 1 << 63).to_be_bytes());
        let before = std::fs::read(&base).unwrap();
        let mut driver = open(&base);
        driver.push(0, Operation::Write { durable: false }, 0, 8);
        driver.finish();
        assert_eq!(driver.errors[0].raw_os_error(), Some(libc::EIO));
        driver.push(0, Operation::Write { durable: false }, 1000, 8);
        driver.finish();
        assert_eq!(driver.errors.len(), 2, "it is not written to any more");
        drop(driver);
        let after = std::fs::read(&base).unwrap();
        assert_eq!(after[79], 2, "the corrupt bit");
        assert!(
            after[80..] == before[80..],
            "{target:#x}: something was written"
        );
        assert!(refusal(&base).contains("marked as corrupt"));
    }
}

#[test]
fn an_entry_that_gives_up_metadata_marks_the_image_as_corrupt() {
    let Some(folder) = qemu::folder() else { return };
    let base = qemu::create(folder.path(), "a.qcow2", "", 4 * MIB);
    qemu::io(&base, &["write -P 1 0 128k".into()]);
    let good = std::fs::read(&base).unwrap();
    let (l1, table) = (word(&base, 40), word(&base, 48));
    let l2 = word(&base, l1) & 0x00ff_ffff_ffff_fe00;
    let block = word(&base, table);
    let owned = 1_u64 << 63;
    // The first is compressed data in the header's cluster.
    let mut entries = vec![1 << 62 | 512];
    for target in [l1, table, block, l2] {
        entries.extend([target, target | owned]);
    }
    let write = Operation::Write { durable: false };
    let ways = [
        (Operation::Discard, 0),
        (Operation::Discard, 1),
        (write, 0),
        (write, 1),
    ];
    // Of the entry that is given up: alone, or as the second of two.
    for (entry, (operation, index)) in entries
        .iter()
        .flat_map(|entry| ways.map(|way| (*entry, way)))
    {
        std::fs::write(&base, &good).unwrap();
        patch(&base, l2 as usize + index * 8, &entry.to_be_bytes());
        if index == 1 && operation == write {
            // So that both go to a new place.
            patch(&base, l2 as usize, &[0; 8]);
        }
        let before = std::fs::read(&base).unwrap();
        let mut driver = open(&base);
        driver.push(0, operation, 0, 256);
        driver.finish();
        driver.flush();
        driver.push(0, write, 2000, 128);
        driver.finish();
        driver.flush();
        driver.queue.close().unwrap();
        let codes: Vec<_> = driver.errors.iter().map(io::Error::raw_os_error).collect();
        let what = format!("{operation:?} of {entry:#x} at {index}");
        assert_eq!(codes, [Some(libc::EIO); 4], "{what}");
        drop(driver);
        let after = std::fs::read(&base).unwrap();
        assert_eq!(after[..4], *b"QFI\xfb", "{what}");
        assert_eq!(after[79], 2, "{what}: the corrupt bit");
        assert!(after[80..0x1_0000] == before[80..0x1_0000], "{what}");
        for place in [l1, table, block, l2] {
            let place = place as usize..place as usize + 0x1_0000;
            let same = after.get(place.clone()) == before.get(place.clone());
            assert!(same, "{what}: {place:x?} has changed");
        }
    }
}

#[test]
fn two_tables_at_one_place_are_not_written_to() {
    let Some(folder) = qemu::folder() else { return };
    let base = qemu::create(folder.path(), "a.qcow2", "cluster_size=4k", 4 * MIB);
    qemu::io(
        &base,
        &["write -P 1 0 4k".into(), "write -P 1 2M 4k".into()],
    );
    let good = std::fs::read(&base).unwrap();
    let (l1, table) = (word(&base, 40), word(&base, 48));
    let block = word(&base, table);
    let l2 = word(&base, l1) & 0x00ff_ffff_ffff_fe00;
    let mut changes = vec![(table + 8, block), (table + 8, l1), (40, table)];
    for target in [l1, table, block, l2] {
        changes.extend([(l1 + 8, target), (l1 + 8, target | 1 << 63)]);
    }
    for (place, target) in changes {
        std::fs::write(&base, &good).unwrap();
        patch(&base, place as usize, &target.to_be_bytes());
        let said = refusal(&base);
        let offset = format!("{:#x}", target & !(1 << 63));
        assert!(said.contains(&offset), "{place:#x} {target:#x}: {said}");
        assert!(said.contains("more than one"), "{said}");
    }
    // Where a later allocation could put anything.
    std::fs::write(&base, &good).unwrap();
    let beyond = (good.len() as u64).next_multiple_of(4096) + MIB;
    patch(&base, l1 as usize + 8, &(beyond | 1 << 63).to_be_bytes());
    let said = refusal(&base);
    assert!(said.contains("beyond the end"), "{said}");
    std::fs::write(&base, &good).unwrap();
    drop(writable(&options(&base, false, true)));
}

#[test]
fn a_table_whose_refcount_is_zero_is_not_taken_for_free_space() {
    let Some(folder) = qemu::folder() else { return };
    for operation in [Operation::Discard, Operation::Write { durable: false }] {
        let path = qemu::create(folder.path(), "a.qcow2", "", 4 * MIB);
        let l1 = word(&path, 40);
        let block = word(&path, word(&path, 48));
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(l1 + 0x1_0000 >= size, "it is the last");
        patch(&path, (block + (l1 >> 16) * 2) as usize, &[0; 2]);
        let mut driver = open(&path);
        driver.push(0, operation, 0, 128);
        driver.finish();
        driver.flush();
        driver.queue.close().unwrap();
        assert!(driver.errors.is_empty(), "{:?}", driver.errors);
        drop(driver);
        assert!(std::fs::metadata(&path).unwrap().len() > l1);
        if operation != Operation::Discard {
            let l2 = word(&path, l1) & 0x00ff_ffff_ffff_fe00;
            let data = word(&path, l2) & 0x00ff_ffff_ffff_fe00;
            assert!(l2 > l1 && data > l1, "{l2:#x} {data:#x}");
            assert_eq!(word(&path, data + 512), word(&path, data + 1016));
        }
    }
}

#[test]
fn whatever_an_image_holds_writing_never_panics() {
    let Some(folder) = qemu::folder() else { return };
    let path = folder.path().join("hostile.qcow2");
    let kinds = [
        "cluster_size=512,refcount_bits=1",
        "cluster_size=64k",
        "extended_l2=on,cluster_size=16k",
    ];
    let mut random = Random(11);
    for (number, kind) in (0..).zip(kinds) {
        let name = format!("{number}.qcow2");
        let sample = qemu::create(folder.path(), &name, kind, 4 * MIB);
        qemu::scribble(&sample, 4 * MIB, 60, number);
        let sample = std::fs::read(&sample).unwrap();
        let at = |o: usize| u64::from_be_bytes(sample[o..o + 8].try_into().unwrap()) as usize;
        let (l1, table) = (at(40), at(48));
        let l2 = at(l1) & 0x00ff_ffff_ffff_fe00;
        for round in 0..100 {
            let mut bytes = sample.clone();
            for _ in 0..1 + random.below(6) {
                let base = [0, l1, l2, l2, table, at(table)][random.below(6) as usize];
                let offset = (base + random.below(128) as usize) % bytes.len();
                bytes[offset] =
                    [0, 1, 2, 0x80, 0xff, random.below(256) as u8][random.below(6) as usize];
            }
            std::fs::write(&path, bytes).unwrap();
            let options = options(&path, false, round % 2 == 0);
            let Ok((chain, top)) = Chain::open(&options) else {
                continue;
            };
            if chain.size_bytes() > 64 * MIB || chain.size_bytes() % 512 != 0 {
                continue;
            }
            let size = chain.size_bytes() as usize;
            let Ok(writable) = Writable::open(Arc::new(chain), &top, &path) else {
                continue;
            };
            let queue = writable.for_test(round % 2 == 0);
            let mut driver = Driver::new(queue, &vec![0; size], round);
            // What a damaged image reads as is its own affair.
            driver.trusting = true;
            if size > 0 {
                driver.run(40);
            }
        }
    }
}
