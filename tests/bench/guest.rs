//! Figures with a real guest: on hardware KVM, or in the lab host, where only the ratios between
//! programs and within a run mean anything. QEMU's microvm boots the same kernel and initramfs
//! beside ballast, in turn with it.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::{Ballast, Console, Memory, Process};
use crate::table::{Row, Samples};
use crate::{Failure, MB, Options, fail};

const RAM_BYTES: u64 = 256 << 20;
/// Only the kernel's notices go to the serial line: enough to see the first output, not enough to
/// measure the serial port.
const CMDLINE: &str = "console=ttyS0 loglevel=6 panic=-1 mitigations=off";
/// What the test guest's init prints last, after a line with the guest's own clock.
const READY: &str = "BALLAST-GUEST-READY\n";
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// One boot, as seen from outside and by the guest's own clock.
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
    rss: Samples,
    pss: Samples,
}

impl Boots {
    fn push(&mut self, ready: Duration, beyond: Memory) {
        self.ready_ms.push_ms(ready);
        self.rss.push(beyond.rss as f64 / MB);
        self.pss.push(beyond.pss as f64 / MB);
    }
}

/// Boots of ballast, in parts.
#[derive(Default)]
struct Parts {
    request_ms: Samples,
    first_output_ms: Samples,
    guest_first_output_ms: Samples,
    first_output_percent: Samples,
    ready_ms: Samples,
    guest_ready_ms: Samples,
    ready_percent: Samples,
}

/// Takes them all.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    let mut ours = Boots::default();
    let mut parts = Parts::default();
    let mut theirs = Boots::default();
    for run in 1..=options.runs {
        eprintln!("bench: boot {run} of {}", options.runs);
        boot_ballast(options, &mut ours, &mut parts)?;
        if options.qemu.is_some() {
            boot_qemu(options, &mut theirs)?;
        }
    }
    eprintln!("bench: hot-plug");
    let (visible, round_trip) = hot_add(options)?;
    let beside = |samples: &Samples, unit: &str| {
        if options.qemu.is_some() {
            samples.show(unit)
        } else {
            String::new()
        }
    };
    Ok(vec![
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
        within_five_percent(
            "`vm.boot` answered → first guest output",
            &parts.first_output_ms,
            &parts.guest_first_output_ms,
            &parts.first_output_percent,
        ),
        within_five_percent(
            "`vm.boot` answered → guest init ready",
            &parts.ready_ms,
            &parts.guest_ready_ms,
            &parts.ready_percent,
        ),
        Row::report("process start → guest init ready", ours.ready_ms.show("ms"))
            .qemu(beside(&theirs.ready_ms, "ms")),
        Row::report(
            "`vm.add-disk` answered → block device visible in the guest",
            format!(
                "{}, of which the serial agent takes {}",
                visible.show("ms"),
                round_trip.show("ms")
            ),
        ),
    ])
}

fn within_five_percent(
    figure: &'static str,
    outside: &Samples,
    guest: &Samples,
    percent: &Samples,
) -> Row {
    Row {
        aim: "guest's own time + 5 %".to_owned(),
        met: Some(percent.median() <= 5.0),
        ..Row::report(
            figure,
            format!(
                "{}; by the guest's clock {}: {:+.1} %",
                outside.show("ms"),
                guest.show("ms"),
                percent.median()
            ),
        )
    }
}

fn boot_ballast(options: &Options, boots: &mut Boots, parts: &mut Parts) -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let mut ballast = Ballast::start(&options.ballast, directory.path())?;
    let mut console = ballast.process.console()?;
    ballast.client.put("vm.create", &vm_config(options))?;
    let sent = Instant::now();
    ballast.client.put("vm.boot", &Value::Null)?;
    let answered = Instant::now();
    let boot = watch_boot(&mut console)?;
    boots.push(
        boot.ready - ballast.process.started,
        ballast.process.memory_beyond(RAM_BYTES)?,
    );
    parts.request_ms.push_ms(answered - sent);
    // The first output may even come before the answer has been read.
    let first_output = boot.first_output.saturating_duration_since(answered);
    let ready = boot.ready - answered;
    let percent = |outside: Duration, guest: Duration| {
        (outside.as_secs_f64() / guest.as_secs_f64() - 1.0) * 100.0
    };
    parts.first_output_ms.push_ms(first_output);
    parts.guest_first_output_ms.push_ms(boot.guest_first_output);
    parts
        .first_output_percent
        .push(percent(first_output, boot.guest_first_output));
    parts.ready_ms.push_ms(ready);
    parts.guest_ready_ms.push_ms(boot.guest_ready);
    parts.ready_percent.push(percent(ready, boot.guest_ready));
    ballast.shutdown()
}

fn vm_config(options: &Options) -> Value {
    json!({
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": RAM_BYTES },
        "payload": {
            "kernel": options.guest_file("vmlinux"),
            "initramfs": options.guest_file("initramfs.cpio"),
            "cmdline": CMDLINE,
        },
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
    })
}

fn boot_qemu(options: &Options, boots: &mut Boots) -> Result<(), Failure> {
    let Some(qemu) = &options.qemu else {
        return Ok(());
    };
    let mut process = Process::start(
        Command::new(qemu)
            .args(["-M", "microvm,accel=kvm,isa-serial=on", "-cpu", "host"])
            .args(["-smp", "1", "-m", "256M", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(options.guest_file("vmlinux"))
            .arg("-initrd")
            .arg(options.guest_file("initramfs.cpio"))
            .args(["-append", CMDLINE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    )?;
    let mut console = process.console()?;
    let boot = watch_boot(&mut console)?;
    boots.push(
        boot.ready - process.started,
        process.memory_beyond(RAM_BYTES)?,
    );
    Ok(())
}

/// Follows a boot on the serial line until the guest is ready.
fn watch_boot(console: &mut Console) -> Result<Boot, Failure> {
    let (ready, output) = console.wait_for(READY, BOOT_TIMEOUT)?;
    // /proc/uptime as the guest's init printed it, the moment before.
    let Some(guest_ready) = seconds(after(&output, "\nballast: up ")) else {
        return fail(format!("the guest's init did not say its clock: {output}"));
    };
    let log = run(console, "dmesg")?;
    // "[    0.123456] printk: console [ttyS0] enabled": from then on there is output.
    let Some(guest_first_output) = log
        .lines()
        .find(|line| line.contains("console [ttyS0] enabled"))
        .and_then(|line| seconds(after(line, "[")))
    else {
        return fail("the guest's log does not say when the console was enabled");
    };
    let Some(first_output) = console.first_output else {
        return fail("the guest never printed anything");
    };
    Ok(Boot {
        first_output,
        ready,
        guest_first_output,
        guest_ready,
    })
}

fn after<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    text.split_once(mark).map(|(_, rest)| rest)
}

/// The number of seconds at the start of a text.
fn seconds(text: Option<&str>) -> Option<Duration> {
    let text = text?.trim_start();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    text.get(..end)?
        .parse()
        .ok()
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
}

/// Runs a command by the guest's serial agent (scripts/lib/guest-agent) and returns its output.
fn run(console: &mut Console, command: &str) -> Result<String, Failure> {
    start_run(console, command)?;
    finish_run(console).map(|(_, output)| output)
}

fn start_run(console: &mut Console, command: &str) -> Result<(), Failure> {
    console
        .stdin
        .write_all(format!("RUN bench {command}\n").as_bytes())?;
    Ok(console.stdin.flush()?)
}

fn finish_run(console: &mut Console) -> Result<(Instant, String), Failure> {
    console.wait_for("<<<bench\n", BOOT_TIMEOUT)?;
    let (when, output) = console.wait_for("\n>>>bench ", BOOT_TIMEOUT)?;
    let (_, status) = console.wait_for("\n", BOOT_TIMEOUT)?;
    if status.trim() != "0" {
        return fail(format!("in the guest: status {status}: {output}"));
    }
    Ok((when, output))
}

/// Plugs a disk in and out of one guest: from the answer until a loop in the guest has seen it,
/// and what the way through the agent takes by itself.
fn hot_add(options: &Options) -> Result<(Samples, Samples), Failure> {
    let directory = tempfile::tempdir()?;
    let disk: PathBuf = directory.path().join("disk.raw");
    std::fs::File::create(&disk)?.set_len(16 << 20)?;
    let mut ballast = Ballast::start(&options.ballast, directory.path())?;
    let mut console = ballast.process.console()?;
    ballast.client.put("vm.create", &vm_config(options))?;
    ballast.client.put("vm.boot", &Value::Null)?;
    watch_boot(&mut console)?;
    let (mut visible, mut round_trip) = (Samples::default(), Samples::default());
    for _ in 0..options.runs {
        let start = Instant::now();
        run(&mut console, "until true; do :; done")?;
        round_trip.push_ms(start.elapsed());
        start_run(&mut console, "until [ -b /dev/vda ]; do usleep 1000; done")?;
        // The loop runs before the disk comes.
        thread::sleep(Duration::from_millis(300));
        ballast
            .client
            .put("vm.add-disk", &json!({ "id": "bench", "path": disk }))?;
        let answered = Instant::now();
        let (seen, _) = finish_run(&mut console)?;
        visible.push_ms(seen.saturating_duration_since(answered));
        ballast
            .client
            .put("vm.remove-device", &json!({ "id": "bench" }))?;
        wait_until_gone(&mut ballast)?;
    }
    ballast.shutdown()?;
    Ok((visible, round_trip))
}

fn wait_until_gone(ballast: &mut Ballast) -> Result<(), Failure> {
    let start = Instant::now();
    while ballast.client.get("vm.info")?["device_tree"]
        .get("bench")
        .is_some()
    {
        if start.elapsed() > BOOT_TIMEOUT {
            return fail("the guest did not eject the disk");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
