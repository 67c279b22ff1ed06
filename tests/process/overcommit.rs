//! What a VM is guaranteed, over the API: floors, policies that can't be, and what stays.

use serde_json::json;

use super::before;
use crate::support::ballast::Ballast;
use crate::support::eventually;

const MIB: u64 = 1 << 20;

#[test]
fn policies_that_can_not_be_kept_are_refused_by_field() {
    let mut ballast = Ballast::start();
    for (policy, field, status) in [
        (json!({"mode": "always"}), "overcommit.mode", 400),
        (
            json!({"guaranteed_size": -1}),
            "overcommit.guaranteed_size",
            400,
        ),
        (
            json!({"guaranteed_size": 0.5}),
            "overcommit.guaranteed_size",
            400,
        ),
        (
            json!({"guaranteed_size": 65 * MIB}),
            "overcommit.guaranteed_size",
            400,
        ),
        (
            json!({"guaranteed_size": 48 * MIB, "max_size": 32 * MIB}),
            "overcommit.guaranteed_size",
            400,
        ),
        (json!({"max_size": 65 * MIB}), "overcommit.max_size", 400),
        (json!({"weight": 0}), "overcommit.weight", 400),
        (json!({"step": 4096}), "overcommit.step", 400),
        (json!({"guarantee": 4096}), "overcommit.guarantee", 400),
        // Possible, but not beside this balloon.
        (json!({"guaranteed_size": 60 * MIB}), "60", 409),
    ] {
        let mut client = ballast.api();
        let before = before(&ballast, &mut client);
        let mut config = ballast.sleeper();
        config["balloon"] = json!({"size": 8 * MIB});
        config["overcommit"] = policy.clone();
        let answer = client.try_put_json("vm.create", &config).expect(status);
        let named = answer.text().contains(field) || status == 409;
        assert!(named, "{policy}: {}", answer.text());
        before.assert_unchanged(&mut ballast, &mut client, field);
    }
    let mut client = ballast.api();
    let mut config = ballast.sleeper();
    config["memory"]["prefault"] = json!(true);
    config["balloon"] = json!({"size": 0});
    config["overcommit"] = json!({"mode": "auto"});
    let answer = client.try_put_json("vm.create", &config).expect(400);
    assert!(
        answer.text().contains("inflate_prefaulted"),
        "{}",
        answer.text()
    );
}

#[test]
fn the_kernel_is_asked_to_tell_of_pressure_by_who_has_something_to_govern() {
    // Before Linux 6.5 it takes CAP_SYS_RESOURCE, which root in a container may lack.
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).open("/proc/pressure/memory");
    if file.is_err() {
        eprintln!("SKIPPED: this kernel has no PSI, or not for us");
        return;
    }
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", ballast.pid())).expect("threads");
        let statuses = tasks.flatten().map(|task| task.path().join("status"));
        let statuses = statuses.filter_map(|status| std::fs::read_to_string(status).ok());
        statuses.filter(|status| status.contains("Name:\tpsi\n"))
    };
    let mut config = ballast.sleeper();
    config["balloon"] = json!({"size": 0});
    config["overcommit"] = json!({"mode": "off", "guaranteed_size": 32 * MIB});
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    assert_eq!(threads().count(), 0);
    let auto = json!({"mode": "auto", "guaranteed_size": 32 * MIB, "interval_ms": 100});
    client.put_json("vm.set-overcommit", &auto);
    let triggers = eventually("it looks", || {
        let view = client.get("vm.overcommit");
        view["governor"]["pressure_triggers"].as_array().cloned()
    });
    assert_eq!(triggers.first(), Some(&json!("host")), "{triggers:?}");
    let status = threads().next().expect("a thread");
    assert!(status.contains("Seccomp:\t2\n"), "{status}");
    assert_eq!(threads().count(), 1);
    // It ends with the rest.
    client.put("vmm.shutdown");
    ballast.wait_for_clean_end();
}

#[test]
fn no_target_goes_below_the_guarantee_unless_it_is_overridden() {
    let mut ballast = Ballast::start();
    for booted in [false, true] {
        let mut client = ballast.api();
        client.put("vm.delete");
        let mut config = ballast.sleeper();
        config["balloons"] = json!([{"id": "b", "size": 8 * MIB}]);
        config["overcommit"] = json!({"guaranteed_size": 48 * MIB});
        client.put_json("vm.create", &config);
        if booted {
            client.put("vm.boot");
        }
        let before = before(&ballast, &mut client);
        let resize = "vm.resize-balloon";
        for (operation, body) in [
            (resize, json!({"id": "b", "desired_size": 17 * MIB})),
            (
                resize,
                json!({"id": "b", "desired_size": 17 * MIB, "floor_override": false}),
            ),
            ("vm.resize", json!({"desired_balloon": 17 * MIB})),
            ("vm.add-balloon", json!({"size": 9 * MIB})),
            ("vm.set-overcommit", json!({"guaranteed_size": 57 * MIB})),
        ] {
            let answer = client.try_put_json(operation, &body).expect(409);
            let floor = if operation == "vm.set-overcommit" {
                57
            } else {
                48
            };
            let floor = (floor * MIB).to_string();
            assert!(
                answer.text().contains(&floor),
                "{operation}: {}",
                answer.text()
            );
            before.assert_unchanged(&mut ballast, &mut client, operation);
        }
        for body in [
            json!({"weight": 0}),
            json!({"wait": 1}),
            json!({"mode": "auto", "step": 1}),
        ] {
            client.try_put_json("vm.set-overcommit", &body).expect(400);
            before.assert_unchanged(&mut ballast, &mut client, "vm.set-overcommit");
        }
        let ask = |size: u64| json!({"id": "b", "desired_size": size, "floor_override": true});
        client.put_json(resize, &ask(20 * MIB));
        client.put_json(resize, &json!({"id": "b", "desired_size": 16 * MIB}));
        let added = json!({"size": 0, "id": "c"});
        client.put_json("vm.add-balloon", &added);
        client.put_json("vm.set-overcommit", &json!({"guaranteed_size": 40 * MIB}));
        client.put_json("vm.resize", &json!({"desired_balloon": 24 * MIB}));
        let policy = client.get("vm.info")["config"]["overcommit"].clone();
        assert_eq!(policy["guaranteed_size"], 40 * MIB);
        assert_eq!(policy["max_size"], 64 * MIB, "what was not said is shown");
        assert_eq!(policy["mode"], "off");
        client.put_json("vm.set-overcommit", &json!({"mode": "auto"}));
        client.try_put_json(resize, &ask(40 * MIB)).expect(409);
        if booted {
            assert!(client.get("vm.counters")["__overcommit"]["looks"].is_u64());
        }
    }
    ballast.assert_well();
}
