//! Drivers that lie, and drivers that are broken.

use super::*;

#[test]
fn pages_that_are_no_memory_or_come_twice_do_no_harm() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    rig.fill();
    let last = (MEMORY as u64 / PAGE) as u32;
    let first = (FREE / PAGE) as u32;
    rig.send(INFLATE, &[first, first, u32::MAX, last, first, last - 1]);
    assert!(eventually(|| rig.info().inflated == 2 * PAGE));
    assert!(rig.gone(first.into()) && rig.gone(u64::from(last) - 1));
    let info = rig.info();
    assert_eq!((info.inflated, info.ignored), (2 * PAGE, 2 * PAGE));
    rig.send(DEFLATE, &[u32::MAX, last, first, first]);
    rig.assert_well();
}

#[test]
fn requests_of_any_shape_are_given_back() {
    let mut rig = Rig::started(STATS_VQ | REPORTING);
    rig.fill();
    let number = (FREE / PAGE) as u32;
    let at = rig.driver.allocate(64);
    rig.guest.poke(at, &number.to_le_bytes());
    let huge = u32::MAX;
    let shapes: [&[Buffer]; 8] = [
        &[Buffer::Writable(at, 4)],
        &[Buffer::Readable(at, 3)],
        &[Buffer::Readable(at, 0), Buffer::Readable(at, 4)],
        // A number torn apart.
        &[Buffer::Readable(at, 2), Buffer::Readable(at + 2, 2)],
        &[Buffer::Readable(MEMORY as u64, 4)],
        &[Buffer::Readable(u64::MAX - 1, 4)],
        &[Buffer::Readable(MEMORY as u64 - 2, 4)],
        // 4 GiB of page numbers.
        &[Buffer::Readable(0, huge), Buffer::Readable(0, huge)],
    ];
    for queue in [INFLATE, DEFLATE, STATS, REPORT] {
        for shape in shapes {
            rig.driver.add(queue, shape);
            rig.driver.kick(queue);
        }
        if queue != STATS {
            for _ in shapes {
                rig.driver.wait_used(queue);
            }
        }
    }
    assert!(rig.info().ignored > 0);
    rig.assert_well();
}

#[test]
fn a_driver_that_balloons_its_own_rings_hurts_itself_only() {
    let mut rig = Rig::started(0);
    let everything: Vec<u32> = (0..(MEMORY as u64 / PAGE) as u32).collect();
    let bytes: Vec<u8> = everything.iter().flat_map(|n| n.to_le_bytes()).collect();
    let at = rig.driver.allocate(bytes.len());
    rig.guest.poke(at, &bytes);
    rig.driver
        .add(INFLATE, &[Buffer::Readable(at, bytes.len() as u32)]);
    rig.driver.kick(INFLATE);
    assert!(eventually(|| rig.info().inflated == MEMORY as u64));
    rig.driver.start(VERSION_1, 64);
    rig.assert_well();
}

#[test]
fn a_lie_about_actual_is_shown_and_believed_by_nobody() {
    let mut rig = Rig::started(0);
    rig.balloon.set_target(10 * PAGE);
    rig.say_actual(u32::MAX);
    assert_eq!(rig.info().actual, u64::from(u32::MAX) * PAGE);
    assert_eq!(rig.info().inflated, 0);
    assert_eq!(rig.word(0), 10);
    // Nor can the target be overwritten.
    rig.driver.device_write(0, &[0xff; 16]);
    assert_eq!(rig.balloon.target_bytes(), 10 * PAGE);
    // Going to and fro floods nobody, nor does one who is there for a while.
    rig.send(INFLATE, &first_pages(10));
    for round in 0..100_000 {
        rig.say_actual(10 + round % 2);
    }
    let told = rig.events.try_iter().count();
    assert!(told < 100, "{told} events");
}

#[test]
fn a_reset_amidst_inflating_leaves_a_device_that_works() {
    let mut rig = Rig::started(0);
    for _ in 0..50 {
        rig.balloon.set_target(FREE);
        let numbers = first_pages(2048);
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let at = FREE - (1 << 20);
        rig.guest.poke(at, &bytes);
        for _ in 0..60 {
            rig.driver
                .add(INFLATE, &[Buffer::Readable(at, bytes.len() as u32)]);
        }
        rig.driver.kick(INFLATE);
        assert!(rig.driver.reset());
        assert!(!rig.info().driver);
        rig.fill();
        rig.driver.start(VERSION_1, 64);
        // What was under way before the reset does not come after it.
        assert!(!rig.gone(FREE / PAGE + 5));
    }
    rig.assert_well();
}

#[test]
fn a_ring_that_makes_no_sense_fails_the_device_until_its_reset() {
    let mut rig = Rig::started(0);
    rig.driver.set_available_index(INFLATE, 5000);
    rig.driver.kick(INFLATE);
    assert!(eventually(|| rig.driver.needs_reset()));
    rig.driver.start(VERSION_1, 64);
    rig.assert_well();
}

#[test]
fn a_paused_balloon_touches_nothing_and_goes_on_afterwards() {
    let mut rig = Rig::started(0);
    rig.fill();
    let (done, wait) = channel();
    rig.balloon.workers[0].order(Order::Pause(Box::new(move || done.send(()).unwrap())));
    wait.recv_timeout(PATIENCE).unwrap();
    let at = rig.driver.allocate(4);
    rig.guest.poke(at, &((FREE / PAGE) as u32).to_le_bytes());
    rig.driver.add(INFLATE, &[Buffer::Readable(at, 4)]);
    rig.driver.kick(INFLATE);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!rig.gone(FREE / PAGE) && rig.driver.take_used(INFLATE).is_none());
    rig.balloon.workers[0].order(Order::Resume);
    rig.driver.wait_used(INFLATE);
    assert!(rig.gone(FREE / PAGE));
}

#[test]
fn a_device_that_is_pulled_out_while_it_works_is_gone() {
    let mut rig = Rig::started(0);
    rig.fill();
    rig.send(INFLATE, &first_pages(256));
    let weak = Arc::downgrade(&rig.balloon);
    rig.transport.reset();
    rig.guest.unplug(rig.driver.slot, rig.transport);
    drop(rig.balloon);
    assert!(eventually(|| weak.strong_count() == 0));
}

#[test]
fn drivers_that_do_nothing_lie_or_send_rubbish_are_shown_as_stalled() {
    let beyond = (MEMORY as u64 / PAGE) as u32;
    let first = (FREE / PAGE) as u32;
    type Deed<'a> = &'a dyn Fn(&mut Rig);
    let drivers: [(&str, Deed, u64); 9] = [
        ("does nothing", &|_| {}, 0),
        (
            "gives less than nothing",
            &|rig| rig.say_actual(u32::MAX),
            0,
        ),
        (
            "says at once that it is there",
            &|rig| rig.say_actual(100),
            0,
        ),
        (
            "says that it is there, again and again",
            &|rig| (1..200).for_each(|n| rig.say_actual(99 + n % 2)),
            0,
        ),
        (
            "says that it is there and has given one page many times",
            &|rig| {
                rig.send(INFLATE, &[first; 100]);
                rig.say_actual(100);
            },
            PAGE,
        ),
        (
            "goes to and fro",
            &|rig| (1..100).for_each(|n| rig.say_actual(n % 2)),
            0,
        ),
        (
            "gives what is not there",
            &|rig| rig.send(INFLATE, &[beyond, beyond + 9, u32::MAX]),
            0,
        ),
        (
            "gives one page for many",
            &|rig| rig.send(INFLATE, &[first; 100]),
            PAGE,
        ),
        (
            "takes what it never gave",
            &|rig| rig.send(DEFLATE, &[first, beyond, u32::MAX]),
            0,
        ),
    ];
    let rigs = drivers.map(|(name, deed, given)| {
        let mut rig = Rig::started(MUST_TELL_HOST | STATS_VQ);
        rig.fill();
        rig.balloon.set_target(100 * PAGE);
        deed(&mut rig);
        (name, rig, given)
    });
    for (name, mut rig, given) in rigs {
        loop {
            match rig.news().0 {
                BalloonNews::Stalled => break,
                BalloonNews::Reached => panic!("{name}: it is not there"),
                BalloonNews::Progress => {}
            }
        }
        let info = rig.info();
        assert_eq!(info.given, given, "{name}");
        assert_eq!(info.state, State::Stalled, "{name}");
        assert_eq!((info.inflated, info.pending), (given, 0), "{name}");
        assert_eq!(info.target, 100 * PAGE, "{name}");
        rig.assert_well();
    }
}

#[test]
fn a_liar_that_gives_the_pages_after_all_is_there_and_one_that_takes_them_in_silence_is_not() {
    let mut rig = Rig::started(MUST_TELL_HOST);
    rig.fill();
    rig.balloon.set_target(100 * PAGE);
    rig.say_actual(100);
    assert_eq!(rig.info().state, State::InProgress);
    rig.send(INFLATE, &first_pages(100));
    assert_eq!(rig.info().state, State::Reached);
    while rig.news().0 != BalloonNews::Reached {}
    rig.send(DEFLATE, &first_pages(60));
    let info = rig.info();
    assert_eq!((info.state, info.given), (State::InProgress, 40 * PAGE));
    assert_eq!(info.actual, 100 * PAGE);
    while rig.news().0 != BalloonNews::Stalled {}
}
