//! The balloon in a PCI slot of an in-memory guest, its worker inside its real filter.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::*;
use crate::event::{BalloonNews, DeviceEvent, Reporter};
use crate::guest_memory::discard::inhibit::{Inhibitor, Reason};
use crate::sandbox::SeccompMode;
use crate::virtio::pci::VirtioPciDevice;
use crate::virtio::testing::{Buffer, PATIENCE, TestDriver, TestGuest, VERSION_1, eventually};
use crate::worker::Order;

mod hostile;
mod pending;

const PAGE: u64 = 4096;
/// Memory beyond what the driver's rings and buffers take.
const FREE: u64 = 16 << 20;
const MEMORY: usize = 64 << 20;

const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
const POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;
const EVENT_IDX: u64 = 1 << 29;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORT: usize = 4;

/// A balloon with a driver that has not begun yet.
struct Rig {
    guest: TestGuest,
    driver: TestDriver,
    balloon: Arc<Balloon>,
    transport: Arc<VirtioPciDevice>,
    events: Receiver<DeviceEvent>,
    inhibitor: Inhibitor,
}

impl Rig {
    fn new(config: &BalloonConfig) -> Self {
        let inhibitor = Inhibitor::default();
        let (sender, events) = channel();
        let reporter = Reporter::new(
            "balloon",
            Arc::new(move |_, event| {
                let _ = sender.send(event);
            }),
        );
        let context = BuildContext {
            reporter: reporter.clone(),
            seccomp: SeccompMode::Enforce,
            discards: inhibitor.clone(),
        };
        let balloon = Arc::new(Balloon::new(config, context).unwrap());
        let guest = TestGuest::new(MEMORY);
        let (slot, transport) = guest.plug_reporting(balloon.clone(), reporter);
        Self {
            driver: TestDriver::new(&guest, slot),
            guest,
            balloon,
            transport,
            events,
            inhibitor,
        }
    }

    /// One with all features, whose driver runs.
    fn started(features: u64) -> Self {
        let mut rig = Self::new(&BalloonConfig {
            deflate_on_oom: true,
            free_page_reporting: true,
            ..BalloonConfig::default()
        });
        rig.driver.start(VERSION_1 | features, 64);
        assert!(eventually(|| rig.info().driver));
        rig
    }

    fn info(&self) -> BalloonInfo {
        self.balloon.viewer().info("balloon")
    }

    /// Sends the numbers of pages and waits for the answer.
    fn send(&mut self, queue: usize, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.driver.exchange(queue, &bytes, 0);
    }

    fn say_actual(&self, pages: u32) {
        self.driver.device_write(4, &pages.to_le_bytes());
    }

    /// Gives the first pages, so many in all, and says so.
    fn give(&mut self, pages: u64) {
        self.send(INFLATE, &first_pages(pages));
        self.say_actual(pages as u32);
    }

    fn word(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.driver.device_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn fill(&self) {
        let bytes = vec![0x5a; MEMORY - FREE as usize];
        self.guest.poke(FREE, &bytes);
    }

    /// Whether the page reads as zeroes.
    fn gone(&self, number: u64) -> bool {
        let page = self.guest.peek(number * PAGE, PAGE as usize);
        page.iter().all(|byte| *byte == 0)
    }

    /// The next event about the balloon.
    #[track_caller]
    fn news(&self) -> (BalloonNews, u64, u64) {
        loop {
            match self.events.recv_timeout(PATIENCE).expect("an event") {
                DeviceEvent::Balloon {
                    news,
                    target_bytes,
                    actual_bytes,
                } => return (news, target_bytes, actual_bytes),
                DeviceEvent::Failed { reason } => panic!("{reason}"),
                _ => {}
            }
        }
    }

    fn assert_well(&mut self) {
        assert!(!self.driver.needs_reset());
        self.fill();
        let number = (FREE / PAGE + 77) as u32;
        self.send(INFLATE, &[number]);
        assert!(eventually(|| self.gone(number.into())));
    }
}

fn first_pages(count: u64) -> Vec<u32> {
    (FREE / PAGE..FREE / PAGE + count)
        .map(|n| n as u32)
        .collect()
}

#[test]
fn inflated_pages_are_gone_and_their_neighbours_are_not() {
    for features in [0, MUST_TELL_HOST | STATS_VQ, EVENT_IDX] {
        let mut rig = Rig::started(features);
        rig.fill();
        let mut numbers = first_pages(256);
        numbers.reverse();
        rig.send(INFLATE, &numbers);
        let start = FREE / PAGE;
        assert!(eventually(|| (start..start + 256).all(|n| rig.gone(n))));
        assert!(!rig.gone(start + 256));
        assert!(eventually(|| rig.info().inflated == 256 * PAGE));
        let info = rig.info();
        assert_eq!((info.inflated, info.ignored), (256 * PAGE, 0));
        assert_eq!(rig.balloon.counters()["discard_calls"], 1);
        rig.send(DEFLATE, &numbers);
        assert_eq!(rig.info().deflated, 256 * PAGE);
    }
}

#[test]
fn a_run_across_several_requests_is_discarded_by_one_call() {
    let mut rig = Rig::started(0);
    rig.fill();
    let chunks: Vec<Vec<u8>> = first_pages(64)
        .chunks(16)
        .map(|chunk| chunk.iter().flat_map(|n| n.to_le_bytes()).collect())
        .collect();
    for chunk in chunks.iter().rev() {
        let at = rig.driver.allocate(chunk.len());
        rig.guest.poke(at, chunk);
        rig.driver
            .add(INFLATE, &[Buffer::Readable(at, chunk.len() as u32)]);
    }
    rig.driver.kick(INFLATE);
    for _ in 0..chunks.len() {
        rig.driver.wait_used(INFLATE);
    }
    assert_eq!(rig.info().inflated, 64 * PAGE);
    assert_eq!(rig.balloon.counters()["discard_calls"], 1);
    let interrupts = rig.guest.machine.vectors()[INFLATE].fired();
    assert_eq!(interrupts, 1);
}

#[test]
fn a_new_target_interrupts_the_driver_and_the_way_there_is_told() {
    let mut rig = Rig::started(0);
    let generation = rig.driver.common_read::<1>(0x15);
    rig.balloon.set_target(100 * PAGE);
    assert!(eventually(
        || rig.driver.common_read::<1>(0x15) != generation
    ));
    assert_eq!(rig.word(0), 100);
    assert_eq!(rig.info().state, State::InProgress);
    rig.give(40);
    assert_eq!(rig.news(), (BalloonNews::Progress, 100 * PAGE, 40 * PAGE));
    assert!(rig.info().rate > 0);
    rig.give(100);
    assert_eq!(rig.news(), (BalloonNews::Reached, 100 * PAGE, 100 * PAGE));
    assert_eq!((rig.info().state, rig.info().rate), (State::Reached, 0));
    rig.balloon.set_target(0);
    rig.say_actual(0);
    assert_eq!(rig.news(), (BalloonNews::Reached, 0, 0));
    // A reset gives all pages back to the guest.
    rig.say_actual(7);
    assert!(rig.driver.reset());
    assert_eq!(rig.info().actual, 0);
}

#[test]
fn a_driver_that_starts_with_a_target_is_told_of_it_and_one_that_never_comes_stalls() {
    let mut rig = Rig::new(&BalloonConfig {
        size: 8 * PAGE,
        ..BalloonConfig::default()
    });
    assert_eq!(rig.news(), (BalloonNews::Stalled, 8 * PAGE, 0));
    assert_eq!(rig.info().state, State::Stalled);
    rig.driver.start(VERSION_1, 64);
    assert!(eventually(|| rig.info().state == State::InProgress));
    assert_eq!(rig.word(0), 8);
    rig.give(8);
    assert_eq!(rig.news(), (BalloonNews::Reached, 8 * PAGE, 8 * PAGE));
}

#[test]
fn statistics_are_asked_for_and_answered_or_not() {
    let mut rig = Rig::started(STATS_VQ);
    let ask = |rig: &Rig| {
        let (sender, answer) = channel();
        rig.balloon
            .ask_for_statistics(Box::new(move |fresh| sender.send(fresh).unwrap()));
        answer
    };
    let sent = |free: u64| [&4u16.to_le_bytes()[..], &free.to_le_bytes()].concat();
    let buffer = rig.driver.allocate(10);
    rig.guest.poke(buffer, &sent(1111));
    let head = rig.driver.add(STATS, &[Buffer::Readable(buffer, 10)]);
    rig.driver.kick(STATS);
    assert!(eventually(|| !rig.info().statistics.is_empty()));
    let statistics = || rig.balloon.viewer().statistics();
    assert_eq!(statistics().free_memory, Some(1111));

    let answer = ask(&rig);
    assert_eq!(rig.driver.wait_used(STATS), (head.into(), 0));
    rig.guest.poke(buffer, &sent(2222));
    rig.driver.add(STATS, &[Buffer::Readable(buffer, 10)]);
    rig.driver.kick(STATS);
    assert_eq!(answer.recv_timeout(PATIENCE), Ok(true));
    assert_eq!(rig.balloon.viewer().statistics().free_memory, Some(2222));

    // Now the guest does not care.
    let asked = Instant::now();
    let answers = [ask(&rig), ask(&rig)];
    for answer in answers {
        assert_eq!(answer.recv_timeout(PATIENCE), Ok(false));
    }
    assert!(asked.elapsed() >= Duration::from_millis(900));
    assert_eq!(rig.info().statistics["free_memory"].value, 2222);

    // A pause answers at once, and so does a reset.
    for stop in [Order::Pause, Order::Reset] as [fn(_) -> _; 2] {
        let answer = ask(&rig);
        let (done, wait) = channel();
        rig.balloon.workers[0].order(stop(Box::new(move || done.send(()).unwrap())));
        wait.recv_timeout(PATIENCE).unwrap();
        assert_eq!(answer.try_recv(), Ok(false));
        rig.balloon.workers[0].order(Order::Resume);
    }
    // Without a driver there is nobody to wait for.
    assert_eq!(ask(&rig).recv_timeout(PATIENCE), Ok(false));
}

#[test]
fn reported_pages_are_given_back_by_the_specifications_queue_and_by_linuxs() {
    for (queues, queue) in [(5, REPORT), (4, 3)] {
        let mut rig = Rig::new(&BalloonConfig {
            free_page_reporting: true,
            ..BalloonConfig::default()
        });
        assert!(rig.driver.reset());
        assert!(
            rig.driver
                .negotiate(VERSION_1 | STATS_VQ | REPORTING | POISON)
        );
        for index in 0..queues {
            rig.driver.set_up_queue(index, 64);
        }
        rig.driver.driver_ok();
        rig.fill();
        let room = Buffer::Writable;
        let head = rig.driver.add(
            queue,
            &[
                room(FREE, 2 << 20),
                room(FREE + (8 << 20), 2 << 20),
                // Not whole pages: only those inside.
                room(FREE + (4 << 20) + 1, 2 * PAGE as u32),
                Buffer::Readable(FREE + (6 << 20), PAGE as u32),
            ],
        );
        rig.driver.kick(queue);
        assert_eq!(rig.driver.wait_used(queue), (head.into(), 0));
        assert_eq!(rig.info().reported_free, (4 << 20) + PAGE);
        let start = FREE / PAGE;
        assert!(rig.gone(start) && rig.gone(start + 511) && !rig.gone(start + 512));
        assert!(!rig.gone(start + 1024) && rig.gone(start + 1025) && !rig.gone(start + 1026));
        assert!(!rig.gone(start + 1536) && rig.gone(start + 2048));
    }
}

#[test]
fn pages_with_a_pattern_are_kept_and_counted() {
    let mut rig = Rig::new(&BalloonConfig {
        free_page_reporting: true,
        ..BalloonConfig::default()
    });
    for (poison, kept) in [(0xaaaa_aaaa_u32, true), (0, false)] {
        assert!(rig.driver.reset());
        assert!(rig.driver.negotiate(VERSION_1 | POISON | REPORTING));
        for index in 0..3 {
            rig.driver.set_up_queue(index, 64);
        }
        rig.driver.device_write(12, &poison.to_le_bytes());
        rig.driver.driver_ok();
        rig.fill();
        rig.driver.add(2, &[Buffer::Writable(FREE, 1 << 20)]);
        rig.driver.kick(2);
        rig.driver.wait_used(2);
        assert_eq!(!rig.gone(FREE / PAGE), kept);
        assert_eq!(rig.info().inhibited.poison, 1 << 20);
        // Ballooned pages hold nothing that the guest wants back.
        rig.send(INFLATE, &[(FREE / PAGE) as u32]);
        assert!(rig.gone(FREE / PAGE));
    }
}

#[test]
fn what_is_held_off_is_counted_by_its_reason_and_comes_back_afterwards() {
    let mut rig = Rig::started(REPORTING);
    rig.fill();
    for (reason, counter) in [
        (Reason::Vfio, "inhibited_vfio_bytes"),
        (Reason::DirtyLog, "inhibited_dirty_log_bytes"),
        (Reason::LazyRestore, "inhibited_lazy_restore_bytes"),
    ] {
        let inhibition = rig.inhibitor.inhibit(reason);
        rig.send(INFLATE, &first_pages(3));
        let start = FREE + (1 << 20);
        rig.driver.add(REPORT, &[Buffer::Writable(start, 1 << 20)]);
        rig.driver.kick(REPORT);
        rig.driver.wait_used(REPORT);
        assert!(!rig.gone(FREE / PAGE) && !rig.gone(start / PAGE));
        let counted = || rig.balloon.counters()[counter];
        assert!(eventually(|| counted() == 3 * PAGE + (1 << 20)));
        assert_eq!(rig.info().inhibited_by, [reason]);
        drop(inhibition);
        assert_eq!(rig.info().inhibited_by, []);
    }
    let info = rig.info();
    let of = |bytes: [u64; 3]| bytes.map(|b| b - (1 << 20));
    let inhibited = info.inhibited;
    assert_eq!(
        of([inhibited.vfio, inhibited.dirty_log, inhibited.lazy_restore]),
        [3 * PAGE; 3]
    );
    assert_eq!((info.inflated, info.reported_free), (0, 0));
    rig.assert_well();
}
