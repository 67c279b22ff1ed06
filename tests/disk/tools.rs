//! Running the programs.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// What a program said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// It was refused with an exit status, not by a signal, and by one line that says why.
    #[track_caller]
    pub fn refused(self, why: &str) {
        assert!(matches!(self.code, Some(1 | 2)), "{why}: {self:?}");
        assert!(self.err.contains(why), "{why}: {self:?}");
    }

    #[track_caller]
    pub fn json(self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// A program in a folder.
pub fn run(program: &str, folder: &Path, arguments: &[&str]) -> Said {
    let output = Command::new(program)
        .current_dir(folder)
        .args(arguments)
        .env("TZ", "UTC")
        .output();
    Said::new(output.unwrap())
}

/// `ballast disk LINE` in a folder.
pub fn disk(folder: &Path, line: &str) -> Said {
    let mut arguments = vec!["disk"];
    arguments.extend(words(line));
    run(env!("CARGO_BIN_EXE_ballast"), folder, &arguments)
}

/// `qemu-img LINE` in a folder.
pub fn img(folder: &Path, line: &str) -> Said {
    run("qemu-img", folder, &words(line))
}

/// Commands of qemu-io, by that or by ours.
pub fn io(folder: &Path, ours: bool, format: &str, image: &str, commands: &[&str]) -> Said {
    let mut arguments = if ours { vec!["disk", "io"] } else { vec![] };
    arguments.extend(["-f", format]);
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let program = if ours {
        env!("CARGO_BIN_EXE_ballast")
    } else {
        "qemu-io"
    };
    run(program, folder, &arguments)
}

/// A folder that goes away; `None` where QEMU's tools are not there.
pub fn folder() -> Option<tempfile::TempDir> {
    for tool in ["qemu-img", "qemu-io"] {
        if Command::new(tool).arg("--version").output().is_err() {
            eprintln!("SKIPPED: there is no {tool}");
            return None;
        }
    }
    Some(tempfile::tempdir().unwrap())
}

/// Names of all that is in a folder.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Some images with something of everything in them.
pub fn samples(folder: &Path) -> Vec<&'static str> {
    let make = |line: &str| {
        img(folder, line).good();
    };
    let write = |image: &str, commands: &[&str]| {
        io(folder, false, "qcow2", image, commands).good();
    };
    make("create -q -f raw base.raw 10M");
    io(
        folder,
        false,
        "raw",
        "base.raw",
        &["write -P 1 0 1M", "write -P 2 5M 64k"],
    )
    .good();
    let some = [
        "write -P 3 64k 128k",
        "write -z 300k 200k",
        "write -z -u 1M 512k",
        "write -P 4 5M 4k",
    ];
    for (name, options) in [
        ("plain.qcow2", "cluster_size=64k"),
        ("small.qcow2", "cluster_size=512,refcount_bits=8"),
        ("large.qcow2", "cluster_size=2M,refcount_bits=64"),
        ("old.qcow2", "compat=0.10"),
        ("sub.qcow2", "extended_l2=on,cluster_size=32k"),
        ("lazy.qcow2", "lazy_refcounts=on,compression_type=zstd"),
    ] {
        make(&format!("create -q -f qcow2 -o {options} {name} 12M"));
        write(name, &some);
    }
    make("create -q -f qcow2 -b base.raw -F raw overlay.qcow2 12M");
    write("overlay.qcow2", &some);
    make("create -q -f qcow2 -o extended_l2=on -b overlay.qcow2 -F qcow2 top.qcow2 14M");
    write(
        "top.qcow2",
        &["write -P 9 2M 3k", "write -z 96k 8k", "discard 5M 64k"],
    );
    make("create -q -f qcow2 shot.qcow2 10M");
    write("shot.qcow2", &some);
    make("snapshot -c one shot.qcow2");
    make("snapshot -c another shot.qcow2");
    make("bitmap --add -f qcow2 -g 32k shot.qcow2 changes");
    write("shot.qcow2", &["write -P 7 0 100k"]);
    make("convert -c -f qcow2 -O qcow2 shot.qcow2 packed.qcow2");
    vec![
        "plain.qcow2",
        "small.qcow2",
        "large.qcow2",
        "old.qcow2",
        "sub.qcow2",
        "lazy.qcow2",
        "overlay.qcow2",
        "top.qcow2",
        "shot.qcow2",
        "packed.qcow2",
    ]
}
