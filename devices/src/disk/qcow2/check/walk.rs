//! Who refers to which cluster.

use super::super::details::{ReadError, read_up_to};
use super::super::entry::{COPIED, Cluster, L1_RESERVED, OFFSET};
use super::{Checker, WINDOW, too_much, words};

/// The most different L2 tables: twice what the largest L1 table can name.
const MAX_L2_TABLES: usize = 8 << 20;

/// Entries of a table after which it is looked whether there is time left.
const ASKED: u64 = 8192;

impl Checker<'_, '_> {
    /// Finds all L2 tables, and how often each is referred to.
    pub fn list_l2_tables(&mut self) -> Result<(), ReadError> {
        let header = &self.details.header;
        let mut tables = vec![(header.l1_offset, self.details.l1_entries, true)];
        let mut wrong = Vec::new();
        for snapshot in &self.details.snapshots {
            if snapshot.l1_offset.trailing_zeros() < self.bits() && snapshot.l1_entries > 0 {
                wrong.push(format!(
                    "the L1 table of a snapshot is at {:#x}, which is no cluster",
                    snapshot.l1_offset
                ));
            }
            tables.push((snapshot.l1_offset, snapshot.l1_entries, false));
        }
        let mut found: Vec<(u64, u32, bool)> = Vec::new();
        let mut limit = 1 << 20;
        for (offset, entries, active) in tables {
            words(self.file, offset, entries, |index, entry| {
                if index.is_multiple_of(ASKED) {
                    self.in_time()?;
                }
                let table = entry & OFFSET;
                let reserved = entry & L1_RESERVED != 0;
                if reserved || (table != 0 && table.trailing_zeros() < self.bits()) {
                    // The first thousand tell enough of a table of garbage.
                    if wrong.len() < 1000 {
                        wrong.push(format!(
                            "L1 entry {index} of the table at {offset:#x}: {entry:x}"
                        ));
                    }
                } else if table != 0 {
                    found.push((table, 1, active));
                }
                if found.len() > limit {
                    compact(&mut found);
                    if found.len() > MAX_L2_TABLES {
                        return Err(too_much("it has more L2 tables than any image"));
                    }
                    limit = found.len() + (1 << 20);
                }
                Ok(())
            })?;
        }
        compact(&mut found);
        self.l2_tables = found;
        for line in wrong {
            self.senseless(&line);
        }
        Ok(())
    }

    /// Counts the references to the clusters of a window.
    pub fn count_window(&mut self, window: u64) -> Result<(), ReadError> {
        self.window_start = window * WINDOW;
        self.in_time()?;
        // One more than there are: the last cluster may begin where the file ends.
        let len = WINDOW.min((self.clusters + 1).saturating_sub(self.window_start));
        self.window.clear();
        self.window.resize(len as usize, 0);
        self.count(0, 1, 1, "the header");
        let header = &self.details.header;
        self.count(
            header.l1_offset,
            self.details.l1_entries * 8,
            1,
            "the L1 table",
        );
        for index in 0..self.details.snapshots.len() {
            self.in_time()?;
            let snapshot = &self.details.snapshots[index];
            let (offset, len) = (snapshot.l1_offset, snapshot.l1_entries * 8);
            self.count(offset, len, 1, "the L1 table of a snapshot");
        }
        let (offset, len) = self.details.snapshot_table;
        self.count(offset, len, 1, "the snapshot table");
        self.count_bitmaps()?;
        if !self.without_refcounts {
            self.count_refcount_structures();
        }
        for index in 0..self.l2_tables.len() {
            self.in_time()?;
            let (offset, times, active) = self.l2_tables[index];
            self.count(offset, 1 << self.bits(), times, "an L2 table");
            self.count_l2(offset, times, active)?;
            self.step();
        }
        Ok(())
    }

    /// `times` references to all clusters in a range of the file.
    fn count(&mut self, offset: u64, len: u64, times: u32, what: &str) {
        if len == 0 {
            return;
        }
        let first = offset >> self.bits();
        let last = offset.saturating_add(len - 1) >> self.bits();
        if last > self.clusters {
            self.senseless(&format!(
                "{what} at {offset:#x} is beyond the end of the file"
            ));
            return;
        }
        let end = self.window_start + self.window.len() as u64;
        for cluster in first.max(self.window_start)..(last + 1).min(end) {
            let count = &mut self.window[(cluster - self.window_start) as usize];
            *count = count.saturating_add(times);
        }
        if self.first {
            self.touch(first, last);
        }
    }

    fn count_refcount_structures(&mut self) {
        let cluster = self.details.cluster_bytes();
        let table = self.details.refcount_table;
        let len = self.details.refcount_table_clusters * cluster;
        self.count(table, len, 1, "the refcount table");
        for index in 0..self.table.len() {
            let block = self.table[index];
            if self.is_block(block) {
                self.count(block, cluster, 1, "a refcount block");
            }
        }
    }

    fn count_bitmaps(&mut self) -> Result<(), ReadError> {
        let (offset, len) = self.details.bitmap_directory;
        self.count(offset, len, 1, "the directory of bitmaps");
        let total: u64 = self
            .details
            .bitmaps
            .iter()
            .map(|b| b.table_entries * 8)
            .sum();
        if total > self.details.file_bytes {
            self.senseless("the tables of its bitmaps overlap");
            return Ok(());
        }
        let cluster = self.details.cluster_bytes();
        let bitmaps: Vec<(u64, u64)> = self
            .details
            .bitmaps
            .iter()
            .map(|bitmap| (bitmap.table_offset, bitmap.table_entries))
            .collect();
        for (offset, entries) in bitmaps {
            self.count(offset, entries * 8, 1, "the table of a bitmap");
            let file = self.file;
            words(file, offset, entries, |index, entry| {
                if index.is_multiple_of(ASKED) {
                    self.in_time()?;
                }
                let data = entry & OFFSET;
                if data != 0 {
                    if data.is_multiple_of(cluster) {
                        self.count(data, cluster, 1, "a part of a bitmap");
                    } else {
                        self.senseless(&format!("a bitmap's entry {entry:x} is not aligned"));
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn count_l2(&mut self, table: u64, times: u32, active: bool) -> Result<(), ReadError> {
        let cluster = self.details.cluster_bytes();
        if table >> self.bits() >= self.clusters {
            // Told already, or beginning where the file ends: there is nothing in it.
            return Ok(());
        }
        let bytes = read_up_to(self.file, table, cluster as usize)?;
        let entries = self.details.entries();
        let external = entries.external;
        let mut expected = None;
        for index in 0..bytes.len() / entries.bytes() {
            let Some((entry, bitmap)) = entries.words(&bytes, index) else {
                break;
            };
            if entry == 0 && bitmap == 0 {
                continue;
            }
            let found = match entries.read(entry, bitmap) {
                Ok(found) => found,
                Err(wrong) => {
                    let line =
                        format!("L2 entry {index} of the table at {table:#x} {wrong}: {entry:x}");
                    self.senseless(&line);
                    continue;
                }
            };
            let stats = self.first && active;
            match found {
                Cluster::Compressed { offset, len } => {
                    if entry & COPIED != 0 && self.first {
                        self.corruption(&format!(
                            "L2 entry {index} of the table at {table:#x}: a compressed cluster is \
                             marked as copied: {entry:x}"
                        ));
                    }
                    if stats {
                        self.report.allocated_clusters += 1;
                        self.report.compressed_clusters += 1;
                        self.report.fragmented_clusters += 1;
                    }
                    match external {
                        false => self.count(offset, len, times, "a compressed cluster"),
                        true => self.senseless(&format!(
                            "L2 entry {index} of the table at {table:#x}: a compressed cluster in an \
                             image with an external data file: {entry:x}"
                        )),
                    }
                }
                Cluster::Plain {
                    offset: Some(offset),
                    ..
                } => {
                    if stats {
                        self.report.allocated_clusters += 1;
                        if expected.is_some_and(|expected| expected != offset) {
                            self.report.fragmented_clusters += 1;
                        }
                        expected = Some(offset + cluster);
                    }
                    // Nobody counts what is in the data file.
                    if !external {
                        self.count(offset, cluster, times, "a cluster");
                    }
                }
                Cluster::Plain { offset: None, .. } => {}
            }
        }
        Ok(())
    }
}

/// Sorts by offset and adds up what is there more than once.
fn compact(tables: &mut Vec<(u64, u32, bool)>) {
    tables.sort_unstable();
    tables.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 = kept.1.saturating_add(next.1);
            kept.2 |= next.2;
        }
        same
    });
}
