//! A VM whose guest writes to an overlay, and what images have: for the tests of jobs on disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::when_free;
use crate::support::artifacts::filled_image;
use crate::support::ballast::{Ballast, binary};
use crate::support::events::Events;
use crate::support::eventually;
use crate::support::http::Client;
use crate::support::payload::{WRITER_CHUNK, WRITER_SLOT, disk_writer, writer_chunk};

pub const MIB: u64 = 1 << 20;
pub const SIZE: u64 = 16 * MIB;
/// What the guest writes at the beginning of its disk.
pub const CHUNKS: usize = 24;
/// Bytes a second, so few that a job never comes to its end in a test.
pub const SLOW: u64 = 64 << 10;

/// A VM whose guest has written to the disk `thin`, an overlay on an image of which each block is
/// something else.
pub struct Thin {
    pub ballast: Ballast,
    pub client: Client,
    pub events: Events,
    pub base: PathBuf,
    pub overlay: PathBuf,
    /// What is in the disk.
    pub content: Vec<u8>,
}

impl Thin {
    pub fn boot() -> Self {
        Self::boot_on(|_, base| base)
    }

    /// With images between the overlay and the last one.
    pub fn boot_on(between: impl FnOnce(&Path, PathBuf) -> PathBuf) -> Self {
        Self::boot_with(between, &[])
    }

    /// And with what `disk io` did to the overlay before.
    pub fn boot_with(between: impl FnOnce(&Path, PathBuf) -> PathBuf, commands: &[&str]) -> Self {
        Self::boot_as(between, commands, &json!({}))
    }

    /// And with these fields of the disk.
    pub fn boot_as(
        between: impl FnOnce(&Path, PathBuf) -> PathBuf,
        commands: &[&str],
        disk: &Value,
    ) -> Self {
        let ballast = Ballast::start();
        let (mut client, events) = (ballast.api(), ballast.events());
        let base = filled_image(ballast.dir(), "base.raw", SIZE);
        let below = between(ballast.dir(), base.clone());
        let overlay = ballast.path("overlay.qcow2");
        let raw = below.extension().is_some_and(|e| e == "raw");
        let format = if raw { "Raw" } else { "Qcow2" };
        client.put_json(
            "vm.create-disk",
            &json!({
                "path": overlay, "image_type": "Qcow2", "backing_path": below,
                "backing_type": format,
            }),
        );
        io(&overlay, commands);
        let mut content = whole(&overlay);
        for chunk in 0..CHUNKS {
            content[chunk * WRITER_CHUNK..][..WRITER_CHUNK].copy_from_slice(&writer_chunk(chunk));
        }
        let kernel = disk_writer(ballast.dir(), CHUNKS);
        let mut config = json!({
            "memory": {"size": 64 * MIB}, "payload": {"kernel": kernel}, "disks": [{
                "id": "thin", "path": overlay, "image_type": "Qcow2", "backing_files": true,
                "pci_device_id": WRITER_SLOT,
            }],
        });
        for (field, value) in disk.as_object().unwrap() {
            config["disks"][0][field] = value.clone();
        }
        if let Some(queues) = disk["num_queues"].as_u64() {
            config["cpus"] = json!({"boot_vcpus": queues, "max_vcpus": queues});
        }
        client.put_json("vm.create", &config);
        client.put("vm.boot");
        Self {
            ballast,
            client,
            events,
            base,
            overlay,
            content,
        }
    }

    pub fn stream(&mut self, speed: Option<u64>) -> Value {
        self.begin("vm.stream-disk", speed)
    }

    pub fn commit(&mut self, speed: Option<u64>) -> Value {
        self.begin("vm.commit-disk", speed)
    }

    fn begin(&mut self, operation: &str, speed: Option<u64>) -> Value {
        let body = json!({"id": "thin", "speed": speed});
        self.client.put_json(operation, &body).json()
    }

    /// The disk as `vm.info` has it.
    pub fn config(&mut self) -> Value {
        self.client.get("vm.info")["config"]["disks"][0].clone()
    }

    /// What is below the disk's image.
    pub fn chain(&mut self) -> Value {
        self.client.get("vm.disk-info?id=thin")["backing_chain"].clone()
    }

    pub fn jobs(&mut self) -> Value {
        self.client.get("vm.jobs")
    }

    /// While this job is at work nothing else is done with the disk; metrics tell of it.
    pub fn is_the_only_one(&mut self, job: &str, kind: &str) {
        let overlay = self.ballast.path("new");
        let moved = json!({"disks": [{"id": "thin", "path": overlay}]});
        let larger = json!({"id": "thin", "desired_size": 2 * SIZE});
        for (path, body) in [
            ("vm.commit-disk", json!({"id": "thin"})),
            ("vm.stream-disk", json!({"id": "thin"})),
            ("vm.snapshot-disk", moved),
            ("vm.resize-disk", larger),
        ] {
            let answer = self.client.try_put_json(path, &body);
            assert_eq!(answer.status, 409, "{path}: {}", answer.text());
            let named = answer.reasons().contains(&format!("`{job}` ({kind})"));
            assert!(named, "{path}");
        }
        assert!(!overlay.exists());
        let metrics = self.client.request("GET", "metrics", None).text();
        let line = format!(
            "ballast_disk_job_total_bytes{{device=\"thin\",job=\"{job}\",kind=\"{kind}\"}}"
        );
        assert!(metrics.contains(&line), "{metrics}");
    }

    /// Waits until the guest has written all it writes.
    pub fn settle(&mut self) {
        eventually("the guest has written", || {
            let counters = self.client.get("vm.counters");
            (counters["thin"]["write_ops"] == CHUNKS).then_some(())
        });
    }
}

/// An image's content. Waits while a process that was killed still has it.
pub fn whole(image: &Path) -> Vec<u8> {
    if image.extension().is_some_and(|e| e == "raw") {
        return fs::read(image).unwrap();
    }
    let raw = image.with_extension("whole");
    when_free(image, || {
        let _ = fs::remove_file(&raw);
        let mut convert = Command::new(binary());
        convert.args(["disk", "convert", "-f", "qcow2", "-O", "raw"]);
        convert.arg("--backing-files").args([image, &raw]);
        convert
    });
    fs::read(raw).unwrap()
}

/// Has `ballast disk io` do something to a qcow2 image.
pub fn io(image: &Path, commands: &[&str]) {
    if commands.is_empty() {
        return;
    }
    let mut io = Command::new(binary());
    io.args(["disk", "io", "-f", "qcow2", "--backing-files"]);
    for command in commands {
        io.args(["-c", command]);
    }
    let done = io.arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{commands:?}: {text}");
}

/// Our own `check`, and QEMU's where there is one: nothing is wrong, nothing is lost.
pub fn check(image: &Path) {
    check_for(image, &[0]);
}

/// With these exit codes; 3 is that of leaked clusters, and of nothing worse.
pub fn check_for(image: &Path, codes: &[i32]) {
    let ours = Command::new(binary())
        .args(["disk", "check", "-q", "-f", "qcow2"])
        .arg(image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ours.stderr).into_owned();
    let fits = |code: Option<i32>| code.is_some_and(|code| codes.contains(&code));
    assert!(fits(ours.status.code()), "{image:?}: {ours:?} {text}");
    let theirs = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2"])
        .arg(image)
        .output();
    assert!(theirs.map_or(true, |theirs| fits(theirs.status.code())));
}

/// Whether there is a qemu-img, which must then do this.
pub fn qemu_img(arguments: &[&str], images: &[&Path]) -> bool {
    match Command::new("qemu-img")
        .args(arguments)
        .args(images)
        .output()
    {
        Ok(done) => {
            let text = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "{arguments:?} {images:?}: {text}");
            true
        }
        Err(_) => {
            eprintln!("SKIPPED: there is no qemu-img for {arguments:?}");
            false
        }
    }
}

/// Files that the process has open.
pub fn open_files(ballast: &Ballast) -> Vec<PathBuf> {
    let folder = fs::read_dir(format!("/proc/{}/fd", ballast.pid())).unwrap();
    folder
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .collect()
}
