//! Disks that come and go while the guest runs.

use serde_json::{Value, json};

use crate::support::artifacts::{MIB, empty_image, filled_image, guest};
use crate::support::eventually;
use crate::support::procfs::assert_holds_again;
use crate::vm::{Vm, add_to_cmdline, set_vcpus};

#[test]
fn a_disk_comes_and_goes_a_hundred_times_without_a_trace() {
    let mut vm = Vm::boot(|config, _| set_vcpus(config, 2));
    let image = filled_image(vm.ballast.dir(), "disk", MIB);
    let disk = json!({"path": image, "serial": "guest", "num_queues": 2});
    let before = vm.ballast.holdings();
    let config = vm.api.get("vm.info")["config"].clone();
    for round in 0..100 {
        let id = vm.add_disk(&disk);
        let device = vm.disk_in_guest("guest");
        vm.agent.ok(&format!(
            "dd if={device} of=/dev/null bs=1M iflag=direct 2>/dev/null"
        ));
        vm.remove_device(&id);
        vm.wait_disk_gone("guest");
        if round == 0 {
            assert_holds_again(vm.ballast.pid(), &before);
        }
    }
    assert_holds_again(vm.ballast.pid(), &before);
    assert_eq!(vm.api.get("vm.info")["config"], config);
    vm.assert_guest_content();
}

#[test]
fn several_disks_at_once_are_all_found_and_all_let_go() {
    let mut vm = Vm::boot(|_, _| {});
    let before = vm.ballast.holdings();
    for _ in 0..3 {
        let ids: Vec<String> = (0..8)
            .map(|n| {
                let image = filled_image(vm.ballast.dir(), &format!("disk{n}"), MIB);
                vm.add_disk(
                    &json!({"path": image, "id": format!("d{n}"), "serial": format!("s{n}")}),
                )
            })
            .collect();
        let device_tree = vm.api.get("vm.info")["device_tree"].clone();
        for (n, id) in ids.iter().enumerate() {
            assert!(
                device_tree[transport(id)]["pci_bdf"].is_string(),
                "{id} in {device_tree}"
            );
            let device = vm.disk_in_guest(&format!("s{n}"));
            vm.agent.ok(&format!(
                "dd if={device} of=/dev/null bs=1M iflag=direct 2>/dev/null"
            ));
        }
        let stream = vm.events.mark();
        for id in &ids {
            vm.api.put_json("vm.remove-device", &json!({"id": id}));
        }
        for id in &ids {
            vm.events.wait_for_device(stream, "device-removed", id);
        }
    }
    assert_eq!(vm.agent.ok("ls /sys/block | grep vd | wc -l"), "0");
    assert_holds_again(vm.ballast.pid(), &before);
    vm.assert_guest_content();
}

#[test]
fn the_bus_can_be_filled_and_one_more_is_refused() {
    let mut vm = Vm::boot(|_, _| {});
    let mut ids = Vec::new();
    let refusal = loop {
        let n = ids.len();
        assert!(n < 32, "32 slots, and more than 31 disks");
        let image = empty_image(vm.ballast.dir(), &format!("disk{n}"), MIB);
        let disk = json!({"path": image, "id": format!("d{n}"), "serial": format!("s{n}")});
        let answer = vm.api.try_put_json("vm.add-disk", &disk);
        if answer.status != 200 {
            break answer;
        }
        ids.push(format!("d{n}"));
    };
    refusal.expect_refusal("no slot left");
    assert!(ids.len() >= 28, "{}", ids.len());
    eventually("all are seen", || {
        let seen = vm.agent.number("ls /sys/block | grep -c vd");
        (seen == ids.len() as u64).then_some(())
    });
    vm.remove_device("d7");
    vm.wait_disk_gone("s7");
    let image = empty_image(vm.ballast.dir(), "last", MIB);
    vm.add_disk(&json!({"path": image, "serial": "last"}));
    vm.disk_in_guest("last");
    vm.assert_guest_content();
}

#[test]
fn a_slot_can_be_chosen() {
    let mut vm = Vm::boot(|_, _| {});
    let image = empty_image(vm.ballast.dir(), "disk", MIB);
    let disk = json!({"path": image, "pci_device_id": 17, "serial": "chosen"});
    let info = vm.api.put_json("vm.add-disk", &disk).json();
    assert_eq!(info["bdf"], "0000:00:11.0");
    vm.disk_in_guest("chosen");
    vm.agent.ok("ls -d /sys/bus/pci/devices/0000:00:11.0");
}

#[test]
fn a_disk_in_use_is_let_go_too_and_the_guest_survives() {
    let mut vm = Vm::boot(|config, _| {
        config["payload"]["initramfs"] = json!(guest("initramfs-tools.cpio"));
    });
    let image = empty_image(vm.ballast.dir(), "disk", 32 * MIB);
    let id = vm.add_disk(&json!({"path": image, "serial": "busy"}));
    let device = vm.disk_in_guest("busy");
    vm.agent.ok(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt && mount -t ext4 {device} /mnt"
    ));
    vm.agent.ok("(while dd if=/dev/zero of=/mnt/a bs=64k count=64 conv=fsync; do :; done) >/dev/null 2>&1 &");
    vm.remove_device(&id);
    assert_eq!(vm.agent.ok("echo alive"), "alive");
    assert_eq!(vm.api.state(), "Running");
    // The same image can come back.
    vm.add_disk(&json!({"path": image, "serial": "back"}));
    vm.disk_in_guest("back");
    vm.ballast.assert_well();
}

#[test]
fn a_disk_that_was_there_at_boot_can_go_and_stays_away() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([
            {"path": empty_image(folder, "a", MIB), "id": "a", "serial": "sa"},
            {"path": empty_image(folder, "b", MIB), "id": "b", "serial": "sb"},
        ]);
    });
    vm.disk_in_guest("sa");
    vm.remove_device("a");
    vm.wait_disk_gone("sa");
    let added = empty_image(vm.ballast.dir(), "c", MIB);
    vm.add_disk(&json!({"path": added, "id": "c", "serial": "sc"}));
    assert_eq!(disk_ids(&mut vm), ["b", "c"]);
    let line = vm.agent.mark();
    vm.api.put("vm.reboot");
    vm.agent.wait_ready_after(line);
    vm.disk_in_guest("sb");
    vm.disk_in_guest("sc");
    vm.wait_disk_gone("sa");
    assert_eq!(disk_ids(&mut vm), ["b", "c"]);
}

fn disk_ids(vm: &mut Vm) -> Vec<String> {
    let config = vm.api.get("vm.info")["config"]["disks"].clone();
    let disks = config.as_array().expect("disks").clone();
    disks
        .iter()
        .map(|disk| disk["id"].as_str().expect("an id").to_owned())
        .collect()
}

/// The node of the device's PCI function, which is the one that comes and goes.
fn transport(id: &str) -> String {
    format!("_virtio-pci-{id}")
}

/// `removal` of a device, as `vm.info` shows it.
fn removal(vm: &mut Vm, id: &str) -> Value {
    vm.api.get("vm.info")["device_tree"][transport(id)]["removal"].clone()
}

#[test]
fn a_guest_that_stands_still_ejects_nothing_until_it_goes_on() {
    let mut vm = Vm::boot(|_, _| {});
    let image = empty_image(vm.ballast.dir(), "disk", MIB);
    let id = vm.add_disk(&json!({"path": image, "serial": "stuck"}));
    vm.disk_in_guest("stuck");
    vm.api.put("vm.pause");
    let stream = vm.events.mark();
    vm.api.put_json("vm.remove-device", &json!({"id": id}));
    assert_eq!(removal(&mut vm, &id), "removing");
    vm.events
        .wait_for_device(stream, "device-removal-timed-out", &id);
    assert_eq!(removal(&mut vm, &id), "timed_out");
    vm.api.put("vm.resume");
    // It sees the request only now.
    vm.events.wait_for_device(stream, "device-removed", &id);
    vm.wait_disk_gone("stuck");
    vm.add_disk(&json!({"path": image, "id": id, "serial": "again"}));
    vm.disk_in_guest("again");
}

#[test]
fn a_guest_that_never_ejects_keeps_the_disk_until_its_reset() {
    let mut vm = Vm::boot(|config, folder| {
        add_to_cmdline(config, "acpiphp.disable=1");
        config["disks"] =
            json!([{"path": filled_image(folder, "disk", MIB), "id": "disk", "serial": "kept"}]);
    });
    let before = vm.ballast.holdings();
    let device = vm.disk_in_guest("kept");
    let stream = vm.events.mark();
    vm.api.put_json("vm.remove-device", &json!({"id": "disk"}));
    // A repeated request is no error, and the id stays taken.
    vm.api.put_json("vm.remove-device", &json!({"id": "disk"}));
    let other = empty_image(vm.ballast.dir(), "other", MIB);
    vm.api
        .try_put_json("vm.add-disk", &json!({"path": other, "id": "disk"}))
        .expect(409);
    vm.events
        .wait_for_device(stream, "device-removal-timed-out", "disk");
    assert_eq!(removal(&mut vm, "disk"), "timed_out");
    // The guest still has it, and it works.
    vm.agent
        .ok(&format!("dd if={device} of=/dev/null bs=1M iflag=direct"));
    vm.api.put_json("vm.remove-device", &json!({"id": "disk"}));
    assert_eq!(removal(&mut vm, "disk"), "removing");
    let line = vm.agent.mark();
    vm.agent.type_in("RUN x reboot -f\n");
    vm.events.wait_for_device(stream, "device-removed", "disk");
    vm.agent.wait_ready_after(line);
    vm.wait_disk_gone("kept");
    assert!(removal(&mut vm, "disk").is_null());
    vm.api
        .put_json("vm.add-disk", &json!({"path": other, "id": "disk"}));
    assert_holds_again(vm.ballast.pid(), &{
        let mut expected = before;
        for descriptor in &mut expected.descriptors {
            if descriptor.ends_with("/disk") {
                *descriptor = other.display().to_string();
            }
        }
        expected.descriptors.sort();
        expected
    });
}

#[test]
fn a_removal_asked_for_just_before_the_plug_is_pulled_is_done_with() {
    let mut vm = Vm::boot(|config, folder| {
        add_to_cmdline(config, "acpiphp.disable=1");
        config["disks"] = json!([{"path": empty_image(folder, "disk", MIB), "id": "disk"}]);
    });
    let stream = vm.events.mark();
    vm.api.put_json("vm.remove-device", &json!({"id": "disk"}));
    vm.api.put("vm.reboot");
    vm.events.wait_for_device(stream, "device-removed", "disk");
    assert!(
        vm.api.get("vm.info")["config"]["disks"]
            .as_array()
            .is_none_or(Vec::is_empty)
    );
}

#[test]
fn devices_of_the_machine_stay() {
    let mut vm = Vm::boot(|_, _| {});
    let tree = vm.api.get("vm.info")["device_tree"].clone();
    let ids: Vec<String> = tree.as_object().expect("a tree").keys().cloned().collect();
    for id in ids.iter().filter(|id| id.starts_with('_')) {
        vm.api
            .try_put_json("vm.remove-device", &json!({"id": id}))
            .expect_refusal(id);
    }
    assert_eq!(vm.api.get("vm.info")["device_tree"], tree);
}
