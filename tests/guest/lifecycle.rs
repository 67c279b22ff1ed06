//! A process and its VMs, one after the other.

use std::fs;

use rustix::process::Signal;
use serde_json::json;

use crate::support::agent::Agent;
use crate::support::artifacts::{MIB, empty_image};
use crate::support::ballast::Launch;
use crate::support::events::Mark;
use crate::support::procfs::{assert_holds_again, seccomp_modes};
use crate::vm::{Vm, config, set_vcpus};

#[test]
fn a_vm_that_was_shut_down_boots_again_in_the_same_process() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": empty_image(folder, "disk", MIB), "id": "disk"}]);
    });
    let before = vm.ballast.holdings();
    for round in 0..5 {
        vm.agent.ok(&format!(
            "echo {round} | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null"
        ));
        vm.api.put("vm.shutdown");
        assert_eq!(vm.api.state(), "Created");
        let line = vm.agent.mark();
        vm.api.put("vm.boot");
        vm.agent.wait_ready_after(line);
        assert_eq!(vm.agent.ok("head -n 1 /dev/vda"), round.to_string());
    }
    assert_holds_again(vm.ballast.pid(), &before);
}

#[test]
fn after_a_delete_another_vm_takes_the_process_over() {
    let mut vm = Vm::boot(|_, _| {});
    assert_eq!(vm.agent.ok("nproc"), "1");
    vm.api.put("vm.delete");
    vm.api.request("GET", "vm.info", None).expect(404);
    let mut config = config(vm.ballast.dir());
    set_vcpus(&mut config, 2);
    config["memory"]["size"] = json!(384 * MIB);
    config["disks"] = json!([{"path": empty_image(vm.ballast.dir(), "disk", 5 * MIB)}]);
    let line = vm.agent.mark();
    vm.api.put_json("vm.create", &config);
    vm.api.put("vm.boot");
    vm.agent.wait_ready_after(line);
    assert_eq!(vm.agent.ok("nproc"), "2");
    assert_eq!(vm.agent.number("blockdev --getsize64 /dev/vda"), 5 * MIB);
    assert!(vm.agent.number("awk '/MemTotal/ {print $2}' /proc/meminfo") > 300 * 1024);
}

#[test]
fn every_thread_of_a_busy_vm_is_filtered_and_named() {
    let mut vm = Vm::boot(|config, folder| {
        set_vcpus(config, 2);
        config["disks"] = json!([
            {"path": empty_image(folder, "disk", 16 * MIB), "id": "data", "num_queues": 2},
            {"path": empty_image(folder, "plain", 16 * MIB), "id": "plain", "disable_io_uring": true},
        ]);
    });
    vm.agent.ok("for d in vda vdb; do dd if=/dev/urandom of=/dev/$d bs=64k count=200 oflag=direct 2>/dev/null; done");
    let image = empty_image(vm.ballast.dir(), "hot", MIB);
    vm.add_disk(&json!({"path": image, "id": "hot", "serial": "hot"}));
    vm.disk_in_guest("hot");
    vm.api.put("vm.pause");
    vm.api.put("vm.resume");
    let modes = seccomp_modes(vm.ballast.pid());
    for (name, mode) in &modes {
        assert_eq!(*mode, 2, "{name} of {modes:?}");
    }
    for expected in [
        "vcpu0", "vcpu1", "data_q0", "data_q1", "plain_q0", "hot_q0", "__rng", "vmm",
    ] {
        assert!(
            modes.iter().any(|(name, _)| name == expected),
            "{expected} in {modes:?}"
        );
    }
    println!("threads: {modes:?}");
}

#[test]
fn a_signal_ends_a_process_with_a_running_guest_cleanly() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut vm = Vm::boot(|config, _| set_vcpus(config, 2));
        vm.agent.ok("(while :; do :; done) >/dev/null 2>&1 &");
        vm.ballast.signal(signal);
        vm.ballast.wait_for_clean_end();
        assert!(!vm.ballast.socket().exists());
        assert!(!vm.path("serial.sock").exists(), "the serial socket stays");
    }
}

#[test]
fn a_config_file_boots_a_guest() {
    let mut launch = Launch::new();
    let path = launch.path("vm.json");
    let config = config(path.parent().unwrap());
    fs::write(&path, config.to_string()).unwrap();
    launch.command().arg("--config").arg(&path);
    let mut ballast = launch.start();
    let agent = Agent::on_socket(&ballast.path("serial.sock"));
    agent.wait_ready();
    assert_eq!(ballast.api().state(), "Running");
    ballast.api().put("vm.power-button");
    ballast.wait_for_clean_end();
}

#[test]
fn the_events_of_a_life_come_in_order() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": empty_image(folder, "disk", MIB), "id": "disk"}]);
    });
    for id in ["disk", "__rng"] {
        vm.events.wait_for_device(Mark::START, "activated", id);
    }
    vm.api.put("vm.pause");
    vm.api.put("vm.resume");
    let line = vm.agent.mark();
    vm.api.put("vm.reboot");
    vm.agent.wait_ready_after(line);
    vm.remove_device("disk");
    vm.api.put("vm.shutdown");
    vm.api.put("vm.delete");
    vm.events.wait_for("deleted");
    vm.events.assert_order(&[
        "vm:booting",
        "vm:booted",
        "virtio-device:activated",
        "vm:pausing",
        "vm:paused",
        "vm:resuming",
        "vm:resumed",
        "vm:rebooting",
        "vm:rebooted",
        "virtio-device:activated",
        "vm:device-removed",
        "vm:shutdown",
        "vm:deleted",
    ]);
}
