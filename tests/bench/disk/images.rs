//! Images to measure on, made by QEMU's tools.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::MIB;
use super::cases::{Case, Family};

/// Runs qemu-img.
pub fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {text}{error}");
    text
}

/// Makes a qcow2 image; `options` as on its command line.
fn create(options: &[&str], image: &Path, size: &[&str]) {
    let made = [
        &["create", "-q", "-f", "qcow2"],
        options,
        &[text(image)],
        size,
    ]
    .concat();
    qemu_img(&made);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn path(folder: &Path, family: Family) -> PathBuf {
    folder.join(match family {
        Family::Empty => "bench-empty.qcow2",
        Family::Filled => "bench-filled.qcow2",
        Family::Overlay => "bench-overlay.qcow2",
        Family::Huge => "bench-huge.qcow2",
    })
}

fn raw_path(folder: &Path) -> PathBuf {
    folder.join("bench.raw")
}

/// The image of a case as it is to be found; one that the case leaves as it is stays.
pub fn make(folder: &Path, case: &Case) -> PathBuf {
    let image = path(folder, case.family);
    let size = case.size().to_string();
    match case.family {
        Family::Filled if image.exists() => {}
        Family::Filled => {
            create(&[], &image, &[&size]);
            fill(&image, "qcow2", case.size());
        }
        Family::Huge if image.exists() => {}
        Family::Huge => huge(&image),
        Family::Empty => {
            let _ = std::fs::remove_file(&image);
            create(&[], &image, &[&size]);
        }
        Family::Overlay => {
            let _ = std::fs::remove_file(&image);
            let below = path(folder, Family::Filled);
            if !below.exists() {
                create(&[], &below, &[&size]);
                fill(&below, "qcow2", case.size());
            }
            let options = "extended_l2=on,cluster_size=128k";
            let options = ["-o", options, "-F", "qcow2", "-b", text(&below)];
            create(&options, &image, &[]);
        }
    }
    image
}

/// 1 TiB with all of its tables.
pub fn huge(image: &Path) {
    let _ = std::fs::remove_file(image);
    let options = "preallocation=metadata";
    create(&["-o", options], image, &["1T"]);
}

/// A raw image that has been written to all over.
pub fn make_raw(folder: &Path) -> PathBuf {
    let image = raw_path(folder);
    if !image.exists() {
        qemu_img(&["create", "-q", "-f", "raw", text(&image), "2G"]);
        fill(&image, "raw", 2 << 30);
    }
    image
}

/// Writes to an image all over.
pub fn fill(image: &Path, format: &str, size: u64) {
    let count = (size / MIB).to_string();
    qemu_img(&[
        "bench",
        "-q",
        "-w",
        "-t",
        "none",
        "-i",
        "io_uring",
        "-f",
        format,
        "-c",
        &count,
        "-s",
        "1M",
        "-d",
        "8",
        text(image),
    ]);
}

/// What a case has left must be a sound image.
pub fn check(folder: &Path, case: &Case) {
    if case.write {
        let image = path(folder, case.family);
        qemu_img(&["check", "-q", "-f", "qcow2", text(&image)]);
    }
}

/// Removes them all.
pub fn remove(folder: &Path) {
    let families = [Family::Empty, Family::Filled, Family::Overlay, Family::Huge];
    for image in families.map(|family| path(folder, family)) {
        let _ = std::fs::remove_file(image);
    }
    let _ = std::fs::remove_file(raw_path(folder));
}
