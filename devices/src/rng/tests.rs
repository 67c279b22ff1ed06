//! The entropy device over an in-memory guest, inside its real filter.

use std::os::unix::fs::FileExt;

use super::*;
use crate::block::tests::driver::{BUFFERS, Driver, MEMORY, memory, order_and_wait};
use crate::sandbox::SeccompMode;
use crate::worker::Order;

fn build(src: impl Into<PathBuf>) -> Result<Rng, BuildError> {
    let config = RngConfig {
        common: PciCommon::default(),
        src: src.into(),
    };
    let context = BuildContext {
        reporter: Reporter::silent(),
        seccomp: SeccompMode::Enforce,
        discards: crate::guest_memory::discard::inhibit::Inhibitor::default(),
    };
    Rng::new(&config, context)
}

fn start(src: impl Into<PathBuf>) -> (Rng, Driver) {
    let rng = build(src).unwrap();
    let mut driver = Driver::new(memory(), 0, QUEUE_SIZE, true);
    driver.activate(&rng.workers()[0], 0);
    (rng, driver)
}

#[test]
fn buffers_are_filled_with_bytes_of_the_source() {
    let (_rng, mut driver) = start("/dev/urandom");
    for _ in 0..200 {
        driver.poke(BUFFERS, &[0; 64]);
        let head = driver.chain(&[(BUFFERS, 32, true), (BUFFERS + 32, 32, true)]);
        driver.offer(head);
        driver.ring();
        assert_eq!(driver.wait_used(), (head, 64));
        assert_ne!(driver.peek(BUFFERS, 32), [0; 32]);
        assert_ne!(driver.peek(BUFFERS + 32, 32), [0; 32]);
    }
}

#[test]
fn a_huge_buffer_gets_64_kib_and_a_wrong_one_nothing() {
    let (_rng, mut driver) = start("/dev/urandom");
    let cases = [
        ((BUFFERS, 1 << 20, true), 64 << 10),
        ((BUFFERS, 64, false), 0),
        ((BUFFERS, 0, true), 0),
        ((MEMORY + 0x1000, 64, true), 0),
        ((u64::MAX, u32::MAX, true), 0),
    ];
    for (piece, written) in cases {
        let head = driver.chain(&[piece]);
        driver.offer(head);
        driver.ring();
        assert_eq!(driver.wait_used(), (head, written), "{piece:?}");
    }
}

#[test]
fn a_regular_file_begins_anew_at_its_end() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(b"abcdef", 0).unwrap();
    let (_rng, mut driver) = start(file.path());
    let mut got = Vec::new();
    while got.len() < 12 {
        let head = driver.chain(&[(BUFFERS, 4, true)]);
        driver.offer(head);
        driver.ring();
        let (_, written) = driver.wait_used();
        assert!(written > 0);
        got.extend(driver.peek(BUFFERS, written as usize));
    }
    assert_eq!(&got[..12], b"abcdefabcdef");
}

#[test]
fn a_source_that_runs_dry_keeps_the_buffer_and_does_not_hang_the_device() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(b"abcdef", 0).unwrap();
    let (rng, mut driver) = start(file.path());
    file.as_file().set_len(0).unwrap();
    let head = driver.chain(&[(BUFFERS, 4, true)]);
    driver.offer(head);
    driver.ring();
    order_and_wait(&rng.workers()[0], Order::Pause);
    assert_eq!(driver.try_used(), None);
    rng.workers()[0].order(Order::Resume);
    file.as_file().write_all_at(b"ghijkl", 0).unwrap();
    assert_eq!(driver.wait_used(), (head, 4));
    assert_eq!(driver.peek(BUFFERS, 4), b"ghij");
    order_and_wait(&rng.workers()[0], Order::Reset);
}

#[test]
fn what_is_no_source_of_bytes_is_refused_without_blocking() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, mode, 0).unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    for path in [folder.path(), &fifo, &empty, &folder.path().join("missing")] {
        let Err(BuildError::Invalid(invalid)) = build(path) else {
            panic!("{} was accepted", path.display());
        };
        assert_eq!(invalid.field, "src");
    }
}
