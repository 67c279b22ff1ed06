use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::time::Instant;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use tempfile::TempDir;
use tokio::sync::broadcast;

use super::planning::{PLANS_LAST_MS, RECENT_MS, neighbours};
use super::*;
use crate::event::Event;
use crate::overcommit::reading::{
    BalloonReading, GuestReading, HostReading, Limits as GuestLimits, Own, Reading,
};
use crate::overcommit::{Coordinator, governor};

const MIB: u64 = 1 << 20;

struct Tested {
    ledger: Ledger,
    events: broadcast::Receiver<Event>,
}

fn open(dir: &TempDir) -> Tested {
    let events = Events::new(Instant::now());
    let receiver = events.subscribe();
    Tested {
        ledger: Ledger::open(dir.path(), "/run/api.sock", events).unwrap(),
        events: receiver,
    }
}

impl Tested {
    fn events(&mut self) -> Vec<&'static str> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .map(|event| event.event)
            .collect()
    }
}

/// Leaves room for guarantees of this many bytes.
fn leave(dir: &TempDir, room: u64) {
    let overview = overview::read(dir.path()).unwrap();
    let memory = overview.host.cgroup_memory.unwrap_or(overview.host.memory);
    let text = format!("reserve = {}\n", memory - room);
    std::fs::write(dir.path().join("limits"), text).unwrap();
}

fn asked(guaranteed: u64) -> Reservation {
    Reservation {
        max: guaranteed,
        guaranteed,
        overhead: MIB,
        huge_pages: 0,
    }
}

fn snapshot(dir: &TempDir) -> Snapshot {
    Directory::open(dir.path()).unwrap().snapshot().unwrap()
}

/// A record as a process leaves it that is killed.
fn leave_dead_record(dir: &TempDir, name: &str) {
    let record = Record {
        pid: 1,
        weight: 1,
        reservation: asked(1 << 50),
        ..Record::default()
    };
    std::fs::write(dir.path().join(name), record.encode()).unwrap();
}

#[test]
fn what_one_tells_the_others_read_until_it_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = (open(&dir), open(&dir));
    let measures = Measures {
        actual: Some(5),
        ..Measures::default()
    };
    a.ledger.update("uuid", "Running", measures);
    let seen = snapshot(&dir);
    assert_eq!(seen.records.len(), 2);
    assert!(seen.stale.is_empty() && seen.unreadable.is_empty());
    let own = seen.records.iter().find(|(name, _)| *name == a.ledger.name);
    let (_, record) = own.unwrap();
    assert_eq!(record.measures.actual, Some(5));
    assert_eq!((&*record.vm, &*record.state), ("uuid", "Running"));
    assert_eq!(record.pid, std::process::id());
    assert_eq!(record.api_socket, "/run/api.sock");
    assert!(record.start_time > 0);
    drop(a);
    assert_eq!(snapshot(&dir).records.len(), 1);
    drop(b);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_is_set_aside_for_one_is_not_there_for_another_until_it_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (open(&dir), open(&dir));
    leave(&dir, 100 * MIB);
    a.ledger.reserve(asked(69 * MIB), 1).unwrap();
    assert!(matches!(
        b.ledger.check(asked(30 * MIB)),
        Err(VmmError::NotAdmitted(_))
    ));
    let refusal = b
        .ledger
        .reserve(asked(30 * MIB), 1)
        .unwrap_err()
        .to_string();
    for number in [30 * MIB, MIB, 70 * MIB] {
        assert!(refusal.contains(&number.to_string()), "{refusal}");
    }
    assert_eq!(b.events(), ["admission-refused", "admission-refused"]);
    assert_eq!(b.ledger.record().reservation, Reservation::default());
    // To ask is not to have.
    b.ledger.check(asked(29 * MIB)).unwrap();
    assert_eq!(
        snapshot(&dir)
            .records
            .iter()
            .map(|r| r.1.reservation.fixed())
            .sum::<u64>(),
        70 * MIB
    );
    b.ledger.reserve(asked(29 * MIB), 1).unwrap();
    // More of what one has is asked for anew, less is not, and a refusal leaves what there was.
    a.ledger.reserve(asked(70 * MIB), 1).unwrap_err();
    assert_eq!(a.ledger.record().reservation, asked(69 * MIB));
    a.ledger.reserve(asked(60 * MIB), 1).unwrap();
    b.ledger.reserve(asked(38 * MIB), 1).unwrap();
    a.ledger.release();
    b.ledger.reserve(asked(99 * MIB), 1).unwrap();
    // With no room at all one still keeps what one has.
    leave(&dir, 0);
    b.ledger.reserve(asked(99 * MIB), 1).unwrap();
}

#[test]
fn the_ratio_is_the_operators() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (open(&dir), open(&dir));
    let memory = overview::read(dir.path()).unwrap().host.memory;
    std::fs::write(dir.path().join("limits"), "reserve=0\nratio = 1.2").unwrap();
    let promise = |part: u64| Reservation {
        max: memory / 100 * part,
        guaranteed: MIB,
        overhead: MIB,
        huge_pages: 0,
    };
    a.ledger.reserve(promise(60), 1).unwrap();
    b.ledger.reserve(promise(61), 1).unwrap_err();
    b.ledger.reserve(promise(59), 1).unwrap();
    std::fs::write(dir.path().join("limits"), "ratio = many").unwrap();
    let error = a.ledger.check(promise(1)).unwrap_err().to_string();
    assert!(
        error.contains("limits") && error.contains("many"),
        "{error}"
    );
}

#[test]
fn records_of_the_dead_count_for_nothing_and_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    leave_dead_record(&dir, "vm-1-a.record");
    std::fs::write(dir.path().join("vm-2-b.record"), "torn").unwrap();
    std::fs::write(dir.path().join("vm-3-c.record"), "").unwrap();
    let seen = snapshot(&dir);
    assert_eq!((seen.stale.len(), seen.records.len()), (3, 0));
    assert_eq!(overview::read(dir.path()).unwrap().stale_records, 3);
    assert_eq!(snapshot(&dir).stale.len(), 3, "to look removes nothing");
    let mut a = open(&dir);
    assert_eq!(a.events(), ["overcommit-record-removed"; 3]);
    assert_eq!(snapshot(&dir).stale.len(), 0);
    leave_dead_record(&dir, "vm-1-a.record");
    leave(&dir, 100 * MIB);
    a.ledger.reserve(asked(99 * MIB), 1).unwrap();
    assert_eq!(a.events(), ["overcommit-record-removed"]);
    assert_eq!(snapshot(&dir).stale.len(), 0);
}

#[test]
fn rubbish_is_left_alone_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("README"), "x").unwrap();
    std::fs::create_dir(path("vm-1-dir.record")).unwrap();
    symlink("/etc/passwd", path("vm-1-link.record")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("vm-1-fifo.record"),
        rustix::fs::FileType::Fifo,
        Mode::RWXU,
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("vm-1-socket.record")).unwrap();
    for number in 0..500 {
        std::fs::write(path(&format!("rubbish{number}")), "vm-").unwrap();
    }
    std::fs::write(
        dir.path()
            .join(std::ffi::OsString::from_vec(b"vm-\xff.record".to_vec())),
        "",
    )
    .unwrap();
    let mut a = open(&dir);
    leave(&dir, 100 * MIB);
    a.ledger.reserve(asked(MIB), 1).unwrap();
    let seen = snapshot(&dir);
    assert_eq!(seen.foreign, 506);
    assert_eq!(seen.records.len(), 1);
    assert!(path("README").exists() && path("vm-1-fifo.record").exists());
}

#[test]
fn a_living_record_that_can_not_be_read_stops_admission_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = (open(&dir), open(&dir));
    leave(&dir, 100 * MIB);
    a.ledger.reserve(asked(50 * MIB), 1).unwrap();
    // Written by a program of the future, or broken: its owner is alive all the same.
    b.ledger
        .file
        .write_all_at(b"ballast-overcommit 7", 0)
        .unwrap();
    assert_eq!(snapshot(&dir).unreadable.len(), 1);
    let error = a.ledger.reserve(asked(51 * MIB), 1).unwrap_err();
    assert!(matches!(&error, VmmError::NotAdmitted(reason) if reason.contains("version 7")));
    a.ledger.reserve(asked(50 * MIB), 1).unwrap();
    assert_eq!(snapshot(&dir).stale.len(), 0);
    drop(b);
    a.ledger.reserve(asked(51 * MIB), 1).unwrap();
}

#[test]
fn a_record_that_was_removed_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = open(&dir);
    leave(&dir, 100 * MIB);
    a.ledger.reserve(asked(50 * MIB), 1).unwrap();
    std::fs::remove_file(dir.path().join(&a.ledger.name)).unwrap();
    let error = a.ledger.check(asked(MIB)).unwrap_err().to_string();
    assert!(error.contains("removed"), "{error}");
    a.ledger.update("", "Running", Measures::default());
    assert_eq!(a.ledger.status().degraded, None);
    let seen = snapshot(&dir);
    assert_eq!(seen.records[0].1.reservation, asked(50 * MIB));
    a.ledger.check(asked(MIB)).unwrap();
}

#[test]
fn without_its_directory_it_says_so_once_and_admits_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = open(&dir);
    leave(&dir, 100 * MIB);
    a.ledger.reserve(asked(50 * MIB), 1).unwrap();
    a.events();
    std::fs::remove_dir_all(dir.path()).unwrap();
    for _ in 0..3 {
        a.ledger.update("", "Running", Measures::default());
        a.ledger.tell_news();
    }
    assert_eq!(a.events(), ["overcommit-ledger-degraded"]);
    let degraded = a.ledger.status().degraded.unwrap();
    assert!(degraded.contains("removed"), "{degraded}");
    a.ledger.reserve(asked(50 * MIB), 1).unwrap();
    let error = a.ledger.reserve(asked(51 * MIB), 1).unwrap_err();
    assert!(matches!(error, VmmError::Host { .. }), "{error}");
    assert_eq!(a.ledger.record().reservation, asked(50 * MIB));
}

#[test]
fn a_directory_that_is_none_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path| {
        let events = Events::new(Instant::now());
        let error = Ledger::open(path, "", events).err().unwrap().to_string();
        assert!(error.starts_with(&path.display().to_string()), "{error}");
        error
    };
    refused(&dir.path().join("missing"));
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    refused(&file);
    std::fs::write(dir.path().join("limits"), "\nreserve = lots").unwrap();
    let error = refused(dir.path());
    assert!(
        error.contains("limits") && error.contains("line 2"),
        "{error}"
    );
    std::fs::write(dir.path().join("limits"), [0xff; 10_000]).unwrap();
    refused(dir.path());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    // The one file system that is read only and full of files everywhere.
    refused(Path::new("/proc/sys"));
}

#[test]
fn who_keeps_the_lock_for_ever_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = open(&dir);
    leave(&dir, 100 * MIB);
    let keeper = rustix::fs::open(dir.path(), OFlags::RDONLY, Mode::empty()).unwrap();
    flock(&keeper, FlockOperation::LockExclusive).unwrap();
    let error = a.ledger.reserve(asked(MIB), 1).unwrap_err();
    assert!(matches!(error, VmmError::Timeout(_)), "{error}");
    // A decision is made all the same, and with what was known last.
    let mut decided = 0;
    a.ledger.exchange(&mut |_| {
        decided += 1;
        Own::default()
    });
    assert_eq!(decided, 1);
    assert!(a.ledger.status().degraded.is_some());
    // To write in place needs no lock, so it does not mean that there is one to be had.
    a.ledger.update("", "Running", Measures::default());
    assert!(a.ledger.status().degraded.is_some());
    assert_eq!(a.ledger.patience(), NO_PATIENCE);
    drop(keeper);
    a.ledger.exchange(&mut |_| Own::default());
    assert_eq!(a.ledger.status().degraded, None);
    a.ledger.reserve(asked(MIB), 1).unwrap();
}

#[test]
fn what_was_heard_lately_is_enough_to_tell_what_is_planned_without_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (open(&dir), open(&dir));
    a.ledger.reserve(asked(MIB), 1).unwrap();
    assert_eq!(a.ledger.recent(), None, "nobody was asked yet");
    a.ledger.exchange(&mut |_| Own::default());
    assert_eq!(a.ledger.recent(), Some(Neighbours::default()));
    let keeper = rustix::fs::open(dir.path(), OFlags::RDONLY, Mode::empty()).unwrap();
    flock(&keeper, FlockOperation::LockExclusive).unwrap();
    a.ledger.tell(Own {
        claim: 7,
        pending: 5,
    });
    assert_eq!(a.ledger.status().degraded, None);
    drop(keeper);
    let mut heard = Neighbours::default();
    b.ledger.exchange(&mut |neighbours| {
        heard = *neighbours;
        Own::default()
    });
    assert_eq!((heard.vms, heard.claims, heard.pending), (1, 7, 5));
    // What was heard once is not good for ever.
    a.ledger.heard_ms = Some(boot_clock_ms() - RECENT_MS);
    assert_eq!(a.ledger.recent(), None);
}

#[test]
fn that_the_lock_is_free_again_is_noticed_by_who_only_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = open(&dir);
    let keeper = rustix::fs::open(dir.path(), OFlags::RDONLY, Mode::empty()).unwrap();
    flock(&keeper, FlockOperation::LockExclusive).unwrap();
    a.ledger.exchange(&mut |_| Own::default());
    a.ledger.tell_news();
    a.ledger.update("", "Running", Measures::default());
    a.ledger.tell_news();
    drop(keeper);
    a.ledger.update("", "Running", Measures::default());
    a.ledger.tell_news();
    assert_eq!(a.ledger.patience(), SHORT_PATIENCE);
    let told = ["overcommit-ledger-degraded", "overcommit-ledger-restored"];
    assert_eq!(a.events(), told);
}

#[test]
fn what_is_set_aside_is_told_with_the_cgroup_that_it_was_admitted_in() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = open(&dir);
    let host = tempfile::tempdir().unwrap();
    let proc = host.path().join("proc");
    std::fs::create_dir_all(proc.join("self")).unwrap();
    std::fs::write(proc.join("meminfo"), "MemTotal: 4194304 kB\n").unwrap();
    std::fs::write(proc.join("self/cgroup"), "0::/moved/here\n").unwrap();
    a.ledger.host = Host { proc };
    a.ledger.reserve(asked(MIB), 1).unwrap();
    assert_eq!(snapshot(&dir).records[0].1.cgroup, "/moved/here");
}

#[test]
fn a_directory_that_others_may_open_is_seen() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    for (mode, open) in [
        (0o700, false),
        (0o770, false),
        (0o705, true),
        (0o711, true),
        (0o1777, true),
    ] {
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        assert_eq!(directory.others_may_open().unwrap(), open, "{mode:o}");
    }
}

#[test]
fn plans_are_told_and_summed_for_those_who_have_memory_and_still_decide() {
    let dir = tempfile::tempdir().unwrap();
    let mut all: Vec<Tested> = (0..4).map(|_| open(&dir)).collect();
    leave(&dir, 100 * MIB);
    for (index, tested) in all.iter_mut().enumerate().take(3) {
        tested.ledger.reserve(asked(MIB), 1).unwrap();
        let own = Own {
            claim: 10 << (4 * index),
            pending: 1 << (4 * index),
        };
        tested.ledger.exchange(&mut |_| own);
    }
    let mut seen = Neighbours::default();
    all[0].ledger.exchange(&mut |neighbours| {
        seen = *neighbours;
        Own::default()
    });
    assert_eq!((seen.vms, seen.claims, seen.pending), (2, 0xaa0, 0x110));
    // An update keeps the plans.
    all[1].ledger.update("", "Running", Measures::default());
    let records = snapshot(&dir).records;
    let now = boot_clock_ms();
    assert_eq!(neighbours(records.iter().map(|r| &r.1), now).pending, 0x110);
    let later = now + PLANS_LAST_MS + 1;
    let late = neighbours(records.iter().map(|r| &r.1), later);
    assert_eq!((late.vms, late.pending), (3, 0));
}

#[test]
fn a_reader_never_takes_a_record_that_is_being_written_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = open(&dir);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..20_000_u64 {
                // Lengths differ, so that halves of two would not fit.
                let measures = Measures {
                    actual: Some(number),
                    idle: (number % 3 == 0).then_some(u64::MAX),
                    resident: Some(number * 3),
                    ..Measures::default()
                };
                a.ledger.update("", "Running", measures);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let mut reads = 0_u64;
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            let seen = snapshot(&dir);
            assert!(seen.stale.is_empty(), "{seen:?}");
            for (_, record) in &seen.records {
                let actual = record.measures.actual.unwrap_or_default();
                assert_eq!(record.measures.resident.unwrap_or_default(), actual * 3);
                reads += 1;
            }
        }
        assert!(reads > 0);
    });
}

use std::os::unix::ffi::OsStringExt;

#[test]
fn more_entries_than_any_ledger_has_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..16_400 {
        OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(dir.path().join(number.to_string()))
            .and_then(|mut file| file.write_all(b""))
            .unwrap();
    }
    let error = Ledger::open(dir.path(), "", Events::new(Instant::now()));
    assert!(error.err().unwrap().to_string().contains("entries"));
}

/// What the governor of a guest reads that has half of its 512 MiB in the balloon, and whose host
/// has 600 MiB left.
fn reading(now_ms: u64, oom_kills: u64, neighbours: Neighbours) -> Reading {
    Reading {
        now_ms,
        limits: GuestLimits {
            ram: 512 * MIB,
            guaranteed: 64 * MIB,
            max: 512 * MIB,
            weight: 100,
            buffer_percent: 20,
            step: 64 * MIB,
            interval_ms: 1000,
            host_free_percent: 5,
            ..GuestLimits::default()
        },
        balloon: BalloonReading {
            target: 256 * MIB,
            actual: 256 * MIB,
            driver: true,
        },
        guest: Some(GuestReading {
            at_ms: now_ms,
            available: 100 * MIB,
            oom_kills,
            ..GuestReading::default()
        }),
        host: HostReading {
            total: 8192 * MIB,
            available: 600 * MIB,
            ..HostReading::default()
        },
        neighbours,
        vcpus: crate::overcommit::reading::CpuTime::default(),
    }
}

#[test]
fn guests_that_all_want_their_memory_back_at_once_get_no_more_than_the_host_has() {
    const VMS: usize = 6;
    let dir = tempfile::tempdir().unwrap();
    let mut all: Vec<Tested> = (0..VMS).map(|_| open(&dir)).collect();
    for tested in &mut all {
        tested.ledger.record.reservation = asked(64 * MIB);
        tested.ledger.update("", "Running", Measures::default());
    }
    let start = std::sync::Barrier::new(VMS);
    let given: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter_mut()
            .map(|tested| {
                let start = &start;
                scope.spawn(move || {
                    let quiet = reading(1000, 0, Neighbours::default());
                    let (_, state) = governor::decide(&quiet, &governor::State::default());
                    start.wait();
                    let mut given = 0;
                    tested.ledger.exchange(&mut |neighbours| {
                        let (decision, _) =
                            governor::decide(&reading(2000, 1, *neighbours), &state);
                        given = 256 * MIB - decision.target;
                        decision.own
                    });
                    given
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for tested in &all {
        assert_eq!(tested.ledger.status().degraded, None);
    }
    let total: u64 = given.iter().sum();
    // The first gets all it needs, and the last nothing.
    assert!(
        given.contains(&(256 * MIB)) && given.contains(&0),
        "{given:?}"
    );
    assert!(total <= 600 * MIB, "{given:?}");
    assert!(total >= 400 * MIB, "what there is is given: {given:?}");
}
