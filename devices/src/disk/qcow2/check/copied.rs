//! The COPIED bits of the active tables: set where the refcount is exactly one, and nowhere else.

use std::os::unix::fs::FileExt;

use super::super::details::ReadError;
use super::super::entry::{COMPRESSED, COPIED, Cluster, L1_RESERVED, OFFSET};
use super::{Checker, words};

impl Checker<'_, '_> {
    /// Looks at all of them, and mends them if that is wanted and the refcounts are to be trusted.
    pub fn copied(&mut self) -> Result<(), ReadError> {
        if self.table.is_empty() {
            self.read_refcount_table()?;
        }
        let start = self.details.header.l1_offset;
        let mut kept = None;
        words(self.file, start, self.details.l1_entries, |index, entry| {
            let table = entry & OFFSET;
            let unusable = entry & L1_RESERVED != 0 || table.trailing_zeros() < self.bits();
            if table == 0 || unusable || table >> self.bits() >= self.clusters {
                return Ok(());
            }
            self.in_time()?;
            let refcount = self.refcount(table, &mut kept)?;
            if (entry & COPIED != 0) != (refcount == 1) {
                self.corruption(&format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} \
                     refcount={refcount}"
                ));
                if self.mends_copied() {
                    self.before_change()?;
                    let mended = (entry ^ COPIED).to_be_bytes();
                    self.file.write_all_at(&mended, start + index * 8)?;
                }
            }
            self.copied_l2(index, table, &mut kept)
        })
    }

    fn mends_copied(&self) -> bool {
        self.mends_copied && !self.wants_rebuild
    }

    fn copied_l2(
        &mut self,
        l1_index: u64,
        table: u64,
        kept: &mut Option<(u64, Vec<u8>)>,
    ) -> Result<(), ReadError> {
        let entries = self.details.entries();
        let Ok(mut bytes) = self.read_cluster(table, "L2 table") else {
            return Ok(());
        };
        let mut dirty = false;
        for index in 0..bytes.len() / entries.bytes() {
            let Some((entry, bitmap)) = entries.words(&bytes, index) else {
                break;
            };
            let offset = entry & OFFSET;
            let expected = (l1_index * entries.per_table() + index as u64) << entries.cluster_bits;
            // Offset 0 is a place too, with the COPIED bit.
            let elsewhere = match entries.read(entry, bitmap) {
                Ok(Cluster::Plain { offset, .. }) => offset.is_some_and(|at| at != expected),
                _ => false,
            };
            if entries.external && elsewhere {
                self.corruption(&format!(
                    "external data file: the cluster at {expected:#x} of the disk is at \
                     {offset:#x}: l2_entry={entry:x}"
                ));
            }
            let refcount = match entry & COMPRESSED != 0 {
                // Never "copied"; that it is was told when references were counted.
                true if entry & COPIED == 0 => continue,
                true => 0,
                false if offset == 0 => continue,
                // Nothing else can refer to what is in the data file.
                false if entries.external => 1,
                false if offset >> self.bits() >= self.clusters => continue,
                false => self.refcount(offset, kept)?,
            };
            if (entry & COPIED != 0) == (refcount == 1) {
                continue;
            }
            if entry & COMPRESSED == 0 {
                self.corruption(&format!(
                    "OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"
                ));
            }
            let at = index * entries.bytes();
            if let Some(place) = bytes.get_mut(at..at + 8) {
                place.copy_from_slice(&(entry ^ COPIED).to_be_bytes());
                dirty = true;
            }
        }
        // A table that has another owner too is not the place to write to.
        if dirty && self.mends_copied() && self.refcount(table, kept)? == 1 {
            self.before_change()?;
            self.file.write_all_at(&bytes, table)?;
        }
        Ok(())
    }
}
