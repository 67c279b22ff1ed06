//! Against qemu-img, on images of every kind, sound and broken; and on hostile ones.

use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::super::entry::{COMPRESSED, COPIED, OFFSET};
use super::super::tests::qemu;
use super::super::{create, extents};
use super::*;
use crate::disk::Format;

const MIB: u64 = 1 << 20;

fn options(path: &Path) -> OpenOptions {
    OpenOptions {
        readonly: true,
        disable_io_uring: true,
        ..OpenOptions::new(path)
    }
}

fn look(path: &Path, repair: Repair) -> (Report, Vec<String>) {
    let mut lines = Vec::new();
    let report = check(
        &options(path),
        repair,
        &mut Listener {
            finding: &mut |line| lines.push(line.to_owned()),
            progress: &mut |done, total| assert!(done <= total),
        },
    );
    (report.unwrap(), lines)
}

/// What qemu-img finds, without what it says of repairs.
fn judge(path: &Path) -> Report {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output", "json"])
        .arg(path)
        .output()
        .unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let field = |name: &str| found[name].as_u64().unwrap_or(0);
    Report {
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        corruptions_fixed: 0,
        leaks_fixed: 0,
        image_end_offset: field("image-end-offset"),
        total_clusters: field("total-clusters"),
        allocated_clusters: field("allocated-clusters"),
        fragmented_clusters: field("fragmented-clusters"),
        compressed_clusters: field("compressed-clusters"),
    }
}

const KINDS: [&str; 9] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=64k,refcount_bits=64",
    "compat=0.10",
    "cluster_size=32k,extended_l2=on",
    "lazy_refcounts=on,preallocation=metadata",
];

/// Without the figures that QEMU has of the data file.
#[test]
fn images_with_a_data_file_are_found_as_sound_as_they_are_and_mended() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    for (number, kind) in [
        "cluster_size=64k",
        "cluster_size=4k,data_file_raw=on",
        "cluster_size=32k,extended_l2=on",
        "lazy_refcounts=on,preallocation=metadata",
    ]
    .iter()
    .enumerate()
    {
        let data = format!("{kind},data_file={}", at.join(number.to_string()).display());
        let path = qemu::create(at, &format!("{number}.qcow2"), &data, 24 * MIB);
        qemu::scribble(&path, 24 * MIB, 60, number as u64);
        qemu::io(&path, &["write 0 1M".into()]);
        let (found, lines) = look(&path, Repair::Nothing);
        assert_eq!(found, judge(&path), "{kind}: {lines:?}");
        assert_eq!(
            (found.corruptions, found.leaks),
            (0, 0),
            "{kind}: {lines:?}"
        );
        let content = qemu::content(&path);

        // An entry that does not say that it is alone.
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: u64| {
            let bytes = bytes[at as usize..].first_chunk();
            u64::from_be_bytes(*bytes.unwrap())
        };
        let l2 = word(word(40)) & OFFSET;
        let second = l2 + if kind.contains("extended") { 16 } else { 8 };
        let entry = word(second);
        write_word(&path, second, entry & !COPIED);
        let (found, lines) = look(&path, Repair::Nothing);
        assert_eq!(
            (found, found.corruptions),
            (judge(&path), 1),
            "{kind}: {lines:?}"
        );
        let (mended, lines) = look(&path, Repair::All);
        assert_eq!(mended.corruptions_fixed, 1, "{kind}: {lines:?}");
        assert_eq!(look(&path, Repair::Nothing).0, judge(&path), "{kind}");
        assert!(qemu::content(&path) == content, "{kind}");

        // One that leads elsewhere, and one of what can't be: nobody knows what was meant.
        for elsewhere in [entry + (4 << 20), COPIED] {
            write_word(&path, second, elsewhere);
            let (found, lines) = look(&path, Repair::All);
            assert!(found.corruptions > 0, "{kind}: {elsewhere:x}");
            assert!(
                lines.iter().any(|line| line.contains("of the disk is at")),
                "{elsewhere:x}: {lines:?}"
            );
        }
        write_word(&path, second, COMPRESSED | 512);
        if kind.contains("extended") {
            write_word(&path, second + 8, 0);
        }
        let (found, lines) = look(&path, Repair::All);
        assert!(found.corruptions > 0, "{kind}");
        assert!(
            lines
                .iter()
                .any(|line| line.contains("a compressed cluster")),
            "{lines:?}"
        );
        let now = std::fs::read(&path).unwrap();
        assert_eq!(
            now[second as usize..][..8],
            (COMPRESSED | 512).to_be_bytes()
        );
    }
}

fn write_word(path: &Path, offset: u64, word: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&word.to_be_bytes(), offset).unwrap();
}

#[test]
fn sound_images_of_every_kind_are_found_sound_with_the_same_figures() {
    let Some(folder) = qemu::folder() else { return };
    for (number, kind) in KINDS.iter().enumerate() {
        let path = qemu::create(folder.path(), &format!("{number}.qcow2"), kind, 24 * MIB);
        qemu::scribble(&path, 24 * MIB, 60, number as u64);
        if !kind.contains("refcount_bits=1") {
            qemu::img(&format!("snapshot -c one {}", path.display()));
            qemu::scribble(&path, 24 * MIB, 30, 7 + number as u64);
        }
        if !kind.contains("0.10") {
            qemu::img(&format!("bitmap --add -f qcow2 {} bits", path.display()));
            qemu::scribble(&path, 24 * MIB, 5, 8);
        }
        let (report, lines) = look(&path, Repair::Nothing);
        assert_eq!((report, lines), (judge(&path), vec![]), "{kind}");
        let before = std::fs::read(&path).unwrap();
        look(&path, Repair::All);
        assert!(before == std::fs::read(&path).unwrap(), "{kind}: changed");
    }
}

#[test]
fn compressed_clusters_are_counted_by_what_they_cover() {
    let Some(folder) = qemu::folder() else { return };
    let source = qemu::create(folder.path(), "source.qcow2", "", 8 * MIB);
    qemu::scribble(&source, 8 * MIB, 40, 3);
    let path = folder.path().join("packed.qcow2");
    let (source, target) = (source.display(), path.display());
    qemu::img(&format!("convert -c -f qcow2 -O qcow2 {source} {target}"));
    let (report, _) = look(&path, Repair::Nothing);
    assert!(report.compressed_clusters > 0);
    assert_eq!(report, judge(&path));
}

/// Where the refcount of a cluster is, in an image with one block and 16 bits.
fn refcount_at(bytes: &[u8], cluster: u64) -> usize {
    let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    field(field(48) as usize) as usize + cluster as usize * 2
}

fn sample(folder: &Path, name: &str) -> std::path::PathBuf {
    let path = qemu::create(folder, name, "cluster_size=64k", 16 * MIB);
    qemu::io(
        &path,
        &["write -P 5 0 3M".into(), "write -P 6 9M 1M".into()],
    );
    path
}

#[test]
fn leaks_are_found_as_qemu_finds_them_and_repaired() {
    let Some(folder) = qemu::folder() else { return };
    let path = sample(folder.path(), "leaks.qcow2");
    let content = qemu::content(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = refcount_at(&bytes, 0);
    for cluster in [7, 20, 40] {
        bytes[at + cluster * 2 + 1] += 3;
    }
    std::fs::write(&path, &bytes).unwrap();
    let (report, lines) = look(&path, Repair::Nothing);
    let mut expected = judge(&path);
    // QEMU's older versions count each lost reference, later ones each cluster.
    expected.leaks = 3;
    // Their COPIED bits are wrong now.
    assert_eq!(report.corruptions, expected.corruptions);
    assert_eq!(report, expected);
    assert!(lines.contains(&"Leaked cluster 20 refcount=4 reference=1".to_owned()));
    let (report, _) = look(&path, Repair::Leaks);
    assert_eq!((report.leaks, report.leaks_fixed), (0, 3));
    look(&path, Repair::All);
    let judged = judge(&path);
    assert_eq!((judged.leaks, judged.corruptions), (0, 0));
    assert_eq!(look(&path, Repair::Nothing).0, judged);
    assert!(content == qemu::content(&path));
}

#[test]
fn refcounts_that_are_too_low_are_raised_only_when_all_shall_be_repaired() {
    let Some(folder) = qemu::folder() else { return };
    let path = sample(folder.path(), "low.qcow2");
    qemu::img(&format!("snapshot -c one {}", path.display()));
    let content = qemu::content(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = refcount_at(&bytes, 0);
    for cluster in [6, 30] {
        bytes[at + cluster * 2 + 1] -= 1;
    }
    // The mark that somebody noticed.
    bytes[79] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    let (report, _) = look(&path, Repair::Nothing);
    assert_eq!(report.corruptions, judge(&path).corruptions);
    assert!(report.corruptions >= 2);
    let (left, _) = look(&path, Repair::Leaks);
    assert_eq!(left.corruptions, report.corruptions);
    assert_eq!(std::fs::read(&path).unwrap()[79], 2, "still marked");
    let (report, _) = look(&path, Repair::All);
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    assert!(report.corruptions_fixed >= 2);
    let judged = judge(&path);
    assert_eq!((judged.leaks, judged.corruptions), (0, 0));
    assert_eq!(std::fs::read(&path).unwrap()[79], 0, "the mark is gone");
    assert!(content == qemu::content(&path));
}

#[test]
fn lost_refcounts_are_rebuilt_beside_the_old_ones() {
    let Some(folder) = qemu::folder() else { return };
    for (number, damage) in ["no block", "no table", "shared block"].iter().enumerate() {
        let path = sample(folder.path(), &format!("lost{number}.qcow2"));
        qemu::img(&format!("snapshot -c one {}", path.display()));
        qemu::io(&path, &["write -P 8 1M 200k".into()]);
        let content = qemu::content(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let (table, l1) = (field(48) as usize, field(40));
        let entry = match *damage {
            "no block" => 0,
            "no table" => u64::MAX,
            _ => l1,
        };
        bytes[table..table + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        assert!(look(&path, Repair::Nothing).0.corruptions > 0, "{damage}");
        look(&path, Repair::Leaks);
        assert!(bytes == std::fs::read(&path).unwrap(), "{damage}: changed");
        let (report, _) = look(&path, Repair::All);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{damage}");
        let judged = judge(&path);
        assert_eq!((judged.corruptions, judged.leaks), (0, 0), "{damage}");
        assert!(content == qemu::content(&path), "{damage}");
    }
}

#[test]
fn an_entry_without_sense_is_told_and_left_with_the_leaks() {
    let Some(folder) = qemu::folder() else { return };
    let path = sample(folder.path(), "odd.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (field(field(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 6] |= 0x42;
    std::fs::write(&path, &bytes).unwrap();
    let (report, lines) = look(&path, Repair::All);
    assert!(report.corruptions > 0 && report.leaks > 0, "{report:?}");
    assert!(
        lines
            .iter()
            .any(|line| line.contains("beginning of a cluster")),
        "{lines:?}"
    );
    assert!(bytes == std::fs::read(&path).unwrap());
}

#[test]
fn what_a_snapshot_has_is_not_freed_where_its_l1_table_is_at_an_odd_place() {
    let Some(folder) = qemu::folder() else { return };
    let path = sample(folder.path(), "odd.qcow2");
    qemu::img(&format!("snapshot -c one {}", path.display()));
    qemu::io(&path, &["write -P 8 0 200k".into()]);
    let mut bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    bytes[table + 7] = 8;
    std::fs::write(&path, &bytes).unwrap();
    let (report, lines) = look(&path, Repair::All);
    assert!(report.corruptions > 0 && report.leaks > 0, "{report:?}");
    assert!(lines.iter().any(|line| line.contains("no cluster")));
    assert!(bytes == std::fs::read(&path).unwrap());
}

#[test]
fn an_image_that_is_emptied_shows_what_lies_below_it_and_takes_no_space() {
    let Some(folder) = qemu::folder() else { return };
    let path = sample(folder.path(), "full.qcow2");
    empty(&options(&path)).unwrap();
    assert!(qemu::content(&path).iter().all(|byte| *byte == 0));
    let judged = judge(&path);
    assert_eq!((judged.leaks, judged.corruptions), (0, 0));
    assert!(path.metadata().unwrap().len() < MIB);
}

#[test]
fn whatever_was_mutated_check_and_map_end_and_a_repair_leaves_nothing_it_calls_fixed() {
    let Some(folder) = qemu::folder() else { return };
    let mut samples = Vec::new();
    for (number, kind) in [
        "cluster_size=4k",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10",
    ]
    .iter()
    .enumerate()
    {
        let path = qemu::create(folder.path(), &format!("m{number}.qcow2"), kind, 2 * MIB);
        qemu::scribble(&path, 2 * MIB, 20, 5);
        qemu::img(&format!("snapshot -c one {}", path.display()));
        qemu::scribble(&path, 2 * MIB, 10, 6);
        samples.push(std::fs::read(&path).unwrap());
    }
    let path = folder.path().join("hostile.qcow2");
    let place = prop_oneof![3 => 0_usize..128, 2 => 0_usize..70000, 1 => any::<usize>()];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let changes = prop::collection::vec((place, any::<u8>()), 1..6);
    runner
        .run(
            &(0..samples.len(), changes, any::<bool>()),
            |(sample, changes, repair)| {
                let mut bytes = samples[sample].clone();
                for (at, value) in changes {
                    let at = at % bytes.len();
                    bytes[at] = value;
                }
                std::fs::write(&path, &bytes).unwrap();
                let mut listener = Listener {
                    finding: &mut |_| {},
                    progress: &mut |_, _| {},
                };
                let repair = if repair { Repair::All } else { Repair::Nothing };
                if let Ok(report) = check(&options(&path), repair, &mut listener)
                    && repair == Repair::All
                {
                    let (again, _) = look(&path, Repair::Nothing);
                    prop_assert_eq!(
                        (again.corruptions, again.leaks),
                        (report.corruptions, report.leaks)
                    );
                }
                if let Ok(mut extents) =
                    extents::Extents::open(Format::Qcow2, &options(&path), true)
                {
                    let end = extents.size_bytes().min(1 << 24);
                    let mut at = 0;
                    while at < end {
                        let Ok(extent) = extents.next(at, end) else {
                            break;
                        };
                        prop_assert!(extent.length > 0 && extent.start == at);
                        at += extent.length;
                    }
                }
                Ok(())
            },
        )
        .unwrap();
}

#[test]
fn a_window_at_a_time_finds_the_same() {
    let Some(folder) = qemu::folder() else { return };
    let path = folder.path().join("wide.qcow2");
    create::create(&create::CreateOptions {
        size_bytes: Some(32 << 20),
        cluster_size: Some(512),
        preallocation: create::Preallocation::Metadata,
        ..create::CreateOptions::new(&path, Format::Qcow2)
    })
    .unwrap();
    let (report, lines) = look(&path, Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{lines:?}");
    assert_eq!(report.allocated_clusters, 64 << 10);
    assert_eq!(report, judge(&path));
    assert!(report.image_end_offset / 512 > 50 * WINDOW);
}

/// An image with clusters of 512 bytes in which the guest's data lies in several windows, and
/// where in the file its last cluster is.
fn wide(path: &Path, size_bytes: u64) -> u64 {
    create::create(&create::CreateOptions {
        size_bytes: Some(size_bytes),
        cluster_size: Some(512),
        preallocation: create::Preallocation::Metadata,
        ..create::CreateOptions::new(path, Format::Qcow2)
    })
    .unwrap();
    let bytes = std::fs::read(path).unwrap();
    let field = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    // Each of the tables has 64 entries.
    let tables = size_bytes / 512 / 64;
    let table = field(field(40) + (tables - 1) * 8) & super::super::entry::OFFSET;
    field(table + 63 * 8) & super::super::entry::OFFSET
}

#[test]
fn refcounts_are_not_written_over_data_of_a_later_window() {
    let folder = tempfile::tempdir().unwrap();
    for (repair, senseless) in [
        (Repair::Leaks, false),
        (Repair::All, false),
        (Repair::All, true),
    ] {
        let path = folder.path().join(format!("{repair:?}{senseless}.qcow2"));
        let data = wide(&path, MIB);
        assert!(data / 512 >= WINDOW, "not in the first window");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.resize(bytes.len().max(data as usize + 512), 0);
        let place = data as usize..data as usize + 512;
        // As refcounts of 16 bits they would be 257.
        bytes[place.clone()].fill(1);
        if senseless {
            let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
            bytes[l1 + 7] |= 2;
        }
        // The block of the first clusters, it says, is where the guest's data is.
        let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
        bytes[table..table + 8].copy_from_slice(&data.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let (report, lines) = look(&path, repair);
        let after = std::fs::read(&path).unwrap();
        assert!(after[place.clone()] == bytes[place], "{repair:?}");
        assert!(lines.contains(&"ERROR refcount block 0 refcount=2".to_owned()));
        if repair == Repair::All && !senseless {
            assert_eq!((report.corruptions, report.leaks), (0, 0));
            let (report, lines) = look(&path, Repair::Nothing);
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{lines:?}");
        } else {
            assert!(after == bytes, "{repair:?} {senseless}: changed");
        }
    }
}

#[test]
fn an_image_strewn_over_too_many_windows_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    // With 512 KiB there are 16 tables, with 64 MiB 2048.
    for (kib, windows, fits) in [
        (512, MAX_WINDOWS - 1, true),
        (512, MAX_WINDOWS, false),
        (64 << 10, MAX_TABLES_READ / 2048, false),
    ] {
        let path = folder.path().join(format!("{kib}-{windows}.qcow2"));
        wide(&path, kib << 10);
        let mut bytes = std::fs::read(&path).unwrap();
        let field = |bytes: &[u8], at: u64| {
            let word = &bytes[at as usize..][..8];
            u64::from_be_bytes(word.try_into().unwrap())
        };
        let l1 = field(&bytes, 40);
        for window in 1..=windows {
            let table = field(&bytes, l1 + (window - 1) / 64 * 8) & super::super::entry::OFFSET;
            let entry = (table + (window - 1) % 64 * 8) as usize;
            bytes[entry..entry + 8].copy_from_slice(&(window * WINDOW * 512).to_be_bytes());
        }
        std::fs::write(&path, &bytes).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len((windows + 1) * WINDOW * 512).unwrap();
        let mut listener = Listener {
            finding: &mut |_| {},
            progress: &mut |_, _| {},
        };
        let result = check(&options(&path), Repair::Nothing, &mut listener);
        match result {
            Ok(_) => assert!(fits, "{kib} {windows}"),
            Err(error) => assert!(!fits && error.to_string().contains("strewn"), "{error}"),
        }
    }
}
