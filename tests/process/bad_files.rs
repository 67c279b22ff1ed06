//! Files that are not what they are said to be.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use super::{assert_never_boots, before, refusal};
use crate::support::artifacts::{Noise, empty_image};
use crate::support::ballast::{Ballast, Launch};
use crate::support::payload;

/// A sleeping guest with this kernel.
fn booting(kernel: &Path) -> Value {
    json!({"memory": {"size": 64 << 20}, "payload": {"kernel": kernel}})
}

fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Noise(length as u64 | 1).fill(&mut bytes);
    bytes
}

/// A file with a byte string written over it at an offset.
fn patched(mut bytes: Vec<u8>, offset: usize, patch: &[u8]) -> Vec<u8> {
    bytes[offset..offset + patch.len()].copy_from_slice(patch);
    bytes
}

/// Paths of things that are no regular files and no block devices.
fn no_files(folder: &Path) -> Vec<PathBuf> {
    let name = |name: &str| folder.join(name);
    fs::create_dir(name("directory")).unwrap();
    mknodat(CWD, name("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    symlink(name("loop"), name("loop")).unwrap();
    symlink(name("nowhere"), name("dangling")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(name("socket")).unwrap());
    ["directory", "fifo", "loop", "dangling", "socket", "missing"]
        .map(name)
        .into_iter()
        .chain([
            PathBuf::from("/dev/full"),
            PathBuf::from("/dev/tty"),
            name("directory").join("missing"),
            name(&"x".repeat(5000)),
            name("with\0zero"),
            PathBuf::new(),
        ])
        .collect()
}

#[test]
fn truncated_and_random_kernels_never_boot_and_leave_nothing_behind() {
    let mut ballast = Ballast::start();
    let sleeper = fs::read(payload::sleeper(ballast.dir())).unwrap();
    // Program header 1 (the code) begins at 64: offset at +8, p_paddr +24, filesz +32, memsz +40.
    let header =
        |field: usize, value: u64| patched(sleeper.clone(), 64 + field, &value.to_le_bytes());
    let bz_image = patched(
        patched(noise(1 << 20), 0x202, b"HdrS"),
        0x1fe,
        &[0x55, 0xaa],
    );
    let kernels = [
        ("empty", Vec::new()),
        ("one byte", vec![0x7f]),
        ("half an ELF header", sleeper[..32].to_vec()),
        ("no program headers", sleeper[..64].to_vec()),
        ("half the program headers", sleeper[..100].to_vec()),
        ("no note", sleeper[..0x180].to_vec()),
        ("half the note", sleeper[..0x208].to_vec()),
        ("no code", sleeper[..0x1000].to_vec()),
        ("half the code", sleeper[..0x1008].to_vec()),
        ("noise", noise(1 << 20)),
        ("zeros", vec![0; 1 << 20]),
        (
            "noise in an ELF",
            patched(noise(1 << 20), 0, b"\x7fELF\x02\x01\x01"),
        ),
        ("a 32-bit ELF", patched(sleeper.clone(), 4, &[1])),
        ("a big-endian ELF", patched(sleeper.clone(), 5, &[2])),
        (
            "65535 program headers",
            patched(sleeper.clone(), 56, &[0xff, 0xff]),
        ),
        (
            "program headers far away",
            patched(sleeper.clone(), 32, &u64::MAX.to_le_bytes()),
        ),
        ("code beyond the file", header(8, 1 << 40)),
        ("code beyond memory", header(24, 1 << 40)),
        (
            "code at the end of the address space",
            header(24, u64::MAX - 8),
        ),
        ("code in the PCI hole", header(24, 0xc000_0000)),
        ("code larger than the file", header(32, 1 << 30)),
        ("code larger than everything", header(32, u64::MAX)),
        (
            "a huge note",
            patched(sleeper.clone(), 64 + 56 + 32, &u64::MAX.to_le_bytes()),
        ),
        (
            "a note of another kind",
            patched(sleeper.clone(), 0x208, &[1]),
        ),
        (
            "a note with endless strings",
            patched(sleeper.clone(), 0x200, &[0xff; 8]),
        ),
        ("noise in a bzImage", bz_image.clone()),
        ("half a bzImage header", bz_image[..0x210].to_vec()),
    ];
    for (what, bytes) in kernels {
        let path = ballast.path("kernel");
        fs::write(&path, bytes).unwrap();
        assert_never_boots(&mut ballast, what, &booting(&path));
    }
    // And after all that a good one boots.
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    client.put("vm.delete");
    before.assert_unchanged(&mut ballast, &mut client, "a boot and a delete");
}

#[test]
fn a_note_may_lie_about_the_entry_but_nothing_breaks() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let sleeper = fs::read(payload::sleeper(ballast.dir())).unwrap();
    let before = before(&ballast, &mut client);
    for entry in [
        0_u32,
        0x10_003f,
        0xa_0000,
        0xc000_0000,
        0xfee0_0000,
        u32::MAX,
    ] {
        let path = ballast.path("kernel");
        fs::write(&path, patched(sleeper.clone(), 0x210, &entry.to_le_bytes())).unwrap();
        // A guest may crash as it likes; only the host must not.
        let created = client.try_put_json("vm.create", &booting(&path));
        assert!(created.status < 500, "{entry:#x}: {}", created.text());
        if created.status == 204 {
            let booted = client.request("PUT", "vm.boot", None);
            assert!(booted.status < 500, "{entry:#x}: {}", booted.text());
            client.put("vm.delete");
        }
    }
    before.assert_unchanged(&mut ballast, &mut client, "wild entry points");
}

#[test]
fn what_is_no_file_is_no_kernel() {
    let mut ballast = Ballast::start();
    for path in no_files(ballast.dir()) {
        let Some(text) = path.to_str() else { continue };
        let what: String = text.chars().take(100).collect();
        assert_never_boots(&mut ballast, &what, &booting(&path));
        let firmware = json!({"payload": {"firmware": path}});
        assert_never_boots(&mut ballast, &what, &firmware);
    }
}

#[test]
fn what_is_no_file_is_no_initramfs_and_neither_is_one_larger_than_memory() {
    let mut ballast = Ballast::start();
    let huge = empty_image(ballast.dir(), "huge", 1 << 40);
    let large = empty_image(ballast.dir(), "large", 64 << 20);
    let no_files = no_files(ballast.dir());
    for path in no_files.into_iter().chain([huge, large]) {
        let mut config = ballast.sleeper();
        config["payload"]["initramfs"] = json!(path);
        let what: String = path.display().to_string().chars().take(100).collect();
        assert_never_boots(&mut ballast, &what, &config);
    }
}

#[test]
fn a_random_initramfs_is_the_guests_own_business() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for length in [1, 4095, 1 << 20] {
        let path = ballast.path("initramfs");
        fs::write(&path, noise(length)).unwrap();
        let mut config = ballast.sleeper();
        config["payload"]["initramfs"] = json!(path);
        client.put_json("vm.create", &config);
        client.put("vm.boot");
        client.put("vm.delete");
    }
    before.assert_unchanged(&mut ballast, &mut client, "random initramfs");
}

#[test]
fn what_is_no_file_is_no_disk_neither_cold_nor_hot() {
    let mut ballast = Ballast::start();
    let no_disks: Vec<Value> = no_files(ballast.dir())
        .into_iter()
        .chain([empty_image(ballast.dir(), "empty", 0)])
        .map(|path| json!({"path": path}))
        .collect();
    for disk in &no_disks {
        let mut config = ballast.sleeper();
        config["disks"] = json!([disk]);
        let what: String = disk.to_string().chars().take(100).collect();
        assert_never_boots(&mut ballast, &what, &config);
    }
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    for state in ["Created", "Running", "Paused"] {
        match state {
            "Running" => drop(client.put("vm.boot")),
            "Paused" => drop(client.put("vm.pause")),
            _ => {}
        }
        let before = before(&ballast, &mut client);
        for disk in &no_disks {
            for _ in 0..2 {
                let answer = client.try_put_json("vm.add-disk", disk);
                refusal(answer, &format!("{state}: {disk:.100}"));
            }
        }
        before.assert_unchanged(&mut ballast, &mut client, state);
    }
}

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    if !rustix::process::geteuid().is_root() {
        // Everyone but root is refused by the file's mode alone.
        let ballast = Ballast::start();
        return assert_unreadable_is_refused(ballast);
    }
    // Root may read everything, so this one process must be nobody, who may not reach the
    // folder of the build.
    let mut launch = Launch::bare();
    let own = launch.path("ballast");
    fs::copy(crate::support::ballast::binary(), &own).unwrap();
    let folder = own.parent().unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
    let socket = launch.path("api.sock");
    let command = launch.command();
    let mut nobody = std::process::Command::new("setpriv");
    nobody
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&own)
        .arg("--api-socket")
        .arg(&socket)
        .stdin(std::process::Stdio::null())
        .stderr(fs::File::create(folder.join("stderr")).unwrap());
    *command = nobody;
    assert_unreadable_is_refused(launch.start());
}

fn assert_unreadable_is_refused(mut ballast: Ballast) {
    let secret = empty_image(ballast.dir(), "secret", 1 << 20);
    let readable = empty_image(ballast.dir(), "readable", 1 << 20);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(&readable, fs::Permissions::from_mode(0o444)).unwrap();
    let sleeper = ballast.sleeper();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    let mut initramfs = sleeper.clone();
    initramfs["payload"]["initramfs"] = json!(secret);
    let mut disk = sleeper.clone();
    disk["disks"] = json!([{"path": secret}]);
    let mut written = sleeper.clone();
    written["disks"] = json!([{"path": readable}]);
    for config in [booting(&secret), initramfs, disk, written] {
        let answer = client.try_put_json("vm.create", &config);
        refusal(answer, &config.to_string());
    }
    before.assert_unchanged(&mut ballast, &mut client, "unreadable files");
    let mut read = sleeper;
    read["disks"] = json!([{"path": readable, "readonly": true}]);
    client.put_json("vm.create", &read);
}

#[test]
fn an_image_of_odd_size_is_refused_or_boots_but_breaks_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for size in [1, 511, 513, 1000, 4097, (1 << 20) + 1] {
        let path = ballast.path("odd");
        fs::write(&path, noise(size)).unwrap();
        let mut config = ballast.sleeper();
        config["disks"] = json!([{"path": path}]);
        let answer = client.try_put_json("vm.create", &config);
        if answer.status == 204 {
            let answer = client.request("PUT", "vm.boot", None);
            assert!(answer.status < 500, "{size}: {}", answer.text());
            client.put("vm.delete");
        } else {
            refusal(answer, &size.to_string());
        }
    }
    before.assert_unchanged(&mut ballast, &mut client, "odd sizes");
}

#[test]
fn a_file_that_vanishes_between_create_and_boot_fails_the_boot_and_a_retry_succeeds() {
    let mut ballast = Ballast::start();
    let image = empty_image(ballast.dir(), "image", 1 << 20);
    let mut config = ballast.sleeper();
    config["disks"] = json!([{"path": image, "id": "a"}]);
    let mut client = ballast.api();
    let events = ballast.events();
    client.put_json("vm.create", &config);
    for path in [image, ballast.path("sleeper")] {
        let before = before(&ballast, &mut client);
        let away = path.with_extension("away");
        fs::rename(&path, &away).unwrap();
        for _ in 0..3 {
            let mark = events.mark();
            refusal(client.request("PUT", "vm.boot", None), "a missing file");
            events.wait_after(mark, "boot-failed", |_| true);
        }
        before.assert_unchanged(&mut ballast, &mut client, "failed boots");
        fs::rename(&away, &path).unwrap();
    }
    client.put("vm.boot");
    assert_eq!(client.state(), "Running");
    let info = client.get("vm.info");
    assert_eq!(info["config"]["disks"][0]["id"], "a", "{info}");
}
