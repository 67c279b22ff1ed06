//! Pause and resume, with the guest hard at work.

use serde_json::json;

use crate::support::artifacts::empty_image;
use crate::vm::{Vm, set_vcpus};

#[test]
fn twenty_pauses_under_load_lose_no_byte_and_upset_no_clock() {
    let mut vm = Vm::boot(|config, folder| {
        set_vcpus(config, 2);
        config["disks"] = json!([{"path": empty_image(folder, "disk", 64 << 20), "num_queues": 2}]);
    });
    // One processor computes, the other writes and reads back; both until told to stop, and both
    // say how it went.
    vm.agent
        .ok("dd if=/dev/urandom of=/a bs=1M count=8 2>/dev/null");
    vm.agent.ok("(n=0; while [ ! -e /stop ]; do n=$((n + 1)); sha256sum /a >/sum; done; echo $n >/computed) >/dev/null 2>&1 &");
    vm.agent.ok(
        "(n=0; while [ ! -e /stop ]; do n=$((n + 1)); \
         dd if=/a of=/dev/vda bs=1M seek=$((n % 8 * 8)) oflag=direct 2>/dev/null; \
         dd if=/dev/vda bs=1M skip=$((n % 8 * 8)) count=8 iflag=direct 2>/dev/null | cmp - /a || echo different >>/bad; \
         done; echo $n >/copied) >/dev/null 2>&1 &",
    );
    let mut clock = vm.agent.number("date +%s");
    for _ in 0..20 {
        vm.api.put("vm.pause");
        assert_eq!(vm.api.state(), "Paused");
        let stopped = vm.api.get("vm.counters");
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(vm.api.get("vm.counters"), stopped, "a paused disk works on");
        vm.api.put("vm.resume");
        assert_eq!(vm.api.state(), "Running");
        let now = vm.agent.number("date +%s");
        assert!(
            now >= clock,
            "the guest's clock went back from {clock} to {now}"
        );
        clock = now;
    }
    vm.agent
        .ok("touch /stop; while [ ! -e /computed ] || [ ! -e /copied ]; do usleep 100000; done");
    assert!(vm.agent.number("cat /computed") > 0);
    assert!(vm.agent.number("cat /copied") > 0);
    vm.agent.fails("cat /bad");
    vm.assert_guest_content();
}

#[test]
fn a_long_pause_goes_by_unnoticed() {
    let mut vm = Vm::boot(|config, _| set_vcpus(config, 2));
    let before = vm.agent.number("date +%s");
    vm.api.put("vm.pause");
    std::thread::sleep(std::time::Duration::from_secs(12));
    vm.api.put("vm.resume");
    let after = vm.agent.number("date +%s");
    assert!(after >= before);
    vm.assert_guest_content();
}

#[test]
fn what_happens_during_a_pause_is_there_after_it() {
    let mut vm = Vm::boot(|_, _| {});
    vm.api.put("vm.pause");
    let image = empty_image(vm.ballast.dir(), "disk", 8 << 20);
    let id = vm.add_disk(&json!({"path": image, "serial": "added"}));
    vm.api.put("vm.resume");
    let device = vm.disk_in_guest("added");
    vm.agent.ok(&format!(
        "dd if=/dev/urandom of={device} bs=1M count=8 oflag=direct"
    ));
    vm.api.put("vm.pause");
    let stream = vm.events.mark();
    vm.api.put_json("vm.remove-device", &json!({"id": id}));
    vm.api.put("vm.resume");
    vm.events.wait_for_device(stream, "device-removed", &id);
    vm.wait_disk_gone("added");
}

#[test]
fn a_paused_guest_can_be_rebooted_and_shut_down() {
    let mut vm = Vm::boot(|config, _| set_vcpus(config, 2));
    vm.api.put("vm.pause");
    let line = vm.agent.mark();
    vm.api.put("vm.reboot");
    assert_eq!(vm.api.state(), "Running");
    vm.agent.wait_ready_after(line);
    vm.api.put("vm.pause");
    vm.api.put("vm.shutdown");
    assert_eq!(vm.api.state(), "Created");
    let line = vm.agent.mark();
    vm.api.put("vm.boot");
    vm.agent.wait_ready_after(line);
}

#[test]
fn a_pause_in_the_middle_of_the_boot_does_not_stop_it() {
    let mut vm = Vm::start(crate::support::ballast::Launch::new(), |config, _| {
        set_vcpus(config, 2)
    });
    for _ in 0..30 {
        vm.api.put("vm.pause");
        vm.api.put("vm.resume");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    vm.agent.wait_ready();
    assert_eq!(vm.agent.number("nproc"), 2);
}
