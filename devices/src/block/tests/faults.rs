//! What goes wrong on the host's side, and what the VMM orders meanwhile.

use super::driver::BUFFERS;
use super::*;
use crate::config::Invalid;

const PLAIN: Setup = Setup {
    direct: false,
    sync: false,
    event_idx: true,
};

#[test]
fn an_image_that_is_cut_short_behind_our_back_gives_io_errors_and_events() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        disk.file().set_len(1 << 20).unwrap();
        assert_eq!(disk.read(4096, 4096).0, IOERR, "{setup:?}");
        assert_eq!(disk.io_errors(), ["read"], "{setup:?}");
        // Half of it is there.
        assert_eq!(disk.read(2044, 4096).0, IOERR, "{setup:?}");
        assert_eq!(disk.read(0, 512), (OK, expected(0, 512)), "{setup:?}");
    }
}

#[test]
fn two_writers_never_share_an_image() {
    let image = image();
    let config = config(&image, PLAIN);
    let (first, _) = build(&config).unwrap();
    let Err(BuildError::Locked { path, .. }) = build(&config) else {
        panic!("the second one was let in");
    };
    assert_eq!(path, image.path().to_str().unwrap());
    drop(first);
    // At once: the lock does not outlive the device, not even a little.
    for _ in 0..20 {
        drop(build(&config).unwrap());
    }
}

#[test]
fn a_failed_build_leaves_no_descriptors_and_no_threads() {
    let count = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let image = image();
    image.as_file().set_len(1000).unwrap();
    let mut config = config(&image, PLAIN);
    config.num_queues = 4;
    let before = count();
    for _ in 0..50 {
        let Err(BuildError::Invalid(Invalid { field, .. })) = build(&config) else {
            panic!("it was built");
        };
        assert_eq!(field, "path");
    }
    // Other tests come and go meanwhile.
    assert!(count() < before + 50);
}

/// Fills the queue with writes of `value`, one sector each.
fn offer_writes(disk: &mut Disk, count: u64, value: u8) {
    for i in 0..count {
        let base = BUFFERS + 0x10_0000 + i * 0x1000;
        disk.header(base, 1, i);
        disk.driver.poke(base + 0x200, &[value; 512]);
        let head = disk.driver.chain(&[
            (base, 16, false),
            (base + 0x200, 512, false),
            (base + 0x400, 1, true),
        ]);
        disk.driver.offer(head);
    }
}

#[test]
fn a_paused_disk_touches_nothing_and_goes_on_where_it_was() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        for round in 0..20_u8 {
            offer_writes(&mut disk, 40, round);
            disk.driver.ring();
            disk.pause();
            let used = std::iter::from_fn(|| disk.driver.try_used()).count();
            let before = disk.on_host(0, 40 * 512);
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(disk.driver.try_used(), None, "{setup:?}");
            assert_eq!(disk.on_host(0, 40 * 512), before, "{setup:?}");
            disk.worker().order(Order::Resume);
            for _ in used..40 {
                disk.driver.wait_used();
            }
            assert_eq!(disk.on_host(0, 40 * 512), [round; 40 * 512]);
        }
    }
}

#[test]
fn a_disk_reset_under_load_comes_back_clean() {
    for setup in setups() {
        let mut disk = Disk::new(setup);
        for round in 0..20_u8 {
            offer_writes(&mut disk, 40, round);
            disk.driver.ring();
            disk.reset();
            let after = disk.driver.peek(0, 0x10_0000);
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(disk.driver.peek(0, 0x10_0000), after, "{setup:?}");
            let worker = &disk.block.workers()[0];
            disk.driver.activate(worker, 0);
            assert_eq!(disk.read(4096, 512), (OK, expected(4096 * 512, 512)));
        }
    }
}

#[test]
fn a_disk_may_be_dropped_at_any_moment() {
    for setup in setups() {
        for _ in 0..5 {
            let mut disk = Disk::new(setup);
            offer_writes(&mut disk, 40, 1);
            disk.driver.ring();
        }
    }
}

#[test]
fn a_disk_paused_or_reset_while_throttled_does_not_hang() {
    use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
    let mut disk = Disk::with(PLAIN, |config| {
        config.rate_limiter_config = Some(RateLimiterConfig {
            bandwidth: None,
            ops: Some(TokenBucketConfig {
                size: 1,
                one_time_burst: None,
                refill_time: 100,
            }),
        });
    });
    offer_writes(&mut disk, 3, 7);
    disk.driver.ring();
    disk.pause();
    disk.worker().order(Order::Resume);
    for _ in 0..3 {
        disk.driver.wait_used();
    }
    offer_writes(&mut disk, 10, 8);
    disk.driver.ring();
    disk.reset();
    let worker = &disk.block.workers()[0];
    disk.driver.activate(worker, 0);
    assert_eq!(disk.flush(), OK);
}

#[test]
fn a_disk_whose_id_has_a_zero_byte_ends_no_process() {
    let image = image();
    let mut config = config(&image, PLAIN);
    config.common.id = Some("a\0b".into());
    let reporter = Reporter::new("a\0b", Arc::new(|_, _| {}));
    let context = BuildContext {
        reporter,
        seccomp: SeccompMode::Enforce,
        discards: Inhibitor::default(),
    };
    Block::new(&config, context).unwrap();
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error_and_not_the_end_of_the_process() {
    // The limit is the whole process's, so there is one to end.
    const INSIDE: &str = "BALLAST_TEST_WITH_FILE_LIMIT";
    if std::env::var_os(INSIDE).is_none() {
        let path = "block::tests::faults::a_limit_on_the_size_of_files_is_an_error_and_not_the_end_\
                    of_the_process";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", path, "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{} {told}", output.status);
        assert!(told.contains("1 passed"), "{told}");
        return;
    }
    for setup in setups() {
        let mut disk = Disk::new(setup);
        let limit = rustix::process::Rlimit {
            current: Some(1 << 20),
            maximum: None,
        };
        let before = rustix::process::getrlimit(rustix::process::Resource::Fsize);
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
        assert_eq!(disk.write(4096, &[1; 512]), IOERR, "{setup:?}");
        assert_eq!(disk.write(0, &[1; 512]), OK, "{setup:?}");
        rustix::process::setrlimit(rustix::process::Resource::Fsize, before).unwrap();
    }
}
