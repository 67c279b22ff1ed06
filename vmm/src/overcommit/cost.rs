//! What the VM truly costs the host.
//!
//! The resident set (RSS) is no answer: it falls when shared memory is merely unmapped, counts a
//! page that KSM has merged in every process, and leaves out what the kernel keeps for us. So:
//!
//! | source | taken | where |
//! |---|---|---|
//! | cgroup | memory.current, memory.stat, memory.swap.current, memory.zswap.current | the process has a cgroup for itself |
//! | smaps_rollup | proportional set (PSS), and the blocks of the memfd of shared memory | elsewhere; says why |

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use utoipa::ToSchema;

use super::cgroup::Cgroup;
use super::files;

/// Where a cost was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = CostSource)]
pub enum Source {
    /// The process's own cgroup.
    Cgroup,
    /// /proc/self/smaps_rollup, and the memfd of shared memory.
    SmapsRollup,
}

/// Bytes of the host that the VM takes, with the VMM around it. Absent is what the source can't
/// tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Cost {
    /// Where it was read.
    pub source: Source,
    /// Why not from a cgroup.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_cgroup: Option<String>,
    /// All that is in memory, huge pages of the host's pool excepted. From a cgroup that includes
    /// the page cache of disk images and what the kernel keeps for the process; from smaps_rollup
    /// the process's share of what it maps, and shared guest memory even if it is swapped out.
    pub resident: u64,
    /// Of that, private memory.
    pub anon: u64,
    /// Of that, shared memory; shared guest memory is here.
    pub shmem: u64,
    /// Of that, files.
    pub file: u64,
    /// Of that, what the kernel keeps for the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<u64>,
    /// Of the private memory, what is in transparent huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anon_huge: Option<u64>,
    /// Huge pages of the host's pool (hugetlb).
    pub hugetlb: u64,
    /// Swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<u64>,
    /// Memory that compressed swap (zswap) takes; part of `resident`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zswap: Option<u64>,
    /// Milliseconds since it was read: where that is costly, it is not done at each request.
    pub age_ms: u64,
}

/// Shared guest memory: what its memfd has, in or out of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedRam {
    /// Bytes allocated.
    pub bytes: u64,
    /// Whether they are huge pages of the host's pool.
    pub hugetlb: bool,
}

impl Cost {
    /// Reads it for the process whose directory in /proc is `process`.
    pub fn read(
        process: &Path,
        cgroup: &Result<Cgroup, String>,
        shared_ram: SharedRam,
    ) -> Result<Self, String> {
        let from_cgroup = match cgroup {
            Err(reason) => Err(reason.clone()),
            Ok(Cgroup {
                shared: Some(reason),
                ..
            }) => Err(reason.clone()),
            Ok(cgroup) => from_cgroup(&cgroup.directory),
        };
        let mut cost = match from_cgroup {
            Ok(cost) => cost,
            Err(reason) => {
                let text = files::read(&process.join("smaps_rollup"))?;
                let mut cost =
                    parse_smaps(&text, shared_ram).ok_or("smaps_rollup: not what it should be")?;
                cost.no_cgroup = Some(reason);
                cost
            }
        };
        cost.hugetlb = if shared_ram.hugetlb {
            shared_ram.bytes
        } else {
            let status = files::read(&process.join("status"))?;
            files::kib_line(&status, "HugetlbPages").unwrap_or(0)
        };
        Ok(cost)
    }
}

fn from_cgroup(directory: &Path) -> Result<Cost, String> {
    let current = files::number(&directory.join("memory.current"))?;
    let stat = files::read(&directory.join("memory.stat"))?;
    let mut cost = parse_stat(&stat, current).ok_or("memory.stat: not what it should be")?;
    cost.swap = files::number(&directory.join("memory.swap.current")).ok();
    cost.zswap = files::number(&directory.join("memory.zswap.current")).ok();
    Ok(cost)
}

/// From memory.current and memory.stat; `None` where a line is missing that every kernel has.
fn parse_stat(stat: &str, current: u64) -> Option<Cost> {
    let line = |name| files::stat_line(stat, name);
    // One line since Linux 5.18, its parts before.
    let kernel = line("kernel").or_else(|| {
        let parts: [Option<u64>; 3] = ["kernel_stack", "slab", "pagetables"].map(line);
        let sum = parts.into_iter().flatten().fold(0, u64::saturating_add);
        parts.iter().any(Option::is_some).then_some(sum)
    });
    let shmem = line("shmem")?;
    Some(Cost {
        source: Source::Cgroup,
        no_cgroup: None,
        resident: current,
        anon: line("anon")?,
        shmem,
        // The kernel counts shared memory among the files.
        file: line("file")?.saturating_sub(shmem),
        kernel,
        anon_huge: line("anon_thp"),
        hugetlb: 0,
        swap: None,
        zswap: None,
        age_ms: 0,
    })
}

/// From smaps_rollup; `None` where a line is missing that every kernel has.
fn parse_smaps(text: &str, shared_ram: SharedRam) -> Option<Cost> {
    let line = |name| files::kib_line(text, name);
    let (anon, file) = (line("Pss_Anon")?, line("Pss_File")?);
    let memfd = if shared_ram.hugetlb {
        0
    } else {
        shared_ram.bytes
    };
    // What nobody has mapped (yet, or any more) is in the memfd all the same.
    let shmem = line("Pss_Shmem")?.max(memfd);
    Some(Cost {
        source: Source::SmapsRollup,
        no_cgroup: None,
        resident: anon.saturating_add(file).saturating_add(shmem),
        anon,
        shmem,
        file,
        kernel: None,
        anon_huge: line("AnonHugePages"),
        hugetlb: 0,
        swap: line("SwapPss").or_else(|| line("Swap")),
        zswap: None,
        age_ms: 0,
    })
}

/// The last cost, which is read again when somebody asks, but not so often that it takes more than
/// a twentieth of the thread's time: the kernel walks all page tables for smaps_rollup.
#[derive(Debug, Default)]
pub struct Cached {
    last: Option<(Instant, Duration, Result<Cost, String>)>,
}

impl Cached {
    /// The cost; `read` is called when the last one is too old.
    pub fn get(
        &mut self,
        now: Instant,
        read: impl FnOnce() -> Result<Cost, String>,
    ) -> Result<Cost, String> {
        if let Some((at, took, cost)) = &self.last {
            let age = now.saturating_duration_since(*at);
            if age < (*took * 20).min(Duration::from_secs(10)) {
                let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
                return cost.clone().map(|cost| Cost { age_ms, ..cost });
            }
        }
        let cost = read();
        self.last = Some((now, now.elapsed(), cost.clone()));
        cost
    }

    /// Forgets it: the VM is not what it was.
    pub fn clear(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests;
