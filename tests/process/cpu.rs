//! Where vCPU threads run and what they are given, as the host's kernel tells it.

use std::fs;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{
    CoreSchedulingScope, CpuSet, core_scheduling_cookie, create_core_scheduling_cookie, gettid,
    sched_getaffinity,
};
use serde_json::{Value, json};

use super::{assert_never_boots, before};
use crate::support::ballast::{Ballast, Launch};

/// The process's vCPU threads: number and thread id.
fn vcpu_threads(ballast: &Ballast) -> Vec<(u32, i32)> {
    let tasks = format!("/proc/{}/task", ballast.pid());
    let mut threads: Vec<_> = fs::read_dir(&tasks)
        .unwrap()
        .flatten()
        .filter_map(|task| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            let number = name.trim().strip_prefix("vcpu")?.parse().ok()?;
            Some((number, task.file_name().to_str()?.parse().ok()?))
        })
        .collect();
    threads.sort_unstable();
    threads
}

fn with_cpus(ballast: &Ballast, cpus: Value) -> Value {
    let mut config = ballast.sleeper();
    config["cpus"] = cpus;
    config
}

/// A CPU that we may use.
fn a_cpu() -> usize {
    let ours = sched_getaffinity(None).unwrap();
    (0..CpuSet::MAX_CPU).find(|cpu| ours.is_set(*cpu)).unwrap()
}

/// Sends it to `vm.create`, which must blame this field and change nothing.
#[track_caller]
fn assert_blames(ballast: &mut Ballast, config: &Value, field: &str) {
    let mut client = ballast.api();
    let before = before(ballast, &mut client);
    let answer = client.try_put_json("vm.create", config);
    let answer = answer.expect_refusal(field);
    let text = answer.text();
    assert!(text.contains(field), "names `{field}`: {text}");
    before.assert_unchanged(ballast, &mut client, field);
}

#[test]
fn each_vcpu_runs_on_the_cpus_it_is_given_and_nobody_else_does() {
    let mut ballast = Ballast::start();
    let all = sched_getaffinity(None).unwrap();
    let cpu = a_cpu();
    let affinity = json!([{"vcpu": 1, "host_cpus": [cpu]}]);
    let cpus = json!({"boot_vcpus": 2, "max_vcpus": 2, "affinity": affinity});
    let config = with_cpus(&ballast, cpus);
    let mut client = ballast.api();
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    let threads = vcpu_threads(&ballast);
    assert_eq!(threads.len(), 2);
    for (vcpu, thread) in threads {
        let runs_on = sched_getaffinity(Pid::from_raw(thread)).unwrap();
        if vcpu == 1 {
            assert_eq!((runs_on.count(), runs_on.is_set(cpu)), (1, true));
        } else {
            assert_eq!(runs_on, all, "vcpu{vcpu} was not named");
        }
    }
    let main = Pid::from_raw(ballast.pid().cast_signed());
    assert_eq!(sched_getaffinity(main).unwrap(), all);
    let info = client.get("vm.info");
    assert_eq!(info["config"]["cpus"]["affinity"], affinity);
    client.put("vm.delete");
    ballast.assert_well();
}

#[test]
fn cpus_that_can_not_be_had_are_refused_by_field() {
    let mut ballast = Ballast::start();
    let cpu = a_cpu();
    for (affinity, field) in [
        (json!([{"vcpu": 0, "host_cpus": [1023]}]), "[0].host_cpus"),
        (
            json!([{"vcpu": 0, "host_cpus": [cpu, 1022]}]),
            "[0].host_cpus",
        ),
        (
            json!([{"vcpu": 0, "host_cpus": [u64::MAX]}]),
            "[0].host_cpus",
        ),
        (json!([{"vcpu": 0, "host_cpus": []}]), "[0].host_cpus"),
        (
            json!([{"vcpu": 0, "host_cpus": [cpu, cpu]}]),
            "[0].host_cpus",
        ),
        (json!([{"vcpu": 2, "host_cpus": [cpu]}]), "[0].vcpu"),
        (
            json!([{"vcpu": 1, "host_cpus": [cpu]}, {"vcpu": 1, "host_cpus": [cpu]}]),
            "[1].vcpu",
        ),
        (json!([{"vcpu": 0}]), "affinity"),
        (json!([{"vcpu": 0, "host_cpus": [-1]}]), "affinity"),
        (json!([{"vcpu": -1, "host_cpus": [cpu]}]), "affinity"),
        (json!({"0": [cpu]}), "affinity"),
    ] {
        let cpus = json!({"boot_vcpus": 2, "max_vcpus": 2, "affinity": affinity});
        let config = with_cpus(&ballast, cpus);
        assert_blames(&mut ballast, &config, field);
    }
}

#[test]
fn more_vcpus_than_host_cpus_are_one_line_of_the_log() {
    let mut launch = Launch::new();
    launch.command().arg("-v");
    let mut ballast = launch.start();
    let config = with_cpus(&ballast, json!({"boot_vcpus": 64, "max_vcpus": 64}));
    assert!(
        sched_getaffinity(None).unwrap().count() < 64,
        "64 host CPUs"
    );
    let mut client = ballast.api();
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    assert_eq!(vcpu_threads(&ballast).len(), 64);
    let log = ballast.stderr();
    let lines = log.lines().filter(|line| line.contains("host CPUs"));
    assert_eq!(lines.count(), 1, "{log}");
    assert!(!log.contains("WARN"), "{log}");
    client.put("vm.delete");
    ballast.assert_well();
}

#[test]
fn halt_polling_is_limited_inside_the_filter() {
    let mut ballast = Ballast::start();
    for halt_poll_ns in [0, 50_000, 1_000_000_000] {
        let cpus = json!({"boot_vcpus": 1, "max_vcpus": 1, "halt_poll_ns": halt_poll_ns});
        let config = with_cpus(&ballast, cpus);
        let mut client = ballast.api();
        client.put_json("vm.create", &config);
        client.put("vm.boot");
        let info = client.get("vm.info");
        assert_eq!(info["config"]["cpus"]["halt_poll_ns"], halt_poll_ns);
        client.put("vm.delete");
    }
    for halt_poll_ns in [json!(1_000_000_001), json!(-1), json!("0"), json!(0.5)] {
        let cpus = json!({"boot_vcpus": 1, "max_vcpus": 1, "halt_poll_ns": halt_poll_ns});
        let config = with_cpus(&ballast, cpus);
        assert_blames(&mut ballast, &config, "halt_poll_ns");
    }
}

/// Whether this kernel, on this CPU, can do it: it is asked.
fn core_scheduling_is_possible() -> bool {
    std::thread::spawn(|| {
        match create_core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread) {
            Ok(()) => true,
            Err(Errno::INVAL | Errno::NODEV) => false,
            Err(other) => panic!("{other}"),
        }
    })
    .join()
    .unwrap()
}

#[test]
fn core_scheduling_is_what_was_asked_for_or_refused() {
    let mut ballast = Ballast::start();
    let possible = core_scheduling_is_possible();
    for (wanted, cookies) in [("Vm", 1), ("Vcpu", 2), ("vcpu", 2)] {
        let cpus = json!({"boot_vcpus": 2, "max_vcpus": 2, "core_scheduling": wanted});
        let config = with_cpus(&ballast, cpus);
        if !possible {
            assert_blames(&mut ballast, &config, "cpus.core_scheduling");
            continue;
        }
        let mut client = ballast.api();
        client.put_json("vm.create", &config);
        client.put("vm.boot");
        let mut found: Vec<u64> = vcpu_threads(&ballast)
            .iter()
            .map(|(_, thread)| {
                let thread = Pid::from_raw(*thread).unwrap();
                core_scheduling_cookie(thread, CoreSchedulingScope::Thread).unwrap()
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), cookies, "{wanted}: {found:?}");
        assert!(!found.contains(&0), "{wanted}: a thread has no cookie");
        client.put("vm.delete");
    }
    let cpus = json!({"boot_vcpus": 1, "max_vcpus": 1, "core_scheduling": "Socket"});
    let config = with_cpus(&ballast, cpus);
    assert_never_boots(&mut ballast, "Socket", &config);
}

/// The process shares its cgroup with this test, or the host has none: no limit could be kept.
#[test]
fn limits_on_cpu_time_are_refused_where_the_process_has_no_cgroup_for_itself() {
    let mut ballast = Ballast::start();
    for (overcommit, field) in [
        (json!({"cpu_weight": 300}), "overcommit.cpu_weight"),
        (
            json!({"cpu_max": {"quota_us": 50000}}),
            "overcommit.cpu_max",
        ),
    ] {
        let mut config = ballast.sleeper();
        config["overcommit"] = overcommit;
        assert_blames(&mut ballast, &config, field);
        assert_never_boots(&mut ballast, field, &config);
    }
}
