//! Every request in every state: the table of vmm/src/state.rs as a client sees it, and that a
//! refused request changes nothing.

use serde_json::json;

use super::{Before, before};
use crate::support::ballast::Ballast;
use crate::support::http::{Client, Response};

/// Where a VM can be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    None,
    Created,
    Running,
    Paused,
}

use State::{Created, None, Paused, Running};

const STATES: [State; 4] = [None, Created, Running, Paused];

/// Status of each request by state: no VM, Created, Running, Paused.
const TABLE: [(&str, &str, [u16; 4]); 31] = [
    ("GET", "vmm.ping", [200, 200, 200, 200]),
    ("GET", "vm.info", [404, 200, 200, 200]),
    ("GET", "openapi.json", [200, 200, 200, 200]),
    ("PUT", "vm.create", [204, 409, 409, 409]),
    ("PUT", "vm.boot", [404, 204, 409, 409]),
    ("PUT", "vm.shutdown", [404, 409, 204, 204]),
    ("PUT", "vm.reboot", [404, 409, 204, 204]),
    ("PUT", "vm.pause", [404, 409, 204, 409]),
    ("PUT", "vm.resume", [404, 409, 409, 204]),
    ("PUT", "vm.power-button", [404, 409, 204, 409]),
    ("PUT", "vm.nmi", [404, 409, 204, 409]),
    ("GET", "vm.counters", [404, 409, 200, 200]),
    ("PUT", "vm.add-disk", [404, 200, 200, 200]),
    ("PUT", "vm.create-disk", [204, 400, 400, 400]),
    ("PUT", "vm.remove-device", [404, 204, 204, 204]),
    ("GET", "vm.disk-info?id=there", [404, 409, 200, 200]),
    ("PUT", "vm.resize-disk", [404, 409, 204, 204]),
    ("PUT", "vm.resume-disk", [404, 409, 204, 204]),
    // What is there by then is never replaced.
    ("PUT", "vm.snapshot-disk", [404, 409, 204, 400]),
    // What is on nothing has nothing to take in, nor anything to come into.
    ("PUT", "vm.stream-disk", [404, 409, 400, 400]),
    ("PUT", "vm.commit-disk", [404, 409, 400, 400]),
    ("GET", "vm.jobs", [404, 200, 200, 200]),
    ("PUT", "vm.set-job", [404, 404, 404, 404]),
    ("PUT", "vm.cancel-job", [404, 404, 404, 404]),
    ("PUT", "vm.add-balloon", [404, 200, 200, 200]),
    ("PUT", "vm.resize", [404, 204, 204, 204]),
    ("PUT", "vm.resize-balloon", [404, 204, 204, 204]),
    ("GET", "vm.balloons", [404, 409, 200, 200]),
    // A guest that has no driver for it never answers.
    ("GET", "vm.balloon-stats", [404, 409, 504, 409]),
    ("PUT", "vm.delete", [204, 204, 204, 204]),
    ("PUT", "vmm.shutdown", [204, 204, 204, 204]),
];

fn bring_to(ballast: &Ballast, client: &mut Client, state: State) {
    client.put("vm.delete");
    if state == None {
        return;
    }
    let mut config = ballast.sleeper();
    config["balloon"] = json!({"size": 0});
    config["disks"] = json!([{"id": "there", "path": ballast.path("there")}]);
    client.put_json("vm.create", &config);
    if state == Created {
        return;
    }
    client.put("vm.boot");
    if state == Paused {
        client.put("vm.pause");
    }
}

fn send(ballast: &Ballast, client: &mut Client, method: &str, path: &str) -> Response {
    let body = match path {
        "vm.create" => Some(ballast.sleeper()),
        "vm.add-disk" => Some(json!({"path": ballast.path("new")})),
        // Made where there is no VM, and there from then on.
        "vm.create-disk" => {
            let path = ballast.path("made.qcow2");
            Some(json!({"path": path, "image_type": "Qcow2", "size": 1 << 30}))
        }
        "vm.add-balloon" => Some(json!({"size": 4096})),
        "vm.resize" => Some(json!({"desired_balloon": 4096})),
        "vm.resize-balloon" => Some(json!({"id": "__balloon", "desired_size": 8192})),
        "vm.resize-disk" => Some(json!({"id": "there", "desired_size": 2 << 20})),
        "vm.resume-disk" => Some(json!({"id": "there"})),
        "vm.snapshot-disk" => {
            let path = ballast.path("overlay");
            Some(json!({"disks": [{"id": "there", "path": path}]}))
        }
        "vm.stream-disk" | "vm.commit-disk" => Some(json!({"id": "there"})),
        "vm.set-job" | "vm.cancel-job" => Some(json!({"id": "job0"})),
        "vm.remove-device" => Some(json!({"id": "there"})),
        _ => Option::None,
    };
    let body = body.map(|body| body.to_string());
    client.request(method, path, body.as_deref())
}

#[test]
fn every_request_in_every_state_does_what_the_table_says() {
    for (method, path, statuses) in TABLE {
        let mut ballast = Ballast::start();
        for name in ["there", "new"] {
            crate::support::artifacts::empty_image(ballast.dir(), name, 1 << 20);
        }
        for (state, expected) in STATES.into_iter().zip(statuses) {
            if path == "vmm.shutdown" {
                continue; // Ends the process: below.
            }
            let mut client = ballast.api();
            bring_to(&ballast, &mut client, state);
            let before: Before = before(&ballast, &mut client);
            let answer = send(&ballast, &mut client, method, path);
            assert_eq!(
                answer.status,
                expected,
                "{path} while {state:?}: {}",
                answer.text()
            );
            if expected >= 400 {
                let reasons = answer.reasons();
                assert!(!reasons.is_empty(), "{path} while {state:?}");
                if state == None {
                    assert!(reasons.contains("VM is not created"), "{path}: {reasons}");
                }
                before.assert_unchanged(&mut ballast, &mut client, path);
            }
        }
        ballast.assert_well();
    }
}

#[test]
fn vmm_shutdown_ends_the_process_in_every_state() {
    for state in STATES {
        let mut ballast = Ballast::start();
        crate::support::artifacts::empty_image(ballast.dir(), "there", 1 << 20);
        let mut client = ballast.api();
        bring_to(&ballast, &mut client, state);
        client
            .request("PUT", "vmm.shutdown", Option::None)
            .expect(204);
        ballast.wait_for_clean_end();
        assert!(
            !ballast.socket().exists(),
            "{state:?}: the socket is still there"
        );
    }
}

#[test]
fn the_way_through_all_states_can_be_gone_again_and_again_without_a_leak() {
    let mut ballast = Ballast::start();
    crate::support::artifacts::empty_image(ballast.dir(), "there", 1 << 20);
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for _ in 0..10 {
        bring_to(&ballast, &mut client, Paused);
        client.put("vm.resume");
        client.put("vm.reboot");
        assert_eq!(client.state(), "Running");
        client.put("vm.shutdown");
        assert_eq!(client.state(), "Created");
        client.put("vm.boot");
        client.put("vm.delete");
        client.put("vm.delete");
    }
    before.assert_unchanged(&mut ballast, &mut client, "ten rounds");
}

#[test]
fn ping_and_info_answer_while_boots_and_reboots_go_on() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    let socket = ballast.socket();
    let busy = std::thread::spawn(move || {
        let mut client = Client::connect(&socket).unwrap();
        for _ in 0..20 {
            client.put("vm.boot");
            client.put("vm.shutdown");
        }
    });
    while !busy.is_finished() {
        client.request("GET", "vmm.ping", Option::None).expect(200);
        let state = client.state();
        assert!(matches!(state.as_str(), "Created" | "Running"), "{state}");
    }
    busy.join().unwrap();
}

#[test]
fn the_guest_that_faults_three_times_over_is_reset_and_the_process_lives() {
    let mut ballast = Ballast::start();
    let events = ballast.events();
    let mut client = ballast.api();
    let kernel = crate::support::payload::faulter(ballast.dir());
    let config = json!({"memory": {"size": 64 << 20}, "payload": {"kernel": kernel}});
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    for _ in 0..3 {
        let mark = events.mark();
        events.wait_after(mark, "guest-reset", |_| true);
    }
    client.put("vm.delete");
    ballast.assert_well();
}
