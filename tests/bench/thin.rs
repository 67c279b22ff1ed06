//! How fast a guest's thin disk is: ballast in turn with QEMU (q35, virtio-blk-pci,
//! cache=writeback, aio=io_uring), which runs the same kernel and initramfs on an image made by the
//! same tool. Both through the host's page cache: the lab host's file system has no O_DIRECT.
//!
//! fio asks for 4 KiB at a depth of 16, in random places: writes to an empty image first, then
//! reads of what it has written.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::Options;
use crate::guest::{CMDLINE, Killed, created, in_turn};
use crate::support::agent::Agent;
use crate::table::{Row, Samples};

const RAM_BYTES: u64 = 768 << 20;
/// Of the disk.
const SIZE: &str = "1G";
/// Where fio goes, and how long it may.
const FIO: &str = "fio --name=j --filename=/dev/vda --direct=1 --ioengine=libaio --bs=4k \
                   --iodepth=16 --size=512M --runtime=15 --time_based=0 --randseed=7 \
                   --norandommap=0 --output-format=terse --terse-version=3";
/// Fields of a terse line of version 3, as `cut` counts: requests a second.
const READS: u32 = 8;
const WRITES: u32 = 49;

/// Requests a second.
#[derive(Default)]
struct Rates {
    writes: Samples,
    reads: Samples,
}

/// Takes them all.
pub fn measure(options: &Options) -> Vec<Row> {
    let (ours, theirs): (Rates, Rates) = in_turn(options, "thin disk", with_ballast, with_qemu);
    vec![
        row(
            "4 KiB writes of a guest into an empty qcow2 image, depth 16",
            &ours.writes,
            &theirs.writes,
        ),
        row(
            "4 KiB reads of what it has written, depth 16",
            &ours.reads,
            &theirs.reads,
        ),
    ]
}

fn row(figure: &'static str, ours: &Samples, theirs: &Samples) -> Row {
    let row = Row::report(figure, ours.show("/s"));
    if theirs.is_empty() {
        return row;
    }
    Row {
        aim: format!("report: {:.2}× QEMU", ours.median() / theirs.median()),
        ..row
    }
    .qemu(format!("{} (q35)", theirs.show("/s")))
}

/// An empty image.
fn image(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("thin.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(SIZE)
        .status();
    assert!(made.expect("qemu-img").success(), "an image");
    path
}

fn with_ballast(options: &Options, rates: &mut Rates) {
    let folder = tempfile::tempdir_in(&options.guest_dir).expect("a folder");
    let disks = json!([{ "path": image(folder.path()), "image_type": "Qcow2" }]);
    let more = json!({ "disks": disks });
    let (mut started, agent) = created(options, RAM_BYTES, "initramfs-fio.cpio", more);
    started.client.put("vm.boot");
    write_and_read(&agent, rates);
    started.client.put("vmm.shutdown");
    started.ballast.wait_for_clean_end();
}

fn with_qemu(qemu: &Path, options: &Options, rates: &mut Rates) {
    let folder = tempfile::tempdir_in(&options.guest_dir).expect("a folder");
    let serial = folder.path().join("serial");
    let _child = Command::new(qemu)
        .args(["-M", "q35,accel=kvm", "-cpu", "host", "-smp", "1"])
        .args(["-m", &(RAM_BYTES >> 20).to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial"])
        .arg(format!("unix:{},server=on,wait=off", serial.display()))
        .args(["-device", "virtio-blk-pci,drive=d", "-drive"])
        .arg(format!(
            "if=none,id=d,format=qcow2,cache=writeback,aio=io_uring,file={}",
            image(folder.path()).display()
        ))
        .arg("-kernel")
        .arg(options.guest_file("vmlinux"))
        .arg("-initrd")
        .arg(options.guest_file("initramfs-fio.cpio"))
        .args(["-append", CMDLINE])
        .stdin(Stdio::null())
        .spawn()
        .map(Killed)
        .expect("start QEMU");
    write_and_read(&Agent::on_socket(&serial), rates);
}

fn write_and_read(agent: &Agent, rates: &mut Rates) {
    agent.wait_ready();
    let rate = |way: &str, field: u32| {
        agent.number(&format!(
            "{FIO} --rw={way} 2>/dev/null | grep '^3;' | cut -d';' -f{field}"
        )) as f64
    };
    rates.writes.push(rate("randwrite", WRITES));
    rates.reads.push(rate("randread", READS));
}
