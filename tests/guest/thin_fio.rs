//! Thin disks that move on to overlays and grow while fio verifies what it wrote to them, with one
//! queue and with several; qemu-img judges what is left of them.

use serde_json::json;

use crate::support::artifacts::{MIB, occupied_bytes};
use crate::thin_tools::{check, fio, make_thin, wait_for_fio, with_fio};
use crate::vm::{Vm, set_vcpus};

fn verify_while_the_disk_changes(queues: u32) {
    let mut vm = Vm::boot(|config, folder| {
        make_thin(folder, "thin.qcow2", "160M");
        set_vcpus(config, queues);
        with_fio(config);
        config["disks"] = json!([{
            "id": "disk", "path": folder.join("thin.qcow2"), "image_type": "Qcow2",
            "num_queues": queues,
        }]);
    });
    assert_eq!(
        vm.agent.number("ls /sys/block/vda/mq | wc -l"),
        u64::from(queues)
    );
    let folder = vm.ballast.dir().to_owned();
    let verify = fio("--filename=/dev/vda --size=32m --offset_increment=32m --bsrange=4k-64k");
    vm.agent.ok(&format!(
        "( ({verify}); echo $? >/tmp/fio.status) >/tmp/fio.out 2>&1 &"
    ));
    for name in ["first", "second"] {
        vm.agent.ok("sleep 2");
        let overlay = folder.join(name);
        let disks = json!({"disks": [{"id": "disk", "path": overlay}]});
        vm.api
            .put_json("vm.snapshot-disk", &disks)
            .expect_success("vm.snapshot-disk");
    }
    let size = json!({"id": "disk", "desired_size": 192 * MIB});
    vm.api
        .put_json("vm.resize-disk", &size)
        .expect_success("vm.resize-disk");
    let running = vm.agent.run("test ! -e /tmp/fio.status").0 == 0;
    println!("fio was still running after the last change: {running}");
    wait_for_fio(&vm);
    assert_eq!(vm.agent.number("blockdev --getsize64 /dev/vda"), 192 * MIB);

    // A file system on it gives its space back.
    let image = folder.join("second");
    vm.agent
        .ok("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && sync");
    let before = occupied_bytes(&image);
    vm.agent
        .ok("dd if=/dev/urandom of=/mnt/large bs=1M count=64 2>/dev/null && sync");
    let full = occupied_bytes(&image);
    vm.agent
        .ok("rm /mnt/large && sync && fstrim /mnt && umount /mnt && e2fsck -fn /dev/vda");
    vm.agent.ok("blockdev --flushbufs /dev/vda && sync");
    let left = occupied_bytes(&image);
    println!("{queues} queues: {before} bytes, full {full}, trimmed {left}");
    assert!(full >= 64 * MIB, "{full} bytes");
    // What is allocated ahead comes and goes.
    assert!(
        left <= full - 64 * MIB * 95 / 100 + 16 * MIB,
        "{left} bytes"
    );
    vm.assert_guest_content();
    vm.api.put("vm.delete");
    for name in ["thin.qcow2", "first", "second"] {
        check(&folder, name);
    }
}

#[test]
fn fio_verifies_a_thin_disk_with_one_queue_that_moves_on_and_grows() {
    verify_while_the_disk_changes(1);
}

#[test]
fn fio_verifies_a_thin_disk_with_four_queues_that_moves_on_and_grows() {
    verify_while_the_disk_changes(4);
}
