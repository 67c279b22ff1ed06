//! The refcounts that the image has, against the references that were counted.

use std::os::unix::fs::FileExt;

use super::super::details::{ReadError, read_exact, read_up_to};
use super::super::entry::OFFSET;
use super::{Checker, Repair};

const TABLE_RESERVED: u64 = 0x1ff;

/// The refcount with this number in a block.
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..3 => {
            let bit = index << order;
            let byte = block.get(bit / 8).copied().unwrap_or(0);
            u64::from(byte >> (bit % 8)) & ((1 << (1 << order)) - 1)
        }
        _ => {
            let width = 1 << (order - 3);
            let bytes = block
                .get(index * width..)
                .and_then(|rest| rest.get(..width));
            let fold = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
            bytes.unwrap_or(&[]).iter().fold(0, fold)
        }
    }
}

/// Sets it; false if it has not enough bits.
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) -> bool {
    let bits = 1_u32 << order;
    if bits < 64 && value >> bits != 0 {
        return false;
    }
    match order {
        0..3 => {
            let bit = index << order;
            if let Some(byte) = block.get_mut(bit / 8) {
                let mask = ((1_u32 << bits) - 1) << (bit % 8);
                *byte = *byte & !(mask as u8) | (value << (bit % 8)) as u8;
            }
        }
        _ => {
            let width = 1 << (order - 3);
            if let Some(place) = block.get_mut(index * width..(index + 1) * width) {
                place.copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }
    true
}

impl Checker<'_, '_> {
    /// Refcounts in a block.
    pub fn per_block(&self) -> u64 {
        (self.details.cluster_bytes() * 8) >> self.details.refcount_order
    }

    pub fn read_refcount_table(&mut self) -> Result<(), ReadError> {
        let len = self.details.refcount_table_clusters * self.details.cluster_bytes();
        let offset = self.details.refcount_table;
        // As much of it as there is, so that what is cut short can be rebuilt.
        let bytes = read_up_to(self.file, offset, len as usize)?;
        if (bytes.len() as u64) < len {
            self.wants_rebuild = true;
            self.corruption("the refcount table is cut short");
        }
        let (words, _) = bytes.as_chunks();
        self.table = words.iter().copied().map(u64::from_be_bytes).collect();
        for index in 0..self.table.len() {
            let entry = self.table[index];
            if entry == 0 {
                continue;
            }
            if !self.is_block(entry) {
                self.wants_rebuild = true;
                self.corruption(&format!(
                    "refcount table entry {index} is corrupt: {entry:x}"
                ));
                continue;
            }
            let first = index as u64 * self.per_block();
            let end = (first + self.per_block()).min(self.clusters);
            if first < end {
                self.touch(first, end - 1);
            }
        }
        Ok(())
    }

    /// Whether a refcount table entry names a block that can be read.
    pub fn is_block(&self, entry: u64) -> bool {
        entry != 0
            && entry & TABLE_RESERVED == 0
            && entry == entry & OFFSET
            && entry.is_multiple_of(self.details.cluster_bytes())
            && entry >> self.bits() < self.clusters
    }

    /// The block that covers the clusters from `index * per_block()` on.
    pub fn read_block(&self, index: u64) -> Result<Option<(u64, Vec<u8>)>, ReadError> {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        let Some(offset) = entry.copied().filter(|entry| self.is_block(*entry)) else {
            return Ok(None);
        };
        let mut bytes = read_up_to(self.file, offset, self.details.cluster_bytes() as usize)?;
        bytes.resize(self.details.cluster_bytes() as usize, 0);
        Ok(Some((offset, bytes)))
    }

    /// Compares the window that was counted.
    pub fn compare_window(&mut self) -> Result<(), ReadError> {
        let order = self.details.refcount_order;
        let per_block = self.per_block();
        let end = self.window_start + self.window.len() as u64;
        self.check_blocks();
        let mut cluster = self.window_start;
        while cluster < end {
            self.in_time()?;
            let block = cluster / per_block;
            let stop = end.min((block + 1) * per_block);
            let mut found = self.read_block(block)?;
            let mut dirty = false;
            for cluster in cluster..stop {
                let expected = self.window[(cluster - self.window_start) as usize].into();
                let index = (cluster % per_block) as usize;
                let bytes = found.as_mut().map(|(_, bytes)| bytes);
                let actual = bytes.as_ref().map_or(0, |bytes| get(bytes, order, index));
                if cluster == self.clusters && expected == 0 {
                    continue;
                }
                if actual > 0 || expected > 0 {
                    self.highest = self.highest.max(cluster);
                }
                if actual == expected {
                    continue;
                }
                let may = match actual > expected {
                    true => {
                        self.report.leaks += 1;
                        (self.listener.finding)(&format!(
                            "Leaked cluster {cluster} refcount={actual} reference={expected}"
                        ));
                        self.repair != Repair::Nothing && self.senseless == 0
                    }
                    false => {
                        self.corruption(&format!(
                            "cluster {cluster} refcount={actual} reference={expected}"
                        ));
                        self.wants_rebuild |= found.is_none();
                        self.repair == Repair::All
                    }
                };
                // A rebuild sets all of them right at once, beside the old ones.
                if may && let Some((_, bytes)) = &mut found {
                    dirty |= set(bytes, order, index, expected);
                }
            }
            if let Some((offset, bytes)) = found
                && dirty
                && !self.blocks_are_shared()
            {
                self.before_change()?;
                self.file.write_all_at(&bytes, offset)?;
            }
            cluster = stop;
        }
        Ok(())
    }

    /// A block that something else refers to as well can't be written to.
    fn check_blocks(&mut self) {
        for (index, count) in self.shared_blocks() {
            self.wants_rebuild = true;
            self.corruption(&format!("refcount block {index} refcount={count}"));
        }
    }

    /// The blocks in this window that something else refers to, and the references to them.
    pub fn shared_blocks(&self) -> Vec<(usize, u32)> {
        let shared = |(index, block): (usize, &u64)| {
            let cluster = (block >> self.bits()).checked_sub(self.window_start)?;
            let count = *self.window.get(usize::try_from(cluster).ok()?)?;
            (count > 1 && self.is_block(*block)).then_some((index, count))
        };
        self.table.iter().enumerate().filter_map(shared).collect()
    }

    fn blocks_are_shared(&self) -> bool {
        self.wants_rebuild
    }

    /// The refcount of the cluster at an offset of the file, as the image has it; a block that was
    /// read stays for the next.
    pub fn refcount(
        &self,
        offset: u64,
        kept: &mut Option<(u64, Vec<u8>)>,
    ) -> Result<u64, ReadError> {
        let cluster = offset >> self.bits();
        let block = cluster / self.per_block();
        if kept.as_ref().is_none_or(|(index, _)| *index != block) {
            self.in_time()?;
            let bytes = self.read_block(block)?.map(|(_, bytes)| bytes);
            *kept = Some((block, bytes.unwrap_or_default()));
        }
        let bytes = kept.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let index = (cluster % self.per_block()) as usize;
        Ok(get(bytes, self.details.refcount_order, index))
    }

    /// Reads a whole cluster.
    pub fn read_cluster(&self, offset: u64, what: &'static str) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; self.details.cluster_bytes() as usize];
        read_exact(self.file, &mut bytes, offset, what)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_read_as_they_were_set() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let count = (512 * 8) >> order;
            let most = u64::MAX >> (64 - (1 << order));
            for index in 0..count {
                assert!(set(&mut block, order, index, index as u64 & most));
            }
            assert!(set(&mut block, order, 1, most));
            for index in (0..count).filter(|index| *index != 1) {
                assert_eq!(get(&block, order, index), index as u64 & most);
            }
            assert_eq!(get(&block, order, 1), most);
            assert_eq!(get(&block, order, count), 0);
            if order < 6 {
                assert!(!set(&mut block, order, 0, most + 1));
            }
        }
    }
}
