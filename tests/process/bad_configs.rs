//! Configurations that can't be.

use serde_json::{Value, json};

use super::{assert_never_boots, before, refusal};
use crate::support::ballast::Ballast;

/// `base` with the value at `pointer` set.
fn with(base: &Value, pointer: &str, value: Value) -> Value {
    let mut config = base.clone();
    let mut place = &mut config;
    for key in pointer.split('/') {
        place = &mut place[key];
    }
    *place = value;
    config
}

#[test]
fn impossible_processors_are_refused() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    for cpus in [
        json!({"boot_vcpus": 0, "max_vcpus": 0}),
        json!({"boot_vcpus": 0, "max_vcpus": 1}),
        json!({"boot_vcpus": 65, "max_vcpus": 65}),
        json!({"boot_vcpus": 10_000, "max_vcpus": 10_000}),
        json!({"boot_vcpus": -1, "max_vcpus": 1}),
        json!({"boot_vcpus": 4_294_967_296_u64, "max_vcpus": 1}),
        json!({"boot_vcpus": 1.5, "max_vcpus": 1}),
        json!({"boot_vcpus": "1", "max_vcpus": 1}),
        json!({"boot_vcpus": 2, "max_vcpus": 1}),
        json!({"boot_vcpus": 1, "max_vcpus": 1, "max_phys_bits": 255}),
        json!({"boot_vcpus": 4, "max_vcpus": 4, "topology":
            {"threads_per_core": 65535, "cores_per_die": 65535, "dies_per_package": 1, "packages": 65535}}),
        json!({"boot_vcpus": 4, "max_vcpus": 4, "topology":
            {"threads_per_core": 0, "cores_per_die": 4, "dies_per_package": 1, "packages": 1}}),
        json!([]),
        json!(4),
    ] {
        let config = with(&base, "cpus", cpus.clone());
        assert_never_boots(&mut ballast, &cpus.to_string(), &config);
    }
}

#[test]
fn impossible_memory_is_refused() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    for memory in [
        json!({"size": 0}),
        json!({"size": 1}),
        json!({"size": (64 << 20) + 1}),
        json!({"size": (64 << 20) + 512}),
        json!({"size": -1}),
        json!({"size": u64::MAX}),
        json!({"size": u64::MAX - 4095}),
        json!({"size": 1_u64 << 62}),
        json!({"size": 1e300}),
        json!({"size": "64M"}),
        json!({}),
        json!({"size": 64 << 20, "hugepages": true, "hugepage_size": 4096}),
        json!({"size": 64 << 20, "hugepages": true, "hugepage_size": 0}),
        json!({"size": 64 << 20, "hugepage_size": 2 << 20}),
        json!({"size": 64 << 20, "shared": true, "mergeable": true}),
    ] {
        let config = with(&base, "memory", memory.clone());
        assert_never_boots(&mut ballast, &memory.to_string(), &config);
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused_with_reserve() {
    let mut ballast = Ballast::start();
    let memory = json!({"size": 16_u64 << 40, "reserve": true});
    let config = with(&ballast.sleeper(), "memory", memory);
    assert_never_boots(&mut ballast, "16 TiB", &config);
}

#[test]
fn more_huge_pages_than_the_host_has_are_refused() {
    let mut ballast = Ballast::start();
    let memory = json!({"size": 1_u64 << 40, "hugepages": true, "prefault": true});
    let config = with(&ballast.sleeper(), "memory", memory);
    assert_never_boots(&mut ballast, "1 TiB of huge pages", &config);
}

#[test]
fn impossible_payloads_are_refused() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    let kernel = base["payload"]["kernel"].clone();
    for payload in [
        json!({}),
        json!({"initramfs": kernel}),
        json!({"kernel": kernel, "firmware": kernel}),
        json!({"firmware": kernel, "cmdline": "quiet"}),
        json!({"firmware": kernel, "initramfs": kernel}),
        json!({"kernel": kernel, "cmdline": "x".repeat(1 << 17)}),
        json!({"kernel": kernel, "cmdline": "a\u{0}b"}),
        json!({"kernel": ["a"]}),
    ] {
        let config = with(&base, "payload", payload.clone());
        let what: String = payload.to_string().chars().take(80).collect();
        assert_never_boots(&mut ballast, &what, &config);
    }
}

#[test]
fn a_vm_without_a_payload_does_not_boot_and_can_be_given_up() {
    let mut ballast = Ballast::start();
    assert_never_boots(
        &mut ballast,
        "no payload",
        &json!({"memory": {"size": 64 << 20}}),
    );
}

#[test]
fn features_that_are_not_built_are_refused_by_name_and_never_ignored() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    for (field, value) in [
        ("net", json!([{"tap": "tap0"}])),
        ("vsock", json!({"cid": 3, "socket": "/tmp/vsock"})),
        ("fs", json!([{"tag": "a", "socket": "/tmp/fs"}])),
        ("pmem", json!([{"file": "/tmp/pmem"}])),
        ("devices", json!([{"path": "/sys/bus/pci/devices/0"}])),
        ("vdpa", json!([{"path": "/dev/vhost-vdpa-0"}])),
        ("balloon", json!({"size": 0, "iommu": true})),
        ("tpm", json!({"socket": "/tmp/tpm"})),
        ("numa", json!([{"guest_numa_id": 0}])),
        ("watchdog", json!(true)),
        ("pvpanic", json!(true)),
        ("iommu", json!(true)),
        ("landlock_enable", json!(true)),
        ("console", json!({"mode": "Pty"})),
        ("platform", json!({"num_pci_segments": 2})),
        (
            "memory",
            json!({"size": 64 << 20, "hotplug_size": 64 << 20}),
        ),
        (
            "memory",
            json!({"size": 0, "zones": [{"id": "a", "size": 64 << 20}]}),
        ),
        ("cpus", json!({"boot_vcpus": 1, "max_vcpus": 2})),
        (
            "disks",
            json!([{"path": "/dev/null", "vhost_user": true, "vhost_socket": "/tmp/s"}]),
        ),
        (
            "disks",
            json!([{"path": "/dev/null", "image_type": "Vhdx"}]),
        ),
    ] {
        let mut client = ballast.api();
        let before = before(&ballast, &mut client);
        let answer = client.try_put_json("vm.create", &with(&base, field, value));
        let answer = answer.expect(400);
        let reasons = answer.reasons();
        assert!(reasons.contains("not supported yet"), "{field}: {reasons}");
        before.assert_unchanged(&mut ballast, &mut client, field);
    }
}

#[test]
fn devices_that_contradict_each_other_are_refused() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    let image = |name: &str| crate::support::artifacts::empty_image(ballast.dir(), name, 1 << 20);
    let (a, b) = (image("a"), image("b"));
    for disks in [
        json!([{"path": a, "id": "x"}, {"path": b, "id": "x"}]),
        json!([{"path": a}, {"path": a}]),
        json!([{"path": a}, {"path": a, "readonly": true}]),
        json!([{"path": a, "pci_device_id": 5}, {"path": b, "pci_device_id": 5}]),
        json!([{"path": a, "pci_device_id": 0}]),
        json!([{"path": a, "pci_device_id": 32}]),
        json!([{"path": a, "pci_segment": 1}]),
        json!([{"path": a, "id": "__rng"}]),
        json!([{"path": a, "id": ""}]),
        json!([{"path": a, "id": "x".repeat(10_000)}]),
        json!([{"path": a, "num_queues": 0}]),
        json!([{"path": a, "num_queues": 2}]),
        json!([{"path": a, "queue_size": 0}]),
        json!([{"path": a, "queue_size": 100}]),
        json!([{"path": a, "queue_size": 32768}]),
        json!([{"path": a, "serial": "x".repeat(21)}]),
        json!([{"path": a, "l2_cache_size": 1 << 20}]),
        json!([{"path": a, "image_type": "Qcow2", "l2_cache_size": 0}]),
        json!([{"path": a, "image_type": "Qcow2", "l2_cache_size": 4096}]),
        json!([{"path": a, "image_type": "Qcow2", "l2_cache_size": -1}]),
        json!([{"path": a, "image_type": "Qcow2", "l2_cache_size": u64::MAX}]),
        json!([{"path": a, "rate_limiter_config": {"ops": {"size": 0, "refill_time": 1}}}]),
        json!([{"path": a, "rate_limiter_config": {"ops": {"size": 1, "refill_time": 0}}}]),
        json!([{"path": a, "rate_limiter_config": {"opps": {"size": 1, "refill_time": 1}}}]),
        json!([{}]),
        json!({"path": a}),
        Value::Array(vec![json!({"path": "/dev/null", "readonly": true}); 40]),
        Value::Array(vec![json!({"path": "/dev/null", "readonly": true}); 20_000]),
    ] {
        let what: String = disks.to_string().chars().take(120).collect();
        assert_never_boots(&mut ballast, &what, &with(&base, "disks", disks));
    }
}

#[test]
fn impossible_consoles_are_refused() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    for (field, value) in [
        ("serial", json!({"mode": "File"})),
        ("serial", json!({"mode": "Socket"})),
        (
            "serial",
            json!({"mode": "File", "file": "/nonexistent/folder/file"}),
        ),
        ("serial", json!({"mode": "File", "file": "/tmp"})),
        (
            "serial",
            json!({"mode": "Socket", "socket": "/nonexistent/folder/socket"}),
        ),
        (
            "serial",
            json!({"mode": "Socket", "socket": format!("/tmp/{}", "x".repeat(200))}),
        ),
        ("serial", json!({"mode": "Loud"})),
        ("serial", json!({})),
        ("debug_console", json!({"mode": "File"})),
        ("debug_console", json!({"mode": "Socket"})),
        (
            "debug_console",
            json!({"mode": "File", "file": "/nonexistent/folder/file"}),
        ),
        ("debug_console", json!({"mode": "Null", "iobase": 0x3f8})),
        ("debug_console", json!({"mode": "Null", "iobase": 65536})),
    ] {
        let what = format!("{field} {value}");
        assert_never_boots(&mut ballast, &what, &with(&base, field, value));
    }
}

#[test]
fn a_misspelt_field_is_pointed_out() {
    let mut ballast = Ballast::start();
    let base = ballast.sleeper();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for (field, value) in [
        ("memroy", json!({"size": 64 << 20})),
        ("disk", json!([])),
        ("serail", json!({"mode": "Null"})),
    ] {
        let answer = client.try_put_json("vm.create", &with(&base, field, value));
        assert_eq!(answer.status, 400, "{field}: {}", answer.text());
        refusal(answer, field);
    }
    before.assert_unchanged(&mut ballast, &mut client, "misspelt fields");
}
