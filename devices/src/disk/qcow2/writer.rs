//! A new image, written from front to back: every cluster is used once, so that all refcounts are
//! one, nothing has to be looked up, and memory holds one L2 table and the L1 table.
//!
//! ```text
//!   header │ clusters and L2 tables, as they come │ L1 table │ refcount blocks │ refcount table
//! ```
//!
//! The header is written last: before, the file is no image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::entry::COPIED;
use super::header::{AUTOCLEAR_RAW, EXTENSION_DATA_FILE, ExternalData, OFFSET_LIMIT};

const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// What a new image is like; checked by whoever makes it (see [`super::create`]).
#[derive(Clone, Debug)]
pub struct Shape {
    pub size_bytes: u64,
    pub version: u32,
    pub cluster_bits: u32,
    pub extended_l2: bool,
    pub refcount_order: u32,
    pub lazy_refcounts: bool,
    pub zstd: bool,
    /// Name and format.
    pub backing: Option<(Vec<u8>, &'static [u8])>,
    /// Where the data is, if not in the image: there it has its place, and takes none here.
    pub data: Option<ExternalData>,
}

/// See the module.
pub struct ImageWriter<'a> {
    file: &'a File,
    shape: Shape,
    /// Clusters given out so far.
    used: u64,
    l1: Vec<u64>,
    /// The L2 table that is being filled: its index, and its bytes.
    l2: Option<(u64, Vec<u8>)>,
    /// The number that was mapped last.
    last: Option<u64>,
}

impl<'a> ImageWriter<'a> {
    /// Begins an image in an empty file.
    pub fn new(file: &'a File, shape: Shape) -> io::Result<Self> {
        let entries = shape.l1_entries();
        if entries * 8 > MAX_L1_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the disk is too large for clusters of this size",
            ));
        }
        Ok(Self {
            file,
            used: 1,
            l1: vec![0; entries as usize],
            l2: None,
            last: None,
            shape,
        })
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    fn take(&mut self, clusters: u64) -> io::Result<u64> {
        let offset = self.used << self.shape.cluster_bits;
        self.used += clusters;
        match self.used << self.shape.cluster_bits < OFFSET_LIMIT {
            true => Ok(offset),
            false => Err(io::ErrorKind::FileTooLarge.into()),
        }
    }

    /// Gives the cluster of the disk with this number a cluster of the file, or of the data file;
    /// `bitmap` is its subcluster bitmap, where there are subclusters. Numbers must ascend. Returns
    /// where it is.
    pub fn map(&mut self, number: u64, bitmap: u64) -> io::Result<u64> {
        let entry_bytes = self.shape.l2_entry_bytes();
        let per_table = self.cluster_bytes() / entry_bytes;
        let table = number / per_table;
        if self.l2.as_ref().is_none_or(|(index, _)| *index != table) {
            self.end_table()?;
            self.l2 = Some((table, vec![0; self.cluster_bytes() as usize]));
        }
        let offset = match self.shape.data {
            Some(_) => number << self.shape.cluster_bits,
            None => self.take(1)?,
        };
        self.last = Some(number);
        let at = ((number % per_table) * entry_bytes) as usize;
        if let Some((_, bytes)) = &mut self.l2 {
            put(bytes, at, &(offset | COPIED).to_be_bytes());
            if self.shape.extended_l2 {
                put(bytes, at + 8, &bitmap.to_be_bytes());
            }
        }
        Ok(offset)
    }

    /// Whether the next number would get the next cluster: its entry is in the table of the last.
    pub fn stays_in_table(&self) -> bool {
        let per_table = self.cluster_bytes() / self.shape.l2_entry_bytes();
        self.last.is_some_and(|last| (last + 1) % per_table != 0)
    }

    fn end_table(&mut self) -> io::Result<()> {
        let Some((index, bytes)) = self.l2.take() else {
            return Ok(());
        };
        let offset = self.take(1)?;
        self.file.write_all_at(&bytes, offset)?;
        let entry = usize::try_from(index).ok().and_then(|i| self.l1.get_mut(i));
        *entry.ok_or(io::ErrorKind::InvalidInput)? = offset | COPIED;
        Ok(())
    }

    /// Writes what is left and makes it an image; returns the size of the file.
    pub fn finish(mut self) -> io::Result<u64> {
        self.end_table()?;
        let cluster = self.cluster_bytes();
        let l1_bytes = (self.l1.len() as u64 * 8).max(1);
        let l1_offset = self.take(l1_bytes.div_ceil(cluster))?;
        let l1: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.file.write_all_at(&l1, l1_offset)?;
        drop(l1);

        // Blocks and table describe themselves too.
        let per_block = (cluster * 8) >> self.shape.refcount_order;
        let (mut blocks, mut table_clusters) = (0, 0);
        loop {
            let total = self.used + blocks + table_clusters;
            let needed = total.div_ceil(per_block);
            let needed_clusters = (needed * 8).div_ceil(cluster);
            if (needed, needed_clusters) == (blocks, table_clusters) {
                break;
            }
            // Only ever more: where the last cluster is that of a block it would go on for ever.
            let more = (needed.max(blocks), needed_clusters.max(table_clusters));
            if more == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = more;
        }
        if table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the image is too large for refcounts of this width and clusters of this size",
            ));
        }
        let first_block = self.take(blocks)?;
        let table_offset = self.take(table_clusters)?;
        let mut table = vec![0; (table_clusters * cluster) as usize];
        let mut left = self.used;
        for block in 0..blocks {
            let offset = first_block + block * cluster;
            if left == 0 {
                // No entry needs it: it counts as used all the same.
                self.file.write_all_at(&vec![0; cluster as usize], offset)?;
            } else {
                let count = left.min(per_block);
                let bytes = ones(cluster as usize, self.shape.refcount_order, count);
                self.file.write_all_at(&bytes, offset)?;
                left -= count;
            }
            put(&mut table, block as usize * 8, &offset.to_be_bytes());
        }
        self.file.write_all_at(&table, table_offset)?;
        let end = self.used << self.shape.cluster_bits;
        self.file.set_len(end)?;
        let header = self
            .shape
            .header(l1_offset, table_offset, table_clusters as u32);
        self.file.write_all_at(&header, 0)?;
        Ok(end)
    }
}

/// A refcount block whose first `count` refcounts are one.
fn ones(len: usize, order: u32, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for index in 0..count as usize {
        match order {
            // Narrow ones fill a byte from its lowest bit on.
            0..3 => bytes[(index << order) / 8] |= 1 << ((index << order) % 8),
            _ => {
                let width = 1 << (order - 3);
                bytes[(index + 1) * width - 1] = 1;
            }
        }
    }
    bytes
}

impl Shape {
    fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of the L1 table; at least one, as QEMU wants.
    pub fn l1_entries(&self) -> u64 {
        let per_table = (1 << self.cluster_bits) / self.l2_entry_bytes();
        self.size_bytes
            .div_ceil(per_table << self.cluster_bits)
            .max(1)
    }

    fn header(&self, l1_offset: u64, table_offset: u64, table_clusters: u32) -> Vec<u8> {
        let mut bytes = vec![0; if self.version == 2 { 72 } else { 112 }];
        put(&mut bytes, 0, b"QFI\xfb");
        put(&mut bytes, 4, &self.version.to_be_bytes());
        put(&mut bytes, 20, &self.cluster_bits.to_be_bytes());
        put(&mut bytes, 24, &self.size_bytes.to_be_bytes());
        put(&mut bytes, 36, &(self.l1_entries() as u32).to_be_bytes());
        put(&mut bytes, 40, &l1_offset.to_be_bytes());
        put(&mut bytes, 48, &table_offset.to_be_bytes());
        put(&mut bytes, 56, &table_clusters.to_be_bytes());
        if self.version == 3 {
            let (external, zstd) = (u64::from(self.data.is_some()), u64::from(self.zstd));
            let incompatible = u64::from(self.extended_l2) << 4 | zstd << 3 | external << 2;
            put(&mut bytes, 72, &incompatible.to_be_bytes());
            if self.data.as_ref().is_some_and(|data| data.raw) {
                put(&mut bytes, 88, &AUTOCLEAR_RAW.to_be_bytes());
            }
            let compatible = u64::from(self.lazy_refcounts);
            put(&mut bytes, 80, &compatible.to_be_bytes());
            put(&mut bytes, 96, &self.refcount_order.to_be_bytes());
            put(&mut bytes, 100, &112_u32.to_be_bytes());
            put(&mut bytes, 104, &[u8::from(self.zstd)]);
        }
        let mut extend = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some((_, format)) = &self.backing {
            extend(0xe279_2aca, format);
        }
        if let Some(data) = &self.data {
            extend(EXTENSION_DATA_FILE, &data.name);
        }
        // Room permitting: a cluster of 512 bytes has none beside a long name.
        if self.version == 3 && self.cluster_bits > 11 {
            extend(0x6803_f857, &feature_names());
        }
        extend(0, &[]);
        if let Some((name, _)) = &self.backing {
            let offset = bytes.len() as u64;
            put(&mut bytes, 8, &offset.to_be_bytes());
            put(&mut bytes, 16, &(name.len() as u32).to_be_bytes());
            bytes.extend(name);
        }
        bytes
    }

    /// Bytes that the header has with everything in it; must fit into one cluster.
    pub fn header_bytes(&self) -> u64 {
        self.header(0, 0, 0).len() as u64
    }
}

/// The names of the features that an image of ours can come to have, for those who know them not.
fn feature_names() -> Vec<u8> {
    let names: [(u8, u8, &[u8]); 8] = [
        (0, 0, b"dirty bit"),
        (0, 1, b"corrupt bit"),
        (0, 2, b"external data file"),
        (0, 3, b"compression type"),
        (0, 4, b"extended L2 entries"),
        (1, 0, b"lazy refcounts"),
        (2, 0, b"bitmaps"),
        (2, 1, b"raw external data"),
    ];
    let mut bytes = Vec::new();
    for (kind, bit, name) in names {
        let mut entry = [0; 48];
        entry[0] = kind;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name);
        bytes.extend(entry);
    }
    bytes
}

fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(offset..offset + field.len()) {
        place.copy_from_slice(field);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_where_the_format_has_them() {
        assert_eq!(ones(4, 0, 11), [0xff, 0x07, 0, 0]);
        assert_eq!(ones(4, 1, 5), [0x55, 0x01, 0, 0]);
        assert_eq!(ones(4, 2, 3), [0x11, 0x01, 0, 0]);
        assert_eq!(ones(4, 3, 3), [1, 1, 1, 0]);
        assert_eq!(ones(4, 4, 1), [0, 1, 0, 0]);
        assert_eq!(ones(8, 5, 2), [0, 0, 0, 1, 0, 0, 0, 1]);
        assert_eq!(
            ones(16, 6, 1),
            [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
        );
    }
}
