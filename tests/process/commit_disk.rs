//! `vm.commit-disk`: disks that go on with the image below theirs, over the API of a real process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::before;
use super::full_disk::mount;
use super::thin::{CHUNKS, MIB, SIZE, SLOW, Thin, check, check_for, open_files, qemu_img, whole};
use crate::support::artifacts::empty_image;
use crate::support::ballast::{Ballast, binary};
use crate::support::events::Mark;
use crate::support::payload::WRITER_CHUNK;

/// What is in overlays before there is a VM: data and zeroes, some of it beside clusters' ends.
const BEFORE: &[&str] = &[
    "write -q -P 0x17 2M 3M",
    "write -q -P 0x23 5300k 7k",
    "write -q -z 6M 1M",
    "discard -q 8M 256k",
    "write -q -P 0x42 10M 4M",
    "write -q -P 0x55 15M 1M",
];

/// Between the overlay and the raw image: an empty one with clusters of another size.
fn qcow2_between(folder: &Path, base: PathBuf) -> PathBuf {
    let middle = folder.join("middle.qcow2");
    let done = Command::new(binary())
        .args(["disk", "create", "-q", "-f", "qcow2", "-F", "raw", "-o"])
        .args(["cluster_size=32k", "-b"])
        .args([&base, &middle])
        .status()
        .unwrap();
    assert!(done.success());
    middle
}

/// Whether `ballast disk io` in another process can open an image to read or to write it.
fn can_open(image: &Path, format: &str, write: bool) -> bool {
    let mut io = Command::new(binary());
    io.args([
        "disk",
        "io",
        "-f",
        format,
        "--backing-files",
        "-c",
        "length",
    ]);
    if !write {
        io.arg("-r");
    }
    let done = io.arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success() || text.contains("in use"), "{text}");
    done.status.success()
}

/// An overlay has nothing that what is below it has not.
#[track_caller]
fn assert_empty(overlay: &Path) {
    let done = Command::new(binary())
        .args(["disk", "map", "-f", "qcow2", "--backing-files", "--output"])
        .arg("json")
        .arg(overlay)
        .output()
        .unwrap();
    let map: Value = serde_json::from_slice(&done.stdout).unwrap();
    let extents = map.as_array().unwrap();
    let own = extents.iter().filter(|e| e["depth"] == 0);
    let own: Vec<_> = own.filter(|e| e["present"] == true).collect();
    assert!(!extents.is_empty() && own.is_empty(), "{own:?}");
}

#[test]
fn a_disk_in_use_goes_on_with_its_base_and_leaves_an_empty_overlay() {
    let mut thin = Thin::boot_with(|_, base| base, BEFORE);
    let serial = thin.config()["serial"].clone();
    assert_eq!(serial, Value::Null);
    let begun = thin.commit(None);
    assert_eq!(
        (&begun["id"], &begun["disk"], &begun["kind"]),
        (&json!("job0"), &json!("thin"), &json!("commit"))
    );
    assert_eq!(
        (&begun["total_bytes"], &begun["speed"]),
        (&json!(SIZE), &Value::Null)
    );
    let event = thin.events.wait_for("job-completed");
    assert_eq!(event["properties"]["job"], "job0");
    assert_eq!(event["properties"]["kind"], "commit");
    // What is told agrees with the event at once.
    let config = thin.config();
    assert_eq!(config["path"], json!(thin.base));
    assert_eq!(
        (&config["image_type"], &config["backing_files"]),
        (&json!("Raw"), &json!(false))
    );
    assert!(config["serial"].is_string(), "the guest knows it again");
    let jobs = thin.jobs();
    assert_eq!(
        (&jobs[0]["state"], &jobs[0]["done_bytes"]),
        (&json!("completed"), &json!(SIZE))
    );
    assert!(jobs[0]["copied_bytes"].as_u64().unwrap() >= 8 * MIB);
    let info = thin.client.get("vm.disk-info?id=thin");
    assert_eq!(info["path"], json!(thin.base), "{info}");
    assert_eq!(info["virtual_size"], json!(SIZE));
    assert!(
        info["backing_chain"].as_array().is_none_or(Vec::is_empty),
        "{info}"
    );
    assert!(!open_files(&thin.ballast).contains(&thin.overlay));
    assert!(!can_open(&thin.base, "raw", false), "the disk writes to it");
    thin.settle();
    thin.client.put("vm.pause");
    thin.client.put("vm.resume");

    // There is nothing left below it.
    let again = json!({"id": "thin"});
    let answer = thin.client.try_put_json("vm.commit-disk", &again);
    assert_eq!(answer.status, 400, "{}", answer.text());
    // Up again, and down again, and the next boot.
    let next = thin.ballast.path("next.qcow2");
    let moved = json!({"disks": [{"id": "thin", "path": next}]});
    thin.client.put_json("vm.snapshot-disk", &moved);
    thin.client.put("vm.reboot");
    assert_eq!(thin.chain()[0]["path"], json!(thin.base));
    let mark = thin.events.mark();
    thin.commit(None);
    thin.events.wait_after(mark, "job-completed", |_| true);
    assert_eq!(thin.config()["path"], json!(thin.base));
    assert_eq!(thin.config()["serial"], config["serial"]);
    thin.client.put("vm.reboot");
    thin.settle();
    let added = json!({"path": empty_image(thin.ballast.dir(), "other", MIB)});
    thin.client.put_json("vm.add-disk", &added);
    thin.ballast.assert_well();
    thin.client.put("vm.delete");
    assert!(whole(&thin.base) == thin.content);
    for overlay in [&thin.overlay, &next] {
        check(overlay);
        assert_empty(overlay);
        assert!(whole(overlay) == thin.content);
    }
}

#[test]
fn a_disk_goes_down_through_a_chain_an_image_at_a_time_also_while_it_is_paused() {
    let mut thin = Thin::boot_with(qcow2_between, BEFORE);
    let middle = thin.ballast.path("middle.qcow2");
    thin.settle();
    thin.client.put("vm.pause");
    thin.commit(None);
    thin.events.wait_for("job-completed");
    assert_eq!(thin.client.state(), "Paused");
    let config = thin.config();
    assert_eq!(config["path"], json!(middle));
    assert_eq!(config["image_type"], "Qcow2");
    assert_eq!(thin.chain()[0]["path"], json!(thin.base));
    thin.client.put("vm.resume");
    thin.client.put("vm.reboot");
    let mark = thin.events.mark();
    thin.commit(None);
    thin.events.wait_after(mark, "job-completed", |_| true);
    assert_eq!(thin.config()["path"], json!(thin.base));
    thin.settle();
    thin.client.put("vm.delete");
    for image in [&thin.overlay, &middle] {
        check(image);
        assert_empty(image);
    }
    assert!(whole(&thin.base) == thin.content);
    assert!(whole(&thin.overlay) == thin.content);
}

#[test]
fn a_base_made_by_qemu_img_takes_in_what_the_disk_has() {
    if !qemu_img(&["--version"], &[]) {
        return;
    }
    let options: &[&[&str]] = &[
        &["-c"],
        &["-o", "cluster_size=4k,refcount_bits=1"],
        &["-o", "extended_l2=on,cluster_size=128k"],
        &["-o", "compat=0.10"],
        &["-o", "lazy_refcounts=on,cluster_size=2M"],
    ];
    for options in options {
        let mut thin = Thin::boot_with(
            |folder, base| {
                let middle = folder.join("middle.qcow2");
                let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
                arguments.extend(*options);
                assert!(qemu_img(&arguments, &[&base, &middle]));
                middle
            },
            BEFORE,
        );
        let middle = thin.ballast.path("middle.qcow2");
        thin.commit(None);
        thin.events.wait_for("job-completed");
        thin.settle();
        thin.client.put("vm.delete");
        // Room that compressed clusters had is lost, where they shared it with others.
        check_for(&middle, &[0, 3]);
        check(&thin.overlay);
        let reference = thin.ballast.path("reference.raw");
        fs::write(&reference, &thin.content).unwrap();
        let arguments = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
        for image in [&middle, &thin.overlay] {
            qemu_img(&arguments, &[image, &reference]);
        }
    }
}

/// Each with the filters that go with it.
#[test]
fn a_commit_is_done_by_engines_of_every_kind() {
    for disk in [
        json!({"direct": true}),
        json!({"disable_io_uring": true}),
        json!({"direct": true, "disable_io_uring": true, "num_queues": 2}),
        json!({"l2_cache_size": MIB, "serial": "mine"}),
    ] {
        for between in [|_: &Path, base| base, qcow2_between] {
            let mut thin = Thin::boot_as(between, BEFORE, &disk);
            let mut config = thin.config();
            thin.commit(None);
            thin.events.wait_for("job-completed");
            thin.settle();
            let now = thin.config();
            let path = PathBuf::from(now["path"].as_str().unwrap());
            for field in ["path", "image_type", "backing_files", "serial"] {
                config[field] = now[field].clone();
            }
            if now["image_type"] == "Raw" {
                // There are no tables to keep.
                config.as_object_mut().unwrap().remove("l2_cache_size");
            }
            assert_eq!(config, now, "{disk}");
            assert!(disk["serial"].is_null() || now["serial"] == "mine", "{now}");
            if config["num_queues"] == 2 {
                // Now each has a thread of its own.
                thin.client.put("vm.reboot");
                thin.settle();
            }
            thin.ballast.assert_well();
            thin.client.put("vm.delete");
            check(&thin.overlay);
            assert_empty(&thin.overlay);
            for image in [&path, &thin.overlay] {
                assert!(whole(image) == thin.content, "{disk}: {image:?}");
            }
        }
    }
}

#[test]
fn a_base_that_is_smaller_than_the_disk_grows() {
    for between in [|_: &Path, base| base, qcow2_between] {
        let mut thin = Thin::boot_with(between, BEFORE);
        let larger = json!({"id": "thin", "desired_size": SIZE + MIB});
        thin.client.put_json("vm.resize-disk", &larger);
        thin.commit(None);
        let event = thin.events.wait_for("job-completed");
        assert_eq!(event["properties"]["total_bytes"], (SIZE + MIB).to_string());
        thin.settle();
        let info = thin.client.get("vm.disk-info?id=thin");
        assert_eq!(info["virtual_size"], json!(SIZE + MIB));
        let path = PathBuf::from(info["path"].as_str().unwrap());
        thin.client.put("vm.delete");
        check(&thin.overlay);
        thin.content.resize((SIZE + MIB) as usize, 0);
        for image in [&path, &thin.overlay] {
            assert!(whole(image) == thin.content, "{image:?}");
        }
    }
}

#[test]
fn a_base_on_a_full_host_ends_the_job_of_a_disk_that_reports_it_and_the_disk_goes_on_as_before() {
    let mut small = PathBuf::new();
    let mut mounted = true;
    let between = |folder: &Path, _| {
        small = folder.join("small");
        fs::create_dir(&small).unwrap();
        mounted = mount(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], &small);
        empty_image(&small, "holes.raw", SIZE)
    };
    let report = json!({"on_enospc": "report"});
    let mut thin = Thin::boot_as(between, BEFORE, &report);
    if !mounted {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    }
    thin.commit(None);
    let event = thin.events.wait_for("job-failed");
    let reason = event["properties"]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("holes.raw"), "{reason}");
    assert_eq!(thin.jobs()[0]["state"], "failed");
    assert_eq!(thin.config()["path"], json!(thin.overlay));
    thin.settle();
    let counters = thin.client.get("vm.counters");
    assert_eq!(
        counters["thin"]["write_ops"], CHUNKS,
        "the guest is unharmed"
    );
    assert!(mount(&["-o", "remount,size=32m"], &small));
    thin.commit(None);
    thin.events.wait_for("job-completed");
    thin.client.put("vm.delete");
    let found = whole(&small.join("holes.raw"));
    let whole_overlay = whole(&thin.overlay);
    thin.ballast.assert_well();
    drop(thin.client);
    check(&thin.overlay);
    let _ = Command::new("umount").arg("-l").arg(&small).status();
    assert!(found == thin.content);
    assert!(whole_overlay == thin.content);
}

#[test]
fn a_commit_can_be_cancelled_locks_its_base_and_can_be_begun_again() {
    let mut thin = Thin::boot_with(|_, base| base, BEFORE);
    assert!(can_open(&thin.base, "raw", false));
    assert_eq!(thin.commit(Some(SLOW))["speed"], SLOW);
    assert!(!can_open(&thin.base, "raw", false), "it is written to");
    assert!(!can_open(&thin.base, "raw", true));
    thin.is_the_only_one("job0", "commit");

    let job = json!({"id": "job0"});
    thin.client.put_json("vm.cancel-job", &job);
    thin.events.wait_for("job-cancelled");
    let jobs = thin.jobs();
    assert_eq!(jobs[0]["state"], "cancelled");
    assert!(jobs[0]["done_bytes"].as_u64().unwrap() < SIZE, "{jobs}");
    assert_eq!(thin.config()["path"], json!(thin.overlay));
    assert_eq!(thin.chain()[0]["path"], json!(thin.base));
    // It is only read again.
    assert!(can_open(&thin.base, "raw", false));
    assert!(!can_open(&thin.base, "raw", true));

    thin.commit(Some(SLOW));
    thin.client
        .put_json("vm.set-job", &json!({"id": "job1", "speed": null}));
    let second = |event: &Value| event["properties"]["job"] == "job1";
    thin.events.wait_after(Mark::START, "job-completed", second);
    thin.settle();
    assert_eq!(thin.config()["path"], json!(thin.base));
    thin.client.put("vm.delete");
    check(&thin.overlay);
    assert!(whole(&thin.base) == thin.content);
    assert!(whole(&thin.overlay) == thin.content);
}

#[test]
fn a_commit_goes_on_after_a_reboot_and_ends_with_the_machine_or_the_disk() {
    for verb in [
        "vm.shutdown",
        "vm.delete",
        "vmm.shutdown",
        "vm.remove-device",
    ] {
        let mut thin = Thin::boot_with(qcow2_between, BEFORE);
        thin.commit(Some(SLOW));
        thin.client.put("vm.reboot");
        let jobs = thin.jobs();
        assert_eq!(
            (&jobs[0]["id"], &jobs[0]["state"], &jobs[0]["speed"]),
            (&json!("job0"), &json!("running"), &json!(SLOW))
        );
        thin.settle();
        match verb {
            "vm.remove-device" => drop(thin.client.put_json(verb, &json!({"id": "thin"}))),
            _ => drop(thin.client.put(verb)),
        }
        thin.events
            .wait_for_device(Mark::START, "job-cancelled", "thin");
        match verb {
            "vm.shutdown" => {
                assert_eq!(thin.jobs()[0]["state"], "cancelled");
                assert_eq!(thin.config()["path"], json!(thin.overlay));
                thin.client.put("vm.boot");
                let mark = thin.events.mark();
                thin.commit(None);
                thin.events.wait_after(mark, "job-completed", |_| true);
                thin.settle();
            }
            "vmm.shutdown" => thin.ballast.wait_for_clean_end(),
            _ => thin.ballast.assert_well(),
        }
        if verb != "vmm.shutdown" {
            thin.client.put("vm.delete");
        }
        check(&thin.overlay);
        // What was overwritten half way may be lost room in the base, and nothing worse.
        check_for(&thin.ballast.path("middle.qcow2"), &[0, 3]);
        assert!(whole(&thin.overlay) == thin.content, "{verb}");
    }
}

#[test]
fn what_can_not_be_committed_is_refused_by_field_and_changes_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["balloon"] = json!({"size": 0});
    let raw = empty_image(ballast.dir(), "raw", MIB);
    let alone = ballast.path("alone.qcow2");
    client.put_json(
        "vm.create-disk",
        &json!({"path": alone, "image_type": "Qcow2", "size": MIB}),
    );
    let overlay = |name: &str, base: &str, base_bytes: u64| {
        let below = ballast.path(base);
        if !below.exists() {
            empty_image(ballast.dir(), base, base_bytes);
        }
        let path = ballast.path(name);
        let done = Command::new(binary())
            .args(["disk", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&below, &path])
            .arg("1M")
            .status()
            .unwrap();
        assert!(done.success(), "{name}");
        path
    };
    let disk = |id: &str, path: &Path| json!({"id": id, "path": path, "image_type": "Qcow2", "backing_files": true});
    let mut readonly = disk("ro", &overlay("ro.qcow2", "ro.raw", MIB));
    readonly["readonly"] = json!(true);
    let mut full = disk("full", &overlay("full.qcow2", "full.raw", MIB));
    full["lock_granularity"] = json!("Full");
    // Marked as not closed cleanly, and as corrupt: they can be read.
    let marked = |name: &str, mark: u8| {
        let below = ballast.path(&format!("{name}.below"));
        let path = ballast.path(&format!("{name}.qcow2"));
        for arguments in [
            vec![below.to_str().unwrap(), "1M"],
            vec![
                "-F",
                "qcow2",
                "-b",
                below.to_str().unwrap(),
                path.to_str().unwrap(),
            ],
        ] {
            let mut create = Command::new(binary());
            create.args(["disk", "create", "-q", "-f", "qcow2"]);
            assert!(create.args(arguments).status().unwrap().success());
        }
        let mut bytes = fs::read(&below).unwrap();
        bytes[79] |= mark;
        fs::write(&below, bytes).unwrap();
        path
    };
    let inside = overlay("inside.qcow2", "inside.raw", MIB);
    let has_snapshot = qemu_img(&["snapshot", "-c", "one"], &[&inside]);
    config["disks"] = json!([
        {"id": "raw", "path": raw},
        {"id": "alone", "path": alone, "image_type": "Qcow2"},
        readonly,
        full,
        disk("larger", &overlay("larger.qcow2", "larger.raw", 2 * MIB)),
        disk("inside", &inside),
        disk("dirty", &marked("dirty", 1)),
        disk("corrupt", &marked("corrupt", 2)),
        disk("first", &overlay("first.qcow2", "shared.raw", MIB)),
        disk("second", &overlay("second.qcow2", "shared.raw", MIB)),
        disk("replaced", &overlay("replaced.qcow2", "replaced.raw", MIB)),
        disk("gone", &overlay("gone.qcow2", "gone.raw", MIB)),
    ]);
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    let [replaced, gone] = ["replaced.raw", "gone.raw"].map(|name| ballast.path(name));
    for path in [&replaced, &gone] {
        fs::rename(path, path.with_extension("away")).unwrap();
    }
    fs::write(&replaced, vec![1; MIB as usize]).unwrap();

    let before = before(&ballast, &mut client);
    let mut cases = vec![
        (json!({}), 400, "id"),
        (json!({"id": 7}), 400, "id"),
        (json!({"id": "nobody"}), 404, "nobody"),
        (json!({"id": "__balloon"}), 400, "id: "),
        (json!({"id": "raw"}), 400, "id: "),
        (json!({"id": "alone"}), 400, "id: "),
        (json!({"id": "ro"}), 400, "id: "),
        (json!({"id": "full"}), 400, "id: "),
        (json!({"id": "larger"}), 400, "larger.raw"),
        (json!({"id": "dirty"}), 400, "dirty.below"),
        (json!({"id": "corrupt"}), 400, "corrupt.below"),
        (json!({"id": "first"}), 409, "shared.raw"),
        (json!({"id": "replaced"}), 400, "replaced.raw"),
        (json!({"id": "gone"}), 400, "gone.raw"),
        (json!({"id": "first", "speed": 0}), 400, "speed"),
        (json!({"id": "first", "speed": -1}), 400, "speed"),
        (json!({"id": "first", "speed": "1"}), 400, "speed"),
    ];
    if has_snapshot {
        cases.push((json!({"id": "inside"}), 400, "id: "));
    }
    for (body, status, named) in cases {
        let answer = client.try_put_json("vm.commit-disk", &body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        assert!(
            answer.reasons().contains(named),
            "{body}: {}",
            answer.text()
        );
        before.assert_unchanged(&mut ballast, &mut client, &body.to_string());
    }
    assert_eq!(client.get("vm.jobs"), json!([]));
    assert!(fs::read(&replaced).unwrap() == vec![1; MIB as usize]);
}

/// Killed at whatever moment: the image over its base shows what the disk had, and of the guest's
/// writes, which it never flushed, each is there or is not.
#[test]
fn a_sigkill_while_a_disk_is_committed_loses_nothing() {
    let mut moved = 0;
    for qcow2 in [false, true] {
        // How long it takes when nobody is killed.
        let mut took = Duration::ZERO;
        for round in 0..=4_u32 {
            let between = |folder: &Path, base| match qcow2 {
                true => qcow2_between(folder, base),
                false => base,
            };
            let mut thin = Thin::boot_with(between, BEFORE);
            // What is there until the guest writes: the base is not what it was in the end.
            let first = fs::read(&thin.base).unwrap();
            let sent = Instant::now();
            thin.commit(None);
            if round == 0 {
                thin.events.wait_for("job-completed");
                took = sent.elapsed();
            } else {
                std::thread::sleep(took * round / 6);
            }
            let Thin {
                ballast,
                base,
                overlay,
                content,
                ..
            } = thin;
            let folder = ballast.kill();
            let found = whole(&overlay);
            check_for(&overlay, &[0, 3]);
            let below = match qcow2 {
                true => base.with_file_name("middle.qcow2"),
                false => base,
            };
            if qcow2 {
                check_for(&below, &[0, 3]);
            }
            assert_eq!(found.len(), content.len());
            let written = CHUNKS * WRITER_CHUNK;
            let what = format!("qcow2 {qcow2}, round {round}");
            assert!(found[written..] == content[written..], "{what}");
            for (chunk, bytes) in found[..written].chunks(WRITER_CHUNK).enumerate() {
                let at = chunk * WRITER_CHUNK..(chunk + 1) * WRITER_CHUNK;
                assert!(
                    bytes == &content[at.clone()] || bytes == &first[at],
                    "{what}: chunk {chunk}"
                );
            }
            // An image that was emptied was so because its base has all of it.
            let whole_below = whole(&below) == found;
            moved += u32::from(whole_below);
            assert!(round > 0 || whole_below, "{what}");
            drop(folder);
        }
    }
    eprintln!("{moved} of 10 bases had all of the disk");
}
