//! Balloons that can't be, and targets that can't be had.

use serde_json::{Value, json};

use super::before;
use crate::support::ballast::Ballast;
use crate::support::http::Client;

const MIB: u64 = 1 << 20;

/// A VM of 64 MiB without a driver for its three balloons, booted or not.
fn with_balloons(ballast: &Ballast, booted: bool) -> Client {
    let mut config = ballast.sleeper();
    config["balloon"] = json!({"size": 0, "free_page_reporting": true});
    config["balloons"] = json!([{"id": "b", "size": 8 * MIB}, {"size": 0}]);
    let mut client = ballast.api();
    client.put("vm.delete");
    client.put_json("vm.create", &config);
    if booted {
        client.put("vm.boot");
    }
    client
}

fn balloon(client: &mut Client, id: &str) -> Value {
    let balloons = client.get("vm.balloons");
    let mut balloons = balloons.as_array().expect("a list").iter();
    let found = balloons.find(|balloon| balloon["id"] == id);
    found.expect("the balloon").clone()
}

#[test]
fn balloons_that_do_not_fit_the_vm_are_refused_by_field() {
    let mut ballast = Ballast::start();
    for (field, balloons) in [
        ("balloons[0].size", json!([{"size": 64 * MIB}])),
        ("balloons[0].size", json!([{"size": 4095}])),
        ("balloons[0].size", json!([{"size": u64::MAX}])),
        ("balloons[0].size", json!([{"size": -4096}])),
        ("balloons[0].size", json!([{"size": 4096.5}])),
        ("balloons[0].size", json!([{"size": "4096"}])),
        ("size", json!([{}])),
        (
            "balloons[1].size",
            json!([{"size": 32 * MIB}, {"size": 32 * MIB}]),
        ),
        (
            "balloons[1].free_page_reporting",
            json!([{"size": 0, "free_page_reporting": true},
                   {"size": 0, "free_page_reporting": true}]),
        ),
        ("balloons[0].id", json!([{"size": 0, "id": "__balloon"}])),
        ("balloons[0].iommu", json!([{"size": 0, "iommu": true}])),
        (
            "balloons[0].pci_device_id",
            json!([{"size": 0, "pci_device_id": 32}]),
        ),
    ] {
        let mut client = ballast.api();
        let before = before(&ballast, &mut client);
        let mut config = ballast.sleeper();
        config["balloons"] = balloons.clone();
        let answer = client.try_put_json("vm.create", &config).expect(400);
        assert!(
            answer.text().contains(field),
            "{balloons}: {}",
            answer.text()
        );
        before.assert_unchanged(&mut ballast, &mut client, field);
    }
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["memory"]["prefault"] = json!(true);
    config["balloon"] = json!({"size": MIB});
    let answer = client.try_put_json("vm.create", &config).expect(400);
    assert!(answer.text().contains("prefault"), "{}", answer.text());
    config["balloon"]["inflate_prefaulted"] = json!(true);
    client.put_json("vm.create", &config);
}

#[test]
fn targets_that_can_not_be_had_are_refused_and_nothing_changes() {
    let mut ballast = Ballast::start();
    for booted in [false, true] {
        let mut client = with_balloons(&ballast, booted);
        let before = before(&ballast, &mut client);
        let resize = "vm.resize-balloon";
        for (operation, body, status) in [
            (resize, json!({"id": "b", "desired_size": 64 * MIB}), 400),
            (
                resize,
                json!({"id": "__balloon", "desired_size": 56 * MIB}),
                400,
            ),
            (resize, json!({"id": "b", "desired_size": 4095}), 400),
            (resize, json!({"id": "b", "desired_size": -1}), 400),
            (resize, json!({"id": "b", "desired_size": 1.5}), 400),
            (resize, json!({"id": "b", "desired_size": null}), 400),
            (resize, json!({"id": "b"}), 400),
            (resize, json!({"desired_size": 0}), 400),
            (resize, json!({"id": "nobody", "desired_size": 0}), 404),
            ("vm.resize", json!({"desired_balloon": 64 * MIB}), 400),
            ("vm.resize", json!({"desired_balloon": 10}), 400),
            ("vm.resize", json!({"desired_vcpus": 2}), 400),
            (
                "vm.resize",
                json!({"desired_vcpus": 2, "desired_balloon": 4096}),
                400,
            ),
            ("vm.resize", json!({"desired_ram": 128 * MIB}), 400),
            ("vm.add-balloon", json!({"size": 56 * MIB}), 400),
            (
                "vm.add-balloon",
                json!({"size": 0, "free_page_reporting": true}),
                400,
            ),
            ("vm.add-balloon", json!({"size": 0, "id": "b"}), 409),
            ("vm.add-balloon", json!({}), 400),
        ] {
            let answer = client.try_put_json(operation, &body);
            assert_eq!(
                answer.status,
                status,
                "{operation} {body}: {}",
                answer.text()
            );
            let unchanged = format!("{operation} {body}");
            before.assert_unchanged(&mut ballast, &mut client, &unchanged);
        }
        // What stays as it is may be said.
        let same = json!({"desired_vcpus": 1, "desired_ram": 64 * MIB, "desired_balloon": null});
        client.put_json("vm.resize", &same);
    }
}

#[test]
fn a_guest_without_a_driver_is_told_stalls_and_costs_nothing() {
    let mut ballast = Ballast::start();
    let events = ballast.events();
    let mut client = with_balloons(&ballast, true);
    let info = client.get("vm.info");
    assert_eq!(info["config"]["balloons"][1]["id"], "_balloon0");
    assert_eq!(info["config"]["balloon"]["size"], 0);
    assert_eq!(info["memory_actual_size"], 64 * MIB);
    let before = ballast.holdings();

    let mark = events.mark();
    let ask = json!({"id": "__balloon", "desired_size": 16 * MIB});
    client.put_json("vm.resize-balloon", &ask);
    let told = balloon(&mut client, "__balloon");
    assert_eq!(told["target"], 16 * MIB);
    assert_eq!(told["actual"], 0);
    assert_eq!(told["driver"], false);
    assert_eq!(told["statistics"], json!({}));
    events.wait_for_device(mark, "balloon-stalled", "__balloon");
    assert_eq!(balloon(&mut client, "__balloon")["state"], "stalled");
    assert_eq!(client.get("vm.info")["config"]["balloon"]["size"], 16 * MIB);
    let answer = client.request("GET", "vm.balloon-stats", None).expect(504);
    let reasons = answer.reasons();
    assert!(
        reasons.contains("no driver"),
        "it was not waited for: {reasons}"
    );

    // The target is what the first balloon has by either name, and stays over a pause.
    client.put("vm.pause");
    client.put_json("vm.resize", &json!({"desired_balloon": 0}));
    assert_eq!(balloon(&mut client, "__balloon")["target"], 0);
    client.put("vm.resume");
    assert_eq!(balloon(&mut client, "__balloon")["state"], "reached");

    // Twenty more come; those of a guest that never ejects go with its reset.
    for number in 0..20 {
        let added = json!({"size": 0, "id": format!("x{number}")});
        let info = client.put_json("vm.add-balloon", &added).json();
        assert!(info["bdf"].is_string());
        client.put_json("vm.remove-device", &json!({"id": added["id"]}));
    }
    client.put_json("vm.remove-device", &json!({"id": "__balloon"}));
    client.put("vm.reboot");
    let config = client.get("vm.info")["config"].clone();
    assert!(config["balloon"].is_null());
    assert_eq!(config["balloons"].as_array().map(Vec::len), Some(2));
    // So another may report free pages now.
    let reporter = json!({"size": 0, "id": "__", "free_page_reporting": true});
    client.try_put_json("vm.add-balloon", &reporter).expect(400);
    let reporter = json!({"size": 0, "id": "__balloon2", "free_page_reporting": true});
    client.try_put_json("vm.add-balloon", &reporter).expect(400);
    let reporter = json!({"size": 0, "id": "r", "free_page_reporting": true});
    client.put_json("vm.add-balloon", &reporter);
    let mut threads: Vec<String> = ballast.holdings().threads;
    threads.retain(|name| name != "r");
    let mut expected = before.threads;
    expected.retain(|name| name != "__balloon");
    assert_eq!(threads, expected);
    ballast.assert_well();
}
