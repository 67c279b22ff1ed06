//! The whole VMM thread inside its real filter, over guests of a few instructions.

use std::future::Future;
use std::num::NonZeroU64;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use devices::block::DiskConfig;
use devices::block::NewDiskConfig;
use devices::block::job::JobKind;
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::sync::broadcast;

use super::*;
use crate::boot::test_payload::{elf, file};
use crate::command::Reply;
use crate::config::VmConfig;
use crate::event::Event;
use crate::jobs::{JobState, NewJob};
use crate::overcommit::control::COUNTERS_ID;

/// cli; hlt for ever.
const SLEEP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// Resets the machine through the keyboard controller.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// Enters S5 through the sleep control register.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
/// Jumps to where there is nothing to execute.
const LOST: &[u8] = &[0xe9, 0xfb, 0xff, 0xef, 0xcf];

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "waited in vain");
        std::thread::park_timeout(left);
    }
}

/// A VMM with its thread; it ends when the test is over.
struct Tested {
    handle: Handle,
    events: broadcast::Receiver<Event>,
    kernel: NamedTempFile,
}

impl Drop for Tested {
    fn drop(&mut self) {
        self.handle.terminate();
        wait(self.handle.ended());
    }
}

/// A VMM; `None` (and a remark) where there is no KVM.
fn vmm(code: &[u8], exit_on_power_off: bool) -> Option<Tested> {
    vmm_on(code, exit_on_power_off, psi::Paths::default())
}

/// The same on a host that tells by these files how it is.
fn vmm_on(code: &[u8], exit_on_power_off: bool, host: psi::Paths) -> Option<Tested> {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: there is no /dev/kvm");
        return None;
    }
    let events = Events::new(Instant::now());
    let listener = events.subscribe();
    let options = Options {
        exit_on_power_off,
        host,
        ..Options::default()
    };
    Some(Tested {
        handle: start(options, None, events).unwrap(),
        events: listener,
        kernel: file(&elf(code)),
    })
}

impl Tested {
    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        wait(self.handle.request(command))
    }

    fn config(&self) -> VmConfig {
        let config = json!({
            "memory": {"size": 16 << 20},
            "payload": {"kernel": self.kernel.path()},
        });
        serde_json::from_value(config).unwrap()
    }

    fn create(&self, config: VmConfig) -> Result<(), Error> {
        let config = Box::new(config);
        self.ask(|reply| Command::Create { config, reply })
    }

    fn boot(&self) {
        self.create(self.config()).unwrap();
        self.ask(|reply| Command::Boot { reply }).unwrap();
    }

    fn state(&self) -> Option<State> {
        self.handle.status().map(|info| info.state)
    }

    /// The names of the events up to and with `last`.
    fn events_until(&mut self, last: &str) -> Vec<&'static str> {
        let mut names = Vec::new();
        while names.last() != Some(&last) {
            names.push(wait(self.events.recv()).unwrap().event);
        }
        names
    }
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    image
}

fn disk(image: &NamedTempFile, slot: Option<u8>) -> DiskConfig {
    serde_json::from_value(json!({"path": image.path(), "pci_device_id": slot})).unwrap()
}

#[test]
fn what_a_vm_leaves_on_the_host_is_tidied_up_before_the_end_is_told() {
    for _ in 0..10 {
        let Some(vmm) = vmm(POWER_OFF, true) else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("serial");
        let mut config = vmm.config();
        config.serial =
            serde_json::from_value(json!({"mode": "Socket", "socket": socket})).unwrap();
        vmm.create(config).unwrap();
        assert!(socket.exists());
        vmm.ask(|reply| Command::Boot { reply }).unwrap();
        wait(vmm.handle.ended());
        assert!(!socket.exists());
    }
}

#[test]
fn a_guest_that_resets_itself_stays_paused_when_it_is_paused() {
    let Some(vmm) = vmm(RESET, false) else {
        return;
    };
    vmm.boot();
    for _ in 0..5 {
        vmm.ask(|reply| Command::Pause { reply }).unwrap();
        for _ in 0..20 {
            assert_eq!(vmm.state(), Some(State::Paused));
            std::thread::sleep(Duration::from_millis(5));
        }
        vmm.ask(|reply| Command::Resume { reply }).unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Holds up whoever emits an event until it has been looked at what is published then.
struct Look {
    handle: Handle,
    seen: Mutex<Option<State>>,
    turn: Barrier,
}

impl Wake for Look {
    fn wake(self: Arc<Self>) {
        *self.seen.lock().unwrap() = self.handle.status().map(|info| info.state);
        self.turn.wait();
        self.turn.wait();
    }
}

async fn receive(mut events: broadcast::Receiver<Event>) -> (broadcast::Receiver<Event>, Event) {
    let event = events.recv().await.unwrap();
    (events, event)
}

impl Tested {
    /// Does `act`; says what was published when each event came out of it, up to the event
    /// `last`.
    fn states_at_events(
        &self,
        last: &str,
        act: impl FnOnce(&Self) + Send,
    ) -> Vec<(&'static str, Option<State>)> {
        let look = Arc::new(Look {
            handle: self.handle.clone(),
            seen: Mutex::default(),
            turn: Barrier::new(2),
        });
        let waker = Waker::from(look.clone());
        let mut context = Context::from_waker(&waker);
        let mut seen = Vec::new();
        // Each event is awaited by a receiver that stands behind all events before.
        let listening = self.handle.events();
        std::thread::scope(|scope| {
            let mut next = Box::pin(receive(listening));
            assert!(next.as_mut().poll(&mut context).is_pending());
            scope.spawn(|| act(self));
            loop {
                look.turn.wait();
                let Poll::Ready((listening, event)) = next.as_mut().poll(&mut context) else {
                    unreachable!("it was woken");
                };
                seen.push((event.event, *look.seen.lock().unwrap()));
                if event.event == last {
                    look.turn.wait();
                    break;
                }
                next = Box::pin(receive(listening));
                assert!(next.as_mut().poll(&mut context).is_pending());
                look.turn.wait();
            }
        });
        seen
    }
}

#[test]
fn who_hears_that_something_has_happened_finds_it_published() {
    use State::{Created, Paused, Running};
    let Some(vmm) = vmm(SLEEP, false) else {
        return;
    };
    vmm.create(vmm.config()).unwrap();
    let seen = vmm.states_at_events("booted", |vmm| {
        vmm.ask(|reply| Command::Boot { reply }).unwrap();
    });
    assert_eq!(seen.last(), Some(&("booted", Some(Running))), "{seen:?}");
    let seen = vmm.states_at_events("paused", |vmm| {
        vmm.ask(|reply| Command::Pause { reply }).unwrap();
    });
    assert_eq!(seen.last(), Some(&("paused", Some(Paused))), "{seen:?}");
    let seen = vmm.states_at_events("resumed", |vmm| {
        vmm.ask(|reply| Command::Resume { reply }).unwrap();
    });
    assert_eq!(seen.last(), Some(&("resumed", Some(Running))), "{seen:?}");
    let seen = vmm.states_at_events("shutdown", |vmm| {
        vmm.ask(|reply| Command::Shutdown { reply }).unwrap();
    });
    assert_eq!(seen.last(), Some(&("shutdown", Some(Created))), "{seen:?}");
    let seen = vmm.states_at_events("deleted", |vmm| {
        vmm.ask(|reply| Command::Delete { reply }).unwrap();
    });
    assert_eq!(seen.last(), Some(&("deleted", None)), "{seen:?}");
}

#[test]
fn a_device_keeps_its_slot_from_those_that_take_any() {
    let Some(vmm) = vmm(SLEEP, false) else {
        return;
    };
    let images = [image(), image(), image()];
    let mut config = vmm.config();
    // Any slot, which must not be the third one's; and the one that the RNG would take.
    config.disks = vec![
        disk(&images[0], None),
        disk(&images[1], Some(1)),
        disk(&images[2], Some(2)),
    ];
    vmm.create(config).unwrap();
    vmm.ask(|reply| Command::Boot { reply }).unwrap();
    let tree = vmm.handle.status().unwrap().device_tree.clone().unwrap();
    let slot = |id: &str| tree[&format!("_virtio-pci-{id}")].pci_bdf.clone().unwrap();
    assert_eq!(slot("_disk1"), "0000:00:01.0");
    assert_eq!(slot("_disk2"), "0000:00:02.0");
    assert_eq!(slot("__rng"), "0000:00:03.0");
    assert_eq!(slot("_disk0"), "0000:00:04.0");
}

#[test]
fn ram_that_the_vcpus_cannot_address_is_refused() {
    let config = |bits: u8, size: u64| -> VmConfig {
        let config = json!({
            "cpus": {"boot_vcpus": 1, "max_phys_bits": bits}, "memory": {"size": size},
        });
        serde_json::from_value(config).unwrap()
    };
    config(32, 3 << 30).validate().unwrap();
    config(33, 7 << 30).validate().unwrap();
    for (bits, size) in [(32, 4 << 30), (33, 8 << 30), (36, 64 << 30), (43, 8 << 40)] {
        let error = config(bits, size).validate().unwrap_err();
        assert!(
            matches!(&error, Error::Invalid(invalid) if invalid.field == "memory.size"),
            "{error}"
        );
    }
}

#[test]
fn more_ram_than_a_slot_of_kvm_holds_is_refused_before_it_is_tried() {
    let Some(vmm) = vmm(SLEEP, false) else {
        return;
    };
    let mut config = vmm.config();
    config.memory.size = 32 << 40;
    let error = vmm.create(config).unwrap_err();
    assert!(matches!(&error, Error::Invalid(_)), "{error}");
}

#[test]
fn a_deadline_is_noticed_although_messages_wait() {
    let (sender, inbox) = std::sync::mpsc::channel();
    sender.send(Message::Guest).unwrap();
    let mut expired = false;
    assert!(super::deadlines::receive(&inbox, Some(Instant::now()), &mut expired).is_none());
    let later = Instant::now() + Duration::from_secs(30);
    assert!(super::deadlines::receive(&inbox, Some(later), &mut expired).is_some());
}

#[test]
fn messages_are_heard_although_a_deadline_has_always_passed() {
    let (sender, inbox) = std::sync::mpsc::channel();
    for _ in 0..2 {
        sender.send(Message::Guest).unwrap();
    }
    let mut expired = false;
    let mut next =
        || super::deadlines::receive(&inbox, Some(Instant::now()), &mut expired).is_some();
    assert_eq!([(); 4].map(|()| next()), [false, true, false, true]);
    // Nor does it have to be its turn where nothing waits.
    assert_eq!([(); 3].map(|()| next()), [false; 3]);
    sender.send(Message::Guest).unwrap();
    assert!(next(), "the last was a deadline");
}

#[test]
fn a_reset_ends_a_pause_for_lack_of_space_and_not_one_that_a_client_asked_for() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: there is no /dev/kvm");
        return;
    }
    let kernel = file(&elf(RESET));
    for (for_space, then) in [(true, State::Running), (false, State::Paused)] {
        let (_handle, endpoint) = channel(Events::new(Instant::now()));
        let host = Sources::open(&psi::Paths::default());
        let control = Control::new(host, Box::new(Alone));
        let mut vmm = Vmm::new(Options::default(), None, endpoint, control);
        let config = json!({
            "memory": {"size": 16 << 20},
            "payload": {"kernel": kernel.path()},
        });
        vmm.create(serde_json::from_value(config).unwrap()).unwrap();
        vmm.boot(false).unwrap();
        let message = vmm.endpoint.inbox.recv_timeout(Duration::from_secs(30));
        assert!(matches!(message, Ok(Message::Guest)));
        vmm.pause().unwrap();
        if for_space {
            vmm.created.as_mut().unwrap().set_paused_for_space();
        }
        vmm.guest();
        assert_eq!(vmm.state(), Some(then));
    }
}

#[test]
fn a_vm_whose_vcpu_fails_is_told_to_be_paused() {
    let Some(mut vmm) = vmm(LOST, false) else {
        return;
    };
    vmm.boot();
    let events = vmm.events_until("paused");
    // The vCPU may be quicker than the word that the VM is booted.
    assert!(events.contains(&"vcpu-error"), "{events:?}");
    assert!(events.ends_with(&["pausing", "paused"]), "{events:?}");
    assert_eq!(vmm.state(), Some(State::Paused));
    vmm.ask(|reply| Command::Reboot { reply }).unwrap();
}

#[test]
fn a_reboot_that_cannot_succeed_leaves_the_vm_running() {
    let Some(mut vmm) = vmm(SLEEP, false) else {
        return;
    };
    vmm.boot();
    vmm.events_until("booted");
    let kernel = std::fs::read(vmm.kernel.path()).unwrap();
    std::fs::write(vmm.kernel.path(), "no kernel").unwrap();
    let error = vmm.ask(|reply| Command::Reboot { reply }).unwrap_err();
    assert!(
        matches!(&error, Error::Invalid(invalid) if invalid.field == "payload.kernel"),
        "{error}"
    );
    assert_eq!(vmm.state(), Some(State::Running));
    std::fs::write(vmm.kernel.path(), kernel).unwrap();
    vmm.ask(|reply| Command::Reboot { reply }).unwrap();
    let events = vmm.events_until("rebooted");
    assert_eq!(events, ["rebooting", "booting", "booted", "rebooted"]);
}

#[test]
fn a_vm_that_does_not_come_back_from_a_reset_is_told_to_be_off() {
    let Some(mut vmm) = vmm(RESET, false) else {
        return;
    };
    vmm.boot();
    std::fs::remove_file(vmm.kernel.path()).unwrap();
    let events = vmm.events_until("shutdown");
    assert!(events.ends_with(&["boot-failed", "shutdown"]), "{events:?}");
    assert_eq!(vmm.state(), Some(State::Created));
}

#[test]
fn a_guest_that_resets_itself_in_a_loop_is_booted_ten_times_a_second_at_most() {
    let Some(mut vmm) = vmm(RESET, false) else {
        return;
    };
    vmm.boot();
    vmm.events_until("booted");
    let start = Instant::now();
    for _ in 0..5 {
        vmm.events_until("booted");
    }
    assert!(start.elapsed() >= Duration::from_millis(450));
}

#[test]
fn an_id_that_vm_info_gives_to_another_devices_pci_function_is_taken() {
    let config = |ids: &[&str]| -> VmConfig {
        let disks = ids.iter().enumerate();
        let disks: Vec<_> = disks
            .map(|(index, id)| json!({"id": id, "path": format!("/{index}")}))
            .collect();
        serde_json::from_value(json!({"disks": disks})).unwrap()
    };
    config(&["a", "_virtio-pci-b"]).validate().unwrap();
    for ids in [&["a", "_virtio-pci-a"][..], &["_virtio-pci-__rng"]] {
        let error = config(ids).validate().unwrap_err();
        assert!(matches!(&error, Error::DuplicateId { .. }), "{error}");
    }
}

impl Tested {
    fn looks(&self) -> u64 {
        let counters = self.ask(|reply| Command::Counters { reply }).unwrap();
        counters[COUNTERS_ID]["looks"]
    }

    fn set_overcommit(&self, policy: serde_json::Value) -> Result<(), Error> {
        let config = Box::new(serde_json::from_value(policy).unwrap());
        self.ask(|reply| Command::SetOvercommit { config, reply })
    }

    fn target(&self) -> u64 {
        let balloons = self.ask(|reply| Command::Balloons { reply }).unwrap();
        balloons[0].target
    }
}

#[test]
fn the_governor_looks_while_the_vm_runs_and_keeps_the_guarantee_inside_the_filter() {
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let psi = "some avg10=50.00 avg60=0.00 avg300=0.00 total=9\n";
    let host = psi::Paths {
        meminfo: file("meminfo", "MemTotal: 1048576 kB\nMemAvailable: 1024 kB\n"),
        pressure: file("pressure", psi),
        cgroup_pressure: Some(file("cgroup", psi)),
    };
    let Some(mut vmm) = vmm_on(SLEEP, false, host) else {
        return;
    };
    const MIB: u64 = 1 << 20;
    let mut config = vmm.config();
    config.memory.size = 64 * MIB;
    let balloons = json!([{"id": "b", "size": 16 * MIB}, {"id": "other", "size": 8 * MIB}]);
    config.balloons = serde_json::from_value(balloons).unwrap();
    let policy = json!({"mode": "auto", "guaranteed_size": 32 * MIB, "interval_ms": 100});
    config.overcommit = serde_json::from_value(policy).unwrap();
    vmm.create(config).unwrap();
    vmm.ask(|reply| Command::Boot { reply }).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while vmm.looks() < 3 {
        assert!(Instant::now() < deadline, "it does not look");
        std::thread::sleep(Duration::from_millis(20));
    }
    // It does without triggers, which files that are not the kernel's do not take, and says so.
    let told = vmm.events_until("overcommit-trigger-refused");
    assert!(told.contains(&"booted"), "{told:?}");
    // Without a driver nothing is taken, whatever the pressure.
    assert_eq!(vmm.target(), 16 * MIB);
    vmm.ask(|reply| Command::Pause { reply }).unwrap();
    let paused = vmm.looks();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vmm.looks(), paused);
    vmm.ask(|reply| Command::Resume { reply }).unwrap();

    // What the other takes, or a higher guarantee, the driven one gives up at once.
    let resize = |id: &str, desired_size, floor_override| {
        let id = id.to_owned();
        vmm.ask(|reply| Command::ResizeBalloon {
            id,
            desired_size,
            floor_override,
            reply,
        })
    };
    let raised = json!({"mode": "auto", "guaranteed_size": 44 * MIB});
    vmm.set_overcommit(raised).unwrap();
    assert_eq!(vmm.target(), 12 * MIB);
    let error = resize("b", 20 * MIB, true).unwrap_err();
    assert!(matches!(error, Error::Driven { .. }), "{error}");
    let error = resize("other", 9 * MIB, false).unwrap_err();
    assert!(matches!(error, Error::BelowFloor { .. }), "{error}");
    let error = vmm
        .set_overcommit(json!({"mode": "auto", "guaranteed_size": 60 * MIB}))
        .unwrap_err();
    assert!(matches!(error, Error::BelowFloor { .. }), "{error}");

    // Off leaves it where it is, and says so.
    vmm.set_overcommit(json!({"guaranteed_size": 44 * MIB}))
        .unwrap();
    let info = vmm.handle.status().unwrap();
    assert_eq!(info.config.balloons[0].size, 12 * MIB);
    assert_eq!(vmm.target(), 12 * MIB);
    let idle = vmm.looks();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vmm.looks(), idle);
    // Now it can be overridden, stays, and what comes back may stay below.
    resize("b", 20 * MIB, true).unwrap();
    resize("b", 18 * MIB, false).unwrap();
    resize("b", 19 * MIB, false).unwrap_err();
    vmm.set_overcommit(json!({"guaranteed_size": 44 * MIB, "weight": 7}))
        .unwrap();
    assert_eq!(vmm.target(), 18 * MIB);
}

#[test]
fn a_job_that_was_told_to_end_does_not_begin_again_after_a_reboot() {
    let Some(mut vmm) = vmm(SLEEP, false) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let [base, overlay] = ["base", "overlay"].map(|name| folder.path().join(name));
    std::fs::write(&base, vec![7; 8 << 20]).unwrap();
    let new: NewDiskConfig = serde_json::from_value(json!({
        "path": overlay, "image_type": "Qcow2", "backing_path": base, "backing_type": "Raw",
    }))
    .unwrap();
    new.create().unwrap();
    let mut config = vmm.config();
    let disk = json!({
        "id": "thin", "path": overlay, "image_type": "Qcow2", "backing_files": true,
    });
    config.disks = vec![serde_json::from_value(disk).unwrap()];
    vmm.create(config).unwrap();
    vmm.ask(|reply| Command::Boot { reply }).unwrap();
    let order = NewJob {
        disk: "thin".into(),
        kind: JobKind::Stream,
        speed: NonZeroU64::new(1 << 10),
    };
    vmm.ask(|reply| Command::BeginJob { order, reply }).unwrap();
    let mut context = Context::from_waker(Waker::noop());
    // Both are there before the job can tell that it has ended.
    let mut first = Box::pin(vmm.handle.request(|reply| Command::Reboot { reply }));
    assert!(first.as_mut().poll(&mut context).is_pending());
    let id = "job0".to_owned();
    let mut cancel = Box::pin(vmm.handle.request(|reply| Command::CancelJob { id, reply }));
    assert!(cancel.as_mut().poll(&mut context).is_pending());
    vmm.ask(|reply| Command::Reboot { reply }).unwrap();
    wait(first).unwrap();
    wait(cancel).unwrap();
    let jobs = vmm.ask(|reply| Command::Jobs { reply }).unwrap();
    assert_eq!(jobs[0].state, JobState::Cancelled);
    vmm.events_until("job-cancelled");
}
