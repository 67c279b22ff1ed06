//! Thin disks as a guest uses them; qemu-img judges what is left of them.

use serde_json::json;

use crate::support::artifacts::{MIB, filled_image, guest, occupied_bytes};
use crate::support::ballast::binary;
use crate::thin_tools::run;
use crate::vm::Vm;

#[test]
fn an_overlay_holds_a_file_system_gives_space_back_and_stays_sound() {
    let mut vm = Vm::boot(|config, folder| {
        filled_image(folder, "base.raw", 64 * MIB);
        run(
            binary(),
            &[
                "disk",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "base.raw",
                "-F",
                "raw",
                "thin.qcow2",
            ],
            folder,
        );
        config["payload"]["initramfs"] = json!(guest("initramfs-tools.cpio"));
        config["disks"] = json!([{
            "id": "disk",
            "path": folder.join("thin.qcow2"),
            "image_type": "Qcow2",
            "backing_files": true,
        }]);
    });
    let folder = vm.ballast.dir().to_owned();
    let image = folder.join("thin.qcow2");
    let sum = |mib: u64| {
        format!(
            "dd if=/dev/vda bs=1M count={mib} iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1"
        )
    };
    // What the base has, through the overlay; then parts of clusters over it.
    let base = run(
        "sh",
        &["-c", "sha256sum <base.raw | cut -d' ' -f1"],
        &folder,
    );
    assert_eq!(vm.agent.ok(&sum(64)), base.trim());
    vm.agent.ok(
        "for n in 1 77 4000 9999; do \
         dd if=/dev/urandom of=/dev/vda bs=4k seek=$n count=3 oflag=direct 2>/dev/null || exit 1; done",
    );
    // It is allocated 16 MiB ahead.
    assert!(occupied_bytes(&image) < 20 * MIB);
    let changed = vm.agent.ok(&sum(64));
    assert_ne!(changed, base.trim());

    vm.agent
        .ok("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    vm.agent.ok(
        "dd if=/dev/urandom of=/mnt/large bs=1M count=40 2>/dev/null && cp -r /bin /mnt && sync",
    );
    let full = occupied_bytes(&image);
    assert!(full >= 40 * MIB, "{full} bytes");
    vm.agent
        .ok("rm /mnt/large && sync && fstrim /mnt && sync && umount /mnt && e2fsck -fn /dev/vda");
    vm.agent.ok("blockdev --flushbufs /dev/vda && sync");
    let left = occupied_bytes(&image);
    assert!(left + 22 * MIB <= full, "{full} bytes became {left}");
    let last = vm.agent.ok(&sum(64));
    vm.assert_guest_content();
    vm.api.put("vm.delete");

    run("qemu-img", &["check", "-f", "qcow2", "thin.qcow2"], &folder);
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "thin.qcow2",
            "flat.raw",
        ],
        &folder,
    );
    let flat = run(
        "sh",
        &["-c", "sha256sum <flat.raw | cut -d' ' -f1"],
        &folder,
    );
    assert_eq!(flat.trim(), last, "QEMU reads what the guest read");
}
