//! Ledgers that can't be: refused at the start, or told of while the VM goes on.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::ledger::{SLEEPER, launch, ledger, snapshot};
use crate::support::ballast::{Ballast, Launch, binary};

/// Starts with a directory that can't be the ledger; the process must end with one line that names
/// it, and leave no socket behind.
#[track_caller]
fn assert_refused(dir: &Path) -> String {
    let mut ballast = launch(dir).spawn();
    let status = ballast.wait_for_end();
    assert!(!status.success());
    let error = ballast.stderr();
    assert!(error.contains("--overcommit-ledger"), "{error}");
    assert!(error.contains(&dir.display().to_string()), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(!ballast.socket().exists());
    error
}

#[test]
fn a_directory_that_can_not_be_the_ledger_ends_the_start_with_a_clear_error() {
    let dir = ledger(SLEEPER);
    assert_refused(&dir.path().join("missing"));
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert_refused(&file);
    // Nothing can be made there, by root neither.
    assert_refused(Path::new("/proc/self/task"));
    fs::write(dir.path().join("limits"), "reserve = plenty").unwrap();
    let error = assert_refused(dir.path());
    assert!(
        error.contains("limits") && error.contains("plenty"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Runs ballast in a mount namespace of its own with a file system of `options`, on which `first`
/// was done, as its ledger; gives what it said, or nothing where this process may not mount.
fn on_a_file_system(options: &str, first: &str) -> Option<String> {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let script = format!(
        "set -e; mkdir m; mount -t tmpfs -o {options} t m; touch ready; {first}; \
         exec timeout 60 {} --api-socket api.sock --overcommit-ledger m",
        binary()
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .current_dir(dir.path())
        .output()
        .expect("run unshare");
    if !dir.path().join("ready").exists() {
        eprintln!("SKIPPED: may not mount: {output:?}");
        return None;
    }
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!dir.path().join("api.sock").exists());
    Some(String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_file_system_that_is_full_or_read_only_ends_the_start_with_a_clear_error() {
    for (options, first, reason) in [
        ("nr_inodes=1", "true", "No space left"),
        ("size=8k", "head -c 8192 /dev/zero >m/full", "No space left"),
        ("ro", "true", "Read-only"),
    ] {
        let Some(error) = on_a_file_system(options, first) else {
            continue;
        };
        assert!(error.contains("--overcommit-ledger: m: "), "{error}");
        assert!(error.contains(reason), "{options}: {error}");
    }
}

#[test]
fn a_directory_full_of_rubbish_works_and_the_rubbish_stays() {
    let dir = ledger(SLEEPER);
    for number in 0..300 {
        fs::write(dir.path().join(format!("rubbish {number}")), [0xff; 100]).unwrap();
    }
    fs::create_dir(dir.path().join("vm-1-2.record")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("vm-1-3.record")).unwrap();
    // These have the name of a record and no owner: they are dead, whatever is in them.
    for number in 10..30 {
        fs::write(
            dir.path().join(format!("vm-{number}-0.record")),
            [0xff; 4096],
        )
        .unwrap();
    }
    let ballast = launch(dir.path()).start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let seen = snapshot(dir.path());
    assert_eq!((seen.records.len(), seen.stale.len()), (1, 0));
    assert_eq!(seen.foreign, 302);
}

#[test]
fn a_ledger_that_goes_away_is_told_of_and_the_vm_goes_on() {
    let dir = ledger(2 * SLEEPER);
    let mut ballast = launch(dir.path()).start();
    let events = ballast.events();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let status = client.get("vm.info")["overcommit_ledger"].clone();
    assert_eq!(status, json!({"directory": dir.path()}));
    let mark = events.mark();
    fs::remove_dir_all(dir.path()).unwrap();
    events.wait_after(mark, "overcommit-ledger-degraded", |_| true);
    let status = client.get("vm.info")["overcommit_ledger"].clone();
    let reason = status["degraded"].as_str().unwrap_or_default();
    assert!(reason.contains("removed"), "{status}");
    assert_eq!(client.get("vm.info")["state"], "Running");
    // What it has it keeps; what is new can't be known to fit.
    client.put("vm.reboot");
    client.put("vm.shutdown");
    let answer = client.request("PUT", "vm.boot", None).expect(500);
    assert!(answer.text().contains("ledger"), "{}", answer.text());
    assert_eq!(client.get("vm.info")["state"], "Created");
    ballast.assert_well();
}

#[test]
fn a_record_that_is_removed_comes_back() {
    let dir = ledger(SLEEPER);
    let ballast = launch(dir.path()).start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let name = snapshot(dir.path()).records[0].0.clone();
    fs::remove_file(dir.path().join(name)).unwrap();
    crate::support::eventually("the record is there again", || {
        let records = snapshot(dir.path()).records;
        (records.first()?.1.reservation.fixed() == SLEEPER).then_some(())
    });
}

#[test]
fn a_vm_without_a_ledger_says_nothing_of_one() {
    let ballast: Ballast = Launch::new().start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    assert!(client.get("vm.info").get("overcommit_ledger").is_none());
}
