//! What the host says about its memory, in /proc and /sys.

use std::fs;
use std::path::{Path, PathBuf};

use devices::config::Invalid;

use crate::config::MemoryConfig;
use crate::error::Error;

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// A line of /proc/meminfo, in bytes; `None` where the kernel has no such line.
fn meminfo(name: &str) -> Option<u64> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?, name)
}

pub(super) fn parse_meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes of memory the host has; no limit where that can't be known.
pub(super) fn total() -> u64 {
    meminfo("MemTotal").unwrap_or(u64::MAX)
}

/// Bytes that can be filled now without the host or a cgroup of ours running out.
pub(super) fn available() -> u64 {
    let host = meminfo("MemAvailable").unwrap_or(u64::MAX);
    cgroup_room().map_or(host, |room| room.min(host))
}

/// What memory.max of our cgroup (v2) and those above it leave.
fn cgroup_room() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    root.join(path)
        .ancestors()
        .take_while(|group| group.starts_with(root))
        .filter_map(|group| {
            let max = number(group.join("memory.max"))?;
            let current = number(group.join("memory.current")).unwrap_or(0);
            Some(max.saturating_sub(current))
        })
        .min()
}

/// The number in a one-line file; `None` where there is another word (`max`) or no file.
fn number(path: PathBuf) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Whether the kernel can merge pages.
pub(super) fn has_ksm() -> bool {
    Path::new("/sys/kernel/mm/ksm").exists()
}

fn pool(page: u64) -> PathBuf {
    Path::new(POOLS).join(format!("hugepages-{}kB", page >> 10))
}

/// Free huge pages of `page` bytes.
pub(super) fn huge_pages_free(page: u64) -> u64 {
    number(pool(page).join("free_hugepages")).unwrap_or(0)
}

/// Size in bytes of the huge pages asked for, of which the host must have a pool.
pub(super) fn huge_page(config: &MemoryConfig) -> Result<u64, Error> {
    let page = match config.hugepage_size {
        Some(page) => page,
        None => meminfo("Hugepagesize")
            .ok_or_else(|| Invalid::new("hugepages", "this host's kernel has no huge pages"))?,
    };
    if pool(page).is_dir() {
        Ok(page)
    } else {
        Err(Invalid::new(
            "hugepage_size",
            format!("this host has no pool of huge pages of {page} bytes"),
        )
        .into())
    }
}
