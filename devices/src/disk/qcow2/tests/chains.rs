//! Backing files: followed where the configuration says so, and only to where they may lead.

use std::path::PathBuf;

use super::*;
use crate::disk::open::open_file;

const MIB: u64 = 1 << 20;

fn overlay(folder: &Path, name: &str, options: &str, backing: &str, format: &str) -> PathBuf {
    let path = folder.join(name);
    let options = format!("{options},backing_file={backing},backing_fmt={format}");
    let options = options.trim_start_matches(',');
    qemu::img(&format!(
        "create -q -f qcow2 -o {options} {}",
        path.display()
    ));
    path
}

/// An image whose header names `backing`, whether or not there is such a file.
fn names(folder: &Path, backing: &str, format: Option<&str>) -> PathBuf {
    let path = folder.join("names.qcow2");
    let path_text = path.to_str().unwrap();
    qemu::img(&format!("create -q -f qcow2 {path_text} 1M"));
    let mut bytes = std::fs::read(&path).unwrap();
    let length = 112;
    let mut rest = Vec::new();
    if let Some(format) = format {
        rest.extend(0xe279_2aca_u32.to_be_bytes());
        rest.extend((format.len() as u32).to_be_bytes());
        rest.extend(format.as_bytes());
        rest.resize(rest.len().next_multiple_of(8), 0);
    }
    rest.extend([0; 8]);
    let name = length + rest.len();
    rest.extend(backing.as_bytes());
    bytes[length..length + rest.len()].copy_from_slice(&rest);
    bytes[8..16].copy_from_slice(&(name as u64).to_be_bytes());
    bytes[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn chains_read_as_qemu_reads_them() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    // A raw base whose size is no multiple of anything, and an overlay that is longer.
    let odd: Vec<u8> = (0..3 * MIB + 1000).map(|i| (i % 253) as u8).collect();
    std::fs::write(at.join("odd.raw"), &odd).unwrap();
    for (number, options) in (0..).zip(["", "extended_l2=on", "cluster_size=4k", "compat=0.10"]) {
        let name = format!("over-raw-{number}.qcow2");
        let path = overlay(at, &name, options, "odd.raw", "raw");
        compare_with_qemu(&path);
        qemu::img(&format!("resize -q {} 9M", path.display()));
        qemu::scribble(&path, 9 * MIB, 60, number);
        compare_with_qemu(&path);
    }
    // Four deep, of different geometries and sizes, with a compressed one at the bottom.
    let source = qemu::create(at, "source.qcow2", "", 7 * MIB);
    qemu::scribble(&source, 7 * MIB, 100, 5);
    qemu::img(&format!(
        "convert -c -f qcow2 -O qcow2 {} {}",
        source.display(),
        at.join("0.qcow2").display()
    ));
    let layers = [
        ("extended_l2=on,cluster_size=128k", "5M"),
        ("cluster_size=512", "8M"),
        ("cluster_size=2M", "6M"),
        ("extended_l2=on,cluster_size=16k", "10M"),
    ];
    for (number, (options, size)) in (1..).zip(layers) {
        let below = format!("{}.qcow2", number - 1);
        let path = overlay(at, &format!("{number}.qcow2"), options, &below, "qcow2");
        qemu::img(&format!("resize -q --shrink {} {size}", path.display()));
        qemu::scribble(&path, 5 * MIB, 40, 30 + number);
        compare_with_qemu(&path);
    }
}

#[test]
fn a_relative_name_begins_at_the_overlays_folder() {
    let Some(folder) = qemu::folder() else { return };
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    qemu::create(folder.path(), "base.qcow2", "", MIB);
    let path = overlay(folder.path(), "sub/top.qcow2", "", "../base.qcow2", "qcow2");
    Engine::open(&options(&path)).unwrap();
}

#[test]
fn a_backing_file_is_followed_only_when_the_configuration_says_so() {
    let Some(folder) = qemu::folder() else { return };
    qemu::create(folder.path(), "base.qcow2", "", MIB);
    let path = overlay(folder.path(), "top.qcow2", "", "base.qcow2", "qcow2");
    let mut options = options(&path);
    options.backing_files = false;
    let refused = refusal(&options);
    assert!(
        refused.starts_with("backing_files: must be true"),
        "{refused}"
    );
    assert!(refused.contains("`base.qcow2`"), "{refused}");
}

#[test]
fn a_name_that_leads_elsewhere_than_to_an_image_is_refused() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    std::fs::write(at.join("text"), "not a disk").unwrap();
    for (name, format, reason) in [
        (
            "json:{\"driver\":\"file\"}",
            Some("qcow2"),
            "is not that of a file",
        ),
        ("nbd://host/disk", Some("raw"), "is not that of a file"),
        ("file:text", Some("raw"), "is not that of a file"),
        ("te\0xt", Some("raw"), "is not that of a file"),
        ("text", None, "never guessed"),
        ("text", Some("vmdk"), "the format `vmdk`"),
        ("text", Some("qcow2"), "not a qcow2 image"),
        ("missing", Some("raw"), "No such file"),
        ("/dev/zero", Some("raw"), "a character device"),
        (
            "/proc/self/environ",
            Some("qcow2"),
            "ends within its header",
        ),
        (".", Some("raw"), "a directory"),
        ("names.qcow2", Some("qcow2"), "its own backing file"),
        ("names.qcow2", Some("raw"), "its own backing file"),
    ] {
        let refused = refusal(&options(&names(at, name, format)));
        assert!(refused.contains(reason), "{name}: {refused}");
    }
}

#[test]
fn a_chain_that_leads_back_to_itself_is_refused() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    let one = names(at, "two.qcow2", Some("qcow2"));
    std::fs::rename(&one, at.join("one.qcow2")).unwrap();
    let two = names(at, "link.qcow2", Some("qcow2"));
    std::fs::rename(&two, at.join("two.qcow2")).unwrap();
    std::os::unix::fs::symlink("one.qcow2", at.join("link.qcow2")).unwrap();
    let refused = refusal(&options(&at.join("one.qcow2")));
    assert!(refused.contains("its own backing file"), "{refused}");
}

#[test]
fn a_chain_is_at_most_so_deep() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    for number in 0..65 {
        let below = format!("{}.qcow2", number + 1);
        let path = names(at, &below, Some("qcow2"));
        std::fs::rename(path, at.join(format!("{number}.qcow2"))).unwrap();
    }
    qemu::create(at, "65.qcow2", "", MIB);
    let refused = refusal(&options(&at.join("0.qcow2")));
    assert!(refused.contains("more than 64 images"), "{refused}");
    let mut engine = Engine::open(&options(&at.join("2.qcow2"))).unwrap();
    assert_eq!(engine.read(0, 512).unwrap(), vec![0; 512]);
}

#[test]
fn backing_files_are_locked_against_writers_and_shared_with_readers() {
    let Some(folder) = qemu::folder() else { return };
    let base = qemu::create(folder.path(), "base.qcow2", "", MIB);
    let one = overlay(folder.path(), "one.qcow2", "", "base.qcow2", "qcow2");
    let two = overlay(folder.path(), "two.qcow2", "", "base.qcow2", "qcow2");
    let first = Engine::open(&options(&one)).unwrap();
    let second = Engine::open(&options(&two)).unwrap();
    let mut writer = options(&base);
    writer.readonly = false;
    assert!(matches!(open_file(&writer), Err(BuildError::Locked { .. })));
    let base = base.to_str().unwrap();
    let qemu = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write 0 512", base])
        .output()
        .unwrap();
    assert!(!qemu.status.success());
    drop((first, second));
    let _writer = open_file(&writer).unwrap();
    assert!(matches!(
        Qcow2Image::open(&options(&one)),
        Err(BuildError::Locked { .. })
    ));
}
