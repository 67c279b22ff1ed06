//! CPU time: who gets how much where guests want more than there is. These tests need a cgroup v2
//! hierarchy with the `cpu` controller, and the right to make cgroups in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::ballast::{Ballast, Launch, binary};
use crate::support::eventually;
use crate::vm::{Vm, set_vcpus};

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup for one process, removed when dropped.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.subtree_control"));
        let controllers = controllers.expect("cgroup v2 at /sys/fs/cgroup");
        assert!(
            controllers.split_whitespace().any(|c| c == "cpu"),
            "cgroups have no `cpu` controller: {controllers}"
        );
        let path = Path::new(ROOT).join(format!("ballast-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("this test must be root, to make a cgroup");
        Self(path)
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    /// Microseconds of CPU time that all in it have used.
    fn usage_us(&self) -> u64 {
        let stat = self.read("cpu.stat");
        let usage = stat.lines().find_map(|l| l.strip_prefix("usage_usec "));
        usage.expect("usage_usec in cpu.stat").parse().unwrap()
    }

    fn has_halves(&self) -> bool {
        self.0.join("vcpus").exists() || self.0.join("io").exists()
    }

    /// The binary, started inside.
    fn launch(&self) -> Launch {
        let mut launch = Launch::of(Path::new("/bin/sh"));
        let socket = launch.path("api.sock");
        launch
            .command()
            .args(["-c", "echo 0 >\"$0/cgroup.procs\" && exec \"$@\""])
            .arg(&self.0)
            .arg(binary())
            .arg("--api-socket")
            .arg(socket);
        launch
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for part in ["vcpus", "io", ""] {
            let path = self.0.join(part);
            for _ in 0..100 {
                if fs::remove_dir(&path).is_ok() || !path.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Names of the process's threads in a cgroup.
fn names(ballast: &Ballast, group: &Group, part: &str) -> Vec<String> {
    let threads = group.read(&format!("{part}/cgroup.threads"));
    let name = |thread: &str| {
        let comm = format!("/proc/{}/task/{thread}/comm", ballast.pid());
        Some(fs::read_to_string(comm).ok()?.trim().to_owned())
    };
    threads.lines().filter_map(name).collect()
}

#[test]
fn a_vms_cgroup_is_parted_limited_changed_and_left_as_it_was() {
    let group = Group::new("parted");
    let mut ballast = group.launch().start();
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["cpus"] = json!({"boot_vcpus": 4, "max_vcpus": 4});
    config["overcommit"] = json!({
        "cpu_weight": 300,
        "cpu_max": {"quota_us": 50_000, "period_us": 20_000},
    });
    client.put_json("vm.create", &config);
    assert!(!group.has_halves(), "vm.create changes nothing");
    client.put("vm.boot");
    assert_eq!(group.read("cpu.weight").trim(), "300");
    assert_eq!(group.read("vcpus/cpu.max").trim(), "50000 20000");
    assert_eq!(group.read("vcpus/cpu.max.burst").trim(), "20000");
    assert_eq!(group.read("io/cpu.max").split(' ').next(), Some("max"));
    let mut vcpus = names(&ballast, &group, "vcpus");
    vcpus.sort();
    assert_eq!(vcpus, ["vcpu0", "vcpu1", "vcpu2", "vcpu3"]);
    // Workers of KVM's own, on older kernels, are none of ours to part.
    let left: Vec<String> = names(&ballast, &group, ".");
    assert!(left.is_empty(), "not parted: {left:?}");
    // A device that comes later is on the right side, too.
    let before = names(&ballast, &group, "io").len();
    let balloon = json!({"size": 0});
    client.put_json("vm.add-balloon", &balloon);
    assert!(names(&ballast, &group, "io").len() > before);
    assert_eq!(names(&ballast, &group, "vcpus").len(), 4);
    client.put("vm.reboot");
    assert_eq!(group.read("vcpus/cpu.max").trim(), "50000 20000");
    // Changed while it runs: lifted, set, and refused as a whole.
    client.put_json("vm.set-overcommit", &json!({}));
    assert!(!group.has_halves(), "no limit, no halves");
    assert_eq!(group.read("cpu.weight").trim(), "100");
    let policy = json!({"cpu_weight": 500, "cpu_max": {"quota_us": 5000, "burst_us": 0}});
    client.put_json("vm.set-overcommit", &policy);
    assert_eq!(group.read("cpu.weight").trim(), "500");
    assert_eq!(group.read("vcpus/cpu.max").trim(), "5000 100000");
    assert_eq!(group.read("vcpus/cpu.max.burst").trim(), "0");
    assert_eq!(names(&ballast, &group, "vcpus").len(), 4);
    let wrong = json!({"cpu_weight": 700, "cpu_max": {"quota_us": 5000, "burst_us": 6000}});
    let answer = client.try_put_json("vm.set-overcommit", &wrong);
    let answer = answer.expect_refusal("a burst beyond the quota");
    assert!(answer.text().contains("cpu_max.burst_us"));
    assert_eq!(group.read("cpu.weight").trim(), "500");
    let policy = json!({"cpu_weight": 300, "cpu_max": {"quota_us": 2000, "burst_us": 2000}});
    client.put_json("vm.set-overcommit", &policy);
    assert_eq!(group.read("vcpus/cpu.max").trim(), "2000 100000");
    assert_eq!(group.read("vcpus/cpu.max.burst").trim(), "2000");
    client.put("vm.shutdown");
    assert!(!group.has_halves(), "the halves go with the machine");
    assert_eq!(group.read("cpu.weight").trim(), "100");
    assert_eq!(group.read("cgroup.type").trim(), "domain");
    ballast.assert_well();
    // Killed, it can't tidy up; the next one takes over what is left.
    client.put("vm.boot");
    drop(client);
    ballast.kill();
    eventually("the threads are gone", || {
        group.read("cgroup.procs").trim().is_empty().then_some(())
    });
    assert!(group.has_halves());
    let ballast = group.launch().start();
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["overcommit"] = json!({"cpu_weight": 200});
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    assert_eq!(group.read("cpu.weight").trim(), "200");
    assert_eq!(names(&ballast, &group, "vcpus"), ["vcpu0"]);
    assert!(group.read("vcpus/cpu.max").starts_with("max"));
    client.put("vm.delete");
    assert!(!group.has_halves());
}

#[test]
fn a_cgroup_with_somebody_else_in_it_is_not_the_vms_own() {
    let group = Group::new("shared");
    let other = group.launch().start();
    let ballast = group.launch().start();
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["overcommit"] = json!({"cpu_weight": 300});
    let answer = client.try_put_json("vm.create", &config);
    let answer = answer.expect_refusal("a shared cgroup");
    assert!(answer.text().contains("overcommit.cpu_weight"));
    drop(other);
    eventually("the other is gone", || {
        (client.try_put_json("vm.create", &config).status == 204).then_some(())
    });
    client.put("vm.boot");
    assert_eq!(group.read("cpu.weight").trim(), "300");
}

#[test]
fn guests_that_want_more_cpu_than_there_is_share_it_by_weight() {
    const WEIGHTS: [u64; 2] = [100, 300];
    let guests = WEIGHTS.map(|weight| {
        let group = Group::new(&format!("weight{weight}"));
        let vm = Vm::start(group.launch(), |config, _| {
            set_vcpus(config, 8);
            config["cpus"]["halt_poll_ns"] = json!(0);
            config["overcommit"] = json!({"cpu_weight": weight});
        });
        vm.agent.wait_ready();
        (vm, group)
    });
    for (vm, _) in &guests {
        assert_eq!(vm.agent.number("nproc"), 8);
        vm.agent
            .ok("for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done >/dev/null 2>&1");
    }
    let usage = || [0, 1].map(|guest: usize| guests[guest].1.usage_us());
    let before = usage();
    let start = Instant::now();
    // As much as makes a slice of the scheduler small; how long that takes is not judged.
    let used = eventually("ten seconds of CPU time are used", || {
        let now = usage();
        let used = [now[0] - before[0], now[1] - before[1]];
        (used[0] + used[1] > 10_000_000).then_some(used)
    });
    let share = used[1] as f64 / (used[0] + used[1]) as f64;
    let wanted = WEIGHTS[1] as f64 / (WEIGHTS[0] + WEIGHTS[1]) as f64;
    println!(
        "weights 1:3, 8 vCPUs each: {used:?} µs of CPU time in {:.1} s, share {share:.3}, \
         wanted {wanted:.3}",
        start.elapsed().as_secs_f64()
    );
    assert!(
        (share - wanted).abs() <= 0.15 * wanted,
        "{used:?}: the heavier guest has {share:.3} of the time"
    );
    // What a guest did not get, it sees as stolen.
    for (vm, _) in &guests {
        let stolen = vm.agent.number("awk '/^cpu / {print $9}' /proc/stat");
        assert!(stolen > 0, "no steal time in the guest");
    }
}
