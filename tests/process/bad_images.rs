//! Images in odd places, and images that somebody else meddles with: a clear 4xx that names the
//! field, nothing changed, nothing half-made left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::before;
use super::full_disk::mount;
use crate::support::artifacts::empty_image;
use crate::support::ballast::Ballast;
use crate::support::http::Client;

const MIB: u64 = 1 << 20;

/// A file system of its own, for as long as it lives; `None`, loudly, where nothing can be mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(ballast: &Ballast, options: &str) -> Option<Self> {
        let folder = ballast.path("mounted");
        fs::create_dir(&folder).unwrap();
        if !mount(&["-t", "tmpfs", "-o", options, "tmpfs"], &folder) {
            eprintln!("SKIPPED: no tmpfs can be mounted here");
            return None;
        }
        Some(Self(folder))
    }

    fn names(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process that failed its test may still have it open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn create(client: &mut Client, path: &Path, size: u64) {
    let disk = json!({"path": path, "image_type": "Qcow2", "size": size});
    client.put_json("vm.create-disk", &disk);
}

fn boot(ballast: &Ballast, client: &mut Client, disks: Value) {
    let mut config = ballast.sleeper();
    config["disks"] = disks;
    client.put_json("vm.create", &config);
    client.put("vm.boot");
}

fn refused(client: &mut Client, operation: &str, body: &Value, field: &str, why: &str) {
    let answer = client.try_put_json(operation, body).expect(400);
    let reasons = answer.reasons();
    assert!(
        reasons.contains(field) && reasons.contains(why),
        "{body}: {reasons}"
    );
}

#[test]
fn a_thin_image_that_is_no_file_is_refused_by_its_path() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let at = |name: &str| ballast.path(name);
    fs::create_dir(at("folder")).unwrap();
    let made = Command::new("mkfifo").arg(at("fifo")).status();
    assert!(made.unwrap().success());
    let odd = [
        (at("folder"), "directory"),
        (at("fifo"), "FIFO"),
        ("/dev/zero".into(), "character device"),
        ("/proc/self/mem".into(), ""),
        (
            empty_image(ballast.dir(), "empty", 0),
            "ends within its header",
        ),
        (empty_image(ballast.dir(), "blank", MIB), "not a qcow2"),
    ];
    boot(&ballast, &mut client, json!([]));
    let before = before(&ballast, &mut client);
    for (path, why) in &odd {
        for readonly in [false, true] {
            let disk = json!({"path": path, "image_type": "Qcow2", "readonly": readonly});
            refused(&mut client, "vm.add-disk", &disk, "path", why);
            before.assert_unchanged(&mut ballast, &mut client, &disk.to_string());
        }
    }
    for (path, _) in &odd[..3] {
        // As what lies below a new one.
        let new = json!({"path": ballast.path("new"), "image_type": "Qcow2",
            "backing_path": path, "backing_type": "Raw"});
        refused(&mut client, "vm.create-disk", &new, "backing_path", "");
        assert!(!ballast.path("new").exists());
    }
}

#[test]
fn a_read_only_file_system_is_refused_for_what_would_be_written() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let Some(mounted) = Mounted::new(&ballast, "size=8m") else {
        return;
    };
    let raw = empty_image(&mounted.0, "raw", MIB);
    let thin = mounted.0.join("thin");
    create(&mut client, &thin, MIB);
    assert!(mount(&["-o", "remount,ro"], &mounted.0));
    let own = empty_image(ballast.dir(), "own", MIB);
    boot(&ballast, &mut client, json!([{"path": own, "id": "own"}]));
    let before = before(&ballast, &mut client);
    let why = "Read-only file system";
    for (path, image_type) in [(&raw, "Raw"), (&thin, "Qcow2")] {
        let disk = json!({"path": path, "image_type": image_type});
        refused(&mut client, "vm.add-disk", &disk, "path", why);
    }
    let new = mounted.0.join("new");
    let overlay = json!({"disks": [{"id": "own", "path": new}]});
    let operation = "vm.snapshot-disk";
    refused(&mut client, operation, &overlay, "disks[0].path", why);
    before.assert_unchanged(&mut ballast, &mut client, "a read-only file system");
    assert_eq!(mounted.names(), 2);
    // What is only read may be there.
    let disk = json!({"path": thin, "image_type": "Qcow2", "readonly": true});
    client.put_json("vm.add-disk", &disk);
    client.put("vm.delete");
}

#[test]
fn a_full_file_system_is_refused_for_overlays_and_for_tables_that_grow() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let Some(mounted) = Mounted::new(&ballast, "size=1m") else {
        return;
    };
    let thin = mounted.0.join("thin");
    create(&mut client, &thin, MIB);
    let own = empty_image(ballast.dir(), "own", MIB);
    let disks = json!([
        {"path": own, "id": "own"}, {"path": thin, "id": "thin", "image_type": "Qcow2"},
    ]);
    boot(&ballast, &mut client, disks);
    let filler = vec![1; 2 << 20];
    // As much as there is room for.
    let _ = fs::write(mounted.0.join("filler"), filler);
    let before = before(&ballast, &mut client);
    let overlay = json!({"disks": [{"id": "own", "path": mounted.0.join("new")}]});
    let operation = "vm.snapshot-disk";
    refused(
        &mut client,
        operation,
        &overlay,
        "disks[0].path",
        "no space",
    );
    // An L1 table of many clusters.
    let larger = json!({"id": "thin", "desired_size": 1_u64 << 50});
    refused(
        &mut client,
        "vm.resize-disk",
        &larger,
        "desired_size",
        "no space",
    );
    assert_eq!(client.get("vm.disk-info?id=thin")["virtual_size"], MIB);
    before.assert_unchanged(&mut ballast, &mut client, "a full file system");
    assert_eq!(mounted.names(), 2);
    client.put("vm.delete");
}

#[test]
fn an_image_that_is_cut_short_or_replaced_under_a_vm_breaks_nothing_else() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let raw = empty_image(ballast.dir(), "raw", 8 * MIB);
    let thin = ballast.path("thin");
    create(&mut client, &thin, 8 * MIB);
    let disks = json!([
        {"path": raw, "id": "raw"}, {"path": thin, "id": "thin", "image_type": "Qcow2"},
    ]);
    boot(&ballast, &mut client, disks);
    for path in [&raw, &thin] {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(4096).unwrap();
    }
    for id in ["raw", "thin"] {
        let info = client.get(&format!("vm.disk-info?id={id}"));
        assert_eq!(
            (&info["virtual_size"], &info["file_size"]),
            (&json!(8 * MIB), &json!(4096))
        );
    }
    // Another file where the image was, which must not come to lie below an overlay.
    fs::rename(&raw, ballast.path("away")).unwrap();
    empty_image(ballast.dir(), "raw", 8 * MIB);
    let before = before(&ballast, &mut client);
    let overlay = json!({"disks": [{"id": "raw", "path": ballast.path("new")}]});
    let operation = "vm.snapshot-disk";
    refused(
        &mut client,
        operation,
        &overlay,
        "disks[0].id",
        "no longer at",
    );
    assert!(!ballast.path("new").exists());
    before.assert_unchanged(&mut ballast, &mut client, "a replaced image");
    client.put("vm.pause");
    client.put("vm.resume");
    client.put("vm.delete");
    ballast.assert_well();
}

#[test]
fn a_backing_file_that_is_replaced_is_refused_at_the_next_boot_if_it_is_no_image() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let base = empty_image(ballast.dir(), "base", MIB);
    let top = ballast.path("top");
    let overlay = json!({"path": top, "image_type": "Qcow2", "backing_path": "base",
        "backing_type": "Raw"});
    client.put_json("vm.create-disk", &overlay);
    let disk = json!([{"path": top, "id": "a", "image_type": "Qcow2", "backing_files": true}]);
    boot(&ballast, &mut client, disk);
    fs::rename(&base, ballast.path("away")).unwrap();
    fs::create_dir(&base).unwrap();
    // What is open stays open.
    let chain = client.get("vm.disk-info?id=a")["backing_chain"].clone();
    assert_eq!(chain[0]["path"], json!(base));
    client.put("vm.shutdown");
    let before = before(&ballast, &mut client);
    let answer = client.request("PUT", "vm.boot", None).expect(400);
    let reasons = answer.reasons();
    assert!(
        reasons.contains("path") && reasons.contains("directory"),
        "{reasons}"
    );
    before.assert_unchanged(&mut ballast, &mut client, "a replaced backing file");
    fs::remove_dir(&base).unwrap();
    fs::rename(ballast.path("away"), &base).unwrap();
    client.put("vm.boot");
}

#[test]
fn a_second_process_is_refused_the_image_of_the_first() {
    let first = Ballast::start();
    let mut second = Ballast::start();
    let mut client = first.api();
    let raw = empty_image(first.dir(), "raw", MIB);
    let thin = first.path("thin");
    create(&mut client, &thin, MIB);
    let disks = json!([{"path": raw}, {"path": thin, "image_type": "Qcow2"}]);
    boot(&first, &mut client, disks);
    let mut other = second.api();
    boot(&second, &mut other, json!([]));
    let before = before(&second, &mut other);
    for (path, image_type) in [(&raw, "Raw"), (&thin, "Qcow2")] {
        for readonly in [false, true] {
            let disk = json!({"path": path, "image_type": image_type, "readonly": readonly});
            let answer = other.try_put_json("vm.add-disk", &disk).expect(409);
            let named = answer.reasons().contains(&*path.to_string_lossy());
            assert!(named, "{}", answer.reasons());
        }
    }
    before.assert_unchanged(&mut second, &mut other, "images in use");
}
