use proptest::prelude::*;

use super::super::reading::{BalloonReading, CpuTime, HostReading, Neighbours, Pressure};
use super::observe::*;
use super::*;

mod model;
mod properties;
mod traces;

const GIB: u64 = 1 << 30;

fn limits() -> Limits {
    Limits {
        ram: 512 * MIB,
        guaranteed: 160 * MIB,
        max: 512 * MIB,
        others_target: 0,
        others_actual: 0,
        weight: 100,
        buffer_percent: 20,
        step: 25 * MIB,
        interval_ms: 1000,
        host_free_percent: 20,
    }
}

/// A guest that uses 100 MiB of 512 and has given `given`, on a host of 10 GiB of which so many
/// percent are available.
fn reading(now_ms: u64, given: u64, percent: u64) -> Reading {
    Reading {
        now_ms,
        limits: limits(),
        balloon: BalloonReading {
            target: given,
            actual: given,
            driver: true,
        },
        guest: Some(GuestReading {
            at_ms: now_ms,
            available: 412 * MIB - given,
            ..GuestReading::default()
        }),
        host: HostReading {
            total: 10 * GIB,
            available: 10 * GIB * percent / 100,
            pressure: Some(Pressure::default()),
            cgroup_pressure: None,
        },
        neighbours: Neighbours::default(),
        vcpus: CpuTime::default(),
    }
}

/// Looks every second at what `change` makes of a quiet reading, and does what is decided.
fn follow(
    seconds: u64,
    given: u64,
    percent: u64,
    mut change: impl FnMut(u64, &mut Reading),
) -> Vec<Decision> {
    let mut state = State::default();
    let mut target = given;
    (0..seconds)
        .map(|second| {
            let mut reading = reading(second * 1000, target, percent);
            change(second, &mut reading);
            let (decision, next) = decide(&reading, &state);
            state = next;
            target = decision.target;
            decision
        })
        .collect()
}

#[test]
fn what_is_decided_in_each_situation() {
    type Change = fn(&mut Reading);
    let table: [(&str, u64, u64, Change, u64, Reason); 14] = [
        ("plenty", 0, 50, |_| {}, 0, Reason::Steady),
        ("short", 0, 15, |_| {}, 25, Reason::HostPressure),
        ("nearly gone", 0, 4, |_| {}, 25, Reason::HostPressure),
        (
            "short of 10 MiB",
            0,
            15,
            |r| r.host.available = r.host.total * 20 / 100 - MIB,
            25,
            Reason::HostPressure,
        ),
        (
            "PSI alone",
            0,
            50,
            |r| {
                r.host.pressure = Some(Pressure {
                    some: 1500,
                    full: 0,
                })
            },
            25,
            Reason::HostPressure,
        ),
        (
            "PSI of the cgroup",
            0,
            50,
            |r| {
                r.host.cgroup_pressure = Some(Pressure {
                    some: 1500,
                    full: 0,
                })
            },
            25,
            Reason::HostPressure,
        ),
        (
            "no driver",
            8,
            15,
            |r| r.balloon.driver = false,
            8,
            Reason::NoDriver,
        ),
        (
            "no statistics",
            8,
            15,
            |r| r.guest = None,
            8,
            Reason::NoStatistics,
        ),
        (
            "old statistics",
            8,
            15,
            |r| r.guest.as_mut().unwrap().at_ms = r.now_ms - 5001,
            8,
            Reason::NoStatistics,
        ),
        (
            "an unknown host",
            8,
            0,
            |r| r.host.total = 0,
            8,
            Reason::Steady,
        ),
        (
            "nothing idle",
            200,
            15,
            |r| r.guest.as_mut().unwrap().available = 60 * MIB,
            200,
            Reason::Steady,
        ),
        (
            "less than the buffer",
            200,
            50,
            |r| r.guest.as_mut().unwrap().available = 32 * MIB,
            // It uses 280 MiB, of which 56 are wanted beside; 24 are missing.
            176,
            Reason::GuestNeeds,
        ),
        (
            "beyond the guarantee",
            400,
            15,
            |_| {},
            352,
            Reason::Guarantee,
        ),
        (
            "above max_size",
            0,
            50,
            |r| r.limits.max = 500 * MIB,
            12,
            Reason::AboveMax,
        ),
    ];
    for (name, given, percent, change, target, reason) in table {
        let mut reading = reading(10_000, given * MIB, percent);
        change(&mut reading);
        let (decision, _) = decide(&reading, &State::default());
        let got = (decision.target / MIB, decision.reason);
        assert_eq!(got, (target, reason), "{name}");
        assert_eq!(decision.trouble, None, "{name}");
    }
}

#[test]
fn pressure_ends_later_than_it_begins() {
    let available =
        |percent: u64| move |r: &mut Reading| r.host.available = r.host.total * percent / 100;
    let stalls =
        |some: u32| move |r: &mut Reading| r.host.pressure = Some(Pressure { some, full: 0 });
    let mut state = State::default();
    let mut level = |change: &dyn Fn(&mut Reading)| {
        let mut reading = reading(0, 0, 50);
        change(&mut reading);
        (_, state) = decide(&reading, &state);
        state.level()
    };
    assert_eq!(level(&available(20)), Level::Ease);
    assert_eq!(level(&available(19)), Level::Pressure);
    assert_eq!(level(&available(24)), Level::Pressure);
    assert_eq!(level(&available(25)), Level::Ease);
    assert_eq!(level(&available(4)), Level::Critical);
    assert_eq!(level(&available(6)), Level::Pressure);
    assert_eq!(level(&available(26)), Level::Ease);
    assert_eq!(level(&stalls(999)), Level::Ease);
    assert_eq!(level(&stalls(1000)), Level::Pressure);
    assert_eq!(level(&stalls(200)), Level::Pressure);
    assert_eq!(level(&stalls(199)), Level::Ease);
    let full = |r: &mut Reading| {
        r.host.pressure = Some(Pressure {
            some: 1000,
            full: 1000,
        });
    };
    assert_eq!(level(&full), Level::Critical);
}

#[test]
fn under_pressure_it_goes_to_the_guarantee_in_steps_and_no_further() {
    let decisions = follow(60, 0, 15, |_, reading| {
        // Whatever it gives, it has more.
        reading.guest.as_mut().unwrap().available = 400 * MIB;
    });
    let mut before = 0;
    for decision in &decisions {
        assert!(decision.target - before <= 25 * MIB);
        before = decision.target;
    }
    assert_eq!(before, 352 * MIB);
}

#[test]
fn a_step_waits_for_the_last_one_and_for_statistics_from_after_it() {
    let mut state = State::default();
    let mut look = |now_ms: u64, actual: u64, told_ms: u64| {
        let mut reading = reading(now_ms, 25 * MIB, 15);
        reading.balloon.actual = actual * MIB;
        reading.guest.as_mut().unwrap().at_ms = told_ms;
        let (decision, next) = decide(&reading, &state);
        state = next;
        decision.reason
    };
    assert_eq!(look(1000, 10, 999), Reason::InProgress);
    assert_eq!(look(2000, 25, 1999), Reason::InProgress, "told before");
    assert_eq!(look(3000, 25, 2999), Reason::HostPressure);
}

#[test]
fn a_guest_in_distress_gets_everything_at_once() {
    let signs: [fn(&mut GuestReading); 4] = [
        |g| g.oom_kills += 1,
        |g| g.alloc_stalls += 20,
        |g| g.direct_reclaims += 2560,
        |g| {
            g.major_faults += 200;
            g.available = 10 * MIB;
        },
    ];
    for (number, sign) in signs.into_iter().enumerate() {
        let decisions = follow(15, 300 * MIB, 50, |second, reading| {
            if second >= 10 {
                sign(reading.guest.as_mut().unwrap());
            }
        });
        assert_eq!(decisions[9].target, 300 * MIB, "sign {number}");
        assert_eq!(decisions[10].target, 0, "sign {number}");
        assert_eq!(decisions[10].trouble, Some(Reason::Distress));
    }
    // Programs that are read in for the first time are no distress.
    let decisions = follow(15, 300 * MIB, 15, |second, reading| {
        reading.guest.as_mut().unwrap().major_faults = second * 1000;
    });
    assert!(decisions.iter().all(|decision| decision.trouble.is_none()));
    // Nor are totals of before, or of a guest that counts anew.
    let decisions = follow(15, 300 * MIB, 15, |second, reading| {
        let guest = reading.guest.as_mut().unwrap();
        (guest.oom_kills, guest.alloc_stalls) = if second < 5 { (7, 7000) } else { (0, 0) };
    });
    assert!(decisions.iter().all(|decision| decision.trouble.is_none()));
}

#[test]
fn what_the_driver_reclaims_for_the_balloon_is_no_distress() {
    // Each step is reclaimed page by page, from caches; many times that is more.
    for (factor, distress) in [(1, false), (8, true)] {
        let mut before = 0;
        let mut reclaimed = 0;
        let decisions = follow(20, 0, 15, |_, reading| {
            reclaimed += factor * reading.balloon.actual.saturating_sub(before) / PAGE;
            before = reading.balloon.actual;
            let guest = reading.guest.as_mut().unwrap();
            guest.direct_reclaims = reclaimed;
            guest.alloc_stalls = reclaimed / 32;
        });
        let troubled = decisions.iter().any(|decision| decision.trouble.is_some());
        assert_eq!(troubled, distress, "factor {factor}");
    }
}

#[test]
fn a_guest_that_empties_its_balloon_to_go_on_is_in_distress() {
    let decisions = follow(5, 300 * MIB, 50, |second, reading| {
        if second == 3 {
            reading.balloon.actual -= MIB;
        }
    });
    assert_eq!(decisions[2].trouble, None);
    assert_eq!(decisions[3].trouble, Some(Reason::Distress));
    assert_eq!(decisions[3].target, 0);
}

#[test]
fn the_rests_after_trouble_grow_from_ten_minutes_to_an_hour() {
    let mut state = State::default();
    let mut now_ms = 0;
    let mut kills = 0;
    let mut rests = Vec::new();
    for _ in 0..5 {
        for more in [0, 1] {
            kills += more;
            let mut reading = reading(now_ms, 100 * MIB, 50);
            reading.guest.as_mut().unwrap().oom_kills = kills;
            (_, state) = decide(&reading, &state);
            now_ms += 1000;
        }
        let rest = state.back_off_ms(now_ms - 1000).unwrap();
        rests.push(rest / MINUTE_MS);
        // Nothing is taken all that time …
        let mut resting = reading(now_ms + rest - 2001, 0, 10);
        resting.guest.as_mut().unwrap().oom_kills = kills;
        let (decision, next) = decide(&resting, &state);
        assert_eq!(decision.reason, Reason::BackingOff);
        assert_eq!(decision.own.claim, 0, "nor promised to others");
        state = next;
        // … but after it.
        now_ms += rest;
        let (decision, _) = decide(&reading(now_ms, 0, 10), &state);
        assert_eq!(decision.reason, Reason::HostPressure);
    }
    assert_eq!(rests, [10, 20, 40, 60, 60]);
    // Long after it is forgotten.
    now_ms += 61 * MINUTE_MS;
    for more in [0, 1] {
        let mut reading = reading(now_ms + more * 1000, 100 * MIB, 50);
        reading.guest.as_mut().unwrap().oom_kills = kills + more;
        (_, state) = decide(&reading, &state);
    }
    assert_eq!(state.back_off_ms(now_ms + 1000), Some(BACK_OFF_MS));
}

#[test]
fn an_inflation_that_comes_to_nothing_is_given_up() {
    let decisions = follow(10, 300 * MIB, 15, |second, reading| {
        // A megabyte a second of what it should give.
        reading.balloon.target = 300 * MIB;
        reading.balloon.actual = (200 + second) * MIB;
    });
    for decision in &decisions[..5] {
        assert_eq!((decision.target, decision.trouble), (300 * MIB, None));
    }
    assert_eq!(decisions[5].trouble, Some(Reason::Stalled));
    assert_eq!(decisions[5].target, (205 - 128) * MIB);
    // One that is merely slow is not.
    let decisions = follow(20, 300 * MIB, 15, |second, reading| {
        reading.balloon.target = 300 * MIB;
        reading.balloon.actual = (200 + 5 * second) * MIB;
    });
    assert!(decisions.iter().all(|decision| decision.trouble.is_none()));
}

#[test]
fn a_guest_that_waits_for_cpus_has_not_stalled_unless_it_gives_nothing_for_them() {
    // As in the lab, where 24 guests that were busy shared one CPU: 1.2 MiB a second.
    let follow_given = |ran_percent: u64, kib_each_second: u64| {
        follow(30, 0, 15, |second, r| {
            r.balloon.target = 200 * MIB;
            r.balloon.actual = second * kib_each_second * 1024;
            r.vcpus.run_ns = second * ran_percent * 10_000_000;
            r.vcpus.delay_ns = second * (100 - ran_percent) * 10_000_000;
        })
    };
    let troubles = |decisions: Vec<Decision>| {
        let troubles = decisions.iter().filter_map(|d| d.trouble);
        troubles.collect::<Vec<_>>()
    };
    assert_eq!(troubles(follow_given(5, 1200)), []);
    assert_eq!(troubles(follow_given(25, 1200)), []);
    for (ran, given) in [(100, 1200), (50, 1200), (5, 100), (5, 0), (0, 0)] {
        let found = troubles(follow_given(ran, given));
        assert_eq!(found.first(), Some(&Reason::Stalled), "{ran} {given}");
    }
}

#[test]
fn a_guest_that_waits_for_the_hosts_memory_has_not_stalled_unless_it_gives_nothing() {
    let first_trouble = |some: u32, of_cgroup: bool, kib_each_second: u64| {
        let decisions = follow(30, 0, 2, |second, r| {
            r.balloon.target = 200 * MIB;
            r.balloon.actual = second * kib_each_second * 1024;
            let pressure = Some(Pressure { some, full: 0 });
            match of_cgroup {
                true => r.host.cgroup_pressure = pressure,
                false => r.host.pressure = pressure,
            }
        });
        decisions.iter().find_map(|decision| decision.trouble)
    };
    let stalled = Some(Reason::Stalled);
    for (some, given, trouble) in [
        // As in the lab, where 15 guests had their bursts at once.
        (9500, 1200, None),
        (7500, 1200, None),
        (5000, 1200, stalled),
        (0, 1200, stalled),
        (9500, 100, stalled),
        (10_000, 0, stalled),
        (u32::MAX, 0, stalled),
    ] {
        for of_cgroup in [false, true] {
            let found = first_trouble(some, of_cgroup, given);
            assert_eq!(found, trouble, "{some} {of_cgroup} {given}");
        }
    }
}

#[test]
fn time_in_which_nobody_looked_is_not_held_against_the_guest() {
    let mut state = State::default();
    for now_ms in [0, 1000, 600_000, 601_000, 604_000] {
        let mut reading = reading(now_ms, 300 * MIB, 15);
        reading.balloon.actual = 0;
        let (decision, next) = decide(&reading, &state);
        assert_eq!(decision.trouble, None, "at {now_ms}");
        state = next;
    }
    let mut reading = reading(605_000, 300 * MIB, 15);
    reading.balloon.actual = 0;
    assert_eq!(decide(&reading, &state).0.trouble, Some(Reason::Stalled));
}

#[test]
fn a_guest_that_falls_silent_gets_everything_after_a_while() {
    let decisions = follow(60, 300 * MIB, 50, |_, reading| {
        reading.guest.as_mut().unwrap().at_ms = 0;
    });
    let first = decisions.iter().position(|d| d.target == 0).unwrap();
    // Its statistics are fresh for 5 seconds, and then missed for 30.
    assert_eq!(first, 36);
    assert_eq!(decisions[first].reason, Reason::NoStatistics);
}

#[test]
fn ease_has_to_last_and_is_answered_slowly() {
    let decisions = follow(200, 100 * MIB, 50, |_, _| {});
    let steps: Vec<_> = (1..200)
        .filter(|&at| decisions[at].target != decisions[at - 1].target)
        .collect();
    assert_eq!(steps, [30, 40, 50, 60]);
    assert_eq!(decisions[199].target, 0);
}

#[test]
fn what_is_given_back_leaves_the_host_its_reserve() {
    // Of 10 GiB, 512 MiB are the reserve; distress may use three quarters of it.
    for (available, given) in [(100, 0), (128, 0), (178, 50), (428, 300), (600, 300)] {
        let decisions = follow(3, 300 * MIB, 50, |second, reading| {
            if second == 2 {
                reading.host.available = available * MIB;
                reading.guest.as_mut().unwrap().oom_kills = 1;
            }
        });
        assert_eq!(decisions[2].target, (300 - given) * MIB, "{available}");
        assert_eq!(decisions[2].trouble, Some(Reason::Distress));
    }
    // A mere need may not.
    for (available, given) in [(500, 0), (512, 0), (522, 10), (1024, 24)] {
        let mut reading = reading(0, 200 * MIB, 50);
        reading.host.available = available * MIB;
        // Not critical, which would leave it to distress.
        reading.limits.host_free_percent = 1;
        reading.guest.as_mut().unwrap().available = 32 * MIB;
        let (decision, _) = decide(&reading, &State::default());
        assert_eq!(decision.target, (200 - given) * MIB, "{available}");
        let reason = if given == 0 {
            Reason::Reserve
        } else {
            Reason::GuestNeeds
        };
        assert_eq!(decision.reason, reason);
    }
}

#[test]
fn a_need_whose_answer_makes_the_host_critical_does_not_swing() {
    let limits = Limits {
        ram: 1024 * MIB,
        max: 720 * MIB,
        guaranteed: 80 * MIB,
        buffer_percent: 114,
        step: 72 * MIB,
        host_free_percent: 30,
        ..limits()
    };
    let mut vm = [model::Vm::new(limits, 376 * MIB, 350 * MIB)];
    let mut targets = Vec::new();
    for second in 0..300 {
        let host = model::host(8 * GIB, 6860 * MIB, &vm);
        vm[0].look(second * 1000, host, Neighbours::default());
        targets.push(vm[0].target);
    }
    assert!(targets[0] < 376 * MIB);
    assert!(targets.is_sorted_by(|a, b| a >= b), "{targets:?}");
}

#[test]
fn what_was_given_back_is_not_given_again_until_it_is_touched() {
    let mut reading = reading(0, 200 * MIB, 50);
    reading.limits.host_free_percent = 1;
    reading.host.available = 532 * MIB;
    reading.guest.as_mut().unwrap().available = 0;
    let (first, state) = decide(&reading, &State::default());
    assert_eq!(first.target, 180 * MIB);
    assert_eq!(first.own.pending, 20 * MIB);
    // The guest has it, and has not touched it.
    let mut again = reading;
    again.now_ms = 1000;
    again.balloon.target = 180 * MIB;
    again.balloon.actual = 180 * MIB;
    again.guest.as_mut().unwrap().at_ms = 1000;
    let (second, _) = decide(&again, &state);
    assert!(second.target >= 179 * MIB, "{second:?}");
    // Nor is what others were given.
    reading.neighbours.pending = 20 * MIB;
    assert_eq!(
        decide(&reading, &State::default()).0.reason,
        Reason::Reserve
    );
}

#[test]
fn vms_share_by_idle_memory_and_weight() {
    let mut reading = reading(0, 0, 15);
    reading.limits.step = 512 * MIB;
    // The host is short of 600 MiB.
    reading.host.available = ease(&reading.host, 20) - 600 * MIB;
    let alone = decide(&reading, &State::default()).0;
    let idle = 412 * MIB - 25 * MIB;
    assert_eq!(alone.target, 352 * MIB, "as far as the guarantee lets it");
    assert_eq!(alone.own.claim, claim(idle.min(352 * MIB), 100));
    // One other that is as idle and weighs half as much gives twice as much.
    reading.neighbours.claims = 2 * alone.own.claim;
    reading.neighbours.vms = 1;
    let beside = decide(&reading, &State::default()).0;
    assert_eq!(beside.target, 200 * MIB);
}
