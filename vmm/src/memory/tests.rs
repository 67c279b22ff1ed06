use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

fn config(size: u64) -> MemoryConfig {
    MemoryConfig {
        size,
        ..MemoryConfig::default()
    }
}

#[test]
fn ram_goes_round_the_hole() {
    assert_eq!(
        ranges(256 * MIB),
        [(GuestAddress(0), 256 * MIB as usize)],
        "small RAM is one piece"
    );
    assert_eq!(ranges(HOLE_START).len(), 1);
    assert_eq!(
        ranges(5 << 30),
        [
            (GuestAddress(0), 3 << 30),
            (GuestAddress(4 << 30), 2usize << 30)
        ]
    );
}

#[test]
fn mappings_begin_at_huge_page_boundaries_and_end_with_the_last_reference() {
    for shared in [false, true] {
        let starts =
            |ram: &GuestRam| -> Vec<usize> { ram.iter().map(|r| r.as_ptr() as usize).collect() };
        let allocate = || {
            allocate(&MemoryConfig {
                shared,
                ..config((3 << 30) + 48 * MIB + 4096)
            })
            .unwrap()
        };
        // Another test that maps memory at the same moment can take the aligned gap.
        let aligned = |ram: &GuestRam| starts(ram).iter().all(|start| start % HUGE == 0);
        let ram = (0..20).map(|_| allocate()).find(aligned).unwrap();
        let starts = starts(&ram);
        assert_eq!(starts.len(), 2);
        for region in ram.iter() {
            assert_eq!(region.file_offset().is_some(), shared);
        }
        ram.write_obj(7u64, GuestAddress(4 << 30)).unwrap();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(4 << 30)).unwrap(), 7);
        assert!(ram.write_obj(7u64, GuestAddress(3 << 30)).is_err());
        drop(ram);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let left = maps
            .lines()
            .any(|l| l.starts_with(&format!("{:x}-", starts[0])) && l.contains("guest-ram"));
        assert!(!left);
    }
}

#[test]
fn a_memfd_can_neither_shrink_nor_grow() {
    let ram = allocate(&MemoryConfig {
        shared: true,
        reserve: true,
        ..config(16 * MIB)
    })
    .unwrap();
    let region = ram.iter().next().unwrap();
    let file = region.file_offset().unwrap().file();
    assert_eq!(file.metadata().unwrap().len(), 16 * MIB);
    assert!(file.set_len(8 * MIB).is_err());
    assert!(file.set_len(32 * MIB).is_err());
}

#[test]
fn prefaulted_memory_is_resident() {
    let ram = allocate(&MemoryConfig {
        prefault: true,
        thp: false,
        ..config(16 * MIB)
    })
    .unwrap();
    let start = ram.iter().next().unwrap().as_ptr() as usize;
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&format!("{start:x}-")));
    let rss = lines.find(|line| line.starts_with("Rss:")).unwrap();
    let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
    assert_eq!(host::parse_meminfo(rss, "Rss"), Some(16 * MIB));
    assert!(flags.contains("dd"), "kept out of core dumps: {flags}");
    assert!(
        flags.contains("nh"),
        "no transparent huge pages here: {flags}"
    );
}

#[test]
fn more_memory_than_the_host_has_is_refused_where_all_of_it_is_wanted() {
    let more = (host::total() + (1 << 30)) & !4095;
    for (reserve, prefault) in [(true, false), (false, true)] {
        let config = MemoryConfig {
            reserve,
            prefault,
            ..config(more)
        };
        let error = check(&config).unwrap_err();
        assert!(
            matches!(&error, Error::Invalid(invalid) if invalid.field == "size"),
            "{error}"
        );
        for shared in [false, true] {
            let error = allocate(&MemoryConfig {
                shared,
                ..config.clone()
            })
            .map(drop);
            // Without overcommit limits the host may well grant the reservation.
            if prefault || shared {
                assert!(matches!(error, Err(Error::OutOfMemory(_))), "{error:?}");
            }
        }
    }
    check(&config(more)).unwrap();
    allocate(&config(more)).unwrap();
}

#[test]
fn huge_pages_come_from_the_pool_or_not_at_all() {
    let huge = |shared| MemoryConfig {
        hugepages: true,
        hugepage_size: Some(2 * MIB),
        shared,
        ..config(64 * MIB)
    };
    if check(&huge(false)).is_err() {
        eprintln!("SKIPPED: this host has no pool of 2 MiB pages");
        return;
    }
    let enough = host::huge_pages_free(2 * MIB) >= 64;
    for shared in [false, true] {
        match allocate(&huge(shared)) {
            Ok(_) => assert!(enough),
            Err(Error::OutOfMemory(text)) => assert!(text.contains("huge pages"), "{text}"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_huge_page_size_without_a_pool_is_refused_by_name() {
    let error = check(&MemoryConfig {
        hugepages: true,
        hugepage_size: Some(1 << 40),
        ..config(1 << 40)
    })
    .unwrap_err();
    assert!(matches!(error, Error::Invalid(invalid) if invalid.field == "hugepage_size"));
}

#[test]
fn meminfo_lines_are_found_by_their_whole_name() {
    let text = "MemTotal:       24683656 kB\nMemFree:  1 kB\nHugePages_Total:       0\n";
    assert_eq!(
        host::parse_meminfo(text, "MemTotal"),
        Some(24_683_656 * 1024)
    );
    assert_eq!(host::parse_meminfo(text, "Mem"), None);
    assert_eq!(host::parse_meminfo(text, "HugePages_Total"), None);
    assert_eq!(host::parse_meminfo("X: 99999999999999999999 kB", "X"), None);
}

#[test]
fn what_kvm_has_no_memory_for_is_a_lack_of_memory() {
    let outcome = |errno| super::not_attached(kvm_ioctls::Error::new(errno));
    assert!(matches!(outcome(libc::ENOMEM), Error::OutOfMemory(_)));
    assert!(matches!(outcome(libc::EINVAL), Error::Host { .. }));
}
