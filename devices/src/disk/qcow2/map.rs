//! What L1 and L2 entries say about a range of the disk.
//!
//! Pure. An L2 table is looked at in *slices* of at most 4 KiB, so that a table of a 2 MiB cluster
//! need not be read whole.
//!
//! ```text
//!   offset on the disk │ L1 index │ L2 index: slice │ entry │ offset in the cluster │
//! ```

use super::header::{Compression, Header, OFFSET_LIMIT};

/// Bytes of an L2 slice, where the cluster has as many.
const SLICE: u64 = 4096;

/// In an L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// In an L2 entry: the cluster reads as zeroes.
pub const ZERO: u64 = 1;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// In an L2 entry: nothing else refers to the host cluster. With an external data file it also tells
/// a cluster at offset 0 from one that there is not.
pub const COPIED: u64 = 1 << 63;
/// What must be 0 in the L2 entry of a cluster that is not compressed.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// In L1 and L2 entries: an offset in the file.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Subclusters in a cluster.
pub const SUBCLUSTERS: u64 = 32;

/// An entry contradicts the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt;

/// Where the bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// At this offset in the image file.
    Data(u64),
    /// Nowhere: they are zeroes.
    Zero,
    /// Not in this image, but in what lies below it.
    Unallocated,
    /// In a compressed cluster, from this byte of it on.
    Compressed(Compressed, usize),
}

/// A compressed cluster in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Compressed {
    /// Where it begins.
    pub offset: u64,
    /// The most bytes it can have.
    pub len: usize,
}

/// How an image divides the disk.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// A cluster has 2 to the power of this many bytes.
    pub cluster_bits: u32,
    /// An L2 entry has 2 to the power of this many bytes.
    pub entry_bits: u32,
    /// Of the format.
    pub version: u32,
    /// How its compressed clusters are.
    pub compression: Compression,
    /// Data is in an external file, where offset 0 is as good as any.
    pub external: bool,
}

/// Where to look for a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into the L1 table.
    pub l1_index: usize,
    /// Where in the L2 table its slice begins.
    pub slice_offset: u64,
    /// Index of the entry in the slice.
    pub entry: usize,
    /// Where in the cluster the range begins.
    pub within: u64,
    /// How many bytes the slice describes from here on.
    pub span: u64,
}

impl Layout {
    /// That of an image.
    pub fn new(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            entry_bits: if header.extended_l2 { 4 } else { 3 },
            version: header.version,
            compression: header.compression,
            external: header.data.is_some(),
        }
    }

    /// One of an image that there is not.
    #[cfg(test)]
    pub fn for_test(
        cluster_bits: u32,
        extended: bool,
        version: u32,
        compression: Compression,
    ) -> Self {
        Self {
            cluster_bits,
            entry_bits: if extended { 4 } else { 3 },
            version,
            compression,
            external: false,
        }
    }

    /// Whether an L2 entry of no compressed cluster has a place for its data.
    pub fn has_place(&self, entry: u64) -> bool {
        entry & OFFSET != 0 || (self.external && entry & COPIED != 0)
    }

    /// Bytes in a cluster.
    pub fn cluster_bytes(&self) -> usize {
        1 << self.cluster_bits
    }

    /// The smallest unit that has a mapping of its own.
    pub fn unit_bytes(&self) -> u64 {
        match self.is_extended() {
            true => (1 << self.cluster_bits) / SUBCLUSTERS,
            false => 1 << self.cluster_bits,
        }
    }

    /// Whether its clusters have subclusters.
    pub fn is_extended(&self) -> bool {
        self.entry_bits == 4
    }

    /// Bytes in a slice.
    pub fn slice_bytes(&self) -> usize {
        SLICE.min(1 << self.cluster_bits) as usize
    }

    /// Where to find the mapping of the byte at `position` of the disk.
    pub fn place(&self, position: u64) -> Place {
        let cluster = position >> self.cluster_bits;
        let table_bits = self.cluster_bits - self.entry_bits;
        let index = cluster & ((1 << table_bits) - 1);
        let per_slice = (self.slice_bytes() >> self.entry_bits) as u64;
        let entry = index % per_slice;
        let within = position & ((1 << self.cluster_bits) - 1);
        Place {
            l1_index: usize::try_from(cluster >> table_bits).unwrap_or(usize::MAX),
            slice_offset: (index - entry) << self.entry_bits,
            entry: entry as usize,
            within,
            span: ((per_slice - entry) << self.cluster_bits) - within,
        }
    }

    /// Where the L2 table is that an L1 entry names; `None` if there is none.
    pub fn l2_table(&self, entry: u64) -> Result<Option<u64>, Corrupt> {
        let offset = entry & OFFSET;
        if entry & L1_RESERVED != 0 || !self.is_aligned(offset) {
            return Err(Corrupt);
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Whether a cluster may begin there.
    pub fn is_aligned(&self, offset: u64) -> bool {
        offset.trailing_zeros() >= self.cluster_bits
    }

    /// What a slice says about up to `len` bytes from `place` on: a mapping, and for how many bytes
    /// it holds. `len` is not 0.
    pub fn map(&self, slice: &[u8], place: &Place, len: u64) -> Result<(Mapping, u64), Corrupt> {
        let (mapping, mut span) = self.map_cluster(slice, place.entry, place.within)?;
        if let Mapping::Compressed(..) = mapping {
            return Ok((mapping, span.min(len)));
        }
        while span < len {
            let position = place.within + span;
            let entry = place.entry + (position >> self.cluster_bits) as usize;
            let within = position & ((1 << self.cluster_bits) - 1);
            if (entry + 1) << self.entry_bits > slice.len() {
                break;
            }
            let (next, more) = self.map_cluster(slice, entry, within)?;
            let continues = match (mapping, next) {
                (Mapping::Data(start), Mapping::Data(next)) => {
                    start.checked_add(span) == Some(next)
                }
                (before, after) => before == after,
            };
            if !continues {
                break;
            }
            span += more;
        }
        Ok((mapping, span.min(len)))
    }

    /// What one entry says, from byte `within` of its cluster on.
    fn map_cluster(
        &self,
        slice: &[u8],
        index: usize,
        within: u64,
    ) -> Result<(Mapping, u64), Corrupt> {
        let word = |at: usize| {
            let bytes = slice.get(at..).and_then(|rest| rest.first_chunk());
            bytes.copied().map(u64::from_be_bytes).ok_or(Corrupt)
        };
        let at = index << self.entry_bits;
        let entry = word(at)?;
        let bitmap = if self.is_extended() { word(at + 8)? } else { 0 };
        let rest = (1 << self.cluster_bits) - within;
        if entry & COMPRESSED != 0 {
            if bitmap != 0 {
                return Err(Corrupt);
            }
            return Ok((
                Mapping::Compressed(self.compressed(entry)?, within as usize),
                rest,
            ));
        }
        let offset = entry & OFFSET;
        if entry & L2_RESERVED != 0 || !self.is_aligned(offset) {
            return Err(Corrupt);
        }
        if self.is_extended() {
            return self.subclusters(entry, bitmap, within);
        }
        if entry & ZERO != 0 {
            // A reserved bit in version 2.
            return match self.version {
                2 => Err(Corrupt),
                _ => Ok((Mapping::Zero, rest)),
            };
        }
        match self.has_place(entry) {
            false => Ok((Mapping::Unallocated, rest)),
            true => Ok((Mapping::Data(offset + within), rest)),
        }
    }

    fn subclusters(&self, entry: u64, bitmap: u64, within: u64) -> Result<(Mapping, u64), Corrupt> {
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        let offset = entry & OFFSET;
        if entry & ZERO != 0 || allocated & zero != 0 || (!self.has_place(entry) && allocated != 0)
        {
            return Err(Corrupt);
        }
        let unit = self.unit_bytes();
        let first = within / unit;
        let kind = |subcluster: u64| {
            let bit = 1 << subcluster;
            (allocated & bit != 0, zero & bit != 0)
        };
        let same = (first..SUBCLUSTERS)
            .take_while(|subcluster| kind(*subcluster) == kind(first))
            .count() as u64;
        let span = (first + same) * unit - within;
        let mapping = match kind(first) {
            (true, _) => Mapping::Data(offset + within),
            (false, true) => Mapping::Zero,
            (false, false) => Mapping::Unallocated,
        };
        Ok((mapping, span))
    }

    /// Where the entry of a compressed cluster says that it is.
    pub fn compressed(&self, entry: u64) -> Result<Compressed, Corrupt> {
        let length_shift = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << length_shift) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> length_shift) + 1;
        if offset == 0 || offset >= OFFSET_LIMIT {
            return Err(Corrupt);
        }
        // At most two clusters' worth: the field has `cluster_bits - 8` bits.
        let len = sectors * 512 - offset % 512;
        Ok(Compressed {
            offset,
            len: len as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(cluster_bits: u32, extended: bool, version: u32) -> Layout {
        Layout {
            cluster_bits,
            entry_bits: if extended { 4 } else { 3 },
            version,
            compression: Compression::Zlib,
            external: false,
        }
    }

    fn slice(entries: &[u64]) -> Vec<u8> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(4096, 0);
        bytes
    }

    #[test]
    fn a_position_is_found_in_its_slice() {
        let layout = layout(16, false, 3);
        let place = layout.place((3 << 29) + (513 << 16) + 5);
        assert_eq!((place.l1_index, place.slice_offset), (3, 4096));
        assert_eq!((place.entry, place.within), (1, 5));
        assert_eq!(place.span, (511 << 16) - 5);
        assert_eq!(layout.place(u64::MAX).within, 0xffff);
    }

    #[test]
    fn adjacent_clusters_are_one_range() {
        let layout = layout(16, false, 3);
        let bytes = slice(&[0x5_0000, 0x6_0000 | 1 << 63, 0x8_0000, 1, 0x9_0001, 0, 0]);
        let map = |position, len| layout.map(&bytes, &layout.place(position), len);
        assert_eq!(
            map(100, 1 << 20),
            Ok((Mapping::Data(0x5_0064), 0x2_0000 - 100))
        );
        assert_eq!(map(0x1_0000, 512), Ok((Mapping::Data(0x6_0000), 512)));
        assert_eq!(
            map(0x2_0000, 1 << 20),
            Ok((Mapping::Data(0x8_0000), 0x1_0000))
        );
        assert_eq!(map(0x3_8000, 1 << 20), Ok((Mapping::Zero, 0x1_8000)));
        let rest = (512 - 5) << 16;
        assert_eq!(map(0x5_0000, 1 << 40), Ok((Mapping::Unallocated, rest)));
    }

    #[test]
    fn subclusters_are_told_apart() {
        let layout = layout(16, true, 3);
        let bitmap = 0b0110 | 0b1_0000 << 32;
        let bytes = slice(&[0x5_0000, bitmap, 0x6_0000, 1]);
        let map = |position, len| layout.map(&bytes, &layout.place(position), len);
        assert_eq!(map(0, 1 << 16), Ok((Mapping::Unallocated, 2048)));
        assert_eq!(
            map(2560, 1 << 16),
            Ok((Mapping::Data(0x5_0a00), 4096 - 512))
        );
        assert_eq!(map(6144, 1 << 16), Ok((Mapping::Unallocated, 2048)));
        assert_eq!(map(8192, 1 << 16), Ok((Mapping::Zero, 2048)));
        assert_eq!(map(0x1_0000, 1 << 16), Ok((Mapping::Data(0x6_0000), 2048)));
        let rest = 0x1_0000 - 10240;
        assert_eq!(map(10240, rest), Ok((Mapping::Unallocated, rest)));
    }

    #[test]
    fn entries_that_contradict_the_format_are_corrupt() {
        let plain = |version, entry| {
            let layout = layout(16, false, version);
            layout.map(&slice(&[entry]), &layout.place(0), 512)
        };
        for entry in [0x5_0200, 0x5_0002, 1 << 61 | 0x5_0000, 1 << 56, 1 << 62] {
            assert_eq!(plain(3, entry), Err(Corrupt), "{entry:#x}");
        }
        assert_eq!(plain(2, 1), Err(Corrupt));
        let extended = layout(16, true, 3);
        for words in [[0, 1], [0x5_0000, 1 | 1 << 32], [1, 0], [1 << 62 | 512, 1]] {
            let found = extended.map(&slice(&words), &extended.place(0), 512);
            assert_eq!(found, Err(Corrupt), "{words:x?}");
        }
        let layout = layout(16, false, 3);
        assert_eq!(layout.l2_table(0x3_0200), Err(Corrupt));
        assert_eq!(layout.l2_table(1 << 62), Err(Corrupt));
        assert_eq!(layout.l2_table(1 << 63 | 0x3_0000), Ok(Some(0x3_0000)));
        assert_eq!(layout.l2_table(0), Ok(None));
    }

    #[test]
    fn a_compressed_cluster_is_where_its_descriptor_says() {
        let layout = layout(16, false, 2);
        let descriptor = 1 << 62 | 2 << 54 | 0x12_3456;
        let bytes = slice(&[descriptor]);
        let found = layout.map(&bytes, &layout.place(700), 1 << 20);
        let expected = Compressed {
            offset: 0x12_3456,
            len: 3 * 512 - 0x56,
        };
        assert_eq!(found, Ok((Mapping::Compressed(expected, 700), 65536 - 700)));
    }

    proptest! {
        #[test]
        fn whatever_a_slice_holds_a_range_is_mapped_within_it(
            bits in 9_u32..=21,
            extended: bool,
            version in 2_u32..=3,
            entries in prop::collection::vec(prop_oneof![
                any::<u64>(),
                Just(0),
                Just(1),
                (1_u64..64).prop_map(|n| n << 21 | 1 << 63),
            ], 512),
            position: u64,
            len in 1_u64..1 << 40,
        ) {
            let layout = layout(bits, extended && bits >= 14, version);
            let bytes = slice(&entries);
            let bytes = &bytes[..layout.slice_bytes()];
            let place = layout.place(position);
            prop_assert!(place.span > 0);
            if let Ok((mapping, span)) = layout.map(bytes, &place, len.min(place.span)) {
                prop_assert!(span > 0 && span <= len && span <= place.span);
                if let Mapping::Compressed(compressed, within) = mapping {
                    prop_assert!(within < layout.cluster_bytes());
                    prop_assert!(compressed.len <= 2 * layout.cluster_bytes());
                }
            }
        }
    }
}
