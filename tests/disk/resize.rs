//! `resize`, judged by QEMU's tools.

use std::path::Path;
use std::process::{Command, Stdio};

use super::tools::{disk, folder, img, io, names, samples};

const MIB: usize = 1 << 20;

/// What QEMU reads from an image.
fn content(folder: &Path, format: &str, image: &str) -> Vec<u8> {
    img(
        folder,
        &format!("convert -f {format} -O raw {image} oracle"),
    )
    .good();
    let bytes = std::fs::read(folder.join("oracle")).unwrap();
    std::fs::remove_file(folder.join("oracle")).unwrap();
    bytes
}

#[test]
fn images_of_all_kinds_grow_and_what_is_new_is_zero() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    let images = samples(folder);
    // Whoever does not keep it up may drop a bitmap, which leaves its clusters behind.
    img(folder, "bitmap --remove -f qcow2 shot.qcow2 changes").good();
    // The overlays are shorter than what lies below them.
    for name in images {
        let mut expected = content(folder, "qcow2", name);
        for (size, bytes) in [("+512", expected.len() + 512), ("21M", 21 * MIB)] {
            let line = format!("resize -f qcow2 --backing-files --output json {name} {size}");
            let said = disk(folder, &line).json();
            assert_eq!(said["previous-size"], expected.len(), "{name}");
            assert_eq!(said["virtual-size"], bytes, "{name}");
            assert_eq!(
                (&said["filename"], &said["format"]),
                (&name.into(), &"qcow2".into())
            );
            expected.resize(bytes, 0);
            let info = img(folder, &format!("info -f qcow2 --output json {name}")).json();
            assert_eq!(info["virtual-size"], bytes, "{name}");
            img(folder, &format!("check -q -f qcow2 {name}")).good();
            assert!(content(folder, "qcow2", name) == expected, "{name} {size}");
        }
        let behind = ["write -P 6 20M 1M", "flush"];
        io(folder, false, "qcow2", name, &behind).good();
        img(folder, &format!("check -q -f qcow2 {name}")).good();
        let same = format!("resize -f qcow2 --backing-files {name} 21M");
        assert_eq!(disk(folder, &same).good(), "Image resized.\n");
        assert_eq!(
            disk(folder, &same.replace("resize", "resize -q")).good(),
            ""
        );
    }
}

#[test]
fn an_overlay_that_grows_does_not_show_more_of_what_lies_below() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw base 8M").good();
    io(folder, false, "raw", "base", &["write -P 9 0 8M"]).good();
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on"] {
        let line = format!("create -q -f qcow2 -o {options} -b base -F raw top 2560k");
        img(folder, &line).good();
        disk(folder, "resize -f qcow2 --backing-files top 9M").good();
        let mut expected = vec![9; 5 * MIB / 2];
        expected.resize(9 * MIB, 0);
        assert!(content(folder, "qcow2", "top") == expected, "{options}");
        img(folder, "check -q -f qcow2 top").good();
        std::fs::remove_file(folder.join("top")).unwrap();
    }
}

#[test]
fn raw_files_grow_and_shrink_where_nothing_is_lost() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw a 8M").good();
    io(
        folder,
        false,
        "raw",
        "a",
        &["write -P 3 1M 64k", "write -P 0 4M 1M"],
    )
    .good();
    disk(folder, "resize -f raw a +8M").good();
    let length = || std::fs::metadata(folder.join("a")).unwrap().len();
    assert_eq!(length(), 16 << 20);
    disk(folder, "resize -f raw a 12M").refused("--shrink");
    disk(folder, "resize -f raw --shrink a 1064k").refused("would be lost");
    assert_eq!(length(), 16 << 20);
    // Written zeroes are no more than holes.
    disk(folder, "resize -f raw --shrink a 3M").good();
    assert_eq!(length(), 3 << 20);
    disk(folder, "resize -f raw --shrink -- a -512").good();
    assert_eq!(length(), (3 << 20) - 512);
    io(
        folder,
        false,
        "raw",
        "a",
        &["read -P 3 1M 64k", "read -P 0 2M 512"],
    )
    .good();
}

#[test]
fn what_can_not_be_resized_is_refused_and_stays_as_it_was() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f qcow2 thin 4M").good();
    img(folder, "create -q -f qcow2 -o compat=0.10 old 4M").good();
    img(folder, "snapshot -c one old").good();
    img(folder, "create -q -f raw flat 4M").good();
    img(folder, "create -q -f qcow2 -b flat -F raw top").good();
    img(folder, "create -q -f qcow2 -o cluster_size=512 small 4M").good();
    let before = names(folder);
    let bytes = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let (thin, flat) = (bytes("thin"), bytes("flat"));
    for (line, why) in [
        ("thin 2M", "--shrink"),
        ("--shrink thin 2M", "not supported yet"),
        ("thin 0", "size"),
        ("thin +100", "512"),
        ("thin 4194305", "512"),
        ("thin +9E", "too large"),
        ("thin 8E", "too large"),
        ("small 4E", "at most"),
        ("-- thin -4M", "size"),
        ("-- thin -1E", "size"),
        ("old 5M", "version 2"),
        ("top 5M", "backing_files"),
        ("thin some", "not a number"),
        ("thin", "SIZE"),
        ("flat 8M", "not a qcow2 image"),
        ("missing 8M", "No such file"),
        ("/dev/null 8M", "character device"),
        (". 8M", "directory"),
    ] {
        disk(folder, &format!("resize -f qcow2 {line}")).refused(why);
    }
    for (line, why) in [
        ("flat 0", "size"),
        ("--shrink flat 0", "size"),
        ("flat 5000", "512"),
    ] {
        disk(folder, &format!("resize -f raw {line}")).refused(why);
    }
    assert!(bytes("thin") == thin && bytes("flat") == flat);
    assert_eq!(names(folder), before);
}

#[test]
fn an_image_that_is_in_use_keeps_its_size() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f qcow2 thin 4M").good();
    img(folder, "create -q -f raw flat 4M").good();
    for (format, name) in [("qcow2", "thin"), ("raw", "flat")] {
        // It has the image until it is told to end.
        let mut holder = Command::new("qemu-io")
            .args(["-f", format, name])
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut prompt = [0; 8];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut prompt).unwrap();
        let said = disk(folder, &format!("resize -f {format} {name} 8M"));
        drop(holder.stdin.take());
        holder.wait().unwrap();
        said.refused("in use");
        disk(folder, &format!("resize -f {format} {name} 8M")).good();
    }
}
