//! The memory of a process, from /proc.

use std::fs;

/// Bytes of one mapping, or of several.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    size: u64,
    anonymous: u64,
    /// Resident.
    pub rss: u64,
    /// Resident, shared pages divided by the number of their users.
    pub pss: u64,
}

/// All of it.
pub fn of(pid: u32) -> Memory {
    Memory::sum(&read(pid, "smaps_rollup"))
}

/// All but the mapping that is the guest's RAM. That must be one mapping of just its size: were it
/// merged with a neighbour, or split, the sum would say nothing.
pub fn beyond_ram(pid: u32, ram_bytes: u64) -> Memory {
    let smaps = read(pid, "smaps");
    let mut beyond = Memory::default();
    let mut found = 0;
    // Each mapping ends with its flags.
    for mapping in smaps.split("\nVmFlags:") {
        let memory = Memory::sum(mapping);
        if memory.size == ram_bytes {
            found += 1;
        } else {
            // Files may be mapped: QEMU keeps the kernel's.
            assert!(
                memory.anonymous < ram_bytes / 8,
                "is this mapping the guest's RAM, or not?\n{mapping}"
            );
            beyond.rss += memory.rss;
            beyond.pss += memory.pss;
        }
    }
    assert_eq!(found, 1, "mappings of the size of the guest's RAM");
    beyond
}

fn read(pid: u32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).expect("the memory of a living process")
}

impl Memory {
    fn sum(smaps: &str) -> Self {
        let bytes = |name: &str| -> u64 {
            smaps
                .lines()
                .filter_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"))
                .filter_map(|kib| kib.trim().parse::<u64>().ok())
                .map(|kib| kib * 1024)
                .sum()
        };
        Self {
            size: bytes("Size:"),
            anonymous: bytes("Anonymous:"),
            rss: bytes("Rss:"),
            pss: bytes("Pss:"),
        }
    }
}
