//! The governor over a real balloon, whose worker runs inside its real filter, with a driver in an
//! in-memory guest; the host's pressure is what files in a folder say.

use devices::balloon::BalloonConfig;
use devices::config::BuildContext;
use devices::event::Reporter;
use devices::sandbox::SeccompMode;
use devices::virtio::testing::{Buffer, TestDriver, TestGuest, VERSION_1, eventually};
use tempfile::TempDir;

use super::*;
use crate::overcommit::Alone;
use crate::overcommit::psi::Paths;
use crate::overcommit::triggers::Scope;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const RAM: u64 = 64 * MIB;
/// Memory beyond what the driver's rings and buffers take.
const FREE: u64 = 16 * MIB;
const STATS_VQ: u64 = 1 << 1;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;

/// A host as its files tell.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A host of 1 GiB.
    fn say(&self, available: u64, psi: &str) {
        let meminfo = format!(
            "MemTotal: {} kB\nMemAvailable: {} kB\n",
            1 << 20,
            available >> 10
        );
        let line = |kind| format!("{kind} avg10={psi} avg60=0.00 avg300=0.00 total=0\n");
        let pressure = line("some") + &line("full").replace(psi, "0.00");
        for (name, text) in [("meminfo", meminfo), ("pressure", pressure)] {
            std::fs::write(self.0.path().join(name), text).unwrap();
        }
    }

    fn control(&self) -> Control {
        let sources = Sources::open(&Paths {
            meminfo: self.0.path().join("meminfo"),
            pressure: self.0.path().join("pressure"),
            cgroup_pressure: None,
        });
        Control::new(sources, Box::new(Alone))
    }
}

/// A guest that uses 8 MiB and whose driver does what Linux's does.
struct Guest {
    driver: TestDriver,
    memory: TestGuest,
    balloon: Arc<Balloon>,
    given: u64,
    /// Where its statistics are, and whether it gives any.
    statistics: Option<u64>,
    oom_kills: u64,
}

impl Guest {
    fn new(tells: bool) -> Self {
        let context = BuildContext {
            reporter: Reporter::silent(),
            seccomp: SeccompMode::Enforce,
            discards: Default::default(),
        };
        let balloon = Arc::new(Balloon::new(&BalloonConfig::default(), context).unwrap());
        let memory = TestGuest::new(RAM as usize);
        let (slot, _) = memory.plug(balloon.clone());
        let mut driver = TestDriver::new(&memory, slot);
        driver.start(VERSION_1 | STATS_VQ, 64);
        assert!(eventually(|| balloon.viewer().info("b").driver));
        let statistics = tells.then(|| driver.allocate(20));
        let mut guest = Self {
            driver,
            memory,
            balloon,
            given: 0,
            statistics,
            oom_kills: 0,
        };
        guest.tell();
        guest
    }

    fn tell(&mut self) {
        let Some(buffer) = self.statistics else {
            return;
        };
        let available = RAM - 8 * MIB - self.given;
        let mut bytes = Vec::new();
        for (tag, value) in [(6_u16, available), (10, self.oom_kills)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        self.memory.poke(buffer, &bytes);
        self.driver.add(STATS, &[Buffer::Readable(buffer, 20)]);
        self.driver.kick(STATS);
    }

    /// Does what it is asked for, and tells if it is asked.
    fn work(&mut self) {
        let mut target = [0; 4];
        self.driver.device_read(0, &mut target);
        let target = u64::from(u32::from_le_bytes(target)) * PAGE;
        while self.given != target {
            let (queue, some) = if self.given < target {
                (INFLATE, (target - self.given).min(MIB))
            } else {
                (DEFLATE, (self.given - target).min(MIB))
            };
            let first = FREE
                + if queue == INFLATE {
                    self.given
                } else {
                    self.given - some
                };
            let numbers = (first / PAGE..(first + some) / PAGE).map(|n| n as u32);
            let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
            self.driver.exchange(queue, &bytes, 0);
            if queue == INFLATE {
                self.given += some;
            } else {
                self.given -= some;
            }
            let pages = (self.given / PAGE) as u32;
            self.driver.device_write(4, &pages.to_le_bytes());
        }
        if self.statistics.is_some() && self.driver.take_used(STATS).is_some() {
            self.tell();
        }
    }

    /// Has the governor look, and does what it says.
    fn look(&mut self, control: &mut Control) -> Option<Step> {
        self.work();
        let step = control.look(Driven {
            id: "b",
            balloon: &self.balloon,
            limits: Limits {
                ram: RAM,
                guaranteed: 24 * MIB,
                max: RAM,
                others_target: 0,
                others_actual: 0,
                weight: 100,
                buffer_percent: 20,
                step: 4 * MIB,
                interval_ms: 1000,
                host_free_percent: 20,
            },
            vcpu_threads: Vec::new(),
        });
        if let Some(step) = &step {
            self.balloon.set_target(step.to);
        }
        std::thread::sleep(Duration::from_millis(2));
        step
    }
}

#[test]
fn pressure_on_the_host_empties_the_guest_down_to_its_guarantee_and_distress_fills_it_again() {
    let host = Host::new();
    host.say(512 * MIB, "0.00");
    let mut control = host.control();
    let mut guest = Guest::new(true);
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None, "nothing is missing");
    }
    host.say(100 * MIB, "0.00");
    let mut steps = Vec::new();
    assert!(eventually(|| {
        steps.extend(guest.look(&mut control));
        guest.given == 40 * MIB
    }));
    assert_eq!(steps.len(), 10);
    for step in &steps {
        assert_eq!(
            (step.action(), step.reason),
            ("inflate", Reason::HostPressure)
        );
        assert_eq!(step.to - step.from, 4 * MIB);
    }
    // The host has it, and no more follows.
    assert!(eventually(
        || guest.balloon.viewer().info("b").inflated == 40 * MIB
    ));
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None);
    }
    guest.oom_kills += 1;
    let mut step = None;
    assert!(eventually(|| {
        step = guest.look(&mut control);
        step.is_some()
    }));
    let step = step.unwrap();
    assert_eq!((step.action(), step.reason), ("deflate", Reason::Distress));
    assert_eq!((step.to, step.rest_ms), (0, Some(600_000)));
    guest.work();
    assert_eq!(guest.given, 0);
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None, "it rests");
    }
    assert_eq!(control.shown().unwrap().reason, "backing-off");
    let counters = control.counters();
    assert_eq!(counters["inflate_steps"], 10);
    assert_eq!(counters["inflated_bytes"], 40 * MIB);
    assert_eq!(counters["deflate_steps"], 1);
    assert_eq!(counters["distress_releases"], 1);
    assert_eq!(counters["stalls"], 0);
    // Another boot is another guest.
    control.restart();
    assert_eq!(control.counters()["inflate_steps"], 0);
    assert!(eventually(|| guest.look(&mut control).is_some()));
}

#[test]
fn pressure_stalls_count_like_missing_memory() {
    let host = Host::new();
    host.say(800 * MIB, "0.00");
    let mut control = host.control();
    let mut guest = Guest::new(true);
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None);
    }
    host.say(800 * MIB, "12.50");
    let mut step = None;
    assert!(eventually(|| {
        step = guest.look(&mut control);
        step.is_some()
    }));
    assert_eq!(step.unwrap().reason, Reason::HostPressure);
}

#[test]
fn pressure_between_two_looks_is_acted_on_at_once_but_no_step_comes_sooner_than_the_interval() {
    const HOUR_MS: u32 = 3_600_000;
    let host = Host::new();
    host.say(800 * MIB, "0.00");
    let mut control = host.control();
    let mut guest = Guest::new(true);
    // The first answer of the guest's statistics has come.
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None);
    }
    assert!(control.due(HOUR_MS) > Instant::now());
    // The average knows nothing of it yet.
    control.pressed = Pressed::of(Scope::Host);
    assert!(control.due(HOUR_MS) <= Instant::now());
    let step = guest.look(&mut control).expect("a step");
    assert_eq!(
        (step.action(), step.reason),
        ("inflate", Reason::HostPressure)
    );
    // It is told of again: the next step is not due yet.
    control.pressed = Pressed::of(Scope::Host);
    assert!(control.due(HOUR_MS) > Instant::now() + Duration::from_secs(3000));
    assert!(control.due(1) <= Instant::now());
    // What another trigger tells meanwhile comes to it.
    control.watcher = Some(Watcher::having(Pressed::of(Scope::Cgroup)));
    control.press();
    let both = Pressed::of(Scope::Host).and(Pressed::of(Scope::Cgroup));
    assert_eq!(control.pressed, both);
    control.press();
    assert_eq!(control.pressed, both, "nothing new");
    // While nothing is driven it means nothing.
    control.rest();
    control.restart();
    assert!(!control.pressed.any());
}

#[test]
fn a_guest_that_tells_nothing_is_left_alone() {
    let host = Host::new();
    host.say(50 * MIB, "50.00");
    let mut control = host.control();
    let mut guest = Guest::new(false);
    for _ in 0..50 {
        assert_eq!(guest.look(&mut control), None);
    }
    assert_eq!(control.shown().unwrap().reason, "no-statistics");
    assert_eq!(control.counters()["held_for_statistics"], 50);
}

#[test]
fn a_host_that_can_not_be_read_is_no_reason_to_take_anything() {
    let host = Host::new();
    let mut control = host.control();
    let mut guest = Guest::new(true);
    for _ in 0..50 {
        assert_eq!(guest.look(&mut control), None);
    }
    assert_eq!(control.shown().unwrap().reason, "steady");
}

/// Others that claim as much as this VM may, and what they were told.
struct Others(Arc<std::sync::Mutex<Own>>);

impl Coordinator for Others {
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own) {
        let told = *self.0.lock().unwrap();
        *self.0.lock().unwrap() = decide(&Neighbours {
            vms: 1,
            claims: told.claim,
            pending: 0,
        });
    }
}

/// Others that keep the lock for a while: when they gave it back.
struct Slow(Arc<std::sync::Mutex<Option<Instant>>>);

impl Coordinator for Slow {
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own) {
        std::thread::sleep(Duration::from_millis(20));
        decide(&Neighbours::default());
        *self.0.lock().unwrap() = Some(Instant::now());
    }
}

#[test]
fn the_time_that_others_take_is_not_taken_from_the_interval() {
    let host = Host::new();
    host.say(512 * MIB, "0.00");
    let mut control = host.control();
    let returned = Arc::default();
    control.coordinator = Box::new(Slow(Arc::clone(&returned)));
    let mut guest = Guest::new(true);
    guest.look(&mut control);
    let returned = returned.lock().unwrap().unwrap();
    assert!(control.due(0) >= returned);
}

/// Others that have just told that there are none: how often they had to wait, and how often they
/// were told something without that.
#[derive(Default)]
struct Heard {
    waited: u32,
    told: u32,
}

impl Coordinator for Arc<std::sync::Mutex<Heard>> {
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own) {
        self.lock().unwrap().waited += 1;
        decide(&Neighbours::default());
    }

    fn recent(&self) -> Option<Neighbours> {
        Some(Neighbours::default())
    }

    fn tell(&mut self, _: Own) {
        self.lock().unwrap().told += 1;
    }
}

#[test]
fn a_look_that_comes_to_nothing_keeps_nobody_waiting_and_a_step_does() {
    let host = Host::new();
    host.say(512 * MIB, "0.00");
    let mut control = host.control();
    let heard = Arc::new(std::sync::Mutex::new(Heard::default()));
    control.coordinator = Box::new(Arc::clone(&heard));
    let mut guest = Guest::new(true);
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None, "there is no pressure");
    }
    assert_eq!(heard.lock().unwrap().waited, 0);
    assert_eq!(heard.lock().unwrap().told, 20);
    host.say(100 * MIB, "0.00");
    assert!(eventually(|| guest.look(&mut control).is_some()));
    assert_eq!(heard.lock().unwrap().waited, 1);
}

#[test]
fn the_others_are_heard_and_told() {
    let host = Host::new();
    host.say(250 * MIB, "0.00");
    let mut control = host.control();
    let told = Arc::default();
    control.coordinator = Box::new(Others(Arc::clone(&told)));
    let mut guest = Guest::new(true);
    for _ in 0..20 {
        assert_eq!(guest.look(&mut control), None, "there is no pressure yet");
    }
    let claim = told.lock().unwrap().claim;
    assert!(claim > 0);
    host.say(200 * MIB, "0.00");
    let mut step = None;
    assert!(eventually(|| {
        step = guest.look(&mut control);
        step.is_some()
    }));
    // Its half of 56 MiB is more than a step.
    assert_eq!(step.unwrap().to, 4 * MIB);
    host.say(252 * MIB, "0.00");
    let mut step = None;
    assert!(eventually(|| {
        step = guest.look(&mut control);
        step.is_some()
    }));
    // Of the 4 MiB that are missing, about half: what it claims changes as it gives.
    let step = step.unwrap();
    assert!((MIB..3 * MIB).contains(&(step.to - step.from)), "{step:?}");
    // It rests: nobody waits for it to give, and what its guest may touch is still spoken for.
    let own = |claim| Own { claim, pending: 3 };
    control.told = Some(own(9));
    *told.lock().unwrap() = own(9);
    control.rest();
    assert_eq!(*told.lock().unwrap(), own(0));
    // Once; and when the machine is off there is nobody to tell of.
    *told.lock().unwrap() = own(9);
    control.rest();
    assert_eq!(*told.lock().unwrap(), own(9));
    guest.look(&mut control);
    control.gone();
    *told.lock().unwrap() = own(9);
    control.rest();
    assert_eq!(*told.lock().unwrap(), own(9));
}
