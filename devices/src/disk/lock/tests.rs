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
