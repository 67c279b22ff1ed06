//! Equal pages of several guests, merged by the host's kernel once somebody tells it to.
//!
//! What that gains is read three ways that must agree: each VM's own view, its cgroup, and the
//! host's totals. It changes the host's KSM settings while it runs, and puts them back.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::balloon::Charged;
use crate::support::ballast::binary;
use crate::support::eventually;

const MIB: u64 = 1 << 20;
const HOST: &str = "/sys/kernel/mm/ksm";
/// Bytes of a file whose pages are all different, and the same in each guest.
const FILE: u64 = 32 * MIB;

/// Puts the host's settings back.
struct Settings(Vec<(&'static str, String)>);

impl Settings {
    fn keep() -> Self {
        let names = ["pages_to_scan", "sleep_millisecs", "run"];
        let read = |name| fs::read_to_string(Path::new(HOST).join(name));
        let read = |name| (name, read(name).expect("a kernel with KSM"));
        Self(names.map(read).into())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (name, value) in &self.0 {
            let _ = fs::write(Path::new(HOST).join(name), value);
        }
    }
}

fn ksm(arguments: &[&str]) -> String {
    let mut command = Command::new(binary());
    command.args(["host", "ksm"]).args(arguments);
    let output = command.output().expect("run ballast");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

fn status() -> Value {
    serde_json::from_str(&ksm(&["status", "--json"])).expect("JSON")
}

#[test]
fn equal_pages_of_three_guests_are_merged_and_the_host_gets_the_rest_back() {
    let _settings = Settings::keep();
    ksm(&["off"]);
    let mut guests: Vec<Charged> = (0..3)
        .map(|_| {
            let mut guest = Charged::boot(|config| {
                // Merging takes huge pages apart, which is not what is tried here.
                config["memory"] = json!({"size": 192 * MIB, "mergeable": true, "thp": false});
            });
            guest.vm().agent.ok(&format!(
                "mkdir -p /same && mount -t tmpfs -o size=64m same /same && \
                 seq 1000000 9999999 | head -c {FILE} >/same/file"
            ));
            guest
        })
        .collect();
    let sum = |guest: &mut Charged| guest.vm().agent.ok("md5sum </same/file");
    let sums: Vec<String> = guests.iter_mut().map(sum).collect();
    assert!(sums.iter().all(|other| *other == sums[0]), "{sums:?}");
    let costs = |guests: &[Charged]| guests.iter().map(Charged::cost).sum::<u64>();
    let before = costs(&guests);
    let view = guests[0].vm().api.get("vm.overcommit");
    assert_eq!(view["cost"]["source"], "cgroup", "{view}");
    assert_eq!(view["ksm"]["mergeable"], true);
    assert_eq!(view["ksm"]["merged_pages"], 0, "ballast starts no ksmd");
    assert_eq!(status()["run"], "off");

    ksm(&["on", "--pages-to-scan", "20000", "--sleep-ms", "10"]);
    // Of three copies of the file one stays, whoever is charged for it.
    let wanted = FILE / 10 * 18;
    eventually("the host has two of the three copies back", || {
        (costs(&guests) + wanted <= before).then_some(())
    });
    let file_pages = FILE / 4096;
    for guest in &mut guests {
        eventually("the guest's pages are merged", || {
            let view = guest.vm().api.get("vm.overcommit");
            let gain = &view["ksm"];
            let merged = gain["merged_pages"].as_u64() >= Some(file_pages / 10 * 9);
            let profit = gain["net_profit"].as_i64() > Some(FILE as i64 / 2);
            (merged && profit).then_some(())
        });
    }
    let host = status();
    assert_eq!(host["run"], "on");
    assert!(
        host["pages_sharing"].as_u64() >= Some(file_pages / 10 * 18),
        "{host}"
    );

    ksm(&["off"]);
    let after = costs(&guests);
    let view = guests[0].vm().api.get("vm.overcommit");
    println!(
        "three guests cost {} MiB, merged {} MiB; the first one's gain {}",
        before / MIB,
        after / MIB,
        view["ksm"]
    );
    let cost = view["cost"]["resident"].as_u64().expect("a cost");
    assert!(cost.abs_diff(guests[0].cost()) < 8 * MIB, "{view}");

    // A page that one guest writes to is its own again, and nobody else's changes.
    guests[0]
        .vm()
        .agent
        .ok("dd if=/dev/zero of=/same/file bs=1M count=16 conv=notrunc 2>/dev/null");
    assert_ne!(sum(&mut guests[0]), sums[0]);
    for guest in &mut guests[1..] {
        assert_eq!(sum(guest), sums[0]);
        guest.vm().assert_guest_content();
    }
}
