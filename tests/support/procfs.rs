//! What /proc tells about a running process: descriptors, threads, filters, memory.

use std::fs;

use super::{PATIENCE, within};

/// What a process holds; leaks show as a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// What its descriptors point to, sorted; numbers in brackets left out.
    pub descriptors: Vec<String>,
    /// Names of its threads, sorted.
    pub threads: Vec<String>,
}

/// What the process holds now.
pub fn holdings(pid: u32) -> Holdings {
    let mut descriptors: Vec<String> = entries(&format!("/proc/{pid}/fd"))
        .iter()
        .filter_map(|fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok())
        .map(|target| {
            let target = target.to_string_lossy().into_owned();
            target.split(":[").next().unwrap_or_default().to_owned()
        })
        .collect();
    descriptors.sort();
    // io_uring's workers are the kernel's own, and come and go as it likes.
    let mut threads: Vec<String> = threads(pid)
        .into_iter()
        .map(|thread| thread.name)
        .filter(|name| !name.starts_with("iou-"))
        .collect();
    threads.sort();
    Holdings {
        descriptors,
        threads,
    }
}

/// Panics unless the process comes to hold what it held before (closing lags behind an answer).
#[track_caller]
pub fn assert_holds_again(pid: u32, before: &Holdings) {
    if within(PATIENCE / 4, || (holdings(pid) == *before).then_some(())).is_none() {
        assert_eq!(&holdings(pid), before, "something leaked");
    }
}

/// A thread as /proc shows it.
#[derive(Debug)]
pub struct Thread {
    /// Its name.
    pub name: String,
    /// Its seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u8,
}

/// All threads of a process.
pub fn threads(pid: u32) -> Vec<Thread> {
    entries(&format!("/proc/{pid}/task"))
        .iter()
        .filter_map(|tid| {
            let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
            let field = |name: &str| {
                status
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"))
            };
            Some(Thread {
                name: field("Name")?.to_owned(),
                seccomp: field("Seccomp")?.parse().ok()?,
            })
        })
        .collect()
}

/// Names and seccomp modes of all threads.
pub fn seccomp_modes(pid: u32) -> Vec<(String, u8)> {
    threads(pid)
        .into_iter()
        .map(|thread| (thread.name, thread.seccomp))
        .collect()
}

/// Bytes of resident memory.
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .unwrap_or_default()
        * 1024
}

fn entries(folder: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
