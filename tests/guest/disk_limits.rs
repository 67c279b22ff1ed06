//! Disks that are slowed down, cut short, or wanted by two.

use std::fs::File;

use serde_json::json;

use crate::support::artifacts::{MIB, empty_image, filled_image};
use crate::support::ballast::Ballast;
use crate::support::eventually;
use crate::vm::Vm;

#[test]
fn a_limited_disk_does_no_more_than_its_share_while_another_goes_on() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([
            {"path": empty_image(folder, "a", 16 * MIB), "id": "limited", "rate_limiter_config":
                {"ops": {"size": 20, "one_time_burst": 100, "refill_time": 100_000}}},
            {"path": empty_image(folder, "b", 16 * MIB), "id": "free"},
        ]);
    });
    let (limited, free) = (
        vm.counter("limited", "write_ops"),
        vm.counter("free", "write_ops"),
    );
    vm.agent
        .ok("dd if=/dev/zero of=/dev/vda bs=4k count=2000 oflag=direct >/dev/null 2>&1 &");
    vm.agent
        .ok("dd if=/dev/zero of=/dev/vdb bs=4k count=2000 oflag=direct 2>/dev/null");
    assert!(vm.counter("free", "write_ops") - free >= 2000);
    // 120 at once and one every five seconds: 500 would take half an hour.
    let done = vm.counter("limited", "write_ops") - limited;
    assert!(done < 500, "{done}");
    // Waiting for tokens keeps nobody from pausing, resuming, or pulling the plug.
    vm.api.put("vm.pause");
    vm.api.put("vm.resume");
    assert!(vm.counter("limited", "write_ops") - limited < 500);
    vm.api.put("vm.shutdown");
    vm.ballast.assert_well();
}

#[test]
fn a_limited_disk_gets_everything_done_in_the_end() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([
            {"path": empty_image(folder, "a", 16 * MIB), "rate_limiter_config": {
                "bandwidth": {"size": 4 * MIB, "refill_time": 500},
                "ops": {"size": 100, "refill_time": 100},
            }},
        ]);
    });
    vm.agent
        .ok("dd if=/dev/urandom of=/a bs=1M count=16 2>/dev/null");
    vm.agent.ok(
        "dd if=/a of=/dev/vda bs=1M oflag=direct && dd if=/dev/vda bs=64k iflag=direct | cmp - /a",
    );
    vm.assert_guest_content();
}

#[test]
fn an_image_cut_short_under_a_running_guest_is_an_io_error_to_guest_and_client() {
    let mut vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": filled_image(folder, "disk", 8 * MIB), "id": "disk"}]);
    });
    vm.agent
        .ok("dd if=/dev/vda of=/dev/null bs=1M skip=6 count=2 iflag=direct");
    let image = File::options().write(true).open(vm.path("disk")).unwrap();
    image.set_len(4 * MIB).unwrap();
    let stream = vm.events.mark();
    let said = vm
        .agent
        .fails("dd if=/dev/vda of=/dev/null bs=1M skip=6 count=1 iflag=direct");
    assert!(
        said.contains("Input/output error") || said.contains("I/O error"),
        "{said}"
    );
    let event = vm.events.wait_for_device(stream, "io-error", "disk");
    assert!(event["properties"].is_object(), "{event}");
    // What is still there can be read, and when the rest is back, so can that.
    vm.agent
        .ok("dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct");
    image.set_len(8 * MIB).unwrap();
    vm.agent
        .ok("dd if=/dev/vda of=/dev/null bs=1M iflag=direct");
    assert_eq!(vm.api.state(), "Running");
    vm.ballast.assert_well();
}

#[test]
fn a_storm_of_io_errors_is_not_a_storm_of_events() {
    let vm = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": filled_image(folder, "disk", 8 * MIB), "id": "disk"}]);
    });
    File::options()
        .write(true)
        .open(vm.path("disk"))
        .unwrap()
        .set_len(MIB)
        .unwrap();
    vm.agent.run(
        "for i in $(seq 300); do dd if=/dev/vda of=/dev/null bs=512 skip=$((8192 + i)) count=1 iflag=direct; done >/dev/null 2>&1",
    );
    let events = vm
        .events
        .names()
        .iter()
        .filter(|name| name.ends_with("io-error"))
        .count();
    assert!((1..290).contains(&events), "{events} events");
}

#[test]
fn two_vms_never_write_one_image() {
    let mut first = Vm::boot(|config, folder| {
        config["disks"] = json!([{"path": filled_image(folder, "disk", MIB), "id": "disk"}]);
    });
    let image = first.path("disk");
    let second = Ballast::start();
    let mut config = second.sleeper();
    let mut api = second.api();
    for readonly in [false, true] {
        config["disks"] = json!([{"path": image, "readonly": readonly}]);
        let created = api.try_put_json("vm.create", &config);
        // Whichever of the two finds out, it is the same refusal.
        let refused = if created.status == 204 {
            let refused = api.request("PUT", "vm.boot", None);
            api.put("vm.delete");
            refused
        } else {
            created
        };
        refused.expect(409);
    }
    // Nor does a hot-added disk slip through, in the other process or in the same.
    config["disks"] = json!([]);
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    for readonly in [false, true] {
        let disk = json!({"path": image, "readonly": readonly, "id": "again"});
        api.try_put_json("vm.add-disk", &disk).expect(409);
        first.api.try_put_json("vm.add-disk", &disk).expect(409);
    }
    first
        .agent
        .ok("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct");
    // Once the first has let go, the second may have it, in the running guest.
    first.api.put("vm.delete");
    let added = eventually("the image is free", || {
        let answer = api.try_put_json("vm.add-disk", &json!({"path": image}));
        (answer.status == 200).then_some(answer)
    });
    added.expect(200);
}

#[test]
fn many_vms_may_read_one_image() {
    let folder = tempfile::tempdir().unwrap();
    let image = filled_image(folder.path(), "disk", MIB);
    let boot =
        || Vm::boot(|config, _| config["disks"] = json!([{"path": image, "readonly": true}]));
    let (first, second) = (boot(), boot());
    let sum = "sha256sum /dev/vda";
    assert_eq!(first.agent.ok(sum), second.agent.ok(sum));
    let writer = Ballast::start();
    let mut config = writer.sleeper();
    config["disks"] = json!([{"path": image}]);
    let created = writer.api().try_put_json("vm.create", &config);
    if created.status == 204 {
        writer.api().request("PUT", "vm.boot", None).expect(409);
    } else {
        created.expect(409);
    }
}
