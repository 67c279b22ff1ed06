//! Where the memory is, as a real process under its real filters tells it.

use std::fs;

use prometheus_parse::{Scrape, Value as Metric};
use serde_json::{Value, json};

use crate::support::ballast::{Ballast, binary};
use crate::support::eventually;
use crate::support::http::{Client, header};

const MIB: u64 = 1 << 20;

/// Boots the sleeping guest, of 64 MiB, with this memory, and shows where that is.
fn boot(ballast: &Ballast, client: &mut Client, memory: &Value) -> Value {
    let mut config = ballast.sleeper();
    for (name, value) in memory.as_object().expect("an object") {
        config["memory"][name] = value.clone();
    }
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    client.get("vm.overcommit")
}

fn bytes(view: &Value, pointer: &str) -> u64 {
    let value = view.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no {pointer} in {view}"))
}

#[test]
fn the_cost_is_what_the_guests_memory_takes_and_goes_with_it() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    for (memory, kind) in [
        (json!({"prefault": true}), "/cost/anon"),
        (json!({"prefault": true, "shared": true}), "/cost/shmem"),
    ] {
        let full = boot(&ballast, &mut client, &memory);
        assert_eq!(full["promised"], 64 * MIB);
        assert!(bytes(&full, kind) >= 64 * MIB, "{kind}: {full}");
        assert!(bytes(&full, "/cost/resident") >= 64 * MIB, "{full}");
        let source = &full["cost"]["source"];
        assert_eq!(
            source == "smaps_rollup",
            full["cost"]["no_cgroup"].is_string(),
            "{full}"
        );
        client.put("vm.shutdown");
        let empty = client.get("vm.overcommit");
        assert!(bytes(&empty, kind) < 32 * MIB, "{kind}: {empty}");
        assert_eq!(empty["vcpus"], json!([]));
        client.put("vm.delete");
    }
}

#[test]
fn the_view_tells_of_vcpus_merging_and_pressure() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    assert_eq!(client.request("GET", "vm.overcommit", None).status, 404);
    let view = boot(&ballast, &mut client, &json!({"mergeable": true}));
    let thread = bytes(&view, "/vcpus/0/thread");
    let name = fs::read_to_string(format!("/proc/{}/task/{thread}/comm", ballast.pid()));
    assert_eq!(name.expect("the thread").trim(), "vcpu0");
    let schedstat = format!("/proc/{}/task/{thread}/schedstat", ballast.pid());
    if fs::read_to_string(schedstat).is_ok() {
        eventually("the vCPU has run", || {
            let view = client.get("vm.overcommit");
            (bytes(&view, "/vcpus/0/run_ns") > 0).then_some(())
        });
    } else {
        assert!(view["vcpus"][0]["unavailable"].is_string(), "{view}");
    }
    assert_eq!(view["ksm"]["mergeable"], true);
    let known = view["ksm"]["rmap_items"].is_u64();
    assert!(known || view["ksm"]["unavailable"].is_string(), "{view}");
    for scope in ["host", "cgroup"] {
        let pressure = &view["pressure"][scope];
        let some = bytes_or_none(pressure, "/memory/some/total_us");
        assert!(
            some.is_some() || pressure["unavailable"].is_string(),
            "{pressure}"
        );
    }
    let host = fs::read_to_string("/proc/pressure/memory");
    assert_eq!(host.is_ok(), view["pressure"]["host"]["memory"].is_object());
    ballast.assert_well();
}

fn bytes_or_none(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer)?.as_u64()
}

#[test]
fn balloons_that_were_plugged_are_in_the_view() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    boot(&ballast, &mut client, &json!({}));
    client.put_json("vm.add-balloon", &json!({"size": 8 * MIB}));
    client.put_json("vm.add-balloon", &json!({"size": 4 * MIB}));
    let view = client.get("vm.overcommit");
    assert_eq!(bytes(&view, "/balloons/count"), 2);
    assert_eq!(bytes(&view, "/balloons/target"), 12 * MIB);
    assert_eq!(bytes(&view, "/balloons/actual"), 0, "no driver");
}

#[test]
fn disks_are_in_the_view_and_in_the_metrics_with_what_they_may_yet_take() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    let empty = boot(&ballast, &mut client, &json!({}));
    assert_eq!(bytes(&empty, "/disks/count"), 0);
    let disk = |name: &str, size: u64, more: Value| {
        let path = ballast.path(name);
        let file = fs::File::create(&path).expect("an image");
        file.set_len(size).expect("its size");
        let mut disk = json!({"path": path, "id": name});
        for (name, value) in more.as_object().expect("an object") {
            disk[name] = value.clone();
        }
        disk
    };
    client.put_json("vm.add-disk", &disk("a", 8 * MIB, json!({})));
    client.put_json(
        "vm.add-disk",
        &disk("b", 4 * MIB, json!({"readonly": true})),
    );
    let thin = json!({"path": ballast.path("c"), "image_type": "Qcow2", "size": 1 << 30});
    client.put_json("vm.create-disk", &thin);
    let thin = json!({"path": ballast.path("c"), "image_type": "Qcow2", "id": "c",
        "l2_cache_size": 8 * MIB});
    client.put_json("vm.add-disk", &thin);
    let view = client.get("vm.overcommit");
    assert_eq!(bytes(&view, "/disks/count"), 3);
    assert_eq!(bytes(&view, "/disks/virtual_size"), 1024 * MIB + 12 * MIB);
    let info = client.get("vm.disk-info?id=c");
    let allocated = bytes(&view, "/disks/allocated_size");
    assert!(allocated < 32 * MIB, "{view}");
    let unallocated = bytes(&view, "/disks/unallocated_size");
    assert!((1000 * MIB..=1032 * MIB).contains(&unallocated), "{view}");
    assert_eq!(bytes(&view, "/disks/block_device_size"), 0);
    // They all lie in one folder.
    let systems = view["disks"]["file_systems"].as_array().expect("a list");
    assert_eq!(systems.len(), 1, "{view}");
    assert_eq!(systems[0]["disks"], json!(["a", "b", "c"]));
    assert_eq!(systems[0]["host_free"], view["disks"]["host_free"]);
    assert_eq!(systems[0]["host_total"], info["host_total"]);
    let config = client.get("vm.info")["config"]["disks"].clone();
    assert_eq!(config[2]["l2_cache_size"], 8 * MIB);

    let page = scrape(&mut client, "/metrics");
    let value = |name: &str, device: Option<&str>| {
        let found = page.samples.iter().find(|sample| {
            sample.metric == name && device.is_none_or(|d| sample.labels.get("device") == Some(d))
        });
        match found.unwrap_or_else(|| panic!("no {name}")).value {
            Metric::Gauge(value) | Metric::Counter(value) => value as u64,
            ref other => panic!("{name}: {other:?}"),
        }
    };
    assert_eq!(value("ballast_disks_virtual_bytes", None), 1036 * MIB);
    assert_eq!(value("ballast_disk_virtual_bytes", Some("b")), 4 * MIB);
    assert!(value("ballast_disk_allocated_bytes", Some("c")) > 0);
    assert!(value("ballast_disk_host_free_bytes", Some("a")) > 0);
    assert_eq!(value("ballast_disk_held_requests", Some("a")), 0);
    assert_eq!(value("ballast_disk_cache_lookups_total", Some("c")), 0);
    client.put("vm.shutdown");
    assert_eq!(bytes(&client.get("vm.overcommit"), "/disks/count"), 0);
}

#[test]
fn only_private_memory_of_ordinary_pages_can_be_mergeable() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    for other in ["shared", "hugepages"] {
        let mut config = ballast.sleeper();
        config["memory"]["mergeable"] = json!(true);
        config["memory"][other] = json!(true);
        let answer = client.try_put_json("vm.create", &config).expect(400);
        assert!(answer.reasons().contains("memory.mergeable"), "{other}");
        client.request("GET", "vm.info", None).expect(404);
    }
}

/// Scrapes `path`, and has it read by a parser that is not the encoder's.
pub(super) fn scrape(client: &mut Client, path: &str) -> Scrape {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    client.send(request.as_bytes()).expect("send");
    let answer = client.receive().expect("an answer").expect(200);
    assert_eq!(
        header(&answer.head, "Content-Type"),
        Some("text/plain; version=0.0.4")
    );
    let text = answer.text();
    let lines = text.lines().map(|line| Ok(line.to_owned()));
    let scrape = Scrape::parse(lines).expect("the text format");
    for sample in &scrape.samples {
        assert!(scrape.docs.contains_key(&sample.metric), "{sample:?}");
        assert!(!matches!(sample.value, Metric::Untyped(_)), "{sample:?}");
    }
    scrape
}

#[track_caller]
pub(super) fn metric(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    let mut found = scrape.samples.iter().filter(|sample| {
        let fits = |(name, value): &(&str, &str)| sample.labels.get(name) == Some(*value);
        sample.metric == name && labels.iter().all(fits)
    });
    let value = &found.next().expect("such a sample").value;
    assert!(found.next().is_none(), "{name} {labels:?} twice");
    match value {
        Metric::Counter(value) | Metric::Gauge(value) => *value,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn metrics_are_at_both_paths_with_and_without_a_vm() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    for path in ["/metrics", "/api/v1/metrics"] {
        let empty = scrape(&mut client, path);
        assert_eq!(metric(&empty, "ballast_vm_exists", &[]), 0.0);
        assert_eq!(metric(&empty, "ballast_vmm_answered", &[]), 1.0);
    }
    boot(&ballast, &mut client, &json!({"prefault": true}));
    client.put_json(
        "vm.add-balloon",
        &json!({"id": "b \"1\"", "size": MIB, "inflate_prefaulted": true}),
    );
    let seen = scrape(&mut client, "/metrics");
    let state = |name| metric(&seen, "ballast_vm_state", &[("state", name)]);
    assert_eq!((state("Running"), state("Created")), (1.0, 0.0));
    let resident = metric(&seen, "ballast_memory_resident_bytes", &[]);
    assert!(resident >= (64 * MIB) as f64, "{resident}");
    assert_eq!(
        metric(&seen, "ballast_balloon_target_bytes", &[]),
        MIB as f64
    );
    let booted = [("source", "vm"), ("event", "booted")];
    assert_eq!(metric(&seen, "ballast_events_total", &booted), 1.0);
    metric(
        &seen,
        "ballast_vcpu_exits_total",
        &[("reason", "port-write")],
    );
    client.put("vm.delete");
    let gone = scrape(&mut client, "/metrics");
    assert_eq!(metric(&gone, "ballast_vm_exists", &[]), 0.0);
    ballast.assert_well();
}

#[test]
fn requests_are_counted_by_operation_and_what_is_none_has_one_name() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    for path in ["no-such", "no-such-either", "vm.info/x"] {
        client.request("GET", path, None).expect(404);
    }
    client.request("GET", "vm.info", None).expect(404);
    client.request("PUT", "metrics", None).expect(405);
    let seen = scrape(&mut client, "/metrics");
    let count = |operation, status| {
        let labels = [("operation", operation), ("status", status)];
        metric(&seen, "ballast_api_requests_total", &labels)
    };
    assert_eq!(count("other", "404"), 3.0);
    assert_eq!(count("vm.info", "404"), 1.0);
    assert_eq!(count("metrics", "405"), 1.0);
    assert!(count("vmm.ping", "200") >= 1.0);
}

#[test]
fn a_vm_that_offers_its_memory_for_merging_starts_no_ksmd() {
    let status = || {
        let mut command = std::process::Command::new(binary());
        let output = command.args(["host", "ksm", "status", "--json"]).output();
        output.expect("run ballast")
    };
    let before = status();
    let run = fs::read_to_string("/sys/kernel/mm/ksm/run");
    let Ok(run) = run else {
        let error = String::from_utf8_lossy(&before.stderr);
        assert!(
            !before.status.success() && error.contains("no KSM"),
            "{error}"
        );
        return;
    };
    let ballast = Ballast::start();
    boot(&ballast, &mut ballast.api(), &json!({"mergeable": true}));
    assert_eq!(fs::read_to_string("/sys/kernel/mm/ksm/run").ok(), Some(run));
    let told = |output: &std::process::Output| -> Value {
        let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        value["run"].clone()
    };
    assert!(told(&before).is_string());
    assert_eq!(told(&status()), told(&before));
}
