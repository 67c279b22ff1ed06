//! `create -o preallocation=…`, judged by QEMU's tools and by what the host keeps for the file.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::tools::{disk, folder, img, io, names};

const MIB: u64 = 1 << 20;

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn every_kind_of_preallocation_makes_a_sound_image_that_has_what_was_asked_for() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw zeroes 13M").good();
    let cases = [
        ("raw", "falloc", ""),
        ("raw", "full", ""),
        ("qcow2", "metadata", ""),
        ("qcow2", "falloc", ""),
        ("qcow2", "full", ""),
        ("qcow2", "metadata", ",cluster_size=512,refcount_bits=64"),
        ("qcow2", "full", ",cluster_size=512,refcount_bits=1"),
        ("qcow2", "falloc", ",cluster_size=2M,extended_l2=on"),
        ("qcow2", "full", ",extended_l2=on,lazy_refcounts=on"),
        ("qcow2", "full", ",compat=0.10"),
    ];
    for (format, kind, more) in cases {
        let context = format!("{format} {kind} {more}");
        let made = disk(
            folder,
            &format!("create -p -f {format} -o preallocation={kind}{more} new 13M"),
        );
        assert!(
            made.err.contains("100.00/100%") || kind == "metadata",
            "{made:?}"
        );
        made.good();
        let image = folder.join("new");
        if format == "qcow2" {
            img(folder, "check -q -f qcow2 new").good();
            disk(folder, "check -q -f qcow2 new").good();
        }
        let compared = img(folder, &format!("compare -f {format} -F raw new zeroes"));
        assert!(compared.good().contains("identical"), "{context}");
        let blocks = allocated(&image);
        match kind {
            "metadata" => assert!(blocks < 5 * MIB, "{context}: {blocks}"),
            _ => assert!(blocks >= 13 * MIB, "{context}: {blocks}"),
        }
        let map = img(folder, &format!("map -f {format} --output json new")).json();
        let map = map.as_array().unwrap();
        if format == "qcow2" {
            let whole = map
                .iter()
                .all(|extent| extent["present"] == true && extent["offset"].is_u64());
            assert!(whole, "{context}: {map:?}");
        }
        let writes = ["write -P 7 1M 3M", "write -P 8 12M 1M", "flush"];
        io(folder, true, format, "new", &writes).good();
        let reads = ["read -P 7 1M 3M", "read -P 8 12M 1M", "read -P 0 4M 8M"];
        io(folder, false, format, "new", &reads).good();
        if format == "qcow2" {
            img(folder, "check -q -f qcow2 new").good();
        }
        std::fs::remove_file(image).unwrap();
    }
}

#[test]
fn what_lies_below_a_preallocated_overlay_is_seen() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw base 4M").good();
    io(folder, false, "raw", "base", &["write -P 5 0 4M"]).good();
    for kind in ["metadata", "falloc", "full"] {
        let line = format!("create -q -f qcow2 -b base -F raw -o preallocation={kind} new");
        disk(folder, &line).good();
        img(folder, "check -q -f qcow2 new").good();
        let compared = img(folder, "compare -f qcow2 -F raw new base");
        assert!(compared.good().contains("identical"), "{kind}");
        let is_full = allocated(&folder.join("new")) >= 4 * MIB;
        assert_eq!(is_full, kind != "metadata", "{kind}");
        std::fs::remove_file(folder.join("new")).unwrap();
        let hidden =
            format!("create -f qcow2 -b base -F raw -o extended_l2=off,preallocation={kind} new");
        disk(folder, &hidden).refused("preallocation");
    }
}

#[test]
fn what_can_not_be_preallocated_is_refused_and_leaves_nothing() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for (line, why) in [
        (
            "create -f raw -o preallocation=metadata new 1M",
            "preallocation",
        ),
        (
            "create -f qcow2 -o preallocation=some new 1M",
            "off, metadata, falloc or full",
        ),
        ("create -f raw -o preallocation=full new 4096T", "size"),
        ("create -f raw -o preallocation=falloc new 512T", ""),
        ("create -f qcow2 -o preallocation=full new 512T", ""),
    ] {
        let said = disk(folder, line);
        assert_eq!(said.code, Some(1), "{line}: {said:?}");
        assert!(said.err.contains(why), "{line}: {said:?}");
        assert_eq!(names(folder), [""; 0], "{line}");
    }
    disk(folder, "create -q -f raw source 1M").good();
    for (line, why) in [
        (
            "convert -f raw -O raw -o preallocation=metadata source copy",
            "preallocation",
        ),
        (
            "convert -f raw -O qcow2 -o preallocation=some source copy",
            "off, metadata, falloc or full",
        ),
    ] {
        disk(folder, line).refused(why);
        assert_eq!(names(folder), ["source"], "{line}");
    }
}

#[test]
fn a_copy_has_what_was_asked_for_as_well_as_the_data() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    // Data, zeroes and holes, some of them within a cluster; the end is that of no cluster.
    let size = 13 * MIB + 5 * 512;
    img(folder, &format!("create -q -f raw source {size}")).good();
    let writes = [
        "write -P 7 1M 1M",
        "write -z 3M 1M",
        "write -P 8 5003776 4k",
        "write -P 9 12M 512",
        "write -P 3 13M 2560",
    ];
    io(folder, true, "raw", "source", &writes).good();
    for source in ["source", "thin"] {
        let from = match source {
            "source" => "raw",
            _ => {
                img(folder, "convert -f raw -O qcow2 source thin").good();
                "qcow2"
            }
        };
        for (format, kind, more) in [
            ("raw", "falloc", ""),
            ("raw", "full", ""),
            ("qcow2", "metadata", ""),
            ("qcow2", "falloc", ""),
            ("qcow2", "full", ""),
            ("qcow2", "metadata", ",cluster_size=2M,extended_l2=on"),
            ("qcow2", "full", ",cluster_size=512,refcount_bits=1"),
            ("qcow2", "falloc", ",extended_l2=on"),
            ("qcow2", "full", ",compat=0.10"),
        ] {
            let context = format!("{source} {format} {kind} {more}");
            let made = disk(
                folder,
                &format!(
                    "convert -p -f {from} -O {format} -o preallocation={kind}{more} {source} copy"
                ),
            );
            assert!(made.err.contains("100.00/100%"), "{context}: {made:?}");
            made.good();
            let compared = img(folder, &format!("compare -f {format} -F raw copy source"));
            assert!(compared.good().contains("identical"), "{context}");
            let image = folder.join("copy");
            let blocks = allocated(&image);
            match kind {
                "metadata" => assert!(blocks < 8 * MIB, "{context}: {blocks}"),
                _ => assert!(blocks >= 13 * MIB, "{context}: {blocks}"),
            }
            if format == "qcow2" {
                img(folder, "check -q -f qcow2 copy").good();
                disk(folder, "check -q -f qcow2 copy").good();
                let map = img(folder, "map -f qcow2 --output json copy").json();
                let whole = |extent: &serde_json::Value| {
                    extent["present"] == true && extent["offset"].is_u64()
                };
                assert!(map.as_array().unwrap().iter().all(whole), "{context}");
                let writes = ["write -P 5 4M 1M", "flush"];
                io(folder, true, format, "copy", &writes).good();
                img(folder, "check -q -f qcow2 copy").good();
            }
            std::fs::remove_file(image).unwrap();
        }
    }
}

#[test]
fn ctrl_c_ends_a_long_creation_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let tables = "preallocation=metadata,cluster_size=512";
    for signal in ["INT", "TERM"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ballast"))
            .args([
                "disk", "create", "-p", "-f", "qcow2", "-o", tables, "new", "64G",
            ])
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // It has begun when it says how far it is.
        let mut first = [0; 1];
        std::io::Read::read_exact(child.stderr.as_mut().unwrap(), &mut first).unwrap();
        let pid = child.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status();
        assert!(sent.unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), None, "it cleans up by itself");
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("given up"), "{said}");
        assert_eq!(names(folder.path()), [""; 0]);
    }
}
