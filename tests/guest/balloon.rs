//! Balloons in real guests: the memory really comes back to the host, and goes to the guest again.
//!
//! What a VM costs is read from a cgroup of its own: resident memory also falls where nothing was
//! freed.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::ballast::{Launch, binary};
use crate::support::eventually;
use crate::support::procfs::assert_holds_again;
use crate::vm::Vm;

const MIB: u64 = 1 << 20;

/// A VM in a cgroup of its own.
pub struct Charged {
    // Goes first, so that the group is empty when it is removed.
    vm: Option<Vm>,
    group: PathBuf,
}

impl Charged {
    /// Boots it; returns when the guest's agent listens.
    pub fn boot(change: impl FnOnce(&mut Value)) -> Self {
        let root = PathBuf::from("/sys/fs/cgroup");
        // Where it is switched on already, writing it again does nothing.
        let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        let name = format!("ballast-test-{}-{:?}", std::process::id(), Instant::now());
        let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let group = root.join(name);
        fs::create_dir(&group).expect("this test must be root, to make a cgroup");
        let mut launch = Launch::of("/bin/sh".as_ref());
        let socket = launch.path("api.sock");
        let script = format!(
            "echo $$ >{}/cgroup.procs && exec {} --api-socket {}",
            group.display(),
            binary(),
            socket.display()
        );
        launch.command().arg("-c").arg(script);
        let vm = Vm::start(launch, |config, _| change(config));
        vm.agent.wait_ready();
        Self {
            vm: Some(vm),
            group,
        }
    }

    /// The VM.
    pub fn vm(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("it runs")
    }

    /// Bytes charged to the VM.
    pub fn cost(&self) -> u64 {
        let current = fs::read_to_string(self.group.join("memory.current"));
        let current = current.expect("the memory controller");
        current.trim().parse().expect("a number")
    }

    /// Waits until the VM costs at most so much; says how long that took.
    #[track_caller]
    fn wait_cost(&self, most: u64) -> Duration {
        let begun = Instant::now();
        eventually(&format!("the VM costs at most {} MiB", most / MIB), || {
            (self.cost() <= most).then_some(())
        });
        begun.elapsed()
    }

    /// Has the guest touch all memory that is free but about 100 MiB, and free it again.
    fn touch_all(&mut self) {
        let agent = &self.vm().agent;
        agent.ok("mkdir -p /fill && mount -t tmpfs -o size=95% fill /fill");
        let free = "awk '/MemFree/ {print int($2 / 1024) - 100}' /proc/meminfo";
        agent.ok(&format!(
            "dd if=/dev/zero of=/fill/a bs=1M count=$({free}) 2>/dev/null"
        ));
        agent.ok("umount /fill");
    }

    fn resize(&mut self, id: &str, size: u64) -> Duration {
        let vm = self.vm();
        let mark = vm.events.mark();
        let begun = Instant::now();
        vm.api.put_json(
            "vm.resize-balloon",
            &json!({"id": id, "desired_size": size}),
        );
        vm.events.wait_for_device(mark, "balloon-reached", id);
        begun.elapsed()
    }

    fn balloon(&mut self, id: &str) -> Value {
        let balloons = self.vm().api.get("vm.balloons");
        let mut balloons = balloons.as_array().expect("a list").iter();
        let found = balloons.find(|balloon| balloon["id"] == id);
        found.expect("the balloon").clone()
    }

    fn add(&mut self, balloon: &Value) -> String {
        let info = self.vm().api.put_json("vm.add-balloon", balloon).json();
        info["id"].as_str().expect("an id").to_owned()
    }
}

impl Drop for Charged {
    fn drop(&mut self) {
        self.vm = None;
        // Fails only while something is left in it, which is then another test's to find.
        let _ = fs::remove_dir(&self.group);
    }
}

fn gib_per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / (1 << 30) as f64 / time.as_secs_f64()
}

/// Bytes of memory of the process that are not the guest's.
fn own_memory(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a living process");
    let kib = |mapping: &str, name: &str| -> u64 {
        let mut lines = mapping.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        line.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0)
    };
    let mappings = smaps.split("\nVmFlags:");
    let own = mappings.filter(|mapping| kib(mapping, "Size:") < 128 << 10);
    own.map(|mapping| kib(mapping, "Rss:") * 1024).sum()
}

#[test]
fn half_of_a_guests_memory_comes_to_the_host_and_goes_back() {
    take_half_and_give_it_back(false);
}

#[test]
fn half_of_a_guests_shared_memory_comes_to_the_host_and_goes_back() {
    take_half_and_give_it_back(true);
}

fn take_half_and_give_it_back(shared: bool) {
    let mut vm = Charged::boot(|config| {
        config["memory"] = json!({"size": 1024 * MIB, "shared": shared});
    });
    vm.touch_all();
    let free = |vm: &mut Charged| {
        let number = "awk '/MemFree/ {print $2}' /proc/meminfo";
        vm.vm().agent.number(number) * 1024
    };
    let free_before = free(&mut vm);
    let id = vm.add(&json!({"size": 0}));
    let before = vm.cost();
    let size = 512 * MIB;
    let taken = vm.resize(&id, size);
    vm.wait_cost(before - size / 100 * 95);
    println!(
        "shared {shared}: inflated {:.2} GiB/s, host got {} MiB",
        gib_per_second(size, taken),
        (before - vm.cost()) / MIB
    );
    let lost = free_before - free(&mut vm);
    assert!(lost > size / 100 * 90, "{} MiB", lost / MIB);
    let info = vm.vm().api.get("vm.info");
    assert_eq!(info["memory_actual_size"], 512 * MIB);
    let shown = vm.balloon(&id);
    assert_eq!(
        (&shown["state"], &shown["actual"]),
        (&json!("reached"), &json!(size))
    );
    assert!(shown["given"].as_u64() >= Some(size), "{shown}");
    assert_eq!(shown["ignored"], 0);
    let free_memory = &shown["statistics"]["free_memory"];
    assert!(free_memory["value"].as_u64() > Some(0), "{shown}");
    assert!(free_memory["age_ms"].as_u64() < Some(5000), "{shown}");

    let given = vm.resize(&id, 0);
    println!(
        "shared {shared}: deflated {:.2} GiB/s",
        gib_per_second(size, given)
    );
    eventually("the guest has its memory back", || {
        (free(&mut vm) > free_before - size / 8).then_some(())
    });
    vm.touch_all();
    vm.vm().assert_guest_content();
}

/// Half of 1 GiB in the first rounds; in those that follow less, as an emulated guest takes its time.
#[test]
fn a_balloon_comes_and_goes_fifty_times_without_a_trace() {
    const LARGE: u32 = 2;
    let mut vm = Charged::boot(|config| {
        config["memory"] = json!({"size": 1024 * MIB});
    });
    let before = vm.vm().ballast.holdings();
    let config = vm.vm().api.get("vm.info")["config"].clone();
    let pid = vm.vm().ballast.pid();
    let mut own_before = 0;
    for round in 0..50 {
        let mark = vm.vm().events.mark();
        if round < LARGE {
            vm.touch_all();
            let full = vm.cost();
            let size = 512 * MIB;
            let id = vm.add(&json!({"size": size}));
            vm.vm().events.wait_for_device(mark, "balloon-reached", &id);
            vm.wait_cost(full - size / 100 * 95);
            vm.resize(&id, 0);
            vm.vm().remove_device(&id);
        } else {
            let balloon = json!({"size": 8 * MIB, "free_page_reporting": true});
            let id = vm.add(&balloon);
            vm.vm().events.wait_for_device(mark, "balloon-reached", &id);
            // Sometimes it is pulled while it is full: then the guest takes its pages out first.
            if round % 2 == 0 {
                vm.resize(&id, 0);
            }
            vm.vm().remove_device(&id);
        }
        let info = vm.vm().api.get("vm.info");
        assert_eq!(info["memory_actual_size"], 1024 * MIB);
        if round < LARGE {
            assert_holds_again(pid, &before);
            own_before = own_memory(pid);
        }
    }
    assert_holds_again(pid, &before);
    let own = own_memory(pid);
    println!("own memory {own_before} → {own}");
    assert!(own <= own_before + MIB, "grew from {own_before} to {own}");
    assert_eq!(vm.vm().api.get("vm.info")["config"], config);
    vm.touch_all();
    vm.vm().assert_guest_content();
}

#[test]
fn two_balloons_have_targets_of_their_own() {
    let mut vm = Charged::boot(|config| {
        config["balloon"] = json!({"size": 16 * MIB, "deflate_on_oom": true});
    });
    let second = vm.add(&json!({"size": 32 * MIB, "id": "second"}));
    eventually("both are reached", || {
        let actual = vm.vm().api.get("vm.info")["memory_actual_size"].as_u64();
        (actual == Some(208 * MIB)).then_some(())
    });
    vm.resize("__balloon", 0);
    assert_eq!(vm.balloon("__balloon")["actual"], 0);
    assert_eq!(vm.balloon(&second)["actual"], 32 * MIB);
    let stats = vm.vm().api.get("vm.balloon-stats");
    assert_eq!(stats["balloon_actual"], 0);
    let total = stats["stats"]["total_memory"].as_u64();
    assert!(
        total > Some(100 * MIB) && total < Some(256 * MIB),
        "{stats}"
    );
    vm.vm().remove_device("__balloon");
    vm.vm().remove_device("second");
}

#[test]
fn memory_that_the_guest_frees_comes_to_the_host_by_itself() {
    free_and_look(false);
}

#[test]
fn shared_memory_that_the_guest_frees_comes_to_the_host_by_itself() {
    free_and_look(true);
}

fn free_and_look(shared: bool) {
    let mut vm = Charged::boot(|config| {
        config["memory"] = json!({"size": 1024 * MIB, "shared": shared});
        config["balloon"] = json!({"size": 0, "free_page_reporting": true});
    });
    let agent = &vm.vm().agent;
    agent.ok("mkdir -p /fill && mount -t tmpfs -o size=95% fill /fill");
    agent.ok("dd if=/dev/zero of=/fill/a bs=1M count=600 2>/dev/null");
    let full = vm.cost();
    assert!(full > 600 * MIB, "{full}");
    vm.vm().agent.ok("umount /fill");
    let took = vm.wait_cost(full - 540 * MIB);
    println!("shared {shared}: 540 of 600 MiB were reported in {took:.1?}");
    let reported = vm.balloon("__balloon")["reported_free"].as_u64();
    assert!(reported >= Some(540 * MIB), "{reported:?}");
    // It can have them again.
    vm.touch_all();
    vm.vm().assert_guest_content();
}

#[test]
fn a_guest_short_of_memory_takes_it_out_of_the_balloon() {
    let mut vm = Charged::boot(|config| {
        config["memory"] = json!({"size": 512 * MIB});
        config["balloon"] = json!({"size": 0, "deflate_on_oom": true});
    });
    let free = vm
        .vm()
        .agent
        .number("awk '/MemFree/ {print $2}' /proc/meminfo")
        * 1024;
    let size = (free - 80 * MIB) / 4096 * 4096;
    vm.resize("__balloon", size);
    // dd has all of its block in memory at once.
    vm.vm()
        .agent
        .ok("dd if=/dev/zero of=/dev/null bs=200M count=1");
    let shown = vm.balloon("__balloon");
    assert!(shown["actual"].as_u64() < Some(size), "{shown}");
    assert_eq!(shown["target"], size);
    let (_, kills) = vm.vm().agent.run("dmesg | grep -i 'killed process'");
    assert_eq!(kills.trim(), "");
}

#[test]
fn a_reset_amidst_inflating_begins_anew() {
    let mut vm = Charged::boot(|config| {
        config["balloon"] = json!({"size": 0});
    });
    let line = vm.vm().agent.mark();
    let ask = json!({"id": "__balloon", "desired_size": 64 * MIB});
    vm.vm().api.put_json("vm.resize-balloon", &ask);
    let mark = vm.vm().events.mark();
    vm.vm().api.put("vm.reboot");
    vm.vm().agent.wait_ready_after(line);
    let events = &vm.vm().events;
    events.wait_for_device(mark, "balloon-reached", "__balloon");
    assert_eq!(vm.balloon("__balloon")["actual"], 64 * MIB);
    vm.vm().assert_guest_content();
}
