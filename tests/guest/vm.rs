//! A process with a guest in it, and the ways to talk to both.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::agent::Agent;
use crate::support::artifacts::guest;
use crate::support::ballast::{Ballast, Launch};
use crate::support::events::Events;
use crate::support::eventually;
use crate::support::http::Client;

/// A process, its guest's serial line, its events and a connection to its API.
pub struct Vm {
    /// The guest's serial line. Comes first, for it must go before the process does.
    pub agent: Agent,
    /// All events since before `vm.create`.
    pub events: Events,
    /// A connection.
    pub api: Client,
    /// The process.
    pub ballast: Ballast,
}

/// One vCPU, 256 MiB, no disk, the small initramfs. The kernel's messages stay in its log: to print
/// them takes longer than to boot.
pub fn config(folder: &Path) -> Value {
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 256 << 20},
        "payload": {
            "kernel": guest("vmlinux"),
            "initramfs": guest("initramfs.cpio"),
            "cmdline": "console=ttyS0 quiet",
        },
        "serial": {"mode": "Socket", "socket": folder.join("serial.sock")},
    })
}

/// Adds words to the kernel's command line.
pub fn add_to_cmdline(config: &mut Value, words: &str) {
    let cmdline = config["payload"]["cmdline"].as_str().expect("a cmdline");
    config["payload"]["cmdline"] = json!(format!("{cmdline} {words}"));
}

/// `count` vCPUs.
pub fn set_vcpus(config: &mut Value, count: u32) {
    config["cpus"] = json!({"boot_vcpus": count, "max_vcpus": count});
}

impl Vm {
    /// Boots the guest that [`config`] describes, changed by `change`, which is given the process's
    /// folder too; returns when the guest's agent listens.
    pub fn boot(change: impl FnOnce(&mut Value, &Path)) -> Self {
        let vm = Self::start(Launch::new(), change);
        vm.agent.wait_ready();
        vm
    }

    /// Boots it on a process of one's own; returns at once.
    pub fn start(launch: Launch, change: impl FnOnce(&mut Value, &Path)) -> Self {
        let ballast = launch.start();
        let mut config = config(ballast.dir());
        change(&mut config, ballast.dir());
        let events = ballast.events();
        let mut api = ballast.api();
        api.put_json("vm.create", &config);
        api.put("vm.boot");
        let agent = Agent::on_socket(&ballast.path("serial.sock"));
        Self {
            agent,
            events,
            api,
            ballast,
        }
    }

    /// A path in the process's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.ballast.path(name)
    }

    /// `vm.add-disk`; the disk's id.
    #[track_caller]
    pub fn add_disk(&mut self, disk: &Value) -> String {
        let info = self.api.put_json("vm.add-disk", disk).expect(200).json();
        let bdf = info["bdf"].as_str().expect("an address");
        assert!(bdf.starts_with("0000:00:") && bdf.ends_with(".0"), "{bdf}");
        info["id"].as_str().expect("an id").to_owned()
    }

    /// `vm.remove-device`, and waits until the guest has let go of it.
    #[track_caller]
    pub fn remove_device(&mut self, id: &str) {
        let mark = self.events.mark();
        self.api.put_json("vm.remove-device", &json!({"id": id}));
        self.events.wait_for_device(mark, "device-removed", id);
    }

    /// Waits until the guest sees the disk with this serial number; its device file.
    #[track_caller]
    pub fn disk_in_guest(&self, serial: &str) -> String {
        eventually("the disk appears in the guest", || self.find_disk(serial))
    }

    /// Waits until the guest does not see the disk with this serial number any more.
    #[track_caller]
    pub fn wait_disk_gone(&self, serial: &str) {
        eventually("the disk disappears from the guest", || {
            self.find_disk(serial).is_none().then_some(())
        });
    }

    fn find_disk(&self, serial: &str) -> Option<String> {
        let (_, found) = self.agent.run(&format!(
            "grep -lx {serial} /sys/block/*/serial 2>/dev/null"
        ));
        let name = found.trim().strip_prefix("/sys/block/")?;
        let name = name.strip_suffix("/serial")?;
        Some(format!("/dev/{name}"))
    }

    /// A counter of a device.
    #[track_caller]
    pub fn counter(&mut self, id: &str, name: &str) -> u64 {
        let counters = self.api.get("vm.counters");
        counters[id][name]
            .as_u64()
            .unwrap_or_else(|| panic!("no {name} of {id} in {counters}"))
    }

    /// Panics if the guest's kernel complained about anything that looks like the machine's fault.
    /// Of clocks it may: those of an emulated processor do drift.
    #[track_caller]
    pub fn assert_guest_content(&self) {
        let complaints = "BUG:|Oops|soft lockup|hung task|rcu.*stall|ACPI (BIOS )?Error|ACPI Warning\
            |I/O error|lost page write|irq .*nobody cared|timed out";
        let (_, found) = self.agent.run(&format!("dmesg | grep -E '{complaints}'"));
        assert_eq!(found.trim(), "", "the guest's kernel complains");
    }
}
