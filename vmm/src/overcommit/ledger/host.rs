//! What limits the memory that VMs share: the host's own, and the cgroups (v2) we are in.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::admission::Ceiling;
use super::super::cgroup;
use super::lineage::{Below, Lineage};

/// Cgroups that are looked at below one with a limit, to find those of other VMs.
const MOST_INSIDE: usize = 4096;

/// Where the kernel tells.
pub(super) struct Host {
    pub(super) proc: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
        }
    }
}

/// The process's place among the cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Home {
    /// By name, as it sees that itself.
    pub(super) path: String,
    /// By number; empty where no cgroups (v2) can be seen.
    pub(super) lineage: Lineage,
    /// The directories of those.
    directories: Vec<PathBuf>,
}

impl Host {
    /// The cgroup whose memory the process's is; the root where there are none.
    pub(super) fn home(&self) -> Home {
        let process = self.proc.join("self");
        let Ok((cgroup, top)) = cgroup::place(&process) else {
            let text = fs::read_to_string(process.join("cgroup")).unwrap_or_default();
            let path = text.lines().find_map(|line| line.strip_prefix("0::"));
            return Home {
                path: path
                    .filter(|path| path.starts_with('/'))
                    .unwrap_or("/")
                    .to_owned(),
                ..Home::default()
            };
        };
        let mut home = Home {
            path: cgroup.path,
            ..Home::default()
        };
        for directory in cgroup.directory.ancestors() {
            let Ok(found) = fs::metadata(directory) else {
                break;
            };
            if home.directories.is_empty() {
                home.lineage.device = found.dev();
            } else if home.lineage.device != found.dev() {
                // Something else is mounted over it.
                break;
            }
            home.lineage.groups.push(found.ino());
            home.directories.push(directory.to_owned());
            if directory == top {
                // Only the root of the hierarchy has none; that of a namespace has one.
                let kind = fs::symlink_metadata(directory.join("cgroup.type"));
                home.lineage.whole = kind.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
                break;
            }
        }
        home
    }

    /// Every limit that holds for a process there, beside `others`; an error names what can't be
    /// read.
    pub(super) fn ceilings<'a>(
        &self,
        home: &Home,
        others: impl Iterator<Item = &'a Lineage> + Clone,
    ) -> Result<Vec<Ceiling>, String> {
        let path = self.proc.join("meminfo");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let total = meminfo(&text, "MemTotal").ok_or("/proc/meminfo has no MemTotal")?;
        // What lies in the pools of huge pages is not there for anything else.
        let pools = meminfo(&text, "Hugetlb").unwrap_or(0);
        let mut ceilings = vec![Ceiling {
            name: "the host".to_owned(),
            bytes: total.saturating_sub(pools),
            cgroup: None,
            inside: None,
        }];
        let names = Path::new(&home.path).ancestors();
        for (level, (directory, name)) in home.directories.iter().zip(names).enumerate() {
            // Absent in the root group, and `max` where there is no limit.
            let max = fs::read_to_string(directory.join("memory.max"));
            let Some(bytes) = max.ok().and_then(|max| max.trim().parse().ok()) else {
                continue;
            };
            let cgroup = Lineage {
                groups: home.lineage.groups.iter().skip(level).copied().collect(),
                ..home.lineage
            };
            let strange = |other: &Lineage| other.is_below(&cgroup) == Below::Unknown;
            let inside = others
                .clone()
                .any(strange)
                .then(|| inside(directory, cgroup.device));
            ceilings.push(Ceiling {
                name: format!("cgroup {}", name.display()),
                bytes,
                cgroup: Some(cgroup),
                inside: inside.flatten(),
            });
        }
        Ok(ceilings)
    }
}

/// The inodes of all cgroups below `directory`; `None` where not all can be seen, or are too many.
fn inside(directory: &Path, device: u64) -> Option<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    let mut ahead = vec![directory.to_owned()];
    while let Some(directory) = ahead.pop() {
        for entry in fs::read_dir(directory).ok()? {
            let entry = entry.ok()?;
            if !entry.file_type().ok()?.is_dir() {
                continue;
            }
            // Of what is mounted there, if anything is.
            let meta = fs::metadata(entry.path());
            match meta {
                Ok(meta) if meta.dev() == device => {
                    found.insert(meta.ino());
                    ahead.push(entry.path());
                }
                // Removed in the meantime: nobody is in it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                _ => return None,
            }
            if found.len() > MOST_INSIDE {
                return None;
            }
        }
    }
    Some(found)
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

    /// A host with directories for cgroups. `seen` is what of them is mounted, and `path` where
    /// the process is below that.
    fn host(root: &Path, seen: &str, path: &str) -> Host {
        let proc = root.join(format!("proc{}", seen.replace('/', "-")));
        fs::create_dir_all(proc.join("self")).unwrap();
        let meminfo = "MemTotal:       1000 kB\nHugetlb:          200 kB\n";
        fs::write(proc.join("meminfo"), meminfo).unwrap();
        let cgroup = format!("4:memory:/old\n0::{path}\n");
        fs::write(proc.join("self/cgroup"), cgroup).unwrap();
        let point = root.join("groups").join(seen);
        let mounts = format!("41 31 0:38 / {} rw - cgroup2 none rw\n", point.display());
        fs::write(proc.join("self/mountinfo"), mounts).unwrap();
        Host { proc }
    }

    fn group(root: &Path, path: &str, max: Option<&str>) -> u64 {
        let directory = root.join("groups").join(path);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("cgroup.procs"), "").unwrap();
        if !path.is_empty() {
            fs::write(directory.join("cgroup.type"), "domain\n").unwrap();
        }
        if let Some(max) = max {
            fs::write(directory.join("memory.max"), format!("{max}\n")).unwrap();
        }
        fs::metadata(directory).unwrap().ino()
    }

    fn none() -> std::iter::Empty<&'static Lineage> {
        std::iter::empty()
    }

    #[test]
    fn the_host_and_every_cgroup_with_a_limit_is_a_ceiling() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let lost = Host {
            proc: root.join("proc"),
        };
        let nowhere = lost.home();
        assert_eq!(
            (nowhere.path.as_str(), &nowhere.lineage),
            ("/", &Lineage::default())
        );
        let error = lost.ceilings(&nowhere, none()).unwrap_err();
        assert!(error.contains("meminfo"), "{error}");

        let host = host(root, "", "/vms.slice/a.scope");
        let unseen = host.home();
        assert_eq!(unseen.path, "/vms.slice/a.scope");
        assert_eq!(unseen.lineage, Lineage::default());
        assert_eq!(
            host.ceilings(&unseen, none()).unwrap().len(),
            1,
            "no cgroups at all"
        );

        let ids = [
            group(root, "vms.slice/a.scope", Some("max")),
            group(root, "vms.slice", Some("409600")),
            group(root, "", None),
        ];
        let home = host.home();
        assert_eq!(home.lineage.groups, ids);
        assert!(home.lineage.whole);
        let ceilings = host.ceilings(&home, none()).unwrap();
        assert_eq!(ceilings.len(), 2);
        assert_eq!(ceilings[0].bytes, 800 * 1024);
        assert_eq!(ceilings[1].bytes, 409_600);
        assert_eq!(ceilings[1].name, "cgroup /vms.slice");
        let slice = ceilings[1].cgroup.as_ref().unwrap();
        assert_eq!((&slice.groups[..], slice.whole), (&ids[1..], true));
    }

    #[test]
    fn a_container_and_the_host_know_each_others_cgroups() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let _ = group(root, "", None);
        let container = group(root, "pods/c", Some("204800"));
        let _ = group(root, "pods", Some("409600"));
        let beside = group(root, "pods/d", None);
        let deep = group(root, "pods/d/vm", None);
        let outside = host(root, "", "/pods").home();

        // A container sees its own group as the root, with a limit in it.
        let inside = host(root, "pods/c", "/");
        let home = inside.home();
        assert_eq!((home.path.as_str(), home.lineage.whole), ("/", false));
        assert_eq!(home.lineage.groups, [container]);
        let ceilings = inside
            .ceilings(&home, [&outside.lineage].into_iter())
            .unwrap();
        assert_eq!(ceilings[1].name, "cgroup /");
        assert_eq!(ceilings[1].bytes, 204_800);
        assert_eq!(
            ceilings[1].inside, None,
            "the host's process is known not to be there"
        );

        // Two containers don't see each other's roots: that the other is not in one's own is seen.
        let other = host(root, "pods/d", "/vm").home();
        assert_eq!(other.lineage.groups, [deep, beside]);
        let ceilings = inside
            .ceilings(&home, [&other.lineage].into_iter())
            .unwrap();
        assert_eq!(ceilings[1].inside, Some(BTreeSet::new()));

        // From the host both are found.
        let host = host(root, "", "/pods");
        let others = [&other.lineage, &home.lineage];
        let ceilings = host.ceilings(&outside, others.into_iter()).unwrap();
        assert_eq!(ceilings[1].name, "cgroup /pods");
        let found = ceilings[1].inside.as_ref().unwrap();
        assert_eq!(found, &BTreeSet::from([container, beside, deep]));
    }

    #[test]
    fn threads_in_threaded_cgroups_count_for_the_domain_above() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let _ = group(root, "", None);
        let vm = group(root, "vm", Some("409600"));
        let _ = group(root, "vm/io", None);
        fs::write(root.join("groups/vm/io/cgroup.type"), "threaded\n").unwrap();
        let host = host(root, "", "/vm/io");
        let home = host.home();
        assert_eq!((home.path.as_str(), home.lineage.groups[0]), ("/vm", vm));
        assert_eq!(host.ceilings(&home, none()).unwrap()[1].name, "cgroup /vm");
    }

    #[test]
    fn what_can_not_be_seen_whole_is_not_known() {
        let device = fs::metadata("/proc").unwrap().dev();
        assert_eq!(inside(Path::new("/nowhere"), device), None);
        // Something else is mounted below.
        assert_eq!(inside(Path::new("/"), device), None);
        let dir = tempfile::tempdir().unwrap();
        let device = fs::metadata(dir.path()).unwrap().dev();
        for n in 0..=MOST_INSIDE {
            fs::create_dir(dir.path().join(n.to_string())).unwrap();
        }
        assert_eq!(inside(dir.path(), device), None);
        fs::remove_dir(dir.path().join("0")).unwrap();
        assert_eq!(inside(dir.path(), device).unwrap().len(), MOST_INSIDE);
    }

    #[test]
    fn this_process_has_a_beginning_and_a_clock() {
        assert!(start_time().is_some_and(|ticks| ticks > 0));
        assert!(boot_clock_ms() > 0);
    }
}
