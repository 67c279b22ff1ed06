//! Tables that become the image's own, or move.
//!
//! An L2 table is made, or copied where a snapshot has it too, before the first entry in it changes.
//! A new refcount table, and a longer L1 table, is placed at the end of the file, together with the
//! refcount blocks for that end, so that none of them needs an allocation of its own.

use std::io;

use rustix::io::Errno;

use super::super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::cluster::COPIED;
use super::engine::{Engine, own};
use super::extents::Run;
use super::io::Kind as Do;
use super::lock::locked;
use super::pages::Kind;

/// Offset of the number of L1 entries in the header, followed by the place of the table.
const L1_TABLE: usize = 36;
/// Offset of the refcount table's place in the header, followed by its length in clusters.
const REFCOUNT_TABLE: usize = 48;

impl Engine {
    /// Gives the L1 table so many entries. Crash-safe: the header names either table, and both are
    /// whole.
    pub async fn grow_l1(&self, entries: u64) -> io::Result<()> {
        let _baton = self.allocating.only().await;
        self.alive()?;
        if entries <= locked(&self.tables).l1.len() as u64 {
            return Ok(());
        }
        self.move_tables(0, Some(entries)).await
    }

    /// Moves the refcount table to the end of the file, with room for `block`, and where so many
    /// entries are given the L1 table too: one write of the header names both. With `allocating`
    /// held.
    pub async fn move_tables(&self, block: u64, l1_entries: Option<u64>) -> io::Result<()> {
        let cluster = self.cluster_bytes();
        let bits = self.layout.cluster_bits;
        let (start, old, old_offset) = {
            let tables = locked(&self.tables);
            let start = tables.end >> bits;
            (start, tables.refcounts.clone(), tables.refcounts_offset)
        };
        let l1_clusters = (l1_entries.unwrap_or(0) * 8).div_ceil(cluster);
        // How many clusters the tables and the blocks need that describe them all.
        let (mut table_clusters, mut missing) = (0, Vec::new());
        loop {
            let count = table_clusters + missing.len() as u64 + l1_clusters;
            let (first, _) = self.widths.place(start);
            let (last, _) = self.widths.place(start + count.max(1) - 1);
            let blocks: Vec<u64> = (first..=last)
                .filter(|block| old.get(*block as usize).is_none_or(|entry| *entry == 0))
                .collect();
            let entries = match l1_entries {
                None => with_room(last.max(block) + 1, old.len() as u64),
                Some(_) => (last + 1).max(old.len() as u64),
            };
            let clusters = (entries * 8).div_ceil(cluster);
            if (clusters, blocks.len()) == (table_clusters, missing.len()) {
                break;
            }
            (table_clusters, missing) = (clusters.max(table_clusters), blocks);
        }
        if table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Errno::FBIG.into());
        }
        let count = table_clusters + missing.len() as u64 + l1_clusters;
        self.extend_by(start, count).await?;
        locked(&self.tables).end = (start + count) << bits;
        let whole = Run {
            first: start,
            count,
            zero: false,
        };

        let mut table = old.clone();
        table.resize((table_clusters * cluster / 8) as usize, 0);
        for (number, block) in (start + table_clusters..).zip(&missing) {
            if let Some(entry) = table.get_mut(*block as usize) {
                *entry = number << bits;
            }
        }
        let l1_offset = (start + count - l1_clusters) << bits;
        let l1 = l1_entries.map(|entries| {
            let mut l1 = locked(&self.tables).l1.clone();
            l1.resize(entries as usize, 0);
            l1
        });
        let mut taken = Vec::new();
        let parts = Parts {
            table: &table,
            whole,
            table_clusters,
            missing: &missing,
            l1: l1.as_deref().map(|l1| (l1_offset, l1)),
        };
        if let Err(error) = self.write_table(parts, &mut taken).await {
            for cluster in taken
                .iter()
                .flat_map(|(first, count)| *first..first + count)
            {
                let _ = self.decrement(cluster).await;
            }
            // Not to be used again in this session: who knows what got there.
            return Err(error);
        }
        let header = self.patch_header(|header| {
            let field = &mut header[REFCOUNT_TABLE..REFCOUNT_TABLE + 12];
            field[..8].copy_from_slice(&(start << bits).to_be_bytes());
            field[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
            if let Some(l1) = &l1 {
                let field = &mut header[L1_TABLE..L1_TABLE + 12];
                field[..4].copy_from_slice(&(l1.len() as u32).to_be_bytes());
                field[4..].copy_from_slice(&l1_offset.to_be_bytes());
            }
        });
        let switched = match self.write_header(header).await {
            Ok(()) => self.sync().await,
            failed => failed,
        };
        if let Err(error) = switched {
            // Nobody knows which of the two counts.
            return Err(self.lose(&error));
        }
        let mut tables = locked(&self.tables);
        tables.refcounts = table;
        tables.refcounts_offset = start << bits;
        let mut given_up = vec![(old_offset, old.len() as u64)];
        if let Some(l1) = l1 {
            given_up.push((tables.l1_offset, tables.l1.len() as u64));
            tables.l1 = l1;
            tables.l1_offset = l1_offset;
        }
        for (first, entries) in given_up {
            for number in 0..(entries * 8).div_ceil(cluster) {
                let offset = first + number * cluster;
                tables.reserved.remove(&offset);
                if let Some(marks) = &mut tables.marks {
                    marks.set(offset >> bits, 1);
                }
                tables.unlinked.push(offset);
            }
        }
        for offset in (start..start + count).map(|number| number << bits) {
            tables.reserved.insert(offset);
        }
        Ok(())
    }

    /// Writes new tables and the refcount blocks between them, and everything that they rest on.
    async fn write_table(&self, parts: Parts<'_>, taken: &mut Vec<(u64, u64)>) -> io::Result<()> {
        let Parts {
            table,
            whole,
            table_clusters,
            missing,
            l1,
        } = parts;
        let bits = self.layout.cluster_bits;
        for (number, block) in (whole.first + table_clusters..).zip(missing) {
            let mut bytes = vec![0; self.layout.cluster_bytes()];
            for cluster in whole.first..whole.first + whole.count {
                let (other, index) = self.widths.place(cluster);
                if other == *block {
                    self.widths.set(&mut bytes, index, 1);
                }
            }
            let len = bytes.len() as u64;
            self.write_own(number << bits, &[&bytes], len).await?;
            let page_bytes = self.page_bytes();
            let mut tables = locked(&self.tables);
            tables.pages.forget(number << bits, len, page_bytes);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let len = bytes.len() as u64;
        self.write_own(whole.first << bits, &[&bytes], len).await?;
        if let Some((offset, l1)) = l1 {
            // It stays as it is: who changes the L1 table has `allocating`.
            let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            let len = (bytes.len() as u64).next_multiple_of(self.cluster_bytes());
            self.write_own(offset, &[&bytes], len).await?;
        }
        let mut at = whole.first;
        while at < whole.first + whole.count {
            let rest = Run {
                first: at,
                count: whole.first + whole.count - at,
                zero: false,
            };
            let (block, _) = self.widths.place(at);
            at += match self.refcount_block(block) {
                None => 1,
                Some(_) => match self.reference(rest).await? {
                    0 => return Err(Errno::IO.into()),
                    count => {
                        taken.push((at, count));
                        count
                    }
                },
            };
        }
        let unlinked = {
            let _baton = self.flushing.only().await;
            self.checkpoint().await?
        };
        locked(&self.tables).unlinked.extend(unlinked);
        Ok(())
    }

    /// Makes sure that the L2 table for `position` is there and ours alone. Whether it is, where
    /// `create` is not set: then an absent one stays absent.
    pub async fn own_table(&self, position: u64, create: bool) -> io::Result<bool> {
        let index = self.layout.place(position).l1_index;
        let state = |engine: &Self| -> io::Result<Option<u64>> {
            let tables = locked(&engine.tables);
            let entry = tables.l1.get(index).copied().ok_or(Errno::IO)?;
            let kept = tables.kept.as_ref().is_some_and(|kept| kept.has(index));
            Ok((entry & COPIED == 0 || kept).then_some(entry))
        };
        match state(self)? {
            None => return Ok(true),
            Some(0) if !create => return Ok(false),
            Some(_) => {}
        }
        let _baton = self.allocating.only().await;
        let Some(entry) = state(self)? else {
            return Ok(true);
        };
        let Ok(old) = self.layout.l2_table(entry) else {
            return Err(self.corrupt_locked("a bad L1 entry", position).await);
        };
        let run = self.allocate_locked(1).await?;
        let bits = self.layout.cluster_bits;
        let offset = run.first << bits;
        let written = match old {
            None if run.zero => Ok(()),
            None => {
                let zeroes = self.write_own(offset, &[], self.cluster_bytes());
                zeroes.await
            }
            Some(old) => self.copy_table(old, offset).await,
        };
        if let Err(error) = written {
            if matches!(self.decrement(run.first).await, Ok(true)) {
                locked(&self.tables).free.insert(Run { zero: false, ..run });
            }
            return Err(error);
        }
        let mut tables = locked(&self.tables);
        if old.is_none() {
            let page_bytes = self.page_bytes();
            // What is known to be zero need not be read.
            for page in (0..self.cluster_bytes())
                .step_by(page_bytes as usize)
                .take(16)
            {
                let bytes = vec![0; page_bytes as usize].into();
                tables.pages.insert(offset + page, Kind::L2, bytes);
            }
        }
        self.set_l1(&mut tables, index, offset | COPIED);
        if let Some(kept) = &mut tables.kept {
            kept.replaced(index);
        }
        tables.barrier = true;
        tables.reserved.insert(offset);
        // It may be the table of a snapshot now, and nothing else: still no place for data.
        tables.unlinked.extend(old);
        Ok(true)
    }

    async fn copy_table(&self, from: u64, to: u64) -> io::Result<()> {
        let (memory, buffers) = own(self.layout.cluster_bytes())?;
        self.host(Do::Read, from, 0, buffers).await?;
        let bytes = memory.bytes();
        self.write_own(to, &[bytes], bytes.len() as u64).await
    }
}

/// Tables that are about to be moved to the end of the file: the refcount table, blocks that it
/// does not have yet, and maybe the L1 table.
struct Parts<'a> {
    table: &'a [u64],
    whole: Run,
    table_clusters: u64,
    missing: &'a [u64],
    l1: Option<(u64, &'a [u64])>,
}

/// Entries of a refcount table that needs `needed` and has had `old`: some more, where the format
/// allows it.
fn with_room(needed: u64, old: u64) -> u64 {
    needed.max((old * 3 / 2).min(MAX_REFCOUNT_TABLE_BYTES / 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refcount_table_grows_as_far_as_the_format_lets_it() {
        let most = MAX_REFCOUNT_TABLE_BYTES / 8;
        assert_eq!(with_room(11, 10), 15);
        assert_eq!(with_room(20, 10), 20);
        assert_eq!(with_room(most - 9, most - 10), most);
        assert_eq!(with_room(most, most - 1), most);
        assert_eq!(with_room(most + 1, most), most + 1);
    }
}
