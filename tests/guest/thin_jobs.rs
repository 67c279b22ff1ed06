//! Jobs on thin disks while fio verifies what it wrote to them: one comes to stand alone, another
//! goes on with the image below its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::artifacts::{MIB, filled_image};
use crate::support::ballast::binary;
use crate::support::eventually;
use crate::thin_tools::{check, fio, run, wait_for_fio, with_fio};
use crate::vm::{Vm, set_vcpus};

/// Jobs of fio write 8 MiB each, at 0, 24, 48 and 72 MiB of the disk. What is between them comes
/// from the base, which has 64 MiB at first: shell words for `dd` that reads it.
const UNTOUCHED: [&str; 3] = ["skip=8 count=16", "skip=32 count=16", "skip=56 count=8"];

fn on_the_disk(more: &str) -> String {
    fio(&format!(
        "--filename=/dev/vda --size=8m --offset_increment=24m --bs=20k {more}"
    ))
}

/// Shell words that sum up a part of a file or a disk.
fn sum(of: &str, words: &str) -> String {
    format!("dd if={of} bs=1M {words} 2>/dev/null | sha256sum | cut -d' ' -f1")
}

/// A VM with a disk, `thin` over `base`, that fio writes to.
struct UnderFio {
    vm: Vm,
    folder: PathBuf,
    base: String,
    sums_of_base: [String; 3],
}

impl UnderFio {
    fn boot(format: &str, queues: u32) -> Self {
        Self::boot_with(format, queues, false)
    }

    /// The disk is raw at first, and snapshotted while fio writes.
    fn boot_and_snapshot(queues: u32) -> Self {
        let mut disk = Self::boot_with("raw", queues, true);
        let overlay = disk.folder.join("thin");
        disk.snapshot(&overlay);
        disk
    }

    /// Has the disk move on, while fio writes.
    fn snapshot(&mut self, overlay: &Path) {
        let body = json!({"disks": [{"id": "disk", "path": overlay}]});
        self.vm.api.put_json("vm.snapshot-disk", &body);
        let writes = self.vm.counter("disk", "write_ops");
        eventually("fio goes on", || {
            (self.vm.counter("disk", "write_ops") > writes + 100).then_some(())
        });
    }

    fn boot_with(format: &str, queues: u32, on_the_base: bool) -> Self {
        let base = format!("base.{format}");
        let mut vm = Vm::boot(|config, folder| {
            filled_image(folder, "first.raw", 64 * MIB);
            let convert = ["convert", "-f", "raw", "-O", format, "first.raw", &base];
            run("qemu-img", &convert, folder);
            let disk = if on_the_base {
                // As large as the disk is to be.
                let file = fs::File::options().write(true).open(folder.join(&base));
                file.unwrap().set_len(96 * MIB).unwrap();
                json!({"id": "disk", "path": folder.join(&base), "num_queues": queues})
            } else {
                let create = [
                    "disk", "create", "-q", "-f", "qcow2", "-b", &base, "-F", format, "thin", "96M",
                ];
                run(binary(), &create, folder);
                json!({
                    "id": "disk", "path": folder.join("thin"), "image_type": "Qcow2",
                    "backing_files": true, "num_queues": queues,
                })
            };
            set_vcpus(config, queues);
            with_fio(config);
            config["disks"] = json!([disk]);
        });
        let folder = vm.ballast.dir().to_owned();
        let sums_of_base =
            UNTOUCHED.map(|words| run("sh", &["-c", &sum("first.raw", words)], &folder));
        // One pass after the other, of other blocks each, until it is told to stop: all of the job
        // is under its writes, and so is what comes after.
        let pass = on_the_disk("--randseed=$n");
        vm.agent.ok(&format!(
            "(n=0; until test -e /tmp/stop; do n=$((n + 1)); ({pass}) || break; \
             echo $n >/tmp/passes; done; test -e /tmp/stop; echo $? >/tmp/fio.status) \
             >/tmp/fio.out 2>&1 &"
        ));
        eventually("fio writes", || {
            (vm.counter("disk", "write_ops") > 100).then_some(())
        });
        Self {
            vm,
            folder,
            base,
            sums_of_base,
        }
    }

    /// Has a job done. `after` looks at the VM when it has completed, while fio writes.
    fn job(&mut self, operation: &str, after: impl FnOnce(&mut Vm)) {
        let vm = &mut self.vm;
        let before = vm.events.mark();
        let wanted = json!({"id": "disk", "speed": 16 * MIB});
        let job = vm.api.put_json(operation, &wanted).json();
        let end = vm.events.wait_for_device(before, "job-completed", "disk");
        assert_eq!(end["properties"]["job"], job["id"]);
        after(vm);
        let ended: Value = vm.api.get("vm.jobs")[0].clone();
        assert_eq!(ended["state"], "completed");
        assert!(ended.get("reason").is_none(), "{ended}");
        println!("{operation} over {}: {job} began, {end} ended", self.base);
    }

    /// Ends fio, boots the guest again and has fio verify what it wrote; then nobody has the disk any
    /// more. The sum of what it has.
    fn end(&mut self) -> String {
        let vm = &mut self.vm;
        let writes = vm.counter("disk", "write_ops");
        eventually("fio goes on", || {
            (vm.counter("disk", "write_ops") > writes).then_some(())
        });
        vm.agent.ok("touch /tmp/stop");
        wait_for_fio(vm);
        let passes = vm.agent.number("cat /tmp/passes");
        println!("{passes} passes of fio");
        let whole = sum("/dev/vda", "iflag=direct");
        let content = vm.agent.ok(&whole);
        let (line, events) = (vm.agent.mark(), vm.events.mark());
        vm.assert_guest_content();
        vm.api.put("vm.reboot");
        vm.events.wait_after(events, "rebooted", |_| true);
        vm.agent.wait_ready_after(line);
        assert_eq!(vm.agent.ok(&whole), content);
        vm.agent
            .ok(&on_the_disk(&format!("--randseed={passes} --verify_only")));
        for (words, expected) in UNTOUCHED.iter().zip(&self.sums_of_base) {
            let found = vm.agent.ok(&sum("/dev/vda", words));
            assert_eq!(found, expected.trim(), "{words}");
        }
        vm.assert_guest_content();
        let names = vm.events.names();
        assert!(
            !names.iter().any(|name| name.ends_with("io-error")),
            "{names:?}"
        );
        vm.api.put("vm.delete");
        content
    }

    /// QEMU reads from an image what the guest read.
    fn compare(&self, image: &str, format: &str, content: &str) {
        let convert = ["convert", "-f", format, "-O", "raw", image, "flat"];
        run("qemu-img", &convert, &self.folder);
        let flat = run("sh", &["-c", &sum("flat", "")], &self.folder);
        assert_eq!(flat.trim(), content, "{image}");
    }
}

fn stream_under_fio(format: &str, queues: u32) {
    let mut disk = UnderFio::boot(format, queues);
    disk.job("vm.stream-disk", |vm| {
        let info = vm.api.get("vm.disk-info?id=disk");
        assert_eq!(info["backing_chain"], json!([]), "{info}");
    });
    // The image below is of no use any more.
    fs::remove_file(disk.folder.join(&disk.base)).unwrap();
    let content = disk.end();
    let info = ["info", "--output=json", "thin"];
    let info = run("qemu-img", &info, &disk.folder);
    assert!(
        info.contains("virtual-size") && !info.contains("backing"),
        "{info}"
    );
    check(&disk.folder, "thin");
    disk.compare("thin", "qcow2", &content);
}

fn commit_under_fio(format: &str, queues: u32) {
    let mut disk = UnderFio::boot(format, queues);
    let base = disk.folder.join(&disk.base);
    disk.job("vm.commit-disk", |vm| {
        let config = vm.api.get("vm.info")["config"]["disks"][0].clone();
        assert_eq!(config["path"], json!(base), "{config}");
    });
    let content = disk.end();
    check(&disk.folder, "thin");
    if format == "qcow2" {
        // What was copied away from tables that the overlay still read may be lost room.
        let checked = Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(&base)
            .output()
            .unwrap();
        let code = checked.status.code();
        assert!(matches!(code, Some(0 | 3)), "{checked:?}");
    }
    // In the base, and through the overlay, which is empty.
    disk.compare(&disk.base, format, &content);
    disk.compare("thin", "qcow2", &content);
    let map = run("qemu-img", &["map", "--output=json", "thin"], &disk.folder);
    assert!(!map.contains("\"depth\": 0, \"present\": true"), "{map}");
}

#[test]
fn a_disk_over_a_raw_base_comes_to_stand_alone_while_fio_verifies_it() {
    stream_under_fio("raw", 1);
}

#[test]
fn a_disk_with_four_queues_over_a_qcow2_base_comes_to_stand_alone_while_fio_verifies_it() {
    stream_under_fio("qcow2", 4);
}

#[test]
fn a_disk_goes_on_with_its_raw_base_while_fio_verifies_it() {
    commit_under_fio("raw", 1);
}

#[test]
fn a_disk_with_four_queues_goes_on_with_its_qcow2_base_while_fio_verifies_it() {
    commit_under_fio("qcow2", 4);
}

#[test]
fn a_raw_disk_with_four_queues_moves_on_and_back_and_on_again_while_fio_verifies_it() {
    let mut disk = UnderFio::boot_and_snapshot(4);
    let base = disk.folder.join(&disk.base);
    disk.job("vm.commit-disk", |vm| {
        let config = vm.api.get("vm.info")["config"]["disks"][0].clone();
        assert_eq!(config["path"], json!(base), "{config}");
    });
    let again = disk.folder.join("again");
    disk.snapshot(&again);
    let content = disk.end();
    check(&disk.folder, "thin");
    check(&disk.folder, "again");
    disk.compare("again", "qcow2", &content);
}
