//! RAM of all sizes and kinds.

use std::fs;

use serde_json::{Value, json};

use crate::support::procfs::resident_bytes;
use crate::vm::Vm;

const MIB: u64 = 1 << 20;

/// Boots with this memory and checks that the guest has all of it, and can use it.
fn boot_with(memory: Value) -> Vm {
    let size = memory["size"].as_u64().unwrap();
    let mut vm = Vm::boot(|config, _| config["memory"] = memory);
    let total = vm.agent.number("awk '/MemTotal/ {print $2}' /proc/meminfo") * 1024;
    // The kernel keeps its own code, its page descriptors and a few reservations to itself.
    assert!(total <= size, "{total} of {size}");
    assert!(total > size - size / 16 - 80 * MIB, "{total} of {size}");
    let info = vm.api.get("vm.info");
    assert_eq!(info["memory_actual_size"], size);
    let write = "dd if=/dev/urandom of=/dev/shm/a bs=1M count=48 2>/dev/null";
    vm.agent.ok(&format!(
        "{write} && cp /dev/shm/a /dev/shm/b && cmp /dev/shm/a /dev/shm/b"
    ));
    vm.assert_guest_content();
    vm
}

#[test]
fn a_guest_of_256_mib_has_them() {
    boot_with(json!({"size": 256 * MIB}));
}

#[test]
fn a_guest_of_3_gib_ends_at_the_hole() {
    let vm = boot_with(json!({"size": 3072 * MIB}));
    let map = vm.agent.ok("grep 'System RAM' /proc/iomem");
    assert!(
        !map.contains("100000000-"),
        "nothing beyond the hole: {map}"
    );
}

#[test]
fn a_guest_of_5_gib_goes_on_beyond_the_hole() {
    let vm = boot_with(json!({"size": 5120 * MIB}));
    let map = vm.agent.ok("grep 'System RAM' /proc/iomem");
    assert!(
        map.contains("100000000-17fffffff"),
        "2 GiB beyond the hole: {map}"
    );
}

#[test]
fn an_odd_number_of_pages_is_possible() {
    boot_with(json!({"size": 301 * MIB + 4096 * 3}));
}

#[test]
fn shared_memory_is_a_file_others_can_map() {
    let vm = boot_with(json!({"size": 256 * MIB, "shared": true}));
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.ballast.pid())).unwrap();
    let ram = maps
        .lines()
        .find(|line| line.contains("memfd:") && line.contains("rw-s"));
    assert!(ram.is_some(), "{maps}");
}

#[test]
fn memory_without_transparent_huge_pages_has_none() {
    let vm = boot_with(json!({"size": 256 * MIB, "thp": false}));
    let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.ballast.pid())).unwrap();
    let huge = smaps
        .lines()
        .find(|line| line.starts_with("AnonHugePages:"))
        .unwrap();
    assert!(huge.contains(" 0 kB"), "{huge}");
}

#[test]
fn mergeable_memory_is_offered_to_ksm() {
    let vm = boot_with(json!({"size": 256 * MIB, "mergeable": true}));
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.ballast.pid())).unwrap();
    let merged = smaps
        .lines()
        .any(|l| l.starts_with("VmFlags:") && l.contains(" mg"));
    assert!(merged, "no mapping is mergeable");
}

#[test]
fn prefaulted_memory_is_there_at_once_and_the_rest_only_when_used() {
    let lazy = Vm::boot(|_, _| {});
    let lazy_bytes = resident_bytes(lazy.ballast.pid());
    assert!(lazy_bytes < 230 * MIB, "{lazy_bytes}");
    drop(lazy);
    let eager = boot_with(json!({"size": 256 * MIB, "prefault": true}));
    let eager_bytes = resident_bytes(eager.ballast.pid());
    assert!(eager_bytes >= 256 * MIB, "{eager_bytes}");
}

#[test]
fn reserved_memory_boots() {
    boot_with(json!({"size": 256 * MIB, "reserve": true}));
}

#[test]
fn huge_pages_come_from_the_hosts_pool_and_go_back_to_it() {
    let pool = "/proc/sys/vm/nr_hugepages";
    let before = fs::read_to_string(pool).unwrap();
    let wanted = before.trim().parse::<u64>().unwrap() + 130;
    fs::write(pool, wanted.to_string()).expect("this test must be root, to add huge pages");
    let free = || {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let line = meminfo
            .lines()
            .find(|l| l.starts_with("HugePages_Free:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let free_before = free();
    let vm = boot_with(json!({"size": 256 * MIB, "hugepages": true, "prefault": true}));
    assert_eq!(free_before - free(), 128);
    drop(vm);
    assert_eq!(free(), free_before);
    fs::write(pool, before.trim()).unwrap();
}
