//! The options of `ballast disk io`, which are those of qemu-io: suites pass them to every call.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::shell::{normalised, sample};
use super::tools::{Said, folder, img, io, run};

/// By qemu-io, and by us.
fn both(folder: &Path, line: &[&str]) -> [Said; 2] {
    [run("qemu-io", folder, line), ours(folder, line)]
}

fn ours(folder: &Path, line: &[&str]) -> Said {
    let mut words = vec!["disk", "io"];
    words.extend(line);
    run(env!("CARGO_BIN_EXE_ballast"), folder, &words)
}

#[test]
fn the_options_of_qemu_io_mean_what_they_mean_there() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    for line in [
        &["--cache", "writeback", "--aio", "threads", "-f", "raw"][..],
        &["--format=raw", "--cache=writethrough", "-i", "io_uring"],
        &["-t", "unsafe", "-f", "raw", "--discard=ignore"],
        &["-d", "unmap", "-f", "raw"],
        &["-d", "on", "-f", "raw"],
        // The last of them holds.
        &["-t", "none", "-t", "writeback", "-f", "qcow2", "-f", "raw"],
        &["--read-only", "-f", "raw"],
        &["--image-opts"],
        &["-f", "raw", "--cmd=length"],
        &["-t", "foo", "-f", "raw"],
        &["-i", "foo", "-f", "raw"],
        &["-d", "foo", "-f", "raw"],
    ] {
        let mut line = line.to_vec();
        let image = match line.last() {
            Some(&"--image-opts") => "driver=raw,file.filename=image",
            Some(&"--cmd=length") => "missing",
            _ => "image",
        };
        for command in ["write -P 3 1k 1k", "flush", "discard 0 64k", "read 1M 64k"] {
            line.extend(["--cmd", command]);
        }
        line.push(image);
        let [theirs, ours] = both(folder, &line);
        assert_eq!(normalised(&theirs.out), normalised(&ours.out), "{line:?}");
        assert_eq!((theirs.code, theirs.err), (ours.code, ours.err), "{line:?}");
    }
}

#[test]
fn what_qemu_io_has_and_this_has_not_is_refused_by_name() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    let before = std::fs::read(folder.join("image")).unwrap();
    for (option, name) in [
        (&["-s"][..], "--snapshot"),
        (&["-C"], "--copy-on-read"),
        (&["-k"], "--native-aio"),
        (&["-U"], "--force-share"),
        (&["-T", "x"], "--trace"),
        (&["--object", "secret,id=0"], "--object"),
        (&["-i", "native"], "aio=native"),
    ] {
        let mut line = option.to_vec();
        line.extend(["-f", "raw", "-c", "write 0 512", "image"]);
        let said = ours(folder, &line);
        assert_eq!(said.out, "", "{name}");
        said.refused(&format!("{name} is not supported"));
    }
    for (list, why) in [
        ("driver=raw", "file.filename"),
        ("file.filename=image", "never guessed"),
        ("driver=vmdk,file.filename=image", "neither raw nor qcow2"),
        ("driver=raw,file.filename=image,size=512", "size=512 is not"),
    ] {
        ours(folder, &["--image-opts", "-c", "write 0 512", list]).refused(why);
    }
    let both = [
        "--image-opts",
        "-f",
        "raw",
        "driver=raw,file.filename=image",
    ];
    ours(folder, &both).refused("mutually exclusive");
    assert!(before == std::fs::read(folder.join("image")).unwrap());
}

#[test]
fn with_cache_writethrough_what_was_written_outlives_the_process() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for mode in ["writethrough", "directsync"] {
        let _ = std::fs::remove_file(folder.join("image"));
        img(folder, "create -q -f qcow2 image 8M").good();
        let commands = [
            "-c",
            "write -P 5 1M 64k",
            "-c",
            "aio_write -P 6 2M 64k",
            "-c",
            "aio_flush",
            "-c",
            "write -z 1M 4k",
            "-c",
            "sigraise KILL",
            "image",
        ];
        // The kernel keeps a ring, and with it the image's lock, a little longer than the process.
        let mut line = vec!["-f", "qcow2", "-i", "threads", "-t", mode];
        line.extend(commands);
        let said = ours(folder, &line);
        if mode == "directsync" && said.err.contains("Invalid argument") {
            // The file system has no O_DIRECT.
            continue;
        }
        assert_eq!(said.code, None, "{said:?}");
        let commands = ["read -P 5 1028k 60k", "read -P 6 2M 64k", "read -P 0 1M 4k"];
        io(folder, false, "qcow2", "image", &commands).good();
    }
}

#[test]
fn memory_that_is_aligned_to_nothing_is_read_and_written_past_the_page_cache() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for (format, aio) in [
        ("raw", "threads"),
        ("qcow2", "threads"),
        ("qcow2", "io_uring"),
    ] {
        let _ = std::fs::remove_file(folder.join("image"));
        img(folder, &format!("create -q -f {format} image 2M")).good();
        let mut line = vec!["-f", format, "-i", aio, "-n", "-m"];
        for command in [
            "write -P 5 0 256k",
            "write -P 6 1000 5000",
            "aio_write -P 7 512k 64k",
            "aio_write -P 8 600k 512",
            "aio_flush",
            "read -P 6 1000 5000",
            "aio_read -P 7 512k 64k",
            "aio_flush",
            "write -z 100 10",
        ] {
            line.extend(["-c", command]);
        }
        line.push("image");
        let said = ours(folder, &line);
        if said.err.contains("Invalid argument") {
            eprintln!("SKIPPED: the file system has no O_DIRECT");
            return;
        }
        let said = said.good();
        assert!(!said.contains("failed"), "{format} {aio}: {said}");
        let commands = [
            "read -P 5 0 100",
            "read -P 0 100 10",
            "read -P 5 110 890",
            "read -P 6 1000 5000",
            "read -P 5 6000 256144",
            "read -P 7 512k 64k",
            "read -P 8 600k 512",
            "read -P 0 614912 1M",
        ];
        let said = io(folder, false, format, "image", &commands).good();
        assert!(!said.contains("failed"), "{format} {aio}: {said}");
    }
}

#[test]
fn a_discard_that_is_to_be_ignored_gives_nothing_back() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    let blocks = || std::fs::metadata(folder.join("image")).unwrap().blocks();
    let before = blocks();
    let commands = ["-c", "discard 0 64k", "-c", "write -z -u 0 64k", "image"];
    for (mode, kept) in [("ignore", true), ("unmap", false)] {
        let mut line = vec!["-f", "raw", "-d", mode];
        line.extend(commands);
        ours(folder, &line).good();
        assert_eq!(blocks() == before, kept, "{mode}");
    }
    // What it is beyond the end is still wrong.
    let line = ["-f", "raw", "-d", "ignore", "-c", "discard 2M 64k", "image"];
    let [theirs, ours] = both(folder, &line);
    assert_eq!((theirs.code, theirs.out), (ours.code, ours.out));
}

#[test]
fn an_image_is_opened_anew_with_other_options_or_stays_open_as_it_was() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    img(folder, "create -q -f qcow2 thin 1M").good();
    for (commands, out, err) in [
        (
            &["close", "open -o driver=qcow2 thin", "length"][..],
            "1 MiB\n",
            "",
        ),
        (
            &["close", "open -odriver=qcow2,file.filename=thin", "length"],
            "1 MiB\n",
            "",
        ),
        (&["reopen -o read-only=on", "write 0 512"], "", "read-only"),
        (&["close", "open -r image", "write 0 512"], "", "read-only"),
        (
            &["reopen -o lazy-refcounts=on", "length"],
            "2 MiB\n",
            "lazy-refcounts=on is not",
        ),
        (
            &["reopen -o driver=qcow2", "length"],
            "2 MiB\n",
            "Cannot change the option 'driver'",
        ),
        (
            &["reopen -c foo", "length"],
            "2 MiB\n",
            "Invalid cache option: foo",
        ),
        (&["reopen -c writethrough", "length"], "2 MiB\n", ""),
        (
            &["close", "open -t foo image"],
            "",
            "Invalid cache option: foo",
        ),
        (
            &["close", "open -d foo image"],
            "",
            "Invalid discard option: foo",
        ),
        (&["close", "open -U image"], "", "not supported"),
        (&["close", "open -k image"], "", "not supported"),
    ] {
        let said = io(folder, true, "raw", "image", commands);
        assert_eq!(said.out, out, "{commands:?}");
        assert!(said.err.contains(err), "{commands:?}: {said:?}");
        assert_eq!(
            said.code,
            Some(if err.is_empty() { 0 } else { 1 }),
            "{commands:?}"
        );
    }
}

#[test]
fn what_can_not_be_changed_is_told_in_the_words_of_qemu_io() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    sample(folder);
    for command in [
        "reopen -o driver=qcow2",
        "reopen -o driver=raw",
        "reopen -r -o read-only=on",
        "reopen -c none -o cache.direct=on",
        "reopen -c directsync -o cache.no-flush=on",
        "reopen -o read-only=foo",
        "reopen -o cache.no-flush=bar",
        "reopen -o cache.direct=baz",
        "reopen -o auto-read-only=qux",
    ] {
        let theirs = io(folder, false, "raw", "image", &[command, "length"]);
        let ours = io(folder, true, "raw", "image", &[command, "length"]);
        assert_eq!(theirs.err, ours.err, "{command}");
        assert_eq!(
            (theirs.code, theirs.out),
            (ours.code, ours.out),
            "{command}"
        );
    }
}

#[test]
fn a_qcow2_image_grows_by_truncate_and_does_not_shrink() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f qcow2 image 1M").good();
    let commands = [
        "write -P 5 0 1M",
        "truncate 1M",
        "truncate 3M",
        "length",
        "write -P 6 2M 1M",
        "read -P 0 1M 1M",
    ];
    let said = io(folder, true, "qcow2", "image", &commands).good();
    assert!(said.contains("3 MiB\n"), "{said}");
    let commands = [
        "read -P 5 0 1M",
        "read -P 0 1M 1M",
        "read -P 6 2M 1M",
        "length",
    ];
    io(folder, false, "qcow2", "image", &commands).good();
    img(folder, "check -q -f qcow2 image").good();
    let said = io(folder, true, "qcow2", "image", &["truncate 1M"]);
    said.refused("can't be made smaller");
    let said = io(folder, true, "qcow2", "image", &["length"]).good();
    assert_eq!(said, "3 MiB\n");
}
