//! `vm.stream-disk` and the jobs: disks that come to stand alone, over the API of a real process.

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
use crate::support::eventually;
use crate::support::payload::{WRITER_CHUNK, WRITER_SLOT, disk_writer, writer_chunk};

#[test]
fn a_disk_in_use_comes_to_stand_alone_and_lets_go_of_what_was_below() {
    let mut thin = Thin::boot();
    let begun = thin.stream(None);
    assert_eq!(
        (
            &begun["id"],
            &begun["disk"],
            &begun["kind"],
            &begun["state"]
        ),
        (
            &json!("job0"),
            &json!("thin"),
            &json!("stream"),
            &json!("running")
        )
    );
    assert_eq!(
        (&begun["total_bytes"], &begun["speed"]),
        (&json!(SIZE), &Value::Null)
    );
    let event = thin.events.wait_for("job-completed");
    assert_eq!(event["properties"]["job"], "job0");
    assert_eq!(event["properties"]["id"], "thin");
    assert_eq!(event["properties"]["done_bytes"], SIZE.to_string());
    thin.events
        .assert_order(&["virtio-device:job-started", "virtio-device:job-completed"]);
    let jobs = thin.jobs();
    assert_eq!(jobs.as_array().unwrap().len(), 1);
    assert_eq!(
        (&jobs[0]["state"], &jobs[0]["done_bytes"]),
        (&json!("completed"), &json!(SIZE))
    );
    assert!(jobs[0]["copied_bytes"].as_u64().unwrap() >= SIZE - (CHUNKS * WRITER_CHUNK) as u64);
    let chain = |thin: &mut Thin| thin.client.get("vm.disk-info?id=thin")["backing_chain"].clone();
    assert_eq!(chain(&mut thin), json!([]));
    assert!(!open_files(&thin.ballast).contains(&thin.base));
    // What was below can go, and with it nothing of the disk.
    fs::remove_file(&thin.base).unwrap();
    thin.settle();
    thin.client.put("vm.pause");
    thin.client.put("vm.resume");
    // Nothing is left to be done.
    let again = json!({"id": "thin"});
    let answer = thin.client.try_put_json("vm.stream-disk", &again);
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(answer.reasons().contains("id: "), "{}", answer.text());
    // An overlay on it, and the next boot.
    let moved = json!({"disks": [{"id": "thin", "path": thin.ballast.path("next.qcow2")}]});
    thin.client.put_json("vm.snapshot-disk", &moved);
    thin.client.put("vm.reboot");
    assert_eq!(chain(&mut thin)[0]["path"], json!(thin.overlay));
    thin.ballast.assert_well();
    thin.client.put("vm.delete");
    check(&thin.overlay);
    assert!(whole(&thin.overlay) == thin.content);
    assert!(whole(&thin.ballast.path("next.qcow2")) == thin.content);
}

#[test]
fn a_chain_made_by_qemu_img_is_pulled_flat() {
    if !qemu_img(&["--version"], &[]) {
        return;
    }
    let mut thin = Thin::boot_on(|folder, base| {
        let [compressed, small] = ["one.qcow2", "two.qcow2"].map(|name| folder.join(name));
        let options = ["-q", "-f", "qcow2", "-o", "cluster_size=4k", "-F"];
        let backed = |format: &'static str, below: &Path, image: &Path| {
            let mut arguments = vec!["create"];
            arguments.extend(options);
            arguments.extend([format, "-b", below.to_str().unwrap()]);
            qemu_img(&arguments, &[image]);
            Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", "write -q -P 0x5a 3M 300k"])
                .args(["-c", "write -q -z 5M 1M", "-c", "discard -q 6M 128k"])
                .arg(image)
                .status()
                .unwrap()
        };
        assert!(backed("raw", &base, &compressed).success());
        assert!(backed("qcow2", &compressed, &small).success());
        small
    });
    thin.stream(None);
    thin.events.wait_for("job-completed");
    thin.settle();
    thin.client.put("vm.delete");
    check(&thin.overlay);
    fs::remove_file(&thin.base).unwrap();
    assert!(whole(&thin.overlay) == thin.content);
    let reference = thin.ballast.path("reference.raw");
    fs::write(&reference, &thin.content).unwrap();
    let arguments = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
    qemu_img(&arguments, &[&thin.overlay, &reference]);
}

#[test]
fn a_job_keeps_to_its_speed_can_be_cancelled_and_begun_again() {
    let mut thin = Thin::boot();
    assert_eq!(thin.stream(Some(SLOW))["speed"], SLOW);
    thin.is_the_only_one("job0", "stream");

    let job = json!({"id": "job0"});
    thin.client.put_json("vm.cancel-job", &job);
    let event = thin.events.wait_for("job-cancelled");
    assert_eq!(event["properties"]["job"], "job0");
    let jobs = thin.jobs();
    assert_eq!(jobs[0]["state"], "cancelled");
    assert!(jobs[0]["done_bytes"].as_u64().unwrap() < SIZE, "{jobs}");
    for path in ["vm.cancel-job", "vm.set-job"] {
        let answer = thin.client.try_put_json(path, &job);
        assert_eq!(answer.status, 409, "{path}: {}", answer.text());
    }
    let chain = thin.client.get("vm.disk-info?id=thin")["backing_chain"].clone();
    assert_eq!(chain[0]["path"], json!(thin.base));

    // Also of a VM that stands still; and one that is slow can be made fast.
    thin.client.put("vm.pause");
    thin.stream(Some(SLOW));
    thin.client
        .put_json("vm.cancel-job", &json!({"id": "job1"}));
    let of_job = |id: &'static str| move |event: &Value| event["properties"]["job"] == id;
    thin.events
        .wait_after(Mark::START, "job-cancelled", of_job("job1"));
    thin.client.put("vm.resume");
    thin.stream(Some(SLOW));
    thin.client
        .put_json("vm.set-job", &json!({"id": "job2", "speed": null}));
    thin.events
        .wait_after(Mark::START, "job-completed", of_job("job2"));
    let jobs = thin.jobs();
    let states: Vec<_> = jobs.as_array().unwrap().iter().collect();
    assert_eq!(states.len(), 3);
    assert_eq!(
        (&states[0]["id"], &states[2]["id"]),
        (&json!("job2"), &json!("job0"))
    );
    thin.settle();
    thin.client.put("vm.delete");
    check(&thin.overlay);
    assert!(whole(&thin.overlay) == thin.content);
}

#[test]
fn a_job_goes_on_after_a_reboot_and_ends_with_the_machine_or_the_disk() {
    for verb in [
        "vm.shutdown",
        "vm.delete",
        "vmm.shutdown",
        "vm.remove-device",
    ] {
        let mut thin = Thin::boot();
        thin.stream(Some(SLOW));
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
        let started = |name: &&String| name.ends_with("job-started");
        assert_eq!(thin.events.names().iter().filter(started).count(), 1);
        match verb {
            "vm.shutdown" => {
                assert_eq!(thin.jobs()[0]["state"], "cancelled");
                thin.client.put("vm.boot");
                thin.stream(None);
                thin.events.wait_for("job-completed");
                thin.settle();
            }
            "vm.remove-device" => {
                let answer = thin
                    .client
                    .try_put_json("vm.stream-disk", &json!({"id": "thin"}));
                assert_eq!(answer.status, 400, "{}", answer.text());
            }
            "vmm.shutdown" => thin.ballast.wait_for_clean_end(),
            _ => thin.ballast.assert_well(),
        }
        if verb != "vmm.shutdown" {
            thin.client.put("vm.delete");
        }
        check(&thin.overlay);
        assert!(whole(&thin.overlay) == thin.content, "{verb}");
    }
}

#[test]
fn what_can_not_be_streamed_is_refused_by_field_and_changes_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["balloon"] = json!({"size": 0});
    let raw = empty_image(ballast.dir(), "raw", MIB);
    let alone = ballast.path("alone.qcow2");
    let overlay = ballast.path("overlay.qcow2");
    let full = ballast.path("full.qcow2");
    let base = empty_image(ballast.dir(), "base", MIB);
    let other = empty_image(ballast.dir(), "other", MIB);
    client.put_json(
        "vm.create-disk",
        &json!({"path": alone, "image_type": "Qcow2", "size": MIB}),
    );
    for (path, below) in [(&overlay, &base), (&full, &other)] {
        client.put_json(
            "vm.create-disk",
            &json!({
                "path": path, "image_type": "Qcow2", "backing_path": below,
                "backing_type": "Raw",
            }),
        );
    }
    config["disks"] = json!([
        {"id": "raw", "path": raw},
        {"id": "alone", "path": alone, "image_type": "Qcow2"},
        {"id": "ro", "path": overlay, "image_type": "Qcow2", "backing_files": true,
         "readonly": true},
        {"id": "full", "path": full, "image_type": "Qcow2", "backing_files": true,
         "lock_granularity": "Full"},
    ]);
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    let before = before(&ballast, &mut client);
    for (path, body, status, named) in [
        ("vm.stream-disk", json!({}), 400, "id"),
        ("vm.stream-disk", json!({"id": 7}), 400, "id"),
        ("vm.stream-disk", json!({"id": "nobody"}), 404, "nobody"),
        ("vm.stream-disk", json!({"id": "__balloon"}), 400, "id: "),
        ("vm.stream-disk", json!({"id": "raw"}), 400, "id: "),
        ("vm.stream-disk", json!({"id": "alone"}), 400, "id: "),
        ("vm.stream-disk", json!({"id": "ro"}), 400, "id: "),
        ("vm.stream-disk", json!({"id": "full"}), 400, "id: "),
        (
            "vm.stream-disk",
            json!({"id": "raw", "speed": 0}),
            400,
            "speed",
        ),
        (
            "vm.stream-disk",
            json!({"id": "raw", "speed": -1}),
            400,
            "speed",
        ),
        (
            "vm.stream-disk",
            json!({"id": "raw", "speed": "1"}),
            400,
            "speed",
        ),
        ("vm.set-job", json!({"id": "job0"}), 404, "job0"),
        (
            "vm.set-job",
            json!({"id": "job0", "speed": 0}),
            400,
            "speed",
        ),
        ("vm.set-job", json!({"speed": 1}), 400, "id"),
        ("vm.cancel-job", json!({"id": "raw"}), 404, "raw"),
        ("vm.cancel-job", json!({}), 400, "id"),
    ] {
        let answer = client.try_put_json(path, &body);
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.text());
        assert!(
            answer.reasons().contains(named),
            "{path} {body}: {}",
            answer.text()
        );
        before.assert_unchanged(&mut ballast, &mut client, &format!("{path} {body}"));
    }
    assert_eq!(client.get("vm.jobs"), json!([]));
}

/// Killed at whatever moment: what the disk had below its image is there, and of the guest's
/// writes, which it never flushed, each is there or is not.
#[test]
fn a_sigkill_while_a_disk_is_streamed_loses_nothing() {
    // How long it takes when nobody is killed.
    let mut took = Duration::ZERO;
    let mut alone = 0;
    for round in 0..=10_u32 {
        let mut thin = Thin::boot();
        let sent = Instant::now();
        thin.stream(None);
        if round == 0 {
            thin.events.wait_for("job-completed");
            took = sent.elapsed();
        } else {
            std::thread::sleep(took * round / 9);
        }
        let Thin {
            ballast,
            base,
            overlay,
            content,
            ..
        } = thin;
        let folder = ballast.kill();
        let below = fs::read(&base).unwrap();
        let found = whole(&overlay);
        check_for(&overlay, &[0, 3]);
        assert_eq!(found.len(), content.len());
        let written = CHUNKS * WRITER_CHUNK;
        assert!(found[written..] == content[written..], "round {round}");
        for (chunk, bytes) in found[..written].chunks(WRITER_CHUNK).enumerate() {
            let at = chunk * WRITER_CHUNK..(chunk + 1) * WRITER_CHUNK;
            assert!(
                bytes == &content[at.clone()] || bytes == &below[at],
                "round {round}: chunk {chunk}"
            );
        }
        // One that has forgotten what was below has all of it.
        fs::remove_file(&base).unwrap();
        let info = Command::new(binary())
            .args(["disk", "info", "-f", "qcow2", "--output", "json"])
            .arg(&overlay)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&info.stdout).into_owned();
        if info.status.success() && !text.contains("base.raw") {
            assert!(whole(&overlay) == found, "round {round}");
            alone += 1;
        }
        drop(folder);
    }
    eprintln!("{alone} of 11 images stood alone");
    assert!(alone >= 1, "the first one does");
}

#[test]
fn how_far_a_job_has_come_is_told_while_it_is_at_work() {
    let mut thin = Thin::boot();
    thin.stream(Some(SLOW));
    let done = |event: &Value| -> u64 {
        let done = event["properties"]["done_bytes"].as_str().unwrap();
        done.parse().unwrap()
    };
    let first = thin.events.wait_for("job-progress");
    assert_eq!(first["source"], "virtio-device");
    let properties = &first["properties"];
    assert_eq!(
        (&properties["job"], &properties["id"], &properties["kind"]),
        (&json!("job0"), &json!("thin"), &json!("stream"))
    );
    assert_eq!(properties["total_bytes"], SIZE.to_string());
    assert!((1..SIZE).contains(&done(&first)), "{first}");
    // So that it comes further, and not to its end.
    let faster = json!({"id": "job0", "speed": 8 * SLOW});
    thin.client.put_json("vm.set-job", &faster);
    let further = |event: &Value| done(event) > done(&first);
    let second = thin.events.wait_after(Mark::START, "job-progress", further);
    assert!(done(&second) < SIZE, "{second}");
    thin.client
        .put_json("vm.set-job", &json!({"id": "job0", "speed": null}));
    thin.events.wait_for("job-completed");
    thin.events.assert_order(&[
        "virtio-device:job-started",
        "virtio-device:job-progress",
        "virtio-device:job-progress",
        "virtio-device:job-completed",
    ]);
}

/// What a disk holds, as its host is full, belongs to no image yet, and goes on to the one that
/// stands alone.
#[test]
fn a_job_that_needs_no_room_ends_while_its_disk_holds_writes_and_loses_none() {
    let ballast = Ballast::start();
    let (mut client, events) = (ballast.api(), ballast.events());
    let folder = ballast.path("small");
    fs::create_dir(&folder).unwrap();
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], &folder) {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    }
    let _mounted = Mounted(folder.clone());
    let base = empty_image(ballast.dir(), "base.raw", SIZE);
    let overlay = folder.join("overlay.qcow2");
    client.put_json(
        "vm.create-disk",
        &json!({
            "path": overlay, "image_type": "Qcow2", "backing_path": base, "backing_type": "Raw",
        }),
    );
    let kernel = disk_writer(ballast.dir(), CHUNKS);
    let config = json!({
        "memory": {"size": 64 * MIB}, "payload": {"kernel": kernel}, "disks": [{
            "id": "thin", "path": overlay, "image_type": "Qcow2", "backing_files": true,
            "pci_device_id": WRITER_SLOT,
        }],
    });
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    events.wait_for_device(Mark::START, "disk-full", "thin");
    client.put_json("vm.stream-disk", &json!({"id": "thin"}));
    // Nothing of an empty base has to be written.
    let event = events.wait_for("job-completed");
    assert_eq!(event["properties"]["copied_bytes"], "0");
    assert!(!open_files(&ballast).contains(&base));
    let info = client.get("vm.disk-info?id=thin");
    assert_eq!(info["backing_chain"], json!([]));
    eventually("what there is no room for is held", || {
        let held = client.get("vm.disk-info?id=thin")["held_requests"].as_u64();
        let counters = client.get("vm.counters");
        let done = counters["thin"]["write_ops"].as_u64();
        (held > Some(0) && held.zip(done).map(|(h, d)| h + d) == Some(CHUNKS as u64)).then_some(())
    });

    assert!(mount(&["-o", "remount,size=16m"], &folder));
    client.put_json("vm.resume-disk", &json!({"id": "thin"}));
    eventually("the guest has written", || {
        let counters = client.get("vm.counters");
        (counters["thin"]["write_ops"] == CHUNKS).then_some(())
    });
    let names = events.names();
    assert!(!names.iter().any(|name| name.ends_with("io-error")));
    client.put("vm.delete");
    check(&overlay);
    let content = whole(&overlay);
    for chunk in 0..CHUNKS {
        let found = &content[chunk * WRITER_CHUNK..][..WRITER_CHUNK];
        assert!(found == writer_chunk(chunk), "chunk {chunk}");
    }
}

/// Goes with the test, even where that fails.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
