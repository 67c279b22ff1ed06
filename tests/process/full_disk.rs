//! A host that runs full under a guest's writes: a real process, a guest of a few instructions that
//! is a driver, and a file system of one MiB that can be made larger.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::before;
use crate::support::artifacts::empty_image;
use crate::support::ballast::Ballast;
use crate::support::events::{Events, Mark};
use crate::support::eventually;
use crate::support::http::Client;
use crate::support::payload::{WRITER_CHUNK, WRITER_SLOT, disk_writer, writer_chunk};

const MIB: u64 = 1 << 20;
/// More than fits.
const CHUNKS: usize = 24;

/// A process whose folder has a file system of one MiB in it, with a sparse image of 8 MiB.
struct Full {
    ballast: Option<Ballast>,
    client: Client,
    events: Events,
    folder: PathBuf,
}

impl Full {
    /// Boots the writing guest; `None`, loudly, where nothing can be mounted.
    fn boot(disk: Value) -> Option<Self> {
        let ballast = Ballast::start();
        let folder = ballast.path("small");
        fs::create_dir(&folder).unwrap();
        if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], &folder) {
            eprintln!("SKIPPED: no tmpfs can be mounted here");
            return None;
        }
        let (client, events) = (ballast.api(), ballast.events());
        let kernel = disk_writer(ballast.dir(), CHUNKS);
        let mut full = Self {
            ballast: Some(ballast),
            client,
            events,
            folder,
        };
        let image = empty_image(&full.folder, "image", 8 * MIB);
        let mut config = json!({
            "id": "thin", "path": image, "pci_device_id": WRITER_SLOT,
        });
        for (name, value) in disk.as_object().unwrap() {
            config[name] = value.clone();
        }
        let config = json!({
            "memory": {"size": 64 * MIB}, "payload": {"kernel": kernel}, "disks": [config],
        });
        full.client.put_json("vm.create", &config);
        full.client.put("vm.boot");
        Some(full)
    }

    fn add_space(&self) {
        assert!(mount(&["-o", "remount,size=16m"], &self.folder));
    }

    fn info(&mut self) -> Value {
        self.client.get("vm.disk-info?id=thin")
    }

    /// Waits until each chunk is either acknowledged or held; how many are acknowledged.
    fn settle(&mut self) -> usize {
        eventually("all writes are done or held", || {
            let held = self.info()["held_requests"].as_u64().unwrap();
            let counters = self.client.get("vm.counters");
            let done = counters["thin"]["write_ops"].as_u64().unwrap();
            (held + done == CHUNKS as u64).then_some(done as usize)
        })
    }

    #[track_caller]
    fn assert_written(&self, chunks: usize) {
        let file = File::open(self.folder.join("image")).unwrap();
        for chunk in 0..chunks {
            let mut bytes = vec![0; WRITER_CHUNK];
            let offset = (chunk * WRITER_CHUNK) as u64;
            file.read_exact_at(&mut bytes, offset).unwrap();
            assert!(bytes == writer_chunk(chunk), "chunk {chunk}");
        }
    }

    #[track_caller]
    fn assert_no_io_error(&self) {
        let names = self.events.names();
        assert!(
            !names.iter().any(|name| name.ends_with("io-error")),
            "{names:?}"
        );
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        self.ballast = None;
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
        let _ = fs::remove_dir_all(self.folder.parent().unwrap());
    }
}

pub fn mount(arguments: &[&str], folder: &std::path::Path) -> bool {
    let status = Command::new("mount").args(arguments).arg(folder).status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn a_full_host_is_an_event_and_no_io_error_and_space_that_is_added_ends_it() {
    for disk in [
        json!({}),
        json!({"direct": true}),
        json!({"disable_io_uring": true}),
    ] {
        let Some(mut full) = Full::boot(disk) else {
            return;
        };
        let event = full
            .events
            .wait_for_device(Mark::START, "disk-full", "thin");
        assert_eq!(event["properties"]["action"], "hold");
        assert_eq!(
            event["properties"]["needed_bytes"],
            WRITER_CHUNK.to_string()
        );
        let free: u64 = event["properties"]["free_bytes"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!(free < WRITER_CHUNK as u64);
        let done = full.settle();
        assert!((8..CHUNKS).contains(&done), "{done}");
        assert_eq!(full.client.state(), "Running");
        let info = full.info();
        let held = (CHUNKS - done) as u64;
        assert_eq!(info["held_bytes"], held * WRITER_CHUNK as u64);
        assert_eq!(
            (&info["virtual_size"], &info["file_size"]),
            (&json!(8 * MIB), &json!(8 * MIB))
        );
        assert_eq!(
            (&info["host_total"], &info["on_enospc"]),
            (&json!(MIB), &json!("hold"))
        );
        assert!(info["allocated_size"].as_u64().unwrap() <= MIB);
        full.add_space();
        full.client
            .put_json("vm.resume-disk", &json!({"id": "thin"}));
        let end = full
            .events
            .wait_for_device(Mark::START, "disk-resumed", "thin");
        assert_eq!(end["properties"]["outcome"], "done");
        assert_eq!(full.settle(), CHUNKS);
        full.assert_written(CHUNKS);
        full.assert_no_io_error();
    }
}

#[test]
fn a_disk_whose_host_is_full_moves_on_to_an_overlay_elsewhere_and_nothing_is_lost() {
    for policy in ["hold", "pause-vm"] {
        let Some(mut full) = Full::boot(json!({"on_enospc": policy})) else {
            return;
        };
        full.events.wait_for("disk-full");
        let before = match policy {
            "hold" => full.settle(),
            _ => {
                full.events.wait_for("paused");
                0
            }
        };
        let overlay = full.ballast.as_ref().unwrap().path("overlay.qcow2");
        let body = json!({"disks": [{"id": "thin", "path": overlay}]});
        full.client.put_json("vm.snapshot-disk", &body);
        if policy == "pause-vm" {
            assert_eq!(full.client.state(), "Paused");
            let body = json!({"id": "thin"});
            full.client.put_json("vm.resume-disk", &body);
        }
        let end = full.events.wait_for("disk-resumed");
        assert_eq!(end["properties"]["outcome"], "done");
        assert_eq!(full.settle(), CHUNKS);
        full.assert_no_io_error();
        full.assert_written(before);
        let chain = full.info()["backing_chain"].clone();
        assert_eq!(chain[0]["path"], json!(full.folder.join("image")));
        full.client.put("vm.shutdown");
        let raw = overlay.with_extension("raw");
        let ballast = crate::support::ballast::binary();
        let mut convert = Command::new(ballast);
        convert.args([
            "disk",
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "--backing-files",
        ]);
        assert!(convert.arg(&overlay).arg(&raw).status().unwrap().success());
        let content = fs::read(&raw).unwrap();
        for chunk in 0..CHUNKS {
            let bytes = &content[chunk * WRITER_CHUNK..][..WRITER_CHUNK];
            assert!(bytes == writer_chunk(chunk), "{policy}: chunk {chunk}");
        }
    }
}

#[test]
fn what_was_acknowledged_survives_a_sigkill_while_the_rest_is_held() {
    for disk in [json!({}), json!({"disable_io_uring": true})] {
        let Some(mut full) = Full::boot(disk) else {
            return;
        };
        full.events.wait_for("disk-full");
        let done = full.settle();
        let folder = full.ballast.take().unwrap().kill();
        full.assert_written(done);
        drop(full);
        drop(folder);
    }
}

#[test]
fn a_vm_that_is_to_pause_pauses_until_its_disk_is_resumed() {
    for verb in ["vm.resume-disk", "vm.resume"] {
        let Some(mut full) = Full::boot(json!({"on_enospc": "pause-vm"})) else {
            return;
        };
        let event = full.events.wait_for("disk-full");
        assert_eq!(event["properties"]["action"], "pause-vm");
        full.events.wait_for("paused");
        assert_eq!(full.client.state(), "Paused");
        // In vain: it is told and paused again.
        let mark = full.events.mark();
        full.client
            .put_json("vm.resume-disk", &json!({"id": "thin"}));
        full.events.wait_after(mark, "resumed", |_| true);
        full.events.wait_after(mark, "disk-full", |_| true);
        full.events.wait_after(mark, "paused", |_| true);
        full.add_space();
        let mark = full.events.mark();
        match verb {
            "vm.resume" => drop(full.client.put(verb)),
            _ => drop(full.client.put_json(verb, &json!({"id": "thin"}))),
        }
        full.events.wait_after(mark, "disk-resumed", |_| true);
        assert_eq!(full.settle(), CHUNKS);
        assert_eq!(full.client.state(), "Running");
        full.assert_written(CHUNKS);
        full.assert_no_io_error();
    }
}

#[test]
fn a_pause_by_a_client_is_not_undone_by_resuming_a_disk() {
    let Some(mut full) = Full::boot(json!({})) else {
        return;
    };
    full.events.wait_for("disk-full");
    full.client.put("vm.pause");
    full.add_space();
    full.client
        .put_json("vm.resume-disk", &json!({"id": "thin"}));
    assert_eq!(full.client.state(), "Paused");
    assert!(full.info()["held_requests"].as_u64().unwrap() > 0);
    full.client.put("vm.resume");
    full.events.wait_for("disk-resumed");
    full.settle();
    full.assert_written(CHUNKS);
}

#[test]
fn a_vm_whose_disk_holds_can_be_paused_rebooted_shut_down_and_deleted() {
    for verb in ["vm.reboot", "vm.shutdown", "vm.delete", "vmm.shutdown"] {
        let Some(mut full) = Full::boot(json!({})) else {
            return;
        };
        full.events.wait_for("disk-full");
        let mark = full.events.mark();
        full.client.put("vm.pause");
        full.client.put("vm.resume");
        full.client.put(verb);
        let end = full.events.wait_after(mark, "disk-resumed", |_| true);
        assert_eq!(end["properties"]["outcome"], "reset", "{verb}");
        if verb == "vmm.shutdown" {
            full.ballast.as_mut().unwrap().wait_for_clean_end();
        } else {
            full.ballast.as_mut().unwrap().assert_well();
        }
    }
}

#[test]
fn a_grace_ends_and_reporting_is_at_once() {
    for (disk, held) in [
        (json!({"enospc_grace_ms": 100}), true),
        (json!({"on_enospc": "report"}), false),
    ] {
        let Some(full) = Full::boot(disk) else { return };
        let error = full.events.wait_for("io-error");
        assert_eq!(error["properties"]["operation"], "write");
        let told = full.events.names().iter().any(|n| n.ends_with("disk-full"));
        assert_eq!(told, held);
        if held {
            let end = full.events.wait_for("disk-resumed");
            assert_eq!(end["properties"]["outcome"], "reported");
        }
    }
}

#[test]
fn what_is_given_up_fails_and_a_vm_that_was_paused_for_it_goes_on() {
    for policy in ["hold", "pause-vm"] {
        let Some(mut full) = Full::boot(json!({"on_enospc": policy})) else {
            return;
        };
        let last = if policy == "hold" {
            "disk-full"
        } else {
            "paused"
        };
        full.events.wait_for(last);
        full.settle();
        let body = json!({"id": "thin", "give_up": true});
        full.client.put_json("vm.resume-disk", &body);
        full.events.wait_for("io-error");
        let end = full.events.wait_for("disk-resumed");
        assert_eq!(end["properties"]["outcome"], "reported", "{policy}");
        assert_eq!(full.client.state(), "Running");
        assert_eq!(full.info()["held_requests"], 0);
    }
}

#[test]
fn marks_are_told_as_they_are_passed_both_ways() {
    let disk = json!({"space_watermarks": [60, 90], "write_threshold": MIB / 2});
    let Some(full) = Full::boot(disk) else { return };
    let is = |of: &'static str, level: &'static str, direction: &'static str| {
        move |event: &Value| {
            let properties = &event["properties"];
            properties["of"] == of
                && properties["level_percent"] == level
                && properties["direction"] == direction
        }
    };
    let host = full.events.wait_after(
        Mark::START,
        "disk-space",
        is("host-file-system", "90", "rising"),
    );
    assert_eq!(host["properties"]["total_bytes"], MIB.to_string());
    let image = is("write-threshold", "100", "rising");
    full.events.wait_after(Mark::START, "disk-space", image);
    let mark = full.events.mark();
    full.add_space();
    let below = is("host-file-system", "0", "falling");
    full.events.wait_after(mark, "disk-space", below);
}

#[test]
fn a_disk_grows_while_it_is_in_use_and_what_can_not_be_is_refused() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let image = empty_image(ballast.dir(), "image", 8 * MIB);
    let readonly = empty_image(ballast.dir(), "readonly", 8 * MIB);
    let mut config = ballast.sleeper();
    config["balloon"] = json!({"size": 0});
    config["disks"] = json!([
        {"id": "a disk", "path": image},
        {"id": "r", "path": readonly, "readonly": true},
    ]);
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    let before = before(&ballast, &mut client);
    let size = |client: &mut Client, query: &str| {
        let info = client.get(&format!("vm.disk-info?{query}"));
        (info["virtual_size"].clone(), info["file_size"].clone())
    };
    let shown = size(&mut client, "id=a%20disk");
    for (id, size, status) in [
        ("a disk", json!(8 * MIB - 512), 400),
        ("a disk", json!(0), 400),
        ("a disk", json!(8 * MIB + 1), 400),
        ("a disk", json!(1_u64 << 63), 400),
        ("a disk", json!(u64::MAX - 511), 400),
        ("a disk", json!(-1), 400),
        ("a disk", json!(1.5), 400),
        ("a disk", json!("1"), 400),
        ("a disk", json!(null), 400),
        ("r", json!(16 * MIB), 400),
        ("__balloon", json!(16 * MIB), 400),
        ("nobody", json!(16 * MIB), 404),
        ("", json!(16 * MIB), 404),
    ] {
        let body = json!({"id": id, "desired_size": size});
        let answer = client.try_put_json("vm.resize-disk", &body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        let named = if id == "__balloon" {
            "id"
        } else {
            "desired_size"
        };
        assert!(
            status == 404 || answer.reasons().contains(named),
            "{}",
            answer.text()
        );
        before.assert_unchanged(&mut ballast, &mut client, &body.to_string());
    }
    assert_eq!(size(&mut client, "id=a+disk"), shown);
    for (path, status) in [
        ("vm.disk-info", 400),
        ("vm.disk-info?id=", 400),
        ("vm.disk-info?id=%FF", 400),
        ("vm.disk-info?id=nobody", 404),
        ("vm.disk-info?id=__balloon", 400),
    ] {
        let answer = client.request("GET", path, None);
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
    }
    let resume = |id: &str| json!({"id": id});
    assert_eq!(
        client
            .try_put_json("vm.resume-disk", &resume("nobody"))
            .status,
        404
    );
    assert_eq!(
        client
            .try_put_json("vm.resume-disk", &resume("__balloon"))
            .status,
        400
    );

    // The same size is no change; more is.
    for size in [8 * MIB, 9 * MIB, 1 << 40] {
        let body = json!({"id": "a disk", "desired_size": size});
        client.put_json("vm.resize-disk", &body);
        let info = client.get("vm.disk-info?id=a%20disk");
        assert_eq!(info["virtual_size"], size);
        assert_eq!(fs::metadata(&image).unwrap().len(), size);
    }
    before.assert_unchanged(&mut ballast, &mut client, "resizing");
}

#[test]
fn settings_for_a_full_host_that_make_no_sense_are_refused_by_field() {
    let ballast = Ballast::start();
    let image = empty_image(ballast.dir(), "image", MIB);
    for (field, value) in [
        ("on_enospc", json!("stop")),
        ("on_enospc", json!(1)),
        ("enospc_grace_ms", json!(0)),
        ("enospc_grace_ms", json!(-1)),
        ("write_threshold", json!(0)),
        ("write_threshold", json!("1G")),
        ("space_watermarks", json!([0])),
        ("space_watermarks", json!([100])),
        ("space_watermarks", json!([90, 75])),
        ("space_watermarks", json!([75, 75])),
        ("space_watermarks", json!([1, 2, 3, 4, 5, 6, 7, 8, 9])),
        ("space_watermarks", json!(75)),
        ("detect_zeroes", json!("maybe")),
    ] {
        let mut disk = json!({"path": image});
        disk[field] = value;
        let mut config = ballast.sleeper();
        config["disks"] = json!([disk]);
        let answer = ballast.api().try_put_json("vm.create", &config);
        assert_eq!(answer.status, 400, "{disk}");
        let reasons = answer.reasons();
        assert!(reasons.contains(&format!("disks[0].{field}")), "{reasons}");
    }
    for (field, disk) in [
        (
            "detect_zeroes",
            json!({"path": image, "detect_zeroes": "unmap", "sparse": false}),
        ),
        (
            "enospc_grace_ms",
            json!({"path": image, "on_enospc": "report", "enospc_grace_ms": 5}),
        ),
    ] {
        let answer = ballast.api().try_put_json("vm.add-disk", &disk);
        assert_eq!(answer.status, 404, "there is no VM");
        let mut config = ballast.sleeper();
        config["disks"] = json!([disk]);
        let answer = ballast.api().try_put_json("vm.create", &config);
        assert!(answer.reasons().contains(field), "{}", answer.text());
    }
}
