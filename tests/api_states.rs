//! What the API answers in each state, and to bad input: a clear 4xx, and nothing changed.

mod api_support;

use api_support::{Answer, Client, Server};
use vmm::state::State;

fn errors(answer: &Answer) -> Vec<String> {
    assert!(
        answer.has_header("Content-Type: application/json"),
        "{}",
        answer.head
    );
    serde_json::from_slice(&answer.body).unwrap()
}

/// Sends `operation` and says the status; an error must have the one shape.
fn status(client: &mut Client, operation: &str) -> u16 {
    let answer = match operation {
        "vm.info" | "vm.counters" | "vm.balloons" | "vm.balloon-stats" | "vm.overcommit"
        | "vm.jobs" => client.get(operation),
        "vm.stream-disk" | "vm.commit-disk" => client.put(operation, r#"{"id":"_disk7"}"#),
        "vm.set-job" | "vm.cancel-job" => client.put(operation, r#"{"id":"job7"}"#),
        "vm.disk-info" => client.get("vm.disk-info?id=_disk7"),
        "vm.resize-disk" => client.put(operation, r#"{"id":"_disk7","desired_size":512}"#),
        "vm.snapshot-disk" => client.put(operation, r#"{"disks":[{"id":"_disk7","path":"/o"}]}"#),
        "vm.resume-disk" => client.put(operation, r#"{"id":"_disk7"}"#),
        "vm.resize" => client.put(operation, r#"{"desired_balloon":4096}"#),
        "vm.resize-balloon" => client.put(operation, r#"{"id":"b","desired_size":0}"#),
        "vm.create" | "vm.set-overcommit" => client.put(operation, "{}"),
        "vm.add-disk" => client.put(operation, r#"{"path":"/d"}"#),
        "vm.remove-device" => client.put(operation, r#"{"id":"_disk0"}"#),
        _ => client.put(operation, ""),
    };
    if answer.status >= 400 {
        let errors = errors(&answer);
        assert_eq!(errors[0], format!("{operation} failed"));
        assert_eq!(errors.len(), 2);
    }
    answer.status
}

const OPERATIONS: [&str; 28] = [
    "vm.stream-disk",
    "vm.commit-disk",
    "vm.jobs",
    "vm.set-job",
    "vm.cancel-job",
    "vm.overcommit",
    "vm.disk-info",
    "vm.resize-disk",
    "vm.resume-disk",
    "vm.snapshot-disk",
    "vm.resize",
    "vm.resize-balloon",
    "vm.set-overcommit",
    "vm.balloons",
    "vm.balloon-stats",
    "vm.create",
    "vm.info",
    "vm.counters",
    "vm.boot",
    "vm.shutdown",
    "vm.reboot",
    "vm.pause",
    "vm.resume",
    "vm.power-button",
    "vm.nmi",
    "vm.add-disk",
    "vm.remove-device",
    "vm.delete",
];

/// The statuses of all operations, each sent to a server of its own.
fn statuses(server: impl Fn() -> Server) -> Vec<(&'static str, u16)> {
    OPERATIONS
        .into_iter()
        .map(|operation| (operation, status(&mut server().connect(), operation)))
        .collect()
}

#[test]
fn without_a_vm_everything_but_create_and_delete_is_404_and_says_so() {
    for (operation, status) in statuses(Server::start) {
        let expected = match operation {
            "vm.create" | "vm.delete" => 204,
            _ => 404,
        };
        assert_eq!(status, expected, "{operation}");
    }
    let server = Server::start();
    let mut client = server.connect();
    for operation in ["vm.boot", "vm.pause", "vm.reboot"] {
        let answer = client.put(operation, "");
        assert!(answer.text().contains("VM is not created"));
    }
    assert!(client.get("vm.info").text().contains("VM is not created"));
}

#[test]
fn a_verb_that_does_not_fit_the_state_is_409() {
    let fits = |state| -> &[&str] {
        match state {
            State::Created => &["vm.boot"],
            State::Running => &[
                "vm.counters",
                "vm.shutdown",
                "vm.reboot",
                "vm.pause",
                "vm.power-button",
                "vm.nmi",
            ],
            State::Paused => &["vm.counters", "vm.shutdown", "vm.reboot", "vm.resume"],
        }
    };
    for state in [State::Created, State::Running, State::Paused] {
        for (operation, status) in statuses(|| Server::with_vm(state)) {
            let expected = match operation {
                "vm.create" => 409,
                "vm.info" | "vm.overcommit" | "vm.add-disk" | "vm.jobs" => 200,
                "vm.delete" | "vm.resize" | "vm.resize-balloon" | "vm.set-overcommit" => 204,
                "vm.balloons" if state != State::Created => 200,
                "vm.balloon-stats" if state == State::Running => 200,
                "vm.remove-device" | "vm.set-job" | "vm.cancel-job" => 404,
                "vm.disk-info" | "vm.stream-disk" | "vm.commit-disk" if state != State::Created => {
                    404
                }
                "vm.resize-disk" | "vm.resume-disk" | "vm.snapshot-disk"
                    if state != State::Created =>
                {
                    204
                }
                "vm.counters" if fits(state).contains(&operation) => 200,
                _ if fits(state).contains(&operation) => 204,
                _ => 409,
            };
            assert_eq!(status, expected, "{operation} while {state}");
        }
    }
}

#[test]
fn an_added_disk_is_answered_in_one_shape_whether_the_vm_runs_or_not() {
    let server = Server::with_vm(State::Created);
    let mut client = server.connect();
    let answer = client.put("vm.add-disk", r#"{"path":"/a"}"#);
    assert_eq!(
        (answer.status, answer.text()),
        (200, r#"{"id":"_disk0"}"#.to_owned())
    );
    let answer = client.put("vm.add-disk", r#"{"path":"/b","id":"mine"}"#);
    assert_eq!(
        (answer.status, answer.text()),
        (200, r#"{"id":"mine"}"#.to_owned())
    );
    assert_eq!(client.put("vm.boot", "").status, 204);
    let answer = client.put("vm.add-disk", r#"{"path":"/c"}"#);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text(), r#"{"id":"_disk2","bdf":"0000:00:05.0"}"#);
    let answer = client.put("vm.add-disk", r#"{"path":"/d","id":"mine"}"#);
    assert_eq!(answer.status, 409);
    assert_eq!(
        client.put("vm.remove-device", r#"{"id":"mine"}"#).status,
        204
    );
    let answer = client.put("vm.remove-device", r#"{"id":"nobody"}"#);
    assert_eq!(answer.status, 404);
    assert!(answer.text().contains("nobody"));
}

#[test]
fn a_whole_life_of_a_vm() {
    let server = Server::start();
    let mut client = server.connect();
    let state = |client: &mut Client| client.get("vm.info").json()["state"].clone();
    for _ in 0..3 {
        assert_eq!(
            client
                .put("vm.create", r#"{"payload":{"kernel":"/k"}}"#)
                .status,
            204
        );
        assert_eq!(state(&mut client), "Created");
        for (operation, after) in [
            ("vm.boot", "Running"),
            ("vm.pause", "Paused"),
            ("vm.resume", "Running"),
            ("vm.reboot", "Running"),
            ("vm.power-button", "Running"),
            ("vm.nmi", "Running"),
            ("vm.shutdown", "Created"),
            ("vm.boot", "Running"),
        ] {
            assert_eq!(client.put(operation, "").status, 204, "{operation}");
            assert_eq!(state(&mut client), after, "{operation}");
        }
        assert_eq!(
            client.get("vm.counters").text(),
            r#"{"_disk0":{"read_ops":7}}"#
        );
        assert_eq!(client.put("vm.delete", "").status, 204);
        assert_eq!(client.get("vm.info").status, 404);
    }
}

#[test]
fn a_bad_configuration_is_400_names_its_field_and_creates_nothing() {
    let server = Server::start();
    let mut client = server.connect();
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    let deep_object = "{\"cpus\":".repeat(10_000) + "1" + &"}".repeat(10_000);
    for (body, part) in [
        ("", "empty"),
        ("nonsense", "not JSON"),
        ("{\"cpus\":", "not JSON"),
        ("{} {}", "not JSON"),
        ("\u{feff}{}", "not JSON"),
        ("null", "must be an object"),
        ("[]", "must be an object"),
        ("1e999", "not JSON"),
        (deep.as_str(), "recursion limit"),
        (deep_object.as_str(), "recursion limit"),
        (r#"{"cpus":{"boot_vcpus":0}}"#, "cpus.boot_vcpus"),
        (r#"{"cpus":{"boot_vcpus":10000}}"#, "cpus.boot_vcpus"),
        (r#"{"cpus":{"boot_vcpus":-1}}"#, "cpus.boot_vcpus"),
        (r#"{"cpus":{"boot_vcpus":4294967296}}"#, "cpus.boot_vcpus"),
        (r#"{"cpus":{"boot_vcpus":1.5}}"#, "cpus.boot_vcpus"),
        (r#"{"memory":{"size":0}}"#, "memory.size"),
        (r#"{"memory":{"size":536870913}}"#, "memory.size"),
        (r#"{"memory":{"size":18446744073709551616}}"#, "memory.size"),
        (r#"{"memory":{}}"#, "memory"),
        (r#"{"payload":{"kernel":"/k","firmware":"/f"}}"#, "payload"),
        (r#"{"payload":{"kernel":7}}"#, "payload.kernel"),
        (
            r#"{"disks":[{"path":"/a","num_queues":2}]}"#,
            "disks[0].num_queues",
        ),
        (
            r#"{"disks":[{"path":"/a","queue_size":3}]}"#,
            "disks[0].queue_size",
        ),
        (r#"{"disks":[{"path":"/a","id":"__x"}]}"#, "disks[0].id"),
        (
            r#"{"disks":[{"path":"/a","pci_segment":1}]}"#,
            "disks[0].pci_segment",
        ),
        (r#"{"disks":{"path":"/a"}}"#, "disks: must be a list"),
        (
            r#"{"disks":[{"path":"/a","image_type":"Vhdx"}]}"#,
            "image_type Vhdx",
        ),
        (
            r#"{"disks":[{"path":"/a","image_type":"Qcow2","num_queues":32,"queue_size":1024}],"cpus":{"boot_vcpus":32}}"#,
            "disks[0].num_queues",
        ),
        (
            r#"{"disks":[{"path":"/a","backing_files":true}]}"#,
            "disks[0].backing_files",
        ),
        (r#"{"serial":{"mode":"File"}}"#, "serial.file"),
        (r#"{"console":{"mode":"Pty"}}"#, "console.mode"),
        (r#"{"net":[{"tap":"tap0"}]}"#, "not supported yet: net"),
        (r#"{"memroy":{}}"#, "did you mean `memory`"),
    ] {
        let answer = client.put("vm.create", body);
        assert_eq!(answer.status, 400, "{body:.60}: {}", answer.text());
        let errors = errors(&answer);
        assert!(errors[1].contains(part), "{body:.60}: {errors:?}");
        assert_eq!(client.get("vm.info").status, 404);
    }
    for (body, part) in [
        (
            r#"{"disks":[{"path":"/a"},{"path":"/a"}]}"#,
            "disks[1].path",
        ),
        (
            r#"{"disks":[{"path":"/a","id":"x"},{"path":"/b","id":"x"}]}"#,
            "disks[1].id",
        ),
    ] {
        let answer = client.put("vm.create", body);
        assert_eq!(answer.status, 409, "{body}");
        assert!(errors(&answer)[1].contains(part));
        assert_eq!(client.get("vm.info").status, 404);
    }
    assert_eq!(client.put("vm.create", "{}").status, 204);
}

#[test]
fn a_bad_request_to_a_vm_leaves_it_as_it_was() {
    let server = Server::with_vm(State::Running);
    let mut client = server.connect();
    let before = client.get("vm.info").text();
    for (operation, body, status) in [
        ("vm.create", "{}", 409),
        ("vm.create", "{", 400),
        ("vm.boot", "", 409),
        ("vm.resume", "", 409),
        ("vm.add-disk", "", 400),
        ("vm.add-disk", "{}", 400),
        ("vm.add-disk", r#"{"path":""}"#, 400),
        ("vm.add-disk", r#"{"path":"/a","vhost_user":true}"#, 400),
        ("vm.add-disk", r#"{"path":"/a","queue_size":0}"#, 400),
        ("vm.remove-device", "", 400),
        ("vm.remove-device", "{}", 400),
        ("vm.remove-device", r#"{"id":7}"#, 400),
        ("vm.remove-device", r#"{"id":""}"#, 404),
        ("vm.shutdown", "{}", 400),
    ] {
        let answer = client.put(operation, body);
        assert_eq!(
            answer.status,
            status,
            "{operation} {body}: {}",
            answer.text()
        );
        errors(&answer);
    }
    assert_eq!(client.get("vm.info").text(), before);
}

/// What Kata's runtime-rs sends: every optional field as null, and names we do not know.
#[test]
fn a_configuration_full_of_nulls_is_accepted() {
    let server = Server::start();
    let mut client = server.connect();
    let body = r#"{
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": null, "kvm_hyperv": false,
                 "max_phys_bits": 46, "affinity": null, "features": {}},
        "memory": {"size": 536870912, "mergeable": false, "hotplug_method": "Acpi",
                   "hotplug_size": null, "hotplugged_size": null, "shared": false,
                   "hugepages": false, "hugepage_size": null, "prefault": false, "zones": null,
                   "thp": true},
        "payload": {"firmware": null, "kernel": "/k", "cmdline": "quiet", "initramfs": null},
        "disks": [{"path": "/d", "readonly": true, "direct": false, "iommu": false,
                   "num_queues": 1, "queue_size": 1024, "vhost_user": false,
                   "vhost_socket": null, "rate_limiter_config": null, "id": null,
                   "disable_io_uring": false, "pci_segment": 0}],
        "net": null, "rng": {"src": "/dev/urandom", "iommu": false}, "balloon": null,
        "fs": null, "pmem": null, "serial": {"file": null, "mode": "Null", "iommu": false},
        "console": {"file": null, "mode": "Off", "iommu": false}, "devices": null,
        "user_devices": null, "vdpa": null, "vsock": null, "iommu": false, "sgx_epc": null,
        "numa": null, "watchdog": false, "platform": null, "vendor_extension": {"a": 1}
    }"#;
    let answer = client.put("vm.create", body);
    assert_eq!(answer.status, 204, "{}", answer.text());
}
