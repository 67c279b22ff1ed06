//! Traces: what a host and a guest did, second by second, and what the governor makes of it.
//!
//! The first line of a file that is no remark has the limits; the others have
//!
//! ```text
//!  ms  total available some full  used oom stalls reclaims faults  =>  target reason
//!      host: MiB, PSI in percent  guest: MiB, and totals               MiB
//! ```
//! The guest follows the balloon at `speed` MiB a second (0: at once), so that what was decided
//! shapes what is seen next. `BALLAST_UPDATE=1` writes down what is decided, to be read before it
//! is committed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::model::Vm;
use super::*;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/overcommit/governor/tests/traces")
}

fn limits_of(line: &str) -> (Limits, u64, u64) {
    let values: BTreeMap<&str, u64> = line
        .split_whitespace()
        .map(|field| field.split_once('=').expect("name=number"))
        .map(|(name, value)| (name, value.parse().expect("a number")))
        .collect();
    let mib = |name: &str| values[name] * MIB;
    let limits = Limits {
        ram: mib("ram"),
        guaranteed: mib("guaranteed"),
        max: mib("ram"),
        step: mib("step"),
        ..limits()
    };
    let speed = match values["speed"] {
        0 => u64::MAX,
        speed => speed * MIB,
    };
    (limits, mib("begin"), speed)
}

/// What is decided at each line of the trace, as its last columns have it.
fn replay(text: &str) -> (String, Vec<String>) {
    let mut vm: Option<Vm> = None;
    let mut written = String::new();
    let mut reasons = Vec::new();
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') {
            written += &format!("{line}\n");
            continue;
        }
        let Some(vm) = &mut vm else {
            let (limits, begin, speed) = limits_of(line);
            vm = Some(Vm {
                speed,
                ..Vm::new(limits, begin, 0)
            });
            written += &format!("{line}\n");
            continue;
        };
        let seen = line.split("=>").next().unwrap_or_default().trim_end();
        let number = |at: usize| -> f64 {
            let field = seen.split_whitespace().nth(at).expect("ten columns");
            field.parse().expect("a number")
        };
        let mib = |at: usize| (number(at) * MIB as f64) as u64;
        let percent = |at: usize| (number(at) * 100.0) as u32;
        let host = HostReading {
            total: mib(1),
            available: mib(2),
            pressure: Some(Pressure {
                some: percent(3),
                full: percent(4),
            }),
            cgroup_pressure: None,
        };
        vm.used = mib(5);
        let guest = GuestReading {
            at_ms: 0,
            available: 0,
            oom_kills: number(6) as u64,
            alloc_stalls: number(7) as u64,
            direct_reclaims: number(8) as u64,
            major_faults: number(9) as u64,
        };
        let decision = vm.see(number(0) as u64, host, guest);
        let reason = decision.trouble.unwrap_or(decision.reason).name();
        reasons.push(reason.to_owned());
        let target = decision.target / MIB;
        written += &format!("{seen} => {target} {reason}\n");
    }
    (written, reasons)
}

fn check(name: &str, must_happen: &[&str], must_not: &[&str]) {
    let path = folder().join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    let (written, reasons) = replay(&text);
    if std::env::var_os("BALLAST_UPDATE").is_some() {
        std::fs::write(&path, &written).unwrap();
    } else {
        assert_eq!(written, text, "{name}");
    }
    for reason in must_happen {
        assert!(reasons.iter().any(|r| r == reason), "{name}: {reason}");
    }
    for reason in must_not {
        assert!(!reasons.iter().any(|r| r == reason), "{name}: {reason}");
    }
}

#[test]
fn a_host_that_compiles_takes_from_the_guest_and_gives_it_back_once() {
    check(
        "host-compiles.txt",
        &["host-pressure"],
        &["guest-distress", "stalled"],
    );
}

#[test]
fn a_guest_that_bursts_while_it_is_small_has_its_memory_in_one_step() {
    check(
        "guest-bursts.txt",
        &["host-pressure", "guest-distress", "backing-off"],
        &[],
    );
}

#[test]
fn a_guest_out_of_puff_is_left_alone() {
    check(
        "out-of-puff.txt",
        &["host-pressure", "stalled", "backing-off"],
        &["guest-distress"],
    );
}

#[test]
fn a_guest_that_grows_slowly_is_given_what_it_needs_in_time() {
    check(
        "guest-grows.txt",
        &["guest-needs"],
        &["guest-distress", "stalled"],
    );
}
