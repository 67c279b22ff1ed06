//! How much CPU the VM gets beside others: `overcommit.cpu_weight` and `overcommit.cpu_max`, kept
//! by the process's own cgroup (v2; Documentation/admin-guide/cgroup-v2.rst, "Threads" and "CPU").
//!
//! ```text
//!   /machine/vm1          cpu.weight: against the cgroups beside it, that is, other VMs
//!   ├── vcpus  threaded   the vCPU threads; cpu.max, cpu.max.burst
//!   └── io     threaded   all other threads: devices, consoles, the VMM, the API
//! ```
//!
//! A limit on vCPUs must not hold up those who serve them: throttled together, a guest at its
//! limit would also find its disks and its API standing still. And the two halves compete as two,
//! whatever the number of vCPUs, so that I/O gets its turn among sixty-four of them.
//!
//! Threads inherit the cgroup of who spawns them, which is the VMM thread in `io`: devices plugged
//! later are in the right place by themselves.
//!
//! The children are made at boot and removed when the VM is off. After a SIGKILL they stay behind,
//! empty, and the next VM in that cgroup takes them over.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::allow;
use devices::config::Invalid;
use devices::sandbox::{Allow, Test};
use rustix::fs::{AtFlags, CWD, Mode};

use super::{cgroup, files};
use crate::config::{CpuMax, OvercommitConfig};

/// What the VMM thread calls here, beyond what reading files needs.
pub const SYSCALLS: &[Allow] = &[
    // The threads of this process.
    allow!(getdents64),
    allow!(mkdirat, 0 => Test::Is(libc::AT_FDCWD as u32)),
    allow!(
        unlinkat,
        0 => Test::Is(libc::AT_FDCWD as u32),
        2 => Test::Is(libc::AT_REMOVEDIR as u32),
    ),
];

const HALVES: [&str; 2] = ["vcpus", "io"];
/// A process that is beginning or ending a thread is looked through again.
const ROUNDS: u32 = 8;
/// A thread that was joined may be a moment from gone.
const REMOVAL_TRIES: u32 = 100;

/// What the configuration asks of the cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuLimits {
    /// Against the cgroups beside it.
    pub weight: Option<u32>,
    /// Of the vCPUs.
    pub max: Option<CpuMax>,
}

impl CpuLimits {
    /// What `config` asks for.
    pub fn of(config: Option<&OvercommitConfig>) -> Self {
        config.map_or_else(Self::default, |config| Self {
            weight: config.cpu_weight,
            max: config.cpu_max,
        })
    }

    /// Whether a cgroup is needed at all.
    pub fn any(&self) -> bool {
        self.weight.is_some() || self.max.is_some()
    }

    /// The field to blame when there is no cgroup.
    fn field(&self) -> &'static str {
        if self.weight.is_some() {
            "cpu_weight"
        } else {
            "cpu_max"
        }
    }
}

/// Checks that `limits` could be kept here, and changes nothing. Fields are named as seen from
/// `overcommit`.
pub fn check(limits: CpuLimits) -> Result<(), Invalid> {
    if !limits.any() {
        return Ok(());
    }
    let refuse = |reason| Invalid::new(limits.field(), reason);
    let directory = find(Path::new("/proc/self"), std::process::id()).map_err(refuse)?;
    let mut needed = vec!["cgroup.subtree_control", "cgroup.threads"];
    if limits.weight.is_some() {
        needed.push("cpu.weight");
    }
    for name in needed {
        let path = directory.join(name);
        OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|e| refuse(format!("{} can't be written: {e}", path.display())))?;
    }
    Ok(())
}

/// The directory of the cgroup that the process has for itself; or why there is none.
fn find(process: &Path, pid: u32) -> Result<PathBuf, String> {
    let lacking = |reason: String| {
        format!("needs a cgroup (v2) that this process has for itself and may write to: {reason}")
    };
    let mut cgroup = cgroup::locate(process, pid).map_err(lacking)?;
    if cgroup.shared.is_some() && sweep(&cgroup.directory, pid) {
        cgroup = cgroup::locate(process, pid).map_err(lacking)?;
    }
    if let Some(reason) = cgroup.shared {
        return Err(lacking(reason));
    }
    let kind = files::read(&cgroup.directory.join("cgroup.type")).map_err(lacking)?;
    if !matches!(kind.trim(), "domain" | "domain threaded") {
        return Err(lacking(format!("{} is `{}`", cgroup.path, kind.trim())));
    }
    let has = files::read(&cgroup.directory.join("cgroup.controllers")).map_err(lacking)?;
    if !has.split_whitespace().any(|controller| controller == "cpu") {
        let path = &cgroup.path;
        return Err(lacking(format!("{path} has no `cpu` controller")));
    }
    Ok(cgroup.directory)
}

/// Removes the half-made halves of a VMM that was killed while it made them: they look like
/// somebody else's cgroups. False where the process has company, and so no say.
fn sweep(directory: &Path, pid: u32) -> bool {
    let alone = files::read(&directory.join("cgroup.procs"))
        .is_ok_and(|text| text.lines().all(|line| line.trim().parse() == Ok(pid)));
    // The root, and with it everybody's, has no type.
    if !alone || !directory.join("cgroup.type").exists() {
        return false;
    }
    let remove = |half| {
        // Only an empty one can be removed.
        rustix::fs::unlinkat(CWD, directory.join(half), AtFlags::REMOVEDIR).is_ok()
    };
    HALVES.map(remove).contains(&true)
}

/// The cgroup with the two halves in it. Dropping it makes it what it was.
pub struct CpuGroup {
    directory: PathBuf,
    /// What cpu.weight said before.
    weight_before: Option<u64>,
    limits: CpuLimits,
}

impl CpuGroup {
    /// Parts the threads of this process, of which `vcpus` are the vCPUs', and sets `limits`.
    /// Called on the VMM thread, which spawns all others, so that none are missed. On failure all
    /// is as it was.
    pub fn new(limits: CpuLimits, vcpus: &[u32]) -> Result<Self, Invalid> {
        let refuse = |reason| Invalid::new(limits.field(), reason);
        let directory = find(Path::new("/proc/self"), std::process::id()).map_err(refuse)?;
        let mut group = Self {
            weight_before: files::number(&directory.join("cpu.weight")).ok(),
            directory,
            limits: CpuLimits::default(),
        };
        // From here on a drop undoes what was done.
        group.part(vcpus).map_err(refuse)?;
        group.set(limits)?;
        Ok(group)
    }

    /// Changes the limits; on failure they stay what they were.
    pub fn set(&mut self, limits: CpuLimits) -> Result<(), Invalid> {
        let before = self.limits;
        if limits == before {
            return Ok(());
        }
        // A weight counts as set from here on, as it may be when what follows it is refused.
        self.limits = CpuLimits {
            weight: limits.weight.or(before.weight),
            ..limits
        };
        let result = self.write_limits(limits);
        if result.is_ok() {
            self.limits = limits;
            return result;
        }
        match self.write_limits(before) {
            Ok(()) => self.limits = before,
            Err(error) => tracing::error!(%error, "the cgroup's limits could not be set back"),
        }
        result
    }

    fn write_limits(&self, limits: CpuLimits) -> Result<(), Invalid> {
        let weight = limits.weight.map(u64::from).or(self.weight_before);
        let weighs = |l: CpuLimits| l.weight.is_some();
        if (weighs(limits) || weighs(self.limits))
            && let Some(weight) = weight
        {
            self.write("cpu.weight", &weight.to_string())
                .map_err(|reason| Invalid::new("cpu_weight", reason))?;
        }
        let refuse = |reason| Invalid::new("cpu_max", reason);
        let (quota, period, burst) = match limits.max {
            None => ("max".to_owned(), CpuMax::PERIOD_US, 0),
            Some(max) => (max.quota_us.to_string(), max.period_us, max.burst()),
        };
        // A burst may never be above the quota, not even on the way.
        let bursts = self.directory.join("vcpus/cpu.max.burst").exists();
        if bursts {
            self.write("vcpus/cpu.max.burst", "0").map_err(refuse)?;
        } else if burst != 0 {
            return Err(Invalid::new(
                "cpu_max.burst_us",
                "this host's kernel has no cpu.max.burst (Linux 5.14); give 0",
            ));
        }
        self.write("vcpus/cpu.max", &format!("{quota} {period}"))
            .map_err(refuse)?;
        if burst != 0 {
            self.write("vcpus/cpu.max.burst", &burst.to_string())
                .map_err(|reason| Invalid::new("cpu_max.burst_us", reason))?;
        }
        Ok(())
    }

    /// Makes the two halves, and moves each thread into its own.
    fn part(&self, vcpus: &[u32]) -> Result<(), String> {
        for half in HALVES {
            let path = self.directory.join(half);
            match rustix::fs::mkdirat(CWD, &path, Mode::RWXU | Mode::RGRP | Mode::XGRP) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(format!("{}: {error}", path.display())),
            }
            // Written to a threaded one, too, it is refused only where it can't be.
            if files::read(&path.join("cgroup.type"))?.trim() != "threaded" {
                self.write(&format!("{half}/cgroup.type"), "threaded")?;
            }
        }
        self.write("cgroup.subtree_control", "+cpu")?;
        self.move_threads(|id| if vcpus.contains(&id) { "vcpus" } else { "io" })
    }

    /// Moves every thread of this process to the half, or to the whole (`.`), that `place` names.
    fn move_threads(&self, place: impl Fn(u32) -> &'static str) -> Result<(), String> {
        for _ in 0..ROUNDS {
            let mut moved = false;
            for id in threads()? {
                let target = self.directory.join(place(id));
                let there = files::read(&target.join("cgroup.threads"))?;
                if there.lines().any(|line| line.trim().parse() == Ok(id)) {
                    continue;
                }
                match write(&target.join("cgroup.threads"), &id.to_string()) {
                    Ok(()) => moved = true,
                    // It has ended; or it is one of the kernel's own, which stays with its maker.
                    Err(error)
                        if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {}
                    Err(error) => return Err(format!("{}: {error}", target.display())),
                }
            }
            if !moved {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), String> {
        let path = self.directory.join(name);
        write(&path, text).map_err(|e| format!("{} can't be set to {text}: {e}", path.display()))
    }

    fn undo(&self) -> Result<(), String> {
        self.move_threads(|_| ".")?;
        if self.limits.weight.is_some()
            && let Some(weight) = self.weight_before
        {
            self.write("cpu.weight", &weight.to_string())?;
        }
        self.write("cgroup.subtree_control", "-cpu")?;
        for half in HALVES {
            let path = self.directory.join(half);
            let mut tries = 0..REMOVAL_TRIES;
            loop {
                match rustix::fs::unlinkat(CWD, &path, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(rustix::io::Errno::NOENT) => break,
                    Err(rustix::io::Errno::BUSY) if tries.next().is_some() => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => return Err(format!("{}: {error}", path.display())),
                }
            }
        }
        Ok(())
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            // The next VM in this cgroup takes over what is left.
            tracing::warn!(%error, "the halves of the cgroup could not be removed");
        }
    }
}

/// The threads of this process.
fn threads() -> Result<Vec<u32>, String> {
    let entries = fs::read_dir("/proc/self/task").map_err(|e| format!("/proc/self/task: {e}"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A /proc/self whose cgroup is a directory of plain files.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        let group = host.path().join("groups/vm1");
        fs::create_dir_all(&group).unwrap();
        let mount = format!(
            "41 31 0:38 / {}/groups rw shared:9 - cgroup2 cgroup2 rw\n",
            host.path().display()
        );
        fs::write(host.path().join("mountinfo"), mount).unwrap();
        fs::write(host.path().join("cgroup"), "0::/vm1\n").unwrap();
        for (name, text) in [
            ("cgroup.type", "domain\n"),
            ("cgroup.procs", "100\n"),
            ("cgroup.stat", "nr_descendants 0\n"),
            ("cgroup.controllers", "cpuset cpu io\n"),
        ]
        .iter()
        .chain(files)
        {
            fs::write(group.join(name), text).unwrap();
        }
        host
    }

    #[test]
    fn a_cgroup_is_ours_when_it_has_the_controller_and_nobody_else() {
        assert!(find(host(&[]).path(), 100).unwrap().ends_with("groups/vm1"));
        for (file, text, reason) in [
            ("cgroup.procs", "100\n101\n", "1 other process"),
            ("cgroup.stat", "nr_descendants 1\n", "below it"),
            ("cgroup.controllers", "cpuset io cpuacct\n", "no `cpu`"),
            ("cgroup.type", "domain invalid\n", "domain invalid"),
        ] {
            let error = find(host(&[(file, text)]).path(), 100).unwrap_err();
            assert!(error.contains(reason), "{file}: {error}");
            assert!(error.contains("needs a cgroup"), "{error}");
        }
    }

    #[test]
    fn only_empty_halves_of_our_own_are_swept_away() {
        let host = host(&[("cgroup.stat", "nr_descendants 2\n")]);
        let group = host.path().join("groups/vm1");
        fs::create_dir_all(group.join("vcpus")).unwrap();
        fs::create_dir_all(group.join("io/busy")).unwrap();
        fs::create_dir_all(group.join("other")).unwrap();
        find(host.path(), 100).unwrap_err();
        assert!(!group.join("vcpus").exists());
        assert!(group.join("io").exists() && group.join("other").exists());
        // With company, nothing is ours.
        fs::create_dir_all(group.join("vcpus")).unwrap();
        fs::write(group.join("cgroup.procs"), "100\n7\n").unwrap();
        find(host.path(), 100).unwrap_err();
        assert!(group.join("vcpus").exists());
    }

    #[test]
    fn limits_that_are_refused_leave_those_that_were() {
        let host = host(&[("cpu.weight", "100")]);
        let directory = host.path().join("groups/vm1");
        fs::create_dir(directory.join("vcpus")).unwrap();
        fs::write(directory.join("vcpus/cpu.max"), "max 100000").unwrap();
        let mut group = CpuGroup {
            directory: directory.clone(),
            weight_before: Some(100),
            limits: CpuLimits::default(),
        };
        let weight = || fs::read_to_string(directory.join("cpu.weight")).unwrap();
        // A burst, where the kernel has none, is refused when the weight has been written.
        let refused = CpuLimits {
            weight: Some(200),
            max: Some(CpuMax {
                quota_us: 5000,
                period_us: 100_000,
                burst_us: Some(1000),
            }),
        };
        assert_eq!(group.set(refused).unwrap_err().field, "cpu_max.burst_us");
        assert_eq!(
            (weight().as_str(), group.limits),
            ("100", CpuLimits::default())
        );
        let weighs = CpuLimits {
            weight: Some(300),
            max: None,
        };
        group.set(weighs).unwrap();
        assert_eq!(group.set(refused).unwrap_err().field, "cpu_max.burst_us");
        assert_eq!((weight().as_str(), group.limits), ("300", weighs));
        // They can't be lifted either, and are not taken for lifted.
        fs::remove_file(directory.join("vcpus/cpu.max")).unwrap();
        let stay = group.set(CpuLimits::default()).unwrap_err();
        assert_eq!(stay.field, "cpu_max");
        assert_eq!(weight(), "300");
        assert_eq!(group.limits.weight, Some(300));
    }

    #[test]
    fn what_is_asked_for_names_its_field_where_there_is_no_cgroup() {
        check(CpuLimits::default()).unwrap();
        let max = CpuMax {
            quota_us: 5000,
            period_us: 100_000,
            burst_us: None,
        };
        assert_eq!(max.burst(), 5000, "never above the quota");
        for (weight, max, field) in [
            (Some(1), None, "cpu_weight"),
            (None, Some(max), "cpu_max"),
            (Some(1), Some(max), "cpu_weight"),
        ] {
            // A test runs beside others, so never in a cgroup of its own.
            let error = check(CpuLimits { weight, max }).unwrap_err();
            assert_eq!(error.field, field, "{error}");
        }
    }
}
