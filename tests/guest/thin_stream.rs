//! Thin disks that come to stand alone while fio verifies what it wrote to them.

use std::fs;

use serde_json::json;

use crate::support::artifacts::{MIB, filled_image};
use crate::support::ballast::binary;
use crate::support::eventually;
use crate::thin_tools::{check, fio, run, wait_for_fio, with_fio};
use crate::vm::{Vm, set_vcpus};

/// Jobs of fio write 8 MiB each, at 0, 24, 48 and 72 MiB of the disk. What is between them comes
/// from the base, which has 64 MiB: shell words for `dd` that reads it.
const UNTOUCHED: [&str; 3] = ["skip=8 count=16", "skip=32 count=16", "skip=56 count=8"];

fn on_the_disk(more: &str) -> String {
    fio(&format!(
        "--filename=/dev/vda --size=8m --offset_increment=24m --bs=20k {more}"
    ))
}

fn stream_under_fio(format: &str, queues: u32) {
    let base = format!("base.{format}");
    let mut vm = Vm::boot(|config, folder| {
        filled_image(folder, "base.raw", 64 * MIB);
        if format == "qcow2" {
            let convert = ["convert", "-f", "raw", "-O", "qcow2", "base.raw", &base];
            run("qemu-img", &convert, folder);
        }
        let create = [
            "disk", "create", "-q", "-f", "qcow2", "-b", &base, "-F", format, "thin", "96M",
        ];
        run(binary(), &create, folder);
        set_vcpus(config, queues);
        with_fio(config);
        config["disks"] = json!([{
            "id": "disk", "path": folder.join("thin"), "image_type": "Qcow2",
            "backing_files": true, "num_queues": queues,
        }]);
    });
    let folder = vm.ballast.dir().to_owned();
    let sum = |of: &str, words: &str| {
        format!("dd if={of} bs=1M {words} 2>/dev/null | sha256sum | cut -d' ' -f1")
    };
    let sums_of_base = UNTOUCHED.map(|words| run("sh", &["-c", &sum("base.raw", words)], &folder));

    // One pass after the other, of other blocks each, until it is told to stop: so all of the job is
    // under its writes.
    let pass = on_the_disk("--randseed=$n");
    vm.agent.ok(&format!(
        "(n=0; until test -e /tmp/stop; do n=$((n + 1)); ({pass}) || break; echo $n >/tmp/passes; \
         done; test -e /tmp/stop; echo $? >/tmp/fio.status) >/tmp/fio.out 2>&1 &"
    ));
    eventually("fio writes", || {
        (vm.counter("disk", "write_ops") > 100).then_some(())
    });
    let before = vm.events.mark();
    let wanted = json!({"id": "disk", "speed": 16 * MIB});
    let job = vm.api.put_json("vm.stream-disk", &wanted).json();
    let end = vm.events.wait_for_device(before, "job-completed", "disk");
    assert_eq!(end["properties"]["job"], job["id"]);
    let writes = vm.counter("disk", "write_ops");
    eventually("fio goes on", || {
        (vm.counter("disk", "write_ops") > writes).then_some(())
    });
    vm.agent.ok("touch /tmp/stop");
    wait_for_fio(&vm);
    let passes = vm.agent.number("cat /tmp/passes");
    let info = vm.api.get("vm.disk-info?id=disk");
    assert_eq!(info["backing_chain"], json!([]), "{info}");
    assert_eq!(vm.api.get("vm.jobs")[0]["state"], "completed");
    println!("{format}: {passes} passes of fio, {job} began, {end} ended");

    // The images below are of no use any more.
    for name in ["base.raw", &base] {
        let _ = fs::remove_file(folder.join(name));
    }
    let whole = sum("/dev/vda", "iflag=direct");
    let content = vm.agent.ok(&whole);
    let (line, stream) = (vm.agent.mark(), vm.events.mark());
    vm.assert_guest_content();
    vm.api.put("vm.reboot");
    vm.events.wait_after(stream, "rebooted", |_| true);
    vm.agent.wait_ready_after(line);
    assert_eq!(vm.agent.ok(&whole), content);
    vm.agent
        .ok(&on_the_disk(&format!("--randseed={passes} --verify_only")));
    for (words, expected) in UNTOUCHED.iter().zip(&sums_of_base) {
        assert_eq!(
            vm.agent.ok(&sum("/dev/vda", words)),
            expected.trim(),
            "{words}"
        );
    }
    vm.assert_guest_content();
    let names = vm.events.names();
    assert!(
        !names.iter().any(|name| name.ends_with("io-error")),
        "{names:?}"
    );
    vm.api.put("vm.delete");

    let info = run("qemu-img", &["info", "--output=json", "thin"], &folder);
    assert!(
        info.contains("virtual-size") && !info.contains("backing"),
        "{info}"
    );
    check(&folder, "thin");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", "thin", "flat"];
    run("qemu-img", &convert, &folder);
    let flat = run("sh", &["-c", &sum("flat", "")], &folder);
    assert_eq!(flat.trim(), content, "QEMU reads what the guest read");
}

#[test]
fn a_disk_over_a_raw_base_comes_to_stand_alone_while_fio_verifies_it() {
    stream_under_fio("raw", 1);
}

#[test]
fn a_disk_with_four_queues_over_a_qcow2_base_comes_to_stand_alone_while_fio_verifies_it() {
    stream_under_fio("qcow2", 4);
}
