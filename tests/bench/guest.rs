//! Figures with a real guest: on hardware KVM, or in the lab host, where only the ratios between
//! programs and within a run mean anything. QEMU's microvm boots the same kernel and initramfs
//! beside ballast, in turn with it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::host::{self, Started};
use crate::memory::Memory;
use crate::support::agent::Agent;
use crate::support::artifacts::empty_image;
use crate::table::{Row, Samples};
use crate::{MB, Options, memory};

const RAM_BYTES: u64 = 256 << 20;
/// Only the kernel's notices go to the serial line: enough to see the first output, not enough to
/// measure the serial port. (With XSAVE, the lab's processor model makes the kernel print a long
/// warning.)
pub const CMDLINE: &str = "console=ttyS0 loglevel=6 noxsave panic=-1 mitigations=off";

/// One boot: as seen from outside, and by the guest's own clock.
struct Boot {
    first_output: Instant,
    ready: Instant,
    guest_first_output: Duration,
    guest_ready: Duration,
}

/// Boots of one program.
#[derive(Default)]
struct Boots {
    /// From process start.
    ready_ms: Samples,
    /// From the first output to the last.
    output_ms: Samples,
    rss: Samples,
    pss: Samples,
}

impl Boots {
    fn push(&mut self, started: Instant, boot: &Boot, beyond: Memory) {
        self.ready_ms.push_ms(boot.ready - started);
        self.output_ms.push_ms(boot.ready - boot.first_output);
        self.rss.push(beyond.rss as f64 / MB);
        self.pss.push(beyond.pss as f64 / MB);
    }
}

/// A stretch of a boot, in milliseconds from outside and by the guest's clock.
#[derive(Default)]
struct Stretch {
    outside: Samples,
    guest: Samples,
    percent_more: Samples,
}

impl Stretch {
    fn push(&mut self, outside: Duration, guest: Duration) {
        self.outside.push_ms(outside);
        self.guest.push_ms(guest);
        let ratio = outside.as_secs_f64() / guest.as_secs_f64();
        self.percent_more.push((ratio - 1.0) * 100.0);
    }

    fn row(&self, figure: &'static str) -> Row {
        let percent = self.percent_more.median();
        Row {
            aim: "guest's own time + 5 %".to_owned(),
            met: Some(percent <= 5.0),
            ..Row::report(
                figure,
                format!(
                    "{}; by the guest's clock {}: {percent:+.1} %",
                    self.outside.show("ms"),
                    self.guest.show("ms")
                ),
            )
        }
    }
}

/// Boots of ballast, in parts.
#[derive(Default)]
struct Parts {
    request_ms: Samples,
    first_output: Stretch,
    ready: Stretch,
}

/// Takes them all.
pub fn measure(options: &Options) -> Vec<Row> {
    let mut ours = Boots::default();
    let mut parts = Parts::default();
    let mut theirs = Boots::default();
    for run in 1..=options.runs {
        eprintln!("bench: boot {run} of {}", options.runs);
        boot_ballast(options, &mut ours, &mut parts);
        if let Some(qemu) = &options.qemu {
            boot_qemu(qemu, options, &mut theirs);
        }
    }
    eprintln!("bench: hot-plug");
    let (visible, agent) = hot_add(options);
    let beside = |samples: &Samples, unit: &str| match options.qemu {
        Some(_) => samples.show(unit),
        None => String::new(),
    };
    vec![
        Row::at_most(
            "memory beyond guest RAM (RSS), 1 vCPU 256 MiB guest booted",
            &ours.rss,
            5.0,
            "MB",
        )
        .qemu(beside(&theirs.rss, "MB"))
        .cloud_hypervisor("6.6 MB"),
        Row::report("the same, shared pages divided (PSS)", ours.pss.show("MB"))
            .qemu(beside(&theirs.pss, "MB")),
        Row::report("`vm.boot` sent → answered", parts.request_ms.show("ms")),
        parts
            .first_output
            .row("`vm.boot` answered → first guest output"),
        parts.ready.row("`vm.boot` answered → guest init ready"),
        Row::report(
            "first guest output → guest init ready",
            ours.output_ms.show("ms"),
        )
        .qemu(beside(&theirs.output_ms, "ms")),
        Row::report("process start → guest init ready", ours.ready_ms.show("ms"))
            .qemu(beside(&theirs.ready_ms, "ms")),
        Row::report(
            "`vm.add-disk` answered → block device visible in the guest",
            format!(
                "{}, of which the serial agent takes {}",
                visible.show("ms"),
                agent.show("ms")
            ),
        ),
    ]
}

/// Measures ballast and QEMU in turn, as often as is wanted; the figures of either.
pub fn in_turn<T: Default>(
    options: &Options,
    what: &str,
    with_ballast: impl Fn(&Options, &mut T),
    with_qemu: impl Fn(&Path, &Options, &mut T),
) -> (T, T) {
    let (mut ours, mut theirs) = (T::default(), T::default());
    for run in 1..=options.runs {
        eprintln!("bench: {what} {run} of {}", options.runs);
        with_ballast(options, &mut ours);
        if let Some(qemu) = &options.qemu {
            with_qemu(qemu, options, &mut theirs);
        }
    }
    (ours, theirs)
}

/// A process with a VM created, of one vCPU and so much RAM, and the guest's serial line. `more` is
/// what its configuration has beside.
pub fn created(options: &Options, ram: u64, initramfs: &str, more: Value) -> (Started, Agent) {
    let mut started = host::start(&options.ballast);
    let serial = started.ballast.path("serial");
    let mut config = json!({
        "cpus": { "boot_vcpus": 1 },
        "memory": { "size": ram },
        "payload": {
            "kernel": options.guest_file("vmlinux"),
            "initramfs": options.guest_file(initramfs),
            "cmdline": CMDLINE,
        },
        "serial": { "mode": "Socket", "socket": serial },
    });
    if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
    started.client.put_json("vm.create", &config);
    let agent = Agent::on_socket(&serial);
    (started, agent)
}

/// The VM that boots are measured with.
fn small(options: &Options) -> (Started, Agent) {
    created(options, RAM_BYTES, "initramfs.cpio", json!({}))
}

fn boot_ballast(options: &Options, boots: &mut Boots, parts: &mut Parts) {
    let (started, agent) = small(options);
    let (mut ballast, mut client) = (started.ballast, started.client);
    let sent = Instant::now();
    client.put("vm.boot");
    let answered = Instant::now();
    let boot = watch_boot(&agent);
    boots.push(
        started.at,
        &boot,
        memory::beyond_ram(ballast.pid(), RAM_BYTES),
    );
    parts.request_ms.push_ms(answered - sent);
    // The first output may even come before the answer has been read.
    parts.first_output.push(
        boot.first_output.saturating_duration_since(answered),
        boot.guest_first_output,
    );
    parts.ready.push(boot.ready - answered, boot.guest_ready);
    client.put("vmm.shutdown");
    ballast.wait_for_clean_end();
}

fn boot_qemu(qemu: &Path, options: &Options, boots: &mut Boots) {
    let folder = tempfile::tempdir().expect("a folder");
    let serial = folder.path().join("serial");
    let started = Instant::now();
    let child = Command::new(qemu)
        .args(["-M", "microvm,accel=kvm,isa-serial=on", "-cpu", "host"])
        .args(["-smp", "1", "-m", "256M", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot", "-serial"])
        .arg(format!("unix:{},server=on,wait=off", serial.display()))
        .arg("-kernel")
        .arg(options.guest_file("vmlinux"))
        .arg("-initrd")
        .arg(options.guest_file("initramfs.cpio"))
        .args(["-append", CMDLINE])
        .stdin(Stdio::null())
        .spawn()
        .map(Killed)
        .expect("start QEMU");
    let agent = Agent::on_socket(&serial);
    let boot = watch_boot(&agent);
    boots.push(started, &boot, memory::beyond_ram(child.0.id(), RAM_BYTES));
}

/// A child process that ends with its value.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Follows a boot on the serial line until the guest is ready.
fn watch_boot(agent: &Agent) -> Boot {
    agent.wait_ready();
    let ready = Instant::now();
    let log = agent.ok("dmesg");
    // "[    0.123456] printk: console [ttyS0] enabled": from then on there is output.
    let guest_time = |what: &str| {
        let line = log.lines().find(|line| line.contains(what));
        line.and_then(seconds)
            .unwrap_or_else(|| panic!("the guest's log does not tell of `{what}`"))
    };
    Boot {
        first_output: agent.first_byte().expect("the guest printed something"),
        ready,
        guest_first_output: guest_time("console [ttyS0] enabled"),
        guest_ready: ready_after(&log).expect("the guest's init tells when it was ready"),
    }
}

/// The guest's time since its boot, as its init has put it into the kernel's log.
fn ready_after(log: &str) -> Option<Duration> {
    let (_, rest) = log.split_once("ballast: ready after ")?;
    let (seconds, _) = rest.split_once(' ')?;
    Duration::try_from_secs_f64(seconds.parse().ok()?).ok()
}

/// The time at the start of a line of the kernel's log.
fn seconds(line: &str) -> Option<Duration> {
    let (time, _) = line.strip_prefix('[')?.split_once(']')?;
    Duration::try_from_secs_f64(time.trim().parse().ok()?).ok()
}

/// Plugs a disk into one guest and out again: from the answer until a loop in the guest has seen
/// it, and what the way through the serial agent takes by itself.
fn hot_add(options: &Options) -> (Samples, Samples) {
    let (started, agent) = small(options);
    let (mut ballast, mut client) = (started.ballast, started.client);
    let disk = empty_image(ballast.dir(), "disk.raw", 16 << 20);
    let events = ballast.events();
    client.put("vm.boot");
    agent.wait_ready();
    let (mut visible, mut alone) = (Samples::default(), Samples::default());
    for _ in 0..options.runs {
        let start = Instant::now();
        agent.ok("until true; do :; done");
        alone.push_ms(start.elapsed());
        let look = agent.start("until [ -b /dev/vda ]; do usleep 1000; done");
        look.wait_begun();
        // The loop runs before the disk comes.
        thread::sleep(Duration::from_millis(200));
        let before = events.mark();
        client.put_json("vm.add-disk", &json!({ "id": "bench", "path": disk }));
        let answered = Instant::now();
        let (status, output) = look.finish();
        visible.push_ms(answered.elapsed());
        assert_eq!(status, 0, "{output}");
        client.put_json("vm.remove-device", &json!({ "id": "bench" }));
        events.wait_after(before, "device-removed", |_: &Value| true);
    }
    client.put("vmm.shutdown");
    ballast.wait_for_clean_end();
    (visible, alone)
}
