//! `vm.create-disk`: images that can't be made leave nothing behind, and those that can are what
//! was asked for.

use serde_json::json;

use super::before;
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
            json!({"path": new, "image_type": "Qcow2", "size": size, "preallocation": "falloc"}),
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
