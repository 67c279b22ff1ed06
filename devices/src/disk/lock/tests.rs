use std::process::{Command, Output, Stdio};

use super::LockGranularity::{ByteRange, Full};
use super::*;

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn lock(
    image: &tempfile::NamedTempFile,
    writer: bool,
    granularity: LockGranularity,
) -> Result<ImageLock, LockError> {
    let file = File::options()
        .read(true)
        .write(writer)
        .open(image.path())
        .unwrap();
    ImageLock::take(Arc::new(file), writer, granularity)
}

#[test]
fn a_writer_excludes_everybody_and_readers_exclude_writers() {
    for ours in [ByteRange, Full] {
        for theirs in [ByteRange, Full] {
            let image = image();
            let writer = lock(&image, true, ours).unwrap();
            for other in [true, false] {
                let refused = lock(&image, other, theirs).err().unwrap();
                assert!(matches!(refused, LockError::Held(_)), "{ours:?} {theirs:?}");
            }
            drop(writer);
            let _reader = lock(&image, false, ours).unwrap();
            let refused = lock(&image, true, theirs).err().unwrap();
            assert!(matches!(refused, LockError::Held(_)), "{ours:?} {theirs:?}");
        }
    }
}

#[test]
fn any_number_of_readers_share_an_image() {
    for granularity in [ByteRange, Full] {
        let image = image();
        let readers: Vec<_> = (0..5)
            .map(|_| lock(&image, false, granularity).unwrap())
            .collect();
        assert!(lock(&image, true, granularity).is_err());
        drop(readers);
        lock(&image, true, granularity).unwrap();
    }
}

#[test]
fn a_refused_lock_leaves_nothing_behind() {
    let image = image();
    let reader = lock(&image, false, ByteRange).unwrap();
    let file = Arc::new(
        File::options()
            .read(true)
            .write(true)
            .open(image.path())
            .unwrap(),
    );
    assert!(ImageLock::take(file.clone(), true, ByteRange).is_err());
    drop(reader);
    // `file` is still open; only its locks are gone.
    lock(&image, true, ByteRange).unwrap();
    drop(file);
}

/// Runs one of QEMU's tools on the image that `{}` stands for; `None`, loudly, where it is not
/// installed.
fn qemu(tool: &str, arguments: &[&str], image: &tempfile::NamedTempFile) -> Option<Output> {
    let path = image.path().to_str().unwrap();
    match Command::new(tool)
        .args(
            arguments
                .iter()
                .map(|argument| argument.replace("{}", path)),
        )
        .stdin(Stdio::null())
        .output()
    {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("SKIPPED: {tool} could not be run ({error}); install qemu-utils");
            None
        }
    }
}

#[test]
fn qemu_refuses_an_image_that_we_write_to() {
    for granularity in [ByteRange, Full] {
        let image = image();
        let writer = lock(&image, true, granularity).unwrap();
        let write = ["-f", "raw", "-c", "write -P 1 0 512", "{}"];
        let Some(output) = qemu("qemu-io", &write, &image) else {
            return;
        };
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("lock"), "{text}");
        let copy = ["convert", "-f", "raw", "-O", "raw", "{}", "{}.copy"];
        let output = qemu("qemu-img", &copy, &image).unwrap();
        assert!(!output.status.success(), "a copy of it would be torn");
        drop(writer);
        let output = qemu("qemu-io", &write, &image).unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn qemu_may_read_an_image_that_we_only_read() {
    let image = image();
    let _reader = lock(&image, false, ByteRange).unwrap();
    let read = ["-r", "-f", "raw", "-c", "read 0 512", "{}"];
    let Some(output) = qemu("qemu-io", &read, &image) else {
        return;
    };
    assert!(output.status.success(), "{output:?}");
    let write = ["-f", "raw", "-c", "write -P 1 0 512", "{}"];
    assert!(!qemu("qemu-io", &write, &image).unwrap().status.success());
}

/// A lock on another opening of the image, for a writer instead of `reader`.
fn beside_own_reader(
    image: &tempfile::NamedTempFile,
    reader: &Arc<ImageLock>,
) -> Result<ImageLock, LockError> {
    let file = File::options().read(true).write(true).open(image.path());
    ImageLock::beside_own_reader(Arc::new(file.unwrap()), reader)
}

#[test]
fn a_reader_becomes_the_writer_and_a_reader_again() {
    let image = image();
    let reader = Arc::new(lock(&image, false, ByteRange).unwrap());
    for _ in 0..3 {
        let writer = beside_own_reader(&image, &reader).unwrap();
        for granularity in [ByteRange, Full] {
            for other in [true, false] {
                assert!(lock(&image, other, granularity).is_err(), "{granularity:?}");
            }
        }
        assert!(
            beside_own_reader(&image, &reader).is_err(),
            "there is one already"
        );
        // That has not taken anything away from the first one.
        assert!(lock(&image, false, ByteRange).is_err());
        drop(writer);
        assert!(lock(&image, true, ByteRange).is_err(), "it is read again");
        lock(&image, false, ByteRange).unwrap();
    }
    // The writer outlives the reader where the disk goes on with the image.
    let writer = beside_own_reader(&image, &reader).unwrap();
    drop(reader);
    assert!(lock(&image, false, ByteRange).is_err());
    drop(writer);
    lock(&image, true, Full).unwrap();
}

#[test]
fn a_reader_does_not_become_the_writer_while_anybody_else_reads() {
    let image = image();
    let reader = Arc::new(lock(&image, false, ByteRange).unwrap());
    for granularity in [ByteRange, Full] {
        let other = lock(&image, false, granularity).unwrap();
        let refused = beside_own_reader(&image, &reader).err().unwrap();
        assert!(matches!(refused, LockError::Held(_)), "{granularity:?}");
        drop(other);
        assert!(lock(&image, true, ByteRange).is_err(), "it is still read");
        lock(&image, false, ByteRange).unwrap();
    }
    drop(beside_own_reader(&image, &reader).unwrap());
}

#[test]
fn qemu_respects_a_reader_that_became_the_writer_and_we_respect_qemu() {
    let image = image();
    let file = Arc::new(image.reopen().unwrap());
    let mut reader = Arc::new(lock(&image, false, ByteRange).unwrap());
    let write = ["-f", "raw", "-c", "write -P 1 0 512", "{}"];
    let copy = ["convert", "-f", "raw", "-O", "raw", "{}", "{}.copy"];
    let may = |tool: &str, arguments: &[&str]| {
        let output = qemu(tool, arguments, &image)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || text.contains("lock"), "{text}");
        Some(output.status.success())
    };
    for outlives in [false, true] {
        let writer = beside_own_reader(&image, &reader).unwrap();
        let Some(written) = may("qemu-io", &write) else {
            return;
        };
        assert!(!written);
        assert_eq!(may("qemu-img", &copy), Some(false), "it would be torn");
        if !outlives {
            drop(writer);
            assert_eq!(may("qemu-io", &write), Some(false));
            assert_eq!(may("qemu-img", &copy), Some(true));
            continue;
        }
        let reader = std::mem::replace(&mut reader, Arc::new(ImageLock::nothing(file.clone())));
        drop(reader);
        assert_eq!(may("qemu-io", &write), Some(false));
        drop(writer);
        assert_eq!(may("qemu-io", &write), Some(true));
    }
    std::fs::remove_file(image.path().with_file_name(format!(
        "{}.copy",
        image.path().file_name().unwrap().display()
    )))
    .unwrap();
    while_qemu_has(&image, &["-f", "raw"], || {
        let reader = Arc::new(ImageLock::beside_own(file.clone()).unwrap());
        let refused = beside_own_reader(&image, &reader).err().unwrap();
        assert!(matches!(refused, LockError::Held(_)), "QEMU writes to it");
    });
}

/// Whoever tries all the time to become the writer never does while there is a reader that becomes
/// one and ceases to be one.
#[test]
fn there_is_no_moment_for_another_writer() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let image = image();
    let reader = Arc::new(lock(&image, false, ByteRange).unwrap());
    let (done, tries) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                assert!(lock(&image, true, ByteRange).is_err());
                tries.store(true, Ordering::SeqCst);
            }
        });
        let mut became = 0;
        let mut rounds = 0;
        while rounds < 500 || !tries.load(Ordering::SeqCst) {
            // Refused where the other one is just looking.
            became += usize::from(beside_own_reader(&image, &reader).is_ok());
            rounds += 1;
        }
        done.store(true, Ordering::SeqCst);
        println!("became the writer {became} times of {rounds}");
    });
    drop(beside_own_reader(&image, &reader).unwrap());
}

/// Holds `image` open in a qemu-io for as long as `body` runs.
fn while_qemu_has(image: &tempfile::NamedTempFile, options: &[&str], body: impl FnOnce()) {
    use std::io::{BufRead, BufReader, Write};
    let child = Command::new("qemu-io")
        .args(options)
        .arg(image.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            eprintln!("SKIPPED: qemu-io could not be run ({error}); install qemu-utils");
            return;
        }
    };
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "length").unwrap();
    // Its answer says that the image is open.
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    body();
    drop(input);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn we_refuse_an_image_that_qemu_writes_to() {
    let image = image();
    while_qemu_has(&image, &["-f", "raw"], || {
        for granularity in [ByteRange, Full] {
            for writer in [true, false] {
                let refused = lock(&image, writer, granularity).err().unwrap();
                assert!(
                    matches!(refused, LockError::Held(_)),
                    "{granularity:?} {writer}"
                );
            }
        }
    });
    lock(&image, true, ByteRange).unwrap();
}

#[test]
fn we_may_read_an_image_that_qemu_only_reads() {
    let image = image();
    while_qemu_has(&image, &["-r", "-f", "raw"], || {
        lock(&image, false, ByteRange).unwrap();
        lock(&image, false, Full).unwrap();
    });
}
