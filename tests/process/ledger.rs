//! VMs that share a ledger: who is admitted, what is given back when, and what the host's view
//! shows.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Barrier;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm::overcommit::ledger::lineage::{Below, Lineage};
use vmm::overcommit::ledger::{Directory, Snapshot, overview};

use super::before;
use crate::support::ballast::{Ballast, Launch, binary};
use crate::support::eventually;
use crate::support::http::Client;

pub(super) const MIB: u64 = 1 << 20;
/// What a sleeper of 64 MiB has set aside: its RAM, and what its VMM is expected to need.
pub(super) const SLEEPER: u64 = 64 * MIB + 9 * MIB + MIB / 4;

/// A new ledger in which so many bytes can be guaranteed.
pub(super) fn ledger(room: u64) -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("ballast-ledger-")
        .tempdir_in("/tmp")
        .expect("a folder");
    leave(dir.path(), room);
    dir
}

/// Sets the reserve so that there is just this much room for guarantees.
pub(super) fn leave(dir: &Path, room: u64) {
    let host = overview::read(dir).expect("the ledger").host;
    let memory = host.cgroup_memory.unwrap_or(host.memory);
    let limits = format!("reserve = {}\n", memory - room);
    std::fs::write(dir.join("limits"), limits).expect("write the limits");
}

pub(super) fn launch(dir: &Path) -> Launch {
    Launch::new().arg("--overcommit-ledger").arg(dir)
}

pub(super) fn snapshot(dir: &Path) -> Snapshot {
    let directory = Directory::open(dir).expect("the ledger");
    directory.snapshot().expect("the ledger's records")
}

/// Bytes that are set aside for all who live.
fn guaranteed(dir: &Path) -> u64 {
    let records = snapshot(dir).records;
    records.iter().map(|(_, r)| r.reservation.fixed()).sum()
}

fn boot(client: &mut Client, config: &Value) -> u16 {
    client.put_json("vm.create", config);
    client.request("PUT", "vm.boot", None).status
}

#[test]
fn a_vm_that_does_not_fit_is_refused_with_the_numbers_and_nothing_changes() {
    let dir = ledger(SLEEPER + MIB);
    let mut first = launch(dir.path()).start();
    let mut second = launch(dir.path()).start();
    let (mut a, mut b) = (first.api(), second.api());
    b.put_json("vm.create", &second.sleeper());
    assert_eq!(boot(&mut a, &first.sleeper()), 204);
    assert_eq!(guaranteed(dir.path()), SLEEPER);

    // Configured while there was room, and booted when there is none.
    let before = before(&second, &mut b);
    let answer = b.request("PUT", "vm.boot", None).expect(507);
    for number in [64 * MIB, SLEEPER - 64 * MIB, SLEEPER] {
        let number = number.to_string();
        assert!(
            answer.text().contains(&number),
            "{number}: {}",
            answer.text()
        );
    }
    before.assert_unchanged(&mut second, &mut b, "a boot that is not admitted");
    b.put("vm.delete");
    let answer = b.try_put_json("vm.create", &second.sleeper()).expect(507);
    assert!(answer.text().contains("guarantee"), "{}", answer.text());
    b.request("GET", "vm.info", None).expect(404);

    // A part of it is guaranteed: that fits, whatever is promised.
    let mut config = second.sleeper();
    config["overcommit"] = json!({"guaranteed_size": 16 * MIB});
    b.try_put_json("vm.create", &config).expect(507);
    leave(dir.path(), 2 * SLEEPER - 48 * MIB);
    assert_eq!(boot(&mut b, &config), 204);
    assert_eq!(guaranteed(dir.path()), 2 * SLEEPER - 48 * MIB);
    first.assert_well();
}

#[test]
fn a_vm_whose_governor_drives_nothing_tells_so_at_once() {
    let dir = ledger(SLEEPER);
    let mut ballast = launch(dir.path()).start();
    let mut client = ballast.api();
    let off = json!({"mode": "off", "guaranteed_size": 32 * MIB});
    for (stop, body) in [("vm.pause", None), ("vm.set-overcommit", Some(off))] {
        let mut config = ballast.sleeper();
        config["balloon"] = json!({"size": 0});
        // After the first look the next one is far away.
        config["overcommit"] =
            json!({"mode": "auto", "guaranteed_size": 32 * MIB, "interval_ms": 60_000});
        assert_eq!(boot(&mut client, &config), 204);
        let measures = || snapshot(dir.path()).records[0].1.measures.clone();
        let looked = eventually("it looks", || measures().told_at_ms);
        std::thread::sleep(std::time::Duration::from_millis(5));
        match body {
            Some(body) => client.put_json(stop, &body),
            None => client.put(stop),
        };
        let rested = eventually("it tells that it rests", || {
            let measures = measures();
            (measures.told_at_ms > Some(looked)).then_some(measures)
        });
        assert_eq!(rested.claim, Some(0), "{stop}");
        // Nothing that was planned outlives the machine.
        client.put("vm.shutdown");
        assert_eq!((measures().claim, measures().told_at_ms), (None, None));
        client.put("vm.delete");
    }
    ballast.assert_well();
}

#[test]
fn what_was_set_aside_is_given_back_when_the_machine_goes_and_kept_while_it_boots_again() {
    let dir = ledger(SLEEPER);
    let mut ballast = launch(dir.path()).start();
    let mut client = ballast.api();
    assert_eq!(boot(&mut client, &ballast.sleeper()), 204);
    assert_eq!(guaranteed(dir.path()), SLEEPER);
    // The operator lets less be guaranteed from now on: what is there stays.
    leave(dir.path(), 0);
    client.put("vm.reboot");
    client.put("vm.pause");
    client.put("vm.resume");
    assert_eq!(guaranteed(dir.path()), SLEEPER);
    client.put("vm.shutdown");
    assert_eq!(guaranteed(dir.path()), 0);
    client.request("PUT", "vm.boot", None).expect(507);
    leave(dir.path(), SLEEPER);
    client.put("vm.boot");
    assert_eq!(guaranteed(dir.path()), SLEEPER);
    client.put("vm.delete");
    assert_eq!(guaranteed(dir.path()), 0);

    // A boot that fails for another reason gives back, too.
    let mut config = ballast.sleeper();
    let kernel = ballast.path("gone");
    std::fs::copy(config["payload"]["kernel"].as_str().unwrap(), &kernel).unwrap();
    config["payload"]["kernel"] = json!(kernel);
    client.put_json("vm.create", &config);
    std::fs::remove_file(&kernel).unwrap();
    assert_ne!(client.request("PUT", "vm.boot", None).status, 204);
    assert_eq!(guaranteed(dir.path()), 0);
    ballast.assert_well();

    ballast.signal(Signal::TERM);
    ballast.wait_for_clean_end();
    assert!(snapshot(dir.path()).records.is_empty());
    assert_eq!(snapshot(dir.path()).stale.len(), 0);
}

#[test]
fn a_larger_guarantee_of_a_vm_that_runs_is_admitted_or_refused_and_a_smaller_one_makes_room() {
    let small = SLEEPER - 48 * MIB;
    let dir = ledger(small + 8 * MIB);
    let mut ballast = launch(dir.path()).start();
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["overcommit"] = json!({"guaranteed_size": 16 * MIB});
    assert_eq!(boot(&mut client, &config), 204);
    let before = before(&ballast, &mut client);
    let set = "vm.set-overcommit";
    let guarantee = |mib: u64| json!({"guaranteed_size": mib * MIB});
    for mib in [25, 32, 64] {
        client.try_put_json(set, &guarantee(mib)).expect(507);
        before.assert_unchanged(&mut ballast, &mut client, "a guarantee that does not fit");
        assert_eq!(guaranteed(dir.path()), small);
    }
    client.try_put_json(set, &guarantee(65)).expect(400);
    assert_eq!(guaranteed(dir.path()), small);
    client.put_json(set, &guarantee(24));
    assert_eq!(guaranteed(dir.path()), small + 8 * MIB);
    client.put_json(set, &guarantee(8));
    assert_eq!(guaranteed(dir.path()), small - 8 * MIB);
}

#[test]
fn of_several_that_boot_at_the_same_moment_just_as_many_are_admitted_as_fit() {
    const VMS: usize = 5;
    let dir = ledger(2 * SLEEPER + MIB);
    let all: Vec<Ballast> = (0..VMS).map(|_| launch(dir.path()).start()).collect();
    for ballast in &all {
        ballast.api().put_json("vm.create", &ballast.sleeper());
    }
    for round in 0..10 {
        let start = Barrier::new(VMS);
        let statuses: Vec<u16> = std::thread::scope(|scope| {
            let threads: Vec<_> = all
                .iter()
                .map(|ballast| {
                    let start = &start;
                    scope.spawn(move || {
                        let mut client = ballast.api();
                        start.wait();
                        client.request("PUT", "vm.boot", None).status
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let admitted = statuses.iter().filter(|status| **status == 204).count();
        let refused = statuses.iter().filter(|status| **status == 507).count();
        assert_eq!(
            (admitted, refused),
            (2, VMS - 2),
            "round {round}: {statuses:?}"
        );
        assert_eq!(guaranteed(dir.path()), 2 * SLEEPER);
        for (ballast, status) in all.iter().zip(statuses) {
            if status == 204 {
                ballast.api().put("vm.shutdown");
            }
        }
    }
}

#[test]
fn the_dead_make_room_at_once_and_their_records_are_removed() {
    let dir = ledger(SLEEPER);
    let first = launch(dir.path()).start();
    assert_eq!(boot(&mut first.api(), &first.sleeper()), 204);
    let second = launch(dir.path()).start();
    let events = second.events();
    let mut client = second.api();
    client
        .try_put_json("vm.create", &second.sleeper())
        .expect(507);
    let mark = events.mark();
    drop(first.kill());
    assert_eq!(snapshot(dir.path()).stale.len(), 1);
    assert_eq!(boot(&mut client, &second.sleeper()), 204);
    events.wait_after(mark, "overcommit-record-removed", |_| true);
    let left = snapshot(dir.path());
    assert_eq!((left.stale.len(), left.records.len()), (0, 1));
    assert_eq!(left.records[0].1.pid, second.pid());
}

fn host_overcommit(arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(["host", "overcommit"]).args(arguments);
    command.output().expect("run ballast host")
}

#[test]
fn the_host_command_shows_all_vms_and_changes_nothing() {
    let dir = ledger(4 * SLEEPER);
    let path = dir.path().to_str().unwrap();
    let show = || -> Value {
        let output = host_overcommit(&["--ledger", path, "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let empty = show();
    assert_eq!(empty["vms"], json!([]));
    assert_eq!(empty["totals"]["promised"], 0);
    assert_eq!(empty["totals"]["free_for_guarantees"], 4 * SLEEPER);

    let running = launch(dir.path()).start();
    let mut config = running.sleeper();
    config["overcommit"] = json!({"guaranteed_size": 16 * MIB, "weight": 250});
    config["balloon"] = json!({"size": 0});
    let image = running.path("disk");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(8 * MIB)
        .unwrap();
    config["disks"] = json!([{"path": image}]);
    config["platform"] = json!({"system_uuid": "00112233-4455-6677-8899-aabbccddeeff"});
    assert_eq!(boot(&mut running.api(), &config), 204);
    let idle = launch(dir.path()).start();
    drop(launch(dir.path()).start().kill());
    let mut files: Vec<_> = names(dir.path());
    eventually("the record says that the VM runs", || {
        let shown = show();
        let vms = shown["vms"].as_array()?.clone();
        let find = |ballast: &Ballast| vms.iter().find(|vm| vm["pid"] == ballast.pid()).cloned();
        let vm = find(&running)?;
        (vm["state"] == "Running").then_some(())?;
        assert_eq!(vm["max"], 64 * MIB);
        assert_eq!(vm["guaranteed"], 16 * MIB);
        assert_eq!(vm["weight"], 250);
        assert_eq!(vm["actual"], 64 * MIB);
        assert_eq!(vm["balloon_target"], 0);
        assert_eq!(vm["disk_virtual"], 8 * MIB);
        assert!(vm["disk_allocated"].as_u64()? < MIB);
        assert!(vm["disk_unallocated"].as_u64()? > 7 * MIB);
        assert!(vm["disk_host_free"].as_u64()? > 0);
        assert_eq!(shown["totals"]["disk_virtual"], 8 * MIB);
        assert_eq!(vm["vm"], "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(vm["api_socket"], json!(running.socket()));
        assert!(vm["age_ms"].is_u64() && vm["start_time"].as_u64()? > 0);
        assert_eq!(find(&idle)?["max"], 0);
        assert_eq!(vms.len(), 2);
        assert_eq!(shown["totals"]["vms"], 1);
        assert_eq!(shown["totals"]["promised"], SLEEPER);
        assert_eq!(shown["totals"]["guaranteed"], SLEEPER - 48 * MIB);
        assert_eq!(shown["stale_records"], 1);
        assert!(shown["totals"]["overcommit_ratio"].as_f64()? > 0.0);
        Some(())
    });
    let output = host_overcommit(&["--ledger", path]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.starts_with("    PID") || text.contains("PID"));
    assert!(text.contains(&running.pid().to_string()), "{text}");
    assert!(
        text.contains("1 records of processes that have died"),
        "{text}"
    );
    files.sort();
    let mut now = names(dir.path());
    now.sort();
    assert_eq!(files, now);
    // Numbers go on being told while the VM runs.
    let age = |vms: &Value| {
        vms["vms"][0]["written_at_ms"]
            .as_u64()
            .max(vms["vms"][1]["written_at_ms"].as_u64())
    };
    let before = age(&show());
    eventually("the record is written again", || {
        (age(&show()) > before).then_some(())
    });
}

fn names(dir: &Path) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn the_host_command_works_without_any_ledger_and_refuses_one_that_is_not_there() {
    let output = host_overcommit(&["--json"]);
    assert!(output.status.success(), "{output:?}");
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(shown["host"]["memory"].as_u64().unwrap() > 0);
    for bad in ["/tmp/there/is/none", "/etc/passwd"] {
        let output = host_overcommit(&["--ledger", bad]);
        assert!(!output.status.success());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(bad) && error.lines().count() == 1, "{error}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_vm_in_a_cgroup_namespace_of_its_own_is_found_where_it_is() {
    let Some(group) = Group::new() else {
        eprintln!("SKIPPED: there is no cgroup v2 here, or none can be made");
        return;
    };
    let mut contained = Launch::of(Path::new("/bin/sh"));
    let script = "echo $$ >\"$1/cgroup.procs\" && exec unshare --cgroup --mount sh -c '\
                  mount -t cgroup2 none \"$1\" && exec \"$2\" --api-socket \"$3\" \
                  --overcommit-ledger \"$4\"' sh /mnt \"$2\" \"$3\" \"$4\"";
    let dir = ledger(SLEEPER);
    let socket = contained.path("api.sock");
    let command = contained.command().args(["-c", script, "sh"]);
    command.args([group.0.as_path(), Path::new(binary()), &socket, dir.path()]);
    if let Err(reason) = may_unshare() {
        eprintln!("SKIPPED: no namespaces can be made: {reason}");
        return;
    }
    let contained = contained.start();
    let outside = launch(dir.path()).start();

    let records = snapshot(dir.path()).records;
    let of = |pid: u32| {
        let record = records.iter().find(|(_, record)| record.pid == pid);
        record.expect("its record").1.clone()
    };
    let (contained, outside) = (of(contained.pid()), of(outside.pid()));
    assert_eq!(contained.cgroup, "/", "as it sees itself");
    let id = |path: &Path| std::fs::metadata(path).expect("a cgroup").ino();
    assert_eq!(contained.lineage.groups, [id(&group.0)]);
    assert!(!contained.lineage.whole && outside.lineage.whole);
    assert_eq!(contained.lineage.device, outside.lineage.device);

    let seen = |groups: &[u64]| Lineage {
        groups: groups.to_vec(),
        ..outside.lineage.clone()
    };
    let root = id(group.0.parent().expect("the root"));
    assert_eq!(outside.lineage.top(), Some(root));
    let own = seen(&[id(&group.0), root]);
    assert_eq!(contained.lineage.is_below(&own), Below::Yes);
    assert_eq!(outside.lineage.is_below(&own), Below::No);
    // Of the root, the container can't say it: whoever sees that has to look.
    assert_eq!(contained.lineage.is_below(&seen(&[root])), Below::Unknown);
}

/// A cgroup (v2), removed when dropped.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        // The root of the hierarchy; elsewhere the numbers of the test are others.
        let mut fields = mount.split(' ').skip(3);
        let point = fields
            .next()
            .filter(|root| *root == "/")
            .and(fields.next())?;
        let point = Path::new(point);
        let whole = !point.join("cgroup.type").exists();
        let path = point.join(format!("ballast-test-{}", std::process::id()));
        (whole && std::fs::create_dir(&path).is_ok()).then_some(Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The process that was in it has only just ended.
        eventually("the cgroup goes", || std::fs::remove_dir(&self.0).ok());
    }
}

fn may_unshare() -> Result<(), String> {
    let mut command = Command::new("unshare");
    let output = command.args([
        "--cgroup", "--mount", "mount", "-t", "cgroup2", "none", "/mnt",
    ]);
    match output.output() {
        Ok(output) if output.status.success() => Ok(()),
        other => Err(format!("{other:?}")),
    }
}
