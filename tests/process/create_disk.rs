//! `vm.create-disk`: images that can't be made leave nothing behind, and those that can are what
//! was asked for.

use std::os::unix::fs::MetadataExt;

use serde_json::json;

use super::before;
use super::full_disk::mount;
use crate::support::artifacts::empty_image;
use crate::support::ballast::Ballast;

#[test]
fn an_image_is_made_with_and_without_a_vm_and_can_be_added_as_a_disk() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    let made = |name: &str| ballast.path(name);
    let thin = json!({"path": made("thin.qcow2"), "image_type": "Qcow2", "size": 1_u64 << 40});
    client.put_json("vm.create-disk", &thin);
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let raw = json!({"path": made("new.raw"), "image_type": "Raw", "size": 1 << 20});
    client.put_json("vm.create-disk", &raw);
    // Its backing file lies beside it.
    let overlay = json!({
        "path": made("overlay.qcow2"), "image_type": "Qcow2",
        "backing_path": "new.raw", "backing_type": "Raw"
    });
    client.put_json("vm.create-disk", &overlay);
    for (name, expected) in [("thin.qcow2", 1_u64 << 40), ("overlay.qcow2", 1 << 20)] {
        let bytes = std::fs::read(made(name)).unwrap();
        let size = u64::from_be_bytes(bytes[24..32].try_into().unwrap());
        assert_eq!((&bytes[..4], size), (&b"QFI\xfb"[..], expected));
        let disk = json!({
            "path": made(name), "image_type": "Qcow2", "readonly": true, "backing_files": true
        });
        client.put_json("vm.add-disk", &disk);
    }
    client.put_json(
        "vm.add-disk",
        &json!({"path": made("new.raw"), "id": "raw", "readonly": true}),
    );
}

#[test]
fn images_that_can_not_be_made_are_refused_by_field_and_leave_nothing() {
    let mut ballast = Ballast::start();
    std::fs::write(ballast.path("there"), "mine").unwrap();
    std::fs::create_dir(ballast.path("folder")).unwrap();
    empty_image(ballast.dir(), "base", 1 << 20);
    let path = |name: &str| json!(ballast.path(name));
    let (new, size) = (path("new"), json!(1 << 20));
    let missing = path("missing");
    for (field, disk) in [
        (
            "path",
            json!({"path": path("there"), "image_type": "Raw", "size": size}),
        ),
        (
            "path",
            json!({"path": path("folder"), "image_type": "Qcow2", "size": size}),
        ),
        (
            "path",
            json!({"path": path("no/such"), "image_type": "Qcow2", "size": size}),
        ),
        (
            "path",
            json!({"path": "/proc/new", "image_type": "Qcow2", "size": size}),
        ),
        (
            "path",
            json!({"path": "/", "image_type": "Qcow2", "size": size}),
        ),
        (
            "path",
            json!({"path": "", "image_type": "Qcow2", "size": size}),
        ),
        ("path", json!({"image_type": "Qcow2", "size": size})),
        ("image_type", json!({"path": new, "size": size})),
        (
            "image_type",
            json!({"path": new, "image_type": "Unknown", "size": size}),
        ),
        (
            "image_type",
            json!({"path": new, "image_type": "Vmdk", "size": size}),
        ),
        ("size", json!({"path": new, "image_type": "Qcow2"})),
        (
            "size",
            json!({"path": new, "image_type": "Qcow2", "size": 0}),
        ),
        (
            "size",
            json!({"path": new, "image_type": "Raw", "size": 513}),
        ),
        (
            "size",
            json!({"path": new, "image_type": "Qcow2", "size": u64::MAX}),
        ),
        (
            "size",
            json!({"path": new, "image_type": "Qcow2", "size": 1_u64 << 62}),
        ),
        (
            "cluster_size",
            json!({"path": new, "image_type": "Qcow2", "size": size, "cluster_size": 3}),
        ),
        (
            "cluster_size",
            json!({"path": new, "image_type": "Raw", "size": size, "cluster_size": 4096}),
        ),
        (
            "refcount_bits",
            json!({"path": new, "image_type": "Qcow2", "size": size, "refcount_bits": 5}),
        ),
        (
            "preallocation",
            json!({"path": new, "image_type": "Qcow2", "size": size, "preallocation": "some"}),
        ),
        (
            "preallocation",
            json!({"path": new, "image_type": "Raw", "size": size, "preallocation": "metadata"}),
        ),
        (
            "preallocation",
            json!({"path": new, "image_type": "Raw", "size": 1 << 30, "preallocation": "full"}),
        ),
        (
            "preallocation",
            json!({"path": new, "image_type": "Qcow2", "size": 1_u64 << 45, "preallocation": "metadata"}),
        ),
        (
            "preallocation",
            json!({"path": new, "image_type": "Qcow2", "preallocation": "full", "extended_l2": false,
                "backing_path": "base", "backing_type": "Raw"}),
        ),
        (
            "backing_type",
            json!({"path": new, "image_type": "Qcow2", "backing_path": "there"}),
        ),
        (
            "backing_path",
            json!({"path": new, "image_type": "Qcow2", "size": size, "backing_type": "Raw"}),
        ),
        (
            "backing_path",
            json!({"path": new, "image_type": "Qcow2", "backing_path": missing, "backing_type": "Raw"}),
        ),
        (
            "backing_path",
            json!({"path": new, "image_type": "Qcow2", "backing_path": "there", "backing_type": "Qcow2"}),
        ),
        (
            "backing_path",
            json!({"path": new, "image_type": "Qcow2", "backing_path": "/dev/zero", "backing_type": "Raw"}),
        ),
        (
            "backing_path",
            json!({"path": new, "image_type": "Qcow2", "backing_path": "nbd:x", "backing_type": "Raw"}),
        ),
    ] {
        let mut client = ballast.api();
        let before = before(&ballast, &mut client);
        let answer = client.try_put_json("vm.create-disk", &disk).expect(400);
        assert!(
            answer.reasons().contains(field),
            "{field}: {}",
            answer.reasons()
        );
        before.assert_unchanged(&mut ballast, &mut client, field);
    }
    assert!(!ballast.path("new").exists());
    assert_eq!(std::fs::read(ballast.path("there")).unwrap(), b"mine");
    ballast.assert_well();
}

#[test]
fn space_is_allocated_beforehand_as_far_as_is_asked_for() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    for (number, (kind, image_type, is_there)) in [
        ("off", "Raw", false),
        ("falloc", "Raw", true),
        ("full", "Raw", true),
        ("off", "Qcow2", false),
        ("metadata", "Qcow2", false),
        ("falloc", "Qcow2", true),
        ("full", "Qcow2", true),
    ]
    .into_iter()
    .enumerate()
    {
        let path = ballast.path(&number.to_string());
        let disk = json!({
            "path": path, "image_type": image_type, "size": 6 << 20, "preallocation": kind
        });
        client.put_json("vm.create-disk", &disk);
        let blocks = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!(blocks >= 6 << 20, is_there, "{disk}: {blocks}");
    }
    ballast.assert_well();
}

#[test]
fn a_host_without_space_is_the_fault_of_the_path_and_keeps_nothing() {
    let mut ballast = Ballast::start();
    let folder = ballast.path("small");
    std::fs::create_dir(&folder).unwrap();
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], &folder) {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    }
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for (kind, image_type, size) in [
        ("falloc", "Raw", 8_u64 << 20),
        ("full", "Raw", 8 << 20),
        ("falloc", "Qcow2", 8 << 20),
        ("full", "Qcow2", 8 << 20),
        // Its tables.
        ("metadata", "Qcow2", 64 << 30),
    ] {
        let disk = json!({
            "path": folder.join("new"), "image_type": image_type, "size": size,
            "preallocation": kind
        });
        let answer = client.try_put_json("vm.create-disk", &disk).expect(400);
        let reasons = answer.reasons();
        assert!(
            reasons.contains("path: ") && reasons.contains("no space"),
            "{disk}: {reasons}"
        );
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "{disk}");
        before.assert_unchanged(&mut ballast, &mut client, kind);
    }
    assert!(mount(&["-o", "remount,ro"], &folder));
    let disk = json!({"path": folder.join("new"), "image_type": "Raw", "size": 4096});
    let answer = client.try_put_json("vm.create-disk", &disk).expect(400);
    assert!(answer.reasons().contains("Read-only file system"));
    let unmounted = std::process::Command::new("umount").arg(&folder).status();
    assert!(unmounted.unwrap().success());
    ballast.assert_well();
}
