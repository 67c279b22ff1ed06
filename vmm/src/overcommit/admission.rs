//! Whether one more VM fits: pure arithmetic over what is asked, what the others have, and the
//! host's limits.
//!
//! What is guaranteed is there at all times, whatever every guest does at once: the sum of all
//! guarantees, of what the VMMs themselves need, and of the reserve is at most the memory. Beyond
//! that it can be promised what is not there, up to the operator's `ratio`.
//!
//! Memory is limited at the host and at each cgroup (v2) with a `memory.max` that the process is
//! in: each is a [`Ceiling`] of its own, which counts those VMs that are below it, and those of
//! which that can't be told (see [`super::ledger::lineage`]). A ceiling that is one VM's alone
//! needs no reserve: there is nobody to give anything back to.

use std::collections::BTreeSet;

use thiserror::Error;

use super::ledger::lineage::{Below, Lineage};
use super::ledger::{Limits, Record, Reservation};
use crate::config::{OvercommitConfig, VmConfig};

const MIB: u64 = 1 << 20;

impl Reservation {
    /// What the VM of a configuration asks for. Without an `overcommit` section its whole RAM is
    /// guaranteed, as nothing there says that any of it may be missing. RAM in huge pages comes
    /// out of a pool that the kernel keeps account of.
    pub fn of(config: &VmConfig) -> Self {
        let ram = config.memory.size;
        let overhead = overhead(config);
        if config.memory.hugepages {
            return Self {
                overhead,
                huge_pages: ram,
                ..Self::default()
            };
        }
        // The guest can have all RAM, by a client's word if not by the governor's.
        Self {
            max: ram,
            guaranteed: config.guaranteed_bytes(),
            overhead,
            huge_pages: 0,
        }
    }
}

impl VmConfig {
    /// How much the VM counts beside the others.
    pub fn weight(&self) -> u64 {
        let default = OvercommitConfig::default().weight;
        let weight = self.overcommit.as_ref().map_or(default, |o| o.weight);
        weight.into()
    }
}

/// Bytes that a VM costs the host beyond its RAM, by what its configuration says: the process
/// itself, its threads, the kernel's structures for each vCPU, and the page tables of host and
/// guest (8 bytes for a page of 4 KiB, each). An upper bound for ordinary VMs: 4 to 6 MB were
/// measured of one with 256 MiB.
pub fn overhead(config: &VmConfig) -> u64 {
    let vcpus = u64::from(config.cpus.boot_vcpus);
    8 * MIB + vcpus * MIB + config.memory.size / 256
}

/// A limit of memory that VMs share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ceiling {
    /// Whose it is, for people: `the host`, or `cgroup /vms.slice`.
    pub name: String,
    /// Bytes of memory.
    pub bytes: u64,
    /// The cgroup whose it is, and those above it; `None` is everywhere.
    pub cgroup: Option<Lineage>,
    /// All cgroups below that one, where somebody has looked and has seen them all.
    pub inside: Option<BTreeSet<u64>>,
}

impl Ceiling {
    /// Whether it holds for a process in `cgroup`; where that can't be told, it does.
    fn covers(&self, cgroup: &Lineage) -> bool {
        let Some(own) = &self.cgroup else {
            return true;
        };
        match cgroup.is_below(own) {
            Below::Yes => true,
            Below::No => false,
            Below::Unknown => {
                let known = self.inside.as_ref().filter(|_| cgroup.device == own.device);
                let found = known.zip(cgroup.top());
                found.is_none_or(|(inside, top)| inside.contains(&top))
            }
        }
    }
}

/// The numbers of a decision at one ceiling, all in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    /// The ceiling's name.
    pub ceiling: String,
    /// What is asked for: the guarantee, the most, and what the VMM needs.
    pub asked: Reservation,
    /// Guarantees of the others, and what their VMMs need.
    pub guaranteed_by_others: u64,
    /// The most that the others may come to have.
    pub promised_by_others: u64,
    /// What no guarantee may use.
    pub reserve: u64,
    /// The ceiling.
    pub memory: u64,
    /// Most that may be promised for each byte.
    pub ratio: Option<f64>,
}

impl Numbers {
    fn guaranteed(&self) -> u128 {
        sum([self.asked.fixed(), self.guaranteed_by_others, self.reserve])
    }

    fn promised(&self) -> u128 {
        sum([self.asked.promised(), self.promised_by_others])
    }
}

/// Why a VM does not fit.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Refusal {
    /// The guarantees would not be.
    #[error(
        "the guarantee of {} bytes and {} for the VMM, {} that other VMs are guaranteed and a \
         reserve of {} make {}; {} has {}",
        .0.asked.guaranteed, .0.asked.overhead, .0.guaranteed_by_others, .0.reserve,
        .0.guaranteed(), .0.ceiling, .0.memory
    )]
    Guarantees(Box<Numbers>),
    /// More would be promised than the operator allows.
    #[error(
        "{} bytes of RAM and {} for the VMM, and {} that other VMs are promised make {}; {} has \
         {}, of which {} times as much may be promised",
        .0.asked.max, .0.asked.overhead, .0.promised_by_others, .0.promised(), .0.ceiling,
        .0.memory, .0.ratio.unwrap_or_default()
    )]
    Ratio(Box<Numbers>),
}

impl Refusal {
    /// The numbers behind it.
    pub fn numbers(&self) -> &Numbers {
        let (Self::Guarantees(numbers) | Self::Ratio(numbers)) = self;
        numbers
    }
}

/// Decides whether a VM may have what it asks for beside the others. The `ceilings` are those that
/// hold for it.
pub fn admit<'a>(
    asked: Reservation,
    others: impl Iterator<Item = &'a Record> + Clone,
    ceilings: &[Ceiling],
    limits: &Limits,
) -> Result<(), Refusal> {
    for ceiling in ceilings {
        let others = others
            .clone()
            .filter(|other| ceiling.covers(&other.lineage));
        let mut numbers = Numbers {
            ceiling: ceiling.name.clone(),
            asked,
            guaranteed_by_others: 0,
            promised_by_others: 0,
            reserve: 0,
            memory: ceiling.bytes,
            ratio: limits.ratio,
        };
        let mut alone = ceiling.cgroup.is_some();
        for other in others {
            let add = u64::saturating_add;
            let theirs = other.reservation;
            numbers.guaranteed_by_others = add(numbers.guaranteed_by_others, theirs.fixed());
            numbers.promised_by_others = add(numbers.promised_by_others, theirs.promised());
            alone &= theirs == Reservation::default();
        }
        if !alone {
            numbers.reserve = limits.reserve(ceiling.bytes);
        }
        if numbers.guaranteed() > u128::from(ceiling.bytes) {
            return Err(Refusal::Guarantees(Box::new(numbers)));
        }
        let most = limits.ratio.map(|ratio| ceiling.bytes as f64 * ratio);
        if most.is_some_and(|most| numbers.promised() as f64 > most) {
            return Err(Refusal::Ratio(Box::new(numbers)));
        }
    }
    Ok(())
}

fn sum<const N: usize>(numbers: [u64; N]) -> u128 {
    numbers.into_iter().map(u128::from).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(bytes: u64) -> Ceiling {
        Ceiling {
            name: "the host".into(),
            bytes,
            cgroup: None,
            inside: None,
        }
    }

    /// The cgroups of these tests: `/` is 1, and each other one has a number.
    fn lineage(groups: &[u64]) -> Lineage {
        Lineage {
            device: 38,
            groups: groups.to_vec(),
            whole: groups.last() == Some(&1),
        }
    }

    fn group(groups: &[u64], bytes: u64) -> Ceiling {
        Ceiling {
            name: format!("cgroup {}", groups[0]),
            bytes,
            cgroup: Some(lineage(groups)),
            inside: None,
        }
    }

    fn reservation(guaranteed: u64, max: u64) -> Reservation {
        Reservation {
            max,
            guaranteed,
            overhead: 10,
            huge_pages: 0,
        }
    }

    fn other(groups: &[u64], guaranteed: u64, max: u64) -> Record {
        Record {
            lineage: lineage(groups),
            reservation: reservation(guaranteed, max),
            ..Record::default()
        }
    }

    fn limits(reserve: u64, ratio: Option<f64>) -> Limits {
        Limits {
            reserve: Some(reserve),
            ratio,
        }
    }

    #[test]
    fn guarantees_overheads_and_the_reserve_fill_the_host_to_the_last_byte() {
        let others = [other(&[1], 300, 900), other(&[], 100, 900)];
        let decide = |guaranteed, memory| {
            let asked = reservation(guaranteed, 900);
            admit(asked, others.iter(), &[host(memory)], &limits(70, None))
        };
        // 300 + 10 + 100 + 10, 500 + 10, 70
        assert_eq!(decide(500, 1000), Ok(()));
        let refusal = decide(501, 1000).unwrap_err();
        assert!(matches!(refusal, Refusal::Guarantees(_)));
        assert_eq!(
            refusal.to_string(),
            "the guarantee of 501 bytes and 10 for the VMM, 420 that other VMs are guaranteed \
             and a reserve of 70 make 1001; the host has 1000"
        );
    }

    #[test]
    fn more_may_be_promised_than_there_is_up_to_the_ratio() {
        let others = [other(&[1], 100, 900)];
        let decide = |max, ratio| {
            let asked = reservation(100, max);
            admit(asked, others.iter(), &[host(1000)], &limits(0, ratio))
        };
        assert_eq!(decide(1_000_000, None), Ok(()));
        assert_eq!(decide(580, Some(1.5)), Ok(()));
        let refusal = decide(581, Some(1.5)).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "581 bytes of RAM and 10 for the VMM, and 910 that other VMs are promised make 1501; \
             the host has 1000, of which 1.5 times as much may be promised"
        );
    }

    #[test]
    fn a_cgroup_counts_those_below_it_and_needs_no_reserve_for_one_alone() {
        let ceilings = [host(10_000), group(&[2, 1], 1000), group(&[3, 2, 1], 510)];
        let others = [other(&[4, 1], 5000, 5000), other(&[5, 1], 900, 900)];
        let decide = |others: &[Record], guaranteed| {
            let asked = reservation(guaranteed, guaranteed);
            admit(asked, others.iter(), &ceilings, &limits(100, None))
        };
        assert_eq!(decide(&others, 500), Ok(()));
        let refusal = decide(&others, 501).unwrap_err();
        assert_eq!(refusal.numbers().ceiling, "cgroup 3");
        // A neighbour in the slice: now it has a reserve.
        let mut others = others.to_vec();
        others.push(other(&[6, 2, 1], 380, 380));
        assert_eq!(decide(&others, 500), Ok(()));
        others.push(other(&[7, 2, 1], 0, 0));
        let refusal = decide(&others, 500).unwrap_err();
        assert_eq!(refusal.numbers().ceiling, "cgroup 2");
        assert_eq!(refusal.numbers().reserve, 100);
        assert_eq!(refusal.numbers().guaranteed_by_others, 400);
    }

    #[test]
    fn a_vm_in_a_container_counts_where_it_is_and_everywhere_if_nobody_knows() {
        let mut slice = group(&[2, 1], 1000);
        let decide = |slice: &Ceiling, other: Record| {
            let asked = reservation(500, 500);
            admit(
                asked,
                [other].iter(),
                &[host(10_000), slice.clone()],
                &limits(0, None),
            )
        };
        // It sees no further than its own root, which may be the slice …
        assert!(decide(&slice, other(&[9, 2], 481, 481)).is_err());
        assert!(decide(&slice, other(&[2], 481, 481)).is_err());
        // … or elsewhere: that says who sees more.
        let unknown = other(&[9, 8], 481, 481);
        assert!(decide(&slice, unknown.clone()).is_err());
        slice.inside = Some(BTreeSet::from([8, 9]));
        assert!(decide(&slice, unknown.clone()).is_err());
        slice.inside = Some(BTreeSet::from([3]));
        assert_eq!(decide(&slice, unknown), Ok(()));
        // Of these, nothing can be said.
        assert!(decide(&slice, other(&[], 481, 481)).is_err());
        let mut foreign = other(&[9, 8], 481, 481);
        foreign.lineage.device = 39;
        assert!(decide(&slice, foreign).is_err());
    }

    #[test]
    fn a_vm_without_a_policy_is_guaranteed_all_its_ram() {
        let reservation = |text: &str| {
            let config: VmConfig = serde_json::from_str(text).unwrap();
            Reservation::of(&config)
        };
        let all = reservation(r#"{"memory": {"size": 67108864}}"#);
        assert_eq!((all.guaranteed, all.max), (64 * MIB, 64 * MIB));
        assert!(all.overhead >= 8 * MIB && all.overhead < 16 * MIB);
        let part = reservation(
            r#"{"memory": {"size": 67108864}, "overcommit": {"guaranteed_size": 16777216}}"#,
        );
        assert_eq!((part.guaranteed, part.max), (16 * MIB, 64 * MIB));
        let default =
            reservation(r#"{"memory": {"size": 67108864}, "overcommit": {"mode": "auto"}}"#);
        assert_eq!(default.guaranteed, 32 * MIB);
        let huge = reservation(r#"{"memory": {"size": 67108864, "hugepages": true}}"#);
        assert_eq!((huge.guaranteed, huge.max), (0, 0));
        assert_eq!(huge.huge_pages, 64 * MIB);
        assert!(huge.overhead > 0);
    }

    proptest! {
        #[test]
        fn whoever_is_admitted_one_after_another_fits_together(
            asked in proptest::collection::vec((0..500_u64, 0..2000_u64, 0..6_usize), 0..30),
            memory in 0..3000_u64,
            slice in 0..3000_u64,
            reserve in 0..500_u64,
            ratio in proptest::option::of(0.1..3.0),
        ) {
            // In the slice (2) and without; the last see nothing above their own cgroup.
            let places: [&[u64]; 6] = [&[1], &[2, 1], &[3, 2, 1], &[5, 1], &[4], &[6]];
            let below_slice = |record: &Record| [2, 3, 4].contains(&record.lineage.groups[0]);
            let limits = limits(reserve, ratio);
            let mut admitted: Vec<Record> = Vec::new();
            for (guaranteed, more, place) in asked {
                let record = other(places[place], guaranteed, guaranteed + more);
                let mut ceilings = vec![host(memory)];
                if record.lineage.groups.contains(&2) {
                    let mut slice = group(&[2, 1], slice);
                    slice.inside = (guaranteed % 2 == 0).then(|| BTreeSet::from([3, 4]));
                    ceilings.push(slice);
                }
                if admit(record.reservation, admitted.iter(), &ceilings, &limits).is_err() {
                    continue;
                }
                admitted.push(record);
                let total = |which: &dyn Fn(&Record) -> bool, what: fn(&Reservation) -> u64| {
                    let those = admitted.iter().filter(|r| which(r));
                    those.map(|r| what(&r.reservation)).sum::<u64>()
                };
                prop_assert!(total(&|_| true, Reservation::fixed) + reserve <= memory);
                if let Some(ratio) = ratio {
                    let promised = total(&|_| true, Reservation::promised);
                    prop_assert!(promised as f64 <= memory as f64 * ratio);
                }
                if ceilings.len() > 1 {
                    prop_assert!(total(&below_slice, Reservation::fixed) <= slice);
                }
            }
        }

        #[test]
        fn the_largest_numbers_are_refused_and_do_no_harm(
            guaranteed in any::<u64>(), max in any::<u64>(), overhead in any::<u64>(),
            memory in any::<u64>(), reserve in any::<u64>(),
        ) {
            let asked = Reservation { max, guaranteed, overhead, huge_pages: 0 };
            let others = [Record { reservation: asked, ..Record::default() }];
            let result = admit(asked, others.iter(), &[host(memory)], &limits(reserve, None));
            let needed = 2 * u128::from(asked.fixed()) + u128::from(reserve);
            // Sums stop at the largest number, which no host has.
            prop_assert_eq!(result.is_ok(), needed <= u128::from(memory));
            if let Err(refusal) = result {
                prop_assert!(!refusal.to_string().is_empty());
            }
        }
    }
}
