//! Which cgroup (v2) this process is in, and whether it has it for itself.
//!
//! ```text
//!  /proc/self/cgroup     0::/machine/vm1        where the process is in the hierarchy
//!  /proc/self/mountinfo  … / /sys/fs/cgroup … - cgroup2 …     where the hierarchy is mounted
//!                                ▼
//!  /sys/fs/cgroup/machine/vm1/cgroup.procs      who else is there
//! ```
//! Where vCPUs and devices are in threaded children, memory is charged to the domain above them,
//! which is then what is meant.

use std::path::{Component, Path, PathBuf};

use super::files;

/// The cgroup that the process's memory is charged to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Where its files are.
    pub directory: PathBuf,
    /// Its name in the hierarchy.
    pub path: String,
    /// Why what it counts is more than this process; `None` where the process is alone in it.
    pub shared: Option<String>,
}

/// Finds the cgroup of the process `pid`, whose directory in /proc is `process`.
pub fn locate(process: &Path, pid: u32) -> Result<Cgroup, String> {
    let (mut cgroup, _) = place(process)?;
    cgroup.shared = company(&cgroup, process, pid);
    Ok(cgroup)
}

/// The same without a look at who else is there; and the directory of the highest cgroup above it
/// that is mounted here.
pub fn place(process: &Path) -> Result<(Cgroup, PathBuf), String> {
    let membership = files::read(&process.join("cgroup"))?;
    let path = parse_membership(&membership).ok_or("this host has no cgroup v2")?;
    let mounts = files::read(&process.join("mountinfo"))?;
    let (mut cgroup, top) = parse_mounts(&mounts)
        .into_iter()
        .filter_map(|mount| Some((mount.place(path)?, mount.point)))
        .find(|(cgroup, _)| cgroup.directory.join("cgroup.procs").exists())
        .ok_or_else(|| format!("cgroup {path} is not in any file system that is mounted here"))?;
    // No deeper than cgroups can be nested.
    for _ in 0..256 {
        let kind = files::read(&cgroup.directory.join("cgroup.type")).unwrap_or_default();
        if kind.trim() != "threaded" || cgroup.directory == top || !cgroup.up() {
            break;
        }
    }
    Ok((cgroup, top))
}

impl Cgroup {
    /// Goes to the parent; false at the top.
    fn up(&mut self) -> bool {
        let Some((parent, _)) = self.path.rsplit_once('/') else {
            return false;
        };
        if self.path == "/" || !self.directory.pop() {
            return false;
        }
        self.path = if parent.is_empty() { "/" } else { parent }.to_owned();
        true
    }
}

/// Whom the process shares `cgroup` with.
fn company(cgroup: &Cgroup, process: &Path, pid: u32) -> Option<String> {
    let path = &cgroup.path;
    // Only the root of the hierarchy has none; where another is shown to us as `/`, it has one.
    if !cgroup.directory.join("cgroup.type").exists() {
        return Some("the process is in the root cgroup".to_owned());
    }
    let processes = match files::read(&cgroup.directory.join("cgroup.procs")) {
        Ok(text) => text,
        Err(error) => return Some(error),
    };
    let others = processes
        .lines()
        .filter(|line| line.trim().parse() != Ok(pid) && !is_kernel_thread(process, line.trim()))
        .count();
    if others > 0 {
        return Some(format!("cgroup {path} has {others} other processes"));
    }
    let kind = files::read(&cgroup.directory.join("cgroup.type")).unwrap_or_default();
    if kind.trim() == "domain threaded" {
        // All below are threads of the processes listed above.
        return None;
    }
    match files::read(&cgroup.directory.join("cgroup.stat")) {
        Ok(text) => match files::stat_line::<u64>(&text, "nr_descendants") {
            Some(0) => None,
            _ => Some(format!("cgroup {path} has others below it")),
        },
        Err(error) => Some(error),
    }
}

/// Whether `pid` is a thread of the kernel, as KVM makes one or two for each VM and puts them into
/// the cgroup of who asked. They have no memory of their own.
fn is_kernel_thread(process: &Path, pid: &str) -> bool {
    let Some(processes) = process.parent() else {
        return false;
    };
    // No more than a number: it becomes part of a path.
    pid.parse::<u32>().is_ok_and(|pid| {
        let stat = files::read(&processes.join(format!("{pid}/stat")));
        stat.is_ok_and(|text| parse_flags(&text).is_some_and(|flags| flags & PF_KTHREAD != 0))
    })
}

/// Of a task's flags (include/linux/sched.h): it is a thread of the kernel.
const PF_KTHREAD: u64 = 0x0020_0000;

/// A task's flags in /proc/PID/stat, where its name, in parentheses, may hold anything.
fn parse_flags(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(6)?.parse().ok()
}

/// The path of a process in the v2 hierarchy.
fn parse_membership(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    // A cgroup that was removed under its last process; or one outside of our namespace.
    let gone = path.ends_with(" (deleted)");
    let plain = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    (path.starts_with('/') && plain && !gone).then_some(path)
}

/// A mounted v2 hierarchy, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    root: String,
    point: PathBuf,
}

impl Mount {
    /// Where the cgroup `path` is under this mount.
    fn place(&self, path: &str) -> Option<Cgroup> {
        let below = Path::new(path).strip_prefix(&self.root).ok()?;
        Some(Cgroup {
            directory: self.point.join(below),
            path: path.to_owned(),
            shared: None,
        })
    }
}

fn parse_mounts(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            (file_system.split(' ').next()? == "cgroup2").then_some(())?;
            let mut fields = mount.split(' ').skip(3);
            Some(Mount {
                root: unescape(fields.next()?),
                point: unescape(fields.next()?).into(),
            })
        })
        .collect()
}

/// Undoes the `\040` for spaces and the like.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|c| u8::from_str_radix(c, 8).ok());
        match code {
            Some(code) => {
                plain.push(code.into());
                plain.push_str(part.get(3..).unwrap_or_default());
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// A /proc/self and a hierarchy of cgroups in a temporary directory.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new(membership: &str, root: &str) -> Self {
            let host = Self(tempfile::tempdir().unwrap());
            fs::create_dir(host.0.path().join("self")).unwrap();
            let groups = host.0.path().join("groups");
            fs::create_dir(&groups).unwrap();
            fs::write(groups.join("cgroup.procs"), "").unwrap();
            host.file("self/cgroup", membership);
            host.file(
                "self/mountinfo",
                &format!(
                    "31 23 0:28 / /sys rw,relatime - sysfs sysfs rw\n\
                     41 31 0:38 {root} {} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
                    groups.display()
                ),
            );
            host
        }

        fn file(&self, name: &str, text: &str) {
            fs::write(self.0.path().join(name), text).unwrap();
        }

        fn group(&self, name: &str, kind: &str, processes: &str, below: u32) {
            let directory = self.0.path().join("groups").join(name);
            fs::create_dir_all(&directory).unwrap();
            for (file, text) in [
                ("cgroup.type", kind.to_owned()),
                ("cgroup.procs", processes.to_owned()),
                ("cgroup.stat", format!("nr_descendants {below}\n")),
            ] {
                fs::write(directory.join(file), text).unwrap();
            }
        }

        fn locate(&self) -> Result<Cgroup, String> {
            locate(&self.0.path().join("self"), 100)
        }
    }

    #[test]
    fn a_process_that_is_alone_in_its_cgroup_has_it_for_itself() {
        let host = Host::new("0::/machine/vm1\n", "/");
        host.group("machine/vm1", "domain\n", "100\n", 0);
        let cgroup = host.locate().unwrap();
        assert_eq!(cgroup.path, "/machine/vm1");
        assert!(cgroup.directory.ends_with("groups/machine/vm1"));
        assert_eq!(cgroup.shared, None);
    }

    #[test]
    fn company_beside_or_below_is_told() {
        let host = Host::new("9:name=systemd:/\n0::/vm1\n", "/");
        host.group("vm1", "domain\n", "99\n100\n0\n", 0);
        let shared = host.locate().unwrap().shared.unwrap();
        assert!(shared.contains("2 other processes"), "{shared}");
        host.group("vm1", "domain\n", "100\n", 1);
        let shared = host.locate().unwrap().shared.unwrap();
        assert!(shared.contains("below"), "{shared}");
    }

    #[test]
    fn threads_of_the_kernel_are_no_company() {
        let host = Host::new("0::/vm1\n", "/");
        host.group("vm1", "domain\n", "100\n101\n", 0);
        for (stat, alone) in [
            // Linux 6.1, beside a VM.
            (
                "101 (kvm-nx-lpage-re) S 2 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1",
                true,
            ),
            (
                "101 (a) 2129984) S 2 0 0 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 1",
                false,
            ),
            ("101 (sh", false),
        ] {
            fs::create_dir_all(host.0.path().join("101")).unwrap();
            host.file("101/stat", stat);
            assert_eq!(host.locate().unwrap().shared.is_none(), alone, "{stat}");
        }
        fs::remove_file(host.0.path().join("101/stat")).unwrap();
        assert!(host.locate().unwrap().shared.is_some());
    }

    #[test]
    fn the_root_is_nobodys_own() {
        let host = Host::new("0::/\n", "/");
        let shared = host.locate().unwrap().shared.unwrap();
        assert!(shared.contains("root"), "{shared}");
        // The root of a namespace is an ordinary cgroup.
        host.group("", "domain\n", "100\n", 0);
        assert_eq!(host.locate().unwrap().shared, None);
    }

    #[test]
    fn memory_of_threads_in_threaded_cgroups_is_charged_to_the_domain_above() {
        let host = Host::new("0::/vm1/main\n", "/");
        host.group("vm1", "domain threaded\n", "100\n", 2);
        host.group("vm1/main", "threaded\n", "", 0);
        let cgroup = host.locate().unwrap();
        assert_eq!(
            (cgroup.path.as_str(), cgroup.shared),
            ("/vm1", None),
            "the domain is found"
        );
        assert!(cgroup.directory.ends_with("groups/vm1"));
    }

    #[test]
    fn a_part_of_the_hierarchy_may_be_mounted() {
        let host = Host::new("0::/pods/a b/vm\n", "/pods/a\\040b");
        host.group("vm", "domain\n", "100\n", 0);
        assert_eq!(host.locate().unwrap().path, "/pods/a b/vm");
        let host = Host::new("0::/elsewhere\n", "/pods");
        assert!(host.locate().unwrap_err().contains("/elsewhere"));
    }

    #[test]
    fn a_host_without_the_second_version_says_so() {
        for membership in [
            "4:memory:/x\n",
            "",
            "0::/../other\n",
            "0::/gone (deleted)\n",
        ] {
            let error = Host::new(membership, "/").locate().unwrap_err();
            assert!(error.contains("no cgroup v2"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text in any::<String>()) {
            let _ = parse_membership(&text);
            let _ = parse_membership(&format!("0::/{text}"));
            let _ = parse_mounts(&text);
            let _ = parse_mounts(&format!("1 2 3 {text} {text} - cgroup2"));
            let _ = unescape(&text);
            let _ = parse_flags(&text);
        }
    }
}
