//! File systems on thin disks that come and go: fio verifies files on them, and the space of what is
//! deleted is the host's again.
//!
//! How much an image occupies is looked at while nobody has it: one in use is allocated ahead.

use serde_json::{Value, json};

use crate::support::artifacts::{MIB, occupied_bytes};
use crate::support::eventually;
use crate::support::procfs::assert_holds_again;
use crate::thin_tools::{check, fio, is_free, make_thin, with_fio};
use crate::vm::{Vm, set_vcpus};

/// What fio writes into its four files, and what is deleted.
const FILES: u64 = 128 * MIB;

/// A guest with fio, and an image for it.
fn boot(size: &str, queues: u32) -> (Vm, Value) {
    let vm = Vm::boot(|config, _| {
        set_vcpus(config, queues);
        with_fio(config);
    });
    make_thin(vm.ballast.dir(), "thin.qcow2", size);
    let disk = json!({
        "path": vm.path("thin.qcow2"), "image_type": "Qcow2", "serial": "thin",
        "num_queues": queues,
    });
    (vm, disk)
}

/// Adds the disk; its id, and its device in the guest.
fn plug(vm: &mut Vm, disk: &Value) -> (String, String) {
    let id = vm.add_disk(disk);
    assert!(!is_free(vm.ballast.dir(), "thin.qcow2"), "it is locked");
    let device = vm.disk_in_guest("thin");
    (id, device)
}

/// Removes it; its image is sound then, and free. Bytes that it occupies.
fn unplug(vm: &mut Vm, id: &str) -> u64 {
    vm.remove_device(id);
    vm.wait_disk_gone("thin");
    let folder = vm.ballast.dir();
    eventually("the image is free", || {
        is_free(folder, "thin.qcow2").then_some(())
    });
    check(folder, "thin.qcow2");
    occupied_bytes(&vm.path("thin.qcow2"))
}

fn assert_returns_what_is_deleted(queues: u32, make: &str, mount: &str, judge: &str) {
    let (mut vm, disk) = boot("320M", queues);
    let (id, device) = plug(&mut vm, &disk);
    vm.agent.ok(&format!(
        "{make} {device} && mkdir -p /mnt && {mount} {device} /mnt"
    ));
    vm.agent.ok(&fio(&format!(
        "--directory=/mnt --size={} --bsrange=4k-256k",
        FILES / 4
    )));
    vm.agent.ok(&format!("umount /mnt && {judge} {device}"));
    let full = unplug(&mut vm, &id);
    assert!(full >= FILES, "{full} bytes");

    // Mounted anew after the deletion: XFS frees what was deleted later, but before that.
    let (id, device) = plug(&mut vm, &disk);
    vm.agent.ok(&format!(
        "{mount} {device} /mnt && test $(cat /mnt/v.*.0 | wc -c) = {FILES} && rm /mnt/v.*.0 && \
         umount /mnt && {mount} {device} /mnt && fstrim /mnt && umount /mnt && {judge} {device}"
    ));
    vm.assert_guest_content();
    let in_use = occupied_bytes(&vm.path("thin.qcow2"));
    let left = unplug(&mut vm, &id);
    println!("{make}: full {full} bytes, {left} left, {in_use} while it was in use");
    assert!(
        full.saturating_sub(left) >= FILES * 95 / 100,
        "{left} of {full} bytes are left"
    );
    // While it was in use it had no more than that, 16 MiB ahead, and ends of what was ahead before
    // that were too short for a request.
    assert!(in_use <= left + 20 * MIB, "{in_use} bytes, then {left}");
    let names = vm.events.names();
    assert!(
        !names.iter().any(|name| name.ends_with("io-error")),
        "{names:?}"
    );
}

#[test]
fn an_ext4_on_a_thin_disk_gives_back_95_percent_of_the_files_that_fio_verified() {
    assert_returns_what_is_deleted(
        1,
        "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0",
        "mount -t ext4",
        "e2fsck -fn",
    );
}

#[test]
fn an_xfs_on_a_thin_disk_gives_back_95_percent_of_the_files_that_fio_verified() {
    assert_returns_what_is_deleted(2, "mkfs.xfs -q -f", "mount -t xfs", "xfs_repair -n");
}

#[test]
fn a_thin_disk_that_fio_uses_comes_and_goes_and_stays_sound() {
    let (mut vm, disk) = boot("96M", 2);
    let before = vm.ballast.holdings();
    let on = |device: &str, round: u32, more: &str| {
        fio(&format!(
            "--filename={device} --size=12m --offset_increment=20m --bs=12k --randseed={round} {more}"
        ))
    };
    for round in 1..=3 {
        let (id, device) = plug(&mut vm, &disk);
        if round > 1 {
            vm.agent.ok(&on(&device, round - 1, "--verify_only"));
        }
        vm.agent.ok(&on(&device, round, ""));
        let occupied = unplug(&mut vm, &id);
        assert!(occupied >= 48 * MIB, "{occupied} bytes");
        assert_holds_again(vm.ballast.pid(), &before);
    }
    vm.assert_guest_content();

    // It goes while fio is at it, too. fio fails then, and nobody else.
    let (id, device) = plug(&mut vm, &disk);
    vm.agent.ok(&format!(
        "(while {}; do :; done) >/dev/null 2>&1 &",
        on(&device, 4, "").replace("exit 1", "false")
    ));
    eventually("fio writes", || {
        (vm.counter(&id, "write_ops") > 100).then_some(())
    });
    unplug(&mut vm, &id);
    assert_holds_again(vm.ballast.pid(), &before);
    assert_eq!(vm.agent.ok("echo alive"), "alive");
    // What was there is used on.
    let (id, device) = plug(&mut vm, &disk);
    vm.agent.ok(&on(&device, 5, ""));
    unplug(&mut vm, &id);
    vm.ballast.assert_well();
}
