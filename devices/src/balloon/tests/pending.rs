//! Pages that wait for the rest of their 2 MiB, of a driver that tells before it uses them again.

use super::*;

const HUGE: u64 = 2 << 20;
/// Longer than anything waits.
const LONG: Duration = Duration::from_millis(800);

fn pages(range: std::ops::Range<u64>) -> Vec<u32> {
    let first = FREE / PAGE;
    range.map(|n| (first + n) as u32).collect()
}

#[test]
fn the_halves_of_a_huge_page_go_by_one_call() {
    // On a machine that stands still for long, the first half may have gone before the second came.
    let calls = (0..10).map(|_| {
        let mut rig = Rig::started(MUST_TELL_HOST);
        rig.balloon.set_target(512 * PAGE);
        rig.fill();
        rig.send(INFLATE, &pages(256..512));
        rig.send(INFLATE, &pages(0..256));
        assert!(eventually(|| rig.info().inflated == HUGE));
        assert!(rig.gone(FREE / PAGE) && rig.gone(FREE / PAGE + 511));
        assert_eq!(rig.info().pending, 0);
        rig.balloon.counters()["discard_calls"]
    });
    assert!(calls.into_iter().any(|calls| calls == 1));
}

#[test]
fn what_is_left_over_goes_after_a_while_at_the_target_and_at_a_pause() {
    let ways: [fn(&Rig); 3] = [
        |_| {},
        |rig| {
            rig.balloon.set_target(6 * PAGE);
            rig.say_actual(6);
        },
        |rig| rig.balloon.workers[0].order(Order::Pause(Box::new(|| {}))),
    ];
    for way in ways {
        let mut rig = Rig::started(MUST_TELL_HOST);
        rig.balloon.set_target(1000 * PAGE);
        rig.fill();
        rig.send(INFLATE, &pages(0..3));
        rig.send(INFLATE, &pages(600..603));
        way(&rig);
        assert!(eventually(|| rig.info().inflated == 6 * PAGE));
        assert!(rig.gone(FREE / PAGE) && rig.gone(FREE / PAGE + 602));
        assert_eq!(rig.info().pending, 0);
    }
}

#[test]
fn a_page_that_leaves_the_balloon_while_it_waits_is_never_touched() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    rig.balloon.set_target(1000 * PAGE);
    let start = FREE / PAGE;
    // On a machine that stands still for long, they may have gone before they left.
    for _ in 0..10 {
        rig.fill();
        let before = rig.info().inflated;
        rig.send(INFLATE, &pages(0..4));
        rig.send(DEFLATE, &pages(1..3));
        let gone = rig.info().inflated - before;
        assert!(eventually(|| rig.info().inflated >= before + 2 * PAGE));
        if gone == 0 {
            assert_eq!(rig.info().inflated, before + 2 * PAGE);
            assert!(rig.gone(start) && rig.gone(start + 3));
            assert!(!rig.gone(start + 1) && !rig.gone(start + 2));
            return;
        }
    }
    panic!("they never waited");
}

#[test]
fn a_reset_gives_back_what_waits() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    rig.balloon.set_target(1000 * PAGE);
    rig.fill();
    rig.send(INFLATE, &pages(0..4));
    let sooner = rig.gone(FREE / PAGE);
    assert!(rig.driver.reset());
    assert_eq!(rig.info().pending, 0);
    rig.fill();
    std::thread::sleep(LONG);
    assert!(!rig.gone(FREE / PAGE));
    rig.driver.start(VERSION_1 | MUST_TELL_HOST, 64);
    std::thread::sleep(LONG);
    assert!(!rig.gone(FREE / PAGE));
    assert!(sooner || rig.info().inflated == 0);
    rig.assert_well();
}

#[test]
fn what_is_held_off_is_given_back_when_the_last_reason_is_gone() {
    let mut rig = Rig::started(MUST_TELL_HOST | REPORTING);
    rig.balloon.set_target(1000 * PAGE);
    rig.fill();
    let first = rig.inhibitor.inhibit(Reason::Vfio);
    let second = rig.inhibitor.inhibit(Reason::DirtyLog);
    rig.send(INFLATE, &pages(0..4));
    rig.send(INFLATE, &pages(512..1536));
    assert!(eventually(|| rig.info().held_off == 1028 * PAGE));
    assert_eq!(rig.info().inhibited.vfio, 1028 * PAGE);
    // One that leaves the balloon meanwhile is the guest's; and a report is not repeated.
    rig.send(DEFLATE, &pages(1..2));
    let reported = FREE + (20 << 20);
    rig.driver
        .add(REPORT, &[Buffer::Writable(reported, 1 << 20)]);
    rig.driver.kick(REPORT);
    rig.driver.wait_used(REPORT);
    drop(first);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((rig.info().held_off, rig.info().inflated), (1027 * PAGE, 0));
    drop(second);
    assert!(eventually(|| rig.info().held_off == 0));
    let start = FREE / PAGE;
    assert!(rig.gone(start) && rig.gone(start + 3) && rig.gone(start + 1535));
    assert!(!rig.gone(start + 1) && !rig.gone(start + 4) && !rig.gone(reported / PAGE));
    let info = rig.info();
    assert_eq!((info.retried, info.inflated), (1027 * PAGE, 1027 * PAGE));
    assert_eq!(rig.balloon.counters()["retried_bytes"], 1027 * PAGE);
    // Counted once, when it was held off.
    assert_eq!(info.inhibited.vfio, (1028 * PAGE) + (1 << 20));
    assert_eq!((info.given, info.inhibited.dirty_log), (1027 * PAGE, 0));
}

#[test]
fn more_than_is_tried_again_at_once_is_all_given_back() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    rig.fill();
    let inhibition = rig.inhibitor.inhibit(Reason::LazyRestore);
    let count = (MEMORY as u64 - FREE) / PAGE;
    // Every other page: more pieces than one call takes.
    let every_other: Vec<u32> = pages(0..count).into_iter().step_by(2).collect();
    for chunk in every_other.chunks(1024) {
        rig.send(INFLATE, chunk);
    }
    assert!(eventually(|| rig.info().held_off == count / 2 * PAGE));
    drop(inhibition);
    assert!(eventually(|| rig.info().held_off == 0));
    assert_eq!(rig.info().retried, count / 2 * PAGE);
    assert!(rig.gone(FREE / PAGE + count - 2) && !rig.gone(FREE / PAGE + count - 1));
}

#[test]
fn what_was_held_off_is_the_next_drivers_after_a_reset_and_without_the_promise_the_guests() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    for promise in [MUST_TELL_HOST, 0] {
        assert!(rig.driver.reset());
        rig.driver.start(VERSION_1 | promise, 64);
        rig.fill();
        let inhibition = rig.inhibitor.inhibit(Reason::Vfio);
        rig.send(INFLATE, &pages(0..4));
        if promise != 0 {
            assert!(eventually(|| rig.info().held_off == 4 * PAGE));
            assert!(rig.driver.reset());
            rig.driver.start(VERSION_1 | promise, 64);
        }
        assert_eq!(rig.info().held_off, 0);
        drop(inhibition);
        // It has looked when this is answered.
        rig.send(DEFLATE, &pages(9..10));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!rig.gone(FREE / PAGE) && rig.info().retried == 0);
    }
    rig.assert_well();
}

#[test]
fn without_the_promise_nothing_waits() {
    let mut rig = Rig::started(0);
    rig.balloon.set_target(1000 * PAGE);
    rig.fill();
    rig.send(INFLATE, &pages(0..4));
    assert!((0..4).all(|n| rig.gone(FREE / PAGE + n)));
}
