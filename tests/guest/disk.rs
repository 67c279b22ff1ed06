//! virtio-blk as a guest uses it: every byte is checked on both sides.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::artifacts::{MIB, empty_image, filled_image, guest, occupied_bytes};
use crate::vm::{Vm, set_vcpus};

/// The host's sum of the first `mib` MiB of a file.
fn sum_on_host(path: &Path, mib: u64) -> String {
    let script = format!("head -c {} \"$0\" | sha256sum | cut -d' ' -f1", mib * MIB);
    let output = Command::new("sh")
        .args(["-c", &script])
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The guest's sum of the first `mib` MiB of a device, read past its cache.
fn sum_in_guest(vm: &Vm, device: &str, mib: u64) -> String {
    vm.agent.ok(&format!(
        "dd if={device} bs=1M count={mib} iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1"
    ))
}

/// Boots with one disk of 64 MiB, writes all of it from as many processors as it has queues, reads
/// it back, and makes, fills and checks an ext4 on it.
fn assert_disk_works(queues: u32, disk: impl FnOnce(&Path) -> Value) {
    let mut vm = Vm::boot(|config, folder| {
        set_vcpus(config, queues);
        config["payload"]["initramfs"] = json!(guest("initramfs-tools.cpio"));
        let mut disk = disk(folder);
        disk["num_queues"] = json!(queues);
        disk["id"] = json!("disk");
        config["disks"] = json!([disk]);
    });
    let path = vm.api.get("vm.info")["config"]["disks"][0]["path"].clone();
    let image = PathBuf::from(path.as_str().unwrap());
    assert_eq!(
        vm.agent.number("ls /sys/block/vda/mq | wc -l"),
        u64::from(queues)
    );
    assert_eq!(vm.agent.number("blockdev --getsize64 /dev/vda"), 64 * MIB);

    let share = 64 / queues;
    let writers: String = (0..queues)
        .map(|cpu| {
            format!(
                "taskset -c {cpu} dd if=/dev/urandom of=/dev/vda bs=64k seek={} count={} oflag=direct 2>/dev/null & ",
                cpu * share * 16,
                share * 16
            )
        })
        .collect();
    vm.agent.ok(&format!("{writers} wait"));
    vm.agent.ok("blockdev --flushbufs /dev/vda && sync");
    let sum = sum_in_guest(&vm, "/dev/vda", 64);
    assert_eq!(
        sum_on_host(&image, 64),
        sum,
        "the host has what the guest reads"
    );

    vm.agent.ok("mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt || (mkdir -p /mnt && mount -t ext4 /dev/vda /mnt)");
    vm.agent.ok("cp -r /lib /bin /mnt && sync");
    let tree = "find lib bin -type f | sort | xargs sha256sum | sha256sum";
    let expected = vm.agent.ok(&format!("cd / && {tree}"));
    vm.agent.ok("umount /mnt && e2fsck -fn /dev/vda");
    vm.agent
        .ok("echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /mnt");
    assert_eq!(vm.agent.ok(&format!("cd /mnt && {tree}")), expected);
    vm.agent
        .ok("rm -r /mnt/lib && fstrim /mnt && umount /mnt && e2fsck -fn /dev/vda");
    vm.assert_guest_content();
    vm.api.put("vm.delete");
    assert_eq!(
        vm.events
            .names()
            .iter()
            .filter(|n| n.ends_with("io-error"))
            .count(),
        0
    );
}

#[test]
fn one_queue_reads_writes_flushes_discards_and_holds_a_file_system() {
    assert_disk_works(
        1,
        |folder| json!({"path": empty_image(folder, "disk", 64 * MIB)}),
    );
}

#[test]
fn four_queues_read_write_flush_discard_and_hold_a_file_system() {
    assert_disk_works(
        4,
        |folder| json!({"path": empty_image(folder, "disk", 64 * MIB)}),
    );
}

#[test]
fn a_disk_without_io_uring_works_the_same() {
    assert_disk_works(
        2,
        |folder| json!({"path": empty_image(folder, "disk", 64 * MIB), "disable_io_uring": true}),
    );
}

#[test]
fn the_smallest_queue_works_the_same() {
    assert_disk_works(
        1,
        |folder| json!({"path": empty_image(folder, "disk", 64 * MIB), "queue_size": 4}),
    );
}

/// A loop device, gone when dropped; it takes direct I/O whatever file system is below.
struct Loop(String);

impl Loop {
    fn over(image: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "this test must be root, for losetup: {stderr}"
        );
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn a_block_device_works_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::over(&empty_image(folder.path(), "disk", 64 * MIB));
    assert_disk_works(2, |_| json!({"path": device.0}));
}

#[test]
fn direct_io_works_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::over(&empty_image(folder.path(), "disk", 64 * MIB));
    assert_disk_works(2, |_| json!({"path": device.0, "direct": true}));
}

#[test]
fn direct_io_without_io_uring_works_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::over(&empty_image(folder.path(), "disk", 64 * MIB));
    assert_disk_works(
        1,
        |_| json!({"path": device.0, "direct": true, "disable_io_uring": true}),
    );
}

#[test]
fn discarded_blocks_go_back_to_the_host_and_read_as_zeros() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": filled_image(folder, "disk", 32 * MIB)}]);
    });
    let image = vm.path("disk");
    assert!(occupied_bytes(&image) >= 32 * MIB);
    vm.agent.ok("blkdiscard -o 1048576 -l 16777216 /dev/vda");
    let occupied = occupied_bytes(&image);
    assert!(occupied <= 17 * MIB, "{occupied} bytes");
    let zeros = vm
        .agent
        .ok("dd if=/dev/zero bs=1M count=16 2>/dev/null | sha256sum");
    let read = vm
        .agent
        .ok("dd if=/dev/vda bs=1M skip=1 count=16 iflag=direct 2>/dev/null | sha256sum");
    assert_eq!(read, zeros);
    // Its neighbours are untouched, all of them.
    let host = std::fs::read(&image).unwrap();
    assert_eq!(host.len() as u64, 32 * MIB);
    assert!(host[..MIB as usize].iter().all(|byte| *byte != 0));
    assert!(host[17 * MIB as usize..].iter().all(|byte| *byte != 0));
    vm.agent.ok("blkdiscard /dev/vda");
    assert_eq!(occupied_bytes(&image), 0);
}

#[test]
fn a_disk_that_is_not_sparse_keeps_its_blocks() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": filled_image(folder, "disk", 8 * MIB), "sparse": false}]);
    });
    // Whether the disk takes the request or not is its own affair.
    vm.agent.run("blkdiscard /dev/vda");
    assert!(occupied_bytes(&vm.path("disk")) >= 8 * MIB);
}

#[test]
fn zeros_can_be_written_without_being_sent() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([
            {"path": filled_image(folder, "disk", 16 * MIB), "id": "disk"},
            {"path": guest("debian.raw"), "readonly": true},
        ]);
    });
    // Of the programs at hand only Debian's own blkdiscard asks for zeros.
    vm.agent
        .ok("mkdir -p /mnt && mount -t ext4 -o ro /dev/vdb /mnt && mount --bind /dev /mnt/dev");
    let before = vm.counter("disk", "write_bytes");
    vm.agent
        .ok("chroot /mnt blkdiscard --zeroout --offset 1048576 --length 8388608 /dev/vda");
    let sent = vm.counter("disk", "write_bytes") - before;
    assert!(sent < MIB, "{sent} bytes were sent");
    let host = std::fs::read(vm.path("disk")).unwrap();
    let (start, end) = (MIB as usize, 9 * MIB as usize);
    assert!(host[..start].iter().all(|byte| *byte != 0));
    assert!(host[start..end].iter().all(|byte| *byte == 0));
    assert!(host[end..].iter().all(|byte| *byte != 0));
}

#[test]
fn a_disk_tells_its_serial_number_its_size_and_its_blocks() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([
            {"path": empty_image(folder, "a", 3 * MIB + 512), "serial": "exactly-20-bytes-abc"},
            {"path": empty_image(folder, "b", MIB)},
        ]);
    });
    assert_eq!(
        vm.agent.ok("cat /sys/block/vda/serial"),
        "exactly-20-bytes-abc"
    );
    assert_ne!(vm.agent.ok("cat /sys/block/vdb/serial"), "");
    assert_eq!(
        vm.agent.number("blockdev --getsize64 /dev/vda"),
        3 * MIB + 512
    );
    assert_eq!(
        vm.agent
            .number("cat /sys/block/vda/queue/logical_block_size"),
        512
    );
    let physical = vm
        .agent
        .number("cat /sys/block/vda/queue/physical_block_size");
    assert!(physical >= 512 && physical.is_power_of_two(), "{physical}");
    // The very last sector, odd as it is.
    let last = 3 * 2048;
    vm.agent.ok(&format!(
        "echo end | dd of=/dev/vda bs=512 seek={last} conv=sync,fsync 2>/dev/null"
    ));
    let host = std::fs::read(vm.path("a")).unwrap();
    assert!(host[last * 512..].starts_with(b"end\n"));
    assert_eq!(host.len() as u64, 3 * MIB + 512);
}

#[test]
fn a_read_only_disk_takes_no_write() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": filled_image(folder, "disk", MIB), "readonly": true}]);
    });
    let before = std::fs::read(vm.path("disk")).unwrap();
    assert_eq!(vm.agent.ok("cat /sys/block/vda/ro"), "1");
    assert_eq!(
        sum_in_guest(&vm, "/dev/vda", 1),
        sum_on_host(&vm.path("disk"), 1)
    );
    vm.agent
        .fails("dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync");
    vm.agent.fails("blkdiscard /dev/vda");
    assert_eq!(std::fs::read(vm.path("disk")).unwrap(), before);
}

#[test]
fn the_write_cache_can_be_turned_off_and_on() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": empty_image(folder, "disk", MIB)}]);
    });
    let cache = "/sys/block/vda/cache_type";
    assert_eq!(vm.agent.ok(&format!("cat {cache}")), "write back");
    for mode in ["write through", "write back", "write through"] {
        vm.agent.ok(&format!("echo '{mode}' >{cache}"));
        assert_eq!(vm.agent.ok(&format!("cat {cache}")), mode);
        vm.agent
            .ok("dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync 2>/dev/null");
        assert_eq!(
            sum_in_guest(&vm, "/dev/vda", 1),
            sum_on_host(&vm.path("disk"), 1)
        );
    }
}

#[test]
fn counters_count() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": empty_image(folder, "disk", 16 * MIB), "id": "disk"}]);
    });
    fn counters(vm: &mut Vm) -> [u64; 4] {
        ["read_bytes", "read_ops", "write_bytes", "write_ops"].map(|name| vm.counter("disk", name))
    }
    let before = counters(&mut vm);
    vm.agent
        .ok("dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null");
    let read = counters(&mut vm);
    assert_eq!(read[0] - before[0], 4 * MIB);
    assert!(read[1] > before[1]);
    assert_eq!(read[2..], before[2..]);
    vm.agent
        .ok("dd if=/dev/zero of=/dev/vda bs=64k count=128 oflag=direct 2>/dev/null");
    let written = counters(&mut vm);
    assert_eq!(written[2] - read[2], 8 * MIB);
    assert!(written[3] > read[3]);
    vm.api.put("vm.pause");
    assert_eq!(vm.counter("disk", "write_bytes"), written[2]);
}
