use std::fs;

use proptest::prelude::*;

use super::*;

/// Linux 6.1, a VM of 512 MiB with private memory.
const STAT_6_1: &str = "anon 134217728\nfile 20480000\nkernel 3145728\nkernel_stack 131072\n\
    pagetables 1048576\nsec_pagetables 0\npercpu 0\nsock 0\nvmalloc 0\nshmem 4096000\nzswap 0\n\
    zswapped 0\nfile_mapped 8192\nfile_dirty 0\nfile_writeback 0\nswapcached 0\n\
    anon_thp 104857600\nfile_thp 0\nshmem_thp 0\ninactive_anon 0\nactive_anon 134217728\n\
    slab_reclaimable 524288\nslab_unreclaimable 262144\nslab 786432\nworkingset_refault_anon 0\n\
    pgfault 40000\nthp_fault_alloc 50\n";

/// Linux 5.10, which has no line for the kernel.
const STAT_5_10: &str = "anon 4096\nfile 8192\nkernel_stack 100\nslab 20\npercpu 0\nsock 0\n\
    shmem 8192\nanon_thp 0\n";

/// Linux 6.18.
const SMAPS: &str = "558c84f42000-7ffe405ef000 ---p 00000000 00:00 0            [rollup]\n\
Rss:                1692 kB\nPss:                 284 kB\nPss_Dirty:           112 kB\n\
Pss_Anon:            112 kB\nPss_File:            172 kB\nPss_Shmem:            16 kB\n\
Shared_Clean:       1540 kB\nPrivate_Dirty:       112 kB\nAnonymous:           112 kB\n\
KSM:                   0 kB\nAnonHugePages:        64 kB\nSwap:                  8 kB\n\
SwapPss:               4 kB\nLocked:                0 kB\n";

/// A /proc/self and a cgroup in a temporary directory.
struct Process(tempfile::TempDir);

impl Process {
    fn new() -> Self {
        let process = Self(tempfile::tempdir().unwrap());
        process.file("smaps_rollup", SMAPS);
        process.file(
            "status",
            "Name:\tballast\nHugetlbPages:\t   2048 kB\nThreads:\t6\n",
        );
        process
    }

    fn file(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).unwrap();
    }

    fn cgroup(&self, shared: Option<&str>) -> Result<Cgroup, String> {
        Ok(Cgroup {
            directory: self.0.path().to_owned(),
            path: "/vm".to_owned(),
            shared: shared.map(str::to_owned),
        })
    }

    fn read(&self, cgroup: &Result<Cgroup, String>, shared_ram: SharedRam) -> Cost {
        Cost::read(self.0.path(), cgroup, shared_ram).unwrap()
    }
}

#[test]
fn a_cgroup_of_its_own_is_believed() {
    let process = Process::new();
    process.file("memory.current", "160000000\n");
    process.file("memory.stat", STAT_6_1);
    process.file("memory.swap.current", "12288\n");
    process.file("memory.zswap.current", "4096\n");
    let cost = process.read(&process.cgroup(None), SharedRam::default());
    assert_eq!(
        cost,
        Cost {
            source: Source::Cgroup,
            no_cgroup: None,
            resident: 160_000_000,
            anon: 134_217_728,
            shmem: 4_096_000,
            file: 16_384_000,
            kernel: Some(3_145_728),
            anon_huge: Some(104_857_600),
            hugetlb: 2 << 20,
            swap: Some(12288),
            zswap: Some(4096),
            age_ms: 0,
        }
    );
}

#[test]
fn what_an_older_kernel_does_not_tell_is_absent_or_added_up() {
    let cost = parse_stat(STAT_5_10, 20000).unwrap();
    assert_eq!(cost.kernel, Some(120));
    assert_eq!((cost.shmem, cost.file), (8192, 0));
    assert_eq!(
        parse_stat("anon 1\nfile 2\nshmem 1\n", 3).unwrap().kernel,
        None
    );
    assert_eq!(parse_stat("anon 1\nfile 2\n", 3), None);
    let process = Process::new();
    process.file("memory.current", "1\n");
    process.file("memory.stat", STAT_5_10);
    let cost = process.read(&process.cgroup(None), SharedRam::default());
    assert_eq!((cost.swap, cost.zswap), (None, None), "no swap accounting");
}

#[test]
fn without_a_cgroup_of_its_own_it_is_the_proportional_set_and_says_why() {
    let process = Process::new();
    process.file("memory.current", "160000000\n");
    process.file("memory.stat", STAT_6_1);
    for (cgroup, reason) in [
        (process.cgroup(Some("has 3 other processes")), "3 other"),
        (Err("no cgroup v2".to_owned()), "no cgroup v2"),
    ] {
        let cost = process.read(&cgroup, SharedRam::default());
        assert_eq!(cost.source, Source::SmapsRollup);
        assert!(cost.no_cgroup.unwrap().contains(reason));
        assert_eq!(cost.resident, (112 + 172 + 16) << 10);
        assert_eq!((cost.anon_huge, cost.swap), (Some(64 << 10), Some(4096)));
    }
    // A cgroup without the memory controller.
    fs::remove_file(process.0.path().join("memory.current")).unwrap();
    let cost = process.read(&process.cgroup(None), SharedRam::default());
    assert!(cost.no_cgroup.unwrap().contains("memory.current"));
}

#[test]
fn pages_of_shared_memory_that_nobody_maps_are_counted_all_the_same() {
    let process = Process::new();
    let cgroup = Err(String::new());
    let shared = SharedRam {
        bytes: 1 << 30,
        hugetlb: false,
    };
    let cost = process.read(&cgroup, shared);
    assert_eq!(cost.shmem, 1 << 30);
    assert_eq!(cost.resident, (1 << 30) + (284 << 10));
    let huge = SharedRam {
        hugetlb: true,
        ..shared
    };
    let cost = process.read(&cgroup, huge);
    assert_eq!((cost.shmem, cost.hugetlb), (16 << 10, 1 << 30));
}

#[test]
fn this_process_has_a_cost() {
    let me = Path::new("/proc/self");
    let cost = Cost::read(me, &Err("a test".to_owned()), SharedRam::default()).unwrap();
    assert!(cost.anon > 0 && cost.resident > cost.anon, "{cost:?}");
}

#[test]
fn a_reading_that_is_costly_is_kept_for_longer() {
    let cost = |resident| {
        let mut cost = parse_stat(STAT_5_10, 0).unwrap();
        cost.resident = resident;
        Ok(cost)
    };
    let mut cached = Cached::default();
    let start = Instant::now();
    // Taken to have begun a second ago.
    let begun = start.checked_sub(Duration::from_secs(1)).unwrap();
    let seen = |cost: Result<Cost, String>| {
        let cost = cost.unwrap();
        (cost.resident, cost.age_ms)
    };
    assert_eq!(seen(cached.get(begun, || cost(1))), (1, 0));
    let later = begun + Duration::from_secs(9);
    assert_eq!(seen(cached.get(later, || cost(2))), (1, 9000));
    let later = begun + Duration::from_secs(10);
    assert_eq!(seen(cached.get(later, || cost(3))), (3, 0));
    cached.clear();
    assert_eq!(seen(cached.get(later, || cost(4))), (4, 0));
}

proptest! {
    #[test]
    fn no_text_is_too_odd(text in any::<String>(), bytes in any::<u64>(), hugetlb in any::<bool>()) {
        let _ = parse_stat(&text, bytes);
        let _ = parse_smaps(&text, SharedRam { bytes, hugetlb });
    }

    #[test]
    fn no_numbers_are_too_large(numbers in prop::array::uniform5(any::<u64>())) {
        let [a, b, c, d, e] = numbers;
        let _ = parse_stat(&format!("anon {a}\nfile {b}\nshmem {c}\nslab {d}\npagetables {e}"), a);
        let _ = parse_smaps(
            &format!("Pss_Anon: {a} kB\nPss_File: {b} kB\nPss_Shmem: {c} kB"),
            SharedRam { bytes: d, hugetlb: false },
        );
    }
}
