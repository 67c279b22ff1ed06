//! Thin disks whose process is killed, or whose host runs full, while a guest writes to them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::support::artifacts::{MIB, filled_image, guest};
use crate::support::ballast::binary;
use crate::support::events::Mark;
use crate::support::eventually;
use crate::vm::Vm;

/// The images that are written to, and what is below or inside each.
const IMAGES: [&str; 4] = ["plain", "compressed", "snapshot", "subclusters"];
/// KiB of a region that is written in one go, each at a multiple of this.
const REGION: u64 = 80;

fn shell(folder: &Path, command: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", command])
        .current_dir(folder)
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{command}: {out}{err}");
    out.trim().to_owned()
}

/// What the last one to write each region said of it: its length in KiB and its sum, or that it had
/// begun and did not end. By image and region.
type Promised = BTreeMap<(usize, u64), Option<(u64, String)>>;

fn read_promises(transcript: &str, promised: &mut Promised) {
    for line in transcript.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<u64>().unwrap();
        match words[..] {
            ["NEXT", image, region, "."] => {
                promised.insert((number(image) as usize, number(region)), None);
            }
            ["KEPT", image, region, len, sum, "."] => {
                let key = (number(image) as usize, number(region));
                promised.insert(key, Some((number(len), sum.to_owned())));
            }
            _ => {}
        }
    }
}

/// Has qemu-img look at the images, and compares what is in them with what was promised.
fn judge(folder: &Path, promised: &Promised) {
    for (number, image) in IMAGES.iter().enumerate() {
        // The kernel keeps a killed process's lock until it has taken its rings down.
        eventually("the image is free", || {
            let opened = Command::new(binary())
                .args(["disk", "io", "-f", "qcow2", "--backing-files"])
                .args(["-c", "read 0 512"])
                .arg(folder.join(format!("{image}.qcow2")))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&opened.stderr).into_owned();
            match opened.status.success() {
                true => Some(()),
                false if said.contains("in use") => None,
                false => panic!("{image}: {said}"),
            }
        });
        // 3: there are leaks, and nothing else.
        shell(
            folder,
            &format!("qemu-img check -f qcow2 {image}.qcow2 || test $? = 3"),
        );
        shell(
            folder,
            &format!("qemu-img convert -f qcow2 -O raw {image}.qcow2 now.raw"),
        );
        for ((_, region), kept) in promised.iter().filter(|((of, _), _)| *of == number) {
            let Some((len, sum)) = kept else { continue };
            let found = shell(
                folder,
                &format!(
                    "dd if=now.raw bs=1k skip={} count={len} 2>/dev/null | sha256sum | cut -d' ' -f1",
                    region * REGION
                ),
            );
            assert_eq!(&found, sum, "{image}: region {region}");
        }
    }
}

#[test]
fn what_was_flushed_to_thin_disks_survives_the_death_of_the_process() {
    let kills: u64 = std::env::var("BALLAST_KILLS").map_or(2, |count| count.parse().unwrap());
    let folder = tempfile::Builder::new().tempdir_in("/tmp").unwrap();
    let folder = folder.path();
    filled_image(folder, "base.raw", 16 * MIB);
    shell(
        folder,
        "qemu-img convert -c -f raw -O qcow2 base.raw base.qcow2
         qemu-img create -q -f qcow2 plain.qcow2 32M
         qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 compressed.qcow2 32M
         qemu-img convert -f raw -O qcow2 base.raw snapshot.qcow2
         qemu-img resize -q -f qcow2 snapshot.qcow2 32M
         qemu-img snapshot -c one snapshot.qcow2
         qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k -b base.raw -F raw \
             subclusters.qcow2 32M",
    );
    let constant = "qemu-img convert -f qcow2 -l one -O raw snapshot.qcow2 one.raw
        sha256sum base.raw base.qcow2 one.raw";
    let before = shell(folder, constant);
    let mut promised = Promised::new();
    for kill in 0..kills {
        let mut vm = Vm::boot(|config, _| {
            config["payload"]["initramfs"] = json!(guest("initramfs-tools.cpio"));
            config["disks"] = IMAGES
                .iter()
                .map(|image| {
                    json!({
                        "id": image, "path": folder.join(format!("{image}.qcow2")),
                        "image_type": "Qcow2", "backing_files": true, "serial": image,
                    })
                })
                .collect();
        });
        for (number, image) in IMAGES.iter().enumerate() {
            let disk = vm.disk_in_guest(image);
            vm.agent.ok(&format!("ln -s {disk} /disk{number}"));
        }
        vm.agent
            .ok("dd if=/dev/urandom of=/noise bs=1k count=1024 2>/dev/null");
        // Regions are written again and again, in no order; lengths are of no whole cluster. What
        // comes next is told a round ahead, for a serial line is slower than a disk.
        let write = format!(
            "region() {{ r=$((($1 * 37 + $2 * 11) % 61 * 6)); }}; \
             next() {{ for d in 0 1 2 3; do region $1 $d; echo NEXT $d $r .; done; }}; \
             n={kill}; next $((n + 1)); while :; do n=$((n + 1)); next $((n + 1)); \
             for d in 0 1 2 3; do region $n $d; l=$((n * 13 % {REGION} + 1)); \
             dd if=/noise bs=1k skip=$(((n * 7 + d + {kill}) % 900)) count=$l of=/part 2>/dev/null; \
             dd if=/part of=/disk$d bs=1k seek=$((r * {REGION})) conv=notrunc,fsync 2>/dev/null && \
             echo KEPT $d $r $l $(sha256sum </part | cut -d' ' -f1) .; done; done"
        );
        let running = vm.agent.start(&write);
        let wanted = 24 + kill % 5 * 3;
        eventually("the guest has written", || {
            let kept = vm.agent.transcript().matches("KEPT ").count() as u64;
            (kept > wanted).then_some(())
        });
        vm.ballast.signal(rustix::process::Signal::KILL);
        drop(running);
        assert!(!vm.ballast.wait_for_end().success());
        let transcript = vm.agent.transcript();
        read_promises(&transcript, &mut promised);
        judge(folder, &promised);
        assert_eq!(shell(folder, constant), before, "what is only read");
        // Of fifty kills: the lab ends what is silent for minutes.
        println!("killed {} of {kills} times", kill + 1);
    }
    let kept = promised.values().flatten().count();
    assert!(kept >= 16, "{promised:?}");
    println!("{kills} kills, {kept} regions");
}

/// A file system of its own for a folder; gone when dropped.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(folder: &'a Path, options: &str) -> Self {
        shell(folder, &format!("mount -t tmpfs -o {options} tmpfs ."));
        Self(folder)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_host_that_runs_full_under_a_thin_disk_is_no_error_to_the_guest() {
    let folder = tempfile::Builder::new().tempdir_in("/tmp").unwrap();
    let folder = folder.path();
    let _mounted = Small::mount(folder, "size=24m");
    shell(folder, "qemu-img create -q -f qcow2 thin.qcow2 64M");
    let mut vm = Vm::boot(|config, _| {
        config["payload"]["initramfs"] = json!(guest("initramfs-tools.cpio"));
        config["disks"] = json!([{
            "id": "thin", "path": folder.join("thin.qcow2"), "image_type": "Qcow2",
        }]);
    });
    vm.agent
        .ok("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    let sum = "sha256sum </mnt/large | cut -d' ' -f1";
    let write = vm.agent.start(
        "dd if=/dev/urandom of=/large bs=1M count=40 2>/dev/null && \
         cp /large /mnt/large && sync && sha256sum </large | cut -d' ' -f1",
    );
    let event = vm.events.wait_for_device(Mark::START, "disk-full", "thin");
    assert_eq!(event["properties"]["action"], "hold");
    assert_eq!(vm.api.state(), "Running");
    let info = vm.api.get("vm.disk-info?id=thin");
    assert!(info["held_requests"].as_u64().unwrap() > 0, "{info}");
    let mark = vm.events.mark();
    shell(folder, "mount -o remount,size=100m .");
    vm.api.put_json("vm.resume-disk", &json!({"id": "thin"}));
    let end = vm.events.wait_for_device(mark, "disk-resumed", "thin");
    assert_eq!(end["properties"]["outcome"], "done");
    let (status, written) = write.finish();
    assert_eq!(status, 0, "{written}");
    vm.agent
        .ok("umount /mnt && e2fsck -fn /dev/vda && mount -t ext4 /dev/vda /mnt");
    assert_eq!(vm.agent.ok(sum), written.trim());
    vm.agent.ok("umount /mnt");
    vm.assert_guest_content();
    let names = vm.events.names();
    assert!(
        !names.iter().any(|name| name.ends_with("io-error")),
        "{names:?}"
    );
    vm.api.put("vm.delete");
    shell(folder, "qemu-img check -f qcow2 thin.qcow2");
}
