//! What is not committed, and who else may open a base meanwhile.

use super::*;
use crate::block::job::ConcludeError;

#[test]
fn what_can_not_be_committed_is_refused_and_says_why() {
    let Some(folder) = qemu::folder() else { return };
    let (base, path) = images(folder.path(), "cluster_size=64k");
    let with = |name: &str, value: serde_json::Value| {
        let mut config = over();
        config[name] = value;
        config
    };
    let alone = qemu::create(folder.path(), "alone.qcow2", "", SIZE);
    let smaller = folder.path().join("smaller.qcow2");
    qemu::img(&format!(
        "create -q -f qcow2 -b {} -F raw {} {}",
        base.display(),
        smaller.display(),
        SIZE / 2
    ));
    let cases = [
        (&base, serde_json::json!({}), "no backing file"),
        (&alone, over(), "no backing file"),
        (&smaller, over(), "more than the disk"),
        (&path, with("readonly", true.into()), "read-only"),
        (
            &path,
            with("lock_granularity", "Full".into()),
            "lock_granularity",
        ),
    ];
    for (path, config, expected) in cases {
        let disk = Disk::on(path, PLAIN, config);
        let reason = refused(&disk.block);
        assert!(reason.contains(expected), "{reason}");
        assert!(!disk.block.has_job());
    }
    let disk = Disk::on(&path, PLAIN, over());
    // Another overlay of the same base, by another process or not.
    let other = Disk::on(&smaller, PLAIN, over());
    let reason = refused(&disk.block);
    assert!(reason.contains("base.raw"), "{reason}");
    drop(other);
    // Another file is where it was.
    let away = folder.path().join("away.raw");
    std::fs::rename(&base, &away).unwrap();
    std::fs::copy(&away, &base).unwrap();
    let reason = refused(&disk.block);
    assert!(reason.contains("no longer"), "{reason}");
    std::fs::rename(&away, &base).unwrap();
    let (job, _) = begin(&disk.block, speed(1));
    let reason = refused(&disk.block);
    assert!(reason.contains("a job"), "{reason}");
    drop(job);
    // Or comes there meanwhile.
    let (mut job, told) = begin(&disk.block, None);
    ready(&job, &told);
    std::fs::rename(&base, &away).unwrap();
    let error = job.conclude(&disk.block, true).unwrap_err().to_string();
    assert!(error.contains("no longer"), "{error}");
    std::fs::rename(&away, &base).unwrap();
    drop(job);
    drop(disk);
    qemu::img(&format!("snapshot -c one {}", path.display()));
    let disk = Disk::on(&path, PLAIN, over());
    let reason = refused(&disk.block);
    assert!(reason.contains("snapshots inside"), "{reason}");
}

#[test]
fn a_commit_that_is_not_ready_or_of_another_disk_is_not_concluded() {
    let Some(folder) = qemu::folder() else { return };
    let (base, path) = images(folder.path(), "cluster_size=64k");
    let before = qemu::content(&path);
    let disk = Disk::on(&path, PLAIN, over());
    let (mut job, told) = begin(&disk.block, speed(1));
    let error = job.conclude(&disk.block, true).unwrap_err();
    assert!(matches!(error, ConcludeError::NotReady), "{error}");
    job.set_speed(None);
    ready(&job, &told);
    let mut other = Disk::new(PLAIN);
    let error = job.conclude(&other.block, true).unwrap_err();
    assert!(error.to_string().contains("another disk"), "{error}");
    assert_eq!(other.write(0, &bytes_of(1)), OK);
    // The disk goes first: nobody is there that could give out the rest.
    drop(disk);
    drop(job);
    assert!(can_write(Format::Raw, &base));
    let mut disk = Disk::on(&path, PLAIN, over());
    assert!(content(&mut disk) == before);
}

#[test]
fn while_there_is_a_commit_nobody_else_opens_the_base_and_without_a_reader_may() {
    let Some(folder) = qemu::folder() else { return };
    let (base, format, path) = of_kind(folder.path(), 2, 1);
    let disk = Disk::on(&path, PLAIN, over());
    let reads = |path: &Path, force: &[&str]| {
        let mut tool = std::process::Command::new("qemu-io");
        let tool = tool.args(["-r", "-f", "qcow2", "-c", "read 0 512"]);
        let output = tool.args(force).arg(path).output();
        output.unwrap().status.success()
    };
    assert!(reads(&base, &[]), "a reader has no part in it");
    for round in 0..3 {
        let (job, _) = begin(&disk.block, speed(1));
        assert!(!can_write(format, &base), "{round}");
        assert!(!reads(&base, &[]), "{round}");
        assert!(reads(&base, &["-U"]), "{round}");
        drop(job);
        assert!(!can_write(format, &base), "{round}");
        assert!(reads(&base, &[]), "{round}");
    }
}
