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
        |rig| rig.say_actual(1000),
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
fn what_is_held_off_while_it_waits_is_counted_and_not_discarded() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    rig.balloon.set_target(1000 * PAGE);
    rig.fill();
    let inhibition = rig.inhibitor.inhibit(Reason::Vfio);
    rig.send(INFLATE, &pages(0..4));
    assert!(eventually(|| rig.info().inhibited.vfio == 4 * PAGE));
    drop(inhibition);
    assert_eq!((rig.info().pending, rig.info().inflated), (0, 0));
    assert!(!rig.gone(FREE / PAGE));
}

#[test]
fn without_the_promise_nothing_waits() {
    let mut rig = Rig::started(0);
    rig.balloon.set_target(1000 * PAGE);
    rig.fill();
    rig.send(INFLATE, &pages(0..4));
    assert!((0..4).all(|n| rig.gone(FREE / PAGE + n)));
}
