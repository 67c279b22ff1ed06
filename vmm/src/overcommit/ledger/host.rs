//! What limits the memory that VMs share: the host's own, and the cgroups (v2) we are in.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::admission::Ceiling;

/// Where the kernel tells.
pub(super) struct Host {
    pub(super) proc: PathBuf,
    pub(super) cgroups: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            cgroups: "/sys/fs/cgroup".into(),
        }
    }
}

impl Host {
    /// The process's cgroup as it sees it; the root where there are none.
    pub(super) fn cgroup(&self) -> String {
        let text = fs::read_to_string(self.proc.join("self/cgroup")).unwrap_or_default();
        let path = text.lines().find_map(|line| line.strip_prefix("0::"));
        path.filter(|path| path.starts_with('/'))
            .unwrap_or("/")
            .to_owned()
    }

    /// Every limit that holds for a process in `cgroup`; an error names what can't be read.
    pub(super) fn ceilings(&self, cgroup: &str) -> Result<Vec<Ceiling>, String> {
        let path = self.proc.join("meminfo");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let total = meminfo(&text, "MemTotal").ok_or("/proc/meminfo has no MemTotal")?;
        // What lies in the pools of huge pages is not there for anything else.
        let pools = meminfo(&text, "Hugetlb").unwrap_or(0);
        let mut ceilings = vec![Ceiling {
            name: "the host".to_owned(),
            bytes: total.saturating_sub(pools),
            cgroup: None,
        }];
        for group in Path::new(cgroup).ancestors() {
            let Ok(below) = group.strip_prefix("/") else {
                continue;
            };
            // Absent in the root group, and `max` where there is no limit.
            let max = fs::read_to_string(self.cgroups.join(below).join("memory.max"));
            if let Some(bytes) = max.ok().and_then(|max| max.trim().parse().ok()) {
                let group = group.to_string_lossy().into_owned();
                ceilings.push(Ceiling {
                    name: format!("cgroup {group}"),
                    bytes,
                    cgroup: Some(group),
                });
            }
        }
        Ok(ceilings)
    }
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// When this process started, in clock ticks since the host's boot.
pub(super) fn start_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may have anything in it; the 22nd field is the 20th after it.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Milliseconds since the host's boot, the same for every process.
pub fn boot_clock_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanos = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds * 1000 + nanos / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_and_every_cgroup_with_a_limit_is_a_ceiling() {
        let root = tempfile::tempdir().unwrap();
        let host = Host {
            proc: root.path().join("proc"),
            cgroups: root.path().join("cgroup"),
        };
        assert!(host.ceilings("/").unwrap_err().contains("meminfo"));
        fs::create_dir_all(host.proc.join("self")).unwrap();
        let meminfo = "MemTotal:       1000 kB\nHugetlb:          200 kB\n";
        fs::write(host.proc.join("meminfo"), meminfo).unwrap();
        assert_eq!(host.cgroup(), "/");
        let cgroup = "4:memory:/old\n0::/vms.slice/a.scope\n";
        fs::write(host.proc.join("self/cgroup"), cgroup).unwrap();
        let own = host.cgroup();
        assert_eq!(own, "/vms.slice/a.scope");
        assert_eq!(host.ceilings(&own).unwrap().len(), 1, "no cgroups at all");

        let groups = host.cgroups.join("vms.slice/a.scope");
        fs::create_dir_all(&groups).unwrap();
        fs::write(groups.join("memory.max"), "max\n").unwrap();
        fs::write(host.cgroups.join("vms.slice/memory.max"), "409600\n").unwrap();
        let ceilings = host.ceilings(&own).unwrap();
        assert_eq!(ceilings.len(), 2);
        assert_eq!(ceilings[0].bytes, 800 * 1024);
        assert_eq!(ceilings[1].bytes, 409_600);
        assert_eq!(ceilings[1].name, "cgroup /vms.slice");
        assert_eq!(ceilings[1].cgroup.as_deref(), Some("/vms.slice"));
        // A container sees its own group as the root, with a limit in it.
        fs::write(host.cgroups.join("memory.max"), "204800\n").unwrap();
        let ceilings = host.ceilings("/").unwrap();
        assert_eq!(ceilings[1].cgroup.as_deref(), Some("/"));
        assert_eq!(ceilings[1].bytes, 204_800);
    }

    #[test]
    fn this_process_has_a_beginning_and_a_clock() {
        assert!(start_time().is_some_and(|ticks| ticks > 0));
        assert!(boot_clock_ms() > 0);
    }
}
