use std::collections::BTreeMap;
use std::fs;

use devices::balloon::{Inhibited, State};
use proptest::prelude::*;

use super::*;
use crate::config::{MemoryConfig, OvercommitConfig};

const MIB: u64 = 1 << 20;

fn config(memory: MemoryConfig, overcommit: Option<OvercommitConfig>) -> VmConfig {
    let mut config: VmConfig = serde_json::from_str("{}").unwrap();
    config.memory = memory;
    config.overcommit = overcommit;
    config
}

fn balloon(target: u64, actual: u64) -> BalloonInfo {
    BalloonInfo {
        id: "b".to_owned(),
        target,
        actual,
        given: actual / 2,
        held_off: 0,
        retried: 0,
        state: State::InProgress,
        rate: 0,
        driver: true,
        inflated: 3,
        deflated: 2,
        pending: 0,
        inhibited_by: Vec::new(),
        reported_free: 1,
        inhibited: Inhibited::default(),
        ignored: 0,
        statistics: BTreeMap::new(),
    }
}

/// An observer of a process that only exists in a temporary directory.
struct Host {
    directory: tempfile::TempDir,
    observer: Observer,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        let host = Self {
            observer: Observer {
                process: root.join("self"),
                pressure: root.join("pressure"),
                pid: 100,
                cost: Cached::default(),
                disks: storage::Cached::default(),
            },
            directory,
        };
        host.file(
            "self/smaps_rollup",
            "Pss_Anon: 1024 kB\nPss_File: 8 kB\nPss_Shmem: 0 kB\nAnonHugePages: 256 kB\nSwap: 0 kB\n",
        );
        host.file("self/status", "Threads:\t6\n");
        host
    }

    fn file(&self, name: &str, text: &str) {
        let path = self.directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn view(&mut self, config: &VmConfig, balloons: &[BalloonInfo], threads: &[u32]) -> View {
        self.observer.forget();
        self.observer.view(&Subject {
            config,
            balloons,
            disks: &Seen::default(),
            vcpu_threads: threads,
            shared_ram: SharedRam::default(),
        })
    }
}

#[test]
fn promises_come_from_the_configuration_and_balloons_are_added_up() {
    let mut host = Host::new();
    let memory = MemoryConfig::default();
    let view = host.view(&config(memory.clone(), None), &[], &[]);
    assert_eq!((view.promised, view.guaranteed), (512 * MIB, 512 * MIB));
    assert_eq!(view.mode, OvercommitMode::Off);
    let overcommit = OvercommitConfig {
        mode: OvercommitMode::Auto,
        guaranteed_size: Some(160 * MIB),
        ..OvercommitConfig::default()
    };
    let balloons = [balloon(10, 20), balloon(u64::MAX, 1)];
    let view = host.view(&config(memory, Some(overcommit)), &balloons, &[]);
    assert_eq!(
        (view.mode, view.guaranteed),
        (OvercommitMode::Auto, 160 * MIB)
    );
    let totals = view.balloons;
    assert_eq!(
        (totals.count, totals.target, totals.actual, totals.given),
        (2, u64::MAX, 21, 10)
    );
    assert_eq!(
        (totals.inflated, totals.deflated, totals.reported_free),
        (6, 4, 2)
    );
}

#[test]
fn memory_that_is_not_in_huge_pages_is_lost_where_they_are_wanted() {
    let mut host = Host::new();
    let view = host.view(&config(MemoryConfig::default(), None), &[], &[]);
    assert_eq!(view.huge_pages.huge, Some(256 << 10));
    assert_eq!(view.huge_pages.lost, Some(768 << 10));
    for memory in [
        MemoryConfig {
            thp: false,
            ..MemoryConfig::default()
        },
        MemoryConfig {
            shared: true,
            ..MemoryConfig::default()
        },
        MemoryConfig {
            hugepages: true,
            ..MemoryConfig::default()
        },
    ] {
        let view = host.view(&config(memory, None), &[], &[]);
        assert!(!view.huge_pages.wanted);
        assert_eq!(view.huge_pages.lost, None);
    }
}

#[test]
fn what_can_not_be_read_is_absent_and_says_why() {
    let mut host = Host::new();
    let view = host.view(&config(MemoryConfig::default(), None), &[], &[7]);
    assert!(view.cost.unwrap().no_cgroup.unwrap().contains("cgroup"));
    assert!(view.ksm.unavailable.unwrap().contains("ksm_stat"));
    assert_eq!(view.vcpus[0].run_ns, None);
    assert!(
        view.vcpus[0]
            .unavailable
            .as_ref()
            .unwrap()
            .contains("7/schedstat")
    );
    assert!(
        view.pressure
            .host
            .unavailable
            .unwrap()
            .contains("pressure/cpu")
    );
    assert!(view.pressure.cgroup.unavailable.is_some());
    fs::remove_file(host.directory.path().join("self/smaps_rollup")).unwrap();
    let view = host.view(&config(MemoryConfig::default(), None), &[], &[]);
    assert_eq!(view.cost, None);
    assert!(view.cost_unavailable.unwrap().contains("smaps_rollup"));
    assert_eq!((view.huge_pages.huge, view.huge_pages.lost), (None, None));
}

#[test]
fn pressure_and_times_of_the_own_cgroup_and_threads_are_read() {
    let mut host = Host::new();
    let line = |n| format!("some avg10={n}.00 avg60=0.00 avg300=0.00 total={n}\n");
    host.file("pressure/cpu", &line(1));
    host.file("pressure/memory", &line(2));
    host.file("self/task/7/schedstat", "1000 20 3\n");
    let groups = host.directory.path().join("groups");
    host.file("self/cgroup", "0::/vm\n");
    host.file(
        "self/mountinfo",
        &format!("1 2 0:3 / {} rw - cgroup2 cgroup2 rw\n", groups.display()),
    );
    host.file("groups/vm/cgroup.procs", "100\n");
    host.file("groups/vm/cgroup.type", "domain\n");
    host.file("groups/vm/cgroup.stat", "nr_descendants 0\n");
    host.file("groups/vm/memory.pressure", &line(3));
    let view = host.view(&config(MemoryConfig::default(), None), &[], &[7]);
    assert_eq!(view.pressure.host.cpu.unwrap().some.avg10, 1.0);
    assert_eq!(view.pressure.host.memory.unwrap().some.total_us, 2);
    assert_eq!(view.pressure.host.io, None);
    assert!(
        view.pressure
            .host
            .unavailable
            .unwrap()
            .contains("pressure/io")
    );
    assert_eq!(view.pressure.cgroup.memory.unwrap().some.total_us, 3);
    assert_eq!(
        (view.vcpus[0].run_ns, view.vcpus[0].run_delay_ns),
        (Some(1000), Some(20))
    );
    assert_eq!(view.vcpus[0].vcpu, 0);
}

#[test]
fn the_process_that_we_are_is_seen() {
    let config = config(MemoryConfig::default(), None);
    // The kernel writes a thread's time down when it stops running.
    std::thread::sleep(Duration::from_millis(1));
    let mut observer = Observer::default();
    let thread = rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .unsigned_abs();
    let view = observer.view(&Subject {
        config: &config,
        balloons: &[],
        disks: &Seen::default(),
        vcpu_threads: &[thread],
        shared_ram: SharedRam::default(),
    });
    assert!(view.cost.unwrap().resident > 0);
    assert!(view.vcpus[0].run_ns.unwrap() > 0);
}

proptest! {
    #[test]
    fn no_text_is_too_odd(text in any::<String>()) {
        let _ = parse_schedstat(&text);
    }
}
