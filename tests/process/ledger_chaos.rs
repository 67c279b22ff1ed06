//! SIGKILL to anyone at any moment: what is left must be neither too much nor too little.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm::overcommit::ledger::{Directory, Patience};

use super::ledger::{SLEEPER, launch, ledger, snapshot};
use crate::support::http::Client;

/// How many are killed.
const KILLS: u64 = 150;
/// How many live at a time, and how many of them fit.
const PATIENCE: Patience = Patience {
    time: Duration::from_secs(60),
    pause: Duration::from_millis(2),
};
const AT_A_TIME: u64 = 5;
const FIT: u64 = 2;

/// Numbers without an order (splitmix64).
fn random(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[derive(Default)]
struct Counts {
    killed: AtomicU64,
    admitted: AtomicU64,
    refused: AtomicU64,
    looks: AtomicU64,
}

#[test]
fn whoever_is_killed_at_whatever_moment_never_more_is_admitted_than_fits_and_nothing_is_lost() {
    let dir = ledger(FIT * SLEEPER);
    let longest = 3 * time_of_a_boot(dir.path());
    let counts = Counts::default();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lives: Vec<_> = (0..AT_A_TIME)
            .map(|life| {
                let (dir, counts) = (dir.path(), &counts);
                scope.spawn(move || {
                    let mut seed = life << 32;
                    while counts.killed.fetch_add(1, Ordering::Relaxed) < KILLS {
                        seed += 1;
                        // Before there is a socket, in the middle of a boot, long after.
                        let wait = longest.mul_f64((random(seed) % 1000) as f64 / 1000.0);
                        let ballast = launch(dir).spawn();
                        // Boots and shuts down over and over until it is killed.
                        let socket = ballast.socket();
                        let config = ballast.sleeper();
                        std::thread::scope(|scope| {
                            scope.spawn(move || {
                                if let Some(mut client) = patiently(&socket) {
                                    while let Some(status) = once(&mut client, &config) {
                                        let count = match status {
                                            204 => &counts.admitted,
                                            507 => &counts.refused,
                                            other => panic!("status {other}"),
                                        };
                                        count.fetch_add(1, Ordering::Relaxed);
                                    }
                                }
                            });
                            std::thread::sleep(wait);
                            drop(ballast.kill());
                        });
                    }
                })
            })
            .collect();
        // While it has the lock nobody is admitted, so that what it reads one after the other
        // was there at once.
        scope.spawn(|| {
            let directory = Directory::open(dir.path()).unwrap();
            while !done.load(Ordering::Relaxed) {
                let locked = directory.lock(PATIENCE).unwrap();
                let seen = directory.snapshot().unwrap();
                drop(locked);
                let fixed = seen.records.iter().map(|(_, r)| r.reservation.fixed());
                let taken: u64 = fixed.sum();
                assert!(taken <= FIT * SLEEPER, "{taken} of {}", FIT * SLEEPER);
                assert!(seen.unreadable.is_empty(), "{:?}", seen.unreadable);
                counts.looks.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        for life in lives {
            life.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (admitted, refused) = (count(&counts.admitted), count(&counts.refused));
    eprintln!(
        "{KILLS} killed; {admitted} boots admitted, {refused} refused, {} looks",
        count(&counts.looks)
    );
    assert!(admitted > 10 && refused > 0 && count(&counts.looks) > 10);

    // Nothing of the dead is in the way of as many as fit.
    assert!(snapshot(dir.path()).records.is_empty());
    let last: Vec<_> = (0..FIT).map(|_| launch(dir.path()).start()).collect();
    for ballast in &last {
        let mut client = ballast.api();
        client.put_json("vm.create", &ballast.sleeper());
        client.put("vm.boot");
    }
    let left = snapshot(dir.path());
    assert_eq!((left.records.len() as u64, left.stale.len()), (FIT, 0));
    let files = std::fs::read_dir(dir.path()).unwrap().count() as u64;
    assert_eq!(files, FIT + 1, "the records and the limits");
}

/// How long it takes from nothing to a VM that runs, with all of them at it.
fn time_of_a_boot(dir: &std::path::Path) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                let ballast = launch(dir).start();
                let config = ballast.sleeper().to_string();
                let mut client = ballast.api();
                client.request("PUT", "vm.create", Some(&config));
                client.request("PUT", "vm.boot", None);
            });
        }
    });
    start.elapsed()
}

/// Connects as soon as that is possible; gives up when the process is gone.
fn patiently(socket: &std::path::Path) -> Option<Client> {
    for _ in 0..20_000 {
        if !socket.parent().is_some_and(std::path::Path::exists) {
            return None;
        }
        if let Ok(client) = Client::connect(socket) {
            return Some(client);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Creates, boots, deletes; the status that says whether it was admitted, or nothing where nobody
/// answers any more.
fn once(client: &mut Client, config: &serde_json::Value) -> Option<u16> {
    let body = config.to_string();
    let mut ask = |operation: &str, body: Option<&str>| {
        let answer = client.try_request("PUT", operation, body, "").ok()?;
        Some(answer.status)
    };
    let created = ask("vm.create", Some(&body))?;
    if created != 204 {
        return Some(created);
    }
    let booted = ask("vm.boot", None)?;
    ask("vm.delete", None)?;
    Some(booted)
}
