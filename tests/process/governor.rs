//! Mode auto with a driver that does what it is asked, one that suffers, and one that does
//! nothing: the whole way from what the host and the guest tell to the guest's pages, and what the
//! API says of it.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::observe::{metric, scrape};
use crate::support::ballast::{Ballast, Launch, binary};
use crate::support::balloon_guest::{AVAILABLE, Giver, SLOT, balloon_driver};
use crate::support::events::{Events, Mark};
use crate::support::eventually;
use crate::support::http::Client;

const MIB: u64 = 1 << 20;
/// One that gives whatever it is asked for.
const WILLING: Giver = Giver {
    most: u64::MAX,
    bears: u64::MAX,
};

/// A VM of 64 MiB with such a driver and the balloon `b`, which looks ten times a second.
fn boot(ballast: &Ballast, client: &mut Client, giver: Giver, policy: &Value) {
    let mut config = ballast.sleeper();
    config["payload"]["kernel"] = json!(balloon_driver(ballast.dir(), giver));
    config["balloons"] = json!([{"id": "b", "size": 0, "pci_device_id": SLOT}]);
    config["overcommit"] = policy.clone();
    client.put_json("vm.create", &config);
    client.put("vm.boot");
}

fn auto(more: &Value) -> Value {
    let mut policy = json!({
        "mode": "auto", "guaranteed_size": 32 * MIB, "step": 8 * MIB, "interval_ms": 100,
    });
    for (name, value) in more.as_object().expect("fields") {
        policy[name] = value.clone();
    }
    policy
}

/// Waits until the balloon of the guest has as much as it is asked for, and this much.
#[track_caller]
fn settled(client: &mut Client, bytes: u64) -> Value {
    eventually("the guest has given this much", || {
        let balloon = client.get("vm.balloons")[0].clone();
        (balloon["target"] == bytes && balloon["actual"] == bytes).then_some(balloon)
    })
}

/// Waits until the governor says so in the view.
#[track_caller]
fn governor(client: &mut Client, reason: &str) -> Value {
    eventually("the governor says so", || {
        let view = client.get("vm.overcommit")["governor"].clone();
        (view["reason"] == reason).then_some(view)
    })
}

fn action(events: &Events, after: Mark, reason: &str) -> Value {
    let action = events.wait_after(after, "overcommit-action", |event| {
        event["properties"]["reason"] == reason
    });
    action["properties"].clone()
}

/// What the governor has counted, as the metrics say it.
fn counted(client: &mut Client, counter: &str) -> f64 {
    let labels = [("device", "__overcommit"), ("counter", counter)];
    metric(
        &scrape(client, "/metrics"),
        "ballast_device_counter_total",
        &labels,
    )
}

#[test]
fn a_guest_above_its_most_gives_in_steps_and_the_view_says_how_far_it_is() {
    let mut ballast = Ballast::start();
    let (mut client, events) = (ballast.api(), ballast.events());
    // No more can be taken than that, however the machine under the test is.
    let policy = auto(&json!({"guaranteed_size": 48 * MIB, "max_size": 48 * MIB}));
    boot(&ballast, &mut client, WILLING, &policy);
    let balloon = settled(&mut client, 16 * MIB);
    assert_eq!(balloon["state"], "reached", "{balloon}");
    let first = action(&events, Mark::START, "above-max");
    assert_eq!(
        first,
        json!({
            "id": "b", "action": "inflate", "reason": "above-max", "from": "0",
            "to": (8 * MIB).to_string(),
        })
    );
    events.wait_after(Mark::START, "overcommit-action", |event| {
        event["properties"]["to"] == json!((16 * MIB).to_string())
    });
    governor(&mut client, "steady");
    let view = client.get("vm.overcommit");
    assert_eq!(view["mode"], "auto");
    assert_eq!(view["governor"]["balloon"], "b");
    assert_eq!(view["balloons"]["actual"], 16 * MIB);
    let available = eventually("the guest has told of it", || {
        let balloon = client.get("vm.balloons")[0].clone();
        let sample = balloon["statistics"]["available_memory"].clone();
        (sample["value"] == AVAILABLE - 16 * MIB).then_some(sample)
    });
    assert!(available["age_ms"].is_u64(), "{available}");
    assert_eq!(counted(&mut client, "inflate_steps"), 2.0);
    assert_eq!(counted(&mut client, "inflated_bytes"), (16 * MIB) as f64);
    assert_eq!(counted(&mut client, "deflate_steps"), 0.0);
    // Another policy, and the guest gets it back.
    let policy = auto(&json!({"guaranteed_size": 56 * MIB, "max_size": 64 * MIB}));
    client.put_json("vm.set-overcommit", &policy);
    settled(&mut client, 8 * MIB);
    ballast.assert_well();
}

/// Starts ballast on a host that seems to have little memory left, if that can be had.
fn on_a_host_that_is_short_of_memory() -> Option<Ballast> {
    let mut launch = Launch::of(Path::new("unshare"));
    let meminfo = launch.path("meminfo");
    let text = "MemTotal: 1024000 kB\nMemFree: 102400 kB\nMemAvailable: 102400 kB\n";
    std::fs::write(&meminfo, text).expect("write");
    // No pressure is told of, whatever the machine under the test does.
    let script = "mount --bind \"$1\" /proc/meminfo || exit 1; shift; \
                  ! [ -e /proc/pressure/memory ] || mount --bind \"$0\" /proc/pressure/memory; \
                  exec \"$@\"";
    let arguments = ["--mount", "sh", "-c", script, "/dev/null"];
    let mut probe = Command::new("unshare");
    probe.args(arguments).arg(&meminfo).arg("true");
    match probe.output() {
        Ok(output) if output.status.success() => {}
        other => {
            eprintln!("SKIPPED: may not mount: {other:?}");
            return None;
        }
    }
    let socket = launch.path("api.sock");
    let command = launch.command().args(arguments);
    command
        .arg(meminfo)
        .arg(binary())
        .arg("--api-socket")
        .arg(socket);
    Some(launch.start())
}

#[test]
fn a_guest_that_suffers_from_giving_to_a_host_that_is_short_gets_all_back_at_once() {
    let Some(mut ballast) = on_a_host_that_is_short_of_memory() else {
        return;
    };
    let (mut client, events) = (ballast.api(), ballast.events());
    let giver = Giver {
        bears: 12 * MIB,
        ..WILLING
    };
    boot(&ballast, &mut client, giver, &auto(&json!({})));
    let first = action(&events, Mark::START, "host-pressure");
    assert_eq!(
        (&first["action"], &first["from"]),
        (&json!("inflate"), &json!("0"))
    );
    let distress = action(&events, Mark::START, "guest-distress");
    assert_eq!(distress["action"], "deflate");
    assert_eq!(distress["to"], "0", "{distress}");
    assert_eq!(distress["rest_seconds"], "600");
    settled(&mut client, 0);
    let view = governor(&mut client, "backing-off");
    assert_eq!(view["host"], "pressure");
    assert!(view["back_off_ms"].as_u64() > Some(0), "{view}");
    assert_eq!(counted(&mut client, "distress_releases"), 1.0);
    let page = scrape(&mut client, "/metrics");
    let pressure = [("level", "pressure")];
    assert_eq!(metric(&page, "ballast_governor_host", &pressure), 1.0);
    assert!(metric(&page, "ballast_governor_back_off_seconds", &[]) > 0.0);
    // Whatever the host lacks, nothing is taken while it rests.
    let looks = counted(&mut client, "looks");
    eventually("it looks on", || {
        (counted(&mut client, "looks") > looks + 3.0).then_some(())
    });
    assert_eq!(client.get("vm.balloons")[0]["target"], 0);
    ballast.assert_well();
}

#[test]
fn a_driver_that_does_nothing_has_stalled_and_is_asked_for_nothing_more() {
    let mut ballast = Ballast::start();
    let (mut client, events) = (ballast.api(), ballast.events());
    let giver = Giver { most: 0, ..WILLING };
    let policy = auto(&json!({"max_size": 48 * MIB}));
    boot(&ballast, &mut client, giver, &policy);
    let stalled = action(&events, Mark::START, "stalled");
    assert_eq!(stalled["action"], "deflate");
    assert_eq!(stalled["from"], (8 * MIB).to_string());
    assert_eq!(stalled["to"], "0");
    assert_eq!(stalled["rest_seconds"], "600");
    settled(&mut client, 0);
    let view = governor(&mut client, "backing-off");
    assert!(view["back_off_ms"].as_u64() > Some(0), "{view}");
    assert_eq!(counted(&mut client, "stalls"), 1.0);
    assert_eq!(counted(&mut client, "inflate_steps"), 1.0);
    ballast.assert_well();
}
