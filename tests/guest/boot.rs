//! Kernels, processors, and the machine as the guest finds it.

use std::time::{Instant, SystemTime};

use serde_json::json;

use crate::support::artifacts::guest;
use crate::support::ballast::Launch;
use crate::vm::{Vm, add_to_cmdline, set_vcpus};

#[test]
fn an_elf_kernel_boots_with_its_initramfs_and_command_line() {
    let vm = Vm::boot(|config, _| add_to_cmdline(config, "one=1 two=\"a b\""));
    let cmdline = vm.agent.ok("cat /proc/cmdline");
    assert!(
        cmdline.contains("console=ttyS0 quiet one=1 two=\"a b\""),
        "{cmdline}"
    );
    vm.assert_guest_content();
}

#[test]
fn a_bzimage_straight_from_the_package_boots() {
    let vm = Vm::boot(|config, _| {
        config["payload"]["kernel"] = json!(guest("vmlinuz"));
        add_to_cmdline(config, "one=1");
    });
    let cmdline = vm.agent.ok("cat /proc/cmdline");
    assert!(cmdline.contains("console=ttyS0 quiet one=1"), "{cmdline}");
    vm.assert_guest_content();
}

#[test]
fn the_time_a_boot_takes_is_reported() {
    let ballast = Launch::new().start();
    let config = crate::vm::config(ballast.dir());
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    let start = Instant::now();
    api.put("vm.boot");
    let answered = start.elapsed();
    let agent = crate::support::agent::Agent::on_socket(&ballast.path("serial.sock"));
    agent.wait_ready();
    let ready = start.elapsed();
    let first = agent.first_byte().map_or(ready, |at| at - start);
    let uptime = agent.ok("cut -d' ' -f1 /proc/uptime");
    println!(
        "boot: answered {answered:.3?}, first serial byte {first:.3?}, ready {ready:.3?}, \
         the guest's own clock says {uptime} s"
    );
}

#[test]
fn one_processor_is_seen() {
    assert_processors(1);
}

#[test]
fn two_processors_are_seen() {
    assert_processors(2);
}

#[test]
fn four_processors_are_seen() {
    assert_processors(4);
}

fn assert_processors(count: u32) {
    let vm = Vm::boot(|config, _| set_vcpus(config, count));
    assert_eq!(vm.agent.number("nproc"), u64::from(count));
    let online = vm.agent.ok("cat /sys/devices/system/cpu/online");
    let expected = if count == 1 {
        "0".to_owned()
    } else {
        format!("0-{}", count - 1)
    };
    assert_eq!(online, expected);
    // A core each, all in one socket.
    let cores = vm
        .agent
        .ok("cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u | wc -l");
    assert_eq!(cores, count.to_string());
    let sockets = vm
        .agent
        .ok("cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u | wc -l");
    assert_eq!(sockets, "1");
    // Each of them works.
    for cpu in 0..count {
        assert_eq!(
            vm.agent
                .ok(&format!("taskset -c {cpu} sh -c 'echo $((6 * 7))'")),
            "42"
        );
    }
    vm.assert_guest_content();
}

#[test]
fn a_topology_of_threads_and_sockets_is_seen() {
    let vm = Vm::boot(|config, _| {
        config["cpus"] = json!({"boot_vcpus": 4, "max_vcpus": 4, "topology":
            {"threads_per_core": 2, "cores_per_die": 1, "dies_per_package": 1, "packages": 2}});
    });
    // Two to a socket; that they are threads of one core an AMD tells only with TOPOEXT, which an
    // emulated one has not got.
    let siblings = vm.agent.ok("grep siblings /proc/cpuinfo | sort -u");
    assert!(siblings.ends_with(": 2"), "{siblings}");
    if vm
        .agent
        .run("grep -qE 'GenuineIntel|topoext' /proc/cpuinfo")
        .0
        == 0
    {
        let threads = vm
            .agent
            .ok("cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list");
        assert!(threads == "0-1" || threads == "0,1", "{threads}");
    }
    let sockets = vm
        .agent
        .ok("cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u | wc -l");
    assert_eq!(sockets, "2");
    vm.assert_guest_content();
}

#[test]
fn the_guest_knows_that_it_runs_on_kvm_and_uses_what_that_offers() {
    let vm = Vm::boot(|config, _| {
        set_vcpus(config, 2);
        config["disks"] = json!([{"path": guest("debian.raw"), "readonly": true}]);
    });
    let log = vm.agent.ok("dmesg");
    for expected in [
        "Hypervisor detected: KVM",
        "kvm-clock: Using msrs",
        "kvm-guest: PV spinlocks enabled",
        "kvm-guest: setup PV IPIs",
        "x2apic enabled",
    ] {
        assert!(log.contains(expected), "no `{expected}` in:\n{log}");
    }
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    assert_eq!(vm.agent.ok(&format!("cat {clock}")), "kvm-clock");
    let guest = vm.agent.number("date +%s");
    let host = seconds_since_1970();
    assert!(guest.abs_diff(host) < 300, "guest {guest}, host {host}");

    // The rest says nothing of itself, so the CPUID leaf is asked: of Debian's driver.
    vm.agent
        .ok("mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt && mount --bind /dev /mnt/dev");
    vm.agent.ok("chroot /mnt modprobe cpuid");
    let features = vm.agent.number(
        "dd if=/dev/cpu/1/cpuid bs=16 count=1 iflag=skip_bytes skip=$((0x40000001)) 2>/dev/null \
         | hexdump -n 4 -e '\"%u\"'",
    );
    for (bit, feature) in [
        (3, "clock"),
        (4, "asynchronous page faults"),
        (5, "steal time"),
        (6, "EOI"),
        (7, "unhalt"),
    ] {
        assert!(features >> bit & 1 == 1, "no {feature} in {features:#x}");
    }
}

fn seconds_since_1970() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.expect("a clock after 1970").as_secs()
}

#[test]
fn the_clock_chip_the_tables_and_the_entropy_are_there() {
    let vm = Vm::boot(|config, _| {
        config["platform"] = json!({
            "system_manufacturer": "Maker",
            "system_product_name": "Product",
            "system_serial_number": "Serial-42",
            "system_uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "chassis_asset_tag": "Tag",
        });
    });
    let dmi = |name: &str| vm.agent.ok(&format!("cat /sys/class/dmi/id/{name}"));
    assert_eq!(dmi("sys_vendor"), "Maker");
    assert_eq!(dmi("product_name"), "Product");
    assert_eq!(dmi("product_serial"), "Serial-42");
    assert_eq!(dmi("product_uuid"), "00112233-4455-6677-8899-aabbccddeeff");
    assert_eq!(dmi("chassis_asset_tag"), "Tag");

    let rtc = vm.agent.number("cat /sys/class/rtc/rtc0/since_epoch");
    let host = seconds_since_1970();
    assert!(rtc.abs_diff(host) < 300, "clock chip {rtc}, host {host}");

    let tables = vm.agent.ok("ls /sys/firmware/acpi/tables");
    for table in ["APIC", "DSDT", "FACP", "MCFG"] {
        assert!(tables.contains(table), "{table} in {tables}");
    }
    assert_eq!(
        vm.agent.ok("cat /sys/class/misc/hw_random/rng_current"),
        "virtio_rng.0"
    );
    let bytes = vm
        .agent
        .number("dd if=/dev/hwrng bs=512 count=64 2>/dev/null | wc -c");
    assert_eq!(bytes, 512 * 64);
    let distinct = vm.agent.number(
        "dd if=/dev/hwrng bs=4096 count=1 2>/dev/null | hexdump -v -e '1/4 \"%x\\n\"' | sort -u | wc -l",
    );
    assert!(distinct > 1000, "1024 words, {distinct} different ones");
    vm.assert_guest_content();
}
