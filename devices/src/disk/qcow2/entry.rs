//! One L2 entry by itself, as the offline tools look at it: pure.
//!
//! [`super::map`] answers where a guest's bytes are; this tells also what no guest can see, as the
//! space behind a zero cluster and what is wrong with an entry.

/// Bits 9 to 55: where it points.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Those of an L1 entry.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// What an entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Compressed bytes, at most so many, at any offset.
    Compressed {
        /// Where they begin in the file.
        offset: u64,
        /// The most bytes they have.
        len: u64,
    },
    /// Anything else. A bit for each of 32 subclusters; all or none without subclusters.
    Plain {
        /// The cluster of the file that belongs to it.
        offset: Option<u64>,
        /// What is there.
        allocated: u32,
        /// What reads as zeroes.
        zero: u32,
    },
}

/// What can be wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Reserved bits are set.
    Reserved,
    /// It does not point to the beginning of a cluster.
    Misaligned,
    /// Its subclusters contradict one another, or it.
    Subclusters,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reserved => "has reserved bits set",
            Self::Misaligned => "does not point to the beginning of a cluster",
            Self::Subclusters => "has subclusters that contradict it",
        })
    }
}

/// How the entries of an image are to be read.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    pub cluster_bits: u32,
    pub extended: bool,
    pub version: u32,
    /// Data is in an external file, where offset 0 is as good as any.
    pub external: bool,
}

impl Entries {
    /// Bytes of one.
    pub fn bytes(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// How many a table has.
    pub fn per_table(&self) -> u64 {
        (1 << self.cluster_bits) / self.bytes() as u64
    }

    /// The words of entry `index` of (a part of) a table; the second is 0 without subclusters.
    pub fn words(&self, table: &[u8], index: usize) -> Option<(u64, u64)> {
        let entry = table.get(index * self.bytes()..)?;
        let first = u64::from_be_bytes(*entry.first_chunk()?);
        let second = match self.extended {
            true => u64::from_be_bytes(*entry.get(8..)?.first_chunk()?),
            false => 0,
        };
        Some((first, second))
    }

    /// What they say.
    pub fn read(&self, entry: u64, bitmap: u64) -> Result<Cluster, Wrong> {
        if entry & COMPRESSED != 0 {
            if bitmap != 0 {
                return Err(Wrong::Subclusters);
            }
            let shift = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << shift) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1;
            let len = sectors * 512 - offset % 512;
            return Ok(Cluster::Compressed { offset, len });
        }
        let plain_zero = entry & ZERO != 0;
        if entry & RESERVED != 0 || (plain_zero && (self.extended || self.version < 3)) {
            return Err(Wrong::Reserved);
        }
        let at = entry & OFFSET;
        if at.trailing_zeros() < self.cluster_bits {
            return Err(Wrong::Misaligned);
        }
        let at_start = self.external && entry & COPIED != 0 && !plain_zero;
        let offset = (at != 0 || at_start).then_some(at);
        let (allocated, zero) = match (self.extended, plain_zero) {
            (true, _) => (bitmap as u32, (bitmap >> 32) as u32),
            (false, true) => (0, u32::MAX),
            (false, false) if offset.is_some() => (u32::MAX, 0),
            (false, false) => (0, 0),
        };
        if allocated & zero != 0 || (offset.is_none() && allocated != 0) {
            return Err(Wrong::Subclusters);
        }
        Ok(Cluster::Plain {
            offset,
            allocated,
            zero,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Entries = Entries {
        cluster_bits: 16,
        extended: false,
        version: 3,
        external: false,
    };

    #[test]
    fn an_entry_says_what_it_says() {
        let plain = |offset, allocated, zero| {
            Ok(Cluster::Plain {
                offset,
                allocated,
                zero,
            })
        };
        assert_eq!(PLAIN.read(0, 0), plain(None, 0, 0));
        assert_eq!(PLAIN.read(1, 0), plain(None, 0, u32::MAX));
        assert_eq!(
            PLAIN.read(0x5_0001 | COPIED, 0),
            plain(Some(0x5_0000), 0, u32::MAX)
        );
        assert_eq!(PLAIN.read(0x5_0000, 0), plain(Some(0x5_0000), u32::MAX, 0));
        let external = Entries {
            external: true,
            ..PLAIN
        };
        assert_eq!(external.read(COPIED, 0), plain(Some(0), u32::MAX, 0));
        assert_eq!(external.read(COPIED | 1, 0), plain(None, 0, u32::MAX));
        assert_eq!(external.read(0, 0), plain(None, 0, 0));
        assert_eq!(PLAIN.read(0x5_0200, 0), Err(Wrong::Misaligned));
        assert_eq!(PLAIN.read(0x5_0002, 0), Err(Wrong::Reserved));
        let extended = Entries {
            extended: true,
            ..PLAIN
        };
        assert_eq!(extended.read(0x5_0001, 0), Err(Wrong::Reserved));
        assert_eq!(extended.read(0, 1), Err(Wrong::Subclusters));
        assert_eq!(
            extended.read(0x5_0000, 1 | 2 << 32),
            plain(Some(0x5_0000), 1, 2)
        );
        assert_eq!(
            extended.read(0x5_0000, 1 | 1 << 32),
            Err(Wrong::Subclusters)
        );
    }

    proptest! {
        #[test]
        fn the_two_readers_of_entries_agree(
            bits in 14_u32..=21,
            extended: bool,
            version in 2_u32..=3,
            external: bool,
            entry in prop_oneof![
                any::<u64>(),
                (0_u64..64).prop_map(|n| n << 21),
                0_u64..2,
                (0_u64..2).prop_map(|n| n | COPIED),
            ],
            bitmap in prop_oneof![Just(0), any::<u64>()],
        ) {
            use super::super::header::Compression;
            use super::super::map::{Layout, Mapping};
            let entries = Entries { cluster_bits: bits, extended, version, external };
            let bitmap = if extended { bitmap } else { 0 };
            let mut slice = vec![0; 4096];
            slice[..8].copy_from_slice(&entry.to_be_bytes());
            if extended {
                slice[8..16].copy_from_slice(&bitmap.to_be_bytes());
            }
            let layout = Layout {
                external,
                ..Layout::for_test(bits, extended, version, Compression::Zlib)
            };
            let mapped = layout.map(&slice, &layout.place(0), 512).map(|(mapping, _)| mapping);
            let read = entries.read(entry, bitmap);
            match (mapped, read) {
                (Ok(Mapping::Compressed(there, 0)), Ok(Cluster::Compressed { offset, len })) => {
                    prop_assert_eq!((there.offset, there.len as u64), (offset, len));
                }
                (Ok(Mapping::Data(there)), Ok(Cluster::Plain { offset, allocated, .. })) => {
                    prop_assert_eq!((Some(there), allocated & 1), (offset, 1));
                }
                (Ok(Mapping::Zero), Ok(Cluster::Plain { zero, .. })) => prop_assert_eq!(zero & 1, 1),
                (Ok(Mapping::Unallocated), Ok(Cluster::Plain { zero, allocated, .. })) => {
                    prop_assert_eq!((zero | allocated) & 1, 0);
                }
                // A compressed cluster that can be nowhere is noticed when it is looked for.
                (Err(_), Ok(Cluster::Compressed { offset, .. })) => {
                    prop_assert!(offset == 0 || offset >= 1 << 56);
                }
                (Err(_), Err(_)) => {}
                (mapped, read) => prop_assert!(false, "{mapped:?} {read:?}"),
            }
        }
    }
}
