//! Reboots: from outside, from inside, and by accident.

use serde_json::json;

use crate::support::artifacts::empty_image;
use crate::support::procfs::assert_holds_again;
use crate::vm::{Vm, add_to_cmdline};

#[test]
fn ten_reboots_from_outside_leave_a_guest_as_good_as_new() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": empty_image(folder, "disk", 8 << 20)}]);
    });
    vm.agent
        .ok("echo kept | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null");
    let before = vm.ballast.holdings();
    for _ in 0..10 {
        let (line, stream) = (vm.agent.mark(), vm.events.mark());
        vm.api.put("vm.reboot");
        vm.events.wait_after(stream, "rebooted", |_| true);
        vm.agent.wait_ready_after(line);
        assert_eq!(vm.agent.ok("head -n 1 /dev/vda"), "kept");
    }
    assert_eq!(vm.api.state(), "Running");
    assert_holds_again(vm.ballast.pid(), &before);
    vm.assert_guest_content();
}

#[test]
fn ten_reboots_from_inside_go_the_same_way() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": empty_image(folder, "disk", 8 << 20)}]);
    });
    let before = vm.ballast.holdings();
    for round in 0..10 {
        let (line, stream) = (vm.agent.mark(), vm.events.mark());
        vm.agent.ok(&format!(
            "echo round {round} | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null"
        ));
        vm.agent.type_in("RUN x reboot -f\n");
        vm.events.wait_after(stream, "guest-reset", |_| true);
        vm.agent.wait_ready_after(line);
        assert_eq!(vm.agent.ok("head -n 1 /dev/vda"), format!("round {round}"));
    }
    assert_eq!(vm.api.state(), "Running");
    assert_holds_again(vm.ballast.pid(), &before);
}

#[test]
fn a_guest_that_does_nothing_but_reboot_goes_round_and_round_and_can_be_stopped() {
    let mut vm = Vm::start(crate::support::ballast::Launch::new(), |config, _| {
        add_to_cmdline(config, "ballast.reboot");
    });
    for _ in 0..5 {
        let stream = vm.events.mark();
        vm.events.wait_after(stream, "guest-reset", |_| true);
    }
    vm.api.put("vm.delete");
    vm.ballast.assert_well();
}

/// Reboots in the way that the kernel parameter `reboot=` chooses.
fn assert_reboots(way: &str) {
    let mut vm = Vm::boot(|config, _| add_to_cmdline(config, way));
    for _ in 0..2 {
        let (line, stream) = (vm.agent.mark(), vm.events.mark());
        vm.agent.type_in("RUN x reboot -f\n");
        vm.events.wait_after(stream, "guest-reset", |_| true);
        vm.agent.wait_ready_after(line);
    }
    assert_eq!(vm.api.state(), "Running");
}

#[test]
fn the_acpi_reset_register_resets() {
    assert_reboots("reboot=a");
}

#[test]
fn the_keyboard_controller_resets() {
    assert_reboots("reboot=k");
}

#[test]
fn a_triple_fault_resets() {
    assert_reboots("reboot=t");
}

#[test]
fn the_magic_key_resets_at_once() {
    let mut vm = Vm::boot(|_, _| {});
    let (line, stream) = (vm.agent.mark(), vm.events.mark());
    vm.agent.type_in("RUN x echo b >/proc/sysrq-trigger\n");
    vm.events.wait_after(stream, "guest-reset", |_| true);
    vm.agent.wait_ready_after(line);
    assert_eq!(vm.api.state(), "Running");
}

#[test]
fn a_kernel_that_panics_reboots_when_told_to() {
    let vm = Vm::boot(|config, _| add_to_cmdline(config, "panic=-1"));
    let (line, stream) = (vm.agent.mark(), vm.events.mark());
    vm.agent.type_in("RUN x echo c >/proc/sysrq-trigger\n");
    vm.events.wait_after(stream, "guest-reset", |_| true);
    vm.agent.wait_ready_after(line);
}
