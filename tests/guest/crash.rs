//! The process is killed in the middle of everything; what the guest was promised is on the disk.

use std::collections::BTreeMap;

use serde_json::json;

use crate::support::artifacts::{MIB, empty_image, guest};
use crate::vm::Vm;

/// What the guest said it had written: name and sum.
fn promised(transcript: &str) -> BTreeMap<String, String> {
    transcript
        .lines()
        .filter_map(|line| line.strip_prefix("KEPT "))
        .filter_map(|line| line.strip_suffix(" ."))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, sum)| (name.to_owned(), sum.to_owned()))
        .collect()
}

#[test]
fn what_was_flushed_survives_the_death_of_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let image = empty_image(folder.path(), "disk", 128 * MIB);
    let boot = || {
        Vm::boot(|config, _| {
            config["payload"]["initramfs"] = json!(guest("initramfs-tools.cpio"));
            config["disks"] = json!([{"path": image}]);
        })
    };
    let mut all = BTreeMap::new();
    for round in 0..3 {
        let vm = boot();
        vm.agent.ok("mkdir -p /mnt");
        if round == 0 {
            vm.agent.ok("mkfs.ext4 -q -F /dev/vda");
        } else {
            // The journal is replayed, then nothing is left to repair.
            vm.agent
                .ok("mount -t ext4 /dev/vda /mnt && umount /mnt && e2fsck -fn /dev/vda");
        }
        vm.agent.ok("mount -t ext4 /dev/vda /mnt");
        for (name, sum) in &all {
            let found = vm
                .agent
                .ok(&format!("sha256sum </mnt/{name} | cut -d' ' -f1"));
            assert_eq!(&found, sum, "{name} before round {round}");
        }
        let write = format!(
            "for n in $(seq 1000); do f={round}-$n; \
             dd if=/dev/urandom of=/mnt/$f bs=16k count=$((n % 8 + 1)) conv=fsync 2>/dev/null && \
             sync && echo KEPT $f $(sha256sum </mnt/$f | cut -d' ' -f1) .; done"
        );
        let line = vm.agent.mark();
        let _running = vm.agent.start(&write);
        vm.agent.wait_for_after(line, &format!("KEPT {round}-12 "));
        vm.ballast.signal(rustix::process::Signal::KILL);
        let mut vm = vm;
        assert!(!vm.ballast.wait_for_end().success());
        let kept = promised(&vm.agent.transcript());
        assert!(kept.len() >= 11, "{kept:?}");
        all.extend(kept);
    }
}
