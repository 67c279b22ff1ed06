//! What the tests of thin disks share: fio in the guest, and tools that make and judge images on
//! the host.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::artifacts::guest;
use crate::support::ballast::binary;
use crate::vm::Vm;

/// Runs a program that must succeed; what it printed.
#[track_caller]
pub fn run(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {out}{err}"
    );
    out.into_owned()
}

/// Makes an empty image of this size.
#[track_caller]
pub fn make_thin(folder: &Path, name: &str, size: &str) {
    let arguments = ["disk", "create", "-q", "-f", "qcow2", name, size];
    run(binary(), &arguments, folder);
}

/// QEMU finds nothing wrong in the image, and no leak.
#[track_caller]
pub fn check(folder: &Path, image: &str) {
    run("qemu-img", &["check", "-q", "-f", "qcow2", image], folder);
}

/// Whether nobody has the image: it can be opened to be written to.
#[track_caller]
pub fn is_free(folder: &Path, image: &str) -> bool {
    let opened = Command::new(binary())
        .args(["disk", "io", "-f", "qcow2", "-c", "read 0 512", image])
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&opened.stderr);
    let in_use = said.contains("in use");
    assert!(opened.status.success() || in_use, "{image}: {said}");
    !in_use
}

/// A guest with fio.
pub fn with_fio(config: &mut Value) {
    config["memory"] = json!({"size": 768 << 20});
    config["payload"]["initramfs"] = json!(guest("initramfs-fio.cpio"));
}

/// A command for the guest: four jobs write blocks at random places and read all of them back.
/// `what` says where, how much, and in blocks of which size.
pub fn fio(what: &str) -> String {
    format!(
        "fio --thread --name=v --direct=1 --ioengine=libaio --rw=randwrite --iodepth=8 \
         --numjobs=4 --fsync=64 --verify=crc32c --verify_fatal=1 --output=/tmp/fio.log {what} \
         || {{ cat /tmp/fio.log; exit 1; }}"
    )
}

/// Waits until what runs in the background has told its end in /tmp/fio.status, which must be a good
/// one; what it said is in /tmp/fio.out.
#[track_caller]
pub fn wait_for_fio(vm: &Vm) {
    vm.agent.ok(
        "for n in $(seq 240); do test -s /tmp/fio.status && break; sleep 0.5; done; \
         test \"$(cat /tmp/fio.status)\" = 0 || { cat /tmp/fio.out; exit 1; }",
    );
}
