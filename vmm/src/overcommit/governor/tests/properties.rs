//! What holds whatever is read.

use super::model::{Vm, host, neighbours};
use super::*;

fn pages(most: u64) -> impl Strategy<Value = u64> {
    (0..=most / PAGE).prop_map(|pages| pages * PAGE)
}

prop_compose! {
    fn any_limits()(
        ram in (16 * MIB / PAGE..=8 * GIB / PAGE).prop_map(|pages| pages * PAGE),
        max in 0..=1000_u64,
        guaranteed in 0..=1000_u64,
        others in prop_oneof![3 => Just(0), 1 => pages(GIB)],
        weight in 1..=10_000_u32,
        buffer_percent in 1..=200_u32,
        step in (MIB / PAGE..=512 * MIB / PAGE).prop_map(|pages| pages * PAGE),
        host_free_percent in 1..=50_u32,
    ) -> Limits {
        let max = whole_pages(part(ram, max, 1000));
        Limits {
            ram,
            max,
            guaranteed: whole_pages(part(max, guaranteed, 1000)),
            others_target: others,
            others_actual: others / 2,
            weight,
            buffer_percent,
            step,
            interval_ms: 1000,
            host_free_percent,
        }
    }
}

fn any_pressure() -> impl Strategy<Value = Option<Pressure>> {
    prop_oneof![
        1 => Just(None),
        4 => (0..=2000_u32, 0..=1500_u32).prop_map(|(some, full)| Some(Pressure { some, full })),
    ]
}

prop_compose! {
    fn any_guest()(
        age_ms in 0..=10_000_u64,
        available in prop_oneof![8 => 0..=8 * GIB, 1 => any::<u64>()],
        counters in prop::array::uniform4(prop_oneof![8 => 0..100_u64, 1 => any::<u64>()]),
    ) -> GuestReading {
        let [oom_kills, alloc_stalls, direct_reclaims, major_faults] = counters;
        GuestReading {
            at_ms: age_ms,
            available,
            oom_kills: oom_kills / 90,
            alloc_stalls,
            direct_reclaims,
            major_faults,
        }
    }
}

type Seen = (
    Option<GuestReading>,
    HostReading,
    Neighbours,
    u64,
    u64,
    bool,
);

/// All that changes from one look to the next. The guest's `at_ms` is an age here.
fn any_seen() -> impl Strategy<
    Value = (
        Option<GuestReading>,
        HostReading,
        Neighbours,
        u64,
        u64,
        bool,
    ),
> {
    let host =
        (0..=16 * GIB, any_pressure(), any_pressure()).prop_map(|(available, p, c)| HostReading {
            total: 16 * GIB,
            available,
            pressure: p,
            cgroup_pressure: c,
        });
    let neighbours = (0..=8 * GIB, 0..=4 * GIB).prop_map(|(claims, pending)| Neighbours {
        vms: 1,
        claims,
        pending,
    });
    (
        prop::option::weighted(0.9, any_guest()),
        host,
        neighbours,
        // How close the guest comes to the target, in thousandths, and how much time passes.
        prop_oneof![3 => Just(1000), 1 => 0..=1000_u64],
        prop_oneof![8 => Just(1000), 1 => 1..=700_000_u64],
        prop::bool::weighted(0.95),
    )
}

/// Looks at each in turn; gives every reading with its decision and the state before.
fn replay(limits: Limits, mut target: u64, seen: &[Seen]) -> Vec<(Reading, State, Decision)> {
    let mut state = State::default();
    let mut now_ms = 0;
    let mut all = Vec::new();
    for (guest, host, neighbours, reached, passed, driver) in seen {
        now_ms += passed;
        let reading = Reading {
            now_ms,
            limits,
            balloon: BalloonReading {
                target,
                actual: whole_pages(part(target, *reached, 1000)),
                driver: *driver,
            },
            guest: guest.map(|guest| GuestReading {
                at_ms: now_ms.saturating_sub(guest.at_ms),
                ..guest
            }),
            host: *host,
            neighbours: *neighbours,
            vcpus: CpuTime::default(),
        };
        let (decision, next) = decide(&reading, &state);
        all.push((reading, state, decision));
        state = next;
        target = decision.target;
    }
    all
}

proptest! {
    #[test]
    fn never_below_the_guarantee_never_more_than_a_step_and_whole_pages(
        limits in any_limits(),
        target in pages(8 * GIB),
        seen in prop::collection::vec(any_seen(), 1..40),
    ) {
        for (reading, _, decision) in replay(limits, target, &seen) {
            prop_assert!(decision.target <= limits.most(), "{decision:?}");
            let left = limits.ram.saturating_sub(limits.others_target);
            if limits.others_target + limits.guaranteed <= limits.ram {
                prop_assert!(left - decision.target >= limits.guaranteed);
            }
            prop_assert!(decision.target <= reading.balloon.target + limits.step);
            prop_assert!(decision.target.is_multiple_of(PAGE));
        }
    }

    #[test]
    fn nothing_is_taken_without_fresh_statistics_nor_while_it_rests(
        limits in any_limits(),
        seen in prop::collection::vec(any_seen(), 1..40),
    ) {
        for (reading, state, decision) in replay(limits, 0, &seen) {
            if decision.target > reading.balloon.target {
                let guest = reading.guest.unwrap();
                prop_assert!(reading.now_ms - guest.at_ms <= FRESH_MS);
                prop_assert!(state.back_off_ms(reading.now_ms).is_none());
                prop_assert!(reading.balloon.driver);
            }
        }
    }

    #[test]
    fn more_pressure_never_leaves_the_guest_more(
        limits in any_limits(),
        target in pages(4 * GIB),
        seen in prop::collection::vec(any_seen(), 1..40),
        less in prop::collection::vec((0..=16 * GIB, 0..=1000_u32, 0..=1000_u32), 40),
    ) {
        let all = replay(limits, target, &seen);
        for ((reading, state, decision), (less, some, full)) in all.into_iter().zip(less) {
            let mut worse = reading;
            worse.host.available = reading.host.available.saturating_sub(less);
            worse.host.pressure = reading.host.pressure.map(|pressure| Pressure {
                some: pressure.some + some,
                full: pressure.full + full,
            });
            let (under_pressure, _) = decide(&worse, &state);
            prop_assert!(
                under_pressure.target >= decision.target,
                "{decision:?}\n{under_pressure:?}\n{reading:?}\n{state:?}"
            );
        }
    }

    #[test]
    fn on_a_host_and_guest_that_stay_as_they_are_it_settles_without_turning_back_and_forth(
        limits in any_limits(),
        used in 0..=1000_u64,
        other in 0..=1000_u64,
        begin in 0..=1000_u64,
        psi in prop_oneof![Just(0), 0..=2000_u32],
    ) {
        let limits = Limits { others_target: 0, others_actual: 0, ..limits };
        let used = part(limits.ram, used, 1000);
        let begin = whole_pages(part(limits.most(), begin, 1000));
        let mut vm = [Vm::new(limits, begin, used)];
        let total = 8 * GIB;
        let mut turns = 0;
        let mut direction = std::cmp::Ordering::Equal;
        let mut last_change = 0;
        // Long enough for one step of 1 MiB every ten seconds.
        for second in 0..100_000 {
            let mut host = host(total, part(total, other, 1000), &vm);
            host.pressure = Some(Pressure { some: psi, full: 0 });
            let before = vm[0].target;
            vm[0].look(second * 1000, host, Neighbours::default());
            let now = vm[0].target.cmp(&before);
            if now.is_ne() {
                last_change = second;
                if direction.is_ne() && now != direction {
                    turns += 1;
                }
                direction = now;
            }
            if second - last_change > 200 {
                break;
            }
        }
        prop_assert!(turns <= 1, "{turns} turns");
    }

    #[test]
    fn give_backs_that_come_together_do_not_exhaust_the_host(
        vms in 2..12_usize,
        given in 1..=3_u64,
        other in 0..=1000_u64,
    ) {
        let limits = Limits {
            ram: 4 * GIB, max: 4 * GIB, guaranteed: GIB, step: 200 * MIB, ..limits()
        };
        let total = 16 * GIB;
        let mut vms = vec![Vm::new(limits, given * GIB, 900 * MIB); vms];
        let other = part(total, other, 1000);
        // What is available before anyone takes anything back.
        let free = host(total, other, &vms).available;
        for second in 0..20 {
            // Nobody touches what it gets: the host looks as it did.
            let host = HostReading { available: free, ..host(total, 0, &[]) };
            for at in 0..vms.len() {
                let others = neighbours(&vms, at);
                vms[at].oom_kills = second;
                vms[at].look(second * 1000, host, others);
            }
            // All at once do.
            let promised: u64 = vms.iter().map(|vm| (given * GIB).saturating_sub(vm.target)).sum();
            prop_assert!(promised <= free.max(1), "{promised} of {free}");
            if second >= 10 {
                break;
            }
        }
    }
}

#[test]
fn vms_of_several_weights_settle_with_what_the_host_needs() {
    let limits = |weight| Limits { weight, ..limits() };
    let mut vms = [100, 200, 400].map(|weight| Vm::new(limits(weight), 0, 60 * MIB));
    let total = 2 * GIB;
    for second in 0..300 {
        for at in 0..vms.len() {
            let seen = host(total, 300 * MIB, &vms);
            let others = neighbours(&vms, at);
            vms[at].look(second * 1000, seen, others);
        }
    }
    let given = vms.map(|vm| vm.target);
    assert!(given[0] > given[1] && given[1] > given[2], "{given:?}");
    let left = host(total, 300 * MIB, &vms);
    assert!(left.available >= part(total, 20, 100), "{left:?}");
    // Nor did they take much more than was missing.
    assert!(left.available <= part(total, 35, 100), "{left:?}");
}
