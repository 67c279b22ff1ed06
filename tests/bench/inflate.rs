//! How fast a guest of 2 GiB gives half of its memory and takes it back: ballast in turn with QEMU
//! (q35, its own virtio-balloon), which runs the same kernel and initramfs.
//!
//! The guest has touched its memory before, so that there is something to give. A way has ended
//! when the guest says so, which both programs are asked for in the same rhythm; and memory counts
//! as given only when the process has become that much smaller.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guest::{CMDLINE, Killed, created, in_turn};
use crate::support::agent::Agent;
use crate::support::{PATIENCE, eventually};
use crate::table::{Row, Samples};
use crate::{Options, memory};

const RAM_BYTES: u64 = 2 << 30;
/// What is given.
const SIZE: u64 = 1 << 30;
/// Between two questions how far it is.
const RHYTHM: Duration = Duration::from_millis(20);
/// So much faster than QEMU it should be.
const AIM: f64 = 1.5;

/// Ways there and back.
#[derive(Default)]
struct Ways {
    inflate: Samples,
    deflate: Samples,
}

/// Takes them all.
pub fn measure(options: &Options) -> Vec<Row> {
    let (ours, theirs): (Ways, Ways) = in_turn(options, "balloon", with_ballast, with_qemu);
    vec![
        row(
            "1 GiB of a 2 GiB guest → host",
            &ours.inflate,
            &theirs.inflate,
        ),
        row("and back (deflated)", &ours.deflate, &theirs.deflate),
    ]
}

fn row(figure: &'static str, ours: &Samples, theirs: &Samples) -> Row {
    let show = |samples: &Samples| {
        let gib = SIZE as f64 / (1 << 30) as f64;
        format!("{}: {:.2} GiB/s", samples.show("s"), gib / samples.median())
    };
    let row = Row::report(figure, show(ours));
    if theirs.is_empty() {
        return row;
    }
    let ratio = theirs.median() / ours.median();
    Row {
        aim: format!("≥ {AIM}× QEMU: {ratio:.1}×"),
        met: Some(ratio >= AIM),
        ..row
    }
    .qemu(format!("{} (q35)", show(theirs)))
}

fn with_ballast(options: &Options, ways: &mut Ways) {
    let more = json!({ "balloons": [{ "id": "balloon", "size": 0 }] });
    let (mut started, agent) = created(options, RAM_BYTES, "initramfs.cpio", more);
    started.client.put("vm.boot");
    let (mut ballast, mut client) = (started.ballast, started.client);
    let pid = ballast.pid();
    there_and_back(&agent, pid, ways, |target| {
        if let Some(size) = target {
            let ask = json!({ "id": "balloon", "desired_size": size });
            client.put_json("vm.resize-balloon", &ask);
        }
        let info = client.get("vm.info");
        RAM_BYTES - info["memory_actual_size"].as_u64().expect("a size")
    });
    client.put("vmm.shutdown");
    ballast.wait_for_clean_end();
}

fn with_qemu(qemu: &Path, options: &Options, ways: &mut Ways) {
    let folder = tempfile::tempdir().expect("a folder");
    let (serial, control) = (folder.path().join("serial"), folder.path().join("qmp"));
    let child = Command::new(qemu)
        .args(["-M", "q35,accel=kvm", "-cpu", "host", "-smp", "1"])
        .args(["-m", "2G", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot"])
        .args(["-device", "virtio-balloon-pci", "-serial"])
        .arg(format!("unix:{},server=on,wait=off", serial.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", control.display()))
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
    let mut control = Qmp::connect(&control);
    there_and_back(&agent, child.0.id(), ways, |target| {
        if let Some(size) = target {
            control.ask("balloon", &json!({ "value": RAM_BYTES - size }));
        }
        let info = control.ask("query-balloon", &json!({}));
        RAM_BYTES - info["actual"].as_u64().expect("a size")
    });
}

/// `balloon` sets a target, if it is given one, and says how much the guest has given.
fn there_and_back(
    agent: &Agent,
    pid: u32,
    ways: &mut Ways,
    mut balloon: impl FnMut(Option<u64>) -> u64,
) {
    agent.wait_ready();
    agent.ok("mkdir -p /fill && mount -t tmpfs -o size=95% fill /fill");
    let free = "awk '/MemFree/ {print int($2 / 1024) - 100}' /proc/meminfo";
    agent.ok(&format!(
        "dd if=/dev/zero of=/fill/a bs=1M count=$({free}) 2>/dev/null; umount /fill"
    ));
    let full = memory::of(pid).rss;
    assert!(full > RAM_BYTES / 10 * 8, "the guest touched {full} bytes");
    let mut go = |size: u64| {
        let begun = Instant::now();
        let mut actual = balloon(Some(size));
        while actual != size {
            assert!(begun.elapsed() < PATIENCE, "it stays at {actual}");
            std::thread::sleep(RHYTHM);
            actual = balloon(None);
        }
        begun
    };
    let begun = go(SIZE);
    eventually("the host has its memory", || {
        (memory::of(pid).rss <= full - SIZE / 100 * 95).then_some(())
    });
    ways.inflate.push(begun.elapsed().as_secs_f64());
    let begun = go(0);
    ways.deflate.push(begun.elapsed().as_secs_f64());
}

/// QEMU's control socket.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Self {
        let stream = eventually("QEMU listens", || UnixStream::connect(path).ok());
        let mut qmp = Self(BufReader::new(stream));
        qmp.line();
        qmp.ask("qmp_capabilities", &json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Its answer; events in between are left out.
    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        let stream = self.0.get_mut();
        writeln!(stream, "{request}").expect("QEMU listens");
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }
}
