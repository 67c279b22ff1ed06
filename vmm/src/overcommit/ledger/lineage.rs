//! Which cgroup (v2) a process is in, told so that others understand it whatever they see.
//!
//! A path will not do: with a cgroup namespace of its own each container's root is `/`, and what
//! lies above can't be named at all. The inode of a cgroup's directory is its identifier
//! (cgroup_id() of the kernel), the same in every namespace and mount, and never used again until
//! the host boots. So a process tells the inodes from its own cgroup upwards, as far as it sees:
//!
//! ```text
//!   hierarchy        seen from the host        seen from the container
//!   / ············ 1      40 → 7 → 1                    40 → 7
//!   └ c ·········· 7        (whole)              (ends at its root)
//!     └ vm ······ 40
//! ```
//! Whether one cgroup lies below another then follows from the lists, but for those that end
//! below what the other sees: see [`Below::Unknown`].

/// Bytes that a lineage takes as text; of a longer one the top is cut off, as if it were not seen.
const TEXT_BYTES: usize = 1024;

/// A cgroup and those above it; empty where none was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// The device number of the hierarchy, which is one for the whole host.
    pub device: u64,
    /// The inodes of the directories, from the cgroup itself upwards.
    pub groups: Vec<u64>,
    /// Whether the last of them is the root of the hierarchy.
    pub whole: bool,
}

/// Whether a cgroup is another one or lies below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// It does.
    Yes,
    /// It does not.
    No,
    /// The lists have nothing in common: it does if the last cgroup that it sees does.
    Unknown,
}

impl Lineage {
    /// Whether this cgroup is the first of `other` or lies below it.
    pub fn is_below(&self, other: &Self) -> Below {
        let Some(group) = other.groups.first() else {
            return Below::Unknown;
        };
        if self.device != other.device || self.groups.is_empty() {
            return Below::Unknown;
        }
        if self.groups.contains(group) {
            return Below::Yes;
        }
        // What both have is above the other cgroup, which is not on the way from there to this.
        let met = self.groups.iter().any(|group| other.groups.contains(group));
        if self.whole || met {
            Below::No
        } else {
            Below::Unknown
        }
    }

    /// The last cgroup that is seen upwards.
    pub fn top(&self) -> Option<u64> {
        self.groups.last().copied()
    }

    /// As it stands in a record: `DEVICE INODE INODE …`, and `root` at the end of a whole one.
    pub(super) fn encode(&self) -> String {
        let mut text = self.device.to_string();
        let end = " root";
        for group in &self.groups {
            let group = format!(" {group}");
            if text.len() + group.len() + end.len() > TEXT_BYTES {
                return text;
            }
            text += &group;
        }
        if self.whole {
            text += end;
        }
        text
    }

    /// Reads that; what is no lineage is one of which nothing is known.
    pub(super) fn decode(text: &str) -> Self {
        let (list, whole) = match text.strip_suffix(" root") {
            Some(list) => (list, true),
            None => (text, false),
        };
        let numbers: Result<Vec<u64>, _> = list.split(' ').map(str::parse).collect();
        match numbers.as_deref() {
            Ok([device, groups @ ..]) if !groups.is_empty() => Self {
                device: *device,
                groups: groups.to_vec(),
                whole,
            },
            _ => Self::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lineage(groups: &[u64]) -> Lineage {
        Lineage {
            device: 38,
            groups: groups.to_vec(),
            whole: groups.last() == Some(&1),
        }
    }

    #[test]
    fn a_cgroup_is_found_below_another_whoever_has_looked() {
        let container = lineage(&[7, 1]);
        for (who, below) in [
            (lineage(&[7, 1]), Below::Yes),
            (lineage(&[40, 7, 1]), Below::Yes),
            // From inside.
            (lineage(&[40, 7]), Below::Yes),
            (lineage(&[7]), Below::Yes),
            (lineage(&[8, 1]), Below::No),
            (lineage(&[1]), Below::No),
            // Its root may be below ours.
            (lineage(&[40]), Below::Unknown),
            (lineage(&[]), Below::Unknown),
            (
                Lineage {
                    device: 39,
                    ..lineage(&[40, 7])
                },
                Below::Unknown,
            ),
        ] {
            assert_eq!(who.is_below(&container), below, "{who:?}");
        }
        // Seen from a container, of another process of it and of one beside or above it.
        let inside = lineage(&[41, 40, 7]);
        for (who, below) in [
            (lineage(&[42, 41, 40, 7]), Below::Yes),
            (lineage(&[43, 40, 7, 1]), Below::No),
            (lineage(&[43, 7]), Below::No),
            (lineage(&[7, 1]), Below::No),
            (lineage(&[9, 1]), Below::No),
            (lineage(&[9]), Below::Unknown),
        ] {
            assert_eq!(who.is_below(&inside), below, "{who:?}");
        }
        assert_eq!(inside.is_below(&Lineage::default()), Below::Unknown);
    }

    #[test]
    fn a_deep_one_loses_its_top_and_says_so() {
        let deep = lineage(
            &(1..=500)
                .map(|n| u64::MAX - n)
                .chain([1])
                .collect::<Vec<_>>(),
        );
        assert!(deep.whole);
        let text = deep.encode();
        assert!(text.len() <= TEXT_BYTES, "{}", text.len());
        let read = Lineage::decode(&text);
        assert!(!read.whole && read.groups.len() > 40);
        assert!(deep.groups.starts_with(&read.groups));
    }

    #[test]
    fn what_is_no_lineage_tells_nothing() {
        for text in [
            "",
            "38",
            "38 root",
            "x 1",
            "38 1  2",
            "38 -1",
            "38 1 root root",
        ] {
            assert_eq!(Lineage::decode(text), Lineage::default(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            device in any::<u64>(),
            groups in proptest::collection::vec(any::<u64>(), 1..20),
            whole in any::<bool>(),
        ) {
            let lineage = Lineage { device, groups, whole };
            prop_assert_eq!(Lineage::decode(&lineage.encode()), lineage);
        }

        #[test]
        fn any_text_is_read(text in any::<String>()) {
            let _ = Lineage::decode(&text);
        }

        /// A random tree of cgroups, in which two look from below random ones of their ancestors.
        #[test]
        fn no_answer_is_wrong(
            parents in proptest::collection::vec(any::<proptest::sample::Index>(), 1..20),
            who in any::<proptest::sample::Index>(), who_sees in 1_usize..20,
            other in any::<proptest::sample::Index>(), other_sees in 1_usize..20,
        ) {
            // Group n + 2 has its parent among those before it; group 1 is the root.
            let chain = |group: u64| {
                let mut chain = vec![group];
                while let Some(index) = chain.last().and_then(|last| last.checked_sub(2)) {
                    let index = usize::try_from(index).unwrap();
                    chain.push(u64::try_from(parents[index].index(index + 1)).unwrap() + 1);
                }
                chain
            };
            let pick = |at: proptest::sample::Index| chain(at.index(parents.len() + 1) as u64 + 1);
            let (who, other) = (pick(who), pick(other));
            let seen = |chain: &[u64], sees: usize| lineage(&chain[..sees.min(chain.len())]);
            let truth = who.contains(&other[0]);
            match seen(&who, who_sees).is_below(&seen(&other, other_sees)) {
                Below::Yes => prop_assert!(truth),
                Below::No => prop_assert!(!truth),
                Below::Unknown => {
                    let top = seen(&who, who_sees).top().unwrap();
                    prop_assert_eq!(chain(top).contains(&other[0]), truth);
                }
            }
        }
    }
}
