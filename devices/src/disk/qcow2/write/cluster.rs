//! One cluster of the disk, as an L2 entry says and as a writer sees it.

pub use super::super::map::COPIED;
use super::super::map::{COMPRESSED, Compressed, Corrupt, L2_RESERVED, Layout, OFFSET, ZERO};

/// The host cluster that an entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// None.
    None,
    /// This one, which nothing else refers to: it may be written to.
    Owned(u64),
    /// This one, which a snapshot may refer to as well.
    Shared(u64),
    /// Compressed data.
    Compressed(Compressed),
}

/// What an entry says. A cluster has units: subclusters, or one that is all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    pub host: Host,
    /// Units whose data is in the host cluster.
    pub data: u32,
    /// Units that read as zeroes. The others show what lies below.
    pub zero: u32,
}

impl Cluster {
    /// One that shows what lies below.
    #[cfg(test)]
    pub const ABSENT: Self = Self {
        host: Host::None,
        data: 0,
        zero: 0,
    };

    /// All units of a cluster.
    pub fn all(layout: &Layout) -> u32 {
        if layout.is_extended() { u32::MAX } else { 1 }
    }

    /// Which units the bytes `from` to `to` (not included) of a cluster touch.
    pub fn units(layout: &Layout, from: u64, to: u64) -> u32 {
        let unit = layout.unit_bytes();
        let (first, end) = (from / unit, to.div_ceil(unit));
        (first..end).fold(0, |mask, unit| mask | 1_u32.wrapping_shl(unit as u32))
    }

    /// Reads entry `index` of a slice.
    pub fn read(layout: &Layout, slice: &[u8], index: usize) -> Result<Self, Corrupt> {
        let at = index << layout.entry_bits;
        let word = |at: usize| {
            let bytes = slice.get(at..).and_then(|rest| rest.first_chunk());
            bytes.copied().map(u64::from_be_bytes).ok_or(Corrupt)
        };
        let extended = layout.is_extended();
        let (entry, bitmap) = (word(at)?, if extended { word(at + 8)? } else { 0 });
        if entry & COMPRESSED != 0 {
            if bitmap != 0 || entry & COPIED != 0 || layout.external {
                return Err(Corrupt);
            }
            return Ok(Self {
                host: Host::Compressed(layout.compressed(entry)?),
                data: Self::all(layout),
                zero: 0,
            });
        }
        let offset = entry & OFFSET;
        let zero_flag = entry & ZERO != 0;
        let has_place = layout.has_place(entry);
        if entry & L2_RESERVED != 0
            || !layout.is_aligned(offset)
            || (!has_place && entry & COPIED != 0)
            || (zero_flag && (extended || layout.version == 2))
        {
            return Err(Corrupt);
        }
        let host = match has_place {
            false => Host::None,
            // A data file has nothing that is anybody else's.
            true if entry & COPIED != 0 || layout.external => Host::Owned(offset),
            true => Host::Shared(offset),
        };
        let (data, zero) = if extended {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else {
            let data = u32::from(has_place && !zero_flag);
            (data, u32::from(zero_flag))
        };
        if data & zero != 0 || (!has_place && data != 0) {
            return Err(Corrupt);
        }
        Ok(Self { host, data, zero })
    }

    /// Writes it as entry `index` of a slice. It is not a compressed one: those are only read.
    pub fn write(&self, layout: &Layout, slice: &mut [u8], index: usize) {
        let at = index << layout.entry_bits;
        let mut entry = match self.host {
            Host::None | Host::Compressed(_) => 0,
            Host::Owned(offset) => offset | COPIED,
            Host::Shared(offset) => offset,
        };
        let extended = layout.is_extended();
        if !extended && self.zero != 0 {
            entry |= ZERO;
        }
        let bitmap = u64::from(self.zero) << 32 | u64::from(self.data);
        if let Some(bytes) = slice.get_mut(at..at + 8) {
            bytes.copy_from_slice(&entry.to_be_bytes());
        }
        if extended && let Some(bytes) = slice.get_mut(at + 8..at + 16) {
            bytes.copy_from_slice(&bitmap.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::header::Compression;
    use super::*;

    fn layout(extended: bool, version: u32) -> Layout {
        Layout {
            cluster_bits: 16,
            entry_bits: if extended { 4 } else { 3 },
            version,
            compression: Compression::Zlib,
            external: false,
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut slice = vec![0; 4096];
        for host in [Host::None, Host::Owned(0x5_0000), Host::Shared(0x7_0000)] {
            for (extended, data, zero) in [(false, 1, 0), (false, 0, 1), (true, 6, 0x8000_0000)] {
                let data = if host == Host::None { 0 } else { data };
                if !extended && data == 0 && zero == 0 {
                    continue;
                }
                let cluster = Cluster { host, data, zero };
                cluster.write(&layout(extended, 3), &mut slice, 3);
                assert_eq!(Cluster::read(&layout(extended, 3), &slice, 3), Ok(cluster));
            }
        }
        assert_eq!(slice[..24], [0; 24]);
        assert_eq!(slice[64..], [0; 4096 - 64]);
    }

    #[test]
    fn contradictions_are_corrupt() {
        let read = |version, entry: u64| {
            let mut slice = vec![0; 4096];
            slice[..8].copy_from_slice(&entry.to_be_bytes());
            Cluster::read(&layout(false, version), &slice, 0)
        };
        for entry in [COPIED, COPIED | COMPRESSED | 1, 0x5_0200, 0x5_0002] {
            assert_eq!(read(3, entry), Err(Corrupt), "{entry:#x}");
        }
        assert_eq!(read(2, 1), Err(Corrupt));
        assert!(read(3, 1).is_ok());
    }

    #[test]
    fn with_an_external_data_file_offset_0_is_a_place_and_nothing_is_compressed() {
        for extended in [false, true] {
            let layout = Layout {
                external: true,
                ..layout(extended, 3)
            };
            let mut slice = vec![0; 4096];
            let none = Cluster::read(&layout, &slice, 0);
            assert_eq!(none, Ok(Cluster::ABSENT));
            let owned = Cluster {
                host: Host::Owned(0),
                data: Cluster::all(&layout),
                zero: 0,
            };
            owned.write(&layout, &mut slice, 0);
            assert_eq!(Cluster::read(&layout, &slice, 0), Ok(owned));
            slice[..8].copy_from_slice(&(COMPRESSED | 512).to_be_bytes());
            slice[8..16].fill(0);
            assert_eq!(Cluster::read(&layout, &slice, 0), Err(Corrupt));
        }
    }

    #[test]
    fn touched_units_are_found() {
        let layout = layout(true, 3);
        assert_eq!(Cluster::units(&layout, 0, 65536), u32::MAX);
        assert_eq!(Cluster::units(&layout, 2048, 2049), 2);
        assert_eq!(Cluster::units(&layout, 2047, 4097), 7);
    }
}
