//! QEMU's tools, as the makers of images and as the judges of what is in them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder that goes away; `None` where there is no qemu-img.
pub fn folder() -> Option<tempfile::TempDir> {
    for tool in ["qemu-img", "qemu-io"] {
        if Command::new(tool).arg("--version").output().is_err() {
            eprintln!("SKIPPED: there is no {tool}");
            return None;
        }
    }
    // O_DIRECT and holes are wanted, which not every file system for temporary files has.
    Some(tempfile::tempdir().unwrap())
}

pub fn run(tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a line of blank-separated arguments.
pub fn img(line: &str) {
    run("qemu-img", &line.split_whitespace().collect::<Vec<_>>());
}

pub fn io(path: &Path, commands: &[String]) {
    for group in commands.chunks(64) {
        let mut arguments = vec!["-f", "qcow2"];
        for command in group {
            arguments.extend(["-c", command]);
        }
        arguments.push(path.to_str().unwrap());
        run("qemu-io", &arguments);
    }
}

/// Makes an image; `options` as `-o` takes them.
pub fn create(folder: &Path, name: &str, options: &str, size: u64) -> PathBuf {
    let path = folder.join(name);
    let options = if options.is_empty() {
        "compat=1.1"
    } else {
        options
    };
    img(&format!(
        "create -q -f qcow2 -o {options} {} {size}",
        path.display()
    ));
    path
}

/// What QEMU reads from a qcow2 image.
pub fn content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("oracle");
    img(&format!(
        "convert -f qcow2 -O raw {} {}",
        path.display(),
        raw.display()
    ));
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// A small generator, so that a failure comes again.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % limit.max(1)
    }
}

/// Random writes, zeroes and discards all over the image.
pub fn scribble(path: &Path, size: u64, count: usize, seed: u64) {
    let mut random = Random(seed);
    let mut commands = Vec::new();
    for _ in 0..count {
        let longest = [8, 64, 512][random.below(3) as usize];
        let offset = random.below(size / 512);
        let len = (1 + random.below(longest)).min(size / 512 - offset);
        let (offset, len) = (offset * 512, len * 512);
        commands.push(match random.below(8) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -z -u {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            _ => {
                let pattern = 1 + random.below(255);
                format!("write -P {pattern} {offset} {len}")
            }
        });
    }
    io(path, &commands);
}
