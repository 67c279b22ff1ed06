//! `ballast disk io` against qemu-io: the same commands on copies of the same image.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::tools::{Said, disk, folder, img, io};

/// Without what no two runs have in common: times and rates.
pub fn normalised(text: &str) -> String {
    let mut lines = String::new();
    for line in text.lines() {
        if let Some((before, _)) = line.split_once(" ops; ") {
            lines += &format!("{before} ops; TIME\n");
        } else if let [bytes, count, _, _, _] = line.split(',').collect::<Vec<_>>()[..] {
            lines += &format!("{bytes},{count},TIME\n");
        } else {
            lines += line;
            lines.push('\n');
        }
    }
    lines
}

#[track_caller]
fn same(folder: &Path, format: &str, image: &str, commands: &[&str]) {
    let theirs = folder.join("theirs");
    let ours = folder.join("ours");
    for copy in [&theirs, &ours] {
        std::fs::copy(folder.join(image), copy).unwrap();
    }
    let theirs = io(folder, false, format, "theirs", commands);
    let ours = io(folder, true, format, "ours", commands);
    assert_eq!(
        normalised(&theirs.out),
        normalised(&ours.out),
        "{commands:?} {} {}",
        theirs.err,
        ours.err
    );
    assert_eq!(theirs.code, ours.code, "{commands:?}: {theirs:?} {ours:?}");
    assert_eq!(theirs.err, ours.err, "{commands:?}");
    let content = |name: &str| std::fs::read(folder.join(name)).unwrap();
    if format == "raw" {
        assert!(
            content("theirs") == content("ours"),
            "{commands:?}: the images differ"
        );
    }
}

pub fn sample(folder: &Path) {
    img(folder, "create -q -f raw image 2M").good();
    io(
        folder,
        false,
        "raw",
        "image",
        &["write -P 1 0 100k", "write -P 2 1M 64k"],
    )
    .good();
}

#[test]
fn each_command_prints_and_does_what_that_of_qemu_io_does() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    for command in [
        "read 0 512",
        "read -P 1 0 1k",
        "read -P 9 0 1k",
        "read -P 0x01 10 20",
        "read -v 102390 40",
        "read -C 0 64k",
        "read -q 0 1k",
        "read 0 0",
        "read 2M 512",
        "read 1M 2M",
        "read 0 3G",
        "read x 512",
        "read 0 x",
        "read 0 -- -5",
        "read 0 9E",
        "read -P 300 0 512",
        "read -P x 0 512",
        "read -s 1 0 512",
        "read -P 1 -s 512 -l 512 0 1k",
        "read -P 1 -s 512 -l 1k 0 1k",
        "read -P 2 -s 100k 0 1k",
        "read -Z 0 512",
        "read 0",
        "read",
        "read 0 1 2",
        "readv -P 1 0 512 1k 1.5k",
        "readv -v 1048000 16 600",
        "readv -P 9 0 512 512",
        "write -P 7 100 200",
        "write 1.5k 2k",
        "write -q 0 1k",
        "write -C 0 1k",
        "write -z 4096 4096",
        "write -z -u 100 90000",
        "write -f -P 3 0 512",
        "write 0 0",
        "write 2M 512",
        "write -u 0 1k",
        "write -n 0 1k",
        "write -z -P 4 0 1k",
        "write -s /nothing 0 512",
        "write -P 300 0 1",
        "write 0 3G",
        "write -1 512",
        "write 0",
        "writev -P 4 0 512 1024",
        "writev 77 100",
        "writev 0",
        "aio_write 0",
        "discard 0",
        "discard -q 0 64k",
        "discard 0 3G",
        "discard 1 2 3",
        "length",
        "l",
        "sleep",
        "sleep 1 2",
        "truncate",
        "truncate x",
        "truncate 1M",
        "flush",
        "f",
        "flush 1",
        "alloc 0 128k",
        "alloc 0",
        "alloc 100",
        "alloc x",
        "map",
        "quit",
        "foo",
        "help foo",
        "close",
        "",
    ] {
        same(folder, "raw", "image", &[command]);
    }
}

#[test]
fn commands_in_a_row_print_and_do_what_those_of_qemu_io_do() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    for commands in [
        &[
            "write -P 5 0 1k",
            "read -P 5 0 1k",
            "foo",
            "read -P 5 512 512",
        ][..],
        &[
            "aio_write -P 5 0 4k",
            "aio_flush",
            "aio_read -P 5 0 4k",
            "aio_flush",
            "length",
        ],
        &["aio_read -P 6 0 4k", "aio_flush"],
        &["aio_read -v 1048064 1k", "aio_flush"],
        &["aio_write -z 0 64k", "aio_flush", "read -P 0 0 64k"],
        &["aio_write -P 1 -z 0 64k"],
        &["aio_write -u 0 64k"],
        &["aio_write 20M 512", "aio_flush"],
        // What is not whole sectors, after what is.
        &[
            "aio_write -P 5 1k 1k",
            "aio_flush",
            "aio_write -P 6 1500 700",
            "aio_flush",
        ],
        &["aio_write -z 100 70000", "aio_flush", "read -P 0 100 70000"],
        &[
            "aio_read -P 1 5 1000",
            "aio_flush",
            "aio_read -v 102395 20",
            "aio_flush",
        ],
        &["aio_write 0 0", "aio_flush", "aio_read 512 0", "aio_flush"],
        &["close", "read 0 1"],
        &["truncate 3M", "length", "read -P 0 2M 1M"],
        &["reopen -r", "read 0 512", "reopen -w", "write 0 512"],
        &["reopen -r", "write 0 512"],
        &["sleep 1", "q", "read 0 512"],
    ] {
        same(folder, "raw", "image", commands);
    }
}

#[test]
fn any_number_of_requests_may_be_under_way() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f qcow2 -o cluster_size=4k image 1M").good();
    let place = |number: u64| number * 4096 + 1024;
    let commands: Vec<String> = (0..256)
        .rev()
        .map(|number| format!("aio_write -P {} {} 2k", number % 200 + 1, place(number)))
        .collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    // The image is closed with some of them under way.
    let said = io(folder, true, "qcow2", "image", &commands).good();
    assert_eq!(said.matches("wrote 2048/2048").count(), 256);
    let commands: Vec<String> = (0..256)
        .map(|number| format!("read -P {} {} 2k", number % 200 + 1, place(number)))
        .collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    io(folder, false, "qcow2", "image", &commands).good();
    img(folder, "check -q -f qcow2 image").good();
}

#[test]
fn a_qcow2_image_is_read_and_looked_at_as_by_qemu_io() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for options in [
        "cluster_size=64k",
        "extended_l2=on",
        "compat=0.10",
        "cluster_size=512",
    ] {
        let _ = std::fs::remove_file(folder.join("image"));
        img(folder, &format!("create -q -f qcow2 -o {options} image 5M")).good();
        let commands = [
            "write -P 1 0 100k",
            "write -P 2 1M 64k",
            "write -P 3 4M 513",
        ];
        io(folder, false, "qcow2", "image", &commands).good();
        let commands = [
            "read -P 1 5 1000",
            "read -P 2 1M 64k",
            "read -v 4194800 40",
            "length",
            "info",
            "map",
            "alloc 0 5M",
            "alloc 3M",
        ];
        let theirs = io(folder, false, "qcow2", "image", &commands);
        let mut arguments = vec!["disk", "io", "-r", "-f", "qcow2"];
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push("image");
        let ours = Command::new(env!("CARGO_BIN_EXE_ballast"))
            .current_dir(folder)
            .args(arguments)
            .output()
            .unwrap();
        let ours = String::from_utf8(ours.stdout).unwrap();
        assert_eq!(normalised(&theirs.good()), normalised(&ours), "{options}");
    }
}

#[test]
fn a_qcow2_image_is_written_as_by_qemu_io() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for options in [
        "cluster_size=64k",
        "extended_l2=on",
        "cluster_size=4k,refcount_bits=8",
    ] {
        let _ = std::fs::remove_file(folder.join("image"));
        img(folder, &format!("create -q -f qcow2 -o {options} image 5M")).good();
        let before = ["write -P 1 0 100k", "write -P 2 1M 64k"];
        io(folder, false, "qcow2", "image", &before).good();
        let commands = [
            "write -P 5 10 1000",
            "write -P 6 65530 20",
            "writev -P 7 2M 512 64k 1k",
            "write -z 1000k 30k",
            "write -z -u 64k 64k",
            "discard 2M 64k",
            "aio_write -P 8 3M 1M",
            "aio_flush",
            "aio_read -P 8 3M 1M",
            "aio_flush",
            "flush",
            "read -P 5 10 1000",
            "read -P 0 64k 64k",
            "read -P 8 3M 1M",
            "write -P 9 5242368 512",
            "reopen",
            "read -P 9 5242368 512",
            "length",
        ];
        same(folder, "qcow2", "image", &commands);
        img(folder, "compare -f qcow2 -F qcow2 theirs ours").good();
        img(folder, "check -f qcow2 ours").good();
        assert_eq!(
            disk(folder, "check -f qcow2 ours").code,
            Some(0),
            "{options}"
        );
    }
}

fn talk(folder: &Path, program: &str, arguments: &[&str], lines: &str) -> Said {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn commands_are_read_from_standard_input_too() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    let lines = "read 0 512\n\n  length \nwrite -P 4 0 100\nq\nlength\n";
    let theirs = talk(folder, "qemu-io", &["-f", "raw", "image"], lines);
    let ballast = env!("CARGO_BIN_EXE_ballast");
    let ours = talk(
        folder,
        ballast,
        &["disk", "io", "-f", "raw", "image"],
        lines,
    );
    assert_eq!(normalised(&theirs.out), normalised(&ours.out));
    // The end of the input is an end too, after a last prompt.
    let lines = "length\nread 0 512";
    let theirs = talk(folder, "qemu-io", &["-f", "raw", "image"], lines);
    let ours = talk(
        folder,
        ballast,
        &["disk", "io", "-f", "raw", "image"],
        lines,
    );
    assert_eq!(normalised(&theirs.out), normalised(&ours.out));
    assert!(ours.out.ends_with("qemu-io> "), "{ours:?}");
    // The image is opened by a command.
    let lines =
        "length\nopen -o driver=raw image\nlength\nopen image\nclose\nopen -r image\nwrite 0 512\n";
    let said = talk(folder, ballast, &["disk", "io"], lines);
    assert_eq!(said.code, Some(1));
    assert_eq!(said.out.matches("2 MiB").count(), 1, "{said:?}");
    for error in ["no file open", "file open already", "never guessed"] {
        assert!(said.err.contains(error), "{error}: {said:?}");
    }
}

#[test]
fn what_is_not_there_is_refused_and_not_passed_over() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    let before = std::fs::read(folder.join("image")).unwrap();
    for command in [
        "write -c 0 64k",
        "write -b 0 512",
        "read -b 0 512",
        "open -U image",
        "truncate -m full 3M",
        "truncate 0",
    ] {
        let said = io(folder, true, "raw", "image", &[command]);
        assert_eq!(said.code, Some(1), "{command}: {said:?}");
        assert!(!said.out.contains("wrote"), "{command}");
    }
    assert!(before == std::fs::read(folder.join("image")).unwrap());
    disk(folder, "io image -c length").refused("never guessed");
    disk(folder, "io -f raw missing -c length").refused("can't open");
}

#[test]
fn the_shell_is_confined_and_its_image_is_locked() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    let mut child = Command::new(env!("CARGO_BIN_EXE_ballast"))
        .args([
            "disk",
            "io",
            "-f",
            "raw",
            "-c",
            "length",
            "-c",
            "sleep 600000",
            "image",
        ])
        .current_dir(folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut line = [0; 6];
    std::io::Read::read_exact(&mut output, &mut line).unwrap();
    assert_eq!(&line, b"2 MiB\n");
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "Threads:\t1"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert_ne!(
        img(folder, "convert -f raw -O raw image copy").code,
        Some(0)
    );
    disk(folder, "info -f raw image").refused("in use");
    disk(folder, "convert -f raw -O qcow2 image copy").refused("in use");
    child.kill().unwrap();
    child.wait().unwrap();
}
