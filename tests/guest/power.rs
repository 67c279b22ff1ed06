//! The power button, power-off, NMIs.

use crate::support::ballast::Launch;
use crate::support::eventually;
use crate::vm::{Vm, add_to_cmdline, set_vcpus};

#[test]
fn the_power_button_ends_guest_and_process() {
    let mut vm = Vm::boot(|_, _| {});
    vm.api.put("vm.power-button");
    vm.ballast.wait_for_clean_end();
    vm.events.assert_order(&["vm:booted", "vm:shutdown"]);
    assert!(!vm.ballast.socket().exists());
}

#[test]
fn the_power_button_leaves_the_process_when_told_so_and_the_guest_boots_again() {
    let mut vm = Vm::start(Launch::new().arg("--no-shutdown"), |_, _| {});
    vm.agent.wait_ready();
    for _ in 0..3 {
        let (line, stream) = (vm.agent.mark(), vm.events.mark());
        vm.api.put("vm.power-button");
        vm.events.wait_after(stream, "shutdown", |_| true);
        eventually("the VM is off", || {
            (vm.api.state() == "Created").then_some(())
        });
        vm.api.put("vm.boot");
        vm.agent.wait_ready_after(line);
    }
    vm.assert_guest_content();
}

#[test]
fn a_guest_that_powers_itself_off_ends_the_process() {
    let mut vm = Vm::start(Launch::new(), |config, _| {
        set_vcpus(config, 2);
        add_to_cmdline(config, "ballast.poweroff");
    });
    vm.ballast.wait_for_clean_end();
    vm.events.assert_order(&["vm:booted", "vm:shutdown"]);
}

#[test]
fn an_nmi_reaches_every_processor() {
    let mut vm = Vm::boot(|config, _| set_vcpus(config, 2));
    let nmis = "awk '/^ *NMI:/ {print $2, $3}' /proc/interrupts";
    // What the kernel says of them, as of an emergency, would get between the agent's words.
    vm.agent.ok("echo 0 >/proc/sys/kernel/printk");
    let before = vm.agent.ok(nmis);
    vm.api.put("vm.nmi");
    eventually("both processors count an NMI", || {
        let counts = |text: &str| -> Vec<u64> {
            text.split(' ')
                .map(|n| n.parse().expect("a number"))
                .collect()
        };
        let (before, after) = (counts(&before), counts(&vm.agent.ok(nmis)));
        (before.len() == 2 && before.iter().zip(&after).all(|(b, a)| a > b)).then_some(())
    });
    let log = vm.agent.ok("dmesg");
    assert!(log.contains("NMI received for unknown reason"), "{log}");
    assert_eq!(vm.api.state(), "Running");
}

#[test]
fn an_nmi_panics_the_guest_that_wishes_so() {
    let mut vm = Vm::boot(|config, _| add_to_cmdline(config, "unknown_nmi_panic=1 panic=-1"));
    vm.agent.ok("sysctl -w kernel.unknown_nmi_panic=1");
    let (line, stream) = (vm.agent.mark(), vm.events.mark());
    vm.api.put("vm.nmi");
    vm.events.wait_after(stream, "guest-reset", |_| true);
    vm.agent.wait_ready_after(line);
}
