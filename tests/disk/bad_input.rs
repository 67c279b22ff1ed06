//! Images that are none, and images that lie: an answer or a refusal, in bounded time and memory,
//! and never a crash.

use std::io::{Read, Write};
use std::path::Path;

use super::tools::{disk, folder, img, names, samples};

/// Every verb that only reads.
const READERS: [&str; 5] = [
    "info -f qcow2",
    "info -f qcow2 --backing-chain",
    "check -f qcow2",
    "map -f qcow2",
    "io -r -f qcow2 -c map",
];

#[track_caller]
fn all_end(folder: &Path, name: &str, context: &str) {
    for verb in READERS {
        let said = disk(folder, &format!("{verb} {name}"));
        // Not by a signal.
        assert!(said.code.is_some(), "{context}: {verb}: {said:?}");
        assert!(
            !said.err.contains("panicked"),
            "{context}: {verb}: {said:?}"
        );
    }
    let said = disk(
        folder,
        &format!("convert -f qcow2 -O raw {name} {name}.copy"),
    );
    assert!(said.code.is_some(), "{context}: {said:?}");
    let _ = std::fs::remove_file(folder.join(format!("{name}.copy")));
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let fifo = std::process::Command::new("mkfifo")
        .arg(folder.join("fifo"))
        .status();
    assert!(fifo.unwrap().success());
    std::fs::create_dir(folder.join("folder")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
    let before = names(folder);
    for (name, why) in [
        ("fifo", "FIFO"),
        ("folder", "directory"),
        ("socket", "socket"),
        ("/dev/zero", "character device"),
        ("missing", "No such file"),
    ] {
        for verb in READERS
            .iter()
            .chain(&["repair -f qcow2", "check -r all -f qcow2"])
        {
            disk(folder, &format!("{verb} {name}")).refused(why);
        }
        disk(folder, &format!("convert -f raw -O raw {name} new")).refused(why);
        disk(folder, &format!("commit --backing-files -f qcow2 {name}")).refused(why);
        disk(folder, &format!("io -f raw {name} -c length")).refused(why);
    }
    disk(folder, "map -f raw /dev/null").refused("character device");
    assert_eq!(names(folder), before);
}

#[test]
fn headers_that_lie_are_refused_or_answered() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    let sound = std::fs::read(folder.join("shot.qcow2")).unwrap();
    let write = |changes: &[(usize, &[u8])], len: usize| {
        let mut bytes = sound.clone();
        for (at, field) in changes {
            bytes[*at..at + field.len()].copy_from_slice(field);
        }
        bytes.truncate(len);
        std::fs::write(folder.join("odd.qcow2"), bytes).unwrap();
    };
    let most = u64::MAX.to_be_bytes();
    let refused: [(usize, &[u8], &str); 12] = [
        (0, b"QFI\0", "not a qcow2 image"),
        (4, &9_u32.to_be_bytes(), "version 9"),
        (20, &63_u32.to_be_bytes(), "clusters"),
        (24, &most, "L1 table"),
        (24, &(1_u64 << 63).to_be_bytes(), "L1 table"),
        (36, &most[..4], "L1 table"),
        (48, &most, "refcount table"),
        (56, &most[..4], "refcount table"),
        (60, &most[..4], "snapshots"),
        (64, &most, "snapshot table"),
        (72, &(1_u64 << 40).to_be_bytes(), "feature bit 40"),
        (32, &2_u32.to_be_bytes(), "encryption"),
    ];
    for (at, field, why) in refused {
        write(&[(at, field)], sound.len());
        for verb in READERS {
            disk(folder, &format!("{verb} odd.qcow2")).refused(why);
        }
    }
    // Terabytes of refcounts, by a table that is not there.
    write(&[(56, &128_u32.to_be_bytes())], sound.len());
    all_end(folder, "odd.qcow2", "a refcount table of 8 MiB");
    for len in [
        0, 3, 71, 103, 511, 512, 65536, 65537, 131_080, 200_000, 400_000,
    ] {
        write(&[], len.min(sound.len()));
        all_end(folder, "odd.qcow2", &format!("cut to {len}"));
    }
    let field = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let (l1, table, shots) = (field(40), field(48), field(64));
    for (what, at) in [("L1", l1), ("refcount table", table), ("snapshots", shots)] {
        for entry in [
            0,
            1,
            l1,
            table,
            1 << 63 | l1,
            1 << 62,
            (1 << 56) - 65536,
            u64::MAX,
        ] {
            write(&[(at as usize, &entry.to_be_bytes())], sound.len());
            all_end(folder, "odd.qcow2", &format!("{what} {entry:#x}"));
        }
    }
}

#[test]
fn backing_files_are_followed_only_on_request_and_only_to_files() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw base.raw 1M").good();
    for (number, name) in [
        "/dev/zero",
        "json:{\"driver\":\"raw\"}",
        "nbd://localhost/x",
        "loop.qcow2",
    ]
    .iter()
    .enumerate()
    {
        let image = if number == 3 {
            "loop.qcow2".to_owned()
        } else {
            format!("bad{number}.qcow2")
        };
        let format = if number == 3 { "qcow2" } else { "raw" };
        img(folder, &format!("create -q -f qcow2 {image} 1M")).good();
        let made = std::process::Command::new("qemu-img")
            .args([
                "rebase", "-u", "-f", "qcow2", "-b", name, "-F", format, &image,
            ])
            .current_dir(folder)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        disk(folder, &format!("info -f qcow2 {image}")).good();
        disk(folder, &format!("map -f qcow2 {image}")).good();
        for verb in ["info", "map"] {
            disk(folder, &format!("{verb} --backing-files -f qcow2 {image}"))
                .refused(["/dev/zero", "json:", "nbd:", "its own backing file"][number]);
        }
        let said = disk(folder, &format!("commit --backing-files -f qcow2 {image}"));
        assert_eq!(said.code, Some(1), "{said:?}");
    }
}

#[test]
fn an_answer_that_nobody_reads_ends_quietly() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    let script = format!(
        "{} disk map -f qcow2 small.qcow2 2>errors | true; cat errors",
        env!("CARGO_BIN_EXE_ballast")
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(folder)
        .output();
    assert_eq!(output.unwrap().stdout, b"");
}

/// A shell of commands with an image open, that is told one after another what to do.
struct Shell(std::process::Child);

impl Shell {
    fn open(folder: &Path, arguments: &[&str]) -> Self {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ballast"));
        let child = command
            .args(["disk", "io"])
            .args(arguments)
            .current_dir(folder)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn();
        Self(child.unwrap())
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Says something, and waits until an answer has this in it.
    fn ask(&mut self, line: &str, answer: &str) {
        self.say(line);
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(answer) {
            let mut byte = [0];
            let read = self.0.stdout.as_mut().unwrap().read(&mut byte).unwrap();
            assert_eq!(read, 1, "{line}: {}", String::from_utf8_lossy(&said));
            said.push(byte[0]);
        }
    }

    /// What it says to these and to the end; it does not crash.
    fn end(mut self, lines: &[&str]) -> String {
        lines.iter().for_each(|line| self.say(line));
        let output = self.0.wait_with_output().unwrap();
        assert!(output.status.code().is_some(), "{output:?}");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(!text.contains("panicked"), "{text}");
        text
    }
}

#[test]
fn a_file_that_is_cut_short_while_it_is_open_gives_errors_and_nothing_else() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for (format, name) in [("raw", "flat"), ("qcow2", "thin")] {
        img(folder, &format!("create -q -f {format} {name} 8M")).good();
        super::tools::io(folder, true, format, name, &["write -P 7 0 4M"]).good();
        let mut shell = Shell::open(folder, &["-f", format, name]);
        shell.ask("read -P 7 0 4M", "read 4194304");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(folder.join(name));
        file.unwrap().set_len(1 << 20).unwrap();
        let said = shell.end(&[
            "read -P 7 2M 1M",
            "write -P 8 3M 64k",
            "flush",
            "read 0 512",
        ]);
        assert!(said.contains("read failed: Input/output error"), "{said}");
        // Whatever is left of it, looking at it is safe.
        if format == "qcow2" {
            all_end(folder, name, "cut short while it was open");
        }
    }
}

#[test]
fn a_backing_file_that_is_replaced_while_it_is_open_is_still_the_old_one() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw base 4M").good();
    super::tools::io(folder, false, "raw", "base", &["write -P 7 0 4M"]).good();
    img(folder, "create -q -f qcow2 -b base -F raw top").good();
    let mut shell = Shell::open(folder, &["--backing-files", "-f", "qcow2", "top"]);
    shell.ask("read -P 7 0 1M", "read 1048576");
    std::fs::rename(folder.join("base"), folder.join("old")).unwrap();
    img(folder, "create -q -f raw base 1M").good();
    let said = shell.end(&["read -P 7 2M 1M", "write -P 8 3M 1k", "read -P 7 3073k 1k"]);
    assert!(!said.contains("failed"), "{said}");
    // The copy was made from the old one.
    std::fs::rename(folder.join("old"), folder.join("base")).unwrap();
    img(folder, "check -q -f qcow2 top").good();
    let reads = ["read -P 7 0 3M", "read -P 8 3M 1k", "read -P 7 3073k 1023k"];
    let said = super::tools::io(folder, false, "qcow2", "top", &reads).good();
    assert!(!said.contains("failed"), "{said}");
}
